"""Llama, Gemma 3, mixtures of experts, latent attention and the Qwen3.5 hybrid against real vLLM at TP = 2: change and
restore of every parameter, ten training steps, agreement of log-probabilities, and checkpoints that load elsewhere with the
same ones."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from apollo_tp.cli import main as cli
from apollo_tp.model.build import as_served
from apollo_tp.shards.mapping import map_rank, verify_against_checkpoint
from apollo_tp.shards.serving import SERVING_FILE
from apollo_tp.wire.commands import Sample
from tests.support.demo_model import make_tokenizer, standard_library_text
from tests.support.families import FAMILIES, SERVED, build, store_head
from tests.support.processes import coordinator_url, free_port, start_server, start_trainer
from tests.support.ranks import run_ranks
from tests.support.served import trainer_logprobs
from tests.support.servers import START_SECONDS, Server, Trainer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

TOKENS = [(211 * i) % 990 + 4 for i in range(48)]  # over the vocabulary rows of both ranks


# Routing is discontinuous: where two experts are nearly tied, bf16 rounding may send a token to one in vLLM, another in
# transformers, whose log-probabilities then differ by more than rounding. fp32 rounds 65,536 times finer: held to 1e-3.
FP32 = {"qwen3-moe", "gpt-oss", "deepseek-v3"}


# Tied, and stored with the head as well: vLLM and transformers would take an old head beside a trained embedding.
STORED_HEAD = {"gemma3"}


# vLLM is told to stretch positions: trainer and server must compute alike, whatever the model's own config says.
OVERRIDES = {"llama": {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}}}


# vLLM is told to render conversations otherwise than the model's folder says, which neither it nor the workers know of.
TEMPLATES = {
    "gemma3": "{{ greeting }}{% for m in messages %}[[{{ m.role }}]]{% for part in m.content %}{{ part.text }}{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}[[assistant]]{% endif %}"
}
GREETING = '{"greeting": "import sys"}'
PARTS = [{"type": "text", "text": "Hello import os"}, {"type": "text", "text": " and re"}]
MESSAGES = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "return None"}]


def _server_args(name: str, tokenizer: Path) -> list[str]:
    """``tokenizer`` is the folder of one that is not the model's."""
    overrides = ["--hf-overrides", json.dumps(OVERRIDES[name])] if name in OVERRIDES else []
    text = []
    if name in TEMPLATES:
        text = ["--chat-template", TEMPLATES[name], "--tokenizer", str(tokenizer)]
        text += ["--default-chat-template-kwargs", GREETING]
    return [*overrides, *text, *(["--dtype", "float32"] if name in FP32 else [])]


class Family:
    """The processes of a family: a server, and a trainer that moves a random model visibly. Started at once, since the
    trainer waits for the server, each of whose processes imports for ten seconds, one after the other."""

    def __init__(self, name: str, folder: Path) -> None:
        folder.chmod(0o700)
        self.name = name
        _write_model(folder / "model", name)
        port = free_port()
        self.folder, self.url, self.processes = folder, f"http://127.0.0.1:{port}", []
        log, extra = folder / "server.log", _server_args(name, folder / "tokenizer")
        self.processes.append(
            start_server(folder / "model", port, folder, log, instance="family", extra=extra, forking=True)
        )
        overrides = [
            "server.instance=family", f"server.wait_seconds={START_SECONDS}", "optim.lr=1e-3",
            "checkpoint.after_idle_seconds=null",
        ]  # fmt: skip
        self.processes.append(start_trainer(folder, folder, folder / "trainer.log", overrides=overrides, forking=True))

    def ready(self) -> tuple[Server, Trainer]:
        process, trainer = self.processes
        process.wait_for(f"{self.url}/health", START_SECONDS)
        server = Server(self.url, self.folder / "model", self.folder, "family", process)
        for rank in range(2):
            mapped = map_rank(server.manifests, rank)
            assert verify_against_checkpoint(mapped, -1) + len(mapped.copies) == len(server.manifests[0].checkpoint)
            assert len(mapped.copies) == (self.name in STORED_HEAD)
        url = coordinator_url(self.folder, trainer, instance="family", seconds=START_SECONDS)
        return server, Trainer(url, self.folder, trainer)

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.stop()


@pytest.fixture(scope="module")
def start_family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Family]]:
    """Starts a family, or gives the one that was started ahead."""
    started: dict[str, Family] = {}

    def start(name: str) -> Family:
        if name not in started:
            started[name] = Family(name, tmp_path_factory.mktemp("family"))
        return started[name]

    try:
        yield start
    finally:
        for family in started.values():
            family.stop()


@pytest.fixture(scope="module", params=SERVED)
def family(request: pytest.FixtureRequest, start_family: Callable[[str], Family]) -> Iterator[tuple[Server, Trainer]]:
    started = start_family(request.param)
    try:
        yield started.ready()
    finally:
        started.stop()


def _following(request: pytest.FixtureRequest) -> list[str]:
    """The family whose tests come after this one's, if any."""
    tests = [test for test in request.session.items if test.path == request.path]
    names = list(dict.fromkeys(test.callspec.params["family"] for test in tests))  # type: ignore[attr-defined]
    index = names.index(request.node.callspec.params["family"])
    return names[index + 1 : index + 2]


def _write_model(folder: Path, name: str) -> None:
    changes = {"max_position_embeddings": 512, "initializer_range": 0.05, **SERVED[name]}
    dtype = torch.float32 if name in FP32 else torch.bfloat16
    build(FAMILIES[name].config(**changes)).to(dtype).save_pretrained(folder)
    if name in STORED_HEAD:
        store_head(folder)
    make_tokenizer(standard_library_text(1000, 30), 1000).save_pretrained(folder)
    if name in TEMPLATES:
        make_tokenizer(standard_library_text(1000, 5), 1000).save_pretrained(folder.with_name("tokenizer"))


def test_every_parameter_reaches_inference_and_is_restored_exactly(family: tuple[Server, Trainer]) -> None:
    """Random changes: adding one number to a router or a key bias would cancel in a softmax."""
    server, _ = family
    generator = torch.Generator().manual_seed(0)
    before = server.logprobs(TOKENS)
    assert server.logprobs(TOKENS) == before, "the server itself is not deterministic"
    mapped = [map_rank(server.manifests, rank) for rank in range(2)]
    for rank, name in itertools.product(range(2), mapped[0].tensors):
        local = mapped[rank].tensors[name][1]
        if not local.numel() or (rank and name.endswith("o_proj.bias")):
            continue  # vLLM adds biases behind a sum over ranks on the first one
        saved = local.clone()
        local.add_(torch.randn(local.shape, generator=generator))
        assert server.logprobs(TOKENS) != before, f"rank {rank}, {name}: a change does not reach inference"
        local.copy_(saved)
        assert server.logprobs(TOKENS) == before, f"rank {rank}, {name}: not restored"


def test_trainer_and_server_agree_on_log_probabilities(family: tuple[Server, Trainer]) -> None:
    """Same tokens, same bf16 weights, two programs: bf16 rounds logits of size 4 to 1/64, and hidden states before."""
    server, trainer = family
    compare = ["compare", "--url", trainer.url, "--server", server.url, "--at-most", "0.02"]
    assert cli.main(compare) == 0, "as a user would ask the trainer's own process"
    sample = Sample(token_ids=TOKENS, weights=[0.0] + [1.0] * (len(TOKENS) - 1))
    served = server.logprobs(TOKENS)
    for values in run_ranks(trainer_logprobs, 2, server.manifests, [sample], deadline_seconds=240):
        gaps = [abs(a - b) for a, b in zip(values, served, strict=True)]
        assert max(gaps) < 0.05, max(gaps)


def test_the_trainer_waited_for_the_engine_and_renders_as_it_does(
    family: tuple[Server, Trainer], request: pytest.FixtureRequest
) -> None:
    """Both were started at once. Conversations become the tokens that vLLM makes of them, whatever it was told."""
    server, trainer = family
    folder = server.runtime_dir / server.instance
    assert all(manifest.endpoints for manifest in server.manifests)
    ready, started = (folder / SERVING_FILE).stat().st_mtime, (folder / "coordinator_settings.json").stat().st_mtime
    assert ready < started
    if request.node.callspec.params["family"] in TEMPLATES:
        body = {"model": "demo", "messages": MESSAGES, "add_generation_prompt": False}
        served = httpx.post(f"{server.url}/tokenize", json=body, timeout=60).raise_for_status().json()
        trained = trainer.post("/train?dry_run=true", {"samples": [{"messages": MESSAGES}]})
        ids = trained["samples"][0]["token_ids"]
        assert ids == served["tokens"]
        text = httpx.post(f"{server.url}/detokenize", json={"model": "demo", "tokens": ids}, timeout=60).json()[
            "prompt"
        ]
        assert text == "import sys[[user]]Hello import os and re<|end|>[[assistant]]return None<|end|>"


def test_ten_steps_and_a_checkpoint_with_the_served_log_probabilities(
    family: tuple[Server, Trainer],
    start_family: Callable[[str], Family],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """The loss falls over ten steps; the folder gives the live server's log-probabilities in transformers and in vLLM."""
    (server, trainer), name = family, request.node.callspec.params["family"]
    tmp_path.chmod(0o700)
    before = server.mean_logprob(TOKENS)
    sample = {"context_ids": TOKENS[:1], "continuation_ids": TOKENS[1:]}
    job = trainer.post("/train", {"samples": [sample] * 4, "epochs": 10, "batch_size": 4, "wait": True})
    assert (job["state"], job["step"]) == ("succeeded", 10), job
    assert server.mean_logprob(TOKENS) > before + 0.1
    live, manifest = server.logprobs(TOKENS), server.manifests[0]
    _decodes_as_it_reads(server, 1e-3 if name in FP32 else 0.05)
    saved = trainer.post("/checkpoint", {"wait": True})["path"]
    trainer.process.stop()  # neither is needed any more, and their memory is
    server.process.stop()
    port, extra = free_port(), _server_args(name, server.model.parent / "tokenizer")
    # With the plugin: without it vLLM cannot import Qwen3.5 beside a CPU torch, and its packed kernels round otherwise.
    process = start_server(
        Path(saved), port, tmp_path, tmp_path / "again.log", instance="again", extra=extra, forking=True
    )
    try:
        for following in _following(request):
            start_family(following)  # a start leaves half of two cores idle
        config = as_served(AutoConfig.from_pretrained(saved), manifest.config_overrides, manifest.max_model_len)
        model = AutoModelForCausalLM.from_pretrained(saved, config=config, dtype="auto", attn_implementation="eager")
        with torch.no_grad():
            logprobs = model(torch.tensor([TOKENS])).logits[0, :-1].float().log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0].tolist()
        assert max(abs(a - b) for a, b in zip(expected, live, strict=True)) < (1e-3 if name in FP32 else 0.05)
        process.wait_for(f"http://127.0.0.1:{port}/health", START_SECONDS)
        again = Server(f"http://127.0.0.1:{port}", Path(saved), tmp_path, "none", process).logprobs(TOKENS)
        if name in STORED_HEAD:
            _goes_on(tmp_path, Path(saved), sample)
    finally:
        process.stop()
    assert again == live, "the same bits in the same program"


def _decodes_as_it_reads(server: Server, at_most: float) -> None:
    """Sampled tokens have the log-probabilities that the same tokens have in a prompt. In latent attention only sampling
    computes with the absorbed matrices, which must have followed ten changes of the weight."""
    tokens, sampled = server.sample(TOKENS[:8], 8)
    read = server.logprobs([*TOKENS[:8], *tokens])[-8:]
    assert max(abs(a - b) for a, b in zip(sampled, read, strict=True)) < at_most


def _goes_on(folder: Path, saved: Path, sample: dict) -> None:
    """A trainer beside the server of ``saved`` takes up its optimizer state; without a server, the folder's layout is the
    live one's."""
    overrides = ["server.instance=again", "optim.lr=1e-3", "checkpoint.after_idle_seconds=null"]
    process = start_trainer(folder, folder, folder / "trainer.log", overrides=overrides, forking=True)
    try:
        inspect = [sys.executable, "-m", "apollo_tp.inspect"]
        told = [
            subprocess.run([*inspect, *arguments], capture_output=True, text=True, timeout=240, check=True).stdout
            for arguments in (["--runtime-dir", folder, "--instance", "again"], [saved, "--tp", "2"])
        ]
        live, offline = (text.partition("\n┏")[2] for text in told)
        assert live == offline
        assert re.search(r"lm_head\.weight +│ +1 +│ +second copy +│ of model\.embed_tokens\.weight", live), live
        trainer = Trainer(coordinator_url(folder, process, instance="again", seconds=START_SECONDS), folder, process)
        assert f"optimizer state of {saved}" in process.log.read_text()
        job = trainer.post("/train", {"samples": [sample], "wait": True})
        assert (job["state"], job["weight_version"]) == ("succeeded", 11), job
    finally:
        process.stop()
