from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Random, random_tasks
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import fusionbench as fb
from fusionbench.architectures._template import Template
from fusionbench.calibrate import gram_matrices, linear_layers, matrices_of


def pool_of_layers(make, count: int = 3) -> fb.ModelPool:
    models = []
    for seed in range(count + 1):
        torch.manual_seed(seed)
        models.append(make())
    return fb.ModelPool({f"m{i}": model for i, model in enumerate(models[1:])}, base=models[0])


def nearest(inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> torch.Tensor:
    """The matrix `(out, in)` by least squares, each model's rows counting as much as another's."""
    x = torch.cat([x / len(x) ** 0.5 for x in inputs]).double()
    y = torch.cat([y / len(y) ** 0.5 for y in outputs]).double()
    return torch.linalg.lstsq(x, y).solution.T.float()


@pytest.mark.parametrize("layer", [lambda: nn.Linear(5, 4), lambda: Conv1D(4, 5)], ids=["Linear", "Conv1D"])
def test_it_is_the_closed_form(layer) -> None:
    def matrix(weight: torch.Tensor) -> torch.Tensor:
        return weight if weight.shape == (4, 5) else weight.T

    pool = pool_of_layers(layer)
    tasks = random_tasks(pool)
    inputs = {name: torch.randn(24, 5) for name in pool}
    for name, task in tasks.items():
        task.inputs = inputs[name]  # type: ignore[attr-defined]
    merged = fb.methods.regmean(pool, tasks, off_diagonal=1.0, damping=1e-10)
    wanted = nearest(list(inputs.values()), [inputs[name] @ matrix(pool[name]["weight"]).T for name in pool])
    torch.testing.assert_close(matrix(merged["weight"]), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged["bias"], torch.stack([pool[name]["bias"] for name in pool]).mean(0))


def test_a_convolution_is_a_matrix_on_patches() -> None:
    pool = pool_of_layers(lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), nn.Flatten()))
    images = {name: torch.randn(20, 2, 6, 6) for name in pool}
    tasks = random_tasks(pool)
    for name, task in tasks.items():
        task.inputs = images[name]  # type: ignore[attr-defined]
    merged = fb.methods.regmean(pool, tasks, off_diagonal=1.0, damping=1e-10)["0.weight"]
    inputs = [nn.functional.unfold(x, 3, 1, 1, 2).transpose(1, 2).reshape(-1, 18) for x in images.values()]
    wanted = nearest(
        inputs, [x @ pool[name]["0.weight"].reshape(3, 18).T for name, x in zip(pool, inputs, strict=True)]
    )
    torch.testing.assert_close(merged, wanted.reshape(3, 2, 3, 3), rtol=1e-3, atol=1e-4)


def test_without_what_is_off_the_diagonal_it_is_a_weighted_average_of_columns() -> None:
    pool = pool_of_layers(lambda: nn.Linear(4, 3, bias=False), 2)
    tasks = random_tasks(pool)
    merged = fb.methods.regmean(pool, tasks, off_diagonal=0.0, damping=1e-12)["weight"]
    weights = torch.stack([task.inputs.square().mean(0) for task in tasks.values()])  # type: ignore[attr-defined]
    models = torch.stack([pool[name]["weight"] for name in pool])
    torch.testing.assert_close(merged, (weights[:, None] * models).sum(0) / weights.sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seen", [[1.0, 0, 1, 1, 0], [0.0, 0, 0, 0, 0]])
def test_features_that_are_always_zero_are_averaged(seen: list[float]) -> None:
    pool = pool_of_layers(lambda: nn.Linear(5, 3, bias=False))
    tasks = random_tasks(pool)
    for task in tasks.values():
        task.inputs = torch.randn(24, 5) * torch.tensor(seen)  # type: ignore[attr-defined]
    merged = fb.methods.regmean(pool, tasks)["weight"]
    mean = torch.stack([pool[name]["weight"] for name in pool]).mean(0)
    torch.testing.assert_close(merged[:, [1, 4]], mean[:, [1, 4]], rtol=1e-4, atol=1e-5)


class Attention(nn.Module):
    """Three layers with one input, one with another, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out, self.never = (nn.Linear(4, 4) for _ in range(5))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.q(x) * self.k(x) + self.v(x)
        y = self.out(h)
        self.calls += 1
        return y


def test_layers_that_read_the_same_share_one_matrix_and_nothing_is_computed_after_the_last() -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(24, 4)
    task = Random("a", fb.Checkpoint.of(model.state_dict()))
    task.inputs = x
    grams = gram_matrices(model, task, task.batches("calibration", 8), linear_layers(model))
    assert grams["q.weight"] is grams["k.weight"] is grams["v.weight"] and "never.weight" not in grams
    torch.testing.assert_close(grams["q.weight"], x.T @ x / 24)
    h = (model.q(x) * model.k(x) + model.v(x)).detach()
    torch.testing.assert_close(grams["out.weight"], h.T @ h / 24)
    assert model.calls == 1  # of three batches: the others end before the last layer
    assert not model.out._forward_pre_hooks


def test_kept_matrices_are_written_once_and_give_the_same(tmp_path: Path) -> None:
    pool = pool_of_layers(Attention)
    tasks = random_tasks(pool)
    here = fb.methods.regmean(pool, tasks)
    there = fb.methods.regmean(pool, tasks, statistics=str(tmp_path / "grams"))
    assert all(here[name].equal(there[name]) for name in here)
    kept = fb.Checkpoint.open(tmp_path / "grams" / "m0")
    assert set(kept.specs) == {"q.weight", "out.weight"} and kept.aliases == {
        "k.weight": "q.weight",
        "v.weight": "q.weight",
    }


def test_a_model_without_a_task_is_named() -> None:
    pool = pool_of_layers(lambda: nn.Linear(4, 3))
    tasks = fb.TaskPool({"m0": Random("m0", pool.reference), "m11": Random("m1", pool.reference)})
    with pytest.raises(fb.InputError, match="no task of the model 'm1'. Did you mean 'm11'?"):
        fb.methods.regmean(pool, tasks)


def test_calibration_data_is_what_was_asked_for() -> None:
    pool = pool_of_layers(lambda: nn.Linear(4, 3))
    tasks = random_tasks(pool).calibrated_on("test:10")
    sizes = [len(labels) for _, labels in tasks.calibration_batches("m0", 4)]
    assert sizes == [4, 4, 2]
    assert fb.algorithm("regmean").run(pool, tasks).recipe["calibration"] == "test:10"
    for wrong in ("tests:10", "test:0", "test:", "test:-1", "10"):
        with pytest.raises(fb.InputError, match="calibration must be a split"):
            tasks.calibrated_on(wrong)


def test_with_the_merged_prefix_a_second_layer_fits_what_the_merged_first_gives() -> None:
    pool = pool_of_layers(lambda: nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)))
    tasks = random_tasks(pool)
    plain, plus = fb.methods.regmean(pool, tasks), fb.methods.regmean_plus_plus(pool, tasks)
    torch.testing.assert_close(plus["0.weight"], plain["0.weight"])  # the first layer's inputs are the data
    merged = fb.methods.regmean_plus_plus(pool, tasks, off_diagonal=1.0, damping=1e-10)
    first = pool.build(merged)[:2]  # type: ignore[index]
    inputs = [first(task.inputs).detach() for task in tasks.values()]  # type: ignore[attr-defined]
    wanted = nearest(inputs, [x @ pool[name]["2.weight"].T for name, x in zip(pool, inputs, strict=True)])
    torch.testing.assert_close(merged["2.weight"], wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(plus["2.weight"], plain["2.weight"], atol=1e-3)


def test_an_input_that_was_changed_in_place_is_another_one() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            return self.a(input=x) + self.b(x.relu_())

    model, x = InPlace(), torch.randn(24, 4)
    task = Random("a", fb.Checkpoint.of(model.state_dict()))
    task.inputs = x
    grams = gram_matrices(model, task, task.batches("calibration", 24), linear_layers(model))
    torch.testing.assert_close(grams["a.weight"], x.T @ x / 24)
    torch.testing.assert_close(grams["b.weight"], x.relu().T @ x.relu() / 24)


class Masked(nn.Module):
    """Attends to nothing, but is told what to attend to, as models of texts are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.pooled = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.inner(states) * attention_mask[..., None]
        return self.pooled(states.sum(1) / attention_mask.sum(1, keepdim=True))


@pytest.mark.parametrize("size", [1, 4, 10])
def test_tokens_that_fill_a_batch_up_are_no_rows_so_that_its_size_makes_no_difference(size: int) -> None:
    torch.manual_seed(0)
    texts = [torch.randn(int(length), 4) for length in torch.randint(1, 8, (10,))]

    class Texts(Random):
        def batches(self, split: str, size: int, *, seed: int | None = None) -> Iterator[Any]:
            for some in (texts[i : i + size] for i in range(0, len(texts), size)):
                mask = nn.utils.rnn.pad_sequence([torch.ones(len(text)) for text in some], True)
                states = nn.utils.rnn.pad_sequence(some, True, padding_value=9.0)
                yield {"states": states, "attention_mask": mask.long()}, torch.zeros(len(some))

        def predict(self, model: nn.Module, inputs: Any) -> torch.Tensor:
            return model(**inputs)

    model = Masked()
    task = Texts("a", fb.Checkpoint.of(model.state_dict()))
    grams = gram_matrices(model, task, task.batches("calibration", size), linear_layers(model))
    x = torch.cat(texts)
    torch.testing.assert_close(grams["inner.weight"], x.T @ x / len(x))
    pooled = torch.stack([model.inner(text).mean(0).detach() for text in texts])
    torch.testing.assert_close(grams["pooled.weight"], pooled.T @ pooled / 10)


def test_a_layer_that_runs_another_number_of_times_for_other_inputs_is_seen_each_time() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = x[:, 0]
            for step in x.unbind(1):
                state = self.cell(state + step)
            return self.out(state)

    torch.manual_seed(0)
    model, inputs = Cell(), [torch.randn(5, steps, 4) for steps in (3, 7, 1)]
    task = Random("a", fb.Checkpoint.of(model.state_dict()))
    found = gram_matrices(model, task, [(x, torch.zeros(5)) for x in inputs], linear_layers(model))
    seen: list[torch.Tensor] = []
    handle = model.cell.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        for x in inputs:
            model(x)
    handle.remove()
    rows = torch.cat(seen)
    assert len(rows) == 55
    torch.testing.assert_close(found["cell.weight"], rows.T @ rows / 55)


def test_an_output_layer_that_is_the_embedding_is_averaged_also_where_the_file_holds_it_once(tmp_path: Path) -> None:
    """As transformers saves it: without the other name."""
    import tiny_text
    from transformers import T5ForConditionalGeneration

    tiny_text.write_t5_zoo(tmp_path)
    pool, tasks = fb.load_modelpool(str(tmp_path / "pool.yaml")), fb.load_taskpool(str(tmp_path / "tasks.yaml"))
    assert "lm_head.weight" not in pool.reference
    model = pool.build(pool.reference)
    assert isinstance(model, T5ForConditionalGeneration) and "lm_head.weight" not in matrices_of(model)
    mean = torch.stack([model["shared.weight"] for model in pool.values()]).mean(0)
    for method in ("regmean", "regmean_plus_plus"):
        torch.testing.assert_close(getattr(fb.methods, method)(pool, tasks)["shared.weight"], mean)


@pytest.mark.parametrize("method", ["regmean", "regmean_plus_plus"])
@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_numbers_that_are_not_finite_are_refused(method: str, value: float) -> None:
    """With 1e30 the weights are finite, and the Gram matrix of the second layer is not."""
    models = {name: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)) for name in "ab"}
    models["a"][0].weight.data[0, 0] = value
    pool = fb.ModelPool(models, nan="ignore")
    with pytest.raises(fb.InputError, match="NaN, infinite or too large"):
        merged = getattr(fb.methods, method)(pool, random_tasks(pool))
        dict(merged)


def test_statistics_of_another_merge_are_not_taken(tmp_path: Path) -> None:
    """Also where no method is named that made the models."""
    pool = pool_of_layers(lambda: nn.Linear(4, 3))
    first, other = (pool.map(lambda p, sign=sign: sign * p.models[0]) for sign in (1, -2))
    for merged, fails in ((first, False), (first, False), (other, True)):
        merges = fb.ModelPool({"m0": merged}, architecture=pool.architecture)
        tasks = random_tasks(pool)
        try:
            dict(fb.methods.regmean(merges, tasks, statistics=str(tmp_path / "grams")))
        except fb.InputError as error:
            assert fails and "another model" in str(error)
        else:
            assert not fails


def test_statistics_go_by_what_a_model_is_and_computes_and_not_by_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)) for _ in "ab"]
    for name, model in zip("ab", layers, strict=True):
        fb.save(fb.Checkpoint.of(model.state_dict()), tmp_path / name)
    monkeypatch.chdir(tmp_path)

    def merged(paths: list[str], activation: nn.Module) -> dict[str, torch.Tensor]:
        template = Template(nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 3)))
        pool = fb.ModelPool(dict(zip("ab", paths, strict=True)), architecture=template)
        return dict(fb.methods.regmean(pool, random_tasks(pool), statistics="grams"))

    first = merged(["a", "b"], nn.ReLU())
    again = merged([str(tmp_path / "a"), "./b"], nn.ReLU())
    assert all(first[name].equal(again[name]) for name in first)
    with pytest.raises(fb.InputError, match="of another model"):
        merged(["a", "b"], nn.Tanh())
    edited = fb.Checkpoint.open("a").beside(tmp_path / "a")
    assert edited.identity() == fb.Checkpoint.open("./a").identity()


def test_matrices_that_do_not_fit_are_computed_for_some_layers_at_a_time(tmp_path: Path) -> None:
    """Also where the order of the file is not that of the layers: 10 before 2."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(12)])
            self.norm, self.unused = nn.LayerNorm(6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(self.norm(x)).tanh()
            return x

    made = pool_of_layers(Deep)
    for name, model in made.items():
        save_file(dict(model), tmp_path / f"{name}.safetensors")
    pool = fb.ModelPool({name: tmp_path / f"{name}.safetensors" for name in made}, architecture=made.architecture)
    shape = {"of": (24, 6)}
    tasks = random_tasks(pool)
    for task in tasks.values():
        task.inputs = torch.randn(shape["of"])
    whole = dict(fb.methods.regmean(pool, tasks))
    one = 4 * 6 * 6
    for room, groups in ((len(pool) * 3 * one, 5), (1, 13), (len(pool) * 13 * one, 0)):
        some = fb.ModelPool(dict(pool.items()), architecture=pool.architecture, memory=room)
        passes = 0

        def count(*args, counted=tasks.calibration_batches, **given):
            nonlocal passes
            passes += 1
            return counted(*args, **given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tasks, "calibration_batches", count)
            found = dict(fb.methods.regmean(some, tasks))
        assert all(found[name].equal(whole[name]) for name in whole)
        assert passes == len(pool) * (groups or 1)
