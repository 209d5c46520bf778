"""What vLLM does with the endpoint plugin, in this process: a real FastAPI app under uvicorn."""

from __future__ import annotations

import socket
import threading

import uvicorn
from fastapi import FastAPI

from apollo_tp.coordinator.__main__ import bind_http
from apollo_tp.vllm_plugin.endpoints import ApolloEndpoints


class PluginServer:
    def __init__(self, root_path="", uds=None):
        app = FastAPI()
        app.root_path = root_path
        app.get("/ping")(lambda: {"ok": True})
        self.plugin = ApolloEndpoints()
        self.plugin.attach_router(app)
        if uds is None:
            self.socket = bind_http("127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.bind(str(uds))
            self.socket.listen()
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()

    def close(self):
        self.server.should_exit = True
        self.thread.join(10)
