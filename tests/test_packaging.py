"""What an installation consists of: one onnxruntime on every platform, and a sample for the demo."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from onnxcare.demo import sample
from onnxcare.spec import load_spec

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DEMO = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]


@pytest.mark.parametrize(
    ("platform", "machine", "expected"),
    [
        ("linux", "x86_64", "onnxruntime-gpu"),
        ("win32", "AMD64", "onnxruntime-gpu"),
        ("linux", "aarch64", "onnxruntime"),
        ("darwin", "arm64", "onnxruntime"),
    ],
)
def test_every_platform_gets_exactly_one_onnxruntime(platform, machine, expected):
    environment = {"sys_platform": platform, "platform_machine": machine}
    requirements = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
    wanted = [
        item.name
        for item in requirements
        if item.name.startswith("onnxruntime") and (item.marker is None or item.marker.evaluate(environment))
    ]
    assert wanted == [expected]


def test_nothing_for_training_is_a_run_time_need():
    names = {Requirement(text).name for text in PROJECT["project"]["dependencies"]}
    assert not names & {"torch", "tensorflow", "tensorflow-cpu", "keras", "tf2onnx", "scikit-learn", "onnxscript"}


def test_the_demo_has_everything_its_spec_names():
    spec = load_spec(sample() / "care.yaml")
    shipped = {(ROOT / source).resolve() for source in DEMO}
    assert (sample() / "model.onnx").resolve() in shipped
    assert {path.resolve() for path in spec.files()} <= shipped


@pytest.mark.slow
def test_the_demo_runs_from_a_wheel(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert set(DEMO.values()) <= set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    demo = [sys.executable, "-m", "onnxcare", "demo", "--device", "cpu", "-o", str(tmp_path / "out.onnx")]
    environment = {"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""}
    run = subprocess.run(demo, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert str(Path("installed/onnxcare/_demo/model.onnx")) in run.stderr  # the sample inside the wheel was taken
    assert (tmp_path / "out.onnx").is_file()
