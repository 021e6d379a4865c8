"""tools/inspect_recipe.py: its counts are the published ones, its memory is what a step really takes, its examples are
what is trained on, and its plan is what the run does."""

import contextlib
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
from unittest import mock

import bitsandbytes
import pytest
import torch
import transformers
from conftest import ROOT, log
from PIL import Image
from recipes import Recipe, asks, minicpm_run, said, short_run, two_stage_run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import sft_llava
from tools import inspect_recipe

sys.path.insert(0, str(ROOT / "benchmarks"))
import fewest_gpus  # noqa: E402
import measure  # noqa: E402

LLAMA = {"model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008}
LLAMA |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336}
CLIP |= {"num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}
LLAVA_7B = {"model_type": "llava", "image_seq_length": 576, "tie_word_embeddings": False}
LLAVA_7B |= {"text_config": LLAMA, "vision_config": CLIP | {"vocab_size": 32000}}
MISTRAL = {"model_type": "mistral", "vocab_size": 32003, "hidden_size": 4096, "intermediate_size": 14336}
MISTRAL |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "pad_token_id": 0}
SIGLIP = {"hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "num_hidden_layers": 27}
SIGLIP |= {"num_attention_heads": 16, "patch_size": 14}
PERCEIVER = {"resampler_n_latents": 64, "resampler_depth": 3, "resampler_n_heads": 16, "resampler_head_dim": 96}
PERCEIVER |= {"num_key_value_heads": 4, "hidden_size": 4096}
IDEFICS2_8B = {"model_type": "idefics2", "tie_word_embeddings": False, "text_config": MISTRAL}
IDEFICS2_8B |= {"vision_config": SIGLIP, "perceiver_config": PERCEIVER}
MINICPM_26 = {"vocab_size": 151666, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
MINICPM_26 |= {"num_attention_heads": 28, "num_key_value_heads": 4, "max_window_layers": 28, "query_num": 64}
MINICPM_26 |= {"image_size": 980, "vision_config": SIGLIP | {"model_type": "siglip_vision_model"}}
WHOLE_EMBEDDINGS = {"lora_r": 64, "lora_target_modules": r"llm\..*\.(q|k|v)_proj"}
WHOLE_EMBEDDINGS |= {"lora_modules_to_save": "embed_tokens", "tune_vision": True}
RUNS = {"finetune_minicpm_lora": minicpm_run, "llava_two_stage": two_stage_run}  # flags; of the others: short_run


@pytest.fixture
def inspect(capsys):
    """A function: a recipe's name, its flags, own flags -> the report as --json prints it."""

    def make(name, flags, *own):
        capsys.readouterr()
        status = 0
        try:
            inspect_recipe.main([str(ROOT / f"{name}.py"), "--json", *own, *flags])
        except SystemExit as e:
            status = e.code
        report = json.loads(capsys.readouterr().out)
        assert status == report["plan"]["would_stop"]  # 0 or 1
        return report

    return make


@pytest.fixture
def llava(tiny_llava, tmp_path, inspect):
    """A function: own flags, settings of sft_llava.py as keywords -> the report."""
    case = Recipe("sft_llava", tiny_llava, tmp_path)

    def make(*own, **settings):
        return inspect("sft_llava", case.flags(**settings), *own)

    make.case = case
    return make


def show(llava, *own, **settings):
    """Run it without --json; what it prints is captured by capsys."""
    inspect_recipe.main([sft_llava.__file__, "--no-color", *own, *llava.case.flags(**settings)])


# ---------------------------------------------------------------------------------------------------------- parameters


def real_size(tiny, out, config):
    """A folder with the processor of a tiny model and the configuration of a real one, without weights; -> it."""
    out.mkdir()
    for path in (tiny / "model").iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (out / path.name).write_bytes(path.read_bytes())
    old = json.loads((tiny / "model" / "config.json").read_text())
    if "vision_config" in config and (out / "processor_config.json").exists():  # its images must fit, too
        processor = json.loads((out / "processor_config.json").read_text())
        side = config["vision_config"]["image_size"]
        if "image_seq_len" in processor:
            processor["image_seq_len"] = 64
        else:
            processor["image_processor"] |= {
                "size": {"shortest_edge": side},
                "crop_size": {"height": side, "width": side},
            }
        (out / "processor_config.json").write_text(json.dumps(processor))
    keep = {name: old[name] for name in ("image_token_id", "image_token_index") if name in old}
    if "vocab_size" in config:  # MiniCPM-V 2.6: its code wants more of the old configuration
        config = {name: value for name, value in old.items() if name != "layer_types"} | config
    (out / "config.json").write_text(json.dumps(config | keep))
    return out


@pytest.mark.parametrize(
    ("name", "tiny", "config", "settings", "trained", "total"),
    [
        ("sft_llava", "tiny_llava", LLAVA_7B, {}, 39_976_960, 7_103_404_032),
        ("sft_llava", "tiny_llava", LLAVA_7B, {"use_dora": True}, 41_336_832, 7_104_763_904),
        ("dpo_idefics2", "tiny_pairs", IDEFICS2_8B, {}, 55_348_736, 8_458_116_848),
        ("idefics2_docvqa", "tiny_forms", IDEFICS2_8B, {}, 7_589_912, 8_410_358_024),
        ("finetune_minicpm_lora", "tiny_minicpm26", MINICPM_26, WHOLE_EMBEDDINGS, 1_057_507_568, 9_156_682_720),
    ],
)
def test_parameters_are_the_published_ones(
    name, tiny, config, settings, trained, total, request, tmp_path, inspect, uncounted
):
    tiny = request.getfixturevalue(tiny)
    model = real_size(tiny, tmp_path / "model", config)
    settings = {"use_cpu": None, "model_name_or_path": model, **settings}
    report = inspect(name, RUNS.get(name, short_run)(tiny, tmp_path / "out", **settings))
    parts = report["parts"]
    assert sum(part["trainable"] for part in parts.values()) == trained
    assert sum(part["total"] for part in parts.values()) == total
    head = {"LM head"} if name in ("sft_llava", "dpo_idefics2") else set()  # they ask the model for its parts
    assert set(parts) == {"vision tower", "projector", "language model"} | head
    assert report["precision"] == "bfloat16"
    if name == "sft_llava":  # all linear layers of the language model, lm_head is not one of its
        assert parts["language model"]["four_bit"] == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
        assert parts["vision tower"]["trainable"] == parts["vision tower"]["four_bit"] == 0


def test_joined_parts_with_adapters(tiny_parts, tmp_path, inspect):
    """Of llava_two_stage.py, whose main() writes the joined model to the disk first; nothing is left of that."""
    settings = {"model_name_or_path": None, "pretrain_mm_mlp_adapter": tiny_parts / "align", "lora_r": 8}
    report = inspect("llava_two_stage", two_stage_run(tiny_parts, tmp_path / "out", "instruct", **settings))
    language = report["parts"]["language model"]
    assert language["adapters"] == language["trainable"] > 0 and report["parts"]["projector"]["trainable"] > 0
    assert report["memory"]["activations"] and not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------------- memory


def by_pictures(trainer, rows):
    """The numbers of rows, the one with the largest image tensors first."""
    sizes = []
    for row in rows:
        values = inspect_recipe.tensors(dict(trainer.data_collator([row])))
        sizes.append(sum(value.numel() for value in values if value.is_floating_point()))
    return sorted(range(len(rows)), key=lambda n: -sizes[n])


@pytest.mark.parametrize(
    ("name", "tiny", "settings"),
    [
        ("sft_llava", "tiny_llava", {}),
        ("sft_llava", "tiny_llava", {"load_in_4bit": False, "bf16": True, "use_dora": True}),
        ("dpo_idefics2", "tiny_pairs", {"bf16": True}),
        ("dpo_idefics2", "tiny_pairs", {"shared_prompt": False}),
        ("idefics2_docvqa", "tiny_forms", {}),
        ("finetune_minicpm_lora", "tiny_minicpm", {"tune_vision": True}),
        ("finetune_minicpm_lora", "tiny_minicpm26", {}),
        ("llava_two_stage", "tiny_parts", {"stage": "instruct", "vision_learning_rate": 1e-5}),
    ],
)
def test_activations_are_those_of_a_step(name, tiny, settings, request, tmp_path, inspect):
    """Bytes at most allocated in the second of two accumulated steps, besides weights and gradients, by torch's
    profiler of its own allocator: real weights, the recipe's own trainer, the longest rows or those with the largest
    pictures."""
    folder, make_flags = request.getfixturevalue(tiny), RUNS.get(name, short_run)
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1, "eval_fraction": 0.1, **settings}
    memory = inspect(name, make_flags(folder, tmp_path / "out", **settings), "--examples", "0")["memory"]
    assert memory["activations"], memory["not_counted"]
    for kind, size in memory["activations"].items():
        settings["activation_checkpointing"] = kind == "with_checkpointing"
        flags = make_flags(folder, tmp_path / kind, **settings)
        trainer = measure.trainer_of(sys.modules[f"recipe_{name}"], flags)
        true_size, rows = measure.activations(trainer), trainer.train_dataset
        trainer.train_dataset = rows.select(by_pictures(trainer, rows)[:3])
        true_size = max(true_size, measure.activations(trainer))
        assert size["bytes"] == pytest.approx(true_size, rel=0.05)


def evaluate(trainer, recipe, rows):
    """-> (a function that evaluates these rows, its inputs)."""
    inputs = dict(trainer.data_collator(rows))
    trainer.model.eval()
    return lambda: trainer.prediction_step(trainer.model, inputs, prediction_loss_only=True), inputs


def answer(trainer, recipe, rows):
    """-> (a function that gives each of these rows an answer of sixty tokens, its inputs)."""
    collator = trainer.data_collator
    collator.stop_ids = [len(collator.processor.tokenizer)]  # no token ends an answer
    messages = [collator.messages_of(row) for row in rows]
    inputs = collator.tokenize([some[: recipe.last_answer(some)] for some in messages], prompt=True)
    collator.tokenize = lambda *args, **options: inputs
    trainer.accelerator.autocast = contextlib.nullcontext  # it wants a state that the fixtures have reset

    def run():
        assert [one.num_tokens for one in recipe.answer_batch(trainer, rows, 60)] == [60] * len(rows)

    return run, dict(inputs)


@pytest.mark.parametrize(("phase", "prepare"), [("evaluation", evaluate), ("generation", answer)])
def test_evaluation_and_answers_take_what_is_counted(phase, prepare, case, inspect, monkeypatch):
    """As above, of an evaluation step and of answers, caches and all, to the last token. In 16 bits: without a graph a
    CPU does not unpack 4-bit weights, which a GPU does."""
    settings = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 3, "eval_fraction": 0.2}
    has = vars(case.parse()[0])
    settings["max_new_tokens" if "max_new_tokens" in has else "sample_tokens"] = 60
    settings["q_lora" if "q_lora" in has else "load_in_4bit"] = False
    report = inspect(case.name, case.flags(**settings), "--examples", "0")["memory"]["phases"][phase]
    recipe = sys.modules[f"recipe_{case.name}"]
    trainer = measure.trainer_of(recipe, case.flags(output_dir=case.tmp_path / "real", **settings))
    rows = trainer.eval_dataset
    if phase == "generation" and case.name != "idefics2_docvqa":  # that answers all of them
        rows = rows.take(min(case.parse()[0].sample_rows, len(rows)))
    longest = sorted(range(len(rows)), key=lambda n: -rows[n]["length"])
    true_sizes = []
    monkeypatch.setattr(measure, "step", lambda trainer, run: run())
    for order in (longest, by_pictures(trainer, rows)):
        run, inputs = prepare(trainer, recipe, [rows[n] for n in order[: report["batch"]]])
        true_sizes.append(measure.cpu_peak(trainer, run) + sum(x.nbytes for x in inspect_recipe.tensors(inputs)))
    assert report["bytes"] == pytest.approx(max(true_sizes), rel=0.06)


def test_work_is_what_a_step_computes(case, inspect):
    """FLOPs of one row, as benchmarks/measure.py counts them where they are computed."""
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    counted = inspect(case.name, case.flags(**settings), "--examples", "0")["memory"]["flops_of_a_row"]
    flags = case.flags(output_dir=case.tmp_path / "real", **settings)
    trainer = measure.trainer_of(sys.modules[f"recipe_{case.name}"], flags)
    rows = trainer.train_dataset
    longest = max(range(len(rows)), key=lambda n: rows[n]["length"])
    assert counted == pytest.approx(measure.flops(trainer, trainer.data_collator([rows[longest]])), rel=0.01)


def test_an_evaluation_may_take_more_than_training(llava, capsys):
    settings = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 32, "sample_rows": 0}
    memory = llava(**settings)["memory"]
    phases = memory["phases"]
    assert memory["peak"] == {"phase": "evaluation", "bytes": phases["evaluation"]["all"]}
    assert phases["evaluation"]["batch"] == 24 and "generation" not in phases  # there are no more rows
    assert phases["evaluation"]["all"] > phases["training step"]["all"] > phases["training step"]["bytes"]
    assert memory["sum"]["with_checkpointing"] == phases["training step"]["all"]
    few = llava(**settings | {"per_device_eval_batch_size": 1})["memory"]
    assert few["peak"]["phase"] == "training step"
    assert [*llava(eval_strategy="no")["memory"]["phases"]] == ["training step", "optimizer step"]
    show(llava, **settings)
    assert re.search(r"\nevaluation +24 .* peak +the longest rows", capsys.readouterr().out)


def test_answers_take_more_with_their_length(llava):
    """Keys and values of a token: two layers, two of 64 float32 each, of each row."""
    settings = {"per_device_eval_batch_size": 8, "sample_rows": 4}
    short, long = (llava(**settings, sample_tokens=n)["memory"]["phases"]["generation"] for n in (500, 1500))
    assert (short["batch"], short["new_tokens"]) == (4, 500)
    assert long["bytes"] - short["bytes"] >= 4 * 1000 * 2 * 2 * 64 * 4


def test_the_largest_pictures_are_run_too(tiny_forms, tmp_path, write, inspect):
    """A page may take more than a longer question about a small one."""
    case = Recipe("idefics2_docvqa", tiny_forms, tmp_path)
    for name, height in (("small", 28), ("large", 112)):
        Image.new("RGB", (112, height)).save(tmp_path / f"{name}.png")
    rows = [asks("What? " * 15, "one", image="small.png"), asks("What?", "one", image="large.png")]
    steps = []
    for some in (rows, rows[:1]):
        report = inspect(case.name, case.flags_for(write(some), per_device_train_batch_size=1))
        steps.append(report["memory"]["phases"]["training step"])
    both, alone = steps
    assert (both["rows"], alone["rows"]) == ("largest pictures", "longest") and both["tokens"] < alone["tokens"]
    assert both["bytes"] > alone["bytes"]


def test_an_optimizer_step_takes_what_its_own_does_not_do_in_place(llava):
    settings = {"use_cpu": False, "eval_fraction": 0, "dataset_test_split": None}
    sizes = {}
    for optim in ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "adafactor"):
        report = llava("--examples", "0", **settings, optim=optim)
        memory, trained = report["memory"], sum(part["trained_bytes"] for part in report["parts"].values())
        sizes[optim] = memory["phases"]["optimizer step"]["bytes"] / trained
        assert memory["optimizer_is_paged"] == ("paged" in optim)
    assert sizes["adamw_torch"] == pytest.approx(1, rel=0.01)  # the roots of the second moments, of all weights
    assert sizes["adamw_torch_fused"] < 0.01 and sizes["paged_adamw_32bit"] == 0 and 0 < sizes["adafactor"] < 0.5


def test_what_fits_into_other_cards(llava, uncounted, capsys):
    settings = {"use_cpu": None, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 12}  # 1 GB a row
    memory = llava("--memory", "12", "48.5", **settings)["memory"]
    assert list(memory["fits"]) == list(memory["auto"]) == ["12", "48.5"]
    assert memory["fits"]["12"]["with_checkpointing"] == 10  # 12 GB, less 5 % and 1 GB
    # 11 GB are free, a tenth of that and 5 % of the card are left
    assert [(one["train"], one["accumulation"]) for one in memory["auto"].values()] == [(6, 2), (12, 1)]
    assert memory["auto"]["12"]["bytes"] == pytest.approx(6e9, rel=0.01)
    show(llava, "--memory", "12", "1.5", **settings)
    text = capsys.readouterr().out
    assert re.search(r"12 GB +1.5 GB", text) and re.search(r"\nauto x accumulation +6 x 2 +none", text)
    assert "more than one of" not in text
    show(llava, "--memory", "1", **settings)
    assert "1.0 GB on a GPU (training step): more than one of 1 GB has" in capsys.readouterr().out


def test_what_auto_would_choose(llava, uncounted, monkeypatch, capsys):
    """Of the default 4 rows a step, and to evaluate, where answers take as much again for each row."""
    takes = {"batch": 8, "rows": "longest", "tokens": 50, "bytes": 8e9, "for_each_row": 1e9}
    phases = {"evaluation": takes, "generation": takes | {"bytes": 24e9, "for_each_row": 2e9}}
    monkeypatch.setattr(
        inspect_recipe, "measure_others", lambda *_: ({**phases, "optimizer step": {"bytes": 0}}, 10**12)
    )
    settings = {"use_cpu": None, "per_device_train_batch_size": None, "per_device_eval_batch_size": "auto"}
    memory = llava("--memory", "5", "141", **settings)["memory"]
    assert memory["auto_batch"] == ["per_device_eval_batch_size", "per_device_train_batch_size"]
    assert [(one["train"], one["accumulation"]) for one in memory["auto"].values()] == [(2, 2), (4, 1)]
    assert [one["eval"] for one in memory["auto"].values()] == [0, 32]  # 64 would take 24 + 2 * 56 GB of 119
    show(llava, "--memory", "5", "141", **settings)
    text = capsys.readouterr().out
    assert re.search(r"\nauto x accumulation +2 x 2 +4 x 1\nauto, evaluation +none +32", text)
    assert "Here auto: --per_device_eval_batch_size, --per_device_train_batch_size. The figures above" in text
    assert llava("--gpus", "2", "--strategy", "zero2", **settings, load_in_4bit=False)["memory"]["auto"] is None
    show(llava, **settings | {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8})
    assert "Here auto" not in capsys.readouterr().out


def test_a_phase_that_cannot_be_run_is_said(llava, capsys, monkeypatch):
    """The others are counted."""
    monkeypatch.setattr(inspect_recipe, "answering", mock.Mock(side_effect=RuntimeError("it reads a token")))
    memory = llava()["memory"]
    assert memory["phases"]["generation"]["not_counted"] == "RuntimeError: it reads a token"
    assert memory["phases"]["evaluation"]["bytes"] > 0 and memory["peak"]["phase"] != "generation"
    show(llava)
    assert "generation: this model cannot be run without content (RuntimeError: it reads" in capsys.readouterr().out


def test_batches_are_on_a_straight_line(llava, monkeypatch):
    """The largest batch that fits, and a batch of 100,000 typed by mistake, are estimated from two small ones."""
    settings = {"load_in_4bit": False, "eval_fraction": 0, "activation_checkpointing": False}
    one, six = (llava(**settings, per_device_train_batch_size=batch)["memory"] for batch in (1, 6))
    monkeypatch.setattr(inspect_recipe, "MOST_ROWS", 2)
    estimated = llava(**settings, per_device_train_batch_size=6)["memory"]["activations"]
    for kind, size in one["activations"].items():
        real = six["activations"][kind]
        assert size["bytes"] + 5 * size["for_each_row"] >= 0.95 * real["bytes"]
        assert estimated[kind]["bytes"] == pytest.approx(real["bytes"], rel=0.05)
        assert estimated[kind]["for_each_row"] == pytest.approx(real["for_each_row"], rel=0.05)
    room = 24e9 * 0.95 - 1e9 - sum(one["fixed"]["ddp"].values())
    size, more = one["activations"]["without_checkpointing"].values()
    largest = {card: batches["without_checkpointing"] for card, batches in one["fits"].items()}
    assert largest["24"] == 1 + (room - size) // more and largest["16"] < largest["80"]


def test_what_a_gpu_keeps_differs(llava):
    """Under CUDA's autocast PEFT hands the input of a 4-bit layer to its adapter as it is; on a CPU it makes a copy in
    float32. CUDA's layer norm runs in float32."""
    sizes = []
    for flag in ({"use_cpu": False}, {"bf16": True}):
        memory = llava(**flag, eval_fraction=0, per_device_train_batch_size=3)["memory"]
        sizes.append(memory["activations"]["without_checkpointing"]["bytes"])
    assert sizes[0] < 0.9 * sizes[1]
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert inspect_recipe.layer_norm_of_a_gpu(x, (8,)).dtype == torch.float32


def test_a_step_that_cannot_be_run_is_said(llava, capsys, monkeypatch):
    """Because the model looks at content somewhere, or because memory runs out: the system ends the process then."""
    monkeypatch.setattr(inspect_recipe, "step", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    memory = llava()["memory"]
    assert memory["activations"] is memory["fits"] is None and memory["not_counted"].startswith("BrokenProcessPool")
    monkeypatch.setattr(inspect_recipe, "measure", lambda *args: torch.empty(1, device="meta").item())
    show(llava)
    text = capsys.readouterr().out
    assert "Activations are not counted" in text and "RuntimeError" in text


def test_the_posts_table():
    """Idefics2-8b by the DPO post: 32 + 32 + 32 + 64 = 160 GB; 16 bits and LoRA of rank 16: 16 + 16 + 0.1 + 0.2."""
    table = inspect_recipe.by_the_rule(8 * 10**9, 55_348_736, has_reference=True)
    rounded = {name: [round(size / 1e9, 1) for size in row.values()] for name, row in table.items()}
    assert rounded == {"all in float32": [32, 32, 32, 64, 160], "16 bits, adapter": [16, 16, 0.1, 0.2, 32.3]}


# A language model of 20 GB in 16 bits and a projector of 10**9 weights, which is trained in float32 by AdamW.
PROJECTOR = inspect_recipe.Weights(
    frozen=20e9,
    scales=0,
    trained=4e9,
    trained_count=10**9,
    states=8,
    width=2,
    layer=4e8,
    trained_layer=0,
    outside=1e8,
    live=2e9,
    hidden=4096,
    holds_gradients=False,
)
# The language model of 11 * 10**9 weights, all trained.
IN_FULL = PROJECTOR._replace(frozen=0, trained=44e9, trained_count=11 * 10**9, trained_layer=4e8)
SHARED = {
    "ddp": [],
    "zero2": ["gradients", "optimizer"],
    "fsdp2": ["weights", "trained", "gradients", "optimizer"],
    "zero3": ["weights", "trained", "gradients", "optimizer"],
}


def test_weights_gradients_and_optimizer_by_strategy():
    """GB of each of four GPUs."""
    expected = {
        "ddp": [20, 4, 4, 8],
        "zero2": [20, 2, 0.5, 3],  # 16 bits, and a float32 copy beside the two moments, in four shares
        "fsdp2": [5, 1, 1, 2],
        "zero3": [5, 0.5, 0.5, 3],
    }
    for strategy, gigabytes in expected.items():
        sizes = inspect_recipe.per_gpu(PROJECTOR, strategy, 4)
        assert [size / 1e9 for size in sizes.values()][:4] == gigabytes and sizes["exchange"] > 0
    assert inspect_recipe.per_gpu(PROJECTOR, "ddp", 1)["exchange"] == 0


@pytest.mark.parametrize("strategy", SHARED)
def test_shares_times_the_number_of_gpus_are_the_whole(strategy):
    whole = inspect_recipe.per_gpu(PROJECTOR, strategy, 1)
    for gpus in (2, 8, 64):
        sizes = inspect_recipe.per_gpu(PROJECTOR, strategy, gpus)
        for name in ("weights", "trained", "gradients", "optimizer"):
            shares = gpus if name in SHARED[strategy] else 1
            assert shares * sizes[name] == pytest.approx(whole[name])


def test_4_bit_weights_are_shared_out_by_fsdp2_only():
    """Their scales are whole on every GPU; DeepSpeed cannot shard them."""
    packed = PROJECTOR._replace(frozen=5e9, scales=1.6e8)
    assert inspect_recipe.per_gpu(packed, "zero2", 4)["weights"] == 5.16e9
    assert inspect_recipe.per_gpu(packed, "fsdp2", 4)["weights"] == 5e9 / 4 + 1.6e8


def test_fsdp2_shares_are_those_of_fully_shard(llava, uncounted, monkeypatch):
    """4-bit weights, in tensors of a floating type, are shared out like others; their scales stay whole. By PyTorch's
    own fully_shard, in a group of four processes of which there is one."""
    estimated = llava("--gpus", "4", "--strategy", "fsdp2")["memory"]["fixed"]["fsdp2"]["weights"]
    packed = functools.partial(transformers.BitsAndBytesConfig, bnb_4bit_quant_storage=torch.bfloat16)
    monkeypatch.setattr(transformers, "BitsAndBytesConfig", packed)
    model = sft_llava.load_model(*llava.case.parse())
    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (4,))
        for module in list(model.modules()):
            if isinstance(module, torch.nn.ModuleList):
                for layer in module:
                    fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        shares = sum(p.to_local().nbytes for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
    states = [module.quant_state for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    scales = sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    assert len(states) > 0 and estimated == pytest.approx(shares + scales, rel=0.01)


def test_fsdp2_keeps_whole_gradients_of_accumulated_batches(llava, uncounted):
    """In 16 bits, and not in the optimizer step. Unless the trainer syncs each batch."""
    once = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "bf16": True}
    twice = once | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    found = []
    for settings in (once, twice):
        report = llava("--gpus", "4", "--strategy", "fsdp2", **settings)
        trained = sum(part["trainable"] for part in report["parts"].values())
        found.append(report["memory"]["fixed"]["fsdp2"]["gradients"] / trained)
    assert found == [4 / 4, 2]
    accumulating = IN_FULL._replace(holds_gradients=True)
    of_a_step = [inspect_recipe.fixed_in("optimizer step", some, "fsdp2", 8) for some in (IN_FULL, accumulating)]
    assert of_a_step[0] == of_a_step[1] == (44e9 + 44e9 + 88e9) / 8
    training = mock.Mock(accelerator_config=mock.Mock(gradient_accumulation_kwargs={"sync_each_batch": True}))
    assert not inspect_recipe.holds_gradients(training, 2)


def test_weights_that_are_handed_out_in_16_bits_are_not_copied(tiny_parts, tmp_path, inspect):
    """DDP's forward pass keeps a 16-bit copy of each weight that is trained in float32, the others have them so."""
    settings = {"use_cpu": None, "optim": "adamw_torch", "eval_fraction": 0}
    flags = two_stage_run(tiny_parts, tmp_path / "out", "instruct", **settings)
    report = inspect("llava_two_stage", flags, "--gpus", "2", "--strategy", "zero3", "--examples", "0")
    memory, trained = report["memory"], sum(part["trainable"] for part in report["parts"].values())
    assert memory["activations"] == memory["activations_by_strategy"]["zero3"]
    for kind, size in memory["activations"].items():
        copies = memory["activations_by_strategy"]["ddp"][kind]["bytes"] - size["bytes"]
        assert trained <= copies <= 4 * trained
    # AdamW's own 4 bytes for each, of a share, and a float32 gradient in place of one in 16 bits
    fixed = sum(memory["fixed"]["zero3"].values())
    assert memory["phases"]["optimizer step"]["all"] == pytest.approx(fixed + (4 + 2) * trained / 2, rel=0.05)


# ----------------------------------------------------------------------------------------------------------------- fit


def fit(card, weights, step=5e9):
    """What --fit says for GPUs of so many GB, where a training step of a row takes `step` bytes and AdamW four bytes
    for each trained weight."""
    phases = {"training step": {"batch": 2, "bytes": 2 * step, "for_each_row": step}}
    phases["optimizer step"] = {"bytes": 4 * weights.trained_count}
    activations = {"with_checkpointing": {"bytes": 2 * step, "for_each_row": step}}
    counted = dict.fromkeys(inspect_recipe.STRATEGIES, (activations, phases))
    training = mock.Mock(activation_checkpointing=True, per_device_train_batch_size=2, gradient_accumulation_steps=1)
    return inspect_recipe.about_fit(card, weights, counted, training), inspect_recipe.with_one_row(phases)


@pytest.mark.parametrize("weights", [PROJECTOR, IN_FULL], ids=["projector", "in full"])
@pytest.mark.parametrize("card", [24, 40, 80, 141])
def test_the_fewest_gpus_are_enough_and_fewer_are_not(card, weights):
    found, phases = fit(card, weights)
    for name, entry in found["strategies"].items():
        if name == "ddp" or entry["gpus"] is None:
            continue
        numbers = inspect_recipe.FIT_GPUS[1:]
        for gpus in numbers[: numbers.index(entry["gpus"]) + 1]:
            most = max(inspect_recipe.sums_of_phases(phases, weights, name, gpus).values())
            assert (most <= inspect_recipe.room_on(card)) == (gpus == entry["gpus"])
        assert entry["bytes"] == most and entry["batch"] >= 1
    if found["best"]:
        numbers = [entry["gpus"] or math.inf for entry in found["strategies"].values()]
        assert min(numbers) == found["strategies"][found["best"]]["gpus"]


def test_more_memory_never_wants_more_gpus():
    before = dict.fromkeys(inspect_recipe.STRATEGIES, math.inf)
    for card in range(8, 260, 4):
        found = fit(card, IN_FULL)[0]["strategies"]
        numbers = {name: entry["gpus"] or math.inf for name, entry in found.items()}
        assert all(numbers[name] <= before[name] for name in before)
        before = numbers
    assert before == {"ddp": 1, "zero2": 2, "fsdp2": 2, "zero3": 2}


def test_the_simplest_of_those_with_the_fewest_gpus():
    """On one GPU DDP, which is none; on two ZeRO-2 before FSDP2 before ZeRO-3."""
    assert fit(80, PROJECTOR)[0]["best"] == "ddp"
    assert fit(141, IN_FULL)[0]["best"] == "zero2"
    assert fit(40, IN_FULL)[0]["best"] == "fsdp2"
    few = fit(10, IN_FULL)[0]
    assert few["best"] is None and "an adapter on 4-bit weights" in few["help"]


YI_34B = LLAMA | {"vocab_size": 64064, "hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60}
YI_34B |= {"num_attention_heads": 56, "num_key_value_heads": 8}
LLAVA_34B = LLAVA_7B | {"text_config": YI_34B}


@pytest.mark.parametrize(
    ("config", "card", "best", "gpus"),
    [
        (LLAVA_7B, 24, "ddp", 1),
        (LLAVA_34B, 80, "ddp", 1),
        (LLAVA_34B, 24, "fsdp2", 2),
    ],
    ids=["7B in 24 GB", "34B in 80 GB", "34B in 24 GB"],
)
def test_real_sizes_in_4_bits(config, card, best, gpus, tiny_llava, tmp_path, llava, uncounted, capsys):
    """As published; a training step is taken to have 1 GB of activations."""
    model = real_size(tiny_llava, tmp_path / "model", config)
    settings = {"use_cpu": None, "model_name_or_path": model, "per_device_train_batch_size": 1}
    found = llava("--fit", str(card), **settings)["memory"]["fit"]
    assert (found["memory"], found["best"], found["strategies"][best]["gpus"]) == (card, best, gpus)
    assert set(found["strategies"]) == {"ddp", "zero2", "fsdp2"}


def test_a_table_of_the_fewest_gpus(tmp_path, capsys, uncounted):
    fewest_gpus.main([str(tmp_path), "7B-4bit"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"\| 7B-4bit \| 24 GB \| \*\*1 x 6\.\d\*\* \| 2 x \d\.\d \| 2 x \d\.\d \| refused \|", line)
    with pytest.raises(SystemExit, match="^error: no run 8B; there are 7B-4bit, "):
        fewest_gpus.main([str(tmp_path), "8B"])


def test_fit_is_said(llava, uncounted, capsys):
    settings = {"use_cpu": None, "per_device_train_batch_size": 1}
    show(llava, "--fit", "80", **settings)
    text = capsys.readouterr().out
    assert "GPUs of 80 GB that are enough, one row at a time" in text and "The fewest: 1 GPU." in text
    assert re.search(r"\nDDP +1 +1\.\d\d +training step +7\d\n", text)
    assert "ZeRO-3 is refused: 4 bits and ZeRO-3: it cannot share out 4-bit weights" in text
    show(llava, "--fit", "1", **settings, load_in_4bit=False)
    text = capsys.readouterr().out
    assert "up to 64 GPUs of 1 GB are too few; what helps: an adapter on 4-bit weights, shorter rows" in text


def test_optimizer_states():
    sizes = {"adamw_torch_fused": 8, "paged_adamw_8bit": 2.03125, "lion_32bit": 4, "paged_lion_8bit": 1.015625}
    sizes |= {"sgd": 0, "adafactor": 0.01}
    assert {optim: inspect_recipe.state_bytes(optim) for optim in sizes} == sizes


# --------------------------------------------------------------------------------------------------- data and examples


def test_bad_rows_are_listed_and_do_not_stop(case, write, odd_images, inspect, uncounted):
    images = ["red.png", "truncated.jpg", "large.png", "none.png"]
    rows = [case.row("Which?", "one", image=image) for image in images]
    report = inspect(case.name, case.flags_for(write(rows)))
    (data,) = report["data"]
    assert [*data["bad"]] == ["unreadable image"] and [bad["row"] for bad in data["bad"]["unreadable image"]] == [1, 3]
    assert (data["rows"], data["good"], data["images_per_row"]) == (4, 2, {"1": 2})
    assert (data["image_sizes"]["smallest"], data["image_sizes"]["largest"]) == ([56, 56], [64, 64])
    assert any("would stop at bad rows" in odd for odd in report["odd"]) and report["plan"]["would_stop"]
    assert report["plan"]["rows"] == 2 and any("no evaluation split" in odd for odd in report["odd"])


def test_long_rows_are_counted(llava, write, images, uncounted):
    images(1)
    rows = [said("<image>\nWhat?", "one", image="red.png"), said("What?", "word " * 200), said("What?", "")]
    settings = {"dataset_name": write(rows), "image_folder": None, "eval_fraction": 0, "max_length": 60}
    (data,) = llava(**settings, on_bad_rows="skip", on_long_rows="drop")["data"]
    assert [*data["bad"]] == ["too long", "empty answer"] and data["too_long"] == 1 and data["max_length"] == 60
    assert data["tokens_per_row"]["longest"] > 60


def test_the_same_rows_are_left_as_in_the_recipe(case, write, odd_images, inspect, uncounted):
    names = ["red.png", "lime.png", "large.png", "wide.png", "truncated.jpg"]
    rows = write([case.row("Which?", f"number {n}", image=names[n % 5]) for n in range(20)])
    settings = {"dataset_name": rows, "image_folder": case.tmp_path, "eval_fraction": 0.2, "on_bad_rows": "skip"}
    train, held_out = case.load_data(**settings)
    plan = inspect(case.name, case.flags(**settings))["plan"]
    assert (plan["rows"], plan["evaluation_rows"]) == (len(train), len(held_out)) and len(held_out) > 0


def test_examples_are_what_is_trained_on(case, inspect, uncounted):
    flags = case.flags()
    report = inspect(case.name, flags, "--examples", "3")
    rows, collator = case.load_data()[0], case.collator(image_folder=case.tmp_path)
    decode, image_token = collator.processor.tokenizer.decode, collator.processor.image_token_id
    assert len(report["examples"]) == 3
    for shown in report["examples"]:
        batch = collator([next(row for row in rows if row["row"] == shown["row"])])
        all_labels = batch.get("labels")
        if all_labels is None:
            all_labels = batch["input_ids"].where(batch["completion_mask"].bool(), -100)
        assert len(shown["sequences"]) == len(all_labels) == (2 if case.name == "dpo_idefics2" else 1)
        for pieces, ids, labels in zip(shown["sequences"], batch["input_ids"], all_labels):
            trained = [piece for piece in pieces if piece["kind"] == "trained"]
            assert sum(piece["tokens"] for piece in trained) == (labels != -100).sum() > 0
            text = "".join(piece["text"] for piece in trained)
            assert text.split() == decode(labels[labels != -100]).split()
            images = [piece for piece in pieces if piece["kind"] == "image"]
            assert sum(piece["tokens"] for piece in images) == (ids == image_token).sum()
            assert all(piece["text"].endswith(f" x {piece['tokens']}") for piece in images)


def test_many_rows_are_looked_at_by_several_processes(llava, write, images, uncounted):
    """Their numbers are those of the file."""
    images(1)
    rows = [said("<image>\nWhat?", "" if n % 200 == 3 else f"number {n}", image="red.png") for n in range(600)]
    (data,) = llava(dataset_name=write(rows), image_folder=None, eval_fraction=0)["data"]
    assert [bad["row"] for bad in data["bad"]["empty answer"]] == [3, 203, 403] and data["good"] == 597


def test_looking_at_rows_that_runs_out_of_memory_is_said(llava, write, monkeypatch):
    here = os.getpid()

    def look_at(*args):
        return os.getpid() != here and os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(inspect_recipe, "look_at", look_at)
    with pytest.raises(SystemExit, match="^error: a process that looked at the rows of .* was ended .*: --rows 1000"):
        show(llava, dataset_name=write([said("What?", "one")] * 600), image_folder=None, eval_fraction=0)


def test_some_rows_only(llava, write, uncounted):
    """The plan is of all of them: with a split to evaluate on, with some that are held out, and with very few."""
    report = llava("--rows", "10", dataset_test_split=None)
    assert [(data["rows"], data["looked_at"]) for data in report["data"]] == [(24, 10), (96, 10)]
    assert (report["plan"]["rows"], report["plan"]["evaluation_rows"]) == (96, 24)
    settings = {"dataset_name": write([said("What?", f"number {n}") for n in range(200)]), "image_folder": None}
    settings["eval_fraction"] = 0.1
    plan = llava("--rows", "50", **settings, max_eval_rows=15)["plan"]
    assert (plan["rows"], plan["evaluation_rows"], plan["sampled"]) == (180, 15, True)
    settings["dataset_name"] = write([said("What?", f"number {n}") for n in range(30)])
    plan = llava("--rows", "7", **settings | {"eval_fraction": 0.02})["plan"]
    assert (plan["rows"], plan["evaluation_rows"]) == (29, 1)  # at least one is held out


def test_control_characters_of_the_data_are_written_out(llava, write, images, uncounted, capsys):
    """And what looks like rich's own markup is text."""
    images(1)
    rows = [said("<image>\nWhat \x1b[31mis\x00 [red]this? :cat:", "red \u202e", image="red.png")]
    rows.append(said("<image>\nWhat?", "red", image="\x1b[31m.png"))
    show(llava, dataset_name=write(rows), image_folder=None, eval_fraction=0, on_bad_rows="skip")
    text = capsys.readouterr().out
    assert all(part in text for part in ("What \\x1b[31mis", "\\u202e", "\\x1b[31m.png", "[red]this? :cat:"))
    assert "\x1b" not in text and "\u202e" not in text


# ----------------------------------------------------------------------------------------------------- plan and output


@pytest.mark.parametrize(
    ("settings", "odd"),
    [
        ({"learning_rate": 2e-6}, "learning rate 2e-06 for language model, adapters: unusually low"),
        ({"lora_r": 0, "load_in_4bit": False}, "learning rate 0.0002 for language model, in full: unusually high"),
        ({"eval_steps": 1, "save_steps": 1, "sample_rows": 24, "sample_tokens": 256}, "evaluation takes longer than"),
        ({"max_steps": 2}, "less than one pass"),
        ({"eval_strategy": "no"}, "nothing will be evaluated"),
        ({"eval_steps": 1000, "save_steps": 1000}, "no evaluation before the end: one comes every 1000 steps"),
        ({"eval_delay": 25}, "no evaluation will happen: --eval_delay is 25, and there are 24 steps"),
        ({"warmup_steps": 100}, "never comes up"),
        ({"gradient_accumulation_steps": 1000}, "a step takes 1000 rows, and there are 96"),
        ({"num_train_epochs": 40}, "40 passes over the data"),
        ({"save_steps": 50, "eval_steps": 50}, "no checkpoint before the end: one comes every 50 steps"),
    ],
)
def test_what_is_odd(settings, odd, llava, uncounted):
    found = llava(**settings)["odd"]
    assert any(odd in text for text in found), found


def test_4_bits_and_zero3_are_odd(llava, uncounted, capsys):
    for strategy in inspect_recipe.STRATEGIES:
        report = llava("--gpus", "4", "--strategy", strategy)
        refusal = "ZeRO-3 is refused: 4 bits and ZeRO-3: it cannot share out 4-bit weights while it loads them; "
        assert any(text.startswith(refusal) for text in report["odd"]) == (strategy == "zero3")
        assert list(report["memory"]["refused"]) == ["zero3"]
        assert any("and FSDP2: bitsandbytes' optimizers" in text for text in report["odd"]) == (strategy == "fsdp2")
    in_16_bits = llava("--strategy", "zero3", load_in_4bit=False)["odd"]  # some rows have no image
    assert all("rows have no image, with ZeRO-3" in text for text in in_16_bits if "refused" in text)
    assert llava("--gpus", "4", "--strategy", "fsdp")["memory"]["strategy"] == "fsdp2"
    show(llava, "--gpus", "4")
    text = capsys.readouterr().out
    assert re.search(r"\n +DDP +ZeRO-2 +FSDP2 +ZeRO-3\nfrozen weights .* refused\n", text)


def test_what_a_recipe_refuses_with_its_rows_or_model(tiny_minicpm, tmp_path, inspect, llava, uncounted):
    more = {"q_lora": None, "use_cpu": None}
    report = inspect("finetune_minicpm_lora", minicpm_run(tiny_minicpm, tmp_path / "out", **more), "--gpus", "2")
    assert list(report["memory"]["refused"]) == ["zero3"] and "slices" in report["memory"]["refused"]["zero3"]
    (tmp_path / "rows.json").write_text(json.dumps([said("Which?", "two"), said("Who?", "six")] * 4))
    settings = {"load_in_4bit": False, "dataset_name": tmp_path / "rows.json", "dataset_test_split": None}
    report = llava("--gpus", "2", **settings, eval_fraction=0)
    assert report["memory"]["refused"] == {
        "zero3": "8 rows have no image, with ZeRO-3: leave them out, or take ZeRO-2 or DDP"
    }


def test_a_sound_run_is_not_odd(llava, uncounted):
    """And neither written to, nor resumed where it is finished."""
    out = llava.case.tmp_path / "out"
    expected = {"rows": 96, "evaluation_rows": 24, "effective_batch": 4, "steps": 24, "epochs": 1, "evaluations": 2}
    expected |= {"warmup_steps": 1, "learning_rates": {"language model, adapters": 2e-4}, "gpus": 1}
    expected |= {"would_stop": False, "sampled": False}
    report = llava(eval_steps=12, save_steps=12, sample_rows=1, sample_tokens=4)
    assert report["odd"] == [] and report["plan"] == expected and not out.exists()
    out.mkdir()
    (out / "trainer_state.json").write_text("{}")
    assert llava()["plan"]["steps"] == 24 and [path.name for path in out.iterdir()] == ["trainer_state.json"]


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_strategy": "steps", "eval_steps": 0.3, "save_steps": 0.3, "max_steps": 5},
        {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 7, "eval_delay": 4, "eval_on_start": True},
        {"eval_strategy": "epoch", "num_train_epochs": 1.5},
        {"eval_strategy": "epoch", "num_train_epochs": 2, "eval_delay": 2, "warmup_steps": 2},
    ],
    ids=str,
)
def test_the_plan_is_what_the_run_does(settings, llava, uncounted):
    """Four steps an epoch: evaluations and warm-up as the trainer's own log has them."""
    settings = {"warmup_steps": 0.3, "lr_scheduler_type": "constant_with_warmup", **settings}
    settings |= {"per_device_train_batch_size": 24, "gradient_accumulation_steps": 1, "logging_steps": 1}
    settings |= {"load_best_model_at_end": False, "save_strategy": "no", "sample_rows": 0, "max_eval_rows": 2}
    plan = llava(**settings)["plan"]
    llava.case.run(**settings)
    out = llava.case.tmp_path / "out"
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    rates = log(out, "learning_rate").values()
    assert plan["evaluations"] == sum("eval_loss" in entry for entry in entries)
    assert (plan["steps"], plan["warmup_steps"]) == (len(rates), sum(rate < 2e-4 for rate in rates))


def test_steps_of_several_gpus(tiny_parts, tmp_path, inspect, uncounted):
    """llava_two_stage.py makes up its step of 128 rows of the number of GPUs; DeepSpeed it has from its launcher."""
    flags = two_stage_run(tiny_parts, tmp_path / "out", "instruct", gradient_accumulation_steps=None)
    for gpus in ("1", "8"):
        report = inspect("llava_two_stage", flags, "--gpus", gpus, "--strategy", "zero3")
        assert report["plan"]["effective_batch"] == 128 and report["memory"]["strategy"] == "zero3"
        assert report["memory"]["refused"] == {}


def test_as_plain_text(llava, uncounted, capsys):
    show(llava, use_cpu=False)
    plain = capsys.readouterr().out
    assert "<image> x 16" in plain and "«" in plain and "\x1b[" not in plain
    sections = ["Data", "as the model sees it", "Parameters of", "Memory of the GPU", "Largest batch", "Plan", "Odd"]
    assert all(section in plain for section in sections)
    show(llava)
    of_a_cpu = capsys.readouterr().out  # what it takes says nothing of cards
    assert "Memory of a CPU" in of_a_cpu and "GPU" not in of_a_cpu and "Largest batch" not in of_a_cpu


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("own", "settings", "message"),
    [
        (["--gpus", "0"], {}, "--rows and --gpus must be at least 1"),
        (["--memory", "0"], {}, "--memory: 0: a card's memory is in GB, from 1 to 1000"),
        (["--memory", "24", "24000"], {}, "--memory: 24000: a card's memory is in GB"),
        (["--memory", "nan"], {}, "--memory: nan: a card's memory"),
        (["--memory", "large"], {}, "--memory: large: .* RECIPE comes before this flag"),
        (["--memory", "80", "--fit", "80"], {}, "--fit and --memory: one of them"),
        (["--fit", "0"], {}, "--fit: 0: a card's memory is in GB, from 1 to 1000"),
        (["--fit", "80", "--gpus", "4"], {}, "--fit finds the number of GPUs and the strategy"),
        (["--fit", "80", "--strategy", "ddp"], {}, "--fit finds the number of GPUs and the strategy"),
        (["--fit", "80"], {}, "--fit is about GPUs: without --use_cpu"),
        (["--no_such", "1"], {}, "no_such"),
        ([], {"lora_r": 0}, "not possible in 4 bits"),
        ([], {"max_length": 3}, "no row of .* can be trained on"),
        ([], {"lora_target_modules": "no_such_layer"}, "--lora_target_modules .*no_such_layer"),
    ],
)
def test_flags_that_cannot_work(own, settings, message, llava):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        show(llava, *own, **settings)


def test_what_makes_no_trainer_is_said(llava, monkeypatch):
    failing = mock.Mock(side_effect=TypeError("PEFT takes no such\nadapter"))
    monkeypatch.setattr(inspect_recipe, "build", failing)
    with pytest.raises(SystemExit, match="^error: .* cannot make its trainer .*: PEFT takes no such adapter"):
        show(llava)


def test_flags_are_read_as_the_recipe_reads_them(llava, uncounted, tmp_path):
    """With dashes, or out of a file; one that is no text gets the recipe's own message."""
    dashed = [flag.replace("_", "-") if flag.startswith("--") else flag for flag in llava.case.flags()]
    args, recipe_flags = inspect_recipe.parse([sft_llava.__file__, *dashed])
    assert inspect_recipe.inspect(sft_llava, args, recipe_flags)["precision"] == "float32"
    assert llava(use_cpu=None)["precision"] == "bfloat16"
    (tmp_path / "run.yaml").write_text("use_cpu: true\nbf16: true")
    assert inspect_recipe.asked_for("bf16", ["--config", str(tmp_path / "run.yaml")]) is True
    assert inspect_recipe.asked_for("bf16", ["--config", str(tmp_path / "run.yaml"), "--bf16", "no"]) is False
    (tmp_path / "run.yaml").write_text("seed: 1", encoding="utf-16")
    with pytest.raises(SystemExit, match="^error: --config .*run.yaml cannot be read: .*utf-8"):
        inspect_recipe.main([sft_llava.__file__, "--config", str(tmp_path / "run.yaml")])


def test_from_the_shell(llava, tmp_path):
    """A copy of a recipe, anywhere, is one. With several threads, as PyTorch has by default: forked processes must not
    wait for threads that only their parent has."""
    (tmp_path / "mine.py").write_text((ROOT / "sft_llava.py").read_text())
    program = "import runpy, sys, torch; torch.ones(600_000).add(1); del sys.argv[0]; runpy.run_path(sys.argv[0], "
    program += "run_name='__main__')"
    own = [ROOT / "tools/inspect_recipe.py", tmp_path / "mine.py", "--json"]
    command = [sys.executable, "-c", program, *own, *llava.case.flags()]
    threads = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=tmp_path, env=threads, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and json.loads(done.stdout)["memory"]["activations"], done.stderr[-2000:]
