"""The engine behind an OpenAI-compatible server: every fault, bounded concurrency, nothing lost."""

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qalign.core import UserError
from qalign.engine import EngineError, load_engine
from qalign.server import ServerEngine, load_server

JSON, HTML = "application/json", "text/html"
CHAT = [{"role": "user", "content": "Say hello."}]


def completion(text: str | None, **more: Any) -> tuple[int, str, bytes]:
    reply = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
        **more,
    }
    return 200, JSON, json.dumps(reply).encode()


class Seen(list):
    busy = 0
    most = 0


@contextmanager
def stand_in(answer: Any, delay: float = 0.0, **options: Any) -> Iterator[tuple[ServerEngine, Seen]]:
    "A loopback server whose answer is a value, or a function of the request."
    seen, lock = Seen(), threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append(body)
                seen.busy += 1
                seen.most = max(seen.most, seen.busy)
            time.sleep(delay)
            with lock:
                seen.busy -= 1
            out = answer(body) if callable(answer) else answer
            if out is None:
                return
            status, kind, data = out
            try:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass

        def log_message(self, *_: Any) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        options = {"retries": 0, **options}
        yield ServerEngine("m", f"http://127.0.0.1:{httpd.server_port}/v1", **options), seen
    finally:
        httpd.shutdown()
        httpd.server_close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, JSON, b"{{{"), "not a chat completion"),
        ((200, JSON, b""), "not a chat completion"),
        ((200, JSON, b"null"), "not a chat completion"),
        ((200, JSON, b"[]"), "not a chat completion"),
        ((200, JSON, b'{"choices": []}'), "not a chat completion"),
        ((200, JSON, b'{"choices": [{"index": 0}]}'), "not a chat completion"),
        ((200, HTML, b"<html>hello</html>"), "not a chat completion"),
        ((200, "text/plain", b"ok"), "not a chat completion"),
        ((200, JSON, b"\xff\xfe\x00"), "not a chat completion"),
        ((500, JSON, b'{"error": {"message": "out of memory"}}'), "status 500"),
        ((500, HTML, b"<html>Internal\n\nError</html>"), "status 500"),
        ((429, JSON, b"{}"), "status 429"),
        ((400, JSON, b'{"error": {"message": "schema not supported"}}'), "status 400"),
        ((404, JSON, b"{}"), "/v1/models lists the models"),
        ((401, JSON, b"{}"), "OPENAI_API_KEY"),
        ((403, JSON, b"{}"), "OPENAI_API_KEY"),
        (None, "is it running"),
    ],
)
def test_each_fault_is_one_line(answer: Any, message: str) -> None:
    with stand_in(answer) as (server, _), pytest.raises(EngineError) as caught:
        server.complete([CHAT, CHAT])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert server.base_url in str(caught.value) and "0 of 2 replies came" in str(caught.value)
    assert caught.value.replies == [None, None]
    assert server.usage.requests == 0


def test_nobody_listens() -> None:
    server = ServerEngine("m", "http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(EngineError, match="cannot be reached"):
        server.complete([CHAT])


def test_a_slow_server_times_out() -> None:
    slow = stand_in(completion("x"), delay=1.0, timeout=0.2)
    with slow as (server, _), pytest.raises(EngineError, match="in time"):
        server.complete([CHAT])


def test_replies_keep_their_places_and_what_came_is_kept() -> None:
    def answer(body: dict[str, Any]) -> tuple[int, str, bytes]:
        text = body["messages"][0]["content"]
        return (500, JSON, b"{}") if text in ("2", "5") else completion(f"re {text}")

    chats = [[{"role": "user", "content": str(i)}] for i in range(8)]
    with stand_in(answer) as (server, _):
        with pytest.raises(EngineError, match="6 of 8 replies came") as caught:
            server.complete(chats)
        assert caught.value.replies == [None if i in (2, 5) else f"re {i}" for i in range(8)]
        assert (server.usage.requests, server.usage.prompt_tokens, server.usage.reply_tokens) == (6, 42, 12)


@pytest.mark.parametrize("parallel", [1, 3])
def test_requests_in_flight_are_bounded(parallel: int) -> None:
    with stand_in(completion("x"), delay=0.05, parallel=parallel) as (server, seen):
        assert server.complete([CHAT] * 9) == ["x"] * 9
    assert seen.most == parallel and len(seen) == 9


def test_the_client_tries_again() -> None:
    calls = iter([(503, JSON, b"{}"), (500, JSON, b"{}"), completion("ok")])
    with stand_in(lambda _: next(calls), retries=2) as (server, seen):
        assert server.complete([CHAT]) == ["ok"]
    assert len(seen) == 3


def test_what_is_sent() -> None:
    schema = {"type": "object"}
    with stand_in(completion("{}")) as (server, seen):
        server.complete([CHAT], max_tokens=9, temperature=0.5, top_p=0.9, seed=4, schema=schema)
        server.complete([CHAT])
    first, second = seen
    sent = (first["model"], first["messages"], first["max_tokens"], first["temperature"], first["top_p"], first["seed"])
    assert sent == ("m", CHAT, 9, 0.5, 0.9, 4)
    assert first["response_format"]["json_schema"]["schema"] == schema
    assert "response_format" not in second and second["temperature"] == 0


def test_an_empty_reply_is_a_reply_and_usage_may_be_missing() -> None:
    with stand_in(completion(None, usage=None)) as (server, _):
        assert server.complete([CHAT]) == [""]
        assert (server.usage.requests, server.usage.prompt_tokens) == (1, 0)


def test_no_chats_no_requests() -> None:
    with stand_in(completion("x")) as (server, seen):
        assert server.complete([]) == [] and not seen


def test_openings_are_refused() -> None:
    with pytest.raises(UserError, match="cannot begin a reply"):
        ServerEngine("m", "http://127.0.0.1:9/v1").complete([CHAT], openings=["Well,"])


@pytest.mark.parametrize(
    "spec", ["openai:", "openai:m", "openai:@http://x/v1", "openai:m@", "openai:m@ftp://x", "m@http://x"]
)
def test_bad_specifications(spec: str) -> None:
    with pytest.raises(UserError, match="expected openai:MODEL@BASE_URL"):
        load_server(spec)


def test_load_engine_hands_on() -> None:
    engine = load_engine("openai:org/m@http://127.0.0.1:9/v1/")
    assert isinstance(engine, ServerEngine) and engine.spec == "openai:org/m@http://127.0.0.1:9/v1"
    assert load_server(engine.spec) == engine
