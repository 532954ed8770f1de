"""Free numbers of a recipe, searched: a toy's optimum, the same after a kill, and a small search that really merges."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_clip

import fusionbench as fb
from fusionbench import InputError
from fusionbench.cli import main
from fusionbench.evolve import Candidate, Free, filled, free_numbers, score_of, search

RECIPE = """\
# what we try
merge_method: task_arithmetic
base_model: base
models:
  - model: a   # the first
    parameters:
      weight: {search: [0, 1]}   # stays
  - model: b
    parameters: {weight: &w {search: [-1, 1.5], start: 0.3}}
  - model: c
    parameters: {weight: *w}
parameters:
  lambda: [0.5, {start: 1e-5, search: [0, 1e-4]}]
"""


def recipe(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def test_free_numbers_are_found_wherever_a_number_may_stand(tmp_path: Path) -> None:
    text, free = free_numbers(recipe(tmp_path, RECIPE))
    assert [(f.name, f.low, f.high, f.start) for f in free] == [
        ("models[0].parameters.weight", 0, 1, 0.5),
        ("models[1].parameters.weight", -1, 1.5, 0.3),
        ("parameters.lambda[1]", 0, 1e-4, 1e-5),
    ]
    plain = filled(text, free, [0.25, -1.0, 0.00002])
    for line in (
        "# what we try",
        "      weight: 0.25   # stays",
        "    parameters: {weight: &w -1.0}",
        "    parameters: {weight: *w}",
        "  lambda: [0.5, 0.00002]",
    ):
        assert line in plain.splitlines()
    assert plain.count("\n") == RECIPE.count("\n")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: {search: [1, 0]}", 2, "b: search must be [low, high], the lower one first"),
        ("a: 1\nb: {search: [0, 1e308]}", 2, "b: search must be between -1e+38 and 1e+38"),
        ("a: 1\nb: {search: [1]}", 2, "b: search must be [low, high]"),
        ("a: 1\nb: {search: [0, x]}", 2, "search must be a number; got 'x'"),
        ("a: 1\nb: {search: [0, 1], start: 2}", 2, "b: start must be between 0 and 1; got 2"),
        ("a: 1\nb: {search: [0, 1], begin: 2}", 2, "b takes no 'begin'"),
        ("a:\n  - b:\n      search: [0, 1]", 3, "a[0].b: write it in braces"),
        ("a: 1\n", 0, "has no number to search: write one as {search: [low, high]}"),
    ],
)
def test_what_is_no_free_number_is_told_with_its_line(text: str, line: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        free_numbers(recipe(tmp_path, text))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not line or str(caught.value).startswith(f"{tmp_path}/recipe.yaml:{line}: ")


FREE = [Free("x", 0, 1, 0.5, 0, 0), Free("y", -10, 30, 0, 0, 0)]
SETTINGS = {"population": 8, "sigma": 0.25, "seed": 3}


class Bowl:
    """The objective with its highest value, 0, at (0.8, 12); counts how often it is asked."""

    def __init__(self, until: int | None = None) -> None:
        self.until, self.asked = until, 0

    def __call__(self, numbers: Sequence[float]) -> float:
        if self.asked == self.until:
            raise KeyboardInterrupt
        self.asked += 1
        x, y = numbers
        return -((x - 0.8) ** 2) - ((y - 12) / 40) ** 2


def searched(journal: Path, bowl: Bowl, generations: int = 25, **changed: object) -> list[Candidate]:
    found = search(bowl, FREE, journal, {**SETTINGS, **changed}, generations=generations)
    return [candidate for generation in found for candidate in generation]


def test_it_finds_the_optimum_within_the_ranges(tmp_path: Path) -> None:
    found = searched(tmp_path / "j", Bowl())
    best = max(found, key=score_of)
    assert best.numbers == pytest.approx((0.8, 12), rel=1e-2) and best.score == pytest.approx(0, abs=1e-4)
    assert found[0] == Candidate(0, (0.5, 0), pytest.approx(-0.18)) and len(found) == 1 + 25 * 8
    assert all(0 <= x <= 1 and -10 <= y <= 30 for x, y in (one.numbers for one in found))
    means = [sum(score_of(one) for one in found if one.generation == i) / 8 for i in (1, 25)]
    assert means[1] > means[0] / 10


def test_one_number_can_be_searched_alone(tmp_path: Path) -> None:
    found = search(lambda x: -abs(x[0] - 0.1), FREE[:1], tmp_path / "j", SETTINGS, generations=12)
    assert max((c for generation in found for c in generation), key=score_of).numbers[0] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("killed_after", [0, 1, 5, 9, 30])
def test_a_killed_search_goes_on_as_if_nothing_had_been(killed_after: int, tmp_path: Path) -> None:
    whole = searched(tmp_path / "undisturbed", Bowl(), 6)
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "killed", Bowl(killed_after), 6)
    with open(tmp_path / "killed", "a") as stream:
        stream.write('{"generation": 1, "can')  # a line that was cut off
    rest = Bowl()
    assert searched(tmp_path / "killed", rest, 6) == whole
    assert rest.asked == 1 + 6 * 8 - killed_after
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "undisturbed").read_bytes()
    further = Bowl()
    assert searched(tmp_path / "killed", further, 7)[: len(whole)] == whole and further.asked == 8


def test_another_search_does_not_go_on_in_its_journal(tmp_path: Path) -> None:
    searched(tmp_path / "j", Bowl(), 1)
    for changed, message in (
        ({"seed": 4}, "is of another search .its seed is 3, not 4"),
        ({"population": 6}, "its population is 8, not 6"),
        ({"recipe": "x"}, "not the same recipe"),
    ):
        with pytest.raises(InputError, match=message):
            searched(tmp_path / "j", Bowl(), 1, **changed)
    (tmp_path / "j").write_text("hello\n")
    with pytest.raises(InputError, match="is no journal of a search"):
        searched(tmp_path / "j", Bowl(), 1)


def test_what_has_no_score_is_worse_than_all_else(tmp_path: Path) -> None:
    found = search(lambda x: float("nan") if x[0] < 0.6 else -x[0], FREE[:1], tmp_path / "j", SETTINGS, generations=5)
    candidates = [candidate for generation in found for candidate in generation]
    assert candidates[0].score is None and max(candidates, key=score_of).numbers[0] >= 0.6
    assert [json.loads(line)["score"] for line in (tmp_path / "j").read_text().splitlines()[1:]] == [
        candidate.score for candidate in candidates
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "test"], "Unrecognized arguments: --split test"),
        (["--generations", "0"], "--generations must be a whole number of 1 or more; got 0"),
        (["--population", "3"], "--population must be 4 or more"),
        (["--sigma", "2"], "--sigma must be in (0, 1]; got 2"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--taskpool", "clip-min"], "Did you mean 'clip-mini'"),
        ([], "has no number to search"),
    ],
)
def test_bad_words_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = RECIPE if words else "merge_method: linear\n"
    path = recipe(tmp_path, text)
    assert main(["evolve", str(path), str(tmp_path / "out"), "--taskpool", "clip-mini", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


LINEAR = """\
merge_method: linear  # of two
models:
  - model: colours
    parameters: {weight: {search: [-1, 2], start: 0.75}}
  - model: greys
    parameters: {weight: {search: [-1, 2]}}
parameters: {normalize: false}
"""
SEARCH = ["--generations", "2", "--population", "4", "--seed", "1"]


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_clip.write_zoo(tmp_path)
    monkeypatch.chdir(tmp_path)
    return recipe(tmp_path, LINEAR)


def lines(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_a_search_merges_and_scores_and_the_best_recipe_is_plain(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fusionbench.architectures import architecture_of
    from fusionbench.recipes.build import build
    from fusionbench.runner import evaluate

    assert main(["evolve", "recipe.yaml", "out", "--taskpool", "tasks.yaml", *SEARCH]) == 0
    candidates = lines("out/search.jsonl")[1:]
    assert [(one["generation"], one["candidate"]) for one in candidates] == [
        (0, 0), *((generation, i) for generation in (1, 2) for i in range(4))
    ]  # fmt: skip
    assert candidates[0]["numbers"] == [0.75, 0.5] and len({one["score"] for one in candidates}) > 2
    tasks = fb.load_taskpool("tasks.yaml")

    def score(checkpoint: fb.Checkpoint, split: str) -> float:
        pool = fb.ModelPool({"m": checkpoint}, architecture=architecture_of(checkpoint))
        return tasks.headline(evaluate(pool["m"], pool, tasks, split=split))["average"]

    best = build("out/best.yaml").checkpoint
    report = json.loads(Path("out/report.json").read_text())
    assert score(best, "calibration") == max(one["score"] for one in candidates) == report["run"]["calibration"]["best"]
    assert score(best, "test") == tasks.headline(report)["average"]
    start = build(
        "recipe.yaml", text=LINEAR.replace("{search: [-1, 2], start: 0.75}", "0.75").replace("{search: [-1, 2]}", "0.5")
    )
    assert score(start.checkpoint, "calibration") == candidates[0]["score"] == report["run"]["calibration"]["start"]
    assert "merge_method: linear  # of two" in Path("out/best.yaml").read_text()
    assert Path("out/search.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "2 free: models[0].parameters.weight, models[1].parameters.weight" in said
    assert f"the start: best {candidates[0]['score']:.4f}" in said and "generation 2: best " in said
    again = Path("out/search.jsonl").read_bytes()
    assert main(["evolve", "recipe.yaml", "out", "--taskpool", "tasks.yaml", *SEARCH]) == 0
    assert Path("out/search.jsonl").read_bytes() == again


def test_the_search_does_not_depend_on_test_data(zoo: Path) -> None:
    words = ["--taskpool", "tasks.yaml", *SEARCH]
    assert main(["evolve", "recipe.yaml", "out", *words]) == 0
    for file in Path("tasks").glob("*.npz"):
        arrays = dict(np.load(file))
        arrays["test_labels"] = (arrays["test_labels"] + 1) % 3
        arrays["test_images"] = 255 - arrays["test_images"]
        np.savez_compressed(file, **arrays)
    assert main(["evolve", "recipe.yaml", "other", *words]) == 0
    assert lines("out/search.jsonl")[1:] == lines("other/search.jsonl")[1:]
    assert Path("out/best.yaml").read_bytes() == Path("other/best.yaml").read_bytes()
    assert Path("out/report.json").read_bytes() != Path("other/report.json").read_bytes()
    assert lines("out/search.jsonl")[0]["tasks"] != lines("other/search.jsonl")[0]["tasks"]


def test_the_best_recipe_finds_models_that_lie_beside_the_first(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusionbench.recipes.build import build

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    words = ["--taskpool", str(tmp_path / "tasks.yaml"), "--generations", "1", "--population", "4"]
    assert main(["evolve", str(zoo), "out", *words]) == 0
    assert f'- model: "{tmp_path}/colours"' in Path("out/best.yaml").read_text()
    assert build("out/best.yaml").checkpoint.specs


def test_a_model_that_has_changed_makes_another_search(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evolve", "recipe.yaml", "out", "--taskpool", "tasks.yaml", "--generations", "1", "--population", "4"]
    assert main(words) == 0
    file = Path("colours/model.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-4] + bytes(4))
    capsys.readouterr()
    assert main(words) == 2
    assert "is of another search (not the same models): choose" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("right", "wrong", "line", "message"),
    [("weight", "weigt", 4, "'weigt'. Did you mean 'weight'?"), ("greys", "grays", 5, "'grays' does not exist")],
)
def test_a_recipe_that_is_wrong_is_told_before_anything_is_written(
    right: str, wrong: str, line: int, message: str, zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe(zoo.parent, LINEAR.replace(right, wrong, 1))
    assert main(["evolve", "recipe.yaml", "out", "--taskpool", "tasks.yaml", *SEARCH]) == 2
    error = capsys.readouterr().err
    assert f"recipe.yaml:{line}: " in error and message in error and error.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.slow
def test_the_zoos_fine_tunes_are_searched(tmp_path: Path, few_examples: None) -> None:
    path = recipe(
        tmp_path,
        "merge_method: linear\nmodels:\n  - model: zoo:clip-mini/mnist\n    parameters: {weight: {search: [0, 1]}}\n"
        "  - model: zoo:clip-mini/emoji\n    parameters: {weight: {search: [0, 1]}}\nparameters: {normalize: false}\n",
    )
    (tmp_path / "tasks.yaml").write_text(
        "kind: zero_shot_classification\nclip: zoo:clip-mini/base\ntasks:\n"
        "  mnist: {data: zoo:clip-mini/tasks/mnist.npz}\n  emoji: {data: zoo:clip-mini/tasks/emoji.npz}\n"
    )
    words = ["--taskpool", str(tmp_path / "tasks.yaml"), "--generations", "2", "--population", "4"]
    assert main(["evolve", str(path), str(tmp_path / "out"), *words]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["run"]["candidates"] == 9 and report["average"]["accuracy"] > 0.5
    assert report["run"]["calibration"]["best"] >= report["run"]["calibration"]["start"]
