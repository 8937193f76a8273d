"""Characters of Shakespeare's plays, forward passes only.

python -m zorn_jax.cli.train --config=configs/shakespeare.py --workdir=DIR

The recipe: fresh data for every antithetic pair, rank-one signs, loss
differences in units of their standard deviation, Adam; the gradient of the
last layer is exact, a closed form of states and errors that nothing is
propagated back for. Expect 2.06 nats per character on the held-out plays,
after a minute and a half on two cores.

Variants, as in `configs/shakespeare.py:pure`:
  pure   every gradient is estimated.
  plain  plain CD-RGE: pure, one batch for all probes, dense signs, SGD, at the
         best learning rate and epsilon of a grid (scripts/compare_recipe.py).
  nres   pure, with states carried along whole scenes (noise-reuse ES).
  bptt   back-propagation through time, the baseline.
"""

import ml_collections
from ml_collections import config_dict

_VARIANTS = ("recipe", "pure", "plain", "nres", "bptt")


def get_config(variant="recipe"):
  if variant not in _VARIANTS:
    raise ValueError(
      f"unknown variant {variant!r}. Choose one of {', '.join(_VARIANTS)}."
    )
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.steps = 2000
  config.batch_size = 1
  config.num_probes = 512
  config.epsilon = 0.01
  config.epsilon_schedule = "constant"  # Or as the learning_rate's.
  config.learning_rate = 0.03
  config.log_every = 20
  config.evaluate_every = 250
  config.checkpoint_every = 500
  config.loggers = ()

  config.mesh = ml_collections.ConfigDict()
  config.mesh.probe = 0  # Devices that share the probes; 0 for all.
  config.mesh.data = 1  # That share the rows of a batch.
  config.mesh.head = 1  # That share a model.
  config.mesh.updates = "replicated"  # Or sharded over the devices.

  config.task = ml_collections.ConfigDict()
  config.task.name = "language_model"
  # Or a text file, a folder of them, ptb:FOLDER or tfds:NAME.
  config.task.source = "shakespeare"
  config.task.errors = "strict"  # Or replace, for text that is not UTF-8.
  # Or bytes, gpt2, bpe, or the path of a tokenizer.json.
  config.task.tokenizer = "characters"
  config.task.vocab_size = 0  # Of bpe.
  config.task.order = "windows"  # Or streams, which read on every step.
  config.task.cache = ""  # Folder of token ids; "" keeps them in memory.
  config.task.seq_length = 64
  config.task.time_chunk = 16
  config.task.evaluation_rows = 64

  config.model = ml_collections.ConfigDict()
  config.model.name = "lstm"
  config.model.embedding_size = 32
  config.model.hidden_size = 64
  config.model.num_heads = 2
  config.model.embedding_scale = 0.5
  config.model.readout_scale = "hidden"
  config.model.initial_state = "zeros"
  config.model.forget_bias = 0.0
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
  config.estimator.readout_batches = 128

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.name = "adam"
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.99
  config.optimizer.weight_decay = 0.0
  config.optimizer.clip = 0.0  # Of the gradient's norm; 0 for none.
  config.optimizer.normalize = "none"
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 20

  config.watch = ml_collections.ConfigDict()
  config.watch.explosion = 2.0  # Times the average loss; 0 to let it.
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
  config.curriculum.maximum = 64  # and at last.
  config.curriculum.step = 1
  config.curriculum.threshold = 0.5  # Loss that counts as learned.
  config.curriculum.patience = 100  # Steps in a row.

  if variant in ("pure", "plain", "nres"):
    config.steps = 2500
    config.learning_rate = 0.02
    config.estimator.readout = "estimated"
    config.estimator.readout_batches = 0
  if variant == "plain":
    config.batch_size = 16
    config.num_probes = 96
    config.learning_rate = 1.0
    config.epsilon = 1e-3
    config.estimator.shaping = "none"
    config.estimator.batch_per_probe = False
    config.estimator.probe_batch = 8
    config.estimator.direction = {"name": "rademacher"}
  if variant == "nres":
    config.task.seq_length = 1024
    config.estimator = {
      "name": "noise_reuse_es",
      "unrolls": 16,
      "shaping": "std",
      "probe_batch": 0,
      "direction": {"name": "low_rank", "rank": 1, "base": "rademacher"},
    }
  if variant == "bptt":
    config.steps = 5000
    config.batch_size = 64
    config.num_probes = 0
    config.epsilon = 0.0
    config.learning_rate = 0.01
    config.estimator = {
      "name": "bptt",
      "micro_batches": 1,
      "truncation": 0,  # Chunks of time; 0 for none.
      "checkpoint": False,
    }
  if variant == "plain":
    config.optimizer = {
      "name": "sgd",
      "momentum": 0.0,
      "weight_decay": 0.0,
      "schedule": "constant",
      "warmup_steps": 0,
    }
  return config
