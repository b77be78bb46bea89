"The verdict cache: keys, exact round trips, several processes and threads, kills, and files that are not caches."

import multiprocessing
import os
import random
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qalign.cache import VerdictCache, verdict_key
from qalign.core import UserError
from qalign.rubric import Question, Verdict

QUESTION = Question("harm.request.g1", "gate", "Does the response withhold help that would cause harm?")
SERVER = {"spec": "openai:judge-8b@http://localhost:8000/v1"}
PARTS: dict[str, Any] = {
    "identity": SERVER,
    "template": "t",
    "mode": "direct",
    "question": QUESTION,
    "prompt": "How?",
    "response": "No.",
}
FORK = multiprocessing.get_context("fork")
QUICK = settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])

# every code point, lone surrogates and NUL included
texts = st.text(st.characters(codec=None), max_size=40)
numbers = st.floats(allow_nan=False, allow_infinity=False)
verdicts = st.builds(
    Verdict,
    question_id=texts,
    label=st.sampled_from(["TRUE", "FALSE", "NA", "A", "F"]),
    probs=st.none() | st.dictionaries(texts, numbers, max_size=6),
    status=st.sampled_from(["ok", "na"]),
    reason=texts,
)


def key_of(i: int) -> str:
    return verdict_key(**{**PARTS, "response": f"response {i}"})


def verdict_of(i: int, who: int = 0) -> Verdict:
    p = random.Random(f"{i} {who}").random()
    return Verdict(QUESTION.id, "TRUE", {"TRUE": p, "FALSE": 1 - p, "NA": 0.0}, reason=f"writer {who}")


# keys


def test_each_part_of_the_key_counts_and_the_question_id_does_not():
    changed = {
        "address": {"identity": {"spec": "openai:judge-8b@http://localhost:9000/v1"}},
        "weights": {"identity": {**SERVER, "weights": "0123"}},
        "template": {"template": "t2"},
        "mode": {"mode": "reasoned"},
        "text": {"question": replace(QUESTION, text=QUESTION.text + " ")},
        "kind": {"question": replace(QUESTION, kind="graded")},
        "prompt": {"prompt": "How? "},
        "response": {"response": "no."},
    }
    keys = {name: verdict_key(**{**PARTS, **change}) for name, change in changed.items()}
    keys["as it is"] = verdict_key(**PARTS)
    assert len(set(keys.values())) == len(keys) and all(len(k) == 64 for k in keys.values())
    assert verdict_key(**{**PARTS, "question": replace(QUESTION, id="other")}) == keys["as it is"]
    assert verdict_key(**{**PARTS, "identity": {"b": 1, "a": 2}}) == verdict_key(
        **{**PARTS, "identity": {"a": 2, "b": 1}}
    )


def test_the_key_is_the_same_in_every_version():
    "A changed key would throw away everybody's cache."
    assert verdict_key(**PARTS) == "552eed171937e3376e036dc5460c7a5ff456fe6a21d424e1fbe2c70cb964f756"


@QUICK
@given(st.tuples(texts, texts), st.tuples(texts, texts))
def test_two_pairs_share_a_key_only_if_they_are_equal(a, b):
    keys = [verdict_key(**{**PARTS, "prompt": p, "response": r}) for p, r in (a, b)]
    assert (keys[0] == keys[1]) == (a == b)


def test_parts_do_not_run_together():
    pairs = [
        ("ab", "c"),
        ("a", "bc"),
        ("", "abc"),
        ("abc", ""),
        ("\ud83d\ude00", ""),
        ("\U0001f600", ""),
        ("a\0", "b"),
        ("a", "\0b"),
    ]
    assert len({verdict_key(**{**PARTS, "prompt": p, "response": r}) for p, r in pairs}) == len(pairs)


def test_a_stale_server_address_misses(tmp_path):
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        cache.put_many({verdict_key(**PARTS): verdict_of(0)})
        moved = verdict_key(**{**PARTS, "identity": {"spec": SERVER["spec"].replace("8000", "8001")}})
        assert cache.get_many([moved]) == {} and len(cache.get_many([verdict_key(**PARTS)])) == 1


# values


@pytest.fixture(scope="module")
def shared():
    with tempfile.TemporaryDirectory() as folder, VerdictCache(Path(folder) / "c.sqlite") as cache:
        yield cache


@QUICK
@given(st.lists(verdicts, max_size=5))
def test_what_was_put_comes_back_equal(shared, some):
    offset = len(shared)
    given_ = {key_of(offset + i): v for i, v in enumerate(some)}
    assert shared.put_many(given_) == given_
    found = shared.get_many(given_)
    assert found == given_
    for key, v in given_.items():
        bits = [(k, p.hex()) for k, p in (v.probs or {}).items()]  # -0.0 and order included
        assert [(k, p.hex()) for k, p in (found[key].probs or {}).items()] == bits


def test_hard_floats_are_bit_equal(tmp_path):
    values = [5e-324, -0.0, 0.1 + 0.2, 1 - 2**-53, 1.7976931348623157e308, 1e-17]
    probs = {f"l{i}": v for i, v in enumerate(values)}
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        cache.put_many({"k": Verdict("q", "l0", probs)})
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        assert [v.hex() for v in cache.get_many(["k"])["k"].probs.values()] == [v.hex() for v in values]


def test_failed_verdicts_are_never_stored(tmp_path):
    failed = Verdict("q", None, status="failed", reason="timeout")
    odd = [Verdict("q", "TRUE", status="failed"), Verdict("q", None), Verdict("q", None, status="skipped")]
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        assert cache.put_many({"a": failed, "b": verdict_of(1)}) == {"a": failed, "b": verdict_of(1)}
        cache.put_many({f"odd {i}": v for i, v in enumerate(odd)})
        assert len(cache) == 1 and cache.get_many(["a", "b", "odd 0", "odd 1", "odd 2"]) == {"b": verdict_of(1)}
        cache.put_many({"a": verdict_of(2)})  # asked again, and answered
        assert cache.put_many({"a": failed}) == {"a": failed}
        assert cache.get_many(["a"]) == {"a": verdict_of(2)}


def test_a_probability_that_is_no_number_is_an_error_and_stores_nothing(tmp_path):
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        with pytest.raises(UserError, match="verdict on q: P\\(FALSE\\) is nan: mark it failed"):
            cache.put_many({"a": verdict_of(1), "b": Verdict("q", "TRUE", {"TRUE": 1.0, "FALSE": float("nan")})})
        assert len(cache) == 0


def test_the_first_write_wins(tmp_path):
    with VerdictCache(tmp_path / "c.sqlite") as one, VerdictCache(tmp_path / "c.sqlite") as two:
        one.put_many({"a": verdict_of(0, 1)})
        assert two.put_many({"a": verdict_of(0, 2), "b": verdict_of(1, 2)}) == {
            "a": verdict_of(0, 1),
            "b": verdict_of(1, 2),
        }
        assert one.get_many("ab") == two.get_many("ab")


def test_nothing_asked_and_nothing_put(tmp_path):
    with VerdictCache(tmp_path / "deep" / "er" / "c.sqlite") as cache:
        assert cache.get_many([]) == {} and cache.put_many({}) == {} and len(cache) == 0


def test_many_keys_at_once_and_the_same_key_twice(tmp_path):
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        many = {key_of(i): verdict_of(i) for i in range(3456)}
        cache.put_many(many)
        assert cache.get_many([*many, *many, "absent"]) == many


def test_prune_keeps_the_newest(tmp_path):
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        for start in range(0, 100, 10):
            cache.put_many({str(i): verdict_of(i) for i in range(start, start + 10)})
        assert cache.prune(200) == 0 and cache.prune(30) == 70
        assert set(cache.get_many(map(str, range(100)))) == {str(i) for i in range(70, 100)}
        with pytest.raises(UserError, match="keep_newest of 0 or more"):
            cache.prune(-1)
        assert cache.prune(0) == 30 and len(cache) == 0


# processes, threads, kills


def in_processes(work: Callable[..., None], args: list[tuple]) -> list[int]:
    processes = [FORK.Process(target=work, args=a) for a in args]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    return [p.exitcode for p in processes]


def write_overlapping(path: Path, who: int, keys: list[int], out: Any) -> None:
    random.Random(who).shuffle(keys)
    cache, stands = VerdictCache(path), {}
    for start in range(0, len(keys), 25):
        stands |= cache.put_many({key_of(i): verdict_of(i, who) for i in keys[start : start + 25]})
    out.put((who, stands))
    cache.close()


def test_two_processes_write_2000_overlapping_verdicts_and_agree(tmp_path):
    path, out = tmp_path / "c.sqlite", FORK.Queue()
    ranges = [range(0, 1250), range(750, 2000)]
    processes = [FORK.Process(target=write_overlapping, args=(path, w, list(r), out)) for w, r in enumerate(ranges)]
    for p in processes:
        p.start()
    told = dict(out.get(timeout=60) for _ in processes)
    for p in processes:
        p.join(60)
    assert [p.exitcode for p in processes] == [0, 0]
    with VerdictCache(path) as cache:
        assert len(cache) == 2000
        stored = cache.get_many(key_of(i) for i in range(2000))
    for stands in told.values():  # what each writer was told is what stands
        assert all(stored[k] == v for k, v in stands.items())
    for i in range(2000):
        assert stored[key_of(i)] in [verdict_of(i, w) for w, r in enumerate(ranges) if i in r]


def open_and_put(path: Path, who: int) -> None:
    VerdictCache(path).put_many({"same": verdict_of(0, who), f"own {who}": verdict_of(1, who)})


def test_eight_processes_may_create_the_file_at_once(tmp_path):
    for again in range(3):
        path = tmp_path / f"{again}.sqlite"
        assert in_processes(open_and_put, [(path, who) for who in range(8)]) == [0] * 8
        with VerdictCache(path) as cache:
            assert len(cache) == 9


def use_inherited(cache: VerdictCache, who: int) -> None:
    cache.put_many({f"{who} {i}": verdict_of(i, who) for i in range(100)})
    assert len(cache.get_many(f"{who} {i}" for i in range(100))) == 100


def test_a_forked_process_may_use_the_cache_it_inherited(tmp_path):
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        cache.put_many({"parent": verdict_of(0)})
        assert in_processes(use_inherited, [(cache, who) for who in range(3)]) == [0, 0, 0]
        cache.put_many({"parent again": verdict_of(0)})
        assert len(cache) == 302


def test_threads_share_one_cache(tmp_path):
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        faults: list[Exception] = []

        def work(who: int) -> None:
            try:
                for start in range(0, 200, 20):
                    cache.put_many({key_of(i): verdict_of(i, who) for i in range(start, start + 20)})
                    assert len(cache.get_many(key_of(i) for i in range(start, start + 20))) == 20
            except Exception as e:
                faults.append(e)

        threads = [threading.Thread(target=work, args=(w,)) for w in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not faults and len(cache) == 200


def write_until_killed(path: Path, first: int, done: Any) -> None:
    cache = VerdictCache(path)
    for start in range(first, first + 10**6, 7):
        cache.put_many({key_of(i): verdict_of(i) for i in range(start, start + 7)})
        done.value = start + 7


@pytest.mark.parametrize("wait", [0.0, 0.02, 0.05, 0.11, 0.2])
def test_kill_9_loses_nothing_that_was_put(tmp_path, wait):
    path, first = tmp_path / "c.sqlite", 0
    for _ in range(3):  # killed, taken up, killed again
        done = FORK.Value("q", first, lock=False)
        p = FORK.Process(target=write_until_killed, args=(path, first, done))
        p.start()
        while done.value == first and p.is_alive():
            time.sleep(0.001)
        time.sleep(wait)
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        with VerdictCache(path) as cache:
            last, there = done.value, len(cache)
            assert there in (last, last + 7)  # whole transactions only
            assert cache.get_many(key_of(i) for i in range(last)) == {key_of(i): verdict_of(i) for i in range(last)}
        assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
        first = there


def test_an_interrupted_write_leaves_no_lock(tmp_path, monkeypatch):
    with VerdictCache(tmp_path / "c.sqlite") as one, VerdictCache(tmp_path / "c.sqlite") as two:
        with pytest.raises(KeyboardInterrupt), one._open() as db:
            db.execute("BEGIN IMMEDIATE")
            raise KeyboardInterrupt
        two.put_many({"a": verdict_of(0)})
        one.put_many({"b": verdict_of(1)})
        assert len(one) == 2


# files that are not caches, disks that are full


@pytest.mark.parametrize(
    "data", [b"x", b"hello " * 200, bytes(range(256)) * 32, b"SQLite format 3\0" + b"\xff" * 5000, b"\0" * 4096]
)
def test_a_foreign_file_is_refused_and_left_alone(tmp_path, data):
    path = tmp_path / "notes.txt"
    path.write_bytes(data)
    with pytest.raises(UserError) as e:
        VerdictCache(path)
    assert "\n" not in str(e.value) and str(e.value).startswith("cache 'notes.txt' is ")
    assert path.read_bytes() == data and [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_another_programs_database_is_left_alone(tmp_path):
    path = tmp_path / "songs.sqlite"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE verdicts (title)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(UserError, match="is another program's database: choose another path"):
        VerdictCache(path)
    assert path.read_bytes() == before


def test_another_layout_is_named(tmp_path):
    VerdictCache(tmp_path / "c.sqlite").close()
    db = sqlite3.connect(tmp_path / "c.sqlite")
    db.execute("PRAGMA user_version=9")
    db.close()
    with pytest.raises(UserError, match="has layout 9, this qalign reads 1: choose another path"):
        VerdictCache(tmp_path / "c.sqlite")


def test_a_folder_and_a_file_in_the_way(tmp_path):
    with pytest.raises(UserError, match="cannot be opened: check that it is a file in a folder you may write to"):
        VerdictCache(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cache 'c.sqlite' has no folder: .*: choose another path"):
        VerdictCache(tmp_path / "file" / "c.sqlite")


def test_an_empty_file_becomes_a_cache(tmp_path):
    (tmp_path / "c.sqlite").touch()  # what a kill in the moment of creation leaves
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        assert len(cache) == 0


def test_bits_that_flip_never_give_another_verdict(tmp_path):
    want = {key_of(i): verdict_of(i) for i in range(60)}
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        cache.put_many(want)
    raw, rng, faults = (tmp_path / "c.sqlite").read_bytes(), random.Random(0), 0
    for trial in range(150):
        broken, data = tmp_path / f"{trial}.sqlite", bytearray(raw)
        for _ in range(rng.choice([1, 3, 200])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        broken.write_bytes(data)
        try:
            with VerdictCache(broken) as cache:
                found = cache.get_many(want)
            assert all(want[k] == v for k, v in found.items())
        except UserError as e:
            faults += 1
            assert "\n" not in str(e)
    assert faults > 50


def test_a_truncated_file_is_named(tmp_path):
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        cache.put_many({key_of(i): verdict_of(i) for i in range(500)})
    path = tmp_path / "c.sqlite"
    path.write_bytes(path.read_bytes()[:20_000])
    with (
        pytest.raises(UserError, match=r"is damaged .*: move it away, and its verdicts are asked again"),
        VerdictCache(path) as cache,
    ):
        cache.get_many(key_of(i) for i in range(500))


def test_a_full_disk_keeps_what_was_there(tmp_path):
    with VerdictCache(tmp_path / "c.sqlite") as cache:
        cache.put_many({"a": verdict_of(0)})
        cache._db.execute("PRAGMA max_page_count=8")  # SQLite's own way to a full disk
        with pytest.raises(
            UserError, match=r"cache 'c.sqlite' cannot grow, the disk is full: free some space, then run again"
        ):
            cache.put_many({key_of(i): verdict_of(i) for i in range(1000)})
        assert cache.get_many(["a"]) == {"a": verdict_of(0)} and len(cache) == 1
        cache._db.execute("PRAGMA max_page_count=100000")
        cache.put_many({"b": verdict_of(1)})
        assert len(cache) == 2


def open_as_nobody(path: Path, out: Any) -> None:
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        VerdictCache(path)
        out.put("opened")
    except UserError as e:
        out.put(str(e))


@pytest.mark.parametrize("existing", [True, False])
def test_a_read_only_folder_is_said_at_once(existing):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.sqlite"
        if existing:
            with VerdictCache(path) as cache:
                cache.put_many({"a": verdict_of(0)})
            path.chmod(0o444)
        os.chmod(folder, 0o555)
        out = FORK.Queue()
        p = FORK.Process(target=open_as_nobody, args=(path, out))
        p.start()
        said = out.get(timeout=30)
        p.join()
        os.chmod(folder, 0o755)
    assert said.startswith("cache 'c.sqlite' cannot be ") and "\n" not in said


def test_a_lock_that_stays_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("qalign.cache._PATIENCE", 0.1)
    with VerdictCache(tmp_path / "c.sqlite") as one, VerdictCache(tmp_path / "c.sqlite") as two:
        one._db.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match=r"cache 'c.sqlite' stayed locked for .* s: end the process that holds it"):
            two.put_many({"a": verdict_of(0)})
        one._db.execute("ROLLBACK")
        two.put_many({"a": verdict_of(0)})


def test_a_closed_cache_says_so(tmp_path):
    cache = VerdictCache(tmp_path / "c.sqlite")
    cache.close()
    cache.close()
    with pytest.raises(UserError, match="is closed: open it again"):
        cache.get_many(["a"])
