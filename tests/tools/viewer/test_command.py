"""`distillcache serve`: what it refuses, what it leads to, and the command itself."""

import socket
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the viewer needs the extra `serve`")

from starlette.testclient import TestClient

from distillcache.schemas.config.serve import ServeConfig
from distillcache.schemas.errors import ConfigError
from distillcache.tools.cli import main
from distillcache.tools.viewer import command
from distillcache.tools.viewer.app import make_app
from distillcache.tools.viewer.guard import HEADERS, is_ours
from tests.tools.report.report_reading import ReadPage
from tests.tools.viewer.serving import HOST, client, read

__all__ = ["client"]  # a fixture


@pytest.mark.parametrize(
    "address",
    [
        "/row/38",
        "/row/-1",
        "/row/x",
        "/row/²",
        "/row/9999999999999999999999",
        "/row/1/token/16",
        "/row/..%2f..%2fetc%2fpasswd",
        "/row/%2e%2e/%2e%2e/manifest.json",
        "/%2fetc%2fpasswd",
        "//etc/passwd",
        "/manifest.json",
        "/segments/0000/plan.json",
        "/slot/resid/4",
        "/slot/..%2f..%2fmanifest.json/0",
        "/slot/topk_logits/0",
        "/slot?tap=../..&slot=0",
        "/static/../../etc/passwd",
    ],
)
def test_what_is_not_there_is_told_in_a_sentence(client: TestClient, address: str) -> None:
    answer = client.get(address)
    assert answer.status_code == 404
    assert "Traceback" not in answer.text
    assert "root:" not in answer.text
    assert ReadPage(answer.text).words.count("Not here") == 2  # its title and its heading


@pytest.mark.parametrize(
    "address", ["/rows?start=x", "/rows?split=../..", "/row/1?block=9", "/row/1?tap=..", "/search?ids=1;2"]
)
def test_what_makes_no_sense_is_told(client: TestClient, address: str) -> None:
    assert "must be" in read(client, address, 400).words


def test_only_reading_and_only_under_our_name(client: TestClient) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        answer = client.request(method, "/row/1")
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}
    head = client.head("/row/1")
    assert (head.status_code, head.content) == (200, b"")
    for host in (
        "evil.example",
        "evil.example:8321",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.5",
        "",
    ):
        assert client.get("/", headers={"host": host}).status_code == 421
    for host in ("127.0.0.1:8321", "[::1]:9", "LOCALHOST"):
        assert client.get("/rows", headers={"host": host}).status_code == 200
    for address in ("/", "/nope"):
        assert HEADERS.items() <= dict(client.get(address).headers).items()
    assert is_ours("10.0.0.5:80", (), exposed=True)
    assert is_ours("box.lan", ("Box.lan",), exposed=False)
    assert not is_ours("evil.example", ("box.lan",), exposed=True)


def test_a_fault_of_our_own_is_a_page_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillcache.tools.viewer.app.overview", lambda watched: 1 // 0)
    client = TestClient(make_app("cache", str(cache)), base_url=HOST, raise_server_exceptions=False)
    answer = client.get("/")
    assert answer.status_code == 500
    assert "The viewer failed; see the server log" in answer.text
    assert HEADERS.items() <= dict(answer.headers).items()


def test_forms_lead_to_pages(client: TestClient) -> None:
    for asked, to in (("/row?number=7", "/row/7"), ("/slot?tap=attn_out&slot=2", "/slot/attn_out/2")):
        answer = client.get(asked, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, to)


def test_what_cannot_be_served_is_told(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(cache), "--port", port]) == 2
        assert "another program uses this port" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert "neither a cache nor a run" in capsys.readouterr().err
    assert main(["serve", str(cache), "--host", "0.0.0.0"]) == 2
    assert "--expose" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PACKAGES", ("starlette", "no_such_package"))
    with pytest.raises(ConfigError) as caught:
        command.check_packages()
    assert caught.value.facts == {"missing": "no_such_package"}
    assert "pip install -e '.[serve]'" in caught.value.next


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    command.check_host(ServeConfig(target="x", host="localhost"))
    command.check_host(ServeConfig(target="x", host="0.0.0.0", expose=True))
    with command.listening("127.0.0.1", 0) as ear:
        port = ear.getsockname()[1]
        assert port > 0
        assert command.address_of(ear, "127.0.0.1") == f"http://127.0.0.1:{port}/"
        assert command.address_of(ear, "::1") == f"http://[::1]:{port}/"
