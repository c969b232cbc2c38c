"""The index pages that web servers make of folders (Apache, nginx, ``python -m http.server``)."""

from __future__ import annotations

from html.parser import HTMLParser
from urllib.parse import urljoin


def links_below(page: str, folder: str) -> list[str]:
    """Return the URLs that an index page lists of its folder, sorted; folders end with a slash.

    Links to other places are left out. So are links with a query or a fragment, which sort the page
    in another order.

    Args:
        page: The HTML of the page.
        folder: Its URL, with a final slash.
    """
    parser = _LinkParser()
    parser.feed(page)
    found = set()
    for link in parser.links:
        try:
            url = urljoin(folder, link.strip())
        except ValueError:  # not a URL: "http://["
            continue
        if url.startswith(folder) and url != folder and not {"?", "#"} & set(url):
            found.add(url)
    return sorted(found)


class _LinkParser(HTMLParser):
    """Collects the targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect a link; called by the parser."""
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]
