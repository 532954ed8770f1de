"""Letters, digits and icons as on photographed signs: tilted, shaded, noisy, with a piece of the neighbours.

Drawn plainly they are no task for a base that has seen other typefaces and icon sets: it has 94 of 100 capitals, all
digits and 87 of 100 icons right.
"""

import math

import numpy as np
from PIL import Image

from fusionbench_zoo.recipes.clip_mini.drawings import SIZE

TILT, SHEAR = math.radians(14), 0.2  # standard deviations
LEAST_CONTRAST, NOISE = 40, 12.0  # of 255 grey levels


def on_signs(images: np.ndarray) -> np.ndarray:
    """Return grey pictures (N, 32, 32); what is random about one depends on its place in `images` alone."""
    random = np.random.default_rng(0)
    alpha = images[..., 3]
    signs = np.empty(alpha.shape, np.uint8)
    for i, middle in enumerate(alpha):
        left, right = alpha[random.integers(len(alpha), size=2)]
        strip = Image.fromarray(np.concatenate([left, middle, right], axis=1))
        covered = np.asarray(_seen(strip, random), np.float32) / 255
        ground, ink = _two_greys(random)
        light = np.add.outer(*random.normal(0, 20, (2, 1)) * np.linspace(-1, 1, SIZE))
        noise = random.normal(0, NOISE, (SIZE, SIZE))
        signs[i] = (ground + (ink - ground) * covered + light + noise).clip(0, 255).round()
    return signs


def _seen(strip: Image.Image, random: np.random.Generator) -> Image.Image:
    """The middle of a strip of three drawings, from a little aside."""
    tilt, shear = random.normal(0, TILT), random.normal(0, SHEAR)
    scale, (x, y) = random.uniform(1.0, 1.35), random.normal(0, 1.5, 2)
    cos, sin = scale * math.cos(tilt), scale * math.sin(tilt)
    rows = (cos, sin + shear), (-sin, cos)
    centre, half = (1.5 * SIZE + x, 0.5 * SIZE + y), SIZE / 2
    shifts = [c - half * sum(row) for c, row in zip(centre, rows, strict=True)]
    matrix = (*rows[0], shifts[0], *rows[1], shifts[1])
    return strip.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _two_greys(random: np.random.Generator) -> np.ndarray:
    while True:
        greys = random.uniform(20, 235, 2)
        if abs(greys[0] - greys[1]) >= LEAST_CONTRAST:
            return greys
