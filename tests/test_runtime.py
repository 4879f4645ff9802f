"""Sessions: inputs that stay where runs are."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graph.models import SUBJECTS, build, random

from onnxcare.errors import DataError, ModelError
from onnxcare.runtime import Budget, Session, batches


@pytest.fixture(params=["mlp", "residual", "mlp-float64"])
def subject(request: pytest.FixtureRequest):
    return SUBJECTS[request.param]()


def test_inputs_that_are_bound_give_what_arrays_give(subject) -> None:
    """On a GPU, what many runs share is sent once and bound; here the same way is taken on the CPU."""
    session = Session(subject.proto)
    x = subject.samples(5)
    expected = session.run(x)
    bound = {name: ort.OrtValue.ortvalue_from_numpy(values) for name, values in x.items()}
    for one, other in zip(session.run(bound), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    last = [session.outputs[-1][0]]
    np.testing.assert_array_equal(session.run(bound, last)[0], expected[-1])


def test_shared_inputs_are_laid_out_for_the_device(subject) -> None:
    session = Session(subject.proto)
    x = {name: values[::-1] for name, values in subject.samples(5).items()}
    for name, values in session.resident(x).items():
        assert values.flags.c_contiguous
        np.testing.assert_array_equal(values, x[name])


def test_a_bound_run_that_fails_names_the_model(subject) -> None:
    session = Session(subject.proto, what="some.onnx")
    wrong = {name: ort.OrtValue.ortvalue_from_numpy(random(2, 3)) for name in subject.samples(1)}
    with pytest.raises(ModelError, match=r"^some\.onnx: onnxruntime failed"):
        session.run(wrong)


@pytest.mark.gpu
def test_shared_inputs_stay_on_the_gpu(subject) -> None:
    session = Session(subject.proto, "cuda")
    x = subject.samples(5)
    resident = session.resident(x)
    assert {value.device_name() for value in resident.values()} == {"cuda"}
    for one, other in zip(session.run(resident), Session(subject.proto).run(x), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_pieces_of_any_size_give_the_same(subject) -> None:
    session = Session(subject.proto)
    x = subject.samples(7)
    expected = session.run(x)
    for rows in (1, 2, 3, 7, 100):
        for one, other in zip(session.run_rows(x, rows_per_run=rows), expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("length", [10, 200, 3000, 1_000_000])
def test_an_operator_with_a_name_of_any_length_is_refused_at_once(length: int) -> None:
    proto = build("g (float[N] x) => (float[N] y) { [node] y = Relu (x) }")
    proto.graph.node[0].op_type, proto.graph.node[0].domain = "a" * length, "com.acme"
    proto.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
    with pytest.raises(ModelError, match=r"^some\.onnx: onnxruntime has no kernel for operator aaa") as refused:
        Session(proto, what="some.onnx")
    assert len(str(refused.value)) < 400
    assert length > 200 or f" {'a' * length} of domain com.acme;" in str(refused.value)


def test_no_rows_are_refused(subject) -> None:
    session = Session(subject.proto, what="some.onnx")
    with pytest.raises(DataError, match=r"some\.onnx: no rows to run on"):
        session.run_rows({name: values[:0] for name, values in subject.samples(1).items()})


def test_runs_side_by_side_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcare.runtime.cores", lambda: 4)
    assert Budget(memory=4000, row=10).rows() == 100
    assert Budget(memory=4, row=10).rows() == 1
    assert Budget(memory=1 << 60, row=1 << 10).rows() == 8 << 10
    assert Budget(memory=1 << 60, row=1 << 20).rows() == 16
    assert Budget(memory=1 << 60, row=1 << 24).rows() == 2
    assert list(batches(5, 2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
