"""Scores against values worked out by hand."""

import math

import numpy as np
import pytest

from simulations.scores import scores_of

LABELS = np.array([0, 0, 1, 1, 2])
PROBABILITIES = np.array(
    [[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.1, 0.7, 0.2], [0.3, 0.6, 0.1], [0.1, 0.2, 0.7]]
)
GROUP = np.array([0, 0, 0, 1, 1])


def test_accuracy_and_macro_f1_by_hand() -> None:
    """Four of five are right; F1 is 2/3, 4/5 and 1."""
    found = scores_of(LABELS, PROBABILITIES, GROUP, 2)
    assert found.accuracy == 0.8
    assert found.macro_f1 == pytest.approx((2 / 3 + 4 / 5 + 1) / 3)


def test_accuracy_in_each_group() -> None:
    """Two of three, and both."""
    assert scores_of(LABELS, PROBABILITIES, GROUP, 2).by_group == pytest.approx((2 / 3, 1.0))


def test_auc_is_the_mean_of_one_against_the_rest() -> None:
    """Counted over pairs: segment 0 wins 5 of 6, the others all."""
    assert scores_of(LABELS, PROBABILITIES, GROUP, 2).auc == pytest.approx((5 / 6 + 1 + 1) / 3)


def test_a_segment_that_does_not_occur_is_left_out_of_the_auc() -> None:
    """It has no area."""
    found = scores_of(LABELS[:4], PROBABILITIES[:4], GROUP[:4], 2)
    assert found.auc == pytest.approx((3 / 4 + 1) / 2)


def test_one_label_alone_has_an_auc_that_knows_nothing() -> None:
    """There is nobody to tell apart."""
    assert scores_of(np.zeros(5, dtype=int), PROBABILITIES, GROUP, 2).auc == 0.5


def test_a_constant_prediction_knows_nothing() -> None:
    """Its AUC is a half."""
    assert scores_of(LABELS, np.full((5, 3), 1 / 3), GROUP, 2).auc == 0.5


def test_a_group_without_held_out_customers_has_no_accuracy() -> None:
    """Not a number, and no warning."""
    found = scores_of(LABELS, PROBABILITIES, np.zeros(5, dtype=int), 2)
    assert math.isnan(found.by_group[1])
