"""A fake trainer rank 0 (apollo_tp.wire.commands over a real ZMQ socket), and a real coordinator process to connect it to.

The fake keeps a journal of the steps it completed, in place of the served weights: a step that is in it twice was trained
twice. The journal survives a kill of the fake, as vLLM's memory survives a kill of the trainer.

``python -m tests.support.fakes SOCKET JOURNAL STEP_SECONDS`` runs one alone.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import msgspec
import zmq

from apollo_tp.config import HttpConfig, ServiceConfig, WriterConfig
from apollo_tp.coordinator.settings import Settings
from apollo_tp.shards.serving import Serving
from apollo_tp.wire import codec, commands
from tests.support import forks
from tests.support.chat_model import write_model
from tests.support.figures import step_figures

VOCAB_SIZE = 1000
HEARTBEAT_SECONDS = 0.1
COORDINATOR = "apollo_tp.coordinator.__main__"


class FakeRanks:
    """One rank 0. ``fail_at`` and ``skip_at`` are job steps that raise or are skipped; while ``mute``, nothing is sent.
    ``logprob`` is that of a token, and each step changes it by the share ``learned``. A checkpoint takes ``save_seconds``,
    and fails if ``fail_saves``; a Score command takes ``score_seconds``. ``commands`` were begun; those whose ids are in
    ``answered`` have been answered."""

    def __init__(self, socket_path, journal, *, step_seconds=0.0, instance_id="fake", max_tokens=256):
        self.socket_path, self.journal, self.step_seconds = str(socket_path), Path(journal), step_seconds
        self.instance_id, self.max_tokens, self.server_life = instance_id, max_tokens, f"{instance_id}@1"
        self.fail_at, self.skip_at, self.mute = set(), set(), False
        self.logprob, self.save_seconds, self.loss_of_skipped, self.hello_seconds = -0.5, 0.0, 1.0, 0.0
        self.commands, self.answered, self.scored = [], [], []
        self.learned, self.fail_saves, self.score_seconds = 0.0, False, 0.0
        self.restore_seconds, self.fail_restores = 0.0, False
        self.fallback = ""  # of snapshots that are kept in this object, in place of checkpoints
        self.saved, self.undone = {}, 0  # steps in the weights by name of the checkpoint; steps that are not any more
        self.replicas, self.lags = [], []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(10)

    def applied(self):
        """(job id, step) in the order in which they changed the weights."""
        if not self.journal.exists():
            return []
        lines = self.journal.read_text().splitlines()
        return [(line.split()[0], int(line.split()[1])) for line in lines]

    def restores(self):
        """(name, restore id) of the checkpoints that were put back."""
        path = self.journal.with_suffix(".restores")
        return [tuple(line.split()) for line in path.read_text().splitlines()] if path.exists() else []

    def version(self):
        return len(self.applied()) + len(self.restores())

    def hello(self, identity=""):
        applied, restores = self.applied(), self.restores()
        return commands.Hello(
            id=identity,
            protocol_version=commands.PROTOCOL_VERSION,
            instance_id=self.instance_id,
            server_life=self.server_life,
            model_path="/models/fake",
            served_model_names=["fake"],
            num_ranks=2,
            vocab_size=VOCAB_SIZE,
            max_sequence_tokens=self.max_tokens,
            weight_version=self.version(),
            last_restore_id=restores[-1][1] if restores else "",
            num_parameters=6_000_000,
            optimizer="apollo rank 64",
            gradients="stored",
            attention_window=40,
            layout=[
                {"tensor": "model.embed_tokens.weight", "rank": r, "served": "embed", "part": [0, 8]} for r in (0, 1)
            ],
            last_job_id=applied[-1][0] if applied else "",
            last_job_step=applied[-1][1] if applied else 0,
            replicas=self.replicas,
            num_replicas=3 if self.replicas else 1,
        )

    def run(self):
        socket = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"ipc://{self.socket_path}")
        queue, busy, until, beat = collections.deque(), None, 0.0, 0.0
        self._send(socket, self.hello())
        with contextlib.closing(socket):
            while not self._stop.is_set():
                wait = max(0.0, min(until - time.monotonic(), 0.01)) if busy else (0.0 if queue else 0.01)
                while socket.poll(wait * 1000):
                    queue.append(codec.decode(socket.recv(), commands.AnyCommand))
                    wait = 0.0
                now = time.monotonic()
                if now - beat > HEARTBEAT_SECONDS:
                    beat = now
                    version = self.version()
                    self._send(socket, commands.Heartbeat(weight_version=version, busy_with=busy.id if busy else ""))
                if busy and now >= until:
                    self._send(socket, self._execute(busy))
                    self.answered.append(busy.id)
                    busy = None
                if not busy and queue:
                    busy = queue.popleft()
                    self.commands.append(busy)
                    seconds = dict.fromkeys((commands.Step, commands.PreferenceStep), self.step_seconds)
                    seconds |= {commands.SaveCheckpoint: self.save_seconds, commands.Score: self.score_seconds}
                    seconds |= {commands.RestoreCheckpoint: self.restore_seconds}
                    until = now + seconds.get(type(busy), 0.0)

    def _send(self, socket, message):
        if not self.mute:
            socket.send(codec.encode(message))

    def _execute(self, command):
        if isinstance(command, commands.Identify):
            time.sleep(self.hello_seconds)
            return self.hello(command.id)
        if isinstance(command, commands.Score):
            self.scored.append(len(self.applied()))
            weights = [sum(sample.weights) for sample in command.samples]
            logprobs = [
                self.logprob
                * weight
                * (1 + 0.01 * sample.token_ids[-1])
                * (1 + self.learned * (len(self.applied()) - self.undone))
                for weight, sample in zip(weights, command.samples, strict=True)
            ]
            return commands.ScoreDone(
                id=command.id, logprobs=logprobs, weights=weights, num_correct=[w / 2 for w in weights],
                token_logprobs=[[-0.01 * t for t in s.token_ids] for s in command.samples] if command.per_token else [],
            )  # fmt: skip
        if isinstance(command, commands.SaveCheckpoint) and self.fail_saves:
            return commands.CommandFailed(id=command.id, rank=0, error="OSError", message="no space left", traceback="")
        if isinstance(command, commands.RestoreCheckpoint):
            if self.fail_restores:
                error = {"rank": 1, "error": "CheckpointError", "message": "another checksum", "traceback": ""}
                return commands.CommandFailed(id=command.id, **error)
            lost = command.fallback and command.name not in self.saved
            with open(self.journal.with_suffix(".restores"), "a") as file:
                file.write(f"{command.fallback if lost else command.name} {command.restore_id}{'/lost' * bool(lost)}\n")
            self.undone = len(self.applied()) - self.saved.get(command.name, 0)
            path = "" if command.fallback and not lost else f"/ckpt/{command.fallback or command.name}"
            return commands.RestoreDone(id=command.id, path=path, seconds=0.2, weight_version=self.version())
        if isinstance(command, commands.SaveCheckpoint):
            version = self.version()
            self.saved[command.name] = len(self.applied()) - self.undone
            done = commands.CheckpointDone(
                id=command.id, path=f"/ckpt/{command.name}", num_bytes=1, seconds=0.0, weight_version=version
            )
            if command.snapshot and self.fallback:
                return msgspec.structs.replace(done, path="", fallback=self.fallback)
            return done
        if isinstance(command, commands.Shutdown):
            self._stop.set()
            return commands.Goodbye(reason=command.reason)
        return self._step(command)

    def _step(self, command):
        if command.job_step in self.fail_at:
            trace = 'File "model.py", line 1\nRuntimeError: boom'
            return commands.CommandFailed(id=command.id, rank=1, error="RuntimeError", message="boom", traceback=trace)
        skipped = "the gradient was not finite" if command.job_step in self.skip_at else ""
        if not skipped:
            with open(self.journal, "a") as file:
                file.write(f"{command.job_id} {command.job_step}\n")
                file.flush()
        samples = command.samples if isinstance(command, commands.Step) else [p.preferred for p in command.pairs]
        tokens = sum(len(sample.token_ids) for sample in samples)
        version = self.version()
        loss = self.loss_of_skipped if skipped else 5.0 / (1 + version)
        rewards = [sample.sampled.reward for sample in samples if sample.sampled.reward is not None]
        metrics = {"reward_mean": sum(rewards) / len(rewards), "mismatch_kl": 0.01 * version} if rewards else {}
        figures = step_figures(
            metrics=metrics, loss=loss, num_tokens=tokens, num_loss_tokens=tokens // 2, weight_version=version,
            step_seconds=self.step_seconds, gradients="in_backward", skipped=skipped,
        )  # fmt: skip
        return commands.StepDone(id=command.id, figures=figures, replica_lag_seconds=self.lags)


class CoordinatorProcess:
    """A real coordinator process over a temporary folder. After ``kill``, ``start`` uses the same state and sockets.
    ``prefix`` is a command that runs it, with limits for example; without one it is forked from a process that has imported
    it, unless ``forked`` is false."""

    def __init__(
        self, folder, *, model_path="", env=None, settings=None, writers=None, prefix=(), forked=True, **service
    ):
        self.folder, self.prefix, self.forked = Path(folder), prefix, forked and not prefix
        self.instance_dir = self.folder / "i"
        self.instance_dir.mkdir(mode=0o700, exist_ok=True)
        if not model_path:
            model_path = self.folder / "model"
            model_path.mkdir(exist_ok=True)
            (model_path / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))
            serving = Serving(text_refusal="the server has no tokenizer")
        else:
            from tests.support.served_model import publish_folder

            serving = publish_folder(Path(model_path), self.instance_dir)
        service = {"rank_timeout_seconds": 1.0} | service
        self.settings = Settings(
            service=ServiceConfig(
                http=HttpConfig(port=0),
                state_dir=str(self.folder / "state"),
                writers=WriterConfig(**(writers or {})),
                **service,
            ),
            instance_dir=str(self.instance_dir),
            model_path=str(model_path),
            serving=serving,
            **({"checkpoint_after_idle_seconds": None} | (settings or {})),
        )
        self.env = os.environ | (env or {})
        self.process = None
        self.log_path = self.folder / "coordinator.log"

    @property
    def ranks_socket(self):
        return self.instance_dir / "ranks.sock"

    def start(self, deadline_seconds=20.0):
        config = self.folder / "settings.json"
        config.write_bytes(msgspec.json.encode(self.settings))
        address = self.instance_dir / "coordinator.json"
        address.unlink(missing_ok=True)
        with open(self.log_path, "ab") as log:
            command = ["apollo_tp.coordinator", "--config", str(config)]
            if self.forked:
                self.process = forks.origin(COORDINATOR).start(command, self.env, 1, log.fileno())
            else:
                self.process = subprocess.Popen(
                    [*self.prefix, sys.executable, "-m", *command], stderr=log, env=self.env
                )
        end = time.monotonic() + deadline_seconds
        while not address.exists():
            assert self.process.poll() is None, self.log_path.read_text()
            assert time.monotonic() < end, "the coordinator did not start in time"
            time.sleep(0.01)
        self.url = json.loads(address.read_text())["url"]
        return self

    def kill(self):
        self.process.kill()
        self.process.wait(10)

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def client(self, **options):
        return httpx.Client(base_url=self.url, timeout=30, **options)


@contextlib.contextmanager
def chat_stack(folder, *, settings=None, step_seconds=0.0, **service):
    """A coordinator of a model with a chat template, its fake rank 0, which is connected, and a client."""
    model = write_model(folder / "model")
    with (
        CoordinatorProcess(folder, model_path=model, settings=settings, **service) as coordinator,
        FakeRanks(coordinator.ranks_socket, folder / "journal", step_seconds=step_seconds) as ranks,
        coordinator.client() as client,
    ):
        wait_for(lambda: client.get("/health").json()["trainer"])
        yield client, ranks, coordinator


def wait_for(condition, seconds=30.0, what="the condition"):
    """Poll until ``condition()`` is true, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not come in {seconds} s"
        time.sleep(0.01)
    return value


if __name__ == "__main__":
    FakeRanks(sys.argv[1], sys.argv[2], step_seconds=float(sys.argv[3])).run()
