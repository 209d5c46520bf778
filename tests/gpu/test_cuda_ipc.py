"""CUDA IPC with real vLLM in its default mode (torch.compile, CUDA graphs): the mapped memory is what is served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apollo_tp.shards.mapping import map_rank, verify_against_checkpoint
from tests.support.demo_model import make_model, standard_library_text
from tests.support.processes import free_port, start_server
from tests.support.servers import SERVER_ARGS, Server

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

TOKENS = [(7 * i) % 997 + 4 for i in range(40)]


def test_every_parameter_reaches_inference_and_is_restored_exactly(server: Server) -> None:
    """Mapping takes no GPU memory and holds the checkpoint; each parameter changed in place moves log-probabilities."""
    ranks = len(server.manifests)
    for device in range(ranks):
        torch.zeros(1, device=f"cuda:{device}")
    free_before = [torch.cuda.mem_get_info(device)[0] for device in range(ranks)]
    mapped = [map_rank(server.manifests, rank) for rank in range(ranks)]
    for device in range(ranks):
        assert abs(free_before[device] - torch.cuda.mem_get_info(device)[0]) <= 4 * 2**20, "the mapping took memory"
    assert all(verify_against_checkpoint(m, -1) == len(m.tensors) for m in mapped)
    before = server.logprobs(TOKENS)
    for rank, name in [(r, name) for r in range(ranks) for name in mapped[r].tensors]:
        local = mapped[rank].tensors[name][1]
        saved = local.clone()
        local.add_(0.5)
        torch.cuda.synchronize(local.device)
        assert server.logprobs(TOKENS) != before, f"rank {rank}, {name}: a change does not reach inference"
        local.copy_(saved)
        torch.cuda.synchronize(local.device)
        assert server.logprobs(TOKENS) == before, f"rank {rank}, {name}: not restored"
    for m in mapped:
        m.close()


_COUNT = """
import json, sys, torch
from pathlib import Path
from apollo_tp.shards.instance import read_instance
from apollo_tp.shards.mapping import map_rank, verify_against_checkpoint
manifests = read_instance(Path(sys.argv[1]))
found = []
for rank in range(len(manifests)):
    mapped = map_rank(manifests, rank)
    found.append([mapped.device.index, verify_against_checkpoint(mapped, -1)])
print(json.dumps(found))
"""


@pytest.mark.multigpu
def test_devices_are_matched_by_uuid(server: Server) -> None:
    """With the GPUs in reverse order, every rank still finds its own memory."""
    if len(server.manifests) == 1:
        order, expected = "1,0", [1]
    else:
        order, expected = "1,0", [1, 0]
    done = subprocess.run(
        [sys.executable, "-c", _COUNT, str(server.runtime_dir / server.instance)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": order}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [device for device, _ in found] == expected
    assert all(count == len(server.manifests[0].checkpoint) for _, count in found)


def test_isolated_pid_namespace_is_refused_with_the_cure(server: Server) -> None:
    """A trainer in another PID namespace cannot map: the error says which flag joins them."""
    code = (
        "from apollo_tp.shards.instance import read_instance, check_agreement; from pathlib import Path; import sys;"
        "check_agreement(read_instance(Path(sys.argv[1])))"
    )
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code,
         str(server.runtime_dir / server.instance)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "--pid=container" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "cure"),
    [
        (["--enable-sleep-mode"], {}, "--enable-sleep-mode"),
        ([], {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "expandable_segments"),
        (["--quantization", "fp8"], {}, "serve the bf16 checkpoint"),
    ],
    ids=["sleep mode", "expandable segments", "quantised"],
)
def test_servers_that_cannot_be_trained_say_why(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], cure: str
) -> None:
    """The reason and the cure are in the server's log and in its manifest, and the server serves all the same."""
    make_model(tmp_path / "model", standard_library_text(1000, 30), vocab_size=1003, num_layers=2)
    port, runtime_dir = free_port(), tmp_path / "rt"
    runtime_dir.mkdir(mode=0o700)
    extra = ["--enforce-eager", *arguments, *SERVER_ARGS]
    process = start_server(
        tmp_path / "model",
        port,
        runtime_dir,
        tmp_path / "s.log",
        tensor_parallel=1,
        extra=extra,
        environment=environment,
    )
    try:
        process.wait_for(f"http://127.0.0.1:{port}/health", 300)
        server = Server(f"http://127.0.0.1:{port}", tmp_path / "model", runtime_dir, "demo", process)
        assert cure in server.manifests[0].error
        assert cure in process.log.read_text()
    finally:
        process.stop()
