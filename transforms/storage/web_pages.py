"""The index pages that web servers make of folders (Apache, nginx, ``python -m http.server``)."""

from __future__ import annotations

from html.parser import HTMLParser
from urllib.parse import urljoin


def links_below(page: str, folder: str) -> list[str]:
    """What an index page lists of its folder, sorted, each once: URLs, folders with a last slash.

    Links that lead elsewhere are left out, and so are those with a query or a fragment, by which
    servers have a page sorted in another order.

    Args:
        page: The page, HTML.
        folder: Its URL, with a slash at the end.
    """
    parser = _LinkParser()
    parser.feed(page)
    found = set()
    for link in parser.links:
        try:
            url = urljoin(folder, link.strip())
        except ValueError:  # no URL at all, "http://["
            continue
        if url.startswith(folder) and url != folder and not {"?", "#"} & set(url):
            found.add(url)
    return sorted(found)


class _LinkParser(HTMLParser):
    """Collects where the links of a page lead."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take a link; the parser calls this."""
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]
