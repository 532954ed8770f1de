"""Several models side by side, their outputs made one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Run all models on the same input, and combine their outputs element by element.

    Args:
        models: modules that give outputs of one structure: tensors, or tuples, lists, tables and Hugging Face
            `ModelOutput`s of them, nested as they like. What is no tensor (a key-value cache), or one of whole
            numbers (the index of an expert), is left out of tables and becomes None in tuples.
        combine: from stacked outputs, `(number of models, ...)`, to one output; called for every other tensor.
    """

    def __init__(self, models: Sequence[nn.Module], combine: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.combine = combine

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._joined([model(*args, **kwargs) for model in self.models])

    def _joined(self, outputs: list[Any]) -> Any:
        first = outputs[0]
        if isinstance(first, Tensor):
            return self.combine(torch.stack(outputs)) if first.is_floating_point() or first.is_complex() else None
        if isinstance(first, Mapping):  # a ModelOutput is one
            joined = {key: self._joined([output[key] for output in outputs]) for key in first}
            kept = {key: value for key, value in joined.items() if value is not None}
            return kept if type(first) is dict else type(first)(**kept)
        if isinstance(first, tuple | list):
            items = [self._joined(list(group)) for group in zip(*outputs, strict=True)]
            return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
        return None
