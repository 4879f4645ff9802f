"""What methods say they can change, compared with what they do change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import SUBJECTS, Subject, build, random, run
from kinds import opened, write

from onnxcare import repair
from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.errors import ModelError
from onnxcare.graph.anatomy import Anatomy, anatomy_of
from onnxcare.graph.model import load_model
from onnxcare.repair import care, clp, fine_pruning, network_finetune, pruning


def case_of(subject: Subject, folder: Path) -> Case:
    """Return a case in which errors of a random model are to be mended."""
    rows = subject.samples(200)
    scores = run(subject.proto, rows, subject.logits)[0]
    labels = scores.argmax(axis=1)
    labels[::5] = (labels[::5] + 1) % scores.shape[1]
    whole = Dataset(rows, labels)
    spec = {"properties": [{"name": "wrong", "kind": "errors"}], "keep": {"recall_drop": 1.0}}
    data, holdout = whole.take(slice(0, 150)), whole.take(slice(150, 200))
    return opened(write(folder, subject.proto, spec, data=data, holdout=holdout))


def branches(first: str, second: str) -> Subject:
    """Return a dense network of two branches, each with a step of its own between two layers."""
    proto = build(
        f"""branches (float[N, 6] x) => (float[N, 4] scores) {{
            [stem] z = Gemm (x, W0, b0)
            [relu] h = Relu (z)
            [left_1] l1 = MatMul (h, W1)
            [left_step] l2 = {first} (l1)
            [left_2] l3 = MatMul (l2, W2)
            [right_1] r1 = MatMul (h, W3)
            [right_step] r2 = {second} (r1)
            [right_2] r3 = MatMul (r2, W4)
            [both] scores = Add (l3, r3)
        }}""",
        {"W0": random(6, 8), "b0": random(8)}
        | {name: random(*shape) for name, shape in {"W1": (8, 5), "W2": (5, 4), "W3": (8, 5), "W4": (5, 4)}.items()},
    )
    return Subject(proto, "x", (6,), "scores", np.float32)


def tied() -> Subject:
    """Return a dense network in which two layers share a weight."""
    proto = build(
        """tied (float[N, 8] x) => (float[N, 4] scores) {
            [one] z1 = Gemm (x, W, b)
            [relu1] h1 = Relu (z1)
            [two] z2 = Gemm (h1, W)
            [relu2] h2 = Relu (z2)
            [three] scores = Gemm (h2, V, c)
        }""",
        {"W": random(8, 8), "b": random(8), "V": random(8, 4), "c": random(4)},
    )
    return Subject(proto, "x", (8,), "scores", np.float32)


def recurrent(step: str) -> Subject:
    """Return embedded steps through an LSTM, with a step of its own between a normalisation and the last layer."""
    proto = build(
        f"""recurrent (float[N, 6] x) => (float[N, 4] scores) {{
            [spread] s = Unsqueeze (x, axis)
            [lstm] y, h, c = LSTM <hidden_size = 5> (s, W, R, B)
            [last] l = Squeeze (h, axis)
            [norm] n = LayerNormalization (l, g, t)
            [step] q = {step} (n)
            [dense] scores = Gemm (q, V, b)
        }}""",
        {"axis": np.array([0]), "W": random(1, 20, 6), "R": random(1, 20, 5), "B": random(1, 40)}
        | {"g": random(5), "t": random(5), "V": random(5, 4), "b": random(4)},
    )
    return Subject(proto, "x", (6,), "scores", np.float32)


CASES = {
    **{name: SUBJECTS[name] for name in ("mlp", "cnn", "residual", "keras")},
    "no derivative on the left": lambda: branches("Sign", "Tanh"),
    "no derivative on either side": lambda: branches("Ceil", "Floor"),
    "tied": tied,
    "recurrent": lambda: recurrent("Tanh"),
    "recurrent, no derivative": lambda: recurrent("Sign"),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(CASES[request.param](), tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def anatomy(case: Case) -> Anatomy:
    form = case.experiment.form
    return Anatomy(form.view, form.parameters, case.experiment.layers, case.experiment.sites)


def able(method: str, anatomy: Anatomy) -> set[str]:
    return {layer.name for layer in anatomy.layers if repair.hindrances(anatomy, layer)[method] is None}


def test_fine_tuning_reaches_the_weights_that_it_says(case: Case, anatomy: Anatomy) -> None:
    tuned = {parameter.name for parameter in network_finetune._network(case).parameters}
    assert able("fine-tuning", anatomy) == {layer.name for layer in anatomy.layers if layer.weight.name in tuned}
    others = {item.name for item in anatomy.weights if {held.name for held in item.parameters} & tuned}
    beside = {anatomy.view.label(anatomy.view.producer[name]) for name in network_finetune.beside_layers(anatomy)}
    assert beside == others


def test_multipliers_are_folded_into_the_layers_that_it_says(case: Case, anatomy: Anatomy) -> None:
    changed = set()
    for site in anatomy.sites:
        if care.hindrance_at(site) is None:
            changed |= {parameter.name for parameter in care.fold(case, site, np.full(site.units, 2.0))}
    assert able("care", anatomy) == {layer.name for layer in anatomy.layers if layer.weight.name in changed}


def test_channels_are_pruned_where_it_says(case: Case, anatomy: Anatomy) -> None:
    try:
        layers, skipped = pruning.prunable(case)
    except ModelError:
        layers, skipped = [], {}
    assert able("clp", anatomy) == {layer.name for layer in layers}
    for layer in anatomy.layers:
        assert skipped.get(layer.name) in (None, repair.hindrances(anatomy, layer)["clp"])
    tuned = set(network_finetune.beside_layers(anatomy))
    for method, module in (("clp", clp), ("fine-pruning", fine_pruning)):
        pruned = layers if method == "clp" else layers[-1:]
        values = pruning.pruned(case, {layer: np.arange(layer.outputs) for layer in pruned})
        own = {item.name for layer in pruned for item in (layer.weight, layer.bias) if item is not None}
        users = {user for parameter in values if parameter.name not in own for user in parameter.users}
        view = anatomy.view
        written = set(module.beside_layers(anatomy)) - (tuned if method == "fine-pruning" else set())
        beside = {view.label(view.producer[name]) for name in written if name}
        assert beside == users


def test_what_changes_whole_layers_changes_all_that_are_open(case: Case, anatomy: Anatomy) -> None:
    whole = {layer.name for layer in case.experiment.open_layers}
    for method in ("ai-lancet-flip", "ai-lancet-finetune"):
        assert able(method, anatomy) == whole
    # Weights that layers share move together, by gradient.
    assert able("auto", anatomy) == whole | able("fine-tuning", anatomy)


def test_reasons_name_what_is_in_the_way(anatomy: Anatomy) -> None:
    names = {name for node in anatomy.view.nodes for name in (node.name, *node.input, *node.output)}
    general = ("channels of convolutions are pruned", "no other layer reads its units", "no channel of the model")
    for layer in anatomy.layers:
        for reason in filter(None, repair.hindrances(anatomy, layer).values()):
            assert reason.startswith(general) or any(name in reason for name in names), reason


def test_a_site_can_be_changed_through_the_layers_around_it(anatomy: Anatomy) -> None:
    for site in anatomy.sites:
        around = {*site.writers, *(layer.name for layer in site.readers)}
        for method, reason in repair.hindrances_at(anatomy, site).items():
            expected = site.refusal is None if method == "care" else bool(able(method, anatomy) & around)
            assert (reason is None) == expected


def test_operators_of_other_domains_have_no_known_derivative(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        foreign (float[N, 4] x) => (float[N, 4] y) {
            [first] h = MatMul (x, W)
            [step] g = com.microsoft.Gelu (h)
            [second] y = MatMul (g, V)
        }"""
    )
    for name in ("W", "V"):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(random(4, 4), name))
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    found = anatomy_of(load_model(path))
    first, second = (network_finetune.hindrance(found, layer) for layer in found.layers)
    assert first == "Gelu 'step' of domain com.microsoft has no known derivative" and second is None
