"""A coordinator and a fake rank 0 as processes that are killed with SIGKILL at random points of their jobs."""

from __future__ import annotations

import os
import random
import time

from tests.support import forks
from tests.support.fakes import FakeRanks, wait_for
from tests.support.jobs import ONE

STEPS = 20
STEP_SECONDS = 0.01
VICTIMS = ("coordinator", "ranks", "both", "coordinator twice")


class RanksProcess:
    """The fake rank 0 as a process that can be killed; its journal stays."""

    def __init__(self, coordinator):
        self.arguments = [str(coordinator.ranks_socket), str(coordinator.folder / "journal"), str(STEP_SECONDS)]
        self.process = None

    def start(self):
        command = ["tests.support.fakes", *self.arguments]
        self.process = forks.origin("tests.support.fakes").start(command, os.environ, 1, 2)

    def kill(self):
        self.process.kill()
        self.process.wait(10)

    def applied(self):
        return FakeRanks(self.arguments[0], self.arguments[1]).applied()


def check_promises(coordinator, ranks, jobs, seen):
    """All jobs end; every step of each is in the weights once and in order; no event that was seen is gone."""
    with coordinator.client() as client:
        for job in jobs:
            path = f"/train/jobs/{job}"
            wait_for(lambda: client.get(path).json()["state"] == "succeeded", 30, f"the end of {job}")  # noqa: B023
            assert [step for name, step in ranks.applied() if name == job] == list(range(1, STEPS + 1))
            events = client.get(f"{path}/events").json()["data"]
            ids = [event["id"] for event in events]
            assert ids == sorted(set(ids))
            kept = {event["id"]: event for event in events}
            for event in seen.get(job, []):
                assert kept[event["id"]] == event
            steps = [event["data"]["step"] for event in events if event["type"] == "metrics"]
            assert steps == sorted(set(steps))  # none is reported twice
    order = [name for name, _ in ranks.applied() if name in jobs]
    assert order == sorted(order, key=jobs.index)  # the interrupted job went on before the next one started


def kill_at_a_random_point(coordinator, ranks, who, seed):
    """Queue two jobs, kill ``who`` somewhere in the first one's life, and check the promises."""
    with coordinator.client() as client:
        jobs = [client.post("/train", json=ONE | {"epochs": STEPS}).json()["id"] for _ in range(2)]
        chance = random.Random(f"{who}{seed}")
        for _ in range(2 if "twice" in who else 1):
            time.sleep(chance.uniform(0.0, 2 * STEPS * STEP_SECONDS))
            seen = {}
            with coordinator.client() as again:
                for job in jobs:
                    seen[job] = again.get(f"/train/jobs/{job}/events").json()["data"]
            if who == "both":
                coordinator.kill()
                ranks.kill()
                ranks.start()
            elif who == "ranks":
                ranks.kill()
                ranks.start()
                continue
            else:
                coordinator.kill()
            coordinator.start()
    check_promises(coordinator, ranks, jobs, seen)
