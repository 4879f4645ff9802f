"""The fairness properties: protected attributes must not decide, and groups must not be treated unequally.

Individual: a case is a row together with its *variants*, the same row with every combination of values of the protected
attributes. It is discriminated where some variant is decided differently. Beside the rate stands CARE's measure of
dependence, the mean over the rows of the largest change of the score, max_x' |N(x) - N(x')| (CARE, ICSE 2022).

Group: gaps between the groups of a protected attribute in how often they get the favourable answer, see
`properties.groups`. A model that does not read an attribute is *unaware* of it; proxies may still carry it, so the gap
need not be smaller. The two are properties of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnxcare.data import PARTS, Dataset, PartName, Splits, evenly, joined
from onnxcare.errors import DataError, ModelError, SpecError
from onnxcare.graph.influence import certify
from onnxcare.graph.model import Signature
from onnxcare.measures import Finding, Measure
from onnxcare.properties import groups
from onnxcare.properties.base import Array, Evidence, Property, divergence, divergence_gradient, log_softmax, softmax
from onnxcare.properties.groups import Groups
from onnxcare.properties.variation import SAME, Attribute, Variation
from onnxcare.spec import Bounds, FairnessSpec

if TYPE_CHECKING:
    from onnxcare.judge import Court, Witness

# At most so many rows of a part are varied, each into all its variants; the judge varies all it has.
_VARIED: dict[PartName, int] = {"repair": 600, "search": 400, "validation": 2000}
_RANDOM_ROWS = 10_000
# Shown as proxies: columns whose correlation with the attribute is at least this.
_PROXY, _MOST_PROXIES = 0.2, 3


class IndividualFairness(Property):
    """No individual's decision may change with a protected attribute."""

    kind = "fairness"

    def __init__(
        self,
        name: str,
        max_rate: float | None,
        variation: Variation,
        favourable: int,
        parts: Mapping[PartName, Dataset],
        bounds: Bounds | None,
    ) -> None:
        """Vary the rows of every part."""
        self.name = name
        self.max_rate = max_rate
        self.variation = variation
        self.favourable = favourable
        self.rows_per_case = variation.rows_per_case
        self._bounds = bounds
        self._frequencies = variation.frequencies(parts["repair"]) if parts else None
        self._evidence = {part: Evidence(variation.apply(rows), None) for part, rows in parts.items()}

    def evidence(self, part: PartName) -> Evidence:
        """Return rows with their variants, those of a case side by side."""
        return self._evidence[part]

    def misbehaves(self, scores: Array, samples: Dataset) -> Array:
        """Return which cases have a variant that is decided differently."""
        decisions = self._cases(scores).argmax(axis=-1)
        return (decisions != decisions[..., :1]).any(axis=-1)

    def margin(self, scores: Array, samples: Dataset) -> Array:
        """Return how far variants lie on both sides of the favourable decision."""
        cases = self._cases(scores)
        others = np.delete(cases, self.favourable, axis=-1).max(axis=-1)
        ahead = cases[..., self.favourable] - others
        return np.minimum(ahead.max(axis=-1), -ahead.min(axis=-1))

    def response(self, scores: Array, samples: Dataset) -> Array:
        """Return the largest change of the favourable class's probability, CARE's y_fair."""
        return self._largest_changes(softmax(scores))

    def goal(self, bad: Array, twins: Array | None, labels: Array | None) -> Array:
        """Return for all rows of a case the mean of what the original answers to its variants.

        Variants count as often as they occur in the data: the mean is what the original answers to somebody of whom
        all but the protected attributes is known.
        """
        assert self._frequencies is not None
        p = np.einsum("v,nvc->nc", self._frequencies, np.exp(log_softmax(self._cases(bad)))[:, 1:])
        return np.repeat(np.log(np.maximum(p, 1e-12)), self.rows_per_case, axis=0)

    def loss(self, scores: Array, samples: Dataset, goal: Array | None) -> Array:
        """Return KL from the goal."""
        assert goal is not None
        return divergence(goal, log_softmax(scores))

    def loss_gradient(self, scores: Array, samples: Dataset, goal: Array | None) -> Array:
        """Return the gradient of the loss with respect to the scores."""
        assert goal is not None
        return divergence_gradient(goal, log_softmax(scores))

    def measure(self, court: Court) -> Finding:
        """Return individual discrimination on held-out and on random rows, and group gaps, proxies and certificate."""
        varied = self.variation.apply(court.clean)
        found = [self._rate(court, "individual discrimination rate", varied, self.max_rate)]
        if len(self.variation.attributes) > 1:
            found += [self._alone(court, item) for item in self.variation.attributes]
        changes = [self._largest_changes(item.probabilities(varied.inputs)).mean() for item in court.witnesses]
        changes = [float(change) for change in changes]
        found.append(court.gauge.points("mean largest change of the score", changes[-1], *changes[:-1], unit="number"))
        notes = []
        if self._bounds is not None:
            rows = random_rows(court.clean, self.variation.input, self._bounds, court.seed)
            name = "individual discrimination rate on random rows"
            found.append(self._rate(court, name, self.variation.apply(rows), self.max_rate))
        found += group_measures(court, self.variation, self.favourable)
        for item in self.variation.attributes:
            notes += [
                *_proxies(court.clean, self.variation.input, item),
                *_certificate(court.after, self.variation, item),
            ]
        return Finding(self.name, self.kind, tuple(found), (*self.notes, *notes))

    def _rate(self, court: Court, name: str, varied: Dataset, limit: float | None) -> Measure:
        hits = [self.misbehaves(item.scores(varied.inputs), varied) for item in court.witnesses]
        return court.gauge.rate(name, hits[-1], *hits[:-1], limit=limit)

    def _alone(self, court: Court, attribute: Attribute) -> Measure:
        one = IndividualFairness(self.name, None, self.variation.alone(attribute), self.favourable, {}, None)
        varied = one.variation.apply(court.clean)
        return one._rate(court, f"individual discrimination rate by {attribute.name}", varied, None)

    def _largest_changes(self, probabilities: Array) -> Array:
        p = self._cases(probabilities)[..., self.favourable]
        return np.abs(p - p[..., :1]).max(axis=-1)

    def _cases(self, scores: Array) -> Array:
        """[..., rows, classes] -> [..., cases, 1 + variants, classes]."""
        return scores.reshape(*scores.shape[:-2], -1, self.rows_per_case, scores.shape[-1])


class GroupFairness(Property):
    """Groups must not be treated too unequally, whatever the model reads."""

    kind = "fairness"
    counted = False

    def __init__(self, spec: FairnessSpec, variation: Variation, parts: Mapping[PartName, Dataset]) -> None:
        """Take the spec's gap and limit."""
        assert spec.max_gap is not None
        self.name = f"{spec.name}: {spec.gap.replace('_', ' ')}"
        self.max_rate: float = spec.max_gap
        self._goal = _WITHIN * spec.max_gap
        self.variation = variation
        self.favourable = spec.favourable
        self._gap = spec.gap
        self._parts = parts

    def evidence(self, part: PartName) -> Evidence:
        """Return the clean samples of a part: the gap is between groups of them."""
        return Evidence(self._parts[part], None)

    def misbehaves(self, scores: Array, samples: Dataset) -> Array:
        """Return which samples are not decided as labelled: what a gap between groups is made of."""
        return scores.argmax(axis=-1) != samples.truth

    def rate(self, scores: Array, samples: Dataset) -> Array:
        """Return the largest gap of any protected attribute."""
        favoured = (scores.argmax(axis=-1) == self.favourable).astype(float)
        return np.max([item.gap(self._gap, favoured) for item in self._groups(samples)], axis=0)

    def margin(self, scores: Array, samples: Dataset) -> Array:
        """Return how far the favourable answer is ahead, with the sign of the group: high for the preferred one."""
        others = np.delete(scores, self.favourable, axis=-1).max(axis=-1)
        return (scores[..., self.favourable] - others) * self._groups(samples)[0].signs(samples.truth)

    def loss(self, scores: Array, samples: Dataset, goal: Array | None) -> Array:
        """Return the sum of the attributes' soft gaps above three quarters of the limit, five-fold.

        Probabilities are sharpened towards decisions: the gap between mean probabilities is far below the counted one.
        """
        p = np.exp(log_softmax(_SHARPNESS * scores))[..., self.favourable]
        soft = [item.gap(self._gap, p) for item in self._groups(samples)]
        return _STEEP * np.maximum(0, np.array(soft) - self._goal).sum(axis=0)

    def loss_gradient(self, scores: Array, samples: Dataset, goal: Array | None) -> Array:
        """Return the gradient of the loss with respect to the scores."""
        p = np.exp(log_softmax(_SHARPNESS * scores))
        favoured = p[:, self.favourable]
        slope = np.zeros(len(p))
        for item in self._groups(samples):
            if item.gap(self._gap, favoured) > self._goal:
                slope += _STEEP * _SHARPNESS * item.gap_gradient(self._gap, favoured)
        onehot = np.arange(p.shape[1]) == self.favourable
        return (slope * favoured)[:, None] * (onehot - p)

    def measure(self, court: Court) -> Finding:
        """Return the gaps of every attribute; the limit holds for each."""
        found = group_measures(court, self.variation, self.favourable, self._gap, self.max_rate)
        return Finding(self.name, self.kind, tuple(found), self.notes)

    def _groups(self, samples: Dataset) -> list[Groups]:
        rows = samples.inputs[self.variation.input]
        return [Groups.of(item.groups(rows), samples.truth, self.favourable) for item in self.variation.attributes]


# A gap is at most 1, divergences of good repairs are around 0.01; and a soft gap is not the counted one.
_STEEP, _WITHIN = 5.0, 0.75
_SHARPNESS = 4.0


def prepare(
    spec: FairnessSpec,
    splits: Splits,
    signatures: Sequence[Signature],
    classes: int,
    bounds: Bounds | None,
) -> list[Property]:
    """Check the protected columns against the model's input and lay out the evidence.

    Raises:
        SpecError: an input, a column or the favourable class is not there.
    """
    where = f"properties.{spec.name}"
    signature = _input(spec, signatures)
    width = signature.shape[-1] if len(signature.shape) == 2 else None
    if len(signature.shape) != 2:
        raise SpecError(f"{where}: protected columns need an input of [samples, columns], not {list(signature.shape)}")
    if signature.dtype is None:
        raise SpecError(f"{where}: protected columns hold numbers, but input {signature.name!r} takes none")
    if spec.favourable >= classes:
        raise SpecError(f"{where}.favourable: {spec.favourable} is not a class; the model has 0 to {classes - 1}")
    width = splits.repair.inputs[signature.name].shape[1] if not isinstance(width, int) else width
    attributes = [Attribute.of(name, given) for name, given in spec.protected.items()]
    taken: set[int] = set()
    notes: list[str] = []
    for item in attributes:
        if (item.columns >= width).any():
            raise SpecError(
                f"{where}.protected.{item.name}: there is no column {int(item.columns.max())}; "
                f"input {signature.name!r} has columns 0 to {width - 1}"
            )
        if taken & set(item.columns.tolist()):
            raise SpecError(f"{where}.protected.{item.name}: a column belongs to two protected attributes")
        taken |= set(item.columns.tolist())
        notes += _check_values(item, signature, splits, where)
        if spec.max_gap is not None:
            _check_groups(spec, item, splits.holdout, signature.name)
    if bounds is not None and len(bounds.low) != width:
        raise SpecError(f"bounds: {len(bounds.low)} values, but input {signature.name!r} has {width} columns")
    if bounds is not None:
        _check_bounds(bounds, signature, splits)
    variation = Variation.of(signature.name, attributes)
    searched: dict[PartName, Dataset] = {part: evenly(splits.part(part), most) for part, most in _VARIED.items()}
    found: list[Property] = []
    if spec.individual_limit is not None:
        limit = spec.individual_limit
        found.append(IndividualFairness(spec.name, limit, variation, spec.favourable, searched, bounds))
    if spec.max_gap is not None:
        # Few rows are of the smallest group and favourable: those of the search part help to tell a gap from chance.
        parts: dict[PartName, Dataset] = {
            "repair": splits.repair,
            "search": splits.search,
            "validation": joined(splits.search, splits.validation),
        }
        found.append(GroupFairness(spec, variation, parts))
    for each in found:
        each.notes = tuple(notes)
    return found


def _check_values(item: Attribute, signature: Signature, splits: Splits, where: str) -> list[str]:
    """Make sure that an attribute's values are numbers that the input takes; say where the data knows others."""
    with np.errstate(all="ignore"):
        stored = item.values.astype(signature.dtype).astype(np.float64)
    wrong = item.values[np.abs(stored - item.values) > SAME * np.maximum(1, np.abs(item.values))]
    if wrong.size:
        raise SpecError(
            f"{where}.protected.{item.name}: {wrong[0]:g} is no value of {signature.dtype}, which input "
            f"{signature.name!r} takes"
        )
    rows = np.concatenate([splits.part(part).inputs[signature.name] for part in PARTS])
    known = item.groups(rows)
    advice = "values are those of the model's input, scaled the way it takes them"
    if (known < 0).all():
        raise SpecError(f"{where}.protected.{item.name}: none of its values occurs in the data; {advice}")
    absent = np.setdiff1d(np.arange(len(item.values)), known)
    if len(item.columns) > 1 or not absent.size or not (known < 0).any():
        return []
    other = float(rows[known < 0][0, item.columns[0]])
    return [f"{item.name}: {item.values[absent[0], 0]:g} does not occur in the data, but {other:g} does; {advice}."]


def _check_groups(spec: FairnessSpec, item: Attribute, holdout: Dataset, name: str) -> None:
    """Make sure that there are two groups to judge a gap between: of none it would be zero."""
    known = Groups.of(item.groups(holdout.inputs[name]), holdout.truth, spec.favourable)
    conditions = {
        "demographic_parity": {"": np.ones(len(holdout), bool)},
        "equal_opportunity": {f" of label {spec.favourable}": known.favourable},
        "equalized_odds": {f" of label {spec.favourable}": known.favourable, " of other labels": ~known.favourable},
    }[spec.gap]
    for condition, samples in conditions.items():
        if (known.member & samples).any(axis=1).sum() < 2:
            raise DataError(
                f"property {spec.name!r}: a gap by {item.name} needs two groups, but the held-out samples{condition} "
                "are of fewer (very small ones do not count); give more data, or leave out max_gap"
            )


def _check_bounds(bounds: Bounds, signature: Signature, splits: Splits) -> None:
    """Make sure that random rows can be drawn that the input takes."""
    low, high = np.array(bounds.low), np.array(bounds.high)
    rows = np.concatenate([splits.part(part).inputs[signature.name] for part in PARTS]).astype(np.float64)
    whole = (rows == np.round(rows)).all(axis=0)
    least, most, only_whole = -(2.0**53), 2.0**53, False
    if signature.dtype == np.bool_:
        least, most, only_whole = 0, 1, True
    elif signature.dtype is not None and np.issubdtype(signature.dtype, np.integer):
        ends = np.iinfo(signature.dtype)
        least, most, only_whole = max(least, ends.min), min(most, ends.max), True
    none = only_whole & (np.ceil(low) > np.floor(high))
    (wrong,) = np.nonzero(none | (whole & ((low < least) | (high > most))))
    if wrong.size:
        index = int(wrong[0])
        raise SpecError(
            f"bounds: {low[index]:g} to {high[index]:g} at value {index} holds no whole number, or goes beyond those "
            f"of {signature.dtype}, {least:g} to {most:g}"
        )


def _input(spec: FairnessSpec, signatures: Sequence[Signature]) -> Signature:
    by_name = {signature.name: signature for signature in signatures}
    if spec.input is None and len(by_name) == 1:
        return signatures[0]
    if spec.input not in by_name:
        raise SpecError(f"properties.{spec.name}.input: name one of the model's inputs: {', '.join(by_name)}")
    return by_name[spec.input]


def random_rows(clean: Dataset, name: str, bounds: Bounds, seed: int) -> Dataset:
    """Return rows drawn evenly from the bounds of one input; whole numbers where the data has only whole ones.

    Other inputs keep the values of rows of the data.
    """
    rng = np.random.default_rng(seed)
    rows = clean.inputs[name]
    low, high = np.array(bounds.low), np.array(bounds.high)
    drawn = rng.uniform(low, high, (_RANDOM_ROWS, rows.shape[1]))
    whole = (rows == np.round(rows)).all(axis=0) & (np.ceil(low) <= np.floor(high))
    drawn[:, whole] = rng.integers(np.ceil(low[whole]), np.floor(high[whole]) + 1, (_RANDOM_ROWS, whole.sum()))
    picked = clean.take(rng.integers(0, len(clean), _RANDOM_ROWS))
    return Dataset({**picked.inputs, name: drawn.astype(rows.dtype)}, None)


def group_measures(
    court: Court, variation: Variation, favourable: int, limited: str | None = None, limit: float | None = None
) -> list[Measure]:
    """Return the gaps between the groups of every attribute; the limit holds for one kind of gap."""
    found = []
    rows = court.clean.inputs[variation.input]
    favoured = [item.decide(court.clean.inputs) == favourable for item in court.witnesses]
    for attribute in variation.attributes:
        known = Groups.of(attribute.groups(rows), court.clean.truth, favourable)
        if known.count < 2:
            continue
        for kind in groups.GAPS:
            values = [groups.judged_gap(kind, known, item) for item in favoured]
            name = f"{kind.replace('_', ' ')} gap by {attribute.name}"
            bound = limit if kind == limited else None
            found.append(court.gauge.points(name, values[-1], *values[:-1], limit=bound))
    return found


def _proxies(clean: Dataset, name: str, attribute: Attribute) -> list[str]:
    """Say which other columns tell the attribute, by correlation."""
    rows = clean.inputs[name].astype(np.float64)
    others = np.setdiff1d(np.arange(rows.shape[1]), attribute.columns)
    if len(attribute.values) < 2 or not len(others):
        return []
    member = attribute.groups(rows)[:, None] == np.arange(len(attribute.values))
    scaled = _standard(rows[:, others])
    strength = np.abs(scaled.T @ _standard(member.astype(float))).max(axis=1) / len(rows)
    best = [index for index in np.argsort(-strength)[:_MOST_PROXIES] if strength[index] >= _PROXY]
    if not best:
        return [f"No other column is correlated with {attribute.name} by {_PROXY} or more."]
    told = ", ".join(f"{others[index]} ({strength[index]:.2f})" for index in best)
    return [f"Proxies of {attribute.name}, columns by correlation with it: {told}."]


def _standard(values: Array) -> Array:
    spread = values.std(axis=0)
    return (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1)


def _certificate(witness: Witness, variation: Variation, attribute: Attribute) -> list[str]:
    """Say whether the graph proves that the attribute cannot reach the answer."""
    model = witness.model
    try:
        proved = certify(model.proto, variation.input, attribute.columns.tolist(), witness.output, model.path.parent)
    except ModelError:
        proved = False  # something about the file keeps the graph from being followed: nothing is proved then
    if not proved:
        return []
    return [
        f"Certificate: in the judged file no path of the graph leads from {attribute.name} to the answer, so no input "
        f"whatever is decided by it. This is unawareness: proxies may still carry it, see the gaps between groups."
    ]
