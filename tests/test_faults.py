"""Kills, full disks, read errors, files that are changed or damaged: each is really done, to the command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from conftest import MODELS
from safetensors.torch import load_file, save_file

import fusionbench as fb
from fusionbench.cli import main

FAULTS = Path(__file__).parent / "faults"
COUNT = "1000000 1 EIO"  # never comes: calls are counted only


@dataclass
class Ran:
    status: int
    out: str
    err: str
    calls: int = 0  # of the injected kind

    @property
    def lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if "The compiled core is missing" not in line]

    def told(self, *words: str, status: int = 2) -> None:
        """It ended with this status and one line, which has these words."""
        assert self.status == status and len(self.lines) == 1, (self.status, self.err)
        assert all(word in self.lines[0] for word in words), self.lines[0]

    def went_well(self) -> None:
        assert self.status == 0 and self.lines == [], (self.status, self.err)


class Forks:
    """Runs of the command line that may have a fault injected: "KIND PART NTH COUNT FAULT", see faults/inject.c."""

    def __init__(self, library: Path) -> None:
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        words = [sys.executable, str(FAULTS / "server.py")]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, words: list[str], inject: str | None = None) -> Ran:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"words": words, "inject": inject}) + "\n")
        self.process.stdin.flush()
        return Ran(**json.loads(self.process.stdout.readline()))


def write_model(folder: Path, seed: int, *, big: int = 1, tiny: int = 4, shards: int = 2) -> str:
    """A model with tensors of several blocks, small and empty ones, and integers, in shards; and its other files."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = (torch.float16, torch.float32, torch.bfloat16)
    tensors = {f"big{i}.weight": torch.randn(599 + i, 601, generator=generator).to(dtypes[i % 3]) for i in range(big)}
    tensors |= {f"layers.{i}.bias": torch.randn(7 + i % 5, generator=generator) for i in range(tiny)}
    tensors |= {"steps": torch.tensor(seed), "nothing": torch.empty(0, 3)}
    folder.mkdir(parents=True)
    files = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"num_hidden_layers": 4}')
    (folder / "tokenizer.json").write_text(json.dumps(list(range(2000))))
    return str(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def finished(disk: Path) -> int:
    """How many tensors the journal says are done."""
    try:
        return max((disk / ".out.partial" / "journal").read_bytes().count(b"\n") - 1, 0)
    except FileNotFoundError:
        return 0


def empty(disk: Path) -> None:
    for path in disk.iterdir():
        shutil.rmtree(path)


def flip(file: Path, at: int = -1) -> None:
    """Change one bit."""
    content = bytearray(file.read_bytes())
    content[at] ^= 16
    file.write_bytes(content)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiled = tmp_path_factory.mktemp("faults") / "inject.so"
    try:
        words = ["cc", "-shared", "-fPIC", "-O1", "-o", str(compiled), str(FAULTS / "inject.c"), "-ldl"]
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"faults cannot be injected here, for want of a C compiler and glibc: {error}")
    return compiled


@pytest.fixture(scope="module")
def forks(library: Path) -> Iterator[Forks]:
    started = Forks(library)
    yield started
    assert started.process.stdin is not None and started.process.stdout is not None
    started.process.stdin.close()
    started.process.wait()
    started.process.stdout.close()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / f"m{seed}", seed) for seed in range(3)]


@pytest.fixture(scope="module")
def undisturbed(originals: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What `words` writes."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(words(originals, out)) == 0
    return contents(out)


@pytest.fixture
def models(originals: list[str], tmp_path: Path) -> list[str]:
    """Copies, to be damaged."""
    return [str(shutil.copytree(model, tmp_path / Path(model).name)) for model in originals]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def words(models: list[str], out: Path, method: str = "task_arithmetic", *more: str) -> list[str]:
    """One worker, so that what comes after what is always the same; an output of three shards."""
    return ["merge", method, *models, *more, "-o", str(out), "--workers", "1", "--shard-size", "600KB"]


def started(words: list[str], library: Path | None = None, inject: str = "") -> subprocess.Popen[str]:
    faulty = {"LD_PRELOAD": str(library), "INJECT": inject} if library else {}
    return subprocess.Popen(
        [sys.executable, "-m", "fusionbench.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **faulty},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
    )


def stopped(words: list[str], library: Path, inject: str) -> subprocess.Popen[str]:
    """A process that stands still before the call that `inject` names."""
    process = started(words, library, f"{inject} 1 STOP")
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), process.communicate()
    return process


def gone_on(process: subprocess.Popen[str]) -> Ran:
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate()
    return Ran(process.returncode, out, err)


# Kills


def test_a_merge_that_is_killed_again_and_again_ends_with_the_bytes_of_one_that_was_not(
    tmp_path: Path, disk: Path
) -> None:
    large = [write_model(tmp_path / f"m{seed}", seed, big=6, tiny=600, shards=3) for seed in range(3)]
    more = ("trim=tensor", "--shard-size", "3MB")
    begun = time.perf_counter()
    once = started(["merge", "ties_merging", *large, *more, "-o", str(tmp_path / "once")])
    assert once.communicate() and once.returncode == 0
    usual = time.perf_counter() - begun
    random, kills, resumed = Random(0), 0, 0
    for _ in range(30):
        before = finished(disk)
        resumed += before > 0
        process = started(["merge", "ties_merging", *large, *more, "-o", str(disk / "out")])
        if kills < 6:
            until, wanted = time.perf_counter() + usual, before + random.randint(1, 150)
            if random.random() < 0.3:  # at any time, not in the middle of its work
                until, wanted = time.perf_counter() + random.uniform(0, usual), 10**6
            while process.poll() is None and finished(disk) < wanted and time.perf_counter() < until:
                time.sleep(0.001)
            process.kill()
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err
        kills += process.returncode != 0
        if not (disk / "out").exists():
            assert process.returncode and names(disk) in ([], [".out.partial"])
            continue
        assert names(disk) == ["out"]
        assert contents(disk / "out") == contents(tmp_path / "once")
        if kills >= 4 and resumed >= 2:
            return
        empty(disk)  # it was too fast to be killed: once more
    pytest.fail(f"of 30 runs only {kills} could be killed")


@pytest.mark.parametrize("fault", ["KILL", "TEAR"])
def test_a_kill_at_any_change_of_the_disk_is_made_good_by_the_same_command(
    forks: Forks, originals: list[str], undisturbed: dict[str, bytes], disk: Path, fault: str
) -> None:
    command = words(originals, disk / "out")
    changes = forks(command, f"change /disk/ {COUNT}").calls
    moments = range(1, changes + 1) if fault == "KILL" else Random(0).sample(range(1, changes + 1), 15)
    for n in moments:
        empty(disk)
        killed = forks(command, f"change /disk/ {n} 1 {fault}")
        assert killed.status in (-signal.SIGKILL, 0 if fault == "TEAR" else -signal.SIGKILL)  # not all can be torn
        if killed.status:
            assert not (disk / "out").exists(), n
            forks(command).went_well()
        assert names(disk) == ["out"], n
        assert contents(disk / "out") == undisturbed, n


def test_a_kill_while_a_folder_is_replaced_loses_neither_the_old_nor_the_new(
    forks: Forks, originals: list[str], undisturbed: dict[str, bytes], disk: Path
) -> None:
    command = words(originals, disk / "out", "task_arithmetic", "--overwrite")
    changes = forks(command, f"change /disk/ {COUNT}").calls
    for n in range(changes - 3, changes + 8):  # the last are of the folder that was there
        empty(disk)
        (disk / "out").mkdir()
        (disk / "out" / "adapter_config.json").write_text("mine")
        killed = forks(command, f"change /disk/ {n} 1 KILL")
        old = [disk / name / "adapter_config.json" for name in ("out", ".out.old")]
        if killed.status:
            complete = [disk / name for name in ("out", ".out.partial") if (disk / name / "manifest.json").exists()]
            assert complete and (any(file.exists() for file in old) or contents(disk / "out") == undisturbed), n
            forks(command).went_well()
        assert names(disk) == ["out"] and contents(disk / "out") == undisturbed, n
    assert killed.status == 0  # it was not too few


def test_an_interrupted_merge_says_so_and_goes_on(
    forks: Forks, library: Path, originals: list[str], undisturbed: dict[str, bytes], disk: Path
) -> None:
    command = words(originals, disk / "out")
    process = stopped(command, library, "write partial/journal 4")
    process.send_signal(signal.SIGINT)
    gone_on(process).told("interrupted; run the same command to resume.", status=130)
    assert names(disk) == [".out.partial"] and finished(disk) >= 2
    forks(command).went_well()
    assert names(disk) == ["out"] and contents(disk / "out") == undisturbed


# Errors of the disk


def test_every_failing_write_is_one_line_and_the_same_command_goes_on(
    forks: Forks, originals: list[str], undisturbed: dict[str, bytes], disk: Path
) -> None:
    command = words(originals, disk / "out")
    changes = forks(command, f"change /disk/ {COUNT}").calls
    for fault in ("EIO", "ENOSPC"):
        failed = 0
        for n in Random(fault).sample(range(1, changes + 1), 14):
            empty(disk)
            ran = forks(command, f"change /disk/ {n} 1 {fault}")
            if ran.status:
                failed += 1
                ran.told(*([str(disk)] if fault == "EIO" else []))
                assert not (disk / "out").exists(), n
                forks(command).went_well()
            assert names(disk) == ["out"] and contents(disk / "out") == undisturbed, n
        assert failed > 8


def test_every_failing_read_of_an_input_is_one_line_with_its_name_and_the_same_command_goes_on(
    forks: Forks, originals: list[str], undisturbed: dict[str, bytes], disk: Path
) -> None:
    command = words(originals, disk / "out")
    reads = forks(command, f"read /m0/ {COUNT}").calls
    failed = kept = 0
    for n in Random(0).sample(range(1, reads + 1), 14):
        empty(disk)
        ran = forks(command, f"read /m0/ {n} 1 EIO")
        if ran.status:  # what is only looked for at the end of a file may fail
            failed += 1
            ran.told("/m0/", "Input/output error")
            assert not (disk / "out").exists()
            kept += finished(disk) > 0
            forks(command).went_well()
        assert names(disk) == ["out"] and contents(disk / "out") == undisturbed, n
    assert failed > 8 and kept > 2


@pytest.mark.parametrize(
    "inject",
    [
        "read - 1 0 SHORT",
        "write - 1 0 SHORT",
        *(f"{kind} {part} {n} 3 EINTR" for kind, part in (("read", "/m1/"), ("write", "/disk/")) for n in (1, 4, 9)),
    ],
)
def test_short_and_interrupted_calls_change_nothing(
    forks: Forks, originals: list[str], undisturbed: dict[str, bytes], disk: Path, inject: str
) -> None:
    forks(words(originals, disk / "out"), inject).went_well()
    assert names(disk) == ["out"] and contents(disk / "out") == undisturbed


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"]
)
def test_a_file_that_cannot_be_read_at_all_is_named(forks: Forks, originals: list[str], disk: Path, name: str) -> None:
    forks(words(originals, disk / "out"), f"read m0/{name} 1 0 EIO").told(name, "Input/output error")
    assert not (disk / "out").exists()


# Full disks


@pytest.fixture
def small_disk(disk: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, free: int = 0) -> None:
    """Leave so many bytes."""
    state = os.statvfs(disk)
    (disk / "mine").write_bytes(bytes(state.f_bavail * state.f_frsize - free))


def test_a_disk_that_is_too_small_is_one_line_before_anything_is_computed(
    forks: Forks, originals: list[str], small_disk: Path
) -> None:
    fill(small_disk, 500_000)
    ran = forks(words(originals, small_disk / "out"), f"read m1/model-00002 {COUNT}")
    ran.told("The disk is full: the merged model needs 7", "bytes")
    assert names(small_disk) == ["mine"]


def test_a_disk_that_fills_up_meanwhile_has_room_set_aside_for_all_tensors(
    forks: Forks, library: Path, originals: list[str], undisturbed: dict[str, bytes], small_disk: Path
) -> None:
    command = words(originals, small_disk / "out")
    process = stopped(command, library, "write partial/journal 2")
    fill(small_disk)
    gone_on(process).told("No space left on device", "kept for the same command")
    assert finished(small_disk) == 7  # the journal had a page to itself; room for the new recipe was what lacked
    (small_disk / "mine").unlink()
    ran = forks(command, f"read m1/model-00002 {COUNT}")
    ran.went_well()
    assert names(small_disk) == ["out"] and contents(small_disk / "out") == undisturbed


def test_a_disk_that_fills_up_where_no_room_can_be_set_aside_is_one_line_and_the_same_command_goes_on(
    forks: Forks, originals: list[str], undisturbed: dict[str, bytes], small_disk: Path
) -> None:
    command = words(originals, small_disk / "out")
    fill(small_disk, 660_000)  # less than the weights, but for one block
    forks(command, "allocate - 1 0 UNSUPPORTED").told(str(small_disk / "out"), "No space left on device")
    (small_disk / "mine").unlink()
    forks(command, "allocate - 1 0 UNSUPPORTED").went_well()
    assert names(small_disk) == ["out"] and contents(small_disk / "out") == undisturbed


# Inputs that change


def damaged(file: Path, how: str) -> None:
    if how == "a bit":
        flip(file)
    elif how == "truncated":
        os.truncate(file, file.stat().st_size - 100)
    elif how == "replaced":
        shutil.copy(file, file.with_name("other"))
        file.with_name("other").rename(file)
    elif how == "removed":
        file.unlink()


@pytest.mark.parametrize("how", ["a bit", "truncated", "replaced", "removed"])
@pytest.mark.parametrize(
    ("method", "moment"),
    [("task_arithmetic", "write partial/journal 2"), ("ties_merging", "read m2/model-00001 4")],
)
def test_an_input_that_is_changed_while_it_is_read_is_one_line_and_nothing_is_written(
    library: Path, models: list[str], disk: Path, how: str, method: str, moment: str
) -> None:
    process = stopped(words(models, disk / "out", method), library, moment)
    damaged(Path(models[1]) / "model-00001-of-00002.safetensors", how)
    gone_on(process).told(models[1], "No such file" if how == "removed" else "was changed or truncated")
    assert not (disk / "out").exists()


def test_an_input_that_is_changed_when_all_of_it_was_read_is_told_too(
    library: Path, models: list[str], disk: Path
) -> None:
    process = stopped(words(models, disk / "out"), library, "write .manifest.json 2")
    flip(Path(models[1]) / "model-00001-of-00002.safetensors")
    gone_on(process).told("A model was changed while it was read")
    assert names(disk) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: os.truncate(file, file.stat().st_size - 1), "truncated"),
        (lambda file: os.truncate(file, 20), "truncated"),
        (lambda file: os.truncate(file, 0), "is empty"),
        (lambda file: flip(file, 7), "truncated"),
        (lambda file: flip(file, 8), "not a safetensors file"),
        (lambda file: file.write_bytes(os.urandom(5000)), "truncated"),
        (lambda file: file.unlink(), "does not exist"),
    ],
)
def test_a_damaged_input_is_one_line_and_nothing_is_written(
    models: list[str], disk: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], message: str
) -> None:
    change(Path(models[1]) / "model-00002-of-00002.safetensors")
    assert main(words(models, disk / "out")) == 2
    ran = Ran(2, *capsys.readouterr())
    ran.told(models[1], "model-00002-of-00002.safetensors", message)
    assert names(disk) == []


def test_an_input_that_is_another_than_before_the_kill_is_merged_anew(
    forks: Forks, models: list[str], disk: Path, tmp_path: Path
) -> None:
    command = words(models, disk / "out")
    assert forks(command, "write partial/journal 6 1 KILL").status == -signal.SIGKILL
    assert finished(disk) == 4
    flip(Path(models[1]) / "model-00001-of-00002.safetensors")
    forks(command).told("it begins anew", status=0)
    forks(words(models, tmp_path / "once")).went_well()
    assert names(disk) == ["out"] and contents(disk / "out") == contents(tmp_path / "once")


def test_another_setting_than_before_the_kill_is_merged_anew(
    forks: Forks, originals: list[str], undisturbed: dict[str, bytes], disk: Path
) -> None:
    other = words(originals, disk / "out", "task_arithmetic", "scaling_factor=2")
    assert forks(other, "write partial/journal 6 1 KILL").status == -signal.SIGKILL
    forks(words(originals, disk / "out")).told("it begins anew", status=0)
    assert names(disk) == ["out"] and contents(disk / "out") == undisturbed


# What was left of a run


def killed(forks: Forks, originals: list[str], disk: Path) -> list[str]:
    """A command that was killed when four of seven tensors were done, three of them with something in them."""
    command = words(originals, disk / "out")
    assert forks(command, "write partial/journal 6 1 KILL").status == -signal.SIGKILL
    assert finished(disk) == 4
    return command


def test_what_is_done_is_not_done_again(
    forks: Forks, originals: list[str], undisturbed: dict[str, bytes], disk: Path
) -> None:
    writes = forks(words(originals, disk / "out"), f"write .safetensors {COUNT}").calls
    empty(disk)
    ran = forks(killed(forks, originals, disk), f"write .safetensors {COUNT}")
    ran.went_well()
    assert ran.calls <= writes - 3
    assert names(disk) == ["out"] and contents(disk / "out") == undisturbed


def test_a_finished_tensor_that_was_damaged_meanwhile_is_computed_again(
    forks: Forks, originals: list[str], undisturbed: dict[str, bytes], disk: Path
) -> None:
    command = killed(forks, originals, disk)
    file = disk / ".out.partial" / "model-00002-of-00003.safetensors"
    written = np.frombuffer(file.read_bytes(), np.uint8)
    right = np.flatnonzero((written == np.frombuffer(undisturbed[file.name], np.uint8)) & (written != 0))
    for at in (right[len(right) // 2], right[-1]):
        flip(file, int(at))
    forks(command).went_well()
    assert names(disk) == ["out"] and contents(disk / "out") == undisturbed


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:-1] + [lines[-1][:20]],
        lambda lines: lines + [bytes(500)],
        lambda lines: lines + [b"\xff\xfe garbage\n"],
        lambda lines: lines[:2] + [b"\x00\xffgarbage\n"] + lines[2:],
        lambda lines: lines[:2] + [b"[]\n", b'{"name": []}\n'] + lines[2:],
        lambda lines: lines + [b'{"name": [1], "hash": "x"}\n'],
        lambda lines: lines + [b'{"name": "not one of ours", "hash": "' + b"0" * 32 + b'"}\n'],
        lambda lines: lines + [b'{"name": "big0.weight", "hash": "' + b"0" * 32 + b'"}\n'],
        lambda lines: lines + [b'{"name": "steps", "hash": null}\n'],
        lambda lines: lines + [b"[" * 100_000 + b"\n"],
        lambda lines: [b"\n", *lines],
        lambda lines: lines[1:],
        lambda lines: [lines[0].replace(b'"key": "', b'"key": "0'), *lines[1:]],
        lambda lines: [b"{}\n", *lines[1:]],
        lambda lines: [b""],
        lambda lines: [os.urandom(3000)],
        None,
    ],
)
def test_a_journal_that_was_torn_or_damaged_never_leads_to_other_bytes(
    forks: Forks,
    originals: list[str],
    undisturbed: dict[str, bytes],
    disk: Path,
    change: Callable[[list[bytes]], list[bytes]] | None,
) -> None:
    command = killed(forks, originals, disk)
    journal = disk / ".out.partial" / "journal"
    if change is None:
        journal.unlink()
    else:
        journal.write_bytes(b"".join(change(journal.read_bytes().splitlines(keepends=True))))
    ran = forks(command)
    assert ran.status == 0 and len(ran.lines) <= 1, ran.err
    assert names(disk) == ["out"] and contents(disk / "out") == undisturbed


@pytest.mark.parametrize("size", [0, 1000, 2_000_000])
def test_a_partial_file_of_another_size_is_written_anew(
    forks: Forks, originals: list[str], undisturbed: dict[str, bytes], disk: Path, size: int
) -> None:
    command = killed(forks, originals, disk)
    os.truncate(disk / ".out.partial" / "model-00002-of-00003.safetensors", size)
    forks(command).went_well()
    assert names(disk) == ["out"] and contents(disk / "out") == undisturbed


@pytest.mark.parametrize("moment", ["in the middle", "before it has its name"])
def test_a_second_process_is_told_in_one_line_that_the_folder_is_being_written(
    forks: Forks, library: Path, originals: list[str], undisturbed: dict[str, bytes], disk: Path, moment: str
) -> None:
    command = words(originals, disk / "out")
    changes = forks(command, f"change /disk/ {COUNT}").calls
    empty(disk)
    first = stopped(
        command, library, "write partial/journal 3" if moment == "in the middle" else f"change /disk/ {changes}"
    )
    forks(command).told(f"'{disk / 'out'}' is being written by another process")
    gone_on(first).went_well()
    assert names(disk) == ["out"] and contents(disk / "out") == undisturbed


def test_places_that_are_no_plain_new_folder(
    forks: Forks, originals: list[str], undisturbed: dict[str, bytes], disk: Path, tmp_path: Path
) -> None:
    (disk / "link").symlink_to(tmp_path / "elsewhere")
    forks(words(originals, disk / "link")).went_well()
    assert names(disk) == ["link"] and contents(tmp_path / "elsewhere") == undisturbed
    forks(words(originals, disk / "n" / ".." / "twice" / ".." / "out")).went_well()
    assert contents(disk / "out") == undisturbed
    forks(words(originals, disk / ("n" * 250))).told("cannot be written: File name too long")
    (disk / ".taken.partial").write_text("mine")
    forks(words(originals, disk / "taken")).told("cannot be written: File exists", ".taken.partial")
    assert (disk / ".taken.partial").read_text() == "mine"


# verify


@pytest.fixture
def merged(originals: list[str], disk: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(words(originals, disk / "out")) == 0
    capsys.readouterr()
    return disk / "out"


def verified(capsys: pytest.CaptureFixture[str], *words: str) -> Ran:
    status = main(["verify", *words])
    return Ran(status, *capsys.readouterr())


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(file)), file)


def test_an_untouched_folder_passes(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (([], "written."), (["--inputs"], "and the recipe gives 7 of them again.")):
        ran = verified(capsys, str(merged), *words)
        ran.went_well()
        assert ran.out.count("\n") == 1 and message in ran.out and "7 tensors" in ran.out


def test_a_flipped_bit_anywhere_in_the_weights_is_found(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the data, and in the header: a dtype, a shape, a name, an alias."""
    for file in sorted(merged.glob("*.safetensors")):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        random = Random(file.name)
        data = [start, len(content) - 1, *(random.randrange(start, len(content)) for _ in range(10))]
        header = [
            content.index(b'"F') + 1,
            content.index(b'"shape"') + 9,
            *(random.randrange(start) for _ in range(20)),
        ]
        for at in (*data, *header):
            flip(file, at)
            ran = verified(capsys, str(merged))
            assert ran.status == 1 if at in data else ran.status in (1, 2)
            lines = ran.out.splitlines() + ran.lines
            assert len(lines) == 1 or at in header
            assert "is not as it was written" in lines[0] if at in data else lines
            file.write_bytes(content)
    verified(capsys, str(merged)).went_well()


def test_other_dtypes_for_the_same_bytes_are_found(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = next(file for file in merged.glob("*.safetensors") if b'"F16"' in file.read_bytes())
    file.write_bytes(file.read_bytes().replace(b'"F16"', b'"I16"', 1))
    ran = verified(capsys, str(merged))
    assert ran.status == 1 and ran.out == f"'{file.name}' has not the header that was written.\n"


def test_missing_and_further_tensors_are_named_in_a_line_each(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**{name: tensors[name] for name in tensors if name != "layers.0.bias"}, "new": torch.ones(2)}

    index = merged / "model.safetensors.index.json"
    file = merged / json.loads(index.read_text())["weight_map"]["layers.0.bias"]
    rewrite(file, change)
    ran = verified(capsys, str(merged))
    assert ran.status == 2 and "does not hold 'layers.0.bias'" in ran.lines[0]  # the index says it does
    index.write_text(index.read_text().replace("layers.0.bias", "new"))
    ran = verified(capsys, str(merged))
    assert ran.status == 1
    assert ran.out.splitlines() == ["'layers.0.bias' is missing.", "'new' is not in the manifest."]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: os.truncate(folder / "model-00002-of-00003.safetensors", 900), "truncated"),
        (lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(), "does not exist, but"),
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "is not a JSON object"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "is no manifest"),
        (lambda folder: (folder / "manifest.json").write_text('{"tensors": [], "headers": {}}'), "is no manifest"),
        (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "not valid JSON"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "not valid JSON"),
    ],
)
def test_a_folder_that_cannot_be_checked_is_told_in_one_line(
    merged: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], message: str
) -> None:
    change(merged)
    verified(capsys, str(merged)).told(message)


def test_a_model_that_is_another_now_does_not_give_what_was_written(
    models: list[str], disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(models, disk / "out", "ties_merging")) == 0
    rewrite(Path(models[2]) / "model-00001-of-00002.safetensors", lambda old: {n: t + 1 for n, t in old.items()})
    capsys.readouterr()
    verified(capsys, str(disk / "out")).went_well()
    ran = verified(capsys, str(disk / "out"), "--inputs")
    assert ran.status == 1
    assert all("is not what the recipe gives now" in line for line in ran.out.splitlines())
    shutil.rmtree(models[2])
    verified(capsys, str(disk / "out"), "--inputs").told(models[2], "does not exist")


@pytest.mark.parametrize(
    ("method", "given"), [("simple_average", []), ("pretrained", []), ("depth_upscaling", ["layers=0:3+1:4"])]
)
def test_what_other_methods_gave_is_computed_again(
    originals: list[str], disk: Path, capsys: pytest.CaptureFixture[str], method: str, given: list[str]
) -> None:
    models = originals[:1] if method == "depth_upscaling" else originals
    assert main(words(models, disk / "out", method, *given)) == 0
    ran = verified(capsys, str(disk / "out"), "--inputs")
    assert ran.status == 0 and "of them again" in ran.out, ran


def test_what_holds_nan_is_computed_again_as_it_was(
    models: list[str], disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(
        Path(models[1]) / "model-00002-of-00002.safetensors",
        lambda old: {n: t * float("nan") if t.is_floating_point() else t for n, t in old.items()},
    )
    assert main(words(models, disk / "out", "task_arithmetic", "--nan", "ignore")) == 0
    capsys.readouterr()
    verified(capsys, str(disk / "out"), "--inputs").went_well()


def test_models_that_were_in_memory_only_cannot_be_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = fb.ModelPool({"a": {"w": torch.ones(3)}, "b": {"w": torch.zeros(3)}})
    fb.save(fb.algorithm("simple_average").run(pool), tmp_path / "out")
    verified(capsys, str(tmp_path / "out")).went_well()
    verified(capsys, str(tmp_path / "out"), "--inputs").told("in memory only: it cannot be read again")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ('{"method": "fisher_merging", "hyperparameters": {}, "inputs": {"a": {}}}', "looked at data: it is not run"),
        ('{"method": "nonsense", "hyperparameters": {}, "inputs": {"a": {}}}', "No method is called 'nonsense'"),
        ('{"method": "simple_average", "hyperparameters": {"name": 1}, "inputs": {"a": {"location": "M"}}}', "'name'"),
        ('{"method": "individual", "hyperparameters": {}, "inputs": {"a": {"location": "M"}}}', "gives no checkpoint"),
        ('{"method": "simple_average", "hyperparameters": {}, "inputs": {}}', "The recipe has neither"),
        ('{"method": [], "hyperparameters": {}, "inputs": {"a": {}}}', "The recipe has neither"),
        ('{"method": "simple_average", "hyperparameters": {}, "inputs": {"a": 1}}', "The recipe has neither"),
        ('{"location": []}', "The recipe has neither"),
        (
            '{"vocabulary": {"how": "pad", "base": null}, "inputs": {}, "model": "a"}',
            "but not how, or not those models",
        ),
        (
            '{"vocabulary": {"how": "pad", "base": "b"}, "inputs": {"a": {"location": "M"}}, "model": "a"}',
            "names the base 'b', which is none of its models",
        ),
        ("{}", "The recipe has neither"),
        ("[]", "is not a JSON object"),
        ("nonsense", "not valid JSON"),
        ('{"inputs":' * 50_000, "not valid JSON"),
        (None, "has no recipe.json"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_one_line(
    merged: Path, originals: list[str], capsys: pytest.CaptureFixture[str], recipe: str | None, message: str
) -> None:
    (merged / "recipe.json").unlink()
    if recipe is not None:
        (merged / "recipe.json").write_text(recipe.replace('"M"', json.dumps(originals[0])))
    verified(capsys, str(merged), "--inputs").told(message)


def test_a_model_called_base_is_no_base_in_the_recipe(
    originals: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(originals[0], tmp_path / "base")
    shutil.copytree(originals[1], tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "weighted_average", "base", "other", "-o", "out", "weights=[0.3,0.7]"]) == 0
    capsys.readouterr()
    verified(capsys, "out", "--inputs").went_well()


def test_models_stay_in_the_order_in_which_weights_are_given(
    originals: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for original, name in zip(originals, ("b", "a"), strict=False):
        shutil.copytree(original, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "weighted_average", "b", "a", "-o", "out", "weights=[0.9,0.1]"]) == 0
    capsys.readouterr()
    verified(capsys, "out", "--inputs").went_well()


def test_a_recipe_in_recipes_without_end_is_one_line(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = '{"method": "simple_average", "hyperparameters": {}, "inputs": {"a": '
    (merged / "recipe.json").write_text(recipe * 450 + '{"location": ""}' + "}}" * 450)
    ran = verified(capsys, str(merged), "--inputs")
    assert ran.status == 2 and len(ran.lines) == 1, ran.err


# Without torch

BLOCKED = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from fusionbench.cli import main
for words in json.load(sys.stdin):
    if main(words) != 0:
        sys.exit(f"{words} failed")
"""
GIVEN = {
    "weighted_average": ["weights=[1,2,3]"],
    "ties_merging": ["trim=tensor"],
    "depth_upscaling": ["layers=0:3+1:4"],
}


def test_merge_diff_and_verify_work_where_torch_is_not_installed(originals: list[str], tmp_path: Path) -> None:
    """Every method that looks at weights alone, in one process."""
    own = [m for m in fb.list_methods() if m.function.__module__.startswith("fusionbench.")]  # others are other tests'
    names = [m.name for m in own if m.kind == "merging" and m.data == "none"]
    names = [name for name in [*names, "pretrained", "depth_upscaling"] if name != "apply_coefficients"]
    assert len(names) >= 21
    merges: list[tuple[str, list[str], list[str]]] = [("ties_merging", originals, [])]
    for name in names:
        count = 1 if name == "depth_upscaling" else MODELS.get(name, 3) + fb.get_method(name).base
        merges.append((name, originals[:count], GIVEN.get(name, [])))
    commands = []
    for i, (name, models, given) in enumerate(merges):
        out = tmp_path / str(i)
        commands += [words(models, out, name, *given), ["verify", str(out), "--inputs"], ["diff", models[0], str(out)]]
    ran = subprocess.run([sys.executable, "-c", BLOCKED], input=json.dumps(commands), capture_output=True, text=True)
    Ran(ran.returncode, ran.stdout, ran.stderr).went_well()
    for i, (name, models, given) in enumerate(merges):
        assert main(words(models, tmp_path / "again" / str(i), name, *given)) == 0
        assert contents(tmp_path / str(i)) == contents(tmp_path / "again" / str(i)), name


@pytest.mark.slow
def test_a_plain_installation_merges_without_torch(originals: list[str], tmp_path: Path) -> None:
    """`pip install .`, with nothing but what the project itself requires; prints how large the environment is."""
    root, environment = Path(__file__).parents[1], tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    source = shutil.copytree(
        root, tmp_path / "source", ignore=lambda folder, names: {n for n in names if n.startswith((".", "_core."))}
    )
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [str(environment / "bin" / "pip"), "install", "-q", "--disable-pip-version-check", str(source)]
    subprocess.run(pip, check=True, env=plain)

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        words = [str(environment / "bin" / command[0]), *command[1:]]
        return subprocess.run(words, capture_output=True, text=True, env=plain, cwd=tmp_path)

    missing = (
        "import sys; from importlib.util import find_spec as find; import fusionbench; print(fusionbench.__file__);"
    )
    missing += "sys.exit(any(find(name) for name in ('torch', 'transformers', 'safetensors')))"
    imported = run("python", "-c", missing)
    assert imported.returncode == 0 and imported.stdout.startswith(str(environment)), (imported.stdout, imported.stderr)
    out = tmp_path / "out"
    for command in (words(originals, out, "ties_merging"), ["verify", str(out), "--inputs"], ["diff", *originals[:2]]):
        ran = run("fusionbench", *command)
        assert ran.returncode == 0, ran.stderr
    assert main(words(originals, tmp_path / "again", "ties_merging")) == 0
    assert contents(out) == contents(tmp_path / "again")
    files = [file for file in environment.rglob("*") if file.is_file() and not file.is_symlink()]
    installers = ("pip", "setuptools", "pkg_resources", "_distutils_hack")  # a venv's own
    own = [file for file in files if not any(p.startswith(installers) for p in file.relative_to(environment).parts)]
    print(f"{len(own)} files, {sum(file.stat().st_size for file in own) / 1e6:.1f} MB without pip and setuptools")


def test_merge_and_verify_do_not_import_torch_where_it_is_installed(originals: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from fusionbench.cli import main; assert main(sys.argv[2:]) == 0;"
        "assert main(['verify', sys.argv[1], '--inputs']) == 0;"
        "print([name for name in ('torch', 'transformers', 'safetensors') if name in sys.modules])"
    )
    command = words(originals, tmp_path / "out", "ties_merging")
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), *command], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines()[-1] == "[]"
