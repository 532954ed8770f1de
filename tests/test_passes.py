"""The compiled core against `fusionbench.passes.reference`, bit for bit, and that against other formulas."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionbench import passes
from fusionbench.passes import ALWAYS, Block, Combination, Selection, reference

core = passes._core
compiled = pytest.mark.skipif(core is None, reason="no compiled core")

DTYPES = ("F64", "F32", "F16", "BF16")
TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
SIZE = {name: dtype.itemsize for name, dtype in TORCH.items()}
several_times = settings(max_examples=60, deadline=None)


def architectures() -> list[str]:
    """What this machine's processor can."""
    found = []
    for name in ("baseline", "v3", "v4") if core else ():
        try:
            core.choose(name)
            found.append(core.chosen())
        except ValueError:
            pass
    return found


ARCHITECTURES = architectures()


@pytest.fixture(autouse=True)
def best_architecture() -> Iterator[None]:
    yield
    if core:
        core.choose()


def block(values: np.ndarray, dtype: str, shift: int = 0) -> Block:
    """Values in a dtype, at an address that is no multiple of its size where `shift` is 1."""
    data = reference.encode(np.asarray(values, np.float64), dtype)
    return np.frombuffer(bytes(shift) + data.tobytes(), np.uint8)[shift:], dtype


def numbers(rng: np.random.Generator, models: int, length: int, wild: bool) -> np.ndarray:
    """Fine-tuned models near a base, many with elements as they were; or numbers of any size."""
    if wild:
        return rng.standard_normal((models + 1, length)) * 10.0 ** rng.integers(-46, 4, (models + 1, length))
    base = rng.standard_normal(length) * 0.02
    changes = rng.standard_normal((models, length)) * 1e-3 * (rng.random((models, length)) < 0.7)
    return np.concatenate([base[None], base + changes])


class Case:
    """Blocks of one draw, and random arguments that go with them."""

    def __init__(self, seed: int, length: int, models: int, dtypes: list[str], wild: bool, infinite: bool) -> None:
        self.rng = np.random.default_rng(seed)
        self.length, self.models = length, models
        values = numbers(self.rng, models, length, wild)
        if infinite and length:
            values[self.rng.integers(models + 1), self.rng.integers(length)] = self.rng.choice(
                [np.inf, -np.inf, np.nan]
            )
        if "F16" in dtypes and not infinite:
            values = values.clip(-6e4, 6e4)
        self.blocks = [block(row, dtypes[i % len(dtypes)], i % 2) for i, row in enumerate(values)]
        self.dtype = dtypes[-1]
        self.offset = int(self.rng.integers(2**40))

    @np.errstate(all="ignore")
    def selection(self, kinds: set[str]) -> Selection:
        """Of these kinds; with thresholds that are magnitudes in the blocks, so that some are equal."""
        many = self.models if self.rng.random() < 0.7 else 1
        arguments = {}
        if kinds:
            sizes = np.sort(reference.magnitudes(self.blocks).view(np.float32).reshape(-1))
            sizes = np.append(sizes[np.isfinite(sizes)], np.float32(0.5))
            if "low" in kinds:
                arguments["low"] = self.rng.choice(sizes[: len(sizes) * 3 // 4 + 1], many)
            if "high" in kinds:
                arguments["high"] = self.rng.choice(sizes[len(sizes) // 2 :], many)
            if "variance" in kinds:
                arguments["least_variance"] = float(np.median(np.append(reference._variance(self.blocks), 1e-6)))
        if kinds & {"random", "ranked"}:
            arguments["keys"] = self.rng.integers(2**64, size=many, dtype=np.uint64)
            arguments["chances"] = self.rng.integers(ALWAYS + 1, size=many, dtype=np.uint64)
        if "ranked" in kinds:
            divisors = [n for n in range(1, self.length + 1) if self.length % n == 0] or [3]
            low, high = sorted(self.rng.integers(ALWAYS + 1, size=2)) if self.rng.random() < 0.7 else (0, ALWAYS)
            size = many, int(self.rng.choice(divisors))
            arguments["chances"] = np.sort(self.rng.integers(low, high + 1, size=size, dtype=np.uint64))
        return Selection(**arguments)

    def combination(self, elect: str, combine: str) -> Combination:
        factors, weights = self.rng.choice([1.0, 0.5, -0.25, 0.0, 1 / 3], (2, self.models))
        return Combination(
            factors,
            weights,
            divide=bool(self.rng.integers(2)),
            elect=elect,  # type: ignore[arg-type]
            on_tie=float(self.rng.integers(2)),
            combine=combine,  # type: ignore[arg-type]
            scaling=float(self.rng.choice([1.0, 0.3])),
        )


KINDS = ("low", "high", "random", "ranked", "variance")
cases = st.builds(
    Case,
    seed=st.integers(0, 2**32),
    length=st.one_of(st.integers(0, 70), st.integers(0, 2000)),
    models=st.integers(1, 10),
    dtypes=st.one_of(st.sampled_from([[dtype] for dtype in DTYPES]), st.lists(st.sampled_from(DTYPES), min_size=1)),
    wild=st.booleans(),
    infinite=st.sampled_from([False] * 5 + [True]),
)
big = [Case(7, 70_001, 3, [dtype], False, False) for dtype in DTYPES]
kinds = st.sets(st.sampled_from(KINDS), max_size=3)
elections = st.sampled_from(["none", "mass", "count"])
combinations = st.sampled_from(["sum", "mean", "max"])


def writes_the_same(name: str, case: Case, *arguments: object) -> None:
    expected, found = np.zeros((2, case.length * SIZE[case.dtype]), np.uint8)
    finite = getattr(reference, name)(case.blocks, *arguments, expected, case.dtype)
    for architecture in ARCHITECTURES:
        core.choose(architecture)
        found[:] = 0xAB
        assert getattr(passes, name)(case.blocks, *arguments, found, case.dtype) == finite, architecture
        if finite:
            np.testing.assert_array_equal(found.view(f"u{SIZE[case.dtype]}"), expected.view(f"u{SIZE[case.dtype]}"))


def returns_the_same(name: str, *arguments: object, **options: bool) -> None:
    *expected, finite = getattr(reference, name)(*arguments, **options)
    for architecture in ARCHITECTURES:
        core.choose(architecture)
        *found, found_finite = getattr(passes, name)(*arguments, **options)
        assert found_finite == finite, architecture
        for one, other in zip(found, expected, strict=True):
            if finite:
                np.testing.assert_array_equal(one.view(np.uint64), other.view(np.uint64))


@compiled
def test_this_machine_runs_the_core_for_several_architectures() -> None:
    assert "baseline" in ARCHITECTURES


@compiled
@several_times
@given(cases, st.sampled_from([1.0, 0.25, -1.5]), st.sampled_from([1.0, 2.0, 3.0, -0.7]))
def test_a_weighted_sum_has_the_reference_s_bits(case: Case, scale: float, divisor: float) -> None:
    writes_the_same("weighted_sum", case, scale, case.rng.standard_normal(case.models), divisor)


@compiled
@several_times
@given(cases, kinds, elections, combinations)
def test_a_masked_merge_has_the_reference_s_bits(case: Case, kinds: set[str], elect: str, combine: str) -> None:
    writes_the_same("masked_merge", case, case.selection(kinds), case.offset, case.combination(elect, combine))


@compiled
@several_times
@given(cases, kinds, st.booleans())
def test_products_have_the_reference_s_bits(case: Case, kinds: set[str], differences: bool) -> None:
    returns_the_same("products", case.blocks, case.selection(kinds) if differences else None, case.offset)


@compiled
@several_times
@given(cases, kinds)
def test_sums_have_the_reference_s_bits(case: Case, kinds: set[str]) -> None:
    returns_the_same("sums", case.blocks, case.selection(kinds), case.offset)


@compiled
@several_times
@given(cases, kinds, st.booleans(), st.booleans())
def test_a_histogram_has_the_reference_s_counts(case: Case, kinds: set[str], low: bool, variance: bool) -> None:
    rows = 1 if variance else case.models
    prefixes = None
    if low:
        with np.errstate(all="ignore"):
            bits = reference.magnitudes(case.blocks)
        prefixes = case.rng.integers(2**15, size=rows) if bits.size == 0 else bits[:rows, bits.shape[1] // 2] >> 16
        prefixes = prefixes.astype(np.int64)
    selection = case.selection(kinds)
    returns_the_same("histogram", case.blocks, prefixes, selection, case.offset, variance=variance)


@compiled
@several_times
@given(cases, st.sets(st.sampled_from(["random", "ranked"])), st.integers(1, 3), st.booleans())
def test_magnitudes_between_bounds_are_the_reference_s(case: Case, kinds: set[str], bounds: int, much: bool) -> None:
    with np.errstate(all="ignore"):
        bits = np.append(reference.magnitudes(case.blocks).reshape(-1), np.array([0, 1, 2**31 - 1], np.uint32))
    first, last = np.sort(case.rng.choice(bits, (2, bounds, case.models)), axis=0)
    selection, room = case.selection(kinds), case.length if much else case.length // 8
    expected, above, finite = reference.between(case.blocks, first, last, selection, case.offset, room=room)
    for architecture in ARCHITECTURES:
        core.choose(architecture)
        found, found_above, found_finite = passes.between(case.blocks, first, last, selection, case.offset, room=room)
        assert (found_above.tolist(), found_finite) == (above.tolist(), finite)
        if expected is None or found is None:
            assert found is expected
            continue
        for one, other in zip(found, expected, strict=True):
            assert [row.tolist() for row in one] == [row.tolist() for row in other]


def ranked(case: Case, chances: np.ndarray) -> Selection:
    return Selection(
        keys=case.rng.integers(2**64, size=case.models, dtype=np.uint64), chances=chances.astype(np.uint64)
    )


@compiled
@pytest.mark.parametrize("least", [0.0, 0.43, 0.999])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divide", [False, True])
def test_long_rows_are_sampled_as_in_the_reference(dtype: str, least: float, divide: bool) -> None:
    """Zeros, equal magnitudes, rows of which few ranks are asked for, and rows of which many are."""
    case = Case(11, 12_000, 2, [dtype], False, False)
    values = case.rng.standard_normal(12_000)
    coarse = np.round(values * 3) / 8  # few magnitudes, many of them equal
    case.blocks = [block(row, dtype) for row in (np.zeros(12_000), values, coarse)]
    for columns in (12_000, 4000, 100, 1):
        selection = ranked(case, np.linspace(least, 1, columns)[None] * ALWAYS)
        combination = Combination(np.ones(2), np.ones(2), divide=divide)
        writes_the_same("masked_merge", case, selection, case.offset, combination)
        returns_the_same("sums", case.blocks, selection, case.offset)


@compiled
@pytest.mark.parametrize("case", big, ids=DTYPES)
def test_big_blocks_have_the_reference_s_bits(case: Case) -> None:
    selection = case.selection({"low", "random"})
    writes_the_same("weighted_sum", case, 1.0, np.full(3, 1.0), 3.0)
    writes_the_same("masked_merge", case, selection, case.offset, case.combination("mass", "mean"))
    returns_the_same("products", case.blocks, Selection(), 0)
    returns_the_same("histogram", case.blocks, None, selection, case.offset, variance=False)
    returns_the_same("sums", case.blocks, ranked(case, np.linspace(0.4, 0.6, 70_001)[None] * ALWAYS), case.offset)


@compiled
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_environment_chooses_an_architecture(architecture: str) -> None:
    script = "from fusionbench.passes import _core; print(_core.chosen())"
    assert run(script, FUSIONBENCH_CORE_ARCH=architecture).stdout.split() == [architecture]


@compiled
def test_an_architecture_that_is_not_there_is_refused() -> None:
    stopped = run("import fusionbench.passes", FUSIONBENCH_CORE_ARCH="v9")
    assert stopped.stderr.splitlines()[-1].startswith("ValueError: FUSIONBENCH_CORE_ARCH is 'v9'; this processor can")


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | environment)


def test_without_the_core_the_reference_runs_with_one_warning_when_a_pass_is_first_used() -> None:
    ran = run("""
import sys
import numpy as np
sys.modules["fusionbench._core"] = None
from fusionbench import passes
print("imported", file=sys.stderr)
out = np.zeros(4, np.uint8)
block = np.array([1.5], np.float32).view(np.uint8), "F32"
for _ in range(2):
    passes.weighted_sum([block], 2.0, np.array([]), 1.0, out, "F32")
print(out.view(np.float32)[0], passes.histogram([block, block], None, passes.Selection())[0].sum())
""")
    imported, warning, *more = ran.stderr.splitlines()
    assert imported == "imported" and warning.startswith("The compiled core is missing") and more == []
    assert ran.stdout.split() == ["3.0", "1"]


def test_every_pass_runs_without_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(3, 50, 2, ["BF16"], False, False)
    selection, combination = Selection(low=np.array([1e-4], np.float32)), case.combination("mass", "mean")
    out = np.zeros(100, np.uint8)
    low, high = np.zeros((1, 2), np.uint32), np.full((1, 2), 2**31 - 1, np.uint32)

    def results() -> list[object]:
        done = [
            passes.weighted_sum(case.blocks, 1.0, np.ones(2), 3.0, out, "BF16"),
            out.copy(),
            passes.masked_merge(case.blocks, selection, 5, combination, out, "BF16"),
            out.copy(),
            *passes.products(case.blocks, selection),
            *passes.histogram(case.blocks, None, selection, counts=np.ones((2, 2**15), np.int64)),
            *passes.sums(case.blocks, selection),
            passes.between(case.blocks, low, high, selection, room=50)[0],
        ]
        return [np.asarray(result).tolist() for result in done]

    expected = results()
    monkeypatch.setattr(passes, "_core", None)
    assert results() == expected


@compiled
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_small_dtypes_go_to_the_reference(dtype: str) -> None:
    blocks = [block(np.array(row), dtype) for row in ([1.0, 2.0], [3.0, 1.0])]
    out = np.zeros(8, np.uint8)
    assert passes.weighted_sum(blocks, 1.0, np.ones(1), 2.0, out, "F32")
    assert out.view(np.float32).tolist() == [2.0, 1.5]
    assert passes.products(blocks, Selection())[0].tolist() == [[5.0]]


def wrong_arguments() -> list:
    four, eight = block(np.ones(4), "F32"), block(np.ones(8), "F32")
    odd = np.zeros(15, np.uint8), "F32"
    out, one = np.zeros(16, np.uint8), np.ones(1)
    every, two = Selection(), np.ones(2)
    merge = Combination(one, one)
    rows, counts = np.zeros((1, 4), np.uint32), np.zeros((1, 1), np.int64)

    def between(rows: np.ndarray, within: np.ndarray, above: np.ndarray, last: int = 1):
        ends = np.zeros((1, 1), np.uint32), np.full((1, 1), last, np.uint32)
        return lambda: passes._core.between(  # type: ignore[union-attr]
            [four, four], ends[0], ends[1], every.keys, every.chances, 0, rows, within, above
        )

    def masked(selection: Selection = every, combination: Combination = merge, blocks=(four, four)):
        return lambda: passes.masked_merge(blocks, selection, 0, combination, out, "F32")

    return [
        (lambda: passes.weighted_sum([four, eight], 1.0, one, 1.0, out, "F32"), "Bytes of a block: 32 given, 16"),
        (lambda: passes.weighted_sum([odd], 1.0, np.ones(0), 1.0, out, "F32"), "Bytes of a block: 15 given, 12"),
        (lambda: passes.weighted_sum([], 1.0, np.ones(0), 1.0, out, "F32"), "Blocks: 0 given, 1 or more"),
        (lambda: passes.weighted_sum([four, four], 1.0, two, 1.0, out, "F32"), "Coefficients: 2 given, 1"),
        (lambda: passes.weighted_sum([four], 1.0, np.ones(0), 1.0, out, "F16"), "Bytes to write to: 16 given, 8"),
        (lambda: passes.weighted_sum([four], 1.0, np.ones(0), 1.0, out, "I64"), "not over 'I64'"),
        (lambda: passes.weighted_sum([(four[0], "I32")], 1.0, np.ones(0), 1.0, out, "F32"), "not over 'I32'"),
        (masked(blocks=(four,)), "Blocks: 1 given, 2 or more"),
        (masked(Selection(low=np.zeros(2, np.float32))), "Low thresholds: 2 given, 1"),
        (masked(Selection(high=np.zeros(0, np.float32))), "High thresholds: 0 given, 1"),
        (masked(Selection(keys=np.zeros(3, np.uint64))), "Keys: 3 given, 1"),
        (masked(Selection(chances=np.zeros((1, 3), np.uint64))), "Chances by rank: 3 given, of 4 elements"),
        (masked(Selection(chances=np.array([[1, 0]], np.uint64))), "Chances by rank: one is below the last"),
        (masked(combination=Combination(one, two)), "Weights: 2 given, 1"),
        (between(rows, counts, counts[:0]), "Rows of counts: 0 given, 1"),
        (between(rows[:0], counts, counts), "Rows to write to: 0 given, 1"),
        (between(rows, counts, counts, 2**31), "Bounds: magnitudes have 31 bits"),
        (lambda: passes.histogram([four, four], np.zeros(2, np.int64), every), "Prefixes: 2 given, 1"),
        (lambda: passes.histogram([four, four], None, every, counts=np.zeros((1, 9), np.int64)), "Counts: 9 given"),
        (masked(Selection(chances=np.zeros((1, 0), np.uint64))), "Chances by rank: 0 given, of 4 elements"),
    ]


@compiled
@pytest.mark.parametrize("call, line", wrong_arguments() if core else [])
def test_wrong_arguments_raise_one_line(call, line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)):
        call()


@compiled
def test_what_is_written_to_is_never_a_copy() -> None:
    one = block(np.ones(4), "F32")
    with pytest.raises(TypeError):
        passes.weighted_sum([one], 1.0, np.ones(0), 1.0, np.zeros(32, np.uint8)[::2], "F32")
    frozen = np.frombuffer(bytes(16), np.uint8)
    with pytest.raises(TypeError):
        passes.weighted_sum([one], 1.0, np.ones(0), 1.0, frozen, "F32")


@compiled
def test_threads_that_run_passes_at_once_do_not_disturb_each_other() -> None:
    def bits(seed: int) -> bytes:
        case = Case(seed, 5000, 1 + seed % 5, [DTYPES[seed % 4]], False, False)
        out = np.zeros(case.length * SIZE[case.dtype], np.uint8)
        selection = case.selection({"low", "random"})
        passes.masked_merge(case.blocks, selection, 0, case.combination("mass", "mean"), out, case.dtype)
        counts, _ = passes.histogram(case.blocks, None, selection)
        return out.tobytes() + counts.tobytes()

    alone = [bits(seed) for seed in range(24)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(bits, range(24))) == alone


def as_numbers(data: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(data.copy()).view(TORCH[dtype]).double().numpy()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_all_numbers_of_a_small_dtype_are_torch_s(dtype: str) -> None:
    data = np.arange(2 ** (8 * SIZE[dtype]), dtype=f"u{SIZE[dtype]}").view(np.uint8)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(reference.decode(data, dtype), as_numbers(data, dtype))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_numbers_are_rounded_once_to_nearest_even(dtype: str) -> None:
    codes = np.arange(2 ** (8 * SIZE[dtype] - 1), dtype=f"u{SIZE[dtype]}")
    grid = as_numbers(codes.view(np.uint8), dtype)
    grid = grid[np.isfinite(grid)]
    middles = (grid[1:] + grid[:-1]) / 2
    below, above, even = np.arange(len(middles)), np.arange(1, len(grid)), np.arange(1, len(grid)) // 2 * 2
    for sign, bit in ((1.0, 0), (-1.0, 1 << (8 * SIZE[dtype] - 1))):
        for values, expected in (
            (grid, np.arange(len(grid))),
            (middles, even),
            (np.nextafter(middles, -np.inf), below),  # in float32 these are the middles
            (np.nextafter(middles, np.inf), above),
        ):
            found = reference.encode(sign * values, dtype).view(codes.dtype)
            np.testing.assert_array_equal(found, expected | bit)
            for architecture in ARCHITECTURES if SIZE[dtype] == 2 else ():
                core.choose(architecture)
                out = np.zeros_like(found)
                given = [block(sign * values, "F64")]
                assert passes.weighted_sum(given, 1.0, np.ones(0), 1.0, out.view(np.uint8), dtype)
                np.testing.assert_array_equal(out[1:], found[1:])  # the first is zero, whose sign a sum loses


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_numbers_are_rounded_like_torch_s_float32(dtype: str) -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(20_000) * 2.0 ** rng.integers(-160, 125, 20_000)).astype(np.float32)
    values = np.append(values, [0.0, -0.0, np.inf, -np.inf, 448, 464, 464.1, 61440, 65519, 65520, 3.4e38]).astype(
        np.float32
    )
    if dtype == "F8_E4M3":  # without infinity: torch makes the largest number of what is larger, we no number
        assert np.isnan(reference.decode(reference.encode(np.array([464.1, -np.inf]), dtype), dtype)).all()
        values = values[np.abs(values) <= 464]
    expected = torch.from_numpy(values).to(TORCH[dtype]).view(torch.uint8).numpy()
    np.testing.assert_array_equal(reference.encode(values.astype(np.float64), dtype), expected)


def test_a_weighted_sum_by_hand() -> None:
    out = np.zeros(24, np.uint8)
    models = [block(np.array(row), "F64") for row in ([1.0, 2.0, -1.0], [3.0, 2.0, 0.0], [2.0, 5.0, 1.0])]
    assert reference.weighted_sum(models, 0.5, np.array([1.0, 2.0]), 4.0, out, "F64")
    assert out.view(np.float64).tolist() == [0.5 + (2 + 2) / 4, 1 + 6 / 4, -0.5 + (1 + 4) / 4]


def test_ties_merging_by_hand() -> None:
    rows = [10.0, 10.0, 10.0, 10.0], [13.0, 9.0, 10.5, 11.0], [11.0, 13.0, 10.25, 9.0], [6.0, 12.0, 10.0, 10.0]
    out = np.zeros(16, np.uint8)
    selection = Selection(low=np.array([0.5], np.float32))
    for on_tie, last in ((0.0, 10.0), (1.0, 11.0)):
        ties = Combination(np.ones(3), np.ones(3), elect="mass", on_tie=on_tie, combine="mean")
        assert reference.masked_merge([block(np.array(row), "F32") for row in rows], selection, 0, ties, out, "F32")
        # The sums are 3 + 1 - 4, -1 + 3 + 2, 0.5 and 1 - 1.
        assert out.view(np.float32).tolist() == [10.0 if on_tie == 0 else 12.0, 12.5, 10.5, last]


def test_products_and_counts_by_hand() -> None:
    blocks = [block(np.array(row), "F32") for row in ([1.0, 1.0], [3.0, 0.0], [1.0, 2.5])]
    gram, finite = reference.products(blocks, Selection(), 0)
    assert gram.tolist() == [[5.0, -1.5], [-1.5, 2.25]] and finite
    sums, finite = reference.sums(blocks, Selection(low=np.array([1.2], np.float32)), 0)
    assert sums.tolist() == [[3.0, 1.5], [2.0, 1.5]] and finite
    counts, _ = reference.histogram(blocks, None, Selection(), 0, variance=False)
    high = [np.flatnonzero(row).tolist() for row in counts]
    assert high == [[0x3F80, 0x4000], [0x0000, 0x3FC0]]  # 1 and 2; 0 and 1.5
    bits = reference.magnitudes([block(np.zeros(4), "F32"), block(np.array([3.0, -1.0, 1.0, 0.0]), "F32")])
    chances = Selection(chances=np.array([[5, 7, 8, 9]], np.uint64))
    assert reference.chances_by_rank(chances, bits).tolist() == [[9, 7, 8, 5]]


def test_random_bits_are_split_mix_64_s() -> None:
    # The first numbers of its generator from seed 1234567, of which the upper halves are taken.
    numbers = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert reference.random_bits(1234567, 0, 4).tolist() == [number >> 32 for number in numbers]
    assert reference.random_bits(1234567, 2, 2).tolist() == [number >> 32 for number in numbers[2:]]


def test_random_bits_are_even() -> None:
    counts = np.bincount(reference.random_bits(99, 0, 2**16) >> np.uint64(26), minlength=64)
    assert len(counts) == 64 and abs(counts - 1024).max() < 5 * 32


@compiled
def test_a_chance_is_the_part_that_is_kept() -> None:
    blocks = [block(np.full(10**5, value), "F32") for value in (0.0, 1.0, 1.0)]
    selection = Selection(keys=np.array([1, 2], np.uint64), chances=np.array([ALWAYS // 10, ALWAYS // 2], np.uint64))
    gram, _ = passes.products(blocks, selection)
    np.testing.assert_allclose(gram / 1e5, [[0.1, 0.05], [0.05, 0.5]], atol=0.01)
