"""95% intervals of scores and of differences.

If all values are equal, the t interval and the bootstrap would have width 0, however few values there are; both return
None instead. Wilson's interval has a width: 0 of 8 correct answers gives [0, 0.3244].
"""

from collections.abc import Sequence

LEVEL = 0.95
N_RESAMPLES = 10_000

Interval = tuple[float, float]


def is_binary(values: Sequence[float]) -> bool:
    """Whether every value is 0 or 1."""
    return all(value in (0, 1) for value in values)


def wilson(k: int, n: int) -> Interval:
    """95% interval of a proportion, k of n, without continuity correction [Wilson 1927]. Its limits lie in [0, 1].

    Raises ValueError unless 0 <= k <= n and n >= 1."""
    from scipy.stats import binomtest

    found = binomtest(k, n).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def t_interval(values: Sequence[float]) -> Interval | None:
    """95% interval of the mean of independent values, such as one per example or one per seed, in their unit [Student
    1908]. None: fewer than two values, or all are equal."""
    from scipy import stats

    if len(set(values)) < 2:
        return None
    low, high = stats.t.interval(LEVEL, len(values) - 1, loc=stats.tmean(values), scale=stats.sem(values))
    return float(low), float(high)


def normal_interval(value: float, standard_error: float | None) -> Interval | None:
    """95% interval of a value that is reported with a standard error: 1.96 of them to each side. None: the standard
    error is None or 0."""
    return (value - 1.96 * standard_error, value + 1.96 * standard_error) if standard_error else None


def bootstrap_interval(differences: Sequence[float], seed: int = 0) -> Interval | None:
    """95% interval of the mean of paired differences, in their unit: the 2.5% and the 97.5% percentile of the means of
    N_RESAMPLES resamples [Efron 1979]. It depends on the values and the seed, not on the order of the values. None:
    fewer than two differences, or all are equal."""
    import numpy as np

    values, counts = np.unique(differences, return_counts=True)
    if len(values) < 2:
        return None
    # The mean of a resample depends only on how often it has each distinct value, and there are three of them where
    # every score is 0 or 1. 100 resamples at a time limit the memory.
    n, rng, rounds = len(differences), np.random.default_rng(seed), range(N_RESAMPLES // 100)
    if len(values) < 100:
        means = [rng.multinomial(n, counts / n, 100) @ values / n for _ in rounds]
    else:  # drawing the values themselves is faster
        ordered = np.sort(differences)
        means = [ordered[rng.integers(n, size=(100, n))].mean(1) for _ in rounds]
    low, high = np.percentile(means, (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
    return float(low), float(high)


def mcnemar(n_gained: int, n_lost: int) -> float:
    """Two-sided p-value of McNemar's exact test [McNemar 1947]: the probability of counts at least as unequal as these
    if a changed answer is equally likely to become correct as to become wrong. n_gained: examples that became correct;
    n_lost: examples that became wrong. 1 if both are 0."""
    from scipy.stats import binomtest

    return float(binomtest(n_gained, n_gained + n_lost).pvalue) if n_gained + n_lost else 1.0
