"""Files that a crash leaves whole."""

import hashlib
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(file: Path, text: str) -> None:
    """Write a file so that a reader, and what follows a crash, finds the old text or the new."""
    beside = file.with_name(file.name + ".tmp")
    beside.write_text(text)
    sync(beside)
    os.replace(beside, file)
    sync(file.parent)


def sha256(file: Path) -> str:
    """The hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
