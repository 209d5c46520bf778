"""HTTP clients of OpenAI-compatible APIs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from apollo_tp.errors import ConfigError

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 5.0


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
