"""A hook of mkdocs (`hooks` in mkdocs.yml), by which documents that are written for GitHub read the same in the site.

A file of the repository outside docs/ that a document links to is below `repository/` of the site: Markdown as a page, all
others as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()[^()\s:#]+(?=[)#])")
ROW = re.compile(r"^\|.*", re.MULTILINE)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the files that documents link to, and those that these link to if they are documents themselves."""
    documents = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    for document in documents:
        for target in _targets(document, config):
            place = _place(target, config)
            if files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(target)))
                documents += [target] if target.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    document = Path(page.file.abs_src_path or "")
    start = os.path.dirname(page.file.src_uri)

    def in_site(link: re.Match[str]) -> str:
        target = _file(document, link[0], config)
        return os.path.relpath(_place(target, config), start) if target else link[0]

    return ROW.sub(_unescape, LINK.sub(in_site, markdown))


def _unescape(row: re.Match[str]) -> str:
    """GitHub needs the backslash before a bar in the code of a table; Python-Markdown would print it."""
    return re.sub(r"`[^`]+`", lambda code: code[0].replace(r"\|", "|"), row[0])


def _targets(document: Path, config: MkDocsConfig) -> Iterator[Path]:
    found = (_file(document, link, config) for link in LINK.findall(document.read_text()))
    return (target for target in found if target)


def _file(document: Path, link: str, config: MkDocsConfig) -> Path | None:
    """The file of the repository; None if there is none, which mkdocs then reports."""
    path = (document.parent / link).resolve()
    return path if path.is_file() and path.is_relative_to(_root(config)) else None


def _place(path: Path, config: MkDocsConfig) -> str:
    """The path among the site's sources."""
    if path.is_relative_to(config.docs_dir):
        return path.relative_to(config.docs_dir).as_posix()
    return f"repository/{path.relative_to(_root(config)).as_posix()}"


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent
