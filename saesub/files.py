"""Writes files so that a killed process leaves the old one whole, and tensors with a checksum.

safetensors notices a truncated file but not a flipped bit; here both are a SaesubError. torch is
imported only where tensors are written or read, since the command line needs the rest alone.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import IO, TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from saesub.errors import SaesubError

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:
    fcntl = None

_BLOCK = 1 << 20


def write_atomically(path: Path, data: bytes | str) -> None:
    """Writes under a temporary name beside `path`, then renames it; makes the folder.

    The temporary files of killed processes are removed first; a live writer holds a lock on its
    own. On a file system without locks they stay. Raises OSError.
    """
    encoded = data.encode() if isinstance(data, str) else data
    done = False
    while not done:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{escape(path.name)}.{'?' * 8}.tmp"):
            _remove_unless_held(left)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("xb") as held:
                with suppress(OSError):  # a file system without locks
                    _lock(held)
                temporary.write_bytes(encoded)
                if fcntl is None:
                    held.close()  # Windows renames no open file
                with suppress(FileNotFoundError):  # removed before it was locked: write it again
                    os.replace(temporary, path)
                    done = True
        finally:
            temporary.unlink(missing_ok=True)


def _remove_unless_held(path: Path) -> None:
    with suppress(OSError):  # gone by now, or held
        if fcntl is not None:
            with path.open("r+b") as file:
                _lock(file)
        path.unlink()


def _lock(file: IO[bytes]) -> None:
    """Raises OSError if another process holds the file. Windows deletes no open file anyway."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@dataclass(frozen=True)
class Form:
    """A kind of file: its format and how errors name it.

    Attributes:
        format: the header's "format".
        key: the header's name of the text.
        what: such as "spectrum".
        missing: what to do about a file that is not there.
        damaged: what to do about one whose checksum does not match.
        named: whether the checksum covers the tensors' names too.
    """

    format: str
    key: str
    what: str
    missing: str
    damaged: str
    named: bool = True


def write_checksummed(
    path: str | os.PathLike[str], form: Form, tensors: Mapping[str, Tensor], text: str
) -> None:
    """Writes tensors of any shape with their checksum; a file that was there stays until then.

    Raises SaesubError where the disk is full or cannot be written.
    """
    from safetensors.torch import save

    path = Path(path)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": form.format, form.key: text, "sha256": _digest(kept, text, form.named)}
    try:
        write_atomically(path, save(kept, header))
    except OSError as error:
        raise SaesubError(
            f"the {form.what} cannot be written to {path} ({error.strerror or error}): make room "
            "there or name another folder; a file that was there before is unchanged."
        ) from error


def read_checksummed(path: str | os.PathLike[str], form: Form) -> tuple[dict[str, Tensor], str]:
    """The tensors, on the CPU, and the text that `write_checksummed` wrote.

    Raises SaesubError for a missing or damaged file, or one of another format.
    """
    if not Path(path).is_file():
        raise SaesubError(f"no {form.what} at {path}: {form.missing}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text, expected, found = header[form.key], header["sha256"], header.get("format")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise damaged(path, form, error) from error
    if found != form.format:
        raise SaesubError(
            f"{path} has the format {found!r}, not {form.format!r}: another version of saesub "
            f"wrote it, or it is damaged; {form.damaged}"
        )
    if expected != _digest(tensors, text, form.named):
        raise SaesubError(f"{path} is damaged: its checksum does not match; {form.damaged}")
    return tensors, text


def damaged(path: str | os.PathLike[str], form: Form, error: object) -> SaesubError:
    """The error for a file whose content is not of its form."""
    return SaesubError(f"{path} is damaged or not a saesub {form.what} ({error}): {form.damaged}")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    return sha256_of(path, path.stat().st_size).hexdigest()


def sha256_of(path: Path, n_bytes: int) -> hashlib._Hash:
    """SHA-256 of a file's first `n_bytes` bytes, to which more can be added."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(min(_BLOCK, n_bytes)):
            digest.update(block)
            n_bytes -= len(block)
    return digest


def _digest(tensors: Mapping[str, Tensor], text: str, named: bool) -> str:
    import torch

    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        if named:
            digest.update(name.encode())
        digest.update(memoryview(tensors[name].flatten().view(torch.uint8).numpy()))  # pyright: ignore
    return digest.hexdigest()
