"""Clients that hold connections: idle ones, unfinished requests, answers that nobody reads."""

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from apollo_tp.coordinator.http import connections
from tests.support.fakes import CoordinatorProcess, wait_for

FEW_FILES = ("prlimit", "--nofile=256:256")


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory):
    """One that may open 256 files, and so accepts 128 connections."""
    with CoordinatorProcess(tmp_path_factory.mktemp("n"), prefix=FEW_FILES) as process:
        yield process


def connected(coordinator, sent=b""):
    host, port = coordinator.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(sent)
    return connection


def ended(connection, seconds):
    """Whether the server closes the connection within this time; what it sends before that is dropped."""
    connection.settimeout(seconds)
    try:
        while connection.recv(65_536):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize(
    "sent", [b"", b"GET /health HTTP/1.1\r\nX: ", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"]
)
def test_idle_connections_keep_nobody_out(coordinator, sent):
    """Far more than the files that the process may open, whether they sent nothing, a part of a request or a whole one:
    others are answered meanwhile, nothing is logged without end, and the coordinator lives."""
    before = coordinator.log_path.stat().st_size
    with contextlib.ExitStack() as stack:
        for number in range(400):
            stack.enter_context(connected(coordinator, sent))
            if number % 100 == 99:
                with coordinator.client() as client:
                    assert client.get("/train/status").status_code == 200
    assert coordinator.process.poll() is None
    assert coordinator.log_path.stat().st_size - before < 100_000


def test_the_soft_limit_of_files_is_raised(tmp_path):
    """A shell's limit of 64 files, where 4096 are allowed, does not limit the coordinator."""
    with (
        CoordinatorProcess(tmp_path, prefix=("prlimit", "--nofile=64:4096")) as process,
        contextlib.ExitStack() as stack,
    ):
        held = [stack.enter_context(connected(process)) for _ in range(300)]
        with process.client() as client:
            assert client.get("/health").status_code == 200
        assert not ended(held[0], 0.2)  # all fit: none has made room for another


def test_requests_in_progress_are_not_closed_for_others(coordinator):
    """If all connections have one, a further client is told so, and they go on."""
    with contextlib.ExitStack() as stack:
        half = b"POST /train HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{"
        held = [stack.enter_context(connected(coordinator, half)) for _ in range(128)]
        time.sleep(0.5)
        late = stack.enter_context(connected(coordinator))
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := late.recv(65_536):
                answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert json.loads(body)["error"]["code"] == "too_many_connections"
        held[0].sendall(b'"text":1}')
        assert held[0].recv(65_536).startswith(b"HTTP/1.1 400 ")
    wait_for(lambda: coordinator.client().get("/health").status_code == 200)


STARTS = (
    b"",
    b"GET /health HTTP/1.1\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\n",
    b"POST /train/jobs/x/cancel HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n",
)


def seconds_open(coordinator, sent):
    """How long a connection stays open on which this was sent, and then single bytes."""
    with connected(coordinator, sent) as connection:
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while not ended(connection, 0.5) and time.monotonic() - start < 30:
                connection.sendall(b"X" if sent else b"")
        return time.monotonic() - start


@pytest.mark.slow
def test_a_request_has_a_deadline(coordinator):
    """The first and a later one, also while single bytes of it arrive; and a body that is still sent after the answer."""
    with ThreadPoolExecutor(len(STARTS)) as threads:
        found = list(threads.map(lambda sent: seconds_open(coordinator, sent), STARTS))
    assert all(4 < seconds < connections.HEAD_SECONDS + 5 for seconds in found), found


def test_headers_without_end_are_refused(coordinator):
    """Long before they fill the memory."""
    with connected(coordinator, b"GET /health HTTP/1.1\r\nX: ") as connection, contextlib.suppress(ConnectionError):
        for _ in range(100):
            connection.sendall(b"y" * 10_000)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 431 ")
    with coordinator.client() as client:
        assert client.get("/health", headers={"X": "y" * 30_000}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/nothing", "/train", "/v1/files/none", "/v1/nothing", "/", "/train/jobs/none/events"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "HEAD"])
def test_a_query_that_is_not_utf_8_is_no_server_error(coordinator, method, path):
    query = b"\xff&limit=\xfe&after=\xc3("
    with contextlib.closing(connected(coordinator, b"%b %b?%b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n" % (
        method.encode(), path.encode(), query,
    ))) as connection:  # fmt: skip
        assert connection.recv(100)[:10] in (b"HTTP/1.1 2", b"HTTP/1.1 3", b"HTTP/1.1 4")
