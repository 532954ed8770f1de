"""What all families share that transformers builds."""

from typing import Any

from fusionbench.checkpoint import Checkpoint
from fusionbench.errors import InputError
from fusionbench.formats import read_config


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of the `config.json` beside a checkpoint, which says how to build its module."""
    config = read_config(checkpoint.folder)
    if not config:
        raise InputError(f"'{checkpoint.location or 'The base model'}' has no config.json: it cannot be built.")
    return config
