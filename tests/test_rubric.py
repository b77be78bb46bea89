"Room rubric: the shipped rubric's promises, the round trip, hostile files, and the properties of a selection."

import difflib
import io
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import qalign.rubric as room
from qalign.core import UserError, data_path
from qalign.rubric import (
    Dimension,
    Principle,
    Question,
    Rubric,
    Waiver,
    diff,
    load_rubric,
    save_rubric,
    select,
    show,
    show_diff,
    stats,
    sunburst,
    validate,
)

HHH = load_rubric()
DIMENSIONS = {
    "harmlessness": "Language Sensitivity · Avoidance of Physical Harm · Harmful Request Handling · Risk Recognition · "
    "Identity Deception · Child Safety · Avoidance of Emotional or Psychological Harm · "
    "Avoidance of Inappropriate Content · Avoidance of Dangerous or Triggering Content · "
    "Avoidance of Poor Judgment in Sensitive Scenarios · "
    "Encouraging Constructive Alternatives · Avoidance of Misinformation · Promotion of Inclusivity · "
    "Encouragement of Ethical Decision-Making",
    "helpfulness": "Relevance · Handling Ambiguity · Information Gathering · Accuracy · Clarity · Completeness · "
    "Depth · Logical Flow · Engagement · Actionability · Problem-Solving Process · Solution Accuracy · "
    "Context Awareness",
    "honesty": "Truthfulness · Scientific Accuracy · Educational Responsibility · Anthropomorphization · "
    "Transparency · Avoidance of Misleading · Consistency · Impartiality · Source Reliability · Knowledge Boundaries · "
    "Historical Claims · Real-Time Information · Acknowledgement of Errors",
}
CONDITIONS = ("If ", "Where ", "When ")
OPENINGS = {"gate": ("Does ", "Is ", *CONDITIONS), "graded": ("How ", "To what degree ", *CONDITIONS)}
CHECKED = settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def fails(f, *args, **kwargs) -> str:
    "The message of the UserError that the call ends in: one line, not too long, no path of this machine."
    with pytest.raises(UserError) as e:
        f(*args, **kwargs)
    message = str(e.value)
    assert message and "\n" not in message and "\r" not in message and len(message) < 400
    assert tempfile.gettempdir() + os.sep not in message
    return message


# The shipped rubric


def test_counts_and_names_are_the_papers():
    assert [tuple(row.values())[:5] for row in stats(HHH)] == [
        ("harmlessness", 14, 16, 47, 63),
        ("helpfulness", 13, 13, 39, 52),
        ("honesty", 13, 13, 39, 52),
        ("total", 40, 42, 125, 167),
    ]
    assert (len(HHH.dimensions), len(HHH.gates), len(HHH.graded), len(HHH.questions)) == (40, 42, 125, 167)
    for p in HHH.principles:
        assert sorted(d.name for d in p.dimensions) == sorted(DIMENSIONS[p.name].split(" · "))
    assert HHH.cap == "harmlessness" and HHH.name == "hhh" and HHH.description and HHH.provenance


def test_every_dimension_has_a_gate_and_three_graded():
    sizes = {p.name: [(len(d.gates), len(d.graded)) for d in p.dimensions] for p in HHH.principles}
    assert set(sizes["helpfulness"]) == set(sizes["honesty"]) == {(1, 3)}
    assert all(g >= 1 and k >= 3 for g, k in sizes["harmlessness"])
    assert sum(g == 2 for g, _ in sizes["harmlessness"]) == 2 and sum(k == 4 for _, k in sizes["harmlessness"]) == 5


def test_small_preset_keeps_the_telling_ones():
    first = [d.name for p in HHH.principles for d in p.dimensions[:3]]
    assert first[:2] == ["Harmful Request Handling", "Avoidance of Physical Harm"]
    assert first[3:5] == ["Relevance", "Clarity"] and first[6:8] == ["Truthfulness", "Avoidance of Misleading"]
    assert len(select(HHH, dimensions=3, per_dimension=(1, 3)).questions) == 36


def test_ids_are_unique_short_and_regular():
    ids = [q.id for q in HHH.questions]
    assert len(set(ids)) == len(ids) and max(map(len, ids)) <= 32
    prefixes = set()
    for p, short in zip(HHH.principles, ("harm", "help", "hon"), strict=True):
        for d in p.dimensions:
            stem = d.questions[0].id.rsplit(".", 1)[0]
            assert stem.startswith(short + ".") and stem not in prefixes
            prefixes.add(stem)
            want = [f"g{i + 1}" for i in range(len(d.gates))] + [f"q{i + 1}" for i in range(len(d.graded))]
            assert [q.id for q in d.questions] == [f"{stem}.{w}" for w in want]


def test_questions_are_short_and_well_formed():
    for d in HHH.dimensions:
        for q in d.questions:
            assert len(q.text.split()) <= 30 and q.text.endswith("?") and q.text.count("?") == 1, q
            assert d.name.casefold() not in q.text.casefold(), q
            assert q.text.startswith(OPENINGS[q.kind]), q
            assert q.kind == "gate" or "how " in q.text.casefold() or q.text.startswith("To what degree "), q
            assert not any(w in q.text.casefold() for w in ("how long", "how short", "how much text")), q
    assert sum(len(q.text.split()) for q in HHH.questions) / len(HHH.questions) <= 14  # the judge pays by the token


def test_no_two_questions_are_nearly_the_same():
    for a, b in combinations(HHH.questions, 2):
        m = difflib.SequenceMatcher(None, a.text.casefold(), b.text.casefold(), autojunk=False)
        assert m.real_quick_ratio() < 0.9 or m.quick_ratio() < 0.9 or m.ratio() < 0.9, (a, b)


def test_the_shipped_file_is_its_own_round_trip(tmp_path):
    save_rubric(HHH, tmp_path / "hhh.yaml", seal=True)
    text = data_path("rubric", "hhh.yaml").read_text().replace(f"'{HHH.version}'", HHH.version)
    head = [line for line in text.splitlines(keepends=True) if line.startswith("#")]
    assert text == "".join(head) + (tmp_path / "hhh.yaml").read_text()
    assert load_rubric(tmp_path / "hhh.yaml") == HHH == load_rubric("hhh")
    assert load_rubric(str(data_path("rubric", "hhh.yaml"))) == HHH


# Round trip

ODD = ["yes", "null", "2024", "~", "- a", "a: b", "# no", "'", '"', "!!x", "&a", "*a", "<<", "=", "{a}", "[bold]"]
ODD += ["\ufeffx", "é😀", "\ufffe", "a" * 300, "%a", "a #b", "?", "a?", "---", "...", "0x1", "1_000", "a\xa0\u200bb"]
LINE = st.sampled_from(ODD) | st.text(
    st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=12
).map(str.strip).filter(bool)
FREE = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]) | st.sampled_from("\n\t #:'"), max_size=20)


@st.composite
def rubrics(draw) -> Rubric:
    sizes = st.tuples(st.integers(0, 2), st.integers(0, 3))
    shape = draw(st.lists(st.lists(sizes, min_size=1, max_size=3), min_size=1, max_size=3))
    n = sum(max(1, g + k) for p in shape for g, k in p)
    names = iter(draw(st.lists(LINE, min_size=2 * n, max_size=2 * n, unique=True)))
    ids = iter(draw(st.lists(LINE, min_size=n, max_size=n, unique=True)))

    def dimension(g: int, k: int) -> Dimension:
        kinds = ["gate"] * g + ["graded"] * k or ["graded"]
        return Dimension(next(names), tuple(Question(next(ids), kind, draw(LINE)) for kind in kinds))

    principles = tuple(Principle(next(names), tuple(dimension(g, k) for g, k in p)) for p in shape)
    cap = draw(st.sampled_from(["", *(p.name for p in principles)]))
    dimensions = [d for p in principles for d in p.dimensions]
    known = [x for d in dimensions for x in (d.name, *(q.id for q in d.questions))]
    pairs = draw(st.lists(st.tuples(st.sampled_from(known), LINE), max_size=3, unique_by=lambda x: f"{x[0]}: {x[1]}"))
    waivers = tuple(Waiver(i, rule, draw(LINE)) for i, rule in pairs)
    return validate(Rubric(draw(LINE), principles, cap, draw(FREE), draw(FREE), waivers))


@CHECKED
@given(rubrics(), st.sampled_from(sorted({"SafeLoader", "CSafeLoader"} & set(dir(yaml)))))
def test_round_trip_is_byte_for_byte(rubric, loader):
    with tempfile.TemporaryDirectory() as d, pytest.MonkeyPatch.context() as m:
        m.setattr(room, "_LOADER", getattr(yaml, loader))
        one, two = Path(d) / "one.yaml", Path(d) / "two.yaml"
        save_rubric(rubric, one)
        back = load_rubric(one)
        save_rubric(back, two)
        assert back == rubric and back.version == rubric.version and one.read_bytes() == two.read_bytes()


@CHECKED
@given(rubrics(), rubrics())
def test_diff_is_empty_when_versions_agree_and_only_then(a, b):
    assert diff(a, replace(a, name="x", description="y", provenance="z", waivers=())) == []
    assert (diff(a, b) == []) == (a.version == b.version)
    backwards = replace(a, principles=a.principles[::-1])
    assert (diff(a, backwards) == []) == (a.version == backwards.version)


@CHECKED
@given(rubrics(), st.data())
def test_version_follows_content_alone(rubric, data):
    same = replace(rubric, name="other", description="other", provenance="other", waivers=())
    assert same.version == rubric.version and len(rubric.version) == 16
    p = data.draw(st.integers(0, len(rubric.principles) - 1))
    d = data.draw(st.integers(0, len(rubric.principles[p].dimensions) - 1))
    old = rubric.principles[p].dimensions[d]
    q = old.questions[-1]
    for changed in (replace(q, text=q.text + "x"), replace(q, id=q.id + "x"), replace(q, kind="?")):
        dims = list(rubric.principles[p].dimensions)
        dims[d] = replace(old, questions=(*old.questions[:-1], changed))
        ps = list(rubric.principles)
        ps[p] = replace(ps[p], dimensions=tuple(dims))
        assert replace(rubric, principles=tuple(ps)).version != rubric.version
    assert replace(rubric, cap=rubric.cap + "x").version != rubric.version


def test_version_of_hhh_is_the_same_in_another_process():
    code = "from qalign.rubric import load_rubric; print(load_rubric().version)"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, cwd=ROOT)
    assert out.stdout.strip() == HHH.version


ROOT = Path(room.__file__).parent.parent

# Hostile files

GOOD = """name: tiny
description: two dimensions
cap: harmlessness
provenance: this test
principles:
- name: harmlessness
  dimensions:
  - name: Safety
    questions:
    - {id: s.g1, kind: gate, text: 'Is it harmless?'}
    - {id: s.q1, kind: graded, text: 'How harmless is it?'}
- name: helpfulness
  dimensions:
  - name: Fit
    questions:
    - {id: f.q1, kind: graded, text: 'How well does it fit?'}
"""
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
LAST = GOOD.splitlines()[-1]
EDITS = [
    ("name: Safety", "name: Fit", "duplicate dimension 'Fit'"),
    ("name: helpfulness", "name: harmlessness", "duplicate principle 'harmlessness'"),
    ("s.q1", "s.g1", "duplicate question id 's.g1'"),
    ("f.q1", "s.g1", "duplicate question id 's.g1'"),
    ("id: f.q1, kind: graded", "id: f.q1, kind: grade", "unknown kind 'grade': use gate or graded"),
    ("'How well does it fit?'", "''", "the text of question 'f.q1' is empty"),
    ("'How well does it fit?'", "'  '", "the text of question 'f.q1' is empty"),
    ("'How well does it fit?'", "' fit?'", "one line without space around it"),
    ("'How well does it fit?'", '"a\\nb"', "one line"),
    ("'How well does it fit?'", "[a]", "line 16: expected text for text, got a sequence"),
    ("'How well does it fit?'", "{a: b}", "expected text for text, got a mapping"),
    ("'How well does it fit?'", "yes", "expected text for text, got 'yes': write text in quotes"),
    ("'How well does it fit?'", "9" * 6000, "expected text for text"),
    ("'How well does it fit?'", "2020-13-45", "expected text for text"),
    ("'How well does it fit?'", "", "expected text for text"),
    ("name: Fit", "name:", "expected text for name"),
    ("name: Fit", "name: Fit\n    weight: 2", "unknown key 'weight' in a dimension: its keys are name, questions"),
    ("name: Fit", "name: Fit\n    name: Fat", "key 'name' stands twice in a dimension"),
    ("name: Fit", "name: Fit\n    <<: {a: b}", "unknown key '<<' in a dimension"),
    ("name: Fit", "name: Fit\n    [a]: b", "unknown key a sequence in a dimension"),
    ("name: Fit", "name: Fit\n    ? {a: b}\n    : c", "unknown key a mapping in a dimension"),
    ("name: Fit", "name: &a Fit", "anchor or alias 'a'"),
    ("name: Fit", "name: *a", "anchor or alias 'a'"),
    ("name: Fit", "name: !!str Fit", "YAML tag"),
    ("name: Fit", "name: !!python/object/apply:os.system [true]", "YAML tag"),
    ("name: Fit", "name: !mine Fit", "YAML tag '!mine'"),
    ("name: Fit", "name: Fit\x07", None),
    ("name: Fit", '"name: Fit', None),
    ("name: Fit", "\tname: Fit", None),
    ("  - name: Fit\n", "", "line 14"),
    (", text: 'How well does it fit?'", "", "line 16: missing key 'text' in a question"),
    ("cap: harmlessness\n", "", "missing key 'cap' in a rubric"),
    ("cap: harmlessness", "cap: honesty", "cap names no principle: 'honesty'; use one of harmlessness, helpfulness"),
    ("cap: harmlessness", "cap: [honesty]", "expected text for cap"),
    ("name: tiny\n", "", "missing key 'name' in a rubric"),
    ("name: tiny", "name: ''", "the name of the rubric is empty"),
    ("description: two dimensions", "description: 3", "expected text for description"),
    (LAST, LAST + "\nwaivers: vague", "line 17: expected a list of waivers, got 'vague'"),
    (LAST, LAST + "\nwaivers:", "expected a list of waivers, got ''"),
    (LAST, LAST + "\nwaivers: {f.q1: vague}", "expected a list of waivers, got a mapping"),
    (LAST, LAST + "\nwaivers: [f.q1]", "line 17: expected a waiver with the keys id, rule, reason, got 'f.q1'"),
    (LAST, LAST + "\nwaivers:\n- {id: f.q1, rule: vague}", "line 18: missing key 'reason' in a waiver"),
    (LAST, LAST + "\nwaivers:\n- {id: f.q1, rule: vague, why: x}", "line 18: unknown key 'why' in a waiver"),
    (LAST, LAST + "\nwaivers:\n- {id: f.q1, rule: vague, reason: yes}", "expected text for reason"),
    (LAST, LAST + "\nwaivers:\n- {id: f.q1, rule: vague, reason: ''}", "the reason of the waiver of 'f.q1' is empty"),
    (
        LAST,
        LAST + '\nwaivers:\n- {id: f.q1, rule: vague, reason: "a\\nb"}',
        "waiver of 'f.q1' must be one line",
    ),
    (
        LAST,
        LAST + "\nwaivers:\n- {id: f.q2, rule: vague, reason: x}",
        "names no question or dimension: did you mean",
    ),
    (LAST, LAST + "\nwaivers:" + "\n- {id: Fit, rule: vague, reason: x}" * 2, "duplicate waiver 'Fit: vague'"),
    (LAST, "      []", "dimension 'Fit' has no questions"),
    (LAST, "    - f.q1", "line 16: expected a question with the keys"),
    (LAST, "", "expected a list of questions"),
]


@pytest.mark.parametrize("loader", ["SafeLoader", "CSafeLoader"])
@pytest.mark.parametrize(("old", "new", "says"), EDITS)
def test_one_edit_breaks_the_file_in_one_line(tmp_path, monkeypatch, loader, old, new, says):
    monkeypatch.setattr(room, "_LOADER", getattr(yaml, loader))
    assert GOOD.count(old) >= 1
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    load_rubric(path)
    path.write_text(GOOD.replace(old, new, 1) if old != "name: helpfulness" else GOOD.replace(old, new))
    message = fails(load_rubric, path)
    assert message.startswith("mine.yaml") and (says is None or says in message), message


WHOLE = {
    "empty": b"",
    "comment": b"# nothing\n",
    "null": b"~\n",
    "text": b"hello",
    "list": b"- a\n- b\n",
    "number": b"42",
    "two documents": (GOOD + "---\n" + GOOD).encode(),
    "no principles": b"name: x\ncap: ''\nprinciples: []\n",
    "principles null": b"name: x\ncap: ''\nprinciples:\n",
    "principles text": b"name: x\ncap: ''\nprinciples: harmlessness\n",
    "principle text": b"name: x\ncap: ''\nprinciples: [harmlessness]\n",
    "no dimensions": b"name: x\ncap: ''\nprinciples: [{name: p, dimensions: []}]\n",
    "latin-1": GOOD.replace("two", "zw\u00f6lf").encode("latin-1"),
    "utf-16": GOOD.encode("utf-16"),
    "zero bytes": b"\0" * 100,
    "gzip": bytes.fromhex("1f8b0800000000000003"),
    "bomb": BOMB.encode(),
    "bomb in place": (BOMB + GOOD).encode(),
    "deep list": b"[" * 100_000,
    "deep mapping": b"{a: " * 50_000,
    "deep block": b"- " * 100_000,
    "too large": b"# " + b"x" * 5_000_001,
    "gates last": GOOD.replace("id: s.g1, kind: gate", "id: s.g1, kind: graded")
    .replace("id: s.q1, kind: graded", "id: s.q1, kind: gate")
    .encode(),
    "carriage": b"\r\r\r:",
    "percent": b"%YAML 9.9\n---\na: b",
    "tab": b"\tname: x",
}


@pytest.mark.parametrize("loader", ["SafeLoader", "CSafeLoader"])
@pytest.mark.parametrize("kind", WHOLE)
def test_broken_file_is_one_line(tmp_path, monkeypatch, loader, kind):
    monkeypatch.setattr(room, "_LOADER", getattr(yaml, loader))
    path = tmp_path / "mine.yaml"
    path.write_bytes(WHOLE[kind])
    assert "mine.yaml" in fails(load_rubric, path)


def test_large_file_is_refused_unparsed(tmp_path, monkeypatch):
    monkeypatch.setattr(yaml, "parse", lambda *a, **k: pytest.fail("parsed"))
    for size in (5_000_001, 10_000_000):
        (tmp_path / "big.yaml").write_bytes(b"a" * size)
        assert "'big.yaml' is larger than 5 MB" in fails(load_rubric, tmp_path / "big.yaml")


def test_a_tag_runs_nothing(tmp_path):
    target = tmp_path / "touched"
    (tmp_path / "evil.yaml").write_text(f"!!python/object/apply:os.mkdir ['{target}']\n")
    assert "YAML tag" in fails(load_rubric, tmp_path / "evil.yaml")
    assert not target.exists()


def test_missing_files_and_odd_names(tmp_path):
    assert "unknown rubric 'nope': shipped: hhh" in fails(load_rubric, "nope")
    assert "no rubric file 'nope.yaml'" in fails(load_rubric, tmp_path / "nope.yaml")
    assert "no rubric file" in fails(load_rubric, str(tmp_path))  # a folder
    assert "no rubric file" in fails(load_rubric, "")
    assert "no rubric file" in fails(load_rubric, "../hhh")
    for name in ("a" * 300, "a" * 5000 + ".yaml", "a\0b.yaml", "a\nb.yaml", tmp_path / "a\nb.yaml", "\ud800.yaml"):
        fails(load_rubric, name)
    (tmp_path / "a\nb.yaml").write_text("- x")
    fails(load_rubric, tmp_path / "a\nb.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "no rubric file" in fails(load_rubric, tmp_path / "pipe.yaml")


def test_any_cut_is_an_error_or_a_smaller_valid_rubric(tmp_path):
    path, whole = tmp_path / "cut.yaml", GOOD.encode()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        try:
            assert len(load_rubric(path).questions) in (1, 2, 3)
        except UserError as e:
            assert "\n" not in str(e) and "cut.yaml" in str(e)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.data())
def test_any_mutated_file_is_valid_or_one_line(data):
    text = list(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        i = data.draw(st.integers(0, len(text) - 1))
        text[i] = data.draw(st.sampled_from([*"\t\n\r :-{}[],?!&*#|>'\"%@`~<=0\0\x85\ufeff\u2028", "", "\n- ", "  "]))
    with tempfile.TemporaryDirectory() as d:
        path = Path(d) / "m.yaml"
        path.write_text("".join(text), encoding="utf-8", newline="")
        try:
            validate(load_rubric(path))
        except UserError as e:
            assert len(str(e).splitlines()) == 1


def test_hhh_cut_short_says_so(tmp_path):
    path, whole = tmp_path / "hhh.yaml", data_path("rubric", "hhh.yaml").read_bytes()
    for share in (0.3, 0.5, 0.9):
        path.write_bytes(whole[: whole.rindex(b"kind:", 0, int(share * len(whole)))])
        message = fails(load_rubric, path)
        assert message.startswith("hhh.yaml, line ") and "cut short" in message


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "w.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_rubric(path).version == validate(load_rubric(path)).version
    assert len(load_rubric(path).questions) == 3


# Rubrics made in code

Q = Question("a.q1", "graded", "How well?")


@pytest.mark.parametrize(
    ("principles", "says"),
    [
        ((), "rubric 'x' has no principles"),
        ([], "to be a tuple of Principle"),
        (None, "to be a tuple of Principle"),
        (("p",), "to be a tuple of Principle"),
        ((Principle("p", ()),), "principle 'p' has no dimensions"),
        ((Principle("p", [Dimension("d", (Q,))]),), "to be a tuple of Dimension"),
        ((Principle("p", (Dimension("d", ()),)),), "dimension 'd' has no questions"),
        ((Principle("p", (Dimension("d", (Q, Q)),)),), "duplicate question id 'a.q1'"),
        ((Principle("p", (Dimension("d", ({"id": "x"},)),)),), "to be a tuple of Question"),
        ((Principle(None, (Dimension("d", (Q,)),)),), "expected text for the name of a principle, got None"),
        ((Principle("p", (Dimension(3, (Q,)),)),), "expected text for the name of a dimension, got 3"),
        ((Principle("p", (Dimension("d", (replace(Q, text=None),)),)),), "for the text of question 'a.q1', got None"),
        ((Principle("p", (Dimension("d", (replace(Q, text="a\ud800"),)),)),), "control character"),
        ((Principle("p", (Dimension("d", (replace(Q, kind=None),)),)),), "unknown kind None"),
        ((Principle("p", (Dimension("d", (replace(Q, kind=["gate"]),)),)),), "unknown kind ['gate']"),
        ((Principle("p", (Dimension("d", (Q, replace(Q, id="a.g1", kind="gate"))),)),), "a gate after a graded"),
        ((Principle("p\nq", (Dimension("d", (Q,)),)),), "one line"),
    ],
)
def test_validate_names_the_thing(principles, says, tmp_path):
    bad = Rubric("x", principles, cap="")
    assert says in fails(validate, bad)
    fails(save_rubric, bad, tmp_path / "bad.yaml")
    assert not list(tmp_path.iterdir())


def test_validate_checks_the_head():
    good = Rubric("x", (Principle("p", (Dimension("d", (Q,)),)),), cap="p")
    assert validate(good) is good
    assert "cap names no principle: 'harmlessness'; use one of p" in fails(validate, replace(good, cap="harmlessness"))
    fails(validate, replace(good, cap=None))
    fails(validate, replace(good, cap=[]))
    fails(validate, replace(good, name=""))
    fails(validate, replace(good, description=None))
    assert "tuple of Waiver" in fails(validate, replace(good, waivers=[Waiver("a.q1", "vague", "x")]))
    assert "tuple of Waiver" in fails(validate, replace(good, waivers=("a.q1",)))
    assert "the id of a waiver" in fails(validate, replace(good, waivers=(Waiver(None, "vague", "x"),)))
    assert "the rule of the waiver of 'd'" in fails(validate, replace(good, waivers=(Waiver("d", "", "x"),)))
    assert "take it out" in fails(validate, replace(good, waivers=(Waiver("zzz", "vague", "x"),)))
    assert validate(replace(good, waivers=(Waiver("d", "vague", "x"), Waiver("d", "duplicate", "x"))))
    assert validate(replace(good, description="two\n\tlines"))
    for bad in ("\ud800", "\x85", "\u2028", "\r", "\0"):
        assert "control character" in fails(validate, replace(good, provenance=bad))


def test_save_keeps_the_old_file_and_says_what_failed(tmp_path):
    path = tmp_path / "r.yaml"
    save_rubric(HHH, path)
    before = path.read_bytes()
    fails(save_rubric, replace(HHH, cap="x"), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["r.yaml"]
    (tmp_path / "folder").mkdir()
    assert "cannot write 'folder'" in fails(save_rubric, HHH, tmp_path / "folder")
    assert "cannot write" in fails(save_rubric, HHH, path / "below.yaml")


# Selections


@CHECKED
@given(rubrics(), st.data())
def test_select_keeps_order_and_is_idempotent(rubric, data):
    names = [p.name for p in rubric.principles]
    chosen = data.draw(st.none() | st.lists(st.sampled_from(names), min_size=1))
    k = data.draw(st.none() | st.integers(1, 4))
    n = data.draw(st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3)))
    part = select(rubric, chosen, k, n)
    ids = [q.id for q in rubric.questions]
    kept = [q.id for q in part.questions]
    assert kept == [i for i in ids if i in kept] and set(part.questions) <= set(rubric.questions)
    assert [p.name for p in part.principles] == [p for p in names if chosen is None or p in chosen]
    assert part.cap == (rubric.cap if rubric.cap in {p.name for p in part.principles} else "")
    assert k is None or all(len(p.dimensions) <= k for p in part.principles)
    assert n is None or all(len(d.gates) <= n[0] and len(d.graded) <= n[1] for d in part.dimensions)
    left = {*kept, *(d.name for d in part.dimensions)}
    assert part.waivers == tuple(w for w in rubric.waivers if w.id in left)
    assert select(part, None, k, n) == part
    if chosen is None and k is None and n is None:
        assert part == rubric


@CHECKED
@given(rubrics(), st.data())
def test_select_by_dimension_names(rubric, data):
    names = [d.name for d in rubric.dimensions]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1))
    part = select(rubric, dimensions=iter(chosen))
    assert [d.name for d in part.dimensions] == [n for n in names if n in chosen]
    assert all(p.dimensions for p in part.principles)


def test_select_by_number_of_questions():
    assert select(HHH, per_dimension=4) == select(HHH, per_dimension=(1, 3))
    assert len(select(HHH, per_dimension=1).questions) == len(select(HHH, per_dimension=1).gates) == 40
    assert len(select(HHH, per_dimension=(0, 3)).graded) == 120
    assert (
        len(select(HHH, dimensions=1000, per_dimension=1000).questions) == 165
    )  # one gate each: two lose their second
    assert select(HHH, per_dimension=(1000, 1000)) == HHH == select(HHH, dimensions=1000)


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({"principles": ["honest"]}, "unknown principle 'honest': did you mean 'honesty'?"),
        ({"principles": "honesty"}, "put names in a list"),
        ({"principles": []}, "an empty list of principle names"),
        ({"principles": 3}, "put names in a list"),
        ({"principles": [None]}, "unknown principle None"),
        ({"principles": [["honesty"]]}, "unknown principle"),
        ({"dimensions": ["Dept"]}, "did you mean 'Depth'?"),
        ({"dimensions": "Depth"}, "put names in a list"),
        ({"dimensions": []}, "an empty list of dimension names"),
        ({"dimensions": 0}, "a whole number from 1, got 0"),
        ({"dimensions": -1}, "a whole number from 1"),
        ({"dimensions": True}, "a whole number from 1"),
        ({"dimensions": 1.5}, "expected a list of dimension names"),
        ({"principles": ["honesty"], "dimensions": ["Depth"]}, "unknown dimension 'Depth'"),
        ({"per_dimension": 0}, "expected per_dimension"),
        ({"per_dimension": True}, "expected per_dimension"),
        ({"per_dimension": (1,)}, "expected per_dimension"),
        ({"per_dimension": (1, -1)}, "expected per_dimension"),
        ({"per_dimension": (1, 2.0)}, "expected per_dimension"),
        ({"per_dimension": "13"}, "expected per_dimension"),
        ({"per_dimension": (0, 0)}, "leaves no question in dimension 'Harmful Request Handling'"),
    ],
)
def test_select_says_what_is_wrong(given_, says):
    assert says in fails(select, HHH, **given_)


def test_select_validates_what_it_is_given():
    fails(select, Rubric("x", (Principle("p", (Dimension("d", (Q, Q)),)),), cap="p"))


# Views


def test_html_is_escaped_and_complete():
    nasty = "<script>alert('&')</script>"
    d = Dimension(nasty + "d", (Question(nasty + "i", "gate", nasty + "?"),))
    shown = Rubric(nasty, (Principle(nasty + "p", (d,)),), cap=nasty + "p", description=nasty)._repr_html_()
    assert "<script" not in shown and shown.count("&lt;script&gt;") == 7
    page = HHH._repr_html_()
    assert all(q.id in page for q in HHH.questions) and page.count("<details") == page.count("</details>") == 44
    assert len(repr(HHH)) < 150


def test_show_prints_every_question_and_reads_no_markup():
    out = io.StringIO()
    show(HHH, Console(file=out, width=200))
    assert all(q.text in out.getvalue() for q in HHH.questions)
    out = io.StringIO()
    show(Rubric("[bold]x", (Principle("p", (Dimension("[/]", (Q,)),)),), cap="p"), Console(file=out, width=200))
    assert "[bold]x" in out.getvalue() and "[/]" in out.getvalue()


def test_a_rubric_without_waivers_leaves_the_key_out(tmp_path):
    save_rubric(replace(HHH, waivers=()), tmp_path / "a.yaml")
    assert "waivers" not in (tmp_path / "a.yaml").read_text()
    one = replace(HHH, waivers=(Waiver("Depth", "missing-gate", "no"),))
    save_rubric(one, tmp_path / "b.yaml")
    assert (tmp_path / "b.yaml").read_text().endswith("waivers:\n- {id: Depth, rule: missing-gate, reason: 'no'}\n")
    assert load_rubric(tmp_path / "b.yaml") == one and one.version == HHH.version
    (tmp_path / "c.yaml").write_text(GOOD + "waivers: []\n")
    assert load_rubric(tmp_path / "c.yaml").waivers == ()


def test_stats_add_up():
    *rows, total = stats(HHH)
    for key in ("dimensions", "gates", "graded", "questions"):
        assert total[key] == sum(row[key] for row in rows)
    words = [len(q.text.split()) for q in HHH.questions]
    assert total["mean_words"] == round(sum(words) / len(words), 1) and total["max_words"] == max(words)
    opens = [q for q in HHH.questions if q.text.split()[0] in ("If", "Where", "When")]
    assert total["conditional"] == round(len(opens) / 167, 3)
    assert (total["fewest"], total["most"]) == (4, 6) and len({tuple(row) for row in stats(HHH)}) == 1


@settings(derandomize=True, max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rubrics())
def test_any_rubric_has_stats_and_a_picture(rubric):
    *rows, total = stats(rubric)
    assert len(rows) == len(rubric.principles) and total["questions"] == len(rubric.questions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks
        sunburst(rubric).savefig(io.BytesIO(), dpi=20)


def test_sunburst_has_a_tile_for_everything_and_names_every_dimension():
    figure = sunburst(HHH)
    (ax,) = figure.axes
    assert tuple(figure.get_size_inches()) == (6, 6) and len(ax.patches) == 3 + 40 + 167
    texts = [" ".join(t.get_text().split()) for t in ax.texts]
    assert sorted(texts) == sorted([p.name for p in HHH.principles] + [d.name for d in HHH.dimensions])
    tiles = [p for p in ax.patches if p.get_y() > 2.5]
    dark = [p for p in tiles if sum(p.get_facecolor()[:3]) < 1.5]
    assert (len(tiles), len(dark)) == (167, 42) and min(t.get_fontsize() for t in ax.texts) >= 5


# Differences

D = Dimension("d", (Q, Question("a.q2", "graded", "How apt?"), Question("a.q3", "graded", "How new?")))
E = Dimension("e", (Question("e.q1", "graded", "How calm?"),))
OLD = Rubric("x", (Principle("p", (D,)), Principle("r", (E,))), cap="p")


def changes(*principles: Principle) -> list[tuple[str, ...]]:
    return [(r["id"], r["field"], r["before"], r["after"]) for r in diff(OLD, replace(OLD, principles=principles))]


def test_diff_names_every_change():
    r = OLD.principles[1]
    said = replace(D, questions=(replace(Q, text="How?"), *D.questions[1:]))
    assert changes(Principle("p", (D,)), r) == []
    assert changes(Principle("p", (said,)), r) == [("a.q1", "text", "How well?", "How?")]
    kinds = replace(D, questions=(replace(Q, kind="gate"), *D.questions[1:]))
    assert changes(Principle("p", (kinds,)), r) == [("a.q1", "kind", "graded", "gate")]
    new = replace(D, questions=(*D.questions[:2], Question("a.q4", "graded", "How odd?")))
    assert changes(Principle("p", (new,)), r) == [
        ("a.q4", "added", "", "How odd?"),
        ("a.q3", "removed", "How new?", ""),
    ]
    assert [r["field"] for r in diff(OLD, replace(OLD, cap=""))] == ["cap"]


def test_diff_reads_a_move_as_one_move():
    q1, q2, q3 = D.questions
    r = OLD.principles[1]
    assert changes(Principle("p", (replace(D, questions=(q2, q3, q1)),)), r) == [
        ("a.q1", "order", "first", "after a.q3")
    ]
    moved = (
        Principle("p", (replace(D, questions=(q1, q2)),)),
        Principle("r", (replace(E, questions=(q3, *E.questions)),)),
    )
    assert changes(*moved) == [("a.q3", "dimension", "d", "e")]
    assert changes(Principle("p", (replace(D, name="f"),)), r) == [("d", "name", "d", "f")]
    assert changes(Principle("p", (replace(D, name="f", questions=(q1, q3)),)), r) == [
        ("d", "name", "d", "f"),
        ("a.q2", "removed", "How apt?", ""),
    ]
    assert changes(Principle("s", (D,)), r) == [("p", "name", "p", "s")]
    assert changes(Principle("p", (D, E))) == [("e", "principle", "r", "p")]
    assert changes(r, Principle("p", (D,))) == [("r", "order", "after p", "first")]
    assert {r["where"] for r in diff(HHH, replace(HHH, principles=HHH.principles[::-1]))} == {"principles"}


def printed(old: Rubric, new: Rubric, **console) -> str:
    out = io.StringIO()
    show_diff(old, new, Console(file=out, **console))
    return out.getvalue()


def test_show_diff_marks_words():
    text = "How [/] well does it keep to [b]both[/b] conditions?"
    a = replace(OLD, principles=(Principle("p", (replace(D, questions=(replace(Q, text=text),)),)),))
    b = replace(
        a, principles=(Principle("p", (replace(D, questions=(replace(Q, text=text.replace("both", "its")),)),)),)
    )
    plain = printed(a, b, width=40)
    assert (
        "  ~ a.q1  How [/] well does it keep to [b][-both-]{+its+}[/b] conditions?\n" in plain and "\x1b" not in plain
    )
    assert plain.splitlines()[0] == f"x {a.version} → x {b.version}: 1 change" and "p / d" in plain
    colour = printed(a, b, width=200, force_terminal=True, color_system="standard")
    assert "\x1b[1;32mits" in colour and "\x1b[9;31mboth" in colour and "{+" not in colour
    assert printed(a, a).splitlines() == [f"x {a.version} → x {a.version}: 0 changes"]
    assert "cap: p → none" in printed(a, replace(a, cap=""))


@CHECKED
@given(rubrics(), rubrics())
def test_show_diff_prints_every_row(a, b):
    rows, text = diff(a, b), printed(a, b, width=50)
    assert len(text.splitlines()) == 1 + len(rows) + len({row["where"] for row in rows})


@CHECKED
@given(LINE, LINE)
def test_marks_hold_both_texts(before, after):
    marks = room._marks(before, after)
    assert "".join(t for sign, t in marks if sign != "+") == before
    assert "".join(t for sign, t in marks if sign != "-").split() == after.split()


def test_import_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'pandas', 'matplotlib', 'pyarrow', 'numpy', 'scipy', 'rich'}"
    code = f"import sys, qalign.rubric as r; r.load_rubric(); print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"
