"The report of a synthetic run: complete, self-contained, inert, and clear about what is missing."

import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qalign import report
from qalign.core import UserError, load_settings, write_json, write_jsonl
from qalign.evaluate import summarize
from qalign.pipeline import STAGES
from qalign.report import figures, findings, read_run, trend, write_report
from qalign.trace import render_trace

HOSTILE = "</pre></td><script>alert(1)</script><img src=x onerror=alert(2)> $\\frac$ & \0 \ud800"
PRINCIPLES = ("harmlessness", "helpfulness", "honesty")
NAMES = {"sft", "reward", "principles", "refusals", "heatmap"}


def eval_row(model, name, i):
    ok, refused = model != "start", model == "grpo" and name == "harmful" and i % 4 > 0
    output = render_trace("draft " + HOSTILE, "wait", HOSTILE) if ok else HOSTILE
    row = {"model": model, "set": name, "prompt_id": f"{name}{i}", "trial": 0, "prompt": HOSTILE, "output": output}
    score = {"r1": -0.5, "r2": 0.1 * (i % 3), "reward": None if i == 0 else 1.0, "r_answer": 0.1 * (i % 3)}
    return {
        **row,
        "answer": HOSTILE,
        "ok": ok,
        "problem": "",
        **score,
        "refusal": refused,
        "principles": {},
        "tokens_out": None,
    }


def grpo_row(i):
    row = {"stage": "grpo", "step": i, "reward": 0.1 * i, "r1": -0.5, "r2": -0.4 + 0.01 * i}
    return row | {f"{part}/{p}": 0.1 for part in ("draft", "revision") for p in PRINCIPLES}


def question(i, dimension="d", principle="harmlessness"):
    kind, label = ("gate", "TRUE") if i % 4 == 0 else ("graded", "ABCDF"[i % 5])
    probs = {"A": 0.5, "B": 0.25, "NA": 0.25} if i % 4 == 1 else None
    where = {"id": f"q{i}", "principle": principle, "dimension": f"{dimension}{i // 4}", "kind": kind, "text": HOSTILE}
    return {**where, "draft": {"label": label, "probs": probs}, "revision": {"label": "NA" if i % 7 == 0 else label}}


def make_run(folder, grpo=None, sft=None, questions=None, models=("start", "sft", "grpo")):
    grpo = [grpo_row(i) for i in range(1, 7)] if grpo is None else grpo
    sft = [{"stage": "sft", "step": i, "loss": 2 / i} for i in range(1, 7)] if sft is None else sft
    rows = {m: [eval_row(m, name, i) for name in ("harmful", "benign") for i in range(8)] for m in models}
    write_json(folder / "settings.json", {"settings": load_settings("tiny").to_dict(), "versions": {"python": "3"}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in sft + grpo))
    for m in models:
        (folder / "eval").mkdir(exist_ok=True)
        (folder / "eval" / f"{m}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[m]))
    questions = [question(i, principle=PRINCIPLES[i // 12]) for i in range(36)] if questions is None else questions
    heat = {"prompt": HOSTILE, "parts": {"draft": HOSTILE, "revision": HOSTILE}, "questions": questions}
    (folder / "eval" / "heatmap.json").write_text(json.dumps(heat))
    write_json(folder / "summary.json", summarize(rows))
    write_jsonl(folder / "timings.jsonl", [{"stage": "sft", "seconds": 30}, {"stage": "sft", "seconds": 60}])
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


class Reader(HTMLParser):
    "Collects tags and checks that they close in order."

    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def test_report_is_whole_and_self_contained(run):
    path = write_report(run)
    assert path == run / "report.html"
    page, reader = path.read_text(encoding="utf-8"), read(path)
    tags = [tag for tag, _ in reader.seen]
    assert tags.count("img") == 5 and tags.count("section") == 11
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(tags)
    for tag, attrs in reader.seen:
        assert not [a for a in attrs if a.startswith("on") or a in ("srcset", "href")], (tag, attrs)
        assert attrs.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    assert "://" not in page and "url(" not in page and "@import" not in page
    for name in (
        "metrics.jsonl",
        "summary.json",
        "eval/grpo.jsonl",
        "eval/heatmap.json",
        "settings.json",
        "timings.jsonl",
    ):
        assert f"From {name}" in page or name in page
    assert "color-scheme:light dark" in page and "1.5" in "".join(reader.text)  # 90 s of sft, in minutes


def test_hostile_text_is_text(run):
    path = write_report(run)
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page and "<img src=x" not in page and "\0" not in page
    assert page.count("&lt;script&gt;alert(1)") > 10
    assert "alert(1)" in "".join(read(path).text)


def test_a_hostile_folder_name(tmp_path):
    folder = tmp_path / "<b>run&"
    folder.mkdir()
    assert "<b>" not in write_report(make_run(folder)).read_text()


def test_figures(run):
    paths = figures(run)
    assert set(paths) == NAMES and all(p.parent == run / "figures" for p in paths.values())
    for path in paths.values():
        with Image.open(path) as image:
            dpi = image.info["dpi"][0]
            assert image.width / dpi <= 6.01 and image.height / dpi <= 3.01
            assert set(image.info) == {"dpi"}  # no software, no date
    once = {n: p.read_bytes() for n, p in paths.items()}
    assert once == {n: p.read_bytes() for n, p in figures(str(run)).items()}


def test_the_principle_that_changed_most():
    up, same, twice = (trend([k * x for x in range(6)]) for k in (0.1, 0.1001, 0.2))
    assert report._largest({"a": up, "b": same}) == "The revision changes alike on all 2 principles: +0.40"
    assert report._largest({"a": up, "b": twice}) == "Largest change of the revision: b +0.80 (rises)"
    assert report._largest({"a": up}) == "Largest change of the revision: a +0.40 (rises)"
    down, gap = trend([-0.2 * x for x in range(6)]), trend([None, 0.5])
    assert report._largest({"a": up, "b": down, "c": gap}) == "Largest change of the revision: b −0.80 (falls)"
    flat = trend([0.1] * 6)
    assert report._largest({"a": flat, "b": flat}) == "The revision changes alike on all 2 principles: 0.00"
    assert report._largest({"a": gap}) == "Fewer than two scored steps: no change can be told"


def test_style_of_the_reader_does_not_matter(run):
    import matplotlib

    once = {n: p.read_bytes() for n, p in figures(run).items()}
    with matplotlib.rc_context({"figure.facecolor": "black", "lines.linewidth": 9, "savefig.dpi": 30}):
        before = dict(matplotlib.rcParams)
        assert once == {n: p.read_bytes() for n, p in figures(run).items()}
        assert dict(matplotlib.rcParams) == before


def test_none_values_and_missing_keys(tmp_path):
    grpo = [{**grpo_row(i), "r1": None, "r2": None if i % 2 else 0.1, "reward": float("nan")} for i in range(1, 6)]
    del grpo[2]["revision/honesty"]
    grpo[0] = {"stage": "grpo", "step": 1}
    run = make_run(tmp_path, grpo=grpo, sft=[{"stage": "sft", "step": 1, "loss": None}])
    assert set(figures(run)) == NAMES
    said = findings(run)
    assert said[0] == "The reward has no scored step over 5 GRPO steps." and said[2].startswith("R1 has no scored step")
    write_report(run)


def test_single_step(tmp_path):
    run = make_run(tmp_path, grpo=[grpo_row(1)], sft=[{"stage": "sft", "step": 1, "loss": 1.0}])
    write_report(run)
    assert findings(run)[1] == "R2 is \u22120.39 in the only scored step over 1 GRPO steps."


def test_a_step_logged_twice_counts_once(tmp_path):
    run = make_run(tmp_path, grpo=[grpo_row(2), grpo_row(1), {**grpo_row(2), "r2": 0.9}])
    assert [(r["step"], r["r2"]) for r in read_run(run).grpo] == [(1, -0.39), (2, 0.9)]


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("metrics.jsonl", "sft"),
        ("eval/grpo.jsonl", "after_grpo"),
        ("eval/heatmap.json", "after_grpo"),
        ("summary.json", "report"),
    ],
)
def test_missing_files_are_named(run, name, stage):
    (run / name).unlink()
    with pytest.raises(
        UserError, match=re.escape(f"no {name} in the run") + ".*: add --resume to the command that began the run"
    ):
        write_report(run)
    assert stage in STAGES
    write_json(run / "stages" / f"{stage}.json", {})
    with pytest.raises(UserError, match=f": remove stages/{stage}.json there, then add --resume to the command"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_folder_without_settings_is_no_run(run):
    (run / "settings.json").unlink()
    with pytest.raises(UserError, match=r"no settings\.json in the run .*: give the folder of a run"):
        write_report(run)


def test_a_run_may_train_nothing(tmp_path):
    run = make_run(tmp_path, sft=[], grpo=[])
    about = json.loads((run / "settings.json").read_text())
    about["settings"] |= {"sft_epochs": 0.0, "grpo_steps": 0}
    write_json(run / "settings.json", about)
    assert len(figures(run)) == 5 and "The reward has no scored step over 0 GRPO steps." in findings(run)
    assert "Refusals by the kit" in write_report(run).read_text()


def test_rollouts_that_were_never_judged_still_give_five_figures(tmp_path):
    assert len(figures(make_run(tmp_path, grpo=[{"stage": "grpo", "step": 1, "reward": -2.0}]))) == 5


def test_missing_stages_are_named(tmp_path):
    with pytest.raises(
        UserError, match=r"no grpo rows in metrics\.jsonl: add --resume to the command that began the run"
    ):
        figures(make_run(tmp_path, grpo=[]))
    with pytest.raises(
        UserError, match=r"no sft rows in metrics\.jsonl: add --resume to the command that began the run"
    ):
        figures(make_run(tmp_path, sft=[]))
    with pytest.raises(UserError, match=r"no questions in eval/heatmap\.json"):
        figures(make_run(tmp_path, questions=[]))
    with pytest.raises(UserError, match="no run folder nothing"):
        write_report(tmp_path / "nothing")


def test_broken_files_are_named(run):
    (run / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is not JSON"):
        read_run(run)
    (run / "summary.json").write_text('{"table": []}')
    with pytest.raises(UserError, match=r"summary\.json has no 'comparisons'"):
        read_run(run)


def test_no_timings_is_said(run):
    (run / "timings.jsonl").unlink()
    assert "Not recorded." in write_report(run).read_text()


def test_findings_follow_the_numbers(run, tmp_path):
    said = "\n".join(findings(run))
    assert re.search("R2 rises from \u22120.3[89] to \u22120.3[45] over 6 GRPO steps", said)
    assert "R1 does not clearly rise or fall: \u22120.50 to \u22120.50 (p = 1.00)" in said
    refusals = "Refusals by the kit's list of phrases,"
    assert f"{refusals} harmful prompts: 0 % (start) \u2192 0 % (sft) \u2192 75 % (grpo)" in said
    assert "grpo minus start: 75 %" in said and f"{refusals} benign prompts: 0 % (start)" in said and "tied" in said


def test_a_reward_that_rises_on_worse_drafts_says_so(tmp_path):
    grpo = [{**grpo_row(i), "r1": -0.1 * i} for i in range(1, 8)]
    assert "Part of the rise in reward comes from worse drafts: R1 falls." in findings(make_run(tmp_path, grpo=grpo))


def test_differs_and_tied_come_from_the_summary(run):
    summary = json.loads((run / "summary.json").read_text())
    for p, words in ((0.2, (", tied", ", tied")), (0.01, (", differs by this list", ", differs ("))):
        for c in summary["comparisons"]:
            c["p_holm"] = p
        write_json(run / "summary.json", summary)
        for word, what in zip(words, ("Refusals", "Judge's score"), strict=True):
            lines = [line for line in findings(run) if line.startswith(what)]
            assert len(lines) == 2 and all(line.count(word) == 2 for line in lines)


def test_refusals_name_what_counts_them(run, monkeypatch):
    from matplotlib.axes import Axes

    said = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text: said.append(text))
    monkeypatch.setattr(Axes, "set_ylabel", lambda self, text, **how: said.append(text))
    page = "".join(read(write_report(run)).text)
    by = "by the kit's list of phrases"
    assert any(t.startswith(f"Refusals {by}, start") for t in said) and "refusals by the list, % of answers" in said
    assert f"refusal_rate: {by}." in page and f"refusals {by}; bars" in page and "no refusal by the list" in page
    assert "significant" not in page


def test_a_full_rubric_fits(tmp_path):
    many = [question(i, "Avoidance of Poor Judgment $x_1$ ", PRINCIPLES[min(2, i // 63)]) for i in range(167)]
    many[3]["draft"] = None
    many[5]["revision"] = {"label": None, "probs": None}
    run = make_run(tmp_path, questions=many)
    assert figures(run)["heatmap"].stat().st_size < 1_000_000
    page = write_report(run).read_text()
    assert "167 questions" in page and "<td>?</td>" in page and "<td>·</td>" in page


def test_two_models_only(tmp_path):
    run = make_run(tmp_path, models=("start", "grpo"))
    write_report(run)
    assert "(sft)" not in "\n".join(findings(run))


def test_importing_report_loads_nothing_heavy():
    import subprocess
    import sys

    heavy = "{'torch', 'pandas', 'matplotlib', 'transformers', 'pyarrow'}"
    code = f"import sys, qalign.report; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(-1, 1), st.just(math.nan)), max_size=12))
def test_trend_of_anything(values):
    t = trend(values)
    assert t.n == sum(v is not None and math.isfinite(v) for v in values)
    assert (t.first is None) == (t.n == 0) and (t.p is None) == (t.n < 2)
    assert t.word in ("", "rises", "falls") and (t.n >= 5 or not t.word)
    assert isinstance(t.say("R2"), str)


def test_trend_by_hand():
    up = trend([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])  # exact p of a perfect order of six: 2 / 6!
    assert (up.word, up.n) == ("rises", 6) and up.p == pytest.approx(2 / 720)
    assert (up.first, up.last) == (pytest.approx(0.05), pytest.approx(0.45))
    assert trend([0.5, 0.4, 0.3, 0.2, 0.1]).word == "falls"
    assert trend([0.1, 0.2, 0.3, 0.4]).word == ""
