"""The pages of the methods, from their registrations, and the folder that the site is built of (make site).

    python docs/method_pages.py FOLDER

writes FOLDER/docs, these documents with a page of each method, and FOLDER/mkdocs.yml, with those in the navigation. A
page is what `fusionbench describe` says, how to call the method, and its rows of the documents' measured tables.
"""

from __future__ import annotations

import html
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from fusionbench.registry import INDENT, LETTERS, SYMBOLS, Method, list_methods

DOCS = Path(__file__).parent
KINDS = {
    "merging": "One set of weights comes out, of the size of one model.",
    "ensemble": "All models run, and their outputs are combined.",
    "mixing": "A model with parts of several, or with more parts than one, comes out.",
    "reference": "What the others are compared with.",
}
MEASURED = ("clip-mini", "gpt2-mini", "t5-mini", "t5-mini-lora", "resnet-mini", "minilm")
LINKED = ("index", "concepts", "reading", "practitioners")
CHOICE = ("pretrained", "simple_average", "task_arithmetic", "ties_merging", "regmean_plus_plus", "adamerging",
          "simple_ensemble", "smile_upscaling", "we_moe", "individual")  # fmt: skip


def stage(folder: Path) -> None:
    """Write what the site is built of."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS, folder / "docs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for file in (folder / "docs").glob("*.md"):
        # Python-Markdown takes what stands right behind a comment for a part of it.
        text = re.sub(r"^(<!-- \w+ -->\n)(?=\S)", r"\1\n", file.read_text(), flags=re.MULTILINE)
        file.write_text(linked(text) if file.stem in LINKED else text)
    for path, text in pages().items():
        (folder / "docs" / path).parent.mkdir(exist_ok=True)
        (folder / "docs" / path).write_text(text)
    config = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text())
    config["nav"] = [{"Methods": navigation()} if "Methods" in entry else entry for entry in config["nav"]]
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False))


def linked(text: str) -> str:
    """The text, the names of methods in it links to their pages, which a code host does not have."""
    names = "|".join(method.name for method in list_methods())
    return re.sub(rf"(?<!\[)`({names})`", r"[`\1`](methods/\1.md)", text)


def navigation() -> list[Any]:
    """The pages of the methods, by kind."""
    named = {kind: [{m.name: f"methods/{m.name}.md"} for m in list_methods() if m.kind == kind] for kind in KINDS}
    return ["methods/index.md", *({kind.capitalize(): entries} for kind, entries in named.items())]


def pages() -> dict[str, str]:
    """The Markdown of all pages, by path."""
    methods = list_methods()
    return {"methods/index.md": index(methods), **{f"methods/{m.name}.md": page(m) for m in methods}}


def index(methods: list[Method]) -> str:
    """A table of each kind."""
    lines = [
        "# Methods",
        "",
        "All methods, by what comes out. A page of each has its formula, hyperparameters, commands that run, and what",
        "was measured; [what to choose](../concepts.md#what-to-choose) compares them. On the command line it is",
        "`fusionbench list methods` and `fusionbench describe NAME`. [One of your own](../writing.md) is one file.",
    ]
    for kind, meaning in KINDS.items():
        lines += ["", f"## {kind.capitalize()}", "", meaning, "", *table(("method", "looks at", "paper"))]
        for m in methods:
            if m.kind == kind:
                looks = "weights" if m.data == "none" else m.data
                lines.append(f"| [`{m.name}`]({m.name}.md)<br>{prose(m.summary)} | {looks} | {paper(m)} |")
    lines += ["", "## Symbols", "", "In the formulas of all methods, for each tensor by itself:", ""]
    lines += [*table(("symbol", "meaning")), *(f"| {prose(s)} | {prose(meaning)} |" for s, meaning in SYMBOLS.items())]
    lines += ["", "Letters of hyperparameters, in methods that have them:", "", *table(("letter", "hyperparameter"))]
    lines += [f"| {letter} | `{name}` |" for letter, name in LETTERS.items()]
    return "\n".join(lines) + "\n"


def page(method: Method) -> str:
    """All there is to know about a method before using it."""
    about = {
        "kind": f"{method.kind} ({KINDS[method.kind][0].lower()}{KINDS[method.kind][1:-1]})",
        "looks at": method.looks_at or "weights alone",
        "gradients": "of the models" if method.gradients else "none",
        "base model": "needed" if method.base else "not needed",
        "order of the models": "matters" if method.ordered else "",
        "paper": paper(method),
    }
    lines = [f"# {method.name}", "", *documentation(method), ""]
    lines += [f"- {name}: {value}" for name, value in about.items() if value]
    lines += ["", "## Hyperparameters", "", *hyperparameters(method), ""]
    lines += ["## Command line", "", "```sh", *commands(method), "```", ""]
    lines += ["## Python", "", "```python", python(method).rstrip(), "```", ""]
    return "\n".join([*lines, *measured(method.name)])


def documentation(method: Method) -> Iterator[str]:
    """The docstring's paragraphs, and what the symbols of its formula mean."""
    for part in method.paragraphs:
        if part.startswith(INDENT):
            yield f'<pre class="formula">{html.escape(textwrap.dedent(part))}</pre>\n'
            legend = "".join(
                f"<div><dt>{s}</dt><dd>{html.escape(what)}</dd></div>" for s, what in method.symbols.items()
            )
            yield f'<dl class="symbols">{legend}</dl>\n' if legend else ""
        else:
            yield f"{prose(part)}\n"


def hyperparameters(method: Method) -> Iterator[str]:
    if not method.hyperparameters:
        yield "It has none."
        return
    yield from table(("name", "type", "range", "default", "meaning"))
    for h in method.hyperparameters.values():
        default = "required" if h.required else code("null" if h.default is None else _word(h.default))
        interval = code(str(h.range)) if h.range else ""
        yield f"| `{h.name}` | {code(str(h))} | {interval} | {default} | {prose(h.meaning)} |"


def commands(method: Method) -> Iterator[str]:
    """Commands that work: on the embedded models, where these are of a kind that the method takes."""
    models, given = method.shown
    if not models:
        settings = "".join(f" method.{name}={value}" for name, value in given.items())
        yield f"fusionbench run method={method.name}{settings} \\\n    modelpool=clip-mini taskpool=clip-mini"
    if files(method):
        yield f"fusionbench merge {method.name} \\\n    {files(method)} \\"
        yield " ".join(["    -o merged", *(f"{name}={value}" for name, value in given.items())])


def files(method: Method) -> str:
    """Models to merge as files; nothing for a method that gives no checkpoint, or needs data or no models."""
    if not (method.saves and method.makes_checkpoint) or method.needs_tasks or method.kind == "reference":
        return ""
    base = "zoo:clip-mini/base " if method.base else ""
    return " ".join(method.shown[0]) or f"{base}zoo:clip-mini/mnist zoo:clip-mini/emoji"


def python(method: Method) -> str:
    """The same in Python."""
    names, settings = method.shown
    given = "".join(f', {name}="{value}"' for name, value in settings.items() if "=" in method.example)
    pool, tasks = 'fb.load_modelpool("clip-mini")', ', fb.load_taskpool("clip-mini")' if method.needs_tasks else ""
    if names:
        models = ", ".join(f'"{name.rpartition("/")[2]}": "{name}"' for name in names[method.base :])
        base = f', base="{names[0]}"' if method.base else ""
        pool = f"fb.ModelPool({{{models}}}{base})"
    call = f"result = fb.methods.{method.name}(pool{tasks}{given})"
    return f"import fusionbench as fb\n\npool = {pool}\n{call}\n"


def measured(name: str) -> Iterator[str]:
    """The rows of a method in the documents' tables, with those of the base and of the individual models."""
    found = {family: rows(family, "all") for family in MEASURED}
    found = {f: [head, *some] for f, (head, *every) in found.items() if (some := list(_about(every, name)))}
    if not found:
        return
    yield "## Measured"
    for family, (head, *some) in found.items():
        yield f"\nOn [`{family}`](../{family}.md), which has all methods, and what the columns mean:\n"
        yield from (*table(head), *(f"| {' | '.join(row)} |" for row in some))


def choice() -> str:
    """The table of docs/concepts.md, from the table of all methods in docs/clip-mini.md."""
    head, *every = rows("clip-mini", "all")
    columns = [head.index(name) for name in ("method", "average", "g", "seconds", "parameters")]
    lines = table([head[c] for c in columns])
    first = {}
    for row in every:
        first.setdefault(row[0].split()[0], row)  # with the defaults
    lines += [f"| {' | '.join(first[name][c] for c in columns)} |" for name in CHOICE]
    return "\n".join(lines) + "\n"


def rows(family: str, marker: str) -> list[list[str]]:
    """The head and the rows of a table in docs/FAMILY.md."""
    text = (DOCS / f"{family}.md").read_text().partition(f"<!-- {marker} -->")[2].partition("<!-- end -->")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def table(columns: Sequence[str]) -> list[str]:
    """Head of a table."""
    numbers = columns[0] == "method" and "average" in columns
    aligned = ["---", *(["--:"] if numbers else ["---"]) * (len(columns) - 1)]
    return [f"| {' | '.join(columns)} |", f"| {' | '.join(aligned)} |"]


def paper(method: Method) -> str:
    return f"[arXiv {method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else ""


def prose(text: str) -> str:
    """A docstring as Markdown: of its marks only backticks mean something."""
    parts = re.split(r"(`[^`\n]+`)", text)
    return "".join(part if i % 2 else re.sub(r"([\\*_<>\[\]|])", r"\\\1", part) for i, part in enumerate(parts))


def code(text: str) -> str:
    """Code in a cell of a table, in which bars and backslashes would mean something."""
    escaped = html.escape(text).replace("|", "&#124;<wbr>").replace("\\", "&#92;")
    return f"<code>{escaped}</code>" if text else ""


def _about(every: list[list[str]], name: str) -> Iterator[list[str]]:
    if any(row[0].split()[0] == name for row in every):
        yield from (row for row in every if row[0].split()[0] in ("pretrained", name, "individual"))


def _word(value: Any) -> str:
    """A value as YAML and Hydra's words have it."""
    return str(value).lower() if isinstance(value, bool) else str(value) if value != "" else '""'


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    stage(Path(sys.argv[1]))
