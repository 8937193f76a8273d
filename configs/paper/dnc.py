"""The runs of Figure 1 of arXiv:2505.17852: a DNC learns one batch by heart.

python -m zorn_jax.cli.train --config=configs/paper/dnc.py --workdir=DIR

Other sizes and controllers follow a colon, as in `dnc.py:scale=1,probes=96`:

scale=8         H = M = S = 128 scale; the figure has 1, 2, 4 to 64.
controller=rnn  or lstm, the one of the code that was published later.
input=32        Width E of the embedding; `scale` for 128 scale.
probes=512      Probes in a step; the figure has 8, 96 and 512.
solver=cd_rge   or spsa1_5, or BPTT by sgd or adamw, without probes.

With the defaults the model has the 6,553,893 parameters of the authors' log,
whose losses were 5.299, 4.759, 4.348 and 3.950 in the first four steps, on a
loss that leaves out the first prediction. A run is a success once its loss is
below 0.1. Epsilon follows the learning rate, the only batch is 100 random
tokens after 100 others, the directions are dense signs, the optimiser is plain
SGD. The memory starts at zero, as theirs did, and so is only one vector;
`--config.model.memory_init=random` tells its slots apart.
"""

import ml_collections

_CONTROLLERS = ("rnn", "lstm")
_SOLVERS = ("cd_rge", "spsa1_5", "sgd", "adamw")
_DEFAULTS = {
  "scale": "8",
  "controller": "rnn",
  "input": "32",
  "probes": "512",
  "solver": "cd_rge",
}


def _options(arg):
  """The options of an argument such as "scale=8,controller=rnn"."""
  options = {}
  for part in arg.split(",") if arg else ():
    name, equals, value = part.partition("=")
    if not equals:
      raise ValueError(
        f"options are written name=value, got {part!r}. Write for example "
        "scale=8,controller=rnn."
      )
    if name not in _DEFAULTS:
      raise ValueError(
        f"unknown option {name!r}. Choose one of {', '.join(_DEFAULTS)}."
      )
    if name in options:
      raise ValueError(f"the option {name!r} is given twice. Give it once.")
    options[name] = value
  return _DEFAULTS | options


def _count(name, value, other=""):
  """A whole number above zero."""
  if not (value.isdecimal() and int(value) > 0):
    raise ValueError(
      f"{name} must be a whole number above 0{other}, got {value!r}. Choose "
      f"for example {_DEFAULTS[name]}."
    )
  return int(value)


def get_config(arg=""):
  options = _options(arg)
  size = 128 * _count("scale", options["scale"])
  controller = options["controller"]
  if controller not in _CONTROLLERS:
    raise ValueError(
      f"unknown controller {controller!r}. Choose one of "
      f"{', '.join(_CONTROLLERS)}."
    )
  solver = options["solver"]
  if solver not in _SOLVERS:
    raise ValueError(
      f"unknown solver {solver!r}. Choose one of {', '.join(_SOLVERS)}."
    )
  if options["input"] == "scale":
    embedding_size = size
  else:
    embedding_size = _count("input", options["input"], " or 'scale'")

  config = ml_collections.ConfigDict()
  config.seed = 0
  config.steps = 1000
  config.batch_size = 1
  config.num_probes = _count("probes", options["probes"])
  config.learning_rate = 0.01
  config.epsilon = config.get_ref("learning_rate")
  config.epsilon_schedule = "learning_rate"
  config.log_every = 1
  config.evaluate_every = 10
  config.checkpoint_every = 100
  config.loggers = ()

  config.mesh = ml_collections.ConfigDict()
  config.mesh.probe = 0  # Devices that share the probes; 0 for all.
  config.mesh.data = 1  # That share the rows of a batch.
  config.mesh.head = 1  # That share a model.
  config.mesh.updates = "replicated"  # Or sharded over the devices.

  config.task = ml_collections.ConfigDict()
  config.task.name = "random_tokens"
  config.task.vocab_size = 100
  config.task.source_length = 100
  config.task.seq_length = 100
  config.task.time_chunk = 100

  config.model = ml_collections.ConfigDict()
  config.model.name = "dnc"
  config.model.embedding_size = embedding_size
  config.model.hidden_size = size
  config.model.num_reads = 1
  config.model.memory_slots = size
  config.model.slot_size = size
  config.model.controller = controller
  config.model.memory_init = "zeros"
  config.model.embedding_scale = 1.0
  config.model.dtype = "float32"

  config.estimator = ml_collections.ConfigDict()
  config.estimator.name = "central_difference"
  config.estimator.shaping = "none"
  config.estimator.batch_per_probe = False
  config.estimator.probe_batch = 1
  config.estimator.direction = ml_collections.ConfigDict()
  config.estimator.direction.name = "rademacher"

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.name = "sgd"
  config.optimizer.momentum = 0.0
  config.optimizer.schedule = "constant"
  config.optimizer.warmup_steps = 0

  if solver == "spsa1_5":
    config.estimator.name = solver
  if solver in ("sgd", "adamw"):
    config.num_probes = 0
    del config.epsilon  # It refers to the learning rate.
    config.epsilon = 0.0
    config.epsilon_schedule = "constant"
    config.estimator = {
      "name": "bptt",
      "micro_batches": 1,
      "truncation": 0,  # Chunks of time; 0 for none.
      "checkpoint": False,
    }
  if solver == "adamw":
    config.optimizer = {
      "name": "adam",
      "b1": 0.9,
      "b2": 0.999,
      "weight_decay": 0.01,
      "schedule": "constant",
      "warmup_steps": 0,
    }

  config.watch = ml_collections.ConfigDict()
  config.watch.explosion = 0.0  # Times the average loss; 0 to let it.
  config.watch.max_rollbacks = 5
  config.watch.patience = 0  # Log periods without progress; 0 for no end.
  config.watch.threshold = 0.01  # Progress, relative to the best loss.

  config.search = ml_collections.ConfigDict()
  config.search.enabled = False
  config.search.low = 1e-5
  config.search.high = 0.1
  config.search.depth = 3
  config.search.steps = 1
  config.search.on_plateau = False

  # The one batch has one length, which nothing makes shorter.
  config.curriculum = ml_collections.ConfigDict()
  config.curriculum.enabled = False
  config.curriculum.start = 2
  config.curriculum.maximum = 100
  config.curriculum.step = 1
  config.curriculum.threshold = 0.5
  config.curriculum.patience = 100
  return config
