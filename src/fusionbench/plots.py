"""Pictures, by matplotlib."""

from __future__ import annotations

from pathlib import Path

from fusionbench.errors import InputError
from fusionbench.writer import check_file


def heat_map(
    rows: list[str], columns: list[str], values: list[list[float]], file: Path, *, title: str, highest: float = 1.0
) -> None:
    """Draw a matrix as a heat map, a small one with its numbers, to a `.png`, `.svg` or `.pdf` file.

    Colours run from 0, or the smallest value below it, to `highest`.
    """
    check_picture(file)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    small = len(rows) <= 12
    width, height = 1.6 + 0.62 * len(columns), 1.6 + (0.62 if small else 0.13) * len(rows)
    width += 0.8 if small else 0.05 * max(map(len, rows))
    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    lowest = min(0.0, *map(min, values))
    image = axes.imshow(values, cmap="cividis", vmin=lowest, vmax=highest, aspect="equal" if small else "auto")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows, fontsize=None if small else 6)
    for i, row in enumerate(values if small else []):
        for j, value in enumerate(row):
            text = f"{value:.2f}".replace("-0.00", "0.00")
            bright = value > lowest + 0.6 * (highest - lowest)
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="black" if bright else "white")
    axes.set_title(title)
    figure.colorbar(image, ax=axes, shrink=0.8 if small else 0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def curves(points: list[float], lines: dict[str, list[float]], file: Path, *, title: str, label: str) -> None:
    """Draw lines over the same points, each in a panel of its own, to a `.png`, `.svg` or `.pdf` file."""
    check_picture(file)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(lines), figsize=(4.2 * len(lines), 3), layout="constrained", squeeze=False)
    for axes, (name, values) in zip(panels[0], lines.items(), strict=True):
        axes.plot(points, values, marker="o", markersize=3, color="#0072B2")
        axes.set_xlabel(label)
        axes.set_ylabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def check_picture(file: Path) -> None:
    """An error where no picture can be drawn to `file`."""
    from importlib.util import find_spec

    if file.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"'{file}' is no picture: name a .png, .svg or .pdf file.")
    if find_spec("matplotlib") is None:
        raise InputError("Pictures need matplotlib: pip install 'fusionbench[plot]'.")
    check_file(file, "picture")
