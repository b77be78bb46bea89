"""README.md from nbs/index.ipynb: markdown as it is, code fenced, then its output. `--check` compares."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTICE = "<!-- made by tools/readme.py from nbs/index.ipynb: edit that -->"


def text_of(output: dict) -> str:
    "The text of one output: a stream, markdown as it is, or plain text in a fence."
    if output["output_type"] == "stream":
        return fence("".join(output["text"]), "text")
    data = output.get("data", {})
    if "text/markdown" in data:
        return "".join(data["text/markdown"]).strip()
    return fence("".join(data.get("text/plain", "")), "text")


def fence(text: str, language: str) -> str:
    "A fenced block."
    return f"```{language}\n{text.rstrip()}\n```"


def render(notebook: dict) -> str:
    "The whole page as markdown. Hidden cells (`# | hide`) are left out."
    parts = [NOTICE]
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\(([\w/]+\.ipynb)\)", r"](nbs/\1)", source))  # links as seen from the root
        elif cell["cell_type"] == "code" and source and not source.startswith(("# | hide", "#| hide")):
            parts += [fence(source, "python"), *(text_of(o) for o in cell["outputs"])]
    return "\n\n".join(p for p in parts if p) + "\n"


def main() -> None:
    "Write README.md, or with `--check` say whether it is what the index gives."
    target = ROOT / "README.md"
    text = render(json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8")))
    if "--check" not in sys.argv:
        target.write_text(text, encoding="utf-8")
    elif target.read_text(encoding="utf-8") != text:
        sys.exit("README.md differs from nbs/index.ipynb: run `make readme`")


if __name__ == "__main__":
    main()
