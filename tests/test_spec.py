from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml
from helpers import SPEC

from onnxcare.errors import SpecError, UsageError, nearest
from onnxcare.spec import BackdoorSpec, Bounds, ErrorsSpec, FairnessSpec, Keep, SafetySpec, Threshold, load_spec

SHORTEST = """\
data: d.npz
properties:
  - {name: a, kind: backdoor, trigger: t.npz, target: 0}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "care.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str = SPEC, *changes: tuple[str, str]):
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return load_spec(write(folder, text))


def test_everything_that_can_be_said(tmp_path: Path) -> None:
    spec = load(tmp_path, SPEC, ("seed: 1", "seed: 9\nlabels: truth"), ("max_rate: 0.01", "max_rate: 0.25"))
    assert spec.data == tmp_path / "repair.npz"
    assert spec.holdout == tmp_path / "holdout.npz"
    assert spec.labels == "truth"
    assert spec.seed == 9
    assert spec.keep == Keep(accuracy_drop=0.01, recall_drop=0.05)
    (found,) = spec.properties
    assert found == BackdoorSpec(
        name="seventh", kind="backdoor", trigger=tmp_path / "trigger.npz", target=1, max_rate=0.25
    )


def test_defaults(tmp_path: Path) -> None:
    spec = load(tmp_path, SHORTEST)
    assert (spec.holdout, spec.labels, spec.seed) == (None, "y", 1)
    assert (spec.keep.accuracy_drop, spec.keep.recall_drop) == (0.01, 0.05)
    assert spec.properties[0].max_rate == 0.01
    assert spec.properties[0].triggered is None and spec.properties[0].triggered_holdout is None
    assert (spec.output, spec.decision, spec.bounds, spec.confidence) == (None, "argmax", None, None)
    assert spec.sample_axes == {}
    assert (spec.keep.balanced_accuracy_drop, spec.keep.broken) == (0.02, None)
    assert (spec.keep.accuracy, spec.keep.recall) == (None, None)
    assert (spec.keep.decisions_changed, spec.keep.calibration_rise) == (None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("argmax", "argmax"),
        ("argmin", "argmin"),
        ("{threshold: 0.5}", Threshold(threshold=0.5)),
        ("{threshold: -3}", Threshold(threshold=-3)),
    ],
)
def test_decisions(tmp_path: Path, text: str, expected: object) -> None:
    assert load(tmp_path, f"{SHORTEST}decision: {text}\n").decision == expected


@pytest.mark.parametrize(
    "text", ["median", "0.5", "{threshold: x}", "{threshold: true}", "{threshold: .nan}", "[]", ""]
)
def test_no_decisions(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError, match=r"care\.yaml: decision: expected argmax, argmin or {threshold: number}, not "):
        load(tmp_path, f"{SHORTEST}decision: {text}\n")


def test_a_misspelt_key_of_a_decision(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"care\.yaml: .*treshold.*threshold"):
        load(tmp_path, SHORTEST + "decision: {treshold: 0.5}\n")


def test_more_to_keep(tmp_path: Path) -> None:
    keep = load(tmp_path, SHORTEST + "keep: {broken: 0, accuracy: 0.9, recall: 1, balanced_accuracy_drop: 0.5}\n").keep
    assert (keep.broken, keep.accuracy, keep.recall, keep.balanced_accuracy_drop) == (0, 0.9, 1, 0.5)
    assert (keep.accuracy_drop, keep.recall_drop) == (0.01, 0.05)
    keep = load(tmp_path, SHORTEST + "keep: {decisions_changed: 0.03, calibration_rise: 0}\n").keep
    assert (keep.decisions_changed, keep.calibration_rise, keep.broken) == (0.03, 0, None)


def test_where_samples_lie(tmp_path: Path) -> None:
    spec = load(tmp_path, SHORTEST + "sample_axes: {state: 1, rate: null}\n")
    assert spec.sample_axes == {"state": 1, "rate": None}


def test_bounds(tmp_path: Path) -> None:
    spec = load(tmp_path, SHORTEST + "bounds: {low: [0, -1.5], high: [1, -1.5]}\nconfidence: 0.99\noutput: scores\n")
    assert spec.bounds == Bounds(low=[0, -1.5], high=[1, -1.5])
    assert (spec.confidence, spec.output) == (0.99, "scores")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bounds: {low: [0], high: [1, 2]}", "bounds: low has 1 values, high has 2"),
        ("bounds: {low: [0, 3], high: [1, 2]}", "bounds: low 3 is above high 2 at value 1"),
        ("bounds: {low: [], high: []}", "bounds.low: "),
        ("bounds: {low: [0]}", "bounds.high: this key is needed"),
        ("bounds: {low: [.inf], high: [1]}", "bounds.low.0: "),
        ("bounds: {low: [0], hihg: [1]}", "unknown key 'bounds.hihg' (did you mean 'high'?)"),
        ("confidence: 1", "confidence: "),
        ("confidence: 0.4", "confidence: "),
        ("confidence: 95", "confidence: "),
        ("keep: {broken: 2}", "keep.broken: "),
        ("keep: {decisions_changed: 1.5}", "keep.decisions_changed: "),
        ("keep: {calibration_rise: -0.1}", "keep.calibration_rise: "),
        ("keep: {calibration: 0.1}", "unknown key 'keep.calibration' (did you mean 'calibration_rise'?)"),
        ("keep: {accurancy: 0.9}", "unknown key 'keep.accurancy' (did you mean 'accuracy'?)"),
        ("output: 3", "output: "),
        ("sample_axes: {state: -1}", "sample_axes.state: "),
        ("sample_axes: {state: first}", "sample_axes.state: "),
    ],
)
def test_values_out_of_range(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(tmp_path, f"{SHORTEST}{text}\n")
    assert str(caught.value).startswith(f"{tmp_path / 'care.yaml'}: {words}")


KINDS = """\
data: d.npz
properties:
  - {name: s, kind: safety, vnnlib: far.vnnlib}
  - {name: e, kind: errors}
  - name: f
    kind: fairness
    protected: {sex: {column: 8, values: [0, 1]}, race: {columns: [1, 2, 3]}}
"""


def test_every_kind_of_property(tmp_path: Path) -> None:
    spec = load(tmp_path, KINDS)
    safety, errors, fairness = spec.properties
    assert safety == SafetySpec(name="s", kind="safety", vnnlib=tmp_path / "far.vnnlib")
    assert (safety.max_rate, safety.samples) == (0, 1_000_000)
    assert errors == ErrorsSpec(name="e", kind="errors", max_rate=0.5)
    assert (errors.samples, errors.label, errors.answered, errors.max_error_rate) == (None, None, None, None)
    assert isinstance(fairness, FairnessSpec)
    assert (fairness.protected["sex"].column, fairness.protected["sex"].values) == (8, [0, 1])
    assert (fairness.protected["race"].column, fairness.protected["race"].columns) == (None, [1, 2, 3])
    assert (fairness.gap, fairness.favourable, fairness.individual_limit) == ("equalized_odds", 1, 0.01)
    assert spec.files() == [tmp_path / "d.npz", tmp_path / "far.vnnlib"]
    gap = load(tmp_path, KINDS + "    max_gap: 0.1\n").properties[2]
    assert (gap.max_gap, gap.individual_limit) == (0.1, None)
    both = load(tmp_path, KINDS + "    max_gap: 0.1\n    max_rate: 0.2\n").properties[2]
    assert both.individual_limit == 0.2


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("column: 8, values: [0, 1]", "column: 8", "properties.2.protected.sex: values go with column"),
        ("column: 8, values: [0, 1]", "values: [0, 1]", "properties.2.protected.sex: give either column"),
        ("column: 8, values: [0, 1]", "columns: [1, 2], values: [0, 1]", "properties.2.protected.sex: values go with"),
        ("column: 8, values: [0, 1]", "column: 8, columns: [1, 2]", "properties.2.protected.sex: give either column"),
        ("values: [0, 1]", "values: [1, 1]", "properties.2.protected.sex: a column or value stands twice"),
        ("values: [0, 1]", "values: [1]", "properties.2.protected.sex.values: "),
        ("columns: [1, 2, 3]", "columns: [1, 2, 1]", "properties.2.protected.race: a column or value stands twice"),
        ("columns: [1, 2, 3]", "colums: [1, 2, 3]", "unknown key 'properties.2.protected.race.colums' (did you mean"),
        ("protected: {sex", "protected: {}\n    p: {sex", "unknown key 'properties.2.p'"),
        ("kind: errors", "kind: errors, lable: 3", "unknown key 'properties.1.lable' (did you mean 'label'?)"),
        ("kind: errors", "kind: errors, label: -3", "properties.1.label: "),
        ("vnnlib: far.vnnlib", "samples: 1000", "properties.0.vnnlib: this key is needed"),
        ("vnnlib: far.vnnlib", "vnnlib: f, samples: 3", "properties.0.samples: "),
        ("kind: errors", "kind: safty", "properties.1.kind: unknown kind 'safty' (did you mean 'safety'?)"),
    ],
)
def test_properties_that_contradict_themselves(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(tmp_path, KINDS, (old, new))
    assert str(caught.value).startswith(f"{tmp_path / 'care.yaml'}: {words}")


BOUNDED = """\
bounds: {low: [0], high: [1]}
properties:
  - {name: s, kind: safety, vnnlib: far.vnnlib}
"""


def test_safety_within_bounds_needs_no_data(tmp_path: Path) -> None:
    spec = load(tmp_path, BOUNDED)
    assert spec.data is None
    assert spec.files() == [tmp_path / "far.vnnlib"]
    for text in (BOUNDED + "  - {name: e, kind: errors}\n", BOUNDED.replace("bounds: {low: [0], high: [1]}\n", "")):
        with pytest.raises(SpecError, match=r"care\.yaml: data: this key is needed"):
            load(tmp_path, text)
    with pytest.raises(SpecError, match="holdout goes with data"):
        load(tmp_path, BOUNDED + "holdout: h.npz\n")


def test_keep_may_be_given_in_part(tmp_path: Path) -> None:
    spec = load(tmp_path, SHORTEST + "keep: {recall_drop: 0}\n")
    assert (spec.keep.accuracy_drop, spec.keep.recall_drop) == (0.01, 0)


def test_paths_are_relative_to_the_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "specs").mkdir()
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "specs", SHORTEST.replace("d.npz", "../d.npz").replace("t.npz", "/far/t.npz"))
    spec = load_spec("specs/care.yaml")
    assert spec.data == Path("specs/../d.npz")
    assert spec.properties[0].trigger == Path("/far/t.npz")


def test_files(tmp_path: Path) -> None:
    given = "triggered: b.npz, triggered_holdout: h.npz"
    spec = load(tmp_path, SHORTEST, ("trigger: t.npz", given), ("data:", "holdout: e.npz\ndata:"))
    assert spec.files() == [tmp_path / name for name in ("d.npz", "e.npz", "b.npz", "h.npz")]
    assert load(tmp_path, SHORTEST).files() == [tmp_path / "d.npz", tmp_path / "t.npz"]


UNKNOWN = """\
data: d.npz
properties:
  - {name: a, kind: backdoor}
"""


@pytest.mark.parametrize(("more", "target"), [("", None), (", target: 3", 3), (", target: null", None)])
def test_a_backdoor_whose_trigger_is_not_known(tmp_path: Path, more: str, target: int | None) -> None:
    (found,) = load(tmp_path, UNKNOWN, ("kind: backdoor", f"kind: backdoor{more}")).properties
    assert found == BackdoorSpec(name="a", kind="backdoor", target=target)
    assert (found.trigger, found.triggered, found.triggered_holdout) == (None, None, None)
    assert (found.target, found.max_rate, found.files()) == (target, 0.01, [])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("trigger: t.npz", "target: this key is needed"),
        ("triggered: t.npz", "target: this key is needed"),
        ("trigger: t.npz, triggered: s.npz, target: 1", "give either trigger or triggered"),
        ("trigger: t.npz, triggered: s.npz", "give either trigger or triggered"),
        ("triggered_holdout: h.npz", "triggered_holdout goes with triggered"),
        ("trigger: null, triggered: t.npz", "target: this key is needed"),
        ("target: -1", ".target: "),
        ("target: 1.0", ".target: "),
        ("trigger: t.npz, target: {}", ".target: names no class that is led to another one"),
        ("trigger: t.npz, target: {1: 2, 3: 3}", ".target: class 3 is led to itself"),
        ("trigger: t.npz, target: {1: -2}", ".target: expected a class that is led to a class, not {1: -2}"),
        ("trigger: t.npz, target: {a: 2}", ".target: expected a class that is led to a class, not {'a': 2}"),
        ("trigger: t.npz, target: {1: true}", ".target: expected a class that is led to a class, not {1: True}"),
        ("trigger: t.npz, target: {1: {2: 3}}", ".target: expected a class that is led to a class"),
        ("trigger: t.npz, target: [1, 2]", ".target: expected a class, or true classes with the ones that they are"),
        ("target: {1: 2}", "target: a trigger is restored for one class"),
        ("trigger: t.npz, target: 1, twins: g.npz", "twins goes with triggered"),
        ("triggered: t.npz, target: 1, twins: t.npz", "twins is a file with triggered samples"),
        (
            "triggered: t.npz, triggered_holdout: h.npz, target: 1, twins: h.npz",
            "twins is a file with triggered samples",
        ),
    ],
)
def test_what_is_known_of_a_backdoor_must_fit_together(tmp_path: Path, more: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(tmp_path, UNKNOWN, ("kind: backdoor", f"kind: backdoor, {more}"))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'care.yaml'}: properties.0")
    assert words in message and "\n" not in message


@pytest.mark.parametrize("given", ["{0: 1, 1: 0}", "{0: 7}"])
def test_a_target_for_every_class(tmp_path: Path, given: str) -> None:
    (found,) = load(
        tmp_path, UNKNOWN, ("kind: backdoor", f"kind: backdoor, trigger: t.npz, target: {given}")
    ).properties
    assert found.target == yaml.safe_load(given)


def test_twins_of_triggered_samples(tmp_path: Path) -> None:
    given = "kind: backdoor, triggered: b.npz, twins: g.npz, target: 1"
    spec = load(tmp_path, UNKNOWN, ("kind: backdoor", given))
    assert spec.properties[0].twins == tmp_path / "g.npz"
    assert spec.files() == [tmp_path / name for name in ("d.npz", "b.npz", "g.npz")]


def test_several_properties(tmp_path: Path) -> None:
    spec = load(tmp_path, SHORTEST + "  - {name: b, kind: backdoor, triggered: b.npz, target: 3}\n")
    assert [item.name for item in spec.properties] == ["a", "b"]
    assert spec.properties[1].triggered == tmp_path / "b.npz"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
def test_what_editors_do_to_text(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "care.yaml"
    path.write_bytes(SPEC.replace("seventh", "siebtes Glück").replace("\n", "\r\n").encode(encoding))
    assert load_spec(path).properties[0].name == "siebtes Glück"


@pytest.mark.parametrize("seed", [1, 2**31 - 1])
def test_seeds(tmp_path: Path, seed: int) -> None:
    assert load(tmp_path, SPEC, ("seed: 1", f"seed: {seed}")).seed == seed


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("seed: 1", "seed: 1.0", "seed: "),
        ("seed: 1", "seed: '1'", "seed: "),
        ("seed: 1", "seed: true", "seed: "),
        ("seed: 1", f"seed: {2**31}", "seed: "),
        ("seed: 1", "seed:", "seed: "),
        ("target: 1", "target: 1.0", "properties.0.target: "),
        ("target: 1", "target: yes", "properties.0.target: "),
        ("max_rate: 0.01", "max_rate: true", "properties.0.max_rate: "),
        ("max_rate: 0.01", "max_rate: '0.01'", "properties.0.max_rate: "),
        ("max_rate: 0.01", "max_rate: 1.01", "properties.0.max_rate: "),
        ("name: seventh", "name: 7", "properties.0.name: "),
        ("seed: 1", "labels: 3", "labels: "),
        ("seed: 1", "labels: [y]", "labels: "),
        ("data: repair.npz", "data: [repair.npz]", "data: "),
        ("holdout: holdout.npz", "holdout: 2020-01-01", "holdout: "),
        ("keep: {accuracy_drop: 0.01, recall_drop: 0.05}", "keep:", "keep: "),
        ("properties:", "properties: 3\nx:", "unknown key 'x'"),
    ],
)
def test_values_of_a_wrong_kind(tmp_path: Path, old: str, new: str, key: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(tmp_path, SPEC, (old, new))
    assert str(caught.value).startswith(f"{tmp_path / 'care.yaml'}: {key}")


def test_a_misspelt_key_comes_before_the_missing_one(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"unknown key 'dta' \(did you mean 'data'\?\)"):
        load(tmp_path, SPEC, ("data: repair.npz", "dta: repair.npz"))


def test_a_spec_error_is_a_usage_error() -> None:
    assert issubclass(SpecError, UsageError)
    assert SpecError("").exit_code == 2


@pytest.mark.parametrize(
    "text",
    [
        "seed: 2020-99-99\n",
        "seed: !!int x\n",
        "seed: !!float x\n",
        "seed: !!timestamp x\n",
        "seed: !!map [a]\n",
        "!!map x\n",
        "!!python/name:os.system x\n",
        "? {a: b}\n: c\n",
        "<<: 3\n",
        "a: &a [*a]\n",
        "{" * 3000,
    ],
)
def test_strange_yaml(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_garbled_specs_are_explained(tmp_path: Path) -> None:
    """Characters changed, lines swapped or dropped: either it still is a spec, or the error says why not."""
    chance = random.Random(5)
    for _ in range(300):
        lines = SPEC.splitlines()
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(lines))
            match chance.randrange(4):
                case 0:
                    lines[at] = ""
                case 1:
                    lines[at] = lines[chance.randrange(len(lines))]
                case 2:
                    place = chance.randint(0, len(lines[at]))
                    lines[at] = lines[at][:place] + chance.choice("\t:-{}[]&*!|>'\"%@`#,?\0 0.") + lines[at][place:]
                case _:
                    lines[at] = " " * chance.randint(0, 6) + lines[at].strip()
        try:
            load(tmp_path, "\n".join(lines))
        except SpecError as error:
            assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)


def test_merged_and_repeated_parts(tmp_path: Path) -> None:
    """Anchors and merge keys are YAML; only a key written twice is refused."""
    text = SHORTEST + "keep: &limits {accuracy_drop: 0.5}\n"
    assert load(tmp_path, text).keep.accuracy_drop == 0.5
    merged = "  - &first {name: a, kind: backdoor, trigger: t.npz, target: 0}\n  - {<<: *first, name: b}\n"
    spec = load(tmp_path, f"data: d.npz\nproperties:\n{merged}")
    assert [item.name for item in spec.properties] == ["a", "b"]
    with pytest.raises(SpecError, match="line 4: the key 'data' stands twice"):
        load(tmp_path, SHORTEST + "data: e.npz\n")


def test_the_documented_example_is_valid(tmp_path: Path) -> None:
    from onnxcare import spec

    assert spec.__doc__ is not None
    example = spec.__doc__.split("\n\n")[1]
    assert set(yaml.safe_load(example)) == set(spec.Spec.model_fields)
    loaded = load(tmp_path, example)
    assert loaded.properties[0].name == "white-square"


def test_sample_specs(samples: Path) -> None:
    specs = sorted(samples.glob("*/care*.yaml"))
    assert specs
    for path in specs:
        assert all(file.is_file() for file in load_spec(path).files())


def test_nearest() -> None:
    assert nearest("tarket", ["target", "trigger"]) == " (did you mean 'target'?)"
    assert nearest("zzz", ["target"]) == ""
    assert nearest("a", []) == ""
