"""The HTTP surface, fuzzed from its own OpenAPI document: whatever is sent, no answer is a 5xx."""

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("f")
    with (
        CoordinatorProcess(folder, max_queued_jobs=1000) as process,
        process.client() as client,
        FakeRanks(process.ranks_socket, folder / "journal"),
    ):
        wait_for(lambda: client.get("/health").json()["trainer"])
        yield process


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_makes_a_server_error(coordinator, mode):
    """Valid and invalid requests of every operation are answered with a documented status, never with a 5xx.

    ``wait`` is switched off: it only says how long the answer may take. The loop stands where schemathesis' pytest plugin
    would: that one reads an attribute that pytest 9.2 no longer has.
    """
    schema = schemathesis.openapi.from_url(f"{coordinator.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 25
    sent = 0
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query or operation.path_parameters):
            continue  # nothing to get wrong

        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        @hypothesis.settings(
            max_examples=12,
            deadline=None,
            derandomize=True,  # the same requests in every run: a failure can be repeated
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def one(case):
            nonlocal sent
            for part in (case.body, case.query):
                if isinstance(part, dict) and "wait" in part:
                    part["wait"] = False
            response = case.call(timeout=20)
            case.validate_response(response, checks=[not_a_server_error, status_code_conformance])
            sent += 1

        one()
    assert sent > 200


def test_the_coordinator_is_still_well(coordinator):
    """After all these requests: it answers, and logged no unhandled error."""
    with coordinator.client() as client:
        assert client.get("/train/status").status_code == 200
    assert '"exception"' not in coordinator.log_path.read_text()
