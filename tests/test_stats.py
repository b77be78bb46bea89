"Room stats: coverage and calibration by simulation, agreement with scipy, properties."

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qalign.core import UserError
from qalign.stats import (
    Difference,
    Interval,
    cohen_kappa,
    holm,
    kappa_interval,
    mcnemar,
    mean_interval,
    minimum_detectable,
    paired_bootstrap,
    rate_difference,
    rate_interval,
    tied,
    wilson,
)

CALM = settings(derandomize=True, max_examples=100, deadline=None)
values = st.floats(-1e3, 1e3, allow_subnormal=False)
GRADES, SHARES = np.array([-1, -0.5, 0.1, 0.5, 1]), np.array([0.3, 0.1, 0.1, 0.2, 0.3])


# coverage and calibration


@pytest.mark.parametrize("n", [10, 40, 200])
def test_wilson_coverage_by_simulation(n):
    rng = np.random.default_rng(0)
    intervals = [wilson(k, n) for k in range(n + 1)]
    hits = []
    for p in np.linspace(0.02, 0.98, 49):
        drawn = [intervals[k] for k in rng.binomial(n, p, size=400)]
        hits.append(np.mean([i.low <= p <= i.high for i in drawn]))
    assert 0.94 <= np.mean(hits) <= 0.97


def test_wilson_coverage_at_40_exactly():
    n, k = 40, np.arange(41)
    low, high = np.array([(w.low, w.high) for w in (wilson(int(i), n) for i in k)]).T
    for p in np.linspace(0.001, 0.999, 999):
        least = 0.92 if 0.03 <= p <= 0.97 else 0.83  # the known dips of this interval lie next to 0 and 1
        assert stats.binom.pmf(k, n, p)[(low <= p) & (p <= high)].sum() > least, p


DRAWS = {
    "normal": (lambda rng, n: rng.normal(0.3, 2, size=n), 0.3),
    "grades": (lambda rng, n: rng.choice(GRADES, p=SHARES, size=n), float(GRADES @ SHARES)),
    "binary": (lambda rng, n: rng.choice([-1, 0, 1], p=[0.05, 0.8, 0.15], size=n), 0.1),
}


@pytest.mark.parametrize("name", DRAWS)
def test_paired_bootstrap_coverage(name):
    draw, mean = DRAWS[name]
    rng = np.random.default_rng(1)
    found = [paired_bootstrap(np.zeros(40), draw(rng, 40), n_boot=600, n_flip=2) for _ in range(1000)]
    assert 0.92 <= np.mean([f.low <= mean <= f.high for f in found]) <= 0.97


@pytest.mark.parametrize(("name", "g"), [("normal", 3), ("normal", 9), ("grades", 9)])
def test_few_clusters_are_covered(name, g):
    draw, mean = DRAWS[name]
    rng = np.random.default_rng(10)
    found = [mean_interval(draw(rng, g)) for _ in range(1000)]
    assert 0.92 <= np.mean([f.low <= mean <= f.high for f in found]) <= 0.97


def test_a_mean_stays_where_its_values_can_be():
    wide, held = mean_interval([0.0, 1.0, 1.0]), mean_interval([0.0, 1.0, 1.0], bounds=(0, 1))
    assert wide.low < 0 and wide.high > 1 and (held.low, held.high) == (0, 1) and held.estimate == wide.estimate


def test_few_clusters_have_the_interval_of_student():
    x, prompt = [0.1, 0.4, -0.2, 0.9, 0.5, 0.3], list("aabbcd")
    plain, (low, high) = mean_interval(x[:4]), stats.t.interval(0.95, 3, np.mean(x[:4]), stats.sem(x[:4]))
    assert math.isclose(plain.low, low) and math.isclose(plain.high, high)
    sums, sizes = np.array([0.5, 0.7, 0.5, 0.3]), np.array([2, 2, 1, 1])
    half = stats.t.ppf(0.95, 3) * math.sqrt(sum((sums - 2 / 6 * sizes) ** 2) * 4 / 3) / 6
    found = mean_interval(x, prompt, level=0.9)
    assert math.isclose(found.low, 2 / 6 - half) and math.isclose(found.high, 2 / 6 + half)
    change = paired_bootstrap([0] * 6, x, prompt, level=0.9)
    assert (change.low, change.high) == (found.low, found.high)


def test_coverage_needs_clusters():
    rng = np.random.default_rng(2)
    prompt, naive, clustered = np.repeat(np.arange(40), 4), 0, 0
    for _ in range(300):
        x = rng.normal(size=40)[prompt] + 0.3 * rng.normal(size=160)
        found = mean_interval(x, n_boot=400), mean_interval(x, prompt, n_boot=400)
        naive, clustered = (c + (f.low <= 0 <= f.high) for c, f in zip((naive, clustered), found, strict=True))
    assert naive / 300 < 0.8 and clustered / 300 >= 0.92


@pytest.mark.parametrize("n", [8, 40])
def test_permutation_p_is_uniform_under_the_null(n):
    rng = np.random.default_rng(3)
    p = np.array([paired_bootstrap(np.zeros(n), rng.normal(size=n), n_boot=100, n_flip=999).p for _ in range(1500)])
    for level in (0.01, 0.05, 0.2, 0.5):
        assert abs(np.mean(p <= level) - level) < 3.5 * math.sqrt(level * (1 - level) / 1500) + 2 / min(2**n, 1000)
    assert stats.kstest(p, "uniform").statistic < 0.04 and p.min() > 0


def trials(rng, share, sd, sizes):
    "Yes or no per trial; prompts differ in their chance, which is `share` on average (a beta distribution)."
    concentration = share * (1 - share) / sd**2 - 1 if sd else 1e9
    chance = rng.beta(concentration * share, concentration * (1 - share), size=len(sizes))
    return (rng.random(sum(sizes)) < np.repeat(chance, sizes)).astype(float)


SIZES = {"30 x 3": [3] * 30, "100 x 5": [5] * 100, "60, uneven": [1, 2, 3, 3, 3, 6] * 10}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("share", [0.04, 0.2, 0.5])
@pytest.mark.parametrize("spread", [0.0, 0.5, 0.9])
def test_rate_interval_coverage(name, share, spread):
    rng, sizes = np.random.default_rng(10), SIZES[name]
    prompt, sd = np.repeat(np.arange(len(sizes)), sizes), spread * math.sqrt(share * (1 - share))
    found = [rate_interval(trials(rng, share, sd, sizes), prompt) for _ in range(600)]
    assert np.mean([f.low <= share <= f.high for f in found]) >= 0.925


def test_trials_of_a_prompt_are_not_prompts():
    rng, prompt = np.random.default_rng(11), np.repeat(np.arange(100), 5)
    drawn = [trials(rng, 0.2, 0.3, [5] * 100) for _ in range(600)]
    naive = np.mean([f.low <= 0.2 <= f.high for f in (rate_interval(x) for x in drawn)])
    assert naive < 0.8 <= 0.925 <= np.mean([f.low <= 0.2 <= f.high for f in (rate_interval(x, prompt) for x in drawn)])


@pytest.mark.parametrize("sd", [0.0, 0.2, 0.38])
@pytest.mark.parametrize("effect", [0.0, 0.1])
def test_rate_difference_coverage_and_level(sd, effect):
    rng, prompt = np.random.default_rng(12), np.repeat(np.arange(60), 3)
    found = []
    for _ in range(600):
        chance = rng.beta(0.25 * (0.16 / max(sd, 0.01) ** 2), 0.75 * (0.16 / max(sd, 0.01) ** 2), size=60)
        a = rng.random(180) < np.repeat(chance, 3)
        b = rng.random(180) < np.repeat((1 - effect) * chance + effect * rng.integers(2, size=60), 3)
        found.append(rate_difference(a, b, prompt))
    truth = effect * (0.5 - 0.25)
    assert np.mean([f.low <= truth <= f.high for f in found]) >= 0.93
    if not effect:
        assert np.mean([f.p <= 0.05 for f in found]) <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 600)


def test_a_table_of_equal_models_is_all_ties():
    "With four models alike in each of three columns, a false mark stands in at most one table of twenty."
    rng, wrong = np.random.default_rng(13), 0
    for _ in range(300):
        shares, p = [], []
        for _ in range(3):
            outcomes = rng.random((4, 80)) < rng.random(80)
            shares.append({m: float(outcomes[m].mean()) for m in range(4)})
            p.append({(a, b): rate_difference(outcomes[a], outcomes[b]).p for a, b in combinations(range(4), 2)})
        wrong += any(len(t) < 4 for t in tied(shares, p))
    assert wrong / 300 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)


def test_minimum_detectable_rate_over_trials_is_detected():
    "The spread that counts is that of the prompts' mean differences."
    rng, prompt, n = np.random.default_rng(14), np.repeat(np.arange(150), 3), 150
    effect, hits = minimum_detectable(n, sd=math.sqrt(0.13)), 0
    for _ in range(400):
        moved = rng.choice([-1, 0, 1], p=[(0.13 - effect) / 2, 0.87, (0.13 + effect) / 2], size=n)
        start = np.where(moved == 0, rng.random(n) < 0.5, moved < 0)
        after = np.where(moved == 0, start, moved > 0)
        hits += rate_difference(np.repeat(start, 3), np.repeat(after, 3), prompt).p <= 0.05
    assert abs(hits / 400 - 0.8) < 0.06


# references


def test_flips_of_whole_prompts_against_enumeration():
    rng = np.random.default_rng(15)
    for g in range(1, 11):
        prompt = np.repeat(np.arange(g), 3)
        a, b = rng.random((2, 3 * g)) < 0.5
        sums = np.bincount(prompt, weights=b * 1.0 - a)
        flips = [abs(sum(s * (1 if m >> i & 1 else -1) for i, s in enumerate(sums))) for m in range(2**g)]
        expected = np.mean(np.array(flips) >= abs(sums.sum()))
        assert math.isclose(rate_difference(a, b, prompt).p, expected)
        if g > 1:
            assert math.isclose(paired_bootstrap(a, b, prompt, n_boot=100, n_flip=2**10).p, expected)


def test_many_prompts_have_a_small_exact_p():
    found = rate_difference([False] * 15_000, [True] * 60 + [False] * 14_940)
    assert math.isclose(found.p, 2 * 0.5**60) and found.estimate == 0.004 and found.n == 15_000


def test_interval_of_a_difference_is_bonett_and_price():
    "With one trial per prompt it is the adjusted Wald interval: one more pair of each kind."
    a, b = (
        [True] * 12 + [False] * 3 + [True] * 25 + [False] * 60,
        [False] * 12 + [True] * 3 + [True] * 25 + [False] * 60,
    )
    found, p12, p21 = rate_difference(a, b), 13 / 102, 4 / 102
    half = stats.norm.ppf(0.975) * math.sqrt((p12 + p21 - (p21 - p12) ** 2) / 102)
    assert math.isclose(found.low, p21 - p12 - half) and math.isclose(found.high, p21 - p12 + half)


def test_sign_flip_against_enumeration_by_hand():
    rng = np.random.default_rng(4)
    for n in range(2, 11):
        d = rng.normal(0.4, 1, size=n)
        means = [np.mean(d * [1 if m >> i & 1 else -1 for i in range(n)]) for m in range(2**n)]
        expected = np.mean(np.abs(means) >= abs(d.mean()) - 1e-12)
        assert math.isclose(paired_bootstrap(np.zeros(n), d, n_boot=100).p, expected)


def test_random_flips_count_the_observed_one():
    found = paired_bootstrap(np.zeros(60), np.full(60, 0.5) + np.arange(60) / 100)
    assert math.isclose(found.p, 2 / 10_001) and found.low > 0


def test_mean_interval_against_student():
    x = np.random.default_rng(5).normal(1, 2, size=500)
    found, (low, high) = mean_interval(x, n_boot=20_000), stats.t.interval(0.95, 499, x.mean(), stats.sem(x))
    assert abs(found.low - low) < 0.01 and abs(found.high - high) < 0.01 and found.estimate == x.mean()


def test_mcnemar_against_binomial():
    rng = np.random.default_rng(6)
    for _ in range(50):
        a, b = rng.random(30) < 0.4, rng.random(30) < 0.6
        found = mcnemar(list(a), list(b))
        only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
        assert (found.only_a, found.only_b, found.n) == (only_a, only_b, 30)
        tail = sum(math.comb(only_a + only_b, i) for i in range(min(only_a, only_b) + 1)) / 2 ** (only_a + only_b)
        assert math.isclose(found.p, min(1, 2 * tail))


def test_mcnemar_without_discordance_or_side():
    assert mcnemar([True, False], [True, False]).p == 1
    found = mcnemar([True, None, False, True], [False, True, None, True])
    assert (found.only_a, found.only_b, found.n, found.dropped) == (1, 0, 2, 2)


def test_kappa_against_definition():
    rng = np.random.default_rng(7)
    for k in (2, 3, 5):
        x = rng.integers(0, k, 80)
        y = np.where(rng.random(80) < 0.5, x, rng.integers(0, k, 80))
        observed = np.mean(x == y)
        chance = sum(np.mean(x == c) * np.mean(y == c) for c in range(k))
        assert math.isclose(cohen_kappa(list(x), list(y)), (observed - chance) / (1 - chance))


def test_kappa_interval_coverage():
    rng, truth, hits = np.random.default_rng(8), 0.6, 0
    for _ in range(400):
        x = rng.random(80) < 0.5
        y = np.where(rng.random(80) < truth, x, rng.random(80) < 0.5)
        found = kappa_interval(list(x), list(y), n_boot=400)
        hits += found.low <= truth <= found.high
    assert hits / 400 >= 0.92


def test_kappa_interval_coverage_where_items_come_in_clusters():
    rng, truth, hits, naive = np.random.default_rng(8), 0.6, 0, 0
    for _ in range(300):
        x = rng.random(60) < 0.5
        y = np.where(rng.random(60) < truth, x, rng.random(60) < 0.5)
        x, y, who = np.repeat(x, 4).tolist(), np.repeat(y, 4).tolist(), np.repeat(np.arange(60), 4).tolist()
        found, plain = kappa_interval(x, y, n_boot=400, clusters=who), kappa_interval(x, y, n_boot=400)
        hits, naive = hits + (found.low <= truth <= found.high), naive + (plain.low <= truth <= plain.high)
    assert hits / 300 >= 0.91 and naive / 300 < 0.75


@pytest.mark.parametrize(
    ("clusters", "why"),
    [([*range(11)], "one cluster per item"), ([1] * 12, "got 1"), ([1, 2, 3] * 4, "got 3: give kappa without")],
)
def test_kappa_interval_refuses_clusters_that_say_nothing(clusters, why):
    with pytest.raises(UserError, match=why):
        kappa_interval(["a", "b"] * 6, ["a", "b"] * 6, clusters=clusters)


def test_a_few_items_have_no_kappa_interval():
    with pytest.raises(UserError, match="expected 10 items or clusters or more, got 9"):
        kappa_interval(["a", "b", "a"] * 3, ["a", "b", "b"] * 3)
    assert kappa_interval(["a", "b"] * 5, ["a", "b"] * 5).n == 10


def test_minimum_detectable_is_detected():
    rng = np.random.default_rng(9)
    effect = minimum_detectable(200, p=0.4)
    a, b = rng.binomial(200, 0.4, 4000) / 200, rng.binomial(200, 0.4 + effect, 4000) / 200
    z = (b - a) / np.sqrt((a * (1 - a) + b * (1 - b)) / 200)
    assert abs(np.mean(np.abs(z) > stats.norm.ppf(0.975)) - 0.8) < 0.03
    assert minimum_detectable(10, sd=0) == 0 and minimum_detectable(400, sd=1) == minimum_detectable(100, sd=1) / 2


# properties


@CALM
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_properties(kn, level):
    k, n = kn
    found, mirror = wilson(k, n, level), wilson(n - k, n, level)
    assert 0 <= found.low <= found.estimate + 1e-12 and found.estimate <= found.high + 1e-12 and found.high <= 1
    assert math.isclose(found.low, 1 - mirror.high, abs_tol=1e-9)
    wider = wilson(k, n, (level + 1) / 2)
    assert wider.low <= found.low + 1e-12 and wider.high >= found.high - 1e-12


@CALM
@given(st.lists(values, min_size=2, max_size=30), st.data())
def test_mean_interval_properties(x, data):
    clusters = data.draw(st.none() | st.lists(st.integers(0, 4), min_size=len(x), max_size=len(x)))
    if clusters is not None and len(set(clusters)) < 2:
        with pytest.raises(UserError, match="at least 2 clusters"):
            mean_interval(x, clusters)
        return
    found = mean_interval(x, clusters, n_boot=200)
    slack = 1e-9 * (1 + max(map(abs, x)))
    few = len(x if clusters is None else set(clusters)) < 10
    assert found.low <= found.high and (few or (min(x) - slack <= found.low and found.high <= max(x) + slack))
    assert found == mean_interval(x, clusters, n_boot=200)
    assert all(map(math.isfinite, (found.estimate, found.low, found.high)))


@CALM
@given(values, st.integers(2, 20))
def test_constant_data_has_no_width(v, n):
    found = mean_interval([v] * n)
    assert found.low == found.high == found.estimate and math.isclose(found.estimate, v, abs_tol=1e-12)
    same = paired_bootstrap([v] * n, [v] * n)
    assert (same.low, same.estimate, same.high, same.p) == (0, 0, 0, 1)


pairs = st.lists(st.tuples(st.none() | values, st.none() | st.just(math.nan) | values), min_size=2, max_size=20)


@CALM
@given(pairs)
def test_pairs_with_a_missing_side_are_dropped_and_counted(rows):
    a, b = zip(*rows, strict=True)
    whole = [(x, y) for x, y in rows if x is not None and y is not None and not math.isnan(y)]
    if len(whole) < 2:
        with pytest.raises(UserError):
            paired_bootstrap(a, b, n_boot=100, n_flip=50)
        return
    found = paired_bootstrap(a, b, n_boot=100, n_flip=50)
    left, right = zip(*whole, strict=True)
    kept = paired_bootstrap(left, right, n_boot=100, n_flip=50)
    assert found == Difference(kept.estimate, kept.low, kept.high, kept.p, len(whole), len(rows) - len(whole))
    back = paired_bootstrap(b, a, n_boot=100, n_flip=50)
    assert back.estimate == -found.estimate and 0 < found.p <= 1


@CALM
@given(st.lists(st.floats(0, 1), max_size=20), st.randoms(use_true_random=False))
def test_holm_properties(p, rng):
    adjusted = holm(p)
    assert all(x <= y <= min(1, len(p) * x + 1e-15) for x, y in zip(p, adjusted, strict=True))
    by_p = [y for _, y in sorted(zip(p, adjusted, strict=True))]
    assert by_p == sorted(by_p)
    order = list(range(len(p)))
    rng.shuffle(order)
    assert holm([p[i] for i in order]) == [adjusted[i] for i in order]


@CALM
@given(st.lists(st.tuples(*[st.sampled_from(["safe", "unsafe", "unsure"])] * 2), min_size=1, max_size=40))
def test_kappa_properties(rows):
    x, y = zip(*rows, strict=True)
    kappa = cohen_kappa(x, y)
    assert kappa == pytest.approx(cohen_kappa(y, x))
    if kappa is None:
        assert len({*x, *y}) == 1
        return
    assert -1 <= kappa <= 1 and (kappa == 1) == (x == y)
    if len(x) < 10:
        return
    found = kappa_interval(x, y, n_boot=100)
    assert -1 <= found.low <= found.high <= 1 and found.estimate == kappa


def test_perfect_agreement_has_no_width():
    assert kappa_interval(["a", "b"] * 20, ["a", "b"] * 20) == Interval(1, 1, 1, 40)


clustered = st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.booleans()), min_size=1, max_size=40)


@CALM
@given(clustered)
def test_rate_interval_properties(rows):
    prompt, x, _ = zip(*rows, strict=True)
    found, flat = rate_interval(x, prompt), wilson(sum(x), len(x))
    sizes = np.bincount(prompt)
    least = len(x) ** 2 / (sizes**2).sum()
    assert 0 <= found.low <= found.estimate + 1e-12 and found.estimate <= found.high + 1e-12 and found.high <= 1
    width, z2 = found.high - found.low, stats.norm.ppf(0.975) ** 2
    widest = (
        2 * math.sqrt(found.estimate * (1 - found.estimate) * z2 / least + (z2 / least) ** 2 / 4) / (1 + z2 / least)
    )
    assert flat.high - flat.low - 1e-9 <= width <= widest + 1e-9
    mirror = rate_interval([not v for v in x], prompt)
    assert math.isclose(mirror.low, 1 - found.high, abs_tol=1e-9) and found.n == len(x)
    own = rate_interval(x, range(len(x)))
    assert own == rate_interval(x) == flat


@CALM
@given(clustered)
def test_rate_difference_properties(rows):
    prompt, a, b = zip(*rows, strict=True)
    found, back = rate_difference(a, b, prompt), rate_difference(b, a, prompt)
    assert (found.estimate, found.low, found.high) == pytest.approx((-back.estimate, -back.high, -back.low))
    assert math.isclose(found.p, back.p) and 0 < found.p <= 1 and -1 <= found.low <= found.estimate <= found.high <= 1
    assert found.low < found.high
    assert math.isclose(rate_difference(a, b).p, mcnemar(a, b).p)


@CALM
@given(st.lists(st.tuples(st.none() | st.booleans(), st.none() | st.booleans()), min_size=1, max_size=30))
def test_rates_drop_pairs_with_a_missing_side(rows):
    whole = [(x, y) for x, y in rows if x is not None and y is not None]
    a, b = zip(*rows, strict=True)
    if not whole:
        with pytest.raises(UserError, match="at least one complete pair"):
            rate_difference(a, b)
        return
    found, kept = rate_difference(a, b, list(range(len(rows)))), rate_difference(*zip(*whole, strict=True))
    assert (found.estimate, found.low, found.high, found.p) == (kept.estimate, kept.low, kept.high, kept.p)
    assert (found.n, found.dropped) == (len(whole), len(rows) - len(whole))


def test_tied_with_the_best():
    pairs = {("a", "b"): 1e-6, ("a", "c"): 0.2, ("b", "c"): 0.03}
    assert tied([{"a": 0.1, "b": 0.4, "c": 0.2}], [pairs]) == [{"a", "c"}]
    assert tied([{"a": 0.1, "b": 0.4, "c": 0.1}], [{**pairs, ("c", "b"): 0.9}]) == [{"a", "b", "c"}]  # c is best, too
    assert tied([{"a": 0.1}, {}], [{}, {}]) == [{"a"}, set()]


# errors


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: wilson(-1, 5), "expected k between 0 and n=5, got k=-1"),
        (lambda: wilson(2.5, 5), "expected whole numbers"),
        (lambda: wilson(1, 5, 95), "expected level between 0 and 1"),
        (lambda: mean_interval([[1, 2], [3, 4]]), "flat list"),
        (lambda: mean_interval([1, math.inf]), "got inf at position 1"),
        (lambda: mean_interval([1, 2], n_boot=10), "n_boot of 100 or more"),
        (lambda: mean_interval([1, 2], [1]), "1 clusters for 2 values"),
        (lambda: paired_bootstrap([], []), "got nothing"),
        (lambda: paired_bootstrap([1, 2], [1, 2], [1]), "1 clusters for 2 pairs"),
        (lambda: mcnemar([1, 0], [1]), "got 2 values of a and 1 of b"),
        (lambda: mcnemar([2], [1]), "expected True or False"),
        (lambda: cohen_kappa([], []), "at least one item"),
        (lambda: cohen_kappa([1], [1, 2]), "two labels per item"),
        (lambda: cohen_kappa([None, "a"], ["a", "a"]), "missing one"),
        (lambda: holm([math.nan]), "p values between 0 and 1"),
        (lambda: rate_interval([0.5]), "expected True or False"),
        (lambda: rate_interval([]), "got nothing"),
        (lambda: rate_interval([1, 0], [1]), "1 clusters for 2 values"),
        (lambda: rate_difference([2], [1]), "expected True or False"),
        (lambda: rate_difference([1, 0], [1, 0], [1]), "1 clusters for 2 pairs"),
        (lambda: tied([{"a": 0.1}], []), "got 1 and 0 columns"),
        (lambda: tied([{"a": 0.1, "b": 0.2}], [{("a", "c"): 0.1}]), "a p value for each pair of a, b"),
        (lambda: minimum_detectable(10), "either sd or p"),
        (lambda: minimum_detectable(10, sd=1, p=0.5), "either sd or p"),
        (lambda: minimum_detectable(10, p=2), "expected p between"),
        (lambda: minimum_detectable(10, sd=-1), "expected sd of 0 or more"),
    ],
)
def test_errors_are_one_line(call, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as e:
        call()
    assert message in str(e.value)
