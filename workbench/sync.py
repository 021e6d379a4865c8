"""Copy what a recipe uses of workbench.py under its line, and the imports that this needs to its top.

python workbench/sync.py            # bring every recipe up to date
python workbench/sync.py --check    # exit status 1 where a recipe differs from what would be written
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Named one by one, so that a recipe whose line is damaged is an error.
RECIPES = ["sft_llava.py", "idefics2_docvqa.py", "dpo_idefics2.py", "finetune_minicpm_lora.py", "llava_two_stage.py"]
LINE = "# " + "=" * 117
MARKER = f"""{LINE}
# The workbench: the same in every recipe. Which tokens and which weights are trained is decided above this line.
# Its last sections (only checks, only for resuming, only for speed) can go, with the lines that call them: in
# SafeTrainer, train_and_save and fail_on_trouble, and above this line.
# In a copy of your own edit anything; in this repository edit workbench/workbench.py, then `make sync`.
{LINE}
"""


def blocks(source):
    """-> [(node, its lines with the comments above it)] of a module's top level."""
    lines = source.splitlines(keepends=True)
    found, last = [], 0
    for node in ast.parse(source).body:
        found.append((node, "".join(lines[last : node.end_lineno]).strip("\n")))
        last = node.end_lineno
    return found


def defined(node):
    """The names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def used(node):
    """The names that a statement refers to."""
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def reachable(recipe, workbench):
    """The statements of the workbench that the recipe uses, directly or through others."""
    wanted = set().union(*(used(node) for node, _ in recipe))
    wanted -= set().union(*(defined(node) for node, _ in recipe if not isinstance(node, (ast.Import, ast.ImportFrom))))
    kept = set()
    while True:
        more = [n for n, (node, _) in enumerate(workbench) if n not in kept and defined(node) & wanted]
        if not more:
            return [workbench[n] for n in sorted(kept)]
        kept.update(more)
        wanted |= set().union(*(used(workbench[n][0]) for n in more))


def synced(text):
    """A recipe's text with the workbench beneath its line."""
    above = text.partition(MARKER)[0].rstrip("\n")
    workbench = blocks((ROOT / "workbench" / "workbench.py").read_text(encoding="utf-8"))
    recipe = blocks(above)
    needed = reachable(recipe, workbench)
    imports = [ast.unparse(n) for n, _ in needed if isinstance(n, (ast.Import, ast.ImportFrom))]
    rest = [(node, block) for node, block in needed if not isinstance(node, (ast.Import, ast.ImportFrom))]
    first = next(node for node, _ in recipe if isinstance(node, (ast.Import, ast.ImportFrom)))
    lines = above.splitlines()
    head, tail = lines[: first.lineno - 1], lines[first.lineno - 1 :]
    end = '\n\nif __name__ == "__main__":\n    main()\n'
    whole = "\n".join(head + imports + tail) + "\n\n\n" + MARKER + "\n" + joined(rest) + "\n" + end
    whole = ruff(whole, "check", "--fix", "--select", "I,F401,F811")  # sorts imports, removes those not used
    return ruff(whole, "format")


def joined(parts):
    """[(node, its lines)] -> one text. A constant without a comment of its own stands close to the one before it."""
    text = parts[0][1]
    for (before, _), (node, lines) in zip(parts, parts[1:], strict=False):
        is_close = isinstance(before, ast.Assign) and isinstance(node, ast.Assign) and not lines.startswith("#")
        text += ("\n" if is_close else "\n\n\n") + lines
    return text


def ruff(text, *command):
    """What ruff makes of a text. Raises CalledProcessError where it is no Python, so that no file is overwritten."""
    command = [sys.executable, "-m", "ruff", *command, "-q", "--isolated", "--line-length", "119", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def main(argv):
    different = []
    for name in RECIPES:
        text = (ROOT / name).read_text(encoding="utf-8")
        if text.count(MARKER) != 1:
            sys.exit(f"error: {name} must have the line between recipe and workbench once, as it stands in {__file__}")
        new_text = synced(text)
        if new_text != text:
            different.append(name)
            if "--check" not in argv:
                (ROOT / name).write_text(new_text, encoding="utf-8")
    print("different:" if "--check" in argv else "written:", ", ".join(different) or "none")
    return 1 if different and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
