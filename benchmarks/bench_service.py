"""How fast does the coordinator answer while training runs and 50 clients poll?

Question: p50 and p99 of GET /train/status with 50 keep-alive clients, each asking about five times a second, while a
job of short steps runs (a fake rank 0: more events per second than a real model gives) and, in a second round, while a
client also posts requests whose text has to be tokenised. Target: p99 < 20 ms.

    python -m benchmarks.bench_service [--clients 50] [--seconds 20]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from tests.support.chat_model import write_model
from tests.support.fakes import CoordinatorProcess, wait_for

POLLS_PER_SECOND = 5.0
ONE = {"context_ids": [1, 2], "continuation_ids": [3, 4]}


async def poll(url: str, until: float, times: list[float]) -> None:
    """One keep-alive client over a bare socket: an HTTP library would measure itself on a machine of two cores."""
    host, port = url.removeprefix("http://").split(":")
    await asyncio.sleep(random.random() / POLLS_PER_SECOND)
    reader, writer = await asyncio.open_connection(host, int(port))
    while time.monotonic() < until:
        start = time.perf_counter()
        writer.write(f"GET /train/status HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        times.append(time.perf_counter() - start)
        await asyncio.sleep(random.uniform(0.5, 1.5) / POLLS_PER_SECOND)
    writer.close()


async def post_text(url: str, until: float, posted: list[int]) -> None:
    samples = [{"text": "Hello there, how are you? " * 8} for _ in range(500)]
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while time.monotonic() < until:
            answer = await client.post("/train?dry_run=true", json={"samples": samples})
            posted.append(answer.raise_for_status().json()["num_tokens"])


async def round_of(url: str, clients: int, seconds: float, *, text: bool) -> str:
    until, times, posted = time.monotonic() + seconds, [], []
    tasks = [poll(url, until, times) for _ in range(clients)]
    if text:
        tasks.append(post_text(url, until, posted))
    await asyncio.gather(*tasks)
    times.sort()
    p50, p99, most = (1000 * times[min(int(len(times) * share), len(times) - 1)] for share in (0.5, 0.99, 1.0))
    what = f"training and {sum(posted) / seconds:,.0f} tokens/s of posted text" if text else "training"
    return f"| {what} | {len(times):,} | {p50:.1f} | {p99:.1f} | {most:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20)
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        coordinator = stack.enter_context(CoordinatorProcess(folder, model_path=write_model(Path(folder) / "m")))
        client = stack.enter_context(coordinator.client())
        fake = [sys.executable, "-m", "tests.support.fakes", coordinator.ranks_socket, f"{folder}/journal", "0.05"]
        ranks = subprocess.Popen([str(part) for part in fake])
        stack.callback(ranks.wait, 10)
        stack.callback(ranks.kill)
        wait_for(lambda: client.get("/health").json()["trainer"])
        client.post("/train", json=ONE | {"epochs": 10_000})
        print(
            f"{datetime.date.today()}, {os.cpu_count()} x {platform.machine()}, load {os.getloadavg()[0]:.1f}, "
            f"{args.clients} clients, {args.seconds:.0f} s per row\n"
        )
        print("| while | requests | p50 ms | p99 ms | max ms |\n|---|---|---|---|---|")
        for text in (False, True):
            print(asyncio.run(round_of(coordinator.url, args.clients, args.seconds, text=text)), flush=True)


if __name__ == "__main__":
    main()
