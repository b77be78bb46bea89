"""Labelled cases of the shipped rubric, and the report card of a judge."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qalign.core import UserError, read_jsonl
from qalign.engine import Answer, HFEngine, Segment, Usage
from qalign.fixtures import (
    Fixture,
    answer_fixtures,
    auc,
    card_figure,
    coverage,
    load_fixtures,
    report_card,
    separation,
    word_baseline,
)
from qalign.judge import LABELS
from qalign.rubric import load_rubric

RUBRIC = load_rubric("hhh")
FIXTURES = load_fixtures(RUBRIC)


class Stub:
    "An engine whose label probabilities are a function of the judged text and the question."

    def __init__(self, rule: Any) -> None:
        self.rule, self.asked = rule, 0
        self.spec, self.usage, self.tokens_read = "stub", Usage(), []

    def identity(self) -> dict[str, str]:
        return {"spec": self.spec}

    def frame(self, system: str) -> tuple[str, str]:
        return "", ""

    def label_probs(
        self,
        prefixes: Sequence[Sequence[Segment]],
        suffixes: Sequence[str],
        labels: Sequence[Sequence[str]],
        chunk: int = 12,
        after: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Answer]]:
        self.asked += len(prefixes) * len(suffixes)
        self.tokens_read = [1] * len(prefixes)
        out = []
        for prefix in prefixes:
            untrusted = [text for text, trusted in prefix if not trusted]
            out.append([self.rule(untrusted[0], untrusted[1], s, ls) for s, ls in zip(suffixes, labels, strict=True)])
        return out


def one_hot(label: str, labels: Sequence[str]) -> dict[str, float]:
    return {x: float(x == label) for x in labels}


TRUTH = {(f.prompt, f.response, q.text): f.label for f in FIXTURES for q in RUBRIC.questions if q.id == f.question_id}


def oracle(prompt: str, response: str, suffix: str, labels: Sequence[str]) -> dict[str, float]:
    return one_hot(next(v for k, v in TRUTH.items() if k[:2] == (prompt, response) and k[2] in suffix), labels)


def test_every_question_has_good_and_bad_cases() -> None:
    found = coverage(RUBRIC, FIXTURES)
    assert found["missing"] == [] and found["questions"] == 167
    assert found["cases"] >= 370 and found["NA"] >= 40
    good = Counter(f.question_id for f in FIXTURES if f.label in ("TRUE", "A"))
    bad = Counter(f.question_id for f in FIXTURES if f.label in ("FALSE", "D", "F"))
    assert min(good.values()) >= 2 and min(bad.values()) >= 2


def test_na_cases_lie_across_dimensions() -> None:
    where = {q.id: d.name for d in RUBRIC.dimensions for q in d.questions}
    assert len({where[f.question_id] for f in FIXTURES if f.label == "NA"}) >= 30


def test_file_is_in_the_rubrics_order_and_plain() -> None:
    order = {q.id: i for i, q in enumerate(RUBRIC.questions)}
    places = [order[f.question_id] for f in FIXTURES]
    assert places == sorted(places)
    for f in FIXTURES:
        assert f.prompt == f.prompt.strip() and f.response == f.response.strip()
        assert 3 <= len(f.prompt.split()) <= 45 and 2 <= len(f.response.split()) <= 100
    assert max(Counter(f.prompt for f in FIXTURES).values()) <= 5


@pytest.mark.parametrize("kind", ["all", "gate", "graded"])
def test_length_is_no_short_cut(kind: str) -> None:
    kinds = {q.id: q.kind for q in RUBRIC.questions}
    rows = [f for f in FIXTURES if kind == "all" or kinds[f.question_id] == kind]
    for size in (lambda f: len(f.response), lambda f: len(f.response.split())):
        by_question = separation((f.question_id, f.label, size(f)) for f in rows)
        assert 0.42 <= float(np.mean(list(by_question.values()))) <= 0.58
    good = np.mean([len(f.response.split()) for f in rows if f.label in ("TRUE", "A")])
    bad = np.mean([len(f.response.split()) for f in rows if f.label in ("FALSE", "D", "F")])
    assert 0.9 <= good / bad <= 1.1


def test_words_alone_are_a_baseline_below_a_judge() -> None:
    by_question = word_baseline(FIXTURES)
    assert len(by_question) == 167
    assert 0.6 <= float(np.mean(list(by_question.values()))) <= 0.8  # the page states it; it must not creep up
    assert by_question == word_baseline(FIXTURES)


def test_words_that_say_nothing_give_one_half() -> None:
    same = [Fixture(f.question_id, f.prompt, "the same words", f.label) for f in FIXTURES]
    assert set(word_baseline(same).values()) == {0.5}


def test_an_oracle_gets_full_marks() -> None:
    engine = Stub(oracle)
    answers = answer_fixtures(RUBRIC, engine, FIXTURES)
    assert len(answers) == len(FIXTURES) == engine.asked
    for row in report_card(RUBRIC, answers):
        assert row["accuracy"] == 1.0 and row["failed"] == 0
        if row["auc"] is not None:
            assert row["auc"] == row["auc_value"] == row["pairs"] == 1.0
        assert row["na_found"] in (None, 1.0)


@pytest.mark.parametrize("label", ["best", "worst", "NA"])
def test_a_judge_of_one_answer_separates_nothing(label: str) -> None:
    def rule(prompt: str, response: str, suffix: str, labels: Sequence[str]) -> dict[str, float]:
        return one_hot({"best": labels[0], "worst": labels[-2], "NA": "NA"}[label], labels)

    whole = report_card(RUBRIC, answer_fixtures(RUBRIC, Stub(rule), FIXTURES))[0]
    assert whole["auc"] == 0.5 and whole["pairs"] == 0.0
    share = {"best": ("TRUE", "A", "B"), "worst": ("FALSE", "D", "F"), "NA": ("NA",)}[label]
    assert whole["accuracy"] == pytest.approx(sum(f.label in share for f in FIXTURES) / len(FIXTURES))
    assert whole["na_found"] == (1.0 if label == "NA" else 0.0)
    if label == "NA":
        assert whole["auc_value"] is None


def test_levels_add_up() -> None:
    card = report_card(RUBRIC, answer_fixtures(RUBRIC, Stub(oracle), FIXTURES))
    by_level = Counter(r["level"] for r in card)
    assert by_level == {"all": 1, "kind": 2, "principle": 3, "dimension": 40, "question": 167}
    for level in by_level:
        assert sum(r["n"] for r in card if r["level"] == level) == len(FIXTURES)
    for row in card:
        for key in ("accuracy", "pairs", "auc", "auc_value"):
            low, mid, high = row[f"{key}_low"], row[key], row[f"{key}_high"]
            assert low is None or (0 <= low <= mid + 1e-9 and mid <= high + 1e-9 <= 1 + 1e-8)


def test_failed_answers_are_counted_apart() -> None:
    answers = answer_fixtures(RUBRIC, Stub(oracle), FIXTURES)
    for a in answers[::10]:
        a |= {"got": None, "status": "failed", "p_good": None, "value": None}
    whole = report_card(RUBRIC, answers)[0]
    assert whole["failed"] == len(answers[::10]) and whole["accuracy"] == 1.0 and whole["auc"] == 1.0


def test_answers_are_kept_and_taken_up_again(tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def stop(line: str) -> None:
        if line.startswith("20 of"):
            raise Cut

    first = Stub(oracle)
    with pytest.raises(Cut):
        answer_fixtures(RUBRIC, first, FIXTURES, tmp_path / "card", stop)
    second = Stub(oracle)
    resumed = answer_fixtures(RUBRIC, second, FIXTURES, tmp_path / "card")
    assert resumed == answer_fixtures(RUBRIC, Stub(oracle), FIXTURES)
    assert first.asked + second.asked == len(FIXTURES)
    third = Stub(oracle)
    assert answer_fixtures(RUBRIC, third, FIXTURES, tmp_path / "card") == resumed and third.asked == 0
    assert len(list(read_jsonl(tmp_path / "card" / "answers.jsonl"))) == 167


def test_another_judge_or_other_cases_are_refused(tmp_path: Path) -> None:
    answer_fixtures(RUBRIC, Stub(oracle), FIXTURES[:4], tmp_path / "card")
    with pytest.raises(UserError, match="another fixtures"):
        answer_fixtures(RUBRIC, Stub(oracle), FIXTURES[:5], tmp_path / "card")
    other = Stub(oracle)
    other.spec = "other"
    with pytest.raises(UserError, match="another judge"):
        answer_fixtures(RUBRIC, other, FIXTURES[:4], tmp_path / "card")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(UserError, match=r"no card\.json"):
        answer_fixtures(RUBRIC, Stub(oracle), FIXTURES[:4], tmp_path / "full")


GOOD_ROW = {"question_id": "harm.request.g1", "prompt": "p", "response": "r", "label": "TRUE"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**GOOD_ROW, "label": "A"}], "row 1: a gate question has no label 'A'"),
        ([GOOD_ROW, {**GOOD_ROW, "question_id": "x"}], "row 2: rubric hhh has no question 'x': give .* --fixtures"),
        ([{**GOOD_ROW, "note": "x"}], "row 1: expected text for the keys"),
        ([{k: v for k, v in GOOD_ROW.items() if k != "label"}], "row 1: expected text for the keys"),
        ([{**GOOD_ROW, "prompt": 3}], "row 1: expected text"),
        ([{**GOOD_ROW, "response": "  "}], "row 1: an empty prompt or response"),
        ([GOOD_ROW, GOOD_ROW], "the same case stands twice"),
        (["text"], "row 1: expected text for the keys"),
        ([], "mine.jsonl is empty"),
    ],
)
def test_bad_files(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(UserError, match=message) as caught:
        load_fixtures(RUBRIC, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (json.dumps(GOOD_ROW) + '\n{"question_id": "har', r"mine\.jsonl, line 2: expected JSON"),
        (json.dumps({**GOOD_ROW, "prompt": "é"}, ensure_ascii=False), r"mine\.jsonl is not UTF-8"),
    ],
)
def test_a_broken_last_row_and_another_encoding_are_refused(tmp_path: Path, data: str, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(data.encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        load_fixtures(RUBRIC, path)
    assert "\n" not in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(UserError, match="no fixtures nowhere"):
        load_fixtures(RUBRIC, "nowhere")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=8))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_auc_is_mann_whitney(good: list[int], bad: list[int]) -> None:
    from scipy.stats import mannwhitneyu

    assert auc(good, bad) == pytest.approx(mannwhitneyu(good, bad).statistic / (len(good) * len(bad)))
    assert auc(good, bad) == pytest.approx(1 - auc(bad, good))


def test_figure_draws_every_dimension() -> None:
    card = report_card(RUBRIC, answer_fixtures(RUBRIC, Stub(oracle), FIXTURES))
    axes = card_figure(RUBRIC, card, "x").axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == [d.name for d in reversed(RUBRIC.dimensions)]
    with pytest.raises(UserError, match="no dimension"):
        card_figure(RUBRIC, [])


def test_labels_are_the_judges() -> None:
    kinds = {q.id: q.kind for q in RUBRIC.questions}
    assert all(f.label in LABELS[kinds[f.question_id]] for f in FIXTURES)
    assert isinstance(FIXTURES[0], Fixture) and hasattr(HFEngine, "identity")
