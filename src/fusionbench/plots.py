"""Pictures, by matplotlib."""

from __future__ import annotations

from pathlib import Path

from fusionbench.errors import InputError


def heat_map(names: list[str], values: list[list[float]], file: Path, *, title: str) -> None:
    """Draw a square matrix as a heat map with its numbers, to a `.png`, `.svg` or `.pdf` file."""
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"'{file}' is no picture: name a .png, .svg or .pdf file.")
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise InputError("Pictures need matplotlib: pip install 'fusionbench[plot]'.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = 1.6 + 0.62 * len(names)
    figure, axes = pyplot.subplots(figsize=(size + 0.8, size), layout="constrained")
    image = axes.imshow(values, cmap="cividis", vmin=min(0.0, *map(min, values)), vmax=1.0)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            text = f"{value:.2f}".replace("-0.00", "0.00")
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="black" if value > 0.6 else "white")
    axes.set_title(title)
    figure.colorbar(image, ax=axes, shrink=0.8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
