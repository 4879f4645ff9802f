"""The one place that makes onnxruntime sessions: devices, batches and memory.

`session.get_providers()` after creation is the only truth about where a model runs: a session asked to run on
CUDA falls back to the CPU without a word where the driver is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from onnxcare.axes import Axes, as_given, samples_first
from onnxcare.errors import DataError, ModelError, UsageError

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

Device = Literal["cpu", "cuda"]
Array = np.ndarray
_Result = TypeVar("_Result")

_PROVIDERS: dict[str, list[Any]] = {
    "cpu": ["CPUExecutionProvider"],
    # TF32 would round products to 10 bits, and an exhaustive search may pick another kernel on every run.
    "cuda": [
        ("CUDAExecutionProvider", {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}),
        "CPUExecutionProvider",
    ],
}

# Activations of a run should stay near the caches; larger runs only add memory traffic. A few rows there should be all
# the same, as long as they take no more than four times as much.
_BYTES_PER_RUN, _FEW_ROWS = 8 << 20, 16
# Runs whose rows are of unknown size.
_ROWS_PER_RUN = 256

# What onnxruntime calls maps from classes to scores, one a sample; sessions return them as arrays.
MAPS = frozenset(f"seq(map({key},tensor(float)))" for key in ("int64", "string"))


def resolve_device(wanted: str) -> Device:
    """Return the device that `auto`, `cuda` or `cpu` stands for on this machine.

    Raises:
        UsageError: CUDA was asked for and onnxruntime cannot run on it.
    """
    if wanted == "cpu":
        return "cpu"
    if _cuda_works():
        return "cuda"
    if wanted == "cuda":
        raise UsageError(
            "--device cuda: onnxruntime cannot run on a GPU here (no usable CUDA driver, or the CPU-only "
            "package is installed); use --device cpu, or install onnxruntime-gpu with CUDA 13 and cuDNN 9"
        )
    return "cpu"


@functools.cache
def _cuda_works() -> bool:
    import onnx.helper
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return False
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "probe",
        [info("x", onnx.TensorProto.FLOAT, [1])],
        [info("y", onnx.TensorProto.FLOAT, [1])],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    probe = onnx.helper.make_model(graph, ir_version=8, opset_imports=opset)
    try:
        session = _open(probe.SerializeToString(), _options(threads=1, optimise=False), "cuda")
    except Exception:  # a broken driver raises whatever it likes; all of it means "no CUDA"
        return False
    return "CUDAExecutionProvider" in session.get_providers()


@contextlib.contextmanager
def few_blas_threads() -> Iterator[None]:
    """Leave most cores to onnxruntime: linear algebra gets a quarter of them, one at least.

    With all of them its threads wait for each other more than they compute: on two cores a repair took 1.6 times as
    long on an idle machine, and three times as long beside one other busy process.
    """
    import scipy.linalg  # noqa: F401  only libraries that are loaded already can be limited
    import threadpoolctl

    with threadpoolctl.threadpool_limits(max(1, cores() // 4), user_api="blas"):
        yield


def free_memory() -> int:
    """Return the bytes of memory that can be used without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def parse_memory(text: str | None) -> int:
    """Return a number of bytes for texts such as ``2GiB`` or ``500M``; None means half of the free memory.

    Raises:
        UsageError: the text is not a size.
    """
    if text is None:
        return free_memory() // 2
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B?)\s*", text, flags=re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise UsageError(f"--memory {text}: give a size such as 2GiB or 500M")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * 1024**power)


def _options(threads: int | None, optimise: bool) -> ort.SessionOptions:
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.use_deterministic_compute = True
    # An arena would keep the memory of a session's largest run for as long as the session lives.
    options.enable_cpu_mem_arena = False
    # Threads that spin while they wait take the cores from everything else, linear algebra first of all.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _open(source: str | bytes, options: ort.SessionOptions, device: Device) -> ort.InferenceSession:
    """Make a session, without the fallback that prints to standard output and goes on with another provider."""
    import onnxruntime as ort

    session = ort.InferenceSession(source, options, _PROVIDERS[device], enable_fallback=0)
    # It would keep a model in memory for a fallback that is turned off; what is fed is read only once.
    session._model_bytes = None
    return session


def give_back_freed_memory() -> None:
    """Hand what was freed back to the system: loading a model leaves several times its size behind in the heap."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries do it by themselves, or not at all
        _c_library().malloc_trim(0)


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class Session:
    """A loaded model that runs on one device and takes any number of rows.

    Attributes:
        inputs: (name, onnxruntime type, shape) of every input that must be fed.
        outputs: the same for every output.
    """

    def __init__(
        self,
        source: Path | bytes | onnx.ModelProto,
        device: Device = "cpu",
        *,
        optimise: bool = True,
        what: str = "",
        threads: int | None = None,
        axes: Axes | None = None,
    ) -> None:
        """Load a file or an in-memory model.

        Args:
            source: path of an ONNX file (external data is found beside it), or a model held in memory.
            device: `cpu` or `cuda`; never falls back silently.
            optimise: False leaves out onnxruntime's graph optimisations; the session opens faster.
            what: the file that a model held in memory comes from: how it is called in errors, and beside which its
                external data lies.
            threads: how many threads a run takes; None for as many as there are cores.
            axes: where the model has the samples of inputs that do not have them on axis 0; they are fed as others are.

        Raises:
            ModelError: onnxruntime cannot load the model, or not on this device.
        """
        self.device = device
        self._axes = dict(axes or {})
        name = str(source) if isinstance(source, Path) else what or "model"
        if isinstance(source, bytes):
            content: str | bytes = source
        else:
            content = str(source) if isinstance(source, Path) else source.SerializeToString()
        options = _options(threads, optimise)
        if not isinstance(source, Path):
            # Between activations that are rounded, onnxruntime would round floating-point weights as well.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(Path(what).absolute().parent)
            )
        try:
            self._session = _open(content, options, device)
            self.inputs = [
                (i.name, i.type, samples_first(tuple(i.shape), self._axes.get(i.name, 0)))
                for i in self._session.get_inputs()
            ]
            self.outputs = [(o.name, o.type, tuple(o.shape)) for o in self._session.get_outputs()]
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            raise ModelError(f"{name}: {_load_failure(str(error))}") from error
        if device == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise ModelError(f"{name}: onnxruntime fell back to the CPU; use --device cpu")
        self.name = name

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> list[Array]:
        """Run once.

        Args:
            feeds: arrays, or what `resident` made of them.
            outputs: what to compute; None for all outputs.

        Raises:
            ModelError: onnxruntime failed while running.
        """
        names = list(outputs) if outputs is not None else [name for name, _, _ in self.outputs]
        if self._axes:
            feeds = {name: as_given(item, self._axes.get(name, 0)) for name, item in feeds.items()}
        try:
            if all(isinstance(value, np.ndarray) for value in feeds.values()):
                return [_array(answer) for answer in self._session.run(names, dict(feeds))]
            return self._run_bound(feeds, names)
        except Exception as error:
            raise ModelError(f"{self.name}: {_run_failure(str(error))}") from error

    def resident(self, feeds: Mapping[str, Array]) -> dict[str, Any]:
        """Return inputs that many runs share as they are fed best: contiguous, and on the GPU where runs are there."""
        import onnxruntime as ort

        laid_out = {name: np.ascontiguousarray(values) for name, values in feeds.items()}
        if self.device == "cpu":
            return laid_out
        return {name: ort.OrtValue.ortvalue_from_numpy(values, "cuda", 0) for name, values in laid_out.items()}

    def _run_bound(self, feeds: Mapping[str, Any], names: Sequence[str]) -> list[Array]:
        binding = self._session.io_binding()
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            else:
                binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()

    def run_rows(
        self,
        feeds: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        rows_per_run: int = _ROWS_PER_RUN,
    ) -> list[Array]:
        """Run over all rows in batches and return the outputs joined along axis 0.

        A model whose batch size is fixed in the file is fed exactly that many rows at a time; the last batch
        is padded by repeating its last row, and the padding is cut off again.
        """
        fixed = {shape[0] for name, _, shape in self.inputs if shape and isinstance(shape[0], int)}
        if len(fixed) > 1:
            raise ModelError(f"{self.name}: its inputs have different batch sizes {sorted(fixed)}")
        exact = bool(fixed)
        step = fixed.pop() if fixed else rows_per_run
        total = len(next(iter(feeds.values())))
        if not total:
            raise DataError(f"{self.name}: no rows to run on")
        whole: list[Array] = []
        for rows in batches(total, step):
            part = {name: values[rows] for name, values in feeds.items()}
            here = rows.stop - rows.start
            if exact and here < step:
                part = {k: np.concatenate([v, np.repeat(v[-1:], step - here, 0)]) for k, v in part.items()}
            answers = self.run(part, outputs)
            if here == total:
                return [answer[:here] for answer in answers]
            whole = whole or [np.empty((total, *answer.shape[1:]), answer.dtype) for answer in answers]
            for everything, answer in zip(whole, answers, strict=True):
                everything[rows] = answer[:here]
        return whole


def _array(answer: Any) -> Any:
    """Return maps from classes to scores, one a sample, as an array [samples, classes]; anything else as it is."""
    if isinstance(answer, list) and answer and all(isinstance(item, dict) for item in answer):
        return np.array([list(item.values()) for item in answer])
    return answer


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(function: Callable[..., _Result], jobs: Sequence[tuple[Any, ...]]) -> list[_Result]:
    """Return what a function answers to every job, in their order, one thread a core.

    Many runs of one thread each are faster than one after another of many: no operator waits for its threads, and
    every core keeps its own run in its own cache.
    """
    if len(jobs) < 2 or cores() < 2:
        return [function(*job) for job in jobs]
    futures = [_threads().submit(function, *job) for job in jobs]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), thread_name_prefix="onnxcare")


def batches(total: int, step: int) -> Iterator[slice]:
    """Yield consecutive slices of at most `step` rows that cover `total` rows."""
    for start in range(0, total, max(1, step)):
        yield slice(start, min(start + max(1, step), total))


@dataclass(frozen=True)
class Budget:
    """How much memory the activations of one run may take.

    Attributes:
        memory: bytes in all.
        row: bytes that one row (one sample, one candidate) takes while the graph runs.
    """

    memory: int
    row: int

    def rows(self) -> int:
        """Return how many rows one of the runs side by side may take: at least one, no more than the caches like."""
        row = max(1, self.row)
        liked = max(_BYTES_PER_RUN // row, min(_FEW_ROWS, 4 * _BYTES_PER_RUN // row))
        return max(1, min(liked, self.memory // cores() // row))


def _load_failure(text: str) -> str:
    """Say in one line why onnxruntime refused a model."""
    text = _without_middle(text)
    if match := re.search(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)", text):
        return (
            f"IR version {match[1]} is newer than this onnxruntime takes (at most {match[2]}); "
            "export it again with an older ir_version"
        )
    if match := re.search(r"Opset (\d+) is under development.*for domain (\S+) is till opset (\d+)", text, re.DOTALL):
        return (
            f"opset {match[1]} of domain {match[2]} is newer than this onnxruntime takes (at most {match[3]}); "
            "export it again with an older opset"
        )
    if match := re.search(r"(?<!\S)(\S+)\([-\d]*\) is not a registered function/op", text):
        domain, _, name = _short(match[1]).rpartition(":")
        of_domain = f" of domain {domain}" if domain else ""
        return f"onnxruntime has no kernel for operator {name}{of_domain}; such a model cannot be run or repaired"
    return f"onnxruntime cannot load it: {_tail(text)}"


def _run_failure(text: str) -> str:
    return f"onnxruntime failed: {_tail(text)}"


def _tail(text: str) -> str:
    """Return the message of an onnxruntime error without its prefix of source positions."""
    line = " ".join(_without_middle(text).split())
    line = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line)
    line = re.sub(r"\S*onnxruntime\S*\.(?:cc|h):\d+ \S.*?\) ", "", line)
    return _short(line)


def _without_middle(text: str) -> str:
    """Return both ends of a long text: names in a damaged file can be of any length, and patterns take their time."""
    return text if len(text) <= 4000 else f"{text[:2000]} ... {text[-2000:]}"


def _short(line: str) -> str:
    return line if len(line) <= 240 else line[:237] + "..."
