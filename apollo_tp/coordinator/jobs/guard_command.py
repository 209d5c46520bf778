"""The operator's command that judges the served weights (``service.guard_command``): its exit status, and a number."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
from collections.abc import Callable, Sequence

from apollo_tp.coordinator.jobs.job import Job
from apollo_tp.errors import ApolloTpError

log = logging.getLogger(__name__)

KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH", "HF_HOME", "HF_HUB_OFFLINE")
"""The variables of this process that the command gets. Tokens are not among them."""
MAX_OUTPUT_BYTES = 2**20
STOP_SECONDS = 5.0


class GuardCommandError(ApolloTpError):
    """The command could not be started, did not end in time, or printed no number."""


class GuardCommand:
    """Runs ``command`` in a session of its own, which ends with it."""

    def __init__(self, command: Sequence[str], seconds: float) -> None:
        self._command, self._seconds = list(command), seconds
        self.runs = False
        self.on_start: Callable[[], None] = lambda: None

    async def run(self, job: Job) -> float | None:
        """The number on the last line that it prints; None if it is not finite, or if the exit status is not 0: all is bad.
        The server serves the weights that are to be judged meanwhile. Raises GuardCommandError."""
        self.runs = True
        try:
            self.on_start()
            return await self._run(job)
        finally:
            self.runs = False

    async def _run(self, job: Job) -> float | None:
        what = f"service.guard_command {self._command[0]!r}"
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment |= {"APOLLO_TP_JOB": job.id, "APOLLO_TP_STEP": str(job.step)}
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, env=environment,
                start_new_session=True, limit=MAX_OUTPUT_BYTES,
            )  # fmt: skip
        except OSError as error:
            raise GuardCommandError(f"{what}: got {error}, expected a program that can be run") from error
        try:
            async with asyncio.timeout(self._seconds):
                assert process.stdout is not None
                output = await process.stdout.read(MAX_OUTPUT_BYTES)
                status = await process.wait()
        except TimeoutError:
            raise GuardCommandError(
                f"{what}: got no end within {self._seconds:g} s, expected one; raise service.guard_seconds"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever it left running
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await process.wait()
        lines = output.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if status:
            log.warning("%s: exit status %d, last line %r", what, status, last[:200])
            return None
        try:
            value = float(last)
        except ValueError:
            raise GuardCommandError(f"{what}: got {last[:80]!r} as its last line, expected a number") from None
        return value if math.isfinite(value) else None
