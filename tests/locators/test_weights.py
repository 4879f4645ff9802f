"""Rankings of weights: what a unit stands for, what single weights stand for, and what the file makes of a mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from cases import sample_case
from graph.models import SUBJECTS, build, exposing, random, run
from helpers import dense, write_case
from kinds import opened, write

from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.errors import DataError, ModelError
from onnxcare.graph.patch import Patch
from onnxcare.locators import LOCATORS
from onnxcare.locators.differential import vote_weights
from onnxcare.locators.pairs import find_pairs
from onnxcare.locators.select import attribute_sites
from onnxcare.locators.weights import WeightRanking, rank_weights
from onnxcare.repair.bench import changed, matrix_of
from onnxcare.repair.flip import change_of

Array = np.ndarray


def grouped() -> onnx.ModelProto:
    """Return two convolutions, the second one of three groups, and a dense layer without a bias."""
    return build(
        """grouped (float[N, 2, 4, 4] x) => (float[N, 3] y) {
            [conv1] z1 = Conv <pads = [1, 1, 1, 1]> (x, W1, b1)
            [relu1] h1 = Relu (z1)
            [conv2] z2 = Conv <group = 3> (h1, W2, b2)
            [relu2] h2 = Relu (z2)
            [flatten] f = Flatten (h2)
            [dense] y = MatMul (f, W3)
        }""",
        {"W1": random(6, 2, 3, 3), "b1": random(6), "W2": random(9, 2, 2, 2), "b2": random(9), "W3": random(81, 3)},
    )


def errors_of(proto: onnx.ModelProto, folder: Path, input_name: str = "x") -> Case:
    """Return a case on a net, every fifth of its answers called wrong."""
    folder.mkdir(exist_ok=True)
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim[1:]]
    x = random(200, *shape, seed=3)
    scores = run(proto, {input_name: x})[0]
    labels = scores.argmax(axis=1)
    labels[::5] = (labels[::5] + 1) % scores.shape[1]
    whole = Dataset({input_name: x}, labels)
    spec = {"properties": [{"name": "wrong", "kind": "errors"}], "keep": {"recall_drop": 1.0}}
    return opened(write(folder, proto, spec, data=whole.take(slice(140)), holdout=whole.take(slice(140, 200))))


NETS = {"grouped": grouped, **{name: lambda name=name: SUBJECTS[name]().proto for name in ("mlp", "cnn", "keras")}}


@pytest.fixture(scope="module", params=NETS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    proto = NETS[request.param]()
    return errors_of(proto, tmp_path_factory.mktemp("net"), proto.graph.input[0].name)


# -- units ---------------------------------------------------------------------------------------


def test_a_unit_stands_for_all_weights_that_write_it_and_its_bias(case):
    rankings, votes, skipped = rank_weights(case, ("interchange",))
    assert votes == [] and skipped == {}
    found = attribute_sites(case, case.experiment.sites, locators=("interchange",))
    attributions = {item.site.writers: item for item in found}
    assert {(item.layer.name,) for item in rankings} == set(attributions)
    for ranking in rankings:
        layer, units = ranking.layer, attributions[(ranking.layer.name,)].ranking()
        shape = matrix_of(case, layer).shape
        assert ranking.locator == "interchange effect, units"
        assert ranking.step == shape[1] and len(ranking.order) == len(units) * shape[1]
        for count in (1, 2, len(units)):
            mask = ranking.mask(count * ranking.step, shape)
            expected = np.zeros(shape, bool)
            for unit in units[:count]:
                expected[unit // shape[2], :, unit % shape[2]] = True
            np.testing.assert_array_equal(mask, expected)


def test_flipping_what_a_unit_stands_for_flips_its_value_before_activation_and_no_other(case):
    """In the file, by plain sessions: indices of groups, of kernels and of transposed weights are right."""
    rankings, _, _ = rank_weights(case, ("interchange",))
    inputs = case.splits.search.take(slice(5)).inputs
    original = onnx.load(case.experiment.model.path)
    for ranking in rankings:
        layer = ranking.layer
        matrix = matrix_of(case, layer)
        (before,) = run(original, inputs, layer.output)
        for position in (0, 1, len(ranking.order) // ranking.step - 1):
            part = slice(position * ranking.step, (position + 1) * ranking.step)
            alone = WeightRanking(layer, "one unit", ranking.order[part], ranking.step)
            change = change_of(matrix, alone.mask(ranking.step, matrix.shape), "flip")
            data = Patch(changed(case, layer, change)).apply(case.experiment.model)
            (after,) = run(exposing(onnx.load_from_string(data), layer.output), inputs)
            axis = 1 if layer.convolution else before.ndim - 1
            turned = np.moveaxis(after != before, axis, 0).reshape(layer.outputs, -1).any(axis=1)
            (unit,) = np.flatnonzero(turned)
            group, _, output = np.unravel_index(alone.order[0], matrix.shape)
            assert unit == group * matrix.shape[2] + output
            np.testing.assert_allclose(np.take(after, unit, axis), -np.take(before, unit, axis), rtol=1e-4, atol=1e-5)


def test_units_whose_axis_is_not_that_of_a_layer_rank_none_of_its_weights(tmp_path):
    """Two layers write the same sum: each of them has its own columns of it."""
    proto = build(
        """sums (float[N, 4] x) => (float[N, 3] y) {
            [left] a = Gemm (x, W1, b1)
            [right] b = Gemm (x, W2, b2)
            [sum] s = Add (a, b)
            [relu] h = Relu (s)
            [last] y = Gemm (h, W3, b3)
        }""",
        {
            "W1": random(4, 5),
            "b1": random(5),
            "W2": random(4, 5, seed=1),
            "b2": random(5, seed=1),
            "W3": random(5, 3),
            "b3": random(3),
        },
    )
    rankings, _, _ = rank_weights(errors_of(proto, tmp_path), ("causal",))
    assert {item.layer.name for item in rankings} == {"left", "right"}
    assert all(item.step == 5 for item in rankings)
    np.testing.assert_array_equal(rankings[0].order, rankings[1].order)


# -- single weights ------------------------------------------------------------------------------


def test_single_weights_are_those_that_were_voted_for_and_never_a_bias(case):
    rankings, votes, skipped = rank_weights(case, ("differential",))
    single = {item.layer.name: item for item in rankings if item.step == 1}
    by_layer = {item.layer.name: item for item in votes}
    assert set(by_layer) == {layer.name for layer in case.experiment.layers}
    assert set(single) == {name for name, item in by_layer.items() if item.located}
    assert set(skipped) == set(by_layer) - set(single)
    assert single
    for name, ranking in single.items():
        found, shape = by_layer[name], ranking.layer.matrix_shape
        assert ranking.locator == "differential, weights"
        rows = shape[1] - (ranking.layer.bias is not None)
        for size in (1, 3, len(ranking.order)):
            mask = ranking.mask(size, shape)
            assert mask.sum() == min(size, len(ranking.order))
            assert not mask[:, rows:].any()
            expected = np.zeros(found.votes.shape, bool)
            expected.reshape(-1)[found.ranking()[:size]] = True
            np.testing.assert_array_equal(mask[:, :rows], expected)
        np.testing.assert_array_equal(ranking.mask(len(ranking.order), shape)[:, :rows], found.votes > 0)
    # Units are ranked by votes for them, too.
    assert {item.locator for item in rankings if item.step > 1} == {"differential votes, units"}


def test_convolutions_of_a_trained_network_get_votes():
    case = sample_case()
    (second,) = [layer for layer in case.experiment.layers if layer.convolution and layer.inputs > 1]
    found = vote_weights(case, second, find_pairs(case, 4))
    assert found.located > 0 and 0 < found.share < 0.9


def test_shapes_are_those_of_the_matrices(case):
    for layer in case.experiment.layers:
        assert layer.matrix_shape == matrix_of(case, layer).shape


# -- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranked", "step", "shares", "sizes"),
    [
        (100, 1, (0.001, 0.002, 0.01, 0.02, 0.5), [1, 2, 50]),
        (30, 1, (0.1, 0.2, 0.3, 0.5, 1.0), [10, 20, 30]),
        (100, 10, (0.001, 0.1, 0.14, 0.16, 1.0), [10, 20, 100]),
        (40, 10, (0.3, 0.4, 0.9), [30, 40]),
    ],
)
def test_sizes_are_whole_units_of_a_hundred_weights_and_none_beyond_those_ranked(case, ranked, step, shares, sizes):
    ranking = WeightRanking(case.experiment.layers[0], "any", np.arange(ranked), step)
    assert ranking.sizes(shares, 100) == sizes


def test_a_mask_has_the_first_so_many_of_the_order(case):
    ranking = WeightRanking(case.experiment.layers[0], "any", np.array([5, 0, 3]))
    masks = [ranking.mask(size, (1, 2, 3)).astype(int).tolist() for size in (0, 1, 2, 3)]
    assert masks == [
        [[[0, 0, 0], [0, 0, 0]]],
        [[[0, 0, 0], [0, 0, 1]]],
        [[[1, 0, 0], [0, 0, 1]]],
        [[[1, 0, 0], [1, 0, 1]]],
    ]


# -- nothing to rank -----------------------------------------------------------------------------


def test_without_a_pair_it_is_said_that_there_is_none(tmp_path):
    case = opened(write_case(tmp_path, dense(backdoored=False)).spec)
    with pytest.raises(DataError, match="no sample of the data shows seventh and has a reference that does not"):
        rank_weights(case, ("differential",))


def only_layer() -> onnx.ModelProto:
    text = "one (float[N, 4] x) => (float[N, 3] y) { [only] y = Gemm (x, W, b) }"
    return build(text, {"W": random(4, 3), "b": random(3)})


def test_a_model_of_one_layer_has_single_weights_to_rank(tmp_path):
    (ranking,), _, _ = rank_weights(errors_of(only_layer(), tmp_path), ("differential",))
    assert ranking.layer.name == "only" and ranking.step == 1


def test_a_model_without_hidden_units_says_what_cannot_be_located(tmp_path):
    with pytest.raises(ModelError, match="nothing could be located in any layer") as caught:
        rank_weights(errors_of(only_layer(), tmp_path), ("causal",))
    assert not str(caught.value).rstrip().endswith(":")


def test_what_was_located_in_weights_counts_where_no_site_can_be_cut_open(tmp_path):
    """The hidden activations do not fit into the memory; those behind the last layer do."""
    text = """wide (float[N, 4] x) => (float[N, 3] y) {
        [first] z = Gemm (x, W1, b1)
        [relu] h = Relu (z)
        [last] y = Gemm (h, W2, b2)
    }"""
    weights = {"W1": random(4, 4000), "b1": random(4000), "W2": random(4000, 3), "b2": random(3)}
    case = errors_of(build(text, weights), tmp_path)
    case.experiment.memory = 4 << 20
    rankings, _, _ = rank_weights(case, ("differential",))
    assert "last" in {item.layer.name for item in rankings}


def test_every_locator_ranks_the_weights_of_hidden_layers(tiny):
    case = opened(tiny.spec)
    for locator in LOCATORS:
        rankings, _, _ = rank_weights(case, (locator,))
        units = [item for item in rankings if item.step > 1]
        assert [item.layer.name for item in units] == ["first"]
        assert {item.step for item in units} == {9}
    rankings, _, _ = rank_weights(case, LOCATORS)
    assert len({item.locator for item in rankings}) == 4
