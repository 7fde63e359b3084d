"""Unpack the load's packages to a folder for PYTHONPATH:  python unpack.py FOLDER"""

from __future__ import annotations

import os
import sys
import tarfile
import tempfile
from pathlib import Path

import stage


def main() -> None:
    folder = Path(sys.argv[1])
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        with tarfile.open(stage.LOAD / "site.tar.xz") as archive:
            archive.extractall(Path(partial) / "site", filter="data")
        os.replace(Path(partial) / "site", folder)


if __name__ == "__main__":
    main()
