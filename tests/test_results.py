"Room results: a copy of an evaluation holds nobody's text and gives the same tables."

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qalign.core import UserError, read_jsonl, write_json, write_jsonl
from qalign.results import share
from qalign.tables import write_tables

SECRET = "somebody's own words"


def verdict(kind: str, label: str, **more: object) -> dict[str, object]:
    return {"kind": kind, "label": label, "status": "ok", "probability": 0.25, "score": None, "note": "AUC 0.9", **more}


def row(model: str, i: int, said: str) -> dict[str, object]:
    harmful = i % 2 == 0
    head = {"model": model, "set": "advbench" if harmful else "xstest", "id": f"p{i}", "trial": 0, "category": "c"}
    text = dict.fromkeys(("prompt", "output", "answer", "behavior", "context", "tags", "anything_new"), SECRET)
    cost = {"tokens_in": 5, "tokens_out": 7, "seconds": 0.123456789, "finish": "stop", "error": ""}
    judged = {"strings:qalign": verdict("refusal", said, reason=SECRET, reply=SECRET)}
    judged["guard"] = verdict("harm", "safe" if said == "refusal" else "harmful", reason=SECRET)
    asked = {"label": "harmful" if harmful else "benign", "prompt_hash": f"{i:016x}", "transcripts": False}
    asked |= {"cluster": f"behavior {i // 6}"} if harmful else {}
    return {**head, **text, **cost, **asked, "verdicts": judged}


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    folder = tmp_path / "eval"
    for model, every in (("start", 5), ("grpo", 2)):
        rows = [row(model, i, "refusal" if i % every == 0 else "compliance") for i in range(24)]
        rows[4] |= {"error": SECRET, "output": None}
        for name in ("advbench", "xstest"):
            write_jsonl(folder / name / f"{model}.jsonl", [r for r in rows if r["set"] == name])
        text = {"output": SECRET, "question": SECRET}
        lines = [{"id": str(i), "correct": {"acc": i % every == 0}, **text} for i in range(9)]
        place = folder / "capability" / model / "arc_challenge"
        told = {"model": model, "set": "arc_challenge", "metric": "acc", "estimate": 0.5, "low": 0.2, "high": 0.8}
        told |= {"n": 9, "extraction_failed": None, "no_answer": None}
        told["settings"] = {"weights": {"spec": "hf:/home/me/m"}}
        write_jsonl(place.with_suffix(".jsonl"), lines)
        write_json(place.with_suffix(".json"), {"settings": told["settings"], "rows": [told]})
    what = {"spec": "hf:/home/me/model", "adapter": "/home/me/runs/adapter", "system": ""}
    models = {"grpo": {"what": what, "files": [["model.safetensors", 1, 2]], "identity": {"spec": "hf:org/name"}}}
    write_json(folder / "grid.json", {"sampling": {"temperature": 0.7}, "models": models})
    return folder


def test_the_copy_holds_nobodys_text_and_no_folder_of_this_machine(evaluation, tmp_path):
    files = share(evaluation, tmp_path / "copy")
    everything = "".join(p.read_text() for p in (tmp_path / "copy").rglob("*.json*"))
    assert len(files) == 6 and SECRET not in everything and "/home/me" not in everything
    grid = json.loads((tmp_path / "copy" / "grid.json").read_text())
    assert grid["models"]["grpo"]["what"] == {"spec": "hf:model", "adapter": "adapter", "system": ""}
    assert grid["models"]["grpo"]["identity"] == {"spec": "hf:org/name"} and "files" not in grid["models"]["grpo"]


def test_the_tables_of_both_are_the_same(evaluation, tmp_path):
    share(evaluation, tmp_path / "copy")
    pairs = [write_tables(f, tmp_path / "out" / f.name) for f in (evaluation, tmp_path / "copy")]
    for one, two in zip(*pairs, strict=True):
        assert one.name == two.name
        assert one.read_bytes().replace(b"eval", b"copy") == two.read_bytes().replace(b"eval", b"copy")
    assert "advbench: a behavior with all its test cases counts as one prompt." in pairs[1][0].read_text()
    (error,) = [r for r in read_jsonl(tmp_path / "copy" / "advbench" / "grpo.jsonl") if r.get("error")]
    assert error["error"] == "not answered" and error["seconds"] == 0.1235


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("refusal:/home/me/judge", "refusal:judge"),
        ("ask-refusal:hf:/home/me/model", "ask-refusal:hf:model"),
        ("ask-harm:openai:m@http://host:8000/v1", "ask-harm:openai:m"),
        ("ask-harm:hf:org/name", "ask-harm:hf:org/name"),
        ("strings:qalign", "strings:qalign"),
    ],
)
def test_judges_lose_folders_and_servers(evaluation, tmp_path, name, expected):
    file = evaluation / "xstest" / "start.jsonl"
    write_jsonl(file, [{**r, "verdicts": {name: r["verdicts"]["guard"]}} for r in read_jsonl(file)])
    share(evaluation, tmp_path / "copy")
    assert {j for r in read_jsonl(tmp_path / "copy" / "xstest" / "start.jsonl") for j in r["verdicts"]} == {expected}


def test_judges_that_would_be_one_are_refused(evaluation, tmp_path):
    file = evaluation / "xstest" / "start.jsonl"
    rows = list(read_jsonl(file))
    for r, place in zip(rows, ("/a", "/b") * 6, strict=True):  # never both in one row
        r["verdicts"][f"refusal:{place}/judge"] = r["verdicts"]["strings:qalign"]
    write_jsonl(file, rows)
    with pytest.raises(
        UserError, match=r"^refusal:/a/judge and refusal:/b/judge are both refusal:judge in a copy: redo"
    ):
        share(evaluation, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def seeds_of(evaluation: Path) -> None:
    "Make the rows of grpo those of two training seeds."
    for path in evaluation.glob("*/grpo.jsonl"):
        rows = list(read_jsonl(path))
        for seed in (1, 2):
            write_jsonl(path.with_name(f"grpo@{seed}.jsonl"), [{**r, "seed": seed} for r in rows])
        path.unlink()


def test_seeds_are_files_of_their_own(evaluation, tmp_path):
    seeds_of(evaluation)
    share(evaluation, tmp_path / "copy")
    names = sorted(p.name for p in (tmp_path / "copy" / "xstest").iterdir())
    assert names == ["grpo@1.jsonl", "grpo@2.jsonl", "start.jsonl"]
    assert {r["seed"] for r in read_jsonl(tmp_path / "copy" / "xstest" / "grpo@2.jsonl")} == {2}
    share(evaluation, tmp_path / "copy")
    (tmp_path / "copy" / "xstest" / "grpo@1.jsonl").rename(tmp_path / "copy" / "xstest" / "grpo.jsonl")
    with pytest.raises(UserError, match=r"xstest/grpo\.jsonl is of an older copy and holds grpo too: remove it"):
        share(evaluation, tmp_path / "copy")


def local(evaluation: Path, old: str, model: str) -> None:
    "Call a model's capability by the folder it was loaded from, as it is without a name."
    folder = evaluation / "capability" / old
    record = json.loads((folder / "arc_challenge.json").read_text())
    record["rows"][0]["model"] = model
    write_json(folder / "arc_challenge.json", record)
    folder.rename(folder.with_name(re.sub(r"[^\w.-]+", "-", model)))


def test_capability_of_a_local_folder_keeps_its_last_name(evaluation, tmp_path):
    local(evaluation, "grpo", "hf:/home/me/tuned")
    share(evaluation, tmp_path / "copy")
    assert sorted(p.name for p in (tmp_path / "copy" / "capability").iterdir()) == ["hf-tuned", "start"]
    assert "hf:tuned" in write_tables(tmp_path / "copy", tmp_path / "out")[0].read_text()
    assert "home-me" not in str(sorted((tmp_path / "copy").rglob("*")))


def test_capability_of_two_models_that_would_be_one_is_refused(evaluation, tmp_path):
    local(evaluation, "grpo", "hf:/home/me/tuned")
    local(evaluation, "start", "hf:/home/you/tuned")
    with pytest.raises(UserError, match=r"are both capability/hf-tuned/arc_challenge\.json in a copy"):
        share(evaluation, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_copy_of_a_copy_is_the_copy(evaluation, tmp_path):
    one, two = share(evaluation, tmp_path / "a"), share(tmp_path / "a", tmp_path / "b")
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_faults_are_named_in_one_line(evaluation, tmp_path):
    with pytest.raises(UserError, match="is the evaluation itself"):
        share(evaluation, evaluation / ".." / evaluation.name)
    with pytest.raises(UserError, match=r"no SET/MODEL\.jsonl with rows in none"):
        share(tmp_path / "none", tmp_path / "copy")
    file = evaluation / "xstest" / "start.jsonl"
    write_jsonl(file, [{**r, "label": "odd"} for r in read_jsonl(file)])
    with pytest.raises(UserError, match=r"xstest/start\.jsonl, row 1: expected label harmful or benign"):
        share(evaluation, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_the_command(evaluation, tmp_path):
    command = [sys.executable, "-c", "from qalign.cli import main; main()", "eval", "share", "eval", "copy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "copy/advbench/start.jsonl" in done.stdout, done.stderr
    again = subprocess.run([*command[:-1], "eval"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and "is the evaluation itself" in again.stderr and again.stderr.count("\n") == 1
