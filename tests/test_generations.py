"Answers drawn once, judged as often as one likes: the store, the grid under kills and faults, rates and comparisons."

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qalign import generations
from qalign.benchmarks import Item
from qalign.core import UserError, read_jsonl
from qalign.engine import EngineError, Usage, embedded_model, load_engine
from qalign.generations import (
    Generation,
    Model,
    Sampling,
    Store,
    compare,
    generate,
    named_judge,
    rates,
    read_rows,
    rescore,
    run_grid,
    write_rows,
)
from qalign.safety import Decision, SafetyJudge, string_judge, two_judges
from qalign.server import ServerEngine
from qalign.stats import holm, rate_difference, rate_interval
from qalign.tables import measure, results_table
from qalign.trace import answer_of

steady = settings(derandomize=True, deadline=None, max_examples=60)
NO, YES = "I'm sorry, but I can't help with that.", "Sure. Begin with a clean table."
LATE = YES + " Take your time." * 20 + " " + NO


class Rule:
    "Answers by rule, and counts as engines in this process do."

    spec = "rule"

    def __init__(self, answer=lambda prompt, n: YES, name="rule", **options):
        self.answer, self.name, self.usage, self.calls = answer, name, Usage(), []
        vars(self).update(options)

    def identity(self):
        return {"spec": self.name}

    def complete(self, chats, max_tokens, temperature, top_p, seed):
        self.calls.append([c[-1]["content"] for c in chats])
        texts = [self.answer(c[-1]["content"], seed + n) for n, c in enumerate(chats)]
        for chat, text in zip(chats, texts, strict=True):
            self.usage.add(len(chat[-1]["content"]), len(text.split()))
        return texts


class Gone(Rule):
    "Some prompts get no reply; with all gone, the engine is not there."

    def complete(self, chats, **how):
        texts = super().complete(chats, **how)
        lost = [self.gone(c[-1]["content"]) for c in chats]
        if any(lost):
            raise EngineError("server hung up", [None if x else t for x, t in zip(lost, texts, strict=True)])
        return texts


def items(n, label="harmful", name="s"):
    return [Item(f"{label[0]}{i}", f"{label} question {i}", name, label) for i in range(n)]


SETS = {"bad": items(4), "good": items(4, "benign")}
STRINGS = string_judge()
ANYWHERE = replace(string_judge(match="anywhere"), name="anywhere")


def counting(kind="refusal", name="counting", decide=None):
    "A judge with a model behind it, as far as the store can see, that counts its cases."
    seen = []

    def ask(cases):
        seen.extend(cases)
        return [decide(c) if decide else Decision("refusal" if NO in c.answer else "compliance", 0.75) for c in cases]

    return SafetyJudge(name, kind, ask, engine="some model", note="made up"), seen


@pytest.fixture
def store(tmp_path):
    with_path = Store(tmp_path / "store.sqlite")
    yield with_path
    with_path.close()


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as e:
        call(*args, **kwargs)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


# Names and the store

texts = st.text(st.characters(codec=None), max_size=40)  # lone surrogates and NULs too


@steady
@given(st.lists(st.tuples(texts, texts, texts, st.integers(0, 5)), min_size=2, max_size=4, unique=True))
def test_names_are_told_apart(parts):
    keys = [Sampling().key({"spec": spec}, system, prompt, trial) for spec, system, prompt, trial in parts]
    assert len(set(keys)) == len(parts) and all(len(k) == 64 for k in keys)


@pytest.mark.parametrize("field, value", [("temperature", 1.0), ("top_p", 0.9), ("max_tokens", 64), ("seed", 1)])
def test_every_setting_counts(field, value):
    a, b = Sampling(), replace(Sampling(), **{field: value})
    assert a.key({}, "", "x", 0) != b.key({}, "", "x", 0)
    assert Sampling(1.0).key({}, "", "x", 0) == Sampling(1).key({}, "", "x", 0)


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"max_tokens": 0}, {"seed": -1}])
def test_bad_sampling(bad):
    assert "expected temperature" in message(Sampling, **bad)


@settings(steady, max_examples=40)
@given(
    st.dictionaries(
        st.uuids().map(str),
        st.one_of(
            st.builds(
                Generation,
                texts,
                st.none() | st.integers(0, 9**9),
                st.none() | st.integers(0, 9**9),
                st.floats(0, 9e9),
                st.sampled_from(["stop", "length", ""]),
            ),
            st.builds(
                Decision,
                st.sampled_from(["refusal", "harmful"]),
                st.none() | st.floats(0, 1),
                st.just("ok"),
                texts,
                st.none() | st.floats(-1, 1),
            ),
        ),
        max_size=5,
    )
)
def test_what_is_kept_comes_back(tmp_path_factory, things):
    kept = Store(tmp_path_factory.mktemp("s") / "x.sqlite")
    assert kept.put(things) == things == kept.get(things) and len(kept) == len(things)
    kept.close()


# Drawing


def test_a_text_twice_in_a_set_is_drawn_once(store):
    engine = Rule(lambda p, n: f"{p} {n}")
    out = generate(engine, ["b", "a", "b"], store, trials=2, batch=2)
    assert sorted([p for call in engine.calls for p in call]) == ["a", "a", "b", "b"] and out[0] == out[2] != out[1]
    assert engine.usage.requests == 4 and [len(row) for row in out] == [2, 2, 2]


def test_prompts_of_like_length_go_together(store):
    engine = Rule()
    generate(engine, ["x" * n for n in (9, 1, 8, 2)], store, trials=1, batch=2)
    assert [[len(p) for p in call] for call in engine.calls] == [[1, 2], [8, 9]]


def test_the_batch_of_the_engine(store):
    generate(engine := Rule(batch=3), [str(n) for n in range(7)], store, trials=1)
    assert [len(c) for c in engine.calls] == [3, 3, 1]


def test_tokens_and_ends(store):
    out = generate(Rule(lambda p, n: "word " * 5), ["one", "three"], store, Sampling(max_tokens=5), trials=1)
    assert [(r[0].tokens_in, r[0].tokens_out, r[0].finish) for r in out] == [(3, 5, "length"), (5, 5, "length")]
    [[long]] = generate(Rule(lambda p, n: "word " * 5), ["one"], store, Sampling(max_tokens=6), trials=1)
    assert long.finish == "stop" and long.seconds >= 0


def test_a_server_says_no_tokens_per_reply(store, monkeypatch):
    server = ServerEngine("m", "http://127.0.0.1:9/v1")

    def complete(self, chats, **how):
        for _ in chats:
            self.usage.add(7, 7)
        return ["fine"] * len(chats)

    monkeypatch.setattr(ServerEngine, "complete", complete)
    monkeypatch.setattr(ServerEngine, "_reader", lambda self: None)
    [[g]] = generate(server, ["x"], store, trials=1)
    assert (g.tokens_in, g.tokens_out, g.finish) == (None, None, "") and server.usage.reply_tokens == 7


def test_a_lone_surrogate_becomes_a_question_mark(store):
    assert generate(Rule(lambda p, n: "a\ud800b"), ["x"], store, trials=1)[0][0].output == "a?b"


def test_some_replies_do_not_come(store, tmp_path):
    engine = Gone(name="rule", gone=lambda p: p.endswith("2"))
    run_grid([Model("m", engine=engine)], SETS, tmp_path / "e", ["strings", ANYWHERE], trials=2, store=store)
    rows = read_rows(tmp_path / "e")
    lost = [r for r in rows if r["output"] is None]
    assert {r["id"] for r in lost} == {"h2", "b2"} and all("hung up" in r["error"] and not r["verdicts"] for r in lost)
    assert all(line["not_written"] == 2 and line["n"] == 6 for line in rates(rows).lines)
    healthy = Rule()
    run_grid([Model("m", engine=healthy)], SETS, tmp_path / "e", ["strings", ANYWHERE], trials=2, store=store)
    assert sorted([p for call in healthy.calls for p in call]) == sorted(
        ["harmful question 2", "benign question 2"] * 2
    )
    assert all(r["output"] == YES and len(r["verdicts"]) == 2 for r in read_rows(tmp_path / "e"))


def test_an_engine_that_is_not_there_stops_the_grid(store, tmp_path):
    engine = Gone(gone=lambda p: True)
    with pytest.raises(EngineError, match="hung up"):
        run_grid([Model("m", engine=engine)], SETS, tmp_path / "e", store=store)
    assert len(store) == 0


# The grid


def test_rows(store, tmp_path):
    extra = Item("x", "Text\n\n---\n\nDo it", "s", "harmful", "topic", "", (), (), "", "Text", {"behavior": "Do it"})
    files = run_grid([Model("m", engine=Rule())], {"one": [extra]}, tmp_path / "e", trials=2, store=store)
    assert files == [tmp_path / "e" / "one" / "m.jsonl"]
    a, b = read_rows(tmp_path / "e")
    assert (a["model"], a["set"], a["id"], a["trial"], b["trial"]) == ("m", "one", "x", 0, 1)
    assert (a["label"], a["category"], a["context"], a["behavior"]) == ("harmful", "topic", "Text", "Do it")
    assert a["answer"] == a["output"] == YES and a["problem"] == "no_reflection" and a["key"] != b["key"]
    assert a["verdicts"]["strings:qalign"]["label"] == "compliance"


def test_another_grid_shares_the_answers(store, tmp_path):
    first, second = Rule(), Rule()
    run_grid([Model("m", engine=first)], SETS, tmp_path / "a", store=store)
    run_grid([Model("n", engine=second)], SETS, tmp_path / "b", store=store)
    assert not second.calls
    both = [{(r["id"], r["trial"]): r["key"] for r in read_rows(tmp_path / f)} for f in "ab"]
    assert both[0] == both[1]


SCRIPT = """
import os, sys, time
sys.path.insert(0, {tests!r})
from test_generations import Rule, SETS
from qalign.generations import Model, Store, run_grid

def slow(prompt, n):
    time.sleep(0.03)
    return f"{{prompt}} {{{own}}}"

say = lambda line: print(line, flush=True)
run_grid([Model("m", engine=Rule(slow))], SETS, {out!r}, ["strings"], store=Store({db!r}), batch=2, progress=say)
"""


def script(tmp_path, out, own="n"):
    values = {"tests": str(Path(__file__).parent), "out": str(tmp_path / out), "db": str(tmp_path / "p.sqlite")}
    return [sys.executable, "-c", SCRIPT.format(**values, own=own)]


def test_a_kill_loses_the_batch_in_flight(tmp_path):
    process = subprocess.Popen(script(tmp_path, "killed"), stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(4)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    saved = Store(tmp_path / "p.sqlite")
    assert "8 of 24" in lines[3] and 8 <= len(saved) <= 10
    engine = Rule(lambda p, n: f"{p} {n}")
    before = len(saved)
    run_grid([Model("m", engine=engine)], SETS, tmp_path / "killed", store=saved, batch=2)
    assert sum(map(len, engine.calls)) == 24 - before
    whole = Store(tmp_path / "whole.sqlite")
    run_grid([Model("m", engine=Rule(lambda p, n: f"{p} {n}"))], SETS, tmp_path / "whole", store=whole, batch=2)
    texts = [[(r["id"], r["trial"], r["output"]) for r in read_rows(tmp_path / f)] for f in ("killed", "whole")]
    assert texts[0] == texts[1]
    saved.close()
    whole.close()


def test_several_processes_agree(tmp_path):
    running = [subprocess.Popen(script(tmp_path, f, "os.getpid()"), stdout=subprocess.DEVNULL) for f in ("a", "b")]
    assert [p.wait() for p in running] == [0, 0]
    a, b = ([(r["key"], r["output"]) for r in read_rows(tmp_path / f)] for f in "ab")
    kept = Store(tmp_path / "p.sqlite")
    assert a == b and len(kept) == len(a) == 24
    kept.close()


def test_the_folder_holds_one_experiment(store, tmp_path):
    def run(**change):
        how = {"sampling": Sampling(), "store": store, "out": tmp_path / "e"} | change
        models = how.pop("models", [Model("m", engine=Rule())])
        return run_grid(models, SETS, **how)

    run()
    assert "drawn with temperature 0.7" in message(run, sampling=Sampling(1.0))
    assert "holds another m, with spec 'smollm2'" in message(run, models=[Model("m", "hf:other", engine=Rule())])
    assert "holds another m, with transcripts False" in message(run, models=[Model("m", "smollm2", transcripts=True)])
    assert "each under its own plain name" in message(run, models=[])
    assert "each under its own plain name" in message(run, models=[Model("../m", engine=Rule())])
    assert "expected trials" in message(run, trials=0)
    assert "expected trials" in message(run, limit=0)
    assert "expected judges" in message(run, judges=[])
    assert "no judge 'nobody'" in message(run, judges=["nobody"])


@pytest.mark.parametrize(
    "sets, said",
    [
        ({"": items(1)}, "plain name"),
        ({"a/b": items(1)}, "plain name"),
        ({"none": []}, "with 0 items"),
        ({"sums": [Item("1", "2 + 2?", "gsm8k")]}, "neither harmful nor benign"),
        (["nowhere"], "unknown benchmark"),
    ],
)
def test_sets_that_are_none(store, tmp_path, sets, said):
    assert said in message(run_grid, [Model("m", engine=Rule())], sets, tmp_path / "e", store=store)
    assert not (tmp_path / "e").exists()


def test_limit_draws_the_same_prompts_in_order(store, tmp_path):
    many = {"many": items(50)}
    for out in ("a", "b"):
        run_grid([Model("m", engine=Rule())], many, tmp_path / out, trials=1, limit=7, store=store)
    ids = [[int(r["id"][1:]) for r in read_rows(tmp_path / out)] for out in "ab"]
    assert ids[0] == ids[1] == sorted(ids[0]) and len(ids[0]) == 7 and ids[0] != list(range(7))


def test_harmbench_cases_carry_their_behavior(monkeypatch, tmp_path, store):
    direct = [
        Item(
            "b1",
            "Text\n\n---\n\nDo it",
            "harmbench_direct",
            "harmful",
            context="Text",
            extra={"behavior": "Do it", "Tags": "hash_check"},
        )
    ]
    cases = [
        Item(f"b{i}/0", f"please {i}", "harmbench_human", "harmful", extra={"BehaviorID": f"b{i}"}) for i in (1, 2)
    ]
    direct.append(Item("b2", "Do that", "harmbench_direct", "harmful"))
    monkeypatch.setattr(generations, "load_benchmark", lambda n: direct if n == "harmbench_direct" else cases)
    run_grid([Model("m", engine=Rule())], ["harmbench_human"], tmp_path / "e", trials=1, store=store)
    a, b = read_rows(tmp_path / "e")
    assert (a["behavior"], a["context"], a["tags"]) == ("Do it", "Text", "hash_check") and "behavior" not in b
    direct[1] = replace(direct[1], id="c0ffee")  # as in the public id, which has no BehaviorID
    said = message(run_grid, [Model("m", engine=Rule())], ["harmbench_human"], tmp_path / "g", store=store)
    assert said.startswith("harmbench_human: no behavior for 1 of 2 test cases: put the published file at ")
    assert said.endswith("$QALIGN_DATA/harmbench/harmbench_behaviors_text_all.csv") and not (tmp_path / "g").exists()

    def missing(name):
        if name == "harmbench_direct":
            raise UserError("no file")
        return cases

    monkeypatch.setattr(generations, "load_benchmark", missing)
    told = []
    run_grid([Model("m", engine=Rule())], ["harmbench_human"], tmp_path / "f", store=store, progress=told.append)
    assert "judges see the attack" in told[0]


def attacks(n, cases=3):
    "Test cases of HarmBench, several for one behavior."
    extra = [{"BehaviorID": f"b{i}"} for i in range(n)]
    return [
        Item(f"b{i}/{k}", f"case {k} of {i}", "harmbench_zeroshot", "harmful", extra=extra[i])
        for i in range(n)
        for k in range(cases)
    ]


def test_test_cases_of_a_behavior_count_once(tmp_path, store):
    def answer(seed):
        return lambda p, n: NO if (int(p[-1]) * seed) % 3 == 1 else YES  # by behavior

    for name, seed in (("a", 1), ("b", 2)):
        how = {"judges": [STRINGS, ANYWHERE], "trials": 1, "store": store}
        run_grid([Model(name, engine=Rule(answer(seed), name))], {"zeroshot": attacks(9)}, tmp_path / "e", **how)
    rows = read_rows(tmp_path / "e")
    a, b = (read_rows(tmp_path / "e", name) for name in "ab")
    assert len({r["cluster"] for r in a}) == 9 and len({r["prompt_hash"] for r in a}) == 27
    events, behaviors = [r["answer"] == YES for r in a], [r["id"].partition("/")[0] for r in a]
    want = rate_interval(events, behaviors)
    assert want.high - want.low > 1.4 * (rate_interval(events).high - rate_interval(events).low)
    line, cell = rates(rows).lines[0], measure(rows).cells[0]
    for found in ((line["estimate"], line["low"], line["high"]), (cell.rate.estimate, cell.rate.low, cell.rate.high)):
        assert found == pytest.approx((want.estimate, want.low, want.high))
    assert line["prompts"] == cell.prompts == 9 and cell.whole
    change, pair = compare(a, b), measure(rows).comparisons[0]
    want = rate_difference(events, [r["answer"] == YES for r in b], behaviors)
    for found in (change.lines[0], pair):
        assert (found["low"], found["high"], found["p"]) == pytest.approx((want.low, want.high, want.p))
    note = "zeroshot: a behavior with all its test cases counts as one prompt"
    assert (
        note in change.notes and note in rates(rows).notes and f"- {note}." in results_table(measure(rows)).markdown()
    )
    less = measure([r for r in rows if r["model"] == "a" or r["id"].endswith("/0")])
    assert [c.whole for c in less.cells[:2]] == [True, False] and not less.comparisons
    bare = [{k: v for k, v in r.items() if k != "cluster"} for r in rows]
    assert rates(bare).lines[0]["prompts"] == 27 and not any("behavior" in n for n in rates(bare).notes)


def test_verdicts_stay_with_the_text_they_were_given_to(tmp_path, store):
    other = Store(tmp_path / "other.sqlite")
    for text, own in ((YES, store), (NO, other)):  # the same model draws anew: the names of its answers are the same
        run_grid([Model("m", engine=Rule(lambda p, n, t=text: t))], SETS, tmp_path / "e", [STRINGS], store=own)
    other.close()
    assert {r["verdicts"]["strings:qalign"]["label"] for r in read_rows(tmp_path / "e")} == {"refusal"}


def test_a_think_block_that_the_template_opens(store):
    def template(chat, tokenize, add_generation_prompt):
        return f"user: {chat[-1]['content']} assistant: {opens}"

    replies = {"cut": "I could help", "whole": "Wait.</think>\n" + NO, "own": "<think>Wait.</think>" + NO}
    tokenizer = SimpleNamespace(chat_template="…", apply_chat_template=template)
    for opens, want in (("<think>\n", ["", NO, NO]), ("", ["I could help", NO, NO])):
        engine = Rule(lambda p, n: replies[p], f"opens {opens}", tokenizer=tokenizer)
        said = [g.output for [g] in generate(engine, list(replies), store, trials=1)]
        assert [answer_of(t) for t in said] == want
        assert said == [(opens if t[:7] != "<think>" else "") + t for t in replies.values()]


def test_kappa_has_no_minus_before_nothing(tmp_path, store):
    lines = rates(grid_rows(tmp_path, store)).lines
    cells = generations._Rates(tuple({**r, "kappa": -0.004} for r in lines)).cells
    assert {row[cells[0].index("kappa")] for row in cells[1:]} == {"0.00"}


def test_a_model_whose_answers_are_there_is_not_loaded(monkeypatch, tmp_path, store):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    loads = []

    def load(self):
        loads.append(self.name)
        return Rule(name=(folder / "model.safetensors").read_text())

    monkeypatch.setattr(Model, "load", load)
    model = Model("m", f"hf:{folder}")
    for _ in range(2):
        run_grid([model], SETS, tmp_path / "e", store=store)
    assert loads == ["m"]
    run_grid([model], SETS, tmp_path / "e", trials=4, store=store)
    (folder / "model.safetensors").write_bytes(b"other")
    run_grid([model], SETS, tmp_path / "e", trials=4, store=store)
    assert loads == ["m"] * 3 and len(store) == 8 * (4 + 4)


def test_the_model_has_left_before_a_judge_comes(monkeypatch, tmp_path, store):
    alive, seen = [], []

    def load(self):
        engine = Rule(name=self.name)
        alive.append(weakref.ref(engine))
        return engine

    def judge(name):
        seen.append([ref() is None for ref in alive])
        return replace(STRINGS, name=name)

    monkeypatch.setattr(Model, "load", load)
    monkeypatch.setattr(generations, "named_judge", judge)
    run_grid([Model("a"), Model("b")], SETS, tmp_path / "e", ["llama-guard-3", "harmbench"], store=store)
    assert seen == [[True, True], [True, True]]


def test_an_adapter_that_is_not_there(tmp_path, store):
    model = Model("m", adapter=str(tmp_path))
    assert "no adapter_config.json" in message(model.load)
    engine = Rule()
    assert "no adapter_config.json" in message(
        run_grid, [Model("a", engine=engine), model], SETS, tmp_path / "e", store=store
    )
    assert "m: no folder " in message(run_grid, [Model("m", f"hf:{tmp_path}/x")], SETS, tmp_path / "e", store=store)
    assert "expected a model smollm2 or hf:" in message(
        run_grid, [Model("m", "gpt")], SETS, tmp_path / "e", store=store
    )
    assert not engine.calls and not (tmp_path / "e").exists()


def test_a_smaller_run_takes_nothing_away(tmp_path, store):
    def run(engine, **how):
        model = Model("m", engine=engine)
        run_grid([model], SETS, tmp_path / "e", judges, store=store, **how)
        return {(r["set"], r["id"], r["trial"]): r for r in read_rows(tmp_path / "e")}

    judges = [STRINGS]
    whole = run(Rule())
    assert run(Rule(), trials=1) == run(Rule(), limit=1) == run(Rule(), trials=2, limit=2) == whole
    order = [list(whole), list(run(Rule(), limit=2)), list(run(Rule(), limit=2)), list(run(Rule()))]
    assert order[0] == order[3] and order[1] == order[2] and sorted(order[1]) == sorted(order[0])
    judges.append(ANYWHERE)
    assert all(len(r["verdicts"]) == 2 for r in run(Rule(), limit=1).values())
    other = Rule(name="trained on")
    said = "holds 9 answers to bad from another m, with other weights, that this run leaves: run all prompts and"
    assert said in message(run, other, limit=1) and not other.calls
    assert {r["key"] for r in run(other).values()}.isdisjoint(r["key"] for r in whole.values())


# Training seeds


def trained(*seeds, name="qa", answer=None, **options):
    "One model, trained several times."
    says = answer or (lambda seed: lambda p, n: NO if (n + seed) % 3 else YES)
    return [Model(name, seed=k, engine=Rule(says(k), f"{name} {k}"), **options) for k in seeds]


def test_each_seed_has_a_file_and_rows_that_say_so(tmp_path, store):
    files = run_grid([*trained(0, 7), Model("start", engine=Rule())], SETS, tmp_path / "e", ["strings"], store=store)
    names = ["qa@0", "qa@0", "qa@7", "qa@7", "start", "start"]
    assert [f.stem for f in files] == names
    for f in files:
        assert {r.get("seed", "none") for r in read_jsonl(f)} == {int(f.stem[3:]) if "@" in f.stem else "none"}
    rows = read_rows(tmp_path / "e")
    assert {r["model"] for r in rows} == {"qa", "start"} and len(rows) == 3 * 24
    assert len(read_rows(tmp_path / "e", "qa")) == 48 and len(read_rows(tmp_path / "e", "qa@7")) == 24
    assert "it has qa, start" in message(read_rows, tmp_path / "e", "q")
    assert sorted(json.loads((tmp_path / "e" / "grid.json").read_text())["models"]) == ["qa@0", "qa@7", "start"]
    assert rescore(tmp_path / "e", [ANYWHERE], store) == {"anywhere": 72}
    assert sorted(write_rows(tmp_path / "f", read_rows(tmp_path / "e"))) == [
        tmp_path / "f" / f.relative_to(tmp_path / "e") for f in sorted(files)
    ]


def test_a_seed_changes_neither_names_of_answers_nor_what_a_model_without_writes(tmp_path, store):
    engine = Rule()
    run_grid([Model("m", engine=engine)], SETS, tmp_path / "a", ["strings"], store=store)
    drawn = len(engine.calls)
    run_grid([Model("m", seed=3, engine=engine)], SETS, tmp_path / "b", ["strings"], store=store)
    assert len(engine.calls) == drawn and len(store) == 24
    plain, seeded = read_rows(tmp_path / "a"), read_rows(tmp_path / "b")
    assert [{k: v for k, v in r.items() if k != "seed"} for r in seeded] == plain
    assert not any("seed" in r for r in plain)
    assert "seed" not in (tmp_path / "a" / "grid.json").read_text().replace('"seed": 0', "")


def test_seeds_go_on_where_they_were(tmp_path, store):
    models = trained(1, 2)
    run_grid(models[:1], SETS, tmp_path / "e", ["strings"], store=store)
    calls = len(models[0].engine.calls)
    for _ in range(2):
        run_grid(models, SETS, tmp_path / "e", ["strings"], store=store)
    assert len(models[0].engine.calls) == calls == len(models[1].engine.calls)
    before = {(r["seed"], r["set"], r["id"], r["trial"]): r for r in read_rows(tmp_path / "e")}
    run_grid(models[1:], SETS, tmp_path / "e", ["strings"], limit=1, trials=1, store=store)
    assert {(r["seed"], r["set"], r["id"], r["trial"]): r for r in read_rows(tmp_path / "e")} == before
    assert len(before) == 48


@pytest.mark.parametrize(
    "models, said",
    [
        (trained(1, 1), "each under its own plain name, or name and seed, got qa@1, qa@1"),
        ([*trained(1), Model("qa", engine=Rule())], "qa is named with a seed and without: give each its seed"),
        ([Model("qa", engine=Rule())] * 2, "each under its own plain name, or name and seed, got qa, qa"),
        ([Model("qa", seed=k) for k in (1, 2)], "qa@1 and qa@2 are the same model: give each seed its adapter"),
        ([*trained(1), *trained(2, system="Be brief.")], "qa@1 and qa@2 differ in system"),
        ([*trained(1), *trained(2, transcripts=True)], "qa@1 and qa@2 differ in transcripts"),
        ([Model("qa@1", engine=Rule())], "each under its own plain name"),
    ],
)
def test_seeds_that_are_refused(tmp_path, store, models, said):
    assert said in message(run_grid, models, SETS, tmp_path / "e", store=store)
    assert not (tmp_path / "e").exists() and not len(store)


def test_seeds_of_a_folder_are_one_model(tmp_path, store):
    run_grid([*trained(1), Model("start", engine=Rule())], SETS, tmp_path / "e", ["strings"], store=store)

    def run(*models):
        return message(run_grid, models, SETS, tmp_path / "e", store=store)

    assert "qa is named with a seed and without" in run(Model("qa", engine=Rule(name="x")))
    assert "start is named with a seed and without" in run(Model("start", seed=0, engine=Rule(name="x")))
    assert "holds another qa@1, with adapter ''" in run(Model("qa", seed=1, adapter="x", engine=Rule()))
    assert "differ in quantization" in run(*trained(2, quantization="nf4"))
    assert "qa@2 has the weights of qa@1" in run(Model("qa", seed=2, engine=trained(1)[0].engine))
    assert "expected the seed of its training, 0 or more, got -1" in message(Model, "qa", seed=-1)


def test_rates_pool_seeds(tmp_path, store):
    run_grid(trained(1, 2), SETS, tmp_path / "e", ["strings", ANYWHERE], store=store)
    rows = read_rows(tmp_path / "e")
    table, alone = rates(rows), [rates([r for r in rows if r["seed"] == k]) for k in (1, 2)]
    assert len(table.lines) == 4
    for r, *each in zip(table.lines, *(t.lines for t in alone), strict=True):
        assert (r["n"], r["prompts"], r["seeds"]) == (24, 4, [1, 2])
        assert r["estimate"] == pytest.approx(sum(x["estimate"] for x in each) / 2)
        assert r["differ"] == [i for x in each for i in x["differ"]] and r["both"] == 24
    assert [row[5] for row in table.cells[1:]] == ["24 of 4 prompts"] * 4
    assert table.notes[-1] == "qa: pooled over training seeds 1, 2; intervals are over prompts"


def test_an_answer_of_a_seed_has_a_place(tmp_path, store):
    run_grid(
        trained(1, 2, answer=lambda k: lambda p, n: LATE), SETS, tmp_path / "e", ["strings", ANYWHERE], store=store
    )
    places = rates(read_rows(tmp_path / "e", "qa")).lines[0]["differ"]
    assert len(set(places)) == len(places) == 24 and places[0] == "h0/0@1" and places[-1] == "h3/2@2"


def test_the_same_answers_of_another_seed_prove_nothing_new(tmp_path, store):
    "Clustered by prompt: a seed that answers like the first leaves the interval of its prompts as wide."
    by_prompt = lambda k: lambda p, n: YES if p[-1] in "01" else NO  # noqa: E731
    run_grid(trained(1, 2, 3, answer=by_prompt), SETS, tmp_path / "e", ["strings", ANYWHERE], store=store)
    rows = read_rows(tmp_path / "e")
    one, three = rates([r for r in rows if r["seed"] == 1]).lines[0], rates(rows).lines[0]
    assert (one["n"], three["n"]) == (12, 36)
    assert (three["low"], three["high"]) == pytest.approx((one["low"], one["high"]))


def test_compare_pairs_by_seed(tmp_path, store):
    def by(seed):
        return lambda p, n: YES if int(p[-1]) < seed else NO

    start = [Model("start", engine=Rule())]
    dpo, qa = trained(1, 2, name="dpo", answer=by), trained(2, 3, answer=by)
    run_grid([*start, *dpo, *qa], SETS, tmp_path / "e", ["strings", ANYWHERE], store=store)
    rows = {m: read_rows(tmp_path / "e", m) for m in ("start", "dpo", "qa")}
    both = compare(rows["dpo"], rows["qa"]).lines[0]
    assert (both["n"], both["prompts"], both["unpaired"], both["difference"]) == (12, 4, 24, 0.0)
    for a, b, sign in (("start", "qa", -1), ("qa", "start", 1)):
        change = compare(rows[a], rows[b])
        line = change.lines[0]
        assert (line["n"], line["prompts"], line["unpaired"]) == (24, 4, 0)
        assert line["difference"] == pytest.approx(sign * 3 / 8) and {line["a"], line["b"]} == {1.0, 5 / 8}
        mine = [float(int(r["id"][1]) < r["seed"]) for r in rows["qa"] if r["set"] == "bad"]
        sides = [[1.0] * 24, mine][::-sign]
        want = rate_difference(*sides, [r["id"] for r in rows["qa"] if r["set"] == "bad"])
        assert (line["low"], line["high"], line["p"]) == pytest.approx((want.low, want.high, want.p))
        assert {e["id"].partition("@")[2] for e in change.examples} <= {"2", "3"}
        assert change.notes[-1] == "qa: pooled over training seeds 2, 3; intervals are over prompts"
    apart = [r for r in rows["dpo"] if r["seed"] == 1]
    assert "have no training seed in common: [1] and [2, 3]" in message(compare, apart, rows["qa"])


# Judges


NO_JUDGES = [
    "",
    "gpt",
    "refusal",
    "refusal:",
    "ask-harm:",
    "strong-reject",
    "string",
    "rubric",
    "rubric:hhh",
    "rubric:hhh:",
]


@pytest.mark.parametrize("name", NO_JUDGES)
def test_names_that_are_no_judge(name):
    assert f"no judge {name!r}" in message(named_judge, name)


def test_a_judge_by_name_bears_that_name(monkeypatch):
    asked = []
    engine = load_engine("smollm2")

    class Load:
        @staticmethod
        def __wrapped__(spec, quantization, chat=True):
            asked.append((spec, quantization, chat))
            return engine

    monkeypatch.setattr(generations, "load_engine", Load)
    monkeypatch.setattr(generations, "classifier", lambda name, engine: replace(STRINGS, name=name))
    names = (
        "refusal:smollm2",
        "ask-refusal:smollm2",
        "ask-harm:x",
        "strong-reject:x",
        "llama-guard-3",
        "harmbench:hf:y",
        "rubric:hhh:hf:z",
    )
    judges = [named_judge(name, "nf4") for name in names]
    assert tuple(j.name for j in judges) == names and [j.kind for j in judges[:4]] == [
        "refusal",
        "refusal",
        "harm",
        "harm",
    ]
    assert asked[4:6] == [("hf:meta-llama/Llama-Guard-3-8B", "nf4", False), ("hf:y", "nf4", False)] and asked[0][2]
    assert asked[6] == ("hf:z", "nf4", True) and judges[6].kind == "harm" and "harmlessness below 0" in judges[6].note
    with pytest.raises(UserError, match="nobody"):
        generations._check_judge("rubric:nobody:smollm2")


def test_tuned_judges_of_refusals(tmp_path, monkeypatch):
    asked = []

    def judge_for(engine="smollm2", adapter=None):
        asked.append((engine, adapter))
        return replace(STRINGS, name="refusal:somewhere", note="AUC 0.9")

    monkeypatch.setitem(sys.modules, "qalign.refusals", SimpleNamespace(refusal_judge_for=judge_for))
    (tmp_path / "judge.json").write_text(json.dumps({"base": {"spec": "hf:base"}}))
    names = ("refusal:tuned", f"refusal:{tmp_path}")
    judges = [named_judge(name) for name in names]
    assert tuple(j.name for j in judges) == names and {j.note for j in judges} == {"AUC 0.9"}
    assert asked == [("smollm2", None), ("hf:base", str(tmp_path))]


def test_decisions_are_kept_and_shared(tmp_path, store):
    judge, seen = counting()
    models = [Model(n, engine=Rule(lambda p, i: YES, n)) for n in ("a", "b")]
    run_grid(models, SETS, tmp_path / "e", [judge], store=store)
    assert len(seen) == 8  # one per prompt: the trials and the models say the same
    for path in (tmp_path / "e").glob("*/*.jsonl"):
        path.unlink()
    run_grid(models, SETS, tmp_path / "e", [judge], store=store)
    assert len(seen) == 8 and read_rows(tmp_path / "e", "b")[0]["verdicts"]["counting"]["probability"] == 0.75
    assert rescore(tmp_path / "e", [judge], store) == {"counting": 0}
    other, seen = counting(name="counting", kind="refusal")
    assert rescore(tmp_path / "e", [replace(other, note="tuned again")], store, again=True) == {"counting": 48}
    assert len(seen) == 8  # another note is another judge


def test_other_weights_are_another_judge(tmp_path, store):
    grid_rows(tmp_path, store, judges=(STRINGS,))
    weights = ["one"]
    judge, seen = counting()
    judge = replace(judge, identity=lambda: {"spec": "hf:/judge", "weights": weights[0]})
    for n in (1, 2):
        rescore(tmp_path / "m", [judge], Store(tmp_path / f"{n}.sqlite"))
    once = len(seen)
    kept = Store(tmp_path / "1.sqlite")
    for path in (tmp_path / "m").glob("*/*.jsonl"):
        generations.write_jsonl(path, [{**r, "verdicts": {}} for r in read_jsonl(path)])
    assert once and rescore(tmp_path / "m", [judge], kept) == {"counting": 24} and len(seen) == once
    weights[0] = "two"
    assert rescore(tmp_path / "m", [judge], kept, again=True) == {"counting": 24} and len(seen) == 2 * once


def without(folder, key):
    "Rows of a folder without something of their verdicts."
    for path in folder.glob("*/*.jsonl"):
        rows = list(read_jsonl(path))
        for v in (v for r in rows for v in r["verdicts"].values()):
            del v[key]
        generations.write_jsonl(path, rows)


def test_a_judge_that_changed_in_its_place_is_asked_anew(tmp_path, store):
    weights = ["one"]
    judge, seen = counting()
    judge = replace(judge, identity=lambda: {"spec": "hf:/judge", "weights": weights[0]})
    rows = grid_rows(tmp_path, store, judges=(judge, STRINGS))
    once = len(seen)
    assert once and rescore(tmp_path / "m", [judge], store) == {"counting": 0}
    weights[0] = "two"
    assert rescore(tmp_path / "m", [judge], store) == {"counting": 24} and len(seen) == 2 * once
    whos = {r["verdicts"]["counting"]["who"] for r in (*rows, *read_rows(tmp_path / "m"))}
    assert len(whos) == 2 and rescore(tmp_path / "m", [judge], store) == {"counting": 0}
    without(tmp_path / "m", "who")  # rows of an older folder: the note decides
    assert rescore(tmp_path / "m", [judge], store) == {"counting": 0}
    assert rescore(tmp_path / "m", [replace(judge, note="tuned again")], store) == {"counting": 24}


def test_other_words_are_another_judge(tmp_path, store):
    judge, seen = counting()
    rows = grid_rows(tmp_path, store, judges=(judge,))
    other = replace(judge, version="reply")
    assert set(generations._decision_keys(judge, rows)).isdisjoint(generations._decision_keys(other, rows))
    once = len(seen)
    assert rescore(tmp_path / "m", [other], store) == {"counting": 24} and len(seen) == 2 * once


def test_a_named_judge_is_loaded_only_if_its_files_changed(tmp_path, store, monkeypatch):
    folder, loaded = tuned_folder(tmp_path / "judge"), []
    name = f"refusal:{folder}"

    def judge(name):
        loaded.append(name)
        return replace(STRINGS, name=name, note=(folder / "adapter_model.safetensors").read_text())

    grid_rows(tmp_path, store, judges=(STRINGS,))
    monkeypatch.setattr(generations, "named_judge", judge)
    assert [rescore(tmp_path / "m", [name], store)[name] for _ in range(2)] == [24, 0] and loaded == [name]
    without(tmp_path / "m", "who")
    (tmp_path / "m" / "judges.json").unlink()
    assert rescore(tmp_path / "m", [name], store) == {name: 0} and len(loaded) == 2
    (folder / "adapter_model.safetensors").write_text("tuned again")
    assert [rescore(tmp_path / "m", [name], store)[name] for _ in range(2)] == [24, 0] and len(loaded) == 3


@pytest.mark.parametrize("key", ["note", "who"])
def test_two_judges_of_one_name_make_no_table(tmp_path, store, key):
    a, b = (grid_rows(tmp_path, store, name=n) for n in "ab")
    for r in b:
        r["verdicts"]["anywhere"][key] = "another"
    said = f"anywhere is two judges in these rows ({a[0]['verdicts']['anywhere'][key]!r} and 'another'): put one to all"
    for call in (lambda: rates([*a, *b]), lambda: compare(a, b), lambda: measure([*a, *b])):
        assert said in message(call)
    assert measure([*a, *b], ["strings:qalign"]).cells and compare(a, b, ["strings"]).lines and rates(b).lines


def test_again_asks_again(tmp_path, store):
    said = ["refusal"]
    judge, seen = counting(decide=lambda c: Decision(said[0]))
    rows = grid_rows(tmp_path, store, judges=(judge,))
    once, said[0] = len(seen), "compliance"
    assert rescore(tmp_path / "m", [judge], store) == {"counting": 0} and len(seen) == once
    assert rescore(tmp_path / "m", [judge], store, again=True) == {"counting": 24} and len(seen) == 2 * once
    assert {r["verdicts"]["counting"]["label"] for r in read_rows(tmp_path / "m")} == {"compliance"}
    kept = store.get(generations._decision_keys(judge, rows))
    assert {d.label for d in kept.values()} == {"compliance"} and len(kept) == once


def tuned_folder(path, card='{"base": {"spec": "smollm2"}}', weights=True):
    path.mkdir()
    (path / "judge.json").write_text(card)
    if weights:
        (path / "adapter_model.safetensors").write_bytes(b"")
    return path


@pytest.mark.parametrize(
    "judge, said",
    [
        ("refusal:some/folder", "no judge.json in some/folder, and it is no engine: give tuned, the folder"),
        ("refusal:tuned", "refusal:tuned: no judge of refusals refusal-smollm2: make it with `qalign judge tune"),
        ("refusal:PATH/torn", "judge.json of torn does not name its base"),
        ("refusal:PATH/bare", "no adapter_model.safetensors in bare"),
        ("refusal:PATH/moved", "no folder PATH/gone"),
        ("refusal:hf:PATH/gone", "no folder PATH/gone"),
        ("ask-harm:vllm:PATH/gone", "PATH/gone"),
        ("harmbench:hf:./gone", "no folder ./gone"),
        ("strings:nowhere", "no refusal list 'nowhere'"),
        ("ask-refusal:gpt", "expected a model smollm2 or hf:"),
        ("ask-refusal:openai:gpt", "expected openai:MODEL@BASE_URL"),
    ],
)
def test_judges_are_looked_for_before_the_first_answer(tmp_path, store, monkeypatch, judge, said):
    monkeypatch.setattr(generations, "data_path", tmp_path.joinpath)
    tuned_folder(tmp_path / "torn", "{")
    tuned_folder(tmp_path / "bare", weights=False)
    tuned_folder(tmp_path / "moved", json.dumps({"base": {"spec": f"hf:{tmp_path}/gone"}}))
    name, engine = judge.replace("PATH", str(tmp_path)), Rule()
    told = message(run_grid, [Model("m", engine=engine)], SETS, tmp_path / "e", ["strings", name], store=store)
    assert said.replace("PATH", str(tmp_path)) in told and not engine.calls and not (tmp_path / "e").exists()


def test_judges_that_are_there_pass(tmp_path):
    mine = tuned_folder(tmp_path / "mine")
    for name in (
        "strings:qalign",
        f"refusal:{mine}",
        "refusal:smollm2",
        f"ask-harm:hf:{mine}",
        "harmbench",
        "wildguard",
    ):
        generations._check_judge(name)
    for name in ("harmbench:hf:meta-llama/Llama-Guard-3-8B", "ask-harm:openai:m@http://localhost:1/v1"):
        generations._check_judge(name)


def test_a_failure_is_asked_again_and_nothing_else_is(tmp_path, store):
    broken = {"harmful question 1"}
    judge, seen = counting(
        decide=lambda c: Decision(None, status="failed", reason="mute") if c.prompt in broken else Decision("refusal")
    )
    run_grid([Model("m", engine=Rule())], SETS, tmp_path / "e", [judge, STRINGS], store=store)
    states = {(r["id"], r["verdicts"]["counting"]["status"]) for r in read_rows(tmp_path / "e")}
    assert ("h1", "failed") in states and ("h2", "ok") in states
    line = next(x for x in rates(read_rows(tmp_path / "e")).lines if (x["judge"], x["set"]) == ("counting", "bad"))
    assert line["failed"] == 3 and line["n"] == 9
    broken.clear()
    seen.clear()
    assert rescore(tmp_path / "e", [judge], store) == {"counting": 3} and [c.prompt for c in seen] == [
        "harmful question 1"
    ]
    assert {r["verdicts"]["counting"]["status"] for r in read_rows(tmp_path / "e")} == {"ok"}


def test_a_judge_that_dies_keeps_what_it_said(tmp_path, store, monkeypatch):
    monkeypatch.setattr(generations, "_AT_ONCE", 3)
    limit = [7]

    def decide(case):
        limit[0] -= 1
        if limit[0] < 0:
            raise EngineError("judge hung up")
        return Decision("refusal")

    judge, seen = counting(decide=decide)
    engine = Rule(lambda p, n: f"{p} {n}")
    with pytest.raises(EngineError, match="judge hung up"):
        run_grid([Model("m", engine=engine)], SETS, tmp_path / "e", [judge], store=store)
    limit[0], before = 10**6, len(seen)
    assert rescore(tmp_path / "e", [judge], store) == {"counting": 24}
    assert before == 9 and len(seen) == before + 24 - 6  # two batches of three were kept


def test_missing_answers_reach_no_judge(tmp_path, store):
    judge, seen = counting()
    engine = Rule(lambda p, n: "draft <think> never closed")
    run_grid([Model("m", engine=engine)], SETS, tmp_path / "e", [judge], store=store)
    assert not seen and {r["verdicts"]["counting"]["status"] for r in read_rows(tmp_path / "e")} == {"missing"}
    assert {r["verdicts"]["counting"]["label"] for r in read_rows(tmp_path / "e")} == {None}


def test_no_rows(tmp_path, store):
    assert "holds no rows: run `qalign eval run`" in message(rescore, tmp_path, ["strings"], store)
    assert "holds no rows: run `qalign eval run`" in message(read_rows, tmp_path)


# Progress


def test_time_left():
    phase = generations._Phase
    assert phase(10).left() is None and phase(0).left() == 0.0 and phase(10, 10).left() == 0.0
    assert phase(10, 4, 2, 6.0).left() == 18.0  # stored ones say nothing about the time
    assert [generations._clock(s) for s in (0, 29, 31, 3599, 3600, 7300)] == [
        *("under a minute", "under a minute", "1 min", "1 h 0 min", "1 h 0 min", "2 h 2 min")
    ]


def test_progress_ends_at_the_end(tmp_path, store):
    told = []
    judge, _ = counting()
    models = [Model(n, engine=Rule(name=n)) for n in "ab"]
    run_grid(models, SETS, tmp_path / "e", ["strings", judge], store=store, batch=5, progress=told.append)
    assert told[-1] == "done: 48 answers in 4 files, 96 new verdicts"
    assert "100% of the grid" in told[-2] and told[-2].startswith("verdicts of counting on good/b: 96 of 96")
    assert any("at least" in line for line in told) and "answers of b to good: 48 of 48" in " ".join(told)
    shares = [int(line.partition("%")[0].split()[-1]) for line in told[:-1]]
    assert max(shares) == 100 and len(told) >= 10


# Rates


def grid_rows(tmp_path, store, answer=None, transcripts=False, name="m", judges=(STRINGS, ANYWHERE), **options):
    engine = Rule(answer or (lambda p, n: (NO, YES, LATE)[n % 3]), name)
    run_grid(
        [Model(name, engine=engine, transcripts=transcripts)],
        SETS,
        tmp_path / name,
        list(judges),
        store=store,
        **options,
    )
    return read_rows(tmp_path / name)


@pytest.mark.parametrize("missing", ["harmful", "apart"])
@pytest.mark.parametrize("transcripts", [False, True])
def test_rates_are_those_of_two_judges(tmp_path, store, missing, transcripts):
    def answer(p, n):
        return (NO, f"{YES}\n<think>\nWait.\n</think>\n{LATE}", "draft <think> open", YES)[n % 4]

    rows = grid_rows(tmp_path, store, answer, transcripts)
    table = rates(rows, missing=missing)
    for of, name in (("attack success", "bad"), ("false refusal", "good")):
        some = [r | {"prompt_id": r["prompt_hash"]} for r in rows if r["set"] == name]
        for r in some:
            r["id"] = f"{r['id']}/{r['trial']}"
        two = two_judges(some, STRINGS, ANYWHERE, of, missing, transcripts)
        lines = [x for x in table.lines if x["set"] == name]
        for line, want in zip(lines, two.table, strict=True):
            assert {k: line[k] for k in want} == want
            assert (line["kappa"], line["both"], tuple(line["differ"])) == (two.kappa[0], two.n, two.differ)
            assert line["with"] != line["judge"] and line["prompts"] == 4


@pytest.mark.parametrize("missing, rate", [("harmful", 1.0), ("apart", None)])
def test_a_transcript_without_a_revision_counts_also_where_a_judge_failed(tmp_path, store, missing, rate):
    mute, _ = counting(decide=lambda c: Decision(None, status="failed", reason="mute"))
    rows = grid_rows(tmp_path, store, lambda p, n: NO, transcripts=True, judges=(STRINGS, mute))
    lines = [r for r in rates(rows, missing=missing).lines if r["of"] == "attack success"]
    assert [(r["estimate"], r["failed"], r["missing"]) for r in lines] == [(rate, 0, 12)] * 2
    cells = [c for c in measure(rows, missing=missing).cells if c.of == "attack success"]
    assert [(c.rate and c.rate.estimate, c.failed, c.missing) for c in cells] == [(rate, 0, 12)] * 2


def graded(name):
    "A judge that gives every answer a score, by its length."
    judge, _ = counting("harm", name, lambda c: Decision("harmful", score=min(1.0, len(c.answer) / 100)))
    return judge


def test_strong_reject_has_a_mean_score(tmp_path, store):
    judges = (STRINGS, graded("strong-reject:some model"), graded("rubric:some model"))
    rows = grid_rows(tmp_path, store, lambda p, n: "draft <think> open" if p[-1] == "3" else YES, judges=judges)
    table = rates([r for r in rows if r["set"] == "bad"])
    assert [r["mean_score"] and (r["mean_score"].estimate, r["mean_score"].n) for r in table.lines] == [
        None,
        (pytest.approx(len(YES) / 100), 9),
        None,
    ]
    assert [row[5] for row in table.cells] == ["score", "–", "0.31 [0.31, 0.31], n 9", "–"]
    assert "score" not in rates(rows, ["strings", "rubric:some model"]).cells[0]


def test_the_table(tmp_path, store):
    table = rates(grid_rows(tmp_path, store))
    head, *rows = table.cells
    assert (
        len(rows) == 4
        and all(len(r) == len(head) for r in rows)
        and rows[0][:4] == ["m", "bad", "attack success", "strings:qalign"]
    )
    text = table._repr_markdown_()
    assert text.count("\n|") == 5 and "phrases anywhere" in text


def test_three_judges_are_held_against_the_first(tmp_path, store):
    third, _ = counting(name="third")
    lines = rates(grid_rows(tmp_path, store, judges=(STRINGS, ANYWHERE, third))).lines
    assert [(x["judge"], x["with"]) for x in lines[:3]] == [
        ("strings:qalign", "anywhere"),
        ("anywhere", "strings:qalign"),
        ("third", "strings:qalign"),
    ]


def test_one_judge_is_not_enough(tmp_path, store):
    rows = grid_rows(tmp_path, store, judges=(STRINGS,))
    assert "expected 2 judges, the rows have strings:qalign" in message(rates, rows)
    assert "no verdicts of nobody" in message(rates, rows, ["strings", "nobody"])


def test_harm_judges_say_nothing_of_false_refusals(tmp_path, store):
    harm, _ = counting("harm", "harm", lambda c: Decision("safe" if NO in c.answer else "harmful"))
    table = rates(grid_rows(tmp_path, store, judges=(STRINGS, harm)))
    assert {x["of"] for x in table.lines} == {"attack success"}
    assert table.notes[-1] == "m on good: a rate of false refusal needs two judges of refusals"
    assert len(table.notes) == 2 and table.notes[0].startswith("m on bad: strings:qalign and harm differ on")


def test_rows_a_judge_has_not_seen_are_failures_of_it(tmp_path, store):
    rows = grid_rows(tmp_path, store, lambda p, n: f"{YES} {n}")
    for r in rows[:2]:
        del r["verdicts"]["anywhere"]
    line = next(x for x in rates(rows).lines if x["judge"] == "anywhere")
    assert line["failed"] == 2 and line["n"] == 10


# Comparison


def test_compare_by_hand(tmp_path, store):
    a = grid_rows(tmp_path, store, lambda p, n: YES, name="a")
    b = grid_rows(tmp_path, store, lambda p, n: NO if p[-1] in "01" or p == "benign question 3" else YES, name="b")
    change = compare(a, b)
    bad, _, good, _ = change.lines
    assert (bad["a"], bad["b"], bad["difference"], bad["more"], bad["less"], bad["prompts"]) == (
        1.0,
        0.5,
        -0.5,
        0,
        2,
        4,
    )
    assert (good["a"], good["b"], good["more"], good["less"]) == (0.0, 0.75, 3, 0)
    x, y, c = [1.0] * 12, [0.0] * 6 + [1.0] * 6, [f"{n // 3}" for n in range(12)]
    want = rate_difference(x, y, c)
    assert (bad["low"], bad["high"], bad["p"]) == (want.low, want.high, want.p)
    assert [r["p_holm"] for r in change.lines] == holm([r["p"] for r in change.lines])
    assert [(e["id"], e["way"]) for e in change.examples] == [
        *(("h0/0", "no more"), ("h1/0", "no more"), ("b0/0", "new"), ("b1/0", "new"))
    ]


def test_compare_backwards(tmp_path, store):
    a = grid_rows(tmp_path, store, lambda p, n: (NO, YES)[n % 2], name="a")
    b = grid_rows(tmp_path, store, lambda p, n: (NO, YES, LATE)[n % 3], name="b")
    for one, other in zip(compare(a, b).lines, compare(b, a).lines, strict=True):
        assert (one["a"], one["b"], one["more"], one["less"]) == (other["b"], other["a"], other["less"], other["more"])
        assert one["difference"] == pytest.approx(-other["difference"]) and one["p"] == pytest.approx(other["p"])


def test_compare_takes_only_what_both_answered(tmp_path, store):
    a = grid_rows(tmp_path, store, name="a")
    b = [{**r, "model": "b"} for r in a if r["trial"] < 2 and r["set"] == "bad"]
    b[0] = {**b[0], "output": None, "answer": "", "verdicts": {}}
    change = compare(a, b)
    assert [(r["set"], r["unpaired"], r["difference"], r["more"]) for r in change.lines] == [("bad", 4, 0.0, 0)] * 2
    assert not change.examples
    assert "no prompt in common" in message(compare, a, [{**r, "id": "x"} for r in b])
    assert "is one prompt for a and another for b" in message(compare, a, [{**r, "prompt_hash": "x"} for r in b])
    assert "expected the rows of one model" in message(compare, a, a)
    assert "expected the rows of one model" in message(compare, [*a, *b], b)


def test_one_prompt_says_little(tmp_path, store):
    a = [r for r in grid_rows(tmp_path, store, lambda p, n: YES, name="a") if r["id"] == "h0"]
    b = [r for r in grid_rows(tmp_path, store, lambda p, n: NO, name="b") if r["id"] == "h0"]
    line = compare(a, b).lines[0]
    assert (line["a"], line["b"], line["less"], line["difference"], line["p_holm"]) == (1.0, 0.0, 1, -1.0, 1.0)
    assert line["low"] == -1 and line["high"] > -0.5
    mute = [
        {**r, "verdicts": {k: {**v, "label": None, "status": "failed"} for k, v in r["verdicts"].items()}} for r in b
    ]
    assert {line[k] for line in compare(a, mute).lines for k in ("difference", "p", "p_holm")} == {None}


@pytest.mark.parametrize("missing", ["harmful", "apart"])
@pytest.mark.parametrize("transcripts", [False, True])
def test_all_commands_give_the_same_figures(tmp_path, store, missing, transcripts):
    "Rates and comparisons are those of the tables."

    def answers(k):
        texts = (NO, f"{YES}\n<think>\nWait.\n</think>\n{LATE}", "draft <think> open", YES, LATE)
        return lambda p, n: texts[(n * k + len(p) + int(p[-1])) % 5]

    a, b = (grid_rows(tmp_path, store, answers(k), transcripts, n) for n, k in (("a", 1), ("b", 3)))
    del a[1]["verdicts"]["anywhere"]
    results = measure([*a, *b], missing=missing)
    cells = {(c.set, c.model, c.judge): c for c in results.cells}
    lines = rates([*a, *b], missing=missing).lines
    assert len(lines) == len(cells) == 8
    for r in lines:
        cell = cells[r["set"], r["model"], r["judge"]]
        want = (cell.rate.estimate, cell.rate.low, cell.rate.high)
        assert (r["estimate"], r["low"], r["high"]) == pytest.approx(want) and r["n"] == cell.rate.n
    pairs = {(p["set"], p["judge"]): p for p in results.comparisons}
    changes = compare(a, b, missing=missing).lines
    assert len(changes) == len(pairs) == 4
    for r in changes:
        want = pairs[r["set"], r["judge"]]
        for k in ("difference", "low", "high", "n", *(("p", "p_holm") if r["n"] else ())):
            assert r[k] == pytest.approx(want[k]), k


def test_a_comparison_says_what_its_judges_are_worth(tmp_path, store):
    a, b = (grid_rows(tmp_path, store, name=n) for n in "ab")
    change = compare(a, b)
    assert change.notes == ("strings:qalign: phrases in the first 200 characters", "anywhere: phrases anywhere")
    assert str(change).splitlines()[5:7] == list(change.notes) and change.notes[1] in change._repr_html_()
    assert "missing to be harmful or apart" in message(compare, a, b, missing="no")


def test_rates_name_rows_to_read(tmp_path, store):
    table = rates(grid_rows(tmp_path, store, lambda p, n: LATE if p.startswith("harmful") else NO))
    assert table.notes == (
        "m on bad: strings:qalign and anywhere differ on 12 of 12 answers: h0/0, h0/1, h0/2, h1/0, …",
    )
    assert str(table).endswith(table.notes[0]) and len(table.lines[0]["differ"]) == 12


# Copies without texts


def test_a_copy_without_texts(tmp_path, store):
    from qalign.results import share

    a, b = (
        grid_rows(tmp_path, store, lambda p, n, k=k: (NO, YES, LATE)[n * k % 3], name=n)
        for n, k in (("a", 1), ("b", 2))
    )
    write_rows(tmp_path / "whole", [*a, *b])
    share(tmp_path / "whole", tmp_path / "copy")
    whole, copy = (compare(read_rows(tmp_path / f, "a"), read_rows(tmp_path / f, "b")) for f in ("whole", "copy"))
    assert copy.lines == whole.lines and whole.examples and not copy.examples
    assert copy.notes == (*whole.notes, "no examples: the rows hold no texts")
    said = "holds no texts, as a copy made by `qalign eval share`: give the folder of the evaluation itself"
    assert said in message(rescore, tmp_path / "copy", [ANYWHERE], store)
    sides = [rates(read_rows(tmp_path / f)) for f in ("whole", "copy")]
    assert [r | {"seconds": 0} for r in sides[0].lines] == [r | {"seconds": 0} for r in sides[1].lines]
    assert sides[0].notes == sides[1].notes
    assert said in message(run_grid, [Model("a", engine=Rule())], SETS, tmp_path / "copy", store=store)


def test_examples_are_short_and_escaped(tmp_path, store):
    a = grid_rows(tmp_path, store, lambda p, n: "<b>bold</b>\n\n" + "word " * 100, name="a")
    b = grid_rows(tmp_path, store, lambda p, n: NO, name="b")
    change = compare(a, b, examples=1)
    e = change.examples[0]
    assert len(e["a"]) == 160 and e["a"].endswith("…") and "\n" not in e["a"] and e["b"] == NO
    page, text = change._repr_html_(), str(change)
    assert "<b>" not in page and "&lt;b&gt;" in page and "  asked  harmful question" in text
    assert text.splitlines()[0].split()[:3] == ["set", "of", "judge"] and not compare(a, b, examples=0).examples


@steady
@given(st.lists(st.tuples(st.integers(0, 5), st.none() | st.booleans(), st.none() | st.booleans()), max_size=30))
def test_flips_count_prompts(cells):
    prompts, x, y = ([c[k] for c in cells] for k in range(3))
    more, less = generations._flips(list(map(str, prompts)), x, y)
    assert (less, more) == generations._flips(list(map(str, prompts)), y, x)
    assert more + less <= len({p for p, u, v in cells if None not in (u, v)})


def test_written_rows_are_read_back(tmp_path, store):
    rows = grid_rows(tmp_path, store)
    write_rows(tmp_path / "copy", rows)
    assert read_rows(tmp_path / "copy") == rows
    assert "plain name" in message(write_rows, tmp_path, [{**rows[0], "set": ".hidden/x"}])


# With weights


def test_the_precision_of_vllm_names_its_answers(store, tmp_path):
    from qalign.vllm_engine import VLLMEngine

    def engine(dtype):
        hub = SimpleNamespace(_commit_hash="c0ffee")
        config = SimpleNamespace(model=str(tmp_path / "none"), dtype=dtype, hf_config=hub)
        return VLLMEngine(SimpleNamespace(llm_engine=SimpleNamespace(model_config=config)), None, "vllm:m")

    whos = [engine(dtype).identity() for dtype in ("torch.bfloat16", "torch.float32")]
    assert whos[0] == {"spec": "vllm:m", "precision": "bfloat16", "revision": "c0ffee"}
    assert len({Sampling().key(who, "", "x", 0) for who in whos}) == 2


def test_the_embedded_model_and_an_adapter(tmp_path, store):
    from peft import LoraConfig, get_peft_model

    from qalign.engine import load_model

    model, _ = load_model(str(embedded_model()))
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    models = [Model("start"), Model("tuned", adapter=str(tmp_path / "adapter"))]
    small = {"bad": SETS["bad"][:2]}
    run_grid(models, small, tmp_path / "e", ["strings", ANYWHERE], Sampling(0, max_tokens=6), 1, store=store)
    start, tuned = (read_rows(tmp_path / "e", n) for n in ("start", "tuned"))
    assert {r["key"] for r in start}.isdisjoint(r["key"] for r in tuned)
    assert all(0 < r["tokens_out"] <= 6 and r["tokens_in"] > 3 and r["seconds"] > 0 for r in start + tuned)
    known = json.loads((tmp_path / "e" / "grid.json").read_text())["models"]
    assert "adapter" in known["tuned"]["identity"] and "adapter" not in known["start"]["identity"]
    assert known["start"]["identity"]["weights"] == known["tuned"]["identity"]["weights"]
    compare(start, tuned)


def test_adapters_that_do_not_fit(tmp_path):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    from qalign.engine import load_model

    model, _ = load_model(str(embedded_model()))
    folder, file = tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(folder))
    tensors = load_file(file)
    first = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != first}, file)
    assert "adapter does not fit its base: 1 tensors without a partner" in message(Model("m", adapter=str(folder)).load)
    save_file({**tensors, first: tensors[first].repeat(1, 2)}, file)
    assert "adapter does not fit its base: " in message(Model("m", adapter=str(folder)).load)


def test_grid_is_quick_to_take_up_again(tmp_path, store):
    "Four thousand rows that are all there: seconds, not minutes."
    many = {"many": items(1400)}
    how = {"judges": [STRINGS, ANYWHERE], "store": store}
    run_grid([Model("m", engine=Rule())], many, tmp_path / "e", **how)
    begun = time.process_time()
    run_grid([Model("m", engine=Rule())], many, tmp_path / "e", **how)
    assert time.process_time() - begun < 10 and len(list(read_jsonl(tmp_path / "e" / "many" / "m.jsonl"))) == 4200
