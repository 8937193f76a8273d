"""Recurrent language models that stream over chunks of time."""

from functools import partial

from zorn_jax.models.cells import CELLS
from zorn_jax.models.dnc import DNC
from zorn_jax.models.dnc_graves import DNCGraves
from zorn_jax.models.heads import shard_heads
from zorn_jax.models.imported import from_nnx, imported
from zorn_jax.models.linen import from_linen
from zorn_jax.models.recurrent import Recurrent
from zorn_jax.models.types import Model

MODULES = {name: partial(Recurrent, name) for name in CELLS}
MODULES |= {"dnc": DNC, "dnc_graves": DNCGraves}

__all__ = [
  "DNC",
  "MODULES",
  "DNCGraves",
  "Model",
  "Recurrent",
  "from_linen",
  "from_nnx",
  "imported",
  "shard_heads",
]
