"""Losses on the validation images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flaxdet.data.coco import Record
from flaxdet.data.loader import eval_batches
from flaxdet.data.samples import Dataset
from flaxdet.train.sharding import shard_batch
from flaxdet.train.step import make_loss_step


class ValidationLosses:
    """Computes the mean losses of a model over a data set; the compiled program is kept."""

    def __init__(self, model: Any, dataset: Dataset):
        """Prepares the computation.

        Args:
            model: the detector.
            dataset: the images, with their boxes.
        """
        self._model, self._dataset = model, _WithBoxes(dataset)
        self._step = make_loss_step(model)

    def __call__(self, variables: Mapping[str, Any], *, progress: bool = False) -> dict[str, float]:
        """The losses.

        Args:
            variables: of the model, on one device.
            progress: shows a bar.

        Returns:
            The mean over the images with boxes of each loss, and of their sum "loss"; {"loss": NaN} if no image has
            any. Each image is a batch of its own, so that the numbers do not depend on a batch size. Images without
            boxes, on which some losses are not divided by the number of boxes, would outweigh the others.

        Raises:
            ImageError: if an image can't be read.
        """
        from tqdm import tqdm

        if not len(self._dataset):
            return {"loss": np.nan}
        rows = []
        with (
            eval_batches(self._dataset, self._model.transform, batch_size=1) as batches,
            tqdm(
                batches, total=len(self._dataset), unit="image", desc="losses", leave=False, disable=not progress
            ) as bar,
        ):
            rows.extend(self._step(variables, shard_batch(batch, None)) for batch in bar)
        rows = jax.device_get(rows)
        return {name: float(sum(row[name] for row in rows) / len(rows)) for name in rows[0]}


class _WithBoxes:
    """The images of a data set that have boxes."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self._indices = [i for i in range(len(dataset)) if len(dataset[i].boxes)]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> Record:
        return self._dataset[self._indices[i]]

    def read_image(self, i: int) -> np.ndarray:
        return self._dataset.read_image(self._indices[i])
