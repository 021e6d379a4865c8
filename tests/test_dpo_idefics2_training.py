"""dpo_idefics2.py, from the model to what a run leaves behind: what is quantized and trained, what is learnt, the answers shown,
resuming, the result. (That a step's numbers are those of TRL's trainer: test_dpo_idefics2_shared.py.)"""

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
from conftest import ROOT, Weights, fresh, log, refusal
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import dpo_idefics2
from tools import generate

SHORT = {
    "max_steps": 4,
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2,
    "dataloader_num_workers": 0,
    "sample_rows": 2,
    "max_new_tokens": 4,
    "report_to": "none",
    "learning_rate": 0.001,  # the shipped one hardly moves a model in four steps
}
FLOAT, DORA, LANGUAGE = {"load_in_4bit": False}, {"use_dora": True}, {"adapters": "language"}
SMALL = {"lora_r": 4, "lora_alpha": 64}
VARIANTS = {"4-bit": {}, "4-bit, bf16": {"bf16": True}, "4-bit, language": LANGUAGE, "4-bit, r 4": SMALL}
VARIANTS |= {"float": FLOAT, "float, DoRA": FLOAT | DORA, "float, language": FLOAT | LANGUAGE}
variants = pytest.mark.parametrize("variant", VARIANTS)
PARTS = ("vision_model", "connector", "text_model", "lm_head")
REWARDS = [f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")]
LOGGED = [
    "loss",
    "grad_norm",
    "entropy",
    "mean_token_accuracy",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    *REWARDS,
]


# ------------------------------------------------------------------------------------------------- what the tests use
def command(folder, out, **settings):
    """The flags of a short run on the CPU: of the model and the rows in `folder`, into `out`. None leaves a flag out."""
    own = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "train.json",
        "image_folder": folder / "images",
    }
    settings = {**own, "eval_dataset_name": folder / "held_out.json", "output_dir": out, **SHORT, **settings}
    return [
        "--use_cpu",
        *(part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))),
    ]


def run(argv, train=True):
    """main(argv) -> its trainer, flags, printed text and weights; without `train` it ends before training begins."""
    trainers, weights, text, recipe = [], Weights(), io.StringIO(), dpo_idefics2.Trainer
    stock = recipe.train

    def spy(self, *args, **kwargs):
        trainers.append(self)
        if not train:
            raise KeyboardInterrupt
        self.add_callback(weights)
        return stock(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        patch.setattr(recipe, "train", spy)
        with contextlib.nullcontext() if train else pytest.raises(SystemExit):
            dpo_idefics2.main(argv)
    out = Path(argv[argv.index("--output_dir") + 1])
    return SimpleNamespace(
        argv=argv, out=out, trainer=trainers[0] if trainers else None, text=text.getvalue(), weights=weights.seen
    )


def plain(name):
    """A parameter's name without what PEFT adds to it."""
    return re.sub(r"^base_model\.model\.|\.base_layer\b", "", name)


def adapted(model):
    """The modules that have an adapter, by their name in the base model."""
    return {plain(name.removesuffix(".lora_A")) for name, _ in model.named_modules() if name.endswith(".lora_A")}


def linear(model, *parts):
    """The names of the linear layers of these parts of a model."""
    found = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return {name for name in found if name.split(".")[1:2] and name.split(".")[1] in parts}


def sections(out):
    """samples.md -> {step: [[image, prompt, before, after, chosen, rejected] of a row]}."""
    parts = re.split(r"^## Step (\d+)$", (out / "samples.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    cut = lambda text: [
        [c.strip() for c in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    tables = {int(step): cut(text) for step, text in zip(*[iter(parts)] * 2)}
    assert all(rows[0] == ["image", "prompt", "before", "after", "chosen", "rejected"] for rows in tables.values())
    return {step: rows[1:] for step, rows in tables.items()}


@pytest.fixture(scope="module")
def several(tiny_pairs, tmp_path_factory):
    """A folder with model/, a tiny Idefics2 whose random weights are as large as their width asks for, so that it learns fast;
    train.json, 14 pairs, held_out.json, 5 others, and images/."""
    out = tmp_path_factory.mktemp("several")
    shutil.copytree(tiny_pairs / "model", out / "model")
    shutil.copytree(tiny_pairs / "json" / "images", out / "images")
    model = AutoModelForImageTextToText.from_pretrained(out / "model")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.data *= 4  # from a deviation of 0.02 to 0.08, about 1 / sqrt(128)
    model.save_pretrained(out / "model")
    for name, count in (("train", 14), ("test", 5)):
        rows = json.loads((tiny_pairs / "json" / f"{name}.json").read_text())[:count]
        (out / f"{name.replace('test', 'held_out')}.json").write_text(json.dumps(rows))
    return out


@pytest.fixture(scope="module")
def trained(several, tmp_path_factory):
    """A function: settings as keywords -> a finished short run; each is run once."""
    return functools.cache(
        lambda **settings: run(command(several, tmp_path_factory.mktemp("run") / "out", **settings))
    )


@pytest.fixture(scope="module")
def learnt(several, tmp_path_factory):
    """A run that has learnt six pairs by heart, on which it is evaluated too. Some question is asked of two pictures."""
    out = tmp_path_factory.mktemp("learnt")
    (out / "six.json").write_text(json.dumps(json.loads((several / "train.json").read_text())[:6]))
    settings = {
        "dataset_name": out / "six.json",
        "eval_dataset_name": out / "six.json",
        **FLOAT,
        "lora_r": 32,
        "max_steps": 40,
    }
    settings |= {
        "per_device_train_batch_size": 6,
        "per_device_eval_batch_size": 4,
        "learning_rate": 5e-3,
        "warmup_steps": 3,
    }
    settings |= {"logging_steps": 10, "eval_steps": 20, "save_steps": 20, "max_new_tokens": 32, "sample_rows": 6}
    return run(
        [*command(several, out / "out", **settings, activation_checkpointing=False), "--loss_type", "sigmoid", "sft"]
    )


# ----------------------------------------------------------------------------------------------- at its real size
def idefics2_8b():
    text = {"vocab_size": 32003, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    text |= {
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
    }
    vision = {"hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "num_hidden_layers": 27}
    vision |= {"num_attention_heads": 16, "patch_size": 14}
    perceiver = {"resampler_n_latents": 64, "resampler_depth": 3, "resampler_n_heads": 16, "resampler_head_dim": 96}
    perceiver |= {"num_key_value_heads": 4, "hidden_size": 4096, "rms_norm_eps": 1e-5}
    return transformers.Idefics2Config(
        text_config=text,
        vision_config=vision,
        perceiver_config=perceiver,
        image_token_id=32001,
        tie_word_embeddings=False,
    )


def llava_7b():
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
    }
    vision |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768}
    text = {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
    }
    text |= {"num_attention_heads": 32, "max_position_embeddings": 4096, "pad_token_id": 32001}
    return transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=32000,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )


def real(config, out, *flags):
    """A model without its weights, with the adapter that the recipe would give it."""
    config.save_pretrained(out)
    settings, _ = dpo_idefics2.parse(["--use_cpu", "--model_name_or_path", str(out), *flags])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config).requires_grad_(False)
        return get_peft_model(model, dpo_idefics2.lora_config(settings))


TEXT = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))  # of Mistral, at rank 16


@pytest.mark.parametrize(
    "config, flags, modules, trainable, everything",
    [
        (idefics2_8b, [], 410, 55_348_736, 8_458_116_848),
        (idefics2_8b, ["--adapters", "language"], 7 * 32, TEXT, 8_402_768_112 + TEXT),
        (idefics2_8b, ["--lora_r", "8"], 410, 55_348_736 // 2, 8_402_768_112 + 55_348_736 // 2),
        (llava_7b, [], 7 * 32 + 6 * 23 + 2, 46_972_928, 7_110_400_000),
        (llava_7b, ["--adapters", "language"], 7 * 32, 39_976_960, 7_103_404_032),
    ],
)
def test_the_real_models_have_the_published_size_and_this_adapter(
    config, flags, modules, trainable, everything, tmp_path
):
    assert TEXT == 41_943_040
    model = real(config(), tmp_path, *flags)
    assert model.get_nb_trainable_parameters() == (trainable, everything) and len(adapted(model)) == modules
    parts = {name.split(".")[1] for name in adapted(model)}
    tower, connector, text = ("vision_model", "connector", "text_model") if config is idefics2_8b else (
        "vision_tower", "multi_modal_projector", "language_model")  # fmt: skip
    assert parts == ({text} if "language" in flags else {tower, connector, text})
    without = {
        name
        for name in linear(model.get_base_model(), *parts)
        if "lora_" not in name and not name.endswith("base_layer")
    }
    assert without == (
        {name for name in without if "vision_tower" in name and ".layers.23." in name}
    )  # LLaVA's last: never used
    assert len(without) == (0 if config is idefics2_8b or "language" in flags else 6)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------------- load_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_4bit_is_language_model_and_connector_and_nothing_else(several, tmp_path, dtype):
    models = []
    for on in (True, False):
        settings, training = dpo_idefics2.parse(command(several, tmp_path, load_in_4bit=on))
        training.bf16, training.fp16 = dtype == torch.bfloat16, dtype == torch.float16
        models.append(dpo_idefics2.load_model(settings, training))
    packed, none = ({n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)} for model in models)
    assert set(packed) == linear(models[1], "text_model", "connector") and len(packed) > 14 and not none
    for module in packed.values():
        state = module.weight.quant_state
        assert (state.quant_type, state.nested, module.compute_dtype) == ("nf4", True, dtype)
    for model in models:
        assert {p.dtype for n, p in model.named_parameters() if n.removesuffix(".weight") not in packed} == {dtype}
        assert not any(p.requires_grad for p in model.parameters())


# ----------------------------------------------------------------------------------------- what is trained, what not
@variants
def test_only_adapters_are_trained(trained, variant):
    """Each of their matrices, in float32; beneath them not a bit changes."""
    done = trained(**VARIANTS[variant])
    loaded = dpo_idefics2.load_model(*dpo_idefics2.parse(done.argv))
    base = loaded.state_dict()  # of 4-bit weights also their scales
    now = {plain(n): v for n, v in done.trainer.model.state_dict().items() if "lora_" not in n}
    assert now.keys() == base.keys() and all(torch.equal(now[name], base[name]) for name in base)
    first, last = done.weights[0], done.weights[-1]
    assert all("lora_" in name for name in first) and any("magnitude" in name for name in first) == ("DoRA" in variant)
    assert {p.dtype for p in last.values()} == {torch.float32}
    assert [name for name in first if torch.equal(first[name], last[name])] == []
    parts = ["text_model"] if "language" in variant else ["text_model", "connector", "vision_model"]
    assert adapted(done.trainer.model) == linear(loaded, *parts)
    config = done.trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == ((4, 64, 0) if "r 4" in variant else (16, 32, 0))


@variants
def test_says_what_is_trained(trained, variant, several):
    done, base = trained(**VARIANTS[variant]), AutoModelForImageTextToText.from_pretrained(several / "model")
    for name in PARTS:
        said = re.search(rf"^{name} +([\d,]+) of +([\d,]+) parameters trained, +([\d,]+) in 4-bit", done.text, re.M)
        adapter, total, packed = (int(number.replace(",", "")) for number in said.groups())
        start = (f"model.{name}.", f"{name}.")
        assert adapter == sum(p.numel() for n, p in done.weights[0].items() if plain(n).startswith(start))
        assert total == adapter + sum(p.numel() for n, p in base.named_parameters() if n.startswith(start))
        names = linear(base, name) if name in ("connector", "text_model") and "4-bit" in variant else ()
        assert packed == sum(base.get_submodule(n).weight.numel() for n in names)
    assert "path: shared prompts, each pair one sequence with its image once\n" in done.text
    assert "14 rows to train on, 5 to evaluate; 4 steps of 2 rows, 0.57 epochs; from the start\n" in done.text


def test_shows_a_pair_as_the_model_sees_it(trained):
    text, rows = (
        trained().text,
        json.loads(Path(trained().argv[trained().argv.index("--dataset_name") + 1]).read_text()),
    )
    shown = re.search(
        r"One pair as the model sees it, trained tokens in «»:\n\n(.*)\n  chosen:   (.*)\n  rejected: (.*?)\n\n",
        text,
        re.S,
    )
    prompt, chosen, rejected = shown.groups()
    assert prompt.replace("<image> x 8", "") == (
        f"<s> User:<fake_token_around_image><fake_token_around_image> {rows[0]['question']}<end_of_utterance>\nAssistant:"
    )
    assert (
        chosen == f"« {rows[0]['chosen']}<end_of_utterance>»"
        and rejected == f"« {rows[0]['rejected']}<end_of_utterance>»"
    )


def test_a_16_bit_adapter_would_not_move(several, tmp_path):
    """TRL makes the adapters of a 4-bit model bf16, the recipe's Trainer float32 again, before there is an optimizer."""
    trainer = run(command(several, tmp_path), train=False).trainer
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {
        torch.float32
    } and trainer.optimizer is None


@pytest.mark.parametrize(
    "family, names, expected",
    [
        ("tiny_pairs", ["q_proj", "down_proj"], r"model\.text_model\..*(q|down)_proj"),
        ("tiny_llava", ["q_proj", "down_proj"], r"model\.language_model\..*(q|down)_proj"),
        (
            "tiny_pairs",
            [r"model\.(vision_model|connector)\..*(q_proj|fc1)"],
            r"model\.(vision_model|connector)\..*(q_proj|fc1)",
        ),
        ("tiny_pairs", [], r"model\..*"),
    ],
)
def test_lora_target_modules_are_names_or_a_regex(request, several, tmp_path, family, names, expected):
    """Of the language model, or anywhere; it wins over --adapters, and what it names learns."""
    flags = command(several, tmp_path, **FLOAT, model_name_or_path=request.getfixturevalue(family) / "model")
    done = run([*flags, *(["--adapters", "language", "--lora_target_modules", *names] if names else [])])
    base = AutoModelForImageTextToText.from_pretrained(request.getfixturevalue(family) / "model")
    linear_layers = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    assert adapted(done.trainer.model) == {name for name in linear_layers if re.fullmatch(expected, name)} != set()
    assert not [name for name, p in done.weights[0].items() if torch.equal(p, done.weights[-1][name])]


@pytest.mark.parametrize(
    "names, message",
    [
        (["q_proj", "qproj"], "--lora_target_modules qproj: no such linear layer"),
        ([r".*\.(x|y)_proj"], r"--lora_target_modules .*_proj: no such linear layer"),
        (["(q_proj"], "is not a valid regular expression"),
        ([r".*lm_head"], "lm_head, which DPOTrainer merges with the loss and cannot adapt"),
    ],
)
def test_lora_target_modules_that_cannot_be_adapted(several, tmp_path, monkeypatch, names, message):
    monkeypatch.setattr(dpo_idefics2, "load_model", None)
    assert re.search(
        message, refusal(dpo_idefics2.main, [*command(several, tmp_path), "--lora_target_modules", *names])
    )


@pytest.mark.parametrize(
    "settings", [FLOAT, FLOAT | LANGUAGE, FLOAT | DORA, FLOAT | {"shared_prompt": False}], ids=str
)
def test_the_trained_model_can_be_merged_in_the_same_process(several, tmp_path, settings):
    """Each module has its own forward back, and merged they say what the adapter says."""
    trainer = run(command(several, tmp_path, **settings)).trainer
    replaced = [vars(module)["forward"] for module in trainer.model.modules() if "forward" in vars(module)]
    assert not any(word in repr(replaced) for word in ("forward_pairs", "run_once"))
    collator = trainer.data_collator
    batch = collator.tokenize([collator.messages_of(row)[:1] for row in trainer.eval_dataset], prompt=True)

    def logits(model):
        with torch.no_grad():
            return model.eval()(**batch).logits[batch["attention_mask"].bool()]

    with trainer.model.disable_adapter():
        base = logits(trainer.model)
    adapter = logits(trainer.model)
    assert (adapter - base).abs().max() > 0.01
    torch.testing.assert_close(logits(trainer.model.merge_and_unload()), adapter, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------- answers by heart
def test_it_learns(learnt):
    """From nothing, in 40 steps: it prefers every chosen answer, and says it when asked."""
    assert all(log(learnt.out, f"eval_{name}")[40] == 1 for name in ("rewards/accuracies", "samples/ended"))
    assert (
        log(learnt.out, "eval_rewards/margins")[40] > 1
        and log(learnt.out, "loss")[40] < 0.2 * log(learnt.out, "loss")[10]
    )
    rows = sections(learnt.out)[40]
    assert len(rows) == 6 and [row[3] for row in rows] == [row[4] for row in rows]
    assert all(row[2] != row[3] for row in rows) and len({row[1] for row in rows}) < 6
    tokenizer = learnt.trainer.processing_class.tokenizer
    lengths = [len(tokenizer(" " + row[4], add_special_tokens=False)["input_ids"]) for row in rows]
    assert log(learnt.out, "eval_samples/tokens")[40] == sum(lengths) / 6


def test_samples_show_image_prompt_and_answers(learnt, several):
    """The same rows each time, in the same order, with the right picture; `before` is what the untouched base says."""
    given = json.loads((several / "train.json").read_text())[:6]
    tables = sections(learnt.out)
    assert list(tables) == [20, 40] == list(log(learnt.out, "eval_loss"))
    assert [row[:3] + row[4:] for row in tables[20]] == [row[:3] + row[4:] for row in tables[40]]
    numbers = [int(re.fullmatch(r"!\[\]\(samples/(\d+)-0\.png\)", row[0])[1]) for row in tables[40]]
    assert sorted(numbers) == list(range(6))
    base, collator = AutoModelForImageTextToText.from_pretrained(several / "model"), learnt.trainer.data_collator
    for n, (_, prompt, before, _, chosen, rejected) in zip(numbers, tables[40]):
        assert (prompt, chosen, rejected) == tuple(given[n][key] for key in ("question", "chosen", "rejected"))
        shown, picture = (
            Image.open(path).convert("L")
            for path in (learnt.out / f"samples/{n}-0.png", several / "images" / given[n]["image"])
        )
        drawn = torch.tensor(list(shown.resize(picture.size, Image.Resampling.BOX).tobytes())).float()
        apart = [
            (drawn - torch.tensor(list(Image.open(several / "images" / row["image"]).convert("L").tobytes()))).norm()
            for row in given
        ]
        assert min(range(6), key=apart.__getitem__) == n
        batch = collator.tokenize([collator.messages_of(given[n] | {"image": picture})[:1]], prompt=True)
        ids = base.generate(**batch, max_new_tokens=32, do_sample=False)[0, batch["input_ids"].shape[1] :]
        text = collator.processor.decode(ids, skip_special_tokens=True)
        assert before == " ".join(text.replace("|", "&#124;").split())


def test_answers_are_counted_up_to_their_end(several, tmp_path, monkeypatch):
    """By hand: an answer is as long as what stands before its end, be it <end_of_utterance> or EOS, and ended if there is one."""
    trainer = run(command(several, tmp_path, per_device_eval_batch_size=3), train=False).trainer
    collator = trainer.data_collator
    assert collator.processor.tokenizer.convert_ids_to_tokens(collator.stop_ids) == ["<end_of_utterance>", "</s>"]
    (end, eos), pad = collator.stop_ids, trainer.processing_class.tokenizer.pad_token_id
    a, b = trainer.processing_class.tokenizer("Yes No", add_special_tokens=False)["input_ids"][:2]
    said = iter(
        [torch.tensor([[a, b, end, pad], [a, b, a, b], [end, pad, pad, pad]]), torch.tensor([[a, eos], [b, a]])]
    )
    monkeypatch.setattr(
        trainer.model, "generate", lambda input_ids, **kwargs: torch.cat([input_ids, next(said)], dim=1)
    )
    found = dpo_idefics2.answer_rows(trainer, trainer.eval_dataset, 4)
    assert [(tokens, ended) for _, tokens, ended in found] == [(2, True), (4, False), (0, True), (1, True), (2, False)]
    assert found[2][0] == ""
    monkeypatch.setattr(dpo_idefics2, "answer_rows", lambda trainer, rows, most: found[: len(rows)])
    metrics = trainer.evaluate()
    assert (metrics["eval_samples/tokens"], metrics["eval_samples/ended"]) == (
        3,
        0.5,
    )  # of the first two: --sample_rows 2


def test_a_pipe_or_a_line_end_keeps_the_table_whole(several, tmp_path, monkeypatch):
    trainer = run(command(several, tmp_path), train=False).trainer
    monkeypatch.setattr(
        dpo_idefics2, "answer_rows", lambda trainer, rows, most: [dpo_idefics2.Answer("a | b\nc", 3, True)] * len(rows)
    )
    trainer.evaluate()
    assert [row[2:4] for row in sections(tmp_path)[0]] == [["a &#124; b c"] * 2] * 2


# --------------------------------------------------------------------------------------------------------- evaluation
def test_what_is_shown_can_be_bounded(several, tmp_path):
    done = run(command(several, tmp_path / "a", sample_rows=1, max_eval_rows=3))
    assert len(done.trainer.eval_dataset) == 3 and all(len(rows) == 1 for rows in sections(done.out).values())
    assert "14 rows to train on, 3 to evaluate" in done.text
    done = run(command(several, tmp_path / "b", sample_rows=0))
    assert (
        log(done.out, "eval_loss") and not log(done.out, "eval_samples/ended") and not list(done.out.glob("samples*"))
    )


def test_the_best_checkpoint_is_saved(several, tmp_path, monkeypatch):
    """Where it is asked for, by eval_loss; else the last."""
    losses = [3.0, 1.0, 2.0, 4.0]

    def faked(self, *args, stock=dpo_idefics2.Trainer.evaluation_loop, **kwargs):
        output = stock(self, *args, **kwargs)
        output.metrics["eval_loss"] = losses[self.state.global_step - 1]
        return output

    monkeypatch.setattr(dpo_idefics2.Trainer, "evaluation_loop", faked)
    for best, flags in ((2, {"load_best_model_at_end": True}), (4, {})):
        done = run(command(several, tmp_path / str(best), **flags, eval_steps=1, save_steps=1))
        assert list(log(done.out, "eval_loss").values()) == losses
        assert ("best loss: 1, at step 2; that is saved" in done.text) == bool(flags)
        saved = load_file(done.out / "adapter_model.safetensors")
        for name, value in done.weights[best].items():
            assert torch.equal(saved[name.replace(".default", "")], value)
        assert {path.name for path in done.out.glob("checkpoint-*")} == {
            f"checkpoint-{n}" for n in ((2, 4) if flags else (3, 4))
        }


@pytest.mark.parametrize("without", [{"eval_strategy": "no"}, {"eval_fraction": 0, "eval_dataset_name": None}])
def test_without_evaluation(several, tmp_path, without):
    done = run(command(several, tmp_path, load_best_model_at_end=True, **without))
    assert list(log(done.out)) == [1, 2, 3, 4] and not log(done.out, "eval_loss")
    assert not (done.out / "samples.md").exists() and "14 rows to train on, 0 to evaluate" in done.text


# ------------------------------------------------------------------------------------------------------ what is saved
def test_output_dir_holds_everything(several, tmp_path):
    done = run(command(several, tmp_path / "out", report_to="tensorboard", longest_edge=56))
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "settings.yaml",
        "samples.md",
        "trainer_state.json",
    ):
        assert (done.out / name).stat().st_size > 0
    assert {path.name for path in done.out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert list(done.out.glob("**/events.out.tfevents.*")) and not list(done.out.glob("**/model*.safetensors"))
    processor, base = (AutoProcessor.from_pretrained(folder) for folder in (done.out, several / "model"))
    assert type(processor) is type(base) and processor.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert processor.chat_template == base.chat_template and not processor.image_processor.do_image_splitting
    first, *lines = (done.out / "settings.yaml").read_text().splitlines()
    written = yaml.safe_load("\n".join(lines))
    assert first == "# dpo_idefics2.py" and written["max_steps"] == 4 and "hub_token" not in written
    assert (written["lora_r"], written["load_in_4bit"], written["model_name_or_path"]) == (
        16,
        True,
        str(several / "model"),
    )
    for name in LOGGED:
        assert list(log(done.out, name)) == [1, 2, 3, 4] and all(map(math.isfinite, log(done.out, name).values()))
    for name in ("loss", "samples/ended", "samples/tokens", *REWARDS):
        assert list(log(done.out, f"eval_{name}")) == [2, 4] and all(
            map(math.isfinite, log(done.out, f"eval_{name}").values())
        )
    assert log(done.out, "rewards/margins")[1] == 0 != log(done.out, "rewards/margins")[4]
    assert log(done.out)[1] == pytest.approx(math.log(2), abs=1e-6)


@variants
def test_the_adapter_is_all_that_is_saved(trained, variant):
    done = trained(**VARIANTS[variant])
    want = {
        re.sub(r"(?<=magnitude_vector)\.default\.weight$|\.default", "", name): p
        for name, p in done.weights[4].items()
    }
    size = sum(4 * p.numel() for p in want.values())
    for folder in (done.out, done.out / "checkpoint-4"):
        saved = load_file(folder / "adapter_model.safetensors")
        assert saved.keys() == want.keys() and all(torch.equal(saved[name], want[name]) for name in want)
        assert size < (folder / "adapter_model.safetensors").stat().st_size < size + 20_000


def test_settings_yaml_repeats_the_run(trained, tmp_path):
    first = trained()
    again = run(["--config", str(first.out / "settings.yaml"), "--output_dir", str(tmp_path / "again")])
    for key in (*LOGGED, "eval_loss", "eval_rewards/margins"):
        assert log(again.out, key) == log(first.out, key)
    assert (again.out / "samples.md").read_text() == (first.out / "samples.md").read_text()


def test_the_stock_path_logs_the_same(trained, several, tmp_path):
    """--shared_prompt false is another way to the same run, which may even be taken in the middle of one."""
    first, other = trained(**FLOAT), run(command(several, tmp_path / "stock", **FLOAT, shared_prompt=False))
    assert "path: stock DPOTrainer, since --shared_prompt false\n" in other.text
    for key in (*LOGGED, "eval_loss", "eval_rewards/margins"):
        assert log(other.out, key) == pytest.approx(log(first.out, key), rel=1e-3, abs=1e-3)
    half = shutil.copytree(first.out / "checkpoint-2", tmp_path / "half" / "checkpoint-2").parent
    shutil.copy(first.out / "settings.yaml", half)
    rest = run(command(several, half, **FLOAT, shared_prompt=False))
    assert f"resuming from {half / 'checkpoint-2'}\n" in rest.text
    assert log(half) == pytest.approx(log(first.out), abs=1e-4)


RELOAD = """
import sys, torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
work, results = torch.load(sys.argv[1], weights_only=False), {}
for variant, (out, base, argv, asked) in work.items():
    processor = AutoProcessor.from_pretrained(out)
    conversations = [[{"role": "user", "content": [{"type": "image", "image": Image.open(picture).convert("RGB")},
                     {"type": "text", "text": question}]}] for picture, question in asked]
    batch = processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=True, return_dict=True,
                                          return_tensors="pt", processor_kwargs={"padding": True})
    def logits(model):
        with torch.no_grad():
            return model.eval()(**batch).logits
    def load(dtype=torch.float32):
        return PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype=dtype), out)
    result = results[variant] = dict(batch)
    model = load()
    if "4-bit" in variant:
        import dpo_idefics2
        model = PeftModel.from_pretrained(dpo_idefics2.load_model(*dpo_idefics2.parse(argv)), out)
    result["reloaded"] = logits(model)
    ids = model.generate(**batch, max_new_tokens=32, do_sample=False)[:, batch["input_ids"].shape[1]:]
    result["said"] = [" ".join(text.split()) for text in processor.batch_decode(ids, skip_special_tokens=True)]
    result["float"], result["merged"] = logits(load()), logits(load().merge_and_unload())
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    result["merged, bf16"] = logits(load(torch.bfloat16).merge_and_unload()).float()
torch.save(results, sys.argv[2])
"""
RELOADED = ["4-bit", "float", "float, DoRA", "learnt"]


@pytest.fixture(scope="module")
def reloaded(trained, learnt, several, tmp_path_factory):
    """{variant: what a new process gets out of the saved folder, of the prompts of the rows held out}."""
    folder, work = tmp_path_factory.mktemp("reloaded"), {}
    for name in RELOADED:
        done = learnt if name == "learnt" else trained(**VARIANTS[name])
        asked = [(several / "images" / row["image"], row["question"]) for row in by_number(done.trainer.eval_dataset)]
        work[name] = str(done.out), str(several / "model"), done.argv, asked
    torch.save(work, folder / "work.pt")
    fresh(RELOAD, folder / "work.pt", folder / "results.pt")
    return torch.load(folder / "results.pt")


def by_number(dataset):
    """A shuffled data set's rows in the order of the file."""
    return sorted(dataset, key=lambda row: row["row"])


@pytest.mark.parametrize("variant", RELOADED)
def test_the_result_stands_alone(trained, learnt, reloaded, variant):
    """A new process with plain PEFT builds the same prompts, and gets from them what the run's own model does."""
    done, result = learnt if variant == "learnt" else trained(**VARIANTS[variant]), reloaded[variant]
    collator, model = done.trainer.data_collator, done.trainer.model.eval()
    batch = collator.tokenize(
        [collator.messages_of(row)[:1] for row in by_number(done.trainer.eval_dataset)], prompt=True
    )
    for name in ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"):
        assert torch.equal(result[name], batch[name])
    words = batch["attention_mask"].bool()
    with torch.no_grad():
        here = model(**batch).logits
        said = model.generate(**batch, max_new_tokens=32, do_sample=False)[:, words.shape[1] :]
        with model.disable_adapter():
            assert (model(**batch).logits - here)[words].abs().max() > 0.01
    torch.testing.assert_close(result["reloaded"][words], here[words], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(result["merged"][words], result["float"][words], atol=1e-4, rtol=1e-4)
    assert (result["merged, bf16"] - result["float"])[words].norm() < 0.05 * result["float"][words].norm()
    said = [" ".join(text.split()) for text in collator.processor.batch_decode(said, skip_special_tokens=True)]
    assert result["said"] == said
    if variant == "learnt":
        assert said == [row["chosen"] for row in by_number(done.trainer.eval_dataset)]


# ---------------------------------------------------------------------------------------------------- tools/generate.py
def answered(run, out, *flags):
    generate.main([str(run), "--output", str(out), "--max_new_tokens", "32", *flags])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_generate_gives_the_answers_shown(learnt, tmp_path):
    rows = sections(learnt.out)[40]
    after, before = (
        answered(learnt.out, tmp_path / f"{n}.jsonl", *flags) for n, flags in enumerate(([], ["--base_only"]))
    )
    for lines, column in ((after, 3), (before, 2)):
        assert [" ".join(line["prediction"].replace("|", "&#124;").split()) for line in lines] == [
            row[column] for row in rows
        ]
        assert [line["reference"] for line in lines] == [row[4] for row in rows] and len(lines) == 6
        assert [line["question"] for line in lines] == [row[1] for row in rows]


def test_generate_asks_questions_without_answers(learnt, several, tmp_path):
    """As AMBER has them, and with what has to be added to them."""
    given = json.loads((several / "train.json").read_text())[:6]
    brief = next(row for row in given if row["question"].endswith(" Please answer yes or no."))
    asked = [{"id": 7, "image": row["image"], "query": row["question"]} for row in (given[0], given[3])]
    asked.append(
        {"id": 9, "image": brief["image"], "query": brief["question"].removesuffix(" Please answer yes or no.")}
    )
    (tmp_path / "query.json").write_text(json.dumps(asked))
    flags = [
        "--dataset_name",
        str(tmp_path / "query.json"),
        "--image_folder",
        str(several / "images"),
        "--question_column",
        "query",
    ]
    lines = answered(learnt.out, tmp_path / "plain.jsonl", *flags)
    assert [(line["id"], line["reference"]) for line in lines] == [(7, None), (7, None), (9, None)]
    assert [line["prediction"] for line in lines[:2]] == [given[0]["chosen"], given[3]["chosen"]]
    lines = answered(learnt.out, tmp_path / "more.jsonl", *flags, "--append", "Please answer yes or no.")
    assert lines[2]["question"] == brief["question"] and lines[2]["prediction"] == brief["chosen"]


# ------------------------------------------------------------------------------------------------------------- resume
KILL = """
import os, signal, sys
import torch, transformers, dpo_idefics2
torch.set_num_threads(1)
class Kill(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
train = transformers.Trainer.train
def doomed(self, *args, **kwargs):
    self.add_callback(Kill())
    return train(self, *args, **kwargs)
dpo_idefics2.Trainer.train = doomed
dpo_idefics2.main(sys.argv[1:])
"""
# 14 rows, 2 x 2 rows a step: the fifth step begins the second epoch; the run is killed in mid-epoch, the last checkpoint is of 6
LONG = {"max_steps": 12, "gradient_accumulation_steps": 2, "save_total_limit": 9}


@pytest.fixture(scope="module")
def uninterrupted(several, tmp_path_factory):
    """A run of 12 steps that nothing interrupted."""
    return run(command(several, tmp_path_factory.mktemp("whole") / "out", **LONG))


@pytest.fixture(scope="module")
def dead(several, tmp_path_factory):
    """The folder of the same run, killed in its 7th step. Tests work on copies of it."""
    out = tmp_path_factory.mktemp("killed") / "out"
    done = subprocess.run(
        [sys.executable, "-c", KILL, *command(several, out, **LONG)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert {path.name for path in out.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (2, 4, 6)}
    assert not (out / "trainer_state.json").exists()
    return out


@pytest.fixture
def killed(dead, tmp_path):
    return Path(shutil.copytree(dead, tmp_path / "out"))


def same_end(whole, resumed, after):
    """From step `after` on, all is the same to the last bit: what was logged, trained and saved."""
    for key in (*LOGGED, "eval_loss", "eval_rewards/margins"):
        want, got = ({s: v for s, v in log(run.out, key).items() if s > after} for run in (whole, resumed))
        assert want == got and 12 in got
    assert len(resumed.weights) == 1 + 12 - after  # weights[0] of the resumed run is the checkpoint's
    for step in range(13 - after):
        for name, value in whole.weights[after + step].items():
            assert torch.equal(value, resumed.weights[step][name])
    saved = [load_file(out / "adapter_model.safetensors") for out in (whole.out, resumed.out)]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_started_again(uninterrupted, killed, several, workers):
    """With the same command, to the same losses, whatever the number of loader processes; a newest checkpoint that was cut
    off half-way is passed over. `before` is still the untouched base's answer."""
    half = Path(shutil.copytree(killed / "checkpoint-6", killed / "checkpoint-7"))
    (half / "optimizer.pt").write_bytes((half / "optimizer.pt").read_bytes()[:1000])
    resumed = run(command(several, killed, **LONG, dataloader_num_workers=workers))
    assert f"resuming from {killed / 'checkpoint-6'}\n" in resumed.text
    same_end(uninterrupted, resumed, 6)
    assert (killed / "samples.md").read_text() == (uninterrupted.out / "samples.md").read_text()
    assert list(sections(killed)) == list(range(2, 14, 2))


@pytest.mark.slow
def test_a_path_names_the_checkpoint(uninterrupted, several, tmp_path):
    checkpoint = uninterrupted.out / "checkpoint-4"  # at the end of an epoch
    resumed = run(command(several, tmp_path / "other", **LONG, resume_from_checkpoint=checkpoint))
    assert f"resuming from {checkpoint}\n" in resumed.text
    same_end(uninterrupted, resumed, 4)


@pytest.mark.parametrize(
    "file", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "adapter_model.safetensors", "rng_state.pth"]
)
def test_a_damaged_checkpoint_is_not_whole(dead, tmp_path, file):
    """Missing, empty or cut off: any of its files."""
    good = dead / "checkpoint-6"
    assert dpo_idefics2.is_complete(good)
    for n, keep in enumerate([None, 0, 0.5]):
        copy = Path(shutil.copytree(good, tmp_path / f"checkpoint-{n}"))
        data = (copy / file).read_bytes()
        (copy / file).unlink() if keep is None else (copy / file).write_bytes(data[: int(keep * len(data))])
        assert not dpo_idefics2.is_complete(copy), keep


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--resume_from_checkpoint", "false"], ["holds a run", "--output_dir"]),
        (["--resume_from_checkpoint", "nowhere"], ["nowhere: not a complete checkpoint"]),
        (
            ["--beta", "0.5", "--learning_rate", "0.1"],
            ["beta 0.1 -> 0.5", "learning_rate 0.001 -> 0.1", "--output_dir"],
        ),
        (["--loss_type", "sigmoid", "sft"], ["loss_type ['sigmoid'] -> ['sigmoid', 'sft']"]),
        (["--adapters", "language"], ["adapters all -> language"]),
    ],
)
def test_a_used_output_dir_is_not_overwritten(killed, several, monkeypatch, flags, words):
    monkeypatch.setattr(dpo_idefics2, "load_data", None)
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    message = refusal(dpo_idefics2.main, [*command(several, killed, **LONG), *flags])
    assert all(word in message for word in words)
    assert before == {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}


@pytest.mark.parametrize("text", [None, "", "- 1", "a: b: c"])
def test_a_run_that_does_not_say_which_it_is_is_not_gone_on_from(killed, several, monkeypatch, text):
    monkeypatch.setattr(dpo_idefics2, "load_data", None)
    (killed / "settings.yaml").unlink() if text is None else (killed / "settings.yaml").write_text(text)
    message = refusal(dpo_idefics2.main, command(several, killed, **LONG))
    assert "without the settings.yaml" in message and "--resume_from_checkpoint CHECKPOINT" in message


@pytest.mark.parametrize("more", [[], ["--sample_rows", "1", "--shared_prompt", "false"]])
def test_a_finished_run_says_so(trained, monkeypatch, capsys, more):
    done = trained()
    for name in ("load_model", "load_data", "load_processor"):
        monkeypatch.setattr(dpo_idefics2, name, None)
    before = {path: path.stat().st_mtime_ns for path in done.out.rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        dpo_idefics2.main([*done.argv, *more])
    assert stopped.value.code in (0, None) and "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in done.out.rglob("*")}
    assert "lora_r 16 -> 4" in refusal(dpo_idefics2.main, [*done.argv, "--lora_r", "4"])


@pytest.mark.slow
@pytest.mark.parametrize("more, best", [({}, True), (DORA | FLOAT, False)])
def test_killed_before_the_end_was_written(several, tmp_path, more, best):
    """All steps are done, the last one in the middle of an epoch, and the result is not saved: started again it is, without another step."""
    settings = LONG | more | {"max_steps": 11, "load_best_model_at_end": best}
    first = run(command(several, tmp_path / "first", **settings))
    out = Path(shutil.copytree(first.out, tmp_path / "out"))
    weights = next(out.glob("*model.safetensors"))
    (out / "trainer_state.json").unlink()
    weights.unlink()
    again = run(command(several, out, **settings))
    assert len(again.weights) == 1 and list(log(out)) == list(range(1, 12)) and log(out) == log(first.out)
    saved, wanted = load_file(weights), load_file(first.out / weights.name)
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[key], wanted[key]) for key in saved)
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stdout(io.StringIO()):
        dpo_idefics2.main(command(several, out, **settings))
    assert stopped.value.code in (0, None)
    if best:  # one that is gone is named
        (out / "trainer_state.json").unlink()
        state = out / "checkpoint-11" / "trainer_state.json"
        state.write_text(
            json.dumps(json.loads(state.read_text()) | {"best_model_checkpoint": "elsewhere/checkpoint-1"})
        )
        gone = refusal(dpo_idefics2.main, command(several, out, **settings))
        assert gone.startswith("error: elsewhere/checkpoint-1, the best checkpoint, is missing or damaged")


def test_interrupted_by_the_keyboard(several, tmp_path, monkeypatch):
    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(dpo_idefics2.Trainer, "training_step", interrupt)
    message = refusal(dpo_idefics2.main, command(several, tmp_path))
    assert "interrupted" in message and "settings.yaml" in message and str(tmp_path) in message


# ------------------------------------------------------------------------------------------- what happens under way
@pytest.mark.parametrize("name, workers", [("held_out", 0), ("train", 2)])
def test_a_picture_that_vanishes_ends_the_run_with_one_message(several, tmp_path, monkeypatch, workers, name):
    folder = Path(shutil.copytree(several, tmp_path / "data"))
    row = json.loads((folder / f"{name}.json").read_text())[-1 if name == "held_out" else 5]

    def vanish(*args, load=dpo_idefics2.load_model):
        (folder / "images" / row["image"]).unlink()
        return load(*args)

    monkeypatch.setattr(dpo_idefics2, "load_model", vanish)
    message = refusal(
        dpo_idefics2.main, command(folder, tmp_path / "out", dataloader_num_workers=workers, max_steps=7)
    )
    assert message.startswith("error: the data changed during the run: unreadable image: ") and row["image"] in message


def test_beyond_the_sliding_window(several, tmp_path, monkeypatch):
    """Refused before any weights load; on the stock path, which knows the window, it is not."""
    folder = Path(shutil.copytree(several, tmp_path / "data"))
    config = json.loads((folder / "model" / "config.json").read_text())
    config["text_config"]["sliding_window"] = 64
    (folder / "model" / "config.json").write_text(json.dumps(config))
    stock = run(command(folder, tmp_path / "stock", shared_prompt=False), train=False)
    assert "path: stock DPOTrainer, since --shared_prompt false" in stock.text
    assert "path: shared" in run(command(folder, tmp_path / "short", max_length=64), train=False).text
    monkeypatch.setattr(dpo_idefics2, "load_model", None)
    message = refusal(dpo_idefics2.main, command(folder, tmp_path / "out"))
    assert (
        "--max_length 1024" in message
        and "sliding window of 64 tokens" in message
        and "--max_length 64, or --shared_prompt false" in message
    )


@pytest.mark.parametrize("family", ["llava", "paligemma", "paligemma2", "llava_next"])
def test_another_family(request, several, tmp_path, family):
    """Nothing is changed but --model_name_or_path."""
    folder = request.getfixturevalue(f"tiny_{family}" if family != "llava_next" else "tiny_next")
    window = {"max_length": 256} if family == "paligemma2" else {}  # as its tiny model has it
    done = run(command(several, tmp_path / "out", model_name_or_path=folder / "model", learning_rate=0.01, **window))
    path = "stock DPOTrainer, since sharing is for idefics2, llava, paligemma, this is llava_next"
    assert f"path: {path if family == 'llava_next' else 'shared prompts'}" in done.text
    assert [name for name, p in done.weights[0].items() if torch.equal(p, done.weights[4][name])] == []
    assert (
        log(done.out)[1] == pytest.approx(math.log(2), abs=1e-6) != log(done.out)[4]
        and len(log(done.out, "eval_loss")) == 2
    )
    packed = {n.split(".")[3] for n, m in done.trainer.model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert packed == {"language_model", "multi_modal_projector"} and len(sections(done.out)[4]) == 2
    lines = answered(done.out, tmp_path / "a.jsonl", "--max_new_tokens", "4")
    shown = [row[3] for row in sections(done.out)[4]]
    assert [" ".join(line["prediction"].replace("|", "&#124;").split()) for line in lines][:2] == shown and len(
        lines
    ) == 5


# ------------------------------------------------------------------------------------------------------ rows of a step
def test_rows_can_be_grouped_by_length(several, tmp_path, monkeypatch):
    """The Trainer's own sampler reads the column `length`: there is less padding."""
    settings = LONG | {"learning_rate": 1e-4, "eval_strategy": "no", **FLOAT}
    padding, stock = [], dpo_idefics2.Trainer.training_step

    def count(self, model, inputs, *args, **kwargs):
        padding[-1] += int((inputs["attention_mask"] == 0).sum())
        return stock(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(dpo_idefics2.Trainer, "training_step", count)
    for strategy in ("group_by_length", "random"):
        padding.append(0)
        done = run(command(several, tmp_path / strategy, **settings, train_sampling_strategy=strategy))
        assert len(log(done.out)) == 12 and all(map(math.isfinite, log(done.out).values()))
    assert 0 < padding[0] < padding[1]  # most of it is within pairs, whose answers differ in length


@pytest.mark.slow
def test_two_processes_train_like_one(several, tmp_path):
    """Twice the batch. What is shown is there once."""
    settings = {
        **FLOAT,
        "learning_rate": 1e-4,
        "per_device_eval_batch_size": 1,
        "max_eval_rows": 4,
        "max_steps": 8,
        "save_total_limit": 9,
    }
    settings |= {"per_device_train_batch_size": 1}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = command(several, tmp_path / "two", **settings, gradient_accumulation_steps=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = [*launch, str(ROOT / "dpo_idefics2.py"), *argv]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    for words in ("rows to train on", "One pair as the model sees it", "path: shared prompts", "8 steps of 4 rows"):
        assert done.stdout.count(words) == 1
    one = run(command(several, tmp_path / "one", **settings, gradient_accumulation_steps=4))
    for key in ("loss", "grad_norm", "eval_loss", *REWARDS, "logps/chosen", *(f"eval_{name}" for name in REWARDS)):
        assert log(tmp_path / "two", key) == pytest.approx(log(one.out, key), abs=1e-4) and log(one.out, key)
    assert sections(tmp_path / "two") == sections(one.out) and list(sections(one.out)) == [2, 4, 6, 8]
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    for name in saved[0]:
        torch.testing.assert_close(saved[0][name], saved[1][name], atol=1e-3, rtol=1e-3)
    again = command(
        several,
        tmp_path / "again",
        **settings,
        gradient_accumulation_steps=2,
        resume_from_checkpoint=tmp_path / "two" / "checkpoint-6",
    )
    done = subprocess.run([*program[: -len(argv)], *again], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    for key in ("loss", "grad_norm"):  # from within the second epoch on, whose order is not the first one's
        assert log(tmp_path / "again", key) == log(tmp_path / "two", key)


@pytest.mark.slow
def test_the_recipe_alone_in_an_empty_folder(several, tmp_path, trained):
    """One file, copied: it gives the same run."""
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(ROOT / "dpo_idefics2.py", folder)
    argv = [sys.executable, "dpo_idefics2.py", *command(several, "out")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in folder.iterdir()} == {"dpo_idefics2.py", "out"}
    assert (
        log(folder / "out") == pytest.approx(log(trained().out), abs=1e-6)
        and "saved out: model or adapter" in done.stdout
    )
