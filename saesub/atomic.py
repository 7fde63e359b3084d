"""Files that are at every moment the old ones or the new ones, whatever ends the process."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from glob import escape
from pathlib import Path


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write under a temporary name beside `path`, then rename; makes the folder.

    What killed processes left under such names is removed first. Of processes that write one file
    at the same time, one may so lose its temporary to another: it writes again. Raises OSError.
    """
    encoded = data.encode() if isinstance(data, str) else data
    done = False
    while not done:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{escape(path.name)}.{'?' * 8}.tmp"):
            with suppress(OSError):  # gone by now, or on Windows still open
                left.unlink()
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.write_bytes(encoded)
            with suppress(FileNotFoundError):
                os.replace(temporary, path)
                done = True
        finally:
            temporary.unlink(missing_ok=True)
