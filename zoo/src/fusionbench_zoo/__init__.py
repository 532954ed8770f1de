"""Embedded models and data for Fusionbench, and the recipes that made them."""

from pathlib import Path

__all__ = ["path"]


def path(*parts: str) -> Path:
    """Return the path of a file or folder inside this package: `path("clip-mini", "base")`."""
    found = Path(__file__).parent.joinpath(*parts)
    if not found.exists():
        raise FileNotFoundError(
            f"The zoo has no {'/'.join(parts)!r}. Make it: python -m fusionbench_zoo.build clip-mini"
        )
    return found
