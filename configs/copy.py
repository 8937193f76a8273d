"""The copy task, strings of 2 to 10 letters, forward passes only.

python -m zorn_jax.cli.train --config=configs/copy.py --workdir=DIR
"""

import ml_collections
from ml_collections import config_dict


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.steps = 3000
  config.batch_size = 4
  config.num_probes = 256
  config.epsilon = 0.01
  config.learning_rate = 0.02
  config.epsilon_schedule = "constant"
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
  config.task.name = "copy"
  config.task.max_length = 10
  config.task.time_chunk = 21
  config.task.num_evaluation = 512
  config.task.one_batch = False  # True to learn one batch by heart.

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
  config.estimator.readout = "estimated"
  config.estimator.readout_batches = 0

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
  config.curriculum.maximum = 10  # and at last.
  config.curriculum.step = 1
  config.curriculum.threshold = 0.5  # Loss that counts as learned.
  config.curriculum.patience = 100  # Steps in a row.
  return config
