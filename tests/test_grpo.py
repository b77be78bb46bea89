"Room grpo: what TRL is told, exact resume after SIGKILL, faults that leave the last good checkpoint, TRL's own way in."

import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import qalign.grpo as grpo
import qalign.reward as reward_room
from qalign.core import UserError, append_jsonl, load_settings, presets, read_jsonl, write_jsonl
from qalign.grpo import (
    argument_table,
    cadence,
    check_grpo,
    find_checkpoint,
    grpo_arguments,
    lr_warning,
    micro_batch,
    prompt_order,
    rewind,
    run_identity,
    train_grpo,
)
from qalign.judge import Scorecard
from qalign.pool import pool
from qalign.prompts import Prompt
from qalign.reward import group_advantages
from qalign.rubric import Dimension, Principle, Question, Rubric, Verdict
from qalign.trace import Trace

CALM = hypothesis_settings(derandomize=True, max_examples=50, deadline=None)
PRINCIPLES = ("harmlessness", "helpfulness", "honesty")
RUBRIC = Rubric("toy", tuple(Principle(p, (Dimension(p[:3], (Question(p[:4], "graded", "?"),)),)) for p in PRINCIPLES))
PROMPTS = [Prompt(f"p{i}", f"request {i}") for i in range(5)]
MICRO = {
    "quantization": "none",
    "lora_r": 4,
    "lr": 1e-3,
    "kl": 0.1,
    "prompts_per_step": 2,
    "group_size": 3,
    "micro_batch": 3,
    "completion_tokens": 8,
    "temperature": 1.0,
    "scores": "hard",
}
PLAIN = {**MICRO, "grpo_steps": 6}  # one generation a step; six steps are three passes over the prompts
FOUR_BIT = {**PLAIN, "quantization": "nf4", "lr": 1e-5, "grpo_steps": 3}
EIGHT_BIT = {**PLAIN, "optimizer": "paged_adamw_8bit", "grpo_steps": 4}
REUSED = {**MICRO, "grpo_steps": 10, "steps_per_generation": 2, "num_iterations": 2}  # one generation in four steps


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class StubJudge:
    "Grades drawn from the text itself; `on_call` is told the number of each call."

    def __init__(self, on_call=lambda n: None):
        self.rubric, self.calls, self.on_call = RUBRIC, 0, on_call

    def score_many(self, pairs):
        self.calls += 1
        self.on_call(self.calls)
        return [self.card(*pair) for pair in pairs]

    def card(self, prompt, response):
        rng = random.Random(f"{prompt}|{response}")
        said = tuple(Verdict(q.id, rng.choice("ABCDF")) for q in RUBRIC.questions)
        return Scorecard(prompt, response, said, pool(RUBRIC, said), tokens=1, seconds=0.0)


def micro_model(settings):
    from qalign.bench import shape_engine
    from qalign.sft import add_adapter

    engine = shape_engine("micro", "nf4" if settings.quantization == "nf4" else "fp32")
    return add_adapter(engine.model, settings), engine.tokenizer


def any_text_is_a_transcript() -> None:
    "A model with random weights writes no transcripts: take the halves of what it writes, of any length."
    import qalign.reward as reward

    score = reward._score
    reward._score = lambda judge, s, prompts, done, ids, cut, first: score(judge, s, prompts, done, ids, (), first)
    reward.parse_trace = lambda text: Trace(
        text[: len(text) // 2] or "a", "Wait.", text[len(text) // 2 :] or "b", True, ""
    )


def hook(point: str, n: int, run: Path) -> dict:
    "Kill this process at the n-th time it passes a point."
    seen = {"n": 0}

    def pass_by(*_):
        seen["n"] += 1
        if seen["n"] == n:
            die()

    out = {"judge": lambda number: None, "log": lambda row: None}
    if point == "judge":
        out["judge"] = pass_by
    elif point == "log":

        def torn(row):
            if seen["n"] + 1 == n:
                with open(run / "metrics.jsonl", "a") as f:
                    f.write('{"stage": "grpo", "st')
            pass_by()

        out["log"] = torn
    elif point == "generated":
        import trl

        generate = trl.GRPOTrainer._generate
        trl.GRPOTrainer._generate = lambda self, prompts: (generate(self, prompts), pass_by())[0]
    elif point == "saving":  # files are written, the seal is not
        grpo._seal = pass_by
    elif point == "saved":
        replace = os.replace
        os.replace = lambda a, b: (replace(a, b), "checkpoint-" in Path(b).name and pass_by())[0]
    return out


def no_memory(n: int, at: int) -> None:
    import torch

    if n == at:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def breaks(point: str, n: int) -> dict:
    "Something goes wrong, once, at the n-th call of the judge or in step n."
    out = {"judge": lambda number: None, "log": lambda row: None}
    if point == "judge dies":

        def dead(number):
            if number == n:
                raise ConnectionError("connection refused")

        out["judge"] = dead
    elif point == "memory":
        out["judge"] = lambda number: no_memory(number, n)
    elif point == "nan":
        import trl

        loss = trl.GRPOTrainer.compute_loss
        bad = lambda self: math.nan if self.state.global_step == n - 1 else 1.0  # noqa: E731
        trl.GRPOTrainer.compute_loss = lambda self, *a, **k: loss(self, *a, **k) * bad(self)
    elif point == "disk":
        seal = grpo._seal

        def full(folder, about):
            if about["step"] == n:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            try:
                (folder / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes())
                seal(folder, about)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        grpo._seal = full
    return out


def restless(model, tokenizer):
    "Canaries that sample from the policy and draw random numbers from everywhere."
    import numpy as np
    import torch

    from qalign.engine import HFEngine

    HFEngine(model, tokenizer).complete([[{"role": "user", "content": "hello"}]], max_tokens=4, temperature=1.0, seed=7)
    torch.rand(3), np.random.rand(3), random.random()
    return [{"refusal": True, "helpfulness": 0.5}, {"refusal": False, "helpfulness": None}]


def job(run: str, overrides: dict, kill=(), resume=False, fault=(), canaries=False, unguarded=False) -> None:
    "Train in this process; what came out is in final.json."
    import torch

    torch.set_num_threads(1)
    folder, settings = Path(run), load_settings("tiny", **overrides)
    folder.mkdir(exist_ok=True)
    any_text_is_a_transcript()
    if unguarded:
        grpo.cadence = lambda settings: settings.save_steps
    model, tokenizer = micro_model(settings)
    hooks = hook(*kill, folder) if kill else breaks(*(fault or ("", 0)))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n}
    random.seed(len(run))  # what this process drew before must not matter
    torch.manual_seed(len(run))
    said: list[str] = []

    def log(row):
        hooks["log"](row)
        append_jsonl(folder / "metrics.jsonl", {"stage": "grpo", **row})

    error = ""
    try:
        judge = StubJudge(hooks["judge"])
        asked = (lambda: restless(model, tokenizer)) if canaries else None
        train_grpo(model, tokenizer, judge, PROMPTS, settings, folder, log, said.append, resume, asked)
    except UserError as e:
        error = str(e)
    digest, moved = hashlib.sha256(), 0.0
    for name, p in sorted(model.named_parameters()):
        if ".default." in name:
            digest.update(str(p.dtype).encode() + p.detach().float().numpy().tobytes())
            moved += float(p.detach().float().abs().sum()) if "lora_B" in name else 0.0
    now = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    out = {"adapter": digest.hexdigest(), "moved": moved, "error": error, "said": said}
    out["dtypes"] = sorted({str(p.dtype) for p in now.values()})
    out["still"] = float(torch.cat([(now[n] == p).flatten().float() for n, p in before.items()]).mean())
    (folder / "final.json").write_text(json.dumps(out))


@pytest.fixture(scope="module")
def children():
    "Real child processes, forked from a server that has imported the heavy packages once."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "trl", "peft", "datasets", "qalign.grpo", "qalign.bench"])

    def run(*args, **kwargs):
        process = context.Process(target=job, args=args, kwargs=kwargs)
        process.start()
        process.join(240)
        assert process.exitcode is not None, "the child hangs"
        return process.exitcode

    return run


@pytest.fixture(scope="module")
def whole(children, tmp_path_factory):
    "Uninterrupted runs, made once each."
    made: dict[str, Path] = {}

    def get(overrides: dict) -> Path:
        key = json.dumps(overrides)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            assert children(str(made[key]), overrides) == 0
        return made[key]

    return get


def records(run: Path) -> dict:
    from qalign.reward import read_credit

    final = json.loads((run / "final.json").read_text())
    rows = {name: list(read_jsonl(run / f"{name}.jsonl")) for name in ("metrics", "traces")}
    alarms = list(read_jsonl(run / "alarms.jsonl")) if (run / "alarms.jsonl").exists() else []
    steps = [(r["step"], r["stage"]) for r in read_jsonl(run / "timings.jsonl") if r["stage"] != "grpo/save"]
    credit = read_credit(run).drop(columns=["run", "seconds"]).to_dict("records")
    return {**rows, "adapter": final["adapter"], "alarms": alarms, "steps": steps, "credit": credit}


def test_gpus_that_nobody_launched_processes_for_are_left_alone(monkeypatch, tmp_path):
    from transformers import TrainingArguments

    from qalign.sft import _sft_arguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    assert grpo_arguments(load_settings("tiny"), tmp_path)._n_gpu == 1
    assert _sft_arguments(load_settings("tiny"), tmp_path, 64)._n_gpu == 1


def killed_and_resumed(children, run: Path, overrides: dict, kill: tuple) -> dict:
    assert children(str(run), overrides, kill) == -signal.SIGKILL
    assert not (run / "final.json").exists()
    assert children(str(run), overrides, resume=True) == 0
    assert json.loads((run / "final.json").read_text())["error"] == ""
    return records(run)


def equal(a: dict, b: dict) -> None:
    for key in a:
        assert repr(a[key]) == repr(b[key]), key  # repr: a NaN equals itself


# ---- resume


@pytest.mark.parametrize("kill", [("judge", 4), ("saving", 3)])
def test_a_killed_run_resumes_to_the_same_adapter(children, whole, tmp_path, kill):
    straight = whole(PLAIN)
    assert json.loads((straight / "final.json").read_text())["moved"] > 0.01  # there is something to be equal
    equal(records(straight), killed_and_resumed(children, tmp_path / "run", PLAIN, kill))


@pytest.mark.slow
@pytest.mark.parametrize("kill", [("generated", 2), ("judge", 3), ("log", 6), ("saving", 2), ("saved", 2)])
def test_resume_with_reused_generations(children, whole, tmp_path, kill):
    equal(records(whole(REUSED)), killed_and_resumed(children, tmp_path / "run", REUSED, kill))


@pytest.mark.slow
def test_resume_over_a_4_bit_base(children, whole, tmp_path):
    equal(records(whole(FOUR_BIT)), killed_and_resumed(children, tmp_path / "run", FOUR_BIT, ("log", 3)))


@pytest.mark.slow
def test_resume_with_states_in_8_bits(children, whole, tmp_path):
    equal(records(whole(EIGHT_BIT)), killed_and_resumed(children, tmp_path / "run", EIGHT_BIT, ("log", 3)))


def test_an_adapter_over_a_4_bit_base_is_trained_in_float32(whole):
    "TRL would round it to bf16, where a step of this size changes hardly any weight."
    final = json.loads((whole(FOUR_BIT) / "final.json").read_text())
    assert final["dtypes"] == ["torch.float32"] and final["still"] < 0.01


@pytest.mark.slow
def test_three_kills_from_outside(tmp_path, children, whole):
    run, context = tmp_path / "run", multiprocessing.get_context("forkserver")
    for lines in (2, 4, 5):  # rows there are when the kill comes, at whatever the child is doing then
        process = context.Process(target=job, args=(str(run), PLAIN), kwargs={"resume": True})
        process.start()
        deadline = time.time() + 120
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < lines:
            assert process.is_alive() and time.time() < deadline
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert children(str(run), PLAIN, resume=True) == 0
    equal(records(whole(PLAIN)), records(run))


@pytest.mark.slow
def test_why_checkpoints_fall_on_generations(children, whole, tmp_path):
    run = tmp_path / "run"  # with a checkpoint in the middle of a generation, resume is another run
    assert children(str(run), REUSED, ("saved", 2), unguarded=True) == -signal.SIGKILL
    assert children(str(run), REUSED, resume=True, unguarded=True) == 0
    assert records(run)["adapter"] != records(whole(REUSED))["adapter"]


# ---- faults


def final(run: Path) -> dict:
    return json.loads((run / "final.json").read_text())


def steps_left(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "trainer").iterdir())


def test_nan_and_a_torn_checkpoint(children, whole, tmp_path):
    run = tmp_path / "run"
    assert children(str(run), PLAIN, fault=("nan", 5)) == 0
    error = final(run)["error"]
    assert "GRPO stopped in step 5: the loss is not a number" in error and "checkpoint of step 4 stands" in error
    assert "\n" not in error and steps_left(run) == ["checkpoint-3", "checkpoint-4"]
    torn = run / "trainer" / "checkpoint-4" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:-100])
    (run / "final.json").unlink()
    assert children(str(run), PLAIN, resume=True) == 0
    said = final(run)["said"]
    assert said[:2] == [
        "checkpoint-4 is passed over: optimizer.pt is not what was written",
        "GRPO goes on after step 3",
    ]
    equal(records(whole(PLAIN)), records(run))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, says",
    [
        (("judge dies", 4), "GRPO stopped in step 4: connection refused (the checkpoint of step 3 stands)"),
        (("judge dies", 1), "GRPO stopped in step 1: connection refused (there is no checkpoint yet)"),
        (("memory", 3), "GRPO stopped in step 3: memory ran out: lower generate_batch, micro_batch or judge_chunk"),
        (("disk", 3), "the checkpoint of step 3 could not be written (OSError: [Errno 27] File too large)"),
    ],
)
def test_faults_are_one_line_and_resume_exactly(children, whole, tmp_path, fault, says):
    run = tmp_path / "run"
    assert children(str(run), PLAIN, fault=fault) == 0
    assert says in final(run)["error"] and "\n" not in final(run)["error"]
    assert fault[0] != "disk" or steps_left(run) == ["checkpoint-1", "checkpoint-2"]
    assert children(str(run), PLAIN, resume=True) == 0
    equal(records(whole(PLAIN)), records(run))


@pytest.mark.slow
def test_a_stop_rule_ends_the_run_and_a_resumed_one_ends_there_too(children, tmp_path):
    run, overrides = tmp_path / "run", {**PLAIN, "stop_truncated": 0.5}
    assert children(str(run), overrides) == 0
    before = records(run)
    assert [r["step"] for r in before["metrics"]] == [1, 2, 3]
    assert [a["rule"] for a in before["alarms"] if a["stop"]] == ["stop_truncated"]
    assert "stop_truncated = 0.5" in final(run)["said"][-1]
    assert children(str(run), overrides, resume=True) == 0
    equal(before, records(run))


def test_what_a_resume_may_change_has_an_effect(tmp_path, monkeypatch):
    "The cadence of checkpoints from there on; a stop rule that has been reached speaks, once, and ends the run."
    for name in ("_score", "parse_trace"):
        monkeypatch.setattr(reward_room, name, getattr(reward_room, name))  # put back at the end
    any_text_is_a_transcript()

    def go(run, stop_at=0, resume=False, **changes):
        settings, said = load_settings("tiny", **{**PLAIN, "grpo_steps": 8, "save_steps": 3, **changes}), []

        def log(row):
            if row["step"] == stop_at:
                raise UserError("power cut")
            append_jsonl(run / "metrics.jsonl", {"stage": "grpo", **row})

        with pytest.raises(UserError, match="power cut") if stop_at else contextlib.nullcontext():
            train_grpo(*micro_model(settings), StubJudge(), PROMPTS, settings, run, log, said.append, resume)
        return said

    run, ended = tmp_path / "run", tmp_path / "ended"
    go(run, stop_at=6)
    shutil.copytree(run, ended)
    assert "GRPO goes on after step 3" in go(run, resume=True, save_steps=1)
    assert [r["step"] for r in read_jsonl(run / "timings.jsonl") if r["stage"] == "grpo/save"] == [3, 4, 5, 6, 7, 8]
    said = go(ended, resume=True, stop_truncated=0.5)
    [rule] = [a for a in read_jsonl(ended / "alarms.jsonl") if a["stop"]]
    assert (rule["rule"], rule["step"]) == ("stop_truncated", 3) and rule["text"] in said
    assert not [line for line in said if line.startswith("GRPO goes on")]
    go(ended, resume=True, stop_truncated=0.5)
    assert [r["step"] for r in read_jsonl(ended / "metrics.jsonl")] == [1, 2, 3]
    assert len([a for a in read_jsonl(ended / "alarms.jsonl") if a["stop"]]) == 1


def test_canaries_change_nothing(children, whole, tmp_path):
    run = tmp_path / "run"
    assert children(str(run), {**PLAIN, "canary_steps": 2}, canaries=True) == 0
    straight, mine = records(whole(PLAIN)), records(run)
    assert straight["adapter"] == mine["adapter"]
    assert [r["step"] for r in mine["metrics"] if "benign_refusals" in r] == [1, 3, 5]
    assert {r["benign_refusals"] for r in mine["metrics"] if "benign_refusals" in r} == {0.5}


# ---- one run, watched


class Tracker:
    "Stands where a tracker's callback would, and keeps what it is told."

    rows: list[dict] = []  # noqa: RUF012

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append({"step": state.global_step, **logs})


class MuteJudge(StubJudge):
    "Cannot read one revision of each group, for too many of its verdicts failed."

    def score_many(self, pairs):
        cards = super().score_many(pairs)
        for i in range(3, len(cards), 2 * MICRO["group_size"]):  # draft and revision stand side by side
            said = tuple(Verdict(q.id, None, status="failed") for q in RUBRIC.questions)
            cards[i] = Scorecard(*pairs[i], said, pool(RUBRIC, said), tokens=1, seconds=0.0)
        return cards


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    "Three steps with a judge that is mute at times, canaries, a tracker, and the advantages that TRL computed."
    import trl
    from transformers.integrations import integration_utils

    run, told = tmp_path_factory.mktemp("watched"), SimpleNamespace(advantages=[], rows=[], said=[])
    settings = load_settings("tiny", **{**PLAIN, "grpo_steps": 3, "canary_steps": 2, "report_to": "wandb"})
    generate = trl.GRPOTrainer._generate_and_score_completions

    def kept(self, inputs):
        out = generate(self, inputs)
        told.advantages.append(out["advantages"].tolist())
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", kept)
        patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
        patch.setattr(grpo, "installed", lambda name: "1.0")
        patch.setattr(Tracker, "rows", [])
        for name in ("_score", "parse_trace"):
            patch.setattr(reward_room, name, getattr(reward_room, name))  # put back at the end
        any_text_is_a_transcript()
        model, tokenizer = micro_model(settings)
        before = run_identity(model, MuteJudge(), PROMPTS, settings)

        def canaries():
            return restless(model, tokenizer)

        how = (settings, run, told.rows.append, told.said.append, False, canaries)
        train_grpo(model, tokenizer, MuteJudge(), PROMPTS, *how)
        told.tracked, told.run = Tracker.rows, run
        after = run_identity(model, MuteJudge(), PROMPTS, settings)
    told.changed = {k for k in before if before[k] != after[k]}
    return told


def test_an_unscored_completion_has_no_advantage(watched):
    "By TRL's own arithmetic, on its way to the loss; the others stand against the rest of their group."
    traces, group = list(read_jsonl(watched.run / "traces.jsonl")), MICRO["group_size"]
    assert len(watched.advantages) == 3
    for step, found in enumerate(watched.advantages, 1):
        rewards = [r["reward"] for r in traces if r["step"] == step]
        assert [i for i, r in enumerate(rewards) if r is None] == [1, 1 + group]
        assert found[1] == found[1 + group] == 0.0
        assert found == pytest.approx(group_advantages(rewards, group), abs=1e-4)
        assert sum(abs(a) for a in found) > 1  # there is something to be unlike


def test_training_changes_nothing_of_what_a_run_is_but_its_adapter(watched):
    assert watched.changed == {"start adapter"}


def test_a_tracker_is_told_every_number_of_the_row(watched):
    rows, tracked = watched.rows, [r for r in watched.tracked if "loss" in r]
    assert [r["step"] for r in rows] == [r["step"] for r in tracked] == [1, 2, 3]
    for row, seen in zip(rows, tracked, strict=True):
        assert {k: v for k, v in row.items() if v is not None} == {k: seen[k] for k, v in row.items() if v is not None}
        assert "num_tokens" in seen  # TRL's own are still there
        speaking = {k for k in seen if k.startswith("alarm/")}
        assert seen["alarms"] == len(speaking) and "alarm/unscored" in speaking
        assert all(isinstance(v, int | float) for k, v in seen.items() if k in row)
    told = set(tracked[0])
    assert {"all_good", "all_bad", "unscored", "truncated", "draft/honesty", "benign_refusals", "r1", "r2"} <= told
    assert "benign_refusals" not in tracked[1] and "benign_refusals" in tracked[2]


def test_a_run_holds_what_trl_was_told(watched):
    told, table = json.loads((watched.run / "trl.json").read_text()), argument_table(load_settings("tiny", **PLAIN))
    assert told["trl"] == "1.0" and [r["name"] for r in told["arguments"]] == [name for name, *_ in table.rows]
    assert {r["name"]: r["default"] for r in told["arguments"]}["beta"] == 0.0
    ours = {r["name"]: r["ours"] for r in told["arguments"]}
    assert (ours["beta"], ours["max_steps"], ours["report_to"]) == (0.1, 3, "wandb")
    assert all(r["why"] for r in told["arguments"])


def test_the_line_counts_canaries_and_checkpoints(watched):
    lines = [line for line in watched.said if line.startswith("step ") and " left" in line]
    assert len(lines) == 3 and all("canaries" in line for line in lines)
    stages = [(r["step"], r["stage"]) for r in read_jsonl(watched.run / "timings.jsonl")]
    assert [step for step, stage in stages if stage == "grpo/canaries"] == [1, 3]
    assert [step for step, stage in stages if stage == "grpo/save"] == [1, 2, 3]


def test_time_left_is_wall_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(grpo, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def passes(seconds: float) -> list[dict]:
        now[0] += seconds
        return [{"refusal": False}]

    settings = load_settings("tiny", canary_steps=4, save_steps=2)
    about = (settings, tmp_path, None, None, None, None, {}, lambda: passes(8))
    s = grpo._Session(*about)
    for step in range(8):
        passes(0.5)  # between the steps
        grpo._begin(s, step)
        for name, seconds in (("generate", 5), ("judge", 2)):
            with s.phase(name):
                passes(seconds)
        passes(3)
        grpo._times(s, step + 1, 0.0)
        s.spent = {}
        if step % 2:
            passes(4)
            s.spent["save"] = 4.0
    assert s.phases[0] == {"generate": 5.0, "judge": 2.0, "train": 3.0, "canaries": 2.0}
    assert s.phases[1:] == [{**s.phases[0], "train": 3.5}] + [{**s.phases[0], "train": 3.5, "save": 2.0}] * 6
    assert math.fsum(s.phases[-1].values()) == (now[0] - 100.5 + 0.5) / 8
    rows = list(read_jsonl(tmp_path / "timings.jsonl"))
    assert [r["seconds"] for r in rows if r["stage"] == "grpo/canaries"] == [8.0, 8.0]


def test_peaks_are_those_of_the_phases(tmp_path, monkeypatch):
    import torch

    gpu = SimpleNamespace(most=99)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: gpu.most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(gpu, "most", 1))
    s = grpo._Session(load_settings("tiny"), tmp_path, None, None, None, None, {}, None)
    grpo.new_peak()  # as after the dry step
    grpo._begin(s, 0)
    for before, name, inside in ((10, "generate", 30), (12, "judge", 20)):  # log-probs stand between the two
        gpu.most = before
        with s.phase(name):
            gpu.most = inside
    gpu.most = 11
    grpo._times(s, 1, 0.0)
    s.spent, s.peaks, gpu.most = {}, {}, 40
    grpo._times(s, 2, 0.0)  # a step that uses completions again
    found = {(r["step"], r["stage"][5:]): r.get("peak") for r in read_jsonl(tmp_path / "timings.jsonl")}
    assert found == {
        **{(1, "generate"): 30, (1, "judge"): 20, (1, "train"): 12},
        **{(2, "generate"): None, (2, "judge"): None, (2, "train"): 40},
    }


# ---- what belongs to a run


def sealed(run: Path, identity: dict, step: int = 2) -> Path:
    path = run / "trainer" / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_text(f"state {step}")
    grpo._seal(path, {"step": step, "identity": identity, "monitor": {}, "versions": {}})
    return path


@pytest.fixture(scope="module")
def model():
    return micro_model(load_settings("tiny", **MICRO))


def resumed(model, run, settings, rubric=RUBRIC, prompts=PROMPTS, resume=True, judge=None):
    judge = judge or StubJudge()
    judge.rubric = rubric
    train_grpo(*model, judge, prompts, settings, run, lambda row: None, resume=resume)


OTHER = Rubric("other", RUBRIC.principles, cap="")


@pytest.mark.parametrize("key, value", [("lr", 2e-3), ("kl", 0.2), ("group_size", 6), ("seed", 1), ("alpha", 2)])
def test_a_changed_setting_is_named(model, tmp_path, key, value):
    settings = load_settings("tiny", **PLAIN)
    sealed(tmp_path, run_identity(model[0], StubJudge(), PROMPTS, settings))
    with pytest.raises(UserError, match=f"cannot resume: {key} was .*, now {value}"):
        resumed(model, tmp_path, settings.replace(**{key: value}))


def test_a_changed_rubric_prompt_or_start_is_named(model, tmp_path):
    import torch

    settings = load_settings("tiny", **PLAIN)
    sealed(tmp_path, run_identity(model[0], StubJudge(), PROMPTS, settings))
    with pytest.raises(UserError, match="rubric version was"):
        resumed(model, tmp_path, settings, rubric=OTHER)
    with pytest.raises(UserError, match="prompts was"):
        resumed(model, tmp_path, settings, prompts=PROMPTS[::-1])
    weight = next(p for p in model[0].parameters() if p.requires_grad)
    with torch.no_grad():
        weight += 1
    with pytest.raises(UserError, match="start adapter was"):
        resumed(model, tmp_path, settings)
    with torch.no_grad():
        weight -= 1


class NamedJudge(StubJudge):
    "A judge that says what text it asks with and which weights answer."

    def __init__(self, version: str = "text 1", weights: str = "weights 1"):
        super().__init__()
        self.version, self.engine = version, SimpleNamespace(identity=lambda: {"spec": "hf:m", "weights": weights})


@pytest.mark.parametrize("now", [{"version": "text 2"}, {"weights": "weights 2"}])
def test_another_judge_behind_the_same_setting_is_named(model, tmp_path, now):
    settings = load_settings("tiny", **PLAIN)
    sealed(tmp_path, run_identity(model[0], NamedJudge(), PROMPTS, settings))
    with pytest.raises(UserError, match=r"cannot resume: judge itself was .*, now .*: resume as it began"):
        resumed(model, tmp_path, settings, judge=NamedJudge(**now))


def test_a_replaced_base_is_named(model, tmp_path, monkeypatch):
    settings = load_settings("tiny", **PLAIN)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    monkeypatch.setattr(model[0].config, "_name_or_path", str(tmp_path / "old"))
    sealed(tmp_path, run_identity(model[0], StubJudge(), PROMPTS, settings))
    monkeypatch.setattr(model[0].config, "_name_or_path", str(tmp_path / "new"))
    with pytest.raises(UserError, match=r"base weights was {'weights': .*, now {'weights': .*'precision': 'float32'}"):
        resumed(model, tmp_path, settings)


def test_another_revision_on_the_hub_is_named(model, tmp_path, monkeypatch):
    settings = load_settings("tiny", **PLAIN)
    monkeypatch.setattr("qalign.engine._revision", lambda *model: "aaaa")
    sealed(tmp_path, run_identity(model[0], StubJudge(), PROMPTS, settings))
    monkeypatch.setattr("qalign.engine._revision", lambda *model: "bbbb")
    with pytest.raises(UserError, match=r"base weights was {'revision': 'aaaa'.*, now {'revision': 'bbbb'"):
        resumed(model, tmp_path, settings)


def test_a_checkpoint_of_an_older_version_is_taken_up(model):
    now = run_identity(model[0], NamedJudge(), PROMPTS, load_settings("tiny", **PLAIN))
    grpo._same({k: v for k, v in now.items() if k not in ("judge itself", "base weights", "rollout")}, now)
    with pytest.raises(UserError, match="cannot resume: gone was 1, now not there"):
        grpo._same({**now, "gone": 1}, now)


@pytest.mark.parametrize("who", ["self", "tuned"])
def test_a_judge_is_the_same_in_a_resumed_process(tmp_path, who):
    "It says nothing of the policy's adapter, which training moves."
    import torch
    from peft import LoraConfig

    from qalign import tune
    from qalign.bench import shape_engine
    from qalign.engine import HFEngine
    from qalign.judge import Judge

    made = tune._attach(shape_engine("micro", "fp32"), LoraConfig(r=2, target_modules=["q_proj"]), "judge-made")
    made.fingerprint = tune._fingerprint(tune._weights(made))
    folder, settings = tune.save_judge(made, tmp_path / "judge", {}), load_settings("tiny", **MICRO)

    def process(nudge: float) -> dict:
        policy, tokenizer = micro_model(settings)
        with torch.no_grad():
            for p in policy.parameters():
                if p.requires_grad:
                    p += nudge
        own = HFEngine(policy, tokenizer)
        judge = Judge(RUBRIC, own.base() if who == "self" else tune.load_judge(own, folder))
        return run_identity(policy, judge, PROMPTS, settings)

    one, two, moved = process(0.0), process(0.0), process(0.5)
    assert one == two and one["judge itself"] and json.loads(json.dumps(one)) == one
    assert {k for k in one if one[k] != moved[k]} == {"start adapter"}


def test_servers_and_vllm_say_who_they_are(model):
    from qalign.judge import Judge
    from qalign.server import ServerEngine
    from qalign.vllm_engine import VLLMEngine

    def told(engine) -> str:
        return run_identity(model[0], Judge(RUBRIC, engine), PROMPTS, load_settings("tiny"))["judge itself"]

    def vllm(revision: str):
        config = SimpleNamespace(dtype="torch.bfloat16", model="m/m", hf_config=SimpleNamespace(_commit_hash=revision))
        return VLLMEngine(SimpleNamespace(llm_engine=SimpleNamespace(model_config=config)), None, "vllm:m/m")

    servers = [ServerEngine(m, "http://h/v1") for m in ("a", "a", "b")]
    for one, again, other in (servers, [vllm(r) for r in ("r1", "r1", "r2")]):
        assert told(one) == told(again) != told(other)


def test_what_only_watches_may_change(model):
    settings = load_settings("tiny", **PLAIN)
    free = settings.replace(save_steps=5, report_to="wandb", stop_kl=0.5, eval_trials=3, sft_epochs=9, canary_steps=1)
    who = [run_identity(model[0], StubJudge(), PROMPTS, s) for s in (settings, free)]
    assert who[0] == who[1]


def test_a_start_is_the_same_in_16_bits_and_over_the_disk(model, tmp_path):
    from peft import PeftModel

    from qalign.bench import shape_engine

    model[0].save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(shape_engine("micro", "fp32").model, str(tmp_path), is_trainable=True)
    assert grpo._start_hash(loaded) == grpo._start_hash(model[0])


def test_a_second_start_in_the_same_folder_is_refused(model, tmp_path):
    settings = load_settings("tiny", **PLAIN)
    sealed(tmp_path, run_identity(model[0], StubJudge(), PROMPTS, settings))
    with pytest.raises(UserError, match="holds checkpoint-2: resume, or remove"):
        resumed(model, tmp_path, settings, resume=False)


def test_no_steps_train_nothing(model, tmp_path):
    resumed(model, tmp_path, load_settings("tiny", **{**PLAIN, "grpo_steps": 0}))
    assert not list(tmp_path.iterdir())


# ---- checkpoints and records


def damage(path: Path, how: str) -> None:
    if how == "cut":
        (path / "optimizer.pt").write_text("sta")
    elif how == "gone":
        (path / "optimizer.pt").unlink()
    elif how == "no seal":
        (path / "checkpoint.json").unlink()
    elif how == "torn seal":
        (path / "checkpoint.json").write_text((path / "checkpoint.json").read_text()[:30])
    else:
        (path / "checkpoint.json").write_text("[]")


@pytest.mark.parametrize("how", ["cut", "gone", "no seal", "torn seal", "odd seal"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, how):
    good, bad = sealed(tmp_path, {}, 2), sealed(tmp_path, {}, 10)
    said: list[str] = []
    damage(bad, how)
    found = find_checkpoint(tmp_path / "trainer", said.append)
    assert found and found[0] == good and found[1]["step"] == 2
    assert len(said) == 1 and said[0].startswith("checkpoint-10 is passed over: ")
    damage(good, how)
    assert find_checkpoint(tmp_path / "trainer") is None


def test_other_folders_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-", "checkpoint-last", ".saving", "runs"):
        (tmp_path / name).mkdir()
    assert find_checkpoint(tmp_path) is None and find_checkpoint(tmp_path / "nowhere") is None


@CALM
@given(st.lists(st.integers(1, 9), max_size=12), st.integers(0, 10))
def test_rewind_keeps_what_is_not_later(tmp_path_factory, steps, step):
    run = tmp_path_factory.mktemp("rewind")
    (run / "credit").mkdir()
    other = [{"stage": "sft", "step": 9}, {"stage": "grpo", "seconds": 1.0}, {"stage": "start"}]
    write_jsonl(run / "metrics.jsonl", [*other, *({"stage": "grpo", "step": n} for n in steps)])
    write_jsonl(run / "timings.jsonl", [*other, *({"stage": "grpo/judge", "step": n} for n in steps)])
    write_jsonl(run / "traces.jsonl", [{"step": n} for n in steps])
    for n in steps:
        (run / "credit" / f"step-{n:06d}.parquet").touch()
    for _ in range(2):
        rewind(run, step)
        kept = [n for n in steps if n <= step]
        assert [r["step"] for r in read_jsonl(run / "traces.jsonl")] == kept
        for name in ("metrics", "timings"):
            rows = list(read_jsonl(run / f"{name}.jsonl"))
            assert rows[:3] == other and [r["step"] for r in rows[3:]] == kept
        assert {int(p.name[5:11]) for p in (run / "credit").iterdir()} == set(kept)


# ---- what TRL is told


@pytest.mark.parametrize("preset", presets())
def test_the_table_says_what_trl_gets(preset):
    from trl import GRPOConfig

    settings = load_settings(preset)
    arguments = grpo_arguments(settings, "run/trainer")
    rows = argument_table(settings).rows
    names = {f.name for f in dataclasses.fields(GRPOConfig)}
    for name, _, value, why in rows:
        assert name in names and why, name
        got = getattr(arguments, name)
        assert got == value or (name == "report_to" and got == []), name
    told = {name for name, *_ in rows}
    matter = {
        "beta",
        "loss_type",
        "max_completion_length",
        "num_generations",
        "learning_rate",
        "epsilon",
        "epsilon_high",
    }
    assert matter | {"scale_rewards", "num_iterations", "steps_per_generation", "logging_nan_inf_filter"} <= told


def test_presets_are_complete_and_stand_in_the_band():
    paper = load_settings("paper")
    assert (paper.lr, paper.kl, paper.group_size, paper.prompts_per_step, paper.grpo_steps) == (1e-6, 0.001, 5, 16, 100)
    assert "full fine-tuning" in lr_warning(paper)
    assert [lr_warning(load_settings(p)) for p in ("gpu24", "gpu48", "gpu80", "tiny")] == [""] * 4
    assert "break" in lr_warning(paper.replace(lr=0.01))


def test_clip_high_follows_clip():
    tiny = load_settings("tiny", clip=0.1)
    assert grpo_arguments(tiny, "run/trainer").epsilon_high == 0.1
    assert grpo_arguments(tiny.replace(clip_high=0.28), "run/trainer").epsilon_high == 0.28


def test_a_tracker_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(grpo, "installed", lambda name: None)
    with pytest.raises(UserError, match="report_to = trackio needs its package: pip install trackio"):
        grpo_arguments(load_settings("tiny", report_to="trackio"), "run/trainer")


@CALM
@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 4))
def test_checkpoints_fall_on_generations(save, together, again):
    s = load_settings("tiny", save_steps=save, steps_per_generation=together, num_iterations=again)
    every, steps = together * again, cadence(s)
    assert steps % every == 0 and save <= steps < save + every


@CALM
@given(st.integers(1, 6), st.integers(2, 6), st.integers(1, 40))
def test_micro_batch_divides(prompts, group, most):
    n = micro_batch(load_settings("tiny", prompts_per_step=prompts, group_size=group, micro_batch=most))
    assert 1 <= n <= most and prompts * group % n == 0


@CALM
@given(st.integers(4, 12), st.integers(1, 12), st.integers(1, 2), st.integers(1, 2), st.integers(0, 3))
def test_the_order_is_trls_own_over_many_passes(prompts, steps, together, again, seed):
    from trl.trainer.utils import RepeatSampler

    s = load_settings(
        "tiny", prompts_per_step=2, grpo_steps=steps, steps_per_generation=together, num_iterations=again, seed=seed
    )
    order, block = prompt_order(prompts, s), 2 * together
    sampler = RepeatSampler(range(prompts), 1, batch_size=block, shuffle=True, seed=seed)
    passes: list[int] = []
    while len(passes) < len(order):
        passes += list(sampler)
    assert order == passes[: len(order)]
    assert len(order) == math.ceil(steps / (together * again)) * block


def test_too_few_prompts_are_refused():
    with pytest.raises(UserError, match="one generation wants 3 prompts, got 2"):
        prompt_order(2, load_settings("tiny"))


@pytest.mark.parametrize(
    ("given", "prompts", "why"),
    [
        ({"prompts_per_step": 8}, 7, "one generation wants 8 prompts, got 7"),
        ({"prompts_per_step": 4, "steps_per_generation": 2}, 7, "one generation wants 8 prompts, got 7"),
        ({"report_to": "trackio"}, 9, "report_to = trackio needs its package"),
        ({"kl": 0, "stop_kl": 0.1}, 9, "stop_kl watches the KL to the reference, and kl = 0 has none"),
    ],
)
def test_what_grpo_would_refuse_is_known_beforehand(given, prompts, why, monkeypatch):
    monkeypatch.setattr(grpo, "installed", lambda name: None)
    with pytest.raises(UserError, match=why):
        check_grpo(load_settings("tiny", **given), prompts)
    check_grpo(load_settings("tiny", **given, grpo_steps=0), prompts)
    check_grpo(load_settings("tiny", kl=0), 9)


# ---- straight from TRL


def test_trl_finds_the_reward_by_its_path(monkeypatch, tmp_path):
    from trl import GRPOConfig, ModelConfig
    from trl.scripts import grpo as script

    got = SimpleNamespace()

    class Stop(Exception):
        pass

    def trainer(**kwargs):
        got.reward = kwargs["reward_funcs"]
        raise Stop

    monkeypatch.setattr("trl.GRPOTrainer", trainer)
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: {"train": [], "test": []})
    arguments = script.GRPOScriptArguments(dataset_name="x", reward_funcs=["qalign.reward.rubric_reward"])
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    mixture = SimpleNamespace(datasets=None)
    with pytest.raises(Stop):
        script.main(arguments, config, ModelConfig(model_name_or_path="x"), mixture)
    assert got.reward == [importlib.import_module("qalign.reward").rubric_reward]
    assert got.reward[0].__name__ == "rubric_reward"


def test_the_reward_reads_the_environment(monkeypatch, tmp_path):
    from qalign.trace import render_trace

    loaded = []
    monkeypatch.setattr("qalign.engine.load_engine", lambda spec, quantization: loaded.append(spec) or "engine")
    monkeypatch.setattr("qalign.judge.Judge", lambda rubric, engine, *how, **more: StubJudge())
    monkeypatch.setenv("QALIGN_PRESET", "tiny")
    monkeypatch.setenv("QALIGN_JUDGE", "self")
    monkeypatch.setenv("QALIGN_RUN", str(tmp_path))
    reward_room._from_environment.cache_clear()
    prompt = [{"role": "user", "content": "hello"}]
    answer = [{"role": "assistant", "content": render_trace("a", "Wait.", "b")}]
    plain = [{"role": "assistant", "content": "no transcript"}]
    rewards = reward_room.rubric_reward([prompt, prompt], [answer, plain], completion_ids=[[1], [1]])
    assert rewards[1] == -2.0 and rewards[0] is not None and rewards[0] > -12.1
    assert loaded == ["smollm2"] and (tmp_path / "credit" / "step-000001.parquet").exists()
    monkeypatch.setenv("QALIGN_COMPLETION_TOKENS", "8")  # the trainer's limit
    reward_room._from_environment.cache_clear()
    rewards = reward_room.rubric_reward([prompt, prompt], [answer, answer], completion_ids=[[1] * 8, [1, 1]])
    assert rewards[0] == -2.0 and rewards[1] != -2.0
    reward_room._from_environment.cache_clear()
    monkeypatch.setenv("QALIGN_JUDGE", "tuned:nowhere")
    with pytest.raises(UserError, match="nowhere holds no judge"):
        reward_room.rubric_reward([prompt], [answer])
    reward_room._from_environment.cache_clear()


def test_the_rooms_import_nothing_heavy():
    code = "import sys, qalign.grpo, qalign.monitor; print({'torch', 'trl', 'pandas', 'matplotlib'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
