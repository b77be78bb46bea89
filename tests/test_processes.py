"""Several processes: two train what one trains, end together, resume exactly; the launch configurations can be read.

Real processes on CPUs over gloo. To compare two with one, completions are drawn by a seed made of prompt, place in its
group and step: by itself each process draws random numbers of its own.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from test_grpo import MICRO, PROMPTS, StubJudge, any_text_is_a_transcript, micro_model, sealed
from test_pipeline import micro_options, save_micro

import qalign.grpo as grpo
from qalign.core import UserError, append_jsonl, data_path, load_settings, read_jsonl
from qalign.grpo import grpo_arguments, micro_batch, run_identity, train_grpo
from qalign.processes import (
    Elsewhere,
    accelerate_config,
    by_first,
    first,
    gathered,
    rank,
    take_gpu,
    together,
    world_size,
)
from qalign.reward import read_credit

# three prompts with two completions each: the second group lies half in one process, half in the other
SHARED = {**MICRO, "prompts_per_step": 3, "group_size": 2, "micro_batch": 3, "grpo_steps": 4}
TOLERANCE = 1e-6  # of an adapter weight, in float32; weights move by 1e-3 a step


def by_seed(settings):
    "A rollout function whose completions depend on prompt, place in the group and step alone."
    import torch

    def rollout(prompts, trainer):
        out = {"prompt_ids": [], "completion_ids": [], "logprobs": None}
        model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
        begin = trainer.accelerator.process_index * len(prompts)
        for i, prompt in enumerate(prompts):
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            place = (begin + i) % settings.group_size
            with torch.random.fork_rng():
                torch.manual_seed(zlib.crc32(f"{text}|{place}|{trainer.state.global_step}".encode()))
                options = {"do_sample": True, "top_k": 0, "max_new_tokens": settings.completion_tokens}
                done = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
            out["prompt_ids"].append(ids)
            out["completion_ids"].append(done[0, len(ids) :].tolist())
        return out

    return rollout


def job(run, place, many, port, overrides, seeded=True, resume=False, dies=(), lr=()) -> None:
    "Train as one of several processes; what came out is in final-PLACE.json and adapter-PLACE.pt."
    told = {"RANK": place, "LOCAL_RANK": place, "WORLD_SIZE": many, "LOCAL_WORLD_SIZE": many, "MASTER_PORT": port}
    if many > 1:
        os.environ.update({k: str(v) for k, v in told.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    train(Path(run), load_settings("tiny", **overrides, **({"lr": lr[place]} if lr else {})), seeded, resume, dies)


def train(folder: Path, settings, seeded: bool, resume: bool, dies=()) -> None:
    import torch

    torch.set_num_threads(1)
    any_text_is_a_transcript()
    common = grpo.common_arguments
    grpo.common_arguments = lambda *a: {**common(*a), "bf16": False}  # float32, to see float32's error alone
    model, tokenizer = micro_model(settings)
    torch.manual_seed(17 + rank())  # what a process drew before must not matter
    said: list[str] = []

    def judged(n: int) -> None:
        if dies and (rank(), n) == tuple(dies):
            raise ConnectionError("connection refused")

    def log(row):
        append_jsonl(folder / "metrics.jsonl", {"stage": "grpo", **row})

    error: tuple[str, str] = ("", "")
    how = {"resume": resume, "rollout": by_seed(settings) if seeded else None}
    try:
        train_grpo(model, tokenizer, StubJudge(judged), PROMPTS, settings, folder, log, said.append, **how)
    except UserError as e:
        error = (type(e).__name__, str(e))
    torch.save(
        {n: p.detach() for n, p in model.named_parameters() if ".default." in n}, folder / f"adapter-{rank()}.pt"
    )
    (folder / f"final-{rank()}.json").write_text(json.dumps({"error": error, "said": said}))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def launch():
    "Processes that train together, forked from a server that has imported the heavy packages once; their exit codes."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "trl", "peft", "datasets", "qalign.grpo", "qalign.bench"])

    def start(run: Path, many: int, overrides: dict, **how) -> list[int]:
        run.mkdir(exist_ok=True)
        port = free_port()
        some = [context.Process(target=job, args=(str(run), k, many, port, overrides), kwargs=how) for k in range(many)]
        for p in some:
            p.start()
        for p in some:
            p.join(120)
        hangs = [p for p in some if p.exitcode is None]
        for p in hangs:
            p.kill()
        assert not hangs, "a process hangs"
        return [p.exitcode for p in some]

    return start


@pytest.fixture(scope="module")
def made(launch, tmp_path_factory):
    "Uninterrupted runs, made once each."
    runs: dict[tuple, Path] = {}

    def get(many: int, seeded: bool = True) -> Path:
        if (many, seeded) not in runs:
            runs[many, seeded] = tmp_path_factory.mktemp("whole")
            assert launch(runs[many, seeded], many, SHARED, seeded=seeded) == [0] * many
        return runs[many, seeded]

    return get


def final(run: Path, place: int = 0) -> dict:
    return json.loads((run / f"final-{place}.json").read_text())


def adapter(run: Path, place: int = 0) -> dict:
    import torch

    return torch.load(run / f"adapter-{place}.pt")


def rows(run: Path, name: str) -> list[dict]:
    return list(read_jsonl(run / f"{name}.jsonl")) if (run / f"{name}.jsonl").exists() else []


def credit(run: Path) -> list[dict]:
    return read_credit(run).drop(columns=["run", "seconds"]).to_dict("records")


def bit_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


# ---- two processes are one


def test_two_processes_train_what_one_trains(made):
    one, two = made(1), made(2)
    assert [final(two, k)["error"] for k in (0, 1)] == [["", ""]] * 2
    assert rows(one, "traces") == rows(two, "traces")  # completions, scores, rewards, in the order of the batch
    assert len({r["reward"] for r in rows(two, "traces")}) > 10
    assert bit_equal(adapter(two, 0), adapter(two, 1))
    a, b = adapter(one), adapter(two)
    moved = max(float(a[k].abs().max()) for k in a if "lora_B" in k)
    apart = max(float((a[k] - b[k]).abs().max()) for k in a)
    print(f"moved {moved:.1e}, apart {apart:.1e}")
    assert moved > 1e-3 and 0 < apart < TOLERANCE


def test_records_are_those_of_the_whole_step(made):
    one, two = made(1), made(2)
    assert repr(credit(one)) == repr(credit(two))
    assert {p.name for p in (two / "credit").iterdir()} == {
        f"step-{s:06d}.{k}of2.parquet" for s in (1, 2, 3, 4) for k in (0, 1)
    }
    assert len(rows(two, "metrics")) == 4
    for mine, theirs in zip(rows(one, "metrics"), rows(two, "metrics"), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert key == "stage" or theirs[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    assert [r["stage"] for r in rows(one, "timings")] == [r["stage"] for r in rows(two, "timings")]
    assert [a["rule"] for a in rows(one, "alarms")] == [a["rule"] for a in rows(two, "alarms")]
    assert final(two, 1)["said"] == [] and len(final(two, 0)["said"]) == len(final(one)["said"])


def test_a_checkpoint_holds_the_random_states_of_all(made):
    newest = made(2) / "trainer" / "checkpoint-4"
    assert {"rng_state_0.pth", "rng_state_1.pth", "adapter_model.safetensors"} <= {p.name for p in newest.iterdir()}
    assert not (made(2) / "trainer" / ".saving").exists()
    about = json.loads((newest / "checkpoint.json").read_text())
    assert about["identity"]["processes"] == 2 and "rng_state_1.pth" in about["files"]


# ---- one that fails ends all, and all resume


@pytest.mark.parametrize("who", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_failure_in_one_ends_all_and_they_resume_exactly(launch, made, tmp_path, who):
    straight, run = made(2, seeded=False), tmp_path / "run"
    assert launch(run, 2, SHARED, seeded=False, dies=(who, 3)) == [0, 0]
    kind, line = final(run, who)["error"]
    assert kind == "UserError"
    assert line == "GRPO stopped in step 3: connection refused (the checkpoint of step 2 stands)"
    kind, line = final(run, 1 - who)["error"]
    assert kind == "Elsewhere" and f"process {who}: connection refused" in line and "\n" not in line
    assert launch(run, 2, SHARED, seeded=False, resume=True) == [0, 0]
    assert final(run)["said"][0] == "GRPO goes on after step 2"
    for place in (0, 1):
        assert bit_equal(adapter(straight, place), adapter(run, place))
    for name in ("traces", "metrics", "alarms"):
        assert repr(rows(straight, name)) == repr(rows(run, name))
    assert repr(credit(straight)) == repr(credit(run))


def test_processes_that_were_not_started_alike_end(launch, tmp_path):
    assert launch(tmp_path / "run", 2, {k: v for k, v in SHARED.items() if k != "lr"}, lr=(1e-3, 2e-3)) == [0, 0]
    errors = [final(tmp_path / "run", k)["error"] for k in (0, 1)]
    assert [kind for kind, _ in errors] == ["UserError", "Elsewhere"]
    assert "lr is 0.001 in process 0, 0.002 in process 1: start all processes alike" in errors[0][1]


@pytest.mark.slow
def test_a_stop_rule_ends_all(launch, tmp_path):
    run = tmp_path / "run"
    assert launch(run, 2, {**SHARED, "stop_truncated": 0.5}, seeded=False) == [0, 0]
    assert [r["step"] for r in rows(run, "metrics")] == [1, 2, 3]
    assert [a["rule"] for a in rows(run, "alarms") if a["stop"]] == ["stop_truncated"]
    assert bit_equal(adapter(run, 0), adapter(run, 1))


PROGRAM = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_processes
from qalign.core import load_settings
from qalign.processes import rank, take_gpu

class Judge(test_processes.StubJudge):
    def score_many(self, pairs):
        out = super().score_many(pairs)
        if {kill} and (rank(), self.calls) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return out

test_processes.StubJudge = Judge
take_gpu()
test_processes.train(Path({run!r}), load_settings("tiny", **{overrides!r}), False, {resume})
"""


@pytest.mark.slow
def test_the_shipped_configuration_launches_and_a_killed_process_ends_the_launch(made, tmp_path):
    run, straight = tmp_path / "run", made(2, seeded=False)
    run.mkdir()
    for kill, resume in ((True, False), (False, True)):
        told = {"tests": str(Path(__file__).parent), "run": str(run), "overrides": SHARED}
        (tmp_path / "program.py").write_text(PROGRAM.format(**told, kill=kill, resume=resume))
        config = ["--config_file", str(accelerate_config("ddp")), "--num_processes", "2", "--main_process_port", "0"]
        config += ["--mixed_precision", "no"]  # float32, like the run it is compared with
        command = [sys.executable, "-m", "accelerate.commands.launch", *config, str(tmp_path / "program.py")]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
        assert (done.returncode != 0) == kill, done.stderr[-2000:]
    assert signal.SIGKILL.name in done.stderr or final(run)["said"][0] == "GRPO goes on after step 2"
    assert bit_equal(adapter(straight), adapter(run)) and repr(credit(straight)) == repr(credit(run))


@pytest.mark.slow
def test_the_command_line_is_launched_for_grpo_alone(tmp_path):
    "The commands of the page: what comes before GRPO in one process, GRPO in two, evaluation and report in one."
    run, env = tmp_path / "run", {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pairs = micro_options(save_micro(tmp_path / "model")).items()
    given = ["run", "--out", str(run), *(x for k, v in pairs for x in (f"--{k.replace('_', '-')}", str(v)))]
    alone = [sys.executable, "-m", "qalign"]
    told = subprocess.run([*alone, "launch-config", "ddp"], capture_output=True, text=True, check=True).stdout.strip()
    config = ["--config_file", told, "--num_processes", "2", "--main_process_port", "0"]
    two = [sys.executable, "-m", "accelerate.commands.launch", *config, "-m", "qalign"]

    def qalign(start: list[str], *more: str) -> subprocess.CompletedProcess:
        hidden = {"CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run([*start, *given, *more], capture_output=True, text=True, env=env | hidden, timeout=3600)

    early = qalign(two, "--until", "grpo")
    said = "several processes share the stage grpo alone: make those before it in one process, --until after_sft"
    assert early.returncode != 0 and early.stderr.count(f"qalign: {said}\n") == 1 and not run.exists()
    first = qalign(alone, "--until", "after_sft")
    assert first.returncode == 0, first.stderr[-2000:]
    shared = qalign(two, "--resume", "--until", "grpo")
    assert shared.returncode == 0, shared.stderr[-2000:]
    for line in ("[5/7] GRPO", "step 2 of 2: ", "stopped behind stage grpo, as asked"):
        assert shared.stdout.count(line) == 1, shared.stdout
    assert [r["step"] for r in rows(run, "metrics") if r["stage"] == "grpo"] == [1, 2]
    assert [r["step"] for r in rows(run, "traces")] == [1, 1, 2, 2]  # a completion of each step from each process
    about = json.loads((run / "trainer" / "checkpoint-2" / "checkpoint.json").read_text())
    assert about["identity"]["processes"] == 2 and (run / "adapter" / "adapter_model.safetensors").exists()
    last = qalign(alone, "--resume")
    assert last.returncode == 0 and last.stdout.splitlines()[-1].startswith("done in "), last.stderr[-2000:]


# ---- who is who


@pytest.fixture
def second_of_three(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")


def test_alone_nothing_is_exchanged():
    assert (rank(), world_size(), first()) == (0, 1, True)
    assert (gathered(3), together(lambda: 4), by_first(lambda: 5)) == ([3], 4, 5)
    for call in (together, by_first):
        with pytest.raises(ZeroDivisionError):
            call(lambda: 1 / 0)
        with pytest.raises(UserError, match="as it is"):
            call(lambda: (_ for _ in ()).throw(UserError("as it is")))


def test_the_launcher_says_who_is_who(second_of_three, monkeypatch):
    assert (rank(), world_size(), first()) == (1, 3, False)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UserError, match="a number in the variable WORLD_SIZE, got 'many'"):
        rank()
    monkeypatch.delenv("RANK")
    assert (rank(), world_size()) == (0, 1)


def test_each_process_takes_its_gpu(second_of_three, monkeypatch):
    import torch

    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    take_gpu()
    assert taken == [1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 1 of this machine finds 1 GPUs: lower num_processes"):
        take_gpu()


def test_the_first_failure_speaks(second_of_three, monkeypatch):
    import qalign.processes as room

    others = ["", ""]
    monkeypatch.setattr(room, "gathered", lambda mine: [others[0] or None, mine, others[1] or None])
    with pytest.raises(UserError, match=r"^mine$") as caught:
        together(lambda: (_ for _ in ()).throw(UserError("mine")))
    assert not isinstance(caught.value, Elsewhere)
    others[1] = "theirs"
    with pytest.raises(Elsewhere, match=r"^process 2: theirs$"):
        together(lambda: 1)
    others[0] = "before"
    with pytest.raises(Elsewhere, match=r"^process 0: before$"):
        together(lambda: (_ for _ in ()).throw(OSError("mine")))
    with pytest.raises(ZeroDivisionError):  # a fault of the program is not exchanged
        together(lambda: 1 / 0)


# ---- the batch is shared


@pytest.mark.parametrize("prompts, group, most, share", [(3, 4, 6, 4), (6, 5, 4, 2), (6, 5, 100, 10)])
def test_a_step_is_shared_evenly(second_of_three, prompts, group, most, share):
    s = load_settings("tiny", prompts_per_step=prompts, group_size=group, micro_batch=most)
    assert micro_batch(s) == share and prompts * group % (3 * share) == 0


def test_a_step_that_cannot_be_shared_is_refused(second_of_three):
    s = load_settings("tiny", prompts_per_step=2, group_size=5)
    with pytest.raises(UserError, match="a step has 10 completions, 3 processes cannot share them"):
        micro_batch(s)
    with pytest.raises(UserError, match="cannot share"):
        grpo_arguments(s, "run/trainer")


def test_another_number_of_processes_does_not_resume(tmp_path):
    settings = load_settings("tiny", **SHARED)
    model, tokenizer = micro_model(settings)
    mine = run_identity(model, StubJudge(), PROMPTS, settings)
    sealed(tmp_path, {**mine, "processes": 2})
    with pytest.raises(UserError, match="cannot resume: processes was 2, now 1"):
        train_grpo(model, tokenizer, StubJudge(), PROMPTS, settings, tmp_path, lambda row: None, resume=True)
    grpo._same({k: v for k, v in mine.items() if k != "processes"}, mine)  # written before there were several


class Parts:
    "What `_readable` asks of a trainer whose weights are cut up."

    def __init__(self, model, engine, canaries=None, steps=0):
        self.model, self.is_fsdp_enabled, self.is_deepspeed_enabled = model, True, False
        judge = type("J", (), {"engine": engine})()
        reward = type("R", (), {"judge": judge})()
        about = {"reward": reward, "canaries": canaries, "settings": load_settings("tiny", canary_steps=steps)}
        self.session = type("S", (), about)()


def test_weights_that_are_cut_up_cannot_judge():
    from qalign.engine import HFEngine

    model, tokenizer = micro_model(load_settings("tiny", **SHARED))
    with pytest.raises(UserError, match="cannot judge: use judge = openai:MODEL@URL"):
        grpo._readable(Parts(model, HFEngine(model, tokenizer).base()))
    with pytest.raises(UserError, match="cannot be asked canaries: use canary_steps = 0"):
        grpo._readable(Parts(model, object(), canaries=list, steps=5))
    grpo._readable(Parts(model, object(), canaries=list, steps=0))


# ---- launch configurations


NAMES = ["ddp", "fsdp2", "zero3"]


def test_the_configurations_have_names():
    assert sorted(p.stem for p in data_path("accelerate").iterdir()) == NAMES
    with pytest.raises(UserError, match="no launch configuration 'fsdp': choose one of ddp, fsdp2, zero3"):
        accelerate_config("fsdp")
    with pytest.raises(UserError, match="choose one of"):
        accelerate_config("../accelerate/ddp")


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_the_configurations(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import DistributedType

    config = load_config_from_file(str(accelerate_config(name)))  # refuses an unknown key
    kinds = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP, "zero3": DistributedType.DEEPSPEED}
    assert config.distributed_type == kinds[name] and config.num_processes > 1
    assert config.mixed_precision == ("no" if name == "ddp" else "bf16")  # it would override what the run says
    told = ["--config_file", str(accelerate_config(name)), "--num_processes", "4", "train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(told))
    assert args.num_processes == 4
    assert (args.use_fsdp, args.use_deepspeed) == (name == "fsdp2", name == "zero3")
    if name == "fsdp2":
        assert (args.fsdp_version, args.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")
    if name == "zero3":
        assert (args.zero_stage, args.zero3_init_flag) == (3, False)


def test_the_room_imports_nothing_heavy():
    code = "import sys, qalign.processes; print({'torch', 'accelerate', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
