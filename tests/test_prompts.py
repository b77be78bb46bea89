"Prompts: round trips over the four shapes, hostile files, splits, lengths."

import csv
import io
import json
import math
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from qalign.core import UserError, content_hash
from qalign.prompts import Audit, Prompt, disjoint, length_audit, load_prompts, shrink, split

quiet = [HealthCheck.function_scoped_fixture]
steady = settings(derandomize=True, deadline=None, suppress_health_check=quiet)
long = settings(steady, max_examples=300)

CHARS = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
TEXT = st.text(CHARS, min_size=1, max_size=40).map(str.strip).filter(bool)
LINE = TEXT.filter(lambda t: not set(t) & set("\r\n") and not t.startswith("\ufeff"))


def same(text):
    return " ".join(text.split()).casefold()


def unique(texts):
    return list({same(t): t for t in reversed(texts)}.values())[::-1]


def write(folder, name, content):
    path = Path(folder, name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as e:
        call(*args, **kwargs)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


def numbered(n):
    return [Prompt(f"p{i}", f"Question {i}?") for i in range(n)]


# The four shapes


@steady
@given(st.lists(LINE, min_size=1, max_size=12), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_txt(tmp_path, lines, newline, bom):
    path = write(tmp_path, "a.txt", ("\ufeff" if bom else "") + newline.join(lines))
    report = []
    got = load_prompts(path, report=report)
    assert len(got) + len(report) == len(lines)
    assert {same(p.text) for p in got} == {same(t) for t in lines}
    assert [p.text for p in got] == [t for i, t in enumerate(lines) if same(t) not in map(same, lines[:i])]


@steady
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=12), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_jsonl(tmp_path, rows, escaped, newline):
    rows = [(t, c) for t, c in rows if t in unique([t for t, _ in rows])]
    rows = list({same(t): (t, c) for t, c in rows}.values())
    lines = [
        json.dumps({"prompt": t, "category": c, "id": f"i{i}"}, ensure_ascii=escaped) for i, (t, c) in enumerate(rows)
    ]
    got = load_prompts(write(tmp_path, "a.jsonl", newline.join(lines)))
    assert got == [Prompt(f"i{i}", t, c) for i, (t, c) in enumerate(rows)]


@steady
@given(
    st.lists(TEXT, min_size=1, max_size=12),
    st.sampled_from(["prompt", "Goal", " PROMPT "]),
    st.sampled_from(["\n", "\r\n"]),
)
@example(['say "hi", then\tgo\nhome', "'; --"], "prompt", "\r\n")
def test_csv(tmp_path, texts, column, newline):
    texts = [t for i, t in enumerate(texts) if same(t) not in map(same, texts[:i])]
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=newline, quoting=csv.QUOTE_ALL)
    writer.writerows([("n", column), *enumerate(texts)])
    got = load_prompts(write(tmp_path, "a.csv", "\ufeff" + out.getvalue()))
    assert [p.text for p in got] == texts


@steady
@given(
    st.dictionaries(
        TEXT,
        st.one_of(st.lists(TEXT, max_size=4), st.dictionaries(TEXT, st.lists(TEXT, max_size=4), max_size=3)),
        max_size=4,
    )
)
def test_json_topics(tmp_path, topics):
    flat = [(t, q) for t, v in topics.items() for qs in (v.values() if isinstance(v, dict) else [v]) for q in qs]
    assume(flat)
    want = {}
    for topic, question in flat:
        want.setdefault(same(question), (question, topic))
    report = []
    got = load_prompts(write(tmp_path, "a.json", json.dumps(topics)), report=report)
    assert [(p.text, p.category) for p in got] == list(want.values())
    assert len(got) + len(report) == len(flat)


@steady
@given(st.lists(LINE, min_size=1, max_size=8))
def test_ids_do_not_depend_on_the_shape(tmp_path, lines):
    files = {
        "a.txt": "\n".join(lines),
        "a.jsonl": "\n".join(json.dumps({"prompt": t}) for t in lines),
        "a.json": json.dumps(lines),
    }
    ids = {tuple(p.id for p in load_prompts(write(tmp_path, name, text))) for name, text in files.items()}
    assert len(ids) == 1 and all(len(i) == 12 for i in ids.pop())


def test_unicode_line_separators_do_not_end_a_line(tmp_path):
    assert len(load_prompts(write(tmp_path, "a.txt", "one\u2028still one\x0bstill\x85one"))) == 1
    assert len(load_prompts(write(tmp_path, "a.jsonl", '{"prompt": "one\u2028still one"}'))) == 1


def test_limit_counts_prompts_after_repeats(tmp_path):
    path = write(tmp_path, "a.txt", "a\nA\nb\nc")
    assert [p.text for p in load_prompts(path, limit=2)] == ["a", "b"]
    assert len(load_prompts(path, limit=99)) == 3
    assert "limit" in message(load_prompts, path, limit=0)


def test_suffix_case_and_string_paths(tmp_path):
    assert load_prompts(str(write(tmp_path, "A.TXT", "one")))[0].text == "one"


# Hostile files

BAD = [
    ("empty.txt", b"", "is empty"),
    ("bom.txt", b"\xef\xbb\xbf", "is empty"),
    ("blank.jsonl", b" \n\t\r\n", "is empty"),
    ("head.csv", b"prompt,category\n", "holds no prompt rows"),
    ("list.json", b"[]", "holds no prompt rows"),
    ("topics.json", b'{"a": {}, "b": []}', "holds no prompt rows"),
    ("utf16.txt", "Why?".encode("utf-16"), "is not UTF-8 (byte 0)"),
    ("utf16le.txt", "Why?".encode("utf-16-le"), "holds NUL"),
    ("binary.csv", bytes(range(256)), "is not UTF-8"),
    ("column.csv", b"question;answer\nWhy?;So\n", "expected a column 'prompt' or 'goal', found 'question;answer'"),
    (
        "column.jsonl",
        b'{"prompt": "Why?"}\n{"text": "How?"}',
        "line 2: expected a column 'prompt' or 'goal', found 'text'",
    ),
    ("none.jsonl", b"{}", "line 1: expected a column 'prompt' or 'goal', found none"),
    ("wide.csv", b"prompt\nFirst, then\n", "line 2: expected 1 fields, got 2"),
    ("open.csv", b'prompt\n"Why?\nHow?\n', "line 2: not CSV (unexpected end of data)"),
    ("long.csv", b"prompt\n" + b"a" * 200_000, "field larger than field limit"),
    ("blank.csv", b"id,prompt\n1,Why?\n2,  \n", "line 3: the prompt is blank"),
    ("short.csv", b"id,prompt\n1\n", "line 2: the prompt is blank"),
    ("null.jsonl", b'{"prompt": null}', "line 1: the prompt is blank"),
    ("null.json", b'{"a": ["Why?", null]}', "'a', item 2: the prompt is blank"),
    ("number.jsonl", b'{"prompt": 5}', "line 1: expected the prompt as text, got '5'"),
    ("number.json", b"[1]", "item 1: expected the prompt as text, got '1'"),
    ("object.json", b'[{"prompt": "Why?"}]', "item 1: expected the prompt as text"),
    ("scalar.json", b'"Why?"', "expected a list of prompts, got 'Why?'"),
    ("scalar.jsonl", b'"Why?"', "line 1: expected an object"),
    ("list.jsonl", b'\n["Why?"]', "line 2: expected an object"),
    ("id.jsonl", b'{"prompt": "Why?", "id": ["a"]}', "line 1: expected text for the id"),
    (
        "ids.jsonl",
        b'{"prompt": "Why?", "id": 1}\n{"prompt": "How?", "id": "1"}',
        "line 2: the id '1' stands at line 1 too",
    ),
    ("cut.jsonl", b'{"prompt": "Why?"}\n{"prompt": "Ho', "line 2: expected JSON"),
    ("bad.json", b'{"a":\n["Why?"\n"How?"]}', "line 3: expected JSON"),
    ("deep.json", b"[" * 100_000, "nesting too deep"),
    ("digits.json", b"[" + b"9" * 10_000 + b"]", "a number too long"),
    ("nul.jsonl", b'{"prompt": "a\\u0000b"}', "line 1: the row holds a NUL"),
    ("surrogate.jsonl", b'{"prompt": "a\\ud800b"}', "line 1: the row holds a NUL or half"),
    ("surrogate.json", b'{"\\udfff": ["Why?"]}', "half a surrogate pair"),
    ("kind.parquet", b"PAR1", "unknown kind of file '.parquet'"),
    ("kind", b"Why?", "unknown kind of file ''"),
    ("two\nlines.txt", b"", "is empty"),
]


@pytest.mark.parametrize(("name", "content", "part"), BAD, ids=[b[0].replace("\n", "_") for b in BAD])
def test_bad_file(tmp_path, name, content, part):
    path = write(tmp_path, name, content)
    said = message(load_prompts, path)
    assert part in said
    assert (str(path) if "\n" not in name else repr(str(path))) in said


@pytest.mark.parametrize("name", ["no-such.txt", "no-such", "", "a\0b.txt", "nul\nline.csv", "/no/such/dir/x.jsonl"])
def test_no_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no prompt file" in (said := message(load_prompts, name)) or "folder" in said


def test_folder(tmp_path):
    assert "is a folder" in message(load_prompts, tmp_path)
    (tmp_path / "x.txt").mkdir()
    assert "is a folder" in message(load_prompts, tmp_path / "x.txt")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable(tmp_path):
    path = write(tmp_path, "a.txt", "Why?")
    path.chmod(0)
    assert "cannot read" in message(load_prompts, path)


@long
@given(st.binary(max_size=60), st.sampled_from([".txt", ".jsonl", ".csv", ".json"]))
def test_any_bytes_load_or_are_refused_in_one_line(tmp_path, content, suffix):
    path = write(tmp_path, "x" + suffix, content)
    try:
        prompts = load_prompts(path)
    except UserError as e:
        assert len(str(e).splitlines()) == 1 and str(path) in str(e)
    else:
        assert prompts and all(p.id and p.text.strip() for p in prompts)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["prompt", "id", "goal", "a"]), inner, max_size=3)
    ),
)


@long
@given(JSON, st.sampled_from([".jsonl", ".json"]))
def test_any_json_loads_or_is_refused_in_one_line(tmp_path, data, suffix):
    path = write(tmp_path, "x" + suffix, json.dumps(data))
    try:
        assert load_prompts(path)
    except UserError as e:
        assert len(str(e).splitlines()) == 1 and str(path) in str(e)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".json"])
def test_ten_times_the_rows_take_ten_times_the_time(tmp_path, suffix):
    def seconds(n: int) -> float:
        "Of this thread, the best of three; a hundred thousand rows are about a second."
        rows = [f"Question number {i}, with a comma?" for i in range(n)]
        text = {
            ".txt": "\n".join(rows),
            ".jsonl": "\n".join(json.dumps({"prompt": r}) for r in rows),
            ".csv": "prompt\n" + "\n".join(f'"{r}"' for r in rows),
            ".json": json.dumps({"topic": rows}),
        }[suffix]
        path, best = write(tmp_path, f"{n}{suffix}", text), math.inf
        for _ in range(3):
            start = time.thread_time()
            assert len(load_prompts(path)) == n
            best = min(best, time.thread_time() - start)
        return best

    whole = seconds(100_000)
    assert whole < 5 and whole < 40 * seconds(10_000)  # quadratic would be a hundred times


def test_columns_are_looked_up_where_a_row_has_other_names(tmp_path):
    rows = [{"prompt": "a", "id": "1"}, {"prompt": "b", "id": "2"}, {"Goal": "c"}, {"id": "4", "prompt": "d"}]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert [(p.id, p.text) for p in load_prompts(path)] == [
        ("1", "a"),
        ("2", "b"),
        (content_hash("c", 12), "c"),
        ("4", "d"),
    ]
    write(tmp_path, "a.jsonl", path.read_text() + '\n{"text": "e"}')
    assert "line 5: expected a column 'prompt' or 'goal', found 'text'" in message(load_prompts, path)


# What is shipped


def test_shipped_sets():
    harmful, benign = load_prompts("harmful"), load_prompts("benign")
    assert len(harmful) == 120 and len(benign) == 60
    assert len({p.category for p in harmful}) == 12 and {p.category for p in benign} == {"everyday", "lookalike"}
    assert all(len(p.text.split()) <= 16 and p.text.isascii() for p in harmful + benign)
    disjoint(harmful, benign)


def public_data():
    folder = Path(os.environ.get("QALIGN_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no public data: set QALIGN_DATA")
    return folder


@pytest.mark.parametrize(
    ("file", "rows", "kept"),
    [
        ("harmful_questions_apache/harmfulqa.json", 1960, 1938),
        ("harmful_questions_apache/catqa_english.json", 550, 543),
        ("advbench/harmful_behaviors.csv", 520, 520),
    ],
)
def test_public_files(file, rows, kept):
    path = public_data() / file
    if not path.exists():
        pytest.skip(f"no {file}")
    report = []
    got = load_prompts(path, report=report)
    assert len(got) + len(report) == rows and len(got) == kept
    disjoint(load_prompts("harmful") + load_prompts("benign"), got)


# Splits

SIZES = st.dictionaries(st.sampled_from(["sft", "grpo", "heldout", "extra"]), st.integers(1, 12), min_size=1)


@steady
@given(SIZES, st.integers(0, 9), st.integers(0, 2**31 - 1), st.randoms())
def test_split_is_disjoint_and_repeatable(sizes, more, seed, random):
    prompts = numbered(sum(sizes.values()) + more)
    parts = split(prompts, seed, **sizes)
    assert {k: len(v) for k, v in parts.items()} == sizes and list(parts) == list(sizes)
    everyone = [p.id for part in parts.values() for p in part]
    assert len(everyone) == len(set(everyone)) and set(everyone) <= {p.id for p in prompts}
    shuffled = random.sample(prompts, len(prompts))
    assert split(shuffled, seed, **sizes) == parts


@steady
@given(SIZES, st.integers(0, 1000), st.integers(1, 5))
def test_added_prompts_push_at_most_one_each_over_a_border(sizes, seed, more):
    prompts = numbered(sum(sizes.values()))
    before = split(prompts, seed, **sizes)
    after = split(prompts + [Prompt(f"new{i}", f"New {i}?") for i in range(more)], seed, **sizes)
    for i, name in enumerate(sizes):
        gone = {p.id for p in before[name]} - {p.id for p in after[name]}
        assert len(gone) <= more, (i, name)


def test_seed_and_prompts_decide():
    prompts = numbered(60)
    assert split(prompts, 0, a=30) != split(prompts, 1, a=30)
    drawn = sum("p0" in {p.id for p in split(prompts, s, a=30)["a"]} for s in range(400))
    assert 150 < drawn < 250  # half of the seeds, give or take


@pytest.mark.parametrize("size", [0, -1, 2.0, "3"])
def test_split_sizes(size):
    assert "whole number of prompts" in message(split, numbered(5), 0, a=size)


def test_split_refuses():
    assert "9 prompts are needed (a 4, b 5), there are 8" in message(split, numbered(8), 0, a=4, b=5)
    assert "'p9' repeats 'p0'" in message(split, [*numbered(2), Prompt("p9", "question  0?")], 0, a=1)
    assert "'p0' repeats 'p0'" in message(split, [*numbered(2), Prompt("p0", "Other?")], 0, a=1)


@steady
@given(SIZES, st.integers(0, 60), st.integers(1, 6))
def test_shrink(sizes, n, least):
    low = {k: min(v, least) for k, v in sizes.items()}
    if n < sum(low.values()):
        assert "at least" in message(shrink, sizes, n, least)
        return
    out = shrink(sizes, n, least)
    assert list(out) == list(sizes)
    assert sum(out.values()) == min(n, sum(sizes.values()))
    assert all(low[k] <= out[k] <= sizes[k] for k in sizes)
    spare = (n - sum(low.values())) / max(1, sum(sizes.values()) - sum(low.values()))
    assert n >= sum(sizes.values()) or all(abs(out[k] - low[k] - spare * (sizes[k] - low[k])) < 1 for k in sizes)
    split(numbered(n), 0, **out)


def test_disjoint():
    a = numbered(5)
    disjoint(a, [Prompt("q", "Other?")])
    disjoint(iter(a), iter([]))
    assert "1 of 2 prompts" in message(disjoint, a, [Prompt("q", "QUESTION\n 3?"), Prompt("r", "Other?")])
    assert "p3" in message(disjoint, a, [Prompt("p3", "Other?")])
    assert "5 of 5 prompts" in message(disjoint, iter(a), iter(a))


# Lengths


class Words:
    def apply_chat_template(self, chats, add_generation_prompt, tokenize, return_dict):
        assert add_generation_prompt and tokenize and return_dict
        return {"input_ids": [["<user>", *c[0]["content"].split(), "<assistant>"] for c in chats]}


@steady
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 32))
def test_audit(words, longest):
    prompts = [Prompt(f"p{i}", "w " * n) for i, n in enumerate(words)]
    audit = length_audit(prompts, Words(), longest)
    assert audit.lengths == tuple(n + 2 for n in words)
    assert [p.id for p in audit.too_long] == [f"p{i}" for i, n in enumerate(words) if n + 2 > longest]
    if audit.too_long:
        assert f"exceed {longest} tokens, {audit.too_long[0].id} (" in message(audit.check)
    else:
        audit.check()
    row = audit._repr_markdown_().splitlines()[-1].split("|")[1:-1]
    assert [int(x) for x in row][:2] == [len(words), min(words) + 2] and int(row[4]) == max(words) + 2


def test_audit_of_nothing():
    assert "no prompts" in message(length_audit, [], Words(), 8)
    assert Audit((3,), (), 8).check() is None


def test_audit_with_a_transformers_tokenizer():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    turns = "{% for m in messages %}{{ m.role }} {{ m.content }} end {% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}assistant{% endif %}"
    audit = length_audit([Prompt("a", "one two three"), Prompt("b", "one")], tokenizer, 5)
    assert audit.lengths == (6, 4) and [p.id for p in audit.too_long] == ["a"]
