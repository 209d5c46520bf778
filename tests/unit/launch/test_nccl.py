"""What a rank does to NCCL's settings before torch reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import json, os, sys, types
from apollo_tp.launch.__main__ import main

def run(config, on_server_gone):
    found = [os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING"), "torch" in sys.modules]
    open(f"{sys.argv[1]}/rank{os.environ.get('RANK', 0)}", "w").write(json.dumps(found))

sys.modules["apollo_tp.launch.session"] = types.SimpleNamespace(run=run)
sys.exit(main([]))
"""
"""A rank whose session says in a file what it finds."""


def launch(tmp_path: Path, ranks: int, given: str | None) -> tuple[list[list[object]], str]:
    """What each rank found, and the log."""
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_NCCL_ASYNC_ERROR_HANDLING"}
    if given is not None:
        environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = given
    done = subprocess.run(
        [sys.executable, *torchrun, str(tmp_path / "rank.py"), str(tmp_path)],
        env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(ranks)], done.stderr


@pytest.mark.parametrize(("ranks", "given"), [(2, None), (2, "2"), (1, None), (1, "0"), (1, "3")])
def test_communicators_are_not_aborted_before_a_rank_ends(tmp_path: Path, ranks: int, given: str | None) -> None:
    """torchrun sets 1 where nothing is set, and hands on what is: a rank overwrites both before torch is there, and says
    so."""
    found, log = launch(tmp_path, ranks, given)
    assert found == [["3", False]] * ranks
    effective = given or ("1" if ranks > 1 else "3")
    assert log.count(f"got {effective} (torchrun sets 1), expected 3") == ranks * (effective != "3")


def test_the_value_means_what_we_take_it_for() -> None:
    """torch's own header: 3 ends the process and does not abort."""
    import torch

    header = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp"
    text = header.read_text()
    assert "SkipCleanUp = 3" in text
    assert "#define SHOULD_CLEAN_UP(a) (a != NoHandling && a != SkipCleanUp)" in text
    assert "#define SHOULD_TEAR_DOWN(a) (a != NoHandling && a != CleanUpOnly)" in text
