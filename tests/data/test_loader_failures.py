"""When something goes wrong: arguments, files, workers, and the process that reads from them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from flaxdet.data import ImageError, eval_batches, read_coco, train_batches
from flaxdet.data import streams as streams_module
from tests.data.loaders import CONFIG, needs_grain
from tests.tiny import write_coco

# Bad arguments, bad files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "positive batch_size"),
        ({"process_count": 3}, "batch_size=4 should be a multiple of the 3 processes"),
        ({"process_index": 1}, "process_index < process_count"),
        ({"flip": 1.5}, "flip should be a probability, got 1.5"),
        ({"seed": -1}, "should not be negative"),
        ({"workers": -1}, "workers should not be negative"),
        ({"min_size": ()}, "min_size should be one or more positive"),
        ({"crop": 64}, "crop belongs to jitter"),
        ({"jitter": (0.5, 1), "min_size": (48,)}, "got both"),
        ({"jitter": (0, 1)}, "jitter should be"),
        ({"jitter": (1, 2), "crop": (1, 2, 3)}, "crop should be"),
        ({"canvas": "batch"}, 'canvas should be "image" or "bucket"'),
        ({"max_boxes": 2}, r"\d\d\d\.png: has 3 boxes, more than max_boxes=2: raise it"),
        ({"buckets": [(64, 96)]}, r"001\.png: its canvas of 96x64 .* fits none of the buckets 64x96 \(4 of 16"),
        ({"buckets": [(64, 96), (96, 64)], "min_size": (32, 96)}, "canvas of 96x96|canvas of 96x128"),
        ({"buckets": [(100, 100)]}, r'multiples of 32, got size_divisible=32 .*canvas="bucket"'),
    ],
)
def test_bad_arguments(arguments, message, data):
    with pytest.raises(ValueError, match=message):
        train_batches(data, CONFIG, **{"batch_size": 4, "steps": 5} | arguments)


def test_an_image_that_is_too_elongated_is_named(tmp_path):
    images, path = write_coco(tmp_path, 2)
    Image.new("RGB", (900, 3)).save(images / "001.png")
    content = json.loads(path.read_text())
    content["images"][1].update(width=900, height=3)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"001\.png of 3x900 .* too elongated"):
        eval_batches(read_coco(images, path), CONFIG, batch_size=1)


def broken(tmp_path):
    images, path = write_coco(tmp_path, 8)
    dataset = read_coco(images, path)
    (images / "003.png").write_bytes(b"rubbish")
    return dataset


def check_error_names_the_file(dataset, workers) -> None:
    """Where the batch of the broken file is due, and not before; and again at the next attempt."""
    with train_batches(dataset, CONFIG, batch_size=1, steps=16, workers=workers) as loader:
        order = train_batches(dataset, CONFIG, batch_size=1, steps=16)
        due = [order._source.plan[i].indices[0] for i in range(8)].index(3)
        for _ in range(due):
            next(loader)
        for _ in range(2):
            with pytest.raises(ImageError, match=r"003\.png: is no image in a format") as caught:
                next(loader)
            assert "\n" not in str(caught.value)
        assert loader.get_state()["batches"] == due


def test_a_broken_file_is_named(tmp_path):
    check_error_names_the_file(broken(tmp_path), 0)


# Workers


def test_workers_without_grain(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"pip install 'flaxdet\[train\]'"):
        train_batches(data, CONFIG, batch_size=4, steps=5, workers=1)
    assert len(list(train_batches(data, CONFIG, batch_size=4, steps=5))) == 5


@pytest.mark.ci  # processes of their own; test_loader_resume.py has workers in every run
@needs_grain
def test_an_error_in_a_worker_and_no_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(streams_module, "_fits_shared_memory", lambda *_: False)
    check_error_names_the_file(broken(tmp_path), 1)


SCRIPT = """
import os
import signal
import sys
from flaxdet.data import eval_batches, read_coco, train_batches
from flaxdet.structures import TransformConfig

def main():
    dataset = read_coco(*sys.argv[1:3])
    config = TransformConfig(min_size=64, max_size=96)
    left_alone = train_batches(dataset, config, batch_size=2, steps=1000, workers=1)
    next(left_alone)
    if "kill" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    print(sum(len(batch["size"]) for batch in eval_batches(dataset, config, batch_size=2, workers=1)))

if __name__ == "__main__":
    main()
"""


def run_script(tmp_path, *arguments: str):
    """Returns when nobody writes to its output any more, neither the script nor a worker."""
    images, path = write_coco(tmp_path, 6)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.run(
        [sys.executable, "-W", "error", str(script), str(images), str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": root},
    )


@pytest.mark.ci  # processes of their own; test_loader_resume.py has workers in every run
@needs_grain
def test_workers_from_a_plain_script(tmp_path):
    """No absl, and a loader that nobody closes: it ends by itself, in silence."""
    done = run_script(tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("6\n", "", 0)


@pytest.mark.ci  # processes of their own; test_loader_resume.py has workers in every run
@needs_grain
def test_workers_die_with_the_process_that_reads(tmp_path):
    assert run_script(tmp_path, "kill").returncode == -signal.SIGKILL
