"""A journal gives back every bit, or says which step is damaged."""

import contextlib
import errno
import os
import pathlib
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest

from zorn_jax import journal
from zorn_jax.journal import Header, Journal, JournalError, Record, read

REPOSITORY = pathlib.Path(__file__).parents[1]
FINGERPRINT = bytes(range(7, 39)).hex()
HEADER = Header(FINGERPRINT, num_probes=1, num_queries=2)
START = 52
SIZE = 16 + 4 * 1 * 2


def make(step, header=HEADER):
  shape = (header.num_probes, header.num_queries)
  losses = np.random.default_rng(step).normal(size=shape)
  return Record(step, step / 8, step + 0.25, losses.astype(np.float32))


def write(path, steps, header=HEADER):
  with contextlib.closing(Journal(path, header)) as log:
    for step in steps:
      log.append(make(step, header))


def steps_of(path, **kwargs):
  header, records = read(path, **kwargs)
  for record in records:
    assert_same(record, make(record.step, header))
  return [record.step for record in records]


def assert_same(record, expected):
  assert record[:3] == expected[:3]
  assert record.losses.dtype == expected.losses.dtype == np.float32
  assert record.losses.shape == expected.losses.shape
  assert record.losses.tobytes() == expected.losses.tobytes()


def summed(body, before):
  checksum = struct.pack("<I", zlib.crc32(body))
  return checksum + body if before else body + checksum


def header_bytes(header):
  body = b"ZORNJNL1" + bytes.fromhex(header.fingerprint)
  body += struct.pack("<II", header.num_probes, header.num_queries)
  return summed(body, before=False)


def record_bytes(step, epsilon, rate, losses):
  flat = losses.ravel().tolist()
  body = struct.pack(f"<Iff{len(flat)}f", step, epsilon, rate, *flat)
  return summed(body, before=True)


def flip(path, bit):
  data = bytearray(path.read_bytes())
  data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)


@pytest.fixture
def path(tmp_path):
  return tmp_path / "journal"


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (64, 2), (5, 3)])
def test_the_file_is_as_documented(path, shape):
  header = Header(FINGERPRINT, *shape)
  write(path, range(1, 6), header)
  expected = header_bytes(header)
  expected += b"".join(record_bytes(*make(k, header)) for k in range(1, 6))
  assert path.read_bytes() == expected
  per_step = (len(expected) - START) / 5
  assert per_step == 16 + 4 * shape[0] * shape[1] <= 16 + 8 * np.prod(shape)
  assert os.listdir(path.parent) == ["journal"]
  assert steps_of(path, header=header) == steps_of(path) == [1, 2, 3, 4, 5]
  assert read(path)[0] == header


def test_every_bit_of_the_losses_survives(path):
  bits = [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFABCDEF, 1]
  bits += [0x80000000, 0x00800001]  # Infinities, NaNs, denormals and -0.
  losses = np.array(bits, np.uint32).view(np.float32).reshape(4, 2)
  header = Header(FINGERPRINT, 4, 2)
  records = [
    Record(1, 0.1, float("inf"), losses),
    Record(2, np.float32(1e-9), float("nan"), losses.T.copy().T),
  ]
  with contextlib.closing(Journal(path, header)) as log:
    for record in records:
      log.append(record)
  _, (first, second) = read(path, header)
  assert first.losses.view(np.uint32).ravel().tolist() == bits
  assert second.losses.view(np.uint32).ravel().tolist() == bits
  assert first[:3] == (1, float(np.float32(0.1)), np.inf)
  assert second.epsilon == float(np.float32(1e-9)) and np.isnan(second.scale)


@pytest.mark.parametrize("steps", [range(1, 4), range(41, 44)])
def test_a_torn_last_record_is_dropped(path, steps):
  write(path, steps)
  data = path.read_bytes()
  for length in range(START + 2 * SIZE, len(data)):
    path.write_bytes(data[:length])
    assert steps_of(path) == list(steps[:2])
    assert path.stat().st_size == length  # Reading never writes.
    with contextlib.closing(Journal(path, HEADER)) as log:
      assert (log.first_step, log.last_step) == (steps[0], steps[1])
      assert path.read_bytes() == data[: START + 2 * SIZE]
      log.append(make(steps[2]))
    assert path.read_bytes() == data


@pytest.mark.parametrize("rest", range(3))
@pytest.mark.parametrize("fill", [b"\0", b"\xff"])
def test_an_end_that_never_reached_the_disk_is_dropped(path, rest, fill):
  write(path, [1, 2])
  data = path.read_bytes()
  for kept in range(0, SIZE, 5):  # Of the record that was being written.
    torn = data[: START + SIZE + kept] + fill * (SIZE - kept + rest * SIZE)
    for end in (b"", fill * 3):
      path.write_bytes(torn + end)
      assert steps_of(path) == [1]
      write(path, [2])
      assert path.read_bytes() == data


def test_a_record_with_any_flipped_bit_is_found(path):
  write(path, range(1, 5))
  data = path.read_bytes()
  for number in range(4):
    begin = 8 * (START + number * SIZE)
    for bit in range(begin, begin + 8 * SIZE):
      flip(path, bit)
      damaged = path.read_bytes()
      if number == 3:  # The last one cannot be told from a torn one.
        assert steps_of(path) == [1, 2, 3]
      else:
        step = rf"record {number + 1} .*step {number + 1}, is damaged"
        for action in (read, lambda p: Journal(p, HEADER)):
          with pytest.raises(JournalError, match=step) as info:
            action(path)
        assert str(path) in str(info.value) and "\n" not in str(info.value)
        assert path.read_bytes() == damaged
      path.write_bytes(data)


def test_damage_is_named_by_the_step_also_in_a_journal_begun_late(path):
  write(path, range(101, 106))
  for number in (0, 2):
    flip(path, 8 * (START + number * SIZE) + 70)
  with pytest.raises(JournalError, match="record 1 .*step 101, is damaged"):
    read(path)
  flip(path, 8 * START + 70)
  for after in (None, 100, 101, 102):
    with pytest.raises(JournalError, match="record 3 .*step 103, is damaged"):
      read(path, after=after)
  assert steps_of(path, after=103) == [104, 105]  # What is read is whole.


def test_a_lost_or_repeated_record_is_found(path):
  write(path, range(1, 6))
  data = path.read_bytes()
  parts = [data[START + k * SIZE :][:SIZE] for k in range(5)]
  for order, step in (([0, 1, 3, 4], 3), ([0, 1, 1, 2], 3), ([0, 2], 2)):
    path.write_bytes(data[:START] + b"".join(parts[k] for k in order))
    with pytest.raises(JournalError, match=f"step {step}, is damaged"):
      Journal(path, HEADER)


def test_a_damaged_header_is_found(path):
  write(path, [1])
  data = path.read_bytes()
  for bit in range(8 * START):
    flip(path, bit)
    with pytest.raises(JournalError, match="header .* damaged|not a journal"):
      Journal(path, HEADER)
    with pytest.raises(JournalError, match="header .* damaged|not a journal"):
      read(path)
    path.write_bytes(data)


def test_a_torn_header_is_made_anew(path):
  whole = header_bytes(HEADER)
  damaged = whole[:20] + b"?" + whole[21:]
  torn = [whole[:k] for k in range(START)] + [bytes(START), damaged]
  for data in torn:
    path.write_bytes(data)
    assert read(path, HEADER) == (HEADER, [])
    with pytest.raises(JournalError, match="ends inside its header"):
      read(path)
    write(path, [])
    assert path.read_bytes() == whole
    assert read(path) == (HEADER, [])


@pytest.mark.parametrize("data", [b"something else", b"ZORNJNL2", b"?" * 99])
def test_another_file_is_left_alone(path, data):
  path.write_bytes(data)
  for action in (read, lambda p: Journal(p, HEADER)):
    with pytest.raises(JournalError, match="not a journal of this version"):
      action(path)
  assert path.read_bytes() == data


@pytest.mark.parametrize(
  ("other", "difference"),
  [
    ({"fingerprint": "ab" * 32}, r"in fingerprint \(0708\w* there, abab"),
    ({"num_probes": 3}, r"in num_probes \(1 there, 3 here\)\. "),
    ({"num_queries": 1}, r"in num_queries \(2 there, 1 here\)\. "),
  ],
)
@pytest.mark.parametrize("steps", [[], [1, 2]])
def test_another_runs_journal_is_refused(path, other, difference, steps):
  write(path, steps)
  data = path.read_bytes()
  for action in (read, Journal):
    with pytest.raises(JournalError, match=difference) as info:
      action(path, HEADER._replace(**other))
    assert "another run" in str(info.value) and str(path) in str(info.value)
  assert path.read_bytes() == data


@pytest.mark.parametrize(
  "header",
  [
    HEADER._replace(fingerprint="ab" * 31),
    HEADER._replace(fingerprint="AB" * 32),
    HEADER._replace(fingerprint="xy" * 32),
    HEADER._replace(num_probes=0),
  ],
)
def test_a_wrong_header_makes_no_file(path, header):
  with pytest.raises(JournalError, match="64 lower-case hex"):
    Journal(path, header)
  assert not path.exists()


def test_paths_that_cannot_be_used(tmp_path):
  (tmp_path / "file").touch()
  for place in (tmp_path / "absent/journal", tmp_path / "file/journal"):
    with pytest.raises(JournalError, match="cannot write to .*director"):
      Journal(place, HEADER)
    with pytest.raises(JournalError, match="cannot read .*director"):
      read(place)


def test_killed_while_making_the_file(path, monkeypatch):
  class KilledError(BaseException):
    pass

  def killed(*args):
    raise KilledError

  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", killed)
    with pytest.raises(KilledError):
      Journal(path, HEADER)
  assert not path.exists()
  write(path, [1])
  assert os.listdir(path.parent) == ["journal"]


def test_a_new_file_and_its_name_reach_the_disk(path, monkeypatch):
  synced, replace, fsync = [], os.replace, os.fsync

  def logged(file):
    synced.append(os.readlink(f"/proc/self/fd/{file}"))
    fsync(file)

  def renamed(source, target):
    assert synced == [str(source)]
    replace(source, target)

  monkeypatch.setattr(os, "fsync", logged)
  monkeypatch.setattr(os, "replace", renamed)
  write(path, [])
  assert synced[1] == str(path.parent)


def test_steps_are_consecutive(path):
  with contextlib.closing(Journal(path, HEADER)) as log:
    assert (log.first_step, log.last_step) == (0, 0)
    with pytest.raises(JournalError, match="from step 1 on, got .* of step 0"):
      log.append(make(0))
    for step in (7, 8):  # The first record may be of any step.
      log.append(make(step))
    for step in (1, 7, 8, 10):
      with pytest.raises(
        JournalError, match=rf"goes on with step 9, got step {step}\."
      ):
        log.append(make(step))
    log.append(make(9))
    assert (log.first_step, log.last_step) == (7, 9)
  assert steps_of(path) == [7, 8, 9]


@pytest.mark.parametrize(
  "losses", [np.zeros((2, 1), "f4"), np.zeros(2, "f4"), np.zeros((1, 2))]
)
def test_other_losses_are_refused(path, losses):
  with contextlib.closing(Journal(path, HEADER)) as log:
    with pytest.raises(JournalError, match=r"float32 losses of shape \[1, 2\]"):
      log.append(Record(1, 0.1, 0.1, losses))
    assert log.last_step == 0
  assert read(path) == (HEADER, [])


@pytest.mark.parametrize("first", [1, 31])
def test_rewinding(path, first):
  for left in range(5):
    write(path, range(first, first + 4))
    data = path.read_bytes()
    back = first + left - 1
    with contextlib.closing(Journal(path, HEADER)) as log:
      for step in (first - 2, first + 4):
        with pytest.raises(JournalError, match=f"rewind .* to step {step}:"):
          log.rewind(step)
      log.rewind(back)
      assert log.last_step == (back if left else 0)
      assert path.read_bytes() == data[: START + left * SIZE]
      log.append(make(back + 1))
      assert log.first_step == first
    assert steps_of(path) == list(range(first, back + 2))
    assert (
      path.read_bytes()
      == (data + record_bytes(*make(first + 4)))[: START + (left + 1) * SIZE]
    )
    path.unlink()


def test_rewinding_reaches_the_disk_and_an_empty_journal_has_nothing_to_drop(
  path, monkeypatch
):
  with contextlib.closing(Journal(path, HEADER)) as log:
    log.rewind(100)
    for step in (1, 2, 3):
      log.append(make(step))
    log.sync()
    sizes, fsync = [], os.fsync
    monkeypatch.setattr(
      os, "fsync", lambda f: (sizes.append(os.fstat(f).st_size), fsync(f))
    )
    log.rewind(1)
    assert sizes == [START + SIZE]


def test_reading_after_a_step(path):
  write(path, range(11, 16))
  assert steps_of(path, after=10) == [11, 12, 13, 14, 15]
  assert steps_of(path, after=13) == [14, 15]
  assert steps_of(path, after=15) == steps_of(path, after=99) == []
  with pytest.raises(
    JournalError, match="begins with step 11, got .* from 10 on"
  ):
    read(path, after=9)
  path.unlink()
  write(path, [])
  assert steps_of(path, after=7) == []


def test_short_writes_are_continued(path, monkeypatch):
  os_write = os.write
  monkeypatch.setattr(os, "write", lambda file, x: os_write(file, x[:7]))
  write(path, [1, 2, 3])
  monkeypatch.undo()
  assert path.stat().st_size == START + 3 * SIZE
  assert steps_of(path) == [1, 2, 3]


@pytest.mark.parametrize("written", [0, 1, SIZE // 2, SIZE - 1])
@pytest.mark.parametrize("truncates", [True, False])
def test_a_full_disk_keeps_whole_records(path, monkeypatch, written, truncates):
  os_write = os.write
  left = [written]

  def full(file, data):
    if not left:
      raise OSError(errno.ENOSPC, "No space left on device")
    return os_write(file, data[: left.pop()])

  def broken(*args):
    raise OSError(errno.EIO, "Input/output error")

  with contextlib.closing(Journal(path, HEADER)) as log:
    log.append(make(1))
    with monkeypatch.context() as patch:
      patch.setattr(os, "write", full)
      if not truncates:
        patch.setattr(os, "ftruncate", broken)
      with pytest.raises(JournalError, match="step 2 .*No space left") as info:
        log.append(make(2))
    assert "\n" not in str(info.value) and str(path) in str(info.value)
    size = START + SIZE + (0 if truncates else written)
    assert path.stat().st_size == size
    assert steps_of(path) == [1] and log.last_step == 1
    for step in (2, 3):
      log.append(make(step))
  assert path.stat().st_size == START + 3 * SIZE
  assert steps_of(path) == [1, 2, 3]


def test_a_record_waits_until_the_one_before_is_on_the_disk(path, monkeypatch):
  events, os_write, fsync = [], os.write, os.fsync

  def synced(file):
    begun = os.fstat(file).st_size
    assert threading.current_thread() is not threading.main_thread()
    time.sleep(0.01)
    fsync(file)
    events.append(("disk", (begun - START) // SIZE))

  def written(file, data):
    events.append(("file", log.last_step + 1))
    return os_write(file, data)

  with contextlib.closing(Journal(path, HEADER)) as log:
    log.sync()
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "write", written)
    for step in range(1, 6):
      log.append(make(step))
      assert events[-1] == ("file", step)  # It does not wait for itself.
    log.sync()
    assert events[-1] == ("disk", 5)
    log.append(make(6))
  expected = [(place, k) for k in range(1, 7) for place in ("file", "disk")]
  assert events == expected


def test_a_disk_that_refuses_a_record_stops_the_journal(path, monkeypatch):
  """The kernel says so once only; records after a lost one are worthless."""

  def broken(file):
    raise OSError(errno.EIO, "Input/output error")

  log = Journal(path, HEADER)
  log.append(make(1))
  log.sync()
  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", broken)
    log.append(make(2))
    with pytest.raises(JournalError, match="to the disk .*Input/output"):
      log.sync()
  for action in (lambda: log.append(make(3)), lambda: log.rewind(1), log.close):
    with pytest.raises(JournalError, match="to the disk .*Input/output"):
      action()
  log.close()
  assert steps_of(path) == [1, 2]


def test_a_closed_journal_writes_to_no_other_file(path, tmp_path):
  log = Journal(path, HEADER)
  log.append(make(1))
  log.close()
  log.close()
  other = tmp_path / "other"
  with other.open("wb"):  # It gets the number that has become free.
    with pytest.raises(JournalError, match="Bad file descriptor"):
      log.append(make(2))
  assert other.read_bytes() == b"" and steps_of(path) == [1]


def test_reading_beside_a_writer(path):
  header = Header(FINGERPRINT, 300, 2)  # Records often cross a page.
  ends, last = threading.Event(), 400

  def train():
    write(path, range(1, last + 1), header)
    ends.set()

  write(path, [], header)
  writer = threading.Thread(target=train)
  writer.start()
  seen = [0]
  while not ends.is_set():
    steps = steps_of(path, header=header, after=seen[-1])
    assert steps == list(range(seen[-1] + 1, seen[-1] + 1 + len(steps)))
    seen.append(seen[-1] + len(steps))
  writer.join()
  assert steps_of(path, header=header, after=0) == list(range(1, last + 1))
  assert len(set(seen)) > 3


# The module alone: importing the package takes longer than the test.
CHILD = """
import importlib.util, os, signal, sys
import numpy as np
spec = importlib.util.spec_from_file_location("journal", sys.argv[1])
journal = importlib.util.module_from_spec(spec)
spec.loader.exec_module(journal)
header = journal.Header(sys.argv[3], 2048, 2)
log = journal.Journal(sys.argv[2], header)
os_write = os.write

def torn(file, data):
  os_write(file, data[:len(data) * 2 // 3])
  os.kill(os.getpid(), signal.SIGKILL)

for step in range(log.last_step + 1, 10**6):
  if step == int(sys.argv[4]):
    os.write = torn
  losses = np.full((2048, 2), step, np.float32)
  log.append(journal.Record(step, 0.1, 0.2, losses))
  print(step, flush=True)
"""


def killed_child(path, seconds, torn_step):
  """Appends in a subprocess until SIGKILL; returns what it reported."""
  module = str(REPOSITORY / "zorn_jax/journal.py")
  argument = [module, str(path), FINGERPRINT, str(torn_step)]
  with subprocess.Popen(
    [sys.executable, "-c", CHILD, *argument], stdout=subprocess.PIPE, text=True
  ) as process:
    reported = process.stdout.readline()
    if not torn_step:
      time.sleep(seconds)
      process.send_signal(signal.SIGKILL)
    reported += process.stdout.read()
  assert process.returncode == -signal.SIGKILL
  return int(reported.split()[-1])


def test_killed_while_appending(path):
  header = Header(FINGERPRINT, 2048, 2)
  last = 0
  for seconds, torn_step in ((0.05, 0), (0.013, 0), (0.029, 0), (0, 10**6)):
    if torn_step:
      torn_step = last + 5
    reported = killed_child(path, seconds, torn_step)
    assert reported > last
    _, records = read(path, header)
    last = len(records)
    assert [record.step for record in records] == list(range(1, last + 1))
    assert all((record.losses == record.step).all() for record in records)
    assert reported <= last <= reported + 1
    if torn_step:
      torn = (path.stat().st_size - START) % (16 + 4 * 4096)
      assert torn == (16 + 4 * 4096) * 2 // 3 and last == torn_step - 1
    with contextlib.closing(Journal(path, header)) as log:
      assert log.last_step == last
    assert path.stat().st_size == START + last * (16 + 4 * 4096)


def test_many_records_are_read_quickly(path):
  kind = journal._record_type(HEADER)
  records = np.zeros(100_000, kind)
  records["step"] = np.arange(1, 100_001)
  data = bytearray(records.tobytes())
  for k in range(0, len(data), SIZE):
    data[k : k + 4] = struct.pack("<I", zlib.crc32(data[k + 4 : k + SIZE]))
  path.write_bytes(header_bytes(HEADER) + data)
  begin = time.process_time()
  assert len(read(path)[1]) == 100_000
  assert len(read(path, after=99_998)[1]) == 2
  assert time.process_time() - begin < 2
