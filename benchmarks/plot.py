"""Plots images/s over batch size from the figures of inference.py.

python benchmarks/plot.py [JSON] [--out PNG]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def plot(report: dict[str, Any], out: Path) -> None:
    """One panel a model, one line a contender."""
    results, machine = report["results"], report["machine"]
    models = results["models"]
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False, layout="constrained")
    for axis, (name, model) in zip(axes[0], models.items(), strict=True):
        lines: dict[str, dict[int, float]] = {}
        for batch, result in model["batches"].items():
            for contender, rate in result["images_per_second"].items():
                lines.setdefault(contender, {})[int(batch)] = rate
        for contender, rates in lines.items():
            ours = contender == "flaxdet"
            axis.plot(list(rates), list(rates.values()), marker="o", label=contender, linewidth=2.5 if ours else 1.2)
        batches = [int(batch) for batch in model["batches"]]
        axis.set(title=name, xlabel="batch", ylabel="images/s", xscale="log", ylim=(0, None))
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", frameon=False)
    versions = ", ".join(f"{package} {machine[package]}" for package in ("jax", "torch", "torchvision"))
    where = (
        machine["device_kind"]
        if machine["device_kind"] != "cpu"
        else f"{machine['processor']}, {machine['cores']} cores"
    )
    figure.suptitle(f"{where}; {results['dtype']}\n{versions}; {report['date']}", fontsize="small")
    figure.savefig(out, dpi=120)


def main() -> None:
    """Draws the plot."""
    parser = argparse.ArgumentParser(description="Plots images/s over batch size.")
    parser.add_argument("json", nargs="?", type=Path, default=HERE / "inference.json")
    parser.add_argument("--out", type=Path, help="default: the JSON's name with .png")
    options = parser.parse_args()
    out = options.out or options.json.with_suffix(".png")
    plot(json.loads(options.json.read_text()), out)
    print(f"-> {out}")


if __name__ == "__main__":
    main()
