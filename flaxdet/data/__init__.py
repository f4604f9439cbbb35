"""The input of models: image files, COCO data sets, and batches for training and evaluation."""

from flaxdet.data.coco import CocoDataset, Record, read_coco
from flaxdet.data.loader import Batches, eval_batches, train_batches
from flaxdet.images.buckets import choose_buckets
from flaxdet.images.decode import ImageError, find_images, read_image

__all__ = [
    "Batches",
    "CocoDataset",
    "ImageError",
    "Record",
    "choose_buckets",
    "eval_batches",
    "find_images",
    "read_coco",
    "read_image",
    "train_batches",
]
