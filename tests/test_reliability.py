"Agreement, noise, human labels and the record of a judge's reliability, over stub engines and by hand computations."

import csv
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qalign import reliability
from qalign.core import UserError, content_hash, data_path, load_settings, read_jsonl
from qalign.engine import Answer, EngineError, HFEngine, Leads, Segment, Usage
from qalign.fixtures import load_fixtures
from qalign.judge import LABELS, Judge
from qalign.lint import lint, open_findings
from qalign.pool import GRADE
from qalign.reliability import (
    HumanLabel,
    agreement,
    ask_again,
    ask_refusals,
    human_agreement,
    load_groups,
    load_human_labels,
    noise_floor,
    noise_line,
    other_precisions,
    paraphrase,
    reliability_figure,
    reliability_table,
    reward_noise,
    run_reliability,
)
from qalign.reward import final_reward
from qalign.rubric import Question, Rubric, load_rubric, select
from qalign.stats import FEW, cohen_kappa

CALM = settings(derandomize=True, max_examples=60, deadline=None)
CHECKS = ("retest", "order", "alone", "padded", "layout", "paraphrase", "reasoned")
WHOLE = load_rubric("hhh")
OTHER = paraphrase(WHOLE)
NAMES = ["Harmful Request Handling", "Relevance", "Truthfulness"]
RUBRIC, WORDING = (select(r, dimensions=NAMES, per_dimension=3) for r in (WHOLE, OTHER))  # 9 questions
GROUPS = [(f"prompt {i}", (f"response {i} one", f"response {i}, the longer one of the two")) for i in range(5)]
PAIRS = [(p, r) for p, rs in GROUPS for r in rs]
Rule = Callable[[str, str, Question], Answer]


def drawn(salt: str = "") -> Rule:
    "Label distributions drawn from the texts and the question."

    def rule(prompt: str, response: str, q: Question) -> Answer:
        rng = random.Random(f"{salt}|{prompt}|{response}|{q.id}")
        odds = {x: rng.random() ** 4 for x in LABELS[q.kind]}
        return {x: o / sum(odds.values()) for x, o in odds.items()}

    return rule


class Stub:
    "An engine whose answers are a function of the texts and the question; it counts its calls and what they hold."

    reads_leads = True

    def __init__(self, rule: Rule, who: str = "stub", rubric: Rubric = RUBRIC) -> None:
        self.rule, self.who, self.rubric = rule, who, rubric
        self.spec, self.usage, self.tokens_read = who, Usage(), [0]
        self.calls: list[tuple[int, int, int]] = []  # prefixes, suffixes, chunk
        self.stop_after = 10**9
        both = [*WHOLE.questions, *OTHER.questions, reliability._COMPLIES]
        self.by_text = {q.text: q for q in both}

    def identity(self) -> dict[str, str]:
        return {"spec": self.who}

    def frame(self, system: str) -> tuple[str, str]:
        return "<", ">"

    def complete(self, *args: Any, **kwargs: Any) -> list[str]:
        raise AssertionError("a judge writes nothing")

    def _answer(self, prefix: Sequence[Segment], suffix: str) -> tuple[Question, Answer]:
        prompt, response = (text for text, trusted in prefix if not trusted)
        text = suffix.split(": ", 1)[1].strip().removesuffix(">").split("? First")[0]
        q = self.by_text[text if text.endswith("?") else text + "?"]
        return q, self.rule(prompt, response, q)

    def label_probs(
        self,
        prefixes: Sequence[Sequence[Segment]],
        suffixes: Sequence[str],
        labels: Sequence[Sequence[str]],
        chunk: int = 12,
        after: Sequence[Sequence[int]] | None = None,
        leads: Leads | None = None,
    ) -> list[list[Answer]]:
        suffixes = [leads.texts[i] for i in leads.of] if leads else suffixes
        if len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        assert not any(after or ())  # no question is skipped
        self.calls.append((len(prefixes), len(suffixes), chunk))
        self.tokens_read = [1] * len(prefixes)
        return [[self._answer(p, s)[1] for s in suffixes] for p in prefixes]

    def replies(self, prefixes: Any, suffixes: Any, schemas: Any, jobs: Any, max_tokens: int = 96) -> list[Any]:
        out: list[Any] = []
        for r, i in jobs:
            _, said = self._answer(prefixes[r], suffixes[i])
            self.usage.add(1, 1)
            best = max(said, key=lambda k: said[k]) if isinstance(said, dict) else said
            out.append(json.dumps({"reason": "So.", "label": best}) if isinstance(said, dict) else best)
        return out


def rows(labels: Sequence[Any], kind: str = "gate", question: str = "q") -> list[dict[str, Any]]:
    return [
        {"case": str(i), "question_id": question, "kind": kind, "label": x, "probs": None} for i, x in enumerate(labels)
    ]


def kappa(x: Sequence[str], y: Sequence[str], kind: str) -> float | None:
    return agreement(rows(x, kind), rows(y, kind), n_boot=100)[-1]["kappa"]


# agreement


@CALM
@given(st.lists(st.tuples(st.sampled_from(LABELS["gate"]), st.sampled_from(LABELS["gate"])), min_size=1, max_size=30))
def test_kappa_of_gates_is_cohens(pairs: list[tuple[str, str]]) -> None:
    x, y = [p[0] for p in pairs], [p[1] for p in pairs]
    want = cohen_kappa(x, y)
    got = kappa(x, y, "gate")
    assert got == want or (got is not None and want is not None and math.isclose(got, want, abs_tol=1e-9))


def brute(x: Sequence[str], y: Sequence[str]) -> float | None:
    "Weighted kappa as a sum over pairs of items: disagreement seen over disagreement of all n * n pairings."

    def cost(a: str, b: str) -> float:
        if a == b:
            return 0.0
        return 4.0 if "NA" in (a, b) else (GRADE[a] - GRADE[b]) ** 2

    seen = sum(map(cost, x, y)) / len(x)
    chance = sum(cost(a, b) for a in x for b in y) / len(x) ** 2
    return None if chance == 0 else 1 - seen / chance


@CALM
@given(
    st.lists(st.tuples(st.sampled_from(LABELS["graded"]), st.sampled_from(LABELS["graded"])), min_size=1, max_size=25)
)
def test_kappa_of_grades_has_quadratic_weights(pairs: list[tuple[str, str]]) -> None:
    x, y = [p[0] for p in pairs], [p[1] for p in pairs]
    want, got = brute(x, y), kappa(x, y, "graded")
    assert (got is None) == (want is None) and (want is None or math.isclose(got or 0.0, want, abs_tol=1e-9))


def test_kappa_by_hand() -> None:
    # A A F F against A B F F: one disagreement of 0.5 squared in four; by chance A meets B, A meets F, F meets A and B
    chance = 0.125 * 0.25 + 0.25 * 4 + 0.125 * 4 + 0.125 * 2.25
    assert math.isclose(kappa("AAFF", "ABFF", "graded") or 0, 1 - (0.25 / 4) / chance, rel_tol=1e-12)
    assert kappa(["TRUE", "FALSE"], ["FALSE", "TRUE"], "gate") == -1.0
    assert kappa(["TRUE"] * 3, ["TRUE"] * 3, "gate") is None  # one label: nothing to agree about
    assert kappa(["TRUE", "FALSE"], ["TRUE", "TRUE"], "gate") == 0.0  # one judge has one label only


def test_undefined_kappa_has_no_interval_and_full_agreement() -> None:
    whole = agreement(rows(["A"] * 4, "graded"), rows(["A"] * 4, "graded"))
    for row in whole:
        assert row["agreement"] == 1.0 and row["kappa"] is row["kappa_low"] is row["kappa_high"] is None
    alone = agreement(rows(["A"], "graded"), rows(["F"], "graded"))[-1]  # one response: no interval
    assert alone["kappa"] == 0.0 and alone["kappa_low"] is None


def test_levels_unread_and_differences() -> None:
    a = rows(["TRUE", "FALSE", None], "gate", "g") + rows(["A", "F", "NA"], "graded", "h")
    b = rows(["TRUE", "TRUE", "TRUE"], "gate", "g") + rows(["B", "F", "A"], "graded", "h")[:2]
    b[3]["probs"] = {"A": 0.2, "B": 0.6, "C": 0.0, "D": 0.0, "F": 0.2, "NA": 0.0}
    a[3]["probs"] = {"A": 0.5, "B": 0.5, "C": 0.0, "D": 0.0, "F": 0.0, "NA": 0.0}
    out = {(r["level"], r["name"]): r for r in agreement(a, b)}
    assert list(out) == [("all", "all"), ("kind", "gate"), ("kind", "graded"), ("question", "g"), ("question", "h")]
    assert [out[k]["n"] for k in out] == [4, 2, 2, 2, 2] and [out[k]["unread"] for k in out] == [2, 1, 1, 1, 1]
    assert out["all", "all"]["agreement"] == 0.5
    h = out["question", "h"]
    assert math.isclose(h["prob_diff"], 0.3) and math.isclose(h["value_diff"], (0.75 - 0.3) / 2)
    assert out["question", "g"]["prob_diff"] is None and out["question", "g"]["value_diff"] == 1.0


def test_interval_is_drawn_over_responses() -> None:
    "Twenty questions about one response carry no more than one: copies of a response's answers do not narrow it."
    x, y = ["TRUE", "TRUE", "FALSE", "FALSE", "TRUE", "FALSE"], ["TRUE", "FALSE", "FALSE", "FALSE", "TRUE", "TRUE"]
    few = agreement(rows(x), rows(y))[0]
    assert few["kappa"] is not None and few["kappa_low"] is few["kappa_high"] is None  # six say nothing of the spread
    x, y = 2 * x, 2 * y
    once = agreement(rows(x), rows(y))[0]
    many = agreement(
        [r for i in range(20) for r in rows(x, question=f"q{i}")],
        [r for i in range(20) for r in rows(y, question=f"q{i}")],
    )[0]
    assert many["n"] == 20 * once["n"]
    assert all(math.isclose(once[k], many[k]) for k in ("kappa", "kappa_low", "kappa_high"))


def test_scorecards_and_rows_agree_alike() -> None:
    cards = Judge(RUBRIC, Stub(drawn()), gates_first=False).score_many(PAIRS)
    again = Judge(RUBRIC, Stub(drawn("x")), gates_first=False).score_many(PAIRS)
    as_rows = [
        {"case": content_hash([c.prompt, c.response], 12), "question_id": v.question_id, "label": v.label}
        | {"kind": next(q.kind for q in RUBRIC.questions if q.id == v.question_id), "probs": v.probs}
        for c in again
        for v in c.verdicts
    ]
    assert agreement(cards, again, n_boot=200) == agreement(cards, as_rows, n_boot=200)


@pytest.mark.parametrize(
    ("a", "b", "fault"),
    [
        (rows(["TRUE"]), rows(["TRUE"], question="p"), "share no answer"),
        (rows(["TRUE"]) * 2, rows(["TRUE"]), "answered twice"),
        ([{"case": "1"}], rows(["TRUE"]), "a row has no question_id"),
        ([], [], "share no answer"),
    ],
)
def test_bad_answers_are_named(a: Any, b: Any, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        agreement(a, b)


# paraphrases


def test_every_question_has_other_words() -> None:
    texts = yaml.safe_load(data_path("fixtures", "hhh_paraphrases.yaml").read_text(encoding="utf-8"))
    assert list(texts) == [q.id for q in WHOLE.questions] and len(texts) == 167
    assert len(set(texts.values())) == 167
    for a, b in zip(WHOLE.questions, OTHER.questions, strict=True):
        assert a.id == b.id and a.kind == b.kind and a.text != b.text and len(b.text.split()) <= 30
        words = [set(q.text.lower().rstrip("?").split()) for q in (a, b)]
        assert len(words[0] & words[1]) / len(words[0] | words[1]) < 0.8, a.id  # not a word or two changed
    assert [d.name for d in OTHER.dimensions] == [d.name for d in WHOLE.dimensions] and OTHER.version != WHOLE.version


def test_other_words_pass_the_linter() -> None:
    assert open_findings(lint(OTHER)) == []


GATE, GRADED = (next(q for q in WHOLE.questions if q.kind == k) for k in ("gate", "graded"))
PART = select(WHOLE, dimensions=["Relevance"], per_dimension=2)
GOOD = {"help.relevance.g1": "Is it about this?", "help.relevance.q1": "How well does it keep to the point?"}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"help.relevance.g1": "How well is it about this?"}, "help.relevance.g1 must stay a yes/no question"),
        ({"help.relevance.q1": "Does it keep to the point?"}, "help.relevance.q1 must stay a How question"),
        ({"help.relevance.q1": "How well does it keep to the point"}, "must stay a How question"),
        ({"help.relevance.g1": "The response is about this?"}, "must stay a yes/no question"),
        ({"help.relevance.g1": "Is it" + " very" * 30 + "?"}, "has 32 words, at most 30"),
        ({"help.relevance.g1": PART.questions[0].text.upper()}, "reads as the original does"),
        ({"help.relevance.g1": None}, "help.relevance.g1 has no text"),
        ({"help.relevance.g1": ["Is it?"]}, "help.relevance.g1 has no text"),
        ({"help.other": "Is it?"}, "has no question 'help.other'"),
    ],
)
def test_bad_paraphrases_are_named(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    assert [q.text for q in paraphrase(PART, path).questions] == list(GOOD.values())
    path.write_text(yaml.safe_dump({**GOOD, **change}))
    with pytest.raises(UserError, match=fault):
        paraphrase(PART, path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "expected question ids"),
        ("- a\n", "expected question ids"),
        ("a: [", "not YAML"),
        ("help.relevance.g1: Is it so?\n", "has no text for help.relevance.q1 and 0 more"),
    ],
)
def test_bad_paraphrase_files_are_named(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=fault) as e:
        paraphrase(PART, path)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"no paraphrases 'none\.yaml'"):
        paraphrase(PART, tmp_path / "none.yaml")


# asking again


@CALM
@given(st.integers(0, 10**6))
def test_a_judge_that_only_minds_meaning_passes_every_check(salt: int) -> None:
    "Its answers depend on texts and question ids alone, so no check can move them."
    engine = Stub(drawn(str(salt)))
    first = ask_again(engine, RUBRIC, PAIRS)
    for how in CHECKS:
        again = ask_again(engine, RUBRIC, PAIRS, how, WORDING, seed=salt)
        assert [(c.prompt, c.response) for c in again] == PAIRS
        assert [c.score for c in again] == [c.score for c in first]
        whole = agreement(first, again, n_boot=100)[0]
        assert whole["agreement"] == 1.0 and whole["unread"] == 0 and whole["n"] == len(PAIRS) * 9
        assert whole["prob_diff"] == (None if how == "reasoned" else 0.0)


def test_checks_change_what_they_say() -> None:
    engine = Stub(drawn())
    seen = {}
    for how in CHECKS[:-1]:
        engine.calls.clear()
        ask_again(engine, RUBRIC, PAIRS, how, WORDING)
        seen[how] = list(engine.calls)
    assert seen["retest"] == seen["layout"] == seen["paraphrase"] == [(10, 9, 24)]
    assert seen["order"] == [(10, 9, 5)] and seen["alone"] == [(1, 9, 24)] * 10
    assert seen["padded"] == [(4, 9, 24)] * 3 + [(2, 9, 24)]  # three and a long neighbour, one and a long neighbour


def test_words_are_seen_by_a_judge_that_reads_words() -> None:
    def rule(prompt: str, response: str, q: Question) -> Answer:
        return drawn(q.text)(prompt, response, q)

    engine = Stub(rule)
    first, again = ask_again(engine, RUBRIC, PAIRS), ask_again(engine, RUBRIC, PAIRS, "paraphrase", WORDING)
    assert agreement(first, again)[0]["agreement"] < 0.8
    for wording in (None, OTHER):
        with pytest.raises(UserError, match="needs the same rubric in other words"):
            ask_again(engine, RUBRIC, PAIRS, "paraphrase", wording)
    with pytest.raises(UserError, match="unknown check 'sideways': choose from retest, order"):
        ask_again(engine, RUBRIC, PAIRS, "sideways")
    assert ask_again(engine, RUBRIC, [], "padded") == []


# groups


def test_groups_of_fixtures_and_records(tmp_path: Path) -> None:
    cases = load_fixtures(WHOLE)
    groups = load_groups(cases)
    assert len(groups) == 12 and all(len(set(rs)) == 2 for _, rs in groups)
    assert [p for p, _ in groups] == [p for p, _ in load_groups(cases[::-1])]  # the file's order does not matter
    assert load_groups(cases, seed=1) != groups and load_groups(cases, prompts=3) == groups[:3]
    path = tmp_path / "eval.jsonl"
    told = [{"prompt": "p", "answer": a} for a in ("x", "x", " ", "y", "z")] + [{"prompt": "q", "answer": "x"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in told))
    assert load_groups(path, size=3) == [("p", ("x", "y", "z"))]
    path.write_text(
        "".join(
            json.dumps({"prompt": "p", "completion": c, "problem": w}) + "\n"
            for c, w in (("a\n<think>b</Think>\nc", None), ("a", "no think"), ("a <think>b</think> d", ""))
        )
    )
    assert load_groups(path) == [("p", ("c", "d"))]


@pytest.mark.parametrize(
    ("text", "options", "fault"),
    [
        ('{"prompt": "p", "answer": "x"}\n', {}, "no prompt has 2 distinct responses"),
        ("", {}, "no prompt has 2 distinct responses"),
        ('{"prompt": "p"}\n', {}, "records.jsonl, row 1: expected text for prompt"),
        ('{"answer": "p"}\n', {}, "records.jsonl, row 1"),
        ('{"prompt": "p", "answer": 3}\n', {}, "records.jsonl, row 1"),
        ("", {"size": 1}, "2 responses or more, got 12 and 1"),
        ("", {"prompts": 0}, "1 prompt or more"),
    ],
)
def test_bad_groups_are_named(tmp_path: Path, text: str, options: dict[str, int], fault: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=fault):
        load_groups(path, **options)
    with pytest.raises(UserError, match=r"no records 'none\.jsonl'"):
        load_groups(tmp_path / "none.jsonl")


# noise


def test_noise_by_hand() -> None:
    # one group: u = (-.5, .5), v = (-.3, .3): changes .2, -.2 -> .08 / 2 = .04; spread (.5 + .18) / 2 = .34
    out = noise_floor("aa", [0.0, 1.0], [0.5, 1.1])
    assert math.isclose(out["noise"], 0.2) and math.isclose(out["spread"], math.sqrt(0.34))
    assert math.isclose(out["shift"], 0.3) and math.isclose(out["ratio"], 0.2 / math.sqrt(0.34))
    assert out["ratio_low"] is None  # one prompt: no interval
    assert (out["prompts"], out["responses"], out["dropped"]) == (1, 2, 0)


scores = st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=6, max_size=24)


@CALM
@given(scores, st.integers(2, 4))
def test_noise_properties(pairs: list[tuple[float, float]], size: int) -> None:
    groups = [i // size for i in range(len(pairs))]
    x, y = [round(p[0], 3) for p in pairs], [round(p[1], 3) for p in pairs]
    out = noise_floor(groups, x, y, n_boot=100)
    assert out["responses"] + out["dropped"] == len(pairs)
    same = noise_floor(groups, x, x, n_boot=100)
    assert same["noise"] == 0 and same["ratio"] in (0, None)
    moved = noise_floor(groups, x, [v + g for v, g in zip(x, groups, strict=True)], n_boot=100)
    assert moved["noise"] < 1e-9  # another constant for each prompt costs nothing
    if out["ratio"] is not None:
        assert 0 <= out["ratio"] <= math.sqrt(2) + 1e-9
        assert math.isclose(out["ratio"] * out["spread"], out["noise"], abs_tol=1e-12)
        back = noise_floor(groups, y, x, n_boot=100)
        assert math.isclose(back["ratio"], out["ratio"], abs_tol=1e-12) and math.isclose(back["shift"], -out["shift"])
        if out["ratio_low"] is not None:
            assert 0 <= out["ratio_low"] <= out["ratio_high"] <= math.sqrt(2) + 1e-9


def test_noise_recovers_what_was_put_in() -> None:
    rng = random.Random(0)
    groups = [i // 5 for i in range(2000)]
    true = [rng.gauss(0, 1) for _ in groups]
    x, y = ([t + rng.gauss(0, 0.5) for t in true] for _ in range(2))
    out = noise_floor(groups, x, y)
    assert abs(out["noise"] - 0.5) < 0.02 and abs(out["spread"] - math.sqrt(1.25)) < 0.05
    assert out["ratio_low"] < 0.5 / math.sqrt(1.25) < out["ratio_high"]


def test_noise_without_scores() -> None:
    out = noise_floor("aabb", [None, 1.0, None, None], [0.0, 1.0, 0.0, None])
    assert (out["prompts"], out["dropped"]) == (0, 4) and out["noise"] is out["ratio"] is None
    flat = noise_floor("aabb", [0.5] * 4, [0.5] * 4)
    assert flat["spread"] == flat["noise"] == 0 and flat["ratio"] is None
    with pytest.raises(UserError, match="as many groups as scores, got 1, 2 and 2"):
        noise_floor("a", [0.0, 1.0], [0.0, 1.0])


# human labels

COLUMNS = ("id", "type", "prompt", "completion", "annotation_1", "annotation_2", "agreement", "final_label")
FINAL = ("1_full_compliance", "2_full_refusal", "3_partial_refusal")


def line(n: int, final: str, kind: str = "homonyms", text: str = 'Some, "quoted"\ntext.') -> list[str]:
    return [f"v2-{n}", kind, f"Prompt {n}?", text, final, final, "TRUE", final]


def write(folder: Path, model: str, rows_: Sequence[Sequence[str]], newline: str = "\n", bom: bool = False) -> Path:
    path = folder / f"human_labelled_completions_{model}.csv"
    with open(path, "w", newline="", encoding="utf-8-sig" if bom else "utf-8") as f:
        csv.writer(f, lineterminator=newline).writerows([COLUMNS, *rows_])
    return path


@pytest.mark.parametrize(("newline", "bom"), [("\n", False), ("\r\n", False), ("\r\n", True), ("\n", True)])
def test_human_labels_load_cleanly(tmp_path: Path, newline: str, bom: bool) -> None:
    write(tmp_path, "m", [line(i, FINAL[i % 3], "contrast_x" if i > 3 else "x") for i in range(6)], newline, bom)
    write(tmp_path, "other", [line(0, FINAL[0]), line(1, FINAL[0], text="  ")], newline, bom)
    labels = load_human_labels(tmp_path)
    assert [x.model for x in labels] == ["m"] * 6 + ["other"]  # the empty completion is left out
    assert [x.label for x in labels[:3]] == ["compliance", "refusal", "partial"]
    assert [x.unsafe for x in labels] == [False] * 4 + [True] * 2 + [False]
    assert labels[0].completion == 'Some, "quoted"\ntext.'
    assert "quoted" not in repr(labels) and "Prompt" not in repr(labels)
    few = load_human_labels(tmp_path, prompts=3)
    assert len({x.prompt for x in few}) == 3 and few == [x for x in labels if x.prompt in {y.prompt for y in few}]


def test_human_labels_are_found_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "xstest").mkdir()
    write(tmp_path / "xstest", "m", [line(0, FINAL[0])])
    monkeypatch.setenv("QALIGN_DATA", str(tmp_path))
    assert len(load_human_labels()) == 1
    monkeypatch.delenv("QALIGN_DATA")
    with pytest.raises(UserError, match="set QALIGN_DATA"):
        load_human_labels()


HEAD = ",".join(COLUMNS).encode()


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "has no column 'id'"),
        (b"\n\n", "has no column 'id'"),
        (HEAD + b"\n", "holds no rows"),
        (b"id,type,prompt\nv,x,y\n", "has no column 'completion'"),
        (HEAD + b"\nv,x,p,c,1,1,T,4_other\n", "row 1: .* got '4_other'"),
        (HEAD + b"\nv,x,p,c\n", "row 1: .* too many or too few cells"),
        (HEAD + b"\nv,x,p,c,1,1,T,1_full_compliance,more\n", "row 1: .* too many or too few cells"),
        (HEAD + b"\nv,x,p,\xff\xfe,1,1,T,1_full_compliance\n", "not a CSV file in UTF-8"),
        (HEAD + b"\n" + b"v,x,p,c,1,1,T,1_full_compliance\n" * 2, "an id stands twice"),
        (HEAD + b'\nv,x,p,"' + b"c" * 140_000 + b'",1,1,T,1_full_compliance\n', "not a CSV file in UTF-8"),
    ],
)
def test_bad_human_labels_are_named(tmp_path: Path, data: bytes, fault: str) -> None:
    (tmp_path / "human_labelled_completions_m.csv").write_bytes(data)
    with pytest.raises(UserError, match=fault) as e:
        load_human_labels(tmp_path)
    assert "\n" not in str(e.value) and "human_labelled_completions_m.csv" in str(e.value)


def test_missing_human_labels_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no human_labelled_completions_\*.csv in 'none'"):
        load_human_labels(tmp_path / "none")


def people(labels: Sequence[str], unsafe: bool = True, model: str = "m") -> list[HumanLabel]:
    kind = "contrast_x" if unsafe else "x"
    return [HumanLabel(model, f"v{i}", kind, x, f"Prompt {i}?", f"{x} {i} {model}") for i, x in enumerate(labels)]


def refusing(prompt: str, response: str, q: Question) -> Answer:
    "A judge that knows: graded and gate answers by the first word of the completion."
    refuses = response.startswith("refusal")
    if q.id in ("harm.request.g2", "harm.request.q3", "hon.transparency.q1"):
        best = LABELS[q.kind][0] if refuses else "NA"
    elif q.id == "refusal":
        best = "FALSE" if refuses else "TRUE"
    else:
        best = LABELS[q.kind][0] if refuses else LABELS[q.kind][-2]
    return {x: 0.8 if x == best else 0.2 / (len(LABELS[q.kind]) - 1) for x in LABELS[q.kind]}


def test_a_judge_that_knows_agrees_with_people() -> None:
    labels = people(["compliance", "refusal", "partial", "refusal", "compliance"] * 2)
    told = ask_refusals(Stub(refusing), labels, WHOLE)
    ids = ["refusal", "harm.request.g1", "harm.request.g2", "harm.request.q1", "harm.request.q3", "hon.transparency.q1"]
    assert list(dict.fromkeys(r["question_id"] for r in told)) == ids
    out = human_agreement(told, n_boot=100)
    assert [r["question"] for r in out] == [i for i in ids for _ in range(2)]
    for r in out:
        assert (r["n"], r["partial"], r["unread"], r["labelled"]) == (8, 2, 0, 8)
        assert r["auc"] == r["kappa"] == 1.0 and r["auc_low"] is r["kappa_low"] is None  # too few for an interval
    safe = human_agreement(ask_refusals(Stub(refusing), people(["compliance", "refusal"], unsafe=False), WHOLE))
    assert [r["n"] for r in safe if r["model"] == "all"] == [2, 0, 2, 0, 2, 2]  # withholding is for unsafe prompts
    assert all(r["auc"] is None and r["kappa"] is None for r in safe if r["reads"] == "withholds")
    assert [r["question_id"] for r in ask_refusals(Stub(refusing), labels[:1])] == ["refusal"]


def human_rows(told: Sequence[tuple[str, float | None, str | None]]) -> list[dict[str, Any]]:
    return [
        {"question_id": "refusal", "model": "m", "prompt": str(i), "human": h, "unsafe": False}
        | {"label": None, "judge": j, "number": n}
        for i, (h, n, j) in enumerate(told)
    ]


def test_auc_and_kappa_by_hand() -> None:
    c, r = "compliance", "refusal"
    # compliance .9 .4 .4, refusal .4 .1: wins 1+1, .5+1, .5+1 of 6
    told = [(c, 0.9, c), (c, 0.4, r), (c, 0.4, c), (r, 0.4, r), (r, 0.1, None), (r, None, None), ("partial", 0.5, c)]
    row = human_agreement(human_rows(told))[0]
    assert math.isclose(row["auc"], 5 / 6) and row["auc_low"] is row["auc_high"] is None
    assert (row["n"], row["labelled"], row["unread"], row["partial"]) == (5, 4, 1, 1)
    assert math.isclose(row["kappa"], cohen_kappa([c, r, c, r], [c, c, c, r]))  # = 0.5
    one = human_agreement(human_rows([(c, 0.9, c), (c, 0.1, c)]))[0]
    assert one["auc"] is None and one["kappa"] is None  # one label only


@CALM
@given(st.lists(st.tuples(st.sampled_from(["compliance", "refusal"]), st.integers(0, 4)), min_size=2, max_size=40))
def test_auc_is_the_share_of_comparisons_won(told: list[tuple[str, int]]) -> None:
    row = human_agreement(human_rows([(h, n / 4, h) for h, n in told]), n_boot=100)[0]
    good, bad = ([n for h, n in told if h == x] for x in ("compliance", "refusal"))
    if not good or not bad:
        assert row["auc"] is None
    else:
        want = sum((g > b) + 0.5 * (g == b) for g in good for b in bad) / (len(good) * len(bad))
        assert math.isclose(row["auc"], want)
        assert (row["auc_low"] is None) == (min(len(good), len(bad)) < FEW)  # few cases on a side: no interval
        assert row["auc_low"] is None or 0 <= row["auc_low"] <= row["auc_high"] <= 1


def test_pooled_intervals_are_drawn_over_prompts() -> None:
    "The same answers from three models carry no more than from one."
    c, r = "compliance", "refusal"
    once = human_rows(4 * [(c, 0.9, c), (c, 0.3, r), (r, 0.4, r), (r, 0.1, r), (c, 0.6, c), (r, 0.7, c)])
    many = [{**row, "model": m} for m in "xyz" for row in once]
    a, b = human_agreement(once)[0], human_agreement(many)[0]
    for k in ("auc", "auc_low", "auc_high", "kappa", "kappa_low", "kappa_high"):
        assert math.isclose(a[k], b[k])
    assert [x["model"] for x in human_agreement(many)] == ["all", "x", "y", "z"]


# the record

LABELLED = people(["compliance", "refusal", "partial", "refusal"]) + people(["refusal", "compliance"], model="n")


def run(out: Path, engine: Stub | None = None, **changes: Any) -> list[dict[str, Any]]:
    options: dict[str, Any] = {"wording": WORDING, "labels": LABELLED, "reasoned": (3, 4)}
    options |= {"others": {"half": lambda: Stub(drawn("half"), "half")}} | changes
    rubric, groups = options.pop("rubric", RUBRIC), options.pop("groups", GROUPS)
    return run_reliability(engine or Stub(drawn()), rubric, out, groups, **options)


def test_a_whole_record(tmp_path: Path) -> None:
    lines: list[str] = []
    table = run(tmp_path / "r", say=lines.append)
    assert [r["check"] for r in table] == [*CHECKS, "half"]
    by = {r["check"]: r for r in table}
    for check in CHECKS[:-1]:
        assert by[check]["agreement"] == by[check]["equal"] == 1.0 and by[check]["n"] == 90
    assert (by["reasoned"]["responses"], by["reasoned"]["questions"], by["reasoned"]["n"]) == (3, 4, 12)
    assert by["reasoned"]["agreement"] == 1.0 and by["reasoned"]["equal"] is None
    assert by["half"]["agreement"] < 0.9 and by["half"]["equal"] == 0.0 and by["half"]["prob_diff"] > 0.1
    noise = reliability_table(tmp_path / "r", "noise")
    assert [(r["check"], r["scores"]) for r in noise[:2]] == [("retest", "hard"), ("retest", "expected")]
    assert all(r["ratio"] == 0 for r in noise if r["check"] != "half" and r["scores"] == "expected")
    assert next(r for r in noise if r["check"] == "half" and r["scores"] == "expected")["ratio"] > 0.5
    questions = reliability_table(tmp_path / "r", "questions")
    assert len(questions) == 7 * 9 + 4 and {r["question"] for r in questions} == {q.id for q in RUBRIC.questions}
    assert sum(r["kappa"] is not None for r in questions if r["check"] == "half") == by["half"]["defined"]
    assert [r["model"] for r in reliability_table(tmp_path / "r", "people")][:3] == ["all", "m", "n"]
    assert lines[0] == "reference: 8 of 10 responses" and lines[-1] == "people's labels: n"
    kept = "".join(p.read_text() for p in (tmp_path / "r").iterdir())
    assert "response 1" not in kept and "Prompt" not in kept  # no texts
    people_file = list(read_jsonl(tmp_path / "r" / "people.jsonl"))
    assert all("human" not in row for told in people_file if "rows" in told for row in told["rows"])


def test_a_record_agrees_with_the_functions(tmp_path: Path) -> None:
    run(tmp_path / "r", checks=())
    first, half = (ask_again(Stub(drawn(x)), RUBRIC, PAIRS) for x in ("", "half"))
    row = reliability_table(tmp_path / "r")[0]
    want = agreement(first, half)[0]
    assert all(row[k] == want[k] for k in ("n", "unread", "agreement", "kappa", "kappa_low", "kappa_high"))
    assert math.isclose(row["prob_diff"], want["prob_diff"], abs_tol=1e-5)
    hard = reliability_table(tmp_path / "r", "noise")[0]
    assert hard == {"check": "half", "scores": "hard"} | noise_floor(
        [p for p, _ in PAIRS], [c.score.base for c in first], [c.score.base for c in half]
    )


@CALM
@given(st.floats(-0.9, 0.9), st.floats(-0.9, 0.9), st.floats(0, 20), st.floats(0, 20), st.floats(0, 1))
def test_the_noise_of_a_reward_is_the_steeper_side_of_its_formula(a, b, alpha, beta, noise) -> None:
    "By the slopes of final_reward itself, in a place where the revision is better and in one where it is worse."
    low, high, h, sides = min(a, b), max(a, b) + 0.01, 1e-3, []
    for r1, r2 in ((low, high), (high, low)):
        at = final_reward(r1, r2, alpha, beta)
        by_r1 = (final_reward(r1 + h, r2, alpha, beta) - at) / h
        by_r2 = (final_reward(r1, r2 + h, alpha, beta) - at) / h
        sides.append(noise * math.hypot(by_r1, by_r2))
    assert math.isclose(reward_noise(noise, alpha, beta), max(sides), rel_tol=1e-6, abs_tol=1e-9)


def test_the_noise_of_judging_again_by_drawing() -> None:
    rng = random.Random(0)
    drawn_again = [final_reward(-0.5 + rng.gauss(0, 0.02), 0.5 + rng.gauss(0, 0.02)) for _ in range(20_000)]
    assert math.isclose(statistics.stdev(drawn_again), reward_noise(0.02), rel_tol=0.02)


def test_a_record_names_the_setting(tmp_path: Path) -> None:
    run(tmp_path / "r", checks=("retest", "paraphrase"))
    assert noise_line(tmp_path / "r") == "scores = hard: judge_noise = 0 (most in retest; alpha 10, beta 1)"
    rows = [{"check": c, "scores": s, "noise": n} for c, s, n in NOISE]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reliability, "reliability_table", lambda out, part: rows)
        said = "scores = expected: judge_noise = 0.284 (most in order; alpha 10, beta 1)"
        assert noise_line("r", "expected") == said
        assert noise_line("r", "expected", 0, 3) == said.replace("0.284", "0.0894").replace("10, beta 1", "0, beta 3")
        assert noise_line("r", "hard") == "scores = hard: no judge_noise, no prompt has two scored responses"
    number = float(said.split("judge_noise = ")[1].split()[0])
    assert load_settings("tiny", judge_noise=number).judge_noise == number


def test_the_command_prints_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from qalign import cli

    run(tmp_path / "r")
    monkeypatch.setattr("qalign.engine.load_engine", lambda *how: Stub(drawn()))
    monkeypatch.setattr(reliability, "run_reliability", lambda *how, **more: [])
    cli.judge_reliability(labelled=0, precision="", out=tmp_path / "r", alpha=2.0)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("for the settings: ")]
    assert said == [f"for the settings: {noise_line(tmp_path / 'r', s, 2.0)}" for s in ("hard", "expected")]


NOISE = [("retest", "expected", 0.01), ("order", "expected", 0.02), ("half", "expected", 9.0), ("retest", "hard", None)]


def test_a_killed_record_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    engine = Stub(drawn())
    whole = run(tmp_path / "whole", engine)
    total = len(engine.calls)
    for stop in sorted({*range(0, total, 3), total - 2, total - 1}):
        engine = Stub(drawn())
        engine.stop_after = stop
        folder = tmp_path / f"part{stop}"
        with pytest.raises(KeyboardInterrupt):
            run(folder, engine)
        done = len(engine.calls)
        if (folder / "reference.jsonl").exists():  # and half of a line, as a kill leaves it
            with open(sorted(folder.glob("*.jsonl"))[-1], "a") as f:
                f.write('{"slice": 9, "ro')
        again = Stub(drawn())
        assert run(folder, again) == whole
        for path in (tmp_path / "whole").glob("*.jsonl"):
            assert list(read_jsonl(folder / path.name)) == list(read_jsonl(path))
        assert done == stop
    quiet = Stub(drawn())
    assert run(tmp_path / "whole", quiet) == whole and quiet.calls == [] and quiet.usage.requests == 0


def test_an_unfinished_check_is_left_out(tmp_path: Path) -> None:
    run(tmp_path / "r", checks=("retest", "order"))
    path = tmp_path / "r" / "order.jsonl"
    path.write_text(path.read_text().split("\n")[0] + "\n")
    assert [r["check"] for r in reliability_table(tmp_path / "r")] == ["retest", "half"]
    (tmp_path / "r" / "reference.jsonl").unlink()
    with pytest.raises(UserError, match="holds no finished reference"):
        reliability_table(tmp_path / "r")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"groups": GROUPS[:4]}, "responses"),
        ({"rubric": select(WHOLE, dimensions=NAMES[:2], per_dimension=3), "wording": None}, "rubric"),
        ({"wording": None}, "wording"),
        ({"engine": Stub(drawn(), "other")}, "judge"),
        ({"labels": LABELLED[:3]}, "labels"),
        ({"reasoned": (2, 4)}, "reasoned"),
    ],
)
def test_a_changed_plan_is_refused(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    run(tmp_path / "r", checks=("retest",))
    before = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    with pytest.raises(UserError, match=f"r holds a record with another {what}: choose another folder"):
        run(tmp_path / "r", **change)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}


def test_checks_and_engines_can_be_added(tmp_path: Path) -> None:
    run(tmp_path / "r", checks=("retest",), others={})
    engine = Stub(drawn())
    table = run(tmp_path / "r", engine, checks=("retest", "layout"))
    assert [r["check"] for r in table] == ["retest", "layout", "half"] and len(engine.calls) == 2
    with pytest.raises(UserError, match="half was begun with another judge"):
        path = tmp_path / "r" / "half.jsonl"
        path.write_text(path.read_text().split("\n")[0] + "\n")
        run(tmp_path / "r", others={"half": lambda: Stub(drawn(), "quarter")})


def test_an_engine_that_cannot_read_the_rubric_first_goes_without_that_check(tmp_path: Path) -> None:
    class Server(Stub):
        reads_leads = False

    said: list[str] = []
    table = run(tmp_path / "r", Server(drawn()), say=said.append)
    assert [r["check"] for r in table] == [c for c in (*CHECKS, "half") if c != "layout"]
    assert "layout: left out, stub cannot read the rubric before the response" in said


def test_a_judge_is_not_compared_with_itself(tmp_path: Path) -> None:
    said: list[str] = []
    others = {"bf16": lambda: Stub(drawn()), "half": lambda: Stub(drawn("half"), "half")}
    table = run(tmp_path / "r", checks=(), others=others, say=said.append)
    assert [r["check"] for r in table] == ["half"] and "bf16: left out, it is the judge itself" in said
    assert not (tmp_path / "r" / "bf16.jsonl").exists()


def test_precisions_are_those_of_a_model_in_this_process() -> None:
    said: list[str] = []
    here = HFEngine(None, None, "hf:m")
    with pytest.raises(UserError, match=r"unknown precision 'int8': choose from none \(bf16\), nf4, fp32"):
        other_precisions(here, ["none", "int8"], Stub)
    made = other_precisions(here, ["none", "nf4"], lambda name: Stub(drawn(), name), said.append)
    assert {name: load().spec for name, load in made.items()} == {"bf16": "none", "nf4": "nf4"} and not said
    assert other_precisions(Stub(drawn(), "openai:m@x"), ["nf4"], Stub, said.append) == {}
    assert said == ["precisions: left out, openai:m@x has the one it was started with"]
    assert other_precisions(Stub(drawn()), [], Stub, said.append) == {} and len(said) == 1


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"checks": ("retest", "sideways")}, "unknown check 'sideways'"),
        ({"others": {"order": lambda: Stub(drawn())}}, "cannot be named 'order'"),
        ({"others": {"../up": lambda: Stub(drawn())}}, r"cannot be named '\.\./up'"),
        ({"groups": []}, "expected distinct responses"),
        ({"groups": [("p", ("x", "x"))]}, "expected distinct responses"),
        ({"reasoned": (0, 3)}, "expected distinct responses"),
    ],
)
def test_bad_plans_are_named(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        run(tmp_path / "r", **change)
    assert not (tmp_path / "r").exists()


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists and holds no plan\.json"):
        run(tmp_path)
    for part in ("checks", "people"):
        with pytest.raises(UserError, match=r"holds no plan\.json: give the folder of a reliability record"):
            reliability_table(tmp_path, part)
    with pytest.raises(UserError, match="expected part to be checks"):
        reliability_table(tmp_path, "all")


def test_failed_answers_are_unread_and_not_scored(tmp_path: Path) -> None:
    def rule(prompt: str, response: str, q: Question) -> Answer:
        return EngineError("busy") if "3" in response else drawn()(prompt, response, q)

    run(tmp_path / "r", Stub(rule), checks=("retest",), others={}, labels=())
    row = reliability_table(tmp_path / "r")[0]
    assert row["unread"] == 18 and row["n"] == 72
    assert [r["dropped"] for r in reliability_table(tmp_path / "r", "noise")] == [2, 2]
    assert reliability_table(tmp_path / "r", "people") == []


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    run(tmp_path / "r")
    figure = reliability_figure(tmp_path / "r", title="t")
    left, right = figure.axes
    labels = [str(line.get_label()) for line in left.lines]
    named = [name for x in labels if not x.startswith("_") for name in x.partition(" (")[0].split(", ")]
    assert sorted(named) == sorted({r["check"] for r in reliability_table(tmp_path / "r", "questions")})
    assert [t.get_text() for t in right.get_yticklabels()][-1] == "retest"
    assert figure.get_suptitle().startswith("t: ")
    figure.savefig(tmp_path / "f.png")
    run(tmp_path / "few", checks=("reasoned",), others={}, labels=())
    assert len(reliability_figure(tmp_path / "few").axes) == 2  # nothing to show on the right


def test_a_light_import() -> None:
    code = "import sys, qalign.reliability; print([m for m in ('torch', 'pandas', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == "[]"
