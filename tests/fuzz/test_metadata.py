"""Damaged and hostile descriptions of models, in .safetensors and config.json, metrics, and files of names."""

from __future__ import annotations

import contextlib
import json
import math
import unicodedata

import numpy as np
import pytest

from flaxdet import registry
from flaxdet.cli.options import read_categories
from flaxdet.convert import CheckpointError
from flaxdet.files import checkpoint, hub, json_text, models
from flaxdet.train import _note
from tests.fuzz import cases

NAME = "fcos_resnet50_fpn"
V2 = "fasterrcnn_resnet50_fpn_v2"
OPTIONS = {
    NAME: {
        "num_classes": 4,
        "frozen_bn": False,
        "freeze_bn": False,
        "remat": False,
        "trainable_backbone_layers": 5,
        "norm_eps": 0.0,
        "min_size": [96, 128],
        "max_size": 160,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.3, 0.25, 0.2],
        "size_divisible": 32,
        "fixed_size": [64, 32],
        "score_thresh": 0.3,
        "nms_thresh": 0.5,
        "detections_per_img": 10,
        "topk_candidates": 100,
        "anchor_generator": {
            "type": "AnchorGenerator",
            "sizes": [[4], [16], [32], [64], [128]],
            "aspect_ratios": [[1.0], [1.0], [1.0], [1.0], [1.0]],
        },
    },
    V2: {
        "num_classes": 4,
        "frozen_bn": False,
        "box_roi_pool": {
            "type": "MultiScaleRoIAlign",
            "featmap_names": ["p2", "p3"],
            "output_size": 7,
            "sampling_ratio": 1,
            "canonical_scale": 224,
            "canonical_level": 4,
        },
        "bbox_reg_weights": [5.0, 5.0, 2.0, 2.0],
        "box_score_thresh": 0.1,
        "rpn_pre_nms_top_n_test": 500,
        "rpn_post_nms_top_n_test": 500,
    },
}


def descriptions() -> list[tuple[dict, dict]]:
    """The tensors by which a file is identified, and the description that goes with them."""
    made = []
    for name, options in OPTIONS.items():
        keys = registry.get(name).keys
        assert keys is not None
        state = {key: np.zeros(4, np.float32) for key in keys.present}
        description = {
            "format": 1,
            "flaxdet": "0.1.0",
            "builder": name,
            "options": options,
            "categories": ["__background__", "RBC", "WBC", "plaquette Ω"],
        }
        made.append((state, description))
    return made


def test_descriptions(tmp_path):
    path = tmp_path / "model.safetensors"
    files = descriptions()
    for state, description in files:  # the originals are whole
        checkpoint.write_safetensors(path, state, {"flaxdet": json.dumps(description)})
        assert models.read_model(path).categories == description["categories"]

    def case(rng):
        state, description = files[rng.integers(len(files))]
        for _ in range(rng.choice([1, 1, 2])):
            description = cases.mutated(rng, description)
        text = cases.to_json(rng, description)
        try:
            checkpoint.write_safetensors(path, state, {"flaxdet": text})
        except CheckpointError:  # half a surrogate pair can't even be written
            return
        names = models.load_categories(path)
        file = models.read_model(path)
        assert file.categories == names
        assert names is None or all(isinstance(name, str) and _is_one_line(name) for name in names)
        assert file.builder in OPTIONS
        assert _finite(file.options)

    cases.run(250, case, CheckpointError)


def test_config_json(tmp_path):
    """What lies in a folder from the Hub, read before the weights."""
    path = tmp_path / hub.CONFIG
    files = descriptions()

    def case(rng):
        description = cases.mutated(rng, files[rng.integers(len(files))][1])
        path.write_bytes(cases.to_json(rng, description).encode("utf-8", "surrogatepass"))
        hub.load_pretrained(tmp_path)

    def missing(rng):
        with contextlib.suppress(checkpoint.CheckpointNotFoundError):  # the description was read: there are no weights
            case(rng)

    cases.run(250, missing, CheckpointError)


def test_metrics(tmp_path):
    path = tmp_path / "metrics.json"
    metrics = {"AP": 0.25, "AP50": 0.5, "loss": None, "step": 100}

    def case(rng):
        path.write_bytes(cases.to_json(rng, cases.mutated(rng, metrics)).encode("utf-8", "surrogatepass"))
        found = _note.read_metrics(tmp_path)
        assert found is None or not any(math.isinf(value) for value in found.values())

    cases.run(250, case, ValueError)


def test_names(tmp_path):
    names = ["__background__", "cat", "dog"]
    coco = {"images": [], "annotations": [], "categories": [{"id": i, "name": name} for i, name in enumerate(names)]}

    def case(rng):
        path = tmp_path / f"names.{['json', 'txt'][rng.integers(2)]}"
        content = cases.mutated(rng, [names, coco][rng.integers(2)])
        text = (
            cases.to_json(rng, content)
            if path.suffix == ".json"
            else cases.damaged(rng, b"one\ntwo\n").decode("latin-1")
        )
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        assert all(isinstance(name, str) and _is_one_line(name) for name in read_categories(path))

    cases.run(250, case, ValueError)


def _is_one_line(name: str) -> bool:
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in name)


def _finite(value) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def test_json_text_refuses():
    for text in (
        "NaN",
        "[Infinity]",
        '{"a": 1e999}',
        '{"a": 1, "a": 2}',
        '"\\ud800"',
        "[" * 10**5,
        "",
        "[1",
        b"\xff",
        "1" * 5000,
    ):
        with pytest.raises(ValueError, match=r"\w"):
            json_text.loads(text)
    assert json_text.loads('{"a": [1, 2.5, null, "\\u00e9\\ud83d\\ude00"]}') == {"a": [1, 2.5, None, "é😀"]}
