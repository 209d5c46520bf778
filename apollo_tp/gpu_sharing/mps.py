"""What CUDA must know before it starts of a trainer that shares its GPUs with a server under CUDA MPS. No torch before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from apollo_tp.config import QosConfig
from apollo_tp.errors import ConfigError

if TYPE_CHECKING:
    import torch

DRIVER = Path("/dev/nvidiactl")
DEFAULT_PIPE_DIR = "/tmp/nvidia-mps"
"""Where CUDA looks for the control daemon unless CUDA_MPS_PIPE_DIRECTORY says otherwise."""
BELOW_NORMAL = "1"
"""The lower of MPS's two client priorities; the server has the other."""


def share_gpu(config: QosConfig) -> None:
    """With ``config.low_priority``, have this process's CUDA contexts start their work on an SM after that of the server;
    with ``config.sm_percent``, leave all SMs to what will choose among them (``sm_limit``). Call it before CUDA initialises.

    Raises ConfigError where the processes would not run side by side: no NVIDIA GPU, or no MPS control daemon.
    """
    variables, options = {}, []
    if config.sm_percent is not None:
        variables["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = "100"  # a green context cannot divide what MPS has cut
        options.append(f"qos.sm_percent={config.sm_percent}")
    if config.low_priority:
        variables["CUDA_MPS_CLIENT_PRIORITY"] = BELOW_NORMAL
        options.append("qos.low_priority=true")
    if not options:
        return
    got = f"got {' '.join(options)}"
    if not DRIVER.exists():
        raise ConfigError(
            f"{got} on a machine without an NVIDIA GPU ({DRIVER}), expected neither set: CPU ranks have no SMs; use qos.pace"
        )
    pipe_dir = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or DEFAULT_PIPE_DIR)
    if not daemon_runs(pipe_dir):
        raise ConfigError(
            f"{got}, expected a running MPS control daemon in {pipe_dir} (CUDA_MPS_PIPE_DIRECTORY); run "
            "`launch/mps.sh start` and export what it prints before you start the server and the trainer, or use qos.pace"
        )
    os.environ.update(variables)


def daemon_runs(pipe_dir: Path) -> bool:
    """Whether the MPS control daemon of this pipe directory lives. Its socket outlives it, hence the process id."""
    path = pipe_dir / "nvidia-cuda-mps-control.pid"
    pid = path.read_text().strip() if path.is_file() else ""
    return pid.isdecimal() and Path("/proc", pid).is_dir()


def describe(qos: QosConfig, device: torch.device) -> str:
    """As status shows it; on a GPU with the number of SMs that this rank uses."""
    percent = "null" if qos.sm_percent is None else qos.sm_percent
    text = f"sm_percent={percent} low_priority={str(qos.low_priority).lower()} pace={qos.pace:g}"
    if device.type != "cuda":
        return text
    import torch

    from apollo_tp.gpu_sharing.sm_limit import num_sms

    total = torch.cuda.get_device_properties(device).multi_processor_count
    return f"{text} ({num_sms(qos.sm_percent, total)} of {total} SMs)"
