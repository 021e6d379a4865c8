# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0", "pillow==13.0.0",
#   "bitsandbytes==0.50.2", "pyyaml==6.0.3", "jinja2==3.1.6", "tensorboard==2.21.0", "networkx==3.6.1",
# ]
# ///
"""Make a LLaVA out of a vision encoder and a language model, in two stages, as its authors did (arXiv:2310.03744).

CLIP sees and Vicuna speaks, but neither knows of the other. A small new part connects them, the projector: it turns
CLIP's features of an image into embeddings that the language model reads like words.

Stage 1, align: image -> caption. Only the projector is trained. -> llava-align/
    python llava_two_stage.py --stage align --data_path blip_laion_cc_sbu_558k.json --image_folder images
Stage 2, instruct: conversations. Projector and language model (or adapters on it) are trained. -> llava-instruct/
    python llava_two_stage.py --stage instruct --lora_r 128                   # LoRA
    python llava_two_stage.py --stage instruct --lora_r 128 --load_in_4bit    # QLoRA
    accelerate launch --config_file zero3.yaml llava_two_stage.py --stage instruct    # in full: DeepSpeed, 8 GPUs
    python llava_two_stage.py --stage instruct --lora_r 128 --model_name_or_path llava-hf/llava-1.5-7b-hf
    python llava_two_stage.py --config llava-align/settings.yaml              # resume that run after a crash

Loss: next-token cross-entropy, averaged over all trained tokens of an optimizer step.
Trained tokens: align, the caption and the newline that ends it; instruct, the answers, each with its EOS.
Trained weights: parts with a learning rate above 0, each with its own. The vision tower has 0: it stays frozen.
Result: the last step's weights; with --load_best_model_at_end true those of the lowest eval_loss (held-out images).
Every setting is a flag: --help. load_data shows the formats of a row. `accelerate config` writes zero3.yaml."""

import contextlib
import functools
import hashlib
import io
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
from collections import Counter, namedtuple
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args, get_type_hints
from unittest.mock import patch

import datasets
import torch
import transformers
import yaml
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub import HfApi
from jinja2 import TemplateError
from networkx.utils import UnionFind
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoProcessor, CLIPVisionModel, LlavaForConditionalGeneration, set_seed
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.trainer_pt_utils import get_length_grouped_indices

# The parts of the model, each with a learning rate of its own. lm_head belongs to the language model.
VISION, PROJECTOR, LANGUAGE = "model.vision_tower", "model.multi_modal_projector", "model.language_model"
# Defaults that differ by stage. Learning rates and rows in a step are LLaVA-1.5's.
DEFAULTS = {
    "output_dir": {"align": "llava-align", "instruct": "llava-instruct"},
    "data_path": {"align": "blip_laion_cc_sbu_558k.json", "instruct": "llava_v1_5_mix665k.json"},
    "image_aspect_ratio": {"align": "square", "instruct": "pad"},
    "projector_learning_rate": {"align": 1e-3, "instruct": 2e-5},
    "learning_rate": {"align": 0.0, "instruct": 2e-5},
    "per_device_train_batch_size": {"align": 8, "instruct": 4},
}
# How names of weights begin, here and in llava-hf's models. (Transformers' own conversion does nothing under ZeRO-3.)
PUBLISHED = {"model.vision_tower.": "vision_tower.vision_model.", "model.language_model.": "language_model.model."}
PUBLISHED |= {"model.multi_modal_projector.": "multi_modal_projector.", "lm_head.": "language_model.lm_head."}
ROWS_PER_STEP = {"align": 256, "instruct": 128}
ADAPTER_FLAGS = ("lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit")
# TrainingArguments' flags that this recipe does not use, beside UNUSED_FLAGS.
REFUSED = """label_smoothing_factor label_names prediction_loss_only use_liger_kernel train_sampling_strategy
neftune_noise_alpha torch_compile auto_find_batch_size accelerator_config optim_target_modules""".split()


@dataclass
class Settings:
    """Stage, model, adapter, data, samples. Each line is a flag: --lora_r 128. LLaVA's own names where it has some."""

    stage: Literal["align", "instruct"] = HfArg(default="align", help="align: captions. instruct: conversations.")
    # what to start from: a LLaVA, or two models to join
    model_name_or_path: str | None = HfArg(default=None, help="A LLaVA. Default in instruct: llava-align.")
    model_revision: str | None = HfArg(default=None, help="Branch, tag or commit of model_name_or_path.")
    vision_tower: str = HfArg(default="openai/clip-vit-large-patch14-336", help="CLIP to join: hub id or folder.")
    vision_tower_revision: str | None = HfArg(default=None, help="Branch, tag or commit of vision_tower.")
    language_model: str = HfArg(default="lmsys/vicuna-7b-v1.5", help="Llama or Mistral to join: hub id or folder.")
    language_model_revision: str | None = HfArg(default=None, help="Branch, tag or commit of language_model.")
    projector_type: Literal["mlp2x_gelu", "linear"] | None = HfArg(default=None, help="Default: mlp2x_gelu.")
    pretrain_mm_mlp_adapter: str | None = HfArg(default=None, help="Projector: stage-1 folder or mm_projector.bin.")
    # what is trained; the language model's rate is --learning_rate
    vision_learning_rate: float = HfArg(default=0.0, help="Learning rate of the vision tower; 0 freezes it.")
    projector_learning_rate: float | None = HfArg(default=None, help="0 freezes it. Default: align 1e-3, else 2e-5.")
    lora_r: int = HfArg(default=0, help="Rank of adapters on the language model; LLaVA's is 128. 0: no adapters.")
    lora_alpha: int | None = HfArg(default=None, help="The adapter is scaled by alpha / r. Default: twice r.")
    lora_dropout: float = HfArg(default=0.05, help="Dropout before the adapter.")
    lora_target_modules: list[str] | None = HfArg(default=None, help="Layers to adapt: q_proj v_proj, or one regex.")
    load_in_4bit: bool = HfArg(default=False, help="With adapters: the language model in 4-bit NF4 (QLoRA).")
    # data
    data_path: str | None = HfArg(default=None, help="LLaVA JSON: .json or .jsonl. Default: LLaVA-1.5's own file.")
    eval_data_path: str | None = HfArg(default=None, help="Rows to evaluate on. Default: eval_fraction of the images.")
    image_folder: str | None = HfArg(default=None, help="Where relative image paths start. Default: beside the .json.")
    eval_fraction: float = HfArg(default=0.001, help="Fraction of the images to hold out for evaluation. 0: none.")
    max_eval_rows: int = HfArg(default=200, help="Most rows to evaluate on, always the same ones.")
    on_bad_rows: Literal["stop", "skip"] = HfArg(default="stop", help="Rows that cannot be trained on: stop, or skip.")
    on_long_rows: Literal["drop", "stop"] = HfArg(default="drop", help="Rows above model_max_length: drop, or stop.")
    model_max_length: int = HfArg(default=2048, help="Longest row in tokens, 576 for each image. Never cut.")
    image_aspect_ratio: Literal["pad", "square"] | None = HfArg(default=None, help="square: crop; default in align.")
    group_by_modality_length: bool = HfArg(default=True, help="Steps of rows alike: all with images or none.")
    sample_rows: int = HfArg(default=8, help="Number of held-out rows to answer at each evaluation. 0: none.")
    sample_tokens: int = HfArg(default=64, help="Longest answer in samples.md, in tokens.")


@dataclass
class Training(transformers.TrainingArguments):
    """TrainingArguments with this recipe's defaults. All its other settings are flags, too."""

    output_dir: str | None = HfArg(default=None, help="Model or adapter, processor, settings, samples, checkpoints.")
    resume_from_checkpoint: str = HfArg(default="auto", help="auto: the newest one. false: a new run. Or a folder.")
    num_train_epochs: float = HfArg(default=1.0, help="Passes over the data. max_steps, if given, wins.")
    per_device_train_batch_size: int | None = HfArg(default=None, help="Default: 8 in align, 4 in instruct.")
    per_device_eval_batch_size: int = HfArg(default=4, help="Rows that are evaluated at once.")
    gradient_accumulation_steps: int | None = HfArg(default=None, help="Default: a step has 256 rows, instruct 128.")
    learning_rate: float | None = HfArg(default=None, help="Language model's: 2e-5, adapters 2e-4, frozen in align.")
    lr_scheduler_type: str = HfArg(default="cosine", help="Shape of the learning rates over the run.")
    warmup_steps: float = HfArg(default=0.03, help="Steps, or below 1 a fraction of the run.")
    eval_strategy: str = HfArg(default="steps", help="When to evaluate: steps, epoch, no.")
    eval_steps: float = HfArg(default=500, help="Steps between evaluations.")
    save_total_limit: int | None = HfArg(default=1, help="Checkpoints kept.")
    logging_steps: float = HfArg(default=10, help="Steps between two lines of the log.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="true hides NaN losses in the log.")
    report_to: str = HfArg(default="tensorboard", help="tensorboard, wandb, trackio, ..., none.")
    dataloader_num_workers: int = HfArg(default=4, help="Processes that decode images while the GPU works.")
    remove_unused_columns: bool = HfArg(default=False, help="Must stay false: the collator reads the columns.")
    prediction_loss_only: bool = HfArg(default=True, help="Must stay true: keeping all logits would fill the memory.")
    ddp_find_unused_parameters: bool | None = HfArg(default=False, help="Not needed: each batch uses all weights.")
    activation_checkpointing: bool = HfArg(default=True, help="New name of gradient_checkpointing. Saves memory.")
    bf16: bool | None = HfArg(default=None, help="Default: where the GPU has it, else fp16.")

    def __post_init__(self):
        pick_precision(self)
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False
        super().__post_init__()


def by_stage(given):
    """{setting: value} as given -> the same, with defaults that depend on other settings. Raises SystemExit."""
    stage = given["stage"]
    defaults = {name: values[stage] for name, values in DEFAULTS.items()}
    defaults["lora_alpha"] = max(1, 2 * given["lora_r"])
    if stage == "instruct" and given["lora_r"] > 0:
        defaults["learning_rate"] = 2e-4
    if stage == "instruct" and given["pretrain_mm_mlp_adapter"] is None:
        defaults["model_name_or_path"] = DEFAULTS["output_dir"]["align"]
    filled = given | {name: value for name, value in defaults.items() if given[name] is None}
    if filled["gradient_accumulation_steps"] is None:
        processes, step = int(os.environ.get("WORLD_SIZE", "1")), ROWS_PER_STEP[stage]
        rows = max(1, filled["per_device_train_batch_size"]) * processes
        problem = f"{rows} rows at once on {processes} processes do not make up a step of {step}"
        require(step % rows == 0, f"{problem}: give --gradient_accumulation_steps")
        filled["gradient_accumulation_steps"] = step // rows
    return filled


def sources(settings):
    """The models to start from, as [(flag, hub id or folder, revision)]: one LLaVA, or the two that are joined."""
    if settings.model_name_or_path:
        return [("--model_name_or_path", settings.model_name_or_path, settings.model_revision)]
    vision = ("--vision_tower", settings.vision_tower, settings.vision_tower_revision)
    return [vision, ("--language_model", settings.language_model, settings.language_model_revision)]


def learning_rates(settings, training):
    """{part of the model: its learning rate}; 0 means frozen."""
    rates = settings.vision_learning_rate, settings.projector_learning_rate, training.learning_rate
    return dict(zip((VISION, PROJECTOR, LANGUAGE), rates, strict=True))


def parse(argv=None):
    """Flags and `--config run.yaml` -> (Settings, Training). Raises SystemExit."""
    parser = transformers.HfArgumentParser([Settings, Training], allow_abbrev=False)
    return parse_arguments(parser, REFUSED, argv, fill=by_stage)


def check(settings, training):
    """Stop early if this machine or these flags cannot work. Raises SystemExit."""
    check_training(settings, training, "7B: 24 GB to align or for QLoRA, several GPUs in full", metrics=("loss",))
    rates = learning_rates(settings, training)
    require(all(0 <= rate < 10 for rate in rates.values()), "learning rates: from 0, which means frozen, to below 10")
    require(any(rates.values()), "nothing would be trained: every part is frozen")
    rate, rank = training.learning_rate, settings.lora_r
    require(rank >= 0, "--lora_r must be at least 0, which means no adapter")
    if settings.stage == "align":
        frozen = "the language model is frozen in --stage align"
        require(rate == 0, f"--learning_rate {rate:g}: {frozen}; the projector's is --projector_learning_rate")
        require(rank == 0, f"--lora_r {rank}: {frozen}; adapters are for --stage instruct")
    if rank > 0:
        require(rate > 0, "--learning_rate 0 means a frozen language model: then --lora_r 0")
        if settings.load_in_4bit and is_deepspeed_zero3_enabled():
            fail("--load_in_4bit and ZeRO-3: 4-bit weights cannot be divided; use ZeRO-2 or DDP")
    else:
        # training.given has the values of the command line, before by_stage filled in defaults.
        ignored = [f"--{name}" for name in ADAPTER_FLAGS if training.given[name] != getattr(Settings, name)]
        require(not ignored, f"{', '.join(ignored)}: for adapters, --stage instruct --lora_r 128")
    for name in ("model_name_or_path", "pretrain_mm_mlp_adapter", "vision_tower", "language_model"):
        source = getattr(settings, name)
        if source and Path(source).resolve().is_relative_to(Path(training.output_dir).resolve()):
            fail(f"--output_dir {training.output_dir} would overwrite --{name}: choose another")
    is_joined = settings.vision_tower != Settings.vision_tower or settings.language_model != Settings.language_model
    if is_joined and settings.model_name_or_path:
        problem = f"--vision_tower and --language_model are joined, {settings.model_name_or_path} is a LLaVA already"
        fail(f"{problem}; to join in --stage instruct give --pretrain_mm_mlp_adapter, the projector from stage 1")


def load_processor(settings):
    """The processor of the LLaVA, or of the two joined models, with the stage's prompt. Raises SystemExit."""
    names = " and ".join(source for _, source, _ in sources(settings))
    with fail_on_error(f"{names}: no processor"):
        if settings.model_name_or_path:
            processor = AutoProcessor.from_pretrained(settings.model_name_or_path, revision=settings.model_revision)
        else:
            processor = join_processors(settings)
    kind, tokenizer = type(processor).__name__, processor.tokenizer
    require(kind == "LlavaProcessor", f"{names} has a {kind}; a LlavaProcessor is needed")
    require(tokenizer.eos_token, f"{names}: its tokenizer has no EOS to end an answer")
    # Edit the prompt in CHAT_TEMPLATES. Labels and samples.md follow it, and it is saved with the processor, for
    # inference. Only where a caption ends is said twice: Collator.stop_ids must fit the template.
    # Llama's tokenizer marks the first word of a text, but not after <image>. LLaVA's prompts have that mark, so a
    # space goes there. If "a" and " a" have other ids, the tokenizer sets no marks, and no space is needed.
    ids, ids_after_space = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", " a"))
    gap = "{%- set gap = ' ' -%}" if ids == ids_after_space else "{%- set gap = '' -%}"
    processor.chat_template = gap + CHAT_TEMPLATES[settings.stage]
    if tokenizer.pad_token is None:  # any token will do: padding is masked
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # as generation needs it
    # Edit how images are resized here; this, too, is saved. LLaVA's image processor pads to a square with the mean
    # colour, or crops the middle. CLIP's own processor cannot pad: it is kept for cropping.
    options = processor.image_processor.to_dict()
    options.pop("image_processor_type", None)
    is_padded = settings.image_aspect_ratio == "pad"
    if is_padded or options.get("do_pad"):
        processor.image_processor = transformers.LlavaImageProcessorPil(**{**options, "do_pad": is_padded})
    return processor


def load_data(settings, training):
    r"""-> (train, eval): Datasets of checked rows; eval is None if nothing is to be evaluated. Raises SystemExit.

    A row is LLaVA JSON: for align an image and a caption, for instruct a conversation with any number of images:
        {"image": "cat.jpg", "caption": "a cat on a sofa"}
        {"image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\nDescribe this."},
                                               {"from": "gpt", "value": "a cat on a sofa"}]}
    Several images are a list of paths. A first turn from "system" takes the place of LLaVA's system prompt."""
    train_rows = read_rows(settings.data_path, None, settings)
    eval_rows = None  # then some training rows are held out, unless evaluation is off
    if settings.eval_data_path and training.eval_strategy != "no":
        eval_rows = read_rows(settings.eval_data_path, None, settings)
    collator = Collator(load_processor(settings), settings, training)
    return prepare_rows(train_rows, eval_rows, settings.data_path, collator, settings, training)


class Collator:
    """Rows -> a batch: input_ids, attention_mask, labels (B, L), padded on the left; pixel_values (images, 3, H, W)
    if there are images. labels: the input_ids of captions and answers, -100 on everything else."""

    image_columns = ("image",)

    def __init__(self, processor, settings, training):
        # Keep only what shapes a batch: all attributes are part of the key by which checked rows are cached.
        self.processor = processor
        self.stage = settings.stage
        self.folder = settings.image_folder or ""
        self.max_length = settings.model_max_length
        special = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
        self.control_tokens = {*special, processor.image_token}
        self.stop_ids = [processor.tokenizer.eos_token_id]  # where generation ends
        if self.stage == "align":
            self.stop_ids += tokens_that_end_a_line(processor.tokenizer)

    def __call__(self, rows):
        conversations, masks = [], []
        for row in rows:
            try:
                messages = self.read(row)
                masks.append(torch.tensor(self.trained_mask(messages)))
                conversations.append(messages)
            except BadRow as error:
                error.row = row.get("row")
                raise
        batch = self.tokenize(conversations)
        for row, ids, is_real in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
            if is_real.sum() > self.max_length:
                detail = f"{is_real.sum()} tokens, {(ids == self.processor.image_token_id).sum()} of them of images"
                raise BadRow("too long", f"{detail}; --model_max_length is {self.max_length}", row.get("row"))
        batch["labels"] = labels_from_masks(batch, masks, self.processor.image_token_id)
        return batch

    def trained_mask(self, messages):
        """A bool for each text token of a conversation: is it trained? Image tokens are left out. Raises BadRow."""
        if messages[-1]["role"] != "assistant":
            raise BadRow("no answer", "the last turn is not gpt's")
        ids = self.text_ids(messages)
        mask = [False] * len(ids)
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.text_ids(messages[:n], prompt=True)  # the prompt at inference, ends with ASSISTANT:
            through = self.text_ids(messages[: n + 1])  # ends with this answer's EOS (a caption: its newline)
            start, end = len(before), len(through)
            if ids[:start] != before or ids[:end] != through:
                detail = f"the first characters of the answer {text_of(message)[:40]!r} change the tokens before it"
                raise BadRow("prompt changed", f"{detail}; begin it differently")
            mask[start:end] = [True] * (end - start)
        return mask

    def text_ids(self, messages, prompt=False):
        """Token ids of a conversation as in the batch, but without image tokens, so that no image need be prepared."""
        text = self.processor.apply_chat_template(messages, add_generation_prompt=prompt)
        ids = self.processor.tokenizer(text)["input_ids"]
        return [token for token in ids if token != self.processor.image_token_id]

    def tokenize(self, conversations, prompt=False):
        """Lists of messages -> the processor's batch. With `prompt` it ends where the model is to answer."""
        options = {"add_generation_prompt": prompt, "processor_kwargs": {"padding": True}}
        options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return self.processor.apply_chat_template(conversations, **options)

    def read(self, row):
        """A row -> its messages in the chat template's form, with PIL images in them. Raises BadRow."""
        paths = self.images_of(row)
        messages, placeholders = [], []
        for n, (role, text) in enumerate(read_turns(row, self.stage)):
            content = []
            if role == "user" and "<image>" in text:
                content = [{"type": "image"} for _ in range(text.count("<image>"))]  # first in a turn, as in LLaVA
                placeholders += content  # the same dicts: filled with images below
                text = text.replace("<image>", "").strip()
            typed = [token for token in self.control_tokens if token in text]
            if typed:
                raise BadRow("control token", f"{typed[0]} in turn {n} would become a real one; take it out")
            if text:
                content = [*content, {"type": "text", "text": text}]
            messages.append({"role": role, "content": content})
        if len(placeholders) != len(paths):
            raise BadRow("images do not match", f"{len(placeholders)} <image> of the human's, {len(paths)} images")
        if self.stage == "align":
            check_caption(messages, len(paths))
        for placeholder, path in zip(placeholders, paths, strict=True):
            placeholder["image"] = load_image(path)  # edit images here, to augment them (for evaluation, too)
        return messages

    def images_of(self, row):
        """The paths of a row's images. Raises BadRow."""
        images = row.get("image")
        if images in (None, ""):
            return []
        paths = images if isinstance(images, list) else [images]
        for path in paths:
            if not isinstance(path, str) or not path:
                raise BadRow("malformed image", f"{path!r:.100}; it must be a path, or a list of paths")
        return [os.path.join(row.get("folder") or self.folder, path) for path in paths]

    def ask(self, question, images):
        """A question about PIL images -> the user's turn. (For tools/; training gets its questions by `read`.)"""
        content = [{"type": "image", "image": image} for image in images]
        return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


def load_model(settings, training):
    """The model in weight_dtype, or its language model in NF4; frozen, except for parts that are trained in full."""
    config, options = load_config(settings), {"dtype": weight_dtype(training)}
    if not is_deepspeed_zero3_enabled():  # which divides the weights among the processes
        options["device_map"] = {"": training.device}
    if settings.load_in_4bit:
        options["quantization_config"] = nf4_quantization(options["dtype"], ["lm_head", VISION, PROJECTOR])
    load = functools.partial(load_complete, LlavaForConditionalGeneration, **options)
    if settings.model_name_or_path:
        model = load(settings.model_name_or_path, revision=settings.model_revision)
        if settings.pretrain_mm_mlp_adapter:
            projector = model.get_submodule(PROJECTOR)
            with gathered(projector.parameters()):
                projector.load_state_dict(projector_weights(settings, config))
    elif settings.lora_r > 0 or is_deepspeed_zero3_enabled():
        # An adapter needs a model on disk to belong to; ZeRO-3 divides a model while it is loaded from there.
        model = load(write_base(settings, training, config))
    else:
        model = join(settings, config, training.seed, **options)
    keep_4bit_trainable_on_cpu(model)
    model.requires_grad_(False)
    if settings.lora_r == 0:
        for part, rate in learning_rates(settings, training).items():
            model.get_submodule(part).requires_grad_(rate > 0)
        model.lm_head.requires_grad_(training.learning_rate > 0)
        # save_pretrained writes the old (2023) weight names by default; Trainer could not resume from those.
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    return model


# Edit the LoRA targets here, or give --lora_target_modules. They are full paths, because bare names ("q_proj") match
# the vision tower, too. Targets in UNTRAINABLE parts are refused, with the reason.
LORA_TARGETS = r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"
UNTRAINABLE = {
    "vision_tower": "which takes no adapter: --vision_learning_rate trains it in full",
    "multi_modal_projector": "which takes no adapter: --projector_learning_rate trains it in full",
}


def lora_config(settings):
    """LoRA on all linear layers of the language model; parts with a rate are trained in full. None for --lora_r 0."""
    if settings.lora_r == 0:
        return None
    saved_in_full = [VISION] if settings.vision_learning_rate > 0 else []
    # A projector that is not the base's must be saved with the adapter, even if it is frozen.
    replaces_projector = settings.model_name_or_path and settings.pretrain_mm_mlp_adapter
    if settings.projector_learning_rate > 0 or replaces_projector:
        saved_in_full.append(PROJECTOR)
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=lora_targets(settings.lora_target_modules, LANGUAGE, LORA_TARGETS),
        task_type="CAUSAL_LM",
        modules_to_save=saved_in_full or None,
    )


class Trainer(transformers.Trainer):
    """Trainer with a learning rate for each part, steps of rows of one kind, and answers to held-out rows.
    Your own metric: override evaluate(), as below, and name it in check: check_training(..., ("loss", "mine")).
        metrics = super().evaluate(*args, **kwargs)
        answers = answer_rows(self, self.eval_dataset, max_new_tokens=64)
        self.log({"eval_mine": my_score(answers, self.eval_dataset)})  # answers[0].text, ...
        return metrics | self.state.log_history[-1]"""

    def __init__(self, settings, model, args, **kwargs):
        super().__init__(model=model, args=args, **kwargs)
        self.settings = settings
        self.rates = learning_rates(settings, args)
        self.llava = model.get_base_model() if isinstance(model, PeftModel) else model
        for name, parameter in self.model.named_parameters():
            if self.rate_of(name) == 0:  # PEFT would train a projector that is saved with the adapter
                parameter.requires_grad = False
        # Layers after the one whose features are used get no gradient, nor does a linear projector's second layer.
        tower, num_layers = self.llava.model.vision_tower, len(self.llava.model.vision_tower.encoder.layers)
        num_used = self.llava.config.vision_feature_layer % (num_layers + 1)  # -2: all but the last; -1 and n: all
        tower.encoder.layers[num_used:].requires_grad_(False)
        tower.post_layernorm.requires_grad_(False)
        if self.llava.config.projector_hidden_act == "linear":
            self.llava.model.multi_modal_projector.linear_2.requires_grad_(False)
        if not self.is_deepspeed_enabled:  # DeepSpeed keeps float32 copies of its own
            train_in_float32(self.model)
        if settings.vision_learning_rate == 0:
            self.add_callback(FrozenWithoutGraph(self.model, "vision_tower"))
        self.add_callback(AnswerSamples(self, settings.sample_rows, settings.sample_tokens))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy of the trained tokens, each predicted from all before it: the sum / num_items, or the mean."""
        targets = next_tokens(inputs["labels"])
        is_trained = targets != -100
        inputs = {**inputs, "shift_labels": targets[is_trained], "use_cache": False}
        # Optional, for speed: no scores for the 576 image tokens. To undo, delete logits_only_at and `[is_trained]`.
        with blank_image(self.llava, inputs), logits_only_at(is_trained, self.llava.lm_head):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def rate_of(self, name):
        """The learning rate of a weight: that of its part. Adapters and lm_head have the language model's."""
        for part, rate in self.rates.items():
            if f".{part}." in f".{name}":
                return rate
        return self.rates[LANGUAGE]

    def create_optimizer(self, *args, **kwargs):
        """--optim, with the learning rate of its part for each weight."""
        if self.optimizer is None:
            main_part = PROJECTOR if self.settings.stage == "align" else LANGUAGE
            self.optimizer = optimizer_by_part(self, self.rate_of, logged_rate=self.rates[main_part])
        return self.optimizer

    def _get_train_sampler(self, train_dataset=None):
        if not self.settings.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        args, rows = self.args, self.train_dataset
        rows_per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        image_counts = [len(keys) for keys in rows["image_keys"]]
        return ByModalityAndLength(rows["length"], image_counts, rows_per_step, lambda: epoch_generator(self))

    def save_model(self, output_dir=None, _internal_call=False):
        """Save the result, unless it is an adapter, in 16 bits by the published names; checkpoints as they are."""
        is_final = output_dir is None  # Trainer names a folder only for checkpoints
        if is_final and not isinstance(self.model, PeftModel):
            dtype = weight_dtype(self.args)
            self.model.save_pretrained = functools.partial(save_renamed, self.model, PUBLISHED, dtype)
        super().save_model(output_dir, _internal_call)


def main(argv=None):
    """Parse, check, read the rows, show an example, join or load the model, train, save."""
    settings, training = parse(argv)
    check(settings, training)
    checkpoint = checkpoint_to_resume(training)
    check_processes(checkpoint, training)
    set_seed(training.seed)
    adapter = lora_config(settings)
    check_model_files(settings, adapter)

    train_dataset, eval_dataset = load_data(settings, training)
    if eval_dataset is None:
        training.eval_strategy, training.load_best_model_at_end = "no", False
    processor = load_processor(settings)  # (load_data has its own copy: it can be called alone)
    collator = Collator(processor, settings, training)
    example = marked(collator([train_dataset[0]]), processor)
    PartialState().print(f"\nOne row as the model sees it, trained on in «»:\n\n{example}\n")
    with fail_on_error(f"cannot load the weights of {' and '.join(source for _, source, _ in sources(settings))}"):
        model = load_model(settings, training)
    if settings.stage == "instruct":
        warn_if_untrained(settings, model)
    set_seed(training.seed)  # joining and loading use up different amounts of random numbers
    if adapter is not None:
        model = get_peft_model(model, adapter)
    data = {"data_collator": collator, "train_dataset": train_dataset, "eval_dataset": eval_dataset}
    trainer = Trainer(settings, model=model, args=training, processing_class=processor, **data)
    print_parameters(trainer.model, [VISION, PROJECTOR, LANGUAGE, "lm_head"], trainer.rate_of)
    train_and_save(trainer, checkpoint)


# ----------------------------------------------------------------- details: prompts, rows, joining, the projector
# LLaVA's prompts. `-` strips the white space between tags: only what is quoted comes out. `gap`: see load_processor.
CHAT_TEMPLATES = {
    # LLaVA's "plain": image, caption, newline. What the human asked is left out.
    "align": r"""
{%- for message in messages -%}
  {%- for part in message.content if part.type == 'image' -%} {{- '<image>' -}} {%- endfor -%}
  {%- if message.role == 'assistant' -%}
    {{- gap + (message.content if message.content is string else message.content[0].text) + '\n' -}}
  {%- endif -%}
{%- endfor -%}""",
    # LLaVA's "v1", which is Vicuna's: a system prompt, then USER: and ASSISTANT: in turn, EOS after each answer.
    "instruct": r"""
{%- macro text_of(message) -%} {%- if message.content is string -%} {{- message.content -}} {%- endif -%}
  {%- for part in message.content if part.type == 'text' -%} {{- part.text -}} {%- endfor -%}
{%- endmacro -%}
{%- if messages[0].role == 'system' -%} {{- text_of(messages[0]) + ' ' -}}
{%- else -%}
  {{- 'A chat between a curious user and an artificial intelligence assistant. ' -}}
  {{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%} {{- 'USER: ' -}}
    {%- for part in message.content if part.type == 'image' -%}
      {{- '<image>' + (gap + '\n' if text_of(message) or not loop.last else '') -}}
    {%- endfor -%}
    {{- text_of(message) + ' ' -}}
  {%- elif message.role == 'assistant' -%} {{- 'ASSISTANT: ' + text_of(message) + eos_token -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- 'ASSISTANT:' -}} {%- endif -%}""",
}
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
# Keys that would be ignored although they carry meaning, and what to do instead.
MISTAKEN_KEYS = dict.fromkeys(("images", "Image", "Images"), "images go under 'image'")
MISTAKEN_KEYS |= {"system": "a system message is the first turn", "video": "only images", "videos": "only images"}


def read_rows(name, split, settings):
    """The rows of a .json or .jsonl file, numbered. (Other recipes have a use for `split`.) Raises SystemExit."""
    is_json = Path(name).suffix.lower() in (".json", ".jsonl")
    require(is_json, f"cannot read {name}: it must be a .json file (a list of rows) or a .jsonl file (one row a line)")
    with fail_on_error(f"cannot read {name}"):
        rows = read_json(Path(name))
    keys = rows.column_names
    has_text = "conversations" in keys or "caption" in keys
    require(has_text, f"cannot read {name}: no row has 'conversations'; there are {', '.join(keys)}")
    for key in MISTAKEN_KEYS.keys() & set(keys):
        numbers = [n for n, value in enumerate(rows[key]) if value is not None]
        if numbers:
            fail(f"cannot read {name}: row {numbers[0]} has a key {key!r}: {MISTAKEN_KEYS[key]}")
    rows = rows.select_columns([key for key in ("id", "image", "conversations", "caption") if key in keys])
    folder = os.path.abspath(settings.image_folder or Path(name).parent)
    return rows.add_column("row", list(range(len(rows)))).add_column("folder", [folder] * len(rows))


def read_turns(row, stage):
    """A row -> [(role, text)] of its turns: system, if any, then user and assistant in turn. Raises BadRow."""
    turns, caption = row.get("conversations"), row.get("caption")
    if caption is not None and turns is not None:
        raise BadRow("caption and conversations", "the row has both; it must have one of them")
    if caption is not None and stage == "align":
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
    if not isinstance(turns, list) or not turns:
        raise BadRow("no conversation", "conversations must be a list of turns, {from, value}")
    speakers = ["human", "gpt"] * len(turns)
    if isinstance(turns[0], dict) and turns[0].get("from") == "system":
        speakers.insert(0, "system")
    messages = []
    for n, (turn, speaker) in enumerate(zip(turns, speakers, strict=False)):
        if not isinstance(turn, dict) or turn.get("from") != speaker:
            detail = f"turn {n} must be the {speaker}'s, {{from, value}}; it is {turn!r:.100}"
            raise BadRow("wrong order of roles", detail)
        text = turn.get("value")
        if not isinstance(text, str) or not text.strip():
            reason = "empty answer" if speaker == "gpt" else "empty turn"
            raise BadRow(reason, f"turn {n}, the {speaker}'s, says {text!r:.100}; it must be text")
        messages.append((ROLES[speaker], text))
    return messages


def check_caption(messages, num_images):
    """Raises BadRow if a row of align is not one image and one caption, of one line and without roles."""
    if [message["role"] for message in messages] != ["user", "assistant"] or num_images != 1:
        found = f"not {len(messages)} turns and {num_images} images; conversations are for instruct"
        raise BadRow("no caption", f"--stage align takes one image and one caption, {found}")
    if re.search(r"\n|^\s*((USER|ASSISTANT|Human|Assistant)\s?:|###)", text_of(messages[1])):
        raise BadRow("more than a caption", "it has roles (USER:), or a second line; generation stops at a newline")


def join_processors(settings):
    """A LLaVA processor of CLIP's image processor and the language model's tokenizer, to which <image> is added."""
    options = {"revision": settings.vision_tower_revision}
    images = transformers.AutoImageProcessor.from_pretrained(settings.vision_tower, **options)
    options = {"revision": settings.language_model_revision, "extra_special_tokens": {"image_token": "<image>"}}
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.language_model, **options)
    is_new = tokenizer.convert_tokens_to_ids("<image>") == len(tokenizer) - 1
    require(is_new, f"--language_model {settings.language_model}: it has a token <image>; take a plain language model")
    options = {"patch_size": load_config(settings).vision_config.patch_size, "num_additional_image_tokens": 1}  # CLS
    return transformers.LlavaProcessor(images, tokenizer, vision_feature_select_strategy="default", **options)


def check_processes(checkpoint, training):
    """A DeepSpeed checkpoint resumes only on the same number of processes. Raises SystemExit."""
    if checkpoint is not None:
        written_by = len(list(Path(checkpoint).glob("global_step*/*optim_states.pt")))  # a file for each process
        resumed_by = training.world_size if training.deepspeed_plugin is not None else 0
        how = f"with DeepSpeed by {written_by} processes" if written_by > 0 else "without DeepSpeed"
        remedy = "resume it in the same way, or choose another --output_dir"
        require(written_by == resumed_by, f"{checkpoint} was written {how}: {remedy}")


def check_model_files(settings, adapter):
    """Stop before rows are read if the model or projector cannot be loaded or adapted. Raises SystemExit."""
    config = load_config(settings)
    for flag, source, _ in sources(settings):
        check_weight_files(flag, source)
    if settings.pretrain_mm_mlp_adapter:
        projector_weights(settings, config)
    if adapter is not None:
        with not_divided(), torch.device("meta"):  # without weights
            check_lora_targets(settings, adapter, LlavaForConditionalGeneration(config), UNTRAINABLE)


def load_config(settings):
    """The configuration of the LLaVA to start from, or of the one that joining makes. Raises SystemExit."""
    names = [f"{flag} {source}" for flag, source, _ in sources(settings)]
    configs = []
    for name, (_, source, revision) in zip(names, sources(settings), strict=True):
        is_folder = Path(source, "config.json").exists()
        hint = "" if is_folder else ": no such folder with a model (--stage align makes one), and as a hub id"
        with fail_on_error(name + hint):
            configs.append(AutoConfig.from_pretrained(source, revision=revision))
    if settings.model_name_or_path:
        config = configs[0]
        require(config.model_type == "llava", f"{names[0]} is {config.model_type}, not a LLaVA")
        vision, text = config.vision_config, config.text_config
    else:
        vision, text = configs
        if vision.model_type == "clip":  # it has a text tower, which is left out
            vision = vision.vision_config
    if vision.model_type != "clip_vision_model":
        fail(f"{names[0]}: its vision encoder is {vision.model_type}; this recipe takes clip_vision_model")
    if text.model_type not in ("llama", "mistral"):
        fail(f"{names[-1]}: its language model is {text.model_type}; this recipe takes llama, mistral")
    if not settings.model_name_or_path:
        num_patches = (vision.image_size // vision.patch_size) ** 2
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_seq_length=num_patches)
        config.projector_hidden_act = "linear" if settings.projector_type == "linear" else "gelu"
    kind = "linear" if config.projector_hidden_act == "linear" else "mlp2x_gelu"
    if settings.projector_type not in (None, kind):
        fail(f"--projector_type {settings.projector_type}: {names[0]} has a projector of type {kind}")
    require(isinstance(config.vision_feature_layer, int), f"{names[0]} takes features from several layers, not one")
    return config


def join(settings, config, seed, **options):
    """Vision encoder + new projector + language model -> a LLaVA. It knows a new token, <image>."""
    vision = load_complete(CLIPVisionModel, settings.vision_tower, revision=settings.vision_tower_revision, **options)
    options["revision"] = settings.language_model_revision
    language = load_complete(transformers.AutoModelForCausalLM, settings.language_model, **options)
    processor = load_processor(settings)
    add_embeddings(language, processor.image_token_id)  # <image> is the last token
    config.vision_config, config.text_config = vision.config, language.config
    config.image_token_index = processor.image_token_id
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):  # as PyTorch begins linear layers, and the original LLaVA
        torch.manual_seed(seed)
        projector = LlavaMultiModalProjector(config)
    if config.projector_hidden_act == "linear":
        torch.nn.init.eye_(projector.linear_2.weight)
        torch.nn.init.zeros_(projector.linear_2.bias)
    if settings.pretrain_mm_mlp_adapter:
        projector.load_state_dict(projector_weights(settings, config))
    model.model.multi_modal_projector = projector.to(vision.device, vision.dtype)
    model.model.vision_tower, model.model.language_model = vision, language.get_decoder()
    model.lm_head = language.lm_head
    tokens = {f"{name}_token_id": getattr(processor.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = transformers.GenerationConfig(**tokens)
    return model


def not_divided():
    """A context in which a process makes a model by itself; ZeRO-3 would divide its weights among all processes."""
    return patch.object(transformers.integrations.deepspeed, "_hf_deepspeed_config_weak_ref", None)


def write_base(settings, training, config):
    """Write the joined model to output_dir/base, unless the run to resume has written it. Returns that folder."""
    folder, dtype = Path(training.output_dir, "base"), weight_dtype(training)
    # One process writes for all, or with --save_on_each_node one on each machine: as checkpoints are written.
    with training.main_process_first(local=training.save_on_each_node):
        # Without a checkpoint it may be left from an earlier attempt, with other parts. The processor is written last.
        is_resumed = any(is_whole(checkpoint) for checkpoint in folder.parent.glob("checkpoint-*"))
        if training.should_save and not (is_resumed and (folder / "processor_config.json").exists()):
            with not_divided():
                save_renamed(join(settings, config, training.seed, dtype=dtype), PUBLISHED, dtype, folder)
            load_processor(settings).save_pretrained(folder)
    return str(folder)


# A projector's weights in the original LLaVA -> in Transformers. The first LLaVA's have no number: it has one linear
# layer. Transformers knows two layers only, so with projector_hidden_act "linear" the second one is the identity.
ORIGINAL_NAMES = {"0.weight": "linear_1.weight", "0.bias": "linear_1.bias", "weight": "linear_1.weight"}
ORIGINAL_NAMES |= {"2.weight": "linear_2.weight", "2.bias": "linear_2.bias", "bias": "linear_1.bias"}


def projector_weights(settings, config):
    """--pretrain_mm_mlp_adapter -> the projector's state dict. Raises SystemExit if there is none that fits."""
    flag = f"--pretrain_mm_mlp_adapter {settings.pretrain_mm_mlp_adapter}"
    with fail_on_error(flag):
        stored = read_tensors(Path(settings.pretrain_mm_mlp_adapter), r"(mm|multi_modal)_projector\.")
    require(stored, f"{flag}: there is no projector in it; stage 1's output_dir or an mm_projector.bin is needed")
    weights = {}
    for name, value in stored.items():
        name = name.rpartition("projector.")[2]
        weights[ORIGINAL_NAMES.get(name, name)] = value
    from_size, to_size = config.vision_config.hidden_size, config.text_config.hidden_size
    is_linear, identity = config.projector_hidden_act == "linear", torch.eye(to_size)
    if is_linear and "linear_2.weight" not in weights:
        weights |= {"linear_2.weight": identity, "linear_2.bias": torch.zeros(to_size)}
    with torch.device("meta"):
        fitting = LlavaMultiModalProjector(config).state_dict()
    sizes = {name: tuple(value.shape) for name, value in weights.items()}
    kind = "linear" if is_linear else "mlp2x_gelu"
    needed = f"a {kind} projector from {from_size} to {to_size} is needed"
    needed += " (--vision_tower, --language_model, --projector_type)"
    if sizes != {name: tuple(value.shape) for name, value in fitting.items()}:
        fail(f"{flag} does not fit: it has {sizes}; {needed}")
    found_kind = "linear" if weights["linear_2.weight"].float().equal(identity) else "mlp2x_gelu"
    require(found_kind == kind, f"{flag} does not fit: it is {found_kind}; {needed}")
    return weights


def warn_if_untrained(settings, model):
    """Warn if the projector is as new: zero biases (Transformers), or no weight beyond PyTorch's initial bound."""
    layers = [model.model.multi_modal_projector.linear_1]
    if model.config.projector_hidden_act != "linear":  # then the second layer is the identity
        layers.append(model.model.multi_modal_projector.linear_2)
    with gathered(model.model.multi_modal_projector.parameters()):
        has_zero_biases = not any(layer.bias is None or layer.bias.any() for layer in layers)
        is_within_bound = all(layer.weight.abs().max() <= 1.01 * layer.in_features**-0.5 for layer in layers)
    if has_zero_biases or is_within_bound:
        name = settings.pretrain_mm_mlp_adapter or settings.model_name_or_path
        PartialState().print(f"warning: the projector of {name} has never been trained: --stage align comes first")


@contextlib.contextmanager
def blank_image(llava, inputs):
    """Give a text-only batch one blank image, whose features are not inserted, so that all processes run the same
    modules; otherwise they would wait for each other for ever."""
    if "pixel_values" in inputs:
        yield
        return

    def no_positions(input_ids, *args, **kwargs):  # the model's own would raise an error: there is no <image>
        return torch.zeros_like(input_ids, dtype=torch.bool).unsqueeze(-1)

    size, device = llava.config.vision_config.image_size, inputs["input_ids"].device
    inputs["pixel_values"] = torch.zeros(1, 3, size, size, device=device, dtype=llava.dtype)
    with patch.object(llava.model, "get_placeholder_mask", no_positions):
        yield


# =====================================================================================================================
# The workbench: flags, files, rows, checkpoints. The same in every recipe; which tokens and weights are trained is
# decided above. In your own copy edit anything. In this repository: edit workbench/workbench.py, then `make sync`.
# =====================================================================================================================

# --------------------------------------------------------------------------------------------------------------- flags

# Inherited flags that no recipe uses: they would be ignored, or break what a recipe promises.
UNUSED_FLAGS = """save_only_model remove_unused_columns gradient_checkpointing gradient_checkpointing_kwargs deepspeed
fsdp do_train do_eval do_predict dataloader_drop_last""".split()


OTHER_NAMES = {"gradient_checkpointing": "; its new name is --activation_checkpointing"}


OTHER_NAMES["deepspeed"] = "; give it to the launcher: accelerate launch --config_file"


# Settings that may change when a run is resumed: they have no effect on what is trained.
FREE_TO_CHANGE = """output_dir resume_from_checkpoint report_to run_name disable_tqdm log_level dataloader_num_workers
dataset_num_proc push_to_hub hub_model_id hub_strategy hub_private_repo max_eval_rows sample_rows sample_tokens
max_new_tokens shared_prompt logging_steps save_total_limit per_device_eval_batch_size""".split()


SPLIT_NOTE = "# Evaluation rows without a split of their own: whole groups of rows that share images."  # settings.yaml


def fail(message):
    """End the program (SystemExit) with exit status 1 and one message, which only the first process prints."""
    sys.exit(f"error: {message}" if os.environ.get("RANK", "0") == "0" else 1)


def require(condition, message):
    """End the program with this message unless the condition holds."""
    if not condition:
        fail(message)


# What a damaged file of a model, or one of another kind of model, can raise.
READ_ERRORS = (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError, RuntimeError, TemplateError)


@contextlib.contextmanager
def fail_on_error(message):
    """End the program with this message if files of a model cannot be read, or do not fit, in the `with` block."""
    try:
        yield
    except (*READ_ERRORS, SafetensorError) as error:
        fail(f"{message}: {' '.join(str(error).split()):.600}")


def pick_precision(training):
    """Unless the user chose: bf16 where the GPU has it, fp16 on an older GPU, float32 on a CPU."""
    if training.bf16 is None and not training.fp16:
        has_gpu = torch.cuda.is_available() and not training.use_cpu
        training.bf16 = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        training.fp16 = has_gpu and not training.bf16


def weight_dtype(training):
    """The dtype of the frozen weights."""
    if training.bf16:
        return torch.bfloat16
    if training.fp16:
        return torch.float16
    return torch.float32


def parse_arguments(parser, refused, argv=None, fill=None):
    """Flags, and the YAML file of --config, as (settings, training). A flag wins over the file. Raises SystemExit.
    refused: inherited flags that this recipe does not use, beside UNUSED_FLAGS. fill: a function that completes
    {name: value} with defaults that depend on other settings. training.given: the values before __post_init__ or
    `fill` changed any, for settings.yaml."""
    # Loader processes are forked after the tokenizer was used.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser.error = fail
    parser.add_argument("--config", help="YAML file of any of these flags.")
    argv = sys.argv[1:] if argv is None else list(argv)
    config_file = parser.parse_known_args(argv)[0].config
    if config_file:
        argv = flags_from_yaml(config_file, parser) + argv
    try:
        given = vars(parser.parse_args(argv))
        del given["config"]
        for field in fields(parser.dataclass_types[1]):
            if field.name in UNUSED_FLAGS + refused and given[field.name] != field.default:
                fail(f"--{field.name}: not used by this recipe{OTHER_NAMES.get(field.name, '')}")
        settings, training = parser.parse_dict(fill(given) if fill else given)
    except (OSError, ValueError, TypeError, OverflowError) as error:
        fail(error)
    training.given = {name: value for name, value in given.items() if name != "hub_token"}
    return settings, training


def flags_from_yaml(file, parser):
    """A YAML file of settings -> a list of flags, so that argparse checks their types and choices."""
    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        fail(f"--config {file} cannot be read: {error}")
    require(isinstance(config, dict), f"--config {file} must hold lines of 'name: value'")
    types = get_type_hints(parser.dataclass_types[0]) | get_type_hints(parser.dataclass_types[1])
    flags = []
    for name, value in config.items():
        if value is None or value == []:  # no flag can say these, so they become the default
            may_be_none = name not in types or type(None) in get_args(types[name]) or parser.get_default(name) is None
            require(value == [] or may_be_none, f"--config {file}: {name} must have a value")
            parser.set_defaults(**{name: value})
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def check_training(settings, training, memory_needed, metrics=("loss",)):
    """Stop if the machine, or flags that every recipe has, cannot work. Raises SystemExit.
    `metrics`: what the best checkpoint may be chosen by. The lowest loss is the best, the highest of all others."""
    gpus, has_device = training.n_gpu, training.use_cpu or training.device.type != "cpu"
    launch = f"accelerate launch --num_processes {gpus} {Path(__file__).name}"
    require(has_device, f"no GPU found ({memory_needed}); for tiny models: --use_cpu")
    require(gpus <= 1, f"{gpus} GPUs, but one process. For all: {launch}. For one: CUDA_VISIBLE_DEVICES=0")
    require(not (training.fp16 and training.use_cpu), "--fp16 needs a GPU")

    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        require(getattr(training, name) >= 1, f"--{name}: batch sizes and accumulation steps must be at least 1")
    for name in ("eval", "save", "logging"):
        if getattr(training, f"{name}_strategy") == "steps":
            steps = getattr(training, f"{name}_steps")
            require(steps > 0, f"--{name}_steps: above 0 is needed; --{name}_strategy no turns it off")
    is_positive = training.max_steps != 0 and training.num_train_epochs > 0
    require(is_positive, "--max_steps and --num_train_epochs must be above 0")
    require(0 <= training.learning_rate < 10, "--learning_rate must be from 0 to below 10")
    require(0 <= settings.eval_fraction < 1, "--eval_fraction must be from 0 to below 1")
    require(settings.max_eval_rows >= 1, "--max_eval_rows must be at least 1; --eval_strategy no turns evaluation off")
    if training.load_best_model_at_end:
        check_best_model(training, metrics)
    try:  # tested now: otherwise they fail after the long loading of the weights
        for callback in transformers.integrations.get_reporting_integration_callbacks(training.report_to):
            callback()
        if training.push_to_hub:
            HfApi(token=training.hub_token).whoami()
    except Exception as error:  # each integration has exceptions of its own
        fail(f"--report_to or --push_to_hub: {error}")


def check_best_model(training, metrics):
    """Stop if the best checkpoint could not be found: another metric, the wrong direction, or not saved."""
    metric = str(training.metric_for_best_model).removeprefix("eval_")
    require(metric in metrics, f"--metric_for_best_model {metric}: this recipe computes {' and '.join(metrics)} only")
    higher_is_better = metric != "loss"
    message = f"--greater_is_better {not higher_is_better} would keep the worst checkpoint by {metric}".lower()
    require(training.greater_is_better == higher_is_better, message)
    if training.eval_strategy == training.save_strategy == "steps":
        message = "to keep the best: --save_steps equal to --eval_steps, or --load_best_model_at_end false"
        require(training.eval_steps == training.save_steps, message)


# ----------------------------------------------------------------------------------------------------- images and rows


class BadRow(ValueError):
    """A row that cannot be trained on. Rows are counted by `reason`; `detail` says what is wrong and how to fix it."""

    def __init__(self, reason, detail="", row=None):
        super().__init__(reason, detail, row)
        self.reason = reason
        self.detail = detail
        self.row = row

    def __str__(self):
        text = f"{self.reason}: {self.detail}" if self.detail else self.reason
        return text if self.row is None else f"row {self.row}: {text}"


def stored_images(value, folder):
    """A row's image or list of images -> list of paths (relative ones: in `folder`), {"bytes": ...} or PIL images."""
    if value is None or value == "":
        return []
    images = []
    for image in value if isinstance(value, list) else [value]:
        if isinstance(image, bytes):
            image = {"bytes": image}
        if isinstance(image, dict) and not image.get("bytes"):
            image = image.get("path")
        if isinstance(image, str):
            image = os.path.join(folder, image)
        images.append(image)
    if images == [None]:  # an embedded image with neither path nor bytes
        return []
    return images


def image_key(image):
    """The same text for the same image: its real path or, for an embedded one, a hash of its bytes."""
    if isinstance(image, dict):
        return hashlib.sha256(image["bytes"]).hexdigest()
    return os.path.realpath(image) if isinstance(image, str) else repr(image)


def load_image(image, max_aspect_ratio=200):
    """A path, {"bytes": ...} or a PIL image -> PIL RGB, upright. Raises BadRow if that is not possible."""
    source = (image.get("path") or "its bytes") if isinstance(image, dict) else str(image)
    if len(source) > 500:  # an image written as text, perhaps
        source = f"{source[:100]}... ({len(source)} characters)"
    try:
        if isinstance(image, dict):
            image = Image.open(io.BytesIO(image["bytes"]))
        elif not isinstance(image, Image.Image):
            image = Image.open(image)
        frames = getattr(image, "n_frames", 1)
        is_several = frames > 1 and image.format != "MPO"  # a phone's MPO holds the picture and a preview of it
        image.load()  # verify() would accept a truncated JPEG
        upright = to_rgb(image)
    except Image.DecompressionBombError as error:
        raise BadRow("image too large", f"{source} ({error}); shrink it") from error
    except Exception as error:  # decoders raise all kinds of exceptions
        cause = getattr(error, "strerror", None) or error
        raise BadRow("unreadable image", f"{source} ({cause}); repair it, or see --image_folder") from error
    if is_several:
        raise BadRow(
            "several images", f"{source} holds {frames}, only the first would be seen; give each its own file"
        )
    width, height = upright.size
    if max(width, height) > max_aspect_ratio * min(width, height):
        detail = f"{source} has {width} x {height} pixels; above 1 : {max_aspect_ratio} little can be seen: crop it"
        raise BadRow("image too narrow", detail)
    return upright


def to_rgb(image):
    """A PIL image of any mode -> RGB, upright, on white. Raises ValueError for brightness that is no number."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits: PIL's own conversion would clip them to white
        brightest = image.getextrema()[1]
        if not 0 < brightest < math.inf:
            raise ValueError(f"its brightest value is {brightest}")
        is_0_to_1 = image.mode == "F" and brightest <= 1
        scale = 255 / brightest if is_0_to_1 or brightest > 255 else 1
        # For these modes PIL only accepts a function of the form value * scale + offset.
        image = image.convert("F").point(lambda value: value * scale + 0).convert("L")
    if image.has_transparency_data:  # dropping alpha would turn black ink on nothing into black on black
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def refuse_duplicate_keys(pairs):
    """A JSON object -> dict. Raises ValueError for a key that appears twice: json.loads would keep its last value."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a key appears twice in {str(pairs):.200}")
    return row


def read_json(path):
    """A .json (list of rows) or .jsonl file (a row a line) -> Dataset; columns may mix types. Raises ValueError."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".jsonl":
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                if line.strip():
                    rows.append(json.loads(line, object_pairs_hook=refuse_duplicate_keys))
            except ValueError as error:
                raise ValueError(f"line {number}: {error} (a .jsonl file has one row a line)") from None
    else:
        try:
            rows = json.loads(text, object_pairs_hook=refuse_duplicate_keys)
        except json.JSONDecodeError as error:
            raise ValueError(f"{error} (a .json file is one list of rows; one row a line is a .jsonl file)") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError('it must be a list of rows: [{"column": value, ...}, ...]')
    if not any(rows):
        raise ValueError("it is empty")
    broken = [n for n, row in enumerate(rows) if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))]
    if broken:
        raise ValueError(f"half a character (a lone surrogate) is in rows {broken[:20]}; fix their encoding")

    # from_generator may divide every list among its arguments, so columns, which it must not divide, are a tuple.
    columns = tuple(dict.fromkeys(key for row in rows for key in row))

    def encoded_rows(rows, columns):  # as JSON text: datasets.Json() would read the text "7" as the number 7
        for row in rows:
            yield {column: json.dumps(row.get(column), ensure_ascii=False) for column in columns}

    features = datasets.Features({column: datasets.Json() for column in columns})
    arguments = {"rows": rows, "columns": columns}
    return datasets.Dataset.from_generator(encoded_rows, features=features, gen_kwargs=arguments)


def prepare_rows(train_rows, eval_rows, name, collator, settings, training):
    """(train, eval): the rows that the collator accepts. If eval_rows is None, some of train are held out instead;
    eval is None if nothing is to be evaluated (--eval_strategy no, --eval_fraction 0)."""
    if eval_rows is not None:  # drawn before they are checked: no need to decode images that are never scored
        eval_rows = draw_rows(eval_rows, settings.max_eval_rows, training.seed)
        eval_rows = check_rows(eval_rows, "the evaluation data", collator, settings, training)
    train_rows = check_rows(train_rows, name, collator, settings, training)
    if eval_rows is not None:
        return train_rows, eval_rows
    if training.eval_strategy == "no" or settings.eval_fraction == 0:
        return train_rows, None
    refuse_run_with_other_split(training)
    return hold_out(train_rows, settings, training)


def check_rows(rows, name, collator, settings, training):
    """The rows that the collator accepts, with two new columns that hold_out and the sampler use: `length`, in tokens,
    and `image_keys`. The other rows are left out, or the program ends and names them (--on_bad_rows)."""

    def try_row(row, changed_at):
        try:
            length = collator([row])["attention_mask"].shape[1]
            keys = [image_key(image) for image in collator.images_of(row)]
        except BadRow as error:
            return {"reason": error.reason, "detail": error.detail, "length": 0, "image_keys": []}
        return {"reason": None, "detail": None, "length": length, "image_keys": keys}

    require(len(rows) > 0, f"{name} is empty: there is nothing to train on")
    text, number = datasets.Value("string"), datasets.Value("int64")
    features = datasets.Features(reason=text, detail=text, length=number, image_keys=datasets.List(text))
    # map() reuses its result while function and arguments stay the same. The function holds the collator with all its
    # attributes; `changed_at` is given so that rows are checked again when an image file has changed.
    options = {"features": features, "fn_kwargs": {"changed_at": times_of_change(rows, collator)}}
    if len(rows) > 1000:
        options["num_proc"] = getattr(training, "dataset_num_proc", None) or os.cpu_count()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process would wait forever for OpenMP's threads, which only its parent has
    with training.main_process_first(desc=f"checking {name}"):
        results = rows.map(try_row, remove_columns=rows.column_names, desc=f"Checking {name}", **options)
    torch.set_num_threads(threads)

    found = zip(results["reason"], results["detail"], strict=True)
    problems = {n: (reason, detail) for n, (reason, detail) in enumerate(found) if reason is not None}
    report_problems(rows, problems, name, settings)
    rows = datasets.concatenate_datasets([rows, results.select_columns(["length", "image_keys"])], axis=1)
    return rows.select([n for n in range(len(rows)) if n not in problems])


def times_of_change(rows, collator):
    """[(path, time of its last change)] of the image files that these rows name."""
    columns = []
    for column in set(collator.image_columns).intersection(rows.column_names):
        has_paths = isinstance((stored_images(rows[0][column], "") or [None])[0], str)
        if has_paths or "Image(" not in str(rows.features[column]):  # embedded images are no files
            columns.append(column)
    if not columns:
        return []
    paths = set()
    for row in rows.select_columns([*columns, "folder"]):
        with contextlib.suppress(BadRow):  # such a row is reported when the collator reads it
            paths.update(image for image in collator.images_of(row) if isinstance(image, str))
    return [(path, os.stat(path).st_mtime_ns) for path in sorted(paths) if os.path.exists(path)]


def report_problems(rows, problems, name, settings):
    """Print the rows with a problem, which are left out; or stop with that as the message. Raises SystemExit."""
    if not problems:
        return
    counts = Counter(reason for reason, _ in problems.values())
    totals = ", ".join(f"{count} x {reason}" for reason, count in counts.most_common())
    lines = [f"{len(problems)} of {len(rows)} rows of {name} cannot be trained on: {totals}"]
    shown = sorted(problems, key=lambda n: problems[n][0] == "too long")[:20]  # broken rows first
    for n, row in zip(shown, rows.select(shown), strict=True):
        reason, detail = problems[n]
        identity = f" (id {row['id']})" if row.get("id") not in (None, "") else ""
        lines.append(f"  row {row['row']}{identity}: {reason}: {detail}")
    if len(problems) > len(shown):
        lines.append(f"  ... and {len(problems) - len(shown)} more")

    too_long = counts["too long"]
    broken = len(problems) - too_long
    none_left = len(problems) == len(rows)
    stop_on_broken = broken > 0 and settings.on_bad_rows == "stop"
    stop_on_long = too_long > 0 and settings.on_long_rows == "stop"
    if not (none_left or stop_on_broken or stop_on_long):
        PartialState().print("left out:", "\n".join(lines))
        return
    if broken > 0:
        lines.append("Fix these rows (counted from 0), or train without them: --on_bad_rows skip")
    if too_long > 0:
        lines.append("Raise the maximum length, or train without the long rows: --on_long_rows drop")
    if none_left:
        lines.append("No row would be left.")
    fail("\n".join(lines))


def draw_rows(rows, count, seed):
    """At most `count` of these rows, drawn by seed: the same ones in every evaluation."""
    return rows.shuffle(seed).select(range(min(len(rows), count))).flatten_indices()


def hold_out(rows, settings, training):
    """Divide rows into (train, eval): about --eval_fraction of the images, chosen by seed, are for evaluation. Of
    their rows --max_eval_rows are scored, and the rest are not used. Rows that share an image go to the same side,
    directly or through other rows: another question about an image that was trained on would be no test."""
    # 1. Groups of images that rows connect. A row without images counts as one image.
    images_of_row = [keys or [f"row {number}"] for number, keys in zip(rows["row"], rows["image_keys"], strict=True)]
    connected = UnionFind()
    for images in images_of_row:
        connected.union(*images)
    groups = list(connected.to_sets())
    group_of_image = {image: group for group in groups for image in group}
    # 2. Image by image in random order, take its group, until there are enough.
    order = sorted(group_of_image)
    random.Random(training.seed).shuffle(order)
    held_out, room = set(), max(1, round(settings.eval_fraction * len(order)))
    for image in order:
        group = group_of_image[image]
        if image not in held_out and len(group) <= room:  # a larger group than there is room for is trained on
            held_out |= group
            room -= len(group)
    if not held_out:
        held_out = min(groups, key=len)
    train = rows.select([n for n, images in enumerate(images_of_row) if images[0] not in held_out])
    evaluation = rows.select([n for n, images in enumerate(images_of_row) if images[0] in held_out])
    remedy = "without an image in both: --eval_fraction 0 turns evaluation off"
    require(len(train) > 0, f"{len(rows)} rows cannot be divided into training and evaluation {remedy}")
    return train, draw_rows(evaluation, settings.max_eval_rows, training.seed)


def refuse_run_with_other_split(training):
    """Stop if output_dir holds a run of an earlier version: it lacks SPLIT_NOTE, and has held out other rows."""
    output_dir = Path(training.output_dir)
    settings = output_dir / "settings.yaml"
    is_begun = any(output_dir.glob("checkpoint-*")) or (output_dir / "trainer_state.json").exists()
    if is_begun and settings.exists() and SPLIT_NOTE not in settings.read_text(encoding="utf-8"):
        problem = f"{output_dir} holds a run of an earlier version, which held out other rows for evaluation"
        fail(f"{problem}: use that version for it, or choose another --output_dir")


# ------------------------------------------------------------------------------------------------------------ training


def keep_4bit_trainable_on_cpu(model):
    """On a CPU, bitsandbytes' first eval() would repack 4-bit weights for a kernel that has no autograd."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def nf4_quantization(dtype, skip_modules):
    """4-bit NF4 with double quantization (QLoRA, arXiv:2305.14314), computing in `dtype`.
    `skip_modules` keep their 16 bits. They replace bitsandbytes' own list, so name lm_head, too. They are full paths:
    a bare "vision_tower" would match nothing."""
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip_modules, **nf4)


def lora_targets(names, language_model, default):
    """--lora_target_modules -> what LoraConfig takes: `default`, or a regex that must match a module's full path.

    One name with regex characters is that regex. Others are names of layers within `language_model`, a path."""
    if not names:
        return default
    is_one_regex = len(names) == 1 and re.search(r"[\\^$*+?|()\[\]{}]", names[0])
    if not is_one_regex:
        return rf"{re.escape(language_model)}\.(.*\.)?({'|'.join(map(re.escape, names))})"
    try:
        re.compile(names[0])
    except re.error as error:
        fail(f"--lora_target_modules {names[0]!r} is no regular expression: {error}")
    return names[0]


def check_lora_targets(settings, adapter, model, untrainable):
    """Stop if a LoRA target is no linear layer of the model, or one that cannot be trained. Raises SystemExit.
    adapter: the LoraConfig, or None. model: may be an empty_model. untrainable: {part of a path: reason}."""
    if adapter is None:
        return
    targets = adapter.target_modules
    matched = []
    for name, module in model.named_modules():
        if targets == "all-linear":  # PEFT leaves lm_head out
            is_target = module is not model.get_output_embeddings()
        elif isinstance(targets, str):
            is_target = re.fullmatch(targets, name)
        else:
            is_target = f".{name}".endswith(tuple(f".{target}" for target in targets))
        if is_target and isinstance(module, torch.nn.Linear):
            matched.append(name)
    names = settings.lora_target_modules or []
    for wanted in names:
        is_found = any(f".{name}".endswith(f".{wanted}") for name in matched)
        if len(names) == 1 and not is_found:  # it may be a regex
            is_found = any(re.fullmatch(wanted, name) for name in matched)
        require(is_found, f"--lora_target_modules {wanted}: no such linear layer; give names (q_proj) or one regex")
    for part, reason in untrainable.items():
        inside = [name for name in matched if f".{part}." in f".{name}."]
        require(not inside, f"--lora_target_modules: {inside[:1]} is in {part}, {reason}")


def check_weight_files(flag, folder):
    """Stop before rows are read if a local folder has no weights, or some that were cut off. Raises SystemExit."""
    files = list(Path(folder).glob("*.safetensors"))
    with fail_on_error(f"{flag} {folder}"):
        for file in files:
            safe_open(file, "pt")  # raises if the end of the file is missing
    if Path(folder).is_dir() and not files and not list(Path(folder).glob("*.bin")):
        fail(f"{flag} {folder}: there are no weights in it")


def load_complete(model_class, name, **options):
    """model_class.from_pretrained, but missing weights are an error: it would make them up. Raises ValueError."""
    model, info = model_class.from_pretrained(name, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights of a {type(model).__name__}: {', '.join(missing[:3])}")
    return model


def read_tensors(path, pattern):
    """{name: tensor} of a folder's .safetensors, or of a file that torch.save wrote, if the pattern is in the name."""
    tensors = {}
    if path.is_dir():
        for file in path.glob("*.safetensors"):
            weights = safe_open(file, "pt")
            names = [name for name in list(weights.keys()) if re.search(pattern, name)]
            tensors |= {name: weights.get_tensor(name) for name in names}
        return tensors
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError):  # torch's own text advises to run what is in it
        raise ValueError("it is empty, damaged, or a pickle that holds more than weights") from None
    for name, value in stored.items() if isinstance(stored, dict) else ():
        if isinstance(value, torch.Tensor) and re.search(pattern, str(name)):
            tensors[name] = value
    return tensors


def save_renamed(model, beginnings, dtype, folder, state_dict=None, **options):
    """save_pretrained in `dtype`, by other names. beginnings: {how names begin: how they begin in the file}."""
    renamed = {}
    for name, value in (state_dict or model.state_dict()).items():
        for old, new in beginnings.items():
            if name.startswith(old):
                renamed[new + name.removeprefix(old)] = value.to("cpu", dtype)
    type(model).save_pretrained(model, folder, state_dict=renamed, save_original_format=False, **options)


def add_embeddings(language_model, first_new):
    """Give a language model embeddings for token ids from `first_new` on, to a multiple of 64: the mean of all others.
    It may have such rows already, which no token uses."""
    num_rows = max(first_new + 1, language_model.config.vocab_size)
    language_model.resize_token_embeddings(num_rows, pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        for layer in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
            layer.weight[first_new:] = layer.weight[:first_new].float().mean(0).to(layer.weight.dtype)


def gathered(parameters):
    """A context in which ZeRO-3, which divides each weight among the processes, puts these weights together."""
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed  # needed by few: it is no dependency

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)


def train_in_float32(model):
    """Make trained weights float32: in 16 bits small steps round to nothing, and fp16 gradients cannot be scaled."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def print_parameters(model, parts, rate_of=None):
    """Print how many parameters each part of the model has, how many are trained and in 4-bit, and their learning rate
    by `rate_of(name)`. A weight belongs to the first part whose name is in its own, or else to the last one."""
    counts = {part: Counter() for part in parts}
    rates = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        if "original_module." in name:  # PEFT trains a copy of it
            continue
        part = next((part for part in parts if part in name), parts[-1])
        size = getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 a process has a share of it
        if type(parameter).__name__ == "Params4bit":
            size *= 2  # a byte holds two
            counts[part]["in 4-bit"] += size
        counts[part]["all"] += size
        if parameter.requires_grad:
            counts[part]["trained"] += size
            rates[part] = rate_of(name) if rate_of else 0
    for part, count in counts.items():
        if count["all"] > 0:
            rate = f" at {rates[part]:g}" if rate_of else ""
            line = f"{part:22s}{count['trained']:>14,} of {count['all']:>14,} parameters trained{rate}"
            PartialState().print(f"{line}, {count['in 4-bit']:>14,} in 4-bit")


def marked(batch, processor, n=0):
    """Row n of a batch as text: trained tokens in «», runs of image tokens folded, padding left out."""
    real = batch["attention_mask"][n].bool()
    ids = batch["input_ids"][n][real].tolist()
    is_trained = (batch["labels"][n][real] != -100).tolist()
    is_image = [token == processor.image_token_id for token in ids]
    text, decoded, end = "", "", 0
    for (image, trained), run in itertools.groupby(zip(is_image, is_trained, strict=True)):
        count = len(list(run))
        end += count
        # Decoded from the start each time: a run by itself would lose its leading space.
        before, decoded = decoded, processor.tokenizer.decode(ids[:end])
        piece = decoded[len(before) :]
        if image:
            text += f"<image> x {count}"
        elif trained:
            text += f"«{piece}»"
        else:
            text += piece
    return text


def labels_from_masks(batch, masks, image_token_id):
    """labels (B, L): the ids of a row where its mask is True, -100 elsewhere. A mask has a value for each text token
    of the row: none for image tokens and padding."""
    is_text = batch["attention_mask"].bool() & (batch["input_ids"] != image_token_id)
    labels = torch.full_like(batch["input_ids"], -100)
    for n, mask in enumerate(masks):
        text_positions = is_text[n].nonzero().squeeze(1)
        trained_positions = text_positions[mask]
        labels[n, trained_positions] = batch["input_ids"][n, trained_positions]
    return labels


def next_tokens(labels):
    """labels (B, L) -> what each position must predict (B, L): the label of the next one, -100 where there is none."""
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


@contextlib.contextmanager
def logits_only_at(positions, lm_head):
    """Optional, for speed: within the `with` block lm_head scores these positions only. Pass it shift_labels to match.

    positions: (B, L) bool. Logits become (trained positions, vocabulary) instead of (B, L, vocabulary)."""

    def select(module, inputs):
        return inputs[0][positions]

    hook = lm_head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


class ReplacedForwards(transformers.TrainerCallback):
    """Gives modules another forward until training ends, then their own again, so that the model can be merged."""

    def __init__(self):
        self.modules = []

    def replace(self, module, forward):
        module.forward = functools.wraps(module.forward)(forward)  # generate() reads the names of its arguments
        self.modules.append(module)

    def on_train_end(self, args, state, control, **kwargs):
        for module in self.modules:
            vars(module).pop("forward", None)  # from here on the forward of its class again


class FrozenWithoutGraph(ReplacedForwards):
    """Optional, for speed: a frozen part of the model (the vision tower) runs without a graph until training ends.
    Activation checkpointing makes a model's inputs require a gradient, so it would compute a frozen tower twice and
    backpropagate through it. To do without this, delete the line that adds it: the result is the same."""

    def __init__(self, model, part):
        super().__init__()
        for name, module in model.named_modules():
            if f".{name}".endswith(f".{part}"):
                trained = [weight for weight, parameter in module.named_parameters() if parameter.requires_grad]
                remedy = "freeze it, or delete the line that adds FrozenWithoutGraph"
                require(not trained, f"{part} runs without a graph, so {trained[:1]} would get no gradient: {remedy}")
                self.replace(module, torch.no_grad()(module.forward))


def optimizer_by_part(trainer, rate_of, logged_rate):
    """The optimizer of --optim, with a learning rate for each weight: `rate_of(name)`. Biases and norms do not decay.

    Weights with `logged_rate` come first: the first group's rate is the one that is logged."""
    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    decayed = set(trainer.get_decay_parameter_names(trainer.model))

    def group_of(name):
        rate = rate_of(name)
        return rate != logged_rate, rate, name in decayed

    groups = []
    for (_, rate, decays), names in itertools.groupby(sorted(trained, key=group_of), key=group_of):
        weight_decay = trainer.args.weight_decay if decays else 0.0
        groups.append({"params": [trained[name] for name in names], "lr": rate, "weight_decay": weight_decay})
    optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    return optimizer_class(groups, **options)


class ByModalityAndLength(torch.utils.data.Sampler):
    """Optional, for speed, LLaVA's group_by_modality_length: the rows of a step all have images or all have none, and
    are of similar length, so there is little padding. The longest step comes first, to see whether it fits; what is
    left over of both kinds comes last. To do without it: --group_by_modality_length false.
    `generator()` returns the random numbers of the current epoch."""

    def __init__(self, lengths, image_counts, rows_per_step, generator):
        self.lengths = list(lengths)
        self.image_counts = list(image_counts)
        self.rows_per_step = rows_per_step
        self.generator = generator

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        generator, size = self.generator(), self.rows_per_step
        steps, left_over = [], []
        for has_images in (True, False):
            rows = [n for n, count in enumerate(self.image_counts) if (count > 0) == has_images]
            if rows:
                lengths = [self.lengths[n] for n in rows]
                order = [rows[n] for n in get_length_grouped_indices(lengths, size, generator=generator)]
                end = len(rows) - len(rows) % size
                steps += [order[start : start + size] for start in range(0, end, size)]
                left_over += order[end:]
        steps = [steps[n] for n in torch.randperm(len(steps), generator=generator)]
        if steps:
            longest = max(range(len(steps)), key=lambda step: max(self.lengths[n] for n in steps[step]))
            steps[0], steps[longest] = steps[longest], steps[0]
        return itertools.chain(*steps, left_over)


def epoch_generator(trainer):
    """Random numbers for the order of rows in the current epoch, the same on all GPUs and after a resume."""
    seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
    epoch = int(trainer.state.epoch or 0)  # after a resume Trainer does not call set_epoch on samplers of ours
    return torch.Generator().manual_seed(seed + epoch)


def tokens_that_end_a_line(tokenizer):
    """Token ids whose text ends in a newline. Some tokenizers have many: a full stop and a newline together."""
    newlines = ("<0x0A>", "\u010a", "\n")  # as a byte, as byte-level BPE writes it, as it is
    candidates = [n for token, n in tokenizer.get_vocab().items() if token.endswith(newlines)]
    return sorted(n for n in candidates if tokenizer.decode([n]).endswith("\n"))


def text_of(message):
    """The words of a message, without its images."""
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


def images_in(messages):
    """The images of a conversation, in their order."""
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]


def last_answer(messages):
    """The index of the assistant's last message."""
    return max(n for n, message in enumerate(messages) if message["role"] == "assistant")


Answer = namedtuple("Answer", "text num_tokens ended")  # ended: whether it stopped by itself, and not at the limit


def answer_rows(trainer, rows, max_new_tokens):
    """Greedy answers to the last question of each row: a list of Answer, the same in all processes. Each answers a
    share of the rows; under ZeRO-3, where all must use the same weights at the same time, each answers all."""
    share = range(len(rows))
    if not is_deepspeed_zero3_enabled():
        share = share[PartialState().process_index :: PartialState().num_processes]
    batch_size = trainer.args.per_device_eval_batch_size
    answers = {}  # number of a row -> Answer
    for start in range(0, len(share), batch_size):
        numbers = share[start : start + batch_size]
        answers |= zip(numbers, answer_batch(trainer, [rows[n] for n in numbers], max_new_tokens), strict=True)
    all_answers = dict(gather_object(list(answers.items())))
    return [all_answers[n] for n in range(len(rows))]


def answer_batch(trainer, rows, max_new_tokens):
    """Greedy answers to the last question of each row, generated together: a list of Answer."""
    collator, device = trainer.data_collator, trainer.args.device
    conversations = [collator.read(row) for row in rows]
    questions = [messages[: last_answer(messages)] for messages in conversations]
    batch = collator.tokenize(questions, prompt=True).to(device)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "use_cache": True}
    options["eos_token_id"] = collator.stop_ids
    options["max_length"] = None  # the one in the model's generation config would only cause a warning
    trainer.model.eval()  # each training step turns training mode on again
    with torch.no_grad(), trainer.accelerator.autocast():
        ids = trainer.model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    # From the stop token on, also in the padding after it:
    is_over = torch.isin(ids, torch.tensor(collator.stop_ids, device=device)).cumsum(dim=1) > 0
    answers = []
    for row_ids, over in zip(ids, is_over, strict=True):
        text = collator.processor.tokenizer.decode(row_ids, skip_special_tokens=True).strip()
        answers.append(Answer(text, num_tokens=int((~over).sum()), ended=bool(over.any())))
    return answers


class AnswerSamples(transformers.TrainerCallback):
    """After each evaluation, answer the last question of the first few held-out rows, into samples.md."""

    def __init__(self, trainer, num_rows, max_new_tokens):
        self.trainer = trainer
        self.num_rows = num_rows
        self.max_new_tokens = max_new_tokens

    def on_evaluate(self, args, state, control, **kwargs):
        rows = self.trainer.eval_dataset
        rows = rows.take(min(self.num_rows, len(rows)))
        samples = []
        for row, answer in zip(rows, answer_rows(self.trainer, rows, self.max_new_tokens), strict=True):
            messages = self.trainer.data_collator.read(row)
            last = last_answer(messages)
            texts = [text_of(messages[last - 1]), text_of(messages[last]), answer.text]
            samples.append((row["row"], messages, texts))
        if state.is_world_process_zero and samples:
            columns = ["picture", "question", "right", "answered"]
            append_samples(args.output_dir, f"Step {state.global_step}", columns, samples)


def append_samples(output_dir, title, columns, samples):
    """Append a table to samples.md, its images to samples/. A sample is (row number, messages with images, texts); the
    texts fill the columns after the first, which holds the images."""
    folder = Path(output_dir, "samples")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"\n## {title}\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for number, messages, texts in samples:
        links = []
        for n, image in enumerate(images_in(messages)):
            ImageOps.contain(image, (336, 336)).save(folder / f"{number}-{n}.png")
            links.append(f"![](samples/{number}-{n}.png)")
        cells = [" ".join(text.replace("|", "&#124;").split()) for text in [" ".join(links), *texts]]
        lines.append(f"| {' | '.join(cells)} |")
    with open(Path(output_dir, "samples.md"), "a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


# --------------------------------------------------------------------------------------------------------- checkpoints


def is_whole(checkpoint):
    """Whether a run can be resumed from this checkpoint, which may have been cut off while it was written."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        if "global_step" not in state or "train_batch_size" not in state:
            return False
        weights, random_states = list(checkpoint.glob("*.safetensors")), list(checkpoint.glob("rng_state*"))
        for file in weights:
            safe_open(file, "pt")  # raises where the end of the file is missing
        optimizer = [checkpoint / "optimizer.pt"]
        if (checkpoint / "latest").exists():  # DeepSpeed's, which names a folder with a share of each process
            optimizer = list((checkpoint / (checkpoint / "latest").read_text().strip()).glob("*.pt")) or optimizer
        others = [*optimizer, checkpoint / "scheduler.pt", *random_states]
        return bool(weights) and bool(random_states) and all(zipfile.is_zipfile(file) for file in others)
    except (OSError, ValueError, TypeError, SafetensorError):
        return False


def checkpoint_to_resume(training):
    """The checkpoint to resume from, or None. Exits with status 0 where the run is finished. Raises SystemExit."""
    output_dir, wanted = Path(training.output_dir), training.resume_from_checkpoint
    checkpoints = [folder for folder in output_dir.glob("checkpoint-*") if folder.name.split("-")[1].isdigit()]
    checkpoints.sort(key=lambda folder: int(folder.name.split("-")[1]))
    whole = [folder for folder in checkpoints if is_whole(folder)]
    finished = (output_dir / "trainer_state.json").exists()

    if wanted.lower() == "false":
        require(not checkpoints and not finished, f"{output_dir} holds a run already: choose another --output_dir")
        require_writable(output_dir)
        return None
    if wanted.lower() != "auto":
        names = [str(folder) for folder in whole]
        require(is_whole(Path(wanted)), f"--resume_from_checkpoint {wanted}: no whole checkpoint; whole are {names}")
        return wanted
    if whole or finished:
        require_same_settings(training)
    if finished:
        PartialState().print(f"{output_dir} holds this run, finished. For another one choose another --output_dir.")
        PartialState().destroy_process_group()
        sys.exit(0)
    require_writable(output_dir)
    for folder in checkpoints:
        if folder not in whole:
            PartialState().print(f"{folder} is incomplete, skipped")
    return str(whole[-1]) if whole else None


def require_same_settings(training):
    """Stop if output_dir holds a run with other settings. Raises SystemExit."""
    output_dir = Path(training.output_dir)
    remedy = "choose another --output_dir, or resume from it all the same with --resume_from_checkpoint CHECKPOINT"
    try:
        old = dict(yaml.safe_load((output_dir / "settings.yaml").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, yaml.YAMLError):
        fail(f"{output_dir} holds a run without the settings.yaml that says which one: {remedy}")
    changes = []
    for name, value in training.given.items():
        if name in old and old[name] != value and name not in FREE_TO_CHANGE:
            changes.append(f"{name} {old[name]} -> {value}")
    require(not changes, f"{output_dir} holds a run with other settings ({', '.join(changes)}): {remedy}")


def require_writable(output_dir):
    """Stop if output_dir could not be written. Raises SystemExit."""
    existing = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        fail(f"--output_dir {output_dir} cannot be written: {error}")


def write_settings(training):
    """Write settings.yaml, atomically. A trainer_state.json, the mark of a finished run, is removed."""
    output_dir = Path(training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    text = f"# {Path(__file__).name}\n{SPLIT_NOTE}\n" + yaml.safe_dump(training.given, sort_keys=False)
    (output_dir / "settings.part").write_text(text, encoding="utf-8")
    os.replace(output_dir / "settings.part", output_dir / "settings.yaml")
    (output_dir / "trainer_state.json").unlink(missing_ok=True)


def train_and_save(trainer, checkpoint=None):
    """Print the plan, train, save the result in output_dir. Raises SystemExit."""
    args, say = trainer.args, PartialState().print
    steps = print_plan(trainer, checkpoint)
    if args.process_index == 0:
        write_settings(args)
    try:
        is_trained = checkpoint is not None and load_finished_training(trainer, checkpoint, steps)
        if not is_trained:
            trainer.train(resume_from_checkpoint=checkpoint)
    except BadRow as error:
        # From a loader it is a traceback, whose last line is the message. Perhaps only this process has met the row.
        sys.exit(f"error: the data changed during the run: {str(error).splitlines()[-1]}")
    except KeyboardInterrupt:
        fail(f"interrupted; the same command resumes from the newest checkpoint in {args.output_dir}, if there is one")

    trainer.save_model()  # also pushes to the hub with --push_to_hub
    trainer.save_state()  # last: its file says that the run is finished
    state = trainer.state
    if args.load_best_model_at_end and state.best_metric is not None:
        best = f"{args.metric_for_best_model}: {state.best_metric:.4g}, at step {state.best_global_step}"
        say(f"best {best}; that is saved")
    trainer.accelerator.wait_for_everyone()  # a process that leaves while another one writes may take it down
    if args.world_size > 1:
        time.sleep(0.5)  # Gloo ends that barrier in a thread, which aborts as Python ends: PyTorch's issue 190489
    trainer.accelerator.end_training()
    say(f"saved {args.output_dir}: what was trained, processor, settings.yaml, trainer_state.json (the log)")


def print_plan(trainer, checkpoint):
    """Print what will be trained. Returns the number of optimizer steps of the whole run."""
    args, num_rows = trainer.args, len(trainer.train_dataset)
    rows_per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(num_rows / rows_per_step)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    start = f"resuming from {checkpoint}" if checkpoint else "from the start"
    PartialState().print(
        f"{num_rows} rows to train on, {len(trainer.eval_dataset or ())} to evaluate; "
        f"{steps} steps of {rows_per_step} rows, {steps / steps_per_epoch:.2f} epochs; {start}"
    )
    if args.eval_strategy == "steps" and args.eval_steps > steps:
        PartialState().print(f"warning: nothing will be evaluated, --eval_steps {args.eval_steps:g} is above {steps}")
    return steps


def load_finished_training(trainer, checkpoint, steps):
    """If a run was killed after its last step, but before its result was saved, load the result and return True."""
    state = transformers.TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    is_at_end = state.global_step >= max(steps, state.max_steps)
    if not is_at_end or trainer.is_deepspeed_enabled:  # DeepSpeed can load a checkpoint only in train()
        return False
    trainer.state = state  # train() is not called, it would take one more step
    result = Path(checkpoint)
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        result = Path(checkpoint).parent / Path(state.best_model_checkpoint).name  # the folder may have moved
    remedy = "--load_best_model_at_end false saves the last one"
    require(is_whole(result), f"{result}, the best checkpoint, is missing or damaged: {remedy}")
    trainer._load_from_checkpoint(str(result))
    return True


if __name__ == "__main__":
    main()
