"""From file-like names to English."""

import re

# How an icon is drawn, not what it shows.
STYLE_WORDS = set(
    "outline outlined line linear solid fill filled bold light thin duotone rounded round sharp regular alt variant "
    "twotone tone broken bulk mini micro sm lg md xs xl o f s l color colored flat icon rg two".split()
)
SIZE_WORD = re.compile(r"(10|12|14|15|16|18|20|24|28|32|36|48|64|96|1em)(px)?$")


def name_words(name: str) -> list[str]:
    """Return the words of an icon's name without those that tell its style or size."""
    words = name.lower().replace("_", "-").split("-")
    while len(words) > 1 and SIZE_WORD.match(words[-1]):
        words.pop()
    return [word for word in words if word and word not in STYLE_WORDS]


def a(phrase: str) -> str:
    """Put the article before a phrase."""
    return f"{'an' if phrase[:1] in tuple('aeiou') else 'a'} {phrase}"
