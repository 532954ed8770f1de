"""Every command and every block of the documents is run, or stands in NOT_RUN with the reason why it is not.

They run on the zoo with a few examples of each task (small_zoo.py), and on small models with the names that pages use.
What is not run is parsed, and its configs are composed. The tutorials have tests of their own.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fusionbench_zoo
import pytest
import torch
import yaml
from documents import blocks, check, commands, mentions, name_of, write_files
from small_zoo import write_small_zoo
from tiny_clip import write_clip, write_fine_tune, write_zoo
from tiny_llama import words_tokenizer, write_llama
from tiny_text import write_tokenizer
from transformers import MistralConfig, MistralForCausalLM

import fusionbench as fb
from fusionbench import config, suites
from fusionbench.architectures import get_architecture
from fusionbench.cli import main
from fusionbench.commands import VERBS
from fusionbench.results import Results
from fusionbench.suites import load_suite
from fusionbench.tasks import get_kind

ROOT = Path(__file__).parent.parent
PLAYED = ("vision", "lora", "language-models", "method")  # by test_tutorials.py
PAGES = {
    "README": ROOT / "README.md",
    **{f.stem: f for f in sorted((ROOT / "docs").glob("*.md")) if f.stem.removeprefix("tutorial-") not in PLAYED},
}
NOT_RUN = [  # a pattern in "PAGE: COMMAND", or in "PAGE: BLOCK", and why that is not run
    (r": bench (?!scaling --methods)", "whole suites of the paper take from minutes to hours"),
    (r"modelpool=(clip-vit|flan-t5|gpt2 |resnet50|mistral-7b)|paper.yaml", "models of the hub, and GPUs"),
    (r"=minilm\b|: eval minilm", "a package of 91 MB: test_zoo.py, where it is installed"),
    (r"taskpool[ =]harness.yaml|kind: lm_eval", "the LM evaluation harness: test_lm_eval.py, where it is installed"),
    (r"^tutorial-smollm2: ", "a package of 100 MB, and minutes: test_tutorial_smollm2.py"),
    (r"hf:openai", "a model of the hub"),
    (r": # my_suite.yaml", "no command of the page runs all of it: test_suites.py has what it says"),
    (r": # roberta.py", "test_docs.py builds a model by it"),
]
SMALLER = {  # what is added to a command, so that it takes seconds, or may write where another one has written
    "evolve RECIPE.yaml OUT --taskpool NAME": "--generations 1",
    "merge recipe.yaml merged": "--overwrite",
    "merge ties_merging BASE FIRST SECOND -o merged --vocabulary union": "--overwrite",
}
NAMED = {"RECIPE.yaml": "search.yaml", "NAME": "my_tasks.yaml"}  # words that stand for something of the reader's
FAMILIES = ("clip-mini", "gpt2-mini", "t5-mini-lora", "t5-mini", "minilm", "resnet-mini")
RECIPE = "merge_method: linear\nmodels:\n" + "".join(
    f"  - {{model: zoo:clip-mini/{name}, parameters: {{weight: WEIGHT}}}}\n" for name in ("mnist", "emoji")
)
ONE_TASK = (
    "kind: zero_shot_classification\nclip: zoo:clip-mini/base\ntasks: {mnist: {data: zoo:clip-mini/tasks/mnist.npz}}\n"
)


def read(page: str) -> str:
    return PAGES[page].read_text()


def own_models(folder: Path) -> None:
    """Models, a pool and tasks of one's own, of the CLIP family."""
    write_zoo(folder)
    (folder / "pool.yaml").rename(folder / "my_pool.yaml")
    (folder / "tasks.yaml").rename(folder / "my_tasks.yaml")
    for name, model in {"FIRST": "colours", "SECOND": "greys"}.items():
        (folder / name).symlink_to(folder / model)


def recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace("WEIGHT", "0.5"))


def readme(folder: Path) -> None:
    recipe(folder)
    clip = write_clip(folder / "clip")
    for seed, name in enumerate(("base", "a", "b")):
        write_fine_tune(folder / "path" / "to" / name, clip, seed)
    (folder / "search.yaml").write_text(RECIPE.replace("WEIGHT", "{search: [0, 1]}"))
    (folder / "my_tasks.yaml").write_text(ONE_TASK)
    (folder / "one.yaml").write_text(
        "{what: One, groups: [{pools: [clip-mini], models: [mnist], methods: [pretrained]}]}"
    )
    assert main(["bench", "one.yaml", "--workers", "1"]) == 0


def languages(folder: Path) -> None:
    """Language models whose tokens are not the same."""
    for seed, (name, words) in enumerate({"BASE": "good", "FIRST": "good bad", "SECOND": "good film"}.items()):
        write_llama(folder / name, words_tokenizer(words.split()), seed=seed)


def mistrals(folder: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    for seed, name in enumerate(("mistral", "mistral-code", "mistral-law")):
        torch.manual_seed(seed)
        settings = MistralConfig(vocab_size=15, num_key_value_heads=1, sliding_window=None, **size)
        MistralForCausalLM(settings).save_pretrained(folder / name)
        write_tokenizer(folder / name)


def own_method(folder: Path) -> None:
    own_models(folder)
    (folder / "my_median.py").write_text(next(b for b in blocks(read("README"), "python") if "def median" in b))


def reproducing(folder: Path) -> None:
    words = ["method=simple_average", "modelpool=clip-mini", "taskpool=clip-mini", "report=reports/b32/average.json"]
    assert main(["run", *words]) == 0


STAND_INS: dict[str, Callable[[Path], None]] = {
    "README": readme,
    "alignment": own_models,
    "moe": mistrals,
    "practitioners": languages,
    "recipes": recipe,
    "reproducing": reproducing,
    "suites": own_method,
}


@pytest.fixture(scope="module")
def small_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "zoo"
    write_small_zoo(folder)
    return folder


@pytest.fixture
def work(small_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, where we are; `zoo:` is the small zoo."""
    monkeypatch.setattr(fusionbench_zoo, "locate", small_zoo.joinpath)
    monkeypatch.setenv("FUSIONBENCH_CACHE", str(small_zoo.parent / "cache"))  # classes are the same in all pages
    monkeypatch.chdir(tmp_path)
    suites._opened.cache_clear()
    yield tmp_path
    suites._opened.cache_clear()  # the models and tasks of the last suite, by their names


def why_not_run(page: str, what: list[str] | str) -> str:
    """The reason for which a command, or a block, is not run; nothing where it is."""
    text = f"{page}: {what if isinstance(what, str) else ' '.join(what)}"
    return next((reason for pattern, reason in NOT_RUN if re.search(pattern, text)), "")


def sentences(page: str) -> list[list[str]]:
    """The commands in a page's sentences; those that are only named, or have a part left out, must be verbs."""
    found = []
    for words in mentions(read(page)):
        if words[-1] == "--help" or any("..." in word for word in words) or is_name(words):
            assert words[0] in VERBS or words == ["--help"]
        else:
            found.append(words)
    return found


def is_name(words: list[str]) -> bool:
    return words[0] in VERBS and (
        len(words) == 1 or words in (["lora", "extract"], ["lora", "merge"], ["verify", "--inputs"])
    )


def shape(words: list[str]) -> str:
    """A command, whatever family of the zoo it is about."""
    return re.sub("|".join(FAMILIES), "FAMILY", " ".join(words))


def shown(page: str) -> list[list[str]]:
    """The commands of a page that are run or looked at there: of a shape, those of the first page that has it."""
    earlier = {shape(words) for name in list(PAGES)[: list(PAGES).index(page)] for words in sentences(name)}
    once = {shape(words): words for words in reversed(sentences(page))}
    return [*commands(read(page)), *(words for form, words in reversed(once.items()) if form not in earlier)]


def run(words: list[str]) -> int:
    """Run a command as a reader would, with names of his or her own."""
    more = SMALLER.get(" ".join(words), "").split()
    keys = iter([result.key for result in Results("results").all()] if words[0] == "compare" else [])
    return main([next(keys) if re.fullmatch("[0-9a-f]{4}", word) else NAMED.get(word, word) for word in words] + more)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(read(page), work)
    STAND_INS.get(page, lambda folder: None)(work)
    here = shown(page)
    for words in [*here, *(words for words in sentences(page) if words not in here)]:
        if words not in here or why_not_run(page, words):
            check(words)
        else:
            assert run(words) == 0, (words, capsys.readouterr())


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(read(page), "python")])
def test_the_python_of_a_page_runs(
    page: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(work)
    STAND_INS.get(page, lambda folder: None)(work)
    write_files(read(page), work)
    session: dict[str, Any] = {"fb": fb}
    if page == "alignment":
        session["pool"] = fb.load_modelpool("my_pool.yaml")
    for block in blocks(read(page), "python"):
        if name_of(block):
            module = Path(name_of(block)).stem
            used = [words for words in (*commands(read(page)), *mentions(read(page))) if f"plugins=[{module}]" in words]
            used += re.findall(rf"^from {module} import", read(page), re.MULTILINE)
            assert used or why_not_run(page, block), f"{name_of(block)}: nothing in the page uses it"
        else:
            exec(block, session)
    if page == "README":
        assert sorted(fb.Checkpoint.open("path/to/merged")) == sorted(fb.Checkpoint.open("path/to/a"))
        assert "'average': 0." in capsys.readouterr().out


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(read(page), "yaml")])
def test_the_yaml_of_a_page_is_used_by_its_commands(page: str, work: Path) -> None:
    STAND_INS.get(page, lambda folder: None)(work)
    write_files(read(page), work)
    ran = [" ".join(words) for words in (*commands(read(page)), *sentences(page)) if not why_not_run(page, words)]
    for block in blocks(read(page), "yaml"):
        name = name_of(block)
        assert name, f"the first line of a block of YAML is its name, as # my_pool.yaml: {block}"
        if why_not_run(page, block):
            understood(name, yaml.safe_load(block))
        else:
            assert any(re.search(rf"(^|[ =]){name}", words) for words in ran), f"no command of the page uses {name}"


def understood(name: str, content: dict[str, Any]) -> None:
    """A file that is not run is one that could be."""
    if "groups" in content:
        assert load_suite(name).cells
    elif "kind" in content:
        assert callable(get_kind(content["kind"]).build)
    elif "merge_method" in content:
        assert content == yaml.safe_load((ROOT / "examples" / "smollm2" / name).read_text())
    else:
        assert set(config.read_config_file("modelpool", name)[0]) == {"architecture", "base", "models"}
        assert get_architecture(content["architecture"])


def test_what_is_not_run_is_there() -> None:
    found = {page: [" ".join(words) for words in (*commands(read(page)), *sentences(page))] for page in PAGES}
    texts = [f"{page}: {text}" for page, some in found.items() for text in some]
    texts += [f"{page}: {block}" for page in PAGES for block in blocks(read(page), "(?:python|yaml)")]
    for pattern, _ in NOT_RUN:
        assert any(re.search(pattern, text) for text in texts), f"NOT_RUN has '{pattern}' for nothing"
    for words in SMALLER:
        assert any(words in some for some in found.values()), f"SMALLER has '{words}' for nothing"
