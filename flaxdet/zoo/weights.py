"""Published weights: address, preparation of images, metadata. And the ImageNet weights of the backbone.

The weights of a detector are in the file of the detector's builder. Members and metadata are torchvision's. The files
are downloaded from torchvision's server on first use (`flaxdet` contains none of them) and read without torch.
"""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from flaxdet.files.download import DownloadError, cache_dir, fetch
from flaxdet.zoo.categories import IMAGENET_CATEGORIES

__all__ = [
    "DownloadError",
    "ImageClassification",
    "ObjectDetection",
    "ResNet50_Weights",
    "Weights",
    "WeightsEnum",
    "cache_dir",
]


@dataclasses.dataclass(frozen=True)
class ObjectDetection:
    """Prepares an image for a detector: floats in [0, 1], before the detector's resize.

    Reproduces torchvision.transforms._presets.ObjectDetection, for images [H, W, 3]. ``flaxdet.predict`` includes this
    step.
    """

    def __call__(self, image: Any) -> Any:
        """Converts one image.

        Args:
            image: a PIL image (any mode; converted to RGB), or a numpy or JAX array [..., H, W, 3]: integers from 0
                to the largest value of the dtype, or floats, whose values are not changed.

        Returns:
            float32 of the same shape, in [0, 1] for integers; a numpy array for a PIL image.

        Raises:
            TypeError: if the array's dtype is neither integer nor floating.
        """
        if hasattr(image, "convert"):
            image = np.asarray(image.convert("RGB"))
        # jnp.issubdtype: numpy's does not know bfloat16
        if jnp.issubdtype(image.dtype, jnp.integer):
            return image.astype(np.float32) / np.float32(jnp.iinfo(image.dtype).max)
        if jnp.issubdtype(image.dtype, jnp.floating):
            return image.astype(np.float32)
        raise TypeError(f"image: expected integers or floats, found {image.dtype}")


@dataclasses.dataclass(frozen=True)
class ImageClassification:
    """The preparation of images for the ImageNet accuracy of a backbone: a record, not a function.

    Has the fields of torchvision's preset: resize the shorter side to ``resize_size``, crop the middle ``crop_size``,
    scale to [0, 1], subtract ``mean`` and divide by ``std``. Detectors prepare images differently
    (``flaxdet.TransformConfig``), so nothing in flaxdet applies this preset.
    """

    crop_size: int
    resize_size: int = 256
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    antialias: bool = True


@dataclasses.dataclass(frozen=True)
class Weights:
    """One published file.

    Attributes:
        url: address of the file on torchvision's server.
        preset: preparation of the images that the weights were trained on.
        meta: torchvision's metadata.
        options: options of ``registry.make_model`` that the weights need and the file does not hold.
    """

    url: str
    preset: ObjectDetection | ImageClassification
    meta: dict[str, Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


class WeightsEnum(enum.Enum):
    """Weights of one architecture; values are `Weights`."""

    @classmethod
    def verify(cls, obj: Self | str | None) -> Self | None:
        """Finds the member for a name.

        Args:
            obj: a member, the name of a member, with or without the name of the enum ("COCO_V1",
                "FCOS_ResNet50_FPN_Weights.COCO_V1", "DEFAULT"), or None.

        Returns:
            The member; None for None.

        Raises:
            ValueError: if there is no member of this name.
            TypeError: if `obj` is of another type, for example a member of another architecture's enum.
        """
        if obj is None or isinstance(obj, cls):
            return obj
        if not isinstance(obj, str):
            raise TypeError(f"weights: expected {cls.__name__}, its name or None, found {type(obj).__name__}")
        try:
            return cls[obj.removeprefix(f"{cls.__name__}.")]
        except KeyError:
            names = ", ".join(cls.__members__)
            raise ValueError(f"weights: {cls.__name__} has no {obj!r}; expected one of {names}") from None

    @property
    def url(self) -> str:
        """Address of the file on torchvision's server."""
        return self.value.url

    @property
    def meta(self) -> dict[str, Any]:
        """torchvision's metadata: categories, num_params, min_size, recipe, accuracy under ``_metrics``."""
        return self.value.meta

    @property
    def options(self) -> dict[str, Any]:
        """Options of ``registry.make_model`` that the weights need and the file does not hold."""
        return self.value.options

    def transforms(self, **overrides: Any) -> Any:
        """The preparation of the images that the weights were trained on.

        Args:
            **overrides: fields of the preset to change.

        Returns:
            An `ObjectDetection` or `ImageClassification`.
        """
        return dataclasses.replace(self.value.preset, **overrides)

    def get_path(self, progress: bool = True) -> Path:
        """The path of the file in the cache; downloads the file on first use.

        Args:
            progress: show a progress bar on stderr while downloading.

        Returns:
            The path.

        Raises:
            DownloadError: if the file can't be downloaded; the message says where to put the file by hand.
        """
        published = self.meta.get("_file_size")  # MiB, rounded to three digits
        limit = {} if published is None else {"most": int((published + 0.001) * 2**20)}
        return fetch(self.url, progress=progress, **limit)

    def get_state_dict(self, progress: bool = True) -> dict[str, Any]:
        """torchvision's state_dict; downloads the file on first use. Needs no torch.

        Args:
            progress: show a progress bar on stderr while downloading.

        Returns:
            numpy array of each key of torchvision.

        Raises:
            DownloadError: if the file can't be downloaded.
        """
        from flaxdet.files import checkpoint

        return checkpoint.read(self.get_path(progress))

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


REFERENCES = "https://github.com/pytorch/vision/tree/main/references"


class ResNet50_Weights(WeightsEnum):  # noqa: N801  (torchvision's name)
    """ImageNet weights of the ResNet-50 in the detectors' backbones."""

    IMAGENET1K_V1 = Weights(
        url="https://download.pytorch.org/models/resnet50-0676ba61.pth",
        preset=ImageClassification(crop_size=224),
        meta={
            "min_size": (1, 1),
            "categories": list(IMAGENET_CATEGORIES),
            "num_params": 25_557_032,
            "recipe": f"{REFERENCES}/classification#resnet",
            "_metrics": {"ImageNet-1K": {"acc@1": 76.130, "acc@5": 92.862}},
            "_ops": 4.089,
            "_file_size": 97.781,
            "_docs": "Trained by a plain recipe; about as accurate as in the paper.",
        },
    )
    IMAGENET1K_V2 = Weights(
        url="https://download.pytorch.org/models/resnet50-11ad3fa6.pth",
        preset=ImageClassification(crop_size=224, resize_size=232),
        meta={
            "min_size": (1, 1),
            "categories": list(IMAGENET_CATEGORIES),
            "num_params": 25_557_032,
            "recipe": "https://github.com/pytorch/vision/issues/3995#issuecomment-1013906621",
            "_metrics": {"ImageNet-1K": {"acc@1": 80.858, "acc@5": 95.434}},
            "_ops": 4.089,
            "_file_size": 97.79,
            "_docs": "Trained by torchvision's newer recipe; more accurate than in the paper.",
        },
    )
    DEFAULT = IMAGENET1K_V2
