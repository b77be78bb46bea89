"Bad input on the command line: one line that names the thing and the remedy, a non-zero exit, nothing half-written."

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from qalign import cli, pipeline
from qalign.benchmarks import Item
from qalign.core import UserError, data_path, load_settings, read_jsonl, write_figure
from qalign.generations import Model
from qalign.rubric import load_rubric


def call(monkeypatch, capsys, *args):
    "Exit code and standard error of `qalign ARGS`, in this process."
    monkeypatch.setattr(sys, "argv", ["qalign", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
        raise SystemExit(0)
    return stop.value.code, capsys.readouterr().err


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_package_that_is_missing_is_one_line(monkeypatch, capsys):
    for name, code in (("torch.nn", 2), ("qalign.nowhere", None)):

        def app(standalone_mode, name=name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(cli, "app", app)
        if code:
            assert call(monkeypatch, capsys, "demo") == (
                code,
                "qalign: needs the package torch: `qalign doctor` says how to install what is missing\n",
            )
        else:
            with pytest.raises(ModuleNotFoundError):
                cli.main()


@pytest.mark.parametrize("fault", ["torch", MemoryError(), RuntimeError("a defect")])
def test_memory_that_runs_out_is_one_line(fault, monkeypatch, capsys):
    if fault == "torch":
        import torch

        fault = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def app(standalone_mode):
        raise fault

    monkeypatch.setattr(cli, "app", app)
    if "defect" in str(fault):
        with pytest.raises(RuntimeError, match="a defect"):
            call(monkeypatch, capsys, "chat")
        return
    code, err = call(monkeypatch, capsys, "chat")
    assert code == 2 and err.startswith("qalign: memory ran out: lower generate_batch, micro_batch, judge_chunk")
    assert "`qalign plan`" in err and err.count("\n") == 1


def test_a_plan_stands_beside_a_run():
    told = CliRunner().invoke(cli.app, ["plan", "--run", str(data_path("runs", "demo"))])
    assert told.exit_code == 0 and told.output.startswith("smollm2: ")
    assert told.output.endswith("demo holds no measured peaks: it ran on a CPU, or before they were recorded\n")


def test_the_demo_takes_the_option_that_its_message_names(monkeypatch, capsys):
    told = []
    monkeypatch.setattr(cli, "_run", lambda settings, out, prompts, resume: told.append(resume))
    assert [call(monkeypatch, capsys, "demo", *more)[0] for more in ((), ("--resume",))] == [0, 0]
    assert told == [True, True]


def test_fresh_removes_a_run_and_nothing_else(tmp_path, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(cli, "_run", lambda settings, out, prompts, resume: told.append(out.exists()))
    pipeline.open_folder(tmp_path / "x", pipeline.make_plan(load_settings("tiny")))
    assert call(monkeypatch, capsys, "demo", "--fresh", "--out", tmp_path / "x", "--alhpa", "2")[0] == 2
    assert pipeline.holds_run(tmp_path / "x"), "a typo loses nothing"
    write(tmp_path / "settings.json", '{"editor.tabSize": 4}')
    assert call(monkeypatch, capsys, "demo", "--fresh", "--out", tmp_path)[0] == 0
    assert call(monkeypatch, capsys, "demo", "--fresh", "--out", tmp_path / "x")[0] == 0
    assert told == [True, False] and (tmp_path / "settings.json").exists()


def test_a_folder_with_a_settings_file_of_another_program_is_no_run(tmp_path):
    for content in ('{"editor.tabSize": 4}', "[1]", "{torn"):
        write(tmp_path / "settings.json", content)
        assert not pipeline.holds_run(tmp_path)
        with pytest.raises(UserError, match="is not empty and holds no run: give another --out"):
            pipeline.open_folder(tmp_path, pipeline.make_plan(load_settings("tiny")), resume=True)


TWO = "{name: a, questions: [{id: x, kind: gate, text: 'A?'}, {id: x, kind: graded, text: 'B?'}]}"
RUBRIC = "name: mine\ncap: ''\nprinciples: [{{name: p, dimensions: [{}]}}]\n"
CASES = {
    "unknown preset": (["run", "--preset", "gpu42"], "unknown preset 'gpu42': choose one of"),
    "unknown key": (["run", "--alhpa", "2"], "unknown option '--alhpa'"),
    "key without value": (["run", "--alpha"], "option --alpha needs a value"),
    "out of range": (["run", "--group-size", "1"], "expected group_size between 2 and 256, got '1'"),
    "not a number": (["demo", "--lr", "fast"], "expected float for lr, got 'fast'"),
    "nothing to measure": (["bench", "rollout", "--prompts", "0"], "expected prompts and repeats of 1 or more"),
    "no run to measure": (["bench", "rollout", "--run", "{folder}"], "no adapter-sft in"),
    "no rubric to judge by": (
        ["eval", "run", "x", "--model", "m=smollm2", "--judge", "rubric:hhh"],
        "no judge 'rubric",
    ),
    "seed that is none": (
        ["eval", "run", "x", "--model", "qa=smollm2,seed=one"],
        "qa: expected the seed it was trained with, 0 or more, got seed=one",
    ),
    "no prompt file": (["run", "--prompts", "nowhere.txt"], "no prompt file nowhere.txt"),
    "empty prompt file": (["run", "--prompts", "{empty}"], "is empty"),
    "wrong shape": (["run", "--prompts", "{shape}"], "expected a column 'prompt' or 'goal', found"),
    "too few prompts": (["run", "--prompts", "{few}"], "prompts are needed"),
    "duplicate ids": (["run", "--rubric", "{twice}"], "'x'"),
    "no questions": (["run", "--rubric", "{bare}"], "'bare'"),
    "no such rubric": (["rubric", "show", "nothing.yaml"], "nothing.yaml"),
    "out is a file": (["run", "--out", "{empty}"], "is a file: give another --out"),
    "out is not a run": (["run", "--out", "{folder}"], "is not empty and holds no run"),
    "unknown command": (["rnu"], "rnu"),
    "no run to plan beside": (["plan", "--run", "{folder}"], "holds no run: give the --out of one"),
    "a run's plan with a key": (["plan", "--run", "{folder}", "--lr", "1"], "has settings of its own: leave out --lr"),
    "a run's plan with a preset": (["plan", "--run", "{folder}", "--preset", "tiny"], "leave out --preset"),
    "no such optimizer": (
        ["plan", "--optimizer", "sgd"],
        "expected optimizer to be one of adamw_torch, paged_adamw_8bit",
    ),
    "no run to report": (["report", "{folder}/none"], "no run folder none"),
    "nothing that is a run": (["report", "{folder}"], "holds no run: give the --out of one"),
    "no stage": (["run", "--until", "grop"], "no stage 'grop': choose one of"),
    "no rollout": (["run", "--rollout", "vlm"], "expected rollout to be one of hf, trl"),
    "no tracker": (["run", "--report-to", "tensorbord"], "expected report_to to be one of"),
    "no run to begin with": (["run", "--from", "{folder}"], "holds no run: give --from the folder of one"),
    "no path": (
        ["bench", "rollout", "--paths", "hf,hff"],
        "expected rollout to be one of hf, trl, continuous, vllm, openai",
    ),
    "no judge": (["run", "--judge", "foo"], "expected judge to be one of self, tuned, tuned:FOLDER, smollm2, hf:"),
    "no policy": (["run", "--model", "hf:"], "expected model to be one of smollm2, hf:ID_OR_PATH, got 'hf:'"),
    "no writer": (["run", "--revision-writer", "modle"], "expected revision_writer to be one of continue, model"),
    "nobody to plan for": (["plan", "--judge", "foo"], "expected judge to be one of self"),
    "no rollout to plan": (["plan", "--rollout", "contiuous"], "expected rollout to be one of hf, trl"),
    "no server": (["plan", "--judge", "openai:name"], "expected judge to be one of self"),
    "nothing held out": (["run", "--prompts", "benign"], "the shipped benign prompts are held out"),
    "no size": (["plan", "--preset", "tiny", "--gb", "0"], "expected the size of a card in GB"),
    "no rank": (["judge", "tune", "--r", "0"], "expected r, alpha, epochs and batch of 1 or more"),
    "no pass": (["judge", "tune", "--epochs", "0"], "expected r, alpha, epochs and batch of 1 or more"),
    "no way to count": (
        ["eval", "run", "advbench", "--model", "a=smollm2", "--missing", "x"],
        "expected missing to be",
    ),
    "no way to count again": (["eval", "rescore", "{folder}", "--missing", "x"], "expected missing to be"),
    "no responses": (["bench", "judge", "--responses", "0"], "expected responses (n) >= 1"),
    "a file in the way": (["plan", "--preset", "tiny", "--figure", "{empty}/x.png"], "is no folder"),
    "nothing there to watch": (["watch", "{folder}/none"], "no run folder none"),
    "no figure": (["plan", "--preset", "tiny", "--figure", "x.pgn"], "no figure can be written as x.pgn"),
    "nothing to watch": (["watch", "{folder}"], "no grpo rows in metrics.jsonl"),
    "nobody will write it": (["watch", "{folder}", "--every", "1"], "no grpo rows in metrics.jsonl"),
    "back in time": (["watch", "{folder}", "--every", "-1"], "--every"),
}


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    return {
        "empty": write(folder / "empty.txt", ""),
        "shape": write(folder / "shape.csv", "question,answer\na,b\n"),
        "few": write(folder / "few.txt", "One?\nTwo?\n"),
        "twice": write(folder / "twice.yaml", RUBRIC.format(TWO)),
        "bare": write(folder / "bare.yaml", RUBRIC.format("{name: bare, questions: []}")),
        "folder": folder,
    }


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_exit_2(name, files, tmp_path, monkeypatch, capsys):
    args, message = CASES[name]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["qalign", *[a.format(**files) for a in args]])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and message in err and err.count("\n") == 1, err
    assert "├" not in out, "no rubric is shown before all is checked"
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_models_of_the_command_line():
    given = [
        "start=smollm2",
        "qa=hf:a/b,adapter=runs/x,seed=1",
        "qa=hf:a/b,adapter=runs/y,seed=02,system=Be brief, do.,transcripts",
    ]
    start, one, two = cli._models(given)
    assert start == Model("start") and start.seed is None
    assert one == Model("qa", "hf:a/b", "runs/x", seed=1)
    assert two == Model("qa", "hf:a/b", "runs/y", transcripts=True, system="Be brief, do.", seed=2)
    for bad in ("one", "-1", "1.0", "", "²"):
        with pytest.raises(UserError, match=f"^qa: expected the seed it was trained with, 0 or more, got seed={bad}$"):
            cli._models([f"qa=smollm2,seed={bad}"])


TWICE = {
    "one seed twice": (("qa=smollm2,seed=1", "qa=smollm2,seed=1"), "or name and seed, got qa@1, qa@1"),
    "one name twice": (("qa=smollm2", "qa=smollm2"), "or name and seed, got qa, qa"),
    "with a seed and without": (("qa=smollm2", "qa=smollm2,seed=1"), "qa is named with a seed and without"),
    "one model, two seeds": (("qa=smollm2,seed=1", "qa=smollm2,seed=2"), "qa@1 and qa@2 are the same model"),
}


@pytest.mark.parametrize("name", TWICE)
def test_models_named_twice(name, tmp_path, monkeypatch, capsys):
    given, said = TWICE[name]
    items = {"own": [Item("a", "How?", "own", "harmful")]}
    monkeypatch.setattr(cli, "_items", lambda *sets: items)
    options = [x for model in given for x in ("--model", model)]
    code, err = call(monkeypatch, capsys, "eval", "run", "own", *options, "--judge", "strings", "--out", tmp_path / "x")
    assert code == 2 and said in err and err.count("\n") == 1, err
    assert not (tmp_path / "x").exists()


def test_another_plan_is_refused(tmp_path, monkeypatch, capsys):
    plan = pipeline.make_plan(load_settings("tiny"))
    pipeline.open_folder(tmp_path / "x", plan).metric("eval", {"part": "start"})
    code, err = call(monkeypatch, capsys, "run", "--out", tmp_path / "x")
    assert code == 2 and "add --resume" in err
    code, err = call(monkeypatch, capsys, "run", "--out", tmp_path / "x", "--resume", "--alpha", "2")
    assert code == 2 and "another alpha (10.0, now 2.0)" in err


def test_prompt_longer_than_allowed(tmp_path, monkeypatch, capsys):
    long = write(tmp_path / "long.txt", "\n".join([*(f"Number {i}?" for i in range(12)), "word " * 3000]))
    code, err = call(monkeypatch, capsys, "run", "--prompts", long, "--out", tmp_path / "x")
    assert code == 2 and "prompt_tokens" in err and err.count("\n") == 1


def test_settings_too_long_for_the_model(tmp_path, monkeypatch, capsys):
    code, err = call(monkeypatch, capsys, "run", "--completion-tokens", "9000", "--out", tmp_path / "x")
    assert code == 2 and "8192 positions" in err and err.count("\n") == 1


@pytest.mark.parametrize("model", ["gpt", "hf:", "hf:no/such-model-anywhere"])
def test_unknown_model(model, tmp_path, monkeypatch, capsys):
    code, err = call(monkeypatch, capsys, "run", "--model", model, "--out", tmp_path / "x")
    assert code == 2 and "model" in err and err.count("\n") == 1


@pytest.mark.parametrize("stopper", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_stopped_stage_is_said_and_made_again(stopper, tmp_path, monkeypatch):
    plan = pipeline.make_plan(load_settings("tiny"))
    folder = pipeline.open_folder(tmp_path / "x", plan)
    with pytest.raises(UserError, match=r"stopped in stage records.*--resume"), pipeline._stage("records", folder):
        raise stopper
    with pytest.raises(ZeroDivisionError), pipeline._stage("records", folder):
        raise ZeroDivisionError  # a defect keeps its traceback


def test_clear_removes_what_a_stage_left(tmp_path):
    folder = pipeline.Folder(tmp_path)
    folder.metric("sft", {"part": "sft", "step": 1})
    folder.metric("grpo", {"part": "grpo", "step": 1})
    for name in ("adapter-sft", "adapter", "trainer"):
        (tmp_path / name).mkdir()
    folder.clear("sft")
    assert [row["part"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == ["grpo"]
    folder.clear("grpo")  # its own checkpoints say what is cut
    assert [row["part"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == ["grpo"]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["trainer"]


@pytest.mark.parametrize("way", [["qalign"], ["-m", "qalign"], ["-m", "qalign.cli"]])
def test_help_lists_the_commands(way, tmp_path):
    program = [sys.executable] if len(way) > 1 else [str(Path(sys.executable).with_name(way.pop()))]
    done = subprocess.run([*program, *way, "--help"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and all(f"  {c}" in done.stdout for c in ("demo", "run", "doctor", "rubric"))
    wrong = subprocess.run([*program, *way, "nonsense"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (2, "qalign: No such command 'nonsense'.\n")


@pytest.mark.parametrize("command", [["run"], ["demo"], ["study"], ["plan"], ["settings"], ["bench", "rollout"]])
def test_help_says_that_every_setting_is_an_option(command):
    said = CliRunner().invoke(cli.app, [*command, "--help"]).output
    assert "Any setting is an option as well, such as --lr 2e-4" in " ".join(said.split())


# What takes time, and what is drawn


def test_the_rubric_is_shown_once_all_is_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "check_lengths", lambda plan, policy: None)
    monkeypatch.setattr(pipeline.Run, "start", lambda self: {})
    for resume in ((), ("--resume",)):
        monkeypatch.setattr(sys, "argv", ["qalign", "run", "--out", str(tmp_path / "x"), "--until", "start", *resume])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr().out
        assert stop.value.code == 0 and "stopped behind stage start, as asked" in out
        assert out.startswith("hhh 9 dimensions") != bool(resume)


def test_watch_waits_for_the_first_step(tmp_path, monkeypatch, capsys):
    run, figure, naps = tmp_path / "x", tmp_path / "panel.png", []
    folder = pipeline.open_folder(run, pipeline.make_plan(load_settings("tiny")))

    def sleep(seconds):
        naps.append((seconds, figure.exists()))
        folder.metric("grpo", {"part": "grpo", "step": len(naps), "r1": 0.5})
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(sys, "argv", ["qalign", "watch", str(run), "--figure", str(figure), "--every", "7"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130 and naps == [(7, False), (7, True), (7, True)]
    shows = f"{figure} shows {run}"
    assert capsys.readouterr().out.splitlines() == [f"{run} has no step of GRPO yet", shows, shows]


class Torn:
    "A figure whose writing is cut short."

    canvas = SimpleNamespace(get_supported_filetypes=lambda: {"png": ""})

    def savefig(self, file, **options):
        file.write(b"half")
        raise KeyboardInterrupt


def test_a_figure_is_written_whole_or_not_at_all(tmp_path):
    from matplotlib.figure import Figure

    for name in ("a.png", "a.pdf", "a.SVG", "below/a.png"):
        write_figure(tmp_path / name, Figure())
    whole = (tmp_path / "a.png").read_bytes()
    assert whole.startswith(b"\x89PNG") and b"Software" not in whole
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        write_figure(tmp_path / "a.png", Torn())
    with pytest.raises(UserError, match=r"^no figure can be written as a: give a name that ends in"):
        write_figure(tmp_path / "a", Figure())
    assert (tmp_path / "a.png").read_bytes() == whole and sorted(tmp_path.rglob("*")) == there


# Rubric commands


def run(*args):
    "The command line as a process of its own."
    code = "from qalign.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=600)


def test_rubric_commands_read_compare_and_check(tmp_path):
    for command in (["stats"], ["lint"], ["diff", "hhh", "hhh"]):
        done = run("rubric", *command)
        assert done.returncode == 0, done.stderr
    assert "167" in run("rubric", "stats").stdout
    (tmp_path / "worse.yaml").write_text(
        data_path("rubric", "hhh.yaml").read_text().replace("free of insults", "good and nice").replace("version:", "#")
    )
    done = run("rubric", "lint", str(tmp_path / "worse.yaml"))
    assert done.returncode == 1 and "harm.emotional.g1" in done.stdout
    done = run("rubric", "diff", "hhh", str(tmp_path / "worse.yaml"))
    assert done.returncode == 0 and "harm.emotional.g1" in done.stdout
    done = run("rubric", "freeze", str(tmp_path / "worse.yaml"), str(tmp_path / "frozen.yaml"))
    assert done.returncode == 2 and "mend it or add a waiver" in done.stderr and not (tmp_path / "frozen.yaml").exists()


@pytest.mark.parametrize("other", ["autorubric", "verifiers"])
def test_rubric_travels_and_comes_back(tmp_path, other):
    path, back = tmp_path / f"{other}.json", tmp_path / "back.yaml"
    done = run("rubric", "export", "hhh", str(path), "--to", other)
    assert done.returncode == 0 and "not held: gates" in done.stdout
    done = run("rubric", "import", str(path), str(back))
    assert done.returncode == 0, done.stderr
    done = run("rubric", "diff", "hhh", str(back))
    assert done.returncode == 0 and "harm.request.g1" not in done.stdout
    assert load_rubric(back).version == load_rubric("hhh").version


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nprinciples: [", "not readable as YAML"),
        ("name: !!python/object/apply:os.system ['true']\n", "YAML tag"),
        ("x" * 10_000_000, "larger than 5 MB"),
        ("", "is empty"),
    ],
)
def test_bad_rubrics_are_one_line(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    for command in ("show", "lint", "stats", "test"):
        done = run("rubric", command, str(tmp_path / "bad.yaml"))
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_rubric_test_wants_known_cases_and_engine(tmp_path):
    done = run("rubric", "test", "--fixtures", "nowhere")
    assert done.returncode == 2 and "no fixtures nowhere" in done.stderr
    done = run("rubric", "test", "--engine", "nonsense", "--out", str(tmp_path / "card"))
    assert done.returncode == 2 and "expected a model" in done.stderr and not (tmp_path / "card").exists()


def test_the_list_of_sets_says_where_they_come_from(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qalign", "eval", "list", "--full"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
        raise SystemExit(0)
    out = capsys.readouterr().out
    assert stop.value.code in (0, None) and out.count("SHA-256") >= 18 and "walledai/AdvBench" in out
    assert "Zou et al. 2023" in out and "6cd1a5c63c07610d" in out
