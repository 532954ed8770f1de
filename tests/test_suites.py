"""Suites, kept results and comparisons, on a toy: two linear classifiers of points in the plane."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_clip import write_zoo
from torch import nn

import fusionbench as fb
from fusionbench import cli, suites
from fusionbench.coefficients import write_coefficients
from fusionbench.compare import bootstrap, compare, score_of
from fusionbench.config import load_plugin
from fusionbench.cost import forget_peak_memory, peak_memory_mb
from fusionbench.report.lines import score_table
from fusionbench.results import Results, as_csv, as_latex, as_markdown, rows
from fusionbench.suites import Cell, bench, kept, load_suite
from fusionbench.task import TaskPool
from fusionbench.tune import tune

FEW = """
from typing import Annotated
from fusionbench import Checkpoint, ModelPool, Range, method


@method("merging", base=True)
def first_few(pool: ModelPool, *, n: Annotated[int, Range(1, 2, search=(1, 2)), "models"] = 2) -> Checkpoint:
    return pool.map(lambda p: p.base + p.task_vectors[list(range(n))].sum(0))
"""


class Plane(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return points @ self.weight.T


class Planes:
    @staticmethod
    def backbone(checkpoint: fb.Checkpoint) -> fb.Checkpoint:
        return checkpoint

    @staticmethod
    def build(checkpoint: fb.Checkpoint) -> nn.Module:
        return Plane(checkpoint["weight"])


class Side:
    """On which side of a line through the origin points are."""

    primary = "accuracy"

    def __init__(self, line: tuple[float, float], seed: int) -> None:
        self._seed = seed
        self.points = torch.randn(200, 2, generator=torch.Generator().manual_seed(seed))
        self.labels = (self.points @ torch.tensor(line, dtype=torch.float32) > 0).long()

    def batches(self, split: str, size: int, *, seed: int | None = None) -> Any:
        yield self.points, self.labels

    def predict(self, model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        return model(inputs)

    def score(self, model: nn.Module, split: str = "test") -> dict[str, float]:
        return self.scored(model, split)[0]

    def scored(self, model: nn.Module, split: str = "test") -> tuple[dict[str, float], dict[str, np.ndarray]]:
        correct = (self.predict(model, self.points).argmax(-1) == self.labels).numpy()
        return {"accuracy": float(correct.mean())}, {"correct": correct}

    def describe(self) -> dict[str, Any]:
        return {"seed": self._seed}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    right, up = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, -1.0], [0.0, 1.0]])
    models = {"right": {"weight": right}, "up": {"weight": up}}
    pool = fb.ModelPool(models, base={"weight": torch.zeros(2, 2)}, architecture=Planes)  # type: ignore[arg-type]
    tasks = TaskPool({"right": Side((1, 0), 0), "up": Side((0, 1), 1)})
    monkeypatch.setattr(suites, "_opened", lambda *_: (pool, tasks))


def suite_of(tmp_path: Path, text: str) -> str:
    file = tmp_path / "suite.yaml"
    file.write_text(text)
    return str(file)


def test_a_suite_is_every_combination_once(tmp_path: Path) -> None:
    suite = load_suite(
        suite_of(
            tmp_path,
            """
what: Everything
groups:
  - pools: [clip-mini]
    models: [[mnist], [mnist, emoji]]
    methods:
      - simple_average
      - task_arithmetic: {scaling_factor: [0.1, 0.2]}
        why: a sweep
      - weighted_average: {weights: [1, 2]}
      - dare
    seeds: [0, 1]
  - {pools: [clip-mini], models: [mnist], methods: [simple_average]}
""",
        )
    )
    of_one = [cell for cell in suite.cells if cell.models == ("mnist",)]
    assert [(cell.method, cell.hyperparameters, cell.seed) for cell in of_one] == [
        ("simple_average", {}, None),
        ("task_arithmetic", {"scaling_factor": 0.1}, None),
        ("task_arithmetic", {"scaling_factor": 0.2}, None),
        ("weighted_average", {"weights": [1, 2]}, None),
        ("dare", {}, 0),
        ("dare", {}, 1),
    ]
    assert len(suite.cells) == 12
    assert of_one[1].why == "a sweep"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("groups: []", "has no 'what'"),
        ("{what: x, groups: [{pools: [clip-mini]}]}", "has no 'methods'"),
        ("{what: x, groups: [{pools: [clip-mni], methods: [linear]}]}", "Did you mean 'clip-mini'"),
        ("{what: x, groups: [{pools: [clip-mini], methods: [liner]}]}", "Did you mean 'linear'"),
        ("{what: x, groups: [{pools: [clip-mini], methods: [{dare: {densty: 1}}]}]}", "Did you mean 'density'"),
        ("{what: x, groups: [{pools: [clip-mini], methods: [{dare: {density: [0.5, 2]}}]}]}", "must be in (0, 1]"),
        ("{what: x, groups: [{pools: [clip-mini], methods: [linear], tasks: some}]}", "tasks must be"),
        ("{what: x, groups: [{pools: [clip-mini], methods: [linear], models: mnist}]}", "must be a list of names"),
        ("{what: x, groups: [{pool: [clip-mini], methods: [linear]}]}", "Did you mean 'pools'"),
        ("{what: x, groups: {}}", "groups must be a list"),
        ("{what: x, groups: []}", "one or more"),
        (
            "{what: x, groups: [{pools: [clip-mini], methods: [dare], seeds: 5}]}",
            "seeds must be a list of whole numbers",
        ),
        ("{what: x, groups: [{pools: [clip-mini], methods: [linear], corruptions: [fog]}]}", "a table of severities"),
        (
            "{what: x, groups: [{pools: [clip-mini], methods: [linear], models: [mnist, [emoji]]}]}",
            "or of lists of names",
        ),
        ("{what: x, groups: [{pools: [clip-mini], methods: [linear], models: [mnist, mnist]}]}", "named twice"),
        ("{what: x, groups: [{pools: [clip-mini], methods: [{dare: {density: []}}]}]}", "density must be float"),
        (
            "{what: x, groups: [{pools: [clip-mini], methods: [{adamerging: {coefficients: c.json}}]}]}",
            "adamerging.coefficients is the file 'c.json' to write, and a result that is kept writes none",
        ),
    ],
)
def test_what_is_wrong_with_a_suite_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(fb.InputError) as error:
        load_suite(suite_of(tmp_path, text))
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_kept_and_not_computed_again(
    toy: None, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [Cell("toy", "individual"), Cell("toy", "simple_average"), Cell("toy", "pretrained")]
    results = Results(tmp_path)
    found = list(bench(cells, results, workers=workers))
    assert [result.label for result in found] == ["individual", "simple_average", "pretrained"]
    assert found[0].scores == {"right": 1.0, "up": 1.0, "average": 1.0}
    assert 0.6 < found[1].scores["average"] < 0.9  # the diagonal between the two lines: a quarter is wrong
    monkeypatch.setattr(suites, "run_cell", lambda *_: pytest.fail("it is there"))
    assert list(bench(cells, results, workers=workers)) == found


def test_the_same_cell_twice_is_run_once(toy: None, tmp_path: Path) -> None:
    cell = Cell("toy", "simple_average")
    first, second = bench([cell, replace(cell, why="as the paper")], Results(tmp_path), workers=1)
    assert first == second


def test_a_failing_run_stops_no_other_and_is_tried_again(
    toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_cell = suites.run_cell

    def broken(cell: Cell, *more: Any) -> Any:
        if cell.method == "simple_average":
            raise ZeroDivisionError("by zero")
        return run_cell(cell, *more)

    cells = [Cell("toy", "simple_average"), Cell("toy", "slerp"), Cell("toy", "nearswap", {"t": 0.1})]
    with monkeypatch.context() as patched:
        patched.setattr(suites, "run_cell", broken)
        found = list(bench(cells, Results(tmp_path), workers=1))
    assert [result.failed for result in found][:2] == ["ZeroDivisionError: by zero", ""]
    assert found[2].failed.startswith("nearswap takes, beside the base, 1 model")
    assert "Traceback" in json.loads((tmp_path / f"{found[0].key}.json").read_text())["traceback"]
    assert not next(bench(cells, Results(tmp_path), workers=1)).failed


def test_the_key_tells_what_the_scores_depend_on(toy: None) -> None:
    cells = [
        Cell("toy", "simple_average"),
        Cell("toy", "task_arithmetic"),
        Cell("toy", "task_arithmetic", {"scaling_factor": 0.4}),
        Cell("toy", "task_arithmetic", models=("up",)),
        Cell("toy", "task_arithmetic", models=("up",), tasks="all"),
    ]
    assert len({cell.key() for cell in cells}) == len(cells)
    # The default, said aloud, and the reason, change nothing.
    assert cells[1].key() == Cell("toy", "task_arithmetic", {"scaling_factor": 0.3}, why="as the paper").key()


def test_a_seed_that_a_method_is_given_is_not_another_of_the_list(tmp_path: Path) -> None:
    text = "{what: x, groups: [{pools: [clip-mini], methods: [{dare: {seed: 3}}, della], seeds: [0, 1]}]}"
    cells = load_suite(suite_of(tmp_path, text)).cells
    assert [(c.method, c.seed, c.algorithm.hyperparameters["seed"]) for c in cells] == [
        ("dare", None, 3),
        ("della", 0, 0),
        ("della", 1, 1),
    ]


def test_the_key_has_what_a_file_that_is_read_says(toy: None, tmp_path: Path) -> None:
    file = tmp_path / "learned.json"
    cell = Cell("toy", "apply_coefficients", {"file": str(file)})
    keys = set()
    for coefficients in ([0.3, 0.3], [1.0, 1.0]):
        write_coefficients(file, ["right", "up"], {"weight": coefficients}, 1.0)
        keys.add(cell.key())
    assert len(keys) == 2


def test_models_are_merged_alone_and_scored_on_all_tasks(toy: None, tmp_path: Path) -> None:
    result = next(bench([Cell("toy", "simple_average", models=("up",), tasks="all")], Results(tmp_path), workers=1))
    assert result.scores["up"] == 1.0 and 0.3 < result.scores["right"] < 0.7


def test_formats(toy: None, tmp_path: Path) -> None:
    list(bench([Cell("toy", "individual"), Cell("toy", "pretrained")], Results(tmp_path), workers=1))
    found = Results(tmp_path).all()
    assert as_markdown(*score_table(found)).splitlines()[2].startswith("| individual | 100.0 | 100.0 | 100.0 | 1.00 | ")
    assert r"individual & 100.0 & 100.0 & 100.0 & 1.00 & " in as_latex(*score_table(found))
    header, first, *_ = as_csv(rows(found)).splitlines()
    row = dict(zip(header.split(","), first.split(","), strict=True))
    assert row["method"] == "individual" and row["right/accuracy"] == "1.0" and row["average"] == "1.0"


def test_several_seeds_are_one_line_with_mean_and_deviation(
    toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Results(tmp_path)
    accuracies = {0: 0.6, 1: 0.7, 2: 0.83}
    for seed, accuracy in accuracies.items():
        cell = Cell("toy", "dare", seed=seed).asked
        results.add(f"{seed}a", cell, {"up": {"accuracy": accuracy}}, {"up": "accuracy"}, {})
    results.add_failed("3a", Cell("toy", "dare", seed=3).asked, "no data")
    header, lines = score_table(results.all())
    assert header == ["method", "seed", "up", "average"]  # mean 0.71, deviations -0.11, -0.01 and 0.12
    assert lines == [["dare", "0, 1, 2", "71.0", "71.0 ± 11.5"], ["dare", "3", "", "failed"]]
    assert r"71.0 $\pm$ 11.5 \\" in as_latex(header, lines)
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(f" {seed}a" in printed for seed in range(4)) and "71.0 ± 11.5" in printed


def test_of_a_run_that_was_made_again_the_newest_result_counts(
    toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, cell = Results(tmp_path), Cell("toy", "simple_average").asked
    for i, (key, accuracy) in enumerate({"b0": 0.6, "a1": 0.8}.items()):
        results.add(key, cell, {"up": {"accuracy": accuracy}}, {"up": "accuracy"}, {})
        os.utime(tmp_path / f"{key}.json", (i, i))
    assert cli.main(["results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "80.0" in printed and "70.0" not in printed and "±" not in printed and " 1 older results" in printed
    assert cli.main(["results", str(tmp_path), "--format", "markdown"]) == 0
    assert "| simple_average | 80.0 | 80.0 |" in capsys.readouterr().out
    assert cli.main(["results", str(tmp_path), "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2  # other programs are told all


def test_a_table_tells_how_much_of_the_gap_is_closed_and_what_was_not_run(toy: None, tmp_path: Path) -> None:
    names = ("simple_average", "individual", "pretrained", "ties_merging")
    cells, results = [Cell("toy", name) for name in names], Results(tmp_path)
    average, high, low = (r.scores["average"] for r in bench(cells[:3], results, workers=1))
    found = kept(cells, results)
    assert [result.cell["method"] for result in found] == list(names)
    header, lines = score_table(found)
    assert header == ["method", "right", "up", "average", "g", "seconds", "added"]
    assert [line[4] for line in lines] == [f"{(average - low) / (high - low):.2f}", "1.00", "0.00", ""]
    assert lines[3] == ["ties_merging", "", "", "not run", "", "", ""]
    # Said aloud, a default is the same run, and stands in the table as it was asked for.
    said = Cell("toy", "ties_merging", {"density": 0.2})
    list(bench(cells[3:], results, workers=1))
    assert [r.label for r in kept([said], results) if r.scores] == ["ties_merging density=0.2"]


def test_on_a_narrow_terminal_the_numbers_of_tasks_are_left_out(
    toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    list(bench([Cell("toy", "individual"), Cell("toy", "pretrained")], Results(tmp_path), workers=1))
    for width in (100, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        assert cli.main(["results", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "average" in printed and "…" not in printed and max(map(len, printed.splitlines())) <= width
        assert (" right " in printed) == (width == 100) and (width == 80) == ("wider terminal" in printed)


def test_a_bootstrap_is_as_wide_as_theory_says() -> None:
    generator = np.random.default_rng(0)
    a = {"correct": generator.random(1000) < 0.5}
    b = {"correct": a["correct"] ^ (generator.random(1000) < 0.1)}
    changes = b["correct"].astype(float) - a["correct"]
    drawn = bootstrap(a, b, 10_000, generator)
    assert drawn.mean() == pytest.approx(changes.mean(), abs=1e-3)
    assert drawn.std() == pytest.approx(changes.std() / 1000**0.5, rel=0.05)


def test_a_result_is_no_better_than_itself(toy: None, tmp_path: Path) -> None:
    cells = [Cell("toy", "individual"), Cell("toy", "pretrained"), Cell("toy", "simple_average")]
    individual, pretrained, _ = bench(cells, Results(tmp_path), workers=1)
    assert all((one.low, one.high) == (0, 0) and not one.certain for one in compare(individual, individual))
    *_, average = compare(pretrained, individual)
    assert average.task == "average" and average.certain and average.low < average.difference < average.high
    assert average.difference == pytest.approx(individual.scores["average"] - pretrained.scores["average"])


def test_ranks_are_compared_too() -> None:
    right = np.arange(50.0)
    a, b = {"written": right[::-1], "right": right}, {"written": right, "right": right}
    drawn = bootstrap(a, b, 200, np.random.default_rng(0))
    assert np.allclose(drawn, 2.0)


def test_scores_that_are_made_of_sums_by_hand() -> None:
    """Of two images, of two texts, and of two confusion matrices of two classes."""
    confusion = np.array([[[2, 0], [1, 0]], [[0, 1], [0, 0]]])  # unions 2 + 1 + 1 and 1 + 1, intersections 2 and 0
    examples = {
        1 / 3: {"near": np.array([1, 3]), "known": np.array([2, 10])},
        0.5: {"log_probability": np.log([0.5, 0.25]), "length": np.array([1, 2])},
        0.25: {"confusion": confusion},
        0.75: {"value": np.array([0.5, 1.0])},
    }
    for score, outcomes in examples.items():
        assert score_of(outcomes) == pytest.approx(score, abs=1e-12)
        drawn = bootstrap({name: 0 * array + array[:1] for name, array in outcomes.items()}, outcomes, 999, _Twice())
        parts = [score_of({name: array[i : i + 1] for name, array in outcomes.items()}) for i in (0, 1)]
        assert drawn.tolist() == pytest.approx([parts[1] - parts[0]] * 999, abs=1e-12)
    with pytest.raises(fb.InputError, match="No score is known that is made of taste"):
        bootstrap({"taste": np.ones(2)}, {"taste": np.ones(2)}, 9, np.random.default_rng(0))
    with pytest.raises(fb.InputError, match="is correct in one, value in the other"):
        bootstrap({"correct": np.ones(2)}, {"value": np.ones(2)}, 9, np.random.default_rng(0))


class _Twice(np.random.Generator):
    """Always draws the second of two examples, twice."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def multinomial(self, n: Any, pvals: Any, size: Any = None) -> Any:
        assert (n, list(pvals)) == (2, [0.5, 0.5])
        return np.tile([0, 2], (size, 1))


def test_a_bootstrap_of_sums_is_that_of_single_examples() -> None:
    generator = np.random.default_rng(1)
    a, b = (generator.random(300) < share for share in (0.5, 0.6))
    first, second = ({"near": one.astype(np.int32), "known": np.ones(300, np.int32)} for one in (a, b))
    by_sums = bootstrap(first, second, 20_000, generator)
    alone = bootstrap({"correct": a}, {"correct": b}, 20_000, generator)
    assert np.quantile(by_sums, [0.025, 0.975]) == pytest.approx(np.quantile(alone, [0.025, 0.975]), abs=0.004)


def test_a_torn_or_foreign_file_is_one_line(toy: None, tmp_path: Path) -> None:
    with pytest.raises(fb.InputError, match="no folder of results"):
        Results(tmp_path / "none").all()
    (tmp_path / "a.json").write_text('{"cell": {')
    with pytest.raises(fb.InputError, match="cannot be read"):
        Results(tmp_path).all()
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(fb.InputError, match="no result of a suite"):
        Results(tmp_path).all()
    (tmp_path / "a.json").write_text('{"cell": {}, "schema": 99}')
    with pytest.raises(fb.InputError, match="another version"):
        Results(tmp_path).all()


def test_the_verbs(toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = suite_of(tmp_path, "{what: Toys, groups: [{pools: [clip-mini], methods: [individual, pretrained]}]}")
    kept = str(tmp_path / "kept")
    assert cli.main(["bench", suite, "--results", kept, "--workers", "1"]) == 0
    assert "Toys: 2 runs. They are in" in capsys.readouterr().out
    assert cli.main(["results", kept, "--format", "csv"]) == 0
    assert capsys.readouterr().out.count("\n") == 3
    keys = [result.key for result in Results(kept).all()]
    assert cli.main(["compare", *keys, "--results", kept]) == 0
    assert "A is better" in capsys.readouterr().out
    assert cli.main(["compare", "zz", keys[0], "--results", kept]) == 2
    assert "0 results begin with 'zz'" in capsys.readouterr().err
    assert cli.main(["compare", "individual", "pretrained", "--results", kept]) == 0
    assert "A is better" in capsys.readouterr().out
    assert cli.main(["bench", suite, "--results", kept, "--methods", "individul"]) == 2
    assert "Did you mean 'individual'" in capsys.readouterr().err
    more = tmp_path / "more.yaml"
    more.write_text("{what: More, groups: [{pools: [clip-mini], methods: [simple_average, individual]}]}")
    assert cli.main(["bench", suite, str(more), "--results", kept, "--workers", "1"]) == 0
    printed = capsys.readouterr().out  # one table, in which what both have stands once
    assert "Toys + More: 3 runs." in printed and printed.count("test scores in percent") == 1
    assert [line.split()[0] for line in printed.splitlines() if line.startswith("  ") and "." in line] == [
        "individual",
        "pretrained",
        "simple_average",
    ]


MEAN = """
from fusionbench import Checkpoint, ModelPool, method


@method("merging")
def mean_of_{name}(pool: ModelPool) -> Checkpoint:
    return pool.map(lambda p: p.models.mean(0))
"""


def test_a_suite_may_be_of_ones_own_models_tasks_and_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_zoo(tmp_path)
    (tmp_path / "own_mean.py").write_text(MEAN.format(name="mine"))
    pools = "pools: [{modelpool: pool.yaml, taskpool: tasks.yaml}]"
    suite = suite_of(
        tmp_path,
        f"{{what: Own, plugins: [own_mean.py], groups: [{{{pools}, methods: [mean_of_mine, simple_average]}}]}}",
    )
    assert cli.main(["bench", suite, "--workers", "1"]) == 0
    mine, average = (Results("results").find(name) for name in ("mean_of_mine", "simple_average"))
    assert set(mine.scores) == {"colours", "greys", "average"} and mine.cell["taskpool"] == "tasks.yaml"
    assert mine.scores == average.scores
    cells = load_suite(suite).cells
    keys = [cell.key() for cell in cells]
    (tmp_path / "own_mean.py").write_text(MEAN.format(name="mine") + "# changed\n")
    assert [cell.key() == key for cell, key in zip(cells, keys, strict=True)] == [False, True]
    for text, line in [
        ("{what: x, groups: [{pools: [pool.yaml], methods: [linear]}]}", "is two files"),
        ("{what: x, groups: [{pools: [{modelpool: pool.yaml}], methods: [linear]}]}", "has no 'taskpool'"),
        ("{what: x, plugins: own_mean.py, groups: []}", "plugins must be a list"),
    ]:
        assert cli.main(["bench", suite_of(tmp_path, text)]) == 2
        assert line in capsys.readouterr().err


def test_tuning_sees_calibration_data_only_and_is_no_worse(toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, tasks, _ = Cell("toy", "ties_merging").opened()
    splits = []
    scored = Side.scored

    def watched(self: Side, model: nn.Module, split: str = "test") -> Any:
        splits.append(split)
        return scored(self, model, split)

    monkeypatch.setattr(Side, "scored", watched)
    given = fb.algorithm("ties_merging", density=0.3, scaling_factor=0.0, merge="mean")
    found = tune(given, pool, tasks, trials=5, seed=1)
    assert set(splits) == {"calibration"}
    assert [settings for settings, _ in found.trials][0] == {"scaling_factor": 0.0, "density": 0.3}
    scores = [score for _, score in found.trials]
    assert len(scores) == 5 and max(scores) > scores[0]  # a factor of zero is the base, which knows nothing
    assert found.describe() == {"on": "calibration", "trials": 5, "given": scores[0], "best": max(scores)}
    assert found.algorithm.hyperparameters["merge"] == "mean"
    again = tune(given, pool, tasks, trials=5, seed=1)
    assert again.trials == found.trials


def test_whole_numbers_are_tuned_as_whole_numbers(toy: None, tmp_path: Path) -> None:
    plugin = tmp_path / "first_few.py"
    plugin.write_text(FEW)
    load_plugin(str(plugin))
    pool, tasks, _ = Cell("toy", "first_few").opened()
    found = tune(fb.algorithm("first_few"), pool, tasks, trials=4)
    assert len(found.trials) == 4 and {type(settings["n"]) for settings, _ in found.trials} == {int}


def test_a_tuned_run_is_a_row_of_its_own(toy: None, tmp_path: Path) -> None:
    cells = [Cell("toy", "task_arithmetic"), Cell("toy", "task_arithmetic", tune=3)]
    default, tuned = bench(cells, Results(tmp_path), workers=1)
    assert default.label == "task_arithmetic" and tuned.label == "task_arithmetic (tuned, 3 trials)"
    assert tuned.report["run"]["tuned"]["trials"] == 3
    with pytest.raises(fb.InputError, match="nothing to tune"):
        load_suite(
            suite_of(tmp_path, "{what: x, groups: [{pools: [clip-mini], methods: [{simple_average: {}, tune: 3}]}]}")
        )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets the peak of a process")
def test_every_run_tells_its_own_peak_of_memory() -> None:
    large = bytearray(300_000_000)
    high = peak_memory_mb()
    del large
    forget_peak_memory()
    assert peak_memory_mb() < high - 200
