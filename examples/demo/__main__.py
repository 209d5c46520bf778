"""The demo: serve a small model with real vLLM at TP = 2, train it in place while a client generates, check the result."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from examples.demo.common import ENDED, Demo, bit_identical, console, logprobs, mean_logprob, post, texts
from examples.demo.load import GenerationLoad
from tests.support.demo_model import make_model
from tests.support.processes import ManagedProcess, coordinator_url, free_port, start_server, start_trainer

NUM_RANKS = 2
BATCH_SIZE, NUM_BATCHES = 8, 10
OUTPUTS = ("model", "service", "checkpoints", "server.log", "trainer.log", "result.json")


def run(out: Path, runtime_dir: Path, num_steps: int, server_args: list[str]) -> dict[str, Any]:
    """Run the demo in an empty folder; returns the figures."""
    train_texts, heldout = texts()
    # fp32: a CPU without bf16 arithmetic is several times faster in it, and the server's log-probabilities are then exact
    # enough to compare with transformers token by token. The end-to-end tests serve bf16.
    num_parameters = make_model(out / "model", train_texts, dtype=torch.float32)
    console.print(f"model: {num_parameters / 1e6:.1f}M parameters in {out / 'model'}")
    port = free_port()
    extra = ["--dtype", "float32", *server_args]  # vLLM would serve a checkpoint in fp32 as bf16
    server = start_server(out / "model", port, runtime_dir, out / "server.log", tensor_parallel=NUM_RANKS, extra=extra)
    url, trainer, load = f"http://127.0.0.1:{port}", None, None
    try:
        console.print("server: starting vLLM, TP = 2 ...")
        server.wait_for(f"{url}/health", 300)
        overrides = ["optim.lr=1e-3", "train.max_sequence_tokens=512"]
        trainer = start_trainer(runtime_dir, out, out / "trainer.log", num_ranks=NUM_RANKS, overrides=overrides)
        before = mean_logprob(url, heldout)
        service = coordinator_url(runtime_dir, trainer)
        load = GenerationLoad(url, heldout[0][:100])
        job = _train(service, trainer, train_texts, num_steps)
        load.stop()
        checkpoint = post(f"{service}/checkpoint", {"wait": True})
        return _figures(url, runtime_dir, heldout, before, job, Path(checkpoint["path"]), load)
    finally:
        if load:
            load.stop()
        for process in (trainer, server):
            if process:
                process.stop()


def _train(service: str, trainer: ManagedProcess, texts: list[str], num_steps: int) -> dict[str, Any]:
    samples = [{"text": text} for text in texts[: BATCH_SIZE * NUM_BATCHES]]
    body = {"samples": samples, "batch_size": BATCH_SIZE, "epochs": num_steps, "max_steps": num_steps}
    job = post(f"{service}/train", body)
    console.print(f"job {job['id']}: {num_steps} steps")
    with console.status("training") as status:
        while job["state"] not in ENDED:
            time.sleep(0.5)
            trainer.check()
            job = httpx.get(f"{service}/train/jobs/{job['id']}", timeout=30).json()
            left = f", {job['seconds_left']:.0f} s left" if job.get("seconds_left") else ""
            status.update(f"step {job['step']} of {job['total_steps']}, loss {job['loss'] or 0:.3f}{left}")
    events = httpx.get(f"{service}/train/jobs/{job['id']}/events", timeout=30).json()
    if job["state"] != "succeeded":
        raise SystemExit(f"job {job['state']}: {json.dumps(job['error'])}")
    job["losses"] = [event["data"]["train_loss"] for event in events["data"] if event.get("type") == "metrics"]
    return job


def _figures(
    url: str,
    runtime_dir: Path,
    heldout: list[str],
    before: float,
    job: dict[str, Any],
    folder: Path,
    load: GenerationLoad,
) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    gap = max(
        abs(served - written)
        for text in heldout
        for served, written in zip(logprobs(url, text), _transformers_logprobs(model, tokenizer, text), strict=True)
    )
    return {
        "train_loss_first": job["losses"][0],
        "train_loss_last": job["losses"][-1],
        "train_steps": job["step"],
        "train_tokens": job["tokens"],
        "heldout_logprob_before": before,
        "heldout_logprob_after": mean_logprob(url, heldout),
        "checkpoint": str(folder),
        "checkpoint_bit_identical": bit_identical(folder, runtime_dir / "demo"),
        "checkpoint_served_logprob_gap": gap,
        "inference_requests_ok": load.ok,
        "inference_requests_failed": load.failed,
        "inference_pauses": load.pauses,
        "inference_longest_gap_s": round(load.longest_gap_seconds, 3),
    }


@torch.no_grad()
def _transformers_logprobs(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, text: str) -> list[float]:
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()


def _promises_held(result: dict[str, Any]) -> bool:
    return bool(
        result["train_loss_first"] - result["train_loss_last"] > 2
        and result["heldout_logprob_after"] > result["heldout_logprob_before"]
        and result["checkpoint_bit_identical"]
        and result["checkpoint_served_logprob_gap"] < 0.05
        and result["inference_requests_ok"] > 0
        and not result["inference_requests_failed"]
        and not result["inference_pauses"]
    )


DEMO = Demo(
    "examples.demo", __doc__, "apollo_tp demo: a vLLM server at TP = 2, trained in place", OUTPUTS, run, _promises_held
)

if __name__ == "__main__":
    raise SystemExit(DEMO.main())
