"""Experiments: run parts of the model on data.

An `Experiment` owns the copy of the model that surgery works on and the sessions made from it.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np
import onnx

from onnxcare.data import Inputs
from onnxcare.decision import Decision
from onnxcare.errors import ModelError, SpecError, UsageError, nearest
from onnxcare.graph import surgery
from onnxcare.graph.layers import Layer
from onnxcare.graph.model import Model, Signature, numpy_dtype
from onnxcare.graph.parameters import Parameter
from onnxcare.graph.sites import Site
from onnxcare.graph.storage import Source, read_tensor, write_tensor
from onnxcare.graph.view import attribute, operator
from onnxcare.graph.working import EXACT, experiment_form
from onnxcare.pool import Pool
from onnxcare.runtime import Budget, Device, Session, give_back_freed_memory, in_threads
from onnxcare.suffix import Family, Suffix

Array = np.ndarray

# Every session holds a copy of the weights it needs, so only the last ones are kept: so many bytes of them, or as many
# as the model has, of suffixes half of it.
_KEPT = 64 << 20
# Loading a model of more bytes is followed by a look after what it left behind.
_LARGE = 16 << 20
# So many samples tell the order of magnitude of the scores.
_SCALED_BY = 1000
# So many layers are named to whoever asks for one that is not there.
_NAMED = 8

_Value = TypeVar("_Value")


class Experiment:
    """A model on the operating table.

    Attributes:
        model: the original.
        form: its working form.
        copy: the model that experiments run; its weights are the original's, or a candidate's (`patched`).
        layers: what can be rewritten.
        sites: what can be intervened on.
        output: the output that is judged.
        logits: the tensor that experiments compute for it (the input of a final Softmax or Sigmoid).
        decision: how an answer is read.
        classes: how many answers there are.
        probe: inputs of two samples, for trying things out.
        pool: who else may run families of interventions; None for this process alone.
        family: the latest family, and with it what all its members share.
        lost: what layers and sites read and write with something else than the samples on axis 0.
    """

    def __init__(
        self,
        model: Model,
        device: Device,
        memory: int,
        probe: Inputs,
        output: str | None = None,
        decision: Decision | None = None,
    ) -> None:
        """Make the copy and check on the probe rows that it answers as the original does.

        Args:
            model: the original.
            device: where to run.
            memory: bytes that activations may take.
            probe: inputs of some samples: what the copy is checked on and scores are scaled by.
            output: the output that is judged; None takes the first one that fits the decision.
            decision: how an answer is read; None for the highest score.

        Raises:
            ModelError: the model has no output that fits, cannot be cut, or its batch size cannot be relaxed.
        """
        decision = decision or Decision()
        self.model = model
        self.pool: Pool | None = None
        self.device: Device = device
        self.memory = memory
        self.form = experiment_form(model)
        self.copy = self.form.proto
        self._view = self.form.view
        self.output = judged_output(model, output, decision)
        graph = surgery.import_graph(self.copy, str(model.path))
        self.logits, final = surgery.find_logits(graph, self.output, decision.finals)
        self._inner: tuple[str, ...] = ()
        self._start_afresh()
        self.probe = _first(probe, 2)
        self._check_copy(probe)
        values = self.tensors([self.logits], _first(probe, _SCALED_BY))[0]
        decision = replace(decision, column=values.ndim > 1, ones=max(0, values.ndim - 2))
        if final and decision.ones and not self._stands_for_output(replace(decision, final=final)):
            self.logits, final = self.output, ""
            values = self.tensors([self.logits], _first(probe, _SCALED_BY))[0]
        self.decision = replace(decision, final=final).scaled(values)
        self.classes = self.decision.scores(values).shape[-1]
        self.layers, self.sites = self._usable(surgery.upstream(graph, self.logits))

    def patched(self, values: Mapping[Parameter, Array]) -> Experiment:
        """Return the same experiment on a copy with new values for some parameters."""
        other = copy.copy(self)
        other.copy = onnx.ModelProto()
        other.copy.CopyFrom(self.copy)
        for parameter, new in values.items():
            tensor = other.copy.graph.initializer[self._held[parameter.name]]
            tensor.ParseFromString(write_tensor(tensor, new.astype(parameter.dtype)))
        other._start_afresh()
        return other

    def only(self, patterns: Sequence[str]) -> Experiment:
        """Return the same experiment with all layers refused but those whose names match a pattern (fnmatch).

        Raises:
            UsageError: a pattern matches no layer.
        """
        names = [layer.name for layer in self.layers]
        # A name may hold brackets, which mean something else in a pattern.
        fitting = {
            pattern: {pattern} if pattern in names else {name for name in names if fnmatch.fnmatchcase(name, pattern)}
            for pattern in patterns
        }
        for pattern, found in fitting.items():
            if not found:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                raise UsageError(
                    f"--layers {pattern}: {self.model.path} has no such layer{nearest(pattern, names)}; it has "
                    f"{', '.join(names[:_NAMED])}{more}"
                )
        allowed = set().union(*fitting.values())
        other = copy.copy(self)
        vars(other).pop("multiply_adds", None)
        other.layers = [
            layer
            if (layer.refusal and not layer.tied) or layer.name in allowed
            else replace(layer, refusal="--layers leaves it out", tied=False)
            for layer in self.layers
        ]
        other.sites = [
            site
            if site.refusal or {reader.name for reader in site.readers} <= allowed
            else replace(site, refusal="--layers leaves out a layer that reads it")
            for site in self.sites
        ]
        return other

    def read(self, parameter: Parameter) -> Array:
        """Return the present values of a parameter, those of the candidate where the experiment is patched."""
        if parameter.name not in self._held:  # it is made while the graph runs, and cannot be patched
            return parameter.storage.read(Source(self.model.proto, self.model.path.parent))
        return read_tensor(self.copy.graph.initializer[self._held[parameter.name]], self.model.path.parent)

    def as_stored(self, values: Mapping[Parameter, Array]) -> dict[Parameter, Array]:
        """Return new values of parameters as they are read once the file holds them."""
        source = Source(self.model.proto, self.model.path.parent)
        return {item: item.storage.rounded(source, new).astype(item.dtype) for item, new in values.items()}

    @cached_property
    def _held(self) -> dict[str, int]:
        """The positions of the initializers, by name: a candidate's are those of the original."""
        return {tensor.name: index for index, tensor in enumerate(self.copy.graph.initializer)}

    def _check_copy(self, probe: Inputs) -> None:
        """Compare the copy on several rows, never as many as the file fixes, with the original on single ones."""
        fixed = [signature.shape[0] for signature in self.model.inputs if signature.shape]
        sizes = [size for size in fixed if isinstance(size, int)]
        few = _first(probe, max(3, *(size + 1 for size in sizes)) if sizes else 3)
        # Fused integer arithmetic rounds in other places than what the file says.
        session = Session(self.model.path, self.device, optimise=not self.form.quantised, axes=self.model.axes)
        original = session.run_rows(few, [self.output], rows_per_run=1)[0]
        try:
            copied = self.tensors([self.output], few)[0]
        except ModelError as error:
            if not sizes:
                raise
            raise ModelError(
                f"{self.model.path}: its batch size is fixed in a way that cannot be relaxed: {error}"
            ) from error
        allowed = self.form.tolerance
        same = copied.shape == original.shape and np.allclose(
            copied, original, rtol=allowed, atol=allowed * self._scale_of(original), equal_nan=True
        )
        if not same:
            advice = "; export it with a dynamic batch axis" if sizes else ""
            raise ModelError(
                f"{self.model.path}: several rows in one run do not answer as single rows do "
                f"(some node mixes the rows of a batch){advice}"
            )

    def _scale_of(self, answers: Array) -> float:
        """Return what differences count against: 1, or the largest answer where rounding grows with the answers."""
        if self.form.tolerance == EXACT:
            return 1.0
        return max(1e-3, float(np.max(np.abs(answers), where=np.isfinite(answers), initial=0)))

    def _stands_for_output(self, decision: Decision) -> bool:
        """Return whether the output follows from the logits: a Softmax may run along an axis without classes."""
        logits, output = self.tensors([self.logits, self.output], self.probe)
        found, wanted = decision.outputs(decision.scores(logits)), output.reshape(output.shape[:2])
        return np.allclose(found, wanted, rtol=self.form.tolerance, atol=self.form.tolerance)

    def _usable(self, reached: set[str]) -> tuple[list[Layer], list[Site]]:
        """Return the layers, those that cannot be experimented on refused, and the sites that can be cut at."""
        layers, sites = self.form.layers, self.form.sites
        tensors = {name for layer in layers for name in (layer.input, layer.output)} | {s.tensor for s in sites}
        names = sorted(tensors & reached - set(self.probe))
        lost: set[str] = set()
        if names:
            content = surgery.expose(self.copy, names, str(self.model.path)).SerializeToString()
            session = Session(content, optimise=False, what=str(self.model.path))
            del content
            lost = self._without_samples(session, names)
            del session
            give_back_freed_memory()

        def refusal(layer: Layer) -> str | None:
            if layer.output not in reached:
                return f"{self.logits!r} does not depend on it"
            wrong = next((name for name in (layer.input, layer.output) if name in lost), None)
            return layer.refusal or (_no_samples(wrong) if wrong else None)

        def sound(layer: Layer) -> bool:
            return layer.output in reached and not lost.intersection((layer.input, layer.output))

        def hindrance(site: Site) -> str | None:
            wrong = next((reader for reader in site.readers if reader.input in lost), None)
            return site.refusal or (f"layer {wrong.name}: {_no_samples(wrong.input)}" if wrong else None)

        self.lost = frozenset(lost)
        self._inner = tuple(sorted({*names, self.logits} - lost - set(self.probe)))
        return (
            [replace(layer, refusal=refusal(layer), tied=layer.tied and sound(layer)) for layer in layers],
            [replace(site, refusal=hindrance(site)) for site in sites if site.tensor in reached - lost],
        )

    def _without_samples(self, session: Session, names: Sequence[str]) -> set[str]:
        """Return the outputs of a session whose axis 0 does not hold the samples, judged by one row and by two."""
        found: set[str] = set()
        for rows in (1, 2):
            few = _first(self.probe, rows)
            size = len(next(iter(few.values())))
            values = session.run(self._fed(session, few))
            found |= {name for name, value in zip(names, values, strict=True) if value.shape[:1] != (size,)}
        return found

    @property
    def open_layers(self) -> list[Layer]:
        """The layers that may be rewritten, in graph order."""
        return [layer for layer in self.layers if layer.refusal is None]

    @cached_property
    def multiply_adds(self) -> int:
        """How many of them the layers that may be rewritten take for one sample."""
        layers = self.open_layers
        outputs = self.tensors([layer.output for layer in layers], self.probe)
        return max(1, sum(layer.features * values[0].size for layer, values in zip(layers, outputs, strict=True)))

    # -- running ---------------------------------------------------------------------------------

    def tensors(self, names: Sequence[str], inputs: Inputs) -> list[Array]:
        """Return tensors of the graph for the given inputs, samples on axis 0."""
        inner = tuple(name for name in names if name not in inputs)
        computed = iter(self._computed(inner, inputs) if inner else ())
        return [inputs[name] if name in inputs else next(computed) for name in names]

    def _computed(self, names: tuple[str, ...], inputs: Inputs) -> list[Array]:
        # One session for each set of tensors is faster, as long as a session is no matter of memory.
        together = self.copy.ByteSize() > _KEPT and set(names) <= set(self._inner)
        shown = self._inner if together else names
        exposed = self._exposed.get(shown, lambda: self._expose(shown))
        fed = self._fed(exposed.session, inputs)
        return exposed.session.run_rows(fed, names, rows_per_run=exposed.rows)

    def _expose(self, names: tuple[str, ...]) -> _Exposed:
        part = surgery.expose(self.copy, names, str(self.model.path))
        rows, content = self.rows_of(part), part.SerializeToString()
        del part  # onnxruntime makes copies of its own
        session = Session(content, self.device, what=str(self.model.path))
        lost = self._without_samples(session, names)
        if lost:
            raise ModelError(f"{self.model.path}: {_no_samples(sorted(lost)[0])}")
        return _Exposed(session, rows, len(content))

    def scores(self, inputs: Inputs, source: str = "the data") -> Array:
        """Return the scores [samples, classes]; `source` names the inputs in errors.

        Raises:
            ModelError: the model answers NaN or infinity.
        """
        scores = self.decision.scores(self.tensors([self.logits], inputs)[0])
        bad = int((~np.isfinite(scores).all(axis=-1)).sum())
        if bad:
            raise ModelError(
                f"{self.model.path}: answers NaN or infinity for {bad} of {len(scores)} samples of {source}"
            )
        return scores

    def between(self, start: str, stop: str, values: Array) -> Array:
        """Return `stop` computed from values of `start`, where only the shapes of the model's inputs matter."""
        part = surgery.between(self.copy, start, stop, str(self.model.path))
        session = Session(part, "cpu", what=str(self.model.path))
        feeds = {name: np.repeat(value[:1], len(values), axis=0) for name, value in self.probe.items()}
        kinds = {name: numpy_dtype(kind) for name, kind, _ in session.inputs}
        feeds[start] = values.astype(kinds[start])
        return session.run(self._fed(session, feeds))[0]

    def suffix(self, tensor: str, kind: str, reader: Layer | None = None) -> Suffix:
        """Return the suffix behind a tensor with interventions of a kind; the last few are kept.

        Args:
            tensor: where to cut.
            kind: `affine`, `span` or `sweep`, see `graph.surgery`.
            reader: the layer that writes the tensor, for `sweep`.
        """
        return self._suffixes.get((kind, tensor), lambda: self._cut(tensor, kind, reader))

    def _cut(self, tensor: str, kind: str, reader: Layer | None) -> Suffix:
        (one,) = self.tensors([tensor], self.first(1))
        what = str(self.model.path)
        return Suffix(self, lambda: surgery.cut(self.copy, tensor, self.logits, one.shape[1:], kind, what, reader))

    def make_room(self) -> None:
        """Let go of the sessions of a large model, before something is made that takes as much again."""
        if self.copy.ByteSize() > _LARGE:
            self._exposed.clear()
            self._suffixes.clear()
            give_back_freed_memory()

    def once(self, key: tuple[str, ...], make: Callable[[], _Value]) -> _Value:
        """Return what was made under a key before, or make it: for what follows from the model alone."""
        if key not in self._facts:
            self._facts[key] = make()
        return cast(_Value, self._facts[key])

    def _start_afresh(self) -> None:
        size = self.copy.ByteSize()
        self._exposed, self._suffixes = _Kept(max(_KEPT, size)), _Kept(max(_KEPT, size // 2))
        self._facts: dict[tuple[str, ...], object] = {}
        self.family: Family | None = None

    def first(self, rows: int) -> Inputs:
        """Return the inputs of the first rows of the probe."""
        return _first(self.probe, rows)

    def map(
        self, runner: Callable[..., Array], jobs: Sequence[tuple[Any, ...]], then: Callable[[Array], Array]
    ) -> list[Array]:
        """Return what becomes of a runner's answers to all jobs, in their order.

        Args:
            runner: runs a job; it is pickled where there is a pool to share the jobs with.
            jobs: its arguments.
            then: what to make of each answer, here.
        """
        if self.pool is not None and len(jobs) > 1:
            return [then(answer) for answer in self.pool.share(runner, jobs)]
        if self.device == "cuda":  # a GPU runs one thing at a time
            return [then(runner(*job)) for job in jobs]
        return in_threads(lambda *job: then(runner(*job)), jobs)

    def sum_behind(self, layer: Layer) -> tuple[str, Array | None] | None:
        """Return the sum of this layer's output and another activation, where nothing else reads the output.

        Returns:
            The sum's name, and what the output is multiplied with on the way: the factors of a BatchNormalization in
            between, shaped to broadcast against the output, or None.
        """
        tensor, factor = layer.output, None
        reader = self._view.sole_consumer(tensor)
        if reader is not None and operator(self._view.nodes[reader]) == "BatchNormalization":
            node = self._view.nodes[reader]
            scale, variance = (self._view.small_constant(node.input[i], limit=layer.outputs) for i in (1, 4))
            if scale is None or variance is None:
                return None
            spatial = len(layer.convolution.kernel) if layer.convolution else 0
            factor = (scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))).reshape(-1, *[1] * spatial)
            tensor = node.output[0]
            reader = self._view.sole_consumer(tensor)
        if reader is None or operator(self._view.nodes[reader]) != "Add":
            return None
        node = self._view.nodes[reader]
        others = [name for name in node.input if name != tensor]
        if len(others) != 1 or not self._view.is_activation(others[0]):
            return None
        return node.output[0], factor

    @staticmethod
    def _fed(session: Session, inputs: Inputs) -> Inputs:
        return {name: inputs[name] for name, _, _ in session.inputs}

    # -- memory ----------------------------------------------------------------------------------

    @cached_property
    def _bytes_of(self) -> dict[str, int]:
        """Bytes of one row of every tensor whose shape is known."""
        sizes = {}
        for info in [*self.copy.graph.value_info, *self.copy.graph.input, *self.copy.graph.output]:
            dims = [d.dim_value for d in info.type.tensor_type.shape.dim[1:]]
            if all(dims):
                sizes[info.name] = int(np.prod(dims, dtype=np.int64)) * _itemsize(info.type.tensor_type.elem_type)
        return sizes

    @property
    def rows_per_run(self) -> int:
        """How many samples the whole model may run on at once."""
        return self.rows_of(self.copy)

    def rows_of(self, part: onnx.ModelProto) -> int:
        """Return how many rows of this part of the graph may run at once."""
        outputs = [name for node in part.graph.node for name in node.output]
        known = [self._bytes_of[name] for name in outputs if name in self._bytes_of]
        # Tensors of unknown shape are taken to be as large as the largest known one.
        unknown = (len(outputs) - len(known)) * max(known, default=1 << 16)
        return Budget(self.memory, sum(known) + unknown).rows()


@dataclass(frozen=True)
class _Exposed:
    """A session that computes inner tensors."""

    session: Session
    rows: int
    nbytes: int


class _Kept:
    """Sessions that may be used again: the last ones, as far as their weights fit into a bound."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._items: dict[tuple[str, ...], Any] = {}

    def clear(self) -> None:
        """Keep nothing."""
        self._items.clear()

    def get(self, key: tuple[str, ...], make: Callable[[], _Value]) -> _Value:
        """Return what is kept under a key, or make it and let go of what was not used for longest."""
        found: Any = self._items.pop(key, None)
        made = found is None
        found = make() if made else found
        held = found.nbytes
        for other in list(reversed(self._items)):
            held += self._items[other].nbytes
            if held > self._bound:
                del self._items[other]
        self._items[key] = found
        if made and found.nbytes > _LARGE:
            give_back_freed_memory()
        return cast(_Value, found)


def _first(inputs: Inputs, rows: int) -> Inputs:
    return {name: values[:rows] for name, values in inputs.items()}


def _itemsize(elem_type: int) -> int:
    """Return the bytes of one element, those of a float32 where the type is not known."""
    return onnx.helper.tensor_dtype_to_np_dtype(elem_type or onnx.TensorProto.FLOAT).itemsize


def _no_samples(tensor: str) -> str:
    return f"axis 0 of {tensor!r} does not hold the samples"


def judged_output(model: Model, wanted: str | None, decision: Decision) -> str:
    """Return the name of the output that is judged: the wanted one, or the first that fits the decision.

    Raises:
        SpecError: there is no output of the wanted name.
        ModelError: it does not hold what the decision reads, or no output does.
    """
    known = {output.name: output for output in model.outputs}
    if wanted is not None and wanted not in known:
        raise SpecError(f"output: {model.path} has no output {wanted!r}{nearest(wanted, known)}; {_listed(model)}")
    needed = "one score a sample" if decision.rule == "threshold" else "one score per class, [samples, classes]"
    if wanted is not None:
        if not _fits(known[wanted], decision):
            raise ModelError(f"{model.path}: output {wanted!r} does not hold {needed}; {_listed(model)}")
        return wanted
    fitting = [name for name, output in known.items() if _fits(output, decision)]
    if not fitting:
        other, written = (_THRESHOLD, "{threshold: 0.5}") if decision.rule != "threshold" else (Decision(), "argmax")
        suited = next((output.name for output in model.outputs if _fits(output, other)), None)
        advice = f"; for {suited} give decision: {written}" if suited is not None else ""
        raise ModelError(f"{model.path}: no output with {needed}; {_listed(model)}{advice}")
    return fitting[0]


_THRESHOLD = Decision("threshold")


def _fits(output: Signature, decision: Decision) -> bool:
    if output.dtype is None or not np.issubdtype(output.dtype, np.floating):
        return False
    # Behind the classes there may be axes of length one: maps that were pooled to a point.
    ones = all(length == 1 for length in output.shape[2:])
    if decision.rule == "threshold":
        return len(output.shape) == 1 or (len(output.shape) > 1 and output.shape[1] == 1 and ones)
    return len(output.shape) > 1 and output.shape[1] != 1 and ones


def _listed(model: Model) -> str:
    listed = "it answers " + ", ".join(f"{output.name} {list(output.shape)}" for output in model.outputs)
    for output in model.outputs:
        if output.dtype is None:
            listed += f"; {output.name} holds no tensor of numbers (with zipmap=False skl2onnx writes one)"
        elif not np.issubdtype(output.dtype, np.floating):
            listed += f"; {output.name} holds {output.dtype}"
    return listed
