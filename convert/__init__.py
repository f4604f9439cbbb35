"""Reads and writes torchvision's checkpoints: files, names, layouts. Neither needs nor imports torch."""

from flaxdet.convert.identify import identify
from flaxdet.convert.state_dict import (
    StateDictError,
    backbone_from_torchvision,
    from_torchvision,
    to_torchvision,
)
from flaxdet.files.checkpoint import (
    CheckpointError,
    CheckpointFileError,
    CheckpointNotFoundError,
    read,
    read_metadata,
    write_pth,
    write_safetensors,
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
