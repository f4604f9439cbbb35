# %% [markdown]
# # Detection, and a look inside
#
# A photo goes into FCOS, and we stop at every stage: what the backbone returns, where the head sees which class, which
# boxes come of it, and what non-maximum suppression leaves.
#
# To be quick and need no download, this notebook trains a small detector for half a minute, on stickers pasted into the
# photo. **With COCO weights** leave out the section "A small detector" and put in its place
#
# ```python
# model, variables = flaxdet.fcos_resnet50_fpn(weights="COCO_V1")  # 124 MB, downloaded once
# names = flaxdet.FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
# image = photo
# ```
#
# All that follows stays as it is.

# %%
import functools

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib import cbook
from PIL import Image, ImageDraw

import flaxdet
from flaxdet import to_original, transform, transform_targets
from flaxdet.inference.detect import unpad
from flaxdet.nn import BatchNorm, FeaturePyramidNetwork, LastLevelP6P7

# %% [markdown]
# The photo comes with matplotlib: Grace Hopper, 512 pixels wide and 600 high. Images are arrays [H, W, 3], uint8, RGB.

# %%
photo = np.asarray(Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB"))
photo.shape, photo.dtype

# %% [markdown]
# ## A small detector
#
# Stickers of three kinds are the objects. Label 0 is the background in torchvision's numbering, so they are 1, 2 and 3.

# %%
names = ["__background__", "disc", "square", "triangle"]
COLOURS = [None, (250, 130, 20), (40, 170, 80), (120, 60, 200)]


def paste(image, stickers):
    """Pastes a list of (label, x, y, side); returns the new image, and boxes (x1, y1, x2, y2) and labels."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    boxes = [(x, y, x + side, y + side) for _, x, y, side in stickers]
    for (label, *_), (x1, y1, x2, y2) in zip(stickers, boxes, strict=True):
        style = {"fill": COLOURS[label], "outline": "white", "width": 4}
        if label == 1:
            draw.ellipse((x1, y1, x2, y2), **style)
        elif label == 2:
            draw.rectangle((x1, y1, x2, y2), **style)
        else:
            draw.polygon([((x1 + x2) // 2, y1), (x1, y2), (x2, y2)], **style)
    return np.array(picture), {"boxes": np.array(boxes, np.float32), "labels": np.array([row[0] for row in stickers])}


image, truth = paste(
    photo,
    [
        (1, 20, 30, 84),
        (1, 330, 425, 150),
        (2, 410, 30, 72),
        (2, 25, 250, 60),
        (3, 20, 405, 170),
        (3, 395, 170, 96),
        (3, 225, 490, 64),
    ],
)

# %% [markdown]
# `flaxdet.FCOS` takes any Linen backbone that returns named feature maps, finest first, and has `out_channels`. Five
# convolutions do here, with flaxdet's own feature pyramid on the last three: `p3` has a cell every 8 pixels, `p7` one
# every 128.


# %%
class SmallBackbone(nn.Module):
    """Five 3x3 convolutions of stride 2, and a pyramid on the last three."""

    out_channels: int = 64

    @nn.compact
    def __call__(self, pixels, *, train=False):
        """[B, H, W, 3] to {"p3": [B, H / 8, W / 8, 64], "p4": ..., "p7": ...}."""
        x, stages = pixels, {}
        for i, channels in enumerate((16, 32, 64, 64, 64), start=1):
            x = nn.Conv(channels, (3, 3), strides=2, padding=1, use_bias=False)(x)
            x = nn.relu(BatchNorm()(x, train=train))
            stages[f"c{i}"] = x
        pyramid = FeaturePyramidNetwork(self.out_channels, LastLevelP6P7(self.out_channels, self.out_channels))
        return pyramid({name: stages[name] for name in ("c3", "c4", "c5")}, bucket=pixels.shape[1:3])


model = flaxdet.FCOS(SmallBackbone(), num_classes=len(names), min_size=256, score_thresh=0.3)

# %% [markdown]
# It trains on the photo with other stickers each time. `transform` halves it (the shorter side of 512 pixels becomes
# `min_size`), normalises, and pads to a multiple of 32; `transform_targets` takes the boxes along.

# %%
SIDES = [(44, 120), (130, 180)]  # small stickers and large ones, equally often


def draw_batch(rng, size=2):
    """The photo with up to eight stickers, ``size`` times, and as the model takes it."""
    images, targets = [], []
    for _ in range(size):
        stickers = []
        for _ in range(8):
            label, side = int(rng.integers(1, 4)), int(rng.integers(*SIDES[rng.integers(2)]))
            x, y = int(rng.integers(0, 512 - side)), int(rng.integers(0, 600 - side))
            if all(x >= u + s or u >= x + side or y >= v + s or v >= y + side for _, u, v, s in stickers):
                stickers.append((label, x, y, side))  # stickers don't hide each other
        picture, target = paste(photo, stickers)
        images.append(picture)
        targets.append(target)
    batch = transform(images, model.transform)
    return images, batch, transform_targets(targets, batch, model=model, max_boxes=8)


rng = np.random.default_rng(0)
pictures, batch, targets = draw_batch(rng, size=4)

figure, axes = plt.subplots(1, 4, figsize=(8, 2.5), layout="constrained")
for axis, picture, boxes in zip(axes, pictures, np.asarray(targets.boxes) * 2, strict=True):
    axis.imshow(picture)
    for x1, y1, x2, y2 in boxes:
        axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color="yellow", linewidth=1.5))
    axis.set_axis_off()

# %% [markdown]
# With targets, `model.apply` returns torchvision's losses by name. The rest is any JAX training step. (For real data
# there are `flaxdet.data` and `flaxdet.train`: see [fine_tuning.ipynb](fine_tuning.ipynb).)

# %%
STEPS = 400
schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, STEPS // 10, STEPS)
tx = optax.chain(optax.clip_by_global_norm(10.0), optax.adamw(schedule))


@functools.partial(jax.jit, compiler_options=flaxdet.compiler_options())  # on a CPU these options save time
def train_step(variables, opt_state, batch, targets):
    """One step: new variables, new state of the optimiser, losses."""

    def total(params):
        losses, updates = model.apply(
            {**variables, "params": params}, batch, targets, train=True, mutable=["batch_stats"]
        )
        return sum(losses.values()), (losses, updates)

    gradients, (losses, updates) = jax.grad(total, has_aux=True)(variables["params"])
    changes, opt_state = tx.update(gradients, opt_state, variables["params"])
    return {"params": optax.apply_updates(variables["params"], changes), **updates}, opt_state, losses


variables = jax.jit(model.init)(jax.random.key(0), batch)
opt_state = tx.init(variables["params"])
for number in range(1, STEPS + 1):
    _, batch, targets = draw_batch(rng)
    variables, opt_state, losses = train_step(variables, opt_state, batch, targets)
    if number in (1, STEPS // 4, STEPS // 2, STEPS):
        print(f"step {number:>3}", *(f"{name} {float(value):.3f}" for name, value in losses.items()), sep="   ")

# %% [markdown]
# It finds every sticker of an arrangement that it was not trained on: the right class, and an overlap (intersection
# over union) above 0.7.

# %%
(found,) = flaxdet.predict(model, variables, [image])
overlap = np.asarray(flaxdet.ops.box_iou(truth["boxes"], found["boxes"]))
best = overlap.argmax(axis=1)
assert (overlap.max(axis=1) > 0.7).all()
assert (found["labels"][best] == truth["labels"]).all()
overlap.max(axis=1).round(2)

# %% [markdown]
# ## From image to boxes
#
# One call. Boxes are xyxy in pixels of the image that was given, best first.

# %%
(found,) = flaxdet.predict(model, variables, [image])
for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True):
    print(f"{names[label]:<10} {score:.2f}  {box.round(1)}")

# %%
Image.fromarray(flaxdet.draw_detections(image, found, categories=names))

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
# The pyramid as pictures: at each cell the norm over its channels, dark where it is small. The strip below the image is
# padding.

# %%
levels = [name for name in stages if name[0] == "p"]
rows, columns = batch.pixels.shape[1:3]
height, width = (int(side) for side in batch.size[0])
pixels = np.asarray(Image.fromarray(image).resize((width, height)))

figure, axes = plt.subplots(1, 1 + len(levels), figsize=(11, 2.6), layout="constrained")
axes[0].imshow(np.pad(pixels, ((0, rows - height), (0, columns - width), (0, 0))))
axes[0].set_title(f"image: {rows} x {columns}", fontsize=9)
for axis, name in zip(axes[1:], levels, strict=True):
    axis.imshow(np.linalg.norm(stages[name][0], axis=-1), cmap="magma", extent=(0, columns, rows, 0))
    axis.set_title(f"{name}: {stages[name].shape[1]} x {stages[name].shape[2]} cells", fontsize=9)
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
# away, and so on. So stickers are `p3`'s; only of the largest ones some cells off the centre are `p4`'s.

# %%
shown_classes = np.sort(np.argsort(scores.max(axis=0))[-3:])
shown_levels = sorted(sorted(levels, key=lambda name: -(maps[name] > model.score_thresh).sum())[:2])
grey = np.repeat(pixels.mean(axis=-1, keepdims=True).astype(np.uint8) // 2, 3, axis=-1)

figure, axes = plt.subplots(2, 3, figsize=(8.4, 6.4), layout="constrained")
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
figure, axes = plt.subplots(1, 2, figsize=(8.4, 5.2), layout="constrained")
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
