"""Any corpus of text, JSON-lines or Parquet files.

python data/text.py --files=my.txt --name=my                                  # writes data/my/gpt2/
python data/text.py --files='../corpus/*.jsonl.gz' --name=news --val_fraction=0.01
"""

import json
import re
import sys
from collections.abc import Iterator
from itertools import groupby

import fsspec
import tyro

from nanopause.errors import UserError, first_line, needs, run
from nanopause.prepare import prepare
from nanopause.scripts.data import DATA

NAMES = re.compile(r".*\.((txt|md|jsonl)(\.gz|\.xz|\.zst)?|parquet)", re.IGNORECASE | re.DOTALL)
# Parquet's types without a logical type are bytes: some programs write text so.
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def prepare_text(
    files: str,
    name: str,
    tokenizer: str = "gpt2",
    limit: int | None = None,
    val_fraction: float = 0.05,
    workers: int | None = None,
    data_dir: str = str(DATA),
) -> None:
    """Tokenize a corpus into data_dir/name/tokenizer/. An interrupted run resumes when started again.

    Args:
        files: pattern of local files or of any URL that fsspec supports: .txt or .md with a line <|endoftext|> between
            documents, .jsonl with a field `text`, both also as .gz, .xz or .zst, or Parquet with a column `text`.
        name: name of the corpus for `--dataset` of train.py.
        tokenizer: bytes, gpt2, a transformers folder or a hub id.
        limit: number of documents to read, the same from each file; default: all.
        val_fraction: fraction of the documents for validation; of the text if there are too few documents.
        workers: tokenizer processes; default: one per core.
        data_dir: the folder of all corpora.
    """
    prepare(name, find(files), read, data_dir, tokenizer, val_fraction=val_fraction, limit=limit, workers=workers)


def find(pattern: str) -> list[str]:
    """The paths or URLs of the matching files, sorted. Raises UserError if there are none, they cannot be reached, or
    `read` does not support one."""
    try:
        filesystem, path = fsspec.url_to_fs(pattern)
        found = filesystem.glob(path, detail=True)
        names = sorted(name for name, about in found.items() if about["type"] == "file")
        sources = [filesystem.unstrip_protocol(name).removeprefix("file://") for name in names]
        unknown = [source for source in sources if not (NAMES.fullmatch(source) or _is_parquet(source))]
    except ImportError as error:
        raise UserError(f"{pattern} needs more packages ({first_line(error)}): pip install -e '.[data]'") from error
    except Exception as error:  # depends on the HTTP library
        raise UserError(f"cannot reach {pattern} ({first_line(error)}): name local files by --files") from error
    if not sources:
        raise UserError(f"no file matches {pattern}: change --files")
    if unknown:
        raise UserError(f"{unknown[0]} is none of .txt, .md, .jsonl (or .gz, .xz, .zst) and Parquet: change --files")
    return sources


def read(source: str) -> Iterator[str]:
    """The documents of a file in order, streamed. Raises UserError if the file cannot be read."""
    is_lines = ".jsonl" in source[-10:].lower()
    try:
        yield from (_read_parquet if _is_parquet(source) else _read_json if is_lines else _read_text)(source)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text ({error.reason}): convert it, for example by "
                        f"iconv -f UTF-16 -t UTF-8") from error  # fmt: skip
    except Exception as error:  # Arrow, lzma and HTTP libraries raise many types
        raise UserError(f"cannot read {source}, which is damaged or unreachable ({first_line(error)}): download it "
                        f"again or check the connection") from error  # fmt: skip


def _is_parquet(source: str) -> bool:
    """By the name, otherwise by the first four bytes."""
    if source.lower().endswith(".parquet"):
        return True
    with fsspec.open(source) as file:
        return file.read(4) == b"PAR1"


def _read_parquet(source: str) -> Iterator[str]:
    parquet, is_dictionary = needs("pyarrow.parquet", "data"), needs("pyarrow", "data").types.is_dictionary
    with fsspec.open(source) as file, parquet.ParquetFile(file) as table:
        if not table.metadata.num_rows:  # an empty table can lack types
            return
        types = {field.name: field.type for field in table.schema_arrow}
        text_type = types.get("text")
        if str(text_type.value_type if text_type and is_dictionary(text_type) else text_type) not in TEXT_TYPES:
            shown = ", ".join(f"{name} ({type})" for name, type in types.items())
            raise UserError(f"{source} has no column text of strings, only {shown}: rename or convert the column")
        for batch in table.iter_batches(1000, columns=["text"]):
            for text in batch["text"].to_pylist():
                yield text.decode() if isinstance(text, bytes) else text or ""


def _open(source: str) -> fsspec.core.OpenFile:
    """A text file, decompressed, without its byte order mark and with \\n as line end."""
    if source.lower().endswith(".zst") and "zstd" not in fsspec.available_compressions():
        needs("backports.zstd", "data")
    return fsspec.open(source, "rt", encoding="utf-8-sig", compression="infer")


def _read_text(source: str) -> Iterator[str]:
    with _open(source) as file:
        for is_separator, lines in groupby(file, lambda line: line.rstrip() == "<|endoftext|>"):
            if not is_separator:
                yield "".join(lines).strip("\n")


def _read_json(source: str) -> Iterator[str]:
    with _open(source) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, TypeError, LookupError):
                text = None
            if not isinstance(text, str):
                raise UserError(f"{source}, line {number} is not a JSON object with text in the field `text`: fix or "
                                f"delete that line")  # fmt: skip
            yield text


def main(args: list[str] | None = None) -> None:
    """Parse --key=value arguments, those of the command line by default, and prepare the corpus."""
    args = sys.argv[1:] if args is None else args
    tyro.cli(prepare_text, args=args, config=(tyro.conf.FlagConversionOff,), use_underscores=True)


if __name__ == "__main__":
    run(main)
