"""What every zoo does to be published: fill a fresh folder, describe it in a manifest, and put it in its place."""

import json
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusionbench_zoo import sha256
from fusionbench_zoo.recipes.fetch import sources_of

PACKAGE = Path(__file__).parents[1]


def publish(name: str, fill: Callable[[Path], object], facts: dict[str, Any]) -> None:
    """Replace a folder of the package by what `fill` writes, with the facts and hashes of all files in its manifest."""
    target = PACKAGE / name
    fresh = target.with_name(target.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    fill(fresh)
    files = sorted(file for file in fresh.rglob("*") if file.is_file())
    listed = {file.relative_to(fresh).as_posix(): sha256(file) for file in files}
    write_json(fresh / "manifest.json", {"version": 1, "files": listed, **facts})
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def made_with(work: Path, seed: int, zoo: str, packages: list[str]) -> dict[str, Any]:
    """The part of a manifest that is alike for all: seed, what the stages took and found, versions, sources."""
    places = [work / name / "facts.json" for name in ("pretrain", "models", "adapters")]
    facts = {place.parent.name: json.loads(place.read_text()) for place in places if place.exists()}
    return {
        "seed": seed,
        **facts,
        "stages": {stage.stem: stage.read_text().strip() for stage in sorted(work.glob("*.done"))},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "sources": {f"{s['registry']} {s['name']} {s['version']}": s["sha256"] for s in sources_of(zoo)},
    }


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
