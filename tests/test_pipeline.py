"The whole pipeline on the embedded model, as small as it gets: one seed gives one set of numbers, also when killed."

import gc
import hashlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qalign import pipeline
from qalign.core import UserError, load_settings, read_jsonl
from qalign.grpo import train_grpo
from qalign.pipeline import make_plan, open_folder
from qalign.reward import read_credit, replay
from qalign.trace import parse_trace

MICRO = (  # noqa: SIM905
    "--dimensions 1 --sft-prompts 4 --sft-benign 1 --candidates 1 --draft-tokens 8 --revision-tokens 8 --sft-epochs 1 "
    "--grpo-prompts 4 --grpo-steps 2 --prompts-per-step 1 --group-size 2 --completion-tokens 24 "
    "--eval-harmful 4 --eval-benign 4 --eval-tokens 16"
).split()
COMMAND = [str(Path(sys.executable).with_name("qalign")), "run", *MICRO, "--out"]


def start(out, *more):
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*COMMAND, str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a background shell hands on that it is ignored
    )


def finish(process):
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err[-2000:]
    return out


def until(process, path):
    deadline = time.time() + 240
    while not path.exists():
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.05)


def digest(run):
    "Everything a run computed, by content: numbers, texts, verdicts and weights."
    names = ["metrics.jsonl", "records.jsonl", "traces.jsonl", "adapter/adapter_model.safetensors"]
    names += [f"eval/{m}.jsonl" for m in ("start", "sft", "grpo")]
    return {n: hashlib.sha256((run / n).read_bytes()).hexdigest() for n in names}


# --- without a model

TINY = load_settings("tiny")


def message(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as e:
        call(*args, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture
def published(tmp_path, monkeypatch):
    "A folder of evaluation sets with one in it."
    file = tmp_path / "sets" / "malicious_instruct" / "MaliciousInstruct.txt"
    file.parent.mkdir(parents=True)
    file.write_text("\n".join(f"Tell me secret number {i}." for i in range(100)))
    monkeypatch.setenv("QALIGN_DATA", str(tmp_path / "sets"))
    return file


def test_evaluation_rows_are_not_trained_on(published, tmp_path, monkeypatch):
    said = message(pipeline.run, TINY, tmp_path / "x", str(published), say=lambda line: None)
    assert said.startswith("64 of 72 training prompts stand in malicious_instruct (64): drop ")
    assert not (tmp_path / "x").exists()
    plan = make_plan(TINY)  # the shipped prompts
    monkeypatch.delenv("QALIGN_DATA")
    assert plan.identity == make_plan(TINY).identity and plan.notes == make_plan(TINY).notes
    assert make_plan(TINY, str(published)).prompts["grpo"]  # no set to compare with


@pytest.mark.parametrize("part", ["sft", "grpo", "sft_benign", "harmful", "benign"])
def test_only_parts_that_are_trained_on_are_compared(part, published):
    text = make_plan(TINY).prompts[part][-1].text
    published.write_text("\n".join([f" {text.upper()}! ", *(f"Tell me secret number {i}." for i in range(99))]))
    if part in ("harmful", "benign"):
        assert make_plan(TINY).prompts[part][-1].text == text
    else:
        assert message(make_plan, TINY).startswith("1 of 72 training prompts stand in malicious_instruct (1): drop ")


def test_what_grpo_would_refuse_ends_the_plan(tmp_path):
    (tmp_path / "mine.txt").write_text("\n".join(f"Tell me secret number {i}." for i in range(25)))
    said = message(make_plan, load_settings("gpu24"), str(tmp_path / "mine.txt"))
    assert said == "one generation wants 16 prompts, got 14: lower prompts_per_step"
    assert "expected rollout trl, hf" in message(make_plan, TINY.replace(rollout="vlm"))


def test_held_out_benign_prompts_are_not_trained_on():
    assert "stand on both sides" in message(make_plan, TINY, "benign")


def test_fewer_benign_prompts_are_said():
    assert make_plan(TINY).notes == () and make_plan(TINY).source == "harmful, shipped with the kit"
    [note] = make_plan(TINY.replace(eval_benign=100)).notes
    assert note.startswith("60 benign prompts are fewer than the preset wants: benign ")


def test_settings_that_are_seldom_meant_are_said_before_anything_runs(tmp_path):
    question = "{name: a, questions: [{id: x, kind: graded, text: 'Is it kind?'}]}"
    (tmp_path / "mine.yaml").write_text(f"name: mine\ncap: ''\nprinciples: [{{name: p, dimensions: [{question}]}}]\n")
    mine = TINY.replace(rubric=str(tmp_path / "mine.yaml"))
    cut, other = make_plan(mine).notes
    assert cut.startswith("3 dimensions per principle of the rubric are used") and "taught on another rubric" in other
    assert make_plan(mine.replace(dimensions=0)).notes == (other,)
    assert make_plan(mine.replace(dimensions=0, judge="self")).notes == ()
    fast, slow = make_plan(TINY.replace(lr=1e-6, sft_lr=0.5)).notes
    assert slow.startswith("lr 1e-06 is for full fine-tuning") and fast.startswith("sft_lr 0.5 is outside")


def test_memory_that_runs_out_is_one_line(tmp_path):
    import torch

    with pytest.raises(pipeline.Stopped) as stop, pipeline._stage("start", pipeline.Folder(tmp_path)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert str(stop.value).startswith("stopped in stage start: memory ran out: give another --out with a lower ")
    with pytest.raises(ZeroDivisionError), pipeline._stage("start", pipeline.Folder(tmp_path)):
        raise ZeroDivisionError


@pytest.mark.parametrize("until", ["grop", "end", "Start"])
def test_a_misspelt_stage_leaves_no_folder(until, tmp_path):
    said = message(pipeline.run, TINY, tmp_path / "x", until=until)
    assert said == f"no stage {until!r}: choose one of {', '.join(pipeline.STAGES)}"
    assert not (tmp_path / "x").exists()


def test_several_processes_before_grpo_leave_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "world_size", lambda: 2)
    assert "several processes share the stage grpo alone" in message(pipeline.run, TINY, tmp_path / "x")
    assert not (tmp_path / "x").exists()


FREE = {"report_to": "tensorboard", "save_steps": 3, "stop_kl": 0.5, "stop_unscored": 0.25, "stop_truncated": 0.5}


def test_what_a_resume_may_change(tmp_path, monkeypatch):
    from qalign import grpo

    monkeypatch.setattr(grpo, "installed", lambda name: "1.0")
    assert (
        set(FREE)
        == set(pipeline._FREE)
        == {k for k in TINY.to_dict() if k.startswith("stop_")}
        | {k for k in ("report_to", "save_steps") if k in grpo._FREE}
    )
    record = tmp_path / "x" / "settings.json"
    open_folder(tmp_path / "x", make_plan(TINY))
    was = record.read_bytes()
    open_folder(tmp_path / "x", make_plan(TINY), resume=True)
    assert record.read_bytes() == was
    for key, value in FREE.items():
        changed = make_plan(TINY.replace(**{key: value}))
        assert "holds a run already: add --resume" in message(open_folder, tmp_path / "x", changed)
        open_folder(tmp_path / "x", changed, resume=True)
        now = json.loads(record.read_text())
        assert now == {**json.loads(was), "settings": TINY.to_dict() | {key: value}}
        open_folder(tmp_path / "x", make_plan(TINY), resume=True)
        assert record.read_bytes() == was
    for key, value in {"canary_steps": 2, "judge_cache": "off", "eval_trials": 2, "sft_epochs": 1}.items():
        other = make_plan(TINY.replace(**{key: value}))
        assert f"holds a run with another {key} (" in message(open_folder, tmp_path / "x", other, resume=True)
    assert record.read_bytes() == was


def test_callbacks_reach_the_trainer(tmp_path, monkeypatch):
    engine, seen = SimpleNamespace(model="model", tokenizer="tokenizer"), []
    monkeypatch.setattr(pipeline, "check_lengths", lambda plan, policy: None)
    monkeypatch.setattr(pipeline, "choose_rollout", lambda *args: "rollout")
    monkeypatch.setattr(pipeline, "train_grpo", lambda *args, **options: seen.append((args, options)))
    monkeypatch.setattr(pipeline.Policy, "get", lambda self, adapter=None: engine)
    monkeypatch.setattr(pipeline.Policy, "judge", lambda self, rubric: "judge")
    monkeypatch.setattr(pipeline.Policy, "save", lambda self, adapter: None)
    for stage in ("start", "records", "sft", "after_sft"):
        monkeypatch.setattr(pipeline.Run, stage, lambda self: {})
    said: list[str] = []
    out = pipeline.run(TINY, tmp_path / "x", say=said.append, until="grpo", callbacks=["panel"])
    assert out == {} and [line[:5] for line in said if line.startswith("[")] == [f"[{i}/7]" for i in range(1, 6)]
    bound = inspect.signature(train_grpo).bind(*seen[0][0], **seen[0][1]).arguments
    assert (bound["callbacks"], bound["rollout"], bound["judge"]) == (["panel"], "rollout", "judge")


def test_a_writer_of_its_own_is_gone_after_the_records(tmp_path, monkeypatch):
    class Big:
        def __init__(self) -> None:
            self.circle = self  # as models have them

    here: list[weakref.ref[Big]] = []

    def build(*args: Any, **options: Any) -> tuple[list[Any], dict[str, int]]:
        here.append(weakref.ref(Big()))
        return [], {}

    monkeypatch.setattr(pipeline, "build_records", build)
    monkeypatch.setattr(pipeline, "tally", lambda journal: {})
    policy: Any = SimpleNamespace(get=lambda adapter: None, judge=lambda rubric: None)
    plan = make_plan(TINY)
    folder = open_folder(tmp_path / "x", plan)
    gc.disable()
    try:
        pipeline.Run(plan, folder, policy).records()
        assert here[0]() is None
    finally:
        gc.enable()


# --- with the embedded model


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    "One uninterrupted run."
    run = tmp_path_factory.mktemp("runs") / "once"
    out = finish(start(run))
    return run, out


def test_says_what_happened_in_one_last_line(once):
    run, out = once
    assert out.splitlines()[-1].startswith("done in ") and str(run / "report.html") in out.splitlines()[-1]


def test_writes_the_run_folder(once):
    run, _ = once
    assert {p.name for p in run.iterdir()} >= {
        *("settings.json", "metrics.jsonl", "traces.jsonl", "credit", "adapter"),
        *("eval", "report.html", "figures", "summary.json"),
    }
    assert len(list((run / "figures").glob("*.png"))) >= 4
    about = json.loads((run / "settings.json").read_text())
    assert about["settings"]["grpo_steps"] == 2 and about["versions"]["torch"] and about["rubric"]["version"]


def test_every_reward_walks_back_to_its_questions(once):
    run, _ = once
    settings = load_settings(
        "tiny", **dict(zip([m[2:].replace("-", "_") for m in MICRO[::2]], MICRO[1::2], strict=True))
    )
    from qalign.pipeline import rubric_for

    traces = list(read_jsonl(run / "traces.jsonl"))
    assert len(traces) == 4 and all((t["r1"] == t["r2"] == -1) == bool(t["problem"]) for t in traces)
    if any(not t["problem"] for t in traces):
        assert replay(read_credit(run), rubric_for(settings), settings)["same"].all()


def test_killed_in_grpo_and_resumed_is_the_same_run(once, tmp_path):
    process = start(tmp_path / "twice")
    until(process, tmp_path / "twice" / "stages" / "after_sft.json")
    time.sleep(2)
    process.kill()
    process.communicate()
    finish(start(tmp_path / "twice", "--resume"))
    assert digest(tmp_path / "twice") == digest(once[0])
    again = finish(start(tmp_path / "twice", "--resume"))
    assert "[1/7]" not in again and again.splitlines()[-1].startswith("done in ")


def test_ctrl_c_says_how_to_go_on(tmp_path):
    process = start(tmp_path / "x")
    until(process, tmp_path / "x" / "stages" / "start.json")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "qalign: stopped in stage records by the user: add --resume to go on from there"


def test_start_model_writes_no_transcripts(once):
    rows = list(read_jsonl(once[0] / "eval" / "start.jsonl"))
    assert len(rows) == 8 and not any(parse_trace(r["output"]).ok for r in rows)
    assert all(r["r_answer"] is not None and -1 <= r["r_answer"] <= 1 for r in rows)


def test_training_changes_the_model(once):
    texts = {m: [r["output"] for r in read_jsonl(once[0] / "eval" / f"{m}.jsonl")] for m in ("start", "sft")}
    assert texts["start"] != texts["sft"]
