"""dare and della: what is kept of task vectors by chance."""

import hashlib

import numpy as np
import pytest
import torch
from conftest import SHAPES, is_each, pool_of, random_pool

import fusionbench as fb
from fusionbench.methods.della import row_length
from fusionbench.sources import PART

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
MASK = 2**64 - 1


def uniform(seed: int, parameter: str, model: str, count: int) -> np.ndarray:
    """The numbers in [0, 1) that decide, by SplitMix64 in plain integers: what a seed means must never change."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{parameter}/{model}".encode()).digest()[:8], "little")
    found = []
    for i in range(1, count + 1):
        z = (key + i * 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append(((z ^ (z >> 31)) >> 32) / 2**32)
    return np.array(found)


def rounded(chance: np.ndarray | float) -> np.ndarray:
    return np.round(np.asarray(chance) * 2**32) / 2**32


def each(pool: fb.ModelPool, merged: fb.Checkpoint, formula) -> None:
    """Check each tensor against `formula(vectors, random numbers)`, in which it is `(models, *shape)`."""
    for name, tensor in pool.require_base().items():
        if tensor.numel():
            one = fb.ModelPool({m: {name: pool[m][name]} for m in pool}, base={name: tensor})
            numbers = np.stack([uniform(3, name, model, tensor.numel()) for model in pool])
            numbers = numbers.reshape(len(pool), *tensor.shape)
            part = fb.Checkpoint.of({name: merged[name]})
            is_each(part, one, lambda base, models, r=numbers: base + formula(models - base, r))


def keeping(chances: np.ndarray, values: np.ndarray, numbers: np.ndarray, rescale: str) -> np.ndarray:
    kept = np.where(numbers < rounded(chances), values, 0)
    if rescale == "paper":
        return kept / rounded(chances)
    if rescale == "l1":
        axes = tuple(range(1, values.ndim))
        after = np.abs(kept).sum(axes, keepdims=True)
        return kept * np.abs(values).sum(axes, keepdims=True) / np.where(after == 0, 1, after)
    return kept


def ties(values: np.ndarray, merge: str) -> np.ndarray:
    values = np.where(values * np.sign(values.sum(0)) > 0, values, 0)
    if merge == "max":
        return np.abs(values).max(0) * np.sign(values.sum(0))
    return values.sum(0) / (np.maximum((values != 0).sum(0), 1) if merge == "mean" else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rescale", ["paper", "l1", "none"])
def test_dare_is_the_paper_s(rescale: str, dtype: torch.dtype) -> None:
    pool = random_pool(3, dtype)

    def drop(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        return keeping(np.array(0.25), values, numbers, rescale)

    options = {"density": 0.25, "rescale": rescale, "seed": 3}
    each(pool, fb.methods.dare(pool, **options), lambda v, r: 0.3 * drop(v, r).sum(0))
    each(pool, fb.methods.dare(pool, **options, over="average"), lambda v, r: drop(v, r).mean(0))
    for merge in ("sum", "mean", "max"):
        merged = fb.methods.dare(pool, **options, over="ties", merge=merge, scaling_factor=0.7)
        each(pool, merged, lambda v, r, merge=merge: 0.7 * ties(drop(v, r), merge))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rescale", ["paper", "l1", "none"])
def test_della_is_the_paper_s(rescale: str, dtype: torch.dtype) -> None:
    pool = random_pool(3, dtype)

    def drop(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        rows = values.reshape(len(values), values.shape[1] if values.ndim > 2 else 1, -1)
        last = max(rows.shape[-1] - 1, 1)
        # As the pass has them: differences of a model and its base compared in float32, equal ones in order.
        order = np.abs(rows).astype(np.float32).argsort(-1, kind="stable").argsort(-1, kind="stable")
        chances = 0.6 - 0.3 + 0.6 * order / last if rows.shape[-1] > 1 else np.full(rows.shape, 0.6)
        return keeping(chances.reshape(values.shape), values, numbers, rescale)

    options = {"density": 0.6, "epsilon": 0.3, "rescale": rescale, "seed": 3}
    each(pool, fb.methods.della(pool, **options), lambda v, r: ties(drop(v, r), "mean"))
    merged = fb.methods.della(pool, **options, over="task_arithmetic", scaling_factor=0.4)
    each(pool, merged, lambda v, r: 0.4 * drop(v, r).sum(0))


def test_a_trim_after_the_drop_is_of_the_whole_model() -> None:
    pool = random_pool(2)
    merged = fb.methods.dare(pool, density=0.5, trim_density=0.2, rescale="none", seed=3, scaling_factor=1.0)
    names = [name for name in SHAPES if name != "none"]
    expected = {name: pool.require_base()[name].double() for name in names}
    for model in pool:
        vectors = {name: (pool[model][name] - pool.require_base()[name]) for name in names}
        for name, vector in vectors.items():
            kept = torch.from_numpy(uniform(3, name, model, vector.numel()) < 0.5).reshape(vector.shape)
            vectors[name] = vector * kept
        magnitudes = torch.cat([vector.abs().flatten() for vector in vectors.values()])
        threshold = magnitudes.sort(descending=True).values[round(0.2 * len(magnitudes)) - 1]
        expected = {n: expected[n] + torch.where(vectors[n].abs() >= threshold, vectors[n], 0) for n in names}
    for name in names:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rescale", ["paper", "l1", "none"])
def test_density_one_drops_nothing(rescale: str) -> None:
    pool = random_pool(3)
    added = fb.methods.task_arithmetic(pool)
    elected = fb.methods.ties_merging(pool, density=1.0, merge="mean", scaling_factor=1.0)
    for name in SHAPES:
        dare = fb.methods.dare(pool, density=1.0, rescale=rescale)[name]
        della = fb.methods.della(pool, density=1.0, rescale=rescale)[name]
        torch.testing.assert_close(dare, added[name], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(della, elected[name], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("method", [fb.methods.dare, fb.methods.della])
def test_a_seed_gives_one_result_and_another_another(method) -> None:
    pool = random_pool(3)
    one, again, other = method(pool, seed=5), method(pool, seed=5), method(pool, seed=6)
    assert one["matrix"].equal(again["matrix"])
    assert not one["matrix"].equal(other["matrix"])


@pytest.mark.parametrize("method", [fb.methods.dare, fb.methods.della])
def test_what_is_dropped_depends_on_names_not_on_order(method) -> None:
    pool = random_pool(3)
    turned = fb.ModelPool({name: pool[name] for name in ("m2", "m0", "m1")}, base=pool.base)
    alone = fb.ModelPool({"m1": {"vector": pool["m1"]["vector"]}}, base={"vector": pool.require_base()["vector"]})
    here, there = method(pool), method(turned)
    for name in SHAPES:
        torch.testing.assert_close(here[name], there[name], rtol=1e-13, atol=1e-13)
    only = fb.ModelPool({"m1": pool["m1"]}, base=pool.base)
    assert method(alone)["vector"].equal(method(only)["vector"])


def test_the_mean_over_seeds_is_the_task_vector_with_the_papers_rescaling_only() -> None:
    """Others restore the sum of magnitudes by one number, so that a row's largest values grow on average."""
    pool = pool_of([0, 0, 0, 0], [1, 2, 4, 8])
    options = {"density": 0.5, "epsilon": 0.4, "over": "task_arithmetic"}
    seeds = range(2000)
    mean = sum(fb.methods.della(pool, seed=seed, **options)["w"] for seed in seeds) / len(seeds)
    torch.testing.assert_close(mean, torch.tensor([1.0, 2, 4, 8]), rtol=0.15, atol=0)
    mean = sum(fb.methods.dare(pool, seed=seed, scaling_factor=1.0)["w"] for seed in seeds) / len(seeds)
    torch.testing.assert_close(mean, torch.tensor([1.0, 2, 4, 8]), rtol=0.15, atol=0)


@pytest.mark.parametrize("rescale", ["paper", "l1"])
@pytest.mark.parametrize("shape", [(3, 300_000), (700, 900), (300_001,), (270_000, 1)], ids=str)
def test_blocks_make_no_difference(shape: tuple[int, ...], rescale: str) -> None:
    """Rows that are longer than a block, that begin within one, and blocks that are asked for one by one."""
    pool = random_pool(2, torch.float32, shapes={"w": shape})
    for method in (fb.methods.dare, fb.methods.della):
        whole, pieces = (method(pool, rescale=rescale).block for _ in range(2))
        numel = pool.reference.specs["w"].numel
        data, _ = whole("w", 0, numel)
        steps = [*range(0, numel, 2**18), numel]
        blocks = [pieces("w", start, stop)[0].copy() for start, stop in zip(steps, steps[1:], strict=False)]
        blocks.append(pieces("w", 899, 901)[0].copy())
        assert np.concatenate(blocks[:-1]).tobytes() == data.tobytes()
        assert blocks[-1].tobytes() == data[899 * 4 : 901 * 4].tobytes()


def test_ranks_are_within_rows() -> None:
    # Chances from 0.02 for the smallest of a row to 0.98 for its largest, however small that is beside another row's.
    torch.manual_seed(0)
    model = torch.arange(1.0, 101).repeat(100, 1) * torch.logspace(-3, 3, 100)[:, None]
    pool = fb.ModelPool({"m": {"w": model}}, base={"w": torch.zeros(100, 100)})
    kept = fb.methods.della(pool, density=0.5, epsilon=0.48, rescale="none")["w"] != 0
    assert kept[:, :10].float().mean() < 0.15 and kept[:, -10:].float().mean() > 0.85
    assert abs(kept[:50].float().mean() - 0.5) < 0.03 and abs(kept[50:].float().mean() - 0.5) < 0.03


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dare", {"density": 0.0}, r"density must be in \(0, 1\]"),
        ("dare", {"density": 20.0}, r"density must be in \(0, 1\]"),
        ("dare", {"trim_density": 1.5}, r"density must be in \(0, 1\]"),
        ("della", {"density": 0.1, "epsilon": 0.1}, r"chances of density ± epsilon in \(0, 1\]"),
        ("della", {"density": 0.9, "epsilon": 0.2}, r"at most 0.1; got 0.2"),
        ("della", {"density": -0.5}, r"density must be in \(0, 1\]"),
    ],
)
def test_chances_that_are_none_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(fb.InputError, match=message):
        getattr(fb.methods, name)(random_pool(2), **options)
    with pytest.raises(fb.InputError, match=message):
        fb.algorithm(name, **options).run(random_pool(2))


@pytest.mark.parametrize("given", [{}, {"rescale": "l1"}, {"over": "average"}, {"density": 0.1}], ids=str)
@pytest.mark.parametrize("method", ["dare", "della"])
def test_nothing_is_dropped_of_running_statistics(method: str, given: dict) -> None:
    """A variance that is dropped and rescaled may be negative."""
    pool = random_pool(3, shapes={"norm.running_var": (50,), "norm.running_mean": (50,), "norm.weight": (50,)})
    given = {"epsilon": 0.05, "over": "task_arithmetic", **given} if method == "della" else given
    found = fb.algorithm(method, **given).run(pool)
    whole = fb.algorithm(method, **{**given, "density": 1.0}).run(pool)
    for name in found:
        assert found[name].equal(whole[name]) == ("running" in name)


def test_a_row_of_a_stack_of_matrices_is_that_of_a_matrix() -> None:
    assert row_length((7,)) == 7 and row_length((4, 7)) == 7
    assert row_length((8, 4, 3, 3)) == 36  # a kernel
    assert row_length((4, 512, 256)) == 512 * 256
    assert row_length((4, 512, 257)) == 257


@pytest.mark.parametrize("columns", [1000, 2**18 - 1])
def test_what_is_written_in_pieces_is_the_whole_where_no_block_ends_with_a_row(columns: int) -> None:
    pool = random_pool(2, torch.bfloat16, shapes={"w": (2 * PART // columns + 1, columns)})
    source = fb.methods.della(pool, density=0.6, epsilon=0.3, rescale="l1").source
    count = pool.require_base().specs["w"].numel
    whole, _ = source.block("w", 0, count)
    room = np.empty(2 * count, np.uint8)
    pieces = {first: data.copy() for first, (data, _) in source.pieces("w", 0, count, room)}
    assert np.array_equal(np.concatenate(list(pieces.values())), whole)
    assert list(pieces) == (list(range(0, count, PART)) if columns == 1000 else [0])  # long rows are not computed twice
