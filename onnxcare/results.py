"""The result objects of locate, check and fix: every report is rendered from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from onnxcare.findings import StaticFinding
from onnxcare.graph.patch import TensorChange
from onnxcare.measures import Status as CheckStatus
from onnxcare.measures import Verdict, worst
from onnxcare.repair.base import Candidate

# `improved`: better than before, but not within the limits; `not repaired`: nothing was better than no change.
Status = Literal["repaired", "improved", "not repaired", "nothing to repair"]


@dataclass(frozen=True)
class Run:
    """What a run was made with.

    Attributes:
        version: version of onnxcare.
        model: path of the model.
        sha256: fingerprint of the model.
        device: where it ran.
        seed: what fixed every random choice.
        samples: number of clean samples in every part of the data.
        notes: what the user should know about data and evidence.
    """

    version: str
    model: str
    sha256: str
    device: str
    seed: int
    samples: Mapping[str, int]
    notes: Sequence[str]


@dataclass(frozen=True)
class UnitScore:
    """The score of one unit.

    Attributes:
        site: the tensor.
        unit: its index.
        score: what it scores.
        cases: how many cases it rests on: all, or what a race asked for before the unit dropped out.
    """

    site: str
    unit: int
    score: float
    cases: int


@dataclass(frozen=True)
class Race:
    """How units raced for the top, see `locators.race`.

    Attributes:
        top: how many units were looked for.
        confidence: the probability with which none of them is missed, as far as samples decide.
        screened: whether units were screened by their derivatives before.
        rounds: units and cases of every round.
    """

    top: int
    confidence: float
    screened: bool
    rounds: Sequence[Mapping[str, int]]


@dataclass(frozen=True)
class SiteScore:
    """A site's place in the ranking: by the measured effect of setting its top units to their clean mean.

    Attributes:
        site: the tensor.
        units: how many it has.
        dead: how many of them are constant over all samples.
        locator: the ranking whose top units were best to set.
        chosen: the best set of top units.
        excess: what is left of each property's rate, above the baseline, with those units set.
        accuracy_drop: what that costs in accuracy.
        recall_drop: what that costs the worst class in recall.
        cost: the number by which sites are ranked.
    """

    site: str
    units: int
    dead: int
    locator: str
    chosen: Sequence[int]
    excess: Sequence[float]
    accuracy_drop: float
    recall_drop: float
    cost: float


@dataclass(frozen=True)
class LayerVotes:
    """How far differential localisation got with the single weights of a layer.

    Attributes:
        layer: the layer.
        weights: how many it has, without its bias.
        voted: how many of them had to go for some pair.
        pairs: how many pairs of a wrong and a right answer were looked at.
        located: for how many of them taking weights out brought the right answer back.
        median_share: median share of the weights that this took.
        gradient: whether differences were weighted by a gradient; else by interventions.
    """

    layer: str
    weights: int
    voted: int
    pairs: int
    located: int
    median_share: float
    gradient: bool


@dataclass(frozen=True)
class Location:
    """Result of `locate`: every live unit, strongest first, and every site, most promising first.

    Attributes:
        run: what it was made with.
        method: what the units are ranked by.
        units: the live units; those that a race left out at once are missing.
        sites: the sites.
        layers: votes for single weights, where differential localisation was asked for.
        race: how the units raced; None where they did not in this ranking.
    """

    run: Run
    method: str
    units: Sequence[UnitScore]
    sites: Sequence[SiteScore]
    layers: Sequence[LayerVotes]
    race: Race | None


@dataclass(frozen=True)
class SavedTrigger:
    """A restored trigger, saved beside the output.

    Attributes:
        name: the property it was restored for.
        target: the class it leads to.
        source: how it was found.
        file: the npz file with its mask and pattern.
        picture: a PNG of both; None where the input is no image.
    """

    name: str
    target: int
    source: str
    file: str
    picture: str | None


@dataclass(frozen=True)
class Fix:
    """Result of `fix`.

    Attributes:
        run: what it was made with.
        status: how it ended.
        method: the method used.
        output: the file that was written, or None.
        output_sha256: its fingerprint.
        patch_file: the patch file that was written, or None.
        verdict: the judge's finding; for `nothing to repair`, the original against itself.
        patch: what the repair changes, tensor by tensor.
        chosen: the candidate that was judged.
        candidates: all that were compared on validation data.
        front: those of them that no other one beats in everything: misbehaviour, accuracy, worst recall, size.
        details: what else the method says about how it was found.
        notes: what the user should know about the repair, in whole sentences.
        triggers: triggers that were restored because the spec knew none.
        seconds: wall-clock time.
    """

    run: Run
    status: Status
    method: str
    output: str | None
    output_sha256: str | None
    patch_file: str | None
    verdict: Verdict
    patch: Sequence[TensorChange]
    chosen: Candidate | None
    candidates: Sequence[Candidate]
    front: Sequence[Candidate]
    details: Mapping[str, Any]
    notes: Sequence[str]
    triggers: Sequence[SavedTrigger]
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 where nothing is left to repair, else 1."""
        return 0 if self.status in ("repaired", "nothing to repair") else 1


@dataclass(frozen=True)
class Applied:
    """Result of `apply`.

    Attributes:
        model: the file that was patched.
        patch: the patch file.
        output: the file that was written.
        output_sha256: its fingerprint.
        reverted: whether it is the original again.
        tensors: what changed, from `model` to `output`.
    """

    model: str
    patch: str
    output: str
    output_sha256: str
    reverted: bool
    tensors: Sequence[TensorChange]


@dataclass(frozen=True)
class Check:
    """Result of `check`.

    Attributes:
        run: what it was made with; None where the file is not safe to run.
        model: the file that was checked.
        spec: what it was checked against.
        baseline: the file it was compared with, or None.
        confidence: level of the intervals.
        verdict: what was measured; None where the file is not safe to run.
        static: what the graph itself shows.
        seconds: wall-clock time.
    """

    run: Run | None
    model: str
    spec: str
    baseline: str | None
    confidence: float
    verdict: Verdict | None
    static: Sequence[StaticFinding]
    seconds: float

    @property
    def status(self) -> CheckStatus:
        """`pass`, `fail` or `undecided`; an error in the graph fails, warnings are told."""
        if self.verdict is None or any(item.level == "error" for item in self.static):
            return "fail"
        return worst(["pass", self.verdict.status])

    @property
    def exit_code(self) -> int:
        """0 for a pass, else 1: what is undecided never passes."""
        return 0 if self.status == "pass" else 1
