"""From a loaded server to weights that a trainer can write: trace, publish, map; and what it costs to copy them instead.

    python benchmarks/bench_map.py --out benchmarks/results             # 2 GPUs, 8.19B Qwen3 shape, dummy weights
    python benchmarks/bench_map.py --tp 1                               # 1 GPU
    python benchmarks/bench_map.py --tiny                               # rehearsal on any machine, without the copy

Trace and publish are timed by the server (manifest). Mapping runs in a fresh process per rank, all at once; imports and the
CUDA context are made before its clock starts. The copy is vLLM's own weight transfer (backend "ipc", over HTTP, unpacked)
into the same server: another process holds the whole model on every GPU, as that backend wants it, and the workers copy.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import importlib.util
import json
import os
import pickle
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table
from server_stack import QWEN3_8B, TINY, Served, device_name, serving, write_results

from apollo_tp.shards.instance import check_agreement, read_instance
from apollo_tp.shards.manifest import Manifest
from apollo_tp.shards.mapping import DTYPES, map_rank

TRANSFERS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model for any machine")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--server-args", default="", help="further options of the vLLM server, in one string")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)  # "map FOLDER RANK" or "send FOLDER URL"
    options = parser.parse_args()
    if options.child:
        kind, folder, last = options.child
        print(json.dumps(map_one(Path(folder), int(last)) if kind == "map" else send(Path(folder), last)), flush=True)
        sys.stdin.read()  # contexts that end would change what the others measure
        return 0
    with tempfile.TemporaryDirectory(prefix="apollo_tp-") as name:
        skipped, extra, environment = weight_transfer(Path(name))
        extra += shlex.split(options.server_args)
        config = TINY if options.tiny else QWEN3_8B
        with serving(Path(name), config, tp=options.tp, extra=extra, environment=environment) as served:
            results = measure(served, options.tp, skipped)
    report(results, options)
    return 0


# --- in processes of their own ---------------------------------------------------------------------------------------


def map_one(folder: Path, rank: int) -> dict[str, Any]:
    """Map one rank, and read what it mapped. Bytes are the device's memory (private memory of this process on a CPU)."""
    if torch.cuda.is_available():
        from cuda.bindings import runtime  # noqa: F401 - its import is not part of the mapping

        for device in range(torch.cuda.device_count()):
            torch.zeros(1, device=f"cuda:{device}")
        torch.cuda.synchronize()
    torch.set_num_threads(1)
    torch.zeros(1 << 20).sum()
    print("ready", flush=True)
    sys.stdin.readline()  # until the other ranks have their contexts
    before, start = used_bytes(), time.perf_counter()
    manifests = read_instance(folder)
    check_agreement(manifests)
    read = time.perf_counter()
    mapped = map_rank(manifests, rank)
    done = time.perf_counter()
    for _, local in mapped.tensors.values():  # a copy on access would show
        local[(0,) * local.ndim].item() if local.is_cuda else local.sum().item()
    after = used_bytes()
    return {
        "rank": rank,
        "read_seconds": read - start,
        "map_seconds": done - read,
        "tensors": len(mapped.tensors),
        "mapped_bytes": sum(local.nbytes for _, local in mapped.tensors.values()),
        "memory_change_bytes": [b - a for a, b in zip(before, after, strict=True)],
    }


def used_bytes() -> list[int]:
    """Of every GPU; on a CPU the private memory of this process: what is shared with the server is not in it."""
    if torch.cuda.is_available():
        return [total - free for free, total in map(torch.cuda.mem_get_info, range(torch.cuda.device_count()))]
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return [sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))]


def send(folder: Path, url: str) -> dict[str, Any]:
    """Copy a whole model into the server through vLLM's IPC weight transfer, some times; seconds of each.

    The wire format is the one of vLLM 0.26 to 0.32: handles by GPU UUID, pickled as its HTTP routes demand.
    """
    from torch.multiprocessing.reductions import reduce_tensor

    manifests = read_instance(folder)
    devices = [device_of(m) for m in manifests]
    for device in devices:
        torch.zeros(1, device=device)
    before = used_bytes()
    checkpoint = manifests[0].checkpoint
    copies = [
        [torch.full(t.shape, 0.01, dtype=DTYPES[t.dtype], device=device) for t in checkpoint] for device in devices
    ]
    for device in devices:
        torch.cuda.synchronize(device)
    held = [b - a for a, b in zip(before, used_bytes(), strict=True)]
    print("ready", flush=True)
    sys.stdin.readline()
    seconds, handle_seconds = [], []
    post(url, "init_weight_transfer_engine", {"init_info": {}})
    for _ in range(TRANSFERS):
        start = time.perf_counter()
        handles = [
            {m.device_uuid: reduce_tensor(tensors[i])[1] for m, tensors in zip(manifests, copies, strict=True)}
            for i in range(len(checkpoint))
        ]
        update = {
            "names": [t.name for t in checkpoint],
            "dtype_names": [str(DTYPES[t.dtype]).removeprefix("torch.") for t in checkpoint],
            "shapes": [list(t.shape) for t in checkpoint],
            "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
        }
        handle_seconds.append(time.perf_counter() - start)
        post(url, "start_weight_update", {})
        post(url, "update_weights", {"update_info": update})
        post(url, "finish_weight_update", {})
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "handle_seconds": handle_seconds, "held_bytes": held}


def device_of(manifest: Manifest) -> torch.device:
    wanted = manifest.device_uuid
    index = next(i for i in range(torch.cuda.device_count()) if str(torch.cuda.get_device_properties(i).uuid) == wanted)
    return torch.device("cuda", index)


def post(url: str, route: str, body: dict[str, Any]) -> None:
    answer = httpx.post(f"{url}/{route}", json=body, timeout=300)
    if answer.is_error:
        raise SystemExit(f"/{route}: got {answer.status_code}: {answer.text[:2000]}")


# --- the run ---------------------------------------------------------------------------------------------------------


def weight_transfer(folder: Path) -> tuple[str, list[str], dict[str, str]]:
    """(why vLLM's weight transfer is left out, or ""; server options and environment for it)."""
    if not torch.cuda.is_available():
        return "vLLM's IPC weight transfer needs GPUs", [], {}
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    if importlib.util.find_spec("ray") is None:
        # vLLM 0.26 imports ray with its IPC engine, for another transport than this one
        stand_in = folder / "stand_in"
        stand_in.mkdir()
        (stand_in / "ray.py").write_text("def is_initialized():\n    return False\n")
        environment["PYTHONPATH"] = os.pathsep.join([str(stand_in), *filter(None, [os.environ.get("PYTHONPATH")])])
    tried = subprocess.run(
        [sys.executable, "-c", "import vllm.distributed.weight_transfer.ipc_engine"],
        env=os.environ | environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    if tried.returncode:
        return f"vLLM's IPC weight transfer cannot be imported: {tried.stderr.strip().splitlines()[-1]}", [], {}
    return "", ["--weight-transfer-config", '{"backend": "ipc"}'], environment


def measure(served: Served, tp: int, skipped: str) -> dict[str, Any]:
    folder = served.runtime_dir / "demo"
    manifests = read_instance(folder)
    check_agreement(manifests)
    commands = [["map", str(folder), str(rank)] for rank in range(tp)]
    mapped = [json.loads(text) for text in children(commands)]
    results: dict[str, Any] = {
        "checkpoint_tensors": len(manifests[0].checkpoint),
        "trace_seconds": [m.trace_seconds for m in manifests],
        "publish_seconds": [m.publish_seconds for m in manifests],
        "mapped": mapped,
        "vllm_version": manifests[0].vllm_version,
        "transfer_skipped": skipped,
    }
    if not skipped:
        (text,) = children([["send", str(folder), served.url]])
        results["transfer"] = json.loads(text)
    return results


def children(commands: list[list[str]]) -> list[str]:
    """The result line of each process; all measure at once, when the last is ready, and live until all have measured."""
    with contextlib.ExitStack() as stack:
        started = []
        for command in commands:
            arguments = [sys.executable, __file__, "--child", *command]
            process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(process.kill)
            started.append(process)
        for process in started:
            if line(process) != "ready":
                raise SystemExit(f"{process.args}: not ready")
        for process in started:
            process.stdin.write("\n")
            process.stdin.flush()
        results = [line(process) for process in started]
        for process in started:
            process.communicate(timeout=60)
        return results


def line(process: subprocess.Popen) -> str:
    text = process.stdout.readline().strip()
    if not text:
        raise SystemExit(f"{process.args}: got exit status {process.wait(60)}, expected a line")
    return text


def report(results: dict[str, Any], options: argparse.Namespace) -> None:
    table = Table(
        title=f"bench_map: TP = {options.tp}, {options.tp} x {device_name()}, vLLM {results['vllm_version']}, "
        f"{results['checkpoint_tensors']} checkpoint tensors, {datetime.date.today().isoformat()}"
    )
    for column in ("what", "seconds", "GB mapped or copied", "memory taken, MB"):
        table.add_column(column)
    mapped = results["mapped"]
    table.add_row("trace vLLM's loader, by rank", seconds(results["trace_seconds"]), "", "")
    table.add_row("share memory, index tensors, by rank", seconds(results["publish_seconds"]), "", "")
    table.add_row("read manifests, by rank", seconds([m["read_seconds"] for m in mapped]), "", "")
    table.add_row(
        "map, by rank", seconds([m["map_seconds"] for m in mapped]),
        ", ".join(f"{m['mapped_bytes'] / 1e9:.3g}" for m in mapped) + " mapped",
        ", ".join(f"{max(m['memory_change_bytes'], key=abs) / 1e6:.1f}" for m in mapped),
    )  # fmt: skip
    if "transfer" in results:
        sent = results["transfer"]
        total = sum(m["mapped_bytes"] for m in mapped) / 1e9
        table.add_row(
            f"vLLM's IPC weight transfer, all ranks, {TRANSFERS} times", seconds(sent["seconds"]), f"{total:.3g} copied",
            ", ".join(f"{n / 1e6:.1f}" for n in sent["held_bytes"] if n > 1e6),
        )  # fmt: skip
    Console(width=150).print(table)
    if results["transfer_skipped"]:
        print(f"not compared: {results['transfer_skipped']}")
    write_results(options.out, "map", options.tp, results)


def seconds(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
