"""The reference: plain torch ops against golden results of the C++ ones, and models worth comparing."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flaxdet.convert import reference
from tests.tolerances import LIVELY_BOXES, LIVELY_SCORES, OP_F64, SUM_OF_16_F32

torch = pytest.importorskip("torch")
torchvision = reference.torchvision()

from flaxdet.convert import torch_ops  # noqa: E402
from flaxdet.convert.lively import make_lively  # noqa: E402

GOLDEN = Path(__file__).parent.parent / "golden"
NMS = np.load(GOLDEN / "nms.npz")
ROI_ALIGN = np.load(GOLDEN / "roi_align.npz")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def nms_cases():
    names = {key.split("/")[0] for key in NMS.files}
    return sorted(name for name in names if f"{name}/idxs" not in NMS.files)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", nms_cases())
def test_plain_nms_is_the_cpp_one(case, dtype):
    boxes, scores = (torch.tensor(NMS[f"{case}/{key}"], dtype=DTYPES[dtype]) for key in ("boxes", "scores"))
    kept = torch_ops.nms(boxes, scores, float(NMS[f"{case}/threshold"]))
    np.testing.assert_array_equal(kept.numpy(), NMS[f"{case}/{dtype}"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", sorted(key.split("/")[0] for key in ROI_ALIGN.files if key.endswith("/sampling_ratio"))
)
def test_plain_roi_align_is_the_cpp_one(case, dtype):
    boxes = torch.tensor(ROI_ALIGN["boxes"], dtype=DTYPES[dtype])
    features = torch.tensor(ROI_ALIGN["features"], dtype=DTYPES[dtype]).permute(2, 0, 1)[None].requires_grad_()
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
    height, width = ROI_ALIGN[f"{case}/output_size"].tolist()
    options = int(ROI_ALIGN[f"{case}/sampling_ratio"]), bool(ROI_ALIGN[f"{case}/aligned"])
    output = torch_ops.roi_align(features, rois, 0.25, height, width, *options).permute(0, 2, 3, 1)
    bar = {"float32": SUM_OF_16_F32, "float64": OP_F64}[dtype]
    expected = ROI_ALIGN[f"{case}/{dtype}"]
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=bar, atol=bar)
    if dtype == "float64":
        output.backward(torch.cos(torch.arange(output.numel(), dtype=output.dtype)).reshape(output.shape))
        gradient = features.grad[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(gradient, ROI_ALIGN[f"{case}/gradient"], rtol=OP_F64, atol=OP_F64)


def test_plain_roi_align_samples_adaptively():
    """A bin of 3x2 pixels takes 3x2 samples: the mean of a ramp is its value at the middle."""
    ramp = torch.arange(12.0)[:, None] * 10 + torch.arange(12.0)
    output = torch_ops.roi_align(ramp[None, None], torch.tensor([[0, 1, 2, 5, 8.0]]), 1.0, 2, 2, -1, False)
    torch.testing.assert_close(output[0, 0], torch.tensor([[37.0, 39.0], [67.0, 69.0]]))


def test_roi_align_trains():
    features = torch.rand(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 1, 1, 9, 8], [1, -3, 2, 20, 6], [1, 4, 4, 4, 4]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: torchvision.ops.roi_align(x, rois, (3, 2), 0.5, 2), features)
    empty = torchvision.ops.roi_align(features, rois[:0], (3, 2), 0.5, 2)
    assert empty.shape == (0, 3, 3, 2)
    (gradient,) = torch.autograd.grad(empty.sum(), features)
    assert not gradient.any()


def test_ops_kind_names_what_runs():
    assert reference.ops_kind() in ("torchvision's C++ ops", "plain torch ops")
    assert reference.torchvision() is sys.modules["torchvision"]


def test_torch_missing_says_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from flaxdet.convert import reference\n"
        "try: reference.torchvision()\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'flaxdet[torch]'" in result.stdout


def test_exact_nms_holds_only_inside():
    """At class 900 the trick's offset leaves float32 whole pixels: an IoU of 0.499 becomes 7/13."""
    boxes = torch.tensor([[0, 0, 10, 10], [0, 3.34, 10, 13.34]]) + 1e4
    scores, classes = torch.tensor([0.9, 0.8]), torch.tensor([900, 900])
    assert torchvision.ops.batched_nms(boxes, scores, classes, 0.52).tolist() == [0]
    with reference.exact_nms():
        assert torchvision.ops.batched_nms(boxes, scores, classes, 0.52).tolist() == [0, 1]
        assert torchvision.ops.batched_nms(boxes, scores, classes, 0.49).tolist() == [0]
    assert torchvision.ops.batched_nms(boxes, scores, classes, 0.52).tolist() == [0]
    with pytest.raises(KeyError), reference.exact_nms():
        raise KeyError
    assert torchvision.ops.batched_nms(boxes, scores, classes, 0.52).tolist() == [0]


def test_build():
    frozen = reference.build("fcos_resnet50_fpn", frozen=True)
    assert sum(p.numel() for p in frozen.parameters()) == 32_269_600
    assert len(frozen.state_dict()) == 319
    assert not frozen.training
    few = reference.build("fcos_resnet50_fpn", frozen=True, num_classes=4, score_thresh=0.1)
    assert few.head.classification_head.cls_logits.out_channels == 4
    assert few.score_thresh == 0.1
    with pytest.raises(ValueError, match=r"no detector named 'fcos'.*fcos_resnet50_fpn"):
        reference.build("fcos")
    with pytest.raises(ValueError, match="frozen"):
        reference.build("fasterrcnn_resnet50_fpn_v2", frozen=True)


def photo():
    """The photo that matplotlib carries, [3, 600, 512], or a fixed pattern where it is not installed."""
    cbook = pytest.importorskip("matplotlib.cbook")
    image = pytest.importorskip("PIL.Image")
    with cbook.get_sample_data("grace_hopper.jpg") as file, image.open(file) as opened:
        return torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1) / 255


def small(name):
    options = {"rpn_post_nms_top_n_test": 200}
    if name == "fcos_resnet50_fpn":  # the whole head: that of the small form finds less in the photo
        options = {"head": torchvision.models.detection.fcos.FCOSHead(256, 1, 91)}
    return reference.build(name, small=True, min_size=160, max_size=256, **options)


@pytest.fixture(scope="module", params=["fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"])
def lively(request):
    return make_lively(small(request.param), seed=0)


@torch.no_grad()
def detect(model, image, monkeypatch):
    """The detections of one image, and how many boxes went into and came out of its last NMS."""
    counts = []
    nms = torchvision.ops.boxes.batched_nms

    def counted(boxes, scores, idxs, threshold):
        kept = nms(boxes, scores, idxs, threshold)
        counts.append((len(boxes), len(kept)))
        return kept

    reference.see_ordinary_photo(model)
    with reference.exact_nms(), monkeypatch.context() as patch:
        patch.setattr(torchvision.ops.boxes, "batched_nms", counted)
        (detections,) = model([image])
    return detections, counts[-1]


def test_lively_scores_are_spread_and_nms_works(lively, monkeypatch):
    image = photo()
    found, (candidates, kept) = detect(lively, image, monkeypatch)
    assert len(found["boxes"]) >= 30
    assert len(found["labels"].unique()) >= 8
    assert candidates >= 60
    assert candidates - kept >= 20  # suppressed
    assert len(found["scores"].unique()) == len(found["scores"])
    assert found["scores"].std() > 0.02
    assert found["scores"].max() < 0.9999
    height, width = image.shape[-2:]
    edges = torch.stack([found["boxes"] <= 0, found["boxes"] >= torch.tensor([width, height, width, height])])
    assert edges.any(0).any(1).float().mean() < 0.6
    sides = found["boxes"][:, 2:] - found["boxes"][:, :2]
    assert sides.min() > 1


def test_lively_is_not_sensitive_to_rounding(lively, monkeypatch):
    image = photo()
    single, _ = detect(lively, image, monkeypatch)
    double, _ = detect(copy.deepcopy(lively).double(), image.double(), monkeypatch)
    assert len(single["boxes"]) == len(double["boxes"])
    distance = (single["boxes"][:, None].double() - double["boxes"]).abs().amax(-1)
    distance += 1e6 * (single["labels"][:, None] != double["labels"])
    partner = distance.argmin(1)
    assert len(partner.unique()) == len(partner)
    assert distance.amin(1).max() < LIVELY_BOXES
    assert (single["scores"] - double["scores"][partner]).abs().max() < LIVELY_SCORES


def test_lively_moves_every_tensor(lively):
    name = "fcos_resnet50_fpn" if type(lively).__name__ == "FCOS" else "fasterrcnn_resnet50_fpn_v2"
    fresh = small(name)
    initial = fresh.state_dict()
    for name, value in lively.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        assert torch.isfinite(value).all(), name
        assert not torch.equal(value, initial[name]), name
        assert value.numel() == 1 or value.std() > 0, name


def test_lively_repeats_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    models = []
    for model in (reference.build("fcos_resnet50_fpn", frozen=True, small=True, num_classes=3) for _ in range(2)):
        torch.random.set_rng_state(before)
        models.append(make_lively(model, seed=3).state_dict())
        assert torch.equal(torch.random.get_rng_state(), before)
    for name in models[0]:
        torch.testing.assert_close(models[0][name], models[1][name], rtol=0, atol=0)
    with pytest.raises(TypeError, match="ReLU"):
        make_lively(torch.nn.ReLU())
