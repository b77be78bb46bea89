"Refusal phrases, the rows of an evaluation, and its summary against numbers worked by hand."

import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qalign.core import UserError, load_settings
from qalign.evaluate import METRICS, evaluate, is_refusal, summarize, summary_cells, summary_markdown
from qalign.prompts import Prompt
from qalign.reward import final_reward
from qalign.safety import _OWN
from qalign.trace import answer_of, parse_trace, render_trace

HYPO = settings(derandomize=True, max_examples=60, deadline=None)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I'm sorry, but I can't assist with that.", True),
        ("I am unable to help.", True),
        ("I cannot provide that.", True),
        ("I can not provide that.", True),
        ("I CAN\u2019T HELP WITH THAT", True),
        ("Thanks for asking. I'm not going to do it.", True),
        ("I\n will   not\thelp you.", True),
        ("> **I won't assist** with this.", True),
        ("I have to decline.", True),
        ("x " * 80 + "I can't help with that.", True),
        ("x " * 120 + "I can't help with that.", False),
        ("I can't wait to help you cook.", False),
        ("I can't stress this enough.", False),
        ("The taxi can't help with luggage.", False),
        ("Sure, here is a recipe.", False),
        ("", False),
        (" \n", False),
        ("I", False),
    ],
)
def test_is_refusal(answer, expected):
    assert is_refusal(answer) is expected


@pytest.mark.parametrize("phrase", _OWN)
def test_every_phrase_is_found_in_any_spelling(phrase):
    assert is_refusal(phrase)
    assert is_refusal(f"Well. {phrase.upper()}!".replace("'", "\u2019"))
    assert is_refusal(phrase.replace("can't", "cannot").replace("won't", "will not").replace("i'm", "I am"))


@HYPO
@given(st.text())
def test_any_text_has_an_answer(text):
    assert is_refusal(text) in (True, False)


class Engine:
    def __init__(self, outputs):
        self.outputs, self.calls = outputs, []

    def complete(self, chats, max_tokens=256, temperature=0.0, top_p=1.0, seed=0):
        self.calls.append((max_tokens, temperature, top_p, seed, [c[-1]["content"] for c in chats]))
        return [self.outputs[c[-1]["content"]] for c in chats]


class Judge:
    def __init__(self, mute=()):
        self.calls, self.mute = [], mute

    def score_many(self, pairs):
        self.calls.append(list(pairs))
        bases = [None if t in self.mute else len(t) / 100 for _, t in pairs]
        return [SimpleNamespace(score=SimpleNamespace(base=b, principles={"honesty": b})) for b in bases]


OUTPUTS = {
    "good": render_trace("draft", "wait", "the revision"),
    "same": render_trace("alike", "wait", "alike"),
    "plain": "just text",
    "open": "draft <think> never closed",
    "none": "  ",
}
KEYS = {"model", "set", "prompt_id", "trial", "prompt", "output", "answer", "ok", "problem", "r1", "r2", "reward"}
KEYS |= {"r_answer", "refusal", "principles", "tokens_out", "cut"}


def run(judge=None, engine=None, model="sft", **overrides):
    prompts = {"harmful": [Prompt(k, k) for k in OUTPUTS]}
    judge, engine = judge or Judge(), engine or Engine(OUTPUTS)
    rows = evaluate(model, engine, judge, prompts, load_settings("tiny", **overrides))
    return {(r["prompt_id"], r["trial"]): r for r in rows}, judge, engine


def test_rows():
    rows, judge, _ = run()
    assert all(set(r) == KEYS for r in rows.values()) and len(rows) == 5
    assert len(judge.calls) == 1
    assert judge.calls[0] == [("good", "draft"), ("good", "the revision"), ("same", "alike"), ("plain", "just text")]
    good = rows["good", 0]
    assert (good["r1"], good["r2"], good["r_answer"]) == (0.05, 0.12, 0.12)
    assert good["reward"] == final_reward(0.05, 0.12, 10, 1) and good["principles"] == {"honesty": 0.12}
    plain = rows["plain", 0]
    assert (plain["r1"], plain["r2"], plain["reward"], plain["r_answer"]) == (-1, -1, -2, 0.09)
    assert (plain["ok"], plain["problem"], plain["answer"]) == (False, "no_reflection", "just text")
    for name in ("open", "none"):
        r = rows[name, 0]
        assert (r["r1"], r["r2"], r["reward"], r["r_answer"], r["answer"], r["principles"]) == (-1, -1, -2, -1, "", {})
        assert r["refusal"] is False


def test_alpha_and_beta_come_from_the_settings():
    rows, _, _ = run(alpha=2, beta=3)
    assert rows["good", 0]["reward"] == final_reward(0.05, 0.12, 2, 3)


def test_mute_judge_stays_none():
    rows, _, _ = run(judge=Judge(mute=("draft", "just text")))
    good, plain = rows["good", 0], rows["plain", 0]
    assert (good["r1"], good["r2"], good["reward"], good["r_answer"]) == (None, 0.12, None, 0.12)
    assert plain["r_answer"] is None and plain["r1"] == -1


def test_sampling_settings_and_seeds():
    _, judge, engine = run(eval_trials=3)
    assert [c[:3] for c in engine.calls] == [(load_settings("tiny").eval_tokens, 0.7, 1.0)] * 3
    seeds = [c[3] for c in engine.calls]
    assert len(set(seeds)) == 3 and all(0 <= s < 2**31 for s in seeds)
    assert seeds == [c[3] for c in run(eval_trials=3, model="grpo")[2].calls]  # the models draw alike
    assert not set(seeds) & {c[3] for c in run(eval_trials=3, seed=1)[2].calls}
    assert len(judge.calls) == 1 and len(judge.calls[0]) == 4  # alike outputs are judged once


def test_a_set_draws_the_same_whatever_else_is_evaluated():
    engine, judge, s = Engine(OUTPUTS), Judge(), load_settings("tiny")
    evaluate("sft", engine, judge, {"benign": [Prompt("1", "good")], "harmful": [Prompt("2", "plain")]}, s)
    evaluate("sft", engine, judge, {"harmful": [Prompt("2", "plain")]}, s)
    assert engine.calls[1] == engine.calls[2]


def test_tokens_are_counted_if_the_engine_can():
    engine = Engine(OUTPUTS)
    engine.tokens = lambda segments: segments[0][0].split()
    rows, _, _ = run(engine=engine)
    assert rows["plain", 0]["tokens_out"] == 2 and run()[0]["plain", 0]["tokens_out"] is None


def test_outputs_that_were_cut_off_are_told_where_the_engine_knows():
    engine = Engine(OUTPUTS)
    engine.cut = [k == "good" for k in OUTPUTS]
    rows, _, _ = run(engine=engine)
    assert {k: r["cut"] for (k, _), r in rows.items()} == {k: k == "good" for k in OUTPUTS}
    assert rows["good", 0]["ok"] and rows["good", 0]["r2"] == run()[0]["good", 0]["r2"]  # scored on what is there
    both = {m: [r | {"model": m} for r in rows.values()] for m in ("sft", "grpo")}
    s = summarize(both)
    assert cell(s, "cut_rate", "sft")["estimate"] == 1 / len(OUTPUTS)
    assert comparison(s, "cut_rate", "sft", "grpo") is None and comparison(s, "parse_rate", "sft", "grpo")
    both["sft"][0]["cut"] = None
    assert "cut_rate" not in {r["metric"] for r in summarize(both)["table"]}


def test_progress_and_empty_sets():
    lines = []
    evaluate(
        "sft", Engine(OUTPUTS), Judge(), {"a": [Prompt("g", "good")]}, load_settings("tiny"), progress=lines.append
    )
    assert lines == ["sft: 1 outputs, a, trial 1 of 1", "sft: 2 texts to judge"]
    with pytest.raises(UserError, match="no benign prompts to evaluate sft on"):
        evaluate("sft", Engine(OUTPUTS), Judge(), {"benign": []}, load_settings("tiny"))


@HYPO
@given(st.text(alphabet="ab <>/think\n", max_size=60))
def test_any_output_makes_a_row(output):
    prompts = {"s": [Prompt("p", "p")]}
    (row,) = evaluate("sft", Engine({"p": output}), Judge(), prompts, load_settings("tiny"))
    assert set(row) == KEYS and row["ok"] == parse_trace(output).ok and row["answer"] == answer_of(output)
    assert row["ok"] or (row["r1"], row["r2"]) == (-1, -1)


# ---- summary


def row(pid, ok=True, refusal=False, r1=0.0, r2=0.0, reward=0.0, r_answer=0.0, name="harmful", trial=0):
    base = {"set": name, "prompt_id": pid, "trial": trial, "ok": ok, "refusal": refusal}
    return {**base, "r1": r1, "r2": r2, "reward": reward, "r_answer": r_answer}


def cell(summary, metric, model, name="harmful"):
    return next(r for r in summary["table"] if (r["set"], r["metric"], r["model"]) == (name, metric, model))


def comparison(summary, metric, a, b):
    return next((c for c in summary["comparisons"] if (c["metric"], c["a"], c["b"]) == (metric, a, b)), None)


def test_summary_by_hand():
    start = [row(i, ok=False, refusal=i < 1, r1=-1, r2=-1, reward=-2, r_answer=-0.5) for i in range(8)]
    grpo = [row(i, refusal=i < 7, r1=0.0, r2=0.5, reward=5.5, r_answer=0.5 - 0.1 * (i % 2)) for i in range(8)]
    s = summarize({"grpo": grpo, "start": start})
    assert [r["model"] for r in s["table"][:2]] == ["start", "grpo"]
    assert {r["metric"] for r in s["table"]} == set(METRICS) - {"cut_rate"} and len(s["table"]) == 12
    rate = cell(s, "refusal_rate", "grpo")  # Wilson, 7 of 8, by the textbook formula
    z, p, n = 1.959964, 7 / 8, 8
    mid, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n) / (1 + z * z / n),
    )
    assert (rate["estimate"], rate["n"]) == (7 / 8, 8)
    assert rate["low"] == pytest.approx(mid - half, abs=1e-6) and rate["high"] == pytest.approx(mid + half, abs=1e-6)
    assert cell(s, "r_answer", "grpo")["estimate"] == pytest.approx(0.45)
    for metric in ("r1", "r2", "reward"):
        assert cell(s, metric, "start") | {"set": 0} == {
            "set": 0, "metric": metric, "model": "start", "estimate": None, "low": None, "high": None, "n": 0
        }  # fmt: skip
        assert comparison(s, metric, "start", "grpo") is None
    c = comparison(s, "refusal_rate", "start", "grpo")
    assert (c["difference"], c["p"], c["n"]) == (6 / 8, pytest.approx(2 * 0.5**6), 8)
    c = comparison(s, "r_answer", "start", "grpo")
    assert c["difference"] == pytest.approx(0.95) and c["p"] == 2 / 2**8
    c = comparison(s, "parse_rate", "start", "grpo")
    assert (c["difference"], c["p"]) == (1, pytest.approx(2 * 0.5**8))
    ps = sorted(c["p"] for c in s["comparisons"])  # three: 1/128, 1/128, 1/32
    assert ps == pytest.approx([1 / 128, 1 / 128, 1 / 32])
    assert sorted(c["p_holm"] for c in s["comparisons"]) == pytest.approx([3 / 128, 3 / 128, 1 / 32])


def test_none_is_left_out_and_n_says_so():
    a = [row(i, r2=None if i < 3 else 0.1 * i) for i in range(8)]
    b = [row(i, r2=None if i == 5 else 0.1 * i + 0.2) for i in range(8)]
    s = summarize({"sft": a, "grpo": b})
    assert (cell(s, "r2", "sft")["n"], cell(s, "r2", "grpo")["n"]) == (5, 7)
    assert cell(s, "r2", "sft")["estimate"] == pytest.approx(0.5)
    c = comparison(s, "r2", "sft", "grpo")
    assert c["n"] == 4 and c["difference"] == pytest.approx(0.2)
    assert "(n = 5)" in summary_markdown(s)


def test_all_none_is_not_a_number():
    s = summarize({"sft": [row(i, r1=None) for i in range(4)], "grpo": [row(i) for i in range(4)]})
    assert cell(s, "r1", "sft")["estimate"] is None and comparison(s, "r1", "sft", "grpo") is None


def test_trials_are_clustered_by_prompt():
    one = summarize({"grpo": [row(i, refusal=i % 3 == 0, r2=i / 10) for i in range(12)]})
    rows = [row(i, refusal=i % 3 == 0, r2=i / 10, trial=t) for i in range(12) for t in range(5)]
    five = summarize({"grpo": rows})
    assert cell(five, "refusal_rate", "grpo")["n"] == 60
    for metric in ("refusal_rate", "r2"):
        wide, narrow = (c["high"] - c["low"] for c in (cell(one, metric, "grpo"), cell(five, metric, "grpo")))
        assert narrow > 0.8 * wide


@pytest.mark.parametrize("trials", [1, 3])
def test_rates_that_never_vary_have_an_interval(trials):
    def rows(refusal):
        return [row(i, ok=False, refusal=refusal, trial=t) for i in range(16) for t in range(trials)]

    s = summarize({"sft": rows(False), "grpo": rows(True)})
    low, high = cell(s, "refusal_rate", "sft"), cell(s, "refusal_rate", "grpo")
    assert (low["low"], low["high"]) == (0, pytest.approx(0.194, abs=1e-3))
    assert (high["low"], high["high"]) == (pytest.approx(1 - low["high"]), 1)
    change = comparison(s, "refusal_rate", "sft", "grpo")
    assert change["difference"] == 1 == change["high"] and 0.5 < change["low"] < 0.8
    assert change["p"] == pytest.approx(2 / 2**16) and change["n"] == 16 * trials
    same = comparison(s, "parse_rate", "sft", "grpo")
    assert same["low"] < -0.1 and same["high"] > 0.1 and same["p"] == 1


def test_one_prompt_has_no_interval():
    s = summarize({"sft": [row(1, r2=0.3)], "grpo": [row(1, r2=0.4)]})
    assert cell(s, "r2", "sft") == {
        "set": "harmful", "metric": "r2", "model": "sft", "estimate": 0.3, "low": None, "high": None, "n": 1
    }  # fmt: skip
    assert s["comparisons"] == [] and "| 0.30 |" in summary_markdown(s)


def test_models_must_have_answered_the_same():
    with pytest.raises(UserError, match="sft and grpo answered different harmful prompts"):
        summarize({"sft": [row(1), row(2)], "grpo": [row(1), row(3)]})
    with pytest.raises(UserError, match="answered different benign prompts"):
        summarize({"sft": [row(1)], "grpo": [row(1), row(1, name="benign")]})
    with pytest.raises(UserError, match="no evaluation rows of sft"):
        summarize({"sft": [], "grpo": [row(1)]})


def test_marks():
    start = [row(i, refusal=False, r_answer=0.1 * (i % 3)) for i in range(20)]
    grpo = [row(i, refusal=i < 18, r_answer=0.1 * (i % 3) - 0.5) for i in range(20)]
    s = summarize({"start": start, "grpo": grpo})
    head, *lines = summary_cells(s)
    by = {line[1]: line for line in lines}
    assert head == ["set", "metric", "start", "grpo"]
    assert by["refusal_rate"][3].endswith("▲") and by["r_answer"][3].endswith("▼") and by["r1"][3].endswith("tied")
    assert by["refusal_rate"][2].startswith("0.00 [0.00, ") and "\u2212" in by["r_answer"][3]


def test_rows_in_any_order_and_twice_give_the_same_summary():
    a = [row(i, r2=0.1 * i) for i in range(6)]
    b = [row(i, r2=0.3 * i) for i in range(6)]
    s = summarize({"sft": a, "grpo": b})
    assert s == summarize({"sft": a, "grpo": b})
    shuffled = summarize({"grpo": b[::-1], "sft": a})
    assert [c["difference"] for c in shuffled["comparisons"]] == pytest.approx(
        [c["difference"] for c in s["comparisons"]]
    )


@HYPO
@given(
    st.lists(st.tuples(st.booleans(), st.one_of(st.none(), st.floats(-1, 1))), min_size=1, max_size=6),
    st.integers(1, 2),
)
def test_summary_is_finite_or_none(drawn, trials):
    rows = {
        m: [
            row(i, ok=ok, refusal=ok, r1=x, r2=x, reward=x, r_answer=x, trial=t)
            for i, (ok, x) in enumerate(drawn)
            for t in range(trials)
        ]
        for m in ("start", "sft", "grpo")
    }
    s = summarize(rows)
    for r in s["table"]:
        assert all(r[k] is None or math.isfinite(r[k]) for k in ("estimate", "low", "high"))
        assert r["low"] is None or r["low"] <= r["estimate"] + 1e-9 <= r["high"] + 2e-9
    for c in s["comparisons"]:
        assert c["difference"] == 0 and c["p"] == c["p_holm"] == 1
    summary_markdown(s)
