"""An adapter's two files: `adapter_config.json`, which says that exactly some modules change, and the tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fusionbench.checkpoint import Checkpoint
from fusionbench.formats import ADAPTER_CONFIG, DTYPES, header_bytes
from fusionbench.journal import Partial
from fusionbench.writer import check_writable, write_json


def write_adapter(
    config: Mapping[str, Any], tensors: Checkpoint, folder: str | Path, *, overwrite: bool = False
) -> Path:
    """Write an adapter in PEFT's format: the folder has its name when it is complete, and the same bytes always."""
    folder = Path(folder)
    check_writable(folder, overwrite=overwrite)
    with Partial(folder, "adapter") as partial:
        partial.restart()  # of a killed run it may hold a part
        specs = dict(sorted(tensors.specs.items(), key=lambda item: -DTYPES[item[1].dtype]))
        with open(partial.path / "adapter_model.safetensors", "wb") as file:
            file.write(header_bytes(specs, {"format": "pt"})[0])
            for name in specs:
                for start, stop in tensors.blocks(name):
                    file.write(tensors.as_stored(name, start, stop).data)
            file.flush()
            os.fsync(file.fileno())
        write_json(partial.path / ADAPTER_CONFIG, dict(config), sort_keys=True)
        check_writable(folder, overwrite=overwrite)  # again: another run may have come first
        partial.become()
    return folder


def config_of(ranks: Mapping[str, int], others: Iterable[str] = ()) -> dict[str, Any]:
    """What says that these modules have these ranks, each with scaling 1, and that no other module is changed.

    PEFT looks for modules whose names end in those given: `others` are the model's other modules, as far as known.
    """
    most = max(ranks.values())
    ends = tuple(f".{module}" for module in ranks)
    pattern = {
        # Where it ends another module's name, too, it must be the whole name.
        (f"^{re.escape(name)}" if any(other.endswith(f".{name}") for other in ranks) else name): rank
        for name, rank in ranks.items()
        if rank != most
    }
    return {
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks),  # by their full names, so that nothing else chooses among them
        "exclude_modules": sorted(name for name in others if name.endswith(ends) and name not in ranks) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
    }
