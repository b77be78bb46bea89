"Capability: the harness's definitions kept, its numbers equal to its own, nothing lost in a kill."

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from qalign import capability as room
from qalign.bench import shape_engine
from qalign.benchmarks import load_benchmark
from qalign.capability import (
    CAPABILITY,
    Setup,
    _difference,
    capability_cells,
    compare_capability,
    load_capability,
    load_policy,
    run_capability,
    same_as_harness,
)
from qalign.core import UserError, read_jsonl, write_jsonl
from qalign.engine import HFEngine
from qalign.stats import mcnemar, rate_difference
from qalign.trace import answer_of, render_trace

HYPO = settings(derandomize=True, max_examples=60, deadline=None)
QUICK = Setup(tokens=8)


def choice(n: int, letters: str, key: str, **more: str) -> dict[str, Any]:
    choices = [{"text": f"thing {x} {n}", "label": x} for x in letters]
    return {"id": f"q{n}", "question": {"stem": f"Which is number {n}?", "choices": choices, **more}, "answerKey": key}


def sums(first: int, n: int) -> list[dict[str, str]]:
    return [
        {"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(first, first + n)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for name, rows in {
        "arc_challenge/ARC-Challenge-Test.jsonl": [choice(n, "ABCD", "ABCD"[n % 4]) for n in range(5)]
        + [choice(5, "1234", "3"), choice(6, "ABC", "B")],
        "arc_challenge/ARC-Challenge-Dev.jsonl": [choice(100 + n, "ABCD", "A") for n in range(4)],
        "gsm8k/test.jsonl": sums(1, 4),
        "gsm8k/train.jsonl": sums(50, 8),
        "commonsense_qa/dev_rand_split.jsonl": [choice(n, "ABCDE", "E", question_concept="c") for n in range(3)],
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_jsonl(folder / name, rows)
    return folder


@pytest.fixture(scope="module")
def engine() -> HFEngine:
    return shape_engine("micro", "fp32")


def adapted(engine: HFEngine, seed: int = 1) -> HFEngine:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return HFEngine(get_peft_model(engine.model, config), engine.tokenizer, "adapted")


def on_disk(folder: Path, adapter: bool, quantization: str = "fp32") -> tuple[HFEngine, str, Path | None]:
    engine, spec, path = (
        shape_engine("micro", "fp32"),
        f"hf:{folder / 'model'}",
        folder / "adapter" if adapter else None,
    )
    engine.model.save_pretrained(folder / "model")
    engine.tokenizer.save_pretrained(folder / "model")
    if path:
        adapted(engine).model.save_pretrained(path)
    return load_policy(spec, quantization, path), spec, path


@pytest.fixture(scope="module")
def record(
    engine: HFEngine, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict], list[str]]:
    out, said = tmp_path_factory.mktemp("out"), []
    return (
        out,
        run_capability(engine, out=out, name="a/b c", setup=QUICK, source=data, rows="any", say=said.append),
        said,
    )


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "lm_eval", "datasets", "pandas")
    code = f"import sys, qalign.capability; assert not {heavy!r} & sys.modules.keys()".replace("('", "{'").replace(
        "')", "'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit": 0},
        {"limit": 2.0},
        {"limit": True},
        {"shots": -1},
        {"tokens": 0},
        {"batch": 0},
        {"batch": None},
        {"scored": "draft"},
    ],
)
def test_setup_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"expected {next(iter(wrong))}"):
        Setup(**wrong)


def test_what_cannot_be_had_is_one_line(
    engine: HFEngine, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QALIGN_DATA", raising=False)
    monkeypatch.setattr(room, "load_policy", lambda *a: pytest.fail("the model is loaded before the rows"))
    cases: list[tuple[str, dict[str, Any]]] = [
        ("unknown set mmlu", {"sets": ["mmlu"], "source": data}),
        ("unknown set", {"sets": [], "source": data}),
        ("cannot be loaded", {"sets": ["commonsense_qa"]}),
        ("7 rows, 1172 are published", {"sets": ["arc_challenge"], "source": data}),
        ("no dev_rand_split.jsonl in", {"sets": ["commonsense_qa"], "source": tmp_path}),
    ]
    for message, given_ in cases:
        with pytest.raises(UserError, match=message) as e:
            run_capability("smollm2", out=tmp_path / "out", **given_)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_used(engine: HFEngine, data: Path, tmp_path: Path) -> None:
    class Server:
        spec = "openai:x@http://localhost"

    def run(model: Any, setup: Setup) -> None:
        run_capability(model, ["arc_challenge"], tmp_path, "m", setup, data, "any")

    with pytest.raises(UserError, match="needs a model in this process"):
        run(Server(), Setup())
    with pytest.raises(UserError, match="reads 8192 tokens, 9000 are to be generated"):
        run(engine, Setup(tokens=9000))
    bare = HFEngine(engine.model, type("T", (), {"chat_template": None})(), "bare")
    with pytest.raises(UserError, match="bare has no chat template"):
        run(bare, Setup(chat=True))
    with pytest.raises(UserError, match=r"holds no adapter_config\.json"):
        load_policy("smollm2", "fp32", tmp_path)


# --- rows and task


def test_rows_have_the_columns_of_the_public_id(data: Path) -> None:
    arc = [room._choice_row(i) for i in load_benchmark("arc_challenge", data, rows="any")]
    assert arc[5] == {
        "id": "q5",
        "question": "Which is number 5?",
        "choices": {"text": [f"thing {x} 5" for x in "1234"], "label": list("1234")},
        "answerKey": "3",
    }
    gsm = [room._worked_row(i) for i in load_benchmark("gsm8k", data, rows="any")]
    assert gsm == sums(1, 4)
    five = [room._five_row(i) for i in load_benchmark("commonsense_qa", data, rows="any")]
    assert set(five[0]) == {"id", "question", "choices", "answerKey", "question_concept"}


@pytest.mark.parametrize("letters", ["ABCD", "12345", "ABCDEF"])
def test_choices_the_prompt_does_not_name_are_refused(letters: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "dev_rand_split.jsonl", [choice(1, letters, letters[0], question_concept="c")])
    with pytest.raises(UserError, match="q1: expected the choices A to E"):
        room._load("commonsense_qa", Setup(), 0, tmp_path, "any", print)


def test_worked_examples_come_from_other_parts_or_are_missed_aloud(data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    full = room._load("gsm8k", Setup(), 5, data, "any", said.append)
    assert (full.part, len(full.pool), full.record["shots"], said) == ("train", 8, 5, [])
    arc = room._load("arc_challenge", Setup(shots=3), 0, data, "any", said.append)
    assert (arc.part, len(arc.pool)) == ("validation", 4)
    assert not {i.id for i in arc.pool} & {i.id for i in arc.items}
    with pytest.raises(UserError, match="4 rows in validation, more than 4 are needed"):
        room._load("arc_challenge", Setup(shots=4), 0, data, "any", said.append)
    assert said == []
    write_jsonl(tmp_path / "test.jsonl", sums(1, 2))
    none = room._load("gsm8k", Setup(), 5, tmp_path, "any", said.append)
    assert (none.pool, none.record["shots"], none.record["shots_from"]) == ([], 0, "")
    assert none.record["shots_missing"] == "5 asked for by the harness"
    assert len(said) == 1
    assert "no worked examples instead of 5" in said[0]
    asked = room._load("gsm8k", Setup(shots=0), 5, tmp_path, "any", said.append)
    assert (asked.record["shots_missing"], len(said)) == ("", 1)


def test_the_harness_definition_is_kept(data: Path) -> None:
    manager = room._manager(CAPABILITY)
    for name in CAPABILITY:
        config = manager.task_index[name].cfg
        rows = room._load(name, Setup(), config.get("num_fewshot") or 0, data, "any", print)
        task = room._task(config, rows)
        ours = {"dataset_path", "dataset_name", "custom_dataset", "num_fewshot", *room._PARTS}
        assert {k: v for k, v in task.items() if k not in ours} == {k: v for k, v in config.items() if k not in ours}
        assert task["num_fewshot"] == (config.get("num_fewshot") or 0)
        built = manager.load([task])["tasks"][name]
        assert len(built.eval_docs) == len(rows.items)
        assert dict(built.eval_docs[0]) == room._SETS[name].row(rows.items[0])


# --- reading


@HYPO
@given(st.text())
def test_an_extraction_holds_a_digit(text: str) -> None:
    found = room._extracted(text)
    assert found == (text if any(c.isdecimal() for c in text) else None)


@HYPO
@given(st.text(), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_the_answer_ends_before_every_stop_word(text: str, until: list[str]) -> None:
    answer = room._answer(text, until)
    assert answer_of(text).startswith(answer)
    assert not any(word in answer for word in until)
    assert room._answer(text, []) == answer_of(text)


# --- a run


def test_a_run_is_recorded(record: tuple[Path, list[dict], list[str]], data: Path) -> None:
    out, rows, said = record
    assert [(r["set"], r["metric"]) for r in rows] == [
        ("arc_challenge", "acc"),
        ("arc_challenge", "acc_norm"),
        ("gsm8k", "exact_match/strict-match"),
        ("gsm8k", "exact_match/flexible-extract"),
        ("commonsense_qa", "acc"),
    ]
    assert sorted(p.name for p in (out / "a-b-c").iterdir()) == sorted(
        f"{s}.{x}" for s in CAPABILITY for x in ("json", "jsonl")
    )
    for r in rows:
        lines = list(read_jsonl(out / "a-b-c" / f"{r['set']}.jsonl"))
        assert [s["id"] for s in lines] == [i.id for i in load_benchmark(r["set"], data, rows="any")]
        right = [s["correct"][r["metric"]] for s in lines]
        assert r["estimate"] == pytest.approx(np.mean(right))
        assert r["stderr"] == pytest.approx(np.std(right, ddof=1) / len(right) ** 0.5)
        assert 0 <= r["low"] <= r["estimate"] <= r["high"] <= 1
        assert (r["n"], r["cut_prompts"], r["no_answer"]) == (len(lines), 0, None)
        if r["set"] == "gsm8k":
            assert r["extraction_failed"] == sum(s["extracted"][r["metric"]] is None for s in lines)
            assert r["settings"]["shots"] == 5
            assert r["settings"]["tokens"] == 8
        else:
            assert r["extraction_failed"] is None
            assert (r["settings"]["tokens"], r["settings"]["scored"]) == (None, None)
    assert str(data) not in json.dumps(rows)  # no path of this machine
    assert "Which is number" not in (out / "a-b-c" / "arc_challenge.jsonl").read_text()  # no published text
    assert any("gsm8k: 4 of 4 requests" in line for line in said)
    assert sum("set " in line for line in said) == 3
    assert load_capability(out) == sorted(rows, key=lambda r: r["set"])
    assert {len(line) for line in capability_cells(rows)} == {8}


def test_the_chosen_letter_is_the_most_probable(record: tuple[Path, list[dict], list[str]]) -> None:
    for s in read_jsonl(record[0] / "a-b-c" / "arc_challenge.jsonl"):
        best = max(s["loglikelihoods"], key=lambda letter: s["loglikelihoods"][letter])
        assert (best == s["target"]) == s["correct"]["acc"]


def test_a_kill_costs_the_set_in_flight(
    engine: HFEngine, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = room._evaluate

    def spy(engine: Any, manager: Any, rows: Any, *more: Any) -> Any:
        asked.append(rows.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(engine, manager, rows, *more)

    monkeypatch.setattr(room, "_evaluate", spy)
    sets = ("arc_challenge", "commonsense_qa")
    with pytest.raises(KeyboardInterrupt):
        run_capability(engine, sets, tmp_path, "m", Setup(), data, "any")
    assert [p.name for p in tmp_path.glob("m/*.json")] == ["arc_challenge.json"]
    rows = run_capability(engine, sets, tmp_path, "m", Setup(), data, "any")
    assert asked == ["arc_challenge", "commonsense_qa", "commonsense_qa"]
    (tmp_path / "m" / "commonsense_qa.json").unlink()  # killed between the lines and the rows
    assert run_capability(engine, sets, tmp_path, "m", Setup(), data, "any") == rows
    assert asked[3:] == ["commonsense_qa"]


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("limit", {"setup": Setup(limit=1)}),
        ("chat", {"setup": Setup(chat=True)}),
        ("batch", {"setup": Setup(batch=2)}),
        ("shots", {"setup": Setup(shots=1)}),
        ("rows", {"source": "fewer"}),
        ("weights", {"model": "adapted"}),
    ],
)
def test_nothing_is_gone_on_with_across_a_difference(
    key: str, changed: dict[str, Any], engine: HFEngine, data: Path, tmp_path: Path
) -> None:
    given_: dict[str, Any] = {"model": engine, "sets": ["arc_challenge"], "source": data, "rows": "any", "name": "m"}
    run_capability(out=tmp_path / "out", **given_)
    before = (tmp_path / "out" / "m" / "arc_challenge.json").read_text()
    if changed.get("source"):
        write_jsonl(tmp_path / "ARC-Challenge-Test.jsonl", [choice(1, "ABCD", "A")])
        changed = {"source": tmp_path}
    if changed.get("model"):
        changed = {"model": adapted(shape_engine("micro", "fp32"))}
    with pytest.raises(UserError, match=f"was done with {key} = .* give another folder or name"):
        run_capability(out=tmp_path / "out", **{**given_, **changed})
    assert (tmp_path / "out" / "m" / "arc_challenge.json").read_text() == before


def test_an_evaluation_leaves_no_trace(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    engine = adapted(shape_engine("micro", "fp32"))
    engine.model.train()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    modes = [(m.training, [p.requires_grad for p in m.parameters()]) for m in engine.model.modules()]
    padding, weights = engine.tokenizer.padding_side, engine.identity()
    run_capability(engine, CAPABILITY, tmp_path, "m", QUICK, data, "any")
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert modes == [(m.training, [p.requires_grad for p in m.parameters()]) for m in engine.model.modules()]
    assert (padding, weights) == (engine.tokenizer.padding_side, engine.identity())
    seen = capfd.readouterr()
    assert (seen.out, seen.err) == ("", "")


def test_adapters_count_and_can_be_switched_off(engine: HFEngine, data: Path, tmp_path: Path) -> None:
    policy = adapted(shape_engine("micro", "fp32"))
    for name, model in {"start": engine, "policy": policy, "off": policy.base()}.items():
        run_capability(model, ["arc_challenge"], tmp_path, name, Setup(), data, "any")
    start, trained, off = (
        [s["loglikelihoods"] for s in read_jsonl(tmp_path / name / "arc_challenge.jsonl")]
        for name in ("start", "policy", "off")
    )
    assert start == off
    assert start != trained


def test_four_bit_weights_with_an_adapter(data: Path, tmp_path: Path) -> None:
    policy, spec, adapter = on_disk(tmp_path, True, "nf4")
    rows = run_capability(policy, ["arc_challenge", "gsm8k"], tmp_path / "out", "m", QUICK, data, "any")
    assert rows[0]["settings"]["weights"]["precision"] == "nf4"
    run_capability(policy.base(), ["arc_challenge"], tmp_path / "out", "b", QUICK, data, "any")
    lines = [list(read_jsonl(tmp_path / "out" / name / "arc_challenge.jsonl")) for name in "mb"]
    assert [s["loglikelihoods"] for s in lines[0]] != [s["loglikelihoods"] for s in lines[1]]
    with pytest.raises(UserError, match="cannot load nf4 weights as trained"):
        same_as_harness(tmp_path / "out", "m", spec, adapter, source=data)


def test_an_adapter_folder_is_loaded_onto_the_weights(tmp_path: Path) -> None:
    policy = adapted(shape_engine("micro", "fp32"))
    base = tmp_path / "base"
    shape_engine("micro", "fp32").model.save_pretrained(base)
    policy.tokenizer.save_pretrained(base)
    policy.model.save_pretrained(tmp_path / "adapter")
    loaded = load_policy(f"hf:{base}", "fp32", tmp_path / "adapter")
    assert loaded.identity()["adapter"] == room.HFEngine(policy.model, policy.tokenizer).identity()["adapter"]
    with pytest.raises(UserError, match="adapter does not fit its base"):
        load_policy("smollm2", "fp32", tmp_path / "adapter")


# --- transcripts


def test_a_transcript_is_scored_as_a_user_sees_it(
    engine: HFEngine, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    written = [
        render_trace("Question: no.\n#### 9", "Wrong.", "1 + 1 = 2\n#### 2\n\nQuestion: What is 9 + 9?"),
        render_trace("#### 3", "Worse.", "It is #### 4"),
        "#### 4\n<think>\nIs it",
        "#### 5",
    ]
    stops: list[Any] = []

    def generate(self: Any, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        stops.extend(r.args[1]["until"] for r in requests)
        return list(written)

    monkeypatch.setattr(HFLM, "generate_until", generate)
    seen = {}
    for scored in ("answer", "output"):
        stops.clear()
        rows = run_capability(engine, ["gsm8k"], tmp_path, scored, Setup(scored=scored), data, "any")
        assert all((s == []) == (scored == "answer") for s in stops)
        lines = list(read_jsonl(tmp_path / scored / "gsm8k.jsonl"))
        assert [s["output"] for s in lines] == written
        seen[scored] = [[s["correct"][f"exact_match/{f}"] for s in lines] for f in ("strict-match", "flexible-extract")]
        assert rows[0]["settings"]["scored"] == scored
        assert rows[0]["no_answer"] == (1 if scored == "answer" else None)
        assert [r["extraction_failed"] for r in rows] == ([1, 1] if scored == "answer" else [0, 0])
    assert seen["answer"] == [[True, False, False, True], [True, False, False, True]]
    assert seen["output"] == [[False, True, True, True], [False, False, True, True]]
    problems = [s["problem"] for s in read_jsonl(tmp_path / "answer" / "gsm8k.jsonl")]
    assert problems == ["", "", "unclosed", "no_reflection"]
    with pytest.raises(UserError, match="the harness scores whole outputs"):
        same_as_harness(tmp_path, "answer", sets=["gsm8k"], source=data)


# --- two models


def test_a_change_of_nothing_has_a_width() -> None:
    same, moved = ([True, False] * 10, [True, False] * 10), ([True] * 8 + [False] * 2, [False] + [True] * 8 + [False])
    for left, right in (same, moved):
        told, d, m = _difference(left, right), rate_difference(left, right), mcnemar(left, right)
        assert (told["low"], told["high"], told["p"], told["only_a"]) == (d.low, d.high, m.p, m.only_a)
        assert told["difference"] == pytest.approx(d.estimate) and told["low"] < d.estimate < told["high"]
    assert [_difference([True], [False])[k] for k in ("difference", "low", "high", "n")] == [-1, None, None, 1]


def test_pairs_are_compared_as_stats_does(
    record: tuple[Path, list[dict], list[str]], data: Path, tmp_path: Path
) -> None:
    policy = adapted(shape_engine("micro", "fp32"), seed=3)
    for name, model in {"a": policy.base(), "b": policy}.items():
        run_capability(model, ["arc_challenge", "commonsense_qa"], tmp_path, name, Setup(), data, "any")
    told = compare_capability(tmp_path, "a", "b")
    assert [(t["set"], t["metric"]) for t in told] == [
        ("arc_challenge", "acc"),
        ("arc_challenge", "acc_norm"),
        ("commonsense_qa", "acc"),
    ]
    for t in told:
        left, right = (
            [s["correct"][t["metric"]] for s in read_jsonl(tmp_path / m / f"{t['set']}.jsonl")] for m in ("a", "b")
        )
        d, m = rate_difference(left, right), mcnemar(left, right)
        assert (t["low"], t["high"], t["p"]) == (d.low, d.high, m.p)
        assert t["difference"] == pytest.approx(d.estimate)
        assert (t["only_a"], t["only_b"], t["n"]) == (m.only_a, m.only_b, len(left))
        assert t["p"] <= t["p_holm"] <= 1
    with pytest.raises(UserError, match="holds no set of both a and c: it has a, b"):
        compare_capability(tmp_path, "a", "c")
    run_capability(policy, ["arc_challenge"], tmp_path, "c", Setup(limit=3), data, "any")
    with pytest.raises(UserError, match="a and c differ in limit"):
        compare_capability(tmp_path, "a", "c")
    with pytest.raises(UserError, match="no capability results in"):
        load_capability(tmp_path / "none")
    (tmp_path / "b" / "arc_challenge.jsonl").unlink()
    with pytest.raises(UserError, match=r"^no .*b/arc_challenge\.jsonl for the results of b: copy the lines as well"):
        compare_capability(tmp_path, "a", "b")


# --- the harness itself


def held_against(sets: list[str], setup: Setup, adapter: bool, data: Path, folder: Path) -> list[dict[str, Any]]:
    engine, spec, path = on_disk(folder, adapter)
    run_capability(engine, sets, folder / "out", "m", setup, data, "any")
    return same_as_harness(folder / "out", "m", spec, path, sets, data)


@pytest.mark.parametrize(
    ("sets", "setup", "adapter"),
    [
        (["arc_challenge"], Setup(batch=3), True),
        (["gsm8k"], Setup(tokens=24, limit=3), False),
        pytest.param(["arc_challenge", "gsm8k"], Setup(chat=True, tokens=16), True, marks=pytest.mark.slow),
        pytest.param(["arc_challenge", "commonsense_qa"], Setup(shots=2), False, marks=pytest.mark.slow),
    ],
)
def test_equal_to_the_command_line(
    sets: list[str], setup: Setup, adapter: bool, data: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if setup.shots:  # CommonsenseQA needs a training part for examples
        more = tmp_path_factory.mktemp("more")
        for file in data.rglob("*.jsonl"):
            (more / file.name).write_text(file.read_text())
        write_jsonl(
            more / "train_rand_split.jsonl", [choice(200 + n, "ABCDE", "B", question_concept="c") for n in range(5)]
        )
        data = more
    told = held_against(sets, setup, adapter, data, tmp_path)
    assert {t["set"] for t in told} == set(sets)
    assert all(t["equal"] and t["lines that differ"] == 0 for t in told), told
