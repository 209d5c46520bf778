"""The guard of a job: what is measured, what it does when that is worse, and what a crash in between leaves."""

import json
import sys

import pytest

from tests.support.chat_model import write_model
from tests.support.fakes import CoordinatorProcess, FakeRanks, chat_stack, wait_for
from tests.support.jobs import CHAT, ONE, ends

GUARDED = {"samples": [ONE], "epochs": 20, "validation": [{"context_ids": [1], "continuation_ids": [5, 6]}]}
BEFORE = 0.5 * 1.06
"""The validation loss of the fake rank 0 before any step, nats; each step adds the share ``learned``."""


def guarded(client, **guard):
    answer = client.post("/train", json=GUARDED | {"guard": {"every": 5, "max_worse": 0.2} | guard})
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def guard_events(client, job):
    return [e for e in client.get(f"/train/jobs/{job}/events").json()["data"] if e["type"] == "guard"]


def test_a_job_that_makes_it_worse_is_rolled_back(stack):
    """To the checkpoint of before it; it says so as failed, with the figures. The next job learns from there."""
    client, ranks, _ = stack
    ranks.learned = 0.09  # after 5 steps worse by 45 %, 0.24 nats
    done = ends(client, guarded(client, action="rollback"))
    assert (done["state"], done["step"], done["error"]["code"]) == ("failed", 5, "RolledBackError")
    (snapshot,) = client.get("/checkpoints").json()["data"]
    assert f"0.7685 at step 5, expected at most 0.2 worse than {BEFORE:.4f}" in done["error"]["message"]
    assert f"rolled back to checkpoint {snapshot['name']} of before it, as weight version 6" in done["error"]["message"]
    assert [name for name, _ in ranks.restores()] == [snapshot["name"]]
    assert (snapshot["reason"], snapshot["restore"]["reason"], snapshot["restore"]["state"]) == (
        "guard",
        "guard",
        "succeeded",
    )
    assert (done["weight_version"], done["guard"]["value"]) == (6, pytest.approx(0.7685))
    assert [e["data"]["verdict"] for e in guard_events(client, done["id"])] == ["", "rollback"]
    assert not client.get("/train/status").json()["unsaved"]
    ranks.learned = 0.0
    assert ends(client, guarded(client, action="rollback"))["state"] == "succeeded"


def test_a_guard_that_reports_or_pauses(stack):
    """Reported, the job goes on and is measured again. Paused, a client may resume it; then it is measured at the next one,
    and the number of before the job stays."""
    client, ranks, _ = stack
    ranks.learned = 0.09
    job = guarded(client)
    assert ends(client, job)["state"] == "succeeded"
    levels = [(e["data"]["step"], e["level"]) for e in guard_events(client, job)]
    assert levels == [(0, "info"), (5, "warn"), (10, "warn"), (15, "warn"), (20, "warn")]
    ranks.undone = len(ranks.applied())
    job = guarded(client, action="pause")
    assert (ends(client, job)["state"], ends(client, job)["step"]) == ("paused", 5)
    client.post(f"/train/jobs/{job}/resume")
    wait_for(lambda: len(guard_events(client, job)) == 3)
    paused = wait_for(lambda: (view := ends(client, job))["step"] == 10 and view)
    assert paused["guard"]["baseline"] == pytest.approx(BEFORE)
    client.post(f"/train/jobs/{job}/cancel")
    assert not ranks.restores()


def test_what_is_better_or_little_worse_goes_through(stack):
    client, ranks, _ = stack
    ranks.learned = 0.015  # 30 % after 20 steps, 0.16 nats
    done = ends(client, guarded(client, action="rollback"))
    assert (done["state"], done["guard"]["verdict"], done["guard"]["step"]) == ("succeeded", "", 20)
    assert not ranks.restores()


@pytest.mark.parametrize("who", ["coordinator", "ranks"])
def test_a_rollback_outlives_who_was_doing_it(who, tmp_path):
    """The job is rolled back once, and trains nothing more."""
    model = write_model(tmp_path / "model")
    with CoordinatorProcess(tmp_path, model_path=model) as coordinator, coordinator.client() as client:
        with FakeRanks(coordinator.ranks_socket, tmp_path / "journal") as ranks:
            wait_for(lambda: client.get("/health").json()["trainer"])
            ranks.learned, ranks.restore_seconds = 0.09, 60.0 if who == "ranks" else 1.0
            job = guarded(client, action="rollback")
            wait_for(lambda: any(type(c).__name__ == "RestoreCheckpoint" for c in ranks.commands))
            if who == "coordinator":
                coordinator.kill()
                coordinator.start()
                with coordinator.client() as again:
                    done = ends(again, job)
        if who == "ranks":
            with FakeRanks(coordinator.ranks_socket, tmp_path / "journal") as ranks:
                done = ends(client, job)
        assert (done["state"], done["error"]["code"]) == ("failed", "RolledBackError"), done
        assert len(ranks.restores()) == 1
        assert len(ranks.applied()) == 5


def test_a_snapshot_in_memory_is_put_back(stack):
    """Nothing is on disk for it; it is no checkpoint for others. The older checkpoint that stands in for it is kept."""
    client, ranks, _ = stack
    older = client.post("/checkpoint", json={"wait": True}).json()
    ranks.learned, ranks.fallback = 0.09, older["path"]
    done = ends(client, guarded(client, action="rollback"))
    assert (done["state"], done["step"], done["error"]["code"]) == ("failed", 5, "RolledBackError")
    assert "rolled back to the snapshot in host memory of before it, as weight version 6" in done["error"]["message"]
    snapshot = next(each for each in client.get("/checkpoints").json()["data"] if each["reason"] == "guard")
    assert (snapshot["path"], snapshot["fallback"], snapshot["restore"]["lost"]) == ("", older["path"], False)
    assert [name for name, _ in ranks.restores()] == [snapshot["name"]]
    refused = client.post(f"/checkpoint/{snapshot['id']}/restore")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "checkpoint_state")
    assert client.get("/train/status").json()["unsaved"], "the weights are nowhere on disk"
    job = guarded(client, action="rollback", max_worse=100.0)
    wait_for(lambda: len([c for c in ranks.commands if type(c).__name__ == "SaveCheckpoint"]) == 3)
    client.post("/checkpoint", json={"wait": True})
    ends(client, job)
    saves = [c for c in ranks.commands if type(c).__name__ == "SaveCheckpoint"]
    assert [save.snapshot for save in saves] == [False, True, True, False]


def test_a_snapshot_that_was_lost_is_replaced_by_the_older_checkpoint(tmp_path):
    """The trainer ends while it puts the snapshot back: the next one restores the checkpoint, and the job says so."""
    model = write_model(tmp_path / "model")
    with CoordinatorProcess(tmp_path, model_path=model) as coordinator, coordinator.client() as client:
        with FakeRanks(coordinator.ranks_socket, tmp_path / "journal") as ranks:
            wait_for(lambda: client.get("/health").json()["trainer"])
            ranks.learned, ranks.restore_seconds, ranks.fallback = 0.09, 60.0, "/ckpt/older"
            job = guarded(client, action="rollback")
            wait_for(lambda: any(type(c).__name__ == "RestoreCheckpoint" for c in ranks.commands))
        with FakeRanks(coordinator.ranks_socket, tmp_path / "journal") as ranks:
            done = ends(client, job)
            assert [name for name, _ in ranks.restores()] == ["older"]
        assert (done["state"], done["error"]["code"]) == ("failed", "RolledBackError"), done
        assert "rolled back to checkpoint older, which is older than the job: the snapshot" in done["error"]["message"]


def test_a_rollback_that_fails_is_said(stack):
    client, ranks, _ = stack
    ranks.learned, ranks.fail_restores = 0.09, True
    error = ends(client, guarded(client, action="rollback"))["error"]
    assert error["code"] == "GuardFailedError"
    assert "another checksum; the weights are those after step 5" in error["message"]


def test_without_a_checkpoint_to_go_back_to_nothing_is_trained(stack):
    client, ranks, _ = stack
    ranks.fail_saves = True
    error = ends(client, guarded(client, action="rollback"))["error"]
    assert (error["code"], "nothing was trained" in error["message"]) == ("GuardFailedError", True)
    assert not ranks.applied()


def test_snapshots_of_open_jobs_are_kept(stack):
    """Checkpoints that others ask for meanwhile must not remove them."""
    client, ranks, _ = stack
    job = guarded(client, action="rollback")
    wait_for(lambda: len(ranks.applied()) > 2)
    client.post("/checkpoint?wait=true")
    saves = [c for c in ranks.commands if type(c).__name__ == "SaveCheckpoint"]
    assert saves[1].kept == [saves[0].name]
    ends(client, job)
    client.post("/checkpoint?wait=true")
    assert [c for c in ranks.commands if type(c).__name__ == "SaveCheckpoint"][2].kept == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"validation": None}, "guard"),
        ({"guard": {"measure": "command"}}, "guard.measure"),
        ({"guard": {"higher_is_better": True}}, "guard.higher_is_better"),
        ({"guard": {"max_worse": -1}}, "guard.max_worse"),
        ({"validation": [{"context_ids": [1], "continuation_ids": [5000]}]}, "validation[0].continuation_ids[0]"),
    ],
)
def test_a_guard_that_cannot_be_is_refused(changes, field, stack):
    client, _, coordinator = stack
    answer = client.post("/train", json=GUARDED | {"guard": {}} | changes)
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, field)
    assert not list((coordinator.folder / "state" / "samples").iterdir())


def test_an_openai_job_is_guarded_by_its_validation_file(stack):
    client, ranks, _ = stack
    ranks.learned = 0.09
    files = [
        client.post("/v1/files", files={"file": ("a.jsonl", CHAT * 20)}, data={"purpose": "fine-tune"}).json()["id"]
        for _ in range(2)
    ]
    body = {"model": "fake", "training_file": files[0], "guard": {"every": 5, "max_worse": 0.1, "action": "rollback"}}
    assert client.post("/v1/fine_tuning/jobs", json=body).json()["error"]["field"] == "guard"
    job = client.post("/v1/fine_tuning/jobs", json=body | {"validation_file": files[1]}).json()["id"]
    assert ends(client, job)["state"] == "failed"
    assert client.get(f"/v1/fine_tuning/jobs/{job}").json()["error"]["code"] == "RolledBackError"
    assert len(ranks.restores()) == 1


COMMAND = """
import json, os, sys, time, urllib.request
assert not [name for name in os.environ if "TOKEN" in name]
url = json.load(open({address!r}))["url"]
body = {{"samples": [{{"context_ids": [1], "continuation_ids": [5, 6]}}]}}
request = urllib.request.Request(url + "/train/score", json.dumps(body).encode(), {{"Content-Type": "application/json"}})
answer = json.load(urllib.request.urlopen(request))
print("step", os.environ["APOLLO_TP_STEP"], "of", os.environ["APOLLO_TP_JOB"])
{end}
"""
ENDS = {
    "a number": ("print(answer['data'][0]['logprob'])", "RolledBackError", "guard command=-1.5370 at step 5"),
    "bad": (
        "print(1); sys.exit(int(os.environ['APOLLO_TP_STEP']) // 5)",
        "RolledBackError",
        "no finite number at step 5",
    ),
    "no number": ("print('fine')", "GuardCommandError", "got 'fine' as its last line, expected a number"),
    "no end": ("print(1, flush=True); time.sleep(60)", "GuardCommandError", "got no end within 3 s"),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_command_of_the_operator_judges(end, tmp_path):
    """It may ask the coordinator and the server meanwhile; here it prints what must not fall."""
    last, code, message = ENDS[end]
    script = tmp_path / "judge.py"
    script.write_text(COMMAND.format(address=str(tmp_path / "i" / "coordinator.json"), end=last))
    options = {"guard_command": [sys.executable, str(script)], "guard_seconds": 3.0 if end == "no end" else 30.0}
    with chat_stack(tmp_path, **options) as (client, ranks, _):
        ranks.learned = 0.09
        guard = {"measure": "command", "higher_is_better": True, "every": 5, "max_worse": 0.2, "action": "rollback"}
        job = client.post("/train", json={"samples": [ONE], "epochs": 20, "guard": guard}).json()["id"]
        done = ends(client, job)
        assert (done["state"], done["error"]["code"]) == ("failed", code), done
        assert message in done["error"]["message"]
        assert len(ranks.restores()) == (code == "RolledBackError")
        assert json.dumps(done["spec"]["guard"])
