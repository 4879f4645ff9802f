"""Where jobs run: an executor that keeps count of them, processes of this machine, and clusters of dask."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from jobs import BITS

import onnxcare


class Watched(Executor):
    """Passes jobs on, and keeps count of them."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.futures: list[Future[Any]] = []
        self.sizes: list[int] = []
        self.most = 0
        self._open: list[Future[Any]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.sizes.append(len(args[0]))
        future = self.executor.submit(fn, *args, **kwargs)
        self.futures.append(future)
        self._open = [*(other for other in self._open if not other.done()), future]
        self.most = max(self.most, len(self._open))
        return future

    def payloads(self, size: int = BITS) -> int:
        return sum(sent > size for sent in self.sizes)


def spawned(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


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
