"""idefics2_docvqa.py, from the model to what a run leaves behind: what is quantized and trained, the loss, the answers drawn
and given, resuming, the result."""

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
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

import idefics2_docvqa
from evals import docvqa
from tiny import forms
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
    "learning_rate": 0.001,  # the shipped one hardly moves a model in four steps
}
FLOAT, DORA, BF16 = {"load_in_4bit": False}, {"use_dora": True}, {"bf16": True}
VARIANTS = {"4-bit": {}, "4-bit, bf16": BF16, "4-bit, DoRA": DORA, "float": FLOAT, "float, DoRA": FLOAT | DORA}
variants = pytest.mark.parametrize("variant", VARIANTS)
PARTS = ("vision_model", "modality_projection", "perceiver_resampler", "text_model", "lm_head")


# ------------------------------------------------------------------------------------------------- what the tests use
def command(folder, out, **settings):
    """The flags of a short run on the CPU: of the model and the rows in `folder`, into `out`."""
    own = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "train.json",
        "image_folder": folder / "images",
    }
    settings = {**own, "eval_dataset_name": folder / "held_out.json", "output_dir": out, **SHORT, **settings}
    return ["--use_cpu", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def run(argv, train=True):
    """main(argv) -> its trainer, flags, printed text, weights and the answers it was trained on, batch by batch; without
    `train` it ends before training begins."""
    trainers, weights, text, drawn, recipe = [], Weights(), io.StringIO(), [], idefics2_docvqa.Trainer
    stock_train, stock_step = recipe.train, recipe.training_step

    def spy(self, *args, **kwargs):
        trainers.append(self)
        if not train:
            raise KeyboardInterrupt
        self.add_callback(weights)
        return stock_train(self, *args, **kwargs)

    def step(self, model, inputs, *args, **kwargs):
        decode = self.processing_class.tokenizer.decode
        drawn.append(
            [decode(labels[labels != -100]).removesuffix("<end_of_utterance>").strip() for labels in inputs["labels"]]
        )
        return stock_step(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        patch.setattr(recipe, "train", spy)
        patch.setattr(recipe, "training_step", step)
        with contextlib.nullcontext() if train else pytest.raises(SystemExit):
            idefics2_docvqa.main(argv)
    out = Path(argv[argv.index("--output_dir") + 1])
    return SimpleNamespace(
        argv=argv,
        out=out,
        trainer=trainers[0] if trainers else None,
        text=text.getvalue(),
        weights=weights.seen,
        drawn=drawn,
    )


def plain(name):
    """A parameter's name without what PEFT adds to it."""
    return re.sub(r"^base_model\.model\.|\.base_layer\b", "", name)


def adapted(model):
    """The modules that have an adapter, by their name in the base model."""
    return {plain(name.removesuffix(".lora_A")) for name, _ in model.named_modules() if name.endswith(".lora_A")}


def stir(model):
    """With B = 0, as it starts, there is no gradient of A: give B random values, always the same ones."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model


def sections(out):
    """samples.md -> {step: (its ANLS, [[page, question, answered, accepted, ANLS] of a row])}."""
    parts = re.split(r"^## Step (\d+): ANLS ([\d.]+)$", (out / "samples.md").read_text(encoding="utf-8"), flags=re.M)[
        1:
    ]
    cut = lambda text: [
        [c.strip() for c in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    tables = {int(step): (float(mean), cut(text)) for step, mean, text in zip(*[iter(parts)] * 3)}
    assert all(rows[0] == ["page", "question", "answered", "accepted", "ANLS"] for _, rows in tables.values())
    return {step: (mean, rows[1:]) for step, (mean, rows) in tables.items()}


def answers(n):
    """The accepted answers of row `n`: of several lengths, and no two rows have one in common."""
    return [f"{n}", f"it is {n}", f"Room {n} on the form of Oslo"]


@pytest.fixture(scope="module")
def several(learnt, tmp_path_factory):
    """A folder as `learnt` is: 14 rows with three accepted answers each, 5 held out, of which the first three are among those
    that learnt/run knows. model/ is learnt's."""
    out = tmp_path_factory.mktemp("several")
    for name in ("model", "images"):
        shutil.copytree(learnt / name, out / name)
    rows = json.loads((learnt / "held_out.json").read_text())
    train = [{**row, "answers": answers(n)} for n, row in enumerate(rows[:14])]
    (out / "train.json").write_text(json.dumps(train))
    (out / "held_out.json").write_text(json.dumps(rows[:3] + rows[-2:]))
    return out


@pytest.fixture(scope="module")
def trained(several, tmp_path_factory):
    """A function: settings as keywords -> a finished short run; each is run once."""
    return functools.cache(
        lambda **settings: run(command(several, tmp_path_factory.mktemp("run") / "out", **settings))
    )


@pytest.fixture(scope="module")
def wise(several, learnt, tmp_path_factory):
    """The rows of `several`, and as model/ what learnt/run knows, merged into its base."""
    out = tmp_path_factory.mktemp("wise")
    shutil.copytree(several, out, dirs_exist_ok=True)
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(learnt / "model"), learnt / "run")
    model.merge_and_unload().save_pretrained(out / "model")
    return out


# ----------------------------------------------------------------------------------------------- at its real size
@pytest.fixture(scope="module")
def real():
    """Idefics2-8b without its weights, as a function: with an adapter where settings are given."""
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
    config = transformers.Idefics2Config(
        text_config=text,
        vision_config=vision,
        perceiver_config=perceiver,
        image_token_id=32001,
        tie_word_embeddings=False,
    )

    def make(settings=None):
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config).requires_grad_(False)
            return model if settings is None else get_peft_model(model, idefics2_docvqa.lora_config(settings))

    return make


def test_the_8b_has_the_published_size_and_adapter(real):
    """The post's counts and, by its own expression, the post's modules."""
    base = real()
    assert base.num_parameters() == 8_402_768_112
    model = real(idefics2_docvqa.parse(["--use_cpu"])[0])
    assert model.get_nb_trainable_parameters() == (7_589_912, 8_410_358_024)
    post = r".*(text_model|modality_projection|perceiver_resampler).*(k_proj|q_proj|v_proj|o_proj).*|lm_head$"
    assert adapted(model) == {name for name, _ in base.named_modules() if re.fullmatch(post, name)}
    assert len(adapted(model)) == 141 == 32 * 4 + 3 * 4 + 1
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_the_8b_with_dora_has_a_magnitude_for_each_output(real):
    model = real(idefics2_docvqa.parse(["--use_cpu", "--use_dora"])[0])
    outputs = 32 * (4096 + 2 * 1024 + 4096) + 3 * (1536 + 2 * 384 + 4096) + 32003
    assert model.get_nb_trainable_parameters()[0] == 7_589_912 + outputs


# ------------------------------------------------------------------------------------------------------- load_model
def loaded(folder, out, dtype=torch.float32, **settings):
    """load_model as on a GPU that has bf16, on one that has not, or as on a CPU."""
    settings, training = idefics2_docvqa.parse(command(folder, out, **settings))
    training.bf16, training.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    return idefics2_docvqa.load_model(settings, training), settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_4bit_is_language_model_and_connector_and_nothing_else(several, tmp_path, dtype):
    (some, settings), (none, _) = (loaded(several, tmp_path, dtype, load_in_4bit=on) for on in (True, False))
    packed, whole = (
        {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)} for model in (some, none)
    )
    linear = {n for n, m in none.named_modules() if isinstance(m, torch.nn.Linear)}
    outside = {n for n in linear if n.startswith("model.vision_model.")} | {"lm_head"}
    assert set(packed) == linear - outside and len(packed) > 7 and len(outside) > 1 and not whole
    assert {n.split(".")[1] for n in packed} == {"text_model", "connector"}
    for module in packed.values():
        state = module.weight.quant_state
        assert (state.quant_type, state.nested, module.compute_dtype) == ("nf4", True, dtype)
    for model in (some, none):
        assert {p.dtype for n, p in model.named_parameters() if n.removesuffix(".weight") not in packed} == {dtype}
        assert not any(p.requires_grad for p in model.parameters())
        model = get_peft_model(model, idefics2_docvqa.lora_config(settings))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert adapted(model) == {
            n for n in linear if n.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))
        } - outside | {"lm_head"}


@pytest.mark.parametrize("dora", [False, True])
def test_the_adapter_starts_gaussian_and_without_effect(several, tmp_path, dora):
    base, settings = loaded(
        several, tmp_path, load_in_4bit=False, use_dora=dora, lora_r=16, lora_alpha=4, lora_dropout=0.25
    )
    columns = {n: m.weight.norm(dim=1) for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    torch.manual_seed(0)
    model = get_peft_model(base, idefics2_docvqa.lora_config(settings))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (16, 4, 0.25, dora)
    a = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_A" in n]) * 16
    assert abs(a.mean()) < 0.05 and a.std() == pytest.approx(1, abs=0.05)  # 1 / r
    assert (a**4).mean() == pytest.approx(3, abs=0.3)  # of a uniform distribution 1.8
    assert all(p.abs().max() == 0 for n, p in model.named_parameters() if "lora_B" in n)
    magnitudes = {plain(n.split(".lora_mag")[0]): p for n, p in model.named_parameters() if "magnitude" in n}
    assert set(magnitudes) == (adapted(model) if dora else set())
    for name, magnitude in magnitudes.items():
        torch.testing.assert_close(magnitude.detach(), columns[name].detach())


@pytest.mark.parametrize("four_bits", [True, False])
def test_fp16_as_on_a_t4(several, tmp_path, form_collate, four_bits):
    """No bf16: 16-bit weights beneath adapters in float32, which is what a loss scaler can work with."""
    base, settings = loaded(several, tmp_path, torch.float16, load_in_4bit=four_bits, lora_dropout=0)
    model = stir(get_peft_model(base, idefics2_docvqa.lora_config(settings)).train())
    collator = form_collate(image_folder=several / "images")
    batch = collator(idefics2_docvqa.read_rows(str(several / "train.json"), "train", settings).select(range(2)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, scaler = torch.optim.SGD(trained, 0.1), torch.amp.GradScaler("cpu", init_scale=256.0)
    before = [p.detach().clone() for p in trained]

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            scaler.scale(model(**batch).loss).backward()
        scaler.unscale_(optimizer)

    step()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in trained)
    scaler.step(optimizer)
    assert not any(torch.equal(old, p) for old, p in zip(before, trained))
    scaler.update()
    for p in trained:  # what a recipe does that casts adapters to the base's type
        p.grad, p.data = None, p.data.half()
    with pytest.raises(ValueError, match="unscale"):
        step()


# ----------------------------------------------------------------------------------------- what is trained, what not
@variants
def test_only_adapters_are_trained(trained, variant):
    done = trained(**VARIANTS[variant])
    base = idefics2_docvqa.load_model(
        *idefics2_docvqa.parse(done.argv)
    ).state_dict()  # of 4-bit weights also their scales
    now = {plain(n): v for n, v in done.trainer.model.state_dict().items() if "lora_" not in n}
    assert now.keys() == base.keys() and all(torch.equal(now[name], base[name]) for name in base)
    first, last = done.weights[0], done.weights[-1]
    assert all("lora_" in name for name in first) and any("magnitude" in name for name in first) == ("DoRA" in variant)
    assert {p.dtype for p in last.values()} == {torch.float32}
    assert [name for name in first if torch.equal(first[name], last[name])] == []


@variants
def test_says_what_is_trained(trained, variant, several):
    done, base = trained(**VARIANTS[variant]), AutoModelForImageTextToText.from_pretrained(several / "model")
    linear = {n: m.weight.numel() for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    for name in PARTS:
        said = re.search(rf"^{name} +([\d,]+) of +([\d,]+) parameters trained, +([\d,]+) in 4-bit", done.text, re.M)
        adapter, total, packed = (int(number.replace(",", "")) for number in said.groups())
        assert adapter == sum(p.numel() for n, p in done.weights[0].items() if name in n)
        assert total == adapter + sum(p.numel() for n, p in base.named_parameters() if name in n)
        inside = name not in ("vision_model", "lm_head") and "4-bit" in variant
        assert packed == sum(count for n, count in linear.items() if name in n) * inside
    assert all(words in done.text for words in ("14 rows to train on, 5 to evaluate", "0.57 epochs", "from the start"))


# ------------------------------------------------------------------------------------------- only what is needed
class Watch(TrainerCallback):
    """Of one training step: gradients, rows of logits, how often a layer of the vision tower ran, whether it left a graph."""

    def __init__(self, model):
        base, self.rows, self.layers, self.graphs, self.gradients = model.get_base_model(), [], 0, [], {}
        base.lm_head.register_forward_hook(lambda module, args, out: self.rows.append(out.numel() // out.shape[-1]))
        base.model.vision_model.register_forward_hook(
            lambda module, args, out: self.graphs.append(out[0].requires_grad)
        )
        base.model.vision_model.encoder.layers[0].self_attn.register_forward_pre_hook(
            self.count
        )  # the layer itself calls once

    def count(self, module, args):
        self.layers += 1

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_stock_trainers_step_for_less(several, tmp_path, checkpointing, capsys):
    """One step of 2 x 3 rows with answers of very different lengths, by this recipe and by transformers.Trainer itself."""
    flags = command(
        several,
        tmp_path,
        **FLOAT,
        lora_dropout=0,
        max_steps=1,
        eval_strategy="no",
        gradient_accumulation_steps=2,
        per_device_train_batch_size=3,
        activation_checkpointing=checkpointing,
        max_grad_norm=1e9,
    )
    ours = run(flags, train=False).trainer
    settings, training = idefics2_docvqa.parse(flags)
    stock = get_peft_model(idefics2_docvqa.load_model(settings, training), idefics2_docvqa.lora_config(settings))
    stock = transformers.Trainer(stock, training, ours.data_collator, ours.train_dataset)
    stock._get_train_sampler = ours._get_train_sampler  # the same batches
    results = []
    for trainer in (ours, stock):
        watch = Watch(stir(trainer.model))
        trainer.add_callback(watch)
        with FlopCounterMode(display=False) as flops:
            trainer.train()
        results.append((trainer.state.log_history[0]["loss"], watch, flops.get_total_flops()))
    (loss, mine, flops), (right, theirs, all_flops) = results
    assert mine.gradients.keys() == theirs.gradients.keys() and all(
        g.abs().max() > 0 for g in theirs.gradients.values()
    )
    apart = max((mine.gradients[name] - grad).norm() / grad.norm() for name, grad in theirs.gradients.items())
    with capsys.disabled():
        print(f"\n  checkpointing {checkpointing}: loss {loss:.6f}, apart {abs(loss - right):.1e}; gradients apart {apart:.1e} of their "
              f"size; FLOPs {all_flops / flops:.2f} x less; rows of logits {mine.rows} instead of {theirs.rows}")  # fmt: skip
    assert abs(loss - right) < 1e-5 and apart < 1e-5 and flops < (0.85 if checkpointing else 0.95) * all_flops

    labels = [int((batch["labels"] != -100).sum()) for batch in ours.get_train_dataloader()]
    assert mine.rows == labels[:2] and len(set(labels[:2])) == 2  # with as many labels the mean of means would do
    lengths = [batch["labels"].numel() for batch in ours.get_train_dataloader()]
    assert theirs.rows == lengths[:2]
    assert (mine.layers, mine.graphs) == (2, [False, False])  # nothing is computed again on the way back
    assert (theirs.layers, theirs.graphs) == ((4, [True, True]) if checkpointing else (2, [False, False]))


@pytest.mark.parametrize("names, expected", [
    (["q_proj", "mlp.down_proj"], r"model\.text_model\.layers\.\d\.(self_attn\.q_proj|mlp\.down_proj)"),
    ([r"model\.connector\..*\.k_proj|lm_head"], r"model\.connector\..*\.k_proj|lm_head")])  # fmt: skip
def test_the_layers_to_adapt_can_be_named(several, tmp_path, names, expected):
    """Names within the language model, or one regex of full paths."""
    argv = [*command(several, tmp_path, **FLOAT), "--lora_target_modules", *names]
    model = run(argv, train=False).trainer.model
    assert (
        adapted(model)
        == {name for name, _ in model.get_base_model().named_modules() if re.fullmatch(expected, name)}
        != set()
    )


@pytest.mark.parametrize("names, message", [
    (["q_proj", "qq_proj"], "--lora_target_modules qq_proj: no such linear layer"),
    (["model[.]nothing"], r"--lora_target_modules model\[.\]nothing: no such linear layer"),
    (["*"], "not a valid regular expression"),
    ([".*q_proj"], r"--lora_target_modules: \['model.vision_model.*q_proj'\] is in vision_model, which runs without a graph")])  # fmt: skip
def test_layers_that_cannot_be_adapted_are_refused(several, tmp_path, monkeypatch, names, message):
    monkeypatch.setattr(idefics2_docvqa, "load_model", None)
    assert re.search(
        message, refusal(idefics2_docvqa.main, [*command(several, tmp_path), "--lora_target_modules", *names])
    )


@pytest.mark.parametrize("variant", ["float", "float, DoRA"])
def test_the_trained_model_can_be_merged_in_the_same_process(several, tmp_path, variant):
    """The vision tower has its own forward back, and merged the model says what the adapter says."""
    trainer = run(command(several, tmp_path, **VARIANTS[variant])).trainer
    tower = trainer.model.get_base_model().model.vision_model
    assert not any("forward" in vars(module) for module in (tower, trainer.model.get_output_embeddings()))
    batch = trainer.data_collator([trainer.eval_dataset[n] for n in range(4)])
    inputs, words = {name: value for name, value in batch.items() if name != "labels"}, batch["attention_mask"].bool()
    with torch.no_grad():
        adapted = trainer.model.eval()(**inputs).logits
        with trainer.model.disable_adapter():
            assert (trainer.model(**inputs).logits - adapted)[words].abs().max() > 0.01
        merged = trainer.model.merge_and_unload()(**inputs).logits
    assert merged.shape[:2] == batch["input_ids"].shape  # all positions: nothing picks some of them any more
    torch.testing.assert_close(merged[words], adapted[words], atol=1e-4, rtol=1e-4)


def test_an_evaluation_leaves_the_gradients_alone(several, tmp_path, trained):
    """On a CPU with AVX512-BF16 the first forward in eval mode would put 4-bit weights into a kernel without autograd."""
    trainer = run(command(several, tmp_path, lora_dropout=0), train=False).trainer
    stir(trainer.model)
    batch, gradients = trainer.data_collator([trainer.train_dataset[n] for n in range(4)]), []
    for _ in range(2):
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model.train(), dict(batch)).backward()
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad})
        assert math.isfinite(trainer.evaluate()["eval_anls"])
    before, after = gradients
    assert all(grad is not None and grad.abs().max() > 0 for grad in before.values())
    assert [name for name in before if after[name] is None or not torch.equal(before[name], after[name])] == []

    done = trained()  # and so it is in a run with an evaluation after its second step
    assert min(log(done.out, "grad_norm").values()) > 0 and 2 in log(done.out, "eval_loss")
    for name in done.weights[0]:
        assert not torch.equal(done.weights[2][name], done.weights[3][name]), name


# --------------------------------------------------------------------------------------------------- answers by heart
def test_it_learns(learnt):
    """From nothing: after 70 steps it says the answers to the 16 forms that it was trained on, and no others."""
    scores, losses = log(learnt / "run", "eval_anls"), log(learnt / "run")
    assert scores[10] < 0.3 and max(scores.values()) > 0.75 and losses[70] < 0.1 * losses[10]
    best = json.loads((learnt / "run" / "trainer_state.json").read_text())["best_global_step"]
    assert scores[best] == max(scores.values())
    trained_on = {f"![](samples/{n}-0.png)" for n in range(16)}
    right = [row[2] in row[3].split(" / ") for row in sections(learnt / "run")[best][1] if row[0] in trained_on]
    assert len(right) == 16 and sum(right) >= 15


def test_scores_are_those_of_the_answers(learnt, tmp_path, capsys):
    """Logged beside eval_loss at each evaluation, and what evals/docvqa.py says of tools/generate.py's answers."""
    out = learnt / "run"
    scores, exact, shown = log(out, "eval_anls"), log(out, "eval_exact_match"), sections(out)
    assert list(scores) == list(exact) == list(log(out, "eval_loss")) == list(shown) == list(range(10, 80, 10))
    for step, (mean, rows) in shown.items():
        single = [docvqa.anls(answered, accepted.split(" / ")) for _, _, answered, accepted, _ in rows]
        assert sum(single) / 19 == pytest.approx(scores[step], abs=0.01) and mean == pytest.approx(
            scores[step], abs=6e-4
        )
        assert [float(row[4]) for row in rows] == pytest.approx(single, abs=0.01)
    assert any(0 < scores[step] < 1 and exact[step] != scores[step] for step in scores)

    best = json.loads((out / "trainer_state.json").read_text())["best_global_step"]
    generate.main([str(out), "--output", str(tmp_path / "a.jsonl"), "--max_new_tokens", "8"])
    rows = docvqa.score(tmp_path / "a.jsonl")
    assert (
        sum(row["anls"] for row in rows) / 19 == scores[best]
        and sum(row["exact_match"] for row in rows) / 19 == exact[best]
    )
    generated = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [" ".join(line["prediction"].split()) for line in generated] == [row[2] for row in shown[best][1]]
    assert [line["reference"] for line in generated] == [row[3].split(" / ") for row in shown[best][1]]


def test_samples_show_page_question_answer(learnt):
    """The same rows each time, in the same order, with the right picture."""
    out, given = learnt / "run", {row["id"]: row for row in json.loads((learnt / "held_out.json").read_text())}
    tables = [
        [(page, question, accepted) for page, question, _, accepted, _ in rows] for _, rows in sections(out).values()
    ]
    assert len(tables[0]) == 19 and all(table == tables[0] for table in tables)
    numbered = list(given.values())
    for page, question, accepted in tables[0]:
        n = int(re.fullmatch(r"!\[\]\(samples/(\d+)-0\.png\)", page)[1])
        right = numbered[n]
        assert question == right["question"] and accepted == " / ".join(right["answers"])
        shown, page = (
            Image.open(path).convert("L") for path in (out / f"samples/{n}-0.png", learnt / "images" / right["image"])
        )
        assert shown.size == (336, 168)
        drawn = torch.tensor(list(shown.resize(page.size, Image.Resampling.BOX).tobytes())).float()
        apart = [(drawn - torch.tensor(list(Image.open(learnt / "images" / row["image"]).convert("L").tobytes()))).norm()
                 for row in numbered]  # fmt: skip
        assert min(range(19), key=apart.__getitem__) == n


def test_what_is_shown_can_be_bounded(several, tmp_path):
    done = run(command(several, tmp_path / "a", sample_rows=1, max_eval_rows=3, report_to="none"))
    assert len(done.trainer.eval_dataset) == 3 and all(len(rows) == 1 for _, rows in sections(done.out).values())
    done = run(command(several, tmp_path / "b", sample_rows=0, report_to="none"))
    assert (
        log(done.out, "eval_anls") and not list(done.out.glob("samples*")) and not list(done.out.glob("**/*tfevents*"))
    )


def test_a_pipe_or_a_line_end_keeps_the_table_whole(several, tmp_path, monkeypatch):
    trainer = run(command(several, tmp_path), train=False).trainer
    monkeypatch.setattr(
        idefics2_docvqa,
        "answer_rows",
        lambda trainer, rows, most: [idefics2_docvqa.Answer("a | b\nc", 3, True)] * len(rows),
    )
    trainer.evaluate()
    assert [row[2] for row in sections(tmp_path)[0][1]] == ["a &#124; b c"] * 2


def test_scores_and_loss_are_of_the_rows_that_are_evaluated(several, tmp_path, monkeypatch):
    """Also of rows that are given to evaluate(), instead of those that were held out."""
    trainer = run(command(several, tmp_path, sample_rows=9), train=False).trainer
    others = trainer.eval_dataset.select([3, 1])
    answered, stock = [], idefics2_docvqa.answer_rows
    monkeypatch.setattr(
        idefics2_docvqa,
        "answer_rows",
        lambda trainer, rows, most: [answered.append(rows["row"]), stock(trainer, rows, most)][1],
    )
    loss = trainer.evaluate(others)["eval_loss"]
    assert [list(rows) for rows in answered] == [list(others["row"])] and loss != trainer.evaluate()["eval_loss"]
    table = sections(tmp_path)[0][1]  # of the two evaluations, both at step 0, the second
    assert [row[0] for row in table] == [f"![](samples/{n}-0.png)" for n in trainer.eval_dataset["row"]]


# --------------------------------------------------------------------------------------------------------- evaluation
FAKED = {
    "eval_anls": [0.2, 0.9, 0.9, 0.1],
    "eval_exact_match": [0.1, 0.2, 0.6, 0.5],
    "eval_loss": [1.0, 3.0, 2.0, 4.0],
}


@pytest.mark.parametrize("metric, best", [(None, 2), ("exact_match", 3), ("eval_loss", 1), ("loss", 1)])
def test_the_best_checkpoint_is_saved(several, tmp_path, monkeypatch, metric, best):
    """By ANLS unless another is named; of equal ones the first."""

    def faked(self, *args, stock=idefics2_docvqa.Trainer.evaluation_loop, **kwargs):
        output = stock(self, *args, **kwargs)
        assert output.metrics.keys() >= FAKED.keys()
        output.metrics.update({name: values[self.state.global_step - 1] for name, values in FAKED.items()})
        return output

    monkeypatch.setattr(idefics2_docvqa.Trainer, "evaluation_loop", faked)
    chosen = {} if metric is None else {"metric_for_best_model": metric}
    done = run(command(several, tmp_path, **chosen, eval_steps=1, save_steps=1, report_to="none"))
    assert {name: list(log(tmp_path, name).values()) for name in FAKED} == FAKED
    assert re.search(rf"best .*: [\d.]+, at step {best}; that is saved", done.text)
    saved, kept = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / f"checkpoint-{best}")
    )
    assert saved.keys() == kept.keys() and all(torch.equal(saved[key], kept[key]) for key in saved)
    for name, value in done.weights[best].items():
        assert torch.equal(saved[name.replace(".default", "")], value) and not torch.equal(
            value, done.weights[4][name]
        )
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-4"}


@pytest.mark.parametrize("without", [{"eval_strategy": "no"}, {"eval_fraction": 0, "eval_dataset_name": None}])
def test_without_evaluation(several, tmp_path, without):
    argv = command(several, tmp_path, report_to="none", **without)
    if "eval_fraction" in without:
        place = argv.index("--eval_dataset_name")
        del argv[place : place + 2]
    done = run(argv)
    assert list(log(done.out)) == [1, 2, 3, 4] and not log(done.out, "eval_loss") and not log(done.out, "eval_anls")
    assert not (done.out / "samples.md").exists() and "14 rows to train on, 0 to evaluate" in done.text
    saved, last = (load_file(folder / "adapter_model.safetensors") for folder in (done.out, done.out / "checkpoint-4"))
    assert saved.keys() == last.keys() and all(torch.equal(saved[key], last[key]) for key in saved)


def test_a_run_shorter_than_eval_steps_is_evaluated(several, tmp_path):
    run(command(several, tmp_path, max_steps=1, eval_steps=100, save_steps=100, report_to="none"))
    assert list(log(tmp_path)) == [1] == list(log(tmp_path, "eval_anls")) == list(sections(tmp_path))


# ------------------------------------------------------------------------------------------------------ what is saved
def test_output_dir_holds_everything(trained, several):
    done = trained(longest_edge=84)
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "settings.yaml",
        "samples.md",
        "trainer_state.json",
    ):
        assert (done.out / name).stat().st_size > 0
    assert {path.name for path in done.out.glob("checkpoint-*")} <= {"checkpoint-2", "checkpoint-4"}
    assert list(done.out.glob("runs/*/events.out.tfevents.*")) and not list(done.out.glob("**/model*.safetensors"))

    processor, base = (AutoProcessor.from_pretrained(folder) for folder in (done.out, several / "model"))
    assert type(processor) is type(base) and processor.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert processor.chat_template == base.chat_template
    own, given = processor.image_processor.to_dict(), base.image_processor.to_dict()
    assert own["size"] == {**given["size"], "longest_edge": 84} and not own["do_image_splitting"]
    assert {k: v for k, v in own.items() if k not in ("size", "do_image_splitting")} == {
        k: v for k, v in given.items() if k not in ("size", "do_image_splitting")}  # fmt: skip

    first, *lines = (done.out / "settings.yaml").read_text().splitlines()
    written = yaml.safe_load("\n".join(lines))
    assert (
        first == "# idefics2_docvqa.py"
        and {name: written[name] for name in SHORT} == SHORT
        and "hub_token" not in written
    )
    assert (written["lora_r"], written["load_in_4bit"], written["model_name_or_path"]) == (
        8,
        True,
        str(several / "model"),
    )
    assert list(log(done.out)) == [1, 2, 3, 4] and list(log(done.out, "eval_anls")) == [2, 4]
    for name in ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_anls", "eval_exact_match"):
        assert all(map(math.isfinite, log(done.out, name).values())) and log(done.out, name)


@variants
def test_the_adapter_is_all_that_is_saved(trained, variant):
    """And not the frozen lm_head beneath one of them, neither at the end nor in a checkpoint."""
    done = trained(**VARIANTS[variant])
    best = done.weights[done.trainer.state.best_global_step]
    want = {re.sub(r"(?<=magnitude_vector)\.default\.weight$|\.default", "", name): p for name, p in best.items()}
    for folder in (done.out, *done.out.glob("checkpoint-*")):
        saved = load_file(folder / "adapter_model.safetensors")
        assert saved.keys() == want.keys() and {value.dtype for value in saved.values()} == {torch.float32}
        size = sum(4 * p.numel() for p in best.values())
        assert size < (folder / "adapter_model.safetensors").stat().st_size < size + 20_000
    saved = load_file(done.out / "adapter_model.safetensors")
    assert [name for name in want if not torch.equal(saved[name], want[name])] == []


def test_settings_yaml_repeats_the_run(trained, tmp_path):
    first = trained()
    again = run(["--config", str(first.out / "settings.yaml"), "--output_dir", str(tmp_path / "again")])
    for key in ("loss", "grad_norm", "eval_loss", "eval_anls"):
        assert log(again.out, key) == log(first.out, key)
    assert (
        again.drawn == first.drawn and (again.out / "samples.md").read_text() == (first.out / "samples.md").read_text()
    )


RELOAD = """
import sys, torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
work, results = torch.load(sys.argv[1], weights_only=False), {}
for variant, (out, base, argv, asked) in work.items():
    processor = AutoProcessor.from_pretrained(out)
    conversations = [[{"role": "user", "content": [{"type": "text", "text": "Answer briefly."},
                     {"type": "image", "image": Image.open(page).convert("RGB")}, {"type": "text", "text": question}]}]
                     for page, question in asked]
    batch = processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=True, return_dict=True,
                                          return_tensors="pt", processor_kwargs={"padding": True})
    def logits(model):
        with torch.no_grad():
            return model.eval()(**batch).logits
    result = results[variant] = dict(batch)
    if "4-bit" in variant:
        import idefics2_docvqa
        model = PeftModel.from_pretrained(idefics2_docvqa.load_model(*idefics2_docvqa.parse(argv)), out)
    else:
        model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), out)
    result["reloaded"] = logits(model)
    ids = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1]:]
    result["said"] = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), out)
    result["float"] = logits(model)
    result["merged"] = logits(model.merge_and_unload())
torch.save(results, sys.argv[2])
"""
RELOADED = ["4-bit", "4-bit, DoRA", "float", "float, DoRA"]


@pytest.fixture(scope="module")
def reloaded(trained, learnt, several, tmp_path_factory):
    """{variant: what a new process gets out of the saved folder on prompts about the rows held out}."""
    folder, work = tmp_path_factory.mktemp("reloaded"), {}
    for name in [*RELOADED, "learnt"]:
        done, data = (None, learnt) if name == "learnt" else (trained(**VARIANTS[name]), several)
        rows = json.loads((data / "held_out.json").read_text())
        asked = [(data / "images" / row["image"], row["question"]) for row in rows]
        work[name] = str(done.out if done else learnt / "run"), str(data / "model"), done and done.argv, asked
    torch.save(work, folder / "work.pt")
    fresh(RELOAD, folder / "work.pt", folder / "results.pt")
    return torch.load(folder / "results.pt")


def by_number(dataset):
    """A shuffled data set's rows in the order of the file."""
    return sorted(dataset, key=lambda row: row["row"])


@pytest.mark.parametrize("variant", RELOADED)
def test_the_result_stands_alone(trained, reloaded, variant):
    done, result = trained(**VARIANTS[variant]), reloaded[variant]
    collator, model = done.trainer.data_collator, done.trainer.model.eval()
    batch = collator.tokenize(
        [collator.messages_of(row)[:1] for row in by_number(done.trainer.eval_dataset)], prompt=True
    )
    for name in ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"):
        assert torch.equal(result[name], batch[name])
    words = batch["attention_mask"].bool()
    with torch.no_grad():
        here = model(**batch).logits
        said = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, words.shape[1] :]
        with model.disable_adapter():
            assert (model(**batch).logits - here)[words].abs().max() > 0.01
    torch.testing.assert_close(result["reloaded"][words], here[words], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(result["merged"][words], result["float"][words], atol=1e-4, rtol=1e-4)
    assert result["said"] == [text.strip() for text in collator.processor.batch_decode(said, skip_special_tokens=True)]


def test_the_answers_stand_alone(learnt, reloaded):
    """What the run said of its rows, a new process says as well: plain PEFT, no recipe."""
    best = json.loads((learnt / "run" / "trainer_state.json").read_text())["best_global_step"]
    shown = {int(re.search(r"\d+", row[0])[0]): row[2] for row in sections(learnt / "run")[best][1]}
    assert [" ".join(said.split()) for said in reloaded["learnt"]["said"]] == [shown[n] for n in range(19)]


# -------------------------------------------------------------------------------------------------- resume, and draws
KILL = """
import os, signal, sys
import torch, transformers, idefics2_docvqa
torch.set_num_threads(1)
class Kill(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
train = transformers.Trainer.train
def doomed(self, *args, **kwargs):
    self.add_callback(Kill())
    return train(self, *args, **kwargs)
idefics2_docvqa.Trainer.train = doomed
idefics2_docvqa.main(sys.argv[1:])
"""
# 14 rows, 2 x 2 rows a step: the fifth step begins the second epoch; the run is killed in mid-epoch, the last checkpoint is of 6
LONG = {
    "max_steps": 12,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.1,
    "report_to": "none",
    "save_total_limit": 9,
}
WORKERS = {"dataloader_num_workers": 2}


@pytest.fixture(scope="module")
def whole(several, tmp_path_factory):
    """A function: settings as keywords -> a run of 12 steps that nothing interrupted."""
    return functools.cache(
        lambda **settings: run(command(several, tmp_path_factory.mktemp("whole") / "out", **LONG | settings))
    )


@pytest.fixture(scope="module")
def dead(several, tmp_path_factory):
    """A function: settings as keywords -> the folder of the same run, killed in its 7th step. Tests work on copies of it."""

    @functools.cache
    def make(**settings):
        out = tmp_path_factory.mktemp("killed") / "out"
        argv = command(several, out, **LONG | settings)
        done = subprocess.run([sys.executable, "-c", KILL, *argv], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        assert {path.name for path in out.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (2, 4, 6)}
        assert not (out / "trainer_state.json").exists()
        return out

    return make


@pytest.fixture
def killed(dead, tmp_path):
    return Path(shutil.copytree(dead(), tmp_path / "out"))


def same_end(whole, resumed, after):
    """From step `after` on, all is the same to the last bit: what was logged, drawn, trained and saved."""
    for key in ("loss", "grad_norm", "eval_loss", "eval_anls"):
        want, got = ({s: v for s, v in log(run.out, key).items() if s > after} for run in (whole, resumed))
        assert want == got and 12 in got
    assert resumed.drawn and resumed.drawn == whole.drawn[-len(resumed.drawn) :]
    assert len(resumed.weights) == 1 + 12 - after  # weights[0] of the resumed run is the checkpoint's
    for step in range(13 - after):
        for name, value in whole.weights[after + step].items():
            assert torch.equal(value, resumed.weights[step][name])
    saved = [load_file(out / "adapter_model.safetensors") for out in (whole.out, resumed.out)]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [({}, {}), (WORKERS, WORKERS), ({}, WORKERS)], ids=["0", "2", "0, then 2"])
def test_killed_and_started_again(whole, dead, several, tmp_path, before, after):
    """With the same command, to the same losses, whatever the number of loader processes; a newest checkpoint that was cut
    off half-way is passed over."""
    out = Path(shutil.copytree(dead(**before), tmp_path / "out"))
    half = Path(shutil.copytree(out / "checkpoint-6", out / "checkpoint-7"))
    (half / "trainer_state.json").unlink()
    (half / "optimizer.pt").write_bytes(b"")
    resumed = run(command(several, out, **LONG | after))
    assert f"resuming from {out / 'checkpoint-6'}\n" in resumed.text
    same_end(whole(), resumed, 6)
    assert (out / "samples.md").read_text() == (whole().out / "samples.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 8, 10])
def test_a_path_names_the_checkpoint(whole, several, tmp_path, step):
    """At the end of an epoch or within one."""
    checkpoint = whole().out / f"checkpoint-{step}"
    resumed = run(command(several, tmp_path / "other", **LONG, resume_from_checkpoint=checkpoint))
    assert f"resuming from {checkpoint}\n" in resumed.text
    same_end(whole(), resumed, step)


@pytest.mark.parametrize("settings", [DORA, FLOAT], ids=["4-bit, DoRA", "float"])
def test_resumes_whatever_was_trained(whole, several, tmp_path, settings):
    done = whole(**settings)
    same_end(
        done, run(command(several, tmp_path, **LONG, **settings, resume_from_checkpoint=done.out / "checkpoint-6")), 6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "adapter_model.safetensors", "rng_state.pth"]
)
def test_a_damaged_checkpoint_is_not_whole(whole, tmp_path, file):
    """Missing, empty or cut off: any of its files (the random state's end is not looked at)."""
    good = whole().out / "checkpoint-6"
    assert idefics2_docvqa.is_complete(good)
    for n, keep in enumerate([None, 0, 0.5] if file != "rng_state.pth" else [None]):
        copy = Path(shutil.copytree(good, tmp_path / f"checkpoint-{n}"))
        data = (copy / file).read_bytes()
        (copy / file).unlink() if keep is None else (copy / file).write_bytes(data[: int(keep * len(data))])
        assert not idefics2_docvqa.is_complete(copy), keep


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--resume_from_checkpoint", "false"], ["holds a run", "--output_dir"]),
        (["--resume_from_checkpoint", "nowhere"], ["nowhere: not a complete checkpoint"]),
        (["--lora_r", "4", "--learning_rate", "0.1"], ["lora_r 8 -> 4", "learning_rate 0.001 -> 0.1", "--output_dir"]),
        (["--seed", "1"], ["seed 42 -> 1"]),
        (["--language", "de"], ["language en -> de"]),
        (["--image_splitting", "true"], ["image_splitting False -> True"]),
    ],
)
def test_a_used_output_dir_is_not_overwritten(killed, several, monkeypatch, flags, words):
    monkeypatch.setattr(idefics2_docvqa, "load_data", None)
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    message = refusal(idefics2_docvqa.main, [*command(several, killed, **LONG), *flags])
    assert all(word in message for word in words)
    assert before == {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("text", [None, "", "- 1", "a: b: c"])
def test_a_run_that_does_not_say_which_it_is_is_not_gone_on_from(killed, several, tmp_path, monkeypatch, text):
    monkeypatch.setattr(idefics2_docvqa, "load_data", None)
    out = Path(shutil.copytree(killed, tmp_path / "copy"))
    (out / "settings.yaml").unlink() if text is None else (out / "settings.yaml").write_text(text)
    message = refusal(idefics2_docvqa.main, command(several, out, **LONG))
    assert "without the settings.yaml" in message and "--resume_from_checkpoint CHECKPOINT" in message


@pytest.mark.parametrize("more", [[], ["--sample_rows", "1"]])
def test_a_finished_run_says_so(trained, monkeypatch, capsys, more):
    done = trained()
    for name in ("load_model", "load_data", "load_processor"):
        monkeypatch.setattr(idefics2_docvqa, name, None)
    before = {path: path.stat().st_mtime_ns for path in done.out.rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        idefics2_docvqa.main([*done.argv, *more])
    assert stopped.value.code in (0, None) and "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in done.out.rglob("*")}
    assert "lora_r 8 -> 4" in refusal(idefics2_docvqa.main, [*done.argv, "--lora_r", "4"])
    assert "holds a run" in refusal(idefics2_docvqa.main, [*done.argv, "--resume_from_checkpoint", "false"])


@pytest.mark.slow
@pytest.mark.parametrize("more, best", [({}, True), (DORA, False)])
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
        idefics2_docvqa.main(command(several, out, **settings))
    assert stopped.value.code in (0, None)
    if best:  # one that is gone is named
        (out / "trainer_state.json").unlink()
        state = out / "checkpoint-11" / "trainer_state.json"
        state.write_text(
            json.dumps(json.loads(state.read_text()) | {"best_model_checkpoint": "elsewhere/checkpoint-1"})
        )
        gone = refusal(idefics2_docvqa.main, command(several, out, **settings))
        assert gone.startswith("error: elsewhere/checkpoint-1, the best checkpoint, is missing or damaged")


@pytest.mark.slow
def test_a_longer_run_is_not_finished_by_an_earlier_end(whole, several, tmp_path, monkeypatch):
    """The end of a run is taken back as soon as the run is taken up again with more steps; interrupted by the keyboard, it
    says how to go on."""
    out = Path(shutil.copytree(whole().out, tmp_path / "out"))
    longer = {**LONG, "max_steps": 14, "resume_from_checkpoint": out / "checkpoint-12"}

    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(idefics2_docvqa.Trainer, "training_step", interrupt)
        message = refusal(idefics2_docvqa.main, command(several, out, **longer))
    assert "interrupted" in message and "settings.yaml" in message and str(out) in message
    again = run(command(several, out, **{**longer, "resume_from_checkpoint": "auto"}))
    assert f"resuming from {out / 'checkpoint-12'}" in again.text and max(log(out)) == 14


@pytest.mark.slow
def test_the_answers_drawn_do_not_depend_on_the_workers(whole):
    """Nor anything else; but for dropout, whose dice torch itself rolls otherwise where workers outlive an epoch."""
    same_end(whole(), whole(**WORKERS), 0)
    same_end(whole(lora_dropout=0), whole(**WORKERS, lora_dropout=0, dataloader_persistent_workers=True), 0)
    assert whole().drawn == whole(lora_dropout=0).drawn


@pytest.mark.slow
def test_each_epoch_draws_anew(whole):
    """One of the accepted answers for every row in every epoch; in time all of them; with another seed others."""
    which = {answer: (n, k) for n in range(14) for k, answer in enumerate(answers(n))}
    epochs = []
    for done in (whole(), whole(seed=7)):
        drawn = [which[answer] for batch in done.drawn for answer in batch]
        assert len(drawn) == 3 * 14
        epochs.append([dict(drawn[14 * epoch : 14 * (epoch + 1)]) for epoch in range(3)])
        assert all(set(epoch) == set(range(14)) for epoch in epochs[-1])
        assert {k for epoch in epochs[-1] for k in epoch.values()} == {0, 1, 2}
        assert all(max(epoch.values()) > 0 for epoch in epochs[-1])  # no epoch just takes the first
    (first, second, third), other = epochs
    assert first != second != third != first and other != epochs[0]


# ------------------------------------------------------------------------------------------- what happens under way
@pytest.mark.parametrize("name, workers", [("held_out", 0), ("train", 0), ("train", 2)])
def test_a_page_that_vanishes_ends_the_run_with_one_message(several, tmp_path, monkeypatch, workers, name):
    folder = Path(shutil.copytree(several, tmp_path / "data"))
    row = json.loads((folder / f"{name}.json").read_text())[-1 if name == "held_out" else 5]

    def vanish(*args, load=idefics2_docvqa.load_model):
        (folder / "images" / row["image"]).unlink()
        return load(*args)

    monkeypatch.setattr(idefics2_docvqa, "load_model", vanish)
    flags = {"dataloader_num_workers": workers, "report_to": "none", "max_steps": 7}
    message = refusal(idefics2_docvqa.main, command(folder, tmp_path / "out", **flags))
    assert message.startswith("error: the data changed during the run: unreadable image: ") and row["image"] in message


# ------------------------------------------------------------------------------------------------------ rows of a step
def test_rows_can_be_grouped_by_length(several, tmp_path):
    """The Trainer's own sampler reads the column `length` through the transform that adds the epoch; the longest row comes first."""
    settings = {"max_steps": 7, "eval_strategy": "no", "report_to": "none", **FLOAT}
    done = run(command(several, tmp_path, train_sampling_strategy="group_by_length", **settings))
    which = {answer: n for n in range(14) for answer in answers(n)}
    rows, lengths = (
        [which[answer] for batch in done.drawn for answer in batch],
        list(done.trainer.train_dataset["length"]),
    )
    assert sorted(rows) == list(range(14)) and lengths[rows[0]] == max(lengths) > min(lengths)
    assert len(log(done.out)) == 7 and all(map(math.isfinite, log(done.out).values()))


@pytest.mark.slow
def test_two_processes_train_like_one(wise, tmp_path):
    """Twice the batch, and scores over all 5 rows held out, 3 answered by one and 2 by the other. (eval_loss is left out: the
    Trainer weighs the rows that are evaluated at a time, here one or two, by their labels.)"""
    settings = {
        **FLOAT,
        "lora_dropout": 0,
        "learning_rate": 1e-4,
        "per_device_eval_batch_size": 1,
        "report_to": "none",
    }
    settings |= {
        "per_device_train_batch_size": 1,
        "sample_rows": 5,
        "max_new_tokens": 8,
        "max_steps": 8,
        "save_total_limit": 9,
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = command(wise, tmp_path / "two", **settings, gradient_accumulation_steps=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = [*launch, str(ROOT / "idefics2_docvqa.py"), *argv]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("rows to train on") == done.stdout.count("One row as the model sees it") == 1
    one = run(command(wise, tmp_path / "one", **settings, gradient_accumulation_steps=4))
    for key in ("loss", "grad_norm"):
        assert log(tmp_path / "two", key) == pytest.approx(log(one.out, key), abs=1e-4) and len(log(one.out, key)) == 8
    for key in ("eval_anls", "eval_exact_match"):
        assert log(tmp_path / "two", key) == pytest.approx(log(one.out, key), abs=1e-12)
        assert all(0.2 < value < 1 for value in log(one.out, key).values())
    assert sections(tmp_path / "two") == sections(one.out) and len(sections(one.out)[4][1]) == 5
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    for name in saved[0]:
        torch.testing.assert_close(saved[0][name], saved[1][name], atol=1e-3, rtol=1e-3)
    again = command(
        wise,
        tmp_path / "again",
        **settings,
        gradient_accumulation_steps=2,
        resume_from_checkpoint=tmp_path / "two" / "checkpoint-6",
    )
    done = subprocess.run([*program[: -len(argv)], *again], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    for key in ("loss", "grad_norm"):  # from within the second epoch on, whose order is not the first one's
        assert log(tmp_path / "again", key) == log(tmp_path / "two", key)


def test_pages_in_five_pieces_and_another_language(tiny_forms, tmp_path):
    """The rows of a hub data set: questions by language; image splitting in training and in evaluation."""
    argv = command(
        tiny_forms, tmp_path, dataset_name=tiny_forms / "data", image_splitting=True, language="fr", max_eval_rows=3
    )
    place = argv.index("--eval_dataset_name")
    done = run([*argv[:place], *argv[place + 2 :], "--report_to", "none"])
    assert [log(done.out, key).keys() for key in ("loss", "eval_anls")] == [{1, 2, 3, 4}, {2, 4}]
    assert AutoProcessor.from_pretrained(done.out).image_processor.do_image_splitting
    rows = forms.make_rows(0, train=False, n=24)
    french = {forms.ask(row["asked"], row["phrasing"])["fr"] for row in rows}
    assert all(row[1] in french for _, table in sections(done.out).values() for row in table)
