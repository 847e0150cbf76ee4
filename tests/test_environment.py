"""Environments: which Pythons are taken, that no other place is trusted, exact versions, and checks of a commit."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# A Python of a given version, whose environments are made in no time.
PYTHON = f"""#!/usr/bin/env bash
if [ "$1" = -c ]; then exec {sys.executable} -c "import sys; sys.version_info = ($VERSION, 0); $2"; fi
echo made
mkdir -p .venv/bin
ln -s "$(type -P true)" .venv/bin/python
ln -s "$(type -P true)" .venv/bin/pip
echo "export VIRTUAL_ENV=$PWD/.venv" >.venv/bin/activate
"""
OLDEST, NEWEST = 11, 13


def set_up(folder: Path, minor: int = OLDEST) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    for name in ("setup_environment.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    python = folder.parent / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return subprocess.run(
        ["bash", "-c", ". ./setup_environment.sh requirements.txt; echo $VIRTUAL_ENV"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": str(python), "VERSION": f"3, {minor}"},
    )


def test_the_environment_of_another_place_is_made_anew(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    installing = "installing requirements.txt into .venv (torch and its libraries are 5 GB)"
    assert set_up(before).stdout.splitlines() == ["made", installing, f"{before}/.venv"]
    assert set_up(before).stdout.splitlines() == [f"{before}/.venv"]
    before.rename(after)
    assert set_up(after).stdout.splitlines() == ["made", installing, f"{after}/.venv"]


def test_an_environment_whose_python_is_gone_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    set_up(folder)
    python = folder / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/usr/bin/python3.0-gone")
    assert "made" in set_up(folder).stdout


@pytest.mark.parametrize("minor", [OLDEST, 12, NEWEST])
def test_pythons_for_which_every_package_has_a_wheel_are_taken(tmp_path: Path, minor: int) -> None:
    assert set_up(tmp_path / "project", minor).returncode == 0


@pytest.mark.parametrize("minor", [OLDEST - 1, NEWEST + 1])
def test_other_pythons_are_refused_in_one_line(tmp_path: Path, minor: int) -> None:
    done = set_up(tmp_path / "project", minor)
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1
    assert f"Python 3.{OLDEST}, 3.12 or 3.{NEWEST} is needed" in done.stderr


def test_documents_and_checks_name_the_same_pythons() -> None:
    assert f"Both need Python 3.{OLDEST}, 3.12 or 3.{NEWEST}" in (ROOT / "README.md").read_text()
    assert f"for version in 3.{OLDEST} 3.{NEWEST}; do" in (ROOT / ".ci" / "run").read_text()
    assert project()["requires-python"] == f">=3.{OLDEST},<3.{NEWEST + 1}"


def project() -> dict[str, str]:
    found: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-test.txt", "requirements-encoders.txt"])
def test_the_lock_has_a_version_of_every_package_that_is_asked_for(name: str) -> None:
    locked = {canonicalize_name(line.name): str(line.specifier) for line in requirements("requirements-lock.txt")}
    assert all(version.startswith("==") for version in locked.values())
    for line in requirements(name):
        version = locked[canonicalize_name(line.name)].removeprefix("==")
        assert line.specifier.contains(version), f"{line} is locked to {version}: make requirements-lock.txt anew"


def test_the_lock_names_no_server() -> None:
    lines = (ROOT / "requirements-lock.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "://" in line or line.startswith("-")] == []


def test_every_file_names_the_same_version() -> None:
    version = project()["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    assert re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1] == version


def test_hooks_are_the_checks_of_run_tests() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    hooks = [hook["entry"].rpartition(".venv/bin/")[2] + " " for hook in local["hooks"]]
    checks = re.findall(
        r"^(?:PYTHONPATH=\. )?((?:ruff|mypy|lint).*?)(?: \.)?$", (ROOT / "run_tests.sh").read_text(), re.M
    )
    assert len(checks) == 4
    assert [check for check in checks if not any(hook.startswith(f"{check} ") for hook in hooks)] == []
