"""Copy, reverse, sort, repeat_copy and add: short strings, exact answers.

python -m zorn_jax.cli.train --config=configs/algorithmic.py:sort --workdir=DIR

The argument is TASK or TASK,VARIANT:
  recipe  forward passes only: fresh data for every pair, rank-one signs, exact
          readout, strings that grow as the model learns.
  paper   plain CD-RGE as arXiv:2505.17852 runs it: one shared batch, dense
          signs, SGD, epsilon tied to the learning rate.
  bptt    back-propagation through time with AdamW.
The LSTM of recipe is small, the others' is the paper's tiny one; but bptt gives
repeat_copy the full DNC.
docs/algorithmic.md has what each reaches on one core, recipe and paper in ten
minutes: recipe 2 (repeat_copy) to 61 (sort) percent of whole answers, paper
none, bptt 98 to 100.
"""

import ml_collections
from ml_collections import config_dict

_TASKS = ("copy", "reverse", "sort", "repeat_copy", "add")
_VARIANTS = ("recipe", "paper", "bptt")


def get_config(arg="copy"):
  task, _, variant = arg.partition(",")
  variant = variant or "recipe"
  if task not in _TASKS or variant not in _VARIANTS:
    raise ValueError(
      f"unknown task or variant {arg!r}. Write TASK or TASK,VARIANT, one of "
      f"{', '.join(_TASKS)} and one of {', '.join(_VARIANTS)}."
    )
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.steps = 100_000
  config.batch_size = 4
  config.num_probes = 128
  config.epsilon = 0.01
  config.epsilon_schedule = "constant"  # Or as the learning_rate's.
  config.learning_rate = 0.01
  config.log_every = 100
  config.evaluate_every = 500
  config.checkpoint_every = 5000
  config.loggers = ()

  config.mesh = ml_collections.ConfigDict()
  config.mesh.probe = 0  # Devices that share the probes; 0 for all.
  config.mesh.data = 1  # That share the rows of a batch.
  config.mesh.head = 1  # That share a model.
  config.mesh.updates = "replicated"  # Or sharded over the devices.

  config.task = ml_collections.ConfigDict()
  config.task.name = task
  config.task.max_length = 10
  config.task.time_chunk = 7
  config.task.num_evaluation = 512
  if task == "repeat_copy":
    config.task.max_repeats = 4
  if task == "add":
    config.task.max_num = 9
  config.task.one_batch = False  # True to learn one batch by heart.

  config.model = ml_collections.ConfigDict()
  config.model.name = "lstm"
  config.model.embedding_size = 32
  config.model.hidden_size = 32
  config.model.num_heads = 1
  config.model.embedding_scale = 0.5
  config.model.readout_scale = "hidden"
  config.model.initial_state = "zeros"
  config.model.forget_bias = 1.0
  # The LSTM by "triton" or "xla"; None for the kernel on GPUs that run it.
  config.model.implementation = config_dict.placeholder(str)
  config.model.dtype = "float32"

  config.estimator = ml_collections.ConfigDict()
  config.estimator.name = "central_difference"
  config.estimator.shaping = "std"
  config.estimator.batch_per_probe = True
  config.estimator.probe_batch = 0  # Probes at once; 0 for what fits.
  config.estimator.direction = ml_collections.ConfigDict()
  config.estimator.direction.name = "low_rank"
  config.estimator.direction.rank = 1
  config.estimator.direction.base = "rademacher"
  config.estimator.direction.norm = "none"
  config.estimator.adaptive = 0.0  # Decay of the second moment; 0 for none.
  config.estimator.readout = "exact"
  config.estimator.readout_batches = 64

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.name = "adam"
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.99
  config.optimizer.weight_decay = 0.0
  config.optimizer.clip = 0.0  # Of the gradient's norm; 0 for none.
  config.optimizer.normalize = "none"
  config.optimizer.schedule = "constant"
  config.optimizer.warmup_steps = 20

  config.watch = ml_collections.ConfigDict()
  config.watch.explosion = 0.0  # Longer strings make the loss jump.
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

  config.curriculum = ml_collections.ConfigDict()
  config.curriculum.enabled = variant == "recipe"
  config.curriculum.start = 2  # Longest sequence at first,
  config.curriculum.maximum = 10  # and at last.
  config.curriculum.step = 1
  config.curriculum.threshold = 0.5  # Loss that counts as learned.
  config.curriculum.patience = 20  # Steps in a row.

  if variant in ("paper", "bptt"):
    config.model.embedding_size = 100
    config.model.hidden_size = 240
    config.model.num_heads = 12
    config.model.embedding_scale = 1.0
  if variant == "paper":
    config.batch_size = 2048
    config.num_probes = 96
    config.learning_rate = 0.1
    config.epsilon = config.get_ref("learning_rate")
    config.epsilon_schedule = "learning_rate"
    config.log_every = 1
    config.evaluate_every = 1
    config.checkpoint_every = 1000
    config.model.readout_scale = "head"
    config.model.initial_state = "trainable"
    config.model.forget_bias = 0.0
    config.estimator = {
      "name": "central_difference",
      "shaping": "none",
      "batch_per_probe": False,
      "probe_batch": 1,
      "direction": {"name": "rademacher"},
    }
    config.optimizer = {
      "name": "sgd",
      "momentum": 0.0,
      "schedule": "constant",
      "warmup_steps": 0,
    }
  if variant == "bptt":
    config.steps = 6000
    config.evaluate_every = 250
    config.checkpoint_every = 1000
    config.batch_size = 64
    config.num_probes = 0
    config.epsilon = 0.0
    config.learning_rate = 3e-3
    config.estimator = {
      "name": "bptt",
      "micro_batches": 1,
      "truncation": 0,  # Chunks of time; 0 for none.
      "checkpoint": False,
    }
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip = 1.0
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    if task == "repeat_copy":
      config.model = {
        "name": "dnc_graves",
        "embedding_size": 32,
        "hidden_size": 96,
        "num_reads": 1,
        "memory_slots": 16,
        "slot_size": 24,
        "embedding_scale": 1.0,
        "dtype": "float32",
      }
  return config
