"""Write and describe the files of a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

Run = Callable[[np.ndarray], np.ndarray]
"""Maps a batch of inputs to one output of a model."""


def write_model(model: onnx.ModelProto, path: Path, properties: Mapping[str, str]) -> None:
    """Write a model, with what it is said inside the file, and without what ties it to the computer that made it.

    Exporters note the source line behind every node, with its full path. Tensors that lie in a file beside the model
    stay there.
    """
    for node in model.graph.node:
        node.doc_string = ""
        for entry in [e for e in node.metadata_props if "stack_trace" in e.key]:
            node.metadata_props.remove(entry)
    onnx.helper.set_model_props(model, dict(properties))
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(path, full_check=True)


def runner(path: Path, output: str | None = None) -> Run:
    """Return what runs a model with one input in onnxruntime, on the CPU, for one output (else the first)."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    wanted = output or session.get_outputs()[0].name

    def run(x: np.ndarray) -> np.ndarray:
        result: np.ndarray = session.run([wanted], {name: x})[0]
        return result

    return run


def describe_model(path: Path) -> str:
    """Return a model's versions, inputs, outputs and operators, as a list item with its name."""
    model = onnx.load(path)
    opsets = ", ".join(f"{entry.domain or 'opset'} {entry.version}" for entry in model.opset_import)
    ops = ", ".join(node.op_type for node in model.graph.node)
    return (
        f"- `{path.name}`: IR {model.ir_version}, {opsets}, "
        f"input {_values(model.graph.input)}, output {_values(model.graph.output)};\n  {ops}"
    )


def hash_line(path: Path) -> str:
    """Return a file's name and SHA-256 as a list item."""
    return f"- `{path.name}`: `{sha256(path)}`"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def version_line(versions: Mapping[str, str]) -> str:
    """Return the versions a sample was made with, those that every sample needs included."""
    common = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "numpy": np.__version__}
    return ", ".join(f"{name} {version}" for name, version in {**versions, **common}.items())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> str:
    """Return a Markdown table; all columns but the first `text` ones are aligned to the right."""
    lines = [header, [*["---"] * text, *("---:" for _ in header[text:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _values(values: Sequence[onnx.ValueInfoProto]) -> str:
    return ", ".join(f"`{value.name}` {_shape(value)}" for value in values)


def _shape(value: onnx.ValueInfoProto) -> str:
    if not value.type.HasField("tensor_type"):
        return "(a list of maps)"
    lengths = [str(axis.dim_value) if axis.HasField("dim_value") else "N" for axis in value.type.tensor_type.shape.dim]
    return f"[{', '.join(lengths)}]"
