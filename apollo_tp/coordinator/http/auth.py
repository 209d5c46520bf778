"""Who may call what: bearer tokens with a ``read`` or a ``train`` scope, compared in constant time. Without tokens, only
this machine may: requests also arrive at vLLM's port, which listens on all addresses by default.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import ipaddress
import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from apollo_tp.config import ServiceConfig
from apollo_tp.errors import ConfigError, RequestError, refuse
from apollo_tp.runtime.instance_folder import TOKEN_VARIABLE
from apollo_tp.wire.capture import CAPTURES_PATH

READ, TRAIN = "read", "train"
FORWARDED = (
    "forwarded", "via", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "x-original-host", "x-proxyuser-ip",
    "true-client-ip", "client-ip", "cdn-loop", "do-connecting-ip", "wl-proxy-client-ip", "x-cloud-trace-context",
)  # fmt: skip
FORWARDED_PREFIXES = (
    "x-forwarded", "x-original-forwarded", "x-envoy-", "cf-", "fastly-", "fly-", "x-appengine-", "x-azure-", "x-amz-cf-",
    "x-amzn-", "x-arr-", "x-vercel-", "x-nf-",
)  # fmt: skip
"""What proxies and the networks of cloud providers add to the requests that they pass on."""
BROWSER_PAGES = ("/", "/docs", "/train/page/")
"""Pages without data of their own; the data that they show is asked for by requests of their own."""


class Access:
    """The known tokens, kept as digests. Without tokens this machine may do everything, and others nothing."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._digests = [(scope, hashlib.sha256(token.encode()).digest()) for scope, token in tokens]

    def check(self, method: str, path: str, headers: Mapping[str, str], client: str | None) -> None:
        """Raise RequestError 401 or 403 unless this request is allowed. GET /health is open. ``client`` is the address that
        it came from; None if it came through a private socket or with a CURVE key."""
        reads = method in ("GET", "HEAD")
        if (path == "/health" and reads) or (path == CAPTURES_PATH and method == "POST" and client is None):
            return  # the plugin in the server has no token
        # a page of another site cannot know a token, but a browser adds by itself the password that its user once typed
        if not (reads and self._digests and _explicit(headers)):
            _check_site(path, headers)
        if not self._digests:
            if client is not None:
                _check_local(client, headers)
            return
        token = _presented(headers)
        if token is None:
            raise refuse("Authorization", "no token", "'Authorization: Bearer TOKEN'", status=401, code="no_token")
        digest = hashlib.sha256(token.encode()).digest()
        # every digest is compared, so that the time does not depend on which one matched
        scopes = {scope for scope, known in self._digests if hmac.compare_digest(known, digest)}
        if not scopes:
            raise refuse("Authorization", "an unknown token", "one of the trainer's", status=401, code="bad_token")
        if TRAIN not in scopes and not reads:
            raise refuse("Authorization", f"a token of scope 'read' for {method}", "a token of scope 'train'",
                         status=403, code="scope")  # fmt: skip

    def client_of(self, headers: Mapping[str, str], client: str | None) -> str:
        """Whose request this is, for limits per client: the token that it came with, or its address if there are none."""
        token = _presented(headers) if self._digests else None
        return f"address {client}" if token is None else hashlib.sha256(token.encode()).hexdigest()


def _check_site(path: str, headers: Mapping[str, str]) -> None:
    """Another site's page, open in a browser on this machine, must neither start training here nor read anything: the
    model server's CORS options may let it see the answers. A link to one of our pages is fine."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin is not None:
        with contextlib.suppress(ValueError):  # an origin that is no URL is not this server's
            if urlsplit(origin).netloc == headers.get("host"):
                return
        raise _foreign("Origin", origin)
    if site in ("cross-site", "same-site"):  # the same site may have other servers, on other ports
        if path in BROWSER_PAGES and headers.get("sec-fetch-mode") == "navigate":
            return
        raise _foreign("Sec-Fetch-Site", site)


def _foreign(header: str, value: str) -> RequestError:
    return refuse(header, f"a request from the page of another site ({value[:80]!r})", "this server's own", status=403,
                  code="cross_origin")  # fmt: skip


def _check_local(client: str, headers: Mapping[str, str]) -> None:
    """Without tokens: a client on this machine, which calls it by a name or an address of this machine. A page of another
    site whose name suddenly resolves to this machine (DNS rebinding) sends its own name. A proxy's client may be anywhere.

    Starlette's TrustedHostMiddleware cannot do this: it knows lists of names, where any address is fine here (vLLM's port
    listens on all of this machine's, IPv6 included), and it would guard a trainer with tokens too, which any name may call.
    """
    added = (name for name in headers if name in FORWARDED or name.startswith(FORWARDED_PREFIXES))
    if forwarded := next(added, None):
        raise _not_local("Authorization", f"a request that a proxy forwarded ({forwarded})", "one from this machine")
    if not is_loopback(client):
        raise _not_local("Authorization", f"a request from {client}", "one from 127.0.0.1 or another loopback address")
    host = name = headers.get("host")
    with contextlib.suppress(ValueError):  # a malformed host is checked as the name that it is not
        name = urlsplit(f"//{host}").hostname if host else None
    if name is None or name in (socket.gethostname().lower(), "localhost") or name.endswith(".localhost"):
        return
    try:
        ipaddress.ip_address(name)
    except ValueError:
        raise _not_local("Host", f"Host {name[:80]!r}", "localhost or an address") from None


def _not_local(field: str, got: str, expected: str) -> RequestError:
    advice = f"{expected}; set service.token_file or ${TOKEN_VARIABLE}"
    return refuse(field, f"{got} while the trainer has no tokens", advice, status=403, code="not_local")


def _explicit(headers: Mapping[str, str]) -> bool:
    """Whether a program put a token into the headers: a browser does that by itself for Basic authentication alone."""
    return "x-apollo-token" in headers or headers.get("authorization", "").lower().startswith("bearer ")


def _presented(headers: Mapping[str, str]) -> str | None:
    """The token of a request: X-Apollo-Token (next to a server's own API key), Bearer, or Basic (what a browser sends)."""
    if token := headers.get("x-apollo-token"):
        return token
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value:
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2] or None
        except ValueError:  # not base64, or no text in it
            return None
    return None


def load_access(service: ServiceConfig) -> Access:
    """Tokens of ``service.token_file``, else of $APOLLO_TP_TOKEN: one per line, ``read:TOKEN`` or ``train:TOKEN`` (or
    only TOKEN, which trains).

    Raises ConfigError if others can read the file, a line is not a token, or a non-loopback address has none.
    """
    if service.token_file is not None:
        text = _read_private(Path(service.token_file))
        source = service.token_file
    else:
        text, source = os.environ.get(TOKEN_VARIABLE, ""), f"${TOKEN_VARIABLE}"
    tokens = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        scope, colon, token = line.strip().partition(":")
        scope, token = (scope, token) if colon else (TRAIN, scope)
        if scope not in (READ, TRAIN) or len(token) < 16:
            raise ConfigError(
                f"{source}, line {number}: got scope {scope!r} and a token of {len(token)} characters, expected "
                "'read:' or 'train:' and at least 16 characters"
            )
        tokens.append((scope, token))
    if service.token_file is not None and not tokens:
        raise ConfigError(f"{source}: got no token, expected at least one line")
    hosts = {"service.http.host": service.http.host}
    if service.zmq.port is not None:
        hosts["service.zmq.host"] = service.zmq.host
    for option, host in hosts.items():
        if not tokens and not is_loopback(host):
            raise ConfigError(
                f"{option}: got {host!r} without a token, expected a loopback address; "
                f"set service.token_file or ${TOKEN_VARIABLE}"
            )
    return Access(tokens)


def _read_private(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"service.token_file: cannot read {path}: {error}; expected a text file in UTF-8") from error
    if mode & 0o077:
        raise ConfigError(f"service.token_file {path}: got mode {stat.filemode(mode)}, expected 0600: chmod 600 {path}")
    return text


def is_loopback(host: str) -> bool:
    """True if only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
