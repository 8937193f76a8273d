"""The journal of a run: one small checksummed record for every step.

With it a step can be repeated without data and without forward passes. A file
is a header, which says whose it is, and records of consecutive steps:

    header  magic [8]  fingerprint [32]  n u32  q u32  crc32 u32
    record  crc32 u32  step u32  epsilon f32  scale f32  losses f32 [n, q]

All numbers are little-endian, and a checksum covers the rest of its part.
"""

import contextlib
import os
import pathlib
import struct
import zlib
from collections.abc import Iterator
from concurrent import futures
from typing import NamedTuple

import numpy as np

_MAGIC = b"ZORNJNL1"  # The digit is the version of the format.
_HEADER = struct.Struct("<8s32sII")
_CHECKSUM = struct.Struct("<I")
_SCALARS = struct.Struct("<Iff")
_START = _HEADER.size + _CHECKSUM.size  # Where the records begin.

_REMEDY = (
  "Bring the file back from a copy, or move it away and resume from the newest "
  "checkpoint: then only steps after that can be replayed."
)


class JournalError(ValueError):
  """A journal cannot be written or read, or belongs to another run."""


class Header(NamedTuple):
  """Whose journal it is.

  Attributes:
    fingerprint: What the run is, as 64 lower-case hexadecimal digits.
    num_probes: Directions per step, n >= 1.
    num_queries: Losses per direction, q >= 1.
  """

  fingerprint: str
  num_probes: int
  num_queries: int


class Record(NamedTuple):
  """What a step measured, and what it was scaled with.

  Attributes:
    step: The number of steps done with this one; 1 for the first.
    epsilon: Smoothing radius; rounded to float32 on disk.
    scale: What the learning rate was multiplied with; rounded to float32.
    losses: Float32 of shape [n, q]; every bit is kept, also those of NaNs.
  """

  step: int
  epsilon: float
  scale: float
  losses: np.ndarray


class Journal:
  """The journal of a run that trains; one process at a time may have it.

  Args:
    path: The file; made where it does not exist, in a directory that does.
    header: Whose it is.
  Raises:
    JournalError: If the file cannot be written, belongs to another run, or is
      damaged before its end.
  Guarantees: a killed process loses no record that `append` was done with, and
    a power failure at most the last one. A record that is cut short, or an end
    of the file that never reached the disk, is dropped when it opens next.
  """

  def __init__(self, path: str | os.PathLike[str], header: Header):
    self._path = pathlib.Path(path)
    self._header = header
    self._size = _record_type(header).itemsize
    packed = _pack_header(header)
    with _explained(self._path, "write to"):
      if not self._path.exists() or _open_header(self._path, header) is None:
        _create(self._path, packed)
      steps = _load(self._path, header)["step"]
      self._first = int(steps[0]) if len(steps) else 0
      self._count = len(steps)
      os.truncate(self._path, self._end)
      self._file = os.open(self._path, os.O_RDWR)
    self._thread = futures.ThreadPoolExecutor(1, "journal")
    # Records of a killed process may not have reached the disk yet.
    self._on_disk = self._thread.submit(os.fsync, self._file)

  @property
  def first_step(self) -> int:
    """The step of the first record; 0 without records."""
    return self._first if self._count else 0

  @property
  def last_step(self) -> int:
    """The step of the last record; 0 without records."""
    return self._first + self._count - 1 if self._count else 0

  @property
  def _end(self):
    """Where the next record begins."""
    return _START + self._count * self._size

  def append(self, record: Record) -> None:
    """Writes a record, once the one before it is on the disk.

    Args:
      record: That of the step after the last; of any step, 1 or more, in an
        empty journal.
    Raises:
      JournalError: If it is another step's or has losses of another shape or
        type; if it cannot be written, when the records before it are kept.
    """
    if self._count and record.step != self.last_step + 1:
      raise JournalError(
        f"the journal {str(self._path)!r} goes on with step "
        f"{self.last_step + 1}, got step {record.step}. Rewind it to the step "
        "before, or replay it first."
      )
    data = _pack(record, self._header)
    self.sync()
    try:
      os.lseek(self._file, self._end, os.SEEK_SET)
      rest = memoryview(data)
      while rest:
        rest = rest[os.write(self._file, rest) :]
    except OSError as error:
      with contextlib.suppress(OSError):  # Else the next one overwrites it.
        os.ftruncate(self._file, self._end)
      raise JournalError(
        f"cannot write step {record.step} to the journal {str(self._path)!r}: "
        f"{error.strerror}. Make space and resume; the steps before are kept."
      ) from error
    if not self._count:
      self._first = int(record.step)
    self._count += 1
    self._on_disk = self._thread.submit(os.fsync, self._file)

  def sync(self) -> None:
    """Waits until all records are on the disk.

    Raises:
      JournalError: If the disk refuses them; then nothing more is written.
    """
    with _explained(self._path, "bring to the disk"):
      self._on_disk.result()

  def rewind(self, step: int) -> None:
    """Drops the records after `step`, on the disk too.

    Args:
      step: From the one before the first record's to the last one's; an empty
        journal has nothing to drop.
    Raises:
      JournalError: If the journal does not hold the step, or cannot be cut.
    """
    if not self._count:
      return
    count = step - self._first + 1
    if not 0 <= count <= self._count:
      raise JournalError(
        f"cannot rewind the journal {str(self._path)!r} to step {step}: it "
        f"holds the steps {self.first_step} to {self.last_step}. Rewind to one "
        f"of them, or to step {self.first_step - 1}."
      )
    self.sync()
    with _explained(self._path, "cut"):
      os.ftruncate(self._file, _START + count * self._size)
      self._count = count
      os.fsync(self._file)

  def close(self) -> None:
    """Waits until all records are on the disk and closes the file.

    Raises:
      JournalError: As `sync`; the file is closed nevertheless.
    """
    if self._file == -1:
      return
    try:
      self.sync()
    finally:
      self._thread.shutdown()
      os.close(self._file)
      self._file = -1  # A later append must not write to another file.


def read(
  path: str | os.PathLike[str],
  header: Header | None = None,
  after: int | None = None,
) -> tuple[Header, list[Record]]:
  """Reads the records, never writing, also while the run is training.

  Args:
    path: The file.
    header: Whose journal it has to be; None for anybody's.
    after: Records up to this step are skipped, unread; None for all records.
  Returns:
    Whose it is, and the records of consecutive steps, the first of them
    `after + 1`; none if that is not written yet. The file's size in memory.
  Raises:
    JournalError: If the file cannot be read, belongs to another run, is
      damaged among the records to be read, or begins after `after + 1`.
  """
  path = pathlib.Path(path)
  with _explained(path, "read"):
    found = _open_header(path, header) or header
    if found is None:
      raise JournalError(
        f"the journal {str(path)!r} ends inside its header. Train at least "
        "one step."
      )
    records = _load(path, found, after)
  fields = (records[name] for name in ("step", "epsilon", "scale"))
  scalars = (column.tolist() for column in fields)
  rows = zip(*scalars, records["losses"], strict=True)
  return found, [Record(*row) for row in rows]


def _pack_header(header):
  """The header as bytes."""
  fingerprint, *shape = header
  try:
    digits = bytes.fromhex(fingerprint)
  except ValueError:
    digits = b""
  if len(digits) != 32 or digits.hex() != fingerprint or min(shape) < 1:
    raise JournalError(
      "a journal needs a fingerprint of 64 lower-case hexadecimal digits and "
      f"at least one probe and query, got {header}. Use the digest of a config."
    )
  data = _HEADER.pack(_MAGIC, digits, *shape)
  return data + _CHECKSUM.pack(zlib.crc32(data))


def _create(path, packed):
  """Makes a journal without records, complete or not at all."""
  scratch = path.with_name(path.name + ".tmp")
  with scratch.open("wb") as file:
    file.write(packed)
    file.flush()
    os.fsync(file.fileno())
  os.replace(scratch, path)
  directory = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(directory)
  finally:
    os.close(directory)


def _open_header(path, wanted):
  """The verified header; None for a torn one, which no record follows."""
  with path.open("rb") as file:
    data = file.read(_START + 1)
  body, rest = data[: _HEADER.size], data[_HEADER.size :]
  magic = data[: len(_MAGIC)]
  whole = rest[: _CHECKSUM.size] == _CHECKSUM.pack(zlib.crc32(body))
  torn = not any(data) or _MAGIC.startswith(magic) and not whole
  if torn and len(data) <= _START:
    return None
  if magic != _MAGIC:
    raise JournalError(
      f"{str(path)!r} is not a journal of this version: it begins with "
      f"{magic!r} instead of {_MAGIC!r}. Move it away, or use the version of "
      "zorn_jax that wrote it."
    )
  if not whole:
    raise JournalError(
      f"the header of the journal {str(path)!r} is damaged. {_REMEDY}"
    )
  _, fingerprint, *shape = _HEADER.unpack(body)
  found = Header(fingerprint.hex(), *shape)
  if wanted is not None and found != wanted:
    differences = ", ".join(
      f"{name} ({str(a)[:12]} there, {str(b)[:12]} here)"
      for name, a, b in zip(Header._fields, found, wanted, strict=True)
      if a != b
    )
    raise JournalError(
      f"the journal {str(path)!r} belongs to another run, which differs in "
      f"{differences}. Use another workdir, or the same config to resume."
    )
  return found


def _record_type(header):
  """The records as numpy sees them."""
  shape = (header.num_probes, header.num_queries)
  scalars = [("crc", "<u4"), ("step", "<u4"), ("epsilon", "<f4")]
  return np.dtype([*scalars, ("scale", "<f4"), ("losses", "<f4", shape)])


def _pack(record, header):
  """The record as bytes."""
  losses = np.asarray(record.losses)
  shape = (header.num_probes, header.num_queries)
  if losses.shape != shape or losses.dtype != np.float32 or record.step < 1:
    raise JournalError(
      f"the journal takes float32 losses of shape {list(shape)} from step 1 "
      f"on, got {losses.dtype}{list(losses.shape)} of step {record.step}. Use "
      "the number of probes and queries that its header has."
    )
  body = _SCALARS.pack(record.step, record.epsilon, record.scale)
  body += losses.astype("<f4").tobytes()
  return _CHECKSUM.pack(zlib.crc32(body)) + body


def _load(path, header, after=None):
  """The whole records after a step as one array, without a torn end."""
  kind = _record_type(header)
  with path.open("rb") as file:
    file.seek(_START)
    records, intact = _parse(file.read(kind.itemsize), kind)
    skipped = 0
    if after is not None and intact.any():
      first = int(records["step"][0])
      skipped = after - first + 1
      if skipped < 0:
        raise JournalError(
          f"the journal {str(path)!r} begins with step {first}, got steps to "
          f"be read from {after + 1} on. Begin with a checkpoint of step "
          f"{first - 1} or a later one."
        )
    file.seek(_START + skipped * kind.itemsize)
    records, intact = _parse(file.read(), kind)
  if not intact.any():
    return records[:0]
  known = int(np.argmax(intact))
  start = after + 1 if skipped else int(records["step"][known]) - known
  steps = start + np.arange(len(records))
  expected = intact & (records["step"] == steps)
  count = len(records) if expected.all() else int(np.argmin(expected))
  # A torn write, or lost power, spoils all that comes after.
  if intact[count:].any():
    raise JournalError(
      f"record {skipped + count + 1} of the journal {str(path)!r}, that of "
      f"step {steps[count]}, is damaged. {_REMEDY}"
    )
  return records[:count]


def _parse(data, kind):
  """The complete records in the data, and which have their checksum."""
  size = kind.itemsize
  records = np.frombuffer(data, kind, len(data) // size)
  view = memoryview(data)
  checksums = [
    zlib.crc32(view[start + _CHECKSUM.size : start + size])
    for start in range(0, len(records) * size, size)
  ]
  return records, records["crc"] == np.array(checksums, np.uint32)


@contextlib.contextmanager
def _explained(path, action) -> Iterator[None]:
  """Turns what the system refuses into a sentence."""
  try:
    yield
  except OSError as error:
    raise JournalError(
      f"cannot {action} the journal {str(path)!r}: {error.strerror}. Look at "
      "the path, its permissions and the free space."
    ) from error
