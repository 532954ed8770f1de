"""Icons-40, and all other icons as pairs of picture and name."""

import hashlib
from collections import defaultdict
from pathlib import Path

from fusionbench_zoo.recipes.clip_mini.drawings import Drawings
from fusionbench_zoo.recipes.clip_mini.iconify import Icon, drawn, family, icon_names, icon_sets
from fusionbench_zoo.recipes.clip_mini.partition import part_of
from fusionbench_zoo.recipes.clip_mini.words import a, name_words

CLASSES = (
    "calendar, star, heart, bookmark, camera, folder, link, flag, home, clock, "
    "lock, cloud, tag, phone, book, eye, globe, key, moon, credit card, "
    "bell, shield, map, compass, sun, keyboard, gift, briefcase, trash, database, "
    "trophy, rocket, calculator, microphone, car, bug, laptop, umbrella, shopping cart, printer"
).split(", ")
# Also other words for the same things: a held-out family's `house` may be its `home` under another name.
CONCEPT_WORDS = {word for name in CLASSES for word in name.split()} | set(
    "house bin garbage telephone call mic present chain world earth notification alarm insect automobile cart "
    "notebook agenda watch favorite like security night".split()
)
MOST_PAIRS = 120_000


def icons(work: Path) -> Drawings:
    """Draw the icons named exactly as a class, style words aside; a family of icon sets is one group."""
    wanted = concept_icons(work)
    labels = [CLASSES.index(_concept(name)) for _, name in wanted]
    return drawn(work, wanted, [family(p) for p, _ in wanted], [_captions(CLASSES[label]) for label in labels], labels)


def concept_icons(work: Path) -> list[Icon]:
    """List the icons that are named as a class."""
    return [icon for icon in general_icons(work, colour=False) if _concept(icon[1]) in CLASSES]


def other_icons(work: Path) -> Drawings:
    """Draw icons whose name occurs in at least two families."""
    families, candidates = defaultdict(set), []
    for prefix, name in general_icons(work, colour=False) + general_icons(work, colour=True):
        words = tuple(name_words(name))
        families[words].add(family(prefix))
        if len("".join(words)) > 1 and may_be_shown(prefix, words):
            candidates.append((prefix, name, words))
    candidates = [icon for icon in candidates if len(families[icon[2]]) > 1]
    candidates.sort(key=lambda icon: hashlib.sha256(f"{icon[0]}:{icon[1]}".encode()).digest())
    chosen = sorted(candidates[:MOST_PAIRS])
    wanted = [(prefix, name) for prefix, name, _ in chosen]
    captions = [_captions(" ".join(words)) for _, _, words in chosen]
    return drawn(work, wanted, [p for p, _ in wanted], captions, [-1] * len(wanted))


def may_be_shown(prefix: str, words: tuple[str, ...]) -> bool:
    """Say whether pre-training may see an icon: a held-out family shows none of the 40 concepts, not even in part."""
    singular = {word.removesuffix("s") for word in words} | set(words)
    return part_of("icons", family(prefix)) == "pretrain" or not CONCEPT_WORDS & singular


def general_icons(work: Path, colour: bool) -> list[Icon]:
    """List, in a fixed order, the icons of the sets that are neither emoji, logos nor flags."""
    prefixes = [
        prefix
        for prefix, info in sorted(icon_sets(work).items())
        if bool(info.get("palette")) == colour
        and info.get("category") not in ("Emoji", "Logos", "Programming")
        and not (colour and info.get("category") == "Flags / Maps")
        and prefix != "fluent-emoji"  # an emoji set, though Iconify gives it no category
    ]
    return [(prefix, name) for prefix in prefixes for name in icon_names(work, prefix)]


def _concept(name: str) -> str:
    """Return the words of a name without the number of the drawing: `trash-2` is a trash."""
    words = name_words(name)
    return " ".join(words[:-1] if len(words) > 1 and words[-1].isdigit() else words)


def _captions(name: str) -> list[str]:
    return [name, f"an icon of {a(name)}", f"a picture of {a(name)}"]
