import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from conftest import Random, random_tasks
from tiny_clip import write_zoo
from torch import nn

import fusionbench as fb
from fusionbench import ops
from fusionbench.adapt import WINDOW, MergeAdaptation, descend, entropy, states_kept
from fusionbench.cli import main
from fusionbench.coefficients import read_coefficients
from fusionbench.cost import stopwatch
from fusionbench.progress import shown
from fusionbench.runner import facts


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture
def pool() -> fb.ModelPool:
    return fb.ModelPool({name: network(i) for i, name in enumerate("abc", 1)}, base=network(0))


def same(a: fb.Checkpoint, b: fb.Checkpoint) -> bool:
    return all(a[name].equal(b[name]) for name in a)


def adaptation_of(pool: fb.ModelPool, merge) -> MergeAdaptation:
    return MergeAdaptation(
        pool, random_tasks(pool), merge, vectors=lambda p: p.task_vectors, split="test", batch_size=24, seed=0
    )


def test_entropy_by_hand() -> None:
    even = torch.zeros(1, 4)
    sure = torch.tensor([[100.0, 0, 0, 0]])
    assert float(entropy(even)) == pytest.approx(torch.tensor(4.0).log().item())
    assert float(entropy(torch.cat([even, sure]))) == pytest.approx(torch.tensor(4.0).log().item() / 2)
    with pytest.raises(fb.InputError, match="predicts something else"):
        entropy(torch.zeros(1, 4, 2))


def test_the_gradient_of_the_coefficients_equals_finite_differences(pool: fb.ModelPool) -> None:
    table = torch.full((len(pool.reference.specs), 3), 0.3, requires_grad=True)
    rows = {name: i for i, name in enumerate(pool.reference.specs)}
    adaptation = adaptation_of(pool, lambda v: v.base + ops.combine(table[rows[v.name]], v.task_vectors))
    step = next(adaptation.entropies(0))
    step()
    assert table.grad is not None
    gradient = table.grad.clone()
    for row, model in ((rows["0.weight"], 1), (rows["3.bias"], 2), (rows["1.weight"], 0)):
        values = []
        for change in (0.01, -0.02, 0.01):
            with torch.no_grad():
                table[row, model] += change
            values.append(step())
        assert (values[0] - values[1]) / 0.02 == pytest.approx(float(gradient[row, model]), rel=0.01, abs=1e-4)


def test_without_a_step_it_is_task_arithmetic(pool: fb.ModelPool) -> None:
    merged = fb.methods.adamerging(pool, random_tasks(pool), steps=0, scaling_factor=0.2)
    wanted = fb.methods.task_arithmetic(pool, scaling_factor=0.2)
    for name, _ in network(0).named_parameters():
        torch.testing.assert_close(merged[name], wanted[name])
    statistics = torch.stack([pool[name]["1.running_mean"] for name in pool]).mean(0)
    torch.testing.assert_close(merged["1.running_mean"], statistics)


@pytest.mark.parametrize("by", ["layer", "task"])
def test_entropy_falls(pool: fb.ModelPool, by: str, tmp_path: Path) -> None:
    tasks, file = random_tasks(pool), tmp_path / "coefficients.json"

    def mean_entropy(checkpoint: fb.Checkpoint) -> float:
        model = pool.build(checkpoint)
        return sum(entropy(task.predict(model, task.inputs)).item() for task in tasks.values())  # type: ignore[attr-defined]

    few = fb.methods.adamerging(pool, tasks, by=by, steps=0)
    many = fb.methods.adamerging(pool, tasks, by=by, steps=60, learning_rate=0.05, coefficients=str(file))
    assert mean_entropy(many) < mean_entropy(few) - 0.05
    rows = json.loads(file.read_text())["coefficients"]
    assert list(rows) == [name for name, _ in network(0).named_parameters()]
    assert (len({tuple(row) for row in rows.values()}) == 1) == (by == "task")


def test_on_calibration_data_it_looks_at_what_methods_may(pool: fb.ModelPool, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, looked = random_tasks(pool).calibrated_on("calibration:5"), []
    predict = Random.predict
    monkeypatch.setattr(Random, "predict", lambda task, *words: looked.append(words[1]) or predict(task, *words))
    for split, calibration, count in (("calibration", "calibration:5", 5), ("test", "test", 24)):
        algorithm = fb.algorithm("adamerging", steps=24, split=split, batch_size=2)
        assert algorithm.run(pool, tasks).recipe["calibration"] == calibration
        batches = [tuple(map(tuple, inputs.tolist())) for inputs in looked[:: len(pool)]]  # of the first task
        looked.clear()
        assert len({example for batch in batches for example in batch}) == count
        if split == "calibration":  # in other orders
            assert len({tuple(batches[i : i + 3]) for i in range(0, 24, 3)}) > 1
        found = facts(algorithm, pool, tasks)["seen"]
        assert found == {"calibration": calibration, "tasks": ["a", "b", "c"]}


def test_a_state_is_of_the_calibration_data_that_were_allowed(pool: fb.ModelPool, cache: Path) -> None:
    with states_kept():
        for calibration in ("calibration:5", "calibration:6"):
            tasks = random_tasks(pool).calibrated_on(calibration)
            fb.methods.adamerging(pool, tasks, steps=1, split="calibration")
        assert len(list(cache.glob("adaptations/*.pt"))) == 2


def test_labels_make_no_difference(pool: fb.ModelPool) -> None:
    tasks, others = random_tasks(pool), random_tasks(pool)
    for task in others.values():
        task.labels = torch.zeros_like(task.labels)  # type: ignore[attr-defined]
    assert same(fb.methods.adamerging(pool, tasks, steps=3), fb.methods.adamerging(pool, others, steps=3))


def test_at_a_lower_density_it_learns_on_what_ties_leaves(pool: fb.ModelPool) -> None:
    merged = fb.methods.adamerging(pool, random_tasks(pool), steps=0, density=0.2)
    wanted = fb.methods.ties_merging(pool, density=0.2)
    for name, _ in network(0).named_parameters():
        torch.testing.assert_close(merged[name], wanted[name])


def test_what_is_held_is_bounded_and_reading_the_rest_in_every_step_gives_the_same() -> None:
    """Of eight layers of 1 KB each, in a base and three models."""

    def layers(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(8)))

    whole, one, found = 8 * 4096, 4096, []
    for memory, held in ((None, whole), (3 * one + 100, 3 * one), (1, 0)):
        pool = fb.ModelPool({name: layers(i) for i, name in enumerate("abc", 1)}, base=layers(0), memory=memory)
        table, seen, most = torch.full((3,), 0.3, requires_grad=True), [], 0

        def alive(seen: list) -> int:
            return sum(tensor.nbytes for tensor in (reference() for reference in seen) if tensor is not None)

        def merge(v, table=table, seen=seen):
            nonlocal most
            seen += [weakref.ref(t) for t in (v.base, v.task_vectors) if not any(r() is t for r in seen)]
            most = max(most, alive(seen))
            return v.base + ops.combine(table, v.task_vectors)

        adaptation = adaptation_of(pool, merge)
        for _, entropy_of in zip(range(2), adaptation.entropies(0), strict=False):
            entropy_of()
        assert alive(seen) == held and most <= min(held + one, whole)
        found.append(table.grad)
    assert found[0].equal(found[1]) and found[0].equal(found[2])  # type: ignore[union-attr]


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_coefficients_are_applied_again_without_data(pool: fb.ModelPool, tmp_path: Path, density: float) -> None:
    file = str(tmp_path / "coefficients.json")
    learned = fb.methods.adamerging(
        pool, random_tasks(pool), steps=5, learning_rate=0.1, density=density, coefficients=file
    )
    again = fb.methods.apply_coefficients(pool, file=file)
    for name in learned:
        torch.testing.assert_close(again[name], learned[name])
    assert again.recipe["coefficients"] == read_coefficients(file).digest
    content = json.loads(Path(file).read_text())
    first = next(iter(content["coefficients"].values()))
    first[0] += 1
    (tmp_path / "changed.json").write_text(json.dumps(content))
    changed = fb.methods.apply_coefficients(pool, file=str(tmp_path / "changed.json"))
    assert changed.recipe["coefficients"] != again.recipe["coefficients"]  # no run goes on with what the other did
    other = fb.ModelPool({name: pool[name] for name in "cab"}, base=pool.base)
    for name in learned:
        torch.testing.assert_close(fb.methods.apply_coefficients(other, file=file)[name], learned[name])


def test_coefficients_are_applied_to_float64_in_float64(tmp_path: Path) -> None:
    def model(value: float) -> dict[str, torch.Tensor]:
        return {"w": torch.tensor([value], dtype=torch.float64)}

    pool = fb.ModelPool({"a": model(1.0), "b": model(3.0)}, base=model(0.0))
    (tmp_path / "file.json").write_text('{"models": ["a", "b"], "density": 1, "coefficients": {"w": [0.3, 0.3]}}')
    merged = fb.methods.apply_coefficients(pool, file=str(tmp_path / "file.json"))
    assert float(merged["w"]) == pytest.approx(1.2, rel=1e-15)  # 0.3 of float32 is off by 1e-8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "holds no coefficients"),
        ("[1]", "holds no coefficients"),
        ('{"models": ["a"], "density": 1, "coefficients": {"w": [1, 2]}}', "holds no coefficients"),
        (
            '{"models": ["a", "b"], "density": 1, "coefficients": {"w": [1, 2]}}',
            "are of the models a, b; the pool has a, b, c",
        ),
        (
            '{"models": ["a", "b", "c"], "density": 1, "coefficients": {"0.wieght": [1, 1, 1]}}',
            "Did you mean '0.weight'?",
        ),
    ],
)
def test_a_wrong_file_of_coefficients_is_one_line(
    pool: fb.ModelPool, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(fb.InputError) as error:
        fb.methods.apply_coefficients(pool, file=str(tmp_path / "file.json"))
    assert message in str(error.value)


def test_the_command_line_learns_shows_and_applies_coefficients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_zoo(tmp_path)
    pools = ["modelpool=pool.yaml", "taskpool=tasks.yaml"]
    words = ["run", "method=adamerging", "method.steps=2", "method.coefficients=learned.json", *pools]
    assert main([*words, "out=learned", "report=report.json"]) == 0
    report = json.loads(Path("report.json").read_text())
    assert report["run"]["hyperparameters"]["steps"] == 2 and "accuracy" in report["average"]
    assert main(["coefficients", "learned.json", "--out", "learned.png"]) == 0
    assert "coefficients over" in capsys.readouterr().out and Path("learned.png").stat().st_size > 10_000
    assert main(["run", "method=apply_coefficients", "method.file=learned.json", *pools[:1], "out=again"]) == 0
    assert main([*words, "out=read", "memory=20KB"]) == 0  # most task vectors are read anew in each step
    assert Path("read/model.safetensors").read_bytes() == Path("learned/model.safetensors").read_bytes()
    learned, again = fb.Checkpoint.open("learned"), fb.Checkpoint.open("again")
    for name in learned:
        torch.testing.assert_close(again[name], learned[name])
    for wrong, message in (
        (["coefficients", "learned.jsn"], "The file of coefficients 'learned.jsn' does not exist"),
        (["coefficients", "learned.json", "--out", "learned.gif"], "is no picture"),
        (["run", "method=adamerging", *pools[:1], "out=x"], "adamerging looks at test inputs: give it a task pool"),
        (["run", "method=apply_coefficients", *pools], "apply_coefficients needs 'file'"),
        ([*words, "calibration=none"], "calibration must be a split"),
        ([*words, "memory=many"], "'many' is not a size"),
        ([*words, "method.coefficients=learned"], "coefficients: 'learned' is a folder; name a file"),
        (["run", "method=fisher_merging", "method.statistics=pool.yaml", *pools], "is not a folder one may write to"),
    ):
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
import fusionbench.adapt as adapt
from conftest import Random
from methods.test_adamerging import adapted
adapt.SECONDS_BETWEEN_STATES = 0
predict = Random.predict
Random.predict = lambda *args: time.sleep(0.03) or predict(*args)
adapted({out!r})
"""


def adapted(out: Path | str) -> None:
    torch.set_num_threads(1)
    pool = fb.ModelPool({name: network(i) for i, name in enumerate("abc", 1)}, base=network(0))
    fb.save(fb.algorithm("adamerging", steps=40, batch_size=8, learning_rate=0.05).run(pool, random_tasks(pool)), out)


def test_a_killed_adaptation_goes_on_where_it_was_and_ends_with_the_same_bytes(tmp_path: Path, cache: Path) -> None:
    program = KILLED.format(tests=str(Path(__file__).parents[1]), out=str(tmp_path / "killed"))
    environment = {**os.environ, "FUSIONBENCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([sys.executable, "-c", program], env=environment)
    state = None
    for _ in range(1200):
        time.sleep(0.05)
        state = next(cache.glob("adaptations/*.pt"), None)
        if state is not None and len(torch.load(state, weights_only=True)["entropies"]) >= 5:
            break
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert state is not None and not (tmp_path / "killed").exists()
    kept = torch.load(state, weights_only=True)
    assert 5 <= len(kept["entropies"]) < 40
    assert kept["seconds"]["wall"] >= 0.03 * len(kept["entropies"])  # each step sleeps
    threads = torch.get_num_threads()
    try:
        start = time.perf_counter()
        with stopwatch() as taken:
            adapted(tmp_path / "killed")
        here = time.perf_counter() - start
        assert not state.exists()
        assert taken["wall"] == pytest.approx(here + kept["seconds"]["wall"], abs=0.01)
        with stopwatch() as taken:
            pass
        assert taken["wall"] < 0.1  # what is counted once is counted for its own block
        adapted(tmp_path / "undisturbed")
    finally:
        torch.set_num_threads(threads)
    for name in ("model.safetensors", "recipe.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_it_ends_when_the_entropy_goes_down_no_more(pool: fb.ModelPool) -> None:
    adaptation = adaptation_of(pool, lambda v: v.base)

    def update(number: int, entropy) -> float:
        return float(max(0, 50 - number))  # nothing is gained from step 50 on

    for patience, steps in ((0, 200), (5, 50 + WINDOW + 5)):
        found = descend(adaptation, update, [], steps=200, patience=patience, facts={"patience": patience})
        assert len(found) == steps


def test_scalars_and_modules_that_are_used_twice_are_learned(cache: Path) -> None:
    class Twice(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            inner = nn.Linear(4, 4)
            self.mlp = nn.Sequential(inner, nn.Tanh(), inner, nn.Linear(4, 3))
            self.scale = nn.Parameter(torch.tensor(1.0 + seed))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * self.mlp(x)

    pool = fb.ModelPool({name: Twice(i) for i, name in enumerate("ab", 1)}, base=Twice(0))
    merged = fb.methods.adamerging(pool, random_tasks(pool), steps=0, scaling_factor=0.5)
    for name, tensor in merged.items():
        base = pool.base[name]
        torch.testing.assert_close(tensor, base + 0.5 * sum(pool[m][name] - base for m in pool))
    for method in ("adamerging", "concrete_task_arithmetic", "concrete_adamerging"):
        given = {"mask_steps": 3} if method == "concrete_adamerging" else {}
        found = fb.algorithm(method, steps=3, **given).run(pool, random_tasks(pool))
        assert found["mlp.0.weight"].equal(found["mlp.2.weight"]) and found["scale"].isfinite()


def test_states_are_kept_until_what_they_gave_is(pool: fb.ModelPool, cache: Path) -> None:
    def adapt() -> fb.Checkpoint:
        return fb.methods.adamerging(pool, random_tasks(pool), steps=3)

    def states() -> int:
        return len(list(cache.glob("adaptations/*.pt")))

    with pytest.raises(OSError, match="full"), states_kept():
        first = adapt()
        assert states() == 1
        raise OSError("the disk is full")
    assert states() == 1
    with states_kept():
        again = adapt()
    assert states() == 0 and same(first, again)
    adapt()
    assert states() == 0


def test_the_entropy_is_shown_while_it_adapts(pool: fb.ModelPool) -> None:
    texts: list[str] = []

    def tracker(items, description, total):
        for item in items:
            yield item
            if callable(description):
                texts.append(description())

    adaptation, entropies = adaptation_of(pool, lambda v: v.base), iter((1.25, 0.5, 0.125))
    token = shown.set(tracker)
    try:
        descend(adaptation, lambda number, entropy: next(entropies), [], steps=3, patience=0, facts={})
    finally:
        shown.reset(token)
    assert texts == ["adapting, entropy 1.250", "adapting, entropy 0.500", "adapting, entropy 0.125"]
