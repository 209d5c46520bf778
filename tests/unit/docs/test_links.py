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


NAMED = re.compile(r"^[A-Za-z_][\w.]*$")
PACKAGE = re.compile(r"package `(\w+)`")


def undefined_names(architecture: str) -> list[str]:
    """Names in the second column that no file or package named next after them defines: "`Store.add_job`, `FILE.py`"."""
    missing = []
    for line in architecture.splitlines():
        if not line.startswith("| ") or len(cells := line.strip("|").split(" | ")) != 2:
            continue
        waiting: list[str] = []
        for token in re.findall(r"package `\w+`|`[^`]+`", cells[1]):
            package, name = PACKAGE.fullmatch(token), token.strip("`")
            if package is None and not name.endswith(".py"):
                waiting += [name] if NAMED.match(name) else []
                continue
            place = ROOT / "apollo_tp" / package[1] if package else ROOT / name
            files = [place] if place.is_file() else list(place.rglob("*.py"))
            source = "\n".join(file.read_text() for file in files)
            missing += [
                f"{part} of {token}"
                for name in waiting
                for part in name.split(".")
                if not re.search(rf"^\s*(?:async )?(?:def|class) {part}\b", source, re.MULTILINE)
            ]
            waiting = []
    return missing


def test_functions_that_the_architecture_names_are_where_it_says():
    text = (ROOT / "docs/architecture.md").read_text()
    paths = text[text.index("## The path of a training request") :]
    assert paths.count(".py`") > 30
    assert not undefined_names(paths)


@pytest.mark.parametrize(
    "cell",
    [
        "`Store.no_such`, `apollo_tp/coordinator/jobs/store.py`",
        "`Nothing.add_job`, `apollo_tp/coordinator/jobs/store.py`",
        "`add_job`, `apollo_tp/model/bind.py`; `bind_model`, `apollo_tp/model/bind.py`",
        "`bind_model`, package `optim`",
    ],
)
def test_a_function_that_moved_away_is_found(cell):
    assert len(undefined_names(f"| a step | {cell} |")) == 1
    assert not undefined_names(
        "| a step | `bind_model`, package `model`; `Store.add_job`, `apollo_tp/coordinator/jobs/store.py` |"
    )
