"""The byte-level BPE compared with tiktoken's gpt2."""

import json
import random
import time

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import encoder as module  # noqa: E402
from runtime.errors import InputError  # noqa: E402

ODD_TEXTS = [
    "", " ", "  ", "\n", "\n\n", " \n", "a ", " a", "a  b", "a   b\n\n  c \t", "\t\tx", "\u3000x",
    "\u00a0", "a\u00a0b", "\u2028", "\x85", "\x1c\x1d", "\x00", "\x7f", "\ufeff", "\ufffd",
    "I'll don't 'S 'LL we've", "''s", "can\u2019t", "1234567 \u0661\u0662 \u00bd \u2167",
    "<|endoftext|>", " <|endoftext|> x", "name : Caf\u00e9 | price : \u00a320-25||Text .",
    "e\u0301", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0010ffff", "\u0e01\u0e33",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "hahahahahaha", "!!!!!!!!!!!!???", "\u4f60\u597d",
]
LONG_WORDS = ["a" * 100_000, "abracadabra" * 9_000, " " * 100_000, "-=" * 50_000]


@pytest.fixture(scope="session")
def encoder(vocab):
    return module.get_encoder(vocab)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts(encoder, tiktoken_gpt2, text):
    ids = encoder.encode(text)
    assert ids == tiktoken_gpt2.encode_ordinary(text)
    assert encoder.decode(ids) == text


# words, blanks and arbitrary characters, so that the texts use all branches of the pattern
TEXT = st.lists(st.one_of(
    st.text(max_size=12),
    st.text(st.characters(categories=["L", "N", "Z", "M"]), max_size=12),
    st.text(" \t\n\r\x0b\x0c\x1c\x85\u00a0\u2003\u2028\u3000", max_size=4),
    st.sampled_from(["name", " The", "restaurant", "'s", "'ll", "'", "20", " \u00a3", "||", "."]),
), max_size=8).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_equals_tiktoken_and_inverts(encoder, tiktoken_gpt2, text):
    ids = encoder.encode(text)
    assert ids == tiktoken_gpt2.encode_ordinary(text)
    assert encoder.decode(ids) == text


def test_every_kind_of_character(encoder, tiktoken_gpt2):
    """regex is pinned because its Unicode version must classify characters as tiktoken does."""
    points = [*range(0, 0xD800, 3), *range(0xE000, 0x20000, 3), *range(0x20000, 0x110000, 32)]
    for start in range(0, len(points), 2000):
        text = "".join(f"a{chr(point)}1{chr(point)}!" for point in points[start:start + 2000])
        assert encoder.encode(text) == tiktoken_gpt2.encode_ordinary(text), hex(points[start])


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 50256), max_size=20))
def test_decode_equals_tiktoken(encoder, tiktoken_gpt2, ids):
    assert encoder.decode(ids) == tiktoken_gpt2.decode(ids, errors="replace")


def test_every_token_is_decoded(encoder, tiktoken_gpt2):
    for token_id in range(50257):
        expected = tiktoken_gpt2.decode_single_token_bytes(token_id).decode("utf-8", "replace")
        assert encoder.decode([token_id]) == expected


@pytest.mark.parametrize("ids", [[50257], [-1], [318, 10**9]])
def test_decode_refuses_other_ids(encoder, ids):
    with pytest.raises(ValueError, match=f"token id {ids[-1]} is outside the vocabulary"):
        encoder.decode(ids)


@pytest.mark.parametrize("word", LONG_WORDS, ids=lambda word: repr(word[:4]))
def test_a_long_word_takes_seconds_at_most(encoder, word):
    started = time.process_time()
    ids = encoder.encode(word)
    assert time.process_time() - started < 10  # a quadratic loop takes many minutes
    assert encoder.decode(ids) == word


def test_long_words_are_merged_like_short_ones(encoder, tiktoken_gpt2):
    for word in LONG_WORDS:
        assert encoder.encode(word[:3000]) == tiktoken_gpt2.encode_ordinary(word[:3000])


def test_the_whole_corpus(encoder, tiktoken_gpt2, shared):
    text = (shared / "data/e2e/train_7570.txt").read_text(encoding="utf-8")
    started = time.process_time()
    ids = encoder.encode(text)
    assert time.process_time() - started < 10  # the limit for all 42,061 lines is 60 s
    assert ids == tiktoken_gpt2.encode_ordinary(text)


def test_the_cache_is_bounded(encoder):
    encoder.encode("x" * (module.CACHED_LENGTH + 1))
    before = encoder._merge_cached.cache_info()
    encoder.encode("x" * (module.CACHED_LENGTH + 1))
    assert encoder._merge_cached.cache_info() == before
    assert before.maxsize == module.CACHED_WORDS


def copy_vocabulary(vocab, folder):
    for name in ("encoder.json", "vocab.bpe"):
        (folder / name).write_bytes((vocab / name).read_bytes())
    return folder / "encoder.json", folder / "vocab.bpe"


def change_ids(tokens):
    vocabulary = json.loads(tokens.read_text())
    vocabulary["the"] = vocabulary["!"]
    tokens.write_text(json.dumps(vocabulary))


def change_token(tokens):
    vocabulary = json.loads(tokens.read_text())
    vocabulary["no merge makes this"] = vocabulary.pop("the")
    tokens.write_text(json.dumps(vocabulary))


def permute_ids(tokens):  # they are the rows of the embedding of the published weights
    vocabulary = json.loads(tokens.read_text())
    ids = random.Random(0).sample(range(len(vocabulary)), len(vocabulary))
    tokens.write_text(json.dumps({token: ids[i] for token, i in vocabulary.items()}))


def cut_table(table):  # at the end of a line, so that every remaining line is complete
    table.write_text("".join(table.read_text(encoding="utf-8").splitlines(keepends=True)[:-100]),
                     encoding="utf-8")


@pytest.mark.parametrize("damage, message", [
    (lambda tokens, table: tokens.unlink(), "encoder.json: no such file"),
    (lambda tokens, table: table.unlink(), "vocab.bpe: no such file"),
    (lambda tokens, table: tokens.write_text(tokens.read_text()[:99]), "encoder.json:1: no JSON"),
    (lambda tokens, table: tokens.write_text("[1, 2]"), "encoder.json: not a JSON object"),
    (lambda tokens, table: tokens.write_text('{"a": "b"}'), "encoder.json: not a JSON object"),
    (lambda tokens, table: tokens.write_bytes(b"\xff\xfe"), "encoder.json:1: not UTF-8"),
    (lambda tokens, table: table.write_text("#version: 0.2\nh e\nhe\n"), "vocab.bpe:3: not two"),
    (lambda tokens, table: table.write_bytes(b""), "do not fit together"),
    (lambda tokens, table: cut_table(table), "do not fit together"),
    (lambda tokens, table: change_ids(tokens), "do not fit together"),
    (lambda tokens, table: change_token(tokens), "do not fit together"),
    (lambda tokens, table: permute_ids(tokens), "do not fit together: the id of '!' should be 0"),
])
def test_damaged_vocabulary(vocab, tmp_path, damage, message):
    damage(*copy_vocabulary(vocab, tmp_path))
    with pytest.raises(InputError) as error:
        module.get_encoder(tmp_path)
    assert message in str(error.value)
    assert f"python vocab/download_vocab.py {tmp_path}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_merge_of_what_is_no_token():
    symbols = {symbol: i for i, symbol in enumerate(module.byte_symbols())}
    with pytest.raises(ValueError, match="'ab', which is no token"):
        module.Encoder({**symbols, "abc": 256, module.END_OF_TEXT: 257}, [("ab", "c")])


SYMBOLS = {symbol: i for i, symbol in enumerate(sorted(module.byte_symbols()))}


@pytest.mark.parametrize("tokens, merges, line", [
    ([], [" "], 2), ([], ["a "], 2), ([], [" a"], 2), ([""], [" "], 2), (["ab"], ["a b", ""], 3),
    (["", "\u4e2d"], [" ", " \u4e2d"], 2), (["\u4e2da"], ["\u4e2d a"], 2),
    (["ab"], ["a b", "a b"], 3), (["ab", "bc", "abc"], ["a b", "b c", "a bc", "ab c"], 5),
    (["abc", "ab"], ["ab c", "a b"], 2), (["<|endoftext|>a"], ["<|endoftext|> a"], 2),
    (["ab"], ["a  b"], 2), (["ab"], ["a\tb"], 2), (["ab"], ["a\x1b[2J b"], 2),
])
def test_a_merge_must_make_a_new_token_of_two(tmp_path, tokens, merges, line):
    names = [*SYMBOLS, *tokens, module.END_OF_TEXT]
    (tmp_path / "encoder.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (tmp_path / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    with pytest.raises(InputError) as error:
        module.get_encoder(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/vocab.bpe:{line}: not two tokens with a blank ")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("change", [
    {"ab": 257, "cd": 256}, {"ab": 0, "!": 256}, {"a": -1}, {module.END_OF_TEXT: 259}, {"x\n": 259},
    {"": 259}, {"cd": 258, module.END_OF_TEXT: 257}, {"\ud800": 300}, {"y" * 10**6: 259},
])
def test_ids_are_those_of_gpt2s_rule(tmp_path, change):
    """The bytes, what the merges make in their order, the end of text: stage 4 ends at this id."""
    vocabulary = {**SYMBOLS, "ab": 256, "cd": 257, module.END_OF_TEXT: 258}
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b\nc d\n")
    (tmp_path / "encoder.json").write_text(json.dumps(vocabulary))
    encoder = module.get_encoder(tmp_path)
    assert (encoder.encode("abcd"), encoder.end_of_text) == ([256, 257], 258)
    (tmp_path / "encoder.json").write_text(json.dumps({**vocabulary, **change}))
    with pytest.raises(InputError, match="do not fit together: the id of .* should be ") as error:
        module.get_encoder(tmp_path)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_no_merges_make_the_end_of_text():
    end = module.END_OF_TEXT
    merges = [(end[:i], end[i]) for i in range(1, len(end))]
    vocabulary = {**SYMBOLS, **{left + right: 256 + i for i, (left, right) in enumerate(merges)}}
    with pytest.raises(ValueError, match="two merges make the same token"):
        module.Encoder(vocabulary, merges)
