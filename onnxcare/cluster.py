"""Pools of workers under dask, on other machines or on this one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from onnxcare.errors import ClusterError, UsageError
from onnxcare.pool import Pool, explained, one_line

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

# Seconds in which a scheduler has to answer.
_TIMEOUT = 5.0
# A worker with a fault of its own may fail a job so often before the job counts as failed.
_RETRIES = 3
# The roots of the loggers that dask and what it is built on write to.
_TALKERS = {"asyncio", "distributed", "tornado"}


@contextlib.contextmanager
def connect(address: str) -> Iterator[Pool]:
    """Yield a pool of the workers of a running dask scheduler, such as tcp://host:8786.

    Raises:
        UsageError: no scheduler answers there, it has no workers, or dask is not installed.
        ClusterError: the scheduler answered, and then did not.
    """
    if not re.fullmatch(r"tcp://[^\s/]+:\d+", address):
        raise UsageError(f"{address}: give the address of a dask scheduler, such as tcp://host:8786")
    with _quiet_dask():
        _check(address)
        with explained():
            opened = _client(address)
        with opened as client:
            if not _threads(client):
                raise UsageError(f"{address}: the scheduler has no workers; start some with dask worker {address}")
            yield _pool(client)


@contextlib.contextmanager
def start(workers: int) -> Iterator[Pool]:
    """Yield a pool of so many new processes of this machine, which end with the context.

    They import the script that calls this, so its own start belongs under `if __name__ == "__main__"`.

    Raises:
        UsageError: fewer than one is asked for, or dask is not installed.
        ClusterError: the processes cannot be started.
    """
    if workers < 1:
        raise UsageError(f"{workers} workers: give at least 1")
    with _quiet_dask(), contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(_local_cluster(workers))
            client = stack.enter_context(_client(cluster))
        except Exception as error:  # whatever a new process, or dask's watch over it, stumbles upon
            raise ClusterError(f"{workers} workers cannot be started here: {one_line(error)}") from error
        yield _pool(client)


def _local_cluster(workers: int) -> LocalCluster:
    import distributed

    return distributed.LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        dashboard_address=None,
        memory_limit=None,  # with one, dask kills a process that takes more than its share
        silence_logs=logging.CRITICAL,
        # Ctrl-C reaches all processes of a terminal, and this one ends the others.
        preload=["import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"],
        # The pages that are not the dashboard would take port 8787 all the same.
        scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
    )


def _pool(client: Client) -> Pool:
    # By default dask takes a second job of the same name and arguments for the first.
    return Pool(client.get_executor(pure=False, retries=_RETRIES), _threads(client), lambda: _threads(client))


def _threads(client: Client) -> int:
    """Return how many jobs the workers run at a time; 0 also where the scheduler does not answer."""
    try:
        return sum(client.nthreads(callback_timeout=_TIMEOUT).values())
    except Exception:  # connections fail in many ways, and all of them mean that no worker can be reached
        return 0


def _client(where: str | LocalCluster) -> Client:
    import distributed

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # versions that matter are compared with every answer
        return distributed.Client(where, timeout=_TIMEOUT, set_as_default=False)


def _check(address: str) -> None:
    """Refuse an address where no scheduler answers; a client would wait for ever for one that is silent."""
    import distributed

    async def identity() -> dict[str, Any]:
        async with distributed.rpc(address, timeout=_TIMEOUT / 2) as server:
            return dict(await server.identity())

    try:
        with ThreadPoolExecutor(1) as thread:  # the caller may have a running event loop, as notebooks do
            answer = thread.submit(asyncio.run, asyncio.wait_for(identity(), _TIMEOUT)).result()
    except Exception as error:
        raise UsageError(f"{address}: no dask scheduler answers there; start one with dask scheduler") from error
    if "workers" not in answer:
        raise UsageError(f"{address}: this is a {answer.get('type')} of dask; give the address of its scheduler")


@contextlib.contextmanager
def _quiet_dask() -> Iterator[None]:
    """Silence dask, which reports every lost worker and every large payload.

    Raises:
        UsageError: dask is not installed.
    """
    try:
        import dask
        import distributed  # noqa: F401
    except ImportError as error:
        raise UsageError("this needs dask, which is not installed: pip install onnxcare[cluster]") from error
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.split(".")[0] in _TALKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 PiB"}):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
