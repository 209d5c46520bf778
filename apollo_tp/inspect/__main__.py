"""``python -m apollo_tp.inspect``: where each checkpoint tensor lives on each rank of a live server, and what is refused.

Without a trainer and without torch. With a Hugging Face folder (a config.json is enough) as MODEL the answer comes without a
server, from vLLM's own model class and loader, built for one rank after the other in this process; with ``--try`` a small
random copy of its config is also trained both ways, so that one learns before serving whether it would be exact.
"""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from apollo_tp.errors import ApolloTpError, ConfigError, UnsupportedModelError
from apollo_tp.inspect.verdict import REFUSED, TRAINED, table, verdicts
from apollo_tp.runtime import instance_folder
from apollo_tp.shards.instance import wait_for_server
from apollo_tp.shards.manifest import Manifest

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command(help=__doc__)
def inspect(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A Hugging Face folder, to answer without a server.")
    ] = None,
    tp: Annotated[int, typer.Option(help="Tensor-parallel size for MODEL.")] = 2,
    instance: Annotated[str | None, typer.Option(help="Id of the server; default: the only live one.")] = None,
    runtime_dir: Annotated[
        Path | None, typer.Option(help="Folder of manifests; default: as the trainer finds it.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that is in the folder MODEL.")
    ] = False,
    wait: Annotated[float, typer.Option(help="Seconds to wait for a server.")] = 0.0,
    try_it: Annotated[
        bool,
        typer.Option("--try", help="Compare a small random copy of MODEL's config with transformers, on --tp ranks."),
    ] = False,
) -> None:
    """Print the layout; exits with status 1 if something cannot be trained, or a copy that was tried is not exact."""
    try:
        if not math.isfinite(wait):
            raise ConfigError(f"--wait: got {wait}, expected a number of seconds")
        if try_it and model is None:
            raise ConfigError("--try: got no MODEL, expected a Hugging Face folder: a config.json is enough")
        if model is None:
            base = instance_folder.base_dir(str(runtime_dir) if runtime_dir else None)
            manifests = wait_for_server(base, instance, wait, ready=False)
        else:
            manifests = _manifests_of_folder(model, tp, trust_remote_code)
        console = Console(width=None if sys.stdout and sys.stdout.isatty() else 200, markup=False, emoji=False)
        console.print(_summary(manifests))
        console.print(layout_table(manifests))
        status = _print_verdict(manifests, console)
        if try_it and model is not None:
            status = max(status, _try(model, tp, trust_remote_code, console))
        raise typer.Exit(status)
    except (ApolloTpError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        print(f"apollo_tp.inspect: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        typer.main.get_command(app).main(args=arguments, prog_name="python -m apollo_tp.inspect")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _manifests_of_folder(model: str, tp_size: int, trust_remote_code: bool) -> list[Manifest]:
    if tp_size < 1:
        raise ConfigError(f"--tp: got {tp_size}, expected an integer >= 1")
    folder = Path(model)
    if (folder.is_absolute() or folder.exists()) and not (folder / "config.json").is_file():
        raise ConfigError(f"MODEL: got {folder}, expected a Hugging Face folder, with a config.json")
    from apollo_tp.vllm_plugin.offline import offline_manifests  # vLLM, which a live server's layout does not need

    try:
        manifests = offline_manifests(model, tp_size, trust_remote_code=trust_remote_code)
    except ApolloTpError:
        raise
    except Exception as error:  # whatever vLLM and transformers raise over a config that neither foresaw
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ConfigError(
                f"--trust-remote-code: got no such option and {model}, whose config.json names Python code of its own "
                "(auto_map), expected it for such a model; that code is then run, so read it first"
            ) from error
        # pydantic's message has its own words around vLLM's
        reason = " ".join(str(error).split()).partition(" [type=")[0].rpartition("Value error, ")[2]
        if not isinstance(error, OSError | ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise UnsupportedModelError(
            f"{model} at --tp {tp_size}: got {reason!r} from vLLM, expected a folder and a size that it can serve"
        ) from error
    if manifests[0].error:
        raise UnsupportedModelError(f"{model}: {manifests[0].error}")
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
            f"[{part}]",
            segment.served,
            f"{segment.view_offset}, {tuple(segment.view_stride)}",
        )
    return table


def _try(model: str, tp_size: int, trust_remote_code: bool, console: Console) -> int:
    from apollo_tp.inspect.copy_trial import EXACT, try_copy  # torch and vLLM

    trial = try_copy(model, tp_size, trust_remote_code=trust_remote_code)
    if trial.refusal:
        console.print(f"tried, refused: {trial.refusal}")
    else:
        verdict = "exact" if trial.exact else "NOT EXACT, do not train it"
        console.print(
            f"tried at TP {tp_size} on a small random copy in fp32: {verdict}. The largest error of loss, gradients "
            f"(relative) and log-probabilities (nats) is {trial.worst:.1e} in {trial.where}; exact is at most {EXACT:.0e}"
        )
    return 0 if trial.exact else 1


def _print_verdict(manifests: list[Manifest], console: Console) -> int:
    rows = verdicts(manifests)
    console.print(table(rows))
    refused = [(name, rule) for name, verdict, rule in rows if verdict == REFUSED]
    for name, rule in refused:
        console.print(f"refused: {name}: {rule}")
    if not refused:
        trained = sum(verdict == TRAINED for _, verdict, _ in rows)
        console.print(f"all {trained} checkpoint tensors that are served can be trained in place")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
