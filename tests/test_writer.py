import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_model
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny_clip import write_zoo
from transformers import LlamaConfig, LlamaForCausalLM

import fusionbench as fb
from fusionbench import writer
from fusionbench.executors import EXECUTORS
from fusionbench.sources import BLOCK
from fusionbench.units import UnitWriter
from fusionbench.verify import remade


@pytest.fixture
def big_pool() -> fb.ModelPool:
    """Tensors of several blocks."""
    torch.manual_seed(0)
    shapes = {"a": (600, 700), "b": (512, 1024), "c": (3,), "d": (300_001,), "n": (0, 2)}
    models = [{name: torch.randn(shape).half() for name, shape in shapes.items()} for _ in range(4)]
    return fb.ModelPool({f"m{i}": model for i, model in enumerate(models[1:])}, base=models[0])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("method", ["simple_average", "task_arithmetic", "ties_merging"])
def test_workers_and_memory_do_not_change_a_byte(big_pool: fb.ModelPool, tmp_path: Path, method: str) -> None:
    merged = getattr(fb.methods, method)(big_pool)
    kept = {name: merged[name] for name in merged}  # computed whole, not in blocks
    for i, (workers, memory) in enumerate([(1, "512MB"), (4, "512MB"), (3, "1MB"), (2, 1000)]):
        fb.save(merged, tmp_path / str(i), workers=workers, memory=memory, shard_size="1MB")
        assert contents(tmp_path / str(i)) == contents(tmp_path / "0")
    opened = fb.Checkpoint.open(tmp_path / "0")
    assert all(opened[name].equal(tensor) for name, tensor in kept.items())


def test_shards_are_as_large_as_asked_and_listed(big_pool: fb.ModelPool, tmp_path: Path) -> None:
    fb.save(big_pool.require_base(), tmp_path / "out", shard_size="1MB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["metadata"]["total_size"] == 2 * (600 * 700 + 512 * 1024 + 3 + 300_001)
    assert set(index["weight_map"]) == set(big_pool.require_base())


def test_data_starts_aligned_and_wide_dtypes_come_first(tmp_path: Path) -> None:
    tensors = {"byte": torch.ones(3, dtype=torch.uint8), "half": torch.ones(3).half(), "wide": torch.ones(2).double()}
    fb.save(fb.Checkpoint.of(tensors), tmp_path / "out")
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_the_recipe_is_beside_the_weights_and_in_them(tmp_path: Path) -> None:
    pool = fb.ModelPool({"a": small_model(1), "b": small_model(2)}, base=small_model(0))
    merged = fb.algorithm("ties_merging", density=0.1).run(pool)
    fb.save(merged, tmp_path / "out")
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["method"] == "ties_merging" and recipe["hyperparameters"]["density"] == 0.1
    assert recipe["fusionbench"] == fb.__version__
    assert recipe["inputs"]["a"]["xxh3"] == pool["a"].digest
    assert list(recipe["inputs"]) == ["base", "a", "b"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["recipe"]) == recipe
    assert metadata["head.weight"] == "embed.weight"


def test_what_a_method_called_by_name_makes_is_computed_again_from_its_recipe(tmp_path: Path) -> None:
    for i, name in enumerate(("base", "a", "b")):
        fb.save(fb.Checkpoint.of(small_model(i).state_dict()), tmp_path / name)
    pool = fb.ModelPool({name: str(tmp_path / name) for name in "ab"}, base=str(tmp_path / "base"))
    out = fb.save(fb.methods.task_arithmetic(pool, scaling_factor=0.5), tmp_path / "out")
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["method"], recipe["hyperparameters"]) == ("task_arithmetic", {"scaling_factor": 0.5})
    assert remade(recipe).digest == fb.Checkpoint.open(out).digest
    with pytest.raises(fb.InputError, match="Did you mean 'scaling_factor'"):
        fb.methods.task_arithmetic(pool, scaling_factr=0.5)


def test_a_merge_of_merges_tells_the_whole_story(tmp_path: Path) -> None:
    pool = fb.ModelPool({"a": small_model(1), "b": small_model(2)}, base=small_model(0))
    inner = fb.algorithm("simple_average").run(pool)
    outer = fb.algorithm("task_arithmetic").run(fb.ModelPool({"inner": inner, "a": pool["a"]}, base=pool.base))
    fb.save(outer, tmp_path / "out")
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["inputs"]["inner"]["method"] == "simple_average"
    assert recipe["inputs"]["inner"]["inputs"]["b"]["xxh3"] == pool["b"].digest


def test_configs_and_tokenizers_come_along_and_old_indices_do_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    fb.save(fb.Checkpoint.of({"w": torch.ones(2), "v": torch.ones(2)}), source, shard_size=8)
    for name in ("config.json", "tokenizer.json", "merges.txt", "notes.md"):
        (source / name).write_text("{}")
    pool = fb.ModelPool({"a": source}, base=source)
    fb.save(fb.methods.simple_average(pool), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "manifest.json",
        "merges.txt",
        "model.safetensors",
        "recipe.json",
        "tokenizer.json",
    ]


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    checkpoint = fb.Checkpoint.of({"w": torch.ones(2)})
    with pytest.raises(fb.InputError, match="not empty: choose another folder, or say overwrite"):
        fb.save(checkpoint, out)
    assert (out / "precious").read_text() == "mine"
    with pytest.raises(fb.InputError, match="holds 'precious', so it is no folder that was written here"):
        fb.save(checkpoint, out, overwrite=True)
    assert (out / "precious").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_a_folder_that_was_written_here_is_overwritten_and_no_input(tmp_path: Path) -> None:
    first, second = (
        fb.save(fb.Checkpoint.of({"w": torch.full((2,), value)}), tmp_path / "models" / name)
        for name, value in (("a", 1.0), ("b", 2.0))
    )
    before = {folder: contents(folder) for folder in (first, second)}
    merged = fb.methods.simple_average(fb.ModelPool({"a": first, "b": second}))
    (tmp_path / "link").symlink_to(first)
    for out in (first, tmp_path / "link"):
        with pytest.raises(fb.InputError, match="holds the model '.*', which is merged: choose another folder"):
            fb.save(merged, out, overwrite=True)
    for name in ("recipe.json", "manifest.json"):
        (tmp_path / "models" / name).write_text("{}")
    with pytest.raises(fb.InputError, match="holds 'a', so it is no folder that was written here"):
        fb.save(merged, tmp_path / "models", overwrite=True)
    assert {folder: contents(folder) for folder in (first, second)} == before
    fb.save(merged, tmp_path / "out")
    fb.save(fb.Checkpoint.of({"w": torch.ones(2)}), tmp_path / "out", overwrite=True)
    assert fb.Checkpoint.open(tmp_path / "out")["w"].tolist() == [1, 1]


@pytest.mark.parametrize("folder", ["", ".", "..", "../../run/here"])
def test_the_folder_one_is_in_is_not_replaced(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "run" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    with pytest.raises(fb.InputError, match="is the folder you are in, or holds it: name another folder"):
        fb.save(fb.Checkpoint.of({"w": torch.ones(2)}), folder, overwrite=True)
    fb.save(fb.Checkpoint.of({"w": torch.ones(2)}), "../there")


@pytest.mark.parametrize("size", ["lots", "", "-1GB", "0", "5 parsecs"])
def test_sizes_that_are_none_are_refused(tmp_path: Path, size: str) -> None:
    with pytest.raises(fb.InputError, match="is not a size"):
        fb.save(fb.Checkpoint.of({"w": torch.ones(2)}), tmp_path / "out", memory=size)
    assert list(tmp_path.iterdir()) == []


def test_sizes() -> None:
    parsed = [writer.parse_bytes(size) for size in ("512MB", "5GB", "1KiB", "2.5k", 77)]
    assert parsed == [512_000_000, 5_000_000_000, 1024, 2500, 77]


def test_a_merge_that_fails_leaves_nothing(tmp_path: Path, big_pool: fb.ModelPool) -> None:
    def fail(p: fb.Param) -> torch.Tensor:
        if p.name == "d":
            raise RuntimeError("a bug in a method")
        return p.base

    with pytest.raises(RuntimeError, match="a bug"):
        fb.save(big_pool.map(fail), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_and_says_so(
    tmp_path: Path, big_pool: fb.ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(fb.InputError, match="The disk is full: the merged model needs"):
        fb.save(big_pool.require_base(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_is_one_line_and_stays_as_it_was(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fusionbench.cli import main

    write_zoo(tmp_path / "zoo")
    words = ["run", "method=simple_average", f"modelpool={tmp_path}/zoo/pool.yaml"]
    assert main([*words, f"out={tmp_path}/merged"]) == 0
    pages = -(-(tmp_path / "merged" / "model.safetensors").stat().st_size // 4096)
    capsys.readouterr()
    for free in (pages - 1, pages):  # full before the weights, and full after them
        (small_disk / "mine").write_bytes(bytes((256 - free) * 4096))
        assert main([*words, f"out={small_disk}/merged"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and ("disk is full" in error or "No space left" in error)
        assert [path.name for path in small_disk.iterdir()] == ["mine"]


KILLED = """
import sys, time, torch, fusionbench as fb
pool = fb.ModelPool({"a": {"w": torch.ones(3_000_000)}}, base={"w": torch.zeros(3_000_000)})
def slow(p):
    print("computing", flush=True)
    time.sleep(0.2)
    return p.base
fb.save(pool.map(slow, elementwise=True), sys.argv[1], workers=1)
"""


def test_a_killed_run_leaves_no_folder_under_the_final_name_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # it is in the middle of its work
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    leftovers = [path.name for path in tmp_path.iterdir()]
    assert len(leftovers) == 1 and leftovers[0].endswith(".partial")
    while Path(f"/proc/{process.pid}").exists():
        time.sleep(0.01)
    fb.save(fb.Checkpoint.of({"w": torch.ones(2)}), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_shrinks_while_it_is_read_stops_the_merge(tmp_path: Path) -> None:
    source = fb.save(fb.Checkpoint.of({"w": torch.ones(1000)}), tmp_path / "source")
    checkpoint = fb.Checkpoint.open(source)
    os.truncate(source / "model.safetensors", 2000)
    with pytest.raises(fb.InputError, match="was changed or truncated"):
        fb.save(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_small_tensors_of_a_file_are_written_by_one_call() -> None:
    shapes = {"a": 10, "b": BLOCK, "c": BLOCK + 1, **{f"small{i}": 3 for i in range(70)}, "other": 5}
    checkpoint = fb.Checkpoint.of({name: torch.zeros(count) for name, count in shapes.items()})
    units_of = UnitWriter(checkpoint, {name: ("1" if name != "other" else "2", 0) for name in shapes}, 10**9)
    units = [(name, *block) for name in shapes for block in checkpoint.blocks(name)]
    groups = list(units_of.together(units))
    assert [unit for group in groups for unit in group] == units
    assert [len(group) for group in groups] == [2, 63, 9, 1]  # both units of c go with 61 small ones


@pytest.mark.parametrize(
    ("count", "size", "workers", "expected"), [(9, 5, None, 1), (9, 5, 3, 3), (2, 2**15, None, None)]
)
def test_one_thread_writes_what_is_small_unless_more_are_asked_for(
    count: int, size: int, workers: int | None, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def threads(function: Callable, items: list, workers: int | None = None) -> Iterator:
        asked.append(workers)
        return map(function, items)

    monkeypatch.setitem(EXECUTORS, "threads", threads)
    fb.save(fb.Checkpoint.of({f"w{i}": torch.zeros(size) for i in range(count)}), tmp_path / "out", workers=workers)
    assert asked == [expected]


PAIRS = ("arcee_fusion", "nearswap", "nuslerp", "slerp")
STATIC = [m for m in fb.list_methods() if m.kind == "merging" and m.data == "none" and m.name != "apply_coefficients"]
PEAK = """
import json, re, sys
from fusionbench.cli import main
peaks = {}
for words in json.load(sys.stdin):
    open("/proc/self/clear_refs", "w").write("5")  # see proc(5): the peak begins anew
    assert main(words) == 0
    peaks[words[1]] = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(json.dumps(peaks))
"""


def test_memory_is_bounded_whatever_the_size_of_a_tensor(tmp_path: Path) -> None:
    """Of tensors of 32 MB and a budget of 16, by every method; Python takes 40, and keeps some between merges."""
    places = []
    for i in range(3):
        tensor = np.random.default_rng(i).standard_normal((8, 1000, 1000), np.float32)
        save_file({"experts": tensor}, tmp_path / f"{i}.safetensors")
        places.append(str(tmp_path / f"{i}.safetensors"))
    commands = []
    for method in STATIC:
        count = {"passthrough": 1}.get(method.name, 2 if method.name in PAIRS else 3)
        words = ["merge", method.name, *places[:count], "-o", str(tmp_path / method.name)]
        commands.append([*words, "--memory", "16MB", "--workers", "2"])
    ran = subprocess.run([sys.executable, "-c", PEAK], input=json.dumps(commands), capture_output=True, text=True)
    assert not ran.returncode, ran.stderr
    peaks = json.loads(ran.stdout.splitlines()[-1])
    assert len(peaks) >= 18 and max(peaks.values()) < 135_000, peaks  # KiB; all that is read is 96,000


UPSCALE = """
import re, sys
import torch
import transformers
import fusionbench as fb
import fusionbench.sparse
folder, out = sys.argv[1:]
transformers.LlamaConfig, transformers.MixtralConfig

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

for method, count, settings in (
    ("moe_upscaling", 1, {"experts": 2}),
    ("moe_merging", 2, {}),
    ("depth_upscaling", 1, {"layers": "0:3+1:4"}),
    ("model_recombination", 2, {}),
):
    pool = fb.ModelPool({name: f"{folder}/{name}" for name in "ab"[:count]}, base=f"{folder}/a" if count > 1 else None)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    made = fb.algorithm(method, **settings).run(pool)
    fb.save(made["a"] if method == "model_recombination" else made, f"{out}/{method}", memory="16MB", workers=2)
    print(method, status("VmHWM") - before)
"""


def test_upscaling_needs_no_model_in_memory(tmp_path: Path) -> None:
    """A Llama of 105 MB, by methods that write models of 105 to 175; what is read stays out of the peak."""
    size = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 1000}
    config = LlamaConfig(**size, num_attention_heads=8, num_key_value_heads=2)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    for seed, name in enumerate("ab"):
        random = np.random.default_rng(seed)
        config.save_pretrained(tmp_path / name)
        tensors = {n: random.standard_normal(shape, np.float32) for n, shape in shapes.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    words = [sys.executable, "-c", UPSCALE, str(tmp_path), str(tmp_path / "out")]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr
    peaks = {line.split()[0]: int(line.split()[1]) for line in ran.stdout.splitlines()}
    assert len(peaks) == 4 and max(peaks.values()) < 60_000, peaks  # KiB
