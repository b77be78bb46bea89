"The judge of refusals: what it learns from, what is held out, its figures, its record, its card."

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qalign import refusals as room
from qalign.bench import shape_engine
from qalign.core import UserError, data_path, read_jsonl, write_json
from qalign.engine import HFEngine
from qalign.fixtures import auc
from qalign.refusals import (
    XSTEST,
    cross_validate_refusals,
    examples_from_labels,
    refusal_figure,
    refusal_judge_for,
    refusal_rows,
    refusal_table,
    split_labels,
    tune_refusals,
)
from qalign.reliability import HumanLabel, load_human_labels
from qalign.safety import REFUSAL, refusal_judge, string_judge
from qalign.stats import cohen_kappa
from qalign.tune import Recipe, judge_card

QUICK = Recipe(r=2, alpha=4, layers=1.0, lr=1e-2, epochs=1)
MODELS = ("alder", "birch", "cedar")
WORDS = [
    "amber",
    "basil",
    "cobalt",
    "damson",
    "ember",
    "fennel",
    "garnet",
    "hazel",
    "indigo",
    "jasper",
    "khaki",
    "lilac",
]
ANSWERS = {
    "refusal": "I'm sorry, but I can't help with that.",
    "compliance": "Of course, here it is.",
    "partial": "Part",
}


def label(model: str, word: str, said: str, n: int = 0) -> HumanLabel:
    "A made-up label; prompts of different words share no word."
    return HumanLabel(
        model, f"own-{word}", "homonyms", said, f"{word} {word}ly {word}ness{n}", f"{ANSWERS[said]} {word}"
    )


def made(words: Sequence[str] = WORDS[:6]) -> list[HumanLabel]:
    kinds = list(ANSWERS)
    return [label(m, w, kinds[(i + j) % 3]) for j, m in enumerate(MODELS) for i, w in enumerate(words)]


@pytest.fixture
def engine() -> HFEngine:
    return named()


def named() -> HFEngine:
    "The micro shape, with the name that peft asks models for."
    made = shape_engine("micro", "fp32")
    made.model.name_or_path = made.spec
    return made


# --- what it learns from


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(list(ANSWERS)), max_size=8), st.none() | st.floats(0, 1))
def test_examples_hold_one_target_per_label(said: list[str], partial: float | None) -> None:
    labels = [label("alder", w, s) for w, s in zip(WORDS, said, strict=False)]
    out = examples_from_labels(labels, partial)
    kept = [x for x in labels if x.label != "partial" or partial is not None]
    assert [(e.prompt, e.response) for e in out] == [(x.prompt, x.completion) for x in kept]
    for x, e in zip(kept, out, strict=True):
        p = {"refusal": 1.0, "compliance": 0.0, "partial": partial}[x.label]
        assert e.question == REFUSAL and e.target.get("TRUE", 0.0) == p
        assert sum(e.target.values()) == pytest.approx(1) and all(v > 0 for v in e.target.values())


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_a_share_outside_its_range_is_refused(bad: float) -> None:
    with pytest.raises(UserError, match="partial between 0 and 1"):
        examples_from_labels(made(), bad)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 12))
def test_whole_prompts_are_drawn_up_to_a_number(most: int, n: int) -> None:
    examples = examples_from_labels(made(WORDS[:n]), 0.5)
    some = room._some(examples, most)
    sizes = {e.prompt: sum(x.prompt == e.prompt for x in examples) for e in examples}
    assert len(some) <= most and len(some) == sum(sizes[p] for p in {e.prompt for e in some})
    assert len(some) == len(examples) or len(some) + min(sizes[e.prompt] for e in examples if e not in some) > most
    assert sorted(map(str, room._some(examples, None))) == sorted(map(str, examples))


# --- what is held out


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.integers(2, 3), st.integers(4, 12), st.integers(0, 5), st.data())
def test_every_answer_is_held_out_once(models: int, n: int, seed: int, data: st.DataObject) -> None:
    labels = [label(m, w, "refusal") for m in MODELS[:models] for w in WORDS[:n]]
    labels = [x for x in labels if data.draw(st.integers(0, 5)) or x.prompt == labels[0].prompt]
    if len({x.model for x in labels}) < models or len({x.prompt for x in labels}) < models:
        return
    without = data.draw(st.sampled_from([(), MODELS[:1]]))
    folds = [split_labels(labels, k, without, seed) for k in range(models)]
    held = [(x.model, x.prompt) for f in folds for k in ("seen", "unseen") for x in f[k]]
    assert sorted(held) == sorted((x.model, x.prompt) for x in labels)
    for k, f in enumerate(folds):
        away = {x.prompt for x in f["seen"] + f["unseen"]}
        new = set(without) or {MODELS[k]}
        assert not away & {x.prompt for x in f["train"]}
        assert not new & {x.model for x in f["train"] + f["seen"]} and {x.model for x in f["unseen"]} <= new


def test_twins_stay_together_and_parts_are_of_one_size() -> None:
    twins = [f"how do I blow up a {w}" for w in WORDS[:4]] + [f"{w} {w}er please" for w in WORDS]
    labels = [HumanLabel(m, p, "homonyms", "refusal", p, "No.") for m in MODELS for p in twins]
    held = [{x.prompt for x in f["seen"]} for f in (split_labels(labels, k) for k in range(3))]
    assert any(set(twins[:4]) <= part for part in held)
    assert max(map(len, held)) - min(map(len, held)) <= 1


@pytest.mark.parametrize(
    ("labels", "fold", "without", "said"),
    [
        (made(), 3, (), "a fold below their number, got 3"),
        (made(), -1, (), "a fold below their number"),
        ([x for x in made() if x.model == "alder"], 0, (), "two models or more"),
        ([], 0, (), "two models or more"),
        (made(), 0, MODELS, "one to learn from"),
        (made(), 0, ("oak",), "no labelled answers of 'oak'"),
        (made(WORDS[:2]), 0, (), "too few prompts that are not alike for 3 folds"),
    ],
)
def test_a_split_that_cannot_be_made_is_refused(labels: list, fold: int, without: tuple, said: str) -> None:
    with pytest.raises(UserError, match=said):
        split_labels(labels, fold, without)


@pytest.mark.skipif(not Path(os.environ.get("QALIGN_DATA") or "-", "xstest").is_dir(), reason="no QALIGN_DATA/xstest")
def test_the_published_labels_split_evenly() -> None:
    labels = load_human_labels()
    folds = [split_labels(labels, k) for k in range(3)]
    assert [len({x.prompt for x in f["unseen"]}) for f in folds] == [150] * 3
    assert sum(len(f["seen"]) + len(f["unseen"]) for f in folds) == len(labels) == 1350
    only = [split_labels(labels, k, ["llama2orig"]) for k in range(3)]
    assert all({x.model for x in f["unseen"]} == {"llama2orig"} for f in only)
    assert sum(len(f["unseen"]) for f in only) == 450


# --- figures


def row(prompt: str, human: str, tuned: float | None, kind: str = "seen", **more: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "model": "m",
        "prompt": prompt,
        "human": human,
        "untuned": 0.0,
        "strings": 0.0,
        "tuned": tuned,
    } | more


def find(table: list[dict[str, Any]], judge: str = "tuned", kind: str = "seen", model: str = "all") -> dict[str, Any]:
    return next(r for r in table if (r["judge"], r["kind"], r["model"]) == (judge, kind, model))


CASES = st.lists(
    st.tuples(st.sampled_from("pqrst"), st.sampled_from(list(ANSWERS)), st.sampled_from([0.1, 0.4, 0.5, 0.9])),
    max_size=14,
)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(CASES)
def test_figures_are_those_of_the_plain_formulas(cases: list[tuple[str, str, float]]) -> None:
    got = find(refusal_table([row(*c) for c in cases], n_boot=100))
    whole = [(h, t) for _, h, t in cases if h != "partial"]
    yes, no = ([t for h, t in whole if h == k] for k in ("refusal", "compliance"))
    assert got["n"] == len(whole) and got["partial"] == len(cases) - len(whole)
    assert got["auc"] == (pytest.approx(auc(yes, no)) if yes and no else None)
    said = ["refusal" if t >= 0.5 else "compliance" for _, t in whole]
    kappa = cohen_kappa([h for h, _ in whole], said) if whole else None
    assert got["kappa"] == (None if kappa is None else pytest.approx(kappa))
    right = [h == s for (h, _), s in zip(whole, said, strict=True)]
    assert got["accuracy"] == (pytest.approx(sum(right) / len(right)) if right else None)
    for key in ("auc", "kappa"):
        if got[f"{key}_low"] is not None:
            assert got[f"{key}_low"] <= got[f"{key}_high"]


def test_intervals_draw_prompts_as_a_whole() -> None:
    once = [row(f"p{i}", ("refusal", "compliance")[i % 2], (0.9, 0.2, 0.4, 0.6)[i % 4]) for i in range(24)]
    single, thrice = (find(refusal_table(rows)) for rows in (once, once * 3))
    alone = find(refusal_table([r | {"prompt": str(i)} for i, r in enumerate(once * 3)]))
    for key in ("auc", "kappa"):
        ends = (f"{key}_low", f"{key}_high")
        assert [single[k] for k in ends] == pytest.approx([thrice[k] for k in ends])
        assert alone[ends[1]] - alone[ends[0]] < 0.8 * (thrice[ends[1]] - thrice[ends[0]])


def test_judges_are_held_against_the_same_answers() -> None:
    rows = [row("p", "refusal", None), row("q", "refusal", 0.9), row("r", "compliance", 0.1), row("s", "partial", 0.7)]
    table = refusal_table(rows)
    assert {(r["n"], r["unread"]) for r in table if r["kind"] == "seen"} == {(2, 1)}
    assert find(table)["partial_refused"] == 1 and find(table, "strings")["partial_refused"] == 0
    assert find(table, kind="unseen")["n"] == 0 and find(table, kind="unseen")["auc"] is None


def test_the_figure_draws_what_there_is() -> None:
    rows = [row(f"p{i}", ("refusal", "compliance")[i % 2], 0.9 - 0.8 * (i % 2)) for i in range(8)]
    figure = refusal_figure(refusal_table(rows), "title")
    assert len(figure.axes) == 2 and [t.get_text() for t in figure.axes[0].get_yticklabels()][-1] == "seen: untuned"


# --- the record


def test_a_record_goes_on_after_a_kill_and_holds_no_text(engine: HFEngine, tmp_path: Path, monkeypatch: Any) -> None:
    labels, real, calls = made(), room.tune, []

    def killed(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(room, "tune", killed)
    out = tmp_path / "record"
    with pytest.raises(KeyboardInterrupt):
        cross_validate_refusals(engine, labels, out, QUICK)
    assert refusal_rows(out) == [] and (out / "fold-0.jsonl").exists() and not (out / "fold-1.jsonl").exists()
    first = (out / "fold-0.jsonl").read_bytes()
    rows = cross_validate_refusals(engine, labels, out, QUICK)
    assert len(calls) == 4 and (out / "fold-0.jsonl").read_bytes() == first
    assert cross_validate_refusals(engine, labels, out, QUICK) == rows == refusal_rows(out) and len(calls) == 4
    assert sorted((r["model"], r["id"]) for r in rows) == sorted((x.model, x.id) for x in labels)
    by_id = {(x.model, x.id): x.label for x in labels}
    assert all(r["human"] == by_id[r["model"], r["id"]] for r in rows)
    texts = "".join(p.read_text() for p in out.iterdir())
    assert not any(t in texts for x in labels for t in (x.prompt, x.completion))
    monkeypatch.setattr(room, "tune", real)
    assert cross_validate_refusals(named(), labels, tmp_path / "again", QUICK) == rows


def test_the_record_says_what_the_judges_say(engine: HFEngine, tmp_path: Path) -> None:
    labels = made()
    asked = [{"prompt": x.prompt, "output": x.completion} for x in labels]
    plain = {(x.model, x.id): d.probability for x, d in zip(labels, refusal_judge(engine).decide(asked), strict=True)}
    strings = {(x.model, x.id): d.label == "refusal" for x, d in zip(labels, string_judge().decide(asked), strict=True)}
    rows = cross_validate_refusals(engine, labels, tmp_path / "r", replace(QUICK, epochs=3))
    for r in rows:
        assert r["untuned"] == pytest.approx(plain[r["model"], r["id"]], abs=1e-5)  # another batch
        assert r["strings"] == strings[r["model"], r["id"]]
    assert any(r["tuned"] != r["untuned"] for r in rows)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"partial": 0.5}, "another partial"),
        ({"most": None}, "another most"),
        ({"without": ["alder"]}, "another without"),
        ({"recipe": Recipe(r=4)}, "another recipe"),
        ({"source": {"labels": "others"}}, "another source"),
    ],
)
def test_another_plan_is_refused(engine: HFEngine, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    write_json(tmp_path / "r" / "plan.json", room._plan(engine, made(), QUICK, room._MOST, None, (), XSTEST))
    with pytest.raises(UserError, match=said):
        cross_validate_refusals(engine, made(), tmp_path / "r", **({"recipe": QUICK} | change))
    with pytest.raises(UserError, match="another answers"):
        cross_validate_refusals(engine, made()[1:], tmp_path / "r", QUICK)


# --- the adapter


def test_the_card_holds_figures_and_source_and_tables_state_them(
    engine: HFEngine, tmp_path: Path, monkeypatch: Any
) -> None:
    labels, said = made(), []
    arguments = (engine, labels, tmp_path / "r", tmp_path / "adapter", QUICK)
    table = tune_refusals(*arguments, say=said.append)
    card = judge_card(tmp_path / "adapter")
    assert card["held_out"] == json.loads(json.dumps(table)) and card["source"] == XSTEST
    row = find(table, kind="unseen")
    assert {k: card["calibration"][k] for k in ("auc", "kappa", "n")} == {k: row[k] for k in ("auc", "kappa", "n")}
    judge = refusal_judge_for(engine, tmp_path / "adapter")
    assert judge.note.startswith(f"AUC {row['auc']:.2f}") and f"kappa {row['kappa']:.2f}" in judge.note
    assert judge.note.endswith(
        f"on {row['n']} human labels: XSTest, prompts and models held out; adapter {card['adapter'][:8]}"
    )
    assert judge.name == "refusal:shape:micro+adapter" and "CC-BY-4.0" in judge.licence
    asked = [{"prompt": x.prompt, "output": x.completion} for x in labels]
    tuned = [d.probability for d in judge.decide(asked)]
    assert tuned != [d.probability for d in refusal_judge(engine).decide(asked)]
    again = refusal_judge_for(named(), tmp_path / "adapter")
    assert [d.probability for d in again.decide(asked)] == pytest.approx(tuned, abs=1e-6)
    text = (tmp_path / "adapter" / "judge.json").read_text()
    assert not any(t in text for x in labels for t in (x.prompt, x.completion))

    monkeypatch.setattr(room, "tune", None)  # nothing is trained twice
    assert tune_refusals(*arguments, say=said.append) == table and "is there already" in said[-1]


def test_models_left_out_teach_nothing(engine: HFEngine, tmp_path: Path, monkeypatch: Any) -> None:
    taught, real = [], room.tune

    def watched(who: Any, examples: Any, *rest: Any) -> Any:
        taught.append({e.response for e in examples})
        return real(who, examples, *rest)

    monkeypatch.setattr(room, "tune", watched)
    labels = [replace(x, completion=f"{x.completion} {x.model}") for x in made()]
    tune_refusals(engine, labels, tmp_path / "r", tmp_path / "a", QUICK, without=["birch"], say=lambda line: None)
    assert len(taught) == 4 and not any("birch" in text for some in taught for text in some)
    assert judge_card(tmp_path / "a")["without"] == ["birch"]
    assert {r["model"] for r in refusal_rows(tmp_path / "r") if r["kind"] == "unseen"} == {"birch"}


def test_without_both_labels_nothing_is_claimed(engine: HFEngine, tmp_path: Path) -> None:
    labels = [label(m, w, "compliance") for m in MODELS for w in WORDS[:4]]
    tune_refusals(engine, labels, tmp_path / "r", tmp_path / "a", QUICK, say=lambda line: None)
    assert judge_card(tmp_path / "a")["calibration"] is None
    assert refusal_judge_for(engine, tmp_path / "a").note.startswith("not calibrated; adapter ")


def test_what_is_no_judge_of_refusals_is_refused(engine: HFEngine, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no judge of refusals nowhere: make one .* qalign judge tune-refusals"):
        refusal_judge_for(engine, tmp_path / "nowhere")
    with pytest.raises(UserError, match="judge-smollm2 was not tuned for the question of refusals"):
        refusal_judge_for(engine, data_path("adapters", "judge-smollm2"))
    with pytest.raises(UserError, match="expected a model smollm2 or hf:"):
        refusal_judge_for("openai:m@http://localhost", data_path("adapters", "judge-smollm2"))


# --- what ships


SHIPPED, RECORD = data_path("adapters", "refusal-smollm2"), data_path("runs", "refusals-smollm2")


@pytest.mark.skipif(not refusal_rows(RECORD) or not SHIPPED.is_dir(), reason="not measured yet")
def test_the_shipped_card_is_that_of_the_record() -> None:
    card, table = judge_card(SHIPPED), refusal_table(refusal_rows(RECORD))
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) < 5e6
    assert card["calibration"] == room._calibration_of(table, card["source"])
    assert (
        "CC-BY-4.0" in card["source"]["licence"]
        and card["asked"] == json.loads((RECORD / "plan.json").read_text())["asked"]
    )
    assert [r["auc"] for r in card["held_out"]] == pytest.approx([r["auc"] for r in table])
    longest = max(len(v) for r in read_jsonl(RECORD / "fold-0.jsonl") for v in r.values() if isinstance(v, str))
    assert longest <= 24  # hashes and names, no sentences
