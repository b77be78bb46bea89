"The judge over stub engines: gates first, failures, the abort, the cache, kills, the reasoned mode, the views."

import html.parser
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qalign.cache import VerdictCache, verdict_key
from qalign.core import UserError, content_hash
from qalign.engine import Answer, EngineError, HFEngine, Leads, Segment, Usage, failed
from qalign.judge import LABELS, SYSTEM, Judge, Scorecard, _keys, judge_lead, judge_prefix, read_reply, reply_schema
from qalign.pool import explain, pool
from qalign.rubric import Dimension, Principle, Question, Rubric, Verdict
from qalign.server import ServerEngine
from qalign.vllm_engine import VLLMEngine

CALM = settings(derandomize=True, max_examples=150, deadline=None)
HEAD, TAIL = "<|system|>\n", "\n<|answer|>"
Rule = Callable[[str, str, Question], Answer]


def make_rubric(shape: Sequence[Sequence[tuple[int, int]]], cap: int | None = None) -> Rubric:
    "Per principle and dimension: (gates, graded)."

    def dimension(name: str, gates: int, graded: int) -> Dimension:
        kinds = [("gate", f"g{i}") for i in range(gates)] + [("graded", f"q{i}") for i in range(graded)]
        return Dimension(name, tuple(Question(f"{name}.{i}", kind, f"Text of {name} {i}?") for kind, i in kinds))

    principles = tuple(
        Principle(f"p{i}", tuple(dimension(f"p{i}d{j}", *size) for j, size in enumerate(sizes)))
        for i, sizes in enumerate(shape)
    )
    return Rubric("toy", principles, "" if cap is None else principles[cap % len(principles)].name)


RUBRIC = make_rubric([[(1, 2), (2, 1)], [(1, 1), (0, 2)]], cap=0)  # 10 questions, 4 gates
sizes = st.tuples(st.integers(0, 2), st.integers(0, 3)).filter(any)
rubrics = st.builds(
    make_rubric,
    st.lists(st.lists(sizes, min_size=1, max_size=3), min_size=1, max_size=3),
    st.none() | st.integers(0, 2),
)


class Stub:
    "An engine whose answers are a function of the judged text and the question; it counts what it is asked."

    reads_leads = True

    def __init__(self, rubric: Rubric, rule: Rule, who: str = "stub", slow: float = 0.0) -> None:
        self.rubric, self.rule, self.who, self.slow = rubric, rule, who, slow
        self.spec, self.usage, self.tokens_read, self.identities = who, Usage(), [], 0
        self.asked: list[tuple[str, str, str]] = []  # prompt, response, question id
        self.chunks: list[int] = []

    def identity(self) -> dict[str, str]:
        self.identities += 1
        return {"spec": self.who}

    def frame(self, system: str) -> tuple[str, str]:
        assert system.startswith("You are a strict, fair grader.")
        return HEAD, TAIL

    def complete(self, *args: Any, **kwargs: Any) -> list[str]:
        raise AssertionError("a judge writes nothing")

    def question(self, suffix: str) -> Question:
        return next(q for q in self.rubric.questions if f": {q.text}" in suffix)

    def answer(self, prefix: Sequence[Segment], suffix: str) -> Answer:
        prompt, response = (text for text, trusted in prefix if not trusted)
        q = self.question(suffix)
        self.asked.append((prompt, response, q.id))
        return self.rule(prompt, response, q)

    def label_probs(
        self,
        prefixes: Sequence[Sequence[Segment]],
        suffixes: Sequence[str],
        labels: Sequence[Sequence[str]],
        chunk: int = 12,
        after: Sequence[Sequence[int]] | None = None,
        leads: Leads | None = None,
    ) -> list[list[Answer]]:
        self.chunks.append(chunk)
        after = after or [()] * len(suffixes)
        if leads:  # the question stands in front, the answer header behind the response
            assert list(leads.texts) == [judge_lead(q) for q in self.rubric.questions] and set(suffixes) == {""}
            assert all(p[0] == (HEAD, True) and p[-1] == (TAIL, True) for p in prefixes)
            suffixes = [leads.texts[i] for i in leads.of]
        assert [tuple(x) for x in labels] == [LABELS[self.question(s).kind] for s in suffixes]
        time.sleep(self.slow)
        out = []
        for prefix in prefixes:
            row: list[Answer] = [None] * len(suffixes)
            for i in sorted(range(len(suffixes)), key=lambda i: len(after[i]) > 0):
                if not any(failed(row[g]) for g in after[i]):
                    row[i] = self.answer(prefix, suffixes[i])
            out.append(row)
        self.tokens_read = [sum(x is not None for x in row) for row in out]
        return out

    def replies(
        self,
        prefixes: Sequence[Sequence[Segment]],
        suffixes: Sequence[str],
        schemas: Sequence[dict[str, Any]],
        jobs: Sequence[tuple[int, int]],
        max_tokens: int = 96,
    ) -> list[str | EngineError]:
        assert jobs and [s["properties"]["label"]["enum"] for s in schemas] == [
            list(LABELS[self.question(s).kind]) for s in suffixes
        ]
        out: list[Any] = []
        for r, i in jobs:
            said = self.answer(prefixes[r], suffixes[i])
            self.usage.add(10, 2)
            best = said if not isinstance(said, dict) else max(said, key=lambda k: said[k])
            reason = f"Because of {self.question(suffixes[i]).id}."
            out.append(json.dumps({"reason": reason, "label": best}) if isinstance(said, dict) else best)
        return out


def one_hot(label: str, kind: str) -> dict[str, float]:
    return {x: float(x == label) for x in LABELS[kind]}


def drawn(salt: str, sharp: float = 4, na: float = 1.0) -> Rule:
    "Label distributions drawn from the text and the question."

    def rule(prompt: str, response: str, q: Question) -> Answer:
        rng = random.Random(f"{salt}|{prompt}|{response}|{q.id}")
        odds = {x: rng.random() ** sharp * (na if x == "NA" else 1) for x in LABELS[q.kind]}
        return {x: o / sum(odds.values()) for x, o in odds.items()}

    return rule


def flaky(salt: str, share: float) -> Rule:
    "As `drawn`, but a share of the questions gets no answer."

    def rule(prompt: str, response: str, q: Question) -> Answer:
        rng = random.Random(f"fails|{salt}|{prompt}|{response}|{q.id}")
        cause = f"cause {rng.randrange(3)}"
        return EngineError(cause) if rng.random() < share else drawn(salt)(prompt, response, q)

    return rule


def fixed(**labels: str) -> Rule:
    "The best label everywhere, but for the questions named: p0d0_g0='FALSE'."
    given = {k.replace("_", "."): v for k, v in labels.items()}
    return lambda prompt, response, q: one_hot(given.get(q.id, LABELS[q.kind][0]), q.kind)


def pairs_of(n: int, prompts: int = 2) -> list[tuple[str, str]]:
    return [(f"prompt {i % prompts}", f"response {i}") for i in range(n)]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[VerdictCache]:
    with VerdictCache(tmp_path / "verdicts.db") as cache:
        yield cache


# gates first


@CALM
@given(rubrics, st.integers(0, 10**6), st.sampled_from([0.3, 1, 4]), st.sampled_from([0.0, 1.0, 3.0]))
def test_gates_first_changes_no_hard_score(rubric: Rubric, salt: int, sharp: float, na: float) -> None:
    lazy, thorough = (Stub(rubric, drawn(str(salt), sharp, na)) for _ in range(2))
    few = Judge(rubric, lazy).score_many(pairs_of(3))
    all_ = Judge(rubric, thorough, gates_first=False).score_many(pairs_of(3))
    assert len(thorough.asked) == 3 * len(rubric.questions) == len(set(thorough.asked))
    assert set(lazy.asked) <= set(thorough.asked) and len(lazy.asked) == len(set(lazy.asked))
    for a, b in zip(few, all_, strict=True):
        assert a.score == b.score  # base, principles, dimensions and share of failed, all equal
        said = {v.question_id: v for v in b.verdicts}
        assert all(said[v.question_id] == v for v in a.verdicts) and a.tokens <= b.tokens
        assert explain(rubric, a.verdicts) == explain(rubric, b.verdicts)
        skipped = set(said) - {v.question_id for v in a.verdicts}
        closed = [d for d in rubric.dimensions if any(said[g.id].label == "FALSE" for g in d.gates)]
        behind = {q.id for d in closed for q in d.graded}
        assert skipped == behind and a.tokens == len(rubric.questions) - len(behind)


@CALM
@given(rubrics, st.integers(0, 10**6))
def test_modes_and_layouts_of_the_same_labels_score_the_same(rubric: Rubric, salt: int) -> None:
    rule = drawn(str(salt))
    plain = Judge(rubric, Stub(rubric, rule)).score_many(pairs_of(3))
    for kwargs in ({"mode": "reasoned"}, {"layout": "rubric_first"}, {"mode": "reasoned", "gates_first": False}):
        engine = Stub(rubric, rule)
        other = Judge(rubric, engine, **kwargs).score_many(pairs_of(3))
        assert [c.score for c in other] == [c.score for c in plain]
        if kwargs.get("gates_first", True):
            assert [[v.question_id for v in c.verdicts] for c in other] == [
                [v.question_id for v in c.verdicts] for c in plain
            ]
        else:
            assert len(engine.asked) == 3 * len(rubric.questions)


@CALM
@given(rubrics, st.integers(0, 10**6))
def test_expected_scores_never_skip(rubric: Rubric, salt: int) -> None:
    engine = Stub(rubric, drawn(str(salt)))
    judge = Judge(rubric, engine, scores="expected")
    cards = judge.score_many(pairs_of(2))
    assert not judge.skips and len(engine.asked) == 2 * len(rubric.questions)
    for card in cards:
        assert [v.question_id for v in card.verdicts] == [q.id for q in rubric.questions]
        assert card.score == pool(rubric, card.verdicts, scores="expected")


def test_a_failed_gate_skips_its_own_dimension_alone() -> None:
    engine = Stub(RUBRIC, fixed(p0d1_g1="FALSE"))
    [card] = Judge(RUBRIC, engine).score("p", ["r"])
    assert [v.question_id for v in card.verdicts] == [q.id for q in RUBRIC.questions if q.id != "p0d1.q0"]
    assert card.score.dimensions == {"p0d0": 1, "p0d1": -1, "p1d0": 1, "p1d1": 1}
    assert card.score.base == 0.0 == card.score.principles["p0"]


def test_an_na_or_unanswered_gate_skips_nothing() -> None:
    for said in (one_hot("NA", "gate"), EngineError("lost")):

        def rule(prompt: str, response: str, q: Question, said: Answer = said) -> Answer:
            return said if q.kind == "gate" else one_hot("B", "graded")

        for mode in ("direct", "reasoned"):
            engine = Stub(RUBRIC, rule)
            [card] = Judge(RUBRIC, engine, mode=mode, max_failed=1).score("p", ["r"])
            assert len(engine.asked) == 10 and card.score.base == 0.5


def test_the_chunk_reaches_the_engine() -> None:
    engine = Stub(RUBRIC, fixed())
    Judge(RUBRIC, engine, chunk=5).score("p", ["r"])
    assert engine.chunks == [5]


# labels


def test_a_tie_goes_to_the_better_label() -> None:
    for kind, labels in LABELS.items():
        for i, first in enumerate(labels):
            for second in labels[i + 1 :]:
                q = next(q for q in RUBRIC.questions if q.kind == kind)
                tie = {x: 0.5 * (x in (first, second)) for x in labels}
                cards = []
                for gates_first in (True, False):
                    engine = Stub(RUBRIC, lambda p, r, x, tie=tie, q=q: tie if x == q else fixed()(p, r, x))
                    [card] = Judge(RUBRIC, engine, gates_first=gates_first).score("p", ["r"])
                    said = next(v for v in card.verdicts if v.question_id == q.id)
                    assert (said.label, said.status) == (first, "na" if first == "NA" else "ok")
                    assert said.probs == tie
                    cards.append(card.score)
                assert cards[0] == cards[1]


def test_na_has_its_status() -> None:
    [card] = Judge(RUBRIC, Stub(RUBRIC, lambda p, r, q: one_hot("NA", q.kind))).score("p", ["r"])
    assert {(v.label, v.status) for v in card.verdicts} == {("NA", "na")}
    assert card.score.base is None and card.score.failed == 0


# pairs


def test_equal_pairs_are_judged_once() -> None:
    engine = Stub(RUBRIC, drawn("x"))
    pairs = [("p", "a"), ("p", "b"), ("p", "a"), ("q", "a"), ("p", "a")]
    cards = Judge(RUBRIC, engine, gates_first=False).score_many(pairs)
    assert len(engine.asked) == 3 * 10 and [(c.prompt, c.response) for c in cards] == pairs
    assert cards[0] == cards[2] == cards[4] != cards[1]
    assert cards[3].verdicts != cards[0].verdicts


@settings(CALM, max_examples=50)
@given(st.lists(st.integers(0, 6), max_size=8), st.randoms(use_true_random=False), st.sampled_from([0.0, 0.2]))
def test_order_does_not_matter(which: list[int], rng: random.Random, share: float) -> None:
    pairs = [pairs_of(7)[i] for i in which]
    cards = Judge(RUBRIC, Stub(RUBRIC, flaky("o", share)), abort=1).score_many(pairs)
    order = list(range(len(pairs)))
    rng.shuffle(order)
    again = Judge(RUBRIC, Stub(RUBRIC, flaky("o", share)), abort=1).score_many([pairs[i] for i in order])
    assert again == [cards[i] for i in order]
    one_by_one = [Judge(RUBRIC, Stub(RUBRIC, flaky("o", share)), abort=1).score(p, [r])[0] for p, r in pairs]
    assert one_by_one == cards


def test_nothing_to_judge() -> None:
    engine = Stub(RUBRIC, fixed())
    assert Judge(RUBRIC, engine).score_many([]) == [] == Judge(RUBRIC, engine).score("p", [])
    assert engine.asked == [] == engine.chunks


@pytest.mark.parametrize("empty", ["", " ", "\n\t "])
def test_an_empty_response_is_failed_and_asks_nothing(empty: str, cache: VerdictCache) -> None:
    for mode in ("direct", "reasoned"):
        engine = Stub(RUBRIC, fixed())
        cards = Judge(RUBRIC, engine, mode=mode, cache=cache).score("p", [empty, "words"])
        assert {(v.label, v.status, v.reason) for v in cards[0].verdicts} == {(None, "failed", "the response is empty")}
        assert (cards[0].score.base, cards[0].score.failed, cards[0].tokens) == (None, 1.0, 0)
        assert len(cards[0].verdicts) == 10 and cards[1].score.base == 1.0
        assert {r for _, r, _ in engine.asked} == {"words"}
    only = Stub(RUBRIC, fixed())
    assert Judge(RUBRIC, only).score("p", [empty] * 60)[0].score.base is None and only.asked == []


# failures


@pytest.mark.parametrize("mode", ["direct", "reasoned"])
def test_a_failure_costs_its_own_question_alone(mode: str) -> None:
    def rule(prompt: str, response: str, q: Question) -> Answer:
        bad = (response, q.id) in (("b", "p0d0.q1"), ("b", "p1d1.q0"), ("c", "p1d0.g0"))
        return EngineError(f"no answer on {q.id}") if bad else one_hot(LABELS[q.kind][0], q.kind)

    cards = Judge(RUBRIC, Stub(RUBRIC, rule), max_failed=0.1, mode=mode).score("p", ["a", "b", "c"])
    assert [c.score.failed for c in cards] == [0.0, 0.2, 0.1]
    assert [c.score.base for c in cards] == [1.0, None, 1.0]  # max_failed is the largest share still scored
    assert cards[1].score.dimensions == {"p0d0": 1.0, "p0d1": 1.0, "p1d0": 1.0, "p1d1": 1.0}
    for card, bad in zip(cards, ({}, {"p0d0.q1", "p1d1.q0"}, {"p1d0.g0"}), strict=True):
        lost = {v.question_id: v for v in card.verdicts if v.status == "failed"}
        assert set(lost) == set(bad) and len(card.verdicts) == 10
        for i, v in lost.items():
            assert (v.label, v.probs, v.reason) == (None, None, f"no answer on {i}")


@CALM
@given(rubrics, st.integers(0, 10**6), st.floats(0, 0.6), st.floats(0, 1))
def test_the_base_score_is_none_exactly_where_too_many_failed(
    rubric: Rubric, salt: int, share: float, limit: float
) -> None:
    for card in Judge(rubric, Stub(rubric, flaky(str(salt), share)), max_failed=limit, abort=1).score_many(pairs_of(3)):
        lost = sum(v.status == "failed" for v in card.verdicts) / len(rubric.questions)
        assert card.score.failed == lost and card.score == pool(rubric, card.verdicts, max_failed=limit)
        assert lost <= limit or card.score.base is None


def test_skipped_grades_count_in_the_share_that_failed() -> None:
    rubric = make_rubric([[(1, 3)] * 6])

    def rule(prompt: str, response: str, q: Question) -> Answer:
        if q.id == "p0d5.q0":
            return EngineError("lost")
        return one_hot("FALSE" if q.kind == "gate" and q.id != "p0d5.g0" else LABELS[q.kind][0], q.kind)

    cheap, whole = (Judge(rubric, Stub(rubric, rule), gates_first=g).score("p", ["r"])[0] for g in (True, False))
    assert len(cheap.verdicts) == 9 and len(whole.verdicts) == 24
    assert cheap.score == whole.score and cheap.score.failed == 1 / 24


@CALM
@given(rubrics, st.integers(0, 10**6), st.floats(0, 0.6))
def test_gates_first_changes_no_part_of_the_score_where_some_failed(rubric: Rubric, salt: int, share: float) -> None:
    both = [
        Judge(rubric, Stub(rubric, flaky(str(salt), share)), gates_first=g, abort=1).score_many(pairs_of(2))
        for g in (True, False)
    ]
    for a, b in zip(*both, strict=True):
        assert a.score == b.score


def thirds(prompt: str, response: str, q: Question) -> Answer:
    "Fails on a question by its place: causes a, b, c in the ratio 3 : 2 : 1, four answers are kept."
    place = [x.id for x in RUBRIC.questions].index(q.id)
    cause = ("a", "a", "a", "b", "b", "c", None, None, None, None)[place]
    return EngineError(f"cause {cause}") if cause else one_hot("NA", q.kind)


@pytest.mark.parametrize("mode", ["direct", "reasoned"])
def test_too_many_failures_stop_with_a_table_of_causes(mode: str) -> None:
    with pytest.raises(UserError) as caught:
        Judge(RUBRIC, Stub(RUBRIC, thirds), mode=mode).score_many(pairs_of(5))
    assert str(caught.value) == (
        "judging stopped: 30 of 50 verdicts failed; 15 times: cause a; 10 times: cause b; 5 times: cause c"
    )


def test_the_abort_waits_for_fifty_verdicts_and_its_share() -> None:
    four = Judge(RUBRIC, Stub(RUBRIC, thirds)).score_many(pairs_of(4))  # 24 of 40: too few to say anything
    assert [c.score.base for c in four] == [None] * 4 and four[0].score.failed == 0.6
    Judge(RUBRIC, Stub(RUBRIC, thirds), abort=0.6).score_many(pairs_of(9))  # not more than the share
    with pytest.raises(UserError, match="54 of 90 verdicts failed"):
        Judge(RUBRIC, Stub(RUBRIC, thirds), abort=0.599).score_many(pairs_of(9))
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        Judge(RUBRIC, Stub(RUBRIC, lambda p, r, q: EngineError("no host")), abort=0).score_many(pairs_of(5))


@pytest.mark.parametrize("mode", ["direct", "reasoned"])
def test_an_abort_keeps_what_came(mode: str, cache: VerdictCache) -> None:
    engine = Stub(RUBRIC, thirds)
    with pytest.raises(UserError, match="judging stopped: 96 of 160"):
        Judge(RUBRIC, engine, mode=mode, cache=cache).score_many(pairs_of(200))
    assert len(engine.asked) == 160  # it stopped early: sixteen pairs of two hundred
    assert len(cache) == 64
    later = Stub(RUBRIC, fixed())
    Judge(RUBRIC, later, mode=mode, cache=cache).score_many(pairs_of(200))
    again = set(later.asked) & set(engine.asked)
    assert len(later.asked) == 2000 - 64 and len(again) == 96
    assert {q for *_, q in again} == {q.id for q in RUBRIC.questions[:6]}


def test_an_engine_that_raises_is_heard() -> None:
    engine = Stub(RUBRIC, fixed())
    engine.label_probs = lambda *a, **k: (_ for _ in ()).throw(EngineError("no judge here"))  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="no judge here"):
        Judge(RUBRIC, engine).score("p", ["r"])


# cache

WAYS = [{}, {"mode": "reasoned"}, {"layout": "rubric_first"}, {"scores": "expected"}, {"gates_first": False}]


@pytest.mark.parametrize("way", WAYS)
def test_a_second_call_asks_nothing(way: dict[str, Any], cache: VerdictCache) -> None:
    bare = Judge(RUBRIC, Stub(RUBRIC, drawn("c")), **way).score_many(pairs_of(40))
    first, second = Stub(RUBRIC, drawn("c")), Stub(RUBRIC, lambda *args: pytest.fail("asked again"))
    made = Judge(RUBRIC, first, cache=cache, **way).score_many(pairs_of(40))
    assert [(c.verdicts, c.score) for c in made] == [(c.verdicts, c.score) for c in bare]
    kept = Judge(RUBRIC, second, cache=cache, **way).score_many(pairs_of(40))
    assert second.asked == [] == second.chunks and {c.tokens for c in kept} == {0}
    assert [(c.verdicts, c.score) for c in kept] == [(c.verdicts, c.score) for c in made]  # floats and all
    assert len(cache) == len(first.asked)


@settings(CALM, max_examples=20)
@given(rubrics, st.sets(st.integers(0, 39)), st.integers(0, 10**6), st.booleans())
def test_a_partial_cache_is_asked_for_the_rest(rubric: Rubric, known: set[int], salt: int, gates_first: bool) -> None:
    everything = [(*pair, q) for pair in pairs_of(4) for q in rubric.questions]
    rule = drawn(str(salt))
    with tempfile.TemporaryDirectory() as folder, VerdictCache(Path(folder) / "v.db") as cache:
        seed = Judge(rubric, Stub(rubric, rule), gates_first=False, cache=cache)
        full = seed.score_many(pairs_of(4))
        with VerdictCache(Path(folder) / "part.db") as part:
            have = set()
            for i in known:
                if i < len(everything):
                    prompt, response, q = everything[i]
                    key = key_in(seed, q, prompt, response)
                    part.put_many(cache.get_many([key]))
                    have.add((prompt, response, q.id))
            assert len(part) == len(have)
            engine = Stub(rubric, rule)
            cards = Judge(rubric, engine, gates_first=gates_first, cache=part).score_many(pairs_of(4))
            assert not have & set(engine.asked) and len(engine.asked) == len(set(engine.asked))
            assert [c.score for c in cards] == [c.score for c in full]
            if not gates_first:
                assert have | set(engine.asked) == {(p, r, q.id) for p, r, q in everything}
            assert len(part) == len(have) + len(engine.asked)


def key_in(judge: Judge, q: Question, prompt: str, response: str) -> str:
    return _keys(judge, [(prompt, response)])[prompt, response][q.id]


@pytest.mark.parametrize("mode", ["direct", "reasoned"])
def test_a_gate_known_to_fail_spares_its_grades(mode: str, cache: VerdictCache) -> None:
    gates_only = RUBRIC
    for p in RUBRIC.principles:
        dimensions = tuple(replace(d, questions=d.gates) for d in p.dimensions if d.gates)
        principles = tuple(x if x.name != p.name else replace(x, dimensions=dimensions) for x in gates_only.principles)
        gates_only = replace(gates_only, principles=principles)
    rule = fixed(p0d0_g0="FALSE", p1d0_g0="FALSE")
    Judge(gates_only, Stub(gates_only, rule), mode=mode, cache=cache).score("p", ["r"])
    assert len(cache) == 4
    engine = Stub(RUBRIC, rule)
    [card] = Judge(RUBRIC, engine, mode=mode, cache=cache).score("p", ["r"])
    assert [q for *_, q in engine.asked] == ["p0d1.q0", "p1d1.q0", "p1d1.q1"]
    assert card.score.dimensions == {"p0d0": -1, "p0d1": 1, "p1d0": -1, "p1d1": 1} and len(card.verdicts) == 7
    thorough = Stub(RUBRIC, rule)
    Judge(RUBRIC, thorough, mode=mode, cache=cache, gates_first=False).score("p", ["r"])
    assert sorted(q for *_, q in thorough.asked) == ["p0d0.q0", "p0d0.q1", "p1d0.q0"]


@pytest.mark.parametrize("mode", ["direct", "reasoned"])
def test_a_gate_that_another_process_found_to_hold_has_its_grades_asked(mode: str, cache: VerdictCache) -> None:
    "This process finds the gate FALSE and skips its grades; the cache holds TRUE by the time it writes."
    judge = Judge(RUBRIC, Stub(RUBRIC, fixed()), mode=mode, cache=cache)
    gate = RUBRIC.dimensions[0].gates[0]

    def rule(prompt: str, response: str, q: Question) -> Answer:
        if q == gate and response == "r1":
            cache.put_many({key_in(judge, q, prompt, response): Verdict(q.id, "TRUE", one_hot("TRUE", "gate"))})
        return fixed(**{gate.id.replace(".", "_"): "FALSE"})(prompt, response, q)

    engine = Stub(RUBRIC, rule)
    cards = Judge(RUBRIC, engine, mode=mode, cache=cache).score_many([("p", "r0"), ("p", "r1")])
    assert [c.score.dimensions["p0d0"] for c in cards] == [-1, 1] and len(cards[1].verdicts) == len(RUBRIC.questions)
    assert [x for x in engine.asked if x[1] == "r1"][-2:] == [("p", "r1", "p0d0.q0"), ("p", "r1", "p0d0.q1")]


@pytest.mark.parametrize("mode", ["direct", "reasoned"])
def test_failed_verdicts_are_asked_again(mode: str, cache: VerdictCache) -> None:
    first = Stub(RUBRIC, flaky("f", 0.3))
    cards = Judge(RUBRIC, first, mode=mode, gates_first=False, cache=cache).score_many(pairs_of(8))
    lost = {(c.prompt, c.response, v.question_id) for c in cards for v in c.verdicts if v.status == "failed"}
    assert 10 < len(lost) < 40 and len(cache) == 80 - len(lost)
    second = Stub(RUBRIC, drawn("f"))
    cards = Judge(RUBRIC, second, mode=mode, gates_first=False, cache=cache).score_many(pairs_of(8))
    assert set(second.asked) == lost and len(cache) == 80
    whole = Judge(RUBRIC, Stub(RUBRIC, drawn("f")), mode=mode, gates_first=False).score_many(pairs_of(8))
    assert [c.verdicts for c in cards] == [c.verdicts for c in whole]


def reworded(rubric: Rubric, old: str, **new: str) -> Rubric:
    def changed(q: Question) -> Question:
        return replace(q, **new) if q.id == old else q

    def dimension(d: Dimension) -> Dimension:
        return replace(d, questions=tuple(changed(q) for q in d.questions))

    principles = tuple(replace(p, dimensions=tuple(dimension(d) for d in p.dimensions)) for p in rubric.principles)
    return replace(rubric, principles=principles)


def asked_with(
    cache: VerdictCache, rubric: Rubric = RUBRIC, who: str = "stub", pair: tuple[str, str] = ("p", "r"), **way: Any
) -> list[str]:
    "Ids of the questions that a judge with this cache puts to its engine, in the rubric's order."
    engine = Stub(rubric, fixed(), who)
    Judge(rubric, engine, cache=cache, **way).score_many([pair])
    asked = {q for *_, q in engine.asked}
    return [q.id for q in rubric.questions if q.id in asked]


def test_what_decides_a_verdict_is_in_its_key(cache: VerdictCache) -> None:
    ids = [q.id for q in RUBRIC.questions]
    assert asked_with(cache) == ids and asked_with(cache) == []
    assert asked_with(cache, who="other") == ids
    assert asked_with(cache, mode="reasoned") == ids
    assert asked_with(cache, layout="rubric_first") == ids
    assert asked_with(cache, pair=("p", "s")) == asked_with(cache, pair=("q", "r")) == ids
    assert asked_with(cache, reworded(RUBRIC, "p0d1.q0", text="Another text?")) == ["p0d1.q0"]
    assert len(cache) == 6 * 10 + 1
    for way in ({}, {"mode": "reasoned"}, {"layout": "rubric_first"}):
        assert asked_with(cache, **way) == []


def test_what_decides_nothing_is_not_in_the_key(cache: VerdictCache) -> None:
    assert len(asked_with(cache)) == 10
    assert asked_with(cache, reworded(RUBRIC, "p0d1.q0", id="renamed")) == []
    assert asked_with(cache, replace(RUBRIC, name="another", cap="", description="x")) == []
    assert asked_with(cache, chunk=3, scores="expected", max_failed=0.5, abort=0.1, gates_first=False) == []
    engine = Stub(RUBRIC, fixed())
    renamed = reworded(RUBRIC, "p0d1.q0", id="renamed")
    [card] = Judge(renamed, engine, cache=cache).score("p", ["r"])
    assert [v.question_id for v in card.verdicts] == [q.id for q in renamed.questions]


def test_rubric_first_depends_on_the_whole_rubric(cache: VerdictCache) -> None:
    way = {"layout": "rubric_first"}
    ids = [q.id for q in RUBRIC.questions]
    assert asked_with(cache, **way) == ids
    assert asked_with(cache, reworded(RUBRIC, "p0d1.q0", text="Another text?"), **way) == ids
    assert asked_with(cache, replace(RUBRIC, principles=RUBRIC.principles[::-1]), **way) != []
    assert asked_with(cache, replace(RUBRIC, name="another", description="x"), **way) == []


def test_a_shared_question_text_is_one_verdict_in_the_cache(cache: VerdictCache) -> None:
    twin = reworded(RUBRIC, "p1d1.q1", text=RUBRIC.questions[-2].text)
    rule = drawn("twin")
    engine = Stub(twin, lambda p, r, q: rule(p, r, replace(q, id=q.text)))
    first = Judge(twin, engine, gates_first=False, cache=cache).score("p", ["r"])
    again = Judge(twin, engine, gates_first=False, cache=cache).score("p", ["r"])
    assert len(cache) == 9 and first[0].verdicts == again[0].verdicts


def test_the_engine_says_who_it_is_once_a_call(cache: VerdictCache) -> None:
    engine = Stub(RUBRIC, fixed())
    Judge(RUBRIC, engine, cache=cache).score_many(pairs_of(50))
    assert engine.identities == 1  # an engine in this process hashes its weights to say so
    bare = Stub(RUBRIC, fixed())
    Judge(RUBRIC, bare).score_many(pairs_of(50))
    assert bare.identities == 0


# kill -9

JOB = """
import os, sys
sys.path.insert(0, sys.argv[3])
from test_judge import RUBRIC, Stub, drawn, pairs_of
from qalign.cache import VerdictCache
from qalign.judge import Judge

class Logging(Stub):
    def label_probs(self, prefixes, *args, **kwargs):
        before = len(self.asked)
        out = super().label_probs(prefixes, *args, **kwargs)
        os.write(log, "".join("|".join(x) + "\\n" for x in self.asked[before:]).encode())
        return out

log = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
judge = Judge(RUBRIC, Logging(RUBRIC, drawn("kill"), slow=float(sys.argv[4])), cache=VerdictCache(sys.argv[1]))
judge.score_many(pairs_of(500))
"""


def asked_in(log: Path) -> list[tuple[str, ...]]:
    return [tuple(line.split("|")) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize("part", [0.1, 0.6])
def test_kill_9_in_the_middle_of_500_judgements(tmp_path: Path, part: float) -> None:
    db, logs = tmp_path / "verdicts.db", [tmp_path / "first.log", tmp_path / "second.log"]

    def start(log: Path, slow: float) -> "subprocess.Popen[bytes]":
        here = str(Path(__file__).parent)
        return subprocess.Popen([sys.executable, "-c", JOB, str(db), str(log), here, str(slow)], stderr=subprocess.PIPE)

    whole = Judge(RUBRIC, Stub(RUBRIC, drawn("kill"))).score_many(pairs_of(500))
    needed = {(c.prompt, c.response, v.question_id) for c in whole for v in c.verdicts}
    first = start(logs[0], 0.05)
    end = time.monotonic() + 60
    while len(asked_in(logs[0])) < part * len(needed) and time.monotonic() < end:
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    asked = asked_in(logs[0])
    judge = Judge(RUBRIC, Stub(RUBRIC, drawn("kill")))
    keys = {(*pair, q.id): key_in(judge, q, *pair) for pair in pairs_of(500) for q in RUBRIC.questions}
    with VerdictCache(db) as cache:
        before = cache.get_many(keys.values())
    stored = {x for x, k in keys.items() if k in before}
    assert 0 < len(stored) < len(needed) and len(before) == len(stored)
    assert stored <= set(asked) and len(set(asked) - stored) <= 2 * 16 * 10  # at most the steps in flight
    second = start(logs[1], 0)
    assert second.wait() == 0, second.stderr and second.stderr.read()
    again = asked_in(logs[1])
    assert not stored & set(again) and len(again) == len(set(again))  # nothing asked twice that was stored
    assert stored | set(again) == needed
    with VerdictCache(db) as cache:
        after = cache.get_many(keys.values())
        assert before.items() <= after.items() and len(after) == len(cache) == len(needed)  # nothing lost
        silent = Stub(RUBRIC, lambda *args: pytest.fail("asked again"))
        final = Judge(RUBRIC, silent, cache=cache).score_many(pairs_of(500))
    assert [(c.verdicts, c.score) for c in final] == [(c.verdicts, c.score) for c in whole]


# reasoned


GATE, GRADED = RUBRIC.questions[0], RUBRIC.questions[1]
DEEP, LONG = "[" * 200_000, '{"reason": 1, "label": ' + "9" * 5000 + "}"


@pytest.mark.parametrize(
    ("question", "reply", "label", "reason"),
    [
        (GATE, '{"reason": "It does.", "label": "TRUE"}', "TRUE", "It does."),
        (GATE, '{"reason": "It does not.", "label": "FALSE"}', "FALSE", "It does not."),
        (GATE, '{"label": "NA", "reason": "No request."}', "NA", "No request."),
        (GRADED, ' \n{"reason": "Clear.", "label": "A"}\n', "A", "Clear."),
        (GRADED, '{"reason": "Ja \\u2014 \\"gut\\"", "label": "B"}', "B", 'Ja — "gut"'),
        (GRADED, '{"reason": "x", "label": "F", "extra": 1}', "F", "x"),
        (GRADED, '{"reason": "the label is A", "label": "D"}', "D", "the label is A"),
        (GATE, '{"reason": "x", "label": "A"}', None, "no label of a gate question: 'A'"),
        (GRADED, '{"reason": "x", "label": "TRUE"}', None, "no label of a graded question: 'TRUE'"),
        (GRADED, '{"reason": "x", "label": "E"}', None, "no label of a graded question: 'E'"),
        (GRADED, '{"reason": "x", "label": "a"}', None, "no label of a graded question: 'a'"),
        (GRADED, '{"reason": "x", "label": " A"}', None, "no label of a graded question: ' A'"),
        (GRADED, '{"reason": "x", "label": ""}', None, "no label"),
        (GATE, '{"reason": "x", "label": true}', None, "no label of a gate question: True"),
        (GRADED, '{"reason": "x", "label": null}', None, "no label of a graded question: None"),
        (GRADED, '{"reason": "x", "label": ["A"]}', None, "no label"),
        (GRADED, '{"reason": "x", "label": {"A": 1}}', None, "no label"),
        (GRADED, '{"reason": "x", "label": 1}', None, "no label"),
        (GRADED, '{"reason": "x"}', None, 'not the JSON asked for: \'{"reason": "x"}\''),
        (GRADED, "{}", None, "not the JSON asked for"),
        (GRADED, '{"reason": "x", "label": "A"', None, "not the JSON asked for"),
        (GRADED, '{"reason": "cut off in the midd', None, "not the JSON asked for"),
        (GRADED, "", None, "not the JSON asked for: ''"),
        (GRADED, "A", None, "not the JSON asked for: 'A'"),
        (GRADED, '"A"', None, "not the JSON asked for"),
        (GRADED, "null", None, "not the JSON asked for"),
        (GRADED, "NaN", None, "not the JSON asked for"),
        (GRADED, "12", None, "not the JSON asked for"),
        (GRADED, '[{"reason": "x", "label": "A"}]', None, "not the JSON asked for"),
        (GRADED, "{'reason': 'x', 'label': 'A'}", None, "not the JSON asked for"),
        (GRADED, '```json\n{"reason": "x", "label": "A"}\n```', None, "not the JSON asked for"),
        (GRADED, 'Sure! Here you are: {"reason": "x", "label": "A"}', None, "not the JSON asked for"),
        (GRADED, '{"reason": "x", "label": "A"} I hope this helps!', None, "not the JSON asked for"),
        (GRADED, "<think>\nLet me see.\n</think>\nGrade: A", None, "not the JSON asked for: '<think>\\nLet"),
        (GRADED, "As an AI language model, I cannot grade this.", None, "not the JSON asked for"),
        (GRADED, "[[ ## label ## ]] A", None, "not the JSON asked for"),
        (GRADED, "x" * 10_000, None, "not the JSON asked for"),
        (GRADED, EngineError("the server timed out"), None, "the server timed out"),
        pytest.param(GRADED, DEEP, None, "not the JSON asked for", id="nested too deep to parse"),
        pytest.param(GRADED, LONG, None, "not the JSON asked for", id="a number too long to parse"),
    ],
)
def test_read_reply(question: Question, reply: str | EngineError, label: str | None, reason: str) -> None:
    said = read_reply(question, reply)
    assert (said.question_id, said.label, said.probs) == (question.id, label, None)
    assert said.status == {None: "failed", "NA": "na"}.get(label, "ok")
    assert said.reason == reason if label else said.reason.startswith(reason)
    assert label or ("\n" not in said.reason and len(said.reason) < 400)


@CALM
@given(st.sampled_from([GATE, GRADED]), st.text() | st.from_type(dict).map(json.dumps))
def test_chatter_is_never_a_verdict(question: Question, reply: str) -> None:
    assert read_reply(question, reply).status == "failed"


@CALM
@given(st.sampled_from([GATE, GRADED]), st.data())
def test_what_the_schema_allows_is_read(question: Question, data: st.DataObject) -> None:
    schema = reply_schema(question)
    assert schema["required"] == list(schema["properties"]) == ["reason", "label"]
    assert schema["additionalProperties"] is False
    assert {x["type"] for x in schema["properties"].values()} == {"string"}  # OpenAI wants a type beside enum
    label = data.draw(st.sampled_from(schema["properties"]["label"]["enum"]))
    reason = data.draw(st.text(min_size=1, max_size=schema["properties"]["reason"]["maxLength"]))
    for ascii_only in (True, False):
        said = read_reply(question, json.dumps({"reason": reason, "label": label}, ensure_ascii=ascii_only))
        assert (said.label, said.reason, said.status) == (label, reason, "na" if label == "NA" else "ok")


def test_a_reasoned_judge_keeps_the_sentences_and_asks_gates_first(cache: VerdictCache) -> None:
    engine = Stub(RUBRIC, fixed(p0d1_g0="FALSE"))
    [card] = Judge(RUBRIC, engine, mode="reasoned", cache=cache).score("p", ["r"])
    asked = [q for *_, q in engine.asked]
    assert asked == ["p0d0.g0", "p0d1.g0", "p0d1.g1", "p1d0.g0", "p0d0.q0", "p0d0.q1", "p1d0.q0", "p1d1.q0", "p1d1.q1"]
    assert [v.question_id for v in card.verdicts] == [q.id for q in RUBRIC.questions if q.id != "p0d1.q0"]
    assert all(v.reason == f"Because of {v.question_id}." and v.probs is None for v in card.verdicts)
    assert card.tokens == 9 * 12 == engine.usage.prompt_tokens + engine.usage.reply_tokens
    [kept] = Judge(RUBRIC, engine, mode="reasoned", cache=cache).score("p", ["r"])
    assert kept.verdicts == card.verdicts and kept.tokens == 0


def test_replies_of_every_kind_in_one_call() -> None:
    engine = Stub(RUBRIC, fixed())
    good = engine.replies
    bad = ["not JSON", '{"reason": "x", "label": "Z"}', '{"reason": "x"}', EngineError("lost")]

    def replies(prefixes: Any, suffixes: Any, schemas: Any, jobs: Any, **kwargs: Any) -> list[str | EngineError]:
        out = good(prefixes, suffixes, schemas, jobs, **kwargs)
        graded = [j for j, (_, i) in enumerate(jobs) if engine.question(suffixes[i]).kind == "graded"]
        for j, reply in zip(graded, bad, strict=False):
            out[j] = reply
        return out

    engine.replies = replies  # type: ignore[method-assign]
    [card] = Judge(RUBRIC, engine, mode="reasoned", max_failed=0.4).score("p", ["r"])
    lost = [v.reason for v in card.verdicts if v.status == "failed"]
    assert Counter(v.status for v in card.verdicts) == {"ok": 6, "failed": 4} and card.score.base == 1.0
    assert lost == [
        "not the JSON asked for: 'not JSON'",
        "no label of a graded question: 'Z'",
        'not the JSON asked for: \'{"reason": "x"}\'',
        "lost",
    ]


# what the engine reads


def test_untrusted_text_is_the_prompt_and_the_response_alone() -> None:
    prefix = judge_prefix(HEAD, "a\n~~~~", " b ")
    assert [text for text, trusted in prefix if not trusted] == ["a\n~~~~", "b"]
    assert "".join(t for t, _ in prefix).count("~" * 5) == 2 and prefix[0] == (HEAD, True)


# views


EVIL = '<script>alert("x")</script>&amp;</details><b onload=1>'


class Outline(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.words, self.open = "", 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1
        self.open += 1

    def handle_endtag(self, tag: str) -> None:
        self.open -= 1

    def handle_data(self, data: str) -> None:
        self.words += data


def outline(card: Scorecard) -> Outline:
    page = Outline()
    page.feed(card._repr_html_())
    page.close()
    return page


def test_html_quotes_what_others_wrote() -> None:
    questions = (Question(f"q {EVIL}", "gate", f"t {EVIL}"), Question("two", "graded", "x"))
    named = Rubric("toy", (Principle(EVIL, (Dimension(f"d {EVIL}", questions),)),), "")
    said = (Verdict(f"q {EVIL}", "TRUE", None, "ok", f"r {EVIL}"), Verdict("two", None, None, "failed", f"f {EVIL}"))
    page = outline(Scorecard("p", f"response {EVIL}", said, pool(named, said), 1, rubric=named))
    assert page.open == 0 and set(page.tags) == {"b", "blockquote", "details", "summary", "div", "small"}
    for text in (f"response {EVIL}", f"d {EVIL}", f"t {EVIL}", f"r {EVIL}", f"f {EVIL}"):
        assert text in page.words
    gate = replace(said[0], label="FALSE")
    skipped = Scorecard("p", "r", (gate,), pool(named, [gate]), 1, rubric=named)
    assert "two not asked: its gate failed" in outline(skipped).words


def test_html_shows_the_tree_and_what_decided() -> None:
    rule = fixed(p0d1_g1="FALSE", p1d0_q0="D", p0d0_q1="C", p1d1_q0="NA", p1d1_q1="NA")
    [card] = Judge(RUBRIC, Stub(RUBRIC, rule)).score("p", ["the response"])
    page = outline(card)
    assert page.tags["details"] == 2 + 4 and page.tags["div"] == 10
    assert page.words.startswith(f"base score {card.score.base:.2f}")
    lines = card._repr_html_().split("<div>")[1:]
    marked = [next(q.id for q in RUBRIC.questions if q.text in x) for x in lines if "decides" in x]
    assert marked == ["p0d0.q1", "p0d1.g1", "p1d0.q0"]  # nothing decides p1d1
    assert "p0d1.q0 not asked: its gate failed" in page.words and "p1d1 none" in page.words
    assert "p0d0 0.10" in page.words and "p1 -0.50" in page.words and "C 1.00" in page.words
    bare = replace(card, rubric=None)
    assert "<div>" not in bare._repr_html_() and "the response" in bare._repr_html_() and bare == card


def test_html_of_a_card_without_a_score() -> None:
    for card in Judge(RUBRIC, Stub(RUBRIC, fixed())).score("p", [""]):
        assert outline(card).words.startswith("base score none") and outline(card).words.count("failed") == 10


@CALM
@given(rubrics, st.integers(0, 10**6), st.floats(0, 0.4), st.sampled_from(["hard", "expected"]))
def test_html_is_whole_for_any_card(rubric: Rubric, salt: int, share: float, scores: str) -> None:
    [card] = Judge(rubric, Stub(rubric, flaky(str(salt), share)), scores=scores).score("p", ["r"])
    page = outline(card)
    assert page.open == 0 and page.tags["div"] == len(rubric.questions)
    assert page.words.count("not asked") == len(rubric.questions) - len(card.verdicts)
    assert page.words.count("decides") == sum(r["question"] is not None for r in explain(rubric, card.verdicts))


def test_to_frame() -> None:
    rule = fixed(p0d1_g1="FALSE", p1d0_q0="D", p0d0_q1="C", p1d1_q0="NA", p1d1_q1="NA")
    [card] = Judge(RUBRIC, Stub(RUBRIC, rule)).score("p", ["r"])
    frame = card.to_frame()
    assert (
        list(frame.id)
        == [q.id for q in RUBRIC.questions if q.id != "p0d1.q0"]
        == [v.question_id for v in card.verdicts]
    )
    assert list(frame.question) == [q.text for q in RUBRIC.questions if q.id != "p0d1.q0"]
    assert list(frame.id[frame.decided]) == ["p0d0.q1", "p0d1.g1", "p1d0.q0"]
    by_dimension = {k: None if v.isna().all() else v.iloc[0] for k, v in frame.groupby("dimension").score}
    assert by_dimension == card.score.dimensions
    row = frame[frame.id == "p0d0.q1"].iloc[0]
    assert (row.principle, row.dimension, row.kind, row.label, row.status) == ("p0", "p0d0", "graded", "C", "ok")
    assert row.p_best == 0.0 and row.score == 0.1 and frame[frame.label == "TRUE"].p_best.eq(1).all()
    with pytest.raises(AssertionError, match="made by a Judge"):
        replace(card, rubric=None).to_frame()


def test_repr_is_one_line() -> None:
    [card] = Judge(RUBRIC, Stub(RUBRIC, fixed(p0d1_g1="FALSE"))).score("p", ["r"])
    text = repr(card)
    assert text.startswith("Scorecard(base=0.0, p0d0.g0=TRUE p0d0.q0=A") and "\n" not in text and "p0d1.q0" not in text


# what a judge is


def test_version() -> None:
    engine = Stub(RUBRIC, fixed())
    ask = {"gate": "Yes or no", "graded": "Grade"}
    plain = Judge(RUBRIC, engine)
    assert plain.version == content_hash([RUBRIC.version, SYSTEM, LABELS, ask])
    assert plain.version == Judge(RUBRIC, engine, mode="direct", layout="response_first").version
    same = Judge(RUBRIC, Stub(RUBRIC, fixed(), "x"), scores="expected", chunk=3, gates_first=False, abort=0.1)
    assert same.version == plain.version
    reasoned, first = Judge(RUBRIC, engine, mode="reasoned"), Judge(RUBRIC, engine, layout="rubric_first")
    other = Judge(reworded(RUBRIC, "p0d0.g0", text="Other?"), engine)
    assert len({plain.version, reasoned.version, first.version, other.version}) == 4


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ({"mode": "thinking"}, "expected mode to be direct or reasoned, got 'thinking'"),
        ({"mode": None}, "expected mode to be direct or reasoned, got None"),
        ({"layout": "first"}, "expected layout to be response_first or rubric_first, got 'first'"),
        ({"mode": "reasoned", "layout": "rubric_first"}, "a reasoned judge reads one question at a time: use layout"),
        ({"mode": "reasoned", "scores": "expected"}, "a reasoned judge writes labels without probabilities"),
    ],
)
def test_bad_ways_are_said_in_one_line(way: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Judge(RUBRIC, Stub(RUBRIC, fixed()), **way)
    assert "\n" not in str(caught.value)


def test_flat_pooling_asks_every_question() -> None:
    closed = fixed(p0d0_g0="FALSE")
    cards = [Judge(RUBRIC, Stub(RUBRIC, closed), pooling=p).score("p", ["r"])[0] for p in ("program", "flat")]
    assert len(cards[0].verdicts) < len(cards[1].verdicts) == len(RUBRIC.questions)
    assert cards[1].score == pool(RUBRIC, cards[1].verdicts, pooling="flat") != cards[0].score


def test_rubric_first_needs_an_engine_that_keeps_questions() -> None:
    engine = Stub(RUBRIC, fixed(), "vllm:some")
    engine.reads_leads = False
    with pytest.raises(
        UserError, match=r"layout rubric_first .* which vllm:some cannot: use layout response_first$"
    ) as caught:
        Judge(RUBRIC, engine, layout="rubric_first")
    assert "\n" not in str(caught.value)
    for other in (ServerEngine, VLLMEngine):
        assert not hasattr(other, "reads_leads")
    assert HFEngine.reads_leads


def test_keys_are_those_of_the_cache_room() -> None:
    judge = Judge(RUBRIC, Stub(RUBRIC, fixed()))
    one = key_in(judge, GATE, "p", "r")
    assert len(one) == 64 and one != verdict_key({}, "", "direct", GATE, "p", "r")
    assert len({key_in(judge, q, p, r) for q in RUBRIC.questions for p in "ab" for r in "cd"}) == 40
