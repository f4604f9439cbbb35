# %% [markdown]
# # Fine-tuning, and back to PyTorch
#
# A data set in COCO's format, a training step with optax, curves and pictures of how it goes; and in the end a
# `state_dict` with which torchvision finds the same boxes.
#
# To be quick and need no download, the images are small and drawn here, and the detector is the tiny one that comes
# with flaxdet: it knows blood cells, and learns rectangles. **With COCO weights** on your own data, take
#
# ```python
# dataset = read_coco("images/", "annotations.json")
# model, variables = flaxdet.fcos_resnet50_fpn(weights="COCO_V1")
# model, variables = flaxdet.replace_classes(model, variables, len(dataset.categories))
# ```
#
# and a rate of about 1e-4. Of the backbone the last three stages then train; its stem and first stage stay as they are,
# as in torchvision. On the command line all of it is `flaxdet train`.

# %%
import json
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from PIL import Image

import flaxdet
from flaxdet.data import read_coco, train_batches
from flaxdet.train import create_state, make_train_step

folder = Path(tempfile.mkdtemp())
SIDE = 96  # of the images, in pixels

# %% [markdown]
# ## The data set
#
# Rectangles of three colours on a grey pattern. An annotation's `bbox` is x, y, width, height; category ids may have
# gaps, as COCO's have.

# %%
CATEGORIES = {1: "red", 3: "blue", 7: "green"}
COLOURS = [(230, 30, 30), (30, 30, 230), (30, 230, 30)]


def draw_image(rng):
    """One image, its boxes (x, y, width, height) and the number of each box's colour."""
    grey = rng.integers(90, 166, (SIDE // 8, SIDE // 8, 1), dtype=np.uint8)
    pixels = grey.repeat(8, axis=0).repeat(8, axis=1).repeat(3, axis=2)
    taken, boxes, colours = np.zeros((SIDE, SIDE), bool), [], []
    for _ in range(4):
        w, h = (int(n) for n in rng.integers(16, 48, 2))
        x, y = int(rng.integers(0, SIDE - w)), int(rng.integers(0, SIDE - h))
        place = np.s_[y : y + h, x : x + w]
        if taken[place].any():
            continue  # rectangles don't hide each other
        taken[place] = True
        colour = int(rng.integers(3))
        pixels[place] = COLOURS[colour]
        boxes.append([x, y, w, h])
        colours.append(colour)
    return pixels, boxes, colours


def write_dataset(name, count, seed):
    """Writes ``count`` images and their annotations, as COCO has them, and reads them back."""
    rng = np.random.default_rng(seed)
    (folder / name).mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in CATEGORIES.items()]}
    for number in range(1, count + 1):
        pixels, boxes, colours = draw_image(rng)
        file_name = f"{number:03}.png"
        Image.fromarray(pixels).save(folder / name / file_name)
        content["images"].append({"id": number, "file_name": file_name, "width": SIDE, "height": SIDE})
        for box, colour in zip(boxes, colours, strict=True):
            row = {"image_id": number, "category_id": list(CATEGORIES)[colour], "bbox": box}
            row |= {"id": len(content["annotations"]) + 1, "area": box[2] * box[3], "iscrowd": 0}
            content["annotations"].append(row)
    (folder / f"{name}.json").write_text(json.dumps(content))
    return read_coco(folder / name, folder / f"{name}.json")


train, val = write_dataset("train", 128, seed=0), write_dataset("val", 24, seed=1)
names = train.categories
len(train), len(val), names

# %%
figure, axes = plt.subplots(1, 6, figsize=(9, 1.7), layout="constrained")
for i, axis in enumerate(axes):
    axis.imshow(train.read_image(i))
    axis.set_axis_off()

# %% [markdown]
# ## The model
#
# An FCOS on a narrow ResNet-18, trained on blood cells. `replace_classes` keeps everything but the layers with outputs
# for each class, which it draws anew. Labels count from 1, 0 is the background, so there are four classes.

# %%
demo = Path(flaxdet.__file__).parent / "zoo" / "demo"
cells, variables = flaxdet.load(demo / "blood_cells.safetensors", min_size=SIDE, max_size=SIDE)
model, variables = flaxdet.replace_classes(cells, variables, len(names))
sum(x.size for x in jax.tree.leaves(variables["params"]))

# %% [markdown]
# ## Training
#
# The optimiser is any optax transform. `train_batches` reads, flips, resizes and pads ahead of the device; its batches
# are dicts of numpy arrays.

# %%
STEPS, BATCH = 200, 4
schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, STEPS // 10, STEPS)
tx = optax.chain(optax.clip_by_global_norm(10.0), optax.adamw(schedule))

state = create_state(model, variables, tx, key=jax.random.key(0))
step = make_train_step(model, tx)  # jitted

history, results = [], {}
for number, batch in enumerate(train_batches(train, model.transform, batch_size=BATCH, steps=STEPS), start=1):
    batch.pop("image_id")
    state, metrics = step(state, batch)
    history.append(metrics)
    if number % (STEPS // 4) == 0:
        results[number] = flaxdet.evaluate(model, state.variables, val, batch_size=8)
        print(f"step {number}: loss {metrics['loss']:.3f}, AP {results[number].ap:.3f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for name in ("loss", "classification", "bbox_regression", "bbox_ctrness"):
    left.plot([float(metrics[name]) for metrics in history], label=name, linewidth=1.8 if name == "loss" else 1)
left.set(xlabel="step", ylabel="loss", title="training images", ylim=(0, None))
for name, label in (("ap50", "AP50"), ("ap75", "AP75"), ("ap", "AP")):
    right.plot([0, *results], [0, *(getattr(result, name) for result in results.values())], "o-", label=label)
right.set(xlabel="step", ylabel="average precision", title="validation images", ylim=(0, 1.03))
for axis in (left, right):
    axis.legend()
    axis.grid(color="#e6e6e6")

# %% [markdown]
# COCO's figures on images that were not trained on: AP is the mean over IoU thresholds from .5 to .95, AP50 and AP75
# are at those two.

# %%
variables = state.variables
print(results[STEPS].table())
assert results[STEPS].ap50 > 0.85

# %% [markdown]
# ## Truth and predictions
#
# Above the annotations of four validation images, below what the detector finds in them with a score of at least 0.5.

# %%
images = [val.read_image(i) for i in range(len(val))]
found = flaxdet.predict(model, variables, images)


def draw(image, detection):
    """The image three times as large, with boxes, those that have a score only from 0.5."""
    large = image.repeat(3, axis=0).repeat(3, axis=1)
    scaled = {**detection, "boxes": 3 * detection["boxes"]}
    style = {"categories": names, "line_width": 3, "font_size": 18}
    return flaxdet.draw_detections(large, scaled, score_threshold=0.5, **style)


figure, axes = plt.subplots(2, 4, figsize=(9, 4.8), layout="constrained")
for i, (above, below) in enumerate(axes.T):
    above.imshow(draw(images[i], {"boxes": val[i].boxes, "labels": val[i].labels}))
    below.imshow(draw(images[i], found[i]))
for axis, title in zip(axes[:, 0], ("truth", "found"), strict=True):
    axis.set_title(title, loc="left")
for axis in axes.flat:
    axis.set_axis_off()

# %% [markdown]
# ## Back to PyTorch
#
# The same architecture out of torchvision's parts; `reference.build` puts them together. (With COCO weights it is
# `torchvision.models.detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=...)`.)

# %%
import torch

from flaxdet.convert import reference, to_torchvision

torch_model = reference.build("tiny_fcos", num_classes=len(names), min_size=SIDE, max_size=SIDE)
type(torch_model)

# %% [markdown]
# `to_torchvision` gives numpy arrays under torchvision's keys. (`flaxdet.save("model.pth", model, variables)` and
# `torch.load` do the same through a file.)

# %%
state_dict = to_torchvision(model, variables)
torch_model.load_state_dict({key: torch.from_numpy(value) for key, value in state_dict.items()}, strict=True)

# %% [markdown]
# Both detect on all validation images, and every detection finds its counterpart: the same label, boxes within .05
# pixels, scores within 5e-4.

# %%
from flaxdet.convert.verify import match_detections

torch_model.eval()
with torch.no_grad():
    theirs = torch_model([torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in images])

matches = [
    match_detections(a, {name: value.numpy() for name, value in b.items()}, 0.05, 5e-4)
    for a, b in zip(found, theirs, strict=True)
]
assert all(match.same for match in matches)
print(f"{sum(match.count for match in matches)} detections of torchvision, all matched")
print(f"boxes within {max(match.box_error for match in matches):.1e} px", end=", ")
print(f"scores within {max(match.score_error for match in matches):.1e}")
