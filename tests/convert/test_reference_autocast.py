"""torchvision's operators under autocast compute in float32, the plain ones as the C++ ones."""

from __future__ import annotations

import pytest

from flaxdet.convert import reference

torch = pytest.importorskip("torch")
torchvision = reference.torchvision()


def boxes_and_scores():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(40, 2, generator=generator) * 50
    boxes = torch.cat([corner, corner + 5 + 20 * torch.rand(40, 2, generator=generator)], dim=1)
    # values that bfloat16 holds: both sides then see the same ones
    return boxes.bfloat16(), torch.linspace(0.1, 1, 40)[torch.randperm(40, generator=generator)].bfloat16()


def test_nms():
    boxes, scores = boxes_and_scores()
    expected = torchvision.ops.nms(boxes.float(), scores.float(), 0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torchvision.ops.nms(boxes, scores, 0.4)
    assert 5 < len(expected) < 40
    assert found.tolist() == expected.tolist()


def test_roi_align_and_its_gradient():
    boxes, _ = boxes_and_scores()
    features = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide, half = features.float().requires_grad_(), features.clone().requires_grad_()
    expected = torchvision.ops.roi_align(wide, [boxes.float()], 7, 0.25, 2)
    expected.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torchvision.ops.roi_align(half, [boxes], 7, 0.25, 2)
    found.sum().backward()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(half.grad, wide.grad.bfloat16(), rtol=0, atol=0)
