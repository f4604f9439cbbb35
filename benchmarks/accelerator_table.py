"""What accelerator.py prints last: one table of everything that its stages found, and the kernels as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerator_plan import SHORT

MOST = 11_800  # characters of the table, which has to survive where only the end of an output is kept
COLUMNS = {  # of the contenders
    "flaxdet": "flaxdet",
    "eager": "eager",
    "AMP": "AMP",
    "AMP, channels_last": "chan.last",
    "channels_last": "chan.last",
    "AMP, compiled": "compiled",
    "compiled": "compiled",
}
CASE = ("task", "model", "dtype", "size", "columns", "batch")

Found = list[dict[str, Any]]
Stages = list[dict[str, Any]]


def table(stages: Stages) -> str:
    """The report, in at most ``MOST`` characters.

    Args:
        stages: of the report, as accelerator.py collects them.
    """
    found = [entry for stage in stages for entry in stage["found"]]
    sections = (_machine, _correctness, _rates, _parts)
    text = "\n\n".join("\n".join(lines) for section in sections if (lines := list(section(found))))
    failures = "\n".join(_failures(stages))
    room = MOST - len(failures) - 2
    if len(text) > room:
        text = text[: max(room - 40, 0)] + "\n... (the rest is in the JSON)"
    return f"{text}\n\n{failures}"[:MOST]


def _of(found: Found, kind: str) -> Found:
    return [entry for entry in found if entry["kind"] == kind]


def _machine(found: Found) -> Iterator[str]:
    for entry in _of(found, "machine"):
        versions = ", ".join(f"{name} {entry[name]}" for name in ("jax", "flax", "torch", "torchvision", "python"))
        yield f"{entry['device_kind']} ({entry['platform']}), {entry['cores']} cores, {versions}"
        yield f"torch on {entry['torch_device']}, {entry['torchvision_ops']}"
    for entry in _of(found, "imported"):
        yield f"import flaxdet {entry['flaxdet']:.1f} s, devices {entry['devices']:.1f} s"
    ceilings = [
        f"{entry['what']} {entry['library']} {entry['value']:.4g} {entry['unit']}" for entry in _of(found, "ceiling")
    ]
    if ceilings:
        yield "ceilings: " + ", ".join(ceilings)


def _correctness(found: Found) -> Iterator[str]:
    lines = [*_verified(found), *_halves(found), *_gradients(found)]
    if lines:
        yield "CORRECTNESS on the device"
        yield from lines


def _verified(found: Found) -> Iterator[str]:
    for entry in _of(found, "verify"):
        verdict = "the same" if entry["same"] else f"NOT the same, first at {entry['first_difference']}"
        worst = max(entry["stages"], key=lambda stage: stage["relative"], default=None)
        stages = f"; stages to {worst['relative']:.1e} ({worst['name']})" if worst else ""
        yield f"  {SHORT[entry['model']]:<5}float32 against torchvision: {verdict}; {_matched(entry)}{stages}"


def _halves(found: Found) -> Iterator[str]:
    for entry in _of(found, "bfloat16"):
        yield f"  {SHORT[entry['model']]:<5}bfloat16 against float32, {entry['side']}: {_matched(entry)}"


def _matched(entry: dict[str, Any]) -> str:
    matches = entry["matches"]
    matched, ours, theirs = (sum(match[key] for match in matches) for key in ("matched", "ours", "count"))
    box, score = (max((match[key] for match in matches), default=0.0) for key in ("box_error", "score_error"))
    return f"{matched} of {ours} and {theirs} detections matched, boxes to {box:.2g} px, scores to {score:.1e}"


def _gradients(found: Found) -> Iterator[str]:
    entries = _of(found, "gradients")
    for entry in entries:
        smallest, median, largest = entry["ratios"]
        yield (
            f"  {SHORT[entry['model']]:<5}gradients, {entry['side']} {entry['of']} against {entry['against']}: error "
            f"median {entry['median']:.2g}, largest {entry['largest']:.2g}; norms {smallest:.2f} to {largest:.2f} "
            f"(median {median:.3f}) of {entry['parameters']} parameters"
        )
    half = {(entry["model"], entry["side"]): entry for entry in entries if entry["of"] == "bfloat16"}
    for model in SHORT:
        if (model, "flaxdet") in half:
            theirs = half.get((model, "torchvision"), {}).get("all", {})
            yield f"  {SHORT[model]:<5}worst in bfloat16: error and ratio of norms, and those of torch's autocast"
            for row in half[model, "flaxdet"]["worst"]:
                numbers = (row["error"], row["ratio"], *theirs.get(row["name"], ()))
                yield "    " + " ".join(f"{number:8.3g}" for number in numbers) + f"  {row['name']}"


def _rates(found: Found) -> Iterator[str]:
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for entry in _of(found, "rate"):
        key = (*(entry.get(name) for name in CASE), entry["what"])
        cases.setdefault(key, {})[COLUMNS[entry["contender"]]] = entry
    columns = list(dict.fromkeys(COLUMNS.values()))
    if cases:
        yield "SPEED, images/s; best: flaxdet's over the best other; share: of the measured product in that dtype"
        yield (
            f"  {'':<6}{'dtype':<10}{'size':>9}{'batch':>6} {'what':<8}"
            + "".join(f"{column:>10}" for column in columns)
            + f"{'best':>7}{'share':>7}  GiB of memory"
        )
    for key, row in sorted(cases.items(), key=lambda item: _order(item[0])):
        task, model, dtype, size, wide, batch, what = key
        shape = f"{size}x{wide}" if task == "training" else f"{size}"
        rates = {column: entry["images_per_second"] for column, entry in row.items()}
        cells = "".join(f"{rates[column]:10.4g}" if column in rates else f"{'-':>10}" for column in columns)
        others = [rate for column, rate in rates.items() if column != "flaxdet"]
        best = f"{rates['flaxdet'] / max(others):7.2f}" if others and "flaxdet" in rates else f"{'-':>7}"
        share = _share(found, key, row.get("flaxdet"))
        line = f"  {SHORT[model]:<6}{dtype:<10}{shape:>9}{batch:>6} {what:<8}{cells}{best}"
        line += f"{share:7.0%}" if share is not None else f"{'-':>7}"
        if what in ("pixels", "step"):
            line += f"  {_memory(found, key)}"
        broken = [column for column, entry in row.items() if not abs(entry.get("loss", 0.0)) < float("inf")]
        yield line.rstrip() + (f"  LOSS NOT FINITE: {', '.join(broken)}" if broken else "")


def _order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    task, model, dtype, size, _, batch, what = key
    dtypes, kinds = ("bfloat16", "tf32", "float32"), ("pixels", "device", "network", "step")
    return task, dtypes.index(dtype), list(SHORT).index(model), -size, -batch, kinds.index(what)


def _same_case(entry: dict[str, Any], key: tuple[Any, ...]) -> bool:
    return all(entry.get(name) == value for name, value in zip(CASE, key, strict=False))


def _share(found: Found, key: tuple[Any, ...], ours: dict[str, Any] | None) -> float | None:
    """Of the ceiling that flaxdet reaches; operations as XLA counts them, or torch."""
    counts = [entry for kind in ("compiled", "gflop") for entry in _of(found, kind) if entry.get("gflop")]
    counted = [entry["gflop"] for entry in counts if _same_case(entry, key)]
    limits = [entry["value"] for entry in _of(found, "ceiling") if entry["what"] == key[2]]
    if ours is None or not counted or not limits:
        return None
    return counted[0] / 1000 / ours["median"] / max(limits)


def _memory(found: Found, key: tuple[Any, ...]) -> str:
    peaks = {
        COLUMNS[entry["contender"]]: entry["mib"] / 1024 for entry in _of(found, "memory") if _same_case(entry, key)
    }
    return ", ".join(f"{column} {peaks[column]:.1f}" for column in dict.fromkeys(COLUMNS.values()) if column in peaks)


def _parts(found: Found) -> Iterator[str]:
    times: dict[str, dict[str, float]] = {}
    for entry in _of(found, "part"):
        times.setdefault(entry["part"], {})[entry["side"]] = entry["median"] * 1e3
    agreements = {entry["part"]: entry for entry in _of(found, "agreement")}
    if times:
        yield f"PARTS, ms{'':<31}{'flaxdet':>10}{'torchvision':>13}{'times as fast':>15}  agreement"
    for name, row in times.items():
        ours, theirs = row.get("flaxdet"), row.get("torchvision")
        ratio = f"{theirs / ours:15.2f}" if ours and theirs else f"{'-':>15}"
        cells = (f"{'-':>10}" if ours is None else f"{ours:10.3f}") + (
            f"{'-':>13}" if theirs is None else f"{theirs:13.3f}"
        )
        yield f"  {name:<38}{cells}{ratio}  {_agreement(agreements.get(name, {}))}"


def _agreement(entry: dict[str, Any]) -> str:
    if "relative_difference" in entry:
        return f"to {entry['relative_difference']:.1e}"
    if "images" in entry:
        return f"{entry['images_that_agree']} of {entry['images']} images"
    return {True: "the same", False: "NOT the same"}.get(entry.get("same"), "")  # pyright: ignore


def _failures(stages: Stages) -> Iterator[str]:
    statuses = ("done", "failed", "killed", "skipped")
    counts = {status: sum(one["status"] == status for one in stages) for status in statuses}
    yield "STAGES: " + ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    lines: list[str] = []
    for one in stages:
        if one["status"] in ("failed", "killed"):
            lines.append(f"  {one['status']}: {one['name']}: {one['reason']}")
        for entry in _of(one["found"], "failure"):
            what = ", ".join(str(value) for key, value in entry.items() if key not in ("kind", "error"))
            lines.append(f"  failure: {what}: {entry['error']}")
    yield from (line[:200] for line in lines[:16])
    if len(lines) > 16:
        yield f"  and {len(lines) - 16} more, in the JSON"
    skipped = [one["name"] for one in stages if one["status"] == "skipped"]
    if skipped:
        yield f"  not begun: {'; '.join(skipped)}"[:600]


def profile_text(stages: Stages) -> str:
    """The kernels of every profiled call, by name and time.

    Args:
        stages: of the report.
    """
    parts: list[str] = []
    for entry in (entry for stage in stages for entry in _of(stage["found"], "kernels")):
        title = ", ".join(str(entry[name]) for name in ("contender", *CASE) if entry.get(name) is not None)
        lines = [f"{title}: {entry['total_ms']:.3f} ms in {entry['launches']} launches"]
        lines += [f"{ms:10.3f} ms {count:6d}  {name}" for name, ms, count in entry["rows"]]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
