"""OpenWebText, 8 million documents and 9 billion GPT-2 tokens, or any corpus of Parquet or text files.

python data/openwebtext.py                                             # writes data/openwebtext/gpt2/
python data/openwebtext.py --files='../corpus/*.txt.xz' --name=novels  # writes data/novels/gpt2/
"""

from collections.abc import Iterator
from itertools import groupby

import fsspec
import tyro

from nanopause.errors import UserError, run
from nanopause.prepare import prepare
from nanopause.scripts.data import DATA

# The branch in which the hub keeps every dataset as Parquet, whatever the format of its main branch.
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
    data_dir: str = str(DATA),
) -> None:
    """Tokenize a corpus into data_dir/name/tokenizer/. An interrupted run resumes when started again.

    Args:
        files: pattern of local files or of any URL that fsspec supports: Parquet with a column `text`, or
            .txt, .txt.gz, .txt.xz with a line <|endoftext|> between documents.
        name: name of the corpus for `--dataset` of train.py.
        tokenizer: bytes or gpt2.
        limit: number of documents to read; default: all.
        val_fraction: fraction of the documents for validation (default: nanoGPT's).
        workers: tokenizer processes; default: one per core.
        data_dir: the folder of all corpora.
    """
    prepare(name, find(files), read, data_dir, tokenizer, val_fraction=val_fraction, limit=limit, workers=workers)


def find(pattern: str) -> list[str]:
    """The paths or URLs of the matching files, sorted. Raises UserError if there are none, they cannot be reached, or
    one has an extension that `read` does not support."""
    try:
        filesystem, path = fsspec.url_to_fs(pattern)
        sources = sorted(filesystem.unstrip_protocol(match).removeprefix("file://") for match in filesystem.glob(path))
    except ImportError as error:
        raise UserError(MISSING) from error
    except Exception as error:  # depends on the HTTP library
        raise UserError(f"cannot reach {pattern} ({_first_line(error)}): name local files by --files") from error
    if not sources:
        raise UserError(f"no file matches {pattern}: change --files")
    for source in sources:
        if not source.endswith(EXTENSIONS):
            raise UserError(f"{source} is none of {', '.join(EXTENSIONS)}: change --files")
    return sources


def read(source: str) -> Iterator[str]:
    """The documents of a file in order, streamed. Raises UserError if the file cannot be read."""
    try:
        yield from _read_parquet(source) if source.endswith(".parquet") else _read_text(source)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(MISSING) from error
    except Exception as error:  # Arrow, lzma and HTTP libraries raise many types
        raise UserError(f"cannot read {source}, which is damaged or unreachable ({_first_line(error)}): download it "
                        f"again or check the connection") from error  # fmt: skip


def _read_parquet(source: str) -> Iterator[str]:
    import datasets

    rows = datasets.load_dataset("parquet", data_files=source, split="train", streaming=True)
    columns = {name: getattr(feature, "dtype", "list") for name, feature in rows.features.items()}
    if columns.get("text") not in ("string", "large_string"):
        shown = ", ".join(f"{name} ({dtype})" for name, dtype in columns.items())
        raise UserError(f"{source} has no column text of strings, only {shown}: rename or convert the column")
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
