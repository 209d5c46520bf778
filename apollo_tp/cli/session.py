"""What all commands share: their options, the client, the form of the output, and errors as sentences with a status."""

import contextlib
import dataclasses
import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from apollo_tp.cli.access import TOKEN_VARIABLE, URL_VARIABLE, coordinator_headers, find_url
from apollo_tp.cli.answers import RefusedError, UnreachableError, read
from apollo_tp.errors import ConfigError

if TYPE_CHECKING:
    from apollo_tp.cli.client import Client

T = TypeVar("T")
OK, REFUSED, USAGE, UNREACHABLE = 0, 1, 2, 3


@dataclasses.dataclass
class Session:
    """One run of a command. The fields are the options that every command has."""

    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
    url: Annotated[
        str | None, typer.Option(help=f"The coordinator; default ${URL_VARIABLE}, or the one that runs here.")
    ] = None
    key: Annotated[
        Path | None,
        typer.Option(help="NAME.key_secret, with server.key in the same folder, for a --url tcp://HOST:PORT."),
    ] = None
    token_file: Annotated[Path | None, typer.Option(help=f"File with a token; default ${TOKEN_VARIABLE}.")] = None

    @cached_property
    def client(self) -> "Client":
        """Made when a command first needs it. Raises ConfigError for options that it cannot use."""
        from apollo_tp.cli.client import Client  # httpx takes longer to import than a help text to show

        return Client(self.url or find_url(), coordinator_headers(self.token_file), self.key)

    def close(self) -> None:
        if "client" in self.__dict__:
            self.client.close()

    def show(self, answer: Any, kind: type[T], render: Callable[[T], None]) -> None:
        """Print ``answer`` as JSON if that was asked for, else have it rendered as a ``kind``."""
        if self.json:
            print(json.dumps(answer), flush=True)
        else:
            render(read(answer, kind))


def command(function: Callable[..., int]) -> Callable[..., None]:
    """``function(session, ...)``, which returns the exit status, as a typer command that has the session's options too."""

    @functools.wraps(function)
    def run(**values: Any) -> None:
        session = Session(**{field.name: values.pop(field.name) for field in dataclasses.fields(Session)})
        with errors_as_sentences(), contextlib.closing(session):
            status = function(session, **values)
            if sys.stdout is not None:
                sys.stdout.flush()  # so that a full disk is noticed here, where it becomes an error message
        raise typer.Exit(status)

    own = list(inspect.signature(function).parameters.values())[1:]
    run.__signature__ = inspect.Signature([*own, *inspect.signature(Session).parameters.values()])  # type: ignore[attr-defined]
    return run


@contextlib.contextmanager
def errors_as_sentences() -> Iterator[None]:
    """End the command with a sentence on standard error, and the exit status of its kind."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of our output ended first: typer ends quietly
    except RefusedError as error:
        _fail(error, REFUSED)
    except (OSError, ConfigError) as error:
        _fail(error, USAGE)
    except UnreachableError as error:
        _fail(error, UNREACHABLE)


def _fail(error: Exception, status: int) -> NoReturn:
    raise typer.Exit(say(error, status)) from error


def say(error: Exception, status: int) -> int:
    """Print the error on standard error, unless the shell closed that (print would take standard output then). Returns
    ``status``."""
    if sys.stderr is not None:
        print(f"apollo-tp: {error}", file=sys.stderr)
    return status
