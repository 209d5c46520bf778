"""Runs a client's grader, in a process that ``sandbox`` starts with ``python -I -S``: it imports nothing of this package.

Before it runs the code it enters namespaces of its own (user, network, mounts, processes, IPC), takes an empty folder for
its root, gives up all capabilities, limits its memory, CPU time, files and processes, and denies itself system calls
that it has no use for.
"""

import collections
import ctypes
import datetime
import decimal
import difflib
import fractions
import functools
import itertools
import json
import math
import os
import random
import re
import resource
import signal
import statistics
import string
import struct
import sys
import unicodedata

USABLE = (
    collections, datetime, decimal, difflib, fractions, functools, itertools, json, math, random, re, statistics, string,
    unicodedata,
)  # fmt: skip
"""Imported here, since there are no files later: what a grader may import."""
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CAPABILITY_VERSION_3, SYS_CAPSET = 0x20080522, {"x86_64": 126, "aarch64": 91}
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
DENIED = {
    # clone, fork, vfork, execve, execveat, clone3, ptrace, socket, socketpair, unshare, setns, mount, bpf, userfaultfd,
    # perf_event_open, io_uring_setup, add_key, request_key, keyctl
    "x86_64": (56, 57, 58, 59, 322, 435, 101, 41, 53, 272, 308, 165, 321, 323, 298, 425, 248, 249, 250),
    "aarch64": (220, 221, 281, 435, 117, 198, 199, 97, 268, 40, 280, 282, 241, 425, 217, 218, 219),
}
"""System calls that a grader has no use for. New processes are among them, since RLIMIT_NPROC does not hold for root."""


def called(result: int, what: str) -> None:
    """Raise OSError if a call of C failed."""
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


class Filter(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def deny_calls(libc: ctypes.CDLL) -> None:
    """From now on, denied system calls fail with EPERM, and so do those of another architecture."""
    machine = os.uname().machine
    load, equal, at_least, leave = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
    deny, allow = (leave, 0, 0, 0x00050001), (leave, 0, 0, 0x7FFF0000)  # SECCOMP_RET_ERRNO | EPERM, SECCOMP_RET_ALLOW
    code = [
        (load, 0, 0, 4),
        (equal, 1, 0, ARCHITECTURES[machine]),
        deny,
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),
        deny,
    ]
    for number in DENIED[machine]:
        code += [(equal, 0, 1, number), deny]
    code.append(allow)
    packed = b"".join(struct.pack("=HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    program = Filter(len(code), ctypes.addressof(buffer))
    called(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0), "seccomp")


def isolate(memory_bytes: int, seconds: int) -> None:
    """Raises OSError if anything cannot be given up. Returns in a further process, the first of its namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    spaces = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC
    called(libc.unshare(spaces), "unshare")
    called(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "mount of / as private")
    called(
        libc.mount(b"none", b"/proc", b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, b"size=4k,mode=0500"),
        "mount of tmpfs",
    )
    if child := os.fork():
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) and 1)
    called(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    os.chroot("/proc")
    os.chdir("/")
    called(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    header, nothing = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    called(libc.syscall(SYS_CAPSET[os.uname().machine], header, nothing), "capset")
    limits = {
        resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_CPU: seconds, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0, resource.RLIMIT_NOFILE: 8,
    }  # fmt: skip
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    deny_calls(libc)


def reward(source: str, sample: dict[str, object], item: dict[str, object]) -> dict[str, object]:
    """What the client's ``grade`` returns, as a number."""
    names: dict[str, object] = {"__name__": "grader"}
    exec(compile(source, "grader.py", "exec"), names)  # what it is all for
    grade = names.get("grade")
    if not callable(grade):
        return {"error": "got no function grade(sample, item), expected one"}
    value = float(grade(sample, item))
    return {"reward": value} if math.isfinite(value) else {"error": f"got {value}, expected a finite number"}


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the code prints goes nowhere
    try:
        isolate(request["memory_bytes"], request["seconds"])
    except (OSError, KeyError) as error:
        answer: dict[str, object] = {"not_isolated": f"{error}; expected user namespaces that any user may make"}
    else:
        try:
            answer = reward(request["source"], request["sample"], request["item"])
        except BaseException as error:  # noqa: BLE001 - the client's code may raise anything
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    answers.write(json.dumps(answer).encode(errors="replace"))
    answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
