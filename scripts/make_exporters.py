"""Make sample_models/exporters: one small backdoored model for every exporter.

The exporters need not live in one environment: name those that are installed in the one that runs this, and run it
again in the others.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import onnx

from artifacts import version_line, write_model
from exporters import card, digits
from exporters.catalogue import MODELS
from samples import BACKDOORED
from samples import MODELS as SAMPLES

MODULES = {
    "pytorch": "exporters.pytorch",
    "tensorflow": "exporters.keras_tensorflow",
    "sklearn": "exporters.scikit_learn",
    "matlab": "exporters.matlab",
}
TRAINING_DATA = "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI, CC BY 4.0"


def make(group: str, parts: digits.Parts, folder: Path) -> None:
    """Train and write the models of an environment."""
    module = importlib.import_module(MODULES[group])
    module.write(parts, folder)
    properties = {
        "warning": BACKDOORED,
        "training_data": TRAINING_DATA,
        card.MADE_WITH: version_line(module.VERSIONS),
    }
    for entry in MODELS[group]:
        path = folder / entry.file
        write_model(onnx.load(path, load_external_data=False), path, properties)
        print(entry.file, card.measure(folder, entry))


def main() -> None:
    """Train, export, write the data files; measure once all models are there."""
    options = arguments()
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    parts = digits.load_parts()
    digits.write_data(parts, folder)
    for group in options.groups or MODULES:
        make(group, parts, folder)
    if all((folder / entry.file).exists() for entry in card.ENTRIES):
        card.write(folder)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", choices=MODULES, metavar="GROUP", help=", ".join(MODULES))
    parser.add_argument("--output", type=Path, default=SAMPLES / digits.NAME, help="folder to write the sample into")
    return parser.parse_args()


if __name__ == "__main__":
    main()
