"""Differential localisation against the published formulas, written out in numpy, and against edited files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from by_hand import intervened
from graph.models import SUBJECTS, build, exposing, random, run
from helpers import CARRIERS, TARGET, answers, clean_samples, dense, triggered_samples, write_case
from kinds import opened, slopes, write
from onnx import numpy_helper

from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.graph.layers import Layer
from onnxcare.graph.patch import Patch
from onnxcare.graph.sites import Site
from onnxcare.locators.differential import WeightVotes, vote_units, vote_weights
from onnxcare.locators.pairs import Pairs, find_pairs
from onnxcare.repair.bench import changed, matrix_of

Array = np.ndarray

# -- nets, in ONNX and in numpy ------------------------------------------------------------------


def held(proto: onnx.ModelProto, name: str) -> Array:
    (tensor,) = [tensor for tensor in proto.graph.initializer if tensor.name == name]
    return numpy_helper.to_array(tensor).astype(np.float64)


def two_layers(final: str = "Identity", hidden: str = "Relu", transposed: bool = True) -> onnx.ModelProto:
    """Return 6 inputs, 8 hidden units and 4 classes; behind Round there is no derivative."""
    first, turn = random(6, 8), "<transB = 1>" if transposed else ""
    text = f"""net (float[N, 6] x) => (float[N, 4] y) {{
        [first] z1 = Gemm {turn} (x, W1, b1)
        [act] h = {hidden} (z1)
        [second] p = MatMul (h, W2)
        [bias] z = Add (p, b2)
        [scale] v = Mul (z, s)
        [final] y = {final} (v)
    }}"""
    weights = {"W1": first.T.copy() if transposed else first, "b1": 0.5 * random(8), "W2": random(8, 4)}
    scale = np.array(20 if final == "Round" else 1, np.float32)
    return build(text, weights | {"b2": 0.5 * random(4), "s": scale})


def grouped(final: str = "Identity") -> onnx.ModelProto:
    """Return a convolution of two groups with pooling, and a dense layer for 3 classes."""
    text = f"""net (float[N, 2, 5, 5] x) => (float[N, 3] y) {{
        [first] z1 = Conv <group = 2> (x, W1, b1)
        [act] r = Relu (z1)
        [pool] q = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
        [flatten] f = Flatten (q)
        [second] z = Gemm <transB = 1> (f, W2, b2)
        [scale] v = Mul (z, s)
        [final] y = {final} (v)
    }}"""
    weights = {"W1": random(4, 1, 2, 2), "b1": 0.5 * random(4), "W2": 0.5 * random(3, 16), "b2": random(3)}
    return build(text, weights | {"s": np.array(20 if final == "Round" else 1, np.float32)})


def tokens() -> onnx.ModelProto:
    """Return a net that reads 3 tokens by one layer, whose weight is stored transposed, and averages over them."""
    text = """net (float[N, 3, 6] x) => (float[N, 4] y) {
        [turn] T = Transpose <perm = [1, 0]> (W1)
        [first] p1 = MatMul (x, T)
        [bias1] z1 = Add (p1, b1)
        [act] h = Relu (z1)
        [mean] m = ReduceMean <axes = [1], keepdims = 0> (h)
        [second] y = Gemm (m, W2, b2)
    }"""
    return build(text, {"W1": random(8, 6), "b1": random(8), "W2": random(8, 4), "b2": 0.5 * random(4)})


def convolved(x: Array, weight: Array, bias: Array) -> Array:
    """Return the pooled features of one sample of the convolution, float64: plain loops."""
    features = np.zeros((4, 2, 2))
    for channel in range(4):
        z = np.full((4, 4), bias[channel], np.float64)
        for a in range(2):
            for b in range(2):
                z += weight[channel, 0, a, b] * x[channel // 2, a : a + 4, b : b + 4]
        for i in range(2):
            for j in range(2):
                features[channel, i, j] = max(0.0, z[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max())
    return features


def features_of(proto: onnx.ModelProto, x: Array, first: Array) -> Array:
    """Return what the first layer and its activation function make of one sample, with these weights."""
    if first.ndim == 4:
        return convolved(x, first, held(proto, "b1"))
    weight = first.T if first.shape == (8, 6) else first
    return np.maximum(0, x @ weight + held(proto, "b1"))


def case_of(proto: onnx.ModelProto, folder: Path, size: int = 200) -> Case:
    """Return a case on a net, every fifth of its answers called wrong."""
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim[1:]]
    x = random(size, *shape, seed=3)
    answers_now = run(proto, {"x": x})[0]
    labels = answers_now.argmax(axis=1)
    labels[::5] = (labels[::5] + 1) % answers_now.shape[1]
    whole = Dataset({"x": x}, labels)
    spec = {"properties": [{"name": "wrong", "kind": "errors"}], "keep": {"recall_drop": 1.0}}
    part = int(0.7 * size)
    return opened(write(folder, proto, spec, data=whole.take(slice(part)), holdout=whole.take(slice(part, size))))


def pairs_of(case: Case, size: int, seed: int = 11) -> Pairs:
    """Return random samples, each with another one that is answered differently."""
    shape = next(iter(case.experiment.probe.values())).shape[1:]
    x = random(10 * size, *shape, seed=seed)
    decisions = run(case.experiment.model.path, {"x": x})[0].argmax(axis=1)
    wrong, references = [], []
    for row in range(0, 10 * size - 1, 2):
        if decisions[row] != decisions[row + 1] and len(wrong) < size:
            wrong.append(row)
            references.append(row + 1)
    assert len(wrong) == size
    parts = [Dataset({"x": x[rows]}, decisions[rows]) for rows in (wrong, references)]
    return Pairs(case.properties[0], *parts, decisions[references], "by hand")


def one(pairs: Pairs, index: int) -> Pairs:
    rows = slice(index, index + 1)
    return Pairs(pairs.property, pairs.wrong.take(rows), pairs.references.take(rows), pairs.right[rows], pairs.source)


def cross_entropy(scores: Array, right: int) -> float:
    shifted = scores.astype(np.float64) - scores.max()
    return float(np.log(np.exp(shifted).sum()) - shifted[right])


def by_cross_entropy(scores: Array, right: int) -> Array:
    """Return the slope of the cross-entropy by the scores: softmax minus one-hot."""
    p = np.exp(scores.astype(np.float64) - scores.max())
    p /= p.sum()
    p[right] -= 1
    return p


def by_where(case: Case, tensor: str, axis: int, x: Array, reference: Array, right: int) -> Array:
    """Return how far the cross-entropy of one sample moves when a unit takes its value on the reference."""
    units = reference.shape[axis]
    session = intervened(case.experiment.model.path, Site(tensor, axis, units, "", (), ()))

    def asked(unit: int | None) -> float:
        mask = np.zeros(reference.shape, bool)
        if unit is not None:
            mask[:, unit] = True
        (scores,) = session.run(None, {"x": x, "mask": mask, "value": reference})
        return cross_entropy(scores[0], right)

    found = np.array([abs(asked(None) - asked(unit)) for unit in range(units)])
    return found.reshape(-1, *[1] * (reference.ndim - 2))


def expected_scores(case: Case, proto: onnx.ModelProto, pairs: Pairs, smooth: bool) -> tuple[Array, Array]:
    """Return the mean scores of the first layer's weights, in their shape in the file, and of the second's, [d, o]."""
    first = held(proto, "W1")
    behind = held(proto, "W2")
    behind = behind.T if first.ndim == 4 else behind
    features = "q" if first.ndim == 4 else "h"
    totals = [np.zeros(first.shape), np.zeros(behind.shape)]
    for index in range(len(pairs)):
        pair = one(pairs, index)
        x, right = pair.wrong.inputs["x"], int(pair.right[0])
        exposed = exposing(proto, features, "z", "y")
        (now, z, y), (ought, z_ought, _) = (run(exposed, part.inputs) for part in (pair.wrong, pair.references))
        # The second layer has no activation function behind it: its features are its output.
        slope = by_cross_entropy(y[0], right)
        w = np.abs(slope) if smooth else by_where(case, "z", 1, x, z_ought, right)
        w = w / w.max()
        weighted = (z[0] - z_ought[0]) * (w + 0.5)
        last = np.outer(np.abs(now[0].reshape(-1)), np.abs(weighted * (w + 0.5)) / np.linalg.norm(weighted))
        totals[1] += last / last.max() / len(pairs)
        # The first: its features and their importance are held, its weights move.
        w = np.abs((behind @ slope).reshape(now[0].shape)) if smooth else by_where(case, features, 1, x, ought, right)
        w = w / w.max()

        def norms(family: Array, x: Array = x[0], ought: Array = ought[0], w: Array = w) -> Array:
            return np.array([np.linalg.norm((features_of(proto, x, member) - ought) * (w + 0.5)) for member in family])

        hidden = np.abs(slopes(norms, first, 1e-5))
        totals[0] += hidden / hidden.max() / len(pairs)
    return totals[0], totals[1]


# -- weights: scores -----------------------------------------------------------------------------


@pytest.mark.parametrize("final", ["Identity", "Round"])
@pytest.mark.parametrize("make", [two_layers, grouped], ids=["dense", "grouped convolution"])
def test_the_score_of_a_weight_is_the_slope_of_the_reweighted_difference(tmp_path, make, final):
    """Behind Round there is no derivative, so what of a difference matters comes from interventions."""
    proto = make(final)
    case = case_of(proto, tmp_path)
    pairs = pairs_of(case, 6)
    for_first, for_second = expected_scores(case, proto, pairs, smooth=final != "Round")
    first, second = (vote_weights(case, layer, [pairs]) for layer in case.experiment.layers)
    assert first.gradient == second.gradient == (final != "Round")
    np.testing.assert_allclose(second.scores, for_second[None], rtol=1e-3, atol=1e-5)
    if make is grouped:
        assert first.scores.shape == (2, 4, 2)
        for_first = for_first.reshape(2, 2, 4).transpose(0, 2, 1)
    else:
        for_first = for_first.T[None]
    np.testing.assert_allclose(first.scores, for_first, rtol=1e-3, atol=1e-4)
    assert (first.scores.max(), second.scores.max()) <= (1, 1)


def test_weights_in_front_of_a_final_softmax_are_scored_as_if_there_were_none(tmp_path):
    folders = [tmp_path / name for name in ("plain", "softmax")]
    found = []
    for folder, final in zip(folders, ("Identity", "Softmax"), strict=True):
        folder.mkdir()
        case = case_of(two_layers(final), folder)
        pairs = pairs_of(case, 5)
        found.append([vote_weights(case, layer, [pairs]) for layer in case.experiment.layers])
    for plain, softmax in zip(*found, strict=True):
        np.testing.assert_allclose(plain.scores, softmax.scores, atol=1e-5)
        np.testing.assert_array_equal(plain.votes, softmax.votes)


# -- weights: progressive ablation ---------------------------------------------------------------


def tried(size: int) -> list[int]:
    """Return the numbers of weights that 1e-6, 2e-6 ... 0.9 of a layer stand for."""
    shares = [digit * 10.0**power for power in range(-6, 0) for digit in range(1, 10)]
    return sorted({round(share * size) for share in shares} - {0})


def decision_without(case: Case, layer: Layer, order: Array, size: int, x: Array) -> int:
    """Return what the file answers when the first so many weights of an order are zero in it."""
    matrix = matrix_of(case, layer)
    weights = matrix[:, :-1] if layer.bias is not None else matrix
    change = np.zeros(weights.shape)
    change.reshape(-1)[order[:size]] = -weights.reshape(-1)[order[:size]]
    if layer.bias is not None:
        change = np.concatenate([change, np.zeros_like(matrix[:, -1:])], axis=1)
    data = Patch(changed(case, layer, change)).apply(case.experiment.model)
    (scores,) = ort.InferenceSession(data).run(None, {next(iter(case.experiment.probe)): x})
    return int(scores[0].argmax())


@pytest.mark.parametrize("make", [two_layers, tokens, grouped], ids=["dense", "tokens", "grouped convolution"])
@pytest.mark.parametrize("index", [0, 1])
def test_as_many_weights_go_as_bring_the_answer_back_and_no_smaller_number_tried_does(tmp_path, make, index):
    case = case_of(make(), tmp_path)
    layer, pairs = case.experiment.layers[index], pairs_of(case, 8)
    counts = []
    for pair in (one(pairs, row) for row in range(len(pairs))):
        found = vote_weights(case, layer, [pair])
        x, right, size = pair.wrong.inputs["x"], int(pair.right[0]), found.votes.size
        order = np.argsort(-found.scores, axis=None, kind="stable")
        coarse = [count for count in tried(size) if decision_without(case, layer, order, count, x) == right]
        assert found.located == bool(coarse)
        count = int(found.votes.sum())
        counts.append(count)
        if not coarse:
            assert count == 0 and found.share == 0
            continue
        assert set(np.flatnonzero(found.votes)) == set(order[:count])
        assert found.share == count / size
        assert decision_without(case, layer, order, count, x) == right
        # Up to the first share that does it, all are tried; from the last one that does not, ten steps lead there.
        before = max([0, *[smaller for smaller in tried(size) if smaller < coarse[0]]])
        finer = sorted({int(before + step * (coarse[0] - before) / 10) for step in range(1, 11)} - {before})
        assert count in finer
        for smaller in finer[: finer.index(count)]:
            assert decision_without(case, layer, order, smaller, x) != right
    assert max(counts) > min(count for count in counts if count)


def test_votes_are_the_sum_of_what_had_to_go_for_every_pair(tmp_path):
    case = case_of(two_layers(), tmp_path)
    pairs, more = pairs_of(case, 8), pairs_of(case, 4, seed=12)
    for layer in case.experiment.layers:
        found = vote_weights(case, layer, [pairs, more])
        alone = [vote_weights(case, layer, [one(part, row)]) for part in (pairs, more) for row in range(len(part))]
        np.testing.assert_array_equal(found.votes, sum(item.votes for item in alone))
        np.testing.assert_allclose(found.scores, np.mean([item.scores for item in alone], axis=0), rtol=1e-4, atol=1e-6)
        assert found.pairs == 12 and found.located == sum(item.located for item in alone) > 0
        counts = [item.votes.sum() for item in alone if item.located]
        assert found.share == pytest.approx(np.median(counts) / found.votes.size)
        assert found.as_dict() == {
            "layer": layer.name,
            "pairs": 12,
            "located": found.located,
            "median_share": found.share,
            "gradient": True,
        }


def never(case: Case, size: int) -> Pairs:
    """Return pairs of which the answer to be brought back is one that the tiny model cannot give."""
    bad, clean = triggered_samples(size, seed=5), clean_samples(size, seed=5)
    rows = [Dataset({"input": part["input"]}, part["y"]) for part in (bad, clean)]
    return Pairs(case.properties[0], *rows, np.full(size, 3), "by hand")


@pytest.fixture
def never_three(tmp_path: Path) -> Case:
    """The tiny model, but nothing is ever answered with class 3."""
    proto = dense()
    (bias,) = [tensor for tensor in proto.graph.initializer if tensor.name == "second.bias"]
    bias.CopyFrom(numpy_helper.from_array(np.array([0, 0, 0, -100], np.float32), bias.name))
    return opened(write_case(tmp_path, proto).spec)


@pytest.mark.parametrize("index", [0, 1])
def test_a_pair_that_no_share_brings_back_adds_no_vote(never_three, index):
    case = never_three
    layer, hopeless = case.experiment.layers[index], never(case, 6)
    found = vote_weights(case, layer, [hopeless])
    assert (found.located, found.share, found.pairs) == (0, 0, 6)
    assert not found.votes.any() and found.scores.any() and not len(found.ranking())
    (good,) = find_pairs(case, 7)
    alone, both = vote_weights(case, layer, [good]), vote_weights(case, layer, [hopeless, good])
    assert both.located == alone.located == len(good) and both.share == alone.share
    np.testing.assert_array_equal(both.votes, alone.votes)


def test_where_none_of_ten_pairs_is_brought_back_the_others_are_not_asked(never_three):
    case = never_three
    layer = case.experiment.layers[1]
    (good,) = find_pairs(case, 3)
    for hopeless, located in ((9, len(good)), (10, 0)):
        bad = never(case, hopeless)
        parts = [
            Dataset({"input": np.concatenate([a.inputs["input"], b.inputs["input"]])}, None)
            for a, b in ((bad.wrong, good.wrong), (bad.references, good.references))
        ]
        mixed = Pairs(case.properties[0], *parts, np.concatenate([bad.right, good.right]), "by hand")
        assert vote_weights(case, layer, [mixed]).located == located


def test_the_voted_weights_come_most_voted_first_and_equals_by_their_mean_score(tmp_path):
    layer = case_of(two_layers(), tmp_path).experiment.layers[1]
    votes, scores = np.array([[[0, 2, 1], [2, 5, 0]]]), np.array([[[0.9, 0.1, 0.3], [0.2, 0.0, 1.0]]])
    found = WeightVotes(layer, votes, scores, 5, 5, 0.5, True).ranking()
    by_hand = sorted(range(6), key=lambda at: (-votes.reshape(-1)[at], -scores.reshape(-1)[at]))
    assert found.tolist() == [at for at in by_hand if votes.reshape(-1)[at] > 0] == [4, 3, 1, 2]


def test_the_weights_behind_the_carriers_are_voted_for(tiny):
    """In front of them, the weights that read the trigger; behind them, those that speak for the target."""
    case = opened(tiny.spec)
    pairs = find_pairs(case, 30)
    first, second = (vote_weights(case, layer, pairs) for layer in case.experiment.layers)
    for found, best in ((first, [(0, 7, unit) for unit in CARRIERS]), (second, [(0, u, TARGET) for u in CARRIERS])):
        assert found.located == found.pairs == 30
        top = found.ranking()[:3]
        assert {tuple(map(int, at)) for at in zip(*np.unravel_index(top, found.votes.shape), strict=True)} == set(best)


# -- networks with steps -------------------------------------------------------------------------


def stepped(folder: Path) -> Case:
    """Return the tiny case with signs for hidden activations: nothing in front of them has a derivative."""
    proto = dense()
    proto.graph.node[1].op_type = "Sign"
    paths = write_case(folder, proto)
    for path, seed in ((paths.data, 1), (paths.holdout, 2)):
        x = clean_samples(600, seed)["input"]
        np.savez(path, input=x, y=answers(proto, x))
    return opened(paths.spec)


@pytest.mark.parametrize("index", [0, 1])
def test_weights_in_front_of_steps_and_behind_them_are_voted_for(tmp_path, index):
    case = stepped(tmp_path)
    layer = case.experiment.layers[index]
    pairs = find_pairs(case, 9)
    found = vote_weights(case, layer, pairs)
    assert found.gradient == (index == 1)
    assert np.isfinite(found.scores).all() and found.scores.any()
    assert found.located > 0
    for row in range(len(pairs[0])):
        pair = one(pairs[0], row)
        alone = vote_weights(case, layer, [pair])
        order, count = np.argsort(-alone.scores, axis=None, kind="stable"), int(alone.votes.sum())
        if count:
            assert decision_without(case, layer, order, count, pair.wrong.inputs["input"]) == pair.right[0]


# -- units ---------------------------------------------------------------------------------------


def units_tried(live: int) -> list[int]:
    return [count for count in (1, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100) if count < live] + [live]


def voted_by_loop(case: Case, site: Site, pairs: Pairs, importance: list[Array], dead: Array) -> tuple[Array, Array]:
    """Return votes as shares and mean scores of a site's units: a Where puts the reference's values in their place."""
    path = case.experiment.model.path
    session, votes, scores = intervened(path, site), np.zeros(site.units), np.zeros(site.units)
    name = next(iter(case.experiment.probe))
    for index in range(len(pairs)):
        pair = one(pairs, index)
        (now,), (ought,) = (run(onnx.load(path), part.inputs, site.tensor) for part in (pair.wrong, pair.references))
        w = importance[index] / importance[index].max()
        weighted = (now[0] - ought[0]) * (w + 0.5)
        norms = np.array([np.linalg.norm(unit) for unit in weighted])
        order = np.argsort(-norms, kind="stable")
        scores += norms / norms.max() / len(pairs)
        for count in units_tried(int((~dead).sum())):
            mask = np.zeros(now.shape, bool)
            mask[:, order[:count]] = True
            (answer,) = session.run(None, {name: pair.wrong.inputs[name], "mask": mask, "value": ought})
            if answer[0].argmax() == pair.right[0]:
                votes[order[:count]] += 1 / len(pairs)
                break
    return votes, scores


def behind(proto: onnx.ModelProto, tensor: str, x: Array, right: int, step: float = 1e-2) -> Array:
    """Return the size of the slope of the cross-entropy by a tensor, by hand through what lies behind it."""
    if tensor == "h1":
        h2, scores = run(proto, {"x": x}, "h2", "scores")
        at_h2 = held(proto, "W3") @ by_cross_entropy(scores[0], right)
        return np.abs(held(proto, "W2") @ (at_h2 * (h2[0] > 0)))
    value, scores = run(proto, {"x": x}, tensor, "scores")
    weight = held(proto, "W3")
    weight = weight.T if value.ndim == 4 else weight
    return np.abs((weight @ by_cross_entropy(scores[0], right)).reshape(value.shape[1:]))


@pytest.mark.parametrize(("name", "tensor"), [("mlp", "h1"), ("mlp", "h2"), ("cnn", "q2")])
def test_the_votes_for_units_equal_a_loop_over_interventions_on_the_whole_model(tmp_path, name, tensor):
    proto = SUBJECTS[name]().proto
    case = case_of(proto, tmp_path)
    (site,) = [site for site in case.experiment.sites if site.tensor == tensor]
    pairs = pairs_of(case, 15)
    clean = case.splits.repair
    found = vote_units(case.experiment, site, clean, pairs)
    importance = [
        behind(proto, tensor, pairs.wrong.inputs["x"][row : row + 1], int(pairs.right[row]))
        for row in range(len(pairs))
    ]
    values = [run(proto, part.inputs, tensor)[0] for part in (clean, pairs.wrong, pairs.references)]
    moved = np.moveaxis(np.concatenate(values), 1, 0).reshape(site.units, -1)
    np.testing.assert_array_equal(found.dead, np.ptp(moved, axis=1) == 0)
    votes, scores = voted_by_loop(case, site, pairs, importance, found.dead)
    assert len(np.unique(votes)) > 2
    np.testing.assert_allclose(found.scores, np.where(found.dead, 0, votes + scores / (2 * len(pairs))), atol=1e-4)
    # The order is that of the votes, and of the scores among those with as many.
    live = np.flatnonzero(~found.dead)
    assert found.ranking().tolist() == sorted(live, key=lambda unit: (-round(votes[unit] * 15), -scores[unit]))
    assert (found.locator, found.samples) == ("differential votes", 15)


def test_the_votes_for_units_in_front_of_steps_rest_on_interventions(tmp_path):
    proto = two_layers("Round")
    case = case_of(proto, tmp_path)
    (site,) = case.experiment.sites
    pairs = pairs_of(case, 12)
    found = vote_units(case.experiment, site, case.splits.repair, pairs)
    importance = []
    for row in range(len(pairs)):
        pair = one(pairs, row)
        (ought,) = run(proto, pair.references.inputs, "h")
        importance.append(by_where(case, "h", 1, pair.wrong.inputs["x"], ought, int(pair.right[0])))
    votes, scores = voted_by_loop(case, site, pairs, importance, found.dead)
    np.testing.assert_allclose(found.scores, np.where(found.dead, 0, votes + scores / 24), atol=1e-4)


def test_the_carriers_of_the_backdoor_win(tiny):
    case = opened(tiny.spec)
    (site,) = case.experiment.sites
    (pairs,) = find_pairs(case, 25)
    found = vote_units(case.experiment, site, case.splits.repair, pairs)
    assert set(found.ranking()[:3]) == set(CARRIERS)
    # They alone have to go, and they do for every pair; nothing else differs between a sample and its twin.
    others = np.setdiff1d(np.arange(site.units), CARRIERS)
    assert (found.scores[list(CARRIERS)] >= 1).all() and (found.scores[others] == 0).all()


def test_dead_units_get_no_score(tmp_path):
    proto = dense()
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, rows in (("first.weight", (4, 13)), ("first.bias", (4, 13))):
        values = numpy_helper.to_array(weights[name]).copy()
        values[list(rows)] = 0
        weights[name].CopyFrom(numpy_helper.from_array(values, name))
    case = opened(write_case(tmp_path, proto).spec)
    (site,) = case.experiment.sites
    (pairs,) = find_pairs(case, 25)
    found = vote_units(case.experiment, site, case.splits.repair, pairs)
    assert np.flatnonzero(found.dead).tolist() == [4, 13]
    assert (found.scores[[4, 13]] == 0).all()
    assert set(found.ranking()[:2]) == {12, 14}
