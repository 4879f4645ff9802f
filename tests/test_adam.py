"""Adam against a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxcare.adam import Adam


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_steps_are_those_of_the_paper(betas: tuple[float, float]):
    """Algorithm 1 of Kingma and Ba, value by value; its epsilon only matters where a gradient is next to nothing."""
    slopes = np.random.default_rng(3).normal(size=(20, 2, 3))
    adam = Adam(0.05, betas)
    first, second = [0.0] * 6, [0.0] * 6
    for step, slope in enumerate(slopes, start=1):
        found = adam.step(slope).reshape(-1)
        for index, g in enumerate(slope.reshape(-1)):
            first[index] = betas[0] * first[index] + (1 - betas[0]) * g
            second[index] = betas[1] * second[index] + (1 - betas[1]) * g * g
            mean = first[index] / (1 - betas[0] ** step)
            square = second[index] / (1 - betas[1] ** step)
            assert found[index] == pytest.approx(-0.05 * mean / math.sqrt(square), rel=1e-9)


def test_it_comes_to_the_minimum_of_a_bowl():
    at, adam = np.array([3.0, -2.0]), Adam(0.1)
    for _ in range(400):
        at = at + adam.step(2 * (at - np.array([1.0, 0.5])) * np.array([1.0, 100.0]))
    np.testing.assert_allclose(at, [1.0, 0.5], atol=0.01)


def test_values_without_a_slope_stay_where_they_are():
    assert not Adam(0.1).step(np.zeros(4)).any()
