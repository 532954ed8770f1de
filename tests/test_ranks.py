"""Magnitudes of ranks: exact, whether they are found near those of a sample or by counting bit patterns."""

import numpy as np
import pytest
import torch

import fusionbench as fb
from fusionbench import ranks
from fusionbench.passes import Selection

RANKS = [1, 20, 4000, 19_000, 20_000, 30_000]


@pytest.fixture(autouse=True)
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "WHOLE", 1000)


def pool_of(values: torch.Tensor, parts: int = 1) -> fb.ModelPool:
    """Two models whose changes are these values, and these in reverse order with other signs."""
    tensors = [dict(enumerate(v.chunk(parts))) for v in (torch.zeros_like(values), values, -values.flip(0))]
    base, *models = ({f"w{i}": part.clone() for i, part in table.items()} for table in tensors)
    return fb.ModelPool(dict(zip("ab", models, strict=True)), base=base)


def expected(values: torch.Tensor, of: list[int]) -> list[list[float]]:
    """By sorting."""
    sizes = values.float().abs().sort(descending=True).values.tolist() + [0.0] * RANKS[-1]
    return [[sizes[rank - 1]] * 2 for rank in of]


def draws() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(20_000, generator=random)
    some = torch.rand(20_000, generator=random)
    return {
        "normal": normal,
        "half zeros": normal * (some < 0.5),
        "rows of different sizes": normal * torch.linspace(0.01, 1, 20)[:, None].expand(20, 1000).reshape(-1),
        "bfloat16": normal.bfloat16(),
        "few values": (normal * 2).round(),
        "one value": torch.ones(20_000),
        "wild": normal * 10.0 ** (some * 60 - 40),
        "sorted": normal.sort().values,
    }


@pytest.mark.parametrize("kind", draws())
def test_a_rank_has_the_magnitude_that_sorting_gives(kind: str) -> None:
    values = draws()[kind]
    p = pool_of(values).param("w0")
    for some in (RANKS, [4000], [19_000, 200]):
        assert ranks.largest(p, some).tolist() == expected(values, some)


@pytest.mark.parametrize("kind", ["normal", "few values"])
def test_so_it_has_over_a_whole_model(kind: str) -> None:
    values = draws()[kind]
    pool = pool_of(values, parts=3)
    assert (ranks._collected(pool, [4000], None) is None) == (kind == "few values")
    assert ranks.largest(pool, [4000]).tolist() == expected(values, [4000])


def test_most_are_found_near_the_sample_s_and_others_are_counted() -> None:
    near = {kind: ranks._collected(pool_of(values).param("w0"), [4000], None) for kind, values in draws().items()}
    assert {kind for kind, found in near.items() if found is None} == {
        "few values",
        "one value",
        "sorted",
        "rows of different sizes",
    }


def test_a_sample_that_misleads_costs_a_second_look_and_no_exactness(monkeypatch: pytest.MonkeyPatch) -> None:
    values = draws()["normal"]
    p = pool_of(values).param("w0")
    bounds = np.full((2, 1, 2), 1, np.uint32)  # all are above
    monkeypatch.setattr(ranks, "_bounds", lambda *_: bounds)
    assert ranks._collected(p, [4000], None) is None
    assert ranks.largest(p, [4000]).tolist() == expected(values, [4000])


def test_what_is_dropped_at_random_is_not_counted() -> None:
    values = draws()["normal"]
    p = pool_of(values).param("w0")
    selection = Selection(keys=np.array([1, 2], np.uint64), chances=np.array([2**31], np.uint64))
    for rank in (2000, 4000, 15_000):
        found = ranks._collected(p, [rank], selection)
        assert found is not None
        assert found.tolist() == ranks._counted(p, [rank], selection, False).tolist()
