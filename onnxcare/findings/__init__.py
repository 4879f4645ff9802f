"""Static findings: what a model file alone tells, without data and without running it.

They are a gate in front of a deployment, and work on files that onnxcare refuses to load. Only
`optimisation_findings` runs the model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from onnxcare.findings.base import Level, Rule, StaticFinding, limited
from onnxcare.findings.files import external_data, load_small, not_text, read
from onnxcare.findings.operators import custom_domains
from onnxcare.findings.optimisation import optimisation_findings
from onnxcare.findings.switches import input_switches
from onnxcare.findings.tensors import duplicate_initializers, non_finite, two_value_fields, unused_initializers
from onnxcare.findings.walk import all_text, scopes, tensors

__all__ = ["RULES", "Level", "Rule", "StaticFinding", "optimisation_findings", "static_findings"]

RULES: tuple[Rule, ...] = (
    Rule(
        "not-onnx",
        "error",
        "The file is no ONNX model",
        "The file cannot be read or parsed. Export or download it again.",
    ),
    Rule(
        "no-graph",
        "error",
        "The model holds no graph",
        "The file can be parsed, but holds no nodes: another kind of file, or a damaged one. Export or download it "
        "again.",
    ),
    Rule(
        "two-value-fields",
        "error",
        "A tensor carries its values twice",
        "Some readers take raw_data, others the typed field, others the external file. A model that looks harmless to "
        "a scanner can so behave differently at work. Exporters never write this.",
    ),
    Rule(
        "external-data-outside",
        "error",
        "External data lies outside the model's folder",
        "An absolute path, a path with '..' or a link makes whoever loads the model read a file that did not come "
        "with it. Put the data beside the model under a plain name.",
    ),
    Rule(
        "external-data-missing",
        "error",
        "External data is missing",
        "A file that holds weights is not there, is too short, or is referred to in a damaged way. Copy it along with "
        "the model.",
    ),
    Rule(
        "input-switch",
        "error",
        "The graph switches on raw input values",
        "A comparison of input values with constants decides, with no learned layer in between, what the model "
        "answers. Backdoors are built like this; they are in the graph and not in the weights, and repairing weights "
        "cannot cure them. Find out what the test is for. It is a warning where preprocessing may explain it, and a "
        "note for masks and for inputs that are options. The search is no proof: tests behind a learned layer and "
        "tests folded into weights are not found.",
    ),
    Rule(
        "not-checked",
        "error",
        "The graph could not be checked for switches",
        "Functions and branches nested in each other stand for more nodes than can be followed. No exporter writes "
        "this.",
    ),
    Rule(
        "custom-domain",
        "warning",
        "Operators that are not part of ONNX",
        "Custom operators need a library of native code; load it only from a source you trust. It is a note for "
        "operators that onnxruntime brings along.",
    ),
    Rule(
        "non-finite-weights",
        "error",
        "Weights are NaN or infinite",
        "Layers with such weights answer NaN or infinity. It is a note for constants that no layer takes as weights, "
        "such as masks and bounds.",
    ),
    Rule(
        "duplicate-initializer",
        "warning",
        "Two initializers have one name",
        "Readers disagree about which of them counts. Export the model again.",
    ),
    Rule(
        "unused-initializer",
        "note",
        "An initializer is read by no node",
        "It does no harm, but makes the file larger and can hold anything.",
    ),
    Rule(
        "optimisation-difference",
        "error",
        "onnxruntime's optimisations change the answers",
        "The model answers differently with and without onnxruntime's graph optimisations: a fault of an optimisation, "
        "or a model that is numerically unstable. It is a warning where no decision changes. Deploy with "
        "the setting under which the model was tested, or with another version of onnxruntime.",
    ),
)


def static_findings(path: Path) -> list[StaticFinding]:
    """Return what a file tells without being run, rule by rule; an empty list for an inconspicuous model."""
    proto = read(path)
    if isinstance(proto, StaticFinding):
        return [proto]
    with np.errstate(all="ignore"):  # weights may be anything, signalling NaN included
        return _findings(proto, path)


def _findings(proto: onnx.ModelProto, path: Path) -> list[StaticFinding]:
    found = scopes(proto)
    if not all_text(proto, found):
        return [not_text()]
    held = list(tensors(proto, found))
    as_filed = [*two_value_fields(held), *external_data(held, path)]
    load_small(held, path.parent)
    return limited(
        [
            *as_filed,
            *input_switches(proto),
            *custom_domains(proto, found),
            *non_finite(held, found, path.parent),
            *duplicate_initializers(found),
            *unused_initializers(found),
        ]
    )
