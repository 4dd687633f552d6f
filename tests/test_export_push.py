"""`fmdistill push` sends exactly the files of an intact export, and says in one line why it does not."""

import json
from pathlib import Path

import pytest

import fmdistill
from fmdistill.cli import main
from fmdistill.export import push
from fmdistill.export.folder import describe, whole_folder
from fmdistill.predict import artefact
from fmdistill.registry import UserError


class FakeApi:
    """Stores the calls that huggingface_hub's HfApi would get."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.error = error

    def create_repo(self, repo_id: str, **settings) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **settings}))

    def upload_folder(self, **settings) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("upload_folder", settings))


@pytest.fixture
def folder(tmp_path) -> Path:
    with whole_folder(tmp_path / "out", artefact.NAME, "an") as temporary:
        (temporary / "onnx").mkdir()
        (temporary / "onnx/encoder.onnx").write_bytes(b"x" * 1234)
        (temporary / "README.md").write_text("card")
        describe(temporary, kind="sam", format="onnx", precision="fp32", model={}, check={}, source={})
    return tmp_path / "out"


def test_a_dry_run_lists_what_would_go_without_network_or_token(folder, capsys, monkeypatch):
    monkeypatch.setattr(push, "_client", lambda: pytest.fail("asked for a client"))
    assert main(["push", str(folder), "me/sam-tinyvit", "dry_run=true", "private=true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = (folder / artefact.NAME).stat().st_size
    assert [line.split() for line in lines[:3]] == [
        [f"{size:,}", "fmdistill.json"],
        ["4", "README.md"],
        ["1,234", "onnx/encoder.onnx"],
    ]
    assert lines[3].endswith("bytes would go to https://huggingface.co/me/sam-tinyvit (private)")
    assert lines[3].split()[0] == f"{size + 1238:,}"
    assert fmdistill.push(folder, "me/sam-tinyvit", dry_run=True, private=True) == lines


def test_the_upload_is_one_commit_of_the_export_s_files(folder):
    api = FakeApi()
    lines = push.run(folder, "me/name", private=True, api=api)
    (created, settings), (uploaded, sent) = api.calls
    assert (created, uploaded) == ("create_repo", "upload_folder") and lines[-1].endswith("me/name (private)")
    assert settings == {"repo_id": "me/name", "private": True, "exist_ok": True, "repo_type": "model"}
    assert sent["repo_id"] == "me/name" and sent["folder_path"] == str(folder)
    assert sorted(sent["allow_patterns"]) == ["README.md", "fmdistill.json", "onnx/encoder.onnx"]
    push.run(folder, "me/name", api=(public := FakeApi()))
    assert public.calls[0][1]["private"] is None  # an existing repository stays as it is


def test_what_is_no_intact_export_is_refused_before_anything_is_sent(folder, tmp_path):
    api = FakeApi()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: has no fmdistill.json, so it is no folder that fmdistill exported"):
        push.run(tmp_path / "empty", "me/name", api=api)
    (folder / "notes.txt").write_text("private")
    with pytest.raises(UserError, match=r"notes.txt: is not of the export \(1 such\)"):
        push.run(folder, "me/name", api=api)
    (folder / "notes.txt").unlink()
    (folder / "onnx/encoder.onnx").write_bytes(b"y" * 1234)
    with pytest.raises(UserError, match=r"encoder.onnx: is not the file that was exported \(checksum\)"):
        push.run(folder, "me/name", dry_run=True)
    stored = json.loads((folder / artefact.NAME).read_text())
    (folder / artefact.NAME).write_text(json.dumps({**stored, "kind": "clip"}))
    with pytest.raises(UserError, match="was edited after the export"):
        push.run(folder, "me/name", api=api)
    assert api.calls == []


@pytest.mark.parametrize(
    "name", ["name", "me/", "a/b/c", "me/na me", "https://huggingface.co/me/name", "me/x--y", "me/a.git"]
)
def test_a_bad_name_of_a_repository_is_one_clear_line(folder, name, capsys):
    assert main(["push", str(folder), name, "dry_run=true"]) == 2
    assert capsys.readouterr().err.strip().endswith("expected OWNER/NAME, such as me/sam-tinyvit")


def test_a_missing_token_is_one_clear_line(folder, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["push", str(folder), "me/name"]) == 2
    assert "push: no token of Hugging Face; run `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err


def http_error(status: int) -> Exception:
    import httpx2 as httpx
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError("refused", response=httpx.Response(status, request=httpx.Request("POST", "https://x.org")))


def test_an_upload_that_fails_is_one_clear_line(folder):
    import httpx2 as httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    for error, says in (
        (httpx.ConnectError("no route"), r"huggingface.co cannot be reached \(ConnectError\)"),
        (ConnectionResetError("reset"), r"huggingface.co cannot be reached \(ConnectionResetError\)"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (http_error(401), "the token is not valid; run `hf auth login` again"),
        (http_error(403), "the token may not write"),
        (http_error(500), "try again later"),
    ):
        with pytest.raises(UserError, match=says) as raised:
            push.run(folder, "me/name", api=FakeApi(error))
        assert "\n" not in str(raised.value)
    with pytest.raises(KeyError):  # an error of ours keeps its traceback
        push.run(folder, "me/name", api=FakeApi(KeyError("bug")))
