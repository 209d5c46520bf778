"""Checkpoints that are put back: between two steps, once, and whatever ends meanwhile."""

import time

import pytest

from apollo_tp.wire import commands
from tests.support.chat_model import write_model
from tests.support.fakes import CoordinatorProcess, FakeRanks, chat_stack, wait_for
from tests.support.jobs import ONE, ends


def save(client):
    """The record of a new checkpoint."""
    return client.post("/checkpoint", json={"wait": True}).json()


def restored(client, checkpoint):
    """The record of its restore, once that is over."""
    path = f"/checkpoint/{checkpoint['id']}"
    return wait_for(lambda: (found := client.get(path).json()["restore"])["state"] != "queued" and found)


def test_a_restore_comes_between_two_steps_and_the_job_goes_on(tmp_path):
    """Its steps are counted as before; the weight version grows; the job says what happened."""
    with chat_stack(tmp_path, step_seconds=0.02) as (client, ranks, _):
        checkpoint = save(client)
        job = client.post("/train", json=ONE | {"epochs": 30}).json()["id"]
        wait_for(lambda: len(ranks.applied()) > 3)
        answer = client.post(f"/checkpoint/{checkpoint['name']}/restore", json={"wait": True})
        assert (answer.status_code, answer.json()["restore"]["state"]) == (200, "succeeded")
        assert answer.json()["id"] == checkpoint["id"]
        assert ends(client, job)["state"] == "succeeded"
        assert [step for _, step in ranks.applied()] == list(range(1, 31))
        ((name, identity),) = ranks.restores()
        assert (name, identity) == (checkpoint["name"], answer.json()["restore"]["id"])
        kinds = [type(command) for command in ranks.commands if not isinstance(command, commands.Identify)]
        place = kinds.index(commands.RestoreCheckpoint)
        assert kinds[place - 1] is kinds[place + 1] is commands.Step
        (event,) = [e for e in client.get(f"/train/jobs/{job}/events").json()["data"] if e["data"].get("restored")]
        assert event["message"].startswith("Checkpoint restored: /ckpt/")
        assert client.get("/train/status").json()["trainer"]["weight_version"] == 31
        assert client.get("/train/status").json()["unsaved"]


def test_what_cannot_be_restored_is_refused(stack):
    client, ranks, _ = stack
    assert client.post("/checkpoint/nothing/restore").status_code == 404
    ranks.save_seconds = 0.3
    waiting = client.post("/checkpoint").json()
    answer = client.post(f"/checkpoint/{waiting['id']}/restore")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "checkpoint_state")
    wait_for(lambda: client.get(f"/checkpoint/{waiting['id']}").json()["state"] == "succeeded")
    ranks.fail_restores = True
    failed = client.post(f"/checkpoint/{waiting['id']}/restore?wait=true").json()["restore"]
    assert (failed["state"], failed["error"]) == ("failed", "rank 1 raised CheckpointError: another checksum")
    ranks.fail_restores = False
    assert client.post(f"/checkpoint/{waiting['id']}/restore?wait=true").json()["restore"]["state"] == "succeeded"


def test_requests_that_wait_for_one_restore_share_it(stack):
    """And one that comes again with its key restores nothing a second time, also later."""
    client, ranks, _ = stack
    checkpoint = save(client)
    ranks.restore_seconds = 0.4
    path, key = f"/checkpoint/{checkpoint['id']}/restore", {"Idempotency-Key": "a"}
    answers = [client.post(path, headers=headers) for headers in ({}, key, {})]
    assert len({answer.json()["restore"]["id"] for answer in answers}) == 1
    assert {answer.status_code for answer in answers} == {202}
    restored(client, checkpoint)
    assert client.post(path, headers=key).status_code == 200
    assert len(ranks.restores()) == 1
    assert client.post(f"{path}?wait=true").json()["restore"]["state"] == "succeeded"
    assert len(ranks.restores()) == 2


@pytest.mark.parametrize("who", ["coordinator", "ranks before it", "ranks after it"])
def test_a_restore_that_was_accepted_is_done_once(who, tmp_path):
    """Whoever ends meanwhile. Steps that followed it are not undone by a second one, nor is the job run before it."""
    model = write_model(tmp_path / "model")
    with CoordinatorProcess(tmp_path, model_path=model) as coordinator:
        with coordinator.client() as client, FakeRanks(coordinator.ranks_socket, tmp_path / "journal") as ranks:
            wait_for(lambda: client.get("/health").json()["trainer"])
            checkpoint = save(client)
            ranks.restore_seconds = 60.0 if who == "ranks before it" else 0.6
            client.post(f"/checkpoint/{checkpoint['id']}/restore").raise_for_status()
            client.post("/train", json=ONE | {"epochs": 3}).raise_for_status()
            wait_for(lambda: any(isinstance(c, commands.RestoreCheckpoint) for c in ranks.commands))
            if who == "coordinator":
                coordinator.kill()
                coordinator.start()
            elif who == "ranks after it":
                ranks.mute = True  # it is done, and nobody hears of it
                wait_for(lambda: ranks.restores())
            if who == "coordinator":
                with coordinator.client() as again:
                    _check_done_once(again, ranks, checkpoint)
                return
        with coordinator.client() as client, FakeRanks(coordinator.ranks_socket, tmp_path / "journal") as ranks:
            _check_done_once(client, ranks, checkpoint)


def _check_done_once(client, ranks, checkpoint):
    assert restored(client, checkpoint)["state"] == "succeeded"
    (job,) = client.get("/train/jobs").json()["data"]
    assert ends(client, job["id"])["state"] == "succeeded"
    time.sleep(0.2)
    assert ranks.restores() == [
        (checkpoint["name"], client.get(f"/checkpoint/{checkpoint['id']}").json()["restore"]["id"])
    ]
