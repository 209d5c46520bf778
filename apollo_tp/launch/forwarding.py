"""How the plugin of each server reaches the coordinator, which listens in the folder of the first one's server."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
from pathlib import Path

import msgspec

from apollo_tp.config import ServiceConfig
from apollo_tp.errors import ConfigError
from apollo_tp.launch.hosts import Hosts
from apollo_tp.runtime import instance_folder, private_files, processes
from apollo_tp.wire.tunnel import CoordinatorAddress

CLIENT = "replicas"
"""The name of the key by which plugins on other hosts connect."""

log = logging.getLogger("apollo_tp")


def reach_coordinator(
    folder: Path,
    first: str,
    hosts: Hosts,
    service: ServiceConfig,
    stack: contextlib.ExitStack,
    *,
    has_port: bool = True,
) -> None:
    """Let the server of ``folder`` forward requests to the coordinator, which listens in the folder of the server ``first``,
    beside rank 0, until ``stack`` ends. What a killed trainer left there is replaced, or removed. ``has_port``: whether an
    API server with our routes is in front of that server.

    Raises ConfigError if the coordinator is on another host and what ``service.zmq`` says of it cannot be used.
    """
    link = instance_folder.socket_path(folder, instance_folder.COORDINATOR_SOCKET)
    remote = folder / instance_folder.TCP_FILE
    remote.unlink(missing_ok=True)
    if link.is_symlink():
        link.unlink()
    if processes.machine() != hosts.machines[0]:
        link.unlink(missing_ok=True)
        if not has_port:
            return
        if service.zmq.port is None:
            log.warning(
                "server %s: the training routes on its port answer 503, since the coordinator is on host %s and "
                "service.zmq.port is not set; see docs/how-to/hosts.md", folder.name, hosts.names[0],
            )  # fmt: skip
            return
        private_files.write_private(remote, msgspec.json.encode(_address(service, hosts.names[0])))
        stack.callback(remote.unlink, missing_ok=True)
    elif folder.name != first:
        link.unlink(missing_ok=True)
        link.symlink_to(instance_folder.socket_path(folder.parent / first, instance_folder.COORDINATOR_SOCKET))
        stack.callback(link.unlink, missing_ok=True)


def switch_captures(folder: Path, stack: contextlib.ExitStack, *, on: bool) -> None:
    """Let the plugin of the server of ``folder`` record completions whose clients ask for it, until ``stack`` ends."""
    switch = folder / instance_folder.CAPTURE_FILE
    switch.unlink(missing_ok=True)  # what a killed trainer left
    if on:
        private_files.write_private(switch, b"{}")
        stack.callback(switch.unlink, missing_ok=True)


def _address(service: ServiceConfig, host: str) -> CoordinatorAddress:
    """Address and keys for a plugin on another host than ``host``, where the coordinator is."""
    import zmq.auth

    zmq_host, port = service.zmq.host, service.zmq.port
    if _is_wildcard(zmq_host):
        zmq_host = os.environ.get("MASTER_ADDR", host)
    elif zmq_host == "localhost" or zmq_host.startswith("127.") or zmq_host == "::1" or not port:
        raise ConfigError(
            f"service.zmq.host and port: got {zmq_host} and {port}, expected an address of host {host} that other hosts "
            "reach, and a port that is not 0, since servers there forward requests to it; set both, and a token"
        )
    keys = Path(service.zmq.keys_dir or "")
    secret, server = keys / "clients" / f"{CLIENT}.key_secret", keys / "server.key"
    try:
        server_public, _ = zmq.auth.load_certificate(server)
        public, own = zmq.auth.load_certificate(secret)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"service.zmq.keys_dir: got {service.zmq.keys_dir!r} ({error}), expected a folder with {server.name} and "
            f"clients/{secret.name} on this host too; make them with `apollo-tp keys DIR --client {CLIENT}`, and copy DIR "
            "to all hosts"
        ) from None
    assert own is not None
    return CoordinatorAddress(f"tcp://{zmq_host}:{port}", server_public.decode(), public.decode(), own.decode())


def _is_wildcard(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_unspecified
    return host == "*"
