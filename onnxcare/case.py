"""The case: a model on the operating table, with the evidence, limits and data that locators and repairs work on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnxcare.data import PartName, Splits
from onnxcare.experiment import Experiment
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
        experiment: the model on the operating table: the original, or a candidate that is worked on further.
        splits: the data; a method must not look at the held-out part.
        properties: what the model must not do.
        keep: what a repair must keep.
        seed: fixes every random choice.
        progress: told in a few words what is being done.
        original: the original, where `experiment` is a candidate: everything is compared with it.
        max_changed: the most values that a repair may change; None for no limit.
    """

    experiment: Experiment
    splits: Splits
    properties: Sequence[Property]
    keep: Keep
    seed: int
    progress: Progress = lambda text: None
    original: Experiment | None = None
    max_changed: int | None = None
    _panels: dict[tuple[PartName, int | None], Panel] = field(default_factory=dict, repr=False)
    _measured: list[tuple[Panel, Outcome]] = field(default_factory=list, init=False, repr=False)

    def panel(self, part: PartName, limit: int | None = None) -> Panel:
        """Return the panel of a part; made once."""
        if part == "holdout":
            raise ValueError("the held-out part is for the judge alone")
        key = (part, limit)
        if key not in self._panels:
            clean, original = self.splits.part(part), self.original or self.experiment
            self._panels[key] = Panel.build(original, self.properties, self.keep, clean, part, limit)
        return self._panels[key]

    def patched(self, values: Mapping[Parameter, Array]) -> Case:
        """Return the case with a candidate on the operating table, still compared with the original."""
        original = self.original or self.experiment
        return replace(self, experiment=self.experiment.patched(values), original=original)

    def hunt(self) -> int:
        """Let every property look for evidence that the model on the table still leaves; return how much was found."""
        found = sum(item.hunt(self.experiment) for item in self.properties)
        if found:
            self.forget()
        return found

    def forget(self) -> None:
        """Let go of panels whose evidence has grown."""
        self._panels.clear()

    def read(self, parameter: Parameter) -> Array:
        """Return the present values of a parameter."""
        return self.experiment.read(parameter)

    @property
    def before(self) -> Outcome:
        """What the model on the table does on the validation part, with all evidence that is known by now."""
        panel = self.panel("validation")
        if not self._measured or self._measured[0][0] is not panel:
            self._measured[:] = [(panel, panel.outcomes(self.experiment.scores(panel.inputs)[None])[0])]
        return self._measured[0][1]
