"""Interchange effects against a plain loop over full forward passes."""

from __future__ import annotations

import numpy as np
import pytest
from by_hand import intervened, unit_mask
from cases import SQUARE, images, sample_case

from onnxcare.locators.interchange import interchange_effects

COUNT = 40


def margins(scores: np.ndarray) -> np.ndarray:
    """Score of class 1 above the highest other one, sample by sample."""
    return np.array([row[1] - max(np.delete(row, 1)) for row in scores])


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("with_twins", [True, False])
def test_effects_equal_a_loop_over_full_forward_passes(index, with_twins):
    case = sample_case()
    (item,) = case.properties
    site = case.experiment.sites[index]
    evidence = item.evidence("repair")
    rows = slice(0, COUNT)
    clean, bad, twins = (part.take(rows) for part in (case.splits.repair, evidence.bad, evidence.twins))
    found = interchange_effects(case.experiment, site, clean, bad, twins if with_twins else None, item.margin)
    (reference,) = case.experiment.tensors([site.tensor], (twins if with_twins else clean).inputs)
    if not with_twins:
        axes = (0, 2, 3) if reference.ndim == 4 else (0,)
        reference = np.broadcast_to(reference.mean(axis=axes, keepdims=True), reference.shape)
    session = intervened(SQUARE / "model.onnx", site)
    feeds = {"image": images(bad), "value": np.ascontiguousarray(reference)}
    before = margins(session.run(None, feeds | {"mask": np.zeros_like(unit_mask(site, 0))})[0]).mean()
    live = np.flatnonzero(~found.dead)
    for unit in live[:: max(1, len(live) // 6)]:
        after = margins(session.run(None, feeds | {"mask": unit_mask(site, int(unit))})[0]).mean()
        assert found.scores[unit] == pytest.approx(before - after, abs=1e-3)
    assert (found.scores[found.dead] == 0).all()
