"""What accelerator.py runs, in which order and for how long: stages, and how its seconds are dealt out to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

MODELS = ("fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2")
TINY = "tiny_fcos"  # flaxdet's own small detector, for a small run that is quick on a CPU
SHORT = {"fcos_resnet50_fpn": "fcos", "fasterrcnn_resnet50_fpn_v2": "v2", TINY: TINY}
LEAST = 12.0  # seconds below which a stage is not begun
EAGER = ["AMP, channels_last", "eager"]  # contenders that compile nothing, the quickest first


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: for the terminal, the JSON and its files.
        function: "module:function", called with its options and where to write its findings.
        weight: seconds it is thought to take on an H100 at most; its share of what is left follows.
        options: of the function.
        host: runs on the host alone, and sees no accelerator.
        beside: runs beside others on the device, whose programs are not tuned, as none of its figures is a time.
    """

    name: str
    function: str
    weight: float
    options: dict[str, Any] = field(default_factory=dict)
    host: bool = False
    beside: bool = False


# Stages of a group run at the same time: those whose figures are not of time.
Group = tuple[Stage, ...]


def weight(group: Group) -> float:
    """Seconds that a group is thought to take."""
    return max(stage.weight for stage in group)


def limit(group: Group, after: Sequence[Group], left: float) -> float:
    """Seconds that a group of the first pass may take.

    Where there is enough for all, its share, by weight, of what is left, so that all limits sum to the seconds there
    were if each group takes all of its own, and a group that ends early leaves its rest to those after it. Where there
    isn't, what it is thought to take: the last groups go short, and not each of them.

    Args:
        group: the one to begin.
        after: those of the first pass that come after it.
        left: seconds left.

    Returns:
        The seconds; 0 if they are too few to begin.
    """
    own = weight(group)
    granted = max(left * own / (own + sum(weight(one) for one in after)), min(own, left))
    return granted if granted >= min(own, LEAST) else 0.0


def second_limit(group: Group, left: float) -> float:
    """Seconds that a group of the second pass may take: twice what it is thought to, or what is left; 0 if too few."""
    return min(2 * weight(group), left) if left >= LEAST else 0.0


def again(group: Group, killed: set[str]) -> Group:
    """The stages of a group that were killed, for a second try: programs may be in the cache by then.

    Args:
        group: of the first pass.
        killed: names of the stages that were.
    """
    return tuple(replace(stage, name=f"{stage.name}, again") for stage in group if stage.name in killed)


def _ours(task: str, model: str, batches: list[int], dtype: str, seconds: float, **options: Any) -> Stage:
    name = _name(task, SHORT[model], dtype, batches, options)
    given = {"model": model, "batches": batches, "dtype": dtype, **options}
    return Stage(name, f"accelerator_ours:{task}", seconds, given)


def _compile(tasks: Sequence[str], models: Sequence[str], batches: list[int], dtype: str, seconds: float) -> Stage:
    name = _name(f"compile {' and '.join(tasks)}", "+".join(SHORT[model] for model in models), dtype, batches, {})
    given = {"tasks": list(tasks), "models": list(models), "batches": batches, "dtype": dtype}
    return Stage(name, "accelerator_ours:compile_programs", seconds, given)


def _theirs(
    task: str, models: Sequence[str], batches: list[int], dtype: str, contenders: list[str], seconds: float, **more: Any
) -> Stage:
    name = _name(f"{task} of torchvision", "+".join(SHORT[model] for model in models), dtype, batches, more)
    name += f", {contenders[0]}" if len(contenders) == 1 else ""
    given = {"models": list(models), "batches": batches, "dtype": dtype, "contenders": contenders, **more}
    return Stage(name, f"accelerator_torch:{task}", seconds, given)


def _name(task: str, models: str, dtype: str, batches: list[int], options: dict[str, Any]) -> str:
    shape = " {}x{}".format(*options["shape"]) if "shape" in options else ""
    return f"{task}, {models}, {dtype}, batch {'+'.join(map(str, batches))}{shape}"


def first_pass(models: Sequence[str], batch: int) -> list[Group]:
    """One bfloat16 case a model of everything."""
    correct = [
        Stage(f"{name}, {SHORT[model]}", f"accelerator_correct:{name}", 65, {"model": model}, beside=True)
        for model in models
        for name in ("detections", "gradients")
    ]
    weights = [
        Stage(f"weights, {SHORT[model]}", "accelerator_machine:weights", 50, {"models": [model]}, host=True)
        for model in models
    ]
    counted = {"count": True, "profile": ["AMP, channels_last"]}
    return [
        (Stage("machine", "accelerator_machine:machine", 25),),
        (_compile(["inference"], models, [batch], "bfloat16", 50), *weights),
        tuple(correct),
        *((_ours("inference", model, [batch], "bfloat16", 12, profile=True),) for model in models),
        (_theirs("inference", models, [batch], "bfloat16", EAGER, 55, **counted),),
        (Stage("parts", "accelerator_parts:parts", 80),),
        (_compile(["training"], models, [batch], "bfloat16", 130),),
        *((_ours("training", model, [batch], "bfloat16", 15, profile=True),) for model in models),
        (_theirs("training", models, [batch], "bfloat16", EAGER, 160, **counted),),
    ]


def second_pass() -> list[Group]:
    """The rest, most telling first."""
    groups: list[Group] = [(_compile(["inference"], MODELS, [1, 2, 4], "bfloat16", 90),)]
    groups += [(_ours("inference", model, [1, 2, 4], "bfloat16", 25),) for model in MODELS]
    groups.append((_theirs("inference", MODELS, [1, 2, 4], "bfloat16", EAGER, 40),))
    groups.append((_compile(["training"], MODELS, [2], "bfloat16", 60),))
    groups += [(_ours("training", model, [2], "bfloat16", 15),) for model in MODELS]
    groups.append((_theirs("training", MODELS, [2], "bfloat16", EAGER, 25),))
    groups += [(_theirs(task, MODELS, [16], "bfloat16", ["AMP"], 50),) for task in ("inference", "training")]
    for task, batch in (("inference", 16), ("inference", 1), ("training", 16), ("training", 2)):
        groups += [(_theirs(task, [model], [batch], "bfloat16", ["AMP, compiled"], 60),) for model in MODELS]
    groups += [(_ours("training", model, [2], "bfloat16", 45, shape=[320, 448]),) for model in MODELS]
    groups.append((_theirs("training", MODELS, [2], "bfloat16", EAGER, 20, shape=[320, 448]),))
    for dtype in ("float32", "tf32"):
        groups.append((_compile(["inference"], MODELS, [16, 1], dtype, 90),))
        groups += [(_ours("inference", model, [1, 16], dtype, 25),) for model in MODELS]
        groups.append((_theirs("inference", MODELS, [1, 16], dtype, ["eager", "channels_last"], 40),))
        groups += [(_ours("training", model, [2], dtype, 50),) for model in MODELS]
        groups.append((_theirs("training", MODELS, [2], dtype, ["eager", "channels_last"], 30),))
        groups.append((_theirs("inference", MODELS, [16], dtype, ["compiled"], 120),))
    return groups


def small_plan(model: str) -> tuple[list[Group], list[Group]]:
    """Both passes of a small run: every stage, of one model, and one of the second pass."""
    heavy = {"detections": 60.0, "gradients": 60.0, "compile_programs": 40.0}  # on a CPU
    first = [
        tuple(replace(stage, weight=heavy.get(stage.function.partition(":")[2], 20.0)) for stage in group)
        for group in first_pass([model], 2)
    ]
    return first, [(_theirs("inference", [model], [1], "float32", ["eager", "channels_last"], 60),)]
