"""HTML and SVG by functions: what is no HTML yet is escaped, so that no name of a method or a task can do harm."""

from __future__ import annotations

from html import escape

VOID = ("input", "wbr")


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, *children: object, **attributes: object) -> Html:
    """An element; a child that is no `Html` is text.

    Attributes are named as in HTML, with `_` for `-` (`class_` for `class`); what is None or False is left away.
    """
    inner = joined(*children)
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape("" if value is True else str(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{given}>" if name in VOID else f"<{name}{given}>{inner}</{name}>")


def joined(*children: object) -> Html:
    """Several, one after the other."""
    return Html("".join(child if isinstance(child, Html) else escape(str(child)) for child in children))


def table(
    header: list[Html], bodies: list[list[Html]], *, label: str, sortable: bool = False, foot: Html | None = None
) -> Html:
    """A table that scrolls inside its box, of header cells and of rows, in several bodies; the last one is sorted."""
    parts = [element("thead", element("tr", *header)), *(element("tbody", *rows) for rows in bodies if rows)]
    inner = element("table", *parts, *([foot] if foot else []), class_="sortable" if sortable else None)
    return scrolling(inner, label)


def scrolling(inner: Html, label: str) -> Html:
    """A box that scrolls, also by keyboard, where what is inside is wider."""
    return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=label)


def row(first: object, *cells: Html, **attributes: object) -> Html:
    """A row with its header."""
    return element("tr", element("th", first, scope="row"), *cells, **attributes)


def column(title: object, **attributes: object) -> Html:
    """The header of a column."""
    return element("th", title, scope="col", **attributes)


def number(value: float | None, text: str, **attributes: object) -> Html:
    """A cell with a number: as it is kept, for sorting, and as it is shown."""
    return element("td", text, data_v=None if value is None else repr(value), **attributes)


def percent(value: float | None, *, sign: bool = False, **attributes: object) -> Html:
    """A cell with a score, in percent."""
    if value is None:
        return element("td", class_="none")
    return number(value, percents(value, sign=sign), **attributes)


def percents(value: float, *, sign: bool = False) -> str:
    """A score in percent, with a true minus."""
    return f"{100 * value:{'+' if sign else ''}.1f}".replace("-", "−")
