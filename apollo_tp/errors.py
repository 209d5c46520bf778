"""The errors that cross packages. A package also has errors of its own, where it raises and handles them itself.

    ApolloTpError
    ├── ConfigError            an option is unknown, ill-typed or contradicts another
    ├── RequestError           a client asked for something that cannot be done (HTTP 4xx)
    ├── ManifestError          what the server published is missing, stale, or does not agree over ranks
    │   └── NoServerError      no live server published anything
    ├── UnsupportedModelError  tensors that cannot be trained in place, each with its reason
    ├── MappingError           the server's memory could not be mapped, or is not what the manifest says
    ├── TrainerBusyError       another trainer trains this server
    ├── ServerGoneError        the vLLM process that owns the weights ended
    ├── ReplicaError           ranks that should be identical differ: in bits of a weight, or a gradient
    ├── CollectiveError        a sum or gather over ranks did not happen: what it should have written is not used
    ├── RankFailedError        a trainer rank raised; carries that rank and its traceback
    ├── DeviceError            a GPU computes wrong results
    ├── DeviceMemoryError      the longest micro-batch would not fit into the GPU's free memory
    ├── DeadlineError          a wait took too long; names what it waited for
    ├── FrameError             bytes from another process are no message of the expected kind
    └── CheckpointError        a checkpoint cannot be written or resumed from

Every message has three parts: what was got, what was expected, what to do. It names rank and tensor where there are any.
"""

from __future__ import annotations

from typing import Any

import msgspec

DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no JSON or MessagePack of the expected type. UnicodeDecodeError: a string that is
not UTF-8, which it may find only after a wrong type. RecursionError: nesting, even in a field that the type has not."""


class ApolloTpError(Exception):
    """Base of all errors that this project raises for a known cause."""


class ConfigError(ApolloTpError):
    """An option is unknown, ill-typed, or contradicts another option."""


class RequestError(ApolloTpError):
    """A request was refused. ``status`` is the HTTP status; the body names the field, what was got and expected."""

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        got: str | None = None,
        expected: str | None = None,
        status: int = 400,
        code: str = "invalid_request",
    ) -> None:
        super().__init__(message)
        self.field = field
        self.got = got
        self.expected = expected
        self.status = status
        self.code = code


def refuse(field: str, got: str, expected: str, **options: Any) -> RequestError:
    """A RequestError whose message consists of field, got and expected."""
    return RequestError(f"{field}: got {got}, expected {expected}", field=field, got=got, expected=expected, **options)


class ManifestError(ApolloTpError):
    """What the server published is missing, stale, or does not agree over its ranks."""


class NoServerError(ManifestError):
    """No live server with the apollo plugin was found."""


class UnsupportedModelError(ApolloTpError):
    """Some tensors cannot be trained in place. The message lists each with its reason."""


class MappingError(ApolloTpError):
    """The server's memory could not be mapped, or does not hold what the manifest says."""


class TrainerBusyError(ApolloTpError):
    """Another trainer trains this server."""


class ServerGoneError(ApolloTpError):
    """A vLLM process that owns the weights ended."""


class ServerReturnedError(ApolloTpError):
    """A server that training went on without is up again; ranks must be arranged anew."""


class ReplicaError(ApolloTpError):
    """Ranks that hold the same part of a weight hold different bits of it, or different gradients."""


class CollectiveError(ApolloTpError):
    """A collective left memory that not every rank has put its part into, as one that was aborted does."""


class RankFailedError(ApolloTpError):
    """A trainer rank raised. ``rank`` is where it began, ``traceback`` what that rank printed."""

    def __init__(self, message: str, *, rank: int, traceback: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.traceback = traceback


class DeviceError(ApolloTpError):
    """A GPU computes wrong results as it is set up; found before the first step."""


class DeviceMemoryError(ApolloTpError):
    """The longest micro-batch would not fit into the GPU's free memory; found before the first step."""


class DeadlineError(ApolloTpError):
    """A wait took too long. The message names what it waited for."""


class FrameError(ApolloTpError):
    """Bytes that another process sent are no message of the expected kind."""


class CheckpointError(ApolloTpError):
    """A checkpoint cannot be written, or cannot be resumed from."""
