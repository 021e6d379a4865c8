"""tools/inspect_recipe.py: its counts are the published ones, its memory is what a step really takes, its examples are what is trained on."""

import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from conftest import ROOT, minicpm_run, said, short_run, two_stage_run
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import dpo_idefics2
import finetune_minicpm_lora
import idefics2_docvqa
import llava_two_stage
import sft_llava
from tiny import llava, preferences
from tools import inspect_recipe

LLAVA_7B = {
    "model_type": "llava", "image_seq_length": 576, "tie_word_embeddings": False,
    "text_config": {"model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336, "num_attention_heads": 16,
                      "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000}}
IDEFICS2_8B = {
    "model_type": "idefics2", "tie_word_embeddings": False,
    "text_config": {"model_type": "mistral", "vocab_size": 32003, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "pad_token_id": 0},
    "vision_config": {"hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14},
    "perceiver_config": {"resampler_n_latents": 64, "resampler_depth": 3, "resampler_n_heads": 16, "resampler_head_dim": 96, "num_key_value_heads": 4,
                         "hidden_size": 4096}}
MINICPM_26 = {
    "vocab_size": 151666, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "max_window_layers": 28, "query_num": 64, "image_size": 980, "layer_types": None,
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "num_hidden_layers": 27,
                      "num_attention_heads": 16, "patch_size": 14}}


@pytest.fixture
def report(capsys):
    """A function: recipe, its flags, own flags -> the report as --json prints it."""

    def make(recipe, flags, *own):
        capsys.readouterr()
        inspect_recipe.main([recipe.__file__, "--json", *own, *flags])
        return json.loads(capsys.readouterr().out)

    return make


@pytest.fixture
def uncounted(monkeypatch):
    """Activations are not counted, which is what takes the time."""
    monkeypatch.setattr(inspect_recipe, "measure", lambda trainer, rows, batch: {kind: (batch * 10**9, 10**9) for kind in (True, False)})


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


@pytest.mark.parametrize("recipe, tiny, config, settings, trained, total", [
    (sft_llava, "tiny_llava", LLAVA_7B, {}, 39_976_960, 7_103_404_032),
    (sft_llava, "tiny_llava", LLAVA_7B, {"use_dora": True}, 41_336_832, 7_104_763_904),
    (dpo_idefics2, "tiny_pairs", IDEFICS2_8B, {}, 55_348_736, 8_458_116_848),
    (idefics2_docvqa, "tiny_forms", IDEFICS2_8B, {}, 7_589_912, 8_410_358_024),
    (finetune_minicpm_lora, "tiny_minicpm26", MINICPM_26,
     {"lora_r": 64, "lora_target_modules": r"llm\..*\.(q|k|v)_proj", "lora_modules_to_save": "embed_tokens", "tune_vision": True}, 1_057_507_568, 9_156_682_720),
])
def test_parameters_are_the_published_ones(recipe, tiny, config, settings, trained, total, request, tmp_path, report, uncounted):
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

    class Stop(Exception):
        pass

    def stop(trainer, *args, **kwargs):
        raise Stop(trainer)

    with patch.object(transformers.Trainer, "train", stop), contextlib.redirect_stdout(io.StringIO()), pytest.raises(Stop) as stopped:
        recipe.main(flags)
    trainer = stopped.value.args[0]
    if trainer.args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable()
    rows, trainer.current_gradient_accumulation_steps = trainer.train_dataset, 1
    order = sorted(range(len(rows)), key=lambda n: -rows[n]["length"])[: trainer.args.per_device_train_batch_size]
    for _ in range(2):
        inputs = dict(trainer.data_collator([rows[n] for n in order]))
        given = sum(value.nbytes for value in inspect_recipe.tensors(inputs))
        items = torch.tensor(int((inputs["labels"] != -100).sum())) if "labels" in inputs else None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            trainer.training_step(trainer.model, inputs, items)
    events = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    now, peak = 0, 0
    for _, size in events:
        now += size
        peak = max(peak, now)
    return peak + given


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
            for name, value in {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": keys,
                                "head_dim": 64}.items():
                setattr(text, name, value)
            vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers = 256, 1024, 6
            AutoModelForImageTextToText.from_config(config).save_pretrained(made[tiny] / "model")
            AutoProcessor.from_pretrained(tiny / "model").save_pretrained(made[tiny] / "model")
            (made[tiny] / "data").symlink_to(tiny / "data")
        return made[tiny]

    return make


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("recipe, tiny, large, settings", [
    (sft_llava, "tiny_llava", False, {}),
    (sft_llava, "tiny_llava", True, {}),
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
])
def test_activations_are_those_of_a_step(recipe, tiny, large, settings, checkpointing, request, middle, tmp_path, report):
    folder = request.getfixturevalue(tiny)
    folder = middle(folder) if large else folder
    own = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1, "activation_checkpointing": checkpointing, "eval_fraction": 0.1}
    settings = {**own, **settings}
    if settings.get("dataset_name"):
        settings["dataset_name"] = request.getfixturevalue(settings["dataset_name"]) / "data"
    run = {finetune_minicpm_lora: minicpm_run, llava_two_stage: two_stage_run}.get(recipe, short_run)
    flags = run(folder, tmp_path / "out", **settings)
    truth = measured(recipe, flags)
    found = report(recipe, flags, "--examples", "0")["memory"]
    assert found["activations"], found["not_counted"]
    estimate = found["activations"][f"{'with' if checkpointing else 'without'}_checkpointing"]["bytes"]
    print(f"\n{recipe.__name__} {tiny} {settings}: measured {truth / 1e6:.2f} MB, counted {estimate / 1e6:.2f} MB, {estimate / truth - 1:+.1%}")
    assert abs(estimate / truth - 1) < 0.15
