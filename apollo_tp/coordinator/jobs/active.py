"""The jobs that are not over, in memory: the newest state of each, in the order in which they were accepted."""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Iterator

from apollo_tp.coordinator.jobs.job import TERMINAL, Job, State


class ActiveJobs:
    """Jobs by id and by state. Finding the first job of a state and counting cost the same however many there are.

    ``counts`` has the number of jobs in each state, those that are over included: ``stored`` are the numbers at start.
    """

    def __init__(self, stored: dict[State, int]) -> None:
        self.counts = {state: stored[state] if state in TERMINAL else 0 for state in State}
        self._jobs: dict[str, tuple[int, Job]] = {}
        self._filed_as: dict[str, State] = {}
        self._by_state: dict[State, list[int]] = {state: [] for state in State}
        self._by_number: dict[int, Job] = {}

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def __getitem__(self, job_id: str) -> Job:
        return self._jobs[job_id][1]

    def add(self, number: int, job: Job) -> None:
        """Add a job. ``number`` increases from job to job."""
        self._jobs[job.id], self._by_number[number] = (number, job), job
        self._filed_as[job.id] = job.state
        bisect.insort(self._by_state[job.state], number)
        self.counts[job.state] += 1

    def moved(self, job: Job) -> None:
        """File the job under its present state. A job that is not active is left out."""
        before = self._filed_as.get(job.id)
        if before is None or before is job.state:
            return
        number = self._jobs[job.id][0]
        self._take_out(before, number)
        bisect.insort(self._by_state[job.state], number)
        self._filed_as[job.id] = job.state
        self.counts[before] -= 1
        self.counts[job.state] += 1

    def remove(self, job_id: str) -> None:
        """Forget a job that is over. It stays counted."""
        number, _ = self._jobs.pop(job_id)
        self._take_out(self._filed_as.pop(job_id), number)
        del self._by_number[number]

    def _take_out(self, state: State, number: int) -> None:
        numbers = self._by_state[state]
        del numbers[bisect.bisect_left(numbers, number)]

    def in_states(self, *states: State) -> Iterator[Job]:
        """Jobs in these states, in the order in which they were accepted. Do not change states meanwhile."""
        numbers = heapq.merge(*(self._by_state[state] for state in states))
        return (self._by_number[number] for number in numbers)

    def first(self, count: int, *states: State) -> list[Job]:
        """The first ``count`` jobs in these states."""
        return list(itertools.islice(self.in_states(*states), count))
