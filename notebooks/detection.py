# %% [markdown]
# # Detection, and a look inside
#
# A photo goes into FCOS, and we stop at every stage: what the backbone returns, where the head sees which class, which
# boxes come of it, and what non-maximum suppression leaves.
#
# To need no download, this notebook takes the tiny detector of blood cells that comes with flaxdet, the one of
# `flaxdet detect --demo`. **With COCO weights** put in place of the first cell of "Detector and photo"
#
# ```python
# model, variables = flaxdet.fcos_resnet50_fpn(weights="COCO_V1")  # 124 MB, downloaded once
# names = flaxdet.FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
# image = read_image("photo.jpg")
# ```
#
# All that follows stays as it is, but for what it says of cells.

# %%
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import flaxdet
from flaxdet import to_original, transform
from flaxdet.data import read_image
from flaxdet.inference.detect import unpad

# %% [markdown]
# ## Detector and photo
#
# A file of `flaxdet.save` holds the weights, how the model was built, and the names of the classes. This FCOS has a
# narrow ResNet-18 as its body and 448,273 parameters. Images are arrays [H, W, 3], uint8, RGB.

# %%
demo = Path(flaxdet.__file__).parent / "zoo" / "demo"
model, variables = flaxdet.load(demo / "blood_cells.safetensors")
names = flaxdet.load_categories(demo / "blood_cells.safetensors")
image = read_image(demo / "BloodImage_00222.jpg")
image.shape, image.dtype, names

# %% [markdown]
# Label 0 is the background in torchvision's numbering, so platelets, red and white blood cells are 1, 2 and 3.

# %%
Image.fromarray(image)

# %% [markdown]
# ## From image to boxes
#
# One call. Boxes are xyxy in pixels of the image that was given, best first; here those with a score of .5 and more.

# %%
(found,) = flaxdet.predict(model, variables, [image])
for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True):
    if score >= 0.5:
        print(f"{names[label]:<10} {score:.2f}  {box.round(1)}")

# %%
Image.fromarray(flaxdet.draw_detections(image, found, categories=names, score_threshold=0.5))

# %% [markdown]
# There is one white blood cell in this photo, the large one with a dark nucleus.

# %%
sure = found["labels"][found["scores"] >= 0.5]
assert (sure == names.index("WBC")).sum() == 1
assert (sure == names.index("RBC")).sum() >= 8

# %% [markdown]
# ## What the model sees
#
# `predict` has done three things: `transform`, `model.apply`, and `to_original`, which takes the boxes back to the
# image's own pixels. The batch first. `size` is the image's after the resize (rows, columns). `canvas` is the part of
# the array that belongs to the image, its own padding to a multiple of 32 included; `None` says that it is all of it.

# %%
batch = transform([image], model.transform)
print("pixels", batch.pixels.shape, batch.pixels.dtype)
print("size", batch.size[0], "of", batch.original_size[0])
print("canvas", batch.canvas)

# %% [markdown]
# ## Features
#
# The model leaves every stage in Flax's collection `intermediates`, under its name.

# %%
detections, state = jax.jit(lambda v, b: model.apply(v, b, mutable=["intermediates"]))(variables, batch)
stages = {name: np.asarray(value) for name, (value,) in state["intermediates"].items()}
for name, value in stages.items():
    print(f"{name:<16}", value.shape)

# %% [markdown]
# The pyramid as pictures: at each cell of a map the norm over its channels, dark where it is small. The strip beside
# the image is padding.

# %%
levels = [name for name in stages if name[0] == "p"]
rows, columns = batch.pixels.shape[1:3]
height, width = (int(side) for side in batch.size[0])
pixels = np.asarray(Image.fromarray(image).resize((width, height)))

figure, axes = plt.subplots(1, 1 + len(levels), figsize=(9, 2), layout="constrained")
axes[0].imshow(np.pad(pixels, ((0, rows - height), (0, columns - width), (0, 0))))
axes[0].set_title(f"image: {rows} x {columns}", fontsize=9)
for axis, name in zip(axes[1:], levels, strict=True):
    axis.imshow(np.linalg.norm(stages[name][0], axis=-1), cmap="magma", extent=(0, columns, rows, 0))
    axis.set_title(f"{name}: {stages[name].shape[1]} x {stages[name].shape[2]}", fontsize=9)
for axis in axes:
    axis.set_axis_off()

# %% [markdown]
# ## Class scores
#
# For each cell of each level the head gives a logit a class, one logit of centerness (how near the cell is to the
# centre of its object) and four distances to the sides of a box. FCOS's score is the geometric mean of the two
# probabilities. Levels lie one after the other; here they become maps again.

# %%
scores = np.asarray(np.sqrt(jax.nn.sigmoid(stages["cls_logits"][0]) * jax.nn.sigmoid(stages["bbox_ctrness"][0])))
shapes = tuple(stages[name].shape[1:3] for name in levels)
ends = np.cumsum([h * w for h, w in shapes])
maps = {
    name: part.reshape(*shape, -1)
    for name, shape, part in zip(levels, shapes, np.split(scores, ends[:-1]), strict=True)
}

# %% [markdown]
# Three classes with the highest scores, on the two levels that see most. In training a cell of `p3` answers for an
# object if no side of its box is more than 64 pixels away (after the resize), one of `p4` if the farthest is 64 to 128
# away, and so on. So platelets and red blood cells are `p3`'s. Off the centre of the white one, the farther side is
# more than 64 pixels away: there it is `p4`'s.

# %%
shown_classes = np.sort(np.argsort(scores.max(axis=0))[-3:])
shown_levels = sorted(sorted(levels, key=lambda name: -(maps[name] > model.score_thresh).sum())[:2])
grey = np.repeat(pixels.mean(axis=-1, keepdims=True).astype(np.uint8) // 2, 3, axis=-1)

figure, axes = plt.subplots(2, 3, figsize=(8.4, 4.3), layout="constrained")
for line, level in zip(axes, shown_levels, strict=True):
    for axis, label in zip(line, shown_classes, strict=True):
        heat = maps[level][..., label]
        axis.imshow(grey)
        shown = axis.imshow(
            heat, cmap="inferno", alpha=np.clip(3 * heat, 0, 0.9), vmin=0, vmax=1, extent=(0, columns, rows, 0)
        )
        axis.set(xlim=(0, width), ylim=(height, 0), title=f"{names[label]}, {level}")
        axis.set_axis_off()
figure.colorbar(shown, ax=axes, shrink=0.6).set_label("score")

# %% [markdown]
# ## Boxes before and after NMS
#
# Every cell that sees an object proposes a box for it. Each part of the model can be called alone: here the last one,
# `postprocess`, on the head's outputs from above, with a threshold that suppresses nothing, since no two boxes have an
# intersection over union above 1.

# %%
everything = model.clone(nms_thresh=1.0, detections_per_img=1000)
outputs = {name: stages[name] for name in ("cls_logits", "bbox_regression", "bbox_ctrness")}
postprocess = jax.jit(lambda outputs, batch: everything.apply({}, outputs, batch, shapes, method="postprocess"))
(candidates,) = unpad(postprocess(outputs, batch))
len(candidates["boxes"])

# %% [markdown]
# `flaxdet.ops.batched_nms` goes through them, best first, and drops what overlaps a better one of its class by more
# than the threshold. Sizes are static under jit: `max_output` indices come back, -1 beyond the last. What it keeps is
# what the model returned.

# %%
keep = np.asarray(
    flaxdet.ops.batched_nms(
        candidates["boxes"],
        candidates["scores"],
        candidates["labels"],
        model.nms_thresh,
        max_output=model.detections_per_img,
    )
)
print(keep[:10], "...", keep[-3:])
keep = keep[keep >= 0]

(returned,) = unpad(detections)
np.testing.assert_array_equal(candidates["labels"][keep], returned["labels"])
np.testing.assert_allclose(candidates["boxes"][keep], returned["boxes"], atol=1e-3)
print(f"{len(candidates['boxes'])} candidates, {len(keep)} kept")

# %%
figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.7), layout="constrained")
palette = dict(zip(np.unique(candidates["labels"]), plt.get_cmap("tab10").colors * 10, strict=False))
handles = [plt.Line2D([], [], color=colour, label=names[label]) for label, colour in palette.items()]
figure.legend(handles=handles[:10], loc="outside lower center", ncols=5, frameon=False)
for axis, title, chosen in zip(axes, ("before NMS", "after"), (slice(None), keep), strict=True):
    axis.imshow(pixels.astype(int) // 2 + 127)
    boxes, labels = candidates["boxes"][chosen], candidates["labels"][chosen]
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        colour = palette[label]
        axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=1.2))
    axis.set(xlim=(0, width), ylim=(height, 0), title=f"{title}: {len(boxes)} boxes")
    axis.set_axis_off()

# %% [markdown]
# ## Back to the image
#
# These boxes are in pixels of the resized image. `to_original` brings them back, and there they are what `predict`
# said.

# %%
(original,) = unpad(to_original(detections, batch))
np.testing.assert_allclose(original["boxes"], found["boxes"], atol=1e-2)
np.testing.assert_array_equal(original["labels"], found["labels"])
