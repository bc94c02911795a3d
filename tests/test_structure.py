# SPDX-License-Identifier: Apache-2.0
"""The style of the package as tests: imports point one way, files and functions stay short, everything is typed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "optimum_blockprune"

# A module imports modules of lower rows only. `__init__` loads the public names on first use and stands outside.
LAYERS = (
    ("errors",),
    ("half",),
    ("healing_spec", "json_values"),
    ("budget_rules", "folds", "plan_rules", "report_rules", "widths"),
    ("joining", "width_places"),
    ("plan_changes",),
    # values, and tools that know neither models nor configurations
    ("batches", "cuts", "environment", "harness", "kinds", "plan", "recipe", "registry", "repetition", "report")
    + ("failures", "request_tasks", "runtimes", "saving", "stand_ins", "table", "text", "weight_files", "racing")
    + ("copying", "interrupts", "ledger", "memory", "offload", "team"),
    (
        "card_text",
        "flags",
        "hub",
        "losses",
        "model_rows",
        "names",
        "narrowing",
        "picture_style",
        "presets",
        "rules",
        "tensors",
    )
    + ("folding", "processes", "resuming"),
    ("weight_writing",),
    ("calibration", "card_data", "commands", "config", "constraints", "page_parts", "picture_depth")
    + ("picture_quality", "picture_search"),
    ("completions",),
    ("architectures", "measures", "page_quality", "pictures", "reproduce"),
    ("card_origin", "card_quality", "page"),
    ("card",),
    # one live model, and what is measured on its hidden states
    ("block_kinds", "blocks", "channel_sums", "inputs", "norm_gain"),
    ("benchmark_tasks", "file_weights", "forms", "generation", "halves", "per_layer", "writers"),
    ("estimators", "ica", "own_text", "runner", "skeleton", "tasks", "template"),
    ("passes", "points", "streaming"),
    ("fingerprints", "loading"),
    ("base_card", "caching", "evaluation", "strategies.base", "strategies.selection", "surgery", "unit_effects")
    + ("adapters", "branching", "half_choice", "joint_networks", "last_states", "layer_stream", "units"),
    ("expectation", "teacher", "training"),
    ("fitting", "reading", "steps"),
    ("greedy", "seeds"),
    ("compensating",),
    ("near_best",),
    ("run_costs",),
    ("block_bound", "checking", "mean_inputs", "plain_units", "strategies.ranking"),
    ("shell_text", "trial"),
    ("block_parts", "width_task"),
    ("output_bounds", "signals"),
    ("speedup",),
    ("asked", "network_scores"),
    ("budgets",),
    # strategies decide, the others execute; they meet in the plan
    (
        "choosing",
        "gate",
        "records",
        "strategies.bip",
        "strategies.functional_network",
        "strategies.magnitude",
        "strategies.manual",
        "strategies.mi_prun",
        "strategies.random_blocks",
        "strategies.similarity",
        "strategies.search",
        "strategies.sleb",
    ),
    ("depths", "mix", "sequence", "source"),
    ("file_folds", "measuring", "mixing", "streamed_saving"),
    ("checkpoint",),
    ("publishing",),
    ("healing",),
    ("pruner",),
    ("shell_parts",),
    ("shell_heal", "shell_mix"),
    ("run", "shell"),
)
# Imports inside a function that point upwards: shortcuts for the user, and what only a command or a plug-in needs.
DEFERRED = {
    ("commands", "shell"),
    ("plan", "architectures"),
    ("plan", "checkpoint"),
    ("plan", "gate"),
    ("plan", "runner"),
    ("registry", "strategies.base"),
}
# Loaded by `optimum-cli --help`, by readers of a plan, or by `import optimum_blockprune`: no heavy library.
LIGHT = (
    "__init__",
    "budget_rules",
    "commands",
    "errors",
    "flags",
    "json_values",
    "joining",
    "plan",
    "plan_rules",
    "recipe",
)
LIGHT += ("half", "interrupts", "plan_changes", "processes", "registry", "report", "report_rules", "widths")
LIGHT += ("folds", "healing_spec")
HEAVY = {"accelerate", "datasets", "numpy", "optimum", "safetensors", "torch", "transformers"}
# What may name the contract of strategies besides the strategies themselves.
CHOOSERS = ("asked", "budgets", "compensating", "choosing", "greedy", "reading", "run_costs", "seeds", "steps")
CHOOSERS += ("width_task",)
MAX_FILE, MAX_FUNCTION = 350, 60

LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
FILES = sorted(PACKAGE.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, *, deferred: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when the module is imported; `deferred`: those in functions and for type checkers."""
    tree = tree_of(path)
    late = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, Function) or (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING")
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and (id(node) in late) == deferred:
            yield node


def own_imports(path: Path, *, deferred: bool = False) -> set[str]:
    """Modules of this package that `path` imports."""
    package = name_of(path).split(".")[:-1]
    found = set()
    for node in imports(path, deferred=deferred):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1]
        for alias in node.names:
            parts = [*base, *(node.module.split(".") if node.module else [alias.name])]
            if ".".join(parts) in LEVEL:
                found.add(".".join(parts))
    return found


def foreign_imports(path: Path) -> set[str]:
    """Top-level names of other packages that are imported together with `path`."""
    found = set()
    for node in imports(path, deferred=False):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif not node.level:
            found.add(node.module.split(".")[0])
    return found


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, Function))


each_file = pytest.mark.parametrize("path", FILES, ids=name_of)


# Imports


def test_every_module_has_its_layer() -> None:
    modules = {name_of(path) for path in FILES if path.name != "__init__.py"}
    assert modules == set(LEVEL)
    assert sum(map(len, LAYERS)) == len(LEVEL)


def test_imports_are_read_rightly() -> None:
    """The tests below would pass in silence if nothing were found."""
    assert own_imports(PACKAGE / "runner.py") >= {"blocks", "errors"}
    assert own_imports(PACKAGE / "strategies" / "sleb.py") >= {"greedy", "strategies.base"}
    assert "strategies.base" in own_imports(PACKAGE / "registry.py", deferred=True)
    assert "torch" in foreign_imports(PACKAGE / "runner.py")


@each_file
def test_imports_point_downwards(path: Path) -> None:
    name = name_of(path)
    if path.name == "__init__.py":
        assert not own_imports(path) | own_imports(path, deferred=True)
        return
    upwards = {module for module in own_imports(path) if LEVEL[module] >= LEVEL[name]}
    assert not upwards
    late = {(name, module) for module in own_imports(path, deferred=True) if LEVEL[module] >= LEVEL[name]}
    assert late == {pair for pair in DEFERRED if pair[0] == name}


@each_file
def test_no_import_by_the_absolute_name(path: Path) -> None:
    assert "optimum_blockprune" not in foreign_imports(path)


@each_file
def test_strategies_are_reached_by_name_only(path: Path) -> None:
    used = {module for module in own_imports(path) if module.startswith("strategies.")}
    if name_of(path).startswith("strategies."):
        assert used <= {"strategies.base", "strategies.ranking", "strategies.selection"}
    else:
        assert used <= ({"strategies.base"} if name_of(path) in CHOOSERS else set())


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    allowed = {"optimum"} if name == "commands" else set()
    assert foreign_imports(path) & HEAVY <= allowed
    below = own_imports(path)
    assert below <= set(LIGHT), "a light module imports one that is not"


# Size


@each_file
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE


@each_file
def test_functions_are_short(path: Path) -> None:
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions(path)}
    assert {name: lines for name, lines in long.items() if lines > MAX_FUNCTION} == {}


def test_most_functions_are_very_short() -> None:
    sizes = sorted(node.end_lineno - node.lineno + 1 for path in FILES for node in functions(path))
    assert sizes[len(sizes) // 2] <= 12
    assert sizes[len(sizes) * 9 // 10] <= 35


# Habits


@each_file
def test_returns_are_typed(path: Path) -> None:
    assert [node.name for node in functions(path) if node.returns is None] == []


@each_file
def test_public_things_are_documented(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree), "the module has no docstring"
    definitions = [node for node in tree.body if isinstance(node, (*Function.__args__, ast.ClassDef))]
    silent = [node.name for node in definitions if not node.name.startswith("_") and not ast.get_docstring(node)]
    assert silent == []


@each_file
def test_nothing_is_printed(path: Path) -> None:
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    assert [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"] == []


@each_file
def test_no_bare_except(path: Path) -> None:
    handlers = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ExceptHandler)]
    assert [node.lineno for node in handlers if node.type is None] == []


@each_file
def test_broad_excepts_say_why(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    handlers = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ExceptHandler)]
    broad = [node for node in handlers if isinstance(node.type, ast.Name) and node.type.id == "Exception"]
    assert [node.lineno for node in broad if "#" not in lines[node.lineno - 1]] == []


@each_file
def test_no_model_type_is_named_in_code(path: Path) -> None:
    """Architectures are data: no `if model_type == "..."`."""
    compared = [
        node.lineno
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Compare)
        and "model_type" in ast.unparse(node)
        and any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in node.comparators)
    ]
    assert compared == []


def test_every_file_names_its_licence() -> None:
    own = [
        path
        for folder in ("optimum_blockprune", "optimum", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(own) > len(FILES)
    without = [
        str(path.relative_to(ROOT))
        for path in own
        if "# SPDX-License-Identifier: Apache-2.0" not in path.read_text(encoding="utf-8").splitlines()[:2]
    ]
    assert without == []
