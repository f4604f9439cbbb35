"""Making batches ahead of time, in threads of this process or in grain's worker processes, always in the same order."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from flaxdet.data.samples import BatchDict, BatchSource

_THREADS = 2  # numpy and Pillow release the interpreter lock most of the time
_AHEAD = 3  # batches that the threads make in advance
_AHEAD_OF_WORKER = 3  # batches of one worker that may exist at a time: one in the making, two in queues
_SHARED_MEMORY = "/dev/shm"


class Stream(Protocol):
    """An iterator of batches that can be closed."""

    def __next__(self) -> BatchDict: ...

    def close(self) -> None:
        """Stops the threads or processes."""
        ...


def open_stream(source: BatchSource, workers: int) -> Stream:
    """Starts making the batches of ``source``, in order.

    Args:
        source: random access to batches.
        workers: number of processes; 0 for threads.
    """
    return _Workers(source, min(workers, len(source))) if workers else _Threads(source)


class _Threads:
    def __init__(self, source: BatchSource):
        self._source, self._next = source, 0
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="flaxdet-data")
        self._ahead: deque[Future[BatchDict]] = deque()

    def __next__(self) -> BatchDict:
        while len(self._ahead) < _AHEAD and self._next < len(self._source):
            self._ahead.append(self._pool.submit(self._source.__getitem__, self._next))
            self._next += 1
        if not self._ahead:
            raise StopIteration
        return self._ahead.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Workers:
    def __init__(self, source: BatchSource, workers: int):
        grain = import_grain()
        batches = grain.MapDataset.source(source).to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        )
        if not _fits_shared_memory(source, workers):  # containers have 64 MB of shared memory by default
            through_pipes = grain.experimental.DatasetOptions(min_shm_size=2**62)
            batches = grain.experimental.WithOptionsIterDataset(batches, through_pipes)
        self._batches = iter(
            batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1),
                worker_init_fn=_start_worker,
            )
        )

    def __next__(self) -> BatchDict:
        # numpy views, which keep grain's arrays in shared memory alive
        return {key: np.asarray(value) for key, value in next(self._batches).items()}

    def close(self) -> None:
        self._batches.close()


def import_grain() -> Any:
    """Imports grain, which only workers need.

    Raises:
        ImportError: if grain is not installed; the message says how to install it.
    """
    try:
        import grain
    except ImportError as error:
        raise ImportError("data workers need grain: pip install 'flaxdet[train]', or use workers=0") from error
    return grain


def _start_worker(index: int, count: int) -> None:
    """Runs first in a worker: hides the accelerator, leaves Ctrl-C to the parent process, and ends with the parent."""
    import jax

    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # also returns when the parent was killed, and could not stop the workers
        os._exit(1)


def _fits_shared_memory(source: BatchSource, workers: int) -> bool:
    rows, columns = source.plan.buckets[-1]
    row = rows * columns * 3 * 4
    need = row * (source.rows.stop - source.rows.start) * (workers * _AHEAD_OF_WORKER + _AHEAD)
    return not os.path.isdir(_SHARED_MEMORY) or shutil.disk_usage(_SHARED_MEMORY).free > need
