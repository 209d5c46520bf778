"""``python -m apollo_tp.inspect``: where each checkpoint tensor lives on each rank of a live server, and what is refused.

Without a trainer and without torch. With a Hugging Face folder (a config.json is enough) as MODEL the answer comes without a
server, from vLLM's own model class and loader, built for one rank after the other in this process.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from apollo_tp.errors import ApolloTpError, ConfigError, UnsupportedModelError
from apollo_tp.runtime import instance_folder
from apollo_tp.shards.instance import wait_for_server
from apollo_tp.shards.manifest import Manifest
from apollo_tp.shards.placement import place, second_copies


def main(arguments: list[str] | None = None) -> int:
    """Print the layout; returns 1 if something cannot be trained."""
    parser = argparse.ArgumentParser(prog="python -m apollo_tp.inspect", description=__doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a Hugging Face folder, to answer without a server")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel size for MODEL")
    parser.add_argument("--instance", help="id of the server; default: the only live one")
    parser.add_argument("--runtime-dir", type=Path, help="folder of manifests; default: as the trainer finds it")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a server")
    options = parser.parse_args(arguments)
    try:
        manifests = _of_folder(options) if options.model else _of_server(options)
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(_summary(manifests))
        console.print(layout_table(manifests))
        return _print_verdict(manifests, console)
    except ApolloTpError as error:
        print(f"apollo_tp.inspect: {error}", file=sys.stderr)
        return 1


def _of_server(options: argparse.Namespace) -> list[Manifest]:
    base = instance_folder.base_dir(str(options.runtime_dir) if options.runtime_dir else None)
    return wait_for_server(base, options.instance, options.wait, ready=False)


def _of_folder(options: argparse.Namespace) -> list[Manifest]:
    if options.tp < 1:
        raise ConfigError(f"--tp: got {options.tp}, expected an integer >= 1")
    folder = Path(options.model)
    if (folder.is_absolute() or folder.exists()) and not (folder / "config.json").is_file():
        raise ConfigError(f"MODEL: got {folder}, expected a Hugging Face folder, with a config.json")
    from apollo_tp.vllm_plugin.offline import offline_manifests  # vLLM, which a live server's layout does not need

    try:
        manifests = offline_manifests(options.model, options.tp)
    except (OSError, ValueError) as error:  # pydantic's among them, with its own words around vLLM's
        reason = " ".join(str(error).split()).partition(" [type=")[0].rpartition("Value error, ")[2]
        raise UnsupportedModelError(
            f"{options.model} at --tp {options.tp}: got {reason!r} from vLLM, expected a folder and a size that it can serve"
        ) from error
    if manifests[0].error:
        raise UnsupportedModelError(f"{options.model}: {manifests[0].error}")
    return manifests


def _summary(manifests: list[Manifest]) -> str:
    first = manifests[0]
    size = sum(a.num_bytes for m in manifests for a in m.allocations)
    return (
        f"server {first.instance_id}: {first.model_path} ({first.dtype}), vLLM {first.vllm_version}, TP {first.tp_size} on "
        f"{first.device}, {size / 1e9:.3g} GB mapped, traced in {max(m.trace_seconds for m in manifests):.3f} s"
    )


def layout_table(manifests: list[Manifest]) -> Table:
    """One row per checkpoint tensor, rank and part."""
    table = Table(
        "checkpoint tensor", "global shape", "rank", "part [start:stop]", "served tensor", "view offset, stride"
    )
    shapes = {t.name: t.shape for t in manifests[0].checkpoint}
    order = {name: i for i, name in enumerate(shapes)}
    rows = sorted(((s, m.tp_rank) for m in manifests for s in m.segments), key=lambda r: (order[r[0].checkpoint], r[1]))
    for segment, rank in rows:
        box = zip(segment.box_offset, segment.box_shape, strict=True)
        part = ", ".join(f"{start}:{start + length}" for start, length in box)
        table.add_row(
            segment.checkpoint,
            "x".join(map(str, shapes[segment.checkpoint])),
            str(rank),
            f"\\[{part}]",
            segment.served,
            f"{segment.view_offset}, {tuple(segment.view_stride)}",
        )
    return table


def _print_verdict(manifests: list[Manifest], console: Console) -> int:
    copies = second_copies(manifests)
    for copy, original in copies.items():
        console.print(f"second copy, written into checkpoints with the trained values: {copy} of {original}")
    not_served = [
        name for name in manifests[0].not_served if name not in copies and all(name in m.not_served for m in manifests)
    ]
    if not_served:
        console.print(f"not held by the server, carried over into checkpoints: {', '.join(not_served)}")
    try:
        placements = place(manifests)
    except ApolloTpError as error:
        console.print(f"[red]refused:[/red] {error}")
        return 1
    console.print(f"all {len(placements[0])} checkpoint tensors that are served can be trained in place")
    return 0


if __name__ == "__main__":
    sys.exit(main())
