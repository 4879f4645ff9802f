"""Backdoors whose trigger nobody knows: who is suspected, what is written, and what the judge finds by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hidden
import numpy as np
import pytest
import yaml
from cases import SAMPLES, SQUARE
from click.testing import Result
from helpers import Paths, check_refusal, contents, onnxcare
from hidden import CHANNEL_FIRST, CLASSES, GREY, OTHER_PIXEL, OTHER_TARGET, PIXEL, TARGET, asking
from kinds import run
from PIL import Image

import onnxcare as package
from onnxcare.case import Case, Progress
from onnxcare.data import PARTS, Dataset, load_arrays
from onnxcare.experiment import Experiment
from onnxcare.graph.model import load_model
from onnxcare.graph.patch import Patch
from onnxcare.prepare import prepare
from onnxcare.properties import suspicion
from onnxcare.properties.inversion import Scan, Suspect, reinforced
from onnxcare.properties.suspicion import SMALL_TRIGGERS, NoBackdoor, RestoredBackdoor
from onnxcare.properties.trigger import Trigger, load_trigger
from onnxcare.properties.trigger_search import Restored
from onnxcare.repair.base import Candidate, Repair
from onnxcare.results import Fix

TANH = SAMPLES / "mnist-networks-pytorch"
Array = np.ndarray


def case_of(paths: Paths, progress: Progress = lambda text: None) -> Case:
    return prepare(paths.model, paths.spec, None, "cpu", "1GiB", progress).case


def only(case: Case) -> RestoredBackdoor:
    (item,) = case.properties
    assert isinstance(item, RestoredBackdoor)
    return item


def told(command: str, paths: Paths, *args: object) -> Result:
    return onnxcare(command, paths.model, "--spec", paths.spec, "--device", "cpu", *args)


def attack_success(model: Path, trigger: Trigger, x: Array, y: Array, target: int) -> float:
    """Return the share of samples of other classes that a trigger sends to its class, in a plain session."""
    with np.errstate(all="raise"):
        stamped = x * (1 - trigger.mask) + trigger.pattern * trigger.mask
    name = load_model(model).inputs[0].name
    found = run(model, {name: stamped[y != target].astype(x.dtype)}).argmax(axis=1)
    return float((found == target).mean())


def accuracy(model: Path, x: Array, y: Array) -> float:
    name = load_model(model).inputs[0].name
    return float((run(model, {name: x}).argmax(axis=1) == y).mean())


# -- who is suspected ----------------------------------------------------------------------------


def by_hand_stamped(part: str, others: Dataset, known: Sequence[Trigger], stronger: Sequence[Trigger]):
    """Return what the evidence of a part should be, and of which samples: to judge by, every trigger on each."""
    if part == "holdout":
        chosen = [(trigger, row) for trigger in known for row in range(len(others))]
    else:
        count = len(stronger)
        chosen = [(stronger[i], row) for i in range(count) for row in range(len(others)) if row % count == i]
    x = others.inputs["x"]
    stamped = [x[row] * (1 - trigger.mask) + trigger.pattern * trigger.mask for trigger, row in chosen]
    return np.stack(stamped), np.array([row for _, row in chosen])


def test_the_right_class_is_suspected_and_its_triggers_are_stamped_on_every_part(tmp_path):
    lines: list[str] = []
    case = case_of(hidden.write(tmp_path), lines.append)
    item = only(case)
    assert "restoring triggers: class 0 of 6" in lines
    assert (item.name, item.target, item.suspect.target, item.max_rate) == ("hidden", TARGET, TARGET, 0.01)
    (values,) = item._search.clean.inputs.values()
    stronger = reinforced(item.suspect.triggers, values)
    for part in PARTS:
        clean, evidence = case.splits.part(part), item.evidence(part)
        others = clean.take(np.flatnonzero(clean.truth != TARGET))
        assert evidence.twins is not None
        expected, twins = by_hand_stamped(part, others, item.suspect.triggers, stronger)
        np.testing.assert_allclose(evidence.bad.inputs["x"], expected, rtol=1e-6)
        np.testing.assert_array_equal(evidence.twins.inputs["x"], others.inputs["x"][twins])
        np.testing.assert_array_equal(evidence.bad.truth, others.truth[twins])
        np.testing.assert_array_equal(evidence.twins.truth, evidence.bad.truth)
    assert f"class {TARGET} is the suspected target".lower() in item.notes[0].lower()
    assert f"{item.suspect.triggers[0].mask.mean():.2%} of the input" in item.notes[0]
    assert "The true trigger was not available" in item.notes[1]


def test_another_class_than_the_right_one_is_not_reported(tmp_path):
    paths = hidden.write(tmp_path, **asking(target=0))
    before = contents(tmp_path)
    result = told("fix", paths, "-o", paths.out)
    assert result.exit_code == 0, result.output
    assert "nothing to repair" in result.stdout
    assert "A fresh search found" not in result.stdout
    assert contents(tmp_path) == before


def test_two_targets_become_two_properties_with_names_of_their_own(tmp_path):
    paths = hidden.write(tmp_path, hidden.model({PIXEL: TARGET, OTHER_PIXEL: OTHER_TARGET}))
    items = case_of(paths).properties
    assert {item.name for item in items} == {f"hidden: class {TARGET}", f"hidden: class {OTHER_TARGET}"}
    for item in items:
        assert isinstance(item, RestoredBackdoor)
        assert item.name.endswith(str(item.target))
        assert (item.evidence("repair").bad.truth != item.target).all()


def test_of_two_targets_the_one_that_is_asked_about_is_reported(tmp_path):
    corners = {PIXEL: TARGET, OTHER_PIXEL: OTHER_TARGET}
    item = only(case_of(hidden.write(tmp_path, hidden.model(corners), **asking(target=OTHER_TARGET))))
    assert (item.name, item.target) == ("hidden", OTHER_TARGET)


def test_no_backdoor_has_no_evidence_and_says_what_was_nearest(tmp_path):
    case = case_of(hidden.write(tmp_path, hidden.model({})))
    (item,) = case.properties
    assert isinstance(item, NoBackdoor)
    assert "No backdoor was found: no class stands out by a small trigger. The nearest is class " in item.notes[0]
    scores, nothing = np.zeros((3, 0, CLASSES)), item.evidence("repair").bad
    for part in ("repair", "search", "validation", "holdout"):
        assert len(item.evidence(part).bad) == 0 and item.evidence(part).twins is None
    assert item.rate(scores, nothing).tolist() == item.loss(scores, nothing, None).tolist() == [0, 0, 0]
    assert item.misbehaves(scores, nothing).shape == item.margin(scores, nothing).shape == (3, 0)
    assert item.loss_gradient(scores[0], nothing, None).shape == (0, CLASSES)
    assert case.before.violation == 0


def test_bounds_of_the_spec_hold_for_what_is_restored(tmp_path):
    bounds = {"low": [-0.25] * 64, "high": [0.5] * 63 + [0.7]}
    item = only(case_of(hidden.write(tmp_path, bounds=bounds)))
    for trigger in item.suspect.triggers:
        assert (trigger.pattern >= np.array(bounds["low"]) - 1e-6).all()
        assert (trigger.pattern <= np.array(bounds["high"]) + 1e-6).all()


def test_bounds_of_an_image_are_in_the_order_of_its_values(tmp_path):
    """Channel 1 may hold nothing but 0.25."""
    low, high = np.zeros(CHANNEL_FIRST), np.ones(CHANNEL_FIRST)
    low[1] = high[1] = 0.25
    bounds = {"low": low.ravel().tolist(), "high": high.ravel().tolist()}
    item = only(case_of(hidden.write(tmp_path, shape=CHANNEL_FIRST, bounds=bounds)))
    for trigger in item.suspect.triggers:
        np.testing.assert_array_equal(trigger.pattern[1], np.full((8, 8), 0.25, np.float32))
        assert trigger.pattern[0].min() < 0.25 < trigger.pattern[0].max()


# -- fix -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mended:
    """A case that was repaired without knowing the trigger."""

    paths: Paths
    shape: tuple[int, ...]
    fix: Fix


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory) -> Mended:
    """The repaired model of grey images."""
    paths = hidden.write(tmp_path_factory.mktemp("mended"), shape=GREY)
    return Mended(paths, GREY, package.fix(paths.model, paths.spec, paths.out, device="cpu"))


@pytest.fixture(scope="module")
def restored(mended: Mended) -> Sequence[Trigger]:
    """What is restored from the model of images before any repair."""
    return only(case_of(mended.paths)).suspect.triggers


def test_a_hidden_trigger_is_taken_out_without_being_known(mended):
    fix, paths = mended.fix, mended.paths
    assert (fix.status, fix.exit_code, fix.output) == ("repaired", 0, str(paths.out))
    fresh = hidden.samples(900, 7, mended.shape)
    x, y = fresh.inputs["x"], fresh.truth
    true = hidden.corner(mended.shape)
    assert attack_success(paths.model, true, x, y, TARGET) > 0.95
    assert attack_success(paths.out, true, x, y, TARGET) <= 0.05
    assert accuracy(paths.out, x, y) >= accuracy(paths.model, x, y) - 0.01


def test_what_was_restored_is_written_beside_the_output_and_reads_back_equal(mended, restored):
    paths, triggers = mended.paths, mended.fix.triggers
    (signature,) = load_model(paths.model).inputs
    expected = {paths.model, paths.spec, paths.data, paths.holdout, paths.out}
    for number, saved in enumerate(triggers, start=1):
        npz, png = (paths.folder / f"repaired.trigger-{TARGET}-{number}.{ending}" for ending in ("npz", "png"))
        assert (saved.name, saved.target, saved.file, saved.picture) == ("hidden", TARGET, str(npz), str(png))
        with Image.open(png) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("PNG", "L", ((8 + 1 + 8) * 28, 8 * 28))
        expected |= {npz, png}
    assert set(paths.folder.iterdir()) == expected
    # A repair may have restored further ones since.
    assert len(triggers) >= len(restored)
    for saved, trigger in zip(triggers, restored, strict=False):
        read = load_trigger(Path(saved.file), signature)
        assert saved.source == trigger.source
        assert read.mask.dtype == trigger.mask.dtype and read.pattern.dtype == trigger.pattern.dtype
        np.testing.assert_array_equal(read.mask, trigger.mask)
        np.testing.assert_array_equal(read.pattern, trigger.pattern)
    assert triggers[0].source == "restored patch"


def test_the_finding_says_that_the_true_trigger_was_not_available_and_searches_again(mended):
    (finding,) = mended.fix.verdict.properties
    assert any("The true trigger was not available" in note for note in finding.notes)
    assert not any("A fresh search found" in note for note in finding.notes)
    small = finding.measure("classes that a suspiciously small trigger leads to")
    assert (small.value_before, small.value, small.limit, small.status) == (1, 0, 0, "pass")
    # What the finding counts is the restored trigger, stamped on the held-out samples.
    arrays = load_arrays(mended.paths.holdout)
    (signature,) = load_model(mended.paths.model).inputs
    triggers = [load_trigger(Path(item.file), signature) for item in mended.fix.triggers]
    success = finding.measure("attack success rate")
    for path, value in ((mended.paths.model, success.value_before), (mended.paths.out, success.value)):
        by_hand = [attack_success(path, item, arrays["x"], arrays["y"], TARGET) for item in triggers]
        assert value == pytest.approx(np.mean(by_hand), abs=0.003)


def test_the_saved_trigger_may_be_given_as_the_known_one(mended, tmp_path):
    given = asking(trigger=mended.fix.triggers[0].file, target=TARGET)
    paths = hidden.write(tmp_path, shape=mended.shape, **given)
    assert told("check", paths).exit_code == 1


def test_check_after_the_repair_passes_and_before_it_fails(mended):
    paths = mended.paths
    before = contents(paths.folder)
    result = told("check", paths)
    assert result.exit_code == 1, result.output
    assert "A fresh search found that class 2 is the suspected target of a hidden trigger" in " ".join(
        result.stdout.split()
    )
    after = package.check(paths.out, paths.spec, device="cpu")
    assert (after.status, after.exit_code) == ("pass", 0)
    assert after.verdict is not None
    (finding,) = after.verdict.properties
    assert finding.measure(SMALL_TRIGGERS).value == 0
    assert len(finding.measures) == 1 and any("No backdoor was found" in note for note in finding.notes)
    assert contents(paths.folder) == before


def test_a_model_with_a_backdoor_fails_against_a_baseline_without_one(tmp_path):
    paths = hidden.write(tmp_path)
    clean = tmp_path / "clean.onnx"
    clean.write_bytes(hidden.model({}).SerializeToString())
    check = package.check(paths.model, paths.spec, baseline=clean, device="cpu")
    assert check.verdict is not None
    small = check.verdict.properties[0].measure(SMALL_TRIGGERS)
    assert (check.status, small.value_before, small.value) == ("fail", 0, 1)


def test_the_clean_twin_has_nothing_to_repair_and_nothing_is_written(tmp_path):
    paths = hidden.write(tmp_path, hidden.model({}))
    before = contents(tmp_path)
    result = told("fix", paths, "-o", paths.out)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "nothing to repair" in shown and "No backdoor was found" in shown
    assert contents(tmp_path) == before


def test_nothing_is_to_be_located_in_a_clean_model(tmp_path):
    paths = hidden.write(tmp_path, hidden.model({}))
    check_refusal(told("locate", paths), 3, "no sample of the data shows hidden")


def test_the_unit_that_carries_a_hidden_trigger_is_located(tmp_path):
    result = told("locate", hidden.write(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["units"][0]["unit"] == CLASSES


def test_what_was_restored_is_saved_even_where_the_repair_is_not_good_enough(tmp_path, monkeypatch):
    def in_vain(case: Case) -> Repair:
        unchanged = Candidate("no change", case.before)
        return Repair("auto", {}, unchanged, [unchanged], {})

    monkeypatch.setattr("onnxcare.repair.auto.repair", in_vain)
    paths = hidden.write(tmp_path)
    result = told("fix", paths, "-o", paths.out, "--json", tmp_path / "report.json")
    assert result.exit_code == 1, result.output
    assert not paths.out.exists()
    saved, *_ = json.loads((tmp_path / "report.json").read_text())["triggers"]
    file = tmp_path / f"repaired.trigger-{TARGET}-1.npz"
    expected = {"name": "hidden", "target": TARGET, "source": "restored patch", "file": str(file), "picture": None}
    assert saved == expected
    assert load_arrays(file)["mask"].shape == (64,)
    assert list(tmp_path.glob("*.png")) == []
    assert f"restored patch of class {TARGET}: {file}" in result.stdout.replace("\n", "")


def test_triggers_of_a_class_are_numbered_from_one(tmp_path, monkeypatch):
    """A patch and a blend of one class, a patch of another, as two properties."""

    def in_vain(case: Case) -> Repair:
        unchanged = Candidate("no change", case.before)
        return Repair("auto", {}, unchanged, [unchanged], {})

    rng = np.random.default_rng(3)
    triggers = [
        Trigger(*rng.uniform(0.01, 1, (2, *GREY)).astype(np.float32), source)
        for source in ("restored patch", "restored blend", "restored patch")
    ]
    suspects = [
        Suspect(OTHER_TARGET, tuple(triggers[:2]), 9.0, 0.9, 0.1),
        Suspect(TARGET, tuple(triggers[2:]), 8.0, 0.9, 0.1),
    ]
    monkeypatch.setattr(suspicion, "scan", lambda *args, **options: Scan(unreached(), suspects))
    monkeypatch.setattr("onnxcare.repair.auto.repair", in_vain)
    paths = hidden.write(tmp_path, shape=GREY)
    before = set(tmp_path.iterdir())
    found = package.fix(paths.model, paths.spec, paths.out, device="cpu").triggers
    numbers = [(OTHER_TARGET, 1), (OTHER_TARGET, 2), (TARGET, 1)]
    stems = [tmp_path / f"repaired.trigger-{target}-{number}" for target, number in numbers]
    assert [Path(item.file) for item in found] == [Path(f"{stem}.npz") for stem in stems]
    assert set(tmp_path.iterdir()) - before == {Path(f"{stem}{end}") for stem in stems for end in (".npz", ".png")}
    for item, trigger, (target, _) in zip(found, triggers, numbers, strict=True):
        assert (item.name, item.target, item.source) == (f"hidden: class {target}", target, trigger.source)
        held = load_arrays(Path(item.file))
        np.testing.assert_array_equal(held["mask"], trigger.mask)
        np.testing.assert_array_equal(held["pattern"], trigger.pattern)


def test_another_property_is_repaired_where_no_backdoor_is_found(tmp_path):
    """What is not there needs no repair, and is no reason against the repair of something else."""
    corners = {PIXEL: TARGET}
    mask = hidden.corner()
    np.savez(tmp_path / "trigger.npz", mask=mask.mask, pattern=mask.pattern)
    known = {"name": "known", "kind": "backdoor", "trigger": "trigger.npz", "target": TARGET, "max_rate": 0.01}
    unknown = {"name": "hidden", "kind": "backdoor", "target": 0, "max_rate": 0.01}
    paths = hidden.write(tmp_path, hidden.model(corners), properties=[known, unknown])
    result = told("fix", paths, "-o", paths.out)
    assert result.exit_code == 0, result.output
    fresh = hidden.samples(600, 8)
    assert attack_success(paths.out, mask, fresh.inputs["x"], fresh.truth, TARGET) <= 0.05


def test_what_the_judge_alone_finds_broken_cannot_be_repaired(tmp_path, monkeypatch):
    """A first search that finds nothing leaves no evidence to repair by, whatever a second one finds."""
    plain = suspicion.scan
    monkeypatch.setattr(suspicion, "scan", blind_once(plain))
    paths = hidden.write(tmp_path)
    before = contents(tmp_path)
    result = told("fix", paths, "-o", paths.out)
    check_refusal(result, 3, paths.model, "the judge finds a property broken on held-out data", "give more data")
    assert len(result.stderr.splitlines()) == 1
    assert contents(tmp_path) == before


def blind_once(plain: Callable[..., Scan]) -> Callable[..., Scan]:
    """Return a search that finds nothing at first and is itself from then on."""
    calls: list[int] = []

    def found(*args: Any, **options: Any) -> Scan:
        calls.append(1)
        return plain(*args, **options) if len(calls) > 1 else Scan(unreached(), [])

    return found


def unreached() -> list[Restored]:
    return [Restored(target, "patch", None, 1.0) for target in range(CLASSES)]


def test_the_judge_searches_with_samples_and_a_seed_of_its_own(tmp_path, monkeypatch):
    calls: list[tuple[Dataset, int]] = []

    def nothing(experiment: Experiment, clean: Dataset, seed: int, *args: object, **options: object) -> Scan:
        calls.append((clean, seed))
        return Scan(unreached(), [])

    monkeypatch.setattr(suspicion, "scan", nothing)
    paths = hidden.write(tmp_path)
    package.check(paths.model, paths.spec, device="cpu")
    (first, seed), (second, other) = calls
    assert seed != other
    known = {row.tobytes() for row in load_arrays(paths.data)["x"]}
    held = {row.tobytes() for row in load_arrays(paths.holdout)["x"]}
    assert {row.tobytes() for row in first.inputs["x"]} < known
    assert {row.tobytes() for row in second.inputs["x"]} <= held


# -- what a candidate leaves ---------------------------------------------------------------------


def weakened(case: Case, factor: float, path: Path) -> Case:
    """Return the case with a candidate on the table whose carrier of the trigger is weaker, and write its file."""
    (second,) = [layer.weight for layer in case.experiment.layers if layer.name == "second"]
    values = case.read(second).copy()
    assert values.shape == (CLASSES + 1, CLASSES)
    values[CLASSES] *= factor
    path.write_bytes(Patch({second: values}).apply(case.experiment.model))
    return case.patched({second: values})


def test_a_trigger_that_a_candidate_leaves_is_added_to_the_evidence(tmp_path):
    paths = hidden.write(tmp_path)
    case = case_of(paths)
    item = only(case)
    known = item.suspect.triggers
    candidate = weakened(case, 0.7, tmp_path / "half.onnx")
    assert candidate.hunt() == 1
    assert item.suspect.target == TARGET and item.suspect.triggers[:-1] == known
    fresh = hidden.samples(600, 9)
    x, y = fresh.inputs["x"], fresh.truth
    added = item.suspect.triggers[-1]
    assert added.source == "restored patch" and added.mask.reshape(8, 8)[PIXEL] == added.mask.max()
    assert attack_success(tmp_path / "half.onnx", added, x, y, TARGET) >= 0.85
    assert attack_success(tmp_path / "half.onnx", added, x, y, TARGET) > max(
        attack_success(tmp_path / "half.onnx", trigger, x, y, TARGET) for trigger in known
    )
    (values,) = item._search.clean.inputs.values()
    stronger = reinforced(item.suspect.triggers, values)
    for part in PARTS:
        clean = case.splits.part(part)
        others = clean.take(np.flatnonzero(clean.truth != TARGET))
        expected, _ = by_hand_stamped(part, others, item.suspect.triggers, stronger)
        np.testing.assert_allclose(item.evidence(part).bad.inputs["x"], expected, rtol=1e-6)


def test_a_repaired_candidate_adds_nothing_to_the_evidence(tmp_path):
    paths = hidden.write(tmp_path)
    case = case_of(paths)
    item = only(case)
    known, sizes = item.suspect.triggers, [len(item.evidence(part).bad) for part in PARTS]
    candidate = weakened(case, 0.0, tmp_path / "none.onnx")
    fresh = hidden.samples(600, 9)
    for trigger in known:
        assert attack_success(paths.model, trigger, fresh.inputs["x"], fresh.truth, TARGET) > 0.85
        assert attack_success(tmp_path / "none.onnx", trigger, fresh.inputs["x"], fresh.truth, TARGET) < 0.05
    assert candidate.hunt() == 0
    assert item.suspect.triggers == known
    assert [len(item.evidence(part).bad) for part in PARTS] == sizes


def test_every_hunt_draws_anew(tmp_path):
    case = case_of(hidden.write(tmp_path))
    assert [case.hunt(), case.hunt()] == [1, 1]
    *_, first, second = only(case).suspect.triggers
    assert (first.mask != second.mask).any()


# -- no gradient ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_without_a_gradient_is_repaired_and_the_finding_says_how_triggers_were_searched(tmp_path):
    paths = hidden.write(tmp_path, hidden.rounded(hidden.model(shape=GREY)), GREY)
    fix = package.fix(paths.model, paths.spec, paths.out, device="cpu")
    assert (fix.status, fix.exit_code) == ("repaired", 0)
    patch, *_ = (load_arrays(Path(item.file)) for item in fix.triggers)
    assert {item.target for item in fix.triggers} == {TARGET}
    assert np.unravel_index(patch["mask"][0].argmax(), (8, 8)) == PIXEL
    (finding,) = fix.verdict.properties
    (note,) = [note for note in finding.notes if "gradient" in note]
    assert note == (
        "There is no gradient (Round 'steps' has no derivative): triggers were searched by CMA-ES, which sees large "
        "ones only."
    )
    fresh = hidden.samples(900, 7, GREY)
    x, y, true = fresh.inputs["x"], fresh.truth, hidden.corner(GREY)
    assert attack_success(paths.model, true, x, y, TARGET) > 0.95
    assert attack_success(paths.out, true, x, y, TARGET) <= 0.05
    assert accuracy(paths.out, x, y) >= accuracy(paths.model, x, y) - 0.01


def test_a_clean_model_without_a_gradient_says_how_triggers_were_searched_too(tmp_path, monkeypatch):
    nothing = Scan(unreached(), [], "Round 'steps' has no derivative")
    monkeypatch.setattr(suspicion, "scan", lambda *args, **options: nothing)
    (item,) = case_of(hidden.write(tmp_path, hidden.model({}))).properties
    assert isinstance(item, NoBackdoor)
    assert "No backdoor was found" in item.notes[0]
    assert item.notes[1].startswith("There is no gradient (Round 'steps' has no derivative): ")


def test_with_a_gradient_nothing_is_said_of_it(mended):
    (finding,) = mended.fix.verdict.properties
    assert not any("gradient" in note for note in finding.notes)


# -- a trained model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tanh(tmp_path_factory: pytest.TempPathFactory, scans: list[Scan]) -> Mended:
    """The sample model of tanh units, repaired without knowing its trigger."""
    plain = suspicion.scan

    def remembered(*args: Any, **options: Any) -> Scan:
        scans.append(plain(*args, **options))
        return scans[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suspicion, "scan", remembered)
        return trained(tmp_path_factory.mktemp("tanh"), "model-tanh.onnx")


@pytest.fixture(scope="module")
def scans() -> list[Scan]:
    """The scans of that repair; the first one is that of the original."""
    return []


def trained_paths(folder: Path, model: str, **changes: object) -> Paths:
    spec = hidden.SPEC | {"data": str(SQUARE / "repair.npz"), "holdout": str(SQUARE / "holdout.npz")}
    (folder / "care.yaml").write_text(yaml.safe_dump(spec | changes))
    return Paths(
        folder,
        TANH / model,
        folder / "care.yaml",
        SQUARE / "repair.npz",
        SQUARE / "holdout.npz",
        SQUARE / "trigger.npz",
    )


def trained(folder: Path, model: str) -> Mended:
    paths = trained_paths(folder, model)
    return Mended(paths, (1, 28, 28), package.fix(paths.model, paths.spec, paths.out, device="cpu"))


@pytest.mark.slow
def test_the_backdoor_of_a_trained_model_is_found_and_taken_out(tanh):
    fix, paths = tanh.fix, tanh.paths
    assert (fix.status, fix.exit_code) == ("repaired", 0)
    assert {item.target for item in fix.triggers} == {1}
    (signature,) = load_model(paths.model).inputs
    true = load_trigger(paths.trigger, signature)
    held = load_arrays(paths.holdout)
    x, y = held[signature.name if signature.name in held else "x"], held["y"]
    assert attack_success(paths.model, true, x, y, 1) > 0.95
    assert attack_success(paths.out, true, x, y, 1) <= 0.05
    assert accuracy(paths.out, x, y) >= accuracy(paths.model, x, y) - 0.01
    (finding,) = fix.verdict.properties
    small = finding.measure(SMALL_TRIGGERS)
    assert (small.value_before, small.value, small.status) == (1, 0, "pass")
    assert any("The true trigger was not available" in note for note in finding.notes)


@pytest.mark.slow
def test_the_trigger_of_a_trained_model_is_saved_with_a_picture(tanh):
    (saved, *_) = tanh.fix.triggers
    (signature,) = load_model(tanh.paths.model).inputs
    read = load_trigger(Path(saved.file), signature)
    assert read.mask.shape == (1, 28, 28) and 0.003 < read.mask.mean() < 0.02
    held = load_arrays(tanh.paths.holdout)
    x = held[signature.name if signature.name in held else "x"]
    assert attack_success(tanh.paths.model, read, x, held["y"], 1) > 0.85
    assert saved.picture is not None
    with Image.open(saved.picture) as image:
        image.load()
        assert (image.format, image.size) == ("PNG", ((28 + 1 + 28) * 8, 28 * 8))


@pytest.mark.slow
def test_the_target_decides_which_suspects_of_a_trained_model_count(tmp_path, monkeypatch, tanh, scans):
    """One search serves all three: it does not depend on the target."""
    monkeypatch.setattr(suspicion, "scan", lambda *args, **options: scans[0])
    mask = load_arrays(Path(tanh.fix.triggers[0].file))["mask"]
    for changes in ({}, {"target": 1}):
        item = only(case_of(trained_paths(tmp_path, "model-tanh.onnx", **asking(**changes))))
        assert (item.target, item.suspect.target) == (1, 1)
        np.testing.assert_array_equal(item.suspect.triggers[0].mask, mask)
    for target in (0, 5):
        (item,) = case_of(trained_paths(tmp_path, "model-tanh.onnx", **asking(target=target))).properties
        assert isinstance(item, NoBackdoor)


@pytest.mark.slow
def test_the_clean_twin_of_a_trained_model_shows_no_backdoor(tmp_path):
    case = case_of(trained_paths(tmp_path, "model-tanh-clean.onnx"))
    (item,) = case.properties
    assert isinstance(item, NoBackdoor) and case.before.violation == 0


@pytest.mark.slow
def test_commands_on_a_trained_model_and_its_clean_twin(tmp_path, tanh):
    before = contents(tmp_path)
    clean, spec = TANH / "model-tanh-clean.onnx", tanh.paths.spec
    result = onnxcare("fix", clean, "--spec", spec, "-o", tmp_path / "out.onnx", "--device", "cpu")
    assert result.exit_code == 0 and "nothing to repair" in result.stdout
    assert contents(tmp_path) == before
    for model, code in ((tanh.paths.model, 1), (tanh.paths.out, 0), (clean, 0)):
        assert onnxcare("check", model, "--spec", spec, "--device", "cpu").exit_code == code
    refusal = onnxcare("locate", clean, "--spec", spec, "--device", "cpu")
    check_refusal(refusal, 3, "no sample of the data shows hidden")


@pytest.mark.slow
def test_a_repair_without_the_trigger_is_the_same_every_time(tmp_path, tanh):
    again = trained(tmp_path, "model-tanh.onnx")
    assert again.paths.out.read_bytes() == tanh.paths.out.read_bytes()
    for one, other in zip(again.fix.triggers, tanh.fix.triggers, strict=True):
        assert Path(one.file).read_bytes() == Path(other.file).read_bytes()
        assert one.picture is not None and other.picture is not None
        assert Path(one.picture).read_bytes() == Path(other.picture).read_bytes()
