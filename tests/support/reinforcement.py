"""Reinforcement jobs on a real coordinator, with a fake server and fake ranks, through the real `openai` client."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai

from apollo_tp.config import RlConfig
from tests.support.chat_model import write_model
from tests.support.completions import FakeServer
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for

GRADER = {"type": "string_check", "name": "right", "operation": "eq", "input": "{{sample.output_text}}",
          "reference": "{{item.answer}}"}  # fmt: skip
LINES = [{"messages": [{"role": "user", "content": f"question {i}"}], "answer": "yes"} for i in range(4)]


class Stack:
    """A coordinator whose server is ``server``; ``options`` are those of rl."""

    def __init__(self, folder: Path, server: FakeServer, **options: Any) -> None:
        self.server = server
        self.coordinator = CoordinatorProcess(
            folder, model_path=write_model(folder / "model"), settings={"rl": RlConfig(**{"completions": 4} | options)},
            server_url=server.url,
        )  # fmt: skip
        self.journal = folder / "journal"

    @contextlib.contextmanager
    def running(self, **ranks: Any) -> Iterator[FakeRanks]:
        """The coordinator with its ranks, which are connected."""
        with self.coordinator, self.ranks(**ranks) as fake:
            yield fake

    @contextlib.contextmanager
    def ranks(self, **options: Any) -> Iterator[FakeRanks]:
        with FakeRanks(self.coordinator.ranks_socket, self.journal, **options) as fake:
            self.connected()
            yield fake

    def connected(self) -> None:
        with self.coordinator.client() as http:
            wait_for(lambda: http.get("/health").json()["trainer"])

    @property
    def client(self) -> openai.OpenAI:
        url = f"{self.coordinator.url}/v1"
        return openai.OpenAI(base_url=url, api_key="unused", max_retries=0, _strict_response_validation=True)

    def create(
        self,
        lines: Any = LINES,
        grader: Any = GRADER,
        validation: Any = None,
        guard: dict[str, Any] | None = None,
        **hyperparameters: Any,
    ) -> Any:
        files = {}
        for name, each in (("training_file", lines), ("validation_file", validation)):
            if each:
                content = "\n".join(map(json.dumps, each)).encode()
                files[name] = self.client.files.create(file=("a.jsonl", content), purpose="fine-tune").id
        hyperparameters = {"n_epochs": 2, "batch_size": 2} | hyperparameters
        method = {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": hyperparameters}}
        extra = {"guard": guard} if guard else None
        return self.client.fine_tuning.jobs.create(model="fake", method=method, extra_body=extra, **files)

    def ended(self, job: Any) -> Any:
        jobs = self.client.fine_tuning.jobs
        return wait_for(lambda: (now := jobs.retrieve(job.id)).finished_at and now, what="the end of the job")

    def events(self, job: Any) -> list[Any]:
        """The job's events, oldest first."""
        return self.client.fine_tuning.jobs.list_events(job.id, limit=100).data[::-1]
