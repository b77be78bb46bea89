"Room rollout: completions that do not depend on the cut, what TRL gets, adapters as files, a server that misbehaves."

import contextlib
import json
import math
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from vllm_server import vllm_server

import qalign.reward as reward_room
import qalign.rollout as room
from qalign.bench import shape_engine
from qalign.core import UserError, load_settings, read_jsonl
from qalign.engine import EngineError
from qalign.grpo import train_grpo
from qalign.judge import Scorecard
from qalign.pool import pool
from qalign.prompts import Prompt
from qalign.rollout import (
    Rollout,
    Sampling,
    agreement,
    bench_rollout,
    choose_rollout,
    continuous_rollout,
    hf_rollout,
    load_lora_engine,
    nf4_loss,
    save_base,
    server_rollout,
)
from qalign.rubric import Dimension, Principle, Question, Rubric, Verdict
from qalign.sft import add_adapter
from qalign.trace import Trace

VLLM_PYTHON = Path(__file__).parent.parent / ".venv-vllm" / "bin" / "python"
CALM = hypothesis_settings(derandomize=True, max_examples=30, deadline=None)
TINY = load_settings("tiny", lora_r=4, quantization="none")
PROMPTS = [[5 + i % 3] * (3 + i % 3) + [9, 11] for i in range(7)]
EOS = tuple(range(0, 49152, 9))  # random weights end a completion now and then
SAMPLING = Sampling(0.9, 1.0, 12, EOS)


def policy(settings=TINY, scale: float = 0.1):
    engine = shape_engine("micro", "fp32")
    model = add_adapter(engine.model, settings)
    shake(model, scale)
    return model, engine.tokenizer


def shake(model, scale: float, seed: int = 3) -> None:
    "Move the adapter."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(scale * torch.randn(p.shape, generator=generator).to(p))


@pytest.fixture(scope="module")
def model():
    return policy()[0]


# ---- drawing


@CALM
@given(st.integers(0, 10_000), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0.2, 0.7, 1.0]))
def test_a_token_is_where_its_number_falls(seed, temperature, top_p):
    g = torch.Generator().manual_seed(seed)
    logits, uniform = 3 * torch.randn(6, 40, generator=g), torch.rand(6, generator=g, dtype=torch.double)
    token, said = room._draw(logits, uniform, Sampling(temperature, top_p))
    for row, t, logp, u in zip(logits, token.tolist(), said.tolist(), uniform.tolist(), strict=True):
        p = (row.double() / temperature).softmax(-1)
        order = p.argsort(descending=True)
        kept = order[: int((p[order].cumsum(-1) - p[order] < top_p).sum())]
        q = torch.zeros_like(p)
        q[kept] = p[kept] / p[kept].sum()
        mass = q.cumsum(-1)
        assert t in kept.tolist()
        assert mass[t] - q[t] - 1e-5 <= u <= mass[t] + 1e-5
        assert logp == pytest.approx(math.log(q[t]), abs=1e-4)


def test_frequencies_are_the_probabilities():
    p = torch.tensor([0.6, 0.25, 0.1, 0.05, 0.0])
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    token, _ = room._draw(p.log()[None].expand(40_000, -1), uniform, Sampling())
    share = torch.bincount(token, minlength=5) / 40_000
    assert share[4] == 0 and (share - p).abs().max() < 0.01


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_have_a_token(u):
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    token, said = room._draw(logits, torch.tensor([u], dtype=torch.double), Sampling())
    assert token.item() in (1, 2) and math.isfinite(said.item())


# ---- batches


@CALM
@given(st.integers(0, 9), st.integers(0, 5))
def test_the_cut_changes_nothing(model, batch, seed):
    whole, said = hf_rollout(0).generate(model, PROMPTS, SAMPLING, seed)
    cut, said_too = hf_rollout(batch).generate(model, PROMPTS, SAMPLING, seed)
    assert cut == whole
    assert all(
        a == pytest.approx(b, abs=1e-4) for x, y in zip(said, said_too, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_completions_end_with_their_finish_token(model):
    tokens, said = hf_rollout(3).generate(model, PROMPTS, SAMPLING, 0)
    room._check("hf", PROMPTS, tokens, said, SAMPLING)
    assert {len(x) for x in tokens} > {SAMPLING.max_tokens} and min(map(len, tokens)) < SAMPLING.max_tokens
    assert not any(t in EOS for x in tokens for t in x[:-1])
    assert tokens != hf_rollout(3).generate(model, PROMPTS, SAMPLING, 1)[0]


@pytest.mark.parametrize("path", [hf_rollout(3), continuous_rollout(3)], ids=lambda p: p.name)
def test_log_probabilities_are_the_models(model, path):
    tokens, said = path.generate(model, PROMPTS, SAMPLING, 0)
    room._check(path.name, PROMPTS, tokens, said, SAMPLING)
    found = agreement(model, PROMPTS, tokens, said, SAMPLING.temperature)
    assert found["largest"] < 1e-4 and found["tokens"] == sum(map(len, tokens))
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    shaken = policy(scale=0.2)[0]
    assert agreement(shaken, PROMPTS, tokens, said, SAMPLING.temperature)["mean"] > 1e-3


@pytest.mark.parametrize("path", [hf_rollout(3), continuous_rollout(3)], ids=lambda p: p.name)
def test_generation_leaves_the_model_as_it_was(path):
    model, _ = policy(load_settings("tiny", lora_r=4, quantization="none", lora_dropout=0.5))
    model.train()
    implementation = model.config._attn_implementation
    flags = {n: (p.requires_grad, p.dtype) for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    before = torch.random.get_rng_state()
    tokens, said = path.generate(model, PROMPTS, SAMPLING, 4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert modes == [m.training for m in model.modules()] and any(modes)
    assert flags == {n: (p.requires_grad, p.dtype) for n, p in model.named_parameters()}
    assert model.config._attn_implementation == implementation
    assert agreement(model, PROMPTS, tokens, said, 0.9)["largest"] < 1e-4  # dropout was off


def test_continuous_batching_that_dies_is_one_line(model, monkeypatch):
    from transformers.generation.continuous_batching import continuous_api

    def dead(*args, **kwargs):
        raise RuntimeError("no room in the cache")

    monkeypatch.setattr(continuous_api.ContinuousBatchProcessor, "_generation_step", dead)
    with pytest.raises(UserError, match="continuous batching failed"):
        continuous_rollout(3).generate(model, PROMPTS, SAMPLING, 0)


def test_continuous_batching_repeats(model):
    one, two = (continuous_rollout(3).generate(model, PROMPTS, SAMPLING, 5)[0] for _ in range(2))
    assert one == two


# ---- what TRL gets


class StubJudge:
    rubric = Rubric(
        "toy",
        tuple(
            Principle(p, (Dimension(p[:3], (Question(p[:4], "graded", "?"),)),))
            for p in ("harmlessness", "helpfulness", "honesty")
        ),
    )

    def score_many(self, pairs):
        return [self.card(*pair) for pair in pairs]

    def card(self, prompt, response):
        said = tuple(Verdict(q.id, "ABCDF"[len(response) * 7 % 5]) for q in self.rubric.questions)
        return Scorecard(prompt, response, said, pool(self.rubric, said), tokens=1, seconds=0.0)


def trained(folder: Path, rollout, monkeypatch, model=None, tokenizer=None, **overrides) -> tuple[dict, list]:
    "Adapter and rows after a few steps of GRPO."
    score = reward_room._score
    monkeypatch.setattr(
        reward_room,
        "_score",
        lambda judge, s, prompts, done, ids, cut, first: score(judge, s, prompts, done, ids, (), first),
    )
    trace = lambda text: Trace(text[: len(text) // 2] or "a", "Wait.", text[len(text) // 2 :] or "b", True, "")  # noqa: E731
    monkeypatch.setattr(reward_room, "parse_trace", trace)
    micro = {"quantization": "none", "lora_r": 4, "lr": 1e-3, "kl": 0.1, "prompts_per_step": 2, "group_size": 3}
    micro |= {"micro_batch": 3, "completion_tokens": 8, "temperature": 0.9, "scores": "hard", "grpo_steps": 2}
    if model is None:
        model, tokenizer = policy()
    torch.manual_seed(0)
    prompts, rows = [Prompt(f"p{i}", f"request {i}") for i in range(4)], []
    settings = load_settings("tiny", **{**micro, **overrides})
    train_grpo(model, tokenizer, StubJudge(), prompts, settings, folder, rows.append, rollout=rollout)
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}, rows


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_grpo_trains_on_it_and_the_cut_does_not_matter(tmp_path, monkeypatch):
    one, rows = trained(tmp_path / "a", hf_rollout(2), monkeypatch)
    checked = Rollout("hf", hf_rollout(5).generate, tolerance=0.05)
    two, _ = trained(tmp_path / "b", checked, monkeypatch)
    assert len(checked.agreed) == 2 and len(rows) == 2
    texts = [[r["completion"] for r in read_jsonl(tmp_path / x / "traces.jsonl")] for x in "ab"]
    assert texts[0] == texts[1] and len(set(texts[0])) > 3
    assert all(torch.allclose(one[n], two[n], atol=1e-5) for n in one)
    stages = {r["stage"] for r in read_jsonl(tmp_path / "a" / "timings.jsonl")}
    assert {"grpo/generate", "grpo/judge", "grpo/train"} <= stages


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_what_another_program_sampled_from_is_the_old_policy_of_the_ratio(tmp_path, monkeypatch):
    same = hf_rollout(5).generate

    def shifted(*args):
        tokens, said = same(*args)
        return tokens, [[x - 1.0 for x in xs] for xs in said]  # each token e times as likely to the policy: clipped

    paths = {"own": Rollout("own", same), "exact": Rollout("exact", same, foreign=True)}
    paths |= {"told": Rollout("told", shifted), "off": Rollout("off", shifted, foreign=True)}
    found = {}
    for name, path in paths.items():
        found[name], _ = trained(tmp_path / name, path, monkeypatch, grpo_steps=1, kl=0.0)
    size = lambda a, b: sum(float((found[a][n] - found[b][n]).abs().sum()) for n in found[a])  # noqa: E731
    assert size("own", "told") == 0  # ignored, as TRL ignores it
    assert size("own", "exact") < 1e-2 * size("own", "off")  # bf16 rounds in training, not in sampling


@pytest.mark.slow
@pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="needs the environment of `make test-vllm`")
@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_grpo_trains_through_a_real_server(tmp_path, monkeypatch):
    "The embedded model; vLLM in its own environment gets the adapter of each step, and says what the trainer says."
    from qalign.engine import embedded_model, load_model

    options = {"served_model_name": "policy", "dtype": "float32", "max_model_len": 512, "max_lora_rank": 8}
    env, how = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}, {"logprobs_mode": "processed_logprobs"}
    with vllm_server(tmp_path / "log", "--enable-lora", python=VLLM_PYTHON, env=env, **options, **how) as url:
        path = server_rollout(f"openai:policy@{url}")
        generate, kept, stale = path.generate, [], []

        def compared(model, prompts, sampling, seed):
            "Also what the model of the step before says of the tokens."
            tokens, said = generate(model, prompts, sampling, seed)
            params = {n: p for n, p in model.named_parameters() if ".default." in n}
            kept.append({n: p.detach().clone() for n, p in params.items()})
            with torch.no_grad():
                for old in kept[-2:-1]:
                    [p.copy_(old[n]) for n, p in params.items()]
                    stale.append(agreement(model, prompts, tokens, said, sampling.temperature))
                    [p.copy_(kept[-1][n]) for n, p in params.items()]
            return tokens, said

        path.generate = compared
        settings = load_settings("tiny", lora_r=4, quantization="none", seed=1)
        base, tokenizer = load_model(str(embedded_model()), "fp32")
        model = add_adapter(base, settings)
        adapter, rows = trained(tmp_path / "run", path, monkeypatch, model, tokenizer, lr=1e-2, grpo_steps=3)
    print(path.agreed, stale)
    assert len(rows) == len(path.agreed) == 3 and any(p.abs().sum() > 0 for n, p in adapter.items() if "lora_B" in n)
    assert all(old["mean"] > 2 * new["mean"] for old, new in zip(stale, path.agreed[1:], strict=True))


def trainer(**changed):
    tokenizer = shape_engine("micro", "fp32").tokenizer
    plain = {"temperature": 0.9, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    plain |= {
        "max_completion_length": 12,
        "eos_token_ids": list(EOS),
        "chat_template": None,
        "chat_template_kwargs": {},
    }
    return SimpleNamespace(**{**plain, "processing_class": tokenizer, **changed})


@pytest.mark.parametrize("changed", [{"top_k": 20}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_other_ways_to_sample_are_refused(changed):
    with pytest.raises(UserError, match="leave top_k, min_p and penalties off"):
        room._sampling(trainer(**changed))


def test_prompts_are_rendered_as_trl_renders_them():
    from trl import GRPOTrainer

    me = trainer(environment_factories=None, tools=None, _is_vlm=False)
    chats = [[{"role": "user", "content": x}] for x in ("Hello.", "What is <|im_end|>?", "Hello.")]
    assert room._prompt_ids(chats, me) == GRPOTrainer._tokenize_prompts(me, chats)[0]


def test_another_policy_is_caught(model, monkeypatch):
    wrong = lambda m, p, s, seed: hf_rollout().generate(policy(scale=1.0)[0], p, s, seed)  # noqa: E731
    monkeypatch.setattr(room, "_unwrapped", lambda t: contextlib.nullcontext(model))
    chats = [[{"role": "user", "content": "Hello."}]] * 2
    with pytest.raises(UserError, match="samples another policy"):
        Rollout("hf", wrong, tolerance=0.01)(chats, trainer())
    told = Rollout("hf", hf_rollout().generate, tolerance=0.01)(chats, trainer())
    assert set(told) == {"prompt_ids", "completion_ids", "logprobs"} and len(told["completion_ids"]) == 2


@pytest.mark.parametrize(
    ("tokens", "said", "why"),
    [
        ([[1]], [[-1.0]], "1 completions for 2 prompts"),
        ([[0], []], [[-1.0], []], "after 0 of 12"),
        ([[0], [1, 2]], [[-1.0], [-1.0, -1.0]], "after 2 of 12"),
        ([[0], [1] * 13], [[-1.0], [-1.0] * 13], "after 13 of 12"),
        ([[0], [9]], [[-1.0], [math.nan]], "no log-probability"),
        ([[0], [9]], [[-1.0], [None]], "no log-probability"),
        ([[0], [9]], [[-1.0], []], "no log-probability"),
    ],
)
def test_what_is_missing_is_named(tokens, said, why):
    with pytest.raises(UserError, match=why):
        room._check("vllm", PROMPTS[:2], tokens, said, SAMPLING)


# ---- adapters as files


def publish(files, model, calls, fail=False):
    def load(name, path):
        if fail:
            raise UserError("refused")
        calls.append(("load", name, sorted(p.name for p in path.iterdir())))

    return files.publish(model, load, lambda name: calls.append(("drop", name)))


def test_only_a_changed_adapter_is_written(tmp_path):
    model, calls, files = policy()[0], [], room._Adapters(tmp_path)
    assert publish(files, model, calls) and not publish(files, model, calls)
    first = files.name
    shake(model, 0.01)
    assert publish(files, model, calls) and files.written == 2 and files.name != first
    assert [c[:2] for c in calls] == [("load", first), ("load", files.name), ("drop", first)]
    assert calls[0][2] == ["adapter_config.json", "adapter_model.safetensors"]
    assert [p.name for p in Path(files._root.name).iterdir()] == [files.name]
    assert Path(files._root.name).parent == tmp_path


def test_a_refused_adapter_is_offered_again(tmp_path):
    model, calls, files = policy()[0], [], room._Adapters()
    with pytest.raises(UserError, match="refused"):
        publish(files, model, calls, fail=True)
    assert files.name == "" and publish(files, model, calls) and len(calls) == 1


def test_peft_reads_what_is_written():
    from peft import PeftModel

    model, files, folder = policy()[0], room._Adapters(), []
    files.publish(model, lambda name, path: folder.append(path), lambda name: None)
    again = PeftModel.from_pretrained(shape_engine("micro", "fp32").model, str(folder[0]))
    tokens, said = hf_rollout().generate(model, PROMPTS, SAMPLING, 0)
    assert agreement(again, PROMPTS, tokens, said, 0.9)["largest"] < 1e-4


def test_only_the_trained_adapter_is_written():
    model, _ = policy()
    before = room._adapter_state(model)
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("default")
    after = room._adapter_state(model)
    assert list(before) == list(after) and room._name_of(before) == room._name_of(after)


def test_a_model_shared_out_by_fsdp2(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model, files = policy()[0], room._Adapters()
    before = room._adapter_state(model)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        after = room._adapter_state(model)
        assert list(before) == list(after) and room._name_of(before) == room._name_of(after)
        assert publish(files, model, [])
        for path in (hf_rollout(), continuous_rollout()):
            with pytest.raises(UserError, match="under FSDP take trl or a server"):
                path.generate(model, PROMPTS, SAMPLING, 0)
    finally:
        dist.destroy_process_group()


def test_a_full_disk_and_a_missing_adapter_are_one_line(monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match=r"cannot be written for the engine: No space left"):
        publish(room._Adapters(tmp_path), policy()[0], [])
    with pytest.raises(UserError, match="no LoRA adapter to serve"):
        room._adapter_state(shape_engine("micro", "fp32").model)


def test_a_base_is_saved_as_it_computes(tmp_path):
    from transformers import AutoModelForCausalLM

    for quantization in ("none", "nf4"):
        engine = shape_engine("micro", quantization)
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            plain = engine.model(input_ids=ids).logits
        model = add_adapter(engine.model, TINY)
        shake(model, 1.0)
        folder = save_base(model, engine.tokenizer, tmp_path / quantization)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        names = {n for n, _ in again.named_parameters()}
        with torch.no_grad():
            told = again(input_ids=ids).logits
        assert not any("lora" in n for n in names)
        scale = plain.float().abs().max()
        assert (told.float() - plain.float()).abs().max() < (0.02 * scale if quantization == "nf4" else 1e-6)


def test_a_base_in_several_files_and_a_tied_head(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(room, "_SHARD", 40_000)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=300, tie_word_embeddings=True)).bfloat16().eval()
    folder = save_base(model, shape_engine("micro", "fp32").tokenizer, tmp_path / "base")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_merging_into_nf4_loses_the_update():
    torch.manual_seed(0)
    weight = 0.05 * torch.randn(128, 256)
    update = torch.randn(128, 8) @ torch.randn(8, 256)
    found = [nf4_loss(weight, x * update / update.norm() * weight.norm()) for x in (0.5, 0.01, 0.001)]
    assert found[0]["nf4_error"] < 0.3 < found[1]["nf4_error"] < found[2]["nf4_error"]
    assert [round(x["size"], 3) for x in found] == pytest.approx([0.5, 0.01, 0.001], rel=0.05)
    assert all(x["bf16_error"] < x["nf4_error"] for x in found)


# ---- a server


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, body))
        status, said = self.server.answer(self.path, body)
        data = said.encode() if isinstance(said, str) else json.dumps(said).encode()
        self.send_response(status)
        if not isinstance(said, str):
            self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)


@pytest.fixture
def server():
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.seen, httpd.answer = [], lambda path, body: (404, {})
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def good(path, body):
    if "lora" in path:
        return 200, f"Success: {body['lora_name']}"
    tokens, said = [7, 8, 9], [-1.0, -2.0, -0.5]
    choice = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": tokens, "prompt_token_ids": body["prompt"]}
    choice["logprobs"] = {"token_logprobs": said, "tokens": ["a"] * 3, "top_logprobs": [], "text_offset": [0, 1, 2]}
    return 200, {"id": "1", "object": "text_completion", "created": 0, "model": body["model"], "choices": [choice]}


def test_a_server_gets_the_adapter_and_token_ids(server):
    server.answer = good
    path, model = server_rollout(f"openai:policy@{server.url}"), policy()[0]
    for _ in range(2):
        tokens, said = path.generate(model, PROMPTS, SAMPLING, 0)
    assert tokens == [[7, 8, 9]] * 7 and said[0] == [-1.0, -2.0, -0.5]
    first = server.seen[0][1]["lora_name"]
    shake(model, 0.1)
    path.generate(model, PROMPTS[:1], SAMPLING, 0)
    changes = [(p.split("/")[-1], b["lora_name"]) for p, b in server.seen if "lora" in p]
    assert [c[0] for c in changes] == ["load_lora_adapter", "load_lora_adapter", "unload_lora_adapter"]
    assert changes[0][1] == changes[2][1] == first != changes[1][1]
    asked = [b for p, b in server.seen if p.endswith("/completions")]
    assert {b["model"] for b in asked[:14]} == {first} and asked[-1]["model"] == changes[1][1]
    assert sorted(b["prompt"] for b in asked[:7]) == sorted(PROMPTS) and len({b["seed"] for b in asked[:7]}) == 7
    assert asked[0]["return_token_ids"] and asked[0]["stop_token_ids"] == list(EOS) and asked[0]["top_k"] == 0


def test_a_second_process_on_the_same_server(server):
    def answer(path, body):
        if "unload" in path:
            return 404, {"error": {"message": "The lora adapter 'x' cannot be found.", "code": 404}}
        if "lora" in path:
            return 400, {"error": {"message": "The lora adapter 'x' has already been loaded.", "code": 400}}
        return good(path, body)

    server.answer = answer
    path, model = server_rollout(f"openai:policy@{server.url}"), policy()[0]
    path.generate(model, PROMPTS[:1], SAMPLING, 0)
    shake(model, 0.1)
    assert path.generate(model, PROMPTS[:1], SAMPLING, 0)[0] == [[7, 8, 9]]


def test_two_servers_both_get_the_adapter(server):
    server.answer = good
    two = server.url.replace("127.0.0.1", "localhost")
    path, model = server_rollout(f"openai:policy@{server.url},{two}"), policy()[0]
    assert path.generate(model, PROMPTS, SAMPLING, 0)[0] == [[7, 8, 9]] * 7
    assert sum(p.endswith("/load_lora_adapter") for p, _ in server.seen) == 2


def without(key):
    def answer(path, body):
        status, said = good(path, body)
        if isinstance(said, dict):
            said["choices"][0][key] = None
        return status, said

    return answer


def other_tokens(path, body):
    status, said = good(path, body)
    if isinstance(said, dict):
        said["choices"][0]["prompt_token_ids"] = [1]
    return status, said


def stalled(path, body):
    if path.endswith("/completions"):
        time.sleep(1.5)
    return good(path, body)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda path, body: (404, {"detail": "Not Found"}), "takes no adapters while it runs: start it with"),
        (lambda path, body: (500, {"error": {"message": "LoRA rank 64 is greater"}}), "status 500: .*rank 64"),
        (without("token_ids"), "gives no token ids"),
        (without("logprobs"), "gives no token ids"),
        (other_tokens, "read other tokens than it was sent"),
        (stalled, "did not answer in time"),
        (lambda path, body: good(path, body) if "lora" in path else (503, {}), "status 503"),
    ],
    ids=["no adapters", "rank", "no ids", "no logprobs", "other prompt", "stall", "overload"],
)
def test_a_server_that_misbehaves_is_one_line(server, answer, why):
    server.answer = answer
    path = server_rollout(f"openai:policy@{server.url}", timeout=0.5)
    with pytest.raises(EngineError, match=why) as caught:
        path.generate(policy()[0], PROMPTS[:2], SAMPLING, 0)
    assert "\n" not in str(caught.value) and server.url in str(caught.value)


# ---- choosing, measuring


@pytest.mark.parametrize(
    ("kind", "why"), [("fast", "got 'fast'"), ("openai:x", "expected rollout to be one of"), ("vllm", "needs vLLM")]
)
def test_a_path_that_is_not_there_is_named(kind, why, monkeypatch):
    monkeypatch.setattr(room.util, "find_spec", lambda name: None if name == "vllm" else SimpleNamespace())
    with pytest.raises(UserError, match=why):
        choose_rollout(kind, None, None, TINY, "run")
    with pytest.raises(UserError, match="needs vLLM"):
        load_lora_engine()


@pytest.mark.parametrize("kind", ["vllm", "openai:m@http://localhost:9/v1"])
def test_a_nucleus_is_refused_where_another_program_samples(kind, monkeypatch):
    monkeypatch.setattr(room.util, "find_spec", lambda name: SimpleNamespace())
    with pytest.raises(UserError, match=r"samples with top_p = 1 alone, got 0\.9: use rollout hf"):
        room.check_rollout(TINY.replace(rollout=kind, top_p=0.9))
    room.check_rollout(TINY.replace(rollout=kind))
    room.check_rollout(TINY.replace(rollout="hf", top_p=0.9))


def test_one_process_alone_can_hold_vllm(monkeypatch):
    monkeypatch.setattr(room.util, "find_spec", lambda name: SimpleNamespace())
    room.check_rollout(TINY.replace(rollout="vllm"))
    monkeypatch.setattr(room, "world_size", lambda: 2)
    with pytest.raises(UserError, match="rollout vllm is for one process: with several use rollout hf, or a server"):
        room.check_rollout(TINY.replace(rollout="vllm"))
    room.check_rollout(TINY.replace(rollout="hf"))


@pytest.mark.parametrize(("quantization", "precision"), [("fp32", "fp32"), ("none", "none")])
def test_vllm_serves_the_trainers_precision(quantization, precision, monkeypatch):
    told = []
    monkeypatch.setattr(room.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(room, "load_lora_engine", lambda *given: told.append(given))
    choose_rollout("vllm", None, None, TINY.replace(quantization=quantization), "run")
    assert [given[1] for given in told] == [precision]


def test_the_measurement(tmp_path, model):
    tokenizer = shape_engine("micro", "fp32").tokenizer

    def train(path, folder):
        folder.mkdir(exist_ok=True)
        rows = [
            {"stage": f"grpo/{p}", "step": s, "seconds": s} for s in (1, 2, 4) for p in ("generate", "judge", "train")
        ]
        (folder / "timings.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    paths = {"trl": None, "hf": hf_rollout(2)}
    table = bench_rollout(model, tokenizer, paths, tmp_path, ["Hi.", "Ho."], 2, Sampling(1.0, 1.0, 4, EOS), 2, train)
    assert [r["path"] for r in table] == ["trl", "hf"] and table[0]["times_first"] == 1
    assert table[1]["mean"] < 1e-4 and "mean" not in table[0] and table[0]["step_train"] == 3
    rows = list(read_jsonl(tmp_path / "rows.jsonl"))
    assert [(r["path"], r["repeat"]) for r in rows] == [("trl", 0), ("hf", 0), ("trl", 1), ("hf", 1)]
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["plan"]["group"] == 2 and "torch" in run["versions"]


def test_a_way_that_no_trainer_takes_is_measured_without_steps(tmp_path, model):
    tokenizer, trained = shape_engine("micro", "fp32").tokenizer, []
    how = (["Hi."], 2, Sampling(1.0, 1.0, 4, EOS), 2)

    def train(path, folder):
        trained.append(path)
        rows = [{"stage": f"grpo/{p}", "step": 1, "seconds": 2} for p in ("generate", "judge", "train")]
        (folder / "timings.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    others = {"static": room.static_cache}
    trl, static = bench_rollout(model, tokenizer, {"trl": None}, tmp_path, *how, train, others=others)
    assert trained == [None] and trl["step"] == 6 and "step" not in static
    assert static["path"] == "static" and static["tokens"] == trl["tokens"] and static["times_first"] > 0


def test_a_static_cache_draws_what_a_growing_one_draws(model, monkeypatch):
    from transformers import StaticCache

    made, prompts, cold = [], [[5, 6, 7], [8, 9]], Sampling(1e-6, 1.0, 6, EOS)  # no chance left
    monkeypatch.setattr(StaticCache, "__init__", _noted(StaticCache.__init__, made))
    grown = room._whole(model, prompts, cold, 1)
    assert not made
    assert room.static_cache(model, prompts, cold, 1) == grown and len(made) == 1


def _noted(do, calls):
    def done(self, *args, **kwargs):
        calls.append(kwargs)
        do(self, *args, **kwargs)

    return done


def test_a_path_that_runs_out_of_memory_says_so_and_has_no_number(tmp_path, model):
    import torch

    from qalign import grpo, memory
    from qalign.rollout import Rollout

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    def train(path, folder):
        if path is None:
            session = SimpleNamespace(saved=0, step=0)
            with grpo._one_line(session), memory._enough("at the worst step", "lower micro_batch"):  # as train_grpo
                full()
        rows = [{"stage": f"grpo/{p}", "step": 1, "seconds": 2} for p in ("generate", "judge", "train")]
        (folder / "timings.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    tokenizer, said = shape_engine("micro", "fp32").tokenizer, list[str]()
    paths = {"none": Rollout("none", full), "trl": None, "hf": hf_rollout(2)}
    how = (["Hi."], 2, Sampling(1.0, 1.0, 4, EOS), 2, train)
    none, trl, hf = bench_rollout(model, tokenizer, paths, tmp_path, *how, said.append)
    assert none == {"path": "none", "problem": "out of memory", "step": 6, **STEP}
    assert trl["problem"] == "a step: out of memory" and "step" not in trl and trl["times_first"] == 1
    assert "problem" not in hf and hf["step"] == 6 and hf["times_first"] > 0
    assert said[0] == "none: out of memory" and "trl: a step: out of memory" in said
    assert [r["path"] for r in read_jsonl(tmp_path / "rows.jsonl")] == ["none", "trl", "hf", "trl", "hf"]
    with pytest.raises(UserError, match="something else"):
        room._unless_memory_ends(lambda: (_ for _ in ()).throw(UserError("something else")))


STEP = {f"step_{phase}": 2.0 for phase in ("generate", "judge", "train")}


def test_the_room_imports_nothing_heavy():
    code = "import sys, qalign.rollout; print({'torch', 'trl', 'vllm', 'openai', 'pandas'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
