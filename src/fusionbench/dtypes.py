"""Dtypes under safetensors' names, as torch and as numpy know them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from fusionbench.errors import InputError
from fusionbench.passes.reference import Block, decode

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_TORCH = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
}


@cache
def to_torch(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name."""
    import torch

    return getattr(torch, _TORCH[name])


@cache
def from_torch(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    text = str(dtype).removeprefix("torch.")
    for name, torch_name in _TORCH.items():
        if torch_name == text:
            return name
    raise InputError(f"Tensors of the dtype '{text}' cannot be stored: there is {', '.join(_TORCH.values())}.")


def as_float64(block: Block) -> NDArray[np.float64]:
    """The numbers in a block of bytes, whole ones too."""
    data, dtype = block
    return decode(data, dtype) if "F" in dtype else data.view(_TORCH[dtype]).astype(np.float64)


def compute_dtype(name: str) -> torch.dtype:
    """What a merge is computed in: float32, or float64 where the checkpoint itself has it."""
    import torch

    return torch.float64 if name == "F64" else torch.float32
