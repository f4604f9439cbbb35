"""torchvision -> Flax -> file -> torchvision: every tensor bit for bit, and the same answer in the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import flaxdet
from flaxdet import registry
from flaxdet.convert import from_torchvision, reference, stages, to_torchvision
from flaxdet.convert.lively import make_lively
from tests.parity import sides


def kinds() -> list[Any]:
    """Each detector, with frozen and live BatchNorm where it has frozen ones; whole ResNet-50s in CI once."""
    cases = []
    for name in sides.NAMES:
        for frozen in (True, False) if registry.get(name).freezable else (False,):
            once = pytest.mark.ci if frozen == registry.get(name).freezable else pytest.mark.release
            cases.append(pytest.param(name, frozen, marks=[] if name == sides.TINY_NAME else [once]))
    return cases


SMALL = {"min_size": 96, "max_size": 160}


@pytest.mark.parametrize(("builder", "frozen"), kinds())
def test_bit_for_bit_and_the_same_answer(builder, frozen, tmp_path):
    name = builder
    theirs = make_lively(reference.build(name, frozen=frozen, num_classes=7, **SMALL), seed=3)
    state_dict = theirs.state_dict()
    options = sides.known(name, SMALL | {"rpn_post_nms_top_n_test": 60})
    model = registry.make_model(name, num_classes=7, frozen_bn=frozen, **options)
    variables = from_torchvision(model, state_dict)

    flaxdet.save(tmp_path / "model.pth", model, variables)
    flaxdet.save(tmp_path / "model.safetensors", model, variables)
    loaded, again = flaxdet.load(tmp_path / "model.safetensors")
    assert loaded == model  # kind of BatchNorm, number of classes and options included
    back = torch.load(tmp_path / "model.pth", weights_only=True)
    for found in (to_torchvision(model, variables), to_torchvision(loaded, again), back):
        assert list(found) == list(state_dict)
        for key, expected in state_dict.items():
            value = np.asarray(found[key])
            if key.endswith("num_batches_tracked"):  # without meaning in Flax: comes back as zero
                assert value == 0
            else:
                np.testing.assert_array_equal(value, expected.numpy(), err_msg=key)
                assert value.dtype == np.float32

    returned = reference.build(name, frozen=frozen, num_classes=7, **SMALL)
    returned.load_state_dict(back, strict=True)
    image = sides.crop("china", 100, 150)
    (before,), _ = stages.run_reference(theirs, [image], keep_stages=False)
    (after,), _ = stages.run_reference(returned, [image], keep_stages=False)
    assert len(before["scores"]) > 10
    for field, expected in before.items():
        np.testing.assert_array_equal(after[field], expected)
