"""Programs compiled for devices that aren't there, by their compilers; and how what these say is reported."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import pytest

from flaxdet.models.initial import initial_variables
from flaxdet.registry import make_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FCOS_NAME, V2_NAME = "fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"
# small forms of the detectors: what a program holds, and whether it compiles, shows in these
SMALL: dict[str, Any] = {"dtype": "bfloat16", "batch": 2, "size": [128, 160], "masked": False, "depth": 18}
SMALL["devices"] = 1


@pytest.fixture
def aot(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("aot")


@pytest.fixture
def plugins(aot, request):
    try:
        return aot.plugin_folder()
    except SystemExit as error:
        pytest.skip(f"needs the compilers of GPUs and TPUs: {' '.join(str(error).split())}")


@pytest.mark.aot
@pytest.mark.parametrize("program", ["infer", "train"])
@pytest.mark.parametrize("model", [FCOS_NAME, V2_NAME])
@pytest.mark.parametrize("device", ["h100", "tpu-v5e"])
def test_compiles(aot, plugins, tmp_path, device, model, program):
    report = aot.compile_alone({"device": device, "model": model, "program": program, **SMALL}, tmp_path, plugins)
    assert "error" not in report, (tmp_path / "stderr.txt").read_text()[-3000:]
    assert report["callbacks"] == []
    assert report["convolutions"]["bf16"] > 20
    if device == "h100":  # a TPU's compiler writes products of boxes as convolutions too
        assert "f32" not in report["convolutions"]
    assert report["share_of_memory"] < 1  # it fits the device
    assert report["kernels"] > 50
    if (model, program) != (FCOS_NAME, "train"):
        assert report["loops"]  # of NMS
    assert report["roofline_ms"] > 0


@pytest.mark.aot
def test_devices_exchange_gradients_and_statistics_alone(aot, plugins, tmp_path):
    """A step of Faster R-CNN on the four chips of a slice: sums, and no array of the images is gathered."""
    asked = {"device": "tpu-v5e", "model": V2_NAME, "program": "train", **SMALL, "batch": 4, "devices": 4}
    report = aot.compile_alone(asked, tmp_path, plugins)
    assert "error" not in report, (tmp_path / "stderr.txt").read_text()[-3000:]
    assert {one["kind"] for one in report["collectives"]} == {"all-reduce"}
    model = make_model(V2_NAME, num_classes=91)
    backbone: Any = model.backbone
    model = model.clone(backbone=backbone.clone(body=backbone.body.clone(depth=SMALL["depth"])))
    variables = jax.eval_shape(functools.partial(initial_variables, model), jax.random.key(0))
    gradients_mb = sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) * 4 / 1e6
    # each gradient once, in float32 or before it is cast from bfloat16; statistics are less than a hundredth of that
    assert gradients_mb / 2 < sum(one["mb"] for one in report["collectives"]) < 1.01 * gradients_mb


def test_says_how_to_install_the_compilers(aot, monkeypatch, tmp_path):
    monkeypatch.setenv("FLAXDET_AOT_PLUGINS", str(tmp_path / "none"))
    monkeypatch.setattr(aot, "version", lambda name: "0.10.2")
    with pytest.raises(SystemExit, match=r"pip install --no-deps --target .*none -r .*jax-0\.10\.2\.txt"):
        aot.plugin_folder()
    monkeypatch.setattr(aot, "version", lambda name: "0.9")
    with pytest.raises(SystemExit, match=r"no list of compilers for jax 0\.9 \(known: jax-0\.10\.2.*jax-0\.9\.txt"):
        aot.plugin_folder()


def test_each_list_of_compilers_is_of_one_jax():
    lists = list((BENCHMARKS / "aot_requirements").glob("*.txt"))
    assert lists
    for path in lists:
        wanted = dict(line.split("==") for line in path.read_text().splitlines() if not line.startswith("#"))
        assert wanted.pop("libtpu")
        version = path.stem.removeprefix("jax-")
        assert wanted == {"jax-cuda12-plugin": version, "jax-cuda12-pjrt": version}


THUNKS = """\
001: kCustomKernel   [source         | next=004 (3) ] wrapped_convert grid: [81600, 1, 1] threads: [128, 1, 1]
002: kConvolution    [prev=003 (1)   | next=005 (1) ] kConvolution
003: kCustomKernel   [prev=528 (1)   | next=530 (1) ] sort_7_1 grid: [4848, 1, 1] threads: [1024, 1, 1]
004: kCustomKernel   [prev=529 (1)   | next=531 (1) ] sort_7_1__1 grid: [32768, 1, 1] threads: [128, 1, 1]
005: kCustomKernel   [prev=529 (1)   | next=531 (1) ] sort_7_1__2 grid: [32768, 1, 1] threads: [128, 1, 1]
006: kWhile          [prev=693 (1)   | next=744 (1) ]
condition:
    007: kCustomKernel [source | sink] input_reduce_fusion_2 grid: [1, 1, 1] threads: [16, 1, 1]
  body:
    008: kCustomKernel [source       | next=697 (1)] loop_select_fusion_5 grid: [625, 1, 1] threads: [128, 1, 1]
    009: kCopy         [prev=699 (1) | next=710 (4)] kCopy
010: kCopy           [prev=744 (1)   | sink         ] kCopy
"""


def test_launches_of_a_sort_count_together(aot):
    launches, outside = aot.read_thunks(THUNKS)
    assert outside == 6  # of ten lines, three are in the loop, and the loop itself launches nothing
    assert launches["sort_7_1"] == 3
    assert launches["loop_select_fusion_5"] == 1


def test_a_gpus_roofline_is_the_sum_of_its_kernels(aot, monkeypatch):
    monkeypatch.setattr(aot, "commit", lambda: "abc")
    kernel = aot.compiled_hlo.Kernel
    program = aot.compiled_hlo.Program(
        kernels=[
            kernel("convolution", "", 6e9, 3e6, "bf16", 1, 1),  # 10 us of arithmetic, 1 us of traffic
            kernel("sort", "", 0.0, 6e6, "f32", 2, 1),  # 2 us of traffic, two launches
            kernel("fusion", "", 0.0, 3e6, "f32", 1, 4),  # 1 us of traffic, four turns
        ],
        loops=[aot.compiled_hlo.Loop("a/while", 4, 1, 0)],
    )
    asked = {"device": "h100", "model": FCOS_NAME, "program": "infer", **SMALL}
    memory = dict.fromkeys(("argument", "output", "alias", "temp", "generated_code"), 10_000_000)
    facts = {"costs": {}, "memory": memory, "versions": {}, "compile_seconds": 1.0}
    report = aot.describe(aot.DEVICES["h100"], asked, facts, program, None)
    assert report["arithmetic_ms"] == pytest.approx(0.01)
    assert report["traffic_ms"] == pytest.approx(0.01, abs=0.004)  # 1 + 2 + 4 us, rounded to hundredths
    assert report["roofline_ms"] == pytest.approx(0.03, abs=0.006)  # 10 + 2 + 4 us, and seven launches of 2.5 us
    assert (report["gflop"], report["gflop_an_image"], report["kernels"]) == (6.0, 3.0, 3)


def test_a_tpus_compiler_counts_for_itself(aot, monkeypatch):
    monkeypatch.setattr(aot, "commit", lambda: "abc")
    asked = {"device": "tpu-v5e", "model": FCOS_NAME, "program": "infer", **SMALL}
    memory = dict.fromkeys(("argument", "output", "alias", "temp", "generated_code"), 4e9)
    costs = {"flops": 394e9, "bytes accessed": 8.19e9}
    facts = {"costs": costs, "memory": memory, "versions": {}, "compile_seconds": 1.0}
    report = aot.describe(aot.DEVICES["tpu-v5e"], asked, facts, aot.compiled_hlo.Program(), None)
    assert (report["arithmetic_ms"], report["traffic_ms"], report["roofline_ms"]) == (2.0, 10.0, 10.0)
    assert report["share_of_memory"] == 0.5


def run(aot, monkeypatch, tmp_path, reports, *arguments):
    """``main`` with compilers that say what they are told."""
    monkeypatch.setattr(aot, "plugin_folder", lambda: tmp_path)
    monkeypatch.setattr(aot, "compile_alone", lambda asked, folder, plugins: {**asked, **reports[asked["program"]]})
    monkeypatch.setattr(sys, "argv", ["aot.py", *arguments])
    aot.main()


def told(milliseconds: float) -> dict[str, Any]:
    names = ("arithmetic_ms", "traffic_ms", "gflop", "gflop_an_image", "traffic_gb", "temporaries_mb", "arguments_mb")
    counts = {name: Counter() for name in ("kernels_by_kind", "convolutions", "products", "sums")}
    rest = {
        "loops": [],
        "sorts": [],
        "callbacks": [],
        "collectives": [],
        "kernels": 7,
        "commit": "abc",
        "versions": {},
        "code_mb": 1,
    }
    return {**dict.fromkeys(names, 1), **counts, **rest, "roofline_ms": milliseconds}


def test_reports_are_merged_and_the_former_figure_is_shown(aot, monkeypatch, tmp_path, capsys):
    path = tmp_path / "aot.json"
    arguments = ("h100", FCOS_NAME, "all", "--size", "128x160", "--json", str(path))
    run(aot, monkeypatch, tmp_path, {"infer": told(20.0), "train": told(70.0)}, *arguments)
    run(
        aot,
        monkeypatch,
        tmp_path,
        {"infer": told(15.0), "train": {"error": "no tiles"}},
        *arguments[:2],
        "infer",
        *arguments[3:],
    )
    assert "15.0 ms  [20.0 ms, abc]" in capsys.readouterr().out
    written = json.loads(path.read_text())
    key = f"h100 {FCOS_NAME} infer bfloat16 16x128x160"
    assert {name: report["roofline_ms"] for name, report in written.items()} == {
        key: 15.0,
        key.replace("infer", "train"): 70.0,
    }
    assert [file.name for file in tmp_path.iterdir()] == ["aot.json"]


def test_one_that_fails_is_named_and_the_others_are_compiled(aot, monkeypatch, tmp_path, capsys):
    path = tmp_path / "aot.json"
    reports = {"infer": {"error": "no tiles"}, "train": told(70.0)}
    with pytest.raises(SystemExit, match=f"failed: h100 {FCOS_NAME} infer"):
        run(aot, monkeypatch, tmp_path, reports, "h100", FCOS_NAME, "all", "--json", str(path))
    assert "failed: no tiles" in capsys.readouterr().out
    assert len(json.loads(path.read_text())) == 1


@pytest.mark.parametrize("size", ["800", "800x", "ax2", "800 1088"])
def test_a_size_has_rows_and_columns(aot, monkeypatch, tmp_path, capsys, size):
    with pytest.raises(SystemExit):
        run(aot, monkeypatch, tmp_path, {}, "h100", FCOS_NAME, "infer", "--size", size)
    assert "expected ROWSxCOLUMNS" in capsys.readouterr().err
