"""What a hyperparameter may be, as its annotation says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch

from fusionbench import InputError, Range
from fusionbench.registry import _hyperparameter


@pytest.mark.parametrize(
    ("annotation", "given", "taken"),
    [
        (Annotated[float, Range(0, 1)], np.float32(0.5), 0.5),
        (Annotated[int, Range(0)], np.int64(5), 5),
        (list[float], np.array([0.5, 1.0]), [0.5, 1.0]),
        (list[float], torch.tensor([0.5, 1.0]), [0.5, 1.0]),
        (Annotated[float | Literal["auto"], Range(0, 1)], "auto", "auto"),
        (Literal["1", "two"], 1, "1"),
        (str, 2024, "2024"),
        (Path, Path("a/b"), "a/b"),
        (Path, 7, "7"),
        (tuple[int, int], [1, 2], [1, 2]),
        (tuple[int, ...], [1, 2, 3], [1, 2, 3]),
        (Sequence[float], (1.0, 2), (1.0, 2)),
        (Any, {"x": 1}, {"x": 1}),
        (bool, True, True),
        (dict[str, float] | None, None, None),
    ],
)
def test_what_fits_is_taken(annotation: Any, given: Any, taken: Any) -> None:
    found = _hyperparameter("h", annotation, None).check(given, "m")
    assert found == taken and type(found) is type(taken)


@pytest.mark.parametrize(
    ("annotation", "given", "line"),
    [
        (Annotated[float | Literal["auto"], Range(0, 1)], 2.0, "m.h must be in [0, 1]; got 2.0."),
        (Annotated[float | Literal["auto"], Range(0, 1)], "atuo", "must be float or auto in [0, 1]; got 'atuo'."),
        (tuple[int, int], [1, 2, 3], "must be list of int, int; got [1, 2, 3]."),
        (Sequence[float], "12", "must be list of float; got '12'. A list is written as [0.5,0.5]."),
        (Sequence[float], ["a"], "must be list of float; got ['a']."),
        (Annotated[list[float] | None, Range()], 0.5, "must be list of float or null; got 0.5. A list is"),
        (Literal[1, 2], True, "must be 1 | 2; got True."),
        (int, True, "must be int; got True."),
        (str, 0.5, "must be str; got 0.5."),
        (Path, 0.5, "must be file; got 0.5."),
    ],
)
def test_what_does_not_fit_is_one_line(annotation: Any, given: Any, line: str) -> None:
    with pytest.raises(InputError) as error:
        _hyperparameter("h", annotation, None).check(given, "m")
    assert line in str(error.value)


def test_without_an_annotation_anything_is_taken() -> None:
    import inspect

    free = _hyperparameter("h", inspect.Parameter.empty, 0.5)
    assert str(free) == "anything" and free.check("word", "m") == "word"
