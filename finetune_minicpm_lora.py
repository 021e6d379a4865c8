# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0", "pillow==13.0.0",
#   "bitsandbytes==0.50.2", "pyyaml==6.0.3", "jinja2==3.1.6", "tensorboard==2.21.0",
# ]
# ///
"""Fine-tune MiniCPM-V on conversations about images: LoRA or QLoRA, plain Trainer, one 24 GB GPU or several; slices, several images.

    python finetune_minicpm_lora.py --data_path train.json                # MiniCPM-V-4.6, LoRA and the projector
    python finetune_minicpm_lora.py --data_path train.json --q_lora       # language model in 4-bit NF4
    python finetune_minicpm_lora.py --data_path train.json --model_name_or_path openbmb/MiniCPM-V-4.7
    python finetune_minicpm_lora.py --data_path train.json --model_name_or_path openbmb/MiniCPM-V-2_6 --trust_remote_code
    python finetune_minicpm_lora.py --data_path train.json --use_lora false --tune_llm --learning_rate 1e-5   # all of the language model
    accelerate launch --num_processes 4 finetune_minicpm_lora.py --data_path train.json   # several GPUs, DDP
    python finetune_minicpm_lora.py --config minicpm-lora/settings.yaml   # the same again; after a crash it resumes

Data are the official JSON: id, image, conversations. Trained are the answers and what ends them, nothing else. Every setting is a
flag; formats of data, the settings that matter and every logged metric: docs/finetune_minicpm_lora.md."""

import contextlib
import functools
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import get_args, get_type_hints
from unittest.mock import patch

import datasets
import torch
import transformers
import yaml
from accelerate import PartialState
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    HfArgumentParser,
    PreTrainedConfig,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations import get_reporting_integration_callbacks

# Where the parts of each kind of model are: (vision tower, projector, language model).
PARTS = {"minicpmv4_6": ("model.vision_tower", "model.merger", "model.language_model"),
         "minicpmv4_7": ("model.vision_tower", "model.merger", "model.language_model"),
         "minicpmv": ("vpm", "resampler", "llm")}  # 2.6, hub code


@dataclass
class Settings:
    """What is trained on what: model, data, adapter, quantization. Names and groups are those of the official fine-tuning code."""

    model_name_or_path: str = field(default="openbmb/MiniCPM-V-4.6", metadata={"help": "MiniCPM-V 4.6, 4.7 or, with --trust_remote_code, 2.6: hub id or folder."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model: pin it for a run to be repeated, and for 2.6, whose code runs on your machine."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model: MiniCPM-V-2_6 needs it."})
    data_path: str = field(default="train.json", metadata={"help": "Official JSON, a list of {id, image, conversations}; or .jsonl, one row a line."})
    eval_data_path: str | None = field(default=None, metadata={"help": "The same, to evaluate on. Default: eval_fraction of the rows."})
    image_folder: str | None = field(default=None, metadata={"help": "Where relative image paths start. Default: the folder of the file."})
    eval_fraction: float = field(default=0.02, metadata={"help": "Share of the images held out, by seed, where there is no eval_data_path. 0: none."})
    max_eval_rows: int = field(default=200, metadata={"help": "Score at most so many rows at each evaluation, the same ones each time."})
    on_bad_rows: str = field(default="stop", metadata={"help": "Rows that cannot be trained on: list them and stop, or skip them.", "choices": ["stop", "skip"]})
    on_long_rows: str = field(default="drop", metadata={"help": "Rows longer than model_max_length: drop and count them, or stop.", "choices": ["drop", "stop"]})
    model_max_length: int = field(default=2048, metadata={"help": "Longest row in tokens, image tokens included. Never cut."})
    max_slice_nums: int = field(default=9, metadata={"help": "A large image is seen as a whole and in up to so many slices. 1: only as a whole."})
    downsample_mode: str = field(default="16x", metadata={"help": "4.6 and 4.7: patches that become one image token; 4x keeps four times as many tokens.", "choices": ["16x", "4x"]})
    tune_vision: bool = field(default=False, metadata={"help": "Train the vision tower in full."})
    tune_llm: bool = field(default=False, metadata={"help": "Train the language model in full; not together with use_lora."})
    use_lora: bool = field(default=True, metadata={"help": "Adapters on the language model."})
    q_lora: bool = field(default=False, metadata={"help": "Load the language model, and nothing else, in 4-bit NF4."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=64, metadata={"help": "The adapter is scaled by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: str | None = field(default=None, metadata={"help": "Regex of full module names. Default: every linear layer of the language model."})
    lora_bias: str = field(default="none", metadata={"help": "Biases trained: none, all, or those of adapted layers.", "choices": ["none", "all", "lora_only"]})
    lora_modules_to_save: list[str] = field(default_factory=list, metadata={"help": "More modules to train in full, such as embed_tokens."})
    lora_layers_to_transform: list[int] = field(default_factory=list, metadata={"help": "Adapt only these layers of the language model, counted from 0."})
    lora_weight_path: str | None = field(default=None, metadata={"help": "Go on from this adapter: its weights, a new optimizer and schedule."})
    vision_learning_rate: float | None = field(default=None, metadata={"help": "Of the vision tower with tune_vision. Default: learning_rate."})
    projector_learning_rate: float | None = field(default=None, metadata={"help": "Of the projector, trained in full. 0: frozen. Default: learning_rate."})
    sample_rows: int = field(default=8, metadata={"help": "Answer the last question of so many held-out rows at each evaluation, into samples.md. 0: none."})
    sample_tokens: int = field(default=64, metadata={"help": "Longest answer there, in tokens."})


@dataclass
class Training(TrainingArguments):
    """TrainingArguments with this recipe's defaults; docs/finetune_minicpm_lora.md says why where they differ from the official code."""

    output_dir: str = field(default="minicpm-lora", metadata={"help": "Adapter, processor, settings.yaml, samples.md, logs, checkpoints."})
    resume_from_checkpoint: str = field(default="auto", metadata={"help": "auto: go on from the newest whole checkpoint in output_dir. false: refuse a used output_dir. Or a checkpoint."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the data; max_steps bounds them."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Raise it first where memory is left."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Rows scored at once."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Effective batch = this x per-device batch x GPUs."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of the language model: 1e-4 suits LoRA, 1e-5 full training."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rates over the run."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps, or below 1 a share of the run."})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW's, on what is trained."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: steps, epoch, no."})
    eval_steps: float = field(default=100, metadata={"help": "Steps between evaluations."})
    save_steps: float = field(default=100, metadata={"help": "Steps between checkpoints, eval_steps while the best is kept: what a crash can cost."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept: the newest and the best."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Save the checkpoint with the lowest eval_loss, not the last one."})
    logging_steps: float = field(default=5, metadata={"help": "Steps between two lines of the log."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "true hides NaN losses in the log."})
    report_to: str = field(default="tensorboard", metadata={"help": "tensorboard, wandb, trackio, ..., none."})
    dataloader_num_workers: int = field(default=4, metadata={"help": "Processes that decode and slice images while the GPU works."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Stays false: the row number is one of those columns."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Stays true: logits of the whole vocabulary would fill the memory."})
    ddp_find_unused_parameters: bool | None = field(default=True, metadata={"help": "A batch without images leaves the projector unused. false is faster where every row has one."})
    activation_checkpointing: bool = field(default=True, metadata={"help": "Recompute activations in the backward pass: far less memory, slower."})
    bf16: bool | None = field(default=None, metadata={"help": "Default: where the GPU has it, else fp16."})

    def __post_init__(self):
        if self.bf16 is None and not self.fp16:
            gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
            self.fp16 = gpu and not self.bf16
        self.load_best_model_at_end &= self.eval_strategy != "no"  # nothing tells which would be the best
        super().__post_init__()


# Inherited, but this recipe would ignore them, they would break a promise, or have a new name (gradient_... is
# activation_checkpointing); and those that may change when a run is taken up again without making it another run.
REFUSED = """label_smoothing_factor label_names prediction_loss_only use_liger_kernel
save_only_model remove_unused_columns gradient_checkpointing gradient_checkpointing_kwargs deepspeed fsdp do_train do_eval
do_predict neftune_noise_alpha torch_compile dataloader_drop_last""".split()
FREE_TO_CHANGE = """output_dir resume_from_checkpoint report_to run_name disable_tqdm log_level dataloader_num_workers
push_to_hub hub_model_id hub_strategy hub_private_repo max_eval_rows sample_rows sample_tokens logging_steps
save_total_limit per_device_eval_batch_size""".split()


def fail(message):
    """End the program with one message, of the first process where there are several, and exit status 1."""
    sys.exit(f"error: {message}" if os.environ.get("RANK", "0") == "0" else 1)


def parse(argv=None):
    """Flags and `--config run.yaml` -> (Settings, Training), on any machine. Raises SystemExit with one line."""
    parser = HfArgumentParser([Settings, Training], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--config", help="YAML file of any of these flags.")
    argv, hints = sys.argv[1:] if argv is None else list(argv), get_type_hints(Settings) | get_type_hints(Training)
    if file := parser.parse_known_args(argv)[0].config:  # turned into flags, so that types and choices are checked
        try:
            for name, value in yaml.safe_load(Path(file).read_text()).items():
                if value in (None, []):
                    if value is None and parser.get_default(name) is not None and type(None) not in get_args(hints[name]):
                        raise ValueError(f"{name} must have a value")
                    parser.set_defaults(**{name: value})
                else:
                    value = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
                    argv = [f"--{name}", *map(str, value), *argv]
        except (OSError, AttributeError, ValueError, yaml.YAMLError) as e:
            fail(f"--config {file} must hold lines of 'name: value': {e}")
    try:
        given = {k: v for k, v in vars(parser.parse_args(argv)).items() if k != "config"}
        if refused := [f"--{f.name}" for f in fields(Training) if f.name in REFUSED and given[f.name] != f.default]:
            fail(f"{', '.join(refused)}: not used by this recipe" + ", it is activation_checkpointing now" * ("--gradient_checkpointing" in refused))
        settings, training = parser.parse_dict(given)
    except (OSError, ValueError, TypeError) as e:
        fail(e)
    training.given = {k: v for k, v in given.items() if k != "hub_token"}  # what settings.yaml holds
    return settings, training


def rates(settings, training):
    """The learning rate of each part, as (vision tower, projector, language model); 0: frozen."""
    vision, projector = (training.learning_rate if rate is None else rate for rate in (settings.vision_learning_rate, settings.projector_learning_rate))
    return vision * settings.tune_vision, projector, training.learning_rate * (settings.use_lora or settings.tune_llm)


def check(settings, training):
    """Stop before anything is loaded where the machine or a combination of flags cannot work. Raises SystemExit."""
    gpus, out, default = training.n_gpu, Path(training.output_dir), {f.name: f.default for f in fields(Settings)}
    adapter = [name for name in ("lora_target_modules", "lora_weight_path") if getattr(settings, name) != default[name]]
    adapter += [name for name in ("lora_modules_to_save", "lora_layers_to_transform") if getattr(settings, name)]
    steps = [f"--{name}_steps" for name in ("eval", "save", "logging") if getattr(training, f"{name}_strategy") == "steps" and getattr(training, f"{name}_steps") <= 0]
    for wrong, message in (
        (steps, f"{', '.join(steps)}: above 0; --eval_strategy no and --save_strategy no switch them off"),
        (not training.use_cpu and training.device.type == "cpu", "no GPU found (2.6 needs 24 GB, 4.6 less); for tiny models: --use_cpu"),
        (gpus > 1, f"{gpus} GPUs, one process. All: accelerate launch --num_processes {gpus} finetune_minicpm_lora.py. One: CUDA_VISIBLE_DEVICES=0"),
        (settings.use_lora and settings.tune_llm, "--use_lora adapts the language model, --tune_llm trains all of it: one of them, --use_lora false for the other"),
        (settings.q_lora and not settings.use_lora, "--q_lora: 4-bit weights cannot be trained themselves, it takes --use_lora true"),
        (adapter and not settings.use_lora, f"--{', --'.join(adapter)}: for --use_lora true only"),
        (settings.vision_learning_rate is not None and not settings.tune_vision, "--vision_learning_rate is for --tune_vision; without it the tower is frozen"),
        (settings.tune_vision and settings.vision_learning_rate == 0, "--tune_vision with a --vision_learning_rate of 0, which means frozen: one of them"),
        (training.learning_rate == 0 and (settings.use_lora or settings.tune_llm),
         "--learning_rate 0 means a frozen language model: then --use_lora false and no --tune_llm, and rates for the other parts"),
        (not all(0 <= (rate or 0) < 10 for rate in (settings.vision_learning_rate, settings.projector_learning_rate, training.learning_rate)),
         "learning rates: from 0, which means frozen, to below 10"),
        (not any(rates(settings, training)), "nothing would be trained: every part is frozen"),
        (settings.lora_alpha <= 0 or not 0 <= settings.lora_dropout < 1 or not 0 <= settings.eval_fraction < 1,
         "--lora_alpha must be above 0, --lora_dropout and --eval_fraction from 0 to below 1"),
        (min(settings.sample_rows, training.dataloader_num_workers, training.seed, *settings.lora_layers_to_transform) < 0 or training.seed >= 2**32,
         "--sample_rows, --dataloader_num_workers, --lora_layers_to_transform, --seed: 0 or more, and a seed below 2**32"),
        (min(settings.lora_r, settings.max_slice_nums, settings.max_eval_rows, settings.sample_tokens, settings.model_max_length,
             training.per_device_train_batch_size, training.gradient_accumulation_steps, training.per_device_eval_batch_size) < 1,
         "--lora_r, --max_slice_nums, batch sizes, accumulation steps, --max_eval_rows, --sample_tokens, --model_max_length: at least 1"),
        (training.max_steps == 0 or not 0 < training.num_train_epochs < math.inf, "--max_steps and --num_train_epochs must be above 0"),
        (any(folder.is_file() for folder in (out, *out.parents)), f"--output_dir {out}: there is a file in its place"),
        (training.load_best_model_at_end and training.eval_strategy == training.save_strategy == "steps" and training.eval_steps != training.save_steps,
         "what is best must have been saved: --save_steps equal to --eval_steps, or else --load_best_model_at_end false"),
        (training.fp16 and training.use_cpu, "--fp16 needs a GPU"),
        (training.load_best_model_at_end and training.metric_for_best_model not in ("loss", "eval_loss"),
         f"--metric_for_best_model {training.metric_for_best_model}: there is no other than loss"),
        (training.load_best_model_at_end and training.greater_is_better, "--greater_is_better true would keep the checkpoint with the highest loss"),
    ):
        if wrong:
            fail(message)
    try:
        re.compile(settings.lora_target_modules or "")
    except re.error as e:
        fail(f"--lora_target_modules {settings.lora_target_modules!r} is no regular expression: {e}")
    try:  # what would fail only after the weights are loaded
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
        if training.push_to_hub:
            HfApi(token=training.hub_token).whoami()
    except Exception as e:
        fail(f"--report_to or --push_to_hub: {e}")


def load_config(settings):
    """The model's configuration. Raises SystemExit for a model that nobody has tested this recipe with."""
    name = settings.model_name_or_path
    try:
        said = PreTrainedConfig.get_config_dict(name, revision=settings.model_revision)[0]  # before any code of the model runs
        kind, version = said.get("model_type"), said.get("version")
        if kind not in PARTS or kind == "minicpmv" and version != 2.6:
            what = f"is {kind}{'' if version is None else f' {version}'}" if kind else "has no config.json that names a model_type"
            fail(f"{name} {what}: tested are MiniCPM-V 4.6, 4.7 and 2.6, other versions are refused until someone has tested them")
        if kind == "minicpmv" and settings.downsample_mode != "16x":
            fail("--downsample_mode 4x: 2.6 does not know it; 4.6 and 4.7 do")
        if kind == "minicpmv" and not settings.trust_remote_code:
            fail(f"{name} brings code of its own that runs on this machine: read it, pin it by --model_revision, and then give --trust_remote_code")
        config = AutoConfig.from_pretrained(name, revision=settings.model_revision, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as e:
        fail(f"--model_name_or_path {name}: {' '.join(str(e).split())}")
    return config


def load_processor(settings):
    """The model's processor, set to this run's slices. Raises SystemExit for another model."""
    name, where = settings.model_name_or_path, {"revision": settings.model_revision}
    try:
        try:
            processor = AutoProcessor.from_pretrained(name, **where, trust_remote_code=settings.trust_remote_code)
        except ImportError:  # for its video processor, which wants torchvision; pictures do not
            from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor
            from transformers.video_processing_utils import VideoProcessorMixin
            transformers.processing_utils.transformers_module.VideoProcessorMixin = VideoProcessorMixin  # what a video processor is checked to be
            own = getattr(transformers, transformers.ProcessorMixin.get_processor_dict(name, **where)[0]["processor_class"])
            tokenizer, images = AutoTokenizer.from_pretrained(name, **where), AutoImageProcessor.from_pretrained(name, **where)
            processor = own(images, MiniCPMV4_6VideoProcessor.from_pretrained(name, **where), tokenizer, chat_template=tokenizer.chat_template)
    except (OSError, ValueError, KeyError, AttributeError) as e:
        fail(f"--model_name_or_path {name}: {' '.join(str(e).split())}")
    kind = type(processor).__name__
    if kind not in ("MiniCPMV4_6Processor", "MiniCPMV4_7Processor", "MiniCPMVProcessor"):
        fail(f"{name} has a {kind}; needed is that of MiniCPM-V 4.6, 4.7 or 2.6")
    if kind != "MiniCPMVProcessor":  # 2.6 takes the number of slices with each call
        processor.image_processor.max_slice_nums = settings.max_slice_nums
        processor.image_processor.downsample_mode = settings.downsample_mode
    return processor


class BadRow(ValueError):
    """A row that cannot be trained on. The text is 'what: details and remedy'; rows are counted by what."""


def text_of(message):
    """The words of a message, without its images."""
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text")


def image_cells(row, folder):
    """The images of a row, {placeholder: path (from its own `folder` or this one)}; one by itself is called <image>. Raises BadRow."""
    image = row.get("image")
    named = image if isinstance(image, dict) else {} if image in (None, "") else {"<image>": image}
    if odd := [name for name, path in named.items() if not isinstance(path, str) or not path or not re.fullmatch(r"<image(_\d+)?>", name)]:
        raise BadRow(f"malformed image: {odd[0]!r:.100} is {named[odd[0]]!r:.100}; needed is a path, or for several images {{\"<image_00>\": a path, ...}}")
    return {name: os.path.join(row.get("folder") or folder, path) for name, path in named.items()}


def load_image(path):
    """A file of any mode -> PIL RGB, upright. Raises BadRow where it is no image, or none to read."""
    where = path if len(path) < 500 else f"{path[:100]}... ({len(path)} characters)"  # a picture written as text
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no file")  # a pipe would be waited for
        image = Image.open(path)
        if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":  # an MPO, from a telephone, has its preview behind
            raise BadRow(f"{frames} images: {where} holds several, and only the first would be seen; give each its own file")
        image.load()  # verify() passes a truncated JPEG
        image = ImageOps.exif_transpose(image)
        if max(image.size) > 20 * min(image.size):  # a cut gone wrong
            raise BadRow(f"image too narrow: {where} has {image.size[0]} x {image.size[1]} pixels, above 1 : 20 there is little to be seen in it; crop it")
        if image.mode[0] in "IF":  # 16 and 32 bits: PIL's own conversion clips them to white
            if not 0 < (most := image.getextrema()[1]) < math.inf:
                raise ValueError(f"its brightest value is {most}")
            scale = 255 / most if most > 255 or image.mode == "F" and 0 < most <= 1 else 1
            image = image.convert("F").point(lambda grey: grey * scale + 0).convert("L")
        if image.has_transparency_data:  # on white: dropping alpha turns black ink on nothing into black on black
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except BadRow:
        raise
    except Image.DecompressionBombError as e:
        raise BadRow(f"image too large: {where} ({e}); shrink it") from e
    except Exception as e:  # decoders raise whatever they like, SyntaxError and struct.error among them
        raise BadRow(f"unreadable image: {where} ({getattr(e, 'strerror', None) or e}); mend it, or see --image_folder") from e


def braces(pairs):
    """A JSON object -> dict; what stands there twice becomes a list of both, which no check lets pass as a text or a path."""
    named = dict(pairs)
    return named if len(named) == len(pairs) else {key: some[0] if len(some := [v for k, v in pairs if k == key]) == 1 else some for key in named}


def read_rows(name, split, settings):
    """A .json or .jsonl file -> its rows, numbered in `row`. `split` is for recipes whose data have some. Raises SystemExit."""
    path = Path(name)
    try:
        if path.suffix.lower() not in (".json", ".jsonl"):
            raise ValueError("read are .json and .jsonl files in MiniCPM-V's own schema: see the README")
        text, lines = path.read_text(encoding="utf-8-sig"), path.suffix.lower() == ".jsonl"
        if lines:
            rows = []
            for n, line in enumerate(text.split("\n"), start=1):
                try:
                    rows += [json.loads(line, object_pairs_hook=braces)] if line.strip() else []
                except ValueError as e:
                    raise ValueError(f"line {n}: {e} (a .jsonl file has one row a line)") from None
        else:
            rows = json.loads(text, object_pairs_hook=braces)
        if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it is empty" if rows == [] else "needed is a list of rows in braces: see the README")
        if not any("conversations" in row for row in rows):
            raise ValueError(f"no row has 'conversations'; the first one has {', '.join(rows[0]) or 'nothing'}")
        if odd := [(n, key) for n, row in enumerate(rows) for key in row if key.lower() in ("image", "images", "system") and key != "image"]:
            raise ValueError(f"row {odd[0][0]} has a key {odd[0][1]!r}: images go under 'image', a system message is the first turn")
        if half := [n for n, row in enumerate(rows) if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))]:
            raise ValueError(f"half a character (a lone surrogate) is in rows {half[:20]}; mend their encoding")
        keys = ("id", "image", "conversations")
        data = datasets.Dataset.from_generator(  # dumps: Json() would read the text "7" as the number 7
            lambda rows, keys: ({key: json.dumps(row.get(key), ensure_ascii=False) for key in keys} for row in rows),
            features=datasets.Features({key: datasets.Json() for key in keys}), gen_kwargs={"rows": rows, "keys": keys})
    except (OSError, ValueError, RecursionError, datasets.exceptions.DatasetsError) as e:
        fail(f"cannot read {name}: {e.__cause__ or e}")
    folder = os.path.abspath(settings.image_folder or path.parent)
    return data.add_column("row", list(range(len(data)))).add_column("folder", [folder] * len(data))


def check_rows(data, name, collator, settings, training):
    """Every row through the collator, in parallel and cached -> those that can be trained on, with their `length`.
    Raises SystemExit with the first 20 bad or too long rows and counts by reason where the policy is to stop."""
    def attempt(row, version):
        try:
            return {"problem": None, "length": collator([row])["labels"].shape[1]}
        except BadRow as e:
            return {"problem": str(e).split(": ", 1)[1], "length": 0}

    if len(data) == 0:
        fail(f"{name} is empty: there is nothing to train on")
    files = set()
    for row in data.select_columns(["image", "folder"]):
        with contextlib.suppress(BadRow):  # it is named below
            files |= set(image_cells(row, "").values())
    version = sorted((f, os.stat(f).st_mtime_ns) for f in files if os.path.exists(f))  # map's cache key: a changed file is read again
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process would wait forever for OpenMP's threads, which only its parent has
    with training.main_process_first(desc=f"checking {name}"):
        found = data.map(
            attempt, fn_kwargs={"version": version}, remove_columns=data.column_names, desc=f"Checking {name}",
            features=datasets.Features(problem=datasets.Value("string"), length=datasets.Value("int64")),
            num_proc=os.cpu_count() if len(data) > 1000 else None)
    torch.set_num_threads(threads)
    problems = found["problem"]
    bad = sorted((n for n, problem in enumerate(problems) if problem), key=lambda n: problems[n].startswith("too long"))
    counts = Counter(problems[n].split(":")[0] for n in bad)
    report = [f"{len(bad)} of {len(data)} rows of {name} cannot be trained on: {dict(counts)}"]
    for row, n in zip(data.select(bad[:20]), bad):
        report.append(f"  row {row['row']}" + (f" (id {row['id']})" if row.get("id") not in (None, "") else "") + f": {problems[n]}")
    report += [f"  ... and {len(bad) - 20} more"] * (len(bad) > 20)
    stop = settings.on_bad_rows == "stop" and len(bad) > counts["too long"]
    if stop or settings.on_long_rows == "stop" and counts["too long"] or len(bad) == len(data):
        report += ["Mend them (rows count from 0), or train without them: --on_bad_rows skip"] * (len(bad) > counts["too long"])
        report += ["Raise --model_max_length, lower --max_slice_nums, or train without the long ones: --on_long_rows drop"] * (counts["too long"] > 0)
        fail("\n".join([*report, "No row would be left."] if len(bad) == len(data) else report))
    if bad:
        PartialState().print("left out:", "\n".join(report))
    good = [n for n, problem in enumerate(problems) if not problem]
    return datasets.concatenate_datasets([data, found.select_columns("length")], axis=1).select(good)


def load_data(settings, training):
    """-> (train, eval): Datasets of rows that the Collator accepts, with their number in `row`; eval may be None."""
    collator = Collator(load_processor(settings), settings, training)
    train, held_out = read_rows(settings.data_path, None, settings), None
    if settings.eval_data_path and training.eval_strategy != "no":  # bounded before it is checked: no need to decode what is never scored
        held_out = read_rows(settings.eval_data_path, None, settings).shuffle(training.seed)
        held_out = held_out.select(range(min(len(held_out), settings.max_eval_rows))).flatten_indices()
        held_out = check_rows(held_out, settings.eval_data_path, collator, settings, training)
    train = check_rows(train, settings.data_path, collator, settings, training)
    if not settings.eval_data_path and settings.eval_fraction > 0 and training.eval_strategy != "no":
        images = [tuple(map(os.path.normpath, image_cells(row, "").values())) or (f"row {row['row']}",) for row in train.select_columns(["image", "folder", "row"])]
        every = sorted({image for some in images for image in some})  # of images, not of rows: other questions about an image are no test
        random.Random(training.seed).shuffle(every)
        apart = set(every[: max(1, round(settings.eval_fraction * len(every)))])
        kept = [n for n, some in enumerate(images) if not apart & set(some)]
        if not kept:
            fail(f"{len(every)} images cannot be divided into training and evaluation: --eval_fraction 0 (none), or give --eval_data_path")
        held = [n for n, some in enumerate(images) if apart & set(some)]
        held_out = train.select(held).shuffle(training.seed).select(range(min(len(held), settings.max_eval_rows)))
        train = train.select(kept)
    return train, held_out


class Collator:
    """Rows -> input_ids, attention_mask, labels (B, L) and the images of all rows as the processor packs them; for 2.6 all but mask and labels are
    in `data`.

    Labels are -100 but on the answers and the <|im_end|> of each: not on the empty think block that the template of 4.6 and 4.7 puts before the
    last answer, nor on the newline after it. The prompt of the last answer is, token for token, that of inference. Raises BadRow."""

    def __init__(self, processor, settings, training):
        # no setting that has no say in a batch: all of this is the key under which the check is cached
        self.processor, self.folder, self.max_length, self.slices = processor, settings.image_folder or "", settings.model_max_length, settings.max_slice_nums
        self.hub, tokenizer = type(processor).__name__ == "MiniCPMVProcessor", processor.tokenizer
        self.control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | {"<think>", "</think>"}
        self.start, self.end, *self.slice = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<slice>", "</slice>"])
        self.stop = [self.end, tokenizer.convert_tokens_to_ids("<|endoftext|>")]  # where generation ends
        asked = [self.ask("?", [])]
        self.headers = [tokenizer(self.render(asked, True)[len(self.render(asked)) :], add_special_tokens=False)["input_ids"],
                        tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]]  # of the last answer, of those before it

    def ask(self, question, images):
        """The user's turn: images, question."""
        return {"role": "user", "content": [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]}

    def read(self, row):
        """A row -> its messages, with a PIL image where a placeholder stands. Raises BadRow."""
        cells, turns, messages, seen = image_cells(row, self.folder), row.get("conversations"), [], []
        if not isinstance(turns, list) or not turns:
            raise BadRow("no conversation: conversations must be a list of turns, {role, content}")
        lead = isinstance(turns[0], dict) and turns[0].get("role") == "system"
        for n, turn in enumerate(turns):
            role = "system" if lead and n == 0 else ("user", "assistant")[(n - lead) % 2]
            if not isinstance(turn, dict) or turn.get("role") != role:
                raise BadRow(f"wrong order of roles: turn {n} must be the {role}'s, {{role, content}}; it is {turn!r:.100}")
            if not isinstance(text := turn.get("content"), str) or not text.strip():
                raise BadRow(f"{'empty answer' if role == 'assistant' else 'empty turn'}: turn {n}, the {role}'s, says {text!r:.100}; needed is text")
            parts = [part.strip() for part in re.split(r"(<image(?:_\d+)?>)", text) if part.strip()]
            if n == lead and len(cells) == 1 and not any("<image" in str(t.get("content")) for t in turns if isinstance(t, dict)):
                parts = [*cells, *parts]  # as in the official code: an image that no turn mentions stands before the first question
            here = [part for part in parts if re.fullmatch(r"<image(_\d+)?>", part)]
            if here and role != "user":
                raise BadRow(f"image in a turn of the {role}: {here[0]} in turn {n}; images belong to the user's turns")
            if found := [token for part in parts if part not in here for token in self.control if token in part]:
                raise BadRow(f"control token: {found[0]} is typed in turn {n} and would become a real one; take it out")
            seen += here
            messages.append({"role": role, "content": [{"type": "image", "name": part} if part in here else {"type": "text", "text": part} for part in parts]})
        if sorted(seen) != sorted(cells):
            raise BadRow(f"images do not match: the turns name {seen}, the row has {list(cells)}; each image once")
        images = {name: load_image(path) for name, path in cells.items()}
        for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
            part["image"] = images[part.pop("name")]
        return messages

    def render(self, messages, prompt=False):
        """Messages -> text with a mark for each image, as the processor takes it."""
        if not self.hub:
            return self.processor.apply_chat_template(messages, add_generation_prompt=prompt)
        turns = [{"role": m["role"], "content": "\n".join("(<image>./</image>)" if part["type"] == "image" else part["text"] for part in m["content"])}
                 for m in messages]  # what 2.6's own chat() joins
        return self.processor.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)

    def tokenize(self, conversations, prompt=False):
        """Lists of messages -> a batch padded on the left; with `prompt`, ready to generate the next answer."""
        texts = [self.render(messages, prompt) for messages in conversations]
        images = [[part["image"] for message in messages for part in message["content"] if part["type"] == "image"] for messages in conversations]
        if not self.hub:
            flat = [image for some in images for image in some]
            return self.processor(text=texts, images=flat or None, padding=True, padding_side="left", return_tensors="pt")
        # one by one: 2.6's processor pads by masking each id 0, which is "!"
        every = [self.processor([text], [some], max_slice_nums=self.slices, use_image_id=True) for text, some in zip(texts, images)]
        ids = self.processor.tokenizer.pad({"input_ids": [one["input_ids"][0].tolist() for one in every]}, padding_side="left", return_tensors="pt")
        shift = (ids["attention_mask"] == 0).sum(1).tolist()
        return transformers.BatchFeature({
            **ids, "position_ids": (ids["attention_mask"].cumsum(1) - 1).clamp(min=0), "pixel_values": [one["pixel_values"][0] for one in every],
            "tgt_sizes": [one["tgt_sizes"][0] for one in every], "image_bound": [one["image_bound"][0] + n for one, n in zip(every, shift)]})

    def label(self, ids, messages):
        """Token ids (a list, without padding) -> labels, a list. Raises BadRow."""
        labels, starts = [-100] * len(ids), [n for n, token in enumerate(ids) if token == self.start][-len(messages) :]
        for n, (start, message) in enumerate(zip(starts, messages)):
            if message["role"] == "assistant":
                header = next((h for h in self.headers if ids[start : start + len(h)] == h), None)
                if header is None or n == len(messages) - 1 and header != self.headers[0]:  # training must continue the prompt of inference
                    raise BadRow(f"prompt changed: by its first characters the answer {text_of(message)[:40]!r} changes its tokens; begin it otherwise")
                first, end = start + len(header), ids.index(self.end, start) + 1
                labels[first:end] = ids[first:end]
        return labels

    def __call__(self, rows):
        conversations = []
        for row in rows:
            try:
                conversations.append(self.read(row))
                if conversations[-1][-1]["role"] != "assistant":
                    raise BadRow("no answer: the last turn is not the assistant's")
            except BadRow as e:
                raise BadRow(f"row {row.get('row', '?')}: {e}") from e
        batch = self.tokenize(conversations)
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        for row, messages, ids, mask, labels in zip(rows, conversations, batch["input_ids"], batch["attention_mask"].bool(), batch["labels"]):
            if (length := int(mask.sum())) > self.max_length:
                image, (opened, closed) = int((ids == image_token_id(self.processor)).sum()), (ids == token for token in self.slice)
                slices = int((opened.cumsum(0) - closed.cumsum(0) + closed.long()).sum())  # tokens from <slice> to </slice>
                fewer = f", or lower --max_slice_nums, {self.slices}: slices take {slices} tokens" if slices and length - slices <= self.max_length else ""
                raise BadRow(f"row {row.get('row', '?')}: too long: {length} tokens, {image} of them of images; --model_max_length is {self.max_length}: raise it{fewer}")
            try:
                labels[mask] = torch.tensor(self.label(ids[mask].tolist(), messages))
            except BadRow as e:
                raise BadRow(f"row {row.get('row', '?')}: {e}") from e
        if not self.hub:
            return batch
        data = {name: value for name, value in batch.items() if name not in ("attention_mask", "labels")}
        return {"data": data, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}


def image_token_id(processor):
    """The token in whose place an image's features are put; in 2.6 it is <unk>."""
    return getattr(processor, "image_token_id", processor.tokenizer.unk_token_id)


def load_26(name, revision, **kwargs):
    """MiniCPM-V 2.6 by its own code from the hub, which is written for Transformers 4 and here repaired from outside for today's; kwargs are
    from_pretrained's. generate() takes and gives what Transformers' own does."""
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=True)
    with contextlib.ExitStack() as repaired:
        try:
            import torchvision  # noqa: F401
        except ImportError:  # the code imports it and never uses it
            sys.modules["torchvision"] = ModuleType("torchvision")
            repaired.callback(sys.modules.pop, "torchvision")
        repaired.enter_context(patch.object(torch.nn.functional, "List", list, create=True))  # the code takes this name from there, where it once was
        cls = get_class_from_dynamic_module(config.auto_map["AutoModel"], name, revision=revision)

    class MiniCPMV(cls):
        __module__ = cls.__module__  # so that save_pretrained finds the code, and saves it beside the weights

        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            if not hasattr(self, "all_tied_weights_keys"):  # the code never calls post_init(), without which nothing loads today
                self.post_init()

        def enable_input_require_grads(self):
            """Nothing: the code writes images into the embeddings in place, which a leaf with a gradient forbids."""

        def generate(self, input_ids, position_ids=None, eos_token_id=None, max_length=None, use_cache=True, **kwargs):
            """Prompt and answer, as Transformers' generate gives them; the code's own gives the answer, padded with 0, which is "!"."""
            if "tokenizer" in kwargs:  # its own chat() asks, and wants its own
                return super().generate(input_ids=input_ids, use_cache=use_cache, **kwargs)
            said = super().generate(input_ids=input_ids, tokenizer=tokenizer, use_cache=use_cache, **kwargs).clone()
            stop = torch.tensor(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]), device=said.device)
            over = torch.isin(said, stop).cumsum(1) - torch.isin(said, stop).long() > 0
            return torch.cat([input_ids, said.masked_fill(over, stop[1])], dim=1)

    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=True)
    MiniCPMV.register_for_auto_class("AutoModel")
    model = MiniCPMV.from_pretrained(name, revision=revision, config=config, **kwargs)
    # its positions are in no file, and from_pretrained leaves in them what was in the memory
    model.resampler._set_2d_pos_cache(model.resampler.max_size, model.resampler.query.device)
    return model


def load_model(settings, training):
    """The base model, frozen but for what is trained in full without LoRA: language model in NF4 with q_lora, the rest in bf16 / fp16
    (float32 on a CPU), what is trained in float32."""
    config, dtype = load_config(settings), torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    vision, projector, language = PARTS[config.model_type]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", vision, projector])  # replaces bitsandbytes' own list, so lm_head is named again
    kwargs = {"dtype": dtype, "device_map": {"": training.device}, "quantization_config": nf4 if settings.q_lora else None}
    load = load_26 if config.model_type == "minicpmv" else AutoModelForImageTextToText.from_pretrained
    model = load(settings.model_name_or_path, revision=settings.model_revision, **kwargs)
    model.config.downsample_mode = settings.downsample_mode
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # on a CPU the first eval() would repack 4-bit weights for a
            module.support_avx512bf16_for_cpu = False  # kernel without autograd, and adapters would get no gradient
    model.requires_grad_(False)
    if not settings.use_lora:
        for part, rate in zip((vision, projector, language), rates(settings, training)):
            model.get_submodule(part).requires_grad_(rate > 0)
        if settings.tune_llm and config.model_type != "minicpmv":  # 2.6's llm holds its own
            model.get_output_embeddings().requires_grad_(True)
        # The names of the files are those that Trainer resumes by.
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    return model


def lora_config(settings):
    """LoRA on every linear layer of the language model, or by lora_target_modules; trained in full beside it are the projector, the vision
    tower where asked, and lora_modules_to_save. None without use_lora."""
    if not settings.use_lora:
        return None
    config = load_config(settings)
    vision, projector, language = PARTS[config.model_type]
    target = settings.lora_target_modules or (
        rf"{re.escape(language)}\..*\.(in_proj_\w+|out_proj|[qkvo]_proj|gate_proj|up_proj|down_proj)")  # in_proj, out_proj: linear attention
    if settings.lora_layers_to_transform:  # PEFT knows them only beside a list of names
        target = rf"(?=.*\blayers\.({'|'.join(map(str, settings.lora_layers_to_transform))})\.)(?:{target})"
    save = [vision] * settings.tune_vision + [projector] * (settings.projector_learning_rate != 0) + settings.lora_modules_to_save
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False)) and any("embed_tokens" in name or "lm_head" in name for name in save)
    return LoraConfig(
        r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout, bias=settings.lora_bias, target_modules=target,
        modules_to_save=save or None, ensure_weight_tying=tied, task_type=None if config.model_type == "minicpmv" else "CAUSAL_LM")


def adapted(model, settings):
    """The model with a new adapter, or with that of lora_weight_path. Raises SystemExit where that one is of another shape than the flags say."""
    wanted, names = lora_config(settings), [name for name, _ in model.named_modules()]
    if wanted is None:
        return model
    if missing := [part for part in wanted.modules_to_save or () if not any(f".{name}".endswith(f".{part}") for name in names)]:
        fail(f"--lora_modules_to_save {' '.join(missing)}: the model has no module of that name")
    try:
        if settings.lora_weight_path is None:
            return get_peft_model(model, wanted)
        model = PeftModel.from_pretrained(model, settings.lora_weight_path, is_trainable=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        fail(f"{'--lora_weight_path ' + settings.lora_weight_path if settings.lora_weight_path else 'the adapter'}: {e}")
    old = model.peft_config["default"]
    if old.ensure_weight_tying:  # PEFT has added the other name of a tied matrix
        old.modules_to_save = [name for name in old.modules_to_save if name in wanted.modules_to_save or not name.endswith(("embed_tokens", "lm_head"))]
    names = ("r", "lora_alpha", "lora_dropout", "bias", "target_modules", "modules_to_save")
    if other := [f"{n} {getattr(old, n)}, not {getattr(wanted, n)}" for n in names if (getattr(old, n) or None) != (getattr(wanted, n) or None)]:
        fail(f"--lora_weight_path {settings.lora_weight_path} has {'; '.join(other)}: give the flags that it was trained with")
    return model


def marked(batch, processor):
    """The first row of a batch as text: what is trained on in «», runs of image tokens folded, padding left out."""
    out, shown, end, real = "", "", 0, batch["attention_mask"][0].bool()
    ids, labels = batch.get("data", batch)["input_ids"][0][real].tolist(), batch["labels"][0][real].tolist()
    kinds = ((token == image_token_id(processor), label != -100) for token, label in zip(ids, labels))
    for (image, trained), run in itertools.groupby(kinds):
        end += (count := len(list(run)))
        text = processor.tokenizer.decode(ids[:end])  # from the start: by itself a run would lose its leading space
        out += f"{processor.tokenizer.decode(ids[end - 1 : end])} x {count}" if image else f"«{text[len(shown) :]}»" if trained else text[len(shown) :]
        shown = text
    return out


class AlikeInAStep(torch.utils.data.Sampler):
    """Numbers of rows in the Trainer's random order, but within a step (`rows` of them: all processes, all accumulated) the longest first, so
    that rows of like length share a batch and little is padded. What is left over of an epoch stays as it is. `epoch` says which one begins."""

    def __init__(self, lengths, rows, seed, epoch):
        self.lengths, self.rows, self.seed, self.epoch = list(lengths), rows, seed, epoch

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.seed + self.epoch())).tolist()
        for n in range(0, len(order), self.rows):
            step = order[n : n + self.rows]
            yield from sorted(step, key=lambda row: -self.lengths[row]) if len(step) == self.rows else step


class Trainer(transformers.Trainer):
    """Trainer with a learning rate for each part, that computes logits only where there is a label, runs a frozen vision tower without a graph,
    and after each evaluation answers the last question of a few held-out rows, greedily, into samples.md."""

    def __init__(self, settings, parts, model, args, *more, **kwargs):
        self.settings, self.parts, self.rates = settings, parts, rates(settings, args)
        args.label_names = ["labels"]  # 2.6's forward() has no name for them, and eval_loss would silently be missing
        super().__init__(model, args, *more, **kwargs)
        for name, p in self.model.named_parameters():
            p.requires_grad &= self.rate(name) > 0  # --lora_bias all would train those of frozen parts, too
            if p.requires_grad:  # in 16 bits small steps round to nothing, and fp16 could not be unscaled
                p.data = p.data.float()
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        self.head = base.get_output_embeddings()
        tower = base.get_submodule(parts[0])
        if not any(p.requires_grad for p in tower.parameters()):
            tower.forward = torch.no_grad()(tower.forward)  # checkpointing's hook on its input would back-propagate through it

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The stock loss. Of 250,000 logits a position most would be thrown away: few positions are trained."""
        following = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]  # what each position must say next
        told = following != -100
        inputs = {**inputs, "shift_labels": following[told]}
        with self.head.register_forward_pre_hook(lambda head, hidden: hidden[0][told]):  # 4.6 knows no logits_to_keep
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _get_train_sampler(self, train_dataset=None):
        data, args = self.train_dataset if train_dataset is None else train_dataset, self.args
        if args.gradient_accumulation_steps * args.world_size == 1 or args.train_sampling_strategy != "random":
            return super()._get_train_sampler(data)
        rows, seed = args.train_batch_size * args.world_size * args.gradient_accumulation_steps, args.seed if args.data_seed is None else args.data_seed
        # asked for its epoch, not told by set_epoch: where several processes go on from a checkpoint, Accelerate's does not get there
        return AlikeInAStep(data.with_format(None)["length"], rows, seed, epoch=lambda: int(self.state.epoch or 0))

    def create_optimizer(self, *args, **kwargs):
        """AdamW, or --optim, with the rate of the part that a weight belongs to; biases and norms do not decay."""
        if self.optimizer is None:
            groups, decay, named = [], set(self.get_decay_parameter_names(self.model)), dict(self.model.named_parameters())
            kind = lambda n: (self.rate(n) != self.rates[2], self.rate(n), n in decay)  # the first group's rate is the one logged
            for (_, rate, decays), some in itertools.groupby(sorted((n for n, p in named.items() if p.requires_grad), key=kind), key=kind):
                groups.append({"params": [named[n] for n in some], "lr": rate, "weight_decay": self.args.weight_decay * decays})
            cls, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(groups, **settings)
        return self.optimizer

    def rate(self, name):
        """The learning rate of a weight, by the part that its name belongs to; adapters, wherever they are, have the language model's."""
        inside = [".lora_" not in name and f".{part}." in f".{name}" for part in self.parts[:2]]
        return next((rate for rate, there in zip(self.rates, inside) if there), self.rates[2])

    def evaluate(self, *args, **kwargs):
        metrics, collator, out = super().evaluate(*args, **kwargs), self.data_collator, Path(self.args.output_dir)
        rows = self.eval_dataset.select(range(min(self.settings.sample_rows, len(self.eval_dataset))))
        if len(rows) == 0 or not self.is_world_process_zero():
            return metrics
        text = f"\n## Step {self.state.global_step}\n\n| picture | question | right | answered |\n|---|---|---|---|\n"
        (out / "samples").mkdir(parents=True, exist_ok=True)
        for row in rows:
            messages = collator.read(row)
            batch = collator.tokenize([messages[:-1]], prompt=True).to(self.args.device)
            with torch.no_grad(), self.accelerator.autocast():  # max_length None: the model's own would only warn
                ids = self.model.generate(**batch, max_new_tokens=self.settings.sample_tokens, max_length=None, do_sample=False,
                                          use_cache=True, eos_token_id=collator.stop)[0, batch["input_ids"].shape[1] :]
            pictures = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
            for n, picture in enumerate(pictures):
                ImageOps.contain(picture, (224, 224)).save(out / f"samples/{row['row']}-{n}.png")
            cells = [" ".join(f"![](samples/{row['row']}-{n}.png)" for n in range(len(pictures))), text_of(messages[-2]),
                     text_of(messages[-1]), collator.processor.tokenizer.decode(ids, skip_special_tokens=True)]
            text += f"| {' | '.join(' '.join(cell.replace('|', '&#124;').split()) for cell in cells)} |\n"
        with open(out / "samples.md", "a", encoding="utf-8") as file:
            file.write(text)
        return metrics


def is_whole(folder):
    """Whether a checkpoint has all that it takes to go on from it; one that was cut off while it was written has not."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
        state["global_step"] + state["train_batch_size"]  # fails where one is missing
        weights = [safe_open(file, "pt") for file in folder.glob("*.safetensors")]  # fails where the end is missing
        files = [folder / "optimizer.pt", folder / "scheduler.pt", *(list(folder.glob("rng_state*")) or [folder / "rng_state.pth"])]
        return bool(weights) and all(map(zipfile.is_zipfile, files))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False


def checkpoint_to_resume(training):
    """The checkpoint to go on from, None for a new run; exits 0 where this very run is finished. Raises SystemExit."""
    out, wanted = Path(training.output_dir), training.resume_from_checkpoint
    wanted = wanted.lower() if wanted.lower() in ("auto", "false") else wanted
    found = [c for c in out.glob("checkpoint-*") if c.name[11:].isdigit()]
    whole = sorted(filter(is_whole, found), key=lambda c: int(c.name[11:]))
    finished = (out / "trainer_state.json").exists()
    if wanted not in ("auto", "false"):
        if not is_whole(Path(wanted)):
            fail(f"--resume_from_checkpoint {wanted}: no whole checkpoint there; there are {[str(c) for c in whole]}")
        return wanted
    if wanted == "false" and (found or finished):
        fail(f"{out} holds a run, and --resume_from_checkpoint false would overwrite it: choose another --output_dir")
    if whole or finished:
        try:
            old, new = dict(yaml.safe_load((out / "settings.yaml").read_text())), training.given
        except (OSError, TypeError, ValueError, yaml.YAMLError):
            fail(f"{out} holds a run without the settings.yaml that says which (missing or damaged): choose another --output_dir, or go on from it "
                 "all the same with --resume_from_checkpoint CHECKPOINT")
        if changes := [f"{k} {old[k]} -> {new[k]}" for k in new if k in old and old[k] != new[k] and k not in FREE_TO_CHANGE]:
            fail(f"{out} holds a run with other settings ({', '.join(changes)}): choose another --output_dir, or go on from it "
                 "all the same with --resume_from_checkpoint CHECKPOINT")
    if finished:
        PartialState().print(f"{out} holds this run, finished. For another one choose another --output_dir.")
        PartialState().destroy_process_group()  # as at the end of main
        sys.exit(0)
    try:  # now, and not when the weights are loaded
        tempfile.TemporaryFile(dir=next(folder for folder in (out, *out.absolute().parents) if folder.exists())).close()
    except OSError as e:
        fail(f"--output_dir {out} cannot be written: {e}")
    return str(whole[-1]) if whole else None


def main(argv=None):
    """Parse, check, load, say what will happen, train, save."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers fork after the tokenizer was used
    settings, training = parse(argv)
    check(settings, training)
    checkpoint, say = checkpoint_to_resume(training), PartialState().print
    set_seed(training.seed)
    config = load_config(settings)
    train, held_out = load_data(settings, training)
    if held_out is None:
        training.eval_strategy, training.load_best_model_at_end = "no", False
    processor = load_processor(settings)
    collator = Collator(processor, settings, training)
    say(f"\nOne row as the model sees it, trained on in «»:\n\n{marked(collator([train[0]]), processor)}\n")

    try:
        model = load_model(settings, training)
    except (OSError, ValueError, SafetensorError) as e:
        fail(f"cannot load the weights of {settings.model_name_or_path}: {e}")
    base, model = model, adapted(model, settings)
    trainer = Trainer(settings, PARTS[config.model_type], model, training, collator, train, held_out, processor)
    parts = PARTS[config.model_type]
    for part in parts:  # a matrix of its own that writes words belongs to the language model
        named = [(n, p) for n, p in base.named_parameters() if "original_module." not in n
                 and part == next((other for other in parts if n.startswith(f"{other}.")), parts[2])]
        rate = max((trainer.rate(n) for n, p in named if p.requires_grad), default=0)
        own = [(p, type(p).__name__ == "Params4bit") for _, p in named]
        packed, trained = sum(2 * p.numel() for p, nf4 in own if nf4), sum(p.numel() for p, _ in own if p.requires_grad)
        count = packed + sum(p.numel() for p, nf4 in own if not nf4)  # 4-bit: two in a byte
        say(f"{part:22s}{trained:>14,} of {count:>14,} parameters trained at {rate:g}, {packed:>14,} in 4-bit")
    batch = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * math.ceil(len(train) / batch))
    say(f"{len(train)} rows to train on, {len(held_out or ())} to evaluate; {steps} steps of {batch} rows, "
        f"{steps / math.ceil(len(train) / batch):.2f} epochs; {f'going on from {checkpoint}' if checkpoint else 'from the start'}")
    if training.process_index == 0:
        Path(training.output_dir).mkdir(parents=True, exist_ok=True)
        Path(training.output_dir, "settings.part").write_text(f"# {Path(__file__).name}\n" + yaml.safe_dump(training.given, sort_keys=False))
        os.replace(Path(training.output_dir, "settings.part"), Path(training.output_dir, "settings.yaml"))
        Path(training.output_dir, "trainer_state.json").unlink(missing_ok=True)  # an earlier end is not this one's
    try:
        state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json")) if checkpoint else None
        if state and state.global_step >= steps:  # killed when it had only to save the result: train() would take a step more
            trainer.state, best = state, training.load_best_model_at_end and state.best_model_checkpoint
            wanted = Path(training.output_dir, Path(best).name) if best else Path(checkpoint)  # the folder may have another name by now
            if not is_whole(wanted):
                fail(f"{wanted}, the best checkpoint, is missing or damaged: --load_best_model_at_end false saves the last one")
            trainer._load_from_checkpoint(str(wanted))
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
    except BadRow as e:  # out of a loader's process it comes with a traceback before it
        fail(f"the data changed under the run: {str(e).strip().splitlines()[-1].removeprefix(f'{__name__}.BadRow: ')}")
    except KeyboardInterrupt:
        fail(f"interrupted; the same command goes on from the newest checkpoint in {training.output_dir}, where there is one")
    trainer.save_model()  # pushes to the hub, too, where asked
    trainer.save_state()  # last: its presence says that the run is finished
    if training.load_best_model_at_end and trainer.state.best_metric is not None:
        say(f"best of the evaluations by {training.metric_for_best_model}: {trainer.state.best_metric:.4g}, at step {trainer.state.best_global_step}; that is saved")
    trainer.accelerator.wait_for_everyone()  # a process that leaves while another one still writes may take it down
    time.sleep(0.5 * (training.world_size > 1))  # Gloo (CPUs) lets go of that barrier in a thread, which aborts where Python shuts down: PyTorch's issue 190489
    trainer.accelerator.end_training()
    say(f"saved {training.output_dir}: what was trained, processor, settings.yaml, trainer_state.json (the log)")


if __name__ == "__main__":
    main()
