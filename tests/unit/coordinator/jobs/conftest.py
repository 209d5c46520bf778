"""What most tests of jobs start from: a coordinator process with a fake rank 0, or the path of a state folder."""

from pathlib import Path

import pytest

from tests.support.fakes import chat_stack


@pytest.fixture
def stack(tmp_path):
    """(client, ranks, coordinator) of a model with a chat template; a step takes 50 ms."""
    with chat_stack(tmp_path, step_seconds=0.05) as parts:
        yield parts


@pytest.fixture
def impatient_stack(tmp_path):
    """The same with immediate steps and short deadlines: a reply may take 2 x 1 s, and 1 s more."""
    with chat_stack(tmp_path, settings={"command_timeout_seconds": 1.0}) as parts:
        yield parts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a state folder may be made."""
    return tmp_path / "state"
