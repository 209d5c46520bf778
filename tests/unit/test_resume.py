"""What a trainer that starts again knows of the served weights, and which optimizer state it takes."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from apollo_tp.config import Config, OptimConfig
from apollo_tp.launch.lineage import Lineage, LineageFile
from apollo_tp.launch.session import _resume


def test_the_record_counts_what_a_failed_step_wrote_and_nothing_else(tmp_path: Path) -> None:
    """A record of weights that nobody wrote would stop their comparison with the checkpoint."""
    lineage = LineageFile(tmp_path, "no/such/model", keep=True)
    lineage.count_to(0)
    assert not LineageFile(tmp_path, "no/such/model", keep=True).trained_here
    lineage.before_write()
    lineage.count_to(1)
    again = LineageFile(tmp_path, "no/such/model", keep=True)
    assert (again.trained_here, again.record.weight_version) == (True, 1)


@pytest.mark.parametrize(
    ("reset", "exists", "message"),
    [
        (False, True, ""),
        (
            True,
            True,
            "optim.reset_state=true: fresh optimizer state, as at every start while it is set, not that of {}",
        ),
        (False, False, "{}/optimizer: got no such folder, expected the optimizer state of the served weights"),
    ],
)
def test_state_that_is_not_loaded_is_told(
    reset: bool, exists: bool, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless it is: because it is not wanted, or because its folder is gone."""
    if exists:
        (tmp_path / "optimizer").mkdir()
    loaded: list[Path] = []
    lineage = SimpleNamespace(record=Lineage(checkpoint=str(tmp_path)), trained_here=False)
    with caplog.at_level(logging.WARNING, "apollo_tp"):
        _resume(Config(optim=OptimConfig(reset_state=reset)), SimpleNamespace(load=loaded.append), lineage)  # type: ignore[arg-type]
    assert loaded == ([] if message else [tmp_path / "optimizer"])
    assert bool(caplog.messages) == bool(message)
    assert message.format(tmp_path) in caplog.text
