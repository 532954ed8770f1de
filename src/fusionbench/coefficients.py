"""Files of merging coefficients: small JSON, a row of one number per model for each tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from fusionbench.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from fusionbench.pool import ModelPool


@dataclass(frozen=True)
class Coefficients:
    """Rows by the name of a tensor, and what was kept of the task vectors when they were learned."""

    models: list[str]
    rows: dict[str, list[float]]
    density: float

    @property
    def digest(self) -> str:
        """A hash of the contents."""
        content = [self.models, self.rows, self.density]
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())

    def of(self, name: str) -> Tensor | None:
        """The row of a tensor, `(models,)`, in float64; None where the file has none."""
        import torch

        row = self.rows.get(name)
        return None if row is None else torch.tensor(row, dtype=torch.float64)


def write_coefficients(file: str, models: Sequence[str], rows: Mapping[str, list[float]], density: float) -> None:
    """Write coefficients as JSON."""
    from fusionbench.writer import write_json

    write_json(Path(file), {"models": list(models), "density": density, "coefficients": dict(rows)})


def read_coefficients(file: str | Path, pool: ModelPool | None = None) -> Coefficients:
    """Read coefficients; with a pool, in the order of its models.

    Raises:
        InputError: where the file is none of coefficients, or of other models or tensors than the pool's.
    """
    if not Path(file).is_file():
        raise InputError(f"The file of coefficients '{file}' does not exist: give a file that adamerging wrote.")
    try:
        content = json.loads(Path(file).read_text())
        found = Coefficients(
            [str(name) for name in content["models"]],
            {str(name): [float(value) for value in row] for name, row in content["coefficients"].items()},
            float(content["density"]),
        )
        lengths = {len(row) for row in found.rows.values()}
        if lengths != {len(found.models)} or not found.models or not 0 < found.density <= 1:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"'{file}' holds no coefficients: give a file that adamerging wrote.") from None
    if pool is None:
        return found
    if set(found.models) != set(pool):
        raise InputError(
            f"The coefficients in '{file}' are of the models {', '.join(found.models)}; the pool has {', '.join(pool)}."
        )
    for name in found.rows:
        if name not in pool.reference.specs:
            raise InputError(
                f"'{file}' has coefficients of '{name}', which the models lack. {did_you_mean(name, pool.reference)}"
            )
    order = [found.models.index(name) for name in pool]
    return Coefficients(list(pool), {name: [row[i] for i in order] for name, row in found.rows.items()}, found.density)
