# %% [markdown]
# # A torchvision checkpoint to Flax and back
#
# A `state_dict` becomes Flax variables and a `state_dict` again, both ways bit for bit. Then torchvision and flaxdet
# run on the same photo with these weights, and their answers are compared stage by stage.
#
# To need no download, the checkpoint is made here, from random weights chosen so that every tensor matters and
# something is detected. **With COCO weights** take in place of the first cell of "The checkpoint"
#
# ```python
# theirs = torchvision.models.detection.fcos_resnet50_fpn(weights="COCO_V1", **SIZES).eval()  # or your own model
# ```
#
# or, without torch, `model, variables = flaxdet.fcos_resnet50_fpn(weights="COCO_V1")`. On the command line all of this
# is `flaxdet convert model.pth model.safetensors` and `flaxdet verify fcos_resnet50_fpn --weights COCO_V1`.

# %%
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import cbook
from PIL import Image

import flaxdet
from flaxdet.convert import StateDictError, from_torchvision, lively, reference, to_torchvision, verify

torchvision = reference.torchvision()  # import torchvision; also where pip's wheel and torch do not fit each other
folder = Path(tempfile.mkdtemp())
SIZES = {"min_size": 256, "max_size": 320}  # small, to be quick; leave it out for torchvision's 800 and 1333

# %% [markdown]
# ## The checkpoint
#
# torchvision's FCOS with frozen BatchNorm, as it is when anything is pretrained.

# %%
theirs = reference.build("fcos_resnet50_fpn", frozen=True, **SIZES)
lively.make_lively(theirs)
type(theirs)

# %%
torch.save(theirs.state_dict(), folder / "model.pth")
state_dict = theirs.state_dict()
len(state_dict), sum(tensor.numel() for tensor in state_dict.values())

# %% [markdown]
# ## To Flax
#
# `flaxdet.load` tells the architecture and the number of classes from the keys. What the keys do not say, such as
# sizes, is given as to torchvision's builder. torch is not needed to read the file.

# %%
model, variables = flaxdet.load(folder / "model.pth", **SIZES)
type(model), model.num_classes

# %% [markdown]
# The variables are a nested dict of arrays: `params`, which train, and `batch_stats`, where a frozen BatchNorm keeps
# all four of its vectors. Module names are torchvision's; a convolution's kernel is [h, w, in, out] here and
# [out, in, h, w] there.

# %%
kernel = variables["params"]["backbone"]["body"]["conv1"]["kernel"]
weight = state_dict["backbone.body.conv1.weight"]
print(kernel.shape, tuple(weight.shape))
np.testing.assert_array_equal(kernel, weight.permute(2, 3, 1, 0))

# %% [markdown]
# ## And back
#
# `to_torchvision` returns numpy arrays under torchvision's keys, in its order and layouts. Every one of them holds the
# very bits that went in.

# %%
back = to_torchvision(model, variables)

assert list(back) == list(state_dict)
for key, tensor in state_dict.items():
    assert back[key].dtype == tensor.numpy().dtype
    assert back[key].tobytes() == tensor.numpy().tobytes(), key
print(f"{len(back)} tensors, the same bits")

# %% [markdown]
# In a file: what `flaxdet.save` writes to a `.pth` is for `torch.load`, and torchvision takes it with `strict=True`.

# %%
flaxdet.save(folder / "back.pth", model, variables)

again = reference.build("fcos_resnet50_fpn", frozen=True, **SIZES)
again.load_state_dict(torch.load(folder / "back.pth"), strict=True)
assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), state_dict.values(), strict=True))

# %% [markdown]
# The other way round, from Flax: variables that never came from torchvision, trained in JAX say, survive the trip too.
# A `.safetensors` file of `flaxdet.save` has the same keys, so torchvision can read it; beside them it keeps how the
# model was built, and can keep the names of the classes (`categories=`), so that `flaxdet.load` needs no options.

# %%
trained = jax.tree.map(lambda x: x * 0.9, variables)  # as if it had been trained
flaxdet.save(folder / "trained.safetensors", model, trained)
loaded_model, loaded = flaxdet.load(folder / "trained.safetensors")
through_torch = from_torchvision(model, to_torchvision(model, trained))

assert loaded_model == model
for tree in (loaded, through_torch):
    assert jax.tree.structure(tree) == jax.tree.structure(trained)
    assert all(map(np.array_equal, jax.tree.leaves(tree), jax.tree.leaves(trained)))

# %% [markdown]
# A file that does not fit is refused, with all its faults at once.

# %%
damaged = dict(state_dict)
damaged["head.classification_head.cls_logits.weight"] = torch.zeros(3, 256, 3, 3)
damaged["surplus"] = torch.zeros(1)
del damaged["backbone.body.conv1.weight"]
try:
    from_torchvision(model, damaged)
except StateDictError as error:
    print(error)

# %% [markdown]
# ## The same answer
#
# The same tensors do not yet make the same detector. `verify.compare` runs both on a photo and compares what each stage
# returns, so that the first layer that differs would show. `Precision.HIGHEST` matters on TPUs and newer GPUs, which
# otherwise multiply with fewer digits than float32 has.

# %%
photo = np.asarray(Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB"))
exact = flaxdet.load(folder / "model.pth", precision=jax.lax.Precision.HIGHEST, **SIZES)
comparison = verify.compare(*exact, theirs, [photo])

print(f"{'stage':<16} {'shape':<16} {'largest error':>14} {'of largest value':>17}")
for stage in comparison.stages:
    print(f"{stage.name:<16} {'x'.join(map(str, stage.shape)):<16} {stage.error:>14.1e} {stage.relative:>17.1e}")

# %%
(match,) = comparison.matches
print(f"{match.count} detections of torchvision, {match.ours} of flaxdet, {match.matched} matched")
print(f"largest difference: boxes {match.box_error:.1e} px, scores {match.score_error:.1e}")
assert comparison.same

# %% [markdown]
# ## Rounding, and nothing else
#
# Errors of a millionth could be rounding, or a small mistake. In float64 rounding shrinks by a factor of 5e8, and a
# mistake would stay.

# %%
with jax.enable_x64(True):
    double = verify.compare(*flaxdet.load(folder / "model.pth", dtype=np.float64, **SIZES), theirs.double(), [photo])
(match,) = double.matches
print(f"{match.matched} of {match.count} matched")
print(f"largest difference: boxes {match.box_error:.1e} px, scores {match.score_error:.1e}")
assert double.same

# %%
figure, axis = plt.subplots(figsize=(8, 3.8), layout="constrained")
stages = [stage.name for stage in comparison.stages]
for found, label, colour in ((comparison, "float32", "#e08214"), (double, "float64", "#1f5fa8")):
    axis.plot(stages, [stage.relative for stage in found.stages], "o-", color=colour, label=label)
    epsilon = float(np.finfo(label).eps)
    axis.axhline(epsilon, color=colour, linewidth=0.8, linestyle="--")
    axis.text(len(stages) - 1, epsilon / 1.5, f"epsilon of {label}", color=colour, fontsize=8, ha="right", va="top")
axis.set(yscale="log", ylabel="largest error / largest value", title="torchvision and flaxdet, stage by stage")
axis.set_ylim(1e-17, 1e-4)
axis.tick_params(axis="x", rotation=60)
axis.grid(axis="y", color="#e6e6e6")
axis.legend(loc="center right").set_title("computed in")

# %% [markdown]
# And the detections themselves, the best ten. (The weights are random, so what they mark means nothing; that both
# mark it does.)

# %%
figure, axes = plt.subplots(1, 2, figsize=(8.4, 5.2), layout="constrained")
for axis, title, (found,) in zip(axes, ("torchvision", "flaxdet"), (comparison.theirs, comparison.ours), strict=True):
    best = {name: value[:10] for name, value in found.items()}
    axis.imshow(flaxdet.draw_detections(photo, best, line_width=3, font_size=14))
    axis.set_title(title)
    axis.set_axis_off()
