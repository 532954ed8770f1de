"""Turn stored drawings into varied pictures, a batch at a time."""

import math

import torch
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate, max_pool2d

from fusionbench_zoo.recipes.clip_mini.model import MEAN, STD

# By kind of drawing, in the order of `split.KINDS`: photo, colour, icon, glyph, solid.
DEGREES = torch.tensor([0.0, 8.0, 8.0, 14.0, 14.0])
SHEAR = torch.tensor([0.0, 0.08, 0.08, 0.25, 0.2])
SMALLEST = torch.tensor([0.95, 0.85, 0.85, 0.8, 0.7])  # an object of size 1 gets a size between these two
LARGEST = torch.tensor([1.3, 1.1, 1.1, 1.15, 1.15])
SHIFT = torch.tensor([0.0, 0.1, 0.1, 0.15, 0.12])
BEND = torch.tensor([0.0, 0.0, 0.02, 0.1, 0.08])
FLIP = torch.tensor([0.5, 0.0, 0.0, 0.0, 0.5])
FLIP_UPSIDE_DOWN = torch.tensor([0.5, 0.0, 0.0, 0.0, 0.0])
# How often one-colour drawings are painted dark on white, white on black, shaded on black, in any two colours.
PAINT = torch.tensor(
    [[1, 0, 0, 0], [1, 0, 0, 0], [0.45, 0.25, 0.05, 0.25], [0.1, 0.75, 0.05, 0.1], [0.05, 0.5, 0.4, 0.05]]
)
GROUND = torch.tensor([0.65, 0.25, 0.1])  # how often coloured drawings lie on white, on black, on any colour
PHOTO, COLOUR = 0, 1


def augment(images: torch.Tensor, kinds: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return model input (N, 3, 32, 32) for drawings (N, 32, 32, 4) in bytes of the given kinds (N,)."""
    drawn = images.permute(0, 3, 1, 2).float() / 255
    alpha = drawn[:, 3:]
    drawn = torch.cat([drawn[:, :3] * alpha, alpha], dim=1)
    drawn = grid_sample(drawn, _grid(kinds, drawn.shape[-1], random), align_corners=False)
    coloured = (kinds <= COLOUR).view(-1, 1, 1, 1)
    painted = torch.where(coloured, _lay(drawn, random), _paint(_stroke(drawn[:, 3:], random), kinds, random))
    gain, offset, noise = (
        _uniform(len(kinds), low, high, random) for low, high in ((0.85, 1.1), (-0.05, 0.05), (0, 0.04))
    )
    painted = painted * gain + offset + noise * torch.randn(painted.shape, generator=random)
    return (painted.clamp(0, 1) - MEAN) / STD


def _grid(kinds: torch.Tensor, size: int, random: torch.Generator) -> torch.Tensor:
    """Return where each pixel is read: rotated, sheared, scaled, shifted, flipped, bent."""
    n = len(kinds)

    def spread(largest: torch.Tensor) -> torch.Tensor:
        return largest[kinds] * _uniform(n, -1, 1, random).view(n)

    angle, shear = spread(DEGREES) * math.pi / 180, spread(SHEAR)
    zoom = SMALLEST[kinds] + (LARGEST - SMALLEST)[kinds] * torch.rand(2, n, generator=random)
    across = torch.where(torch.rand(n, generator=random) < FLIP[kinds], -1, 1) / zoom[0]
    down = torch.where(torch.rand(n, generator=random) < FLIP_UPSIDE_DOWN[kinds], -1, 1) / zoom[1]
    first = torch.stack([angle.cos() * across, (shear - angle.sin()) * down, spread(SHIFT)], dim=1)
    second = torch.stack([angle.sin() * across, angle.cos() * down, spread(SHIFT)], dim=1)
    grid = affine_grid(torch.stack([first, second], dim=1), [n, 1, size, size], align_corners=False)
    bend = interpolate(torch.randn(n, 2, 4, 4, generator=random), size=size, mode="bilinear", align_corners=True)
    return grid + BEND[kinds].view(n, 1, 1, 1) * bend.permute(0, 2, 3, 1)


def _stroke(alpha: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Make lines thicker, thinner or softer."""
    n = len(alpha)
    thick, thin, soft = max_pool2d(alpha, 3, 1, 1), -max_pool2d(-alpha, 3, 1, 1), avg_pool2d(alpha, 3, 1, 1)
    thicker = _uniform(n, -0.6, 1, random)
    alpha = alpha + thicker.clamp(min=0) * (thick - alpha) + (-thicker).clamp(min=0) * (thin - alpha)
    return alpha + _uniform(n, -1, 1, random).clamp(min=0) * (soft - alpha)


def _paint(alpha: torch.Tensor, kinds: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Give one-colour drawings an ink and a ground."""
    n = len(kinds)
    way = torch.multinomial(PAINT[kinds], 1, generator=random)
    ink, ground = torch.rand(2, n, 3, generator=random)
    too_close = (ink.mean(1, keepdim=True) - ground.mean(1, keepdim=True)).abs() < 0.25
    ground = torch.where(too_close, (ground + 0.5) % 1, ground)
    ink = torch.where(way == 0, 0.15 * ink, torch.where(way < 3, 1.0, ink))
    ground = torch.where(way == 0, 1.0, torch.where(way < 3, 0.0, ground))
    shade = interpolate(torch.rand(n, 1, 5, 5, generator=random), size=alpha.shape[-1], mode="bilinear")
    shade = torch.where((way == 2).view(n, 1, 1, 1), 0.25 + 0.75 * shade, 1.0)
    return ink.view(n, 3, 1, 1) * shade * alpha + ground.view(n, 3, 1, 1) * (1 - alpha)


def _lay(drawn: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Put coloured drawings on a ground; one in six loses its colour."""
    n = len(drawn)
    way = torch.multinomial(GROUND.expand(n, 3), 1, generator=random)
    ground = torch.where(way == 2, torch.rand(n, 3, generator=random), torch.where(way == 0, 1.0, 0.0)).view(n, 3, 1, 1)
    laid = drawn[:, :3] + ground * (1 - drawn[:, 3:])
    return torch.where(_uniform(n, 0, 6, random) < 1, laid.mean(1, keepdim=True), laid)


def _uniform(n: int, low: float, high: float, random: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, 1, 1, 1, generator=random)
