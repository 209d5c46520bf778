"""What a trainer that starts again knows of the served weights, and which optimizer state it takes."""

from __future__ import annotations

from pathlib import Path

from apollo_tp.launch.lineage import LineageFile


def test_the_record_counts_what_a_failed_step_wrote_and_nothing_else(tmp_path: Path) -> None:
    """A record of weights that nobody wrote would stop their comparison with the checkpoint."""
    lineage = LineageFile(tmp_path, "no/such/model", keep=True)
    lineage.count_to(0)
    assert not LineageFile(tmp_path, "no/such/model", keep=True).trained_here
    lineage.before_write()
    lineage.count_to(1)
    again = LineageFile(tmp_path, "no/such/model", keep=True)
    assert (again.trained_here, again.record.weight_version) == (True, 1)
