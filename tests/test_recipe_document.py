"""YAML that knows its lines: everything wrong in a file is told at once."""

from pathlib import Path

import pytest

from fusionbench.errors import InputError
from fusionbench.recipes.document import Node, read
from fusionbench.registry import Range


def document(tmp_path: Path, text: str) -> Node:
    (tmp_path / "r.yaml").write_text(text)
    return read(tmp_path / "r.yaml")[0]


def problems(node: Node) -> list[str]:
    with pytest.raises(InputError) as error:
        node.problems.stop()
    return [line.partition("r.yaml:")[2] for line in str(error.value).splitlines()]


def test_values_are_what_is_written(tmp_path: Path) -> None:
    root = document(tmp_path, "a: 1e-4\nb: [1, 2]\nc: {x: true, y: 0}\nd: 3.1\ne: null\nf: 007\n")
    fields = root.fields("abcdef")
    assert list(fields) == ["a", "b", "c", "d", "f"]  # null is as not given
    assert fields["a"].number() == 1e-4
    assert [item.whole() for item in fields["b"].items()] == [1, 2]
    assert {name: node.flag() for name, node in fields["c"].entries().items()} == {"x": True, "y": False}
    assert (fields["d"].text(), fields["f"].text()) == ("3.1", "007")
    root.problems.stop()


def test_everything_wrong_is_told_at_once_by_line(tmp_path: Path) -> None:
    root = document(tmp_path, "densty: 1\nweight: two\nlist: 3\ndensity: 5\nweight: 1\nflag: maybe\nwhole: 1.5\n")
    fields = root.fields(["density", "weight", "list", "flag", "whole", "method"], required=["method"])
    fields["weight"].number()
    fields["list"].items()
    fields["density"].number(Range(0, 1))
    fields["flag"].flag()
    fields["whole"].whole()
    assert problems(root) == [
        "1: the recipe has no 'method'.",
        "1: the recipe takes no 'densty'. Did you mean 'density'?",
        "2: weight must be a number; got 'two'.",
        "3: list must be a list; got '3'.",
        "4: density must be in [0, 1]; got 5.",
        "5: 'weight' is given twice; line 2 has it already.",
        "6: flag must be true or false; got 'maybe'.",
        "7: whole must be a whole number; got 1.5.",
    ]


@pytest.mark.parametrize("value", ["nan", ".nan", ".inf", "true", "1_0", "[1]", "~"])
def test_what_is_no_finite_number_is_refused(tmp_path: Path, value: str) -> None:
    root = document(tmp_path, f"a: {value}")
    root.entries()["a"].number()
    assert problems(root)[0].startswith("1: a must be a number; got")


def test_a_choice_names_the_nearest(tmp_path: Path) -> None:
    root = document(tmp_path, "dtype: bflot16\nother: [1]")
    fields = root.fields(["dtype", "other"])
    assert fields["dtype"].choice(["float32", "bfloat16"]) == "float32"
    fields["other"].choice(["a", "b"])
    assert problems(root) == [
        "1: dtype cannot be 'bflot16'. Did you mean 'bfloat16'?",
        "2: other must be one of a, b; got a list.",
    ]


def test_anchors_and_merge_keys_are_followed(tmp_path: Path) -> None:
    root = document(tmp_path, "x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: *x\n")
    fields = root.fields("xyz")
    assert {name: node.number() for name, node in fields["y"].entries().items()} == {"b": 3, "a": 1}
    assert {name: node.number() for name, node in fields["z"].entries().items()} == {"a": 1, "b": 2}


def test_documents_share_their_problems(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: 1\n---\nb: 2\n---\n")
    first, second = read(tmp_path / "r.yaml")
    first.fields("x")
    second.fields("x")
    assert [line[:2] for line in problems(first)] == ["1:", "3:"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [1, 2\nb: 3", r"r.yaml:2: this is no YAML: "),
        (b"a: !!python/object/apply:os.system [x]\n", ""),
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"\xff\xfe\x00", "no text in UTF-8"),
        (b"[" * 5000, "nested too deeply|no YAML"),
        (b"a: \x07", "r.yaml:1: this is no YAML: "),
    ],
)
def test_what_is_no_recipe_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    if not said:  # a tag is a word: nothing is made of it
        root = read(tmp_path / "r.yaml")[0]
        root.fields(["a"])["a"].number()
        assert problems(root) == ["1: a must be a number; got a list."]
        return
    with pytest.raises(InputError, match=said) as error:
        read(tmp_path / "r.yaml")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "none.yaml")


def test_plain_values_are_what_python_has(tmp_path: Path) -> None:
    root = document(tmp_path, "a: [1, 2.5, x, true, null, 1e-4, '1e-4']\nb: {c: 0}\n")
    assert root.plain() == {"a": [1, 2.5, "x", True, None, 1e-4, "1e-4"], "b": {"c": 0}}


@pytest.mark.parametrize("text", ["a: &x [*x]", "a: [[[[1]]]]"])
def test_what_anchors_make_endless_is_told(tmp_path: Path, text: str) -> None:
    root = document(tmp_path, text)
    root.plain()
    assert problems(root) == ["1: a must be less deeply nested; got a list."]
