"""Charts as SVG: lines, points, radars, strips and heat maps. Their classes have colours in page.css."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fusionbench.report.elements import Html, element, joined

COLOURS, MARKERS = 7, 6
DASHES = ("", "7 3", "2 3", "9 3 2 3")
WIDTH, HEIGHT = 400, 280
WIDE = (540, 330)
SHOWN = 7
"""So many series are shown at first, where there are more: one for each colour."""


@dataclass(frozen=True)
class Point:
    """A point of a series: `tip` is what it says when it is pointed at."""

    x: float
    y: float
    tip: str


@dataclass(frozen=True)
class Series:
    """Points under a label; `style` chooses colour, marker and dashes, -1 those of a reference."""

    label: str
    points: list[Point]
    style: int
    shown: bool = True
    spread: list[Point] = field(default_factory=list)


class Styles:
    """A style for every label, the same on the whole page."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {"pretrained": -1, "individual": -2}

    def __getitem__(self, label: str) -> int:
        return self._known.setdefault(label, len(self._known) - 2)


def apart(series: Sequence[Series]) -> list[Series]:
    """The series, those whose colour or marker another one has already in such that are free."""
    found: list[Series] = []
    for one in series:
        taken = [other.style for other in found if other.style >= 0]
        colours, markers = {s % COLOURS for s in taken}, {s % MARKERS for s in taken}
        style = one.style
        if style >= 0 and (style % COLOURS in colours or style % MARKERS in markers):
            others = [s for s in range(COLOURS * MARKERS) if s % COLOURS not in colours]
            style = next((s for s in others if s % MARKERS not in markers), next(iter(others), style))
        found.append(replace(one, style=style))
    return found


def classes(style: int) -> str:
    """The classes that colour a series."""
    return f"c{style % COLOURS}" if style >= 0 else "ref"


def dash(style: int) -> str | None:
    """A pattern of dashes: two series of one colour have others."""
    return (DASHES[(style + style // COLOURS) % len(DASHES)] or None) if style >= 0 else {-1: "4 4"}.get(style)


def marker(style: int, x: float, y: float, size: float = 4.2, tip: str = "", **attributes: object) -> Html:
    """A marker; the shape goes with the style, so that colour alone tells nothing."""
    s = size
    shapes = {
        0: "",
        1: f"M{-s:.1f} {-s:.1f}H{s:.1f}V{s:.1f}H{-s:.1f}Z",
        2: f"M0 {-1.2 * s:.1f}L{1.1 * s:.1f} {0.9 * s:.1f}H{-1.1 * s:.1f}Z",
        3: f"M0 {-1.35 * s:.1f}L{1.35 * s:.1f} 0L0 {1.35 * s:.1f}L{-1.35 * s:.1f} 0Z",
        4: f"M0 {1.2 * s:.1f}L{1.1 * s:.1f} {-0.9 * s:.1f}H{-1.1 * s:.1f}Z",
        5: f"M{-s:.1f} {-s:.1f}L{s:.1f} {s:.1f}M{s:.1f} {-s:.1f}L{-s:.1f} {s:.1f}",
    }
    kind = style % MARKERS if style >= 0 else 0
    names = f"mark {classes(style)}" + (" cross" if kind == 5 else " hollow" if style == -1 else "")
    inside = [element("title", tip)] if tip else []
    if kind == 0:
        return element("circle", *inside, cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{s:.1f}", class_=names, **attributes)
    place = f"translate({x:.1f} {y:.1f})"
    return element("path", *inside, d=shapes[kind], transform=place, class_=names, **attributes)


def swatch(style: int, *, line: bool = True) -> Html:
    """A series' marker, and its line, for a legend."""
    parts = (
        [element("path", d="M1 7H29", class_=f"line {classes(style)}", stroke_dasharray=dash(style))] if line else []
    )
    left, width = (0, 30) if line else (8, 14)
    view = f"{left} 0 {width} 14"
    return element("svg", *parts, marker(style, 15, 7), viewBox=view, width=width, height="14", aria_hidden="true")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover an interval."""
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    step = (high - low) / count
    power = 10.0 ** math.floor(math.log10(step))
    step = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= step * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float] | None = None,
    y_range: tuple[float, float] | None = None,
    references: Sequence[tuple[str, float]] = (),
    named: bool = True,
    logarithmic: bool = False,
) -> Html:
    """Curves; with their names at their ends, or without where a legend tells them."""
    ys = [p.y for s in series for p in s.points] + [y for _, y in references]
    low, high = y_range or (min(ys), max(ys))
    y_ticks = ticks(low, high)
    xs = sorted({p.x for s in series for p in s.points})
    right = 124 if named else 12
    frame = _Frame(WIDTH, HEIGHT, right=right, logarithmic=logarithmic)
    if logarithmic:
        frame.x = (xs[0], xs[-1])
        x_ticks = x_ticks or _powers(xs[0], xs[-1])
    else:
        x_ticks = x_ticks or ticks(xs[0], xs[-1])
        frame.x = (min(x_ticks[0], xs[0]), max(x_ticks[-1], xs[-1]))
    frame.y = (y_ticks[0], y_ticks[-1])
    parts = [frame.axes([(x, f"{x:g}") for x in x_ticks], y_ticks, x_label, y_label)]
    ends: list[tuple[float, float, str, int, int | None]] = []
    for label, y in references:
        style = -1 if label == "pretrained" else -2
        path = f"M{frame.left} {frame.at_y(y):.1f}H{frame.width - frame.right}"
        tip = element("title", f"{label}: {100 * y:.1f}")
        parts.append(element("path", tip, d=path, class_="line ref", stroke_dasharray=dash(style)))
        ends.append((frame.width - frame.right, frame.at_y(y), label, -1, None))
    for i, one in enumerate(series):
        if not one.points:
            continue
        places = [(frame.at_x(p.x), frame.at_y(p.y)) for p in one.points]
        inside = [
            element("path", d=_path(places), class_=f"line {classes(one.style)}", stroke_dasharray=dash(one.style)),
            *(_dot(frame.at_x(p.x), frame.at_y(p.y), one.style, p.tip) for p in one.spread),
            *(marker(one.style, x, y, 3.6, p.tip) for (x, y), p in zip(places, one.points, strict=True)),
        ]
        parts.append(_series(i, one, inside))
        ends.append((*places[-1], one.label, one.style, i))
    if named:
        hidden = {i for i, one in enumerate(series) if not one.shown}
        parts += _names(ends, frame, hidden)
    return _svg(parts, title)


def points(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    front: Sequence[tuple[float, float]],
) -> Html:
    """Points of costs, none below zero, and scores. The front goes through those that no other one beats in both."""
    ys = [p.y for s in series for p in s.points]
    y_ticks = ticks(min(ys), max(ys))
    xs = sorted({p.x for s in series for p in s.points})
    positive = [x for x in xs if x > 0]
    frame = _Frame(*WIDE, right=30, logarithmic=True)
    frame.y = (y_ticks[0], y_ticks[-1])
    frame.zero = 0 in xs
    frame.x = _decades(positive)
    x_ticks = [(x, _round(x)) for x in _powers(*frame.x)] if positive else []
    parts = [frame.axes([*([(0.0, "0")] if frame.zero else []), *x_ticks], y_ticks, x_label, y_label)]
    if front:
        places = [(frame.at_x(x), frame.at_y(y)) for x, y in front]
        path = f"M{places[0][0]:.1f} {places[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in places[1:])
        parts.append(element("path", d=f"{path}H{frame.width - frame.right}", class_="front"))
    taken: list[tuple[float, float, float, float]] = []
    for one in series:
        for p in one.points:
            x, y = frame.at_x(p.x), frame.at_y(p.y)
            taken.append((x - 5, y - 5, x + 5, y + 5))
    ranked = sorted(
        ((p, s) for s in series for p in s.points), key=lambda ps: ((ps[0].x, ps[0].y) not in front, -ps[0].y)
    )
    for p, one in reversed(ranked):
        best = (p.x, p.y) in front
        parts.append(marker(one.style, frame.at_x(p.x), frame.at_y(p.y), 5.2 if best else 4, p.tip))
    for p, one in ranked:
        best = (p.x, p.y) in front
        place = _free(frame.at_x(p.x), frame.at_y(p.y), _short(one.label), taken, frame, must=best)
        if place:
            x, y, anchor = place
            names = "name best" if best else "name"
            parts.append(
                element("text", _short(one.label), x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=names)
            )
    return _svg(parts, title, *WIDE)


def radar(axes: Sequence[str], series: Sequence[Series], *, title: str, lowest: float, highest: float) -> Html:
    """A polygon for each series, of a point `y` on each of the axes, which begin at `lowest`; 1 is marked."""
    width, height, radius = WIDTH, 330, 118
    middle_x, middle_y = width / 2, height / 2

    def place(i: int, value: float) -> tuple[float, float]:
        angle = 2 * math.pi * i / len(axes) - math.pi / 2
        along = max(value - lowest, 0) / (highest - lowest) * radius
        return middle_x + along * math.cos(angle), middle_y + along * math.sin(angle)

    parts = []
    for ring in [ring for ring in ticks(lowest, 1, 3) if lowest < ring < 0.999] + [1.0]:
        ring_path = _path([place(i, ring) for i in range(len(axes))]) + "Z"
        parts.append(element("path", d=ring_path, class_="one" if ring == 1 else "grid"))
        x, y = place(0, ring)
        parts.append(element("text", f"{ring:g}", x=f"{x + 5:.1f}", y=f"{y + 4:.1f}", class_="tick"))
    for i, name in enumerate(axes):
        (x0, y0), (x, y), (tx, ty) = (
            place(i, value) for value in (lowest, highest, highest + 0.11 * (highest - lowest))
        )
        parts.append(element("path", d=f"M{x0:.1f} {y0:.1f}L{x:.1f} {y:.1f}", class_="grid"))
        anchor = "middle" if abs(tx - middle_x) < 8 else "start" if tx > middle_x else "end"
        text_y = ty + (8 if ty > middle_y + 40 else 0 if ty < middle_y - 40 else 4)
        parts.append(
            element("text", _short(name, 14), x=f"{tx:.1f}", y=f"{text_y:.1f}", text_anchor=anchor, class_="name")
        )
    for i, one in enumerate(series):
        places = [place(j, p.y) for j, p in enumerate(one.points)]
        names = f"line {classes(one.style)}"
        inside = [
            element("path", d=_path(places) + "Z", class_=names, stroke_dasharray=dash(one.style)),
            *(marker(one.style, x, y, 3.4, p.tip) for (x, y), p in zip(places, one.points, strict=True)),
        ]
        parts.append(_series(i, one, inside))
    return _svg(parts, title, width, height)


def strips(rows: Sequence[tuple[str, Sequence[tuple[float, str, int]]]], *, title: str) -> Html:
    """A strip for each row, from 0 to 1, with a marker for each (value, tip, style)."""
    values = [value for _, found in rows for value, _, _ in found]
    low, high = min([0.0, *values]), max([1.0, *values])
    steps = [t for t in ticks(low, high)]
    width, line = 470, 58
    left, right, top = 14, 34, 30
    height = top + line * len(rows) + 30

    def at(value: float) -> float:
        return left + (value - steps[0]) / (steps[-1] - steps[0]) * (width - left - right)

    parts = []
    for step in steps:
        mark = "one" if abs(step) < 1e-9 or abs(step - 1) < 1e-9 else "grid"
        parts.append(element("path", d=f"M{at(step):.1f} {top}V{height - 30}", class_=mark))
        parts.append(
            element("text", f"{step:.2g}".replace("-", "−"), x=f"{at(step):.1f}", y=height - 14, class_="tick mid")
        )
    for value, label in ((0, "pre-trained"), (1, "individual")):
        anchor = "start" if at(value) < 50 else "end" if at(value) > width - 50 else "middle"
        parts.append(element("text", label, x=f"{at(value):.1f}", y=top - 10, class_="tick", text_anchor=anchor))
    for i, (name, found) in enumerate(rows):
        y = top + line * (i + 0.72)
        parts.append(element("text", _short(name, 40), x=left + 7, y=f"{y - 26:.1f}", class_="row"))
        parts.append(element("path", d=f"M{left} {y:.1f}H{width - right}", class_="grid"))
        for value, tip, style in sorted(found):
            parts.append(marker(style, at(value), y, 5, tip))
        if found:
            value, tip, _ = max(found)
            anchor = "end" if at(value) > width - 110 else "start" if at(value) < left + 90 else "middle"
            label = _short(tip.partition(":")[0], 40)
            parts.append(
                element("text", label, x=f"{at(value):.1f}", y=f"{y - 10:.1f}", class_="name best", text_anchor=anchor)
            )
    return _svg(parts, title, width, height)


def heat_map(names: Sequence[str], values: Sequence[Sequence[float]], *, title: str) -> Html:
    """A square matrix of cosines, with its numbers."""
    size = 40 if len(names) <= 10 else 30
    left, top = 112, 16
    width, height = left + size * len(names) + 70, top + size * len(names) + 78
    parts = []
    for i, line in enumerate(values):
        y = top + size * i
        parts.append(
            element("text", _short(names[i], 16), x=left - 8, y=y + size / 2 + 4, text_anchor="end", class_="name")
        )
        for j, value in enumerate(line):
            x = left + size * j
            share = min(abs(value), 1) ** 0.5  # off the diagonal they are small
            tip = element("title", f"{names[i]}, {names[j]}: {value:.3f}")
            sign = "cell minus" if value < 0 else "cell"
            box = {"x": x + 1, "y": y + 1, "width": size - 2, "height": size - 2, "rx": 3}
            parts.append(element("rect", tip, **box, class_=sign, fill_opacity=f"{share:.3f}"))
            names_ = "value dark" if share > 0.6 else "value"
            text = f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")
            parts.append(element("text", text, x=x + size / 2, y=y + size / 2 + 4, class_=names_, text_anchor="middle"))
    for j, name in enumerate(names):
        x, y = left + size * (j + 0.5), top + size * len(names) + 14
        turned = f"rotate(-40 {x} {y})"
        parts.append(element("text", _short(name, 16), x=x, y=y, transform=turned, text_anchor="end", class_="name"))
    return _svg(parts, title, width, height)


@dataclass
class _Frame:
    """The plane of a chart: from numbers to places."""

    width: int
    height: int
    right: int = 12
    left: int = 44
    top: int = 26
    bottom: int = 42
    logarithmic: bool = False
    zero: bool = False
    x: tuple[float, float] = (0, 1)
    y: tuple[float, float] = (0, 1)

    def at_x(self, value: float) -> float:
        left = self.left + (8 if not self.zero else 60)
        if self.zero and value == 0:
            return self.left + 18
        low, high = self.x
        if self.logarithmic:
            low, high, value = (math.log10(v) for v in (low, high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return left + share * (self.width - self.right - 8 - left)

    def at_y(self, value: float) -> float:
        low, high = self.y
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)

    def axes(self, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[float], x_label: str, y_label: str) -> Html:
        end, floor = self.width - self.right, self.height - self.bottom
        parts = [element("text", y_label, x=2, y=12, class_="axis")]
        fine = max(0, min(2, math.ceil(-math.log10(100 * (y_ticks[1] - y_ticks[0])) - 1e-9)))
        for y in y_ticks:
            at = f"{self.at_y(y):.1f}"
            text = f"{100 * y:.{fine}f}".replace("-", "−")
            parts.append(element("path", d=f"M{self.left} {at}H{end}", class_="grid"))
            parts.append(element("text", text, x=self.left - 6, y=f"{self.at_y(y) + 4:.1f}", class_="tick end"))
        parts.append(element("path", d=f"M{self.left} {floor}H{end}", class_="floor"))
        for x, label in x_ticks:
            parts.append(element("path", d=f"M{self.at_x(x):.1f} {floor}v4", class_="floor"))
            parts.append(element("text", label, x=f"{self.at_x(x):.1f}", y=floor + 17, class_="tick mid"))
        parts.append(element("text", x_label, x=f"{(self.left + end) / 2:.1f}", y=self.height - 6, class_="axis mid"))
        return joined(*parts)


def _svg(parts: Sequence[Html], title: str, width: int = WIDTH, height: int = HEIGHT) -> Html:
    return element(
        "svg", element("title", title), *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=title,
        style=f"--w:{width}px",
    )  # fmt: skip


def _series(number: int, one: Series, inside: Sequence[Html]) -> Html:
    return element("g", *inside, class_="series" if one.shown else "series off", data_series=number)


def _dot(x: float, y: float, style: int, tip: str) -> Html:
    return element("circle", element("title", tip), cx=f"{x:.1f}", cy=f"{y:.1f}", r="2", class_=f"dot {classes(style)}")


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _short(text: str, length: int = 22) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _round(value: float) -> str:
    """A round number in few characters."""
    power, unit = next(((p, u) for p, u in ((1e9, "G"), (1e6, "M"), (1e4, "k")) if value >= p), (1, ""))
    return f"{value / min(power, 1e3 if unit == 'k' else power):g}{unit}"


def _powers(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis, inside its ends."""
    for factors in ((1,), (1, 3), (1, 2, 5)):
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        found = [f * 10.0**e for e in range(first, last + 1) for f in factors]
        found = [x for x in found if low * 0.999 <= x <= high * 1.001]
        if len(found) >= 3:
            break
    return found[:: math.ceil(len(found) / 6)]


def _decades(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return 1.0, 10.0
    low, high = values[0] / 1.5, values[-1] * 1.5
    return (low, high) if high / low > 5 else (low / 2, high * 2)


def _names(ends: Sequence[tuple[float, float, str, int, int | None]], frame: _Frame, hidden: set[int]) -> list[Html]:
    """Labels at the ends of lines, moved apart."""
    x = frame.width - frame.right + 8
    order = sorted((end for end in ends if end[4] not in hidden), key=lambda end: end[1])
    places = [end[1] + 4 for end in order]
    for _ in range(60):
        for i in range(1, len(places)):
            overlap = 13 - (places[i] - places[i - 1])
            if overlap > 0:
                places[i - 1] -= overlap / 2
                places[i] += overlap / 2
    shift = min(0, frame.height - 4 - places[-1]) if places else 0
    return [
        element(
            "text", element("title", label), _short(label, 19), x=x, y=f"{y + shift:.1f}",
            class_=f"name end-name {classes(style)}", data_series=number,
        )
        for y, (_, _, label, style, number) in zip(places, order, strict=True)
    ]  # fmt: skip


def _free(
    x: float, y: float, text: str, taken: list[tuple[float, float, float, float]], frame: _Frame, *, must: bool
) -> tuple[float, float, str] | None:
    """A place for a label beside its point where nothing is yet; the first one, where it must be written."""
    wide = 7 * len(text)  # in wide fonts, too
    places = [(x + 9, y + 4, "start"), (x - 9, y + 4, "end"), (x, y - 10, "middle"), (x, y + 18, "middle")]
    places += [(x + 9, y - 9, "start"), (x - 9, y - 9, "end"), (x + 9, y + 16, "start"), (x - 9, y + 16, "end")]
    places = places[5:6] + places[2:5] + places if must else places  # the front goes on to the right
    fitting = []
    for at, base, anchor in places:
        left = at if anchor == "start" else at - wide if anchor == "end" else at - wide / 2
        box = (left, base - 10, left + wide, base + 2)
        inside = box[0] > frame.left - 4 and box[2] < frame.width - 8 and box[1] > 14 and box[3] < frame.height - 42
        if not inside:
            continue
        fitting.append((at, base, anchor, box))
        if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            taken.append(box)
            return at, base, anchor
    if must and fitting:
        at, base, anchor, box = fitting[0]
        taken.append(box)
        return at, base, anchor
    return None
