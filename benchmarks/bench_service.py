"""How fast does the coordinator answer, and how does that grow with what it has to keep?

Question: what GET /train/status takes, and for how long nobody is answered, as one thing grows: jobs in each state, waiting
jobs that are worked off, checkpoints, events, followers of a job, uploads, idle connections, and clients that poll while
requests are tokenised. Rank 0 is a fake. Targets: p99 of the status < 5 ms at 50,000 jobs in any state (< 20 ms with 50
clients), longest stall < 100 ms in every table; the exponent of a table is the slope of time over size on logarithmic axes.

    python -m benchmarks.bench_service [--table jobs waiting ...] [--full]

Each table takes less than a minute; ``--full`` goes to 50,000 jobs in all states, a million events and 1,000 followers.
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
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec

from apollo_tp.coordinator.jobs.job import Checkpoint, Job, JobSpec, State, new_job
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.coordinator.samples.sample_file import write_records
from apollo_tp.wire.commands import Sample
from benchmarks.service_probe import CELLS, Connection, Measured, exponent, show
from tests.support.chat_model import write_model
from tests.support.fakes import CoordinatorProcess, wait_for

POLLS_PER_SECOND = 5.0
ONE = {"context_ids": [1, 2], "continuation_ids": [3, 4]}


def seeded(folder: Path, count: int, state: State, *, events: int = 0, checkpoints: int = 0) -> list[Job]:
    """A state folder with so many jobs (and their samples, if they wait to be run), and events and checkpoints of the
    last."""
    with contextlib.closing(Store(folder / "state")) as store:
        jobs = [new_job("train", JobSpec(), state) for _ in range(count)]

        def write(db: object) -> None:
            for job in jobs:
                job.num_samples = job.total_steps = 1
                row = (job.id, state.value, "train", msgspec.json.encode(job))
                db.execute("INSERT INTO jobs(id, state, source, data) VALUES (?,?,?,?)", row)
            for step in range(events):
                row = (
                    jobs[-1].id,
                    1.0,
                    "info",
                    "metrics",
                    f"Step {step}",
                    msgspec.json.encode({"loss": 1.0, "step": step}),
                )
                db.execute("INSERT INTO events(job_id, time, level, type, message, data) VALUES (?,?,?,?,?,?)", row)
            for number in range(checkpoints):
                record = Checkpoint(
                    id=f"c{number}", name=f"n-{number}", state="succeeded", reason="request", created_at=1.0
                )
                row = (record.id, "", "succeeded", msgspec.json.encode(record))
                db.execute("INSERT INTO checkpoints(id, job_id, state, data) VALUES (?,?,?,?)", row)

        store._commits.submit(write, durable=False).result(600)
        if state is State.queued:
            sample = [Sample(token_ids=[1, 2, 3], weights=[0.0, 1.0, 1.0])]
            first = store.samples_dir / f"{jobs[0].id}.train"
            write_records(first, sample)
            for job in jobs[1:]:
                (store.samples_dir / f"{job.id}.train").write_bytes(first.read_bytes())
    return jobs


@contextlib.contextmanager
def served(folder: Path, *, ranks: float | None = None, **options: object) -> Iterator[CoordinatorProcess]:
    """A coordinator over ``folder``; with a fake rank 0 whose steps take ``ranks`` seconds (it keeps no journal)."""
    options = {"max_queued_jobs": 10**6} | options
    with contextlib.ExitStack() as stack:
        coordinator = CoordinatorProcess(folder, forked=False, **options)
        stack.callback(coordinator.stop)
        coordinator.start(deadline_seconds=60.0)
        if ranks is not None:
            command = [sys.executable, "-m", "tests.support.fakes", coordinator.ranks_socket, "/dev/null", ranks]
            process = subprocess.Popen([str(part) for part in command])
            stack.callback(process.wait, 10)
            stack.callback(process.kill)
            with coordinator.client() as client:
                wait_for(lambda: client.get("/health").json()["trainer"])
        yield coordinator


def model_digest_of(folder: Path) -> str:
    """The digest that the coordinator gives to jobs: those of another are not run."""
    with served(folder) as coordinator, coordinator.client() as client:
        job = client.post("/train", json=ONE).json()
        client.post(f"/train/jobs/{job['id']}/cancel")
        digest: str = job["model_digest"]
        return digest


async def quiet(url: str, seconds: float = 2.0) -> str:
    async with Measured(url) as measured:
        await asyncio.sleep(seconds)
    return measured.cells()


def jobs_table(full: bool) -> None:
    show("Jobs by state", f"state | jobs | start s | {CELLS}")
    for state in (State.succeeded, State.paused, State.queued) if not full else State:
        if state in (State.running, State.validating_files):  # a start changes these states
            continue
        for count in (500, 50_000):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                seeded(folder, count, state)
                begun = time.monotonic()
                with served(folder) as coordinator:
                    start = time.monotonic() - begun
                    cells = asyncio.run(quiet(coordinator.url))
                print(f"| {state.value} | {count:,} | {start:.1f} | {cells} |", flush=True)


def waiting_table(full: bool) -> None:
    show("Waiting jobs that are worked off, one step each", f"jobs | seconds | jobs/s | {CELLS}")
    sizes, seconds = ((500, 1000, 2000, 4000, 50_000) if full else (250, 500, 1000)), []

    async def drain(url: str, count: int) -> tuple[float, str]:
        async with Measured(url) as measured, httpx.AsyncClient(base_url=url, timeout=60) as client:
            begun = time.monotonic()
            left = count
            while left:
                await asyncio.sleep(0.1)
                left = count - (await client.get("/train/status")).json()["counts"]["succeeded"]
            return time.monotonic() - begun, measured.cells()

    for count in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            digest = model_digest_of(folder)
            seeded(folder, count, State.queued)
            with contextlib.closing(Store(folder / "state")) as store:
                for job in store.jobs(State.queued):
                    job.model_digest = digest
                    store.save_job(job, type="message")
            with served(folder, ranks=0.0) as coordinator:
                taken, cells = asyncio.run(drain(coordinator.url, count))
            seconds.append(taken)
            print(f"| {count:,} | {taken:.1f} | {count / taken:.0f} | {cells} |", flush=True)
    print(f"\nexponent {exponent(list(sizes), seconds)}")


def pages_table(title: str, sizes: tuple[int, ...], path: str, seed: Callable[[Path, int], str]) -> None:
    show(title, f"number | GET {path} ms | {CELLS}")
    seconds = []

    async def ask(url: str, address: str) -> tuple[float, str]:
        async with Measured(url) as measured:
            connection = await Connection.open(url)
            times = [await connection.get(address) for _ in range(10)]
            connection.close()
        return sorted(times)[5], measured.cells()

    for count in sizes:
        with tempfile.TemporaryDirectory() as name:
            address = path.format(job=seed(Path(name), count))
            with served(Path(name)) as coordinator:
                taken, cells = asyncio.run(ask(coordinator.url, address))
            seconds.append(taken)
            print(f"| {count:,} | {1000 * taken:.1f} | {cells} |", flush=True)
    print(f"\nexponent {exponent(list(sizes), seconds)}")


def checkpoints_table(full: bool) -> None:
    def seed(folder: Path, count: int) -> str:
        return seeded(folder, 1, State.succeeded, checkpoints=count)[-1].id

    pages_table("Checkpoints", (1000, 10_000, *((100_000,) if full else ())), "/checkpoints", seed)


def events_table(full: bool) -> None:
    def seed(folder: Path, count: int) -> str:
        return seeded(folder, 1, State.succeeded, events=count)[-1].id

    sizes = (10_000, 100_000, *((1_000_000,) if full else ()))
    pages_table("Events of one job", sizes, "/train/jobs/{job}/events?limit=10000", seed)


def followers_table(full: bool) -> None:
    show("Followers of a running job of 20 steps per second", f"followers | events per second and follower | {CELLS}")

    async def follow(url: str, path: str, counted: list[int]) -> None:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        try:
            while data := await reader.read(2**16):
                counted[0] += data.count(b"\nevent: ")
        finally:
            writer.close()

    async def many(url: str, path: str, count: int) -> str:
        counted = [0]
        tasks = [asyncio.create_task(follow(url, path, counted)) for _ in range(count)]
        await asyncio.sleep(2.0)
        async with Measured(url) as measured:
            before, begun = counted[0], time.monotonic()
            await asyncio.sleep(4.0)
            rate = (counted[0] - before) / (time.monotonic() - begun) / count
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return f"{rate:.1f} | {measured.cells()}"

    with (
        tempfile.TemporaryDirectory() as name,
        served(Path(name), ranks=0.05) as coordinator,
        coordinator.client() as client,
    ):
        job = client.post("/train", json=ONE | {"epochs": 10_000}).json()["id"]
        for count in (1, 100, 400, *((1000,) if full else ())):
            path = f"/train/jobs/{job}/events?stream=true"
            print(f"| {count} | {asyncio.run(many(coordinator.url, path, count))} |", flush=True)


def uploads_table(full: bool) -> None:
    size = 32 if full else 8
    show(f"Uploads of {size} MB at once", f"uploads | seconds | {CELLS}")

    async def upload(client: httpx.AsyncClient) -> None:
        part = {"file": ("a.jsonl", b"x" * (size * 2**20))}
        (await client.post("/v1/files", files=part, data={"purpose": "fine-tune"})).raise_for_status()

    async def many(url: str, count: int) -> tuple[float, str]:
        async with Measured(url) as measured, httpx.AsyncClient(base_url=url, timeout=120) as client:
            begun = time.monotonic()
            await asyncio.gather(*(upload(client) for _ in range(count)))
            return time.monotonic() - begun, measured.cells()

    with tempfile.TemporaryDirectory() as name, served(Path(name)) as coordinator:
        for count in (1, 4, 8):
            taken, cells = asyncio.run(many(coordinator.url, count))
            print(f"| {count} | {taken:.1f} | {cells} |", flush=True)


def connections_table(full: bool) -> None:
    show("Idle connections", f"connections | {CELLS}")

    async def idle(url: str, count: int) -> str:
        connections = [await Connection.open(url) for _ in range(count)]
        cells = await quiet(url)
        for connection in connections:
            connection.close()
        return cells

    with tempfile.TemporaryDirectory() as name, served(Path(name)) as coordinator:
        for count in (1, 100, 400, *((900,) if full else ())):
            print(f"| {count} | {asyncio.run(idle(coordinator.url, count))} |", flush=True)


async def poll(url: str, until: float, times: list[float]) -> None:
    """A client that asks for the status about five times a second."""
    await asyncio.sleep(random.random() / POLLS_PER_SECOND)
    with contextlib.closing(await Connection.open(url)) as connection:
        while time.monotonic() < until:
            times.append(await connection.get("/train/status"))
            await asyncio.sleep(random.uniform(0.5, 1.5) / POLLS_PER_SECOND)


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


def clients_table(full: bool) -> None:
    clients, seconds = 50, 20.0 if full else 10.0
    show(f"{clients} clients that poll the status", "while | requests | p50 ms | p99 ms | max ms")
    with tempfile.TemporaryDirectory() as name:
        model = write_model(Path(name) / "m")
        with served(Path(name), ranks=0.05, model_path=model) as coordinator, coordinator.client() as client:
            client.post("/train", json=ONE | {"epochs": 10_000})
            for text in (False, True):
                print(asyncio.run(round_of(coordinator.url, clients, seconds, text=text)), flush=True)


TABLES = {
    "jobs": jobs_table,
    "waiting": waiting_table,
    "checkpoints": checkpoints_table,
    "events": events_table,
    "followers": followers_table,
    "uploads": uploads_table,
    "connections": connections_table,
    "clients": clients_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--full", action="store_true", help="the largest sizes; takes several minutes")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{datetime.date.today()}, {os.cpu_count()} x {platform.machine()}, load {load:.1f}")
    for name in args.table:
        TABLES[name](args.full)


if __name__ == "__main__":
    main()
