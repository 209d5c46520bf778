"""Commands about the trainer: status, checkpoints, layout, agreement with the server, and keys for clients."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from apollo_tp.cli import rendering
from apollo_tp.cli.access import HTTP, check_scheme
from apollo_tp.cli.answers import Checkpoint, ConnectedTrainer, Page, Plan, RefusedError, Scores, Status, read
from apollo_tp.cli.session import OK, REFUSED, Session, errors_as_sentences
from apollo_tp.errors import ConfigError

POLL_SECONDS = 0.5


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL [VLLM OPTIONS] [-- OVERRIDES]", help="A folder or a name on the hub.")
    ],
) -> None:
    """Serve a model with vLLM and train it in place: both processes, started and ended as one.

    Options are those of `vllm serve`; what follows -- are options of the trainer, such as optim.lr=1e-5.
    """
    from apollo_tp.cli import serve as serving

    with errors_as_sentences():
        status = serving.run(serving.plan(model, context.args, context.obj or []), rendering.show_line)
    raise typer.Exit(status)


def plan(
    session: Session,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a config.json, or a name on the hub.")],
    gpus: Annotated[str, typer.Option(metavar="COUNTxNAME-GB", help="The GPUs, such as 2xH200-141 or 1xH100-80.")],
    tensor_parallel_size: Annotated[
        int | None, typer.Option("--tensor-parallel-size", "-tp", help="Of the server.", show_default="all GPUs")
    ] = None,
    tokens: Annotated[int, typer.Option(help="The trainer's train.max_micro_batch_tokens.")] = 4096,
    length: Annotated[int, typer.Option(help="Tokens of a request that is served, prompt and answer.")] = 4096,
    concurrency: Annotated[int, typer.Option(help="How many requests the KV cache holds at once.")] = 16,
) -> int:
    """Does a model fit, to be served and trained? Exits with status 1 if no choice of options makes it fit."""
    from apollo_tp.cli import plan as planning

    asked = planning.parse_gpus(gpus)
    size = asked.count if tensor_parallel_size is None else tensor_parallel_size
    planning.check(asked, size, tokens, length, concurrency)
    from apollo_tp.training.estimate import Estimate, read_config  # torch, which takes seconds to import

    with rendering.waiting("planning"):
        estimate = Estimate(read_config(model), size)
        found = planning.rows(estimate, asked, tokens=tokens, kv_tokens=length * concurrency)
    answer = planning.answer(model, asked, estimate, found, tokens=tokens, length=length, concurrency=concurrency)
    session.show(answer, Plan, rendering.show_plan)
    return OK if answer["fits"] else REFUSED


def status(session: Session) -> int:
    """Show the trainer, the running job and the queue."""
    session.show(session.client.call("GET", "/train/status"), Status, rendering.show_status)
    return OK


def checkpoint(session: Session) -> int:
    """Write the served weights and the optimizer state to disk, and wait for it."""
    with rendering.waiting("writing"):
        answer = session.client.call("POST", "/checkpoint", json={})
        while (made := read(answer, Checkpoint)).state == "queued":  # the coordinator itself waits for a limited time
            time.sleep(POLL_SECONDS)
            answer = session.client.call("GET", f"/checkpoint/{made.id}")
    session.show(answer, Checkpoint, rendering.show_checkpoint)
    return OK if made.state == "succeeded" else REFUSED


def checkpoints(session: Session, limit: Annotated[int, typer.Option(help="How many.")] = 20) -> int:
    """List the latest checkpoints."""
    answer = session.client.call("GET", "/checkpoints", params={"limit": limit})
    session.show(read(answer, Page[Any]).data, list[Checkpoint], rendering.show_checkpoints)
    return OK


def restore(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name or id of a checkpoint; see `checkpoints`.")],
) -> int:
    """Put a checkpoint's weights and optimizer state back into the served memory, and wait for it."""
    path = f"/checkpoint/{quote(name, safe='')}"
    with rendering.waiting("restoring"):
        answer = session.client.call("POST", f"{path}/restore", json={})
        while (found := read(answer, Checkpoint).restore) is not None and found.state == "queued":
            time.sleep(POLL_SECONDS)
            answer = session.client.call("GET", path)
    session.show(answer, Checkpoint, rendering.show_restore)
    return OK if found is not None and found.state == "succeeded" else REFUSED


def inspect(session: Session) -> int:
    """Show which part of each checkpoint tensor lies on which rank."""
    rows = read(session.client.call("GET", "/train/layout"), Page[dict[str, Any]]).data
    if not rows and not session.json:
        print("the trainer has not said; without a trainer: python -m apollo_tp.inspect")
        return REFUSED
    session.show(rows, list[dict[str, Any]], rendering.show_layout)
    return OK


def compare(
    session: Session,
    server: Annotated[str, typer.Option(help="vLLM; its API key in $VLLM_API_KEY.")] = "http://127.0.0.1:8000",
    tokens: Annotated[
        int, typer.Option(help="How many random tokens to compare; attention windows come before them.")
    ] = 64,
    at_most: Annotated[
        float | None, typer.Option(metavar="NATS", help="Exit with status 1 if the mean gap is larger.")
    ] = None,
) -> int:
    """Does the trainer compute what the server serves?"""
    from apollo_tp.cli.compare import ask_server, gap, random_tokens, score_request, served_logprobs, stretch

    check_scheme("--server", server, *HTTP)
    if at_most is not None and math.isnan(at_most):
        raise ConfigError(f"--at-most: got {at_most}, expected a number of nats")
    answer = session.client.call("GET", "/train/status")
    if not (shown := read(answer, Status).trainer).connected:
        raise RefusedError(f"no trainer: {shown.reason}")
    trainer = read(answer["trainer"], ConnectedTrainer)
    length, first = stretch(tokens, trainer.max_sequence_tokens, trainer.attention_window)
    ids = random_tokens(length, trainer.vocab_size)
    scored = session.client.call("POST", "/train/score", json=score_request(ids, first), timeout=None)
    served = served_logprobs(ask_server(server, trainer.served_model_names[0], ids), ids)[first - 1 :]
    found, version = gap(scored, served), read(scored, Scores).weight_version
    beyond = f" beyond the window of {trainer.attention_window}" if first > 1 else ""
    line = (
        f"{found.tokens} log-probabilities of random tokens{beyond}, weight version {version}: server and trainer "
        f"differ by {found.mean_gap_nats:.4f} nats in the mean, {found.largest_gap_nats:.4f} at most"
    )
    session.show(asdict(found) | {"weight_version": version}, dict[str, Any], lambda _: print(line))
    return OK if at_most is None or found.mean_gap_nats <= at_most else REFUSED


def keys(
    session: Session,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the keys are written; made if it is not there.")],
    client: Annotated[str, typer.Option(help="Name of the client that may connect.")] = "client",
) -> int:
    """Make CURVE keys for ZMQ over TCP: the coordinator's (service.zmq.keys_dir) and a client's."""
    from apollo_tp.coordinator.http.curve import create_keys

    written = [str(path) for path in create_keys(folder, client)]
    lines = "\n".join(written) or f"nothing to make: {folder} has keys for {client}"
    session.show({"written": written}, dict[str, Any], lambda _: print(lines))
    return OK


def end_orphans(
    session: Session,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    runtime_dir: Annotated[
        Path | None, typer.Option(help="The servers' runtime folder; default $APOLLO_TP_RUNTIME_DIR, or the usual one.")
    ] = None,
) -> int:
    """End processes of this machine's servers that live on although their API server or engine was killed."""
    from apollo_tp.cli import orphans
    from apollo_tp.runtime import instance_folder

    base = instance_folder.base_dir(str(runtime_dir) if runtime_dir else None)
    found = orphans.find(base)
    if not session.json:
        for name, processes in found.items():
            print(f"server {name} has ended, but {', '.join(map(str, processes))} live on")
    if found and not yes and not typer.confirm("End these processes?", err=True):
        return REFUSED
    left = {name: orphans.end(base, name, processes) for name, processes in found.items()}
    answer = {
        "ended": {name: [p.pid for p in found[name] if p not in left[name]] for name in found},
        "alive": {name: [p.pid for p in processes] for name, processes in left.items() if processes},
    }
    lines = [
        f"server {name}: {', '.join(map(str, processes))} did not end" for name, processes in left.items() if processes
    ]
    done = "ended" if found else f"no orphaned processes of servers in {base}"
    session.show(answer, dict[str, Any], lambda _: print("\n".join(lines) or done))
    return REFUSED if lines else OK
