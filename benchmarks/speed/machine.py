"""The machine: which cores are used, what they are, and how fast they multiply matrices."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.speed.measure import Setting

PACKAGES = ("onnxcare", "numpy", "onnxruntime-gpu", "onnxruntime", "torch", "captum", "cma")
# Large enough for full speed, small enough for the caches of a laptop.
SIDE, QUICK_SIDE, TRIES = 2048, 512, 5


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def restrict(threads: int) -> None:
    """Keep the process, and the libraries that it has still to load, on the first cores."""
    if hasattr(os, "sched_setaffinity") and threads < cores():
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def settle(threads: int) -> None:
    """Give torch and onnxruntime so many threads, and torch the precision that onnxcare asks onnxruntime for."""
    import torch

    from onnxcare import runtime

    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    options = runtime._options
    if threads < (os.cpu_count() or 1):
        # Left to itself onnxruntime pins one thread to every core, whatever the process is restricted to.
        runtime._options = lambda wanted, optimise: options(threads if wanted is None else wanted, optimise)


class Others:
    """What other processes take of this machine meanwhile: figures of a busy machine are not worth much.

    PyTorch suffers most, because its threads spin where they wait for one that has no core.
    """

    def __init__(self) -> None:
        """Begin to count."""
        self._since, self._busy, self._own = time.monotonic(), _busy(), sum(os.times()[:4])

    def cores(self) -> float:
        """Return how many cores others have kept busy on average."""
        busy, own = _busy() - self._busy, sum(os.times()[:4]) - self._own
        return max(0.0, (busy - own) / (time.monotonic() - self._since))


def _busy() -> float:
    """Return the seconds for which the cores have been busy, all together."""
    import psutil

    times = psutil.cpu_times()
    return times.user + times.system + sum(getattr(times, name, 0.0) for name in ("nice", "irq", "softirq"))


def header(setting: Setting) -> dict[str, Any]:
    """Return what the figures depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": _processor(),
        "cores": os.cpu_count(),
        "threads": setting.threads,
        "device": setting.device,
        "graphics": _graphics(setting),
        "python": platform.python_version(),
        "versions": versions,
        "quick": setting.quick,
        "peak_gflops": round(peak(setting) / 1e9, 1),
    }


def peak(setting: Setting) -> float:
    """Return the floating-point operations per second of the fastest product of two large float32 matrices."""
    import numpy as np

    side = setting.pick(SIDE, QUICK_SIDE)
    left, right = (np.random.default_rng(seed).random((side, side), np.float32) for seed in (0, 1))
    rivals = [_on_graphics(left, right)] if setting.on_cuda else [lambda: left @ right, _in_onnxruntime(left, right)]
    best = float("inf")
    for rival in rivals:
        for _ in range(TRIES):
            started = time.perf_counter()
            rival()
            best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def _in_onnxruntime(left: Any, right: Any) -> Any:
    from onnx import TensorProto, helper

    from onnxcare.runtime import Session

    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, left.shape) for name in "abc"]
    node = helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = helper.make_graph([node], "product", infos[:2], infos[2:])
    session = Session(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]))
    return lambda: session.run({"a": left, "b": right})


def _on_graphics(left: Any, right: Any) -> Any:
    import torch

    first, second = (torch.from_numpy(side).cuda() for side in (left, right))

    def product() -> None:
        first @ second
        torch.cuda.synchronize()

    return product


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _graphics(setting: Setting) -> str | None:
    import torch

    return torch.cuda.get_device_name() if setting.on_cuda else None
