"""Corruptions of images after ImageNet-C (Hendrycks & Dietterich, 2019, arXiv 1903.12261), at any size of image.

What each does, and how much at which severity, is as published, for images whose shorter side is 224 pixels. Lengths
(a blur's width, a displacement, a drop) have a second value, chosen here, at 32 pixels, where a seventh of the first
would often be nothing. Between the two sizes a length lies on the line through both values; below 32 it is that at 32;
above 224 it grows with the image, and so does the grain of noise. Shares, factors and qualities are as published.

`CORRUPTIONS[name].parameters` are the numbers; docs/corruptions.md has them as a table, and says what differs from the
published code. Frost is not there: it needs photographs of frost.
"""

from __future__ import annotations

import inspect
import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fusionbench.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 1  # changes whenever corrupted images do
SMALL, LARGE = 32, 224  # pixels, between which lengths are interpolated
CHUNK = 2**20  # numbers worked on at once
Five = tuple[float, float, float, float, float]
Batch = TypeVar("Batch", np.ndarray, "list[Image]")
Streams = list[np.random.Generator]
"""The random numbers of each image."""


@dataclass(frozen=True)
class Length:
    """A length in pixels for each severity, of images whose shorter side is 32 or less, and 224."""

    at_32: Five
    at_224: Five

    def pixels(self, severity: int, side: int) -> float:
        """The length in an image whose shorter side is `side`."""
        small, large = self.at_32[severity - 1], self.at_224[severity - 1]
        if side > LARGE:
            return large * side / LARGE
        return small + (large - small) * max(0, side - SMALL) / (LARGE - SMALL)


@dataclass(frozen=True)
class Corruption:
    """A registered corruption.

    Attributes:
        name: the function's name, as the field spells it.
        function: takes images, `(batch, H, W, 3)` in 0 to 1, the images' streams if it is random, and its parameters'
            values; what it gives is clipped to 0 to 1.
        parameters: by name, a value or a length for each severity.
        moves: whether things change their places, so that what is known of each pixel is no longer true.
    """

    name: str
    function: Callable[..., np.ndarray]
    parameters: dict[str, Five | Length]
    moves: bool

    def values(self, severity: int, side: int) -> dict[str, float]:
        """The parameters at a severity, in an image whose shorter side is `side` pixels."""
        return {
            name: given.pixels(severity, side) if isinstance(given, Length) else given[severity - 1]
            for name, given in self.parameters.items()
        }

    @property
    def random(self) -> bool:
        return "streams" in inspect.signature(self.function).parameters


@dataclass(frozen=True)
class Corrupt:
    """A corruption at a severity.

    Args:
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of its random numbers, 0 or more.
    """

    name: str
    severity: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in CORRUPTIONS:
            raise InputError(f"No corruption is called '{self.name}'. {did_you_mean(str(self.name), CORRUPTIONS)}")
        if self.severity not in (1, 2, 3, 4, 5) or isinstance(self.severity, bool | float):
            raise InputError(f"{self.name}: a severity is 1, 2, 3, 4 or 5; got {self.severity!r}.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise InputError(f"{self.name}: a seed is a whole number of 0 or more; got {self.seed!r}.")

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "severity": self.severity, "seed": self.seed, "version": VERSION}

    def __call__(self, images: Any, numbers: Sequence[int] | np.ndarray) -> Any:
        """As `corrupt`."""
        if not isinstance(images, np.ndarray):
            from PIL import Image

            arrays = [np.asarray(image.convert("RGB"))[None] for image in images]
            return [Image.fromarray(self._array(a, [n])[0]) for a, n in zip(arrays, numbers, strict=True)]
        if images.ndim == 3:
            images = np.repeat(images[..., None], 3, -1)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise InputError(
                f"Images are uint8 of (batch, H, W, 3) or (batch, H, W); got {images.dtype} {images.shape}."
            )
        return self._array(images, numbers)

    def _array(self, images: np.ndarray, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        corruption, random = CORRUPTIONS[self.name], CORRUPTIONS[self.name].random
        values = corruption.values(self.severity, min(images.shape[1:3]))
        key = [self.seed, zlib.crc32(self.name.encode()), self.severity]
        result = np.empty_like(images)
        step = max(1, CHUNK // max(1, images[:1].size))
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            streams = [np.random.default_rng([*key, int(number)]) for number in numbers[part]] if random else []
            pixels = images[part].astype(np.float32) / 255
            changed = corruption.function(pixels, *([streams] if random else []), **values)
            result[part] = np.rint(255 * changed.clip(0, 1))
        return result


CORRUPTIONS: dict[str, Corruption] = {}


def corrupt(
    images: Batch, name: str, severity: int, *, seed: int = 0, numbers: Sequence[int] | np.ndarray | None = None
) -> Batch:
    """Images as they are with a corruption, of the same type and sizes.

    Args:
        images: bytes, `(batch, H, W, 3)` of dtype uint8, or a list of PIL images of any sizes. Grey ones,
            `(batch, H, W)` or of PIL, become RGB.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of the random numbers, 0 or more.
        numbers: the number of each image in its data set (default: 0, 1, ...). The random numbers of an image depend on
            seed, name, severity and its number only, so that batches and their order change nothing.

    Raises:
        InputError: for an unknown name, a severity that is not 1 to 5, or an array of another shape or dtype.
    """
    return Corrupt(name, severity, seed)(images, range(len(images)) if numbers is None else numbers)


def corruption(*, moves: bool = False, **parameters: Five | Length) -> Callable[[Callable[..., np.ndarray]], Any]:
    """Register a function as a corruption; `parameters` are its arguments' values at severities 1 to 5."""

    def register(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        CORRUPTIONS[function.__name__] = Corruption(function.__name__, function, parameters, moves)
        return function

    return register


@corruption(sigma=(0.08, 0.12, 0.18, 0.26, 0.38))
def gaussian_noise(images: np.ndarray, streams: Streams, sigma: float) -> np.ndarray:
    """Normal noise is added, as of a sensor in low light."""
    return images + sigma * _grain(images, streams, lambda stream, x: stream.standard_normal(x.shape, np.float32))


@corruption(photons=(60, 25, 12, 5, 3))
def shot_noise(images: np.ndarray, streams: Streams, photons: float) -> np.ndarray:
    """A number of photons is counted that is Poisson distributed; white is `photons` in the mean."""
    return images + _grain(images, streams, lambda stream, x: stream.poisson(x * photons) / photons - x)


@corruption(share=(0.03, 0.06, 0.09, 0.17, 0.27))
def impulse_noise(images: np.ndarray, streams: Streams, share: float) -> np.ndarray:
    """A share of all values becomes 0 or 1: salt and pepper."""
    chance = _grain(images, streams, lambda stream, x: stream.random(x.shape, np.float32))
    return np.where(chance < share, chance < share / 2, images)


@corruption(sigma=(0.15, 0.2, 0.35, 0.45, 0.6))
def speckle_noise(images: np.ndarray, streams: Streams, sigma: float) -> np.ndarray:
    """Normal noise is added that is larger where it is brighter."""
    noise = _grain(images, streams, lambda stream, x: stream.standard_normal(x.shape, np.float32))
    return images + sigma * images * noise


@corruption(sigma=Length((0.4, 0.55, 0.7, 0.85, 1.1), (1, 2, 3, 4, 6)))
def gaussian_blur(images: np.ndarray, sigma: float) -> np.ndarray:
    """Each pixel is a mean around it, weighted by a normal distribution."""
    return _gaussian(images, sigma)


@corruption(radius=Length((0.7, 0.95, 1.2, 1.5, 1.8), (3, 4, 6, 8, 10)))
def defocus_blur(images: np.ndarray, radius: float) -> np.ndarray:
    """Each point becomes a disc, as out of focus."""
    steps = np.arange(-int(radius + 1), int(radius + 1) + 1)
    disc = np.clip(radius + 0.5 - np.hypot(steps, steps[:, None]), 0, 1)
    return _convolve(images, disc[None] / disc.sum())


@corruption(
    sigma=Length((0.4, 0.45, 0.45, 0.5, 0.55), (0.7, 0.9, 1, 1.1, 1.5)),
    reach=Length((0.55, 0.75, 0.65, 1.25, 1.6), (1, 2, 2, 3, 4)),
    times=(2, 1, 3, 2, 2),
)
def glass_blur(images: np.ndarray, streams: Streams, sigma: float, reach: float, times: float) -> np.ndarray:
    """Each pixel takes the colour of one within reach, some times over, between two blurs: frosted glass."""
    batch, height, width, _ = images.shape
    images = _gaussian(images, sigma)
    for _ in range(int(times)):
        moved = np.rint(_draw(streams, lambda stream: stream.uniform(-reach, reach, (2, height, width)))).astype(int)
        rows = (np.arange(height)[:, None] + moved[:, 0]).clip(0, height - 1)
        columns = (np.arange(width) + moved[:, 1]).clip(0, width - 1)
        images = images[np.arange(batch)[:, None, None], rows, columns]
    return _gaussian(images, sigma)


@corruption(sigma=Length((1, 1.5, 2, 2.5, 3), (3, 5, 8, 12, 15)))
def motion_blur(images: np.ndarray, streams: Streams, sigma: float) -> np.ndarray:
    """Each point leaves a trail that fades as a normal distribution, up to 45 degrees from the horizontal."""
    return _trail(images, _draw(streams, lambda stream: stream.uniform(-45, 45)), sigma)


@corruption(zoom=(1.11, 1.15, 1.2, 1.24, 1.3), moves=True)
def zoom_blur(images: np.ndarray, zoom: float) -> np.ndarray:
    """The mean of the image and of eleven that are enlarged by factors from 1 to `zoom`."""
    total = images.copy()
    for factor in np.linspace(1, zoom, 11):
        enlarged = images
        for axis in (1, 2):
            centre = (images.shape[axis] - 1) / 2
            enlarged = _along(enlarged, centre + (np.arange(images.shape[axis]) - centre) / factor, axis)
        total += enlarged
    return total / 12


@corruption(
    mean=(0.1, 0.2, 0.55, 0.55, 0.55),
    flake=Length((1.8, 1.5, 2, 2.2, 1.6), (3, 2, 4, 4.5, 2.5)),
    threshold=(0.5, 0.5, 0.9, 0.85, 0.85),
    sigma=Length((0.8, 0.8, 1.2, 1.2, 1.7), (4, 4, 8, 8, 12)),
    kept=(0.8, 0.7, 0.7, 0.65, 0.55),
)
def snow(
    images: np.ndarray, streams: Streams, mean: float, flake: float, threshold: float, sigma: float, kept: float
) -> np.ndarray:
    """Flakes fall across an image that is whitened: `kept` is its own share."""
    shape = [int(np.ceil(size / flake)) + 1 for size in images.shape[1:3]]
    flakes = mean + 0.3 * _draw(streams, lambda stream: stream.standard_normal((*shape, 1), np.float32))
    for axis in (1, 2):
        flakes = _along(flakes, np.arange(images.shape[axis]) / flake, axis)
    flakes = np.where(flakes < threshold, 0, flakes.clip(0, 1)).astype(np.float32)
    flakes = _trail(flakes, _draw(streams, lambda stream: stream.uniform(-135, -45)), sigma)
    grey = images @ np.array([0.299, 0.587, 0.114], np.float32)
    white = np.maximum(images, 1.5 * grey[..., None] + 0.5)
    return kept * images + (1 - kept) * white + flakes + flakes[:, ::-1, ::-1]


@corruption(amount=(1.5, 2, 2.5, 2.5, 3), decay=(2, 2, 1.7, 1.5, 1.4))
def fog(images: np.ndarray, streams: Streams, amount: float, decay: float) -> np.ndarray:
    """A plasma whose detail fades by `decay` squared with each octave is added; the image stays as bright."""
    plasma = 0
    for octave in range(1, max(images.shape[1:3]).bit_length() + 1):
        layer = _draw(streams, lambda stream, n=2**octave + 1: stream.uniform(-1, 1, (n, n, 1)).astype(np.float32))
        for axis in (1, 2):
            layer = _along(layer, np.linspace(0, 2**octave, images.shape[axis]), axis)
        plasma = plasma + layer / decay ** (2 * octave)
    plasma = plasma - np.min(plasma, (1, 2, 3), keepdims=True)
    plasma = plasma / np.maximum(np.max(plasma, (1, 2, 3), keepdims=True), 1e-6)
    brightest = images.max((1, 2, 3), keepdims=True)
    return (images + amount * plasma) * brightest / (brightest + amount)


@corruption(
    level=(1.9, 1.06, 0.71, 0, -0.18),
    drop=Length((1.3, 1.15, 1, 0.8, 0.8), (4, 3, 2, 1, 1)),
    edge=Length((0, 0, 0, 1, 1), (0, 0, 0, 1.5, 1.5)),
    strength=(0.6, 0.6, 0.5, 1, 1),
)
def spatter(
    images: np.ndarray, streams: Streams, level: float, drop: float, edge: float, strength: float
) -> np.ndarray:
    """Drops lie where a smooth random field is above a level: clear water, or mud, which has soft edges."""
    field = _field(streams, images.shape[1:3], drop)
    if edge:
        mud = _gaussian((field > level).astype(np.float32), edge)
        mud = np.where(mud < 0.8, 0, strength * mud)
        return images * (1 - mud) + mud * np.array([63, 42, 20], np.float32) / 255
    depth = np.where(field > level, 0.5 + field - level, 0)
    lit = depth - np.pad(depth, ((0, 0), (1, 0), (1, 0), (0, 0)))[:, :-1, :-1]  # light from above and left
    water = np.where(field > level, 0.15 + 0.7 * lit.clip(0, 1), 0) * strength
    return images + water * np.array([175, 238, 238], np.float32) / 255


@corruption(factor=(0.4, 0.3, 0.2, 0.1, 0.05))
def contrast(images: np.ndarray, factor: float) -> np.ndarray:
    """Differences to the image's mean colour are multiplied."""
    mean = images.mean((1, 2), keepdims=True)
    return (images - mean) * factor + mean


@corruption(added=(0.1, 0.2, 0.3, 0.4, 0.5))
def brightness(images: np.ndarray, added: float) -> np.ndarray:
    """The value of each pixel, which is its largest of red, green and blue, grows, to 1 at most; its hue stays."""
    value = images.max(-1, keepdims=True)
    brighter = np.minimum(value + added, 1)
    return np.where(value > 0, images * brighter / np.maximum(value, 1e-6), brighter)


@corruption(factor=(0.3, 0.1, 2, 5, 20), added=(0, 0, 0, 0.1, 0.2))
def saturate(images: np.ndarray, factor: float, added: float) -> np.ndarray:
    """The saturation of each pixel is multiplied, and added to; grey has the hue of red."""
    value = images.max(-1, keepdims=True)
    colour = (value - images) / np.maximum(value, 1e-6)  # of unit saturation, when divided by it
    saturation = colour.max(-1, keepdims=True)
    red = np.array([0, 1, 1], np.float32)
    colour = np.where(saturation > 0, colour / np.maximum(saturation, 1e-6), red)
    return value * (1 - colour * (saturation * factor + added).clip(0, 1))


@corruption(
    reach=Length((0.35, 0.5, 0.65, 0.8, 1), (1, 1.5, 2, 2.6, 3.2)),
    smooth=Length((2, 2, 2, 2, 2), (8, 8, 8, 8, 8)),
    moves=True,
)
def elastic_transform(images: np.ndarray, streams: Streams, reach: float, smooth: float) -> np.ndarray:
    """Pixels are displaced by `reach` in the mean square, along each axis, by a field that is `smooth`."""
    rows, columns = (reach * _field(streams, images.shape[1:3], smooth)[..., 0] for _ in range(2))
    return _sample(images, rows + np.arange(images.shape[1])[:, None], columns + np.arange(images.shape[2]))


@corruption(block=Length((2, 3, 4, 5, 6), (1 / 0.6, 2, 2.5, 1 / 0.3, 4)))
def pixelate(images: np.ndarray, block: float) -> np.ndarray:
    """Squares of `block` pixels have one colour, the mean."""
    for axis in (1, 2):
        squares = (np.arange(images.shape[axis]) / block).astype(int)
        starts = np.flatnonzero(np.diff(squares, prepend=-1))
        shape = [-1 if a == axis else 1 for a in range(4)]
        means = np.add.reduceat(images, starts, axis) / np.bincount(squares).reshape(shape)
        images = np.take(means, squares, axis)
    return images


@corruption(quality=(25, 18, 15, 10, 7))
def jpeg_compression(images: np.ndarray, quality: float) -> np.ndarray:
    """What Pillow writes as JPEG of this quality, and reads."""
    from PIL import Image

    result = np.empty_like(images)
    for image, read in zip(np.rint(255 * images).astype(np.uint8), result, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(quality))
        read[:] = np.asarray(Image.open(file), np.float32) / 255
    return result


def _draw(streams: Streams, draw: Callable[[np.random.Generator], Any]) -> np.ndarray:
    """What is drawn from each image's stream: `(batch, ...)`."""
    return np.stack([draw(stream) for stream in streams])


def _grain(
    images: np.ndarray, streams: Streams, draw: Callable[[np.random.Generator, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Noise of each pixel; of an image above 224 pixels, of squares that are as large as a pixel at 224."""
    squares = [(np.arange(size) / max(1, min(images.shape[1:3]) / LARGE)).astype(int) for size in images.shape[1:3]]
    first = [np.flatnonzero(np.diff(square, prepend=-1)) for square in squares]
    drawn = np.stack([draw(s, image[np.ix_(*first)]) for s, image in zip(streams, images, strict=True)])
    return np.take(np.take(drawn, squares[0], 1), squares[1], 2).astype(np.float32)


def _field(streams: Streams, shape: Sequence[int], sigma: float) -> np.ndarray:
    """Smooth normal noise of variance 1: `(batch, H, W, 1)`."""
    kernel = _bell(sigma)
    more = len(kernel) // 2
    noise = _draw(
        streams, lambda stream: stream.standard_normal((shape[0] + 2 * more, shape[1] + 2 * more, 1), np.float32)
    )
    return _gaussian(noise, sigma)[:, more : more + shape[0], more : more + shape[1]] / float((kernel**2).sum())


def _bell(sigma: float) -> np.ndarray:
    """The weights of a normal distribution around the middle: `(odd,)`, up to three deviations."""
    reach = int(np.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return (weights / weights.sum()).astype(np.float32)


def _gaussian(images: np.ndarray, sigma: float) -> np.ndarray:
    """Images with a normal blur; beyond its edges an image goes on as at the edge."""
    kernel = _bell(sigma)
    reach = len(kernel) // 2
    for axis in (1, 2):
        padded = np.pad(images, [(reach, reach) if a == axis else (0, 0) for a in range(4)], "edge")
        size, images = images.shape[axis], np.zeros_like(images)
        for i, weight in enumerate(kernel):
            images += weight * padded[tuple(slice(i, i + size) if a == axis else slice(None) for a in range(4))]
    return images


def _convolve(images: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    """Images with a kernel each, or one for all: `(batch, K, K)`, K odd; they go on beyond edges as at the edge."""
    (height, width), reach = images.shape[1:3], kernels.shape[-1] // 2
    padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), "edge").transpose(0, 3, 1, 2)
    size = [-(-n // 16) * 16 for n in padded.shape[2:]]  # whole multiples of 16 are quick to transform
    product = np.fft.rfft2(padded, size) * np.fft.rfft2(kernels.astype(np.float32), size)[:, None]
    whole = np.fft.irfft2(product, size)[:, :, 2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]
    return whole.transpose(0, 2, 3, 1).astype(np.float32)


def _trail(images: np.ndarray, degrees: np.ndarray, sigma: float) -> np.ndarray:
    """Images in which each point leaves a trail in a direction: `degrees` above the horizontal, `(batch,)`."""
    reach = int(np.ceil(3 * sigma)) + 1
    along = np.arange(0, 3 * sigma, 0.25)
    weights = np.exp(-0.5 * (along / sigma) ** 2) / np.exp(-0.5 * (along / sigma) ** 2).sum()
    angles = np.deg2rad(degrees)[:, None]
    rows, columns = reach - along * np.sin(angles), reach + along * np.cos(angles)
    kernels = np.zeros((len(images), 2 * reach + 1, 2 * reach + 1))
    image = np.arange(len(images))[:, None]
    for down in (0, 1):
        for right in (0, 1):
            r, c = np.floor(rows).astype(int) + down, np.floor(columns).astype(int) + right
            np.add.at(kernels, (image, r, c), weights * (1 - abs(rows - r)) * (1 - abs(columns - c)))
    return _convolve(images, kernels)


def _along(images: np.ndarray, positions: np.ndarray, axis: int) -> np.ndarray:
    """Images at positions along an axis, interpolated linearly."""
    last = images.shape[axis] - 1
    positions = positions.clip(0, last)
    low = positions.astype(int)
    part = (positions - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(4)])
    return np.take(images, low, axis) * (1 - part) + np.take(images, np.minimum(low + 1, last), axis) * part


def _sample(images: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Images at rows and columns, each `(batch, H, W)`, interpolated linearly."""
    height, width = images.shape[1:3]
    rows, columns = rows.clip(0, height - 1), columns.clip(0, width - 1)
    image, r, c = np.arange(len(images))[:, None, None], rows.astype(int), columns.astype(int)
    down, right = np.minimum(r + 1, height - 1), np.minimum(c + 1, width - 1)
    y, x = (rows - r)[..., None], (columns - c)[..., None]
    upper = images[image, r, c] * (1 - x) + images[image, r, right] * x
    lower = images[image, down, c] * (1 - x) + images[image, down, right] * x
    return upper * (1 - y) + lower * y
