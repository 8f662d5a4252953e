"""Find links of a page that lead nowhere."""

import re
from collections.abc import Iterator
from pathlib import Path

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def dead_links(text: str, folder: Path) -> Iterator[str]:
    """Yield the dead links of a page in this folder, to files and to their headings; the web is not asked."""
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        if path and not (folder / path).exists():
            yield target
            continue
        if anchor and anchor not in anchors((folder / path).read_text() if path else text):
            yield target


def anchors(text: str) -> set[str]:
    """Return the anchors of headings as forges make them: lower case, hyphens for spaces, no other punctuation."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
