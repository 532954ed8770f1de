import json
import os
import pickle
import zipfile
from pathlib import Path
from random import Random

import pytest
import torch
from faults import fuzz
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import fusionbench as fb
from fusionbench.dtypes import as_float64
from fusionbench.formats import DTYPES

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


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[1]", "is not a JSON object"),
        ("{nonsense", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        ({}, "has no 'weight_map'"),
        ({"weight_map": {}}, "has no 'weight_map'"),
        ({"weight_map": ["one.safetensors"]}, "has no 'weight_map'"),
        ({"weight_map": {"w": 1}}, "points outside its folder: 1"),
        ({"weight_map": {"w": "../one.safetensors"}}, "points outside its folder"),
        ({"weight_map": {"w": "/etc/passwd"}}, "points outside its folder"),
        ({"weight_map": {"w": ".."}}, "does not exist"),
        ({"weight_map": {"w": "n" * 300 + ".safetensors"}}, "does not exist"),
        ({"weight_map": {"w": "one\0.safetensors"}}, "does not exist"),
        ({"weight_map": {"w": "link.safetensors"}}, "truncated|not a safetensors file"),
        ({"weight_map": {"w": "one.safetensors", "v": "one.safetensors"}}, "does not hold 'v'"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, index: object, message: str) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / "link.safetensors").symlink_to("/etc/passwd")
    text = json.dumps(index) if isinstance(index, dict) else index
    file = tmp_path / "model.safetensors.index.json"
    file.write_bytes(text if isinstance(text, bytes) else str(text).encode())
    with pytest.raises(fb.InputError, match=message) as refused:
        fb.Checkpoint.open(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000


def test_shards_may_be_links_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(TENSORS, blobs / "0123abcd")
    (snapshot / "one.safetensors").symlink_to("../../blobs/0123abcd")
    index = {"weight_map": dict.fromkeys(TENSORS, "one.safetensors")}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_holds_tensors(fb.Checkpoint.open(snapshot))


@pytest.mark.parametrize("content", ["[]", "nonsense", "[" * 100_000, "9" * 5000])
def test_a_config_that_is_no_table_is_refused(file: Path, content: str) -> None:
    (file.parent / "config.json").write_text(content)
    with pytest.raises(fb.InputError, match=r"config.json' is not (valid JSON|a JSON object)"):
        fb.Checkpoint.open(file.parent)


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_a_name_that_no_file_can_hold_is_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(fb.InputError, match="cannot be stored in a safetensors file"):
        fb.save(fb.Checkpoint.of({name: torch.ones(1)}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
@pytest.mark.parametrize("nested", [False, True])
def test_torch_files(tmp_path: Path, name: str, nested: bool) -> None:
    torch.save({"state_dict": TENSORS} if nested else TENSORS, tmp_path / name)
    assert_holds_tensors(fb.Checkpoint.open(tmp_path))


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code was run",))


def without_archive(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "save", [torch.save, without_archive, lambda value, path: path.write_bytes(pickle.dumps(value))]
)
@pytest.mark.parametrize("value", [Evil(), {"w": torch.ones(1), "x": Evil()}, {"state_dict": {"w": [[Evil()]]}}, eval])
def test_a_pickle_that_wants_to_run_code_is_refused(
    tmp_path: Path, save: object, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    save(value, tmp_path / "model.bin")  # type: ignore[operator]
    with pytest.raises(fb.InputError, match="wants to run code") as refused:
        fb.Checkpoint.open(tmp_path / "model.bin")
    assert capsys.readouterr().out == "" and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "code",
    [
        b"cbuiltins\nprint\n(S'code was run'\ntR.",
        b"(S'code was run'\nibuiltins\nprint\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x05print\x93\x8c\x0ccode was run\x85R.",
        b"cos\nsystem\n.",
        b"}(S'w'\ncbuiltins\nprint\n(S'code was run'\ntRu.",
        b"ctorch.serialization\nload\n(S'/etc/passwd'\ntR.",
    ],
)
def test_the_ways_in_which_pickles_call_functions_are_all_refused(
    tmp_path: Path, code: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain.bin").write_bytes(code)
    with zipfile.ZipFile(tmp_path / "archive.bin", "w") as archive:
        for name, content in (("data.pkl", code), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", content)
    for name in ("plain", "archive"):
        with pytest.raises(fb.InputError, match="wants to run code"):
            fb.Checkpoint.open(tmp_path / f"{name}.bin")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("kept", [0.6, 0.99])
def test_a_truncated_torch_file_is_refused(tmp_path: Path, new: bool, kept: float) -> None:
    file = tmp_path / "model.bin"
    torch.save({"w": torch.ones(100)}, file, _use_new_zipfile_serialization=new)
    os.truncate(file, int(kept * file.stat().st_size))
    with pytest.raises(fb.InputError, match=r"model.bin' (is a pickle that|cannot be read)") as refused:
        fb.Checkpoint.open(file)
    assert "\n" not in str(refused.value)


def test_a_damaged_torch_file_is_refused_in_one_line(tmp_path: Path) -> None:
    for content in (b"", b"PK\3\4", b"\x80\x02", *(fuzz.pickled(Random(seed)) for seed in range(100))):
        fuzz.check_pickle(tmp_path, content)


def test_shards_of_torch_hold_each_tensor_once_and_all_that_the_index_lists(tmp_path: Path) -> None:
    shards = {"a.bin": {"x": torch.ones(2), "y": torch.ones(2)}, "b.bin": {"z": torch.ones(2)}}
    for name, tensors in shards.items():
        torch.save(tensors, tmp_path / name)
    index = {"weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert set(fb.Checkpoint.open(tmp_path)) == {"x", "y", "z"}
    torch.save({"z": torch.ones(2), "x": torch.zeros(2)}, tmp_path / "b.bin")
    with pytest.raises(fb.InputError, match="'x' stands in two shards"):
        fb.Checkpoint.open(tmp_path)
    torch.save({"other": torch.ones(2)}, tmp_path / "b.bin")
    with pytest.raises(fb.InputError, match="no shard holds 'z', which the index lists"):
        fb.Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 999\n")
    with pytest.raises(fb.InputError, match="is a Git LFS pointer, not the file itself: run 'git lfs pull'"):
        fb.Checkpoint.open(tmp_path)


def test_tensors_without_dense_numbers_are_named(tmp_path: Path) -> None:
    for tensor, said in ((torch.eye(2).to_sparse(), "is sparse"), (torch.ones(2, device="meta"), "has no numbers")):
        torch.save({"w": tensor}, tmp_path / "w.pt")
        with pytest.raises(fb.InputError, match=f"'w' {said}"):
            fb.Checkpoint.open(tmp_path / "w.pt")
    torch.save({"w": torch._neg_view(torch.ones(2))}, tmp_path / "w.pt")
    assert fb.Checkpoint.open(tmp_path / "w.pt")["w"].tolist() == [-1, -1]


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
        (lambda header: b'{"__metadata__":[]}', "table of strings"),
        (lambda header: b"[" * 100_000, "not valid JSON"),
        (lambda header: b'{"\xff":1}', "not valid JSON"),
        (lambda header: json.dumps(header).encode("utf-16"), "not valid JSON"),
        (lambda header: b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
        (lambda header: {**header, "\ud800": header["a.weight"]}, "is not valid text"),
        (lambda header: {**header, "__metadata__": {"\ud800": "a.weight"}}, "is not valid text"),
        (lambda header: {**header, "a.weight": "F32"}, "is not a tensor's"),
        (lambda header: {**header, "two\nlines": None}, r"'two\\nlines' is not a tensor's"),
        (edit("a.weight", dtype=["F32"]), "is not a tensor's"),
        (edit("a.weight", dtype="F" * 10**6), r"the dtype 'FFF.{,200}\.\.\., known are"),
        (edit("a.weight", shape={}), "is not a tensor's"),
        (edit("a.weight", shape=6), "is not a tensor's"),
        (edit("a.weight", shape="23"), "is not a tensor's"),
        (edit("a.weight", shape=[2.0, 3]), "has the shape"),
        (edit("a.weight", shape=[True, 6]), "has the shape"),
        (edit("a.weight", shape=[2**32, 2**32]), "has the shape"),  # times 4 is 0 in 64 bits
        (edit("a.weight", shape=[0, 2**40, 2**40]), "has the shape"),
        (edit("a.weight", shape=[10**4000, 10**4000]), "has the shape"),
        (edit("a.weight", shape=[1] * 1000), "has 1,000 dimensions"),
        (edit("a.weight", data_offsets=[24, 0]), "are set aside"),
        (edit("a.weight", data_offsets=[0, True]), "and the offsets"),
        (edit("a.weight", data_offsets=[10**30, 10**30 + 24]), "and the offsets"),
    ],
)
def test_a_header_that_lies_is_refused(file: Path, change: object, message: str) -> None:
    rewrite(file, change)
    with pytest.raises(fb.InputError, match=message) as refused:
        fb.Checkpoint.open(file)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("start", "message"),
    [(16, "starts at byte 16 where 24 is expected"), (32, "starts at byte 32 where 24 is expected")],
)
def test_tensors_that_overlap_or_leave_a_gap_are_refused(tmp_path: Path, start: int, message: str) -> None:
    save_file({"a": torch.ones(6), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    rewrite(tmp_path / "x.safetensors", edit("b", data_offsets=[start, start + 8]))
    with pytest.raises(fb.InputError, match=message):
        fb.Checkpoint.open(tmp_path / "x.safetensors")


@pytest.mark.parametrize("length", [2**63, 2**40, 200_000_000])
def test_a_header_of_any_length_is_refused_without_reading_it(tmp_path: Path, length: int) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(length.to_bytes(8, "little"))
    os.truncate(file, 300_000_000)  # takes no room
    with pytest.raises(fb.InputError, match="truncated|its header claims 200,000,000 bytes"):
        fb.Checkpoint.open(file)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_at_all_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    fuzz.check_header(tmp_path_factory.getbasetemp(), content)


@settings(deadline=None, max_examples=300)
@given(st.randoms(use_true_random=False), st.sampled_from(["header", "index", "table"]))
def test_a_file_with_anything_wrong_is_refused_in_one_line_or_read_as_what_it_says(
    tmp_path_factory: pytest.TempPathFactory, random: Random, kind: str
) -> None:
    make, check = fuzz.KINDS[kind]
    check(tmp_path_factory.getbasetemp(), make(random))


def test_a_file_that_was_changed_after_it_was_opened_is_read_no_more(file: Path) -> None:
    checkpoint = fb.Checkpoint.open(file)
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    other.replace(file)
    with pytest.raises(fb.InputError, match=r"model.safetensors' was changed or truncated after it was opened"):
        checkpoint["a.weight"]
    file.unlink()
    with pytest.raises(fb.InputError, match=r"model.safetensors' cannot be read: No such file or directory"):
        checkpoint["a.weight"]


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


def test_a_checkpoint_equals_itself_alone_and_nothing_is_read_for_that(file: Path) -> None:
    one, other = fb.Checkpoint.open(file), fb.Checkpoint.open(file)
    file.unlink()
    assert one == one and one != other and len({one, other, one}) == 2


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


def test_a_pickle_that_unpacks_to_very_much_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(100_000_001))
    with pytest.raises(fb.InputError, match="cannot be read: its pickle unpacks to more than 100,000,000 bytes"):
        fb.Checkpoint.open(tmp_path / "bomb.pt")
