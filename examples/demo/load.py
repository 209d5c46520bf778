"""A client that keeps generating while the model is trained, and counts what it saw."""

from __future__ import annotations

import json
import threading
import time

import httpx

PAUSE_SECONDS = 5.0
"""No token for this long inside a running stream counts as a pause: far above a decode step on a shared CPU."""
THINK_SECONDS = 0.5


class GenerationLoad:
    """Streams completions one after the other, with a short pause between, in a thread until ``stop``."""

    def __init__(self, url: str, prompt: str) -> None:
        self.ok = self.failed = self.pauses = self.num_tokens = 0
        self.longest_gap_seconds = 0.0
        self.first_error = ""
        self._url, self._prompt = url, prompt
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="generation-load", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let the running request finish, and end."""
        self._stop.set()
        self._thread.join(120)

    def _run(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._stop.wait(THINK_SECONDS):
                try:
                    self._one(client)
                    self.ok += 1
                except (httpx.HTTPError, KeyError, json.JSONDecodeError) as error:
                    self.failed += 1
                    self.first_error = self.first_error or repr(error)

    def _one(self, client: httpx.Client) -> None:
        body = {"model": "demo", "prompt": self._prompt, "max_tokens": 16, "stream": True, "ignore_eos": True}
        last = None
        with client.stream("POST", f"{self._url}/v1/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                json.loads(line[6:])["choices"]
                now = time.monotonic()
                if last is not None:
                    self.longest_gap_seconds = max(self.longest_gap_seconds, now - last)
                    self.pauses += now - last > PAUSE_SECONDS
                last = now
                self.num_tokens += 1
