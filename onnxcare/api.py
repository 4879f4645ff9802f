"""The public functions: load, inspect, locate, check and fix. The command line only parses, calls them and prints."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from onnxcare import repair as methods
from onnxcare._version import __version__
from onnxcare.case import Case, Progress
from onnxcare.comparison import comparable
from onnxcare.diagnosis import reasons
from onnxcare.errors import DataError, ModelError, UsageError
from onnxcare.experiment import judged_output
from onnxcare.findings import optimisation_findings, static_findings
from onnxcare.graph.model import Model, load_model
from onnxcare.graph.patch import (
    Patch,
    TensorChange,
    check_output,
    publish,
    staged,
    staged_file,
    with_metadata,
    write_atomically,
)
from onnxcare.inspection import Inspection, inspect_model
from onnxcare.judge import Court, Witness, judge
from onnxcare.locators import chosen
from onnxcare.locators.attribution import Attribution, Raced
from onnxcare.locators.differential import vote_weights
from onnxcare.locators.pairs import need_pairs
from onnxcare.locators.race import Rules
from onnxcare.locators.select import attribute_sites, select_units
from onnxcare.measures import CONFIDENCE, Gauge, Verdict
from onnxcare.patchfile.make import make_patch
from onnxcare.pool import Pool
from onnxcare.prepare import Setup, prepare
from onnxcare.properties.suspicion import RestoredBackdoor
from onnxcare.repair.base import Repair
from onnxcare.report.picture import picture
from onnxcare.results import Check, Fix, LayerVotes, Location, Race, SavedTrigger, SiteScore, Status, UnitScore
from onnxcare.runtime import Session, few_blas_threads
from onnxcare.spec import BackdoorSpec, Spec, load_spec

# Whoever runs such a file does not know which weights, or whose, are run.
_NOT_TO_BE_RUN = frozenset(
    {"not-onnx", "no-graph", "two-value-fields", "external-data-outside", "external-data-missing"}
)
# Held-out samples on which onnxruntime is compared with itself.
_COMPARED = 256
# Held-out samples on which a model is tried out, and how far answers may be apart that are the same but for rounding.
_TRIED, _SAME = 3, 1e-4
# What the judge's seed is away from that of the search.
_JUDGE = 1_000_003


def silent(text: str) -> None:
    """Ignore progress."""


def load(model: str | Path) -> Model:
    """Read an ONNX file and make sure that onnxruntime runs it.

    Raises:
        ModelError: the file cannot be used; the message says why.
    """
    return load_model(model)


def inspect(model: str | Path, *, picture: str | Path | None = None) -> Inspection:
    """Return what a model consists of: signature, layers, sites, and what can be repaired by which method.

    Args:
        model: path of the ONNX file; only its weights in the file itself are read.
        picture: where a drawing of the graph goes, an SVG file; None for none.

    Raises:
        ModelError: the file cannot be used.
        UsageError: the drawing cannot be written there.
    """
    if picture is not None:
        check_output(Path(picture), [], Path(model), in_place=False)
    loaded = load_model(model)
    found = inspect_model(loaded)
    if picture is not None:
        from onnxcare.report import graph_picture

        if Path(picture).exists():
            check_output(Path(picture), list(loaded.external_files()), Path(model), in_place=False)
        write_atomically(Path(picture), graph_picture.draw(loaded, found))
    return found


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
    method: str = "auto",
    top: int = 10,
    confidence: float = CONFIDENCE,
    exact: bool = False,
    pool: Pool | None = None,
    progress: Progress = silent,
) -> Location:
    """Rank hidden units by how much they carry the misbehaviour.

    Rankings compete: average causal effects, interchange effects and differential votes; the units come in the one
    whose top units did most when they were intervened on.

    Args:
        model: path of the ONNX file.
        spec: path of the care.yaml.
        seed: takes the place of the spec's seed.
        device: `auto`, `cpu` or `cuda`.
        memory: bound on the memory of activations, such as `2GiB`; None means half of what is free.
        samples: at most so many clean and so many bad samples.
        values: how many evenly spaced values each unit is forced to.
        method: `causal`, `interchange` or `differential`, which also votes for the single weights of every layer;
            `auto` lets all of them compete.
        top: how many units are looked for. Where the full table would take long, units race for these places, and
            only those still in contention are measured on more and more samples.
        confidence: the probability with which none of them is missed, as far as samples decide.
        exact: measure all units in full, and take nothing for granted.
        pool: who else runs families of interventions: a `onnxcare.Pool` around any `concurrent.futures.Executor`. The
            result is the same, on processors of one kind to the last bit.
        progress: told in a few words what is being done.

    Raises:
        OnnxcareError: spec, model or data cannot be used.
    """
    if samples < 1 or values < 2 or top < 1:
        raise UsageError(
            f"samples {samples}, values {values}, top {top}: at least 1 sample, 2 values and a top of 1 are needed"
        )
    if not 0 < confidence < 1:
        raise UsageError(f"confidence {confidence:g}: must lie between 0 and 1")
    locators = chosen(method)
    setup = prepare(model, spec, seed, device, memory, progress)
    case = setup.case
    case.experiment.pool = pool
    rules = None if exact else Rules(top, confidence, setup.run.seed)
    attributions = attribute_sites(case, case.experiment.sites, samples, values, locators, rules)
    selections = select_units(case, attributions)
    # One ranking for all sites, so that its scores can be compared: the one that served best at the best site.
    locator = selections[0].locator
    by_site = {item.site.tensor: item for item in attributions if item.locator == locator}
    units = [unit for item in by_site.values() for unit in _unit_scores(item)]
    raced = next((item for item in by_site.values() if isinstance(item, Raced)), None)
    return Location(
        run=setup.run,
        method=locator,
        units=sorted(units, key=lambda unit: (-unit.cases, -unit.score)),
        race=None if raced is None else Race(top, confidence, raced.screened, raced.rounds),
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
        layers=_layer_votes(case, samples) if method == "differential" else [],
    )


def _unit_scores(item: Attribution) -> list[UnitScore]:
    """Return the scores of the units that were measured, strongest first."""
    cases = item.cases if isinstance(item, Raced) else np.full(item.site.units, item.samples)
    return [
        UnitScore(item.site.tensor, int(unit), float(item.scores[unit]), int(cases[unit]))
        for unit in item.ranking()
        if cases[unit]
    ]


def _layer_votes(case: Case, samples: int) -> list[LayerVotes]:
    """Return the votes for the weights of every layer that can be cut open, most answers brought back first."""
    pairs = need_pairs(case, samples)
    found = []
    for layer in case.experiment.open_layers:
        case.progress(f"differences at {layer.name}")
        try:
            votes = vote_weights(case, layer, pairs)
        except ModelError:
            continue  # what can be cut open, `inspect` tells
        voted = len(votes.ranking())
        found.append(
            LayerVotes(layer.name, votes.votes.size, voted, votes.pairs, votes.located, votes.share, votes.gradient)
        )
    return sorted(found, key=lambda item: -item.located)


@few_blas_threads()
def fix(
    model: str | Path,
    spec: str | Path,
    out: str | Path,
    *,
    method: str = "auto",
    locator: str = "auto",
    seed: int | None = None,
    device: str = "auto",
    memory: str | None = None,
    in_place: bool = False,
    patch: str | Path | None = None,
    best_effort: bool = False,
    layers: Sequence[str] = (),
    max_changed: int | None = None,
    pool: Pool | None = None,
    progress: Progress = silent,
) -> Fix:
    """Repair a model, judge the repair on held-out data, and write it if the verdict is good.

    Args:
        model: path of the ONNX file; it is not changed unless it is also `out` and `in_place` is set.
        spec: path of the care.yaml.
        out: where the repaired model goes.
        method: `auto`, `care`, `ai-lancet-flip`, `ai-lancet-finetune`, `clp`, `fine-pruning` or `fine-tuning`.
        locator: what the method goes by: `causal`, `interchange` or `differential`; `auto` for its own.
        seed: takes the place of the spec's seed.
        device: `auto`, `cpu` or `cuda`.
        memory: bound on the memory of activations, such as `2GiB`; None means half of what is free.
        in_place: allow `out` to be the model itself.
        patch: where the repair goes as a patch file, which `apply` takes; None for nowhere. It is written where the
            model is.
        best_effort: write the model even if the verdict is not good.
        layers: names of the layers that may be changed, or patterns such as `block3*`; none for all.
        max_changed: at most so many values may be changed; None for no limit.
        pool: who else runs families of interventions: a `onnxcare.Pool` around any `concurrent.futures.Executor`. The
            result is the same, on processors of one kind to the last bit.
        progress: told in a few words what is being done.

    Raises:
        OnnxcareError: spec, model or data cannot be used, or the output cannot be written.
    """
    started = time.monotonic()
    # Behind a link lies the file that is meant: replacing the link would leave it as it was.
    target = Path(out).resolve()
    run_method = methods.find(method, locator)
    wanted = load_spec(spec)
    check_output(Path(out), [Path(spec), *wanted.files()], Path(model), in_place)
    _check_triggers(target, wanted)
    if max_changed is not None and max_changed < 1:
        raise UsageError(f"--max-changed {max_changed}: at least one value has to be allowed to change")
    setup = prepare(model, spec, seed, device, memory, progress)
    case, loaded = replace(setup.case, max_changed=max_changed), setup.model
    if patch is not None:
        _check_patch(Path(patch), [Path(spec), Path(model), *wanted.files()], target, loaded)
    case.experiment.pool = pool
    if layers:
        case = replace(case, experiment=case.experiment.only(layers))
    original = _witness(case, loaded)
    if case.before.violation == 0:
        verdict = _judge(case, setup.spec, original, original)
        if all(finding.passed for finding in verdict.properties):
            return _result(setup, "nothing to repair", method, verdict, None, None, [], started)
    for lacking in filter(None, (item.lacking() for item in case.properties)):
        raise DataError(lacking)
    if not any(len(item.evidence("repair").bad) for item in case.properties):
        raise DataError(
            f"{model}: the judge finds a property broken on held-out data that nothing in the data for the repair "
            "shows; give more data, or another seed"
        )
    found = run_method(case)
    case.experiment.make_room()
    change = Patch(found.values)
    data = change.apply(loaded)
    entries = _provenance(setup, found)
    progress("judging the repaired file on held-out data")
    with staged(loaded, with_metadata(data, entries), target) as path:
        verdict = _judge(case, setup.spec, original, _witness(case, load_model(path, loaded.axes)))
        status = _status(verdict, found)
        triggers = _save_triggers(case, target)
        written = None
        if verdict.passed or (best_effort and found.values):
            written = with_metadata(data, entries | {"verdict": status})
            with _patch_file(patch, loaded, written):
                publish(loaded, path, written, target)
    if status != "repaired":
        progress("looking for the reason")
        found = replace(found, notes=(*found.notes, *reasons(case, found)))
    changes = change.summary(loaded)
    return _result(setup, status, method, verdict, found, (Path(out), written, patch), changes, started, triggers)


@few_blas_threads()
def check(
    model: str | Path,
    spec: str | Path,
    *,
    baseline: str | Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    memory: str | None = None,
    progress: Progress = silent,
) -> Check:
    """Measure every property and guard of a model, and look at its graph; nothing is changed or written.

    Errors in the graph that make it unsafe to run (readers would disagree about it) end the check before anything is
    measured.

    Args:
        model: path of the ONNX file.
        spec: path of the care.yaml.
        baseline: another model with the same inputs and outputs, such as the one deployed at present: what got worse
            against it is told, and limits on drops hold against it.
        seed: takes the place of the spec's seed.
        device: `auto`, `cpu` or `cuda`.
        memory: bound on the memory of activations, such as `2GiB`; None means half of what is free.
        progress: told in a few words what is being done.

    Raises:
        OnnxcareError: spec, model or data cannot be used.
    """
    started = time.monotonic()
    wanted = load_spec(spec)
    confidence = CONFIDENCE if wanted.confidence is None else wanted.confidence
    progress(f"looking at the graph of {model}")
    if not Path(model).is_file():
        load_model(model)  # says what is wrong with the path
    findings = static_findings(Path(model))
    if any(item.rule in _NOT_TO_BE_RUN for item in findings):
        return Check(None, str(model), str(spec), None, confidence, None, findings, time.monotonic() - started)
    judged = None if baseline is None else comparable(model, baseline, wanted.sample_axes)[0]
    # What counts as the original's errors and the like is the baseline's business, where there is one.
    setup = prepare(model if baseline is None else baseline, spec, seed, device, memory, progress)
    case = setup.case
    experiment = case.experiment
    if judged is None:
        judged = setup.model
    else:
        _check_answers(judged, case)
    few, decision = case.splits.holdout.take(slice(0, _COMPARED)), experiment.decision.of_output()
    findings += optimisation_findings(
        Path(model),
        few.inputs,
        experiment.output,
        experiment.device,
        decide=lambda answers: decision.scores(answers).argmax(axis=-1),
        axes=judged.axes,
    )
    progress("measuring on held-out data")
    before = None if baseline is None else _witness(case, setup.model)
    verdict = _judge(case, setup.spec, before, _witness(case, judged))
    run = replace(setup.run, model=str(model), sha256=judged.sha256)
    against = None if baseline is None else str(baseline)
    return Check(run, str(model), str(spec), against, confidence, verdict, findings, time.monotonic() - started)


def _check_answers(judged: Model, case: Case) -> None:
    """Make sure that a model answers in the way of the one that the case was prepared with.

    Raises:
        ModelError: its answers have another form, or depend on the other rows of a batch.
    """
    experiment = case.experiment
    judged_output(judged, experiment.output, experiment.decision)
    few = case.splits.holdout.take(slice(0, _TRIED)).inputs
    session = Session(judged.path, experiment.device, axes=judged.axes)
    one, several = (session.run_rows(few, [experiment.output], rows_per_run=rows)[0] for rows in (1, _TRIED))
    classes = experiment.decision.of_output().scores(one).shape[-1]
    if classes != experiment.classes:
        raise ModelError(
            f"{judged.path}: has {classes} classes, but {experiment.model.path} has {experiment.classes}; they cannot "
            "be compared"
        )
    if one.shape != several.shape or not np.allclose(one, several, rtol=_SAME, atol=_SAME, equal_nan=True):
        raise ModelError(
            f"{judged.path}: several rows in one run do not answer as single rows do (some node mixes the rows of a "
            "batch)"
        )


def _witness(case: Case, model: Model) -> Witness:
    experiment = case.experiment
    return Witness(model, experiment.output, experiment.decision, experiment.device, experiment.rows_per_run)


def _judge(case: Case, spec: Spec, before: Witness | None, after: Witness) -> Verdict:
    # Fresh samples of the judge must not be those of the search.
    seed, memory = case.seed + _JUDGE, case.experiment.memory
    court = Court(after, before, case.splits.holdout, Gauge(spec.confidence), seed, memory)
    return judge(court, case.properties, case.keep)


def _status(verdict: Verdict, found: Repair) -> Status:
    if verdict.passed:
        return "repaired"
    return "improved" if found.values else "not repaired"


def _provenance(setup: Setup, found: Repair) -> dict[str, str]:
    return {
        "version": __version__,
        "parent_sha256": setup.model.sha256,
        "method": found.method,
        "seed": str(setup.run.seed),
        "patched_tensors": ",".join(parameter.storage.name for parameter in found.values),
    }


def _check_patch(file: Path, taken: Sequence[Path], out: Path, model: Model) -> None:
    """Make sure, before any work is done, that the patch file can be written and overwrites nothing of this run."""
    copies = [out.parent / path.relative_to(model.path.parent) for path in model.external_files()]
    if file.resolve() in (out, *(path.resolve() for path in copies)):
        raise UsageError(f"{file}: is a file of the repaired model; name another file for the patch")
    check_output(file, [*taken, *model.external_files()], model.path, in_place=True)


def _patch_file(file: str | Path | None, model: Model, data: bytes) -> contextlib.AbstractContextManager[None]:
    """Write what makes these bytes of the model as a patch file, once what is done meanwhile has ended well."""
    if file is None:
        return contextlib.nullcontext()
    return staged_file(Path(file).resolve(), make_patch(model, data).to_bytes())


def _check_triggers(out: Path, spec: Spec) -> None:
    """Make sure, before any work is done, that restored triggers will overwrite no input."""
    unknown = [item for item in spec.properties if isinstance(item, BackdoorSpec) and item.unknown]
    for path in spec.files() if unknown else ():
        for name in (path, path.resolve()):
            if name.parent.resolve() == out.parent and name.name.startswith(f"{out.stem}.trigger-"):
                raise UsageError(f"{path}: restored triggers are saved under such names; name another file to write")


def _save_triggers(case: Case, out: Path) -> list[SavedTrigger]:
    """Save what was restored beside the output, whether or not the repair was good enough to be written."""
    saved: list[SavedTrigger] = []
    for item in (item for item in case.properties if isinstance(item, RestoredBackdoor)):
        target = item.suspect.target
        for trigger in item.suspect.triggers:
            number = sum(other.target == target for other in saved) + 1
            file = out.with_name(f"{out.stem}.trigger-{target}-{number}.npz")
            write_atomically(file, trigger.to_bytes())
            image = picture(trigger)
            if image is not None:
                write_atomically(file.with_suffix(".png"), image)
            shown = None if image is None else str(file.with_suffix(".png"))
            saved.append(SavedTrigger(item.name, target, trigger.source, str(file), shown))
    return saved


def _result(
    setup: Setup,
    status: Status,
    method: str,
    verdict: Verdict,
    found: Repair | None,
    written: tuple[Path, bytes | None, str | Path | None] | None,
    changes: Sequence[TensorChange],
    started: float,
    triggers: Sequence[SavedTrigger] = (),
) -> Fix:
    path, data, patch = written if written is not None else (None, None, None)
    return Fix(
        run=setup.run,
        status=status,
        method=method,
        output=str(path) if data is not None else None,
        output_sha256=hashlib.sha256(data).hexdigest() if data is not None else None,
        patch_file=str(patch) if data is not None and patch is not None else None,
        verdict=verdict,
        patch=changes,
        chosen=found.chosen if found else None,
        candidates=list(found.candidates) if found else [],
        front=list(found.front) if found else [],
        details=found.details if found else {},
        notes=found.notes if found else (),
        triggers=triggers,
        seconds=time.monotonic() - started,
    )
