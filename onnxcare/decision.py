"""How an answer is read: which output, and which decision it stands for.

Everything else works on *scores*, [..., samples, classes], of which the highest is the decision, whatever the model
answers: costs of which the least counts, or one value against a threshold. With y the tensor that experiments compute
(the input of a final Softmax or Sigmoid where there is one, else the output itself),

    argmax      scores = y
    argmin      scores = -s y
    threshold   scores = s [t', y]        class 1 where y > t'; t' is t, or log(t / (1 - t)) in front of a Sigmoid

The factor s brings scores that were not trained as logits to their order of magnitude, so that smooth objectives on
log-probabilities neither saturate nor lie flat.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy.special

Array = np.ndarray
Rule = Literal["argmax", "argmin", "threshold"]
Final = Literal["", "Softmax", "Sigmoid"]

# Half of all samples are decided by more than this many logits after scaling: a well-trained classifier's order.
_USUAL_MARGIN = 5.0


@dataclass(frozen=True)
class Decision:
    """A rule that reads an answer.

    Attributes:
        rule: `argmax`, `argmin` or `threshold`.
        threshold: in terms of the output, for `threshold`.
        final: the operator between y and the output.
        column: whether y of a threshold has a last axis of length one.
        scale: the factor s.
        ones: how many further axes of length one y has at its end, as maps that were pooled to a point have.
    """

    rule: Rule = "argmax"
    threshold: float = 0.5
    final: Final = ""
    column: bool = True
    scale: float = 1.0
    ones: int = 0

    @property
    def finals(self) -> tuple[Final, ...]:
        """The operators at the end of a graph that leave the decision as it is."""
        if self.rule == "argmax":
            return ("Softmax",)
        # A threshold that a Sigmoid never reaches stands for no value in front of it.
        return ("Sigmoid",) if self.rule == "threshold" and 0 < self.threshold < 1 else ()

    def scores(self, y: Array) -> Array:
        """Return the scores of y, [..., samples, classes]."""
        y = y.reshape(y.shape[: y.ndim - self.ones])
        if self.rule == "argmax":
            return y
        if self.rule == "argmin":
            return -self.scale * y
        value = y[..., 0] if self.column else y
        return self.scale * np.stack([np.full_like(value, self._bound), value], axis=-1)

    def pull_back(self, gradient: Array) -> Array:
        """Return the gradient with respect to y of a gradient with respect to the scores."""
        if self.rule == "argmin":
            gradient = -self.scale * gradient
        elif self.rule == "threshold":
            gradient = self.scale * (gradient[..., 1:] if self.column else gradient[..., 1])
        return gradient.reshape(*gradient.shape, *[1] * self.ones)

    def outputs(self, scores: Array) -> Array:
        """Return what the model's output holds where it has these scores, [..., samples, values]."""
        y = self._y(scores)
        if self.final == "Softmax":
            found: Array = scipy.special.softmax(y, axis=-1)
            return found
        return scipy.special.expit(y) if self.final == "Sigmoid" else y

    def pull_back_outputs(self, scores: Array, gradient: Array) -> Array:
        """Return the gradient with respect to the scores of one with respect to the output's values."""
        if self.final == "Softmax":
            p = self.outputs(scores)
            gradient = p * (gradient - (p * gradient).sum(axis=-1, keepdims=True))
        elif self.final == "Sigmoid":
            p = self.outputs(scores)
            gradient = gradient * p * (1 - p)
        if self.rule == "argmax":
            return gradient
        if self.rule == "argmin":
            return -gradient / self.scale
        return np.concatenate([np.zeros_like(gradient), gradient / self.scale], axis=-1)

    def of_output(self) -> Decision:
        """Return the rule that reads the output itself."""
        return replace(self, final="", scale=1.0)

    def scaled(self, y: Array) -> Decision:
        """Return the rule with the factor s that fits these values of y."""
        if self.rule == "argmax" or self.final:
            return self
        scores = np.sort(replace(self, scale=1.0).scores(y.astype(np.float64)), axis=-1)
        margin = float(np.median(scores[..., -1] - scores[..., -2]))
        return replace(self, scale=_USUAL_MARGIN / margin) if margin > 0 else self

    def _y(self, scores: Array) -> Array:
        if self.rule == "argmax":
            return scores
        return -scores / self.scale if self.rule == "argmin" else scores[..., 1:] / self.scale

    @property
    def _bound(self) -> float:
        if self.final == "Sigmoid":
            return float(scipy.special.logit(self.threshold))
        return self.threshold
