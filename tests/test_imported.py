"""A user's own Flax modules, trained as ours are."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import own_models
import pytest
import small

import zorn_jax
from zorn_jax import build, metrics, models
from zorn_jax.step import init_state, train_step
from zorn_jax.train import restore_params, train
from zorn_jax.train_state import digest

LINEN, NNX = "own_models:LinenGRU", "own_models:NNXElman"


def config_of(path, **overrides):
  """The small copy run with another model."""
  config = small.config(**overrides)
  with config.unlocked():
    config.model = {"name": path, "hidden_size": 4}
  return config


@pytest.mark.parametrize("path", [LINEN, NNX])
def test_it_trains_and_resumes_from_the_command_s_loop(path, tmp_path):
  config = config_of(path, steps=40, checkpoint_every=10)
  experiment = build.experiment(config)
  assert train(experiment, tmp_path, config.to_dict())
  params, step = restore_params(experiment, tmp_path)
  fresh = init_state(experiment).params
  assert step == 40 and digest(params) != digest(fresh)


@pytest.mark.parametrize("path", [LINEN, NNX])
def test_its_losses_are_those_of_the_plain_module(path):
  """Directions of low rank arrive as plain arrays."""
  model = models.imported(path, {"vocab_size": 5, "hidden_size": 4})
  params = jax.jit(model.init)(jax.random.key(0))
  direction = zorn_jax.low_rank()
  z = direction.sample(jax.random.key(1), params)
  moved = direction.perturb(params, z, 0.5)
  tokens = jnp.asarray([[0, 3, 4], [2, 1, 1]])

  @jax.jit
  def logits(params):
    return model.apply(params, model.initial_carry(params, 2), tokens)[1]

  dense = zorn_jax.materialize(moved)
  np.testing.assert_allclose(logits(moved), logits(dense), rtol=1e-6)
  assert np.abs(logits(moved) - logits(params)).max() > 0.1
  carry = model.initial_carry(params, 2)
  carry, first = model.apply(params, carry, tokens[:, :2])
  _, second = model.apply(params, carry, tokens[:, 2:])
  np.testing.assert_allclose(
    np.concatenate([first, second], 1), logits(params), rtol=1e-5, atol=1e-6
  )


def test_nnx_computes_what_numpy_does():
  model = models.imported(NNX, {"vocab_size": 5, "hidden_size": 4})
  params = jax.jit(model.init)(jax.random.key(0))
  assert set(params) == {
    "embed/embedding",
    "mixed/0/kernel",
    "mixed/0/bias",
    "out/kernel",
    "out/bias",
  }
  p = {name: np.float64(leaf) for name, leaf in params.items()}
  h, tokens = np.zeros(4), [0, 3, 4]
  _, logits = model.apply(
    params, model.initial_carry(params, 1), jnp.asarray([tokens])
  )
  for t, token in enumerate(tokens):
    mixed = h @ p["mixed/0/kernel"] + p["mixed/0/bias"]
    h = np.tanh(p["embed/embedding"][token] + mixed)
    expected = h @ p["out/kernel"] + p["out/bias"]
    np.testing.assert_allclose(logits[0, t], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("path", "readout"),
  [(LINEN, ("out",)), (NNX, ("out/kernel", "out/bias"))],
)
def test_its_last_layer_may_be_exact(path, readout):
  config = config_of(path)
  config.estimator.readout = "exact"
  config.estimator.readout_batches = 2
  config.optimizer.weight_decay = 0.1
  config.optimizer.warmup_steps = 0
  experiment = build.experiment(config)
  assert experiment.model.readout == readout
  state = init_state(experiment)
  after, values = jax.jit(partial(train_step, experiment))(state, ())
  assert np.isfinite(float(values["loss"]))
  estimated = experiment.method.estimated(state.params)
  assert set(estimated) == set(state.params) - set(readout)
  for name in readout:
    assert digest(after.params[name]) != digest(state.params[name])


def test_a_module_may_ask_for_the_factors():
  model = models.imported("own_models:Bigram", {"vocab_size": 5, "width": 3})
  params = jax.jit(model.init)(jax.random.key(0))
  estimator = zorn_jax.central_difference(0.1, 8, direction=zorn_jax.low_rank())

  def loss(params, tokens):
    seen.add(type(params["out"]).__name__)
    logits = model.apply(params, model.initial_carry(params, 1), tokens)[1]
    return jnp.mean(logits**2)

  seen = set()
  tokens = jnp.asarray([[1, 2]])
  losses = estimator.query(loss, params, tokens, (), jax.random.key(1))
  assert seen == {"Perturbed"} and np.isfinite(losses).all()


@pytest.mark.parametrize("attribute", ["READOUT", "DECAYED"])
@pytest.mark.parametrize(
  ("path", "names", "wrong", "known"),
  [
    (LINEN, ("out", "outer"), "outer", "cell, embed, out"),
    (NNX, ("out",), "out", "embed/embedding, .*, out/bias, out/kernel"),
    (LINEN, "out", "o", "cell, embed, out"),  # No tuple.
  ],
)
def test_a_name_of_no_parameter_is_refused(
  monkeypatch, attribute, path, names, wrong, known
):
  made = getattr(own_models, path.partition(":")[2])
  monkeypatch.setattr(made, attribute, names)
  message = f"{attribute} of {path} names '{wrong}',.* Name .* {known}"
  with pytest.raises(ValueError, match=message):
    models.imported(path, {"vocab_size": 5, "hidden_size": 4})


def test_a_method_named_score_is_the_users_own():
  model = models.imported("own_models:Scored", {"vocab_size": 5})
  params = model.init(jax.random.key(0))
  tokens = jnp.asarray([[0, 3, 4]])
  carry = model.initial_carry(params, 1)
  chunk = types.SimpleNamespace(inputs=tokens, targets=tokens)
  _, losses, _ = metrics.score(model, params, carry, chunk)
  assert losses.shape == (1, 3)


def test_a_mistake_in_a_model_is_not_called_one_of_the_config():
  config = config_of("own_models:Wrong")
  with pytest.raises(AttributeError, match="hidden_sizee"):
    build.experiment(config)


@pytest.mark.parametrize(
  ("path", "options", "message"),
  [
    ("no_such_package:Model", {}, "cannot import the model 'no_such_package"),
    ("own_models:Missing", {}, "cannot import the model 'own_models:Missing'"),
    (":Model", {}, "Name it as package.module:Class"),
    ("own_models:NOT_A_CLASS", {}, "is no Flax module"),
    ("own_models:NoCarry", {}, "has no method initial_carry"),
    (LINEN, {"odd": 1}, "LinenGRU cannot be made with odd, vocab_size"),
    (NNX, {}, "NNXElman cannot be made with vocab_size"),
    ("own_models:Counting", {}, "keeps BatchStat beside its parameters"),
    ("own_models:Normed", {}, "keeps batch_stats beside its parameters"),
  ],
)
def test_wrong_modules(path, options, message):
  with pytest.raises(ValueError, match=message):
    models.imported(path, options | {"vocab_size": 5})
