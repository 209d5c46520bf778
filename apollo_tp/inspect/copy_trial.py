"""``python -m apollo_tp.inspect MODEL --try``: would the gradients of this model be exact? Tried on a small random copy.

The copy has the model's own config at small sizes (``shrink``). vLLM's loader is traced for each of its ranks, and ranks of
their own (processes with gloo) compare loss, log-probabilities and every gradient with the single-process model in fp32
(``exactness``). No server and no GPU.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.errors import ApolloTpError, UnsupportedModelError
from apollo_tp.inspect.exactness import compare
from apollo_tp.inspect.shrink import shrink
from apollo_tp.model.build import read_model_config, refusing
from apollo_tp.model.towers import auto_class
from apollo_tp.shards.manifest import publish

EXACT = 1e-4
"""Largest relative error of an exact gradient in fp32: sums over ranks run in another order, and a chunked recurrence
multiplies many exponentials. A wrong one is off by more than a percent."""
SIZES = (1, 2, 4)
SECONDS = 240
"""How long the ranks may take."""


@dataclass(frozen=True)
class Trial:
    """What came of it: ``refusal`` is why the copy could not be trained, or ""; ``worst`` the largest error on any rank,
    relative for loss and gradients and in nats for log-probabilities, and ``where`` that was."""

    refusal: str
    worst: float
    where: str

    @property
    def exact(self) -> bool:
        return not self.refusal and self.worst <= EXACT


def try_copy(model: str, tp_size: int, *, trust_remote_code: bool = False) -> Trial:
    """Compare a small copy of the folder ``model`` at ``tp_size``. Imports vLLM into this process.

    Raises UnsupportedModelError for a size, or a config that cannot be copied.
    """
    if tp_size not in SIZES:
        raise UnsupportedModelError(
            f"--tp {tp_size}: got a size at which a small copy cannot be tried, expected {SIZES}"
        )
    if trust_remote_code:
        raise UnsupportedModelError("--try: got --trust-remote-code, expected a model whose code transformers has")
    config = shrink(read_model_config(model, trust_remote_code=False))
    with tempfile.TemporaryDirectory(prefix="apollo-tp-try-") as name:
        folder = Path(name)
        config.save_pretrained(folder)
        (written,) = _run([(_write_weights, (name,))])
        if written.refusal:
            return written
        if refusal := _trace(folder, tp_size):
            return Trial(refusal, 0.0, "")
        return _run_ranks(folder, tp_size)


def build(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The single-process model in fp32 with eager attention and random weights, norms and biases included."""
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start at 1 and 0, which would hide a wrong shard
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()  # type: ignore[no-any-return]


def _trace(folder: Path, tp_size: int) -> str:
    """Publish the manifests of all ranks below ``folder``; returns why a server could not be trained, or ""."""
    from apollo_tp.vllm_plugin.offline import offline_manifests

    manifests = offline_manifests(str(folder), tp_size, dtype="float32")
    target = folder / f"tp{tp_size}"
    target.mkdir()
    for manifest in manifests:
        publish(manifest, target)
    return manifests[0].error


def _run_ranks(folder: Path, tp_size: int) -> Trial:
    """The first refusal of a rank, or the worst error of all."""
    trials = _run([(_rank, (str(folder), rank, tp_size)) for rank in range(tp_size)])
    refused = [trial for trial in trials if trial.refusal]
    return (
        refused[0] if refused else max(trials, key=lambda trial: math.inf if math.isnan(trial.worst) else trial.worst)
    )


def _run(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Trial]:
    """Run each call in a process of its own; what they report, up to the first refusal. All processes have ended then.

    Raises UnsupportedModelError if one ends without a result, or too late.
    """
    context = multiprocessing.get_context("spawn")  # vLLM has changed much of this process, classes of transformers too
    ends = [context.Pipe(duplex=False) for _ in calls]
    pairs = zip(calls, ends, strict=True)
    processes = [context.Process(target=_report, args=(theirs, call, args)) for (call, args), (_, theirs) in pairs]
    deadline = time.monotonic() + SECONDS
    results: list[Trial] = []
    try:
        for process in processes:
            process.start()
        waiting = {ours: process for (ours, _), process in zip(ends, processes, strict=True)}
        while waiting and not any(trial.refusal for trial in results):
            for ours, process in list(waiting.items()):
                alive = process.is_alive()
                if ours.poll(0.02):
                    results.append(Trial(**json.loads(ours.recv_bytes())))
                    del waiting[ours]
                elif not alive:
                    raise UnsupportedModelError(
                        f"--try: got exit status {process.exitcode} of a rank, expected a result"
                    )
            if time.monotonic() > deadline:
                raise UnsupportedModelError(f"--try: got no result in {SECONDS} s, expected one for a small copy")
        return results
    finally:
        for process in processes:
            if process.pid is not None:
                process.join(2)
                process.kill()
                process.join(5)


def _report(connection: Any, call: Callable[..., Trial], arguments: tuple[Any, ...]) -> None:
    """In a process of its own: send what ``call`` finds, or why it was refused."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        result = call(*arguments)
    except ApolloTpError as error:
        result = Trial(str(error), 0.0, "")
    connection.send_bytes(json.dumps(asdict(result)).encode())
    if dist.is_initialized() and not result.refusal:
        with contextlib.suppress(RuntimeError):  # a rank that ends at once closes what another still reads
            dist.barrier()


def _write_weights(folder: str) -> Trial:
    """Random weights for the config in ``folder``."""
    config = read_model_config(folder, trust_remote_code=False)
    with refusing(f"a small copy of {config.model_type}"):
        build(config).save_pretrained(folder)
    return Trial("", 0.0, "")


def _rank(folder: str, rank: int, tp_size: int) -> Trial:
    """One rank of the comparison."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=tp_size,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    errors = compare(TPGroup(rank, tp_size, dist.group.WORLD), Path(folder)).errors
    where = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return Trial("", errors[where], where)
