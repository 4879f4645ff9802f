"""Interventions on a whole model, made by hand with a Where node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from onnxcare.graph.sites import Site


def intervened(path: Path, site: Site) -> ort.InferenceSession:
    """Return the whole model with a Where in front of everything that reads the site, made by hand."""
    model = onnx.load(path)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == site.tensor:
                node.input[index] = "forced"
    position = next(i for i, node in enumerate(model.graph.node) if site.tensor in node.output)
    where = onnx.helper.make_node("Where", ["mask", "value", site.tensor], ["forced"])
    model.graph.node.insert(position + 1, where)
    model.graph.input.append(onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.BOOL, None))
    model.graph.input.append(onnx.helper.make_tensor_value_info("value", onnx.TensorProto.FLOAT, None))
    return ort.InferenceSession(model.SerializeToString())


def unit_mask(site: Site, unit: int) -> np.ndarray:
    """Return a mask that is true for one unit and broadcasts to the site."""
    rank = 4 if site.kind == "channel" else 2
    mask = np.zeros([site.units if axis == site.axis % rank else 1 for axis in range(rank)], bool)
    mask.reshape(-1)[unit] = True
    return mask
