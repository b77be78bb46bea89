"""The memory planner: exact where it counts, monotonic, honest advice, a dry step without traces."""

import dataclasses
import json
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from transformers import BitsAndBytesConfig, DynamicCache, GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen2Config

from qalign.core import Settings, UserError, load_settings
from qalign.engine import quiet
from qalign.grpo import micro_batch
from qalign.memory import _GB as GB
from qalign.memory import (
    CARDS,
    KNOWN,
    Plan,
    advise,
    count_weights,
    dry_step,
    model_config,
    peak_bytes,
    plan,
    plan_figure,
)
from qalign.memory import _micro as micro
from qalign.memory import _nf4_bytes as nf4_bytes
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
STEP = load_settings("tiny", prompt_tokens=32, completion_tokens=48, generate_batch=0)
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
    "group_size": (2, 4, 6),
    "judge_chunk": (1, 4, 12),
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
        plan(STEP, SMALL, generate_batch=v, judge_rows=r) for v, r in ((min(b, c), rows), (max(b, c), rows + more))
    )
    assert all(low.peaks[phase] <= high.peaks[phase] for phase in low.peaks)


def test_checkpointing_and_8_bit_states_save_memory() -> None:
    big = STEP.replace(completion_tokens=400)
    on, off = (plan(big, SMALL, checkpointing=c).peaks["backward"] for c in (True, False))
    assert on < off
    full, paged = (plan(STEP, "Llama-3.2-1B", optimizer=o) for o in ("adamw_torch", "paged_adamw_8bit"))
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


def test_advice_is_no_more_than_needed() -> None:
    p = plan(load_settings("gpu24"), generate_batch=0)
    assert advise(p, 80).changes == ()
    assert [c[0] for c in advise(p, 24).changes] == ["generate_batch"]
    assert [c[0] for c in advise(p, 16).changes] == ["generate_batch", "eval_tokens"]
    never = advise(plan(STEP, SMALL), 0.5)
    assert not never.fits and "does not fit" in str(never)


def test_group_size_is_the_last_resort() -> None:
    for gb in (16, 24):
        assert "group_size" not in [c[0] for c in advise(plan(load_settings("gpu80")), gb).changes]


def test_who_writes_decides_what_a_card_must_hold() -> None:
    gpu = load_settings("gpu24")
    own, served, other = (plan(gpu.replace(rollout=r)) for r in ("hf", "vllm", "openai:m@http://localhost:9/v1"))
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
        ({"generate_batch": -1}, "expected generate_batch to be a whole number of 0 or more, got -1"),
        ({"generate_batch": 1.5}, "expected generate_batch"),
        ({"judge_rows": 0}, "expected judge_rows to be a whole number of 1 or more, got 0"),
        ({"checkpointing": "yes"}, "expected checkpointing to be True or False, got 'yes'"),
        ({"optimizer": "sgd"}, "expected optimizer to be adamw_torch or paged_adamw_8bit"),
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


def test_dry_step_says_when_memory_does_not_suffice() -> None:
    class Full(LlamaForCausalLM):
        def get_output_embeddings(self) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    model = Full(SMALL)
    with pytest.raises(UserError) as e:
        dry_step(model, STEP)
    assert "out of memory at the worst step, 6 x 80 tokens" in str(e.value) and "\n" not in str(e.value)


def test_settings_survive() -> None:
    p = plan(STEP, SMALL)
    assert isinstance(p.settings, Settings) and json.dumps(p.options)
