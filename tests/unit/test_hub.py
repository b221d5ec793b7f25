"""Is a name there to be had? Asked of a hub of our own on this machine, which answers as it is told."""

from __future__ import annotations

import functools
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import hf_hub_url

from strop.errors import UserError
from strop.models import hf


def ask_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    url = functools.partial(hf_hub_url, endpoint=f"http://127.0.0.1:{port}")
    monkeypatch.setattr(hf, "hf_hub_url", url)


@pytest.fixture
def hub(monkeypatch):
    """hub(*answers) -> the paths it is asked for. An answer is (status, headers), or None to hang up."""
    answers: list = []
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            answer = answers.pop(0)
            if answer is not None:
                self.send_response(answer[0])
                for name, value in answer[1].items():
                    self.send_header(name, value)
                self.end_headers()

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ask_at(monkeypatch, server.server_port)

    def tell(*more):
        answers.extend(more)
        return asked

    yield tell
    server.shutdown()
    server.server_close()


GOOD = (200, {"ETag": '"e"', "X-Repo-Commit": "c" * 40, "Content-Length": "2"})


def check(name: str = "some/model") -> None:
    hf.check_hub("model.path", name, "v1", "config.json")


def test_a_model_on_the_hub(hub):
    asked = hub(GOOD)
    check()
    assert asked == ["/some/model/resolve/v1/config.json"]


def test_a_hub_that_hangs_up_is_asked_again(hub):
    asked = hub(None, None, GOOD)
    check()
    assert len(asked) == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_left_to_the_downloads_retries(hub, status):
    asked = hub((status, {}))
    check()
    assert len(asked) == 1


def test_no_such_model(hub):
    hub((404, {"X-Error-Code": "RepoNotFound"}))
    with pytest.raises(UserError, match=r"^model.path: 'some/model' is no directory .* the hub has none of"):
        check()


def test_no_hub(monkeypatch):
    """Nobody listens at port 9."""
    ask_at(monkeypatch, 9)
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"^model.path: 'some/model' is no directory .*HF_HUB_OFFLINE=1"):
        check()
    assert time.monotonic() - begin < 10


def test_names_that_need_no_hub(hub, tmp_path):
    asked = hub()
    check(str(tmp_path))
    with pytest.raises(UserError, match="cannot be one's name on the hub"):
        check("some/model/deep")
    assert asked == []
