"""What training costs the server's clients, from two looks at its metrics on."""

import pytest

from apollo_tp.coordinator.http import server_metrics
from apollo_tp.coordinator.http.server_metrics import Figures, LatencyHistory, Mean
from tests.support.fakes import CoordinatorProcess, chat_stack, wait_for

SAMPLE = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]}


def figures(sum, count):
    return Figures(1.0, Mean(sum, count), None)


def test_intervals_with_and_without_training():
    """An interval counts what came since the look before; one in which training began or ended counts as neither, and a
    server that was started again has counted from zero."""
    history = LatencyHistory("http://server", lambda: False)
    history.add(0.0, figures(1.0, 100), False)
    assert history.points == []
    history.add(1.0, figures(2.0, 200), False)
    history.add(2.0, figures(5.0, 300), True)
    history.add(3.0, figures(9.0, 500), True)
    history.add(4.0, figures(0.5, 5), True)
    assert [point.training for point in history.points] == [False, None, True, True]
    assert history.means(False)["inter_token_seconds"] == Mean(1.0, 100)
    assert history.means(True)["inter_token_seconds"] == Mean(4.5, 205)
    assert history.means(True)["first_token_seconds"] == Mean()


def test_a_long_history_is_bounded(monkeypatch):
    """The older half becomes coarser; nothing that was counted is lost."""
    monkeypatch.setattr(server_metrics, "MAX_POINTS", 8)
    history = LatencyHistory("http://server", lambda: False)
    for second in range(101):
        history.add(float(second), figures(2.0 * second, second), second > 50)
    assert len(history.points) <= 8
    times = [point.time for point in history.points]
    assert times == sorted(times)
    assert times[-3:] == [98.0, 99.0, 100.0]
    total = sum((point.inter_token_seconds for point in history.points), start=Mean())
    assert total == Mean(200.0, 100)


def test_without_a_server(tmp_path):
    """The reason is said where there is no address, and where nobody answers at it; `after` leaves out what is known."""
    for url, reason in ((None, "service.server_url is not set"), ("http://127.0.0.1:9", "ValueError")):
        with CoordinatorProcess(tmp_path, server_url=url) as coordinator, coordinator.client() as client:
            found = wait_for(
                lambda c=client, r=reason: (a := c.get("/train/latency").json())["reason"].startswith(r) and a
            )
            assert not found["reachable"]
            assert found["data"] == []
            assert client.get("/train/latency", params={"after": "x"}).status_code == 400


@pytest.mark.parametrize("path", ["/", "/train/page/"])
def test_files_of_the_page(tmp_path, path):
    """The page's files come from this host under a policy without inline scripts, and nothing outside their folder does."""
    with CoordinatorProcess(tmp_path) as coordinator, coordinator.client() as client:
        answer = client.get(path)
        assert "script-src 'self';" in answer.headers["content-security-policy"]
        assert "unsafe-inline" not in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-cache"
        assert f'src="{"" if path == "/" else "./"}' in answer.text.replace("train/page/", "")
        script = client.get("/train/page/app.js")
        assert "javascript" in script.headers["content-type"]
        assert client.get("/train/page/uplot/LICENSE").text.startswith("The MIT License")
        for outside in ("../page.py", "%2e%2e/page.py", "../../../../etc/passwd", "no.js"):
            assert client.get(f"/train/page/{outside}").status_code == 404


def test_samples_of_a_job(tmp_path):
    """As they are trained on, while the job is not over; both sides of a preference pair."""
    with chat_stack(tmp_path) as (client, _ranks, _):
        job = client.post("/train", json={"samples": [SAMPLE, SAMPLE, SAMPLE], "epochs": 10_000}).json()["id"]
        page = client.get(f"/train/jobs/{job}/samples", params={"first": 1, "limit": 8}).json()
        assert [each["index"] for each in page["data"]] == [1, 2]
        assert not page["has_more"]
        dry = client.post("/train", json={"samples": [SAMPLE]}, params={"dry_run": True}).json()["samples"][0]
        assert page["data"][0] == dry | {"index": 1}
        assert client.get(f"/train/jobs/{job}/samples").json()["has_more"]
        assert client.get(f"/train/jobs/{job}/samples", params={"first": 3}).json()["data"] == []
        assert client.get(f"/train/jobs/{job}/samples", params={"limit": 9}).status_code == 400
        client.post(f"/train/jobs/{job}/cancel")
        wait_for(lambda: client.get(f"/train/jobs/{job}").json()["state"] == "cancelled")
        over = wait_for(lambda: (p := client.get(f"/train/jobs/{job}/samples").json())["reason"] and p)
        assert "removed" in over["reason"]
