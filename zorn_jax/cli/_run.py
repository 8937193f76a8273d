"""How every command starts and ends."""

import pathlib
import shlex
import subprocess
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path


def run(main: Callable[[list[str]], int | None], *required: str) -> None:
  """Runs `main` under absl; a user's mistake becomes one sentence.

  Args:
    main: (argv) -> exit status.
    *required: Flags that must be given.
  """
  flags.mark_flags_as_required(required)

  def guarded(argv):
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)
    if argv[1:]:
      _fail(f"unexpected arguments {argv[1:]}. Flags begin with --.")
    try:
      return main(argv)
    except ValueError as error:
      _fail(str(error))
    except OSError as error:
      fact = error.strerror or str(error).strip().splitlines()[-1].strip()
      where = error.filename or "a file of the run"
      _fail(
        f"cannot use {where}: {fact}. Check the path, its permissions and the "
        "free space."
      )

  app.run(guarded, flags_parser=_parse)


def config_of(values: flags.FlagValues = flags.FLAGS) -> ConfigDict:
  """The config of the flag --config, with the text None for no value.

  Args:
    values: The flags, parsed.
  Raises:
    ValueError: If it is no ConfigDict, or a field has another value than its
      own flag says, as it stands for the same as another.
  """
  flag = values["config"]
  config = flag.value
  if not isinstance(config, ConfigDict):
    raise ValueError(
      f"get_config() of the config returns a {type(config).__name__}. Return "
      "an ml_collections.ConfigDict."
    )
  given = config_flags.get_override_values(flag)
  for name, value in given.items():
    if isinstance(value, (dict, ConfigDict)):
      continue
    if value == "None":
      config.update_from_flattened_dict({name: None})
      continue
    found = config_path.get_value(name, config)
    if found == value or value != value:  # NaN, which is refused later.
      continue
    others = [x for x in given if x != name and given[x] == found]
    raise ValueError(
      f"config.{name} is given as {value}, but is {found} like config."
      f"{' and config.'.join(others)}: they stand for one value. Give one."
    )
  return config


def command() -> str:
  """This command, as it can be given again."""
  name = pathlib.Path(sys.argv[0]).stem.removeprefix("zorn-")
  return shlex.join(["python", "-m", f"zorn_jax.cli.{name}", *sys.argv[1:]])


def commit() -> str:
  """The commit of the code; empty where it is not known."""
  folder = pathlib.Path(__file__).parent
  command = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return done.stdout.strip()


def _parse(argv):
  """Parses the flags; those of a config raise all kinds of errors."""
  try:
    return flags.FLAGS(argv)
  except Exception as error:
    root = error
    while root.__cause__ or root.__context__:
      root = root.__cause__ or root.__context__
    if "'get_config'" in str(root):
      fact = "the config file has no function get_config"
    elif isinstance(root, (AttributeError, KeyError)):
      fact = f"the config has no field {root}"
    else:
      # Wrapped in several lines, of which the first names the flag.
      first, *rest = str(error).splitlines()
      fact = f"{first} {root}" if rest else first
    _fail(f"{fact.rstrip('.')}. Run with --helpfull for the flags.")


def _fail(message):
  logging.debug("traceback of the error", exc_info=True)  # --verbosity=1
  print(f"error: {message}", file=sys.stderr)
  sys.exit(1)
