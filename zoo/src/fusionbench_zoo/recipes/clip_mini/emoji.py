"""Emoji in nine drawings, labelled with their Unicode group; national flags in four more."""

import re
from pathlib import Path

from fusionbench_zoo.recipes.clip_mini.drawings import Drawings
from fusionbench_zoo.recipes.clip_mini.iconify import drawn, icon_names, icon_set, icon_sets
from fusionbench_zoo.recipes.clip_mini.partition import part_of
from fusionbench_zoo.recipes.clip_mini.words import a

CLASSES = [
    "activities",
    "animals and nature",
    "food and drink",
    "objects",
    "people and body",
    "smileys and emotion",
    "symbols",
    "travel and places",
    "flags",
]
NAMED_ALIKE = ["noto", "twemoji", "openmoji", "fluent-emoji-flat", "noto-v1"]  # their categories are Unicode's
DRAWINGS = [*NAMED_ALIKE, "fluent-emoji-high-contrast", "emojione", "emojione-v1", "fxemoji"]
SKIN_TONE = re.compile("skin-tone|-(light|medium|medium-light|medium-dark|dark)$")
COUNTRY_FLAGS = {
    "circle-flags": "",
    "flag": "-4x3",
    "flagpack": "",
    "cif": "",
}  # by icon set, what follows the country code


def emoji(work: Path) -> Drawings:
    """Draw the emoji whose group is known; skin tones are left out, and all genders of a name are one group."""
    labels = _unicode_groups(work)
    wanted = [
        (prefix, name)
        for prefix in DRAWINGS
        for name in icon_names(work, prefix)
        if name in labels and not SKIN_TONE.search(name)
    ]
    captions = [_captions(name, CLASSES[labels[name]]) for _, name in wanted]
    return drawn(work, wanted, [concept(name) for _, name in wanted], captions, [labels[name] for _, name in wanted])


def country_flags(work: Path) -> Drawings:
    """Draw the flags of countries whose flag emoji is in the pre-training part."""
    names = {
        chr(int(code[0], 16) - 0x1F1E6 + 97) + chr(int(code[1], 16) - 0x1F1E6 + 97): name
        for chars, name in icon_set(work, "twemoji")["chars"].items()
        if len(code := chars.split("-")) == 2 and all(re.fullmatch("1f1[ef][0-9a-f]", c) for c in code)
    }
    wanted = [
        (prefix, country + ending)
        for prefix, ending in COUNTRY_FLAGS.items()
        if prefix in icon_sets(work)
        for country, name in names.items()
        if country + ending in icon_set(work, prefix)["icons"] and part_of("emoji", concept(name)) == "pretrain"
    ]
    shown = [names[name[:2]] for _, name in wanted]
    captions = [_captions(name, "flags") for name in shown]
    return drawn(work, wanted, [concept(name) for name in shown], captions, [-1] * len(wanted))


def concept(name: str) -> str:
    """Return what an emoji shows, without gender and spelling: `man-running` and `woman-running` are `running`."""
    words = name.removeprefix("flag-for-").removeprefix("flag-").split("-")
    kept = [
        w for w in words if w not in ("man", "woman", "person", "men", "women", "people", "boy", "girl", "s", "with")
    ]
    return "".join(kept or words)


def _unicode_groups(work: Path) -> dict[str, int]:
    labels: dict[str, int] = {}
    for prefix in NAMED_ALIKE:
        for category, names in icon_set(work, prefix)["categories"].items():
            group = category.lower().replace("&", "and").replace("  ", " ")
            group = {g.replace(" and ", " "): g for g in CLASSES}.get(group.replace(" and ", " "))
            for name in names if group else []:
                labels.setdefault(name, CLASSES.index(group))
    return labels


def _captions(name: str, group: str) -> list[str]:
    words = name.replace("-", " ")
    return [words, f"an emoji of {group}", f"an emoji of {a(words)}", f"{words}, {group}"]
