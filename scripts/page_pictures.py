"""The pictures of the page in docs/, from a real run: ``python -m scripts.page_pictures`` (Chromium, selenium; 4 minutes).

SmolLM2-135M-Instruct on vLLM answers a client, is asked on the page, learns who it is, and is asked again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from selenium import webdriver

from examples.demo.chat import CONVERSATIONS, OPTIONS, ranks
from examples.demo.common import console, post
from examples.demo.load import GenerationLoad
from examples.demo.smollm2 import default_cache, fetch
from tests.support.processes import coordinator_url, free_port, start_server, start_trainer

DOCS = Path(__file__).parents[1] / "docs"
WIDE, NARROW = (1180, 1500), (390, 1500)
IDLE_SECONDS = 20.0
NUM_STEPS, NUM_HELDOUT = 24, 4
PICTURED_SHARE = 0.8
WAIT_SECONDS = 400.0


def main() -> None:
    """Write docs/page.png and docs/page-narrow.png."""
    # a signal ends what was started: the exception runs the finally clauses
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(f"got {signal.Signals(number).name}"))
    model, port = fetch(default_cache()), free_port()
    num_ranks, _ = ranks([])
    threads = [] if torch.cuda.is_available() else [f"train.threads={max(1, (os.cpu_count() or 1) // num_ranks)}"]
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    url, trainer = f"http://127.0.0.1:{port}", None
    with tempfile.TemporaryDirectory(prefix="apollo_tp-") as runtime, tempfile.TemporaryDirectory() as folder:
        out, runtime_dir = Path(folder), Path(runtime)
        extra = ["--dtype", dtype, "--served-model-name", "SmolLM2-135M-Instruct", "demo"]
        server = start_server(model, port, runtime_dir, out / "server.log", tensor_parallel=num_ranks, extra=extra)
        try:
            server.wait_for(f"{url}/health", 300.0)
            options = [*OPTIONS, *threads, f"service.server_url={url}"]
            trainer = start_trainer(runtime_dir, out, out / "trainer.log", num_ranks=num_ranks, overrides=options)
            service, load = coordinator_url(runtime_dir, trainer), GenerationLoad(url, "Once upon a time")
            _take(url, service)
            load.stop()
        finally:
            for process in (trainer, server):
                if process:
                    process.stop()


def _take(url: str, service: str) -> None:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    driver_path = shutil.which("chromedriver")  # selenium would look for one on the internet
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path)) as driver:
        _size(driver, *WIDE)
        driver.get(f"{url}/train/page/")
        _until(lambda: driver.find_element("id", "question").is_displayed())
        driver.find_element("id", "question").send_keys("Who are you?\n")
        _until(lambda: driver.find_element("id", "answers").text)
        time.sleep(IDLE_SECONDS)  # latency without training
        samples = [json.loads(line) for line in CONVERSATIONS.read_text().splitlines()]
        body = {
            "batch_size": 8,
            "epochs": NUM_STEPS,
            "max_steps": NUM_STEPS,
            "seed": 0,
            "metadata": {"name": CONVERSATIONS.name},
        }
        post(f"{service}/train", body | {"samples": samples[NUM_HELDOUT:], "validation": samples[:NUM_HELDOUT]})
        _until(lambda: driver.execute_script("return document.getElementById('bar').value") >= PICTURED_SHARE)
        _picture(driver, "page.png")
        driver.find_element("css selector", "#answers button").click()
        _until(lambda: len(driver.find_elements("css selector", "#answers dd")) > 1)
        _until(lambda: driver.title.startswith("idle"))
        _size(driver, *NARROW)
        time.sleep(2)
        _picture(driver, "page-narrow.png")
        console.print(driver.find_element("id", "answers").text, markup=False)


def _size(driver: Any, width: int, height: int) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def _picture(driver: Any, name: str) -> None:
    driver.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
    time.sleep(1)
    driver.save_screenshot(str(DOCS / name))
    console.print(f"{DOCS / name}: {driver.title}")


def _until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("the page did not show in time what a picture is taken of")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
