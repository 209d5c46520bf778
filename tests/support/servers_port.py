"""vLLM's port in front of a real coordinator, for tests of what is served there."""

import json
from http.server import BaseHTTPRequestHandler

import httpx


class ServersPort(BaseHTTPRequestHandler):
    """vLLM's port: its own health and chat completions; what begins with /train or /check is the coordinator's."""

    def do_GET(self):
        if self.path == "/health":
            return self.reply(200, b"", "text/plain")
        answer = httpx.get(self.server.coordinator + self.path)
        return self.reply(answer.status_code, answer.content, answer.headers["content-type"])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = f"<b>{body['messages'][0]['content']}</b> of {body['model']}"
        answer = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
        self.reply(200, json.dumps(answer).encode(), "application/json")

    def reply(self, status, content, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass
