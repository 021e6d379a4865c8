"""tools/merge_adapter.py: the merged folder, loaded alone, is the adapter on its base; what cannot be merged is refused and leaves nothing behind."""

import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, minicpm_run, short_run, two_stage_run
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import dpo_idefics2
import finetune_minicpm_lora
import idefics2_docvqa
import llava_two_stage
import sft_llava
from tools import generate, merge_adapter

SHORT = {
    "max_steps": 2,
    "learning_rate": 0.02,
    "eval_strategy": "no",
    "save_strategy": "no",
    "sample_rows": 0,
    "disable_tqdm": True,
}
SHORT |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}
FLOAT = {"load_in_4bit": False}
# name: recipe, fixture of the model, fixture of the data, settings
RUNS = {
    "llava": (sft_llava, "tiny_llava", None, {**FLOAT, "train_projector": True}),
    "llava, DoRA": (sft_llava, "tiny_llava", None, {**FLOAT, "use_dora": True}),
    "llava, 4-bit": (sft_llava, "tiny_llava", None, {}),
    "llava-next": (sft_llava, "tiny_next", "tiny_llava", {**FLOAT, "train_projector": True}),
    "docvqa": (idefics2_docvqa, "tiny_forms", None, FLOAT),
    "dpo": (dpo_idefics2, "tiny_pairs", None, FLOAT),
    "dpo, llava": (dpo_idefics2, "tiny_llava", "tiny_pairs", FLOAT),
    "dpo, paligemma": (dpo_idefics2, "tiny_paligemma", "tiny_pairs", FLOAT),
    "minicpm 4.6": (finetune_minicpm_lora, "tiny_minicpm", None, {"lora_modules_to_save": "embed_tokens"}),  # tied
    "minicpm 4.6, biases": (finetune_minicpm_lora, "tiny_minicpm", None, {"lora_bias": "all"}),
    "minicpm 4.7": (finetune_minicpm_lora, "tiny_minicpm47", None, {"q_lora": True, "tune_vision": True}),
    "minicpm 2.6": (finetune_minicpm_lora, "tiny_minicpm26", None, {}),
    "two stages": (llava_two_stage, "tiny_parts", None, {"lora_r": 8, "projector_learning_rate": 1e-2}),
    "two stages, joined": (llava_two_stage, "tiny_parts", None, {"lora_r": 8, "pretrain_mm_mlp_adapter": True}),
}


def quietly(main, argv):
    """main(argv) -> what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        main([str(part) for part in argv])
    return text.getvalue()


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """A function: name -> the folder of a short run of that name in RUNS."""

    def make(name):
        recipe, model, data, settings = RUNS[name]
        model, out = request.getfixturevalue(model), tmp_path_factory.mktemp("run") / "out"
        settings = {**SHORT, **settings}
        if recipe is finetune_minicpm_lora:
            flags = minicpm_run(model, out, **settings)
        elif recipe is llava_two_stage:
            if "pretrain_mm_mlp_adapter" in settings:
                settings["pretrain_mm_mlp_adapter"] = model / "align"
            flags = two_stage_run(model, out, "instruct", **settings)
        else:
            flags = short_run(
                model, out, **({"dataset_name": request.getfixturevalue(data) / "data"} if data else {}), **settings
            )
        quietly(recipe.main, flags)
        return out

    return functools.cache(make)


@pytest.fixture(scope="module")
def merged(runs, tmp_path_factory):
    """A function: name -> its run, what merging it printed, and the merged folder."""

    def make(name):
        out = tmp_path_factory.mktemp("merged") / "model"
        text = quietly(merge_adapter.main, [runs(name), out, "--use_cpu"])
        assert {path.name for path in out.parent.iterdir()} == {"model"}
        return SimpleNamespace(run=runs(name), out=out, text=text)

    return functools.cache(make)


# In a process of its own: what stands in the folder, loaded by Transformers alone (2.6: by its repaired code), asked about a row.
ALONE = """
import json, sys, torch
torch.set_num_threads(1)
recipe, folder, saved = __import__(sys.argv[1]), sys.argv[2], sys.argv[3]
inputs, greedy = torch.load(saved, weights_only=False)
if sys.argv[4] == "True":
    model = recipe.load_26(folder, None)
else:
    from transformers import AutoModelForImageTextToText
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
assert "peft" not in type(model).__module__ and not any("lora" in name for name, _ in model.named_parameters())
with torch.inference_mode():
    torch.save([model.eval()(**inputs).logits, model.generate(**greedy)], saved)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_merged_folder_alone_is_the_adapter_on_its_base(merged, name, tmp_path):
    done, (recipe, *_) = merged(name), RUNS[name]
    with contextlib.redirect_stdout(io.StringIO()):
        processor, settings, training = merge_adapter.load_run(recipe, done.run, ["--use_cpu"])
    collator = recipe.Collator(processor, settings, training)
    messages, prompt, what = merge_adapter.example(recipe, collator, settings)
    assert what.startswith("row ") and what in done.text
    model = PeftModel.from_pretrained(recipe.load_model(settings, training), done.run).eval()
    inputs, greedy = merge_adapter.inputs(collator, messages, prompt), collator.tokenize([messages[:1]], prompt=True)
    greedy = {**greedy, "max_new_tokens": 6, "max_length": None, "do_sample": False}
    greedy |= {} if "image_bound" in greedy else {"eos_token_id": collator.stop_ids}
    with torch.inference_mode():
        logits, said = model(**inputs).logits, model.generate(**greedy)
    own = {key: value for key, value in greedy.items() if key != "eos_token_id"}  # where to stop is in the folder
    torch.save([inputs, own], tmp_path / "inputs.pt")
    hub = (done.out / "modeling_minicpmv.py").exists()
    code = [sys.executable, "-c", ALONE, recipe.__name__, done.out, tmp_path / "inputs.pt", hub]
    again = subprocess.run([str(part) for part in code], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    ours, words = torch.load(tmp_path / "inputs.pt", weights_only=False)
    assert (ours - logits).abs().max() < 1e-4 and torch.equal(words, said)
    with torch.inference_mode():
        untouched = recipe.load_model(settings, training)(**inputs).logits
    assert (ours - untouched).abs().max() > 0.1  # the adapter says something else than the base
    assert ("switched off" in done.text) == ("4-bit" in name or "4.7" in name)
    with (done.run / "settings.yaml").open() as file:
        assert (done.out / "settings.yaml").read_text() == file.read()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_it_answers_as_the_adapter_through_generate(merged, name, tmp_path):
    """With no more flags than the run: which recipe, and how it asks, is in the folder."""
    done, (recipe, *_) = merged(name), RUNS[name]
    picture = tmp_path / "picture.png"
    merge_adapter.Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(picture)
    packed = "--load_in_4bit" if hasattr(recipe.Settings, "load_in_4bit") else "--q_lora"
    said = []
    for folder, flags in ((done.run, [packed, "false"]), (done.out, [])):
        generate.main([str(folder), "--image", str(picture), "--question", "What is this?", "--max_new_tokens", "6",
                       "--output", str(tmp_path / "out.jsonl"), "--overwrite", *flags])  # fmt: skip
        said.append((tmp_path / "out.jsonl").read_text())
    assert said[0] == said[1] and json.loads(said[0])["images"] == 1


@pytest.mark.parametrize("name", ["llava", "llava-next", "dpo, paligemma", "two stages"])
def test_weights_have_the_published_names(merged, name):
    with safe_open(merged(name).out / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "language_model.model.embed_tokens.weight",
    } <= names
    starts = (
        "vision_tower.vision_model.",
        "language_model.model.",
        "language_model.lm_head.",
        "multi_modal_projector.",
        "image_newline",
    )
    assert all(key.startswith(starts) for key in names)
    assert ("language_model.lm_head.weight" in names) == (name != "dpo, paligemma")  # tied: it is in the file once


def test_sixteen_bits_are_saved_in_sixteen_bits(runs, tmp_path):
    """What was trained in full, in float32, too; by how much merging changes them is said."""
    text = quietly(merge_adapter.main, [runs("llava"), tmp_path / "model", "--use_cpu", "--bf16", "true"])
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    line = next(line for line in text.splitlines() if line.startswith("merged, they differ"))
    assert " at most, " in line and " on average" in line and "% of " in line


def test_without_the_data_the_example_is_made_up(runs, tmp_path, tiny_llava):
    run = shutil.copytree(runs("llava"), tmp_path / "run")
    (run / "settings.yaml").write_text(
        (run / "settings.yaml").read_text().replace(str(tiny_llava / "data"), "someone/gone")
    )
    text = quietly(merge_adapter.main, [run, tmp_path / "model", "--use_cpu"])
    assert "a made-up picture and question" in text and "loads alone" in text


def test_it_ends_answers_where_the_run_did(merged):
    kept = json.loads((merged("docvqa").out / "generation_config.json").read_text())["eos_token_id"]
    tokens = json.loads((merged("docvqa").out / "tokenizer.json").read_text())["added_tokens"]
    assert {token["id"] for token in tokens if token["content"] in ("<end_of_utterance>", "</s>")} == set(kept)


# ------------------------------------------------------------------------------------------------------------ refusals
def refused(argv, out):
    """The one message that merging ends with; nothing new is beside `out`."""
    before = set(out.parent.iterdir())
    with pytest.raises(SystemExit) as stopped:
        quietly(merge_adapter.main, argv)
    assert (
        str(stopped.value.code).startswith("error: ")
        and "\n" not in stopped.value.code
        and "Traceback" not in stopped.value.code
    )
    assert set(out.parent.iterdir()) == before
    return stopped.value.code


def without(file, run):
    (run / file).unlink()


def renamed_base(run):
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/else"}))


def fewer_layers(run):
    weights = load_file(run / "adapter_model.safetensors")
    save_file(
        {key: value for key, value in weights.items() if ".layers.1." not in key}, run / "adapter_model.safetensors"
    )


def other_width(run):
    weights = load_file(run / "adapter_model.safetensors")
    save_file({key: torch.cat([value, value]) for key, value in weights.items()}, run / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "change, words",
    [
        (functools.partial(without, "adapter_config.json"), ["no adapter"]),
        (functools.partial(without, "adapter_model.safetensors"), ["without its weights (adapter_model.safetensors)"]),
        (functools.partial(without, "processor_config.json"), ["no processor"]),
        (renamed_base, ["someone/else", "tiny_llava", "--model_name_or_path"]),
        (fewer_layers, ["does not fit", "tiny_llava", "of the model only"]),
        (other_width, ["does not fit", "tiny_llava"]),
    ],
)
def test_what_is_no_whole_run_is_named(runs, tmp_path, change, words):
    run = shutil.copytree(runs("llava"), tmp_path / "run")
    change(run)
    message = refused([run, tmp_path / "model", "--use_cpu"], tmp_path / "model")
    assert all(word in message for word in words), message


def test_another_base_is_named(runs, tmp_path, tiny_forms, tiny_llava, capsys):
    """One of another kind; and the same one in another place is none."""
    flags = [runs("llava"), tmp_path / "model", "--use_cpu", "--model_name_or_path"]
    message = refused([*flags, tiny_forms / "model"], tmp_path / "model")
    assert "does not fit" in message and str(tiny_forms) in message and str(tiny_llava / "model") in message
    assert "cannot load nowhere" in refused([*flags, "nowhere"], tmp_path / "model")
    quietly(merge_adapter.main, [*flags, shutil.copytree(tiny_llava / "model", tmp_path / "moved")])
    assert f"trained on {tiny_llava / 'model'}" in capsys.readouterr().err and (tmp_path / "model").is_dir()


def test_a_whole_model_a_folder_that_exists_and_one_that_does_not(runs, tmp_path, tiny_llava):
    out = tmp_path / "model"
    assert "whole model" in refused([tiny_llava / "model", out], out)
    assert "no such folder" in refused([tmp_path / "none", out], out)
    assert "does not exist" in refused([runs("llava"), tmp_path / "none" / "model"], out)
    (out).mkdir()
    assert "exists" in refused([runs("llava"), out], out) and not list(out.iterdir())


def test_no_space_is_found_before(runs, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(merge_adapter.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    monkeypatch.setattr(merge_adapter, "save", None)
    message = refused([runs("llava"), tmp_path / "model", "--use_cpu"], tmp_path / "model")
    assert "no space left" in message and "GB, there are 0.001 GB" in message


@pytest.mark.parametrize("where", ["merged", "saved", "written"])
def test_what_does_not_agree_is_not_kept(runs, tmp_path, monkeypatch, where):
    """A merge that loses the adapter; a folder with other weights; a disk that fills up."""

    def save(model, processor, args, settings, folder, stock=merge_adapter.save):
        if where == "written":
            raise OSError(28, "No space left on device")
        model.get_output_embeddings().weight.data.mul_(1.5)
        stock(model, processor, args, settings, folder)

    if where == "merged":
        monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
        monkeypatch.setattr("peft.tuners.tuners_utils.BaseTuner.merge_and_unload", lambda self, **_: self.unload())
    else:
        monkeypatch.setattr(merge_adapter, "save", save)
    message = refused([runs("llava"), tmp_path / "model", "--use_cpu"], tmp_path / "model")
    assert {"merged": "do not agree", "saved": "is not what was merged", "written": "No space left on device"}[
        where
    ] in message


def test_an_adapter_on_a_tied_matrix_is_refused(tiny_minicpm, tmp_path):
    """Merged into lm_head it would change the embeddings, too."""
    more = {"lora_target_modules": r"lm_head|.*\.q_proj", "projector_learning_rate": 0}
    quietly(finetune_minicpm_lora.main, minicpm_run(tiny_minicpm, tmp_path / "run", **SHORT, **more))
    assert "do not agree" in refused([tmp_path / "run", tmp_path / "model", "--use_cpu"], tmp_path / "model")


def test_a_base_in_four_bits_is_refused(runs, tmp_path, tiny_llava):
    from transformers import BitsAndBytesConfig

    packed = AutoModelForImageTextToText.from_pretrained(tiny_llava / "model", quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"]))  # fmt: skip
    packed.save_pretrained(tmp_path / "packed")
    flags = [runs("llava"), tmp_path / "model", "--use_cpu", "--model_name_or_path", tmp_path / "packed"]
    assert "holds quantized weights" in refused(flags, tmp_path / "model")


def test_code_of_a_repository_becomes_that_of_the_folder(tmp_path):
    """A configuration that names its code by the hub's repository, as downloaded ones do."""
    base, out = tmp_path / "base", tmp_path / "out"
    for folder in (base, out):
        folder.mkdir()
    (base / "modeling_x.py").write_text("")
    (out / "config.json").write_text('{"auto_map": {"AutoModel": "openbmb/MiniCPM-V-2_6--modeling_x.X"}}')
    stand_in = SimpleNamespace(config=SimpleNamespace(model_type="minicpmv"), save_pretrained=lambda _: None)
    settings = SimpleNamespace(model_name_or_path=str(base), model_revision=None, trust_remote_code=True)
    merge_adapter.save(stand_in, stand_in, SimpleNamespace(run=tmp_path), settings, out)
    assert json.loads((out / "config.json").read_text())["auto_map"] == {"AutoModel": "modeling_x.X"}
    assert (out / "modeling_x.py").exists()


def test_as_a_program(runs, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tools" / "merge_adapter.py", runs("llava"), "model", "--use_cpu"],
                          cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})  # fmt: skip
    assert done.returncode == 0 and "saved model" in done.stdout, done.stderr[-2000:]
    assert set(os.listdir(tmp_path)) == {"model"}
