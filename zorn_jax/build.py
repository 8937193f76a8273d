"""Makes an experiment from a config; the only reader of its fields."""

import inspect
import json
import pathlib

import jax.numpy as jnp
import ml_collections
import optax

from zorn_jax import directions, estimators, models, probe_map, tasks
from zorn_jax.step import Experiment
from zorn_jax.train import CONFIG_NAME

_DIRECTIONS = {
  "rademacher": directions.rademacher,
  "normal": directions.normal,
  "uniform": directions.uniform,
  "low_rank": directions.low_rank,
  "sparse": directions.sparse,
}
_POSITIVE = (
  "steps",
  "batch_size",
  "num_probes",
  "epsilon",
  "learning_rate",
  "log_every",
  "evaluate_every",
  "checkpoint_every",
)


def experiment(config: ml_collections.ConfigDict) -> Experiment:
  """All that `config` describes.

  Raises:
    ValueError: If a field is missing, unknown, or has a value that makes no
      sense; the message names it.
  """
  try:
    return _experiment(config)
  except (AttributeError, KeyError) as error:
    raise ValueError(
      f"the config lacks a field: {error}. Start from a file in configs/."
    ) from error


def load(workdir: pathlib.Path) -> Experiment:
  """The experiment of a run directory.

  Raises:
    ValueError: If the directory holds no run.
  """
  path = workdir / CONFIG_NAME
  if not path.exists():
    raise ValueError(
      f"there is no run in {str(workdir)!r}: it has no {CONFIG_NAME}. Name the "
      "workdir of a run of zorn-train."
    )
  return experiment(ml_collections.ConfigDict(json.loads(path.read_text())))


def _experiment(config):
  for name in _POSITIVE:
    _check_positive(name, config[name])
  task = _task(config)
  return Experiment(
    model=_model(config, len(task.vocabulary)),
    task=task,
    estimator=_estimator(config),
    optimizer=_optimizer(config),
    num_probes=config.num_probes,
    batch_per_probe=config.estimator.batch_per_probe,
    seed=config.seed,
    steps=config.steps,
    evaluate_every=config.evaluate_every,
    checkpoint_every=config.checkpoint_every,
    log_every=config.log_every,
  )


def _task(config):
  options = config.task.to_dict()
  name = options.pop("name")
  for length in ("seq_length", "max_length", "time_chunk"):
    if length in options:
      _check_positive(f"task.{length}", options[length])
  options["batch_size"] = config.batch_size
  if name == "language_model":
    source = options.pop("source")
    shakespeare = source == "shakespeare"
    options["corpus"] = (
      tasks.shakespeare() if shakespeare else tasks.from_file(source)
    )
  makers = {
    "language_model": tasks.language_model,
    "copy": tasks.copy,
    "random_tokens": tasks.random_tokens,
  }
  return _call(makers, "task", name, options)


def _model(config, vocab_size):
  options = config.model.to_dict()
  name = options.pop("name")
  options["dtype"] = _float_type("model.dtype", options["dtype"])
  options["vocab_size"] = vocab_size
  return models.from_linen(_call(models.MODULES, "model", name, options))


def _float_type(name, value):
  """The floating-point type called `value`."""
  known = ("float32", "bfloat16")
  if value not in known:
    raise ValueError(
      f"unknown {name} {value!r}. Choose one of {', '.join(known)}."
    )
  return jnp.dtype(value)


def _estimator(config):
  options = config.estimator.to_dict()
  name = options.pop("name")
  direction = options.pop("direction")
  options["direction"] = _call(
    _DIRECTIONS, "estimator.direction", direction.pop("name"), direction
  )
  # 0 stands for all probes at once.
  options["probe_map"] = probe_map.sequential(
    options.pop("probe_batch") or None
  )
  options |= {"epsilon": config.epsilon, "num_probes": config.num_probes}
  return _call(estimators.ESTIMATORS, "estimator", name, options)


def _optimizer(config):
  options = config.optimizer.to_dict()
  name = options.pop("name")
  schedule = _call(
    {"constant": _constant, "cosine": _cosine},
    "optimizer.schedule",
    options.pop("schedule"),
    {
      "peak": config.learning_rate,
      "warmup_steps": options.pop("warmup_steps"),
      "steps": config.steps,
    },
  )
  makers = {"adam": optax.adam, "sgd": optax.sgd}
  return _call(makers, "optimizer", name, options | {"learning_rate": schedule})


def _constant(peak, warmup_steps, steps):
  del steps
  if not warmup_steps:
    return peak
  return optax.warmup_constant_schedule(0.0, peak, warmup_steps)


def _cosine(peak, warmup_steps, steps):
  if warmup_steps >= steps:
    raise ValueError(
      f"optimizer.warmup_steps must be below steps, got {warmup_steps} and "
      f"{steps}. Choose a shorter warm-up."
    )
  return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, steps)


def _check_positive(name, value):
  if not value > 0:
    raise ValueError(f"{name} must be positive, got {value}. Choose 1 or more.")


def _call(makers, what, name, options):
  """Calls `makers[name](**options)`, with options of wrong names refused."""
  if name not in makers:
    raise ValueError(
      f"unknown {what} {name!r}. Choose one of {', '.join(sorted(makers))}."
    )
  try:
    inspect.signature(makers[name]).bind(**options)
  except TypeError as error:
    raise ValueError(
      f"the {what} {name!r} does not take these fields: {error}. See its "
      "docstring for those it takes."
    ) from error
  return makers[name](**options)
