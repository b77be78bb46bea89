"The whole pipeline on the embedded model, as small as it gets: one seed gives one set of numbers, also when killed."

import gc
import hashlib
import inspect
import json
import os
import shutil
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
from qalign.core import UserError, load_settings, read_jsonl, write_json
from qalign.grpo import train_grpo
from qalign.pipeline import make_plan, open_folder
from qalign.prompts import load_prompts
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


def digest(run, *models):
    "Everything a run computed, by content: numbers, texts, verdicts and weights."
    names = ["metrics.jsonl", "records.jsonl", "traces.jsonl", "adapter/adapter_model.safetensors"]
    names += [f"eval/{m}.jsonl" for m in models or ("start", "sft", "grpo")]
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
    assert "expected rollout to be one of hf, trl" in message(TINY.replace, rollout="vlm")


def test_held_out_benign_prompts_are_not_trained_on(tmp_path):
    assert "the shipped benign prompts are held out" in message(make_plan, TINY, "benign")
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(p.text for p in load_prompts("benign")))
    assert "stand on both sides" in message(make_plan, TINY, str(file))


def test_settings_that_were_refused_bind_no_folder(tmp_path):
    "Prompts too long for the first settings, say: the remedy works where the run was to be."
    one, other = make_plan(TINY), make_plan(TINY.replace(prompt_tokens=99))
    folder = open_folder(tmp_path / "run", one)
    assert "holds a run already: add --resume" in message(open_folder, folder.path, one)
    open_folder(folder.path, other)
    assert json.loads((folder.path / "settings.json").read_text())["settings"]["prompt_tokens"] == 99
    open_folder(folder.path, one, resume=True)
    folder.metric("eval", {"part": "start"})  # from here on there is something to lose
    assert "holds a run with another prompt_tokens" in message(open_folder, folder.path, other)
    assert "holds a run with another prompt_tokens" in message(open_folder, folder.path, other, resume=True)
    assert json.loads((folder.path / "settings.json").read_text())["settings"]["prompt_tokens"] == TINY.prompt_tokens


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
    said = "memory ran out: give another --out with a lower generate_batch, micro_batch, judge_rows"
    assert str(stop.value) == f"stopped in stage start: {said}, judge_chunk or eval_tokens"
    finished(tmp_path, "start")
    with pytest.raises(pipeline.Stopped) as stop, pipeline._stage("sft", pipeline.Folder(tmp_path)):
        raise torch.OutOfMemoryError
    assert str(stop.value) == f"stopped in stage sft: {said} or judge_chunk, and --from {tmp_path}"
    with pytest.raises(ZeroDivisionError), pipeline._stage("start", pipeline.Folder(tmp_path)):
        raise ZeroDivisionError


@pytest.mark.parametrize("until", ["grop", "end", "Start"])
def test_a_misspelt_stage_leaves_no_folder(until, tmp_path):
    said = message(pipeline.run, TINY, tmp_path / "x", until=until)
    assert said == f"no stage {until!r}: choose one of {', '.join(pipeline.STAGES)}"
    assert not (tmp_path / "x").exists()


def finished(run: Path, *stages: str) -> None:
    for stage in stages:
        write_json(run / "stages" / f"{stage}.json", {})


def test_several_processes_make_grpo_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "world_size", lambda: 2)
    said = "several processes share the stage grpo alone: "
    for options in ({}, {"until": "grpo"}):
        first = message(pipeline.run, TINY, tmp_path / "x", **options)
        assert first == said + "make those before it in one process, --until after_sft"
    assert not (tmp_path / "x").exists()
    finished(tmp_path / "x", *pipeline.STAGES[:4])
    assert message(pipeline.run, TINY, tmp_path / "x") == said + "add --until grpo"
    assert pipeline._todo(pipeline.Folder(tmp_path / "x"), "grpo") == ["grpo"]
    finished(tmp_path / "x", "grpo")
    assert message(pipeline.run, TINY, tmp_path / "x") == said + "go on in one process"


def test_a_canary_without_a_score_has_no_helpfulness(monkeypatch):
    told = ((0.5, {"helpfulness": 0.4}), (None, {"helpfulness": -1.0}), (-1.0, {}))
    rows = [{"refusal": False, "r_answer": base, "principles": left} for base, left in told]
    monkeypatch.setattr(pipeline, "evaluate", lambda *how: rows)
    plan: Any = SimpleNamespace(prompts={"canaries": ["one"]}, settings=TINY.replace(canary_steps=1))
    nothing: Any = None
    ask = pipeline.Run(plan, nothing, nothing)._canaries(nothing, nothing)
    assert ask is not None and [r["helpfulness"] for r in ask()] == [0.4, None, None]


MUTE = TINY.replace(judge_mode="reasoned", scores="expected")  # refused by the plan


def test_all_is_checked_before_anything_is_shown(tmp_path):
    told: list[Any] = []
    for change in ({"until": "end"}, {"prompts": "nowhere.txt"}, {"settings": MUTE}):
        message(pipeline.run, **{"settings": TINY, "out": tmp_path / "x", "begin": told.append, **change})
    assert told == [] and not (tmp_path / "x").exists()


def test_the_engine_of_a_run_has_the_sizes_of_its_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load_model", lambda *how: (None, None))
    for given, batch in ((4, 4), (0, 32), (80, 32)):
        engine = pipeline.Policy(TINY.replace(judge_rows=3, generate_batch=given), tmp_path).get()
        assert (engine.rows, engine.batch, engine.base().rows) == (3, batch, 3)


def test_what_a_stage_held_on_a_gpu_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "new_peak", lambda: 7)
    for name in ("start", "grpo"):
        pipeline._finish(pipeline.Folder(tmp_path), name, 1.0, {})
    start, grpo = read_jsonl(tmp_path / "timings.jsonl")
    assert start == {"stage": "start", "seconds": 1.0, "peak": 7} and "peak" not in grpo


def test_a_run_of_a_version_with_fewer_settings_is_taken_up(tmp_path):
    open_folder(tmp_path / "x", make_plan(TINY)).metric("eval", {"part": "start"})
    about = json.loads((tmp_path / "x" / "settings.json").read_text())
    for key in ("judge_rows", "optimizer"):
        del about["settings"][key]
    write_json(tmp_path / "x" / "settings.json", about)
    said = message(open_folder, tmp_path / "x", make_plan(TINY.replace(judge_rows=4)), resume=True)
    assert "holds a run with another judge_rows (8, now 4)" in said
    open_folder(tmp_path / "x", make_plan(TINY), resume=True)
    assert json.loads((tmp_path / "x" / "settings.json").read_text())["settings"] == TINY.to_dict()


def test_what_a_kill_left_of_the_first_record_is_nothing(tmp_path):
    (tmp_path / ".settings.json.a1b2").write_text('{"sett')
    folder = open_folder(tmp_path, make_plan(TINY), resume=True)
    assert [p.name for p in folder.path.iterdir()] == ["settings.json"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".settings.json.a1b2").write_text("")
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "is not empty and holds no run" in message(open_folder, tmp_path / "other", make_plan(TINY))
    assert len(list((tmp_path / "other").iterdir())) == 2


FREE = {"report_to": "tensorboard", "save_steps": 3, "judge_noise": 0.5, "stop_kl": 0.5, "stop_unscored": 0.25}
FREE |= {"stop_truncated": 0.5}


def test_what_a_resume_may_change(tmp_path, monkeypatch):
    from qalign import grpo

    monkeypatch.setattr(grpo, "installed", lambda name: "1.0")
    assert (
        set(FREE)
        == set(pipeline._FREE)
        == {k for k in TINY.to_dict() if k.startswith("stop_")}
        | {k for k in ("report_to", "save_steps", "judge_noise") if k in grpo._FREE}
    )
    record = tmp_path / "x" / "settings.json"
    open_folder(tmp_path / "x", make_plan(TINY)).metric("eval", {"part": "start"})
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
        said = message(open_folder, tmp_path / "x", other, resume=True)
        assert f"holds a run with another {key} (" in said and "give another --out, or run it as it was" in said
    assert record.read_bytes() == was
    said = message(open_folder, tmp_path / "x", make_plan(TINY.replace(lr=1e-5)), resume=True)
    assert said.endswith(f"give another --out with --from {tmp_path / 'x'}, or run it as it was")


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


# --- from another run, with a model of the micro shape


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    "Settings that make a run of seconds."
    return load_settings("tiny", **micro_options(save_micro(tmp_path_factory.mktemp("model"))))


def save_micro(folder: Path) -> Path:
    "A model of the micro shape on disk."
    from qalign.bench import shape_engine

    engine = shape_engine("micro", "none")
    engine.model.save_pretrained(folder)
    engine.tokenizer.save_pretrained(folder)
    return folder


def micro_options(model: Path) -> dict[str, Any]:
    "Overrides of the preset tiny that make a run of seconds."
    small = dict(zip([m[2:].replace("-", "_") for m in MICRO[::2]], MICRO[1::2], strict=True))
    return small | {"model": f"hf:{model}", "quantization": "none", "judge": "self", "judge_cache": "on", "lr": 1e-3}


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def before(micro, tmp_path_factory, watched):
    "A run up to GRPO, and the settings that were read."
    out, (settings, read) = tmp_path_factory.mktemp("runs") / "before", watched(micro)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(pipeline, "check_grpo", lambda settings, prompts: None)  # decides nothing
        m.setattr(pipeline, "check_rollout", lambda settings: None)  # likewise
        m.setattr(pipeline, "_doubts", lambda settings: [])  # says it, decides nothing
        pipeline.run(settings, out, say=quiet, until="after_sft")
    return out, read


def test_what_may_differ_is_not_read_before_grpo(before):
    assert {"temperature", "completion_tokens", "sft_lr", "eval_tokens", "scores", *pipeline._SIZES} <= before[1]
    paid = {"alpha", "beta"}  # the column `reward` of the evaluation
    assert before[1] & set(pipeline._LATER) == {*paid, *pipeline._SIZES}


def test_a_run_from_another_is_the_run_it_would_be_on_its_own(before, micro, tmp_path):
    changed, old, said = micro.replace(alpha=2, lr=5e-4, grpo_steps=1), before[0], list[str]()
    pipeline.run(changed, tmp_path / "own", say=quiet, until="grpo")
    was = digest(tmp_path / "own", "start", "sft")
    pipeline.run(changed, tmp_path / "new", say=said.append, until="grpo", source=old)
    assert digest(tmp_path / "new", "start", "sft") == was
    assert said[0] == f"note: start, records, sft, after_sft are those of {old}"
    assert [line[:5] for line in said if line.startswith("[")] == ["[5/7]"]
    record = json.loads((tmp_path / "new" / "settings.json").read_text())
    differ = {"alpha": 10.0, "lr": 1e-3, "grpo_steps": 2}
    assert record["from"] == {"run": "before", "stages": list(pipeline.STAGES[:4]), "settings": differ, "from": None}
    assert record["settings"] == changed.to_dict()
    said = []
    pipeline.run(changed, tmp_path / "new", resume=True, say=said.append, until="grpo", source=old)
    assert not said and json.loads((tmp_path / "new" / "settings.json").read_text()) == record


def test_stages_that_are_not_finished_are_not_taken(before, micro, tmp_path):
    half, said = tmp_path / "half", list[str]()
    shutil.copytree(before[0], half)
    for name in ("sft", "after_sft"):
        (half / "stages" / f"{name}.json").unlink()
    pipeline.begin_from(half, tmp_path / "new", make_plan(micro.replace(micro_batch=1)), said.append)
    assert said == [f"note: start, records are those of {half}, made with micro_batch {micro.micro_batch}"]
    left = {str(p.relative_to(tmp_path / "new")) for p in (tmp_path / "new").rglob("*") if p.is_file()}
    assert left == {
        *("settings.json", "metrics.jsonl", "timings.jsonl", "verdicts.sqlite", "eval/start.jsonl"),
        *("records.jsonl", "records-journal.jsonl", "sft-dataset.jsonl", "stages/start.json", "stages/records.json"),
    }
    parts = {r["part"] for r in read_jsonl(tmp_path / "new" / "metrics.jsonl")}
    assert parts == {"start"} and {r["part"] for r in read_jsonl(half / "metrics.jsonl")} > parts


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sft_lr": 0.5}, r"holds a run with another sft_lr \(0.001, now 0.5\), read before GRPO: leave out --from"),
        ({"canary_steps": 1}, r"another canary_steps \(0, now 1\), read before GRPO"),
        ({"lost": "eval/sft.jsonl"}, "has lost eval/sft.jsonl: restore it, or leave out --from"),
        ({"lost": "settings.json"}, "holds no run: give --from the folder of one"),
        ({"lost": "stages"}, "has finished no stage before GRPO: leave out --from"),
        ({"filled": True}, "is not empty and holds no run: give another --out"),
    ],
)
def test_what_cannot_be_taken_over_is_one_line_and_leaves_nothing(before, micro, tmp_path, change, says):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(before[0], old)
    if lost := change.get("lost"):
        shutil.rmtree(old / lost) if (old / lost).is_dir() else (old / lost).unlink()
    if change.get("filled"):
        finished(new, "mine")
    there = sorted(tmp_path.rglob("*"))
    settings = micro.replace(**{k: v for k, v in change.items() if k not in ("lost", "filled")})
    with pytest.raises(UserError, match=says):
        pipeline.run(settings, new, say=quiet, source=old)
    assert sorted(tmp_path.rglob("*")) == there


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
