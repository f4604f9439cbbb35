"""``flaxdet eval`` on torchvision's own checkpoints: the figures that torchvision's own evaluation gives."""

from __future__ import annotations

import json

import pytest

from flaxdet.cli.main import main
from tests.tolerances import AP_THREE_DECIMALS

pytest.importorskip("pycocotools")


# (detections, AP, AP50, AP75) by torchvision in float32, one image at a time: ../shared/checkpoints/README.md
TORCHVISION = {
    "fcos_resnet50_fpn": (4198, 0.4951, 0.8349, 0.5307),
    "fasterrcnn_resnet50_fpn_v2": (2809, 0.5754, 0.8860, 0.6445),
}


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        pytest.param("fcos_resnet50_fpn", 1, marks=pytest.mark.xdist_group("fcos")),
        pytest.param("fcos_resnet50_fpn", 4, marks=pytest.mark.xdist_group("fcos")),  # the answer is the same
        pytest.param("fasterrcnn_resnet50_fpn_v2", 1, marks=[pytest.mark.xdist_group("v2"), pytest.mark.slow]),
    ],
)
def test_average_precision_is_torchvisions(shared, tmp_path, name, batch_size):
    weights, data = shared / "checkpoints" / f"{name}_bccd.pth", shared / "data" / "bccd"
    files = ["--weights", weights, "--images", data / "images", "--annotations", data / "val.json"]
    sizes = ["--min-size", 256, "--max-size", 342, "--batch-size", batch_size]
    assert main(["eval", *map(str, (*files, *sizes)), "--out", str(tmp_path), "--no-progress"]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    detections, *expected = TORCHVISION[name]
    assert (found["images"], found["detections"]) == (87, detections)
    assert [found[key] for key in ("ap", "ap50", "ap75")] == [
        pytest.approx(ap, abs=AP_THREE_DECIMALS) for ap in expected
    ]
    assert [row["name"] for row in found["per_class"]] == ["Platelets", "RBC", "WBC"]
    assert len(json.loads((tmp_path / "detections.json").read_text())) == detections
