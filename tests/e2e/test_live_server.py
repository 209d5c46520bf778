"""Against real vLLM at TP = 2: what is mapped is what is served, and training through it changes what is served."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from apollo_tp.shards.mapping import map_rank
from apollo_tp.wire.commands import Sample
from tests.support.processes import coordinator_url, start_trainer
from tests.support.ranks import run_ranks
from tests.support.served import trainer_logprobs
from tests.support.servers import Server, Trainer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

TOKENS = [(7 * i) % 997 + 4 for i in range(40)]


def test_mapped_memory_is_the_checkpoint_bit_for_bit(server: Server) -> None:
    """Every checkpoint tensor, on both ranks, but for the head, which is the embedding; compared when the server had just
    started."""
    assert server.manifests[0].copies == {"lm_head.weight": "model.embed_tokens.weight"}
    assert server.num_verified == (len(server.manifests[0].checkpoint) - 1,) * 2


def test_every_parameter_reaches_inference_and_is_restored_exactly(server: Server) -> None:
    """Changing any one parameter through the mapping moves served log-probabilities; putting it back restores them."""
    mapped = [map_rank(server.manifests, rank) for rank in range(2)]
    before = server.logprobs(TOKENS)
    assert server.logprobs(TOKENS) == before, "the server itself is not deterministic"
    for rank, name in [(r, name) for r in range(2) for name in mapped[r].tensors]:
        local = mapped[rank].tensors[name][1]
        saved = local.clone()
        local.add_(0.5)
        assert server.logprobs(TOKENS) != before, f"rank {rank}, {name}: a change does not reach inference"
        local.copy_(saved)
        assert server.logprobs(TOKENS) == before, f"rank {rank}, {name}: not restored"


def test_trainer_and_server_agree_on_log_probabilities(server: Server) -> None:
    """Same tokens, same bf16 weights, two programs. bf16 rounds a logit of size 4 to 1/64; sums differ by a few of that."""
    sample = Sample(token_ids=TOKENS, weights=[0.0] + [1.0] * (len(TOKENS) - 1))
    served = server.logprobs(TOKENS)
    for values in run_ranks(trainer_logprobs, 2, server.manifests, [sample], deadline_seconds=240):
        gaps = [abs(a - b) for a, b in zip(values, served, strict=True)]
        assert max(gaps) < 0.05, max(gaps)
        assert sum(gaps) / len(gaps) < 0.01


@pytest.mark.parametrize("port", ["coordinator", "server"])
def test_a_job_moves_what_is_served(server: Server, trainer: Trainer, port: str) -> None:
    """The same request on the coordinator's port and on vLLM's own."""
    before = server.mean_logprob(TOKENS)
    url = trainer.url if port == "coordinator" else server.url
    sample = {"context_ids": TOKENS[:1], "continuation_ids": TOKENS[1:]}
    body = {"samples": [sample] * 4, "epochs": 3, "batch_size": 4, "wait": True}
    job = httpx.post(f"{url}/train", json=body, timeout=300).raise_for_status().json()
    assert job["state"] == "succeeded", job
    assert job["step"] == 3
    assert server.mean_logprob(TOKENS) > before + 0.05
    status = httpx.get(f"{url}/train/status", timeout=30).raise_for_status().json()
    assert status["trainer"]["weight_version"] == job["weight_version"] > 0


def test_every_sample_form_is_trained_and_its_events_can_be_followed(trainer: Trainer) -> None:
    """Messages, prompt and completion, text: one job; its events arrive as a stream that ends with the job."""
    samples = [
        {"messages": [{"role": "user", "content": "def f():"}, {"role": "assistant", "content": "return 1"}]},
        {"prompt": "import os", "completion": "\nimport sys"},
        {"text": "for i in range(10): pass"},
    ]
    job = trainer.post("/train", {"samples": samples, "batch_size": 2})
    seen = []
    with httpx.stream("GET", f"{trainer.url}/train/jobs/{job['id']}/events?stream=true", timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                seen.append(json.loads(line[6:]))
    metrics = [event["data"] for event in seen if event.get("type") == "metrics"]
    assert [entry["step"] for entry in metrics] == [1, 2]
    assert all(entry["train_loss"] > 0 for entry in metrics)
    assert {"tokens_per_second", "seconds_left"} <= set(metrics[-1])
    assert trainer.get(f"/train/jobs/{job['id']}")["state"] == "succeeded"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", "body"),
        (b'{"samples": 3}', "samples"),
        (b'{"samples": [{"context_ids": [1], "continuation_ids": []}]}', "continuation_ids"),
        (b'{"samples": [{"context_ids": [1], "continuation_ids": [1003]}]}', "continuation_ids"),
        (b'{"samples": [{"context_ids": [1], "continuation_ids": [-1]}]}', "continuation_ids"),
        (json.dumps({"samples": [{"context_ids": [1], "continuation_ids": [2] * 300}]}).encode(), "samples[0]"),
        (b'{"samples": [{"text": "x"}], "epoch": 2}', "epoch"),
    ],
)
@pytest.mark.parametrize("port", ["coordinator", "server"])
def test_bad_requests_are_4xx_and_reach_no_rank(
    server: Server, trainer: Trainer, port: str, body: bytes, field: str
) -> None:
    """The answer names the field, what was got and what was expected; no job appears and no weight changes."""
    before = trainer.get("/train/status")
    url = trainer.url if port == "coordinator" else server.url
    response = httpx.post(f"{url}/train", content=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert field in json.dumps(error), error
    assert {"field", "got", "expected"} <= set(error), error
    after = trainer.get("/train/status")
    assert after["counts"] == before["counts"]
    assert after["trainer"]["weight_version"] == before["trainer"]["weight_version"]


def test_a_second_trainer_is_refused(server: Server, trainer: Trainer, tmp_path: Path) -> None:
    """One trainer per server: the second ends with an error that names the first one's process."""
    overrides = ["server.instance=main"]
    second = start_trainer(server.runtime_dir, tmp_path, tmp_path / "second.log", overrides=overrides, forking=True)
    try:
        assert second.process.wait(180) != 0
    finally:
        second.stop()
    assert "TrainerBusyError" in second.log.read_text()
    assert trainer.get("/train/status")["trainer"]["connected"]


def test_inspect_prints_the_layout(server: Server) -> None:
    """Checkpoint tensor, rank, served tensor, view: without a trainer."""
    done = subprocess.run(
        [sys.executable, "-m", "apollo_tp.inspect", "--runtime-dir", str(server.runtime_dir), "--instance", "main"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "model.layers.0.self_attn.k_proj.weight" in done.stdout
    assert "qkv_proj" in done.stdout


def test_checkpoint_is_what_is_served_and_training_resumes_from_it(server: Server, trainer: Trainer) -> None:
    """The folder loads in transformers with the served bits; a new trainer goes on with its optimizer state."""
    saved = trainer.post("/checkpoint", {"wait": True})
    state = AutoModelForCausalLM.from_pretrained(saved["path"], dtype="auto").state_dict()
    assert _differences(server, state) == []
    stored = load_file(Path(saved["path"]) / "model.safetensors")
    assert stored["lm_head.weight"].equal(stored["model.embed_tokens.weight"])
    assert stored["lm_head.weight"].equal(state["lm_head.weight"])
    assert not [p for p in Path(saved["path"]).rglob("*") if p.stat().st_mode & 0o077]
    version = trainer.get("/train/status")["trainer"]["weight_version"]
    trainer.process.stop(signal.SIGTERM)
    successor = start_trainer(
        server.runtime_dir,
        trainer.state_dir,
        trainer.state_dir / "successor.log",
        overrides=["server.instance=main", "optim.lr=1e-3", "train.max_sequence_tokens=256"],
        forking=True,
    )
    try:
        trainer.url = coordinator_url(server.runtime_dir, successor, instance="main")
        trainer.process = successor  # the module's trainer from here on
        assert trainer.get("/train/status")["trainer"]["weight_version"] == version
        assert f"optimizer state of {saved['path']}" in successor.log.read_text()
        job = trainer.post("/train", {"samples": [{"text": "import os"}], "wait": True})
        assert job["weight_version"] == version + 1
    except BaseException:
        successor.stop()
        raise


def _differences(server: Server, state: dict[str, torch.Tensor]) -> list[str]:
    found = []
    for rank in range(2):
        for name, (shard, local) in map_rank(server.manifests, rank).tensors.items():
            for box, start in shard.boxes:
                part = state[name][tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))]
                mine = local if shard.dim is None else local.narrow(shard.dim, start, box.shape[shard.dim])
                if not torch.equal(part, mine):
                    found.append(f"rank {rank}: {name}")
    return found


def test_a_client_that_streams_while_training_loses_nothing(server: Server, trainer: Trainer) -> None:
    """HOGWILD: requests go on during steps, none fails, every log-probability is finite."""
    results: list[httpx.Response] = []
    stop = threading.Event()

    def generate() -> None:
        body = {"model": "demo", "prompt": TOKENS[:8], "max_tokens": 8, "logprobs": 0, "ignore_eos": True}
        while not stop.is_set():
            results.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=120))

    client = threading.Thread(target=generate)
    client.start()
    try:
        job = trainer.post("/train", {"samples": [{"text": "import os, sys"}] * 4, "epochs": 2, "wait": True})
    finally:
        stop.set()
        client.join(120)
    assert job["state"] == "succeeded"
    assert results
    assert all(response.status_code == 200 for response in results)
    values = [v for r in results for v in r.json()["choices"][0]["logprobs"]["token_logprobs"]]
    assert len(values) == 8 * len(results)
    assert all(-1e4 < value <= 0 for value in values)
