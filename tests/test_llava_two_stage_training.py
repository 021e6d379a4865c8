"""llava_two_stage.py, from the parts to what two stages leave behind: how a LLaVA is joined, what is trained at which rate, the loss,
where the second stage begins, the samples, resuming, the result. On a tiny CLIP tower and a tiny Llama."""

import contextlib
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
import transformers
import yaml
from conftest import ROOT, Weights, fresh, log, refusal, said, two_stage_run
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
)

import llava_two_stage as recipe
from tools import generate

VISION, PROJECTOR, LANGUAGE = recipe.VISION, recipe.PROJECTOR, recipe.LANGUAGE
SHORT = {
    "max_steps": 4,
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "warmup_steps": 0,
    "sample_rows": 2,
    "sample_tokens": 4,
    "projector_learning_rate": 0.01,  # the shipped rates hardly move a model in four steps
    "load_best_model_at_end": False,
    "disable_tqdm": True,
}
LORA, TOWER = {"lora_r": 8, "lora_alpha": 16}, {"vision_learning_rate": 1e-4}
VARIANTS = {  # stage, settings
    "align": ("align", {}),
    "align, vision": ("align", TOWER),
    "align, going on": ("align", {"model_name_or_path": "align"}),
    "full": ("instruct", {}),
    "full, vision": ("instruct", TOWER),
    "full, no projector": ("instruct", {"projector_learning_rate": 0}),
    "full, joined": ("instruct", {"pretrain_mm_mlp_adapter": "align"}),
    "projector": ("instruct", {"learning_rate": 0}),
    "lora": ("instruct", LORA),
    "lora, vision": ("instruct", LORA | TOWER),
    "lora, no projector": ("instruct", LORA | {"projector_learning_rate": 0}),
    "lora, joined": ("instruct", LORA | {"pretrain_mm_mlp_adapter": "align"}),
    "4-bit": ("instruct", LORA | {"load_in_4bit": True}),
    "4-bit, vision": ("instruct", LORA | {"load_in_4bit": True} | TOWER),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


# ------------------------------------------------------------------------------------------------- what the tests use
@pytest.fixture(scope="session")
def data(tiny_parts, tmp_path_factory):
    """A folder with 16 rows to train on and 4 others, in align.json and align-held.json captions, in instruct.json and instruct-held.json
    conversations, of which 9 and 2 have a picture; and images/."""
    out = tmp_path_factory.mktemp("data")
    shutil.copytree(tiny_parts / "json" / "images", out / "images")
    rows = json.loads((tiny_parts / "json" / "train.json").read_text())
    seen, digits = [row for row in rows if "image" in row], "zero one two three four five six seven eight nine".split()
    blind = [said(f"Which digit comes after {one}?", next, id=one) for one, next in zip(digits, digits[1:])]
    captions = json.loads((tiny_parts / "json" / "captions.json").read_text())
    written = {"align": captions[:16], "align-held": captions[16:20], "instruct-held": [*seen[9:11], *blind[7:9]]}
    written["instruct"] = [row for pair in zip(seen[:7], blind[:7]) for row in pair] + seen[7:9]
    assert len(written["instruct"]) == 16 and any(len(row["conversations"]) > 2 for row in written["instruct"])
    for name, some in written.items():
        (out / f"{name}.json").write_text(json.dumps(some))
    return out


@pytest.fixture(scope="session")
def command(tiny_parts, data):
    """A function: stage, where to, settings as keywords -> the flags of a short run on the CPU. What is called "align" is the fixture's."""

    def make(stage, out, **settings):
        own = {
            "data_path": data / f"{stage}.json",
            "eval_data_path": data / f"{stage}-held.json",
            "image_folder": data / "images",
        }
        own |= SHORT | ({"learning_rate": 0.001} if stage == "instruct" else {})
        settings = {name: tiny_parts / "align" if value == "align" else value for name, value in settings.items()}
        return two_stage_run(tiny_parts, out, stage, **{**own, **settings})

    return make


def run(argv, train=True, *callbacks):
    """main(argv) -> its trainer, flags, printed text and weights; without `train` it ends before training begins."""
    trainers, weights, text, stock = [], Weights(), io.StringIO(), recipe.Trainer.train

    def spy(self, *args, **kwargs):
        trainers.append(self)
        if not train:
            raise KeyboardInterrupt
        for callback in (weights, *callbacks):
            self.add_callback(callback)
        return stock(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        patch.setattr(recipe.Trainer, "train", spy)
        with contextlib.nullcontext() if train else pytest.raises(SystemExit):
            recipe.main(argv)
    out = Path(argv[argv.index("--output_dir") + 1])
    return SimpleNamespace(
        argv=argv, out=out, trainer=trainers[0] if trainers else None, text=text.getvalue(), weights=weights.seen
    )


@pytest.fixture(scope="session")
def trained(command, tmp_path_factory):
    """A function: variant, settings as keywords -> a finished short run; each is run once."""

    @functools.cache
    def make(variant, **settings):
        stage, own = VARIANTS[variant]
        return run(command(stage, tmp_path_factory.mktemp("run") / "out", **{**own, **settings}))

    return make


def load(argv):
    """The base model, as the recipe loads it; a projector that is new is the same each time."""
    torch.manual_seed(42)
    return recipe.load_model(*recipe.parse(argv))


def plain(name):
    """A parameter's name without what PEFT adds to it."""
    return re.sub(r"^base_model\.model\.|\.(base_layer|original_module|modules_to_save\.default)\b", "", name)


def wanted(variant, names):
    """Of the names of a model's weights those that are trained themselves: of the tower only what comes before the features are taken."""
    stage, settings = VARIANTS[variant]
    parts = [PROJECTOR] * (settings.get("projector_learning_rate", 1) > 0) + [VISION] * (
        "vision_learning_rate" in settings
    )
    parts += [LANGUAGE, "lm_head"] * (
        stage == "instruct" and "lora_r" not in settings and settings.get("learning_rate", 1) > 0
    )
    late = rf"{VISION}\.(encoder\.layers\.2|post_layernorm)\."
    return {n for n in names if n.startswith(tuple(f"{part}." for part in parts)) and not re.match(late, n)}


def projector(weights):
    """{name without anything before linear_: weight} of the projector that is trained, or used."""
    return {
        re.search(r"linear_.*", n)[0]: p
        for n, p in weights.items()
        if "multi_modal_projector." in n and "original_module" not in n
    }


def stored(file):
    """The weights in a file, by the model's own names: a result has the published ones, a checkpoint has not."""
    own = {"vision_tower.vision_model": "model.vision_tower", "language_model.model": "model.language_model"}
    own |= {"language_model.lm_head": "lm_head", "multi_modal_projector": "model.multi_modal_projector"}
    return {re.sub(f"^({'|'.join(own)})", lambda name: own[name[0]], name): p for name, p in load_file(file).items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one) and len(one) > 0


def sections(out):
    """samples.md -> {step: [[pictures, question, right, answered] of a row]}."""
    parts = re.split(r"^## Step (\d+)$", (out / "samples.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    cut = lambda text: [
        [c.strip() for c in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    tables = {int(step): cut(text) for step, text in zip(*[iter(parts)] * 2)}
    assert all(rows[0] == ["picture", "question", "right", "answered"] for rows in tables.values())
    return {step: rows[1:] for step, rows in tables.items()}


def shown(text):
    return " ".join(text.split())


def says(model, collator, messages, tokens=16):
    """A model's answer to a conversation, by generate() itself."""
    batch = collator.tokenize([messages], prompt=True)
    with torch.no_grad():
        ids = model.eval().generate(
            **batch, max_new_tokens=tokens, max_length=None, do_sample=False, eos_token_id=collator.stop_ids
        )
    return collator.processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits


def rows_of(trainer, pictures=None, n=None):
    """Rows to train on: all, or those with (True) or without (False) a picture."""
    return [row for row in trainer.train_dataset if pictures is None or bool(row["image_keys"]) == pictures][:n]


# ------------------------------------------------------------------------------------------------------------ joining
@pytest.fixture(params=["llama", "tied", "mistral"])
def language(request, tiny_parts, tmp_path):
    """A folder with a language model: the fixture's Llama, one that writes with the matrix it reads with, and a Mistral."""
    if request.param == "llama":
        return tiny_parts / "language"
    out = shutil.copytree(tiny_parts / "language", tmp_path / "language")
    config = LlamaConfig.from_pretrained(out).to_dict() | {"tie_word_embeddings": request.param == "tied"}
    torch.manual_seed(1)
    if request.param == "tied":
        LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(out)
    else:
        config = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
        MistralForCausalLM(MistralConfig(**config | {"num_key_value_heads": 2, "sliding_window": 8})).save_pretrained(
            out
        )
    return out


def test_the_parts_are_joined_as_they_are(tiny_parts, command, tmp_path, language):
    """Every weight is a part's own; new words, in and out, are the mean of the old ones; a language model says what it said before."""
    argv = command("align", tmp_path / "out", language_model=language)
    model, processor = load(argv), recipe.load_processor(recipe.parse(argv)[0])
    vision = CLIPVisionModel.from_pretrained(tiny_parts / "vision")
    own = transformers.AutoModelForCausalLM.from_pretrained(language)
    assert same(dict(model.model.vision_tower.state_dict()), dict(vision.state_dict()))
    old, words = own.config.vocab_size, ("model.embed_tokens.weight", "lm_head.weight")
    tied = own.get_input_embeddings().weight is own.get_output_embeddings().weight
    assert tied == own.config.tie_word_embeddings and (
        len(processor.tokenizer) == old + 1 == processor.image_token_id + 1
    )
    now = {name.replace("model.language_model.", "model."): value for name, value in model.state_dict().items()}
    for name, value in own.state_dict().items():
        assert torch.equal(now[name][:old] if name in words else now[name], value), name
        if name in words:
            assert len(now[name]) % 64 == 0 and len(now[name]) - old in range(1, 65)
            assert all(torch.equal(row, value.mean(0)) for row in now[name][old:])
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    config = model.config
    assert (config.image_token_index, config.text_config.vocab_size) == (old, len(model.get_input_embeddings().weight))
    assert (config.vision_feature_layer, config.vision_feature_select_strategy, config.projector_hidden_act) == (
        -2,
        "default",
        "gelu",
    )
    assert config.image_seq_length == 16 and config.text_config.model_type == own.config.model_type
    assert not any(p.requires_grad for n, p in model.named_parameters() if PROJECTOR not in n)

    ids = processor.tokenizer(
        ["Which digit is this? seven", "a handwritten nine, an odd digit"], return_tensors="pt", padding=True
    )
    assert torch.equal(logits(model, ids)[..., :old], logits(own, ids))
    pictures = torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pictures, return_dict=True).pooler_output
        wanted = vision(pictures, output_hidden_states=True).hidden_states[-2][:, 1:]
        wanted = model.model.multi_modal_projector(wanted)
    assert torch.equal(torch.stack(list(found)), wanted) and wanted.shape == (2, 16, 128)
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id

    # written and read again, in both stages, it is the same
    first = run(command("align", tmp_path / "out", language_model=language, max_steps=1, eval_strategy="no"))
    batch = first.trainer.data_collator(rows_of(first.trainer, n=3))
    again = run(command("instruct", tmp_path / "two", model_name_or_path=first.out, max_steps=1, eval_strategy="no"))
    torch.testing.assert_close(
        logits(load(again.argv), batch), logits(first.trainer.model, batch), atol=1e-6, rtol=1e-6
    )
    for done in (first, again):
        saved = LlavaForConditionalGeneration.from_pretrained(done.out)
        assert (saved.get_input_embeddings().weight is saved.get_output_embeddings().weight) == tied
        torch.testing.assert_close(logits(saved, batch), logits(done.trainer.model, batch), atol=1e-6, rtol=1e-6)
        assert saved.config.image_token_index == old


def test_the_tower_of_a_whole_clip(tiny_parts, command, tmp_path):
    """As openai/clip-* are: with a text tower, which is left out."""
    vision = CLIPVisionModel.from_pretrained(tiny_parts / "vision")
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision.config.to_dict(), projection_dim=16))
    clip.save_pretrained(tmp_path / "clip")
    shutil.copy(next((tiny_parts / "vision").glob("*processor_config.json")), tmp_path / "clip")
    model = load(command("align", tmp_path / "out", vision_tower=tmp_path / "clip"))
    assert same(dict(model.model.vision_tower.state_dict()), dict(clip.vision_model.state_dict()))
    assert (
        run(command("align", tmp_path / "out", vision_tower=tmp_path / "clip"))
        .out.joinpath("model.safetensors")
        .exists()
    )


def test_weights_that_lack_are_not_made_up(tiny_parts, command, tmp_path):
    """from_pretrained would only warn."""
    shutil.copytree(tiny_parts / "language", tmp_path / "language")
    path = tmp_path / "language" / "model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if "layers.1.mlp" not in name}, path, {"format": "pt"})
    message = refusal(recipe.main, command("align", tmp_path / "out", language_model=tmp_path / "language"))
    assert "lacks 3 weights of a LlamaForCausalLM: model.layers.1.mlp" in message


# ----------------------------------------------------------------------------------------- what is trained, what not
@variants
def test_only_what_was_named_is_trained(trained, variant):
    """Its every matrix, in float32; beneath and beside it not a bit changes."""
    done, settings = trained(variant), VARIANTS[variant][1]
    first, last = done.weights[0], done.weights[-1]
    before = load(done.argv).state_dict()  # of 4-bit weights also their scales
    linear = {n[:-7] for n in before if re.fullmatch(rf"{re.escape(LANGUAGE)}\..*_proj\.weight", n)}
    adapters = {plain(name).split(".lora_")[0] for name in first if ".lora_" in name}
    assert len(linear) == 14 and adapters == (linear if "lora_r" in settings else set())
    assert {plain(n) for n in first if ".lora_" not in n} == wanted(variant, before)
    assert {p.dtype for p in last.values()} == {torch.float32}
    assert [name for name in first if torch.equal(first[name], last[name])] == []
    now = {
        plain(n): v
        for n, v in done.trainer.model.state_dict().items()
        if ".lora_" not in n and ".modules_to_save." not in n
    }
    assert now.keys() == before.keys()
    fresh = (
        set()
        if "model_name_or_path" in settings or VARIANTS[variant][0] == "instruct"
        else {n for n in before if PROJECTOR in n}
    )
    moved = {name for name in before if not torch.equal(now[name], before[name])} - fresh
    copied = {
        plain(name) for name in first if ".modules_to_save." in name
    }  # trained is a copy, what it was is beneath
    assert moved == wanted(variant, before) - copied - fresh


@variants
def test_says_what_is_trained(trained, variant):
    done, settings = trained(variant), VARIANTS[variant][1]
    base = load([*done.argv, "--load_in_4bit", "false"])
    sizes = {VISION: 475_520, PROJECTOR: 33_024, LANGUAGE: 402_048, "lm_head": 73_728}
    assert {part: sum(p.numel() for p in base.get_submodule(part).parameters()) for part in sizes} == sizes
    rates = recipe.learning_rates(*recipe.parse(done.argv))
    for part in sizes:
        line = rf"^{re.escape(part)} +([\d,]+) of +([\d,]+) parameters trained, +([\d,]+) in 4-bit"
        shown = re.search(line, done.text, re.M)
        taught, total, packed = (int(shown[n].replace(",", "")) for n in (1, 2, 3))
        own = {n: p.numel() for n, p in done.weights[0].items() if plain(n).startswith(part)}
        adapter = sum(count for n, count in own.items() if ".lora_" in n)
        assert taught == sum(own.values()) and total == sizes[part] + adapter
        assert packed == (262_144 + 65_536 if part == LANGUAGE and "load_in_4bit" in settings else 0)
    assert f"learning rates (adapters and lm_head have the language model's): {rates}\n" in done.text
    assert "16 rows to train on, 4 to evaluate; 4 steps of 4 rows, 1.00 epochs; from the start\n" in done.text


def test_4bit_is_the_language_model_and_nothing_else(trained, command, tmp_path):
    model = trained("4-bit").trainer.model.get_base_model()
    packed = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    linear = {n for n, m in load(command("instruct", tmp_path)).named_modules() if isinstance(m, torch.nn.Linear)}
    assert packed == {f"{name}.base_layer" for name in linear if name.startswith(f"{LANGUAGE}.")} and len(packed) == 14
    for dtype in (torch.float32, torch.bfloat16):
        settings, training = recipe.parse(command("instruct", tmp_path, **VARIANTS["4-bit"][1]))
        training.bf16 = dtype == torch.bfloat16
        loaded = recipe.load_model(settings, training)
        for module in (m for m in loaded.modules() if isinstance(m, bnb.nn.Linear4bit)):
            state = module.weight.quant_state
            assert (state.quant_type, state.nested, module.compute_dtype) == ("nf4", True, dtype)
        assert {p.dtype for p in loaded.parameters() if type(p).__name__ != "Params4bit"} == {dtype}


@pytest.mark.parametrize("variant", ["align", "full", "lora"])
def test_what_is_trained_is_float32_where_the_rest_is_not(command, tmp_path, variant):
    """In 16 bits small steps would round to nothing."""
    stage, settings = VARIANTS[variant]
    rates = {"projector_learning_rate": 1e-6} | ({"learning_rate": 1e-6} if stage == "instruct" else {})
    done = run(command(stage, tmp_path / "out", bf16=True, **settings, **rates))
    assert {p.dtype for p in done.trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in done.trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    first, last = done.weights[0], done.weights[-1]
    assert [name for name in first if torch.equal(first[name], last[name])] == [] and list(
        log(done.out, "eval_loss")
    ) == [2, 4]


RATES = {VISION: 1e-4, PROJECTOR: 1e-2, LANGUAGE: 1e-3}


@pytest.mark.parametrize("variant", ["align", "align, vision", "full", "full, vision", "lora, vision"])
def test_each_part_has_its_learning_rate(command, tmp_path, variant):
    """In the optimizer's groups, and in the size of the first step, which with AdamW is the rate itself."""
    stage, settings = VARIANTS[variant]
    done = run(
        command(
            stage,
            tmp_path / "out",
            **settings,
            weight_decay=0.2,
            max_steps=3,
            eval_strategy="no",
            lr_scheduler_type="linear",
        )
    )
    names, found = {id(p): plain(name) for name, p in done.trainer.model.named_parameters()}, {}
    for group in done.trainer.optimizer.param_groups:
        found |= {names[id(p)]: (group["initial_lr"], group["weight_decay"]) for p in group["params"]}
    assert (
        len(found)
        == sum(len(group["params"]) for group in done.trainer.optimizer.param_groups)
        == len(done.weights[0])
    )
    for name, (rate, decay) in found.items():
        assert rate == next(
            (rate for part, rate in RATES.items() if name.startswith(part)), 1e-3
        )  # lm_head is the language model's
        assert decay == (0 if name.endswith("bias") or "norm" in name else 0.2), name
    main = 1e-2 if stage == "align" else 1e-3
    assert log(done.out, "learning_rate") == pytest.approx({1: main, 2: main * 2 / 3, 3: main / 3})
    one = run(command(stage, tmp_path / "one", **settings, max_steps=1, eval_strategy="no"))
    for name, value in one.weights[0].items():
        step = (one.weights[-1][name] - value).abs().max().item()
        assert (
            step == 0
            if ".lora_A" in name
            else step == pytest.approx(found[plain(name)][0], rel=0.02) or "k_proj.bias" in name
        ), name


# --------------------------------------------------------------------- loss and gradients are those of the plain model
def trainer_of(command, out, variant, **settings):
    """A trainer before its first step, without dropout. Adapters are not those that do nothing: with B = 0 there is no gradient of A."""
    stage, own = VARIANTS[variant]
    trainer = run(
        command(stage, out, **own, **settings, **({"lora_dropout": 0} if "lora_r" in own else {})), train=False
    ).trainer
    torch.manual_seed(0)
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    trainer.model.train()
    return trainer


def gradients(model, batch, num_items_in_batch=None):
    """A model, or a trainer with its own loss -> (loss, {plain name: gradient} of what is trained)."""
    compute_loss = getattr(model, "compute_loss", None)
    model = model.model if compute_loss else model
    model.zero_grad(set_to_none=True)
    if compute_loss:
        loss = compute_loss(model, dict(batch), num_items_in_batch=num_items_in_batch)
    else:
        loss = model(**batch, num_items_in_batch=num_items_in_batch).loss
    loss.backward()
    return loss.item(), {plain(name): p.grad for name, p in model.named_parameters() if p.requires_grad}


def alike(one, two):
    assert one[0] == pytest.approx(two[0], rel=1e-5, abs=1e-7) and one[1].keys() == two[1].keys()
    largest = max(grad.norm() for grad in two[1].values())  # that of a bias of keys is all rounding
    for name, grad in two[1].items():
        assert (one[1][name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * largest, name


@pytest.mark.parametrize(
    "variant", ["align", "align, vision", "full", "full, vision", "lora", "lora, vision", "4-bit"]
)
def test_loss_and_gradients_are_those_of_the_plain_model(command, tmp_path, variant):
    """By Transformers' own forward, of rows with pictures, without, and of both, by the mean of the tokens or a number."""
    stock = load(argv := command(VARIANTS[variant][0], tmp_path, **VARIANTS[variant][1]))
    if adapter := recipe.lora_config(recipe.parse([*argv, "--lora_dropout", "0"])[0]):
        stock = get_peft_model(stock, adapter)
    trainer = trainer_of(
        command, tmp_path, variant
    )  # last: parsing flags would reset Accelerate's state, which it needs
    weights = {
        name: value
        for name, value in trainer.model.state_dict().items()
        if "4-bit" not in variant or ".base_layer." not in name
    }
    assert not stock.load_state_dict(weights, strict=False).unexpected_keys
    for (_, p), (_, q) in zip(stock.named_parameters(), trainer.model.named_parameters()):
        p.requires_grad_(q.requires_grad)
    stock.train()
    for kind in (True, None, False) if "align" not in variant else (True,):
        batch = trainer.data_collator(rows_of(trainer, kind))
        assert ("pixel_values" in batch) == (kind is not False)
        for more in ({}, {"num_items_in_batch": 7}):
            mine, own = gradients(trainer, batch, **more), gradients(stock, batch, **more)
            assert all(grad is not None for grad in mine[1].values())
            if (
                kind is False
            ):  # a stock model has no gradient of what it did not use, for several processes it takes one
                unused = {name for name, grad in own[1].items() if grad is None}
                assert unused and all(
                    name.startswith((VISION, PROJECTOR)) and not mine[1][name].any() for name in unused
                )
                mine, own = (
                    (loss, {n: g for n, g in grads.items() if n not in unused}) for loss, grads in (mine, own)
                )
            alike(mine, own)
    with torch.no_grad():  # without labels it is the stock forward
        assert torch.equal(logits(trainer.model, batch), logits(stock, batch))


def test_image_features_need_not_be_scored(command, tmp_path):
    """Logits are made where there are labels, and nowhere else."""
    trainer, seen = trainer_of(command, tmp_path, "align"), []
    trainer.model.lm_head.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    batch = trainer.data_collator(rows_of(trainer, n=4))
    trainer.compute_loss(trainer.model, dict(batch))
    assert seen == [(batch["labels"] != -100).sum()] and seen[0] < batch["labels"].numel() / 2


@pytest.mark.parametrize("variant", ["align", "full", "full, vision", "lora, vision", "4-bit"])
def test_checkpointing_changes_nothing(command, tmp_path, variant):
    """But that the language model is run again; a frozen tower is run once, without a graph."""
    found = {}
    for checkpointing in (True, False):
        trainer = trainer_of(command, tmp_path, variant, activation_checkpointing=checkpointing)
        model, seen, spoken = trainer.model, [], []
        if checkpointing:
            model.activation_checkpointing_enable()
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        tower = base.get_submodule(VISION)
        tower = tower.modules_to_save["default"] if hasattr(tower, "modules_to_save") else tower
        tower.encoder.layers[0].mlp.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].requires_grad)
        )
        base.get_submodule(LANGUAGE).layers[0].mlp.register_forward_pre_hook(
            lambda *args, spoken=spoken: spoken.append(1)
        )
        found[checkpointing] = gradients(trainer, trainer.data_collator(rows_of(trainer)))
        assert {*seen} == {"vision" in variant} and len(seen) == 1 + (checkpointing and "vision" in variant)
        assert len(spoken) == 1 + checkpointing
    alike(found[True], found[False])


@pytest.mark.parametrize("variant", ["full, vision", "lora"])
def test_a_row_is_worth_the_same_in_any_batch(command, tmp_path, variant):
    """Beside longer rows, and rows with a picture or none: losses and gradients of a batch are the sum of its rows'."""
    trainer = trainer_of(command, tmp_path, variant)
    rows = rows_of(trainer)
    pictures = [row["image"] for row in rows_of(trainer, True, 2)]
    rows += [
        said(
            "<image>\n<image>\nWhich digits are these?",
            "five and nine",
            image=pictures,
            folder=rows[0]["folder"],
            row=99,
        )
    ]
    together = gradients(trainer, trainer.data_collator(rows), num_items_in_batch=10)
    singly = [gradients(trainer, trainer.data_collator([row]), num_items_in_batch=10) for row in rows]
    alike(
        together,
        (sum(loss for loss, _ in singly), {name: sum(grads[name] for _, grads in singly) for name in together[1]}),
    )
    batch = trainer.data_collator(rows)
    assert (batch["attention_mask"] == 0).any()
    out = logits(trainer.model, batch)
    for n in (0, 1, 4, 16):
        mine = logits(trainer.model, trainer.data_collator([rows[n]]))[0]
        torch.testing.assert_close(out[n, -len(mine) :], mine, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["align", "full", "lora"])
def test_accumulated_batches_are_one_batch(command, tmp_path, variant):
    """Every trained token counts the same, however rows are divided: also where one has no image."""
    losses, (stage, own) = [], VARIANTS[variant]
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        settings = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "max_steps": 3,
            "eval_strategy": "no",
        }
        settings |= own | ({"lora_dropout": 0} if "lora_r" in own else {})
        done = run(command(stage, tmp_path / str(size), **settings))
        losses.append([*log(done.out).values(), *log(done.out, "grad_norm").values()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_an_evaluation_leaves_the_gradients_alone(command, tmp_path):
    """On a CPU with AVX512-BF16 the first forward in eval mode would put 4-bit weights into a kernel without autograd."""
    trainer = trainer_of(command, tmp_path, "4-bit")
    batch, found = trainer.data_collator(rows_of(trainer, n=4)), []
    for _ in range(2):
        trainer.model.train()
        found.append(gradients(trainer, batch))
        assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert same(found[0][1], found[1][1]) and all(grad.abs().max() > 0 for grad in found[0][1].values())


@pytest.mark.parametrize(
    "targets, pattern",
    [
        (["q_proj", "down_proj"], r".*\.(q|down)_proj"),
        ([r"model\.language_model\.layers\.1\..*_proj"], r".*\.layers\.1\..*_proj"),
    ],
)
def test_lora_target_modules_are_adapted_and_no_others(command, tmp_path, targets, pattern):
    model = run(command("instruct", tmp_path, **LORA, lora_target_modules=targets), train=False).trainer.model
    adapted = {plain(name).split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    linear = {
        plain(name) for name, module in model.named_modules() if name.endswith("_proj") and f".{LANGUAGE}." in name
    }
    assert adapted == {name for name in linear if re.fullmatch(pattern, name)} and adapted < linear


@pytest.mark.parametrize(
    "targets, message",
    [
        (["q_proj", "query"], "--lora_target_modules query: no such linear layer"),
        ([r"model\.(vision_tower|language_model)\..*\.q_proj"], "in vision_tower, .*--vision_learning_rate"),
        ([r".*linear_1"], "in multi_modal_projector, .*--projector_learning_rate"),
        (["(q_proj"], "is not a valid regular expression"),
    ],
)
def test_lora_target_modules_that_cannot_be_adapted(command, tmp_path, targets, message):
    assert re.search(message, refusal(recipe.main, command("instruct", tmp_path, **LORA, lora_target_modules=targets)))


@pytest.mark.parametrize("variant", ["lora", "lora, vision", "lora, no projector"])
def test_the_trained_model_can_be_merged_in_the_same_process(command, tmp_path, variant):
    """The tower has its own forward back, and merged the model says what the adapter says, also without images."""
    trainer = run(command("instruct", tmp_path, **VARIANTS[variant][1])).trainer
    model = trainer.model
    assert not [
        name for name, module in model.named_modules() if {"forward", "get_placeholder_mask"} & {*vars(module)}
    ]
    batches = [trainer.data_collator(rows_of(trainer, pictures, 4)) for pictures in (True, False)]
    adapted = [logits(model, batch) for batch in batches]
    with model.disable_adapter():
        assert all((logits(model, batch) - before).abs().max() > 0.01 for batch, before in zip(batches, adapted))
    merged = model.merge_and_unload()
    for batch, before in zip(batches, adapted):
        torch.testing.assert_close(logits(merged, batch), before, atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------- at its real size
def test_it_has_the_published_sizes(tiny_parts, tmp_path, monkeypatch):
    """Of LLaVA-1.5-7B: 7.06 billion, of which stage 1 trains 21 million."""
    CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14,
                     projection_dim=768).save_pretrained(tmp_path / "vision")  # fmt: skip
    LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                max_position_embeddings=4096, rms_norm_eps=1e-5).save_pretrained(tmp_path / "language")  # fmt: skip

    def whole(cls, name, **kwargs):
        config = transformers.AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            return cls(config) if cls is CLIPVisionModel else cls.from_config(config)

    words = SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    monkeypatch.setattr(recipe, "load_complete", whole)
    monkeypatch.setattr(
        recipe, "load_processor", lambda settings: SimpleNamespace(image_token_id=32000, tokenizer=words)
    )
    flags = {"vision_tower": tmp_path / "vision", "language_model": tmp_path / "language"}
    model = recipe.load_model(*recipe.parse(two_stage_run(tiny_parts, "out", "align", **flags)))
    assert model.config.text_config.vocab_size == 32064 and model.config.image_seq_length == 576
    assert model.num_parameters() == 7_063_427_072
    assert model.num_parameters(only_trainable=True) == 1024 * 4096 + 4096 + 4096 * 4096 + 4096 == 20_979_712
    settings, _ = recipe.parse(two_stage_run(tiny_parts, "out", "instruct", lora_r=128))
    adapted = get_peft_model(model.requires_grad_(False), recipe.lora_config(settings))
    layer = 4 * 128 * (4096 + 4096) + 3 * 128 * (4096 + 11008)  # q, k, v, o; gate, up, down
    assert adapted.get_nb_trainable_parameters()[0] == 32 * layer + 20_979_712 == 340_795_392


# --------------------------------------------------------------------------------------- from one stage to the next
def original(weights):
    """A projector as the original LLaVA saves it."""
    names = {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"}
    return {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": value for name, value in weights.items()}


@pytest.mark.parametrize("variant", ["full", "full, joined", "lora", "lora, joined", "4-bit"])
def test_the_second_stage_begins_where_the_first_ended(trained, tiny_parts, variant):
    first = projector(load_file(tiny_parts / "align" / "model.safetensors"))
    assert same(projector(trained(variant).weights[0]), first)
    assert not any(torch.equal(value, first[name]) for name, value in projector(trained(variant).weights[-1]).items())


@pytest.mark.parametrize("settings", [{}, LORA], ids=["full", "lora"])
def test_it_begins_with_a_projector_of_the_original(trained, tiny_parts, command, tmp_path, settings):
    """mm_projector.bin, whatever its precision; and one of an adapter's folder."""
    mine = projector(trained("align").weights[-1])
    torch.save({key: value.half() for key, value in original(mine).items()}, tmp_path / "mm_projector.bin")
    argv = command(
        "instruct", tmp_path / "original", pretrain_mm_mlp_adapter=tmp_path / "mm_projector.bin", **settings
    )
    found = projector(dict(load(argv).named_parameters()))
    assert all(torch.equal(found[key], value.half().float()) for key, value in mine.items())
    argv = command("instruct", tmp_path / "adapter", pretrain_mm_mlp_adapter=trained("lora").out, **settings)
    assert same(projector(dict(load(argv).named_parameters())), projector(trained("lora").weights[-1]))


def test_joined_parts_begin_like_the_first_stages_result(trained):
    """One joins what the other loads: the same losses; with adapters, whose beginning and dropout are random, the same first one."""
    for key in ("loss", "eval_loss"):
        assert log(trained("full, joined").out, key) == pytest.approx(log(trained("full").out, key), rel=1e-5)
    assert log(trained("lora, joined").out)[1] == pytest.approx(log(trained("lora").out)[1], rel=1e-5)


def test_an_adapter_on_joined_parts_has_a_base(trained, tiny_parts, monkeypatch):
    """Written beside it once, with its processor: that of the projector it began with."""
    done = trained("lora, joined")
    base = done.out / "base"
    assert json.loads((done.out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    whole, stage1 = (LlavaForConditionalGeneration.from_pretrained(path) for path in (base, tiny_parts / "align"))
    assert same(dict(whole.state_dict()), dict(stage1.state_dict()))
    assert type(AutoProcessor.from_pretrained(base)).__name__ == "LlavaProcessor"
    before = {path: path.stat().st_mtime_ns for path in base.iterdir()}
    monkeypatch.setattr(recipe, "join_models", None)
    assert load(done.argv) and before == {path: path.stat().st_mtime_ns for path in base.iterdir()}


def test_a_base_of_an_earlier_attempt_is_not_taken(trained, command, tmp_path):
    """A run that ended before its first checkpoint is begun anew, and with other parts it may be."""
    settings = VARIANTS["lora, joined"][1] | {"projector_learning_rate": 0}
    run(
        command("instruct", tmp_path / "out", **settings | {"pretrain_mm_mlp_adapter": trained("align").out}),
        train=False,
    )
    done = run(command("instruct", tmp_path / "out", **settings))
    kept = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out" / "base")
    batch = done.trainer.data_collator(rows_of(done.trainer, n=4))
    again = PeftModel.from_pretrained(kept, done.out)
    torch.testing.assert_close(logits(again, batch), logits(done.trainer.model, batch), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ what is saved
def test_output_dir_holds_everything(command, tmp_path):
    for stage, more in (("align", {}), ("instruct", LORA)):
        done = run(
            command(stage, tmp_path / stage, report_to="tensorboard", hub_token="secret", save_total_limit=9, **more)
        )
        for name in (
            "settings.yaml",
            "samples.md",
            "trainer_state.json",
            "processor_config.json",
            "tokenizer.json",
            "chat_template.jinja",
        ):
            assert (done.out / name).stat().st_size > 0
        assert {path.name for path in done.out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
        assert list(done.out.glob("**/events.out.tfevents.*"))
        assert {path.name for path in done.out.glob("*.safetensors")} == {
            "adapter_model.safetensors" if more else "model.safetensors"
        }
        first, *lines = (done.out / "settings.yaml").read_text().splitlines()
        written = yaml.safe_load("\n".join(lines))
        assert first == "# llava_two_stage.py" and "hub_token" not in written and "secret" not in "".join(lines)
        assert {name: written[name] for name in SHORT} == SHORT and written["stage"] == stage
        for name in ("loss", "grad_norm", "learning_rate"):
            assert list(log(done.out, name)) == [1, 2, 3, 4] and all(map(math.isfinite, log(done.out, name).values()))
        assert list(log(done.out, "eval_loss")) == [2, 4] and log(done.out)[4] < log(done.out)[1]
        state = load_file(next(done.out.glob("*.safetensors")))
        assert all(
            torch.equal(value, projector(done.weights[-1])[name]) for name, value in projector(state).items()
        ) and projector(state)


RELOAD = """
import json, sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoProcessor, LlavaForConditionalGeneration
torch.set_num_threads(1)
work, results = torch.load(sys.argv[1], weights_only=False), {}
def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits
for name, (out, messages, argv) in work.items():
    processor, result = AutoProcessor.from_pretrained(out), results.setdefault(name, {})
    batch = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
                                          processor_kwargs={"padding": True})
    if Path(out, "adapter_config.json").exists():
        base = json.loads(Path(out, "adapter_config.json").read_text())["base_model_name_or_path"]
        if "4-bit" in name:
            import llava_two_stage
            model = llava_two_stage.load_model(*llava_two_stage.parse(argv))
        else:
            model = LlavaForConditionalGeneration.from_pretrained(base)
        model = PeftModel.from_pretrained(model, out)
    else:
        model = LlavaForConditionalGeneration.from_pretrained(out)
    result["logits"] = logits(model, batch)
    with torch.no_grad():
        result["said"] = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1]:]
    result["batch"] = dict(batch)
    if Path(out, "adapter_config.json").exists():
        model = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), out)
        result["float"] = logits(model, batch)
        model = model.merge_and_unload()
        result["merged"] = logits(model, batch)
        model.save_pretrained(out + "-merged")
        result["merged again"] = logits(LlavaForConditionalGeneration.from_pretrained(out + "-merged"), batch)
torch.save(results, sys.argv[2])
"""


@pytest.mark.slow
def test_the_result_stands_alone(trained, tmp_path):
    """A new process, without the recipe, gets from the saved folder and its processor what the run's own model says."""
    work, names = (
        {},
        ["align", "align, vision", "full", "full, vision", "lora", "lora, vision", "lora, joined", "4-bit"],
    )
    for name in names:
        done = trained(name)
        work[name] = (
            str(done.out),
            [done.trainer.data_collator.messages_of(row)[:1] for row in done.trainer.eval_dataset],
            done.argv,
        )
    torch.save(work, tmp_path / "work.pt")
    fresh(RELOAD, tmp_path / "work.pt", tmp_path / "results.pt")
    for name, result in torch.load(tmp_path / "results.pt").items():
        model, collator = trained(name).trainer.model, trained(name).trainer.data_collator
        batch = collator.tokenize(work[name][1], prompt=True)
        assert same(dict(batch), result["batch"])
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(result["logits"][real], logits(model, batch)[real], atol=1e-6, rtol=1e-6)
        with torch.no_grad():
            own = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
        assert torch.equal(own, result["said"])
        untouched = logits(load(trained(name).argv), batch)
        assert (untouched - logits(model, batch))[real].abs().max() > 0.01
        for merged in {"merged", "merged again"} & {*result}:
            torch.testing.assert_close(result[merged][real], result["float"][real], atol=1e-4, rtol=1e-4)
        assert ("merged" in result) == ("lora_r" in VARIANTS[name][1])
        shutil.rmtree(f"{trained(name).out}-merged", ignore_errors=True)


@pytest.mark.parametrize("variant", ["align", "full", "lora"])
def test_the_best_checkpoint_is_saved(command, tmp_path, monkeypatch, variant):
    losses, stock, (stage, settings) = [3.0, 1.0, 2.0, 4.0], recipe.Trainer.evaluation_loop, VARIANTS[variant]

    def faked(self, *args, **kwargs):
        output = stock(self, *args, **kwargs)
        output.metrics["eval_loss"] = losses[self.state.global_step - 1]
        return output

    monkeypatch.setattr(recipe.Trainer, "evaluation_loop", faked)
    done = run(
        command(
            stage, tmp_path, **settings, load_best_model_at_end=True, eval_steps=1, save_steps=1, save_total_limit=9
        )
    )
    assert "best loss: 1, at step 2; that is saved" in done.text
    name = "adapter_model.safetensors" if "lora_r" in settings else "model.safetensors"
    saved, kept, last = (
        stored(folder / name) for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4")
    )
    assert same(saved, kept) and not same(saved, last)
    now = {n: p for n, p in done.trainer.model.named_parameters() if p.requires_grad}
    assert same(now, done.weights[2])


@pytest.mark.parametrize("variant", ["align", "lora"])
def test_settings_yaml_repeats_the_run(trained, tmp_path, variant):
    """Its new projector, too, is the same."""
    first = trained(variant)
    again = run(["--config", str(first.out / "settings.yaml"), "--output_dir", str(tmp_path / "again")])
    for key in ("loss", "grad_norm", "eval_loss"):
        assert log(again.out, key) == log(first.out, key) and log(again.out, key)
    assert (again.out / "samples.md").read_text() == (first.out / "samples.md").read_text()


# ------------------------------------------------------------------------------------------------------------- resume
KILL = """
import os, signal, sys
import torch, transformers, llava_two_stage as recipe
torch.set_num_threads(1)
class Kill(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
train = transformers.Trainer.train
def doomed(self, *args, **kwargs):
    self.add_callback(Kill())
    return train(self, *args, **kwargs)
recipe.Trainer.train = doomed
recipe.main(sys.argv[1:])
"""
# 16 rows, 2 x 2 rows a step: the fifth and ninth step begin another epoch; the run is killed in mid-epoch, the last checkpoint is of 6;
# the last step of 11 is in mid-epoch, too
LONG = {"max_steps": 11, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "save_total_limit": 99}
LONG |= {"eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True, "sample_rows": 1}


@pytest.fixture(scope="session")
def whole(command, tmp_path_factory):
    """A function: variant -> a run of 11 steps that nothing interrupted."""
    make = lambda variant: run(
        command(VARIANTS[variant][0], tmp_path_factory.mktemp("whole") / "out", **LONG, **VARIANTS[variant][1])
    )
    return functools.cache(make)


@pytest.fixture(scope="session")
def dead(command, tmp_path_factory):
    """A function: variant -> the folder of the same run, killed in its 7th step. Tests work on copies of it."""

    @functools.cache
    def make(variant):
        out, (stage, settings) = tmp_path_factory.mktemp("killed") / "out", VARIANTS[variant]
        argv = command(stage, out, **LONG, **settings)
        done = subprocess.run([sys.executable, "-c", KILL, *argv], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        assert {path.name for path in out.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in range(1, 7)}
        assert not (out / "trainer_state.json").exists()
        return out

    return make


def same_end(whole, resumed, after):
    """From step `after` on, all is the same to the last bit: what was logged, trained and saved."""
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        want, got = ({s: v for s, v in log(run.out, key).items() if s > after} for run in (whole, resumed))
        assert want == got and 11 in got
    assert len(resumed.weights) == 1 + 11 - after  # weights[0] of the resumed run is the checkpoint's
    for step in range(12 - after):
        assert same(whole.weights[after + step], resumed.weights[step])
    assert same(*(load_file(next(out.glob("*model.safetensors"))) for out in (whole.out, resumed.out)))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["align", "lora, joined"])
def test_killed_and_started_again(whole, dead, command, tmp_path, variant):
    """With the same command, to the same losses; a newest checkpoint that was cut off half-way is passed over."""
    out, (stage, settings) = Path(shutil.copytree(dead(variant), tmp_path / "out")), VARIANTS[variant]
    half = Path(shutil.copytree(out / "checkpoint-6", out / "checkpoint-7"))
    (half / "optimizer.pt").write_bytes((half / "optimizer.pt").read_bytes()[:1000])
    resumed = run(command(stage, out, **LONG, **settings, dataloader_num_workers=2 if stage == "align" else 0))
    assert f"resuming from {out / 'checkpoint-6'}\n" in resumed.text
    same_end(whole(variant), resumed, 6)
    assert (out / "samples.md").read_text() == (whole(variant).out / "samples.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, step", [("align, vision", 2), ("full", 3), ("full, vision", 8), ("lora, vision", 8), ("4-bit", 4)]
)
def test_resumes_whatever_was_trained(whole, command, tmp_path, variant, step):
    """In any epoch, and at the end of one."""
    done, (stage, settings) = whole(variant), VARIANTS[variant]
    checkpoint = done.out / f"checkpoint-{step}"
    resumed = run(command(stage, tmp_path / "out", **LONG, **settings, resume_from_checkpoint=checkpoint))
    assert f"resuming from {checkpoint}\n" in resumed.text
    same_end(done, resumed, step)


@pytest.mark.slow
@pytest.mark.parametrize("variant, best", [("align", True), ("align", False), ("full", False), ("lora, joined", True)])
def test_killed_before_the_end_was_written(whole, command, tmp_path, variant, best):
    """All steps are done, the last one in mid-epoch, and the result is not saved: started again it is, without another step."""
    first, (stage, own) = whole(variant), VARIANTS[variant]
    out = Path(shutil.copytree(first.out, tmp_path / "out"))
    weights = next(out.glob("*model.safetensors"))
    (out / "trainer_state.json").unlink()
    weights.unlink()
    settings = {**LONG, **own, "load_best_model_at_end": best}
    path = {} if best else {"resume_from_checkpoint": out / "checkpoint-11"}
    again = run(command(stage, out, **settings, **path))
    assert len(again.weights) == 1 and list(log(out)) == list(range(1, 12)) and log(out) == log(first.out)
    assert same(stored(weights), stored((first.out if best else out / "checkpoint-11") / weights.name))
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stdout(io.StringIO()):
        recipe.main(command(stage, out, **settings))
    assert stopped.value.code in (0, None)


def test_a_longer_run_is_not_finished_by_an_earlier_end(trained, command, tmp_path, monkeypatch):
    out = Path(shutil.copytree(trained("align").out, tmp_path / "out"))
    longer = {"max_steps": 6, "resume_from_checkpoint": out / "checkpoint-4"}

    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as away:
        away.setattr(recipe.Trainer, "training_step", interrupt)
        message = refusal(recipe.main, command("align", out, **longer))
    assert f"interrupted; to resume from the newest checkpoint, if any: --config {out}/settings.yaml" in message
    again = run(command("align", out, **{**longer, "resume_from_checkpoint": "auto"}))
    assert f"resuming from {out / 'checkpoint-4'}" in again.text and max(log(out)) == 6 and len(again.weights) == 3


@pytest.mark.parametrize(
    "file", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors", "rng_state.pth"]
)
def test_a_damaged_checkpoint_is_not_whole(trained, tmp_path, file):
    """Missing, empty or cut off: any of its files (the random state's end is not looked at)."""
    good = trained("align").out / "checkpoint-4"
    assert recipe.is_complete(good)
    for n, keep in enumerate([None, 0, 0.5] if file != "rng_state.pth" else [None]):
        copy = Path(shutil.copytree(good, tmp_path / f"checkpoint-{n}"))
        content = (copy / file).read_bytes()
        (copy / file).unlink() if keep is None else (copy / file).write_bytes(content[: int(keep * len(content))])
        assert not recipe.is_complete(copy), keep


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, flags, words",
    [
        ("align", ["--resume_from_checkpoint", "false"], ["holds a run", "--output_dir"]),
        ("align", ["--resume_from_checkpoint", "nowhere"], ["nowhere: not a complete checkpoint"]),
        ("align", ["--projector_learning_rate", "0.1"], ["projector_learning_rate 0.01 -> 0.1", "--output_dir"]),
        ("align", ["--stage", "instruct", "--pretrain_mm_mlp_adapter", "projector.bin"], ["stage align -> instruct"]),
        ("lora, joined", ["--lora_r", "4", "--learning_rate", "0.1"], ["lora_r 8 -> 4", "learning_rate 0.001 -> 0.1"]),
        ("lora, joined", ["--load_in_4bit"], ["load_in_4bit False -> True"]),
        ("lora, joined", ["--image_aspect_ratio", "square"], ["image_aspect_ratio None -> square"]),
    ],
)
def test_a_used_output_dir_is_not_overwritten(dead, command, tmp_path, monkeypatch, variant, flags, words):
    monkeypatch.setattr(recipe, "load_data", None)
    out, (stage, settings) = Path(shutil.copytree(dead(variant), tmp_path / "out")), VARIANTS[variant]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    message = refusal(recipe.main, [*command(stage, out, **LONG, **settings), *flags])
    assert all(word in message for word in words)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("text", [None, "", "- 1", "a: b: c"])
def test_a_run_that_does_not_say_which_it_is_is_not_gone_on_from(trained, command, tmp_path, monkeypatch, text):
    monkeypatch.setattr(recipe, "load_data", None)
    out = Path(shutil.copytree(trained("lora").out, tmp_path / "out"))
    (out / "settings.yaml").unlink() if text is None else (out / "settings.yaml").write_text(text)
    message = refusal(recipe.main, command("instruct", out, **LORA))
    assert "without the settings.yaml" in message and "--resume_from_checkpoint CHECKPOINT" in message


@pytest.mark.parametrize(
    "variant, more", [("align", []), ("lora, joined", ["--sample_rows", "1", "--logging_steps", "2"])]
)
def test_a_finished_run_says_so(trained, monkeypatch, capsys, variant, more):
    done = trained(variant)
    for name in ("load_model", "load_data", "load_processor"):
        monkeypatch.setattr(recipe, name, None)
    before = {path: path.stat().st_mtime_ns for path in done.out.rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        recipe.main([*done.argv, *more])
    assert stopped.value.code in (0, None) and "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in done.out.rglob("*")}
    assert "seed 42 -> 4" in refusal(recipe.main, [*done.argv, "--seed", "4"])


# ------------------------------------------------------------------------------------------------- what it has learnt
@pytest.fixture(scope="session")
def learnt(tiny_parts, data, command, tmp_path_factory):
    """{stage: run}: parts whose random weights are as large as their width asks for, so that they learn fast, aligned for a while; then 16
    conversations by heart, on which it is evaluated too."""
    out = tmp_path_factory.mktemp("learnt")
    for name, cls in (("vision", CLIPVisionModel), ("language", LlamaForCausalLM)):
        shutil.copytree(tiny_parts / name, out / name)
        model = cls.from_pretrained(out / name)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.data *= 4  # from a deviation of 0.02 to 0.08, about 1 / sqrt(128)
        model.save_pretrained(out / name)
    own = {
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 8,
        "logging_steps": 10,
        "activation_checkpointing": False,
    }
    own |= {"sample_tokens": 16, "warmup_steps": 5}
    parts = {"vision_tower": out / "vision", "language_model": out / "language"}
    first = run(command("align", out / "align", **own, **parts, max_steps=20, eval_steps=10, save_steps=10))
    own |= {
        "eval_data_path": data / "instruct.json",
        "sample_rows": 16,
        "max_steps": 60,
        "eval_steps": 20,
        "save_steps": 20,
    }
    own |= {"model_name_or_path": first.out, "learning_rate": 2e-3, "projector_learning_rate": 2e-3}
    second = run(command("instruct", out / "instruct", **own))
    return {"align": first, "instruct": second}


@pytest.mark.slow
def test_it_learns(learnt, data):
    """Conversations of every kind by heart: asked, it says what it was taught; captions at least become more likely."""
    losses = log(learnt["align"].out, "eval_loss")
    assert losses[20] < losses[10] and log(learnt["align"].out)[20] < 0.9 * log(learnt["align"].out)[10]
    done = learnt["instruct"]
    losses = log(done.out, "eval_loss")
    assert list(losses) == [20, 40, 60] and losses[20] > losses[40] > losses[60] < 0.05
    rows = sections(done.out)[60]
    assert (
        len(rows) == 16 and [row[3] for row in rows] == [row[2] for row in rows] and len({row[2] for row in rows}) > 4
    )
    given, collator = json.loads((data / "instruct.json").read_text()), done.trainer.data_collator
    for row in given:  # each turn, not only the last
        messages = collator.messages_of(row | {"folder": str(data / "images")})
        for n in range(1, len(messages), 2):
            assert says(done.trainer.model, collator, messages[:n]) == recipe.text_of(messages[n])


@pytest.mark.slow
def test_samples_show_pictures_question_and_answers(learnt, data):
    """The same rows each time, in the same order, with the right pictures; answered is what the model generates."""
    for stage, steps, file in (("align", (10, 20), "align-held"), ("instruct", (20, 40, 60), "instruct")):
        done, given = learnt[stage], json.loads((data / f"{file}.json").read_text())
        tables, collator = sections(done.out), done.trainer.data_collator
        assert list(tables) == list(steps) and len({str([row[:3] for row in rows]) for rows in tables.values()}) == 1
        for row, (pictures, question, right, answered) in zip(done.trainer.eval_dataset, tables[steps[-1]]):
            here, messages = given[row["row"]], collator.messages_of(row)
            paths = re.findall(r"!\[\]\((samples/[\d-]+\.png)\)", pictures)
            assert paths == ([f"samples/{row['row']}-0.png"] if "image" in here else [])
            for path in paths:
                small, own = (
                    recipe.load_image(str(p)).convert("L") for p in (done.out / path, data / "images" / here["image"])
                )
                pixels = [small.resize(own.size, 4).tobytes(), own.tobytes()]
                assert sum(abs(a - b) for a, b in zip(*pixels)) / len(pixels[0]) < 16
            asked, told = (turn["value"] for turn in here["conversations"][-2:])
            assert question == shown(asked.replace("<image>", "")) and right == told
            assert answered == shown(says(done.trainer.model, collator, messages[:-1], 16)).replace("|", "&#124;")


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_a_caption_ends_with_its_line_an_answer_with_eos(command, tmp_path, stage):
    """A model made to say: a word, newline, the word, EOS, the word."""
    trainer = run(command(stage, tmp_path, sample_rows=1, sample_tokens=6), train=False).trainer
    tokenizer, spoken = trainer.data_collator.processor.tokenizer, []
    word, line = (tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in (" seven", "a\n"))
    script = [word, line, word, tokenizer.eos_token_id, word, word]

    def puppet(module, args, out):
        if out.dim() == 3:  # it generates
            out[:, -1] = torch.nn.functional.one_hot(torch.tensor(script[len(spoken)]), out.shape[-1])
            spoken.append(1)
        return out

    trainer.model.lm_head.register_forward_hook(puppet)
    trainer.evaluate()
    assert len(spoken) == (2 if stage == "align" else 4)
    assert sections(tmp_path)[0][0][3].split() == ["seven"] * (1 if stage == "align" else 2)


def test_a_pipe_or_a_line_end_keeps_the_table_whole(command, tmp_path, monkeypatch):
    trainer = run(command("instruct", tmp_path), train=False).trainer
    monkeypatch.setattr(trainer.data_collator.processor.tokenizer, "decode", lambda *args, **kwargs: "a | b\nc")
    trainer.evaluate()
    assert [row[3] for row in sections(tmp_path)[0]] == ["a &#124; b c"] * 2


def test_samples_and_evaluation_can_be_bounded(command, tmp_path):
    done = run(command("instruct", tmp_path / "a", sample_rows=1, max_eval_rows=3, **LORA))
    assert len(done.trainer.eval_dataset) == 3 and {len(rows) for rows in sections(done.out).values()} == {1}
    done = run(command("align", tmp_path / "b", sample_rows=0))
    assert log(done.out, "eval_loss") and not list(done.out.glob("samples*"))
    done = run(command("align", tmp_path / "c", eval_strategy="no"))
    assert (
        not log(done.out, "eval_loss")
        and not list(done.out.glob("samples*"))
        and "16 rows to train on, 0 to evaluate" in done.text
    )


def test_evaluates_with_and_without_pictures(trained, command, tmp_path):
    """Rows alone, so that some batches have none: the loss is that of the model by hand."""
    for size in (1, 4):
        done = run(command("instruct", tmp_path / str(size), per_device_eval_batch_size=size))
        rows, collator = list(done.trainer.eval_dataset), done.trainer.data_collator
        assert {len(row["image_keys"]) for row in rows} == {0, 1}
        with torch.no_grad():
            losses = [done.trainer.model.eval()(**collator(rows[n : n + size])).loss.item() for n in range(0, 4, size)]
        assert log(done.out, "eval_loss")[4] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


# ------------------------------------------------------------------------------------------- what happens under way
@pytest.mark.parametrize("group", [True, False])
def test_rows_of_a_step_are_of_one_kind(command, tmp_path, monkeypatch, group):
    """All with pictures or all without, but the last ones of an epoch; another order each epoch; every row once in each."""
    seen, stock = [], recipe.Collator.__call__

    def spy(self, rows):
        seen.append([(row["row"], len(row["image_keys"])) for row in rows])
        return stock(self, rows)

    argv = command("instruct", tmp_path, group_by_modality_length=group, max_steps=8, eval_strategy="no")
    trainer = run(argv, train=False).trainer
    monkeypatch.setattr(recipe.Collator, "__call__", spy)
    trainer.train()
    epochs = seen[:4], seen[4:8]
    assert (
        all(sorted(n for batch in epoch for n, _ in batch) == list(range(16)) for epoch in epochs)
        and epochs[0] != epochs[1]
    )
    mixed = [len({images for _, images in batch}) > 1 for batch in seen]
    assert (mixed == [False, False, False, True] * 2) if group else sum(mixed) > 2


def test_long_rows_are_left_out(command, tmp_path):
    lengths = run(command("instruct", tmp_path / "a"), train=False).trainer.train_dataset["length"]
    cut = sorted(lengths)[9]
    done = run(command("instruct", tmp_path / "b", model_max_length=cut, eval_strategy="no", on_long_rows="drop"))
    kept = sum(length <= cut for length in lengths)
    assert (
        f"{kept} rows to train on" in done.text and kept < 16 and "too long" in done.text and max(log(done.out)) == 4
    )
    with pytest.raises(SystemExit, match="too long"):
        recipe.main(command("instruct", tmp_path / "c", model_max_length=cut, on_long_rows="stop"))


@pytest.mark.parametrize("stage, file, workers", [("align", "align-held", 0), ("instruct", "instruct", 2)])
def test_a_picture_that_vanishes_ends_the_run_with_one_message(
    command, data, tmp_path, monkeypatch, stage, file, workers
):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    rows = json.loads((folder / f"{file}.json").read_text())
    n = next(n for n, row in enumerate(rows) if "image" in row)

    def vanish(*args, load=recipe.load_model):
        (folder / "images" / rows[n]["image"]).unlink()
        return load(*args)

    monkeypatch.setattr(recipe, "load_model", vanish)
    own = {
        "data_path": folder / f"{stage}.json",
        "eval_data_path": folder / f"{stage}-held.json",
        "image_folder": folder / "images",
    }
    message = refusal(recipe.main, command(stage, tmp_path / "out", **own, dataloader_num_workers=workers))
    assert (
        "the data changed during the run" in message and "unreadable image" in message and rows[n]["image"] in message
    )


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["align", "full", "lora, joined"])
def test_two_processes_train_like_one(command, tmp_path, variant):
    """Twice the batch. Each has one row at a time: a whole step without pictures, and one where only one of the two has one."""
    stage, settings = VARIANTS[variant]
    settings = {**settings, "projector_learning_rate": 1e-3, "gradient_accumulation_steps": 2}
    settings |= ({"learning_rate": 1e-4} if stage == "instruct" else {}) | (
        {"lora_dropout": 0} if "lora_r" in settings else {}
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = command(stage, tmp_path / "two", **{**settings, "per_device_train_batch_size": 1})
    program = [*launch, str(ROOT / "llava_two_stage.py"), *argv]
    done = subprocess.run(
        program, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    for words in (
        "rows to train on",
        "One row as the model sees it",
        "4 steps of 4 rows",
        "parameters trained",
        "saved ",
    ):
        assert done.stdout.count(words) == (4 if "parameters" in words else 1)
    one = run(
        command(stage, tmp_path / "one", **settings, per_device_train_batch_size=2, per_device_eval_batch_size=2)
    )
    assert one.trainer.args.ddp_find_unused_parameters is False
    for key in ("loss", "grad_norm", "eval_loss"):
        assert log(tmp_path / "two", key) == pytest.approx(log(one.out, key), rel=1e-4) and log(one.out, key)
    assert sections(tmp_path / "two") == sections(one.out) and list(sections(one.out)) == [2, 4]
    saved = [load_file(next((tmp_path / name).glob("*model.safetensors"))) for name in ("one", "two")]
    for name in saved[0]:
        torch.testing.assert_close(saved[0][name], saved[1][name], atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_the_recipe_alone_in_an_empty_folder(tiny_parts, data, tmp_path):
    """One file, copied, and relative paths: the second stage finds what the first one made, by names that nobody gave."""
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(ROOT / "llava_two_stage.py", folder)
    for path in (tiny_parts / "vision", tiny_parts / "language", data / "images"):
        shutil.copytree(path, folder / path.name)
    shutil.copy(data / "align.json", folder)
    shutil.copy(data / "instruct.json", folder)
    before, environment = (
        {*os.listdir(folder)},
        {name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    more = "--use_cpu --max_steps 2 --logging_steps 1 --dataloader_num_workers 0 --image_folder images --report_to none".split()
    for stage, parts in (("align", ["--vision_tower", "vision", "--language_model", "language"]), ("instruct", [])):
        argv = [sys.executable, "llava_two_stage.py", "--stage", stage, "--data_path", f"{stage}.json", *parts, *more]
        done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"saved llava-{stage}: model or adapter" in done.stdout
        assert f"2 steps of {256 if stage == 'align' else 128} rows" in done.stdout and list(
            log(folder / f"llava-{stage}")
        ) == [1, 2]
    assert {*os.listdir(folder)} == before | {"llava-align", "llava-instruct"}
    first, second = (
        projector(load_file(folder / name / "model.safetensors")) for name in ("llava-align", "llava-instruct")
    )
    assert max((second[name] - first[name]).abs().max() for name in first) <= 1e-4  # two steps at 2e-5


# ---------------------------------------------------------------------------------------------------- tools/generate.py
def answered(out, file, *flags):
    generate.main([str(out), "--output", str(file), "--overwrite", "--max_new_tokens", "6", *map(str, flags)])
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_generate_gives_what_was_learnt(learnt, tmp_path, data, capsys):
    """Of the rows held out, which are those learnt here: every turn."""
    lines = answered(learnt["instruct"].out, tmp_path / "out.jsonl", "--max_new_tokens", 16)
    assert len(lines) > 16 and [line["prediction"] for line in lines] == [line["reference"] for line in lines]
    row = next(row for row in json.loads((data / "instruct.json").read_text()) if "image" in row)
    question = row["conversations"][0]["value"].replace("<image>", "").strip()
    capsys.readouterr()
    generate.main(
        [str(learnt["instruct"].out), "--image", str(data / "images" / row["image"]), "--question", question]
    )
    assert capsys.readouterr().out.splitlines()[-1] == row["conversations"][1]["value"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["align", "full", "full, joined", "lora", "lora, joined", "4-bit"])
def test_generate_asks_what_was_trained_and_what_it_was_trained_from(trained, data, tmp_path, variant):
    """The rows that the run held out, and those of a file."""
    done, stage = trained(variant), VARIANTS[variant][0]
    collator, seen = done.trainer.data_collator, {}
    before = {path: path.stat().st_mtime_ns for path in done.out.rglob("*")}
    files = {
        "held": [],
        "file": ["--data_path", data / f"{stage}.json", "--image_folder", data / "images", "--batch_size", 5],
    }
    for name, flags in files.items():
        rows = {
            row["row"]: row for row in (done.trainer.eval_dataset if name == "held" else done.trainer.train_dataset)
        }
        for base in (False, True):
            seen[name, base] = lines = answered(done.out, tmp_path / "out.jsonl", *flags, *["--base_only"] * base)
            assert {line["row"] for line in lines} == {*rows} and all(line["reference"] for line in lines)
            if base and variant == "align":
                continue  # joined with a new projector, which says something else each time
            model = load(done.argv) if base else done.trainer.model
            for line in lines:
                messages = collator.messages_of(rows[line["row"]])
                upto = [k for k, m in enumerate(messages) if m["role"] == "assistant"][line["turn"]]
                assert line["prediction"] == says(model, collator, messages[:upto], 6).strip()
                assert line["images"] == sum(part["type"] == "image" for m in messages[:upto] for part in m["content"])
    assert any(
        [x["prediction"] for x in seen[name, True]] != [x["prediction"] for x in seen[name, False]] for name in files
    )
    assert before == {path: path.stat().st_mtime_ns for path in done.out.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["align", "full", "lora", "lora, joined"])
def test_generate_asks_a_run_that_was_moved(trained, tmp_path, variant):
    """It answers as before, and writes nothing where the run was."""
    done = trained(variant)
    shutil.copytree(done.out, tmp_path / "moved", ignore=shutil.ignore_patterns("checkpoint-*"))
    text = (done.out / "settings.yaml").read_text()
    notes = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    (tmp_path / "moved" / "settings.yaml").write_text(
        notes + yaml.safe_dump(yaml.safe_load(text) | {"output_dir": str(tmp_path / "was")})
    )
    assert answered(tmp_path / "moved", tmp_path / "a.jsonl") == answered(done.out, tmp_path / "b.jsonl")
    assert not (tmp_path / "was").exists()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["align", "full", "lora"])
def test_generate_asks_without_the_runs_settings(trained, data, tmp_path, variant):
    """As anybody's model: the stage says which template."""
    done, stage = trained(variant), VARIANTS[variant][0]
    shutil.copytree(done.out, tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoint-*", "settings.yaml"))
    flags = ["--data_path", data / f"{stage}-held.json", "--image_folder", data / "images"]
    own = [
        "--recipe",
        ROOT / "llava_two_stage.py",
        "--use_cpu",
        "--stage",
        stage,
        *(["--lora_r", 8] if variant == "lora" else []),
    ]
    assert answered(tmp_path / "bare", tmp_path / "a.jsonl", *flags, *own) == answered(
        done.out, tmp_path / "b.jsonl", *flags
    )


@pytest.mark.parametrize("variant", ["align", "full"])
def test_a_whole_model_is_saved_by_the_published_names(trained, variant):
    """Those of llava-hf/llava-1.5-7b-hf, which vLLM and every version of Transformers know."""
    affine, attention = ("weight", "bias"), ("q_proj", "k_proj", "v_proj")
    clip = [
        f"embeddings.{name}" for name in ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
    ]
    clip += [f"{norm}.{kind}" for norm in ("pre_layrnorm", "post_layernorm") for kind in affine]
    inside = [f"self_attn.{name}" for name in (*attention, "out_proj")] + [
        "layer_norm1",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
    ]
    clip += [f"encoder.layers.{n}.{name}.{kind}" for n in range(3) for name in inside for kind in affine]
    llama = ["embed_tokens.weight", "norm.weight"]
    inside = [f"self_attn.{name}" for name in (*attention, "o_proj")] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    llama += [
        f"layers.{n}.{name}.weight"
        for n in range(2)
        for name in (*inside, "input_layernorm", "post_attention_layernorm")
    ]
    wanted = {f"vision_tower.vision_model.{name}" for name in clip} | {
        f"language_model.model.{name}" for name in llama
    }
    wanted |= {f"multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in affine} | {
        "language_model.lm_head.weight"
    }
    assert set(load_file(trained(variant).out / "model.safetensors")) == wanted
    config = json.loads((trained(variant).out / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and config["text_config"]["architectures"] == [
        "LlamaForCausalLM"
    ]
