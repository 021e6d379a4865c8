# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "transformers==5.24.0", "trl==1.16.0", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0",
#   "pillow==13.0.0", "bitsandbytes==0.50.2", "pyyaml==6.0.3", "jinja2==3.1.6", "tensorboard==2.21.0",
#   "networkx==3.6.1", "psutil==7.2.2",
# ]
# ///
"""Align Idefics2-8b by DPO on pairs of a better and a worse answer: TRL's DPOTrainer, 4-bit NF4 + LoRA, one 24 GB GPU.

    python dpo_idefics2.py                                                # idefics2-8b on RLAIF-V-Dataset
    python dpo_idefics2.py --dataset_name pairs.jsonl --image_folder pictures   # your own pairs
    python dpo_idefics2.py --loss_type sigmoid sft                        # also keeps the chosen answer likely
    python dpo_idefics2.py --model_name_or_path Qwen/Qwen3-VL-8B-Instruct --max_pixels 1000000    # or LLaVA, Gemma 3
    accelerate launch --num_processes 4 dpo_idefics2.py                   # several GPUs, DDP
    python dpo_idefics2.py --config idefics2-dpo/settings.yaml            # resume that run after a crash

Loss: DPO (arXiv:2305.18290), -log sigmoid(beta x margin), averaged over the pairs, with
    margin = [log p(chosen) - log p(rejected)] of the policy - the same difference of the reference.
    log p is summed over the tokens of an answer. The reference is the same model with its adapter switched off.
Tokens in the loss: both answers, each with the token that ends it. The question and its image are context only.
Trained weights: LoRA on all linear layers, also of vision tower and connector, not lm_head (or --adapters language).
Result: the last weights, or with --load_best_model_at_end true those with the lowest eval_loss: this loss on held-out
    images, averaged over all their pairs. Read samples.md, too: the loss can fall while answers decay.
Before training all rows are checked; of many only a sample is decoded then. The same command resumes a run that was
interrupted, if data and settings are unchanged (also on another number of GPUs).
Every setting is a flag: python dpo_idefics2.py --help. The formats of a row are shown in load_data."""

import ast
import atexit
import base64
import codecs
import contextlib
import copy
import difflib
import functools
import hashlib
import heapq
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
from types import SimpleNamespace
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
from jinja2 import TemplateError
from networkx.utils import UnionFind
from peft import LoraConfig, PeftModel
from PIL import ExifTags, Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import rotate_checkpoints
from trl import DPOConfig, DPOTrainer, TrlParser


@dataclass
class Settings:
    """Model, adapter, data, samples. Each line is a flag: --lora_r 32."""

    # model
    model_name_or_path: str = HfArg(
        default="HuggingFaceM4/idefics2-8b", help="Idefics2, Qwen-VL, ...: hub id, folder."
    )
    model_revision: str | None = HfArg(default=None, help="Branch, tag or commit of the model, to repeat a run.")
    load_in_4bit: bool = HfArg(default=True, help="Language model and connector in 4-bit NF4; false needs 11 GB more.")
    attn_implementation: str | None = HfArg(default=None, help="Attention kernel. Default: sdpa. Or flex_attention.")
    longest_edge: int = HfArg(default=490, help="Longest side of an image in pixels (Idefics2). 980: more detail.")
    image_splitting: bool = HfArg(default=False, help="Also show parts of an image, enlarged (Idefics, SmolVLM).")
    min_pixels: int | None = HfArg(default=None, help="Enlarge smaller images to so many pixels, for Qwen-VL.")
    max_pixels: int | None = HfArg(default=None, help="Shrink larger images to so many pixels, for Qwen-VL.")
    shared_prompt: bool = HfArg(default=True, help="Faster, same losses: compute prompt and image once for a pair.")
    # adapter
    adapters: Literal["all", "language"] = HfArg(default="all", help="All linear layers, or the language model's.")
    lora_target_modules: list[str] | None = HfArg(default=None, help="Adapt these instead: q_proj v_proj, or a regex.")
    lora_r: int = HfArg(default=16, help="Rank of the adapter.")
    lora_alpha: int = HfArg(default=32, help="The adapter is scaled by alpha / r.")
    use_dora: bool = HfArg(default=False, help="DoRA: weight-decomposed LoRA; slower, at low ranks sometimes better.")
    # data
    dataset_name: str = HfArg(default="openbmb/RLAIF-V-Dataset", help="Hub id, folder, saved data set or file.")
    dataset_config: str | None = HfArg(default=None, help="Configuration of a hub data set that has several.")
    dataset_revision: str | None = HfArg(default=None, help="Branch, tag or commit of the data set.")
    dataset_train_split: str = HfArg(default="train", help="Split to train on.")
    dataset_test_split: str | None = HfArg(default=None, help="Split to evaluate on. Default: test, or validation.")
    eval_dataset_name: str | None = HfArg(
        default=None, help="Evaluate on this data set: its test split if there is one, else dataset_train_split."
    )
    image_folder: str | None = HfArg(default=None, help="Where relative image paths start. Default: beside the .json.")
    image_column: str | None = HfArg(default=None, help="Column of the image. Default: image, else images.")
    question_column: str | None = HfArg(default=None, help="Column of the question. Default: question, else prompt.")
    chosen_column: str = HfArg(default="chosen", help="Column of the better answer.")
    rejected_column: str = HfArg(default="rejected", help="Column of the worse answer.")
    eval_fraction: float = HfArg(default=0.01, help="Share of the images held out, if there is no test split.")
    max_eval_rows: int = HfArg(default=200, help="Evaluate on at most this many pairs, the same ones each time.")
    ignore_columns: list[str] | None = HfArg(default=None, help="Columns to leave out that may matter, such as video.")
    text_columns: list[str] | None = HfArg(default=None, help="Columns whose texts look like lists, and are meant so.")
    check_rows: str = HfArg(default="auto", help="Rows to decode before training: all, a number, or auto.")
    on_bad_rows: Literal["stop", "skip"] = HfArg(default="stop", help="Rows that cannot be trained on: stop, or skip.")
    on_long_rows: Literal["drop", "stop"] = HfArg(default="drop", help="Rows above max_length: drop them, or stop.")
    # samples.md
    sample_rows: int = HfArg(default=8, help="Number of held-out prompts to answer at each evaluation. 0: none.")
    max_new_tokens: int = HfArg(default=128, help="Longest answer in samples.md, in tokens.")


@dataclass
class Training(DPOConfig):
    """TRL's DPOConfig with this recipe's defaults. All its other settings are flags, too."""

    # training
    output_dir: str = HfArg(default="idefics2-dpo", help="Adapter, processor, settings, samples, logs, checkpoints.")
    resume_from_checkpoint: str = HfArg(default="auto", help="auto: the newest one. false: a new run. Or a folder.")
    num_train_epochs: float = HfArg(default=1.0, help="Passes over the data. max_steps, if given, wins.")
    per_device_train_batch_size: str = HfArg(
        default="auto", help="Pairs at once. auto: what fits the GPU; on a CPU 2."
    )
    rows_per_step: int | None = HfArg(default=None, help="Pairs of a step, on all GPUs. Default: 64 a GPU.")
    gradient_accumulation_steps: int | None = HfArg(default=None, help="Default: what makes up rows_per_step.")
    loss_type: list[str] = HfArg(default_factory=lambda: ["sigmoid"], help="sigmoid is DPO; several: sigmoid sft.")
    beta: float = HfArg(default=0.1, help="Strength of the pull towards the reference.")
    learning_rate: float = HfArg(default=5e-5, help="Lower it if rewards rise while answers in samples.md decay.")
    warmup_steps: float = HfArg(default=0.03, help="Steps, or below 1 a share of the run.")
    max_length: int | None = HfArg(default=1024, help="Longest prompt + answer in tokens, image included. Never cut.")
    save_steps: float = HfArg(default=50, help="Steps between checkpoints: what a crash can cost.")
    save_total_limit: int | None = HfArg(default=2, help="Checkpoints kept: the newest, and the best if needed.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="true hides NaN losses in the log.")
    stop_on_nonfinite: int = HfArg(default=3, help="Stop after so many steps in a row with a gradient of nan or inf.")
    report_to: str = HfArg(default="tensorboard", help="tensorboard, wandb, trackio, ..., none.")
    dataloader_num_workers: int = HfArg(default=4, help="Processes that decode images while the GPU works.")
    remove_unused_columns: bool = HfArg(default=False, help="Must stay false: the collator reads the columns.")
    ddp_find_unused_parameters: bool | None = HfArg(default=False, help="true if DDP reports unused parameters.")
    activation_checkpointing: bool = HfArg(default=True, help="New name of gradient_checkpointing: less memory.")
    bf16: bool | None = HfArg(default=None, help="Default: where the GPU has it, else fp16.")
    # evaluation
    per_device_eval_batch_size: str = HfArg(
        default="auto", help="Pairs evaluated, or answered, at once. auto; on a CPU 4."
    )
    eval_strategy: str = HfArg(default="steps", help="When to evaluate: steps, epoch, no.")
    eval_steps: float = HfArg(default=50, help="Steps between evaluations. The last step is evaluated, too.")
    load_best_model_at_end: bool = HfArg(default=False, help="Result: lowest eval_loss. false: last weights.")

    def __post_init__(self):
        pick_precision(self)
        pick_batch(self, batch=2, accumulation=32, eval_batch=4)
        if self.router_aux_loss_coef is None:
            self.router_aux_loss_coef = 0.0  # of a mixture of experts, which are frozen: no loss for their balance
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False
        super().__post_init__()


def parse(argv=None):
    """Flags and `--config run.yaml` -> (Settings, Training). Raises SystemExit."""
    return parse_arguments(TrlParser([Settings, Training], allow_abbrev=False), REFUSED_HERE, argv)


def check(settings, training):
    """Stop early if this machine or these flags cannot work. Raises SystemExit."""
    check_common_flags(settings, training, "Idefics2-8b needs 24 GB", metrics=("loss",))
    require(training.learning_rate > 0, "--learning_rate must be above 0")
    require(settings.lora_r >= 1, "--lora_r must be at least 1: the reference is the model without its adapter")
    require(training.beta > 0, "--beta must be above 0: with 0 answers are not compared with the reference")
    check_losses(training)
    check_pixels(settings)


def load_processor(settings):
    """The model's processor, set to --longest_edge. Raises SystemExit if it does not fit this recipe."""
    name = settings.model_name_or_path
    if not is_adapter_folder(name):
        image_text_config(settings)
    needed = "this needs the processor of a model of images and text, such as idefics2-8b"
    with fail_on_source("--model_name_or_path", name, f": {needed}"):
        processor = AutoProcessor.from_pretrained(name, revision=settings.model_revision)
    kind = type(processor).__name__
    require(hasattr(processor, "image_processor"), f"{name} has a {kind}; {needed}")
    require(processor.tokenizer.eos_token, f"{name}: tokenizer without an eos_token (no tokenizer_config.json?)")
    # Edit the prompt here: set processor.chat_template to your own. Nothing else changes: the loss and samples.md
    # follow the template, and the processor is saved with the adapter, for inference. An answer must begin where the
    # prompt ends. It ends with the next stop token; if the template writes none, the collator adds EOS.
    # PaliGemma has no template: edit its prompt in Collator.render, and the newline after it in Collator.answer_ids.
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template  # of older models
    if kind != "PaliGemmaProcessor":
        require(processor.chat_template, f"{name} has a {kind} without a chat template, which makes the prompt")
        if not is_adapter_folder(name):
            set_thinking(processor, False)  # answers without thoughts, where a template knows them (Qwen3.5)
    set_image_size(processor, settings)
    if processor.tokenizer.pad_token is None:  # any token will do: padding is masked
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    fit_image_tokens(processor, settings)
    return processor


def load_data(settings, training, collator):
    """-> (train, eval): rows that the collator accepts; eval is None if nothing is evaluated. Raises SystemExit.
    An image is a path, bytes or an embedded image; there may be none, or a list of several, each shown by an <image>
    in the question. A text may be messages, as in TRL's data:
        {"image": "sofa.png", "question": "What is on it?", "chosen": "A cat.", "rejected": "A cat and a dog."}
        {"images": ["sofa.png"], "prompt": [{"role": "user", "content": "What is on it?"}], "chosen": ...}"""
    train_rows = read_rows(settings.dataset_name, settings.dataset_train_split, settings)
    require("chosen" in train_rows.column_names, "the rows have no answers; see --chosen_column and --rejected_column")
    eval_rows = read_eval_rows(read_rows, settings, training)  # if None, prepare_rows holds out training rows
    return prepare_rows(train_rows, eval_rows, settings.dataset_name, collator, settings, training)


class Collator:
    """B rows -> a batch for DPOTrainer: input_ids, attention_mask, completion_mask (2B, L), padded on the right, and
    tensors of the images. The first B rows have the chosen answers, the other B the rejected ones, in the same order.
    completion_mask is 1 on the tokens of the loss: an answer and the token that ends it. Raises BadRow."""

    def __init__(self, processor, settings, training):
        # Keep only what shapes a batch: all attributes are part of the key by which checked rows are cached.
        self.processor = processor
        self.folder = settings.image_folder or ""
        self.ignored = settings.ignore_columns or []
        self.max_aspect_ratio = 20  # Idefics2 would stretch narrower images
        self.max_length = training.max_length or math.inf
        tokenizer = processor.tokenizer
        self.control_tokens = {*special_tokens(tokenizer), tokenizer.eos_token, processor.image_token}
        self.images_first = not processor.chat_template or shows_images_first(processor)
        end_of_turn = {"<end_of_utterance>"} & self.control_tokens  # Idefics2's, if its generation_config lacks it
        stop_ids = {*stop_ids_of(tokenizer, settings), *tokenizer.convert_tokens_to_ids(sorted(end_of_turn))}
        self.stop_ids = sorted(stop_ids)  # where generation ends
        self.stops = set(tokenizer.convert_ids_to_tokens(self.stop_ids))
        self.stop = re.compile("|".join(map(re.escape, sorted(self.stops))))
        self.shares_prompts = False  # SharedPromptDPOTrainer may set it

    def __call__(self, rows):
        conversations, chosen_ids, rejected_ids = zip(*[self.encode(row) for row in rows], strict=True)
        prompts = self.tokenize(conversations, prompt=True)
        is_token, answers = prompts["attention_mask"].bool(), chosen_ids + rejected_ids
        ones, zeros = ([[value] * len(answer) for answer in answers] for value in (1, 0))
        pad_id = self.processor.tokenizer.pad_token_id
        batch = {
            "input_ids": append_answers(prompts["input_ids"], is_token, answers, pad_id),
            "attention_mask": append_answers(is_token.long(), is_token, ones),
            "completion_mask": append_answers(torch.zeros_like(prompts["input_ids"]), is_token, ones),
        }
        for length in batch["attention_mask"].sum(dim=1).tolist():
            if length > self.max_length:
                raise BadRow("too long", f"{length} tokens, --max_length is {self.max_length}")
        if self.shares_prompts:
            batch["pairs"] = pack_pairs(**batch, pad_token_id=pad_id)
        for name, values in prompts.items():
            if name not in batch and values.shape == is_token.shape:
                # Kinds of tokens: 1 for images, in PaliGemma, which has no template, for an answer.
                batch[name] = append_answers(values, is_token, zeros if self.processor.chat_template else ones)
            elif name == "cross_attention_mask":
                raise BadRow("cross-attention", "the text does not hold its images, as in Llama 3.2 Vision")
            elif name not in batch:  # images: once for the chosen rows, once for the rejected rows
                batch[name] = torch.cat([values, values])
        return batch

    def encode(self, row):
        """A row -> the prompt's messages, the token ids of the chosen answer and of the rejected one."""
        prompt, chosen, rejected = self.read_pair(row)
        if chosen is None:
            raise BadRow(NO_ANSWER, "the row has none; see --chosen_column and --rejected_column")
        chosen_ids = self.answer_ids(prompt, chosen)
        rejected_ids = self.answer_ids(prompt, rejected)
        if chosen_ids == rejected_ids:
            both = f"chosen {chosen!r:.200} and rejected {rejected!r:.200}"
            raise BadRow("equal answers", f"{both} are the same to the tokenizer")
        return self.with_image(prompt), chosen_ids, rejected_ids

    def answer_ids(self, messages, answer):
        """The prompt's messages and an answer -> the answer's token ids, up to where generation ends. Raises BadRow.
        They continue the prompt that the model gets at inference, so the prompt's own tokens must not change."""
        prompt = self.render(messages, prompt=True)
        if not self.processor.chat_template:
            prompt += "\n"  # PaliGemma's processor adds it to a prompt, render does not
        turn = answer_turn(answer)
        whole = self.render([*messages, turn])
        require_texts(whole, [*messages, turn])
        whole = follow_prompt(prompt, whole, answer)
        if not whole.startswith(prompt):
            raise BadRow("prompt changed", f"{answer!r:.200} changes the prompt: {where_they_differ(prompt, whole)}")
        # Train up to the first stop: Idefics2's template has a newline after it. LLaVA's template writes no stop at
        # all, and a model that is trained without one never learns to stop.
        stop = self.stop.search(whole, len(prompt))
        if stop is None:
            whole = whole.rstrip() + self.processor.tokenizer.eos_token
            stop = self.stop.search(whole, len(prompt))
        whole = whole[: stop.end()]
        require_answer(whole[len(prompt) :], turn, self.control_tokens | self.stops)
        prompt_ids, ids = self.processor.tokenizer([prompt, whole], add_special_tokens=False)["input_ids"]
        if ids[: len(prompt_ids)] != prompt_ids:
            raise BadRow("prompt changed", f"{answer!r:.200}: {where_they_differ(prompt, whole)}")
        return ids[len(prompt_ids) :]

    def render(self, messages, prompt=False):
        """Messages -> text with a token for each image. With `prompt` it ends where the model is to answer."""
        if not self.processor.chat_template:
            return self.processor.image_token + "\n".join(map(text_of, messages))  # PaliGemma: no roles, one image
        try:
            return self.processor.apply_chat_template(messages, add_generation_prompt=prompt)
        except TemplateError as error:  # some templates refuse some orders of roles
            raise BadRow("order of turns", str(error)) from error
        except Exception as error:  # or cannot write some kinds of turns
            raise BadRow("unfit for the chat template", f"{type(error).__name__}: {error}") from error

    def tokenize(self, conversations, prompt=False):
        """Lists of messages -> the processor's batch, padded on the left, as generation needs it."""
        texts = [self.render(messages, prompt) for messages in conversations]
        batch = encode_chats(self.processor, texts, conversations, "left")[0]
        batch.pop("labels", None)  # PaliGemma's: all -100
        return batch

    def messages_of(self, row):
        """A row -> the prompt's messages, with a PIL image, and the chosen answer, if there are any. Raises BadRow."""
        prompt, chosen, _ = self.read_pair(row)
        return self.with_image(prompt) + ([] if chosen is None else [answer_turn(chosen)])

    def with_image(self, prompt):
        """A prompt's messages from `read` -> the same with a PIL image. Raises BadRow."""
        # Edit images here, to crop or augment them (for evaluation, too). A row may have several. Each needs room in
        # --max_length: 64 tokens (LLaVA 576, Qwen-VL one for 28 x 28 or 32 x 32 pixels).
        return load_images(prompt, self.max_aspect_ratio)

    def read(self, row):
        """A row -> the prompt's messages, with the image as the row has it: a path, {"bytes": ...} or a PIL image."""
        return self.read_pair(row)[0]

    def read_pair(self, row):
        """A row -> (the prompt's messages as in `read`, chosen text, rejected text); no text if it has no answers.
        Answers may be whole conversations, which begin with the prompt: TRL's implicit prompt. Raises BadRow."""
        asked = as_turns(row.get("question"), "user")
        answers = {}
        for name in ("chosen", "rejected"):
            if not is_missing(row.get(name)):
                answers[name] = as_turns(row[name], "assistant")
        if len(answers) == 1:
            raise BadRow("one answer", f"the row has only a {' '.join(answers)} answer; both are needed")
        turns = asked or answers.get("chosen", [])[:-1]
        if not turns:
            raise BadRow("empty question", "there is none; see --question_column")
        prompt = self.read_prompt(turns, row)
        texts = []
        for name, conversation in answers.items():
            if len(conversation) > 1 or not asked:
                before = self.read_prompt(conversation[:-1], row) if len(conversation) > 1 else []
                if [turn["content"] for turn in before] != [turn["content"] for turn in prompt]:
                    raise BadRow("different prompts", f"the {name} conversation begins with other turns")
            answer = read_turns(conversation[-1:], "<image>", self.ignored)
            if [message["role"] for message in answer] != ["assistant"]:
                raise BadRow("order of turns", f"the {name} answer must be a turn of the assistant")
            join_texts(answer, images_first=False, strip=True)
            if not text_of(answer[0]):
                raise BadRow("empty answer", f"the {name} answer holds nothing but white space")
            check_texts(answer, self.control_tokens)
            texts.append(text_of(answer[0]))
        return prompt, *(texts or (None, None))

    def read_prompt(self, turns, row):
        """The turns of a prompt -> its messages, with the image as the row has it. Raises BadRow."""
        prompt = read_turns(turns, "<image>", self.ignored)
        check_order(prompt)
        if prompt[-1]["role"] != "user" or (len(prompt) > 1 and not self.processor.chat_template):
            raise BadRow("no question", "a prompt must end with a turn of the user, and for PaliGemma be one turn")
        folder = row.get("folder") or self.folder
        images = as_image_list(row.get("image"), folder)
        count = count_images(prompt, images)
        if count != 1 and not self.processor.chat_template:
            raise BadRow("not one image", f"{count} images; PaliGemma takes one: see --image_column")
        show_single_image(prompt, images)
        join_texts(prompt, self.images_first or count == 1, strip=True)
        if count == 0:
            prompt[-1].setdefault("notes", []).append("no image")
        place_images(prompt, images, folder)
        check_texts(prompt, self.control_tokens, always=True)
        return prompt


def load_model(settings, training):
    """The base model, frozen: language model and connector in NF4 if asked for, the rest in 16 bits (32 on a CPU)."""
    dtype, parts = weight_dtype(training), find_parts(settings, PROJECTORS)
    model = AutoModelForImageTextToText.from_pretrained(
        settings.model_name_or_path,
        revision=settings.model_revision,
        dtype=dtype,
        device_map=place_of_weights(training),
        attn_implementation=attention_kernel(settings),
        quantization_config=nf4_quantization(settings.load_in_4bit, dtype, [parts.head, parts.vision]),
    )
    keep_4bit_trainable_on_cpu(model)
    return model.requires_grad_(False)


UNTRAINABLE = {"lm_head": "which DPOTrainer merges with the loss and cannot adapt"}  # refused targets, and why


def lora_config(settings):
    """LoRA on all linear layers, also of vision tower and connector, not on lm_head; or on the language model's."""
    parts = find_parts(settings, PROJECTORS)
    default = "all-linear"
    if settings.adapters == "language":
        names = {layer.rpartition(".")[2] for layer in linear_layers_in(parts, parts.decoder)}
        default = layers_within(parts.decoder, sorted(names))
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        use_dora=settings.use_dora,
        target_modules=lora_targets(settings.lora_target_modules, parts.decoder, default),
        exclude_modules=unused_tower_layers(image_text_config(settings), re.escape(parts.vision)),
        task_type="CAUSAL_LM",
    )


def check_adapter(settings, training, adapter):
    """Stop if the adapter or --max_length does not fit the model; its weights are not needed. Raises SystemExit."""
    model = empty_model(settings)
    check_attention_kernel(settings, training, model)
    check_lora_targets(settings, adapter, model, UNTRAINABLE)
    window = getattr(model.config.get_text_config(), "sliding_window", None) or math.inf
    is_longer = (training.max_length or math.inf) > window  # shared_start_mask knows no window
    if settings.shared_prompt and model.config.model_type in SHARED and takes_mask(model) and is_longer:
        problem = f"this model has a sliding window of {window} tokens, which shared prompts do not support"
        fail(f"--max_length {training.max_length}: {problem}: --max_length {window}, or --shared_prompt false")


def loss_counts(batch, only_repeats=False):
    """What losses of a batch are means of: its pairs, its tokens of chosen answers, of rejected ones. (3,)
    only_repeats: another process has these pairs, too, so they do not count."""
    chosen, rejected = batch["completion_mask"][:, 1:].chunk(2)
    counts = torch.stack([torch.ones_like(chosen[:, 0]).sum(), chosen.sum(), rejected.sum()])
    return torch.zeros_like(counts) if only_repeats else counts


class Trainer(DPOTrainer):
    """DPOTrainer's loss, optimizer and loop. Adapters are float32, and held-out prompts are answered."""

    repeats, is_repeat = None, False  # see SafeTrainer

    def __init__(self, settings, model, **kwargs):
        super().__init__(model, **kwargs)
        train_in_float32(self)  # DPOTrainer made them bf16
        self.settings = settings
        self.answers_before = {}  # {evaluated dataset: list of Answer}, by the base model
        self.step_counts = None  # loss_counts of the whole step

    def _get_num_items_in_batch(self, batches, device):
        """Trainer calls this with the batches of a step, before it runs them: their pairs and tokens are counted."""
        counts = sum(loss_counts(batch, batch is self.repeats) for batch in batches)
        self.step_counts = self.accelerator.gather(counts[None]).sum(dim=0)  # of all processes
        return super()._get_num_items_in_batch(batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """DPOTrainer's, in which each pair of a step counts alike, and for sft each chosen token, whatever the batches
        are. (It takes the mean of each batch, and then the mean of these.)"""
        weights, batches = self.loss_weights, self.current_gradient_accumulation_steps * self.args.world_size
        if self.step_counts is not None:
            by_pairs, by_tokens, _ = batches * loss_counts(inputs, self.is_repeat) / self.step_counts
            scales = [by_tokens if loss == "sft" else by_pairs for loss in self.loss_types]
            self.loss_weights = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self.loss_weights = weights

    def sum_losses(self, model, inputs):
        """For eval_loss: each loss of --loss_type, summed over pairs (sft: tokens), and over how many. 2 x (K,)"""
        pairs, tokens, _ = loss_counts(inputs, self.is_repeat)
        counts = torch.stack([tokens if loss == "sft" else pairs for loss in self.loss_types])
        # Row k of this matrix has the weight of loss k, and zeros: the weighted sum becomes a vector of all losses.
        each_apart = torch.diag(torch.tensor(self.loss_weights, device=counts.device))
        with patch.object(self, "loss_weights", list(each_apart)):
            return self.compute_loss(model, inputs) * counts, counts

    def metric_counts(self, inputs):
        """For eval_rewards/margins and the like: {how names begin: of how many things they are means}."""
        pairs, chosen, rejected = loss_counts(inputs, self.is_repeat)
        return {
            "": pairs,
            "entropy": chosen + rejected,
            "mean_token": chosen,
            "logits/c": chosen,
            "logits/r": rejected,
        }

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """DPOTrainer's, then answers to the first held-out prompts."""
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        dataset = dataloader.dataset  # self.eval_dataset, unless evaluate() was given another one
        num_samples = min(self.settings.sample_rows, len(dataset))
        if num_samples > 0:
            answers, name = self.answer_samples(dataset, num_samples), f"{metric_key_prefix}_samples"
            output.metrics[f"{name}/ended"] = sum(answer.ended for answer in answers) / num_samples
            output.metrics[f"{name}/tokens"] = sum(answer.num_tokens for answer in answers) / num_samples
        # Your own metric. To keep the checkpoint where it is highest: metrics=("loss", "mine") in check, and the flags
        # --load_best_model_at_end true --metric_for_best_model mine. answers[0].text is the answer to the first row.
        # answers = answer_rows(self, dataset, max_new_tokens=64)
        # output.metrics[f"{metric_key_prefix}_mine"] = my_score(answers, dataset)
        return output

    def answer_samples(self, dataset, num_samples):
        """Write answers to the first prompts, before training and now, into samples.md. Returns those of now."""
        rows = dataset.take(num_samples)
        if dataset not in self.answers_before:
            with self.model.disable_adapter():
                self.answers_before[dataset] = answer_rows(self, rows, self.settings.max_new_tokens)
        answers = answer_rows(self, rows, self.settings.max_new_tokens)
        samples = []
        for row, before, after in zip(rows, self.answers_before[dataset], answers, strict=True):
            prompt, chosen, rejected = self.data_collator.read_pair(row)
            texts = [text_of(prompt[-1]), before.text, after.text, chosen, rejected]
            samples.append((row["row"], self.data_collator.with_image(prompt), texts))
        if self.is_world_process_zero():
            columns = ["image", "prompt", "before", "after", "chosen", "rejected"]
            append_samples(self.args.output_dir, f"Step {self.state.global_step}", columns, samples)
        return answers


def main(argv=None):
    """Parse, check, read the rows, show a pair, load the model, train, save."""
    settings, training = parse(argv)
    check(settings, training)
    checkpoint = checkpoint_to_resume(training)
    set_seed(training.seed)

    processor = load_processor(settings)
    with fail_on_error(f"{settings.model_name_or_path}: its chat template does not fit this recipe"):
        collator = Collator(processor, settings, training)
    check_with_dummy_row(collator, DUMMY_ROW, settings.model_name_or_path)
    adapter = lora_config(settings)
    check_adapter(settings, training, adapter)
    train_dataset, eval_dataset = load_data(settings, training, collator)
    check_mixed_batches(collator, train_dataset, eval_dataset, training)
    if 0 in image_counts(train_dataset):  # adapters in the tower get no gradient from rows without an image
        training.ddp_find_unused_parameters = True
    require_same_rows(training, checkpoint, train_dataset, eval_dataset)
    require_images(train_dataset, eval_dataset)
    example = mark_trained_pair(collator([train_dataset[0]]), processor)
    say(f"\nOne pair as the model sees it, trained tokens in «»:\n\n{example}\n")

    with fail_on_error(f"cannot load the weights of {settings.model_name_or_path}"):
        model = load_model(settings, training)
    # For the plain version write Trainer in place of SharedPromptDPOTrainer: the same losses, slower.
    data = {"data_collator": collator, "train_dataset": train_dataset, "eval_dataset": eval_dataset}
    options = {"args": training, "processing_class": processor, "peft_config": adapter}
    trainer = SharedPromptDPOTrainer(settings, model, **options, **data)
    print_parameters(trainer.model, [*dict(model.model.named_children()), "lm_head"])
    train_and_save(trainer, checkpoint)


# ------------------------------------------------------------ optional, for speed: prompt and image once for each pair


class SharedPromptDPOTrainer(Trainer):
    """Optional, for speed: runs a pair as one sequence, its image once. Losses, gradients and logs stay the same.
    DPOTrainer runs prompt + chosen and prompt + rejected as two sequences, each with the image, first for the policy,
    then for the reference. Here both answers follow one prompt (drawn: a prompt of 4 tokens, answers of 3 and 2):

        token      p0 p1 p2 | p3 c0 c1 end | p3 r0 end
        position    0  1  2    3  4  5  6     3  4  5     restarts: each answer comes right after the prompt
        part        0  0  0    1  1  1  1     2  2  2     a token sees part 0 and its own part, not the other answer
        predicts    -  -  -   c0 c1 end -    r0 end -     p3 appears twice: it predicts the first token of each answer

    Each token therefore sees the same tokens, at the same positions, as in its own separate sequence. Second saving:
    frozen parts before the language model run once per batch, without a graph, for policy and reference.
    Gain, measured on a CPU (small Idefics2, images of 980 pixels): 1.80 times as fast, 3.40 with --adapters language.
    To turn it off: --shared_prompt false. To delete it: make a Trainer in main; delete this section, its check in
    check_adapter, and ReplacedForwards. Of TRL it needs compute_loss, _tokenizer and fused_lm_head."""

    def __init__(self, settings, model, **kwargs):
        super().__init__(settings, model, **kwargs)
        self.frozen_outputs = None  # within compute_loss {frozen part: its output}, else None
        self.why_not_shared = "--shared_prompt false"
        if settings.shared_prompt:
            self.why_not_shared = obstacle_to_sharing(self.model, self.ref_model)  # None: prompts are shared
        if self.why_not_shared is not None:
            say(f"path: stock DPOTrainer, since {self.why_not_shared}")
            return
        say("path: shared prompts, each pair one sequence with its image once")
        forwards = ReplacedForwards()
        forwards.replaced.enter_context(patch.object(self.data_collator, "shares_prompts", True, create=True))
        model = self.model.get_base_model()
        forwards.replace(model, functools.partial(self.forward_pairs, model.forward))
        for part in model.model.children():  # in the order in which they run: tower, connector, language model
            is_trained = any(parameter.requires_grad for parameter in part.parameters())
            if is_trained or part is model.model.get_decoder():
                break
            forwards.replace(part, functools.partial(self.run_once, part, part.forward))
        self.add_callback(forwards)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """DPOTrainer's loss. It calls the model for the policy, then for the reference, with the same images."""
        self.frozen_outputs = None if return_outputs else {}  # it adds a third call, with the images of all 2B rows
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.frozen_outputs = None

    def run_once(self, part, forward, *args, **kwargs):
        """Stands in for a frozen part's `forward`: no graph, and within compute_loss the output of its first call."""
        if part in (self.frozen_outputs or {}):
            output = self.frozen_outputs[part]
        else:
            with torch.no_grad():
                output = forward(*args, **kwargs)
        if self.frozen_outputs is not None:
            self.frozen_outputs[part] = output
        return copy.copy(output) if isinstance(output, dict) else output  # Qwen-VL replaces tensors in what it gets

    def forward_pairs(self, forward, *args, **inputs):
        """Stands in for the model's `forward`, to which TRL added a fused head: log-probabilities instead of logits.
        In: DPOTrainer's batch, input_ids, attention_mask, labels (2B, L), images (2B, ...), and its `pairs`, packed.
        Out: (2B, L - 1)."""
        packed = inputs.pop("pairs", None)
        if not inputs.pop("fused_lm_head", False):  # TRL sets it to compute the loss; without it, this is generation
            return forward(*args, **inputs)
        ids, mask, labels = (inputs.pop(name) for name in ("input_ids", "attention_mask", "labels"))
        if packed is None:  # the batch of another collator
            packed = pack_pairs(ids, mask, labels != -100, self._tokenizer.pad_token_id)
        pairs = SimpleNamespace(**packed)
        model, needs = self.model.get_base_model(), SHARED[self.model.config.model_type]
        positions, block = pairs.position, None
        if needs.positions:
            positions = needs.positions(model, pairs, ids, mask, inputs)
        if needs.block:
            block = needs.block(model, pairs)
        mask = shared_start_mask(pairs.part, pairs.position, pairs.real, model, block)
        for name in ("token_type_ids", "mm_token_type_ids"):  # only for positions and mask, which are given instead
            inputs.pop(name, None)
        for name, value in list(inputs.items()):
            if isinstance(value, torch.Tensor):
                inputs[name] = value[: len(value) // 2]  # the images of the chosen rows, which the others repeat
        inputs |= {"input_ids": pairs.ids, "position_ids": positions, "shift_labels": pairs.targets[None]}
        with scored_at(model, pairs.predicted_from):
            output = forward(*args, attention_mask=mask, fused_lm_head=True, **inputs)
        for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
            values = getattr(output, name)
            if values is not None:
                setattr(output, name, unpack(values, pairs, labels[:, 1:].shape))
        return output


def pack_pairs(input_ids, attention_mask, completion_mask, pad_token_id):
    """DPOTrainer's batch, all (2B, L), chosen rows first, padded on any side -> B pairs, each one sequence of S tokens
    as drawn above. (B, S): ids, position, part; real, not padding; in_prompt, also true for p3's second copy; order,
    where a token stands in the two rows of the pair, side by side.
    (N,), the tokens of the loss, chosen rows first: targets; predicted_from, where they are predicted in (B, S),
    flattened; predicted, where they stand in (2B, L - 1), flattened.
    Made in the collator, on the CPU: on a GPU the host would have to wait for sizes that depend on content."""
    num_pairs, real = len(input_ids) // 2, attention_mask.bool()
    is_answer = completion_mask.bool()
    predicts = next_tokens(input_ids.masked_fill(~is_answer, -100))
    last_of_prompt = (predicts != -100) & ~is_answer
    part = (last_of_prompt | is_answer).long()  # 0: prompt, 1: chosen
    part[num_pairs:] *= 2  # 2: rejected
    keep = real.clone()
    keep[num_pairs:] = part[num_pairs:] == 2  # of the rejected row: the prompt's last token and the answer

    def side_by_side(values):  # (2B, L) -> (B, 2L)
        return torch.cat(values.chunk(2), dim=1)

    kept = side_by_side(keep)
    length = int(kept.sum(dim=1).max())
    order = kept.long().argsort(dim=1, descending=True, stable=True)[:, :length]

    def pack(values):  # (2B, L) -> (B, S): the kept tokens move to the left, in their order
        return side_by_side(values).gather(1, order)

    is_kept, packed_part, targets = pack(keep), pack(part), pack(predicts)
    of_chosen, of_rejected = ((targets != -100) & (packed_part == n) for n in (1, 2))
    predicted_from = torch.cat([which.flatten().nonzero() for which in (of_chosen, of_rejected)]).squeeze(1)
    return {
        "ids": pack(input_ids).masked_fill(~is_kept, pad_token_id),  # a short row ends with tokens that are not kept
        "real": is_kept,
        "position": pack(real.cumsum(dim=1) - 1),
        "part": packed_part,
        "in_prompt": pack(real & ~is_answer),
        "order": order,
        "predicted_from": predicted_from,
        "targets": targets.flatten()[predicted_from],
        "predicted": is_answer[:, 1:].flatten().nonzero().squeeze(1),
    }


def in_three_axes(model, pairs, ids, mask, inputs):
    """Qwen-VL's positions (3, B, S): time, height and width in an image. Those of the rows apart, packed like tokens.
    ids, mask, inputs: DPOTrainer's batch."""
    if "image_grid_thw" not in inputs:
        return pairs.position  # a batch without images
    positions = model.model.get_rope_index(ids, attention_mask=mask, **inputs)[0]
    return torch.stack([torch.cat(axis.chunk(2), dim=1).gather(1, pairs.order) for axis in positions])


def whole_prompt(model, pairs):
    """PaliGemma's prompt sees all of itself: one block (B, S). The second copy of its last token is not in it: it sees
    all by its position."""
    return torch.where(pairs.in_prompt & (pairs.part < 2), 0, -1)


def each_image(model, pairs):
    """Gemma 3's image tokens see all of their image: a block for each run of them. (B, S)"""
    is_image = pairs.ids == model.config.image_token_id
    is_first = is_image & ~torch.nn.functional.pad(is_image, (1, -1))
    return torch.where(is_image, is_first.cumsum(dim=1), -1)


# The families whose prompts can be shared, and what the forward pass of some needs beside the mask. A family can be
# added if it takes a 4-D mask and positions, and runs each part once: tests/test_dpo_shared_prompt.py shows it.
Needs = namedtuple("Needs", "positions block", defaults=(None, None))
ONLY_THE_MASK = """aria aya_vision cohere2_vision deepseek_vl idefics2 idefics3 internvl lighton_ocr llava llava_next
llava_onevision mistral3 ovis2 smolvlm video_llama_3 video_llava""".split()
IN_THREE_AXES = "glm46v glm4v glm4v_moe qwen2_5_vl qwen2_vl qwen3_vl qwen3_vl_moe".split()
SHARED = dict.fromkeys(ONLY_THE_MASK, Needs()) | dict.fromkeys(IN_THREE_AXES, Needs(positions=in_three_axes))
SHARED |= {"gemma3": Needs(block=each_image), "paligemma": Needs(block=whole_prompt)}


def unpack(values, pairs, shape):
    """Values of the tokens of the loss (1, N) -> those of DPOTrainer's batch, (2B, L - 1), 0 everywhere else."""
    return values.new_zeros(shape).flatten().index_copy(0, pairs.predicted, values[0]).view(shape)


def obstacle_to_sharing(model, ref_model=None):
    """Why a model's prompts cannot be shared; None if they can."""
    if model.config.model_type not in SHARED:
        return f"no way is known to share prompts of a {model.config.model_type}"
    if not isinstance(model, PeftModel) or ref_model is not None:
        return "there is a reference model beside the policy"
    if not takes_mask(model):
        return f"{model.config.get_text_config()._attn_implementation} takes no 4-D attention mask"
    return None


# ---------------------------------------------------------------------------------------- details: rows, flags, losses

# DPOConfig's flags that this recipe does not use, besides REFUSED_EVERYWHERE.
REFUSED_HERE = """precompute_ref_log_probs precompute_ref_batch_size sync_ref_model padding_free pad_to_multiple_of
truncation_mode pad_token model_init_kwargs trust_remote_code router_aux_loss_coef use_liger_kernel neftune_noise_alpha
label_smoothing_factor label_names prediction_loss_only activation_offloading torch_compile""".split()
LOSSES = """sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop
sft sigmoid_norm""".split()
ONLY_REVERSE_KL = {"nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


# Names of modules between vision tower and language model.
PROJECTORS = """multi_modal_projector connector merger deepstack_merger_list""".split()
DUMMY_ROW = {"question": "What?", "chosen": "seven", "rejected": "No."}


def read_rows(name, split, settings):
    """The numbered rows of a split; None if `split` is None and there is no test split. Raises SystemExit."""
    rows = read_dataset(name, split, settings)
    if rows is None:
        return None
    columns = {
        "image": settings.image_column or first_column(rows, ("image", "images", "file_name"), "image"),
        "question": settings.question_column
        or first_column(rows, ("question", "prompt", "conversations", "messages"), "question"),
        "chosen": settings.chosen_column,
        "rejected": settings.rejected_column,
    }
    if columns["question"] not in rows.column_names and isinstance(rows[0].get(columns["chosen"]), list):
        del columns["question"]  # the answers are whole conversations, which begin with it
    has_turns = any(isinstance(rows[0].get(column), (list, dict)) for column in columns.values())
    if columns["image"] not in rows.column_names and has_turns:
        del columns["image"]  # it is in a turn
    require_columns(rows, columns, name, optional=("chosen", "rejected"))
    rows = check_columns(rows, list(columns.values()), [columns.get("image")], name, settings)
    return rename_columns(rows, columns)


def append_answers(values, is_token, of_answers, padding=0):
    """Values of the tokens of B prompts, (B, L), and lists of those of 2B answers -> (2B, L'), padded on the right.
    The answers follow the prompts directly: the prompts' padding is taken off."""
    of_prompts = [row[mask] for row, mask in zip(values, is_token, strict=True)]
    rows = [torch.cat([row, torch.tensor(more)]) for row, more in zip(of_prompts * 2, of_answers, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)


def mark_trained_pair(batch, processor):
    """The first pair of a batch as text: the prompt, then both answers, tokens of the loss in «»."""
    is_answer = batch["completion_mask"] == 1
    batch = batch | {"labels": batch["input_ids"].masked_fill(~is_answer, -100)}
    without_answers = batch | {"attention_mask": batch["attention_mask"].masked_fill(is_answer, 0)}
    prompt = mark_trained_tokens(without_answers, processor)
    chosen = mark_trained_tokens(batch, processor).removeprefix(prompt)
    rejected = mark_trained_tokens(batch, processor, n=len(is_answer) // 2).removeprefix(prompt)
    return f"{prompt}\n  chosen:   {chosen}\n  rejected: {rejected}"


def set_image_size(processor, settings):
    """Image splitting, pixels and, for Idefics2, the longest edge. Raises SystemExit if the model does not take it."""
    image_processor, edge = processor.image_processor, settings.longest_edge
    splits = hasattr(image_processor, "do_image_splitting")
    require(splits or not settings.image_splitting, f"--image_splitting: {type(image_processor).__name__} has none")
    if splits:
        image_processor.do_image_splitting = settings.image_splitting
    set_pixels(processor, settings)
    if type(processor).__name__ != "Idefics2Processor":
        require(edge == Settings.longest_edge, "--longest_edge is for Idefics2; other models have a size of their own")
        return
    smallest, largest = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
    if edge == Settings.longest_edge:  # the default also fits models that only take smaller images
        edge = min(edge, largest)
    require(smallest <= edge <= largest, f"--longest_edge {edge}: it must be from {smallest} to {largest} pixels")
    image_processor.size = {**dict(image_processor.size), "longest_edge": edge}


def check_losses(training):
    """Stop if a loss is not DPOTrainer's, or does not take the flags that go with it. Raises SystemExit."""
    losses, smoothing, divergence = set(training.loss_type), training.label_smoothing, training.f_divergence_type
    unknown = " ".join(sorted(losses.difference(LOSSES)))
    if unknown or not losses:
        elsewhere = "kto, orpo, cpo, simpo and others have trainers of their own in TRL"
        fail(f"--loss_type {unknown}: known are {', '.join(LOSSES)} ({elsewhere})")
    if "exo_pair" in losses:
        require(0 < smoothing < 1, "--loss_type exo_pair needs --label_smoothing above 0 and below 1, such as 0.001")
    if losses & {"robust", "aot", "aot_unpaired"}:
        require(0 <= smoothing < 0.5, "--loss_type robust and aot take --label_smoothing from 0 to below 0.5")
    elif "exo_pair" not in losses:
        require(smoothing == 0, "--label_smoothing is for the losses exo_pair, robust and aot")
    is_open = BATCH_SIZES[0] in training.auto_batch and training.device.type == "cuda"
    if losses & {"aot", "aot_unpaired"}:
        training.must_not_differ = {BATCH_SIZES[0]}  # on resume
        require(
            not is_open, "--loss_type aot compares the pairs of a batch: say how many, --per_device_train_batch_size"
        )
    require(divergence in DIVERGENCES, f"--f_divergence_type {divergence}: known are {', '.join(DIVERGENCES)}")
    others = " ".join(sorted(losses & ONLY_REVERSE_KL)) if divergence != "reverse_kl" else ""
    require(not others, f"--f_divergence_type {divergence}: {others} can only have reverse_kl")


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


def first_column(rows, names, otherwise):
    """The first of these columns that rows have; if they have none, the name `otherwise`."""
    return next((name for name in names if name in rows.column_names), otherwise)


def require_columns(rows, columns, name, optional=()):
    """Stop unless rows have these columns, {new name: old}. Those in `optional` may be missing, all of them together.
    Raises SystemExit with the flags to name a column."""
    missing = [new for new, old in columns.items() if old not in rows.column_names]
    alike = did_you_mean(columns[missing[0]], rows.column_names) if missing else ""
    if missing and (set(missing) != set(optional) or alike):
        described = " and ".join(f"{columns[new]!r} (--{new}_column)" for new in missing)
        available = [column for column in rows.column_names if column not in ("row", "folder")]
        fail(f"{name} has no column {described}{alike or '; it has ' + ', '.join(available)}")
    is_unique = len(set(columns.values())) == len(columns)
    require(is_unique, f"one column cannot be two of {', '.join(columns)}: {columns}")


def rename_columns(rows, columns):
    """Rows of which only these columns are left, under new names: {new: old}. (`id`, `row`, `folder` stay.)"""
    new_names = {old: new for new, old in columns.items() if old in rows.column_names}
    others = ("id", "row", "folder")
    also_kept = [column for column in others if column in rows.column_names and column not in new_names]
    # Always in the same order: it is part of the key by which checked rows are cached.
    return rows.select_columns([*new_names, *also_kept]).rename_columns(new_names)


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


def as_turns(cell, role):
    """A cell -> list of turns: those that it has, or one of this role, if it is a text, a message or parts of one."""
    turns = cell if isinstance(cell, list) else [cell]
    if not all(isinstance(turn, dict) and turn.keys() & {"content", "value"} for turn in turns):
        return [] if is_missing(cell) else [{"role": role, "content": cell}]
    return [{**turn, "role": role} if is_missing([turn.get("role"), turn.get("from")]) else turn for turn in turns]


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


def count_images(messages, images):
    """How many images a row has: `images` of its column, and those that parts of its messages bring."""
    parts = [part for message in messages for part in message["content"] if part.get("image") is not None]
    return len(images) + len(parts)


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


def require_answer(said, message, control_tokens):
    """Raises BadRow unless `said`, the text that is trained, ends with this answer, then only control tokens and white
    space, and contains its thought."""
    text, answer = said.strip(), text_of(message).strip()
    while not text.endswith(answer):
        ending = next((token for token in control_tokens if text.endswith(token)), None)
        if ending is None:
            detail = f"{answer!r:.100} is not all that stands before a stop token, but {said!r:.200}"
            raise BadRow("answer not ended", f"{detail}: the next turn must be a question, and no stop token be typed")
        text = text.removesuffix(ending).rstrip()
    thought = message.get("reasoning_content", "")
    if thought not in said:
        raise BadRow("text left out", f"the chat template leaves out or changes the thought {thought!r:.200}")


def shows_images_first(processor):
    """Whether the chat template puts the images of a turn before its text, wherever they are."""
    parts = [{"type": "text", "text": "question"}, {"type": "image"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}])
    return text.find(processor.image_token) < text.rfind("question")


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


def answer_turn(text):
    """A text -> the assistant's turn."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


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


def stop_ids_of(tokenizer, settings):
    """The ids of the tokens at which a model stops: the tokenizer's EOS, and those of its generation_config.json or,
    without one, of its config.json."""
    name, revision = settings.model_name_or_path, settings.model_revision
    ids = None
    with contextlib.suppress(OSError, ValueError):  # a processor's folder has neither
        try:
            ids = transformers.GenerationConfig.from_pretrained(name, revision=revision).eos_token_id
        except OSError:
            config = transformers.AutoConfig.from_pretrained(name, revision=revision)
            ids = transformers.GenerationConfig.from_model_config(config).eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({*ids, tokenizer.eos_token_id} - {None})


def no_second_bos(tokenizer, text):
    """The tokenizer's option for a text that begins with BOS: not to add one."""
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return {"add_special_tokens": False} if has_bos else {}


def encode_chats(processor, texts, conversations, padding_side="right"):
    """Texts of chats, and the messages with their PIL images -> (the processor's batch; for each text what the
    processor put in for its images, or None if it does not say). Raises BadRow."""
    images = [pil_images(messages) for messages in conversations]
    offsets, replace = [], processor.get_text_with_replacements

    # return_text_replacement_offsets would do, but some processors fail with it if the first text has no image.
    def replace_and_keep_offsets(*args, **options):
        replaced = replace(*args, **options)
        offsets.append(replaced[1])
        return replaced

    try:
        with patch.object(processor, "get_text_with_replacements", replace_and_keep_offsets):
            batch = processor(
                text=list(texts),
                images=images if any(images) else None,
                return_tensors="pt",
                padding=True,
                padding_side=padding_side,
                **no_second_bos(processor.tokenizer, texts[0]),
            )
    except Exception as error:  # processors raise many kinds, for images too small or too narrow for them
        raise BadRow("unfit for the processor", f"{type(error).__name__}: {error}") from error
    return batch, offsets[0] if any(offsets) else [None] * len(texts)


def follow_prompt(prompt, text, answer):
    """The text of a row, whose last turn is this answer, in which it follows the prompt of inference: if nothing but
    white space is in the way, that of the prompt is kept."""
    pattern = r"\s*".join(map(re.escape, "".join(prompt.split())))
    found = re.match(rf"\s*{pattern}\s*", text)
    if found is None or text.startswith(prompt):
        return text
    start = found.end()
    space = answer[: len(answer) - len(answer.lstrip())]  # of the answer's own
    return prompt + text[start - len(space) if answer in text else start :]


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


# Where the parts of a model are: paths of modules, several of projectors, and in `linear` those of all linear layers.
Parts = namedtuple("Parts", "vision projectors decoder head linear")


def find_parts(settings, projector_names):
    """The Parts of a model, as it says itself, before any weights load. Its projectors are found by the last names of
    their paths. Raises SystemExit if it has no vision tower, language model or head of its own."""
    model = empty_model(settings)
    path_of = {module: path for path, module in model.named_modules()}
    vision, decoder, head = model.get_encoder(modality="image"), model.get_decoder(), model.get_output_embeddings()
    if model.base_model is model:  # SFTTrainer's loss needs a model that runs without its head
        head = None
    parts = {"vision tower": vision, "language model": decoder, "LM head": head}
    missing = [part for part, module in parts.items() if not path_of.get(module)]  # without a part, it is the model
    kind = f"{settings.model_name_or_path} is a {model.config.model_type}"
    require(not missing, f"{kind}, in which no {' and no '.join(missing)} can be found: this recipe cannot train it")
    projectors = []
    for path, module in model.named_modules():
        is_new = not any(is_inside(path, part) for part in (path_of[decoder], *projectors))
        if is_new and path.rpartition(".")[2] in projector_names:
            is_list = isinstance(module, torch.nn.ModuleList)  # which PEFT cannot copy as one
            projectors += [f"{path}.{n}" for n in range(len(module))] if is_list else [path]
    is_linear = torch.nn.Linear.forward  # some routers of experts inherit from Linear, but do more
    linear = [path for path, module in model.named_modules() if type(module).forward is is_linear]
    return Parts(path_of[vision], projectors, path_of[decoder], path_of[head], linear)


def linear_layers_in(parts, path):
    """Paths of the linear layers in one part of a model, without those of other parts that are inside it."""
    others = [other for other in (parts.vision, *parts.projectors, parts.decoder, parts.head) if other != path]
    others = [other for other in others if is_inside(other, path)]
    inside = [layer for layer in parts.linear if is_inside(layer, path)]
    return [layer for layer in inside if not any(is_inside(layer, other) for other in others)]


def layers_within(path, names):
    """A regex of the full paths of all modules of these names in the module `path`."""
    return rf"{re.escape(path)}\.(.*\.)?({'|'.join(map(re.escape, names))})"


def unused_tower_layers(config, tower):
    """A regex of the last layers of a vision tower (the regex of its path) that its features do not use, so that
    adapters there would get no gradient. None if all layers are used."""
    features = getattr(config, "vision_feature_layer", None)
    if features is None:
        return None
    indices = features if isinstance(features, list) else [features]
    # hidden_states[i], of depth + 1, is what the first i layers make. Below 0: counted from the end.
    depth = config.vision_config.num_hidden_layers
    num_used = max(index % (depth + 1) for index in indices)
    unused = "|".join(str(layer) for layer in range(num_used, depth))
    return rf"{tower}\.(.*\.)?layers\.({unused})\..*" if unused else None


def image_text_config(settings):
    """The configuration of a model that reads images and text, and has no encoder for text. Raises SystemExit for
    another, and for one that needs code from the hub."""
    name = settings.model_name_or_path
    with fail_on_source("--model_name_or_path", name):
        config = transformers.AutoConfig.from_pretrained(
            name, revision=settings.model_revision, trust_remote_code=False
        )
    is_known = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    require(is_known, f"{name} is a {config.model_type}, which Transformers does not have for images and text")
    texts = config.get_text_config()
    has_encoder = getattr(config, "is_encoder_decoder", False) or getattr(texts, "is_encoder_decoder", False)
    require(not has_encoder, f"{name} is a {config.model_type}, an encoder-decoder: this recipe trains decoders only")
    return config


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


def check_attention_kernel(settings, training, model):
    """Give a model without weights the kernel of --attn_implementation. Raises SystemExit if it does not take it, or
    cannot train with it on this machine."""
    flag = f"--attn_implementation {settings.attn_implementation}"
    if settings.attn_implementation:
        with fail_on_error(flag):
            model.set_attn_implementation(attention_kernel(settings))
        on_any_machine = settings.attn_implementation in ("sdpa", "eager")
        needs_gpu = f"{flag} needs a GPU: it has no backward pass on a CPU"
        require(on_any_machine or training.device.type == "cuda", needs_gpu)


def attention_kernel(settings):
    """--attn_implementation as from_pretrained takes it: for the language model. All else keeps its own, sdpa."""
    return {"text_config": settings.attn_implementation} if settings.attn_implementation else None


def is_adapter_folder(name):
    """Whether a name is a folder with a processor, but without a model, as that of an adapter."""
    return os.path.isdir(name) and not os.path.exists(os.path.join(name, "config.json"))


def fit_image_tokens(processor, settings):
    """Make the processor write as many image tokens for an image as the model makes features, by values from its
    config.json. Raises SystemExit if the numbers differ all the same."""
    name = settings.model_name_or_path
    if is_adapter_folder(name):
        return  # its processor was made to fit before training
    device = torch.device("meta")
    model = empty_model(settings)
    config = model.config
    has_resampler = hasattr(config, "perceiver_config")  # it cannot run without data, and needs no run
    if hasattr(processor, "num_additional_image_tokens"):
        vision = config.vision_config
        image = torch.empty(1, 3, vision.image_size, vision.image_size, device=device)
        num_outputs = model.get_encoder(modality="image")(image).last_hidden_state.shape[1]
        values = {"patch_size": vision.patch_size}
        values["vision_feature_select_strategy"] = config.vision_feature_select_strategy
        values["num_additional_image_tokens"] = num_outputs - (vision.image_size // vision.patch_size) ** 2
        for attribute, value in values.items():
            if getattr(processor, attribute) != value:
                say(f"{name}: the processor's {attribute} {getattr(processor, attribute)} is {value}, by config.json")
                setattr(processor, attribute, value)
    text, content = processor.image_token, [{"type": "image"}, {"type": "text", "text": "x"}]
    with fail_on_error(f"{name}: its processor's files, or chat template, do not fit its config.json"):
        if processor.chat_template:
            text = processor.apply_chat_template([{"role": "user", "content": content}])
        inputs = dict(processor(text=[text], images=[[Image.new("RGB", (64, 64))]], return_tensors="pt"))
        image_token_id = getattr(config, "image_token_id", processor.image_token_id)
        num_tokens = int((inputs["input_ids"] == image_token_id).sum())
        inputs = {key: value for key, value in inputs.items() if not key.endswith(("_ids", "_mask", "labels"))}
        if has_resampler:
            num_features = config.perceiver_config.resampler_n_latents * inputs["pixel_values"].shape[1]
        elif inputs.keys() <= {"pixel_values", "image_sizes"}:  # other models need more, and cannot be asked
            inputs["pixel_values"] = inputs["pixel_values"].to(device)
            try:
                features = model.get_image_features(**inputs).pooler_output
                num_features = sum(math.prod(feature.shape[:-1]) for feature in features)
            except Exception:  # in some models the number depends on the values of an image, which are missing
                if hasattr(processor, "num_additional_image_tokens"):
                    raise
                return
        else:
            return
        if num_tokens != num_features:
            raise ValueError(f"it writes {num_tokens} tokens for an image, of which the model makes {num_features}")


def set_thinking(processor, enable_thinking):
    """Write this choice into a chat template that knows it, for inference with the saved processor, too."""
    if "enable_thinking" in processor.chat_template:
        beginning = "{%- if enable_thinking is not defined %}{%- set enable_thinking = CHOICE %}{%- endif %}"
        beginning = beginning.replace("CHOICE", str(enable_thinking).lower())
        processor.chat_template = beginning + processor.chat_template


def check_pixels(settings):
    """Stop if --min_pixels and --max_pixels are no range of an image's pixels. Raises SystemExit."""
    smallest = 1 if settings.min_pixels is None else settings.min_pixels
    largest = smallest if settings.max_pixels is None else settings.max_pixels
    require(0 < smallest <= largest, "--min_pixels and --max_pixels: from 1 up, and the first not above the second")


def set_pixels(processor, settings):
    """Limit the pixels of an image, if asked. Raises SystemExit for a processor that has no such limits."""
    images = processor.image_processor
    for edge, pixels in (("shortest_edge", settings.min_pixels), ("longest_edge", settings.max_pixels)):
        if pixels is not None:
            counts = "max_pixels" in images.valid_kwargs.__annotations__
            require(counts, f"--min_pixels, --max_pixels: {type(images).__name__} does not resize images by pixels")
            images.size[edge] = pixels
    if settings.min_pixels is not None or settings.max_pixels is not None:
        least, most = images.size["shortest_edge"], images.size["longest_edge"]
        problem = f"the model's images would have at least {least} and at most {most} pixels: give both flags"
        require(least <= most, f"--min_pixels, --max_pixels: {problem}")


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


def check_mixed_batches(collator, train_rows, eval_rows, training):
    """Stop if a processor cannot make a batch of rows with and without images, and there will be such. Raises
    SystemExit."""
    for rows, name in zip((train_rows, eval_rows), BATCH_SIZES, strict=True):
        is_single = getattr(training, name) == 1 and name not in training.auto_batch
        has_images = [] if rows is None or is_single else [count > 0 for count in image_counts(rows)]
        if len(set(has_images)) == 2:
            with fail_on_error("this processor cannot mix rows with and without images; leave out those of one kind"):
                both = [rows[has_images.index(False)], rows[has_images.index(True)]]
                ReadableRows(collator, rows, training.seed)(both)


def where_they_differ(prompt, whole):
    """How a row's text goes on where it departs from the prompt of inference."""
    if whole.startswith(prompt):
        first, last = whole[len(prompt) :][:20], prompt[-20:]
        return (
            f"its first characters, {first!r}, change the prompt's last tokens, {last!r}; in a row begin differently"
        )
    same = len(os.path.commonprefix([prompt, whole]))
    before, of_prompt, of_row = prompt[max(0, same - 20) : same], prompt[same:][:20], whole[same:][:20]
    return f"after {before!r} the prompt has {of_prompt!r}, the row {of_row!r}"


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


def takes_mask(model):
    """Whether the language model's kernel of attention takes what shared_start_mask makes."""
    return model.config.get_text_config()._attn_implementation in ("sdpa", "eager", "flex_attention")


def shared_start_mask(part, position, real, model, block=None):
    """The attention mask of sequences in which several texts follow one start: a token sees those before it that are
    in the start or in its own text, as if each text had a sequence of its own. All (B, S):
    part: 0 in the start, n in the n-th text. position: in a sequence of its own. real: not padding.
    block: tokens with the same number see each other, later ones, too; -1 has no block.
    -> (B, 1, S, S), tokens along dim 2 see those along dim 3: booleans for sdpa, what is added to the scores for eager
    attention, a BlockMask for flex_attention, which then skips blocks of the mask in which nothing is seen."""

    def sees(row, head, token, other):
        is_seen = (part[row, other] == 0) | (part[row, other] == part[row, token])
        is_seen = is_seen & (position[row, other] <= position[row, token])
        if block is not None:
            is_seen = is_seen | ((block[row, other] == block[row, token]) & (block[row, token] >= 0))
        return (is_seen & real[row, other]) | (token == other)  # padding sees itself, or gives NaN

    num_rows, length = part.shape
    attention = model.config.get_text_config()._attn_implementation
    if attention == "flex_attention":
        return create_block_mask(sees, num_rows, None, length, length, device=part.device)
    rows = torch.arange(num_rows, device=part.device)[:, None, None]
    tokens = torch.arange(length, device=part.device)
    mask = sees(rows, None, tokens[:, None], tokens)
    if attention == "eager":
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    return mask[:, None]


@contextlib.contextmanager
def scored_at(model, trained_at, with_mask=True):
    """Optional, for speed, with TRL's trainers: within the `with` block TRL's head gets the hidden states of these
    positions only, (1, N, H) instead of (B, L, H). It would find them itself, by a mask, for which the host waits.
    with_mask false: no mask for padding. On the right no real token sees it, and the fastest kernel takes no mask."""

    def without_mask(module, args, inputs):
        return args, inputs if with_mask else {**inputs, "attention_mask": None}

    def select(module, args, output):
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1).index_select(0, trained_at)[None]
        return output

    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):  # TRL takes its weight without calling it, and would not average its gradient
        head.unshard()
    with contextlib.ExitStack() as stack:
        for hook in (
            model.base_model.register_forward_pre_hook(without_mask, with_kwargs=True),
            model.base_model.register_forward_hook(select),
        ):
            stack.callback(hook.remove)
        # Where this is true TRL looks for the trained tokens. (What its kernels ask is another name for it.)
        stack.enter_context(patch("trl.trainer.utils._use_triton", lambda device: False, create=True))
        yield


if __name__ == "__main__":
    main()
