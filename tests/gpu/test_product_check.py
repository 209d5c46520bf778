"""Matrix products where MPS grants a part of the multiprocessors: cuBLAS may err, and the start-up check must see it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from apollo_tp.gpu_sharing.product_check import check_products

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

MPS_SCRIPT = Path(__file__).parents[2] / "launch" / "mps.sh"
SHAPES = ((4096, 2048), (3072, 4096))
COMPARE = """
import json, sys, torch
from apollo_tp.gpu_sharing.product_check import sampled_lengths, wrong_products
device, accused, wrong, total = torch.device("cuda", 0), 0, 0, 0
lengths, random = sampled_lengths(4096), torch.Generator().manual_seed(1)
for rows, columns in json.loads(sys.argv[1]):
    accused += len(list(wrong_products(rows, columns, torch.bfloat16, lengths, device)))
    sizes = (lengths[-1], columns), (lengths[-1], rows), (rows, columns)
    inputs, grads, weight = (torch.randn(size, generator=random).bfloat16() for size in sizes)
    for x, grad in ((inputs[:n], grads[:n]) for n in lengths):
        for a, b in ((x, weight.T), (grad, weight), (grad.T, x)):
            here, there = a.to(device), b.to(device)
            product = torch.full((len(a), b.shape[1]), torch.nan, dtype=a.dtype, device=device)
            expected = a[::37].float() @ b.float()
            torch.mm(here, there, out=product)
            for found in (product[::37].cpu().float(), product.fill_(1.0).addmm_(here, there)[::37].cpu().float() - 1):
                wrong += not ((found - expected).norm() <= 0.01 * expected.norm())
                total += 1
print(json.dumps([torch.cuda.get_device_properties(0).multi_processor_count, accused, wrong, total]))
"""
"""Every 37th row of each product, and of each added to ones, is compared, which any tile has some of."""


def test_a_whole_gpu_multiplies_right() -> None:
    """In this process, which no MPS daemon limits: the shapes of an 8B model's layers and of its head."""
    layers = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096)]
    check_products([torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in layers], 4096, 0)


@pytest.fixture(scope="module")
def mps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A private daemon; gives the environment of its clients."""
    folder = tmp_path_factory.mktemp("mps")
    environment = os.environ | {f"CUDA_MPS_{name.upper()}_DIRECTORY": str(folder / name) for name in ("pipe", "log")}
    subprocess.run([MPS_SCRIPT, "start"], env=environment, check=True, stdout=subprocess.DEVNULL, timeout=60)
    try:
        yield environment
    finally:
        subprocess.run([MPS_SCRIPT, "stop"], env=environment, check=True, timeout=90)


@pytest.mark.skipif(not shutil.which("nvidia-cuda-mps-control"), reason="no nvidia-cuda-mps-control on PATH")
@pytest.mark.parametrize("percent", [100, 75, 60, 50, 25])
def test_the_check_accuses_the_share_that_multiplies_wrong_and_no_other(mps: dict[str, str], percent: int) -> None:
    """Beside products on the CPU, of the same shapes and lengths."""
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, json.dumps(SHAPES)],
        env=mps | {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percent)},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    multiprocessors, accused, wrong, total = json.loads(done.stdout.splitlines()[-1])
    print(f"{percent} %: {multiprocessors} multiprocessors, {wrong} of {total} products wrong, {accused} accused")
    assert bool(accused) == bool(wrong)
