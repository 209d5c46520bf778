"""HTTP clients of OpenAI-compatible APIs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from apollo_tp.errors import DECODE_ERRORS, ApolloTpError, ConfigError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
CONNECT_SECONDS = 5.0
ATTEMPTS = 4
RETRY_SECONDS = 0.5
"""Before the second attempt; twice as long before each further one."""


class NoAnswerError(ApolloTpError):
    """An API did not answer as expected; the message says what was got."""


def api_client(url: str, key_file: str | None, seconds: float) -> httpx.AsyncClient:
    """A client whose requests have ``seconds`` each; its paths are relative to ``url``. Raises ConfigError if the file with
    the key cannot be read."""
    import httpx  # costs a tenth of a second of start-up

    headers = {}
    if key_file is not None:
        try:
            headers["Authorization"] = f"Bearer {Path(key_file).read_text().strip()}"
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{key_file}: got {error}, expected a file with an API key") from error
    timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(
        base_url=url.rstrip("/") + "/", headers=headers, timeout=timeout, limits=limits, trust_env=False
    )


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any], kind: type[T]) -> T:
    """The answer to a POST as ``kind``, after some attempts if the server cannot be reached or is busy. The client has the
    deadline of each. Raises NoAnswerError."""
    import httpx

    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            await asyncio.sleep(RETRY_SECONDS * 2**attempt)
        try:
            answer = await client.post(path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            problem = f"{type(error).__name__} {error}".strip()
            continue
        if answer.status_code == 429 or answer.status_code >= 500:
            problem = f"status {answer.status_code}: {answer.text[:200]}"
            continue
        if answer.is_error:
            raise NoAnswerError(f"got status {answer.status_code}: {answer.text[:300]}")
        try:
            return msgspec.json.decode(answer.content, type=kind)
        except DECODE_ERRORS as error:
            raise NoAnswerError(f"got an answer of another form ({error})") from error
    raise NoAnswerError(f"got {problem} {ATTEMPTS} times, expected an answer")
