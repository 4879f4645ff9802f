"""How random examples are run: the same few every time, or fresh ones for as long as there is time."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

# A failure names its seed: ONNXCARE_FUZZ_SEED=... runs it again, and nothing else.
_SEED, _SECONDS = "ONNXCARE_FUZZ_SEED", "ONNXCARE_FUZZ_SECONDS"
_ROUND = 100


def same(check: Callable[[Any], None], examples: SearchStrategy[Any], count: int) -> None:
    """Run a check on so many examples, which are the same ones every time."""
    _run(check, examples, count, derandomize=True)


def fresh(check: Callable[[Any], None], examples: SearchStrategy[Any], seconds: float) -> None:
    """Run a check on fresh examples for so many seconds, or as the environment says."""
    given_seed, started = os.environ.get(_SEED), time.monotonic()
    while True:
        seed = secrets.randbelow(1 << 32) if given_seed is None else int(given_seed)
        try:
            _run(check, examples, _ROUND, seed)
        except BaseException as error:
            error.add_note(f"{_SEED}={seed} finds this again")
            raise
        if given_seed is not None or time.monotonic() - started > float(os.environ.get(_SECONDS, seconds)):
            return


def _run(
    check: Callable[[Any], None], examples: SearchStrategy[Any], count: int, seed: int | None = None, **options: Any
) -> None:
    def example(drawn: Any) -> None:
        check(drawn)

    run = given(examples)(example)
    if seed is not None:
        run = hypothesis.seed(seed)(run)
    settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), **options)(
        run
    )()
