"""Loading the examples of a split, from the hub or from a folder of JSON-lines files."""

import gzip
import json
import lzma
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from nanopause.errors import UserError
from nanopause.prepare import hash_of
from nanopause.tasks.task import BadRow, Example, Row, Task, text

SPLITS = ("train", "validation", "test")
NAMES = {"train": "train", "validation": "validation|valid|val|dev", "test": "test"}
TEST_SHARE = 0.2  # of a test split that is also used for training
VALIDATION_SHARE = 0.05  # of a training split


def load(
    task: Task, split: str, data_dir: str | Path | None = None, limit: int | None = None
) -> tuple[list[Example], str]:
    """The examples of "train", "validation" or "test", and a sentence that describes their source.

    data_dir: a folder of files such as gsm8k_train.jsonl, plain or as .gz, .xz or .zst; None: the hub. Tasks with
    generated data use neither. limit: number of examples to load; None: all.

    "test" is the split that papers report. A missing split is taken from another one, by a hash of the document:
    "validation" is 5 % of the training split; for a task without a training split that has `cut_test`, 80 % of the test
    split is used for training and validation, and the rest is "test".

    Raises UserError for an unknown split, a missing file or dataset, a row that the task does not accept, or a split
    without examples.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not known: choose {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} must be at least 1")
    if task.generate:
        data_dir = None
    sources = dict(task.splits) if data_dir is None else _files(task, Path(data_dir))
    source, low, high = _part(task, split, set(sources))
    if source not in sources:
        if data_dir is None:
            raise UserError(f"{task.hub} has no split for {split}, only {', '.join(sources)}")
        expected = f"{task.stem or task.name}_{task.splits.get(source, source)}.jsonl (or .jsonl.gz, .xz, .zst)"
        present = ", ".join(sorted(path.name for path in Path(data_dir).iterdir())) or "nothing"
        raise UserError(f"{data_dir} has no {expected}, which {split} needs, only {present}")
    split_of = None
    if task.generate:
        name = "generated text"
        rows = ((f"{task.name}, split {source}, row {i}", row) for i, row in enumerate(task.generate(source)))
    elif data_dir is None:
        name = f"{task.hub}, split {sources[source]}"
        rows = _hub_rows(task, sources[source])
    else:
        name = str(sources[source])
        rows = _file_rows(sources[source])
        split_of = task.split_of if sources[source].name.startswith(f"{task.stem or task.name}.") else None
    examples = []
    for where, row in rows:
        try:
            if split_of and split_of(row) != source:
                continue
            found, document = task.examples(row), text(row, task.document)
        except BadRow as error:
            raise UserError(f"{where}: {error}; fix or delete that row") from None
        if low * 2**64 <= hash_of(document) < high * 2**64:
            examples += found
        if limit is not None and len(examples) >= limit:
            break
    if not examples:
        raise UserError(f"{name} has no example for {split}: add more rows")
    examples = examples[:limit]
    description = f"{task.name}, {split}: {len(examples):,} examples of {name}"
    if (low, high) != (0, 1):
        description += f", from the {high - low:.0%} of its documents that a hash assigns to {split}"
    if source == "test" and (low, high) != (0, 1):
        description += "; without a training split the test split is divided, and scores are not those of papers"
    return examples, description


def _part(task: Task, split: str, sources: set[str]) -> tuple[str, float, float]:
    """The source split of a split, and the range [low, high) of its documents' hashes, as fractions of 1."""
    if task.cut_test and "train" not in sources:
        pool, start = "test", TEST_SHARE
    else:
        pool, start = "train", 0.0
    border = start if "validation" in sources else start + (1 - start) * VALIDATION_SHARE
    if split == "train":
        return pool, border, 1
    if split == "test":
        return "test", 0, start or 1
    return ("validation", 0, 1) if "validation" in sources else (pool, start, border)


def _files(task: Task, folder: Path) -> dict[str, Path]:
    """The file of each split in the folder, including splits that the hub does not have. If the task has `split_of`,
    one file can contain all splits. Raises UserError for a missing folder, or two files of one split."""
    if not folder.is_dir():
        raise UserError(f"data_dir {folder} is not a folder")
    files = {}
    others = set(SPLITS) - set(task.splits) - set(task.splits.values())
    for split, name in (task.splits | {split: split for split in others}).items():
        stem, ending = re.escape(task.stem or task.name), r"\.jsonl(\.gz|\.xz|\.zst)?"
        pattern = rf"{stem}[-_]({NAMES[name]})(?![a-z]).*{ending}"
        if task.split_of:
            pattern += rf"|{stem}{ending}"
        found = sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name))
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            raise UserError(f"{folder} has {names}, which are both {task.name}'s {name} split: leave one")
        if found:
            files[split] = found[0]
    return files


def _open(file: Path):
    if file.suffix == ".zst":
        try:
            opener = import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd").open
        except ImportError as error:
            raise UserError(f"reading {file} needs backports.zstd: pip install -e '.[eval]'") from error
    else:
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(file.suffix, open)
    return opener(file, "rt", encoding="utf-8-sig")


def _file_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Each row with its location. Raises UserError if the file is damaged or a line is not a JSON object."""
    number = 0
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{file}, line {number}: not a JSON object; fix or delete that row")
                yield f"{file}, line {number}", row
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {number}: not JSON ({error}); fix or delete that row") from error
    except Exception as error:  # gzip, zlib, lzma, zstd, UTF-8 and the disk raise many types
        why = str(error) or type(error).__name__
        raise UserError(f"{file} cannot be read after line {number} ({why}): copy it again") from error


def _hub_rows(task: Task, split: str) -> Iterator[tuple[str, Row]]:
    """Each row of the hub's dataset with its location. Raises UserError without library, network or dataset."""
    try:
        import datasets
        import huggingface_hub

        try:
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
        except Exception:  # without a connection every request would be repeated for 30 s: use the cache only
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        rows = datasets.load_dataset(task.hub, task.config, split=split)
    except ImportError as error:
        raise UserError("the hub's datasets need datasets: pip install -e '.[eval]'") from error
    except Exception as error:  # depends on the HTTP library
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"cannot load {task.hub} ({why}): name a folder of JSON lines by --data_dir") from error
    for number, row in enumerate(rows):
        yield f"{task.hub}, split {split}, row {number}", row
