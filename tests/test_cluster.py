"""Jobs on the workers of dask: results as a plain loop gives them, and one line where workers or scheduler fail."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from jobs import PAYLOAD, assert_scaled, die, nap, refuse, scale, tally, vectors, where
from workers import Cluster, Watched, eventually, free_port

from onnxcare import cluster
from onnxcare import pool as pools
from onnxcare.cluster import connect, start
from onnxcare.errors import ClusterError, ModelError, UsageError
from onnxcare.pool import Work


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


@pytest.mark.parametrize("module", ["distributed", "dask"])
@pytest.mark.parametrize("context", [lambda: connect("tcp://localhost:1"), lambda: start(1)])
def test_without_dask_it_says_what_to_install(monkeypatch, context, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"pip install onnxcare\[cluster\]"), context():
        pass


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
