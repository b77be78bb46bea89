"Room trace: hostile transcripts, the round trip, and reading in linear time."

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qalign.core import UserError
from qalign.trace import CLOSE, MEANING, OPEN, PROBLEMS, Trace, answer_of, parse_trace, render_trace

SPACE = " \t\n\r\f\v"
FRAGMENTS = [
    *["<think>", "</think>", "<THINK>", "</Think >", "< think>", "< / think >", "<\n/\tthink\r>", "<think\n>"],
    *[
        "<think foo>",
        "<thinking>",
        "<think/>",
        "<//think>",
        "</ /think>",
        "<",
        ">",
        "/",
        "think",
        "<thin",
        "k>",
        "<<",
        ">>",
    ],
    *[
        "<th\u0131nk>",
        "<thin\u212a>",
        "\uff1cthink\uff1e",
        "<th\u200bink>",
        "<\u00a0think>",
        "&lt;think&gt;",
        "<t\0hink>",
    ],
    *[
        "draft",
        "Wait, that",
        "a better answer",
        "…",
        "日本語",
        "🙂",
        "\u202e",
        "\0",
        "\ud800",
        "\udfff",
        "\x1c",
        "\u2028",
        "\ufeff",
    ],
    *[" ", "\n", "\t\t", "\u00a0", "<" * 50, " " * 200, "think" * 30, "<think>" * 20, "</think>" * 20, "a" * 500],
]
N = 25_000


def tags_of(text: str) -> list[tuple[int, int, bool]]:
    "Start, end and closing-ness of each think tag, found by a scanner that shares nothing with the room's pattern."

    def spaces(i: int) -> int:
        while i < len(text) and text[i] in SPACE:
            i += 1
        return i

    found, i = [], text.find("<")
    while i != -1:
        j = spaces(i + 1)
        closing = j < len(text) and text[j] == "/"
        j = spaces(j + closing)
        word = text[j : j + 5]
        end = spaces(j + 5)
        hit = len(word) == 5 and all(c in pair for c, pair in zip(word, ("tT", "hH", "iI", "nN", "kK"), strict=True))
        if hit and end < len(text) and text[end] == ">":
            found.append((i, end + 1, closing))
        i = text.find("<", i + 1)
    return found


def expected(text: str) -> Trace:
    "What `parse_trace` should say, from the table of problems."
    tags = tags_of(text)
    order = "".join("c" if closing else "o" for _, _, closing in tags)
    draft = text[: tags[0][0]].strip() if tags else text.strip()
    reflection = revision = ""
    if order.startswith("o"):
        stop = tags[1][0] if len(tags) > 1 else len(text)
        reflection = text[tags[0][1] : stop].strip()
    if order == "oc":
        revision = text[tags[1][1] :].strip()
    if not text.strip():
        problem = "empty"
    elif order == "":
        problem = "no_reflection"
    elif set(order) == {"o"}:
        problem = "unclosed"
    elif set(order) == {"c"}:
        problem = "unopened"
    elif order[0] == "c":
        problem = "reversed"
    elif order[:2] == "oo":
        problem = "nested"
    elif order != "oc":
        problem = "repeated"
    elif not draft:
        problem = "empty_draft"
    elif not reflection:
        problem = "empty_reflection"
    else:
        problem = "" if revision else "empty_revision"
    return Trace(draft, reflection, revision, problem == "", problem)


def hostile(rng: random.Random) -> str:
    "Random fragments, sometimes around the skeleton of a good transcript so that every outcome comes up."
    some = "".join(rng.choices(FRAGMENTS, k=rng.randrange(8)))
    if rng.random() < 0.5:
        return some
    more = ["".join(rng.choices(FRAGMENTS[8:], k=rng.randrange(3))) for _ in range(4)]
    return f"{more[0]}<think>{more[1]}</think>{more[2]}{some if rng.random() < 0.3 else ''}{more[3]}"


def test_hostile_transcripts():
    rng, seen = random.Random(0), set()
    for _ in range(N):
        text = hostile(rng)
        prefill = rng.choice(["", "", "<think>\n", "Sure.\n<think>\n"])
        whole = prefill + text
        trace = parse_trace(text, prefill)
        assert trace == expected(whole)
        assert trace == parse_trace(whole)
        assert trace.ok == (trace.problem == "") and trace.problem in ("", *PROBLEMS)
        parts = (trace.draft, trace.reflection, trace.revision)
        assert all(part in whole and part == part.strip() and not tags_of(part) for part in parts)
        if trace.ok:
            assert all(parts) and [closing for _, _, closing in tags_of(whole)] == [False, True]
            assert parse_trace(render_trace(*parts)) == trace
            assert answer_of(whole) == trace.revision
        answer = answer_of(text, prefill)
        tags = tags_of(whole)
        if not tags:
            assert answer == whole.strip()
        else:
            assert answer == (whole[tags[-1][1] :].strip() if tags[-1][2] else "")
        trace._repr_html_().encode("utf-8")  # a lone surrogate would raise
        seen.add(trace.problem)
    assert seen == {"", *PROBLEMS}


@settings(derandomize=True, max_examples=500, deadline=None)
@given(st.text() | st.text(alphabet="</>thinkTHINK \n\0\u0131\u212a\ud800"), st.text(max_size=8))
def test_any_text_is_read(text, prefill):
    assert parse_trace(text, prefill) == expected(prefill + text)


part = st.text(alphabet=st.characters() | st.sampled_from("</> think\n\ud800"), min_size=1).filter(
    lambda s: s.strip() and not tags_of(s)
)


@settings(derandomize=True, max_examples=500, deadline=None)
@given(part, part, part)
def test_round_trip(draft, reflection, revision):
    trace = parse_trace(render_trace(draft, reflection, revision))
    assert trace == Trace(draft.strip(), reflection.strip(), revision.strip(), True, "")
    assert trace == parse_trace(render_trace(trace.draft, trace.reflection, trace.revision))


def test_form():
    assert render_trace("D", "R", "V") == "D\n<think>\nR\n</think>\nV" and (OPEN, CLOSE) == ("<think>", "</think>")
    assert list(MEANING) == [*PROBLEMS, "truncated"] and len(set(PROBLEMS)) == 10


@pytest.mark.parametrize("bad", ["", " \n\u00a0", "a <think> b", "</ THINK >", "<think>" * 1000])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_render_refuses(bad, at):
    parts = ["D", "R", "V"]
    parts[at] = bad
    with pytest.raises(UserError, match=("draft", "reflection", "revision")[at]):
        render_trace(*parts)


def test_html_is_escaped():
    shown = Trace("<script>x</script>", "&", "<b>", False, "unclosed")._repr_html_()
    assert "<script>" not in shown and "<b>" not in shown and "&amp;" in shown and "unclosed" in shown


LONG = {
    "brackets": lambda n: "<" * n,
    "spaces": lambda n: "<" + " " * n,
    "spaces, slash, spaces": lambda n: "<" + " " * (n // 2) + "/" + " " * (n // 2),
    "spaces after the word": lambda n: "<think" + " " * n,
    "many half tags": lambda n: "< / think " * (n // 10),
    "many almost tags": lambda n: ("<" + " " * 99) * (n // 100),
    "openings": lambda n: "<think>" * (n // 7),
    "closings": lambda n: "</think>" * (n // 8),
    "blocks": lambda n: "<think></think>" * (n // 15),
    "words": lambda n: "think" * (n // 5),
    "plain": lambda n: "a" * n,
    "white space": lambda n: "\n" * n,
}


@pytest.mark.parametrize("kind", LONG)
def test_linear_time(kind):
    def seconds(n: int) -> float:
        text, best = LONG[kind](n), float("inf")
        for _ in range(3):
            start = time.process_time()
            parse_trace(text)
            answer_of(text)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(10_000) < 0.1  # a quadratic reader fails here, before the long texts
    assert seconds(1_000_000) < 1
    # ten times the text; quadratic would be a hundred times (the floor keeps the clock's noise out)
    assert seconds(1_000_000) < 40 * max(seconds(100_000), 0.02)
