"""The manifest of one rank: from vLLM's loaded model, its memory and the traces of its loader. Used by a server's workers
(``export``) and without a server (``offline``)."""

from __future__ import annotations

import bisect
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apollo_tp.runtime import processes
from apollo_tp.shards.instance import CLAIMED_VARIABLE, ENDPOINTS_VARIABLE, engine_id
from apollo_tp.shards.manifest import (
    SCHEMA_VERSION,
    Allocation,
    CheckpointTensor,
    Manifest,
    Refusal,
    SegmentRecord,
    ServedTensor,
    ServerProcess,
)
from apollo_tp.shards.mapping import DTYPES, NAMES
from apollo_tp.vllm_plugin import checkpoint_index
from apollo_tp.vllm_plugin.compat import config, release
from apollo_tp.vllm_plugin.copies import second_copies
from apollo_tp.vllm_plugin.trace import Trace, trace_loader
from apollo_tp.vllm_plugin.views import held_tensors, without_views

Share = Callable[[Sequence[Tensor], Iterable[Tensor]], list[tuple[int, Allocation]]]
"""Makes the memory of parameters reachable: (base address in bytes, allocation), ascending by address. The second argument
are all tensors of the model, of which views of parameters stay views."""


def manifest_header(vllm_config: Any, rank: int, size: int) -> dict[str, Any]:
    """The fields of a manifest that are known before the weights are looked at."""
    model_config = vllm_config.model_config
    process = processes.ProcessId.of(os.getpid())
    assert process is not None
    is_cuda = torch.device(vllm_config.device_config.device).type == "cuda"
    folder = checkpoint_index.model_folder(
        model_config.model, model_config.revision, vllm_config.load_config.download_dir
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "instance_id": engine_id(config.engine_index(vllm_config)),
        "created_at": time.time(),
        "vllm_version": release.vllm_version(),
        "model_path": str(folder or model_config.model),
        "endpoints": bool(os.environ.get(ENDPOINTS_VARIABLE)),
        "served_model_names": config.served_model_names(model_config),
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "tp_rank": rank,
        "tp_size": size,
        "num_nodes": config.num_nodes(vllm_config),
        "host": socket.gethostname(),
        "boot_id": processes.boot_id(),
        "pid": process.pid,
        "pid_start_ticks": process.start_ticks,
        "pid_namespace": processes.pid_namespace(),
        "parents": _parents(bool(os.environ.get(ENDPOINTS_VARIABLE))),
        "device": "cuda" if is_cuda else "cpu",
        "device_uuid": str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid) if is_cuda else "",
        "max_model_len": model_config.max_model_len,
        "config_overrides": config.config_overrides(model_config),
    }


def _parents(endpoints: bool) -> list[ServerProcess]:
    """The processes above this worker, up to the one that claimed the server's instance id, which vLLM started first."""
    above = processes.ancestors(os.getpid(), int(os.environ.get(CLAIMED_VARIABLE) or 0))
    roles = ["EngineCore"] * (len(above) - 1) + ["API server" if endpoints else "main process"]
    return [
        ServerProcess(role=role, pid=process.pid, start_ticks=process.start_ticks)
        for role, process in zip(roles, above, strict=False)
    ]


def checkpoint_tensors(vllm_config: Any, header: dict[str, Any]) -> list[CheckpointTensor]:
    """The tensors of the checkpoint that vLLM loads (global shapes); with ``--load-format dummy`` those that the config
    implies. Raises RuntimeError if the folder has no safetensors."""
    model_config, load_format = vllm_config.model_config, config.load_format(vllm_config)
    folder = Path(header["model_path"])
    found = checkpoint_index.read_index(folder, load_format) if folder.is_dir() else []
    if found:
        return found
    if load_format != "dummy":
        raise RuntimeError(
            f"{model_config.model}: got no *.safetensors, expected a safetensors checkpoint; convert it with "
            "model.save_pretrained(folder)"
        )
    return checkpoint_index.index_from_config(
        model_config.hf_config, NAMES[model_config.dtype], trust_remote_code=bool(model_config.trust_remote_code)
    )


def trace_checkpoint(model: nn.Module, checkpoint: list[CheckpointTensor]) -> list[Trace]:
    """Trace vLLM's loader for each of these tensors."""
    return trace_loader(model, [(t.name, tuple(t.shape), DTYPES[t.dtype]) for t in checkpoint])


def build_manifest(
    header: dict[str, Any],
    model: nn.Module,
    model_config: Any,
    checkpoint: list[CheckpointTensor],
    share: Share,
    error: str = "",
) -> Manifest:
    """Share the memory of ``model``, trace its loader, and describe both (local shapes).

    ``header`` comes from ``manifest_header``, ``checkpoint`` from ``checkpoint_tensors``. No collectives. Raises whatever
    ``share`` raises.
    """
    started = time.perf_counter()
    own, own_names = _unique_parameters(model)
    buffers = _loaded_buffers(model, checkpoint)
    parameters, names = [*own, *buffers.values()], [*own_names, *([name] for name in buffers)]
    held = (tensor for module in model.modules() for _, tensor in held_tensors(module))
    allocations = share(parameters, held)
    served = _served_tensors(parameters, names, allocations)
    shared = time.perf_counter()
    traces = trace_checkpoint(model, checkpoint)
    traced = time.perf_counter()
    segments, refusals = segments_of(traces, parameters, served)
    reached = {segment.served for segment in segments}
    served = [tensor for tensor in served if tensor.name not in buffers or tensor.name in reached]
    not_served = [t.name for t in traces if not t.served and not t.refusal]
    copies: dict[str, str] = {}
    if header["tp_rank"] == 0:
        ids = config.embedding_parameters(model)
        holders = [tensor for parameter, tensor in zip(own, served[: len(own)], strict=True) if id(parameter) in ids]
        embeddings = {s.checkpoint for s in segments if s.served in {tensor.name for tensor in holders}}
        tied = config.ties_embeddings(model_config) or any(tensor.aliases for tensor in holders)
        copies, unclear = second_copies(Path(header["model_path"]), checkpoint, not_served, embeddings, tied=tied)
        refusals += unclear
    overrides = header["config_overrides"] | config.window_overrides(model, model_config)
    return Manifest(
        **header | {"config_overrides": overrides},
        publish_seconds=shared - started,
        trace_seconds=traced - shared,
        allocations=[allocation for _, allocation in allocations],
        served=served,
        checkpoint=checkpoint,
        segments=segments,
        not_served=not_served,
        copies=copies,
        refusals=refusals,
        error=error,
    )


def _unique_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[list[str]]]:
    """Distinct parameters in order, and all names of each (tied weights have several). Left out are empty ones, which have
    no memory that could be shared, and those that are views of another one (``views``)."""
    names: dict[int, list[str]] = {}
    unique: list[nn.Parameter] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel() and id(parameter) not in names:
            unique.append(parameter)
        names.setdefault(id(parameter), []).append(name)
    unique = without_views(unique)
    return unique, [names[id(parameter)] for parameter in unique]


def _loaded_buffers(model: nn.Module, checkpoint: Sequence[CheckpointTensor]) -> dict[str, Tensor]:
    """Buffers by name that may hold a checkpoint tensor: modules of transformers that vLLM serves keep there what is loaded
    and not trained, such as a router's correction of its choice."""
    stored = {tensor.name.rpartition(".")[2] for tensor in checkpoint}
    return {
        f"{prefix}.{name}": buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.numel() and buffer.is_floating_point()
        if name in stored and name not in module._non_persistent_buffers_set
    }


def _served_tensors(
    parameters: Sequence[Tensor], names: list[list[str]], allocations: list[tuple[int, Allocation]]
) -> list[ServedTensor]:
    """Each parameter (local shape) with the allocation that contains it."""
    bases = [base for base, _ in allocations]
    served = []
    for parameter, its_names in zip(parameters, names, strict=True):
        index = bisect.bisect_right(bases, parameter.data_ptr()) - 1
        served.append(
            ServedTensor(
                name=its_names[0],
                allocation=index,
                offset_bytes=parameter.data_ptr() - bases[index],
                shape=list(parameter.shape),
                stride=list(parameter.stride()),
                dtype=str(parameter.dtype).removeprefix("torch."),
                aliases=its_names[1:],
            )
        )
    return served


def segments_of(
    traces: list[Trace], parameters: Sequence[Tensor], served: list[ServedTensor]
) -> tuple[list[SegmentRecord], list[Refusal]]:
    """Turn recorded copies into segments of served tensors. A tensor with a copy into other memory than that of a parameter
    is refused, with all its copies."""
    order = sorted(range(len(parameters)), key=lambda i: parameters[i].data_ptr())
    starts = [parameters[i].data_ptr() for i in order]
    segments: list[SegmentRecord] = []
    refusals: list[Refusal] = []
    for trace in traces:
        if trace.refusal:
            refusals.append(Refusal(name=trace.name, reason=trace.refusal))
            continue
        found: list[SegmentRecord] = []
        for copy in trace.copies:
            position = bisect.bisect_right(starts, copy.address) - 1
            parameter = parameters[order[position]] if position >= 0 else None
            if parameter is None or copy.address >= parameter.data_ptr() + parameter.nbytes:
                reason = "vLLM's loader copies it into a temporary tensor, not into a parameter"
                refusals.append(Refusal(name=trace.name, reason=reason))
                found = []
                break
            found.append(
                SegmentRecord(
                    checkpoint=trace.name,
                    box_offset=list(copy.box.offset),
                    box_shape=list(copy.box.shape),
                    served=served[order[position]].name,
                    view_offset=(copy.address - parameter.data_ptr()) // parameter.element_size(),
                    view_stride=list(copy.stride),
                )
            )
        segments += found
    return segments, refusals
