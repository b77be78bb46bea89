"""The bench: an honest baseline, a record that goes on where it was, a table that invents nothing."""

import functools
import json
import math
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from qalign import bench
from qalign.bench import (
    ROWS,
    bench_figure,
    bench_judge,
    bench_memory,
    bench_pairs,
    bench_scaling,
    bench_table,
    matmul_peak,
    per_question,
    run_bench,
    shape_engine,
)
from qalign.core import UserError, read_jsonl
from qalign.engine import HFEngine, Usage
from qalign.judge import LABELS, SYSTEM, judge_lead, judge_prefix, judge_suffix
from qalign.rubric import Rubric, load_rubric, select

RUBRIC = load_rubric("hhh")
TINY = select(RUBRIC, dimensions=[p.dimensions[0].name for p in RUBRIC.principles])
FEW = (*TINY.gates[:2], *TINY.graded[:3])


@pytest.fixture(scope="module")
def engine() -> HFEngine:
    return shape_engine("micro", "fp32")


@pytest.fixture(scope="module")
def pairs(engine: HFEngine) -> list[tuple[str, str]]:
    return bench_pairs(engine.tokenizer, 3, 40, 80)


@pytest.fixture(scope="module")
def record(engine: HFEngine, pairs: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench") / "run"
    bench_judge(engine, TINY, pairs, folder, repeats=1, sizes=(4,))
    bench_scaling(engine, TINY, folder, counts=(1, 4), lengths=(40, 80), at=40, few=4, repeats=1)
    return json.loads((folder / "bench.json").read_text())


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "matplotlib", "pandas")
    code = f"import sys, qalign.bench; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(("n", "low", "high"), [(12, 100, 600), (1, 2000, 2000), (5, 10, 11)])
def test_pairs_have_the_lengths_asked_for(engine: HFEngine, n: int, low: int, high: int) -> None:
    some = bench_pairs(engine.tokenizer, n, low, high)
    lengths = [len(engine.tokens([(r, False)])) for _, r in some]
    assert some == bench_pairs(engine.tokenizer, n, low, high) and len(set(some)) == n
    for i, length in enumerate(lengths):
        assert abs(length - (low + (high - low) * i / max(1, n - 1))) <= 3


def _one_by_one(engine: HFEngine, pair: tuple[str, str], q: Any) -> dict[str, float]:
    "The slowest way: one plain forward per label, no padding, no cache, all logits."
    head, tail = engine.frame(SYSTEM)
    start = engine.tokens(judge_prefix(head, *pair)) + engine.tokens([(judge_suffix(tail, q), True)])
    logps = {}
    for label in LABELS[q.kind]:
        ids = engine.tokens([(label, True)])
        with torch.no_grad():
            logits = engine.model(input_ids=torch.tensor([start + ids])).logits[0].log_softmax(-1)
        logps[label] = sum(float(logits[len(start) - 1 + k, t]) for k, t in enumerate(ids))
    total = math.log(sum(math.exp(x) for x in logps.values()))
    return {k: x - total for k, x in logps.items()}


@pytest.fixture(scope="module")
def slowest(engine: HFEngine, pairs: list[tuple[str, str]]) -> dict[str, dict[str, float]]:
    return {q.id: _one_by_one(engine, pairs[1], q) for q in FEW}


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_baseline_is_exact(engine: HFEngine, pairs: list[tuple[str, str]], slowest: Any, batch: int) -> None:
    answers, tokens, padding = per_question(engine, pairs[1], FEW, batch)
    assert set(answers) == set(slowest) and padding >= 0
    for q, logps in slowest.items():
        assert all(abs(math.log(answers[q][k]) - logp) < 1e-4 for k, logp in logps.items())
    assert tokens == per_question(engine, pairs[1], FEW, 2)[1]
    assert batch > 1 or padding == 0


def test_baseline_leaves_an_adapter_off_and_training_alone(pairs: list[tuple[str, str]], slowest: Any) -> None:
    judge = shape_engine("micro", "fp32")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    judge.model, judge.adapter = get_peft_model(judge.model, config).train(), False
    answers, _, _ = per_question(judge, pairs[1], FEW)
    for q, logps in slowest.items():
        assert all(abs(math.log(answers[q][k]) - logp) < 1e-4 for k, logp in logps.items())
    judge.adapter = True
    on, _, _ = per_question(judge, pairs[1], FEW)
    assert on != answers and on == per_question(judge, pairs[1], FEW)[0] and judge.model.training


def test_baseline_computes_no_logits_it_does_not_read(engine: HFEngine, pairs: list[tuple[str, str]]) -> None:
    seen = []
    layer = engine.model.get_output_embeddings()
    handle = layer.register_forward_hook(lambda m, i, o: seen.append(o.shape[0] * o.shape[1]))
    try:
        per_question(engine, pairs[0], TINY.graded, 4)
    finally:
        handle.remove()
    assert sum(seen) == len(TINY.graded)
    assert not layer._forward_pre_hooks


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=50), st.integers(1, 12))
def test_batches_hold_every_sequence_once(lengths: list[tuple[int, bool]], size: int) -> None:
    trees = [bench.LabelTree(("a", "b"), ((1,), (2,))), bench.LabelTree(("a", "c"), ((1,), (3,)))]
    sequences = [bench._Sequence(str(i), [0] * n, trees[kind]) for i, (n, kind) in enumerate(lengths)]
    batches = list(bench._batched(sequences, size))
    assert sorted(s.question for b in batches for s in b) == sorted(s.question for s in sequences)
    assert all(len(b) <= size and len({s.tree for s in b}) == 1 for b in batches)
    for kind in trees:
        sizes = [len(b) for b in batches if b[0].tree == kind]
        assert not sizes or max(sizes) - min(sizes) <= 1


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_spread_is_even(n: int, k: int) -> None:
    k = min(n, k)
    some = bench._spread(n, k)
    assert len(set(some)) == k and some[0] >= 0 and some[-1] < n
    assert abs(sum(some) / k - (n - 1) / 2) <= 0.5


def test_rows_agree_with_the_baseline(record: dict[str, Any]) -> None:
    table = dict(zip(ROWS, bench_table(record), strict=True))
    for name in ("one_pass", "gates_first"):
        assert table[name]["same_label"] == 1 and table[name]["difference"] < 1e-4
    assert (table["per_question"]["ratio"], table["per_question"]["reached"]) == pytest.approx((1, 1))
    assert not table["vllm"]["measured"] and table["vllm"]["seconds"] is None
    assert table["one_pass"]["limit"] > 1
    n = 3 * len(TINY.questions)
    assert table["one_pass"]["asked"] == table["rubric_first"]["asked"] == n
    assert record["rows"]["one_pass"]["compared"] == n


def test_rubric_first_is_timed_with_its_questions_read(engine: HFEngine, pairs: Any, record: dict[str, Any]) -> None:
    head, tail = engine.frame(SYSTEM)
    leads = [engine.tokens([(judge_lead(q), True)]) for q in TINY.questions]
    row = record["rows"]["rubric_first"]
    assert (
        row["once_tokens"] == len(engine.tokens([(head, True)])) + sum(map(len, leads))
        and len(row["once_seconds"]) == 1
    )
    own = sum(len(engine.tokens([*judge_prefix("", *pair), (tail, True)])) - 1 for pair in pairs)
    labels = sum(4 if q.kind == "gate" else 1 for q in TINY.questions)  # the last token of the header, and T, F, FAL
    assert row["tokens"] <= own + 3 * labels < row["beside_tokens"]  # less what prompts share
    table = dict(zip(ROWS, bench_table(record), strict=True))
    assert (
        table["rubric_first"]["once_seconds"] == row["once_seconds"][0] > 0
        and table["one_pass"]["once_seconds"] is None
    )


def test_record_names_no_host_and_no_path(record: dict[str, Any]) -> None:
    import platform

    text = json.dumps(record)
    assert platform.node() not in text or len(platform.node()) < 4
    assert "/home" not in text and "/work" not in text and "/tmp" not in text


def test_a_stopped_run_goes_on(engine: HFEngine, pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    bench_judge(engine, TINY, pairs, tmp_path / "a", rows=["per_question"], repeats=1, sizes=(2,))
    path = tmp_path / "a" / "baseline.jsonl"
    whole = list(read_jsonl(path))
    path.write_text("".join(json.dumps(r) + "\n" for r in whole[:2]) + '{"response": 2, "bat')  # killed while writing
    record = json.loads((tmp_path / "a" / "bench.json").read_text())
    del record["rows"]["per_question"]
    (tmp_path / "a" / "bench.json").write_text(json.dumps(record))
    bench_judge(engine, TINY, pairs, tmp_path / "a", rows=["per_question"], repeats=1, sizes=(8, 16))
    after = list(read_jsonl(path))
    assert [r["response"] for r in after] == [0, 1, 2] and after[:2] == whole[:2]
    assert [r["batch"] for r in after] == [2, 2, 2] and after[2]["logps"] == whole[2]["logps"]


def test_another_plan_is_refused(engine: HFEngine, pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    bench_judge(engine, TINY, pairs, tmp_path / "a", rows=["one_pass"], repeats=1)
    for changed in ({"pairs": pairs[:2]}, {"chunk": 3}, {"rubric": select(TINY, dimensions=[TINY.dimensions[0].name])}):
        with pytest.raises(UserError, match="with another"):
            bench_judge(engine, **{"rubric": TINY, "pairs": pairs, "out": tmp_path / "a", **changed})
    table = bench_table(json.loads((tmp_path / "a" / "bench.json").read_text()))
    assert table[1]["measured"] and table[1]["ratio"] is None and table[1]["same_label"] is None


def test_part_of_the_responses(engine: HFEngine, pairs: list[tuple[str, str]], tmp_path: Path) -> None:
    table = bench_judge(engine, TINY, pairs, tmp_path / "a", repeats=2, baseline_responses=1, sizes=(4,))
    assert table[0]["responses"] == 1 and table[1]["responses"] == 3
    record = json.loads((tmp_path / "a" / "bench.json").read_text())
    assert (
        record["rows"]["one_pass"]["compared"] == len(TINY.questions)
        and len(record["rows"]["one_pass"]["seconds"]) == 2
    )


class Stub:
    "Every gate FALSE, every grade A; an engine that stands for vLLM."

    spec, tokens_read, usage = "vllm:stub", [], Usage()

    def __init__(self) -> None:
        self.llm, self.resets = self, 0

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def frame(self, system: str) -> tuple[str, str]:
        return "", ""

    def label_probs(
        self, prefixes: Sequence[Any], suffixes: Any, labels: Any, chunk: int = 12, after: Any = None
    ) -> list[Any]:
        self.tokens_read = [7] * len(prefixes)
        best = [{k: float(k in ("FALSE", "A")) for k in ls} for ls in labels]
        return [[None if after[i] else p for i, p in enumerate(best)] for _ in prefixes]


def test_settled_counts_what_a_failed_gate_makes_pointless(pairs: list[tuple[str, str]]) -> None:
    row, cards = bench._judged(Stub(), Stub(), TINY, pairs, "gates_first", 1, 12, print)
    assert row["asked"] == 3 * len(TINY.gates) and row["settled"] == 3 * len(TINY.questions)
    assert row["tokens"] == 21 and len(cards) == 3
    row, _ = bench._judged(Stub(), Stub(), TINY, pairs, "one_pass", 1, 12, print)
    assert row["asked"] == row["settled"] == 3 * len(TINY.questions)


def test_vllm_starts_each_run_with_an_empty_cache(pairs: list[tuple[str, str]]) -> None:
    stub = Stub()
    row, _ = bench._judged(stub, Stub(), TINY, pairs, "vllm", 3, 12, print)
    assert stub.resets == 4 and len(row["seconds"]) == len(row["beside"]) == 3
    assert row["tokens"] == row["beside_tokens"] == 21


def test_bad_input_is_one_line(engine: HFEngine, tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    for call, match in (
        (lambda: bench_judge(engine, TINY, pairs, tmp_path, rows=["vllm"]), "no row 'vllm'"),
        (lambda: bench_judge(engine, TINY, pairs, tmp_path, rows=["fast"]), "no row 'fast'"),
        (lambda: bench_figure({"rows": {}}), "no scaling"),
        (lambda: run_bench("openai:x@http://localhost", out=tmp_path), "a server's speed"),
        (lambda: run_bench("smollm2", parts=["speed"], out=tmp_path), "got 'speed'"),
        (lambda: shape_engine("giant"), "expected a shape"),
        (lambda: bench_scaling(engine, TINY, tmp_path, (1,), (20,), 20, 1, repeats=1), "holds no bench.json"),
        (lambda: bench_memory("shape:giant", "fp32"), "not measured: .*expected a shape"),
    ):
        with pytest.raises(UserError, match=match) as e:
            call()
        assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_figure_draws_both_curves(record: dict[str, Any]) -> None:
    axes = bench_figure(record).axes
    assert [len(a.lines) for a in axes] == [2, 2]
    kept = {(p["vary"], p["row"], p["questions"], p["length"]) for p in record["scaling"]["points"]}
    assert ("questions", "one_pass", 4, 40) in kept and ("length", "per_question", 4, 80) in kept


def test_peak_counts_operations() -> None:
    assert 1e6 < matmul_peak(size=128) < 1e16
    engine = shape_engine("micro", "fp32")
    per_layer = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3
    assert bench._linear_size(engine.model) == 2 * per_layer


def test_cache_size_is_that_of_the_tensors(engine: HFEngine) -> None:
    with torch.no_grad():
        cache = engine.model(input_ids=torch.arange(10)[None], use_cache=True).past_key_values
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    assert held == 10 * bench._cache_size(engine.model)


def test_a_model_that_also_sees_is_measured_by_its_text_part() -> None:
    from transformers import AutoModelForCausalLM, Gemma3Config

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {**sizes, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    config = Gemma3Config(text_config=words, vision_config={**sizes, "image_size": 28, "patch_size": 14})
    model = AutoModelForCausalLM.from_config(config).eval()
    assert bench._linear_size(model) == 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3)
    assert bench._cache_size(model) == 2 * 2 * 2 * 8 * 4


def test_nf4_shape_has_four_bit_layers(pairs: list[tuple[str, str]]) -> None:
    pytest.importorskip("bitsandbytes")
    full, four = shape_engine("micro", "none"), shape_engine("micro", "nf4")
    assert (bench._precision(full), bench._precision(four)) == ("bfloat16", "nf4")
    assert bench._linear_size(full.model) == bench._linear_size(four.model)
    answers, _, _ = per_question(four, pairs[0], TINY.questions[:2], 2)
    assert all(abs(sum(p.values()) - 1) < 1e-6 for p in answers.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux")
def test_memory_sees_what_judging_takes() -> None:
    row = bench_memory("shape:micro", "fp32", tokens=300)
    assert row["questions"] == len(RUBRIC.questions) and row["peak_one"] > row["rest"] > 0
    assert row["work_all"] > 0 and row["cache"] > 300 * 2 * 2 * 2 * 16 * 4


def test_whole_run_adds_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small_rubric(name: str = "hhh") -> Rubric:
        return TINY

    monkeypatch.setattr(bench, "load_rubric", small_rubric)
    said: list[str] = []
    record = run_bench("shape:micro", "fp32", tmp_path / "r", 2, 1, 1, parts=("judge",), say=said.append)
    assert set(record["rows"]) == set(ROWS) - {"vllm"} and any("fastest of" in s for s in said)
    before = len(said)
    assert run_bench("shape:micro", "fp32", tmp_path / "r", 2, 1, 1, parts=("judge",), say=said.append) == record
    assert len(said) == before


def test_baseline_is_exact_without_sdpa(pairs: list[tuple[str, str]]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    made = shape_engine("micro", "fp32")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": made.model.config.vocab_size}
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma2", pad_token_id=0, initializer_range=0.3, **shape)
    made.model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    answers, _, _ = per_question(made, pairs[0], FEW, 2)
    for q in FEW:
        logps = {k: math.log(p) for k, p in answers[q.id].items()}
        assert logps == pytest.approx(_one_by_one(made, pairs[0], q), abs=1e-4)


@pytest.mark.parametrize("emulated", [True, False])
def test_the_peak_is_that_of_the_precision_computed_in(monkeypatch: pytest.MonkeyPatch, emulated: bool) -> None:
    monkeypatch.setattr(bench, "bf16_emulated", lambda: emulated)
    assert bench._compute(shape_engine("micro", "none")) == ("float32" if emulated else "bfloat16")
    assert bench._compute(shape_engine("micro", "fp32")) == "float32"


@pytest.mark.parametrize(("spec", "weights"), [("vllm:smollm2", "smollm2"), ("vllm:ORG/MODEL", "hf:ORG/MODEL")])
def test_vllm_is_held_against_its_own_weights(
    engine: HFEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, weights: str
) -> None:
    loaded, asked = [], []

    class VLLM:
        tokenizer, spec = engine.tokenizer, "vllm"

    def load(spec: str, quantization: str) -> Any:
        loaded.append(spec)
        return VLLM() if spec.startswith("vllm:") else engine

    monkeypatch.setattr(bench, "_load", load)
    monkeypatch.setattr(bench, "_plan", lambda *a: {})
    monkeypatch.setattr(bench, "bench_judge", lambda *a, **more: asked.append(more["yardstick"]))
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "bench.json").write_text(json.dumps({"plan": {}, "rows": {}}))
    run_bench(spec, "fp32", tmp_path / "r", 1)
    assert loaded == [spec, weights] and asked == [engine]


def test_the_model_is_gone_before_memory_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = []

    def measure(*args: Any, **more: Any) -> dict[str, float]:
        alive.append(model() is not None)
        return {"ratio": 1.0, "work_ratio": 1.0}

    def load(spec: str, quantization: str, chat: bool = True) -> HFEngine:
        nonlocal model
        made = shape_engine("micro", quantization)
        model = weakref.ref(made.model)
        return made

    model: Any = None
    monkeypatch.setattr(bench, "bench_memory", measure)
    monkeypatch.setattr(bench, "load_engine", functools.lru_cache(load))
    run_bench("smollm2", "fp32", tmp_path / "r", 1, parts=("memory",))
    assert alive == [False]
