"""What a recipe saved, and the recipe that can read it: what the tools know of both."""

import contextlib
import functools
import importlib.util
import json
import os
import pickle
import re
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, dynamic_module_utils
from transformers.hf_argparser import string_to_bool
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import cached_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.program import fail, flag_parser  # noqa: E402
from workbench.sync import RECIPES  # noqa: E402
from workbench.workbench import RECIPE_NOTE, question_turn, sha256_of  # noqa: E402

# What a model's file raises that is missing, damaged, no file of weights, or a pickle that would run code.
UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)
# Only a flag allows a model's own code: Transformers would ask in the terminal, where a recipe does not say no.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
# What a recipe must have to be asked.
CONTRACT = """parse check load_processor load_data load_model load_image text_of BadRow Settings Collator.messages_of
Collator.tokenize"""


# ------------------------------------------------------------------------------------------------------------ recipes


def home(run):
    """The folder whose settings.yaml says how a run was trained: its own, or, of a checkpoint, the one around it."""
    folder = Path(run).absolute()
    is_part_of_run = folder.name.startswith("checkpoint-") and not (folder / "settings.yaml").exists()
    return folder.parent if is_part_of_run else folder


def recipe_of(run):
    """The file's name in the first line of a run's settings.yaml; None where no line names one."""
    config = home(run) / "settings.yaml"
    if not config.is_file():
        return None
    first_line = config.read_text(encoding="utf-8", errors="replace").split("\n")[0]
    name = first_line.removeprefix("#").strip()
    return name if name.endswith(".py") else None


def trained_by(run):
    """The recipe of this repository that trained a run, by its name. Raises SystemExit for any other file: whoever
    wrote settings.yaml would choose what is executed here."""
    name = recipe_of(run)
    if name is None:
        name = "sft_llava.py"
        note = f"no settings.yaml says which recipe {run} is of: taken for {name}'s, or else give --recipe"
        print(f"note: {note}", file=sys.stderr)
    if name not in RECIPES:
        fail(
            f"{run}: its settings.yaml says that {name[:200]!r} trained it, which is none of {', '.join(RECIPES)}. "
            "Name the file yourself: --recipe PATH. It is executed, so only one that you trust"
        )
    return Path(__file__).parents[1] / name


def warn_of_another_recipe(run, path):
    """Say where a run was trained by a file with other contents than this recipe."""
    config = home(run) / "settings.yaml"
    if not config.is_file():
        return
    recorded = re.search(f"^{RECIPE_NOTE}(\\w+)", config.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    if recorded and recorded[1] != sha256_of(path):  # earlier versions recorded none
        print(
            f"note: {run} was trained by another version of {path}, or by an edited one (settings.yaml has its "
            "SHA-256), which may have asked otherwise. If you have that file, give it by --recipe",
            file=sys.stderr,
        )


def load_recipe(path, run, contract=CONTRACT):
    """The recipe as a module: this file, or else the one of this repository that the run's settings.yaml names. Raises
    SystemExit."""
    if path is None:
        path = trained_by(run)
    if not path.is_file():
        message = f"{path}: {'it is a folder' if path.is_dir() else 'no such file'}; needed is a recipe"
        if run:
            message += f", which {run} was trained by: --recipe"
        fail(message)
    module = import_once(path)
    missing = [part for part in contract.split() if not has(module, part)]
    if missing:
        fail(f"{path} is no recipe: it has no {', '.join(missing)}")
    if run:
        warn_of_another_recipe(run, path)
    return module


def import_once(path):
    """A recipe's file -> its module, the same one each time: several processes could not be given the functions of a
    module that was replaced. Raises SystemExit."""
    name = f"recipe_{path.stem}"
    module = sys.modules.get(name)
    if module is not None and os.path.samefile(module.__file__, path):
        return module
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        fail(f"{path} is no Python file; needed is a recipe")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:  # somebody else's file
        del sys.modules[name]
        fail(f"{path} cannot be imported as a recipe: {type(e).__name__}: {e}")
    return module


def has(module, part):
    """Whether a module has a part, such as Collator.tokenize."""
    return functools.reduce(lambda holder, name: getattr(holder, name, None), part.split("."), module) is not None


# -------------------------------------------------------------------------------------------------- rows and questions


def rows_of(recipe, name, split, settings):
    """The rows of a data set, as the recipe reads them: by its read_rows where its rows have a form of their own."""
    read = getattr(recipe, "read_rows", None) or recipe.read_dataset
    return read(name, split, settings)


def own_rows(recipe, run, settings, training, collator):
    """The rows that a run was evaluated on, None where it held none out. Raises SystemExit for a run of an earlier
    version, which may have held out others."""
    config = home(run) / "settings.yaml"
    if config.exists() and recipe.ROWS_NOTE not in config.read_text(encoding="utf-8"):
        fail(
            f"{run} is of an earlier version of {Path(recipe.__file__).name}, which may have held out other rows: "
            "name the rows, by --dataset_name"
        )
    return recipe.load_data(settings, training, collator)[1]


def user_turn(collator, question, images):
    """A question about PIL images as the turn of a user: in the recipe's form, where it has one of its own."""
    return getattr(collator, "user_turn", question_turn)(question, images)


# ----------------------------------------------------------------------------------------------------- settings, model


def four_bit_flag(recipe):
    """The recipe's setting that loads weights in 4 bits."""
    return "load_in_4bit" if hasattr(recipe.Settings, "load_in_4bit") else "q_lora"


def trust_only_flags(settings, flags):
    """settings.trust_remote_code becomes what the flags on the command line say of it, whatever a file says: false
    without them. Of recipes that have no such setting nothing changes."""
    if hasattr(settings, "trust_remote_code"):
        parser = flag_parser(None)
        parser.add_argument("--trust_remote_code", nargs="?", const="true", default="false")
        settings.trust_remote_code = string_to_bool(parser.parse_known_args(flags)[0].trust_remote_code)


def base_name(settings):
    """The model that a run began with, as messages name it."""
    return settings.model_name_or_path or f"{settings.vision_tower} + {settings.language_model}"


def load(recipe, run, flags, base_only=False):
    """RUN and the recipe's flags -> (whether RUN is an adapter, the processor saved with it, settings, training).

    settings.model_name_or_path is what to load: what is beneath an adapter; of a whole model itself, or with
    base_only what it was trained from (None: its parts, joined once more). Raises SystemExit where RUN is not all
    there, or its adapter is one for another base model than settings.yaml says.
    """
    is_adapter = check_files(run)
    trained_on = adapters_base(run) if is_adapter else None
    settings, training = read_settings(recipe, run, flags, is_adapter, trained_on)
    is_given = "model_name_or_path" in given_settings(flags, training)
    base = settings.model_name_or_path
    if is_adapter:
        base = base_of_adapter(run, settings, trained_on, is_given)
    elif not base_only or not (is_given or (home(run) / "settings.yaml").exists()):
        base = str(run)
        forget_projector(settings)
    elif base is None:  # its parts are joined in memory: with adapters the recipe would write what it joins to disk
        settings.lora_r = 0
    if base and Path(base, "adapter_config.json").exists():
        fail(f"--model_name_or_path {base} is an adapter itself; needed is the model beneath")
    processor = load_processor(recipe, run, settings)
    settings.model_name_or_path = base
    if is_adapter:
        check_kind(run, settings, trained_on, processor)
        is_given = "enable_thinking" in given_settings(flags, training)
        if is_given and hasattr(recipe, "set_thinking"):  # perhaps not as the run was trained
            recipe.set_thinking(processor, settings.enable_thinking)
    return is_adapter, processor, settings, training


def given_settings(flags, training):
    """The names of the settings that are given as flags: some have a second name."""
    names = [flag.split("=")[0] for flag in flags if flag.startswith("--")]
    return {training.second_names.get(name, name).removeprefix("--") for name in names}


def check_files(run):
    """Whether RUN is an adapter. Raises SystemExit where it is a folder and not all is there."""
    if not Path(run).is_dir():  # a name on the hub
        return False
    names = {path.name for path in Path(run).iterdir()}
    is_adapter = "adapter_config.json" in names
    if not is_adapter and "config.json" not in names:
        remedy = "; needed is what a recipe saved"
        if any(name.startswith("checkpoint-") for name in names):
            remedy = ", but checkpoints: the same training command finishes it"
        fail(f"{run} holds no adapter (adapter_config.json) and no model (config.json){remedy}")
    if is_adapter and "adapter_model.safetensors" not in names:
        message = f"{run} holds an adapter without its weights (adapter_model.safetensors)"
        if "adapter_model.bin" in names:
            message += "; adapter_model.bin is a pickle, which could run code: it is not read"
        fail(message)
    if not names & {"processor_config.json", "preprocessor_config.json"}:
        fail(
            f"{run} holds no processor (processor_config.json); recipes save it beside the weights: "
            f"AutoProcessor.from_pretrained(BASE).save_pretrained('{run}')"
        )
    return is_adapter


def adapters_base(run):
    """The base model that an adapter names. Raises SystemExit."""
    try:
        return json.loads(Path(run, "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as e:
        fail(f"{run}: its adapter_config.json is damaged ({type(e).__name__}: {e})")


def read_settings(recipe, run, flags, is_adapter, trained_on):
    """-> (settings, training): the run's settings.yaml, and the flags that are given. Raises SystemExit."""
    config = home(run) / "settings.yaml"
    own = []
    if config.exists():
        own += ["--config", str(config)]
    elif is_adapter:
        own += ["--model_name_or_path", str(trained_on)]
    if not is_adapter:  # in 16 bits unless 4 are asked for
        own += [f"--{four_bit_flag(recipe)}", "false"]
    try:
        settings, training = recipe.parse([*own, *flags])
    except SystemExit as e:
        name = recipe_of(run)
        if name and name != Path(recipe.__file__).name:
            cause = str(e.code).removeprefix("error: ")
            fail(f"{run} is of {name}, and {recipe.__file__} does not take its settings: {cause}")
        raise
    trust_only_flags(settings, flags)
    recipe.check(settings, training)
    return settings, training


def base_of_adapter(run, settings, trained_on, is_given):
    """The model to put an adapter on. is_given: it is named on the command line. Raises SystemExit."""
    base = settings.model_name_or_path
    if base is None:  # an adapter on joined parts: the run holds them, wherever it is by now
        forget_projector(settings)
        return str(home(run) / "base")
    if trained_on and os.path.normpath(trained_on) != os.path.normpath(base):
        if not is_given:
            fail(
                f"the adapter in {run} is one for {trained_on}, settings.yaml says {base}: "
                "which it is, say by --model_name_or_path"
            )
        print(
            f"note: the adapter in {run} was trained on {trained_on}, it is put on {base}, as asked", file=sys.stderr
        )
    return base


def forget_projector(settings):
    """The model to load has a projector of its own by now."""
    if hasattr(settings, "pretrain_mm_mlp_adapter"):
        settings.pretrain_mm_mlp_adapter = None


def load_processor(recipe, run, settings):
    """The processor that was saved with a run, or that a model has. Raises SystemExit."""
    settings.model_name_or_path = str(run)
    try:
        return recipe.load_processor(settings)
    except SystemExit as e:
        cause = str(e.code).removeprefix("error: ")
        if not Path(run).is_dir():
            cause = f"{run}: there is no such folder, and as a model of the hub: {cause}"
        fail(code_not_executed(settings) or cause)


def code_not_executed(settings):
    """What to say of a model whose own code a recipe would execute, and was not allowed to; None of any other."""
    if getattr(settings, "trust_remote_code", True):  # recipes without this setting execute no such code
        return None
    model = settings.model_name_or_path
    if not any("auto_map" in values for values in processor_files(model, settings.model_revision)):
        return None
    return (
        f"{model} brings code of its own, which is executed only with --trust_remote_code on the command line, "
        "whatever settings.yaml says: read that code, then give the flag"
    )


def check_kind(run, settings, trained_on, processor):
    """Raises SystemExit where the base model is of another kind than the run's processor."""
    base, revision, found = settings.model_name_or_path, settings.model_revision, type(processor).__name__
    kind = None
    with contextlib.suppress(OSError, ValueError):  # load_model has a message for that
        kind = PreTrainedConfig.get_config_dict(base, revision=revision)[0].get("model_type")
    is_another = kind and PROCESSOR_MAPPING_NAMES.get(kind, found) != found
    if is_another and found not in processors_named_by(base, revision):  # Pixtral is a llava with its own processor
        fail(
            f"the adapter in {run}, trained on {trained_on}, does not fit {base}: "
            f"that is a {kind}, and the run has a {found}"
        )


def processors_named_by(model, revision):
    """The classes of processors that a model's own files name."""
    return {values.get("processor_class") for values in processor_files(model, revision)}


def processor_files(model, revision):
    """The contents, each a dict, of a model's own files about its processor, of those that can be read."""
    found = []
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            path = cached_file(model, name, revision=revision)
            found.append(dict(json.loads(Path(path).read_text(encoding="utf-8"))))
    return found


def load_collator(recipe, processor, settings, training):
    """The recipe's Collator, which reads from the model that settings.model_name_or_path names where its answers end.
    Raises SystemExit."""
    try:
        return recipe.Collator(processor, settings, training)
    except (OSError, ValueError) as e:
        fail(cannot_load(settings, e))


def load_model(recipe, settings, training):
    """The model that settings.model_name_or_path names, for answering. Raises SystemExit."""
    try:
        return recipe.load_model(settings, training).eval()
    except UNREADABLE as e:
        fail(cannot_load(settings, e))


def cannot_load(settings, error):
    """The message for a model that is not where it should be, or that cannot be read."""
    cause = " ".join(str(error).split())
    if isinstance(error, (pickle.UnpicklingError, EOFError)):  # torch's own text advises to execute what is in it
        cause = (
            "its weights are in a pickle (pytorch_model.bin) that is damaged, or holds more than weights; nothing of "
            "it was executed. Take the model from where it has them as .safetensors"
        )
    return f"cannot load {base_name(settings)} (another place: --model_name_or_path): {cause}"


def put_on(model, run, base, name="default"):
    """A base model, of that name, or one that has adapters already -> with the adapter of a run on it, too. Raises
    SystemExit where that is damaged, or one for another model."""
    # PEFT takes adapter_model.bin only where this file is missing: no pickle is read.
    try:
        with safe_open(Path(run, "adapter_model.safetensors"), "pt") as file:
            saved = {key for key in file.keys() if ".base_layer." not in key}  # noqa: SIM118, it is no dict
    except (OSError, SafetensorError) as e:
        fail(f"{run}: its adapter_model.safetensors is damaged, or cannot be read: {e}")
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(run, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, run, adapter_name=name)
        wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).keys()
        other = sorted(saved ^ wanted)
        if other:  # PEFT would only warn, and leave these untrained
            raise ValueError(f"{len(other)} weights are of the adapter only, or of the model only, such as {other[0]}")
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as e:  # RuntimeError: of shapes
        fail(f"the adapter in {run} does not fit {base}: {' '.join(str(e).split())[:500]}")
    return model


def answering(model):
    """The context in which a model is asked: no gradients, and on a GPU adapters beside 16-bit weights."""
    stack = contextlib.ExitStack()
    stack.enter_context(torch.inference_mode())
    stack.enter_context(torch.autocast(model.device.type, dtype=model.dtype, enabled=model.device.type == "cuda"))
    return stack


def generation_options(collator, args):
    """How answers are generated, for model.generate(): greedy unless a temperature is given; they end at the
    recipe's stop tokens."""
    options = {"max_new_tokens": args.max_new_tokens, "max_length": None, "eos_token_id": collator.stop_ids}
    if args.temperature > 0:
        return {**options, "do_sample": True, "temperature": args.temperature}
    return {**options, "do_sample": False}
