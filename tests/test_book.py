"""The book: built without a warning, whole without a network or scripts, readable by everybody.

`SAESUB_TEST_PICTURES=folder pytest tests/test_book.py` leaves pictures there to look at.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import browser
import pytest
from bs4 import BeautifulSoup

pytestmark = pytest.mark.slow
in_a_browser = pytest.mark.skipif(
    not browser.chromium(), reason="no chromium on the path: apt-get install chromium"
)
ROOT = Path(__file__).resolve().parent.parent
PHONE, DESKTOP = 390, 1280
FIRST, LIKE = "README.html", ("docs/findings/F6.html", "docs/api.html", "docs/errors.html")
AXE = [FIRST, *LIKE, "notebooks/05_active_subspace_init.html", "search.html"]


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("book")
    subprocess.run([sys.executable, "notebooks/figures.py"], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    command += ["-d", str(folder / "doctrees"), "-c", "docs/book", ".", str(folder / "html")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def pages(book) -> dict[str, BeautifulSoup]:
    return {
        path.relative_to(book).as_posix(): BeautifulSoup(path.read_text("utf-8"), "html.parser")
        for path in sorted(book.rglob("*.html"))
    }


def _targets(page: BeautifulSoup) -> list[str]:
    """What a page links to, shows or loads."""
    found = [tag[key] for key in ("href", "src") for tag in page.find_all(**{key: True})]
    return [unquote(target) for target in found if not target.startswith("data:")]


def test_every_notebook_finding_and_page_is_in_the_menu(book, pages):
    links = {link["href"] for link in pages[FIRST].select(".sidebar-tree a[href]")}
    wanted = [*(ROOT / "notebooks").glob("[0-9]*.ipynb"), *(ROOT / "docs").rglob("*.md")]
    names = {path.relative_to(ROOT).with_suffix(".html").as_posix() for path in wanted}
    assert names <= links
    assert names <= set(pages)


def test_every_link_leads_somewhere(book, pages):
    broken = []
    for name, page in pages.items():
        for target in _targets(page):
            if urlsplit(target).scheme or target.startswith("//"):
                continue
            path, anchor = urldefrag(target)
            to = (
                (book / name).parent.joinpath(path.split("?")[0]).resolve() if path else book / name
            )
            if not to.exists():
                broken.append((name, target))
            elif anchor and to.suffix == ".html":
                of = pages[to.relative_to(book.resolve()).as_posix()] if path else page
                if not of.find(id=anchor) and anchor not in {"", "_"}:
                    broken.append((name, target))
    assert not broken


def test_nothing_is_loaded_from_elsewhere(pages):
    for name, page in pages.items():
        tags = page.find_all(["script", "img", "iframe", "link", "source", "video"])
        loaded = [tag.get("src") or tag.get("href") for tag in tags]
        assert not [url for url in loaded if url and urlsplit(url).netloc], name


def test_the_book_and_its_first_page_are_small(book, pages):
    loaded = pages[FIRST].select("script[src], img[src], link[rel=stylesheet]")
    files = {(tag.get("src") or tag.get("href")).split("?")[0] for tag in loaded}
    assert sum((book / file).stat().st_size for file in [FIRST, *files]) < 300_000
    assert sum(file.stat().st_size for file in book.rglob("*") if file.is_file()) < 30_000_000


def test_a_term_is_explained_where_a_page_first_uses_it(book, pages):
    page = pages["notebooks/05_active_subspace_init.html"]
    terms = page.select("a.term")
    assert len({term["href"] for term in terms}) == len(terms) > 3
    fvu = next(term for term in terms if term.get_text() == "FVU")
    assert fvu["title"].startswith("Fraction of variance unexplained")
    assert not page.select("pre a.term, h1 a.term, h2 a.term")
    for term in terms:
        assert pages["docs/terms.html"].find(id=urldefrag(term["href"])[1])


def test_a_notebook_can_be_kept_as_it_is_committed(book, pages):
    for notebook in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        name = f"notebooks/{notebook.stem}.html"
        (link,) = pages[name].select("article a.download[href$='.ipynb']")
        kept = (book / name).parent / unquote(link["href"])
        assert kept.read_bytes() == notebook.read_bytes()


def test_links_out_of_the_book_go_to_the_repository(pages):
    links = {link["href"] for link in pages["docs/api.html"].select("article a[href]")}
    at = runpy.run_path(str(ROOT / "notebooks" / "links.py"))["repository"]() + "/blob/main/"
    assert at + "saesub/init/subspace.py" in links
    outside = [link.removeprefix(at) for link in links if link.startswith(at)]
    assert all((ROOT / path.split("?")[0]).exists() for path in outside)


def test_every_public_name_is_described_in_full(pages):
    import saesub

    shown = {tag["id"].rsplit(".")[-1] for tag in pages["docs/api.html"].select("dt[id]")}
    assert set(saesub.__all__) <= shown


def test_a_findings_figure_and_its_notebooks_say_what_is_to_be_seen(pages):
    kept = ROOT / "data" / "results" / "full" / "figures" / "05_active_subspace_init.jsonl"
    titles = [json.loads(line)["title"] for line in kept.read_text("utf-8").splitlines()]
    assert all(titles)
    shown = pages["notebooks/05_active_subspace_init.html"].select("article img")
    for image, title in zip(shown, titles, strict=True):
        assert image["alt"].startswith(title)
    (own,) = pages["docs/findings/F6.html"].select("article img")
    assert own["alt"].startswith(titles[2])


def test_figures_have_texts(pages):
    for name, page in pages.items():
        texts = [image.get("alt", "") for image in page.select("article img")]
        assert all(len(text) > 10 and not text.endswith(".png") for text in texts), name


@pytest.fixture(scope="module")
def chromium():
    with browser.browser() as started:
        yield started


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = Path(os.environ.get("SAESUB_TEST_PICTURES", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@in_a_browser
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_every_page_fits_the_screen_and_shows_its_pictures(book, pages, chromium, width, pictures):
    tab = chromium.new_page(viewport={"width": width, "height": 900})
    asked, said = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("requestfailed", lambda request: said.append(request.url))
    tab.on("pageerror", lambda error: said.append(str(error)))
    for name in pages:
        tab.goto((book / name).as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        empty = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        assert tab.evaluate(empty) == [], name
        if name in (FIRST, *LIKE):
            tab.screenshot(path=pictures / f"{name.replace('/', '-')}-{width}.png")
    assert not said
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    tab.close()


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_barrier_for_readers(book, chromium, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    tab = chromium.new_page(viewport={"width": DESKTOP, "height": 900}, color_scheme=scheme)
    for name in AXE:
        tab.goto((book / name).as_uri())
        found = axe.run(tab).response["violations"]
        grave = [v for v in found if v["impact"] in ("serious", "critical")]
        assert not grave, (name, [(v["id"], v["nodes"][0]["html"][:200]) for v in grave])
    tab.close()


@in_a_browser
def test_a_page_can_be_read_without_scripts(book, chromium):
    context = chromium.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto((book / "notebooks/05_active_subspace_init.html").as_uri())
    assert tab.locator("article h1").is_visible()
    assert tab.locator("article img").first.is_visible()
    tab.locator(".sidebar-tree a", has_text="06 ·").click()
    assert tab.locator("article h1").inner_text().startswith("06 ·")
    context.close()


@in_a_browser
def test_a_term_is_explained_to_the_keyboard_too(book, chromium):
    tab = chromium.new_page()
    tab.goto((book / "notebooks/05_active_subspace_init.html").as_uri())
    shown = "e => getComputedStyle(e, '::after').content"
    term = tab.locator("a.term", has_text="FVU").first
    assert term.evaluate(shown) == "none"
    tab.keyboard.press("Tab")
    term.focus()
    assert term.evaluate(shown).startswith('"Fraction of variance unexplained')
    tab.close()


@in_a_browser
@pytest.mark.parametrize(
    ("page", "width", "height"),
    [("docs/recipe", PHONE, 500), ("docs/findings/F6", DESKTOP, 800)],
)
def test_a_definition_does_not_lie_over_its_term(book, chromium, page, width, height):
    tab = chromium.new_page(viewport={"width": width, "height": height})
    tab.goto((book / f"{page}.html").as_uri())
    tab.add_style_tag(content="html { scroll-behavior: auto !important }")  # at once
    n_terms = tab.locator("a.term").count()
    assert n_terms > 3
    below = """e => {
        const of = getComputedStyle(e, '::after');
        const heights = [of.height, of.paddingTop, of.paddingBottom, of.borderTopWidth];
        const box = heights.map(parseFloat).reduce((a, b) => a + b);
        const at = e.getBoundingClientRect();
        return [box, innerHeight - at.bottom, at.top];
    }"""
    place = "e => [...document.querySelectorAll('a.term')].indexOf(e)"
    seen = set()
    for _ in range(200):  # more than there are links on the page
        tab.keyboard.press("Tab")
        focused = tab.locator("a.term:focus-visible")
        if focused.count():
            seen.add(focused.evaluate(place))
            box, under, above = focused.evaluate(below)
            assert 0 < box < under
            assert above >= 0
    assert len(seen) == n_terms
    tab.close()


@in_a_browser
def test_a_word_is_found_by_the_search(book, chromium):
    tab = chromium.new_page()
    tab.goto((book / "search.html").as_uri() + "?q=whitened")
    tab.wait_for_selector("#search-results a[href='docs/initialisations.html']", timeout=20_000)
    tab.close()
