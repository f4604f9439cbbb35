"""torchvision checkpoints in and out: files, names, layouts. No torch is needed, nor imported."""

from flaxdet.convert.checkpoint import (
    CheckpointError,
    CheckpointFileError,
    CheckpointNotFoundError,
    read,
    read_metadata,
    write_pth,
    write_safetensors,
)
from flaxdet.convert.identify import identify
from flaxdet.convert.state_dict import (
    StateDictError,
    backbone_from_torchvision,
    from_torchvision,
    to_torchvision,
)

__all__ = [
    "CheckpointError",
    "CheckpointFileError",
    "CheckpointNotFoundError",
    "StateDictError",
    "backbone_from_torchvision",
    "from_torchvision",
    "identify",
    "read",
    "read_metadata",
    "to_torchvision",
    "write_pth",
    "write_safetensors",
]
