import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import fusionbench as fb
from fusionbench.dtypes import as_float64
from fusionbench.formats import DTYPES, SafetensorsFile

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "b.brain": torch.tensor([[3.0]], dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 4),
    "mask": torch.tensor([True, False, True]),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def assert_holds_tensors(checkpoint: fb.Checkpoint) -> None:
    assert sorted(checkpoint) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert checkpoint[name].equal(tensor) and checkpoint[name].dtype == tensor.dtype
        assert checkpoint.specs[name].shape == tuple(tensor.shape)


def test_a_safetensors_file_a_folder_and_a_table_are_the_same(file: Path) -> None:
    by_file, by_folder, by_table = fb.Checkpoint.open(file), fb.Checkpoint.open(file.parent), fb.Checkpoint.of(TENSORS)
    for checkpoint in (by_file, by_folder, by_table):
        assert_holds_tensors(checkpoint)
    assert by_file.digest == by_folder.digest == by_table.digest


def test_blocks_are_parts_of_the_flattened_tensor(file: Path) -> None:
    checkpoint = fb.Checkpoint.open(file)
    assert checkpoint.read("a.weight", 1, 4).tolist() == [1, 2, 3]
    assert list(checkpoint.blocks("a.weight")) == [(0, 6)]
    assert as_float64(checkpoint.block("b.brain", 0, 1)).tolist() == [3.0]


def test_shards_with_an_index(tmp_path: Path) -> None:
    names = list(TENSORS)
    shards = {"one.safetensors": names[:2], "two.safetensors": names[2:]}
    for shard, held in shards.items():
        save_file({name: TENSORS[name] for name in held}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_holds_tensors(fb.Checkpoint.open(tmp_path))
    assert_holds_tensors(fb.Checkpoint.open(tmp_path / "model.safetensors.index.json"))  # pitfall C9
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(fb.InputError, match=r"two.safetensors' does not exist, but 'model.safetensors.index.json'"):
        fb.Checkpoint.open(tmp_path)
    index["weight_map"]["scalar"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(fb.InputError, match="points outside its folder"):
        fb.Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
@pytest.mark.parametrize("nested", [False, True])
def test_torch_files(tmp_path: Path, name: str, nested: bool) -> None:
    torch.save({"state_dict": TENSORS} if nested else TENSORS, tmp_path / name)
    assert_holds_tensors(fb.Checkpoint.open(tmp_path))


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code was run",))


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_wants_to_run_code_is_refused(
    tmp_path: Path, save: object, capsys: pytest.CaptureFixture[str]
) -> None:
    save({"w": torch.ones(1), "x": Evil()}, tmp_path / "model.bin")  # type: ignore[operator]
    with pytest.raises(fb.InputError, match="wants to run code"):
        fb.Checkpoint.open(tmp_path / "model.bin")
    assert capsys.readouterr().out == ""


def test_relative_paths_work(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall C9: `ckpt` became `ckpt/ckpt/model.safetensors`."""
    monkeypatch.chdir(file.parent.parent)
    assert_holds_tensors(fb.Checkpoint.open(file.parent.name))
    assert_holds_tensors(fb.Checkpoint.open(f"{file.parent.name}/model.safetensors"))


def test_a_missing_path_suggests_the_nearest(file: Path) -> None:
    with pytest.raises(fb.InputError, match=r"Did you mean 'model.safetensors'\?"):
        fb.Checkpoint.open(file.with_name("modle.safetensors"))


def test_no_or_several_candidates(tmp_path: Path) -> None:
    with pytest.raises(fb.InputError, match="holds no weights"):
        fb.Checkpoint.open(tmp_path)
    for name in ("one", "two"):
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(fb.InputError, match=r"one.safetensors, two.safetensors\) and no index"):
        fb.Checkpoint.open(tmp_path)


@pytest.mark.parametrize("cut", [0, 4, 9, 60, -1])
def test_a_truncated_file_is_refused(file: Path, cut: int) -> None:
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(fb.InputError, match="truncated"):
        fb.Checkpoint.open(file)


def rewrite(file: Path, change: object) -> None:
    """Change a safetensors header, keeping the data."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = change(json.loads(raw[8 : 8 + length]))  # type: ignore[operator]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def edit(name: str, **values: object) -> object:
    return lambda header: {**header, name: {**header[name], **values}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("a.weight", dtype="F33"), "has the dtype 'F33'"),
        (edit("a.weight", shape=[2, 4]), "32 bytes, but 24"),
        (edit("a.weight", shape=[-2, -3]), "has the shape"),
        (edit("a.weight", data_offsets=[0, 2**40]), "are set aside"),
        (edit("a.weight", data_offsets=[1]), "is not a tensor's"),
        (lambda header: {k: v for k, v in header.items() if k != "a.half"}, "is expected"),
        (lambda header: b"[]", "is not an object"),
        (lambda header: b"{nonsense", "not valid JSON"),
        (lambda header: b'{"x":1,"x":1}', "stands twice"),
        (lambda header: b'{"__metadata__":{"x":1}}', "table of strings"),
    ],
)
def test_a_header_that_lies_is_refused(file: Path, change: object, message: str) -> None:
    rewrite(file, change)
    with pytest.raises(fb.InputError, match=message):
        fb.Checkpoint.open(file)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_at_all_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    file.write_bytes(content)
    try:
        SafetensorsFile(file)
    except fb.InputError:
        pass


def test_every_dtype_is_known_to_torch_and_to_us(tmp_path: Path) -> None:
    from fusionbench.dtypes import from_torch, to_torch

    for name, size in DTYPES.items():
        assert from_torch(to_torch(name)) == name
        assert to_torch(name).itemsize == size


def test_names_that_share_storage_are_tied(tmp_path: Path) -> None:
    shared = torch.randn(4, 2)
    tensors = {"wte.weight": shared, "lm_head.weight": shared, "other": shared.clone()}
    torch.save(tensors, tmp_path / "model.bin")
    for checkpoint in (fb.Checkpoint.of(tensors), fb.Checkpoint.open(tmp_path / "model.bin")):
        assert checkpoint.aliases == {"lm_head.weight": "wte.weight"}
        assert list(checkpoint.specs) == ["wte.weight", "other"]
        assert list(checkpoint) == ["wte.weight", "other", "lm_head.weight"]
        assert checkpoint["lm_head.weight"].equal(shared)


@pytest.mark.parametrize("equal", [True, False])
def test_a_config_that_ties_word_embeddings_ties_equal_copies_in_a_file(tmp_path: Path, equal: bool) -> None:
    """Pitfall B2: untied copies merge apart, and the file grows."""
    embedding = torch.randn(4, 2)
    output = embedding.clone() if equal else embedding + 1
    save_file({"lm_head.weight": output, "model.embed_tokens.weight": embedding}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    aliases = fb.Checkpoint.open(tmp_path).aliases
    assert aliases == ({"lm_head.weight": "model.embed_tokens.weight"} if equal else {})


def test_renamed_tensors_are_the_same_tensors(file: Path) -> None:
    renamed = fb.Checkpoint.open(file).rename({"x": "a.weight", "y": "scalar", "again": "a.weight"})
    assert list(renamed.specs) == ["x", "y"] and renamed.aliases == {"again": "x"}
    assert renamed["again"].equal(TENSORS["a.weight"])
    with pytest.raises(KeyError, match=r"Did you mean 'a.weight'\?"):
        fb.Checkpoint.open(file)["a.wieght"]


def test_the_hash_is_of_the_contents_alone(tmp_path: Path) -> None:
    first = fb.Checkpoint.of(TENSORS)
    fb.save(first, tmp_path / "sharded", shard_size=20)
    assert fb.Checkpoint.open(tmp_path / "sharded").digest == first.digest
    for name, other in (("a.weight", torch.zeros(2, 3)), ("a.weight", torch.arange(6.0).reshape(3, 2))):
        assert fb.Checkpoint.of({**TENSORS, name: other}).digest != first.digest


def test_checkpoints_pickle_as_paths_not_tensors(file: Path) -> None:
    save_file({"w": torch.zeros(1_000_000)}, file)
    pickled = pickle.dumps(fb.Checkpoint.open(file))
    assert len(pickled) < 5_000
    assert pickle.loads(pickled)["w"].shape == (1_000_000,)


def test_a_module_is_rebuilt_with_its_buffers() -> None:
    """Pitfall B2: non-persistent buffers must not be left as uninitialised memory."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("frequencies", torch.tensor([1.0, 0.5]), persistent=False)
    pool = fb.ModelPool({"a": model}, base=model)
    assert pool.build(fb.methods.simple_average(pool)).get_buffer("frequencies").tolist() == [1.0, 0.5]


def test_what_we_write_the_safetensors_library_reads(tmp_path: Path) -> None:
    fb.save(fb.Checkpoint.of(TENSORS), tmp_path / "out")
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert all(loaded[name].equal(tensor) for name, tensor in TENSORS.items())
