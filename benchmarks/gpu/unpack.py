"""Unpack the load's packages for PYTHONPATH, and print where:  python unpack.py FOLDER

FOLDER gets a hash of the archive at its end, so that a new load is unpacked anew.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
import tempfile
from pathlib import Path

import stage


def main() -> None:
    packed = stage.LOAD / "site.tar.xz"
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()[:12]
    folder = Path(f"{sys.argv[1]}-{digest}")
    print(folder)
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        with tarfile.open(packed) as archive:
            archive.extractall(Path(partial) / "site", filter="data")
        os.replace(Path(partial) / "site", folder)


if __name__ == "__main__":
    main()
