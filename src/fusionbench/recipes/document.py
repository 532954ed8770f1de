"""YAML whose every key and value knows its line: what is wrong in a file is found at once, and told in one error.

    [root] = read("recipe.yaml")
    fields = root.fields(("base_model", "experts"), required=("experts",))
    base = fields["base_model"].text() if "base_model" in fields else ""
    root.problems.stop()  # an error that lists everything that was found, one a line, if there is anything

What is wrong is noted, and stood for by something harmless of the right type, so that the reader can go on to the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fusionbench.errors import InputError, did_you_mean
from fusionbench.registry import Range

LONGEST = 1_000_000  # characters; a recipe is a page or two


@dataclass
class Problems:
    """What is wrong in a file, by line.

    Attributes:
        file: as it is named in messages.
        text: its content.
        found: line, from 1, and what is wrong there.
    """

    file: str
    text: str = ""
    found: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, message: str) -> None:
        if (line, message) not in self.found:  # an anchor's value is read wherever it is used
            self.found.append((line, message))

    def stop(self) -> None:
        """One error with everything that was found, in the order of the file; none where nothing was."""
        if self.found:
            raise InputError("\n".join(f"{self.file}:{line}: {message}" for line, message in sorted(self.found)))


@dataclass(frozen=True)
class Node:
    """A value in a file: a table, a list, or a text, number, flag or null; and where it stands.

    Attributes:
        name: its key, or that of the list it is in, as messages call it.
    """

    name: str
    yaml: yaml.Node
    problems: Problems

    @property
    def line(self) -> int:
        """Of its first character, from 1."""
        return self.yaml.start_mark.line + 1

    @property
    def is_table(self) -> bool:
        return isinstance(self.yaml, yaml.MappingNode)

    @property
    def is_list(self) -> bool:
        return isinstance(self.yaml, yaml.SequenceNode)

    @property
    def is_null(self) -> bool:
        return self.yaml.tag == "tag:yaml.org,2002:null"

    def wrong(self, message: str) -> None:
        """Note what is wrong here."""
        self.problems.add(self.line, message)

    def fields(self, known: Iterable[str], required: Iterable[str] = ()) -> dict[str, Node]:
        """A table's values by key, nulls left out; problems for unknown, repeated and missing keys."""
        known = list(known)
        if not self.is_table:
            self._expected(f"a table of {', '.join(known)}")
            return {}
        fields: dict[str, Node] = {}
        for key, value in self._pairs():
            if key.name not in known:
                key.wrong(f"{self.name or 'the recipe'} takes no '{key.name}'. {did_you_mean(key.name, known)}")
            elif not value.is_null:
                fields[key.name] = value
        for key in required:
            if key not in fields:
                self.wrong(f"{self.name or 'the recipe'} has no '{key}'.")
        return fields

    def entries(self) -> dict[str, Node]:
        """A table's values by key, whatever the keys; problems for repeated ones."""
        if not self.is_table:
            self._expected("a table")
            return {}
        return {key.name: value for key, value in self._pairs()}

    def items(self, least: int = 0) -> list[Node]:
        """A list's values; a problem where there are fewer than `least`."""
        if not isinstance(self.yaml, yaml.SequenceNode):
            self._expected("a list")
            return []
        if len(self.yaml.value) < least:
            self.wrong(f"{self.name} needs at least {least} {'entry' if least == 1 else 'entries'}.")
        return [Node(self.name, value, self.problems) for value in self.yaml.value]

    def text(self) -> str:
        """A text, or what is written where one is expected: a folder may be called 3.1."""
        if not isinstance(self.yaml, yaml.ScalarNode) or self.is_null or not self.yaml.value:
            self._expected("a text")
            return ""
        return self.yaml.value

    def choice(self, options: Iterable[str]) -> str:
        """One of these texts; the first of them stands for any other."""
        options = list(options)
        if not isinstance(self.yaml, yaml.ScalarNode) or self.yaml.value not in options:
            if isinstance(self.yaml, yaml.ScalarNode):
                self.wrong(f"{self.name} cannot be '{self.yaml.value}'. {did_you_mean(self.yaml.value, options)}")
            else:
                self._expected(f"one of {', '.join(options)}")
            return options[0]
        return self.yaml.value

    def number(self, within: Range | None = None) -> float:
        """A finite number, also where YAML reads it as text: 1e-4 is one."""
        value = math.nan
        if isinstance(self.yaml, yaml.ScalarNode) and not self._is_flag and "_" not in self.yaml.value:
            with suppress(ValueError):
                value = float(self.yaml.value)
        if not math.isfinite(value):
            self._expected("a number" if within in (None, Range()) else f"a number in {within}")
        elif within is not None and value not in within:
            self.wrong(f"{self.name} must be in {within}; got {self.yaml.value}.")
        else:
            return value
        return 1.0

    def whole(self, within: Range | None = None) -> int:
        """A whole number."""
        value = self.number(within)
        if value != int(value):
            self.wrong(f"{self.name} must be a whole number; got {value:g}.")
        return int(value)

    def flag(self) -> bool:
        """True or false, which may be written as 1 or 0."""
        if isinstance(self.yaml, yaml.ScalarNode):
            word = self.yaml.value.lower()
            if self._is_flag or word in ("0", "1", "0.0", "1.0"):
                return word in ("true", "yes", "on", "1", "1.0")
        self._expected("true or false")
        return False

    def plain(self, depth: int = 3) -> Any:
        """The value as Python has it: what YAML makes of it, but for texts that are numbers, as 1e-4.

        Tables and lists may be in each other `depth` deep: anchors can make a short file endless.
        """
        if (self.is_table or self.is_list) and not depth:
            self._expected("less deeply nested")
            return None
        if self.is_table:
            return {name: value.plain(depth - 1) for name, value in self.entries().items()}
        if self.is_list:
            return [item.plain(depth - 1) for item in self.items()]
        try:
            value = yaml.SafeLoader("").construct_object(self.yaml)
        except (yaml.YAMLError, ValueError):  # a tag, or a date that is none
            self._expected("a number, a text, true, false or null")
            return None
        if isinstance(value, str) and isinstance(self.yaml, yaml.ScalarNode) and self.yaml.style is None:
            with suppress(ValueError):
                return float(value)
        return value

    def __str__(self) -> str:
        """As it is shown in messages."""
        if isinstance(self.yaml, yaml.ScalarNode):
            return "nothing" if self.is_null else repr(self.yaml.value)
        return "a table" if self.is_table else "a list"

    @property
    def _is_flag(self) -> bool:
        return self.yaml.tag == "tag:yaml.org,2002:bool"

    def _expected(self, wanted: str) -> None:
        self.wrong(f"{self.name or 'the recipe'} must be {wanted}; got {self}.")

    def _pairs(self) -> Iterator[tuple[Node, Node]]:
        """Keys and values of a table, each key once. A key's name is its text."""
        seen: dict[str, int] = {}
        merged: list[tuple[Any, Any]] = []
        for key, value in self.yaml.value:
            if key.tag == "tag:yaml.org,2002:merge":  # <<: *anchor
                tables = value.value if isinstance(value, yaml.SequenceNode) else [value]
                merged += [pair for table in tables if isinstance(table, yaml.MappingNode) for pair in table.value]
                continue
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            if name in seen:
                self.problems.add(
                    key.start_mark.line + 1, f"'{name}' is given twice; line {seen[name]} has it already."
                )
                continue
            seen[name] = key.start_mark.line + 1
            yield Node(name, key, self.problems), Node(name, value, self.problems)
        for key, value in merged:
            if key.value not in seen:
                seen[key.value] = key.start_mark.line + 1
                yield Node(str(key.value), key, self.problems), Node(str(key.value), value, self.problems)


def read(path: str | Path) -> list[Node]:
    """The documents of a YAML file, of which there is at least one; they share their problems. No code is run.

    Raises:
        InputError: where there is no such file, or it is no YAML.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"'{path}' does not exist, or is no file: name a recipe.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is no text in UTF-8: {error.reason} at byte {error.start}.") from None
    if len(text) > LONGEST:
        raise InputError(f"'{path}' has {len(text):,} characters: a recipe has at most {LONGEST:,}.")
    return parse(text, str(path))


def parse(text: str, file: str) -> list[Node]:
    """Like `read`, of the content of a file that messages call `file`."""
    problems = Problems(file, text)
    try:
        documents = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if node is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
        line = 1 if mark is None else mark.line + 1
        raise InputError(f"{file}:{line}: this is no YAML: {reason}.") from None
    except RecursionError:
        raise InputError(f"'{file}' is nested too deeply.") from None
    documents = [node for node in documents if node.tag != "tag:yaml.org,2002:null"]
    if not documents:
        raise InputError(f"'{file}' is empty: it should hold a recipe.")
    return [Node("", node, problems) for node in documents]
