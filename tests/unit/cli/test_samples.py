"""Files of samples in the forms in which data sets come, and what is said of those that cannot be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from apollo_tp.cli.answers import RefusedError
from apollo_tp.cli.samples import ROWS_AT_ONCE, SampleFile
from apollo_tp.coordinator.samples.forms import converted_from

SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
ALPACA = {"instruction": "Say hi.", "input": "", "output": "hi"}
MESSAGES = {"messages": [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "hello"}]}


def _samples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(bytes(sample)) for sample in SampleFile(path).samples]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf", b"\n  "], ids=["plain", "bom", "blank"])
def test_an_array_is_its_elements(tmp_path: Path, indent: int | None, begin: bytes) -> None:
    """As ShareGPT and Alpaca files mostly are."""
    path = tmp_path / "data.json"
    path.write_bytes(begin + json.dumps([SHAREGPT, ALPACA, MESSAGES], indent=indent, ensure_ascii=False).encode())
    assert _samples(path) == [SHAREGPT, ALPACA, MESSAGES]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"text": "a"}, 5]', r"data\.json, sample 2: got a wrong value .*expected one object"),
        (b'[{"text": "a"}', r"data\.json: got malformed JSON .*expected an array of objects"),
        (b"[]", r"data\.json, sample 1: got no samples"),
        (b'{"text": "a"}\n5', r"data\.json, line 2: got a wrong value"),
    ],
)
def test_what_is_wrong_is_named_by_its_number(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(RefusedError, match=said):
        SampleFile(tmp_path / "data.json")


def test_refusals_of_the_coordinator_are_located(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([MESSAGES, SHAREGPT]))
    source = SampleFile(tmp_path / "data.json")
    with pytest.raises(RefusedError, match=r"data\.json, sample 2: no"), source.located():
        raise RefusedError("no", "samples[1].messages")


def test_without_their_packages_tables_are_refused_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    (tmp_path / "data.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(RefusedError, match=r"got a Parquet file and no package pyarrow.*pip install pyarrow"):
        SampleFile(tmp_path / "data.parquet")
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(RefusedError, match=r"got a folder and no package datasets.*pip install datasets"):
        SampleFile(tmp_path)


def test_another_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        SampleFile(tmp_path)


def test_the_rows_of_a_parquet_file(tmp_path: Path) -> None:
    """Also more than are read at once, and columns that only some rows have."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is no dependency")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [SHAREGPT | {"system": None}] * ROWS_AT_ONCE + [SHAREGPT | {"system": "Be brief."}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert _samples(tmp_path / "data.parquet") == rows


def test_the_rows_of_a_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is no dependency")
    table = pytest.importorskip("pyarrow").Table.from_pylist([MESSAGES, MESSAGES])
    saved = datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint="0")  # some releases cannot make one up
    saved.save_to_disk(tmp_path / "one")
    assert _samples(tmp_path / "one") == [MESSAGES, MESSAGES]
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "two")
    with pytest.raises(RefusedError, match=r"several splits, expected one of them: \S+/two/train, \S+/two/test"):
        SampleFile(tmp_path / "two")
    assert _samples(tmp_path / "two" / "train") == [MESSAGES, MESSAGES]
    (tmp_path / "one/state.json").unlink()
    with pytest.raises(RefusedError, match=r"one: got a folder .*Dataset\.save_to_disk"):
        SampleFile(tmp_path / "one")


@pytest.mark.parametrize(
    ("sample", "form"),
    [
        (SHAREGPT, "ShareGPT"), (ALPACA, "Alpaca"), (MESSAGES, None), ({"prompt": "a", "completion": "b"}, None),
        ({"prompt": MESSAGES["messages"][:1], "completion": MESSAGES["messages"][1:]}, "TRL"),
        (SHAREGPT | {"messages": None}, "ShareGPT"), (MESSAGES | {"conversations": None}, None), ({"text": "a"}, None),
    ],
)  # fmt: skip
def test_what_is_converted_is_said(sample: dict[str, Any], form: str | None) -> None:
    assert converted_from(json.dumps(sample).encode()) == form
