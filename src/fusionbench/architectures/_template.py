"""Any module at all: a copy of one given, with other tensors."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from fusionbench.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import nn


class Template:
    """Build models as copies of a module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def backbone(self, checkpoint: Checkpoint) -> Checkpoint:
        """All of it."""
        return checkpoint

    def build(self, checkpoint: Checkpoint) -> nn.Module:
        """A copy of the module with the tensors of `checkpoint`."""
        module = copy.deepcopy(self._module)
        module.load_state_dict(dict(checkpoint))
        return module
