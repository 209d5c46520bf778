"""HTTP calls to the coordinator: over TCP, or over ZMQ with CURVE keys."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import httpx_sse

from apollo_tp.cli.access import HTTP, check_scheme
from apollo_tp.cli.answers import RefusedError, UnreachableError, parse
from apollo_tp.cli.zmq_transport import ZmqTransport
from apollo_tp.errors import ConfigError

RECONNECT_SECONDS = 60.0
RETRY_SECONDS = 1.0
RECONNECTED = (httpx.RemoteProtocolError, httpx.ReadError, httpx.ReadTimeout, httpx.ConnectError)


class Client:
    """Calls that return parsed JSON. Every failure is a RefusedError, an UnreachableError or a ConfigError."""

    def __init__(self, url: str, headers: dict[str, str], key: Path | None = None) -> None:
        transport, self._url = None, url
        check_scheme("--url", url, *HTTP, "tcp://")
        if url.startswith("tcp://"):
            if key is None:
                raise ConfigError(f"--url {url}: got no --key, expected NAME.key_secret, since ZMQ over TCP needs it")
            transport, url = ZmqTransport(url, key), "http://coordinator"
        # a job's step can take minutes: only connecting has a short deadline
        timeout = httpx.Timeout(60, connect=5)
        with self._errors():
            self._http = httpx.Client(
                base_url=url, headers=headers, timeout=timeout, trust_env=False, transport=transport
            )

    def close(self) -> None:
        self._http.close()

    def call(self, method: str, path: str, **options: Any) -> Any:
        """The JSON answer, as builtins."""
        with self._errors():
            answer = self._http.request(method, path, **options)
        check(answer)
        return parse(answer.content, f"{method} {answer.url}")

    def events(self, job_id: str, on_break: Callable[[], None]) -> Iterator[Any]:
        """Events as they happen, as builtins, until the job is over.

        A broken connection continues after the last event, also with a coordinator that was started again; ``on_break`` is
        called before each attempt. Gives up when the coordinator was away for RECONNECT_SECONDS.
        """
        headers: dict[str, str] = {}
        reached = time.monotonic()
        while True:
            attempt = time.monotonic()
            try:
                for event in self._events_of_one_connection(job_id, headers):
                    if event.event == "end":
                        return
                    reached = time.monotonic()
                    headers["Last-Event-ID"] = event.id
                    yield parse(event.data, f"the events of {job_id}")
                raise httpx.RemoteProtocolError("the events ended before the job")
            except RECONNECTED as error:
                now = time.monotonic()
                if now - attempt > RETRY_SECONDS and not isinstance(error, httpx.ConnectError):
                    reached = now  # it was quiet, not away
                if now - reached > RECONNECT_SECONDS:
                    raise _unreachable(error) from error
                on_break()
                time.sleep(RETRY_SECONDS)

    def _events_of_one_connection(self, job_id: str, headers: dict[str, str]) -> Iterator[httpx_sse.ServerSentEvent]:
        path = f"{job_path(job_id)}/events"
        with (
            self._errors(*RECONNECTED),
            httpx_sse.connect_sse(self._http, "GET", path, headers=dict(headers)) as source,
        ):
            if source.response.is_error:
                source.response.read()
            check(source.response)
            yield from source.iter_sse()

    @contextmanager
    def _errors(self, *passed: type[Exception]) -> Iterator[None]:
        """Turn httpx's errors into this package's, except for the types in ``passed``."""
        try:
            yield
        except passed:
            raise
        except (
            httpx.InvalidURL,
            UnicodeError,
            OverflowError,
        ) as error:  # the last two come from looking up a host and a port
            raise ConfigError(f"--url: got {self._url!r} ({error}), expected http://HOST:PORT") from error
        except httpx.HTTPError as error:
            raise _unreachable(error) from error


def job_path(job_id: str) -> str:
    """The route of a job; its id is quoted, since a user typed it."""
    return f"/train/jobs/{quote(os.fsencode(job_id), safe='')}"


def check(answer: httpx.Response) -> None:
    """Raise RefusedError, with the server's message and the field that it names, if the answer is an error."""
    if not answer.is_error:
        return
    try:
        details = answer.json()["error"]
        message, field = details["message"], details.get("field")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        message, field = answer.text[:300], None
    raise RefusedError(f"{answer.status_code}: {message}", field)


def _unreachable(error: httpx.HTTPError) -> UnreachableError:
    reason = str(error) or type(error).__name__
    return UnreachableError(f"no coordinator answers ({reason}); is the trainer running? See --url")
