"""Strategy: closed-form changes of several layers, one behind the other; for evidence with twins.

One layer alone often cannot undo a trigger: the layers in front have mixed it with what has to stay, or it has come
past over a skip connection. Here the layers are changed in graph order, each by a regression (`closed_form`) towards
what the *original* computes there on clean samples and on the twins of the bad ones, given what the changed layers in
front now hand over:

    D = argmin  alpha * E|A_c D - T_c|^2 + E|A_t D - T_t|^2 + ridge
        T_c = original(clean) - changed(clean)          T_t = original(twin) - changed(bad)

So each layer takes off a part of what is left, a small one where a strong ridge holds it, and mends what the layers in
front have done to clean samples. A cascade may begin at any layer. Settings are tried on few samples, all at once, and
the best ones on all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.errors import ModelError
from onnxcare.graph.layers import Layer
from onnxcare.graph.parameters import Parameter
from onnxcare.panel import Panel
from onnxcare.repair import closed_form
from onnxcare.repair.base import Candidate, Found, Proposals, Values
from onnxcare.repair.bench import changed, patched_outcome

Array = np.ndarray

_ALPHAS, _RHOS = (3.0, 10.0), (1e-2, 1e-1)
# A cascade may also begin behind these shares of the layers: a smaller change, if it does.
_LATER = (0.5, 0.75)
_SCAN_SAMPLES = 150
_REFINED = 2


@dataclass(frozen=True)
class Setting:
    """How a cascade is made.

    Attributes:
        start: index of the first layer that is changed.
        alpha: weight of staying put on clean samples.
        rho: ridge, relative to the mean squared clean input.
    """

    start: int
    alpha: float
    rho: float


def applies(case: Case) -> bool:
    """Return whether some property's bad samples could take their activations from elsewhere, in several layers."""
    return any(item.transplantable for item in case.properties) and len(_layers(case)) > 1


def propose(case: Case) -> Proposals:
    """Return changes of several layers, see the module's docstring.

    Raises:
        ModelError: no layer's activations could be computed.
    """
    layers = _layers(case)
    later = sorted({int(share * len(layers)) for share in _LATER} - {0})
    settings = [Setting(0, alpha, rho) for alpha in _ALPHAS for rho in _RHOS]
    settings += [Setting(start, _ALPHAS[0], _RHOS[-1]) for start in later]
    few, unseen = case.panel("repair", _SCAN_SAMPLES), case.panel("search", _SCAN_SAMPLES)
    tried, skipped = cascades(case, layers, settings, few.clean, few, "trying")
    ranks = [patched_outcome(case, values, unseen).rank for values in tried]
    order = sorted(range(len(settings)), key=ranks.__getitem__)
    best = [settings[index] for index in order[:_REFINED]]
    refined, _ = cascades(case, layers, best, case.splits.repair, case.panel("repair"), "changing")
    found = []
    for setting, values in zip(best, refined, strict=True):
        outcome = patched_outcome(case, values, case.panel("validation"))
        span = f"{layers[setting.start].name} to {layers[-1].name}"
        label = f"cascade {span}: alpha {setting.alpha:g}, rho {setting.rho:g}"
        found.append(Found(Candidate(label, outcome), partial(dict, values)))
    scan = [{"from": layers[s.start].name, "alpha": s.alpha, "rho": s.rho} for s in settings]
    costs = [{**entry, "cost": cost} for entry, (_, cost) in zip(scan, ranks, strict=True)]
    return Proposals(found, {"scan": costs, "skipped": skipped})


def cascades(
    case: Case, layers: Sequence[Layer], settings: Sequence[Setting], clean: Dataset, panel: Panel, doing: str
) -> tuple[list[Values], dict[str, str]]:
    """Return the new values that every setting comes to, and why layers were left out.

    The settings go through the layers side by side, so that what the original computes there is computed once.

    Args:
        case: the model, and the original where that is another one.
        layers: the layers in graph order.
        settings: where to begin and how to weigh.
        clean: clean samples.
        panel: gives the bad samples and their twins.
        doing: what to say about it while it lasts.

    Raises:
        ModelError: no layer's activations could be computed.
    """
    original = case.original or case.experiment
    values: list[dict[Parameter, Array]] = [{} for _ in settings]
    now = [case] * len(settings)
    skipped: dict[str, str] = {}
    for index, layer in enumerate(layers):
        case.progress(f"{doing} {layer.name} ({index + 1} of {len(layers)}) in a cascade")
        aim = closed_form.Aim(original, layer, clean)
        # Those that begin here see the same model.
        first: closed_form.Regression | None = None
        try:
            for which, setting in enumerate(settings):
                if setting.start > index:
                    continue
                unchanged = not values[which]
                regression = first if unchanged else None
                if regression is None:
                    regression = closed_form.accumulate(now[which].experiment, layer, clean, panel, aim)
                if unchanged:
                    first = regression
                (change,) = regression.solve(setting.alpha, setting.rho, [None])
                values[which] |= changed(now[which], layer, change)
                now[which] = case.patched(values[which])
        except (ModelError, np.linalg.LinAlgError) as error:
            skipped[layer.name] = str(error)  # the layers behind it can do without
    if not any(values):
        name, why = next(iter(skipped.items()))
        raise ModelError(f"{case.experiment.model.path}: no layer could be changed in a cascade; {name}: {why}")
    return list(values), skipped


def _layers(case: Case) -> list[Layer]:
    """Return the layers that can be changed, in graph order."""
    fitting = case.experiment.open_layers
    return [layer for layer in fitting if closed_form.memory_needed(layer) <= case.experiment.memory]
