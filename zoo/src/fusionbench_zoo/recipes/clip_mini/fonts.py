"""Letters and digits in many typefaces, and the characters of 27 scripts."""

import re
import string
import unicodedata
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont

from fusionbench_zoo.recipes.clip_mini.drawings import SIZE, Drawings, collect, coverage
from fusionbench_zoo.recipes.clip_mini.partition import part_of, picture_hashes
from fusionbench_zoo.recipes.clip_mini.words import a
from fusionbench_zoo.recipes.fetch import SOURCES, folder_of

LETTERS = list(string.ascii_lowercase)  # the names of the classes; the pictures show capitals
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SCRIPTS = {  # name: first and last code point
    "latin": (0x41, 0x24F),
    "greek": (0x391, 0x3C9),
    "cyrillic": (0x410, 0x481),
    "armenian": (0x531, 0x587),
    "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x620, 0x6D3),
    "devanagari": (0x904, 0x939),
    "bengali": (0x985, 0x9B9),
    "gujarati": (0xA85, 0xAB9),
    "tamil": (0xB85, 0xBB9),
    "telugu": (0xC05, 0xC39),
    "kannada": (0xC85, 0xCB9),
    "malayalam": (0xD05, 0xD3A),
    "sinhala": (0xD85, 0xDC6),
    "thai": (0xE01, 0xE2E),
    "lao": (0xE81, 0xEAE),
    "tibetan": (0xF40, 0xF6C),
    "myanmar": (0x1000, 0x1021),
    "georgian": (0x10D0, 0x10FA),
    "ethiopic": (0x1200, 0x1357),
    "cherokee": (0x13A0, 0x13F4),
    "canadian aboriginal": (0x1401, 0x166C),
    "khmer": (0x1780, 0x17B3),
    "mongolian": (0x1820, 0x1877),
    "tifinagh": (0x2D30, 0x2D67),
    "vai": (0xA500, 0xA60C),
    "yi": (0xA000, 0xA48C),
}
NOTO = "fonts-noto-core"
MOST_FONTS = 12  # of one family
MOST_CHARACTERS = 400  # of one script


def letters(work: Path) -> Drawings:
    """Draw the capitals A-Z; a family of typefaces is one group."""
    rows = []
    for family, font in _typefaces(work):
        for label, name in enumerate(LETTERS):
            rows.append((_glyph(font, name.upper()), family, [f"the letter {name}", f"a capital {name}", name], label))
    return _drawings(rows)


def digits(work: Path) -> Drawings:
    """Draw 0-9 in the typefaces of the letters' pre-training part: what the base may know about MNIST."""
    rows = []
    for family, font in _typefaces(work):
        if part_of("letters", family) == "pretrain":
            for digit, name in enumerate(DIGITS):
                captions = [f"the digit {name}", f"the number {name}", f"the digit {digit}", name]
                rows.append((_glyph(font, str(digit)), family, captions, -1))
    return _drawings(rows)


def house_numbers(work: Path) -> Drawings:
    """Draw 0-9 in all other typefaces, but for the few pictures that pre-training's typefaces draw just so."""
    rows = []
    for family, font in _typefaces(work):
        if part_of("letters", family) != "pretrain":
            rows += [(_glyph(font, str(digit)), family, [], digit) for digit in range(10)]
    drawings = _drawings(rows)
    seen = set(picture_hashes(digits(work).images))
    return drawings.take(np.array([h not in seen for h in picture_hashes(drawings.images)]).nonzero()[0])


def scripts(work: Path) -> Drawings:
    """Draw characters of each script in the Noto fonts that have them; a code point is one group."""
    rows: dict[int, list] = {label: [] for label in range(len(SCRIPTS))}
    for file in sorted((folder_of(work, NOTO) / "usr/share/fonts").rglob("Noto*-Regular.ttf")):
        known, font = TTFont(file, lazy=True).getBestCmap(), ImageFont.truetype(file, 40)
        for label, (name, (first, last)) in enumerate(SCRIPTS.items()):
            points = [p for p in range(first, last + 1) if p in known and unicodedata.category(chr(p))[0] == "L"]
            for point in points if len(points) >= 10 else []:
                captions = [f"{a(name)} character", f"{name} script", unicodedata.name(chr(point), name).lower()]
                rows[label].append((font, point, captions, label))
    random = np.random.default_rng(0)
    chosen = [found[i] for found in rows.values() for i in random.permutation(len(found))[:MOST_CHARACTERS]]
    return _drawings([(_glyph(font, chr(point)), str(point), *rest) for font, point, *rest in chosen])


def _drawings(rows: list[tuple]) -> Drawings:
    """Collect (grey picture or nothing, group, captions, label) rows."""
    return collect([(coverage(image[None])[0], *rest) for image, *rest in rows if image is not None])


def _typefaces(work: Path) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """Return (family, typeface) of every font with Latin capitals, at most twelve of a family."""
    packages = [s["name"] for s in SOURCES if s["name"].startswith("fonts-") and s["name"] != NOTO]
    files = sorted(f for p in packages for f in folder_of(work, p).rglob("*.[ot]t[fc]") if not f.is_symlink())
    families: dict[str, list[Path]] = {}
    for file in files:
        try:
            has_capitals = set(map(ord, string.ascii_uppercase)) <= set(
                TTFont(file, lazy=True, fontNumber=0).getBestCmap()
            )
        except (TTLibError, TypeError):  # not a Unicode font
            continue
        if has_capitals:
            # `LiberationSans-Bold` and `LiberationMono` are one family: their figures are relatives.
            family = re.match("[A-Za-z][a-z]*", file.stem.lstrip("0123456789_"))[0].lower()
            families.setdefault(family, []).append(file)
    spread = {family: files[:: -(-len(files) // MOST_FONTS)] for family, files in families.items()}
    return [(family, ImageFont.truetype(file, 40)) for family, files in spread.items() for file in files]


def _glyph(font: ImageFont.FreeTypeFont, text: str, margin: int = 4) -> np.ndarray | None:
    """Draw `text` white on black as large as it fits in 32 x 32, or return nothing if it has no ink."""
    left, top, right, bottom = font.getbbox(text)
    width, height = right - left, bottom - top
    if width < 2 or height < 2:
        return None
    side = max(width, height) + 2 * margin
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).text(((side - width) / 2 - left, (side - height) / 2 - top), text, font=font, fill=255)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
