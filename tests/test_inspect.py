"""tools/inspect_recipe.py: its counts are the published ones, its memory is what a step really takes, its examples are what is trained on."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_data, minicpm_run, said, short_run, two_stage_run
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import dpo_idefics2
import finetune_minicpm_lora
import idefics2_docvqa
import llava_two_stage
import sft_llava
from tools import inspect_recipe

sys.path.insert(0, str(ROOT / "benchmarks"))
import measure  # noqa: E402

LLAVA_7B = {
    "model_type": "llava",
    "image_seq_length": 576,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "image_size": 336,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
}
IDEFICS2_8B = {
    "model_type": "idefics2",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 32003,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "perceiver_config": {
        "resampler_n_latents": 64,
        "resampler_depth": 3,
        "resampler_n_heads": 16,
        "resampler_head_dim": 96,
        "num_key_value_heads": 4,
        "hidden_size": 4096,
    },
}
MINICPM_26 = {
    "vocab_size": 151666,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_window_layers": 28,
    "query_num": 64,
    "image_size": 980,
    "layer_types": None,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}


@pytest.fixture
def report(capsys):
    """A function: recipe, its flags, own flags -> the report as --json prints it."""

    def make(recipe, flags, *own):
        capsys.readouterr()
        status = 0
        try:
            inspect_recipe.main([recipe.__file__, "--json", *own, *flags])
        except SystemExit as e:
            status = e.code
        found = json.loads(capsys.readouterr().out)
        assert status == found["plan"]["would_stop"]  # 0 or 1
        return found

    return make


@pytest.fixture
def uncounted(monkeypatch):
    """Activations are not counted, which is what takes the time."""
    monkeypatch.setattr(
        inspect_recipe,
        "measure",
        lambda trainer, rows, batch: {kind: (batch * 10**9, 10**9) for kind in (True, False)},
    )


def real_size(tiny, out, config):
    """A folder with the processor of a tiny model and the configuration of a real one, without weights; -> it."""
    out.mkdir()
    for path in (tiny / "model").iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (out / path.name).write_bytes(path.read_bytes())
    old = json.loads((tiny / "model" / "config.json").read_text())
    keep = {name: old[name] for name in ("image_token_id", "image_token_index") if name in old}
    config = {**(old if "vocab_size" in config else {}), **config, **keep}
    (out / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return out


@pytest.mark.parametrize(
    "recipe, tiny, config, settings, trained, total",
    [
        (sft_llava, "tiny_llava", LLAVA_7B, {}, 39_976_960, 7_103_404_032),
        (sft_llava, "tiny_llava", LLAVA_7B, {"use_dora": True}, 41_336_832, 7_104_763_904),
        (dpo_idefics2, "tiny_pairs", IDEFICS2_8B, {}, 55_348_736, 8_458_116_848),
        (idefics2_docvqa, "tiny_forms", IDEFICS2_8B, {}, 7_589_912, 8_410_358_024),
        (
            finetune_minicpm_lora,
            "tiny_minicpm26",
            MINICPM_26,
            {
                "lora_r": 64,
                "lora_target_modules": r"llm\..*\.(q|k|v)_proj",
                "lora_modules_to_save": "embed_tokens",
                "tune_vision": True,
            },
            1_057_507_568,
            9_156_682_720,
        ),
    ],
)
def test_parameters_are_the_published_ones(
    recipe, tiny, config, settings, trained, total, request, tmp_path, report, uncounted
):
    tiny = request.getfixturevalue(tiny)
    name = real_size(tiny, tmp_path / "model", config)
    run = minicpm_run if recipe is finetune_minicpm_lora else short_run
    flags = run(tiny, tmp_path / "out", **{"use_cpu": None, "model_name_or_path": name, **settings})
    found = report(recipe, flags)
    assert sum(part["trainable"] for part in found["parts"].values()) == trained
    assert sum(part["total"] for part in found["parts"].values()) == total
    assert set(found["parts"]) == {"vision tower", "projector", "language model"} and found["precision"] == "bfloat16"
    if recipe is sft_llava:  # all linear layers of the language model, lm_head is not one of its
        assert found["parts"]["language model"]["four_bit"] == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
        assert found["parts"]["vision tower"]["trainable"] == found["parts"]["vision tower"]["four_bit"] == 0


# ------------------------------------------------------------------------------------------------------------- memory


def measured(recipe, flags):
    """Bytes at most allocated in the second of two accumulated training steps, besides weights and gradients, by torch's profiler of its own
    allocator: real weights, the recipe's own trainer, the longest rows."""
    return measure.activations(measure.trainer_of(recipe, flags))


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    """A function: folder of a tiny model -> one with a model of some 30 million parameters beside the same data."""
    made = {}

    def make(tiny):
        if tiny not in made:
            made[tiny] = tmp_path_factory.mktemp("middle")
            config = AutoConfig.from_pretrained(tiny / "model")
            text, vision, keys = config.text_config, config.vision_config, 8
            if hasattr(config, "perceiver_config"):
                config.perceiver_config.hidden_size, keys = 512, config.perceiver_config.num_key_value_heads
            for name, value in {
                "hidden_size": 512,
                "intermediate_size": 1408,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "num_key_value_heads": keys,
                "head_dim": 64,
            }.items():
                setattr(text, name, value)
            vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers = 256, 1024, 6
            AutoModelForImageTextToText.from_config(config).save_pretrained(made[tiny] / "model")
            AutoProcessor.from_pretrained(tiny / "model").save_pretrained(made[tiny] / "model")
            (made[tiny] / "data").symlink_to(tiny / "data")
        return made[tiny]

    return make


@pytest.mark.parametrize(
    "recipe, tiny, large, settings",
    [
        (sft_llava, "tiny_llava", False, {}),
        (sft_llava, "tiny_llava", True, {}),
        (sft_llava, "tiny_llava", True, {"bf16": True}),
        (sft_llava, "tiny_llava", False, {"use_dora": True}),
        (sft_llava, "tiny_llava", True, {"load_in_4bit": False, "bf16": True, "use_dora": True}),
        (sft_llava, "tiny_llava", True, {"load_in_4bit": False, "lora_r": 0}),
        (sft_llava, "tiny_next", False, {"dataset_name": "tiny_llava"}),
        (dpo_idefics2, "tiny_pairs", False, {}),
        (dpo_idefics2, "tiny_pairs", True, {"bf16": True}),
        (dpo_idefics2, "tiny_pairs", False, {"shared_prompt": False}),
        (idefics2_docvqa, "tiny_forms", False, {}),
        (idefics2_docvqa, "tiny_forms", True, {"bf16": True}),
        (finetune_minicpm_lora, "tiny_minicpm", False, {"tune_vision": True}),
        (finetune_minicpm_lora, "tiny_minicpm26", False, {}),
        (llava_two_stage, "tiny_parts", False, {"stage": "align"}),
        (llava_two_stage, "tiny_parts", False, {"stage": "instruct", "vision_learning_rate": 1e-5}),
    ],
)
def test_activations_are_those_of_a_step(recipe, tiny, large, settings, request, middle, tmp_path, report):
    folder = request.getfixturevalue(tiny)
    folder = middle(folder) if large else folder
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1, "eval_fraction": 0.1, **settings}
    if settings.get("dataset_name"):
        settings["dataset_name"] = request.getfixturevalue(settings["dataset_name"]) / "data"
    run = {finetune_minicpm_lora: minicpm_run, llava_two_stage: two_stage_run}.get(recipe, short_run)
    found = report(recipe, run(folder, tmp_path / "out", **settings), "--examples", "0")["memory"]
    assert found["activations"], found["not_counted"]
    for checkpointing in (True, False):
        truth = measured(
            recipe, run(folder, tmp_path / f"out-{checkpointing}", **settings, activation_checkpointing=checkpointing)
        )
        counted = found["activations"][f"{'with' if checkpointing else 'without'}_checkpointing"]["bytes"]
        print(
            f"\n{recipe.__name__} {tiny} {large} {settings} {checkpointing}: measured {truth / 1e6:.2f} MB, counted {counted / 1e6:.2f}, {counted / truth - 1:+.1%}"
        )
        assert abs(counted / truth - 1) < 0.15


def test_a_larger_batch_takes_what_is_foretold(tiny_llava, middle, tmp_path, report):
    """The largest batch that fits is reckoned from two: the line goes on straight."""
    flags = {"load_in_4bit": False, "eval_fraction": 0, "activation_checkpointing": False}
    one, six = (
        report(sft_llava, short_run(middle(tiny_llava), tmp_path / "out", per_device_train_batch_size=n, **flags))[
            "memory"
        ]
        for n in (1, 6)
    )
    for kind, found in one["activations"].items():
        assert found["bytes"] + 5 * found["for_each_row"] >= 0.95 * six["activations"][kind]["bytes"]
    room = 24e9 * 0.95 - 1e9 - sum(one["fixed"]["ddp"].values())
    at, more = one["activations"]["without_checkpointing"].values()
    assert one["fits"]["24"]["without_checkpointing"] == 1 + (room - at) // more
    assert one["fits"]["16"]["without_checkpointing"] < one["fits"]["80"]["without_checkpointing"]


def test_what_a_gpu_keeps_differs(tiny_llava, middle, tmp_path, report):
    """Under CUDA's autocast PEFT hands the input of a 4-bit layer to its adapter as it is; on a CPU it makes a copy in float32."""
    found = [
        report(
            sft_llava,
            short_run(middle(tiny_llava), tmp_path / "out", eval_fraction=0, per_device_train_batch_size=3, **how),
        )["memory"]["activations"]
        for how in ({"use_cpu": False}, {"bf16": True})
    ]
    assert found[0]["without_checkpointing"]["bytes"] < 0.9 * found[1]["without_checkpointing"]["bytes"]
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert (
        inspect_recipe.layer_norm_of_a_gpu(x, (8,)).dtype == torch.float32
        and torch.nn.functional.layer_norm(x, (8,)).dtype == torch.bfloat16
    )


def test_a_large_batch_is_reckoned_from_a_small_one(tiny_llava, middle, tmp_path, report, monkeypatch):
    """A batch of 100,000, typed by mistake, must not be run."""
    flags = short_run(
        middle(tiny_llava), tmp_path / "out", per_device_train_batch_size=6, load_in_4bit=False, eval_fraction=0
    )
    run = report(sft_llava, flags)["memory"]["activations"]
    monkeypatch.setattr(inspect_recipe, "MOST_ROWS", 2)
    for kind, reckoned in report(sft_llava, flags)["memory"]["activations"].items():
        assert reckoned["bytes"] == pytest.approx(run[kind]["bytes"], rel=0.05)
        assert reckoned["for_each_row"] == pytest.approx(run[kind]["for_each_row"], rel=0.05)


def test_a_step_that_runs_out_of_memory_is_said(flags, report, monkeypatch):
    """The system ends the process then."""
    monkeypatch.setattr(inspect_recipe, "step", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    memory = report(sft_llava, flags())["memory"]
    assert memory["activations"] is memory["fits"] is None and memory["not_counted"].startswith("BrokenProcessPool")
    assert memory["fixed"]["ddp"]["weights"] > 0


def test_the_posts_table():
    """Idefics2-8b by the DPO post: 32 + 32 + 32 + 64 = 160 GB; 16 bits and LoRA of rank 16: 16 + 16 + 0.1 + 0.2 = 32.3 GB."""
    table = inspect_recipe.by_the_rule(8 * 10**9, 55_348_736, reference=True)
    rounded = {name: [round(size / 1e9, 1) for size in row.values()] for name, row in table.items()}
    assert rounded == {"all in float32": [32, 32, 32, 64, 160], "16 bits, adapter": [16, 16, 0.1, 0.2, 32.3]}


def test_weights_gradients_and_optimizer_by_strategy():
    parts = {
        "projector": {
            "total": 10**9,
            "trainable": 10**9,
            "four_bit": 0,
            "frozen_bytes": 0,
            "trained_bytes": 4 * 10**9,
        },
        "language model": {
            "total": 10**10,
            "trainable": 0,
            "four_bit": 0,
            "frozen_bytes": 2 * 10**10,
            "trained_bytes": 0,
        },
    }
    found = {
        name: inspect_recipe.per_gpu(parts, "adamw_torch", name, 4, True, 10**8, 4096)
        for name in inspect_recipe.STRATEGIES
    }
    of = lambda name: [round(found[name][key] / 1e9, 2) for key in ("weights", "trained", "gradients", "optimizer")]
    assert of("ddp") == [20, 4, 4, 8]
    assert of("zero2") == [20, 2, 0.5, 3]  # 16 bits, and a float32 copy beside the two moments, in four shares
    assert of("zero3") == [5, 0.5, 0.5, 3]
    assert of("fsdp") == [5, 1, 1, 2]
    assert inspect_recipe.per_gpu(parts, "adamw_torch", "ddp", 1, True, 0, 0)["exchange"] == 0
    parts["language model"]["four_bit"] = 10**9
    assert (
        inspect_recipe.per_gpu(parts, "adamw_torch", "zero3", 4, True, 0, 0)
        is inspect_recipe.per_gpu(parts, "adamw_torch", "fsdp", 4, True, 0, 0)
        is None
    )


@pytest.mark.parametrize(
    "optim, size",
    [
        ("adamw_torch_fused", 8),
        ("paged_adamw_32bit", 8),
        ("paged_adamw_8bit", 2.03125),
        ("adamw_bnb_8bit", 2.03125),
        ("lion_32bit", 4),
        ("paged_lion_8bit", 1.015625),
        ("sgd", 0),
        ("adafactor", 0.01),
    ],
)
def test_optimizer_states(optim, size):
    assert inspect_recipe.state_bytes(optim) == size


# --------------------------------------------------------------------------------------------------- data and examples


def test_bad_rows_are_listed_and_do_not_stop(flags, write, odd_images, report, uncounted):
    rows = [
        said("<image>\nWhat?", "one", image="red.png"),
        said("<image>\nWhat?", "two", image="truncated.jpg"),
        said("Who?", "three"),
        said("<image>\nWhat?", "", image="red.png"),
        said("<image>\nWhat?", "five", image="none.png"),
        said("<image>\nWhat?", "six", image="wide.png"),
        said("What?", "word " * 200),
    ]
    found = report(sft_llava, flags(dataset_name=write(rows), image_folder=None, eval_fraction=0, max_length=60))
    (data,) = found["data"]
    assert (data["rows"], data["good"], data["too_long"]) == (7, 3, 1)
    assert {reason: [bad["row"] for bad in some] for reason, some in data["bad"].items()} == {
        "unreadable image": [1, 4],
        "empty answer": [3],
        "too long": [6],
    }
    assert (
        data["images_per_row"] == {"0": 1, "1": 2}
        and data["image_sizes"]["smallest"] == [56, 56]
        and data["image_sizes"]["largest"] == [1000, 49]
    )
    assert data["tokens_per_row"]["longest"] > 60 and data["max_length"] == 60
    assert any("would stop at bad rows" in odd for odd in found["odd"])
    assert found["plan"]["rows"] == 3 and any("no evaluation split" in odd for odd in found["odd"])


def test_the_same_rows_are_left_as_in_the_recipe(flags, write, odd_images, report, uncounted):
    names = ["red.png", "lime.png", "large.png", "wide.png", "truncated.jpg"]
    rows = [said("<image>\nWhat?", f"number {n}", image=names[n % 5]) for n in range(20)] + [
        said("What?", f"number {n}") for n in range(20, 30)
    ]
    same = flags(dataset_name=write(rows), image_folder=None, eval_fraction=0.2, on_bad_rows="skip")
    train, held_out = load_data(sft_llava, *sft_llava.parse(same))
    plan = report(sft_llava, same)["plan"]
    assert (plan["rows"], plan["evaluation_rows"]) == (len(train), len(held_out))


@pytest.mark.parametrize(
    "recipe, run, tiny",
    [
        (sft_llava, short_run, "tiny_llava"),
        (idefics2_docvqa, short_run, "tiny_forms"),
        (dpo_idefics2, short_run, "tiny_pairs"),
        (finetune_minicpm_lora, minicpm_run, "tiny_minicpm47"),
        (llava_two_stage, two_stage_run, "tiny_parts"),
    ],
)
def test_examples_are_what_is_trained_on(recipe, run, tiny, request, tmp_path, report, uncounted):
    flags = run(request.getfixturevalue(tiny), tmp_path / "out")
    found = report(recipe, flags, "--examples", "3")
    settings, training = recipe.parse(flags)
    processor = recipe.load_processor(settings)
    rows, collator = load_data(recipe, settings, training)[0], recipe.Collator(processor, settings, training)
    assert len(found["examples"]) == 3
    for shown in found["examples"]:
        batch = collator([next(row for row in rows if row["row"] == shown["row"])])
        labels = (
            batch["labels"] if "labels" in batch else batch["input_ids"].where(batch["completion_mask"].bool(), -100)
        )
        assert len(shown["sequences"]) == len(labels) == (2 if recipe is dpo_idefics2 else 1)
        for pieces, ids, learnt in zip(shown["sequences"], batch["input_ids"], labels):
            trained = [piece for piece in pieces if piece["kind"] == "trained"]
            assert sum(piece["tokens"] for piece in trained) == (learnt != -100).sum() > 0
            assert (
                "".join(piece["text"] for piece in trained).split()
                == processor.tokenizer.decode(learnt[learnt != -100]).split()
            )
            images = [piece for piece in pieces if piece["kind"] == "image"]
            assert sum(piece["tokens"] for piece in images) == (ids == processor.image_token_id).sum()
            assert all(piece["text"].endswith(f" x {piece['tokens']}") for piece in images)


def test_many_rows_are_looked_at_by_several_processes(flags, write, images, report, uncounted):
    images(1)
    rows = [said("<image>\nWhat?", f"number {n}" * (n % 400 != 3), image="red.png") for n in range(1200)]
    (data,) = report(sft_llava, flags(dataset_name=write(rows), image_folder=None, eval_fraction=0))["data"]
    assert [bad["row"] for bad in data["bad"]["empty answer"]] == [3, 403, 803] and data["good"] == 1197


def test_looking_at_rows_that_runs_out_of_memory_is_said(flags, write, images, monkeypatch):
    images(1)
    rows, here = [said("<image>\nWhat?", "one", image="red.png")] * 1200, os.getpid()
    monkeypatch.setattr(
        inspect_recipe, "look_at", lambda *args: os.getpid() != here and os.kill(os.getpid(), signal.SIGKILL)
    )
    with pytest.raises(
        SystemExit, match="^error: a process that looked at the rows of .* was ended by the system.*: --rows 1000"
    ):
        inspect_recipe.main(
            [str(ROOT / "sft_llava.py"), *flags(dataset_name=write(rows), image_folder=None, eval_fraction=0)]
        )


def test_settings_that_make_no_trainer(minicpm_flags, tmp_path):
    with pytest.raises(SystemExit, match="error: --lora_target_modules .*layers.*99"):
        inspect_recipe.main([finetune_minicpm_lora.__file__, *minicpm_flags(lora_layers_to_transform=99)])


def test_flags_may_have_dashes(flags, report, uncounted):
    dashed = [flag.replace("_", "-") if flag.startswith("--") else flag for flag in flags()]
    assert report(sft_llava, dashed)["precision"] == report(sft_llava, flags())["precision"] == "float32"


def test_some_rows_of_few(flags, write, report, uncounted):
    """At least one row is held out, of those that are looked at, too: that says nothing of the share of all."""
    same = flags(
        dataset_name=write([said("Which?", f"number {n}") for n in range(30)]), image_folder=None, eval_fraction=0.02
    )
    plans = [report(sft_llava, same, *few)["plan"] for few in ([], ["--rows", "7"])]
    assert [(plan["rows"], plan["evaluation_rows"]) for plan in plans] == [(29, 1)] * 2


def test_a_config_that_is_no_text_gets_the_recipes_message(flags, tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 1", encoding="utf-16")
    with pytest.raises(SystemExit, match="^error: --config .*run.yaml cannot be read: .*utf-8"):
        inspect_recipe.main([sft_llava.__file__, "--config", str(tmp_path / "run.yaml")])


def test_a_strategy_that_the_recipe_refuses_is_odd(flags, report, uncounted):
    odd = lambda strategy: [
        one
        for one in report(sft_llava, flags(load_in_4bit=False), "--gpus", "4", "--strategy", strategy)["odd"]
        if "takes no" in one
    ]
    assert "takes no --deepspeed" in odd("zero3")[0] and "takes no --fsdp" in odd("fsdp")[0] and odd("ddp") == []


def test_what_a_cpu_takes_says_nothing_of_cards(flags, uncounted, capsys):
    inspect_recipe.main([sft_llava.__file__, *flags(), "--no-color"])
    text = capsys.readouterr().out
    assert "Memory of a CPU (--use_cpu), in GB" in text and "GPU" not in text and "Largest batch" not in text


def test_several_threads_of_pytorch(flags, tmp_path):
    """As it has by default: forked processes must not wait for threads that only their parent has."""
    program = "import sys, torch; torch.ones(600_000).add(1); from tools import inspect_recipe; inspect_recipe.main(sys.argv[1:])"
    command = [sys.executable, "-c", program, sft_llava.__file__, "--json", *flags(per_device_train_batch_size=16)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and json.loads(done.stdout)["memory"]["activations"], done.stderr[-2000:]


def test_some_rows_only(flags, report, uncounted):
    found = report(sft_llava, flags(dataset_test_split=None), "--rows", "10")
    assert [(data["rows"], data["looked_at"]) for data in found["data"]] == [(24, 10), (96, 10)]
    assert found["plan"]["rows"] == 96 and found["plan"]["evaluation_rows"] == 24  # of all of them


def test_control_characters_of_the_data_are_written_out(flags, write, images, uncounted, capsys):
    images(1)
    rows = [
        said("<image>\nWhat \x1b[31mis\x00 this?", "red \u202e"),
        said("<image>\nWhat?", "red", image="\x1b[31m.png"),
    ]
    rows[0] |= {"image": "red.png"}
    same = flags(dataset_name=write(rows), image_folder=None, eval_fraction=0, on_bad_rows="skip")
    inspect_recipe.main([str(ROOT / "sft_llava.py"), *same, "--no-color"])
    text = capsys.readouterr().out
    assert (
        "What \\x1b[31mis" in text
        and "\\u202e" in text
        and "\\x1b[31m.png" in text
        and "\x1b" not in text
        and "\u202e" not in text
    )


def test_some_rows_only_where_some_are_held_out(flags, write, images, report, uncounted, capsys):
    rows = write([said("What?", f"number {n}") for n in range(200)])
    plan = report(
        sft_llava, flags(dataset_name=rows, image_folder=None, eval_fraction=0.1, max_eval_rows=15), "--rows", "50"
    )["plan"]
    assert (plan["rows"], plan["evaluation_rows"]) == (180, 15)
    plan = report(sft_llava, flags(dataset_name=rows, image_folder=None, eval_fraction=0.1), "--rows", "50")["plan"]
    assert (plan["rows"], plan["evaluation_rows"]) == (180, 20) and plan["sampled"]
    inspect_recipe.main(
        [
            sft_llava.__file__,
            "--no-color",
            "--rows",
            "50",
            *flags(dataset_name=rows, image_folder=None, eval_fraction=0.1),
        ]
    )
    assert "\nabout 180 rows to train on" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- plan, output


@pytest.mark.parametrize(
    "settings, odd",
    [
        ({"learning_rate": 2e-6}, "learning rate 2e-06 for language model, adapters: unusually low"),
        ({"lora_r": 0, "load_in_4bit": False}, "learning rate 0.0002 for language model, in full: unusually high"),
        (
            {"eval_steps": 1, "save_steps": 1, "sample_rows": 24, "sample_tokens": 256},
            "evaluation takes longer than training",
        ),
        ({"max_steps": 2}, "less than one pass"),
        ({"eval_strategy": "no"}, "nothing will be evaluated"),
        (
            {"eval_steps": 1000, "save_steps": 1000},
            "no evaluation before the end: one comes every 1000 steps, and there are 24",
        ),
        ({"eval_delay": 25}, "no evaluation will happen: --eval_delay is 25, and there are 24 steps"),
        ({"warmup_steps": 100}, "never comes up"),
        ({"gradient_accumulation_steps": 1000}, "a step takes 1000 rows, and there are 96"),
        ({"num_train_epochs": 40}, "40 passes over the data"),
    ],
)
def test_what_is_odd(settings, odd, flags, report, uncounted):
    found = report(sft_llava, flags(**settings))
    assert any(odd in one for one in found["odd"]), found["odd"]


def test_a_sound_run_is_not_odd(flags, report, uncounted, tmp_path):
    found = report(sft_llava, flags(eval_steps=12, save_steps=12, sample_rows=1, sample_tokens=4))
    assert found["odd"] == []
    assert found["plan"] | {"learning_rates": {}} == {
        "rows": 96,
        "evaluation_rows": 24,
        "effective_batch": 4,
        "steps": 24,
        "epochs": 1,
        "evaluations": 2,
        "warmup_steps": 1,
        "learning_rates": {},
        "gpus": 1,
        "would_stop": False,
        "sampled": False,
    }
    assert found["plan"]["learning_rates"] == {"language model, adapters": 2e-4}
    assert not (tmp_path / "out").exists()  # nothing is written


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 5},
        {"eval_strategy": "steps", "eval_steps": 0.3, "save_steps": 0.3, "max_steps": 5},
        {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
            "max_steps": 7,
            "eval_delay": 4,
            "eval_on_start": True,
        },
        {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 5},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 1.5},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 2, "eval_delay": 2},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 3, "warmup_steps": 2},
    ],
    ids=str,
)
def test_the_plan_is_what_the_run_does(settings, flags, report, uncounted, tmp_path):
    """Four steps an epoch: evaluations and warm-up as the trainer's own log has them."""
    settings = {
        "per_device_train_batch_size": 24,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "warmup_steps": 0.3,
        "lr_scheduler_type": "constant_with_warmup",
        "load_best_model_at_end": False,
        "sample_rows": 0,
        "max_eval_rows": 2,
        **settings,
    }
    plan = report(sft_llava, flags(**settings))["plan"]
    sft_llava.main(flags(**settings))
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert plan["evaluations"] == sum("eval_loss" in one for one in log)
    rates = [one["learning_rate"] for one in log if "loss" in one]
    assert (plan["steps"], plan["warmup_steps"]) == (len(rates), sum(rate < 2e-4 for rate in rates))


def test_every_row_is_shown_where_so_many_are_asked_for(flags, report, uncounted):
    found = report(sft_llava, flags(), "--examples", "100")
    assert [one["row"] for one in found["examples"]] == list(range(96))


def test_a_finished_run_is_left_as_it_is(flags, report, uncounted, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trainer_state.json").write_text("{}")
    assert report(sft_llava, flags())["plan"]["steps"] == 24
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["trainer_state.json"]


def test_steps_of_several_gpus(tiny_parts, tmp_path, report, uncounted):
    """llava_two_stage.py makes up its step of 128 rows of the number of GPUs."""
    flags = two_stage_run(tiny_parts, tmp_path / "out", "instruct", gradient_accumulation_steps=None)
    for gpus in (1, 8):
        found = report(llava_two_stage, flags, "--gpus", str(gpus), "--strategy", "zero3")
        assert found["plan"]["effective_batch"] == 128 and found["memory"]["strategy"] == "zero3"
        assert not [one for one in found["odd"] if "takes no" in one]  # its launcher gives it DeepSpeed


def test_joined_parts_with_adapters(tiny_parts, tmp_path, report):
    flags = two_stage_run(
        tiny_parts,
        tmp_path / "out",
        "instruct",
        model_name_or_path=None,
        pretrain_mm_mlp_adapter=tiny_parts / "align",
        lora_r=8,
    )
    found = report(llava_two_stage, flags)
    assert found["parts"]["language model"]["adapters"] == found["parts"]["language model"]["trainable"] > 0
    assert (
        0 < found["parts"]["projector"]["trainable"]
        and found["memory"]["activations"]
        and not (tmp_path / "out").exists()
    )


def test_plain_text_and_colour(flags, uncounted, capsys):
    inspect_recipe.main([sft_llava.__file__, "--no-color", *flags(use_cpu=False)])
    plain = capsys.readouterr().out
    assert "<image> x 16" in plain and "«" in plain and "\x1b[" not in plain
    for section in (
        "Data",
        "as the model sees it",
        "Parameters of",
        "Memory of the GPU",
        "Largest batch that fits",
        "Plan",
        "24 GB",
        "no evaluation before the end",
    ):
        assert section in plain
    found = {
        "data": [],
        "examples": [
            {
                "row": 0,
                "tokens": 3,
                "trained_share": 0.5,
                "sequences": [[{"kind": "text", "text": "[red]q"}, {"kind": "trained", "text": "yes"}]],
            }
        ],
        "parts": {},
        "memory": None,
        "plan": None,
        "odd": [],
    }
    console = inspect_recipe.Console(force_terminal=True, color_system="standard", file=io.StringIO())
    inspect_recipe.show(found, console, colour=True)
    said = console.file.getvalue()
    assert "\x1b[1;32myes" in said and "[red]q" in said and "«" not in said


def test_a_model_that_cannot_be_run_without_content(flags, capsys, monkeypatch):
    def measure(*args):
        raise RuntimeError("it looks at content")

    monkeypatch.setattr(inspect_recipe, "measure", measure)
    inspect_recipe.main([sft_llava.__file__, "--no-color", *flags()])
    said = capsys.readouterr().out
    assert "Activations are not counted" in said and "it looks at content" in said and "frozen weights" in said


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("none.py", None, "no such file"),
        ("bare.py", "x = 1", "is no recipe: it has no Settings, Training"),
        ("broken.py", "def", "cannot be imported as a recipe: SyntaxError"),
        ("raises.py", "1 / 0", "ZeroDivisionError"),
        ("notes.txt", "words", "is no Python file"),
    ],
)
def test_a_file_that_is_no_recipe(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=message) as end:
        inspect_recipe.main([str(tmp_path / name)])
    assert str(end.value.code).startswith("error: ") and "\n" not in end.value.code


@pytest.mark.parametrize(
    "own, settings, message",
    [
        (["--gpus", "0"], {}, "--rows and --gpus must be at least 1"),
        (["--rows", "x"], {}, "--rows"),
        (["--strategy", "tensor"], {}, "invalid choice"),
        ([], {"model_name_or_path": "nowhere"}, "nowhere"),
        ([], {"dataset_name": "nowhere.json"}, "cannot read nowhere.json"),
        ([], {"no_such": 1}, "no_such"),
        ([], {"lora_r": 0}, "not possible in 4 bits"),
        ([], {"max_length": 3}, "no row of .* can be trained on"),
    ],
)
def test_flags_that_cannot_work(own, settings, message, flags):
    with pytest.raises(SystemExit, match=message) as end:
        inspect_recipe.main([sft_llava.__file__, *own, *flags(**settings)])
    assert str(end.value.code).startswith("error: ")


def test_from_the_shell(flags, tmp_path):
    """One message and exit status 1; and a copy of a recipe, anywhere, is one."""
    (tmp_path / "mine.py").write_text(Path(sft_llava.__file__).read_text())
    command = [sys.executable, "tools/inspect_recipe.py", str(tmp_path / "mine.py"), "--json"]
    good = subprocess.run([*command, *flags()], cwd=ROOT, capture_output=True, text=True)
    assert good.returncode == 0 and json.loads(good.stdout)["memory"]["activations"], good.stderr[-2000:]
    bad = subprocess.run([*command, *flags(model_name_or_path="nowhere")], cwd=ROOT, capture_output=True, text=True)
    assert (
        bad.returncode == 1
        and "Traceback" not in bad.stderr
        and [line for line in bad.stderr.splitlines() if line.startswith("error: ")]
    )
