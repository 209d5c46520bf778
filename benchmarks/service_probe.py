"""What bench_service measures with: keep-alive clients over bare sockets, stalls of the coordinator, growth exponents."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time

PROBE_SECONDS = 0.002


class Connection:
    """A keep-alive client over a bare socket: an HTTP library would measure itself on a machine of two cores."""

    @classmethod
    async def open(cls, url: str) -> Connection:
        connection = cls()
        connection.host, port = url.removeprefix("http://").split(":")
        connection.reader, connection.writer = await asyncio.open_connection(connection.host, int(port))
        return connection

    async def get(self, path: str) -> float:
        """Seconds that a GET took."""
        start = time.perf_counter()
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\n\r\n".encode())
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await self.reader.readexactly(length)
        return time.perf_counter() - start

    def close(self) -> None:
        self.writer.close()


class Measured:
    """Within the context: the time of each /train/status, asked one after the other, and of /health beside it, whose longest
    is the longest stall of the event loop."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.status: list[float] = []
        self.health: list[float] = []

    async def __aenter__(self) -> Measured:
        self._tasks = [
            asyncio.create_task(self._probe(path, times))
            for path, times in (("/train/status", self.status), ("/health", self.health))
        ]
        await asyncio.sleep(0.2)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def _probe(self, path: str, times: list[float]) -> None:
        connection = await Connection.open(self._url)
        with contextlib.closing(connection):
            while True:
                times.append(await connection.get(path))
                await asyncio.sleep(PROBE_SECONDS)

    def cells(self) -> str:
        """p50 and p99 of the status and the longest stall, in ms."""
        times = sorted(self.status)
        p50, p99 = (1000 * times[min(int(len(times) * share), len(times) - 1)] for share in (0.5, 0.99))
        return f"{p50:.1f} | {p99:.1f} | {1000 * max(self.health):.1f}"


CELLS = "status p50 ms | p99 ms | longest stall ms"


def show(title: str, columns: str) -> None:
    count = columns.count("|") + 1
    print(f"\n{title}\n\n| {columns} |\n|{'---|' * count}", flush=True)


def exponent(sizes: list[int], seconds: list[float]) -> str:
    """The slope of log(seconds) over log(size), by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(max(value, 1e-6)) for value in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return f"{slope:.2f}"
