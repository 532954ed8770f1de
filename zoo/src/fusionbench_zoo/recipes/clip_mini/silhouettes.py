"""Filled shapes of animals and clothes, made of icons and emoji: what the base may know about those two tasks."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fusionbench_zoo.recipes.clip_mini import animals, emoji, icons
from fusionbench_zoo.recipes.clip_mini.drawings import Drawings
from fusionbench_zoo.recipes.clip_mini.iconify import Icon, drawn, icon_names
from fusionbench_zoo.recipes.clip_mini.partition import part_of
from fusionbench_zoo.recipes.clip_mini.words import a, name_words

CLOTHES = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
# Words of icon names, by what they show.
CLOTHES_WORDS = {
    "t-shirt": "tshirt tee jersey",
    "trousers": "trousers pants jeans slacks",
    "pullover": "pullover sweater hoodie jumper sweatshirt",
    "dress": "dress gown",
    "coat": "coat jacket labcoat",
    "sandal": "sandal sandals flipflop flipflops slipper slippers heel heels",
    "shirt": "shirt blouse",
    "sneaker": "sneaker sneakers shoe shoes",
    "bag": "bag handbag purse tote",
    "ankle boot": "boot boots",
}
ANIMAL_WORDS = {name: name for name in animals.CLASSES} | {
    "bear": "bear panda koala",
    "bird": "bird dove crow raven sparrow eagle swallow parrot hummingbird kiwi",
    "cow": "cow bull ox buffalo",
    "horse": "horse unicorn",
    "sheep": "sheep ram ewe lamb",
}
# With these the icon shows something else: a hot dog, a horse shoe, a heading that says "dress code".
NOT_ALONE = set(
    "hot house bowl food off slash no code check plus minus add remove x shoe rack box badge crypto bnb mascot "
    "wash machine money tea golf sleeping mitten milk shopping market tag horn print paw trap bone".split()
)


MOST_OF_ONE = 120  # half of all clothes would be bags


def silhouettes(work: Path) -> Drawings:
    """Fill the outlines of animals."""
    return _filled(work, ANIMAL_WORDS, lambda name: [f"a silhouette of {a(name)}", f"the shape of {a(name)}", name])


def clothes(work: Path) -> Drawings:
    """Fill the outlines of clothes, shoes and bags."""
    return _filled(work, CLOTHES_WORDS, lambda name: [f"a photo of {a(name)}", f"a picture of {a(name)}", name])


def _filled(work: Path, meanings: dict[str, str], captions: Callable[[str], list[str]]) -> Drawings:
    named = {word: name for name, words in meanings.items() for word in words.split()}
    sources = icons.general_icons(work, colour=False) + icons.general_icons(work, colour=True) + _free_emoji(work)
    wanted, names = [], []
    for prefix, icon in sorted(sources, key=lambda icon: hashlib.sha256(":".join(icon).encode()).digest()):
        words = name_words(
            icon.replace("t-shirt", "tshirt").replace("flip-flop", "flipflop").replace("lab-coat", "labcoat")
        )
        shown = [named[word] for word in words if word in named]
        clear = len(shown) == 1 and len(words) < 4 and not NOT_ALONE & set(words)
        if clear and icons.may_be_shown(prefix, tuple(words)) and names.count(shown[0]) < MOST_OF_ONE:
            wanted.append((prefix, icon))
            names.append(shown[0])
    found = drawn(
        work, wanted, [prefix for prefix, _ in wanted], [captions(name) for name in names], [-1] * len(wanted)
    )
    found.images = np.stack([_fill(image) for image in found.images])
    return found


def _free_emoji(work: Path) -> list[Icon]:
    return [
        (prefix, name)
        for prefix in emoji.DRAWINGS
        for name in icon_names(work, prefix)
        if part_of("emoji", emoji.concept(name)) == "pretrain"
    ]


def _fill(image: np.ndarray) -> np.ndarray:
    """Cover everything that a line encloses."""
    ink = Image.fromarray(np.pad((image[..., 3] > 96).astype(np.uint8), 1)).copy()  # a copy can be drawn on
    ImageDraw.floodfill(ink, (0, 0), 2)
    outside = np.asarray(ink)[1:-1, 1:-1] == 2
    filled = np.zeros_like(image)
    filled[..., 3] = np.where(outside, image[..., 3], 255)
    return filled
