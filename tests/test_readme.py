"""What the README shows is true of the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import onnxcare
from onnxcare import cli
from onnxcare.spec import load_spec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    return [block.replace("\n    ", "\n").strip() for block in re.findall(r"(?:\n    .*|\n(?=\n    ))+", text)]


def test_the_spec_is_valid(tmp_path):
    (example,) = [block for block in blocks(README) if block.startswith("data:")]
    (tmp_path / "care.yaml").write_text(example, encoding="utf-8")
    spec = load_spec(tmp_path / "care.yaml")
    assert spec.properties[0].name == "white-square"
    assert spec.properties[0].trigger == tmp_path / "trigger.npz"
    assert spec.keep.recall_drop == 0.05


@pytest.mark.parametrize("command", ["fix", "apply", "diff", "check", "locate", "inspect", "demo"])
def test_every_command_and_option_it_names_exists(command):
    shown = CliRunner().invoke(cli.main.commands[command], ["--help"]).output
    assert f"onnxcare {command}" in README
    if command == "fix":
        options = "--method --seed --device --memory --patch --json --in-place --best-effort --output --spec".split()
        assert all(option in shown for option in options)
        assert all(option in README for option in options if option != "--output")
    if command == "apply":
        assert all(option in shown and option in README for option in ("--revert", "--in-place"))
    if command == "diff":
        assert all(option in shown and option in README for option in ("--data", "--spec"))
    if command == "check":
        options = "--spec --format --output --baseline --seed --device --memory".split()
        assert all(option in shown for option in options)
        assert all(option in README for option in ("--format", "--baseline"))
        assert all(form in README.lower() for form in cli.FORMATS)


def commands(text: str) -> list[str]:
    """Return the command lines that a text shows, in blocks and in the middle of sentences."""
    lines = [line.removeprefix("$ ") for block in blocks(text) for line in block.splitlines()]
    return [line for line in [*lines, *re.findall(r"`([^`]+)`", text)] if line.startswith("onnxcare ")]


def test_the_command_lines_it_shows_can_be_given():
    shown = [line for line in commands(README) if "MODEL" not in line]
    assert {line.split()[1] for line in shown} >= {"fix", "check"}
    for line in shown:
        _, name, *rest = shlex.split(line.split(" | ")[0], comments=True)
        command = cli.main.commands[name]
        # Raises for an option that does not exist, or one without its value.
        command.make_parser(click.Context(command)).parse_args(rest)


def test_what_it_says_about_patch_files_is_so(tiny, monkeypatch):
    (block,) = [block for block in blocks(README) if "--patch" in block]
    monkeypatch.chdir(tiny.folder)
    codes = [
        CliRunner().invoke(cli.main, shlex.split(line, comments=True)[1:]).exit_code for line in block.splitlines()
    ]
    assert codes == [0, 0, 0, 1]
    assert Path("again.onnx").read_bytes() == Path("repaired.onnx").read_bytes()
    assert Path("original.onnx").read_bytes() == Path("model.onnx").read_bytes()


def test_the_functions_it_names_exist():
    (example,) = [block for block in blocks(README) if block.startswith("import onnxcare")]
    for name in re.findall(r"onnxcare\.(\w+)\(", example):
        assert name in onnxcare.__all__
        assert callable(getattr(onnxcare, name))


PAGES = [
    ROOT / "README.md",
    ROOT / "scripts/README.md",
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("sample_models/**/*.md"),
]


@pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in sorted(PAGES)])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_the_tree_in_the_architecture_is_the_tree():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+/\w+\.py|\w+\.py)`", text))
    assert named
    for name in named:
        assert (ROOT / "onnxcare" / name).is_file(), name
