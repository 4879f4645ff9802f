"""Jobs on threads, processes and dask workers: results as a plain loop gives them, and one line where workers fail."""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import onnxcare
from onnxcare import cluster
from onnxcare import pool as pools
from onnxcare.cluster import connect, start
from onnxcare.errors import ClusterError, ModelError, UsageError
from onnxcare.pool import Pool, Work

Array = np.ndarray

# Large enough to tell a job that carries the payload from one that does not.
PAYLOAD = np.random.default_rng(1).normal(size=20_000)
BITS = PAYLOAD.nbytes

MADE: list[int] = []
GATE = threading.Event()


# -- what runs on workers ------------------------------------------------------------------------


def scale(payload: Array) -> Callable[[Array], tuple[int, int, Array]]:
    """Return a runner that says which process it is in and how many runners were made there."""
    MADE.append(len(payload))
    return lambda factors: (os.getpid(), len(MADE), payload[: len(factors)] * factors)


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
    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


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


# -- executors -----------------------------------------------------------------------------------


class Watched(Executor):
    """Passes jobs on, and keeps count of them."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.futures: list[Future[Any]] = []
        self.sizes: list[int] = []
        self.most = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.sizes.append(len(args[0]))
        self.futures.append(self.executor.submit(fn, *args, **kwargs))
        self.most = max(self.most, sum(not future.done() for future in self.futures))
        return self.futures[-1]

    def payloads(self, size: int = BITS) -> int:
        return sum(sent > size for sent in self.sizes)


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


def spawned(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


def vectors(jobs: int) -> list[tuple[Array]]:
    return [(np.random.default_rng(job).normal(size=1 + job),) for job in range(jobs)]


def assert_scaled(results: list[tuple[int, int, Array]], jobs: list[tuple[Array]]) -> None:
    assert len(results) == len(jobs)
    for (_, made, result), (factors,) in zip(results, jobs, strict=True):
        assert made == 1
        np.testing.assert_array_equal(result, PAYLOAD[: len(factors)] * factors)


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


@pytest.mark.parametrize("module", ["distributed", "dask"])
@pytest.mark.parametrize("context", [lambda: connect("tcp://localhost:1"), lambda: start(1)])
def test_without_dask_it_says_what_to_install(monkeypatch, context, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"pip install onnxcare\[cluster\]"), context():
        pass


def test_importing_it_loads_no_dask():
    code = "import sys, onnxcare.pool; print({'dask', 'distributed', 'numpy', 'onnxruntime'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


# -- dask ----------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Cluster:
    """A scheduler and its workers, processes of their own; what was killed is started again when it is needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []
        self.worker_port = 0

    def _run(self, what: str, *options: str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(Path(__file__).parent), str(Path(onnxcare.__file__).parent.parent)])
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", "--no-dashboard", "--host", "127.0.0.1"]
        with (self.folder / f"{what}.log").open("ab") as log:
            return subprocess.Popen(
                [*command, "--dashboard-address", "127.0.0.1:0", *options],
                env={**os.environ, "PYTHONPATH": path},
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )

    def have(self, workers: int) -> Cluster:
        """Wait until so many workers are there."""
        import distributed

        if self.scheduler is None or self.scheduler.poll() is not None:
            self.end()
            self.scheduler = self._run("scheduler", "--port", str(self.port), "--idle-timeout", "5 minutes")
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        for worker in self.workers[workers:]:
            worker.kill()
            worker.wait()
        for _ in range(workers - len(self.workers)):
            self.worker_port = free_port()
            options = f"--nthreads 1 --no-nanny --memory-limit 0 --worker-port {self.worker_port}".split()
            self.workers.append(self._run("worker", self.address, *options, "--local-directory", str(self.folder)))
        self.workers = self.workers[:workers]
        with distributed.Client(self.address, timeout=30, set_as_default=False) as client:
            eventually(lambda: len(client.nthreads()) == workers)
        return self

    def end(self) -> None:
        for process in [*self.workers, self.scheduler]:
            if process is not None:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("dask"))
    yield cluster
    cluster.end()


@pytest.fixture
def silence(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing is printed or logged, and loggers are left as they were."""
    import distributed  # noqa: F401  it makes its loggers

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    names = [name for name in logging.root.manager.loggerDict if name.startswith(("distributed", "tornado"))]
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
    assert not records
    assert [logger.level for logger in loggers] == levels
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_GLANCE", 0.2)
    monkeypatch.setattr(pools, "_PATIENCE", 0.5)


def test_workers_that_join_are_used(shared, impatient):
    def jobs() -> Iterator[tuple[()]]:
        yield from [()] * 10
        shared.have(2)
        time.sleep(0.3)
        yield from [()] * 40

    with connect(shared.have(1).address) as pool:
        before = pool.workers
        results = pool.map(Work(where, b""), jobs())
        assert (before, pool.workers) == (1, 2)
    assert set(results) == {worker.pid for worker in shared.workers}


def test_dask_workers_give_what_a_loop_gives(shared, silence):
    jobs = vectors(60)
    with connect(shared.have(2).address) as pool:
        pool.executor = watched = Watched(pool.executor)
        results = pool.map(Work(scale, PAYLOAD), jobs)
        assert pool.workers == 2
    assert_scaled(results, jobs)
    processes = {process for process, _, _ in results}
    assert processes <= {worker.pid for worker in shared.workers}
    assert len(processes) <= watched.payloads() <= 10
    assert watched.most <= 8


def test_equal_jobs_are_run_each(shared):
    with connect(shared.have(2).address) as pool:
        assert len(set(pool.map(Work(tally, b""), [()] * 20))) == 20


def test_the_address_of_a_worker_is_refused(shared):
    shared.have(2)
    with (
        pytest.raises(UsageError, match="this is a Worker of dask; give the address of its"),
        connect(f"tcp://127.0.0.1:{shared.worker_port}"),
    ):
        pass


def test_an_error_on_a_dask_worker_comes_back_as_it_is(shared):
    with connect(shared.have(2).address) as pool:
        for _ in range(2):
            with pytest.raises(ModelError, match=r"^model.onnx: no good$"):
                pool.map(Work(refuse, b""), [(number,) for number in range(9)])


def test_a_killed_worker_costs_time_alone(shared, tmp_path, silence):
    with connect(shared.have(2).address) as pool:
        results = pool.map(Work(die, str(tmp_path / "dead")), [(number,) for number in range(40)])
    assert results == [2 * number for number in range(40)]
    eventually(lambda: [worker.poll() for worker in shared.workers].count(-signal.SIGKILL) == 1)


def test_when_all_workers_are_gone_it_says_so(shared, impatient, silence):
    with (
        connect(shared.have(1).address) as pool,
        pytest.raises(ClusterError, match=r"no worker is left, for 0.5 seconds by now; start workers, and run again"),
    ):
        pool.map(Work(die, ""), [(number,) for number in range(40)])
    with (
        pytest.raises(UsageError, match="the scheduler has no workers; start some with dask worker tcp"),
        connect(shared.address),
    ):
        pass


def test_a_lost_scheduler_is_one_line(shared, silence):
    def jobs() -> Iterator[tuple[int]]:
        for number in range(40):
            if number == 20:
                shared.scheduler.kill()
            yield (number,)

    with (
        connect(shared.have(1).address) as pool,
        pytest.raises(ClusterError, match="the connection to the workers was lost"),
    ):
        pool.map(Work(nap, b""), jobs())


def test_where_nothing_listens_it_says_so(monkeypatch):
    monkeypatch.setattr(cluster, "_TIMEOUT", 1)
    before = time.monotonic()
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(UsageError, match=f"{address}: no dask scheduler answers there; start one"), connect(address):
        pass
    assert time.monotonic() - before < 5


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-OpenSSH_9.6"])
def test_where_something_else_listens_it_says_so(monkeypatch, greeting):
    monkeypatch.setattr(cluster, "_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as executor:
        greeted = executor.submit(lambda: listener.accept()[0])
        greeted.add_done_callback(lambda future: future.result().sendall(greeting))
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"{address}: no dask scheduler answers there"), connect(address):
            pass
        greeted.result().close()


@pytest.mark.parametrize("address", ["host", "host:1", "tcp://host", "tcp://:1", "http://host:1", "tcp://host:1/x"])
def test_addresses_of_another_form_are_refused(address):
    with pytest.raises(UsageError, match="such as tcp://host:8786"), connect(address):
        pass


def test_workers_of_this_machine_give_what_a_loop_gives(silence, recwarn):
    jobs = vectors(30)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # taken already, as it has to be: dask likes this port best
            stack.enter_context(socket.create_server(("127.0.0.1", 8787)))
        pool = stack.enter_context(start(2))
        assert pool.workers == 2
        results = pool.map(Work(scale, PAYLOAD), jobs)
        workers = {process for process, _, _ in results}
        for worker in workers:
            os.kill(worker, signal.SIGINT)  # as Ctrl-C does, which is for this process
        again = pool.map(Work(scale, PAYLOAD), jobs)
    assert_scaled(results + again, jobs * 2)
    assert os.getpid() not in workers
    assert not recwarn.list


def test_fewer_than_one_worker_is_refused():
    with pytest.raises(UsageError, match="0 workers: give at least 1"), start(0):
        pass
