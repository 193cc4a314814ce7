"""Site and slides for tests: built once into a scratch folder, served on loopback, checked.

What a page may not do is in one place: ask for anything off loopback, complain on the console (as
it does when a file is missing), or link to something that is not there.
"""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import ConsoleMessage, Page

from tests.environment import FIXED, ROOT

HERE = ("127.0.0.1", "localhost")


def build(factory: pytest.TempPathFactory, name: str, *options: str, source: Path = ROOT) -> Path:
    """The folder that Sphinx writes; two in one run share what they read and draw.

    AssertionError if it fails or warns.
    """
    scratch = factory.getbasetemp()
    command = ["-q", "--keep-going", "-W", "-c", "docs", "-d", str(scratch / "doctrees")]
    result = subprocess.run(
        [sys.executable, "-m", "sphinx", *command, *options, str(source), str(scratch / name)],
        cwd=ROOT, env=os.environ | FIXED, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-5000:]
    return scratch / name


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files, and no word about them."""

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which a folder can be read."""
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def watch(page: Page) -> list[str]:
    """A list that gets an entry for whatever goes wrong in this page from now on."""
    troubles: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            troubles.append(f"{page.url}: console: {message.text}")

    def asked(url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and parts.hostname not in HERE:
            troubles.append(f"{page.url}: request off loopback: {url}")

    page.on("console", heard)
    page.on("pageerror", lambda error: troubles.append(f"{page.url}: page error: {error}"))
    page.on("request", lambda request: asked(request.url))
    page.on("websocket", lambda socket: asked(socket.url))
    return troubles


class References(HTMLParser):
    """The ids of a page, and what it refers to."""

    LINKS = ("href", "src", "srcset", "poster", "data")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.without_alt: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each tag."""
        found = {name: value or "" for name, value in attrs}
        self.ids.add(found.get("id", ""))
        self.links |= {found[name] for name in self.LINKS if name in found}
        if tag == "img" and len(found.get("alt", "")) < 20:
            self.without_alt.append(f"{found.get('src')}: {found.get('alt', '')!r}")


def broken(folder: Path) -> list[str]:
    """References of all pages to files and anchors that are not there."""
    pages = {path.resolve(): References(path) for path in folder.rglob("*.html")}
    wrong = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            name, anchor = unquote(parts.path), unquote(parts.fragment)
            target = (path.parent / name).resolve() if name else path
            if target.is_dir() or not target.exists():
                wrong.append(f"{path.relative_to(folder.resolve())}: no file {link}")
            elif anchor and target in pages and anchor not in pages[target].ids:
                wrong.append(f"{path.relative_to(folder.resolve())}: no anchor {link}")
    return sorted(wrong)
