"""Freed memory, which glibc keeps until it is asked for it."""

from __future__ import annotations

import contextlib
import ctypes


def give_memory_back() -> None:
    """Has glibc return the freed memory that it keeps to the system; does nothing with another C library.

    Loading, folding and compiling leave 300 MB with glibc, which the threads that run the program do not use. A train
    step in pieces (``JitBySize``) leaves its temporary buffers.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
