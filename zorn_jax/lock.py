"""One trainer in a run directory at a time."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

LOCK_NAME = "lock"


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps `workdir` for this process until the end of the `with` block.

  The file `lock` stays there, but the kernel lets go of it with the process,
  however that ends. On several hosts only the first process takes it.

  Args:
    workdir: An existing directory.
  Raises:
    ValueError: If another process has it, or the directory cannot be written.
  """
  with contextlib.ExitStack() as stack:
    try:
      # Not inherited by subprocesses, which may outlive this one.
      file = os.open(workdir / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
      stack.callback(os.close, file)
      _take(file, workdir)
      # Closing is not enough where a forked child has the file open too.
      stack.callback(fcntl.flock, file, fcntl.LOCK_UN)
      os.ftruncate(file, 0)
      os.pwrite(file, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
    except OSError as error:
      raise ValueError(
        f"cannot lock the workdir {str(workdir)!r}: {error.strerror}. "
        "Name a writable directory with free space."
      ) from error
    yield


def _take(file, workdir):
  """Locks the file, or says who has locked it."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    holder = os.pread(file, 300, 0).decode(errors="replace") or "unknown"
    raise ValueError(
      f"another process (pid {holder}) trains in {str(workdir)!r}. "
      "Wait for it, or use another workdir."
    ) from error
