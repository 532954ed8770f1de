"""The documentation's site is built without a warning, and its pages hold together, without the network."""

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from browser import CHROMIUM, MISSING, Browser

ROOT = Path(__file__).parent.parent
LOADED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """What a page names, links to and loads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.text = file.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = dict(attrs)
        self.ids.update(filter(None, (about.get("id"), about.get("name"))))
        if tag == "a" and about.get("href"):
            self.links.append(str(about["href"]))
        if about.get(LOADED.get(tag, "")) and about.get("rel") not in ("canonical", "next", "prev", "alternate"):
            self.loads.append(str(about[LOADED[tag]]))


def build(folder: Path) -> str:
    """Build what was staged in a folder, as `make site` does; what was said, or an error where there was a warning."""
    words = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(folder / "mkdocs.yml")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "No issues found" in said, said
    return said


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "source"
    subprocess.run([sys.executable, ROOT / "docs/method_pages.py", folder], check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def pages(staged: Path) -> dict[Path, Page]:
    build(staged)
    return {file.resolve(): Page(file) for file in (staged / "site").rglob("*.html")}


def test_every_document_is_a_page(staged: Path, pages: dict[Path, Page]) -> None:
    documents = {file.relative_to(staged / "docs").with_suffix(".html") for file in (staged / "docs").rglob("*.md")}
    built = {file.relative_to((staged / "site").resolve()) for file in pages} - {Path("404.html")}
    assert built == documents and len(documents) > 50


def test_links_images_and_scripts_are_there(pages: dict[Path, Page]) -> None:
    found = 0
    for file, page in pages.items():
        if file.name == "404.html":  # its links begin at the root of a server
            continue
        for link in [*page.links, *page.loads]:
            place, anchor = urldefrag(unquote(link))
            if place.startswith("https://"):
                continue
            target = (file.parent / place).resolve() if place else file
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{file.name}: {link}"
            if anchor and target in pages:
                assert anchor in pages[target].ids, f"{file.name}: {link}"
            found += 1
    assert found > 1000


def test_no_page_loads_anything_from_elsewhere(pages: dict[Path, Page]) -> None:
    for file, page in pages.items():
        assert page.loads
        assert not [load for load in page.loads if "//" in load], file.name


def test_formulas_stand_as_they_are_written(pages: dict[Path, Page]) -> None:
    shown = next(page.text for file, page in pages.items() if file.name == "ties_merging.html")
    assert '<pre class="formula">tᵢ = τᵢ [|τᵢ| ≥ its (1 - d)-quantile in model i]\ns  = sgn Σᵢ tᵢ\n' in shown


def test_a_link_to_nowhere_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nnav: [index.md]\n")
    (tmp_path / "docs" / "index.md").write_text("# One\n\n[two](two.md)\n")
    with pytest.raises(AssertionError, match="page does not exist"):
        build(tmp_path)


@pytest.fixture(scope="module")
def address(staged: Path, pages: dict[Path, Page]) -> Iterator[str]:
    """Of a server of the site, on this machine alone."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=staged / "site")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
@pytest.mark.parametrize(("width", "dark"), [(375, False), (1280, True)])
def test_a_browser_shows_the_site_without_errors_requests_or_overflow(address: str, width: int, dark: bool) -> None:
    with Browser() as browser:
        for page in ("index", "concepts", "suites", "clip-mini", "methods/index", "methods/ties_merging"):
            browser.open(f"{address}/{page}.html", width=width, dark=dark)
            assert browser.run("document.documentElement.scrollWidth") <= width, page
            colour = browser.run("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, colour[4:-1].split(","))) < 150) == dark, page
        elsewhere = [url for url in browser.requests if not url.startswith((address, "data:", "blob:"))]
        assert browser.errors == [] and elsewhere == []
