"""Command lines that start two ranks."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "mpirun"
LAUNCHERS = {
    "torchrun": (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    "mpirun": (MPIRUN, "-n", "2", "--oversubscribe", "--allow-run-as-root", sys.executable),
}
