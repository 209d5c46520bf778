"""Pages of other sites, and vLLM's own HTTP application with CORS open to all: what a browser would let them read."""

import httpx
import pytest

from tests.support.fakes import CoordinatorProcess
from tests.support.jobs import CHAT
from tests.support.processes import ManagedProcess, free_port
from tests.support.vllm_api import command

EVIL = "http://evil.example"


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """vLLM's port and the coordinator behind it, which has an uploaded file."""
    folder = tmp_path_factory.mktemp("x")
    folder.chmod(0o700)
    environment = {"VLLM_PLUGINS": "apollo", "APOLLO_TP_INSTANCE": "i", "APOLLO_TP_CLAIMED": "1",
                   "APOLLO_TP_RUNTIME_DIR": str(folder)}  # fmt: skip
    port = free_port()
    options = ["--allowed-origins", '["*"]', "--allow-credentials"]
    server = ManagedProcess(command(port, *options), environment, folder / "vllm.log")
    try:
        with CoordinatorProcess(folder) as coordinator:
            with coordinator.client() as client:
                upload = {"file": ("a.jsonl", CHAT)}
                file = client.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).json()
            url = f"http://localhost:{port}"
            server.wait_for(f"{url}/train/status", 120)
            yield url, file["id"]
    finally:
        server.stop()


def test_no_page_of_another_site_reads_through_vllms_port(api):
    """vLLM answers with Access-Control-Allow-Origin, so the browser would show the page whatever we answer."""
    url, file = api
    for path in ("/v1/files", f"/v1/files/{file}/content", "/train/status", "/v1/fine_tuning/jobs"):
        answer = httpx.get(f"{url}{path}", headers={"Origin": EVIL, "Sec-Fetch-Site": "cross-site"})
        assert answer.headers["access-control-allow-origin"] in ("*", EVIL)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_origin")
        assert httpx.get(f"{url}{path}", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
        own = httpx.get(f"{url}{path}", headers={"Origin": url, "Sec-Fetch-Site": "same-origin"})
        assert own.status_code == httpx.get(f"{url}{path}").status_code == 200, path
    assert httpx.get(f"{url}/v1/files/{file}/content").content == CHAT
