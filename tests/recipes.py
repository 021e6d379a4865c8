"""The five recipes as the tests meet them: how each is started on its tiny model, and how a row of each looks."""

import contextlib
import importlib
import io
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

NAMES = ["sft_llava", "idefics2_docvqa", "dpo_idefics2", "finetune_minicpm_lora", "llava_two_stage"]
FOLDERS = {  # the fixture with the tiny model and data of each
    "sft_llava": "tiny_llava",
    "idefics2_docvqa": "tiny_forms",
    "dpo_idefics2": "tiny_pairs",
    "finetune_minicpm_lora": "tiny_minicpm",
    "llava_two_stage": "tiny_parts",
}
OTHER_ANSWER = "Something else entirely."  # rejected, in a row of dpo_idefics2.py that is made of question and answer


class Loaded(BaseException):
    """Weights were asked for: the recipe found nothing to complain about."""


def short_run(folder, out, data=("dataset_name", "data"), **settings):
    """The list of flags for a run on the CPU of the model and the data in `folder`, into `out`.

    `settings` add to them, or with None take one away. `data`: the flag that names the data, and where they are.
    """
    own = {"use_cpu": True, "model_name_or_path": folder / "model", "output_dir": out, data[0]: folder / data[1]}
    settings = {**own, "dataloader_num_workers": 0, "report_to": "none", **settings}
    argv = []
    for name, value in settings.items():
        if value is not None:
            argv += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return argv


def minicpm_run(folder, out, **settings):
    """The list of flags for a run of finetune_minicpm_lora.py on the CPU; 2.6 brings its own code."""
    own = {"trust_remote_code": True} if (folder / "model" / "modeling_minicpmv.py").exists() else {}
    own |= {"image_folder": folder / "json" / "images", "lora_r": 8}
    return short_run(folder, out, ("dataset_name", "json/train.json"), **{**own, **settings})


def two_stage_run(folder, out, stage="align", **settings):
    """The list of flags for a run of llava_two_stage.py on the CPU.

    In the stage align it begins with the two parts, in instruct with align/, unless parts are named.
    """
    joined = stage == "align" and "model_name_or_path" not in settings or "pretrain_mm_mlp_adapter" in settings
    own = {"stage": stage, "model_name_or_path": folder / "align", "image_folder": folder / "json" / "images"}
    if joined:
        own |= {"model_name_or_path": None, "vision_tower": folder / "vision", "language_model": folder / "language"}
    own |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    data = "json/captions.json" if stage == "align" else "json/train.json"
    return short_run(folder, out, ("dataset_name", data), **{**own, **settings})


def said(*turns, image=None, **more):
    """Texts of the user and the assistant by turns -> a row of LLaVA JSON."""
    conversations = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
    return {**more, **({} if image is None else {"image": image}), "conversations": conversations}


def chat(*turns, images=(), **more):
    """(role, content) pairs -> a row of messages and images."""
    messages = [{"role": role, "content": content} for role, content in turns]
    return {**more, "messages": messages, "images": list(images)}


def asks(question, *answers, image="red.png", **more):
    """A question about a page and its accepted answers -> a row of idefics2_docvqa.py."""
    return {**more, "image": image, "question": question, "answers": list(answers)}


def prefers(question, chosen, rejected, image="red.png", **more):
    """A question about an image, the better answer and the worse one -> a row of dpo_idefics2.py."""
    return {**more, "image": image, "question": question, "chosen": chosen, "rejected": rejected}


def talks(*turns, image="red.png", **more):
    """Texts of the two sides by turns, and an image or {placeholder: image} -> a row of finetune_minicpm_lora.py."""
    conversations = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    return {**more, **({} if image is None else {"image": image}), "conversations": conversations}


@dataclass(frozen=True)
class Recipe:
    """One recipe with its tiny model and data; what it writes and reads goes to `tmp_path`."""

    name: str
    folder: Path
    tmp_path: Path

    @property
    def module(self):
        return importlib.import_module(self.name)

    @property
    def talks_in_turns(self):
        """Whether a row may be a conversation of several turns, with several images or none."""
        return self.name in ("sft_llava", "finetune_minicpm_lora", "llava_two_stage")

    def row(self, question, answer, image="red.png", **more):
        """A question about an image and its answer, in the recipe's simplest form; of DPO the chosen answer."""
        if self.name == "idefics2_docvqa":
            return asks(question, answer, image=image, **more)
        if self.name == "dpo_idefics2":
            return prefers(question, answer, OTHER_ANSWER, image=image, **more)
        if self.name == "finetune_minicpm_lora":
            return talks(f"<image>\n{question}", answer, image=image, **more)
        return said(f"<image>\n{question}", answer, image=image, **more)

    def flags(self, **settings):
        """Settings -> the list of flags for a run on the CPU into tmp_path/out; llava_two_stage.py's second stage."""
        out = settings.pop("output_dir", self.tmp_path / "out")
        if self.name == "finetune_minicpm_lora":
            return minicpm_run(self.folder, out, **settings)
        if self.name == "llava_two_stage":
            return two_stage_run(self.folder, out, **{"stage": "instruct", **settings})
        return short_run(self.folder, out, **settings)

    def flags_for(self, rows, **settings):
        """The same for a data file; relative image paths start in tmp_path, and no row is held out."""
        own = {"dataset_name": rows, "image_folder": self.tmp_path, "eval_fraction": 0}
        return self.flags(**{**own, **settings})

    def parse(self, **settings):
        """Settings -> (settings, training)."""
        return self.module.parse(self.flags(**settings))

    def collator(self, **settings):
        """Settings -> a Collator; relative image paths start in tmp_path."""
        settings, training = self.parse(**{"image_folder": self.tmp_path, **settings})
        return self.module.Collator(self.module.load_processor(settings), settings, training)

    def load_data(self, **settings):
        """Settings -> (rows to train on, rows to evaluate on), as main reads and checks them."""
        return load_data(self.module, *self.parse(**settings))

    def run(self, **settings):
        """Run main in this process, and return what it printed."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            self.module.main(self.flags(**settings))
        return printed.getvalue()

    def trainer(self, train=False, **settings):
        """The Trainer that main makes: before its first step, or with `train` after the last, and saved."""
        made, train_and_save = [], self.module.train_and_save

        def keep(trainer, checkpoint=None):
            made.append(trainer)
            if train:
                train_and_save(trainer, checkpoint)

        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.setattr(self.module, "train_and_save", keep)
            self.module.main(self.flags(**settings))
        return made[0]

    def refusal(self, argv):
        """The one message that main ends with before it loads any weights."""
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(self.module, "load_model", no_weights)
            with contextlib.redirect_stdout(io.StringIO()):
                self.module.main(argv)
        message = stopped.value.code  # a text: Python prints it and exits with status 1
        assert isinstance(message, str) and message.startswith("error: ") and "Traceback" not in message
        return message


def no_weights(*args):
    raise Loaded


def load_data(module, settings, training):
    """What a recipe's load_data makes of these settings, with the collator that its main would make."""
    collator = module.Collator(module.load_processor(settings), settings, training)
    return module.load_data(settings, training, collator)


def same(one, other):
    """Whether two batches hold the same values. In some a batch is nested, or holds lists of tensors."""
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def flat(batch):
    """A batch with all of the model's inputs side by side (for MiniCPM-V 2.6 most are in a dict)."""
    return {**batch.get("data", {}), **{key: value for key, value in batch.items() if key != "data"}}


def sequences(batch):
    """The (ids, labels) of each sequence of a batch, without padding. Every label is the token itself or -100."""
    batch, pairs = flat(batch), []
    labels = batch.get("labels")
    if labels is None:  # of DPO
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    for ids, learnt, mask in zip(batch["input_ids"], labels, batch["attention_mask"].bool()):
        assert (learnt[~mask] == -100).all() and ((learnt == ids) | (learnt == -100)).all()
        pairs.append((ids[mask].tolist(), learnt[mask].tolist()))
    return pairs


def trained(batch, tokenizer):
    """The runs of trained tokens of each sequence, as text, with the space before their first word."""
    texts = []
    for ids, labels in sequences(batch):
        runs = itertools.groupby(range(len(ids)), key=lambda n, labels=labels: labels[n] != -100)
        places = [list(run) for is_trained, run in runs if is_trained]
        before = [tokenizer.decode(ids[: run[0]]) for run in places]
        texts.append([tokenizer.decode(ids[: run[-1] + 1])[len(head) :] for run, head in zip(places, before)])
    return texts
