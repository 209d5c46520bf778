"""Ranks find each other: whatever other launchers left in the environment, without a host name, and after restarts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support import forks, played_hosts
from tests.support.launchers import LAUNCHERS, MPIRUN
from tests.support.processes import FORKING_TORCHRUN

RANK = """
import logging, os, sys
logging.basicConfig(level=logging.INFO)
from apollo_tp.launch.distributed import join
{before}
world = join(20.0, {seconds})
import torch, torch.distributed as dist
total = torch.ones(1)
dist.all_reduce(total)
attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
print(f"JOINED rank={{world.rank}} size={{world.size}} sum={{total.item():.0f}} attempt={{attempt}}", flush=True)
{after}
dist.barrier()
dist.destroy_process_group()
"""


def launch(
    tmp_path: Path,
    *options: str,
    launcher: str = "torchrun",
    before: str = "",
    after: str = "",
    seconds: float = 60.0,
    timeout: float = 120.0,
    **environment: str,
) -> tuple[int, str, list[tuple[int, ...]]]:
    """(exit status, output, (rank, size, sum) of each rank that joined) of two ranks."""
    code = RANK.format(before=before, after=after, seconds=seconds)
    all_variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    if launcher == "torchrun":
        ranks = ["--standalone", "--nproc-per-node", "2", *options, "-m", "tests.support.run_code", code]
        done = forks.run(FORKING_TORCHRUN, [FORKING_TORCHRUN, *ranks], timeout, all_variables)
    else:
        script = tmp_path / "rank.py"
        script.write_text(code)
        done = subprocess.run(
            [*LAUNCHERS[launcher], *options, str(script)], env=all_variables,
            cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    output = done.stdout + done.stderr
    joined = re.findall(r"JOINED rank=(\d+) size=(\d+) sum=(\d+)", output)
    return done.returncode, output, sorted(tuple(map(int, found)) for found in joined)


@pytest.mark.parametrize(
    "left",
    [
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "4", "PMI_RANK": "3"},
        {"PMI_SIZE": "1"},
    ],
    ids=["srun", "mpirun", "srun of four", "a launcher's pod"],
)
def test_torchruns_variables_win(tmp_path: Path, left: dict[str, str]) -> None:
    """In a shell or pod that another launcher started, each rank would otherwise be a world of its own."""
    status, output, joined = launch(tmp_path, **left)
    assert (status, joined) == (0, [(0, 2, 2), (1, 2, 2)]), output


@pytest.mark.parametrize("left", [{}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "pod-0", "MASTER_PORT": "1"}])
def test_mpirun_joins_whatever_a_pods_operator_has_set(tmp_path: Path, left: dict[str, str]) -> None:
    status, output, joined = launch(tmp_path, launcher="mpirun", **left)
    assert (status, joined) == (0, [(0, 2, 2), (1, 2, 2)]), output


@pytest.mark.parametrize("left", [{}, {"PMI_SIZE": "1", "PMI_RANK": "0"}, {"RANK": "0"}])
def test_a_rank_that_nobody_launched_is_alone(tmp_path: Path, left: dict[str, str]) -> None:
    """Also in an srun shell: MPI is not asked."""
    code = (
        "import sys; from apollo_tp.launch.distributed import join; w = join(5.0); print(w.rank, w.size, "
        "'mpi4py.MPI' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | left, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["0", "1", "False"]


def test_one_host_needs_no_name(tmp_path: Path) -> None:
    """torchrun hands on the host's own name, which may not resolve."""
    before = "os.environ['MASTER_ADDR'] = 'no-such-host.invalid'"
    status, output, joined = launch(tmp_path, before=before, timeout=60)
    assert (status, joined) == (0, [(0, 2, 2), (1, 2, 2)]), output


def test_a_host_that_does_not_resolve_is_named_within_the_deadline(tmp_path: Path) -> None:
    """Where there are several hosts, so that a name is needed."""
    before = "os.environ |= {'MASTER_ADDR': 'no-such-host.invalid', 'LOCAL_WORLD_SIZE': '1'}"
    status, output, joined = launch(tmp_path, before=before, seconds=3.0, timeout=60)
    assert (status != 0, joined) == (True, [])
    assert re.search(r"DeadlineError: rank \d: got no store at no-such-host\.invalid:\d+ within 3 s", output), output


def test_a_rank_that_is_missing_is_named(tmp_path: Path) -> None:
    """After the deadline of the join, not after that of a collective."""
    before = "int(os.environ['RANK']) == 1 and __import__('time').sleep(20)"
    _, output, joined = launch(tmp_path, before=before, seconds=2.0, timeout=60)
    assert joined == []
    assert "DeadlineError: rank 0: got no sign of ranks [1] of 2 for 2 s" in output


def test_ranks_join_again_after_each_restart(tmp_path: Path) -> None:
    """torchrun keeps its store over restarts, with the keys of ranks that have ended."""
    after = "int(os.environ['TORCHELASTIC_RESTART_COUNT']) < 3 and world.rank == 1 and os._exit(3)"
    status, output, joined = launch(tmp_path, "--max-restarts", "4", after=after)
    assert (status, joined) == (0, [(0, 2, 2)] * 4 + [(1, 2, 2)] * 4), output
    for attempt in range(4):
        assert (
            len(re.findall(rf"joining 2 ranks through 127\.0\.0\.1:\d+, attempt {attempt}, for up to 60 s", output))
            == 2
        )


AGENT = """#!/bin/sh
case $1 in {hosts} *) exit 1;; esac
shift
exec nsenter --target $pid --net --mount --uts --ipc --pid sh -c "$*"
"""
"""In place of ssh, for the hosts that are played."""


@pytest.mark.skipif(bool(played_hosts.missing()), reason=f"hosts cannot be played: {played_hosts.missing()}")
def test_mpirun_joins_hosts_whose_names_do_not_resolve(tmp_path: Path) -> None:
    """By a host file, from a host that is none of them. MPI finds the ranks; they meet under the address of rank 0."""
    hosts = played_hosts.play_two(tmp_path)
    agent = Path(tempfile.mkdtemp(dir="/var/tmp")) / "agent"  # every host looks for it
    try:
        agent.write_text(AGENT.format(hosts=" ".join(f"{host.name}) pid={host.pid};;" for host in hosts)))
        agent.chmod(0o700)
        (tmp_path / "hosts").write_text("".join(f"{host.name} slots=1\n" for host in hosts))
        (tmp_path / "rank.py").write_text(RANK.format(before="", after="print(os.uname().nodename)", seconds=20))
        address, cable = hosts[0].address, played_hosts.CABLE
        command = [
            *hosts[0].enter()[:4], MPIRUN, "--allow-run-as-root", "--hostfile", str(tmp_path / "hosts"), "-n", "2",
            "--prtemca", "plm_ssh_agent", str(agent), "--mca", "btl_tcp_if_include", cable, "-x", f"MASTER_ADDR={address}",
            "-x", f"GLOO_SOCKET_IFNAME={cable}", "-x", f"PYTHONPATH={played_hosts.ROOT}", "-x", "OMP_NUM_THREADS=1",
            sys.executable, str(played_hosts.SHARED / "rank.py"),
        ]  # fmt: skip
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=90, check=False
        )
        joined = sorted(re.findall(r"JOINED rank=(\d+) size=(\d+) sum=(\d+)", done.stdout))
        assert (done.returncode, joined) == (0, [("0", "2", "2"), ("1", "2", "2")]), done.stdout
        assert set(re.findall(r"^([ij])$", done.stdout, re.MULTILINE)) == {"i", "j"}
    finally:
        shutil.rmtree(agent.parent)
        for host in hosts:
            host.end()
