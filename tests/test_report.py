"""The page of kept results: made-up ones of every kind, and what a browser makes of it."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev

import pytest
from browser import CHROMIUM, MISSING, Browser
from rich_results import CLIP, CORRUPTIONS, T5, add, rich

from fusionbench import cli
from fusionbench.config import read_config_file
from fusionbench.report import page
from fusionbench.report.draw import COLOURS, MARKERS, dash, ticks
from fusionbench.report.elements import VOID, element
from fusionbench.report.runs import Run, collect, front, gain, sweeps
from fusionbench.results import Result, Results

Attributes = dict[str, str | None]
HOSTILE = "<script>alert('x')</script>\"&<b>"


class Parsed(HTMLParser):
    """A page as its elements and tables; an error where an element is not closed, or closed twice.

    A table is a list of rows, a row its attributes and its cells, a cell its text and its attributes.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, Attributes]] = []
        self.tables: list[list[tuple[Attributes, list[tuple[str, Attributes]]]]] = []
        self.text = ""
        self._cell: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        self.ids = [about["id"] for _, about in self.elements if "id" in about]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = dict(attrs)
        assert len(about) == len(attrs), f"an attribute twice: {tag} {attrs}"
        self.elements.append((tag, about))
        if tag not in (*VOID, "meta"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append((about, []))
        elif tag in ("td", "th"):
            self._cell = []
            self.tables[-1][-1][1].append(("", about))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> in {self.open}"
        self.open.pop()
        if tag in ("td", "th"):
            cells = self.tables[-1][-1][1]
            cells[-1] = ("".join(self._cell), cells[-1][1])

    def handle_data(self, data: str) -> None:
        self._cell.append(data)
        self.text += data

    def rows(self, *titles: str) -> dict[str, dict[str, tuple[str, Attributes]]]:
        """The first table whose header begins so: by row and by column."""
        for (_, header), *body in self.tables:
            names = [text for text, _ in header]
            if names[: len(titles)] == list(titles):
                return {row[0][0]: dict(zip(names, row, strict=True)) for _, row in body}
        raise AssertionError(f"no table begins with {titles}")


def value(cell: tuple[str, Attributes]) -> float:
    return float(str(cell[1]["data-v"]))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return rich(tmp_path_factory.mktemp("rich")).all()


@pytest.fixture(scope="module")
def text(results: list[Result]) -> str:
    cosines = {"t5-mini": (list(T5), [[1.0 if i == j else 0.1 * (i - j) for j in range(4)] for i in range(4)])}
    return page(results, cosines=cosines)


@pytest.fixture(scope="module")
def parsed(text: str) -> Parsed:
    return Parsed(text)


@pytest.fixture(scope="module")
def runs(results: list[Result]) -> list[Run]:
    return collect(results)[0]


def found(results: list[Result], method: str, **cell: object) -> list[Result]:
    """The results of a method whose cells say this, and of which nothing else was asked."""
    plain = {"modelpool": "clip-mini", "hyperparameters": {}, "models": None, "corruption": None, "tasks": "models"}
    asked = {"method": method, "seed": None, **plain, **cell}
    return [r for r in results if not r.failed and all(r.cell[name] == what for name, what in asked.items())]


def test_the_page_is_well_formed_and_its_links_lead_somewhere(parsed: Parsed) -> None:
    assert len(parsed.ids) == len(set(parsed.ids)) > 250
    places = {str(about["href"]) for tag, about in parsed.elements if tag == "a"}
    assert places and all(place.startswith("#") and place[1:] in parsed.ids for place in places)
    titles = {"Leaderboard", "Where each method is strong", "What it costs", "Hyperparameters", "Some of the models",
              "Unseen tasks", "Robustness", "Published numbers", "Task vectors", "Failed"}  # fmt: skip
    assert all(title in parsed.text for title in titles)


def test_the_page_loads_nothing(text: str, parsed: Parsed) -> None:
    assert not re.search(r"https?:|//\w|url\(|@import|fetch\(|XMLHttp|import ", text)
    assert not [tag for tag, _ in parsed.elements if tag in ("link", "iframe", "img", "object", "base", "form")]
    assert not [about for _, about in parsed.elements if {"src", "srcset", "xlink:href"} & set(about)]
    assert "default-src 'none'" in next(str(about["content"]) for _, about in parsed.elements if "http-equiv" in about)


def test_every_number_of_a_run_is_that_of_the_store(parsed: Parsed, runs: list[Run]) -> None:
    by_number = {str(run.number): run for run in runs}
    checked = 0
    for (_, header), *body in parsed.tables:
        titles = [
            re.sub("((un)?seen|expert)$", "", text) if text not in ("seen", "unseen") else text for text, _ in header
        ]
        if "published as" in titles:
            titles = titles[:2] + [""] * (len(titles) - 2)
        for about, row in body:
            for title, (shown, cell) in zip(titles, row, strict=True):
                run = by_number.get(str(cell.get("data-run") or about.get("data-run")))
                if run is None or "data-v" not in cell or not title:
                    continue
                if title in run.scores or title == "here" or "data-run" in cell:
                    score = run.scores.get(title, run.average)
                    assert value((shown, cell)) == score and shown.split()[0] == f"{100 * score:.1f}"
                else:
                    assert value((shown, cell)) == pytest.approx(_expected(title, run, runs), abs=1e-12)
                checked += 1
    assert checked > 1000


def _expected(title: str, run: Run, runs: list[Run]) -> float:
    merged = run.group.models or ()
    means = [fmean(run.scores[name] for name in run.tasks if (name in merged) is seen) for seen in (True, False)
             if any((name in merged) is seen for name in run.tasks)]  # fmt: skip
    if title in ("seen", "unseen"):
        return means[title == "unseen"]
    if title == "Δ ":
        base = next(other for other in runs if other.method == "pretrained" and other.group == run.group)
        return means[1] - fmean(base.scores[name] for name in base.tasks if name not in merged)
    if title == "g":
        names = set(run.tasks)
        ends = {
            o.method: o
            for o in runs
            if not o.group.corruption and o.group.pool == run.group.pool and names <= set(o.tasks)
        }
        low, high = (fmean(ends[method].scores[name] for name in names) for method in ("pretrained", "individual"))
        return (run.average - low) / (high - low)
    if title == "parameters":
        return run.results[0].report["model_info"]["all_params"]
    if title in run.settings:
        return run.settings[title]
    costs = {"seconds": "fusion", "CPU seconds of the fusion": "fusion", "added": "added_parameters",
             "added parameters": "added_parameters", "peak memory, MB": "peak_memory_mb"}  # fmt: skip
    every = [result.report["run"] for result in run.results]
    return fmean(one["cpu_seconds"]["fusion"] if costs[title] == "fusion" else one[costs[title]] for one in every)


def test_means_of_corruptions_and_of_choices_of_models_are_those_of_the_store(
    results: list[Result], parsed: Parsed
) -> None:
    table = parsed.rows("method", "clean", "mean")
    four = {"models": list(CLIP[:4])}
    means = []
    for corruption in CORRUPTIONS:
        kept = found(results, "regmean", corruption=corruption, **four)
        assert sorted(r.cell["severity"] for r in kept) == [1, 2, 3, 4, 5]
        means.append(next(r.scores["average"] for r in kept if r.cell["severity"] == 3))  # all that all methods have
        assert value(table["regmean"][corruption]) == pytest.approx(means[-1], abs=1e-12)
        assert table["regmean"][corruption][0] == f"{100 * means[-1]:.1f}"
    assert value(table["regmean"]["mean"]) == pytest.approx(fmean(means), abs=1e-12)
    assert value(table["regmean"]["clean"]) == found(results, "regmean", **four)[0].scores["average"]
    numbers = parsed.rows("method", "2", "3")
    two = [found(results, "regmean", models=models)[0] for models in (list(CLIP[:3]), list(CLIP[2:5]))]
    assert value(numbers["regmean"]["3"]) == pytest.approx(fmean(r.scores["average"] for r in two), abs=1e-12)
    assert value(numbers["regmean"]["8"]) == found(results, "regmean")[0].scores["average"]


def test_seeds_become_a_mean_with_its_deviation(results: list[Result], parsed: Parsed) -> None:
    seeds = [found(results, "dare", hyperparameters={"density": 0.2}, seed=seed)[0] for seed in (1, 2, 3)]
    averages = [result.scores["average"] for result in seeds]
    shown = parsed.rows("method", "average", "g")["daredensity=0.2"]["average"]
    assert shown[0] == f"{100 * fmean(averages):.1f} ± {100 * stdev(averages):.1f}"
    assert all(f"{result.key}.json" in parsed.text for result in seeds)


def test_the_best_of_each_column_is_marked_among_methods(parsed: Parsed) -> None:
    table = parsed.rows("method", "average", "g")
    for task in ("average", *CLIP):
        methods = {name: row[task] for name, row in table.items() if name not in ("pretrained", "individual")}
        best = {name for name, row in table.items() if "best" in str(row[task][1].get("class"))}
        assert best == {max(methods, key=lambda name: value(methods[name]))}


def test_a_leaderboard_never_shows_the_best_of_a_sweep_but_what_was_chosen_for_a_reason(parsed: Parsed) -> None:
    names = list(parsed.rows("method", "average", "g"))
    arithmetic = {name for name in names if name.startswith("task_arithmetic")}
    tuned = "task_arithmetictunedscaling_factor=0.371the best of 20 trials on calibration data"
    assert arithmetic == {"task_arithmeticdefault", tuned}
    ties = [name for name in names if name.startswith("ties_merging")]
    assert len(ties) == 2 and "ties_mergingdefault" in ties
    assert any("chosen" in name and "search on calibration data" in name for name in ties)


def test_negative_transfer_is_marked(parsed: Parsed) -> None:
    table = parsed.rows("method", "seen", "unseen", "Δ unseen")
    assert len(table) == 5
    for name, row in table.items():
        if name != "pretrained":
            assert (value(row["Δ unseen"]) < 0) == ("worse" in str(row["Δ unseen"][1]["class"]))
            for task in CLIP[6:]:
                lower = value(row[f"{task}unseen"]) < value(table["pretrained"][f"{task}unseen"])
                assert lower == (row[f"{task}unseen"][1].get("class") == "worse")
    assert any(value(row["Δ unseen"]) < 0 for name, row in table.items() if name != "pretrained")


def test_experts_and_what_is_made_of_them_are_one_table(results: list[Result], parsed: Parsed) -> None:
    header, *body = next(t for t in parsed.tables if [text for text, _ in t[0][1]][:2] == ["method", "models"])
    titles = [text for text, _ in header[1]]
    assert titles == ["method", "models", "parameters", "average", "sentimentexpert", "verseexpert", "spam", "domain"]
    assert [[cell[0] for cell in cells[:3]] for _, cells in body] == [
        ["pretrained", "base", "1.82M"],
        ["passthrough", "sentiment", "1.82M"],
        ["passthrough", "verse", "1.82M"],
        ["smile_upscaling", "sentiment", "3.92M"],
        ["smile_upscaling", "verse", "3.92M"],
        ["smile_upscaling", "sentiment, verse", "6.02M"],
    ]
    both = found(results, "smile_upscaling", modelpool="t5-mini", models=["sentiment", "verse"], tasks="all")[0]
    assert [value(cell) for cell in body[-1][1][3:]] == [
        both.scores[t] for t in ("average", "sentiment", "verse", "spam", "domain")
    ]


def test_published_numbers_stand_beside_with_their_caveat(parsed: Parsed) -> None:
    table = parsed.rows("method", "here", "published", "published as")
    assert table["pretrained"]["published"][0] == "48.2" and table["pretrained"]["SUN397"][0] == "63.2"
    assert table["regmean"]["published as"][0] == "RegMean"
    assert "Other models and other data: the order of the methods compares, not the numbers." in parsed.text


def test_where_every_number_comes_from_is_told(results: list[Result], parsed: Parsed) -> None:
    for result in results:
        if not result.failed:
            assert f"{result.key}.json" in parsed.text
            run = result.report["run"]
            assert all(model["xxh3"] in parsed.text for model in run["modelpool"].values())
            assert all(task["data"] in parsed.text for task in run["taskpool"].values())
    assert "zoo:clip-mini/house-numbers" in parsed.text and "torch 2.13.0+cpu" in parsed.text


def test_names_that_are_code_are_only_text(tmp_path: Path) -> None:
    kept = Results(tmp_path)
    for method in ("pretrained", "individual", HOSTILE, f"{HOSTILE}2"):
        for pool in (HOSTILE, "pool"):
            add(kept, method, pool=pool, every=[HOSTILE, "b", "c", "d"], why=HOSTILE)
            add(kept, method, pool=pool, every=[HOSTILE, "b", "c", "d"], corruption=HOSTILE, severity=1)
            add(kept, method, pool=pool, every=[HOSTILE, "b", "c", "d"], models=[HOSTILE, "b"], tasks="all")
            for i in range(4):
                add(kept, method, pool=pool, every=[HOSTILE, "b"], models=[HOSTILE, "b"], **{HOSTILE: i})
    cell = {"modelpool": HOSTILE, "method": HOSTILE, "hyperparameters": {HOSTILE: HOSTILE}}
    kept.add_failed("0", cell, f"{HOSTILE} $style ${{script}}")
    text = page(kept.all(), cosines={HOSTILE: ([HOSTILE, "b"], [[1.0, 0.5], [0.5, 1.0]])})
    parsed = Parsed(text)
    assert sum(tag == "script" for tag, _ in parsed.elements) == 1
    assert not [about for tag, about in parsed.elements if tag == "b" or any(name.startswith("on") for name in about)]
    assert HOSTILE in parsed.text and "$style ${script}" in parsed.text


@pytest.mark.parametrize("missing", ["pretrained", "individual"])
def test_a_page_without_what_is_compared_with_has_no_gain(tmp_path: Path, missing: str) -> None:
    kept = Results(tmp_path)
    for method in {"pretrained", "individual", "regmean", "ties_merging"} - {missing}:
        add(kept, method, every=["a", "b"])
        add(kept, method, every=["a", "b", "c"], models=["a", "b"], tasks="all")
    parsed = Parsed(page(kept.all()))
    header = [text for text, _ in parsed.tables[0][0][1]]
    assert header == ["method", "average", "a", "b", "seconds", "added"]
    assert "How much of the gap" not in parsed.text


def test_references_are_taken_from_runs_on_the_same_data_of_other_models(tmp_path: Path) -> None:
    kept = Results(tmp_path)
    add(kept, "pretrained", every=["a", "b", "c"])
    add(kept, "individual", every=["a", "b", "c"])
    part = add(kept, "regmean", every=["a", "b", "c"], models=["a", "b"])
    other = add(kept, "regmean", every=["a", "b", "c"], corruption="contrast", severity=3)
    runs, _, _ = collect(kept.all())
    low, high = (
        {r.method: r for r in runs if r.results[0].cell["corruption"] is None}[m] for m in ("pretrained", "individual")
    )
    ends = [fmean(run.scores[name] for name in "ab") for run in (low, high)]
    one = next(run for run in runs if run.results[0].key == part.key)
    assert gain(one, runs) == pytest.approx((one.average - ends[0]) / (ends[1] - ends[0]))
    assert gain(next(run for run in runs if run.results[0].key == other.key), runs) is None


def test_of_two_results_of_a_cell_the_newer_one_counts_and_that_is_said(tmp_path: Path) -> None:
    import os

    kept = Results(tmp_path)
    old = add(kept, "regmean", every=["a"], quality=0.2)
    new = kept.add("new", old.cell, old.report | {"a": {"accuracy": 0.125}}, old.primary, {})
    os.utime(tmp_path / f"{old.key}.json", (1, 1))
    runs, _, older = collect(kept.all())
    assert [run.results[0].key for run in runs] == [new.key] and [r.key for r in older] == [old.key]
    parsed = Parsed(page(kept.all()))
    assert "1 older result of the same runs" in parsed.text and "12.5" in parsed.text


def test_equal_results_give_equal_pages(results: list[Result], text: str) -> None:
    assert page(list(reversed(results))) == page(results) and page(results) != text


def test_only_failures_are_a_page_too(tmp_path: Path) -> None:
    kept = Results(tmp_path)
    cell = {"modelpool": "clip-mini", "method": "regmean", "hyperparameters": {}, "models": None, "seed": None}
    kept.add_failed("0", cell, "no data")
    parsed = Parsed(page(kept.all()))
    assert "1 failed" in parsed.text and "regmean" in parsed.text and "no data" in parsed.text


def test_corruptions_are_compared_at_the_severities_that_all_methods_have(tmp_path: Path) -> None:
    kept = Results(tmp_path)
    more = [add(kept, "regmean", every=["a"], corruption="contrast", severity=s).scores["average"] for s in (1, 2, 3)]
    few = [add(kept, "adamerging", every=["a"], corruption="contrast", severity=s).scores["average"] for s in (2, 3)]
    parsed = Parsed(page(kept.all()))
    rows = parsed.rows("method", "clean", "mean")
    for name, scores in (("regmean", more[1:]), ("adamerging", few)):
        assert value(rows[name]["mean"]) == value(rows[name]["contrast"]) == pytest.approx(fmean(scores), abs=1e-12)
    assert "the mean of severities 2, 3, which all methods have" in parsed.text
    assert "Of the corrupted test data, adamerging has seen the inputs" in parsed.text


def test_suites_are_told_and_their_reasons_known(tmp_path: Path) -> None:
    kept = Results(tmp_path)
    add(kept, "regmean", why="", off_diagonal=1.0)
    add(kept, "regmean", off_diagonal=0.95)  # the default
    parsed = Parsed(page(kept.all()))
    assert re.search(r"multi-task \(2 of \d+ runs\)", parsed.text)
    rows = parsed.rows("method", "average")
    assert set(rows) == {
        "regmeanchosenoff_diagonal=1.0best of 0.6, 0.9, 0.95 and 1 on calibration data",
        "regmeandefaultoff_diagonal=0.95",
    }


def test_published_numbers_of_unseen_tasks_stand_beside_the_models_that_were_merged(tmp_path: Path) -> None:
    kept = Results(tmp_path)
    merged = ["mnist", "animals", "climate", "icons", "emoji", "house-numbers"]  # the second choice of the suite
    for method in ("pretrained", "regmean", "adamerging"):
        add(kept, method, models=merged, tasks="all")
    add(kept, "regmean", models=merged[:5], tasks="all")
    parsed = Parsed(page(kept.all()))
    (header, *body) = next(t for t in parsed.tables if "published as" in [text for text, _ in t[0][1]])
    titles = [text for text, _ in header[1]]
    assert titles == ["method", "seen", "published", "unseen", "published", "Δ unseen", "published", "published as"]
    cells = {row[0][0]: [text for text, _ in row[1:]] for _, row in body}
    assert set(cells) == {"pretrained", "regmean", "adamerging"}
    assert cells["pretrained"][1::2][:3] == ["48.4", "40.1", ""] and cells["regmean"][1::2][:3] == [
        "83.0",
        "49.2",
        "+9.1",
    ]
    scores = {r.cell["method"]: r.scores for r in kept.all() if len(r.cell["models"]) == 6}
    unseen = {m: fmean(100 * own[task] for task in CLIP if task not in merged) for m, own in scores.items()}
    assert cells["regmean"][2] == f"{unseen['regmean']:.1f}"
    assert cells["regmean"][4].replace("−", "-") == f"{unseen['regmean'] - unseen['pretrained']:+.1f}"
    assert "RESISC45 and SVHN unseen" in parsed.text and "MNIST and EuroSAT unseen" not in parsed.text


def test_published_numbers_of_corruptions_stand_beside(tmp_path: Path) -> None:
    kept, four = Results(tmp_path), ["fashion-mnist", "animals", "letters", "house-numbers"]
    for method in ("regmean", "we_moe"):
        add(kept, method, models=four)
        for corruption in ("contrast", "jpeg_compression"):
            add(kept, method, models=four, corruption=corruption, severity=3)
    parsed = Parsed(page(kept.all()))
    rows = next(t for t in parsed.tables if t[0][1][1][0] == "cleanpublished")
    titles = [text.removesuffix("published") for text, _ in rows[0][1]]
    assert titles == ["method", "clean", "mean", "contrast", "jpeg_compression"]
    by_method = {row[0][0].partition("published as")[0]: [text for text, _ in row[1:]] for _, row in rows[1:]}
    contrast = next(r for r in kept.all() if r.cell["corruption"] == "contrast" and r.cell["method"] == "regmean")
    assert by_method["regmean"][2] == f"{100 * contrast.scores['average']:.1f} 78.0"
    assert by_method["regmean"][0].endswith(" 89.1") and by_method["we_moe"][0].endswith(" 92.4")
    assert "Pixelate made every picture 32 pixels wide" in parsed.text


def test_published_tables_name_models_that_there_are() -> None:
    from fusionbench.published import _index
    from fusionbench.suites import load_suite

    merged = [facts["merged"] for facts in _index()["tables"].values() if "merged" in facts]
    suites = {cell.models for name in ("generalization", "robustness") for cell in load_suite(name).cells}
    assert {tuple(models["zoo:clip-mini/base"]) for models in merged} == suites
    hub = read_config_file("modelpool", "clip-vit-base-patch32")[0]["models"]
    assert all(set(models["hf:openai/clip-vit-base-patch32"]) < set(hub) for models in merged) and len(merged) == 3


def test_four_values_make_a_sweep_where_all_else_is_equal(tmp_path: Path) -> None:
    kept = Results(tmp_path)
    for i in range(4):
        add(kept, "task_arithmetic", every=["a"], scaling_factor=i / 10)
        add(kept, "ties_merging", every=["a"], scaling_factor=i / 10, density=0.1 + i / 10)
    for i in range(3):
        add(kept, "breadcrumbs", every=["a"], scaling_factor=i / 10)
    runs, _, _ = collect(kept.all())
    assert [(sweep.method, sweep.hyperparameter) for sweep in sweeps(runs)] == [("task_arithmetic", "scaling_factor")]
    assert [value for value, _ in sweeps(runs)[0].runs] == [0.0, 0.1, 0.2, 0.3]


def test_the_front_is_what_no_other_beats_in_cost_and_score() -> None:
    assert front([(1, 0.5), (2, 0.4), (2, 0.7), (0, 0.1), (3, 0.7)]) == [3, 0, 2]
    assert front([]) == []


def test_ticks_are_round_and_cover() -> None:
    assert ticks(0.52, 0.88) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert ticks(3, 3)[0] <= 3 <= ticks(3, 3)[-1]


def test_forty_two_methods_have_different_signs() -> None:
    signs = {(style % COLOURS, style % MARKERS, dash(style)) for style in range(COLOURS * MARKERS)}
    assert len({sign[:2] for sign in signs}) == 42


def test_an_element_escapes_text_and_attributes() -> None:
    made = element("p", "<&", element("wbr"), class_='a"b', data_v=None, hidden=True)
    assert made == '<p class="a&quot;b" hidden="">&lt;&amp;<wbr></p>'


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    add(Results(tmp_path / "results"), "regmean")
    assert cli.main(["report", str(tmp_path / "results"), "-o", str(tmp_path / "new" / "page.html")]) == 0
    assert "regmean" in (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert "page.html" in capsys.readouterr().out


def test_the_page_is_written_without_cosines_of_models_that_are_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    add(Results(tmp_path / "results"), "regmean", pool="elsewhere")
    page = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "results"), "-o", str(page), "--cosines"]) == 0
    assert "The page has no cosines of elsewhere. " in capsys.readouterr().out
    assert "regmean" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["empty", "-o", "page.html"], "holds no results"),
        (["missing", "-o", "page.html"], "is no folder of results"),
        (["empty", "-o", "page.pdf"], "The page is an .html file, as page.html; got 'page.pdf'."),
        (["empty", "missing", "-o", "page.html"], "A page is of one folder of kept results; got 2"),
        (["empty", "-o", "empty.html"], "'empty.html' is a folder"),
        (["empty", "--cosines"], "--cosines is of a page: name it with -o."),
    ],
)
def test_what_makes_no_page_is_one_line(
    tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.html").mkdir()
    assert cli.main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip(MISSING)
    with Browser() as opened:
        yield opened


@pytest.fixture
def shown(text: str, tmp_path: Path) -> Path:
    file = tmp_path / "report.html"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [375, 1280])
def test_a_browser_shows_the_page_without_errors_requests_or_overflow(
    browser: Browser, shown: Path, width: int, dark: bool
) -> None:
    browser.errors.clear()
    browser.requests.clear()
    browser.open(shown, width=width, dark=dark)
    assert browser.run("innerWidth") == width
    for summary in (False, True):  # and with all that is folded
        browser.run(f"document.querySelectorAll('details').forEach((part) => {{ part.open = {str(summary).lower()} }})")
        assert browser.run("document.documentElement.scrollWidth") == width
    colours = browser.run("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    sums = [sum(map(int, re.findall(r"\d+", colour))) for colour in colours]
    assert (sums[0] < 150 and sums[1] > 600) if dark else (sums[0] > 700 and sums[1] < 150)
    counts = browser.run("['table', 'figure svg', 'thead button'].map(s => document.querySelectorAll(s).length)")
    assert counts[0] > 20 and counts[1] > 15 and counts[2] > 60
    small = browser.run("[...document.querySelectorAll('figure svg')].filter(s => s.checkVisibility()"
                        " && s.getBoundingClientRect().width < 300).length")  # fmt: skip
    assert small == 0
    assert browser.errors == [] and set(browser.requests) == {shown.as_uri()}


@pytest.mark.browser
def test_a_table_is_sorted_by_click_and_by_keyboard(browser: Browser, shown: Path) -> None:
    browser.open(shown, width=1280)
    bodies = "[...document.querySelector('table.sortable').tBodies]"
    column = f"{bodies}.map(b => [...b.rows].map(r => Number(r.cells[3].dataset.v)))"
    references, before = browser.run(column)
    browser.click("table.sortable thead th:nth-child(4) button")
    assert browser.run(column) == [references, sorted(before, reverse=True)]
    sort = "document.querySelector('table.sortable thead th:nth-child(4)').getAttribute('aria-sort')"
    assert browser.run(sort) == "descending"
    browser.press("Enter")  # the button has the focus
    assert browser.run(column) == [references, sorted(before)] and browser.run(sort) == "ascending"
    browser.press(" ")
    assert browser.run(column) == [references, sorted(before, reverse=True)]
    others = browser.run("document.querySelectorAll('table.sortable')[0].querySelectorAll('[aria-sort=none]').length")
    assert others == browser.run("document.querySelector('table.sortable').tHead.rows[0].cells.length") - 1
    browser.click("table.sortable thead th:first-child button")
    names = browser.run(
        "[...document.querySelector('table.sortable').tBodies[1].rows].map(r => r.cells[0].textContent)"
    )
    assert names == sorted(names) and len(names) > 10


@pytest.mark.browser
@pytest.mark.parametrize("width", [375, 1280])
def test_a_row_tells_where_its_numbers_come_from(browser: Browser, shown: Path, width: int) -> None:
    browser.open(shown, width=width)
    opened = "document.getElementById('about').open"
    browser.click("tr[data-run] td:nth-child(2)")
    assert browser.run(opened) is True
    told = browser.run("document.getElementById('about').textContent")
    assert "pretrained" in told and "zoo:clip-mini/base" in told and ".json" in told and "torch" in told
    browser.press("Escape")
    assert browser.run(opened) is False
    browser.run("document.querySelectorAll('tr[data-run] a.run')[2].focus()")
    browser.press("Enter")
    assert browser.run(opened) is True
    method = browser.run("document.querySelectorAll('tr[data-run] a.run')[2].textContent")
    assert browser.run("document.querySelector('#about h2').textContent").startswith(method)
    browser.click("#about .close")
    assert browser.run(opened) is False


@pytest.mark.browser
def test_a_legend_shows_and_hides_in_all_of_its_charts(browser: Browser, shown: Path) -> None:
    browser.open(shown, width=1280)
    part = "[...document.querySelectorAll('h3')].find(h => h.textContent === 'Robustness').parentNode"
    lines = f"[...{part}.querySelectorAll('svg g.series[data-series=\"0\"]')]"
    seen = f"{lines}.filter(g => getComputedStyle(g).display !== 'none').length"
    assert browser.run(seen) == len(CORRUPTIONS)
    browser.run(f"{part}.querySelector('input').id = 'box'")
    browser.click("#box")
    assert browser.run(seen) == 0
    browser.press(" ")
    assert browser.run(seen) == len(CORRUPTIONS)
