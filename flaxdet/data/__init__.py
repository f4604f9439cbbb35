"""Reading what models are fed with."""

from flaxdet.data.images import ImageError, find_images, read_image

__all__ = ["ImageError", "find_images", "read_image"]
