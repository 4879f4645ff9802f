"""Random models: looked at, put on the operating table, intervened on and patched, against the model edited by hand."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from corpus.survey import aligned
from fuzz.graphs import Drawn
from fuzz.operate import examine
from fuzz.rounds import fresh, same
from fuzz.steps import models


class Examined:
    """A check of one random model after another, and what could be done with them."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def __call__(self, drawn: Drawn) -> None:
        with tempfile.TemporaryDirectory() as folder:
            examine(drawn, Path(folder), self.seen)

    def check(self) -> None:
        """Make sure that most models were not refused: refusals are no proof of anything."""
        assert self.seen["operated"] > 0.9 * self.seen["models"]
        assert min(self.seen[what] for what in ("layers", "sites", "folded")) > self.seen["models"] / 3

    def table(self) -> str:
        return aligned([["random models", ""], *([what, str(count)] for what, count in self.seen.most_common())])


def test_random_models(record_property) -> None:  # type: ignore[no-untyped-def]
    examined = Examined()
    same(examined, models(), 180)
    record_property("table", examined.table())
    examined.check()


@pytest.mark.slow
def test_many_random_models(record_property) -> None:  # type: ignore[no-untyped-def]
    examined = Examined()
    fresh(examined, models(), seconds=240)
    record_property("table", examined.table())
    examined.check()
