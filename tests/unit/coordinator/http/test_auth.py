"""Who may do what, and that hostile frames and requests do nothing."""

import os
import socket
import stat
import struct
from base64 import b64encode

import msgspec
import pytest
import zmq

from apollo_tp.config import HttpConfig, ServiceConfig, ZmqConfig
from apollo_tp.coordinator.http.auth import Access, load_access
from apollo_tp.errors import ConfigError, RequestError
from apollo_tp.wire import codec, commands
from apollo_tp.wire import tunnel as tunnel_messages
from tests.support.fakes import CoordinatorProcess, FakeRanks, wait_for
from tests.support.figures import step_figures
from tests.support.frames import KINDS, NOT_UTF8, damaged, frame_of

ONE = {"context_ids": [1, 2], "continuation_ids": [3, 4]}
READ, TRAIN = "r" * 20, "t" * 20


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a")
    token_file = folder / "tokens"
    token_file.write_text(f"# two\nread:{READ}\ntrain:{TRAIN}\n")
    token_file.chmod(0o600)
    with (
        CoordinatorProcess(folder, token_file=str(token_file)) as coordinator,
        FakeRanks(coordinator.ranks_socket, folder / "journal") as ranks,
        coordinator.client() as client,
    ):
        wait_for(lambda: client.get("/health").json()["trainer"])
        yield coordinator, client, ranks


def every_route(client):
    document = client.get("/openapi.json", headers={"Authorization": f"Bearer {READ}"}).json()
    return [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]


def test_every_route_but_health_needs_a_token(guarded):
    """No token, a wrong one, an empty one: 401 on every route of the OpenAPI document except /health."""
    _, client, ranks = guarded
    before = len(ranks.commands)
    routes = every_route(client)
    assert len(routes) > 25
    for method, path in routes:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}, {"Authorization": TRAIN}):
            status = client.request(method, path.replace("{", "").replace("}", ""), headers=headers).status_code
            assert status == (200 if path == "/health" else 401), (method, path, headers)
    for path in ("/nope", "/openapi.json", "/docs", "/docs/assets/swagger-ui-bundle.js", "/docs/oauth2-redirect"):
        assert client.get(path).status_code == 401, path
    assert len(ranks.commands) == before


def test_scopes(guarded):
    """read may look at everything and change nothing; train may do both."""
    _, client, _ = guarded
    reader, trainer = {"Authorization": f"Bearer {READ}"}, {"Authorization": f"Bearer {TRAIN}"}
    for method, path in every_route(client):
        path = path.replace("{", "").replace("}", "")
        status = client.request(method, path, headers=reader).status_code
        assert (status == 403) == (method != "GET"), (method, path)
    assert client.post("/train", json=ONE | {"wait": True}, headers=trainer).json()["state"] == "succeeded"
    assert client.get("/train/status", headers=trainer).status_code == 200
    assert client.post("/train", json=ONE, headers={"X-Apollo-Token": TRAIN}).status_code == 202
    for page in ("/", "/docs"):
        assert client.get(page, auth=("anybody", READ)).status_code == 200
        assert "Basic" in client.get(page).headers["www-authenticate"]


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"origin": "http://[::1", "host": "a"}, 403, "cross_origin"),
        ({"origin": "null"}, 403, "cross_origin"),
        ({"origin": "http://b", "host": "a"}, 403, "cross_origin"),
        ({"authorization": "Basic é"}, 401, "no_token"),
        ({"authorization": "Basic =a"}, 401, "no_token"),
        ({"authorization": "Basic /w=="}, 401, "no_token"),
        ({"authorization": "Bearer é"}, 401, "bad_token"),
        ({"x-apollo-token": "é"}, 401, "bad_token"),
    ],
)
def test_headers_that_make_no_sense_are_refused(headers, status, code):
    """As an origin or a token that is not known, whatever they are made of."""
    with pytest.raises(RequestError) as error:
        Access([("train", TRAIN)]).check("POST", "/train", headers, None)
    assert (error.value.status, error.value.code) == (status, code)


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://127.0.0.1:8300", True),
        ("http://127.0.0.1:9999", False),
        ("http://127.0.0.1", False),
        ("http://localhost:8300", False),
    ],
)
def test_an_origin_is_a_host_with_its_port(origin, allowed):
    """A page that another server of this machine serves, perhaps another user's, is another site's."""
    headers = {"origin": origin, "host": "127.0.0.1:8300"}
    if allowed:
        Access([]).check("POST", "/train", headers, "127.0.0.1")
        return
    with pytest.raises(RequestError) as error:
        Access([]).check("POST", "/train", headers, "127.0.0.1")
    assert (error.value.status, error.value.code) == (403, "cross_origin")


@pytest.mark.parametrize(
    ("client", "headers", "allowed"),
    [
        ("127.0.0.1", {}, True),
        ("::1", {}, True),
        ("::ffff:127.0.0.1", {}, True),
        ("::ffff:192.0.2.1", {}, False),
        ("192.0.2.1", {}, False),
        ("127.0.0.1", {"x-forwarded-for": "127.0.0.1"}, False),
        ("127.0.0.1", {"forwarded": "for=127.0.0.1"}, False),
        ("127.0.0.1", {"x-real-ip": "127.0.0.1"}, False),
    ],
)
def test_without_tokens_this_machine_alone_is_served(client, headers, allowed):
    """Whatever form a loopback address has. Behind a proxy on this machine, a client may be anywhere."""
    if allowed:
        Access([]).check("GET", "/train/status", headers, client)
        return
    with pytest.raises(RequestError) as error:
        Access([]).check("GET", "/train/status", headers, client)
    assert (error.value.status, error.value.code) == (403, "not_local")


BEARER, BASIC = (
    {"authorization": f"Bearer {TRAIN}"},
    {"authorization": "Basic " + b64encode(f"x:{TRAIN}".encode()).decode()},
)
FOREIGN = ({"origin": "http://b", "host": "a"}, {"origin": "http://a:81", "host": "a:80"}, {"origin": "null", "host": "a"},
           {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"},
           {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"})  # fmt: skip
OWN = ({}, {"origin": "http://a:80", "host": "a:80"}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"})


def checked(access, method, path, headers):
    """The code of the refusal; None if the request is allowed."""
    try:
        access.check(method, path, headers, None)
    except RequestError as error:
        return error.code
    return None


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "PATCH"])
def test_other_sites_may_neither_change_nor_read(method):
    """Without a token, and with one that the browser adds by itself; a program that presents a token may read."""
    for path in ("/train/status", "/v1/files/file-1/content", "/train"):
        for headers in FOREIGN:
            assert checked(Access([]), method, path, headers) == "cross_origin", headers
            assert checked(Access([("train", TRAIN)]), method, path, headers | BASIC) == "cross_origin", headers
            reads = None if method in ("GET", "HEAD") else "cross_origin"
            for token in (BEARER, {"x-apollo-token": TRAIN}):
                assert checked(Access([("train", TRAIN)]), method, path, headers | token) == reads, headers
            # without tokens a made-up one proves nothing
            assert checked(Access([]), method, path, headers | BEARER) == "cross_origin", headers
        for headers in OWN:
            assert checked(Access([]), method, path, headers) is None, headers


def test_other_sites_may_link_to_the_pages():
    """A link is followed; a frame, an image or a script is not loaded. What is open to all is open to them."""
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    for path in ("/", "/docs"):
        assert checked(Access([]), "GET", path, link) is None
        assert checked(Access([]), "GET", path, link | {"sec-fetch-mode": "no-cors"}) == "cross_origin"
    assert checked(Access([]), "GET", "/health", {"origin": "http://b", "host": "a"}) is None


@pytest.mark.parametrize(
    "name", ["forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-prefix",
             "x-real-ip", "true-client-ip", "cf-connecting-ip", "x-client-ip", "x-envoy-external-address",
             "x-envoy-internal", "x-appengine-country", "x-amzn-trace-id", "x-amz-cf-id", "x-cloud-trace-context",
             "x-vercel-id", "x-nf-client-connection-ip", "x-azure-ref", "cf-visitor"],
)  # fmt: skip
def test_what_a_proxy_passed_on_needs_a_token(name):
    """Its client may be anywhere, whichever header says that there was one."""
    headers = {"host": "localhost", name: "127.0.0.1"}
    with pytest.raises(RequestError, match=f"a proxy forwarded .{name}") as error:
        Access([]).check("GET", "/train/status", headers, "127.0.0.1")
    assert error.value.code == "not_local"
    Access([("train", TRAIN)]).check("GET", "/train/status", headers | BEARER, "127.0.0.1")


def test_no_answer_repeats_a_foreign_host(guarded):
    """Neither in Location nor anywhere else; and no other site may frame a page."""
    _, client, _ = guarded
    for path in ("/train/", "/train/status/", "/v1/files/", "/docs/", "//evil.example/", "/"):
        answer = client.get(path, headers={"Host": "evil.example"} | BEARER)
        assert "location" not in answer.headers, path
        assert "evil" not in answer.text, path
    for path in ("/", "/docs"):
        answer = client.get(path, headers=BEARER)
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"], path


def test_a_host_that_is_none_is_refused():
    """Without tokens, as any other name that is not this machine's."""
    with pytest.raises(RequestError, match="got Host") as error:
        Access([]).check("POST", "/train", {"host": "[::1"}, "127.0.0.1")
    assert (error.value.status, error.value.code) == (403, "not_local")


def test_tokens_are_in_no_log(guarded):
    """Neither a right nor a wrong token, nor the Authorization header, is written to the log: also not in the line about a
    damaged request, which is logged after the others were answered."""
    coordinator, client, _ = guarded
    known = len(coordinator.log_path.read_text())
    client.get("/train/status", headers={"Authorization": "Bearer leaked-secret-123456"})
    client.get("/train/status", headers={"Authorization": f"Bearer {READ}"})
    client.get("/train/status?token=leaked-secret-123456")
    headers = [(b"authorization", f"Bearer {TRAIN}".encode())]
    frame = codec.encode(tunnel_messages.TunnelRequest(1, "GET", "/train/status", b"token=leaked-secret", headers))
    with zmq.Context.instance().socket(zmq.DEALER) as peer:
        peer.connect(f"ipc://{coordinator.instance_dir / 'coordinator.sock'}")
        peer.send(frame[:-1])
        wait_for(lambda: "on the tunnel" in coordinator.log_path.read_text()[known:])
    log = coordinator.log_path.read_text()
    for secret in (READ, TRAIN, "leaked-secret", "Bearer"):
        assert secret not in log


def test_sockets_and_files_are_private(guarded):
    """Sockets are 0600 in a 0700 folder; the state folder and what is in it are this user's alone."""
    coordinator, *_ = guarded
    for name in ("ranks.sock", "coordinator.sock", "coordinator.json"):
        assert stat.S_IMODE((coordinator.instance_dir / name).stat().st_mode) == 0o600, name
    state = coordinator.folder / "state"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert stat.S_IMODE((state / "jobs.sqlite3").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (f"train:{TRAIN}", 0o644, "0600"),
        ("", 0o600, "no token"),
        ("train:short", 0o600, "at least 16"),
        (f"root:{TRAIN}", 0o600, "'root'"),
    ],
)
def test_bad_token_files_are_refused(tmp_path, content, mode, words):
    """A token file that others can read, or without a good token, is refused at start, with the cure."""
    path = tmp_path / "tokens"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=words):
        load_access(ServiceConfig(token_file=str(path)))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_addresses_need_a_token(host, monkeypatch):
    """A non-loopback address without a token is refused; with one it is fine. So is one of ZMQ that is not used."""
    for option, service in (
        ("service.http.host", ServiceConfig(http=HttpConfig(host=host))),
        ("service.zmq.host", ServiceConfig(zmq=ZmqConfig(host=host, port=8301))),
    ):
        monkeypatch.delenv("APOLLO_TP_TOKEN", raising=False)
        with pytest.raises(ConfigError, match=f"{option}: got .* without a token"):
            load_access(service)
        monkeypatch.setenv("APOLLO_TP_TOKEN", TRAIN)
        load_access(service)
    monkeypatch.delenv("APOLLO_TP_TOKEN", raising=False)
    load_access(ServiceConfig(zmq=ZmqConfig(host=host)))


def test_a_taken_port_is_a_sentence(tmp_path):
    """The coordinator says which option to change, and exits non-zero."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        coordinator = CoordinatorProcess(tmp_path)
        coordinator.settings.service.http.port = taken.getsockname()[1]
        with pytest.raises(AssertionError, match=r"service\.http\.port"):
            coordinator.start()
        assert coordinator.process.wait(10) == 1


def hostile_frames():
    """Noise, truncations, other types, deep nesting, absurd sizes, damaged messages of every type."""
    yield b""
    yield b"\xff" * 1000
    yield from (os.urandom(size) for size in (1, 17, 300, 70_000))
    good = codec.encode(commands.Heartbeat(weight_version=10**9))
    yield from (good[:cut] for cut in range(0, len(good), 3))
    yield b"\x81" * 5000  # maps in maps
    yield b"\x91" * 100_000  # lists in lists
    yield NOT_UTF8
    for name in (b"\xa9Heartbeat", b"\xacTunnelCancel"):
        yield b"\x82\xa4type" + name + b"\xa1x" + b"\x91" * 100_000  # below a field that no message has
    for _, kind in KINDS:
        yield from damaged(frame_of(kind), 5, seed=1)
    yield b"\xdd" + struct.pack(">I", 2**32 - 1)  # a list that claims four billion entries
    yield b"\xc6" + struct.pack(">I", 2**32 - 1)
    yield codec.encode(commands.Shutdown(id="x", reason="a command, not a reply"))
    yield msgspec.msgpack.encode({"type": "Hello", "id": "x"})
    yield msgspec.msgpack.encode({"type": "os.system", "id": "x"})
    hello = FakeRanks("x", "no journal is written").hello()
    yield codec.encode(msgspec.structs.replace(hello, protocol_version=99))
    yield codec.encode(commands.StepDone(id="job-x/1", figures=step_figures(weight_version=5)))
    for identity in ("", "/", "job-x/notanumber", "job-x/-1", "job-x/" + "9" * 400):
        yield codec.encode(commands.CheckpointDone(id=identity, path="", num_bytes=0, seconds=0, weight_version=0))
    yield codec.encode(
        tunnel_messages.TunnelRequest(1, "GET\r\nX", "/../../etc/passwd\x00", b"\xff", [(b"\n", b"\r\n")])
    )
    yield codec.encode(tunnel_messages.TunnelRequest(-1, "", "", b"", []))
    yield codec.encode(tunnel_messages.TunnelRequest(2, "POST", "/train", b"", [(b"content-length", b"x" * 9999)]))
    yield codec.encode(tunnel_messages.TunnelBody(77, b"x", True))
    yield codec.encode(tunnel_messages.TunnelCancel(2**40))


@pytest.mark.parametrize("name", ["ranks.sock", "coordinator.sock"])
def test_hostile_frames_do_nothing(guarded, tmp_path, name):
    """Nothing crashes, nothing reaches the ranks, no job appears, and real work goes on."""
    coordinator, client, ranks = guarded
    headers = {"Authorization": f"Bearer {TRAIN}"}
    before = (len(ranks.commands), client.get("/train/jobs", headers=headers).json())
    context = zmq.Context.instance()
    for kind, parts in ((zmq.DEALER, 1), (zmq.DEALER, 3), (zmq.REQ, 1)):
        for frame in hostile_frames():
            with context.socket(kind) as peer:
                peer.setsockopt(zmq.LINGER, 200)
                peer.setsockopt(zmq.SNDTIMEO, 2000)
                peer.connect(f"ipc://{coordinator.instance_dir / name}")
                peer.send_multipart([frame] * parts)
    with socket.socket(socket.AF_UNIX) as raw:  # not even ZMQ
        raw.connect(str(coordinator.instance_dir / name))
        raw.sendall(os.urandom(4096))
    wait_for(lambda: client.get("/health").json()["trainer"])
    assert (len(ranks.commands), client.get("/train/jobs", headers=headers).json()) == before
    assert client.post("/train", json=ONE | {"wait": True}, headers=headers).json()["state"] == "succeeded"
    assert coordinator.process.poll() is None
    log = coordinator.log_path.read_text()
    assert {"ranks.sock": "bytes on the ranks' socket", "coordinator.sock": "bytes on the tunnel"}[name] in log
    assert '"exception"' not in log


def test_metrics(guarded):
    """/metrics parses, and its figures are those of the journal and of the jobs."""
    from prometheus_client.parser import text_string_to_metric_families

    _, client, ranks = guarded
    headers = {"Authorization": f"Bearer {TRAIN}"}
    client.post("/train", json=ONE | {"epochs": 3, "wait": True}, headers=headers)
    text = client.get("/metrics", headers=headers).text
    samples = {
        (sample.name, tuple(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    steps = len(ranks.applied())
    assert samples["apollo_steps_total", (("outcome", "completed"),)] == steps
    assert samples["apollo_weight_version", ()] == steps
    assert samples["apollo_tokens_total", ()] == 4 * steps
    assert samples["apollo_loss_nats", ()] == pytest.approx(5.0 / (1 + steps))
    assert samples["apollo_step_part_seconds_total", (("part", "backward"),)] == pytest.approx(0.2 * steps)
    assert samples["apollo_peak_memory_bytes", (("rank", "1"),)] == 2000
    assert samples["apollo_trainer_connected", ()] == 1
    assert samples["apollo_jobs", (("state", "succeeded"),)] > 0
