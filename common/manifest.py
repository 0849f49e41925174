"""Digests of the files of a directory, so that whoever reads them knows that they are the ones that were written.

A file's digest is BLAKE2b over the digests of its chunks, which several threads compute at once.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "e3rl-manifest.json"
CHUNK_BYTES = 16 * 1024**2
DIGEST_BYTES = 32
MOST_THREADS = 16


class DamagedError(Exception):
    """A directory's files are not those that its manifest lists; the message names the first that differs."""


def write_manifest(directory: Path) -> None:
    """List every file below `directory` with its size and digest, all of them flushed to the disk."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)
    for path in paths:
        _flush(path)
    with ThreadPoolExecutor(_threads()) as pool:
        files = {
            path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "blake2b": _file_digest(path, pool)}
            for path in paths
        }
    text = json.dumps({"files": files, "digest": _digest(_canonical(files))}, indent=1) + "\n"
    target, new = directory / MANIFEST, directory / f"{MANIFEST}.new"
    new.write_text(text, encoding="utf-8")
    # A new file in its place: the old one may be another directory's, too.
    new.replace(target)
    for path in (target, *(path for path in directory.rglob("*") if path.is_dir()), directory):
        _flush(path)


def verify_manifest(directory: Path) -> None:
    """Raise DamagedError unless every file that the manifest lists is there, byte for byte."""
    files = _read(directory / MANIFEST)
    # Sizes first: what was cut off is found without reading tens of gigabytes.
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            raise DamagedError(f"{name} is missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise DamagedError(f"{name} has {size:,} bytes, {entry['bytes']:,} were written")
    with ThreadPoolExecutor(_threads()) as pool:
        for name, entry in files.items():
            try:
                digest = _file_digest(directory / name, pool)
            except OSError as error:
                raise DamagedError(f"{name} can't be read: {error.strerror or error}") from error
            if digest != entry["blake2b"]:
                raise DamagedError(f"{name} is not what was written: its digest differs")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_bytes())
        files: dict[str, dict[str, Any]] = content["files"]
        whole = content["digest"] == _digest(_canonical(files))
    except FileNotFoundError:
        raise DamagedError(f"it has no {path.name}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path.name} can't be read: {error}") from error
    if not whole:
        raise DamagedError(f"{path.name} is not what was written")
    return files


def _canonical(files: dict[str, dict[str, Any]]) -> bytes:
    return json.dumps(files, sort_keys=True).encode()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def _file_digest(path: Path, pool: ThreadPoolExecutor) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        chunks = pool.map(lambda offset: _chunk_digest(descriptor, offset, size), range(0, size, CHUNK_BYTES))
        return _digest(b"".join(chunks))
    finally:
        os.close(descriptor)


def _chunk_digest(descriptor: int, offset: int, size: int) -> bytes:
    total = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for piece in _pieces(descriptor, offset, min(offset + CHUNK_BYTES, size)):
        total.update(piece)
    return total.digest()


def _pieces(descriptor: int, offset: int, end: int) -> Iterator[bytes]:
    while offset < end:
        piece = os.pread(descriptor, end - offset, offset)
        if not piece:
            # Cut off since its size was taken: the digest will differ.
            return
        offset += len(piece)
        yield piece


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _threads() -> int:
    return min(os.cpu_count() or 1, MOST_THREADS)
