"""Choosing a and b: what histograms of angles say about a pair, a suggestion, a plot."""

from __future__ import annotations

import io
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sface_kernels import angles
from sface_kernels.angles import BINS, RECIPES, AngleHistograms, shares, suggest
from tests.support.cases import ROOT

WIDTH = math.pi / BINS


def heap(*angles_and_numbers: tuple[float, float]) -> Tensor:
    counts = torch.zeros(BINS, dtype=torch.float64)
    for angle, number in angles_and_numbers:
        counts[int(angle / WIDTH)] += number
    return counts


def test_shares_by_hand():
    """All pairs of a kind in one bin: the mean of the sigmoid over it, by numerical integration."""
    histograms = AngleHistograms(heap((0.8, 10)), heap((1.2, 4), (1.6, 96)), heap((1.2, 1)))
    found = shares(histograms, a=0.8, b=1.23, k=80)

    def mean(k: float, middle: float, angle: float) -> float:
        low = int(angle / WIDTH) * WIDTH
        theta = low + (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * WIDTH
        return float(torch.sigmoid(k * (theta - middle)).mean())

    assert found.pulled == pytest.approx(mean(80, 0.8, 0.8), rel=1e-7)
    assert found.rows_pushed == pytest.approx(mean(-80, 1.23, 1.2), rel=1e-7)
    assert found.pushed == pytest.approx(0.04 * mean(-80, 1.23, 1.2) + 0.96 * mean(-80, 1.23, 1.6), rel=1e-7)
    assert shares(histograms, a=0.5, k=80).pulled > 0.999 and shares(histograms, a=1.1, k=80).pulled < 0.001


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"k": 0}, "k: expected a number > 0, got 0"),
        ({"k_inter": -80}, "k_inter: expected a number > 0, got -80"),
        ({"a": math.nan}, "a: expected a finite number, got nan"),
        ({"b": "1.2"}, "b: expected a number, got '1.2'"),
    ],
)
def test_shares_checks_its_numbers(wrong, text):
    with pytest.raises((TypeError, ValueError), match=f"^{text}"):
        shares(AngleHistograms(*[heap((0.8, 10))] * 3), **wrong)


def test_the_nearest_classes_are_a_floor_of_the_estimate():
    """No drawn pair fell to the tail, but the nearest classes of three rows lie there for certain."""
    histograms = AngleHistograms(heap((0.5, 3)), heap((1.6, 1000)), heap((1.0, 3)))
    assert shares(histograms, b=1.23).pushed == pytest.approx(3 / 1000, rel=1e-6)


def test_nothing_counted_is_nan_and_no_suggestion():
    empty = AngleHistograms(*[torch.zeros(BINS, dtype=torch.float64)] * 3)
    assert all(math.isnan(share) for share in shares(empty))
    with pytest.raises(ValueError, match="got none: train a step first"):
        suggest(empty)


def test_suggestion_on_synthetic_histograms():
    trained = AngleHistograms(
        target=heap((0.60, 49), (0.85, 2), (1.0, 49)),
        other=heap((1.5, 9900)),
        hardest=heap((1.1, 30), (1.22, 40), (1.4, 30)),
    )
    found = suggest(trained)
    assert found.a == pytest.approx(0.85, abs=WIDTH) and found.b == pytest.approx(1.22, abs=WIDTH)
    assert len(found.reasons) == 3 and "0.0% of the targets" in found.reasons[-1]
    half = shares(trained, found.a, found.b, k=1e4)
    assert half.pulled == pytest.approx(0.5, abs=0.02) and half.rows_pushed == pytest.approx(0.5, abs=0.21)
    noisy = suggest(trained._replace(target=trained.target + heap((1.55, 25))))
    assert noisy.a > found.a and "20.0% of the targets" in noisy.reasons[-1]
    untrained = suggest(trained._replace(target=heap((1.57, 100))))
    assert untrained.a == pytest.approx(untrained.b - 0.30) and "look again later" in untrained.text()
    assert "go on being pulled" in found.text() and "go on being pulled" not in untrained.text()
    collapsed = suggest(trained._replace(hardest=heap((0.05, 100))))
    assert collapsed.a == 0 and "collapsed" in collapsed.text() and "0.30 below b" not in collapsed.text()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_suggestion_is_never_nonsense(data):
    counts = [
        heap(*data.draw(st.lists(st.tuples(st.floats(0, 3.14), st.integers(1, 9)), min_size=1, max_size=9)))
        for _ in range(3)
    ]
    found = suggest(AngleHistograms(*counts))
    assert 0 <= found.b <= 3.15 and 0 <= found.a <= max(0.0, found.b - 0.299)
    below = [float(one.cumsum(0)[min(BINS - 1, int(found.b / WIDTH + 0.6))]) / float(one.sum()) for one in counts]
    assert below[2] >= 0.5  # the median of the nearest classes


def test_recipes_are_the_published_ones():
    assert RECIPES["default"] == (0.80, 1.23) and len(RECIPES) == 4
    assert all(b - a >= angles.SMALLEST_GAP - 1e-9 for a, b in RECIPES.values())


def test_the_plot_shows_what_it_is_given():
    pytest.importorskip("matplotlib")
    histograms = AngleHistograms(heap((0.6, 9)), heap((1.5, 99)), heap((1.2, 9)))
    figure = angles.plot(histograms, a=0.9, b=1.2, suggestion=suggest(histograms))
    left, right = figure.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "own class",
        "nearest other class",
        "other classes",
    ]
    assert len(right.lines) == 4
    theta, pull = right.lines[0].get_data()
    assert float(torch.as_tensor(pull)[(torch.as_tensor(theta) - 0.9).abs().argmin()]) == pytest.approx(0.5, abs=0.04)
    figure.savefig(io.BytesIO(), format="png")


def test_matplotlib_waits_for_the_plot():
    code = "import sys, sface_kernels.angles; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_another_slope_for_the_others():
    found = AngleHistograms(heap((0.8, 10)), heap((1.3, 4)), heap((1.3, 1)))
    assert shares(found, k=80, k_inter=20).rows_pushed == shares(found, k=20).rows_pushed
    assert shares(found, k=20).rows_pushed != shares(found, k=80).rows_pushed


def test_a_plot_has_the_curves_of_both_slopes():
    pytest.importorskip("matplotlib")
    suggestion = angles.Suggestion(0.8, 1.2, ())
    figure = angles.plot(AngleHistograms(*[heap((0.8, 10))] * 3), a=0.8, b=1.2, k=80, k_inter=5, suggestion=suggestion)
    (right,) = (axes for axes in figure.axes if axes.get_ylabel().startswith("rescale"))
    theta = torch.linspace(0, math.pi, 1000, dtype=torch.float64)
    for line in right.lines[1::2]:
        torch.testing.assert_close(torch.as_tensor(line.get_ydata()), torch.sigmoid(-5 * (theta - 1.2)))
