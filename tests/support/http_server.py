"""An HTTP server in a thread that answers as a test says: for faults that no real server shows on demand."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def vllm_metrics(handler, body):
    """What vLLM's ``/metrics`` says of its clients, for ``served``."""
    lines = ["# TYPE vllm:num_requests_running gauge", 'vllm:num_requests_running{engine="0"} 3']
    for name in ("vllm:inter_token_latency_seconds", "vllm:time_to_first_token_seconds"):
        lines += [f"# TYPE {name} histogram", f'{name}_bucket{{le="+Inf"}} 40', f"{name}_sum 1.5", f"{name}_count 40"]
    return 200, "\n".join([*lines, ""]).encode()


@contextmanager
def served(respond):
    """Yields the URL. ``respond`` takes the handler and the parsed body, and returns the status and the answer.

    The answer is sent as JSON, or as it is if it is bytes. A ``respond`` that returns the status None has answered itself.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, answer = respond(self, json.loads(body or b"null"))
            if status is None:
                return
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST  # noqa: N815 - http.server's name

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
