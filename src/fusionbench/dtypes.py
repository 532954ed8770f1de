"""Dtypes under safetensors' names, as torch and as numpy know them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from fusionbench.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

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


def compute_dtype(name: str) -> torch.dtype:
    """What a merge is computed in: float32, or float64 where the checkpoint itself has it."""
    import torch

    return torch.float64 if name == "F64" else torch.float32


def as_float64(buffer: bytearray, name: str) -> np.ndarray:
    """The numbers in a block of bytes, without torch."""
    import numpy as np

    if name == "BF16":  # numpy has none: it is the upper half of a float32
        return (np.frombuffer(buffer, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if name.startswith("F8"):
        raise InputError("Tensors in 8-bit floating point cannot be compared without torch.")
    return np.frombuffer(buffer, np.dtype(_TORCH[name])).astype(np.float64)
