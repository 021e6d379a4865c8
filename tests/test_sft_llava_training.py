"""sft_llava.py, from the model to what a run leaves behind: what is quantized and trained, the loss, resuming, the result."""

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
from conftest import Weights, fresh, log, refusal
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTTrainer

import sft_llava
from tiny import llava

ROOT = Path(sft_llava.__file__).parent
SHORT = {
    "max_steps": 4,
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2,
    "dataloader_num_workers": 0,
    "max_eval_rows": 4,
    "sample_rows": 2,
    "sample_tokens": 4,
    "learning_rate": 0.001,  # the shipped one hardly moves a model in four steps
}
FLOAT, FULL = {"load_in_4bit": False}, {"load_in_4bit": False, "lora_r": 0}
PROJECTOR, DORA, BF16 = {"train_projector": True}, {"use_dora": True}, {"bf16": True}
VARIANTS = {
    "4-bit": {},
    "4-bit, bf16": BF16,
    "4-bit, projector": PROJECTOR,
    "4-bit, DoRA": DORA,
    "float": FLOAT,
    "float, projector": FLOAT | PROJECTOR,
    "float, DoRA": FLOAT | DORA,
    "full": FULL,
    "full, bf16": FULL | BF16,
    "full, projector": FULL | PROJECTOR,
}
variants = pytest.mark.parametrize("variant", VARIANTS)


# ------------------------------------------------------------------------------------------------------------ helpers
def command(folder, out, **settings):
    """The flags of a short run on the CPU: of the model and the data in `folder`, into `out`."""
    settings = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "data",
        "output_dir": out,
        **SHORT,
        **settings,
    }
    return ["--use_cpu", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


class Stop(Exception):
    pass


def run(argv, train=True):
    """main(argv) -> its trainer, flags, printed text, and weights; without `train` it stops before the first step."""
    trainers, weights, text, stock = [], Weights(), io.StringIO(), SFTTrainer.train

    def spy(self, *args, **kwargs):
        trainers.append(self)
        self.add_callback(weights)
        return stock(self, *args, **kwargs)

    def stop(*args, **kwargs):
        raise Stop

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stop), contextlib.redirect_stdout(text):
        patch.setattr(SFTTrainer, "train", spy)
        if not train:
            patch.setattr(SFTTrainer, "training_step", stop)
        sft_llava.main(argv)
    out = Path(argv[argv.index("--output_dir") + 1])
    return SimpleNamespace(
        argv=argv, out=out, trainer=trainers[0] if trainers else None, text=text.getvalue(), weights=weights.seen
    )


def plain(name):
    """A parameter's name without what PEFT adds to it."""
    return re.sub(r"^base_model\.model\.|\.(base_layer|original_module|modules_to_save\.default)\b", "", name)


def part(name):
    """The part of the model that a parameter belongs to."""
    return next(
        p for p in ("vision_tower", "multi_modal_projector", "language_model", "lm_head", "image_newline") if p in name
    )


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


@pytest.fixture(scope="module")
def mixed(tiny_llava, tmp_path_factory):
    """A folder with the tiny model and 14 rows of all kinds, 4 of them without a picture; 4 rows to evaluate on."""
    out = tmp_path_factory.mktemp("mixed")
    shutil.copytree(tiny_llava / "model", out / "model")
    rows = llava.make_rows(1, train=True, n=300)
    kinds = [[row for row in rows if len(row["pictures"]) == n] for n in range(3)]
    llava.write_data(out, "train", [row for three in zip(*kinds) for row in three][:12] + kinds[1][4:6])
    llava.write_data(out, "test", kinds[1][-2:] + kinds[2][-2:])
    return out


@pytest.fixture(scope="module")
def trained(tiny_llava, tmp_path_factory):
    """A function: settings as keywords -> a finished short run; each is run once."""
    return functools.cache(
        lambda **settings: run(command(tiny_llava, tmp_path_factory.mktemp("run") / "out", **settings))
    )


# ----------------------------------------------------------------------------------------------- at its real size
def real(settings=None):
    """LLaVA-1.5-7B without its weights, and its adapter where settings are given."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=24,
        patch_size=14,
        image_size=336,
        projection_dim=768,
    )
    text = transformers.LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        pad_token_id=32001,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=32000,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config).requires_grad_(False)
        return model if settings is None else get_peft_model(model, sft_llava.lora_config(settings))


def test_the_7b_has_the_published_size():
    assert real().num_parameters() == 7_063_427_072


@pytest.mark.parametrize(
    "flags, trainable, everything",
    [
        ([], 39_976_960, 7_103_404_032),
        (["--use_dora"], 41_336_832, 7_104_763_904),
        # the projector is there twice, once frozen: 4096 x 1024 + 4096 x 4096 weights and two biases
        (["--train_projector"], 39_976_960 + 20_979_712, 7_103_404_032 + 20_979_712),
    ],
)
def test_the_7b_is_trained_in_the_language_model_only(flags, trainable, everything):
    model = real(sft_llava.parse(["--use_cpu", *flags])[0])
    assert model.get_nb_trainable_parameters() == (trainable, everything)
    touched = {name.split(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert len(touched) == 7 * 32 and all(
        name.startswith("base_model.model.model.language_model.") for name in touched
    )
    others = {plain(name) for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    projector = {name for name, _ in real().named_parameters() if "multi_modal_projector" in name}
    assert others == (projector if flags == ["--train_projector"] else set())


def test_bare_names_would_reach_the_vision_tower():
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    suffixes = get_peft_model(real(), LoraConfig(r=16, target_modules=names, use_dora=True, task_type="CAUSAL_LM"))
    assert suffixes.get_nb_trainable_parameters()[0] == 41_336_832 + 2_433_024


# ------------------------------------------------------------------------------------------------------- load_model
@pytest.mark.parametrize("family", ["tiny_llava", "tiny_next"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4bit_is_the_language_model_and_nothing_else(family, dtype, request, tmp_path):
    folder = request.getfixturevalue(family)
    flags = command(folder, tmp_path, bf16=dtype == torch.bfloat16)
    loaded = [sft_llava.load_model(*sft_llava.parse([*flags, "--load_in_4bit", on])) for on in ("true", "false")]
    packed, whole = ({n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)} for model in loaded)
    linear = {n for n, m in loaded[1].named_modules() if isinstance(m, torch.nn.Linear)}
    assert (
        set(packed) == {n for n in linear if n.startswith("model.language_model.")}
        and len(packed) == 7 * 2
        and not whole
    )
    for module in packed.values():
        state = module.weight.quant_state
        assert (state.quant_type, state.nested, module.compute_dtype) == ("nf4", True, dtype)
    for model in loaded:
        assert {p.dtype for n, p in model.named_parameters() if n.removesuffix(".weight") not in packed} == {dtype}
        assert not any(p.requires_grad for p in model.parameters())


# ----------------------------------------------------------------------------------------- what is trained, what not
@variants
def test_only_what_was_named_is_trained(trained, variant):
    settings = VARIANTS[variant]
    done = trained(**settings)
    base = sft_llava.load_model(*sft_llava.parse(done.argv)).state_dict()  # of 4-bit weights also their scales
    now = {n: v for n, v in done.trainer.model.state_dict().items() if "lora_" not in n and "modules_to_save" not in n}
    now = {plain(name): value for name, value in now.items()}
    assert now.keys() == base.keys()
    moved = {part(name) for name in base if not torch.equal(now[name].float(), base[name].float())}
    assert moved == ({"language_model", "lm_head"} if "lora_r" in settings else set()) | (
        {"multi_modal_projector"} if "lora_r" in settings and "train_projector" in settings else set()
    )

    first, last = done.weights[0], done.weights[-1]
    parts = {"language_model"} | ({"lm_head"} if "lora_r" in settings else set())
    assert {part(name) for name in first} == parts | (
        {"multi_modal_projector"} if "train_projector" in settings else set()
    )
    assert {p.dtype for p in last.values()} == {torch.float32}
    assert [name for name in first if torch.equal(first[name], last[name])] == []


@variants
def test_says_what_is_trained(trained, variant):
    done = trained(**VARIANTS[variant])
    for name in ("vision_tower", "multi_modal_projector", "language_model", "lm_head"):
        of_part = sum(p.numel() for n, p in done.weights[0].items() if name in n)
        said = re.search(rf"^{name} +([\d,]+) of +([\d,]+) parameters trained, +([\d,]+) in 4-bit", done.text, re.M)
        trainable, total, packed = (int(number.replace(",", "")) for number in said.groups())
        assert trainable == of_part <= total
        assert packed == (
            2 * (4 * 128 * 128 + 3 * 128 * 256) if name == "language_model" and "4-bit" in variant else 0
        )
    assert all(words in done.text for words in ("96 rows to train on, 4 to evaluate", "0.08 epochs", "from the start"))


@variants
def test_output_dir_holds_what_was_trained(trained, variant):
    done = trained(**VARIANTS[variant])
    best = done.weights[done.trainer.state.best_global_step]
    if "lora_r" in VARIANTS[variant]:
        saved = AutoModelForImageTextToText.from_pretrained(done.out, dtype=torch.float32).state_dict()
        want = {name: p.detach().float() for name, p in done.trainer.model.named_parameters()} | best
    else:
        saved = load_file(done.out / "adapter_model.safetensors")
        want = {
            re.sub(r"(\.modules_to_save)?\.default|(?<=magnitude_vector)\.default\.weight$", "", n): p
            for n, p in best.items()
        }
        want = {name.replace("magnitude_vector.weight", "magnitude_vector"): p for name, p in want.items()}
    assert saved.keys() == want.keys() and {value.dtype for value in saved.values()} == {torch.float32}
    assert [name for name in want if not torch.equal(saved[name], want[name])] == []


def test_output_dir_holds_everything(trained, tiny_llava):
    done = trained()
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "settings.yaml",
        "samples.md",
        "trainer_state.json",
    ):
        assert (done.out / name).stat().st_size > 0
    assert not (done.out / "model.safetensors").exists()
    assert {path.name for path in done.out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert list(done.out.glob("runs/*/events.out.tfevents.*"))

    processor, base = (AutoProcessor.from_pretrained(folder) for folder in (done.out, tiny_llava / "model"))
    assert type(processor) is type(base) and processor.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert processor.image_processor.to_dict() == base.image_processor.to_dict()
    turns = [{"role": role, "content": [{"type": "text", "text": "x"}]} for role in ("user", "assistant")]
    assert processor.apply_chat_template(turns).rstrip().endswith("</s>")

    written = yaml.safe_load((done.out / "settings.yaml").read_text())
    assert {name: written[name] for name in SHORT} == SHORT and "hub_token" not in written
    assert (written["lora_r"], written["load_in_4bit"], written["model_name_or_path"]) == (
        16,
        True,
        str(tiny_llava / "model"),
    )

    assert list(log(done.out)) == [1, 2, 3, 4] and list(log(done.out, "eval_loss")) == [2, 4]
    for name in ("loss", "grad_norm", "learning_rate", "mean_token_accuracy", "eval_loss"):
        assert all(map(math.isfinite, log(done.out, name).values())) and log(done.out, name)
    assert log(done.out)[4] < log(done.out)[1]


def test_without_reports_and_samples(tiny_llava, tmp_path):
    done = run(command(tiny_llava, tmp_path, report_to="none", sample_rows=0))
    assert log(done.out, "eval_loss")
    assert (
        not list(tmp_path.glob("runs*"))
        and not list(tmp_path.glob("samples*"))
        and not list(tmp_path.glob("**/*tfevents*"))
    )


# --------------------------------------------------------------------------------------------------------- samples.md
@pytest.mark.parametrize("variant", ["4-bit", "4-bit, projector", "full"])
def test_samples_are_what_the_model_generates(trained, variant):
    done = trained(
        **VARIANTS[variant], learning_rate=1e-5
    )  # at a higher one the first thing it learns is to say nothing
    text = (done.out / "samples.md").read_text()
    sections = dict(zip(*[iter(re.split(r"^## Step (\d+)$", text, flags=re.M)[1:])] * 2))
    assert list(sections) == ["2", "4"]
    lines = [
        line for line in sections[str(done.trainer.state.best_global_step)].splitlines() if line.startswith("| ")
    ][1:]
    rows = [done.trainer.eval_dataset[n] for n in range(2)]
    assert len(lines) == len(rows)
    processor, model, some = AutoProcessor.from_pretrained(done.out), done.trainer.model.eval(), []
    for line, row in zip(lines, rows):
        pictures, question, right, answered = (cell.strip() for cell in line[2:].split("|")[:4])
        *_, user, assistant = row["messages"]
        assert question == " ".join(p["text"] for p in user["content"] if p["text"])
        assert right == assistant["content"][0]["text"]
        shown = re.findall(r"!\[\]\((.*?)\)", pictures)
        assert len(shown) == len(row["images"]) and all((done.out / name).is_file() for name in shown)

        messages = sft_llava.normalize(row)[:-1]
        for message in messages:
            for p in message["content"]:
                if p["type"] == "image":
                    p["image"] = sft_llava.load_image(row["images"][p["index"]])
        prompt = processor.apply_chat_template([messages], add_generation_prompt=True, tokenize=True, return_dict=True)
        prompt = {k: torch.as_tensor(v) for k, v in prompt.convert_to_tensors("pt").items()}
        ids = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        said = processor.decode(ids, skip_special_tokens=True)
        assert answered == " ".join(said.replace("|", "&#124;").split())
        some.append(answered)
    assert any(some)


# ------------------------------------------------------------------------------------- the same loss, a frozen tower
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("variant", ["float", "float, projector"])
def test_loss_and_gradients_are_those_of_the_plain_model(mixed, tmp_path, variant, checkpointing):
    settings = {**VARIANTS[variant], "lora_dropout": 0, "per_device_train_batch_size": 8}
    stock = AutoModelForImageTextToText.from_pretrained(mixed / "model").requires_grad_(False)
    stock = get_peft_model(
        stock, sft_llava.lora_config(sft_llava.parse(["--use_cpu", "--lora_dropout", "0"])[0])
    ).train()
    trainer = run(command(mixed, tmp_path, activation_checkpointing=checkpointing, **settings), train=False).trainer
    ours = trainer.model.train()
    layers = [m for n, m in ours.named_modules() if n.endswith("language_model.layers.0")]
    assert [layer.gradient_checkpointing for layer in layers] == [checkpointing]
    torch.manual_seed(0)
    for name, p in ours.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)  # with B = 0 there is no gradient of A
    weights = {
        n.replace(".modules_to_save.default", ""): p for n, p in ours.named_parameters() if "original_module" not in n
    }
    assert stock.load_state_dict(weights, strict=False).unexpected_keys == []
    if "train_projector" in settings:
        stock.base_model.model.model.multi_modal_projector.requires_grad_(True)

    outputs = []  # of a layer of the vision tower
    layer = next(m for n, m in ours.named_modules() if re.search(r"vision_tower.*layers\.0$", n))
    layer.register_forward_hook(lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))

    rows = [trainer.train_dataset[n] for n in range(8)]
    assert {len(row["images"] or []) for row in rows} == {0, 1, 2}
    batch = trainer.data_collator(rows)
    loss, wanted = trainer.compute_loss(ours, dict(batch)), stock(**batch).loss
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=0)
    assert [out.requires_grad for out in outputs] == [False]  # once: nothing is recomputed on the way back

    truth = {name: p.grad for name, p in stock.named_parameters() if p.requires_grad}
    found = {n.replace(".modules_to_save.default", ""): p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert truth.keys() == found.keys() and all(grad.abs().max() > 0 for grad in truth.values())
    for name, grad in truth.items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize(
    "settings, times",
    [({}, 1), ({"load_in_4bit": False}, 1), ({"bf16": True}, 1), ({"use_dora": True}, 2)],
    ids=["4-bit", "float", "bf16", "DoRA"],
)
def test_a_layers_last_product_is_not_recomputed(mixed, tmp_path, settings, times):
    """To the bit what PEFT's own order of the sum gives, with the adapter switched off, too."""
    found, counted = {}, {}
    flags = command(
        mixed, tmp_path, **{"activation_checkpointing": True, "per_device_train_batch_size": 8, **settings}
    )
    for name in ("ours", "stock"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "stock":
                patch.setattr(sft_llava, "adapter_first", lambda layer, x: type(layer).forward(layer, x))
            trainer = run(flags, train=False).trainer
        model, batch = trainer.model.train(), trainer.data_collator([trainer.train_dataset[n] for n in range(8)])
        torch.manual_seed(0)
        for part, p in model.named_parameters():
            if "lora_B" in part:
                torch.nn.init.normal_(p, std=0.05)
        own = {
            id(layer.base_layer): layer.base_layer
            for part, layer in model.named_modules()
            if part.endswith(".down_proj")
        }
        cls, finished = type(next(iter(own.values()))), []
        product = cls.forward

        def spy(self, x, product=product, own=own, finished=finished):
            y = product(self, x)  # does not come back where recomputation stops
            finished.extend([1] * (id(self) in own))
            return y

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cls, "forward", spy)
            transformers.set_seed(0)  # dropout's masks
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(model, dict(batch))
            loss.backward()
        counted[name] = len(finished) / len(own)
        found[name] = {
            "loss": loss.detach(),
            **{part: p.grad for part, p in model.named_parameters() if p.requires_grad},
        }
        with torch.no_grad(), model.eval().disable_adapter():
            found[name]["base"] = trainer.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert counted == {"ours": times, "stock": 2}
    for part, grad in found["stock"].items():
        assert grad.abs().max() > 0 and torch.equal(grad, found["ours"][part]), part


@pytest.mark.parametrize(
    "settings", [FLOAT, FLOAT | PROJECTOR, FLOAT | {"activation_checkpointing": False}, FLOAT | DORA], ids=str
)
def test_the_trained_model_can_be_merged_in_the_same_process(mixed, tmp_path, settings):
    """PEFT's layers have their own forward back, and merged they say what the adapter says."""
    trainer = run(command(mixed, tmp_path, **settings)).trainer
    layers = [
        layer
        for name, layer in trainer.model.named_modules()
        if name.endswith(".down_proj") and hasattr(layer, "lora_A")
    ]
    assert len(layers) == 2 and not any(
        "forward" in vars(module) for layer in layers for module in (layer, layer.base_layer)
    )
    batch = trainer.data_collator([trainer.eval_dataset[n] for n in range(4)])
    adapted = logits(trainer.model, batch)
    with trainer.model.disable_adapter():
        assert (logits(trainer.model, batch) - adapted).abs().max() > 0.01
    torch.testing.assert_close(logits(trainer.model.merge_and_unload(), batch), adapted, atol=1e-4, rtol=1e-4)


def test_even_before_the_end_a_merge_is_right(mixed, tmp_path):
    """Where training was interrupted, another forward is still in place."""
    trainer = run(command(mixed, tmp_path, **FLOAT), train=False).trainer
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    assert any(
        "forward" in vars(layer) for name, layer in trainer.model.named_modules() if name.endswith(".down_proj")
    )
    batch = trainer.data_collator([trainer.eval_dataset[n] for n in range(4)])
    trainer.compute_loss(trainer.model.train(), dict(batch)).backward()  # checkpointing leaves a forward half-way
    adapted = logits(trainer.model, batch)
    torch.testing.assert_close(logits(trainer.model.merge_and_unload(), batch), adapted, atol=1e-4, rtol=1e-4)


def test_adapters_in_the_vision_tower_are_refused(mixed, tmp_path, monkeypatch):
    """It runs without a graph: they would never get a gradient, and would be counted as trained."""
    everywhere = lambda settings: LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    monkeypatch.setattr(sft_llava, "lora_config", everywhere)
    message = refusal(sft_llava.main, command(mixed, tmp_path, **FLOAT))
    assert re.search(
        "--lora_target_modules: .*vision_tower.*q_proj.* is in vision_tower, which runs without a graph", message
    ), message


def test_an_evaluation_leaves_the_gradients_alone(mixed, tmp_path, trained):
    """On a CPU with AVX512-BF16 the first forward in eval mode would put 4-bit weights into a kernel without autograd."""
    trainer = run(command(mixed, tmp_path, lora_dropout=0), train=False).trainer
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(p, 0.01)
    batch, gradients = trainer.data_collator([trainer.train_dataset[n] for n in range(4)]), []
    for _ in range(2):
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model.train(), dict(batch)).backward()
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad})
        assert math.isfinite(trainer.evaluate()["eval_loss"])
    before, after = gradients
    assert all(grad is not None and grad.abs().max() > 0 for grad in before.values())
    assert [name for name in before if after[name] is None or not torch.equal(before[name], after[name])] == []

    done = trained()  # and so it is in a run with an evaluation after its second step
    assert min(log(done.out, "grad_norm").values()) > 0 and 2 in log(done.out, "eval_loss")
    for name in done.weights[0]:
        assert not torch.equal(done.weights[2][name], done.weights[3][name]), name


# ------------------------------------------------------------------------------------------------------ what is saved
RELOAD = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
work, results = torch.load(sys.argv[1], weights_only=False), {}
for variant, (out, messages, argv) in work.items():
    processor = AutoProcessor.from_pretrained(out)
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt",
                                          processor_kwargs={"padding": True})
    def logits(model):
        with torch.no_grad():
            return model.eval()(**batch).logits
    result = results[variant] = dict(batch)
    if "full" in variant:
        model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
        result["reloaded"] = logits(model)
    else:
        base = json.load(open(f"{out}/adapter_config.json"))["base_model_name_or_path"]
        model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), out)
        result["reloaded"] = logits(model)
        result["merged"] = logits(model.merge_and_unload())
        if "4-bit" in variant:
            import sft_llava
            result["reloaded"] = logits(PeftModel.from_pretrained(sft_llava.load_model(*sft_llava.parse(argv)), out))
            result["float"] = logits(PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), out))
    prompt = processor.apply_chat_template(messages[0][:1], add_generation_prompt=True, tokenize=True, return_dict=True,
                                           return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    result["answer"] = processor.decode(ids[0, prompt["input_ids"].shape[1]:])
torch.save(results, sys.argv[2])
"""
RELOADED = [name for name in VARIANTS if "bf16" not in name]


@pytest.fixture(scope="module")
def reloaded(trained, tmp_path_factory):
    """{variant: what a new process gets out of the saved folder on a batch of two rows}; beside it the batch, as here."""
    folder, work, batches = tmp_path_factory.mktemp("reloaded"), {}, {}
    for name in RELOADED:
        done = trained(**VARIANTS[name])
        rows = [done.trainer.eval_dataset[n] for n in range(2)]
        work[name] = str(done.out), [done.trainer.data_collator.messages_of(row) for row in rows], done.argv
        batches[name] = done.trainer.data_collator(rows)
    torch.save(work, folder / "work.pt")
    fresh(RELOAD, folder / "work.pt", folder / "results.pt")
    return {name: (result, batches[name]) for name, result in torch.load(folder / "results.pt").items()}


@pytest.mark.slow
@pytest.mark.parametrize("variant", RELOADED)
def test_the_result_stands_alone(trained, reloaded, variant):
    result, batch = reloaded[variant]
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(result[name], batch[name])
    model = trained(**VARIANTS[variant]).trainer.model
    here, words = logits(model, batch), batch["attention_mask"].bool()
    torch.testing.assert_close(result["reloaded"][words], here[words], atol=1e-6, rtol=1e-6)
    if "full" in variant:
        untrained = AutoModelForImageTextToText.from_pretrained(model.config._name_or_path)
        assert (logits(untrained, batch) - here)[words].abs().max() > 0.01
    else:
        torch.testing.assert_close(result["merged"][words], result.get("float", here)[words], atol=1e-4, rtol=1e-4)
        with model.disable_adapter():
            assert (logits(model, batch) - here)[words].abs().max() > 0.01
    assert result["answer"]


@pytest.mark.parametrize("settings", [PROJECTOR, FULL], ids=["4-bit, projector", "full"])
def test_the_best_checkpoint_is_saved(tiny_llava, tmp_path, settings):
    done = run(command(tiny_llava, tmp_path, **settings, learning_rate=1, eval_steps=1, save_steps=1))
    losses = log(done.out, "eval_loss")
    best = min(losses, key=losses.get)
    assert list(losses) == [1, 2, 3, 4] and best < 4
    name = "model.safetensors" if settings is FULL else "adapter_model.safetensors"
    saved, kept, last = (
        load_file(folder / name) for folder in (tmp_path, tmp_path / f"checkpoint-{best}", tmp_path / "checkpoint-4")
    )
    assert saved.keys() == kept.keys() and all(torch.equal(saved[key], kept[key]) for key in saved)
    assert any(not torch.equal(saved[key], last[key]) for key in saved)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-4"}


def test_without_evaluation_data(tiny_llava, tmp_path):
    flags = command(tiny_llava, tmp_path, dataset_name=tiny_llava / "data" / "train.parquet", eval_fraction=0)
    done = run(flags)
    assert (
        list(log(done.out)) == [1, 2, 3, 4]
        and not log(done.out, "eval_loss")
        and not (tmp_path / "samples.md").exists()
    )
    saved, last = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "checkpoint-4"))
    assert all(torch.equal(saved[key], last[key]) for key in saved | last)
    assert "96 rows to train on, 0 to evaluate" in done.text


def test_a_run_shorter_than_eval_steps_is_evaluated(tiny_llava, tmp_path):
    run(command(tiny_llava, tmp_path, max_steps=1, eval_steps=100, save_steps=100))
    assert list(log(tmp_path)) == [1] == list(log(tmp_path, "eval_loss"))
    assert re.findall(r"^## Step (\d+)$", (tmp_path / "samples.md").read_text(), re.M) == ["1"]


def test_settings_yaml_repeats_the_run(trained, tmp_path):
    first = trained()
    again = run(["--config", str(first.out / "settings.yaml"), "--output_dir", str(tmp_path / "again")])
    for key in ("loss", "grad_norm", "eval_loss"):
        assert log(again.out, key) == log(first.out, key)
    assert (again.out / "samples.md").read_text() == (first.out / "samples.md").read_text()


@pytest.mark.parametrize("settings", [{}, FLOAT | PROJECTOR], ids=["4-bit", "float, projector"])
def test_llava_next(tiny_next, mixed, tmp_path, settings):
    done = run(command(tiny_next, tmp_path, dataset_name=mixed / "data", max_steps=2, **settings))
    assert all(map(math.isfinite, log(done.out).values())) and len(log(done.out)) == 2
    assert {part(name) for name in done.weights[0]} == {"language_model"} | (
        {"multi_modal_projector"} if settings else set()
    )
    batch = done.trainer.data_collator([done.trainer.eval_dataset[n] for n in range(4)])
    assert "image_sizes" in batch
    base = sft_llava.load_model(*sft_llava.parse(done.argv))
    model = PeftModel.from_pretrained(base, done.out)
    torch.testing.assert_close(logits(model, batch), logits(done.trainer.model, batch), atol=1e-6, rtol=1e-6)
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    length = batch["input_ids"].shape[1]
    assert model.generate(**prompt, min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (4, length + 3)


# ------------------------------------------------------------------------------------------------------------- resume
KILL = """
import os, signal, sys
import torch, sft_llava
from transformers import TrainerCallback
from trl import SFTTrainer
torch.set_num_threads(1)
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 9:
            os.kill(os.getpid(), signal.SIGKILL)
train = SFTTrainer.train
def doomed(self, *args, **kwargs):
    self.add_callback(Kill())
    return train(self, *args, **kwargs)
SFTTrainer.train = doomed
sft_llava.main(sys.argv[1:])
"""
# 14 rows, 2 x 2 rows a step: the fourth step begins the second epoch; the run is killed in the third, as is the checkpoint
LONG = {"max_steps": 12, "eval_steps": 4, "save_steps": 4, "gradient_accumulation_steps": 2, "neftune_noise_alpha": 5}
LONG |= {"learning_rate": 1e-3, "lora_dropout": 0.1, "report_to": "none"}


@pytest.fixture(scope="module")
def whole(mixed, tmp_path_factory):
    """A function: settings as keywords -> a run of 12 steps that nothing interrupted."""
    return functools.cache(
        lambda **settings: run(command(mixed, tmp_path_factory.mktemp("whole") / "out", **LONG, **settings))
    )


@pytest.fixture(scope="module")
def dead(mixed, tmp_path_factory):
    """The folder of the same run, killed in its 9th step with a checkpoint at 8. Tests work on copies of it."""
    out = tmp_path_factory.mktemp("killed") / "out"
    argv = command(mixed, out, **LONG)
    done = subprocess.run([sys.executable, "-c", KILL, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert {path.name for path in out.iterdir() if path.is_dir() and "check" in path.name} == {
        "checkpoint-4",
        "checkpoint-8",
    }
    assert not (out / "trainer_state.json").exists()
    return out


@pytest.fixture
def killed(dead, tmp_path):
    return Path(shutil.copytree(dead, tmp_path / "out"))


def same_end(whole, resumed, after):
    for key in ("loss", "grad_norm", "eval_loss"):
        want, got = ({s: v for s, v in log(run.out, key).items() if s > after} for run in (whole, resumed))
        assert want == got and 12 in got
    for step in range(1, 13 - after):  # weights[0] of the resumed run is the checkpoint's
        for name, value in whole.weights[after + step].items():
            assert torch.equal(value, resumed.weights[step][name])
    saved = [load_file(next(out.glob("*model.safetensors"))) for out in (whole.out, resumed.out)]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


@pytest.mark.slow
def test_killed_and_started_again(whole, killed, mixed):
    """With the same command, to the same losses; a newest checkpoint that was cut off half-way is passed over."""
    half = killed / "checkpoint-9"
    shutil.copytree(killed / "checkpoint-8", half)
    (half / "trainer_state.json").unlink()
    (half / "optimizer.pt").write_bytes(b"")
    resumed = run(command(mixed, killed, **LONG))
    assert f"resuming from {killed / 'checkpoint-8'}\n" in resumed.text
    assert len(resumed.weights) == 1 + 4
    same_end(whole(), resumed, 8)
    assert (killed / "samples.md").read_text() == (whole().out / "samples.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "adapter_model.safetensors", "rng_state.pth"]
)
def test_a_damaged_checkpoint_is_not_whole(whole, tmp_path, file):
    """Missing, empty or cut off: any of its files (the random state's end is not looked at)."""
    good = whole().out / "checkpoint-8"
    assert sft_llava.is_complete(good)
    for n, keep in enumerate([None, 0, 0.5] if file != "rng_state.pth" else [None]):
        copy = Path(shutil.copytree(good, tmp_path / f"checkpoint-{n}"))
        data = (copy / file).read_bytes()
        (copy / file).unlink() if keep is None else (copy / file).write_bytes(data[: int(keep * len(data))])
        assert not sft_llava.is_complete(copy), keep


@pytest.mark.slow
def test_a_longer_run_is_not_finished_by_an_earlier_end(whole, mixed, tmp_path, monkeypatch):
    """The end of a run is taken back as soon as the run is taken up again with more steps."""
    out = Path(shutil.copytree(whole().out, tmp_path / "out"))
    longer = {**LONG, "max_steps": 20, "resume_from_checkpoint": out / "checkpoint-12"}

    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^error: interrupted"):
        patch.setattr(sft_llava.Trainer, "training_step", interrupt)
        sft_llava.main(command(mixed, out, **longer))
    again = run(command(mixed, out, **{**longer, "resume_from_checkpoint": "auto"}))
    assert f"resuming from {out / 'checkpoint-12'}" in again.text and max(log(out)) == 20


@pytest.mark.slow
def test_interrupted_by_the_keyboard(mixed, tmp_path, monkeypatch):
    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sft_llava.Trainer, "training_step", interrupt)
    with pytest.raises(SystemExit, match=f"^error: interrupted.*{tmp_path}"):
        sft_llava.main(command(mixed, tmp_path / "out"))


@pytest.mark.slow
def test_a_path_names_the_checkpoint(whole, killed, mixed, tmp_path):
    resumed = run(command(mixed, tmp_path / "other", **LONG, resume_from_checkpoint=killed / "checkpoint-4"))
    assert f"resuming from {killed / 'checkpoint-4'}\n" in resumed.text
    same_end(whole(), resumed, 4)


@pytest.mark.parametrize("variant", ["4-bit, projector", "4-bit, DoRA", "full, projector"])
def test_resumes_whatever_was_trained(whole, mixed, tmp_path, variant):
    done = whole(**VARIANTS[variant])
    flags = command(mixed, tmp_path, **LONG, **VARIANTS[variant], resume_from_checkpoint=done.out / "checkpoint-8")
    same_end(done, run(flags), 8)


@pytest.mark.slow
@pytest.mark.parametrize("variant, best", [("4-bit, projector", True), ("full", False), ("full, projector", True)])
def test_killed_before_the_end_was_written(mixed, tmp_path, variant, best):
    """All steps are done, the last one in the middle of an epoch, and the result is not saved: started again it is, without another step."""
    settings = LONG | VARIANTS[variant] | {"max_steps": 11, "load_best_model_at_end": best}
    first = run(command(mixed, tmp_path / "first", **settings))
    out = Path(shutil.copytree(first.out, tmp_path / "out"))
    weights = next(out.glob("*model.safetensors"))
    (out / "trainer_state.json").unlink()
    weights.unlink()
    again = run(command(mixed, out, **settings))
    assert len(again.weights) == 1 and list(log(out)) == list(range(1, 12)) and log(out) == log(first.out)
    saved, wanted = load_file(weights), load_file(first.out / weights.name)
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[key], wanted[key]) for key in saved)
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stdout(io.StringIO()):
        sft_llava.main(command(mixed, out, **settings))
    assert stopped.value.code in (0, None)
    if best:  # one that is gone is named
        (out / "trainer_state.json").unlink()
        state = out / "checkpoint-11" / "trainer_state.json"
        state.write_text(
            json.dumps(json.loads(state.read_text()) | {"best_model_checkpoint": "elsewhere/checkpoint-1"})
        )
        gone = refusal(sft_llava.main, command(mixed, out, **settings))
        assert gone.startswith("error: elsewhere/checkpoint-1, the best checkpoint, is missing or damaged")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--resume_from_checkpoint", "false"], ["holds a run", "--output_dir"]),
        (["--resume_from_checkpoint", "nowhere"], ["nowhere: not a complete checkpoint"]),
        (
            ["--lora_r", "8", "--learning_rate", "0.1"],
            ["lora_r 16 -> 8", "learning_rate 0.001 -> 0.1", "--output_dir"],
        ),
        (["--seed", "1"], ["seed 42 -> 1"]),
    ],
)
def test_a_used_output_dir_is_not_overwritten(killed, mixed, monkeypatch, flags, words):
    monkeypatch.setattr(sft_llava, "load_data", None)
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    message = refusal(sft_llava.main, [*command(mixed, killed, **LONG), *flags])
    assert all(word in message for word in words)
    assert before == {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_what_shows_a_run_may_change(killed, mixed):
    flags = [
        *command(mixed, killed, **LONG),
        "--sample_rows",
        "1",
        "--sample_tokens",
        "2",
        "--dataloader_num_workers",
        "1",
    ]
    last = run(flags)
    assert len(last.weights) == 1 + 4
    section = (killed / "samples.md").read_text().split("## Step 12")[1]
    assert len([line for line in section.splitlines() if line.startswith("| !") or line.startswith("|  |")]) == 1


@pytest.mark.slow
def test_a_run_that_does_not_say_which_it_is_is_not_gone_on_from(killed, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_llava, "load_data", None)
    out = Path(shutil.copytree(killed, tmp_path / "copy"))
    (out / "settings.yaml").write_text("")
    message = refusal(sft_llava.main, command(mixed, out, **LONG))
    assert "without the settings.yaml" in message and "--resume_from_checkpoint CHECKPOINT" in message


@pytest.mark.parametrize("more", [[], ["--sample_rows", "1"]])
def test_a_finished_run_says_so(trained, monkeypatch, capsys, more):
    done = trained()
    for name in ("load_model", "load_data", "load_processor"):
        monkeypatch.setattr(sft_llava, name, None)
    before = {path: path.stat().st_mtime_ns for path in done.out.rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        sft_llava.main([*done.argv, *more])
    assert stopped.value.code in (0, None) and "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in done.out.rglob("*")}
    assert "lora_r 16 -> 4" in refusal(sft_llava.main, [*done.argv, "--lora_r", "4"])
    assert "holds a run" in refusal(sft_llava.main, [*done.argv, "--resume_from_checkpoint", "false"])


def test_false_in_a_settings_file_is_false(trained, tmp_path):
    (tmp_path / "run.yaml").write_text("resume_from_checkpoint: false\n")
    flags = [*trained().argv, "--config", str(tmp_path / "run.yaml")]
    assert "holds a run" in refusal(sft_llava.main, flags)


# ------------------------------------------------------------------------------------------------------ rows of a step
# ------------------------------------------------------------------------------------------------------ two processes
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["float", "float, projector"])
def test_two_processes_train_like_one(mixed, tmp_path, variant):
    """Each has one row at a time, so that one may have a picture while the other has none."""
    settings = {
        **VARIANTS[variant],
        "lora_dropout": 0,
        "per_device_train_batch_size": 1,
        "sample_rows": 1,
        "max_steps": 8,
    }
    settings |= {"learning_rate": 1e-4, "save_total_limit": 9}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = command(mixed, tmp_path / "two", **settings, gradient_accumulation_steps=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = [*launch, str(ROOT / "sft_llava.py"), *argv]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("rows to train on") == done.stdout.count("One row as the model sees it") == 1
    one = run(command(mixed, tmp_path / "one", **settings, gradient_accumulation_steps=4))
    for key in ("loss", "eval_loss", "grad_norm"):
        two = log(tmp_path / "two", key)
        assert two == pytest.approx(log(one.out, key), abs=1e-4) and len(two) == (4 if key == "eval_loss" else 8)
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    for name in saved[0]:
        torch.testing.assert_close(saved[0][name], saved[1][name], atol=1e-3, rtol=1e-3)
    again = command(
        mixed,
        tmp_path / "again",
        **settings,
        gradient_accumulation_steps=2,
        resume_from_checkpoint=tmp_path / "two" / "checkpoint-6",
    )
    done = subprocess.run([*program[: -len(argv)], *again], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    for key in ("loss", "grad_norm"):  # from within the second epoch on, whose order is not the first one's
        assert log(tmp_path / "again", key) == log(tmp_path / "two", key)
