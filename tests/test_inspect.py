"The sets as tasks of inspect_ai: what is asked, what is scored, and the way back to rows."

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from inspect_ai import eval as run_eval
from inspect_ai import score as score_log
from inspect_ai.log import read_eval_log
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    ModelOutput,
    ModelUsage,
    get_model,
)
from test_benchmarks import SHAPES, save, table

from qalign import cli, generations, inspect_tasks
from qalign.benchmarks import BENCHMARKS, Item
from qalign.core import UserError
from qalign.generations import Store, _signed, compare, rates, read_rows, rescore, write_rows
from qalign.inspect_tasks import TASKS, judged, output_text, rows_from_log, safety_task, strings
from qalign.safety import Decision, SafetyJudge, string_judge
from qalign.tables import measure, read_records

NO, YES = "I'm sorry, but I can't help with that.", "Sure. Begin with a clean table."
ROOT = Path(__file__).parents[1]


def items(n, label="harmful"):
    return [Item(f"i{k}", f"question {k}", "s", label) for k in range(n)]


def model(answer):
    "A model that answers by rule: text, parts of a message, or an exception."

    def reply(messages, tools, choice, config):
        said = answer(messages[-1].text)
        if isinstance(said, Exception):
            raise said
        choice = ChatCompletionChoice(message=ChatMessageAssistant(content=said), stop_reason="max_tokens")
        usage = ModelUsage(
            input_tokens=5, output_tokens=7, total_tokens=12
        )  # else counted with a file from the network
        return ModelOutput(model="mockllm", choices=[choice], usage=usage)

    return get_model("mockllm/model", custom_outputs=reply, memoize=False)


def run(tmp_path, task, answer, **options):
    how = {"log_dir": str(tmp_path / "logs"), "display": "none", "fail_on_error": False} | options
    [log] = run_eval(task, model(answer), **how)
    assert log.status == "success", log.error
    return log


def by_rule(judge):
    "Makes `judged` find a judge of ours under the name strings:ours."
    return lambda name: judge


def one(log, n=0):
    "Metrics of a scorer, and how many samples it scored."
    found = log.results.scores[n]
    return {k: m.value for k, m in found.metrics.items()}, found.scored_samples, found.unscored_samples


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Small files of ours in the published shapes."
    root = tmp_path_factory.mktemp("data")
    for name in TASKS:
        bench = BENCHMARKS[name]
        save(root / bench.folder, name, table(name, 6), next(iter(bench.split().files)))
    return root


# Tasks


def test_every_safety_and_over_refusal_set_is_a_task():
    assert set(TASKS) == {n for n, b in BENCHMARKS.items() if b.kind in ("harm", "over_refusal")} and len(TASKS) == 16
    assert all(name in SHAPES for name in TASKS)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_loads_its_set(monkeypatch, data, name):
    monkeypatch.setenv("QALIGN_DATA", str(data))
    made = TASKS[name](rows="any")
    samples = list(made.dataset)
    half = 3 if name in ("xstest", "sgxstest") else 6
    assert len(samples) == len({s.id for s in samples}) == half
    label = "benign" if BENCHMARKS[name].kind == "over_refusal" else "harmful"
    assert {s.metadata["label"] for s in samples} == {label} and all(s.metadata["prompt_hash"] for s in samples)
    assert (made.config.temperature, made.config.max_tokens, made.epochs) == (0.7, 2048, 3)
    if name == "harmbench_direct":
        assert samples[1].metadata["context"] == "Text 1" and samples[1].metadata["behavior"] == "Ask 1."
        assert samples[1].input.startswith("Text 1\n\n---\n\n")


def test_the_other_half(monkeypatch, data):
    monkeypatch.setenv("QALIGN_DATA", str(data))
    assert {s.metadata["label"] for s in TASKS["xstest"](split="unsafe", rows="any").dataset} == {"harmful"}
    with pytest.raises(UserError, match="holds 3 rows, 250 are published"):
        TASKS["xstest"]()


def test_judges_that_cannot_say_it():
    with pytest.raises(UserError, match="counts false refusals and ask-harm:smollm2 decides harm"):
        safety_task("s", items(2, "benign"), "ask-harm:smollm2")
    with pytest.raises(UserError, match="counts false refusals and rubric:hhh:smollm2 decides harm"):
        safety_task("s", items(2, "benign"), "rubric:hhh:smollm2")
    with pytest.raises(UserError, match="no judge 'nobody'"):
        safety_task("s", items(2), "nobody")


# Text


@pytest.mark.parametrize(
    "content, transcripts, want",
    [
        ("plain", False, "plain"),
        ("draft <think>x</think> revision", True, "draft <think>x</think> revision"),
        ([ContentText(text="a"), ContentText(text="b")], True, "a\nb"),
        ([ContentReasoning(reasoning="x"), ContentText(text="a")], False, "<think>\nx\n</think>\na"),
        ([ContentReasoning(reasoning="x"), ContentText(text="draft\n\nrevision")], True, None),
        ([ContentReasoning(reasoning=""), ContentText(text="a")], True, "a"),
    ],
)
def test_output_text(content, transcripts, want):
    assert output_text(ChatMessageAssistant(content=content), transcripts) == want


# Scores


@pytest.mark.parametrize("label, rate", [("harmful", 2 / 3), ("benign", 1 / 3)])
def test_rates_by_phrases(tmp_path, label, rate):
    task = safety_task("s", items(6, label))
    log = run(tmp_path, task, lambda t: NO if int(t[-1]) % 3 == 0 else f"<think>{NO}</think> {YES}")
    metrics, scored, unscored = one(log)
    assert metrics["mean"] == pytest.approx(rate) and (scored, unscored) == (6, 0)
    assert metrics["stderr"] == pytest.approx(math.sqrt(rate * (1 - rate) / 5))


def test_errors_are_clustered_by_prompt(tmp_path):
    twice = [Item(f"{k}{c}", f"question {k}", "s", "harmful") for k in range(4) for c in "ab"]
    answer = lambda t: NO if t[-1] in "01" else YES  # noqa: E731
    metrics, _, _ = one(run(tmp_path, safety_task("s", twice), answer, epochs=1))
    once, _, _ = one(run(tmp_path, safety_task("s", twice[::2]), answer, epochs=1))
    assert metrics["stderr"] == pytest.approx(once["stderr"])


def test_errors_are_clustered_by_behavior(tmp_path):
    cases = [
        Item(f"b{k}/{c}", f"{c} question {k}", "s", "harmful", extra={"BehaviorID": f"b{k}"})
        for k in range(4)
        for c in range(2)
    ]
    answer = lambda t: NO if t[-1] in "01" else YES  # noqa: E731
    log = run(tmp_path, safety_task("s", cases), answer, epochs=1)
    once, _, _ = one(run(tmp_path, safety_task("s", cases[::2]), answer, epochs=1))
    assert one(log)[0]["stderr"] == pytest.approx(once["stderr"])
    rows = rows_from_log(log)
    assert len({r["cluster"] for r in rows}) == 4 and len({r["prompt_hash"] for r in rows}) == 8
    assert not any("cluster" in r for r in rows_from_log(run(tmp_path, safety_task("s", items(2)), answer, epochs=1)))


@pytest.mark.parametrize("missing, mean, unscored", [("harmful", 0.5, 0), ("apart", 0.0, 3)])
def test_missing_answers(tmp_path, missing, mean, unscored):
    def answer(t):
        return "draft <think> open" if int(t[-1]) % 2 else f"draft\n<think>x</think>\n{NO}"

    log = run(tmp_path, safety_task("s", items(6), missing=missing, transcripts=True), answer)
    metrics, scored, left = one(log)
    assert metrics["mean"] == mean and left == unscored and scored == 6 - unscored
    reasons = {s.scores[next(iter(s.scores))].reason for s in log.samples}
    assert reasons == ({None} if missing == "harmful" else {None, "no_response"})


def test_a_failed_judge_leaves_samples_unscored(tmp_path, monkeypatch):
    def ask(cases):
        mute = Decision(None, status="failed", reason="not the reply asked for")
        return [mute if c.prompt[-1] == "1" else Decision("harmful", 0.9) for c in cases]

    monkeypatch.setattr(inspect_tasks, "_loaded", by_rule(SafetyJudge("ours", "harm", ask, note="made up")))
    log = run(tmp_path, safety_task("s", items(4), "strings:ours"), lambda t: YES)
    metrics, scored, unscored = one(log, 1)
    assert metrics["mean"] == 1.0 and (scored, unscored) == (3, 1)
    bad = [s.scores[k] for s in log.samples for k in s.scores if s.scores[k].reason]
    assert {b.reason for b in bad} == {"grader_failed"} and "not the reply asked for" in bad[0].explanation
    rows = rows_from_log(log, "m")
    assert {r["verdicts"]["ours"]["status"] for r in rows} == {"ok", "failed"} and rows[0]["verdicts"]["ours"]["note"]


def test_a_cut_think_block_is_not_scored(tmp_path):
    parts = [ContentReasoning(reasoning="x"), ContentText(text=f"{YES}\n\n{NO}")]
    log = run(tmp_path, safety_task("s", items(2), transcripts=True), lambda t: parts)
    assert one(log)[1:] == (0, 2)
    row = rows_from_log(log)[0]
    assert row["output"] is None and "cut the think block out" in row["error"] and not row["verdicts"]
    log = run(tmp_path, safety_task("s", items(2)), lambda t: parts)
    assert one(log)[0]["mean"] == 0.0 and rows_from_log(log)[0]["answer"] == f"{YES}\n\n{NO}"


def test_a_system_message(tmp_path):
    log = run(tmp_path, safety_task("s", items(1), system="Be brief."), lambda t: YES, epochs=1)
    assert log.samples[0].messages[0].text == "Be brief."


def test_kept_answers_are_those_of_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "cache"))
    asked, weights = [], {"hash": "one"}
    monkeypatch.setattr(inspect_tasks, "_scopes", lambda model: dict(weights))

    def answer(t):
        asked.append(t)
        return YES

    task = safety_task("s", items(3), cache=True)
    for _ in range(2):
        log = run(tmp_path, task, answer)
    assert len(asked) == 9 and one(log)[0]["mean"] == 1.0  # three trials each
    weights["hash"] = "other"
    run(tmp_path, task, answer)
    assert len(asked) == 18
    run(tmp_path, safety_task("s", items(3)), answer)
    assert len(asked) == 27


def test_a_folder_is_known_by_its_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    local = SimpleNamespace(model_args={"model_path": str(tmp_path)}, name="local")
    assert len(inspect_tasks._scopes(local)["weights"]) == 16
    assert inspect_tasks._scopes(SimpleNamespace(model_args={}, name=str(tmp_path))) == inspect_tasks._scopes(local)
    assert inspect_tasks._scopes(SimpleNamespace(model_args={}, name="org/model")) == {}


# From a log to rows


def test_rows(tmp_path):
    def answer(t):
        return RuntimeError("no more memory") if t[-1] == "2" else f"{t}: {YES}"

    log = run(tmp_path, safety_task("s", items(3)), answer)
    rows = rows_from_log(log.location)
    assert [(r["id"], r["trial"]) for r in sorted(rows, key=lambda r: (r["id"], r["trial"]))] == [
        (f"i{k}", t) for k in range(3) for t in range(3)
    ]
    good, bad = ([r for r in rows if (r["id"] == "i2") is lost] for lost in (False, True))
    assert all(r["output"] == r["answer"] == f"{r['prompt']}: {YES}" and r["finish"] == "length" for r in good)
    assert all(r["output"] is None and "no more memory" in r["error"] for r in bad)
    assert {r["model"] for r in rows} == {"mockllm-model"} and {r["set"] for r in rows} == {"s"}
    assert all((r["tokens_in"], r["tokens_out"]) == (5, 7) for r in good) and len({r["key"] for r in rows}) == 9


def test_long_texts_are_whole(tmp_path):
    long = [Item("x", "please " * 400, "s", "harmful")]
    log = run(tmp_path, safety_task("s", long), lambda t: "word " * 400 + YES, epochs=1)
    [row] = rows_from_log(log.location)
    assert row["prompt"] == "please " * 400 and row["output"].endswith(YES)


def test_rows_go_on(tmp_path):
    logs = [
        run(tmp_path, safety_task("s", items(6)), a) for a in (lambda t: YES, lambda t: NO if t[-1] in "012" else YES)
    ]
    for log, name in zip(logs, ("start", "grpo"), strict=True):
        write_rows(tmp_path / "e", rows_from_log(log.location, name))
    other = SafetyJudge(
        "other", "refusal", lambda cases: [Decision("refusal" if c.answer == NO else "compliance") for c in cases]
    )
    store = Store(tmp_path / "s.sqlite")
    assert rescore(tmp_path / "e", [other, "strings"], store) == {"other": 36, "strings:qalign": 0}
    store.close()
    table = {(x["model"], x["judge"]): x["estimate"] for x in rates(read_rows(tmp_path / "e")).lines}
    assert table == {(m, j): r for m, r in (("start", 1.0), ("grpo", 0.5)) for j in ("other", "strings:qalign")}
    assert [one(log)[0]["mean"] for log in logs] == [table["start", "other"], table["grpo", "other"]]
    assert compare(*(read_rows(tmp_path / "e", m) for m in ("start", "grpo"))).lines[0]["less"] == 3


@pytest.mark.parametrize("missing, rate", [("harmful", 0.5), ("apart", 0.0)])
def test_a_missing_answer_is_a_row_like_those_of_a_grid(tmp_path, missing, rate):
    answer = lambda t: NO if int(t[-1]) % 2 else "draft <think> open"  # noqa: E731
    rows = rows_from_log(run(tmp_path, safety_task("s", items(4)), answer, epochs=1), "m")
    assert {(v["status"], v["label"]) for r in rows for v in r["verdicts"].values()} == {
        ("ok", "refusal"),
        ("missing", None),
    }
    write_rows(tmp_path / "e", rows)
    assert measure(read_records(tmp_path / "e"), missing=missing).cells[0].rate.estimate == rate


def test_scores_and_rescoring_are_of_one_judge(tmp_path):
    rows = rows_from_log(run(tmp_path, safety_task("s", items(3)), lambda t: YES, epochs=1), "m")
    assert {r["verdicts"]["strings:qalign"]["who"] for r in rows} == {_signed(string_judge())["who"]}


def logs_of(tmp_path, *answers):
    return [run(tmp_path, safety_task("s", items(3)), lambda t, a=a: a, epochs=1).location for a in answers]


def rescored(monkeypatch, capsys, *args):
    "Exit code and what is said by `qalign eval rescore ARGS` with judges of phrases."
    monkeypatch.setattr(generations, "cache_path", lambda name: Path(args[0]).parent / name)
    judges = ("--judge", "strings", "--judge", "strings:again")
    monkeypatch.setattr(
        generations, "string_judge", lambda name="qalign": replace(string_judge(), name=f"strings:{name}")
    )
    monkeypatch.setattr(sys, "argv", ["qalign", "eval", "rescore", *map(str, args), *judges])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, " ".join(capsys.readouterr())


def test_logs_take_nobody_s_place(tmp_path, monkeypatch, capsys):
    a, b = logs_of(tmp_path, YES, NO)
    code, said = rescored(monkeypatch, capsys, tmp_path / "e", "--log", a, "--log", b, "--name", "x")
    assert code == 2 and "the logs hold answers of x to s twice: give each log a --seed" in said
    assert not (tmp_path / "e").exists()
    assert rescored(monkeypatch, capsys, tmp_path / "e", "--log", a, "--name", "x")[0] == 0
    before = read_rows(tmp_path / "e")
    assert all(len(r["verdicts"]) == 2 for r in before)
    code, said = rescored(monkeypatch, capsys, tmp_path / "e", "--log", b, "--name", "x")
    assert code == 2 and "x.jsonl holds other answers: give another --name" in said
    assert rescored(monkeypatch, capsys, tmp_path / "e", "--log", a, "--name", "x")[0] == 0
    assert read_rows(tmp_path / "e") == before


def test_logs_of_several_seeds_are_one_model(tmp_path, monkeypatch, capsys):
    a, b = logs_of(tmp_path, YES, NO)
    logs = ("--log", a, "--log", b, "--name", "x")
    code, said = rescored(monkeypatch, capsys, tmp_path / "e", *logs, "--seed", "1")
    assert code == 2 and "expected no --seed, or one for each --log, got 1 for 2" in said
    assert rescored(monkeypatch, capsys, tmp_path / "e", *logs, "--seed", "1", "--seed", "2")[0] == 0
    assert sorted(p.stem for p in (tmp_path / "e").glob("s/*.jsonl")) == ["x@1", "x@2"]
    rows = read_rows(tmp_path / "e", "x")
    assert {(r["seed"], r["output"]) for r in rows} == {(1, YES), (2, NO)} and len({r["key"] for r in rows}) == 6
    [line, _] = rates(rows).lines
    assert (line["estimate"], line["n"], line["seeds"]) == (0.5, 6, [1, 2])
    code, said = rescored(monkeypatch, capsys, tmp_path / "e", "--log", a, "--name", "x")
    assert code == 2 and "x is named with a seed and without" in said


def test_no_log_of_ours(tmp_path):
    with pytest.raises(UserError, match=r"no log x\.eval"):
        rows_from_log("x.eval")
    log = run(tmp_path, safety_task("s", items(1)), lambda t: YES, epochs=1)
    log.samples[0].metadata.clear()
    with pytest.raises(UserError, match="give one of a qalign task"):
        rows_from_log(log)


def test_scored_later(tmp_path, monkeypatch):
    log = run(tmp_path, safety_task("s", items(4)), lambda t: NO if t[-1] == "0" else YES, score=False)
    assert not log.results.scores and not rows_from_log(log.location)[0]["verdicts"]
    monkeypatch.setattr(inspect_tasks, "_loaded", by_rule(string_judge()))
    later = score_log(read_eval_log(log.location), [strings(), judged("strings:qalign")], display="none")
    assert [one(later, n)[0]["mean"] for n in (0, 1)] == [0.75, 0.75]


# The command line


@pytest.fixture
def installed(tmp_path, data):
    "Variables under which the entry point is that of an installed package."
    info = tmp_path / "site" / "qalign_tasks-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qalign-tasks\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[inspect_ai]\nqalign = qalign.inspect_tasks\n")
    return {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}", "QALIGN_DATA": str(data), "NO_COLOR": "1"}


BY_NAME = """
import sys
sys.path.insert(0, {tests!r})
from test_inspect import YES, model
from inspect_ai import eval as run_eval

how = dict(task_args={{"rows": "any"}}, log_dir="logs", display="none", epochs=1)
run_eval("qalign/or_bench_hard", model(lambda t: YES), **how)
"""


def python(env, cwd, *args):
    done = subprocess.run([sys.executable, *args], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tasks_are_found_by_name(tmp_path, installed):
    python(installed, tmp_path, "-c", BY_NAME.format(tests=str(Path(__file__).parent)))
    [path] = (tmp_path / "logs").glob("*.eval")
    rows = rows_from_log(path, "mock")
    assert len(rows) == 6 and {r["set"] for r in rows} == {"or_bench_hard"} and {r["label"] for r in rows} == {"benign"}
    assert {r["verdicts"]["strings:qalign"]["label"] for r in rows} == {"compliance"}
    assert read_eval_log(str(path), header_only=True).eval.task == "qalign/or_bench_hard"


@pytest.mark.slow
def test_the_embedded_model_through_hf(tmp_path, installed):
    from qalign.engine import embedded_model

    where = ("--model", "hf/local", "-M", f"model_path={embedded_model()}", "-M", "device=cpu", "--max-tokens", "12")
    how = ("-T", "rows=any", "--log-dir", "logs", "--display", "plain", "--limit", "2", "--epochs", "1", "--no-score")
    python(installed, tmp_path, "-m", "inspect_ai", "eval", "qalign/advbench", *where, *how)
    [path] = (tmp_path / "logs").glob("*.eval")
    rows = rows_from_log(path, "smollm2")
    assert len(rows) == 2 and all(r["output"] and 0 < r["tokens_out"] <= 12 and not r["verdicts"] for r in rows)
    later = ("--scorer", "qalign/strings", "--overwrite", "--display", "plain")
    python(installed, tmp_path, "-m", "inspect_ai", "score", str(path), *later)
    assert all("strings:qalign" in r["verdicts"] for r in rows_from_log(path, "smollm2"))
