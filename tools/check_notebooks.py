"""Checks of the notebooks, all on a copy, so that the working tree stays as it is: `export`, `clean`, `run`.

export  the modules in qalign/ are what the notebooks export
clean   nbdev-clean changes no notebook
run     every notebook runs, and its text outputs are the committed ones; images are not compared, and cells that
        nbdev-test passes over (gpu, slow) keep the outputs they have
"""

import difflib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKERS = "2"


def copy_project(to: Path) -> None:
    "What the notebooks and nbdev read: sources, data and settings."
    skip = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("nbs", "qalign", "data", "tools"):
        shutil.copytree(ROOT / name, to / name, ignore=skip)
    for name in ("pyproject.toml", "settings.ini", "README.md"):
        shutil.copy(ROOT / name, to / name)


def nbdev(command: str, *args: str, at: Path) -> None:
    "Run one nbdev command on the copy, with the copy's package."
    env = {**os.environ, "PYTHONPATH": str(at), "OMP_NUM_THREADS": "1"}  # two workers with two threads each are slower
    done = subprocess.run(
        [Path(sys.executable).with_name(command), *args], cwd=at, env=env, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit((done.stdout + done.stderr).replace(str(at) + "/", "").strip() or f"{command} failed")


def export(at: Path) -> Iterator[str]:
    "Differences between qalign/ and a fresh export."
    for module in (at / "qalign").glob("*.py"):
        if module.name not in ("__init__.py", "__main__.py", "_modidx.py"):
            module.unlink()
    nbdev("nbdev-export", at=at)
    for path in sorted({p.name for d in (ROOT, at) for p in (d / "qalign").glob("*.py")}):
        old, new = (d / "qalign" / path for d in (ROOT, at))
        if not new.exists():
            yield f"qalign/{path}: no notebook exports it: delete it"
        elif not old.exists() or old.read_bytes() != new.read_bytes():
            yield f"qalign/{path}: differs from its notebook: run `make export`"


def clean(at: Path) -> Iterator[str]:
    "Notebooks that nbdev-clean changes."
    nbdev("nbdev-clean", at=at)
    for new in notebooks(at):
        if new.read_bytes() != (ROOT / new.relative_to(at)).read_bytes():
            yield f"{new.relative_to(at)}: holds stray metadata: run `nbdev-clean`"


def run(at: Path) -> Iterator[str]:
    "Text outputs of a fresh run that differ from the committed ones."
    nbdev("nbdev-test", "--save", "--n-workers", WORKERS, at=at)
    nbdev("nbdev-clean", at=at)
    for new in notebooks(at):
        name = new.relative_to(at)
        pages = [{c["id"]: c for c in json.loads(p.read_text(encoding="utf-8"))["cells"]} for p in (ROOT / name, new)]
        for key, cell in pages[0].items():
            committed, fresh = texts(cell), texts(pages[1][key])
            if committed != fresh:
                yield f"{name}, cell {key}: {first_difference(committed, fresh)}"


def notebooks(at: Path) -> list[Path]:
    "Notebooks below nbs/."
    return sorted((at / "nbs").rglob("*.ipynb"))


def texts(cell: dict) -> list[str]:
    "Lines of a cell's text outputs, each part under the name of its kind."
    lines: list[str] = []
    for output in cell.get("outputs", []):
        parts = {output.get("name", "error"): output.get("text", output.get("traceback", "")), **output.get("data", {})}
        for kind in sorted(k for k, text in parts.items() if text):
            lines += [f"[{kind}]", *([] if kind.startswith("image/") else "".join(parts[kind]).splitlines())]
    return lines


def first_difference(committed: list[str], fresh: list[str]) -> str:
    "The first line that differs, both ways, from shortly before the place where it does."
    changed = [d for d in difflib.ndiff(committed, fresh) if d[0] in "-+"]
    old, new = (next((d[2:] for d in changed if d[0] == sign), "nothing") for sign in "-+")
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = max(0, same - 30)
    return f"committed {old[start:][:90]!r}, a fresh run gives {new[start:][:90]!r}"


def main() -> None:
    "Run one check and list what it finds, a line each."
    check = {"export": export, "clean": clean, "run": run}[sys.argv[1]]
    with tempfile.TemporaryDirectory(prefix="qalign-") as folder:
        at = Path(folder).resolve()
        copy_project(at)
        if found := list(check(at)):
            sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
