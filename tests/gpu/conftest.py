"""Tests on real GPUs with real vLLM: skipped, with the reason, where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.demo_model import make_model, standard_library_text
from tests.support.processes import free_port, start_server
from tests.support.servers import SERVER_ARGS, START_SECONDS, Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" not in str(item.path):
            continue
        needed = 2 if item.get_closest_marker("multigpu") else 1
        if torch.cuda.device_count() < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPUs, found {torch.cuda.device_count()}"))


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.multigpu)], ids=["TP1", "TP2"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A small Qwen3 in bf16 under torch.compile and CUDA graphs; 0.3 of each GPU's memory is vLLM's."""
    folder = tmp_path_factory.mktemp("gpu")
    runtime_dir = tmp_path_factory.mktemp("rt")
    runtime_dir.chmod(0o700)
    make_model(folder / "model", standard_library_text(1000, 30), vocab_size=1003, num_layers=2)
    port = free_port()
    process = start_server(
        folder / "model", port, runtime_dir, folder / "server.log", tensor_parallel=request.param, extra=SERVER_ARGS
    )
    try:
        process.wait_for(f"http://127.0.0.1:{port}/health", START_SECONDS)
        yield Server(f"http://127.0.0.1:{port}", folder / "model", runtime_dir, "demo", process)
    finally:
        process.stop()
