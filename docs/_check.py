"""Faults of the built site that need no browser: ``python docs/_check.py out/site``.

Links and anchors that lead nowhere, pictures without an alternative text, identifiers that stand
twice on a page, code that fails when it is copied because a space or quote of it was changed, and
what pages and styles fetch from elsewhere. ``tests/site_browser.py`` sees what
only a browser knows.
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

FETCHES = {"img": "src", "script": "src", "iframe": "src", "source": "src", "video": "src"}
STYLES = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""")


class Link(NamedTuple):
    tag: str
    target: str
    fetched: bool


class Page(HTMLParser):
    """Links, anchors and pictures of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[Link] = []
        self.anchors: list[str] = []
        self.unnamed: list[str] = []
        self.code = [""]  # of each block
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.anchors.append(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(Link(tag, given["href"], False))
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.links.append(Link(tag, given.get("href", ""), True))
        if given.get(FETCHES.get(tag, "")):
            self.links.append(Link(tag, given[FETCHES[tag]], True))
        if tag == "pre":
            self._inside = True
            self.code.append("")
        if tag == "img" and not given.get("alt", "").strip():
            self.unnamed.append(given.get("src", ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.code[-1] += data


def faults(site: pathlib.Path) -> list[str]:
    """One line for each fault, with its page."""
    pages = {path: Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        where = path.relative_to(site).as_posix()
        found += [f"{where}: {fault}" for fault in _of_page(path, page, pages, site)]
    for path in sorted(site.rglob("*.css")):
        outside = STYLES.findall(path.read_text("utf-8"))
        found += [f"{path.relative_to(site).as_posix()}: fetches {url}" for url in outside]
    return found if pages else [f"{site}: no page"]


def _of_page(
    path: pathlib.Path, page: Page, pages: dict[pathlib.Path, Page], site: pathlib.Path
) -> Iterator[str]:
    for name in page.unnamed:
        yield f"no alternative text: {name}"
    for anchor in sorted({a for a in page.anchors if page.anchors.count(a) > 1}):
        yield f"identifier twice: {anchor}"
    for code in page.code:
        if found := re.search(r"[\u00a0\u2018-\u201f\u200b]", code):
            yield f"code with {found[0]!r}: {code[:40]!r}"
    for link in page.links:
        parts = urlsplit(link.target)
        if parts.scheme == "data":
            continue
        if parts.scheme or parts.netloc:
            if link.fetched:
                yield f"fetches {link.target}"
            elif parts.scheme != "https" or not re.fullmatch(r"[\w.-]+\.\w+", parts.netloc):
                yield f"no https address: {link.target}"
            continue
        target = _place(path, parts.path, site)
        if not target.is_file():
            yield f"leads nowhere: {link.target}"
        anchors = pages[target].anchors if target in pages else [unquote(parts.fragment)]
        if parts.fragment and unquote(parts.fragment) not in anchors:
            yield f"no such anchor: {link.target}"


def _place(page: pathlib.Path, link: str, site: pathlib.Path) -> pathlib.Path:
    """The file that a link of a page opens."""
    start = site if link.startswith("/") else page.parent
    target = (start / unquote(link).lstrip("/")).resolve() if link else page
    return target / "index.html" if target.is_dir() else target


if __name__ == "__main__":
    lines = faults(pathlib.Path(sys.argv[1]).resolve())
    print("\n".join(lines) or "The site has no fault that needs no browser.")
    sys.exit(bool(lines))
