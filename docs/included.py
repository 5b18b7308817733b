"""Pages of the site that are files elsewhere in the repository: shown as they are, with links that work in both."""

from __future__ import annotations

import posixpath
import re
from functools import partial
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/heads/RESULTS.md": "results.md",
    "benchmarks/speed/README.md": "speed.md",
}
WIDE = "---\nhide: [toc]\n---\n"  # room for the drawing
PICTURES = "benchmarks/heads/results"  # they stand under this name on the site, too
LINK = re.compile(r"\]\((?!\w+:|#)([^)#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and their pictures."""
    root = Path(config.config_file_path).parent
    for picture in sorted((root / PICTURES).glob("*.png")):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    for source, page in PAGES.items():
        text = (root / source).read_text(encoding="utf-8")
        text = LINK.sub(partial(relinked, source=source), text).replace(" ± ", "\u00a0±\u00a0")
        files.append(File.generated(config, page, content=WIDE + text if page == "architecture.md" else text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links of the pages to files elsewhere in the repository, where those who read it there find them."""
    return LINK.sub(partial(of_the_site, page=f"docs/{page.file.src_uri}"), markdown)


def of_the_site(link: re.Match[str], page: str) -> str:
    """A link of a page, to the page or picture that the site has for a file elsewhere; any other as it is."""
    folder = posixpath.dirname(page)
    target = posixpath.normpath(posixpath.join(folder, link[1]))
    picture = f"pictures/{posixpath.basename(target)}" if posixpath.dirname(target) == PICTURES else None
    name = PAGES.get(target, picture)
    return f"]({posixpath.relpath(f'docs/{name}', folder)}" if name else link[0]


def relinked(link: re.Match[str], source: str) -> str:
    """A link of an included file, to the page or picture that the site has for it; the strict build tells others."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
    if posixpath.dirname(target) == PICTURES:
        return f"](pictures/{posixpath.basename(target)}"
    return f"]({PAGES.get(target, target)}"
