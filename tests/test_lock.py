"""Two processes never train in one directory."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from zorn_jax.lock import lock

MODULE = pathlib.Path(__file__).parents[1] / "zorn_jax/lock.py"

# The module alone: importing the package takes longer than the test.
PROGRAM = """
import importlib.util, pathlib, subprocess, sys
spec = importlib.util.spec_from_file_location("lock", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
try:
  with module.lock(pathlib.Path(sys.argv[2])):
    child = None
    if len(sys.argv) > 3:
      child = subprocess.Popen(["sleep", "60"], close_fds=False)
    print(child.pid if child else "locked", flush=True)
    sys.stdin.read()
except ValueError as error:
  print(error)
"""


def start(workdir, *arguments):
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM, str(MODULE), str(workdir), *arguments],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def test_another_process_is_refused_and_told_who_holds_it(tmp_path):
  with start(tmp_path) as holder:
    assert holder.stdout.readline() == "locked\n"
    expected = (
      f"another process (pid {holder.pid} on {socket.gethostname()}) trains in "
      f"{str(tmp_path)!r}. Wait for it, or use another workdir."
    )
    for _ in range(2):  # Who is refused does not overwrite the holder's name.
      with pytest.raises(ValueError) as info, lock(tmp_path):
        pass
      assert str(info.value) == expected
    with start(tmp_path) as other:
      assert other.communicate()[0] == expected + "\n"
    holder.stdin.close()
    assert holder.wait() == 0
  with lock(tmp_path):
    pass


def test_a_killed_holder_leaves_no_lock(tmp_path):
  """Not even when a process that it started lives on."""
  with start(tmp_path, "with a child") as holder:
    child = int(holder.stdout.readline())
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    try:
      os.kill(child, 0)
      with lock(tmp_path):
        name = f"{os.getpid()} on {socket.gethostname()}"
        assert (tmp_path / "lock").read_text() == name
    finally:
      os.kill(child, signal.SIGKILL)


def test_it_holds_for_the_block(tmp_path):
  for _ in range(2):
    with lock(tmp_path):
      with start(tmp_path) as other:
        assert f"pid {os.getpid()} " in other.communicate()[0]
    assert os.listdir(tmp_path) == ["lock"]  # Never removed.
    with pytest.raises(RuntimeError, match="mine"), lock(tmp_path):
      raise RuntimeError("mine")
  with start(tmp_path) as other:
    assert other.communicate("")[0] == "locked\n"


def test_a_forked_child_does_not_keep_it(tmp_path):
  go, done = os.pipe()
  with lock(tmp_path):
    child = os.posix_spawn(  # The file is open in it, as after a fork.
      "/bin/sh",
      ["sh", "-c", "read x"],
      {},
      file_actions=[
        (os.POSIX_SPAWN_DUP2, go, 0),
        *[
          (os.POSIX_SPAWN_DUP2, int(fd), int(fd))
          for fd in os.listdir("/proc/self/fd")
          if os.path.exists(f"/proc/self/fd/{fd}")
          and os.readlink(f"/proc/self/fd/{fd}") == str(tmp_path / "lock")
        ],
      ],
    )
  with lock(tmp_path):
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
  os.write(done, b"\n")
  os.waitpid(child, 0)
  os.close(go)
  os.close(done)


def test_the_same_process_is_refused_too(tmp_path):
  before = len(os.listdir("/proc/self/fd"))
  with lock(tmp_path):
    for _ in range(3):
      with pytest.raises(ValueError, match=f"pid {os.getpid()} on"):
        with lock(tmp_path):
          pass
    with start(tmp_path) as other:  # The refusals did not let go of it.
      assert "another process" in other.communicate()[0]
  assert len(os.listdir("/proc/self/fd")) == before


def test_a_holder_that_has_not_written_its_name_yet(tmp_path):
  with lock(tmp_path):
    (tmp_path / "lock").write_text("")
    with pytest.raises(ValueError, match=r"\(pid unknown\)"), lock(tmp_path):
      pass


def test_directories_that_cannot_be_used(tmp_path, monkeypatch):
  (tmp_path / "file").touch()
  for name, reason in (("absent", "No such file"), ("file", "Not a direct")):
    with pytest.raises(ValueError, match=f"{name}': {reason}.*Name a writable"):
      with lock(tmp_path / name):
        pass
  assert not (tmp_path / "absent").exists()

  def read_only(*args):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(os, "open", read_only)
  with pytest.raises(ValueError, match=r"Permission denied\. Name a writable"):
    with lock(tmp_path):
      pass
