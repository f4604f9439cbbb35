"""The same detector on both sides, with lively weights; and real photos."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from flaxdet import registry
from flaxdet.convert import from_torchvision, reference
from flaxdet.nn.extra_levels import LastLevelMaxPool
from flaxdet.nn.fpn import level_name
from flaxdet.registry import make_model

FCOS_NAME, V2_NAME = "fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"
TINY_NAME = "tiny_fcos"  # compiles in half the time of the other FCOS
CLASSES = 11
NAMES = registry.names(private=True)


def of_kind(kind: type) -> list[str]:
    """The registered detectors of a class."""
    return [name for name in NAMES if registry.get(name).kind is kind]


def representative(kind: type) -> str:
    """The one detector of a class that is compared in tests which the others have before a release alone."""
    names = of_kind(kind)
    return next((name for name in names if name in (TINY_NAME, V2_NAME)), names[0])


def whole_names() -> list[str]:
    """The one detector of each class whose whole ResNet-50 is compared; small forms are compared of every detector."""
    published = {registry.get(name).kind: name for name in NAMES if not registry.get(name).private}
    return [*published.values()]


def known(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that the detector has: one without proposals has none of theirs."""
    return {option: value for option, value in options.items() if option in registry.get(name).fields}


def has_proposals(name: str) -> bool:
    """Whether it is a detector of two stages."""
    return "proposals" in registry.get(name).kind._own_stages


def levels_of(model: Any) -> tuple[str, ...]:
    """Names of the pyramid's levels, finest first."""
    stages = [level_name(stage) for stage in model.backbone.returned_stages]
    extra = model.backbone.fpn.extra_blocks
    return (*stages, *(() if extra is None else ("pool",) if isinstance(extra, LastLevelMaxPool) else ("p6", "p7")))


def torch_detector(
    name: str, num_classes: int = CLASSES, frozen: bool = False, small: bool = True, **options: Any
) -> Any:
    """torchvision's detector in its small form, or as its builder makes it; in evaluation mode."""
    layers = {"trainable_backbone_layers": 5} if frozen else {}  # live ones train all anyhow
    return reference.build(name, frozen=frozen, small=small, num_classes=num_classes, **layers, **options)


def flax_detector(
    name: str,
    num_classes: int = CLASSES,
    frozen: bool = False,
    dtype: Any = np.float32,
    small: bool = True,
    **options: Any,
) -> Any:
    """Ours, in its small form, or as its builder makes it."""
    dtypes: dict[str, Any] = {"dtype": dtype, "precision": jax.lax.Precision.HIGHEST}
    return make_model(name, num_classes=num_classes, small=small, frozen_bn=frozen, **dtypes, **options)


@functools.cache
def lively_state_dict(name: str, num_classes: int, frozen: bool, small: bool) -> dict[str, Any]:
    """torchvision's state_dict with lively weights, float32."""
    from flaxdet.convert.lively import make_lively

    return make_lively(torch_detector(name, num_classes, frozen, small)).state_dict()


def both(
    name: str,
    num_classes: int = CLASSES,
    *,
    frozen: bool = False,
    small: bool = True,
    dtype: str = "float32",
    **options: Any,
) -> tuple[Any, Any, Any]:
    """(our model, its variables, torchvision's model) with the same lively weights; x64 must fit the dtype."""
    theirs = torch_detector(name, num_classes, frozen, small, **options)
    theirs.load_state_dict(lively_state_dict(name, num_classes, frozen, small))
    ours = flax_detector(name, num_classes, frozen, np.dtype(dtype).type, small, **options)
    variables = from_torchvision(ours, theirs.state_dict())
    if dtype == "float64":
        theirs = theirs.double()
    return ours, variables, theirs


@functools.cache
def photo(name: str) -> np.ndarray:
    """A real photo from a package: "grace_hopper" (portrait), "china" or "flower" (landscape); uint8 RGB."""
    if name == "grace_hopper":
        from matplotlib import cbook

        path = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    else:
        import sklearn.datasets

        path = Path(sklearn.datasets.__file__).parent / "images" / f"{name}.jpg"
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def crop(name: str, rows: int, columns: int) -> np.ndarray:
    """The middle of a photo, resized to exactly this size."""
    image = Image.fromarray(photo(name))
    return np.asarray(image.resize((columns, rows)))
