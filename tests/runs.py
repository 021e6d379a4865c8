"""Short runs of every recipe, for the tests of training and of its result: what is trained, and on which rows."""

import contextlib
import functools
import io
import itertools
import json
import re
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from conftest import Weights
from peft import get_peft_model
from recipes import FOLDERS, Recipe

SHORT = {
    "max_steps": 4,
    "eval_steps": 2,
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 1,
    "warmup_steps": 0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "sample_rows": 2,
    "learning_rate": 0.001,  # the shipped ones hardly move a model in four steps
    "load_best_model_at_end": False,
    "disable_tqdm": True,
}
SAMPLE_TOKENS = dict.fromkeys(FOLDERS, "sample_tokens") | dict.fromkeys(
    ["idefics2_docvqa", "dpo_idefics2"], "max_new_tokens"
)


class Variant(NamedTuple):
    """The flags of a way to train, and regexes of the full paths of layers it adapts and weights it trains whole."""

    recipe: str
    flags: dict
    adapted: str = ""
    whole: str = ""
    folder: str | None = None  # the fixture with the model, where it is not the recipe's usual one


FLOAT, FULL = {"load_in_4bit": False}, {"load_in_4bit": False, "lora_r": 0}
SMALL_STEPS = {"bf16": True, "learning_rate": 1e-6}  # they would round to nothing if what is trained were bf16, too
LANGUAGE, WHOLE_LANGUAGE = r"model\.language_model\..*_proj", r"(model\.language_model|lm_head)\..*"
PROJECTOR, TOWER = r"model\.multi_modal_projector\..*", r"model\.vision_tower\..*"
USED_TOWER = r"model\.vision_tower\.(?!encoder\.layers\.2\.|post_layernorm\.).*"  # features come from the last but one
ATTENTION = r"model\.(text_model|connector\.perceiver_resampler)\..*\.[qkvo]_proj|lm_head"
MISTRAL = r"model\.text_model\..*_proj"
MERGER, RESAMPLER = r"model\.merger\..*", r"resampler\..*"
LAYERS, LAYERS_26 = r"model\.language_model\..*", r"llm\.model\..*"
QUERIES = r".*\.(q_proj|k_proj)"
QUERIES_OF_1 = (
    r"model\.(language_model|vision_tower\.encoder)\.layers\.1\..*k_proj|model\.language_model.*\.1\..*q_proj"
)
ALL_RATES = {"tune_vision": True, "vision_learning_rate": 1e-4, "projector_learning_rate": 1e-2}
NAMES = ["q_proj", "mlp.down_proj", "layers.0.mlp.up_proj"]
ALTERNATIVES = {"lora_target_modules": r".*language_model.*\.q_proj|.*\.k_proj", "lora_layers_to_transform": 1}
WORDS, TUNE_LLM = {"lora_modules_to_save": "embed_tokens"}, {"use_lora": False, "tune_llm": True}
ALIGN, LORA = {"stage": "align"}, {"lora_r": 8, "lora_alpha": 16}
QLORA = LORA | {"load_in_4bit": True}
JOINED, STAGE_TOWER = {"pretrain_mm_mlp_adapter": "align"}, {"vision_learning_rate": 1e-4}
GOING_ON = {"stage": "align", "model_name_or_path": "align", "bf16": True, "projector_learning_rate": 1e-6}

sft = functools.partial(Variant, "sft_llava")
docvqa = functools.partial(Variant, "idefics2_docvqa")
dpo = functools.partial(Variant, "dpo_idefics2")
stage = functools.partial(Variant, "llava_two_stage")


def minicpm(flags, adapted=LAYERS, whole=MERGER, folder=None):
    return Variant("finetune_minicpm_lora", flags, adapted, whole, folder)


def minicpm26(flags, adapted=LAYERS_26, whole=RESAMPLER):
    return minicpm(flags, adapted, whole, "tiny_minicpm26")


VARIANTS = {
    "sft: 4-bit": sft({}, LANGUAGE),
    "sft: 4-bit, projector": sft({"train_projector": True} | SMALL_STEPS, LANGUAGE, PROJECTOR),
    "sft: 4-bit, DoRA": sft({"use_dora": True}, LANGUAGE),
    "sft: float": sft(FLOAT, LANGUAGE),
    "sft: float, projector": sft(FLOAT | {"train_projector": True}, LANGUAGE, PROJECTOR),
    "sft: float, DoRA": sft(FLOAT | {"use_dora": True}, LANGUAGE),
    "sft: no checkpointing": sft(FLOAT | {"activation_checkpointing": False}, LANGUAGE),
    "sft: full": sft(FULL, "", WHOLE_LANGUAGE),
    "sft: full, projector": sft(FULL | {"train_projector": True} | SMALL_STEPS, "", f"{WHOLE_LANGUAGE}|{PROJECTOR}"),
    "docvqa: 4-bit": docvqa({}, ATTENTION),
    "docvqa: 4-bit, DoRA": docvqa({"use_dora": True} | SMALL_STEPS, ATTENTION),
    "docvqa: float": docvqa(FLOAT, ATTENTION),
    "docvqa: float, DoRA": docvqa(FLOAT | {"use_dora": True}, ATTENTION),
    "dpo: 4-bit": dpo({}, r"model\..*"),
    "dpo: 4-bit, language": dpo({"adapters": "language"} | SMALL_STEPS, MISTRAL),
    "dpo: float": dpo(FLOAT, r"model\..*"),
    "dpo: float, DoRA": dpo(FLOAT | {"use_dora": True}, r"model\..*"),
    "dpo: float, language": dpo(FLOAT | {"adapters": "language", "lora_r": 4}, MISTRAL),
    "dpo: stock path": dpo(FLOAT | {"shared_prompt": False}, r"model\..*"),
    "4.6: lora": minicpm({}),
    "4.6: vision": minicpm(ALL_RATES, whole=f"{TOWER}|{MERGER}"),
    "4.6: no projector": minicpm({"projector_learning_rate": 0} | SMALL_STEPS, whole=""),
    "4.6: full": minicpm(TUNE_LLM, "", f"{LAYERS}|{MERGER}"),
    "4.6: all of it": minicpm(TUNE_LLM | {"tune_vision": True} | SMALL_STEPS, "", f"{LAYERS}|{MERGER}|{TOWER}"),
    "4.6: projector": minicpm({"use_lora": False}, ""),
    "4.6: regex": minicpm({"lora_target_modules": QUERIES}, QUERIES),
    "4.6: names": minicpm(
        {"lora_target_modules": NAMES}, rf"{LAYERS}(\.q_proj|\.mlp\.down_proj|layers\.0\.mlp\.up_proj)"
    ),
    "4.6: alternatives": minicpm(ALTERNATIVES, QUERIES_OF_1),
    "4.6: one layer": minicpm({"lora_layers_to_transform": 1}, r"model\.language_model\.layers\.1\..*"),
    "4.6: every bias": minicpm({"lora_bias": "all"}, whole=rf"{MERGER}|{LAYERS}\.bias"),
    "4.6: words": minicpm(WORDS, whole=rf"{MERGER}|{LAYERS}embed_tokens\.weight"),
    "4.6: 4-bit": minicpm({"q_lora": True}),
    "4.6: 4-bit, words": minicpm(
        {"q_lora": True} | WORDS | SMALL_STEPS, whole=rf"{MERGER}|{LAYERS}embed_tokens\.weight"
    ),
    "4.7: lora": minicpm({}, folder="tiny_minicpm47"),
    "4.7: full": minicpm(TUNE_LLM, "", f"{LAYERS}|{MERGER}", "tiny_minicpm47"),
    "4.7: 4-bit, vision": minicpm(ALL_RATES | {"q_lora": True}, LAYERS, f"{TOWER}|{MERGER}", "tiny_minicpm47"),
    "2.6: lora": minicpm26({}),
    "2.6: vision": minicpm26(ALL_RATES, whole=rf"vpm\..*|{RESAMPLER}"),
    "2.6: full": minicpm26(TUNE_LLM | SMALL_STEPS, "", rf"llm\..*|{RESAMPLER}"),
    "2.6: projector": minicpm26({"use_lora": False}, ""),
    "2.6: regex": minicpm26({"lora_target_modules": QUERIES}, QUERIES),
    "2.6: biases": minicpm26({"lora_bias": "lora_only"}, whole=rf"{RESAMPLER}|{LAYERS_26}_proj\.bias"),
    "2.6: every bias": minicpm26({"lora_bias": "all"}, whole=rf"{RESAMPLER}|llm\..*\.bias"),
    "2.6: words": minicpm26(WORDS, whole=rf"{RESAMPLER}|llm\.model\.embed_tokens\.weight"),
    "2.6: 4-bit": minicpm26({"q_lora": True}),
    "align": stage(ALIGN, "", PROJECTOR),
    "align: vision": stage(ALIGN | STAGE_TOWER, "", f"{PROJECTOR}|{USED_TOWER}"),
    "align: going on": stage(GOING_ON, "", PROJECTOR),
    "instruct: full": stage({}, "", f"{PROJECTOR}|{WHOLE_LANGUAGE}"),
    "instruct: full, vision": stage(STAGE_TOWER, "", f"{PROJECTOR}|{WHOLE_LANGUAGE}|{USED_TOWER}"),
    "instruct: full, no projector": stage({"projector_learning_rate": 0} | SMALL_STEPS, "", WHOLE_LANGUAGE),
    "instruct: full, joined": stage(JOINED, "", f"{PROJECTOR}|{WHOLE_LANGUAGE}"),
    "instruct: projector": stage({"learning_rate": 0}, "", PROJECTOR),
    "instruct: lora": stage(LORA, LANGUAGE, PROJECTOR),
    "instruct: lora, vision": stage(LORA | STAGE_TOWER, LANGUAGE, f"{PROJECTOR}|{USED_TOWER}"),
    "instruct: lora, no projector": stage(LORA | {"projector_learning_rate": 0}, LANGUAGE),
    "instruct: lora, joined": stage(LORA | JOINED, LANGUAGE, PROJECTOR),
    "instruct: 4-bit": stage(QLORA | SMALL_STEPS | {"projector_learning_rate": 1e-6}, LANGUAGE, PROJECTOR),
    "instruct: 4-bit, vision": stage(QLORA | STAGE_TOWER, LANGUAGE, f"{PROJECTOR}|{USED_TOWER}"),
}


def write_rows(folder, out):
    """Copy a few rows of a tiny data set, those of each kind in turn: 12 to train on, 4 others to evaluate on."""
    shutil.copytree(folder / "json" / "images", out / "images")
    for name in ("train", "captions"):
        if (folder / "json" / f"{name}.json").exists():
            kinds = defaultdict(list)
            for row in json.loads((folder / "json" / f"{name}.json").read_text()):
                kinds[row["id"].split("-", 2)[-1]].append(row)
            rows = [row for some in itertools.zip_longest(*kinds.values()) for row in some if row]
            if "chosen" in rows[0]:  # pairs: some about two images, or none
                rows[1] |= {"image": [rows[1]["image"], rows[2]["image"]], "question": "<image><image>What are these?"}
                rows[4] |= {"image": None}
            (out / f"{name}.json").write_text(json.dumps(rows[:12]))
            (out / f"{name}-held.json").write_text(json.dumps(rows[12:16]))
    return out


@dataclass
class Run:
    """What main() made: the trainer, what it printed, and what is trained, before the first step and after each."""

    recipe: str
    argv: list
    out: Path
    trainer: transformers.Trainer
    text: str
    weights: list

    @property
    def first(self):
        return self.weights[0]

    @property
    def last(self):
        return self.weights[-1]

    def inputs(self, rows):
        """Rows -> what the model's forward pass takes; of pairs the prompts."""
        collator = self.trainer.data_collator
        if self.recipe == "dpo_idefics2":
            return dict(collator.tokenize([collator.messages_of(row)[:1] for row in rows], prompt=True))
        return {name: value for name, value in collator(list(rows)).items() if name != "labels"}


def run(module, argv, train=True, callbacks=()):
    """main(argv) in this process. Without `train` it is interrupted before its first step."""
    trainers, weights, text, stock = [], Weights(), io.StringIO(), module.Trainer.train

    def spy(self, *args, **kwargs):
        trainers.append(self)
        for callback in (weights, *callbacks):
            self.add_callback(callback)
        return stock(self, *args, **kwargs)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        patch.setattr(module.Trainer, "train", spy)
        if not train:
            patch.setattr(module.Trainer, "training_step", interrupt)
        with contextlib.nullcontext() if train else pytest.raises(SystemExit):
            module.main(argv)
    out = Path(argv[argv.index("--output_dir") + 1])
    return Run(module.__name__, argv, out, trainers[0], text.getvalue(), weights.seen)


class Runs:
    """Runs of the variants; what is trained is made once."""

    def __init__(self, request, tmp_path_factory):
        self.request, self.new_folder = request, tmp_path_factory.mktemp
        self.made = {}
        self.rows = functools.cache(self.rows)

    def folder(self, variant):
        """The folder with the variant's model."""
        wanted = VARIANTS[variant]
        return self.request.getfixturevalue(wanted.folder or FOLDERS[wanted.recipe])

    def rows(self, recipe):
        """The folder with the recipe's rows."""
        return write_rows(self.request.getfixturevalue(FOLDERS[recipe]), self.new_folder("rows"))

    def argv(self, variant, out=None, **more):
        """The flags of a short run; `more` wins, and with None takes one away. The model align is the fixture's."""
        recipe, flags = VARIANTS[variant][:2]
        folder, rows = self.folder(variant), self.rows(recipe)
        case = Recipe(recipe, folder, folder)
        file = "captions" if flags.get("stage") == "align" else "train"
        settings = SHORT | {"dataset_name": rows / f"{file}.json", "eval_dataset_name": rows / f"{file}-held.json"}
        settings |= {"image_folder": rows / "images", SAMPLE_TOKENS[recipe]: 4}
        settings["output_dir"] = out or self.new_folder("run") / "out"
        if recipe == "llava_two_stage":
            settings |= {"projector_learning_rate": 0.01}
            if file == "captions":
                settings["learning_rate"] = None
        settings |= flags | more
        return case.flags(
            **{
                name: folder / "align" if value == "align" and name != "stage" else value
                for name, value in settings.items()
            }
        )

    def module(self, variant):
        return Recipe(VARIANTS[variant].recipe, None, None).module

    def run(self, variant, out=None, train=True, callbacks=(), **more):
        return run(self.module(variant), self.argv(variant, out, **more), train, callbacks)

    def trained(self, variant):
        """A finished short run of this variant."""
        if variant not in self.made:
            self.made[variant] = self.run(variant)
        return self.made[variant]

    def take(self, variant):
        """The same, for a test that changes its model: no other test gets it."""
        self.trained(variant)
        return self.made.pop(variant)

    def untrained(self, variant, **more):
        """The trainer of a run before its first step, without dropout. Its adapters are not those that do nothing."""
        dropout = (
            {} if VARIANTS[variant].recipe == "dpo_idefics2" or not VARIANTS[variant].adapted else {"lora_dropout": 0}
        )
        done = self.run(variant, train=False, **{**dropout, **more})
        stir(done.trainer.model)
        return done

    def load(self, variant, argv=None, **more):
        """The base model of a variant, as the recipe loads it."""
        module = self.module(variant)
        return module.load_model(*module.parse(argv or self.argv(variant, **more)))


def plain(name):
    """A parameter's name without what PEFT adds to it."""
    return re.sub(r"^base_model\.model\.|\.(base_layer|original_module|modules_to_save\.default)\b", "", name)


def adapted(names):
    """Of a model with adapters the layers that have one, by their names in the base model."""
    return {plain(name).split(".lora_")[0] for name in names if ".lora_" in name}


def matching(pattern, names):
    return {name for name in names if re.fullmatch(pattern, name)}


def linear_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def stir(model):
    """With B = 0, as it starts, there is no gradient of A: give B random values, always the same ones."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)


def logits(model, inputs):
    """The model's logits at real tokens."""
    with torch.no_grad():
        return model.eval()(**inputs).logits[inputs["attention_mask"].bool()]


def says(model, collator, messages, tokens=4):
    """A model's answer to a conversation, by generate() itself."""
    batch = collator.tokenize([messages], prompt=True)
    with torch.no_grad():
        ids = model.eval().generate(
            **batch, max_new_tokens=tokens, max_length=None, do_sample=False, eos_token_id=collator.stop_ids
        )
    return collator.processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def same(one, two):
    """Whether two dicts of tensors are equal to the last bit."""
    return one.keys() == two.keys() and len(one) > 0 and all(torch.equal(one[name], two[name]) for name in one)


def adapted_base(module, argv):
    """The base model with the recipe's new adapter, by PEFT alone."""
    settings, training = module.parse(argv)
    model, adapter = module.load_model(settings, training), module.lora_config(settings)
    return model if adapter is None else get_peft_model(model, adapter)


def copy_of(batch):
    """The forward pass of 2.6 takes things out of its batch."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in batch.items()}
