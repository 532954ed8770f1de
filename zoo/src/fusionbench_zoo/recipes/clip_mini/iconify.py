"""Read and draw the icons of npm's @iconify/json."""

import functools
import io
import json
import multiprocessing
from itertools import groupby
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from fusionbench_zoo.recipes.clip_mini.drawings import SIZE, Drawings
from fusionbench_zoo.recipes.fetch import folder_of

FREE_LICENCES = {
    *("MIT", "Apache-2.0", "CC0-1.0", "ISC", "BSD-3-Clause", "Unlicense", "MPL-2.0", "OFL-1.1"),
    *("CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0"),
}
Icon = tuple[str, str]  # prefix of the icon set, name of the icon


def icon_sets(work: Path) -> dict[str, dict]:
    """Return what Iconify says about each icon set whose licence is free and clear."""
    collections = json.loads((folder_of(work, "@iconify/json") / "package/collections.json").read_text())
    return {prefix: info for prefix, info in collections.items() if info["license"].get("spdx") in FREE_LICENCES}


@functools.lru_cache(maxsize=2)
def icon_set(work: Path, prefix: str) -> dict:
    """Read one icon set."""
    return json.loads((folder_of(work, "@iconify/json") / f"package/json/{prefix}.json").read_text())


def icon_names(work: Path, prefix: str) -> list[str]:
    """Return the names of the icons that are not withdrawn."""
    return [name for name, icon in icon_set(work, prefix)["icons"].items() if not icon.get("hidden")]


def draw(work: Path, icons: list[Icon]) -> np.ndarray:
    """Return (N, 32, 32, 4); what cannot be drawn is empty. Icons of one set should stand together."""
    runs = [list(run) for _, run in groupby(icons, key=lambda icon: icon[0])]
    jobs = [(work, run[i : i + 1000]) for run in runs for i in range(0, len(run), 1000)]
    with multiprocessing.Pool() as pool:
        return np.concatenate(pool.starmap(_draw_some, jobs, chunksize=1))


def drawn(work: Path, icons: list[Icon], groups: list[str], captions: list[list[str]], labels: list[int]) -> Drawings:
    """Draw `icons` and leave out those that show nothing."""
    every = Drawings(draw(work, icons), groups, captions, np.array(labels, np.int64))
    return every.take(visible(every.images).nonzero()[0])


def visible(images: np.ndarray) -> np.ndarray:
    """Mark the drawings that show something: neither nearly empty nor, for one-colour ones, a full square."""
    covered = images[..., 3].mean(axis=(1, 2)) / 255
    coloured = images[..., :3].any(axis=(1, 2, 3))
    return (covered > 0.02) & (coloured | (covered < 0.9))


def family(prefix: str) -> str:
    """Return the group of an icon set: `fa6-solid` and `fa-brands` are one family, `fa`."""
    return prefix.split("-")[0].rstrip("0123456789")


def _draw_some(work: Path, icons: list[Icon]) -> np.ndarray:
    return np.stack([_draw(icon_set(work, prefix), name) for prefix, name in icons])


def _draw(icons: dict, name: str) -> np.ndarray:
    icon = icons["icons"][name]
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    zoom = SIZE / max(width, height)
    w, h = max(1, round(width * zoom)), max(1, round(height * zoom))
    canvas = np.zeros((SIZE, SIZE, 4), np.uint8)
    try:
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=w, height=h))
    except ValueError:  # a few icons use SVG that resvg refuses
        return canvas
    drawn = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))[:SIZE, :SIZE]
    y, x = (SIZE - drawn.shape[0]) // 2, (SIZE - drawn.shape[1]) // 2
    canvas[y : y + drawn.shape[0], x : x + drawn.shape[1]] = drawn
    return canvas
