# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "transformers==5.24.0", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0", "pillow==13.0.0",
#   "bitsandbytes==0.50.2", "pyyaml==6.0.3", "jinja2==3.1.6", "tensorboard==2.21.0", "networkx==3.6.1",
#   "psutil==7.2.2",
# ]
# ///
"""Fine-tune MiniCPM-V on conversations about images: LoRA or QLoRA, plain Trainer, one 24 GB GPU.

    python finetune_minicpm_lora.py --dataset_name train.json     # MiniCPM-V-4.6, LoRA; train.json is the default
    python finetune_minicpm_lora.py --q_lora                    # language model in 4-bit NF4
    python finetune_minicpm_lora.py --model_name_or_path openbmb/MiniCPM-V-2_6 --trust_remote_code
    accelerate launch --num_processes 4 finetune_minicpm_lora.py                       # several GPUs, DDP
    python finetune_minicpm_lora.py --config minicpm-lora/settings.yaml                # resume that run after a crash

Loss: next-token cross-entropy, averaged over all trained tokens of an optimizer step, those of all GPUs together.
Trained tokens: the assistant's answers, each with its <|im_end|>. Prompts and images are read, not trained.
Trained weights: LoRA on the language model's linear layers, and the whole projector. The vision tower stays frozen.
Result: the checkpoint with the lowest eval_loss: this loss on held-out images, averaged over trained tokens.
Before training all rows are checked; of many only a sample is decoded then. The same command resumes a run that was
interrupted, if data and settings are unchanged (also on another number of GPUs).
Every setting is a flag: python finetune_minicpm_lora.py --help. The format of a row is shown in load_data."""

import ast
import atexit
import base64
import codecs
import contextlib
import difflib
import functools
import hashlib
import heapq
import importlib
import inspect
import io
import itertools
import json
import math
import multiprocessing.util
import os
import pickle
import platform
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import zipfile
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Literal, get_args, get_type_hints
from unittest.mock import patch
from urllib.parse import unquote, urlparse

import datasets
import numpy as np
import psutil
import torch
import transformers
import yaml
from accelerate import PartialState
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets.fingerprint import Hasher
from huggingface_hub import HfApi
from networkx.utils import UnionFind
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import ExifTags, Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, HfArgumentParser
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor
from transformers.trainer_utils import rotate_checkpoints
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.vision_utils import get_vision_nearest_position_ids


@dataclass
class Settings:
    """Model, data, adapter, samples. Each line is a flag: --lora_r 32. The official code has the same names."""

    # model
    model_name_or_path: str = HfArg(default="openbmb/MiniCPM-V-4.6", help="MiniCPM-V 4.6, 4.7, 2.6: hub id or folder.")
    model_revision: str | None = HfArg(default=None, help="Branch, tag, commit. Set it for 2.6: its code runs.")
    trust_remote_code: bool = HfArg(default=False, help="Run code that comes with the model. 2.6 needs it.")
    # data
    dataset_name: str = HfArg(default="train.json", help="Hub id, folder or file of rows.", aliases=["--data_path"])
    dataset_config: str | None = HfArg(default=None, help="Configuration of a hub data set that has several.")
    dataset_revision: str | None = HfArg(default=None, help="Branch, tag or commit of the data set.")
    dataset_train_split: str = HfArg(default="train", help="Split to train on.")
    dataset_test_split: str | None = HfArg(default=None, help="Split to evaluate on. Default: test, or validation.")
    eval_dataset_name: str | None = HfArg(default=None, help="To evaluate on.", aliases=["--eval_data_path"])
    image_folder: str | None = HfArg(default=None, help="Folder of the images. Default: that of the .json.")
    eval_fraction: float = HfArg(default=0.02, help="Share of the images held out for evaluation. 0: none.")
    max_eval_rows: int = HfArg(default=200, help="Evaluate on at most this many rows, the same ones each time.")
    ignore_columns: list[str] | None = HfArg(default=None, help="Columns to leave out that may matter, such as video.")
    text_columns: list[str] | None = HfArg(default=None, help="Columns whose texts look like lists, and are meant so.")
    check_rows: str = HfArg(default="auto", help="Rows to decode before training: all, a number, or auto.")
    on_bad_rows: Literal["stop", "skip"] = HfArg(default="stop", help="Rows that cannot be trained on: stop, or skip.")
    on_long_rows: Literal["drop", "stop"] = HfArg(default="drop", help="Rows that are too long: drop them, or stop.")
    model_max_length: int = HfArg(default=2048, help="Longest row in tokens, images included. Never cut.")
    max_slice_nums: int = HfArg(default=9, help="Maximum number of slices, in addition to the whole image. 1: none.")
    enable_thinking: bool = HfArg(default=False, help="Also train <think>...</think> before an answer (not 2.6).")
    downsample_mode: Literal["16x", "4x"] = HfArg(default="16x", help="4x: four times the image tokens (not 2.6).")
    # adapter, and what else is trained
    tune_vision: bool = HfArg(default=False, help="Train the vision tower in full.")
    tune_llm: bool = HfArg(default=False, help="Train the language model in full. Needs use_lora false.")
    use_lora: bool = HfArg(default=True, help="Adapters on the language model. false alone trains only the projector.")
    q_lora: bool = HfArg(default=False, help="Load the language model, and nothing else, in 4-bit NF4.")
    vision_learning_rate: float | None = HfArg(default=None, help="For tune_vision. Default: learning_rate.")
    projector_learning_rate: float | None = HfArg(default=None, help="0: frozen. Default: learning_rate.")
    lora_r: int = HfArg(default=64, help="Rank of the adapter.")
    lora_alpha: int = HfArg(default=64, help="The adapter is scaled by alpha / r.")
    lora_dropout: float = HfArg(default=0.05, help="Dropout before the adapter.")
    lora_target_modules: list[str] | None = HfArg(default=None, help="Layers to adapt: q_proj v_proj, or one regex.")
    lora_bias: Literal["none", "all", "lora_only"] = HfArg(default="none", help="Biases to train, too.")
    lora_modules_to_save: list[str] = HfArg(default_factory=list, help="Modules to train in full: embed_tokens.")
    lora_layers_to_transform: list[int] = HfArg(default_factory=list, help="Adapt only these layers (counted from 0).")
    lora_weight_path: str | None = HfArg(default=None, help="Train this adapter further, with a new optimizer.")
    # samples.md
    sample_rows: int = HfArg(default=8, help="Number of held-out rows to answer at each evaluation. 0: none.")
    sample_tokens: int = HfArg(default=64, help="Longest answer in samples.md, in tokens.")


@dataclass
class Training(transformers.TrainingArguments):
    """TrainingArguments with this recipe's defaults. Its other settings are flags as well, except REFUSED_*."""

    # training
    output_dir: str = HfArg(default="minicpm-lora", help="Adapter, processor, settings, samples, logs, checkpoints.")
    resume_from_checkpoint: str = HfArg(default="auto", help="auto: the newest one. false: a new run. Or a folder.")
    num_train_epochs: float = HfArg(default=3.0, help="Passes over the data. max_steps, if given, wins.")
    per_device_train_batch_size: str = HfArg(default="auto", help="Rows at once. auto: what fits the GPU; on a CPU 1.")
    rows_per_step: int | None = HfArg(default=None, help="Rows of a step, on all GPUs. Default: 8 a GPU.")
    gradient_accumulation_steps: int | None = HfArg(default=None, help="Default: what makes up rows_per_step.")
    learning_rate: float = HfArg(default=1e-4, help="The language model's: 1e-4 for LoRA, 1e-5 in full.")
    lr_scheduler_type: str = HfArg(default="cosine", help="Shape of the learning rates over the run.")
    warmup_steps: float = HfArg(default=0.03, help="Steps, or below 1 a share of the run.")
    weight_decay: float = HfArg(default=0.1, help="Of all trained weights except biases and norms.")
    adam_beta2: float = HfArg(default=0.95, help="AdamW's second beta.")
    save_steps: float = HfArg(default=100, help="Steps between checkpoints: what a crash can cost.")
    save_total_limit: int | None = HfArg(default=2, help="Checkpoints kept: the newest and the best.")
    logging_steps: float = HfArg(default=5, help="Steps between two lines of the log.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="true hides NaN losses in the log.")
    stop_on_nonfinite: int = HfArg(default=3, help="Stop after so many steps in a row with a gradient of nan or inf.")
    report_to: str = HfArg(default="tensorboard", help="tensorboard, wandb, trackio, ..., none.")
    dataloader_num_workers: int = HfArg(default=4, help="Processes that prepare images while the GPU works.")
    remove_unused_columns: bool = HfArg(default=False, help="Must stay false: the collator reads the columns.")
    prediction_loss_only: bool = HfArg(default=True, help="Must stay true: all logits would fill the memory.")
    ddp_find_unused_parameters: bool | None = HfArg(default=True, help="false: faster, if all rows have images.")
    activation_checkpointing: bool = HfArg(default=True, help="New name of gradient_checkpointing: less memory.")
    bf16: bool | None = HfArg(default=None, help="Default: where the GPU has it, else fp16.")
    # evaluation
    per_device_eval_batch_size: str = HfArg(
        default="auto", help="Rows evaluated, or answered, at once. auto; on a CPU 1."
    )
    eval_strategy: str = HfArg(default="steps", help="When to evaluate: steps, epoch, no.")
    eval_steps: float = HfArg(default=100, help="Steps between evaluations. The last step is evaluated, too.")
    load_best_model_at_end: bool = HfArg(default=True, help="Result: lowest eval_loss. false: last weights.")

    def __post_init__(self):
        pick_precision(self)
        pick_batch(self, batch=1, accumulation=8, eval_batch=1)
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_loss"  # the lowest is the best
        super().__post_init__()


# TrainingArguments' flags that this recipe does not use, in addition to REFUSED_EVERYWHERE.
REFUSED_HERE = """label_smoothing_factor label_names prediction_loss_only use_liger_kernel neftune_noise_alpha
torch_compile""".split()
PLACEHOLDER = r"<image(?:_\d+)?>"  # what stands for an image in a user's turn
TURNS = ["conversations", "messages"]  # columns of a row: the one that has a value is read
IMAGES = ["image", "images"]  # or file_name
DUMMY_ROW = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "seven"}]}
# model_type -> the paths of the model's parts. minicpmv is 2.6: its own code is called in functions that end in _26.
PARTS_4 = {"vision": "model.vision_tower", "projector": "model.merger", "language": "model.language_model"}
PARTS_26 = {"vision": "vpm", "projector": "resampler", "language": "llm"}
PARTS = {"minicpmv4_6": PARTS_4, "minicpmv4_7": PARTS_4, "minicpmv": PARTS_26}


def parse(argv=None):
    """Flags and `--config run.yaml` -> (Settings, Training). Raises SystemExit."""
    return parse_arguments(HfArgumentParser([Settings, Training], allow_abbrev=False), REFUSED_HERE, argv)


def check(settings, training):
    """Stop early if this machine or these flags cannot work. Raises SystemExit."""
    check_common_flags(settings, training, "2.6 needs 24 GB, 4.6 less")
    slices = "MiniCPM-V's slices may differ from process to process, which then wait for ever"
    require(not is_deepspeed_zero3_enabled(), f"ZeRO-3: {slices}: take FSDP2, ZeRO-2 or DDP")
    if settings.use_lora and settings.tune_llm:
        fail("--use_lora adapts the language model, --tune_llm trains all of it: for --tune_llm add --use_lora false")
    if settings.q_lora and not settings.use_lora:
        fail("--q_lora: 4-bit weights cannot be trained themselves, this needs --use_lora true")
    for name in ("lora_target_modules", "lora_weight_path", "lora_modules_to_save", "lora_layers_to_transform"):
        require(settings.use_lora or not getattr(settings, name), f"--{name}: for --use_lora true only")
    lora_targets(settings.lora_target_modules, "", "")  # stops at an invalid regex
    if settings.vision_learning_rate is not None and not settings.tune_vision:
        fail("--vision_learning_rate is for --tune_vision; without it the tower is frozen")
    require(settings.vision_learning_rate != 0, "--vision_learning_rate 0 means a frozen tower: omit --tune_vision")
    if training.learning_rate == 0 and (settings.use_lora or settings.tune_llm):
        fail("--learning_rate 0 means a frozen language model: then --use_lora false and no --tune_llm")
    rates = learning_rates(settings, training).values()
    require(all(0 <= rate < 10 for rate in rates), "learning rates must be from 0 (frozen) to below 10")
    require(any(rates), "nothing would be trained: every part is frozen")


def load_processor(settings):
    """The model's processor, set to this run's slices. Raises SystemExit for another model."""
    name = settings.model_name_or_path
    do_without_torchvision()
    with fail_on_source("--model_name_or_path", name):
        processor = AutoProcessor.from_pretrained(
            name, revision=settings.model_revision, trust_remote_code=settings.trust_remote_code
        )
    kind = type(processor).__name__
    known = ("MiniCPMV4_6Processor", "MiniCPMV4_7Processor", "MiniCPMVProcessor")
    require(kind in known, f"{name} has a {kind}; this needs the processor of MiniCPM-V 4.6, 4.7 or 2.6")

    # Edit the prompt here: set processor.chat_template (2.6: that of processor.tokenizer) to your own. Turns must stay
    # <|im_start|>role, newline, text, <|im_end|>. Nothing else changes: labels and samples.md follow the template,
    # and the processor is saved with the adapter, for inference. (A system prompt is the first turn of each row.)
    if kind == "MiniCPMVProcessor":
        # In 2.6 an image is a run of <unk>. Collator.label and mark_trained_tokens count them by this id.
        processor.image_token_id = processor.tokenizer.unk_token_id
    else:  # 2.6 gets the number of slices in each call
        processor.image_processor.max_slice_nums = settings.max_slice_nums
        processor.image_processor.downsample_mode = settings.downsample_mode
    return processor


def load_data(settings, training, collator):
    r"""-> (train, eval): rows that the collator accepts; eval is None if nothing is evaluated. Raises SystemExit.
    A row has the official format. `image` is a path or an embedded image, or several by placeholders, or missing:
        {"id": "0", "image": "cat.jpg", "conversations": [
            {"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A cat."}]}
        {"id": "1", "image": {"<image_00>": "a.png", "<image_01>": "b.png"}, "conversations": [...]}
    User and assistant alternate; a system turn may come first. Only users' turns have placeholders, each one once.
    With --enable_thinking the last answer may begin with <think>...</think>: that is trained, too."""
    train_rows = read_rows(settings.dataset_name, settings.dataset_train_split, settings)
    eval_rows = read_eval_rows(read_rows, settings, training)  # if None, prepare_rows holds out training rows
    return prepare_rows(train_rows, eval_rows, settings.dataset_name, collator, settings, training)


class Collator:
    """Rows -> a batch, padded on the right: input_ids, attention_mask, labels (B, L), and what the images are made of.
    labels are the input_ids of the answers, each with its <|im_end|>, and -100 elsewhere: on prompts, the empty think
    block before the last answer (4.6, 4.7), the newline after <|im_end|>, image tokens, padding. Raises BadRow."""

    def __init__(self, processor, settings, training):
        # Keep only what shapes a batch: all attributes are part of the key by which checked rows are cached.
        self.processor = processor
        self.folder = settings.image_folder or ""
        self.ignored = settings.ignore_columns or []
        self.max_aspect_ratio = 20
        self.max_length = settings.model_max_length
        self.max_slices = settings.max_slice_nums
        self.is_26 = type(processor).__name__ == "MiniCPMVProcessor"
        tokenizer = processor.tokenizer
        self.control_tokens = {*special_tokens(tokenizer), "<think>", "</think>"}
        self.turn_start, self.turn_end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        self.stop_ids = [self.turn_end, tokenizer.convert_tokens_to_ids("<|endoftext|>")]  # where generation ends
        # The header of an answer is "<|im_start|>assistant\n"; at inference 4.6 and 4.7 add "<think>\n\n</think>\n\n",
        # or "<think>\n" if they are to think.
        headers = ["<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"]
        self.plain_header, self.thinking_header = tokenizer(headers, add_special_tokens=False)["input_ids"]
        messages, self.enable_thinking = [question_turn("?", images=[])], False  # for the next two calls
        with fail_on_error(f"{settings.model_name_or_path}: its chat template cannot make a prompt"):
            question_ids = self.tokenize([messages])["input_ids"][0]
            prompt_ids = self.tokenize([messages], prompt=True)["input_ids"][0]
        self.inference_header = prompt_ids[len(question_ids) :].tolist()
        self.keeps_sizes = False  # see slices_by_size
        self.enable_thinking = settings.enable_thinking

    def __call__(self, rows):
        conversations = [self.messages_of(row) for row in rows]
        batch = self.tokenize(conversations)
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        for n, messages in enumerate(conversations):
            is_token = batch["attention_mask"][n].bool()
            ids = batch["input_ids"][n, is_token].tolist()
            batch["labels"][n, is_token] = torch.tensor(self.label(ids, messages))
        batch.update(where_trained(batch["labels"]))
        if self.keeps_sizes and "target_sizes" in batch:
            batch["target_sizes"] = batch["target_sizes"].numpy()  # tensors would go to the GPU
        if self.is_26:  # its forward() takes all other inputs in a dict
            others = {name: batch.pop(name) for name in ("attention_mask", "labels", "trained_at", "targets")}
            batch = {"data": dict(batch), **others}
        return batch

    def label(self, ids, messages):
        """Token ids of a conversation, without padding -> its labels, both lists. Raises BadRow.
        An answer begins after its header and ends with its <|im_end|>. The header of the last one must be that of
        inference. Earlier ones may also have the plain header: templates differ in this."""
        if messages[-1]["role"] != "assistant":
            raise BadRow(NO_ANSWER, "the last turn is not the assistant's")
        if len(ids) > self.max_length:
            found = f"{len(ids)} tokens, {ids.count(self.processor.image_token_id)} of them of images"
            remedy = "raise it, or lower --max_slice_nums" if self.max_slices > 1 else "raise it"
            raise BadRow("too long", f"{found}; --model_max_length is {self.max_length}: {remedy}")
        labels = [-100] * len(ids)
        starts = [n for n, token in enumerate(ids) if token == self.turn_start]
        starts = starts[-len(messages) :]  # the template of 2.6 adds a system turn in front
        for start, message in zip(starts, messages, strict=True):
            if message["role"] == "assistant":
                first = start + self.header_length(ids[start:], message, is_last=message is messages[-1])
                if self.turn_end not in ids[first:]:
                    raise BadRow("no end of the answer", "the chat template does not end it with <|im_end|>")
                end = ids.index(self.turn_end, first) + 1
                labels[first:end] = ids[first:end]
        return labels

    def header_length(self, ids, message, is_last):
        """Token ids from an answer's <|im_start|> on -> how many of them are its header. Raises BadRow."""
        headers = [self.inference_header] if is_last else [self.inference_header, self.plain_header]
        if message.get("reasoning_content"):
            headers = [self.thinking_header]
        for header in headers:
            if ids[: len(header)] == header:
                return len(header)
        begins, header = (self.processor.tokenizer.decode(some) for some in (ids[: len(headers[0]) + 3], headers[0]))
        detail = f"the answer begins {begins!r}, and must begin {header!r}; in a row start it differently"
        raise BadRow("prompt changed", detail)

    def tokenize(self, conversations, prompt=False):
        """Lists of messages -> the processor's batch. With `prompt` it ends where the model is to answer."""
        if self.is_26:
            return tokenize_26(self.processor, conversations, prompt, self.max_slices)
        options = {"add_generation_prompt": prompt, "enable_thinking": self.enable_thinking}
        texts = [self.processor.apply_chat_template(turns, **options) for turns in conversations]
        for text, messages in zip(texts, conversations, strict=True):
            require_texts(text, messages)
        images = [image for messages in conversations for image in pil_images(messages)] or None
        side = "left" if prompt else "right"
        return self.processor(text=texts, images=images, padding=True, padding_side=side, return_tensors="pt")

    def messages_of(self, row):
        """A row -> its messages in the chat template's form, with PIL images in them. Raises BadRow."""
        # Edit images here, to crop or augment them (for evaluation, too). Each needs room in --model_max_length: 64
        # tokens, and 64 more for each of its slices (with --downsample_mode 4x four times as many).
        return load_images(self.read(row), self.max_aspect_ratio)

    def read(self, row):
        """A row -> its messages, images as the row has them: paths, {"bytes": ...} or PIL images. Raises BadRow."""
        folder = row.get("folder") or self.folder
        messages = read_turns(the_one_of(row, TURNS), PLACEHOLDER, self.ignored)
        check_order(messages)
        images = images_by_placeholder(the_one_of(row, IMAGES, optional=True) or row.get("file_name"), folder)
        show_single_image(messages, images)  # as in the official code
        join_texts(messages, images_first=False, strip=True)  # the chat template of 4.6 and 4.7 strips turns, too
        place_images(messages, images, folder)
        take_thought(messages, self.enable_thinking)
        check_texts(messages, self.control_tokens)
        return messages


def learning_rates(settings, training):
    """{part of the model: its learning rate}. 0 means that the part is frozen."""
    rates = {"vision": 0.0, "projector": settings.projector_learning_rate, "language": 0.0}
    if settings.tune_vision:
        rates["vision"] = settings.vision_learning_rate
    if settings.use_lora or settings.tune_llm:
        rates["language"] = training.learning_rate
    return {part: training.learning_rate if rate is None else rate for part, rate in rates.items()}


def load_model(settings, training):
    """The base model in 16 bits (CPU: 32; q_lora: language model NF4), frozen but for parts trained without LoRA."""
    config = load_config(settings)
    parts, dtype = PARTS[config.model_type], weight_dtype(training)
    in_16_bits = ["lm_head", parts["vision"], parts["projector"]]
    load = load_26 if config.model_type == "minicpmv" else AutoModelForImageTextToText.from_pretrained
    model = load(
        settings.model_name_or_path,
        revision=settings.model_revision,
        dtype=dtype,
        device_map=place_of_weights(training),
        quantization_config=nf4_quantization(settings.q_lora, dtype, in_16_bits),
    )
    model.config.downsample_mode = settings.downsample_mode
    keep_4bit_trainable_on_cpu(model)
    model.requires_grad_(False)
    if not settings.use_lora:
        for part, rate in learning_rates(settings, training).items():
            model.get_submodule(parts[part]).requires_grad_(rate > 0)
        if settings.tune_llm:  # in 4.6 and 4.7 lm_head is not a module of the language model
            model.get_output_embeddings().requires_grad_(True)
        # By default weights are saved under the names that the hub's files have, and Trainer cannot load such a
        # checkpoint. So keep the class's own names, also in the final output_dir; from_pretrained reads both.
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    return model


# Edit the LoRA targets here, or give --lora_target_modules: names of layers of the language model, or one regex that
# matches full paths. A regex may match layers of the vision tower, too; training is then slower, because gradients go
# through the tower. A layer that is trained in full cannot be a target.
LORA_TARGETS = r"(in_proj_\w+|out_proj|[qkvo]_proj|gate_proj|up_proj|down_proj)"  # in_, out_proj: linear attention


def lora_config(settings):
    """LoRA on all linear layers of the language model, and what else is trained in full. None without use_lora."""
    if not settings.use_lora:
        return None
    config = load_config(settings)
    parts = PARTS[config.model_type]
    default_targets = rf"{re.escape(parts['language'])}\..*\.{LORA_TARGETS}"
    targets = lora_targets(settings.lora_target_modules, parts["language"], default_targets)
    if settings.lora_layers_to_transform:
        numbers = "|".join(str(number) for number in settings.lora_layers_to_transform)
        path_has_layer = rf"(?=.*\blayers\.({numbers})\.)"  # a lookahead. PEFT's own setting refuses a regex
        targets = rf"{path_has_layer}(?:{targets})"
    trained_in_full = [parts["vision"]] if settings.tune_vision else []
    if settings.projector_learning_rate != 0:
        trained_in_full.append(parts["projector"])
    trained_in_full += settings.lora_modules_to_save
    trains_embeddings = any("embed_tokens" in name or "lm_head" in name for name in trained_in_full)
    is_tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        bias=settings.lora_bias,
        target_modules=targets,
        modules_to_save=trained_in_full or None,
        ensure_weight_tying=trains_embeddings and is_tied,
        task_type=None if config.model_type == "minicpmv" else "CAUSAL_LM",  # the forward() of 2.6 takes a dict
    )


def add_adapter(model, settings, adapter):
    """The model with a new adapter or that of --lora_weight_path; as it is if adapter is None. Raises SystemExit."""
    if adapter is None:
        return model
    check_adapter(settings, adapter, model)
    if settings.lora_weight_path is None:
        with fail_on_error("the adapter"):
            return get_peft_model(model, adapter)
    with fail_on_error(f"--lora_weight_path {settings.lora_weight_path}"):
        model = PeftModel.from_pretrained(model, settings.lora_weight_path, is_trainable=True)
    require_same_adapter(settings.lora_weight_path, model.peft_config["default"], adapter)
    return model


class Trainer(transformers.Trainer):
    """A Trainer with a learning rate for each part. Trained weights are float32. It answers held-out rows."""

    def __init__(self, settings, parts, args, **kwargs):
        self.parts = parts
        self.learning_rates = learning_rates(settings, args)
        args.label_names = ["labels"]  # for compute_metrics of your own: the forward() of 2.6 does not name them
        super().__init__(args=args, compute_loss_func=mean_of_losses, **kwargs)
        for name, parameter in self.model.named_parameters():
            if self.rate_of(name) == 0:  # --lora_bias all makes biases of frozen parts trainable
                parameter.requires_grad = False
        train_in_float32(self)
        if not settings.use_lora and not settings.tune_llm:
            self.model.enable_input_require_grads()  # else backward() fails in a step of rows without images
        self.lm_head = self.model.get_output_embeddings()
        slices = slices_by_size(self.model, self.data_collator)  # in 2.6 it finds nothing to replace
        tower = [weight for name, weight in self.model.named_parameters() if is_inside(name, parts["vision"])]
        if not any(weight.requires_grad for weight in tower):
            self.add_callback(FrozenWithoutGraph(self.model, parts["vision"]))
        self.add_callback(slices)  # after FrozenWithoutGraph, which wraps one of its forwards and gives it back first
        self.add_callback(AnswerSamples(self, settings.sample_rows, settings.sample_tokens))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The trained tokens' losses, their sum divided by num_items_in_batch: how many the step has on all GPUs."""
        with losses_as_logits(self.lm_head, inputs) as inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            self.optimizer = optimizer_by_part(self, self.rate_of, logged_rate=self.learning_rates["language"])
        return self.optimizer

    def rate_of(self, name):
        """The rate of a weight's part. Adapters always use the language model's rate, even in the vision tower."""
        for part in ("vision", "projector"):
            if is_inside(name, self.parts[part]) and ".lora_" not in name:
                return self.learning_rates[part]
        return self.learning_rates["language"]

    # Your own metric: write evaluate() as below. To keep the checkpoint with the highest value, write
    # check_common_flags(..., metrics=("loss", "mine")) in check, and give --metric_for_best_model mine.
    # def evaluate(self, *args, **kwargs):
    #     metrics = super().evaluate(*args, **kwargs)
    #     answers = answer_rows(self, self.eval_dataset, max_new_tokens=64)  # answers[0].text answers the first row
    #     mine = {"eval_mine": my_score(answers, self.eval_dataset)}
    #     self.log(mine)
    #     return metrics | mine


def main(argv=None):
    """Parse, check, read the rows, show an example, load the model, train, save."""
    settings, training = parse(argv)
    check(settings, training)
    checkpoint = checkpoint_to_resume(training)
    transformers.set_seed(training.seed)
    config = load_config(settings)
    parts = PARTS[config.model_type]
    print_kernels(config, training.device)

    processor = load_processor(settings)
    patch, patch_of_model = processor.image_processor.patch_size, config.vision_config.patch_size
    require(patch == patch_of_model, f"the processor's patch_size is {patch}, that of config.json is {patch_of_model}")
    collator = Collator(processor, settings, training)
    check_with_dummy_row(collator, DUMMY_ROW, settings.model_name_or_path)
    train_dataset, eval_dataset = load_data(settings, training, collator)
    require_same_rows(training, checkpoint, train_dataset, eval_dataset)
    require_images(train_dataset, eval_dataset)
    batch = collator([train_dataset[0]])
    example = mark_trained_tokens(batch.get("data", {}) | batch, processor)  # in 2.6 its input_ids are in "data"
    say(f"\nOne row as the model sees it, trained tokens in «»:\n\n{example}\n")

    adapter = lora_config(settings)
    if not collator.is_26:  # before minutes of loading; the code of 2.6 cannot make a model without weights
        check_adapter(settings, adapter, empty_model(settings))
    with fail_on_error(f"cannot load the weights of {settings.model_name_or_path}"):
        model = load_model(settings, training)
    model = add_adapter(model, settings, adapter)
    trainer = Trainer(
        settings,
        parts,
        model=model,
        args=training,
        processing_class=processor,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    print_parameters(trainer.model, list(parts.values()))
    rates = ", ".join(f"{part} {rate:g}" for part, rate in trainer.learning_rates.items())
    say(f"learning rates (0: frozen): {rates}")
    train_and_save(trainer, checkpoint)


# ------------------------------------------ details: rows, checks, adapter; the functions in _26 are for MiniCPM-V 2.6


def do_without_torchvision():
    """If torchvision is missing, replace the video processor that needs it. Images need neither.
    Tried with Transformers 5.24. It can go when AutoProcessor loads these processors without torchvision."""
    if not transformers.utils.is_torchvision_available():
        transformers.processing_utils.transformers_module.VideoProcessorMixin = VideoProcessorMixin
        AutoVideoProcessor.register(transformers.MiniCPMV4_6Config, MiniCPMV4_6VideoProcessor, exist_ok=True)


def read_rows(name, split, settings):
    """The rows of a split; None if there is no test split to evaluate on. Raises SystemExit."""
    rows = read_dataset(name, split, settings)
    if rows is None:
        return None
    images = [*IMAGES, "file_name"]
    rows = check_columns(rows, [*TURNS, *images], images, name, settings)
    return keep_columns(rows, TURNS, images, name)


def images_by_placeholder(value, folder):
    """A row's images -> a list of them, or {placeholder: image} if they are named. Raises BadRow."""
    if not isinstance(value, dict) or value.keys() & set(IMAGE_KEYS):
        return as_image_list(value, folder)
    images = {}
    for placeholder, image in value.items():
        if is_missing(image):  # Arrow adds other rows' placeholders
            continue
        found = as_image_list(image, folder)
        if not re.fullmatch(PLACEHOLDER, placeholder) or len(found) != 1:
            wanted = 'it must be one image, or for several {"<image_00>": an image, ...}'
            raise BadRow("malformed image", f"{placeholder!r:.100} is {image!r:.100}; {wanted}")
        images[placeholder] = found[0]
    return images


def take_thought(messages, enable_thinking):
    """Move <think>...</think> from the beginning of the last answer to where the chat template takes it from. Raises
    BadRow without --enable_thinking, and for an earlier answer: the template leaves that out, at inference, too."""
    for message in messages:
        thought, closing, answer = text_of(message).partition("</think>")
        if message["role"] != "assistant" or not closing or not thought.lstrip().startswith("<think>"):
            continue
        message["content"] = [{"type": "text", "text": answer.strip()}]
        thought = thought.strip().removeprefix("<think>").strip()
        if thought and message is not messages[-1]:
            raise BadRow("thought in an earlier answer", "the template leaves it out; make a row that ends with it")
        if thought and not enable_thinking:
            raise BadRow("thought in an answer", f"{thought[:40]!r} would not be trained: give --enable_thinking")
        message["reasoning_content"] = thought


def load_config(settings):
    """The model's configuration. Raises SystemExit for a model that this recipe was not tested with."""
    name, revision = settings.model_name_or_path, settings.model_revision
    with fail_on_source("--model_name_or_path", name):
        values = transformers.PreTrainedConfig.get_config_dict(name, revision=revision)[0]  # runs no code of the model
        kind, version = values.get("model_type"), values.get("version")
        if kind not in PARTS or (kind == "minicpmv" and version != 2.6):
            found = f"is {kind} {version or ''}".rstrip() if kind else "has no config.json that names a model_type"
            fail(f"{name} {found}: this recipe was tested with MiniCPM-V 4.6, 4.7 and 2.6, and refuses other versions")
        if kind == "minicpmv":
            require(settings.downsample_mode == "16x", "--downsample_mode 4x: 2.6 does not know it; 4.6 and 4.7 do")
            require(not settings.enable_thinking, "--enable_thinking: 2.6 does not know it; 4.6 and 4.7 do")
            remedy = "read it, set --model_revision to what you read, and then give --trust_remote_code"
            require(settings.trust_remote_code, f"{name} brings code of its own that runs on this machine: {remedy}")
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=settings.trust_remote_code)


def check_adapter(settings, adapter, model):
    """Stop if flags of the adapter name modules that are missing or stay frozen. Raises SystemExit."""
    parts = PARTS[model.config.model_type]
    is_frozen = {"vision": not settings.tune_vision, "projector": settings.projector_learning_rate == 0}
    frozen = [parts[part] for part in is_frozen if is_frozen[part]]
    trainable = [name for name, _ in model.named_modules() if not any(is_inside(name, part) for part in frozen)]
    for wanted in settings.lora_modules_to_save:
        is_found = any(f".{name}".endswith(f".{wanted}") for name in trainable)
        require(is_found, f"--lora_modules_to_save {wanted}: no such module outside of the frozen parts {frozen}")
    trained_in_full = (adapter.modules_to_save if adapter else None) or []
    untrainable = dict.fromkeys(trained_in_full, "which is trained in full, without an adapter")
    check_lora_targets(settings, adapter, model, untrainable)


def require_same_adapter(path, saved, wanted):
    """Stop if the LoraConfig of a saved adapter differs from what the flags say. Raises SystemExit."""
    remedy = "give the flags that it was trained with"
    for name in ("r", "lora_alpha", "lora_dropout", "bias", "target_modules"):
        old, new = getattr(saved, name), getattr(wanted, name)
        require(old == new, f"--lora_weight_path {path} has {name} {old}, not {new}: {remedy}")
    saved_in_full, wanted_in_full = set(saved.modules_to_save or []), set(wanted.modules_to_save or [])
    if saved.ensure_weight_tying:  # PEFT added the other name of the tied matrix (embed_tokens or lm_head)
        added = saved_in_full - wanted_in_full
        saved_in_full -= {name for name in added if name.endswith(("embed_tokens", "lm_head"))}
    difference = f"has modules_to_save {sorted(saved_in_full)}, not {sorted(wanted_in_full)}"
    require(saved_in_full == wanted_in_full, f"--lora_weight_path {path} {difference}: {remedy}")


def tokenize_26(processor, conversations, prompt, max_slices):
    """Lists of messages -> a batch. A prompt is padded on the left, as the generate() of repaired_26 takes it."""
    rows = []
    for messages in conversations:
        turns = []
        for message in messages:  # joined as by the model's own chat()
            texts = [part.get("text", "(<image>./</image>)") for part in message["content"]]
            turns.append({"role": message["role"], "content": "\n".join(texts)})
        text = processor.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        require_texts(text, messages)
        # Row by row: its processor pads several rows, and takes every token 0, which is "!", for padding.
        rows.append(processor([text], [pil_images(messages)], max_slice_nums=max_slices, use_image_id=True))
    ids = {"input_ids": [row["input_ids"][0].tolist() for row in rows]}
    batch = processor.tokenizer.pad(ids, padding_side="left" if prompt else "right", return_tensors="pt")
    padding = batch["attention_mask"].argmax(dim=1).tolist()  # on the left
    batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    batch["pixel_values"] = [row["pixel_values"][0] for row in rows]
    batch["tgt_sizes"] = [row["tgt_sizes"][0] for row in rows]
    batch["image_bound"] = [row["image_bound"][0] + shift for row, shift in zip(rows, padding, strict=True)]
    return transformers.BatchFeature(dict(batch))


def load_26(name, revision, **kwargs):
    """MiniCPM-V 2.6 by its own code, written for Transformers 4. kwargs are those of from_pretrained. Each repair was
    tried with Transformers 5.24 and torch 2.13, and can go when the hub's code does itself what the repair does."""
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=True)
    with contextlib.ExitStack() as stack:  # only while the code is imported
        try:
            import torchvision  # noqa: F401
        except ImportError:  # the code imports it and never uses it, so an empty module will do
            sys.modules["torchvision"] = ModuleType("torchvision")
            stack.callback(sys.modules.pop, "torchvision")
        # The code takes List from torch.nn.functional, which no longer has it.
        stack.enter_context(patch.object(torch.nn.functional, "List", list, create=True))
        hub_class = get_class_from_dynamic_module(config.auto_map["AutoModel"], name, revision=revision)
    repaired = repaired_26(hub_class, AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=True))
    repaired.register_for_auto_class("AutoModel")
    model = repaired.from_pretrained(name, revision=revision, config=config, **kwargs)
    # The resampler's position table is not in the checkpoint; from_pretrained leaves it uninitialised.
    model.resampler._set_2d_pos_cache(model.resampler.max_size, model.resampler.query.device)
    return model


def repaired_26(hub_class, tokenizer):
    """A subclass of the hub's class that loads, trains with checkpointing, and generates as other models do."""

    class MiniCPMV(hub_class):
        __module__ = hub_class.__module__  # so that save_pretrained finds the code, and saves it with the weights

        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            if not hasattr(self, "all_tied_weights_keys"):
                self.post_init()  # the code never calls it, and from_pretrained needs what it sets

        def get_decoder(self):
            """The language model without its head."""
            return self.llm.model

        def enable_input_require_grads(self):
            """Nothing: images are written into the embeddings in place, which a leaf with a gradient forbids."""

        def generate(self, input_ids, position_ids=None, eos_token_id=None, max_length=None, use_cache=True, **kwargs):
            """Prompt and answer. (The code's own gives the answer, padded with token 0, which is "!".)"""
            if "tokenizer" in kwargs:  # its own chat() asks, and wants its own
                return super().generate(input_ids=input_ids, use_cache=use_cache, **kwargs)
            answers = super().generate(input_ids=input_ids, tokenizer=tokenizer, use_cache=use_cache, **kwargs).clone()
            stop_ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
            is_stop = torch.isin(answers, torch.tensor(stop_ids, device=answers.device)).long()
            is_padding = is_stop.cumsum(dim=1) > is_stop
            return torch.cat([input_ids, answers.masked_fill(is_padding, stop_ids[1])], dim=1)

    return MiniCPMV


# ----------------------------------------------------------------------------- optional, for speed: slices of one size


def slices_by_size(model, collator):
    """Optional, for speed, 4.6 and 4.7: vision tower and projector take all slices of one size in one batch, until the
    callback that this returns ends it. The library takes slice after slice, and in the tower window after window, and
    for each waits for the GPU. The result is the same; to turn this off, delete the line that adds the callback."""
    replaced = ReplacedForwards()
    for module in model.modules():  # of a part that is trained in full PEFT keeps two
        if type(module).__name__ in ("MiniCPMV4_6VisionModel", "MiniCPMV4_7VisionModel"):
            replaced.replace(module, functools.partial(encode_slices, module))
        if type(module).__name__ in ("MiniCPMV4_6Merger", "MiniCPMV4_7Merger"):
            replaced.replace(module, functools.partial(project_slices, module.forward))
    if not collator.is_26:  # which has none of these modules
        replaced.replaced.enter_context(patch.object(collator, "keeps_sizes", True))
    return replaced


def encode_slices(tower, pixel_values, target_sizes, use_vit_merger=True):
    """The vision tower's forward. pixel_values: (1, 3, P, P x patches), the patches (P x P pixels) of all slices.
    target_sizes: (slices, 2), their height and width in patches. last_hidden_state: (1, patches, D), with
    use_vit_merger (16x) a quarter of the patches: it merges windows of 2 x 2 after one of the layers."""

    def encode(pixels, height, width):  # (N, 3, P, P x patches) -> (N, patches, D)
        size, side = torch.tensor([[height, width]]), tower.embeddings.num_patches_per_side
        positions = get_vision_nearest_position_ids(size, side).to(pixels.device, non_blocking=True)
        hidden = tower.embeddings(pixels, position_ids=positions)
        for number, layer in enumerate(tower.encoder.layers):
            hidden = layer(hidden, None, cu_seqlens=torch.tensor([0, hidden.shape[1]]), max_seqlen=None)
            if use_vit_merger and number == tower.config.insert_layer_id:
                hidden = merge_windows(tower.vit_merger, hidden, height, width)
        return tower.post_layernorm(hidden)

    sizes = target_sizes.tolist()
    widths = [height * width * tower.config.patch_size for height, width in sizes]
    features = for_each_size(encode, pixel_values[0].split(widths, dim=-1), sizes)
    return BaseModelOutputWithPooling(last_hidden_state=torch.cat(features)[None])


def merge_windows(merger, hidden, height, width):
    """The forward of the tower's vit_merger: (N, patches, D) -> (N, patches / 4, D)."""
    windows = hidden.unflatten(1, (height // 2, 2, width // 2, 2)).transpose(2, 3).flatten(0, 2).flatten(1, 2)
    attended, _ = merger.self_attn(merger.layer_norm1(windows), cu_seqlens=torch.tensor([0, 4]), max_seqlen=None)
    windows = windows + attended  # (all windows, 4, D)
    features = merger.linear_1(merger.pre_norm(windows.flatten(1)))
    merged = merger.linear_2(merger.act(features)) + windows.mean(dim=1)
    return merged.unflatten(0, (len(hidden), -1))


def project_slices(forward, hidden_states, target_sizes):
    """The projector's forward: hidden_states (1, patches, D) -> for each slice (tokens, width of the language model).
    It is given slices of one size as one high slice: no window of 2 x 2 patches is in two of them."""

    def project(slices, height, width):
        return forward(slices.flatten(0, 1)[None], [(len(slices) * height, width)])[0].chunk(len(slices))

    sizes = target_sizes.tolist()
    return for_each_size(project, hidden_states[0].split([height * width for height, width in sizes]), sizes)


def for_each_size(function, slices, sizes):
    """function(slices of one size in one batch, height, width) for each size -> its results in the slices' order."""
    numbers_of_size = defaultdict(list)
    for number, size in enumerate(sizes):
        numbers_of_size[tuple(size)].append(number)
    results = {}
    for (height, width), numbers in numbers_of_size.items():
        batch = torch.stack([slices[number] for number in numbers])
        results.update(zip(numbers, function(batch, height, width), strict=True))
    return [results[number] for number in range(len(slices))]


# =====================================================================================================================
# The workbench: the same in every recipe. Which tokens and which weights are trained is decided above this line.
# Its last sections (only checks, only for resuming, only for speed) can go, with the lines that call them: in
# SafeTrainer, train_and_save and fail_on_trouble, and above this line.
# In a copy of your own edit anything; in this repository edit workbench/workbench.py, then `make sync`.
# =====================================================================================================================

# -------------------------------------------------------------------------------------------------- flags and messages
# Inherited flags that no recipe uses: they would be ignored, or break what a recipe promises.
REFUSED_EVERYWHERE = """save_only_model remove_unused_columns gradient_checkpointing gradient_checkpointing_kwargs
deepspeed fsdp do_train do_eval do_predict dataloader_drop_last""".split()
OTHER_NAMES = {  # a setting here: its names in other scripts
    "model_name_or_path": "model model_id model_name model_path base_model pretrained_model_name_or_path",
    "load_in_4bit": "bits load_4bit quantization_bit use_4bit q_lora",
    "q_lora": "bits load_4bit quantization_bit use_4bit load_in_4bit",
    "dataset_name": "dataset data data_path data_files train_file train_data",
    "max_length": "max_seq_length max_seq_len cutoff_len model_max_length",
    "model_max_length": "max_seq_length max_seq_len cutoff_len max_length",
    "lora_r": "lora_rank rank",
    "num_train_epochs": "epochs num_epochs",
    "per_device_train_batch_size": "batch_size train_batch_size micro_batch_size",
    "activation_checkpointing": "gradient_checkpointing",
    "learning_rate": "lr",
    "warmup_steps": "warmup_ratio",
    "eval_strategy": "evaluation_strategy",
    "bf16": "torch_dtype dtype",
    "config_file of accelerate launch": "deepspeed fsdp",
}


def fail(message):
    """End the program (SystemExit) with exit status 1 and one message, which only the first process prints."""
    sys.exit(f"error: {message}" if os.environ.get("RANK", "0") == "0" else 1)


def require(condition, message):
    """End the program with this message unless the condition holds."""
    if not condition:
        fail(message)


def say(*texts):
    """Print, in the first of several processes only."""
    PartialState().print(*texts)


@contextlib.contextmanager
def fail_on_error(message):
    """End the program with this message, and the cause, if the `with` block raises an error."""
    try:
        yield
    except Exception as error:  # readers of damaged files raise many kinds of exceptions
        cause = " ".join(str(error).split())[:600]
        if not isinstance(error, (OSError, ValueError)):  # perhaps a mistake in the code: say where
            place = traceback.extract_tb(error.__traceback__)[-1]
            cause = f"{type(error).__name__}: {cause} ({place.filename}, line {place.lineno})"
        if isinstance(error, pickle.UnpicklingError):  # torch's own text advises to run what is in it
            cause = "its weights are a pickle that is damaged, or that holds code: it was not run"
        sys.exit(f"error: {message}: {cause}")  # not fail(): perhaps only this process has the problem


@contextlib.contextmanager
def fail_on_source(flag, name, needed=""):
    """fail_on_error for a `with` block that loads a model from a folder or from the hub."""
    require_place(f"{flag} {name}", name)
    where = "" if os.path.exists(name) else " (no such folder here, so it was taken for a hub id)"
    # Without a timeout of 0, Transformers would ask on the keyboard whether to run code that a model brings.
    no_question = patch("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 0)
    with no_question, fail_on_error(f"{flag} {name}{where}{needed}"):
        try:
            yield
        except (ImportError, OSError, ValueError) as error:
            if "trust_remote_code" in str(error):  # its text would advise to run that code
                raise ValueError("it brings code of its own, which this recipe does not run") from error
            if not re.search("torchvision|num2words", str(error), re.IGNORECASE):
                raise
            packages = "pip install torchvision==0.28.0 num2words==0.5.14"  # the torchvision of torch 2.13.0
            cause = str(error).strip().split(". ")[0]
            fail(f"{flag} {name} needs packages that are not installed: {packages} ({cause})")


def require_place(flag, name):
    """End the program if a name is neither a file or folder nor of the form of a hub id, owner/name."""
    is_place = os.path.exists(name) or re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)
    require(is_place, f"{flag}: there is no such file or folder, and it is no hub id (owner/name)")


def parse_arguments(parser, refused, argv=None):
    """Flags, and the YAML file of --config, as (settings, training). A flag wins over the file. Raises SystemExit.
    refused: inherited flags that this recipe does not use, besides REFUSED_EVERYWHERE.
    training.as_given: all values as they were before __post_init__ changed any, for settings.yaml.
    training.typed: the names of those on the command line; second_names: {a flag's other name: its name}."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else forked loader processes cause warnings
    refused = REFUSED_EVERYWHERE + refused
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print_help(parser, refused)
        sys.exit(0)
    parser.error = fail
    parser.add_argument("--config", help="YAML file of any of these flags.")
    parser.add_argument("--help_all", action="help", help="Show all of these flags, not only the recipe's own.")
    second_names = {}
    for field in fields(parser.dataclass_types[0]):
        second_names |= dict.fromkeys(field.metadata.get("aliases", ()), field.name)
    typed = typed_settings(argv, second_names)
    config_file = parser.parse_known_args(argv)[0].config
    if config_file:
        argv = flags_from_yaml(config_file, parser) + argv
    try:
        namespace, unknown = parser.parse_known_args(argv)
        as_given = vars(namespace)  # no dataclass is made yet, so no __post_init__ is called
        del as_given["config"]
        if unknown:
            flags = [word for word in unknown if word.startswith("-")] or unknown
            fail(", ".join(f"{flag}: unknown{other_names(flag, as_given)}" for flag in flags))
        for field in fields(parser.dataclass_types[1]):
            if field.name in refused and as_given[field.name] != field.default:
                fail(f"--{field.name}: not used by this recipe{other_names(field.name, as_given)}")
        settings, training = parser.parse_dict(as_given)
    except (OSError, ValueError, TypeError, OverflowError) as error:
        fail(error)
    not_stored = ("hub_token", "resume_from_checkpoint")  # --config settings.yaml is to resume from the newest one
    training.as_given = {name: value for name, value in as_given.items() if name not in not_stored}
    for name in BATCH_SIZES:  # a number is stored as one
        if str(as_given[name]).isdigit():
            training.as_given[name] = int(as_given[name])
    training.typed, training.second_names = typed, second_names
    return settings, training


def typed_settings(argv, second_names):
    """The names of the settings in argv. Raises SystemExit if one is given under two names with different values."""
    values = defaultdict(dict)
    for word, following in itertools.zip_longest(argv, argv[1:]):
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            name = second_names.get(flag, flag).lstrip("-").replace("-", "_")
            values[name][flag] = value or following
    for flags in values.values():
        require(len(set(flags.values())) == 1, f"{' and '.join(flags)} are one setting: give it one value")
    return set(values)


def other_names(flag, known):
    """What to add to a message about a flag: its name here, or the names here that are most like it."""
    name = flag.lstrip("-").partition("=")[0].replace("-", "_")
    same = [here for here, elsewhere in OTHER_NAMES.items() if name in elsewhere.split()]
    same = [here for here in same if here in known or " " in here]
    if same:
        return f"; its name here is --{same[0]}"
    return did_you_mean(name, known, "--") or "; --help shows what there is"


def did_you_mean(name, known, prefix=""):
    """What to add to a message about a name: the known ones that are most like it."""
    alike = difflib.get_close_matches(name, known, cutoff=0.7)
    return f"; did you mean {' or '.join(f'{prefix}{here}' for here in alike)}?" if alike else ""


def print_help(parser, refused):
    """Print the commands of the docstring, and the recipe's own settings: under the comments that group them."""
    lines = __doc__.splitlines()
    commands = [line for line in lines if line.strip().startswith(("python ", "accelerate "))]
    groups = {}
    for dataclass_type in parser.dataclass_types:
        own = {field.name: field for field in fields(dataclass_type) if field.name in dataclass_type.__annotations__}
        for line in inspect.getsource(dataclass_type).splitlines():
            name = line.strip().partition(":")[0]
            if line.startswith("    # "):
                group = groups.setdefault(line[6:], [])
            elif name in own and name not in refused:
                default = parser.get_default(name)
                text = "" if default is None else json.dumps(default, ensure_ascii=False).strip('"')
                group.append(f"{f'  --{name} {text}':40} {own[name].metadata['help']}")
    print(lines[0], *commands, sep="\n")
    for group, settings in groups.items():
        print(f"\n{group}", *settings, sep="\n")
    print("\n--config FILE reads settings from a YAML file. --help_all also shows those inherited from the trainer.")


def flags_from_yaml(file, parser):
    """A YAML file of settings -> a list of flags, so that argparse checks types and choices, unlike TrlParser."""
    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        fail(f"--config {file} cannot be read: {error}")
    require(isinstance(config, dict), f"--config {file} must hold lines of 'name: value'")
    types = get_type_hints(parser.dataclass_types[0]) | get_type_hints(parser.dataclass_types[1])
    flags = []
    for name, value in config.items():
        if value is None:
            can_be_none = type(None) in get_args(types.get(name)) or parser.get_default(name) is None
            require(can_be_none, f"--config {file}: {name} must have a value")
        if value is None or value == []:
            parser.set_defaults(**{name: value})  # no flag can say this
        else:
            flags.append(f"--{name}")
            for item in value if isinstance(value, list) else [value]:
                flags.append(json.dumps(item) if isinstance(item, dict) else str(item))
    return flags


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


BATCH_SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size")


def pick_batch(training, batch, accumulation, eval_batch):
    """Batch sizes as given -> numbers. Raises ValueError.
    auto becomes the default given here, auto:4 becomes 4, which was chosen when the run began. Both stand in
    training.auto_batch: fill_card is to look what fits. A step has --rows_per_step rows, or else batch x accumulation
    in each process. Where it is not given, gradient_accumulation_steps is those rows / (batch x processes)."""
    if training.accelerator_config is None:
        training.accelerator_config = {"non_blocking": True}  # batches are copied to the GPU while it works
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    training.auto_batch = set()
    for name, default in zip(BATCH_SIZES, (batch, eval_batch), strict=True):
        found = re.fullmatch(r"(\d+)|auto(?::(\d+))?", str(getattr(training, name)))
        if found is None:
            raise ValueError(f"--{name} {getattr(training, name)}: it must be a number, or auto")
        number, chosen = found.groups()
        setattr(training, name, int(number or chosen or default))
        # If the accumulation is given, so is what runs at once: the default.
        is_fixed = number or (name == BATCH_SIZES[0] and training.gradient_accumulation_steps is not None)
        if not is_fixed:
            training.auto_batch.add(name)
    rows, at_once = training.rows_per_step, training.per_device_train_batch_size
    if BATCH_SIZES[0] in training.auto_batch:
        rows = batch * accumulation * processes if rows is None else rows
        at_once = math.gcd(at_once, rows // processes)  # a divisor of a process's rows
        training.per_device_train_batch_size = at_once
    if rows is None:
        training.gradient_accumulation_steps = training.gradient_accumulation_steps or accumulation
        return
    steps, rest = divmod(rows, max(1, at_once * processes))
    if rest or steps < 1 or training.gradient_accumulation_steps not in (None, steps):
        here = f"{at_once} at once in each of {processes} processes"
        raise ValueError(f"--rows_per_step {rows}: {here} and --gradient_accumulation_steps do not make so many")
    training.gradient_accumulation_steps = steps


# -------------------------------------------------------------------------------------------------------------- images


class BadRow(ValueError):
    """A row that cannot be trained on. Rows are counted by `reason`; `detail` says what is wrong and how to fix it."""

    def __init__(self, reason, detail=""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def is_missing(value):
    """Whether a cell holds nothing: null, NaN, an empty text, or a list or dict of such."""
    if isinstance(value, str):
        return not value
    if isinstance(value, dict):
        return all(is_missing(item) for item in value.values())
    if isinstance(value, list):
        return all(is_missing(item) for item in value)
    return value is None or (isinstance(value, float) and math.isnan(value))


IMAGE_KEYS = ("bytes", "path", "url", "base64", "image", "image_url", "file_name")  # of an image written as a dict
NO_VALUE = ("nan", "NaN", "None", "<NA>")  # how pandas writes missing values as text


def as_image_list(value, folder):
    """An image or a list of images -> list of paths (relative ones: in `folder`), {"bytes": ...} or PIL images.
    Missing ones are left out. Raises BadRow for a web address, and for what is no image."""
    images = []
    for image in value if isinstance(value, list) else [value]:
        path = image.get("path") if isinstance(image, dict) else None
        while isinstance(image, dict) and not is_missing(image):
            keys = [key for key in IMAGE_KEYS if not is_missing(image.get(key))]
            if not keys or (len(keys) > 1 and keys != ["bytes", "path"]):
                raise BadRow("malformed image", f"{image!r:.100} must have one of {', '.join(IMAGE_KEYS)}")
            image = image[keys[0]]
        if is_missing(image) or image in NO_VALUE:
            continue
        if isinstance(image, str):
            image = image_from_text(image, folder)
        if isinstance(image, bytes):
            image = {"bytes": image, "path": path}
        if not isinstance(image, (str, dict, Image.Image)):
            raise BadRow("malformed image", f"{image!r:.100} must be a path, bytes, base64 or a PIL image")
        images.append(image)
    return images


# How PNG, JPEG, GIF, WebP, BMP and TIFF begin in base64.
BASE64_IMAGE = re.compile(r"\s*(iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk|SUkq|TU0A)[A-Za-z0-9+/\s]{40,}={0,2}\s*")


def image_from_text(text, folder):
    """A path (a relative one: in `folder`), a file:// or data: address, or base64 -> a path or the image's bytes.
    Raises BadRow."""
    scheme, _, rest = text.partition(":")
    if scheme == "data" or BASE64_IMAGE.fullmatch(text):
        try:
            return base64.b64decode(rest.partition(";base64,")[2] if scheme == "data" else text)
        except ValueError as error:
            raise BadRow("unreadable image", f"{text:.60}... is no base64") from error
    if rest.startswith("//") and scheme != "file":
        raise BadRow("web address", f"{text:.300}: images are not downloaded during training; save it to a file first")
    return os.path.join(folder, unquote(urlparse(text).path) if scheme == "file" else text)


def image_key(image):
    """The same text for the same image: its real path or, for an embedded one, a hash of its bytes."""
    if isinstance(image, dict):
        return hashlib.sha256(image["bytes"]).hexdigest()
    if not isinstance(image, str):
        return repr(image)
    path = os.path.join(real_path(os.path.dirname(image)), os.path.basename(image))
    return os.path.realpath(path) if os.path.islink(path) else path


real_path = functools.cache(os.path.realpath)  # of folders: it looks at each folder above


def load_image(image, max_aspect_ratio=200, only_size=False):
    """A path, {"bytes": ...} or a PIL image -> PIL RGB, upright. Raises BadRow if that is not possible.
    only_size: -> its size, (width, height), upright. Only its header is read, so damaged pixels are not found."""
    source = (image.get("path") or "its bytes") if isinstance(image, dict) else str(image)
    if len(source) > 100 and not re.search(r"\.\w{2,5}$", source):  # an image written as text, of no known kind
        source = f"{source:.60}..."
    is_opened_here = not isinstance(image, Image.Image)
    try:
        if isinstance(image, dict):
            image = Image.open(io.BytesIO(image["bytes"]))
        elif not isinstance(image, Image.Image):
            image = Image.open(image)
        num_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a phone's photo and preview
        width, height = image.size
        if only_size:
            exif = Image.Image.getexif(image)  # PNG's own would decode the pixels
            if exif.get(ExifTags.Base.Orientation, 1) >= 5 and image.format != "TIFF":  # whose size is turned already
                width, height = height, width
            if is_opened_here:
                image.close()
        else:
            image.load()  # verify() would accept a truncated JPEG
            image = to_rgb(image)
            width, height = image.size
    except Image.DecompressionBombError as error:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        raise BadRow("image too large", f"{source} has more than {limit:,} pixels: shrink it") from error
    except Exception as error:  # decoders raise all kinds of exceptions
        cause = getattr(error, "strerror", None) or error
        raise BadRow("unreadable image", f"{source} ({cause}); repair it, or see --image_folder") from error

    if num_frames > 1:
        detail = f"{source} is animated or has pages, {num_frames} of them; give each that matters its own file"
        raise BadRow("several frames", detail)
    if max(width, height) > max_aspect_ratio * min(width, height):
        detail = f"{source} has {width} x {height} pixels; above 1 : {max_aspect_ratio} little can be seen: crop it"
        raise BadRow("image too narrow", detail)
    return (width, height) if only_size else image


def to_rgb(image):
    """A PIL image of any mode -> RGB, upright, on white. Raises ValueError if one of 16 or 32 bits has one value only.
    Grays of 16 and 32 bits are scaled: the brightest becomes white, and black is 0, or the least value if below 0."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;"):  # of 16 bits in some byte order: PIL does not know the extrema of all of them
        image = image.convert("I")
    if image.mode in ("I", "F"):  # PIL's own conversion would clip them to white
        darkest, brightest = image.getextrema()
        black = min(darkest, 0)
        if not (brightest > black and math.isfinite(brightest - black)):
            raise ValueError(f"its values are from {darkest} to {brightest}")
        white = brightest
        if black == 0:  # a dark picture of 8 bits stays dark
            white = 1 if image.mode == "F" and brightest <= 1 else max(255, brightest)
        scale = 255 / (white - black)
        offset = -black * scale
        image = image.convert("F").point(lambda value: value * scale + offset).convert("L")  # PIL takes no other form
    if image.has_transparency_data:  # dropping alpha would turn black ink on nothing into black on black
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


# ---------------------------------------------------------------------------------------------------------------- rows
# Splits to evaluate on where none is named: the first that there is.
EVALUATION_SPLITS = ("test", "validation", "val", "eval")
EVALUATION_DATA = "the evaluation data"
HELD_OUT_ROWS = "the rows held out"
NO_ANSWER = "no answer"  # the reason of BadRow for a row with a question only


# --check_rows auto: all rows are decoded before training, if that takes at most MOST_SECONDS, judged by the first
# ROWS_TO_TIME. Else ROWS_OF_A_SAMPLE are, drawn by seed, and the LARGEST_ROWS longest, and as many with most images.
MOST_SECONDS = 120
ROWS_TO_TIME = 200
ROWS_OF_A_SAMPLE = 2000
LARGEST_ROWS = 100


def prepare_rows(train_rows, eval_rows, name, collator, settings, training):
    """(train, eval): the rows that the collator accepts. Without eval_rows some of train are held out; but if there
    is nothing to evaluate (--eval_strategy no, --eval_fraction 0), eval is None, and evaluation is turned off."""
    if eval_rows is not None:  # drawn before they are checked: no need to decode images that are never scored
        eval_rows = draw_rows(eval_rows, settings.max_eval_rows, training.seed)
        eval_rows = check_and_measure_rows(eval_rows, EVALUATION_DATA, collator, settings, training)
    train_rows = check_and_measure_rows(train_rows, name, collator, settings, training)
    if eval_rows is not None:
        return train_rows, eval_rows
    if training.eval_strategy != "no" and settings.eval_fraction > 0:
        train_rows, eval_rows = hold_out(train_rows, settings, training)
        if getattr(training, "has_unread_rows", False):
            eval_rows = eval_rows.remove_columns(["length", "num_tokens", "image_keys"])
            eval_rows = check_and_measure_rows(eval_rows, HELD_OUT_ROWS, collator, settings, training)
        return train_rows, eval_rows
    if training.load_best_model_at_end:
        say("nothing is evaluated, so the last weights will be the result")
    training.eval_strategy, training.load_best_model_at_end = "no", False
    return train_rows, None


def check_and_measure_rows(rows, name, collator, settings, training):
    """The rows that the collator accepts, with new columns: `image_keys`, for hold_out; `length`, the tokens of a row
    (of a pair of answers: of the prompt and the longer one); `num_tokens` (of a pair: of the prompt and both answers).
    The others are left out, or the program lists them and ends (--on_bad_rows, --on_long_rows). None for a test split
    without any answers.
    If there are too many training rows to decode all of them now (--check_rows), the structure of all is checked, and
    a sample is decoded; lengths are then upper bounds. SafeTrainer sees to the rows that turn out to be unreadable."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process would wait forever for OpenMP's threads, which only its parent has
    wanted, bound, first = len(rows), None, {}
    if name not in (EVALUATION_DATA, HELD_OUT_ROWS):
        wanted, bound, first = rows_to_decode(rows, name, collator, training)
    with training.main_process_first(desc=f"checking {name}"):
        results = stored_results(rows, collator, bound, f"Checking {name}", training)
        problems = problems_of(results) | first
        if bound is not None:
            problems |= check_sample(rows, results, problems, wanted, collator, training)
    torch.set_num_threads(num_threads)

    if name == EVALUATION_DATA and is_blind(problems, rows, settings):
        return None
    report_problems(rows, problems, name, settings)
    for note, count in Counter(itertools.chain.from_iterable(results["notes"][:])).items():
        say(f"{name}: {count} rows with {note}")
    if any(results["differs"][:]):
        read_differently(training, "Unicode, white space or parts of texts")
    measures = results.select_columns(["length", "num_tokens", "image_keys"])
    rows = datasets.concatenate_datasets([rows, measures], axis=1)
    return rows.select(np.delete(np.arange(len(rows)), list(problems)))  # an array: a list takes `datasets` seconds


def rows_to_decode(rows, name, collator, training):
    """What --check_rows asks for, or what auto chooses by the time of the first rows. -> (how many rows to decode
    before training; if that is not all of them, a LengthBound for the others, and {index: (reason, detail)} of the bad
    ones among the first). The choice goes into settings.yaml: a resumed run must leave out the same rows."""
    wanted = training.as_given["check_rows"].removeprefix("auto:")
    if wanted == "all" or len(rows) <= ROWS_OF_A_SAMPLE or (wanted.isdigit() and int(wanted) >= len(rows)):
        return len(rows), None, {}
    seconds, first = 0, []  # that decoding all rows takes (0: it was done before); results of the first rows
    if training.process_index == 0 and (wanted != "auto" or known_results(result_folder(rows, collator)) is None):
        start = time.perf_counter()
        first = [check_row(rows[n], collator) for n in range(ROWS_TO_TIME)]
        seconds = (time.perf_counter() - start) / ROWS_TO_TIME * len(rows) / num_checkers(training)
    seconds, first = broadcast_object_list([seconds, first])
    if wanted == "auto":
        wanted = "all" if seconds <= MOST_SECONDS else str(ROWS_OF_A_SAMPLE)
        training.as_given["check_rows"] = f"auto:{wanted}"
    if wanted == "all":
        return len(rows), None, {}
    training.has_unread_rows = True
    say(
        f"{name}: {wanted} of {len(rows)} rows are decoded before training, the others during it, with no more than "
        f"their structure checked now. (--check_rows all would take {seconds / 60:.0f} minutes here.)"
    )
    problems = {n: (result["reason"], result["detail"]) for n, result in enumerate(first) if result["reason"]}
    good = [n for n in range(len(first)) if n not in problems]
    bound = LengthBound(rows, collator)
    bound.fit(rows.select(good), [first[n]["length"] for n in good])
    return int(wanted), bound, problems


def num_checkers(training):
    """How many processes check rows."""
    return getattr(training, "dataset_num_proc", None) or num_cores()


def num_cores():
    """How many cores this process may use: under Slurm and in containers often not all that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


RESULT_COLUMNS = datasets.Features(
    reason=datasets.Value("string"),
    detail=datasets.Value("string"),
    length=datasets.Value("int64"),
    num_tokens=datasets.Value("int64"),
    image_keys=datasets.List(datasets.Value("string")),
    image_times=datasets.List(datasets.Value("int64")),
    notes=datasets.List(datasets.Value("string")),
    differs=datasets.Value("bool"),
)


def sha256_of(file):
    """The SHA-256 of a file, as 64 hex digits."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def result_folder(rows, collator, bound=None):
    """Where the results of a check of these rows are kept: another one for other rows, settings, or code."""
    added = None if bound is None else (bound.for_a_row, bound.for_a_turn)
    code = sha256_of(__file__)  # the Hasher gives functions of a script another hash at each start
    folders = sorted(map(os.path.realpath, rows.unique("folder")))  # a link may point elsewhere now
    return cache_folder("checked") / Hasher.hash([code, vars(collator), added, folders, rows._fingerprint])


def stored_results(rows, collator, bound, description, training):
    """What check_row returns for each row. As a Dataset, which is kept on the disk until rows or images change."""
    folder = result_folder(rows, collator, bound)
    known = known_results(folder)
    if known is not None:
        return known
    results = rows.map(
        check_batch,
        batched=True,
        batch_size=100,  # embedded images may be large
        fn_kwargs={"collator": collator, "bound": bound},
        features=RESULT_COLUMNS,
        remove_columns=rows.column_names,
        num_proc=num_checkers(training) if len(rows) > 1000 else None,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=folder.name,
        desc=description,
    )
    store_results(results, folder)
    return datasets.load_from_disk(folder)


def store_results(results, folder):
    """Write results of a check, as a whole."""
    part = f"{folder}.{platform.node()}.{os.getpid()}.part"
    datasets.disable_progress_bars()
    results.save_to_disk(part)
    datasets.enable_progress_bars()
    if known_results(folder) is None:  # else another run, which may read them, has just written the same
        shutil.rmtree(folder, ignore_errors=True)
    try:
        os.replace(part, folder)
    except OSError:  # it is there already
        shutil.rmtree(part)


def check_batch(columns, collator, bound):
    """{column: cells} of some rows -> {column: results}."""
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    results = [check_row(row, collator, bound) for row in rows]
    return {name: [result[name] for result in results] for name in RESULT_COLUMNS}


def known_results(folder):
    """The results of a check that are kept there; None if there are none, or if an image has changed since."""
    if not folder.exists():
        return None
    results = datasets.load_from_disk(folder)
    for some in results.select_columns(["image_keys", "image_times"]).iter(10_000):
        for keys, times in zip(some["image_keys"], some["image_times"], strict=True):
            if list(map(time_of, keys)) != times:
                return None
    return results


def time_of(image):
    """When an image file was changed last, in ns; 0 if it does not exist, or is no file."""
    try:
        return os.stat(image).st_mtime_ns
    except (OSError, ValueError):  # a name that no file can have
        return 0


def problems_of(results):
    """{index of a row that cannot be trained on: (reason, detail)}."""
    reasons = enumerate(zip(results["reason"][:], results["detail"][:], strict=True))
    return {n: (reason, detail) for n, (reason, detail) in reasons if reason is not None}


NOTHING_FOUND = {"reason": None, "detail": None, "length": 0, "num_tokens": 0, "differs": False} | {
    name: [] for name in ("image_keys", "image_times", "notes")
}


def check_row(row, collator, bound=None):
    """Try the collator on a row -> {"length", "num_tokens", "image_keys", "image_times", "notes" to the user, whether
    it "differs" from how earlier versions read it, and for a bad row "reason" and "detail"}.
    With a LengthBound only its structure is checked, without pixels, chat template and tokenizer, and the lengths are
    upper bounds. Only a row that may be too long goes through the collator."""
    result = dict(NOTHING_FOUND)
    try:
        messages = collator.read(row)
        images = pil_images(messages)
        result["image_keys"] = list(map(image_key, images))
        result["image_times"] = list(map(time_of, result["image_keys"]))
        result["notes"] = sorted({note for message in messages for note in message.get("notes", ())})
        if bound is not None:
            ratio = getattr(collator, "max_aspect_ratio", 200)
            sizes = [load_image(image, ratio, only_size=True) for image in images]
            result["length"] = result["num_tokens"] = bound(row, len(messages), sizes)
        if bound is None or result["length"] > collator.max_length:
            batch = collator([row])
    except BadRow as error:
        return result | {"reason": error.reason, "detail": error.detail}
    if bound is None:
        is_nfc = all(unicodedata.is_normalized("NFC", text) for text in leaf_texts(list(row.values())))
        result["differs"] = not is_nfc or any(message.get("differs", False) for message in messages)
        result |= {"length": batch["attention_mask"].shape[1], "num_tokens": tokens_of_row(batch)}
    return result


class LengthBound:
    """Upper bounds of rows' lengths in tokens, from words and image sizes: without tokenizing a row, or decoding."""

    def __init__(self, rows, collator):
        self.collator = collator
        self.columns = [name for name in rows.column_names if name not in ("id", "row", "folder")]
        self.tokens_of_word = functools.lru_cache(500_000)(self.count_tokens)  # the same words come again and again
        self.for_a_row, self.for_a_turn = 0, 0  # what the chat template adds, see fit
        self.tokens_of_size = {}
        sizes = [(64, 64), (640, 480), (300, 1000), (2000, 1500)]
        beside = {tokens_of_blank(collator, size) - tokens_by_arithmetic(collator.processor, size) for size in sizes}
        self.beside_an_image = beside.pop() if len(beside) == 1 else None  # None: other sizes must be tried, too

    def __call__(self, row, num_turns, sizes):
        length = self.for_a_row + self.for_a_turn * num_turns + sum(map(self.tokens_of_image, sizes))
        for text in leaf_texts([row[column] for column in self.columns]):
            if " " not in text and is_media(text):  # the name of an image, or one as text
                continue
            length += sum(map(self.tokens_of_word, text.split(" ")))
        return length

    def fit(self, rows, lengths):
        """Find out from some rows, whose lengths are known, what the chat template adds."""
        added, turns = [], []
        for row, length in zip(rows, lengths, strict=True):
            messages = self.collator.read(row)
            sizes = [load_image(image, only_size=True) for image in pil_images(messages)]
            added.append(length - self(row, 0, sizes))
            turns.append(len(messages))
        self.for_a_row = max(0, min(added, default=0))
        rest = [(more - self.for_a_row) / number for more, number in zip(added, turns, strict=True)]
        self.for_a_turn = max(0, math.ceil(max(rest, default=0))) + 2  # a little more: other rows may take more

    def count_tokens(self, word):
        return len(self.collator.processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"])

    def tokens_of_image(self, size):
        """Of an image of this size, (width, height), and what stands beside it. Raises BadRow."""
        if size not in self.tokens_of_size:
            try:
                if self.beside_an_image is None:
                    self.tokens_of_size[size] = tokens_of_blank(self.collator, size)
                else:
                    tokens = tokens_by_arithmetic(self.collator.processor, size)
                    self.tokens_of_size[size] = tokens + self.beside_an_image
            except Exception as error:  # processors raise many kinds, for images too small or too narrow for them
                raise BadRow("unfit for the processor", f"{size} pixels: {type(error).__name__}: {error}") from error
        return self.tokens_of_size[size]


def tokens_by_arithmetic(processor, size):
    """The tokens of an image of this size, (width, height), as vLLM asks for them; 0 if the processor cannot say."""
    if not hasattr(processor, "_get_num_multimodal_tokens"):
        return 0
    return processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])["num_image_tokens"][0]


def tokens_of_blank(collator, size):
    """The tokens of a prompt that is a blank image of this size and a letter."""
    turn = question_turn("x", images=[Image.new("RGB", size)])
    inputs = collator.tokenize([[turn]], prompt=True)
    return inputs.get("data", inputs)["input_ids"].shape[1]


def image_counts(rows):
    """The number of images of each row."""
    keys = rows.select_columns(["image_keys"]).with_format("arrow")[:]["image_keys"]
    return keys.combine_chunks().value_lengths().to_pylist()


def check_sample(rows, results, problems, count, collator, training):
    """Decode `count` rows drawn by seed, the longest, those with most images, and one with the fewest. ->
    {index of a row: (reason, detail)}."""
    good = [n for n in range(len(rows)) if n not in problems]
    num_images, lengths = image_counts(results), results["length"][:]
    sample = set(random.Random(training.seed).sample(good, min(count, len(good))))
    for cost in (lengths, num_images):
        sample.update(heapq.nlargest(LARGEST_ROWS, good, cost.__getitem__))
    sample.update(heapq.nsmallest(1, good, num_images.__getitem__))
    sample = sorted(sample)
    if not sample:  # not one row is good
        return {}
    decoded = stored_results(rows.select(sample), collator, None, "Decoding a sample", training)
    return {sample[n]: problem for n, problem in problems_of(decoded).items()}


def tokens_of_row(batch):
    """A batch of one row -> its tokens; of a pair those of its prompt, which has two sequences, once."""
    mask = batch["attention_mask"]
    if "completion_mask" not in batch:
        return int(mask.sum())
    is_answer = batch["completion_mask"]
    return int((mask - is_answer)[0].sum() + is_answer.sum())


def is_blind(problems, rows, settings):
    """Whether no row of the test split has an answer, as in public benchmarks that keep theirs; if so, says so."""
    was_named = settings.dataset_test_split or settings.eval_dataset_name
    reasons = {reason for reason, _ in problems.values()}
    if was_named or len(problems) < len(rows) or not reasons <= {NO_ANSWER, "empty answer", "missing column"}:
        return False
    share = f"--eval_fraction {settings.eval_fraction:g} of the training images"
    say(f"the test split has no answers: {share} are held out instead (or name a split: --dataset_test_split)")
    return True


def report_problems(rows, problems, name, settings):
    """Print the rows with a problem, which are left out; or stop with that as the message. Raises SystemExit.
    problems: {index of a row: (reason, detail)}."""
    if not problems:
        return
    counts = Counter(reason for reason, _ in problems.values())
    totals = ", ".join(f"{count} x {reason}" for reason, count in counts.most_common())
    lines = [f"{len(problems)} of {len(rows)} rows of {name} cannot be trained on: {totals} (at most 20 shown)"]
    shown = sorted(problems, key=lambda n: problems[n][0] == "too long")[:20]  # broken rows first
    for n, row in zip(shown, rows.select(shown), strict=True):
        reason, detail = problems[n]
        identity = f" (id {row['id']})" if row.get("id") not in (None, "") else ""
        lines.append(f"  row {row['row']}{identity}: {reason}: {detail}")

    num_long = counts["too long"]
    stop_on_broken = len(problems) > num_long and settings.on_bad_rows == "stop"
    stop_on_long = num_long > 0 and settings.on_long_rows == "stop"
    none_left = len(problems) == len(rows)
    if not (stop_on_broken or stop_on_long or none_left):
        say("left out:", "\n".join(lines))
        return
    if stop_on_broken:
        lines.append("Fix these rows (counted from 0), or train without them: --on_bad_rows skip")
    if stop_on_long:
        lines.append("Raise the maximum length, or train without the long rows: --on_long_rows drop")
    if none_left:
        lines.append("No row would be left: fix them, or raise the maximum length.")
    fail("\n".join(lines))


def hold_out(rows, settings, training):
    """Divide rows into (train, eval): about --eval_fraction of the images, chosen by seed, are for evaluation, but no
    more rows than are scored (--max_eval_rows). Rows that share an image, directly or through other rows, go to the
    same side: another question about an image that was trained on would be no test."""
    # 1. Groups of images that rows connect. A row without images counts as one image.
    keys_of_row = zip(rows["row"][:], rows["image_keys"][:], strict=True)
    images_of_row = [keys or [f"row {number}"] for number, keys in keys_of_row]
    connected = UnionFind()
    for images in images_of_row:
        if len(images) > 1:
            connected.union(*images)
    group_of_image = {}  # a group is named by one of its images
    for image in itertools.chain.from_iterable(images_of_row):
        group_of_image[image] = connected[image] if image in connected.parents else image
    num_images_of = Counter(group_of_image.values())
    num_rows_of = Counter(group_of_image[images[0]] for images in images_of_row)
    # 2. Go through the images in random order and hold out the group of each, unless that would exceed the goal.
    goal = max(1, round(settings.eval_fraction * len(group_of_image)))
    shuffled = sorted(group_of_image)
    random.Random(training.seed).shuffle(shuffled)
    held_out, num_images, num_rows, is_limited = set(), 0, 0, False
    for image in shuffled:
        group = group_of_image[image]
        if group not in held_out and num_images + num_images_of[group] <= goal:
            if num_rows + num_rows_of[group] > settings.max_eval_rows:
                is_limited = True
                continue
            held_out.add(group)
            num_images += num_images_of[group]
            num_rows += num_rows_of[group]
    if is_limited and num_images < goal:
        share = f"less than --eval_fraction {settings.eval_fraction:g} is held out"
        note = f"{share}: --max_eval_rows {settings.max_eval_rows} are all that is scored"
        say(note)
        read_differently(training, note)
    if not held_out:
        held_out = {min(num_images_of, key=lambda group: (num_images_of[group], num_rows_of[group]))}
    is_held_out = np.array([group_of_image[images[0]] in held_out for images in images_of_row])
    train, evaluation = rows.select(np.flatnonzero(~is_held_out)), rows.select(np.flatnonzero(is_held_out))
    remedy = "without an image in both: --eval_fraction 0 turns evaluation off"
    require(len(train) > 0, f"{len(rows)} rows cannot be divided into training and evaluation {remedy}")
    return train, draw_rows(evaluation, settings.max_eval_rows, training.seed)


def draw_rows(rows, count, seed):
    """At most `count` of these rows, drawn by seed: the same ones in every evaluation."""
    return rows.shuffle(seed).select(range(min(len(rows), count))).flatten_indices()


def read_eval_rows(read_rows, settings, training):
    """The evaluation rows, read by read_rows(name, split, settings); None if there is no data set or split for them,
    or if nothing is evaluated. Raises SystemExit."""
    if training.eval_strategy == "no":
        return None
    rows = read_rows(settings.eval_dataset_name or settings.dataset_name, settings.dataset_test_split, settings)
    if rows is not None and settings.dataset_test_split is None:
        earlier = settings.dataset_train_split if settings.eval_dataset_name else "test"
        if rows.split in EVALUATION_SPLITS and rows.split != earlier:
            note = f"evaluation is on the split {rows.split}"
            say(note)
            read_differently(training, note)
    return rows


def read_differently(training, what):
    """Note what is done to rows that earlier versions of this file did not do: see require_same_rows."""
    training.differences = [*getattr(training, "differences", []), what]


def read_dataset(name, split, settings):
    """One split as a Dataset. If `split` is None, the first of EVALUATION_SPLITS that there is, except the one that is
    trained on; if there is none, None, or with --eval_dataset_name dataset_train_split. Raises SystemExit.
    New columns: `row`, the number of the row, and `folder`, where its relative image paths start."""
    config, revision = None, None
    if name == settings.dataset_name:  # another data set, to evaluate on, has neither
        config, revision = settings.dataset_config, settings.dataset_revision
    splits = load_splits(name, config, revision)
    if split is None:
        trained, instead = settings.dataset_train_split, None
        if settings.eval_dataset_name:
            trained, instead = None, settings.dataset_train_split
        split = next((split for split in EVALUATION_SPLITS if split in splits and split != trained), instead)
        if split is None:
            return None
    require(split in splits, f"{name} has no split {split!r}; it has {', '.join(splits)}")

    rows = splits[split]
    require(len(rows) > 0, f"{name} is empty: its split {split} has no rows")
    for column, feature in rows.features.items():
        if undecoded(feature) != feature:
            rows = rows.cast_column(column, undecoded(feature))
    new_columns = ("row", "folder", "length", "num_tokens", "image_keys")
    rows = rows.remove_columns([column for column in new_columns if column in rows.column_names])
    folder = os.path.abspath(settings.image_folder or (name if os.path.isdir(name) else os.path.dirname(name)))
    rows = rows.add_column("row", np.arange(len(rows)))
    fingerprint = Hasher.hash([rows._fingerprint, folder])  # given, since `datasets` would hash the whole list
    return rows.add_column("folder", [folder] * len(rows), new_fingerprint=fingerprint)


def undecoded(feature):
    """A feature whose images stay files and bytes, so that the collator can name the row of a broken one."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(undecoded(feature.feature))
    return {key: undecoded(value) for key, value in feature.items()} if isinstance(feature, dict) else feature


def load_splits(name, config, revision):
    """{split: Dataset} of a hub id, folder, saved data set or file; a file has only `train`. Raises SystemExit."""
    path = Path(name)
    require_place(f"cannot read {name}", name)
    try:
        if path.suffix.lower() in (".json", ".jsonl"):
            splits = {"train": read_json(path)}
        elif path.suffix.lower() == ".parquet":
            splits = datasets.load_dataset("parquet", data_files=name)
        elif path.is_file():
            raise ValueError("known are .json, .jsonl and .parquet files, folders, saved data sets and hub ids")
        elif (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            splits = datasets.load_from_disk(name)
        else:
            splits = datasets.load_dataset(name, config, revision=revision)
            if any(set(rows.column_names) <= {"image", "label"} for rows in splits.values()):
                refuse_rows_left_out(path)
    except (StopIteration, IndexError):
        fail(f"cannot read {name}: it is empty")
    except (OSError, ValueError, RecursionError, datasets.exceptions.DatasetsError) as error:
        where = "" if path.exists() else " (no such file or folder here, so it was taken for a hub id)"
        fail(f"cannot read {name}{where}: {error.__cause__ or error}")
    return splits if isinstance(splits, dict) else {"train": splits}


def refuse_rows_left_out(path):
    """Stop if a folder has files of rows, of which `datasets` read nothing but the images beside them."""
    files = [file for file in sorted(path.glob("*")) if file.suffix.lower() in (".json", ".jsonl")]
    files = [file for file in files if file.name not in ("metadata.jsonl", "dataset_info.json", "dataset_infos.json")]
    if files:
        fail(
            f"{path} is a folder of images with {files[0].name} beside them: name that file, --dataset_name {files[0]}"
        )


def cache_folder(name):
    """A folder of ours in the cache of `datasets`."""
    folder = Path(datasets.config.HF_DATASETS_CACHE, "recipes", name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_json(path):
    """A .json (list of rows) or .jsonl file (a row a line) -> Dataset; columns may mix types. Raises ValueError.
    The file is read as a stream, twice: first to see where its rows are, then in pieces, by several processes. They
    write an Arrow file into the cache of `datasets`, which is used until the file changes."""
    file = path.stat()
    form = 2  # of what is stored: to be raised if that changes
    key = Hasher.hash([str(path.resolve()), file.st_size, file.st_mtime_ns, form])
    found = cache_folder("json") / f"{key}.json"
    try:
        with one_after_another():
            if not found.exists():
                write_whole(found, json.dumps(pieces_of_json(path)))
            pieces, columns = json.loads(found.read_text(encoding="utf-8"))
            return datasets.Dataset.from_list(pieces).map(
                rows_of_piece,
                batched=True,
                batch_size=1,
                fn_kwargs={"path": str(path), "columns": columns},
                remove_columns=list(pieces[0]),
                features=datasets.Features({column: datasets.Json() for column in columns}),
                num_proc=min(len(pieces), num_cores()) if len(pieces) > 1 else None,
                new_fingerprint=key,
                cache_file_name=str(found.with_suffix(".arrow")),
                desc=f"Reading {path}",
            )
    except ValueError as error:
        raise ValueError(str(error)) from None  # without the traceback of another process


@contextlib.contextmanager
def one_after_another():
    """For what the first process of each machine does, or fails to do; then the others find it done, or fail too."""
    state = PartialState()
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_local_main_process:
            state.wait_for_everyone()


JSON_PIECE = 2**22  # bytes of JSON that are read together
JSON_FORM = "(a .json file is one list of rows, a .jsonl file has one row a line)"
NO_LIST_OF_ROWS = 'it must be a list of rows: [{"column": value, ...}, ...]'
SPACE = re.compile(r"\s*")
BETWEEN_ROWS = re.compile(r"[\s,\[\]]*")


def pieces_of_json(path):
    """([{"start", "end", "line", "row"}], columns): where the pieces of a file are, in bytes, and with which line and
    row each begins. Raises ValueError, with the line, for what is no JSON, or no rows."""
    stream = json_lines if path.suffix.lower() == ".jsonl" else json_list
    pieces, columns, number = [], {}, 0
    with open(path, "rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        for num_rows, start, end, line in stream(file, columns):
            pieces.append({"start": start, "end": end, "line": line, "row": number})
            number += num_rows
    if not columns:
        raise ValueError("it is empty")
    return pieces, list(columns)


def add_columns(row, columns):
    """Add the columns of a row to these, {column: None}. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError(NO_LIST_OF_ROWS)
    columns.update(dict.fromkeys(row))


def json_lines(file, columns):
    """Yields (number of rows, first byte, byte after them, first line) of pieces of a .jsonl file. Adds what columns
    the rows have to `columns`. Raises ValueError."""
    start, line = file.tell(), 1
    while texts := file.readlines(JSON_PIECE):
        num_rows = 0
        for number, text in enumerate(texts, start=line):
            try:
                if text.strip():
                    add_columns(json.loads(text.decode()), columns)
                    num_rows += 1
            except ValueError as error:
                raise ValueError(f"line {number}: {error} {JSON_FORM}") from None
        end = start + sum(map(len, texts))
        if num_rows > 0:
            yield num_rows, start, end, line
        start, line = end, line + len(texts)


def json_list(file, columns):
    """Like json_lines, of a .json file."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    text, start, line, column = "", file.tell(), 1, 1  # what is in memory, from this byte, line and column on
    expected, is_whole = "[", False  # the next character; whether the file ends with the text
    while not is_whole:
        chunk = file.read(max(JSON_PIECE, len(text)))
        is_whole = not chunk
        try:
            text += decode(chunk, final=is_whole)
        except UnicodeDecodeError as error:
            line, column = line_and_column(text + error.object[: error.start].decode(), line, column)
            raise ValueError(f"line {line}: {error} {JSON_FORM}") from None
        num_rows, end, expected, error = whole_rows(text, expected, columns)
        if is_whole and expected == "[" and text.strip("[ ]\t\r\n") == "":
            raise ValueError("it is empty")
        # Before the end of the file, an error may mean that the rest of a row is not in memory yet.
        is_cut_off = error is None or error.msg.startswith("Unterminated string") or len(text) - error.pos < 100
        if is_whole and expected and error is None:
            error = json.JSONDecodeError(JSON_PROBLEMS[expected], text, len(text))
        if error is not None and (is_whole or not is_cut_off):
            line, column = line_and_column(text[: error.pos], line, column)
            raise ValueError(f"{error.msg}: line {line} column {column} {JSON_FORM}")
        behind = start + len(text[:end].encode())
        if num_rows > 0:
            yield num_rows, start, behind, line
        line, column = line_and_column(text[:end], line, column)
        text, start = text[end:], behind


JSON_PROBLEMS = {"[": NO_LIST_OF_ROWS, ",": "Expecting ',' delimiter", "": "Extra data"}


def whole_rows(text, expected, columns):
    """Go through the rows that are whole in a part of a .json file, before which [ or , is expected. -> (how many, the
    position behind them, the character expected there, JSONDecodeError about what is there instead, or None)."""
    parse = json.JSONDecoder().raw_decode
    num_rows, end = 0, 0
    while (begin := SPACE.match(text, end).end()) < len(text):
        if expected == "," and text[begin] == "]":
            expected, end = "", begin + 1
        elif text[begin] != expected:
            return num_rows, end, expected, json.JSONDecodeError(JSON_PROBLEMS[expected], text, begin)
        else:
            try:
                row, end = parse(text, SPACE.match(text, begin + 1).end())
            except json.JSONDecodeError as error:
                return num_rows, end, expected, error
            add_columns(row, columns)
            num_rows += 1
            expected = ","
    return num_rows, end, expected, None


def line_and_column(text, line, column):
    """The line and column behind this text, which begins at these; counted from 1."""
    if "\n" in text:
        return line + text.count("\n"), len(text) - text.rfind("\n")
    return line, column + len(text)


def rows_of_piece(piece, path, columns):
    """A piece of a JSON file, as pieces_of_json has it -> {column: its cells, as JSON text}. Raises ValueError."""
    (start,), (end,), (line,), (number,) = piece["start"], piece["end"], piece["line"], piece["row"]
    with open(path, "rb") as file:
        file.seek(start)
        text = file.read(end - start).decode()
    parse = json.JSONDecoder(object_pairs_hook=refuse_duplicate_keys, parse_int=read_integer).raw_decode
    cells = {column: [] for column in columns}
    may_have_surrogates = "\\u" in text
    position = 0
    while (position := BETWEEN_ROWS.match(text, position).end()) < len(text):
        try:
            row, behind = parse(text, position)
        except ValueError as error:
            line += text[:position].count("\n")
            raise ValueError(f"line {line}: {error} {JSON_FORM}") from None
        for column in columns:
            # As JSON text: datasets.Json() would read the text "7" as the number 7.
            cells[column].append(json.dumps(row.get(column), ensure_ascii=False))
            if may_have_surrogates and re.search("[\ud800-\udfff]", cells[column][-1]):
                raise ValueError(f"row {number} has invalid Unicode (a lone surrogate); fix its encoding")
        position = behind
        number += 1
    return cells


def read_integer(digits):
    """The digits of an integer -> int; the digits themselves for one of more than 64 bits, which Arrow cannot hold."""
    return int(digits) if -(2**63) <= int(digits) < 2**63 else digits


def refuse_duplicate_keys(pairs):
    """A JSON object -> dict. Raises ValueError for a key that appears twice: json.loads would keep its last value."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key appears twice in {str(pairs):.200}")
    return dict(pairs)


def keep_columns(rows, needed, optional, name):
    """Rows of which only these columns are left, those that are there. (`id`, `row`, `folder` stay.) Raises SystemExit
    if none of `needed` is there."""
    available = [column for column in rows.column_names if column not in ("row", "folder")]
    if not set(needed) & set(available):
        alike = "".join(did_you_mean(column, available) for column in needed)
        fail(f"{name} has no column {' or '.join(needed)}{alike or '; it has ' + ', '.join(available)}")
    columns = ("id", "row", "folder", *needed, *optional)
    return rows.select_columns([column for column in rows.column_names if column in columns])


MEDIA_FILE = re.compile(
    r"\S.*\.(jpe?g|png|gif|webp|bmp|tiff?|hei[cf]|avif|dcm|mp4|avi|mov|mkv|webm|wav|mp3|m4a|flac|ogg)(\?\S*)?",
    re.IGNORECASE,
)


def is_media(cell):
    """Whether a cell is bytes, base64, or the name of a media file, or a list or dict that holds such."""
    if isinstance(cell, (list, dict)):
        return any(map(is_media, cell.values() if isinstance(cell, dict) else cell))
    if isinstance(cell, str):
        return bool(cell.startswith("data:") or MEDIA_FILE.fullmatch(cell) or BASE64_IMAGE.fullmatch(cell))
    return isinstance(cell, bytes)


def leaf_texts(cell):
    """The texts in a cell: itself, those in a list, the words of turns, the values of another dict."""
    if isinstance(cell, str):
        yield cell
    elif isinstance(cell, list):
        for item in cell:
            yield from leaf_texts(item)
    elif isinstance(cell, dict):
        words = [cell[key] for key in ("content", "value", "text") if key in cell]
        for item in words or cell.values():
            yield from leaf_texts(item)


# ------------------------------------------------------------------------------------------------------ reading a row
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
NAME_OF_TEXT = {"user": "question", "assistant": "answer", "system": "system message"}
TURN_KEYS = ("role", "from", "content", "value")
UNREAD_KEY = re.compile(r"text|tool_\w+|function_call|reasoning(_content)?|thinking|bbox|media|attachments?|files?")
LOSS_KEY = re.compile(r"\w*(loss|train|weight|mask)\w*")  # says whether, or how much, a turn is trained


# Placeholders of other programs.
PLACEHOLDER_ELSEWHERE = re.compile(
    r"^<(video|audio)>|<img>.+?</img>|<(bbox|ref-object)>|<\|?image(here)?[ _]?\d*\|?>", re.IGNORECASE | re.MULTILINE
)


def the_one_of(row, columns, optional=False):
    """The value of the one of these columns (or keys) that has one. Raises BadRow if two have, or, unless optional, if
    none has; if optional, that is None."""
    filled = [column for column in columns if not is_missing(row.get(column))]
    if len(filled) > 1:
        both = f"{' and '.join(filled)} both have a value"
        raise BadRow("two formats", f"{both}: keep one of them, or leave one out, --ignore_columns {filled[1]}")
    if not filled and not optional:
        raise BadRow("missing column", f"it has nothing in {' or '.join(columns)}")
    return row[filled[0]] if filled else None


def read_turns(turns, marker, ignored=()):
    """The turns of a conversation -> messages, [{"role", "content": parts}]. A turn is {"role", "content"} or {"from",
    "value"}; its content is a text, or a list of texts and images. In a user's texts markers (a regex) stand for
    images. Parts become {"type": "text", "text"} or {"type": "image"} and how its image is found: see place_images.
    Raises BadRow, also for keys with media or context that are not read, unless they are in `ignored`."""
    # datasets may have a list of dicts as a dict of lists.
    if isinstance(turns, dict) and all(isinstance(values, list) for values in turns.values()):
        lengths = {len(values) for values in turns.values()}
        turns = [{key: turns[key][n] for key in turns} for n in range(min(lengths))] if len(lengths) == 1 else None
    if not isinstance(turns, list) or not turns:
        raise BadRow("no conversation", f"it must be a list of turns, {{role, content}}, and is {turns!r:.100}")
    messages = []
    for n, turn in enumerate(turns):
        if not isinstance(turn, dict) or (is_missing(turn.get("role")) and is_missing(turn.get("from"))):
            raise BadRow("malformed row", f"turn {n} must be {{role, content}} or {{from, value}}: {turn!r:.100}")
        speaker = the_one_of(turn, ("role", "from"))
        role = ROLES.get(str(speaker).lower())
        if role is None:
            detail = f"turn {n} is by {speaker!r:.100}; known are human or user, gpt or assistant, system"
            raise BadRow("unknown role", detail)
        refuse_unread_keys(turn, TURN_KEYS, ignored, f"turn {n}", role)
        content = the_one_of(turn, ("content", "value"), optional=True)
        if role == "system" and is_missing(content):
            continue
        content = content if isinstance(content, list) else [content]
        if sum(isinstance(part, str) for part in content) > 1:
            detail = f"turn {n} has several texts, {content!r:.100}: join them, or make parts {{type, text}} of them"
            raise BadRow("malformed row", detail)
        parts = []
        for part in content:
            parts += read_part(part, marker if role == "user" else None, ignored, f"turn {n}")
        if role != "user" and any(part["type"] == "image" for part in parts):
            raise BadRow(f"image in a turn of the {role}", f"turn {n}: images belong in the user's turns")
        messages.append({"role": role, "content": parts})
    return messages


def read_part(part, marker, ignored, place):
    """A text, or one part of a turn -> list of parts, as in read_turns. Raises BadRow."""
    if not isinstance(part, dict):
        is_read_as_it_is = marker is None or not isinstance(part, str)
        return [{"type": "text", "text": part}] if is_read_as_it_is else split_at_markers(part, marker)
    own = {key: part[key] for key in IMAGE_KEYS if key in part and not is_missing(part[key])}
    kind = part.get("type") or ("image" if own else "text")
    if kind in ("image", "image_url", "input_image"):
        refuse_unread_keys(part, ("type", "index", *IMAGE_KEYS), ignored, place)
        others = [key for key, value in part.items() if key not in ("type", "index") and not is_missing(value)]
        if others and not own:
            raise BadRow("malformed image", f"{place}: {part!r:.100} must have one of {', '.join(IMAGE_KEYS)}")
        return [{"type": "image", "image": own or None, "index": read_index(part.get("index"), place)}]
    if kind not in ("text", "input_text", "output_text") or "text" not in part:
        raise BadRow("unknown part", f"{place} has {part!r:.200}; known are parts of type text and image")
    refuse_unread_keys(part, ("type", "text"), ignored, place)
    if marker is None or not isinstance(part["text"], str):
        return [{"type": "text", "text": part["text"]}]
    return split_at_markers(part["text"], marker)


def read_index(index, place):
    """The index of an image part -> int or None. Raises BadRow."""
    try:
        return None if index is None else int(index)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRow("malformed row", f"{place}: an image has index {index!r:.100}; it must be a number") from error


# Columns that change what a row means, in lower case. Those of IMAGE_NAME_COLUMN may only name an image that is read.
IMAGE_NAME_COLUMN = re.compile(r"(image|img|picture|photo)s?_?(file_?)?(path|file|name|url|base64|bytes)s?|file_?name")
MEDIA_COLUMN = re.compile(
    r"(image|img|picture|photo|pic|frame|video|audio)s?(_?\d+|_[a-d])?|(video|audio)_?(path|file|name|url|bytes)s?"
)
CONTEXT_COLUMN = re.compile(
    r"\w*history|sys|system(_\w+)?|tools?|functions|contexts?|instructions?|passage|documents?|hints?"
)


def changes_meaning(column, feature):
    """Whether a column, or a key of a turn, that is not read may hold media or context, by its name or type."""
    if any(media in repr(feature) for media in ("Image(", "Audio(", "Video(")):
        return True
    return any(pattern.fullmatch(column.lower()) for pattern in (IMAGE_NAME_COLUMN, MEDIA_COLUMN, CONTEXT_COLUMN))


def refuse_unread_keys(part, known, ignored, place, role=None):
    """Raises BadRow if a turn, or a part of one, has a value that changes what it means and is not read."""
    for key, value in part.items():
        if key in known or key in ignored or is_missing(value):
            continue
        as_trained = ("1", "1.0", "True")
        if re.fullmatch(r"mask(ed)?|(no|ignore)_\w+|un\w+", key):  # that it is not trained
            as_trained = ("0", "0.0", "False")
        is_trained_otherwise = role == "assistant" and LOSS_KEY.fullmatch(key) and str(value) not in as_trained
        if changes_meaning(key, None) or UNREAD_KEY.fullmatch(key) or is_trained_otherwise:
            detail = f"{place} has {key!r}, which is not read: write it in a form that is, or --ignore_columns {key}"
            raise BadRow("key that is not read", detail)


def split_at_markers(text, marker):
    """A text in which markers (a regex) stand for images -> list of parts. A marker takes one line break beside it
    with it: LLaVA's data have one between image and question. All other white space stays."""
    if not re.search(marker, text):
        return [{"type": "text", "text": text}]
    parts = []
    for piece in re.split(rf"({marker}\r?\n|\r?\n{marker}|{marker})", text):
        if re.fullmatch(marker, piece.strip("\r\n")):
            parts.append({"type": "image", "marker": piece.strip("\r\n"), "line_break": "\n" in piece})
        elif piece.strip() or piece == text:
            parts.append({"type": "text", "text": piece})
    return parts


def show_single_image(messages, images):
    """If there is one image and no turn shows it, show it before the first question."""
    questions = [message["content"] for message in messages if message["role"] == "user"]
    is_shown = any(part["type"] == "image" for parts in questions for part in parts)
    if len(images) == 1 and questions and not is_shown:
        if all(is_missing(part["text"]) or str(part["text"]).isspace() for part in questions[0]):
            raise BadRow("empty question", "the first turn of the user says nothing")
        marker = next(iter(images)) if isinstance(images, dict) else None
        questions[0].insert(0, {"type": "image", "marker": marker})


def place_images(messages, images, folder):
    """Give each image part its image: its own, or of `images` (a list, or {marker: image}) the next, or the one of its
    index or marker. Raises BadRow unless each of `images` is used exactly once."""
    by_key = images if isinstance(images, dict) else dict(enumerate(images))
    next_index, wanted = itertools.count(), []
    for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
        marker, index, own = part.pop("marker", None), part.pop("index", None), part.get("image")
        if own is None:
            key = marker
            if not isinstance(images, dict) and marker in (None, "<image>"):  # another marker is no place in a list
                key = next(next_index) if index is None else index
            wanted.append(key)
            part["image"] = by_key.get(key)
        else:
            found = as_image_list(own, folder)
            if len(found) != 1:
                raise BadRow("malformed image", f"{own!r:.100} must be one image: a path, its bytes, or base64")
            part["image"] = found[0]
    if Counter(wanted) != Counter(list(by_key)):
        shown, there = f"the turns show {len(wanted)} images {wanted}", f"the row has {len(by_key)} {list(by_key)}"
        detail = f"{shown}, {there}; each must be shown exactly once, by its <image>"
        raise BadRow("images do not match", detail)


def join_texts(messages, images_first, strip=False):
    """Join the texts of a turn that are side by side. images_first: move its images in front of its text, as many chat
    templates do anyway. strip: take white space off both ends of its text. Raises BadRow for what is no text."""
    for message in messages:
        parts, texts = [], [part for part in message["content"] if part["type"] == "text"]
        for text in texts:
            text["text"] = clean_text(text["text"], NAME_OF_TEXT[message["role"]])
        # Earlier versions kept the parts apart, and stripped them.
        is_stripped = strip or all(text["text"] == text["text"].strip() for text in texts)
        message["differs"] = len(texts) > 1 or not is_stripped
        for part in message["content"]:
            if part["type"] == "text" and parts and parts[-1]["type"] == "text":
                both = parts.pop()["text"] + part["text"]
                part = {"type": "text", "text": unicodedata.normalize("NFC", both)}
            parts.append(part)
        images = [part for part in parts if part["type"] == "image"]
        if images_first and parts[: len(images)] != images:
            message["notes"] = ["images after a text: they are shown before it"]
            parts = [*images, {"type": "text", "text": text_without_images(parts)}]
        for image in images:
            image.pop("line_break", None)
        ends = [part for part in parts if part["type"] == "text"] if images_first else parts
        if strip and texts and ends[0]["type"] == "text":
            ends[0]["text"] = ends[0]["text"].lstrip()
        if strip and texts and ends[-1]["type"] == "text":
            ends[-1]["text"] = ends[-1]["text"].rstrip()
        message["content"] = parts


def text_without_images(parts):
    """Parts of a turn -> their text, in which an image leaves the line break that its marker took, or a space."""
    text, gap = "", ""
    for part in parts:
        if part["type"] == "image":
            gap = "\n" if part.get("line_break") else " "
            continue
        sides = text[-1:] + part["text"][:1]
        is_apart = not text or "\n" in sides or (gap == " " and " " in sides)
        text += part["text"] if is_apart else gap + part["text"]
    return text.rstrip(" ") if parts[-1]["type"] == "image" else text


def clean_text(value, name):
    """A text of a row in Unicode's form NFC, in which an accented letter is one character however it was typed. An
    integer answer becomes its digits. Raises BadRow for what is no text; None, or NaN, becomes an empty text."""
    if isinstance(value, str) and value.isascii():  # most are: this spares the time of what follows
        return value
    if is_missing(value):
        return ""
    if name == "answer" and type(value) is int:
        return str(value)
    if not isinstance(value, str):
        detail = f"{value!r:.200}; it must be a text, exactly as the model should read or say it"
        if isinstance(value, float):
            detail = f"{value!r}: how it was written is lost; read it as text: pandas.read_csv(file, dtype=str)"
        raise BadRow(f"{name} is not a text", detail)
    if re.search("[\ud800-\udfff]", value):
        raise BadRow("invalid Unicode", f"{value.encode('utf-8', 'replace').decode():.100}: half a character; fix it")
    return unicodedata.normalize("NFC", value)


def check_texts(messages, control_tokens, always=False):
    """Raises BadRow if a turn says nothing, or a text holds a control token, or a placeholder that is not known. A
    blank text beside an image goes; with `always` it is an error."""
    for n, message in enumerate(messages):
        parts = [part for part in message["content"] if part["type"] == "image" or part["text"].strip()]
        name = NAME_OF_TEXT[message["role"]]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        refuse_control_tokens(message.get("reasoning_content", ""), control_tokens, "the thought")
        if not parts or (always and not texts):
            raise BadRow(f"empty {name}", f"turn {n} holds nothing, or nothing but white space")
        for text in texts:
            refuse_control_tokens(text, control_tokens, f"the {name}")
            found = message["role"] == "user" and PLACEHOLDER_ELSEWHERE.search(text)
            if found:
                detail = f"{found[0]!r:.100} in the {name} would be read as words: write <image> for an image"
                raise BadRow("unknown placeholder", detail)
        message["content"] = parts


def check_order(messages):
    """Raises BadRow unless user and assistant alternate, after a system turn, if any."""
    roles = [message["role"] for message in messages]
    if not roles:
        raise BadRow("empty question", "no turn says anything")
    wanted = ["user", "assistant"] * len(roles)
    if roles[0] == "system":
        wanted.insert(0, "system")
    for n, (role, expected) in enumerate(zip(roles, wanted, strict=False)):
        if role != expected:
            raise BadRow("order of turns", f"turn {n} must be the {expected}'s, and is the {role}'s")


def require_texts(rendered, messages):
    """Raises BadRow if the text that is tokenized lacks a text of these messages: the chat template left it out."""
    position = 0
    for message in messages:
        for part in message["content"]:
            if part["type"] == "text":
                text = part["text"].strip()
                position = rendered.find(text, position) + len(text)
                if position < len(text):
                    detail = f"the chat template leaves out or changes {part['text']!r:.200}, of the {message['role']}"
                    raise BadRow("text left out", detail)


# ---------------------------------------------------------------------------------------------------- texts and labels


def special_tokens(tokenizer):
    """The texts of a tokenizer's special tokens, such as </s>."""
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def refuse_control_tokens(text, control_tokens, place):
    """Raises BadRow if a text of a row contains one of these: the tokenizer would not read it as text."""
    typed = [token for token in control_tokens if token in text]
    if typed:
        detail = f"{typed[0]} in {place} is text, but the tokenizer would read it as a control token: remove it"
        if typed[0] in ("<think>", "</think>"):
            detail += ", or --enable_thinking true, if it is a thought at the beginning of an answer"
        raise BadRow("control token", detail)


def question_turn(question, images):
    """A question about PIL images -> the user's turn."""
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def text_of(message):
    """The words of a message, without its images."""
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


def pil_images(messages):
    """The images of a conversation, in their order."""
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]


def load_images(messages, max_aspect_ratio=200):
    """Messages with images as a row has them -> the same messages, with PIL images. Raises BadRow."""
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                part["image"] = load_image(part["image"], max_aspect_ratio=max_aspect_ratio)
    return messages


def last_answer(messages):
    """The index of the assistant's last message."""
    return max(n for n, message in enumerate(messages) if message["role"] == "assistant")


def next_tokens(labels):
    """labels (B, L) -> what each position must predict (B, L): the label of the next one, -100 where there is none."""
    return torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


def mark_trained_tokens(batch, processor, n=0):
    """Row n of a batch as text: trained tokens in «», runs of image tokens folded, padding left out."""
    is_token = batch["attention_mask"][n].bool()
    ids = batch["input_ids"][n][is_token].tolist()
    labels = batch["labels"][n][is_token].tolist()
    decode = processor.tokenizer.decode
    kinds = ["untrained" if label == -100 else "trained" for label in labels]
    kinds = ["image" if token in processor.image_token_ids else kind for token, kind in zip(ids, kinds, strict=True)]
    text, start = "", 0
    for kind, run in itertools.groupby(kinds):
        end = start + len(list(run))
        piece = decode(ids[:end])[len(decode(ids[:start])) :]  # a run by itself would lose its leading space
        if kind == "image":
            piece = f"<image> x {end - start}"
        elif kind == "trained":
            piece = f"«{piece}»"
        text += piece
        start = end
    return text


# --------------------------------------------------------------------------------------------------------------- model


def nf4_quantization(load_in_4bit, dtype, skip_modules):
    """4-bit NF4 with double quantization (QLoRA, arXiv:2305.14314), computing in `dtype`; None without load_in_4bit.
    `skip_modules` keep their 16 bits. They replace bitsandbytes' own list, so name lm_head, too. They are full paths:
    a bare "vision_tower" would match nothing."""
    if not load_in_4bit:
        return None
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    if uses_fsdp():  # it can share out 4-bit weights if they are packed in numbers of the dtype it computes in
        nf4["bnb_4bit_quant_storage"] = dtype
    return transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip_modules, **nf4)


def keep_4bit_trainable_on_cpu(model):
    """On a CPU, bitsandbytes' first eval() would repack 4-bit weights for a kernel that has no autograd."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_inside(name, path):
    """Whether a weight or module is the module `path` or inside it. PEFT's prefix may be in front of its name."""
    return f".{path}." in f".{name}."


def lora_targets(names, language_model, default):
    """--lora_target_modules -> what LoraConfig takes: `default`, or a regex that must match a module's full path.
    One name with regex characters is that regex. Others are names of layers within `language_model`, a path."""
    if not names:
        return default
    is_one_regex = len(names) == 1 and re.search(r"[\\^$*+?|()\[\]{}]", names[0])
    if not is_one_regex:
        return layers_within(language_model, names)
    try:
        re.compile(names[0])
    except re.error as error:
        fail(f"--lora_target_modules {names[0]!r} is not a valid regular expression: {error}")
    return names[0]


def layers_within(path, names):
    """A regex of the full paths of all modules of these names in the module `path`."""
    return rf"{re.escape(path)}\.(.*\.)?({'|'.join(map(re.escape, names))})"


def train_in_float32(trainer):
    """Make trained weights float32: in 16 bits small steps round to nothing, and fp16 gradients cannot be scaled."""
    if trainer.is_deepspeed_enabled and weight_dtype(trainer.args) != torch.float32:
        return  # it keeps float32 copies of its own
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def without_zero3():
    """A context in which a process makes a whole model by itself; ZeRO-3 would shard it over all processes."""
    return patch.object(transformers.integrations.deepspeed, "_hf_deepspeed_config_weak_ref", None)


def uses_fsdp():
    """Whether `accelerate launch` was given a configuration for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


def shares_weights():
    """Whether each process has a share of the weights, so that all must run the same parts of the model in step."""
    return uses_fsdp() or is_deepspeed_zero3_enabled()


def place_of_weights(training):
    """What from_pretrained takes as device_map. ZeRO-3 shares weights out while they are loaded; FSDP2 takes them from
    the CPU, layer by layer, so a GPU never holds all of them."""
    if is_deepspeed_zero3_enabled():
        return None
    return {"": "cpu" if uses_fsdp() else training.device}


def empty_model(settings):
    """The model without weights (on the meta device), to look at its modules before any are loaded."""
    cannot_be_read = fail_on_error(f"--model_name_or_path {settings.model_name_or_path}")
    with cannot_be_read, without_zero3(), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(settings.model_name_or_path, revision=settings.model_revision)
        return transformers.AutoModelForImageTextToText.from_config(config)


def print_parameters(model, parts):
    """Print how many parameters each part of the model has, how many of them are trained, and how many are in 4-bit.
    A weight belongs to the longest part that its name contains, or else to the last one."""
    counts = {part: Counter() for part in parts}
    for name, parameter in model.named_parameters():
        if "original_module." in name:  # PEFT trains a copy of it
            continue
        count = counts[max((part for part in parts if part in name), key=len, default=parts[-1])]
        size = getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 a process has a share of it
        if type(parameter).__name__ == "Params4bit":
            size *= 2 * parameter.element_size()  # a byte holds two
            count["in 4-bit"] += size
        count["all"] += size
        count["trained"] += size if parameter.requires_grad else 0
    for part, count in counts.items():
        if count["all"] > 0:
            line = f"{part:22s}{count['trained']:>14,} of {count['all']:>14,} parameters trained"
            say(f"{line}, {count['in 4-bit']:>14,} in 4-bit")


KERNELS = [  # what a model has, how its configuration shows it, the module with kernels for it, their package
    ("linear attention", ["linear_conv_kernel_dim"], "fla.ops.gated_delta_rule", "fla-core==0.6.0"),
    ("short convolutions", ["linear_conv_kernel_dim", "conv_L_cache"], "causal_conv1d", "causal-conv1d==1.7.0"),
]


def print_kernels(config, device):
    """Say whether linear attention (Qwen3.5, MiniCPM-V 4.6) and short convolutions (these, LFM2) run on kernels made
    for them. Transformers takes what it can import. Raises SystemExit on a CPU, where the kernels would not run."""
    on_cpu = device.type == "cpu"
    for what, signs, module, package in KERNELS:
        if not any(hasattr(config.get_text_config(), sign) for sign in signs):
            continue
        try:
            importlib.import_module(module)
        except Exception:  # Transformers, too, takes whatever is raised for "not installed"
            remedy = f", slower than kernels: pip install --no-build-isolation {package}"
            say(f"{what}: PyTorch" if on_cpu else f"{what}: PyTorch{remedy}")
            continue
        remedy = f"pip uninstall {package.partition('==')[0]}"
        require(not on_cpu, f"{what} would run on kernels of {package}, which need a GPU; on a CPU: {remedy}")
        say(f"{what}: kernels of {package.partition('==')[0]}")


def optimizer_by_part(trainer, rate_of, logged_rate):
    """The optimizer of --optim, with a learning rate for each weight: `rate_of(name)`. Biases and norms do not decay.
    Weights with `logged_rate` come first: the first group's rate is the one that is logged."""
    decayed = trainer.get_decay_parameter_names(trainer.model)
    members = defaultdict(list)  # (learning rate, whether it decays) -> weights
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            members[rate_of(name), name in decayed].append(parameter)

    groups = []
    for rate, decays in sorted(members):
        weight_decay = trainer.args.weight_decay if decays else 0.0
        groups.append({"params": members[rate, decays], "lr": rate, "weight_decay": weight_decay})
    groups.sort(key=lambda group: group["lr"] != logged_rate)  # False comes first
    optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    return optimizer_class(groups, **options)


# ------------------------------------------------------------------------------------------------- training and saving


class SafeTrainer:
    """What a recipe's Trainer has besides its loss, put before its own class by make_safe. In training and evaluation
    each row counts once, however many processes share the rows. Nothing is saved that is not whole, or not finite."""

    is_uneven = False  # in the last step of an epoch, if the processes have unequal numbers of rows
    repeats = None  # a batch of this step that is not trained: it repeats a row, where this process has none left
    is_repeat = False  # whether this batch is that one
    num_evaluated = 0  # rows of the evaluation
    eval_totals = 0  # (2, K): the sums of K losses, and of how many values each is the sum
    metric_counts_of_batches = ()  # of the evaluation: see trained_tokens
    num_nonfinite = 0  # steps in a row whose gradient was not finite
    evaluation_is_due = False  # at a checkpoint that SIGTERM asked for
    saved_step = None  # of the newest checkpoint
    unreadable = ()  # rows in whose place others were trained: [(number, reason and detail)]
    is_saving_result = False

    def _get_dataloader(self, *args, is_training=False, **kwargs):
        with patch("accelerate.data_loader.BatchSamplerShard", RowsOnce):
            loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        # The loader that Accelerate has put into its own is the one that starts processes.
        inner = loader.base_dataloader
        inner.worker_init_fn = functools.partial(init_worker, inner.worker_init_fn)
        if is_training:
            inner.collate_fn = ReadableRows(inner.collate_fn, inner.dataset, self.args.seed)
        return loader

    def find_repeats(self, num_rows, batch_size):
        """At the end of an epoch the processes may have unequal numbers of rows (is_uneven), and some have none: their
        batch repeats a row (is_repeat), see RowsOnce. To be called right after a batch was loaded."""
        is_last_batch = self.accelerator.gradient_state.end_of_dataloader
        rows_left = num_rows % (batch_size * self.args.world_size)  # for the last batches of all processes
        rows_before_mine = batch_size * self.args.process_index
        self.is_uneven = is_last_batch and rows_left > 0 and self.args.world_size > 1
        self.is_repeat = self.is_uneven and rows_left <= rows_before_mine

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step, and how many trained tokens they have, in all processes."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        stop_or_note_unreadable(self, batches)
        self.find_repeats(len(self.train_dataset), self.args.train_batch_size)
        self.repeats = None
        if self.is_repeat:
            self.repeats = batches[-1] = without_targets(batches[-1])
        if self.is_uneven:  # in all processes, since they count together
            num_items = self._get_num_items_in_batch(batches, device)
        return batches, num_items

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.is_repeat = inputs is self.repeats
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, *args, **kwargs):
        is_training, zero = torch.is_grad_enabled(), None
        if is_training and self.is_deepspeed_enabled:
            zero = zero_of_unused(self)  # made first, it comes last in backward: the same order in all processes
        with contextlib.ExitStack() as stack:
            if self.is_uneven:  # TRL gathers what it logs
                gathers = dict.fromkeys(("gather", "gather_for_metrics"), self.gather_rows)
                stack.enter_context(patch.multiple(self.accelerator, **gathers))
            loss = super().compute_loss(*args, **kwargs)
        if is_training and self.is_fsdp_enabled:
            zero = zero_of_unused(self)  # made last, since FSDP2 gathers these weights in the forward pass
        return loss if zero is None else loss + zero

    def gather_rows(self, values):
        """The values (N,) of all processes' rows, of which each may have another number, or none."""
        values = values.flatten()[:0] if self.is_repeat else values.flatten()
        return torch.cat(gather_object([values.cpu()])).to(values.device)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """Trainer's, with an eval_loss (and TRL's metrics) that do not depend on batches and processes. eval_loss is
        the mean over all trained tokens of the evaluated rows."""
        self.num_evaluated, self.eval_totals = len(dataloader.dataset), 0
        self.metric_counts_of_batches = []
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums, counts = self.accelerator.gather(self.eval_totals[None]).sum(dim=0)
        output.metrics[f"{metric_key_prefix}_loss"] = (sums / counts).sum().item()
        if hasattr(self, "_metrics"):
            self.weigh_metrics(self._metrics["eval"])
        self.is_uneven = self.is_repeat = False
        return output

    def weigh_metrics(self, metrics):
        """TRL's metrics, {name: means of the batches} -> {name: [mean]}, in which a large batch counts more."""
        starts = list(self.metric_counts_of_batches[0])  # how names of metrics begin; "" fits all
        counts = torch.stack([torch.stack(list(of_batch.values())) for of_batch in self.metric_counts_of_batches])
        counts = self.accelerator.gather(counts[None]).sum(dim=0)  # of all processes: (batches, starts)
        for name, means in metrics.items():
            start = max((start for start in starts if name.startswith(start)), key=len)  # the longest that fits
            weights = counts[:, starts.index(start)].tolist()
            if len(means) == len(weights):  # num_tokens is one number
                total = sum(mean * weight for mean, weight in zip(means, weights, strict=True))
                means[:] = [total / sum(weights)]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        self.find_repeats(self.num_evaluated, self.args.eval_batch_size)
        if self.is_repeat:
            inputs = without_targets(inputs)
        # A recipe whose losses are not means over trained tokens has these two methods.
        sum_losses = getattr(self, "sum_losses", functools.partial(sum_token_losses, self))
        metric_counts = getattr(self, "metric_counts", trained_tokens)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums, counts = sum_losses(model, inputs)
        self.eval_totals = self.eval_totals + torch.stack([sums, counts]).double()
        self.metric_counts_of_batches = [*self.metric_counts_of_batches, metric_counts(inputs)]
        if prediction_loss_only:
            return sums.sum(), None, None
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # for compute_metrics

    def _get_grad_norm(self, model, grad_norm=None):
        """Trainer's. If it is not finite, there are no gradients any more, so the optimizer does nothing."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if grad_norm is None or math.isfinite(grad_norm):  # DeepSpeed may not say
            self.num_nonfinite = 0
        elif not has_overflow(self.accelerator.scaler):
            self.num_nonfinite += 1
            for parameter in model.parameters():
                parameter.grad = None
            say(f"step {self.state.global_step + 1}: its gradient is not finite, so the weights stay as they are")
            if self.num_nonfinite >= self.args.stop_on_nonfinite:
                stop_on_nonfinite(self)
        return grad_norm

    def _determine_best_metric(self, metrics, trial):
        return self.num_nonfinite == 0 and super()._determine_best_metric(metrics, trial)

    def _save_checkpoint(self, model, trial):
        """Trainer's, with what StopAndResume needs to go on with the log, and checksums of all files, written last."""
        if self.num_nonfinite > 0:
            say(f"step {self.state.global_step}: no checkpoint, since the gradient is not finite")
            return
        if self.saved_step == self.state.global_step and not self.evaluation_is_due:
            return  # SIGTERM came while it was saved
        require_finite(self)
        folder, args = checkpoint_folder(self), self.args
        if args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed as it wrote it
            folder.mkdir()
            write_whole(folder / CHECKSUMS, "{}")  # of no files yet: it is incomplete
        self.accelerator.wait_for_everyone()
        with patch.object(args, "save_total_limit", None):  # it would remove old ones before this one is whole
            super()._save_checkpoint(model, trial)
        write_log_state(self)
        self.accelerator.wait_for_everyone()
        if args.should_save:
            write_checksums(folder)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(args.output_dir, args.save_total_limit, best_model_checkpoint=best, use_mtime=True)
        self.accelerator.wait_for_everyone()  # before SIGTERM may end a process
        self.saved_step = self.state.global_step

    def save_state(self):
        """Trainer's, but it writes a whole trainer_state.json or none: the file says that the run is finished."""
        if self.args.should_save:
            part = os.path.join(self.args.output_dir, "trainer_state.part")
            self.state.save_to_json(part)
            os.replace(part, os.path.join(self.args.output_dir, "trainer_state.json"))

    def save_model(self, *args, **kwargs):
        with contextlib.ExitStack() as stack:
            if self.is_fsdp_enabled:
                stack.enter_context(patch.object(self.accelerator, "get_state_dict", gathered_weights))
            super().save_model(*args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        with patch.object(self.args, "hub_token", None):  # it would stand in training_args.bin
            super()._save(output_dir, state_dict)


class ReadableRows:
    """Rows -> a batch, by `collate`. In the place of a row that cannot be read comes another one, drawn by seed, so
    that a step keeps its number of rows; the batch then has `unreadable`, [(number of the row, reason and detail)]."""

    def __init__(self, collate, rows, seed):
        self.collate, self.rows, self.seed = collate, rows, seed

    def __call__(self, rows):
        with contextlib.suppress(BadRow):  # if it is raised, find out below which row is bad
            return self.collate(rows)
        readable, unreadable = [], []
        for row in rows:
            draw = random.Random(f"{self.seed} {row['row']}")  # the same row when a run is resumed
            for _ in range(100):
                problem = self.problem_of(row)
                if problem is None:
                    break
                unreadable.append((row["row"], problem))
                row = self.rows[draw.randrange(len(self.rows))]
            readable.append(row)
        batch = self.collate(readable)
        batch["unreadable"] = unreadable
        return batch

    def problem_of(self, row):
        try:
            self.collate([row])
        except BadRow as error:
            return str(error)
        return None


def stop_or_note_unreadable(trainer, batches):
    """Take what ReadableRows found out of the batches of a step. Unless such rows may be left out, save a checkpoint
    and end the program before this step, in all processes. Raises SystemExit."""
    found = [problem for batch in batches for problem in batch.pop("unreadable", ())]
    args, step = trainer.args, trainer.state.global_step
    must_stop = False
    for _, problem in found:
        is_long = problem.startswith("too long")
        must_stop |= args.as_given["on_long_rows" if is_long else "on_bad_rows"] == "stop"
    if args.world_size > 1:
        must_stop = bool(trainer.accelerator.gather(torch.tensor([must_stop], device=args.device)).any())
    if not must_stop:
        trainer.unreadable = [*trainer.unreadable, *found]
        for number, problem in found:
            print(f"row {number} cannot be trained on, another one takes its place: {problem}")
        return
    saved = "No step is done yet."
    if step > 0:
        trainer._save_checkpoint(trainer.model, None)
        saved = f"The checkpoint of step {trainer.saved_step} is saved." if trainer.saved_step else "None is saved."
    rows = sorted(set(map(tuple, gather_object(found))))  # tuples again: pin_memory makes lists of them
    shown = "\n".join(f"row {number} cannot be trained on: {problem}" for number, problem in rows)
    remedy = (
        "Repair it, or train without such rows (--on_bad_rows skip, --on_long_rows drop): the same command resumes"
    )
    fail(f"{shown}\n{saved} {remedy}. (A file that is gone must come back even so.)")


def say_unreadable(trainer):
    """List the rows in whose place others were trained."""
    rows = sorted(set(map(tuple, gather_object(list(trainer.unreadable)))))
    if rows:
        shown = "\n".join(f"  row {number}: {problem}" for number, problem in rows[:20])
        say(f"{len(rows)} rows could not be trained on; others took their places (at most 20 shown):\n{shown}")


def zero_of_unused(trainer):
    """A zero that gives the trained weights of tower and projector a gradient, of zeros where they had none. A batch
    without images does not use them, but ZeRO-2 and FSDP2 must sum the same gradients in all processes."""
    if is_deepspeed_zero3_enabled():
        return None  # there each process has images: rows without are refused, or shown a blank one
    model = trainer.accelerator.unwrap_model(trainer.model)
    always_used = {*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()}
    trained = [weight for weight in model.parameters() if weight.requires_grad and weight not in always_used]
    return 0 * sum(weight.sum(dtype=torch.float32) for weight in trained)


class RowsOnce(BatchSamplerShard):
    """The batches of one process. Accelerate's make the last ones of an epoch as large as the others, by repeating
    rows. Here they do not. A process that is left without a row gets one that another one has, since all must take
    part in each step; it is not trained."""

    def __iter__(self):
        if self.batch_size is None:  # of train_sampling_strategy batch_rebalance, which repeats no rows
            yield from super().__iter__()
            return
        num_rows = len(self.batch_sampler.sampler)
        for n, batch in enumerate(super().__iter__()):
            number = n * self.num_processes + self.process_index  # of this batch, among those of all processes
            rows_left = num_rows - number * self.batch_size  # 0 or less: all rows are taken
            yield batch[: max(1, rows_left)]


def sum_token_losses(trainer, model, inputs):
    """The loss of an evaluation's batch as a sum over its trained tokens, and how many these are. 2 x (1,)"""
    # Trainer divides by num_items_in_batch, and multiplies by the number of processes.
    divisor = trainer.args.world_size if trainer.args.average_tokens_across_devices else 1
    loss = trainer.compute_loss(model, inputs, num_items_in_batch=divisor)
    return loss.reshape(1), trained_tokens(inputs)[""].reshape(1)


def trained_tokens(batch):
    """{how names of TRL's metrics begin: of how many things in this process's batch they are means}."""
    return {"": (batch["targets"] != -100).sum()}


def make_safe(trainer):
    """Put SafeTrainer's methods before the trainer's own. (Its class stands above the line, SafeTrainer below it, so
    it cannot be a base of that class.)"""
    if not isinstance(trainer, SafeTrainer):
        own_class = type(trainer)
        trainer.__class__ = type(own_class.__name__, (SafeTrainer, own_class), {})


def without_targets(batch):
    """A batch in which no token is trained. (dpo_idefics2.py's batches have no labels: its Trainer sees to them.)"""
    batch = dict(batch)
    if "labels" in batch:
        batch["labels"] = torch.full_like(batch["labels"], -100)
        batch["targets"] = batch["targets"].new_full((1,), -100)  # one that is ignored, since kernels want some
        batch["trained_at"] = batch["trained_at"].new_zeros(1)
    return batch


def has_overflow(scaler):
    """Whether fp16's scaler will skip this step itself, and lower its scale. At 1 there is nothing left to lower."""
    return scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1


def stop_on_nonfinite(trainer):
    """End the program, naming the rows of this step. Raises SystemExit."""
    rows = ", ".join(map(str, rows_of_step(trainer)))
    steps = f"{trainer.num_nonfinite} steps in a row had gradients that are not finite"
    remedy = "a lower --learning_rate or other rows may help; --stop_on_nonfinite allows for more such steps"
    fail(f"{steps}, the last one of the rows {rows}. The newest checkpoint is of before: {remedy}")


def rows_of_step(trainer):
    """The numbers of the rows of the step at hand, of all processes."""
    accumulation, loader = trainer.args.gradient_accumulation_steps, trainer.get_train_dataloader()
    epoch, step = divmod(trainer.state.global_step, math.ceil(len(loader) / accumulation))
    loader.set_epoch(epoch)
    batches = itertools.islice(loader.batch_sampler, step * accumulation, (step + 1) * accumulation)
    rows = trainer.train_dataset.with_format(None)
    return sorted(set(gather_object([rows[n]["row"] for batch in batches for n in batch])))


def require_finite(trainer):
    """Stop before weights are saved that are not finite, or after steps that changed none. Raises SystemExit."""
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    is_finite = torch.stack([torch.isfinite(share_of(weight)).all() for weight in trained.values()])
    is_finite = trainer.accelerator.gather(is_finite[None]).all(dim=0).tolist()  # of all shares
    broken = [name for name, finite in zip(trained, is_finite, strict=True) if not finite]
    remedy = "nothing is saved; the newest checkpoint is of before. A lower --learning_rate may help"
    require(not broken, f"step {trainer.state.global_step}: {broken[:1]} has weights that are not finite: {remedy}")
    require(trainer.num_nonfinite == 0, f"the last {trainer.num_nonfinite} gradients are not finite: {remedy}")


def share_of(weight):
    """What this process has of a weight: all of it, or a share, of ZeRO-3 or FSDP2."""
    weight = getattr(weight, "ds_tensor", weight)
    return weight.to_local() if isinstance(weight, DTensor) else weight


def share_out_layers(trainer):
    """FSDP2: each decoder layer is shared out for itself. All else (tower, projector, head) stays whole during a step,
    so that a process may have images while another one has none. Gradients are summed in float32."""
    if trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        decoder = trainer.accelerator.unwrap_model(trainer.model).get_decoder()
        layers = getattr(decoder, "layers", None)
        require(layers is not None, f"FSDP2: no layers to share out are found in a {type(decoder).__name__}")
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
        if trainer.args.bf16:
            plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)


def gathered_weights(model):
    """FSDP2: the whole weights, or adapters without their base, for the first process to save. All must call this."""
    only_trained = hasattr(model, "peft_config")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=only_trained)
    return get_model_state_dict(model, options=options)


def train_and_save(trainer, checkpoint=None):
    """Print the plan, train, save the result in output_dir. Raises SystemExit."""
    args = trainer.args
    make_safe(trainer)
    share_out_layers(trainer)
    fill_card(trainer)
    steps, steps_per_epoch = print_plan(trainer, checkpoint)
    lock(args)
    if args.should_save:
        write_settings(args)
        warn_if_disk_is_small(trainer, steps)
    if checkpoint is not None:
        only_load_the_result(args, checkpoint, steps, steps_per_epoch)
    trainer.add_callback(StopAndResume(trainer, checkpoint))
    with fail_on_trouble(trainer, checkpoint):
        trainer.train(resume_from_checkpoint=checkpoint)
        say_unreadable(trainer)
        require_finite(trainer)
        trainer.is_saving_result = True
        trainer.save_model()  # also pushes to the hub with --push_to_hub
        trainer.save_state()  # last: its file says that the run is finished
    if args.load_best_model_at_end:
        print_best(trainer.state, args.metric_for_best_model)
    trainer.accelerator.wait_for_everyone()  # a process that leaves while another one writes may take it down
    RUN.peers = ()  # from here on they may end
    if args.world_size > 1:
        time.sleep(0.5)  # Gloo ends that barrier in a thread, which aborts as Python ends: PyTorch's issue 190489
    trainer.accelerator.end_training()
    unlock()
    say(f"saved {args.output_dir}: model or adapter, processor, settings.yaml, trainer_state.json (the log)")


@contextlib.contextmanager
def fail_on_trouble(trainer, checkpoint):
    """End the program with one message if data, disk or keyboard end the training within the `with` block."""
    output_dir = trainer.args.output_dir
    try:
        yield
    except BadRow as error:
        # If a loader process raised it, its text is a whole traceback, which ends with "BadRow: reason: detail".
        problem = str(error).splitlines()[-1].rpartition("BadRow: ")[2]
        sys.exit(f"error: the data changed during the run: {problem}")  # not fail(): perhaps only this process met it
    except pickle.UnpicklingError:
        fail(f"{checkpoint} holds a file that is damaged, or that holds code: it was not run. Delete this checkpoint")
    except KeyboardInterrupt:
        fail(INTERRUPTED.format(output_dir))
    except (OSError, RuntimeError, SafetensorError) as error:
        if DISK_TROUBLE.search(str(error)):
            sys.exit(f"error: {output_dir} cannot be written: {remove_half_written(trainer, error)}")
        # Perhaps another process died, and this error only follows from that.
        if len(RUN.peers) > 1:
            time.sleep(1)  # a process that was just killed is still listed as alive
        if all(is_alive(pid) for pid in RUN.peers):
            raise  # an error of this process
        sys.exit("error: another process of this run has ended, and with it this one; the same command resumes")


def print_best(state, metric):
    """Say which checkpoint is the result."""
    if state.best_model_checkpoint is not None:
        say(f"best {metric}: {state.best_metric:.4g}, at step {state.best_global_step}; that is saved")
    elif state.best_metric is not None:
        say(f"no evaluation gave a {metric} that is a number, so the last weights are saved")


def rows_per_step(training):
    """The rows of an optimizer step, in all processes together."""
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def print_plan(trainer, checkpoint):
    """Print what will be trained. Returns the optimizer steps of the whole run, and of an epoch."""
    args, num_rows = trainer.args, len(trainer.train_dataset)
    steps_per_epoch = math.ceil(num_rows / rows_per_step(args))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    start = f"resuming from {checkpoint}" if checkpoint else "from the start"
    say(
        f"{num_rows} rows to train on, {len(trainer.eval_dataset or ())} to evaluate; "
        f"{steps} steps of {rows_per_step(args)} rows, {steps / steps_per_epoch:.2f} epochs; {start}"
    )
    return steps, steps_per_epoch


# These stand in settings.yaml as comments, since --config takes keys for flags. Earlier versions wrote only some.
ROWS_NOTE = "# Rows in a step: "
PROCESSES_NOTE = "# Processes: "
RECIPE_NOTE = "# SHA-256 of the recipe: "
DIGEST_NOTE = "# Rows, by their numbers and lengths: "


def write_settings(training):
    """Write settings.yaml, atomically. A trainer_state.json, the mark of a finished run, is removed."""
    output_dir = Path(training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    text = f"# {Path(__file__).name}\n{ROWS_NOTE}{rows_per_step(training)}\n"
    text += f"{PROCESSES_NOTE}{training.world_size}\n{RECIPE_NOTE}{sha256_of(__file__)}\n"
    if hasattr(training, "rows_digest"):  # see require_same_rows
        text += f"{DIGEST_NOTE}{training.rows_digest}\n"
    text += yaml.safe_dump(training.as_given, sort_keys=False)
    write_whole(output_dir / "settings.yaml", text)
    (output_dir / "trainer_state.json").unlink(missing_ok=True)


def write_whole(file, text):
    """Write a file so that whoever reads it finds the old text or the new one, and no part of one."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


# ------------------------------------------------------------------------- samples.md, and answers for your own metric
Answer = namedtuple("Answer", "text num_tokens ended")  # ended: by itself, not cut off at the largest number of tokens


def answer_rows(trainer, rows, max_new_tokens):
    """Greedy answers to the last question of each row: a list of Answer, the same in all processes. Each process
    answers a run of the rows; where all must work in step, each answers all of them."""
    share = range(len(rows))
    if not shares_weights():
        process, processes = PartialState().process_index, PartialState().num_processes
        share = share[len(rows) * process // processes : len(rows) * (process + 1) // processes]
    batch_size = trainer.args.per_device_eval_batch_size
    answers = []  # (number of the row, Answer)
    for start in range(0, len(share), batch_size):
        numbers = share[start : start + batch_size]
        batch = answer_batch(trainer, [rows[n] for n in numbers], max_new_tokens)
        answers += zip(numbers, batch, strict=True)
    answer_of_row = dict(gather_object(answers))
    return [answer_of_row[n] for n in range(len(rows))]


def answer_batch(trainer, rows, max_new_tokens):
    """Greedy answers to the last question of each row, generated together: a list of Answer."""
    collator, device = trainer.data_collator, trainer.args.device
    conversations = [collator.messages_of(row) for row in rows]
    questions = [messages[: last_answer(messages)] for messages in conversations]
    batch = collator.tokenize(questions, prompt=True).to(device)
    trainer.model.eval()  # each training step turns training mode on again
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "use_cache": True}
    options["eos_token_id"] = collator.stop_ids
    options["max_length"] = None  # the one in the model's generation config would only cause a warning
    with torch.no_grad(), trainer.accelerator.autocast():
        ids = trainer.model.generate(**batch, **options)
    ids = ids[:, batch["input_ids"].shape[1] :]
    is_stop = torch.isin(ids, torch.tensor(collator.stop_ids, device=device))
    is_over = is_stop.cumsum(dim=1) > 0  # from the stop token on, also in the padding after it
    answers = []
    for row_ids, over in zip(ids, is_over, strict=True):
        text = collator.processor.tokenizer.decode(row_ids, skip_special_tokens=True).strip()
        text = unicodedata.normalize("NFC", text)  # as texts of rows are read
        answers.append(Answer(text, num_tokens=int((~over).sum()), ended=bool(over.any())))
    return answers


class AnswerSamples(transformers.TrainerCallback):
    """After each evaluation, answer the last question of the first few held-out rows, into samples.md."""

    def __init__(self, trainer, num_rows, max_new_tokens):
        self.trainer = trainer
        self.num_rows, self.max_new_tokens = num_rows, max_new_tokens

    def on_evaluate(self, args, state, control, **kwargs):
        rows = self.trainer.eval_dataset.take(min(self.num_rows, len(self.trainer.eval_dataset)))
        samples = []
        for row, answer in zip(rows, answer_rows(self.trainer, rows, self.max_new_tokens), strict=True):
            messages = self.trainer.data_collator.messages_of(row)
            last = last_answer(messages)
            texts = [text_of(messages[last - 1]), text_of(messages[last]), answer.text]
            samples.append((row["row"], messages, texts))
        if state.is_world_process_zero and samples:
            columns = ["picture", "question", "right", "answered"]
            append_samples(args.output_dir, f"Step {state.global_step}", columns, samples)


TABLES = 50  # samples.md keeps the newest


def append_samples(output_dir, title, columns, samples):
    """Append a table to samples.md, its images to samples/. A sample is (row number, messages with images, texts); the
    texts fill the columns after the first, which holds the images."""
    folder = Path(output_dir, "samples")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"\n## {title}\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for number, messages, texts in samples:
        links = []
        for n, image in enumerate(pil_images(messages)):
            ImageOps.contain(image, (336, 336)).save(folder / f"{number}-{n}.png")
            links.append(f"![](samples/{number}-{n}.png)")
        cells = [" ".join(text.replace("|", "&#124;").split()) for text in [" ".join(links), *texts]]
        lines.append(f"| {' | '.join(cells)} |")
    file = Path(output_dir, "samples.md")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    tables = re.split(r"^(?=\n## )", text, flags=re.MULTILINE)
    tables = [table for table in tables if not table.startswith(f"{lines[0]}\n")]  # of before this run was killed
    write_whole(file, "".join(tables[1 - TABLES :]) + "\n".join(lines) + "\n")


# --------------------------------------------------------------------------------------------------------- only checks


def check_common_flags(settings, training, memory_needed, metrics=("loss",)):
    """Stop if the machine, or flags that every recipe has, cannot work. Raises SystemExit.
    `metrics`: what the best checkpoint may be chosen by: the lowest loss, or the highest value of another one."""
    has_device = training.use_cpu or training.device.type != "cpu"
    require(has_device, f"no GPU found ({memory_needed}); for tiny models: --use_cpu")
    if training.n_gpu > 1:
        launch = f"accelerate launch --num_processes {training.n_gpu} {Path(__file__).name}"
        fail(f"{training.n_gpu} GPUs, but one process. For all: {launch}. For one: CUDA_VISIBLE_DEVICES=0")

    require(0 <= training.learning_rate < 10, "--learning_rate must be from 0 to below 10")
    require(rows_per_step(training) > 0, "a step must have rows: a batch and its accumulation are at least 1")
    require(training.per_device_eval_batch_size >= 1, "--per_device_eval_batch_size must be at least 1")
    longest = getattr(training, "max_length", None)
    require(longest is None or longest > 0, "--max_length must be above 0; without a limit it is null")
    is_known = re.fullmatch(r"all|auto|auto:all|(auto:)?[1-9]\d*", settings.check_rows)
    require(is_known, f"--check_rows {settings.check_rows}: it must be auto, all, or a number of rows")
    require(settings.max_eval_rows >= 1, "--max_eval_rows must be at least 1; --eval_strategy no turns evaluation off")
    instead = "leave it out: a recipe writes one anyway, and does not take the run for finished"
    require(not training.enable_jit_checkpoint, f"--enable_jit_checkpoint, a checkpoint on SIGTERM: {instead}")
    check_shares(settings, training)
    if training.load_best_model_at_end:
        check_best_model(training, metrics)
    try:  # tested now: otherwise they fail after the long loading of the weights
        for callback in transformers.integrations.get_reporting_integration_callbacks(training.report_to):
            callback()
        if training.push_to_hub:
            HfApi(token=training.hub_token).whoami()
    except Exception as error:  # each integration has exceptions of its own
        fail(f"--report_to or --push_to_hub: {error}")


def check_shares(settings, training):
    """Stop if weights cannot be shared out as `accelerate launch --config_file` wants it. Raises SystemExit."""
    if is_deepspeed_zero3_enabled():
        in_4_bits = getattr(settings, "load_in_4bit", False) or getattr(settings, "q_lora", False)
        remedy = "FSDP2 shares them out, ZeRO-2 and DDP keep them whole"
        require(not in_4_bits, f"4 bits and ZeRO-3: it cannot share out 4-bit weights while it loads them; {remedy}")
    if training.deepspeed_plugin is not None or uses_fsdp():
        apart = training.save_on_each_node
        require(not apart, "--save_on_each_node: checkpoints of DeepSpeed and FSDP2 want one disk for all machines")
    if uses_fsdp():
        version = os.environ.get("FSDP_VERSION", "1")
        require(version == "2", f"fsdp_version {version}: it cannot train some weights and freeze others; take 2")
        saved = os.environ.get("FSDP_STATE_DICT_TYPE", "").upper()
        require(saved == "FULL_STATE_DICT", "fsdp_state_dict_type must be FULL_STATE_DICT: others save no result")
        require(not training.fp16, "--fp16 and FSDP2: nobody has tried it; GPUs with bf16 are needed")
        optimizer = training.optim.value
        remedy = "bitsandbytes' optimizers cannot update shares of weights: --optim adamw_torch"
        require(not re.search("bit|bnb|paged|ademamix", optimizer), f"--optim {optimizer} and FSDP2: {remedy}")


def check_best_model(training, metrics):
    """Stop if the best checkpoint could not be found: another metric, the wrong direction, or not saved."""
    metric = str(training.metric_for_best_model).removeprefix("eval_")
    require(metric in metrics, f"--metric_for_best_model {metric}: this recipe computes {' and '.join(metrics)} only")
    higher_is_better = metric != "loss"
    flag = f"--greater_is_better {str(training.greater_is_better).lower()}"
    require(training.greater_is_better == higher_is_better, f"{flag} would keep the worst checkpoint by {metric}")
    if training.eval_strategy == training.save_strategy == "steps":
        message = "to keep the best: --save_steps equal to --eval_steps, or --load_best_model_at_end false"
        require(training.eval_steps == training.save_steps, message)


# Columns whose values are media, also beside an image that is read: reference_image, image_list.
SECOND_MEDIA = re.compile(
    r"\w+_(image|img|picture|photo|frame)s?|(image|img|pic|picture|photo|video|audio)s?_list|media"
)


# Columns that are not worth naming.
HARMLESS_COLUMN = re.compile(
    r"(\w+_)?(ids?|idx|index|uid|uuid|source|src|split|dataset|ds_name|url|license|meta|metadata|info|tags?|type|task"
    r"|topic|category|scores?|rating|model|generator|lang|language|date|time|timestamp|width|height|hash|sha\d*|key)"
    r"|\w+id|score_\w+|unnamed.*|__index_level_\d__"
)


def check_columns(rows, columns, images, name, settings):
    """Rows without the columns of --ignore_columns. Prints the names of others that are not read (not in `columns`).
    Raises SystemExit if a row has a value in one that changes what it means, or if texts hold lists or dicts as text.
    images: the columns that may hold a row's images; beside one, a column like image_path names the same image."""
    for flag in ("ignore_columns", "text_columns"):
        for column in getattr(settings, flag) or ():  # ignored may also be a key of turns
            alike = did_you_mean(column, rows.column_names)
            require(column in rows.column_names or not alike, f"--{flag} {column}: {name} has no such column{alike}")
    rows = rows.remove_columns([column for column in settings.ignore_columns or () if column in rows.column_names])
    images = [column for column in images if column in rows.column_names]
    named = []
    for column in rows.column_names:
        if column in ("id", "row", "folder", *columns):
            continue
        is_known = changes_meaning(column, rows.features[column])
        has_media = not is_known and holds_media(rows, column)
        if not is_known and not has_media:
            named += [] if HARMLESS_COLUMN.fullmatch(column.lower()) else [column]
            continue
        # A name of the image that is read, such as image_path beside image, is no second image.
        beside = IMAGE_NAME_COLUMN.fullmatch(column.lower()) or (
            has_media and not SECOND_MEDIA.fullmatch(column.lower())
        )
        number = first_row_with(rows, column, images if beside else [])
        if number is not None:
            problem = f"row {number} has {column!r}, which is not read, but changes what the row means"
            remedy = f"Move it into the columns that are read ({', '.join(columns)}), or --ignore_columns {column}"
            fail(f"{name}: {problem}. {remedy}")
    if named and getattr(settings, "unread_columns", None) != named:  # of two splits, once
        settings.unread_columns = named
        say(f"{name}: columns that are not read: {', '.join(named)}")
    for column in columns:
        if column not in rows.column_names or column in (settings.text_columns or ()):
            continue
        if column not in images:
            rows = with_names_of_labels(without_nan(rows, column, name), column)
        if not isinstance(rows.features[column], datasets.Image):
            refuse_structure_in_text(rows, column, name)
    return rows


def holds_media(rows, column):
    """Whether most cells of a column, of a sample, are media: bytes, base64, or names of media files."""
    cells = [cell for cell in sampled_cells(rows, column) if not is_missing(cell)]
    return 2 * sum(map(is_media, cells)) > len(cells)


def first_row_with(rows, column, unless):
    """The number of the first row with a value in `column` and none in the columns `unless`; None if there is none.
    Numbers and words for nothing are no media and no context."""
    for row in rows.select_columns([column, "row", *unless]):
        value = row[column]
        is_nothing = is_missing(value) or isinstance(value, (int, float)) or value in ("[]", "{}", "none", *NO_VALUE)
        if not is_nothing and all(is_missing(row[other]) for other in unless):
            return row["row"]
    return None


def sampled_cells(rows, column):
    """At most some 1,000 cells of a column, from all over it."""
    return rows.select(range(0, len(rows), max(1, len(rows) // 1000)))[column]


def without_nan(rows, column, name):
    """Rows in which the text "nan" is null, if most rows have it: pandas writes missing values like that."""
    cells = [cell for cell in sampled_cells(rows, column) if cell is not None]
    num_nan = sum(cell in NO_VALUE for cell in cells)
    if num_nan * 2 <= len(cells) or not all(isinstance(cell, str) for cell in cells):
        return rows
    say(f"{name}: most of {column!r} is the text nan, taken for a missing value (if meant: --text_columns {column})")
    cells = [None if cell in NO_VALUE else cell for cell in rows[column]]
    return rows.remove_columns(column).add_column(column, cells)


def with_names_of_labels(rows, column):
    """Rows in which the numbers of a ClassLabel are its names."""
    feature = rows.features[column]
    if not isinstance(feature, datasets.ClassLabel):
        return rows
    names = [None if number is None else feature.names[number] for number in rows[column]]
    return rows.remove_columns(column).add_column(column, names)


def refuse_structure_in_text(rows, column, name):
    """Stop if nearly all texts of a column are a list, a dict or messages, written as text. Raises SystemExit."""
    cells = sampled_cells(rows, column)
    texts = [text.strip() for cell in cells for text in leaf_texts(cell)]
    texts = [text for text in texts if text not in ("", "[]", "{}", *NO_VALUE)]
    decoders = Counter(filter(None, map(decoder_of, texts)))
    if texts and decoders.total() >= 0.95 * len(texts):
        decoder = decoders.most_common(1)[0][0]
        remedy = f"With pandas: table[{column!r}] = table[{column!r}].map({decoder}), and write it with to_json"
        if decoder == "list":
            remedy += ", in the script that made this text of NumPy's arrays: they cannot be read back"
        elif not any(isinstance(cell, str) for cell in cells):
            remedy = f"Decode each text within the lists, with {decoder}"
        if not re.search(r"""['"](role|from)['"]""", texts[0]):
            remedy += f". If they are meant as text: --text_columns {column}"
        fail(f"{name}: the texts of {column!r} hold lists or dicts, such as {texts[0]:.100}. {remedy}")


def decoder_of(text):
    """The Python function that decodes a list of texts, a dict of languages, or messages; None for another text."""
    if text.startswith("array("):
        return "list"
    if not text.startswith(("[", "{", "(")):
        return None
    # NumPy writes ['a' 'b' None], which would be read as ['ab' ...], or not at all.
    with_commas = re.sub(r"""(?<=['"}\]])\s+(\.\.\.\s+)?(?=['"{\[]|None|nan)""", ", ", text)
    for decoder, decode in (("json.loads", json.loads), ("ast.literal_eval", ast.literal_eval)):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            value = decode(text)
            if is_structure(value) and (decode is json.loads or with_commas == text or repr(value) == text):
                return decoder
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        if is_structure(ast.literal_eval(re.sub(r"\bnan\b", "None", with_commas))):
            return "list"
    return None


LANGUAGES = set("en fr de es it pt nl pl ru tr ar hi zh ja ko vi th cs sv da fi el he uk ro hu bn fa ms".split())


def is_structure(value):
    """Whether it is a list with texts, a dict of texts by language, a message or an answer as a dict, or some."""
    if isinstance(value, (list, tuple, set)):
        is_plain = all(item is None or isinstance(item, (str, int, float)) for item in value)
        return any(map(is_structure, value)) or (is_plain and any(isinstance(item, str) for item in value))
    if not isinstance(value, dict):
        return False
    is_code = [re.fullmatch(r"[a-z]{2,3}([-_]\w{2,4})?", str(key)) for key in value]
    is_by_language = all(is_code) and any(re.split("[-_]", str(key))[0] in LANGUAGES for key in value)
    keys = {"content", "value", "answer", "answer_start", "bytes"}
    is_turn = bool(value.keys() & keys) or {"type", "text"} <= value.keys()
    return is_by_language or is_turn


def check_lora_targets(settings, adapter, model, untrainable):
    """Stop if a LoRA target is not a linear layer of the model, or cannot be trained. Raises SystemExit.
    adapter: the LoraConfig, or None. model: may be without weights. untrainable: {part of a path: reason}."""
    if adapter is None or adapter.target_modules == "all-linear":  # PEFT itself leaves lm_head out of all-linear
        return
    targets = adapter.target_modules
    if not isinstance(targets, str):  # a list of names, in a copy of this file
        targets = rf"(.*\.)?({'|'.join(map(re.escape, targets))})"
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    matched = [name for name in linear if re.fullmatch(targets, name)]
    names = settings.lora_target_modules or [targets]
    require(matched, f"--lora_target_modules {' '.join(names)}: no such linear layer; give names or one regex")
    if len(names) > 1:  # one alone may be a regex
        for wanted in names:
            is_found = any(f".{name}".endswith(f".{wanted}") for name in matched)
            require(is_found, f"--lora_target_modules {wanted}: no such linear layer")
    for part, reason in untrainable.items():
        inside = [name for name in matched if f".{part}." in f".{name}."]
        require(not inside, f"--lora_target_modules: {inside[:1]} is in {part}, {reason}")


def check_with_dummy_row(collator, row, name):
    """Stop if a model's processor and chat template cannot make the batch of a row that has nothing wrong. Raises
    SystemExit: no row of the user's is at fault."""
    image = Image.new("RGB", (64, 64))
    try:
        collator([{**row, "image": image}])
    except BadRow as error:
        problem = str(error).partition("; in a row ")[0]
        if error.reason != "too long":
            fail(f"{name}: its processor or chat template does not fit this recipe, whatever the rows: {problem}")
    except Exception as error:  # templates and processors raise many kinds of exceptions
        fail(f"{name}: its processor or chat template cannot make a row: {type(error).__name__}: {error}")


# --------------------------------------------------------------------------------------------------- only for resuming


# Settings of all recipes that may change on resume. (Instead of the last three, the rows in a step are compared.)
MAY_CHANGE_ON_RESUME = """output_dir resume_from_checkpoint report_to run_name disable_tqdm log_level logging_steps
dataloader_num_workers dataset_num_proc push_to_hub hub_model_id hub_strategy hub_private_repo save_total_limit
sample_rows sample_tokens shared_prompt per_device_eval_batch_size stop_on_nonfinite on_bad_rows on_long_rows
per_device_train_batch_size gradient_accumulation_steps rows_per_step""".split()
CHOOSE_OR_RESUME = "Choose another --output_dir, or resume what is there: python {} --config {}/settings.yaml"
INTERRUPTED = "interrupted; to resume from the newest checkpoint, if any: --config {}/settings.yaml"


def checkpoint_to_resume(training, before=()):
    """The checkpoint to resume from, or None. Exits with status 0 if the run is finished. Raises SystemExit.
    before: {setting that is chosen by the rows: its value in versions of this file that lacked it}."""
    if __name__ == "__main__":  # not where a notebook or a test has imported this file
        listen_to_signals(INTERRUPTED.format(training.output_dir))
    output_dir, wanted = Path(training.output_dir), training.resume_from_checkpoint
    with fail_on_error(f"--output_dir {output_dir} cannot be written"):
        existing = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
        tempfile.TemporaryFile(dir=existing).close()
    if training.process_index == 0:
        require_no_other_run(output_dir)
    checkpoints = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    checkpoints.sort(key=lambda folder: int(folder.name.split("-")[1]))
    finished = (output_dir / "trainer_state.json").exists()
    training.found_at_start = contents_of(output_dir)

    if wanted.lower() == "false":
        remedy = CHOOSE_OR_RESUME.format(Path(__file__).name, output_dir)
        require(not checkpoints and not finished, f"{output_dir} holds a run already. {remedy}")
        return None
    if wanted.lower() != "auto":
        problem = damage_of(Path(wanted))
        require(problem is None, f"--resume_from_checkpoint {wanted}: not a complete checkpoint: {problem}")
        require_same_shares(training, Path(wanted))
        require_no_other_checkpoints(Path(wanted), output_dir, checkpoints)
        require_same_settings(training, Path(wanted).absolute().parent, ("max_steps", "num_train_epochs"), before)
        return wanted
    damaged = {}
    newest = None
    for folder in reversed(checkpoints):
        damaged[folder] = damage_of(folder)
        if damaged[folder] is None:
            newest = folder
            break
    if newest or finished:
        require_same_settings(training, output_dir, before=before)
    if finished:
        say(f"{output_dir} holds this run, finished. For another one choose another --output_dir.")
        PartialState().destroy_process_group()
        sys.exit(0)
    for folder, problem in damaged.items():
        if problem is not None:
            say(f"{folder}: {problem}, skipped")
    if newest is None:
        return None
    require_same_shares(training, newest)
    return str(newest)


def require_same_shares(training, checkpoint):
    """Stop unless a checkpoint of DeepSpeed is resumed by it, on the same number of processes, and FSDP's by FSDP.
    Raises SystemExit."""
    written_by = len(list(checkpoint.glob("global_step*/*optim_states.pt")))  # a file for each process
    resumed_by = training.world_size if training.deepspeed_plugin is not None else 0
    has_fsdp = any(checkpoint.glob("pytorch_model_fsdp*"))
    how = f"by {written_by} processes with DeepSpeed" if written_by > 0 else "without DeepSpeed"
    if has_fsdp or uses_fsdp():
        how = "with FSDP" if has_fsdp else "without FSDP"
    remedy = "resume it in the same way, or choose another --output_dir"
    is_same = written_by == resumed_by and has_fsdp == uses_fsdp()
    require(is_same, f"{checkpoint} was written {how}: {remedy}")


def require_no_other_checkpoints(wanted, output_dir, checkpoints):
    """Stop if output_dir has checkpoints of another run, or newer ones than this: the next start would resume from
    them. Raises SystemExit."""
    others = [path.name for path in checkpoints]
    if wanted.absolute().parent == output_dir.absolute() and wanted.name in others:
        others = others[others.index(wanted.name) + 1 :]
    remedy = "delete them, or choose another --output_dir: a later start would resume from them"
    require(not others, f"{output_dir} holds other checkpoints than {wanted}: {' '.join(others)}; {remedy}")


def require_same_rows(training, checkpoint, train_rows, eval_rows):
    """Stop if the run in output_dir was begun with other rows, by their numbers and lengths. Raises SystemExit.
    Earlier versions did not write that down: then rows must be read as they read them (see read_differently)."""
    digest, is_compared = hashlib.sha256(), training.load_best_model_at_end  # by scores on the rows to evaluate on
    has_bounds = getattr(training, "has_unread_rows", False)  # they change when an image is repaired
    for rows in (train_rows, eval_rows if is_compared else None):
        if rows is not None:
            lengths = "bounds by words" if has_bounds else rows["length"][:]
            digest.update(json.dumps([rows["row"][:], lengths]).encode())
    training.rows_digest = digest.hexdigest()[:16]
    if checkpoint is not None:
        output_dir = Path(checkpoint).absolute().parent
        with contextlib.suppress(OSError):
            old = re.search(f"{DIGEST_NOTE}(\\w+)", (output_dir / "settings.yaml").read_text(encoding="utf-8"))
            differences = getattr(training, "differences", [])
            remedy = "choose another --output_dir, or resume it with what it was begun with"
            if old is None and differences:
                problem = f"{output_dir} holds a run of an earlier version, which read these rows differently"
                fail(f"{problem} ({'; '.join(differences)}): {remedy}")
            if old is not None and old[1] != training.rows_digest:
                cause = "the data changed, or how much is held out (--max_eval_rows), or how lengths are bounded"
                fail(f"{output_dir} holds a run on other rows than there are now, since {cause}: {remedy}")


def require_images(*all_rows):
    """Stop if rows have no images where weights are in shares: all processes must run the same parts of the model, or
    they wait for each other for ever. Raises SystemExit."""
    if is_deepspeed_zero3_enabled():
        for rows in all_rows:
            count = 0 if rows is None else image_counts(rows).count(0)
            require(count == 0, f"{count} rows have no image, with ZeRO-3: leave them out, or take ZeRO-2 or DDP")


def require_same_settings(training, folder, may_also_differ=(), before=()):
    """Stop if the run in this folder is another one, with other settings, or with other rows in a step. Another number
    of processes is made up for, where that is possible. before: see checkpoint_to_resume. Raises SystemExit."""
    remedy = CHOOSE_OR_RESUME.format(Path(__file__).name, folder)
    try:
        text = (folder / "settings.yaml").read_text(encoding="utf-8")
        second_names = {flag[2:]: name for flag, name in training.second_names.items()}
        old = {second_names.get(name, name): value for name, value in yaml.safe_load(text).items()}
    except (OSError, AttributeError, ValueError, yaml.YAMLError):
        fail(f"{folder} holds a run without the settings.yaml that says which one. {remedy}, once repaired")
    notes = dict(re.findall("^(# .+: )(\\w+)$", text, re.MULTILINE))
    if ROWS_NOTE not in notes:
        problem = f"{folder} holds a run of an earlier version, which held out or ordered rows differently"
        fail(f"{problem}. Choose another --output_dir, or resume what is there with that version")

    old_rows, old_processes = int(notes[ROWS_NOTE]), notes.get(PROCESSES_NOTE, "(not written down)")
    adopt_choices(training, old, before)
    made_up_for = adopt_rows_per_step(training, old, old_rows, old_processes)
    may_differ = {*MAY_CHANGE_ON_RESUME, *may_also_differ} - getattr(training, "must_not_differ", set())
    # How answers are scored may only change if checkpoints are not compared by it.
    if not training.load_best_model_at_end:
        may_differ.add("max_new_tokens")
    new = training.as_given
    changed = [name for name in new if name in old and old[name] != new[name] and name not in may_differ]
    changed.sort(key=lambda name: name not in training.typed)  # False first: those on this command line
    for name in ("model_name_or_path", "dataset_name"):
        if name in changed:
            fail(f"{folder} holds another run: its {name} is {old[name]}. {remedy}")
    lines = [f"  {name} {old[name]} -> {new[name]}" for name in changed]
    if old_rows != rows_per_step(training):
        now = f"{training.per_device_train_batch_size} at once on each of {training.world_size} processes"
        lines.insert(0, f"  rows in a step {old_rows} -> {rows_per_step(training)}, {now} (before: {old_processes})")
    if len(lines) > 10:
        lines[10:] = [f"  and {len(lines) - 10} more"]
    require(not lines, "\n".join([f"{folder} holds a run with other settings:", *lines, remedy]))
    if made_up_for:
        say(made_up_for)
    for name in may_also_differ:
        if old.get(name) != new[name]:
            say(f"{name} {old.get(name)} -> {new[name]}: from here on the learning rates are those of the new length")
    say_what_changed(training, notes)


def say_what_changed(training, notes):
    """Say if the run was begun by another version of this file. notes: {comment in its settings.yaml: value}."""
    if PROCESSES_NOTE not in notes and training.load_best_model_at_end:
        say("note: this run was begun by an earlier version, whose eval_loss was a mean over batches, not over tokens")
    if notes.get(RECIPE_NOTE, "") not in ("", sha256_of(__file__)):
        say(f"note: {Path(__file__).name} has changed since this run was begun")


def adopt_choices(training, old, before):
    """Where the rows choose a default, take what they chose for the run to resume, or what its version did before."""
    for name, value in dict(before).items():
        old.setdefault(name, value)
        if training.as_given[name] is None:
            training.as_given[name] = old[name]
    checked = old.setdefault("check_rows", "auto:all")  # as earlier versions did
    if training.as_given["check_rows"] == "auto" and checked.startswith("auto"):
        training.as_given["check_rows"] = checked


def adopt_rows_per_step(training, old, old_rows, old_processes):
    """Keep the rows of a step of the run to resume, where that is possible: on another number of processes, or with
    another batch, by another accumulation. Returns that in words, or None."""
    before = training.gradient_accumulation_steps
    adopt_batch(training, old, old_rows)
    old_batch = str(old.get(BATCH_SIZES[0]) or "").removeprefix("auto").removeprefix(":")
    is_new_batch = old_batch not in ("", str(training.per_device_train_batch_size))
    is_new_batch &= "gradient_accumulation_steps" not in training.typed
    if old_processes == str(training.world_size) and not is_new_batch:
        return None
    if not old_processes.isdigit():  # an earlier version did not write it down: so a flag that was typed is kept
        before = training.gradient_accumulation_steps
        if "gradient_accumulation_steps" in training.typed:
            return None
    rows_at_once = training.per_device_train_batch_size * training.world_size
    wants_other_rows = training.as_given["rows_per_step"] not in (None, old_rows)
    if wants_other_rows or old_rows % rows_at_once != 0:
        return None  # require_same_settings says so
    after = old_rows // rows_at_once
    if after == before:
        return None
    training.gradient_accumulation_steps = training.as_given["gradient_accumulation_steps"] = after
    cause = f"processes {old_processes} -> {training.world_size}"
    if old_processes == str(training.world_size):
        cause = f"per_device_train_batch_size {old_batch} -> {training.per_device_train_batch_size}"
    return f"{cause}: gradient_accumulation_steps {before} -> {after}, so that a step keeps its {old_rows} rows"


def adopt_batch(training, old, old_rows):
    """Where a batch size is auto, take that of the run to resume, out of its settings. A step keeps its rows."""
    new = training.as_given
    train_size_was_open = BATCH_SIZES[0] in training.auto_batch
    for name in BATCH_SIZES:
        stored = str(old.get(name) or "auto")  # auto:4 or 4; None was llava_two_stage.py's default
        number = stored.removeprefix("auto").removeprefix(":")
        if new.get(name) == "auto" and number:
            new[name] = old[name]
            setattr(training, name, int(number))
            if not stored.startswith("auto"):  # a number is taken as it is
                training.auto_batch.discard(name)
    share, rest = divmod(old_rows, training.world_size)
    if train_size_was_open and rest == 0 and new["rows_per_step"] in (None, old_rows):
        training.per_device_train_batch_size = math.gcd(share, training.per_device_train_batch_size)
        training.gradient_accumulation_steps = share // training.per_device_train_batch_size
        if BATCH_SIZES[0] not in training.auto_batch:
            new["gradient_accumulation_steps"] = training.gradient_accumulation_steps


def best_of(state, checkpoint):
    """The folder of the best checkpoint, or None. If output_dir was moved, it is the one beside this checkpoint."""
    best = None if state.best_model_checkpoint is None else Path(state.best_model_checkpoint)
    beside = Path(checkpoint).parent / f"checkpoint-{state.best_global_step}"
    is_gone = best is None or not best.exists()
    return beside if is_gone and damage_of(beside) is None else best


def only_load_the_result(args, checkpoint, steps, steps_per_epoch):
    """If a run was killed between its last step and the saving of its result: let train() only load the result."""
    state = transformers.TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    all_steps_done = state.global_step >= max(steps, state.max_steps)  # as now asked for, and as it was begun
    if not all_steps_done:
        return
    best = best_of(state, checkpoint) or Path(checkpoint)
    if args.load_best_model_at_end:  # without it Trainer would save the last weights
        require(damage_of(best) is None, f"{best}, the best checkpoint, is missing or damaged")
    # Asked for the same steps again, Trainer would take one more if the last epoch is incomplete. So ask for complete
    # epochs only. They are all done: train() takes no step, and loads the best checkpoint.
    args.max_steps, args.num_train_epochs = -1, state.global_step // steps_per_epoch


# ----------------------------------------------------------------------------- only for resuming: whole checkpoints
CHECKSUMS = "checksums.json"
LOG_STATE = "log_state.json"


def checkpoint_folder(trainer):
    """The folder of the checkpoint of this step."""
    return Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}")


def write_checksums(folder):
    """Write checksums.json, atomically: size and SHA-256 of every other file in this folder."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS):
        found[str(file.relative_to(folder))] = {"size": file.stat().st_size, "sha256": sha256_of(file)}
    write_whole(folder / CHECKSUMS, json.dumps(found, indent=1))


def damage_of(checkpoint):
    """What is wrong with a checkpoint, which may have been cut off while it was written; None if a run can be resumed
    from it."""
    file = checkpoint / CHECKSUMS
    try:
        if file.exists():
            return wrong_checksum(checkpoint, json.loads(file.read_text()))
        # Cut off before its checksums were written, or of an earlier version, which wrote none.
        optimizer = "latest" if (checkpoint / "latest").exists() else "optimizer.pt"  # latest: DeepSpeed's
        for pattern in ("*.safetensors", optimizer, "scheduler.pt", "rng_state*", "trainer_state.json"):
            if not any(checkpoint.glob(pattern)):
                return f"incomplete, without {pattern}"
        for file in checkpoint.glob("*.safetensors"):
            safe_open(file, "pt")  # raises where the end of the file is missing
        file = checkpoint / "trainer_state.json"
        json.loads(file.read_text())["global_step"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return f"{file.name} is damaged or cut off"
    # torch.save writes zip files, with an index at their end. DeepSpeed's are in a folder of their own.
    for file in [*checkpoint.rglob("*.pt"), *checkpoint.glob("rng_state*")]:
        if not zipfile.is_zipfile(file):
            return f"{file.name} is damaged or cut off"
    return None


def wrong_checksum(checkpoint, checksums):
    """The first file that is not as its checksum says, in words; None if all are."""
    if not checksums:
        return "incomplete, cut off while it was written"
    for name, expected in checksums.items():
        file = checkpoint / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} is damaged (it has {file.stat().st_size} bytes of {expected['size']})"
        if sha256_of(file) != expected["sha256"]:
            return f"{name} is damaged (its checksum differs)"
    return None


def write_log_state(trainer):
    """Write into a checkpoint what is not logged yet: each process's sum of losses, TRL's metrics, an evaluation."""
    state = {"loss": trainer.accelerator.gather(trainer._tr_loss.reshape(1)).tolist()}
    state |= {"last_logged": trainer._globalstep_last_logged, "evaluation_is_due": trainer.evaluation_is_due}
    state["unreadable"] = sorted(set(map(tuple, gather_object(list(trainer.unreadable)))))
    if hasattr(trainer, "_metrics"):
        state["num_tokens"], state["metrics"] = trainer._total_train_tokens, trainer._metrics["train"]
    if trainer.args.should_save:
        write_whole(checkpoint_folder(trainer) / LOG_STATE, json.dumps(state))


def read_log_state(trainer, checkpoint):
    """Go on with the log where a checkpoint was written. Those of earlier versions do not say where. Returns whether
    an evaluation is due."""
    file = Path(checkpoint, LOG_STATE)
    if not file.exists():
        return False
    state = json.loads(file.read_text())
    losses, process = state["loss"], trainer.args.process_index
    is_same_number = len(losses) == trainer.args.world_size
    trainer._tr_loss += losses[process] if is_same_number else sum(losses) / len(losses)
    trainer._globalstep_last_logged = state["last_logged"]
    trainer.unreadable = state.get("unreadable", [])
    if hasattr(trainer, "_metrics"):
        trainer._total_train_tokens = state["num_tokens"]
        trainer._metrics["train"].update(state["metrics"])
    return state["evaluation_is_due"]


# What the errors of a full or broken disk have in their texts: of Python, of torch.save, of safetensors.
DISK_TROUBLE = re.compile(
    "No space left|[Qq]uota exceeded|File too large|Read-only file system|inline_container|PytorchStreamWriter"
)


def remove_half_written(trainer, error):
    """Remove a checkpoint or a result that is not whole. Returns the cause of the error, and what is left."""
    output_dir = Path(trainer.args.output_dir)
    cause = " ".join(str(error).split()) if isinstance(error, OSError) else "the disk is full, or broken"
    if trainer.is_saving_result:
        for file in [*output_dir.glob("*.safetensors"), *output_dir.glob("*.part")]:
            file.unlink()
    elif damage_of(checkpoint_folder(trainer)) is not None:
        shutil.rmtree(checkpoint_folder(trainer), ignore_errors=True)
    free = shutil.disk_usage(output_dir).free
    return f"{cause} ({free / 1e9:.2f} GB are free). Checkpoints before are whole: make room, and start it again"


def warn_if_disk_is_small(trainer, steps):
    """Say if the checkpoints that are kept, and one more, are more than what is free on the disk."""
    args = trainer.args
    weights = trained = 0
    for parameter in trainer.model.parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 a process has a share of it
        trained += size if parameter.requires_grad else 0
        weights += size * parameter.element_size()
    if hasattr(trainer.model, "peft_config"):  # then a checkpoint has the trained weights only
        weights = trained * 4
    checkpoint = weights + trained * (2 if "8bit" in str(args.optim) else 8)  # AdamW has two states
    num_kept = args.save_total_limit
    if num_kept is None:
        num_kept = steps // max(1, int(args.save_steps)) if args.save_strategy == "steps" else 0
    needed, free = checkpoint * (num_kept + 1), shutil.disk_usage(args.output_dir).free
    if needed > free:
        sizes = f"{num_kept} checkpoints and one more are about {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
        say(f"warning: the disk of {args.output_dir} may become full: {sizes}; --save_total_limit keeps fewer")


# -------------------------------------------------------------------------- only for resuming: one run, ended well
# RUN: what the thread that listens to signals, and StopAndResume, know of each other. `lock` is the file of lock().
RUN = SimpleNamespace(connections=None, saves_soon=False, num_sigterms=0, peers=(), lock=None)


def listen_to_signals(when_interrupted):
    """From now on SIGTERM ends the program with exit status 143: at once, or in training after a checkpoint (see
    StopAndResume). Ctrl-C ends it with one line. A thread listens: Python itself would only react when a kernel or
    another process, which may be dead, has answered."""
    RUN.connections = socket.socketpair()
    listener, wakeup = RUN.connections
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave_to_thread)
    if hasattr(os, "register_at_fork"):  # on Windows there are no forks
        os.register_at_fork(after_in_child=forget_signals)
    multiprocessing.util.Finalize(None, kill_children, exitpriority=100)  # before Python ends them itself
    threading.Thread(target=act_on_signals, args=(listener, when_interrupted), daemon=True).start()


def leave_to_thread(number, frame):
    """A handler that does nothing: Python has already told the thread."""


def init_worker(init, number):
    """In a loader process: leave SIGTERM, which Slurm sends to all, to the main process, which ends this one."""
    if RUN.connections is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if init is not None:
        init(number)


def forget_signals():
    """In a new loader process: end by SIGTERM, and leave Ctrl-C, which a terminal sends to all, to the main one."""
    with contextlib.suppress(ValueError):  # only a main thread may say so
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def act_on_signals(listener, when_interrupted):
    """What the thread does: wait for signals, and look whether other processes live while it is to end."""
    asked_at = -math.inf
    while True:
        listener.settimeout(0.5 if RUN.num_sigterms else None)
        try:
            number = listener.recv(1)[0]
        except TimeoutError:
            if not all(map(is_alive, RUN.peers)):
                end_now("SIGTERM: another process is dead, so this step cannot be finished", 143)
            continue
        if number == signal.SIGINT:
            end_now(f"error: {when_interrupted}", 1)
        if number == signal.SIGTERM:
            is_repeated = time.monotonic() - asked_at < 2  # Slurm sends one, and torchrun passes its own on
            if not RUN.saves_soon or (RUN.num_sigterms > 0 and not is_repeated):
                end_now("SIGTERM: ended at once; the same command resumes from the newest checkpoint, if any", 143)
            if RUN.num_sigterms == 0:
                asked_at = time.monotonic()
            RUN.num_sigterms += 1


def end_now(message, status):
    """End this process and its children, whatever they do."""
    threading.Timer(1, os._exit, [status]).start()  # whatever keeps this thread waiting, too
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{message}\n".encode())
    unlock()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    kill_children(psutil.Process().children(recursive=True))
    os._exit(status)


def kill_children(children=None):
    """Kill these processes, or the loader processes: as they ignore SIGTERM, Python would wait for them as it ends."""
    # PyTorch would raise an error in the main thread, which ends, since its loader processes are dead.
    patch.object(torch.utils.data._utils.signal_handling, "_error_if_any_worker_fails", int, create=True).start()
    for child in children or multiprocessing.active_children():
        with contextlib.suppress(psutil.Error):
            child.kill()


class StopAndResume(transformers.TrainerCallback):
    """After SIGTERM: saves a checkpoint at the end of the step and ends the program, with exit status 143. When a run
    is resumed: goes on with its log, and forgets a best checkpoint that is gone."""

    def __init__(self, trainer, checkpoint):
        self.trainer, self.checkpoint = trainer, checkpoint
        self.is_asked = False  # whether at least one of the processes got SIGTERM: all agree
        self.evaluation_is_due = False  # a run that SIGTERM ended had no time for it

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.saved_step = state.global_step if self.checkpoint else None
        RUN.peers = [pid for host, pid in gather_object([(platform.node(), os.getpid())]) if host == platform.node()]
        if self.checkpoint is None:
            return
        self.evaluation_is_due = read_log_state(self.trainer, self.checkpoint)
        if args.load_best_model_at_end and state.best_global_step:
            best = best_of(state, self.checkpoint)
            problem = "it is gone" if best is None else damage_of(best)
            state.best_model_checkpoint = None if best is None else str(best)
            if problem is not None:
                say(f"the best checkpoint, of step {state.best_global_step}: {problem}. The best will be a later one")
                state.best_model_checkpoint = state.best_metric = state.best_global_step = None
        if state.global_step >= state.max_steps:
            self.evaluate_if_due(state)

    def evaluate_if_due(self, state):
        if self.evaluation_is_due:
            self.evaluation_is_due = False
            metrics = self.trainer._evaluate(None, None)
            if self.trainer._determine_best_metric(metrics, None):
                state.best_model_checkpoint = self.checkpoint

    def on_step_begin(self, args, state, control, **kwargs):
        self.evaluate_if_due(state)  # here, since Trainer restores the random state after on_train_begin
        RUN.saves_soon = True

    def on_step_end(self, args, state, control, **kwargs):
        self.stop_if_asked(args, control)
        if self.is_asked and float(state.epoch).is_integer():
            control.should_save = False  # on_epoch_end follows, where more may be due

    def on_epoch_end(self, args, state, control, **kwargs):
        self.stop_if_asked(args, control)

    def stop_if_asked(self, args, control):
        if RUN.connections is not None:
            self.is_asked = RUN.num_sigterms > 0
            if args.world_size > 1:
                asked = torch.tensor([self.is_asked], device=args.device)
                self.is_asked = bool(self.trainer.accelerator.gather(asked).any())
        if self.is_asked:
            self.trainer.evaluation_is_due |= control.should_evaluate
            control.should_save, control.should_evaluate = True, False
        # A SIGTERM can wait for the end of a step, but not for an evaluation, which may take minutes.
        RUN.saves_soon = not control.should_evaluate

    def on_evaluate(self, args, state, control, **kwargs):
        RUN.saves_soon = True

    def on_save(self, args, state, control, **kwargs):
        if self.is_asked:
            RUN.peers = ()  # from here on they may end
            self.trainer.callback_handler.on_train_end(args, state, control)  # closes logs
            say(f"SIGTERM: ended after step {state.global_step}; the same command resumes")
            if args.world_size > 1:
                time.sleep(0.5)  # see train_and_save
            unlock()
            sys.exit(143)

    def on_train_end(self, args, state, control, **kwargs):
        RUN.saves_soon = False


def is_alive(pid):
    """Whether a process of this machine runs; one that was killed and not yet waited for does not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return False


def lock(training):
    """Write run.lock into output_dir, with host and process. Raises SystemExit if another run has just done so."""
    if training.process_index > 0:
        return
    file = Path(training.output_dir, "run.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    stale = require_no_other_run(file.parent)
    if stale:
        say(f"{file} is of {stale}, which no longer runs (or runs on another machine): taken over")
    now = contents_of(file.parent)
    is_unchanged = getattr(training, "found_at_start", now) == now
    require(is_unchanged, f"another run has written into {file.parent} since this one began: start it again")
    mine = {"host": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    write_whole(file, json.dumps(mine))
    time.sleep(0.2)  # of two that begin at once, both see who came last
    require(read_lock(file) == mine, f"another run began in {training.output_dir} at the same moment, and has it")
    RUN.lock = file
    atexit.register(unlock)


def contents_of(output_dir):
    """The checkpoints and the end of the run in output_dir."""
    return sorted(path.name for path in [*output_dir.glob("checkpoint-*"), *output_dir.glob("trainer_state.json")])


def require_no_other_run(output_dir):
    """Stop if a run lives that writes into output_dir, by its run.lock. Raises SystemExit. Returns the process of a
    stale lock, in words, or None. One of another host is stale: nobody can tell from here whether that run lives."""
    old = read_lock(output_dir / "run.lock")
    if old is None or old["pid"] == os.getpid():
        return None
    owner = f"process {old['pid']} on {old['host']}"
    require(not is_running(old), f"{owner} is training in {output_dir}: choose another --output_dir")
    return owner


def read_lock(file):
    """What a lock file says: {"host", "pid", "started"}; None where there is none, or another file."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text())
        if isinstance(found, dict) and found.keys() == {"host", "pid", "started"}:
            return found
    return None


def is_running(owner):
    """Whether the process of a lock runs on this machine. (Another one may have its number by now.)"""
    if owner["host"] == platform.node() and is_alive(owner["pid"]):
        with contextlib.suppress(psutil.Error):
            return abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) < 5
    return False


def unlock():
    """Remove the lock of this process, if it has one."""
    if RUN.lock is not None and (read_lock(RUN.lock) or {}).get("pid") == os.getpid():
        RUN.lock.unlink(missing_ok=True)
    RUN.lock = None


# ------------------------------------------------------------------------------------------------------ only for speed


class ReplacedForwards(transformers.TrainerCallback):
    """Gives modules another forward until training ends, then their own again, so that the model can be merged."""

    def __init__(self):
        self.replaced = contextlib.ExitStack()

    def replace(self, module, forward):
        forward = functools.wraps(module.forward)(forward)  # generate() reads the names of its arguments
        self.replaced.enter_context(patch.object(module, "forward", forward))

    def on_train_end(self, args, state, control, **kwargs):
        self.replaced.close()


class FrozenWithoutGraph(ReplacedForwards):
    """Optional, for speed: a frozen part of the model (the vision tower) runs without a graph until training ends.
    Activation checkpointing makes a model's inputs require a gradient, so it would compute a frozen tower twice and
    backpropagate through it. To turn this off, delete the line that adds it: the result is the same."""

    def __init__(self, model, part):
        super().__init__()
        for name, module in model.named_modules():
            if f".{name}".endswith(f".{part}"):
                trained = [weight for weight, parameter in module.named_parameters() if parameter.requires_grad]
                remedy = "freeze it, or delete the line that adds FrozenWithoutGraph"
                require(not trained, f"{part} runs without a graph, so {trained[:1]} would get no gradient: {remedy}")
                self.replace(module, torch.no_grad()(module.forward))


LOGITS = 2**26  # as many at once: in float32 0.27 GB


def where_trained(labels):
    """labels (B, L) -> where in the flattened batch the next token is trained, and which one it is, both (N,). Made in
    collators, on the CPU: on a GPU the host would have to wait to learn how many there are."""
    next_labels = next_tokens(labels).flatten()
    trained_at = (next_labels != -100).nonzero().squeeze(1)
    return {"trained_at": trained_at, "targets": next_labels[trained_at]}


def gpu_memory(device):
    """Bytes of a GPU: (free, all). None on a CPU."""
    return torch.cuda.mem_get_info(device) if device.type == "cuda" else None


def fill_card(trainer):
    """Choose the batch sizes that are auto: the largest with which the longest rows take less than 90 % of the GPU's
    free memory. A step keeps its rows, by accumulation. On a CPU, with DeepSpeed and FSDP, the defaults stay."""
    args, accelerator = trainer.args, trainer.accelerator
    share = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if gpu_memory(args.device) is None or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        args.as_given |= {name: getattr(args, name) for name in args.auto_batch}
        if BATCH_SIZES[0] in args.auto_batch:
            args.as_given["gradient_accumulation_steps"] = args.gradient_accumulation_steps
        return
    jobs = [
        (train_once, trainer.train_dataset, [n for n in range(1, share + 1) if share % n == 0]),
        (evaluate_once, trainer.eval_dataset, [1, 2, 4, 8, 16, 32, 64]),
    ]
    with contextlib.ExitStack() as stack:
        # A run has the same random numbers with auto and with the number that auto finds.
        stack.enter_context(torch.random.fork_rng([args.device] if args.device.type == "cuda" else []))
        # Autocast comes with accelerator.prepare, which train() calls; so here it is put around each loss.
        stack.enter_context(patch.object(trainer, "compute_loss_context_manager", accelerator.autocast))
        for gather in ("gather", "gather_for_metrics"):  # a process whose GPU is full must not keep others waiting
            stack.enter_context(patch.object(accelerator, gather, lambda values, *args, **kwargs: values))
        # The rows of a batch may all have images of their own, even if those that are tried do not.
        stack.enter_context(patch.object(trainer.data_collator, "share_pages", False, create=True))
        for name, (run, rows, sizes) in zip(BATCH_SIZES, jobs, strict=True):
            if name in args.auto_batch and rows is not None:
                before = int(args.as_given[name].partition(":")[2] or 0)
                size, peak = largest_batch(trainer, run, rows, sizes, before)
                setattr(args, name, size)
                args.as_given[name] = f"auto:{size}"
                reason = "auto"
                if before not in (0, size):
                    reason = f"when this run began {before}, which does not fit here"
                say(f"{name} {size} ({reason}); on the longest rows at most {peak / 1e9:.1f} GB of the GPU are taken")
    args.gradient_accumulation_steps = share // args.per_device_train_batch_size
    if args.as_given["gradient_accumulation_steps"] is not None:  # of another number of processes
        args.as_given["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    trainer._train_batch_size = args.train_batch_size  # Trainer took it when it was made
    if hasattr(trainer, "_metrics"):  # what TRL would log
        trainer._total_train_tokens = 0
        for metrics in trainer._metrics.values():
            metrics.clear()


def largest_batch(trainer, run, dataset, sizes, before):
    """The largest of these sizes with which `run` stays below 90 % of the free memory, and the peak in bytes.
    before: what it was when this run began, or 0. Raises SystemExit if not even one row fits."""
    model, device = trainer.model, trainer.args.device
    costs = dataset.with_format(None).select_columns(["length", "num_tokens", "image_keys"])[:]
    costs["images"] = [(len(keys), n) for keys, n in zip(costs["image_keys"], costs["length"], strict=True)]
    orders = []  # the longest rows first, those with the most tokens, with the most images
    for cost in ("length", "num_tokens", "images"):
        order = sorted(range(len(dataset)), key=costs[cost].__getitem__, reverse=True)
        if order not in orders:
            orders.append(order)
    # What a later step holds beside: float32 gradients, AdamW's two states, DDP's copies of the gradients.
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    states = trained * (12 if trainer.args.world_size == 1 else 16)
    clear_device_cache(garbage_collection=True)
    free, whole = gpu_memory(device)

    def peak_of(size):
        """Bytes that are taken at most, on any process's GPU; infinite if `size` rows do not fit."""
        clear_device_cache(garbage_collection=True)
        peak = math.inf
        try:
            for order in orders:
                run(trainer, [dataset[n] for n in itertools.islice(itertools.cycle(order), size)])
            # PyTorch keeps what was freed, so what is taken now is the most that was taken.
            peak = whole - gpu_memory(device)[0] + states
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
        model.zero_grad()
        return max(gather_object([peak]))

    limit = min(gather_object([whole - 0.1 * free]))  # the same for all processes
    if before:
        sizes = [size for size in sizes if size <= before]
    elif len(sizes) > 1:
        one, two = peak_of(1), peak_of(2)
        a_row = max(two - one, 1) if two < math.inf else limit
        sizes = [size for size in sizes if size == 1 or one + (size - 1) * a_row <= limit]
    for size in reversed(sizes):
        peak = peak_of(size)
        if peak <= limit or (before and peak < math.inf):  # what was chosen is kept if it runs at all
            break
    remedy = "4 bits, --activation_checkpointing, shorter rows, smaller images or another optimizer (--optim) help"
    require(peak < math.inf, f"not even one row at once fits this GPU: {remedy}")
    return size, peak


def train_once(trainer, rows):
    """Forward and backward of one batch, as in training."""
    trainer.current_gradient_accumulation_steps, args = 1, trainer.args
    if args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
    batch = ReadableRows(trainer.data_collator, trainer.train_dataset, args.seed)(rows)
    batch.pop("unreadable", None)
    (batch,), num_tokens = trainer.get_batch_samples(iter([batch]), 1, args.device)
    trainer.training_step(trainer.model, batch, num_tokens)


def evaluate_once(trainer, rows):
    """One batch of an evaluation, and the first two tokens of its answers."""
    trainer.model.eval()
    with torch.no_grad():
        trainer.prediction_step(trainer.model, trainer.data_collator(rows), prediction_loss_only=True)
    answer_batch(trainer, rows, max_new_tokens=2)


@contextlib.contextmanager
def losses_as_logits(lm_head, inputs):
    """Optional, for speed and memory: within the `with` block the model's logits are the losses (N,) of its trained
    tokens: lm_head scores no others, and these in parts, so that only LOGITS exist at once.
    Takes a collator's batch, with what where_trained returns, and yields the model's inputs: without the mask, which a
    batch that is padded on the right does not need, so that the fastest kernel of attention can run.
    The loss is then mean_of_losses, as Trainer's compute_loss_func."""
    trained_at, targets, forward = inputs["trained_at"], inputs["targets"], lm_head.forward
    at_once = LOGITS // max(1, lm_head.weight.shape[0])  # under ZeRO-3 its shape is 0

    def losses(hidden, targets):
        return torch.nn.functional.cross_entropy(forward(hidden).float(), targets, reduction="none")

    def score(hidden):
        hidden = hidden.flatten(0, 1).index_select(0, trained_at)
        if len(hidden) <= at_once:
            return losses(hidden, targets)
        parts = zip(hidden.split(at_once), targets.split(at_once), strict=True)
        return torch.cat([torch.utils.checkpoint.checkpoint(losses, *part, use_reentrant=False) for part in parts])

    with patch.object(lm_head, "forward", score):
        own = {name: inputs[name] for name in inputs if name not in ("attention_mask", "trained_at", "targets")}
        yield {**own, "use_cache": False}  # Trainer says so too, but not in the text model's own configuration


def mean_of_losses(outputs, labels, num_items_in_batch=None):
    """The trained tokens' losses: their sum, divided by how many there are in the whole step, or in this batch."""
    losses = outputs.logits  # see losses_as_logits
    return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)


if __name__ == "__main__":
    main()
