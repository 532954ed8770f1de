"""Make docs/corruptions.md's table and picture: what each corruption does, and with which numbers.

python docs/corruptions.py
"""

from pathlib import Path

import fusionbench_zoo
import numpy as np
from make import insert
from PIL import Image, ImageDraw

from fusionbench.corruptions import CORRUPTIONS, Length, corrupt

DOCS = Path(__file__).parent
SHOWN = {"emoji": 7, "house-numbers": 2}  # of clip-mini's tasks: the number of the test image
SCENE = 0  # of resnet-mini's
GAP, LINE, COLOURS = 4, 14, 160


def main() -> None:
    insert(DOCS / "corruptions.md", "table", table())
    files = {task: fusionbench_zoo.path("clip-mini", "tasks", f"{task}.npz") for task in SHOWN}
    small = [rgb(np.load(files[task])["test_images"][number]) for task, number in SHOWN.items()]
    scene = np.load(fusionbench_zoo.path("resnet-mini", "scenes.npz"))["test_image"][SCENE]
    rows = [row(name, small, scene) for name in CORRUPTIONS]
    half = (len(rows) + 1) // 2
    sheet = np.concatenate([np.concatenate(rows[:half]), np.concatenate(rows[half:])], 1)
    picture = Image.fromarray(sheet).quantize(COLOURS, dither=Image.Dither.NONE)
    picture.save(DOCS / "images" / "corruptions.png", optimize=True)


def table() -> str:
    lines = ["| corruption | does | parameter | severity 1 | 2 | 3 | 4 | 5 |", "|---|---|---|--:|--:|--:|--:|--:|"]
    for name, corruption in CORRUPTIONS.items():
        does = (corruption.function.__doc__ or "").splitlines()[0]
        for i, (parameter, given) in enumerate(corruption.parameters.items()):
            first = f"| `{name}` | {does} " if i == 0 else "| | "
            if isinstance(given, Length):
                cells = [f"{a:.3g} / {b:.3g} px" for a, b in zip(given.at_32, given.at_224, strict=True)]
            else:
                cells = [f"{value:g}" for value in given]
            lines.append(f"{first}| {parameter} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def row(name: str, small: list[np.ndarray], scene: np.ndarray) -> np.ndarray:
    """Small images at severities 1, 3 and 5, enlarged, and a scene as it is at 3 and 5; below them the name."""
    tiles = [enlarged(corrupt(image[None], name, severity)[0]) for image in small for severity in (1, 3, 5)]
    tiles += [corrupt(scene[None], name, severity)[0] for severity in (3, 5)]
    padded = [np.pad(tile, ((0, 0), (0, GAP), (0, 0)), constant_values=255) for tile in tiles]
    picture = Image.fromarray(np.pad(np.concatenate(padded, 1), ((LINE, GAP), (0, GAP), (0, 0)), constant_values=255))
    ImageDraw.Draw(picture).text((0, 1), name, fill=(0, 0, 0))
    return np.asarray(picture)


def rgb(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).convert("RGB"))


def enlarged(image: np.ndarray) -> np.ndarray:
    return np.repeat(np.repeat(image, 2, 0), 2, 1)


if __name__ == "__main__":
    main()
