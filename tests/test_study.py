"A study: cells share what does not depend on the setting, kills at every write, readings against hand-made records."

import functools
import hashlib
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qalign import cli, pipeline, study
from qalign.core import UserError, append_jsonl, load_settings, read_jsonl, write_json, write_jsonl
from qalign.prompts import load_prompts
from qalign.reward import final_reward, group_advantages
from qalign.study import (
    GRPO_KEYS,
    before_after,
    curve_figure,
    curves,
    draft_reading,
    export_study,
    read_export,
    read_study,
    run_study,
    study_findings,
)
from qalign.trace import Trace, render_trace

CALM = hypothesis_settings(derandomize=True, max_examples=60, deadline=None)
TINY = load_settings("tiny", sft_prompts=8, grpo_prompts=8, eval_harmful=6, eval_benign=6, grpo_steps=4)
ALPHAS = {"alpha": [0, 2, 10]}


def quiet(line: str) -> None:
    pass


def digest(folder: Path) -> dict[str, str]:
    "Every file below a folder by content."
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# --- a stand-in for the pipeline: its files, its order, no model


class Killed(BaseException):
    "SIGKILL in miniature."


class Clock:
    "Counts what is written, and kills at the n-th time."

    def __init__(self, n: int = 0):
        self.n, self.seen = n, 0

    def tick(self) -> None:
        self.seen += 1
        if self.seen == self.n:
            raise Killed


def look(folder, stage, model, plan, clock):
    s = plan.settings
    rows = [
        {"model": model, "set": name, "prompt_id": p.id, "trial": 0, "ok": model != "start", "refusal": i % 2 == 0}
        | {"r1": -1.0 + 0.1 * i, "r2": -0.5, "reward": final_reward(-1.0 + 0.1 * i, -0.5, s.alpha, s.beta)}
        | {"r_answer": 0.1 * i + (0.3 if model == "grpo" else 0.0)}
        for name in ("harmful", "benign")
        for i, p in enumerate(plan.prompts[name])
    ]
    clock.tick()
    write_jsonl(folder.path / "eval" / f"{model}.jsonl", rows)
    for cell in pipeline.summarize({model: rows})["table"]:
        clock.tick()
        folder.metric("eval", {"part": stage, **cell})
    clock.tick()
    append_jsonl(folder.path / "timings.jsonl", {"stage": stage, "seconds": 1.0})
    write_json(folder.path / "stages" / f"{stage}.json", {})


def stub(clock):
    "What `pipeline.run` does, without a model."

    def run(settings, out, prompts="harmful", resume=False, say=print, until="", source=""):
        clock.tick()
        plan, folder = pipeline._checked(settings, out, prompts, resume, quiet, until, source)
        for i, (stage, model) in enumerate(
            (("start", "start"), ("after_sft", "sft"), ("grpo", ""), ("report", "grpo"))
        ):
            if stage not in pipeline._todo(folder, until):
                continue
            say(f"[{i}/4] {stage}")
            if model:
                folder.clear(stage)
                look(folder, stage, model, plan, clock)
                continue
            pipeline_rewind(folder.path)
            for step in range(1, settings.grpo_steps + 1):
                clock.tick()
                scores = [(-0.5 + 0.1 * i - 0.01 * step, 0.2 * i - 0.3) for i in range(settings.group_size)]
                rewards = [final_reward(*s, settings.alpha, settings.beta) for s in scores]
                folder.metric("grpo", {"part": "grpo", "step": step, "reward": sum(rewards), "r1": -0.5, "r2": 0.0})
                for i, (s, r) in enumerate(zip(scores, rewards, strict=True)):
                    text = render_trace("one two three", "Wait.", "four")
                    row = {"step": step, "index": i, "prompt_id": "p", "prompt": "SECRET", "completion": text}
                    append_jsonl(
                        folder.path / "traces.jsonl", {**row, "r1": s[0], "r2": s[1], "reward": r, "problem": ""}
                    )
            write_json(folder.path / "stages" / "grpo.json", {})

    return run


def pipeline_rewind(path: Path) -> None:
    from qalign.grpo import rewind

    rewind(path, 0)


def light_summary(rows_by_model):
    "A table without a bootstrap: means."
    [(model, rows)] = rows_by_model.items()
    table = []
    for name in dict.fromkeys(r["set"] for r in rows):
        values = [r["reward"] for r in rows if r["set"] == name]
        table.append({"set": name, "metric": "reward", "model": model, "estimate": sum(values) / len(values)})
    return {"table": table}


def here():
    return {"processor": "toy", "cores": 2, "date": "2025-01-01", "commit": "abc"}


@pytest.fixture
def toy(monkeypatch):
    "Returns a function that puts the stand-in in place, with a clock."
    monkeypatch.setattr(pipeline, "summarize", light_summary)
    monkeypatch.setattr(study, "_where", here)
    monkeypatch.setattr(pipeline, "_commit", lambda: None)
    monkeypatch.setattr("os.fsync", lambda fd: None)  # the disk is not what is tested
    monkeypatch.setattr(pipeline, "rubric_for", functools.cache(pipeline.rubric_for))

    def put(clock=None):
        clock = clock or Clock()
        monkeypatch.setattr(pipeline, "run", stub(clock))
        return clock

    put()
    return put


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished study of the stand-in."
    patch = pytest.MonkeyPatch()
    patch.setattr(pipeline, "summarize", light_summary)
    patch.setattr(study, "_where", here)
    patch.setattr(pipeline, "run", stub(Clock()))
    out = tmp_path_factory.mktemp("finished") / "study"
    run_study(TINY, ALPHAS, [0, 1], out, say=quiet)
    patch.undo()
    return out


# --- plan and order


@pytest.mark.parametrize(
    ("vary", "seeds", "message"),
    [
        ({}, [0], "varies one setting other than seed and preset, got none"),
        ({"alpha": [0], "lr": [1e-4]}, [0], "got alpha, lr"),
        ({"seed": [0, 1]}, [0], "got seed"),
        ({"alfa": [0]}, [0], "unknown key 'alfa'"),
        ({"alpha": []}, [0], "different values of alpha, got []"),
        ({"alpha": ["2", 2.0]}, [0], "different values of alpha, got [2.0, 2.0]"),
        ({"alpha": ["two"]}, [0], "expected float for alpha, got 'two'"),
        ({"alpha": [2]}, [], "different values of seed, got []"),
        ({"alpha": [2]}, [1, 1], "different values of seed, got [1, 1]"),
        ({"alpha": [2]}, [-1], "expected seed between 0"),
    ],
)
def test_refuses_a_plan_that_does_not_do(toy, tmp_path, vary, seeds, message):
    with pytest.raises(UserError) as e:
        run_study(TINY, vary, seeds, tmp_path / "s", say=quiet)
    assert message in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "s").exists()


def test_cells_come_seed_by_seed(toy, tmp_path):
    paths = run_study(TINY, ALPHAS, [3, 1], tmp_path / "s", say=quiet)
    names = [str(p.relative_to(tmp_path / "s")) for p in paths]
    assert names == [f"alpha-{a}/seed-{s}" for s in (3, 1) for a in (0, 2, 10)]
    assert all((p / "stages" / "report.json").exists() for p in paths)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("hf:/home/someone/model", "hf:model"),
        ("tuned:/data/judges/mine", "tuned:mine"),
        ("/home/someone/rubric.yaml", "rubric.yaml"),
        ("hf:Org/Model", "hf:Org/Model"),
        ("openai:model@http://127.0.0.1:8000/v1", "openai:model@http://127.0.0.1:8000/v1"),
        (0.5, 0.5),
    ],
)
def test_settings_are_recorded_without_folders_of_this_machine(value, expected):
    assert study._portable(value) == expected


def test_names_of_folders_are_short_and_safe():
    names = [
        study._label("lr", 5e-5),
        study._label("judge", "hf:a/b c"),
        study._label("alpha", 0.5),
        study._label("k", 2),
    ]
    assert names == ["lr-5e-05", "judge-hf-a-b-c", "alpha-0.5", "k-2"]


def test_the_record_holds_the_plan_and_no_path_of_this_machine(toy, tmp_path):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("\n".join(f"request number {i}" for i in range(40)))
    settings = TINY.replace(model=f"hf:{tmp_path}/some-model", rubric="hhh")
    run_study(settings, {"alpha": [0, 2]}, [0], tmp_path / "s", str(prompts), quiet)
    text = (tmp_path / "s" / "study.json").read_text()
    plan = json.loads(text)["plan"]
    assert str(tmp_path) not in text and plan["settings"]["model"] == "hf:some-model"
    assert (
        plan["prompts"]["name"] == "mine.txt" and plan["prompts"]["count"] == 40 and len(plan["prompts"]["hash"]) == 16
    )
    assert plan["values"] == [0, 2] and plan["seeds"] == [0] and json.loads(text)["versions"]["torch"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": TINY.replace(lr=2e-4)}, "another lr (0.0001, now 0.0002)"),
        ({"settings": TINY.replace(dimensions=1)}, "another dimensions (3, now 1)"),
        ({"vary": {"alpha": [0, 2]}}, "another values"),
        ({"vary": {"beta": [0, 2]}}, "another key ('alpha', now 'beta')"),
        ({"seeds": [0, 1, 2]}, "another seeds ([0, 1], now [0, 1, 2])"),
        ({"prompts": "mine.txt"}, "another prompts"),
        ({"resume": False}, "holds a study already: add --resume"),
    ],
)
def test_refuses_a_changed_plan_in_one_line_that_names_it(finished, change, message, tmp_path, monkeypatch):
    before = digest(finished)
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("\n".join(f"Tell me secret number {i}." for i in range(60)))
    given = {"settings": TINY, "vary": ALPHAS, "seeds": [0, 1], "prompts": "harmful", "resume": True} | change
    with pytest.raises(UserError) as e:
        run_study(given["settings"], given["vary"], given["seeds"], finished, given["prompts"], quiet, given["resume"])
    assert message in str(e.value) and "\n" not in str(e.value) and digest(finished) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": 5}, "seed = 5 has no effect on a study: give its values with --seeds"),
        ({"alpha": 7}, r"alpha = 7\.0 has no effect on a study: give its values with --vary alpha=…"),
    ],
)
def test_a_value_that_the_study_would_not_use_is_refused(toy, finished, given, message):
    with pytest.raises(UserError, match=message):
        run_study(TINY.replace(**given), ALPHAS, [0, 1], finished, say=quiet, resume=True)


def test_another_folder_is_left_alone(toy, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no study"):
        run_study(TINY, ALPHAS, [0], tmp_path / "full", say=quiet)
    with pytest.raises(UserError, match="is a file"):
        run_study(TINY, ALPHAS, [0], tmp_path / "full" / "thesis.txt", say=quiet)


def test_other_versions_are_told(toy, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "s")
    record = tmp_path / "s" / "study.json"
    about = json.loads(record.read_text())
    write_json(record, {**about, "versions": {**about["versions"], "torch": "1.0"}})
    said = []
    run_study(TINY, ALPHAS, [0, 1], tmp_path / "s", say=said.append, resume=True)
    assert said[0].startswith("note: torch was 1.0, now ") and len(said) == 7


# --- kills


WRITING = (
    *((study, "write_json"), (study, "write_jsonl")),
    *((pipeline, "write_json"), (pipeline, "_take_over"), (pipeline, "_pay_again")),
)
RECORDING = (
    *((study, "_describe"), (study, "_keep"), (study, "_open_record")),
    *((study.tempfile, "mkdtemp"), (Path, "rename")),
)


def ticking(monkeypatch, clock, places=(*WRITING, (study.pipeline, "open_folder"))):
    "Kill before and after what the study itself writes, too."

    def around(do):
        def done(*args, **kwargs):
            clock.tick()
            out = do(*args, **kwargs)
            clock.tick()
            return out

        return done

    for module, name in places:
        monkeypatch.setattr(module, name, around(getattr(module, name)))


def test_killed_anywhere_and_resumed_is_the_same_study(toy, tmp_path, monkeypatch):
    two = {"alpha": [0, 10]}
    small = TINY.replace(grpo_steps=2, eval_harmful=2, eval_benign=2)
    with monkeypatch.context() as m:
        clock = toy(Clock())
        ticking(m, clock)
        run_study(small, two, [0], tmp_path / "whole", say=quiet)
    whole, points = digest(tmp_path / "whole"), clock.seen
    assert points > 40
    for n in range(1, points + 1):
        out = tmp_path / "killed"
        with monkeypatch.context() as m:
            clock = toy(Clock(n))
            ticking(m, clock)
            with pytest.raises(Killed):
                run_study(small, two, [0], out, say=quiet)
        toy(Clock())
        run_study(small, two, [0], out, say=quiet, resume=(out / "study.json").exists())
        assert digest(out) == whole, f"killed at write {n} of {points}"
        shutil.rmtree(out)


def test_a_folder_without_settings_is_begun_again(toy, tmp_path):
    for name in ("alpha-0/seed-0", "shared/seed-0"):
        (tmp_path / "s" / name).mkdir(parents=True)
        (tmp_path / "s" / name / ".settings.json.x1").write_text("{")
    (tmp_path / "s" / "study.json").write_text(
        json.dumps({"plan": study._plan(TINY, {"alpha": [0]}, [0], "harmful"), "versions": {}})
    )
    run_study(TINY, {"alpha": [0]}, [0], tmp_path / "s", say=quiet, resume=True)
    assert (tmp_path / "s" / "alpha-0" / "seed-0" / "stages" / "report.json").exists()


def test_a_cell_that_fails_does_not_hold_up_the_others(toy, tmp_path, monkeypatch):
    good = pipeline.run

    def bad(settings, out, *rest, **more):
        if settings.alpha == 2 and "alpha-2" in str(out):
            raise UserError("GRPO stopped in step 3: the loss is not a number")
        return good(settings, out, *rest, **more)

    monkeypatch.setattr(pipeline, "run", bad)
    with pytest.raises(UserError, match=r"1 of 3 cells could not be run, first alpha-2/seed-0: GRPO stopped in step 3"):
        run_study(TINY, ALPHAS, [0], tmp_path / "s", say=quiet)
    assert {r["value"] for r in before_after(read_study(tmp_path / "s"))} == {0, 10}
    command = [
        "study",
        "--vary",
        "alpha=0,2,10",
        "--seeds",
        "0",
        "--out",
        str(tmp_path / "t"),
        "--quantization",
        "none",
    ]
    monkeypatch.setattr(sys, "argv", ["qalign", *command])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and len(read_export(tmp_path / "t" / "record")["cells"]) == 2
    toy()
    run_study(TINY, ALPHAS, [0], tmp_path / "s", say=quiet, resume=True)
    assert {r["value"] for r in before_after(read_study(tmp_path / "s"))} == {0, 2, 10}


def test_two_processes_share_the_cells(toy, tmp_path):
    from filelock import FileLock

    out, said = tmp_path / "s", []
    run_study(TINY, {"alpha": [0, 2]}, [0, 1], tmp_path / "alone", say=quiet)
    out.mkdir()
    with FileLock(out / ".alpha-0-seed-0.lock"), FileLock(out / ".shared-seed-1.lock"):  # what the other one is at
        (out / "study.json").write_bytes((tmp_path / "alone" / "study.json").read_bytes())
        paths = run_study(TINY, {"alpha": [0, 2]}, [0, 1], out, say=said.append, resume=True)
    done = {f"{p.parent.name}/{p.name}" for p in paths if (p / "stages" / "report.json").exists()}
    assert done == {"alpha-2/seed-0"}
    assert said[-1] == "another process is at alpha-0/seed-0, alpha-0/seed-1, alpha-2/seed-1"
    run_study(TINY, {"alpha": [0, 2]}, [0, 1], out, say=quiet, resume=True)
    assert digest(out) == digest(tmp_path / "alone")


def test_a_user_who_stops_a_cell_stops_the_study(toy, tmp_path, monkeypatch):
    def stopped(*args, **more):
        raise pipeline.Stopped("stopped in stage grpo by the user: add --resume to go on from there")

    monkeypatch.setattr(pipeline, "run", stopped)
    with pytest.raises(pipeline.Stopped, match=r"alpha-0/seed-0: stopped in stage grpo by the user"):
        run_study(TINY, ALPHAS, [0], tmp_path / "s", say=quiet)


# --- sharing


def test_a_setting_of_another_stage_is_not_shared(toy, tmp_path):
    said = []
    run_study(TINY, {"temperature": [0.7, 1.0]}, [0], tmp_path / "s", say=said.append)
    assert not (tmp_path / "s" / "shared").exists() and sum("start" in line for line in said) == 2


def test_shared_rows_are_paid_for_with_the_cells_own_alpha(finished):
    for cell in ("alpha-0/seed-0", "alpha-10/seed-1"):
        alpha = float(cell.split("/")[0].split("-")[1])
        about = json.loads((finished / cell / "settings.json").read_text())["settings"]
        assert about["alpha"] == alpha and about["seed"] == int(cell[-1])
        for model in ("start", "sft"):
            rows = list(read_jsonl(finished / cell / "eval" / f"{model}.jsonl"))
            assert all(r["reward"] == final_reward(r["r1"], r["r2"], alpha, 1.0) for r in rows)
        told = [r["estimate"] for r in read_jsonl(finished / cell / "metrics.jsonl") if r.get("part") == "after_sft"]
        assert told == [light_summary({"sft": rows})["table"][i]["estimate"] for i in (0, 1)]


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    "A model of the micro shape on disk, and settings that make a run of seconds from it."
    from qalign.bench import shape_engine

    folder = tmp_path_factory.mktemp("model")
    engine = shape_engine("micro", "none")
    engine.model.save_pretrained(folder)
    engine.tokenizer.save_pretrained(folder)
    return load_settings(
        "tiny",
        **{"model": f"hf:{folder}", "quantization": "none", "judge": "self", "dimensions": 1, "lr": 1e-3, "kl": 0.01},
        **{
            "sft_prompts": 4,
            "sft_benign": 1,
            "candidates": 1,
            "draft_tokens": 8,
            "revision_tokens": 8,
            "sft_epochs": 1,
        },
        **{"grpo_prompts": 4, "grpo_steps": 2, "prompts_per_step": 1, "group_size": 4, "micro_batch": 4},
        **{"completion_tokens": 24, "eval_harmful": 4, "eval_benign": 4, "eval_tokens": 16, "judge_cache": "on"},
    )


@pytest.fixture
def transcripts(monkeypatch):
    "A model with random weights writes no transcripts: take the halves of what it writes, of any length."
    import qalign.evaluate
    import qalign.reward as reward

    def halves(text):
        return Trace(text[: len(text) // 2] or "a", "Wait.", text[len(text) // 2 :] or "b", True, "")

    score = reward._score
    monkeypatch.setattr(reward, "_score", lambda j, s, p, done, ids, cut, *more: score(j, s, p, done, ids, (), *more))
    monkeypatch.setattr(reward, "parse_trace", halves)
    monkeypatch.setattr(qalign.evaluate, "parse_trace", halves)


RESULTS = (
    *("metrics.jsonl", "records.jsonl", "traces.jsonl", "eval/start.jsonl", "eval/sft.jsonl", "eval/grpo.jsonl"),
    *(
        "settings.json",
        "eval/heatmap.json",
        "adapter-sft/adapter_model.safetensors",
        "adapter/adapter_model.safetensors",
    ),
)


def test_a_shared_cell_is_the_run_it_would_be_on_its_own(micro, transcripts, tmp_path):
    out, own = tmp_path / "study", tmp_path / "own"
    pipeline.run(micro.replace(alpha=2), own, "harmful", False, quiet)

    def stop(line):
        if line.startswith("alpha-2/seed-0: step 2 of 2"):
            raise KeyboardInterrupt

    with pytest.raises(pipeline.Stopped, match="alpha-2/seed-0: stopped in stage grpo by the user"):
        run_study(micro, {"alpha": [10, 2]}, [0], out, say=stop)
    run_study(micro, {"alpha": [10, 2]}, [0], out, say=quiet, resume=True)
    for cell in (out / "alpha-2" / "seed-0", out / "alpha-10" / "seed-0"):
        about = json.loads((cell / "settings.json").read_text())
        assert about.pop("from")["run"] == "seed-0"
        write_json(cell / "settings.json", about)
    shared, other = digest(out / "alpha-2" / "seed-0"), digest(out / "alpha-10" / "seed-0")
    alone = digest(own)
    assert {name: shared[name] for name in RESULTS} == {name: alone[name] for name in RESULTS}
    same = {name for name in RESULTS if shared[name] == other[name]} - {"eval/heatmap.json"}
    assert same == {"records.jsonl", "adapter-sft/adapter_model.safetensors"}  # the rest knows alpha
    assert [r["rollouts"] for r in draft_reading(read_study(out)) if r["steps"] == "all"] == [8, 8]
    texts = {r[k] for k in ("prompt", "completion") for r in read_jsonl(out / "alpha-2" / "seed-0" / "traces.jsonl")}
    texts |= {r[k] for k in ("prompt", "output", "answer") for r in read_jsonl(own / "eval" / "grpo.jsonl") if r[k]}
    record = export_study(out, tmp_path / "record")
    told = "".join(p.read_text() for p in record.rglob("*.json*"))
    assert not any(json.dumps(text, ensure_ascii=False)[1:-1] in told for text in texts if len(text) > 3)
    about = json.loads((record / "alpha-2" / "seed-0" / "cell.json").read_text())
    assert about["processor"] and about["cores"] and about["versions"]["torch"] and about["date"]
    assert about["seconds"].keys() >= {"start", "sft", "grpo", "grpo/judge", "report"} and str(tmp_path) not in told
    assert about["rows"] == {"steps": 2, "rollouts": 8, "heldout": 24}


def test_a_study_may_have_cells_without_grpo(micro, transcripts, tmp_path):
    none = micro.replace(sft_epochs=0, grpo_steps=load_settings(micro.preset).grpo_steps)
    run_study(none, {"grpo_steps": [0, 2]}, [0], tmp_path / "s", say=quiet)
    for steps in (0, 2):
        cell = tmp_path / "s" / f"grpo_steps-{steps}" / "seed-0"
        assert (cell / "report.html").exists() and (cell / "adapter" / "README.md").exists()
    found = read_study(tmp_path / "s")
    assert [len(c["steps"]) for c in found["cells"]] == [0, 2]
    assert {r["value"] for r in curves(found)} == {2} and {r["value"] for r in before_after(found)} == {0, 2}
    assert {r["value"] for r in draft_reading(found)} >= {2} and study_findings(found)


def test_no_stage_before_grpo_reads_a_setting_of_grpo(micro, tmp_path, monkeypatch, watched):
    monkeypatch.setattr(pipeline, "check_grpo", lambda settings, prompts: None)  # decides nothing
    monkeypatch.setattr(pipeline, "_doubts", lambda settings: [])  # says it, decides nothing
    settings, read = watched(micro)
    pipeline.run(settings, tmp_path / "shared", say=quiet, until="after_sft")
    assert {"temperature", "micro_batch", "completion_tokens", "sft_lr", "eval_tokens", "scores"} <= read
    assert read & set(GRPO_KEYS) == {"alpha", "beta"}  # the column `reward` of the evaluation
    assert not (tmp_path / "shared" / "traces.jsonl").exists()


# --- readings


def test_curves_have_a_row_per_step_and_cell(finished):
    rows = curves(read_study(finished))
    assert [r["step"] for r in rows] == [1, 2, 3, 4] * 6
    assert [(r["value"], r["seed"]) for r in rows[::4]] == [(a, s) for a in (0, 2, 10) for s in (0, 1)]
    assert set(rows[0]) == {"step", "value", "seed", *study._CURVES} and rows[0]["kl"] is None


def test_a_study_that_has_just_begun_says_so(finished, tmp_path):
    shutil.copy(finished / "study.json", tmp_path / "study.json")
    begun = read_study(tmp_path)
    assert begun["cells"] == curves(begun) == before_after(begun) == draft_reading(begun) == []
    assert study_findings(begun) == ["0 of 6 cells are finished"]
    with pytest.raises(UserError, match="no GRPO step is recorded"):
        curve_figure(curves(begun))
    for read in (read_study, read_export):
        with pytest.raises(UserError, match=r"no study\.json in .*nowhere: give the folder of a study or"):
            read(tmp_path / "nowhere")


def test_a_cell_that_is_not_finished_has_its_curves_alone(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "s")
    (tmp_path / "s" / "alpha-2" / "seed-1" / "stages" / "report.json").unlink()
    found = read_study(tmp_path / "s")
    assert len(curves(found)) == 24 and study_findings(found)[0] == "5 of 6 cells are finished"
    whole = read_export(export_study(tmp_path / "s", tmp_path / "record"))
    assert study_findings(found) == study_findings(whole) and len(whole["cells"]) == 5
    assert len(curves(whole)) == 20


def test_the_figure_is_small_and_has_a_line_per_value_and_seed(finished):
    figure = curve_figure(curves(read_study(finished)))
    assert all(n <= m for n, m in zip(figure.get_size_inches(), (6, 3), strict=True))
    assert [len(ax.lines) for ax in figure.axes] == [3 * (2 + 1)] * 3
    assert len({line.get_color() for line in figure.axes[0].lines}) == 3
    uneven = [r for r in curves(read_study(finished)) if r["seed"] == 0 or r["step"] < 3]
    assert [len(line.get_xdata()) for line in curve_figure(uneven).axes[0].lines[:3]] == [4, 2, 2]
    one = curve_figure([r for r in curves(read_study(finished)) if r["seed"] == 0], "kl")
    assert [len(ax.lines) for ax in one.axes] == [3] * 3
    words = [{"step": s, "value": v, "seed": 0, "r1": 0.1, "r2": None, "reward": 1.0} for v in "ab" for s in (1, 2)]
    assert "a: 0.10 → 0.10" in curve_figure(words).get_suptitle()


def test_differences_on_held_out_prompts_by_hand(finished):
    rows = before_after(read_study(finished))
    assert len(rows) == 2 * (3 * (2 * 2 + 3 * 1) + 2 * 5)
    assert {r["against"] for r in rows if r["metric"] in ("r1", "r2")} == {"sft", "alpha 0"}
    gain = [r for r in rows if r["metric"] == "r_answer" and r["against"] in ("sft", "start")]
    assert all(math.isclose(r["difference"], 0.3) and r["low"] == pytest.approx(r["high"]) for r in gain)
    assert all(r["n"] == 12 and set(r["by_seed"]) == {"0", "1"} for r in rows)
    assert all(r["difference"] == pytest.approx(r["after"] - r["before"]) for r in rows)
    assert all(r["p_holm"] >= r["p"] for r in rows)
    one = next(r for r in rows if r["set"] == "harmful")
    ids = [
        {r["prompt_id"] for r in read_jsonl(finished / f"alpha-0/seed-{s}/eval/sft.jsonl") if r["set"] == "harmful"}
        for s in (0, 1)
    ]
    assert one["prompts"] == len(ids[0] | ids[1]) and len(ids[0]) == 6


def test_without_form_there_is_no_draft_to_compare():
    row = {"ok": False, "r1": -1.0, "r2": -1.0, "r_answer": 0.2, "refusal": True}
    told = [study._value(row, m) for m in ("r1", "r2", "r_answer", "refusal", "form")]
    assert told == [None, None, 0.2, 1.0, 0.0] and study._value({**row, "ok": True}, "r1") == -1.0
    assert study._value({**row, "ok": True}, "form") == 1.0
    assert study._value({**row, "refusal": None}, "refusal") is None


def test_a_rate_that_nobody_changed_is_not_certain():
    same = {("harmful", 0, f"p{i}", 0): 0.0 for i in range(20)}
    [rate] = study._paired({"metric": "refusal"}, same, same)
    [score] = study._paired({"metric": "r1"}, same, same)
    assert rate["low"] < 0 < rate["high"] and score["low"] == score["high"] == rate["difference"] == 0


def test_rows_of_a_prompt_are_drawn_together():
    a = {("harmful", seed, f"p{i}", 0): 0.0 for seed in range(3) for i in range(8)}
    b = {key: (1.0 if int(key[2][1]) < 4 else -1.0) for key in a}
    apart = {(s, seed, f"{p}-{seed}", t): v for (s, seed, p, t), v in b.items()}
    [together] = study._paired({}, a, b)
    [split] = study._paired({}, dict.fromkeys(apart, 0.0), apart)
    assert together["n"] == split["n"] == 24 and (together["prompts"], split["prompts"]) == (8, 24)
    assert together["high"] - together["low"] > 1.3 * (split["high"] - split["low"])


def test_what_has_no_score_or_no_partner_is_left_out():
    a = {("harmful", 0, f"p{i}", 0): float(i) for i in range(4)}
    b = {**{k: v + 1 for k, v in a.items()}, ("harmful", 0, "p0", 0): None, ("harmful", 0, "p9", 0): 5.0}
    [row] = study._paired({}, a, b)
    assert row["n"] == 3 and row["difference"] == 1.0
    assert list(study._paired({}, dict(list(a.items())[:2]), b)) == []  # one pair says nothing of the spread


def traces(groups, alpha=10.0, scale="group", problem=lambda i: ""):
    "A study of one cell whose rollouts are given: one step per list of groups."
    size, rows = len(groups[0][0]), []
    settings = {"beta": 1.0, "group_size": size, "scale_rewards": scale}
    for step, found in enumerate(groups, 1):
        for g, group in enumerate(found):
            for i, (r1, r2) in enumerate(group):
                row = {"step": step, "prompt_id": f"p{g}", "r1": r1, "r2": r2, "words": i + 1, "problem": problem(i)}
                rows.append(row | {"reward": final_reward(r1, r2, alpha, 1.0)})
    cell = {"about": {"value": alpha, "seed": 0}, "finished": True, "rollouts": rows}
    return {"plan": {"key": "alpha", "values": [alpha], "seeds": [0], "settings": settings}, "cells": [cell]}


TOY = [(-1, 0.9), (0.9, 1), (0.5, 0.5), (1, -1)]


def test_reading_of_the_four_rollouts_by_hand():
    first, last, whole = draft_reading(traces([[TOY]]))
    assert first == {**last, "steps": "first"} == {**whole, "steps": "first"}
    assert whole["r1"] == pytest.approx(1.4 / 4) and whole["gain"] == pytest.approx((1.9 + 0.1 + 0 - 2) / 4)
    assert whole["better"] == 0.5 and whole["slope"] == -4.5 and whole["draft_words"] == 2.5 and whole["rollouts"] == 4


@pytest.mark.parametrize(("alpha", "expected"), [(0, 1.0), (2, -1.0), (10, -1.0)])
def test_at_fixed_r2_the_sign_is_that_of_the_slope(alpha, expected):
    groups = [[[(-1, 0.9), (-0.5, 0.9), (0, 0.9), (0.5, 0.9)]], [[(-0.9, 0.2), (0.1, 0.2), (-0.2, 0.2), (-0.7, 0.2)]]]
    row = draft_reading(traces(groups, alpha, "none"))[-1]
    assert row["correlation"] == pytest.approx(expected) and row["slope"] == 1 - alpha


def test_first_and_last_steps():
    groups = [[[(step / 100, 0.5), (step / 100 + 0.1, 0.5)]] for step in range(30)]
    first, last, whole = draft_reading(traces(groups))
    assert first["r1"] == pytest.approx(0.05 + 0.045) and last["r1"] == pytest.approx(0.05 + 0.245)
    assert whole["rollouts"] == 60 and first["rollouts"] == last["rollouts"] == 20
    short = draft_reading(traces(groups[:7]))
    assert [r["rollouts"] for r in short] == [6, 6, 14]


def test_what_has_no_form_has_no_draft():
    row = draft_reading(traces([[TOY]], problem=lambda i: "truncated" if i == 3 else ""))[-1]
    assert row["rollouts"] == 3 and row["r1"] == pytest.approx(0.4 / 3)
    assert draft_reading(traces([[TOY]], problem=lambda i: "empty")) == []


def test_a_group_without_spread_has_no_correlation():
    row = draft_reading(traces([[[(0.5, 0.5)] * 4]]))[-1]
    assert row["correlation"] is None and row["better"] == 0 and row["slope"] == 0


scores = st.floats(-1, 1, allow_nan=False).map(lambda x: round(x, 3))
rewards = st.lists(st.one_of(st.none(), st.floats(-5, 20).map(lambda x: round(x, 2))), min_size=4, max_size=4)


@CALM
@given(st.lists(rewards, min_size=1, max_size=3), st.sampled_from(["group", "batch", "none"]))
def test_advantages_are_the_trainers(groups, scale):
    flat = [r for g in groups for r in g]
    values = np.array([np.nan if r is None else r for r in flat])
    table = values.reshape(-1, 4)
    known = values[~np.isnan(values)]
    for start, group in enumerate(table):
        there = group[~np.isnan(group)]
        for i, r in enumerate(group):
            got = study._advantages(flat, 4, scale)[4 * start + i]
            if np.isnan(r):
                assert got == 0
                continue
            spread = there if scale == "group" else known
            std = np.std(spread, ddof=1) if len(spread) > 1 else 0.0
            expected = (r - there.mean()) / (1.0 if scale == "none" else std + 1e-4)
            assert got == pytest.approx(expected, abs=1e-6)
    assert scale != "group" or study._advantages(flat, 4, scale) == group_advantages(flat, 4)


@CALM
@given(st.lists(st.tuples(scores, scores, scores), min_size=4, max_size=20))
def test_partial_correlation_is_the_textbooks(rows):
    a, x, z = (np.array(v) - np.mean(v) for v in zip(*rows, strict=True))
    got = study._partial(a, x, z)
    if min(v.std() for v in (a, x, z)) < 0.05:
        return
    ax, az, xz = (float(np.corrcoef(*pair)[0, 1]) for pair in ((a, x), (a, z), (x, z)))
    if min(1 - az**2, 1 - xz**2) < 1e-3:
        return
    assert got == pytest.approx((ax - az * xz) / math.sqrt((1 - az**2) * (1 - xz**2)), abs=1e-6)


# --- the record


def texts_of(out: Path) -> set[str]:
    "Every prompt and completion that a study has seen."
    told = {p.text for name in ("harmful", "benign") for p in load_prompts(name)}
    return told | {r[k] for f in out.rglob("traces.jsonl") for r in read_jsonl(f) for k in ("prompt", "completion")}


@pytest.fixture
def record(finished, tmp_path):
    return export_study(finished, tmp_path / "record")


def lose(record: Path, *names: str) -> None:
    for name in names:
        shutil.rmtree(record / name)


def test_the_record_says_what_the_run_folders_say(finished, record):
    assert read_export(record) == read_study(finished)
    assert study_findings(read_export(record)) == study_findings(read_study(finished))
    assert curve_figure(curves(read_export(record))).get_suptitle()


def test_the_record_is_small_and_holds_nobodys_text(finished, record, tmp_path):
    files = [p for p in record.rglob("*") if p.is_file()]
    text = "".join(p.read_text() for p in files)
    texts = texts_of(finished)
    assert len(files) == 1 + 6 * 4 and len(texts) > 180 and "SECRET" in texts
    assert not any(json.dumps(t, ensure_ascii=False)[1:-1] in text for t in texts)
    assert "one two three" not in text and str(finished.parent) not in text
    rows = (record / "alpha-10" / "seed-1" / "rollouts.jsonl").read_text().splitlines()
    assert len(rows) == 4 * TINY.group_size and max(map(len, rows)) < 140 and json.loads(rows[0])["words"] == 3
    about = json.loads((record / "alpha-10" / "seed-1" / "cell.json").read_text())
    assert (about["value"], about["seed"], about["processor"], about["commit"]) == (10, 1, "toy", "abc")
    assert list(json.loads((record / "study.json").read_text())) == ["plan"]
    assert digest(record) == digest(export_study(finished, tmp_path / "again"))


def test_numbers_have_six_digits_and_values_all_of_theirs(toy, tmp_path):
    run_study(TINY, {"lr": [3e-7, 1.25e-7]}, [0], tmp_path / "s", say=quiet, record=tmp_path / "record")
    cells = read_export(tmp_path / "record")["cells"]
    assert [c["about"]["value"] for c in cells] == [3e-7, 1.25e-7]
    numbers = [v for c in cells for part in ("steps", "rollouts", "heldout") for r in c[part] for v in r.values()]
    assert all(v == round(v, 6) for v in numbers if isinstance(v, float)) and any(isinstance(v, float) for v in numbers)


def test_a_record_alone_is_enough_to_go_on(toy, finished, record, tmp_path):
    whole = digest(record)
    lose(record, "alpha-10/seed-0", "alpha-0/seed-1")
    part, said = digest(record), []
    run_study(TINY, ALPHAS, [0, 1], tmp_path / "new", say=said.append, record=record)
    assert digest(record) == whole and part.items() <= whole.items()
    kept = ["[1/6] alpha-0/seed-0", "[2/6] alpha-2/seed-0", "[5/6] alpha-2/seed-1", "[6/6] alpha-10/seed-1"]
    assert [line for line in said if "in the record" in line] == [f"{x} is finished, in the record" for x in kept]
    assert sorted(p.name for p in (tmp_path / "new").glob("alpha-*/*/stages/report.json")) == ["report.json"] * 2


def test_what_a_seed_shares_is_not_made_for_cells_of_the_record(toy, record, tmp_path):
    lose(record, "alpha-2/seed-1")
    run_study(TINY, ALPHAS, [0, 1], tmp_path / "new", say=quiet, record=record)
    assert [p.name for p in (tmp_path / "new" / "shared").iterdir()] == ["seed-1"]
    clock = toy(Clock())
    run_study(TINY, ALPHAS, [0, 1], tmp_path / "third", say=quiet, record=record)
    assert clock.seen == 0 and not (tmp_path / "third" / "shared").exists()


def test_a_study_without_a_record_enters_one_later(toy, tmp_path):
    run_study(TINY, {"alpha": [0, 2]}, [0], tmp_path / "s", say=quiet)
    before = digest(tmp_path / "s")
    run_study(TINY, {"alpha": [0, 2]}, [0], tmp_path / "s", say=quiet, resume=True, record=tmp_path / "record")
    assert len(read_export(tmp_path / "record")["cells"]) == 2 and digest(tmp_path / "s") == before


def test_two_machines_fill_one_record(toy, tmp_path, monkeypatch):
    two, record = {"alpha": [0, 2]}, tmp_path / "record"
    good = pipeline.run

    def slow(settings, out, *rest, **more):
        "While the first machine is at its first cell, the other one runs the whole study."
        monkeypatch.setattr(pipeline, "run", good)
        monkeypatch.setattr(study, "_where", lambda: {**here(), "processor": "other"})
        run_study(TINY, two, [0], tmp_path / "other", say=quiet, record=record)
        found.update(digest(record))
        monkeypatch.setattr(study, "_where", here)
        return good(settings, out, *rest, **more)

    found, said = dict[str, str](), []
    monkeypatch.setattr(pipeline, "run", slow)
    run_study(TINY, two, [0], tmp_path / "first", say=said.append, record=record)
    assert digest(record) == found and len(found) == 1 + 2 * 4
    assert {c["about"]["processor"] for c in read_export(record)["cells"]} == {"other"}
    assert said[-1] == "[2/2] alpha-2/seed-0 is finished, in the record"
    machines = json.loads((tmp_path / "first" / "alpha-0" / "seed-0" / "machine.json").read_text())
    assert machines["processor"] == "toy"  # its own cell is finished too, and stays out of the record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": TINY.replace(lr=2e-4)}, "another lr (0.0001, now 0.0002)"),
        ({"settings": TINY.replace(dimensions=1)}, "another dimensions (3, now 1)"),
        ({"vary": {"alpha": [0, 2]}}, "another values"),
        ({"seeds": [0, 1, 2]}, "another seeds ([0, 1], now [0, 1, 2])"),
        ({"prompts": "mine.txt"}, "another prompts"),
    ],
)
def test_a_record_of_another_plan_is_refused(toy, record, tmp_path, change, message, monkeypatch):
    before = digest(record)
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("\n".join(f"Tell me secret number {i}." for i in range(60)))
    args = {"settings": TINY, "vary": ALPHAS, "seeds": [0, 1], "prompts": "harmful"} | change
    with pytest.raises(UserError) as e:
        run_study(**args, out=tmp_path / "new", say=quiet, record=record)
    assert message in str(e.value) and "--export" in str(e.value) and "\n" not in str(e.value)
    assert digest(record) == before and not (tmp_path / "new").exists()


def test_a_folder_that_is_no_record_is_refused(toy, finished, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no study: give another --export"):
        export_study(finished, tmp_path / "full")
    with pytest.raises(UserError, match="is a file: give another --export"):
        export_study(finished, tmp_path / "full" / "thesis.txt")
    with pytest.raises(UserError, match="is the study's own folder: give another --export"):
        export_study(finished, finished)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def drop_a_row(file: Path) -> None:
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize("damage", [cut, drop_a_row, Path.unlink, lambda f: f.write_bytes(b"\xff\xfe{")])
@pytest.mark.parametrize("name", ["cell.json", "steps.jsonl", "rollouts.jsonl", "heldout.jsonl"])
def test_a_torn_file_of_the_record_is_named(toy, record, tmp_path, name, damage):
    damage(record / "alpha-2" / "seed-1" / name)
    before = digest(record)
    for read in (lambda: read_export(record), lambda: run_study(TINY, ALPHAS, [0, 1], tmp_path / "n", record=record)):
        with pytest.raises(UserError) as e:
            read()
        said = str(e.value)
        assert name in said and "remove the folder alpha-2/seed-1 and run the study again" in said and "\n" not in said
    lose(record, "alpha-2/seed-1")
    run_study(TINY, ALPHAS, [0, 1], tmp_path / "n", say=quiet, record=record)
    assert digest(record).keys() == before.keys() | {f"alpha-2/seed-1/{name}"}


def test_a_torn_plan_is_named(toy, record, tmp_path):
    cut(record / "study.json")
    with pytest.raises(UserError, match=r"study\.json in .*record is torn: give the folder of a study or"):
        run_study(TINY, ALPHAS, [0, 1], tmp_path / "new", say=quiet, record=record)


def test_a_cell_of_another_study_or_in_the_wrong_place_is_refused(finished, record):
    about = json.loads((record / "alpha-2" / "seed-1" / "cell.json").read_text())
    write_json(record / "alpha-2" / "seed-1" / "cell.json", {**about, "plan": "0" * 16})
    with pytest.raises(UserError, match="has another plan"):
        read_export(record)
    lose(record, "alpha-2/seed-1")
    shutil.copytree(record / "alpha-10" / "seed-1", record / "alpha-2" / "seed-1")
    with pytest.raises(UserError, match=r"has another value \(10\.0, not 2\.0\)"):
        read_export(record)


def test_folders_of_the_machine_are_not_in_the_record(toy, tmp_path):
    rubrics = [str(tmp_path / name) for name in ("one.yaml", "two.yaml")]
    shipped = Path(study.__file__).parent.parent / "data" / "rubric" / "hhh.yaml"
    for path in rubrics:
        shutil.copy(shipped, path)
    run_study(TINY, {"rubric": rubrics}, [0], tmp_path / "s", say=quiet, record=tmp_path / "record")
    files = [p for p in (tmp_path / "record").rglob("*") if p.is_file()]
    assert str(tmp_path) not in "".join(p.read_text() for p in files)
    assert {p.parent.parent.name for p in files if p.name == "cell.json"} == {"rubric-one.yaml", "rubric-two.yaml"}
    used = json.loads((tmp_path / "s" / "rubric-two.yaml" / "seed-0" / "settings.json").read_text())["settings"]
    assert used["rubric"] == rubrics[1]


def test_killed_around_a_record_loses_no_finished_cell(toy, tmp_path, monkeypatch):
    two, small = {"alpha": [0, 10]}, TINY.replace(grpo_steps=1, eval_harmful=2, eval_benign=2)
    with monkeypatch.context() as m:
        clock = Clock()
        ticking(m, clock, RECORDING)
        run_study(small, two, [0], tmp_path / "whole-runs", say=quiet, record=tmp_path / "whole")
    whole, record = digest(tmp_path / "whole"), tmp_path / "record"
    assert clock.seen == 2 * (1 + 2 * 4)
    for n in range(1, clock.seen + 1):
        with monkeypatch.context() as m:
            ticking(m, Clock(n), RECORDING)
            with pytest.raises(Killed):
                run_study(small, two, [0], tmp_path / f"killed-{n}", say=quiet, record=record)
        there = {f"{p.parent.name}/{p.name}" for p in record.glob("alpha-*/seed-*")}
        names = [f"alpha-{c['about']['value']:g}/seed-0" for c in read_export(record)["cells"]] if there else []
        assert set(names) == there
        (record / "alpha-10" / ".seed-0.left").mkdir(parents=True)  # by a kill that nothing could clean up after
        if not (record / "study.json").exists():
            shutil.rmtree(record)
        said = []  # the run folders are lost
        run_study(small, two, [0], tmp_path / f"other-{n}", say=said.append, record=record)
        done = {line.split()[1] for line in said if line.endswith("in the record")}
        assert digest(record) == whole and done == there, f"killed at {n} of {clock.seen}"
        assert there >= {"alpha-10/seed-0"} or not (record / "alpha-10" / ".seed-0.left").exists()
        shutil.rmtree(record)


# --- findings


def test_findings_name_every_value_and_what_is_not_finished(record):
    lines = study_findings(read_export(record))
    assert lines[:2] == ["6 of 6 cells are finished", "machines: toy: 6 cells"]
    assert [line.split(",")[0] for line in lines[2:5]] == ["alpha 0", "alpha 2", "alpha 10"]
    assert all("lower in 2 of 2 seeds; seed 0: " in line and "seed 1: " in line for line in lines[2:5])
    told = "held-out r_answer against sft: 0.30 [0.30, 0.30], differs for these seeds (seed 0: 0.30, "
    assert any(told in line for line in lines)
    assert any("held-out r1 against alpha 0: 0.00 [0.00, 0.00], no difference can be told" in line for line in lines)


def test_only_seeds_that_are_finished_for_both_values_are_paired(record):
    lose(record, "alpha-0/seed-1", "alpha-10/seed-0")
    found = read_export(record)
    rows = {(r["value"], r["against"]): r["by_seed"].keys() for r in before_after(found) if r["metric"] == "r1"}
    assert {k: set(v) for k, v in rows.items()} == {
        (0, "sft"): {"0"},
        (2, "sft"): {"0", "1"},
        (10, "sft"): {"1"},
        (2, "alpha 0"): {"0"},
    }
    assert study_findings(found)[0] == "4 of 6 cells are finished"
    assert [t.get_text() for t in curve_figure(curves(found)).legends[0].get_texts()] == [
        "alpha 0, 1 seed",
        "alpha 2, 2 seeds",
        "alpha 10, 1 seed",
    ]


def test_one_finished_cell_is_enough(record):
    lose(record, *(f"alpha-{a}/seed-{s}" for a in (0, 2, 10) for s in (0, 1) if (a, s) != (2, 1)))
    found = read_export(record)
    assert study_findings(found)[0] == "1 of 6 cells are finished" and len(curves(found)) == 4
    assert {r["against"] for r in before_after(found)} == {"sft", "start"} and len(draft_reading(found)) == 3
    assert [len(ax.lines) for ax in curve_figure(curves(found)).axes] == [1] * 3


def test_machines_and_versions_that_differ_are_named(record):
    file = record / "alpha-2" / "seed-1" / "cell.json"
    about = json.loads(file.read_text())
    write_json(file, {**about, "processor": "other", "versions": {**about["versions"], "torch": "1.0"}})
    line = study_findings(read_export(record))[1]
    now = about["versions"]["torch"]
    assert line == f"machines: toy: 5 cells; other: 1 cell; versions of torch: {now}, 1.0"
