"""A model by its name: a folder, the hub's cache, or the hub, which is here a small server on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from canopyq.checkpoint.hub import model_folder
from canopyq.errors import CanopyError

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
FILES = {
    "config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}", "modeling_own.py": b"code",
    "pytorch_model.bin": b"pickle", "consolidated.safetensors": b"weights again", "original/params.json": b"{}",
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A hub with one model, some/model, of two revisions; a cache of its own. ``asked`` are the paths it was asked for,
    and ``close`` is a hub that cannot be reached."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def answer(self, content: bytes | None, **headers: str) -> None:
            self.send_response(404 if content is None else 200)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        def do_GET(self) -> None:
            asked.append(self.path)
            _, _, path = self.path.partition("some/model/")
            kind, revision, file = (path.split("?")[0].split("/", 2) + ["", ""])[:3]
            commit = COMMITS.get(revision, revision)
            if not path:
                self.answer(None, X_Error_Code="RepoNotFound")
            elif commit not in COMMITS.values():
                self.answer(None, X_Error_Code="RevisionNotFound")
            elif kind == "revision":
                siblings = [{"rfilename": name} for name in FILES]
                self.answer(json.dumps({"id": "some/model", "sha": commit, "siblings": siblings}).encode())
            elif kind == "tree":
                entries = [{"type": "file", "path": n, "size": len(c), "oid": n} for n, c in FILES.items()]
                self.answer(json.dumps(entries).encode())
            else:
                self.answer(FILES[file], ETag=f'"{commit[0]}-{file}"', X_Repo_Commit=commit)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()

    def use(endpoint: str) -> None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    use(f"http://127.0.0.1:{server.server_port}")
    yield SimpleNamespace(asked=asked, close=lambda: use("http://127.0.0.1:9"))
    server.shutdown()
    server.server_close()


def failure(name: str, revision: str | None = None) -> str:
    with pytest.raises(CanopyError) as caught:
        model_folder(name, revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_goes_before_the_hub(hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert model_folder("some/model") == Path("some/model") and not hub.asked
    assert "'v1'" in failure("some/model", "v1")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "nowhere", "no such/model", "../x/y"])
def test_what_is_neither_folder_nor_id(name: str, hub) -> None:
    assert repr(name) in failure(name) and not hub.asked


def test_a_model_is_fetched_once_without_code_or_pickles(hub) -> None:
    folder = model_folder("some/model")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    fetched = [path for path in hub.asked if "/resolve/" in path]
    assert model_folder("some/model") == folder
    assert [path for path in hub.asked if "/resolve/" in path] == fetched
    hub.close()
    assert model_folder("some/model") == folder and model_folder("some/model", COMMITS["main"]) == folder


def test_a_revision(hub) -> None:
    assert model_folder("some/model", "v1").name == COMMITS["v1"]
    assert "'v9'" in failure("some/model", "v9")
    hub.close()
    assert model_folder("some/model", "v1").name == COMMITS["v1"]
    assert "cannot be reached" in failure("some/model")  # of main there is nothing


def test_a_model_that_the_hub_does_not_have(hub) -> None:
    assert re.search(r"does not give 'nobody/nothing'.*404", failure("nobody/nothing"))
    assert len(hub.asked) == 1


def test_without_a_network(hub) -> None:
    hub.close()
    message = failure("some/model")
    assert "'some/model'" in message and "cannot be reached" in message and not hub.asked
