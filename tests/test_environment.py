"""environment.yml, pyproject.toml and requirements.lock agree."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRA, DEV = (
    [Requirement(line) for line in PROJECT["optional-dependencies"][name]]
    for name in ("notebooks", "dev")
)


def _pins() -> dict[str, Version]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(pin) for name, pin in pins}


def test_environment_has_exactly_the_packages_and_bounds_of_pyproject_with_the_notebooks():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    section = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert {str(Requirement(line)) for line in section} == {str(r) for r in RUNTIME + EXTRA}


def test_environments_python_is_one_that_pyproject_takes():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python = next(d for d in environment["dependencies"] if str(d).startswith("python="))
    requires = Requirement(f"python{PROJECT['requires-python']}")
    assert requires.specifier.contains(python.removeprefix("python="))


def test_developers_also_run_the_notebooks():
    assert str(DEV[0]) == "saesub[notebooks]"


@pytest.mark.parametrize("requirement", RUNTIME + EXTRA + DEV[1:], ids=lambda r: r.name)
def test_every_dependency_is_pinned_within_its_bounds(requirement):
    if requirement.marker and not requirement.marker.evaluate({"python_version": "3.11"}):
        pytest.skip("not needed on the lock's Python")
    assert requirement.specifier.contains(_pins()[canonicalize_name(requirement.name)])


def test_the_lock_is_portable():
    pins = _pins()
    assert all(pin.local is None for pin in pins.values())
    assert not [name for name in pins if name.startswith(("nvidia-", "triton"))]
    assert "hatchling" in pins, "make setup builds without fetching the build backend"


def test_makefile_installs_the_locked_torch():
    assert f"torch=={_pins()['torch']}" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_makefile_installs_a_triton_for_tests_that_the_lock_leaves_out():
    """Without its dependencies, and only where torch has not brought one."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (pin,) = re.findall(r"^TRITON := triton==(.+)$", makefile, re.MULTILINE)
    assert Version(pin)
    (rule,) = re.findall(r"^\$\(TRITON_STAMP\): (?:.+\n)(?:\t.+\n)+", makefile, re.MULTILINE)
    assert "--no-deps $(TRITON)" in rule
    assert 'import triton" 2>/dev/null ||' in rule
    assert '"Linux x86_64" ] ||' in rule
    for target in ("test", "test-all"):
        assert re.search(rf"^{target}: \$\(TRITON_STAMP\)$", makefile, re.MULTILINE)
