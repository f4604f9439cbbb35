"""Options of how photos and data sets are read, for ``detect``, ``train`` and ``eval``."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from flaxdet.cli.options import Quiet, say

if TYPE_CHECKING:
    from flaxdet.data import CocoDataset

Flag = tyro.conf.FlagCreatePairsOff[bool]


@dataclass(frozen=True)
class PhotoOptions:
    """How photos are read."""

    as_stored: Flag = False
    """Take photos as they are stored, as torchvision does. Default: upright, by the EXIF orientation."""

    pixel_range: Annotated[tuple[float, float] | None, Quiet, tyro.conf.arg(metavar="LOW HIGH")] = None
    """Values that become black and white in grey photos of 16 or 32 bits a pixel. Default: all 16 bits, 0 to 65535."""

    max_pixels: Annotated[int | None, Quiet] = None
    """Largest number of pixels of a photo. Default: 178956970."""

    def check(self) -> None:
        """Raises ValueError for values out of range."""
        from flaxdet.images.decode import check_pixel_options

        try:
            check_pixel_options(self.pixel_range, self.max_pixels)
        except ValueError as error:
            text = str(error).replace("pixel_range", "--pixel-range").replace("max_pixels", "--max-pixels")
            raise ValueError(text) from None


@dataclass(frozen=True)
class DataOptions(PhotoOptions):
    """How photos and data sets are read."""

    as_stored: Flag = False
    """Take photos and boxes as they are stored, as torchvision does. Default: upright, by the EXIF orientation; boxes
    that leave the upright photo and fit the stored one are an error."""

    upright: Flag = False
    """Take photos upright, whatever the boxes say; clip boxes that leave the upright photo."""

    skip_broken: Flag = False
    """Leave out photos that are missing, broken or of another size than stated, and list them. Decodes every photo once
    before the run."""

    def check(self) -> None:
        """Raises ValueError for values out of range and for options that exclude each other."""
        super().check()
        if self.as_stored and self.upright:
            raise ValueError("expected --as-stored or --upright, got both")

    def read(self, kind: str, images: Path, annotations: Path, **options: Any) -> CocoDataset:
        """``read_coco`` with these options; prints the summary of the data set on stderr.

        Args:
            kind: first word of each line, "train".
            images: as for ``read_coco``.
            annotations: as for ``read_coco``.
            **options: further options of ``read_coco``.

        Raises:
            ValueError: as ``read_coco``.
        """
        from flaxdet.data.coco import DatasetWarning, read_coco

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DatasetWarning)  # they are in the summary
            dataset = read_coco(
                images,
                annotations,
                upright=False if self.as_stored else True if self.upright else None,
                skip_broken=self.skip_broken,
                pixel_range=self.pixel_range,
                max_pixels=self.max_pixels,
                **options,
            )
        for line in str(dataset.summary).splitlines():
            say(f"{kind}: {line}")
        return dataset


def printable(text: str | os.PathLike[str]) -> str:
    """A path or message as text that every terminal and JSON reader accepts: bytes that are no UTF-8 become \\xNN."""
    return os.fspath(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
