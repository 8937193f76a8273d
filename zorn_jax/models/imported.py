"""A user's own Flax module as a model, Linen or NNX."""

import importlib
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from zorn_jax import perturbed
from zorn_jax.models.linen import from_linen, variables
from zorn_jax.models.types import Model


def imported(path: str, options: dict[str, Any]) -> Model:
  """The model of a class that is not ours.

  The class has the methods `initial_carry(batch_size)`, the state before the
  first token, and `__call__(carry, tokens [B, C])`, which returns the state
  after them and logits [B, C, V]. Its attributes `READOUT` and `DECAYED` may
  name parameters, as :class:`Model` says; those of an NNX module are named by
  their paths, such as "out/kernel". It sees plain arrays, unless it sets
  `PERTURBED = True` and multiplies with :func:`zorn_jax.matmul`.

  Args:
    path: Where the class is, "package.module:Class".
    options: What it is made with; an NNX module also gets `rngs`.
  Returns:
    A :class:`Model`.
  Raises:
    ValueError: If there is no such class, it is no Flax module, lacks a
      method, does not take the options, keeps variables that are not
      parameters, or names parameters that it does not have.
  """
  made = _class_of(path)
  for method in ("initial_carry", "__call__"):
    if not callable(getattr(made, method, None)):
      raise ValueError(
        f"{path} has no method {method}. A model has "
        "initial_carry(batch_size) and __call__(carry, tokens)."
      )
  try:
    if issubclass(made, nn.Module):
      module = made(**options)
      known = jax.eval_shape(partial(variables, module), jax.random.key(0))
      _refuse_beside(sorted(known.keys() - {"params"}))
      model = from_linen(module)
    else:
      model = from_nnx(partial(made, **options))
  except TypeError as error:
    raise ValueError(
      f"{path} cannot be made with {', '.join(options)}: {error}. Give the "
      "fields of config.model its parameters' names."
    ) from error
  _check_names(path, model)
  return model if getattr(made, "PERTURBED", False) else _plain(model)


def from_nnx(make) -> Model:
  """Wraps an NNX module.

  Args:
    make: (rngs=...) -> the module, with `initial_carry` and
      `__call__(carry, tokens)`.
  Returns:
    A :class:`Model` whose parameters are a flat dict with their paths as names.
  Raises:
    ValueError: If the module keeps variables that are not parameters.
  """
  abstract = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
  graph, params, rest = nnx.split(abstract, nnx.Param, ...)
  _refuse_beside(sorted({type(x).__name__ for x in _variables(rest)}))
  paths = {_name(path): path for path in _flat(params)}

  def init(key):
    state = nnx.state(make(rngs=nnx.Rngs(key)), nnx.Param)
    return {_name(path): leaf for path, leaf in _flat(state).items()}

  def merged(values):
    nested = nnx.traversals.unflatten_mapping(
      {path: values[name] for name, path in paths.items()}
    )
    state = jax.tree.map(lambda leaf: leaf, params)  # A copy to fill.
    nnx.replace_by_pure_dict(state, nested)
    return nnx.merge(graph, state)

  return Model(
    init,
    lambda params, batch_size: merged(params).initial_carry(batch_size),
    lambda params, carry, tokens: merged(params)(carry, tokens),
    getattr(abstract, "READOUT", ()),
    getattr(abstract, "DECAYED", ()),
  )


def _refuse_beside(kept):
  """Refuses variables that are not parameters, by their names."""
  if kept:
    raise ValueError(
      f"the module keeps {', '.join(kept)} beside its parameters, which a pure "
      "function cannot. Leave them out; recurrent states go into the carry."
    )


def _class_of(path):
  module, _, name = path.partition(":")
  try:
    made = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(
      f"cannot import the model {path!r}: {error}. Name it as "
      "package.module:Class, and run where Python finds the package."
    ) from error
  if not (isinstance(made, type) and issubclass(made, (nn.Module, nnx.Module))):
    raise ValueError(
      f"{path} is no Flax module. Name a subclass of flax.linen.Module or "
      "flax.nnx.Module."
    )
  return made


def _check_names(path, model):
  named = {"READOUT": model.readout, "DECAYED": model.decayed}
  if not any(named.values()):
    return
  known = jax.eval_shape(model.init, jax.random.key(0))
  for attribute, names in named.items():
    wrong = [name for name in names if name not in known]
    if wrong:
      raise ValueError(
        f"{attribute} of {path} names {wrong[0]!r}, which is no parameter. "
        f"Name a tuple of some of {', '.join(sorted(known))}."
      )


def _plain(model):
  """The model for parameters without :class:`zorn_jax.Perturbed` leaves."""
  dense = perturbed.materialize
  return model._replace(
    initial_carry=lambda params, rows: model.initial_carry(dense(params), rows),
    apply=lambda params, carry, x: model.apply(dense(params), carry, x),
    score=None,  # A method of that name may be anything.
    deferred=False,
  )


def _flat(state):
  return nnx.traversals.flatten_mapping(nnx.to_pure_dict(state))


def _name(path):
  return "/".join(map(str, path))


def _variables(state):
  return jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
