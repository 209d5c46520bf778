"""Documents lead nowhere that does not exist: links, headings that links name, files, folders and commands."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCUMENTS = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [
    path
    for folder in ("apollo_tp", "benchmarks", "conf", "examples", "launch", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".yaml", ".sh", ".html", ".sbatch"}
]
FOLDERS = r"(?:apollo_tp|benchmarks|conf|docs|examples|launch|tests|\.ci)"
LINK = re.compile(r"\]\(([^()\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
PATH = re.compile(rf"(?<![\w/.-]){FOLDERS}/(?:[\w.-]+/)*[\w.-]*\.[a-z]\w*")
MODULE = re.compile(r"-m ((?:apollo_tp|benchmarks|examples|tests)[\w.]*)")
DOCUMENT_IN_SOURCE = re.compile(r"(?<![\w/.-])(?:docs/[\w/-]+\.md|[A-Z]{3,}\.md)")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings outside code."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    text, broken = CODE.sub("", document.read_text()), []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


def missing_paths(document: Path) -> list[str]:
    code = " ".join(CODE.findall(document.read_text()))
    return sorted({path for path in PATH.findall(code) if not (ROOT / path).exists()})


def missing_modules(document: Path) -> list[str]:
    found = {module.rstrip(".") for module in MODULE.findall(document.read_text())}
    return sorted(module for module in found if importlib.util.find_spec(module) is None)


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_what_documents_name_exists(document):
    broken = broken_links(document) + missing_paths(document) + missing_modules(document)
    assert not broken, f"{relative(document)}: got {broken}, expected links, paths and modules that exist"


def test_documents_that_code_and_configuration_name_exist():
    broken = {
        f"{relative(source)}: {name}"
        for source in SOURCES
        for name in DOCUMENT_IN_SOURCE.findall(source.read_text())
        if not (ROOT / name).exists()
    }
    assert not broken, f"got {sorted(broken)}, expected names of documents that exist"


@pytest.mark.parametrize(
    "text",
    [
        "[a](b.md)",
        "[a](#no-such-heading)",
        "`docs/no.txt`",
        "```\npython benchmarks/no.py\n```",
        "`python -m apollo_tp.no`",
    ],
)
def test_the_check_finds_what_is_broken(tmp_path, text):
    document = tmp_path / "a.md"
    document.write_text(f"# A heading\n\n[fine](#a-heading) {text}\n")
    assert broken_links(document) + missing_paths(document) + missing_modules(document)
    document.write_text("# A heading\n\n[fine](#a-heading) `benchmarks/on_gpus.py`, `python -m apollo_tp.launch`\n")
    assert not broken_links(document) + missing_paths(document) + missing_modules(document)
