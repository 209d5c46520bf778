"""The site of `make docs`: links lead where they do on GitHub, a broken one fails the build, and no other host is asked."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).parents[3]
LOADED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "a" and (link := given.get("href")):
            self.links.append(link)
        if (source := given.get(LOADED.get(tag, ""))) is not None:
            self.loaded.append(source)


def make_site(folder: Path, documents: dict[str, str], nav: str = "[index.md]") -> Path:
    """A repository of these files, and its site by the hook and the checks of ours."""
    ours = (ROOT / "mkdocs.yml").read_text()
    validation = re.search(r"^validation:\n(?:  .*\n)+", ours, re.MULTILINE)
    assert validation
    (folder / "mkdocs.yml").write_text(
        "site_name: test\nstrict: true\nuse_directory_urls: false\nnot_in_nav: /repository/\n"
        f"docs_dir: texts\nhooks: [{ROOT / 'scripts/site_links.py'}]\nnav: {nav}\n{validation[0]}"
    )
    for name, text in documents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    build(load_config(str(folder / "mkdocs.yml")))
    return folder / "site"


def test_links_to_files_outside_the_documents_lead_to_them(tmp_path: Path) -> None:
    site = make_site(
        tmp_path,
        {
            "texts/index.md": "# Here\n\n[code](../src/code.py) [other](../other.md#what-it-is) [page](deep/page.md)\n",
            "texts/deep/page.md": "# Page\n\n[other](../../other.md)\n\n| a |\n|---|\n| `x\\|y` |\n",
            "other.md": "# Other\n\n## What it is\n\n[back](texts/deep/page.md) [data](data/figures.json)\n",
            "src/code.py": "print()\n",
            "data/figures.json": "{}\n",
            "data/unnamed.json": "{}\n",
        },
        nav="[index.md, deep/page.md]",
    )
    index, page, other = (Page(site / name) for name in ("index.html", "deep/page.html", "repository/other.html"))
    assert {"repository/src/code.py", "repository/other.html#what-it-is", "deep/page.html"} <= set(index.links)
    assert "../repository/other.html" in page.links
    assert {"../deep/page.html", "data/figures.json"} <= set(other.links)
    assert "<code>x|y</code>" in (site / "deep/page.html").read_text()
    copied = {str(path.relative_to(site)) for path in (site / "repository").rglob("*") if path.is_file()}
    assert copied == {"repository/other.html", "repository/src/code.py", "repository/data/figures.json"}
    assert (site / "repository/src/code.py").read_text() == "print()\n"


@pytest.mark.parametrize(
    "broken",
    [
        {"texts/index.md": "[a](no.md)"},
        {"texts/index.md": "[a](../no.py)"},
        {"texts/index.md": "# A\n\n[a](#b)"},
        {"texts/index.md": "[a](../other.md#no)", "other.md": "# Other\n"},
        {"texts/index.md": "[a](../other.md)", "other.md": "[a](no.py)\n"},
        {"texts/index.md": "# A\n", "texts/not_in_the_navigation.md": "# B\n"},
    ],
)
def test_what_is_broken_fails_the_build(tmp_path: Path, broken: dict[str, str]) -> None:
    with pytest.raises(Abort, match="1 warnings"):
        make_site(tmp_path, broken)


@pytest.mark.slow
def test_the_site_is_built_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    """As `make docs` builds it."""
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    pages = {path: Page(path).loaded for path in tmp_path.rglob("*.html")}
    assert len(pages) > 50
    assert all(pages.values()), "each page has at least its style"
    elsewhere = {source for loaded in pages.values() for source in loaded if re.match(r"(?:https?:)?//", source)}
    styles = {url for path in tmp_path.rglob("*.css") for url in re.findall(r"url\(([^)]+)\)", path.read_text())}
    assert elsewhere | {url for url in styles if re.match(r"['\"]?(?:https?:)?//", url)} == set()
