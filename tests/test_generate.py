"""From a constitution to a frozen rubric: every way it can go wrong, and that nothing paid for is lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_server import HTML, JSON, completion, stand_in

from qalign.core import UserError, data_path, read_jsonl
from qalign.engine import Chat, EngineError, HFEngine, Usage, _Grammar, load_engine
from qalign.generate import (
    Constitution,
    _dimension_schema,
    _parse,
    _question_schema,
    _slug,
    freeze,
    generate,
    load_constitution,
    replay,
)
from qalign.lint import lint, open_findings
from qalign.rubric import Waiver, load_rubric, save_rubric, validate

TEXT = """# courtesy

A reader's time counts.

## Respect
Nobody is blamed.

## Promptness
The next step is named.
"""
QUIET: dict[str, Any] = {"say": lambda line: None}
SMALL: dict[str, Any] = {"graded": 2, "spare": 0, **QUIET}


@pytest.fixture
def courtesy(tmp_path: Path) -> Constitution:
    (tmp_path / "courtesy.md").write_text(TEXT)
    return load_constitution(tmp_path / "courtesy.md")


def reply(gate: str, *graded: str) -> str:
    asked = [f"How well does the response {x}?" for x in graded]
    return json.dumps({"gates": [f"Does the response {gate}?"], "graded": asked})


GOOD = [
    reply("thank the reader for writing", "address the reader by name", "keep blame away from the reader"),
    reply("name the next step to come", "say who takes the next step", "give a date for the next step"),
]


class Script:
    "A writer that answers from a list."

    def __init__(self, replies: Sequence[str | None]) -> None:
        self.spec, self.usage, self.replies, self.asked = "script", Usage(), list(replies), []

    def identity(self) -> dict[str, str]:
        return {"spec": self.spec}

    def complete(self, chats: Sequence[Chat], **options: Any) -> list[str]:
        self.asked += [(list(c), options) for c in chats]
        out = [self.replies.pop(0) if self.replies else None for _ in chats]
        if None in out:
            raise EngineError("server URL answered with status 500", out)
        for _ in chats:
            self.usage.add(10, 5)
        return [str(r) for r in out]


# The constitution


def test_the_shipped_constitution_names_the_rubrics_dimensions() -> None:
    ours, rubric = load_constitution(data_path("constitution")), load_rubric("hhh")
    tree = [(p.name, [d.name for d in p.dimensions]) for p in rubric.principles]
    assert [(p.name, [d.name for d in p.dimensions]) for p in ours.principles] == tree
    for principle in ours.principles:
        for article in (principle, *principle.dimensions):
            assert 1 <= article.text.count(". ") + 1 <= 4 and 12 <= len(article.text.split()) <= 70


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no principle"),
        ("words\n# a\nb\n", "line 1: text before the first"),
        ("## a\nb\n", "line 1: expected '# principle'"),
        ("# a\nb\n### c\nd\n", "line 3: expected '# principle'"),
        ("#\nb\n", "line 1: expected '# principle'"),
        ("# a\n# b\nc\n", "'a' has no text"),
        ("# a\nb\n## c\n", "'c' has no text"),
        ("# a\nb\n# A\nc\n", "principle 'a' stands twice"),
        ("# a\nb\n## c\nd\n## c\ne\n", "dimension 'c' stands twice"),
        ("# a\n" + "b" * 1_000_001, "is longer than"),
    ],
)
def test_bad_constitutions(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.md").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_constitution(tmp_path / "c.md")
    assert "\n" not in str(caught.value)


def test_missing_binary_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="check the path"):
        load_constitution(tmp_path / "none.md")
    (tmp_path / "b.md").write_bytes(b"# a\n\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8 at byte 4"):
        load_constitution(tmp_path / "b.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.md file"):
        load_constitution(tmp_path / "empty")


def test_files_of_a_folder_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "2.md").write_text("# b\ntext\n")
    (tmp_path / "1.md").write_text("\ufeff# a\ntext one\ntext two\n")
    ours = load_constitution(tmp_path)
    assert [(p.name, p.text) for p in ours.principles] == [("a", "text one text two"), ("b", "text")]


# The schema


@pytest.mark.parametrize("schema", [_question_schema(2, 4), _dimension_schema(3)])
def test_any_model_at_all_gives_valid_json(schema: dict[str, Any]) -> None:
    "Random scores in place of a model: what the grammar lets through is always of the schema."
    import torch

    engine: HFEngine = load_engine("smollm2")
    vocabulary, end = engine.model.config.vocab_size, engine.tokenizer.eos_token_id
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        grammar = _Grammar(schema, engine.tokenizer, 1, vocabulary)
        ids = torch.zeros(1, 1, dtype=torch.long)
        for _ in range(3000):
            scores = grammar(ids, torch.randn(1, vocabulary, generator=generator))
            token = int(scores.argmax())
            if token == end:
                break
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        else:
            pytest.fail("the grammar lets a reply run on")
        value, problem = _parse(engine.tokenizer.decode(ids[0, 1:]), schema)
        assert value is not None, problem


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "<html></html>", '{"gates": 1, "graded": 2}', '{"gates": []}'])
def test_replies_that_are_no_questions(text: str) -> None:
    value, problem = _parse(text, _question_schema(1, 2))
    assert value is None and problem and "\n" not in problem


def test_a_bad_schema_is_one_line() -> None:
    engine = load_engine("smollm2")
    with pytest.raises(UserError, match="cannot be enforced"):
        engine.complete([[{"role": "user", "content": "x"}]], max_tokens=4, schema={"type": "nonsense"})


# The loop


def test_a_clean_reply_is_asked_once(courtesy: Constitution, tmp_path: Path) -> None:
    writer = Script(GOOD)
    rubric = generate(courtesy, writer, tmp_path / "out", **SMALL)
    assert len(writer.asked) == 2 and len(rubric.questions) == 6 and open_findings(lint(rubric)) == []
    assert [q.id for q in rubric.questions][:2] == ["courtesy.respect.g1", "courtesy.respect.q1"]
    assert load_rubric(tmp_path / "out" / "draft.yaml") == rubric


def test_what_the_linter_says_goes_back(courtesy: Constitution, tmp_path: Path) -> None:
    bad = reply("blame and mock the reader at length", "address the reader by name", "keep blame away from the reader")
    writer = Script([bad, GOOD[1], GOOD[0]])
    rubric = generate(courtesy, writer, tmp_path / "out", **SMALL)
    assert len(writer.asked) == 3 and open_findings(lint(rubric)) == []
    again = writer.asked[2][0]
    assert again[-2] == {"role": "assistant", "content": bad} and "These need work" in again[-1]["content"]
    assert writer.asked[2][1]["seed"] == 1


def test_garbage_is_sent_back_and_survived(courtesy: Constitution, tmp_path: Path) -> None:
    writer = Script(["<html>no</html>", GOOD[1], GOOD[0]])
    rubric = generate(courtesy, writer, tmp_path / "out", **SMALL)
    assert len(rubric.questions) == 6 and "not JSON" in writer.asked[2][0][-1]["content"]


def test_nothing_but_garbage_is_an_error_that_keeps_the_record(courtesy: Constitution, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable question for 'Respect' in 2 tries"):
        generate(courtesy, Script(["no"] * 10), tmp_path / "out", tries=2, **SMALL)
    rows = list(read_jsonl(tmp_path / "out" / "record.jsonl"))
    assert sum(len(r["replies"]) for r in rows) == 4 and not (tmp_path / "out" / "draft.yaml").exists()


def test_least_bad_questions_fill_the_gap_and_are_listed(courtesy: Constitution, tmp_path: Path) -> None:
    same = reply("name the next step to come", "say who takes the next step", "say who takes the next step")
    rubric = generate(courtesy, Script([same] * 10), tmp_path / "out", tries=2, **SMALL)
    validate(rubric)
    findings = open_findings(lint(rubric))
    text = (tmp_path / "out" / "draft.yaml").read_text()
    assert findings and all(f"{f.id}: {f.rule}" in text for f in findings)
    with pytest.raises(UserError, match="mend it or add a waiver"):
        freeze(tmp_path / "out" / "draft.yaml", tmp_path / "frozen.yaml")
    assert not (tmp_path / "frozen.yaml").exists()


def test_dimensions_are_proposed_for_a_bare_principle(tmp_path: Path) -> None:
    (tmp_path / "bare.md").write_text("# courtesy\nA reader's time counts.\n")
    names = [{"name": n, "text": "Some words about what it asks for."} for n in ("Respect", "Promptness")]
    twice = [names[0], names[0]]
    replies = [json.dumps({"dimensions": d}) for d in (twice, names)]
    rubric = generate(
        load_constitution(tmp_path / "bare.md"), Script([*replies, *GOOD]), tmp_path / "out", dimensions=2, **SMALL
    )
    assert [d.name for d in rubric.dimensions] == ["Respect", "Promptness"]


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        *(
            ("Refusal of Harm", "refusal_of_harm"),
            ("self-harm & risk", "self_harm_risk"),
            ("_a__b ", "a_b"),
            ("!", "x"),
        ),
        *(("Höflichkeit", "höflichkeit"), ("礼貌", "礼貌"), ("ясность речи", "ясность_речи"), ("A/B 2", "a_b_2")),
    ],
)
def test_names_become_ids(name: str, slug: str) -> None:
    assert _slug(name) == slug
    assert not name.isascii() or slug == (re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "x")


def test_names_that_come_to_the_same_are_numbered(tmp_path: Path) -> None:
    names = ["礼貌", "速度", "C", "C++", "C!", "!", "?"]
    (tmp_path / "c.md").write_text("# 客气\nTime counts.\n" + "".join(f"## {n}\nIt is clear.\n" for n in names))
    replies = [reply(f"keep to rule {w}", f"show {w} first", f"end with {w} last") for w in "abcdefg"]
    rubric = generate(load_constitution(tmp_path / "c.md"), Script(replies), tmp_path / "out", tries=1, **SMALL)
    stems = [d.questions[0].id.rsplit(".", 1)[0] for d in rubric.dimensions]
    assert stems == [f"客气.{x}" for x in ("礼貌", "速度", "c", "c_2", "c_3", "x", "x_2")]
    assert load_rubric(tmp_path / "out" / "draft.yaml") == rubric


def test_a_dimension_has_a_name_of_its_own_across_principles(tmp_path: Path) -> None:
    (tmp_path / "bare.md").write_text("# courtesy\nTime counts.\n# truth\nFacts count.\n# care\nx\n## Promptness\ny\n")

    def named(*names: str) -> str:
        text = "Some words about what it asks for."
        return json.dumps({"dimensions": [{"name": n, "text": text} for n in names]})

    bare = load_constitution(tmp_path / "bare.md")
    proposed = [named("Promptness"), named("Clear Words"), named("Clear words"), named("Proof")]
    third = reply("show a sign of care", "look after the person who asks", "offer further help at the end")
    writer = Script([*proposed, *GOOD, third])
    rubric = generate(bare, writer, tmp_path / "out", dimensions=1, **SMALL)
    assert [d.name for d in rubric.dimensions] == ["Clear Words", "Proof", "Promptness"]
    assert "some names stand twice: Promptness are taken" in writer.asked[1][0][-1]["content"]
    assert "some names stand twice: Clear words are taken" in writer.asked[3][0][-1]["content"]
    with pytest.raises(UserError, match="no usable dimension for 'truth' in 2 tries"):
        generate(bare, Script([named("Clarity")] * 3), tmp_path / "no", dimensions=1, tries=2, **SMALL)


def test_a_reply_with_too_few_questions_is_sent_back_and_a_lasting_lack_is_told(
    courtesy: Constitution, tmp_path: Path
) -> None:
    few = reply("thank the reader for writing", "address the reader by name")
    writer = Script([few, GOOD[1], GOOD[0]])
    rubric = generate(courtesy, writer, tmp_path / "out", **SMALL)
    assert len(rubric.questions) == 6 and "- only 1 of 2 graded questions" in writer.asked[2][0][-1]["content"]
    told: list[str] = []
    options = {**SMALL, "say": told.append}
    generate(courtesy, Script([few, GOOD[1], few]), tmp_path / "less", tries=2, **options)
    assert [line for line in told if "only" in line] == ["Respect: only 1 of 2 graded questions"]


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_breakdown_anywhere_goes_on_to_the_same_draft(courtesy: Constitution, tmp_path: Path, kept: int) -> None:
    replies = ["<html>", GOOD[1], GOOD[0]]
    whole = generate(courtesy, Script(replies), tmp_path / "whole", batch=1, **SMALL)
    broken = tmp_path / "broken"
    with pytest.raises(EngineError, match=f"{kept} replies are kept"):
        generate(courtesy, Script(replies[:kept]), broken, batch=1, **SMALL)
    rest = Script(replies[kept:])
    assert generate(courtesy, rest, broken, batch=1, **SMALL) == whole
    assert len(rest.asked) == len(replies) - kept
    for name in ("draft.yaml", "plan.json"):
        assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_question_of_the_same_folder_is_refused(courtesy: Constitution, tmp_path: Path) -> None:
    generate(courtesy, Script(GOOD), tmp_path / "out", **SMALL)
    with pytest.raises(UserError, match="begun with another seed"):
        generate(courtesy, Script(GOOD), tmp_path / "out", seed=1, **SMALL)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(UserError, match=r"holds no plan\.json"):
        generate(courtesy, Script(GOOD), tmp_path / "full", **SMALL)
    with pytest.raises(UserError, match="expected graded of 2 or more"):
        generate(courtesy, Script(GOOD), tmp_path / "new", graded=1, **QUIET)


# The record


@pytest.mark.parametrize("name", ["generate-courtesy", "generate-courtesy-server"])
def test_recorded_runs_replay_byte_for_byte(tmp_path: Path, name: str) -> None:
    shutil.copytree(data_path("runs", name), tmp_path / name)
    before = (tmp_path / name / "draft.yaml").read_bytes()
    (tmp_path / name / "draft.yaml").unlink()
    replay(tmp_path / name, **QUIET)
    assert (tmp_path / name / "draft.yaml").read_bytes() == before


def test_a_record_with_a_hole_says_which_reply_is_missing(tmp_path: Path) -> None:
    shutil.copytree(data_path("runs", "generate-courtesy"), tmp_path / "run")
    lines = (tmp_path / "run" / "record.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "record.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"record\.jsonl lacks the reply to 'Respect, try 4'"):
        replay(tmp_path / "run", **QUIET)
    with pytest.raises(UserError, match=r"no plan\.json"):
        replay(tmp_path / "nothing", **QUIET)


# Real processes and sockets


def run_cli(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    code = "from qalign.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=600, **kwargs)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, JSON, b"{}"), "status 500"),
        ((200, HTML, b"<html>hi</html>"), "not a chat completion"),
        (None, "is it running"),
    ],
)
def test_a_broken_server_on_the_command_line(tmp_path: Path, answer: Any, message: str) -> None:
    (tmp_path / "c.md").write_text(TEXT)
    calls = iter([completion(GOOD[0])])
    with stand_in(lambda _: next(calls, answer)) as (server, _):
        command = ["rubric", "generate", str(tmp_path / "c.md"), "--graded", "2", "--out", str(tmp_path / "out")]
        done = run_cli(*command, "--engine", server.spec)
        assert done.returncode == 2 and message in done.stderr and "1 replies are kept" in done.stderr
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    kept = list(read_jsonl(tmp_path / "out" / "record.jsonl"))
    assert [r for row in kept for r in row["replies"] if r] == [GOOD[0]]


def test_kill_minus_nine_and_go_on(tmp_path: Path) -> None:
    (tmp_path / "c.md").write_text(
        TEXT + "\n## Clarity\nPlain words.\n\n## Order\nFirst things first.\n\n## Tone\nWarm.\n"
    )
    asked: list[str] = []

    def answer(body: dict[str, Any]) -> Any:
        about = body["messages"][-1]["content"]
        asked.append(about)
        if len(asked) > 4 and not go_on:
            time.sleep(60)
        n = len(asked)
        return completion(reply(f"do the thing number {'abcdefghijkl'[n]} well", f"serve aim {'abcdefghijkl'[n]} best"))

    go_on: list[bool] = []
    with stand_in(answer) as (server, _):
        code = "from qalign.cli import main; main()"
        out = tmp_path / "out"
        args = [
            "rubric",
            "generate",
            str(tmp_path / "c.md"),
            "--graded",
            "2",
            "--out",
            str(out),
            "--engine",
            server.spec,
        ]
        process = subprocess.Popen([sys.executable, "-c", code, *args], stdout=subprocess.DEVNULL)
        end = time.time() + 60
        while len(asked) < 5 and time.time() < end:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        before = [r for row in read_jsonl(out / "record.jsonl") for r in row["requests"]]
        assert len(before) == 4
        go_on.append(True)
        generate(load_constitution(tmp_path / "c.md"), server, out, graded=2, tries=4, **QUIET)
    after = [r for row in read_jsonl(out / "record.jsonl") for r in row["requests"]]
    assert after[:4] == before and len({json.dumps(r) for r in after}) == len(after)


# Freezing


def test_a_frozen_rubric_is_sealed(courtesy: Constitution, tmp_path: Path) -> None:
    generate(courtesy, Script(GOOD), tmp_path / "out", **SMALL)
    frozen = freeze(tmp_path / "out" / "draft.yaml", tmp_path / "mine.yaml", name="mine")
    text = (tmp_path / "mine.yaml").read_text()
    assert load_rubric(tmp_path / "mine.yaml") == frozen and frozen.name == "mine" and "# Draft" not in text
    (tmp_path / "mine.yaml").write_text(text.replace("by name", "by title"))
    with pytest.raises(UserError, match="was frozen as"):
        load_rubric(tmp_path / "mine.yaml")
    assert freeze(tmp_path / "out" / "draft.yaml", tmp_path / "again.yaml").version == frozen.version


def test_a_waiver_with_its_reason_lets_a_finding_pass(courtesy: Constitution, tmp_path: Path) -> None:
    bad = reply("thank the reader for a good letter", "address the reader by name", "keep blame away from the reader")
    draft = generate(courtesy, Script([bad, GOOD[1]]), tmp_path / "out", tries=1, **SMALL)
    found = open_findings(lint(draft))
    assert [f.rule for f in found] == ["vague"]
    waived = tuple(Waiver(f.id, f.rule, "the letter is praised in every message") for f in found)
    from dataclasses import replace

    save_rubric(replace(draft, waivers=waived), tmp_path / "waived.yaml")
    head = "# Our own notes.\n"
    (tmp_path / "waived.yaml").write_text(head + (tmp_path / "waived.yaml").read_text())
    assert freeze(tmp_path / "waived.yaml", tmp_path / "f.yaml").waivers == waived
    assert (tmp_path / "f.yaml").read_text().startswith(head)
