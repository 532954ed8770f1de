"""Reading past the page cache gives what reading through it gives."""

import os
from pathlib import Path

import pytest
import torch

import fusionbench as fb
from fusionbench import direct, writer
from fusionbench.direct import past_cache


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder on a file system that can be read directly."""
    (tmp_path / "try").write_bytes(bytes(4096))
    try:
        os.close(os.open(tmp_path / "try", os.O_RDONLY | os.O_DIRECT))
    except (AttributeError, OSError) as error:
        pytest.skip(f"the temporary folder's file system has no direct reads: {error}")
    (tmp_path / "try").unlink()
    return tmp_path


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (1, 2), (0, 3_000_001), (1023, 1025), (999_999, 2_500_000), (3_000_000, 3_000_001)]
)
def test_any_part_is_the_same(disk: Path, start: int, stop: int) -> None:
    tensor = torch.arange(3_000_001, dtype=torch.int32)
    checkpoint = fb.Checkpoint.open(fb.save(fb.Checkpoint.of({"odd": torch.ones(3), "w": tensor}), disk / "model"))
    with past_cache(True):
        assert checkpoint.read("w", start, stop).equal(tensor[start:stop])


def test_inputs_larger_than_memory_are_read_directly_and_the_result_is_the_same(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    for name in ("base", "a", "b"):
        fb.save(fb.Checkpoint.of({"w": torch.randn(1000, 700), "b": torch.randn(7)}), disk / name)
    pool = fb.ModelPool({"a": disk / "a", "b": disk / "b"}, base=disk / "base")
    merged = fb.algorithm("ties_merging", trim="tensor").run(pool)
    fb.save(merged, disk / "through")
    reads = []
    read = direct._read_direct
    monkeypatch.setattr(direct, "_read_direct", lambda *given: reads.append(given) or read(*given))
    monkeypatch.setattr(writer, "free_memory", lambda: 1_000_000)
    fb.save(merged, disk / "past")
    assert reads
    for file in (disk / "through").iterdir():
        assert file.read_bytes() == (disk / "past" / file.name).read_bytes()
