"""Results as JSON: everything in it, nothing that is not JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from onnxcare.measures import Rate
from onnxcare.panel import Outcome
from onnxcare.repair.base import Candidate, Edit
from onnxcare.report.json import render


@dataclass(frozen=True)
class Sample:
    values: np.ndarray
    share: float
    names: tuple[str, ...]
    dtype: np.dtype

    @property
    def total(self) -> float:
        return float(self.values.sum())


def test_arrays_tuples_dtypes_and_derived_values_are_plain():
    text = render(Sample(np.array([1.0, 2.0]), float("nan"), ("ä", "b"), np.dtype(np.float32)))
    assert json.loads(text) == {
        "values": [1.0, 2.0],
        "share": None,
        "names": ["ä", "b"],
        "dtype": "float32",
        "total": 3.0,
    }


def test_a_rate_carries_its_value_and_interval():
    found = json.loads(render(Rate.of(np.array([True, False, False, False]))))
    assert found["value"] == 0.25
    assert (found["count"], found["total"]) == (1, 4)
    assert 0 < found["low"] < 0.25 < found["high"] < 1


def test_a_candidate_carries_how_it_did_and_the_size_of_its_edit():
    outcome = Outcome((0.25,), 0.01, 0.02, 0.03, 0.5, 1.0, 0.0, 0.75, changed=0.125, calibration_rise=-0.5, luck=None)
    found = json.loads(render(Candidate("mine", outcome, Edit(("t", "u"), 12, 3, 0.5))))
    assert found["label"] == "mine"
    assert found["edit"] == {"tensors": ["t", "u"], "values": 12, "rank": 3, "norm": 0.5}
    told = {key: found["outcome"][key] for key in ("excess", "changed", "calibration_rise", "luck", "strain")}
    assert told == {"excess": [0.25], "changed": 0.125, "calibration_rise": -0.5, "luck": None, "strain": 0.75}
    assert json.loads(render(Candidate("none", outcome)))["edit"] is None
