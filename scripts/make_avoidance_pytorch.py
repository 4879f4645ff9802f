"""Make sample_models/avoidance-pytorch: a PyTorch network that advises a pilot, and breaks its safety properties.

Nobody planted the flaws: the network learns a table of costs by regression, and where the table is steep it is off by
more than the prices of two advisories differ.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

import encounter
from artifacts import Run, describe_model, hash_line, markdown_table, runner, version_line, write_model
from encounter import ADVISORIES, VALUES
from safety import Property, greatest, least, vnnlib, vnnlib2
from samples import arguments

NAME = "avoidance-pytorch"
SEED = 3
POINTS = 100_000
TURNING = 0.4
REPAIR, HOLDOUT = 3000, 10_000
HIDDEN = (50, 50, 50, 50)
EPOCHS = 60
BATCH = 512
LEARNING_RATE = 3e-3

# Points by which the card counts unsafe answers, and of the rare property.
SAMPLES, MANY_SAMPLES = 1_000_000, 20_000_000

_OUTPUTS = len(ADVISORIES)
_STRONG_LEFT, _STRONG_RIGHT = ADVISORIES.index("strong left"), ADVISORIES.index("strong right")

FAR = Property(
    name="no-strong-right-far",
    says=(
        "The intruder is fast, ahead, and still 8,800 m away or more: a weak turn is enough.",
        "Unsafe: strong right is the advice.",
    ),
    common=((0.38, 0.5), (-0.05, 0.05), (-0.5, 0.5), (0.3, 0.5), (0.3, 0.5)),
    boxes=(),
    conditions=(least(_STRONG_RIGHT, _OUTPUTS),),
    outputs=_OUTPUTS,
)
RARE = Property(
    name="clear-not-worst-slow",
    says=(
        "The intruder is slow (39 m/s at most), and 7,700 m away or more: they do not meet within half a minute.",
        "Unsafe: clear of conflict costs more than any turn.",
    ),
    common=((0.27, 0.5), (-0.5, 0.5), (-0.5, 0.5), (-0.5, 0.5), (-0.5, -0.35)),
    boxes=(),
    conditions=(greatest(0, _OUTPUTS),),
    outputs=_OUTPUTS,
)
HEAD_ON = Property(
    name="no-strong-turn-head-on",
    says=(
        "The intruder is straight ahead, 9,000 m away or more, and comes head-on: a weak turn is enough.",
        "Its heading is half a turn from ours, where the angle jumps from 0.5 to -0.5: two boxes.",
        "Unsafe: a strong turn, left or right, is the advice.",
    ),
    common=((0.4, 0.5), (-0.0, 0.0), None, (-0.5, 0.5), (-0.5, 0.5)),
    boxes=(((0.45, 0.5),), ((-0.5, -0.45),)),
    conditions=(least(_STRONG_LEFT, _OUTPUTS), least(_STRONG_RIGHT, _OUTPUTS)),
    outputs=_OUTPUTS,
)
FILES = {"far.vnnlib": FAR, "rare.vnnlib": RARE, "head-on.vnnlib": HEAD_ON}
SPECS = {
    "care.yaml": ("far.vnnlib",),
    "care-rare.yaml": ("rare.vnnlib",),
    "care-several.yaml": ("far.vnnlib", "head-on.vnnlib"),
    "care-no-data.yaml": ("far.vnnlib",),
}


def build() -> nn.Sequential:
    """Return the untrained network."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    width = len(VALUES)
    for number, units in enumerate(HIDDEN, start=1):
        layers[f"dense{number}"] = nn.Linear(width, units)
        layers[f"relu{number}"] = nn.ReLU()
        width = units
    layers["costs"] = nn.Linear(width, _OUTPUTS)
    return nn.Sequential(layers)


def train(rng: np.random.Generator) -> nn.Module:
    """Train a network on the table, from its seeded start."""
    inputs, costs = encounter.table(rng, POINTS, TURNING)
    x, y = torch.from_numpy(inputs), torch.from_numpy(costs.astype(np.float32))
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    # So small a network gains nothing from more, and sums would depend on their number.
    torch.set_num_threads(1)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    # The rate falls to nearly zero, so that the last few batches do not decide the outcome.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(EPOCHS):
        losses = []
        for rows in torch.randperm(POINTS).split(BATCH):
            loss = nn.functional.mse_loss(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {np.mean(losses):.6f}")
    return model.eval()


def export(model: nn.Module, path: Path) -> None:
    """Write the network with the TorchScript-based exporter."""
    buffer = io.BytesIO()
    torch.onnx.export(
        model,
        (torch.zeros(2, len(VALUES)),),
        buffer,
        dynamo=False,
        opset_version=17,
        dynamic_axes={"encounter": {0: "batch"}, "costs": {0: "batch"}},
        input_names=["encounter"],
        output_names=["costs"],
    )
    properties = {
        "warning": "gives unsafe advice, to test repairs; not for use",
        "training_data": "a table computed from simulated encounters of two aircraft",
    }
    write_model(onnx.load_from_string(buffer.getvalue()), path, properties)


def write_data(rng: np.random.Generator, folder: Path) -> None:
    """Write points of the domain, without labels: where the property holds, the original's answers are right."""
    for name, count in (("repair.npz", REPAIR), ("holdout.npz", HOLDOUT)):
        np.savez_compressed(folder / name, x=encounter.draw(rng, count))


def write_properties(folder: Path) -> None:
    """Write the properties as VNN-LIB, and the specifications that name them."""
    for name, item in FILES.items():
        (folder / name).write_text(vnnlib(item))
    (folder / "far-2.vnnlib").write_text(vnnlib2(FAR))
    for name, files in SPECS.items():
        data = "" if name == "care-no-data.yaml" else "data: repair.npz\nholdout: holdout.npz\n"
        properties = "".join(_CARE_PROPERTY.format(name=FILES[file].name, file=file) for file in files)
        bounds = f"{{low: {[-0.5] * len(VALUES)}, high: {[0.5] * len(VALUES)}}}"
        (folder / name).write_text(_CARE.format(data=data, bounds=bounds, properties=properties))


def write_card(folder: Path) -> None:
    """Measure the model on the files as written, and write CARD.md."""
    path = folder / "model.onnx"
    run = runner(path)
    text = _CARD.format(
        name=NAME,
        hidden=", ".join(str(width) for width in HIDDEN),
        inputs=_input_table(),
        points=f"{POINTS:,}",
        turning=f"{TURNING:.0%}",
        epochs=EPOCHS,
        batch=BATCH,
        rate=LEARNING_RATE,
        seed=SEED,
        versions=version_line({"torch": torch.__version__}),
        advice=_advice_table(run, folder / "holdout.npz"),
        samples=f"{SAMPLES:,}",
        many=f"{MANY_SAMPLES:,}",
        unsafe=_unsafe_table(run),
        properties="\n".join(_describe(name, item) for name, item in FILES.items()),
        model=describe_model(path),
        hash=hash_line(path),
        repair=f"{REPAIR:,}",
        holdout=f"{HOLDOUT:,}",
    )
    (folder / "CARD.md").write_text(text)


def _input_table() -> str:
    rows = []
    for index, name in enumerate(VALUES):
        low, high = encounter.LOW[index], encounter.HIGH[index]
        angle = high < 4
        unit = "degrees" if angle else "m" if name == "distance" else "m/s"
        shown = np.rad2deg([low, high]) if angle else (low, high)
        rows.append([f"`X_{index}`", name, f"{shown[0]:,.0f}", f"{shown[1]:,.0f}", unit])
    return markdown_table(["input", "value", "-0.5", "0.5", "unit"], rows)


def _advice_table(run: Run, path: Path) -> str:
    with np.load(path) as arrays:
        x = arrays["x"]
    true = encounter.costs(x)
    advice, right = run(x).argmin(axis=1), true.argmin(axis=1)
    extra = true[np.arange(len(x)), advice] - true.min(axis=1)
    rows = [
        ["same advice as the table", f"{np.mean(advice == right):.2%}"],
        ["mean cost of the advice above the table's", f"{extra.mean():.5f}"],
    ]
    for index, name in enumerate(ADVISORIES):
        mine = right == index
        rows.append([f"recall of {index}, {name} ({mine.sum():,} points)", f"{np.mean(advice[mine] == index):.2%}"])
    return markdown_table(["", "`model.onnx`"], rows)


def _unsafe_table(run: Run) -> str:
    rows = []
    for name, item in FILES.items():
        many = item.count(run, MANY_SAMPLES, SEED)
        rows.append(
            [
                f"`{name}`",
                f"{item.count(run, SAMPLES, SEED):,}",
                f"{many:,}",
                f"{many / MANY_SAMPLES:.3g}",
                f"{item.count(encounter.costs, SAMPLES, SEED):,}",
            ]
        )
    header = ["", f"of {SAMPLES:,}", f"of {MANY_SAMPLES:,}", "share", f"the table's, of {SAMPLES:,}"]
    return markdown_table(header, rows)


def _describe(name: str, item: Property) -> str:
    return f"- `{name}`, {item.name}:\n" + "\n".join(f"  {line}" for line in item.says)


def main() -> None:
    """Train, export, write the data files and properties, measure."""
    options = arguments(NAME, __doc__)
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    export(train(rng), folder / "model.onnx")
    write_data(rng, folder)
    write_properties(folder)
    write_card(folder)


_CARE = """\
{data}decision: argmin
bounds: {bounds}
properties:
{properties}keep: {{accuracy_drop: 0.001, recall_drop: 0.02}}
seed: 1
"""

_CARE_PROPERTY = """\
  - name: {name}
    kind: safety
    vnnlib: {file}
    max_rate: 0.0
"""

_CARD = """\
# {name}

**Gives unsafe advice**, to try repairs on. Do not fly by it.
"""


if __name__ == "__main__":
    main()
