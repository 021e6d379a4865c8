# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0", "pillow==13.0.0",
#   "bitsandbytes==0.50.2", "pyyaml==6.0.3", "jinja2==3.1.6", "tensorboard==2.21.0",
# ]
# ///
"""Make a LLaVA out of a vision encoder and a language model, as its authors did: align the projector on captions, then instruct.

    python llava_two_stage.py --stage align --data_path blip_laion_cc_sbu_558k.json --image_folder LLaVA-Pretrain/images
    python llava_two_stage.py --stage instruct --data_path llava_v1_5_mix665k.json --lora_r 128                  # LoRA
    python llava_two_stage.py --stage instruct --data_path llava_v1_5_mix665k.json --lora_r 128 --load_in_4bit   # QLoRA
    accelerate launch --config_file configs/zero3.yaml llava_two_stage.py --stage instruct   # in full, 8 GPUs, ZeRO-3
    python llava_two_stage.py --stage instruct --lora_r 128 --pretrain_mm_mlp_adapter mm_projector.bin   # somebody's stage 1
    python llava_two_stage.py --stage instruct --model_name_or_path llava-hf/llava-1.5-7b-hf --lora_r 128 --data_path mine.json
    python llava_two_stage.py --config llava-align/settings.yaml      # the same again; after a crash it resumes

Stage 1 writes llava-align/, a whole model in which only the projector has learnt; stage 2 goes on from it and writes llava-instruct/.
Data are LLaVA JSON. Trained are captions, then answers and what ends them, nothing else. Every setting is a flag; both stages' hyper-
parameters, several machines and every logged metric: docs/llava_two_stage.md. Paper: https://arxiv.org/abs/2310.03744"""

import contextlib
import functools
import itertools
import json
import math
import os
import pickle
import random
import re
import sys
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
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
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    CLIPVisionModel,
    GenerationConfig,
    HfArgumentParser,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    TrainerState,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.trainer_pt_utils import get_length_grouped_indices

# Where the parts of the model are: vision tower, projector, language model (to which lm_head belongs, too).
PARTS = ("model.vision_tower", "model.multi_modal_projector", "model.language_model")
# What a setting is where it is not given, stage by stage; language models are those that have been tested.
DEFAULTS = {
    "align": {"output_dir": "llava-align", "data_path": "blip_laion_cc_sbu_558k.json", "image_aspect_ratio": "square",
              "projector_learning_rate": 1e-3, "learning_rate": 0.0, "per_device_train_batch_size": 8},
    "instruct": {"output_dir": "llava-instruct", "data_path": "llava_v1_5_mix665k.json", "image_aspect_ratio": "pad",
                 "projector_learning_rate": 2e-5, "learning_rate": 2e-5, "per_device_train_batch_size": 4},
}
ROWS_A_STEP = {"align": 256, "instruct": 128}
LANGUAGE_MODELS = ("llama", "mistral")


@dataclass
class Settings:
    """What is trained on what: stage, parts or model, data, adapter, quantization. Names are LLaVA's own where it has some."""

    stage: str = field(default="align", metadata={"help": "align: the projector, on captions. instruct: projector and language model, on conversations.", "choices": ["align", "instruct"]})
    vision_tower: str = field(default="openai/clip-vit-large-patch14-336", metadata={"help": "CLIP to join: hub id or folder."})
    language_model: str = field(default="lmsys/vicuna-7b-v1.5", metadata={"help": "Llama or Mistral to join: hub id or folder."})
    projector_type: str | None = field(default=None, metadata={"help": "Between the two: mlp2x_gelu (LLaVA-1.5, the default) or linear (the first LLaVA).", "choices": ["mlp2x_gelu", "linear"]})
    model_name_or_path: str | None = field(default=None, metadata={"help": "A whole LLaVA to go on from, instead of joining: stage 1's output_dir, or llava-hf/llava-1.5-7b-hf. Default in instruct: llava-align."})
    pretrain_mm_mlp_adapter: str | None = field(default=None, metadata={"help": "Begin with this projector: stage 1's output_dir, or an mm_projector.bin of the original LLaVA."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of model_name_or_path: pin it for a run to be repeated."})
    vision_tower_revision: str | None = field(default=None, metadata={"help": "Likewise of vision_tower."})
    language_model_revision: str | None = field(default=None, metadata={"help": "Likewise of language_model."})
    data_path: str | None = field(default=None, metadata={"help": "LLaVA JSON, a list of rows; or .jsonl, one row a line. Default: LLaVA-1.5's own file of the stage."})
    eval_data_path: str | None = field(default=None, metadata={"help": "The same, to evaluate on. Default: eval_fraction of the images."})
    image_folder: str | None = field(default=None, metadata={"help": "Where relative image paths start. Default: the folder of the file."})
    eval_fraction: float = field(default=0.001, metadata={"help": "Share of the images held out, by seed, where there is no eval_data_path. 0: none."})
    max_eval_rows: int = field(default=200, metadata={"help": "Score at most so many rows at each evaluation, the same ones each time."})
    on_bad_rows: str = field(default="stop", metadata={"help": "Rows that cannot be trained on: list them and stop, or skip them.", "choices": ["stop", "skip"]})
    on_long_rows: str = field(default="drop", metadata={"help": "Rows longer than model_max_length: drop and count them, or stop.", "choices": ["drop", "stop"]})
    model_max_length: int = field(default=2048, metadata={"help": "Longest row in tokens, image tokens included (576 an image at 336 pixels). Never cut."})
    image_aspect_ratio: str | None = field(default=None, metadata={"help": "pad: make images square with the mean colour (default in instruct). square: crop the middle (default in align).", "choices": ["pad", "square"]})
    group_by_modality_length: bool = field(default=True, metadata={"help": "Rows of a step alike: all with images or all without, and about as long."})
    vision_learning_rate: float = field(default=0.0, metadata={"help": "Of the vision tower. 0: frozen."})
    projector_learning_rate: float | None = field(default=None, metadata={"help": "Of the projector. 0: frozen. Default: 1e-3 in align, 2e-5 in instruct."})
    lora_r: int = field(default=0, metadata={"help": "Rank of adapters on the language model, 128 in LLaVA's script. 0: it is trained in full."})
    lora_alpha: int | None = field(default=None, metadata={"help": "The adapter is scaled by alpha / r. Default: twice r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    load_in_4bit: bool = field(default=False, metadata={"help": "With adapters: language model, and nothing else, in 4-bit NF4 (QLoRA)."})
    sample_rows: int = field(default=8, metadata={"help": "Answer the last question of so many held-out rows at each evaluation, into samples.md. 0: none."})
    sample_tokens: int = field(default=64, metadata={"help": "Longest answer there, in tokens."})


@dataclass
class Training(TrainingArguments):
    """TrainingArguments with this recipe's defaults; docs/llava_two_stage.md says why where they differ from LLaVA's scripts."""

    output_dir: str | None = field(default=None, metadata={"help": "Model or adapter, processor, settings.yaml, samples.md, logs, checkpoints. Default: llava-align, llava-instruct."})
    resume_from_checkpoint: str = field(default="auto", metadata={"help": "auto: go on from the newest whole checkpoint in output_dir. false: refuse a used output_dir. Or a checkpoint."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data; max_steps bounds them."})
    per_device_train_batch_size: int | None = field(default=None, metadata={"help": "Raise it where memory is left. Default: 8 in align, 4 in instruct."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Rows scored at once."})
    gradient_accumulation_steps: int | None = field(default=None, metadata={"help": "Default: what makes a step of 256 rows (align) or 128 (instruct) on these GPUs."})
    learning_rate: float | None = field(default=None, metadata={"help": "Of the language model in instruct: 2e-5, with adapters 2e-4. In align it is frozen."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rates over the run."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps, or below 1 a share of the run."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: steps, epoch, no."})
    eval_steps: float = field(default=500, metadata={"help": "Steps between evaluations."})
    save_steps: float = field(default=500, metadata={"help": "Steps between checkpoints, each a whole model in align: what a crash can cost."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "true hides NaN losses in the log."})
    report_to: str = field(default="tensorboard", metadata={"help": "tensorboard, wandb, trackio, ..., none."})
    dataloader_num_workers: int = field(default=4, metadata={"help": "Processes that decode images while the GPU works."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Stays false: the row number is one of those columns."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Stays true: logits of the whole vocabulary would fill the memory."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "false: a batch without images runs a blank one, so that every part is used."})
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
REFUSED = """label_smoothing_factor label_names prediction_loss_only use_liger_kernel train_sampling_strategy
save_only_model remove_unused_columns gradient_checkpointing gradient_checkpointing_kwargs deepspeed fsdp do_train do_eval
do_predict neftune_noise_alpha torch_compile dataloader_drop_last auto_find_batch_size accelerator_config optim_target_modules""".split()
FREE_TO_CHANGE = """output_dir resume_from_checkpoint report_to run_name disable_tqdm log_level dataloader_num_workers
push_to_hub hub_model_id hub_strategy hub_private_repo max_eval_rows sample_rows sample_tokens logging_steps
save_total_limit per_device_eval_batch_size""".split()


def fail(message):
    """End the program with one message, of the first process where there are several, and exit status 1."""
    sys.exit(f"error: {message}" if os.environ.get("RANK", "0") == "0" else 1)


def by_stage(given):
    """{setting: value} as given -> the same with what its stage makes of those that were not."""
    filled, stage, processes = dict(given), given["stage"], int(os.environ.get("WORLD_SIZE", "1"))
    for name, value in DEFAULTS[stage].items():
        filled[name] = value if given[name] is None else given[name]
    if given["lora_alpha"] is None:
        filled["lora_alpha"] = max(1, 2 * given["lora_r"])
    if stage == "instruct" and given["learning_rate"] is None and given["lora_r"] > 0:
        filled["learning_rate"] = 2e-4
    if stage == "instruct" and given["model_name_or_path"] is None and given["pretrain_mm_mlp_adapter"] is None:
        filled["model_name_or_path"] = DEFAULTS["align"]["output_dir"]
    if given["gradient_accumulation_steps"] is None:
        rows = max(1, filled["per_device_train_batch_size"]) * processes
        if ROWS_A_STEP[stage] % rows:
            fail(f"{rows} rows at once on {processes} processes do not make up a step of {ROWS_A_STEP[stage]}: give --gradient_accumulation_steps")
        filled["gradient_accumulation_steps"] = ROWS_A_STEP[stage] // rows
    return filled


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
            fail(f"{', '.join(refused)}: not used by this recipe" + ", it is activation_checkpointing now" * ("--gradient_checkpointing" in refused)
                 + ": accelerate launch --config_file configs/zero3.yaml" * ("--deepspeed" in refused))
        settings, training = parser.parse_dict(by_stage(given))
    except (OSError, ValueError, TypeError, OverflowError) as e:
        fail(e)
    training.given = {k: v for k, v in given.items() if k != "hub_token"}  # what settings.yaml holds
    return settings, training


def rates(settings, training):
    """The learning rate of each part, as (vision tower, projector, language model); 0: frozen."""
    return settings.vision_learning_rate, settings.projector_learning_rate, training.learning_rate


def check(settings, training):
    """Stop before anything is loaded where the machine or a combination of flags cannot work. Raises SystemExit."""
    gpus, out, align = training.n_gpu, Path(training.output_dir), settings.stage == "align"
    adapter = [f"--{name}" for name in ("lora_alpha", "lora_dropout", "load_in_4bit") if training.given[name] != getattr(Settings, name)]
    odd = [f"--{name} {value}" for name, value in training.given.items() if isinstance(value, float) and not math.isfinite(value)]
    steps = [f"--{name}_steps" for name in ("eval", "save", "logging") if getattr(training, f"{name}_strategy") == "steps" and getattr(training, f"{name}_steps") <= 0]
    below = [f"--{name}" for name in ("weight_decay", "max_grad_norm", "warmup_steps", "data_seed") if (getattr(training, name) or 0) < 0]
    for wrong, message in (
        (below, f"{', '.join(below)}: 0 or more"),
        (steps, f"{', '.join(steps)}: above 0; --eval_strategy no and --save_strategy no switch them off"),
        (not training.use_cpu and training.device.type == "cpu", "no GPU found (7B: 24 GB to align or for QLoRA, several GPUs in full); for tiny models: --use_cpu"),
        (gpus > 1, f"{gpus} GPUs, one process. All: accelerate launch --num_processes {gpus} llava_two_stage.py. One: CUDA_VISIBLE_DEVICES=0"),
        (align and training.learning_rate != 0, f"--learning_rate {training.learning_rate:g} is the language model's, which is frozen in --stage align; "
         "the projector's is --projector_learning_rate"),
        (align and settings.lora_r, f"--lora_r {settings.lora_r}: adapters are for --stage instruct; in align the language model is frozen"),
        (adapter and not settings.lora_r, f"{', '.join(adapter)}: for adapters, --stage instruct --lora_r 128"),
        (settings.load_in_4bit and is_deepspeed_zero3_enabled(), "--load_in_4bit and ZeRO-3: 4-bit weights are not split; take configs/zero2.yaml or configs/ddp.yaml"),
        (settings.lora_r and training.learning_rate == 0, "--learning_rate 0 means a frozen language model: then --lora_r 0, and rates for the other parts"),
        (settings.model_name_or_path and any(getattr(settings, name) != getattr(Settings, name) for name in ("vision_tower", "language_model")),
         f"--vision_tower and --language_model are joined, --model_name_or_path {settings.model_name_or_path} is whole: one of them"
         + ("; to join them in --stage instruct give --pretrain_mm_mlp_adapter, the projector from stage 1" if not align else "")),
        (not all(0 <= rate < 10 for rate in rates(settings, training)), "learning rates: from 0, which means frozen, to below 10"),
        (odd, f"{', '.join(odd)}: no number to train with"),
        (not any(rates(settings, training)), "nothing would be trained: every part is frozen"),
        (settings.lora_alpha <= 0 or not 0 <= settings.lora_dropout < 1 or not 0 <= settings.eval_fraction < 1,
         "--lora_alpha must be above 0, --lora_dropout and --eval_fraction from 0 to below 1"),
        (min(settings.lora_r, settings.sample_rows, training.dataloader_num_workers, training.seed) < 0 or max(training.seed, training.data_seed or 0) >= 2**32,
         "--lora_r, --sample_rows, --dataloader_num_workers, --seed: 0 or more, and a seed below 2**32"),
        (min(settings.max_eval_rows, settings.sample_tokens, settings.model_max_length, training.per_device_train_batch_size,
             training.gradient_accumulation_steps, training.per_device_eval_batch_size) < 1,
         "batch sizes, accumulation steps, --max_eval_rows, --sample_tokens, --model_max_length: at least 1"),
        (training.max_steps == 0 or training.max_steps < -1 or not 0 < training.num_train_epochs, "--max_steps and --num_train_epochs must be above 0"),
        (training.debug, "--debug: not used by this recipe"),
        (not training.output_dir, "--output_dir: a folder is needed"),
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
    for name in ("model_name_or_path", "pretrain_mm_mlp_adapter", "vision_tower", "language_model"):  # the end would overwrite the beginning
        if (start := getattr(settings, name)) and Path(os.path.realpath(start)).is_relative_to(os.path.realpath(out)):
            fail(f"--output_dir {out} is {'' if os.path.realpath(start) == os.path.realpath(out) else 'around '}--{name}: choose another --output_dir")
    try:
        cls, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(training)
        get_scheduler(training.lr_scheduler_type, cls([torch.nn.Parameter(torch.zeros(1))], **kwargs), 1, 2, training.lr_scheduler_kwargs)
    except Exception as e:
        fail(f"--optim, --adam_... or --lr_scheduler_...: {e}")
    try:  # what would fail only after the weights are loaded
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
        if training.push_to_hub:
            HfApi(token=training.hub_token).whoami()
    except Exception as e:
        fail(f"--report_to or --push_to_hub: {e}")


def load_config(settings):
    """The configuration of the whole model, or of what is made by joining. Raises SystemExit for parts that cannot be joined."""
    whole = settings.model_name_or_path
    places = {"model_name_or_path": settings.model_revision} if whole else {"vision_tower": settings.vision_tower_revision, "language_model": settings.language_model_revision}
    found = []
    for name, revision in places.items():
        try:
            found.append(AutoConfig.from_pretrained(getattr(settings, name), revision=revision))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
            hint = "; it holds an adapter, needed is a whole LLaVA" if whole and Path(whole, "adapter_config.json").exists() else (
                "; --stage align makes one" if whole and settings.stage == "instruct" and not Path(whole, "config.json").exists() else "")
            here = "" if Path(getattr(settings, name)).exists() else "there is no such folder, and as a hub id: "
            fail(f"--{name} {getattr(settings, name)}: {here}{' '.join(str(e).split()):.400}{hint}")
    if whole and found[0].model_type != "llava":
        fail(f"--model_name_or_path {whole} is {found[0].model_type}; needed is a whole LLaVA (llava)")
    vision, text = (found[0].vision_config, found[0].text_config) if whole else (
        found[0].vision_config if found[0].model_type == "clip" else found[0], found[1])
    if vision.model_type != "clip_vision_model":
        fail(f"--{'model_name_or_path' if whole else 'vision_tower'} {whole or settings.vision_tower}: its vision encoder is "
             f"{vision.model_type}, tested is CLIP (clip_vision_model)")
    if text.model_type not in LANGUAGE_MODELS:
        fail(f"--{'model_name_or_path' if whole else 'language_model'} {whole or settings.language_model}: its language model is "
             f"{text.model_type}, tested are {', '.join(LANGUAGE_MODELS)}")
    config = found[0] if whole else LlavaConfig(
        vision_config=vision, text_config=text, image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act="linear" if settings.projector_type == "linear" else "gelu")  # linear: no activation, see join
    kind = "linear" if config.projector_hidden_act == "linear" else "mlp2x_gelu"
    if settings.projector_type not in (None, kind):
        fail(f"--projector_type {settings.projector_type}: {whole} has a projector of type {kind}")
    if not isinstance(config.vision_feature_layer, int):
        fail(f"{whole} takes features from several layers, {config.vision_feature_layer}: tested is one")
    return config


def check_weights(settings, config):
    """Stop where a folder has no weights, or some that were cut off, and not after all rows are read. Raises SystemExit."""
    for name in ("model_name_or_path",) if settings.model_name_or_path else ("vision_tower", "language_model"):
        folder = Path(getattr(settings, name))
        try:
            if folder.is_dir() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
                raise ValueError("there are no weights in it")
            for file in folder.glob("*.safetensors"):
                safe_open(file, "pt")  # fails where the end is missing
        except (OSError, ValueError, SafetensorError) as e:
            fail(f"--{name} {folder}: {e}")
    if settings.pretrain_mm_mlp_adapter:
        projector_weights(settings, config)


def projector_weights(settings, config):
    """pretrain_mm_mlp_adapter as a state dict of the projector. Raises SystemExit where it is none, or of other sizes than the config's."""
    path, found = Path(settings.pretrain_mm_mlp_adapter), {}
    try:
        if path.is_dir():
            for file in path.glob("*.safetensors"):
                with safe_open(file, "pt") as weights:
                    found |= {key: weights.get_tensor(key) for key in weights.keys() if "multi_modal_projector." in key}
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            found = {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)} if isinstance(loaded, dict) else {}
        names = {"mm_projector.0": "linear_1", "mm_projector.2": "linear_2", "mm_projector": "linear_1",
                 "multi_modal_projector.linear_1": "linear_1", "multi_modal_projector.linear_2": "linear_2"}
        own = {f"{new}.{kind}": value for key, value in found.items() for old, new in names.items() for kind in ("weight", "bias")
               if f".{key}".endswith(f".{old}.{kind}")}
        own |= {key: value for key, value in found.items() if re.search(r"(mm|multi_modal)_projector\.", str(key)) and not any(value is one for one in own.values())}
    except pickle.UnpicklingError:  # torch's own text advises to run what is in it
        fail(f"--pretrain_mm_mlp_adapter {path}: damaged, or a pickle that holds more than weights")
    except Exception as e:  # torch.load raises whatever it likes
        fail(f"--pretrain_mm_mlp_adapter {path}: {' '.join(str(e).split())[:300] or 'it is empty'}")
    wide, text = config.vision_config.hidden_size, config.text_config.hidden_size
    linear = config.projector_hidden_act == "linear"
    if linear and "linear_2.weight" not in own:  # the original's one matrix
        own |= {"linear_2.weight": torch.eye(text), "linear_2.bias": torch.zeros(text)}
    wanted = {"linear_1.weight": (text, wide), "linear_1.bias": (text,), "linear_2.weight": (text, text), "linear_2.bias": (text,)}
    if not own.keys() & {"linear_1.weight"}:
        fail(f"--pretrain_mm_mlp_adapter {path}: there is no projector in it; needed is stage 1's output_dir or an mm_projector.bin")
    idle = "linear_2.weight" in own and own["linear_2.weight"].float().equal(torch.eye(text))
    if {name: tuple(value.shape) for name, value in own.items()} != wanted or linear != idle:
        fail(f"--pretrain_mm_mlp_adapter {path} does not fit: it has {', '.join(f'{name} {tuple(value.shape)}' for name, value in sorted(own.items()))}"
             f"{', which does nothing: it is linear' * (idle and not linear)}; "
             f"a {'linear' if linear else 'mlp2x_gelu'} projector from {wide} to {text} is needed (--vision_tower, --language_model, --projector_type)")
    return own


# LLaVA's conversation templates: plain is image, caption and newline, whatever was asked; v1 has roles and a system prompt. LLaVA tokenizes the
# text after an image by itself, so that a Llama tokenizer puts its word mark before it; here a GAP, a space, makes the same tokens.
PLAIN = """{%- for m in messages -%}{%- if m.role == 'user' -%}{%- if m.content is not string -%}{%- for p in m.content if p.type == 'image' -%}
{{ '<image>' }}{%- endfor -%}{%- endif -%}{%- elif m.role == 'assistant' -%}
{{ 'GAP' + (m.content if m.content is string else m.content[0].text) + '\\n' }}{%- endif -%}{%- endfor -%}"""
V1 = """{%- macro text(m) -%}{%- if m.content is string -%}{{ m.content }}{%- else -%}{%- for p in m.content if p.type == 'text' -%}{{ p.text }}
{%- endfor -%}{%- endif -%}{%- endmacro -%}{%- if messages[0].role == 'system' -%}{{ text(messages[0]) + ' ' }}{%- else -%}
{{ 'A chat between a curious user and an artificial intelligence assistant. ' +
"The assistant gives helpful, detailed, and polite answers to the user's questions. " }}{%- endif -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{{ 'USER: ' }}{%- if m.content is not string -%}{%- for p in m.content if p.type == 'image' -%}
{{ '<image>' + ('GAP\\n' if text(m) or not loop.last else '') }}{%- endfor -%}{%- endif -%}{{ text(m) + ' ' }}{%- elif m.role == 'assistant' -%}{{ 'ASSISTANT: ' + text(m) + eos_token }}
{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""


def load_processor(settings):
    """The processor of the whole model, or of the parts with <image> added, with the stage's template and padding. Raises SystemExit."""
    whole = settings.model_name_or_path
    try:
        if whole:
            processor = AutoProcessor.from_pretrained(whole, revision=settings.model_revision)
        else:
            tokenizer = AutoTokenizer.from_pretrained(settings.language_model, revision=settings.language_model_revision,
                                                      extra_special_tokens={"image_token": "<image>"})
            images = AutoImageProcessor.from_pretrained(settings.vision_tower, revision=settings.vision_tower_revision)
            if tokenizer.convert_tokens_to_ids("<image>") != len(tokenizer) - 1:  # not added just now
                fail(f"--language_model {settings.language_model}: its tokenizer has a token <image> already; needed is a plain language model")
            processor = LlavaProcessor(images, tokenizer, patch_size=load_config(settings).vision_config.patch_size, vision_feature_select_strategy="default",
                                       num_additional_image_tokens=1)  # CLIP's CLS, which "default" then drops
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as e:
        fail(f"{whole or f'{settings.language_model} and {settings.vision_tower}'}: no processor: {' '.join(str(e).split()):.400}")
    if type(processor).__name__ != "LlavaProcessor":
        fail(f"--model_name_or_path {whole} has a {type(processor).__name__}; needed is LLaVA's processor")
    tokenizer = processor.tokenizer
    if tokenizer.eos_token is None:
        fail(f"{whole or settings.language_model}: its tokenizer has no EOS, nothing could end an answer")
    if tokenizer.pad_token is None:  # any will do: padding is masked by attention, never by its id
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # ready to generate for several rows at once
    own = {k: v for k, v in processor.image_processor.to_dict().items() if k != "image_processor_type"}
    if settings.image_aspect_ratio == "pad" or own.get("do_pad"):
        processor.image_processor = LlavaImageProcessorPil(**{**own, "do_pad": settings.image_aspect_ratio == "pad"})
    marks = tokenizer("a", add_special_tokens=False)["input_ids"] == tokenizer(" a", add_special_tokens=False)["input_ids"]
    processor.chat_template = (PLAIN if settings.stage == "align" else V1).replace("GAP", " " if marks else "")
    return processor


class BadRow(ValueError):
    """A row that cannot be trained on. The text is 'what: details and remedy'; rows are counted by what."""


def text_of(message):
    """The words of a message, without its images."""
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text")


def image_cells(row, folder):
    """The images of a row, as paths (from its own `folder` or this one). Raises BadRow."""
    image = row.get("image")
    cells = image if isinstance(image, list) else [] if image in (None, "") else [image]
    if odd := [path for path in cells if not isinstance(path, str) or not path]:
        raise BadRow(f"malformed image: {odd[0]!r:.100}; needed is a path, or a list of them")
    return [os.path.join(row.get("folder") or folder, path) for path in cells]


def load_image(path):
    """A file of any mode -> PIL RGB, upright. Raises BadRow where it is no image, or none to read."""
    where = path if len(path) < 500 else f"{path[:100]}... ({len(path)} characters)"  # a picture written as text
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no file")  # a pipe would be waited for
        image = Image.open(path)
        if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":  # an MPO, from a telephone, has its preview behind
            raise BadRow(f"several images: {where} holds {frames}, and only the first would be seen; give each its own file")
        image.load()  # verify() passes a truncated JPEG
        image = ImageOps.exif_transpose(image)
        if max(image.size) > 200 * min(image.size):  # a processor scales the short side to its size first
            raise ValueError(f"{image.size[0]} x {image.size[1]} is too narrow")
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
    """A JSON object -> dict; what stands there twice becomes an object of both, which no check lets pass as a text or a path."""
    named = dict(pairs)
    return named if len(named) == len(pairs) else {key: some[0] if len(some := [v for k, v in pairs if k == key]) == 1 else {"twice": some} for key in named}


def read_rows(name, split, settings):
    """A .json or .jsonl file -> its rows, numbered in `row`. `split` is for recipes whose data have some. Raises SystemExit."""
    path = Path(name)
    try:
        if path.suffix.lower() not in (".json", ".jsonl"):
            raise ValueError("read are .json and .jsonl files in LLaVA's own schema: see docs/llava_two_stage.md")
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
            raise ValueError("it is empty" if rows == [] else "needed is a list of rows in braces: see docs/llava_two_stage.md")
        if not any("conversations" in row or "caption" in row for row in rows):
            raise ValueError(f"no row has 'conversations'; the first one has {', '.join(rows[0]) or 'nothing'}")
        if odd := [(n, key) for n, row in enumerate(rows) for key in row if key.lower() in ("image", "images", "system", "video", "videos") and key != "image"]:
            raise ValueError(f"row {odd[0][0]} has a key {odd[0][1]!r}: images go under 'image', a system message is the first turn, there are no videos")
        if half := [n for n, row in enumerate(rows) if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))]:
            raise ValueError(f"half a character (a lone surrogate) is in rows {half[:20]}; mend their encoding")
        keys = ("id", "image", "conversations", "caption")
        data = datasets.Dataset.from_generator(  # dumps: Json() would read the text "7" as the number 7
            lambda rows, keys: ({key: json.dumps(row.get(key), ensure_ascii=False) for key in keys} for row in rows),
            features=datasets.Features({key: datasets.Json() for key in keys}), gen_kwargs={"rows": rows, "keys": keys})
    except (OSError, ValueError, RecursionError, datasets.exceptions.DatasetsError) as e:
        fail(f"cannot read {name}: {e.__cause__ or e}")
    folder = os.path.abspath(settings.image_folder or path.parent)
    return data.add_column("row", list(range(len(data)))).add_column("folder", [folder] * len(data))


def check_rows(data, name, collator, settings, training):
    """Every row through the collator, in parallel and cached -> those that can be trained on, with their `length` in tokens and number of `images`.
    Raises SystemExit with the first 20 bad or too long rows and counts by reason where the policy is to stop."""
    def attempt(row, version):
        try:
            return {"problem": None, "length": collator([row])["labels"].shape[1], "images": len(image_cells(row, ""))}
        except BadRow as e:
            return {"problem": str(e).split(": ", 1)[1], "length": 0, "images": 0}

    if len(data) == 0:
        fail(f"{name} is empty: there is nothing to train on")
    files = set()
    for row in data.select_columns(["image", "folder"]):
        with contextlib.suppress(BadRow):  # it is named below
            files |= set(image_cells(row, ""))
    version = sorted((f, os.stat(f).st_mtime_ns) for f in files if os.path.exists(f))  # map's cache key: a changed file is read again
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process would wait forever for OpenMP's threads, which only its parent has
    with training.main_process_first(desc=f"checking {name}"):
        found = data.map(
            attempt, fn_kwargs={"version": version}, remove_columns=data.column_names, desc=f"Checking {name}",
            features=datasets.Features(problem=datasets.Value("string"), length=datasets.Value("int64"), images=datasets.Value("int64")),
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
        report += ["Mend them (rows count from 0), or train without them: --on_bad_rows skip"] * (len(data) > len(bad) > counts["too long"])
        report += ["Raise --model_max_length, or train without the long ones: --on_long_rows drop"] * (counts["too long"] > 0)
        fail("\n".join([*report, "No row would be left."] if len(bad) == len(data) else report))
    if bad:
        PartialState().print("left out:", "\n".join(report))
    good = [n for n, problem in enumerate(problems) if not problem]
    return datasets.concatenate_datasets([data, found.select_columns(["length", "images"])], axis=1).select(good)


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
        images = [tuple(map(os.path.realpath, image_cells(row, ""))) or (f"row {row['row']}",) for row in train.select_columns(["image", "folder", "row"])]
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
    """Rows -> input_ids, attention_mask, labels (B, L), padded on the left, and pixel_values (images, 3, H, W) where there are images.

    Labels are -100 but, in align, on the caption and the newline that ends it, in instruct on the answers and the EOS that ends each. An
    answer begins where the prompt of inference ends; a row that does not begin with the very tokens of that prompt is refused. Raises BadRow."""

    def __init__(self, processor, settings, training):
        # no setting that has no say in a batch: all of this is the key under which the check is cached
        self.processor, self.stage, self.folder, self.max_length = processor, settings.stage, settings.image_folder or "", settings.model_max_length
        tokens = processor.tokenizer.added_tokens_decoder.values()
        self.control = {token.content for token in tokens if token.special} | {processor.image_token}
        self.stop = [processor.tokenizer.eos_token_id]  # where generation ends; a caption, at any token that ends in a newline (Llama 3 has many)
        if self.stage == "align":
            newlines = [n for token, n in processor.tokenizer.get_vocab().items() if token.endswith(("<0x0A>", "\u010a", "\n"))]
            self.stop += sorted(n for n in newlines if processor.tokenizer.decode([n]).endswith("\n"))

    def ask(self, question, images):
        """The user's turn: images, question."""
        return {"role": "user", "content": [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]}

    def read(self, row):
        """A row -> its messages in the chat template's form, with PIL images inside. Raises BadRow."""
        cells, turns, messages, seen = image_cells(row, self.folder), row.get("conversations"), [], 0
        if row.get("caption") is not None and turns is not None:
            raise BadRow("caption and conversations: the row has both; one of them")
        if row.get("caption") is not None and self.stage == "align":  # short for a conversation
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": row["caption"]}]
        if not isinstance(turns, list) or not turns:
            raise BadRow("no conversation: conversations must be a list of turns, {from, value}")
        lead = isinstance(turns[0], dict) and turns[0].get("from") == "system"
        for n, turn in enumerate(turns):
            role = "system" if lead and n == 0 else ("human", "gpt")[(n - lead) % 2]
            if not isinstance(turn, dict) or turn.get("from") != role:
                raise BadRow(f"wrong order of roles: turn {n} must be the {role}'s, {{from, value}}; it is {turn!r:.100}")
            if not isinstance(text := turn.get("value"), str) or not text.strip():
                raise BadRow(f"{'empty answer' if role == 'gpt' else 'empty turn'}: turn {n}, the {role}'s, says {text!r:.100}; needed is text")
            here = text.count("<image>") if role == "human" else 0
            text = text.replace("<image>", "").strip() if here else text  # as in LLaVA: images come first, wherever they stand
            if found := [token for token in self.control if token in text]:
                raise BadRow(f"control token: {found[0]} is typed in turn {n} and would become a real one; take it out")
            content, seen = [{"type": "image", "image": path} for path in cells[seen : seen + here]], seen + here
            messages.append({"role": {"human": "user", "gpt": "assistant"}.get(role, role),
                             "content": content + [{"type": "text", "text": text}] * bool(text)})
        if seen != len(cells):
            raise BadRow(f"images do not match: {seen} <image> in what the human says, {len(cells)} images")
        if self.stage == "align" and (len(messages) != 2 or lead or len(cells) != 1):
            raise BadRow(f"no caption: --stage align takes one image and one caption, not {len(messages)} turns and {len(cells)} images; conversations are for instruct")
        if self.stage == "align" and (said := re.search(r"(?m)^\s*((USER|ASSISTANT|Human|Assistant)\s?:|###)", text_of(messages[1]))):
            raise BadRow(f"roles in a caption: {said[0].strip()!r} begins a line of it; captions have none, conversations are for --stage instruct")
        if self.stage == "align" and "\n" in text_of(messages[1]):
            raise BadRow("several lines: a newline ends a caption, what follows would never be said; write it on one line")
        for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
            part["image"] = load_image(part["image"])
        return messages

    def tokenize(self, conversations, prompt=False):
        """Lists of messages -> the processor's batch; with `prompt`, ready to generate the next answer."""
        return self.processor.apply_chat_template(conversations, add_generation_prompt=prompt, tokenize=True, return_dict=True,
                                                  return_tensors="pt", processor_kwargs={"padding": True})

    def words(self, messages, prompt=False):
        """Token ids of a conversation, as the processor makes them, but without its image tokens."""
        text, tokenizer = self.processor.apply_chat_template(messages, add_generation_prompt=prompt), self.processor.tokenizer
        return [i for i in tokenizer(text)["input_ids"] if i != self.processor.image_token_id]

    def learned(self, messages):
        """Which of the words of a conversation are trained: a list of bools. Raises BadRow."""
        tokens = self.words(messages)
        learned = [False] * len(tokens)
        for n in (n for n, message in enumerate(messages) if message["role"] == "assistant"):
            prompt, answered = self.words(messages[:n], prompt=True), self.words(messages[: n + 1])
            if tokens[: len(prompt)] != prompt or tokens[: len(answered)] != answered:
                raise BadRow(f"prompt changed: by its first characters the answer {text_of(messages[n])[:40]!r} changes the tokens before it; begin it otherwise")
            learned[len(prompt) : len(answered)] = [True] * (len(answered) - len(prompt))
        return learned

    def __call__(self, rows):
        conversations, learned = [], []
        for row in rows:
            try:
                conversations.append(self.read(row))
                if conversations[-1][-1]["role"] != "assistant":
                    raise BadRow("no answer: the last turn is not gpt's")
                learned.append(torch.tensor(self.learned(conversations[-1])))
            except BadRow as e:
                raise BadRow(f"row {row.get('row', '?')}: {e}") from e
        batch = self.tokenize(conversations)
        for row, mask, ids in zip(rows, batch["attention_mask"], batch["input_ids"]):
            if (length := int(mask.sum())) > self.max_length:
                images = int((ids == self.processor.image_token_id).sum())
                raise BadRow(f"row {row.get('row', '?')}: too long: {length} tokens, {images} of them of images; --model_max_length is {self.max_length}")
        words = batch["attention_mask"].bool() & (batch["input_ids"] != self.processor.image_token_id)
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        batch["labels"][words] = batch["input_ids"][words].where(torch.cat(learned), -100)
        return batch


def gathered(parameters):
    """Under ZeRO-3, whose processes hold a share of each weight: the whole weights while the context lasts."""
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)  # what is changed there is kept


def complete(cls, name, **kwargs):
    """cls.from_pretrained, that fails where weights are missing instead of making them up with a warning. Raises ValueError."""
    model, info = cls.from_pretrained(name, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        raise ValueError(f"{name} lacks {len(info['missing_keys'])} weights of a {type(model).__name__}: {', '.join(sorted(info['missing_keys'])[:3])}")
    return model


def precision(training):
    """Of what is frozen, and of the model that is saved."""
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32


def join(settings, config, seed, **kwargs):
    """Vision encoder + new projector + language model, whose new rows of embeddings (of <image>, and what pads them to a multiple of 64)
    are the mean of the old ones. The projector begins as torch begins linear layers, like the original's."""
    vision = complete(CLIPVisionModel, settings.vision_tower, revision=settings.vision_tower_revision, **kwargs)
    language = complete(AutoModelForCausalLM, settings.language_model, revision=settings.language_model_revision, **kwargs)
    processor = load_processor(settings)
    old = processor.image_token_id  # it is the last one, so all before it
    language.resize_token_embeddings(max(old + 1, language.config.vocab_size), pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        for matrix in {language.get_input_embeddings().weight, language.get_output_embeddings().weight}:
            matrix[old:] = matrix[:old].float().mean(0).to(matrix.dtype)
    config.text_config, config.image_token_index = language.config, old
    config.vision_config = vision.config
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = LlavaMultiModalProjector(config)
    if config.projector_hidden_act == "linear":  # Transformers knows two layers only: the second one does nothing, and stays so
        torch.nn.init.eye_(projector.linear_2.weight)
        torch.nn.init.zeros_(projector.linear_2.bias)
    if settings.pretrain_mm_mlp_adapter:
        projector.load_state_dict(projector_weights(settings, config))
    model.model.multi_modal_projector = projector.to(vision.device, vision.dtype)
    model.model.vision_tower, model.model.language_model, model.lm_head = vision, language.get_decoder(), language.lm_head
    tokens = {f"{name}_token_id": getattr(processor.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**tokens)
    return model


def save(model, dtype, folder, state_dict=None, **kwargs):
    """save_pretrained in 16 bits and by the names of the published LLaVAs, which all versions of Transformers and vLLM read; those that
    Transformers gives today lack vision_model, and under ZeRO-3 it has one model too many."""
    old = {"model.vision_tower": "vision_tower.vision_model", "model.language_model": "language_model.model", "lm_head": "language_model.lm_head",
           "model.multi_modal_projector": "multi_modal_projector"}
    state = {re.sub(f"^({'|'.join(old)})", lambda new: old[new[0]], name): value.to("cpu", dtype)
             for name, value in (model.state_dict() if state_dict is None else state_dict).items()}
    type(model).save_pretrained(model, folder, state_dict=state, save_original_format=False, **kwargs)


def load_model(settings, training):
    """The model, joined or loaded, frozen but for what is trained in full: language model in NF4 with load_in_4bit, the rest in bf16 / fp16
    (float32 on a CPU). With adapters, which need a model to belong to, and with ZeRO-3, which loads in shares, a joined model is first
    written into output_dir/base."""
    config, dtype = load_config(settings), precision(training)
    kwargs = {"dtype": dtype} | ({} if is_deepspeed_zero3_enabled() else {"device_map": {"": training.device}})
    name, revision = settings.model_name_or_path, settings.model_revision
    if name is None and (settings.lora_r or is_deepspeed_zero3_enabled()):
        name, revision = os.path.join(training.output_dir, "base"), None
        with training.main_process_first():
            if not os.path.exists(os.path.join(name, "processor_config.json")):  # written last
                with patch.object(transformers.integrations.deepspeed, "_hf_deepspeed_config_weak_ref", None):  # one process: no shares
                    save(join(settings, config, training.seed, dtype=dtype), dtype, name)
                load_processor(settings).save_pretrained(name)
    if name is None:
        model = join(settings, config, training.seed, **kwargs)
    else:
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", *PARTS[:2]])  # replaces bitsandbytes' own list, so lm_head is named again
        model = complete(LlavaForConditionalGeneration, name, revision=revision, quantization_config=nf4 if settings.load_in_4bit else None, **kwargs)
    if settings.model_name_or_path and settings.pretrain_mm_mlp_adapter:
        with gathered(model.model.multi_modal_projector.parameters()):
            model.model.multi_modal_projector.load_state_dict(projector_weights(settings, config))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # on a CPU the first eval() would repack 4-bit weights for a
            module.support_avx512bf16_for_cpu = False  # kernel without autograd, and adapters would get no gradient
    model.requires_grad_(False)
    if settings.lora_r == 0:
        for part, rate in zip([*PARTS, "lm_head"], [*rates(settings, training), training.learning_rate]):
            model.get_submodule(part).requires_grad_(rate > 0)
        # The names of the files are those that Trainer resumes by.
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    return model


def lora_config(settings):
    """LoRA on every linear layer of the language model; beside it are the parts that have a rate, trained in full, and a projector that the
    whole model beneath does not have. None for r 0."""
    other = settings.model_name_or_path and settings.pretrain_mm_mlp_adapter
    needed = settings.vision_learning_rate, settings.projector_learning_rate or other
    return None if settings.lora_r == 0 else LoraConfig(
        r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout, task_type="CAUSAL_LM",
        target_modules=rf"{re.escape(PARTS[2])}\..*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=[part for part, need in zip(PARTS, needed) if need] or None)


def untrained(projector):
    """Whether a projector looks as it began: zero biases (Transformers' beginning), or no weight beyond torch's bound."""
    layers = [projector.linear_1] if projector.linear_2.weight.equal(torch.eye(len(projector.linear_2.weight)).to(projector.linear_2.weight)) else [
        projector.linear_1, projector.linear_2]
    return all((p.bias is not None and not p.bias.any()) or p.weight.abs().max() <= 1.01 * p.in_features**-0.5 for p in layers)


def marked(batch, processor):
    """The first row of a batch as text: what is trained on in «», runs of image tokens folded, padding left out."""
    out, shown, end, real = "", "", 0, batch["attention_mask"][0].bool()
    ids, labels = batch["input_ids"][0][real].tolist(), batch["labels"][0][real].tolist()
    kinds = ((token == processor.image_token_id, label != -100) for token, label in zip(ids, labels))
    for (image, trained), run in itertools.groupby(kinds):
        end += (count := len(list(run)))
        text = processor.tokenizer.decode(ids[:end])  # from the start: by itself a run would lose its leading space
        out += f"<image> x {count}" if image else f"«{text[len(shown) :]}»" if trained else text[len(shown) :]
        shown = text
    return out


class ByModalityAndLength(torch.utils.data.Sampler):
    """Numbers of rows, so that those of a step (`rows` of them: all processes, all accumulated) have images or have none, all of them,
    and are about as long; the longest come first. What is left over of both kinds comes last. `epoch` says which one begins: each has an order of its
    own, the same one in all processes and after a resume. After LLaVA's group_by_modality_length."""

    def __init__(self, lengths, images, rows, seed, epoch):
        self.lengths, self.images, self.rows, self.seed, self.epoch = list(lengths), list(images), rows, seed, epoch

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        random, steps, rest = torch.Generator().manual_seed(self.seed + self.epoch()), [], []
        for kind in (True, False):
            if mine := [n for n, images in enumerate(self.images) if (images > 0) == kind]:
                order = [mine[i] for i in get_length_grouped_indices([self.lengths[n] for n in mine], self.rows, generator=random)]
                full = len(order) - len(order) % self.rows
                steps += [order[n : n + self.rows] for n in range(0, full, self.rows)]
                rest += order[full:]
        steps = [steps[n] for n in torch.randperm(len(steps), generator=random)]
        if steps:  # if memory runs out, then in the first step
            longest = max(range(len(steps)), key=lambda step: max(self.lengths[n] for n in steps[step]))
            steps[0], steps[longest] = steps[longest], steps[0]
        return itertools.chain(*steps, rest)


def lean(model, size):
    """model.forward for training: scores label positions only (of a caption's 600 tokens 576 are its image's), and lets a batch without
    images run a blank one of `size` through tower and projector, to be put nowhere: several processes must use the same parts in the
    same order, or they wait for each other for ever."""
    usual, placeholders = model.forward, model.model.get_placeholder_mask

    def none_or_usual(input_ids, *args, **kwargs):
        mask = (input_ids == model.config.image_token_id).unsqueeze(-1)
        return placeholders(input_ids, *args, **kwargs) if mask.any() else mask

    def forward(input_ids=None, labels=None, pixel_values=None, num_items_in_batch=None, **kwargs):
        if labels is None:
            return usual(input_ids=input_ids, pixel_values=pixel_values, **kwargs)
        if pixel_values is None:
            pixel_values = torch.zeros(1, 3, size, size, device=input_ids.device, dtype=model.dtype)
        hidden = model.model(input_ids=input_ids, pixel_values=pixel_values, **kwargs).last_hidden_state
        told = labels[:, 1:] != -100
        logits = model.lm_head(hidden[:, :-1][told]).float()
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][told], reduction="sum")
        return CausalLMOutput(loss=loss / (told.sum() if num_items_in_batch is None else num_items_in_batch))

    model.model.get_placeholder_mask = none_or_usual
    return forward


class Trainer(transformers.Trainer):
    """Trainer with a learning rate for each part, batches by modality and length, a frozen vision tower without a graph, and after each
    evaluation captions or answers for a few held-out rows, greedily, in samples.md."""

    def __init__(self, settings, model, args, *more, **kwargs):
        self.settings, self.rates, base = settings, rates(settings, args), model.get_base_model() if isinstance(model, PeftModel) else model
        base.forward = lean(base, base.config.vision_config.image_size)
        super().__init__(model, args, *more, **kwargs)
        layers, feature = base.config.vision_config.num_hidden_layers, base.config.vision_feature_layer
        used = feature if feature >= 0 else layers + 1 + feature  # layers after the one that features are taken from get no gradient
        for name, p in self.model.named_parameters():
            layer = re.search(r"vision_tower\..*\blayers\.(\d+)\.", name)
            unused = layer and int(layer[1]) >= used or "vision_tower" in name and "post_layernorm" in name
            identity = base.config.projector_hidden_act == "linear" and ".linear_2." in name  # of a linear projector
            idle = self.rate(name) > 0 and (unused or identity)
            p.requires_grad &= self.rate(name) > 0 and not idle
            if (p.requires_grad or idle) and not self.is_deepspeed_enabled:  # in 16 bits small steps round to nothing; DeepSpeed has its own copy
                p.data = p.data.float()
        tower = base.get_submodule(PARTS[0])
        if not any(p.requires_grad for p in tower.parameters()):
            tower.forward = torch.no_grad()(tower.forward)  # checkpointing's hook on its input would back-propagate through it

    def rate(self, name):
        """The learning rate of a weight, by the part that its name belongs to."""
        return next((rate for part, rate in zip(PARTS, self.rates) if f".{part}." in f".{name}"), self.rates[2])

    def create_optimizer(self, *args, **kwargs):
        """AdamW, or --optim, with the rate of the part that a weight belongs to; biases and norms do not decay."""
        if self.optimizer is None:
            groups, decay, named = [], set(self.get_decay_parameter_names(self.model)), dict(self.model.named_parameters())
            main = max(self.rates[1:]) if self.settings.stage == "align" else self.rates[2]
            kind = lambda n: (self.rate(n) != main, self.rate(n), n in decay)  # the first group's rate is the one logged
            for (_, rate, decays), some in itertools.groupby(sorted((n for n, p in named.items() if p.requires_grad), key=kind), key=kind):
                groups.append({"params": [named[n] for n in some], "lr": rate, "weight_decay": self.args.weight_decay * decays})
            cls, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(groups, **settings)
        return self.optimizer

    def _get_train_sampler(self, train_dataset=None):
        data = self.train_dataset if train_dataset is None else train_dataset
        if not self.settings.group_by_modality_length:
            return super()._get_train_sampler(data)
        rows = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # asked for its epoch, not told by set_epoch: where several processes go on from a checkpoint, Accelerate's does not get there
        return ByModalityAndLength(data["length"], data["images"], rows, seed, epoch=lambda: int(self.state.epoch or 0))

    def evaluate(self, *args, **kwargs):
        metrics, collator, out = super().evaluate(*args, **kwargs), self.data_collator, Path(self.args.output_dir)
        rows = self.eval_dataset.select(range(min(self.settings.sample_rows, len(self.eval_dataset))))
        if len(rows) == 0 or not (self.is_world_process_zero() or is_deepspeed_zero3_enabled()):  # with ZeRO-3 it takes all of them to answer
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
            if self.is_world_process_zero():
                for n, picture in enumerate(pictures):
                    ImageOps.contain(picture, (224, 224)).save(out / f"samples/{row['row']}-{n}.png")
            cells = [" ".join(f"![](samples/{row['row']}-{n}.png)" for n in range(len(pictures))), text_of(messages[-2]),
                     text_of(messages[-1]), collator.processor.tokenizer.decode(ids, skip_special_tokens=True)]
            text += f"| {' | '.join(' '.join(cell.replace('|', '&#124;').split()) for cell in cells)} |\n"
        if self.is_world_process_zero():
            with open(out / "samples.md", "a", encoding="utf-8") as file:
                file.write(text)
        return metrics


def is_whole(folder):
    """Whether a checkpoint has all that it takes to go on from it; one that was cut off while it was written has not."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
        state["global_step"] + state["train_batch_size"]  # fails where one is missing
        weights = [safe_open(file, "pt") for file in folder.glob("*.safetensors")]  # fails where the end is missing
        optimizer = [folder / "optimizer.pt"]
        if list(folder.glob("global_step*")):  # DeepSpeed's
            optimizer = list((folder / (folder / "latest").read_text().strip()).glob("*.pt")) or optimizer
        files = [*optimizer, folder / "scheduler.pt", *(list(folder.glob("rng_state*")) or [folder / "rng_state.pth"])]
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
    for checkpoint in [wanted] if wanted not in ("auto", "false") else map(str, whole[-1:] * (not finished)):
        shares = len(list(Path(checkpoint).glob("global_step*/*optim_states.pt")))  # of the optimizer, one for each process with ZeRO
        if bool(shares) != (training.deepspeed_plugin is not None) or shares not in (0, training.world_size):
            fail(f"{checkpoint} was written {f'with DeepSpeed by {shares} processes' if shares else 'without DeepSpeed'}: go on in the same way, "
                 "or choose another --output_dir")
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
    check_weights(settings, load_config(settings))
    train, held_out = load_data(settings, training)
    if held_out is None:
        training.eval_strategy, training.load_best_model_at_end = "no", False
    processor = load_processor(settings)
    collator = Collator(processor, settings, training)
    say(f"\nOne row as the model sees it, trained on in «»:\n\n{marked(collator([train[0]]), processor)}\n")

    if checkpoint is None and settings.model_name_or_path is None and training.process_index == 0:
        Path(training.output_dir, "base", "processor_config.json").unlink(missing_ok=True)  # of an earlier attempt, with other parts perhaps
    try:
        model = load_model(settings, training)
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        fail(f"cannot load the weights of {settings.model_name_or_path or f'{settings.vision_tower} and {settings.language_model}'}: {e}")
    with gathered(model.model.multi_modal_projector.parameters()):
        if settings.stage == "instruct" and untrained(model.model.multi_modal_projector):
            say(f"warning: the projector of {settings.pretrain_mm_mlp_adapter or settings.model_name_or_path} has never been trained, what it sees means nothing yet: --stage align comes first")
    adapter = lora_config(settings)
    set_seed(training.seed)  # loading takes more or less of the random numbers by the way it is done
    base, model = model, get_peft_model(model, adapter) if adapter else model
    trainer = Trainer(settings, model, training, collator, train, held_out, processor)
    for part in PARTS:  # lm_head belongs to the language model
        named = [(n, p) for n, p in base.named_parameters() if "original_module." not in n
                 and part == next((other for other in PARTS if n.startswith(f"{other}.")), PARTS[2])]
        rate = max((trainer.rate(n) for n, p in named if p.requires_grad), default=0)
        own = [(p, type(p).__name__ == "Params4bit", getattr(p, "ds_numel", p.numel())) for _, p in named]  # ds_numel: split by ZeRO-3
        packed, trained = sum(2 * count for _, nf4, count in own if nf4), sum(count for p, _, count in own if p.requires_grad)
        count = packed + sum(count for _, nf4, count in own if not nf4)  # 4-bit: two in a byte
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
        if state and state.global_step >= steps and training.deepspeed_plugin is None:  # killed when it had only to save the result: train() would take a step more
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
    if adapter is None:
        base.save_pretrained = functools.partial(save, base, precision(training))
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
