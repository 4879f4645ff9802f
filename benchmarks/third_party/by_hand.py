"""The file itself and interventions on it, made with onnx and onnxruntime alone: what onnxcare is compared with.

do(T := v) for some units: the node that writes T writes `T as it was` instead, and behind it stands

    T = Where(mask, v, T as it was)                     from opset 9
    T = T as it was + (v - T as it was) * mask          before

so that everything else in the file, subgraphs included, reads the changed T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

Array = np.ndarray
Feeds = Mapping[str, Array]

MASK, VALUE = "by_hand_mask", "by_hand_value"
_WHERE = 9
_FEW = 16


class ByHand:
    """A file as onnxruntime runs it.

    Attributes:
        proto: what it holds, external data included.
        inputs: names of what is fed.
        outputs: names of what it answers.
        single: whether the file fixes the number of samples at one, so that several are run one by one.
    """

    def __init__(self, path: Path, axes: Mapping[str, int | None]) -> None:
        """Load a file; `axes` says where samples lie that do not lie on axis 0 of an input."""
        self.proto = onnx.load(path)
        self._axes = axes
        self._whole = _session(path.read_bytes(), path.parent)
        self.inputs = [item.name for item in self._whole.get_inputs()]
        self.outputs = [item.name for item in self._whole.get_outputs()]
        shapes = [item.shape for item in self._whole.get_inputs() if axes.get(item.name, 0) == 0]
        self.single = bool(shapes) and all(shape[:1] == [1] for shape in shapes)

    def answers(self, feeds: Feeds) -> list[Array]:
        """Return all outputs."""
        return self._run(self._whole, feeds, {})

    def answer(self, feeds: Feeds, output: str) -> Array:
        """Return an output that holds the samples on axis 0, a few samples at a time."""
        position, samples = self.outputs.index(output), self._samples(feeds)
        few = [list(range(start, min(start + _FEW, samples))) for start in range(0, samples, _FEW)]
        return np.concatenate([self.answers(self._rows(feeds, rows))[position] for rows in few])

    def forcing(self, tensor: str, dtype: np.dtype) -> Forced:
        """Return the file with an intervention on a tensor of the main graph, to be run with masks and values."""
        copy = _copied(self.proto)
        nodes = list(copy.graph.node)
        index = next(index for index, node in enumerate(nodes) if tensor in node.output)
        before = f"{tensor} as it was"
        nodes[index].output[list(nodes[index].output).index(tensor)] = before
        opset = next(item.version for item in copy.opset_import if item.domain in ("", "ai.onnx"))
        kind = helper.np_dtype_to_tensor_dtype(dtype)
        if opset >= _WHERE:
            inserted = [helper.make_node("Where", [MASK, VALUE, before], [tensor])]
            mask_kind = onnx.TensorProto.BOOL
        else:
            step, taken = f"{tensor} step", f"{tensor} step taken"
            inserted = [
                helper.make_node("Sub", [VALUE, before], [step]),
                helper.make_node("Mul", [step, MASK], [taken]),
                helper.make_node("Add", [before, taken], [tensor]),
            ]
            mask_kind = kind
        del copy.graph.node[:]
        copy.graph.node.extend([*nodes[: index + 1], *inserted, *nodes[index + 1 :]])
        copy.graph.input.append(helper.make_tensor_value_info(MASK, mask_kind, None))
        copy.graph.input.append(helper.make_tensor_value_info(VALUE, kind, None))
        mask_dtype = np.dtype(helper.tensor_dtype_to_np_dtype(mask_kind))
        return Forced(self, _session(copy.SerializeToString()), mask_dtype, dtype)

    def independent(self, feeds: Feeds, answers: Sequence[Array]) -> bool:
        """Return whether a sample is answered alone as among others, in outputs with samples on axis 0."""
        samples = self._samples(feeds)
        # The last one: what was answered before may be remembered.
        alone = self.answers(self._rows(feeds, [samples - 1]))
        pairs = [(one, many[-1:]) for one, many in zip(alone, answers, strict=True) if many.shape[:1] == (samples,)]
        return all(one.shape == many.shape and np.allclose(one, many, rtol=1e-4, atol=1e-5) for one, many in pairs)

    def _run(self, session: ort.InferenceSession, feeds: Feeds, further: Feeds) -> list[Array]:
        known = {name: feeds[name] for name in self.inputs}
        if not self.single:
            return session.run(None, {**known, **further})
        rows = range(self._samples(known))
        parts = [session.run(None, {**self._rows(known, [row]), **further}) for row in rows]
        # A sample's axis has length one then, as a rule the first.
        return [
            np.concatenate(part, axis=next((axis for axis, length in enumerate(part[0].shape) if length == 1), 0))
            for part in zip(*parts, strict=True)
        ]

    def _samples(self, feeds: Feeds) -> int:
        return len(next(values for name, values in feeds.items() if self._axes.get(name, 0) == 0))

    def _rows(self, feeds: Feeds, rows: list[int]) -> dict[str, Array]:
        axes = {name: self._axes.get(name, 0) for name in feeds}
        return {
            name: values if (axis := axes[name]) is None else np.take(values, rows, axis)
            for name, values in feeds.items()
        }


class Forced:
    """A file with an intervention built in."""

    def __init__(self, original: ByHand, session: ort.InferenceSession, mask: np.dtype, value: np.dtype) -> None:
        """Hold the changed file, and the types of its further inputs."""
        self._original, self._session, self._mask, self._value = original, session, mask, value

    def answers(self, feeds: Feeds, mask: Array, value: Array) -> list[Array]:
        """Return all outputs with the value where the mask is set; both broadcast against the tensor."""
        further = {MASK: mask.astype(self._mask), VALUE: value.astype(self._value)}
        return self._original._run(self._session, feeds, further)


def _copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def _session(content: bytes, folder: Path | None = None) -> ort.InferenceSession:
    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
