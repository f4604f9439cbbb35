"""The input of models: image files, COCO data sets, and batches for training and evaluation."""

from flaxdet.data.coco import CocoDataset, DatasetWarning, Record, read_coco
from flaxdet.data.loader import Batches, eval_batches, train_batches
from flaxdet.images.buckets import choose_buckets
from flaxdet.images.decode import ImageError, PixelRangeWarning, read_image
from flaxdet.images.find import find_images

__all__ = [
    "Batches",
    "CocoDataset",
    "DatasetWarning",
    "ImageError",
    "PixelRangeWarning",
    "Record",
    "choose_buckets",
    "eval_batches",
    "find_images",
    "read_coco",
    "read_image",
    "train_batches",
]
