"""The two top-level folders are dllm_var.callbacks and dllm_var.datamodules, in a checkout and in a wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(code, folder, path=None):
    environment = {**os.environ, "PYTHONPATH": str(path or ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


DATA_FOLDERS = {"data", "tasks"}


@pytest.mark.parametrize("folder", ["elsewhere", "checkout", "inside the package"])
def test_a_checkout_resolves_both_folders(folder, tmp_path):
    place = {"elsewhere": tmp_path, "checkout": ROOT, "inside the package": ROOT / "dllm_var"}[folder]
    code = (
        "import dllm_var.datamodules, importlib.util\n"
        "print(dllm_var.datamodules.__file__)\n"
        "print(importlib.util.find_spec('dllm_var.callbacks').origin)\n"
    )
    assert run(code, place).stdout.splitlines() == [
        str(ROOT / name / "__init__.py") for name in ("datamodules", "callbacks")
    ]


def test_import_is_cheap(tmp_path):
    code = (
        "import sys; known = set(sys.modules); import dllm_var; dllm_var.UserError\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - known} - set(sys.stdlib_module_names)))"
    )
    assert run(code, tmp_path).stdout.strip() == "['dllm_var']"


def test_exports_load_on_first_use(tmp_path):
    code = "import dllm_var; print(dllm_var.UserError.__name__, dir(dllm_var)); dllm_var.Nothing"
    result = run(code, tmp_path)
    assert result.stdout.startswith("UserError")
    assert result.stderr.splitlines()[-1] == "AttributeError: module 'dllm_var' has no attribute 'Nothing'"


def test_every_package_is_listed():
    folders = {"dllm_var": "dllm_var", "callbacks": "dllm_var.callbacks", "datamodules": "dllm_var.datamodules"}
    found = {
        ".".join([package, *path.parent.relative_to(ROOT / top).parts])
        for top, package in folders.items()
        for path in (ROOT / top).rglob("__init__.py")
    }
    found.add("dllm_var.configs.sampler")  # YAML files alone
    assert sorted(found) == sorted(PROJECT["tool"]["setuptools"]["packages"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    setuptools = pytest.importorskip(
        "setuptools", minversion="77", reason="builds the wheel offline, without isolation"
    )
    folder = tmp_path_factory.mktemp("wheel")
    code = (
        "import os, shutil, sys\n"
        "shutil.copytree(sys.argv[1], 'source', ignore=shutil.ignore_patterns('.*', 'runs', 'build'))\n"
        "os.chdir('source'); from setuptools import build_meta; build_meta.build_wheel('..')"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=folder, check=True, capture_output=True, timeout=120)
    assert setuptools
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_code_and_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert {name.split("/")[0] for name in inside} == {"dllm_var"}
    source = {
        f"dllm_var/{'' if top == 'dllm_var' else top + '/'}{path.relative_to(ROOT / top)}"
        for top in ("dllm_var", "callbacks", "datamodules")
        for path in (ROOT / top).rglob("*")
        if path.suffix in {".py", ".html", ".css", ".js"}
        or path.name == "py.typed"
        or {"data", "tasks"} & set(path.relative_to(ROOT).parts[1:-1])
        if path.is_file() and "__pycache__" not in path.parts
    }
    overlays = {path.name for path in (ROOT / "configs" / "sampler").glob("*.yaml")}
    assert inside == source | {f"dllm_var/configs/sampler/{name}" for name in overlays}
    assert "dllm_var/datamodules/data/cmudict/LICENSE" in inside
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_unpacked_wheel_runs(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import dllm_var.datamodules as d; print(d.__file__, len(list(d.CmudictSource().records('test'))) > 1900)\n"
    code += "from dllm_var.settings import overlays; print(overlays()['wino'])"
    result = run(code, tmp_path, path=tmp_path / "site")
    package = str(tmp_path / "site/dllm_var")
    shown = [f"{package}/datamodules/__init__.py", "True", f"{package}/configs/sampler/wino.yaml"]
    assert result.stdout.split() == shown, result.stderr
