from __future__ import annotations

import errno
import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import hidden
import numpy as np
import onnx
import pytest
from click.testing import Result
from helpers import (
    CARRIERS,
    TRIGGER_FEATURE,
    TRIGGER_VALUE,
    Paths,
    answers,
    check_refusal,
    clean_samples,
    contents,
    dense,
    fix,
    onnxcare,
    triggered_samples,
    weights,
    write_case,
)
from workers import free_port

from onnxcare import cli, locators, repair
from onnxcare._version import __version__

HEAVY = ("numpy", "onnx", "onnxruntime", "onnx_graphsurgeon", "graphlay", "cma", "scipy", "pydantic", "yaml", "rich")


def python(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=60, **options)


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def unlabelled(paths: Paths) -> Paths:
    """Give triggered samples without labels: those of class 1 keep their answer, so the limit cannot be met."""
    np.savez(paths.folder / "bad.npz", input=triggered_samples(100, seed=9)["input"])
    paths.rewrite("trigger: trigger.npz", "triggered: bad.npz")
    return paths


# -- start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [["--help"], ["fix", "-h"], ["check", "-h"], ["locate", "--help"], ["apply", "-h"], ["diff", "-h"], ["--version"]],
)
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys; from onnxcare.cli import main\n"
        f"try: main({args})\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = python("-c", code)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    assert "Usage: " in done.stdout or __version__ in done.stdout


def test_the_rest_imports_nothing_that_is_slow_and_not_needed() -> None:
    """scipy.stats alone takes longer to load than onnx and onnxruntime together."""
    done = python("-c", "import sys, onnxcare.api; print('scipy.stats' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_methods_and_locators_are_those_of_the_registries() -> None:
    assert tuple(repair.METHODS) == cli.METHODS
    assert ("auto", *locators.LOCATORS) == cli.LOCATORS
    choices = {(name, option.name): tuple(option.type.choices) for name, command in cli.main.commands.items()
               for option in command.params if option.name in ("method", "locator")}  # fmt: skip
    assert choices == {
        ("fix", "method"): cli.METHODS,
        ("fix", "locator"): cli.LOCATORS,
        ("locate", "method"): cli.LOCATORS,
    }


def test_help_names_every_command_and_option() -> None:
    assert {"fix", "apply", "diff", "check", "locate", "inspect", "demo"} <= set(onnxcare("--help").stdout.split())
    for option in ("--output", "--in-place", "--revert"):
        assert option in onnxcare("apply", "--help").stdout
    for option in ("--data", "--spec", "--format", "--seed", "--device", "--memory"):
        assert option in onnxcare("diff", "--help").stdout
    for option in ("--spec", "--output", "--in-place", "--method", "--best-effort", "--patch", "--json"):
        assert option in onnxcare("fix", "--help").stdout
    for option in (
        "--seed",
        "--memory",
        "--locator",
        "--layers",
        "--max-changed",
        "--scheduler",
        "--workers",
        *cli.METHODS,
        *cli.LOCATORS,
    ):
        assert option in onnxcare("fix", "--help").stdout
    for option in ("--spec", "--samples", "--values", "--method", "--top", "--confidence", "--exact", *cli.LOCATORS):
        assert option in onnxcare("locate", "--help").stdout
    for option in ("--format", "--picture", *cli.INSPECT_FORMATS):
        assert option in onnxcare("inspect", "--help").stdout
    for option in ("--scheduler", "--workers"):
        assert option in onnxcare("locate", "--help").stdout
    for option in ("--spec", "--output", "--format", "--baseline", "--seed", "--device", "--memory", *cli.FORMATS):
        assert option in onnxcare("check", "--help").stdout


def test_no_arguments_show_the_help() -> None:
    result = onnxcare()
    assert result.exit_code == 2
    assert "Commands:" in result.output


# -- fix -----------------------------------------------------------------------------------------


def test_fix(tiny: Paths) -> None:
    before = contents(tiny.folder)
    result = fix(tiny)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "repaired" in result.stdout.splitlines()[-1]
    assert str(tiny.out) in result.stdout
    assert "100.00 % (448/448)" in result.stdout and "0.00 % (0/448)" in result.stdout
    after = contents(tiny.folder)
    assert after.pop("repaired.onnx") is not None
    assert after == before
    # What was written answers triggered samples by their true class and clean ones as before.
    bad, clean = triggered_samples(400, seed=21), clean_samples(400, seed=22)
    assert (answers(tiny.model, bad["input"]) == 1).all()
    assert (answers(tiny.out, bad["input"]) == bad["y"]).mean() > 0.98
    assert (answers(tiny.out, clean["input"]) == clean["y"]).mean() > 0.98


def test_fix_by_multipliers(tiny: Paths) -> None:
    result = fix(tiny, "--method", "care")
    assert result.exit_code == 0
    assert "method care" in result.stdout
    bad = triggered_samples(400, seed=21)
    assert (answers(tiny.out, bad["input"]) == bad["y"]).mean() > 0.98
    assert metadata(tiny.out)["onnxcare.method"] == "care"


@pytest.mark.parametrize("method", ["ai-lancet-flip", "ai-lancet-finetune"])
def test_fix_by_voted_weights(tiny: Paths, method: str) -> None:
    result = fix(tiny, "--method", method, "--locator", "differential")
    assert result.exit_code == 0 and result.stderr == ""
    assert f"method {method}" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("repaired in")
    bad, clean = triggered_samples(400, seed=21), clean_samples(400, seed=22)
    assert (answers(tiny.out, bad["input"]) == bad["y"]).mean() > 0.98
    assert (answers(tiny.out, clean["input"]) == clean["y"]).mean() > 0.98
    assert metadata(tiny.out)["onnxcare.method"] == method


def test_the_report_of_voted_weights_says_how_they_were_found(tiny: Paths) -> None:
    found = json.loads(fix(tiny, "--method", "ai-lancet-finetune", "--json", "-").stdout)
    assert found["method"] == "ai-lancet-finetune" and found["status"] == "repaired"
    assert [item["layer"] for item in found["details"]["votes"]] == ["first", "second"]
    assert all(item["located"] == item["pairs"] > 0 for item in found["details"]["votes"])
    assert found["details"]["scan"]


@pytest.mark.parametrize("locator", locators.LOCATORS)
def test_a_locator_needs_a_method_that_goes_by_one(tiny: Paths, locator: str) -> None:
    before = contents(tiny.folder)
    for args in ([], ["--method", "auto"]):
        result = fix(tiny, *args, "--locator", locator)
        check_refusal(result, 2, f"--locator {locator}", "--method auto", "ai-lancet-finetune")
        assert len(result.stderr.splitlines()) == 1
    assert contents(tiny.folder) == before


def test_json_on_standard_output(tiny: Paths) -> None:
    result = fix(tiny, "--json", "-", device="auto")
    found = json.loads(result.stdout)
    assert result.stderr.startswith("onnxcare: device ") and len(result.stderr.splitlines()) == 1
    assert found["status"] == "repaired" and found["exit_code"] == result.exit_code == 0
    assert found["output"] == str(tiny.out)
    assert found["output_sha256"] == hashlib.sha256(tiny.out.read_bytes()).hexdigest()
    assert found["run"]["sha256"] == hashlib.sha256(tiny.model.read_bytes()).hexdigest()
    assert found["run"]["seed"] == 1
    finding = found["verdict"]["properties"][0]
    assert finding["name"] == "seventh" and finding["status"] == "pass" and finding["passed"]
    success, *_ = finding["measures"]
    assert success["name"] == "attack success rate" and success["before"]["value"] == 1
    assert success["value"] == success["after"]["value"] == 0
    (excess,) = [item for item in finding["measures"] if item["name"] == "excess attack success"]
    assert (excess["value_before"], excess["limit"], excess["status"]) == (1, 0.01, "pass")
    assert {change["name"] for change in found["patch"]} <= set(weights())
    labels = [item["label"] for item in found["candidates"]]
    assert found["front"] and all(item["label"] in labels for item in found["front"])
    assert found["chosen"]["label"] in labels and found["chosen"]["edit"]["values"] > 0
    assert found["notes"] == []
    assert metadata(tiny.out)["onnxcare.parent_sha256"] == found["run"]["sha256"]


def test_json_in_a_file(tiny: Paths) -> None:
    report = tiny.folder / "report.json"
    report.write_text("an older one")
    result = fix(tiny, "--json", report)
    assert result.exit_code == 0
    assert "repaired" in result.stdout.splitlines()[-1]
    assert json.loads(report.read_text())["output"] == str(tiny.out)
    assert sorted(path.name for path in tiny.folder.iterdir() if path.name.startswith(".")) == []


def test_not_repaired(tiny: Paths) -> None:
    unlabelled(tiny)
    before = contents(tiny.folder)
    result = fix(tiny)
    assert result.exit_code == 1
    last = result.stdout.splitlines()[-1]
    assert last.startswith("not repaired: improved, but not within the limits") and last.endswith("nothing was written")
    assert "note: seventh: the best change leaves " in result.stdout.replace("\n", " ")
    assert contents(tiny.folder) == before


def test_nothing_better_than_no_change(tiny: Paths) -> None:
    before = contents(tiny.folder)
    result = fix(tiny, "--method", "care", "--max-changed", "1", "--best-effort")
    assert result.exit_code == 1 and result.stderr == ""
    last = result.stdout.splitlines()[-1]
    assert last.startswith("not repaired: nothing that was tried is better than no change")
    assert last.endswith("nothing was written")
    assert "note: No change of at most 1 values was found; the smallest takes " in result.stdout
    assert contents(tiny.folder) == before


def differing(paths: Paths) -> dict[str, int]:
    """Return how many values of each tensor the written file has changed."""
    before, after = (
        {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
        for path in (paths.model, paths.out)
    )
    counts = {name: int((before[name] != after[name]).sum()) for name in before}
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("layer", ["first", "second", "f*", "sec?nd"])
def test_only_some_layers_change(tiny: Paths, layer: str) -> None:
    assert fix(tiny, "--layers", layer).exit_code == 0
    changed = {name.partition(".")[0] for name in differing(tiny)}
    assert changed == {"first" if layer.startswith("f") else "second"}
    bad = triggered_samples(400, seed=21)
    assert (answers(tiny.out, bad["input"]) == bad["y"]).mean() > 0.98


@pytest.mark.parametrize("most", [1, 7, 40])
def test_no_more_values_change_than_are_allowed(tiny: Paths, most: int) -> None:
    result = fix(tiny, "--max-changed", most, "--layers", "first", "--layers", "second", "--json", "-")
    found = json.loads(result.stdout)
    changed = differing(tiny)
    assert found["status"] == "repaired" and 1 <= sum(changed.values()) <= most
    assert {item["name"]: item["changed"] for item in found["patch"]} == changed
    edit = found["chosen"]["edit"]
    assert (edit["values"], set(edit["tensors"])) == (sum(changed.values()), set(changed))
    assert all(item["edit"] is None or item["edit"]["values"] <= most for item in found["candidates"])
    bad = triggered_samples(400, seed=21)
    assert (answers(tiny.out, bad["input"]) == bad["y"]).mean() > 0.98


def test_a_bad_repair_is_not_written(tiny: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxcare.repair import auto

    method = auto.repair

    def harmful(case):
        found = method(case)
        return type(found)(found.method, {p: 0 * case.read(p) for p in found.values}, found.chosen, [], {})

    monkeypatch.setattr(auto, "repair", harmful)
    before = contents(tiny.folder)
    result = fix(tiny)
    assert result.exit_code == 1
    assert "fail" in result.stdout
    assert contents(tiny.folder) == before


@pytest.mark.parametrize("where", [["-o", "repaired.onnx"], ["--in-place"]])
def test_a_model_that_changes_during_a_repair_is_left_alone(
    tiny: Paths, monkeypatch: pytest.MonkeyPatch, where: list[str]
) -> None:
    from onnxcare.repair import auto

    method = auto.repair

    def meanwhile(case):
        tiny.edit_model(lambda proto: proto.metadata_props.add(key="edited", value="by somebody else"))
        edited.update(contents(tiny.folder))
        return method(case)

    monkeypatch.setattr(auto, "repair", meanwhile)
    monkeypatch.chdir(tiny.folder)
    edited: dict[str, bytes | None] = {}
    result = onnxcare("fix", "model.onnx", "--spec", "care.yaml", "--device", "cpu", *where)
    check_refusal(result, 3, "model.onnx: the file has changed since it was read; run again")
    assert edited and contents(tiny.folder) == edited


def test_best_effort_writes_what_is_not_good(tiny: Paths) -> None:
    unlabelled(tiny)
    result = fix(tiny, "--best-effort", "--json", "-")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert found["status"] == "improved" and found["output"] == str(tiny.out)
    assert found["exit_code"] == 1
    assert metadata(tiny.out)["onnxcare.verdict"] == "improved"
    assert any("the best change leaves" in note for note in found["notes"])


def test_nothing_to_repair(tmp_path: Path) -> None:
    paths = write_case(tmp_path, dense(backdoored=False))
    before = contents(tmp_path)
    result = fix(paths)
    assert result.exit_code == 0
    assert "nothing to repair" in result.stdout.splitlines()[-1]
    assert contents(tmp_path) == before


def test_repaired_once_there_is_nothing_left_to_repair(tiny: Paths) -> None:
    assert fix(tiny).exit_code == 0
    again = onnxcare("fix", tiny.out, "--spec", tiny.spec, "--in-place", "--device", "cpu")
    assert again.exit_code == 0
    assert "nothing to repair" in again.stdout


def test_in_place(tiny: Paths) -> None:
    original = tiny.model.read_bytes()
    result = onnxcare("fix", tiny.model, "--spec", tiny.spec, "--in-place", "--device", "cpu")
    assert result.exit_code == 0
    assert tiny.model.read_bytes() != original
    assert metadata(tiny.model)["onnxcare.parent_sha256"] == hashlib.sha256(original).hexdigest()
    bad = triggered_samples(200, seed=23)
    assert (answers(tiny.model, bad["input"]) == bad["y"]).mean() > 0.98


def test_an_older_output_is_written_over(tiny: Paths) -> None:
    tiny.out.write_bytes(b"an older one")
    assert fix(tiny).exit_code == 0
    assert metadata(tiny.out)["onnxcare.verdict"] == "repaired"


def test_seed(tiny: Paths) -> None:
    written = {}
    for seed in ([], ["--seed", 1], ["--seed", 2**31 - 1]):
        result = fix(tiny, "--json", "-", *seed)
        assert result.exit_code == 0
        run = json.loads(result.stdout)["run"]
        assert run["seed"] == (seed[1] if seed else 1)
        assert metadata(tiny.out)["onnxcare.seed"] == str(run["seed"])
        written[run["seed"], bool(seed)] = tiny.out.read_bytes()
    assert written[1, False] == written[1, True] != written[2**31 - 1, True]


@pytest.mark.parametrize("size", ["100K", "2 GiB", "1.5g"])
def test_memory(tiny: Paths, size: str) -> None:
    assert fix(tiny, "--memory", size).exit_code == 0


def test_data_may_be_called_x_and_be_without_holdout(tiny: Paths) -> None:
    samples = clean_samples(600, seed=1)
    np.savez(tiny.data, x=samples["input"], y=samples["y"].astype(np.uint8))
    tiny.rewrite("holdout: holdout.npz\n", "")
    result = fix(tiny, "--json", "-")
    assert result.exit_code == 0
    assert sum(json.loads(result.stdout)["run"]["samples"].values()) == 600


def test_samples_held_out_twice_are_left_out(tiny: Paths) -> None:
    mixed = {name: values[:500] for name, values in clean_samples(600, seed=1).items()}
    for name, values in clean_samples(300, seed=2).items():
        mixed[name] = np.concatenate([mixed[name], values])
    np.savez(tiny.holdout, **mixed)
    result = fix(tiny, "--json", "-")
    run = json.loads(result.stdout)["run"]
    assert run["samples"]["holdout"] == 300
    assert "500 samples" in run["notes"][0]


def test_trigger_with_a_batch_axis_and_in_other_types(tiny: Paths) -> None:
    mask = np.zeros((1, 8), bool)
    mask[0, TRIGGER_FEATURE] = True
    tiny.edit(tiny.trigger, mask=mask, pattern=TRIGGER_VALUE * mask.astype(np.float64))
    assert fix(tiny).exit_code == 0


def test_names_with_spaces_brackets_and_other_letters(tmp_path: Path) -> None:
    folder = tmp_path / "modèles [red] à réparer"
    folder.mkdir()
    paths = write_case(folder)
    paths.rewrite("name: seventh", "name: 'la [bold]7e[/bold]'")
    result = fix(paths)
    assert result.exit_code == 0
    assert "la [bold]7e[/bold]" in result.stdout
    assert str(paths.out) in result.stdout.replace("\n", "")
    shown = onnxcare("inspect", paths.model)
    assert shown.exit_code == 0 and str(paths.model) in shown.stdout.replace("\n", "")


def test_relative_paths(tiny: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.folder)
    result = onnxcare("fix", "model.onnx", "--spec", "care.yaml", "-o", "out.onnx", "--json", "r.json")
    assert result.exit_code == 0
    assert json.loads(Path("r.json").read_text())["output"] == "out.onnx"


# -- check ---------------------------------------------------------------------------------------


def check(paths: Paths, *args: object, model: Path | None = None) -> Result:
    return onnxcare("check", model or paths.model, "--spec", paths.spec, "--device", "cpu", *args)


@pytest.fixture
def harmless(tiny: Paths) -> Path:
    """The tiny model without its backdoor, beside the other one."""
    path = tiny.folder / "harmless.onnx"
    path.write_bytes(dense(backdoored=False).SerializeToString())
    return path


def test_check_tells_a_good_model_from_a_bad_one(tiny: Paths, harmless: Path) -> None:
    before = contents(tiny.folder)
    bad, good = check(tiny), check(tiny, model=harmless)
    assert (bad.exit_code, good.exit_code) == (1, 0)
    assert bad.stderr == good.stderr == ""
    assert bad.stdout.splitlines()[-1].startswith("failed in ")
    assert good.stdout.splitlines()[-1].startswith("passed in ")
    assert "100.00 % (448/448)" in bad.stdout and "│ fail" in bad.stdout
    assert "0.00 % (0/448)" in good.stdout and "│ fail" not in good.stdout and "│ pass" in good.stdout
    assert "before" not in good.stdout and "drop" not in good.stdout
    assert contents(tiny.folder) == before


def test_check_against_a_baseline(tiny: Paths, harmless: Path) -> None:
    result = check(tiny, "--baseline", harmless)
    assert result.exit_code == 1
    assert f"against {harmless}" in result.stdout.replace("\n", "")
    (worse,) = [line for line in result.stdout.splitlines() if line.startswith("worse than the baseline: ")]
    assert "attack success rate, 0.00 % (0/448) -> 100.00 % (448/448)" in worse
    assert "accuracy drop" in result.stdout
    better = check(tiny, "--baseline", tiny.model, model=harmless)
    assert better.exit_code == 0
    assert "worse than the baseline" not in better.stdout


def test_check_against_another_kind_of_model(tiny: Paths) -> None:
    other = dense()
    other.graph.output[0].name = other.graph.node[-1].output[0] = "logits"
    path = tiny.folder / "other.onnx"
    path.write_bytes(other.SerializeToString())
    words = ("has outputs scores", "other.onnx has logits", "cannot be compared")
    check_refusal(check(tiny, "--baseline", path), 3, tiny.model, *words)
    check_refusal(check(tiny, "--baseline", tiny.folder / "none.onnx"), 3, "none.onnx: no such file")


def test_check_asks_intervals_where_the_spec_says_so(tiny: Paths, harmless: Path) -> None:
    tiny.rewrite("seed: 1", "seed: 1\nconfidence: 0.99")
    result = check(tiny, model=harmless)
    assert result.exit_code == 1
    assert "undecided, which is no pass" in result.stdout.splitlines()[-1]
    assert "undecided: seventh: excess attack success: too few samples" in result.stdout
    tiny.rewrite("max_rate: 0.01", "max_rate: 0.1")
    assert check(tiny, model=harmless).exit_code == 0


@pytest.mark.parametrize("form", cli.FORMATS)
def test_check_writes_into_a_file_what_it_would_print_and_tells_it_in_words(tiny: Paths, form: str) -> None:
    before = contents(tiny.folder)
    printed, plain = check(tiny, "--format", form), check(tiny)
    report = tiny.folder / "report"
    written = check(tiny, "--format", form, "-o", report)
    assert printed.exit_code == written.exit_code == 1
    assert printed.stderr == written.stderr == ""
    digits = str.maketrans("", "", "0123456789.")  # it takes longer or shorter
    assert report.read_text().translate(digits) == printed.stdout.translate(digits)
    assert written.stdout.translate(digits) == plain.stdout.translate(digits)
    assert {name: held for name, held in contents(tiny.folder).items() if name != "report"} == before


@pytest.mark.parametrize("name", ["model.onnx", "care.yaml", "repair.npz", "holdout.npz", "trigger.npz", "base.onnx"])
def test_check_writes_over_nothing_that_it_reads(tiny: Paths, name: str) -> None:
    (tiny.folder / "base.onnx").write_bytes(tiny.model.read_bytes())
    before = contents(tiny.folder)
    result = check(tiny, "--baseline", tiny.folder / "base.onnx", "-o", tiny.folder / name)
    check_refusal(result, 2, name)
    assert contents(tiny.folder) == before


def test_check_does_not_run_a_file_that_readers_disagree_about(tiny: Paths) -> None:
    proto = onnx.load(tiny.model)
    proto.graph.initializer[0].float_data.extend(128 * [0.0])
    tiny.model.write_bytes(proto.SerializeToString())
    result = check(tiny)
    assert result.exit_code == 1 and result.stderr == ""
    assert "two-value-fields" in result.stdout and "'first.weight'" in result.stdout
    assert "not safe to run, so nothing was measured" in result.stdout.replace("\n", " ")
    found = json.loads(check(tiny, "--format", "json").stdout)
    assert (found["status"], found["findings"]) == ("fail", [])


def test_check_in_place_of_the_judge(tiny: Paths) -> None:
    """The measures of a repair are those that its file has when it is checked."""
    report = tiny.folder / "fix.json"
    assert fix(tiny, "--json", report).exit_code == 0
    fixed = json.loads(report.read_text())["verdict"]
    checked = json.loads(check(tiny, "--format", "json", "--baseline", tiny.model, model=tiny.out).stdout)
    by_name = {item["name"]: item for finding in checked["findings"] for item in finding["measures"]}
    measures = [item for finding in fixed["findings"] for item in finding["measures"]]
    assert len(measures) == len(by_name) > 10
    for item in measures:
        same = by_name[item["name"]]
        assert [same[key] for key in ("value", "low", "high", "limit", "status")] == [
            item[key] for key in ("value", "low", "high", "limit", "status")
        ]


# -- locate and inspect --------------------------------------------------------------------------


def test_locate(tiny: Paths) -> None:
    before = contents(tiny.folder)
    result = onnxcare("locate", tiny.model, "--spec", tiny.spec, "--device", "cpu", "--json", "--seed", 5)
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and result.stderr == ""
    scores = [unit["score"] for unit in found["units"]]
    assert scores == sorted(scores, reverse=True)
    # Unit 2 speaks for the target class itself and moves the answer most; three others carry the backdoor.
    assert found["method"] == "interchange effect"
    assert {(unit["site"], unit["unit"]) for unit in found["units"][:3]} == {("hidden", unit) for unit in CARRIERS}
    assert found["sites"][0]["locator"] == "interchange effect"
    assert found["sites"][0]["site"] == "hidden" and found["sites"][0]["units"] == 16
    assert set(CARRIERS) <= set(found["sites"][0]["chosen"])
    assert found["run"]["seed"] == 5
    assert contents(tiny.folder) == before


def test_locate_as_text(tiny: Paths) -> None:
    result = onnxcare("locate", tiny.model, "--spec", tiny.spec, "--device", "cpu", "--samples", 16, "--values", 2)
    assert result.exit_code == 0 and result.stderr == ""
    assert "hidden" in result.stdout and "12" in result.stdout


def test_locate_by_differences_tells_of_layers_too(tiny: Paths) -> None:
    args = ("locate", tiny.model, "--spec", tiny.spec, "--device", "cpu", "--samples", 40, "--method", "differential")
    shown, result = onnxcare(*args), onnxcare(*args, "--json")
    assert shown.exit_code == result.exit_code == 0 and shown.stderr == result.stderr == ""
    found = json.loads(result.stdout)
    assert found["method"] == "differential votes"
    assert {unit["unit"] for unit in found["units"][:3]} == set(CARRIERS)
    layers = {layer["layer"]: layer for layer in found["layers"]}
    assert {name: layer["weights"] for name, layer in layers.items()} == {"first": 128, "second": 64}
    for layer in layers.values():
        assert layer["located"] == layer["pairs"] == 40 and layer["gradient"]
        assert 3 <= layer["voted"] < 20 and 0 < layer["median_share"] < 0.1
    assert "Weights that had to go for the right answer, by layer" in shown.stdout
    for name in layers:
        (line,) = [line for line in shown.stdout.splitlines() if line.startswith(f"│ {name}")]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[3] == "40 of 40" and cells[5] == "gradient"


@pytest.mark.parametrize(
    ("method", "name"), [("causal", "average causal effect"), ("interchange", "interchange effect")]
)
def test_locate_by_one_locator(tiny: Paths, method: str, name: str) -> None:
    args = ("locate", tiny.model, "--spec", tiny.spec, "--device", "cpu", "--samples", 16, "--method", method)
    found = json.loads(onnxcare(*args, "--json").stdout)
    assert found["method"] == name and {site["locator"] for site in found["sites"]} == {name}
    assert found["layers"] == []
    assert "by layer" not in onnxcare(*args).stdout


def located(paths: Paths, *args: object) -> dict:
    """Return what `onnxcare locate` prints as JSON."""
    result = onnxcare("locate", paths.model, "--spec", paths.spec, "--device", "cpu", "--json", *args)
    assert result.exit_code == 0 and result.stderr == "", result.output
    return json.loads(result.stdout)


def test_units_of_a_small_model_do_not_race(tiny: Paths) -> None:
    plain, exact = located(tiny), located(tiny, "--top", 3, "--exact")
    assert plain == exact
    assert exact["race"] is None
    assert len(exact["units"]) > 3
    assert {unit["cases"] for unit in exact["units"]} == {128}
    assert {unit["cases"] for unit in located(tiny, "--exact", "--samples", 20)["units"]} == {20}


def test_units_race_where_measuring_all_of_them_takes_long(tiny: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcare.locators.select._NO_RACE", 0)
    args = ("--top", 1, "--confidence", 0.9, "--method", "interchange")
    found = located(tiny, *args)
    # The three units that carry the backdoor do the same, so they go on until all cases are in.
    rounds = [{"units": 16, "cases": 8}, *({"units": 3, "cases": cases} for cases in (16, 32, 64, 128))]
    assert found["race"] == {"top": 1, "confidence": 0.9, "screened": False, "rounds": rounds}
    cases = {(unit["site"], unit["unit"]): unit["cases"] for unit in found["units"]}
    assert cases == {("hidden", unit): 128 if unit in CARRIERS else 8 for unit in range(16)}
    shown = onnxcare("locate", tiny.model, "--spec", tiny.spec, "--device", "cpu", *args)
    assert "Raced for the top 1 at 0.9 confidence (units on cases: 16 on 8, 3 on 16, " in shown.stdout
    assert located(tiny, *args, "--exact")["race"] is None


@pytest.mark.parametrize(
    ("option", "value"),
    [("--confidence", "1.5"), ("--confidence", "1"), ("--confidence", "0"), ("--top", "0"), ("--workers", "0")],
)
def test_options_of_locate_out_of_range(tiny: Paths, option: str, value: str) -> None:
    result = onnxcare("locate", tiny.model, "--spec", tiny.spec, option, value)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"Error: Invalid value for '{option}': {value}")


def test_inspect(tiny: Paths) -> None:
    result = onnxcare("inspect", tiny.model, "--format", "json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and result.stderr == ""
    model = found["model"]
    assert model["opsets"] == {"ai.onnx": 17} and model["ir_version"] == 8 and model["nodes"] == 3
    assert [layer["name"] for layer in found["layers"]] == ["first", "second"]
    assert [layer["methods"]["auto"] for layer in found["layers"]] == [None, None]
    assert found["inputs"] == [{"name": "input", "type": "float32", "shape": ["batch", 8]}]
    assert model["sha256"] == hashlib.sha256(tiny.model.read_bytes()).hexdigest()
    assert model["bytes"] == tiny.model.stat().st_size


def test_inspect_draws_the_graph_beside_what_it_prints(tiny: Paths) -> None:
    picture = tiny.folder / "graph.svg"
    result = onnxcare("inspect", tiny.model, "--picture", picture)
    assert result.exit_code == 0 and result.stdout == onnxcare("inspect", tiny.model).stdout
    assert ElementTree.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize(
    ("name", "words"), [("model.onnx", ["is the model itself"]), ("no/graph.svg", ["folder", "does not exist"])]
)
def test_inspect_draws_over_no_model_and_into_no_folder_that_is_missing(tiny: Paths, name: str, words: list) -> None:
    before = contents(tiny.folder)
    check_refusal(onnxcare("inspect", tiny.model, "--picture", tiny.folder / name), 2, *words)
    assert contents(tiny.folder) == before


def test_inspect_draws_over_no_external_data(tiny: Paths) -> None:
    proto = onnx.load(tiny.model)
    onnx.save(proto, tiny.model, save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = contents(tiny.folder)
    check_refusal(onnxcare("inspect", tiny.model, "--picture", tiny.folder / "weights.bin"), 2, "input of this run")
    assert contents(tiny.folder) == before


def test_inspect_as_text(tiny: Paths) -> None:
    result = onnxcare("inspect", tiny.model)
    assert result.exit_code == 0 and result.stderr == ""
    for word in ("input input: float32 [batch, 8]", "first", "second", "hidden", "16 neurons"):
        assert word in result.stdout


def test_fix_without_a_trigger_says_where_the_restored_one_lies(tmp_path: Path) -> None:
    paths = hidden.write(tmp_path, shape=hidden.GREY)
    result = fix(paths)
    assert result.exit_code == 0 and result.stderr == "", result.output
    shown = "".join(result.stdout.split())  # long paths are folded
    file = tmp_path / f"repaired.trigger-{hidden.TARGET}-1.npz"
    line = f"restored patch of class {hidden.TARGET}: {file}, shown in {file.with_suffix('.png')}"
    assert line.replace(" ", "") in shown
    assert "repaired in" in result.stdout.splitlines()[-1]


# -- workers -------------------------------------------------------------------------------------


@pytest.fixture(params=["fix", "locate"])
def command(request: pytest.FixtureRequest, tiny: Paths) -> list[object]:
    """A command that can be shared with workers."""
    output = ["-o", tiny.out] if request.param == "fix" else []
    return [request.param, tiny.model, "--spec", tiny.spec, "--device", "cpu", *output]


def test_a_scheduler_and_workers_of_ones_own_are_one_too_many(tiny: Paths, command: list[object]) -> None:
    before = contents(tiny.folder)
    result = onnxcare(*command, "--scheduler", "tcp://127.0.0.1:8786", "--workers", 2)
    check_refusal(result, 2, "give either --scheduler or --workers")
    assert len(result.stderr.splitlines()) == 1
    assert contents(tiny.folder) == before


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:8786", "http://127.0.0.1:8786"])
def test_the_address_of_a_scheduler_has_a_form(tiny: Paths, command: list[object], address: str) -> None:
    before = contents(tiny.folder)
    check_refusal(onnxcare(*command, "--scheduler", address), 2, f"{address}: ", "such as tcp://host:8786")
    assert contents(tiny.folder) == before


def test_a_scheduler_that_does_not_answer_is_named(
    tiny: Paths, command: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxcare.cluster._TIMEOUT", 1)
    before = contents(tiny.folder)
    address = f"tcp://127.0.0.1:{free_port()}"
    result = onnxcare(*command, "--scheduler", address)
    check_refusal(result, 2, f"{address}: no dask scheduler answers there")
    assert len(result.stderr.splitlines()) == 1
    assert contents(tiny.folder) == before


@pytest.mark.parametrize("option", ["--scheduler", "--workers"])
def test_a_check_is_not_shared(tiny: Paths, option: str) -> None:
    result = check(tiny, option, "2")
    assert result.exit_code == 2 and "No such option" in result.stderr


# -- defects, interrupts and the world outside ---------------------------------------------------


def boom(*args: object, **kwargs: object) -> None:
    raise ZeroDivisionError("of [x] by zero")


def interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_internal_error(tiny: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcare.repair.auto.repair", boom)
    before = contents(tiny.folder)
    result = fix(tiny)
    assert result.exit_code == 4 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("onnxcare: internal error: ZeroDivisionError: of [x] by zero")
    assert "report" in line and "ONNXCARE_TRACEBACK" in line
    assert contents(tiny.folder) == before


def test_traceback_on_demand(tiny: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXCARE_TRACEBACK", "1")
    monkeypatch.setattr("onnxcare.repair.auto.repair", boom)
    result = fix(tiny)
    assert result.exit_code == 4
    assert "Traceback" in result.stderr and "in boom" in result.stderr


@pytest.mark.parametrize("where", ["repair.auto.repair", "api.judge", "api.publish", "runtime.Session.run_rows"])
def test_interrupt(tiny: Paths, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    before = contents(tiny.folder)
    monkeypatch.setattr(f"onnxcare.{where}", interrupt)
    result = fix(tiny)
    assert result.exit_code == 130 and result.stdout == ""
    assert result.stderr.split("\n")[-2:] == ["onnxcare: interrupted; no half-written file is left", ""]
    assert not result.stderr.split("\n")[:-2] or result.stderr.split("\n")[:-2] == [""]
    assert contents(tiny.folder) == before


def test_interrupt_in_place_leaves_the_model(tiny: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(tiny.folder)
    monkeypatch.setattr("onnxcare.api.publish", interrupt)
    result = onnxcare("fix", tiny.model, "--spec", tiny.spec, "--in-place", "--device", "cpu")
    assert result.exit_code == 130
    assert contents(tiny.folder) == before


def test_interrupt_by_a_signal(samples: Path, tmp_path: Path) -> None:
    sample = samples / "mnist-square-pytorch"
    args = ["-m", "onnxcare", "fix", sample / "model.onnx", "--spec", sample / "care.yaml"]
    args += ["-o", tmp_path / "repaired.onnx", "--method", "care"]
    with subprocess.Popen(
        [sys.executable, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        assert process.stderr.readline().startswith("onnxcare: device ")
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.split() == "onnxcare: interrupted; no half-written file is left".split()
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_exit_code_of_the_module(tiny: Paths) -> None:
    unlabelled(tiny)
    args = ("fix", tiny.model, "--spec", tiny.spec, "-o", tiny.out, "--device", "cpu")
    done = python("-m", "onnxcare", *args)
    assert done.returncode == 1
    assert "not repaired" in done.stdout and done.stderr == ""


def test_reader_goes_away(tiny: Paths) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "onnxcare", "inspect", "--format", "json", str(tiny.model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert err == ""


def test_full_disk_behind_standard_output(tiny: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("onnxcare.report.inspection.show_inspection", full)
    result = onnxcare("inspect", tiny.model)
    check_refusal(result, 2, "No space left on device")


def test_output_with_a_name_too_long(tiny: Paths) -> None:
    before = contents(tiny.folder)
    name = 300 * "a"
    result = onnxcare("fix", tiny.model, "--spec", tiny.spec, "-o", tiny.folder / name, "--device", "cpu")
    check_refusal(result, 2, name, "too long")
    assert contents(tiny.folder) == before


def test_demo_explains_a_bad_output(tmp_path: Path) -> None:
    result = onnxcare("demo", "-o", tmp_path / "nowhere" / "x.onnx", "--device", "cpu")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("$ onnxcare fix ")
    assert "nowhere does not exist" in result.stderr


# -- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("works", "device"), [(False, "cpu"), (True, "cuda")])
def test_auto_says_what_it_took(tiny: Paths, monkeypatch: pytest.MonkeyPatch, works: bool, device: str) -> None:
    monkeypatch.setattr("onnxcare.runtime._cuda_works", lambda: works)
    monkeypatch.setattr("onnxcare.repair.auto.repair", interrupt)
    assert f"onnxcare: device {device} (" in fix(tiny, device="auto").stderr


@pytest.mark.gpu
def test_gpu(tiny: Paths) -> None:
    result = fix(tiny, "--json", "-", device="cuda")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["run"]["device"] == "cuda"
    bad = triggered_samples(400, seed=21)
    assert (answers(tiny.out, bad["input"]) == bad["y"]).mean() > 0.98
