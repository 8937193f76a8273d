"""Several processes that train as one, each with devices of its own.

All of them first meet at the coordinator's address, before JAX does, since JAX
aborts a process that waits in vain. The connections made there stay open beside
JAX's: the kernel closes them with a process, however that ends, so that the
others learn of it while JAX waits in a collective.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from zorn_jax import cores

_PATIENCE = 60  # Seconds that processes wait for each other at the start.
_SILENCE = 40  # Seconds after which JAX aborts the others of a frozen process.
_NOTICE = 1  # Seconds in which an error may turn out to come from a lost one.
_GRACE = 3  # Seconds for a process to end by an error of its own.
_FLAGS = "coordinator, num_processes and process_id"
_END = "the end of the run"

_group = None


class _Place(NamedTuple):
  """Where a process stands among the others."""

  address: str
  count: int
  index: int
  devices: list[int] | None = None  # On this host; None for all of them.


@contextlib.contextmanager
def started(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> Iterator[None]:
  """Makes this process one of several until the end of the `with` block.

  It comes before anything that touches a device. For a single process it does
  what :func:`zorn_jax.cores.use` does, and no more. Without arguments SLURM,
  Open MPI and Kubernetes are asked whether they started more than one. SIGTERM
  and SIGINT are then told by :func:`stopping`.

  When a process ends before its block does, the others print one line that says
  which one and why, if it could still tell, and exit with status 1, in seconds
  or half a minute when its host was lost. JAX aborts them when it only froze.

  Args:
    coordinator: HOST:PORT where process 0 listens.
    num_processes: Of the run; 1 alone means this one, whatever the cluster.
    process_id: Number of this process, from 0.
  Raises:
    ValueError: If the arguments do not fit each other, or the processes do not
      find each other within a minute, or run different versions of JAX.
  """
  global _group
  place = _from_flags(coordinator, num_processes, process_id)
  if place is None and num_processes is None:
    place = _from_cluster()
  if place is None:
    cores.use()
    yield
    return
  _group = group = _Group(place, _meet(place))
  previous = signal.getsignal(signal.SIGINT)
  try:
    agree({name: metadata.version(name) for name in ("jax", "jaxlib")})
    jax.distributed.initialize(
      place.address,
      place.count,
      place.index,
      place.devices,
      initialization_timeout=_PATIENCE,
      heartbeat_timeout_seconds=_SILENCE,
      shutdown_timeout_seconds=_PATIENCE,
    )
    signal.signal(signal.SIGINT, _terminate)
    yield
    group.exchange(_END)
    jax.distributed.shutdown()
    group.close()
  except BaseException as error:
    group.fail(error)
    # JAX would wait for the others, in vain.
    atexit.register(_leave)
    raise
  finally:
    signal.signal(signal.SIGINT, previous)
  _group = None


def count() -> int:
  """The number of processes."""
  return jax.process_count()


def is_first() -> bool:
  """Whether this process writes the files of the run."""
  return jax.process_index() == 0


def share(value: Any) -> Any:
  """The first process's value, which JSON can hold, on all of them."""
  return _group.exchange("share", value)[0] if _group else value


def barrier(name: str) -> None:
  """Waits until all processes are here."""
  if _group:
    _group.exchange(f"barrier {name}")


def agree(facts: dict[str, str]) -> None:
  """Compares what has to be the same in all processes.

  Args:
    facts: Values by name, such as fields of a config and versions.
  Raises:
    ValueError: In all processes, if one differs from the first; it names the
      process, the facts and the values.
  """
  if not _group:
    return
  first = share(facts)
  differences = [
    f"{name} is {facts.get(name, 'missing')}, but "
    f"{first.get(name, 'missing')} in process 0"
    for name in sorted(facts.keys() | first.keys())
    if facts.get(name) != first.get(name)
  ]
  found = [
    f"in process {index} {line}"
    for index, lines in enumerate(_group.exchange("agree", differences))
    for line in lines
  ]
  if found:
    more = [f"and {len(found) - 10} more"] if len(found) > 10 else []
    raise ValueError(
      f"the processes differ: {'; '.join(found[:10] + more)}. Start all of "
      "them with the same command, config and versions."
    )


def stopping(step: int) -> bool:
  """Whether all processes are to stop before the step after `step`.

  True at the same step everywhere, some time after one of them got SIGTERM.

  Args:
    step: To be asked about one by one.
  """
  return multihost_utils.reached_preemption_sync_point(step)


def _terminate(number, frame):
  """Treats the first SIGINT as SIGTERM, of which JAX tells all processes."""
  del number, frame
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  os.kill(os.getpid(), signal.SIGTERM)


def _leave():
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)


def _from_flags(coordinator, num_processes, process_id):
  """The place that the arguments give; None for a single process."""
  given = {
    "coordinator": coordinator,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if num_processes is not None and num_processes < 1:
    raise ValueError(
      f"num_processes must be at least 1, got {num_processes}. Choose the "
      "number of processes that are started."
    )
  if len(missing) == 3 or (num_processes == 1 and len(missing) == 2):
    return None
  if missing:
    raise ValueError(
      f"{' and '.join(missing)} must be given too, since {_FLAGS} go together. "
      "Give all three, or none where a cluster can be asked."
    )
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ValueError(
      f"coordinator must be HOST:PORT, got {coordinator!r}. Name the host of "
      "process 0 and a free port between 1 and 65535 there."
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f"process_id must be from 0 to {num_processes - 1} with {num_processes} "
      f"processes, got {process_id}. Number them from 0."
    )
  if num_processes == 1:
    return None
  return _Place(coordinator, num_processes, process_id)


def _from_cluster():
  """The place that a cluster gives; None for a single process."""
  method, number = _cluster(os.environ)
  if method is None:
    return None
  needs = method in ("mpi4py", "kubernetes")
  if needs and not importlib.util.find_spec(method):
    raise ValueError(
      f"the package {method}, by which the processes find each other here, is "
      f"missing. Install it, or give {_FLAGS}, or num_processes=1 for a run of "
      "its own."
    )
  # Private, but what `initialize` does; the address is needed before it.
  from jax._src import clusters

  named = None if method == "kubernetes" else method  # It has no name there.
  try:
    address, number, index, devices = (
      clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, number, None, None, named, _PATIENCE
      )
    )
  except Exception as error:
    raise ValueError(
      f"JAX cannot read the place of this process from {method}: "
      f"{type(error).__name__} {error}. Give {_FLAGS}."
    ) from error
  return _Place(address, number, index, devices) if number > 1 else None


def _cluster(environ):
  """JAX's way to ask the cluster that started several processes, or None.

  Returns:
    The name, and the number of processes where it must not be JAX's.
  """
  if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
    # From Open MPI 5 on without this address.
    known = "OMPI_MCA_orte_hnp_uri" in environ
    return ("ompi" if known else "mpi4py"), None
  # Not SLURM_NTASKS, which counts those that a batch script has yet to start.
  number = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
  if number > 1 and "SLURM_STEP_NODELIST" in environ:
    return "slurm", number
  if "KUBERNETES_SERVICE_HOST" in environ and (
    "JOB_COMPLETION_INDEX" in environ
  ):
    return "kubernetes", None
  return None, None


def _meet(place):
  """Connections to all others (in process 0), or to process 0, by index."""
  host, _, port = place.address.rpartition(":")
  end = time.monotonic() + _PATIENCE
  if place.index == 0:
    return _receive_all(place, int(port), end)
  return {0: _call(place, host.strip("[]"), int(port), end)}


def _receive_all(place, port, end):
  """Waits for the others, and tells them when all have come."""
  family, dual = socket.AF_INET, {}
  if socket.has_dualstack_ipv6():
    family, dual = socket.AF_INET6, {"dualstack_ipv6": True}
  try:
    # JAX listens there afterwards; `create_server` lets it.
    listener = socket.create_server(("", port), family=family, **dual)
  except OSError as error:
    raise ValueError(
      f"process 0 cannot listen on port {port} of {place.address}: "
      f"{os.strerror(error.errno)}. Choose another port."
    ) from error
  others = {}
  with listener:
    while len(others) < place.count - 1:
      listener.settimeout(max(end - time.monotonic(), 0.001))
      try:
        link = _Link(listener.accept()[0])
      except TimeoutError as error:
        absent = sorted(set(range(1, place.count)) - others.keys())
        raise _refused(
          others.values(),
          f"process {', '.join(map(str, absent))} of {place.count} did not "
          f"come to {place.address} within {_PATIENCE} s. Start all of them, "
          "where they can reach that address.",
        ) from error
      try:
        index, number = link.receive(5)
      except (OSError, ValueError, TypeError):
        link.close()  # Something else on the network.
        continue
      for gone in [i for i, other in others.items() if other.readable()]:
        others.pop(gone).close()  # It ended, and may be started again.
      links = [*others.values(), link]
      if number != place.count:
        raise _refused(
          links,
          f"num_processes is {number} in process {index}, but {place.count} in "
          "process 0. Give all of them the same.",
        )
      if index == 0 or index in others:
        raise _refused(
          links,
          f"two processes have the process_id {index}. Number them from 0 to "
          f"{place.count - 1}.",
        )
      others[index] = link
  for link in others.values():
    with contextlib.suppress(OSError):  # Its reader will tell.
      link.send("welcome")
  return others


def _refused(links, message):
  """The error of process 0, which the others then raise as well."""
  for link in links:
    with contextlib.suppress(OSError):
      link.send(message)
    link.close()
  return ValueError(message)


def _call(place, host, port, end):
  """Connects to process 0, and waits until the others have."""
  while True:
    left = end - time.monotonic()
    try:
      link = _Link(socket.create_connection((host, port), max(left, 0.001)))
      break
    except OSError as error:
      if left < 0.5:
        raise ValueError(
          f"the coordinator at {place.address} did not answer within "
          f"{_PATIENCE} s ({error.strerror or error}). Start process 0 there, "
          "or correct the address."
        ) from error
      time.sleep(0.2)
  try:
    link.send((place.index, place.count))
    # Process 0 may have begun to wait for the others just now.
    answer = link.receive(_PATIENCE + 10)
  except (OSError, ValueError) as error:
    link.close()
    raise ValueError(
      f"what listens at {place.address} is not process 0 of this run, or it "
      "has ended. Start process 0 there, or choose another port."
    ) from error
  if answer != "welcome":
    link.close()
    raise ValueError(answer)
  return link


class _Link:
  """Messages over a connection, one line of JSON each."""

  def __init__(self, connection):
    self.connection = connection
    self._lines = connection.makefile("rb")
    self._lock = threading.Lock()
    # A host that is lost says no word: ask it.
    options = {
      "TCP_KEEPIDLE": 10,  # Seconds.
      "TCP_KEEPINTVL": 5,
      "TCP_KEEPCNT": 4,
      "TCP_USER_TIMEOUT": 30_000,  # Milliseconds.
    }
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
      if hasattr(socket, name):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

  def send(self, message):
    with self._lock:
      self.connection.sendall(json.dumps(message).encode() + b"\n")

  def receive(self, seconds=None):
    """The next message; OSError or ValueError when there is none."""
    self.connection.settimeout(seconds)
    return json.loads(self._lines.readline(1 << 26))

  def readable(self):
    return bool(select.select([self.connection], [], [], 0)[0])

  def close(self):
    self._lines.close()
    self.connection.close()


class _Group:
  """The connections of a run: values and bad news go through process 0."""

  def __init__(self, place, links):
    self._place = place
    self._links = links
    self._values = {index: queue.SimpleQueue() for index in links}
    self._told = {index: threading.Event() for index in links}
    self._gone = {index: threading.Event() for index in links}
    self._lock = threading.RLock()
    self._over = False  # All have come to the end.
    self._failing = False  # By an error of its own.
    self._left = False  # The others have been told so.
    for index, link in links.items():
      threading.Thread(
        target=self._read, args=(index, link), daemon=True
      ).start()

  def exchange(self, name, value=None):
    """The values of all processes, in order, once all have given theirs."""
    if self._place.index:
      self._send(0, {"name": name, "value": value})
      names, values = self._values[0].get()
    else:
      names, values = [name], [value]
      for index in sorted(self._links):
        message = self._values[index].get()
        names.append(message["name"])
        values.append(message["value"])
      self._over |= name == _END
      for index in self._links:
        self._send(index, {"values": (names, values)})
    if len(set(names)) > 1:
      raise ValueError(
        f"the processes are at different places: {names}. Start all of them "
        "with the same command."
      )
    return values

  def fail(self, error):
    """Tells the others of an error, and waits a little until they have ended.

    An open connection keeps them from errors that only follow from this one.
    """
    self._failing = True
    time.sleep(_NOTICE)  # Does it follow from the loss of another?
    with self._lock:
      self._left = True
    reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
    for index in self._links:
      self._send(index, {"failed": self._place.index, "reason": reason})
    self._outlast()

  def close(self):
    """Ends the connections, which is no news any more."""
    for index, link in self._links.items():
      with contextlib.suppress(OSError):
        link.connection.shutdown(socket.SHUT_RDWR)
      self._gone[index].wait(_GRACE)
      link.close()

  def _outlast(self):
    """Waits until the others have ended, the coordinator last of all."""
    end = time.monotonic() + 2 * _GRACE

    def wait(events):
      for event in events.values():
        event.wait(max(end - time.monotonic(), 0))

    if not self._place.index:
      wait(self._told)
      for index in self._links:
        self._send(index, {"leave": True})
    wait(self._gone)

  def _send(self, index, message):
    with contextlib.suppress(OSError):  # Its reader tells.
      self._links[index].send(message)

  def _read(self, index, link):
    """Takes the messages of another process until it has gone."""
    while True:
      try:
        message = link.receive()
      except (OSError, ValueError):
        break
      if "values" in message:
        self._over |= message["values"][0][0] == _END
        self._values[index].put(message["values"])
      elif "name" in message:
        self._values[index].put(message)
      elif "failed" in message:
        self._hear(index, message)
      else:
        break  # Process 0 has seen all others leave.
    if not self._over and not self._told[index].is_set():
      self._hear(index, {"failed": index, "reason": None})
    self._gone[index].set()

  def _hear(self, index, news):
    """Passes on that a process failed, and ends this one soon."""
    self._told[index].set()
    for other in self._links:
      if other != index:
        self._send(other, news)
    # With a reason it is alive, and this process may have found the same.
    wait = _GRACE if news["reason"] else 0
    threading.Thread(target=self._end, args=(news, wait), daemon=True).start()

  def _end(self, news, wait):
    time.sleep(wait)
    if self._left or (wait and self._failing):
      return
    with self._lock:
      if self._left:
        return
      fact = f"process {news['failed']} of {self._place.count}"
      reason = news["reason"]
      fact += f" failed ({reason})" if reason else " ended before the run did"
      line = (
        f"error: {fact}, so process {self._place.index} ends too. See its "
        "output, and resume with the same command.\n"
      )
      os.write(2, line.encode())
      if not self._place.index:
        self._outlast()
      os._exit(1)
