"""Crash-safe file operations."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def sync(path: Path) -> None:
    """fsync a file or folder. Does nothing on Windows, which cannot open a folder."""
    if os.name == "nt":
        return
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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for other processes in such a block of the same folder, and keep them waiting. Not on Windows."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """The hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
