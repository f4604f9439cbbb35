"""The weight enums and their presets, against torchvision's."""

from __future__ import annotations

import copy
import pickle

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import flaxdet
from flaxdet import registry
from flaxdet.zoo import weights
from tests.tolerances import OP_F32

# Enums


ENUMS = [each.weights for each in registry.architectures() if each.weights] + [weights.ResNet50_Weights]


@pytest.mark.parametrize("ours", ENUMS)
def test_metadata_is_torchvisions(ours):
    pytest.importorskip("torch")
    from flaxdet.convert import reference

    reference.torchvision()
    from torchvision.models import get_weight

    theirs = type(get_weight(f"{ours.__name__}.DEFAULT"))
    assert {name: member.name for name, member in ours.__members__.items()} == {
        name: member.name for name, member in theirs.__members__.items()
    }
    for name, member in theirs.__members__.items():
        assert ours[name].url == member.url
        expected = {key: value for key, value in member.meta.items() if key != "_docs"}
        found = dict(ours[name].meta)
        assert found.pop("_docs")
        assert found == expected
        preset = member.transforms()
        if isinstance(ours[name].transforms(), weights.ImageClassification):
            record = ours[name].transforms()
            assert [record.crop_size] == preset.crop_size
            assert [record.resize_size] == preset.resize_size
            assert (list(record.mean), list(record.std)) == (preset.mean, preset.std)
            assert record.interpolation == preset.interpolation.value
            assert record.antialias == preset.antialias


def test_figures():
    fcos, v2 = flaxdet.FCOS_ResNet50_FPN_Weights.COCO_V1, flaxdet.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1
    assert fcos.meta["num_params"] == 32_269_600
    assert v2.meta["num_params"] == 43_712_278
    assert fcos.meta["_metrics"]["COCO-val2017"]["box_map"] == 39.2
    assert v2.meta["_metrics"]["COCO-val2017"]["box_map"] == 46.7
    assert len(fcos.meta["categories"]) == len(v2.meta["categories"]) == 91
    assert fcos.meta["categories"][1] == "person"
    assert weights.ResNet50_Weights.DEFAULT is weights.ResNet50_Weights.IMAGENET1K_V2


def test_verify():
    enum = flaxdet.FCOS_ResNet50_FPN_Weights
    assert enum.verify(None) is None
    for name in ("COCO_V1", "DEFAULT", "FCOS_ResNet50_FPN_Weights.COCO_V1", enum.COCO_V1):
        assert enum.verify(name) is enum.COCO_V1
    with pytest.raises(ValueError, match=r"no 'COCO_V2'; expected one of COCO_V1, DEFAULT"):
        enum.verify("COCO_V2")
    with pytest.raises(ValueError, match=r"no 'ResNet50_Weights.DEFAULT'"):
        enum.verify("ResNet50_Weights.DEFAULT")
    with pytest.raises(TypeError, match=r"expected FCOS_ResNet50_FPN_Weights.* found ResNet50_Weights"):
        enum.verify(weights.ResNet50_Weights.DEFAULT)
    with pytest.raises(TypeError, match="found bool"):
        enum.verify(True)


@pytest.mark.parametrize("enum", ENUMS)
def test_members_are_values(enum):
    member = enum.DEFAULT
    assert str(member) == repr(member) == f"{enum.__name__}.{member.name}"
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert {member: 1}[enum["DEFAULT"]] == 1


# Presets


def test_detection_preset_is_torchvisions():
    torch = pytest.importorskip("torch")
    from flaxdet.convert import reference

    theirs = reference.torchvision().models.detection.FCOS_ResNet50_FPN_Weights.DEFAULT.transforms()
    ours = flaxdet.FCOS_ResNet50_FPN_Weights.DEFAULT.transforms()
    rng = np.random.default_rng(0)
    for image in (
        rng.integers(0, 256, (4, 5, 3), dtype=np.uint8),
        rng.integers(0, 32768, (4, 5, 3), dtype=np.int16),
        rng.random((4, 5, 3)),
        rng.random((4, 5, 3), dtype=np.float32),
    ):
        expected = theirs(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        found = ours(image)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(ours(jnp.asarray(image)), expected, rtol=OP_F32)  # x * (1 / 255)
    image = jnp.asarray(rng.random((4, 5, 3), dtype=np.float32), jnp.bfloat16)
    tensor = torch.from_numpy(np.asarray(image, np.float32)).bfloat16()
    for given in (image, np.asarray(image)):
        found = ours(given)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, theirs(tensor.permute(2, 0, 1)).permute(1, 2, 0).numpy())
    picture = PIL.Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    np.testing.assert_array_equal(ours(picture), theirs(picture).permute(1, 2, 0).numpy())


def test_detection_preset_takes_any_picture():
    ours = weights.ObjectDetection()
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert ours(PIL.Image.new(mode, (5, 4))).shape == (4, 5, 3)
    with pytest.raises(TypeError, match="bool"):
        ours(np.ones((4, 5, 3), bool))


def test_classification_preset_can_be_overridden():
    preset = weights.ResNet50_Weights.IMAGENET1K_V1.transforms(crop_size=256)
    assert (preset.crop_size, preset.resize_size) == (256, 256)
    assert weights.ResNet50_Weights.IMAGENET1K_V1.transforms().crop_size == 224
    with pytest.raises(TypeError, match="unexpected keyword"):
        weights.ResNet50_Weights.DEFAULT.transforms(crop=1)
