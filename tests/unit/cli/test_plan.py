"""``apollo-tp plan`` as a command: its table, its JSON, its exit status and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apollo_tp.cli import main

SHAPES = Path(__file__).parents[3] / "benchmarks" / "model_shapes.json"


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(json.loads(SHAPES.read_text())["Qwen3-8B"]))
    return str(tmp_path)


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main.main(["plan", *arguments])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_what_fits_and_the_command_for_it(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _run(capsys, model, "--gpus", "2xH200-141", "--json")
    answer = json.loads(out)
    assert status == 0
    assert answer["fits"]
    assert answer["tensor_parallel_size"] == 2
    assert answer["overrides"] == ["train.max_micro_batch_tokens=4096", "train.max_sequence_tokens=4096"]
    assert len({tuple(choice["overrides"]) for choice in answer["choices"]}) == 8
    status, out, _ = _run(capsys, model, "--gpus", "2xH200-141", "--length", "1024", "--concurrency", "4")
    assert (
        f"it fits: apollo-tp serve {model} --tensor-parallel-size 2 --max-model-len 1024 --gpu-memory-utilization"
        in out
    )
    assert "scaled from 8.19B at TP 1 and 2" in out


def test_what_does_not_fit_has_status_1(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On 24 GB not even the cheapest choice fits."""
    status, out, _ = _run(capsys, model, "--gpus", "1xL4-24", "--concurrency", "1")
    assert status == 1
    assert "it does not fit; try more GPUs" in out
    assert "too much" in out


def test_options_that_cannot_be_planned_are_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        ((model, "--gpus", "two"), "--gpus: got 'two', expected COUNTxNAME-GB"),
        ((model, "--gpus", "4xH200-141", "-tp", "2"), "--tensor-parallel-size: got 2 for 4 GPUs, expected as many"),
        ((model, "--gpus", "1xH200-141", "--tokens", "1"), "--tokens: got 1, expected"),
        ((str(tmp_path / "none"), "--gpus", "1xH200-141"), "MODEL: got"),
    ):
        status, _, err = _run(capsys, *arguments)
        assert status == 2
        assert said in err
