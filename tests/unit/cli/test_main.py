"""``apollo-tp`` as a subprocess against a real coordinator with a fake rank 0."""

import json
import os
import signal
import subprocess
import sys

import pytest
import typer

import apollo_tp
from apollo_tp.cli import main
from apollo_tp.cli.compare import stretch
from tests.support import forks
from tests.support.chat_model import write_model
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for
from tests.support.http_server import served


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    folder.chmod(0o700)
    with (
        CoordinatorProcess(folder, model_path=write_model(folder / "model")) as coordinator,
        coordinator.client() as http,
        FakeRanks(coordinator.ranks_socket, folder / "journal", step_seconds=0.01) as ranks,
    ):
        wait_for(lambda: http.get("/health").json()["trainer"])
        yield coordinator, ranks


def run(stack, *arguments, env=None, text=None):
    folder = str(stack[0].folder)  # the coordinator is found through the runtime folder
    environment = os.environ | {"APOLLO_TP_RUNTIME_DIR": folder, "TERM": "dumb", "COLUMNS": "200"} | (env or {})
    command = ["apollo_tp.cli.main", *map(str, arguments)]
    if not any(name.startswith("PYTHON") for name in env or {}):  # which the interpreter reads when it starts
        return forks.run("apollo_tp.cli.main", command, 30, environment, text or "")
    command = [sys.executable, "-m", *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, input=text)


@pytest.fixture
def completions():
    """A server's /v1/completions, that answers as the fake rank scores, and 0.25 nats below."""

    def respond(request, body):
        if request.headers["authorization"] is not None:
            return 401, {"error": {"message": "no such key"}}
        entries = [{str(t): {"logprob": -0.5 * (1 + 0.01 * t) - 0.25}} for t in body["prompt"]]
        return 200, {"choices": [{"prompt_logprobs": [None, *entries[1:]]}]}

    with served(respond) as url:
        yield url


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [
        {"text": "Hello there"},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_train_and_follow(stack, data):
    """train --follow ends with the job, shows its end, and exits 0; the job is in jobs, events and status."""
    done = run(stack, "train", data, "--follow", "--epochs", 4, "--batch-size", 1)
    assert done.returncode == 0, done.stderr
    job = done.stdout.split(":")[0]
    assert "succeeded" in done.stdout
    listed = json.loads(run(stack, "jobs", "--json").stdout)
    assert (listed[0]["id"], listed[0]["step"]) == (job, 8)
    assert job in run(stack, "jobs").stdout
    lines = run(stack, "events", job, "--json").stdout.splitlines()
    assert [json.loads(line)["data"]["step"] for line in lines if '"metrics"' in line] == list(range(1, 9))
    assert "weight version" in run(stack, "status").stdout
    assert json.loads(run(stack, "status", "--json").stdout)["trainer"]["connected"]


def test_a_failing_job_exits_one(stack, data):
    """--follow of a job that fails exits 1 and shows why."""
    stack[1].fail_at = {1}
    failed = run(stack, "train", data, "--follow")
    stack[1].fail_at = set()
    assert failed.returncode == 1
    assert "boom" in failed.stderr


def test_dry_run_checkpoint_inspect_and_stdin(stack, data):
    """The remaining commands, and a file from standard input."""
    assert "learned from" in run(stack, "train", data, "--dry-run").stdout
    assert run(stack, "checkpoint").stdout.startswith("/ckpt/")
    assert "embed_tokens" in run(stack, "inspect").stdout
    assert run(stack, "train", "-", "--follow", "--json", text='{"text": "Hello"}\n').returncode == 0


def test_a_dry_run_says_what_was_converted(stack, tmp_path):
    """ShareGPT's and Alpaca's forms, in an array as such files mostly are."""
    sharegpt = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    alpaca = {"instruction": "Say hi.", "input": "", "output": "hello"}
    (tmp_path / "data.json").write_text(json.dumps([sharegpt, alpaca, sharegpt], indent=1))
    shown = run(stack, "train", tmp_path / "data.json", "--dry-run").stdout
    assert (
        "2 samples of ShareGPT's form converted to messages\n1 sample of Alpaca's form converted to messages\n" in shown
    )


def test_alone_it_shows_what_there_is(stack):
    """The version; without a command the help, with every option of every command explained."""
    assert run(stack, "--version").stdout == f"apollo-tp {apollo_tp.__version__}\n"
    shown = run(stack)
    assert shown.returncode == 0
    assert shown.stdout == run(stack, "--help").stdout
    commands = typer.main.get_command(main.app).commands
    assert {"score", "job", "checkpoints"} <= commands.keys()
    for name, command in commands.items():
        assert name in shown.stdout
        for option in command.params:
            assert getattr(option, "help", None), f"{name}: {option.name} has no description"


def test_a_job_checkpoints_and_scores(stack, data):
    """Of one job, of all checkpoints, and of each sample under the served weights; nothing is cut in a pipe."""
    job = run(stack, "train", data, "--follow").stdout.split(":")[0]
    assert job in run(stack, "job", job, env={"COLUMNS": "20"}).stdout
    assert json.loads(run(stack, "job", job, "--json").stdout)["state"] == "succeeded"
    folder = run(stack, "checkpoint").stdout.strip()
    assert folder in run(stack, "checkpoints", env={"COLUMNS": "20"}).stdout
    assert json.loads(run(stack, "checkpoints", "--json", "--limit", 1).stdout)[0]["path"] == folder
    scores = run(stack, "score", data).stdout.split()
    assert len(scores) == 2
    assert all(float(score) < 0 for score in scores)
    refused = run(stack, "score", "-", text='{"text": 1}')
    assert refused.returncode == 1
    assert "line 1" in refused.stderr


def test_without_colours_and_terminal(stack, data):
    """What a dry run would learn from is between marks, and a followed job has lines for a log."""
    shown = run(stack, "train", data, "--dry-run", env={"PYTHONUTF8": "1"}).stdout
    assert "«" in shown.splitlines()[0]
    assert "between « and »" in shown
    lines = run(stack, "train", data, "--follow", "--epochs", 6, "--batch-size", 1).stderr
    assert "step 1/12, loss" in lines
    assert "step 12/12, loss" in lines
    assert lines.count("loss") < 12


def test_interrupting_a_follower_leaves_its_job(stack, data):
    """Ctrl-C ends the command; it says that the job goes on, and how to end it."""
    job = json.loads(run(stack, "train", data, "--epochs", 5000, "--json").stdout)["id"]
    environment = os.environ | {"APOLLO_TP_RUNTIME_DIR": str(stack[0].folder)}
    command = [sys.executable, "-m", "apollo_tp.cli.main", "events", job, "--follow"]
    follower = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = follower.stderr.readline()
    follower.send_signal(signal.SIGINT)
    _, rest = follower.communicate(timeout=30)
    assert follower.returncode == 130, first + rest
    assert f"{job} goes on" in rest
    assert f"apollo-tp cancel {job}" in rest
    assert run(stack, "cancel", job).returncode == 0


def test_cancel(stack, data):
    """cancel ends a running job; cancelling what is over is refused with exit status 1."""
    job = json.loads(run(stack, "train", data, "--epochs", 5000, "--json").stdout)["id"]
    assert run(stack, "cancel", job).returncode == 0
    assert run(stack, "events", job, "--follow").returncode == 1
    again = run(stack, "resume", job)
    assert again.returncode == 1
    assert "409" in again.stderr


def test_errors_are_sentences(stack, data, tmp_path):
    """No traceback for what a user can get wrong; the exit status tells the kinds apart."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n{')
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"text": "x"}\n{"text": "Grüße"}\n'.encode("latin-1"))
    for arguments, status, words in [
        (("train", bad), 1, "line 2"),
        (("train", latin), 1, f"{latin}, line 2: got malformed JSON ('utf-8' codec"),
        (("train", tmp_path / "none"), 2, "No such file"),
        (("status", "--url", "localhost:8300"), 2, "--url: got 'localhost:8300', expected it to begin with http://"),
        (("compare", "--server", "localhost:8000"), 2, "--server: got 'localhost:8000', expected it to begin with"),
        (("compare", "--server", "http://127.0.0.1:9"), 1, "no server answers at http://127.0.0.1:9"),
        (("status", "--url", "http://127.0.0.1:9"), 3, "no coordinator answers"),
        (("events", "job-x"), 1, "404"),
        (("train", data, "--epochs", "0"), 1, "epochs"),
        (("nonsense",), 2, "invalid choice"),
    ]:
        done = run(stack, *arguments)
        assert done.returncode == status, done
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_a_guard_is_asked_for(stack, data, tmp_path):
    """With held-out samples; its options alone are wrong usage."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"text": "Hello"}\n')
    options = ("--validation", held_out, "--guard", "rollback", "--guard-every", 2, "--max-worse", 0.5)
    done = run(stack, "train", data, "--follow", "--json", *options)
    assert done.returncode == 0, done.stderr
    job = json.loads(run(stack, "jobs", "--json").stdout)[0]
    assert (job["num_validation"], job["guard"]["snapshot"][:5]) == (1, "ckpt-")
    assert job["spec"]["guard"] == {"action": "rollback", "every": 2, "max_worse": 0.5}
    assert run(stack, "train", data, "--max-worse", 1).returncode == 2
    refused = run(stack, "train", data, "--guard", "pause", "--guard-command")
    assert (refused.returncode, "service.guard_command" in refused.stderr) == (1, True)


def test_a_checkpoint_is_restored(stack):
    """By its name or id; a failure is said, with exit status 1."""
    _, ranks = stack
    made = json.loads(run(stack, "checkpoint", "--json").stdout)
    done = run(stack, "restore", made["name"])
    assert (done.returncode, done.stdout.split(" in ")[0]) == (0, f"{made['path']} restored"), done.stderr
    ranks.fail_restores = True
    failed = run(stack, "restore", made["id"])
    ranks.fail_restores = False
    assert (failed.returncode, failed.stdout) == (1, "failed: rank 1 raised CheckpointError: another checksum\n")
    assert made["name"] in run(stack, "checkpoints").stdout
    assert run(stack, "restore", "no/such").returncode == 1


def test_checkpoint_waits_until_it_is_written(stack):
    """However often the answer is "queued", which a real coordinator says after 600 s when asked to wait."""
    asked = []

    def respond(request, _):
        asked.append((request.command, request.path))
        over = len(asked) == 3
        return 200, {
            "id": "ckpt-1",
            "state": "succeeded" if over else "queued",
            "path": "/ckpt/1" if over else "",
            "error": "",
        }

    with served(respond) as url:
        done = run(stack, "checkpoint", "--url", url)
    assert (done.returncode, done.stdout) == (0, "/ckpt/1\n"), done.stderr
    assert asked == [("POST", "/checkpoint"), *[("GET", "/checkpoint/ckpt-1")] * 2]


def test_compare_says_how_far_server_and_trainer_are_apart(stack, completions):
    """The fake rank gives every token -0.5 (1 + its id / 100), the server -0.25 more."""
    arguments = ("compare", "--server", completions, "--tokens", 10)
    shown = run(stack, *arguments)
    assert shown.returncode == 0, shown.stderr
    assert "9 log-probabilities of random tokens beyond the window of 40," in shown.stdout
    assert json.loads(run(stack, *arguments, "--json").stdout)["tokens"] == 9
    assert "0.2500 nats in the mean, 0.2500 at most" in shown.stdout
    assert run(stack, *arguments, "--at-most", 0.3).returncode == 0
    assert run(stack, *arguments, "--at-most", 0.2).returncode == 1
    assert "401" in run(stack, *arguments, env={"VLLM_API_KEY": "wrong"}).stderr


@pytest.mark.parametrize(
    ("tokens", "limit", "window", "expected"),
    [
        (64, 2048, 0, (64, 1)),
        (64, 48, 0, (48, 1)),
        (1, 48, 0, (2, 1)),
        (9999, 5000, 0, (1024, 1)),
        (64, 2048, 512, (576, 513)),
        (64, 520, 512, (520, 513)),
        (64, 513, 512, (64, 1)),
        (64, 512, 512, (64, 1)),
        (64, 2048, 4096, (64, 1)),
        (1, 2048, 512, (514, 513)),
    ],
)
def test_compare_looks_beyond_the_window(tokens, limit, window, expected):
    """Within a window, a side that has none computes the same; where sequences cannot be longer, nothing is lost."""
    length, first = stretch(tokens, limit, window)
    assert (length, first) == expected
    assert length > first
