"""Name the authors and licences of all icon sets and fonts whose drawings the tasks show."""

import gzip
import re
from pathlib import Path

from fusionbench_zoo.recipes.clip_mini.emoji import DRAWINGS
from fusionbench_zoo.recipes.clip_mini.iconify import icon_sets
from fusionbench_zoo.recipes.clip_mini.icons import concept_icons
from fusionbench_zoo.recipes.fetch import SOURCES, folder_of

HEAD = """# Attribution

Made by the recipe from what the packages say of themselves.

## Icon sets (tasks icons and emoji; drawings scaled to 32 x 32 pixels)

| icon set | authors | licence |
|---|---|---|
"""
FONTS = """
## Fonts (tasks letters and house-numbers: pictures of their characters; fonts-noto-core: pre-training alone)

| Debian package | licences named in its copyright file |
|---|---|
"""


def attribution(work: Path) -> str:
    """Return the text, in Markdown."""
    prefixes = sorted({prefix for prefix, _ in concept_icons(work)} | set(DRAWINGS))
    about = icon_sets(work)
    icons = [
        f"| [{about[prefix]['name']}]({about[prefix]['author'].get('url', '')}) `{prefix}` "
        f"| {about[prefix]['author']['name']} "
        f"| [{about[prefix]['license']['spdx']}]({about[prefix]['license'].get('url', '')}) |\n"
        for prefix in prefixes
    ]
    fonts = [
        f"| {source['name']} {source['version']} | {_font_licences(work, source['name'])} |\n"
        for source in SOURCES
        if source["name"].startswith("fonts-")
    ]
    return HEAD + "".join(icons) + FONTS + "".join(fonts)


# What older copyright files say in sentences, most telling first.
PHRASES = {
    r"as a special exception, if you create a document which uses this\s+font": "GPL with font exception",
    r"SIL Open Font License": "OFL",
    r"GNU General Public License": "GPL",
}


def _font_licences(work: Path, package: str) -> str:
    file = next(folder_of(work, package).rglob("copyright*"))
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    text = raw.decode(errors="replace")
    names = {name.strip().rstrip(" ,") for name in re.findall(r"^License: *(\S.*)$", text, flags=re.MULTILINE)}
    short = sorted(name for name in names if len(name) < 40 and " is " not in name)  # others are sentences
    said = [licence for phrase, licence in PHRASES.items() if re.search(phrase, text, re.IGNORECASE)]
    return ", ".join(short or said[:1]) or "free, in Debian's words (main); see its copyright file"
