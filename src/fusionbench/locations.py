"""Where a path of a config points to: a local file or folder, the embedded zoo, or the Hugging Face hub."""

import os
from pathlib import Path

from fusionbench.errors import InputError, did_you_mean

# What is fetched of a model of the hub: the first that it has. The same weights are often there in other formats, too.
WEIGHTS = (["*model*.safetensors"], ["*.safetensors"], ["*.bin", "*.pt"])


def locate(location: str | Path, *, relative_to: Path | None = None) -> Path:
    """Return the local path of `location`.

    `zoo:clip-mini/mnist` is inside the installed `fusionbench-zoo`; `hf:openai/clip-vit-base-patch32` is downloaded
    from the hub (or found in its cache); anything else is a local path, and never touches the network. A relative one
    begins at `relative_to`, the folder of the file that names it, or where that has none of the name, here.
    """
    text = str(location)
    if text.startswith("zoo:"):
        return _in_zoo(text.removeprefix("zoo:"))
    if text.startswith("hf:"):
        return _from_hub(text.removeprefix("hf:"))
    path = Path(text).expanduser()
    own = path if relative_to is None else relative_to / path
    return own if own.exists() or not path.exists() else path


def find(location: str | Path, *, relative_to: Path | None = None) -> Path:
    """Like `locate`, but what it points to must exist."""
    path = locate(location, relative_to=relative_to)
    if path.exists():
        return path
    parent = path.parent
    hint = did_you_mean(path.name, [p.name for p in parent.iterdir()]) if parent.is_dir() else ""
    if hint.startswith("There is"):
        hint = ""
    raise InputError(f"'{location}' does not exist. {hint or 'Give a local path, zoo:NAME, or hf:OWNER/NAME.'}")


def cache_folder() -> Path:
    """Where what was computed once is kept: `$FUSIONBENCH_CACHE`, or `~/.cache/fusionbench`."""
    return Path(os.environ.get("FUSIONBENCH_CACHE") or Path.home() / ".cache" / "fusionbench")


def _in_zoo(name: str) -> Path:
    try:
        import fusionbench_zoo  # pyright: ignore[reportMissingImports]  (a distribution of its own)
    except ModuleNotFoundError:
        raise InputError(
            f"'zoo:{name}' needs the embedded zoo, which is not installed: pip install ./zoo (or fusionbench-zoo)."
        ) from None
    try:
        return fusionbench_zoo.locate(name)
    except FileNotFoundError as error:
        raise InputError(str(error)) from None


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise InputError(f"'hf:{name}' needs huggingface_hub: pip install 'fusionbench[hf]'.") from None
    from fusionbench.writer import CARRIED

    folder = Path()
    try:
        for weights in WEIGHTS:
            wanted = [*weights, *CARRIED]
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
            if any(file for pattern in weights for file in folder.glob(pattern)):
                break
    except Exception as error:  # the hub's client raises a dozen unrelated types for "cannot be had"
        reason = type(error).__name__
        raise InputError(
            f"'hf:{name}' cannot be had from the hub ({reason}). Download it elsewhere and give its local folder."
        ) from error
    return folder
