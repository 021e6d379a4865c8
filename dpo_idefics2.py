# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0",
#   "pillow==13.0.0", "bitsandbytes==0.50.2", "pyyaml==6.0.3", "jinja2==3.1.6", "tensorboard==2.21.0",
# ]
# ///
"""Preference optimization (DPO) of Idefics2-8b against hallucination: 4-bit NF4 + LoRA on all linear layers, TRL's DPOTrainer,
one 24 GB GPU or several, with prompt and image computed once for each pair.

    accelerate launch dpo_idefics2.py                                     # idefics2-8b on RLAIF-V-Dataset
    python dpo_idefics2.py --dataset_name pairs.jsonl --image_folder pictures   # your own: image, question, chosen, rejected
    python dpo_idefics2.py --loss_type sigmoid sft                        # add the likelihood of the chosen answer: saner text
    python dpo_idefics2.py --adapters language                            # vision tower frozen: faster still
    python dpo_idefics2.py --model_name_or_path llava-hf/llava-1.5-7b-hf  # LLaVA-1.5, or google/paligemma-3b-mix-224
    python dpo_idefics2.py --config idefics2-dpo/settings.yaml            # the same again; after a crash it resumes

Stock DPO sends each image through the vision tower and each prompt through the language model twice for the policy and twice
for the reference. Here a pair is one sequence, prompt | chosen | rejected, in which the answers do not see each other: the
same losses and gradients, from 1.5 to 3.7 times less work. Every setting is a flag; every metric: docs/dpo_idefics2.md."""

import functools
import hashlib
import io
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
from typing import get_args, get_type_hints

import datasets
import torch
import yaml
from accelerate import PartialState
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TrainerState, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from trl import DPOConfig, DPOTrainer, TrlParser
from trl.trainer.utils import flush_left


@dataclass
class Settings:
    """What is trained on what: model, data, adapter, quantization."""

    model_name_or_path: str = field(default="HuggingFaceM4/idefics2-8b", metadata={"help": "Idefics2, LLaVA-1.5, PaliGemma (or another, on TRL's stock path): hub id or folder."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model: pin it for a run to be repeated."})
    shared_prompt: bool = field(default=True, metadata={"help": "Compute prompt and image once for each pair. false: TRL's stock path, the same losses, slower."})
    dataset_name: str = field(default="openbmb/RLAIF-V-Dataset", metadata={"help": "Hub id, folder, saved data set, or .json / .jsonl / .parquet file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set that has several."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on. Default: 'test' where there is one, else eval_fraction."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Evaluate on another data set, in any of the same forms."})
    image_folder: str | None = field(default=None, metadata={"help": "Where relative image paths start. Default: the folder of the .json file."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the image. Default: image, else images."})
    question_column: str | None = field(default=None, metadata={"help": "Column of the question, text or one message. Default: question, else prompt."})
    chosen_column: str = field(default="chosen", metadata={"help": "Column of the better answer, text or one message."})
    rejected_column: str = field(default="rejected", metadata={"help": "Column of the worse answer, text or one message."})
    eval_fraction: float = field(default=0.01, metadata={"help": "Share of the images held out, by seed, where there is no split to evaluate on. 0: none."})
    max_eval_rows: int = field(default=200, metadata={"help": "Score at most so many pairs at each evaluation, the same ones each time."})
    on_bad_rows: str = field(default="stop", metadata={"help": "Rows that cannot be trained on: list them and stop, or skip them.", "choices": ["stop", "skip"]})
    on_long_rows: str = field(default="drop", metadata={"help": "Rows longer than max_length: drop and count them, or stop.", "choices": ["drop", "stop"]})
    longest_edge: int = field(default=490, metadata={"help": "Idefics2: images are shrunk to this many pixels, as in the post half of its own 980. Larger: sharper, slower."})
    load_in_4bit: bool = field(default=True, metadata={"help": "Language model and connector in 4-bit NF4. false: 16 bits as in the post, about 11 GB more."})
    adapters: str = field(default="all", metadata={"help": "LoRA on all linear layers, or on the language model's only.", "choices": ["all", "language"]})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter is scaled by alpha / r."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA: weight-decomposed LoRA; slower, at low ranks sometimes better."})
    sample_rows: int = field(default=8, metadata={"help": "Answer so many held-out prompts at each evaluation, into samples.md. 0: none."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer there, in tokens."})


@dataclass
class Training(DPOConfig):
    """TRL's DPOConfig with this recipe's defaults; docs/dpo_idefics2.md says why where they differ from the 2024 post."""

    output_dir: str = field(default="idefics2-dpo", metadata={"help": "Adapter, processor, settings.yaml, samples.md, logs, checkpoints."})
    resume_from_checkpoint: str = field(default="auto", metadata={"help": "auto: go on from the newest whole checkpoint in output_dir. false: refuse a used output_dir. Or a checkpoint."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data; max_steps bounds them."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Pairs. Raise it first where memory is left."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Pairs scored, and prompts answered, at once."})
    gradient_accumulation_steps: int = field(default=32, metadata={"help": "Effective batch = this x per-device batch x GPUs."})
    learning_rate: float = field(default=5e-5, metadata={"help": "The post's; TRL's own default is 50 times less by now, too little for LoRA."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps, or below 1 a share of the run."})
    max_length: int | None = field(default=1024, metadata={"help": "Longest prompt and answer in tokens, image tokens included. Never cut."})
    beta: float = field(default=0.1, metadata={"help": "How much it costs to depart from the reference; higher: stay closer."})
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"], metadata={"help": "One of TRL's losses, or several: sigmoid sft."})
    loss_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each loss. Default: 1."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: steps, epoch, no."})
    eval_steps: float = field(default=50, metadata={"help": "Steps between evaluations."})
    save_steps: float = field(default=50, metadata={"help": "Steps between checkpoints: what a crash can cost."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept: the newest and, where asked for, the best."})
    load_best_model_at_end: bool = field(default=False, metadata={"help": "Save the checkpoint with the lowest eval_loss. Read samples.md before you trust it."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "true hides NaN losses in the log."})
    report_to: str = field(default="tensorboard", metadata={"help": "tensorboard, wandb, trackio, ..., none."})
    dataloader_num_workers: int = field(default=4, metadata={"help": "Processes that decode images while the GPU works."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Stays false: the row number is one of those columns."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "true where another family of models leaves adapters unused."})
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
REFUSED = """precompute_ref_log_probs precompute_ref_batch_size sync_ref_model ref_model_mixup_alpha ref_model_sync_steps padding_free
pad_to_multiple_of truncation_mode dataset_num_proc pad_token model_init_kwargs trust_remote_code router_aux_loss_coef
use_liger_kernel label_smoothing_factor label_names prediction_loss_only save_only_model remove_unused_columns
gradient_checkpointing gradient_checkpointing_kwargs deepspeed fsdp do_train do_eval do_predict
activation_offloading neftune_noise_alpha torch_compile dataloader_drop_last""".split()
FREE_TO_CHANGE = """output_dir resume_from_checkpoint shared_prompt report_to run_name disable_tqdm log_level dataloader_num_workers
push_to_hub hub_model_id hub_strategy hub_private_repo max_eval_rows sample_rows max_new_tokens logging_steps
save_total_limit per_device_eval_batch_size""".split()
# TRL 1.16's: all are functions of the log-probabilities of both answers' tokens under policy and reference.
LOSSES = """sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft
sigmoid_norm""".split()


def fail(message):
    """End the program with one message, of the first process where there are several, and exit status 1."""
    sys.exit(f"error: {message}" if os.environ.get("RANK", "0") == "0" else 1)


def parse(argv=None):
    """Flags and `--config run.yaml` -> (Settings, Training), on any machine. Raises SystemExit with one line."""
    parser = TrlParser([Settings, Training], allow_abbrev=False)
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


def check(settings, training):
    """Stop before anything is loaded where the machine or a combination of flags cannot work. Raises SystemExit."""
    gpus, out, losses, smoothing = training.n_gpu, Path(training.output_dir), set(training.loss_type), training.label_smoothing
    weights = training.loss_weights or [1]
    steps = [f"--{name}_steps" for name in ("eval", "save", "logging") if getattr(training, f"{name}_strategy") == "steps" and getattr(training, f"{name}_steps") <= 0]
    for wrong, message in (
        (not training.use_cpu and training.device.type == "cpu", "no GPU found (Idefics2-8b needs 24 GB); for tiny models: --use_cpu"),
        (gpus > 1, f"{gpus} GPUs, one process. All: accelerate launch --num_processes {gpus} dpo_idefics2.py. One: CUDA_VISIBLE_DEVICES=0"),
        (min(settings.sample_rows, training.dataloader_num_workers, training.seed) < 0 or training.seed >= 2**32,
         "--sample_rows, --dataloader_num_workers, --seed: 0 or more, and a seed below 2**32"),
        (not 0 < training.learning_rate < 10 or settings.lora_alpha <= 0 or not 0 < training.beta < math.inf or not training.discopop_tau > 0,
         "--learning_rate, --lora_alpha, --beta and --discopop_tau must be above 0, the first below 10"),
        (steps, f"{', '.join(steps)}: above 0; --eval_strategy no and --save_strategy no switch them off"),
        (min(settings.lora_r, settings.max_eval_rows, settings.max_new_tokens, settings.longest_edge,
             1 if training.max_length is None else training.max_length,
             training.per_device_train_batch_size, training.gradient_accumulation_steps, training.per_device_eval_batch_size) < 1,
         "--lora_r, batch sizes, accumulation steps, --max_eval_rows, --max_new_tokens, --max_length, --longest_edge: at least 1"),
        (training.max_steps == 0 or not 0 < training.num_train_epochs < math.inf, "--max_steps and --num_train_epochs must be above 0"),
        (any(folder.is_file() for folder in (out, *out.parents)), f"--output_dir {out}: there is a file in its place"),
        (not 0 <= settings.eval_fraction < 1, "--eval_fraction: from 0 to below 1"),
        (training.load_best_model_at_end and training.eval_strategy == training.save_strategy == "steps" and training.eval_steps != training.save_steps,
         "what is best must have been saved: --save_steps equal to --eval_steps, or else --load_best_model_at_end false"),
        (training.fp16 and training.use_cpu, "--fp16 needs a GPU"),
        (training.load_best_model_at_end and training.metric_for_best_model not in ("loss", "eval_loss"),
         f"--metric_for_best_model {training.metric_for_best_model}: TRL gives the choice no other metric than loss"),
        (training.load_best_model_at_end and training.greater_is_better, "--greater_is_better true would keep the checkpoint with the highest loss"),
        (not losses or losses - set(LOSSES), f"--loss_type {' '.join(sorted(losses - set(LOSSES)))}: a loss here is one over the log-probabilities of a chosen and a "
         f"rejected answer under policy and reference: {', '.join(LOSSES)} (kto, orpo, cpo, simpo and others have trainers of their own in TRL)"),
        (min(weights) < 0 or not 0 < sum(weights) < math.inf, "--loss_weights: none below 0, and not all 0"),
        ("exo_pair" in losses and not 0 < smoothing < 1, "--loss_type exo_pair needs --label_smoothing above 0 and below 1 (its paper: 0.001)"),
        (losses & {"robust", "aot", "aot_unpaired"} and not 0 <= smoothing < 0.5,
         "--loss_type robust and aot take --label_smoothing from 0 to below 0.5 (the paper of robust: 0.1)"),
        (smoothing and not losses & {"exo_pair", "robust", "aot", "aot_unpaired"}, "--label_smoothing is for the losses exo_pair, robust and aot"),
        (training.use_weighting and losses & {"aot", "aot_unpaired"}, "--use_weighting: not with the losses aot, which sort the pairs"),
        (training.ld_alpha is not None and not 0 <= training.ld_alpha <= 1, "--ld_alpha: from 0 to 1"),
        (training.f_divergence_type not in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
         f"--f_divergence_type {training.f_divergence_type}: known are reverse_kl, forward_kl, js_divergence, alpha_divergence"),
        (training.f_divergence_type != "reverse_kl" and losses & {"nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"},
         f"--f_divergence_type {training.f_divergence_type}: the losses nca_pair, bco_pair, sppo_hard, aot and apo are made for reverse_kl only"),
    ):
        if wrong:
            fail(message)
    try:  # what would fail only after the weights are loaded
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
        if training.push_to_hub:
            HfApi(token=training.hub_token).whoami()
    except Exception as e:
        fail(f"--report_to or --push_to_hub: {e}")


def load_processor(settings):
    """The model's processor, set to this run's image size, without image splitting. Raises SystemExit for a model without images."""
    name = settings.model_name_or_path
    try:
        processor = AutoProcessor.from_pretrained(name, revision=settings.model_revision)
    except (OSError, ValueError, ImportError) as e:  # another kind of model may want packages of its own
        fail(f"--model_name_or_path {name}: {'needed is Idefics2, LLaVA or PaliGemma; ' * isinstance(e, ImportError)}{e}")
    images, kind = getattr(processor, "image_processor", None), type(processor).__name__
    if images is None:
        fail(f"{name} has a {kind}: needed is a model of images and text, such as idefics2-8b")
    if not getattr(processor, "chat_template", None) and kind != "PaliGemmaProcessor":  # PaliGemma knows no roles
        fail(f"{name} has a {kind} without a chat template, which says how a question is put")
    if hasattr(images, "do_image_splitting"):
        images.do_image_splitting = False
    if kind == "Idefics2Processor":
        least, most = images.size["shortest_edge"], images.size["longest_edge"]
        if settings.longest_edge < least or settings.longest_edge > most and settings.longest_edge != Settings.longest_edge:
            fail(f"--longest_edge {settings.longest_edge}: this model's images have from {least} (smaller ones are enlarged) to {most} pixels")
        images.size = {**dict(images.size), "longest_edge": min(most, settings.longest_edge)}
    elif settings.longest_edge != Settings.longest_edge:
        fail(f"--longest_edge is for Idefics2; a {kind} has a size of its own")
    if processor.tokenizer.pad_token is None:  # any will do: padding is masked by attention, never by its id
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    if processor.tokenizer.eos_token is None:
        fail(f"{name} has a tokenizer without an eos_token, which ends an answer; is its tokenizer_config.json there?")
    try:
        if getattr(processor, "chat_template", None):
            text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}])
            processor(text=[text], images=[[Image.new("RGB", (64, 64))]])  # fails where the text has no place for the image
    except Exception as e:  # Jinja's, or the processor's
        fail(f"{name} has a {kind} whose chat template cannot put a question about an image: {e}")
    return processor


class BadRow(ValueError):
    """A row that cannot be trained on. The text is 'what: details and remedy'; rows are counted by what."""


def text_of(message):
    """The words of a message, without its image."""
    return message["content"][-1]["text"]


def plain_text(cell, what):
    """A text, or one message as TRL's preference data have it -> the text, no white space around it. Raises BadRow."""
    if isinstance(cell, list):
        if len(cell) != 1 or not isinstance(cell[0], dict):
            raise BadRow(f"{what} is not one message: it is a list of {len(cell)}; a pair is one question and two answers to it")
        if (role := cell[0].get("role")) not in (None, "user" if what == "question" else "assistant"):
            raise BadRow(f"{what} of another role: it is a message of {role!r}; are the columns those of the question and of two answers to it?")
        cell = cell[0].get("content")
        whole = isinstance(cell, list) and all(isinstance(part, dict) for part in cell)
        parts = [part.get("text") for part in cell if part.get("type") == "text"] if whole else [cell]
        if whole and parts and len(cell) - len(parts) > (what == "question"):
            raise BadRow(f"images in the {what}: {len(cell) - len(parts)} parts of its message are no text; a pair is about one image, in the question")
        if len(parts) > 1:
            raise BadRow(f"{what} of several texts: its message has {len(parts)}; make them one")
        cell = parts[0] if parts else None
    if not isinstance(cell, str):
        raise BadRow(f"{what} is no text: {cell!r}; write it in quotes, as the model shall read or say it")
    if not cell.strip():
        raise BadRow(f"empty {what}: {cell!r} holds nothing but white space")
    return cell.strip()


def image_cell(row, folder):
    """The image of a row as it has it: a path (from its own `folder` or this one), {"bytes"}, a PIL image; None where there is none."""
    cell = row.get("image")
    cell = cell[0] if isinstance(cell, list) and len(cell) == 1 else cell
    cell = {"bytes": cell} if isinstance(cell, bytes) else cell
    cell = cell.get("path") if isinstance(cell, dict) and not cell.get("bytes") else cell
    return os.path.join(row.get("folder") or folder, cell) if isinstance(cell, str) else cell


def load_image(cell):
    """A path, {"bytes"} or a PIL image, of any mode -> PIL RGB, upright. Raises BadRow where it is no image, or none to read."""
    if cell is None or isinstance(cell, list):
        raise BadRow(f"{len(cell or ())} images: needed is one, a path or the bytes of a file; --image_column names the column")
    where = str((cell.get("path") or "its bytes") if isinstance(cell, dict) else cell)
    where = where if len(where) < 500 else f"{where[:100]}... ({len(where)} characters)"  # a picture written as text
    try:
        if isinstance(cell, str) and os.path.exists(cell) and not os.path.isfile(cell):
            raise ValueError("it is no file")  # a pipe would be waited for
        image = cell if isinstance(cell, Image.Image) else Image.open(io.BytesIO(cell["bytes"]) if isinstance(cell, dict) else cell)
        if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":  # an MPO, from a telephone, has its preview behind
            raise BadRow(f"{frames} images: {where} holds several, and only the first would be seen; give each its own file")
        image.load()  # verify() passes a truncated JPEG
        image = ImageOps.exif_transpose(image)
        if max(image.size) > 20 * min(image.size):  # Idefics2 brings each side by itself to at least 378 pixels
            raise BadRow(f"image too narrow: {where} has {image.size[0]} x {image.size[1]} pixels, above 1 : 20 it is stretched beyond recognition; crop it")
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


def once(pairs):
    """A JSON object -> dict. Raises ValueError where a key stands twice: the last one would win without a word."""
    if len(named := dict(pairs)) < len(pairs):
        raise ValueError(f"a key stands twice in {str(pairs):.200}; once is right")
    return named


def read_rows(name, split, settings):
    """A split of a hub id, folder, saved data set or file (a file is all `train`), with row numbers in `row`; for split None
    `test`, or None where there is none. Raises SystemExit."""
    path = Path(name)
    try:
        if path.suffix.lower() in (".json", ".jsonl"):
            text, lines = path.read_text(encoding="utf-8-sig"), path.suffix.lower() == ".jsonl"
            try:
                rows = json.loads("[" + ",\n".join(x for x in text.split("\n") if x.strip()) + "]" if lines else text, object_pairs_hook=once)
            except json.JSONDecodeError as e:
                raise ValueError(f"{e} (a .json file is one list of rows, a .jsonl file has one row a line)") from None
            if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError("it is empty" if rows == [] else "needed is a list of rows in braces: see the README")
            if half := [n for n, row in enumerate(rows) if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))]:
                raise ValueError(f"half a character (a lone surrogate) is in rows {half[:20]}; mend their encoding")
            cells = {key: datasets.Json() for row in rows for key in row}  # a column may hold values of different types
            data = datasets.Dataset.from_generator(  # dumps: Json() would read the text "7" as the number 7
                lambda rows, keys: ({key: json.dumps(row.get(key), ensure_ascii=False) for key in keys} for row in rows),
                features=datasets.Features(cells), gen_kwargs={"rows": rows, "keys": tuple(cells)})
        elif path.suffix.lower() == ".parquet":
            data = datasets.load_dataset("parquet", data_files=name)
        elif path.is_file():
            raise ValueError("read are .json, .jsonl and .parquet files, folders, saved data sets and hub ids")
        elif (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, settings.dataset_config, revision=settings.dataset_revision)
    except (OSError, ValueError, RecursionError, StopIteration, IndexError, datasets.exceptions.DatasetsError) as e:
        fail(f"cannot read {name}: {'it is empty' if isinstance(e, (StopIteration, IndexError)) else e.__cause__ or e}")
    data = data if isinstance(data, dict) else {"train": data}
    if (split or "test") not in data:
        return None if split is None else fail(f"{name} has no split {split!r}; it has {', '.join(data)}")
    data, columns = data[split or "test"], data[split or "test"].column_names
    wanted = {"image": settings.image_column or next((column for column in ("image", "images") if column in columns), "image"),
              "question": settings.question_column or next((column for column in ("question", "prompt") if column in columns), "question"),
              "chosen": settings.chosen_column, "rejected": settings.rejected_column}
    missing = {key: f"{column!r} (--{key}_column)" for key, column in wanted.items() if column not in columns}
    if missing and missing.keys() != {"chosen", "rejected"}:  # to ask questions, no answers are needed
        fail(f"{name} has no column {' and '.join(missing.values())}; it has {', '.join(columns)}")
    if len(set(wanted.values())) < 4:
        fail(f"one column cannot be two of image, question, chosen and rejected: {wanted}")
    keep = {key: data.select_columns(column).rename_column(column, key) if column != key else data.select_columns(column)
            for key, column in {"id": "id", **wanted}.items() if column in columns}
    data = datasets.concatenate_datasets(list(keep.values()), axis=1)
    if "Image(" in str(image := data.features["image"]):  # the collator decodes: it can name the row
        cell = datasets.Image(decode=False)
        data = data.cast_column("image", cell if isinstance(image, datasets.Image) else datasets.List(cell))
    folder = os.path.abspath(settings.image_folder or (path if path.is_dir() else path.parent))
    return data.add_column("row", list(range(len(data)))).add_column("folder", [folder] * len(data))


def check_rows(data, name, collator, settings, training):
    """Every row through the collator, in parallel and cached -> those that can be trained on, with their `length`.
    Raises SystemExit with the first 20 bad or too long rows and counts by reason where the policy is to stop."""
    def attempt(row, version):
        try:
            return {"problem": None, "length": collator([row])["input_ids"].shape[1]}
        except BadRow as e:
            return {"problem": str(e).split(": ", 1)[1], "length": 0}

    if len(data) == 0:
        fail(f"{name} is empty: there is nothing to train on")
    embedded = "Image(" in str(data.features["image"]) and not isinstance(image_cell(data[0], ""), str)
    own = [] if embedded else data.select_columns(["image", "folder"])
    files = {cell for cell in (image_cell(row, "") for row in own) if isinstance(cell, str)}
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
        report += ["Raise --max_length, or train without the long ones: --on_long_rows drop"] * (counts["too long"] > 0)
        fail("\n".join([*report, "No row would be left."] if len(bad) == len(data) else report))
    if bad:
        PartialState().print("left out:", "\n".join(report))
    good = [n for n, problem in enumerate(problems) if not problem]
    return datasets.concatenate_datasets([data, found.select_columns("length")], axis=1).select(good)


def load_data(settings, training):
    """-> (train, eval): Datasets of rows that the Collator accepts, with their number in `row`; eval may be None."""
    collator = Collator(load_processor(settings), settings, training)
    train = read_rows(settings.dataset_name, settings.dataset_train_split, settings)
    split, held_out = settings.dataset_test_split or (settings.dataset_train_split if settings.eval_dataset_name else None), None
    if training.eval_strategy != "no" and (split or settings.dataset_train_split != "test"):
        held_out = read_rows(settings.eval_dataset_name or settings.dataset_name, split, settings)
    if held_out is not None:  # bounded before it is checked: no need to decode what is never scored
        held_out = held_out.shuffle(training.seed).select(range(min(len(held_out), settings.max_eval_rows))).flatten_indices()
        held_out = check_rows(held_out, "the evaluation data", collator, settings, training)
    train = check_rows(train, settings.dataset_name, collator, settings, training)
    if held_out is None and settings.eval_fraction > 0 and training.eval_strategy != "no":
        images = [os.path.realpath(cell) if isinstance(cell, str) else hashlib.sha256(cell["bytes"]).hexdigest()
                  for cell in (image_cell(row, "") for row in train.select_columns(["image", "folder"]))]
        every = sorted(set(images))  # of images, not of rows: other pairs about an image are no test
        random.Random(training.seed).shuffle(every)
        apart = set(every[: max(1, round(settings.eval_fraction * len(every)))])
        if len(apart) == len(every):
            fail(f"{len(every)} images cannot be divided into training and evaluation: --eval_fraction 0 (none), or give --eval_dataset_name")
        train, held_out = (train.select([n for n, image in enumerate(images) if (image in apart) == held]) for held in (False, True))
        held_out = held_out.shuffle(training.seed).select(range(min(len(held_out), settings.max_eval_rows)))
    return train, held_out


class Collator:
    """Rows -> what TRL's DPOTrainer takes: input_ids, attention_mask, completion_mask (2B, L), padded on the right; first every prompt
    with its chosen answer, then every prompt with its rejected one. The processor's image tensors are in it twice, likewise.

    completion_mask is 1 on an answer and the token that ends it, which generation stops at; nothing else is learnt from. The prompt is the
    very one of inference. Raises BadRow."""

    def __init__(self, processor, settings, training):
        # no setting that has no say in a batch: all of this is the key under which the check is cached
        self.processor, self.folder, self.max_length = processor, settings.image_folder or "", training.max_length or math.inf
        tokenizer = processor.tokenizer
        self.control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.ends = [token for token in ("<end_of_utterance>", tokenizer.eos_token) if token in self.control]
        self.stop = tokenizer.convert_tokens_to_ids(self.ends)  # where generation ends

    def ask(self, question, images):
        """The user's turn: image, question. Raises BadRow where it is not one image."""
        if len(images) != 1:
            raise BadRow(f"{len(images)} images: a pair is about one")
        return {"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": question}]}

    def read(self, row):
        """A row -> [the user's turn, with a PIL image inside, and the assistant's, where the row has answers: the chosen one as its text, beside
        it the text `rejected`]. Raises BadRow."""
        there = [what for what in ("chosen", "rejected") if row.get(what) is not None]
        texts = {what: plain_text(row.get(what), what) for what in ("question", *there)}
        if len(there) == 1:
            raise BadRow(f"one answer: the row has a {there[0]} one only; a preference is between two")
        for what, text in texts.items():
            if found := [token for token in self.control if token in text]:
                raise BadRow(f"control token: {found[0]} is typed in the {what} and would become a real one; take it out")
        if there and texts["chosen"] == texts["rejected"]:
            raise BadRow(f"equal answers: chosen and rejected are both {texts['chosen']!r}, there is nothing to prefer")
        turns = [self.ask(texts["question"], [load_image(image_cell(row, self.folder))])]
        return turns + [self.answer(texts["chosen"]) | {"rejected": texts["rejected"]} for _ in there[:1]]

    def answer(self, text):
        """The assistant's turn."""
        return {"role": "assistant", "content": [{"type": "text", "text": text}]}

    def render(self, messages, prompt=False):
        """Messages -> text with a mark for the image, as the processor takes it."""
        if getattr(self.processor, "chat_template", None):
            return self.processor.apply_chat_template(messages, add_generation_prompt=prompt)
        return self.processor.image_token + "\n".join(map(text_of, messages))  # PaliGemma's puts BOS and a newline to it

    def tokenize(self, conversations, prompt=False):
        """Lists of messages -> the processor's batch, padded on the left; with `prompt`, ready to generate the next answer."""
        texts = [self.render(messages, prompt) for messages in conversations]
        images = [[part["image"] for message in messages for part in message["content"] if part["type"] == "image"] for messages in conversations]
        own = texts[0].startswith(self.processor.tokenizer.bos_token or "\0")  # some templates begin with a BOS of their own
        batch = self.processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=not own)
        batch.pop("labels", None)  # PaliGemma's: none, in a prompt
        return batch

    def continuations(self, asked, answers):
        """The user's turn and answers to it -> for each, the token ids that continue the prompt, up to where generation stops. Raises BadRow."""
        prompt, texts = self.render([asked], prompt=True), []
        prompt += "" if getattr(self.processor, "chat_template", None) else "\n"
        for answer in answers:
            whole = self.render([asked, self.answer(answer)])
            if not whole.startswith(prompt) or answer not in (said := whole[len(prompt) :]):
                raise BadRow(f"prompt changed: with the answer {answer!r} the chat template renders the question otherwise than it asks it")
            behind = said.index(answer) + len(answer)
            found = [(said.index(end, behind), end) for end in self.ends if end in said[behind:]]  # LLaVA's template ends no answer: EOS does
            texts.append(prompt + (said[: min(found)[0]] + min(found)[1] if found else said[:behind] + self.ends[-1]))
        start, *every = self.processor.tokenizer([prompt, *texts], add_special_tokens=False)["input_ids"]
        if changed := [answer for ids, answer in zip(every, answers) if ids[: len(start)] != start]:  # training must continue the prompt of inference
            raise BadRow(f"prompt changed: by its first characters the answer {changed[0]!r} changes its tokens; begin it otherwise")
        if every[0] in every[1:]:
            raise BadRow(f"equal answers: to the tokenizer {answers[0]!r} and {answers[1]!r} are the same")
        return [ids[len(start) :] for ids in every]

    def __call__(self, rows):
        prompts, said = [], []
        for row in rows:
            try:
                asked, *answer = self.read(row)
                if not answer:
                    raise BadRow("no answers: the row has none; see --chosen_column and --rejected_column")
                said.append(self.continuations(asked, [text_of(answer[0]), answer[0]["rejected"]]))
                prompts.append([asked])
            except BadRow as e:
                raise BadRow(f"row {row.get('row', '?')}: {e}") from e
        batch, tokenizer = self.tokenize(prompts, prompt=True), self.processor.tokenizer
        for row, real, answers in zip(rows, batch["attention_mask"], said):
            if (length := int(real.sum()) + max(map(len, answers))) > self.max_length:
                raise BadRow(f"row {row.get('row', '?')}: too long: {length} tokens, --max_length is {self.max_length}")
        answers = tokenizer.pad({"input_ids": [chosen for chosen, _ in said] + [rejected for _, rejected in said]}, padding_side="right", return_tensors="pt")
        batch = {name: torch.cat([values, values]) for name, values in batch.items()}
        completion = torch.cat([torch.zeros_like(batch["attention_mask"]), answers["attention_mask"]], dim=1)
        tail = {**answers, "token_type_ids": answers["attention_mask"], "mm_token_type_ids": torch.zeros_like(answers["input_ids"])}
        names = [name for name in tail if name in batch]  # what has a value for each token
        values = [torch.cat([batch[name], tail[name]], dim=1) for name in names]
        real = values[names.index("attention_mask")]
        _, batch["completion_mask"], *values = flush_left(real, completion, *values)
        return batch | dict(zip(names, values))


def load_model(settings, training):
    """The base model, frozen: language model and connector in NF4 where asked, the rest in bf16 / fp16 (float32 on a CPU)."""
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        # replaces bitsandbytes' own list, so lm_head is named again; names count from the start of the full path
        llm_int8_skip_modules=["lm_head", "model.vision_model", "model.vision_tower", "model.visual"])
    model = AutoModelForImageTextToText.from_pretrained(
        settings.model_name_or_path, revision=settings.model_revision, dtype=dtype, device_map={"": training.device},
        quantization_config=nf4 if settings.load_in_4bit else None)  # BitsAndBytesConfig(load_in_4bit=False) still quantizes
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # on a CPU the first eval() would repack 4-bit weights for a
            module.support_avx512bf16_for_cpu = False  # kernel without autograd, and adapters would get no gradient
    return model.requires_grad_(False)


def lora_config(settings):
    """LoRA on all linear layers but lm_head, as in the post, or on the language model's, by full path. Left out are the layers of
    LLaVA's vision tower behind the one that its image features are taken from: they would never get a gradient."""
    config = AutoConfig.from_pretrained(settings.model_name_or_path, revision=settings.model_revision)
    unused = range(0)
    if taken := getattr(config, "vision_feature_layer", None):  # -2, or several: of so many hidden states and the embeddings before them
        count = config.vision_config.num_hidden_layers
        unused = range(max(layer % (count + 1) for layer in (taken if isinstance(taken, list) else [taken])), count)
    return LoraConfig(
        r=settings.lora_r, lora_alpha=settings.lora_alpha, use_dora=settings.use_dora, task_type="CAUSAL_LM",
        target_modules="all-linear" if settings.adapters == "all" else r"model\.(text_model|language_model)\..*\.(q|k|v|o|gate|up|down)_proj",
        exclude_modules=rf".*vision_tower\..*layers\.({'|'.join(map(str, unused))})\..*" if unused else None)


def marked(batch, processor):
    """The first pair of a batch as text: prompt, then both answers, what is learnt from in «», runs of image tokens folded."""
    texts = []
    for n in (0, len(batch["input_ids"]) // 2):
        real, out, shown, end = batch["attention_mask"][n].bool(), "", "", 0
        ids, learnt = batch["input_ids"][n][real].tolist(), batch["completion_mask"][n][real].tolist()
        for (image, trained), run in itertools.groupby((token == processor.image_token_id, mask) for token, mask in zip(ids, learnt)):
            end += (count := len(list(run)))
            text = processor.tokenizer.decode(ids[:end])  # from the start: by itself a run would lose its leading space
            out += f"<image> x {count}" if image else f"«{text[len(shown) :]}»" if trained else text[len(shown) :]
            shown = text
        texts.append(out)
    start = texts[0].index("«")  # the prompt is the same
    return f"{texts[0][:start]}\n  chosen:   {texts[0][start:]}\n  rejected: {texts[1][start:]}"


# Whose forward pass is known to take a 4-D mask with restarting positions.
SHARED = ("idefics2", "llava", "paligemma")


def why_stock(model, ref_model=None):
    """Why a model's prompts cannot be shared; None where they can."""
    attention = model.config.get_text_config()._attn_implementation
    if model.config.model_type not in SHARED:
        return f"sharing is for {', '.join(SHARED)}, this is {model.config.model_type}"
    if not isinstance(model, PeftModel) or ref_model is not None:
        return "there is a reference model beside the policy"
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        return "prompt learning puts tokens before each sequence"
    return None if attention in ("sdpa", "eager") else f"{attention} takes no 4-D attention mask"


class SharedPromptDPOTrainer(DPOTrainer):
    """A DPOTrainer that runs a pair as one sequence, prompt | chosen | rejected, and its image once: the stock trainer's losses,
    gradients and logs (of every TRL loss) for less work. Used like DPOTrainer, with the same batches.

    Positions restart behind the prompt, and a 4-D mask keeps the answers from seeing each other, so that every token is computed from
    the very ones that it sees in the stock trainer's two sequences. Where vision tower and connector hold nothing trainable,
    they run without a graph, once for policy and reference together. `stock` says why this is not done (see why_stock; or
    `shared_prompt=False`), None where it is. Raises ValueError for a row that the model's sliding window would cut."""

    def __init__(self, *args, shared_prompt=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.stock = why_stock(self.model, self.ref_model) if shared_prompt else "--shared_prompt false"
        self.kept = None  # during a step: what the frozen parts gave
        if self.stock is None:
            base, frozen = self.model.get_base_model(), True
            base.forward = functools.wraps(base.forward)(functools.partial(self.forward_pairs, base.forward))
            for name in ("vision_model", "vision_tower", "connector", "multi_modal_projector"):  # in the order in which they run
                if part := getattr(base.model, name, None):
                    frozen &= not any(p.requires_grad for p in part.parameters())
                    if frozen:  # checkpointing's hook on its input would back-propagate through it
                        part.forward = functools.wraps(part.forward)(functools.partial(self.run_once, name, part.forward))

    def run_once(self, name, forward, *args, **kwargs):
        """A frozen part without a graph; within a step its first output again, since policy and reference see the same images."""
        kept = {} if self.kept is None else self.kept
        if name not in kept:
            with torch.no_grad():
                kept[name] = forward(*args, **kwargs)
        return kept[name]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The stock loss; what frozen parts give is kept for its duration."""
        self.kept = None if return_outputs else {}  # the outputs come from a third pass, over another layout
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.kept = None

    def forward_pairs(self, forward, *args, input_ids=None, attention_mask=None, labels=None, fused_lm_head=False, **inputs):
        """TRL's forward pass with its fused head, `forward`, over shared prompts: a stock batch (2B, L) in, its output (2B, L - 1) out."""
        if not fused_lm_head:  # generation
            inputs |= {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
            return forward(*args, **{name: value for name, value in inputs.items() if value is not None})
        n, said, real = len(input_ids) // 2, labels != -100, attention_mask.bool()
        following = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]  # what each position must say next
        start = (following != -100) & ~said  # the prompt's last token: the one from which both answers' first token is predicted
        # One sequence: the chosen row, and of the rejected one the answer and, since both are predicted there, the prompt's last token again.
        wide = {"real": torch.cat([real[:n], (said | start)[n:]], dim=1), "part": torch.cat([(said | start)[:n] * 1, (said | start)[n:] * 2], dim=1)}
        for name, values in {"ids": input_ids, "position": real.cumsum(1) - 1, "following": following, "prompt": real & ~said}.items():
            wide[name] = torch.cat([values[:n], values[n:]], dim=1)
        order = wide["real"].long().argsort(dim=1, descending=True, stable=True)[:, : int(wide["real"].sum(1).max())]
        real, part, ids, position, following, prompt = (values.gather(1, order) for values in wide.values())
        ids = ids.masked_fill(~real, self._tokenizer.pad_token_id)  # what a shorter row is filled up with; nothing is said there
        text = self.model.config.get_text_config()
        if (window := getattr(text, "sliding_window", None)) and (longest := int(position[real].max()) + 1) > window:
            raise ValueError(f"a row of {longest} tokens is longer than the model's sliding window of {window}, which a shared prompt does not know")
        # 0 is the prompt, 1 and 2 are the answers, each from the prompt's last token on
        mask = ((part[:, None] == 0) | (part[:, None] == part[..., None])) & (position[:, None] <= position[..., None])
        if self.model.config.model_type == "paligemma":  # sees all of its prompt at once
            mask |= (prompt & (part < 2))[:, None] & (prompt & (part < 2))[..., None]
        mask = mask & real[:, None] | torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)  # padding sees itself: a row of nothing is NaN
        if text._attn_implementation == "eager":  # adds its mask: True would be 1
            mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, torch.finfo(self.model.dtype).min)
        inputs.pop("token_type_ids", None)
        inputs = {name: value[: len(value) // 2] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        output = forward(*args, input_ids=ids, attention_mask=mask[:, None], position_ids=position, shift_labels=following, fused_lm_head=True, **inputs)
        taken, places = torch.cat([(following != -100) & (part == 1), (following != -100) & (part == 2)]), labels[:, 1:] != -100
        for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
            if (values := getattr(output, name)) is not None:
                setattr(output, name, values.new_zeros(places.shape).masked_scatter(places, torch.cat([values, values])[taken]))
        return output


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


class Trainer(SharedPromptDPOTrainer):
    """... that at each evaluation answers held-out prompts: samples.md, eval_samples/ended, eval_samples/tokens."""

    def __init__(self, settings, **kwargs):
        super().__init__(shared_prompt=settings.shared_prompt, **kwargs)
        self.settings, self.before = settings, None
        for p in self.model.parameters():
            if p.requires_grad:  # TRL made them bf16 (4-bit), where small steps round to nothing; fp16 could not unscale them
                p.data = p.data.float()

    def _get_train_sampler(self, train_dataset=None):
        data, args = self.train_dataset if train_dataset is None else train_dataset, self.args
        if args.gradient_accumulation_steps * args.world_size == 1 or args.train_sampling_strategy != "random":
            return super()._get_train_sampler(data)
        rows, seed = args.train_batch_size * args.world_size * args.gradient_accumulation_steps, args.seed if args.data_seed is None else args.data_seed
        # asked for its epoch, not told by set_epoch: where several processes go on from a checkpoint, Accelerate's does not get there
        return AlikeInAStep(data.with_format(None)["length"], rows, seed, epoch=lambda: int(self.state.epoch or 0))

    def answers(self, rows):
        """Rows -> (greedy answers, how many tokens each has, whether it came to its end)."""
        collator, size, said = self.data_collator, self.args.per_device_eval_batch_size, []
        for n in range(0, len(rows), size):
            batch = collator.tokenize([collator.read(rows[i])[:1] for i in range(n, min(n + size, len(rows)))], prompt=True).to(self.args.device)
            with torch.no_grad(), self.accelerator.autocast():  # max_length None: the model's own would only warn
                ids = self.model.generate(**batch, max_new_tokens=self.settings.max_new_tokens, max_length=None, do_sample=False,
                                          use_cache=True, eos_token_id=collator.stop)[:, batch["input_ids"].shape[1] :]
            over = torch.isin(ids, torch.tensor(collator.stop, device=ids.device)).cumsum(1) > 0  # an end, and the padding behind it
            texts = collator.processor.batch_decode(ids, skip_special_tokens=True)
            said += zip([" ".join(text.split()) for text in texts], (~over).sum(1).tolist(), over.any(1).tolist())
        return said

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """The stock loop, then answers, before and after, to the first held-out prompts."""
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        rows = self.eval_dataset.select(range(min(self.settings.sample_rows, len(self.eval_dataset))))
        if len(rows) == 0 or not self.is_world_process_zero():
            return output
        if self.before is None:
            with self.model.disable_adapter():
                self.before = self.answers(rows)
        said, out, table = self.answers(rows), Path(self.args.output_dir), ""
        output.metrics[f"{metric_key_prefix}_samples/ended"] = sum(ended for *_, ended in said) / len(said)
        output.metrics[f"{metric_key_prefix}_samples/tokens"] = sum(count for _, count, _ in said) / len(said)
        (out / "samples").mkdir(parents=True, exist_ok=True)
        for row, (before, *_), (after, *_) in zip(rows, self.before, said):
            asked, right = self.data_collator.read(row)
            ImageOps.contain(asked["content"][0]["image"], (336, 336)).save(out / f"samples/{row['row']}.png")
            cells = [f"![](samples/{row['row']}.png)", text_of(asked), before, after, text_of(right), right["rejected"]]
            table += f"| {' | '.join(' '.join(cell.replace('|', '&#124;').split()) for cell in cells)} |\n"
        with open(out / "samples.md", "a", encoding="utf-8") as file:
            file.write(f"\n## Step {self.state.global_step}\n\n| image | prompt | before | after | chosen | rejected |\n|---|---|---|---|---|---|\n{table}")
        return output


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
    train, held_out = load_data(settings, training)
    if held_out is None:
        training.eval_strategy, training.load_best_model_at_end = "no", False
    processor = load_processor(settings)
    collator = Collator(processor, settings, training)
    try:
        config = AutoConfig.from_pretrained(settings.model_name_or_path, revision=settings.model_revision)
    except (OSError, ValueError) as e:
        fail(f"--model_name_or_path {settings.model_name_or_path}: {e}")
    window = getattr(config.get_text_config(), "sliding_window", None)
    if settings.shared_prompt and config.model_type in SHARED and window and collator.max_length > window:
        fail(f"--max_length {training.max_length}: this model attends to {window} tokens back, which a shared prompt does not know: --max_length {window}, "
             "or --shared_prompt false")
    try:
        say(f"\nOne pair as the model sees it, learnt from in «»:\n\n{marked(collator([train[0]]), processor)}\n")
    except BadRow as e:
        fail(f"the data changed since they were checked: {e}")

    try:
        model = load_model(settings, training)
    except (OSError, ValueError, SafetensorError) as e:
        fail(f"cannot load the weights of {settings.model_name_or_path}: {e}")
    trainer = Trainer(settings, model=model, args=training, data_collator=collator, train_dataset=train, eval_dataset=held_out,
                      processing_class=processor, peft_config=lora_config(settings))
    for part, module in {**dict(model.base_model.named_children()), "lm_head": model.get_output_embeddings()}.items():
        own = [(p, type(p).__name__ == "Params4bit") for p in module.parameters()]
        packed, trained = sum(2 * p.numel() for p, nf4 in own if nf4), sum(p.numel() for p, _ in own if p.requires_grad)
        count = packed + sum(p.numel() for p, nf4 in own if not nf4)  # 4-bit: two in a byte
        say(f"{part:22s}{trained:>14,} of {count:>14,} parameters trained, {packed:>14,} in 4-bit")
    say(f"path: {f'stock DPOTrainer, since {trainer.stock}' if trainer.stock else 'shared prompts, each pair one sequence with its image once'}")
    batch = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * math.ceil(len(train) / batch))
    say(f"{len(train)} pairs to train on, {len(held_out or ())} to evaluate; {steps} steps of {batch} pairs, "
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
