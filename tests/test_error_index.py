"""docs/errors.md has every message of the package, and every message has both halves."""

from __future__ import annotations

import re
import runpy
import textwrap
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
index = runpy.run_path(str(ROOT / "notebooks" / "error_index.py"))


@cache
def _sites() -> list:
    return list(index["package"]().sites())


def _messages(code: str, **modules: str) -> list[str]:
    """The messages of a package of a module `saesub.a` and others."""
    sources = {"saesub": "_MODULES = {'a': 'user'}", "saesub.a": textwrap.dedent(code)}
    sources |= {f"saesub.{name}": textwrap.dedent(text) for name, text in modules.items()}
    return [index["plain"](site.message) for site in index["Package"](sources).sites()]


def test_no_place_that_makes_a_message_is_missed():
    made = re.compile(r"(?<!class )\bSaesubError\(|\bwarn\(")
    written = {
        (".".join(path.relative_to(ROOT).with_suffix("").parts), line)
        for path in (ROOT / "saesub").rglob("*.py")
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if made.search(text)
    }
    assert {(site.function.module, site.line) for site in _sites()} == written


@pytest.mark.parametrize(
    ("code", "messages"),
    [
        ('raise SaesubError("no text: give " "some.")', ["no text: give some."]),
        (
            'raise SaesubError(f"{n!r} of {x.shape}: {len(x)}")',
            ["‹n› of ‹shape of x›: ‹number of x›"],
        ),
        ('warnings.warn(f"{self._k} is {type(k).__name__}")', ["‹k› is ‹class›"]),
        ('MOST = 8\nraise SaesubError(f"above {MOST}")', ["above 8"]),
        ('TEXT = "why: {}."\nwarn(TEXT.format(reason))', ["why: ‹reason›."]),
        ('raise SaesubError("a" if x else f"b {y}")', ["a", "b ‹y›"]),
        (
            "def f(x):\n    text = 'a'\n    if x:\n        text = 'b'\n    raise SaesubError(text)",
            ["a", "b"],
        ),
        ("def g():\n    return 'a' + s\ndef f():\n    raise SaesubError(g())", ["a‹s›"]),
        ("def g(why=None):\n    raise SaesubError(why or 'a')\ndef f():\n    g('b')", ["b", "a"]),
        ("def _g(why):\n    raise SaesubError(f'no: {why}')\ndef f():\n    _g('b')", ["no: b"]),
        ("def f():\n    if text := 'a':\n        raise SaesubError(text)", ["a"]),
        (
            "def f():\n    for g in (h,):\n        text = g()\n        raise SaesubError(text)\n"
            "def h():\n    return 'a' if y else None",
            ["a"],
        ),
        (
            "def f():\n    try:\n        g()\n    except SaesubError as error:\n"
            "        raise SaesubError(f'here: {error}') from error",
            ["here: ‹another message›"],
        ),
        (
            "FORM = Form(what='store')\ndef f():\n    _g(FORM)\n"
            "def _g(form):\n    raise SaesubError(f'no {form.what}')",
            ["no store"],
        ),
    ],
)
def test_a_message_is_found_wherever_its_text_stands(code, messages):
    assert sorted(_messages(code)) == sorted(messages)


def test_a_message_is_found_in_another_module():
    code = "from saesub.b import why\ndef user():\n    raise SaesubError(why(1))"
    assert _messages(code, b="def why(n):\n    return f'{n} is odd'") == ["‹n› is odd"]


@pytest.mark.parametrize(
    "code",
    [
        "def user(text):\n    raise SaesubError(text)",
        "raise SaesubError(str(error))",
        "SaesubError()",
    ],
)
def test_a_message_without_text_is_refused_and_its_place_named(code):
    with pytest.raises(index["UnresolvedError"], match=r"saesub\.a:\d"):
        _messages(code)


@pytest.mark.parametrize(
    ("text", "halves"),
    [
        ("no text in x: give some.", ("no text in x", "give some")),
        ("all is equal: x is wrong. Use 'none'.", ("all is equal: x is wrong", "Use 'none'")),
        ("x fails (a: use b): wait; all is kept.", ("x fails (a: use b)", "wait; all is kept")),
        ("k must lie in 1..8, not 9.", ("k must lie in 1..8, not 9", "")),
        ("give at least one text", ("", "give at least one text")),
    ],
)
def test_a_message_is_split_where_its_advice_begins(text, halves):
    assert index["halves"]((text,)) == halves


def test_who_raises_a_message_is_the_nearest_function_that_users_call():
    sources = {
        "saesub": "_MODULES = {'a': 'user Public'}",
        "saesub.a": (
            "from saesub.b import helper\n"
            "def user():\n    _step()\n"
            "def _step():\n    helper()\n"
            "class Public:\n    def load(self):\n        helper()\n"
            "    def _called_by_saelens(self):\n        raise SaesubError('here')\n"
            "def script():\n    user()\n"
        ),
        "saesub.b": "def helper():\n    raise SaesubError('there')",
    }
    package = index["Package"](sources)
    raised = {index["plain"](s.message): package.raisers(s.function) for s in package.sites()}
    assert raised == {"here": ["Public"], "there": ["Public.load", "user"]}


# How the messages begin that say what was wrong and leave it there: the list only becomes shorter.


def test_an_error_says_what_to_do_or_which_value_is_wanted():
    messages = [index["plain"](site.message) for site in index["lacking"](_sites())]
    told = "say what to do, after a colon; _IMPERATIVES has the verbs that an advice begins with"
    assert messages == [], told


def test_what_looks_like_markdown_stands_as_it_is_said():
    assert index["_escaped"]("x[1] | a*b __version__ n_k <b>") == (
        r"x\[1] \| a\*b \_\_version\_\_ n_k \<b>"
    )
