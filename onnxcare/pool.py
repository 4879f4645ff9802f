"""Runs the jobs of one piece of work on any `concurrent.futures.Executor`: threads, processes, or machines under dask.

What all jobs share, such as a model, is the payload of a `Work`. It may be large, so it travels only to processes that
miss it: a job is sent with the key of the payload alone, and again with the payload where the answer is that it is
not there. A process that is lost and replaced asks for it again, and nobody else needs to notice.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import onnxcare
from onnxcare.errors import ClusterError, OnnxcareError

Runner = Callable[..., Any]
_Payload = TypeVar("_Payload")

# Runners hold loaded models, so a process keeps only the last few.
_KEPT = 4
# Jobs and answers carry arrays: so many a worker keep it busy without filling the memory.
_IN_FLIGHT = 4
# Into so many parts a worker's share of the jobs is cut: few enough to be worth sending, and enough to come out even.
_SHARES = 4
# Seconds after which the workers are counted again.
_GLANCE = 2.0
# Seconds without a single worker after which none is expected to come back.
_PATIENCE = 60.0


@dataclass(frozen=True, eq=False)
class Work(Generic[_Payload]):
    """What all jobs share.

    Attributes:
        make: a function of a module that makes the runner out of the payload, called once per process; a job is then
            `runner(*job)`. Where a worker has several threads, they may call the runner at the same time.
        payload: anything that can be pickled, and does not change any more.
    """

    make: Callable[[_Payload], Runner]
    payload: _Payload

    @functools.cached_property
    def packed(self) -> bytes:
        """The function's name and the payload as they travel."""
        return _pack((self.make, self.payload))

    @functools.cached_property
    def key(self) -> str:
        """What a process knows this work by."""
        return hashlib.sha256(self.packed).hexdigest()


class Pool:
    """Runs jobs on the workers of an executor, which stays open.

    Processes of this machine must be started afresh (`spawn`): onnxruntime does not survive a fork.

    Attributes:
        executor: where jobs run.
        workers: how many of them run at the same time; None counts the cores of this machine.
        count: tells how many there are by now, where workers come and go.
    """

    def __init__(self, executor: Executor, workers: int | None = None, count: Callable[[], int] | None = None) -> None:
        self.executor = executor
        self.workers = workers or os.cpu_count() or 1
        self.count = count
        self._shared: Work[Runner] | None = None

    def map(self, work: Work[Any], jobs: Iterable[Sequence[Any]], limit: int | None = None) -> list[Any]:
        """Run all jobs and return their results in the order of the jobs.

        Args:
            work: what all jobs share.
            jobs: the arguments of the runner, one sequence a job; taken one by one as workers become free.
            limit: at most so many jobs are in flight; None for four a worker.

        Raises:
            ClusterError: the workers are lost, cannot run a job, or have other versions than this process.
            Exception: what a runner raised, the first that comes back; the other jobs are cancelled.
        """
        run = _Run(self, work, jobs, limit)
        try:
            return run.results()
        finally:
            run.cancel()

    def share(self, runner: Runner, jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run all jobs on a runner that can be pickled, several of them at a time to be worth sending."""
        if self._shared is None or self._shared.payload is not runner:
            self._shared = Work(_Series, runner)
        step = max(1, len(jobs) // (_SHARES * self.workers))
        parts = [(jobs[start : start + step],) for start in range(0, len(jobs), step)]
        return [answer for answers in self.map(self._shared, parts) for answer in answers]


class _Series:
    """Runs several jobs one after another."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __call__(self, jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [self._runner(*job) for job in jobs]


@dataclass(frozen=True)
class _Piece:
    """A job on its way: its place, its pickled arguments, whether the payload goes with it, and when it was sent."""

    index: int
    job: bytes
    loaded: bool = False
    sent: float = 0.0


@dataclass(frozen=True)
class _Call:
    """What is sent: unpickling it runs the job and gives its `_Answer`.

    An executor that looks into its tasks finds bytes, so dask's scheduler needs no onnxcare, and a worker without it
    says so. Given the function itself, such a worker of dask would end.
    """

    key: str
    job: bytes
    packed: bytes | None

    def __reduce__(self) -> tuple[Any, ...]:
        return _work_on, (self.key, self.job, self.packed)


@dataclass(frozen=True)
class _Answer:
    """What comes back: from whom, and the pickled result and error; None where the payload is missing."""

    worker: str
    versions: dict[str, str]
    outcome: bytes | None


class _Run:
    """One call of `Pool.map`: what is in flight, what waits for a payload to arrive, and what has come back."""

    def __init__(self, pool: Pool, work: Work[Any], jobs: Iterable[Sequence[Any]], limit: int | None) -> None:
        self._pool, self._work, self._limit = pool, work, limit
        self._pieces = (_Piece(index, _pack(tuple(job))) for index, job in enumerate(jobs))
        self._flying: dict[Future[_Answer], _Piece] = {}
        self._parked: list[_Piece] = []
        self._missing: set[str] = set()
        self._known: dict[str, float] = {}
        self._results: dict[int, Any] = {}
        self._looked = self._seen = time.monotonic()

    def results(self) -> list[Any]:
        self._fill()
        while self._flying:
            done, _ = wait(self._flying, timeout=_GLANCE, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda future: self._flying[future].index):
                self._take(future)
            self._look()
            self._fill()
        return [self._results[index] for index in range(len(self._results))]

    def cancel(self) -> None:
        for future in self._flying:
            future.cancel()

    def _fill(self) -> None:
        limit = self._limit or _IN_FLIGHT * self._pool.workers
        while len(self._flying) + len(self._parked) < limit and (piece := next(self._pieces, None)):
            self._submit(piece)

    def _submit(self, piece: _Piece) -> None:
        call = _pack(_Call(self._work.key, piece.job, self._work.packed if piece.loaded else None))
        with explained():
            future = self._pool.executor.submit(pickle.loads, call)
        self._flying[future] = replace(piece, sent=time.monotonic())

    def _take(self, future: Future[_Answer]) -> None:
        piece = self._flying.pop(future)
        with explained():
            answer = future.result()
        _compare(answer)
        if answer.outcome is None:
            self._send_again(piece, answer.worker)
            return
        self._missing.discard(answer.worker)
        self._known[answer.worker] = time.monotonic()
        if piece.loaded:
            parked, self._parked = self._parked, []
            for waiting in parked:
                self._submit(waiting)
        result, error = pickle.loads(answer.outcome)
        if error is not None:
            raise error
        self._results[piece.index] = result

    def _send_again(self, piece: _Piece, worker: str) -> None:
        """Send a job that a worker could not do, with the payload if no other job brings it."""
        if piece.sent < self._known.get(worker, 0.0):
            self._submit(piece)  # the payload has arrived since it was asked for
            return
        self._missing.add(worker)
        if sum(other.loaded for other in self._flying.values()) < len(self._missing):
            self._submit(replace(piece, loaded=True))
        else:
            self._parked.append(piece)

    def _look(self) -> None:
        """Count the workers now and then; without any, dask would wait for ever."""
        if self._pool.count is None or time.monotonic() - self._looked < _GLANCE:
            return
        workers = self._pool.count()
        self._looked = time.monotonic()
        if workers:
            self._pool.workers, self._seen = workers, self._looked
        elif self._looked - self._seen > _PATIENCE:
            raise ClusterError(f"no worker is left, for {_PATIENCE:g} seconds by now; start workers, and run again")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn whatever an executor raises into a `ClusterError` of one line."""
    try:
        yield
    except Exception as error:
        text = f"the workers cannot run a job ({one_line(error)}); every worker needs onnxcare {onnxcare.__version__}"
        if isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker":
            text = "workers died during a job: killed, or out of memory; use fewer of them, or a smaller --memory"
        elif isinstance(error, CancelledError):
            text = "the connection to the workers was lost; see that their scheduler runs, and run again"
        raise ClusterError(text) from error


def one_line(error: Exception) -> str:
    """Return the type and the message of an error, at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _compare(answer: _Answer) -> None:
    """Refuse a worker whose results may differ from what this process would compute."""
    for name, ours in _versions().items():
        if (theirs := answer.versions[name]) != ours:
            raise ClusterError(
                f"worker {answer.worker} has {name} {theirs} and may compute something else than {name} {ours} here; "
                "install the same version on both"
            )


# -- on a worker ---------------------------------------------------------------------------------


def _work_on(key: str, job: bytes, packed: bytes | None) -> _Answer:
    """Run one job."""
    worker = f"{socket.gethostname()}/{os.getpid()}"
    try:
        runner = _RUNNERS.get(key, packed)
        outcome = None if runner is None else _pack((runner(*pickle.loads(job)), None))
    except Exception as error:
        outcome = _packed_error(error, worker)
    return _Answer(worker, _versions(), outcome)


def _packed_error(error: Exception, worker: str) -> bytes:
    """Pickle an error, which is returned instead of raised: dask would run a job that raises again."""
    if not isinstance(error, OnnxcareError):
        error.add_note(f"on worker {worker}:\n{traceback.format_exc()}")
    try:
        packed = _pack((None, error))
        pickle.loads(packed)  # an error that takes other arguments than its message fails only here
    except Exception:
        packed = _pack((None, RuntimeError(f"{type(error).__name__} on worker {worker}: {error}")))
    return packed


def _pack(content: Any) -> bytes:
    return pickle.dumps(content, pickle.HIGHEST_PROTOCOL)


@functools.cache
def _versions() -> dict[str, str]:
    import onnxruntime

    return {"onnxcare": onnxcare.__version__, "onnxruntime": onnxruntime.__version__}


class _Runners:
    """The last few runners of this process, each made once however many threads ask for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[str, Future[Runner]] = {}

    def get(self, key: str, packed: bytes | None) -> Runner | None:
        """Return the runner of a key, made of the packed work where it is not known yet; None without that."""
        with self._lock:
            known = self._kept.pop(key, None)
            if known is None and packed is None:
                return None
            runner = self._kept[key] = known or Future()
            if len(self._kept) > _KEPT:
                del self._kept[next(iter(self._kept))]
        if known is None and packed is not None:
            self._make(key, packed, runner)
        return runner.result()

    def _make(self, key: str, packed: bytes, runner: Future[Runner]) -> None:
        try:
            make, payload = pickle.loads(packed)
            runner.set_result(make(payload))
        except BaseException as error:
            with self._lock:
                self._kept.pop(key, None)
            runner.set_exception(error)


_RUNNERS = _Runners()
