"""Forcing units through the layer that reads them, against forcing them at the site itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graph.models import SUBJECTS, Array, attention, random
from graph.operating import W1, Sent, assert_close, assert_identical, dense_subject, operate

from onnxcare.experiment import Experiment
from onnxcare.graph.sites import Site
from onnxcare.sweep import Sweep, spread_units

SIZE = 7


@pytest.fixture(scope="module", params=[*SUBJECTS, "attention"])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, dict]:
    subject = (SUBJECTS | {"attention": attention})[request.param]()
    return operate(subject, tmp_path_factory.mktemp("model")), subject.samples(SIZE)


def at_the_site(experiment: Experiment, site: Site, x: dict[str, Array], units: Array, reference: Array) -> Array:
    """Return the scores [P, N, classes] with units[p] taken from a reference [P, N or 1, ...]."""
    suffix = experiment.suffix(site.tensor, "affine")
    at = suffix.cache(x)
    keep = np.ones((len(units), site.units))
    keep[np.arange(len(units)), units] = 0
    return suffix.affine(at, spread_units(keep, site, at.base.ndim - 1), reference)


def assert_forced(experiment: Experiment, x: dict[str, Array]) -> None:
    """Check that forcing a unit is replacing its values at the site."""
    assert experiment.sites
    for site in experiment.sites:
        units, values = np.arange(site.units), random(site.units, 3, seed=5, dtype=np.float64)
        sweep = Sweep(experiment, site)
        found = sweep.force(sweep.hold(x), units, values)
        rank = experiment.tensors([site.tensor], x)[0].ndim - 1
        reference = spread_units(np.repeat(values.reshape(-1, 1), site.units, axis=1), site, rank)
        expected = at_the_site(experiment, site, x, np.repeat(units, 3), reference)
        assert_close(found, expected.reshape(found.shape))


def test_forcing_a_unit_is_replacing_its_values_at_the_site(table: tuple[Experiment, dict]) -> None:
    assert_forced(*table)


def test_a_unit_is_forced_through_weights_that_are_made_while_the_model_runs(tmp_path: Path) -> None:
    nodes = "h = Gemm (x, W1) V = ConstantOfShape <value = float[1] {0.5}> (s) y = Gemm (h, V)"
    subject = dense_subject(nodes, {"W1": W1, "s": np.int64([8, 4])})
    assert_forced(operate(subject, tmp_path), subject.samples(SIZE))


def test_exchanging_a_unit_is_taking_its_values_from_other_samples(table: tuple[Experiment, dict]) -> None:
    experiment, x = table
    other = {name: values[::-1].copy() for name, values in x.items()}
    for site in experiment.sites:
        units = np.arange(site.units)
        sweep = Sweep(experiment, site)
        found = sweep.exchange(sweep.hold(x), sweep.hold(other), units)
        (reference,) = experiment.tensors([site.tensor], other)
        assert_close(found, at_the_site(experiment, site, x, units, reference[None]))


@pytest.mark.parametrize("width", [8, 1])
def test_a_unit_is_forced_at_the_site_where_the_reader_has_the_samples_on_another_axis(
    width: int, tmp_path: Path
) -> None:
    nodes = "h = Gemm (x, W1) t = Transpose <perm = [1, 0]> (h) y = Gemm <transA = 1> (t, V)"
    subject = dense_subject(nodes, {"W1": random(6, width), "V": random(width, 4, seed=1)})
    assert_forced(operate(subject, tmp_path), subject.samples(SIZE))


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 40, 1000])
@pytest.mark.parametrize("name", ["mlp", "residual", "keras"])
def test_any_size_of_a_run_gives_the_same(name: str, rows: int, tmp_path: Path, monkeypatch) -> None:
    subject = SUBJECTS[name]()
    (tmp_path / "pieces").mkdir()
    whole, pieces = operate(subject, tmp_path), operate(subject, tmp_path / "pieces")
    monkeypatch.setattr(pieces, "rows_of", lambda part: rows)
    x = subject.samples(SIZE)
    for one, other in zip(whole.sites, pieces.sites, strict=True):
        units, values = np.arange(one.units), random(one.units, 4, seed=6)
        found = [sweep.force(sweep.hold(x), units, values) for sweep in (Sweep(whole, one), Sweep(pieces, other))]
        assert_close(found[1], found[0])


def test_samples_that_do_not_fit_come_piece_by_piece_and_whole_cases(tmp_path: Path) -> None:
    subject = SUBJECTS["mlp"]()
    x = subject.samples(10)
    site = operate(subject, tmp_path).sites[0]
    (tmp_path / "poor").mkdir()
    one = operate(subject, tmp_path).tensors([site.readers[0].output], x)[0][0].nbytes
    sweep = Sweep(operate(subject, tmp_path / "poor", memory=4 * one * 5), site)
    pieces = list(sweep.pieces(x, multiple=2))
    assert [rows.stop - rows.start for rows, _ in pieces] == [4, 4, 2]
    assert_close(
        np.concatenate([held.site for _, held in pieces]), operate(subject, tmp_path).tensors([site.tensor], x)[0]
    )


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_forcing_that_travels_answers_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = SUBJECTS[name]()
    experiment, x = operate(subject, tmp_path), subject.samples(SIZE)
    other = {key: values[::-1].copy() for key, values in x.items()}
    monkeypatch.setattr(experiment, "rows_of", lambda part: 5)

    def answers() -> list[Array]:
        found = []
        for site in experiment.sites:
            units, sweep = np.arange(site.units), Sweep(experiment, site)
            held = sweep.hold(x)
            found.append(sweep.force(held, units, random(site.units, 3, seed=7)))
            found.append(sweep.exchange(held, sweep.hold(other), units))
        return found

    alone = answers()
    experiment.pool = sent = Sent()
    for shared, expected in zip(answers(), alone, strict=True):
        assert_identical(shared, expected)
    assert sent.jobs >= 2 * sum(site.units for site in experiment.sites)
