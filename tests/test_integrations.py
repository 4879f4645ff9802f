"""The action, the hook and the snippets for CI servers: their scripts are taken out of the files and run.

What installs onnxcare stands in steps of its own, which are left out: everything runs the onnxcare that is tested.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from helpers import Paths, dense, write_case

from onnxcare import cli
from onnxcare._version import __version__

ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
HOOKS = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "how-to" / "ci.md").read_text(encoding="utf-8")
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
# The shell of GitHub's `shell: bash`; GitLab's behaves like it.
BASH = ["bash", "--noprofile", "--norc", "-eo", "pipefail"]

# A path with a blank, and with what a careless script would run.
FOLDER = "my models $(touch injected) `touch injected`; touch injected"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for POSIX shells")


def snippet(language: str, word: str) -> str:
    """Return the only block of the page in this language that holds the word."""
    (found,) = [text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if word in text]
    return found


def environment(**values: object) -> dict[str, str]:
    """Return the environment of a CI job in which onnxcare is installed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "HOME": os.environ.get("HOME", "/"), **{name: str(value) for name, value in values.items()}}


def run(command: list[str], folder: Path, **values: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(**values), capture_output=True, text=True, timeout=120, check=False
    )


def two_cases(folder: Path) -> tuple[Paths, Paths]:
    """Return a case whose model fails, and one whose model passes."""
    found = []
    for name, backdoored in (("bad", True), ("good", False)):
        place = folder / FOLDER / name
        place.mkdir(parents=True)
        found.append(write_case(place, dense(backdoored=backdoored)))
    return found[0], found[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def cases(place: Path) -> dict[int, Paths]:
    """The cases by the exit code that `check` has for them."""
    bad, good = two_cases(place)
    return {1: bad, 0: good}


@pytest.fixture(autouse=True)
def nothing_is_injected(place: Path):
    yield
    assert not list(place.rglob("injected"))


# -- the action ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """How the action's main step ended."""

    code: int
    outputs: dict[str, str]
    log: str
    report: Path


def step(name: str) -> dict[str, Any]:
    (found,) = [item for item in ACTION["runs"]["steps"] if item["id"] == name]
    return found


def act(folder: Path, **inputs: object) -> Step:
    """Run the main step of the action with these inputs, the others at their defaults."""
    known = {f"inputs.{name}": item.get("default", "") for name, item in ACTION["inputs"].items()}
    known["steps.install.outputs.python"] = sys.executable
    given = {f"inputs.{name.replace('_', '-')}": str(value) for name, value in inputs.items()}
    assert given.keys() <= known.keys()
    known |= given
    item = step("check")
    values = {name: EXPRESSION.sub(lambda match: str(known[match[1]]), text) for name, text in item["env"].items()}
    outputs = folder / "github-output"
    outputs.write_text("")
    script = folder / "script.sh"
    script.write_text(item["run"])
    done = run([*BASH, str(script)], folder, GITHUB_OUTPUT=outputs, **values)
    pairs = dict(line.split("=", 1) for line in outputs.read_text().splitlines())
    return Step(done.returncode, pairs, done.stdout + done.stderr, folder / pairs.get("report", "none"))


@pytest.mark.parametrize("code", [0, 1])
def test_the_action_keeps_the_exit_code_and_names_the_report(place, cases, code):
    done = act(place, model=cases[code].model, spec=cases[code].spec, args="--device=cpu")
    assert done.code == code, done.log
    assert done.outputs == {"report": "onnxcare-report.sarif", "exit-code": str(code)}
    log = json.loads(done.report.read_text(encoding="utf-8"))
    assert log["runs"][0]["invocations"][0]["exitCode"] == code
    if code:
        uri = log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert uri.startswith("my%20models%20")


@pytest.mark.parametrize(("form", "ending"), [("text", "txt"), ("junit", "xml")])
def test_the_report_of_the_action_ends_like_its_format(place, cases, form, ending):
    done = act(place, model=cases[0].model, spec=cases[0].spec, format=form, args="--device=cpu")
    assert done.code == 0, done.log
    assert done.outputs["report"] == f"onnxcare-report.{ending}"
    assert done.report.is_file()
    assert "excess attack success" in done.log
    assert form in cli.FORMATS


def test_every_input_of_the_action_arrives(place, cases):
    output = f"{FOLDER}/report of mine.json"
    args = "\n--seed=9\n--device\ncpu\n\n"
    paths = cases[0]
    done = act(
        place, model=paths.model, spec=paths.spec, baseline=cases[1].model, format="json", output=output, args=args
    )
    assert done.code == 0, done.log
    assert done.outputs["report"] == output
    found = json.loads(done.report.read_text(encoding="utf-8"))
    assert (found["seed"], found["baseline"], found["model"]["path"]) == (9, str(cases[1].model), str(paths.model))


def test_the_action_says_when_nothing_could_be_checked(place, cases):
    done = act(place, model="$(touch injected).onnx", spec=cases[0].spec)
    assert done.code == 3, done.log
    assert done.outputs == {"exit-code": "3"}
    done = act(place, model="--version", spec="--help")
    assert done.code == 2, done.log
    assert "--help" in done.log


def test_an_output_of_the_action_cannot_set_another_one(place, cases):
    done = act(place, model=cases[0].model, spec=cases[0].spec, output="a\nexit-code=7.sarif", args="--device=cpu")
    assert done.code == 0, done.log
    assert done.outputs == {"report": "a exit-code=7.sarif", "exit-code": "0"}


def test_scripts_of_the_action_hold_no_expressions_and_are_bash(place):
    for item in ACTION["runs"]["steps"]:
        if "run" in item:
            assert not EXPRESSION.search(item["run"])
            assert item["shell"] == "bash"
            assert run(["bash", "-n", "-c", item["run"]], place).returncode == 0
    used = set(EXPRESSION.findall(json.dumps([ACTION["runs"], ACTION["outputs"]])))
    assert used == {f"inputs.{name}" for name in ACTION["inputs"]} | {
        "steps.python.outputs.python-path",
        "steps.install.outputs.python",
        "steps.check.outputs.report",
        "steps.check.outputs.exit-code",
    }


# -- the snippets --------------------------------------------------------------------------------


def test_the_github_workflow_uses_the_action_as_it_is():
    workflow = yaml.safe_load(snippet("yaml", "runs-on"))
    (job,) = workflow["jobs"].values()
    (used,) = [item for item in job["steps"] if "/onnxcare@" in item["uses"]]
    assert used["uses"].endswith(f"@v{__version__}")
    assert set(used["with"]) <= set(ACTION["inputs"])
    assert {name for name, item in ACTION["inputs"].items() if item.get("required")} <= set(used["with"])
    named = set(re.findall(rf"steps\.{used['id']}\.outputs\.([\w-]+)", snippet("yaml", "runs-on")))
    assert named == {"report"}
    assert named <= set(ACTION["outputs"])
    check_files([*job["strategy"]["matrix"]["model"], used["with"]["spec"]])


def test_the_page_names_every_input_and_output_of_the_action():
    table = re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
    assert re.findall(r"`([\w-]+)`", " ".join(table)) == list(ACTION["inputs"])
    assert all(f"`{name}`" in PAGE for name in ACTION["outputs"])


@pytest.mark.parametrize("code", [0, 1])
def test_the_gitlab_script_runs(place, cases, code):
    (job,) = yaml.safe_load(snippet("yaml", "before_script")).values()
    (matrix,) = job["parallel"]["matrix"]
    check_files([*matrix["MODEL"], job["variables"]["SPEC"]])
    assert f"@v{__version__}" in job["before_script"][0]
    report = place / job["artifacts"]["reports"]["junit"]
    report.unlink(missing_ok=True)
    done = run([*BASH, "-c", "\n".join(job["script"])], place, MODEL=cases[code].model, SPEC=cases[code].spec)
    assert done.returncode == code, done.stderr
    assert (ElementTree.parse(report).find(".//failure") is not None) == bool(code)


@pytest.mark.parametrize("code", [0, 1])
def test_the_jenkins_script_runs(place, cases, code):
    pipeline = snippet("groovy", "pipeline")
    install, check = re.split(r"stage\('Check'\)", pipeline)
    assert f"@v{__version__}" in install
    (script,) = re.findall(r"sh '(.*)'", check)
    (name,) = re.findall(r"junit testResults: '(.*?)'", check)
    check_files([*re.findall(r"'([^' ]+\.onnx)'", install), *re.findall(r"SPEC = '(.*)'", install)])
    report = place / name
    report.unlink(missing_ok=True)
    # Where the first stage puts onnxcare.
    installed = place / ".onnxcare"
    if not installed.exists():
        installed.symlink_to(sys.prefix)
    done = run(["sh", "-xec", script], place, MODEL=cases[code].model, SPEC=cases[code].spec)
    assert done.returncode == code, done.stderr
    assert (ElementTree.parse(report).find(".//failure") is not None) == bool(code)
    for one, other in ("()", "{}", "[]"):
        assert pipeline.count(one) == pipeline.count(other)


def check_files(named: list[str]) -> None:
    """Check that a snippet names files of this repository, and the repaired model."""
    assert "repaired.onnx" in named
    for name in named:
        assert name == "repaired.onnx" or (ROOT / name).is_file(), name


def test_the_commands_of_the_page_end_as_it_says(tmp_path):
    (tmp_path / "sample_models").symlink_to(ROOT / "sample_models")
    commands = re.findall(r"^(.*?)  # exits with (\d)$", snippet("sh", "onnxcare fix"), re.MULTILINE)
    assert [(command.split()[1], code) for command, code in commands] == [("check", "1"), ("fix", "0"), ("check", "0")]
    for command, code in commands:
        done = run([*BASH, "-c", command], tmp_path)
        assert done.returncode == int(code), done.stderr
    assert (tmp_path / "repaired.onnx").is_file()


# -- the hook ------------------------------------------------------------------------------------


def hook() -> dict[str, Any]:
    (found,) = HOOKS
    return found


def test_the_page_shows_the_hook():
    (repository,) = yaml.safe_load(snippet("yaml", "repos:"))["repos"]
    (used,) = repository["hooks"]
    assert used["id"] == hook()["id"]
    assert repository["rev"] == f"v{__version__}"
    models = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("sample_models/*/*.onnx")]
    chosen = [path for path in models if re.search(used["files"], path) and re.search(hook()["files"], path)]
    assert chosen
    assert all((ROOT / path).with_name("care.yaml").is_file() for path in chosen)
    assert not re.search(hook()["files"], "models/care.yaml")


@pytest.mark.parametrize(("names", "code"), [(["good"], 0), (["bad", "good"], 1), ([], 0)])
def test_the_hook_checks_every_model_against_the_spec_beside_it(place, cases, names, code):
    assert hook()["language"] == "python"
    models = [f"{FOLDER}/{name}/model.onnx" for name in names]
    done = run([*shlex.split(hook()["entry"]), *models], place)
    assert done.returncode == code, done.stderr
    endings = re.findall(r"^(passed|failed) in ", done.stdout, re.MULTILINE)
    assert endings == [{"good": "passed", "bad": "failed"}[name] for name in names]


def test_the_hook_fails_where_there_is_no_spec(tmp_path, cases):
    (tmp_path / "-x.onnx").write_bytes(cases[0].model.read_bytes())
    done = run([*shlex.split(hook()["entry"]), "-x.onnx"], tmp_path)
    assert done.returncode == 2
    assert "care.yaml" in done.stderr
