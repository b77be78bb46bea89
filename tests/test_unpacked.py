"""4-bit and 16-bit layers on a CPU: unpacked once, and in fp32 where the CPU has no bf16 arithmetic."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

import qalign.engine as room
from qalign.engine import unpacked

IDS = torch.arange(40).view(2, 20)


@pytest.fixture(params=[True, False], ids=["emulated", "native"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(room, "bf16_emulated", lambda: request.param)
    return request.param


def small() -> Any:
    "A model with biases, not 0, in bf16."
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).bfloat16().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return model


@pytest.fixture
def packed(tmp_path: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    small().save_pretrained(tmp_path)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return Qwen2ForCausalLM.from_pretrained(tmp_path, quantization_config=four, dtype=torch.bfloat16).eval()


def adapted(model: Any, dtype: Any) -> Any:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.1 * p.data.to(dtype)
    return model


def gradients(model: Any) -> Any:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS).logits.float().logsumexp(-1).mean().backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.requires_grad])


def test_biases_of_4_bit_layers_count(packed: Any, emulated: bool) -> None:
    with torch.no_grad():
        before = packed(IDS).logits
        with unpacked(packed):
            once = packed(IDS).logits
        for name, p in packed.named_parameters():
            if name.endswith("bias"):
                p.zero_()
        changed = packed(IDS).logits
    assert once.dtype == before.dtype
    off, without = ((x - before).float().abs().mean() for x in (once, changed))
    assert 20 * off < without if emulated else off == 0 < without


def test_a_16_bit_model_gives_what_bf16_gives(emulated: bool) -> None:
    model = small()
    with torch.no_grad():
        before, exact = model(IDS).logits, small().float()(IDS).logits
        with unpacked(model):
            once = model(IDS).logits
            assert any("forward" in vars(m) for m in model.modules()) is emulated
    assert once.dtype == torch.bfloat16
    assert (once - exact).abs().mean() < 1.5 * (before - exact).abs().mean()  # no more rounding than bf16's own
    assert not any("forward" in vars(m) for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("four_bit", [True, False])
def test_gradients_of_an_adapter(packed: Any, emulated: bool, four_bit: bool, adapter: Any) -> None:
    model = adapted(packed if four_bit else small(), adapter)
    before = gradients(model)
    with unpacked(model), unpacked(model):  # may be nested
        once = gradients(model)
    assert before.norm() > 0
    assert torch.cosine_similarity(once, before, dim=0) > 0.999
    assert 0.98 < once.norm() / before.norm() < 1.02
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


def test_an_adapter_that_moves_is_followed(emulated: bool) -> None:
    "Widened weights are a copy: only what is frozen may be one."
    model = adapted(small(), torch.float32)
    with unpacked(model):
        first = gradients(model)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.mul_(3)
        assert not torch.allclose(gradients(model), first)


def test_a_model_trained_whole_keeps_its_gradients(emulated: bool) -> None:
    model = small()
    before = gradients(model)
    with unpacked(model):
        once = gradients(model)
    assert torch.cosine_similarity(once, before, dim=0) > 0.999


def test_fp32_is_left_alone(emulated: bool) -> None:
    model = small().float()
    with torch.no_grad(), unpacked(model):
        assert not any("forward" in vars(m) for m in model.modules())
