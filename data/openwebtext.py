"""OpenWebText, 8 million documents and 9 billion GPT-2 tokens, or any corpus of Parquet or text files.

python data/openwebtext.py                                             # writes data/openwebtext/gpt2/
python data/openwebtext.py --files='../corpus/*.txt.xz' --name=novels  # writes data/novels/gpt2/
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import fsspec
import tyro

from nanopause.errors import UserError, run
from nanopause.prepare import prepare

# The branch in which the hub keeps every corpus as Parquet, whatever the main one holds.
OPENWEBTEXT = "hf://datasets/Skylion007/openwebtext@refs%2Fconvert%2Fparquet/**/*.parquet"
MISSING = "reading a corpus needs datasets: pip install -e '.[data]'"
EXTENSIONS = (".parquet", ".txt", ".txt.gz", ".txt.xz")


def main(
    files: str = OPENWEBTEXT,
    name: str = "openwebtext",
    tokenizer: str = "gpt2",
    limit: int | None = None,
    val_fraction: float = 0.0005,
    workers: int | None = None,
    data_dir: str = str(Path(__file__).resolve().parent),
) -> None:
    """Tokenize a corpus into data_dir/name/tokenizer/; run again after a break, it goes on where it was.

    Args:
        files: pattern of the files, here or at any address that fsspec knows: Parquet with a column `text`, or
            .txt, .txt.gz, .txt.xz with a line <|endoftext|> between documents.
        name: what `--dataset` of train.py will call the corpus.
        tokenizer: bytes or gpt2.
        limit: take only the first so many documents.
        val_fraction: share of the documents that are held out (nanoGPT's, by default).
        workers: processes that tokenize; one a core by default.
        data_dir: the folder of all corpora.
    """
    prepare(name, find(files), read, data_dir, tokenizer, val_fraction=val_fraction, limit=limit, workers=workers)


def find(pattern: str) -> list[str]:
    """The addresses of the files that match, sorted. Raises UserError: none does, or none that `read` can read."""
    try:
        filesystem, path = fsspec.url_to_fs(pattern)
        sources = sorted(filesystem.unstrip_protocol(match).removeprefix("file://") for match in filesystem.glob(path))
    except ImportError as error:
        raise UserError(MISSING) from error
    except Exception as error:  # of whatever HTTP library
        raise UserError(f"cannot reach {pattern} ({_first_line(error)}): name local files by --files") from error
    if not sources:
        raise UserError(f"no file matches {pattern}")
    for source in sources:
        if not source.endswith(EXTENSIONS):
            raise UserError(f"{source} is none of {', '.join(EXTENSIONS)}")
    return sources


def read(source: str) -> Iterator[str]:
    """The documents of a file in order, never more than a piece of it in memory. Raises UserError: not readable."""
    try:
        yield from _read_parquet(source) if source.endswith(".parquet") else _read_text(source)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(MISSING) from error
    except Exception as error:  # of Arrow, of lzma, of whatever HTTP library
        raise UserError(f"cannot read {source}, it is damaged or out of reach: {_first_line(error)}") from error


def _read_parquet(source: str) -> Iterator[str]:
    import datasets

    rows = datasets.load_dataset("parquet", data_files=source, split="train", streaming=True)
    columns = {name: getattr(feature, "dtype", "list") for name, feature in rows.features.items()}
    if columns.get("text") not in ("string", "large_string"):
        shown = ", ".join(f"{name} ({dtype})" for name, dtype in columns.items())
        raise UserError(f"{source} has no column text of strings, only {shown}")
    for batch in rows.select_columns(["text"]).iter(batch_size=1000):
        yield from (text or "" for text in batch["text"])


def _read_text(source: str) -> Iterator[str]:
    with fsspec.open(source, "rt", encoding="utf-8", compression="infer") as file:
        for separator, lines in groupby(file, lambda line: line.rstrip("\n") == "<|endoftext|>"):
            if not separator:
                yield "".join(lines).strip("\n")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


if __name__ == "__main__":
    run(lambda: tyro.cli(main, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
