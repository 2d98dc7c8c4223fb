"""Intervals and p-values against published and tabulated values, and by their properties."""

import numpy as np
import pytest
from scipy import stats

from nanopause.intervals import bootstrap_interval, is_binary, mcnemar, normal_interval, t_interval, wilson
from nanopause.results import (
    NOTE,
    format_figure,
    format_p,
    harness_summaries,
    mean,
    paired_difference,
    plot,
    summaries,
    summary,
    table,
)


@pytest.mark.parametrize(
    "k, n, low, high",
    [
        (0, 8, 0, 0.3244),
        (8, 8, 0.6756, 1),
        (0, 1, 0, 0.7935),
        (1, 1, 0.2065, 1),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)
    assert 0 <= wilson(k, n)[0] <= k / n <= wilson(k, n)[1] <= 1


@pytest.mark.parametrize("k, n", [(0, 0), (-1, 3), (4, 3)])
def test_wilson_of_no_proportion(k, n):
    with pytest.raises(ValueError, match="must"):
        wilson(k, n)


def test_t_interval():
    """Student's own data: additional hours of sleep [Student 1908]. The quantile of 9 degrees of freedom is 2.262."""
    hours = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    assert t_interval(hours) == pytest.approx((0.9, 3.76), abs=5e-3)
    assert t_interval([0.0, 1.0]) == pytest.approx((0.5 - 12.706 / 2, 0.5 + 12.706 / 2), abs=5e-4)
    for values in ([], [0.3], [0.3] * 5):
        assert t_interval(values) is None


def test_normal_interval():
    assert normal_interval(0.5, 0.1) == pytest.approx((0.5 - 0.196, 0.5 + 0.196), abs=1e-5)
    assert normal_interval(0.5, None) is normal_interval(0.5, 0.0) is None


def test_t_interval_covers_the_mean():
    """In 95% of samples of five normal values."""
    samples = np.random.default_rng(0).normal(3.0, 2.0, (400, 5))
    covered = sum(low <= 3 <= high for low, high in map(t_interval, samples))
    assert stats.binomtest(covered, 400, 0.95).pvalue > 1e-3


@pytest.mark.parametrize(
    "n_gained, n_lost, p",
    [
        (5, 0, 0.0625),
        (0, 5, 0.0625),
        (0, 0, 1),
        (1, 0, 1),
        (3, 3, 1),
        (9, 1, 22 / 1024),
        (6, 0, 1 / 32),
    ],
)
def test_mcnemar(n_gained, n_lost, p):
    assert mcnemar(n_gained, n_lost) == pytest.approx(p)


def test_bootstrap_interval():
    differences = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 60, p=[0.1, 0.6, 0.3])
    low, high = bootstrap_interval(differences)
    assert low < differences.mean() < high
    half = 1.96 * stats.sem(differences)  # the mean of 60 is nearly normal
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.02)
    for values in ([], [0.25], [0.25] * 5):
        assert bootstrap_interval(values) is None


def test_a_bootstrap_depends_on_values_and_seed_alone():
    values = np.random.default_rng(0).random(50)
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(values) == (low, high) == bootstrap_interval(values[::-1].tolist())
    other = bootstrap_interval(values, seed=1)
    assert other != (low, high) and other == pytest.approx((low, high), abs=5e-3)


def test_means():
    assert is_binary([0, 1.0]) and not is_binary([0, 0.5])
    assert mean([1.0]) == {"value": 1.0, "low": pytest.approx(0.2065, abs=5e-5), "high": 1.0}
    zero = mean([0.0] * 8)
    assert (zero["value"], zero["low"]) == (0, 0)
    assert zero["high"] == pytest.approx(0.3244, abs=5e-5)
    values = [0.2, 0.9, 0.4, 1.0]
    low, high = t_interval(values)
    assert mean(values) == {"value": 0.625, "low": max(0, low), "high": min(1, high)}
    assert high > 1  # and a score is not
    assert mean([0.4]) == {"value": 0.4, "low": None, "high": None}
    assert mean([0.4] * 6)["low"] is None
    assert mean([20.0, 90.0])["high"] > 100  # of a metric in percent


def test_differences():
    base, more = [0.0] * 8, [1.0] * 5 + [0.0] * 3
    made = paired_difference(more, base)
    assert made["value"] == 0.625 and made["p"] == 0.0625
    assert (made["low"], made["high"]) == bootstrap_interval(more)
    assert paired_difference(base, more)["value"] == -0.625
    assert paired_difference([1, 0], [0, 1])["p"] == 1
    # A constant difference shows no spread, and so no interval.
    assert paired_difference(base, base) == {"value": 0, "low": None, "high": None, "p": 1}
    assert paired_difference([1.0] * 6, [0.0] * 6) == {"value": 1, "low": None, "high": None, "p": 1 / 32}
    # Scores between 0 and 1 have no p, even where the differences are -1, 0 and 1.
    assert paired_difference([0.5, 1.0, 0.0], [0.5, 0.0, 1.0])["p"] is None
    assert paired_difference([1.0], [0.0]) == {"value": 1, "low": None, "high": None, "p": 1}


def test_metrics_of_the_harness():
    """Scores of single examples have the intervals and differences of other tasks, other metrics their standard
    error."""

    def row(pauses, **metrics):
        return {"task": "mine", "by": "harness", "pauses": pauses, "n": 8, "metrics": metrics}

    def metric(scores=None, value=23.4, stderr=1.5):
        return {"value": sum(scores) / len(scores) if scores else value, "stderr": stderr, "scores": scores}

    more, base = [1.0] * 5 + [0.0] * 3, [0.0] * 8
    first, second = harness_summaries([row(5, acc=metric(more), ppl=metric()), row(0, acc=metric(base), ppl=metric())])
    assert first["metrics"]["acc"] == mean(base) and "difference" not in first
    assert second["difference"] == paired_difference(more, base) and second["pauses"] == 5
    ppl = first["metrics"]["ppl"]
    assert (ppl["low"], ppl["high"]) == pytest.approx((23.4 - 1.96 * 1.5, 23.4 + 1.96 * 1.5))
    first, second = harness_summaries([row(0, ppl=metric()), row(5, ppl=metric(value=20.0, stderr=None))])
    assert second["metrics"]["ppl"] == {"value": 20.0, "low": None, "high": None}
    assert second["difference"] == {"value": pytest.approx(-3.4), "low": None, "high": None, "p": None}


def test_texts():
    assert format_figure(mean([0.0] * 8)) == "0.0000 [0.0000, 0.3244]"
    assert format_figure(mean([0.4])) == "0.4000" and format_figure(None) == "–"
    difference = {"value": 0.0125, "low": -0.004, "high": 0.029}
    assert format_figure(difference, sign="+") == "+0.0125 [-0.0040, +0.0290]"
    assert format_figure({"value": 23.456, "low": 20.0, "high": 30.126}) == "23.46 [20.00, 30.13]"
    assert [format_p(p) for p in (1.0, 0.0625, 0.001, 1e-9)] == ["p = 1", "p = 0.0625", "p = 0.001", "p < 0.001"]


def rows_of(pauses, scores):
    tokens = {"prompt": 3, "cut": 0, "generated": 2, "pauses": pauses, "limit": 9}
    return [{"task": "webq", "index": i, "pauses": pauses, "scores": {"exact_match": score, "f1": 0.5 + score / 4},
             "tokens": tokens, "flops": 10, "seconds": 0.1} for i, score in enumerate(scores)]  # fmt: skip


def shown(results):
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as captured:
        console.print(table(results))
    return captured.get()


def test_a_table_and_its_note():
    results = summaries([*rows_of(0, [0.0] * 8), *rows_of(5, [1.0] * 5 + [0.0] * 3), *rows_of(9, [0.0] * 8)])
    text = shown(results)
    assert "exact_match 0.0000 [0.0000, 0.3244]" in text and "exact_match 0.6250 [0.3057, 0.8632]" in text
    low, high = bootstrap_interval([1.0] * 5 + [0.0] * 3)
    assert f"+0.6250 [{low:+.4f}, {high:+.4f}]" in text and "p = 0.0625" in text and "p = 1" in text
    assert "±" not in text and "f1 0.5000 │" in text.replace("  ", "")
    assert all(word in NOTE for word in ("Wilson", "Student", "bootstrap", "McNemar"))


@pytest.mark.filterwarnings("error")
def test_error_bars(tmp_path, monkeypatch):
    """They are the intervals. Where there is none, there is no bar, nor one of zero length, whose caps would show."""
    from matplotlib import pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    results = summaries([*rows_of(0, [0.0] * 8), *rows_of(5, [1.0] * 5 + [0.0] * 3)])
    for key in ("exact_match", "f1"):  # the first metric is drawn
        some = [{**row, "metrics": {key: row["metrics"][key]}} for row in results]
        plot(some, tmp_path / "pauses.png", "a run")
        axis = figures[-1].axes[0]
        expected = [[row["pauses"], row["metrics"][key][end]] for row in results for end in ("low", "high")
                    if row["metrics"][key][end] is not None]  # fmt: skip
        drawn = [point for bar in axis.collections[0].get_segments() for point in bar.tolist()]
        low, high = axis.get_ylim()
        assert all(low < y < high for _, y in drawn)  # nothing is cut at the frame
        assert drawn == [pytest.approx(point) for point in expected] and len(drawn) == {"exact_match": 4, "f1": 2}[key]
        assert axis.get_ylabel() == f"{key.replace('_', ' ')}, 95% interval"
    assert (tmp_path / "pauses.png").read_bytes()[:4] == b"\x89PNG"


def test_one_example():
    rows = {row["index"]: row for row in rows_of(0, [1.0])}
    made = summary(rows)
    assert format_figure(made["metrics"]["exact_match"]) == "1.0000 [0.2065, 1.0000]"
    assert format_figure(made["metrics"]["f1"]) == "0.7500"


def test_the_order_of_examples_does_not_matter():
    base, more = rows_of(0, [0, 1, 0, 1, 0, 0]), rows_of(2, [1, 1, 0, 1, 1, 0])
    assert summaries([*base, *more]) == summaries([*base[::-1], *more[3:], *more[:3]])
