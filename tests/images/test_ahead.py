"""Reading ahead: in order, not far, and nothing left running."""

from __future__ import annotations

import threading
import time

import pytest

from flaxdet.data import ImageError
from flaxdet.images.ahead import read_ahead


class Slow:
    """Counts what is read and what is asked for."""

    def __init__(self):
        self.started, self.running, self.most, self.lock = [], 0, 0, threading.Lock()

    def read_image(self, i):
        with self.lock:
            self.started.append(i)
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(0.002)
        with self.lock:
            self.running -= 1
        if i == 99:
            raise ImageError("99: broken")
        return i


def test_reads_ahead_but_not_far():
    source, order = Slow(), list(range(20, 0, -1))
    taken = []
    for image in read_ahead(source.read_image, order, ahead=4, workers=2):
        taken.append(image)
        time.sleep(0.01)
        assert len(source.started) <= len(taken) + 4
        assert len(source.started) >= min(len(taken) + 2, 20)
    assert taken == order
    assert source.most == 2


def test_a_broken_image_stops_the_reading():
    source = Slow()
    images = read_ahead(source.read_image, [1, 2, 99, *range(3, 50)], ahead=3, workers=2)
    assert [next(images), next(images)] == [1, 2]
    with pytest.raises(ImageError, match="99: broken"):
        next(images)
    assert len(source.started) <= 6
    images = read_ahead(source.read_image, range(50), ahead=3, workers=2)
    next(images)
    images.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flaxdet-read")]
