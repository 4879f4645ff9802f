from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml
from helpers import SPEC

from onnxcare.errors import SpecError, UsageError, nearest
from onnxcare.spec import BackdoorSpec, Keep, load_spec

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
