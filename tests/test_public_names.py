"""The names that others build on: here, where they are promised, with the parameters promised."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import flaxdet

FUNCTIONS = {
    "fcos_resnet50_fpn": "* weights progress num_classes weights_backbone trainable_backbone_layers key dtype "
    "param_dtype precision **kwargs",
    "fasterrcnn_resnet50_fpn": "* weights progress num_classes weights_backbone trainable_backbone_layers key "
    "dtype param_dtype precision **kwargs",
    "fasterrcnn_resnet50_fpn_v2": "* weights progress num_classes weights_backbone trainable_backbone_layers key "
    "dtype param_dtype precision **kwargs",
    "load": "path **overrides",
    "save": "path model variables * categories",
    "load_pretrained": "folder **overrides",
    "load_variables": "path model * allow_nonfinite",
    "save_variables": "path model variables * categories",
    "save_pretrained": "folder model variables * categories",
    "coco_results": "detections image_ids category_ids",
    "to_supervision": "found categories",
    "predict": "model variables images * canvas",
    "convert.from_torchvision": "model state_dict",
    "convert.to_torchvision": "model variables",
    "ops.nms": "boxes scores iou_threshold * max_output valid",
    "ops.batched_nms": "boxes scores idxs iou_threshold * max_output valid",
    "ops.roi_align": "features boxes output_size * spatial_scale sampling_ratio aligned extent",
    "ops.multiscale_roi_align": "features boxes output_size * scales sampling_ratio canonical_scale "
    "canonical_level extents",
}
OPS = [
    "box_area",
    "box_convert",
    "box_iou",
    "clip_boxes_to_image",
    "complete_box_iou",
    "complete_box_iou_loss",
    "distance_box_iou",
    "distance_box_iou_loss",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "remove_small_boxes",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
]
CLASSES = [
    "FCOS",
    "FasterRCNN",
    "Detections",
    "ImageBatch",
    "Targets",
    "Proposals",
    "TransformConfig",
    "FCOS_ResNet50_FPN_Weights",
    "FasterRCNN_ResNet50_FPN_V2_Weights",
    "FasterRCNN_ResNet50_FPN_Weights",
    "ResNet50_Weights",
]


def find(name: str):
    *path, last = name.split(".")
    return getattr(importlib.import_module(".".join(["flaxdet", *path])), last)


def parameters(function) -> str:
    """The parameters' names; * before the first that goes by keyword alone."""
    names, starred = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            names.append("*")
            starred = True
        names.append("**" * (parameter.kind is parameter.VAR_KEYWORD) + parameter.name)
    return " ".join(names)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_what_was_promised(name):
    promised, found = FUNCTIONS[name].split(), parameters(find(name)).split()
    missing = [parameter for parameter in promised if parameter not in found]
    assert not missing, f"{name}({' '.join(found)}) lacks {missing}"
    positional = promised[: promised.index("*")] if "*" in promised else promised
    assert found[: len(positional)] == positional


@pytest.mark.parametrize("name", [f"ops.{name}" for name in OPS] + CLASSES)
def test_names_exist(name):
    assert find(name).__doc__


@pytest.mark.parametrize("module", ["flaxdet", "flaxdet.ops", "flaxdet.convert"])
def test_everything_exported_is_there_and_documented(module):
    module = importlib.import_module(module)
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value):
            assert inspect.getdoc(value), name


def test_defaults():
    fcos = inspect.signature(flaxdet.fcos_resnet50_fpn).parameters
    v2 = inspect.signature(flaxdet.fasterrcnn_resnet50_fpn_v2).parameters
    assert fcos["weights_backbone"].default is flaxdet.ResNet50_Weights.IMAGENET1K_V1
    assert v2["weights_backbone"].default is None
    for builder in (fcos, v2):
        assert builder["progress"].default is True
        for name in ("weights", "num_classes", "trainable_backbone_layers", "key", "param_dtype", "precision"):
            assert builder[name].default is None
    assert inspect.signature(flaxdet.predict).parameters["canvas"].default == "image"
    roi_align = inspect.signature(flaxdet.ops.roi_align).parameters
    # torchvision's default is adaptive, which has no static shape: the number must be given
    assert (roi_align["spatial_scale"].default, roi_align["sampling_ratio"].default) == (1.0, None)
    assert roi_align["aligned"].default is False


def test_weights_are_not_mixed_up():
    assert flaxdet.FCOS_ResNet50_FPN_Weights.DEFAULT is flaxdet.FCOS_ResNet50_FPN_Weights.COCO_V1
    assert flaxdet.FasterRCNN_ResNet50_FPN_V2_Weights.DEFAULT.url.endswith("v2_coco-dd69338a.pth")


def test_one_version():
    """pyproject.toml takes it from the package; the two files that repeat it agree."""
    root = Path(__file__).parents[1]
    assert f"\nversion: {flaxdet.__version__}\n" in (root / "CITATION.cff").read_text()
    changes = re.findall(r"^## \[(.+?)\]", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes[0] in (flaxdet.__version__, "Unreleased")
    assert flaxdet.__version__ in changes
