"""Hosts that this machine plays: each has network, mount, PID, IPC and UTS namespaces of its own.

Two hosts share a network cable and a folder (``SHARED``), as a network file system would be. They do not share /tmp, shared
memory, names of processes, or 127.0.0.1.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tests.support.forks import ENTER_VARIABLE
from tests.support.processes import ORIGINS, ManagedProcess

SHARED = Path("/mnt")
"""Where a host sees the folder that all share."""
ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "cable0"
CLONE_NEWNET = 0x4000_0000
ROOT = Path(__file__).parents[2]
BOOT = f"""
mount --bind "$1" {SHARED} && mount --rbind /tmp /srv && mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm &&
hostname "$2" && ip link set lo up && shift 2 || exit 1
for folder; do mkdir -p "$folder" && mount --bind "/srv${{folder#/tmp}}" "$folder" || exit 1; done
umount -l /srv && echo booted && exec cat >/dev/null
"""
"""It runs until its standard input ends. The folders named last are those below /tmp that a host has all the same."""
Answer = TypeVar("Answer")


def missing() -> str:
    """Why hosts cannot be played here; empty if they can."""
    if os.geteuid() != 0:
        return "namespaces and virtual network interfaces need root"
    if tools := [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]:
        return f"{', '.join(tools)} is not installed"
    done = subprocess.run(["unshare", "--net", "ip", "link", "add", "near0", "type", "veth", "peer", "name", "far0"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    return f"no virtual network interfaces: {done.stderr.strip()}" if done.returncode else ""


def _code_below_tmp() -> list[str]:
    """The checkout and the environment, as far as they lie there."""
    folders = [ROOT, *([] if Path(sys.prefix).is_relative_to(ROOT) else [Path(sys.prefix)])]
    return [str(folder) for folder in folders if folder.is_relative_to("/tmp")]


class PlayedHost:
    """One host. ``address`` is reachable from the other one, once they are connected."""

    def __init__(self, name: str, address: str, shared: Path) -> None:
        self.name, self.address, self._shared = name, address, shared
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc",
             "--propagation", "private", "sh", "-c", BOOT, "sh", str(shared), name, *_code_below_tmp()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"booted\n"
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        self.pid = int(children[0])
        self._thread = ThreadPoolExecutor(1, initializer=self._enter_network)

    def enter(self) -> list[str]:
        """A command line that runs what follows it on this host."""
        return ["nsenter", "--target", str(self.pid), "--net", "--mount", "--uts", "--ipc", "--pid"]

    def start(self, module: str, arguments: Sequence[str], environment: dict[str, str], log: str) -> ManagedProcess:
        """``python -m MODULE ARGUMENTS`` on this host; its log is in the shared folder."""
        settings = {
            "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1",
            "GLOO_SOCKET_IFNAME": CABLE, "VLLM_HOST_IP": self.address,
        }  # fmt: skip
        command = [sys.executable, "-m", module, *arguments]
        if module in ORIGINS:
            settings[ENTER_VARIABLE] = str(self.pid)
        else:
            command = [*self.enter(), *command]
        return ManagedProcess(command, settings | environment, self._shared / log)

    def output(self, module: str, *arguments: str, **variables: str) -> str:
        """What ``python -m MODULE ARGUMENTS`` prints on this host."""
        command = [*self.enter(), sys.executable, "-m", module, *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout

    def call(self, function: Callable[[], Answer]) -> Answer:
        """The result of ``function``, whose connections begin on this host."""
        return self._thread.submit(function).result(300)

    def _enter_network(self) -> None:
        descriptor = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, CLONE_NEWNET):  # of this thread alone
            raise OSError(ctypes.get_errno(), "setns")
        os.close(descriptor)

    def end(self) -> None:
        """With all processes on it."""
        self._thread.shutdown()
        self._holder.kill()
        self._holder.wait(10)


def connect(host: PlayedHost, *, up: bool) -> None:
    """Plug the cable into this host, or pull it out: nothing that is sent then arrives, and no connection is closed."""
    words = ["ip", "link", "set", CABLE, "up" if up else "down"]
    subprocess.run([*host.enter()[:3], "--net", *words], check=True)


def play_two(shared: Path) -> list[PlayedHost]:
    """Two hosts, i and j, with a cable between them."""
    hosts = [PlayedHost(name, address, shared) for name, address in zip("ij", ADDRESSES, strict=True)]
    near, far = hosts
    cable = ["type", "veth", "peer", "name", CABLE, "netns", str(far.pid)]
    subprocess.run([*near.enter()[:3], "--net", "ip", "link", "add", CABLE, *cable], check=True)
    for host in hosts:
        address = ["ip", "address", "add", f"{host.address}/24", "dev", CABLE]
        subprocess.run([*host.enter()[:3], "--net", *address], check=True)
        connect(host, up=True)
    return hosts
