"""Chat templates: how a conversation becomes a text, in a file where transformers looks for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from fusionbench.checkpoint import Checkpoint, File
from fusionbench.errors import InputError, did_you_mean
from fusionbench.recipes.tokenizer import as_json, files_of, table_of, text_of

TEMPLATES = Path(__file__).parent / "chat_templates"
FILE = "chat_template.jinja"
OLD = ("chat_template.json", "tokenizer_config.json")  # where it was before


def names() -> list[str]:
    """The templates that come with the package."""
    return sorted(file.stem for file in TEMPLATES.glob("*.jinja"))


def check(choice: str) -> None:
    """An error for what is neither `auto`, a name, nor a template that can be read."""
    if choice == "auto" or choice in names():
        return
    if "{" not in choice:
        raise InputError(f"No chat template is called '{choice}'. {did_you_mean(choice, ['auto', *names()])}")
    try:
        from jinja2 import Environment, TemplateSyntaxError
    except ModuleNotFoundError:
        return  # transformers says it when the template is first used
    try:  # with the tag that transformers adds, of what the model says
        known = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", choice)
        known = re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", known)
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(known)
    except TemplateSyntaxError as error:
        raise InputError(f"chat_template, line {error.lineno} of it: {error.message}") from None


def chat_template(choice: str, models: Mapping[str, Checkpoint], result: Checkpoint) -> dict[str, File]:
    """The files that give a merged model a chat template, see `Checkpoint.files`.

    Args:
        choice: "auto", for the one that most of the models have, the first of equals, or none where none has any; a
            name of `names()`; or a template, as Jinja.
        models: that are merged, as they were read.
        result: the merged model, whose other files may have a template that must go.
    """
    check(choice)
    if choice == "auto":
        found = [text for model in models.values() if (text := template_of(model))]
        if not found:
            return {}
        often = Counter(text.strip() for text in found).most_common(1)[0][0]
        content = next(text for text in found if text.strip() == often)
    else:
        content = (TEMPLATES / f"{choice}.jinja").read_text() if choice in names() else choice
    return {FILE: content.encode(), **_elsewhere(result)}


def template_of(model: Checkpoint) -> str:
    """A model's chat template, where transformers has kept it in one version or another; or none."""
    own = files_of(model, [FILE])
    if FILE in own:
        return text_of(own[FILE])
    for name in OLD:
        said = table_of(model, name).get("chat_template")
        if isinstance(said, list):  # several, by names
            said = next((entry.get("template") for entry in said if entry.get("name") == "default"), None)
        if isinstance(said, str) and said:
            return said
    return ""


def _elsewhere(model: Checkpoint) -> dict[str, File]:
    """The model's other files without the template that they would have."""
    found: dict[str, File] = {}
    for name in OLD:
        table = table_of(model, name)
        if "chat_template" in table:
            del table["chat_template"]
            found[name] = as_json(table) if table else None
    return found
