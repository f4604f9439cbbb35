"""Compiled programs taken apart: every figure of a small one worked out by hand."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def compiled_hlo():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import compiled_hlo

        yield compiled_hlo
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def program(compiled_hlo):
    text = (Path(__file__).parent / "program.hlo").read_text()
    return compiled_hlo.read(text, Counter({"sort_7_1": 3}))


def of_kind(program, kind):
    return [kernel for kernel in program.kernels if kernel.kind == kind]


def test_a_convolution_counts_its_output_times_its_taps(program):
    (conv,) = of_kind(program, "convolution")
    assert conv.flop == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 3)
    assert conv.bytes == 2 * (2 * 8 * 8 * 3 + 16 * 3 * 3 * 3 + 2 * 8 * 8 * 16)  # bf16, the workspace apart
    assert (conv.dtype, conv.path) == ("bf16", "jit(f)/conv")
    assert program.convolutions == {"bf16": 1}


def test_a_product_counts_its_output_times_its_terms(program):
    (product,) = of_kind(program, "product")
    assert product.flop == 2 * 128 * 16 * 16
    assert product.bytes == 2 * (128 * 16 + 16 * 16 + 128 * 16)
    assert program.products == {"bf16": 1}


@pytest.mark.parametrize(
    ("target", "shapes", "flop"),
    [
        # of the input: cotangent 2x4x4x16 and kernel 3x3, 8 channels in
        ("__cudnn$convBackwardInput", ("2,4,4,16", "16,3,3,8", "2,8,8,8"), 2 * (2 * 4 * 4 * 16) * 9 * 8),
        # of the kernel: input 2x8x8x8, cotangent 2x4x4x16
        ("__cudnn$convBackwardFilter", ("2,8,8,8", "2,4,4,16", "16,3,3,8"), 2 * (2 * 4 * 4 * 16) * 9 * 8),
    ],
)
def test_gradients_of_a_convolution_count_as_much(compiled_hlo, target, shapes, flop):
    lhs, rhs, out = shapes
    attributes = f'dim_labels=b01f_o01i->b01f, custom_call_target="{target}"'
    text = f"""
ENTRY %main (a: bf16[{lhs}], b: bf16[{rhs}]) -> bf16[{out}] {{
  %a = bf16[{lhs}] parameter(0)
  %b = bf16[{rhs}] parameter(1)
  ROOT %c = (bf16[{out}], u8[0]) custom-call(%a, %b), window={{size=3x3 stride=2x2}}, {attributes}
}}
"""
    (kernel,) = compiled_hlo.read(text).kernels
    assert kernel.flop == flop


def test_a_long_sort_is_several_launches_over_all_its_values(program):
    (sort,) = of_kind(program, "sort")
    assert sort.passes == 3
    assert sort.bytes == 3 * 2 * (16 * 5000 * (4 + 4))
    assert program.sorts == [{"dtype": "f32", "rows": 16, "length": 5000, "launches": 3, "path": ""}]


def test_a_loop_of_known_length_counts_each_turn(program):
    (loop,) = program.loops
    assert (loop.turns, loop.kernels, loop.depth, loop.path) == (5, 2, 0, "jit(f)/while")  # the update, the comparison
    assert [kernel.turns for kernel in program.kernels if kernel.turns != 1] == [5, 5]


def test_a_part_of_an_array_counts_alone(program):
    update = next(kernel for kernel in of_kind(program, "fusion") if kernel.turns == 5)
    assert update.bytes == 16 + 16 + 4  # the row in the table, the row, where
    gather = program.kernels[-1]
    assert gather.bytes == 160 + 40 + 160  # rows read, which, rows written


def test_a_part_that_is_converted_counts_in_the_dtype_of_the_array(compiled_hlo):
    text = """
%fused_slice (param_0: bf16[16,100,136,256]) -> f32[16,1,1,256] {
  %param_0 = bf16[16,100,136,256]{3,2,1,0} parameter(0)
  %wide = f32[16,100,136,256]{3,2,1,0} convert(%param_0)
  ROOT %first = f32[16,1,1,256]{3,2,1,0} slice(%wide), slice={[0:16], [0:1], [0:1], [0:256]}
}

ENTRY %main (map: bf16[16,100,136,256]) -> f32[16,1,1,256] {
  %map = bf16[16,100,136,256]{3,2,1,0} parameter(0)
  ROOT %fusion = f32[16,1,1,256]{3,2,1,0} fusion(%map), kind=kLoop, calls=%fused_slice
}
"""
    (kernel,) = compiled_hlo.read(text).kernels
    assert kernel.bytes == 16 * 256 * (2 + 4)


def test_sums_are_told_from_maxima(program):
    assert program.sums == {"f32": 1}


def test_what_returns_to_python_is_named(program):
    assert program.callbacks == ["xla_ffi_python_gpu_callback"]
    assert program.custom_calls["__cublas$lt$matmul"] == 1


def test_an_exchange_between_devices_is_listed(program):
    assert program.collectives == [{"kind": "all-reduce", "bytes": 8, "path": "jit(f)/psum"}]  # two float32 numbers


def test_what_only_names_values_is_no_kernel(program):
    kinds = Counter(kernel.kind for kernel in program.kernels)
    others = {"all-reduce": 1, "sort": 1, "iota": 1, "compare": 1, "xla_ffi_python_gpu_callback": 1}
    assert kinds == {"convolution": 1, "product": 1, "fusion": 3, **others}


def test_other_text_is_refused(compiled_hlo):
    with pytest.raises(ValueError, match="no ENTRY computation"):
        compiled_hlo.read("module @jit_f {}")
