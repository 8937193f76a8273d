"""OpenWebText in GPT-2's tokens, forward passes only.

python -m zorn_jax.cli.train --config=configs/openwebtext.py --workdir=DIR

Needs pip install 'zorn_jax[text,tfds]' and 8 million documents (40 GB, and as
much again while they are made), which TFDS fetches with the package `datasets`:
pip install datasets && python -c "
import tensorflow_datasets as tfds
tfds.dataset_builders.HuggingfaceDatasetBuilder(
  hf_repo_id='Skylion007/openwebtext', data_dir='data/tfds',
  file_format='array_record').download_and_prepare()
"
The last documents are held out, 5000 each for validation and test. Token ids
are written to data/tokens once, about 18 GB, which takes hours. The device
holds a pool of them at a time, another one every 1000 steps.
The recipe is that of configs/shakespeare.py; no result was measured.
"""

import ml_collections
from ml_collections import config_dict


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.steps = 100_000
  config.batch_size = 4
  config.num_probes = 256
  config.epsilon = 0.01
  config.epsilon_schedule = "constant"  # Or as the learning_rate's.
  config.learning_rate = 0.03
  config.log_every = 20
  config.evaluate_every = 5000
  config.checkpoint_every = 1000
  config.loggers = ()

  config.mesh = ml_collections.ConfigDict()
  config.mesh.probe = 0  # Devices that share the probes; 0 for all.
  config.mesh.data = 1  # That share the rows of a batch.
  config.mesh.head = 1  # That share a model.
  config.mesh.updates = "replicated"  # Or sharded over the devices.

  config.task = ml_collections.ConfigDict()
  config.task.name = "language_model"
  config.task.source = "tfds:skylion007__openwebtext"
  config.task.data_dir = "data/tfds"
  config.task.feature = "text"
  config.task.errors = "strict"  # Or replace, for text that is not UTF-8.
  config.task.tokenizer = "gpt2"
  config.task.vocab_size = 0  # Of bpe.
  config.task.order = "windows"  # Or streams, which read on every step.
  config.task.resident_tokens = 2**28  # On the device at a time.
  config.task.refresh_every = 1000  # Steps.
  config.task.cache = "data/tokens"
  config.task.seq_length = 64
  config.task.time_chunk = 16
  config.task.evaluation_rows = 64
  config.task.evaluation_tokens = 2**20  # Of a split; 0 for all.

  config.model = ml_collections.ConfigDict()
  config.model.name = "lstm"
  config.model.embedding_size = 256
  config.model.hidden_size = 1024
  config.model.num_heads = 4
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
  config.estimator.probe_batch = 16
  config.estimator.direction = ml_collections.ConfigDict()
  config.estimator.direction.name = "low_rank"
  config.estimator.direction.rank = 1
  config.estimator.direction.base = "rademacher"
  config.estimator.direction.norm = "none"
  config.estimator.adaptive = 0.0  # Decay of the second moment; 0 for none.
  config.estimator.readout = "exact"
  config.estimator.readout_batches = 32

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.name = "adam"
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.99
  config.optimizer.weight_decay = 0.0
  config.optimizer.clip = 0.0  # Of the gradient's norm; 0 for none.
  config.optimizer.normalize = "none"
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 1000

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
  return config
