"""The same work over processes, and over a Ray cluster of two nodes: in order, and done again where a worker died."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fusionbench as fb
from fusionbench.executors import EXECUTORS, in_processes


def squared(number: int) -> int:
    return number * number


@pytest.mark.parametrize("count", [0, 1, 7, 100])
@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_results_come_in_order(executor: str, count: int) -> None:
    assert list(EXECUTORS[executor](squared, range(count), 3)) == [n * n for n in range(count)]


def test_what_a_killed_process_had_is_done_again(tmp_path: Path) -> None:
    def work(number: int) -> int:
        if number in (3, 11) and not (tmp_path / str(number)).exists():
            (tmp_path / str(number)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    assert list(in_processes(work, range(20), 2)) == list(range(20))
    assert len(list(tmp_path.iterdir())) == 2


def test_work_that_kills_every_process_is_given_up_in_one_line() -> None:
    def work(number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(fb.InputError, match="died 3 times at the same work: is the memory enough"):
        list(in_processes(work, range(4), 2))


def test_an_error_in_a_process_is_the_error() -> None:
    def work(number: int) -> int:
        if number == 5:
            raise fb.InputError("the sixth is wrong")
        return number

    found = in_processes(work, range(10), 2)
    with pytest.raises(fb.InputError, match="the sixth is wrong"):
        list(found)


def models(folder: Path) -> fb.ModelPool:
    """Two models and their base, in files: a tensor of several blocks, and small ones."""
    numbers = np.random.default_rng(0)
    import torch

    for name in ("base", "a", "b"):
        tensors = {f"t{i}": torch.from_numpy(numbers.normal(size=(i + 1, 5)).astype(np.float32)) for i in range(40)}
        tensors["large"] = torch.from_numpy(numbers.normal(size=600_000).astype(np.float32))
        fb.save(fb.Checkpoint.of(tensors), folder / name)
    return fb.ModelPool({"a": folder / "a", "b": folder / "b"}, base=folder / "base")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_processes_write_the_same_bytes(tmp_path: Path, trim: str) -> None:
    merged = fb.algorithm("ties_merging", trim=trim).run(models(tmp_path))
    for executor in ("threads", "processes"):
        fb.save(merged, tmp_path / executor, executor=executor, shard_size="1MB", workers=2)
    assert contents(tmp_path / "threads") == contents(tmp_path / "processes")


def dying_once(pool: fb.ModelPool, marker: Path) -> fb.Checkpoint:
    """A merge whose worker is killed when it has written twenty tensors and comes to the next; but only once."""

    def median(p: fb.Param):
        if p.name == "t20" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return p.models.median(0).values

    return pool.map(median)


def test_a_process_that_is_killed_in_mid_save_leaves_the_same_bytes(tmp_path: Path) -> None:
    merged = dying_once(models(tmp_path), tmp_path / "died")
    fb.save(merged, tmp_path / "killed", executor="processes", shard_size="1MB", workers=2)
    assert (tmp_path / "died").exists()
    fb.save(merged, tmp_path / "undisturbed", shard_size="1MB")
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_what_a_killed_process_had_half_written_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = fb.algorithm("ties_merging", trim="tensor").run(models(tmp_path))
    fb.save(merged, tmp_path / "undisturbed", shard_size="1MB")
    write = os.pwrite

    def write_or_die(descriptor: int, data: memoryview, offset: int) -> int:
        if len(data) > 2**18 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            write(descriptor, b"?" * (len(data) // 2), offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", write_or_die)
    fb.save(merged, tmp_path / "killed", executor="processes", shard_size="1MB", workers=2)
    assert (tmp_path / "died").exists()
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_long_work_waits_for_no_other(tmp_path: Path) -> None:
    def work(i: int) -> int:
        (tmp_path / str(i)).touch()
        while i == 0 and len(list(tmp_path.iterdir())) < 60:  # the first ends when all others have begun
            time.sleep(0.01)
        return i

    assert list(in_processes(work, range(60), 2, long=True)) == list(range(60))


def test_a_function_on_tensors_runs_in_processes_too(tmp_path: Path) -> None:
    merged = models(tmp_path).map(lambda p: p.task_vectors.median(0).values)
    for executor in ("threads", "processes"):
        fb.save(merged, tmp_path / executor, executor=executor, workers=2)
    assert contents(tmp_path / "threads") == contents(tmp_path / "processes")


def test_an_executor_that_is_none_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(fb.InputError, match="Did you mean 'processes'"):
        fb.save(models(tmp_path)["a"], tmp_path / "out", executor="proceses")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_cluster_of_two_nodes_writes_the_same_bytes_though_a_worker_is_killed(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: make test-slow installs it")
    from ray.cluster_utils import Cluster

    pool = models(tmp_path)
    merged = fb.algorithm("ties_merging", trim="tensor").run(pool)
    fb.save(merged, tmp_path / "threads", shard_size="1MB")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        fb.save(merged, tmp_path / "ray", executor="ray", shard_size="1MB")
        assert contents(tmp_path / "threads") == contents(tmp_path / "ray")

        merged = dying_once(pool, tmp_path / "died in mid-save")
        fb.save(merged, tmp_path / "killed", executor="ray", shard_size="1MB")
        assert (tmp_path / "died in mid-save").exists()
        fb.save(merged, tmp_path / "undisturbed", shard_size="1MB")
        assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")

        def work(number: int) -> int:
            if number == 9 and not (tmp_path / "died").exists():
                (tmp_path / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return number

        assert list(EXECUTORS["ray"](work, range(30), 2)) == list(range(30))
        assert (tmp_path / "died").exists()

        def wrong(number: int) -> int:
            raise fb.InputError("this is wrong")

        with pytest.raises(fb.InputError, match="this is wrong"):
            list(EXECUTORS["ray"](wrong, range(3), 2))
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_the_processes_of_a_killed_parent_end(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from fusionbench.executors import in_processes;"
        "list(in_processes(lambda i: (Path(sys.argv[1], str(os.getpid())).touch(), time.sleep(0.2)), range(1000), 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    children = [Path("/proc", child.name) for child in tmp_path.iterdir()]
    while any(child.exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(children) == 2 and not any(child.exists() for child in children)


@pytest.mark.parametrize("workers", [0, -1])
def test_a_number_of_workers_that_is_none_is_refused_before_anything_is_written(tmp_path: Path, workers: int) -> None:
    with pytest.raises(fb.InputError, match="workers must be a number of threads, 1 or more"):
        fb.save(models(tmp_path)["a"], tmp_path / "out", workers=workers)
    assert not (tmp_path / "out").exists()
