"""CUDA MPS: the environment variables of a trainer that shares its GPUs with a server, set before CUDA initialises.

Nothing here imports torch at module level: the launcher calls ``share_gpu`` before that import.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from apollo_tp.config import QosConfig
from apollo_tp.errors import ConfigError

if TYPE_CHECKING:
    import torch

MPS_SHARE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
"""The percentage of each GPU's SMs that MPS lets this process use."""
DRIVER = Path("/dev/nvidiactl")
DEFAULT_PIPE_DIR = "/tmp/nvidia-mps"
"""Where CUDA looks for the control daemon unless CUDA_MPS_PIPE_DIRECTORY says otherwise."""
BELOW_NORMAL = "1"
"""The lower of MPS's two client priorities; the server has the other."""


def share_gpu(config: QosConfig) -> None:
    """Set MPS's variables for this process. Call it before CUDA initialises.

    With ``config.low_priority``, an SM starts the server's work before this process's. With ``config.sm_percent``, MPS
    leaves all SMs to this process, since ``sm_limit`` chooses among them. Raises ConfigError where server and trainer would
    not run concurrently: without an NVIDIA GPU, or without the MPS control daemon.
    """
    variables, options = {}, []
    if config.sm_percent is not None:
        variables[MPS_SHARE] = "100"  # a green context cannot divide what MPS has cut
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
    """Whether the MPS control daemon of this pipe directory runs, by its process id: its socket file outlives it."""
    path = pipe_dir / "nvidia-cuda-mps-control.pid"
    pid = path.read_text().strip() if path.is_file() else ""
    return pid.isdecimal() and Path("/proc", pid).is_dir()


def describe(qos: QosConfig, device: torch.device) -> str:
    """The options in one line, as the status shows them; on a GPU with the number of SMs that this rank uses."""
    percent = "null" if qos.sm_percent is None else qos.sm_percent
    text = f"sm_percent={percent} low_priority={str(qos.low_priority).lower()} pace={qos.pace:g}"
    if device.type != "cuda":
        return text
    import torch

    from apollo_tp.gpu_sharing.sm_limit import num_sms

    total = torch.cuda.get_device_properties(device).multi_processor_count
    return f"{text} ({num_sms(qos.sm_percent, total)} of {total} SMs)"
