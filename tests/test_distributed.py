"""Locate and fix on threads, processes and dask workers: to the last bit what this process alone comes to."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cases import SQUARE
from helpers import Paths, check_refusal, contents, fix, write_case
from workers import Cluster, Watched, spawned

import onnxcare
from onnxcare import pool as pools
from onnxcare.cluster import connect
from onnxcare.locators import select
from onnxcare.pool import Pool
from onnxcare.repair import care
from onnxcare.report import json
from onnxcare.results import Location

# So little that the runs of the tiny model are cut into blocks, and there is something to share.
LITTLE = "200K"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("dask"))
    yield cluster
    cluster.end()


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with spawned(2) as executor:
        yield executor


# -- locate on dask workers ----------------------------------------------------------------------


def located(pool: Pool | None = None, **options: Any) -> Location:
    options = {"samples": 30, "values": 4, "exact": True} | options
    return onnxcare.locate(
        SQUARE / "model.onnx", SQUARE / "care.yaml", device="cpu", memory="1GiB", pool=pool, **options
    )


@pytest.fixture(scope="module")
def alone() -> Location:
    return located()


def assert_same(found: Location, expected: Location) -> None:
    assert found.units and found.sites
    assert found == expected
    assert json.render(found) == json.render(expected)


class Deadly(Watched):
    """Kills a worker as soon as an answer of it has come back while jobs are in flight."""

    def __init__(self, executor: Executor, victim: subprocess.Popen[bytes]) -> None:
        super().__init__(executor)
        self.victim = victim
        self.before = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        done = [other for other in self.futures if other.done()]
        if not self.before and len(done) < len(self.futures) and any(map(self._by_victim, done)):
            self.before = len(self.futures)
            self.victim.kill()
            self.victim.wait()
        return future

    def _by_victim(self, future: Future[Any]) -> bool:
        answer = future.result()
        return answer.outcome is not None and answer.worker.endswith(f"/{self.victim.pid}")


def processes_of(futures: Sequence[Future[Any]]) -> set[int]:
    """Return which processes have answered."""
    return {int(future.result().worker.rpartition("/")[2]) for future in futures}


def test_dask_workers_locate_what_is_located_here(shared: Cluster, alone: Location) -> None:
    with connect(shared.have(2).address) as pool:
        pool.executor = watched = Watched(pool.executor)
        assert_same(located(pool), alone)
    assert processes_of(watched.futures) == {worker.pid for worker in shared.workers}


def test_a_worker_killed_while_units_are_located_changes_nothing(shared: Cluster, alone: Location) -> None:
    with connect(shared.have(2).address) as pool:
        survivor, victim = shared.workers
        pool.executor = deadly = Deadly(pool.executor, victim)
        assert_same(located(pool), alone)
    assert victim.returncode == -signal.SIGKILL and survivor.poll() is None
    after = deadly.futures[deadly.before :]
    assert deadly.before and len(after) > 20
    assert processes_of(after) == {survivor.pid}


@pytest.mark.parametrize("method", ["causal", pytest.param("interchange", marks=pytest.mark.slow)])
def test_units_race_on_dask_workers_as_they_race_here(
    method: str, shared: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "_NO_RACE", 0)
    options = {"exact": False, "top": 3, "method": method}
    raced = located(**options)
    assert raced.race is not None and len(raced.race.rounds) > 1
    with connect(shared.have(2).address) as pool:
        pool.executor = watched = Watched(pool.executor)
        assert_same(located(pool, **options), raced)
    assert watched.futures


# -- fix -----------------------------------------------------------------------------------------


def fixed(paths: Paths, method: str, pool: Pool | None = None) -> str:
    """Return the fingerprint of the file that is written."""
    found = onnxcare.fix(
        paths.model, paths.spec, paths.out, method=method, best_effort=True, device="cpu", memory=LITTLE, pool=pool
    )
    sha256 = hashlib.sha256(paths.out.read_bytes()).hexdigest()
    assert found.output_sha256 == sha256
    return sha256


@pytest.mark.parametrize("method", ["care", "auto"])
def test_a_repair_is_the_same_file_on_threads_and_on_processes(
    method: str, tiny: Paths, processes: ProcessPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(care, "_GENERATIONS", 10)
    expected = fixed(tiny, method)
    with ThreadPoolExecutor(2) as threads:
        for executor in (threads, processes):
            watched = Watched(executor)
            assert fixed(tiny, method, Pool(watched, 2)) == expected
            assert len(watched.futures) > 20, "there was nothing to share"


@pytest.mark.slow
def test_the_command_line_writes_the_same_file_with_workers(tmp_path: Path) -> None:
    paths = write_case(tmp_path)
    expected = fixed(paths, "auto")
    paths.out.unlink()
    args = ["fix", paths.model, "--spec", paths.spec, "-o", paths.out, "--device", "cpu", "--memory", LITTLE]
    done = subprocess.run(
        [sys.executable, "-m", "onnxcare", *map(str, args), "--workers", "2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert hashlib.sha256(paths.out.read_bytes()).hexdigest() == expected


def test_a_repair_without_workers_left_ends_in_one_line(
    tiny: Paths, shared: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bereft(self: Pool, *args: Any) -> list[Any]:
        for worker in shared.workers:
            worker.kill()
            worker.wait()
        return share(self, *args)

    share = Pool.share
    monkeypatch.setattr(Pool, "share", bereft)
    monkeypatch.setattr(pools, "_GLANCE", 0.2)
    monkeypatch.setattr(pools, "_PATIENCE", 0.5)
    before = contents(tiny.folder)
    result = fix(tiny, "--scheduler", shared.have(1).address, "--memory", LITTLE)
    check_refusal(result, 5, "no worker is left, for 0.5 seconds by now; start workers, and run again")
    assert len(result.stderr.splitlines()) == 1
    assert contents(tiny.folder) == before
