"""The memory planner: exact where it counts, monotonic, honest advice, a dry step without traces."""

import dataclasses
import inspect
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
)

from qalign import memory
from qalign.core import Settings, UserError, load_settings, write_json, write_jsonl
from qalign.engine import HFEngine, embedded_model, quiet
from qalign.grpo import micro_batch
from qalign.judge import _REASONED, SYSTEM, judge_prefix, judge_suffix, reply_schema
from qalign.memory import _GB as GB
from qalign.memory import (
    CARDS,
    KNOWN,
    Plan,
    advise,
    count_weights,
    dry_step,
    model_config,
    new_peak,
    peak_bytes,
    plan,
    plan_beside,
    plan_figure,
)
from qalign.memory import _micro as micro
from qalign.memory import _nf4_bytes as nf4_bytes
from qalign.memory import _value as value
from qalign.rubric import load_rubric
from qalign.sft import add_adapter

SMALL = LlamaConfig(
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1000,
    max_position_embeddings=2048,
)
STEP = load_settings("tiny", judge="self", prompt_tokens=32, completion_tokens=48, generate_batch=0)
# Published parameter counts.
SIZES = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "SmolLM2-135M": 134_515_008,
}


@pytest.mark.parametrize("name", KNOWN)
def test_published_sizes(name: str) -> None:
    assert count_weights(model_config(name)).parameters == pytest.approx(SIZES[name], rel=1e-3)


def test_names() -> None:
    fine_tune = model_config("hf:Orenguteng/Llama-3.1-8B-Lexi-Uncensored-V2")
    assert count_weights(fine_tune).parameters == SIZES["Llama-3.1-8B"]
    assert model_config("smollm2").num_hidden_layers == 30
    assert plan(load_settings("gpu24")).notes == ("its shape is that of Llama-3.1-8B, by its name",)
    assert plan(STEP, "Llama-3.2-1B").notes == ()


def test_config_from_a_folder() -> None:
    with tempfile.TemporaryDirectory() as folder:
        SMALL.save_pretrained(folder)
        p = plan(STEP, folder)
    assert p.peaks == plan(STEP, SMALL).peaks


def _load_nf4(config: Any, kind: Any = LlamaForCausalLM) -> Any:
    quiet()
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with tempfile.TemporaryDirectory() as folder:
        kind(config).bfloat16().save_pretrained(folder)
        return kind.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16)


@pytest.mark.parametrize("odd", [{}, {"intermediate_size": 328, "tie_word_embeddings": True}])
def test_nf4_bytes_are_those_of_bitsandbytes(odd: dict[str, Any]) -> None:
    config = LlamaConfig(**{**SMALL.to_dict(), **odd})
    model, w = _load_nf4(config), count_weights(config)
    four_bit = [m.weight for m in model.modules() if type(m).__name__ == "Linear4bit"]
    states = [(p, p.quant_state) for p in four_bit]
    tensors = [t for p, q in states for t in (p, q.absmax, q.state2.absmax, q.offset, q.code)]
    assert w.nf4 == sum(t.numel() * t.element_size() for t in tensors)
    other = {id(p): p for p in model.parameters() if not any(p is f for f in four_bit)}
    assert 2 * w.plain == sum(p.numel() * p.element_size() for p in other.values())


@given(st.integers(1, 10_000_000))
@examples(derandomize=True, max_examples=50, deadline=None)
def test_nf4_is_a_little_over_half_a_byte(n: int) -> None:
    total = sum(nf4_bytes(n).values())
    assert n / 2 < total <= n / 2 + n / 64 + n / 4096 + 80


def test_adapter_size_is_that_of_peft() -> None:
    model = add_adapter(LlamaForCausalLM(SMALL), STEP)
    real = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_weights(SMALL).lora(STEP.lora_r) == real


def _bytes(p: Plan, phase: str, term: str) -> int:
    return next(t.bytes for t in p.terms[phase] if t.name == term)


def test_cache_size_is_that_of_real_tensors() -> None:
    cache, rows = DynamicCache(), STEP.prompts_per_step * STEP.group_size
    model = LlamaForCausalLM(SMALL).bfloat16()
    with torch.no_grad():
        model(input_ids=torch.zeros(rows, 80, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
    real = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert _bytes(plan(STEP, SMALL), "decode", "key-value cache") == real


def test_optimizer_state_is_that_of_adamw() -> None:
    model = add_adapter(LlamaForCausalLM(SMALL), STEP)
    some = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(some)
    for p in some:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = [t for s in optimizer.state.values() for k, t in s.items() if k.startswith("exp_avg")]
    assert _bytes(plan(STEP, SMALL), "save", "optimizer state") == sum(t.numel() * t.element_size() for t in moments)


GROWS = {
    "micro_batch": (1, 2, 4, 12),
    "completion_tokens": (16, 33, 64, 150),
    "prompt_tokens": (16, 31, 64, 90),
    "lora_r": (2, 8, 16, 64),
    "group_size": (4, 8, 12),  # a micro-batch of 4 divides them all
    "judge_chunk": (1, 4, 12),
    "draft_tokens": (8, 40, 200),
    "revision_tokens": (8, 40, 200),
    "candidates": (1, 3),
    "sft_batch": (1, 4, 8),
}


@given(st.sampled_from(sorted(GROWS)), st.sampled_from(["none", "nf4"]), st.booleans(), st.data())
@examples(derandomize=True, max_examples=24, deadline=None)
def test_more_needs_no_less(key: str, quantization: str, checkpointing: bool, data: Any) -> None:
    low, high = sorted(data.draw(st.tuples(*[st.sampled_from(GROWS[key])] * 2)))
    base = STEP.replace(quantization=quantization, micro_batch=4)
    a, b = (plan(base.replace(**{key: v}), SMALL, checkpointing=checkpointing).peaks for v in (low, high))
    assert all(a[phase] <= b[phase] for phase in a), (key, low, high)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8), st.integers(1, 8))
@examples(derandomize=True, max_examples=10, deadline=None)
def test_smaller_batches_need_no_more(b: int, c: int, rows: int, more: int) -> None:
    low, high = (
        plan(STEP.replace(judge_rows=r), SMALL, generate_batch=v)
        for v, r in ((min(b, c), rows), (max(b, c), rows + more))
    )
    assert all(low.peaks[phase] <= high.peaks[phase] for phase in low.peaks)


def test_checkpointing_and_8_bit_states_save_memory() -> None:
    big = STEP.replace(completion_tokens=400)
    on, off = (plan(big, SMALL, checkpointing=c).peaks["backward"] for c in (True, False))
    assert on < off
    full, paged = (plan(STEP.replace(optimizer=o), "Llama-3.2-1B") for o in ("adamw_torch", "paged_adamw_8bit"))
    ratio = _bytes(paged, "save", "optimizer state") / _bytes(full, "save", "optimizer state")
    assert 0.25 < ratio < 0.28  # one byte and a share of the scales for four


def test_phases_follow_the_settings() -> None:
    assert "log-probs" not in plan(STEP.replace(kl=0), SMALL).peaks
    assert "log-probs" in plan(STEP.replace(kl=0, num_iterations=2), SMALL).peaks
    other = plan(STEP.replace(judge="hf:other"), SMALL)
    assert "judge" not in other.peaks and "second model" in other.notes[-1]
    one, two = plan(STEP, SMALL), plan(STEP.replace(steps_per_generation=2), SMALL)
    assert _bytes(two, "decode", "key-value cache") == 2 * _bytes(one, "decode", "key-value cache")


def test_an_evaluation_is_counted_at_its_longest_answers() -> None:
    gpu = load_settings("gpu24", eval_tokens=2048, prompt_tokens=512)
    p = plan(gpu)
    assert _bytes(p, "evaluate", "key-value cache") == 32 * (512 + 2048) * 32 * 2 * 2 * 8 * 128
    assert {t.name for t in p.terms["evaluate"]} & {"optimizer state", "reference adapter"} == set()
    few = plan(gpu.replace(eval_harmful=4, eval_benign=2))
    assert 8 * _bytes(few, "evaluate", "key-value cache") == _bytes(p, "evaluate", "key-value cache")
    assert plan(gpu.replace(eval_tokens=256)).peaks["evaluate"] < p.peaks["evaluate"]
    assert 4 * _bytes(plan(gpu, generate_batch=8), "evaluate", "key-value cache") == 32 * 2560 * 32 * 2 * 2 * 8 * 128
    assert plan(gpu, generate_batch=0).peaks["evaluate"] == p.peaks["evaluate"]  # 32 at most


def test_records_are_counted_like_an_evaluation() -> None:
    gpu = load_settings("gpu24", prompt_tokens=512, draft_tokens=512, reflection_tokens=128, records_at_once=32)

    def peak(phase: str = "records", **changes: Any) -> int:
        terms = plan(gpu.replace(**changes)).terms[phase]
        return sum(t.bytes for t in terms if t.name in ("key-value cache", "working set"))

    drafts = {"reflection_writer": "template", "revision_writer": "template", "draft_tokens": 2048}
    assert peak(**drafts) == peak("evaluate", eval_tokens=2048)
    asked = {"prompt_tokens": 512 + 512 + 128 + 128, "eval_tokens": gpu.revision_tokens}  # the request for a revision
    for writer in ("continue", "model", gpu.model):
        assert peak(reflection_writer="template", revision_writer=writer) == peak("evaluate", **asked)
    longer = {"prompt_tokens": 512 + 512 + 288, "eval_tokens": 128}  # the request for a reflection, with its notes
    assert peak() == peak("evaluate", **longer)
    half, few = {"records_at_once": 16}, {"records_at_once": 16, "generate_batch": 8}
    assert peak(**few, candidates=9) == peak(**few) < peak(**half) < peak(**half, candidates=2) < peak()
    assert "the writer hf:other of records is a second model" in plan(gpu.replace(revision_writer="hf:other")).notes[-1]


def test_a_tuned_judge_brings_its_adapter() -> None:
    own, tuned = (plan(load_settings("gpu24", judge=judge)) for judge in ("self", "tuned"))
    size = _bytes(own, "judge", "adapter")
    assert size == _bytes(tuned, "judge", "adapter") > 0
    for phase in own.terms.keys() - {"load"}:
        there = sum(t.bytes for t in tuned.terms[phase] if t.name == "judge's adapter")
        assert there == size and not [t for t in own.terms[phase] if t.name == "judge's adapter"]
        if phase != "judge":  # where its adapter is on, as well
            assert tuned.peaks[phase] - own.peaks[phase] == pytest.approx(size, rel=0.1)
    assert tuned.peaks["load"] == own.peaks["load"]


def test_a_judge_with_reasons_writes_its_replies_like_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = load_settings("gpu24", judge_mode="reasoned", generate_batch=16, prompt_tokens=512, completion_tokens=1024)

    def peak(s: Settings, phase: str = "judge") -> int:
        return sum(t.bytes for t in plan(s).terms[phase] if t.name in ("key-value cache", "working set"))

    few = peak(gpu)
    assert few == peak(gpu.replace(judge_rows=1, judge_chunk=1)) < peak(gpu.replace(judge="tuned"))
    assert few < peak(gpu.replace(generate_batch=24)) < peak(gpu.replace(generate_batch=32))
    assert peak(gpu.replace(generate_batch=32)) == peak(gpu.replace(generate_batch=0))
    text = 160 + 512 + 1024 + 56  # frame, prompt, response, question: what an evaluation reads, under an adapter
    assert peak(gpu.replace(judge="tuned")) == peak(gpu.replace(prompt_tokens=text, eval_tokens=96), "evaluate")
    assert few > 2 * peak(gpu.replace(judge_mode="direct"))
    assert "judge" not in plan(gpu.replace(judge="hf:other")).terms
    three = SimpleNamespace(questions=[SimpleNamespace(kind=k) for k in ("gate", "graded", "graded", "graded")])
    monkeypatch.setattr(memory, "rubric_for", lambda s: three)
    pair = gpu.replace(prompts_per_step=1, group_size=2, generate_batch=32)  # 2 x 2 responses, 3 replies to each
    assert peak(pair) == peak(pair.replace(generate_batch=12)) > peak(pair.replace(generate_batch=11))


@pytest.fixture(scope="module")
def flat() -> HFEngine:
    sizes = {"hidden_size": 64, "intermediate_size": 2816, "num_hidden_layers": 2, "vocab_size": 49152}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=4096)
    return HFEngine(LlamaForCausalLM(config).bfloat16().eval(), AutoTokenizer.from_pretrained(embedded_model()))


def test_the_plan_of_a_judge_with_reasons_is_what_its_engine_takes(
    flat: HFEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qalign.engine.bf16_emulated", lambda: False)
    head, tail = flat.frame(SYSTEM.replace("one label and nothing else", "one label"))
    asked = load_rubric().questions
    lengths = [len(flat.tokens([(judge_suffix(_REASONED + tail, q), True)])) for q in asked]
    assert len(flat.tokens(judge_prefix(head, "", ""))) <= memory._FRAME and max(lengths) <= memory._REASONED
    assert inspect.signature(flat.replies).parameters["max_tokens"].default == memory._REPLY
    engine = dataclasses.replace(flat, batch=3)
    prefix, some = judge_prefix(head, "Tell me about water.", "A river runs to the sea. " * 60), asked[:3]
    length = len(engine.tokens(prefix)) + max(lengths[:3])
    jobs = [(0, i) for i in range(3) if some[i].kind == some[0].kind]

    def ask() -> Any:
        return engine.replies(
            [prefix], [judge_suffix(_REASONED + tail, q) for q in some], [reply_schema(q) for q in some], jobs, 2
        )

    ask()  # imports
    got = peak_bytes(ask)[1]
    sizes = {"generate_batch": len(jobs), "prompt_tokens": 64, "completion_tokens": length - 160 - 64 - 56}
    s = STEP.replace(judge="self", judge_mode="reasoned", quantization="none", **sizes)
    p = plan(s, flat.model.config, device="cpu")
    want = sum(t.bytes for t in p.terms["judge"] if t.name in ("key-value cache", "working set"))
    assert 0.85 < want / got < 1.15


def test_sft_learns_like_grpo_without_a_reference() -> None:
    s = STEP.replace(micro_batch=2, sft_batch=4)
    p = plan(s, SMALL, device="cpu")  # where every position is scored in GRPO too
    assert p.peaks["backward"] - p.peaks["sft"] == _bytes(p, "sft", "adapter")
    assert plan(s.replace(sft_batch=3), SMALL, device="cpu").peaks["sft"] < p.peaks["sft"]  # one record at a time
    on_gpu = plan(s, SMALL)
    assert on_gpu.peaks["sft"] >= plan(s.replace(kl=0), SMALL).peaks["backward"]


@pytest.mark.parametrize("preset", ["tiny", "paper", "gpu24", "gpu48", "gpu80"])
def test_micro_batch_is_that_of_training(preset: str) -> None:
    for m in (1, 3, 5, 7, 100):
        s = load_settings(preset, micro_batch=m)
        assert micro(s) == micro_batch(s)


def test_other_models_plan_too() -> None:
    qwen = Qwen2Config(**{k: v for k, v in SMALL.to_dict().items() if k in QWEN})
    assert plan(STEP, qwen).peak > 0


QWEN = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


@pytest.mark.parametrize("gb", [0.7, 0.75, 0.8, 1.0])
def test_advice_fits_or_says_so(gb: float) -> None:
    p = plan(STEP.replace(completion_tokens=1500, prompts_per_step=8), SMALL, checkpointing=False)
    advice = advise(p, gb)
    assert advice.fits == advice.plan.fits(gb) == (advice.plan.peak <= gb * GB)
    again, options = p.settings, dict(p.options)
    for key, old, new, _ in advice.changes:
        assert old != new
        if key in options:
            options[key] = new
        else:
            again = again.replace(**{key: new})
    assert plan(again, SMALL, **options).peaks == advice.plan.peaks
    assert [c[3] for c in advice.changes][-1:] in ([], [advice.plan.peak])


KNOBS = {
    "generate_batch": (0, 3, 8, 32),
    "micro_batch": (1, 6),
    "judge_rows": (2, 8),
    "judge_mode": ("direct", "reasoned"),
    "judge_chunk": (3, 24),
    "quantization": ("none", "nf4"),
    "completion_tokens": (48, 400),
    "eval_tokens": (64, 512),
}


CARD = st.sampled_from((0.61, 0.615, 0.62, 0.63, 0.65))  # GB, 0.6 of it for the context


@given(st.fixed_dictionaries({k: st.sampled_from(v) for k, v in KNOBS.items()}), st.booleans(), CARD)
@examples(derandomize=True, max_examples=10, deadline=None)
def test_advice_names_values_of_the_plan_it_was_asked_about(chosen: dict[str, Any], c: bool, gb: float) -> None:
    p = plan(STEP.replace(judge="self", dimensions=1, **chosen), SMALL, checkpointing=c)
    advice = advise(p, gb)
    keys = [key for key, *_ in advice.changes]
    assert len(keys) == len(set(keys)) and all(old == value(p, key) != new for key, old, new, _ in advice.changes)
    changed = {key: new for key, _, new, _ in advice.changes}
    options = p.options | {k: changed.pop(k) for k in [*changed] if k in p.options}
    again = plan(p.settings.replace(**changed), SMALL, **options)
    assert (again.settings, again.options, again.terms) == (
        advice.plan.settings,
        advice.plan.options,
        advice.plan.terms,
    )


def test_a_knob_that_is_turned_twice_is_one_change() -> None:
    advice = advise(plan(load_settings("gpu24", judge_mode="direct")), 10)
    assert [c[:3] for c in advice.changes] == [("generate_batch", 32, 4), ("judge_rows", 8, 4)] and advice.fits


def test_advice_is_no_more_than_needed() -> None:
    p = plan(load_settings("gpu24"), generate_batch=0)
    assert advise(p, 80).changes == ()
    assert [c[0] for c in advise(p, 24).changes] == ["generate_batch"]
    assert [c[:3] for c in advise(p, 16).changes] == [("generate_batch", 80, 20)] and advise(p, 16).fits
    never = advise(plan(STEP, SMALL), 0.5)
    assert not never.fits and "does not fit" in str(never)


def test_group_size_is_the_last_resort() -> None:
    for gb in (16, 24):
        assert "group_size" not in [c[0] for c in advise(plan(load_settings("gpu80")), gb).changes]


def test_who_writes_decides_what_a_card_must_hold() -> None:
    gpu = load_settings("gpu24")
    own, served, other = (plan(gpu.replace(rollout=r)) for r in ("hf", "vllm", "openai:m@http://localhost:9/v1"))
    trl = plan(gpu.replace(rollout="trl"))
    assert trl.peaks["decode"] == plan(gpu, generate_batch=0).peaks["decode"] > own.peaks["decode"]
    assert {"prefill", "decode"} <= set(own.peaks) and not {"prefill", "decode"} & {*served.peaks, *other.peaks}
    assert other.peaks["backward"] == own.peaks["backward"]
    weights = count_weights(model_config("Llama-3.1-8B"))
    base = 2 * (sum(o * i for o, i in weights.linear) + weights.plain)
    for phase, ours in other.peaks.items():  # vLLM's share holds its base, the rest what is ours
        assert served.peaks[phase] == round(max(ours / 0.7, base / 0.3))


def test_views() -> None:
    p = plan(STEP, SMALL)
    assert p.peak == max(p.peaks.values()) == p.peaks[p.phase]
    frame = p.to_frame()
    assert set(frame["known"]) == {"counted", "traced", "assumed"}
    assert frame["GB"].sum() == pytest.approx(sum(p.peaks.values()) / GB, abs=0.05)
    assert p.fits(16) and "16 GB" in repr(p) and "<table>" in p._repr_html_()
    bars = plan_figure(p).axes[0].patches
    assert sum(b.get_width() for b in bars) == pytest.approx(sum(p.peaks.values()) / GB)
    assert tuple(sorted(CARDS)) == CARDS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generate_batch": -1}, "expected generate_batch between 0 and 4096, got -1"),
        ({"generate_batch": 1.5}, "expected int for generate_batch, got 1.5"),
        ({"checkpointing": "yes"}, "expected checkpointing to be True or False, got 'yes'"),
        ({"device": "tpu"}, "expected device to be cuda or cpu"),
        ({"config": "no/such"}, "no config for 'no/such': give a folder, or one of Llama-3.1-8B"),
        ({"config": GPT2Config()}, "expected a config like Llama's"),
    ],
)
def test_bad_input_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as e:
        plan(STEP, **{"config": SMALL, **options})
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("gb", [0, -1, "24", None, True, float("nan")])
def test_bad_card(gb: Any) -> None:
    with pytest.raises(UserError, match="expected the size of a card in GB"):
        plan(STEP, SMALL).fits(gb)


def test_peak_is_a_peak() -> None:
    def work() -> int:
        a = torch.zeros(1_000_000)
        b = a + 1
        del a
        return len(torch.cat([b, b]))

    out, peak = peak_bytes(work)
    assert out == 2_000_000
    assert 12_000_000 <= peak < 12_100_000


def _state(model: Any) -> Any:
    names = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")
    return [{k: v for k, v in vars(m).items() if k in names} for m in model.modules()]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_dry_step_leaves_no_trace(checkpointing: bool) -> None:
    torch.manual_seed(0)
    s = dataclasses.replace(STEP, lora_dropout=0.1)
    model = add_adapter(LlamaForCausalLM(SMALL).bfloat16(), s).eval()
    model.get_base_model().model.layers[0].train()
    weights = {n: p.clone() for n, p in model.named_parameters()}
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    modes, random = _state(model), torch.random.get_rng_state()
    step = dry_step(model, s, checkpointing)
    assert torch.equal(random, torch.random.get_rng_state()) and _state(model) == modes
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in model.parameters() if p is not first)
    assert (step.rows, step.tokens, step.device) == (6, 80, "cpu") and step.above > 0
    assert step.written == 12 and step.writing > 0
    assert all(f"{n / GB:.2f} GB" in str(step) for n in (step.above, step.writing)) and "12 are written" in str(step)


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({"generate_batch": 5}, 5),
        ({"generate_batch": 50}, 12),
        ({"steps_per_generation": 2}, 24),
        ({"rollout": "continuous", "generate_batch": 7}, 7),
        ({"rollout": "trl", "generate_batch": 5}, 12),
        ({"rollout": "openai:m@http://localhost:9/v1"}, 0),
    ],
)
def test_the_dry_step_writes_what_this_process_writes(
    changes: dict[str, Any], written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(memory, "_worst_writing", lambda model, rows, *lengths: asked.append((rows, *lengths)))
    monkeypatch.setattr(memory, "_worst_step", lambda *args: None)
    s = STEP.replace(**changes)
    step = dry_step(LlamaForCausalLM(SMALL), s)
    assert step.written == written and asked == [(written, 32, 48)] * (written > 0)
    assert ("written" in str(step)) == (written > 0)
    if written:  # as many as the plan counts the cache of
        cache = 2 * 2 * 2 * 2 * 32 * written * 80  # keys and values, bytes, layers, heads
        assert _bytes(plan(s, SMALL), "decode", "key-value cache") == cache


def test_the_dry_step_of_a_process_is_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_worst_writing", lambda *args: None)
    monkeypatch.setattr(memory, "_worst_step", lambda *args: None)
    monkeypatch.setattr(memory, "world_size", lambda: 4)
    step = dry_step(LlamaForCausalLM(SMALL), STEP)
    assert (step.rows, step.written) == (3, 3)  # of 12


def test_dry_step_and_plan_agree() -> None:
    s = STEP.replace(quantization="none", completion_tokens=200, micro_batch=12)
    model = add_adapter(LlamaForCausalLM(SMALL).bfloat16(), s)
    there = ("linear layers", "other weights", "adapter", "reference adapter", "optimizer state")
    needs = {}
    for c in (True, False):
        want = sum(
            t.bytes for t in plan(s, SMALL, checkpointing=c, device="cpu").terms["backward"] if t.name not in there
        )
        needs[c] = dry_step(model, s, c).above
        assert 0.85 < want / needs[c] < 1.15
    assert needs[True] < needs[False]


def test_writing_in_the_dry_step_and_in_the_plan_agree() -> None:
    s = STEP.replace(quantization="none", completion_tokens=500, generate_batch=9)
    writing = dry_step(add_adapter(LlamaForCausalLM(SMALL).bfloat16(), s), s).writing
    p, added = plan(s, SMALL, device="cpu"), ("key-value cache", "hidden states", "attention mask", "working set")
    want = max(sum(t.bytes for t in p.terms[k] if t.name in added) for k in ("prefill", "decode"))
    assert 0.85 < want / writing < 1.15


def test_the_dry_step_takes_other_models() -> None:
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=1000)
    step = dry_step(GPT2LMHeadModel(config).bfloat16(), STEP.replace(generate_batch=9))
    assert step.writing > 2 * 2 * 2 * 9 * 80 * 64  # keys and values, bytes, layers: the cache alone


@pytest.mark.parametrize(
    ("where", "changes", "says"),
    [
        ("_worst_writing", {}, "where 12 x 80 tokens are written at once: lower generate_batch, see `qalign plan`"),
        (
            "_worst_writing",
            {"rollout": "trl"},
            "where 12 x 80 tokens are written at once: choose rollout hf, which writes generate_batch at a time",
        ),
        ("_worst_writing", {"generate_batch": 1}, "where 1 x 80 tokens are written at once: lower completion_tokens"),
        (
            "_worst_step",
            {},
            "at the worst step, 6 x 80 tokens: lower micro_batch, see `qalign plan` (CUDA out of memory",
        ),
        ("_worst_step", {"micro_batch": 1}, "at the worst step, 1 x 80 tokens: lower completion_tokens"),
    ],
)
def test_dry_step_says_what_does_not_fit(
    where: str, changes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(memory, where, full)
    with pytest.raises(UserError) as e:
        dry_step(LlamaForCausalLM(SMALL), STEP.replace(**changes))
    assert f"out of memory {says}" in str(e.value) and "\n" not in str(e.value)


def test_peaks_are_read_and_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    assert new_peak() is None or torch.cuda.is_available()
    gpu = SimpleNamespace(most=7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: gpu.most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(gpu, "most", 2))
    assert [new_peak(), new_peak()] == [7, 2]


def _run(folder: Path, s: Settings, *rows: dict[str, Any]) -> Path:
    younger = ("judge_rows", "optimizer", "pooling")  # as an old run has it
    write_json(folder / "settings.json", {"settings": {k: v for k, v in s.to_dict().items() if k not in younger}})
    write_jsonl(folder / "timings.jsonl", rows)
    return folder


def test_a_plan_stands_beside_what_a_run_measured(tmp_path: Path) -> None:
    gpu = load_settings("gpu24")
    rows = [{"stage": "start", "seconds": 9.0, "peak": 14 * GB}, {"stage": "sft", "seconds": 1.0, "peak": 7 * GB}]
    for step, (generate, judge, train) in enumerate([(12, 8, 5), (13, 7, 6)], 1):
        for name, gb in (("generate", generate), ("judge", judge), ("train", train)):
            rows.append({"stage": f"grpo/{name}", "step": step, "seconds": 1.0, "peak": gb * GB})
    rows += [{"stage": "grpo/judge", "step": 3, "seconds": 0.0}, {"stage": "grpo/save", "step": 3, "seconds": 0.1}]
    found = plan_beside(_run(tmp_path / "run", gpu, *rows, {"stage": "grpo", "seconds": 1.0}))
    assert found.plan.peaks == plan(gpu).peaks
    measured = {stage: b // GB for stage, _, _, b in found.rows}
    assert measured == {"start": 14, "sft": 7, "grpo/generate": 13, "grpo/judge": 8, "grpo/train": 6}
    phases = {stage: (phase, a) for stage, phase, a, _ in found.rows}
    assert [phases[k][0] for k in measured] == ["evaluate", "sft", "decode", "judge", "backward"]
    for stage, (phase, a) in phases.items():
        assert a == sum(t.bytes for t in found.plan.terms[phase] if t.known != "assumed"), stage
    assert "  grpo/generate     12.9    13.0  decode" in str(found).splitlines() and str(found).startswith("run, GB")
    served = gpu.replace(rollout="openai:m@http://localhost:9/v1", judge="hf:other")
    left = plan_beside(_run(tmp_path / "served", served, *rows)).rows
    assert [stage for stage, *_ in left] == ["start", "sft", "grpo/train"]  # the plan has no such phases


def test_a_judge_outside_training_is_planned_without_the_trainer(tmp_path: Path) -> None:
    s = load_settings("gpu24", eval_tokens=8, eval_harmful=1, eval_benign=1)
    found = plan_beside(_run(tmp_path, s, {"stage": "after_grpo", "seconds": 1.0, "peak": 5}))
    [(_, phase, bytes_, _)] = found.rows
    trainer = sum(_bytes(found.plan, "judge", k) for k in ("reference adapter", "optimizer state"))
    assumed = sum(t.bytes for t in found.plan.terms["judge"] if t.known == "assumed")
    assert phase == "judge" and bytes_ == found.plan.peaks["judge"] - trainer - assumed


def test_a_run_on_a_cpu_has_no_peaks_and_a_folder_may_hold_no_run(tmp_path: Path) -> None:
    run = _run(tmp_path / "r", load_settings("tiny"), {"stage": "grpo/judge", "step": 1, "seconds": 2.0})
    assert str(plan_beside(run)) == "r holds no measured peaks: it ran on a CPU, or before they were recorded"
    (run / "timings.jsonl").unlink()
    assert plan_beside(run).rows == ()
    for text in ("{torn", "[1]", "{}"):
        (run / "settings.json").write_text(text)
        with pytest.raises(UserError, match="holds no run: give the --out of one"):
            plan_beside(run)


def test_settings_survive() -> None:
    p = plan(STEP, SMALL)
    assert isinstance(p.settings, Settings) and json.dumps(p.options)
