"""The rules of the house: imports one way, types, format, sizes."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import dit_jax

PACKAGE = ROOT / "dit_jax"
BIN = f"{sys.prefix}/bin"


def run(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_imports_go_one_way():
    """The contracts in pyproject.toml: the floors, no circles, who may know what."""
    run(f"{BIN}/lint-imports", "--no-cache")


def test_no_wing_imports_the_api():
    """By the package's own name, which the contracts do not see: import dit_jax, from dit_jax import load."""
    found = []
    for path in PACKAGE.glob("*/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            if isinstance(node, ast.ImportFrom):
                assert not node.level, path  # relative imports would need a rule of their own
                names = names if node.module == "dit_jax" else []
                found += [f"{path}: from dit_jax import {name}" for name in names if name in (*dit_jax.__all__, "*")]
            else:
                found += [f"{path}: import dit_jax" for name in names if name == "dit_jax"]
    assert not found, "\n".join(found)


def test_lint_and_format():
    run(f"{BIN}/ruff", "check", "--no-cache")
    run(f"{BIN}/ruff", "format", "--check", "--no-cache")


@pytest.mark.slow
def test_types():
    run(f"{BIN}/pyright", "--pythonpath", sys.executable)


def test_the_top_of_the_package_is_what_can_be_run():
    """Every file there is a command, the config, the shared flags or the API; and every wing has its floor."""
    for path in PACKAGE.glob("*.py"):
        if path.stem not in ("__init__", "api", "cli", "config", "benchmark", "reproduce"):
            assert "cli.run(main)" in path.read_text(), path
    contracts = (ROOT / "pyproject.toml").read_text()
    for wing in PACKAGE.iterdir():
        if (wing / "__init__.py").exists():
            assert f"dit_jax.{wing.name}" in contracts, wing


def public(tree):
    """The public functions and methods of a module."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from (f for f in node.body if isinstance(f, ast.FunctionDef) and is_public(f))
        elif isinstance(node, ast.FunctionDef) and is_public(node) and node.name != "main":
            yield node


def is_public(function):
    return not function.name.startswith("_") or function.name in ("__init__", "__call__")


def test_public_functions_have_types():
    missing = []
    for path in PACKAGE.rglob("*.py"):
        for function in public(ast.parse(path.read_text())):
            a = function.args
            arguments = [x for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]
            if any(x.annotation is None for x in arguments) or function.returns is None and function.name != "__init__":
                missing.append(f"{path.relative_to(ROOT)}:{function.lineno} {function.name}")
    assert not missing, "\n".join(missing)


def test_functions_fit_on_a_screen_or_two():
    long = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 80:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} {node.end_lineno - node.lineno + 1}")
    assert len(long) <= 4, "\n".join(long)  # a line for each argument and field is no length


def test_the_layout_names_what_is_there():
    layout = (ROOT / "docs/contributing.md").read_text().partition("## Layout")[2].partition("\n## ")[0]
    for wing in PACKAGE.iterdir():
        if (wing / "__init__.py").exists():
            assert f"{wing.name}/" in layout, wing
    there = {path.name for path in (*PACKAGE.rglob("*.py"), *(ROOT / "docs").glob("*.py"))}
    for name in re.findall(r"\b([a-z_]+\.py)\b", layout):
        assert name in there, name
    for path in PACKAGE.rglob("*.py"):
        assert path.name in layout or path.stem in ("benchmark", "reproduce"), path
