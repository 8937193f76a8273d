"""The LSTM kernel compiled for an H200 on a machine that has none.

Nothing runs. The figures come from what XLA dumps of each program: the shared
memory of its launch, and its PTX, whose registers and spills `ptxas -v` tells,
which XLA assembles in the same way. They are in docs/kernels.md; this prints
them where the wheels of `h200` and ptxas 13 are at hand:
  PYTHONPATH=DIR:. JAX_PLATFORMS=cpu python tests/test_kernels_h200.py
"""

import pathlib
import re
import shutil
import subprocess
import tempfile
from typing import NamedTuple

import h200
import jax
import jax.numpy as jnp
import pytest

from zorn_jax import kernels
from zorn_jax.kernels import lstm_configs
from zorn_jax.kernels.arguments import check

pytestmark = [
  pytest.mark.optimized,
  pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning"),
]

WIDTHS = (20, 50, 150, 300, 512, 850, 1000)  # Of the paper's heads.
OTHERS = (64, 96, 100, 128, 152, 160, 320)
SHARED_LIMIT = 232448  # Bytes a block, on H100 and H200.
LENGTH, HEADS = 11, 2


class Case(NamedTuple):
  width: int
  dtype: str
  perturbation: str = ""
  batch: int = 1024
  pairs: int = 2
  rank: int = 1
  precision: str | None = None
  config: kernels.Config | None = None
  output: str = "all"
  looked_up: bool = False


class Figures(NamedTuple):
  config: kernels.Config
  shared: int
  registers: int | None  # None without ptxas, and from jax 0.11 on.
  spills: int | None  # Bytes stored.


def arguments(case: Case):
  """Shapes of what `lstm` takes."""
  lead = (case.pairs, 2) if case.perturbation else ()
  struct, width = jax.ShapeDtypeStruct, case.width
  state = struct((*lead, case.batch, HEADS, width), jnp.float32)
  shape = (*lead, case.batch, LENGTH, HEADS, 4, width)
  factor = struct((case.pairs, 4, HEADS, case.rank, width), jnp.float32)
  perturbation = {
    "": None,
    "dense": kernels.Dense(
      struct((case.pairs, 2), jnp.uint32), struct((2,), jnp.float32)
    ),
    "low rank": kernels.LowRank(factor, factor, struct((2,), jnp.float32)),
  }[case.perturbation]
  x = struct(shape, case.dtype)
  if case.looked_up:
    tokens, own = struct((case.batch, LENGTH), jnp.int32), lead
    factors = ()
    if case.perturbation == "low rank":
      factors = ((*lead, 3, 100), (*lead, 3, HEADS, 4, width))
      factors, own = (struct(x, jnp.float32) for x in factors), ()
    table = struct((*own, 100, HEADS, 4, width), jnp.float32)
    x = kernels.Lookup(table, tokens, *factors)
  return (
    x,
    struct((4, HEADS, width, width), case.dtype),
    struct((4, HEADS, width), case.dtype),
    (state, state),
    perturbation,
  )


def config_of(case: Case) -> kernels.Config:
  if case.config:
    return case.config
  found = []
  jax.eval_shape(
    lambda *args: found.append(lstm_configs.config_of(check(*args))),
    *arguments(case),
  )
  return found[0]


def compiled(case: Case, options=None, transform=lambda f: f):
  def run(x_proj, r, b, carry, perturbation):
    return kernels.lstm(
      x_proj,
      r,
      b,
      carry,
      perturbation=perturbation,
      output=case.output,
      implementation="triton",
      config=config_of(case),
    )

  mesh = jax.sharding.Mesh(h200.devices(1), ("device",))
  there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)
  args = jax.tree.map(place, arguments(case))
  with (
    jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
    jax.default_matmul_precision(case.precision),
  ):
    return jax.jit(transform(run)).lower(*args).compile(options)


def figures(case: Case) -> Figures:
  """Compiles a case, and reads what XLA dumped."""
  with tempfile.TemporaryDirectory() as folder:
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
      compiled(case, {"xla_dump_to": folder})
    finally:
      jax.config.update("jax_enable_compilation_cache", cached)
    found = list(pathlib.Path(folder).glob("*.thunk_sequence.txt"))
    text = "\n".join(path.read_text() for path in found)
    (shared,) = re.findall(r" lstm_\w+ .*shared_memory: (\d+) bytes", text)
    paths = pathlib.Path(folder).glob("*.ptx")
    ptx = [path for path in paths if ".entry lstm_" in path.read_text()]
    assembled = _assembled(ptx[0]) if ptx else (None, None)
    return Figures(config_of(case), int(shared), *assembled)


def _assembled(ptx):
  """Registers of a thread, and bytes it spills; None without ptxas."""
  if shutil.which("ptxas") is None:
    return None, None
  command = ["ptxas", "-arch=sm_90a", "-v", str(ptx), "-o", "/dev/null"]
  text = subprocess.run(
    command, check=True, capture_output=True, text=True
  ).stderr
  one = lambda pattern: int(re.findall(pattern, text)[0])
  return one(r"Used (\d+) registers"), one(r"(\d+) bytes spill stores")


CASES = [
  Case(width, dtype, perturbation, pairs=96, looked_up=True)
  for width in WIDTHS
  for dtype in ("bfloat16", "float32")
  for perturbation in ("dense", "low rank")
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits(case):
  assert figures(case).shared <= SHARED_LIMIT


@pytest.mark.parametrize("width", OTHERS)
def test_other_widths_and_few_rows_fit(width):
  for batch in (1, 17):
    case = Case(width, "bfloat16", batch=batch, output="last")
    assert figures(case).shared <= SHARED_LIMIT


@pytest.mark.parametrize(
  "width, dtype",
  [
    (100, "bfloat16"),
    (128, "bfloat16"),
    (150, "bfloat16"),
    (152, "bfloat16"),
    (64, "float32"),
  ],
)
def test_the_widest_resident_heads_fit(width, dtype):
  for perturbation, rank, looked_up, resident in (
    ("low rank", 1, True, True),
    ("low rank", 1, False, width <= 128),
    ("low rank", 16, True, width <= 64),
    ("dense", 1, False, True),
  ):
    case = Case(width, dtype, perturbation, rank=rank, looked_up=looked_up)
    found = figures(case._replace(pairs=96))
    assert found.shared <= SHARED_LIMIT
    assert found.config.resident == resident


def test_products_without_tf32_fit():
  for width in (50, 64, 300):
    case = Case(width, "float32", "low rank", precision="highest")
    assert figures(case).shared <= SHARED_LIMIT


def test_too_large_tiles_are_noticed():
  wide = kernels.Config(True, 64, 128, 128, 8, 1, False)
  with pytest.raises(jax.errors.JaxRuntimeError, match="[Ss]hared memory"):
    figures(Case(512, "float32", config=wide))


def test_every_candidate_of_the_tuner_fits():
  for width, perturbation in (
    (50, "low rank"),
    (150, "low rank"),
    (150, "dense"),
  ):
    dense = perturbation == "dense"
    given = {"pairs": 96, "looked_up": True}
    for config in lstm_configs.choose(width, 1024, jnp.bfloat16, dense):
      case = Case(width, "bfloat16", perturbation, config=config, **given)
      assert figures(case).shared <= SHARED_LIMIT


def table() -> str:
  """What docs/kernels.md shows."""
  lines = [
    "| head | type | perturbation | tiles | warps | stages | shared, bytes | "
    "registers | spilled, bytes |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for case in CASES:
    found = figures(case)
    kind = "resident" if found.config.resident else "streamed"
    rows, units, depth, warps, stages = found.config[1:6]
    tile = f"{rows} x {units}" + (
      "" if found.config.resident else f" x {depth}"
    )
    lines.append(
      f"| {case.width} | {case.dtype} | {case.perturbation} | {kind} {tile} | "
      f"{warps} | {stages} | {found.shared:,} | "
      f"{found.registers} | {found.spills} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  print(table())
