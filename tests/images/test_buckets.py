"""The default buckets hold every image; how data sets choose theirs is in tests/data/test_batches.py."""

from __future__ import annotations

import numpy as np
import pytest

from flaxdet.images.buckets import assign, canvases, default_buckets
from flaxdet.structures import TransformConfig


def test_torchvisions_sizes():
    expected = [(800, 800), (800, 1088), (1088, 800), (800, 1216), (1216, 800), (800, 1344), (1344, 800)]
    assert default_buckets(TransformConfig()) == expected


@pytest.mark.parametrize(
    "config",
    [
        TransformConfig(),
        TransformConfig(256, 342),
        TransformConfig((640, 480), 1000),
        TransformConfig(1000, 600),  # the longer side always decides
        TransformConfig(33, 1333),
        TransformConfig(size_divisible=64),
        TransformConfig(fixed_size=(300, 200)),
    ],
    ids=str,
)
def test_every_image_fits(config):
    buckets = default_buckets(config)
    assert all(side % config.size_divisible == 0 for bucket in buckets for side in bucket)
    sides = [1, 7, 97, 100, 331, 480, 640, 1080, 1333, 1920]
    sizes = [(rows, columns) for rows in sides for columns in sides if max(rows, columns) < 20 * min(rows, columns)]
    own = canvases(sizes, config)
    chosen = np.asarray(buckets)[assign(own, buckets)]
    assert (chosen >= own).all()


def test_an_image_of_a_common_shape_wastes_little():
    config = TransformConfig()
    sizes = [(480, 640), (640, 480), (427, 640), (1080, 1920), (600, 600)]
    own, buckets = canvases(sizes, config), default_buckets(config)
    waste = np.asarray(buckets)[assign(own, buckets)].prod(-1) / own.prod(-1)
    assert (waste < 1.06).all()
