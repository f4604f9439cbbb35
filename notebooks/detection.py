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
import flax.linen as nn
import flaxdet
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flaxdet.nn import BatchNorm, FeaturePyramidNetwork, LastLevelP6P7
from flaxdet.transform import to_original, transform, transform_targets
from matplotlib import cbook
from PIL import Image, ImageDraw

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


def with_stickers(image, rng, count):
    """Pastes stickers; returns the new image, and their boxes (x1, y1, x2, y2 in pixels) and labels."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    boxes, labels = [], []
    while len(boxes) < count:
        side = int(rng.integers(44, 110))
        x, y = (int(rng.integers(0, length - side)) for length in picture.size)
        box = (x, y, x + side, y + side)
        if any(x < b[2] and b[0] < box[2] and y < b[3] and b[1] < box[3] for b in boxes):
            continue  # stickers don't hide each other
        label = int(rng.integers(1, 4))
        if label == 1:
            draw.ellipse(box, fill=(250, 130, 20), outline="white", width=4)
        elif label == 2:
            draw.rectangle(box, fill=(40, 170, 80), outline="white", width=4)
        else:
            top = (x + side // 2, y)
            draw.polygon([top, (x, y + side), (x + side, y + side)], fill=(120, 60, 200), outline="white", width=4)
        boxes.append(box)
        labels.append(label)
    return np.array(picture), {"boxes": np.array(boxes, np.float32), "labels": np.array(labels)}


image, truth = with_stickers(photo, np.random.default_rng(1906), count=7)

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
        x, stages = pixels, {}
        for i, channels in enumerate((16, 32, 48, 64, 64), start=1):
            x = nn.Conv(channels, (3, 3), strides=2, padding=1, use_bias=False)(x)
            x = nn.relu(BatchNorm()(x, train=train))
            stages[f"c{i}"] = x
        pyramid = FeaturePyramidNetwork(self.out_channels, LastLevelP6P7(self.out_channels, self.out_channels))
        return pyramid({name: stages[name] for name in ("c3", "c4", "c5")}, bucket=pixels.shape[1:3])


model = flaxdet.FCOS(SmallBackbone(), num_classes=len(names), min_size=256)

# %% [markdown]
# It trains on crops of 256 x 256 pixels. `transform` resizes to the size that the model's detections will be made at
# (half that of the photo), normalises, and pads to a multiple of 32; `transform_targets` takes the boxes along.

# %%
config = flaxdet.TransformConfig(min_size=128, max_size=128)


def draw_batch(rng, size=8):
    """Crops with stickers, as the model takes them."""
    images, targets = [], []
    for _ in range(size):
        y, x = int(rng.integers(0, 600 - 256)), int(rng.integers(0, 512 - 256))
        crop, target = with_stickers(photo[y : y + 256, x : x + 256], rng, count=int(rng.integers(1, 4)))
        images.append(crop)
        targets.append(target)
    batch = transform(images, config)
    return batch, transform_targets(targets, batch, max_boxes=4)


rng = np.random.default_rng(0)
batch, targets = draw_batch(rng)
variables = jax.jit(model.init)(jax.random.key(0), batch)
sum(x.size for x in jax.tree.leaves(variables["params"]))

# %% [markdown]
# With targets, `model.apply` returns torchvision's losses by name. The rest is any JAX training step. (For real data
# there are `flaxdet.data` and `flaxdet.train`: see [fine_tuning.ipynb](fine_tuning.ipynb).)

# %%
STEPS = 200
tx = optax.chain(
    optax.clip_by_global_norm(10.0), optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 20, STEPS))
)


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


step = jax.jit(train_step, compiler_options=flaxdet.compiler_options())  # on a CPU these options save time
opt_state = tx.init(variables["params"])
history = []
for _ in range(STEPS):
    variables, opt_state, losses = step(variables, opt_state, *draw_batch(rng))
    history.append(losses)
print({name: round(float(value), 3) for name, value in history[0].items()}, "at first")
print({name: round(float(value), 3) for name, value in history[-1].items()}, "at last")

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
# image's own pixels. The batch first. `size` is the image's after the resize (rows, columns); `canvas` would be the part
# of the array that counts as the image's padding, and `None` says that it is all of it.

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
stages = {name: value[0] for name, value in state["intermediates"].items() if isinstance(value, tuple)}
for name, value in stages.items():
    print(f"{name:<16}", value.shape)

# %% [markdown]
# The pyramid as pictures: at each cell the norm over its channels.

# %%
levels = [name for name in stages if name[0] == "p"]
figure, axes = plt.subplots(1, len(levels), figsize=(12, 3.2), layout="constrained")
for axis, name in zip(axes, levels, strict=True):
    axis.imshow(np.linalg.norm(stages[name][0], axis=-1), cmap="magma")
    axis.set_title(f"{name}: {stages[name].shape[1]} x {stages[name].shape[2]} cells", fontsize=10)
    axis.set_axis_off()

# %% [markdown]
# ## Class scores
#
# For each cell of each level the head gives a logit a class, one logit of centerness (how near the cell is to the centre
# of its object) and four distances to the sides of a box. FCOS's score is the geometric mean of the two probabilities.
# Levels lie one after the other; here they become maps again.

# %%
scores = np.sqrt(jax.nn.sigmoid(stages["cls_logits"][0]) * jax.nn.sigmoid(stages["bbox_ctrness"][0]))
shapes = tuple(stages[name].shape[1:3] for name in levels)
ends = np.cumsum([h * w for h, w in shapes])
maps = {
    name: part.reshape(*shape, -1)
    for name, shape, part in zip(levels, shapes, np.split(scores, ends[:-1]), strict=True)
}

# %% [markdown]
# Three classes with the highest scores, on the two levels that have seen most: small objects belong to `p3`, those with
# a longer side of 64 to 128 pixels (after the resize) to `p4`.

# %%
shown_classes = np.sort(np.argsort(scores.max(axis=0))[-3:])
shown_levels = sorted(sorted(levels, key=lambda name: -(maps[name] > model.score_thresh).sum())[:2])
pixels = np.asarray(Image.fromarray(image).resize((int(batch.size[0, 1]), int(batch.size[0, 0]))))
rows, columns = batch.pixels.shape[1:3]

figure, axes = plt.subplots(2, 3, figsize=(9, 7), layout="constrained")
for line, level in zip(axes, shown_levels, strict=True):
    for axis, label in zip(line, shown_classes, strict=True):
        axis.imshow(pixels.mean(axis=-1), cmap="gray", alpha=0.5)
        heat = axis.imshow(
            maps[level][..., label], cmap="magma", alpha=0.7, vmin=0, vmax=1, extent=(0, columns, rows, 0)
        )
        axis.set(xlim=(0, pixels.shape[1]), ylim=(pixels.shape[0], 0), title=f"{names[label]}, {level}")
        axis.set_axis_off()
figure.colorbar(heat, ax=axes, label="score", shrink=0.6);

# %% [markdown]
# ## Boxes before and after NMS
#
# Every cell that sees an object proposes a box for it. Each part of the model can be called alone: here the last one, on
# the head's outputs from above, once as it is and once with a threshold that suppresses nothing.

# %%
outputs = {name: stages[name] for name in ("cls_logits", "bbox_regression", "bbox_ctrness")}
everything = model.clone(nms_thresh=1.0, detections_per_img=1000)  # no two boxes have an IoU above 1
candidates = everything.apply({}, outputs, batch, shapes, method="postprocess")
candidates = jax.tree.map(lambda x: x[0][candidates.valid[0]], candidates.replace(overflow=candidates.valid))
len(candidates.boxes)

# %% [markdown]
# `flaxdet.ops.batched_nms` goes through them, best first, and drops what overlaps a better one of its class by more than
# the threshold. Sizes are static under jit: `max_output` indices come back, -1 beyond the last. What it keeps is what
# the model returned.

# %%
keep = flaxdet.ops.batched_nms(
    candidates.boxes, candidates.scores, candidates.labels, model.nms_thresh, max_output=model.detections_per_img
)
keep = keep[keep >= 0]

valid = detections.valid[0]
np.testing.assert_array_equal(candidates.labels[keep], detections.labels[0][valid])
np.testing.assert_allclose(candidates.boxes[keep], detections.boxes[0][valid], atol=1e-3)
print(f"{len(candidates.boxes)} candidates, {len(keep)} kept")

# %%
colours = plt.get_cmap("tab10")
figure, axes = plt.subplots(1, 2, figsize=(9, 5.4), layout="constrained")
for axis, chosen, title in zip(axes, (np.arange(len(candidates.boxes)), keep), ("before NMS", "after"), strict=True):
    axis.imshow(pixels, alpha=0.6)
    for x1, y1, x2, y2, label in np.c_[candidates.boxes[chosen], candidates.labels[chosen]]:
        colour = colours(int(label) % 10)
        axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=1.2))
    axis.set_title(f"{title}: {len(chosen)} boxes")
    axis.set_axis_off()

# %% [markdown]
# ## Back to the image
#
# These boxes are in pixels of the resized image. `to_original` brings them back, and there they are what `predict` said.

# %%
original = to_original(detections, batch)
np.testing.assert_allclose(original.boxes[0][valid], found["boxes"], atol=1e-3)
np.testing.assert_array_equal(original.labels[0][valid], found["labels"])
