"""The page, in a real headless Chromium on a real coordinator with a fake rank: what it shows, asks and refuses."""

import contextlib
import functools
import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from apollo_tp.config import CaptureConfig, LearnConfig
from apollo_tp.wire.capture import CAPTURES_PATH
from tests.support.chat_model import write_model
from tests.support.completions import fake_server
from tests.support.fakes import CoordinatorProcess, FakeRanks, chat_stack, wait_for
from tests.support.reinforcement import Stack
from tests.support.servers_port import ServersPort

selenium = pytest.importorskip("selenium.webdriver")
BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver on this machine")
SAMPLE = {"messages": [{"role": "user", "content": "hello <b>you</b>"}, {"role": "assistant", "content": "yes"}]}
READ, TRAIN = "read-token-0123456789", "train-token-0123456789"


@pytest.fixture(scope="module")
def browser():
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER)) as driver:
        yield driver


@pytest.fixture
def page(browser):
    """A context manager: the browser shows a URL; in the end it has asked no other host and complained about nothing."""

    @contextlib.contextmanager
    def opened(url, *, dark=False, width=1180):
        driver = browser
        metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get_log("performance"), driver.get_log("browser")
        driver.get(url)
        yield driver
        entries = driver.get_log("performance")
        without_token = functools.partial(re.sub, "//[^/@]*@", "//")  # as a browser knows it once it was typed
        own = re.match("http://[^/]*/", without_token(driver.current_url)).group()
        driver.get("about:blank")  # it asks this server no more
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        assert asked
        assert not [each for each in map(without_token, asked) if not each.startswith((own, "data:", "about:"))]
        complaints = [each["message"] for each in driver.get_log("browser") if each["level"] == "SEVERE"]
        assert all("status of 403" in each for each in complaints), complaints

    return opened


def run(driver, script):
    return driver.execute_script(f"const $ = id => document.getElementById(id); return {script}")


def until(driver, script, seconds=30):
    return wait_for(lambda: run(driver, script), seconds, script)


def text(driver, identity):
    return run(driver, f"$('{identity}').innerText")


def press(driver, selector):
    until(
        driver,
        f"(document.querySelector({selector!r}) || {{}}).offsetParent && !document.querySelector({selector!r}).disabled",
    )
    driver.execute_script(f"document.querySelector({selector!r}).click()")


def points(driver, chart, series=1):
    """The values of a line of a chart."""
    return run(driver, f"$('chart-{chart}')?.chart.uplot?.data[{series}]") or []


def luminance(driver, selector, what):
    colour = driver.execute_script(f"return getComputedStyle(document.querySelector('{selector}')).{what}")
    red, green, blue = (int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    with chat_stack(tmp_path_factory.mktemp("p"), step_seconds=0.05) as parts:
        yield parts


@pytest.mark.parametrize(("dark", "width"), [(False, 1180), (True, 390)], ids=["light", "dark-narrow"])
def test_a_running_job(stack, dark, width, page):
    """Its curves grow, it has its name and not its id, rows stay the same elements, the title has its progress; text is
    readable and nothing is wider than the screen. It is cancelled after a question."""
    client, _ranks, coordinator = stack
    with page(coordinator.url, dark=dark, width=width) as driver:
        until(driver, "$('progress').textContent === 'idle'")
        assert driver.title == "idle · apollo_tp"
        job = client.post("/train", json={"samples": [SAMPLE], "epochs": 3000, "metadata": {"name": "<i>greet</i>"}})
        job = job.json()["id"]
        until(driver, "document.querySelector('#jobs button')")
        first = wait_for(lambda: len(points(driver, "loss")) >= 3 and points(driver, "loss"), 30, "three points")
        driver.execute_script("window.row = document.querySelector('#jobs tr'); row.querySelector('button').focus()")
        wait_for(lambda: len(points(driver, "loss")) > len(first) + 5, 30, "a longer curve")
        shown = dict(zip(points(driver, "loss", 0), points(driver, "loss"), strict=True))
        assert shown.items() <= losses_of(client, job).items()
        assert run(driver, "window.row === document.querySelector('#jobs tr') && row.contains(document.activeElement)")
        assert "<i>greet</i>" in text(driver, "jobs")
        assert job not in text(driver, "jobs")
        assert re.fullmatch(r"\d+ % · \d+/3000 · apollo_tp", driver.title)
        back, letters = luminance(driver, ".card", "backgroundColor"), luminance(driver, "body", "color")
        assert (back < 0.3) == dark
        assert abs(back - letters) > 0.5
        assert run(driver, "document.documentElement.scrollWidth <= innerWidth")
        assert run(driver, "document.querySelector('#jobs button').getBoundingClientRect().right <= innerWidth")
        press(driver, "#jobs button[data-key=cancel]")
        until(driver, "$('confirm').open && document.activeElement.value === 'no'")
        press(driver, "#confirm [value=no]")
        assert client.get(f"/train/jobs/{job}").json()["state"] == "running"
        press(driver, "#jobs button[data-key=cancel]")
        press(driver, "#confirm-yes")
        wait_for(lambda: client.get(f"/train/jobs/{job}").json()["state"] == "cancelled")
        until(driver, "$('announce').textContent.endsWith('cancelled')")
        until(driver, "document.title === 'idle · apollo_tp'")


def losses_of(client, job):
    events = client.get(f"/train/jobs/{job}/events?limit=10000").json()["data"]
    return {each["data"]["step"]: each["data"]["train_loss"] for each in events if each["type"] == "metrics"}


def test_charts_of_two_jobs(stack, page):
    """Two jobs in one chart by their link; zoom by keyboard, smoothing and log scale; the axis has the steps or the time."""
    client, _ranks, coordinator = stack
    names = ("first", "second")
    jobs = [client.post("/train", json={"samples": [SAMPLE], "epochs": 20, "wait": True, "metadata": {"name": name}}).json()
            for name in names]  # fmt: skip
    assert {job["state"] for job in jobs} == {"succeeded"}
    with page(f"{coordinator.url}/#job={jobs[0]['id']}&with={jobs[1]['id']}") as driver:
        until(driver, "$('chart-loss')?.chart.uplot?.data.length === 3")
        assert all(name in text(driver, "chart-loss") for name in names)
        assert all(points(driver, "loss", n) == list(losses_of(client, jobs[n - 1]["id"]).values()) for n in (1, 2))
        assert "first" in text(driver, "job-title")
        width = "const x = $('chart-loss').chart.uplot.scales.x, y = $('chart-rate').chart.uplot.scales.x;"
        driver.execute_script("document.querySelector('#chart-loss .plot').focus()")
        focused = driver.switch_to.active_element
        focused.send_keys("\ue012")  # an arrow key
        assert "first" in run(driver, "document.querySelector('#chart-loss [role=status]').textContent")
        focused.send_keys("+")
        zoomed = f"(() => {{ {width} return [x.max - x.min, y.max - y.min] }})()"
        assert until(driver, f"{zoomed}[0] < 10 && {zoomed}[1] < 10")
        focused.send_keys("\ue00c")
        assert until(driver, f"{zoomed}[0] === 19")
        driver.execute_script(
            "document.getElementById('log').click(); const s = document.getElementById('smoothing');"
            "s.value = 0.9; s.dispatchEvent(new Event('input'))"
        )
        until(driver, "$('chart-loss').chart.uplot.data.length === 5")
        raw, smooth = points(driver, "loss", 1), points(driver, "loss", 2)
        assert smooth[0] == pytest.approx(raw[0])
        assert raw[-1] < smooth[-1] < raw[0]
        assert run(driver, "$('chart-loss').chart.uplot.scales.y.distr") == 3
        driver.execute_script(
            "const o = document.getElementById('over'); o.value = 'time'; o.dispatchEvent(new Event('input'))"
        )
        until(driver, f"$('chart-loss').chart.uplot.data[0][0] > {time.time() - 3600}")


def test_latency_beside_the_loss(tmp_path, page):
    """What the server's metrics say while a job runs and while none does, as means and over the job's steps."""
    served, slow = {"sum": 0.0, "count": 0}, threading.Event()

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self):
            served["count"] += 100
            served["sum"] += 100 * (0.02 if slow.is_set() else 0.005)
            name = "vllm:inter_token_latency_seconds"
            lines = f"# TYPE {name} histogram\n{name}_sum {served['sum']}\n{name}_count {served['count']}\n"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(lines.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Metrics)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with (
        chat_stack(tmp_path, step_seconds=0.05, server_url=url) as (client, _ranks, coordinator),
        page(coordinator.url) as driver,
    ):
        until(driver, "$('latency').textContent === '5.00 ms'")
        slow.set()
        client.post("/train", json={"samples": [SAMPLE], "epochs": 3000})
        until(driver, "($('chart-latency').chart.uplot?.data.at(-2) || []).filter(v => v != null).length >= 2")
        until(driver, "$('latency').textContent === '20.0 ms'")
        until(driver, "$('latencynote').textContent.startsWith('mean 20.0 ms while training, ')")
        steps = [
            x for x, y in zip(points(driver, "latency", 0), points(driver, "latency", 1), strict=True) if y is not None
        ]
        assert all(1 <= step <= 3000 for step in steps)
        assert steps == sorted(steps)
        assert "mean without training" in text(driver, "chart-latency")
    server.shutdown()
    server.server_close()


def test_a_jobs_samples_error_and_events(stack, page):
    """Tokens with the loss mask, of a queued job and of a dry run; a traceback as text; the link to the job."""
    client, ranks, coordinator = stack
    ranks.fail_at = {3}
    job = client.post("/train", json={"samples": [SAMPLE, SAMPLE], "epochs": 9}).json()["id"]
    client.post(f"/train/jobs/{job}/pause")
    with page(f"{coordinator.url}/#job={job}") as driver:
        press(driver, "#sample-after")
        until(driver, "$('sample-note').textContent.startsWith('Sample 1 of 2: ')")
        assert "hello <b>you</b>" in text(driver, "sample")
        assert run(driver, "document.querySelector('#sample mark').textContent").startswith("yes")
        assert not run(driver, "document.querySelector('#sample mark').textContent.includes('hello')")
        press(driver, "#try button")
        until(driver, "document.querySelector('#tried mark')?.textContent.startsWith('I am Apollo.')")
        client.post(f"/train/jobs/{job}/resume")
        until(driver, "!$('job-error').hidden")
        press(driver, "#job-trace summary")
        assert "RuntimeError: boom" in text(driver, "job-trace")
        assert "of rank 1" in text(driver, "job-trace")
        until(driver, "$('job-events').innerText.includes('Error: Job failed')")
        until(driver, "$('sample-after').disabled")
    ranks.fail_at = set()


def test_save_and_restore(stack, page):
    """A checkpoint is written by a button, and put back after a question that says what is lost."""
    client, ranks, coordinator = stack
    client.post("/train", json={"samples": [SAMPLE], "wait": True})
    with page(coordinator.url) as driver:
        press(driver, "#save")
        press(driver, "#checkpoints button:not([hidden])")
        until(driver, "$('confirm').open")
        assert "are replaced by" in text(driver, "confirm")
        press(driver, "#confirm-yes")
        wait_for(lambda: ranks.restores())
        until(driver, "$('checkpoints').innerText.includes('restored')")


def test_a_read_token_is_told_what_it_may_not(tmp_path, page):
    """The page shows everything with it; what it may not do is said in a sentence, and its buttons end."""
    tokens = {"APOLLO_TP_TOKEN": f"read:{READ}\n{TRAIN}"}
    with (
        CoordinatorProcess(tmp_path, env=tokens) as coordinator,
        FakeRanks(coordinator.ranks_socket, tmp_path / "journal"),
        page(coordinator.url.replace("http://", f"http://any:{READ}@")) as driver,
    ):
        until(driver, "$('dot').className === 'dot on'")
        press(driver, "#save")
        until(driver, "$('problem').textContent.startsWith('The token that you gave may only read.')")
        assert run(driver, "$('save').disabled && !$('problem').hidden")
        refused = httpx.get(f"{coordinator.url}/train/page/app.js")
        assert refused.status_code == 401


def test_the_model_is_asked_on_the_servers_port(stack, page):
    """The box is there alone; the answer is text, with the weight version that was served."""
    client, _ranks, coordinator = stack
    server = ThreadingHTTPServer(("127.0.0.1", 0), ServersPort)
    server.coordinator = coordinator.url
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with page(f"http://127.0.0.1:{server.server_port}/train/page/") as driver:
        until(driver, "!$('ask').hidden")
        driver.find_element("id", "question").send_keys("who?\n")
        until(driver, "$('answers').innerText.includes('<b>who?</b> of fake')")
        assert f"weight version {client.get('/train/status').json()['trainer']['weight_version']}" in text(
            driver, "answers"
        )
    server.shutdown()
    server.server_close()
    with page(coordinator.url) as driver:
        until(driver, "!$('askelsewhere').hidden")
        assert run(driver, "$('ask').hidden")


def test_rewards_and_completions_of_a_job_are_shown(tmp_path, page):
    """The curve of mean rewards, and what was sampled, as text whatever it contains."""
    with fake_server() as server:
        server.text = lambda prompt, index: "yes" if index % 2 else "<b>no</b>"
        stack = Stack(tmp_path, server)
        with stack.running(step_seconds=0.1):
            job = stack.create(n_epochs=20)
            with page(f"{stack.coordinator.url}/#job={job.id}") as driver:
                wait_for(lambda: len(points(driver, "reward")) >= 3, 30, "three points of the rewards")
                assert set(points(driver, "reward")) == {0.5}
                shown = text(driver, "job-completions")
                assert "question 0" in shown
                assert "<b>no</b>" in shown
                assert re.search(r"mean of step \d+: 0\.500", shown)
                assert text(driver, "job-title") == "a.jsonl"
                assert points(driver, "mismatch")


def test_feedback_is_shown_without_words(tmp_path, page):
    """From which session, and when it was learned; the section is there only where completions are stored."""
    settings = {"capture": CaptureConfig(enabled=True), "learn": LearnConfig(every_samples=2)}
    with (
        CoordinatorProcess(tmp_path, settings=settings) as coordinator,
        coordinator.client() as client,
        FakeRanks(coordinator.ranks_socket, tmp_path / "journal"),
    ):
        wait_for(lambda: client.get("/health").json()["trainer"])
        choice = {"index": 0, "text": "secret", "token_ids": [5], "logprobs": [-0.5], "finish_reason": "stop"}
        for number in range(3):
            record = {
                "id": f"chatcmpl-{number}", "session": f"<i>{number}</i>", "model": "demo", "created": time.time(),
                "prompt_ids": [1, 2], "choices": [choice], "temperature": 1.0,
            }  # fmt: skip
            assert client.post(CAPTURES_PATH, json=record).status_code == 204
            body = {"completion_id": f"chatcmpl-{number}", "reward": number / 4}
            assert client.post("/feedback", json=body).status_code == 202
        wait_for(lambda: client.get("/train/feedback").json()["waiting"] == 1)
        with page(coordinator.url) as driver:
            until(driver, "$('feedbackcard').innerText.includes('chatcmpl-2')")
            shown = text(driver, "feedbackcard")
            assert "1 not learned yet" in shown
            assert "<i>2</i>" in shown
            assert "not yet" in shown
            until(driver, "$('feedbackcard').innerText.includes('Feedback: 2 rewards')")
            assert "secret" not in shown


def test_a_lost_coordinator_is_said(tmp_path, page):
    """When it stops answering, the page says so, and comes back by itself. With nothing to show it says how to begin."""
    with (
        CoordinatorProcess(tmp_path, model_path=write_model(tmp_path / "model")) as coordinator,
        FakeRanks(coordinator.ranks_socket, tmp_path / "journal"),
        page(coordinator.url) as driver,
    ):
        until(driver, "$('dot').className === 'dot on'")
        until(driver, "$('layout').textContent.includes('embed_tokens')")
        assert f"apollo-tp --url {coordinator.url} train" in text(driver, "nojobs")
        assert f"apollo-tp --url {coordinator.url} checkpoint" in text(driver, "nocheckpoints")
        driver.execute_script(
            "window.real = fetch; window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))"
        )
        until(driver, "$('problem').textContent.startsWith('The coordinator does not answer')")
        driver.execute_script("window.fetch = window.real")
        until(driver, "$('problem').hidden && $('dot').className === 'dot on'")


def test_every_control_has_a_name(stack, page):
    """As assistive technology sees it: buttons, fields, links and charts; one heading of each section; no id twice."""
    _client, _ranks, coordinator = stack
    with page(coordinator.url) as driver:
        until(driver, "$('chart-loss')?.chart.uplot && $('jobs').children.length")
        nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        named = (
            "button",
            "textbox",
            "link",
            "checkbox",
            "slider",
            "combobox",
            "application",
            "region",
            "spinbutton",
            "table",
        )
        roles = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node["ignored"]]
        unnamed = [each for each in roles if each[0] in named and not each[1] and each[0] != "table"]
        assert {"button", "checkbox", "slider", "application", "region"} <= {role for role, _ in roles}
        assert unnamed == []
        ids = run(driver, "[...document.querySelectorAll('[id]')].map(node => node.id)")
        assert len(ids) == len(set(ids))


def test_the_api_documentation_needs_no_other_host(stack, page):
    """/docs shows every operation of /openapi.json, with files from the coordinator alone."""
    client, _ranks, coordinator = stack
    operations = [name for path in client.get("/openapi.json").json()["paths"].values() for name in path]
    with page(f"{coordinator.url}/docs") as driver:
        count = "return document.querySelectorAll('.opblock').length"
        wait_for(lambda: driver.execute_script(count) == len(operations) > 25, 30, "all operations")
    # not asked from 127.0.0.1 in any case: Swagger UI has the document checked by a public service
    assert '"validatorUrl": null' in client.get("/docs").text
