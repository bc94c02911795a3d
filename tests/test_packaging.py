# SPDX-License-Identifier: Apache-2.0
"""What is installed: the wheel, the place in `optimum-cli`, and a strategy that comes from another distribution."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
REGISTER = "optimum/commands/register/register_blockprune.py"
SHIPPED = ("optimum_blockprune", "optimum", "setup.cfg", "pyproject.toml", "LICENSE", "README.md")
LEFTOVERS = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
BUILT_IN = {"angular", "manual", "mi_prun", "random", "search", "shortgpt", "sleb"}


def run(*command: str | Path, path: Path | None = None) -> str:
    """Runs a command outside the checkout, `path` being searched for packages first, and returns its output."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=path or "/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def optimum_cli(*arguments: str, path: Path | None = None) -> str:
    """Runs `optimum-cli` as the script of the environment does."""
    start = "from optimum.commands.optimum_cli import main; main()"
    return run(sys.executable, "-c", start, *arguments, path=path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Builds the wheel from a clean copy, so that neither old build folders get in nor new ones appear."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=LEFTOVERS)
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, source / name)
    # What must stay out: find_namespace takes every folder that the list in setup.cfg does not exclude.
    for name in ("tests", "docs", "benchmarks", "optimum/other"):
        (source / name).mkdir()
        (source / name / "stray.py").touch()
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, source)
    (path,) = target.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Path:
    """Installs the demo plug-in into a folder of its own."""
    source, target = tmp_path_factory.mktemp("plugin") / "demo", tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "tests" / "plugins" / "demo", source, ignore=LEFTOVERS)
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "install", *flags, "--target", target, source)
    return target


def test_the_wheel_holds_the_package_and_the_register_module_only(wheel) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    source = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "optimum_blockprune").rglob("*")
        if path.suffix in {".py", ".json"}
    }
    assert sorted(names) == sorted({*source, REGISTER})


def test_the_namespaces_of_optimum_have_no_init(wheel) -> None:
    assert not [name for name in wheel.namelist() if name.startswith("optimum/") and name.endswith("__init__.py")]
    assert not list((ROOT / "optimum").rglob("__init__.py"))


def test_the_wheel_registers_the_strategies(wheel) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(name).decode())
    assert set(parser["optimum_blockprune.strategies"]) >= BUILT_IN


def test_the_wheel_carries_licence_and_metadata(wheel) -> None:
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    text = wheel.read(metadata).decode()
    assert "\nName: optimum-blockprune\n" in text
    assert "\nLicense: Apache-2.0\n" in text or "\nLicense-Expression: Apache-2.0\n" in text
    assert "\nRequires-Dist: requests\n" in text
    assert [name for name in wheel.namelist() if name.endswith("LICENSE")]


def test_optimum_cli_still_works() -> None:
    assert "`optimum` version" in optimum_cli("env")


def test_optimum_cli_knows_the_command() -> None:
    assert "{run,plan,apply,mix,heal,evaluate,check,push,report,strategies}" in optimum_cli("blockprune")


FIND = """
import json, sys
from dataclasses import asdict
from optimum_blockprune import available_strategies, get_strategy
from optimum_blockprune.errors import UnknownStrategyError
strategy = get_strategy("last_first")
assert "blockprune_broken_plugin" not in sys.modules
try:
    get_strategy("broken_plugin")
except UnknownStrategyError as error:
    message = str(error)
found = {name: asdict(info) for name, info in available_strategies().items()}
print(json.dumps({"class": strategy.__name__, "message": message, "found": found}))
"""


def test_a_plug_in_is_found_and_a_broken_one_harms_nobody(plugin) -> None:
    result = json.loads(run(sys.executable, "-c", FIND, path=plugin))
    assert result["class"] == "LastFirst"
    assert "broken on purpose" in result["message"]
    found = result["found"]
    assert {name for name, info in found.items() if info["available"]} >= {*BUILT_IN, "last_first"}
    assert found["last_first"]["distribution"] == "blockprune-demo-plugin"
    assert found["last_first"]["summary"] == "Removes the last removable blocks, the last one first."
    assert found["broken_plugin"]["available"] is False
    assert found["broken_plugin"]["error"] == result["message"]


def test_the_command_line_lists_plug_ins(plugin) -> None:
    listed = optimum_cli("blockprune", "strategies", "--json", path=plugin)
    assert "last_first" in listed
    assert "broken on purpose" in listed
    json.loads(listed)
