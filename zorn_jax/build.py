"""Makes an experiment from a config; the only reader of its fields."""

import inspect
import json
import pathlib
import traceback
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
import optax
import optax.contrib

from zorn_jax import (
  aggregators,
  control,
  directions,
  estimators,
  memory,
  mesh,
  methods,
  models,
  probe_map,
  search,
  tasks,
)
from zorn_jax.probe_batch import Batching
from zorn_jax.step import Experiment, init_state
from zorn_jax.workdir import CONFIG_NAME

_DIRECTIONS = {
  "rademacher": directions.rademacher,
  "normal": directions.normal,
  "uniform": directions.uniform,
  "low_rank": directions.low_rank,
  "sparse": directions.sparse,
}
_DENSE = ("rademacher", "normal", "uniform", "sparse")
# They hand a direction to nothing but the model.
_DEFERRING = (
  "bandit_spsa",
  "central_difference",
  "forward_difference",
  "noise_reuse_es",
  "persistent_es",
  "spsa1_5",
  "spsa2",
)
_EPSILON_SCHEDULES = ("constant", "learning_rate")
_POSITIVE = (
  "steps",
  "batch_size",
  "learning_rate",
  "log_every",
  "evaluate_every",
  "checkpoint_every",
)
_TASK_SIZES = (
  "seq_length",
  "max_length",
  "time_chunk",
  "evaluation_rows",
  "num_evaluation",
)


def experiment(
  config: ml_collections.ConfigDict,
  one_device: bool = False,
  num_devices: int = 0,
) -> Experiment:
  """All that `config` describes.

  Args:
    config: As the files in configs/ make it.
    one_device: Whether to pass over the mesh that it asks for.
    num_devices: Devices to plan for, as :func:`zorn_jax.mesh.make` has it.
  Raises:
    ValueError: If a field is missing, unknown, or has a value that makes no
      sense; the message names it.
  """
  try:
    made = _experiment(config, _layout(config, one_device, num_devices))
    if config.mesh.probe or num_devices or not _crowded(made):
      return made
    config = ml_collections.ConfigDict(config.to_dict())
    config.mesh.probe = 1
    return _experiment(config, _layout(config, one_device, num_devices))
  except (AttributeError, KeyError) as error:
    if not _is_of_config(error):
      raise  # A mistake in a user's model, or ours.
    raise ValueError(
      f"the config lacks a field: {error}. Start from a file in configs/."
    ) from error


def _is_of_config(error):
  """Whether a field of a config was not there."""
  *_, (frame, _) = traceback.walk_tb(error.__traceback__)
  return frame.f_globals["__name__"].startswith("ml_collections")


def batching(
  config: ml_collections.ConfigDict, experiment: Experiment
) -> Batching | None:
  """How many probes run at once, and the experiment with another number.

  Args:
    config: That of the experiment; where its `estimator.probe_batch` is 0, all
      probes of a device run at once until a number is chosen.
    experiment: What :func:`experiment` made of it.
  Returns:
    None for a method without probes.
  """
  if "probe_batch" not in config.estimator:
    return None
  mesh = experiment.layout.mesh

  def rebuild(probe_batch):
    changed = ml_collections.ConfigDict(config.to_dict())
    changed.estimator.probe_batch = probe_batch
    method = _method(
      changed, experiment.model, experiment.task, experiment.layout
    )
    return experiment._replace(method=method)

  return Batching(
    wanted=config.estimator.probe_batch,
    most=config.num_probes // mesh.shape["probe"],
    devices=min(mesh.size, jax.local_device_count()),
    rebuild=rebuild,
  )


def load(workdir: pathlib.Path, noted: int = 0) -> Experiment:
  """The experiment of a run directory, on one device.

  Args:
    workdir: The directory.
    noted: How many probes the run had at once, where that was chosen for it: a
      sum over probes may depend on it; 0 for what the config says.
  Raises:
    ValueError: If the directory holds no run.
  """
  path = workdir / CONFIG_NAME
  if not path.exists():
    raise ValueError(
      f"there is no run in {str(workdir)!r}: it has no {CONFIG_NAME}. Name the "
      "workdir of a run of zorn-train."
    )
  config = ml_collections.ConfigDict(json.loads(path.read_text()))
  made = experiment(config, one_device=True)
  batched = batching(config, made)
  return batched.rebuild(noted) if noted and batched else made


def _layout(config, one_device, num_devices):
  options = config.mesh.to_dict()
  update = options.pop("updates")
  if update not in mesh.UPDATES:
    raise ValueError(
      f"unknown mesh.updates {update!r}. Choose one of "
      f"{', '.join(mesh.UPDATES)}."
    )
  if one_device:
    options, update = dict.fromkeys(options, 1), "replicated"
  options |= {"num_probes": config.num_probes, "num_devices": num_devices}
  made = _call({"mesh": mesh.make}, "mesh", "mesh", options)
  return mesh.Layout(made, update)


def _crowded(made):
  """Whether copies of the state would fill half the memory of a CPU."""
  devices, host = made.layout.mesh.size, memory.host()
  if devices == 1 or jax.default_backend() != "cpu" or host is None:
    return False
  leaves = jax.tree.leaves(jax.eval_shape(partial(init_state, made)))
  return 2 * devices * sum(x.size * x.dtype.itemsize for x in leaves) > host


def _experiment(config, layout):
  for name in _POSITIVE:
    _check_positive(name, config[name])
  if not -(2**63) <= config.seed < 2**63:
    raise ValueError(
      f"seed must have 64 bits at most, got {config.seed}. Choose a smaller "
      "one."
    )
  task = _task(config)
  model = _model(config, len(task.vocabulary), layout)
  factor = _schedule(config)
  if config.epsilon_schedule not in _EPSILON_SCHEDULES:
    raise ValueError(
      f"unknown epsilon_schedule {config.epsilon_schedule!r}. Choose one of "
      f"{', '.join(_EPSILON_SCHEDULES)}."
    )
  if config.epsilon_schedule != "constant" and not config.epsilon:
    raise ValueError(
      f"{config.estimator.name} has no epsilon that could follow the learning "
      "rate. Set epsilon_schedule to constant."
    )
  return Experiment(
    model=model,
    task=task,
    method=_method(config, model, task, layout),
    optimizer=_optimizer(config, model, factor),
    elementwise=_elementwise(config),
    watch=_watch(config)._replace(curriculum=_curriculum(config, task)),
    search=_search(config),
    num_probes=config.num_probes,
    peak_rate=config.learning_rate,
    rate_schedule=factor,
    epsilon=config.epsilon,
    epsilon_follows=config.epsilon_schedule == "learning_rate",
    seed=config.seed,
    steps=config.steps,
    evaluate_every=config.evaluate_every,
    checkpoint_every=config.checkpoint_every,
    log_every=config.log_every,
    layout=layout,
  )


def _task(config):
  options = config.task.to_dict()
  name = options.pop("name")
  for size in _TASK_SIZES:
    if size in options:
      _check_positive(f"task.{size}", options[size])
  options["batch_size"] = config.batch_size
  one_batch = options.pop("one_batch", False)
  if name == "language_model":
    options = _with_text(options)
  makers = {
    "language_model": tasks.language_model,
    "random_tokens": tasks.random_tokens,
  } | tasks.ALGORITHMIC
  task = _call(makers, "task", name, options)
  return tasks.one_batch(task) if one_batch else task


def _with_text(options):
  """The options with a corpus and a tokenizer for what names them."""
  options = dict(options)
  parts = inspect.signature(tasks.load_corpus).parameters
  of_corpus = {part: options.pop(part) for part in parts if part in options}
  corpus = _call({"corpus": tasks.load_corpus}, "corpus", "corpus", of_corpus)
  tokenizer = tasks.make_tokenizer(
    options.pop("tokenizer"), corpus.train, options.pop("vocab_size")
  )
  return options | {"corpus": corpus, "tokenizer": tokenizer}


def _model(config, vocab_size, layout):
  options = config.model.to_dict()
  name = options.pop("name")
  options["vocab_size"] = vocab_size
  if "dtype" in options:
    options["dtype"] = _float_type("model.dtype", options["dtype"])
  if ":" not in name:
    module = _call(models.MODULES, "model", name, options)
    if options.get("implementation") == "triton":
      _check_kernel(config.estimator.name, layout)
    return models.shard_heads(module, layout.mesh)
  if layout.mesh.shape["head"] > 1:
    raise ValueError(
      f"only models of block-diagonal heads can be split over devices, got "
      f"{name!r} and mesh.head={layout.mesh.shape['head']}. Set mesh.head to 1."
    )
  return models.imported(name, options)


def _check_kernel(estimator, layout):
  """Refuses the kernel where nothing would be left to it."""
  heads = layout.mesh.shape["head"]
  for unfit, what in (
    (estimator in ("bptt", "forward_gradient"), f"to {estimator}"),
    (heads > 1, f"on a mesh with mesh.head={heads}"),
  ):
    if unfit:
      raise ValueError(
        f"the LSTM kernel is of no use {what}, got model.implementation="
        "'triton'. Set it to None or 'xla'."
      )


def _float_type(name, value):
  """The floating-point type called `value`."""
  known = ("float32", "bfloat16")
  if value not in known:
    raise ValueError(
      f"unknown {name} {value!r}. Choose one of {', '.join(known)}."
    )
  return jnp.dtype(value)


def _method(config, model, task, layout):
  options = config.estimator.to_dict()
  name = options.pop("name")
  makers = {name: partial(_zero_order, name) for name in estimators.ESTIMATORS}
  makers |= {name: partial(_streaming, name) for name in estimators.STREAMING}
  makers["bptt"] = _bptt
  if name not in makers:
    raise ValueError(
      f"unknown estimator {name!r}. Choose one of {', '.join(sorted(makers))}."
    )
  for field, unused in (
    ("epsilon", name in ("bptt", "forward_gradient")),
    ("num_probes", name == "bptt"),
  ):
    if unused and config[field]:
      raise ValueError(
        f"{name} has no {field}, got {field}={config[field]}. Set it to 0."
      )
    if not unused:
      _check_positive(field, config[field])
  return makers[name](config, model, task, layout, options)


def _zero_order(name, config, model, task, layout, options):
  readout = options.pop("readout", "estimated")
  readout_batches = options.pop("readout_batches", 0)
  if readout not in ("estimated", "exact"):
    raise ValueError(
      f"unknown estimator.readout {readout!r}. Choose estimated or exact."
    )
  if (readout == "exact") != bool(readout_batches) or readout_batches < 0:
    raise ValueError(
      "the exact readout needs readout_batches, and an estimated one has none, "
      f"got {readout=}, {readout_batches=}. Set readout_batches to "
      f"{'64' if readout == 'exact' else '0'}."
    )
  if readout == "exact" and not model.readout:
    raise ValueError(
      f"the model {config.model.name!r} names no readout. Set "
      "estimator.readout to estimated."
    )
  adaptive = options.pop("adaptive", 0.0)
  parts = layout.mesh.shape["data"]
  if config.batch_size % parts:
    raise ValueError(
      f"{parts} devices cannot share {config.batch_size} rows evenly. Set "
      f"batch_size to a multiple of {parts}, or mesh.data to a divisor of it."
    )
  deferred = model.deferred and name in _DEFERRING and not adaptive
  direction, options = _common(config, layout, options, deferred)
  batch_per_probe = options.get("batch_per_probe", False)
  takes_epsilon = bool(config.epsilon)

  def make(epsilon):
    def with_direction(direction):
      values = {"epsilon": epsilon} if takes_epsilon else {}
      values |= options | {"direction": direction}
      return _call(estimators.ESTIMATORS, "estimator", name, values)

    if adaptive:
      return estimators.adaptive(with_direction, direction, adaptive)
    return with_direction(direction)

  make(config.epsilon)  # What is wrong shows here.
  return methods.zero_order(
    model,
    task,
    make,
    num_probes=config.num_probes,
    batch_per_probe=batch_per_probe,
    readout_batches=readout_batches,
    parts=parts,
    part_map=probe_map.sharded(layout.mesh, axis="data"),
  )


def _streaming(name, config, model, task, layout, options):
  if config.epsilon_schedule != "constant":
    raise ValueError(
      f"{name} carries states that were made with the epsilon of earlier "
      f"steps, got epsilon_schedule={config.epsilon_schedule!r}. Set it to "
      "constant."
    )
  for axis in ("data", "head"):
    if layout.mesh.shape[axis] > 1:
      raise ValueError(
        f"{name} carries the states of whole models and batches, got "
        f"mesh.{axis}={layout.mesh.shape[axis]}. Set it to 1."
      )
  deferred = model.deferred and name in _DEFERRING
  direction, options = _common(config, layout, options, deferred)
  options["direction"] = direction
  unrolls = options["unrolls"]
  _check_positive("estimator.unrolls", unrolls)

  def make(epsilon):
    values = options | {"epsilon": epsilon}
    return _call(estimators.STREAMING, "estimator", name, values)

  make(config.epsilon)  # What is wrong shows here.
  return methods.streaming(
    model, task, make, num_probes=config.num_probes, unrolls=unrolls
  )


def _bptt(config, model, task, layout, options):
  del config, layout
  if "aggregator" in options:
    options["aggregator"] = _aggregator(options["aggregator"])
  makers = {"bptt": partial(methods.bptt, model, task)}
  return _call(makers, "estimator", "bptt", options)


def _common(config, layout, options, deferred):
  """The direction, and the options with values for what names stand for."""
  direction = dict(options.pop("direction"))
  norm = direction.pop("norm", "none")
  if deferred and norm == "none" and direction["name"] in _DENSE:
    direction["deferred"] = True
  made = _call(
    _DIRECTIONS, "estimator.direction", direction.pop("name"), direction
  )
  if norm != "none":
    made = directions.normalized(made, norm)
  if "aggregator" in options:
    aggregator = dict(options.pop("aggregator"))
    groups = aggregator.pop("groups")
    made = directions.grouped(made, _aggregator(aggregator), groups)
  # Until a number is chosen, 0 stands for all probes at once.
  options["probe_map"] = probe_map.sharded(
    layout.mesh, options.pop("probe_batch") or None
  )
  return made, options | {"num_probes": config.num_probes}


def _aggregator(options):
  options = dict(options)
  name = options.pop("name")
  return _call(aggregators.AGGREGATORS, "aggregator", name, options)


def _optimizer(config, model, factor):
  options = config.optimizer.to_dict()
  name = options.pop("name")
  for used in ("schedule", "warmup_steps"):
    options.pop(used)
  clip = options.pop("clip", 0.0)
  normalize = options.pop("normalize", "none")
  weight_decay = options.pop("weight_decay", 0.0)
  makers = {"adam": optax.scale_by_adam, "sgd": _momentum}
  parts = {"none": optax.identity, "l2": optax.normalize_by_update_norm}
  chain = [
    _call(parts | {"l1": _normalize_l1}, "optimizer.normalize", normalize, {})
  ]
  if clip:
    _check_positive("optimizer.clip", clip)
    chain.append(optax.clip_by_global_norm(clip))
  chain.append(_call(makers, "optimizer", name, options))
  if weight_decay:
    _check_positive("optimizer.weight_decay", weight_decay)
    if not model.decayed:
      raise ValueError(
        f"the model {config.model.name!r} names no matrices to decay. Set "
        "optimizer.weight_decay to 0, or DECAYED in its class."
      )
    mask = lambda params: {name: name in model.decayed for name in params}
    chain.append(optax.add_decayed_weights(weight_decay, mask))
  rate = config.learning_rate
  chain.append(optax.scale_by_learning_rate(lambda step: rate * factor(step)))
  return optax.chain(*chain)


def _elementwise(config):
  """Whether what becomes of a parameter depends on its own gradient alone."""
  options = config.optimizer
  return not options.get("clip", 0.0) and (
    options.get("normalize", "none") == "none"
  )


def _momentum(momentum):
  return optax.trace(momentum) if momentum else optax.identity()


def _normalize_l1():
  """Divides the gradient by the sum of its absolute values."""

  def update(grads, params):
    del params
    total = optax.tree.norm(grads, ord=1)
    scale = 1 / jnp.where(total > 0, total, 1.0)
    return jax.tree.map(lambda g: (scale * g).astype(g.dtype), grads)

  return optax.stateless(update)


def _schedule(config):
  """(step) -> what the learning rate is multiplied with."""
  warmup, steps = config.optimizer.warmup_steps, config.steps
  if not 0 <= warmup < steps:
    raise ValueError(
      "optimizer.warmup_steps must be below steps and not negative, got "
      f"{warmup} and {steps}. Choose a shorter warm-up."
    )
  makers = {
    "constant": lambda: optax.constant_schedule(1.0),
    "cosine": lambda: optax.cosine_decay_schedule(1.0, steps - warmup),
    "linear": lambda: optax.linear_schedule(1.0, 0.0, steps - warmup),
  }
  after = _call(makers, "optimizer.schedule", config.optimizer.schedule, {})
  if not warmup:
    return after
  return optax.join_schedules(
    [optax.linear_schedule(0.0, 1.0, warmup), after], [warmup]
  )


def _watch(config):
  options = config.watch.to_dict()
  patience = options.pop("patience")
  watches = {"watch": control.Watch}
  if options["explosion"] and not options["explosion"] > 1:
    raise ValueError(
      f"watch.explosion must be above 1, got {options['explosion']}. Choose "
      "for example 2, or 0 for no watch."
    )
  if not patience:
    options.pop("threshold")
    return _call(watches, "watch", "watch", options)
  _check_positive("watch.patience", patience)
  _check_positive("watch.threshold", options["threshold"])
  plateau = optax.contrib.reduce_on_plateau(
    factor=0.5,
    rtol=options.pop("threshold"),
    patience=patience,
    accumulation_size=config.log_every,
  )
  return _call(watches, "watch", "watch", options | {"plateau": plateau})


def _search(config):
  options = config.search.to_dict()
  if not options.pop("enabled"):
    return None
  result = _call({"search": search.Search}, "search", "search", options)
  search.check(result)
  if config.optimizer.warmup_steps:
    raise ValueError(
      "the search tries rates in the first steps, which a warm-up would make "
      f"small, got optimizer.warmup_steps={config.optimizer.warmup_steps}. "
      "Set it to 0."
    )
  if result.on_plateau and not config.watch.patience:
    raise ValueError(
      "search.on_plateau needs a plateau to be noticed, got watch.patience=0. "
      "Choose for example 10."
    )
  return result


def _curriculum(config, task):
  options = config.curriculum.to_dict()
  if not options.pop("enabled"):
    return None
  made = _call(
    {"curriculum": control.Curriculum}, "curriculum", "curriculum", options
  )
  for name in ("step", "patience", "threshold"):
    _check_positive(f"curriculum.{name}", options[name])
  lengths = (task.min_length, made.start, made.maximum, task.max_length)
  if list(lengths) != sorted(lengths):
    raise ValueError(
      f"the curriculum goes from {made.start} to {made.maximum}, but the task "
      f"has sequences of {task.min_length} to {task.max_length}. Choose "
      "curriculum.start and a curriculum.maximum that is not below it in this "
      "range."
    )
  if config.estimator.name in estimators.STREAMING:
    raise ValueError(
      f"{config.estimator.name} cuts sequences into parts of fixed length, "
      "which a curriculum would change. Set curriculum.enabled to False."
    )
  return made


def _check_positive(name, value):
  if not value > 0:
    remedy = "1 or more" if isinstance(value, int) else "for example 0.01"
    raise ValueError(f"{name} must be positive, got {value}. Choose {remedy}.")


def _call(makers, what, name, options):
  """Calls `makers[name](**options)`, with options of wrong names refused."""
  if name not in makers:
    raise ValueError(
      f"unknown {what} {name!r}. Choose one of {', '.join(sorted(makers))}."
    )
  taken = inspect.signature(makers[name]).parameters
  extra = [option for option in options if option not in taken]
  if extra:
    raise ValueError(
      f"the {what} {name!r} does not take {', '.join(extra)}. Drop "
      f"{'it' if len(extra) == 1 else 'them'}; it takes {', '.join(taken)}."
    )
  try:
    inspect.signature(makers[name]).bind(**options)
  except TypeError as error:
    raise ValueError(
      f"the {what} {name!r} lacks a field: {error}. It takes "
      f"{', '.join(taken)}."
    ) from error
  return makers[name](**options)
