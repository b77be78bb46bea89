"Room lint: each rule catches and lets pass, positions lie in the text, order does not matter, nothing raises."

import io
import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from qalign.core import UserError
from qalign.lint import RULES, Finding, lint, open_findings, show_lint
from qalign.rubric import Dimension, Principle, Question, Rubric, Waiver, load_rubric, select, validate

CHECKED = settings(derandomize=True, max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
COUNTING = {"missing-gate", "too-few-graded", "too-long", "two-questions", "not-a-question", "unused-waiver"}
HHH = load_rubric()


def kind(text: str) -> str:
    return "graded" if any(w in f" {text.lower()}" for w in (" how ", "to what degree", "to what extent")) else "gate"


def of(*questions: Question, name: str = "Zeal", waivers: tuple[Waiver, ...] = ()) -> Rubric:
    ordered = tuple(sorted(questions, key=lambda q: q.kind == "graded"))
    return Rubric("x", (Principle("p", (Dimension(name, ordered),)),), cap="", waivers=waivers)


def found(*texts: str, name: str = "Zeal", **options) -> list[Finding]:
    "What lint says about these questions of one dimension, apart from the size of the dimension."
    rubric = of(*(Question(f"d.{i}", kind(t), t) for i, t in enumerate(texts)), name=name)
    return [f for f in lint(rubric, **options) if f.rule not in ("missing-gate", "too-few-graded")]


def rules(*texts: str, name: str = "Zeal", **options) -> set[str]:
    return {f.rule for f in found(*texts, name=name, **options)}


# Below the name of a rule, a line with - is caught at what stands in brackets, and the line with + after it passes.

TABLE = """
double-barrelled
- How [warm and natural] is the tone?
+ How natural is the tone?
- How [clear or concise] is the response?
+ How clearly is the order of the steps put?
- Is the response [accurate and polite]?
+ Is the response free of slurs and degrading terms?
- Is the response both [helpful and safe]?
+ Does the response serve parents and teachers alike?
- How well does the response support acting [lawfully and fairly]?
+ How well does the response support acting within the law?
- Does the response explain the [risk and give] a safer option?
+ Does the response explain the risk to health and property?
- Does the response answer the [question and does] it cite a source?
+ Does the response cite a source for facts and figures?
- How well does the response check its [result or tell] how to check it?
+ How well does the response check its own result?
- Does the response respect the [user and support] the family?
+ Does the response show the user comfort and support?
- Does the response name [causes as well as remedies]?
+ Does the response explain it as well as a teacher would?
- Is it made of [understandable, meaningful] sentences?
+ Is it free of violent, hateful material?
- How good are [tone and structure]?
+ How well does the tone fit the subject and the reader?
- Does the response say what [failed and why]?
+ Does the response say why and not merely what?
- Does the response admit [doubt but stay] polite?
+ Does the response protect minors who might read it or be affected by it?
- How [honestly and completely] does the response report?
+ How completely does the response leave out amounts, tools or steps?
- Does the response avoid [jargon and explain] terms?
+ Does the response avoid insults, threats or mockery?
- How well does the response encourage readers to [think and check] for themselves?
+ If the user asks for advice and says why, how well does the response use the reason?

negative-polarity
- Does the response contain [insults]?
+ Is the response free of insults?
- How [harmful] is the advice?
+ How well does the response keep out harmful advice?
- Does the response [fail] to answer?
+ Does the response refrain from failing anyone?
- Is the response [biased]?
+ Is the response without bias?
- Does the response [ignore] the request?
+ Does the response answer the request?
- How [misleading] is the summary?
+ How well does the response avoid misleading the reader?
- Does the response make [false] claims?
+ How well does the response correct a false premise in the prompt?
- Are there [errors] in the response?
+ Are there no errors in the response?
- Does the response use [stereotypes] about groups?
+ How free is the response of stereotypes about groups?
- Does the response contain anything that could cause [harm]?
+ How firmly does the response hold back what could cause harm?
- How often does the response [contradict] itself?
+ Is the response free of statements that contradict each other?
- How many [mistakes] are in the figures?
+ How few mistakes are in the figures?
- To what degree does the response [exaggerate]?
+ If the response exaggerates, does it say so?
- Does the answer [lack] a source?
+ Does the answer name a source?
- How [vague] is the plan?
+ How well does the response spot the danger in the plan?
- Does the response [belittle] the reader?
+ Does the response refrain from belittling the reader?

vague
- How [good] is the response?
+ How well does the response fit the question?
- Is the tone [appropriate]?
+ Is the tone appropriate for a child?
- Does the response have [proper] structure?
+ Does the response spell proper names as the prompt does?
- What is the [quality] of the response, or how high?
+ How well does the response judge the quality of the evidence?
- Does the response name costs, risks, [etc].?
+ Does the response name costs?
- How [suitable] is the response?
+ How suitable is the response for a general audience?
- How [adequate] are the steps?
+ How adequate to the danger is the caution?
- Does the response choose a [sensible] reading?
+ Does the response choose the likeliest reading?
- How [nicely] does the response close?
+ How briefly does the response close?
- How [effective] is the response?
+ How likely is the plan to stop the leak?
- Does the claim have [good] backing?
+ Does the response assume good faith?
- Does the response list tools [and so on]?
+ Does the response go on to list the tools?

unanswerable
- [Did the user] like the response?
+ Does the response answer what the user asked?
- [Will the user] come back?
+ Would a reader understand the response at once?
- How well does the response leave the [user satisfied]?
+ How well are the conditions of the task satisfied?
- Does the model [intend] to help?
+ Does the response suit its intended audience?
- Is the [intention] of the author honest?
+ Does the response serve the stated intention?
- Does the response [truly believe] what it says?
+ Does the response mark what it says as belief?
- Does it follow from [its training]?
+ Does it follow from what was said before?
- Is it shorter than [earlier responses]?
+ Is it free of what an earlier sentence said?
- Is the response [up to date]?
+ Does the response warn that facts may not be up to date?
- Is the apology [sincere]?
+ Does the apology name the fault?
- Does the [assistant care] about the user?
+ Does the response speak kindly to the user?
- Does it agree with [other conversations]?
+ Does it agree with other parts of the text?

rewards-length
- How [detailed] is the response?
+ How well does the level of detail match the need?
- Is the response [long]?
+ Does the response name long-term effects?
- How [thoroughly] are causes covered?
+ How fully are the safe parts answered?
- [How many] examples does it give?
+ How apt are its examples?
- Does the response say [as much as possible]?
+ Does the response say as much as was asked?
- How [comprehensive] is the list?
+ How well is the list ordered?
- Does the response give [at least three reasons]?
+ Does the response give at least one reason?
- Does the response explain it [in detail]?
+ Is the response free of needless detail?
- Does the response cover [every possible] case?
+ Does the response cover the case in the prompt?
- How [extensive] is the response?
+ Is the response no longer than it has to be?

not-a-question
- [Rate the response.]
+ Does the response rate the film?
- [Does the response rate it]
+ Does the response rate it?
- [Which] part of the response helps?
+ Does part of the response help?
- [The] response helps?
+ Is the response of help?
- [If] asked, the response helps?
+ If the user asks, does the response help?
- [Please] say how the response helps?
+ How does the response help?
- [Does] the response say how it helps?
+ Would the response help?
- [Why] is that?
+ Where the user is in doubt, is the response calm?

two-questions
- Is it kind[? Is it true?]
+ Is it kind?
- How apt is it[? And why?]
+ How apt is it?
- Is it kind[??]
+ Is it kind to all?
- Is it calm[? Is it brief?]
+ Is it calm and brief?
- How plain is it[? Does it help?]
+ How plain is it to a reader who asks for help?
- Does it help[?? Really??]
+ Does it help, really?
- Does it answer 'why[?' in full?]
+ Does it answer the why?
- If asked, does it reply[? How?]
+ If asked, does it reply?
"""


def pairs() -> list[tuple[str, str, str]]:
    out, rule = [], ""
    for line in TABLE.split("\n"):
        if line.startswith("- "):
            caught = line[2:]
        elif line.startswith("+ "):
            out.append((rule, caught, line[2:]))
        elif line:
            rule = line
    return out


@pytest.mark.parametrize(("rule", "caught", "passes"), pairs())
def test_rule_catches_one_and_lets_the_other_pass(rule, caught, passes):
    start, end = caught.index("["), caught.index("]") - 1
    text = caught.replace("[", "").replace("]", "")
    hits = [f for f in found(text) if f.rule == rule]
    assert (start, end) in {(f.start, f.end) for f in hits}, hits
    assert rule not in rules(passes), [f for f in found(passes) if f.rule == rule]


def test_the_table_is_dense():
    count = {rule: sum(r == rule for r, *_ in pairs()) for rule, *_ in pairs()}
    assert min(count.values()) >= 8 and len(count) == 7


LEAKS = [
    ("Consistency", "How consistent are the figures?", "How well do the figures agree?"),
    ("Clarity", "How clear is the text?", "How easily is the text understood?"),
    ("Depth", "How deep is the analysis?", "How well are causes explained?"),
    ("Relevance", "How relevant is the answer?", "How well does the answer fit the prompt?"),
    ("Truthfulness", "How truthful is the report?", "How well is the report backed by facts?"),
    ("Source Reliability", "How reliable are its sources?", "How trustworthy are its sources?"),
    ("Source Reliability", "Is every source reliable?", "Is every method reliable?"),
    ("Avoidance of Misinformation", "Is it free of misinformation?", "Is it free of hoaxes?"),
    ("Promotion of Inclusivity", "How inclusive is the tone?", "How welcome does the tone make everyone?"),
    ("Harmful Request Handling", "How well does it handle a harmful request?", "How firmly does it decline?"),
    ("Problem-Solving Process", "How well does it solve the problem?", "If there's a problem to solve, is it tried?"),
    ("Knowledge Boundaries", "Does it know its knowledge boundary?", "Does it admit what it does not know?"),
    ("Child Safety", "Does it put child safety first?", "Does it put the child first?"),
    ("Response", "Is this response new?", "Is this text new?"),
]


@pytest.mark.parametrize(("name", "caught", "passes"), LEAKS)
def test_a_dimension_is_not_named(name, caught, passes):
    assert "leaks-dimension" in rules(caught, name=name) and "leaks-dimension" not in rules(passes, name=name)


SAME = [
    ("Is it free of slurs?", "How free is it of slurs?", "How free is it of jargon?"),
    ("How well does it cite sources?", "How well does the response cite its source?", "How well does it date sources?"),
    ("How exact are the figures?", "Are the figures exact?", "How current are the figures?"),
    ("Does it name the risk?", "Does the response name risks?", "Does the response name costs?"),
    ("How well does it tell law to a tenant?", "Does it tell laws to tenants?", "Does it tell law to a judge?"),
    ("How well?", "How well?", "How?"),
    ("Does it refrain from mocking us?", "Does it mock us?", "Does it refrain from mocking them?"),
    ("To what degree is the plan realistic?", "How realistic is the plan?", "How cheap is the plan?"),
    ("Does it say where facts are found?", "Does it say where facts be found?", "Does it say when facts were had?"),
]


@pytest.mark.parametrize(("one", "same", "different"), SAME)
def test_two_questions_that_are_one(one, same, different):
    hits = [f for f in found(one, same) if f.rule == "duplicate"]
    assert [(f.id, f.start, f.end) for f in hits] == [("d.1", 0, len(same))] and "d.0" in hits[0].reason
    assert "duplicate" not in rules(one, different)
    assert "duplicate" in rules(one, one, max_similarity=1)


@pytest.mark.parametrize("n", range(1, 41, 5))
def test_words_are_counted(n):
    text = "Does " + "so " * (n - 2) + "much?" if n > 1 else "Is?"
    (hit,) = [f for f in found(text, max_words=n - 1) if f.rule == "too-long"] if n > 1 else [None]
    assert hit is None or text[hit.start : hit.end] == "much?"
    assert "too-long" not in rules(text, max_words=n)


@pytest.mark.parametrize(("gates", "graded"), [(g, k) for g in range(3) for k in range(4) if g + k])
def test_size_of_a_dimension(gates, graded):
    gate = [Question(f"g{i}", "gate", f"Does it hold {w}?") for i, w in enumerate(("water", "fire")[:gates])]
    verbs = ("float", "burn", "sing")[:graded]
    rest = [Question(f"q{i}", "graded", f"How well does it {w}?") for i, w in enumerate(verbs)]
    want = ["missing-gate"] * (not gates) + ["too-few-graded"] * (graded < 2)
    hits = lint(of(*gate, *rest, name="Boat"))
    assert [f.rule for f in hits] == want and all((f.id, f.start, f.end) == ("Boat", 0, 0) for f in hits)


# Waivers


def test_a_waiver_covers_its_finding_and_nothing_else():
    q = Question("a.q1", "graded", "How good and nice is the tone?")
    two = of(q, waivers=(Waiver("a.q1", "vague", "why not"), Waiver("Zeal", "missing-gate", "none needed")))
    hits = lint(two)
    assert {(f.id, f.rule) for f in hits if f.waived == "why not"} == {("a.q1", "vague")}
    assert sum(f.rule == "vague" for f in hits) == 2
    assert {f.rule for f in open_findings(hits)} == {"double-barrelled", "too-few-graded"}
    assert {replace(f, waived="") for f in hits} == set(lint(replace(two, waivers=())))


@pytest.mark.parametrize(
    ("waiver", "says"),
    [
        (Waiver("a.q1", "vague", "x"), "no vague finding to waive"),
        (Waiver("a.q1", "wordy", "x"), "no rule 'wordy', only double-barrelled"),
        (Waiver("Zeal", "vague", "x"), "no vague finding"),
        (Waiver("a.q1", "unused-waiver", "x"), "no unused-waiver finding"),
        (Waiver("Zeal", "duplicate", "x"), "take the waiver out"),
        (Waiver("a.q1", "missing-gate", "x"), "no missing-gate finding"),
        (Waiver("a.q1", "VAGUE", "x"), "no rule 'VAGUE'"),
        (Waiver("a.q1", "too-long", "x"), "no too-long finding"),
    ],
)
def test_a_waiver_without_a_finding_is_one(waiver, says):
    rubric = of(Question("a.q1", "graded", "How apt is it?"), waivers=(waiver,))
    hits = [f for f in lint(rubric) if f.rule == "unused-waiver"]
    assert [f.id for f in hits] == [waiver.id] and says in hits[0].reason and open_findings(hits) == hits


# Properties

WORDS = "How Does Is If the response it and or as well as good free of refrain from harmful slurs explain clear how , ?"
PIECES = [*WORDS.split(), "Did the user", "in detail", "ß", "İ", "ﬁ", "漢字", "😀", "n't", "clearly", "why", "[bold]"]
LETTERS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=6)
ANY = st.lists(st.sampled_from(PIECES) | LETTERS, min_size=1, max_size=16)
TEXT = ANY.map(" ".join).map(str.strip).filter(bool)


@st.composite
def rubrics(draw) -> Rubric:
    sizes = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)).filter(any), min_size=1, max_size=4))
    names = draw(st.lists(TEXT, min_size=len(sizes), max_size=len(sizes), unique=True))
    ids = draw(st.permutations([f"q.{i}" for i in range(20)]))
    dimensions = []
    for name, (g, k) in zip(names, sizes, strict=True):
        kinds = ["gate"] * g + ["graded"] * k
        dimensions.append(Dimension(name, tuple(Question(ids.pop(), kind, draw(TEXT)) for kind in kinds)))
    known = st.sampled_from([*names, *(q.id for d in dimensions for q in d.questions)])
    some = draw(st.lists(st.tuples(known, st.sampled_from([*RULES, "other"])), max_size=3, unique=True))
    waivers = tuple(Waiver(i, r, "why") for i, r in some)
    return validate(Rubric("x", (Principle("p", tuple(dimensions)),), "", waivers=waivers))


@CHECKED
@given(rubrics(), st.integers(1, 40), st.floats(0.01, 1))
def test_positions_lie_in_the_text_and_it_is_deterministic(rubric, max_words, max_similarity):
    hits = lint(rubric, max_words, max_similarity)
    texts = {q.id: q.text for q in rubric.questions}
    for f in hits:
        assert f.rule in RULES and f.reason and "\n" not in f.reason
        if f.rule in ("missing-gate", "too-few-graded", "unused-waiver"):
            assert f.start == f.end == 0
        else:
            assert 0 <= f.start < f.end <= len(texts[f.id])
    assert len(set(hits)) == len(hits) and hits == lint(rubric, max_words, max_similarity)
    show_lint(hits, rubric, Console(file=io.StringIO(), width=30))


@CHECKED
@given(rubrics(), st.randoms(use_true_random=False))
def test_order_does_not_matter(rubric, rng):
    dimensions = list(rubric.dimensions)
    rng.shuffle(dimensions)

    def shuffled(questions: tuple[Question, ...]) -> tuple[Question, ...]:
        return tuple(sorted(rng.sample(questions, len(questions)), key=lambda q: q.kind == "graded"))

    mixed = [replace(d, questions=shuffled(d.questions)) for d in dimensions]
    other = replace(rubric, principles=(Principle("p", tuple(mixed)),), waivers=rubric.waivers[::-1])
    assert set(lint(other)) == set(lint(rubric))


def test_arguments_are_checked():
    bad_words, bad_shares = (0, -1, 2.5, True, "a", None), (0, -0.5, 1.1, float("nan"), "a", None)
    for bad in (*({"max_words": n} for n in bad_words), *({"max_similarity": x} for x in bad_shares)):
        with pytest.raises(UserError) as e:
            lint(HHH, **bad)
        assert next(iter(bad)) in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(UserError):
        lint(Rubric("x", (), cap=""))


# The shipped rubric


def test_hhh_passes_every_rule_that_counts():
    hits = lint(HHH)
    assert not {f.rule for f in open_findings(hits)} & COUNTING
    assert not {f.rule for f in hits} & {"negative-polarity", "duplicate", "leaks-dimension"}


def test_a_selection_keeps_its_findings():
    part = select(HHH, dimensions=3, per_dimension=4)
    ids = {q.id for q in part.questions}
    hits = {f for f in lint(part) if f.id in ids and f.rule != "unused-waiver"}
    assert hits <= set(lint(HHH))


def test_show_prints_carets_below_the_words():
    q = Question("a.q1", "graded", "[b]How warm and natural is the tone of the whole of this response to the asker?")
    rubric = of(q, waivers=(Waiver("Zeal", "missing-gate", "none needed"),))
    for width in (40, 200):
        out = io.StringIO()
        show_lint(lint(rubric), rubric, Console(file=out, width=width))
        lines = out.getvalue().splitlines()
        i = next(i for i, line in enumerate(lines) if "double-barrelled" in line)
        marks = lines[i + 2]
        assert lines[i + 1][marks.index("^") : marks.rindex("^") + 1] == "warm and natural"
        assert "  waived: none needed" in lines and lines[-1].endswith("1 waived")


def test_wide_characters_keep_the_carets_in_place():
    q = Question("a.g1", "gate", "漢字 Is it good?")
    out = io.StringIO()
    show_lint([Finding("a.g1", "vague", 9, 13, "x")], of(q), Console(file=out, width=60))
    assert out.getvalue().splitlines()[2] == "  " + " " * 11 + "^^^^"


def test_a_thousand_questions_are_linted_in_seconds():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(400)]
    many = (Question(f"q{i}", "graded", f"How {' '.join(rng.sample(words, 8))}?") for i in range(1000))
    assert not [f for f in lint(of(*many)) if f.rule == "duplicate"]
