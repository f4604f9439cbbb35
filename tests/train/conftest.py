"""What the tests of checkpoints leave behind goes before the next file's tests."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def no_tasks_left():
    """Collects orbax's tasks of reads that failed.

    asyncio logs the exception of such a task with a traceback once the task is collected. Python 3.11 parses source for
    the traceback, which ends in a SystemError where the collection falls into another `ast.parse`, as in `--help`.
    """
    yield
    gc.collect()
