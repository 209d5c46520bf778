"""A coordinator process with a fake rank 0, for tests that share one."""

import pytest

from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    with (
        CoordinatorProcess(folder, max_body_bytes=200_000, max_queued_jobs=3) as coordinator,
        FakeRanks(coordinator.ranks_socket, folder / "journal", step_seconds=0.02) as ranks,
        coordinator.client() as client,
    ):
        wait_for(lambda: client.get("/health").json()["trainer"])
        yield client, ranks
