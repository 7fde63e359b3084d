"""The contenders, and a virtual environment of pinned packages for each that is another library."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Contender:
    """A script of `contenders/`, its further arguments, and the environment it runs in.

    `environment` names a requirements file of `contenders/`, beside which a `.no-deps.txt` may
    list packages that are installed without their dependencies; without an environment the
    contender runs in the project's own, that is the driver's. One that is `steady` takes as long at
    any time of a training, and is not trained before it is timed.
    """

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    environment: str | None = None
    steady: bool = False


_SAESUB = ("saelens-adam", "torch-adam", "torch-sparse_adam", "native-adam", "native-sparse_adam")
_SAESUB_ASI = ("torch-adam-asi", "native-adam-asi", "native-sparse_adam-asi")

CONTENDERS = (
    Contender("sae-lens", "saelens_dense.py", steady=True),
    Contender("sae-lens-sparse", "saelens_sparse.py"),
    Contender("llamascopium", "llamascopium_.py", environment="llamascopium"),
    Contender("sparsify", "sparsify_.py", environment="sparsify"),
    Contender("dictionary-learning", "dictionary_learning_.py", environment="dictionary_learning"),
    *(Contender(f"saesub-{v}", "saesub_.py", ("--variant", v)) for v in (*_SAESUB, *_SAESUB_ASI)),
    Contender("encoder-product", "encoder_product.py", steady=True),
)


def python(environment: str | None) -> Path:
    """The interpreter of an environment, which is made on first use or if its pins have changed.

    Raises:
        subprocess.CalledProcessError: a package could not be installed.
    """
    if environment is None:
        return Path(sys.executable)
    files = [f for f in (_pins(environment), _pins(f"{environment}.no-deps")) if f.exists()]
    folder = FOLDER / ".venvs" / environment
    interpreter = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "installed.txt"
    wanted = "\n".join([TORCH, *(f.read_text() for f in files)])
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {environment} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [interpreter, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*install, TORCH], check=True)  # first, so that no other build is drawn in
        for file in files:
            alone = ["--no-deps"] if file.stem.endswith(".no-deps") else []
            subprocess.run([*install, *alone, TORCH, "-r", file], check=True)
        stamp.write_text(wanted)
    return interpreter


def _pins(name: str) -> Path:
    return FOLDER / "contenders" / f"{name}.txt"
