"""Programs compiled for H200 GPUs on a machine that has none.

It takes the wheels jax-cuda13-plugin and jax-cuda13-pjrt of jax's version:
  pip install --no-deps --target DIR jax-cuda13-plugin==V jax-cuda13-pjrt==V
  PYTHONPATH=DIR pytest tests/test_devices.py
Nothing runs, and matrix products are not tuned.
"""

import pytest

# A GpuTargetConfigProto with what the compiler asks for.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""


def devices(count: int):
  """Descriptions of that many GPUs of one machine; skips without the wheels."""
  pytest.importorskip("jax_plugins.xla_cuda13", exc_type=ImportError)
  from jax.experimental import topologies

  made = topologies.get_topology_desc(
    platform="cuda", target_config=TARGET, topology=f"1x1x{count}"
  )
  return made.devices
