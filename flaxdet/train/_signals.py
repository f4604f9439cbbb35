"""Ctrl-C and SIGTERM as a request to stop, which says what it waits for."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StopRequest:
    """Whether a stop was requested.

    Attributes:
        waiting_for: what has to end before the stop, for the message on stderr; ``None`` for no message.
    """

    def __init__(self) -> None:
        self.waiting_for: str | None = None
        self._event = threading.Event()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def set(self, number: int) -> None:
        """Notes the request, and says what it waits for."""
        self._event.set()
        if self.waiting_for is not None:
            name = _NAMES[signal.Signals(number)]
            _say(f"\n{name}: waiting for {self.waiting_for}; another {name} stops at once\n")


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """A request that the first Ctrl-C or SIGTERM sets; a second signal goes to the previous handler.

    Only in the main thread; in other threads no signal sets the request.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous: dict[int, Any] = {}

    def request(number: int, frame: Any) -> None:
        signal.signal(number, previous[number])
        stop.set(number)

    for number in _NAMES:
        previous[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    """Writes to stderr in a signal handler, which may have interrupted another write to stderr."""
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError, io.UnsupportedOperation):  # a notebook's
        print(text, file=sys.stderr, flush=True)  # noqa: T201
        return
    with contextlib.suppress(OSError):
        os.write(descriptor, text.encode())
