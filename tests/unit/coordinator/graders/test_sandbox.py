"""A client's grader: what it may do, and what it cannot."""

import asyncio
import os
import socket
import time
from pathlib import Path

import pytest

from apollo_tp.coordinator.graders import sandbox
from apollo_tp.coordinator.graders.templates import GraderError

VALUES = {"sample": {"output_text": "42", "output_json": 42}, "item": {"answer": "42"}}


def run(source: str, seconds: float = 10.0, memory: int = 512 * 2**20) -> float:
    return asyncio.run(sandbox.run_python(source, VALUES, seconds, memory))


def body(lines: str) -> str:
    return "def grade(sample, item):\n" + "".join(f"    {line}\n" for line in lines.splitlines())


def test_it_returns_a_number() -> None:
    source = "import re, json, math\n" + body("print('x' * 10)\nreturn sample['output_text'] == item['answer']")
    assert run(source) == 1.0


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def other(): pass", "no function grade"),
        ("def grade(", "SyntaxError"),
        (body("raise ValueError('my reason')"), "ValueError: my reason"),
        (body("return float('nan')"), "expected a finite number"),
        (body("return 'many'"), "ValueError"),
        (body("return bytearray(2**30)[0]"), "MemoryError"),
        (body("import os\nos._exit(0)"), "ended without a reward"),
        (body("import os\nwhile True: os.write(3, b'x' * 65536)"), "ended without a reward"),
    ],
)
def test_its_errors_are_told(source: str, reason: str) -> None:
    with pytest.raises(GraderError, match=reason) as raised:
        run(source)
    assert raised.value.kind == sandbox.RUNTIME_ERROR


@pytest.mark.parametrize("wait", ["while True: pass", "import time\ntime.sleep(60)"])
def test_it_has_a_deadline(wait: str) -> None:
    began = time.monotonic()
    with pytest.raises(GraderError, match=r"no reward for 1 s|ended without a reward"):
        run(body(wait), seconds=1.0)
    assert time.monotonic() - began < 8


def _cannot(lines: str) -> None:
    """The lines raise an OSError inside, and only there: the same lines outside would do something."""
    inside = (
        "try:\n" + "".join(f"    {line}\n" for line in lines.splitlines()) + "except OSError: return 1.0\nreturn 0.0"
    )
    assert run(body(inside)) == 1.0


def test_it_sees_no_network(tmp_path: Path) -> None:
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as local:
        server.bind(("127.0.0.1", 0))
        server.listen()
        path = tmp_path / "s"
        local.bind(str(path))
        local.listen()
        libc = "import ctypes, struct\nlibc = ctypes.CDLL(None, use_errno=True)\nfd = libc.socket({family}, 1, 0)\n"
        check = "if libc.connect(fd, address, len(address)): raise OSError(ctypes.get_errno())"
        number = server.getsockname()[1]
        port = f"address = struct.pack('<H', 2) + struct.pack('>H', {number}) + bytes([127, 0, 0, 1] + 8 * [0])\n"
        name = f"address = struct.pack('<H', 1) + {str(path).encode()!r} + bytes(1)\n"
        _cannot(libc.format(family=2) + port + check)
        _cannot(libc.format(family=1) + name + check)


@pytest.mark.parametrize(
    "lines",
    [
        f"open({__file__!r}).close()",
        "open('/etc/passwd').close()",
        "open('mine', 'w').close()",
        f"import os\nos.kill({os.getpid()}, 0)",
        "import os\nos.fork()",
        "import os\nos.chroot('/')",
    ],
)
def test_it_sees_no_files_and_no_processes(lines: str) -> None:
    _cannot(lines)


def test_a_kernel_that_isolates_nothing_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Namespaces are forbidden on some hosts: the code is refused, not run in the open."""
    source = sandbox.ISOLATED.read_text()
    broken = tmp_path / "isolated.py"
    assert "libc.unshare(spaces)" in source
    broken.write_text(source.replace("libc.unshare(spaces)", "libc.unshare(1)"))
    monkeypatch.setattr(sandbox, "ISOLATED", broken)
    with pytest.raises(GraderError, match=r"was not run: .*unshare") as raised:
        run(body("return 1"))
    assert raised.value.kind == sandbox.SERVER_ERROR
