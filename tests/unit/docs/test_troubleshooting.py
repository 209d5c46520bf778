"""Each message of docs/how-to/troubleshooting.md is provoked, and is what the page says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from starlette.exceptions import HTTPException
from torch import nn

from apollo_tp.config import HttpConfig, QosConfig, ServiceConfig
from apollo_tp.coordinator.http.auth import load_access
from apollo_tp.coordinator.http.errors import handle_error
from apollo_tp.coordinator.jobs.job import JobSpec, State, new_job
from apollo_tp.coordinator.jobs.store import Store
from apollo_tp.errors import ApolloTpError
from apollo_tp.gpu_sharing import mps
from apollo_tp.launch import hosts, restoring, server_watch
from apollo_tp.launch.arguments import read_arguments
from apollo_tp.runtime import instance_folder, owned_folder
from apollo_tp.shards import instance, mapping
from apollo_tp.shards.manifest import SCHEMA_VERSION, publish, read
from apollo_tp.training.memory_plan import MemoryPlan
from apollo_tp.vllm_plugin.compat import release
from apollo_tp.vllm_plugin.compat.refusals import refusals_of_server
from tests.support.manifests import ended_process, manifest
from tests.support.vllm_configs import server

PAGE = Path(__file__).parents[3] / "docs/how-to/troubleshooting.md"
ROW = re.compile(r"^\| (?P<ticks>`+)(?P<message>.+?)(?P=ticks) \|", re.MULTILINE)
MESSAGES = [row["message"] for row in ROW.finditer(PAGE.read_text())]

Provoked = Callable[[Path, pytest.MonkeyPatch], object]
"""Raises the error, or returns its text; in a private folder."""
PROVOKED: dict[str, Provoked] = {}


def provokes(beginning: str) -> Callable[[Provoked], Provoked]:
    def add(function: Provoked) -> Provoked:
        PROVOKED[beginning] = function
        return function

    return add


def refused(**changes: object) -> Provoked:
    return lambda folder, patch: refusals_of_server(server(**changes), nn.Module())[0]


PROVOKED |= {
    "quantised weights": refused(model_config__quantization="fp8"),
    "LoRA-wrapped": refused(lora_config=object()),
    "sleep mode": refused(model_config__enable_sleep_mode=True),
    "pipeline": refused(parallel_config__pipeline_parallel_size=2),
    "expert parallelism": refused(parallel_config__enable_expert_parallel=True),
    "Ray": refused(parallel_config__distributed_executor_backend="ray"),
    "weights offloaded": lambda folder, patch: refusals_of_server(
        server(device_config__device="cuda"), nn.Linear(1, 1)
    )[0],
    "…: got no value": lambda folder, patch: read_arguments(["optim.lr"]),
    "optim.learning_rate": lambda folder, patch: read_arguments(["optim.learning_rate=1"]),
    "got … live servers": lambda folder, patch: _served(folder, "a", "b"),
    "waited": lambda folder, patch: instance.wait_for_server(folder, None, 0),
    "trainer ranks": lambda folder, patch: hosts._check_size(1, {"demo": [manifest(0), manifest(1)]}),
    "server …: got a server in PID": lambda folder, patch: instance.check_agreement([manifest(0, 1, pid_namespace=1)]),
    "…: got … without a token": lambda folder, patch: load_access(ServiceConfig(http=HttpConfig(host="0.0.0.0"))),
    "checkpoint": lambda folder, patch: restoring.folder_of(folder, "20261129-171500-a1b2c3"),
}  # fmt: skip


@provokes("expandable")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    patch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return refusals_of_server(server(), nn.Module())[0]


@provokes("mixture-of-experts backend")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    layer = nn.Module()
    layer.quant_method = type("Method", (), {"unquantized_backend": "FLASHINFER_CUTLASS"})()
    return refusals_of_server(server(), layer)[0]


@provokes("vLLM")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    patch.setattr(release, "vllm_version", lambda: "0.25.1")
    try:
        release.check_version()
    except RuntimeError as error:
        return error
    return None


def _served(base: Path, *names: str, **fields: object) -> object:
    for name in names:
        publish(manifest(0, 1, **fields), instance_folder.instance_dir(name, base))
    return instance.wait_for_server(base, None, -1)


@provokes("server …: got a loaded model")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    return _served(folder, "demo", endpoints=True)


@provokes("server …: got a second trainer")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    with instance_folder.trainer_lock(folder), instance_folder.trainer_lock(folder):
        return None


@provokes("rank …: got GPUs")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    patch.setattr(mapping, "visible_uuids", lambda: ["gpu-1"])
    return mapping._local_device(manifest(0, 1, device="cuda", device_uuid="GPU-2"))


@provokes("rank …: got … free")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    gb = 10**9
    plan = MemoryPlan(
        rank=1, tokens=65536, gradients=8 * gb, activations=30 * gb, optimizer=gb, available=20 * gb, largest=21000
    )
    return plan.refusal(recomputes=False, in_backward=False)


@provokes("…: got schema version")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    (folder / "rank0.json").write_bytes(msgspec.json.encode({"schema_version": SCHEMA_VERSION + 1}))
    return read(folder / "rank0.json")


@provokes("instance")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    for variable in (instance.CLAIMED_VARIABLE, instance.REFUSED_VARIABLE):
        patch.delenv(variable, raising=False)
    patch.setenv(instance_folder.RUNTIME_DIR_VARIABLE, str(folder))
    patch.setenv(instance_folder.INSTANCE_VARIABLE, "demo")
    claim = "from apollo_tp.shards.instance import claim_instance; claim_instance(); print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", claim], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        return instance.claim_instance()
    finally:
        other.communicate(b"\n", timeout=30)


@provokes("service.http.host and port")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    from apollo_tp.coordinator.__main__ import bind_http

    with socket.create_server(("127.0.0.1", 0)) as taken:
        return bind_http(*taken.getsockname())


@provokes("service.token_file")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    (folder / "tokens").write_text("train:0123456789abcdef")
    (folder / "tokens").chmod(0o644)
    return load_access(ServiceConfig(token_file=str(folder / "tokens")))


@provokes("got …, expected a running MPS")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    patch.setattr(mps, "DRIVER", folder)
    patch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(folder))
    return mps.share_gpu(QosConfig(sm_percent=50))


@provokes("… on a machine without")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    patch.setattr(mps, "DRIVER", folder / "none")
    return mps.share_gpu(QosConfig(sm_percent=50))


@provokes("… …: got a folder")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    (folder / "mine.txt").touch()
    return owned_folder.claim(folder, "state", "service.state_dir")


def _command(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "apollo_tp.cli.main", *map(str, arguments)], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    return done.stderr.strip().removeprefix("apollo-tp: ").removeprefix("error: ")


@provokes("no coordinator answers")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    return _command("status", "--url", "http://127.0.0.1:9")


@provokes("…, line 1")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    (folder / "empty.jsonl").touch()
    return _command("train", folder / "empty.jsonl", "--url", "http://127.0.0.1:9")


@provokes("…, line …")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    (folder / "bad.jsonl").write_text('{"text": "x"}\n{"text": \n')
    return _command("train", folder / "bad.jsonl", "--url", "http://127.0.0.1:9")


@provokes("… …: got no route")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    request = SimpleNamespace(method="POST", scope={"path": "/v1/completions"})
    answer = asyncio.run(handle_error(request, HTTPException(404)))
    return json.loads(bytes(answer.body))["error"]["message"]


@provokes("the queue is full")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    async def add() -> None:
        with contextlib.closing(Store(folder / "state")) as store:
            await store.add_job(new_job("train", JobSpec(), State.queued), max_queued=0)

    return asyncio.run(add())


@provokes("server …: got the end")
def _(folder: Path, patch: pytest.MonkeyPatch) -> object:
    gone, found = ended_process(), []
    watch = server_watch.ServerWatch([manifest(0, 1, pid=gone.pid, pid_start_ticks=gone.start_ticks)], found.append)
    watch._watch()
    return found[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.mark.parametrize("message", MESSAGES)
def test_the_page_quotes_what_is_said(message: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beginnings = [beginning for beginning in PROVOKED if message.startswith(beginning)]
    assert beginnings, "nothing provokes it"
    provoke = PROVOKED[max(beginnings, key=len)]
    try:
        said = str(provoke(folder, monkeypatch))
    except ApolloTpError as error:
        said = str(error)
    pattern = ".*".join(map(re.escape, message.split("…")))
    assert re.fullmatch(pattern, said, re.DOTALL), said


def test_every_error_that_is_provoked_is_on_the_page() -> None:
    assert len(MESSAGES) >= 30
    assert [b for b in PROVOKED if not any(message.startswith(b) for message in MESSAGES)] == []
