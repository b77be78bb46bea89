"The whole pipeline on the embedded model, as small as it gets: one seed gives one set of numbers, also when killed."

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qalign.core import load_settings, read_jsonl
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
    out, err = process.communicate(timeout=300)
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
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "qalign: stopped in stage records by the user: add --resume to go on from there"


def test_start_model_writes_no_transcripts(once):
    rows = list(read_jsonl(once[0] / "eval" / "start.jsonl"))
    assert len(rows) == 8 and not any(parse_trace(r["output"]).ok for r in rows)
    assert all(r["r_answer"] is not None and -1 <= r["r_answer"] <= 1 for r in rows)


def test_training_changes_the_model(once):
    texts = {m: [r["output"] for r in read_jsonl(once[0] / "eval" / f"{m}.jsonl")] for m in ("start", "sft")}
    assert texts["start"] != texts["sft"]
