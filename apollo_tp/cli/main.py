"""``apollo-tp``: the coordinator from a shell. Thin over HTTP; nothing here that another HTTP client could not do.

Exit status: 0 done; 1 the request was refused or the job failed; 2 wrong usage; 3 no coordinator answers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from apollo_tp.cli.compare import (
    MOST_TOKENS,
    SERVER_KEY_VARIABLE,
    ask_server,
    gap,
    random_tokens,
    score_request,
    served_logprobs,
)
from apollo_tp.cli.zmq_transport import ZmqTransport
from apollo_tp.errors import ConfigError
from apollo_tp.runtime import instance_folder, processes
from apollo_tp.runtime.instance_folder import TOKEN_VARIABLE

URL_VARIABLE = "APOLLO_TP_URL"
DEFAULT_URL = "http://127.0.0.1:8300"
RECONNECT_SECONDS = 60.0
POLL_SECONDS = 0.5
HTTP = ("http://", "https://")
OK, REFUSED, USAGE, UNREACHABLE = 0, 1, 2, 3

out, err = Console(highlight=False), Console(stderr=True, highlight=False)


class RefusedError(Exception):
    """The coordinator answered with an error."""


class Client:
    """HTTP calls with the token, and errors as sentences."""

    def __init__(self, url: str, token: str | None, key: Path | None = None) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        transport = None
        _check_scheme("--url", url, *HTTP, "tcp://")
        if url.startswith("tcp://"):
            if key is None:
                raise ConfigError(f"--url {url}: got no --key, expected NAME.key_secret, since ZMQ over TCP needs it")
            transport, url = ZmqTransport(url, key), "http://coordinator"
        # a job's step can take minutes: only connecting has a short deadline
        timeout = httpx.Timeout(60, connect=5)
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False, transport=transport)

    def close(self) -> None:
        self._http.close()

    def call(self, method: str, path: str, **options: Any) -> Any:
        """The JSON answer. Raises RefusedError with the server's message."""
        answer = self._http.request(method, path, **options)
        _check(answer)
        return answer.json()

    def events(self, job_id: str) -> Iterator[dict[str, Any]]:
        """Events as they happen, until the job is over; reconnects where it was, also to a coordinator that starts again."""
        headers = {"Accept": "text/event-stream"}
        heard = time.monotonic()
        while True:
            try:
                with self._http.stream("GET", f"/train/jobs/{job_id}/events", headers=headers) as stream:
                    if stream.is_error:
                        stream.read()
                    _check(stream)
                    for line in stream.iter_lines():
                        heard = time.monotonic()
                        if line == "event: end":
                            return
                        if line.startswith("data: ") and (event := json.loads(line[6:])):
                            headers["Last-Event-ID"] = str(event["id"])
                            yield event
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.ReadTimeout, httpx.ConnectError):
                if time.monotonic() - heard > RECONNECT_SECONDS:
                    raise
                err.print("[dim]the connection broke; going on where it was[/dim]")
                time.sleep(1)


def _check(answer: httpx.Response) -> None:
    if not answer.is_error:
        return
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text[:300]
    raise RefusedError(f"{answer.status_code}: {message}")


def _check_scheme(option: str, url: str, *schemes: str) -> None:
    if not url.lower().startswith(schemes):
        raise ConfigError(f"{option}: got {url!r}, expected it to begin with {' or '.join(schemes)}")


def find_url() -> str:
    """$APOLLO_TP_URL, else the address that the only running coordinator wrote down, else the default."""
    if url := os.environ.get(URL_VARIABLE):
        return url
    try:
        files = sorted(instance_folder.base_dir().glob(f"*/{instance_folder.ADDRESS_FILE}"))
        found = [json.loads(file.read_text()) for file in files]
    except (ConfigError, OSError, ValueError):
        return DEFAULT_URL
    alive = [entry["url"] for entry in found if processes.ProcessId.of(entry["pid"]) is not None]
    if len(alive) > 1:
        raise RefusedError(f"{len(alive)} coordinators run here: choose one with --url: {', '.join(alive)}")
    return str(alive[0]) if alive else DEFAULT_URL


# --- commands: each takes the client and the parsed arguments, and returns the exit status -----------------------------


def status(client: Client, args: argparse.Namespace) -> int:
    """What runs, waits and is done."""
    answer = client.call("GET", "/train/status")
    if _json(args, answer):
        return OK
    trainer, job = answer["trainer"], answer["running"]
    if trainer["connected"]:
        out.print(f"[green]●[/green] {trainer['model']} on {trainer['num_ranks']} ranks, {trainer['optimizer']}")
    else:
        out.print(f"[red]●[/red] no trainer: {trainer.get('reason')}")
    out.print(f"weight version {trainer['weight_version']}, {'not yet saved' if answer['unsaved'] else 'saved'}")
    if job:
        left = f", {job['seconds_left']:.0f} s left" if job.get("seconds_left") is not None else ""
        speed = f", {job['tokens_per_second']:.0f} tokens/s" if job.get("tokens_per_second") else ""
        out.print(f"running {job['id']}: step {job['step']}/{job['total_steps']}{_loss(job)}{speed}{left}")
    for waiting in answer["queue"]:
        out.print(f"{waiting['state']:8} {waiting['id']}: step {waiting['step']}/{waiting['total_steps']}")
    return OK


def train(client: Client, args: argparse.Namespace) -> int:
    """Train on a JSONL file of samples."""
    body: dict[str, Any] = {"samples": list(_samples(args.file))}
    for name in ("epochs", "batch_size", "learning_rate_scale", "seed", "max_steps", "truncate"):
        if (value := getattr(args, name)) is not None:
            body[name] = value
    query = {"dry_run": "true"} if args.dry_run else {}
    answer = client.call("POST", "/train", json=body, params=query)
    if args.dry_run:
        if not _json(args, answer):
            _show_dry_run(answer)
        return OK
    if not args.follow:
        if not _json(args, answer):
            out.print(answer["id"])
        return OK
    return _follow(client, answer["id"], args)


def checkpoint(client: Client, args: argparse.Namespace) -> int:
    """Write the served weights and the optimizer state to disk, and wait for it."""
    with err.status("writing"):
        answer = client.call("POST", "/checkpoint", json={})
        while answer["state"] == "queued":  # however long: the server itself would wait for a time only
            time.sleep(POLL_SECONDS)
            answer = client.call("GET", f"/checkpoint/{answer['id']}")
    if not _json(args, answer):
        out.print(answer["path"] or f"{answer['state']}: {answer['error']}")
    return OK if answer["state"] == "succeeded" else REFUSED


def jobs(client: Client, args: argparse.Namespace) -> int:
    """The latest jobs."""
    answer = client.call("GET", "/train/jobs", params={"limit": args.limit})
    if _json(args, answer["data"]):
        return OK
    table = Table("job", "state", "step", "loss", "tokens", box=None)
    for job in answer["data"]:
        loss = "" if job["loss"] is None else f"{job['loss']:.4f}"
        table.add_row(job["id"], job["state"], f"{job['step']}/{job['total_steps']}", loss, str(job["tokens"]))
    out.print(table)
    return OK


def events(client: Client, args: argparse.Namespace) -> int:
    """The events of a job."""
    if args.follow:
        return _follow(client, args.id, args)
    after, more = 0, True
    while more:
        page = client.call("GET", f"/train/jobs/{args.id}/events", params={"limit": 10_000, "after": after})
        more = page["has_more"]
        for event in page["data"]:
            after = event["id"]
            if not _json(args, event):
                out.print(f"{event['id']:6} {event['level']:5} {event['message']}", markup=False)
    return OK


def act(client: Client, args: argparse.Namespace) -> int:
    """Cancel, pause or resume a job."""
    answer = client.call("POST", f"/train/jobs/{args.id}/{args.command}")
    if not _json(args, answer):
        out.print(f"{answer['id']}: {answer['state']}{', ' + answer['wanted'] + ' asked' if answer['wanted'] else ''}")
    return OK


def inspect(client: Client, args: argparse.Namespace) -> int:
    """Which part of which checkpoint tensor lies on which rank."""
    rows = client.call("GET", "/train/layout")["data"]
    if _json(args, rows):
        return OK
    if not rows:
        out.print("the trainer has not said; without a trainer: python -m apollo_tp.inspect")
        return REFUSED
    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*(":".join(map(str, cell)) if isinstance(cell, list) else str(cell) for cell in row.values()))
    out.print(table)
    return OK


def compare(client: Client, args: argparse.Namespace) -> int:
    """Does the trainer compute what the server serves? See ``apollo_tp.cli.compare``."""
    _check_scheme("--server", args.server, *HTTP)
    trainer = client.call("GET", "/train/status")["trainer"]
    if not trainer["connected"]:
        raise RefusedError(f"no trainer: {trainer.get('reason')}")
    tokens = random_tokens(max(2, min(args.tokens, trainer["max_sequence_tokens"], MOST_TOKENS)), trainer["vocab_size"])
    scored = client.call("POST", "/train/score", json=score_request(tokens), timeout=None)
    try:
        served = ask_server(args.server, trainer["served_model_names"][0], tokens)
    except httpx.TransportError as error:
        raise RefusedError(f"no server answers at {args.server} ({error}); is vLLM running? See --server") from error
    _check(served)
    found, version = gap(scored, served_logprobs(served, tokens)), scored["weight_version"]
    if not _json(args, asdict(found) | {"weight_version": version}):
        out.print(
            f"{found.tokens} log-probabilities of random tokens, weight version {version}: server and trainer "
            f"differ by {found.mean_gap_nats:.4f} nats in the mean, {found.largest_gap_nats:.4f} at most",
            soft_wrap=True,
        )
    return OK if args.at_most is None or found.mean_gap_nats <= args.at_most else REFUSED


def _follow(client: Client, job_id: str, args: argparse.Namespace) -> int:
    if args.json:
        for event in client.events(job_id):
            print(json.dumps(event), flush=True)
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[figures]}"), console=err) as bar:
            task = bar.add_task(job_id, total=None, figures="")
            for event in client.events(job_id):
                data = event["data"]
                if event["type"] == "metrics" and data.get("train_loss") is not None:
                    speed = data.get("tokens_per_second")
                    figures = f"loss {data['train_loss']:.4f}" + (f", {speed:.0f} tokens/s" if speed else "")
                    bar.update(task, completed=data["step"], total=data["total_steps"], figures=figures)
                else:
                    bar.console.print(event["message"], markup=False)
    job = client.call("GET", f"/train/jobs/{job_id}")
    if not args.json:
        out.print(f"{job_id}: {job['state']}{_loss(job)}")
    return OK if job["state"] == "succeeded" else REFUSED


def keys(args: argparse.Namespace) -> int:
    """Make CURVE keys for ZMQ over TCP: the coordinator's (service.zmq.keys_dir) and a client's."""
    from apollo_tp.coordinator.http.curve import create_keys

    written = [str(path) for path in create_keys(args.folder, args.client)]
    if not _json(args, {"written": written}):
        out.print("\n".join(written) or f"nothing to make: {args.folder} has keys for {args.client}", markup=False)
    return OK


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    with sys.stdin.buffer if str(path) == "-" else open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line.decode())
            except ValueError as error:
                message = f"{path}, line {number}: got malformed JSON ({error}), expected one object in UTF-8"
                raise RefusedError(message) from error


def _show_dry_run(answer: dict[str, Any]) -> None:
    for sample in answer["samples"]:
        shown = sample["tokens"] or [f"{token} " for token in sample["token_ids"]]
        for token, weight in zip(shown, sample["weights"], strict=True):
            out.print(token, style="green" if weight else "dim", end="", markup=False)
        out.print()
    out.print(f"{answer['num_tokens']} tokens, {answer['num_loss_tokens']} learned from; {answer['total_steps']} steps")


def _loss(job: dict[str, Any]) -> str:
    return "" if job["loss"] is None else f", loss {job['loss']:.4f}"


def _json(args: argparse.Namespace, answer: Any) -> bool:
    if args.json:
        print(json.dumps(answer))
    return bool(args.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="apollo-tp", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument("--url", help=f"the coordinator; default ${URL_VARIABLE}, or the one that runs here")
    common.add_argument(
        "--key", type=Path, help="NAME.key_secret (with server.key beside it), for a --url tcp://HOST:PORT"
    )
    common.add_argument("--token-file", type=Path, help=f"file with a token; default ${TOKEN_VARIABLE}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=function.__doc__.partition("\n")[0], parents=[common])
        command.set_defaults(function=function)
        return command

    add("status", status)
    add("checkpoint", checkpoint)
    add("inspect", inspect)
    add("jobs", jobs).add_argument("--limit", type=int, default=20)
    for name in ("cancel", "pause", "resume"):
        add(name, act).add_argument("id", metavar="ID")
    shown = add("events", events)
    shown.add_argument("id", metavar="ID")
    shown.add_argument("--follow", action="store_true", help="wait for further ones until the job is over")
    trained = add("train", train)
    trained.add_argument("file", metavar="FILE.jsonl", type=Path, help="one sample per line; - is standard input")
    trained.add_argument("--follow", action="store_true", help="show progress until the job is over")
    trained.add_argument("--dry-run", action="store_true", help="only show the tokens and which are learned from")
    for name, kind in {
        "epochs": int,
        "batch-size": int,
        "learning-rate-scale": float,
        "seed": int,
        "max-steps": int,
    }.items():
        trained.add_argument(f"--{name}", type=kind)
    trained.add_argument("--truncate", choices=["refuse", "left", "right"])
    compared = add("compare", compare)
    compared.add_argument(
        "--server", default="http://127.0.0.1:8000", help=f"vLLM; its API key in ${SERVER_KEY_VARIABLE}"
    )
    compared.add_argument("--tokens", type=int, default=64)
    compared.add_argument("--at-most", type=float, metavar="NATS", help="exit with status 1 if the mean gap is larger")
    made = add("keys", keys)
    made.add_argument("folder", metavar="DIR", type=Path)
    made.add_argument("--client", default="client", help="name of the client that may connect")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``apollo-tp``."""
    args = _parser().parse_args(argv)
    try:
        token = args.token_file.read_text() if args.token_file else os.environ.get(TOKEN_VARIABLE, "")
        # the same file serves the coordinator: the last token of it, without its scope
        token = (token.strip().splitlines() or [""])[-1].rpartition(":")[2]
        if args.function is keys:
            return int(keys(args))
        with contextlib.closing(Client(args.url or find_url(), token or None, args.key)) as client:
            status_code: int = args.function(client, args)
        return status_code
    except RefusedError as error:
        err.print(f"apollo-tp: {error}", markup=False)
        return REFUSED
    except (OSError, httpx.InvalidURL, ConfigError) as error:
        err.print(f"apollo-tp: {error}", markup=False)
        return USAGE
    except httpx.TransportError as error:
        err.print(f"apollo-tp: no coordinator answers ({error}); is the trainer running? See --url", markup=False)
        return UNREACHABLE
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
