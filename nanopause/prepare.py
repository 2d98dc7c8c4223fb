"""Documents to shards: data_dir/corpus/tokenizer/ with meta.json, train_000000.bin, ..., val_000000.bin, ...

A shard is a raw little-endian array of token ids. Each document is followed by eot_id and can span two shards.
The folder is built as `<tokenizer>.partial` and renamed at the end, so a folder with the final name is complete. Until
then shards only grow, and meta.json, replaced atomically, counts the tokens that are fsynced. An interrupted
preparation resumes from those counts and produces the same bytes as an uninterrupted one.
"""

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from nanopause.errors import UserError
from nanopause.files import locked, replace_file, sha256, sync
from nanopause.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "val")
COUNTS = ("tokens", "documents", "bytes")
BATCH_CHARACTERS = 1 << 18
COMMIT_SECONDS = 10.0  # between fsyncs
SHORT = 100 * 256  # tokens, 100 blocks of the default size; a shorter split is reported

Read = Callable[[str], Iterable[str]]
Position = tuple[int, int]  # of the next document: index of its source, index within the source


def prepare(
    corpus: str,
    sources: list[str],
    read: Read,
    data_dir: str | Path,
    tokenizer: str,
    *,
    val_fraction: float,
    limit: int | None = None,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
) -> Path:
    """Tokenize a corpus into the folder data_dir/corpus/tokenizer, and return that folder.

    read(source): yields the documents of one source, always in the same order; blank documents are skipped.
    val_fraction: fraction of documents for validation; depends on each document's text only (see `split_of`). If a
    split gets no document in this way, the last val_fraction of all tokens are the validation split.
    limit: number of documents to read, blank ones included, the same number from each source; None: all.
    shard_tokens: maximum tokens per file. workers: tokenizer processes, which do not change the result; None: one per
    core; 1: none, tokenize in this process.

    Raises UserError if the folder exists, an unfinished folder has other settings, the disk is full (run again to
    resume), or all documents are blank.
    """
    if Path(corpus).name != corpus:
        raise UserError(f"corpus name {corpus!r} must not contain a path: use a plain name")
    ids = load_tokenizer(tokenizer)
    folder = Path(data_dir) / corpus / ids.name
    if folder.exists():
        raise UserError(f"{folder} is already prepared: delete it to prepare it again")
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction} must lie between 0 and 1")
    for key, value in {"limit": limit, "workers": workers}.items():
        if value is not None and value < 1:
            raise UserError(f"{key}={value} must be at least 1")
    settings = {
        "corpus": corpus,
        "tokenizer": ids.name,
        "tokenizer_sha256": ids.sha256,
        "vocab_size": ids.vocab_size,
        "eot_id": ids.eot_id,
        "dtype": "uint16" if ids.vocab_size <= 1 << 16 else "uint32",
        "sources": sources,
        "val_fraction": val_fraction,
        "limit": limit,
        "shard_tokens": shard_tokens,
    }
    unfinished = folder.with_name(f"{folder.name}.partial")
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        with locked(unfinished):  # a concurrent run for the same folder waits here and then finds it complete
            if not folder.exists():
                shards = Shards(unfinished, settings)
                if "next" in shards.meta:
                    _write_documents(shards, ids, read, workers or n_cores())
                    shards.finish(ids.token_bytes)
                os.rename(unfinished, folder)
                sync(folder.parent)
                print(f"{folder}: " + ", ".join(f"{shards.counts[s]['tokens']:,} tokens of {s}" for s in SPLITS))
                for split in SPLITS:
                    if shards.counts[split]["tokens"] < SHORT:
                        print(f"warning: the {split} split has only {shards.counts[split]['tokens']:,} tokens, fewer "
                              f"than {SHORT:,}: add text or change val_fraction", file=sys.stderr)  # fmt: skip
            else:
                with suppress(OSError):
                    unfinished.rmdir()
    except OSError as error:
        why = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        raise UserError(f"preparing {folder} stopped: {why}; run it again to resume") from error
    except BrokenProcessPool as error:
        raise UserError("a worker died, possibly out of memory: run it again with fewer workers") from error
    return folder


def n_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_of(text: str, val_fraction: float) -> str:
    """'train' or 'val', by a hash of the text: duplicates are in the same split."""
    return "val" if hash_of(text) < val_fraction * 2**64 else "train"


def hash_of(text: str) -> int:
    """64-bit hash of the text, ignoring case and white space."""
    normal = " ".join(text.lower().split()).encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(normal, digest_size=8).digest(), "big")


class Shards:
    """An unfinished folder. meta.json holds the settings, the counts of each split and `next`, the Position."""

    def __init__(self, folder: Path, settings: dict):
        """Start a folder, or truncate an unfinished one to the counts in its meta.json.

        Raises UserError if the settings differ or a shard is too short."""
        self.folder = folder
        self.unsynced = set()
        self.meta = {**settings, "splits": {split: dict.fromkeys(COUNTS, 0) for split in SPLITS}, "next": (0, 0)}
        if (folder / "meta.json").exists():
            self.meta = json.loads((folder / "meta.json").read_text())
        for key, value in settings.items():
            if self.meta.get(key) != value:
                raise UserError(f"{folder} was begun with another {key}: use the same {key}, or delete that folder")
        self.counts, self.dtype = self.meta["splits"], np.dtype(self.meta["dtype"]).newbyteorder("<")
        self._truncate()

    def _truncate(self) -> None:
        """Delete what the shards hold beyond the counts. Raises UserError if a shard is too short."""
        sizes = {path: tokens * self.dtype.itemsize for split in SPLITS for path, tokens in self.files(split)}
        for path in {*self.folder.glob("*.bin"), *sizes}:
            if path not in sizes:
                path.unlink()
            elif path.exists() and path.stat().st_size >= sizes[path]:
                os.truncate(path, sizes[path])
            else:
                raise UserError(f"{path} is shorter than when it was written: delete {self.folder}")

    def total(self, count: str) -> int:
        return sum(self.counts[split][count] for split in SPLITS)

    def files(self, split: str) -> list[tuple[Path, int]]:
        """The shards of a split and the number of tokens in each; all but the last are full."""
        total = self.counts[split]["tokens"]
        size = self.meta["shard_tokens"]
        starts = range(0, total, size)
        return [(self.folder / f"{split}_{start // size:06d}.bin", min(size, total - start)) for start in starts]

    def append(self, split: str, tokens: np.ndarray, documents: int, size: int) -> None:
        """Add documents to a split. size: their UTF-8 bytes in total."""
        counts = self.counts[split]
        rest = tokens.astype(self.dtype)
        counts["documents"] += documents
        counts["bytes"] += size
        while len(rest):
            shard, used = divmod(counts["tokens"], self.meta["shard_tokens"])
            head, rest = np.split(rest, [self.meta["shard_tokens"] - used])
            path = self.folder / f"{split}_{shard:06d}.bin"
            with open(path, "ab") as file:
                file.write(head.tobytes())
            self.unsynced.add(path)
            counts["tokens"] += len(head)

    def commit(self) -> None:
        """fsync the appended tokens, then record the counts."""
        for path in self.unsynced:
            sync(path)
        self.unsynced.clear()
        replace_file(self.folder / "meta.json", json.dumps(self.meta, indent=1) + "\n")

    def _move(self, split: str, start: int, other: str, token_bytes: np.ndarray) -> None:
        """Move a split's tokens from `start` on to the other split, which is empty."""
        for path, n_tokens in self.files(split):
            kept = min(start, n_tokens)
            start -= kept
            tokens = np.fromfile(path, self.dtype, offset=kept * self.dtype.itemsize)
            moved = {
                "tokens": len(tokens),
                "documents": int((tokens == self.meta["eot_id"]).sum()),
                "bytes": int(token_bytes[tokens].sum()),
            }
            self.append(other, tokens, moved["documents"], moved["bytes"])
            for count in COUNTS:
                self.counts[split][count] -= moved[count]
        self.commit()
        self._truncate()  # after the commit: if it is interrupted, the next run truncates

    def finish(self, token_bytes: np.ndarray) -> None:
        """Divide the tokens if a split is empty, and replace `next` by the hashes, which marks the folder as complete.
        token_bytes: the tokenizer's. Raises UserError if there is no document."""
        train, val = (self.counts[split] for split in SPLITS)
        n_tokens, n_documents = self.total("tokens"), self.total("documents")
        if not n_tokens:
            shutil.rmtree(self.folder)
            raise UserError(f"no document in {', '.join(self.meta['sources'])}: they hold nothing but white space")
        if not train["tokens"]:
            self._move("val", 0, "train", token_bytes)
        if not val["tokens"]:
            n_val = min(math.ceil(self.meta["val_fraction"] * n_tokens), n_tokens - 1)
            self._move("train", n_tokens - n_val, "val", token_bytes)
            print(f"number of documents: {n_documents:,} (lines <|endoftext|> separate the documents of a text file); "
                  f"they are all in one split, so the last {n_val:,} tokens become the validation split")  # fmt: skip
        for split in SPLITS:
            self.counts[split]["shards"] = [
                {"file": path.name, "tokens": tokens, "sha256": sha256(path)} for path, tokens in self.files(split)
            ]
        del self.meta["next"]
        self.commit()


def _write_documents(shards: Shards, tokenizer: Tokenizer, read: Read, workers: int) -> None:
    """Tokenize the documents from `next` on and append them to the shards, with a progress bar in a terminal."""
    meta = shards.meta
    is_terminal = sys.stdout.isatty()
    begin = committed = time.monotonic()
    bytes_before = shards.total("bytes")
    encode = partial(_encode, tokenizer, meta["val_fraction"])
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("sources")
    with Progress(*columns, disable=not is_terminal) as bar:
        task = bar.add_task("", total=len(meta["sources"]))
        for position, added in _map(encode, _batches(shards, read), workers):
            for split in SPLITS:
                shards.append(split, *added[split])
            meta["next"] = position
            speed = (shards.total("bytes") - bytes_before) / 1e6 / (time.monotonic() - begin)
            line = f"{shards.total('documents'):,} documents, {shards.total('tokens'):,} tokens, {speed:.1f} MB/s"
            bar.update(task, completed=position[0], description=line)
            if time.monotonic() - committed >= COMMIT_SECONDS:
                shards.commit()
                committed = time.monotonic()
                if not is_terminal:
                    print(line, flush=True)
        bar.update(task, completed=len(meta["sources"]))


def _batches(shards: Shards, read: Read) -> Iterator[tuple[Position, list[str]]]:
    """Batches of documents from `next` on, each with the position after its last document."""

    sources, limit = shards.meta["sources"], shards.meta["limit"]
    first, skip = shards.meta["next"]
    texts, size = [], 0
    for i, source in enumerate(sources[first:], first):
        stop = limit and limit * (i + 1) // len(sources) - limit * i // len(sources)
        for j, text in enumerate(islice(read(source), skip, stop), skip):
            if text.strip():
                texts.append(text)
                size += len(text)
                position = i, j + 1
            if size >= BATCH_CHARACTERS:
                yield position, texts
                texts, size = [], 0
        skip = 0
    if texts:
        yield position, texts


def _encode(ids: Tokenizer, val_fraction: float, texts: list[str]) -> dict[str, tuple[np.ndarray, int, int]]:
    """For each split: token ids, uint32 [n]; number of documents; UTF-8 bytes."""
    added = {}
    by_split = {split: [] for split in SPLITS}
    for text in texts:
        by_split[split_of(text, val_fraction)].append(text)
    for split, documents in by_split.items():
        tokens = []
        for text in documents:
            tokens += [ids.bos_id] * (ids.bos_id is not None) + ids.encode(text) + [ids.eot_id]
        size = sum(len(text.encode("utf-8", "replace")) for text in documents)
        added[split] = np.array(tokens, np.uint32), len(documents), size
    return added


def _map(function: Callable, batches: Iterable[tuple[Position, list[str]]], workers: int) -> Iterator[tuple]:
    """(position, function(texts)) of each batch, in order; at most 2·workers + 1 batches are pending."""
    if workers == 1:
        yield from ((position, function(texts)) for position, texts in batches)
        return
    # Spawn: a forked child can inherit a lock that another thread of the parent holds.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(function,)) as pool:
        pending = deque()
        for position, texts in batches:
            pending.append((position, pool.submit(_work, texts)))
            if len(pending) > 2 * workers:
                position, future = pending.popleft()
                yield position, future.result()
        for position, future in pending:
            yield position, future.result()


def _begin_worker(function: Callable) -> None:
    """Initialise a worker: store the function, so that its tokenizer is sent once; ignore Ctrl-C, which the parent
    handles; exit when the parent exits, even if it is killed."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()


def _work(texts: list[str]) -> dict:
    return _function(texts)
