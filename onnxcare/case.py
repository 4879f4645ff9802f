"""The case: a model on the operating table, with the evidence, limits and data that locators and repairs work on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from onnxcare.data import PartName, Splits
from onnxcare.experiment import Experiment
from onnxcare.graph import parameters
from onnxcare.graph.parameters import Parameter
from onnxcare.panel import Outcome, Panel
from onnxcare.properties.base import Property
from onnxcare.spec import Keep

Array = np.ndarray
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """A model to repair, with the evidence and the limits.

    Attributes:
        experiment: the model on the operating table.
        splits: the data; a method must not look at the held-out part.
        properties: what the model must not do.
        keep: what a repair must keep.
        seed: fixes every random choice.
        progress: told in a few words what is being done.
    """

    experiment: Experiment
    splits: Splits
    properties: Sequence[Property]
    keep: Keep
    seed: int
    progress: Progress = lambda text: None
    _panels: dict[tuple[PartName, int | None], Panel] = field(default_factory=dict, repr=False)

    def panel(self, part: PartName, limit: int | None = None) -> Panel:
        """Return the panel of a part; made once."""
        if part == "holdout":
            raise ValueError("the held-out part is for the judge alone")
        key = (part, limit)
        if key not in self._panels:
            clean = self.splits.part(part)
            self._panels[key] = Panel.build(self.experiment, self.properties, self.keep, clean, part, limit)
        return self._panels[key]

    def read(self, parameter: Parameter) -> Array:
        """Return the present values of a parameter."""
        model = self.experiment.model
        return parameters.read(model.proto, parameter, model.path.parent)

    @cached_property
    def before(self) -> Outcome:
        """What the original does on the validation part."""
        panel = self.panel("validation")
        return panel.outcomes(self.experiment.scores(panel.inputs)[None])[0]
