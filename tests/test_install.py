"""What `import saesub` and `pip install saesub` give: names when used, and no more than the core.

The core is installed by linking, into an empty folder, the wheel's contents and the packages that
its requirements name, directly or through one another.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import saesub

ROOT = Path(__file__).resolve().parent.parent
HEAVY = "torch", "transformers", "sae_lens", "datasets", "pandas", "matplotlib"


def _run(code: str, *flags: str, **settings) -> str:
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


# --- the public names ----------------------------------------------------------------------------


def test_every_name_is_what_a_type_checker_takes_it_for():
    tree = ast.parse(Path(saesub.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {name: f"saesub.{module}" for name, module in saesub._HOME.items()}
    for name, module in seen.items():
        assert getattr(saesub, name) is getattr(sys.modules[module], name)
    assert set(saesub.__all__) <= set(saesub._HOME)


def test_names_are_listed_and_an_unknown_one_is_an_error():
    assert {*saesub.__all__, "pack_contexts", "__version__"} <= set(dir(saesub))
    assert "RevivalCount" not in dir(saesub)
    with pytest.raises(AttributeError, match="no attribute 'mesure_spectrum'"):
        _ = saesub.mesure_spectrum
    with pytest.raises(ImportError, match="cannot import name 'RevivalCount'"):
        from saesub import RevivalCount  # noqa: F401  # pyright: ignore


@pytest.mark.parametrize(
    "code",
    [
        "import saesub, saesub.loading.registry",
        "from saesub import SaesubError, cache_dir, data_file",
        "from saesub.cli import main; main(['list'])",
        *(
            f"from saesub.cli import main\ntry: main({option.split()!r})\nexcept SystemExit: pass"
            for option in ("--help", "--version", "check-gpu --help")
        ),
    ],
)
def test_what_needs_no_model_imports_nothing_heavy(code):
    shown = _run(f"{code}\nimport sys; print(set({HEAVY}) & set(sys.modules))", cwd=ROOT)
    assert shown.splitlines()[-1] == "set()"


# --- the core alone ------------------------------------------------------------------------------


def _requirements(dist: Distribution, extras: set[str]) -> list[Requirement]:
    """What the distribution requires here, with these extras of its own."""
    given = map(Requirement, dist.requires or [])
    worlds = [{"extra": extra} for extra in (extras or {""})]
    return [r for r in given if not r.marker or any(r.marker.evaluate(w) for w in worlds)]


def _closure(requirements: list[Requirement]) -> dict[str, Distribution]:
    found: dict[str, Distribution] = {}
    waiting = list(requirements)
    while waiting:
        needed = waiting.pop()
        if needed.name not in found or needed.extras:
            found[needed.name] = distribution(needed.name)
            waiting += [
                r for r in _requirements(found[needed.name], needed.extras) if r.name not in found
            ]
    return found


@pytest.fixture(scope="session")
def core(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents and what pip would install with it, and nothing else."""
    folder = tmp_path_factory.mktemp("core")
    (metadata,) = installed.glob("saesub-*.dist-info")
    dists = _closure(_requirements(Distribution.at(metadata), set()))
    paths = [installed / "saesub", metadata]
    for dist in dists.values():
        names = {file.parts[0] for file in dist.files or []} - {"..", "__pycache__", "bin"}
        paths += [Path(str(dist.locate_file(name))) for name in names]
    for path in paths:
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    return folder


THREE_LINES = """
import sys
sys.path.insert(0, {core!r})
from importlib.util import find_spec
names = "jupyter papermill nbconvert ipywidgets matplotlib seaborn sklearn"
print([name for name in names.split() if find_spec(name)])

import builtins
imported = builtins.__import__
def ours_take_nothing_of_the_extra(name, globals=None, *more, **named):
    ours = str((globals or {{}}).get("__name__", "")).startswith("saesub")
    if ours and name.split(".")[0] in ("pandas", "psutil"):  # which SAELens brings with it
        raise ModuleNotFoundError("saesub imports " + name, name=name)
    return imported(name, globals, *more, **named)
builtins.__import__ = ours_take_nothing_of_the_extra

import saesub
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
model = saesub.load_model("smollm2-135m", device="cpu")
sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=576, d_sae=1024, k=16))
hook = "blocks.4.hook_attn_out"
spectrum = saesub.measure_spectrum(model, "wiki-en", hook, n_tokens=2_000, progress=False)
saesub.initialize_in_subspace(sae, spectrum)
print(saesub.__file__, spectrum.d, float(sae.W_dec.norm()) > 0)
"""


@pytest.mark.model
def test_the_core_alone_measures_and_initialises(core, tmp_path):
    shown = _run(THREE_LINES.format(core=str(core)), "-I", "-S", cwd=tmp_path).splitlines()
    assert shown[0] == "[]"
    assert Path(shown[1].split()[0]).is_relative_to(core)
    assert shown[1].split()[1:] == ["576", "True"]
