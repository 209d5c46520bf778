"""Quality of service: presets, the share of SMs, and launch/mps.sh with a control daemon that is a shell script."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from apollo_tp.config import QosConfig
from apollo_tp.errors import ConfigError
from apollo_tp.gpu_sharing import mps as qos
from apollo_tp.gpu_sharing.sm_limit import num_sms
from apollo_tp.launch.compose import groups, read_config

SCRIPT = Path(__file__).parents[3] / "launch" / "mps.sh"
PERCENTAGE, PRIORITY = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_MPS_CLIENT_PRIORITY"
FAKE_DAEMON = """#!/usr/bin/env bash
# As the real one behaves: a process id in the pipe directory while it runs, and commands on standard input.
pid="$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid"
if [ "${1:-}" = -d ]; then
  echo start >>"$JOURNAL"
  sleep 300 &
  echo $! >"$pid"
  exit
fi
read -r command
[ -e "$pid" ] || { echo "Cannot find MPS control daemon process" >&2; exit 1; }
case "$command" in
  get_server_list) ;;
  quit*) kill "$(cat "$pid")"; rm "$pid"; echo "$command" >>"$JOURNAL" ;;
  *) exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("name", "sm_percent", "low_priority", "pace"),
    [("off", None, False, 1.0), ("shared", 75, True, 1.0), ("gentle", 25, True, 1.0), ("paced", None, False, 0.5)],
)
def test_presets(name: str, sm_percent: int | None, low_priority: bool, pace: float) -> None:
    """Each by its name, and one of its options changed on top."""
    config = read_config([f"qos={name}"]).qos
    assert (config.sm_percent, config.low_priority, config.pace) == (sm_percent, low_priority, pace)
    changed = QosConfig(sm_percent=sm_percent, low_priority=low_priority, pace=0.3)
    assert read_config([f"qos={name}", "qos.pace=0.3"]).qos == changed


@pytest.mark.parametrize(
    ("percent", "total", "expected"),
    [(None, 132, 132), (100, 132, 132), (50, 132, 64), (60, 132, 80), (25, 132, 32), (1, 132, 8), (99, 132, 128),
     (50, 108, 56), (75, 10, 8), (50, 8, 8), (100, 6, 6)],
)  # fmt: skip
def test_a_share_is_a_number_of_multiprocessors_that_a_gpu_can_set_apart(
    percent: int | None, total: int, expected: int
) -> None:
    """Multiples of eight, as near as can be, never none; all of them only where that is asked for or there are few."""
    assert num_sms(percent, total) == expected


def test_every_preset_is_tested_and_off_is_the_default() -> None:
    """A new file in conf/qos needs a row above."""
    assert groups()["qos"] == ["gentle", "off", "paced", "shared"]
    assert read_config([]).qos == QosConfig(sm_percent=None, low_priority=False, pace=1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("qos.sm_percent=0", r"qos\.sm_percent: got 0, expected an integer from 1 to 100, or null"),
        ("qos.sm_percent=101", r"qos\.sm_percent: got 101"),
        ("qos.pace=0", r"qos\.pace: got 0\.0, expected a number > 0 and <= 1"),
        ("qos.pace=1.5", r"qos\.pace: got 1\.5"),
        ("qos=polite", r"qos: got 'polite', expected one of \['gentle', 'off', 'paced', 'shared'\]"),
    ],
)
def test_what_is_out_of_range_is_refused(override: str, message: str) -> None:
    """With the range."""
    with pytest.raises(ConfigError, match=message):
        read_config([override])


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Of mps.sh with the fake daemon on PATH; whatever daemon a test leaves is stopped."""
    program = tmp_path / "bin" / "nvidia-cuda-mps-control"
    program.parent.mkdir()
    program.write_text(FAKE_DAEMON)
    program.chmod(0o755)
    variables = {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "XDG_RUNTIME_DIR": str(tmp_path),
        "JOURNAL": str(tmp_path / "journal"),
    }
    monkeypatch.setenv(PERCENTAGE, "100")  # put back afterwards
    monkeypatch.setenv(PRIORITY, "0")
    for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(qos, "DRIVER", tmp_path)  # a machine with a GPU
    yield variables
    mps("stop", variables)


def mps(verb: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), verb], env=environment, capture_output=True, text=True, timeout=60)


def exported(output: str) -> dict[str, str]:
    """What ``eval`` would set."""
    return dict(word.split("=", 1) for word in shlex.split(output) if "=" in word)


def test_the_daemon_starts_once_in_private_folders_and_stops(environment: dict[str, str]) -> None:
    """Start twice, status, stop twice; the cards are not touched, since the daemon is all that is called."""
    assert mps("status", environment).returncode == 3
    first, second = mps("start", environment), mps("start", environment)
    assert (first.returncode, second.returncode, first.stdout) == (0, 0, second.stdout)
    folders = exported(first.stdout)
    assert folders.keys() == {"CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"}
    assert [os.stat(folder).st_mode & 0o777 for folder in folders.values()] == [0o700, 0o700]
    assert mps("status", environment).returncode == 0
    assert (mps("stop", environment).returncode, mps("stop", environment).returncode) == (0, 0)
    assert mps("status", environment).returncode == 3
    assert Path(environment["JOURNAL"]).read_text().splitlines() == ["start", "quit -t 10"]


def test_somebody_elses_folder_is_refused(environment: dict[str, str], tmp_path: Path) -> None:
    """A link where the private folder should be: nothing is started behind it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"apollo_tp-mps-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    refused = mps("start", environment)
    assert refused.returncode == 1
    assert "got a link or another user's folder" in refused.stderr
    assert not Path(environment["JOURNAL"]).exists()


def test_without_the_drivers_tools_it_says_so(environment: dict[str, str]) -> None:
    """Not a word about a command that was not found in line so and so."""
    refused = mps("start", environment | {"PATH": os.environ["PATH"]})
    assert refused.returncode == 1
    assert "got no nvidia-cuda-mps-control on PATH" in refused.stderr


def test_a_share_of_the_sms_needs_a_daemon_that_lives(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set for CUDA while it runs; refused before, and after, when only its folder is left."""
    config = QosConfig(sm_percent=50)
    with pytest.raises(ConfigError, match=r"got qos\.sm_percent=50, .*/tmp/nvidia-mps .*launch/mps\.sh start"):
        qos.share_gpu(config)
    folders = exported(mps("start", environment).stdout)
    for name, folder in folders.items():
        monkeypatch.setenv(name, folder)
    qos.share_gpu(config)
    assert (os.environ[PERCENTAGE], os.environ[PRIORITY]) == ("100", "0")
    qos.share_gpu(QosConfig(low_priority=True))
    assert os.environ[PRIORITY] == "1"
    qos.share_gpu(QosConfig())
    assert mps("stop", environment).returncode == 0
    with pytest.raises(ConfigError, match=folders["CUDA_MPS_PIPE_DIRECTORY"]):
        qos.share_gpu(config)
    pid = Path(folders["CUDA_MPS_PIPE_DIRECTORY"], "nvidia-cuda-mps-control.pid")
    gone = subprocess.Popen(["true"])
    gone.wait()
    pid.write_text(f"{gone.pid}\n")  # of a daemon that was killed
    assert not qos.daemon_runs(pid.parent)


def test_a_machine_without_a_gpu_is_told_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MPS is not what is missing there."""
    monkeypatch.setattr(qos, "DRIVER", tmp_path / "nvidiactl")
    with pytest.raises(ConfigError, match=r"without an NVIDIA GPU .* CPU ranks have no SMs; use qos\.pace"):
        qos.share_gpu(QosConfig(sm_percent=25))
    with pytest.raises(ConfigError, match=r"got qos\.low_priority=true on a machine without"):
        qos.share_gpu(QosConfig(low_priority=True))


def test_the_launcher_refuses_before_anything_starts(tmp_path: Path) -> None:
    """Exit status 2 as for every wrong option, with or without a GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "apollo_tp.launch", "qos=shared"],
        env=os.environ | {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "got qos.sm_percent=75 qos.low_priority=true" in done.stderr
