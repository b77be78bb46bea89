"Room monitor: every rule fires and stays silent, stop rules, the state of a monitor, the line and the figure."

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qalign.core import UserError, append_jsonl, load_settings, write_json
from qalign.judge import Scorecard
from qalign.monitor import (
    RULES,
    Monitor,
    alarms,
    canary_numbers,
    live_panel,
    measures,
    panel_callback,
    progress_line,
    saturated,
    stops,
)
from qalign.pool import pool
from qalign.reward import RewardRecord
from qalign.rubric import Dimension, Principle, Question, Rubric, Verdict
from qalign.trace import Trace

CALM = settings(derandomize=True, max_examples=100, deadline=None)
TINY = load_settings("tiny")
HEALTHY = {"all_good": 0.1, "all_bad": 0.1, "unscored": 0.0, "truncated": 0.0, "parse_failures": 0.1, "kl": 0.01}
HEALTHY |= {"reward_std": 2.0, "completion_tokens": 100.0, "reward": 1.0, "r1": 0.1, "r2": 0.2}
HEALTHY |= {"benign_refusals": 0.1, "benign_helpfulness": 0.5}
ROWS = [{"step": i, **HEALTHY} for i in range(1, 10)]


def changed(key: str, value: float) -> list[dict]:
    "The healthy run, with one number different in the last three steps."
    return [r if r["step"] < 7 else {**r, key: value} for r in ROWS]


SHARES = ("all_good", "all_bad", "unscored", "truncated", "parse_failures", "kl")


def test_a_healthy_run_is_silent():
    assert alarms(ROWS, noise=0.5) == []
    assert set(measures(ROWS, noise=0.5)) == set(RULES)


@pytest.mark.parametrize("rule", SHARES)
def test_a_share_fires_above_its_bound_only(rule):
    bound = RULES[rule].bound
    assert [a.rule for a in alarms(changed(rule, bound + 0.01))] == [rule]
    assert alarms(changed(rule, bound - 0.01)) == []


@pytest.mark.parametrize("tokens, speaks", [(155.0, True), (145.0, False), (60.0, True), (70.0, False)])
def test_length_is_watched_both_ways(tokens, speaks):
    assert [a.rule for a in alarms(changed("completion_tokens", tokens))] == ["length"] * speaks


def test_length_needs_six_steps():
    assert "length" not in measures(changed("completion_tokens", 900.0)[4:])


@pytest.mark.parametrize("noise, speaks", [(1.01, True), (0.99, False), (0.0, False)])
def test_noise_against_spread(noise, speaks):
    assert [a.rule for a in alarms(ROWS, noise=noise)] == ["noise"] * speaks


def test_noise_against_no_spread_at_all():
    assert [a.rule for a in alarms(changed("reward_std", 0.0), noise=0.1)] == ["noise"]


@pytest.mark.parametrize("key, value, rule", [("refusals", 0.25, "refusals"), ("helpfulness", 0.35, "helpfulness")])
def test_canaries_against_the_first_look(key, value, rule):
    assert [a.rule for a in alarms(changed(f"benign_{key}", value))] == [rule]
    better = 0.0 if key == "refusals" else 0.9
    assert alarms(changed(f"benign_{key}", better)) == []
    assert alarms([{**ROWS[0], f"benign_{key}": 0.9 - value}]) == []  # one look compares with nothing


@pytest.mark.parametrize("rule", RULES)
def test_an_alarm_has_number_bound_and_remedy(rule):
    made = {
        **{name: (changed(name, 0.9), 0.0) for name in SHARES},
        "length": (changed("completion_tokens", 900.0), 0.0),
        "noise": (ROWS, 9.0),
        "refusals": (changed("benign_refusals", 0.9), 0.0),
        "helpfulness": (changed("benign_helpfulness", -0.9), 0.0),
    }
    (alarm,) = alarms(made[rule][0], made[rule][1])
    assert alarm.rule == rule and alarm.step == 9 and not alarm.stop and "\n" not in alarm.text
    for part in ("step 9: ", f"{alarm.value:.2f}", f"bound {RULES[rule].bound:g}", RULES[rule].remedy):
        assert part in alarm.text
    assert alarm.to_dict()["rule"] == rule


NUMBERS = st.one_of(st.none(), st.floats(-2, 1e6))


@CALM
@given(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(HEALTHY, NUMBERS)), max_size=12), st.floats(0, 10))
def test_any_rows_can_be_watched(some, noise):
    rows = [{"step": i, **r} for i, r in enumerate(some, 1)]
    assert all(math.isfinite(v) for v in measures(rows, noise).values())
    assert all(a.value > a.bound for a in alarms(rows, noise))


# ---- stop rules


@pytest.mark.parametrize("key", ["kl", "unscored", "truncated"])
def test_a_stop_rule_fires_at_its_bound_and_is_off_at_0(key):
    rows, name = changed(key, 0.5), f"stop_{key}"
    assert [a.rule for a in stops(rows, TINY.replace(**{name: 0.5}))] == [name]
    (alarm,) = stops(rows, TINY.replace(**{name: 0.4}))
    assert alarm.stop and f"{name} = 0.4" in alarm.text and RULES[key].remedy in alarm.text
    assert stops(rows, TINY.replace(**{name: 0.51})) == []
    assert stops(rows, TINY) == []


def test_a_stop_waits_for_three_steps():
    rows = [{"step": i, "kl": 9.0} for i in (1, 2, 3)]
    assert [len(stops(rows[:n], TINY.replace(stop_kl=0.1))) for n in (0, 1, 2, 3)] == [0, 0, 0, 1]


# ---- saturated questions

QUESTIONS = tuple(Question(f"q{i}", "graded", "?") for i in range(3))
RUBRIC = Rubric("toy", (Principle("harmlessness", (Dimension("d", QUESTIONS),)),), cap="")


def record(prompt_id: str, labels: str, reward: float | None, ok: bool = True) -> RewardRecord:
    said = tuple(Verdict(q.id, label) for q, label in zip(QUESTIONS, labels, strict=True))
    card = Scorecard("", "", said, pool(RUBRIC, said), 0)
    r = card.score.base if ok else -1.0
    trace = Trace("d", "r", "v", ok, "" if ok else "no_reflection")
    return RewardRecord("", "", trace, r, r, reward, r, reward, (card, card) if ok else (), prompt_id, 0)


def test_saturated_questions_are_those_all_agree_on():
    good = [record("a", "AAB", 1.0), record("a", "ABB", 1.0)]
    bad = [record("b", "FFF", -2.0), record("b", "BFF", -2.0)]
    mixed = [record("c", "AAA", 2.0), record("c", "AAF", -2.0)]
    assert saturated(good + bad + mixed) == {"all_good": ["q0"], "all_bad": ["q1", "q2"]}
    assert saturated(mixed) == saturated([]) == {"all_good": [], "all_bad": []}


def test_a_group_without_form_or_score_names_nothing():
    mute = [record("a", "AAA", None), record("a", "AAA", None)]
    formless = [record("b", "AAA", -2.0, ok=False), record("b", "AAA", -2.0, ok=False)]
    assert saturated(mute) == saturated(formless) == {"all_good": [], "all_bad": []}


def test_who_was_asked_nothing_has_no_say():
    bad = [record("b", "FFA", -2.0), record("b", "AAA", -2.0, ok=False), record("b", "FBA", -2.0)]
    assert saturated(bad) == {"all_good": [], "all_bad": ["q0"]}


def test_a_group_whose_labels_give_no_reward_is_neither():
    shy = [replace(record("a", "AAA", 1.0), hard_reward=None, hard_r2=None) for _ in range(2)]
    assert saturated(shy) == {"all_good": [], "all_bad": []}
    assert saturated([shy[0], record("a", "AAA", 1.0)]) == {"all_good": [], "all_bad": []}


def test_named_questions_are_shown_and_counted():
    names = {"all_good": [f"q{i}" for i in range(7)]}
    (alarm,) = alarms(changed("all_good", 0.9), names=names)
    assert "(saturated: q0, q1, q2 and 4 more)" in alarm.text


# ---- canaries


def test_canary_numbers():
    rows = [{"refusal": True, "helpfulness": None}, {"refusal": False, "helpfulness": 0.5}]
    assert canary_numbers(rows) == {"benign_refusals": 0.5, "benign_n": 2.0, "benign_helpfulness": 0.5}
    assert "benign_helpfulness" not in canary_numbers([{"refusal": True}])
    for wrong in ([], [{"helpfulness": 1.0}]):
        with pytest.raises(UserError, match="refusal"):
            canary_numbers(wrong)


# ---- the monitor


@CALM
@given(st.integers(0, 2**32), st.integers(0, 12))
def test_a_monitor_goes_on_where_its_state_was_left(seed, cut):
    rng = random.Random(seed)
    rows = [{"step": i, **{k: rng.random() for k in HEALTHY}} for i in range(1, 13)]
    s = TINY.replace(stop_kl=0.6, judge_noise=0.2)
    whole = Monitor(s)
    expected = [[a.text for a in whole.add(r)] for r in rows]
    first = Monitor(s)
    said = [[a.text for a in first.add(r)] for r in rows[:cut]]
    second = Monitor(s, **first.state())
    assert said + [[a.text for a in second.add(r)] for r in rows[cut:]] == expected


def test_an_alarm_is_reported_once_until_it_is_silent():
    monitor, high, low = Monitor(TINY), {"kl": 1.0}, {"kl": 0.0}
    run = [high, high, low, low, low, high]
    assert [[a.rule for a in monitor.add({"step": i, **r})] for i, r in enumerate(run, 1)] == [
        *([["kl"], [], [], [], []]),
        ["kl"],
    ]


# ---- line and figure


def test_the_line_has_a_bar_phases_and_time_left():
    phases = [{"generate": 5.0, "judge": 2.0, "train": 2.0, "canaries": 0.0, "save": 1.0}] * 3
    line = progress_line({"step": 3, "r1": 0.1, "reward": None, "kl": 0.0123}, 63, phases)
    split = "generate 50 %, judge 20 %, train 20 %, save 10 %"
    assert line == f"step 3 of 63: {'╸':─<20} · R1 0.10 · KL 0.01 · 10 s a step ({split}) · 10 min left"
    assert progress_line({"step": 1}, 2, []) == f"step 1 of 2: {'━' * 10}{'─' * 10}"
    slow = progress_line({"step": 1}, 101, [{"train": 3600.0}])
    assert "60 min a step" in slow and "100 h 00 min left" in slow


@CALM
@given(st.integers(1, 1000), st.integers(0, 1000))
def test_the_bar_has_one_width_and_grows(total, step):
    bars = [progress_line({"step": n}, total, []).split(": ")[1] for n in (0, min(step, total), total)]
    assert [len(b) for b in bars] == [20] * 3 and (bars[0], bars[2]) == ("─" * 20, "━" * 20)
    half = 2 * bars[1].count("━") + bars[1].count("╸")
    assert bars[1].lstrip("━").lstrip("╸").strip("─") == "" and half == 40 * min(step, total) // total


@pytest.mark.parametrize("encoding, plain", [("utf-8", False), (None, False), ("ascii", True), ("cp1252", True)])
def test_a_stream_that_cannot_write_the_bar_gets_a_plain_one(monkeypatch, encoding, plain):
    monkeypatch.setattr("sys.stdout", SimpleNamespace(encoding=encoding))
    line = progress_line({"step": 3, "kl": 0.5}, 8, [{"train": 2.0}])
    assert line.isascii() == plain and len(line) == len("step 3 of 8: ") + 20 + len(
        " | KL 0.50 | 2 s a step (train 100 %) | 10 s left"
    )
    assert not plain or line.startswith("step 3 of 8: =======-" + "." * 12 + " | KL 0.50")


def test_the_figure_draws_from_the_record_alone(tmp_path):
    with pytest.raises(UserError, match="no grpo rows"):
        live_panel(tmp_path)
    append_jsonl(tmp_path / "metrics.jsonl", {"stage": "sft", "step": 1, "loss": 1.0})
    with pytest.raises(UserError, match="no grpo rows"):
        live_panel(tmp_path)
    for row in changed("kl", 0.9):
        append_jsonl(tmp_path / "metrics.jsonl", {"stage": "grpo", **row})
    figure = live_panel(tmp_path)
    assert type(figure).__name__ == "Figure" and tuple(figure.get_size_inches()) == (6, 3)
    assert figure.get_suptitle() == "GRPO after step 9: alarms kl"
    drawn = [ax for ax in figure.axes if ax.lines]
    assert len(drawn) == 7 and list(drawn[0].lines[0].get_ydata()) == [0.1] * 9
    assert len(live_panel(tmp_path / "metrics.jsonl").axes) == len(figure.axes)


def test_the_headline_weighs_the_noise_that_the_run_was_told(tmp_path):
    for row in ROWS:
        append_jsonl(tmp_path / "metrics.jsonl", {"stage": "grpo", **row})
    for noise, said in ((0.0, "no alarm"), (0.9, "no alarm"), (1.1, "alarms noise")):
        settings = TINY.replace(judge_noise=noise)
        write_json(tmp_path / "settings.json", {"settings": settings.to_dict()})
        assert live_panel(tmp_path).get_suptitle() == f"GRPO after step 9: {said}"
        monitor = Monitor(settings)
        told = [a.rule for r in ROWS for a in monitor.add(r)]
        assert told == ["noise"] * (said != "no alarm")
    assert live_panel(tmp_path / "metrics.jsonl").get_suptitle() == "GRPO after step 9: alarms noise"


def test_a_figure_of_one_row_and_few_numbers(tmp_path):
    append_jsonl(tmp_path / "metrics.jsonl", {"stage": "grpo", "step": 1, "kl": 0.0, "r1": None})
    assert len([ax for ax in live_panel(tmp_path).axes if ax.lines]) == 1


def test_the_callback_refreshes_one_display(tmp_path, monkeypatch):
    shown = []

    class Shown:
        def update(self, figure):
            shown.append("update")

    def display(figure, display_id):
        shown.append("display")
        return Shown()

    monkeypatch.setattr("IPython.display.display", display)
    panel = panel_callback(tmp_path, every=2)
    steps = [SimpleNamespace(global_step=n) for n in range(1, 6)]
    panel.on_step_end(None, steps[0], None)  # no record yet
    append_jsonl(tmp_path / "metrics.jsonl", {"stage": "grpo", **ROWS[0]})
    for state in steps:
        panel.on_step_end(None, state, None)
    assert shown == ["display", "update", "update"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    panel.on_step_end(None, steps[0], None)  # the first process draws
    assert len(shown) == 3
