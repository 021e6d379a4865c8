"""No data file chooses what is executed: not a run's settings.yaml, not a model's files, and no pickle in either."""

import contextlib
import functools
import hashlib
import io
import os
import pickle
import shutil

import pytest
import torch
from conftest import ROOT, refusal
from recipes import FOLDERS, NAMES, Recipe
from test_compare import free_port

from tools import compare, generate, inspect_recipe, merge_adapter, plot_run

SHORT = {
    "max_steps": 2,
    "save_steps": 1,
    "save_total_limit": 2,
    "eval_strategy": "no",
    "sample_rows": 0,
    "load_best_model_at_end": False,
}
SHORT |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "disable_tqdm": True, "logging_steps": 1}
FLOAT = {"load_in_4bit": False}
TOOLS = ["generate", "merge", "compare"]
# To be removed when the recipes say so themselves: today they end with torch's own text.


class Opened(BaseException):
    """The page would be opened: all that it needs is loaded."""


def opened(*args):
    raise Opened


@pytest.fixture
def use(tmp_path, monkeypatch):
    """A function: tool, run, flags -> the one message that the tool ends with; None where it does its work."""
    monkeypatch.setattr(compare, "launch", opened)

    def make(tool, run, *flags):
        if tool == "generate":
            main, own = generate.main, ["--question", "Is three odd?", "--max_new_tokens", 4]
        elif tool == "merge":
            shutil.rmtree(tmp_path / "merged", ignore_errors=True)
            main, own = merge_adapter.main, [tmp_path / "merged", "--use_cpu"]
        else:
            own = ["--examples", 0, "--port", free_port(), "--votes", tmp_path / "votes.jsonl"]
            main = compare.main
        try:
            main([str(part) for part in (run, *own, *flags)])
        except Opened:
            assert tool == "compare"
        except SystemExit as stopped:
            assert stopped.code.startswith("error: ") and "\n" not in stopped.code
            return stopped.code
        return None

    return make


@pytest.fixture
def executed(tmp_path):
    """A file that is there once what must not be executed was executed."""
    return tmp_path / "executed"


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """A function: a recipe's name -> the Recipe, whose folder out/ holds a run of two steps and its checkpoints."""

    def make(name, folder=None, **settings):
        case = Recipe(name, request.getfixturevalue(folder or FOLDERS[name]), tmp_path_factory.mktemp("trained"))
        case.run(**{**SHORT, **settings})
        return case

    return functools.cache(make)


@pytest.fixture
def llava_run(trained, tmp_path):
    """A run of sft_llava.py, for this test alone."""
    return shutil.copytree(trained("sft_llava", **FLOAT).tmp_path / "out", tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------- recipes


def evil_recipe(path, executed):
    """Write a recipe that works, and says that it was executed."""
    path.write_text(f"open({str(executed)!r}, 'w').close()\nfrom sft_llava import *\n")
    return path


def replace_first_line(run, line):
    """In settings.yaml."""
    file = run / "settings.yaml"
    file.write_text("\n".join([line, *file.read_text().split("\n")[1:]]))


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    "where", ["beside the run", "in the run", "absolute", "from here", "a recipe's name and more"]
)
def test_settings_name_no_file(llava_run, use, executed, tmp_path, monkeypatch, tool, where):
    evil = evil_recipe(tmp_path / "evil.py", executed)
    if where == "in the run":
        evil = evil.rename(llava_run / "evil.py")
    monkeypatch.chdir(evil.parent)
    name = {
        "absolute": str(evil),
        "from here": os.path.relpath(evil, ROOT),
        "a recipe's name and more": f"{ROOT}/tools/../sft_llava.py",
    }.get(where, "evil.py")
    replace_first_line(llava_run, f"# {name}")
    message = use(tool, llava_run)
    assert f"settings.yaml says that {name!r} trained it, which is none of sft_llava.py, " in message
    assert "--recipe PATH. It is executed, so only one that you trust" in message and not executed.exists()


def test_the_command_line_names_any_file(llava_run, use, executed, tmp_path):
    """That it is executed shows that the files of the other test would have been, too."""
    replace_first_line(llava_run, "# evil.py")
    assert use("generate", llava_run, "--recipe", evil_recipe(tmp_path / "evil.py", executed)) is None
    assert executed.exists()


@pytest.fixture
def note(llava_run, use, capsys):
    """A function: a tool, the recipe's hash in settings.yaml or None, flags -> the notes that the tool prints."""

    def make(tool, digest, *flags):
        file = llava_run / "settings.yaml"
        lines = [line for line in file.read_text().split("\n") if "SHA-256 of the recipe" not in line]
        if digest:
            lines.insert(2, f"# SHA-256 of the recipe: {digest}")
        file.write_text("\n".join(lines))
        capsys.readouterr()
        assert use(tool, llava_run, *flags) is None
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]

    return make


@pytest.mark.parametrize("tool", TOOLS)
def test_a_recipe_with_other_contents_is_noted(note, llava_run, tool):
    """Once; the merged model has the run's settings.yaml, so it is noted of that, too."""
    (line,) = note(tool, "0" * 64)
    assert line.startswith(f"note: {llava_run} was trained by another version of {ROOT / 'sft_llava.py'}, or by an ")
    assert line.endswith("If you have that file, give it by --recipe")


def test_the_recipe_of_a_run_is_taken_without_a_note(note, tmp_path):
    """The same contents, an earlier version that wrote no hash, and an edited file, given by its path."""
    digest = hashlib.sha256((ROOT / "sft_llava.py").read_bytes()).hexdigest()
    edited = tmp_path / "edited.py"
    edited.write_text((ROOT / "sft_llava.py").read_text() + "\n# edited\n")
    assert note("generate", digest) == note("generate", None) == []
    assert note("generate", hashlib.sha256(edited.read_bytes()).hexdigest(), "--recipe", edited) == []
    assert "edited.py" in note("generate", digest, "--recipe", edited)[0]


# -------------------------------------------------------------------------------------------------- a model's own code


@pytest.fixture
def run_26(trained, tmp_path, executed):
    """A run of MiniCPM-V 2.6, whose settings say trust_remote_code: true; its code says that it was executed."""
    run = shutil.copytree(trained("finetune_minicpm_lora", "tiny_minicpm26").tmp_path / "out", tmp_path / "run26")
    assert "\ntrust_remote_code: true\n" in (run / "settings.yaml").read_text()
    files = list(run.glob("*.py"))
    assert files
    for file in files:
        file.write_text(f"open({str(executed)!r}, 'w').close()\n{file.read_text()}")
    return run


@pytest.mark.parametrize("tool", TOOLS)
def test_code_of_a_run_needs_the_flag(run_26, use, executed, tool):
    message = use(tool, run_26)
    assert message.startswith(f"error: {run_26} brings code of its own, which is executed only with ")
    assert "--trust_remote_code on the command line, whatever settings.yaml says" in message
    assert not executed.exists()
    assert use(tool, run_26, "--trust_remote_code") is None
    assert executed.exists()


@pytest.mark.parametrize(
    "text",
    ["trust-remote-code: true", "report_to: [none, --trust_remote_code]", "--config"],
)
def test_no_text_of_settings_is_such_a_flag(run_26, use, executed, tmp_path, text):
    """Nor is one in a file that --config names."""
    file, flags = run_26 / "settings.yaml", []
    if text == "--config":
        flags = ["--config", shutil.copy(file, tmp_path / "other.yaml")]
    lines = [line for line in file.read_text().split("\n") if not line.startswith(("trust_", "report_to"))]
    file.write_text("\n".join([*lines, "" if flags else text]))
    use("generate", run_26, *flags)
    assert not executed.exists()


@pytest.mark.parametrize(
    ("flags", "is_executed"),
    [
        (["--trust_remote_code", "true"], True),
        (["--trust_remote_code=true"], True),
        (["--trust-remote-code"], True),
        (["--trust_remote_code", "false"], False),
        (["--trust_remote_code=no"], False),
    ],
)
def test_spellings_of_the_flag(run_26, use, executed, flags, is_executed):
    assert (use("generate", run_26, *flags) is None) == is_executed == executed.exists()


def test_inspect_takes_no_trust_from_a_file(run_26, executed, tmp_path):
    """The base model's code, which settings.yaml names; with the flag it looks at the data next, which are gone."""
    flags = ["--config", run_26 / "settings.yaml", "--model_name_or_path", run_26, "--dataset_name", tmp_path / "gone"]
    argv = [str(ROOT / "finetune_minicpm_lora.py"), *map(str, flags)]
    assert "brings code of its own" in refusal(inspect_recipe.main, argv) and not executed.exists()
    refusal(inspect_recipe.main, [*argv, "--trust_remote_code"])
    assert executed.exists()


def test_nobody_is_asked_in_the_terminal(llava_run, use, executed, monkeypatch):
    """Transformers would ask whether to run code that a recipe does not refuse by itself; somebody says yes."""
    asked = []

    def say_yes(text):
        asked.append(text)
        return "y"

    monkeypatch.setattr("builtins.input", say_yes)
    (llava_run / "evil.py").write_text(f"open({str(executed)!r}, 'w').close()\nclass Evil: pass\n")
    for file in llava_run.glob("*config.json"):
        if file.name != "adapter_config.json":
            file.unlink()
    (llava_run / "processor_config.json").write_text('{"auto_map": {"AutoProcessor": "evil.Evil"}}')
    assert "it brings code of its own, which this recipe does not run" in use("generate", llava_run)
    assert asked == [] and not executed.exists()


# ------------------------------------------------------------------------------------------------------------- pickles


class Evil:
    """An object whose pickle, where it is loaded, writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write_pickle(path, executed, form="torch"):
    """Write a pickle that runs code: as torch.save writes it, or as it was long ago."""
    if form == "torch":
        torch.save({"weights": Evil(executed)}, path)
    else:
        path.write_bytes(pickle.dumps({"weights": Evil(executed)}))


PICKLES = "training_args.bin optimizer.pt scheduler.pt rng_state.pth pytorch_model.bin adapter_model.bin".split()
FORMS = ["torch", "plain"]


@pytest.mark.parametrize("form", FORMS)
def test_such_a_pickle_runs_code_where_it_is_loaded(tmp_path, executed, form):
    """Without this the other tests could not fail."""
    write_pickle(tmp_path / "x.pt", executed, form)
    with open(tmp_path / "x.pt", "rb") as file:
        torch.load(file, weights_only=False) if form == "torch" else pickle.load(file)
    assert executed.exists()


@pytest.mark.parametrize("tool", [*TOOLS, "generate, checkpoint", "inspect", "plot"])
def test_pickles_beside_the_weights_are_not_read(llava_run, tiny_llava, use, executed, tmp_path, uncounted, tool):
    """In the run, in its checkpoint, and in the base model: where weights are in .safetensors, nobody needs them."""
    base = shutil.copytree(tiny_llava / "model", tmp_path / "base")
    for folder in (llava_run, llava_run / "checkpoint-2", base):
        for name in (*PICKLES, "mm_projector.bin"):
            write_pickle(folder / name, executed)
    if tool == "inspect":
        argv = [ROOT / "sft_llava.py", "--config", llava_run / "settings.yaml", "--model_name_or_path", base, "--json"]
        with contextlib.redirect_stdout(io.StringIO()) as report:
            inspect_recipe.main([*map(str, argv), "--rows", "4"])
        assert '"parts"' in report.getvalue()
    elif tool == "plot":
        plot_run.main([str(llava_run), "--output", str(tmp_path / "plot.png")])
    else:
        run = llava_run / "checkpoint-2" if "checkpoint" in tool else llava_run
        assert use(tool.split(",")[0], run, "--model_name_or_path", base) is None
    assert not executed.exists()


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("form", FORMS)
def test_weights_that_are_a_pickle_with_code_get_a_message(llava_run, tiny_llava, use, executed, tmp_path, tool, form):
    """The adapter's; the base model's; those of a whole model."""
    base = shutil.copytree(tiny_llava / "model", tmp_path / "base")
    (base / "model.safetensors").unlink()
    write_pickle(base / "pytorch_model.bin", executed, form)
    message = use(tool, llava_run, "--model_name_or_path", base)
    assert f"cannot load {base} " in message and "pytorch_model.bin" in message and "weights_only" not in message
    if tool == "generate":
        assert use(tool, base, "--use_cpu") == message
    elif tool == "compare":
        assert use(tool, base, "--use_cpu", "--model_name_or_path", tiny_llava / "model") == message
    (llava_run / "adapter_model.safetensors").unlink()
    write_pickle(llava_run / "adapter_model.bin", executed, form)
    assert "adapter_model.bin is a pickle, which could run code: it is not read" in use(tool, llava_run)
    assert not executed.exists()


def test_inspect_needs_no_weights(tiny_llava, executed, tmp_path, uncounted):
    """So it says nothing of those that are a pickle with code."""
    base = shutil.copytree(tiny_llava / "model", tmp_path / "base")
    (base / "model.safetensors").unlink()
    write_pickle(base / "pytorch_model.bin", executed)
    flags = Recipe("sft_llava", tiny_llava, tmp_path).flags(model_name_or_path=base)
    with contextlib.redirect_stdout(io.StringIO()) as report:
        inspect_recipe.main([str(ROOT / "sft_llava.py"), "--json", "--rows", "4", *flags])
    assert '"parts"' in report.getvalue() and not executed.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by", ["recipe", "inspect"])
def test_a_projector_with_code_gets_a_message(tiny_parts, executed, tmp_path, form, by):
    file = tmp_path / "mm_projector.bin"
    write_pickle(file, executed, form)
    case = Recipe("llava_two_stage", tiny_parts, tmp_path)
    flags = case.flags(model_name_or_path=None, pretrain_mm_mlp_adapter=file)
    if by == "recipe":
        message = case.refusal(flags)
    else:
        message = refusal(inspect_recipe.main, [str(ROOT / "llava_two_stage.py"), *flags])
    assert f"--pretrain_mm_mlp_adapter {file}: it is empty, damaged, or a pickle that holds more than" in message
    assert not executed.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_a_base_model_with_code_in_its_weights_gets_a_message(request, name, form, executed, tmp_path):
    """From the recipe itself: torch's own text would advise to execute it."""
    case = Recipe(name, request.getfixturevalue(FOLDERS[name]), tmp_path)
    model = case.parse()[0].model_name_or_path
    base = shutil.copytree(model, tmp_path / "base")
    (base / "model.safetensors").unlink()
    write_pickle(base / "pytorch_model.bin", executed, form)
    message = refusal(case.module.main, case.flags(**SHORT, model_name_or_path=base))
    assert str(base) in message and "weights_only" not in message and not executed.exists()


def test_an_adapter_with_code_is_not_trained_further(trained, executed, tmp_path):
    case = trained("finetune_minicpm_lora")
    run = shutil.copytree(case.tmp_path / "out", tmp_path / "run")
    (run / "adapter_model.safetensors").unlink()
    write_pickle(run / "adapter_model.bin", executed)
    flags = case.flags(**SHORT, output_dir=tmp_path / "further", lora_weight_path=run)
    message = refusal(case.module.main, flags)
    assert f"--lora_weight_path {run}" in message and "weights_only" not in message and not executed.exists()


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_with_code_is_not_resumed(trained, name, file, executed, tmp_path):
    """One that cannot be recognized by its checksums, because it has none, as those of earlier versions."""
    case = trained(name)
    out = shutil.copytree(case.tmp_path / "out", tmp_path / "out")
    shutil.rmtree(out / "checkpoint-2")
    (out / "checkpoint-1/checksums.json").unlink(missing_ok=True)
    assert (out / "checkpoint-1" / file).exists()
    write_pickle(out / "checkpoint-1" / file, executed)
    flags = case.flags(**SHORT, output_dir=out, resume_from_checkpoint=out / "checkpoint-1")
    message = refusal(case.module.main, flags)
    assert "checkpoint-1" in message and "weights_only" not in message and not executed.exists()
