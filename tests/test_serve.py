"""The verb `serve`: its address, its settings, what it refuses, and that it ends on Ctrl-C."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import uvicorn
from served import LOCAL, answer, client, sam_runs

from fmdistill import serve
from fmdistill.cli import main
from fmdistill.registry import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sam_runs(tmp_path_factory.mktemp("serve"), "one")[0]


def test_the_page_is_open_to_this_machine_only():
    assert serve.ServeSettings().host == "127.0.0.1" and serve.ServeSettings().trust is False
    with serve.bind_address(serve.ServeSettings().host, None) as bound:
        assert serve.is_loopback(bound.getsockname()[0])


def test_a_busy_port_is_left_for_the_next_unless_it_was_named():
    with serve.bind_address("127.0.0.1", None) as first, serve.bind_address("127.0.0.1", None) as second:
        ports = [bound.getsockname()[1] for bound in (first, second)]
        assert serve.PORT <= ports[0] < ports[1] < serve.PORT + serve.TRIES
        with pytest.raises(UserError, match=f"port={ports[0]}: in use"):
            serve.bind_address("127.0.0.1", ports[0])


def test_a_host_that_is_not_this_machines_is_an_error():
    with pytest.raises(UserError, match="host=203.0.113.1: .*use 127.0.0.1"):
        serve.bind_address("203.0.113.1", 0)
    with pytest.raises(UserError, match="host=no.such.host.invalid: not an address"):
        serve.bind_address("no.such.host.invalid", 0)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_loopback_addresses_are_known(host, expected):
    assert serve.is_loopback(host) is expected


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "no run is named"),
        (["port=8000"], "no run is named"),
        (["nowhere"], "nowhere: not a run"),
        (["nowhere", "port=99999"], "port=99999: expected"),
        (["nowhere", "prot=1"], "serve.prot: no such setting.*Did you mean 'port'"),
        (["nowhere", "device=abacus", "trust=true"], "nowhere: not a run"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, reason):
    with pytest.raises(UserError, match=reason):
        serve.run(arguments)


def test_an_unfinished_run_is_refused(folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text((Path(folder) / "recipe.yaml").read_text())
    with pytest.raises(UserError, match="not finished"):
        serve.run([str(tmp_path), "trust=true", "port=0"])


def test_without_the_extra_the_error_names_it(monkeypatch, capsys):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert main(["serve", "anything"]) == 2
    assert "uvicorn not installed; pip install 'fmdistill[serve]'" in capsys.readouterr().err


def test_the_address_is_printed_and_a_foreign_host_is_warned_about(folder, monkeypatch, capsys, caplog):
    served = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: served.append(sockets[0].getsockname()))
    serve.run([folder, "trust=true", "device=cpu", "host=0.0.0.0", "port=0"])
    (address,) = served
    assert f"http://0.0.0.0:{address[1]}  (Ctrl-C ends it)" in capsys.readouterr().out
    assert "everyone who can reach this machine" in caplog.text


def test_pages_of_other_sites_are_refused(folder):
    page = client([folder])
    assert page.get("/").status_code == 200
    assert page.get("/api/session", headers={"Origin": LOCAL}).status_code == 200
    evil = page.post("/api/samples/0", headers={"Origin": "http://evil.example"})
    assert "another site" in answer(evil, 403)["error"]
    assert "null" in answer(page.post("/api/samples/0", headers={"Origin": "null"}), 403)["error"]
    pointed_here = page.get("/api/session", headers={"Host": "evil.example:8000"})
    assert "this machine only" in answer(pointed_here, 403)["error"]


def test_another_host_setting_allows_other_names(folder):
    page = client([folder], host="0.0.0.0", base_url="http://lab-machine:8000")
    assert page.get("/api/session").status_code == 200
    assert page.get("/api/session", headers={"Origin": "http://evil.example"}).status_code == 403


def test_the_page_loads_nothing_from_elsewhere(folder):
    page = client([folder])
    texts = {path: page.get(path) for path in ("/", "/page.js", "/base.css", "/page.css", "/pointing.js")}
    assert all(response.status_code == 200 for response in texts.values())
    policy = texts["/"].headers["content-security-policy"]
    assert policy.startswith("default-src 'self'") and "unsafe" not in policy
    for response in texts.values():
        assert not re.search(r"https?://|@import|@font-face", response.text)
    assert re.findall(r'(?:src|href)="([^"]+)"', texts["/"].text) == ["data:,", "base.css", "page.css", "page.js"]
    assert "onclick" not in texts["/"].text and "style=" not in texts["/"].text  # the policy would block them


@pytest.mark.slow
def test_the_verb_serves_until_it_is_interrupted(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "fmdistill", "serve", folder, f"port={port}", "device=cpu", "trust=true"]
    tests = str(Path(__file__).parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == f"http://127.0.0.1:{port}  (Ctrl-C ends it)\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/session", timeout=60) as response:
            assert b'"kind":"masks"' in response.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
