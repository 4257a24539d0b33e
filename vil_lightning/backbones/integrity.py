"""Whether a file that `torch.save` has written is still what was written.

torch writes a zip archive with a checksum for each tensor, and looks at none of them when it reads: a flipped bit becomes
another weight. Checksums of the parts do not cover the archive's headers either, where a flipped bit can make torch return
memory that nobody has written. Checkpoints of this project therefore carry a hash of the whole file, in the place that a zip
archive has for a comment; other programs read them as before.
"""

import hashlib
import os
import zipfile
import zlib
from os import PathLike
from typing import BinaryIO

_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64
_BLOCK = 1 << 20


def seal(file: BinaryIO) -> None:
    """Add the hash to an archive without a comment. `file` is open for reading and writing, and stays open.

    Raises:
        ValueError: If it does not end as such an archive does.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(size - 22)
    if file.read(4) != b"PK\x05\x06":
        raise ValueError("This is no zip archive without a comment.")
    digest = _digest(file, size - 2)
    file.seek(size - 2)
    file.write(_COMMENT.to_bytes(2, "little") + _MARK + digest.encode())


def find_damage(path: str | PathLike[str]) -> str | None:
    """What is wrong with an archive of `torch.save`; None if nothing is.

    Of files that are not sealed (published weights) only the checksums of their parts are compared.
    """
    try:
        with open(path, "rb") as file:
            tail = file.seek(0, os.SEEK_END) - _COMMENT
            file.seek(max(tail, 0))
            comment = file.read()
            if tail > 2 and comment.startswith(_MARK):
                intact = _digest(file, tail - 2) == comment[len(_MARK) :].decode("ascii", errors="replace")
                return None if intact else "its hash does not match its content"
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, OSError, RuntimeError) as error:
        return f"it is no complete archive ({str(error).strip() or type(error).__name__})"
    return None if broken is None else f"the checksum of its part {broken!r} does not match"


def _digest(file: BinaryIO, length: int) -> str:
    """SHA-256 of the first `length` bytes."""
    file.seek(0)
    digest = hashlib.sha256()
    while length > 0 and (block := file.read(min(_BLOCK, length))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest()
