"""The devices that ``aot.py`` compiles for, none of which has to be there: their compilers, and their rates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# XLA's description of the card (a GpuTargetConfigProto); the numbers are those of NVIDIA's data sheet and of CUDA's
# device properties.
_H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Device:
    """A device and its compiler.

    Attributes:
        name: on the command line.
        routes: the platform whose routes the program takes.
        platform: jax's name of the compiler's platform.
        topology: jax's arguments for it.
        batch: images a call, by default.
        memory: bytes of the device.
        options: of the compiler.
        environment: of the process that compiles.
        packages: distributions that hold the compiler, whose versions are reported.
        bandwidth: bytes a second that a large copy reaches in practice.
        rates: multiplications and additions a second that large products reach, by dtype of their inputs.
        launch: seconds that a kernel takes at least.
    """

    name: str
    routes: Literal["gpu", "tpu"]
    platform: str
    topology: dict[str, Any]
    batch: int
    memory: float
    packages: tuple[str, ...]
    bandwidth: float
    rates: dict[str, float]
    launch: float
    options: dict[str, bool | str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


DEVICES = {
    "h100": Device(
        "h100",
        routes="gpu",
        platform="cuda",
        topology={"topology_name": "h100x1", "topology": "1x1x1", "target_config": _H100},
        batch=16,
        memory=84942979072,
        packages=("jax-cuda12-plugin", "jax-cuda12-pjrt"),
        bandwidth=3.0e12,
        rates={"bf16": 600e12, "f16": 600e12, "f32": 47e12},
        launch=2.5e-6,
        # Without a device nothing is tuned. Triton's products then take the first tiles that fit, and some find none;
        # cuBLAS chooses by itself.
        options={"xla_gpu_enable_triton_gemm": False},
    ),
    "tpu-v5e": Device(
        "tpu-v5e",
        routes="tpu",
        platform="tpu",
        topology={"topology_name": "v5e:2x2"},
        batch=8,
        memory=16e9,
        packages=("libtpu",),
        bandwidth=819e9,
        rates={"bf16": 197e12, "f32": 33e12},
        launch=0.0,
        environment={
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        },  # no cloud's metadata server is asked
    ),
}
