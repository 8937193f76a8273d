"""Where a step's gradient comes from: forward passes, or BPTT beside them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zorn_jax import aggregators, metrics, probe_map, tiles, types
from zorn_jax.estimators import Estimator
from zorn_jax.estimators.streaming import StreamingEstimator
from zorn_jax.models import Model
from zorn_jax.tasks import Draw, Split, Task, first_batch


class Now(NamedTuple):
  """What a step has of its own.

  Attributes:
    step: Its number, int32.
    probe_key: Random numbers of its directions.
    data_key: Root of the data, the same in every step.
    epsilon: Smoothing radius.
    length: How long sequences may be, at most the task's `max_length`; an
      integer where that never changes, else an int32 array.
  """

  step: jax.Array
  probe_key: types.Key
  data_key: types.Key
  epsilon: Any
  length: Any


class Method(NamedTuple):
  """A way to a gradient of the training loss.

  Attributes:
    init: (params) -> state.
    query: (params, state, data, now) -> (losses [n, q], aside): the passes
      through the model. `aside` is what they leave beside the losses.
    update: (losses, aside, params, state, now) -> (grads, state).
    passes_per_step: Forward passes through a batch; a backward pass counts as
      two, which is its cost.
    num_losses: How many columns are losses, from the first on.
    estimated: (params) -> those whose gradient is estimated.
    follows_length: Whether shorter sequences cost less.
    in_parts: Whether a loss of exactly 0 is that of a part of a sequence in
      which nothing counts.
    blocks: As `update`, but the gradient is a tree of functions, as
      :class:`zorn_jax.Estimator` has them; None where there are none.
    recall: (params, data, now) -> aside, apart from the queries, which then
      return none: the losses are all that a step needs to be taken again. None
      where that needs the queries.
    pairs: Whether the losses are those of two or more antithetic pairs, in the
      order (+, -).
  """

  init: Callable[[types.Params], Any]
  query: Callable[..., tuple[jax.Array, Any]]
  update: Callable[..., tuple[types.Grads, Any]]
  passes_per_step: float
  num_losses: int
  estimated: Callable[[types.Params], types.Params]
  follows_length: bool = True
  in_parts: bool = False
  blocks: Callable[..., tuple[types.PyTree, Any]] | None = None
  recall: Callable[..., Any] | None = None
  pairs: bool = False


def sample_batches(task: Task, data, now: Now, num_batches: int):
  """Batches of one step, stacked: batch i does not depend on the others."""
  sample = lambda i: task.sample(data, _draw(now, now.step, i))
  return jax.vmap(sample)(jnp.arange(num_batches))


def _draw(now, step, index):
  key = jax.random.fold_in(jax.random.fold_in(now.data_key, step), index)
  return Draw(key, step, index, now.length)


def zero_order(
  model: Model,
  task: Task,
  make: Callable[[Any], Estimator],
  *,
  num_probes: int,
  batch_per_probe: bool,
  readout_batches: int = 0,
  parts: int = 1,
  part_map: probe_map.ProbeMap | None = None,
) -> Method:
  """An estimator, with the exact gradient of the readout if wanted.

  With the exact readout a replay of the losses needs the data as well, and
  computes that gradient again.

  Args:
    model: What is trained.
    task: What it is trained on.
    make: Makes the estimator for an epsilon.
    num_probes: Directions n per step.
    batch_per_probe: Whether every probe sees a batch of its own.
    readout_batches: Batches on which the gradient of the readout is computed,
      unperturbed; 0 estimates it as all the others.
    parts: In how many parts the rows of a batch are read.
    part_map: Where they are read.
  Returns:
    A :class:`Method`.
  """
  names = model.readout if readout_batches else ()
  prototype = make(1.0)

  def query(params, state, data, now):
    num_chunks = task.num_chunks(now.length)
    body, readout = _split(params, names)
    sample = lambda index: task.sample(data, _draw(now, now.step, index))

    def loss_fn(body, batch):
      params = body | readout if names else body
      if batch_per_probe:  # Drawn where it is read.
        batch = sample(batch)
      split = Split(data, batch, num_chunks)
      return metrics.mean_loss(model, task, params, split, parts, part_map)

    batch = jnp.arange(num_probes) if batch_per_probe else sample(0)
    estimator = make(now.epsilon)
    return estimator.query(loss_fn, body, batch, state, now.probe_key), ()

  def recall(params, data, now):
    if not names:
      return ()
    batches = sample_batches(task, data, now, readout_batches)
    batches = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
    split = Split(data, batches, task.num_chunks(now.length))
    return readout_gradient(model, task, params, split)

  def update(losses, exact, params, state, now):
    body, _ = _split(params, names)
    estimator = make(now.epsilon)
    grads, state = estimator.update(losses, body, state, now.probe_key)
    return (grads | exact if names else grads), state

  def blocks(losses, exact, params, state, now):
    body, _ = _split(params, names)
    estimator = make(now.epsilon)
    sums, state = estimator.blocks(losses, body, state, now.probe_key)
    if not names:
      return sums, state
    return sums | jax.tree.map(lambda x: partial(tiles.block, x), exact), state

  # The readout needs its states and, once more, products as many as its own.
  passes = prototype.queries_per_step + 2 * readout_batches
  estimated = lambda params: _split(params, names)[0]
  init = lambda params: prototype.init(estimated(params))
  return Method(
    init,
    query,
    update,
    passes,
    prototype.num_losses,
    estimated,
    blocks=blocks if prototype.blocks else None,
    recall=recall,
    pairs=prototype.pairs and num_probes > 1,
  )


def _split(params, names):
  """The parameters without those named, and those."""
  if not names:
    return params, {}
  rest = {name: leaf for name, leaf in params.items() if name not in names}
  return rest, {name: params[name] for name in names}


def readout_gradient(
  model: Model, task: Task, params: types.Params, split: Split
) -> types.Grads:
  r"""The exact gradient of the mean loss with respect to the readout.

  No state depends on the readout, so that the gradient is a sum over time,
  softmax errors times hidden states, which is accumulated while the states
  stream by: :math:`\sum_t (p_t - y_t) h_t^T`. Nothing is propagated back
  through time and only one chunk is held.

  Args:
    model: The model; `model.readout` names its last linear layer.
    task: Cuts the chunks.
    params: All parameters.
    split: The sequences.
  Returns:
    The gradient of the parameters in `model.readout`.
  """
  body, readout = _split(params, model.readout)

  def add_chunk(state, index):
    carry, total, count = state
    chunk = task.chunk(split.data, split.batch, index)

    def loss(readout):
      after, logits = model.apply(body | readout, carry, chunk.inputs)
      losses = metrics.cross_entropy(logits, chunk.targets)
      return jnp.sum(losses * chunk.weights), after

    grads, carry = jax.grad(loss, has_aux=True)(readout)
    add = lambda a, b: a + b.astype(jnp.float32)
    total = jax.tree.map(add, total, grads)
    return carry, total, count + jnp.sum(chunk.weights)

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), readout)
  carry = model.initial_carry(params, metrics.rows(task, split))
  state = (carry, zeros, jnp.zeros(()))
  _, total, count = metrics.loop(add_chunk, state, split.num_chunks)
  return jax.tree.map(lambda g, p: (g / count).astype(p.dtype), total, readout)


def streaming(
  model: Model,
  task: Task,
  make: Callable[[Any], StreamingEstimator],
  *,
  num_probes: int,
  unrolls: int,
) -> Method:
  """An estimator whose probes carry their states from unroll to unroll.

  Every probe reads a batch of its own, an episode, in `unrolls` truncated
  parts, and then another one, for which its states start anew. Consecutive
  episodes of a probe read consecutive windows of a text that is read in
  streams; its first one may end early. The loss of a part is the mean over
  what it scores, and zero, which says nothing, where it scores nothing.

  Args:
    model: What is trained.
    task: What it is trained on, in sequences of full length.
    make: Makes the estimator for an epsilon.
    num_probes: Directions n per step.
    unrolls: Parts of an episode; a divisor of the chunks of a sequence.
  Returns:
    A :class:`Method`.
  Raises:
    ValueError: If the text is read in parts, or `unrolls` is no divisor.
  """
  if task.refresh:
    raise ValueError(
      "an episode reads on in one text, but this one is larger than the device "
      "and read in parts. Raise task.resident_tokens to its length, or choose "
      "another estimator."
    )
  num_chunks = task.num_chunks(task.max_length)
  chunks = num_chunks // unrolls
  if chunks * unrolls != num_chunks:
    raise ValueError(
      "unrolls must divide the chunks of a sequence, got "
      f"{unrolls=}, {num_chunks} chunks. Choose a divisor."
    )
  prototype = make(1.0)

  def rows():
    batch = first_batch(task, task.data)
    return metrics.rows(task, Split(task.data, batch, num_chunks))

  def init(params):
    carry = model.initial_carry(params, rows())
    return prototype.init(params), prototype.init_carry(carry)

  def query(params, state, data, now):
    state, carries = state

    def sample(probe, age):
      # The data of an episode are those of the step in which it began.
      began = now.step - age
      draw = _draw(now, began + unrolls, probe)  # Not negative.
      # Only a first episode is shorter, so that this counts them.
      episode = -(-began // unrolls)
      return task.sample(data, draw._replace(step=episode)), age

    batch = jax.vmap(sample)(jnp.arange(num_probes), state.age)

    def unroll(params, carry, batch, first):
      batch, age = batch
      start = model.initial_carry(params, rows())
      carry = jax.tree.map(lambda a, b: jnp.where(first, a, b), start, carry)
      split = Split(data, batch, chunks)
      carry, sums = metrics.stream(
        model, task, params, split, carry, age * chunks
      )
      return carry, jnp.sum(sums.loss) / jnp.maximum(jnp.sum(sums.count), 1)

    return make(now.epsilon).query(
      unroll, params, batch, carries, state, now.probe_key
    )

  def update(losses, carries, params, state, now):
    estimator = make(now.epsilon)
    grads, state = estimator.update(losses, params, state[0], now.probe_key)
    return grads, (state, carries)

  def blocks(losses, carries, params, state, now):
    estimator = make(now.epsilon)
    sums, state = estimator.blocks(losses, params, state[0], now.probe_key)
    return sums, (state, carries)

  passes = prototype.queries_per_step / unrolls
  return Method(
    init,
    query,
    update,
    passes,
    2,
    lambda params: params,
    in_parts=True,
    blocks=blocks if prototype.blocks else None,
  )


def bptt(
  model: Model,
  task: Task,
  *,
  micro_batches: int = 1,
  truncation: int = 0,
  checkpoint: bool = False,
  aggregator: aggregators.Aggregator | None = None,
) -> Method:
  """Back-propagation through time, the baseline.

  Args:
    model: What is trained.
    task: What it is trained on.
    micro_batches: Batches whose gradients are accumulated, one at a time.
    truncation: Chunks of time after which the gradient stops; 0 for none.
    checkpoint: Whether the states within a chunk are computed again in the
      backward pass instead of stored.
    aggregator: What makes one gradient of those of the micro-batches; their
      mean unless given.
  Returns:
    A :class:`Method`.
  Raises:
    ValueError: If a number is out of range.
  """
  if micro_batches < 1:
    raise ValueError(
      f"micro_batches must be positive, got {micro_batches}. Choose 1 or more."
    )
  if truncation < 0:
    raise ValueError(
      f"truncation must not be negative, got {truncation}. Choose 0 for none."
    )
  aggregator = aggregator or aggregators.mean()

  # Of full length: a gradient needs a number of chunks that is known.
  num_chunks = task.num_chunks(task.max_length)

  def query(params, state, data, now):
    del state
    batches = sample_batches(task, data, now, micro_batches)

    def loss_fn(params, batch):
      split = Split(data, batch, num_chunks)
      sums = metrics.stream_sums(
        model, task, params, split, checkpoint, truncation
      )
      return jnp.sum(sums.loss) / jnp.sum(sums.count)

    def micro(x):
      loss, grads = jax.value_and_grad(loss_fn)(params, x[0])
      return grads, loss

    # The index says how many there are where batches hold no arrays.
    numbered = (batches, jnp.arange(micro_batches))
    grads, losses = aggregator(micro, numbered, has_aux=True)
    return losses[:, None], grads

  def update(losses, grads, params, state, now):
    del losses, params, now
    return grads, state

  passes = (4 if checkpoint else 3) * micro_batches
  nothing = lambda params: ()
  return Method(nothing, query, update, passes, 1, nothing, False)
