"""The rules that every recipe keeps, read off its source."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = "Settings Training parse check load_processor load_data Collator load_model lora_config main".split()
LINES = {  # at most: above the line, whole file
    "sft_llava.py": (595, 4175),
    "idefics2_docvqa.py": (655, 4100),
    "dpo_idefics2.py": (865, 4360),
    "finetune_minicpm_lora.py": (801, 4055),
    "llava_two_stage.py": (760, 4105),
}
WORKBENCH_LINES = 4025
FUNCTION_LINES = 60
MARKER = re.compile(r"^# ={60,}\n(?:#.*\n)+?# ={60,}\n", re.M)
WORKBENCH = (ROOT / "workbench" / "workbench.py").read_text(encoding="utf-8")

each_recipe = pytest.mark.parametrize("name", LINES)


def parts(name):
    """The source above and below a recipe's line."""
    source = (ROOT / name).read_text(encoding="utf-8")
    assert len(MARKER.findall(source)) == 1, f"{name} must have one line between the recipe and the workbench"
    line = MARKER.search(source)
    return source[: line.start()], source[line.end() :]


def definitions(source):
    """The functions and classes at the top level of a source."""
    return [node for node in ast.parse(source).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]


def names_of(source):
    """The names that a source defines at the top level: functions, classes and constants."""
    stored = [name for node in ast.parse(source).body if isinstance(node, ast.Assign) for name in ast.walk(node)]
    constants = {name.id for name in stored if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    return constants | {node.name for node in definitions(source)}


def requirements(lines):
    """{distribution: version} of lines such as 'torch==2.13.0'."""
    pinned = [line.split("#")[0].strip().split("==") for line in lines]
    return {line[0].lower().replace("_", "-"): line[-1] for line in pinned if line[0] and not line[0].startswith("-")}


@each_recipe
def test_line_budgets(name):
    above, below = parts(name)
    most_above, most = LINES[name]
    assert len(above.rstrip().splitlines()) <= most_above
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= most


def test_line_budget_of_the_workbench():
    assert len(WORKBENCH.splitlines()) <= WORKBENCH_LINES


def test_the_copies_are_what_sync_would_write():
    """Also that each of the five recipes has its line, and that no name stands both above and below it."""
    check = subprocess.run([sys.executable, ROOT / "workbench" / "sync.py", "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


@each_recipe
def test_what_stands_below_the_line_is_the_workbench(name):
    above, below = parts(name)
    written_once = {ast.dump(node) for node in ast.parse(WORKBENCH).body}
    changed = [node.name for node in definitions(below) if ast.dump(node) not in written_once]
    assert (changed, names_of(above) & names_of(below)) == ([], set())


@each_recipe
def test_the_rooms_stand_in_their_order(name):
    names = [node.name for node in definitions(parts(name)[0])]
    assert [room for room in names if room in ROOMS] == ROOMS


@each_recipe
def test_what_is_public_has_a_docstring(name):
    above, _ = parts(name)
    without = [node.name for node in definitions(above) if node.name[0] != "_" and not ast.get_docstring(node)]
    assert ast.get_docstring(ast.parse(above)) and without == []


@each_recipe
def test_a_recipe_imports_nothing_of_this_repository(name):
    own = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not own & {alias.name.split(".")[0] for alias in node.names}, f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] not in own, f"line {node.lineno}"


@each_recipe
def test_the_packages_named_are_those_pinned(name):
    block = re.search(r"^# /// script\n(.*?)^# ///$", parts(name)[0], re.M | re.S).group(1)
    pinned = requirements((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    listed = requirements(re.findall(r'"([^"]+)"', block.split("dependencies")[1]))
    assert listed and {package: pinned.get(package) for package in listed} == listed


def test_the_kernels_named_are_those_of_the_requirements():
    """Also where only a comment names them."""
    text = (ROOT / "requirements-kernels.txt").read_text(encoding="utf-8")
    [table] = [
        node for node in ast.parse(WORKBENCH).body if isinstance(node, ast.Assign) and node.targets[0].id == "KERNELS"
    ]
    packages = [package for *_, package in ast.literal_eval(table.value)]
    assert len(packages) == 2 and re.findall(r"\b(?:fla-core|causal-conv1d)==[\w.]+", text) == packages


@each_recipe
def test_the_readme_names_each_recipe(name):
    assert name in (ROOT / "README.md").read_text(encoding="utf-8")


IMPORT_ALL = """
import os, sys, torch
before = torch.get_rng_state(), dict(os.environ)
for name in sys.argv[1:]:
    __import__(name)
assert torch.equal(before[0], torch.get_rng_state()) and before[1] == dict(os.environ)
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
"""


def test_importing_a_recipe_does_nothing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IMPORT_ALL, *(name.removesuffix(".py") for name in LINES)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert not any(tmp_path.iterdir())


def condition_times_text(node):
    """Whether an expression multiplies a text or a list by a condition."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        return False
    for text, condition in ((node.left, node.right), (node.right, node.left)):
        is_text = isinstance(text, (ast.JoinedStr, ast.List)) or isinstance(getattr(text, "value", None), str)
        is_not = isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not)
        is_bool = isinstance(condition, ast.Call) and getattr(condition.func, "id", "") == "bool"
        if is_text and (is_not or is_bool or isinstance(condition, (ast.Compare, ast.BoolOp))):
            return True
    return False


def test_the_last_sections_of_the_workbench_can_go_with_their_callers():
    """As the header says: nothing but SafeTrainer, train_and_save, fail_on_trouble and a recipe calls them."""
    starts = [n for n, line in enumerate(WORKBENCH.splitlines(), start=1) if re.match("# -{20,} only ", line)]
    needed, optional = [], set()
    for node in ast.parse(WORKBENCH).body:
        if node.lineno < starts[0]:
            needed.append(node)
        else:
            optional.update([node.name] if hasattr(node, "name") else [target.id for target in node.targets])
    callers = {
        f"{node.name} needs {name.id}"
        for node in needed
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and name.id in optional
    }
    named = re.compile("(SafeTrainer|train_and_save|fail_on_trouble) ")
    assert len(starts) == 5 and len(optional) > 60 and not [caller for caller in callers if not named.match(caller)]


ROOMS_WITH_CODE = ("workbench", "tools", "evals", "benchmarks", "tiny", "docs", "tests")
SOURCES = [*LINES, *(str(path.relative_to(ROOT)) for room in ROOMS_WITH_CODE for path in (ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("name", SOURCES)
def test_style_that_ruff_does_not_know(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    long = [node.name for node in functions if node.end_lineno - node.lineno + 1 > FUNCTION_LINES]
    multiplied = [node.lineno for node in ast.walk(tree) if condition_times_text(node)]
    assert (long, multiplied) == ([], [])
