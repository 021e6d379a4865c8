"""tools/merge_adapter.py: the merged folder, loaded alone, is the adapter on its base; what cannot be merged is
refused and leaves nothing behind."""

import contextlib
import functools
import inspect
import io
import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, fresh
from peft import PeftModel
from recipes import FOLDERS, Recipe, minicpm_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaTokenizer,
)

import finetune_minicpm_lora
from tools import generate, merge_adapter

SHORT = {"max_steps": 2, "learning_rate": 0.02, "eval_strategy": "no", "save_strategy": "no", "sample_rows": 0}
SHORT |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, "disable_tqdm": True}
FLOAT = {"load_in_4bit": False}
RUNS = {  # recipe, fixture of the model where it is not the recipe's own, settings
    "llava": ("sft_llava", None, {**FLOAT, "train_projector": True}),
    "llava, DoRA": ("sft_llava", None, {**FLOAT, "use_dora": True}),
    "llava, 4-bit": ("sft_llava", None, {}),
    "llava-next": ("sft_llava", "tiny_next", {**FLOAT, "train_projector": True}),
    "docvqa": ("idefics2_docvqa", None, FLOAT),
    "dpo": ("dpo_idefics2", None, FLOAT),
    "dpo, paligemma": ("dpo_idefics2", "tiny_paligemma", FLOAT),
    "minicpm, tied": ("finetune_minicpm_lora", None, {"lora_modules_to_save": "embed_tokens"}),
    "minicpm, biases": ("finetune_minicpm_lora", None, {"lora_bias": "all"}),
    "minicpm, vision": ("finetune_minicpm_lora", None, {"q_lora": True, "tune_vision": True}),
    "minicpm 2.6": ("finetune_minicpm_lora", "tiny_minicpm26", {"trust_remote_code": True}),
    "two stages": ("llava_two_stage", None, {"lora_r": 8, "projector_learning_rate": 1e-2}),
    "two stages, joined": ("llava_two_stage", None, {"lora_r": 8, "pretrain_mm_mlp_adapter": "align"}),
}


def trust(name):
    """The flag that allows the code of a model that brings its own."""
    return ["--trust_remote_code"] if name == "minicpm 2.6" else []


def quietly(main, *argv):
    """main(argv) -> what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        main([str(part) for part in argv])
    return text.getvalue()


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """A function: a name in RUNS -> the Recipe, whose folder out/ is the run's."""

    def make(name):
        recipe, model, settings = RUNS[name]
        case = Recipe(recipe, request.getfixturevalue(FOLDERS[recipe]), tmp_path_factory.mktemp("run"))
        settings = {**SHORT, **settings}
        if model:
            settings["model_name_or_path"] = request.getfixturevalue(model) / "model"
        if "pretrain_mm_mlp_adapter" in settings:
            settings |= {"pretrain_mm_mlp_adapter": case.folder / "align", "model_name_or_path": None}
        case.run(**settings)
        return case

    return functools.cache(make)


@pytest.fixture(scope="module")
def merged(trained, tmp_path_factory):
    """A function: a name in RUNS -> its case and run, the merged folder, and what merging it printed."""

    def make(name):
        case, out = trained(name), tmp_path_factory.mktemp("merged") / "model"
        text = quietly(merge_adapter.main, case.tmp_path / "out", out, "--use_cpu", *trust(name))
        assert [path.name for path in out.parent.iterdir()] == ["model"]
        return SimpleNamespace(case=case, run=case.tmp_path / "out", out=out, text=text)

    return functools.cache(make)


# What stands in each folder, loaded by Transformers alone (2.6: by its repaired code), asked about a row.
ALONE = """
import sys, torch
torch.set_num_threads(1)
for folder, saved in zip(sys.argv[1::2], sys.argv[2::2]):
    inputs, prompt = torch.load(saved, weights_only=False)
    if "image_bound" in inputs.get("data", inputs):
        import finetune_minicpm_lora
        model = finetune_minicpm_lora.load_26(folder, None)
    else:
        from transformers import AutoModelForImageTextToText
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert "peft" not in type(model).__module__ and not any("lora" in name for name, _ in model.named_parameters())
    with torch.inference_mode():
        torch.save([model.eval()(**inputs).logits, model.generate(**prompt)], saved)
"""


@pytest.fixture(scope="module")
def alone(merged, tmp_path_factory):
    """{name: (merged, logits and answer of the adapter on its base, logits of the base, those of the folder alone)}:
    all merged folders are loaded in one process that knows of no recipe."""
    found, arguments, folder = {}, [], tmp_path_factory.mktemp("alone")
    for number, name in enumerate(RUNS):
        done = merged(name)
        recipe, saved = done.case.module, folder / f"{number}.pt"
        with contextlib.redirect_stdout(io.StringIO()):
            processor, settings, training = merge_adapter.load_run(recipe, done.run, ["--use_cpu", *trust(name)])
        collator = recipe.Collator(processor, settings, training)
        messages, prompt, source = merge_adapter.example(recipe, collator, settings)
        assert source.startswith("row ") and source in done.text
        inputs = merge_adapter.inputs(collator, messages, prompt)
        options = {"max_new_tokens": 6, "max_length": None, "do_sample": False}
        question = {**collator.tokenize([messages[:1]], prompt=True), **options}
        torch.save([inputs, question], saved)  # where to stop is in the folder
        if "image_bound" not in question:
            question["eos_token_id"] = collator.stop_ids
        base = recipe.load_model(settings, training).eval()
        with torch.inference_mode():
            untouched = base(**inputs).logits
            model = PeftModel.from_pretrained(base, done.run).eval()
            found[name] = (done, model(**inputs).logits, model.generate(**question), untouched)
        arguments += [done.out, saved]
    fresh(ALONE, *arguments)
    results = [torch.load(saved, weights_only=False) for saved in arguments[1::2]]
    return {name: (*found[name], *result) for name, result in zip(RUNS, results, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_merged_folder_alone_is_the_adapter_on_its_base(alone, name):
    done, logits, answer, untouched, logits_alone, answer_alone = alone[name]
    assert (logits_alone - logits).abs().max() < 1e-4 and torch.equal(answer_alone, answer)
    assert (logits_alone - untouched).abs().max() > 0.1  # the adapter says something else than the base
    assert ("switched off" in done.text) == (name in ("llava, 4-bit", "minicpm, vision"))
    assert (done.out / "settings.yaml").read_text() == (done.run / "settings.yaml").read_text()


@pytest.mark.parametrize("name", ["llava", "docvqa", "dpo, paligemma", "minicpm, vision", "minicpm 2.6", "two stages"])
def test_it_answers_as_the_adapter_through_generate(merged, name, tmp_path, images):
    """With no more flags than the run, and for code of a model's own: which recipe, and how it asks, is there."""
    images(1)
    done, answers = merged(name), []
    packed = "--load_in_4bit" if hasattr(done.case.module.Settings, "load_in_4bit") else "--q_lora"
    asked = ["--image", tmp_path / "red.png", "--question", "What is this?", "--max_new_tokens", 6, *trust(name)]
    for folder, flags in ((done.run, [packed, "false"]), (done.out, [])):
        quietly(generate.main, folder, *asked, "--output", tmp_path / "out.jsonl", "--overwrite", *flags)
        answers.append((tmp_path / "out.jsonl").read_text())
    assert answers[0] == answers[1] and json.loads(answers[0])["images"] == 1


@pytest.mark.parametrize("name", ["llava", "llava-next", "dpo, paligemma", "two stages"])
def test_weights_have_the_published_names(merged, name):
    with safe_open(merged(name).out / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert "language_model.model.embed_tokens.weight" in names
    starts = ("vision_tower.vision_model.", "language_model.model.", "language_model.lm_head.")
    assert all(key.startswith((*starts, "multi_modal_projector.", "image_newline")) for key in names)
    assert ("language_model.lm_head.weight" in names) == (name != "dpo, paligemma")  # tied: it is in the file once


def test_sixteen_bits_are_saved_in_sixteen_bits(trained, tmp_path):
    """What was trained in full, in float32, too."""
    quietly(merge_adapter.main, run_of(trained), tmp_path / "model", "--use_cpu", "--bf16", "true")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_without_the_data_the_example_is_made_up(trained, tmp_path):
    run = shutil.copytree(run_of(trained), tmp_path / "run")
    text = (run / "settings.yaml").read_text()
    (run / "settings.yaml").write_text(text.replace(str(trained("llava").folder / "data"), "someone/gone"))
    text = quietly(merge_adapter.main, run, tmp_path / "model", "--use_cpu")
    assert "a made-up picture and question" in text and "loads alone" in text


def test_it_ends_answers_where_the_run_did(trained, tmp_path):
    """Though the base knows of no end but the tokenizer's EOS."""
    base = shutil.copytree(trained("docvqa").folder / "model", tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    flags = ["--use_cpu", "--model_name_or_path", base]
    quietly(merge_adapter.main, run_of(trained, "docvqa"), tmp_path / "model", *flags)
    kept = json.loads((tmp_path / "model/generation_config.json").read_text())["eos_token_id"]
    tokens = json.loads((tmp_path / "model/tokenizer.json").read_text())["added_tokens"]
    ends = {token["id"] for token in tokens if token["content"] in ("<end_of_utterance>", "</s>")}
    assert ends == set(kept) and 2 in ends


# ----------------------------------------------------------------------- read by Transformers 4.57 as by today's

OLDER = ROOT / ".venv" / "older" / "bin" / "python"
MODELS = ["llava", "llava-next", "docvqa", "dpo", "dpo, paligemma", "minicpm, tied", "minicpm 2.6", "two stages"]
KNOWN = [name for name in MODELS if "minicpm" not in name]  # 4.57 has no MiniCPM-V 4.6; 2.6's own code needs torch


def tokens_of(folder):
    """What a tokenizer makes of ten texts, and what it says of itself. Transformers 4.57 runs this, too."""
    from transformers import AutoTokenizer

    texts = [
        "Which digit is this?",
        "   three spaces before, two after  ",
        "two\nlines\r\n\n\tand more",
        "Größenänderung: 12,5 µm, dž",
        "e\u0301 is not \u00e9",
        "🙂 👩‍👩‍👧 🇩🇪",
        "שלום עולם, مرحبا",
        "<s>USER: <image>\nWhat?</s><unk><pad> next<eos><bos>",
        "User:<fake_token_around_image><image><fake_token_around_image>What?<end_of_utterance>\nAssistant:",
        "<|im_start|>user\n<image_id>0</image_id><image><|image_pad|></image>What?<|im_end|>\n<|endoftext|>",
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return {
        "ids": ids,
        "ids without BOS": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        "decoded": [tokenizer.decode(row) for row in ids],
        "decoded without special tokens": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "inputs": sorted(tokenizer(texts[0])),
        "special tokens": sorted(tokenizer.all_special_tokens),
        "named tokens": [
            getattr(tokenizer, name, None)
            for name in (
                "bos_token_id",
                "eos_token_id",
                "pad_token_id",
                "unk_token_id",
                "image_token_id",
                "image_token",
            )
        ],
        "sides": [tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length],
        "chat template": tokenizer.chat_template,
    }


def inputs_of(folder):
    """What a processor makes of a picture and a question. Transformers 4.57 runs this, too."""
    import numpy
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    # 4.57's Idefics2Processor does not put the space after the picture that today's does.
    content = [{"type": "image"}, {"type": "text", "text": " Which digit is this?"}]
    text = "Which digit is this?"
    if processor.chat_template:
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = Image.effect_mandelbrot((90, 50), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    inputs = processor(text=text, images=[picture], return_tensors="np")
    return {
        "image token": [processor.image_token, processor.image_token_id],
        "ids": inputs["input_ids"].tolist(),
        "pixels": numpy.asarray(inputs["pixel_values"]).round(4).tolist(),
    }


def rope_of(folder):
    """The language model's rope_theta and, where it is scaled, how. Transformers 4.57 runs this, too."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder).get_text_config()
    if transformers.__version__.startswith("4."):  # it keeps rope_parameters, too, but turns by these
        rope = {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}
    else:
        rope = config.rope_parameters
    return {name: value for name, value in rope.items() if (name, value) != ("rope_type", "default")}


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """Two folders with a configuration: as Mistral's in LLaVA-NeXT, and scaled as Llama 3.1's."""
    folders = []
    for rope in (
        {"rope_type": "default", "rope_theta": 1e6},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ):
        folders.append(tmp_path_factory.mktemp("longer"))
        text = {"model_type": "llama", "rope_parameters": rope}
        AutoConfig.for_model("llava", text_config=text).save_pretrained(folders[-1])
        assert json.loads((folders[-1] / "config.json").read_text())["text_config"]["rope_parameters"] == rope
        (folders[-1] / "tokenizer_config.json").write_text("{}")
        merge_adapter.make_readable_by_transformers_4(folders[-1], SimpleNamespace(is_fast=False))
    return folders


@pytest.fixture(scope="module")
def older(merged, longer, tmp_path_factory):
    """{name of a function above: {folder: what it returns in Transformers 4.57}}, or what it failed with. One process
    is asked for all."""
    if not OLDER.exists():
        pytest.skip("no Transformers 4.57 to compare with: make .venv/older/done")
    known = [merged(name).out for name in KNOWN]
    tasks = {"tokens_of": [merged(name).out for name in MODELS], "inputs_of": known, "rope_of": [*known, *longer]}
    code = [inspect.getsource(function) for function in (tokens_of, inputs_of, rope_of)]
    code.append("""
import json, sys
def answer(name, folder):
    try:
        return globals()[name](folder)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
tasks = json.loads(sys.argv[1])
print(json.dumps({name: {folder: answer(name, folder) for folder in tasks[name]} for name in tasks}))
""")
    argv = [OLDER, "-c", "\n".join(code), json.dumps(tasks, default=str)]
    modules = str(tmp_path_factory.mktemp("modules"))  # the two keep copies of a model's code in other forms
    done = subprocess.run(
        argv, cwd=modules, env={**os.environ, "HF_MODULES_CACHE": modules}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_4_reads_the_same_tokens(merged, older, name):
    out = merged(name).out
    assert older["tokens_of"][str(out)] == tokens_of(out)


@pytest.mark.parametrize("name", KNOWN)
def test_transformers_4_makes_the_same_inputs(merged, older, name):
    out = merged(name).out
    assert older["inputs_of"][str(out)] == inputs_of(out)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_for_transformers_4_changes_nothing_today(merged, name):
    """The tokenizer is the run's, whose files were written by today's Transformers alone."""
    done = merged(name)
    assert tokens_of(done.out) == tokens_of(done.run)
    written = json.loads((done.out / "tokenizer_config.json").read_text())
    assert written.get("add_prefix_space", False) is not None  # llama.cpp's converter takes null for false
    assert (written["tokenizer_class"] == "PreTrainedTokenizerFast") == (name != "minicpm 2.6")


def test_what_a_tokenizers_class_implies_is_written(tmp_path):
    """LlamaTokenizer pads on the left."""
    tokenizer = LlamaTokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert "padding_side" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    merge_adapter.name_tokens_for_transformers_4(tmp_path, tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == tokenizer.padding_side == "left"


def test_transformers_4_turns_by_the_same_angles(merged, older, longer):
    folders = [*(merged(name).out for name in KNOWN), *longer]
    assert [older["rope_of"][str(folder)] for folder in folders] == [rope_of(folder) for folder in folders]
    assert [rope_of(folder)["rope_theta"] for folder in longer] == [1e6, 5e5]


# ------------------------------------------------------------------------------------------------------------ refusals


def run_of(trained, name="llava"):
    return trained(name).tmp_path / "out"


def refusal(run, out, *flags):
    """The one message that merging ends with; nothing new is beside `out`."""
    before = set(out.parent.iterdir())
    with pytest.raises(SystemExit) as stopped:
        quietly(merge_adapter.main, run, out, "--use_cpu", *flags)
    message = stopped.value.code
    assert message.startswith("error: ") and "\n" not in message and "Traceback" not in message
    assert set(out.parent.iterdir()) == before
    return message


def test_an_adapter_that_does_not_fit_is_named(trained, tmp_path):
    run = shutil.copytree(run_of(trained), tmp_path / "run")
    weights = load_file(run / "adapter_model.safetensors")
    save_file({key: torch.cat([value, value]) for key, value in weights.items()}, run / "adapter_model.safetensors")
    message = refusal(run, tmp_path / "model")
    assert "does not fit" in message and "tiny_llava" in message and "size mismatch" in message


def test_a_whole_model_a_folder_that_exists_and_one_that_does_not(trained, tmp_path, tiny_llava):
    out = tmp_path / "model"
    assert "whole model" in refusal(tiny_llava / "model", out)
    assert "no such folder" in refusal(tmp_path / "none", out)
    with pytest.raises(SystemExit, match="^error: .*its folder does not exist"):
        merge_adapter.main([str(run_of(trained)), str(tmp_path / "none/model")])
    assert "cannot load nowhere" in refusal(run_of(trained), out, "--model_name_or_path", "nowhere")
    out.mkdir()
    assert "exists" in refusal(run_of(trained), out) and not list(out.iterdir())


def test_no_space_is_found_before(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_adapter.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    monkeypatch.setattr(merge_adapter, "put_on", None)
    message = refusal(run_of(trained), tmp_path / "model")
    assert "no space left" in message and "GB, there are 0.001 GB" in message


@pytest.mark.parametrize("where", ["do not agree", "is not what was merged", "No space left on device"])
def test_what_does_not_agree_is_not_kept(trained, tmp_path, monkeypatch, where):
    """A merge that loses the adapter; a folder with other weights; a disk that fills up."""

    def save(model, processor, args, settings, folder, stock=merge_adapter.save):
        if where == "No space left on device":
            raise OSError(28, where)
        model.get_output_embeddings().weight.data.mul_(1.5)
        stock(model, processor, args, settings, folder)

    if where == "do not agree":
        monkeypatch.setattr("peft.tuners.tuners_utils.BaseTuner.merge_and_unload", lambda self, **_: self.unload())
    else:
        monkeypatch.setattr(merge_adapter, "save", save)
    assert where in refusal(run_of(trained), tmp_path / "model")


def test_an_adapter_on_a_tied_matrix_is_refused(tiny_minicpm, tmp_path):
    """Merged into lm_head it would change the embeddings, too."""
    more = {"lora_target_modules": r"lm_head|.*\.q_proj", "projector_learning_rate": 0}
    quietly(finetune_minicpm_lora.main, *minicpm_run(tiny_minicpm, tmp_path / "run", **SHORT, **more))
    assert "do not agree" in refusal(tmp_path / "run", tmp_path / "model")


def test_a_base_in_four_bits_is_refused(trained, tmp_path, tiny_llava):
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "model.vision_tower"])
    packed = AutoModelForImageTextToText.from_pretrained(tiny_llava / "model", quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    flags = ["--model_name_or_path", tmp_path / "packed"]
    assert "holds quantized weights" in refusal(run_of(trained), tmp_path / "model", *flags)


def test_code_of_a_repository_becomes_that_of_the_folder(tmp_path):
    """A configuration that names its code by the hub's repository, as downloaded ones do."""
    base, out = tmp_path / "base", tmp_path / "out"
    for folder in (base, out):
        folder.mkdir()
    (base / "modeling_x.py").write_text("")
    (out / "config.json").write_text('{"auto_map": {"AutoModel": "openbmb/MiniCPM-V-2_6--modeling_x.X"}}')
    merge_adapter.copy_code(str(base), None, out)
    assert json.loads((out / "config.json").read_text())["auto_map"] == {"AutoModel": "modeling_x.X"}
    assert (out / "modeling_x.py").exists()
