"""The tiny FCOS of torchvision's parts, to compare ``flaxdet.zoo._tiny_fcos`` with.

Needs the extra ``torch``. torchvision's ``resnet18`` knows one width, so its layers are replaced by narrower ones of
the same kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flaxdet.convert import reference
from flaxdet.zoo import _tiny_fcos as tiny

if TYPE_CHECKING:
    import torch


def tiny_fcos(*, num_classes: int, frozen: bool = False, **kwargs: Any) -> torch.nn.Module:
    """Builds torchvision's FCOS on a narrow ResNet-18, with fresh weights, for evaluation.

    Args:
        num_classes: including the background.
        frozen: FrozenBatchNorm2d in the body instead of BatchNorm2d.
        **kwargs: of torchvision's FCOS.

    Returns:
        The model, whose state_dict has the names of ``flaxdet.convert.rules``.

    Raises:
        ImportError: if torch or torchvision is not installed.
    """
    reference.torchvision()
    from torch import nn
    from torchvision.models.detection import FCOS, anchor_utils, backbone_utils, fcos
    from torchvision.ops.misc import FrozenBatchNorm2d

    body = _narrow_resnet18(tiny.WIDTH, FrozenBatchNorm2d if frozen else nn.BatchNorm2d)
    # torchvision's names: layer2 is c3
    layers = {f"layer{int(stage[1:]) - 1}": str(i) for i, stage in enumerate(tiny.STAGES)}
    channels = [tiny.WIDTH * 2 ** (int(stage[1:]) - 2) for stage in tiny.STAGES]
    backbone = backbone_utils.BackboneWithFPN(body, layers, channels, tiny.CHANNELS)
    backbone.fpn.extra_blocks = None  # the constructor's default is a level more
    options = {"min_size": tiny.MIN_SIZE, "max_size": tiny.MAX_SIZE, **kwargs}
    options.setdefault(
        "anchor_generator", anchor_utils.AnchorGenerator(tiny.ANCHOR_SIZES, ((1.0,),) * len(tiny.ANCHOR_SIZES))
    )
    head = fcos.FCOSHead(tiny.CHANNELS, 1, num_classes, num_convs=tiny.CONVS)
    return FCOS(backbone, num_classes, head=head, **options).eval()


def _narrow_resnet18(width: int, norm_layer: Any) -> Any:
    """torchvision's resnet18, ``width`` channels in its stem, the others in proportion."""
    from torch import nn
    from torchvision.models import resnet

    body = resnet.resnet18(weights=None, norm_layer=norm_layer)
    body.inplanes = width
    body.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
    body.bn1 = norm_layer(width)
    for i in range(4):
        stage = body._make_layer(resnet.BasicBlock, width * 2**i, 2, stride=1 if i == 0 else 2)
        setattr(body, f"layer{i + 1}", stage)
    for module in body.modules():
        if isinstance(module, nn.Conv2d):  # as torchvision's constructor initialises its own
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return body
