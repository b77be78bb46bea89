"Room convert: round trips, the loaders and graders of autorubric and verifiers, files as they write them, bad files."

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qalign.convert import export_rubric, from_autorubric, from_verifiers, import_rubric, to_autorubric, to_verifiers
from qalign.core import UserError
from qalign.pool import GRADE, pool
from qalign.rubric import Dimension, Principle, Question, Rubric, Verdict, load_rubric, save_rubric, select, validate

SHIPPED = load_rubric()
HHH = Rubric(SHIPPED.name, SHIPPED.principles, SHIPPED.cap, SHIPPED.description, SHIPPED.provenance)  # without waivers
CHECKED = settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
WAYS = {"autorubric": (to_autorubric, from_autorubric), "verifiers": (to_verifiers, from_verifiers)}
FILES = [("autorubric", ".json"), ("autorubric", ".yaml"), ("autorubric", ".yml"), ("verifiers", ".json")]


@pytest.fixture(scope="session")
def autorubric():
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no price list from the network
    import autorubric
    import litellm

    litellm.suppress_debug_info = True
    return autorubric


def fails(f, *args, **kwargs) -> str:
    "The message of the UserError that the call ends in: one line, not too long."
    with pytest.raises(UserError) as e:
        f(*args, **kwargs)
    message = str(e.value)
    assert message and len(message.splitlines()) == 1 and len(message) < 400
    return message


def whats(losses) -> list[str]:
    assert all(x.what and x.where and x.note and "\n" not in str(x) for x in losses)
    return [x.what for x in losses]


# round trips

names = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp", "Zs")), min_size=1, max_size=12)


@st.composite
def rubrics(draw) -> Rubric:
    shape = draw(
        st.lists(
            st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=3), min_size=1, max_size=3
        )
    )
    total = sum(max(1, g + n) for p in shape for g, n in p)
    words = iter(
        draw(st.lists(names, min_size=4 + 2 * total + len(shape), max_size=4 + 2 * total + len(shape), unique=True))
    )
    principles = []
    for p in shape:
        dimensions = []
        for gates, graded in p:
            kinds = ["gate"] * gates + ["graded"] * graded or ["graded"]
            questions = tuple(Question(next(words), kind, f"Is it {draw(names)}?") for kind in kinds)
            dimensions.append(Dimension(questions[0].id, questions))
        principles.append(Principle(next(words), tuple(dimensions)))
    cap = draw(st.sampled_from(["", *(p.name for p in principles)]))
    return validate(
        Rubric(draw(names), tuple(principles), cap, draw(names) + "\n" + draw(names), draw(st.just("") | names))
    )


@pytest.mark.parametrize("form", WAYS)
@given(rubric=rubrics())
@CHECKED
def test_data_round_trip(form, rubric):
    to, back = WAYS[form]
    data, losses = to(rubric)
    assert json.loads(json.dumps(data)) == data
    assert back(data) == (rubric, [])
    assert set(whats(losses)) <= {"gates", "minimum", "hierarchy", "cap", "values", "NA"}
    assert ("gates" in whats(losses)) == bool(rubric.gates) and ("cap" in whats(losses)) == bool(rubric.cap)


@pytest.mark.parametrize(("form", "suffix"), FILES)
@given(rubric=rubrics())
@settings(CHECKED, max_examples=25)
def test_file_round_trip(form, suffix, rubric):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"r{suffix}"
        losses = export_rubric(rubric, path, form)
        assert losses == WAYS[form][0](rubric)[1]
        assert import_rubric(path) == import_rubric(str(path), form) == WAYS[form][1](path) == (rubric, [])


@pytest.mark.parametrize(("form", "suffix"), FILES)
def test_hhh_round_trip_and_determinism(form, suffix, tmp_path):
    a, b = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    losses = export_rubric(HHH, a, form)
    again, lost = import_rubric(a)
    assert (again, lost) == (HHH, []) and again.version == HHH.version
    assert whats(losses) == ["gates", "minimum", "hierarchy", "cap", "values", "NA"]
    assert [x.where for x in losses[:2]] == ["42 gates", "40 dimensions"]
    export_rubric(again, b, form)
    assert a.read_bytes() == b.read_bytes()


def test_across_both_formats():
    there, _ = from_autorubric(to_autorubric(HHH)[0])
    assert from_verifiers(to_verifiers(there)[0])[0] == HHH


def test_only_what_applies_is_lost():
    one = Rubric("one", (Principle("p", (Dimension("d", (Question("g", "gate", "Is it so?"),)),)),), "")
    assert whats(to_autorubric(one)[1]) == whats(to_verifiers(one)[1]) == ["gates", "NA"]


def test_export_validates_first():
    broken = replace(HHH, cap="nobody")
    for to in (to_autorubric, to_verifiers):
        assert "cap names no principle" in fails(to, broken)


# their code on our files


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_autorubric_loads_hhh(autorubric, suffix, tmp_path):
    path = tmp_path / f"hhh{suffix}"
    export_rubric(HHH, path, "autorubric")
    theirs = autorubric.Rubric.from_file(str(path))
    assert [(c.name, c.requirement) for c in theirs.rubric] == [(q.id, q.text) for q in HHH.questions]
    assert [c.is_binary for c in theirs.rubric] == [q.kind == "gate" for q in HHH.questions]
    graded = [c for c in theirs.rubric if c.options]
    assert all([o.label for o in c.options] == [*GRADE, "NA"] and c.options[-1].na for c in graded)
    assert all(2 * o.value - 1 == pytest.approx(GRADE[o.label]) for c in graded for o in c.options if not o.na)


def test_autorubric_grades_hhh(autorubric):
    from autorubric.graders import CriterionGrader

    theirs = autorubric.Rubric.from_dict(to_autorubric(HHH)[0])
    reply = json.dumps({"criterion_status": "MET", "selected_option": 4, "explanation": "mock"})
    config = autorubric.LLMConfig(model="openai/mock", api_key="none", extra_params={"mock_response": reply})
    grader = CriterionGrader(judge_model_config=config, shuffle_options=False)
    report = asyncio.run(theirs.grade("No.", grader, query="Help."))
    values = {r.criterion.name: r.score_value for r in report.report}
    assert values == {q.id: 1.0 if q.kind == "gate" else 0.25 for q in HHH.questions}


def test_weights_are_the_mean_of_means(autorubric):
    "With passing gates counted as 1, the flat mean of autorubric is the mean of principles of dimensions of questions."
    theirs = autorubric.Rubric.from_dict(to_autorubric(HHH)[0])
    labels = {q.id: "TRUE" if q.kind == "gate" else "ABCDF"[i % 5] for i, q in enumerate(HHH.questions)}
    value = {k: (v + 1) / 2 for k, v in GRADE.items()} | {"TRUE": 1.0}

    def mean(xs):
        xs = list(xs)
        return sum(xs) / len(xs)

    wanted = mean(mean(mean(value[labels[q.id]] for q in d.questions) for d in p.dimensions) for p in HHH.principles)
    verdicts = ["MET" if v == "TRUE" else v for v in labels.values()]
    assert theirs.compute_score(verdicts) == pytest.approx(wanted, abs=1e-5)


def test_a_failed_gate_is_what_is_lost(autorubric):
    theirs = autorubric.Rubric.from_dict(to_autorubric(HHH)[0])
    labels = ["TRUE" if q.kind == "gate" else "A" for q in HHH.questions]
    labels[0] = "FALSE"
    ours = pool(HHH, [Verdict(q.id, label) for q, label in zip(HHH.questions, labels, strict=True)]).base
    flat = theirs.compute_score([{"TRUE": "MET", "FALSE": "UNMET"}.get(x, x) for x in labels])
    assert ours == pytest.approx(12 / 14) and 2 * flat - 1 > 0.99


def test_verifiers_loads_hhh(tmp_path):
    from verifiers.v1.judges.rubric import load_criteria

    export_rubric(HHH, tmp_path / "hhh.json", "verifiers")
    theirs = load_criteria(tmp_path / "hhh.json")
    choices = {"gate": ["FALSE", "TRUE"], "graded": ["F", "D", "C", "B", "A"]}
    assert [(c.name, c.text, c.choices) for c in theirs] == [(q.id, q.text, choices[q.kind]) for q in HHH.questions]
    assert sum(c.weight for c in theirs) == pytest.approx(len(HHH.questions), abs=1e-3)


def test_verifiers_grades_hhh(tmp_path):
    from verifiers.v1.judge import JudgeResponse
    from verifiers.v1.judges.rubric import RubricJudge, RubricJudgeConfig
    from verifiers.v1.task import TaskData
    from verifiers.v1.trace import Trace

    class Canned(RubricJudge):
        async def complete(self, messages, **_):
            assert HHH.questions[0].text in messages and HHH.questions[-1].text in messages
            verdicts = [{"name": c.name, "reason": "", "verdict": c.choices[-2]} for c in self.criteria]
            return JudgeResponse(text="Here: " + json.dumps({"verdicts": verdicts}))

    export_rubric(HHH, tmp_path / "hhh.json", "verifiers")
    task = TaskData(prompt="Help.")
    trace = Trace(task={"type": "example", "data": task}, agent={"config": {}}, root_reply="No.")
    judge = Canned(RubricJudgeConfig(path=tmp_path / "hhh.json", view="last_reply"))
    score = asyncio.run(judge.score(task, trace))
    assert 0 < score < 0.75 and len(trace.metrics) == len(HHH.questions)
    assert trace.metrics[f"rubric/{HHH.gates[0].id}"] == 0 and trace.metrics[f"rubric/{HHH.graded[0].id}"] == 0.75


# files as they write them; their loader must take each one too

THESIS = {"name": "thesis", "weight": 3.0, "requirement": "States a clear, arguable thesis"}
EVIDENCE = {"name": "evidence", "weight": 2.0, "requirement": "Supports claims with cited evidence"}
LIST = [THESIS, EVIDENCE]
SECTIONS = [{"name": "Argument", "criteria": [THESIS]}, {"name": "Support", "criteria": [EVIDENCE]}]
FORMS = {
    "list": (LIST, ["thesis", "evidence"]),
    "criteria": ({"criteria": LIST}, ["thesis", "evidence"]),
    "sections": ({"sections": SECTIONS}, ["Argument", "Support"]),
    "list of sections": (SECTIONS, ["Argument", "Support"]),
    "mixed": ([SECTIONS[0], EVIDENCE], ["Argument", "evidence"]),
    "rubric": ({"rubric": LIST}, ["thesis", "evidence"]),
    "rubric of sections": ({"rubric": {"sections": SECTIONS}}, ["Argument", "Support"]),
    "data set": ({"name": "essays", "prompt": "Write.", "rubric": LIST, "items": []}, ["thesis", "evidence"]),
    "precedence": ({"rubric": LIST, "criteria": [{"requirement": "Ignored"}]}, ["thesis", "evidence"]),
    "guidelines": ({"guidelines": "Grade 8.", "criteria": LIST}, ["thesis", "evidence"]),
    "guidelines inside": ({"rubric": {"guidelines": "Grade 8.", "criteria": LIST}}, ["thesis", "evidence"]),
    "null guidelines": ({"guidelines": None, "criteria": LIST}, ["thesis", "evidence"]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_autorubric_forms(autorubric, form, suffix, tmp_path):
    data, dimensions = FORMS[form]
    path = tmp_path / f"r{suffix}"
    path.write_text(json.dumps(data) if suffix == ".json" else yaml.safe_dump(data))
    theirs = autorubric.Rubric.from_file(str(path))
    rubric, losses = import_rubric(path)
    assert [(q.id, q.text) for q in rubric.questions] == [(c.name, c.requirement) for c in theirs.rubric]
    assert [d.name for d in rubric.dimensions] == dimensions and rubric.cap == ""
    assert rubric.name == ("essays" if form == "data set" else "r")
    assert {"gates only", "weights"} <= set(whats(losses))
    assert ("guidelines" in whats(losses)) == ("Grade 8." in rubric.description) == (bool(theirs.guidelines))
    assert ("keys" in whats(losses)) == (form == "data set")


def test_autorubric_readme_example(autorubric):
    "Its README: four nameless criteria, one of them an error with a negative weight."
    data = [
        {"weight": 10.0, "requirement": "States the density"},
        {"weight": 8.0, "requirement": "Names the threshold"},
        {"weight": 6.0, "requirement": "States the cycle life"},
        {"weight": -15.0, "requirement": "Claims the opposite"},
    ]
    assert len(autorubric.Rubric.from_dict(data).rubric) == 4
    rubric, losses = from_autorubric(data)
    assert [q.text for q in rubric.questions] == [c["requirement"] for c in data]
    negative = [x for x in losses if x.what == "negative"]
    assert [x.where for x in negative] == [rubric.questions[3].id] and "FALSE" in negative[0].note
    assert rubric.questions[3].id in rubric.provenance
    ids = [q.id for q in from_autorubric(data[::-1])[0].questions]
    assert ids[::-1] == [q.id for q in rubric.questions]  # an id does not depend on the place
    graded, lost = from_autorubric(data, binary="graded")
    assert {q.kind for q in graded.questions} == {"graded"} and "gates only" not in whats(lost)
    assert "negative" in whats(lost)


def test_cookbook_sections_as_mapping():
    data = {"version": "2", "sections": {"technical": [THESIS], "red_flags": [{**EVIDENCE, "weight": -12.0}]}}
    rubric, losses = from_autorubric(data)
    assert [d.name for d in rubric.dimensions] == ["technical", "red_flags"]
    assert {"keys", "negative"} <= set(whats(losses))
    flat = [{**THESIS, "section": "technical"}, {**EVIDENCE, "section": "technical"}]
    assert [len(d.questions) for d in from_autorubric(flat)[0].dimensions] == [2]


LIKERT = [{"label": str(i), "value": v} for i, v in enumerate([0.0, 0.33, 0.67, 1.0], 1)]


def test_multi_choice(autorubric):
    yes = [{"label": "Yes", "value": 1.0}, {"label": "No", "value": 0.0}]
    data = [
        {"name": "likert", "weight": 1, "requirement": "How satisfied?", "options": LIKERT, "aggregation": "median"},
        {"name": "nominal", "weight": 1, "requirement": "Which tone?", "options": LIKERT, "scale_type": "nominal"},
        {
            "name": "yes",
            "weight": 1,
            "requirement": "Is it so?",
            "options": [*yes, {"label": "N/A", "value": 0, "na": True}],
        },
        {"name": "bad", "weight": -1, "requirement": "How rude?", "options": LIKERT},
        {"name": "error", "weight": -1, "requirement": "Is it wrong?", "options": yes},
        {
            "name": "turned",
            "weight": -1,
            "requirement": "Is it right?",
            "options": [{**yes[0], "value": 0}, {**yes[1], "value": 1}],
        },
    ]
    assert len(autorubric.Rubric.from_dict(data).rubric) == 6
    rubric, losses = from_autorubric(data)
    assert [q.kind for q in rubric.questions] == ["graded", "graded", "gate", "graded", "gate", "gate"]
    by = {i: [x.what for x in losses if x.where == i] for i in (c["name"] for c in data)}
    assert by == {
        "likert": ["options", "aggregation"],
        "nominal": ["options", "options"],
        "yes": [],
        "bad": ["options", "negative"],
        "error": ["negative"],
        "turned": [],
    }
    bad = next(x for x in losses if x.where == "bad" and x.what == "negative")
    assert "the option '1'" in bad.note and "weights" not in whats(losses)


def test_verifiers_files(tmp_path):
    from verifiers.v1.judges.rubric import load_criteria

    toml = tmp_path / "rubric.toml"
    toml.write_text(
        '[[criteria]]\nname = "always_yes"\ntext = "Always satisfied."\n'
        '[[criteria]]\nname = "three"\ntext = "How well?"\nchoices = ["bad", "fair", "good"]\nweight = 3.0\n'
        '[[criteria]]\nname = "leak"\ntext = "Does it leak?"\nchoices = ["yes", "no"]\n'
    )
    plain = tmp_path / "rubric.json"
    plain.write_text(
        json.dumps(
            [
                {"name": "a", "text": "Is it so?"},
                {"name": "b", "text": "How well?", "choices": ["F", "D", "C", "B", "A"]},
            ]
        )
    )
    for path in (toml, plain):
        theirs = load_criteria(path)
        rubric, losses = import_rubric(path)
        assert [(q.id, q.text) for q in rubric.questions] == [(c.name, c.text) for c in theirs]
        assert import_rubric(path, "verifiers") == (rubric, losses)
    assert whats(import_rubric(plain)[1]) == ["gates only"]
    rubric, losses = import_rubric(toml)
    assert [q.kind for q in rubric.questions] == ["gate", "graded", "gate"]
    assert whats(losses) == ["gates only", "weights", "options", "negative"]


# foreign rubrics become valid ones

criterion = st.fixed_dictionaries(
    {"requirement": names},
    optional={
        "name": st.sampled_from(["a", "a-2", "b"]),
        "weight": st.sampled_from([-1, 0, 1.0, 5]),
        "options": st.just(LIKERT),
    },
)
section = st.fixed_dictionaries(
    {"criteria": st.lists(criterion, min_size=1, max_size=4)}, optional={"name": st.sampled_from(["s", "a"])}
)


@given(entries=st.lists(criterion | section, min_size=1, max_size=5), binary=st.sampled_from(["gate", "graded"]))
@CHECKED
def test_any_foreign_rubric_becomes_valid(entries, binary):
    rubric, losses = from_autorubric(entries, binary)
    assert validate(rubric) is rubric and from_autorubric(entries, binary) == (rubric, losses)
    flat = [c for e in entries for c in e.get("criteria", [e])]
    assert sorted(q.text for q in rubric.questions) == sorted(c["requirement"] for c in flat)
    negative = sum(c.get("weight", 10) < 0 for c in flat)
    assert whats(losses).count("negative") == negative
    for to, back in WAYS.values():  # once ours, it travels without loss
        assert back(to(rubric)[0]) == (rubric, [])


def test_save_and_load_what_was_imported(tmp_path):
    rubric, _ = from_autorubric(LIST)
    save_rubric(rubric, tmp_path / "mine.yaml")
    assert load_rubric(tmp_path / "mine.yaml") == rubric


def test_names_gates_order_and_text():
    data = {
        "sections": [
            {
                "criteria": [
                    {"name": "q", "requirement": "How\n  well?", "options": LIKERT},
                    {"name": "q", "requirement": "Is it so?"},
                ]
            }
        ]
        * 2
    }
    rubric, losses = from_autorubric(data)
    assert [q.id for q in rubric.questions] == ["q-2", "q", "q-4", "q-3"]
    assert [d.name for d in rubric.dimensions] == ["section 1", "section 2"]
    assert rubric.graded[0].text == "How well?" and {"order", "text", "ids"} <= set(whats(losses))


# our files, edited

SMALL = select(HHH, dimensions=1, per_dimension=2)


@pytest.mark.parametrize("form", WAYS)
def test_edited_files(form):
    to, back = WAYS[form]

    def edited(change):
        data, _ = to(SMALL)
        change(data, data["criteria"] if form == "verifiers" else data["sections"][0]["criteria"])
        return data

    text = "text" if form == "verifiers" else "requirement"
    rubric, losses = back(edited(lambda d, c: c[0].update({text: "Is it so?"})))
    assert whats(losses) == ["version"] and rubric.cap == SMALL.cap and rubric.questions[0].text == "Is it so?"
    assert whats(back(edited(lambda d, c: c[0].update(weight=5)))[1]) == ["weights"]
    rubric, losses = back(edited(lambda d, c: d.pop("qalign")))
    assert (len(rubric.questions) == len(SMALL.questions) and "minimum" in whats(losses)) or form == "verifiers"
    assert "must list the same ids, see 'new'" in fails(back, edited(lambda d, c: c.append({**c[0], "name": "new"})))
    assert "must list the same ids" in fails(back, edited(lambda d, c: c.pop()))
    for broken in (
        {},
        [],
        3,
        {"name": "x", "cap": "", "principles": []},
        {"name": "x", "cap": "", "principles": {"p": {"d": 1}}},
    ):
        assert "qalign" in fails(back, edited(lambda d, c, b=broken: d.update(qalign=b)))
    assert "unknown key 'more'" in fails(back, edited(lambda d, c: d["qalign"].update(more=1)))
    assert "cap names no principle" in fails(back, edited(lambda d, c: d["qalign"].update(cap="x")))


# bad input

BAD_FILES = {
    "empty.yaml": ("", "is empty"),
    "blank.json": (" \n", "is empty"),
    "null.json": ("null", "is empty"),
    "nothing.yaml": ("# only a comment\n", "is empty"),
    "cut.json": ('[{"requirement": "Is', "line 1: not readable as JSON"),
    "cut.yaml": ("- requirement: 'Is", "not readable as YAML"),
    "cut.toml": ('[[criteria]]\nname = "a', "not readable as TOML"),
    "html.json": ("<html>", "not readable as JSON"),
    "control.yaml": ("- requirement: a\x07b", "not readable as YAML"),
    "python.yaml": ("- !!python/object/apply:os.system [echo]", "line 1: YAML tag"),
    "tag.yaml": ("- !secret x", "YAML tag"),
    "bomb.yaml": ("- &a [x, x]\n- [*a, *a]", "YAML anchor"),
    "deep.yaml": ("[" * 40 + "]" * 40, "nested more than"),
    "deep.json": ("[" * 200_000, "nested too deep"),
    "twice.json": ('[{"requirement": "a", "requirement": "b"}]', "stands twice"),
    "twice.yaml": ("- {requirement: a, requirement: b}", "stands twice"),
    "nan.json": ('[{"requirement": "a", "weight": NaN}]', "weight: expected a number"),
    "inf.yaml": ("- {requirement: a, weight: .inf}", "weight: expected a number"),
    "huge.json": ('[{"requirement": "a", "weight": ' + "9" * 400 + "}]", "weight: expected a number"),
    "digits.json": ('[{"requirement": "a", "weight": ' + "9" * 9000 + "}]", "not readable as JSON"),
    "bool.json": ('[{"requirement": "a", "weight": true}]', "weight: expected a number"),
    "date.yaml": ("- {requirement: 2024-13-45}", "not readable as YAML"),
    "number.yaml": ("- {requirement: 7}", "expected text, got 7"),
    "blanktext.json": ('[{"requirement": " "}]', "requirement: expected text"),
    "name.json": ('[{"requirement": "a", "name": 7}]', "name: expected text"),
    "key.json": ('[{"requirement": "a", "wieght": 1}]', "criterion 1: unknown key 'wieght'"),
    "sectionkey.json": (
        '[{"name": "s", "criteria": [{"requirement": "a", "x": 1}]}]',
        "section 's', criterion 1: unknown key 'x'",
    ),
    "nocriteria.json": ('{"sections": []}', "no criterion with a requirement"),
    "string.json": ('"hello"', "no criterion with a requirement"),
    "other.json": ('{"a": 1}', "no criterion with a requirement"),
    "options.json": ('[{"requirement": "a", "options": [{"label": "x", "value": 1}]}]', "at least two options"),
    "value.json": ('[{"requirement": "a", "options": [{"label": "x", "value": 2}]}]', "expected a number from 0 to 1"),
    "label.json": ('[{"requirement": "a", "options": [{"value": 1}]}]', "label: expected text"),
    "guide.json": ('{"guidelines": 7, "criteria": [{"requirement": "a"}]}', "guidelines: expected text"),
    "guides.json": (
        '{"guidelines": "a", "rubric": {"guidelines": "b", "criteria": [{"requirement": "a"}]}}',
        "beside and inside rubric",
    ),
    "negative.json": ('[{"name": "a", "text": "b", "weight": -1}]', "expected a number of 0 or more"),
    "choices.json": ('[{"name": "a", "text": "b", "choices": ["x", "x"]}]', "two different choices"),
    "onechoice.json": ('[{"name": "a", "text": "b", "choices": ["x"]}]', "two different choices"),
    "noname.json": ('[{"text": "b"}]', "name: expected text"),
    "end.txt": ("hello", "unknown ending '.txt'"),
    "end": ("hello", "unknown ending ''"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, tmp_path):
    text, message = BAD_FILES[name]
    (tmp_path / name).write_text(text)
    got = fails(import_rubric, tmp_path / name)
    assert name in got and message in got and str(tmp_path) not in got


def test_bad_bytes_size_and_paths(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"- requirement: caf\xe9")
    assert "is not UTF-8 at byte 18" in fails(import_rubric, tmp_path / "latin.yaml")
    (tmp_path / "big.json").write_bytes(b" " * 10_000_000)
    assert "larger than 5 MB" in fails(import_rubric, tmp_path / "big.json")
    assert "no file gone.json" in fails(import_rubric, tmp_path / "gone.json")
    (tmp_path / "folder.json").mkdir()
    assert "no file folder.json" in fails(import_rubric, tmp_path / "folder.json")
    fails(import_rubric, "nul\0.json")
    fails(import_rubric, "line\nbreak.json")
    assert "expected a path" in fails(import_rubric, LIST)


def test_bad_arguments(tmp_path):
    assert "use autorubric or verifiers" in fails(export_rubric, SMALL, tmp_path / "a.json", "csv")
    assert "use autorubric or verifiers" in fails(import_rubric, tmp_path / "a.json", "csv")
    assert "binary" in fails(from_autorubric, LIST, "yes")
    assert "ending of .json" in fails(export_rubric, SMALL, tmp_path / "a.yaml", "verifiers")
    assert "ending of .json, .yaml, .yml" in fails(export_rubric, SMALL, tmp_path / "a.toml", "autorubric")
    (tmp_path / "file").write_text("")
    assert "cannot write" in fails(export_rubric, SMALL, tmp_path / "file" / "a.json", "verifiers")
    for source in (None, 3, [], {}, [3], [[]], {"criteria": 3}, {"rubric": None}):
        fails(from_autorubric, source)
        fails(from_verifiers, source)


def test_our_own_rubric_is_named(tmp_path):
    save_rubric(SMALL, tmp_path / "mine.yaml")
    assert "read it with load_rubric" in fails(import_rubric, tmp_path / "mine.yaml")


def test_the_wrong_format_is_named(tmp_path):
    export_rubric(SMALL, tmp_path / "v.json", "verifiers")
    assert "unknown key 'text'" in fails(import_rubric, tmp_path / "v.json", "autorubric")


def test_import_is_light():
    heavy = "('torch', 'pandas', 'autorubric', 'verifiers', 'litellm')"
    code = f"import sys, qalign.convert; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
