"Room reward: the formula, advantages against TRL, the callable's contract, the credit log and its replay."

import json
import math
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qalign.core import UserError, load_settings
from qalign.judge import Scorecard
from qalign.pool import GRADE, pool
from qalign.reward import (
    RubricReward,
    batch_metrics,
    credit_rows,
    fill_unscored,
    final_reward,
    group_advantages,
    judge_engine,
    read_credit,
    replay,
    write_credit,
)
from qalign.rubric import Dimension, Principle, Question, Rubric, Verdict
from qalign.trace import render_trace

CALM = settings(derandomize=True, max_examples=200, deadline=None)
TINY = load_settings("tiny", scores="hard")
score = st.floats(-1, 1)


def make_rubric() -> Rubric:
    def dimension(name: str) -> Dimension:
        kinds = {"g1": "gate", "g2": "gate", "q1": "graded", "q2": "graded", "q3": "graded"}
        return Dimension(name, tuple(Question(f"{name}.{k}", kind, "?") for k, kind in kinds.items()))

    names = ("harmlessness", "helpfulness", "honesty")
    return Rubric("toy", tuple(Principle(p, tuple(dimension(f"{p}{i}") for i in range(3))) for p in names))


RUBRIC = make_rubric()


def verdict(q: Question, rng: random.Random, mute: float) -> Verdict:
    labels = ("TRUE", "FALSE", "NA") if q.kind == "gate" else (*GRADE, "NA")
    if rng.random() < mute:
        return Verdict(q.id, None, status="failed")
    odds = [rng.random() ** 4 for _ in labels]
    probs = {k: o / sum(odds) for k, o in zip(labels, odds, strict=True)}
    label = max(probs, key=probs.__getitem__)
    return Verdict(q.id, label, probs if rng.random() < 0.7 else None, "na" if label == "NA" else "ok")


class RandomJudge:
    "Answers drawn from the text itself: the same response gets the same verdicts."

    def __init__(self, scores: str = "hard", mute: float = 0.0):
        self.rubric, self.scores, self.mute, self.calls = RUBRIC, scores, mute, []

    def score_many(self, pairs):
        self.calls.append(list(pairs))
        return [self.card(*pair) for pair in pairs]

    def card(self, prompt, response):
        rng = random.Random(f"{prompt}|{response}")
        mute = self.mute if "mute" not in response else 1.0
        said = tuple(verdict(q, rng, mute) for q in RUBRIC.questions)
        return Scorecard(prompt, response, said, pool(RUBRIC, said, self.scores), tokens=7, seconds=0.25)


def batch(n_prompts: int = 3, group: int = 4, broken: tuple[int, ...] = (), mute: tuple[int, ...] = ()):
    prompts = [f"prompt {i // group}" for i in range(n_prompts * group)]
    texts = [
        render_trace(f"draft {i}", "Wait.", f"mute {i}" if i in mute else f"better {i}") for i in range(len(prompts))
    ]
    return prompts, ["no block at all" if i in broken else t for i, t in enumerate(texts)]


# the formula


@pytest.mark.parametrize(
    "r1, r2, r",
    [(-1, 1, 20), (0, 1, 11), (0.9, 1, 2.9), (1, 1, 2), (1, -1, -2), (-1, -0.5, 3.5), (-1, 0.9, 18.9), (-1, -1, -2)],
)
def test_worked_values(r1, r2, r):
    assert final_reward(r1, r2) == pytest.approx(r, abs=1e-12)


@CALM
@given(score, score, st.floats(0, 50), st.floats(0, 50))
def test_bounds_are_at_the_corners(r1, r2, alpha, beta):
    r = final_reward(r1, r2, alpha, beta)
    assert min(-2, -2 * beta) - 1e-9 <= r <= max(2, 2 * alpha) + 1e-9
    assert -2 <= final_reward(r1, r2) <= 20


@CALM
@given(score, score, score, st.floats(0, 50), st.floats(0, 50))
def test_monotone_in_the_revision(r1, a, b, alpha, beta):
    low, high = sorted((a, b))
    assert final_reward(r1, low, alpha, beta) <= final_reward(r1, high, alpha, beta) + 1e-9


@CALM
@given(score, score, st.floats(-1e-6, 1e-6), st.floats(-1e-6, 1e-6))
def test_continuous(r1, r2, d1, d2):
    near = final_reward(max(-1, min(1, r1 + d1)), max(-1, min(1, r2 + d2)))
    assert abs(near - final_reward(r1, r2)) <= 9 * abs(d1) + 11 * abs(d2) + 1e-9


@CALM
@given(score, score)
def test_slopes(r1, r2):
    h = 1e-4
    if abs(r1 - r2) > 2 * h and abs(r1) < 1 - h:
        slope = (final_reward(r1 + h, r2) - final_reward(r1 - h, r2)) / (2 * h)
        assert slope == pytest.approx(-9 if r2 > r1 else 0, abs=1e-6)


@pytest.mark.parametrize("bad", [1.1, -1.1, math.nan, math.inf, -math.inf])
def test_scores_outside_are_refused(bad):
    for args in ((bad, 0), (0, bad), (bad, None), (None, bad)):
        with pytest.raises(UserError, match="between -1 and 1"):
            final_reward(*args)
    assert final_reward(None, 0.5) is final_reward(0.5, None) is final_reward(None, None) is None
    assert final_reward(1 + 1e-12, 1) == pytest.approx(2)


# advantages

rewards = st.lists(st.none() | st.floats(-2, 20), min_size=4, max_size=40).map(lambda x: x[: len(x) // 4 * 4])


def slow_advantages(values, size):
    out = []
    for i in range(len(values)):
        group = [v for v in values[i // size * size : i // size * size + size] if v is not None]
        if values[i] is None or len(group) < 2:
            out.append(0.0)
            continue
        mean = sum(group) / len(group)
        std = (sum((v - mean) ** 2 for v in group) / (len(group) - 1)) ** 0.5
        out.append((values[i] - mean) / (std + 1e-4))
    return out


@CALM
@given(rewards)
def test_advantages_against_slow_reference(values):
    assert group_advantages(values, 4) == pytest.approx(slow_advantages(values, 4), abs=1e-7)


@CALM
@given(rewards)
def test_advantages_of_a_group_sum_to_zero(values):
    advantages = group_advantages(values, 4)
    for i in range(0, len(values), 4):
        assert sum(advantages[i : i + 4]) == pytest.approx(0, abs=1e-6)
        assert all(abs(a) < 4 for a in advantages[i : i + 4])


def trl_advantages(values, size):
    "What TRL 1.16 does with the rewards of one function (`sum_then_normalize`, scaled by group)."
    torch = pytest.importorskip("torch")
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    r = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)
    mean = torch.nanmean(r.view(-1, size), dim=1).repeat_interleave(size)
    std = nanstd(r.view(-1, size), dim=1).repeat_interleave(size)
    return torch.nan_to_num((r - mean) / (std + 1e-4), nan=0.0).tolist()


def test_advantages_against_trl():
    rng = random.Random(0)
    for _ in range(300):
        values = [rng.choice([None, -2.0, 18.9, rng.uniform(-2, 20), rng.uniform(-2, 20)]) for _ in range(15)]
        assert group_advantages(values, 5) == pytest.approx(trl_advantages(values, 5), abs=1e-6)
        filled = trl_advantages(fill_unscored(values, [i // 5 for i in range(15)]), 5)
        assert all(abs(a) < 1e-6 for a, v in zip(filled, values, strict=True) if v is None)


@CALM
@given(rewards)
def test_fill_gives_no_advantage(values):
    filled = fill_unscored(values, [i // 4 for i in range(len(values))])
    assert [f for f, v in zip(filled, values, strict=True) if v is not None] == [v for v in values if v is not None]
    for a, v in zip(group_advantages(filled, 4), values, strict=True):
        assert v is not None or abs(a) < 1e-9
    for i in range(0, len(values), 4):
        if values[i : i + 4] == [None] * 4:
            assert filled[i : i + 4] == [0.0] * 4


def test_groups_end_where_the_label_changes():
    assert fill_unscored([1, None, None, 5, None], ["a", "a", "b", "a", "a"]) == [1, 1, 0, 5, 5]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: group_advantages([1, 2, 3], 2), "whole groups of 2, got 3"),
        (lambda: group_advantages([], 0), "whole groups of 0"),
        (lambda: group_advantages([1, math.nan], 2), "numbers or None, got nan"),
        (lambda: fill_unscored([1], []), "one group label per reward"),
    ],
)
def test_errors(call, message):
    with pytest.raises(UserError, match=message):
        call()


# the callable


def test_strings_and_conversations_give_the_same():
    prompts, texts = batch(broken=(2,), mute=(5,))
    f = RubricReward(RandomJudge(), TINY)
    plain = f(prompts, texts, fill=False)
    chats = [[{"role": "user", "content": "before"}, {"role": "user", "content": p}] for p in prompts]
    replies = [[{"role": "assistant", "content": t}] for t in texts]
    assert f(chats, replies, fill=False, anything=[1] * 12, trainer_state=None) == plain
    assert plain[2] == -2 and plain[5] is None and sum(r is None for r in plain) == 1


def test_one_call_of_the_judge_and_what_it_is_asked():
    prompts, texts = batch(broken=(0, 3))
    judge = RandomJudge()
    f = RubricReward(judge, TINY)
    found = f(prompts, texts)
    left = [i for i in range(12) if i not in (0, 3)]
    assert judge.calls == [[(prompts[i], part) for i in left for part in (f"draft {i}", f"better {i}")]]
    for record, reward in zip(f.last, found, strict=True):
        if record.scorecards:
            r1, r2 = (card.score.base for card in record.scorecards)
            assert (record.r1, record.r2, reward) == (r1, r2, final_reward(r1, r2))
        else:
            assert (record.r1, record.r2, reward, record.trace.problem) == (-1, -1, -2, "no_reflection")
    assert [r.index for r in f.last] == list(range(12))


def test_all_unparsable_does_not_wake_the_judge():
    judge = RandomJudge()
    f = RubricReward(judge, TINY)
    assert f(["p"] * 3, ["", "<think>", "a <think> b"]) == [-2.0] * 3 and judge.calls == []
    numbers = f.metrics()
    assert (numbers["parse_failures"], numbers["all_bad"], numbers["all_good"], numbers["judge_tokens"]) == (1, 1, 0, 0)


def test_only_a_completion_without_an_end_is_cut():
    prompts, texts = batch()
    full, f = TINY.completion_tokens, RubricReward(RandomJudge(), TINY, ends=(2, 7))
    plain = f(prompts, texts)
    tokens = [[1] * full, [1] * (full - 1) + [7], [1] * (full - 1), *[[1, 2]] * 9]
    assert f(prompts, texts, completion_ids=tokens) == [-2.0, *plain[1:]]
    assert [r.trace.problem for r in f.last][:2] == ["truncated", ""]


def test_settings_reach_the_formula():
    prompts, texts = batch()
    f = RubricReward(RandomJudge(), TINY.replace(alpha=3, beta=2))
    assert f(prompts, texts) == [final_reward(r.r1, r.r2, 3, 2) for r in f.last]


def test_fill_is_the_default_and_the_records_keep_none():
    prompts, texts = batch(mute=(1, 8, 9, 10, 11))
    f = RubricReward(RandomJudge(), TINY)
    filled, bare = f(prompts, texts), RubricReward(RandomJudge(), TINY, fill_groups=False)(prompts, texts)
    assert [r.reward for r in f.last] == bare and bare[8:] == [None] * 4 and filled[8:] == [0.0] * 4
    assert filled == fill_unscored(bare, prompts) and group_advantages(filled, 4)[1] == pytest.approx(0, abs=1e-12)
    assert f.metrics()["unscored"] == 5 / 12


def test_metrics_against_records():
    prompts, texts = batch(broken=(4, 5, 6, 7), mute=(1,))
    texts[8:] = [texts[8]] * 4
    f = RubricReward(RandomJudge(), TINY)
    f(prompts, texts)
    numbers, scored = f.metrics(), [r for r in f.last if r.reward is not None]
    assert numbers["reward"] == pytest.approx(sum(r.reward for r in scored) / 11)
    assert (numbers["parse_failures"], numbers["unscored"]) == (4 / 12, 1 / 12)
    good = f.last[8].r2 > 0
    assert (numbers["all_good"], numbers["all_bad"]) == (good / 3, (2 - good) / 3)
    assert numbers["judge_tokens"] == 7 * 16 and f.judge_seconds == 0.25 * 16
    scores = [r.scorecards[0].score for r in f.last if r.scorecards]
    known = [s.principles["harmlessness"] for s in scores if s.base is not None]
    assert numbers["draft/harmlessness"] == pytest.approx(sum(known) / len(known))
    assert all(v is None or math.isfinite(v) for v in numbers.values()) and json.dumps(numbers)
    names = {"index", "prompt_id", "prompt", "completion", "r1", "r2", "reward", "problem"}
    assert set(f.last[0].to_dict()) == names and batch_metrics(f.last) == numbers


def test_a_part_without_a_score_enters_no_mean():
    "Too many verdicts failed: the principles that are left are not shown as if they had been scored."
    prompts, texts = batch(6)
    f = RubricReward(RandomJudge(mute=0.05), TINY)
    f(prompts, texts)
    for i, part in enumerate(("draft", "revision")):
        scores = [r.scorecards[i].score for r in f.last]
        left = [s.principles["honesty"] for s in scores if s.base is None]
        known = [s.principles["honesty"] for s in scores if s.base is not None]
        assert len(left) > 1 and len(known) > 1 and None not in left + known
        assert f.metrics()[f"{part}/honesty"] == pytest.approx(sum(known) / len(known))
    f(*batch(mute=range(12)))
    assert f.metrics()["revision/honesty"] is None and f.metrics()["draft/honesty"] is not None


def test_labels_that_give_no_score_are_neither_good_nor_bad():
    class Shy(RandomJudge):
        "NA is the likeliest answer to everything, and the others have probabilities."

        def card(self, prompt, response):
            best = {"gate": "TRUE", "graded": "A"}
            said = tuple(Verdict(q.id, "NA", {"NA": 0.9, best[q.kind]: 0.1}, "na") for q in RUBRIC.questions)
            return Scorecard(prompt, response, said, pool(RUBRIC, said, self.scores), tokens=7, seconds=0.25)

    f = RubricReward(Shy("expected"), TINY.replace(scores="expected"))
    assert f(*batch(2))[0] == pytest.approx(2.0)
    assert {r.hard_reward for r in f.last} == {None} and f.metrics()["unscored"] == 0
    assert (f.metrics()["all_good"], f.metrics()["all_bad"]) == (0, 0)


class Doubter(RandomJudge):
    "The same labels for every response, less sure of some: probabilities from the text."

    def card(self, prompt, response):
        sure = 0.6 + 0.4 * random.Random(response).random()
        best = {"gate": ("TRUE", "FALSE"), "graded": ("A", "F")}
        pairs = [(q.id, *best[q.kind]) for q in RUBRIC.questions]
        said = tuple(Verdict(i, good, {good: sure, bad: 1 - sure}) for i, good, bad in pairs)
        return Scorecard(prompt, response, said, pool(RUBRIC, said, self.scores), tokens=7, seconds=0.25)


def test_a_group_that_differs_in_doubt_alone_is_flat():
    prompts, texts = batch(1)
    hard, expected = RubricReward(Doubter(), TINY), RubricReward(Doubter("expected"), TINY.replace(scores="expected"))
    assert set(hard(prompts, texts)) == {2.0} and len(set(expected(prompts, texts))) == 4
    assert [r.hard_reward for r in expected.last] == [2.0] * 4 == [r.hard_reward for r in hard.last]
    numbers = expected.metrics()
    assert (numbers["all_good"], numbers["all_bad"]) == (1, 0) and numbers["reward_std"] > 0


def test_the_hard_reward_is_what_hard_scores_pay():
    prompts, texts = batch(broken=(0, 3), mute=(5,))
    hard, expected = (
        RubricReward(RandomJudge(), TINY),
        RubricReward(RandomJudge("expected"), TINY.replace(scores="expected")),
    )
    assert hard(prompts, texts, fill=False) == [r.hard_reward for r in hard.last]
    assert expected(prompts, texts, fill=False) != [r.hard_reward for r in expected.last]
    assert [r.hard_reward for r in expected.last] == [r.hard_reward for r in hard.last]


def test_metrics_of_nothing():
    f = RubricReward(RandomJudge(), TINY)
    assert f([], []) == [] and f.metrics()["reward"] is None and f.metrics()["all_good"] is None


def test_prompt_ids_make_the_groups():
    texts = [render_trace("d", "w", "mute"), render_trace("d", "w", "v")] * 2
    f = RubricReward(RandomJudge(), TINY)
    given = f(["p"] * 4, texts, prompt_id=[1, 1, 2, 2])
    assert [r.prompt_id for r in f.last] == ["1", "1", "2", "2"] and given[0] == given[1] == given[2]


def test_pickle():
    f = pickle.loads(pickle.dumps(RubricReward(RandomJudge(), TINY)))
    assert f.__name__ == "rubric_reward" and f(*batch()) == RubricReward(RandomJudge(), TINY)(*batch())


@pytest.mark.parametrize(
    "prompts, completions, columns, message",
    [
        (["p"], [], {}, "got 1 prompts, 0 completions"),
        (["p"], ["c"], {"prompt_id": ["a", "b"]}, "2 ids"),
        ([[{"role": "system", "content": "s"}]], ["c"], {}, "text from the user"),
        (["p"], [[{"role": "assistant", "content": None}]], {}, "text from the assistant"),
        (["p"], [None], {}, "text from the assistant"),
    ],
)
def test_bad_batches(prompts, completions, columns, message):
    with pytest.raises(UserError, match=message):
        RubricReward(RandomJudge(), TINY)(prompts, completions, **columns)


def test_a_judge_of_its_own_is_loaded_like_the_policy(monkeypatch):
    from qalign.engine import HFEngine

    here, asked = HFEngine(None, None, "hf:m"), []
    engines = {"hf:m": here, "vllm:m": "a", "openai:m@http://localhost:9/v1": "b"}
    monkeypatch.setattr("qalign.engine.load_engine", lambda *how: asked.append(how) or engines[how[0]])
    for judge in engines:
        s = TINY.replace(judge=judge, judge_rows=3, generate_batch=5, quantization="nf4")
        found = judge_engine(s)
        assert found == engines[judge] if judge != "hf:m" else (found.rows, found.batch) == (3, 5)
    assert [precision for _, precision in asked] == ["nf4", "none", "nf4"]  # vLLM has no 4-bit base
    assert (here.rows, here.batch) == (8, 32)  # others may hold it


def test_a_judge_that_loses_a_response_is_an_error():
    judge = SimpleNamespace(rubric=RUBRIC, score_many=lambda pairs: [])
    with pytest.raises(UserError, match="expected 24 scorecards of the judge, got 0"):
        RubricReward(judge, TINY)(*batch())


def test_trl_calls_it(tmp_path, monkeypatch):
    "TRL's own `_calculate_rewards`, on a trainer that is nothing but the attributes it reads."
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("trl.trainer.grpo_trainer")
    monkeypatch.setattr(module, "gather", lambda x: x)  # one process
    monkeypatch.setattr(module, "logger", SimpleNamespace(warning=lambda *args: None))
    prompts, texts = batch(broken=(2,), mute=(5,))
    chats = [[{"role": "user", "content": p}] for p in prompts]
    replies = [[{"role": "assistant", "content": t}] for t in texts]
    inputs = [{"prompt": c, "prompt_id": p, "weight": 1.0} for c, p in zip(chats, prompts, strict=True)]
    for fill in (True, False):
        f, logged = RubricReward(RandomJudge(), TINY, tmp_path / f"run{fill}", fill_groups=fill), {}
        fake = SimpleNamespace(
            accelerator=SimpleNamespace(device=torch.device("cpu"), is_main_process=False),
            args=SimpleNamespace(report_to=[]),
            reward_funcs=[f],
            reward_processing_classes=[None],
            reward_func_names=[f.__name__],
            state=SimpleNamespace(global_step=11),
            environments=None,
            _log_completion_extra=lambda column, values: None,
            _log_metric=logged.__setitem__,
        )
        got = module.GRPOTrainer._calculate_rewards(fake, inputs, chats, replies, [[1]] * 12)[:, 0]
        assert f.step == 12 and (f.folder / "credit" / "step-000012.parquet").exists()
        assert set(logged) == {"r1", "r2"} and logged["r1"] == f.metrics()["r1"]
        bare = [r.reward for r in f.last]
        wanted = fill_unscored(bare, prompts) if fill else [math.nan if r is None else r for r in bare]
        assert torch.allclose(got, torch.tensor(wanted), equal_nan=True) and got.isnan().sum() == (not fill)


# the credit log


@pytest.mark.parametrize("scores", ["hard", "expected"])
@pytest.mark.parametrize("mute", [0.0, 0.04])
def test_replay_is_bit_equal(tmp_path, scores, mute):
    setting = TINY.replace(scores=scores)
    f = RubricReward(RandomJudge(scores, mute), setting, tmp_path / "run")
    records = {}
    for step in range(1, 6):
        prompts, texts = batch(6, 4, broken=(step, 9), mute=(7,))
        f([f"{step} {p}" for p in prompts], texts, step=step)
        records |= {(step, r.index): r for r in f.last}
    frame = read_credit(tmp_path / "run")
    again = replay(frame, RUBRIC, setting)
    assert len(again) == 5 * 22 and again.same.all()
    for row in again.to_dict("records"):
        record = records[row["step"], row["completion"]]
        for name in ("r1", "r2", "reward"):
            value, wanted = row[name], getattr(record, name)
            assert math.isnan(value) if wanted is None else value.hex() == float(wanted).hex()
    assert again.reward.isna().sum() >= 5 and again.reward.notna().sum() > 20


def test_replay_notices():
    f = RubricReward(RandomJudge(), TINY)
    f(*batch())
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(credit_rows(f.last, "run", 1, RUBRIC))
    assert replay(frame, RUBRIC, TINY).same.all()
    assert not replay(frame, RUBRIC, TINY.replace(alpha=9)).same.all()
    for column in ("base", "reward"):
        changed = frame.copy()
        row = changed.index[changed.completion == 3][0]
        changed.loc[row, column] += 1e-15
        assert replay(changed, RUBRIC, TINY).same.tolist() == [i != 3 for i in range(12)]
    with pytest.raises(UserError, match="no rows of one part"):
        replay(frame[frame.part == "draft"], RUBRIC, TINY)
    with pytest.raises(UserError, match="has no such question"):
        replay(frame, Rubric("less", RUBRIC.principles[:1]), TINY)


def test_rows_say_everything():
    f = RubricReward(RandomJudge(), TINY)
    f(*batch(broken=(0,)), prompt_id=[f"p{i // 4}" for i in range(12)])
    rows = credit_rows(f.last, "run", 3, RUBRIC)
    assert len(rows) == 11 * 2 * len(RUBRIC.questions)
    for r in rows:
        record = f.last[r["completion"]]
        card = record.scorecards[r["part"] == "revision"]
        said = next(v for v in card.verdicts if v.question_id == r["question_id"])
        assert (r["run"], r["step"], r["prompt_id"]) == ("run", 3, f"p{r['completion'] // 4}")
        assert (r["label"], r["status"]) == (said.label, said.status)
        assert said.probs == (None if r["probs"] is None else json.loads(r["probs"]))
        assert r["dimension_score"] == card.score.dimensions[r["dimension"]] and r["base"] == card.score.base
        assert r["value"] == {**GRADE, "TRUE": 1, "FALSE": -1}.get(r["label"]) and r["reward"] == record.reward
        assert r["question_id"].startswith(r["dimension"]) and r["dimension"].startswith(r["principle"])


def names(folder):
    return sorted(p.name for p in (folder / "credit").iterdir())


def test_files_of_steps_calls_and_resumed_runs(tmp_path):
    run = tmp_path / "run"
    f = RubricReward(RandomJudge(), TINY, run)
    prompts, texts = batch()
    for step, part in ((1, slice(None)), (2, slice(0, 4)), (2, slice(4, 8)), (2, slice(8, 12))):
        f(prompts[part], texts[part], step=[step] * 4)
    assert names(run) == ["step-000001.parquet", *(f"step-000002{s}.parquet" for s in ("-1", "-2", ""))]
    whole = read_credit(run)
    assert whole.step.is_monotonic_increasing and sorted(set(whole[whole.step == 2].completion)) == list(range(12))
    assert replay(whole, RUBRIC, TINY).same.all() and len(replay(whole, RUBRIC, TINY)) == 24
    first, second = (whole[whole.step == k].drop(columns="step").to_dict("list") for k in (1, 2))
    assert repr(first) == repr(second)
    resumed = RubricReward(RandomJudge(), TINY, run)
    resumed(prompts, texts, trainer_state=SimpleNamespace(global_step=1))
    assert names(run) == ["step-000001.parquet", "step-000002.parquet"]
    assert repr(read_credit(run).to_dict("list")) == repr(whole.to_dict("list"))
    resumed(prompts, texts)
    assert resumed.step == 3 and names(run)[-1] == "step-000003.parquet"


def as_process(monkeypatch, place, many):
    monkeypatch.setenv("RANK", str(place))
    monkeypatch.setenv("WORLD_SIZE", str(many))


@pytest.mark.parametrize("many", [2, 3, 4])
def test_processes_write_the_log_of_one(tmp_path, monkeypatch, many):
    prompts, texts = batch(broken=(2,), mute=(5,))  # three groups of four, cut into `many` parts
    alone = RubricReward(RandomJudge(), TINY, tmp_path / "run", fill_groups=False)
    alone(prompts, texts, step=1)
    straight, found, part = read_credit(tmp_path / "run"), [], 12 // many
    for place in range(many):
        as_process(monkeypatch, place, many)
        f = RubricReward(RandomJudge(), TINY, tmp_path / "shared" / "run", fill_groups=False)
        mine = slice(place * part, (place + 1) * part)
        f(prompts[mine], texts[mine], step=1)
        found += f.last
    shared = read_credit(tmp_path / "shared" / "run")
    assert repr(shared.to_dict("list")) == repr(straight.to_dict("list"))
    assert [r.index for r in found] == list(range(12)) and batch_metrics(found) == alone.metrics()
    assert replay(shared, RUBRIC, TINY).same.all()


def test_calls_within_a_step_go_on_counting(tmp_path, monkeypatch):
    prompts, texts = batch()
    for place in (0, 1):
        as_process(monkeypatch, place, 2)
        f = RubricReward(RandomJudge(), TINY, tmp_path / "run", fill_groups=False)
        for start in (3 * place, 6 + 3 * place):
            f(prompts[start : start + 3], texts[start : start + 3], step=1)
            assert [r.index for r in f.last] == list(range(start, start + 3))
    assert sorted(set(read_credit(tmp_path / "run").completion)) == list(range(12))


def test_a_repeated_step_takes_away_its_own_files_and_those_of_no_process_there_is(tmp_path, monkeypatch):
    prompts, texts = batch(1)

    def call(place, many, step=1):
        as_process(monkeypatch, place, many)
        RubricReward(RandomJudge(), TINY, tmp_path / "run", fill_groups=False)(prompts, texts, step=step)

    for place, many, step in ((0, 1, 1), (0, 1, 2), (0, 2, 1), (1, 2, 1)):
        call(place, many, step)
    two = ["step-000001.0of2.parquet", "step-000001.1of2.parquet", "step-000002.parquet"]
    assert names(tmp_path / "run") == two  # the file of the one that was alone is gone
    call(0, 2)
    assert names(tmp_path / "run") == two
    call(2, 3)
    assert names(tmp_path / "run") == ["step-000001.2of3.parquet", two[2]]
    call(0, 1)
    assert names(tmp_path / "run") == ["step-000001.parquet", "step-000002.parquet"]


def test_a_split_group_has_no_mean_in_one_process(monkeypatch):
    as_process(monkeypatch, 1, 2)
    f = RubricReward(RandomJudge(), TINY)
    with pytest.raises(UserError, match=r"a group may be split between processes.*use fill_groups=False"):
        f(*batch())
    assert f.last == [] and len(f(*batch(), fill=False)) == 12


def test_a_failed_call_leaves_no_trace(tmp_path):
    f = RubricReward(RandomJudge(), TINY, tmp_path / "run")
    f(*batch(), step=1)
    before = f.last
    with pytest.raises(UserError):
        f(["p"], [None], step=2)
    assert f.last is before and f.step == 1
    f(*batch(), step=2)
    assert names(tmp_path / "run") == ["step-000001.parquet", "step-000002.parquet"]


@pytest.mark.parametrize("where", ["pyarrow.parquet.write_table", "os.fsync", "os.replace"])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, where):
    pytest.importorskip("pyarrow.parquet")
    f = RubricReward(RandomJudge(), TINY)
    f(*batch())
    path = tmp_path / "run" / "credit" / "step-000001.parquet"
    write_credit(path, credit_rows(f.last, "run", 1, RUBRIC))
    old = path.read_bytes()

    def full(*args, **kwargs):
        if where.startswith("pyarrow"):
            args[1].write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(where, full)
    with pytest.raises(OSError, match="no space"):
        write_credit(path, credit_rows(f.last[:2], "run", 1, RUBRIC))
    assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]


def test_empty_log(tmp_path):
    with pytest.raises(UserError, match="no credit log in run/credit"):
        read_credit(tmp_path / "run")
    write_credit(tmp_path / "run" / "credit" / "step-000001.parquet", [])
    frame = read_credit(tmp_path / "run")
    assert len(frame) == 0 and len(replay(frame, RUBRIC, TINY)) == 0


def test_import_is_light():
    heavy = ("torch", "pyarrow", "pandas", "transformers", "matplotlib")
    code = f"import sys, qalign.reward; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.slow
def test_a_real_run_of_trl_grpo(tmp_path):
    from qalign.bench import shape_engine

    micro, data = shape_engine("micro", "fp32"), tmp_path / "data"
    micro.model.save_pretrained(tmp_path / "model")
    micro.tokenizer.save_pretrained(tmp_path / "model")
    data.mkdir()
    rows = [{"prompt": [{"role": "user", "content": f"Number {i}?"}], "prompt_id": str(i)} for i in range(8)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {"model_name_or_path": tmp_path / "model", "dataset_name": data, "output_dir": tmp_path / "out"}
    told |= {"reward_funcs": "qalign.reward.rubric_reward", "per_device_train_batch_size": 2, "num_generations": 2}
    told |= {"max_completion_length": 16, "max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": "true"}
    told |= {"bf16": "false", "save_strategy": "no", "remove_unused_columns": "false"}
    where = {"QALIGN_PRESET": "tiny", "QALIGN_JUDGE": "smollm2", "QALIGN_COMPLETION_TOKENS": "16"}
    done = subprocess.run(
        [Path(sys.executable).with_name("trl"), "grpo", *(x for k, v in told.items() for x in (f"--{k}", str(v)))],
        env={**os.environ, **where, "HF_HUB_OFFLINE": "1", "QALIGN_RUN": str(tmp_path / "run")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout + done.stderr  # random weights write no transcript: -1 for both parts
    assert said.count("'rewards/rubric_reward/mean': '-2'") == 2 and "'r1': '-1'" in said
    assert (tmp_path / "out" / "model.safetensors").is_file() and (tmp_path / "run" / "credit").is_dir()
