"""The documents' tables are those that were made, links lead somewhere, and each method has a page."""

import html
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from documents import blocks, check, commands, write_files

import fusionbench as fb
from fusionbench import config
from fusionbench.cli import main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def read(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


@pytest.fixture(scope="module")
def method_pages() -> ModuleType:
    return imported(DOCS / "method_pages.py")


@pytest.fixture(scope="module")
def site(method_pages: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the site is built of."""
    folder = tmp_path_factory.mktemp("site") / "source"
    method_pages.stage(folder)
    return folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stands_for(words: list[str]) -> bool:
    """Whether a command has a word that stands for something else."""
    return any(word.isupper() or word.startswith("path/") for word in words)


def test_the_first_page_shows_what_its_commands_print(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for words in commands(read("index"))[:2]:
        assert main(words) == 0
    printed, shown = capsys.readouterr().out, blocks(read("index"), "text")[0]
    assert without_seconds(printed) == without_seconds(shown)


def without_seconds(text: str) -> str:
    return re.sub(r"\([\d.]+ s\)", "(s)", text)


def test_the_first_pages_scores_are_those_of_clip_mini(method_pages: ModuleType) -> None:
    shown = [line.replace("*", "").split() for line in blocks(read("index"), "text")[1].splitlines()]
    by_task = {line[0]: line[1:] for line in shown if len(line) == 5}
    head, *every = method_pages.rows("clip-mini", "all")
    table = {row[0]: dict(zip(head, row, strict=True)) for row in every}
    for task in head[1 : head.index("average") + 1]:
        methods = ("pretrained", "simple_average", "task_arithmetic", "individual")
        assert by_task[task] == [table[method][task] for method in methods]


def test_the_table_of_what_to_choose_is_taken_from_all_methods(method_pages: ModuleType) -> None:
    shown = re.findall(r"<!-- choice -->\n(.*?)<!-- end -->", read("concepts"), re.DOTALL)
    assert shown == [method_pages.choice()], "python docs/make.py clip-mini --results FOLDER writes it"
    assert "| smile_upscaling | " in shown[0]


def test_a_familys_table_has_every_run_of_the_suites_in_their_order(tmp_path: Path) -> None:
    from rich_results import CLIP, add

    from fusionbench.results import Results
    from fusionbench.suites import load_suite

    measured, kept = imported(DOCS / "measured.py"), Results(tmp_path)
    cells = [cell for cell in load_suite("multi-task").cells if cell.pool == "clip-mini"]
    for cell in cells[:4]:
        made = add(Results(tmp_path / "made"), cell.method)
        kept.add(cell.key(), {"in": "other words"}, made.report, made.primary, {})
    kept.add_failed(cells[4].key(), cells[4].asked, "out of memory")
    head, _, *lines = measured.all_methods("clip-mini", kept).splitlines()
    assert head == f"| method | {' | '.join(CLIP)} | average | g | seconds | parameters |"
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:5]]
    assert [row[0].split()[0] for row in table] == [cell.method for cell in cells[:5]]
    assert table[4][9] == "failed"
    left = next(line for line in lines if line.startswith("Not run: "))
    assert all(f"`{cell.method}" in left for cell in cells[5:])
    assert float(table[0][9]) > 30 and "- `task_arithmetic` failed: out of memory" in lines

    old = [[cells[at].method, *(["1.0"] * (len(head.split("|")) - 3))] for at in (0, 5)]
    before = [[cell.strip() for cell in head.strip("|").split("|")], *old]
    _, _, *later = measured.all_methods("clip-mini", kept, before).splitlines()
    assert later[:5] == lines[:5], "what was run takes the place of what was there"
    assert later[5].split(" | ")[1:4] == ["1.0"] * 3, "what was not stays"
    assert f"`{cells[5].method}`" not in next(line for line in later if line.startswith("Not run: "))


def test_the_papers_suite_on_its_own_models_is_read_and_has_published_numbers(work: Path) -> None:
    from fusionbench.published import tables_for
    from fusionbench.suites import load_suite

    write_files(read("reproducing"), work)
    cells = load_suite("paper.yaml").cells
    assert all(
        set(cell.models or ()) < set(config.read_config_file("modelpool", cell.pool)[0]["models"]) for cell in cells
    )
    for about, chosen in (
        ("unseen tasks", [c for c in cells if c.tasks == "all"]),
        ("corruptions", [c for c in cells if c.corruption]),
    ):
        for models in {cell.models for cell in chosen}:
            assert len(tables_for("hf:openai/clip-vit-base-patch32", about, models)) == 1
    assert len(cells) == 2 * 8 + 7 + 7 * 7


def test_a_family_of_two_functions_builds_and_merges_models(work: Path) -> None:
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    write_files(read("writing"), work)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        RobertaForSequenceClassification(RobertaConfig(vocab_size=9, **size)).save_pretrained(work / name)
    pool = fb.ModelPool({"a": "a", "b": "b"}, base="base", architecture=imported(work / "roberta.py"))
    model = pool.build(fb.methods.simple_average(pool))
    words = [fb.Checkpoint.open(name)["roberta.embeddings.word_embeddings.weight"] for name in "ab"]
    torch.testing.assert_close(model.embeddings.word_embeddings.weight, (words[0] + words[1]) / 2)
    assert model(torch.tensor([[3, 4]])).last_hidden_state.shape == (1, 2, 8)


METHODS = fb.list_methods()


def test_every_method_has_a_page_in_the_navigation(site: Path) -> None:
    listed = set(leaves(yaml.safe_load((site / "mkdocs.yml").read_text())["nav"]))
    for method in METHODS:
        assert f"methods/{method.name}.md" in listed
        assert method.name in (site / "docs/methods/index.md").read_text()
    there = {str(file.relative_to(site / "docs")) for file in (site / "docs").rglob("*.md")}
    assert there == listed, "mkdocs.yml lists every page under nav, and no other"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_methods_page_has_the_signatures_hyperparameters(method: Any, method_pages: ModuleType) -> None:
    text = method_pages.page(method)
    shown = {}
    for line in text.partition("## Hyperparameters")[2].partition("## Command line")[0].splitlines():
        if row := re.match(r"\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*) \|$", line):
            shown[row[1]] = [re.sub(r"</?code>|<wbr>", "", cell) for cell in row.groups()[1:4]]
    arguments = inspect.signature(method.function).parameters
    own = {name: a.default for name, a in arguments.items() if a.kind is inspect.Parameter.KEYWORD_ONLY}
    assert list(shown) == list(own)
    for name, default in own.items():
        kind, interval, said = shown[name]
        value = html.unescape(said)
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert float(value) == default
        else:
            words = {inspect.Parameter.empty: "required", None: "null", True: "true", False: "false", "": '""'}
            assert value == (words[default] if default in words else default)
        given = method.hyperparameters[name].range
        assert interval == (str(given) if given else "") and kind
    assert f'<pre class="formula">{html.escape(method.formula)}</pre>' in text
    for part in method.paragraphs:
        assert part.startswith("    ") or re.sub(r"\\(.)", r"\1", text).count(part) == 1
    assert (f"https://arxiv.org/abs/{method.paper}" in text) == bool(method.paper)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_methods_commands_and_call_work(method: Any, method_pages: ModuleType, work: Path) -> None:
    text = method_pages.page(method)
    shown = commands(text)
    assert shown or method.kind == "reference"
    (work / "learned.json").write_text("")
    for words in shown:
        check(words)
        if words[0] == "merge" and not stands_for(words) and method.name != "apply_coefficients":
            assert main(words) == 0, words
            assert (work / "merged" / "recipe.json").exists()
    snippet = blocks(text, "python")[0]
    if method.kind == "merging" and not method.needs_tasks and method.name != "apply_coefficients":
        found: dict[str, Any] = {}
        exec(snippet, found)
        assert found["result"] is not None
    else:
        compile(snippet, method.name, "exec")


def test_links_and_pictures_are_there(site: Path) -> None:
    texts = {file: file.read_text() for file in [*(site / "docs").rglob("*.md"), ROOT / "README.md"]}
    found = 0
    for file, text in texts.items():
        prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\(([^)\s]+)\)", prose):
            if link.startswith("https://"):
                continue
            place, _, anchor = link.partition("#")
            target = (file.parent / place) if place else file
            assert target.exists(), f"{file.name}: {link}"
            if anchor:
                assert anchor in anchors(target.read_text()), f"{file.name}: {link}"
            found += 1
    assert found > 50


def anchors(text: str) -> list[str]:
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads]


def leaves(entries: Any) -> list[str]:
    """The files of a navigation."""
    if isinstance(entries, str):
        return [entries]
    return [leaf for entry in (entries.values() if isinstance(entries, dict) else entries) for leaf in leaves(entry)]
