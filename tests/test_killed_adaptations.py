"""An adaptation that is killed goes on where it was, and ends with the bytes of one that was not: of every method."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_tasks
from tiny_clip import write_zoo
from torch import nn

import fusionbench as fb
from fusionbench import adapt
from fusionbench.cli import main

HALF = b"half a state"


def with_mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = {"mlp": nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), "scale": nn.BatchNorm1d(3)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def adapted(method: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of what the method gives: a checkpoint's or a module's."""
    pool = fb.ModelPool({name: with_mlp(i) for i, name in enumerate("abc", 1)}, base=with_mlp(0))
    result = fb.algorithm(method, batch_size=8, **options).run(pool, random_tasks(pool))
    return dict(result.state_dict() if isinstance(result, nn.Module) else result)


def dying(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """From now on the adaptation ends while it writes its `number`th state. Returns the steps of the states."""
    save, steps = torch.save, []

    def save_or_die(state: dict[str, Any], file: Path) -> None:
        steps.append(len(state["entropies"]))
        if len(steps) == number:
            file.write_bytes(HALF)
            raise KeyboardInterrupt
        save(state, file)

    monkeypatch.setattr(torch, "save", save_or_die)
    return steps


CONCRETE = {"mask_steps": 6, "steps": 6, "mask_learning_rate": 0.1, "learning_rate": 0.1, "base_learning_rate": 0.5}
PATIENT = {"steps": 100, "learning_rate": 0.5, "patience": 5}


@pytest.mark.parametrize(
    ("method", "options", "state"),
    [
        ("adamerging", {"steps": 8, "learning_rate": 0.1}, 5),
        ("concrete_task_arithmetic", {"steps": 8, "learning_rate": 0.1}, 5),
        ("concrete_adamerging", CONCRETE, 5),  # while the mask is learned
        ("concrete_adamerging", CONCRETE, 7),  # when it has been
        ("concrete_adamerging", CONCRETE, 12),  # while the coefficients are
        ("we_moe", {"steps": 8, "learning_rate": 0.05}, 5),
        ("adamerging", PATIENT, -3),  # when the lowest entropy has been seen
        ("concrete_adamerging", {**CONCRETE, "mask_steps": 100, "patience": 5}, 12),
    ],
)
def test_it_goes_on_and_ends_with_the_same_bytes(
    method: str, options: dict[str, Any], state: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapt, "SECONDS_BETWEEN_STATES", -1)  # a state after each step
    monkeypatch.setattr(adapt, "WINDOW", 4)  # that patience has an end soon
    with monkeypatch.context() as undisturbed:
        steps = dying(undisturbed, 0)
        wanted = adapted(method, options)
    assert not list(cache.rglob("*.pt"))
    assert (len(steps) < options["steps"] + options.get("mask_steps", 0)) == ("patience" in options)
    state %= len(steps) + 1
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        assert dying(killed, state) == []
        adapted(method, options)
    assert [file.read_bytes() for file in cache.rglob("*.partial")] == [HALF]
    with monkeypatch.context() as again:
        steps_again = dying(again, 0)
        found = adapted(method, options)
    assert list(found) == list(wanted) and all(found[name].equal(wanted[name]) for name in wanted)
    left = steps[state - 1 :]
    assert steps_again[-len(left) :] == left and len(steps_again) <= len(left) + 1  # one of a phase that was done
    assert not list(cache.rglob("*.pt")) and not list(cache.rglob("*.partial"))


KILLED = """
import os, signal, sys
import torch
import fusionbench.adapt
from fusionbench.cli import main

fusionbench.adapt.SECONDS_BETWEEN_STATES = -1
save = torch.save

def save_or_die(state, file):
    save(state, file)
    if len(state["entropies"]) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_or_die
main(sys.argv[1:])
"""


def test_the_same_command_goes_on_after_a_kill(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_zoo(tmp_path)
    words = ["run", "method=concrete_task_arithmetic", "method.steps=10", "method.learning_rate=0.1"]
    words += ["modelpool=pool.yaml", "taskpool=tasks.yaml"]
    ran = subprocess.run([sys.executable, "-c", KILLED, *words, "out=killed"])  # as many threads as here
    assert ran.returncode == -signal.SIGKILL and not Path("killed").exists()
    assert len(list(cache.rglob("*.partial"))) == 1  # the state of the fifth step has not got its name

    steps = dying(monkeypatch, 0)
    monkeypatch.setattr(adapt, "SECONDS_BETWEEN_STATES", -1)
    assert main([*words, "out=killed"]) == 0
    assert steps == [5, 6, 7, 8, 9, 10, 10]
    assert main([*words, "out=undisturbed"]) == 0
    assert steps[7:] == [*range(1, 11), 10]
    for name in ("model.safetensors", "recipe.json"):
        assert Path("killed", name).read_bytes() == Path("undisturbed", name).read_bytes()
