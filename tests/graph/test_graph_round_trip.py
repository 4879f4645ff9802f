"""Every model of onnx's own operator tests: looking at it never fails, and writing nothing changes nothing."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcare.graph import wire
from onnxcare.graph.layers import find_layers
from onnxcare.graph.parameters import find_parameters
from onnxcare.graph.sites import find_sites
from onnxcare.graph.storage import Source
from onnxcare.graph.view import GraphView


@functools.cache
def models() -> list[tuple[str, onnx.ModelProto]]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return [(case.name, case.model) for case in collect_testcases(None) if case.model is not None]


def look_through(name: str, proto: onnx.ModelProto) -> None:
    data = proto.SerializeToString()
    read = onnx.ModelProto.FromString(data)
    view = GraphView(read)
    layers = find_layers(view)
    for site in find_sites(view, layers):
        assert site.units > 0, name
    for parameter in find_parameters(view).values():
        tensor = Source(read, Path()).message(parameter.path)
        assert tuple(tensor.dims) == parameter.shape, name
        same = wire.splice(data, {parameter.path: tensor.SerializeToString()})
        assert onnx.ModelProto.FromString(same) == read, name
    assert wire.splice(data, {}) == data, name


def test_every_tenth_operator_test() -> None:
    chosen = models()[::10]
    assert len(chosen) > 100
    for name, proto in chosen:
        look_through(name, proto)


@pytest.mark.slow
def test_every_operator_test() -> None:
    for name, proto in models():
        look_through(name, proto)
