"The engine in this process: shared prefixes give what each gives alone, nothing of a training step is touched."

import contextlib
import copy
import json
import math
import random
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qalign.engine
from qalign.core import UserError
from qalign.engine import (
    Answer,
    EngineError,
    HFEngine,
    Leads,
    Segment,
    embedded_model,
    failed,
    frame_of,
    load_engine,
    load_model,
    tokens_of,
    weights_hash,
)
from qalign.judge import LABELS, SYSTEM, Judge, judge_lead, judge_prefix, judge_suffix, reply_schema
from qalign.rubric import Question, load_rubric, select
from qalign.safety import llm_judge

torch = pytest.importorskip("torch")

QUICK = settings(derandomize=True, deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
TOLERANCE = 1e-5
QUESTIONS = (
    Question("g", "gate", "Is the response polite?"),
    Question("q", "graded", "Is it correct?"),
    Question("h", "gate", "Does it answer in the language of the request, and in that language alone?"),
    Question("r", "graded", "Is it short?"),
    Question("i", "gate", "Does it refuse?"),
)
# labels of several tokens, and such that begin alike
GATED = ("TRAIT", "FALSE")  # three tokens each, so that a random model says either
ODD = (("yes", "no"), ("TRUE", "FALSE", "NA"), ("not at all", "not quite", "notable", "A"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    "Small matrices on busy cores: threads would only wait for each other."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def hf() -> HFEngine:
    return load_engine("smollm2", "fp32")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(embedded_model()), padding_side="left")


def save_tiny(folder: Path, tokenizer: Any, seed: int) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        initializer_range=0.3,  # weights this large make labels differ
        attention_dropout=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **sizes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(hf: HFEngine, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"), hf.tokenizer, 0)


@pytest.fixture
def tiny(folder: str) -> HFEngine:
    "A random Llama of two layers with the embedded model's tokenizer, fresh for each test."
    return HFEngine(*load_model(folder, "fp32"), spec=f"hf:{folder}")


@pytest.fixture(scope="module")
def shared_tiny(folder: str) -> HFEngine:
    return HFEngine(*load_model(folder, "fp32"), spec=f"hf:{folder}")


@pytest.fixture
def lora(tiny: HFEngine) -> HFEngine:
    "The tiny model with a LoRA whose effect is large, in training."
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
        model: Any = get_peft_model(tiny.model, config)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=1.0)
    return HFEngine(model, tiny.tokenizer, tiny.spec)


def distance(a: Sequence[Sequence[Answer]], b: Sequence[Sequence[Answer]]) -> float:
    "The largest difference of two probabilities; infinite where one side is not asked."
    gap = 0.0
    for x, y in zip(a, b, strict=True):
        for one, two in zip(x, y, strict=True):
            if not (isinstance(one, dict) and isinstance(two, dict)):
                gap = max(gap, 0.0 if one is two is None else float("inf"))
                continue
            assert list(one) == list(two) and abs(sum(one.values()) - 1) < 1e-9
            gap = max(gap, *(abs(one[k] - two[k]) for k in one))
    return gap


@contextlib.contextmanager
def counted(engine: HFEngine) -> Iterator[list[int]]:
    "Per forward pass: tokens that are no padding."
    counts: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        own = mask[:, -ids.shape[1] :] if mask is not None and mask.dim() == 2 else torch.ones_like(ids)
        counts.append(int(own.sum()))

    handle = engine.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


def plain(engine: HFEngine, prefix: Sequence[Segment], suffix: str, labels: Sequence[str]) -> dict[str, float]:
    "Label probabilities with none of the machinery: one whole sequence per label."
    head = engine.tokens(prefix) + engine.tokens([(suffix, True)])
    logps = []
    with torch.no_grad():
        for label in labels:
            own = engine.tokens([(label, True)])
            logits = engine.model(input_ids=torch.tensor([head + own])).logits[0].float().log_softmax(-1)
            logps.append(sum(logits[len(head) - 1 + i, t].item() for i, t in enumerate(own)))
    weights = torch.tensor(logps, dtype=torch.float64).softmax(-1).tolist()
    return dict(zip(labels, weights, strict=True))


def asked(engine: HFEngine, pairs: Sequence[tuple[str, str]]) -> tuple[list, list[str], list[Sequence[str]]]:
    "Prefixes, suffixes and labels as the judge makes them."
    head, tail = engine.frame(SYSTEM)
    prefixes = [judge_prefix(head, *pair) for pair in pairs]
    return prefixes, [judge_suffix(tail, q) for q in QUESTIONS], [LABELS[q.kind] for q in QUESTIONS]


LONG = "Rayleigh scattering: short waves are bent more than long ones by the molecules of the air. "
PAIRS = [
    ("Why is the sky blue?", LONG + "So it looks blue."),
    ("Why is the sky blue?", LONG + "So it looks blue at noon and red in the evening."),
    ("Why is the sky blue?", "No."),
    ("Name a prime.", "7"),
    ("Why is the sky blue?", LONG + "So it looks blue."),
    ("Why is the sky blue?", "No. It is not."),
]


# shared prefixes


@pytest.fixture(scope="module")
def alone(hf: HFEngine) -> list[list[Answer]]:
    "The answers about each pair, judged by itself, one question at a time."
    prefixes, suffixes, labels = asked(hf, PAIRS)
    return [hf.label_probs([p], suffixes, labels, chunk=1)[0] for p in prefixes]


def test_alone_is_what_the_plain_model_says(hf: HFEngine, alone: list[list[Answer]]) -> None:
    prefixes, suffixes, labels = asked(hf, PAIRS)
    for r, i in ((1, 0), (3, 3)):
        assert distance([[alone[r][i]]], [[plain(hf, prefixes[r], suffixes[i], labels[i])]]) < TOLERANCE
    assert distance([alone[0]], [alone[2]]) > 0.01  # the check below would notice rows that change places


@pytest.mark.parametrize(("rows", "chunk"), [(1, 5), (2, 1), (8, 12)])
def test_together_is_alone(hf: HFEngine, alone: list[list[Answer]], rows: int, chunk: int) -> None:
    prefixes, suffixes, labels = asked(hf, PAIRS)
    engine = HFEngine(hf.model, hf.tokenizer, rows=rows)
    with counted(engine) as counts:
        together = engine.label_probs(prefixes, suffixes, labels, chunk=chunk)
    assert distance(together, alone) < TOLERANCE
    whole = sum(len(hf.tokens(p)) for p in prefixes)
    branches = len(prefixes) * sum(len(hf.tokens([(s, True)])) for s in suffixes)
    assert sum(counts) < 0.7 * (whole + branches)  # what they share is read once


def text(ids: Sequence[int]) -> list[Segment]:
    "A prefix of one-letter words; each is one token."
    return [("".join(f" {'abcdefgh'[i]}" for i in ids), True)] if ids else []


def words(hf: HFEngine, rng: random.Random, n: int) -> list[Segment]:
    return text([rng.randrange(8) for _ in range(n)])


@st.composite
def families(draw: st.DrawFn) -> list[list[int]]:
    "Prefixes that begin with pieces of a few stems: equal, nested, or strangers; the shortest have one token."
    rng = random.Random(draw(st.integers(0, 10**6)))
    stems = [[rng.randrange(8) for _ in range(draw(st.integers(1, 60)))] for _ in range(draw(st.integers(1, 3)))]
    out = []
    for _ in range(draw(st.integers(1, 7))):
        stem = draw(st.sampled_from(stems))
        own = draw(st.lists(st.integers(0, 7), max_size=30))
        out.append((stem[: draw(st.integers(0, len(stem)))] + own) or [0])
    return out


@QUICK
@given(families(), st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 2, 5, 12]), st.integers(1, 6))
def test_any_family_of_prefixes(shared_tiny: HFEngine, family: list[list[int]], rows: int, chunk: int, n: int) -> None:
    suffixes = [f" question {i}{'?' * i} answer" for i in range(n)]
    labels = [ODD[i % len(ODD)] for i in range(n)]
    prefixes = [text(ids) for ids in family]
    assert [len(shared_tiny.tokens(p)) for p in prefixes] == [len(ids) for ids in family]
    engine = HFEngine(shared_tiny.model, shared_tiny.tokenizer, rows=rows)
    with counted(engine) as counts:
        together = engine.label_probs(prefixes, suffixes, labels, chunk=chunk)
    each = [shared_tiny.label_probs([p], suffixes, labels, chunk=1)[0] for p in prefixes]
    assert distance(together, each) < TOLERANCE
    assert len(engine.tokens_read) == len(prefixes) and sum(engine.tokens_read) == sum(counts)
    order = list(reversed(range(len(prefixes))))
    again = engine.label_probs([prefixes[i] for i in order], suffixes, labels, chunk=chunk)
    assert distance(again, [together[i] for i in order]) < TOLERANCE


def test_labels_of_several_tokens_are_exact(shared_tiny: HFEngine) -> None:
    rng = random.Random(0)
    for labels in ODD:
        assert len(set(map(len, map(shared_tiny.tokens, [[(x, True)] for x in labels])))) >= 1
        prefixes = [words(shared_tiny, rng, n) for n in (1, 7, 40)]
        got = shared_tiny.label_probs(prefixes, [" so:"], [labels])
        want = [[plain(shared_tiny, p, " so:", labels)] for p in prefixes]
        assert distance(got, want) < TOLERANCE


def test_labels_that_begin_another_are_refused(shared_tiny: HFEngine) -> None:
    with pytest.raises(ValueError, match="expected labels of which none begins another"):
        shared_tiny.label_probs([text([1])], ["?"], [("not", "not at all")])


def test_a_broken_model_gives_no_probabilities(tiny: HFEngine) -> None:
    with torch.no_grad():
        tiny.model.lm_head.weight[7] = float("nan")
    [[answer]] = tiny.label_probs([text([1, 2])], ["?"], [("TRUE", "FALSE")])
    assert isinstance(answer, EngineError) and str(answer) == "gave a log-probability that is no number"
    card = Judge(select(load_rubric("hhh"), dimensions=1, per_dimension=1), tiny).score("p", ["r"])[0]
    assert card.score.base is None and {v.status for v in card.verdicts} == {"failed"}
    for safety_judge in (llm_judge(tiny, "harm"), llm_judge(tiny, "strong_reject")):
        [decision] = safety_judge.decide([{"prompt": "p", "output": "r"}])
        assert (decision.status, decision.label, decision.score) == ("failed", None, None)


def test_replies_that_ran_into_the_limit_are_told(tiny: HFEngine) -> None:
    chats: list[Any] = [[{"role": "user", "content": c}] for c in "abcde"]
    once = tiny.complete(chats, max_tokens=5)
    assert tiny.cut == [True] * 5  # random weights do not stop
    some = [tiny.tokens([(reply, False)])[-1] for reply in once]
    tiny.model.generation_config.eos_token_id = [tiny.tokenizer.eos_token_id, some[0]]
    tiny.batch = 2
    again = tiny.complete(chats, max_tokens=5)
    ended = [len(tiny.tokens([(reply, False)])) < 5 or i == 0 for i, reply in enumerate(again)]
    assert tiny.cut == [not e for e in ended] and not tiny.cut[0]


def test_two_orders_of_batching(shared_tiny: HFEngine) -> None:
    rng = random.Random(3)
    alike = [rng.randrange(8) for _ in range(80)]
    by_text = [alike + [k] * m for k, m in ((1, 3), (2, 30), (3, 4), (4, 28))]
    by_text += [[7 - i for i in x] for x in by_text]  # two prompts with four responses each
    rng.shuffle(by_text)
    by_length = [[rng.randrange(8) for _ in range(n)] for n in (3, 90, 5, 85, 4, 95, 6, 88)]
    saved = {}
    for name, family in (("text", by_text), ("length", by_length)):
        prefixes = [text(ids) for ids in family]
        engine = HFEngine(shared_tiny.model, shared_tiny.tokenizer, rows=4)
        got = engine.label_probs(prefixes, [" so:", " thus:"], [ODD[0], ODD[2]])
        saved[name] = sum(map(len, family)) - sum(engine.tokens_read)
        each = [shared_tiny.label_probs([p], [" so:", " thus:"], [ODD[0], ODD[2]])[0] for p in prefixes]
        assert distance(got, each) < TOLERANCE
    assert saved["text"] > 400 > 0 > saved["length"]  # six of eight prompts are not read again


def test_nothing_asked(shared_tiny: HFEngine) -> None:
    assert shared_tiny.label_probs([], [" so:"], [ODD[0]]) == [] == shared_tiny.tokens_read
    assert shared_tiny.label_probs([text([1, 2])], [], []) == [[]]
    assert shared_tiny.replies([text([1])], ["?"], [{}], []) == [] == shared_tiny.complete([])


# pointless questions


@QUICK
@given(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=25), min_size=1, max_size=6), st.data())
def test_after(shared_tiny: HFEngine, family: list[list[int]], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 8))
    gates = [i for i in range(n) if data.draw(st.booleans())]
    some_gates = st.lists(st.sampled_from(gates), max_size=3) if gates else st.just([])
    after = [[] if i in gates else data.draw(some_gates) for i in range(n)]
    suffixes, labels = [f" question {i}{'!' * i} answer" for i in range(n)], [GATED] * n
    prefixes = [text(ids) for ids in family]
    engine = HFEngine(shared_tiny.model, shared_tiny.tokenizer, rows=data.draw(st.sampled_from([1, 2, 8])))
    chunk = data.draw(st.sampled_from([1, 3, 12]))
    full = engine.label_probs(prefixes, suffixes, labels, chunk=chunk)
    everything = sum(engine.tokens_read)
    with counted(engine) as counts:
        some = engine.label_probs(prefixes, suffixes, labels, chunk=chunk, after=after)
    assert sum(engine.tokens_read) == sum(counts) <= everything
    skipped = 0
    for row, whole in zip(some, full, strict=True):
        for i, answer in enumerate(row):
            pointless = any(failed(whole[g]) for g in after[i])
            assert (answer is None) == pointless
            skipped += pointless
            assert pointless or distance([[answer]], [[whole[i]]]) < TOLERANCE
    assert (sum(counts) < everything) == (skipped > 0)


def test_after_meets_both_kinds_of_gate(shared_tiny: HFEngine) -> None:
    "The draws above are no good if no gate ever fails, or every gate does."
    prefixes = [text([i, j]) for i in range(8) for j in range(3)]
    said = shared_tiny.label_probs(prefixes, [f" question {i} answer" for i in range(4)], [GATED] * 4)
    share = sum(failed(x) for row in said for x in row) / (24 * 4)
    assert 0.1 < share < 0.9


@pytest.mark.parametrize(
    ("answer", "is_failed"),
    [
        ({"TRUE": 0.2, "FALSE": 0.7, "NA": 0.1}, True),
        ({"TRUE": 0.5, "FALSE": 0.5, "NA": 0.0}, False),
        ({"TRUE": 0.1, "FALSE": 0.2, "NA": 0.7}, False),
        ({"A": 1.0, "F": 0.0}, False),
        (None, False),
        (EngineError("lost"), False),
    ],
)
def test_failed(answer: Answer, is_failed: bool) -> None:
    assert failed(answer) is is_failed


# leads: questions that are read once, in front of everything


def led(engine: HFEngine, parts: Sequence[Segment], leads: Leads, i: int, suffix: str, labels: Sequence[str]) -> list:
    "Log-probabilities of labels: one forward pass each over head, lead, the rest and the label, the mask written out."
    head, lead, rest = (engine.tokens(p) for p in (parts[:1], [(leads.texts[leads.of[i]], True)], parts[1:]))
    room = max(len(engine.tokens([(x, True)])) for x in leads.texts)
    end = engine.tokens([(suffix, True)])
    blind = len(rest) - (not end)  # tokens of the rest that do not see the lead; without a suffix the last does
    start = len(head) + len(lead)
    out = []
    for label in labels:
        own = engine.tokens([(label, True)])
        ids = head + lead + rest + end + own
        sees = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        sees[start : start + blind, len(head) : start] = False
        at = [*range(start), *range(len(head) + room, len(head) + room + len(ids) - start)]
        mask = torch.zeros(sees.shape).masked_fill(~sees, float("-inf"))[None, None]
        with torch.no_grad():
            call = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([at]), "attention_mask": mask}
            logp = engine.model(**call).logits[0].float().log_softmax(-1)
        first = len(ids) - len(own) - 1
        out.append(sum(logp[first + k, t].item() for k, t in enumerate(own)))
    return torch.tensor(out, dtype=torch.float64).log_softmax(-1).tolist()


def log_distance(answer: Answer, logps: Sequence[float]) -> float:
    assert isinstance(answer, dict)
    return max(abs(math.log(p) - x) for p, x in zip(answer.values(), logps, strict=True))


@pytest.mark.parametrize(("family", "attention"), [("qwen3", "sdpa"), ("gemma3_text", "sdpa"), ("gemma2", "eager")])
def test_leads_of_other_families(hf: HFEngine, family: str, attention: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(hf.tokenizer)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, initializer_range=0.3, pad_token_id=0, **sizes)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    engine = HFEngine(model, hf.tokenizer, rows=2)
    prefixes = [[(" a b", True), *text(ids), (" so", True)] for ids in ([1, 2, 3], [4] * 20, [1, 2, 5, 6])]
    leads = Leads((" lead one two", " lead"), (0, 1, 0))
    got = engine.label_probs(prefixes, [""] * 3, ODD, chunk=2, leads=leads)
    for r in range(3):
        for i in range(3):
            assert log_distance(got[r][i], led(engine, prefixes[r], leads, i, "", ODD[i])) < 1e-4


@pytest.fixture(params=["in two parts", "masked"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    "Both ways to compute attention."
    if request.param == "masked":
        monkeypatch.setattr(qalign.engine, "_splits", lambda model: False)
    return request.param


def judged(engine: HFEngine, pairs: Sequence[tuple[str, str]]) -> tuple[list, Leads, list[Sequence[str]]]:
    "Prefixes, leads and labels as a judge with the rubric first makes them."
    head, tail = engine.frame(SYSTEM)
    prefixes = [[*judge_prefix(head, *pair), (tail, True)] for pair in pairs]
    return prefixes, Leads(tuple(map(judge_lead, QUESTIONS)), tuple(range(5))), [LABELS[q.kind] for q in QUESTIONS]


def test_leads_are_what_one_plain_pass_says(hf: HFEngine, path: str) -> None:
    prefixes, leads, labels = judged(hf, PAIRS[:3])
    engine = HFEngine(hf.model, hf.tokenizer)
    got = engine.label_probs(prefixes, [""] * 5, labels, leads=leads)
    for r, i in ((0, 0), (1, 3), (2, 2), (2, 4)):
        assert log_distance(got[r][i], led(hf, prefixes[r], leads, i, "", labels[i])) < 1e-4
    aware = engine.label_probs(prefixes, [f"{q.text}{hf.frame(SYSTEM)[1]}" for q in QUESTIONS], labels)
    assert distance(got, aware) > 0.01  # another prompt than the one with the question behind


@QUICK
@given(families(), st.sampled_from([1, 2, 8]), st.sampled_from([1, 2, 12]), st.integers(1, 5), st.data())
def test_any_leads(
    shared_tiny: HFEngine, family: list[list[int]], rows: int, chunk: int, n: int, data: st.DataObject
) -> None:
    "Whatever is asked together, both ways, gives what each gives alone, and what one plain pass gives."
    head: Segment = (data.draw(st.sampled_from(["", " a", " a b c d e f g h a b c d e f g h a b"])), True)
    texts = tuple(f" lead{' h' * data.draw(st.integers(0, 9))} {i}" for i in range(n))
    of = tuple(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=6)))
    empty = data.draw(st.booleans())
    suffixes = ["" if empty else f" question {i}?" for i in of]
    labels = [ODD[i % len(ODD)] for i in of]
    prefixes = [[head, *text(ids), (" so", True)] for ids in family]
    leads = Leads(texts, of)
    engine = HFEngine(shared_tiny.model, shared_tiny.tokenizer, rows=rows)
    with counted(engine) as counts:
        together = engine.label_probs(prefixes, suffixes, labels, chunk=chunk, leads=leads)
        assert sum(engine.tokens_read) == sum(counts)
        first, counts[:] = sum(counts), []
        again = engine.label_probs(prefixes, suffixes, labels, chunk=chunk, leads=leads)
        assert sum(engine.tokens_read) == sum(counts)
    whole = len(engine.tokens([head])) + sum(len(engine.tokens([(x, True)])) for x in texts)
    assert first == sum(counts) + whole and distance(again, together) < TOLERANCE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qalign.engine, "_splits", lambda model: False)
        masked = engine.label_probs(prefixes, suffixes, labels, chunk=chunk, leads=leads)
    assert distance(masked, together) < TOLERANCE
    r, i = data.draw(st.integers(0, len(family) - 1)), data.draw(st.integers(0, len(of) - 1))
    alone = HFEngine(shared_tiny.model, shared_tiny.tokenizer)
    only = Leads(texts, of[i : i + 1])
    [[one]] = alone.label_probs([prefixes[r]], suffixes[i : i + 1], labels[i : i + 1], chunk=1, leads=only)
    assert distance([[one]], [[together[r][i]]]) < TOLERANCE
    assert log_distance(together[r][i], led(alone, prefixes[r], leads, i, suffixes[i], labels[i])) < 1e-4


def test_leads_and_gates(shared_tiny: HFEngine, path: str) -> None:
    prefixes = [[(" a b", True), *text([i, j]), (" so", True)] for i in range(4) for j in range(3)]
    leads = Leads(tuple(f" lead {i}{'!' * i}" for i in range(6)), tuple(range(6)))
    after = [(), (0,), (), (0, 2), (2,), ()]
    call = {"suffixes": [""] * 6, "labels": [GATED] * 6, "leads": leads}
    engine = HFEngine(shared_tiny.model, shared_tiny.tokenizer)
    full, some = (engine.label_probs(prefixes, **call, after=a) for a in (None, after))
    for row, whole in zip(some, full, strict=True):
        for i, answer in enumerate(row):
            assert (answer is None) == any(failed(whole[g]) for g in after[i])
            assert answer is None or distance([[answer]], [[whole[i]]]) < TOLERANCE
    skipped = sum(answer is None for row in some for answer in row)
    assert 0 < skipped < 12 * 3


def test_leads_are_read_again_when_the_adapter_changes(lora: HFEngine) -> None:
    prefixes, leads, labels = judged(lora, PAIRS[:2])
    base = lora.base()

    def ask(engine: HFEngine) -> tuple[list[list[Answer]], int]:
        said = engine.label_probs(prefixes, [""] * 5, labels, leads=leads)
        return said, sum(engine.tokens_read)

    (on, first), (off, first_off) = ask(lora), ask(base)
    assert distance(on, off) > 0.01 and first == first_off
    assert ask(lora)[1] == ask(base)[1] < first  # kept
    with torch.no_grad():
        for name, p in lora.model.named_parameters():
            if "lora_B" in name:
                p.add_(0.5)
    changed, again = ask(lora)
    assert again == first and distance(changed, on) > 0.01
    assert distance(changed, ask(HFEngine(lora.model, lora.tokenizer, lora.spec))[0]) == 0
    assert ask(base)[0] == off and ask(base)[1] < first  # the base did not change


def test_one_set_of_leads_is_kept(shared_tiny: HFEngine) -> None:
    engine = HFEngine(shared_tiny.model, shared_tiny.tokenizer)
    assert engine.read_leads((" a b", True), [" c d", " e"]) == 2 + 3
    kept = engine.kept
    assert engine.read_leads((" a b", True), [" c d", " e"]) == 0 and engine.kept is kept
    assert engine.read_leads((" a b", True), [" c d"]) == 4 and engine.kept.layers[0][0].shape[2] == 2
    assert engine.read_leads((" a", True), [" c d"]) == 3 and "kept" not in repr(engine)


def test_leads_of_many_texts_are_read_in_parts(shared_tiny: HFEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    for n in (1, 3, 100):
        monkeypatch.setattr(qalign.engine, "_LEADS", n)
        engine = HFEngine(shared_tiny.model, shared_tiny.tokenizer)
        leads = Leads(tuple(f" {' a' * i} lead" for i in range(7)), (6, 2))
        said.append(engine.label_probs([[(" x", True), (" so", True)]], ["", ""], [ODD[0], ODD[2]], leads=leads))
    assert max(distance(said[0], x) for x in said[1:]) < TOLERANCE


def test_prefixes_that_leads_cannot_stand_in(shared_tiny: HFEngine) -> None:
    leads, a, b = Leads((" c",), (0,)), (" a", True), (" b", True)
    for prefixes in ([[a, b], [b, a]], [[a]]):
        with pytest.raises(ValueError, match="begin with the same segment and go on"):
            shared_tiny.label_probs(prefixes, ["?"], [ODD[0]], leads=leads)
    for prefixes, suffixes in (([[a, b], [b, a]], [""]), ([[a]], ["", "?"])):
        with pytest.raises(ValueError, match="one last token of all prefixes, and suffixes that are all empty or"):
            shared_tiny.label_probs(prefixes, suffixes, [ODD[0]] * len(suffixes))


def test_an_empty_suffix_is_the_end_of_the_prefix(shared_tiny: HFEngine) -> None:
    prefixes = [[*text(ids), (" so", True)] for ids in ([1, 2, 3], [4], [1, 2, 5, 6, 7])]
    got = shared_tiny.label_probs(prefixes, ["", ""], [ODD[1], ODD[2]])
    want = [[plain(shared_tiny, p, "", x) for x in (ODD[1], ODD[2])] for p in prefixes]
    assert distance(got, want) < TOLERANCE


@pytest.mark.parametrize("gates_first", [True, False])
def test_a_judge_with_the_rubric_first(hf: HFEngine, gates_first: bool) -> None:
    rubric = select(load_rubric("hhh"), dimensions=1, per_dimension=(1, 1))
    engine = HFEngine(hf.model, hf.tokenizer)
    judge = Judge(rubric, engine, layout="rubric_first", gates_first=gates_first)
    first, again = judge.score_many(PAIRS[:3]), judge.score_many(PAIRS[:3])
    assert [c.verdicts for c in first] == [c.verdicts for c in again]
    read = sum(c.tokens for c in first) - sum(c.tokens for c in again)
    assert read == sum(len(hf.tokens([(x, True)])) for x in (hf.frame(SYSTEM)[0], *map(judge_lead, rubric.questions)))
    alone = [Judge(rubric, engine, layout="rubric_first").score(*[p, [r]])[0] for p, r in PAIRS[:3]]
    for a, b in zip(alone, first, strict=True):
        said = {v.question_id: v.probs for v in b.verdicts}
        assert all(distance([[v.probs]], [[said[v.question_id]]]) < TOLERANCE for v in a.verdicts)


# what it costs


def test_tokens_read_of_the_judge(shared_tiny: HFEngine) -> None:
    "Per response: what was read for it alone; what several share is told once."
    tiny = shared_tiny
    prefixes, suffixes, labels = asked(tiny, PAIRS[:4])
    for rows in (2, 3):
        engine = HFEngine(tiny.model, tiny.tokenizer, rows=rows)
        with counted(engine) as counts:
            engine.label_probs(prefixes, suffixes[:2], labels[:2])
        assert sum(engine.tokens_read) == sum(counts) and min(engine.tokens_read) > 0
    with counted(tiny) as counts:
        tiny.label_probs(prefixes[3:], suffixes[:2], labels[:2])
    own = [len(tiny.tokens(prefixes[3])), *(len(tiny.tokens([(s, True)])) for s in suffixes[:2])]
    assert tiny.tokens_read == [sum(counts)] and sum(own) <= tiny.tokens_read[0] <= sum(own) + 6  # labels of two tokens


def test_skipping_is_cheaper_and_scores_the_same(hf: HFEngine) -> None:
    rubric = select(load_rubric("hhh"), dimensions=1, per_dimension=(1, 1))
    pairs = [("Why?", "Because of rain."), ("Why?", "No.")]
    few = Judge(rubric, hf).score_many(pairs)
    everything = Judge(rubric, hf, gates_first=False).score_many(pairs)
    assert [c.score for c in few] == [c.score for c in everything]
    skips = sum(len(rubric.questions) - len(c.verdicts) for c in few)
    assert skips > 0 and sum(c.tokens for c in few) < sum(c.tokens for c in everything)


# a training step is not touched


def state_of(model: Any) -> dict[str, Any]:
    return {
        "modes": {n: m.training for n, m in model.named_modules()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "random": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
    }


def same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    for key in ("modes", "flags", "random", "python"):
        assert a[key] == b[key], key
    for key in ("weights", "gradients"):
        assert all((v is b[key][n] is None) or torch.equal(v, b[key][n]) for n, v in a[key].items()), key


CHATS = [[{"role": "user", "content": "Say something."}], [{"role": "user", "content": "And now?"}]]
SCHEMA = reply_schema(QUESTIONS[0])


def work(engine: HFEngine) -> None:
    "Every kind of call."
    prefixes, suffixes, labels = asked(engine, PAIRS[:3])
    engine.label_probs(prefixes, suffixes, labels, after=[[], [0], [], [2], []])
    engine.label_probs(prefixes, suffixes, labels, leads=Leads(("Be kind.", "Be strict."), (0, 1, 0, 1, 0)))
    engine.replies(prefixes, suffixes[:1], [SCHEMA], [(0, 0), (1, 0)], max_tokens=4)
    engine.complete(CHATS, max_tokens=3, temperature=1.0, seed=5)
    engine.complete(CHATS[:1], max_tokens=3, schema=SCHEMA)


def loss_of(engine: HFEngine) -> Any:
    ids = torch.tensor([engine.tokens([("The sky is blue because of the air.", True)])])
    return engine.model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("adapter", [True, False])
def test_a_training_step_is_not_touched(lora: HFEngine, adapter: bool) -> None:
    lora.model.train()
    next(iter(lora.model.parameters())).requires_grad_(True)  # a base weight that someone trains as well
    torch.manual_seed(7)
    loss_of(lora).backward()
    undisturbed = [torch.rand(3).tolist(), loss_of(lora).item()]
    torch.manual_seed(7)
    lora.model.zero_grad()
    loss = loss_of(lora)  # dropout draws from the generator here
    before = state_of(lora.model)
    work(lora if adapter else lora.base())
    same_state(before, state_of(lora.model))
    loss.backward()
    assert [torch.rand(3).tolist(), loss_of(lora).item()] == undisturbed
    before = state_of(lora.model)  # now with gradients
    assert any(g is not None for g in before["gradients"].values())
    work(lora if adapter else lora.base())
    same_state(before, state_of(lora.model))


def test_modes_of_single_layers_are_put_back(lora: HFEngine) -> None:
    lora.model.train()
    lora.model.get_submodule("base_model.model.model.embed_tokens").eval()
    before = state_of(lora.model)
    work(lora)
    same_state(before, state_of(lora.model))


def test_an_error_puts_everything_back(lora: HFEngine) -> None:
    lora.model.train()
    before = state_of(lora.model)

    def fault(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    handle = lora.model.register_forward_pre_hook(fault, with_kwargs=True)
    for engine in (lora, lora.base()):
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.label_probs([text([1, 2])], [" so:"], [ODD[0]])
    handle.remove()
    same_state(before, state_of(lora.model))
    assert not any(getattr(m, "disable_adapters", False) is True for m in lora.model.modules())


def test_adapter_on_and_off(lora: HFEngine, folder: str) -> None:
    bare = HFEngine(*load_model(folder, "fp32"))
    prefixes, suffixes, labels = asked(lora, PAIRS[:3])
    start = bare.label_probs(prefixes, suffixes, labels)
    with_adapter = lora.label_probs(prefixes, suffixes, labels)
    assert distance(with_adapter, start) > 0.01
    assert distance(lora.base().label_probs(prefixes, suffixes, labels), start) < TOLERANCE
    assert distance(lora.label_probs(prefixes, suffixes, labels), with_adapter) == 0  # and on again
    said = lora.complete(CHATS, max_tokens=6)
    assert lora.base().complete(CHATS, max_tokens=6) == bare.complete(CHATS, max_tokens=6) != said
    assert lora.complete(CHATS, max_tokens=6) == said


def test_what_begins_after_the_base_was_taken_is_off_there_too(tiny: HFEngine) -> None:
    from peft import LoraConfig, get_peft_model

    prefixes, suffixes, labels = asked(tiny, PAIRS[:1])
    base = tiny.base()  # holds the model inside the peft model that comes now
    start = base.label_probs(prefixes, suffixes, labels)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tiny.model = get_peft_model(tiny.model, config)  # type: ignore[arg-type]
    before = state_of(tiny.model)
    assert distance(base.label_probs(prefixes, suffixes, labels), start) < TOLERANCE
    assert distance(tiny.label_probs(prefixes, suffixes, labels), start) > 0.01
    same_state(before, state_of(tiny.model))


def test_an_engine_in_evaluation_stays_there(tiny: HFEngine) -> None:
    tiny.model.eval()
    before = state_of(tiny.model)
    work(tiny)
    same_state(before, state_of(tiny.model))


# writing


def test_replies_fit_their_schemas_in_the_order_of_jobs(hf: HFEngine) -> None:
    prefixes, suffixes, _ = asked(hf, [("Name a prime.", "7"), ("Why?", "No.")])
    schemas = [reply_schema(q) for q in QUESTIONS]
    for schema in schemas:
        schema["properties"]["reason"]["maxLength"] = 12
    jobs = [(1, 3), (0, 0), (1, 3)]
    before = (hf.usage.requests, hf.usage.prompt_tokens, hf.usage.reply_tokens)
    said = hf.replies(prefixes, suffixes, schemas, jobs, max_tokens=48)
    read = [len(hf.tokens(prefixes[r])) + len(hf.tokens([(suffixes[i], True)])) for r, i in jobs]
    wrote = [len(hf.tokens([(str(x), True)])) for x in said]
    assert hf.usage.requests - before[0] == 3 and hf.usage.prompt_tokens - before[1] == sum(read)
    assert min(wrote) * 3 <= hf.usage.reply_tokens - before[2] <= 3 * 48
    for (_, i), reply in zip(jobs, said, strict=True):
        row = json.loads(str(reply))
        assert list(row) == ["reason", "label"] and 1 <= len(row["reason"]) <= 12
        assert row["label"] in LABELS[QUESTIONS[i].kind]
    assert said[0] == said[2]


def test_replies_of_many_jobs_keep_their_places(shared_tiny: HFEngine) -> None:
    prefixes = [text([i, i + 1]) for i in range(5)]
    schemas = [{"type": "object", "properties": {k: {"enum": [0, 1, 2]}}, "required": [k]} for k in "abc"]
    schemas = [{**s, "additionalProperties": False} for s in schemas]
    jobs = [(r, i) for r in range(5) for i in range(3)]
    random.Random(0).shuffle(jobs)
    engine = HFEngine(shared_tiny.model, shared_tiny.tokenizer, batch=2)
    said = engine.replies(prefixes, [" x:", " y:", " z:"], schemas, jobs, max_tokens=12)
    assert [list(json.loads(str(x))) for x in said] == [["abc"[i]] for _, i in jobs]
    one_by_one = [shared_tiny.replies(prefixes, [" x:", " y:", " z:"], schemas, [j], max_tokens=12)[0] for j in jobs]
    assert said == one_by_one and len(set(map(str, said))) > 3


def test_a_reply_that_is_cut_short_comes_as_it_is(shared_tiny: HFEngine) -> None:
    [said] = shared_tiny.replies([text([1])], ["?"], [SCHEMA], [(0, 0)], max_tokens=3)
    assert isinstance(said, str) and said.startswith("{")
    with pytest.raises(json.JSONDecodeError):
        json.loads(said)


def test_the_same_seed_gives_the_same_replies(tiny: HFEngine) -> None:
    chats = [[{"role": "user", "content": f"Say {i}."}] for i in range(5)]

    def say(seed: int = 3, temperature: float = 1.0, batch: int = 32) -> list[str]:
        engine = HFEngine(tiny.model, tiny.tokenizer, batch=batch)
        return engine.complete(chats, max_tokens=8, temperature=temperature, top_p=0.95, seed=seed)

    first = say()
    torch.rand(5)  # what the process drew before does not matter
    assert say() == first and say(seed=4) != first
    assert say(temperature=0) == say(seed=4, temperature=0) == say(temperature=0, batch=2)
    tiny.model.train()
    assert say() == first  # no dropout


def test_complete_with_openings_and_schema(hf: HFEngine) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    schema["additionalProperties"] = False
    before = hf.usage.requests
    [said] = hf.complete([[{"role": "user", "content": "Name a prime."}]], max_tokens=16, schema=schema)
    assert isinstance(json.loads(said)["n"], int)
    [rest] = hf.complete([[{"role": "user", "content": "Count."}]], max_tokens=6, openings=["One, two, three,"])
    assert not rest.startswith("One") and "four" in rest and hf.usage.requests == before + 2


def test_usage_counts_every_reply(tiny: HFEngine) -> None:
    chats = [[{"role": "user", "content": "word " * n}] for n in (1, 5, 20)]
    said = tiny.complete(chats, max_tokens=5)
    read = sum(len(tiny.tokens([(tiny.render(c), True)])) for c in chats)
    assert (tiny.usage.requests, tiny.usage.prompt_tokens) == (3, read) and len(said) == 3
    assert 0 < tiny.usage.reply_tokens <= 15
    tiny.label_probs([text([1])], ["?"], [ODD[0]])
    assert tiny.usage.requests == 3  # labels are counted by tokens_read
    assert HFEngine(tiny.model, tiny.tokenizer).usage.requests == 0  # each engine its own


def test_a_reply_depends_on_nothing_the_model_brings(folder: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    brought = {"repetition_penalty": 50.0, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(100, 40_000))}
    path.write_text(json.dumps(json.loads(path.read_text()) | brought | {"eos_token_id": [2, 5]}))
    plain_, other = (HFEngine(*load_model(x, "fp32")) for x in (folder, str(tmp_path / "m")))
    assert other.model.generation_config.eos_token_id == [2, 5]
    assert other.complete(CHATS, max_tokens=12) == plain_.complete(CHATS, max_tokens=12)
    assert other.complete(CHATS, 12, 1.0, seed=3) == plain_.complete(CHATS, 12, 1.0, seed=3)


def test_a_prompt_longer_than_the_model_is_an_error_of_its_row(shared_tiny: HFEngine) -> None:
    prefixes = [text([i] * n) for i, n in ((1, 5), (2, 60), (3, 9), (4, 58))]
    labels, after = [GATED, ODD[1]], [(), (0,)]
    want = shared_tiny.label_probs([prefixes[0], prefixes[2]], [" so:", " thus it is:"], labels, after=after)
    config = shared_tiny.model.config
    longest, config.max_position_embeddings = config.max_position_embeddings, 63
    try:
        got = shared_tiny.label_probs(prefixes, [" so:", " thus it is:"], labels, after=after)
    finally:
        config.max_position_embeddings = longest
    assert distance([got[0], got[2]], want) < TOLERANCE
    for row in (got[1], got[3]):
        assert all(re.search(r"a prompt has 6\d tokens, the model takes 63", str(x)) for x in row)
    assert shared_tiny.tokens_read[1] == shared_tiny.tokens_read[3] == 0 < min(shared_tiny.tokens_read[::2])


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_sliding_window_is_exact_inside_and_an_error_beyond(tokenizer: Any, family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "sliding_window": 40}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, initializer_range=0.3, pad_token_id=0, **sizes)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    engine = HFEngine(model, tokenizer, "hf:m", rows=2)
    prefixes, suffixes = [text([1] * 20), text([2] * 5), text([3, 4] * 10)], [f" question {i} so:" for i in range(9)]
    got = engine.label_probs(prefixes, suffixes, [ODD[i % 3] for i in range(9)])  # all of them at once do not fit
    for p, row in zip(prefixes, got, strict=True):
        assert distance([row], [[plain(engine, p, s, ODD[i % 3]) for i, s in enumerate(suffixes)]]) < 1e-4
    leads = Leads(tuple(f" lead one two {i}" for i in range(9)), (0, 5, 8))
    led_by = [[(" a b", True), *text([1, 2, 3]), (" so", True)]]
    [row] = engine.label_probs(led_by, [""] * 3, ODD, leads=leads)
    for i, answer in enumerate(row):
        assert log_distance(answer, led(engine, led_by[0], leads, i, "", ODD[i])) < 1e-4
    short, long = text([1] * 5), text([1] * 38)
    beside = engine.label_probs([short, long], suffixes, [ODD[i % 3] for i in range(9)])
    alone = engine.label_probs([short], suffixes, [ODD[i % 3] for i in range(9)])
    assert distance(beside[:1], alone) < TOLERANCE and engine.tokens_read[0] > 0
    said = "a prompt has 4\\d tokens, the model looks back over 40: judge with one without a sliding window"
    assert all(isinstance(x, EngineError) and re.fullmatch(said, str(x)) for x in beside[1])
    rows = engine.label_probs([long, long], suffixes[:1], [ODD[1]])
    assert [isinstance(x, EngineError) for row in rows for x in row] == [True, True]


@pytest.mark.parametrize("family", ["gemma3n_text", "qwen3_next", "mamba2", "falcon_h1", "deepseek_v32", "nobody"])
def test_what_keeps_no_keys_of_its_own_in_every_layer_is_refused(family: str) -> None:
    from transformers import AutoConfig, LlamaConfig

    if family == "nobody":  # a state that the cache does not tell of
        model = SimpleNamespace(config=LlamaConfig(num_hidden_layers=2), _is_stateful=True)
    else:
        model = SimpleNamespace(config=AutoConfig.for_model(family))
    with pytest.raises(UserError, match="does not keep keys and values of its own in every layer") as fault:
        qalign.engine._window(model)
    assert "\n" not in str(fault.value) and model.config.model_type in str(fault.value)


def test_a_model_that_also_sees_is_judged_by_its_text_part(tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM, Gemma3Config

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {**sizes, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "pad_token_id": 0}
    words |= {"initializer_range": 0.3, "max_position_embeddings": 50}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Gemma3Config(text_config=words, vision_config={**sizes, "image_size": 28, "patch_size": 14})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    engine = HFEngine(model, tokenizer)
    prefixes = [text([1, 2, 3]), text([4] * 9), text([4] * 60)]
    got = engine.label_probs(prefixes, [" so:", " thus:"], [ODD[0], ODD[2]])
    for p, row in zip(prefixes[:2], got, strict=False):
        assert distance([row], [[plain(engine, p, x, ODD[2 * i]) for i, x in enumerate((" so:", " thus:"))]]) < 1e-4
    assert all("the model takes 50" in str(x) for x in got[2])
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    [said] = engine.replies([text([1])], ["?"], [schema], [(0, 0)], max_tokens=16)
    assert json.loads(str(said))["n"] in (1, 2)


# untrusted text


def test_control_tokens_of_untrusted_text_are_plain_text(hf: HFEngine) -> None:
    special = hf.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert hf.tokens([("<|im_end|>", True)]) == [special]
    ids = hf.tokens([("a<|im_end|>b <|im_start|>", False)])
    assert not set(ids) & set(hf.tokenizer.all_special_ids) and hf.tokenizer.decode(ids) == "a<|im_end|>b <|im_start|>"


def unigram(pieces: Sequence[str], special: Sequence[str]) -> Any:
    "A tokenizer of whole pieces, some of which are control tokens."
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["▁", *(chr(c) for c in range(33, 127))]
    made = Tokenizer(models.Unigram([("<unk>", 0.0), *((x, -1.0) for x in (*special, *pieces, *letters))], unk_id=0))
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=special[0], unk_token="<unk>")


@pytest.mark.parametrize("said", ["hi</s> you", "</s>", "hi <start> </s></s>", "hi\uff1c/s\uff1e", "hi é</s>"])
def test_control_pieces_of_a_vocabulary_are_spelt(said: str) -> None:
    tokenizer = unigram(["▁hi", "▁you"], ["</s>", "<start>"])
    control = set(tokenizer.convert_tokens_to_ids(["</s>", "<start>"]))
    assert tokens_of(tokenizer, [("hi</s>", True)])[-1] in control
    ids = tokens_of(tokenizer, [(said, False)])
    assert not set(ids) & control and (tokenizer.unk_token_id in ids) == ("é" in said)
    assert tokenizer.decode(ids).replace(" ", "").count("</s>") == max(1, said.count("</s>"))
    assert tokens_of(tokenizer, [("hi you", False)]) == tokens_of(tokenizer, [("hi you", True)])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('System role not supported') }}", r"refuses .* \(System role not supported\): choose"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "writes a user message 2 times: choose"),
        ("{{ messages[0].content }}", "writes a user message 0 times: choose"),
    ],
)
def test_templates_that_cannot_judge_are_named(hf: HFEngine, template: str, said: str) -> None:
    tokenizer = copy.deepcopy(hf.tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"chat template of '.*smollm2.*' {said} another model"):
        frame_of(tokenizer, "Be brief.")


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = "<|im_end|>\n<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("end", "tail"),
    [
        ("<|im_start|>assistant\n", ASK),
        (
            "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
            "<think>\n\n</think>\n\n{% endif %}",
            ASK + EMPTY,
        ),
        ("<|im_start|>assistant\n<think>\n", ASK + EMPTY),
        ("<|im_start|>assistant\n<think>", ASK + EMPTY),
        ("<|start|>assistant", "<|im_end|>\n<|start|>assistant<|channel|>final<|message|>"),
    ],
)
def test_a_frame_ends_where_an_answer_stands(tokenizer: Any, end: str, tail: str) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = f"{TURNS}{{% if add_generation_prompt %}}{end}{{% endif %}}"
    assert frame_of(other, "Be brief.") == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n", tail)


def test_the_frame_of_the_embedded_model_is_its_template(tokenizer: Any) -> None:
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "|"}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert "|".join(frame_of(tokenizer, SYSTEM)) == whole


@pytest.mark.parametrize(
    ("today", "told"),
    [
        ("Current date: {{ strftime_now('%Y-%m-%d') }}", "Current date: 2024-07-26"),
        ("Today Date: {{ strftime_now('%d %B %Y') }}", "Today Date: 26 Jul 2024"),
        (
            "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
            "It is {{ date_string }}",
            "It is 26 Jul 2024",
        ),
    ],
)
def test_a_frame_tells_the_same_date_every_day(tokenizer: Any, today: str, told: str) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = f"{today}\n{TURNS}"
    assert frame_of(other, "Be brief.")[0].startswith(f"{told}\n<|im_start|>system")


def test_a_policy_is_told_the_same_date_every_day(tokenizer: Any) -> None:
    ours = "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    chat, other = [{"role": "user", "content": "Hi."}], copy.deepcopy(tokenizer)
    other.chat_template = f"{ours}{{{{ date_string }}}} {TURNS}"
    assert not other.apply_chat_template(chat, tokenize=False).startswith("26 Jul 2024 ")
    other.chat_template = qalign.engine._dated(other.chat_template)
    assert other.apply_chat_template(chat, tokenize=False).startswith("26 Jul 2024 ")
    assert qalign.engine._dated(None) is None
    assert qalign.engine._dated(tokenizer.chat_template) == tokenizer.chat_template


# who it is


def test_the_revision_of_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def identity(name: str, **noted: str) -> dict[str, str]:
        model = SimpleNamespace(config=SimpleNamespace(_name_or_path=name, **noted), dtype=torch.float32)
        return HFEngine(model, None, spec="hf:x").identity()

    commit = "0123456789abcdef" * 2 + "01234567"
    files = tmp_path / "models--org--model"
    (files / "snapshots" / commit).mkdir(parents=True)
    (files / "snapshots" / commit / "config.json").write_text("{}")
    (files / "refs").mkdir()
    (files / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert identity("org/model") == {"spec": "hf:x", "revision": commit, "precision": "float32"}
    assert identity("org/model", _commit_hash="c0ffee")["revision"] == "c0ffee"
    assert identity("org/other")["revision"] == identity("")["revision"] == "None"


def test_identity_is_stable_and_tells_weights_apart(hf: HFEngine, folder: str, tmp_path: Path) -> None:
    one = HFEngine(*load_model(folder, "fp32"), spec="hf:x")
    assert one.identity() == one.identity() == HFEngine(*load_model(folder, "fp32"), spec="hf:x").identity()
    same = HFEngine(*load_model(save_tiny(tmp_path / "same", hf.tokenizer, 0), "fp32"), spec="hf:x")
    other = HFEngine(*load_model(save_tiny(tmp_path / "other", hf.tokenizer, 1), "fp32"), spec="hf:x")
    assert same.identity() == one.identity() != other.identity()
    assert other.identity()["spec"] == "hf:x" and len(other.identity()["weights"]) == 16
    assert HFEngine(one.model, one.tokenizer, spec="hf:y").identity() != one.identity()
    assert hf.identity()["spec"] == "smollm2" and json.dumps(hf.identity())


def test_identity_tells_an_adapter_from_its_base(lora: HFEngine, tiny: HFEngine) -> None:
    prefixes, suffixes, labels = asked(lora, PAIRS[:1])
    on, off = (e.label_probs(prefixes, suffixes, labels) for e in (lora, lora.base()))
    assert distance(on, off) > 0.01
    assert lora.identity() != lora.base().identity()  # their verdicts must not share a cache key
    assert lora.base().identity() == HFEngine(*load_model(tiny.spec[3:], "fp32"), spec=tiny.spec).identity()


def test_identity_tells_precisions_apart(folder: str) -> None:
    engines = [HFEngine(*load_model(folder, q), spec="hf:x") for q in ("fp32", "none")]
    prefixes, suffixes, labels = asked(engines[0], PAIRS[:1])
    full, half = (e.label_probs(prefixes, suffixes, labels) for e in engines)
    assert distance(full, half) > 1e-4
    assert engines[0].identity() != engines[1].identity()  # their verdicts must not share a cache key


def test_weights_of_every_format_are_hashed(tmp_path: Path) -> None:
    def of(**files: str) -> str:
        folder = tmp_path / "-".join([*files, *files.values()])
        folder.mkdir()
        for name, data in files.items():
            (folder / name.replace("_", ".")).write_text(data)
        return weights_hash(str(folder))

    assert of(a_safetensors="x") != of(a_safetensors="y") != of(a_bin="x") != of(a_bin="y")
    assert of(a_safetensors="x", training_bin="y") == of(a_safetensors="x", training_bin="z")  # not read with these
    with pytest.raises(UserError, match=r"no weights in .*: expected \*\.safetensors or \*\.bin there"):
        of(config_json="{}")


def test_an_adapter_is_no_model(lora: HFEngine, folder: str, tmp_path: Path) -> None:
    lora.model.save_pretrained(tmp_path)
    lora.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=f"is an adapter over '{folder}': give hf:{folder} as the model and the folder as"
    ):
        load_engine(f"hf:{tmp_path}", "fp32")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot load model '.*': ") as fault:
        load_model(str(tmp_path))
    assert "\n" not in str(fault.value)


def test_only_a_classifier_may_lack_a_chat_template(hf: HFEngine, tmp_path: Path) -> None:
    bare = copy.deepcopy(hf.tokenizer)
    bare.chat_template = None
    folder = save_tiny(tmp_path, bare, 0)
    with pytest.raises(UserError, match="has no chat template"):
        load_engine(f"hf:{folder}", "fp32")
    engine = load_engine(f"hf:{folder}", "fp32", chat=False)
    [[answer]] = engine.label_probs([[("Is it?", False)]], ["\n"], [["yes", "no"]])
    assert sum(answer.values()) == pytest.approx(1)


def test_weights_of_another_name_are_refused():
    with pytest.raises(UserError, match=r"expected quantization none \(bf16\), nf4 or fp32, got '4bit'"):
        load_model("nowhere", "4bit")


@pytest.mark.parametrize("cpu", [True, False])
def test_vllm_is_given_a_share_of_the_gpu_and_its_faults_are_one_line(
    monkeypatch: pytest.MonkeyPatch, cpu: bool
) -> None:
    from qalign.vllm_engine import load_vllm

    asked: list[dict[str, Any]] = []

    def start(**options: Any) -> None:
        asked.append(options)
        raise RuntimeError("Engine core initialization failed.\nSee root cause above.")

    fake, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    fake.__spec__ = ModuleSpec("vllm", None)
    vars(fake)["LLM"] = start
    vars(platforms)["current_platform"] = SimpleNamespace(is_cpu=lambda: cpu)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    for more in ({}, {"memory": 0.7}):
        with pytest.raises(
            UserError, match=r"vLLM cannot load 'smollm2': Engine core initialization failed\. See root"
        ):
            load_vllm("vllm:smollm2", **more)
    assert [x.get("gpu_memory_utilization") for x in asked] == ([None, None] if cpu else [0.4, 0.7])
    with pytest.raises(UserError, match="takes quantization none or fp32, got 'nf4'"):
        load_engine("vllm:smollm2", "nf4")
