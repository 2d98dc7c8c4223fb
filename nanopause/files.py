"""Crash-safe file operations."""

import hashlib
import os
from pathlib import Path


def sync(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(file: Path, text: str) -> None:
    """Write a file atomically: concurrent readers, and readers after a crash, see the old text or the new one."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text)
    sync(temporary)
    os.replace(temporary, file)
    sync(file.parent)


def sha256(file: Path) -> str:
    """The hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
