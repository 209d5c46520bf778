"""Which actions a job allows in each state, and the speed of the running one."""

import pytest

from apollo_tp.coordinator.jobs.job import JobSpec, State, check_action, new_job
from apollo_tp.coordinator.jobs.scheduler import Progress
from apollo_tp.errors import RequestError

ALLOWED = {
    (State.validating_files, ""): {"cancel"},
    (State.queued, ""): {"cancel", "pause"},
    (State.running, ""): {"cancel", "pause"},
    (State.running, "pause"): {"cancel", "pause", "resume"},  # resuming withdraws the pause
    (State.running, "cancel"): {"cancel"},
    (State.paused, ""): {"cancel", "resume"},
    (State.succeeded, ""): set(),
    (State.failed, ""): set(),
    (State.cancelled, ""): set(),
}
"""By state and by the action that was requested but has not taken effect yet."""


@pytest.mark.parametrize(("state", "wanted"), ALLOWED)
def test_which_actions_are_allowed(state, wanted):
    """In particular, nothing undoes a cancel that was acknowledged."""
    job = new_job("train", JobSpec(), state)
    job.wanted = wanted
    for action in ALLOWED[state, wanted]:
        check_action(job, action)
    for action in {"cancel", "pause", "resume"} - ALLOWED[state, wanted]:
        with pytest.raises(RequestError) as error:
            check_action(job, action)
        assert (error.value.status, error.value.code) == (409, "job_state")


def test_every_state_is_in_the_table():
    """Else a new state would be tested nowhere."""
    assert {state for state, _ in ALLOWED} == set(State)


def test_speed_and_time_left_are_those_between_the_steps_that_ended():
    """The tokens of the first step were trained before the first time that is known."""
    progress = Progress("job")
    assert (progress.tokens_per_second(), progress.seconds_left(3)) == (None, None)
    progress.recent.append((10.0, 1000))
    assert (progress.tokens_per_second(), progress.seconds_left(3)) == (None, None)
    progress.recent.append((12.0, 30))
    assert (progress.tokens_per_second(), progress.seconds_left(3)) == (15.0, 6.0)
    progress.recent.append((15.0, 120))
    assert (progress.tokens_per_second(), progress.seconds_left(2)) == (30.0, 5.0)
