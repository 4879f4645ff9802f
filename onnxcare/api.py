"""The public functions: load, inspect, locate and fix. The command line only parses, calls them and prints."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxcare import repair as methods
from onnxcare._version import __version__
from onnxcare.case import Case, Progress
from onnxcare.data import PARTS, Dataset, Splits, check_labels, load_dataset, split, without_overlap
from onnxcare.errors import DataError, ModelError, SpecError, UsageError
from onnxcare.experiment import Experiment
from onnxcare.graph.model import Model, load_model
from onnxcare.graph.patch import Patch, TensorChange, check_output, publish, staged, with_metadata
from onnxcare.inspection import Inspection, inspect_model
from onnxcare.judge import Verdict, judge
from onnxcare.locators.select import attribute_sites, select_units
from onnxcare.properties import backdoor
from onnxcare.repair.base import Repair
from onnxcare.results import Fix, Location, Run, SiteScore, Status, UnitScore
from onnxcare.runtime import Device, Session, few_blas_threads, parse_memory, resolve_device
from onnxcare.spec import Spec, load_spec

# Shares of `data` for repair, search and validation; the last share is held out where the spec names no file.
_SHARES = (0.5, 0.2, 0.3)
_SHARES_WITH_HOLDOUT = (0.35, 0.14, 0.21, 0.3)
# A part with fewer samples says nothing about any class.
_FEWEST = 20


def _silent(text: str) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class _Setup:
    model: Model
    spec: Spec
    case: Case
    run: Run


def load(model: str | Path) -> Model:
    """Read an ONNX file and make sure that onnxruntime runs it.

    Raises:
        ModelError: the file cannot be used; the message says why.
    """
    return load_model(model)


def inspect(model: str | Path) -> Inspection:
    """Return what a model consists of: signature, layers, sites, and what can be repaired.

    Raises:
        ModelError: the file cannot be used.
    """
    return inspect_model(load_model(model))


@few_blas_threads()
def locate(
    model: str | Path,
    spec: str | Path,
    *,
    seed: int | None = None,
    device: str = "auto",
    memory: str | None = None,
    samples: int = 128,
    values: int = 8,
    progress: Progress = _silent,
) -> Location:
    """Rank hidden units by their causal effect on the misbehaviour.

    Two rankings compete, average causal effects and interchange effects; the units come in the one whose top units
    did most when they were intervened on.

    Args:
        model: path of the ONNX file.
        spec: path of the care.yaml.
        seed: takes the place of the spec's seed.
        device: `auto`, `cpu` or `cuda`.
        memory: bound on the memory of activations, such as `2GiB`; None means half of what is free.
        samples: at most so many clean and so many bad samples.
        values: how many evenly spaced values each unit is forced to.
        progress: told in a few words what is being done.

    Raises:
        OnnxcareError: spec, model or data cannot be used.
    """
    setup = _prepare(model, spec, seed, device, memory, progress)
    case = setup.case
    if not case.experiment.sites:
        raise ModelError(f"{model}: it has no hidden layer in front of a Gemm, MatMul or Conv")
    attributions = attribute_sites(case, case.experiment.sites, samples, values)
    selections = select_units(case, attributions)
    # One ranking for all sites, so that its scores can be compared: the one that served best at the best site.
    locator = selections[0].locator
    by_site = {item.site.tensor: item for item in attributions if item.locator == locator}
    units = [
        UnitScore(item.site.tensor, int(unit), float(item.scores[unit]))
        for item in by_site.values()
        for unit in item.ranking()
    ]
    return Location(
        run=setup.run,
        method=locator,
        units=sorted(units, key=lambda unit: -unit.score),
        sites=[
            SiteScore(
                site=item.site.tensor,
                units=item.site.units,
                dead=int(by_site[item.site.tensor].dead.sum()),
                locator=item.locator,
                chosen=[int(unit) for unit in item.units],
                excess=list(item.outcome.excess),
                accuracy_drop=item.outcome.accuracy_drop,
                recall_drop=item.outcome.recall_drop,
                cost=item.outcome.cost,
            )
            for item in selections
        ],
    )


@few_blas_threads()
def fix(
    model: str | Path,
    spec: str | Path,
    out: str | Path,
    *,
    method: str = "auto",
    seed: int | None = None,
    device: str = "auto",
    memory: str | None = None,
    in_place: bool = False,
    best_effort: bool = False,
    progress: Progress = _silent,
) -> Fix:
    """Repair a model, judge the repair on held-out data, and write it if the verdict is good.

    Args:
        model: path of the ONNX file; it is not changed unless it is also `out` and `in_place` is set.
        spec: path of the care.yaml.
        out: where the repaired model goes.
        method: `auto` or `care`.
        seed: takes the place of the spec's seed.
        device: `auto`, `cpu` or `cuda`.
        memory: bound on the memory of activations, such as `2GiB`; None means half of what is free.
        in_place: allow `out` to be the model itself.
        best_effort: write the model even if the verdict is not good.
        progress: told in a few words what is being done.

    Raises:
        OnnxcareError: spec, model or data cannot be used, or the output cannot be written.
    """
    started = time.monotonic()
    # Behind a link lies the file that is meant: replacing the link would leave it as it was.
    target = Path(out).resolve()
    run_method = methods.find(method)
    files = [Path(spec), *load_spec(spec).files()]
    check_output(Path(out), files, Path(model), in_place)
    setup = _prepare(model, spec, seed, device, memory, progress)
    case, loaded = setup.case, setup.model
    original = Session(loaded.path, case.experiment.device)
    if case.before.violation == 0:
        verdict = _judge(case, original, original)
        if all(finding.passed for finding in verdict.properties):
            return _result(setup, "nothing to repair", method, verdict, None, None, [], started)
    found = run_method(case)
    patch = Patch(found.values)
    data = patch.apply(loaded)
    entries = _provenance(setup, found)
    progress("judging the repaired file on held-out data")
    with staged(loaded, with_metadata(data, entries), target) as path:
        verdict = _judge(case, original, Session(path, case.experiment.device))
        status: Status = "repaired" if verdict.passed else "not repaired"
        written = None
        if verdict.passed or (best_effort and found.values):
            written = with_metadata(data, entries | {"verdict": status})
            publish(loaded, path, written, target)
    changes = patch.summary(loaded)
    return _result(setup, status, method, verdict, found, (Path(out), written), changes, started)


def _judge(case: Case, original: Session, repaired: Session) -> Verdict:
    experiment = case.experiment
    return judge(
        original,
        repaired,
        experiment.output,
        case.splits.holdout,
        case.properties,
        case.keep,
        experiment.rows_per_run,
    )


def _provenance(setup: _Setup, found: Repair) -> dict[str, str]:
    return {
        "version": __version__,
        "parent_sha256": setup.model.sha256,
        "method": found.method,
        "seed": str(setup.run.seed),
        "patched_tensors": ",".join(parameter.name for parameter in found.values),
    }


def _result(
    setup: _Setup,
    status: Status,
    method: str,
    verdict: Verdict,
    found: Repair | None,
    written: tuple[Path, bytes | None] | None,
    changes: Sequence[TensorChange],
    started: float,
) -> Fix:
    path, data = written if written is not None else (None, None)
    return Fix(
        run=setup.run,
        status=status,
        method=method,
        output=str(path) if data is not None else None,
        output_sha256=hashlib.sha256(data).hexdigest() if data is not None else None,
        verdict=verdict,
        patch=changes,
        chosen=found.chosen if found else None,
        candidates=list(found.candidates) if found else [],
        details=found.details if found else {},
        seconds=time.monotonic() - started,
    )


def _prepare(
    model: str | Path,
    spec: str | Path,
    seed: int | None,
    device: str,
    memory: str | None,
    progress: Progress,
) -> _Setup:
    """Load everything, split the data and put the model on the operating table."""
    wanted = load_spec(spec)
    seed = wanted.seed if seed is None else seed
    if seed < 1:
        raise UsageError(f"seed {seed}: must be at least 1")
    bound = parse_memory(memory)
    chosen: Device = resolve_device(device)
    progress(f"loading {model}")
    loaded = load_model(model)
    data = load_dataset(wanted.data, loaded.inputs, wanted.labels)
    experiment = Experiment(loaded, chosen, bound, data.inputs)
    scores = experiment.scores(data.inputs, str(wanted.data))
    classes = scores.shape[-1]
    check_labels(data, classes, str(wanted.data))
    splits, notes = _split(wanted, loaded, data, classes, seed)
    try:
        properties = [
            backdoor.prepare(item, splits, loaded.inputs, classes, experiment.scores, wanted.labels, seed)
            for item in wanted.properties
        ]
    except SpecError as error:
        raise SpecError(f"{spec}: {error}") from None
    case = Case(experiment, splits, properties, wanted.keep, seed, progress)
    run = Run(
        version=__version__,
        model=str(model),
        sha256=loaded.sha256,
        device=chosen,
        seed=seed,
        samples={part: len(splits.part(part)) for part in PARTS},
        notes=notes,
    )
    return _Setup(loaded, wanted, case, run)


def _split(spec: Spec, model: Model, data: Dataset, classes: int, seed: int) -> tuple[Splits, list[str]]:
    notes = []
    if spec.holdout is None:
        repair, search, validation, holdout = split(data, _SHARES_WITH_HOLDOUT, seed)
    else:
        repair, search, validation = split(data, _SHARES, seed)
        everything = load_dataset(spec.holdout, model.inputs, spec.labels)
        check_labels(everything, classes, str(spec.holdout))
        holdout, overlap = without_overlap(everything, data)
        if overlap:
            notes.append(f"{overlap} samples of {spec.holdout} also occur in {spec.data}; the judge leaves them out.")
    splits = Splits(repair, search, validation, holdout)
    for part in PARTS:
        size = len(splits.part(part))
        if size < _FEWEST:
            source = spec.holdout if part == "holdout" and spec.holdout else spec.data
            raise DataError(f"{source}: only {size} samples are left for {part}; at least {_FEWEST} are needed")
    return splits, notes
