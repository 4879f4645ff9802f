"""Jobs for workers. They lie in a module of their own, which every worker can import, wherever a test was started."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from onnxcare.errors import ModelError

Array = np.ndarray

# Large enough to tell a job that carries the payload from one that does not.
PAYLOAD = np.random.default_rng(1).normal(size=20_000)
BITS = PAYLOAD.nbytes

MADE: list[int] = []
GATE = threading.Event()


def scale(payload: Array) -> Callable[[Array], tuple[int, int, Array]]:
    """Return a runner that says which process it is in and how many runners were made there."""
    MADE.append(len(payload))
    return lambda factors: (os.getpid(), len(MADE), payload[: len(factors)] * factors)


class Scaling:
    """A runner that travels as it is, and says which process it is in."""

    def __init__(self, payload: Array) -> None:
        self.payload = payload

    def __call__(self, factors: Array, shift: float) -> tuple[int, Array]:
        return os.getpid(), self.payload[: len(factors)] * factors + shift


def double(payload: bytes) -> Callable[[int], int]:
    return lambda number: 2 * number


def nap(payload: bytes) -> Callable[[int], int]:
    def run(number: int) -> int:
        time.sleep(0.002)
        return number

    return run


def where(payload: bytes) -> Callable[[], int]:
    def run() -> int:
        time.sleep(0.01)
        return os.getpid()

    return run


def tally(payload: bytes) -> Callable[[], tuple[int, int]]:
    calls = itertools.count()
    return lambda: (os.getpid(), next(calls))


def die(flag: str) -> Callable[[int], int]:
    """Return a runner that kills its process on job 7: once where a file is named, whenever it comes elsewhere."""

    def run(number: int) -> int:
        time.sleep(0.01)
        if number == 7 and not (flag and Path(flag).exists()):
            if flag:
                Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * number

    return run


def refuse(payload: bytes) -> Callable[[int], int]:
    def run(number: int) -> int:
        if number == 3:
            raise ModelError("model.onnx: no good")
        return number

    return run


class Awkward(Exception):
    """Takes other arguments than its message, and holds what cannot be pickled whatever libraries add to pickling."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")
        self.held = threading.Lock()


def stumble(payload: type[Exception] | None) -> Callable[[int], int]:
    def run(number: int) -> int:
        if payload is None:
            raise Awkward("fault", "home")
        raise payload(f"fault {number}")

    return run


def fail_to_make(payload: bytes) -> Callable[[int], int]:
    raise ModelError("model.onnx: cannot be loaded")


def interrupt(payload: bytes) -> Callable[[int], int]:
    def run(number: int) -> int:
        if number:
            time.sleep(0.1)  # a signal that comes just before a lock is waited for does not end the wait
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            GATE.wait(10)
        return number

    return run


def slow(payload: bytes) -> Callable[[], bytes]:
    time.sleep(0.05)
    MADE.append(len(payload))
    return lambda: payload


def first(payload: bytes) -> Callable[[], bytes]:
    """Make a runner that is finished only after `second` was called."""
    assert GATE.wait(10)
    return lambda: payload


def second(payload: bytes) -> Callable[[], bytes]:
    GATE.set()
    return lambda: payload


def vectors(jobs: int) -> list[tuple[Array]]:
    return [(np.random.default_rng(job).normal(size=1 + job),) for job in range(jobs)]


def assert_scaled(results: list[tuple[int, int, Array]], jobs: list[tuple[Array]]) -> None:
    assert len(results) == len(jobs)
    for (_, made, result), (factors,) in zip(results, jobs, strict=True):
        assert made == 1
        np.testing.assert_array_equal(result, PAYLOAD[: len(factors)] * factors)
