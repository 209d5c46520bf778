"""python graders: a client's code in a process of its own that has no network, no files and no other process to see.

``isolated.py`` is what runs there; it gives everything up before it looks at the code. Where the kernel does not let it, the
code is not run.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
import weakref
from pathlib import Path
from typing import Any

import msgspec

from apollo_tp.coordinator.graders.templates import GraderError
from apollo_tp.errors import DECODE_ERRORS

ISOLATED = Path(__file__).with_name("isolated.py")
MAX_PROCESSES = 2
MAX_ANSWER_BYTES = 64 * 1024
SERVER_ERROR, RUNTIME_ERROR = "python_grader_server_error", "python_grader_runtime_error"
_gates: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()
"""One for each event loop, of which a coordinator has one."""


class _Answer(msgspec.Struct):
    reward: float | None = None
    error: str = ""
    not_isolated: str = ""


async def run_python(source: str, values: dict[str, Any], seconds: float, memory_bytes: int) -> float:
    """What ``grade(sample, item)`` returns. Raises GraderError: for the code's own errors, if it takes longer than
    ``seconds`` or more than ``memory_bytes``, and if it cannot be isolated."""
    request = {
        "source": source, "sample": values["sample"], "item": values["item"], "seconds": math.ceil(seconds),
        "memory_bytes": memory_bytes,
    }  # fmt: skip
    async with _gates.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(MAX_PROCESSES)):
        content = await _run(msgspec.json.encode(request), seconds)
    try:
        answer = msgspec.json.decode(content, type=_Answer)
    except DECODE_ERRORS:
        raise GraderError("the process ended without a reward: out of memory or time", RUNTIME_ERROR) from None
    if answer.not_isolated:
        raise GraderError(f"the code was not run: {answer.not_isolated}", SERVER_ERROR)
    if answer.reward is None:
        raise GraderError(answer.error or "no reward", RUNTIME_ERROR)
    return answer.reward


async def _run(request: bytes, seconds: float) -> bytes:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", str(ISOLATED), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL, env={}, cwd="/", start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    answer = b""
    try:
        async with asyncio.timeout(seconds):
            with contextlib.suppress(ConnectionError):
                process.stdin.write(request)
                await process.stdin.drain()
                process.stdin.close()
            while len(answer) <= MAX_ANSWER_BYTES and (block := await process.stdout.read(MAX_ANSWER_BYTES)):
                answer += block
    except TimeoutError:
        raise GraderError(f"got no reward for {seconds:g} s, expected one within that time", RUNTIME_ERROR) from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the first process of its namespace: all others end with it
        await process.wait()
    return answer
