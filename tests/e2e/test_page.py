"""The page at /, in a real headless Chromium: a running job's curve moves; dark and light; nothing from another host."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from tests.support.completions import fake_server
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for
from tests.support.reinforcement import Stack

selenium = pytest.importorskip("selenium.webdriver")
BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver on this machine")
ONE = {"context_ids": [1, 2], "continuation_ids": [3, 4]}
SCREENSHOT = Path(__file__).parents[2] / "out" / "page.png"


def browser(dark):
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1180,1000",
    ):
        options.add_argument(argument)
    if dark:
        options.add_argument("--blink-settings=preferredColorScheme=0")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("p")
    with (
        CoordinatorProcess(folder) as coordinator,
        coordinator.client() as client,
        FakeRanks(coordinator.ranks_socket, folder / "journal", step_seconds=0.1),
    ):
        wait_for(lambda: client.get("/health").json()["trainer"])
        yield coordinator, client


def points(driver):
    curve = driver.execute_script("return document.getElementById('losscurve')?.getAttribute('points')")
    return len(curve.split()) if curve else 0


def luminance(driver, selector, what):
    colour = driver.execute_script(f"return getComputedStyle(document.querySelector('{selector}')).{what}")
    red, green, blue = (int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


def assert_only_asked(driver, coordinator):
    """The page asked the coordinator, no other host, and the browser complained about nothing."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [message for message in messages if message["method"] == "Network.requestWillBeSent"]
    urls = [message["params"]["request"]["url"] for message in asked]
    assert urls
    assert all(url.startswith((coordinator.url, "data:")) for url in urls), urls
    severe = [
        entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE" and "favicon" not in entry["message"]
    ]
    assert severe == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_running_jobs_curve_moves(stack, dark):
    """The curve grows while the job runs, figures agree with the status, text is readable, no other host is asked."""
    coordinator, client = stack
    job = client.post("/train", json=ONE | {"epochs": 600}).json()["id"]
    with browser(dark) as driver:
        driver.get(coordinator.url)
        first = wait_for(lambda: points(driver) >= 3 and points(driver), 30, "three points of the curve")
        wait_for(lambda: points(driver) > first + 3, 30, "a longer curve")
        step = wait_for(
            lambda: driver.execute_script("return document.getElementById('step').textContent").split("/")[0].strip()
        )
        assert abs(int(step) - client.get(f"/train/jobs/{job}").json()["step"]) < 60
        assert job in driver.execute_script("return document.getElementById('jobs').textContent")
        assert "embed_tokens" in driver.execute_script("return document.getElementById('layout').textContent")
        back, text = luminance(driver, ".card", "backgroundColor"), luminance(driver, "body", "color")
        assert (back < 0.3) == dark
        assert abs(back - text) > 0.5
        assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        if not dark:
            SCREENSHOT.parent.mkdir(exist_ok=True, parents=True)
            driver.save_screenshot(str(SCREENSHOT))
        driver.execute_script(
            "[...document.querySelectorAll('#jobs button')].find(b => b.textContent === 'cancel').click()"
        )
        wait_for(lambda: client.get(f"/train/jobs/{job}").json()["state"] == "cancelled")
        assert_only_asked(driver, coordinator)


def test_rewards_and_completions_of_a_job_are_shown(tmp_path):
    """The curve of mean rewards, and what was sampled, as text whatever it contains."""
    with fake_server() as server:
        server.text = lambda prompt, index: "yes" if index % 2 else "<b>no</b>"
        stack = Stack(tmp_path, server)
        with stack.running(step_seconds=0.1), browser(False) as driver:
            driver.get(stack.coordinator.url)
            wait_for(lambda: driver.execute_script("return document.getElementById('dot').className") == "dot on")
            assert driver.execute_script("return document.getElementById('rewards').hidden")
            stack.create(n_epochs=20)
            curve = "return document.getElementById('rewardcurve')?.getAttribute('points').split(' ').length"
            wait_for(lambda: (driver.execute_script(curve) or 0) >= 3, 30, "three points of the rewards")
            shown = driver.execute_script("return document.getElementById('rewards').innerText")
            assert "question 0" in shown
            assert "<b>no</b>" in shown
            assert re.search(r"mean of step \d+: 0\.500", shown)
            assert_only_asked(driver, stack.coordinator)


def test_a_lost_coordinator_is_said(stack):
    """When the coordinator stops answering, the page says so, and comes back by itself."""
    coordinator, _client = stack
    with browser(False) as driver:
        driver.get(coordinator.url)
        wait_for(lambda: driver.execute_script("return document.getElementById('dot').className") == "dot on")
        driver.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        wait_for(
            lambda: "does not answer" in driver.execute_script("return document.getElementById('problem').textContent")
        )
        driver.execute_cdp_cmd(
            "Network.emulateNetworkConditions", offline | {"offline": False, "downloadThroughput": -1}
        )
        time.sleep(0.1)
        wait_for(lambda: driver.execute_script("return document.getElementById('problem').textContent") == "")


def test_the_api_documentation_needs_no_other_host(stack):
    """/docs shows every operation of /openapi.json, with files from the coordinator alone."""
    coordinator, client = stack
    operations = [name for path in client.get("/openapi.json").json()["paths"].values() for name in path]
    with browser(False) as driver:
        driver.get(f"{coordinator.url}/docs")
        count = "return document.querySelectorAll('.opblock').length"
        wait_for(lambda: driver.execute_script(count) == len(operations) > 25, 30, "all operations")
        assert_only_asked(driver, coordinator)
    # not asked from 127.0.0.1 in any case: Swagger UI has the document checked by a public service
    assert '"validatorUrl": null' in client.get("/docs").text
