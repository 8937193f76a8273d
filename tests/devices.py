"""What moves between devices, counted in a compiled program."""

import re

COLLECTIVE = re.compile(
  r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|"
  r"collective-broadcast|reduce-scatter|ragged-all-to-all)(-start)?\("
)
ARRAY = re.compile(r"\b([a-z]+)(\d+)[a-z0-9]*\[([\d,]*)\]")


def collective_bytes(hlo: str) -> int:
  """Bytes that all collectives of a program give out, each counted once.

  Those within a loop would move more than that, and are an error.
  """
  total, looping = 0, set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", hlo))
  computation = ""
  for line in hlo.splitlines():
    header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if header:
      computation = header[1]
    found = COLLECTIVE.search(line)
    if not found:
      continue
    assert computation not in looping, line
    arrays = ARRAY.findall(found[1])
    # What an asynchronous one begins with is a tuple of operands and results.
    arrays = arrays[len(arrays) // 2 :] if found[3] else arrays
    for _, bits, shape in arrays:
      size = int(bits) // 8
      for axis in filter(None, shape.split(",")):
        size *= int(axis)
      total += size
  return total
