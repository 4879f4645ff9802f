"""Jobs on threads and processes: results as a plain loop gives them, and one line where workers fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jobs import (
    GATE,
    MADE,
    PAYLOAD,
    Array,
    Scaling,
    assert_scaled,
    die,
    double,
    fail_to_make,
    first,
    interrupt,
    nap,
    refuse,
    scale,
    second,
    slow,
    stumble,
    vectors,
)
from workers import Watched, spawned

import onnxcare
from onnxcare import pool as pools
from onnxcare.errors import ClusterError, ModelError
from onnxcare.pool import Pool, Work


class Broken(Executor):
    """Fails every job with the same error."""

    def __init__(self, error: Exception, at_once: bool) -> None:
        self.error, self.at_once = error, at_once

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self.at_once:
            raise self.error
        future: Future[Any] = Future()
        future.set_exception(self.error)
        return future


class Foreign(ThreadPoolExecutor):
    """Answers as a worker with another version would."""

    def __init__(self, name: str) -> None:
        super().__init__(1)
        self.name = name

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        def older() -> Any:
            answer = fn(*args, **kwargs)
            return replace(answer, versions=answer.versions | {self.name: "0.0.1"})

        return super().submit(older)


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known yet, as in a new process."""
    monkeypatch.setattr(pools, "_RUNNERS", pools._Runners())
    MADE.clear()
    GATE.clear()


@pytest.fixture
def threads() -> Iterator[Watched]:
    with ThreadPoolExecutor(3) as executor:
        yield Watched(executor)


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with spawned(2) as executor:
        yield executor


# -- threads and processes -----------------------------------------------------------------------


def test_threads_give_what_a_loop_gives_and_share_one_payload(threads):
    jobs = vectors(60)
    assert_scaled(Pool(threads, 3).map(Work(scale, PAYLOAD), jobs), jobs)
    assert [len(PAYLOAD)] == MADE
    assert threads.payloads() == 1


def test_processes_give_what_a_loop_gives_and_make_one_runner_each(processes):
    jobs, watched = vectors(200), Watched(processes)
    results = Pool(watched, 2).map(Work(scale, PAYLOAD), jobs)
    assert_scaled(results, jobs)
    assert not MADE
    # A payload may reach the process that has it already, and then another one follows.
    assert len({process for process, _, _ in results}) <= watched.payloads() <= 20


def test_a_second_call_sends_no_payload(threads):
    work = Work(scale, PAYLOAD)
    Pool(threads, 3).map(work, vectors(5))
    Pool(threads, 3).map(Work(scale, PAYLOAD.copy()), vectors(5))
    assert threads.payloads() == 1


def test_other_payloads_and_functions_are_other_works():
    keys = [Work(make, payload).key for make in (double, nap) for payload in (b"a", b"b")]
    assert len(set(keys)) == 4
    assert Work(double, b"a").key == keys[0]


def test_only_the_last_runners_are_kept(threads):
    works = [Work(scale, PAYLOAD[index:]) for index in range(pools._KEPT + 1)]
    for work in [*works, works[-1], works[0]]:
        Pool(threads, 1).map(work, [(np.ones(3),)])
    assert [len(work.payload) for work in [*works, works[0]]] == MADE


@pytest.mark.parametrize("limit", [None, 1, 3])
def test_few_jobs_are_in_flight(threads, limit):
    taken: list[int] = []
    results = Pool(threads, 2).map(Work(nap, b""), ((taken.append(i) or i,) for i in range(50)), limit)
    assert results == taken == list(range(50))
    assert threads.most == (limit or 8)


def test_jobs_are_taken_as_they_are_needed(threads):
    def jobs() -> Iterator[tuple[int]]:
        yield from ((number,) for number in range(100))
        done.append(sum(future.done() for future in threads.futures))

    done: list[int] = []
    Pool(threads, 2).map(Work(double, b""), jobs())
    assert done[0] >= 100 - 8


def test_no_jobs_need_no_worker():
    assert Pool(Broken(ValueError(), at_once=True)).map(Work(double, b""), []) == []


def test_what_a_runner_raises_comes_back_as_it_is(processes):
    with pytest.raises(ModelError, match=r"^model.onnx: no good$") as caught:
        Pool(processes, 2).map(Work(refuse, b""), [(number,) for number in range(9)])
    assert not hasattr(caught.value, "__notes__")


def test_a_defect_tells_where_it_happened(threads):
    with pytest.raises(KeyError, match="fault 0") as caught:
        Pool(threads, 3).map(Work(stumble, KeyError), [(0,)])
    assert "in stumble" in caught.value.__notes__[0] or "in run" in caught.value.__notes__[0]


def test_an_error_that_cannot_travel_is_told(threads):
    with pytest.raises(RuntimeError, match=r"Awkward on worker .*: fault at home"):
        Pool(threads, 3).map(Work(stumble, None), [(0,)])


def test_a_payload_that_cannot_be_used_is_told_and_not_kept(threads):
    for _ in range(2):
        with pytest.raises(ModelError, match="cannot be loaded"):
            Pool(threads, 3).map(Work(fail_to_make, PAYLOAD), [(0,), (1,)])
    assert threads.payloads() == 2


def test_an_interrupted_run_cancels_what_is_left():
    with ThreadPoolExecutor(1) as executor:
        watched = Watched(executor)
        pool, work = Pool(watched, 1), Work(interrupt, b"")
        pool.map(work, [(0,)])
        before = len(watched.futures)
        try:
            with pytest.raises(KeyboardInterrupt):
                pool.map(work, [(1,)] * 4)
            assert [future.cancelled() for future in watched.futures[before:]] == [False, True, True, True]
        finally:
            GATE.set()


def test_threads_make_a_runner_once():
    runners, packed = pools._Runners(), Work(slow, b"abc").packed
    with ThreadPoolExecutor(4) as executor:
        made = list(executor.map(lambda _: runners.get("key", packed), range(8)))
    assert MADE == [3]
    assert len(set(made)) == 1


def test_works_do_not_wait_for_each_other():
    runners = pools._Runners()
    with ThreadPoolExecutor(2) as executor:
        made = executor.map(runners.get, ("1", "2"), (Work(first, b"1").packed, Work(second, b"2").packed))
        assert [runner() for runner in made] == [b"1", b"2"]


# -- a runner that travels as it is --------------------------------------------------------------


def scalings(jobs: int) -> list[tuple[Array, float]]:
    return [(factors, float(shift)) for shift, (factors,) in enumerate(vectors(jobs))]


def assert_shared(answers: list[tuple[int, Array]], payload: Array, jobs: list[tuple[Array, float]]) -> None:
    assert len(answers) == len(jobs)
    for (_, answer), (factors, shift) in zip(answers, jobs, strict=True):
        np.testing.assert_array_equal(answer, payload[: len(factors)] * factors + shift)


@pytest.mark.parametrize("jobs", [0, 1, 2, 11, 12, 13, 100])
def test_a_shared_runner_answers_in_the_order_of_the_jobs(threads, jobs):
    answers = Pool(threads, 3).share(Scaling(PAYLOAD), scalings(jobs))
    assert_shared(answers, PAYLOAD, scalings(jobs))


def test_processes_share_a_runner(processes):
    jobs = scalings(100)
    answers = Pool(processes, 2).share(Scaling(PAYLOAD), jobs)
    assert_shared(answers, PAYLOAD, jobs)
    assert os.getpid() not in {process for process, _ in answers}


@pytest.mark.parametrize(("jobs", "parts"), [(0, 0), (1, 1), (12, 12), (23, 23), (24, 12), (25, 13), (100, 13)])
def test_shared_jobs_go_in_about_four_parts_a_worker(threads, jobs, parts):
    pool, runner = Pool(threads, 3), Scaling(PAYLOAD)
    pool.share(runner, scalings(5))  # the runner is there
    before = len(threads.futures)
    assert_shared(pool.share(runner, scalings(jobs)), PAYLOAD, scalings(jobs))
    assert len(threads.futures) - before == parts


def test_the_parts_become_larger_and_smaller_with_the_number_of_workers(threads):
    pool, runner = Pool(threads, 1), Scaling(PAYLOAD)
    pool.share(runner, scalings(1))
    sent = []
    for workers in (1, 5, 1):
        pool.workers, before = workers, len(threads.futures)
        assert_shared(pool.share(runner, scalings(40)), PAYLOAD, scalings(40))
        sent.append(len(threads.futures) - before)
    assert sent == [4, 20, 4]


def test_a_shared_runner_is_sent_once_over_several_calls(threads):
    pool, runner = Pool(threads, 3), Scaling(PAYLOAD)
    for jobs in (7, 40, 40):
        assert_shared(pool.share(runner, scalings(jobs)), PAYLOAD, scalings(jobs))
    assert threads.payloads() == 1


def test_another_runner_is_another_work(threads):
    pool, one, other = Pool(threads, 3), Scaling(PAYLOAD), Scaling(PAYLOAD + 1)
    for runner in (one, other, one):
        assert_shared(pool.share(runner, scalings(9)), runner.payload, scalings(9))
    assert threads.payloads() == 2
    # What is equal is known there already, whoever made it.
    assert_shared(Pool(threads, 3).share(Scaling(PAYLOAD.copy()), scalings(9)), PAYLOAD, scalings(9))
    assert threads.payloads() == 2


def test_what_a_shared_runner_raises_comes_back(threads):
    with pytest.raises(TypeError) as caught:
        Pool(threads, 3).share(Scaling(PAYLOAD), [*scalings(30), (None, 0.0)])
    assert "on worker" in caught.value.__notes__[0]


# -- failures ------------------------------------------------------------------------------------


def test_a_broken_process_pool_is_one_line():
    with (
        spawned(1) as executor,
        pytest.raises(ClusterError, match=r"^workers died during a job: killed, or out of memory; use fewer"),
    ):
        Pool(executor, 1).map(Work(die, ""), [(number,) for number in range(20)])


def killed_worker() -> Exception:
    from distributed.scheduler import KilledWorker

    return KilledWorker("task", SimpleNamespace(address="tcp://host:1"), 3)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (BrokenExecutor, "workers died during a job"),
        (killed_worker, "workers died during a job"),
        (CancelledError, "the connection to the workers was lost; see that their scheduler runs, and run again"),
        (
            lambda: ModuleNotFoundError("No module\n named 'onnxcare'"),
            r"cannot run a job \(ModuleNotFoundError: No module named 'onnxcare'\); every worker needs onnxcare \d",
        ),
    ],
)
def test_whatever_an_executor_raises_is_one_line(error, text, at_once):
    with pytest.raises(ClusterError, match=text) as caught:
        Pool(Broken(error(), at_once)).map(Work(double, b""), [(1,)])
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("name", ["onnxcare", "onnxruntime"])
def test_a_worker_of_another_version_is_refused(name):
    with Foreign(name) as executor, pytest.raises(ClusterError, match=f"has {name} 0.0.1 and .* than {name} .* here"):
        Pool(executor, 1).map(Work(double, b""), [(1,)])


def test_versions_are_those_of_this_process():
    assert pools._versions()["onnxcare"] == onnxcare.__version__


def test_importing_it_loads_no_dask():
    code = "import sys, onnxcare.pool; print({'dask', 'distributed', 'numpy', 'onnxruntime'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
