"""Build the site of these pages into build/site: make docs. Fails on dead links or anchors, and on use of the network.

build/docs is the tree that the site is made from. It has the pages at the same paths as here, so that their links work
unchanged, and what they link to; also the pages that commands have written into build/pages. The site has no repository
to send readers to, so each linked source becomes a page.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
FIRST = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
WRITTEN = ("architectures.md", "errors.md", "kernels-compiled.md", "reference.md")  # by commands, into build/pages
AS_THEY_ARE = {".md", ".png", ".json", ".npz"}  # copied to the site; other linked files become pages with their text
LANGUAGES = {"h": "cpp", "cuh": "cuda"}  # otherwise the suffix is the language's name
HEAD = '---\ntitle: "{}"\nsearch:\n  exclude: true\n---\n\n'
FENCED = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")
ROW = re.compile(r"^\|.*", re.MULTILINE)
CODE = re.compile(r"`[^`\n]+`")


def main() -> None:
    """Stage, build, check."""
    staged, site = BUILD / "docs", BUILD / "site"
    for made in (staged, site):
        shutil.rmtree(made, ignore_errors=True)
    stage(ROOT, staged)
    stage_written(BUILD / "pages", staged / "docs" / "reference")
    shutil.copy(ROOT / "docs" / "site.css", staged / "docs")
    shutil.copy(ROOT / "docs" / "zensical.toml", BUILD)  # its folder must hold the tree and the site
    build = ["build", "--strict", "--clean", "--config-file", BUILD / "zensical.toml"]
    if code := subprocess.run([sys.executable, "-m", "zensical", *build]).returncode:
        sys.exit(code)
    if faults := sorted(set(check(site))):
        sys.exit("\n".join(faults))


def stage(root: Path, staged: Path) -> None:
    """Copy the pages, and everything that they link to, directly or indirectly."""
    waiting = [*(root / name for name in FIRST), *sorted((root / "docs").rglob("*.md"))]
    for path in waiting:  # the list grows
        name = path.relative_to(root).as_posix()
        target = staged / as_linked(name, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.suffix != ".md":
            target.write_bytes(path.read_bytes() if path.suffix in AS_THEY_ARE else source(path, name).encode())
            continue
        text, folder = (folder_list(path, name), path) if path.is_dir() else (path.read_text(), path.parent)
        target.write_text(rewritten(text, folder))
        linked = [(folder / link).resolve() for part in FENCED.split(text)[::2] for link in LINK.findall(part)]
        waiting += dict.fromkeys(each for each in linked if each.exists() and each not in waiting)


def stage_written(pages: Path, staged: Path) -> None:
    """Copy the pages that commands wrote; their links are relative to docs/reference."""
    for name in WRITTEN:
        if not (pages / name).is_file():
            sys.exit(f"error: {pages / name} must be written before the site is built: make docs does both")
        (staged / name).write_text(rewritten((pages / name).read_text(), ROOT / "docs" / "reference"))


def source(path: Path, name: str) -> str:
    """Return a page with the text of a file."""
    suffix = path.suffix[1:]
    return f"{HEAD.format(name)}```` {LANGUAGES.get(suffix, suffix)}\n{path.read_text()}````\n"


def folder_list(path: Path, name: str) -> str:
    """Return a page with links to all files in a folder."""
    inside = [each.relative_to(path).as_posix() for each in sorted(path.rglob("*")) if each.is_file()]
    return HEAD.format(name) + "".join(f"- [{each}]({each})\n" for each in inside if "__pycache__" not in each)


def rewritten(text: str, folder: Path) -> str:
    """Return a page's text with links to the pages of sources and folders; other links stay, dead ones too."""
    parts = FENCED.split(text)
    for i in range(0, len(parts), 2):  # the text between blocks of code
        parts[i] = LINK.sub(lambda link: as_linked(link[0], folder), parts[i])
        # A | in a cell's code is escaped for forges; the builder would show the backslash.
        parts[i] = ROW.sub(lambda row: CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0]), parts[i])
    return "".join(parts)


def as_linked(link: str, folder: Path) -> str:
    """Return the site's path for a link's target."""
    target = folder / link
    if target.is_dir():
        return link.rstrip("/") + "/README.md"  # the index of a folder, for the builder and for a forge
    return f"{link}.md" if target.is_file() and target.suffix not in AS_THEY_ARE else link


class Html(HTMLParser):
    """The anchors and the addresses of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, str]] = []  # (tag, address)
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.anchors |= {value for name, value in attrs if name == "id" and value}
        self.links += [(tag, value) for name, value in attrs if name in ("href", "src") and value]


def check(site: Path) -> Iterator[str]:
    """Yield what is wrong with a built site: the builder itself ignores dead pictures, files and entries of nav."""
    # 404.html comes from the builder, and its links begin at the server's root.
    pages = {path: Html(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
    for path, html in pages.items():
        for tag, address in html.links:
            name, url = path.relative_to(site).as_posix(), urlsplit(address)
            if url.scheme or url.netloc:
                if tag != "a":
                    yield f"{name}: a page must load nothing from elsewhere, got <{tag}> {address}"
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                yield f"{name}: dead link {address}"
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].anchors:
                yield f"{name}: dead anchor {address}"
    for path in site.rglob("*.css"):
        yield from (f"{path.name}: loads {url}" for url in re.findall(r"url\(.?(https?:[^)]*)\)", path.read_text()))


if __name__ == "__main__":
    main()
