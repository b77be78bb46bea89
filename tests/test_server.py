"""The engine behind an OpenAI-compatible server: every fault, bounded concurrency, nothing lost; exact labels."""

import http.server
import json
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qalign.server
from qalign.core import UserError
from qalign.engine import EngineError, HFEngine, embedded_model, frame_of, load_engine, load_model
from qalign.judge import LABELS, Judge
from qalign.rubric import load_rubric, select
from qalign.server import (
    LabelTree,
    ServerEngine,
    broken_up,
    first_token_probs,
    load_server,
    repeat_seeds,
    tokens_of,
)

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
def stand_in(
    answer: Any, delay: float = 0.0, models: Any = None, **options: Any
) -> Iterator[tuple[ServerEngine, Seen]]:
    "A loopback server whose answer is a value, or a function of the request; `models` is what it lists."
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
            if out is not None:
                self.say(out)

        def do_GET(self) -> None:
            self.say(models or (404, JSON, b"{}"))

        def say(self, out: tuple[int, str, bytes]) -> None:
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
    assert sent == ("m", CHAT, 9, 0.5, 0.9, *repeat_seeds([CHAT], 4))
    assert first["response_format"]["json_schema"]["schema"] == schema
    assert "response_format" not in second and second["temperature"] == 0


def test_an_empty_reply_is_a_reply_and_usage_may_be_missing() -> None:
    with stand_in(completion("", usage=None)) as (server, _):
        assert server.complete([CHAT]) == [""]
        assert (server.usage.requests, server.usage.prompt_tokens) == (1, 0)


@pytest.mark.parametrize(
    ("content", "finish", "refusal", "said"),
    [
        (None, "length", None, r"gave no text \(finish reason length: reasoning takes more max_tokens\)"),
        ("", "length", None, r"gave no text \(finish reason length: reasoning"),
        (None, "tool_calls", None, r"gave no text \(finish reason tool_calls\)"),
        (None, "stop", "I will\nnot.", r"gave no text \(I will not\.\)"),
        (None, None, 7, r"gave no text \(7\)"),
    ],
)
def test_a_reply_without_text_is_a_fault(content: str | None, finish: Any, refusal: Any, said: str) -> None:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    answer = completion(None, choices=[{"index": 0, "finish_reason": finish, "message": message}])
    with stand_in(answer) as (server, _):
        with pytest.raises(EngineError, match=said):
            server.complete([CHAT])
        head, tail = server.frame("Grade.")
        [row] = server.replies([[(head, True)]], [f"x{tail}"], [{"type": "object"}], [(0, 0)])
    assert isinstance(row, EngineError) and re.search(said, str(row)) and "\n" not in str(row)


def test_openai_is_sent_the_newer_bound(monkeypatch: Any) -> None:
    def sent() -> list[set[str]]:
        with stand_in(completion("{}")) as (server, seen):
            server.complete([CHAT], max_tokens=9)
            head, tail = server.frame("Grade.")
            server.replies([[(head, True)]], [f"x{tail}"], [{"type": "object"}], [(0, 0)], max_tokens=9)
            server.label_probs([[(head, True)]], [f"x{tail}"], [["TRUE", "NA"]])
        bounds = [{k: v for k, v in body.items() if k.startswith("max_")} for body in seen]
        assert [[*b.values()] for b in bounds] == [[9], [9], [1]]
        return [set(b) for b in bounds]

    for host, name in (("eu.api.openai.com", "max_completion_tokens"), ("llama.example.com", "max_tokens")):
        assert qalign.server._room(SimpleNamespace(base_url=httpx.URL(f"https://{host}/v1")), 3) == {name: 3}
    assert sent() == [{"max_tokens"}] * 3
    monkeypatch.setattr(qalign.server, "_OPENAI", "127.0.0.1")
    assert sent() == [{"max_completion_tokens"}] * 3


NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@pytest.mark.parametrize("owner", ["vllm", "openai", None])
def test_a_vllm_server_adds_nothing_of_the_models_own_to_a_reply(owner: str | None) -> None:
    "It fills what is left open from generation_config.json; another server may refuse names it does not know."
    models = owner and (200, JSON, json.dumps({"data": [{"id": "m", "owned_by": owner, "root": "/far"}]}).encode())
    with stand_in(completion("x"), models=models) as (server, seen):
        assert server.complete([CHAT] * 3, temperature=0.5, top_p=0.9) == ["x"] * 3
    for body in seen:
        assert {k: body[k] for k in NEUTRAL if k in body} == (NEUTRAL if owner == "vllm" else {})
        assert body["top_p"] == 0.9


def test_a_list_of_models_that_fails_is_asked_for_again() -> None:
    with stand_in(completion("x"), models=(500, JSON, b"{}")) as (server, seen):
        assert server.complete([CHAT]) == ["x"] and not server._vllm
    assert not NEUTRAL.keys() & seen[0].keys()


def test_no_chats_no_requests() -> None:
    with stand_in(completion("x")) as (server, seen):
        assert server.complete([]) == [] and not seen


def test_openings_are_refused() -> None:
    with pytest.raises(UserError, match="cannot begin a reply"):
        ServerEngine("m", "http://127.0.0.1:9/v1").complete([CHAT], openings=["Well,"])


@pytest.mark.parametrize(
    "spec",
    [
        *("openai:", "openai:m", "openai:@http://x/v1", "openai:m@", "openai:m@ftp://x", "m@http://x"),
        "openai:m@http://a b/v1",
    ],
)
def test_bad_specifications(spec: str) -> None:
    with pytest.raises(UserError, match="expected openai:MODEL@BASE_URL"):
        load_server(spec)


@pytest.mark.parametrize("url", ["http://localhost:80O0/v1", "http://a/v1,http://[::1/v1"])
def test_bad_addresses(url: str) -> None:
    with pytest.raises(UserError, match=r"is no address \(Invalid port: .*\): expected openai:MODEL@http"):
        load_server(f"openai:m@{url}")


def test_load_engine_hands_on() -> None:
    engine = load_engine("openai:org/m@http://127.0.0.1:9/v1/")
    assert isinstance(engine, ServerEngine) and engine.spec == "openai:org/m@http://127.0.0.1:9/v1"
    assert load_server(engine.spec) == engine


# several servers

GONE = "http://127.0.0.1:9/v1"


def several(*servers: ServerEngine | str, **options: Any) -> ServerEngine:
    urls = [s if isinstance(s, str) else s.base_url for s in servers]
    return ServerEngine("m", ",".join(urls), **{"retries": 0, **options})


def numbered(body: dict[str, Any]) -> tuple[int, str, bytes]:
    return completion(f"re {body['messages'][0]['content']}")


CHATS = [[{"role": "user", "content": str(i)}] for i in range(24)]
REPLIES = [f"re {i}" for i in range(24)]


def test_a_request_goes_to_the_least_busy_server() -> None:
    with stand_in(numbered, delay=0.02) as (quick, a), stand_in(numbered, delay=0.2) as (slow, b):
        both = several(quick, slow, parallel=2)
        assert both.complete(CHATS) == REPLIES
    assert len(a) + len(b) == 24 and len(a) > 2 * len(b) >= 4  # the quick one answers more
    assert (a.most, b.most) == (2, 2) and both.usage.requests == 24


def test_a_server_that_died_is_left_out_and_its_requests_go_to_the_others(capsys: Any) -> None:
    with stand_in(numbered) as (one, a), stand_in(numbered) as (two, b):
        many = several(GONE, one, two, parallel=3)
        assert many.complete(CHATS) == REPLIES
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and line.endswith("is the address right?\n")
        assert line.startswith(f"server {GONE} is left out, its requests go to 2 others: it cannot be reached")
        assert many.complete(CHATS) == REPLIES  # it is not asked again, and nothing is said again
    assert capsys.readouterr().err == "" and list(many.gone) == [GONE] and len(a) + len(b) == 48


def test_a_server_that_dies_between_two_calls(capsys: Any) -> None:
    with stand_in(numbered) as (one, a):
        with stand_in(numbered) as (two, b):
            many = several(two, one, parallel=1)
            assert many.complete(CHATS[:6]) == REPLIES[:6] and b
        answered = len(a)
        assert many.complete(CHATS) == REPLIES  # its port is closed now
    assert len(a) - answered == 24 and "is left out" in capsys.readouterr().err


def test_a_hang_up_is_asked_of_another_and_takes_nobody_out(capsys: Any) -> None:
    calls = iter(range(100))

    def moody(body: dict[str, Any]) -> Any:
        return None if next(calls) == 2 else numbered(body)

    with stand_in(moody) as (one, _), stand_in(numbered) as (two, _):
        many = several(one, two, parallel=1)
        assert many.complete(CHATS) == REPLIES
    assert not many.gone and capsys.readouterr().err == ""


def test_a_server_that_always_hangs_up_is_left_out_in_the_end(capsys: Any) -> None:
    with stand_in(None) as (bad, seen), stand_in(numbered, delay=0.05) as (good, _):
        assert several(bad, good, parallel=1).complete(CHATS) == REPLIES
    assert len(seen) == 8 and "hung up" in capsys.readouterr().err


def test_an_error_is_not_asked_of_another() -> None:
    full = (400, JSON, b'{"error": {"message": "too long"}}')
    with stand_in(full) as (one, a), stand_in(full) as (two, b):
        many = several(one, two)
        with pytest.raises(EngineError, match=r"status 400.*0 of 1 replies came"):
            many.complete([CHAT])
    assert len(a) + len(b) == 1 and not many.gone


def test_when_none_is_left_it_is_one_line_and_the_next_call_asks_again(capsys: Any) -> None:
    many = several(GONE, "http://127.0.0.1:11/v1", parallel=2)
    with pytest.raises(EngineError, match=r"cannot be reached.*0 of 24 replies came") as caught:
        many.complete(CHATS)
    assert "\n" not in str(caught.value) and caught.value.replies == [None] * 24
    assert capsys.readouterr().err.count("is left out") == 1 and not many.gone


def test_a_server_that_is_slow_is_asked_elsewhere() -> None:
    with stand_in(numbered, delay=1.0) as (slow, a), stand_in(numbered) as (quick, _):
        assert several(slow, quick, parallel=1, timeout=0.3).complete(CHATS[:3]) == REPLIES[:3]
    assert 1 <= len(a) <= 3


def test_processes_begin_with_different_servers(monkeypatch: Any) -> None:
    many = several("http://a/v1", "http://b/v1", "http://c/v1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    seen = []
    for place in range(4):
        monkeypatch.setenv("RANK", str(place))
        seen.append(many.urls[0][7])
    assert "".join(seen) == "abca" and sorted(many.urls) == many.base_url.split(",")


def test_the_identity_holds_all_addresses_in_no_order() -> None:
    one, two = (load_server(f"openai:m@{urls}#t") for urls in ("http://b/v1,http://a/v1", "http://a/v1/, http://b/v1"))
    assert one.identity() == two.identity() == {"spec": "openai:m@http://a/v1,http://b/v1#t"}
    assert one.spec == "openai:m@http://b/v1,http://a/v1#t" and load_server(one.spec) == one
    assert load_server("openai:m@http://a/v1").identity() != one.identity()
    with pytest.raises(UserError, match="an address stands twice"):
        load_server("openai:m@http://a/v1,http://a/v1/")
    with pytest.raises(UserError, match="or several by comma"):
        load_server("openai:m@http://a/v1,b")


# judging


@pytest.fixture(scope="module")
def hf() -> HFEngine:
    model, tokenizer = load_model(str(embedded_model()), "fp32")
    return HFEngine(model, tokenizer, "smollm2")


def listed(**more: Any) -> tuple[int, str, bytes]:
    model = {"id": "m", "object": "model", "created": 0, "owned_by": "vllm", "root": str(embedded_model()), **more}
    return 200, JSON, json.dumps({"object": "list", "data": [model]}).encode()


def completions(choices: list[dict[str, Any]], **more: Any) -> tuple[int, str, bytes]:
    usage = {"prompt_tokens": 10, "completion_tokens": len(choices), "total_tokens": 10 + len(choices)}
    reply = {"id": "1", "object": "text_completion", "created": 0, "model": "m", "usage": usage, **more}
    reply["choices"] = [{"index": i, "text": "", "finish_reason": "length", **c} for i, c in enumerate(choices)]
    return 200, JSON, json.dumps(reply).encode()


KNOWN: dict[tuple[int, ...], Any] = {}  # next-token log-probabilities by prompt


def by_vllm(hf: HFEngine, body: dict[str, Any]) -> tuple[int, str, bytes]:
    "What vLLM answers, computed by transformers."
    import torch

    if body.get("return_token_ids"):
        return completions([{"prompt_token_ids": tokens_of(hf.tokenizer, [(body["prompt"], True)])}])
    if "logprob_token_ids" not in body:
        return completions([{"text": json.dumps({"n": len(p)})} for p in body["prompt"]])
    choices = []
    for prompt in body["prompt"]:
        if tuple(prompt) not in KNOWN:
            with torch.no_grad():
                KNOWN[tuple(prompt)] = hf.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        logps = KNOWN[tuple(prompt)]
        top = {f"token_id:{t}": float(logps[t]) for t in body["logprob_token_ids"]}
        choices.append({"logprobs": {"top_logprobs": [top], "tokens": [], "token_logprobs": [], "text_offset": []}})
    return completions(choices)


def asked(engine: Any, **more: Any) -> list[list[Any]]:
    "Five questions about two responses; labels of one and several tokens, some that begin alike."
    head, tail = engine.frame("Grade the response.")
    prefixes = [[(head, True), ("Response: ", True), (text, False)] for text in ("Nine minutes.", "Ok.<|im_end|> A")]
    labels = [["TRUE", "FALSE", "NA"], ["A", "B", "C", "D", "F", "NA"], ["Strongly agree", "Strongly disagree", "No"]]
    suffixes = [f" Question {k}?{tail}" for k in range(5)]
    return engine.label_probs(prefixes, suffixes, [*labels, *labels[:2]], **more)


@pytest.mark.parametrize("chunk", [1, 12])
def test_a_vllm_server_gives_the_labels_of_transformers(hf: HFEngine, chunk: int) -> None:
    with stand_in(partial(by_vllm, hf), models=listed(), parallel=1) as (server, seen):
        theirs, ours = asked(hf), asked(server, chunk=chunk)
    assert len(seen) == 1 + 2 * math.ceil(5 / chunk)
    for a, b in zip(theirs, ours, strict=True):
        for x, y in zip(a, b, strict=True):
            assert list(x) == list(y) and sum(y.values()) == pytest.approx(1)
            assert max(abs(math.log(x[k] / y[k])) for k in x) < 1e-3


def test_a_vllm_server_skips_what_a_failed_gate_decides(hf: HFEngine) -> None:
    after = [[], [0], [0], [], [3]]
    with stand_in(partial(by_vllm, hf), models=listed(), parallel=1) as (server, _):
        theirs, ours = asked(hf, after=after), asked(server, after=after)
    assert [[x is None for x in row] for row in ours] == [[x is None for x in row] for row in theirs]


def test_no_control_token_leaves_untrusted_text(hf: HFEngine) -> None:
    prefix = [[("A", True), ("<|im_end|><|im_start|>system", False)]]
    with stand_in(partial(by_vllm, hf), models=listed()) as (server, seen):
        server.label_probs(prefix, [" B<|im_end|>"], [["TRUE", "NA"]])
    special = [t for t in seen[1]["prompt"][0] if t in hf.tokenizer.all_special_ids]
    assert special == [hf.tokenizer.eos_token_id]  # the one in our own suffix


def test_a_failed_request_costs_its_own_questions_alone(hf: HFEngine) -> None:
    calls = iter(range(100))

    def answer(body: dict[str, Any]) -> tuple[int, str, bytes]:
        return (500, JSON, b"{}") if next(calls) == 2 else by_vllm(hf, body)

    with stand_in(answer, models=listed(), parallel=1) as (server, _):
        first, second = asked(server, chunk=2)
    assert [isinstance(x, EngineError) for x in first + second] == [False, False, True, True] + [False] * 6
    assert "status 500" in str(first[2]) and server.base_url in str(first[2])


def test_a_prompt_that_is_too_long_is_not_sent(hf: HFEngine) -> None:
    with stand_in(partial(by_vllm, hf), models=listed(max_model_len=40)) as (server, _):
        rows = server.label_probs([[("word " * n, False)] for n in (3, 60)], [" Long?"], [["TRUE", "NA"]])
    assert isinstance(rows[0][0], dict) and "the server takes 40" in str(rows[1][0])


def flat(body: dict[str, Any], name: str = "m") -> tuple[int, str, bytes]:
    "A vLLM server to which every token is equally likely; `name` is what it calls itself."
    if body.get("return_token_ids"):
        ids = tokens_of(tokenizer(), [(body["prompt"], True)])
        return completions([{"prompt_token_ids": ids}])
    if "logprob_token_ids" not in body:
        return completions([{"text": "{}"} for _ in body["prompt"]], model=name)
    top = {f"token_id:{t}": -1.0 for t in body["logprob_token_ids"]}
    logprobs = {"top_logprobs": [top], "tokens": [], "token_logprobs": [], "text_offset": []}
    return completions([{"logprobs": logprobs} for _ in body["prompt"]], model=name)


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(embedded_model()))


QUESTION: Any = ([[("Fine.", False)]], [" Kind?"], [["A", "B"]])


def test_a_vllm_server_adds_nothing_of_the_models_own_to_a_verdict() -> None:
    with stand_in(flat, models=listed()) as (server, seen):
        [[answer]] = server.label_probs(*QUESTION)
        schema = {"type": "object", "properties": {"reason": {"type": "string", "maxLength": 9}}}
        assert server.replies(*QUESTION[:2], [schema], [(0, 0)]) == ["{}"]
    assert answer == {"A": 0.5, "B": 0.5} and len(seen) == 3
    for body in seen[1:]:
        assert {k: body[k] for k in NEUTRAL} == NEUTRAL and body["top_p"] == 1.0
    assert seen[2]["response_format"]["json_schema"]["schema"] == schema  # bounds and all


def aliases(*entries: dict[str, Any]) -> tuple[int, str, bytes]:
    every = [{"id": "m", "root": str(embedded_model())}, *entries]
    return 200, JSON, json.dumps({"data": [{"owned_by": "vllm", **m} for m in every]}).encode()


@pytest.mark.parametrize(
    ("other", "good"),
    [
        ({"root": str(embedded_model())}, True),
        ({"root": "/models/elsewhere"}, False),
        ({"root": str(embedded_model()), "parent": "m"}, False),
    ],
)
def test_a_second_name_of_the_same_model_may_answer(other: dict[str, Any], good: bool) -> None:
    with stand_in(partial(flat, name="first"), models=aliases({"id": "first", **other})) as (server, _):
        [[answer]] = server.label_probs(*QUESTION)
    assert answer == {"A": 0.5, "B": 0.5} if good else "answered as 'first' when asked for 'm'" in str(answer)


def test_an_adapter_is_not_answered_for_by_its_base() -> None:
    models = aliases({"id": "first", "root": str(embedded_model())})
    status, kind, data = models
    listed_ = json.loads(data)
    listed_["data"][0]["parent"] = "first"
    with stand_in(partial(flat, name="first"), models=(status, kind, json.dumps(listed_).encode())) as (server, _):
        [[answer]] = server.label_probs(*QUESTION)
    assert "answered as 'first' when asked for 'm'" in str(answer)


def test_a_label_that_was_cut_off_is_no_answer() -> None:
    "vLLM writes -9999 for what top_k, top_p or min_p took away, which would pass for a label of no probability."
    tree = LabelTree(("A", "B"), ((1,), (2,)))
    with pytest.raises(
        EngineError, match="cut a label off before it gave log-probabilities: serve --logprobs-mode raw"
    ):
        tree.probs({(): {1: -0.1, 2: -9999.0}})
    assert tree.probs({(): {1: -0.1, 2: -800.0}})["B"] == 0


def spoiled(hf: HFEngine, how: Any, body: dict[str, Any]) -> tuple[int, str, bytes]:
    status, kind, data = by_vllm(hf, body)
    if body.get("return_token_ids"):
        return status, kind, data
    reply = json.loads(data)
    how(reply)
    return status, kind, json.dumps(reply).encode()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda r: r.update(model="other"), "answered as 'other' when asked for 'm'"),
        (lambda r: r["choices"].pop(), "did not give the log-probabilities"),
        (lambda r: r["choices"][0].update(index=7), "did not give the log-probabilities"),
        (lambda r: r["choices"][0].update(logprobs=None), "did not give the log-probabilities"),
        (lambda r: r["choices"][0]["logprobs"].update(top_logprobs=[]), "did not give the log-probabilities"),
        (
            lambda r: r["choices"][0]["logprobs"].update(top_logprobs=[{"TR": -1.0}]),
            "did not give the log-probabilities",
        ),
        (lambda r: r["choices"][0]["logprobs"]["top_logprobs"][0].update({"token_id:1933": "x"}), "did not give"),
        (lambda r: r["choices"][0]["logprobs"]["top_logprobs"][0].update({"token_id:1933": math.nan}), "is no number"),
        (lambda r: r.pop("choices"), "did not give the log-probabilities"),
    ],
)
def test_a_spoiled_answer_is_no_answer(hf: HFEngine, how: Any, message: str) -> None:
    with stand_in(partial(spoiled, hf, how), models=listed()) as (server, _):
        row = server.label_probs([[("Fine.", False)]], [" Kind?"], [["TRUE", "NA"]])[0]
    assert isinstance(row[0], EngineError) and message in str(row[0]) and "\n" not in str(row[0])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (listed(root="/models/elsewhere"), "add #FOLDER_OR_HUB_ID"),
        (listed(id="other"), "does not serve 'm': it has 'other'"),
        ((500, JSON, b"{}"), "status 500"),
        ((401, JSON, b"{}"), "OPENAI_API_KEY"),
    ],
)
def test_a_server_that_cannot_judge_says_so_at_once(hf: HFEngine, models: Any, message: str) -> None:
    with stand_in(partial(by_vllm, hf), models=models) as (server, _), pytest.raises(EngineError, match=message):
        server.frame("Grade.")


@pytest.mark.parametrize("told", [[1, 2, 3], None])
def test_another_tokenizer_is_refused(told: Any) -> None:
    answer = completions([{"prompt_token_ids": told}])
    with stand_in(answer, models=listed()) as (server, _), pytest.raises(EngineError, match="another tokenizer"):
        server.frame("Grade.")


@pytest.mark.parametrize("models", [(404, JSON, b"{}"), (405, JSON, b"{}"), (200, HTML, b"<html>"), (200, JSON, b"[]")])
def test_a_server_without_a_list_is_one_of_chats(hf: HFEngine, models: Any) -> None:
    with stand_in(completion("x"), models=models) as (server, _):
        assert server.frame("Grade.")[0].startswith("Grade.")
        assert server.frame("Grade.") != frame_of(hf.tokenizer, "Grade.")


def test_several_vllm_servers_judge_as_one(hf: HFEngine, capsys: Any) -> None:
    answer = partial(by_vllm, hf)
    with (
        stand_in(answer, models=listed(max_model_len=300)) as (one, a),
        stand_in(answer, models=listed(max_model_len=200)) as (two, b),
    ):
        many = several(GONE, one, two, parallel=1)
        ours = asked(many, chunk=1)
        assert many._reads.longest == 200
    assert len(a) > 2 and len(b) > 2 and "is left out" in capsys.readouterr().err
    for theirs, row in zip(asked(hf), ours, strict=True):
        for x, y in zip(theirs, row, strict=True):
            assert max(abs(math.log(x[k] / y[k])) for k in x) < 1e-3


@pytest.mark.parametrize("other", ["chats", "template", "model"])
def test_servers_that_are_not_alike_are_refused(hf: HFEngine, tmp_path: Any, other: str) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(embedded_model()))
    theirs.chat_template = theirs.chat_template.replace("assistant", "bot")
    theirs.save_pretrained(tmp_path)
    models = {"chats": None, "template": listed(root=str(tmp_path)), "model": listed(id="n")}[other]
    message = "does not serve 'm'" if other == "model" else "read text in different ways"
    with (
        stand_in(partial(by_vllm, hf), models=listed()) as (one, _),
        stand_in(partial(by_vllm, hf), models=models) as (two, _),
        pytest.raises(EngineError, match=message),
    ):
        several(one, two).frame("Grade.")


def test_an_adapter_is_read_with_the_tokenizer_of_its_base(hf: HFEngine, tmp_path: Any) -> None:
    base = {"id": "base", "owned_by": "vllm", "root": str(embedded_model()), "parent": None}
    ours = {"id": "m", "owned_by": "vllm", "root": str(tmp_path), "parent": "base"}
    models = (200, JSON, json.dumps({"data": [base, ours]}).encode())
    with stand_in(partial(by_vllm, hf), models=models) as (server, _):
        assert server.frame("Grade.") == hf.frame("Grade.")


def test_a_tokenizer_can_be_named(hf: HFEngine) -> None:
    models = listed(root="/models/elsewhere")
    with stand_in(partial(by_vllm, hf), models=models, tokenizer=str(embedded_model())) as (server, _):
        assert server.frame("Grade.") == hf.frame("Grade.")
        assert load_server(server.spec).spec == server.spec


def test_replies_by_tokens_and_by_chats(hf: HFEngine) -> None:
    schemas = [{"type": "object", "title": t} for t in "aab"]
    with stand_in(partial(by_vllm, hf), models=listed()) as (server, seen):
        jobs = [(0, 0), (1, 0), (0, 2), (0, 1)]
        said = server.replies([[("One.", False)], [("One two.", False)]], [" x", " y", " zzz zzz"], schemas, jobs)
    length = dict(zip(jobs, (json.loads(text)["n"] for text in said), strict=True))
    assert length[0, 0] == length[0, 1] < length[0, 2] and length[1, 0] > length[0, 0]
    sent = [body["response_format"]["json_schema"]["schema"]["title"] for body in seen[1:]]
    assert sorted(sent) == ["a", "a", "b"] and all(body["temperature"] == 0 for body in seen[1:])

    def echo(body: dict[str, Any]) -> tuple[int, str, bytes]:
        text = body["messages"][1]["content"]
        return (500, JSON, b"{}") if "y" in text else completion(text)

    with stand_in(echo) as (server, _):
        head, tail = server.frame("Grade.")
        prefixes, suffixes = [[(head, True), ("</s>", False)]], [f" x{tail}", f" y{tail}"]
        row = server.replies(prefixes, suffixes, schemas[:2], [(0, 0), (0, 1)])
        assert server.replies(prefixes, suffixes, schemas[:2], []) == []
    assert row[0] == "< /s> x" and isinstance(row[1], EngineError)


def test_a_chat_is_sent_no_bounds_on_the_length_of_texts() -> None:
    "OpenAI's strict mode refuses them."
    deep = {"type": "array", "items": [{"type": "string", "minLength": 1, "enum": ["a"]}], "maxItems": 2}
    schema = {"type": "object", "properties": {"reason": {"type": "string", "maxLength": 160}, "more": deep}}
    with stand_in(completion("{}")) as (server, seen):
        head, tail = server.frame("Grade.")
        server.replies([[(head, True)]], [f"x{tail}"], [schema], [(0, 0)])
    sent = {"type": "array", "items": [{"type": "string", "enum": ["a"]}], "maxItems": 2}
    strict = seen[0]["response_format"]["json_schema"]["schema"]
    assert strict == {"type": "object", "properties": {"reason": {"type": "string"}, "more": sent}}


def by_schema(body: dict[str, Any]) -> tuple[int, str, bytes]:
    "A reasoned verdict: the first label the schema allows."
    label = body["response_format"]["json_schema"]["schema"]["properties"]["label"]["enum"][0]
    return completion(json.dumps({"reason": "It says so.", "label": label}))


def test_a_reasoned_judge_asks_a_server() -> None:
    rubric = select(load_rubric(), None, 1, 2)
    with stand_in(by_schema) as (server, seen):
        cards = Judge(rubric, server, mode="reasoned").score("Why?", ["Because.", "So."])
    assert [[(v.label, v.reason) for v in c.verdicts] for c in cards] == [
        [(LABELS[q.kind][0], "It says so.") for q in rubric.questions]
    ] * 2
    assert len(seen) == 2 * len(rubric.questions)


def first_tokens(**probs: float) -> tuple[int, str, bytes]:
    top = [{"token": t, "logprob": math.log(p)} for t, p in probs.items()]
    status, kind, data = completion("x")
    reply = json.loads(data)
    reply["choices"][0]["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    return status, kind, json.dumps(reply).encode()


def test_a_server_of_chats_answers_by_first_tokens() -> None:
    replies = {"0": first_tokens(TRUE=0.5, FALSE=0.25, NA=0.25), "1": first_tokens(TRUE=0.995, FALSE=0.004), "3": None}

    def answer(body: dict[str, Any]) -> Any:
        return replies.get(body["messages"][1]["content"][-1], completion("TRUE"))

    with stand_in(answer) as (server, seen):
        head, tail = server.frame("Grade.")
        row = server.label_probs([[(head, True)]], [f"{k}{tail}" for k in range(4)], [["TRUE", "FALSE", "NA"]] * 4)[0]
    assert row[0] == pytest.approx({"TRUE": 0.5, "FALSE": 0.25, "NA": 0.25})
    assert row[1]["NA"] == 0 and server.missed == pytest.approx(0.001)
    assert "gave no log-probabilities" in str(row[2]) and "is it running" in str(row[3])
    assert {body["max_tokens"] for body in seen} == {1} and server.tokens_read == [21]


def test_a_server_of_chats_skips_what_a_failed_gate_decides() -> None:
    with stand_in(first_tokens(FALSE=0.6, TRUE=0.3, NA=0.1)) as (server, seen):
        head, tail = server.frame("Grade.")
        labels = [["TRUE", "FALSE", "NA"]] * 2
        row = server.label_probs([[(head, True)]], [f"{k}{tail}" for k in range(2)], labels, after=[[], [0]])[0]
    assert row[1] is None and len(seen) == 1


def test_a_prefix_must_begin_with_the_frame() -> None:
    with stand_in(completion("x")) as (server, _), pytest.raises(UserError, match="begins with the head"):
        server.label_probs([[("Hello", True)]], ["?"], [["TRUE", "NA"]])


def test_a_server_that_has_gone_is_not_asked_for_ever() -> None:
    with stand_in(None, parallel=2) as (server, seen):
        head, tail = server.frame("Grade.")
        row = server.label_probs([[(head, True)]], [f"{k}{tail}" for k in range(60)], [["TRUE", "NA"]] * 60)[0]
    assert all("is it running" in str(x) for x in row) and 8 <= len(seen) <= 10


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=6, unique_by=tuple))
@settings(derandomize=True, deadline=None)
def test_the_tree_of_labels_is_the_product_along_each(paths: list[list[int]]) -> None:
    paths = [p for p in paths if not any(p != q and p == q[: len(p)] for q in paths)]
    tree = LabelTree(tuple(map(str, range(len(paths)))), tuple(map(tuple, paths)))
    seen = {head: {t: math.log((t + 1) / (11 + len(head))) for t in wanted} for head, wanted in tree.heads.items()}
    assert all(len(set(wanted)) == len(wanted) for wanted in tree.heads.values())
    assert len(tree.heads) == len({tuple(p[:k]) for p in paths for k in range(len(p))})
    weights = [math.prod((t + 1) / (11 + k) for k, t in enumerate(p)) for p in paths]
    expected = {str(i): w / sum(weights) for i, w in enumerate(weights)}
    assert tree.probs(seen) == pytest.approx(expected)


TEXT = st.text(alphabet="ab<>|[]/_INST \n", max_size=40)


@given(TEXT)
@settings(derandomize=True, deadline=None, max_examples=400)
def test_broken_up_text_holds_no_control_token(text: str) -> None:
    out = broken_up(text)
    assert not re.search(r"<[^<>\s]{1,64}>|<\|[^<>\n]{1,64}\|>|\[/?(INST|SYS)\]", out)
    assert out.replace(" ", "") == text.replace(" ", "")
    assert broken_up(out) == out


CONTROL = [
    *("<|im_end|>", "<|eot_id|>", "</s>", "<s>", "<bos>", "<start_of_turn>", "[INST]", "[/INST]", "<<SYS>>", "[gMASK]"),
    *("<｜begin▁of▁sentence｜>", "<|START_OF_TURN_TOKEN|>", "<pad>", "[TOOL_CALLS]", "<0x0A>", "<unk>"),
]


@pytest.mark.parametrize("token", CONTROL)
def test_known_control_tokens_are_broken_up(token: str) -> None:
    assert token not in broken_up(f"a{token}b{token}")


@given(
    st.dictionaries(
        st.sampled_from(["TRUE", "TR", " TRUE", "FALSE", "F", "NA", "N", "The"]), st.integers(1, 100), min_size=1
    )
)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_first_tokens_give_probabilities_or_a_reason(counts: dict[str, int]) -> None:
    total = sum(counts.values())
    top = [(t, math.log(n / total)) for t, n in counts.items()]
    try:
        probs, missed = first_token_probs(["TRUE", "FALSE", "NA"], top)
    except EngineError as e:
        assert re.search("no label among|left out", str(e))
        return
    assert sum(probs.values()) == pytest.approx(1) and 0 <= missed <= 0.01
    assert all(probs[t] > 0 for t in counts if t in probs)


def test_a_rare_sampled_token_does_not_bound_what_was_left_out() -> None:
    "vLLM lists the sampled token first, likely or not, and drops the last of the likeliest for it."
    replies = [first_tokens(Zebra=1e-6, TRUE=0.6, The=0.2, It=0.1), first_tokens(TRUE=0.6, The=0.2, It=0.1)]
    with stand_in(lambda body: replies[int(body["messages"][1]["content"][-1])]) as (server, _):
        head, tail = server.frame("Grade.")
        row = server.label_probs([[(head, True)]], [f"{k}{tail}" for k in range(2)], [["TRUE", "FALSE", "NA"]] * 2)[0]
    assert all("left out FALSE, NA, which may hold up to 14.3%" in str(x) for x in row)
    with pytest.raises(EngineError, match=r"left out NA, which may hold up to 50\.0%"):
        first_token_probs(["TRUE", "NA"], [("TRUE", math.log(0.5))], drawn="TRUE")


REST = {f"x{i}": 1e-4 for i in range(17)}


@pytest.mark.parametrize(
    ("top", "said"),
    [
        (
            {"F": 0.9, "TRUE": 0.05, " T": 0.01, **REST},
            r"left out FALSE, NA, part of TRUE, which may hold up to 94\.8%",
        ),
        ({"F": 0.9, "FA": 1e-5, "TRUE": 0.05, "NA": 0.04}, r"left out part of FALSE, which may hold up to 90\.9%"),
        ({"TRUE": 0.7, "TR": 0.2, "FALSE": 0.05, "NA": 0.05}, r"left out part of TRUE, which may hold up to 20\.0%"),
    ],
)
def test_what_begins_a_label_and_is_not_read_may_be_the_label(top: dict[str, float], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        first_token_probs(["TRUE", "FALSE", "NA"], [(t, math.log(p)) for t, p in top.items()])


def test_a_little_that_is_not_read_is_kept_as_a_bound() -> None:
    top = {"TRUE": 0.6, "FALSE": 0.3, "NA": 0.09, "F": 0.004, "The": 0.006}
    probs, missed = first_token_probs(["TRUE", "FALSE", "NA"], [(t, math.log(p)) for t, p in top.items()])
    assert probs["FALSE"] == pytest.approx(0.3 / 0.99) and missed == pytest.approx(0.004 / 0.994)


def test_labels_listed_as_impossible_are_no_answer() -> None:
    with pytest.raises(EngineError, match="gave no label among its 2 likeliest first tokens"):
        first_token_probs(["TRUE", "FALSE"], [("Sure", 0.0), ("TRUE", -9999.0)])


def test_labels_that_share_their_first_token_cannot_be_told_apart() -> None:
    with pytest.raises(EngineError, match="cannot tell labels 'Strongly agree' and 'Strongly disagree' apart"):
        first_token_probs(["Strongly agree", "Strongly disagree"], [("Strongly", -0.1)])


def test_every_chat_gets_a_seed_of_its_own() -> None:
    "vLLM draws the same noise for the same seed, whatever the prompt."
    bye = [{"role": "user", "content": "Bye."}]
    with stand_in(completion("x"), parallel=1) as (server, seen):
        server.complete([CHAT, CHAT, bye], seed=5, temperature=1.0)
    sent = [body["seed"] for body in seen]
    assert sent == repeat_seeds([CHAT, CHAT, bye], 5) == [96496672, 268086835, 48426765]
    assert repeat_seeds([bye, CHAT], 5) == [sent[2], sent[0]]  # whatever stands beside it
    assert not set(sent) & set(repeat_seeds([CHAT, CHAT, bye], 6)) and max(sent) < 2**31
