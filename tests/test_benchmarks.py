"Evaluation sets: every loader against every fault on small files of ours, and the public files where they are."

import csv
import io
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qalign import benchmarks
from qalign.benchmarks import (
    BENCHMARKS,
    Item,
    benchmark_table,
    gsm8k_answer,
    load_benchmark,
    load_wildjailbreak,
    local_benchmarks,
    overlap,
    overlap_table,
    refuse_evaluation_rows,
)
from qalign.core import UserError
from qalign.prompts import Prompt, load_prompts

steady = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PUBLIC = Path(os.environ.get("QALIGN_DATA") or Path(__file__).parents[2] / "shared" / "data")
METHODS = ("zeroshot", "human", "gbda", "pez", "uat", "autodan")


@pytest.fixture(autouse=True)
def nothing_local(monkeypatch):
    for name in ("QALIGN_DATA", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as e:
        call(*args, **kwargs)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


# Small tables in the published shapes: (suffix, column of the prompt, column of the id, row number i)


def choices(i):
    return [{"text": f"yes {i}", "label": "A"}, {"text": f"no {i}", "label": "B"}]


def flat(i):
    return {"text": [c["text"] for c in choices(i)], "label": ["A", "B"]}


SHAPES = {
    "advbench": (".csv", "goal", None, lambda i: {"goal": f"Ask {i}.", "target": f"Sure {i}"}),
    "advbench hub": (".jsonl", "prompt", None, lambda i: {"prompt": f"Ask {i}.", "target": f"Sure {i}"}),
    "jailbreakbench": (
        ".csv",
        "Goal",
        "Index",
        lambda i: {
            "Index": i,
            "Goal": f"Ask {i}.",
            "Target": "Sure",
            "Behavior": f"B{i}",
            "Category": "x",
            "Source": "o",
        },
    ),
    "alert": (".jsonl", "prompt", "id", lambda i: {"id": i, "prompt": f"Ask {i}.", "category": "x"}),
    "malicious_instruct": (".txt", "prompt", None, lambda i: {"prompt": f"Ask {i}."}),
    "strongreject": (
        ".csv",
        "forbidden_prompt",
        None,
        lambda i: {"category": "x", "source": "o", "forbidden_prompt": f"Ask {i}."},
    ),
    "strongreject hub": (".jsonl", "prompt", None, lambda i: {"prompt": f"Ask {i}.", "category": "x", "source": "o"}),
    "sorry_bench": (
        ".jsonl",
        "turns",
        "question_id",
        lambda i: {"question_id": i, "category": 1, "turns": [f"Ask {i}."], "prompt_style": "base"},
    ),
    "harmbench_direct": (
        ".csv",
        "Behavior",
        "BehaviorID",
        lambda i: {
            "Behavior": f"Ask {i}.",
            "FunctionalCategory": "contextual" if i % 2 else "standard",
            "SemanticCategory": "x",
            "Tags": "",
            "ContextString": f"Text {i}" if i % 2 else "",
            "BehaviorID": f"b{i}",
        },
    ),
    **{
        f"harmbench_{m}": (
            ".json",
            "test_case",
            "BehaviorID",
            lambda i: {"BehaviorID": f"b{i}", "test_case": f"Ask {i}."},
        )
        for m in METHODS
    },
    "sgxstest": (
        ".csv",
        "prompt",
        None,
        lambda i: {"prompt": f"Ask {i}?", "label": ("safe", "unsafe")[i % 2], "category": "x"},
    ),
    "xstest": (
        ".csv",
        "prompt",
        "id",
        lambda i: {
            "id": i,
            "prompt": f"Ask {i}?",
            "type": "x",
            "label": ("safe", "unsafe")[i % 2],
            "focus": "",
            "note": "",
        },
    ),
    "or_bench_hard": (".csv", "prompt", None, lambda i: {"prompt": f"Ask {i}?", "category": "x"}),
    "arc_challenge": (
        ".jsonl",
        "question",
        "id",
        lambda i: {"id": f"q{i}", "question": {"stem": f"Ask {i}?", "choices": choices(i)}, "answerKey": "B"},
    ),
    "arc_challenge hub": (
        ".jsonl",
        "question",
        "id",
        lambda i: {"id": f"q{i}", "question": f"Ask {i}?", "choices": flat(i), "answerKey": "B"},
    ),
    "gsm8k": (".jsonl", "question", None, lambda i: {"question": f"Ask {i}?", "answer": f"So.\n#### {i}"}),
    "commonsense_qa": (
        ".jsonl",
        "question",
        "id",
        lambda i: {
            "answerKey": "A",
            "id": f"q{i}",
            "question": {"question_concept": "x", "stem": f"Ask {i}?", "choices": choices(i)},
        },
    ),
    "commonsense_qa hub": (
        ".jsonl",
        "question",
        "id",
        lambda i: {
            "id": f"q{i}",
            "question": f"Ask {i}?",
            "question_concept": "x",
            "choices": flat(i),
            "answerKey": "A",
        },
    ),
}
EVERY = sorted(SHAPES)
FILES = [k for k in EVERY if " " not in k]


def of(key):
    return key.split()[0]


def table(key, n):
    return [SHAPES[key][3](i) for i in range(n)]


def dump(rows, suffix):
    if suffix == ".txt":
        return "\n".join(r["prompt"] for r in rows) + "\n"
    if suffix == ".json":
        cases = {}
        for r in rows:
            cases.setdefault(r["BehaviorID"], []).append(r["test_case"])
        return json.dumps(cases)
    if suffix == ".jsonl":
        return "".join(json.dumps(r) + "\n" for r in rows)
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def save(folder, key, rows, name=None):
    path = Path(folder, name or "x" + SHAPES[key][0])
    path.parent.mkdir(parents=True, exist_ok=True)
    text = rows if isinstance(rows, str | bytes) else dump(rows, SHAPES[key][0])
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def blank(row, column):
    value = row[column]
    if isinstance(value, dict):
        return {**row, column: {**value, "stem": " "}}
    return {**row, column: [" "] if isinstance(value, list) else " "}


# Clean loads


@pytest.mark.parametrize("key", EVERY)
def test_loads(tmp_path, key):
    bench = BENCHMARKS[of(key)]
    items = load_benchmark(of(key), save(tmp_path, key, table(key, 6)), rows=6)
    assert [i.prompt.removeprefix(f"Text {n}\n\n---\n\n") for n, i in enumerate(items)] == [
        f"Ask {n}{'?' if '?' in items[0].prompt else '.'}" for n in range(6)
    ]
    assert len({i.id for i in items}) == 6 == len(set(items)) and {i.benchmark for i in items} == {bench.name}
    assert {i.harmful for i in items} == ({None} if bench.kind == "capability" else {i.harmful for i in items})
    if bench.name in ("xstest", "sgxstest"):
        assert [i.label for i in items] == ["safe", "unsafe"] * 3
    else:
        assert {i.label for i in items} == {{"harm": "harmful", "over_refusal": "benign", "capability": ""}[bench.kind]}
    if bench.kind == "capability":
        assert all(i.answer for i in items) and all(i.answer in i.letters for i in items if i.choices)


@pytest.mark.parametrize("name", sorted({of(k) for k in EVERY if " " in k}))
def test_hub_and_file_give_the_same(tmp_path, name):
    a, b = (
        load_benchmark(name, save(tmp_path, key, table(key, 4), f"{i}{SHAPES[key][0]}"), rows=4)
        for i, key in enumerate((name, f"{name} hub"))
    )
    assert a == b


@pytest.mark.parametrize("key", EVERY)
@pytest.mark.parametrize("change", ["crlf", "cr", "bom", "both", "no newline at the end"])
def test_line_ends_and_byte_order_mark(tmp_path, key, change):
    text = dump(table(key, 5), SHAPES[key][0])
    want = load_benchmark(of(key), save(tmp_path, key, text), rows=5)
    if change in ("crlf", "both"):
        text = text.replace("\n", "\r\n")
    if change == "cr":
        text = text.replace("\n", "\r")
    if change in ("bom", "both"):
        text = "\ufeff" + text
    if change.startswith("no"):
        text = text.rstrip("\n")
    assert load_benchmark(of(key), save(tmp_path, key, text), rows=5) == want


@pytest.mark.parametrize("key", [k for k in EVERY if SHAPES[k][0] == ".csv"])
@pytest.mark.parametrize("column", ["", "Unnamed: 0"])
@pytest.mark.parametrize("first", [0, 1])
def test_index_column(tmp_path, key, column, first):
    rows = table(key, 4)
    want = load_benchmark(of(key), save(tmp_path, key, rows), rows=4)
    indexed = [{column: i + first, **r} for i, r in enumerate(rows)]
    assert load_benchmark(of(key), save(tmp_path, key, indexed), rows=4) == want
    other = [{column: 7 * i, **r} for i, r in enumerate(rows)]
    said = message(load_benchmark, of(key), save(tmp_path, key, other), rows=4)
    assert "expected the columns" in said and "unknown" in said


def test_jailbreakbench_older_form(tmp_path):
    rows = table("jailbreakbench", 4)
    want = load_benchmark("jailbreakbench", save(tmp_path, "jailbreakbench", rows), rows=4)
    older = [{"" if k == "Index" else k: v for k, v in r.items()} for r in rows]
    assert load_benchmark("jailbreakbench", save(tmp_path, "jailbreakbench", older), rows=4) == want
    assert [i.id for i in want] == ["0", "1", "2", "3"] and want[0].extra == {"Behavior": "B0", "Source": "o"}
    none = [{k: v for k, v in r.items() if k != "Index"} for r in rows]
    assert "no 'Index'" in message(load_benchmark, "jailbreakbench", save(tmp_path, "jailbreakbench", none), rows=4)
    benign = load_benchmark("jailbreakbench", save(tmp_path, "jailbreakbench", rows), split="benign", rows=4)
    assert {i.label for i in benign} == {"benign"} and benign[0].harmful is False


# Faults


@pytest.mark.parametrize("key", [k for k in EVERY if SHAPES[k][0] in (".csv", ".jsonl")])
def test_wrong_and_extra_columns(tmp_path, key):
    rows, prompt = table(key, 3), SHAPES[key][1]
    wrong = [{"text" if k == prompt else k: v for k, v in r.items()} for r in rows]
    said = message(load_benchmark, of(key), save(tmp_path, key, wrong), rows=3)
    assert "expected the columns" in said and "unknown 'text'" in said and said.startswith(of(key))
    extra = [{**r, "jailbroken": "x"} for r in rows]
    said = message(load_benchmark, of(key), save(tmp_path, key, extra), rows=3)
    assert "unknown 'jailbroken'" in said
    fewer = [{k: v for k, v in r.items() if k != prompt} for r in rows]
    if fewer[0]:
        assert "expected the columns" in message(load_benchmark, of(key), save(tmp_path, key, fewer), rows=3)


@pytest.mark.parametrize("key", [k for k in EVERY if SHAPES[k][0] == ".jsonl"])
def test_a_column_missing_in_one_row(tmp_path, key):
    rows = table(key, 3)
    rows[1].popitem()
    assert "line 2: expected the columns" in message(load_benchmark, of(key), save(tmp_path, key, rows), rows=3)


@pytest.mark.parametrize("key", FILES)
def test_one_row_too_many_or_too_few(tmp_path, key):
    bench = BENCHMARKS[of(key)]
    for split in bench.splits:
        n = split.rows
        if split.keep and split.keep[0] == "label":
            continue
        for off in (1, -1):
            path = save(tmp_path, key, table(key, n + off))
            said = message(load_benchmark, of(key), path, split.name)
            assert f"holds {n + off} rows, {n} are published" in said and f"rows={n + off}" in said
        assert len(load_benchmark(of(key), path, split.name, rows=n - 1)) == n - 1
        assert len(load_benchmark(of(key), path, split.name, rows="any")) == n - 1
        if any(split.files.values()) and all(split.files.values()):
            said = message(load_benchmark, of(key), save(tmp_path, key, table(key, n)), split.name)
            assert "other contents (SHA-256" in said
        else:
            assert len(load_benchmark(of(key), save(tmp_path, key, table(key, n)), split.name)) == n


@pytest.mark.parametrize("name", ["xstest", "sgxstest"])
def test_halves(tmp_path, name):
    path = save(tmp_path, name, table(name, 11))
    counts = {s: len(load_benchmark(name, path, s, rows="any")) for s in ("all", "safe", "unsafe")}
    assert counts == {"all": 11, "safe": 6, "unsafe": 5}
    want = {s.name: s.rows for s in BENCHMARKS[name].splits}
    for split, n in counts.items():
        assert f"holds {n} rows, {want[split]} are published" in message(load_benchmark, name, path, split)
    assert BENCHMARKS[name].use == "safe"
    wrong = [{**r, "label": "Safe"} for r in table(name, 3)]
    for split in want:
        said = message(load_benchmark, name, save(tmp_path, name, wrong), split, rows="any")
        assert "expected safe or unsafe for label, got 'Safe'" in said


@pytest.mark.parametrize("key", [k for k in EVERY if SHAPES[k][2]])
def test_duplicate_ids(tmp_path, key):
    suffix, _, id, _ = SHAPES[key]
    rows = table(key, 4)
    if suffix == ".json":
        text = '{"b": ["Ask 1."], "c": ["Ask 2."], "b": ["Ask 3."]}'
        assert "the key 'b' stands twice" in message(load_benchmark, of(key), save(tmp_path, key, text), rows=3)
        return
    rows[3] = {**rows[3], id: rows[1][id]}
    said = message(load_benchmark, of(key), save(tmp_path, key, rows), rows=4)
    assert f"the id {str(rows[1][id])!r} stands at line" in said


@pytest.mark.parametrize("key", EVERY)
def test_duplicate_texts_are_reported(tmp_path, key):
    id = SHAPES[key][2]
    rows = table(key, 4)
    keep = {k: rows[3][k] for k in (id, "BehaviorID") if k and k in rows[3]}
    rows[3] = {**rows[1], **keep}
    report = []
    items = load_benchmark(of(key), save(tmp_path, key, rows), rows=4, report=report)
    assert len({i.id for i in items}) == 4 and items[1].prompt == items[3].prompt
    assert len(report) == 1 and "1 of 4 prompts repeat the text of another" in report[0]
    clean = []
    load_benchmark(of(key), save(tmp_path, key, table(key, 4)), rows=4, report=clean)
    assert clean == []


@pytest.mark.parametrize("key", EVERY)
def test_empty_prompts(tmp_path, key):
    rows = table(key, 3)
    rows[1] = blank(rows[1], SHAPES[key][1])
    said = message(load_benchmark, of(key), save(tmp_path, key, rows), rows=3)
    assert "is blank" in said and ("line" in said or "case 0" in said)


@pytest.mark.parametrize("key", [k for k in EVERY if SHAPES[k][0] == ".jsonl"])
def test_null_and_numbers(tmp_path, key):
    column = SHAPES[key][1]
    for value, part in ((None, ""), (3.5, "expected"), (True, "expected"), ([], "")):
        rows = table(key, 3)
        rows[2] = {**rows[2], column: value}
        assert part in (said := message(load_benchmark, of(key), save(tmp_path, key, rows), rows=3))
        assert "line 3" in said


@pytest.mark.parametrize("key", [k for k in EVERY if SHAPES[k][0] != ".txt"])
def test_truncated(tmp_path, key):
    text = dump(table(key, 3), SHAPES[key][0]).rstrip("\n")
    cut = text.rindex(",") if SHAPES[key][0] == ".csv" else len(text) - 4
    said = message(load_benchmark, of(key), save(tmp_path, key, text[:cut]), rows=3)
    assert "not JSON" in said or "fields, got" in said
    assert "Ask" not in said.replace(str(tmp_path), "")


@pytest.mark.parametrize("key", EVERY)
def test_encodings(tmp_path, key):
    text = dump(table(key, 3), SHAPES[key][0])
    accented = text.replace("Ask", "Où est")
    assert load_benchmark(of(key), save(tmp_path, key, accented.encode()), rows=3)
    assert "is not UTF-8" in message(load_benchmark, of(key), save(tmp_path, key, accented.encode("latin-1")), rows=3)
    assert "is not UTF-8" in message(load_benchmark, of(key), save(tmp_path, key, text.encode("utf-16")), rows=3)
    nul = (
        text.replace("Ask 1", "As\0k 1")
        if SHAPES[key][0] in (".csv", ".txt")
        else text.replace("Ask 1", "As\\u0000k 1")
    )
    said = message(load_benchmark, of(key), save(tmp_path, key, nul), rows=3)
    assert "NUL" in said


@pytest.mark.parametrize("key", EVERY)
@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_files(tmp_path, key, content):
    said = message(load_benchmark, of(key), save(tmp_path, key, content), rows="any")
    assert "holds no rows" in said or "not JSON" in said or "blank" in said


@pytest.mark.parametrize("key", EVERY)
def test_header_only_and_missing_header(tmp_path, key):
    if SHAPES[key][0] != ".csv":
        return
    head, *lines = dump(table(key, 3), ".csv").splitlines()
    assert "holds no rows" in message(load_benchmark, of(key), save(tmp_path, key, head + "\n"), rows="any")
    said = message(load_benchmark, of(key), save(tmp_path, key, "\n".join(lines)), rows="any")
    assert "expected the columns" in said or "stands twice" in said


@given(st.binary(max_size=80), st.sampled_from(FILES))
@settings(steady, max_examples=300)
def test_any_bytes_load_or_are_refused_in_one_line(tmp_path, content, key):
    path = save(tmp_path, key, content)
    try:
        items = load_benchmark(of(key), path, rows="any")
    except UserError as e:
        assert len(str(e).splitlines()) == 1 and key in str(e)
    else:
        assert items and all(i.prompt.strip() for i in items)


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "label", "stem"]), inner),
    max_leaves=6,
)


@given(st.sampled_from([k for k in EVERY if SHAPES[k][0] == ".jsonl"]), st.data())
@settings(steady, max_examples=300)
def test_any_value_in_any_column_loads_or_is_refused_in_one_line(tmp_path, key, data):
    rows = table(key, 3)
    column = data.draw(st.sampled_from(sorted(rows[1])))
    rows[1] = {**rows[1], column: data.draw(VALUE)}
    path = save(tmp_path, key, rows)
    try:
        items = load_benchmark(of(key), path, rows="any")
    except UserError as e:
        assert len(str(e).splitlines()) == 1 and "line" in str(e)
    else:
        assert all(i.prompt.strip() and isinstance(i.prompt, str) for i in items)
        assert all(i.answer in i.letters for i in items if i.choices)


@pytest.mark.parametrize("rows", [0, -1, True, "all", 2.0])
def test_rows(tmp_path, rows):
    assert "whole number of rows" in message(
        load_benchmark, "gsm8k", save(tmp_path, "gsm8k", table("gsm8k", 2)), rows=rows
    )


def test_unknown_names_and_paths(tmp_path):
    assert "unknown benchmark 'advbenc': choose one of advbench" in message(load_benchmark, "advbenc")
    assert "no split 'dev': choose one of" in message(load_benchmark, "gsm8k", split="dev")
    assert "no file" in message(load_benchmark, "gsm8k", tmp_path / "nowhere.jsonl")
    assert "no test.jsonl in" in message(load_benchmark, "gsm8k", tmp_path)
    odd = save(tmp_path, "gsm8k", table("gsm8k", 2), "two\nlines.jsonl")
    assert "two\\nlines.jsonl" in message(load_benchmark, "gsm8k", odd)
    path = save(tmp_path, "gsm8k", "x", "x.parquet")
    assert "unknown kind of file '.parquet'" in message(load_benchmark, "gsm8k", path)


# Single sets


def test_harmbench_contexts_and_unique_texts(tmp_path):
    rows = table("harmbench_direct", 6)
    for row, text in zip(rows[1::2], ("one", "two", "three"), strict=True):
        row |= {"Behavior": "Ask about it.", "ContextString": text}
    report = []
    items = load_benchmark("harmbench_direct", save(tmp_path, "harmbench_direct", rows), rows=6, report=report)
    assert items[1].prompt == "one\n\n---\n\nAsk about it." and items[1].context == "one"
    assert items[0].prompt == "Ask 0." and items[0].context == ""
    assert [i.id for i in items] == [f"b{n}" for n in range(6)]
    assert len(report) == 1 and report[0].endswith("6 rows, 4 unique behaviors")


def test_harmbench_cases_are_numbered(tmp_path):
    text = json.dumps({"a": ["Ask 1.", "Ask 2."], "b": [], "c": ["Ask 3."]})
    items = load_benchmark("harmbench_pez", save(tmp_path, "harmbench_pez", text), rows=3)
    assert [i.id for i in items] == ["a/0", "a/1", "c/0"] and items[2].extra == {"BehaviorID": "c"}
    for bad in ('{"a": "Ask 1."}', "[]", '{"a": [1]}', '{"a": [null]}', '{"a": [["x"]]}', '"a"', "3"):
        message(load_benchmark, "harmbench_pez", save(tmp_path, "harmbench_pez", bad), rows="any")


def test_sorry_bench_base_only(tmp_path):
    rows = table("sorry_bench", 5)
    rows[3]["prompt_style"] = "slang"
    assert len(load_benchmark("sorry_bench", save(tmp_path, "sorry_bench", rows), rows=4)) == 4
    for turns in ([], ["a", "b"], "a", [3.0]):
        rows[0]["turns"] = turns
        said = message(load_benchmark, "sorry_bench", save(tmp_path, "sorry_bench", rows), rows=4)
        assert "line 1: expected" in said


def test_sorry_bench_numbers_its_questions_anew_in_each_style(tmp_path):
    base, slang = table("sorry_bench", 4), [{**r, "prompt_style": "slang"} for r in table("sorry_bench", 4)]
    for rows in ([*base, *slang], [*slang, *base]):
        items = load_benchmark("sorry_bench", save(tmp_path, "sorry_bench", rows), rows=4)
        assert [(i.id, i.prompt) for i in items] == [(f"{n}", f"Ask {n}.") for n in range(4)]
    said = message(load_benchmark, "sorry_bench", save(tmp_path, "sorry_bench", [*slang, *base, base[2]]), rows="any")
    assert "line 9: the id '2' stands at line 7 too" in said
    slang[1]["turns"] = []
    assert "line 2: expected" in message(load_benchmark, "sorry_bench", save(tmp_path, "sorry_bench", [*slang, *base]))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("#### 7", "7"),
        ("a\n#### 1,080", "1080"),
        ("#### 109,200,000", "109200000"),
        ("#### -47", "-47"),
        ("#### 0.25", "0.25"),
    ],
)
def test_gsm8k_numbers(text, want):
    assert gsm8k_answer(text) == want


@pytest.mark.parametrize(
    "text", ["7", "#### ", "#### 1,08", "#### 7 apples", "#### 1 #### 2", "####7", "#### $5", "#### --3"]
)
def test_gsm8k_no_number(text, tmp_path):
    assert "expected one number" in message(gsm8k_answer, text)
    row = [{"question": "Ask?", "answer": text}]
    assert "line 1: expected one number" in message(load_benchmark, "gsm8k", save(tmp_path, "gsm8k", row), rows=1)


@steady
@given(st.integers(-(10**12), 10**12))
def test_gsm8k_any_integer(n):
    assert gsm8k_answer(f"so\n#### {n}") == gsm8k_answer(f"so\n#### {n:,}") == str(n)


@pytest.mark.parametrize("key", [k for k in EVERY if k.startswith(("arc", "common"))])
def test_choices(tmp_path, key):
    def broken(change):
        rows = table(key, 2)
        nested = isinstance(rows[1]["question"], dict)
        pairs = [*choices(1), {"text": "maybe", "label": "C"}]
        change(pairs, rows[1])
        if nested:
            rows[1]["question"]["choices"] = pairs
        else:
            rows[1]["choices"] = {"text": [p.get("text") for p in pairs], "label": [p.get("label") for p in pairs]}
        return message(load_benchmark, of(key), save(tmp_path, key, rows), rows=2)

    assert "is none of the 3 labels" in broken(lambda pairs, row: row.update(answerKey="E"))
    assert "answerKey is blank" in broken(lambda pairs, row: row.update(answerKey=""))
    assert "its own label" in broken(lambda pairs, row: pairs[2].update(label="A"))
    assert "expected" in broken(lambda pairs, row: pairs[0].update(text=""))
    assert "expected" in broken(lambda pairs, row: pairs[0].pop("label"))
    assert "two or more choices" in broken(lambda pairs, row: (pairs.pop(), pairs.pop()))


def test_arc_provenance_is_kept(tmp_path):
    rows = [{**r, "provenance": "rebuilt"} for r in table("arc_challenge", 2)]
    items = load_benchmark("arc_challenge", save(tmp_path, "arc_challenge", rows), rows=2)
    assert items[0].extra == {"provenance": "rebuilt"} and items[0].answer == "B" and items[0].letters == ("A", "B")


# Where sets come from


@pytest.mark.parametrize("key", FILES)
def test_data_folder_and_source_folder(tmp_path, monkeypatch, key):
    bench = BENCHMARKS[key]
    name = f"{bench.folder}/{next(iter(bench.split().files))}"
    path = save(tmp_path, key, table(key, 4), name)
    want = load_benchmark(key, path, rows=4)
    assert load_benchmark(key, tmp_path, rows=4) == want == load_benchmark(key, tmp_path / bench.folder, rows=4)
    monkeypatch.setenv("QALIGN_DATA", str(tmp_path))
    assert load_benchmark(key, rows=4) == want
    here = {row["name"]: row["here"] for row in benchmark_table()}
    assert here[key] == "local file"
    monkeypatch.setenv("QALIGN_DATA", str(tmp_path / bench.folder))  # a file at the top belongs to no set
    assert {row["name"]: row["here"] for row in benchmark_table()}[key] != "local file"
    monkeypatch.setenv("QALIGN_DATA", str(tmp_path / "nowhere"))
    assert "QALIGN_DATA is" in message(load_benchmark, key, rows=4)


class GatedRepoError(Exception):
    pass


class RevisionNotFoundError(Exception):
    pass


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize(
    "error", [ConnectionError("x\ny"), GatedRepoError("x\ny"), ModuleNotFoundError(), ValueError("a\nb")]
)
def test_hub_fails(monkeypatch, key, error):
    bench = BENCHMARKS[key]

    def fails(*args):
        raise error

    monkeypatch.setattr(benchmarks, "_load_dataset", fails)
    said = message(load_benchmark, key)
    assert said.startswith(key) and f"$QALIGN_DATA/{bench.folder}/" in said
    if not bench.hub:
        assert "https://zenodo.org/records/10714577" in said
        return
    assert {
        ConnectionError: "no network",
        GatedRepoError: "no access",
        ModuleNotFoundError: "pip install",
        ValueError: "V",
    }[type(error)] in said
    assert ("HF_TOKEN" in said and f"https://huggingface.co/datasets/{bench.hub}" in said) == bool(bench.gate)


@pytest.mark.parametrize(
    "key", [k for k in EVERY if " hub" in k or k in ("jailbreakbench", "alert", "xstest", "gsm8k")]
)
def test_hub_rows(monkeypatch, tmp_path, key):
    bench, asked = BENCHMARKS[of(key)], []

    def loads(*args):
        asked.append(args)
        return table(key, 4)

    monkeypatch.setattr(benchmarks, "_load_dataset", loads)
    assert load_benchmark(of(key), rows=4) == load_benchmark(of(key), save(tmp_path, key, table(key, 4)), rows=4)
    assert asked == [(bench.hub, (bench.configs or (None,))[0], bench.split().hub, bench.revision)]
    said = message(load_benchmark, of(key))
    assert f"({bench.hub}) holds 4 rows, {bench.split().rows} are published" in said


def test_hub_harmbench_has_three_configurations(monkeypatch):
    parts = {
        "standard": [{"prompt": "Ask 1.", "category": "x"}],
        "contextual": [{"prompt": "Ask 2.", "context": "Text", "category": "x"}],
        "copyright": [{"prompt": "Ask 3.", "tags": "book"}],
    }
    monkeypatch.setattr(benchmarks, "_load_dataset", lambda hub, config, split, revision: parts[config])
    items = load_benchmark("harmbench_direct", rows=3)
    assert [i.prompt for i in items] == ["Ask 1.", "Text\n\n---\n\nAsk 2.", "Ask 3."]
    assert "no public id" in message(load_benchmark, "harmbench_direct", split="val")


def test_the_real_client_offline(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    for name in ("alert", "advbench"):
        assert "cannot be loaded, no network" in message(load_benchmark, name)


# The registry


def test_registry():
    assert len(BENCHMARKS) == 19 and all(name == b.name for name, b in BENCHMARKS.items())
    for key in FILES:
        bench, row = BENCHMARKS[key], SHAPES[key][3](0)
        assert bench.columns == tuple(row), key
        assert bench.kind in ("harm", "over_refusal", "capability") and bench.citation and bench.licence and bench.judge
        assert bench.gate in ("", "auto", "yes") and (bench.hub or key[10:] in METHODS)
        assert bench.revision is None or len(bench.revision) == 40
        assert all(len(h) == 64 for s in bench.splits for hs in s.files.values() for h in hs)
        assert not bench.use or bench.split(bench.use)
    paper = {b.name: b.paper_n for b in BENCHMARKS.values() if b.paper_n}
    assert paper == {
        "advbench": 520,
        "jailbreakbench": 100,
        "alert": 14763,
        "malicious_instruct": 100,
        "strongreject": 313,
        "sorry_bench": 440,
        "harmbench_direct": 400,
        **{f"harmbench_{m}": n for m, n in zip(METHODS, (500, 2000, 400, 400, 400, 390), strict=True)},
        "sgxstest": 100,
        "or_bench_hard": 100,
    }


def test_table(monkeypatch):
    rows = {r["name"]: r for r in benchmark_table()}
    assert list(rows) == list(BENCHMARKS)
    assert rows["advbench"]["here"] == "public id, needs HF_TOKEN" and rows["alert"]["here"] == "public id"
    assert rows["harmbench_pez"]["here"] == "missing: download it" and rows["xstest"]["counted on"] == "safe"
    monkeypatch.setenv("HF_TOKEN", "x")
    assert {r["here"] for r in benchmark_table("over_refusal")} == {"public id"}
    assert "unknown kind 'harmful'" in message(benchmark_table, "harmful")


def test_nothing_heavy_is_imported():
    import subprocess

    heavy = "{'torch', 'pandas', 'datasets', 'huggingface_hub', 'pyarrow', 'numpy'}"
    code = f"import sys, qalign.benchmarks as b; b.benchmark_table(); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Overlap


def test_overlap():
    a = [
        Item("1", "Explain tides.", "x"),
        Item("2", "Ctx\n\n---\n\nWho wrote it?", "x", extra={"behavior": "Who wrote it?"}),
    ]
    assert overlap(a, ["explain  TIDES", "who wrote it"]) != []
    assert [x for x, _ in overlap(a, [Prompt("p", "EXPLAIN tides!"), Prompt("q", "Who wrote it")])] == ["1", "2"]
    assert overlap(a, [Prompt("p", "Explain the tides.")]) == []
    assert overlap(["?!"], ["?!"]) and not overlap(["?!"], ["!?"])
    assert overlap([], a) == overlap(a, []) == []
    rows = overlap_table({"a": a, "b": ["Explain tides", "Explain  tides"], "c": ["Else?"]})
    assert [(r["a"], r["b"], r["of a"], r["of b"]) for r in rows] == [
        ("a", "b", 1, 2),
        ("a", "c", 0, 0),
        ("b", "c", 0, 0),
    ]


WORDS = st.lists(st.sampled_from(["tides", "Tides", "moon", "MOON", "sea"]), min_size=1, max_size=3).map(" ".join)


@steady
@given(st.lists(WORDS, max_size=6), st.lists(WORDS, max_size=6))
def test_overlap_is_symmetric_and_complete(a, b):
    left = [Prompt(f"a{i}", t) for i, t in enumerate(a)]
    right = [Prompt(f"b{i}", t + "!") for i, t in enumerate(b)]
    want = {(p.id, q.id) for p in left for q in right if p.text.lower() == q.text[:-1].lower()}
    assert set(overlap(left, right)) == want
    assert {(y, x) for x, y in overlap(right, left)} == want


def test_refusing_evaluation_rows(tmp_path, monkeypatch):
    sets = {"x": [Item("1", "Explain tides.", "x")], "y": ["Explain tides"]}
    assert refuse_evaluation_rows([Prompt("p", "Else?")], sets) == {"x": 1, "y": 1}
    said = message(refuse_evaluation_rows, [Prompt("p", "explain tides"), Prompt("q", "Else?")], sets)
    assert said == "1 of 2 training prompts stand in x (1), y (1): drop p"
    many = [Prompt(f"p{i}", "explain tides") for i in range(9)]
    assert message(refuse_evaluation_rows, many, sets).endswith("drop p0, p1, p2, p3, p4 and 4 more")
    assert refuse_evaluation_rows([Prompt("p", "explain tides")]) == {} == local_benchmarks()
    save(tmp_path, "malicious_instruct", table("malicious_instruct", 100), "malicious_instruct/MaliciousInstruct.txt")
    monkeypatch.setenv("QALIGN_DATA", str(tmp_path))
    assert refuse_evaluation_rows([Prompt("p", "Else?")]) == {"malicious_instruct": 100}
    assert "in malicious_instruct (1)" in message(refuse_evaluation_rows, [Prompt("p", "ask 7")])


# WildJailbreak


def test_wildjailbreak(tmp_path, monkeypatch):
    head = "vanilla\tadversarial\tcompletion\tdata_type\n"
    rows = 'Ask 1.\t\tNo.\tvanilla_harmful\n"Ask ""2"".\tx"\t\t"No.\nNo."\tvanilla_harmful\n'
    rows += "ask 1.\t\tNo.\tvanilla_harmful\n"
    path = tmp_path / "wildjailbreak" / "train.tsv"
    path.parent.mkdir()
    path.write_text(head + rows + "Ask 4.\t\tYes.\tvanilla_benign\n\tAsk 5.\tNo.\tadversarial_harmful\n")
    report = []
    got = load_wildjailbreak(path, report=report)
    assert [p.text for p in got] == ["Ask 1.", 'Ask "2".\tx'] and len(report) == 1
    assert [p.text for p in load_wildjailbreak(path, "vanilla_benign")] == ["Ask 4."]
    monkeypatch.setenv("QALIGN_DATA", str(tmp_path))
    assert load_wildjailbreak() == got == load_prompts("wildjailbreak") and load_prompts("wildjailbreak", 1) == got[:1]
    assert "expected vanilla_harmful" in message(load_wildjailbreak, path, "adversarial_harmful")
    for text, part in (
        ("vanilla\tdata_type\na\tvanilla_harmful\n", "expected the columns"),
        (head + "Ask\t\tNo.\n", "line 2: expected 4 fields"),
        (head + "Ask\t\tNo.\tvanilla_harmful\tx\n", "line 2: expected 4 fields"),
        (head + " \t\tNo.\tvanilla_harmful\n", "line 2: vanilla is blank"),
        (head, "holds no rows of vanilla_harmful"),
        (head + "a" * 200_000, "not TSV"),
    ):
        path.write_text(text)
        assert part in message(load_wildjailbreak, path)
    path.write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in message(load_wildjailbreak, path)
    monkeypatch.delenv("QALIGN_DATA")
    assert "accept the licence" in message(load_wildjailbreak)


# The public files, where they are


@pytest.fixture
def public(monkeypatch):
    if not PUBLIC.is_dir():
        pytest.skip("no public data: set QALIGN_DATA")
    monkeypatch.setenv("QALIGN_DATA", str(PUBLIC))
    return PUBLIC


def held(folder, *names):
    for name in names:
        bench, _, split = name.partition(":")
        part = BENCHMARKS[bench].split(split or None)
        if not any((folder / BENCHMARKS[bench].folder / f).exists() for f in part.files):
            pytest.skip(f"no {name}")


@pytest.mark.parametrize(
    ("name", "split", "n", "repeats"),
    [
        ("advbench", None, 520, 0),
        ("harmbench_direct", None, 400, 0),
        ("harmbench_direct", "test", 320, 0),
        ("harmbench_direct", "val", 80, 0),
        ("xstest", None, 450, 0),
        ("xstest", "safe", 250, 0),
        ("xstest", "unsafe", 200, 0),
        ("arc_challenge", None, 1172, 2),
        ("gsm8k", None, 1319, 0),
        ("gsm8k", "train", 7473, 0),
    ],
)
def test_public_sets(public, name, split, n, repeats):
    held(public, f"{name}:{split or ''}")
    report = []
    items = load_benchmark(name, split=split, report=report)
    assert len(items) == len({i.id for i in items}) == n
    assert n - len({" ".join(i.prompt.split()).casefold() for i in items}) == repeats
    assert any("repeat" in line for line in report) == bool(repeats)


def test_public_harmbench_is_keyed_by_id(public):
    held(public, "harmbench_direct")
    report = []
    items = load_benchmark("harmbench_direct", report=report)
    assert sum(bool(i.context) for i in items) == 100 == sum("\n\n---\n\n" in i.prompt for i in items if i.context)
    assert len({i.extra["behavior"] for i in items}) == 393 and report[0].endswith("400 rows, 393 unique behaviors")
    assert not any("\r" in i.prompt for i in items)


def test_public_ids_are_those_of_prompts(public):
    held(public, "advbench")
    prompts = load_prompts(public / "advbench" / "harmful_behaviors.csv")
    assert [p.id for p in prompts] == [i.id for i in load_benchmark("advbench")]


def test_public_answers(public):
    held(public, "gsm8k", "arc_challenge")
    answers = [i.answer for i in load_benchmark("gsm8k")]
    assert sum(a.startswith("-") for a in answers) == 2 and all(float(a) == int(a) for a in answers)
    arc = load_benchmark("arc_challenge")
    assert sorted({len(i.choices) for i in arc}) == [3, 4, 5]
    assert {k: sum(i.extra["provenance"] == k for i in arc) for k in ("ai2-file", "llm-foundry-reformat")} == {
        "ai2-file": 1150,
        "llm-foundry-reformat": 22,
    }
    if (public / "arc_challenge" / "ARC-Challenge-Dev.jsonl").exists():
        assert "holds 294 rows, 299 are published" in message(load_benchmark, "arc_challenge", split="validation")


@pytest.mark.parametrize("name", ["advbench", "xstest", "gsm8k", "harmbench_direct"])
def test_public_files_with_other_bytes(public, tmp_path, name):
    held(public, name)
    bench = BENCHMARKS[name]
    file = next(iter(bench.split().files))
    raw = (public / bench.folder / file).read_bytes()
    plain = raw.replace(b"\r\n", b"\n")
    want = load_benchmark(name)
    for copy in (plain, plain.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + plain):
        (tmp_path / file).write_bytes(copy)
        assert load_benchmark(name, tmp_path / file) == want
    (tmp_path / file).write_bytes(plain.replace(b"a", b"b", 40))
    with pytest.raises(UserError, match=r"other contents|expected the columns|not JSON"):
        load_benchmark(name, tmp_path / file)


def test_public_training_prompts_are_no_evaluation_rows(public):
    held(public, "advbench", "harmbench_direct", "xstest")
    sets = local_benchmarks()
    assert {"advbench", "harmbench_direct", "xstest"} <= set(sets)
    for file in ("harmfulqa.json", "catqa_english.json"):
        path = public / "harmful_questions_apache" / file
        if path.exists():
            counted = refuse_evaluation_rows(load_prompts(path))
            assert counted["advbench"] == 520 and counted["harmbench_direct"] == 400 and counted["xstest"] == 450
    refuse_evaluation_rows([*load_prompts("harmful"), *load_prompts("benign")])
    assert "520 of 520 training prompts" in message(refuse_evaluation_rows, sets["advbench"])
