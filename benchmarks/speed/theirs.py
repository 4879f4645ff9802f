"""What the others do: loops of hooks in PyTorch, captum, and onnxruntime with a candidate at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort
import torch
from captum.attr import LayerFeatureAblation
from onnx import numpy_helper

from benchmarks.speed.measure import Setting
from benchmarks.speed.nets import Twin

Array = np.ndarray
Weights = Mapping[str, Array]


def hooked_means(twin: Twin, place: int, x: torch.Tensor, forced: Iterable[tuple[int, float]]) -> Array:
    """Return the mean probability of the first class under do(unit := value): a hook and a full forward pass each."""
    unit, value = 0, 0.0

    def force(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        output[:, unit] = value
        return output

    handle = twin.net[place].register_forward_hook(force)
    means = []
    try:
        with torch.inference_mode():
            for unit, value in forced:  # noqa: B007  the hook reads them
                means.append(twin.net(x).softmax(dim=-1)[:, 0].mean())
            return torch.stack(means).cpu().numpy()
    finally:
        handle.remove()


def captum_zeroed(twin: Twin, place: int, x: torch.Tensor, target: int) -> Array:
    """Return by how much one score falls when a channel is set to zero, [channels, samples], from captum."""
    with torch.inference_mode():
        shape = twin.net[: place + 1](x[:1]).shape
    mask = torch.arange(shape[1], device=x.device).reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)
    ablation = LayerFeatureAblation(twin.net, twin.net[place])
    found = ablation.attribute(x, target=target, layer_mask=mask, perturbations_per_eval=1)
    return found.flatten(2)[..., 0].T.cpu().numpy()


def suffix_zeroed(twin: Twin, place: int, x: torch.Tensor, target: int) -> Array:
    """Return the same from a plain loop that runs the front of the net once and the rest for every channel."""
    front, rest = twin.net[: place + 1], twin.net[place + 1 :]
    with torch.inference_mode():
        hidden = front(x)
        before = rest(hidden)[:, target]
        falls = []
        for channel in range(hidden.shape[1]):
            kept = hidden[:, channel].clone()
            hidden[:, channel] = 0
            falls.append(before - rest(hidden)[:, target])
            hidden[:, channel] = kept
        return torch.stack(falls).cpu().numpy()


def _options(setting: Setting, optimise: bool = True) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = setting.threads
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _providers(setting: Setting) -> list[object]:
    if setting.device == "cuda":
        return [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]


class SessionEach:
    """A new onnxruntime session for every candidate, made from the model with the candidate's weights."""

    def __init__(self, setting: Setting, model: onnx.ModelProto, optimise: bool) -> None:
        """Take a copy of a model; `optimise` says whether onnxruntime optimises the graph of every candidate."""
        self._setting, self._optimise = setting, optimise
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)

    def scores(self, candidates: Sequence[Weights], feeds: Weights) -> Array:
        """Return the scores of all candidates, [P, rows, classes]."""
        found = []
        for weights in candidates:
            for tensor in self._model.graph.initializer:
                if tensor.name in weights:
                    tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
            options, content = _options(self._setting, self._optimise), self._model.SerializeToString()
            session = ort.InferenceSession(content, options, _providers(self._setting))
            found.append(session.run(None, dict(feeds))[0])
        return np.stack(found)


class FedWeights:
    """One onnxruntime session that is fed the weights of a layer beside the samples."""

    def __init__(self, setting: Setting, model: onnx.ModelProto, names: Sequence[str]) -> None:
        """Turn some weights of a model into inputs of its graph."""
        fed = onnx.ModelProto()
        fed.CopyFrom(model)
        for tensor in [tensor for tensor in fed.graph.initializer if tensor.name in names]:
            fed.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
            fed.graph.initializer.remove(tensor)
        self._session = ort.InferenceSession(fed.SerializeToString(), _options(setting), _providers(setting))

    def scores(self, candidates: Sequence[Weights], feeds: Weights) -> Array:
        """Return the scores of all candidates, [P, rows, classes]."""
        return np.stack([self._session.run(None, {**feeds, **weights})[0] for weights in candidates])


class HookedMultipliers:
    """The scores under multipliers on some units: for every candidate a full forward pass in PyTorch, as CARE does."""

    def __init__(self, twin: Twin, place: int, units: Array, x: torch.Tensor) -> None:
        """Take a net, the module whose outputs are multiplied, and the inputs."""
        self._twin, self._place, self._x = twin, place, x
        self._units = torch.from_numpy(units).to(x.device)

    def scores(self, factors: Array) -> Array:
        """Return the scores [P, rows, classes] of factors [P, K]."""
        row = torch.zeros(0)

        def multiply(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
            output[:, self._units] *= row
            return output

        handle = self._twin.net[self._place].register_forward_hook(multiply)
        found = []
        try:
            with torch.inference_mode():
                for row in torch.from_numpy(factors.astype(np.float32)).to(self._x.device):  # noqa: B007
                    found.append(self._twin.net(self._x))
                return torch.stack(found).cpu().numpy()
        finally:
            handle.remove()
