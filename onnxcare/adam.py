"""Adam: steps against a gradient, each value by its own step size (Kingma and Ba, ICLR 2015)."""

from __future__ import annotations

import numpy as np

Array = np.ndarray

_EPSILON = 1e-12


class Adam:
    """The state of one descent: running means of the gradient and of its square, corrected for their start at zero."""

    def __init__(self, rate: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        """Begin a descent.

        Args:
            rate: about how far each value moves in a step.
            betas: how much of the means is kept from one step to the next.
        """
        self._rate, self._betas = rate, betas
        self._steps = 0
        self._first: Array | float = 0.0
        self._second: Array | float = 0.0

    def step(self, slope: Array) -> Array:
        """Return what to add to the values at which the gradient is `slope`, in its shape."""
        keep, keep_squares = self._betas
        self._steps += 1
        self._first = keep * self._first + (1 - keep) * slope
        self._second = keep_squares * self._second + (1 - keep_squares) * slope**2
        unbiased = self._first / (1 - keep**self._steps)
        scale = np.sqrt(self._second / (1 - keep_squares**self._steps))
        change: Array = -(self._rate * unbiased / (scale + _EPSILON))
        return change
