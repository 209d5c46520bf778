"""A fake of the server that a reinforcement job asks for completions. It answers what a test says, and can fail."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def alternating(prompt: list[int], index: int) -> str:
    """Half of the completions are right."""
    return "yes" if index % 2 else "no"


class FakeServer:
    """``text(prompt, index)`` is the completion ``index`` of a prompt (token ids); each has two tokens. ``judged`` is the
    content of every chat completion. While ``hold`` is set, nothing is answered; ``status`` is that of every answer."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.text: Callable[[list[int], int], str] = alternating
        self.judged, self.status, self.url = '{"result": 0.5}', 200, ""
        self.free = threading.Event()
        self.free.set()

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body | {"path": path})
        if path.endswith("/chat/completions"):
            return {"choices": [{"message": {"content": self.judged}}], "usage": {"total_tokens": 7}}
        return {"choices": [self._choice(body["prompt"], index) for index in range(body["n"])]}

    def _choice(self, prompt: list[int], index: int) -> dict[str, Any]:
        text = self.text(prompt, index)
        return {"text": text, "token_ids": [3 + index, 4], "logprobs": {"token_logprobs": [-0.5, -1.0]}}


@contextlib.contextmanager
def fake_server() -> Iterator[FakeServer]:
    """A FakeServer that listens at its ``url``."""
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.dumps(fake.answer(self.path, body)).encode()
            fake.free.wait(30)
            with contextlib.suppress(ConnectionError):
                self.send_response(fake.status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield fake
    finally:
        fake.free.set()
        server.shutdown()
        server.server_close()
