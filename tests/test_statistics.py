"""Intervals cover what they say, tests reject as often as they say, and each formula equals a plain version of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from mirrorpo.statistics import (
    EXACT_SEEDS,
    MIN_EQUIVALENCE,
    SHARE,
    Interval,
    binomial_noise,
    detectable_effect,
    equivalent,
    holm,
    improvement_probability,
    interquartile_mean,
    mean_interval,
    performance_profile,
    permutation_p,
    smallest_p,
    variance_ratio,
)
from mirrorpo.statistics.curves import band, height_difference, rank_correlation

SEEDS = 10
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
# Name to (draw, true mean); accuracies near the ceiling look like the beta distribution.
DISTRIBUTIONS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, size: rng.normal(size=size), 0.0),
    "uniform": (lambda rng, size: rng.uniform(size=size), 0.5),
    "heavy tails": (lambda rng, size: rng.standard_t(5, size=size), 0.0),
    "near a ceiling": (lambda rng, size: rng.beta(8, 2, size=size), 0.8),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_interval_of_a_mean_covers_it_about_as_often_as_it_says(name: str) -> None:
    draw, mean = DISTRIBUTIONS[name]
    samples = draw(np.random.default_rng(1), (600, SEEDS))
    covered = np.mean([not mean_interval(sample).excludes(mean) for sample in samples])
    assert 0.92 <= covered <= 0.985  # three standard errors of 600 draws are 0.027


def test_where_there_is_little_to_resample_the_interval_is_students() -> None:
    found = mean_interval([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_one_seed_bounds_nothing_and_equal_seeds_leave_no_width() -> None:
    assert mean_interval([0.7]) == Interval(estimate=0.7, low=-math.inf, high=math.inf)
    found = mean_interval([0.7] * 10)
    assert found.low == found.high == pytest.approx(0.7)
    assert mean_interval([0.1] * 9 + [0.9]).high > 0.18


def test_an_interval_of_coarse_values_ends_somewhere() -> None:
    # Seven zeros of ten: 0.7^10 or 2.8 % of the resamples have no spread, more than the tail: Student's end.
    values = [0.0] * 7 + [1.0, 2.0, 2.0]
    spread = float(np.std(values, ddof=1))
    assert mean_interval(values).high == pytest.approx(0.5 + stats.t.ppf(0.975, 9) * spread / math.sqrt(10))
    assert mean_interval([-x for x in values]).low == pytest.approx(-mean_interval(values).high)


@pytest.mark.parametrize("count", [2, 5, 10])
def test_the_permutation_test_is_scipys(count: int) -> None:
    rng = np.random.default_rng(count)
    for shift in (0.0, 0.5, 2.0):
        sample = np.round(rng.normal(shift, size=count), 1)  # ties included
        expected = stats.permutation_test(
            (sample,),
            lambda x, axis: np.mean(x, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=2**count,
        )
        assert permutation_p(sample) == pytest.approx(expected.pvalue)


def test_beyond_enumeration_the_permutation_test_is_close_to_students() -> None:
    sample = np.random.default_rng(3).normal(0.5, size=EXACT_SEEDS + 20)
    assert permutation_p(sample) == pytest.approx(stats.ttest_1samp(sample, 0.0).pvalue, abs=0.01)


@pytest.mark.parametrize("count", [1, 3, 8, 12, 30])
def test_no_p_value_is_smaller_than_the_number_of_seeds_allows(count: int) -> None:
    assert permutation_p(np.arange(1.0, count + 1)) == smallest_p(count)


@pytest.mark.parametrize(
    "whole", [(-1, 2, 2, -2), (1, 1, 1, -1, 1, 1), (3, -1, -1, -1, 7), (5, 5, 10, -5, 5, -10, 5, 5)]
)
def test_sign_patterns_that_tie_but_for_rounding_count_as_ties(whole: tuple[int, ...]) -> None:
    # In fortieths the differences are no binary fractions, and sums that are equal differ in their last digit.
    assert permutation_p([x / 40 for x in whole]) == permutation_p([float(x) for x in whole])


def test_a_copy_of_an_arm_has_the_very_same_interval() -> None:
    sample = np.random.default_rng(37).beta(8, 2, size=SEEDS)
    assert mean_interval(sample) == mean_interval(sample.copy())
    assert improvement_probability(sample, sample[::-1]) == improvement_probability(sample.copy(), sample[::-1].copy())


def test_large_equal_values_have_an_interval_of_no_width_and_no_warning() -> None:
    found = mean_interval([10_000.1] * 35)
    assert found.low == found.high == pytest.approx(10_000.1)


def test_differences_of_zero_are_no_evidence() -> None:
    assert permutation_p([0.0] * 8) == 1.0


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_study_without_any_effect_claims_one_in_at_most_six_of_a_hundred_cases(name: str) -> None:
    draw, _ = DISTRIBUTIONS[name]
    rng = np.random.default_rng(5)
    arms, studies = 4, 1500
    wrong_single = wrong_any = 0
    for values in draw(rng, (studies, arms + 1, SEEDS)):
        corrected = holm(p := [permutation_p(arm - values[0]) for arm in values[1:]])
        wrong_single += p[0] <= 0.05
        wrong_any += min(corrected) <= 0.05
    assert wrong_single / studies <= 0.06
    assert wrong_any / studies <= 0.06


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    # By definition: the largest of |S| * min(p in S) over all sets S of hypotheses that hold the one in question.
    p = [0.011, 0.04, 0.02, 0.3, 0.012]
    sets = [s for r in range(1, 6) for s in itertools.combinations(range(5), r)]
    expected = [min(1.0, max(len(s) * min(p[j] for j in s) for s in sets if i in s)) for i in range(5)]
    assert holm(p) == pytest.approx(expected)
    assert holm([]) == []


def test_the_detectable_effect_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(11)
    for seeds, comparisons in ((8, 1), (10, 1), (10, 12), (16, 5)):
        sample = np.array([-1.0, 1.0] * (seeds // 2))
        effect = detectable_effect(sample / sample.std(ddof=1), comparisons)
        p = [permutation_p(rng.normal(effect, 1.0, size=seeds)) for _ in range(600)]
        # Two errors: 400 simulated studies behind the effect, 600 here; three of both are 0.08.
        assert np.mean(np.array(p) <= 0.05 / comparisons) == pytest.approx(0.8, abs=0.08)


def test_too_few_seeds_can_detect_nothing() -> None:
    assert detectable_effect([0.1, 0.2, 0.3, 0.2, 0.1]) == math.inf  # 2 / 2^5 > 0.05
    assert math.isfinite(detectable_effect([0.1, 0.2, 0.3, 0.2, 0.1, 0.3]))
    assert detectable_effect([0.1, 0.2, 0.3, 0.2, 0.1, 0.3], num_comparisons=2) == math.inf


def test_the_probability_of_improvement_is_mann_and_whitneys() -> None:
    rng = np.random.default_rng(13)
    x, y = np.round(rng.normal(0.3, size=12), 1), np.round(rng.normal(size=12), 1)
    found = improvement_probability(x, y)
    assert found.estimate == pytest.approx(stats.mannwhitneyu(x, y).statistic / 144)
    assert 0.0 <= found.low < found.estimate < found.high <= 1.0
    assert improvement_probability(x, x).estimate == 0.5


def test_winning_every_pair_of_few_runs_is_no_certainty() -> None:
    # Wilson's lower end for 3 of 3: 3 / (3 + z^2).
    found = improvement_probability([0.9, 0.8, 0.7], [0.1, 0.2, 0.3])
    assert (found.estimate, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(3 / (3 + 1.959963984540054**2))


# ---- equivalence, and the noise of an evaluation


@pytest.mark.parametrize("num_problems", [8, 500, 100_000])
@pytest.mark.parametrize("count", [2, 3, MIN_EQUIVALENCE - 1])
def test_few_identical_differences_never_show_that_two_arms_are_the_same(count: int, num_problems: int) -> None:
    noise = math.sqrt(2) * binomial_noise(0.5, num_problems, count)
    assert not equivalent([0.0] * count, 0.02, noise)


def test_identical_differences_count_as_noisy_as_their_evaluation() -> None:
    # 50 problems at 50 %: a difference is uncertain by 10 points; with ten seeds by 10 t(9) / sqrt(10) = 7.2.
    noise = math.sqrt(2) * binomial_noise(0.5, 50)
    assert noise == pytest.approx(0.1)
    found = mean_interval([0.01] * 10, noise=noise)
    assert found.high - 0.01 == pytest.approx(stats.t.ppf(0.975, 9) * noise / math.sqrt(10))
    assert not equivalent([0.01] * 10, 0.02, noise)
    assert equivalent([0.01] * 10, 0.1, noise)
    assert not equivalent([0.01] * 10, 0.1, None), "without the number of problems nothing is claimed"
    assert detectable_effect([0.01] * 10, noise=noise) > noise
    assert math.isnan(detectable_effect([0.01] * 10)), "a spread of 0 is not a study that finds everything"


def test_an_accuracy_of_all_or_none_is_not_exact() -> None:
    for share in (0.0, 1.0):
        # 8 problems, two right and two wrong added: 2/12 of the other kind.
        assert binomial_noise(share, 8) == pytest.approx(math.sqrt(10 / 12 * 2 / 12 / 8))
        assert not equivalent([0.0] * MIN_EQUIVALENCE, 0.02, binomial_noise(share, 8))


def accuracies(rng: np.random.Generator, mean: float, studies: int, problems: int, spread: float) -> np.ndarray:
    """Accuracies of (studies, SEEDS) runs whose true accuracies vary by ``spread``."""
    truth = np.clip(rng.normal(mean, spread, (studies, SEEDS)), 0.0, 1.0)
    return rng.binomial(problems, truth) / problems


@pytest.mark.parametrize(("problems", "spread"), [(20, 0.0), (200, 0.0), (200, 0.02), (2000, 0.01)])
def test_arms_that_differ_by_the_margin_are_called_the_same_in_at_most_five_of_a_hundred_studies(
    problems: int, spread: float
) -> None:
    rng, studies, arms, margin = np.random.default_rng(23), 400, 3, 0.02
    base = accuracies(rng, 0.7, studies, problems, spread)
    others = [accuracies(rng, 0.7 + margin, studies, problems, spread) for _ in range(arms)]
    wrong = 0
    for n in range(studies):
        noises = [binomial_noise(arm[n].mean(), problems, SEEDS) for arm in (base, *others)]
        wrong += any(
            equivalent(arm[n] - base[n], margin, math.hypot(noise, noises[0]), arms)
            for arm, noise in zip(others, noises[1:], strict=True)
        )
    assert wrong / studies <= 0.05


def test_arms_without_a_difference_are_called_the_same_where_the_evaluation_is_large_enough() -> None:
    rng, studies = np.random.default_rng(29), 200
    x, y = (accuracies(rng, 0.7, studies, 5000, 0.005) for _ in range(2))
    noise = math.sqrt(2) * binomial_noise(0.7, 5000, SEEDS)
    assert np.mean([equivalent(a - b, 0.02, noise) for a, b in zip(x, y, strict=True)]) >= 0.9


@pytest.mark.parametrize("mean", [0.7, 0.98])
def test_the_interval_of_an_accuracy_covers_it_when_only_the_evaluation_is_noisy(mean: float) -> None:
    rng, studies, problems = np.random.default_rng(31), 400, 50
    covered = []
    for sample in accuracies(rng, mean, studies, problems, 0.0)[:, :5]:
        found = mean_interval(sample, noise=binomial_noise(sample.mean(), problems, 5), legal=SHARE)
        assert 0.0 <= found.low <= found.estimate <= found.high <= 1.0
        covered.append(not found.excludes(mean))
    assert np.mean(covered) >= 0.93


def test_an_interval_ends_at_the_legal_range() -> None:
    found = mean_interval([0.99, 0.90], legal=SHARE)
    # Student's: 0.945 +- 12.7 * 0.045 = 0.37 to 1.52.
    assert (found.low, found.high) == (pytest.approx(0.945 - stats.t.ppf(0.975, 1) * 0.045), 1.0)
    assert mean_interval([0.01, 0.90], legal=SHARE).low == 0.0
    assert mean_interval([0.7], legal=SHARE) == Interval(estimate=0.7, low=0.0, high=1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: binomial_noise(1.2, 10), r"share must lie in \[0, 1\], got 1.2"),
        (lambda: binomial_noise(0.5, 0), "num_problems and num_runs must be at least 1, got 0 and 1"),
        (lambda: mean_interval([1.0, 2.0], noise=-1.0), "noise must be at least 0, got -1.0"),
        (lambda: mean_interval([1.0, 2.0], noise=math.nan), "noise must be at least 0, got nan"),
    ],
)
def test_what_is_no_noise_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_interquartile_mean_is_that_of_the_middle_half() -> None:
    assert interquartile_mean([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -7.0]) == (2 + 3 + 4 + 5) / 4
    assert interquartile_mean([3.0]) == 3.0


@pytest.mark.parametrize("shared", [0.0, 1.5])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_interval_of_a_variance_ratio_covers_it_for_pairs_and_for_independent_arms(
    name: str, shared: float
) -> None:
    draw, _ = DISTRIBUTIONS[name]
    rng = np.random.default_rng(17)
    size = (800, SEEDS)
    common = shared * draw(rng, size)
    x, y = (draw(rng, size) + common for _ in range(2))
    covered = np.mean([not variance_ratio(3 * a, b).excludes(9.0) for a, b in zip(x, y, strict=True)])
    # Estimating a kurtosis from ten values has its limits: heavy tails cost three points of coverage.
    assert (0.88 if name == "heavy tails" else 0.91) <= covered <= 0.985


def test_a_threefold_spread_is_seen_at_ten_seeds() -> None:
    # The published claim: +/-0.2 against +/-0.6 between seeds.
    rng = np.random.default_rng(19)
    found = [variance_ratio(rng.normal(0, 0.2, SEEDS), rng.normal(0, 0.6, SEEDS)) for _ in range(500)]
    assert np.mean([interval.high < 1 for interval in found]) >= 0.7
    assert np.median([interval.estimate for interval in found]) == pytest.approx(1 / 9, rel=0.2)


def test_arms_that_do_not_vary_have_no_variance_ratio() -> None:
    constant, varied = [0.5] * 8, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    for x, y in ((constant, varied), (varied, constant), (constant, constant)):
        found = variance_ratio(x, y)
        assert (found.low, found.high) == (0.0, math.inf)
    assert math.isnan(variance_ratio(varied, constant).estimate)


@pytest.mark.parametrize("function", [mean_interval, permutation_p, detectable_effect, interquartile_mean])
@pytest.mark.parametrize("values", [[], [[1.0]], [1.0, math.nan], [math.inf]])
def test_what_is_no_vector_of_finite_values_is_refused(function: Callable[..., object], values: list[float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        function(values)


@pytest.mark.parametrize("function", [improvement_probability, variance_ratio])
def test_arms_must_be_paired(function: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="one value for each common seed, got 2 and 3"):
        function([1.0, 2.0], [1.0, 2.0, 3.0])


def test_p_values_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"p_values must lie in \[0, 1\]"):
        holm([0.5, 1.5])


def test_a_performance_profile_is_the_share_of_runs_above_each_threshold() -> None:
    values, thresholds = [0.5, 0.7, 0.7, 0.9], [0.0, 0.5, 0.6, 0.7, 0.8, 0.9]
    # By counting: 4, 3 (0.5 is not above 0.5), 3, 1, 1 and 0 of 4.
    assert performance_profile(values, thresholds) == [1.0, 0.75, 0.75, 0.25, 0.25, 0.0]


def test_the_height_difference_is_the_area_between_two_curves_over_its_width() -> None:
    # y = x^2 at 0, 1, 2, 3 (straight between) against y = 1 from 0.5 to 2.5: on [0.5, 1] x - 1, on [1, 2] 3 x - 3, on
    # [2, 2.5] 5 x - 7; areas -1/8, 3/2 and 17/8 by hand.
    found = height_difference([0.0, 3.0, 1.0, 2.0], [0.0, 9.0, 1.0, 4.0], [2.5, 0.5], [1.0, 1.0])
    assert found == pytest.approx((-1 / 8 + 3 / 2 + 17 / 8) / 2)
    assert height_difference([0.5, 2.5], [1.0, 1.0], [0.0, 3.0, 1.0, 2.0], [0.0, 9.0, 1.0, 4.0]) == pytest.approx(
        -found
    )


def test_nothing_is_extrapolated_beyond_what_both_curves_cover() -> None:
    assert height_difference([0.0, 1.0], [0.0, 1.0], [1.0, 2.0], [5.0, 5.0]) is None  # they touch
    assert height_difference([0.0, 1.0], [0.0, 1.0], [3.0, 4.0], [5.0, 5.0]) is None
    assert height_difference([0.5], [1.0], [0.0, 1.0], [0.0, 0.0]) is None  # one run is no curve
    assert height_difference([0.0, 2.0], [1.0, 1.0], [1.0, 3.0], [0.0, 0.0], min_width=1.0) is None
    wild = [0.0, 0.0, 0.0, 1e9]  # far outside the first curve's range: of no consequence
    assert height_difference([0.0, 1.0], [1.0, 1.0], [0.0, 0.5, 1.0, 1.0 + 1e-12], wild) == pytest.approx(1.0, abs=2e-3)


def test_the_order_of_a_curves_points_does_not_matter() -> None:
    assert height_difference([3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 1.0], [0.0, 0.0]) == pytest.approx(2.0)


def test_runs_at_the_same_distance_are_one_point_with_their_mean() -> None:
    assert height_difference([0.0, 1.0, 1.0], [0.0, 0.0, 2.0], [0.0, 1.0], [0.0, 0.0]) == pytest.approx(0.5)


def test_a_band_covers_only_where_enough_curves_reach() -> None:
    curves = [([0.0, 2.0], [0.0, 2.0]), ([1.0, 2.0], [3.0, 3.0])]
    alone, both = band(curves, [0.5, 1.5]).heights
    assert alone is None
    assert both is not None
    assert both.estimate == pytest.approx((1.5 + 3.0) / 2)


def test_rank_correlation_is_spearmans_with_ties_and_ranks_what_is_infinite_last() -> None:
    rng = np.random.default_rng(3)
    x, y = np.round(rng.normal(size=40), 1), np.round(rng.normal(size=40), 1)
    assert rank_correlation(x, y) == pytest.approx(float(stats.spearmanr(x, y).statistic))
    assert rank_correlation([1.0, math.inf, 2.0, math.nan], [1.0, 3.5, 2.0, 3.5]) == pytest.approx(1.0)
    assert math.isnan(rank_correlation([1.0, 1.0], [1.0, 2.0]))
    assert math.isnan(rank_correlation([math.nan, math.nan], [1.0, 2.0]))  # all are last: no order


def simulated_curves(rng: np.random.Generator, curves: int, lift: float) -> np.ndarray:
    """(curves - 1, SEEDS) height differences to the first of curves that all have the same shape; the last is lifted.

    Distances and accuracies are noisy, share a part in each seed, and every curve ends in the same run.
    """
    heights = np.zeros((curves - 1, SEEDS))
    for seed in range(SEEDS):
        common, end = rng.normal(0.0, 0.02), rng.normal(0.0, [0.1, 0.02])
        drawn = []
        for curve in range(curves):
            x = np.append(np.linspace(-2.0, 0.5, 6) + rng.normal(0.0, 0.3, 6), 1.0 + end[0])
            y = 0.3 + 0.2 * np.tanh(x) + common + rng.normal(0.0, 0.03, 7)
            y[:-1] += lift * (curve == curves - 1)
            y[-1] = 0.3 + 0.2 * np.tanh(1.0) + end[1]
            drawn.append((x, y))
        heights[:, seed] = [height_difference(*one, *drawn[0]) for one in drawn[1:]]
    return heights


def test_at_matched_distance_curves_of_one_shape_are_called_different_in_at_most_six_of_a_hundred_studies() -> None:
    rng, studies = np.random.default_rng(5), 200
    claimed = [min(holm([permutation_p(h) for h in simulated_curves(rng, 4, 0.0)])) <= 0.05 for _ in range(studies)]
    assert np.mean(claimed) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    found = [permutation_p(simulated_curves(rng, 2, 0.06)[0]) <= 0.05 for _ in range(50)]
    assert np.mean(found) >= 0.8  # and a lift of six points is seen
