"""Settings are flags, in every recipe: --help, names from elsewhere, config files, what is refused, precision."""

import importlib
import re
from dataclasses import fields

import pytest
import torch
import yaml
from recipes import NAMES

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


@pytest.fixture(params=NAMES)
def recipe(request):
    return importlib.import_module(request.param)


def every_name(recipe):
    """The names of all settings of a recipe."""
    return {field.name for cls in (recipe.Settings, recipe.Training) for field in fields(cls) if field.init}


def stage(recipe):
    """The flags without which a recipe has no learning rate to speak of."""
    return ["--stage", "instruct"] if recipe.__name__ == "llava_two_stage" else []


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
    argv = ["--use_cpu", "--report_to", "none", "--output_dir", str(tmp_path), *stage(recipe), *flags]
    with pytest.raises(SystemExit, match=f"^error: .*(?i:{message})"):
        recipe.check(*recipe.parse(argv))


def help_text(recipe, capsys, flag):
    with pytest.raises(SystemExit) as end:
        recipe.parse([flag])
    assert end.value.code == 0
    return capsys.readouterr().out


def own_settings(recipe):
    """{name: field} of the settings that stand in the recipe itself, and that it does not refuse."""
    own = {}
    for cls in (recipe.Settings, recipe.Training):
        own |= {field.name: field for field in fields(cls) if field.name in cls.__annotations__}
    return {name: field for name, field in own.items() if name not in refused(recipe)}


def test_help_fits_on_a_screen_and_shows_commands_groups_and_defaults(recipe, capsys):
    lines = help_text(recipe, capsys, "--help").splitlines()
    assert 60 <= len(lines) <= 82 and max(map(len, lines)) <= 128
    assert lines[0] == recipe.__doc__.splitlines()[0]
    commands = [line.strip() for line in lines if line.startswith(("    python ", "    accelerate "))]
    assert len(commands) >= 3 and all(command in recipe.__doc__ for command in commands)
    shown = {line.split()[0][2:]: line for line in lines if line.startswith("  --")}
    own = own_settings(recipe)
    assert shown.keys() == own.keys() and len(own) > 40
    assert all(line.endswith(f". {own[name].metadata['help']}"[2:]) for name, line in shown.items())
    for name, value in {
        "max_eval_rows": recipe.Settings.max_eval_rows,
        "on_bad_rows": "stop",
        "eval_strategy": "steps",
    }.items():
        assert shown[name].split()[1] == str(value)
    headings = [line.split(":")[0].split(",")[0] for line in lines if line and line[0] not in " -"][1:]
    assert {"model", "adapter", "data", "training", "evaluation"} <= set(headings)
    assert "--help_all" in lines[-1]


def test_help_all_shows_every_setting(recipe, capsys):
    shown = help_text(recipe, capsys, "--help_all")
    assert not {name for name in every_name(recipe) if not re.search(rf"--{name}\b", shown)}


ELSEWHERE = {  # a name that people bring from other scripts: the names here
    "max_seq_length": "max_length model_max_length",
    "cutoff_len": "max_length model_max_length",
    "evaluation_strategy": "eval_strategy",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "lora_rank": "lora_r",
    "dataset": "dataset_name",
    "data_path": "dataset_name",
    "gradient_checkpointing": "activation_checkpointing",
    "torch_dtype": "bf16",
    "warmup_ratio": "warmup_steps",
    "bits": "load_in_4bit q_lora",
    "model_id": "model_name_or_path",
    "per_device_train_batchsize": "per_device_train_batch_size",  # a slip
    "lora-alhpa": "lora_alpha",
}


@pytest.mark.parametrize("name, here", ELSEWHERE.items(), ids=ELSEWHERE)
def test_an_unknown_flag_is_answered_with_the_name_here(recipe, name, here):
    if name == "data_path" and TWO_NAMES[recipe.__name__]:
        pytest.skip("is known here")
    known = [one for one in here.split() if one in every_name(recipe)]
    value = str(not getattr(recipe.Training, name, False))
    with pytest.raises(SystemExit, match=f"^error: --{name}.*--({'|'.join(known)})\\b"):
        recipe.parse(["--use_cpu", f"--{name}", value])


def test_several_unknown_flags_are_named_at_once(recipe):
    message = "--epochs.*--num_train_epochs.*--lr=1.*--learning_rate.*--zzz: unknown.*--help"
    with pytest.raises(SystemExit, match=message):
        recipe.parse(["--epochs", "3", "--lr=1", "--zzz"])
    with pytest.raises(SystemExit, match="^error: run.yaml: unknown"):
        recipe.parse(["run.yaml"])


TWO_NAMES = dict.fromkeys(NAMES, False) | {"finetune_minicpm_lora": True, "llava_two_stage": True}


@pytest.mark.parametrize("name, other", [("dataset_name", "data_path"), ("eval_dataset_name", "eval_data_path")])
def test_data_path_is_another_name_of_dataset_name(name, other, tmp_path):
    for recipe in (importlib.import_module(recipe) for recipe, two in TWO_NAMES.items() if two):
        settings, training = recipe.parse(["--use_cpu", f"--{other}", "a.json"])
        assert getattr(settings, name) == training.as_given[name] == "a.json" and other not in training.as_given
        assert getattr(recipe.parse([f"--{other}=a", f"--{name}", "a"])[0], name) == "a"
        with pytest.raises(SystemExit, match=f"^error: --{other} and --{name} are one setting"):
            recipe.parse([f"--{other}", "a", f"--{name}=b"])
        (tmp_path / "settings.yaml").write_text(f"{other}: old.json\n")  # as an earlier version wrote it
        assert getattr(recipe.parse(["--config", str(tmp_path / "settings.yaml")])[0], name) == "old.json"
        assert getattr(recipe.parse(["--config", f"{tmp_path}/settings.yaml", f"--{name}", "b"])[0], name) == "b"


def refused(recipe):
    """What a recipe refuses; what no recipe uses stands in the workbench."""
    return recipe.REFUSED_HERE + recipe.REFUSED_EVERYWHERE


def test_the_names_that_may_change_or_are_refused_are_names_of_settings(recipe):
    """What may change is one list in the workbench: some of it are names of other recipes."""
    known = set().union(*(every_name(importlib.import_module(name)) for name in NAMES))
    assert set(refused(recipe)) <= every_name(recipe) and set(recipe.MAY_CHANGE_ON_RESUME) <= known
    assert not set(refused(recipe)) & set(recipe.MAY_CHANGE_ON_RESUME)


@pytest.mark.parametrize(
    "recipe, name", [(r, name) for r in NAMES for name in refused(importlib.import_module(r))], indirect=["recipe"]
)
def test_settings_that_would_be_ignored_are_refused_by_name(recipe, name):
    default = {f.name: f.default for f in fields(recipe.Training)}[name]
    value = str(not default) if isinstance(default, bool) else VALUES.get(name, "x")
    with pytest.raises(SystemExit, match=rf"^error: --{name}: not used by this recipe"):
        recipe.parse(["--use_cpu", f"--{name}", value])


def test_settings_are_kept_as_given_and_read_back(recipe, tmp_path):
    quantized = (
        {"q_lora": True} if hasattr(recipe.Settings, "q_lora") else {"load_in_4bit": not recipe.Settings.load_in_4bit}
    )
    changed = {"lora_r": 4, "learning_rate": 1e-5, "seed": 7, "eval_fraction": 0.1, **quantized}
    argv = ["--use_cpu", "--hub_token", "secret", "--resume_from_checkpoint", "false", "--report_to", "tensorboard"]
    argv += ["--lr_scheduler_kwargs", '{"num_cycles": 2}']
    for name, value in changed.items():
        argv += [f"--{name}", str(value)]
    settings, training = recipe.parse(argv)
    assert set(training.as_given) == every_name(recipe) - {"hub_token", "resume_from_checkpoint"}
    assert training.hub_token == "secret"
    assert {name: getattr(settings, name, getattr(training, name, None)) for name in changed} == changed
    text = yaml.safe_dump(training.as_given, sort_keys=False)
    assert "secret" not in text
    file = tmp_path / "run.yaml"
    file.write_text(text)
    settings_again, training_again = recipe.parse(["--config", str(file)])
    assert training_again.as_given == training.as_given and settings_again == settings
    assert training_again.resume_from_checkpoint == "auto"  # also where a run began with false, or from a checkpoint
    not_kept = {"hub_token": 0, "resume_from_checkpoint": 0}
    assert training_again.to_dict() | not_kept == training.to_dict() | not_kept
    _, overridden = recipe.parse(["--config", str(file), "--lora_r", "2"])
    assert overridden.as_given == training.as_given | {"lora_r": 2}


BAD_FLAGS = {
    "abbreviated": ["--lora_al"],
    "not a number": ["--lora_r", "many"],
    "not a choice": ["--on_bad_rows", "ignore"],
    "not a choice of long rows": ["--on_long_rows", "cut"],
    "not a bool": ["--activation_checkpointing", "perhaps"],
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
    def has_bf16(including_emulation=True):
        return gpu == "bf16" or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", has_bf16)
    library = recipe.Training.__mro__[1]
    monkeypatch.setattr(library, "__post_init__", lambda self: None)  # it would open the GPU
    _, training = recipe.parse(given)
    assert (bool(training.bf16), bool(training.fp16)) == expected


def test_several_gpus_need_a_launcher(recipe, monkeypatch):
    monkeypatch.setattr(recipe.Training, "n_gpu", property(lambda self: 4))
    launch = f"accelerate launch --num_processes 4 {recipe.__name__}.py"
    with pytest.raises(SystemExit, match=f"^error: 4 GPUs.*{launch}.*CUDA_VISIBLE_DEVICES=0"):
        recipe.check(*recipe.parse(["--use_cpu"]))
