"""The LSTM runs of arXiv:2505.17852, to the letter: plain CD-RGE.

python -m zorn_jax.cli.train --config=configs/paper/lstm.py:tiny --workdir=DIR

The sizes are tiny, small, medium, large, xlarge and xxlarge (copy task), and
smoke_large and smoke_7b, which learn ten random tokens by heart: the authors'
logs went from 7.54 to 0.095 in five steps and from 15.95 to 0.047 in seven.
A solver may follow, as in `lstm.py:tiny,adamw`: cd_rge, or BPTT by sgd or
adamw.
Epsilon follows the learning rate, one batch is shared by all probes, the
directions are dense signs, the optimiser is plain SGD.
"""

import ml_collections
from ml_collections import config_dict

# hidden_size, num_heads, batch_size, learning_rate
_SIZES = {
  "tiny": (240, 12, 2048, 0.1),
  "small": (1600, 32, 2048, 0.1),
  "medium": (9600, 64, 1024, 0.01),
  "large": (66000, 220, 128, 0.01),
  "xlarge": (297500, 350, 128, 0.001),
  "xxlarge": (1000000, 1000, 128, 0.0001),
  "smoke_large": (66000, 220, 1, 0.01),
  "smoke_7b": (2**17, 2**8, 1, 0.01),
}


_SOLVERS = ("cd_rge", "sgd", "adamw")


def get_config(arg="tiny"):
  size, _, solver = arg.partition(",")
  solver = solver or "cd_rge"
  if solver not in _SOLVERS:
    raise ValueError(
      f"unknown solver {solver!r}. Choose one of {', '.join(_SOLVERS)}."
    )
  if size not in _SIZES:
    raise ValueError(
      f"unknown size {size!r}. Choose one of {', '.join(_SIZES)}."
    )
  hidden_size, num_heads, batch_size, learning_rate = _SIZES[size]
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.steps = 1000
  config.batch_size = batch_size
  config.num_probes = 96
  config.learning_rate = learning_rate
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
  if size.startswith("smoke"):
    config.task.name = "random_tokens"
    config.task.vocab_size = 50260 if size == "smoke_7b" else 100
    config.task.seq_length = 10
    config.task.time_chunk = 10
  else:
    config.task.name = "copy"
    config.task.max_length = 10
    config.task.time_chunk = 21
    config.task.num_evaluation = 512
    config.task.one_batch = False  # True to learn one batch by heart.

  config.model = ml_collections.ConfigDict()
  config.model.name = "lstm"
  config.model.embedding_size = 100
  config.model.hidden_size = hidden_size
  config.model.num_heads = num_heads
  config.model.embedding_scale = 1.0
  config.model.readout_scale = "head"
  config.model.initial_state = "trainable"
  config.model.forget_bias = 0.0
  # The LSTM by "triton" or "xla"; None for the kernel on GPUs that run it.
  config.model.implementation = config_dict.placeholder(str)
  config.model.dtype = "bfloat16" if size == "smoke_7b" else "float32"

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

  if solver != "cd_rge":
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

  config.curriculum = ml_collections.ConfigDict()
  config.curriculum.enabled = False
  config.curriculum.start = 2  # Longest sequence at first,
  config.curriculum.maximum = 10  # and at last.
  config.curriculum.step = 1
  config.curriculum.threshold = 0.5  # Loss that counts as learned.
  config.curriculum.patience = 100  # Steps in a row.
  return config
