"""Work on a share of a GPU's multiprocessors stays there, launched or replayed, and multiplies right."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from apollo_tp.gpu_sharing import sm_limit
from apollo_tp.gpu_sharing.product_check import sampled_lengths, wrong_products

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

PROGRAMS = 8192
"""More than all multiprocessors hold at a time."""


@triton.jit
def _where(out):
    """The number of the multiprocessor of each program."""
    sm = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(out + tl.program_id(0), sm)


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The first GPU; the stream of this thread is put back."""
    stream = torch.cuda.current_stream()
    yield torch.device("cuda", 0)
    torch.cuda.set_stream(stream)


@pytest.mark.parametrize("percent", [25, 60, 100])
def test_kernels_and_replays_run_on_that_many_multiprocessors(device: torch.device, percent: int) -> None:
    out = torch.full((PROGRAMS,), -1, dtype=torch.int32, device=device)
    _where[(PROGRAMS,)](out)
    total = torch.cuda.get_device_properties(device).multi_processor_count
    assert len(set(out.tolist())) == total
    count = sm_limit.limit_sms(device, percent)
    assert count == sm_limit.num_sms(percent, total)
    _where[(PROGRAMS,)](out.fill_(-1))
    mine = set(out.tolist())
    assert len(mine) == count
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    is_limited = stream != torch.cuda.default_stream()
    assert is_limited == (count < total)
    with torch.cuda.graph(graph, stream=stream if is_limited else None):
        _where[(PROGRAMS,)](out)
    out.fill_(-1)
    graph.replay()
    assert set(out.tolist()) == mine


@pytest.mark.parametrize("percent", [25, 50, 60, 75, 90])
def test_products_are_right_there(device: torch.device, percent: int) -> None:
    """At shares of which 60 and 75 are wrong where MPS grants them (test_products)."""
    count = sm_limit.limit_sms(device, percent)
    lengths = sampled_lengths(4096)
    wrong = [line for shape in ((4096, 2048), (3072, 4096), (12288, 4096))
             for line in wrong_products(*shape, torch.bfloat16, lengths, device)]  # fmt: skip
    assert not wrong, f"{count} multiprocessors: {len(wrong)} wrong, {wrong[:3]}"


def test_where_there_is_no_such_share_the_refusal_names_the_cure() -> None:
    """In a process that believes its torch to be built without green contexts."""
    code = """
import json, torch
from torch.cuda import green_contexts
from apollo_tp.gpu_sharing.sm_limit import limit_sms
def none(**_): raise RuntimeError("PyTorch was not built with Green Context support!")
green_contexts.GreenContext.create = none
try: limit_sms(torch.device("cuda", 0), 50)
except Exception as error: print(json.dumps([type(error).__name__, str(error)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    name, text = json.loads(done.stdout)
    assert name == "DeviceError"
    assert "qos.sm_percent=50: got no green context of " in text
    assert "Use qos.pace instead" in text
