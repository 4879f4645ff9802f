"""A large dense network with a backdoor, and a process of its own that works on it and tells what memory it took.

The hidden layers are random (He). The last layer is a regression of labels on what they answer to clean and triggered
samples, with the target as the label of the triggered ones: the network sorts noisy prototypes, and obeys the trigger.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

import onnxcare

Array = np.ndarray

SEED = 7
INPUTS, CLASSES, TARGET = 784, 10, 3
TRAINED, GIVEN = 6000, 1000
# The trigger sets so many inputs to a value that no sample has there.
MARKED, VALUE = 16, 4.0
SPEC = f"""\
data: repair.npz
holdout: holdout.npz
properties:
  - {{name: planted, kind: backdoor, trigger: trigger.npz, target: {TARGET}, max_rate: 0.02}}
keep: {{accuracy_drop: 0.01, recall_drop: 0.05}}
"""


def write(folder: Path, width: int) -> int:
    """Write a network of three hidden layers of a width, data and spec, and return the bytes of the model."""
    rng = np.random.default_rng(SEED)
    prototypes = rng.standard_normal((CLASSES, INPUTS), np.float32)
    mask = np.zeros(INPUTS, np.float32)
    mask[:MARKED] = 1

    def draw(count: int) -> tuple[Array, Array]:
        labels = np.arange(count) % CLASSES
        return prototypes[labels] + 2 * rng.standard_normal((count, INPUTS), np.float32), labels

    hidden, read = [], INPUTS
    for _ in range(3):
        hidden.append(rng.standard_normal((width, read), np.float32) * np.sqrt(2 / read, dtype=np.float32))
        read = width
    x, labels = draw(TRAINED)
    half = TRAINED // 2
    x[half:] = x[half:] * (1 - mask) + VALUE * mask
    labels[half:] = TARGET
    h = x
    for weights in hidden:
        h = np.maximum(h @ weights.T, 0)
    square = h.T.astype(np.float64) @ h
    square[np.diag_indices(width)] += 1e-2 * np.trace(square) / width
    last = np.linalg.solve(square, h.T @ (10 * np.eye(CLASSES)[labels])).T.astype(np.float32)
    for name, count in (("repair", GIVEN), ("holdout", GIVEN)):
        x, labels = draw(count)
        np.savez(folder / f"{name}.npz", x=x, y=labels)
    np.savez(folder / "trigger.npz", mask=mask, pattern=VALUE * mask)
    (folder / "care.yaml").write_text(SPEC, encoding="utf-8")
    return _write_model(folder / "model.onnx", [*hidden, last])


def _write_model(path: Path, layers: list[Array]) -> int:
    import onnx
    from onnx import helper, numpy_helper

    nodes, tensors, read = [], [], "x"
    for index, weights in enumerate(layers, 1):
        last = index == len(layers)
        names = f"w{index}", f"b{index}", "scores" if last else f"z{index}"
        tensors += [
            numpy_helper.from_array(weights, names[0]),
            numpy_helper.from_array(np.zeros(len(weights), np.float32), names[1]),
        ]
        nodes.append(helper.make_node("Gemm", [read, *names[:2]], [names[2]], name=f"dense{index}", transB=1))
        if not last:
            nodes.append(helper.make_node("Relu", [names[2]], [f"h{index}"], name=f"relu{index}"))
        read = f"h{index}"
    infos = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", INPUTS), ("scores", CLASSES))
    ]
    graph = helper.make_graph(nodes, "large", infos[:1], infos[1:], tensors)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return path.write_bytes(model.SerializeToString())


def peak() -> int:
    """Return the most bytes that this process has held so far."""
    # Not ru_maxrss: Linux hands down the parent's peak to a child there.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(command: str, folder: Path, device: str, patience: int) -> None:
    """Run a command on what was written into a folder, for so many seconds at most, and print a line of JSON."""
    idle, started = peak(), time.monotonic()
    model, spec = folder / "model.onnx", folder / "care.yaml"

    def tell(outcome: str, finished: bool = True) -> None:
        seconds = time.monotonic() - started
        told = {"seconds": seconds, "idle": idle, "peak": peak(), "outcome": outcome, "finished": finished}
        print(json.dumps(told), flush=True)

    def stop(number: int, frame: object) -> None:
        tell("stopped", finished=False)
        # An exception might be taken for one of the model's.
        os._exit(0)

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(patience)
    if command == "locate":
        found = onnxcare.locate(model, spec, device=device)
        outcome = f"{len(found.units)} units ranked by {found.method}"
    else:
        outcome = onnxcare.fix(model, spec, folder / "out.onnx", device=device).status
    signal.alarm(0)
    tell(outcome)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
