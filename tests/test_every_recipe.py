"""What every recipe promises in the same words: one file, settings that are flags, precision that picks itself."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields

import datasets
import pytest
import torch
import transformers
import yaml
from conftest import ROOT
from PIL import Image

from tools.generate import rows_of

RECIPES = ["sft_llava", "idefics2_docvqa", "dpo_idefics2", "finetune_minicpm_lora", "llava_two_stage"]
VALUES = {  # of a refused setting, where "x" would not be read at all
    "pad_to_multiple_of": "8",
    "model_init_kwargs": "{}",
    "fsdp": "full_shard",
    "label_smoothing_factor": "0.1",
    "gradient_checkpointing": "true",
    "train_sampling_strategy": "group_by_length",
    "accelerator_config": '{"split_batches": true}',
    "eval_packing": "true",
    "completion_only_loss": "true",
    "truncation_mode": "keep_end",
    **dict.fromkeys(["precompute_ref_batch_size", "ref_model_sync_steps", "dataset_num_proc"], "3"),
    **dict.fromkeys(["ref_model_mixup_alpha", "router_aux_loss_coef", "neftune_noise_alpha"], "0.5"),
    "gradient_checkpointing_kwargs": '{"use_reentrant": true}',
}


@pytest.fixture(params=RECIPES)
def recipe(request):
    return importlib.import_module(request.param)


def names(*classes):
    return {f.name for cls in classes for f in fields(cls) if f.init}


def every_name(recipe):
    return names(recipe.Settings, recipe.Training)


# -------------------------------------------------------------------------------------------------------- settings
CANNOT_WORK = {  # what would fail, or train something else, only after the weights are loaded
    "rate": (["--learning_rate", "nan"], "learning.rate"),
    "worst": (
        ["--load_best_model_at_end", "true", "--metric_for_best_model", "loss", "--greater_is_better", "true"],
        "--greater_is_better true would keep",
    ),
    "no rows": (
        ["--per_device_train_batch_size", "0"],
        "a step must have rows|256 rows in a step, 0 at once|128 rows in a step, 0 at once",
    ),
    "no metric": (
        ["--load_best_model_at_end", "true", "--metric_for_best_model", "rouge"],
        "--metric_for_best_model rouge",
    ),
}


@pytest.mark.parametrize("case", CANNOT_WORK)
def test_what_cannot_end_well_does_not_start(recipe, case, tmp_path):
    flags, message = CANNOT_WORK[case]
    data = ["--stage", "instruct"] if recipe.__name__ == "llava_two_stage" else []
    with pytest.raises(SystemExit, match=f"^error: .*(?i:{message})"):
        recipe.check(*recipe.parse(["--use_cpu", "--report_to", "none", "--output_dir", str(tmp_path), *data, *flags]))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_key_that_stands_twice_is_not_passed_over(recipe, name, tmp_path):
    """The last one would win, and the rest of the row be forgotten."""
    turns = {
        "sft_llava": "from value human gpt",
        "llava_two_stage": "from value human gpt",
        "finetune_minicpm_lora": "role content user assistant",
    }.get(recipe.__name__)
    if turns:
        who, what, *speakers = turns.split()
        row = json.dumps({"conversations": [{who: speaker, what: "WORDS"} for speaker in speakers]}).replace(
            '"WORDS"', f'"one", "{what}": "two"'
        )
    else:
        row = '{"image": "0.png", "question": "which?", "question": "why?", "answers": "one", "chosen": "one", "rejected": "two"}'
    (tmp_path / name).write_text(f"[{row}]" if name.endswith(".json") else f"{row}\n")
    Image.new("RGB", (56, 56)).save(tmp_path / "0.png")
    flag = "data_path" if "data_path" in every_name(recipe) else "dataset_name"
    settings, training = recipe.parse(
        [
            "--use_cpu",
            f"--{flag}",
            str(tmp_path / name),
            *(["--stage", "instruct"] if recipe.__name__ == "llava_two_stage" else []),
        ]
    )
    with pytest.raises(SystemExit) as end:
        rows_of(recipe, str(tmp_path / name), "train", settings)
    assert re.search(
        rf"^error: cannot read {tmp_path / name}: (line 1: )?a key appears twice in .*(two|why\?)", end.value.code
    )


def test_every_setting_is_a_flag_with_help(recipe, capsys):
    with pytest.raises(SystemExit) as end:
        recipe.parse(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert not {name for name in every_name(recipe) if not re.search(rf"--{name}\b", shown)}
    own = [f for cls in (recipe.Settings, recipe.Training) for f in fields(cls) if f.name in cls.__annotations__]
    assert all(f.metadata["help"].strip().endswith(".") for f in own) and len(own) > 30


def refused(recipe):
    """What a recipe refuses; what no recipe uses stands in the workbench."""
    return recipe.REFUSED_HERE + recipe.REFUSED_EVERYWHERE


def test_the_names_that_may_change_or_are_refused_are_names_of_settings(recipe):
    """What may change is one list in the workbench: some of it are names of other recipes."""
    known = set().union(*(every_name(importlib.import_module(name)) for name in RECIPES))
    assert set(refused(recipe)) <= every_name(recipe) and set(recipe.MAY_CHANGE_ON_RESUME) <= known
    assert not set(refused(recipe)) & set(recipe.MAY_CHANGE_ON_RESUME)


@pytest.mark.parametrize(
    "recipe, name", [(r, name) for r in RECIPES for name in refused(importlib.import_module(r))], indirect=["recipe"]
)
def test_settings_that_would_be_ignored_are_refused_by_name(recipe, name):
    default = {f.name: f.default for f in fields(recipe.Training)}[name]
    value = str(not default) if isinstance(default, bool) else VALUES.get(name, "x")
    with pytest.raises(SystemExit, match=rf"^error: --{name}: not used by this recipe"):
        recipe.parse(["--use_cpu", f"--{name}", value])


def test_settings_are_kept_as_given_and_read_back(recipe, tmp_path):
    quantized = {"load_in_4bit": False, "q_lora": True}.items() & {
        (name, not getattr(recipe.Settings, name, None)) for name in every_name(recipe)
    }
    changed = {"lora_r": 4, "learning_rate": 1e-5, "seed": 7, "eval_fraction": 0.1, **dict(quantized)}
    argv = [
        "--use_cpu",
        "--hub_token",
        "secret",
        "--resume_from_checkpoint",
        "false",
        "--lr_scheduler_kwargs",
        '{"num_cycles": 2}',
        "--report_to",
        "tensorboard",
    ]
    argv += [part for name, value in changed.items() for part in (f"--{name}", str(value))]
    settings, training = recipe.parse(argv)
    assert (
        set(training.as_given) == every_name(recipe) - {"hub_token", "resume_from_checkpoint"}
        and training.hub_token == "secret"
    )
    assert {name: getattr(settings, name, getattr(training, name, None)) for name in changed} == changed
    (tmp_path / "run.yaml").write_text(text := yaml.safe_dump(training.as_given, sort_keys=False))
    again = recipe.parse(["--config", str(tmp_path / "run.yaml")])
    assert again[1].as_given == training.as_given and again[0] == settings and "secret" not in text
    assert again[1].resume_from_checkpoint == "auto"  # also where a run began with false, or from a checkpoint
    not_kept = {"hub_token": 0, "resume_from_checkpoint": 0}
    assert {**again[1].to_dict(), **not_kept} == {**training.to_dict(), **not_kept}
    overridden = recipe.parse(["--config", str(tmp_path / "run.yaml"), "--lora_r", "2"])
    assert overridden[1].as_given == {**training.as_given, "lora_r": 2}


BAD_FLAGS = {
    "unknown": ["--lora_rank", "3"],
    "abbreviated": ["--lora_al", "3"],
    "not a number": ["--lora_r", "many"],
    "not a choice": ["--on_bad_rows", "ignore"],
    "not a choice of long rows": ["--on_long_rows", "cut"],
    "not a bool": ["--load_in_4bit", "perhaps"],
    "no such optimizer": ["--optim", "adam2"],
    "steps that do not fit": ["--load_best_model_at_end", "true", "--save_steps", "30", "--eval_steps", "20"],
    "no such config": ["--config", "nowhere.yaml"],
}


@pytest.mark.parametrize("argv", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_a_bad_flag_is_one_line(recipe, argv):
    with pytest.raises(SystemExit) as end:
        recipe.parse(["--use_cpu", *argv])
    assert re.fullmatch(r"error: .*", end.value.code) and argv[-1].split(".")[0] in end.value.code


BAD_YAML = {
    "lora_rank: 3": "lora_rank",
    "max_length: long": "max_length",
    "lora_r: null": "lora_r must have a value",
    "max_steps: null": "max_steps must have a value",
    "seed:": "seed must have a value",
    "on_bad_rows: ignore": "on_bad_rows",
    "lora_r: 1.5": "lora_r",
    "lora_r: [1, 2]": "2",
    "nonsense: null": "nonsense",
    "save_only_model: true": "--save_only_model",
    "[1]": "run.yaml",
    "a: [": "run.yaml",
    "\ud83d": "run.yaml",
}


@pytest.mark.parametrize("text, named", BAD_YAML.items(), ids=map(ascii, BAD_YAML))
def test_a_bad_config_file_is_refused(recipe, text, named, tmp_path):
    (tmp_path / "run.yaml").write_text(text, errors="surrogatepass")
    with pytest.raises(SystemExit) as end:
        recipe.parse(["--use_cpu", "--config", str(tmp_path / "run.yaml")])
    assert str(end.value.code).startswith("error: ") and named in end.value.code


@pytest.mark.parametrize(
    "gpu, given, expected",
    [
        (None, [], (False, False)),
        ("bf16", [], (True, False)),
        ("T4", [], (False, True)),
        ("bf16", ["--fp16"], (False, True)),
        ("T4", ["--bf16", "false"], (False, False)),
        ("bf16", ["--use_cpu"], (False, False)),
        ("T4", ["--use_cpu"], (False, False)),
    ],
)
def test_precision_picks_itself(recipe, gpu, given, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu == "bf16" or including_emulation
    )
    monkeypatch.setattr(
        recipe.Training.__mro__[1], "__post_init__", lambda self: None
    )  # the library's would open the GPU
    _, training = recipe.parse(given)
    assert (bool(training.bf16), bool(training.fp16)) == expected


def test_several_gpus_need_a_launcher(recipe, monkeypatch):
    monkeypatch.setattr(recipe.Training, "n_gpu", property(lambda self: 4))
    with pytest.raises(
        SystemExit,
        match=rf"^error: 4 GPUs.*accelerate launch --num_processes 4 {recipe.__name__}.py.*CUDA_VISIBLE_DEVICES=0",
    ):
        recipe.check(*recipe.parse(["--use_cpu"]))


# -------------------------------------------------------------------------------------------------------- one file
def test_the_header_asks_for_what_requirements_txt_asks_for(recipe):
    header = re.search(r"(?ms)^# /// script\n(.*?)^# ///$", (ROOT / f"{recipe.__name__}.py").read_text())[1]
    script = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in header.splitlines(True)))
    pinned = (ROOT / "requirements.txt").read_text().split()
    assert script["dependencies"] and set(script["dependencies"]) <= set(pinned)


def test_a_recipe_is_one_file_and_importing_it_does_nothing(recipe, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "cwd").mkdir()
    source = (ROOT / f"{recipe.__name__}.py").read_text()
    (tmp_path / "lib" / "alone.py").write_text(source)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "lib"), "PYTHONDONTWRITEBYTECODE": "1"}
    code = (
        "import torch, os; s = torch.get_rng_state(), dict(os.environ); import alone; import torch.distributed as d; "
        + (
            "assert torch.equal(s[0], torch.get_rng_state()) and not d.is_initialized() and not torch.cuda.is_initialized()"
        )
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "cwd", env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert not any((tmp_path / "cwd").iterdir()) and len([*(tmp_path / "lib").iterdir()]) == 1
    imports = {name for node in ast.walk(ast.parse(source)) for name in imported(node)}
    assert imports and not imports & {path.stem for path in ROOT.iterdir()} - {"datasets"}


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [node.module.split(".")[0] if node.module else "."] if isinstance(node, ast.ImportFrom) else []


# -------------------------------------------------------------------------------------------------------- loaders
def test_the_loader_works_ahead_in_processes_of_its_own(recipe, tmp_path, monkeypatch):
    """Four of them, each two batches ahead (torch's default), into pinned memory; that is left to itself on a CPU, where it has no effect."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    argv = ["--output_dir", str(tmp_path), "--report_to", "none", "--eval_strategy", "no"]
    _, training = recipe.parse(["--use_cpu", *argv])
    rows = datasets.Dataset.from_list([{"number": n} for n in range(40)])
    collate = lambda rows: {"number": torch.tensor([row["number"] for row in rows])}
    loader = lambda: transformers.Trainer(torch.nn.Linear(1, 1), training, collate, rows).get_train_dataloader()
    asked = training.as_given["dataloader_pin_memory"], training.dataloader_pin_memory, loader().pin_memory
    assert asked == (True, False, False)  # asked for, turned off by --use_cpu
    training.dataloader_pin_memory = True
    assert (loader().num_workers, loader().prefetch_factor, loader().pin_memory) == (4, 2, True)
    with pytest.warns(UserWarning, match="pin_memory.*no accelerator is found"):
        seen = [batch["number"] for batch in loader()]
    assert sorted(torch.cat(seen).tolist()) == list(range(40)) and {len(some) for some in seen} == {
        training.train_batch_size
    }
    assert not any(some.is_pinned() for some in seen)


FORKED = """
import sys, datasets, torch
recipe = __import__(sys.argv[1])
stage = ["--stage", "instruct"] if sys.argv[1] == "llava_two_stage" else []
settings, training = recipe.parse(["--use_cpu", "--output_dir", sys.argv[2], *stage])
big = lambda: torch.cat([torch.ones(300_000), torch.ones(300_000)])  # work for several threads
big()
collator = lambda rows: {"input_ids": torch.zeros(1, 1 + int(big().sum() > 0)), "attention_mask": torch.ones(1, 2), "labels": torch.zeros(1, 2), "completion_mask": torch.ones(1, 2)}
collator.image_columns, collator.images_of = ["image"], lambda row: []
data = datasets.Dataset.from_dict({"row": list(range(1001)), "image": [None] * 1001, "folder": [""] * 1001})
print(len(recipe.check_and_measure_rows(data, "rows", collator, settings, training)), "rows,", torch.get_num_threads(), "threads")
"""


def test_many_rows_are_checked_where_pytorch_has_several_threads(recipe, tmp_path):
    """As it has by default: forked processes must not wait for threads that only their parent has."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", FORKED, recipe.__name__, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["1001 rows, 2 threads"], done.stderr[-3000:]
