"""tiny/: its models, processors and templates are the public ones in small, and the same in every process; the
stand-in for MiniCPM-V 2.6 has the original's defects."""

import inspect
import json
import re
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import fresh
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

from tiny import __main__ as command
from tiny import digits, idefics2, llava, minicpm, minicpm26, preferences, two_stage

INK, _ = digits.load()
MINICPM = ["minicpmv4_6", "minicpmv4_7"]
CAPTIONS = {"captions": 48, "captions-test": 297}
FAMILIES = {  # name of the classes, millions of parameters, what a build holds, rows in its json/
    "llava": ("Llava", 0.9, "model data json", {"train": 64, "test": 1061}),
    "llava_next": ("LlavaNext", 0.9, "model", {}),
    "idefics2": ("Idefics2", 1.4, "model data json", {"train": 64, "test": 560}),
    "idefics2_dpo": ("Idefics2", 1.4, "model data json amber", {"train": 64, "test": 891}),
    "minicpmv4_6": ("MiniCPMV4_6", 0.5, "model json", {"train": 64, "test": 1241, "shuffled": 891}),
    "minicpmv4_7": ("MiniCPMV4_7", 0.5, "model json", {"train": 64, "test": 1241, "shuffled": 891}),
    "llava_two_stage": ("", 0, "vision language json", {"train": 53, "test": 961} | CAPTIONS),
}


def build_all(out):
    """Every family in a folder of its own, trained for 3 steps, with 64 rows to train on.

    A new process gets these lines as they stand here.
    """
    from functools import partial
    from pathlib import Path
    from unittest.mock import patch

    from tiny import __main__ as command
    from tiny import idefics2, llava, minicpm, minicpm26, preferences, two_stage

    modules = dict.fromkeys(["llava", "llava_next"], llava) | {"idefics2": idefics2, "idefics2_dpo": preferences}
    modules |= dict.fromkeys(["minicpmv4_6", "minicpmv4_7"], minicpm) | {"llava_two_stage": two_stage}
    for family, module in modules.items():
        fewer = {"caption_rows": 48} if module is two_stage else {}
        steps = ["--base_steps", "3"] if family in command.STEPS else []
        with patch.object(module, "build", partial(module.build, train_rows=64, **fewer)):
            command.main([family, "--out", f"{out}/{family}", "--seed", "3", *steps])
    minicpm26.build(Path(out, "minicpm26"), seed=3)


class Built(NamedTuple):
    here: Path  # every family's build
    there: Path  # the same from another process
    printed: str  # at the end of that process


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    here, there, saved = (tmp_path_factory.mktemp(name) for name in ("here", "there", "saved"))
    build_all(here)
    AutoProcessor.from_pretrained(here / "minicpm26/model", trust_remote_code=True).save_pretrained(saved)
    code = f"""{inspect.getsource(build_all)}
import sys
from transformers import AutoProcessor
build_all(sys.argv[1])
print(AutoProcessor.from_pretrained(sys.argv[2], trust_remote_code=True)(["a"], [[]])["input_ids"].tolist())"""
    return Built(here, there, fresh(code, there, saved))


def load(folder):
    """(processor, model) of a model directory."""
    processor = (minicpm.processor_from if "minicpm" in str(folder) else AutoProcessor.from_pretrained)(folder)
    return processor, AutoModelForImageTextToText.from_pretrained(folder)


def processor_of(family):
    """The processor as it is made, not saved."""
    if family in MINICPM:
        return minicpm.processor(family)
    own = {"idefics2": idefics2.processor, "idefics2_dpo": preferences.processor}
    return own[family]() if family in own else llava.processor(family)


def millions(net):
    """How many parameters it has."""
    return sum(weight.numel() for weight in net.parameters()) / 1e6


def drawn(n=4):
    return digits.draw(INK[:n])


# ---------------------------------------------------------------- builds


@pytest.mark.parametrize("family", [*FAMILIES, "minicpm26"])
def test_a_build_is_the_same_in_another_process_and_made_once(built, family, capsys):
    outs = built.here / family, built.there / family
    if family in FAMILIES:
        steps = ["--base_steps", "3"] if family in command.STEPS else []
        command.main([family, "--out", str(outs[0]), "--seed", "3", *steps])
        assert "built already" in capsys.readouterr().out
    here, there = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} for out in outs
    )
    assert here.keys() == there.keys() and not [name for name in here if here[name] != there[name]]
    folders = FAMILIES[family][2].split() if family in FAMILIES else ["model"]
    assert {name.parts[0] for name in here} - {"built.json"} == set(folders)


def images_of(row):
    """The picture files that a row of any of the JSON schemas names."""
    image = row.get("image", [])
    return [image] if isinstance(image, str) else list(image.values() if isinstance(image, dict) else image)


@pytest.mark.parametrize("family", [family for family in FAMILIES if FAMILIES[family][3]])
def test_a_build_has_the_rows_and_just_their_pictures(built, family):
    folder = built.here / family / "json"
    rows = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert {name: len(some) for name, some in rows.items()} == FAMILIES[family][3]
    shuffled = rows.pop("shuffled", [])
    named = [name for some in rows.values() for row in some for name in images_of(row)]
    assert len(set(named)) == len(named) and set(named) == {path.name for path in (folder / "images").iterdir()}
    own = {row["id"]: row.get("image") for row in rows["test"]}
    assert all(row["image"] != own[row["id"]] for row in shuffled)
    assert len({row["image"] for row in shuffled}) == len(shuffled)


# ---------------------------------------------------------------- what is saved


@pytest.mark.parametrize("family", [family for family in FAMILIES if FAMILIES[family][0]])
def test_saved_model_and_processor_are_of_the_public_classes(built, family):
    (saved, net), own, (name, size, *_) = load(built.here / family / "model"), processor_of(family), FAMILIES[family]
    assert (type(saved).__name__, type(net).__name__) == (f"{name}Processor", f"{name}ForConditionalGeneration")
    assert json.loads((built.here / family / "model/config.json").read_text())["model_type"] == net.config.model_type
    assert millions(net) == pytest.approx(size, abs=0.07)
    assert saved.chat_template == own.chat_template
    assert saved.image_processor.to_dict() == own.image_processor.to_dict()
    tok, config = saved.tokenizer, net.config
    assert tok.get_vocab() == own.tokenizer.get_vocab() and len(tok) == config.text_config.vocab_size
    image = "<|image_pad|>" if family in MINICPM else "<image>"
    assert tok.convert_tokens_to_ids(image) == saved.image_token_id == config.image_token_id
    assert (tok("four")["input_ids"][0] == tok.bos_token_id) == (family not in MINICPM)
    stops = {"llava": ["</s>"], "llava_next": ["</s>"]} | dict.fromkeys(MINICPM, ["<|endoftext|>", "<|im_end|>"])
    stops = stops.get(family, ["<end_of_utterance>", "</s>"])
    assert np.atleast_1d(net.generation_config.eos_token_id).tolist() == tok.convert_tokens_to_ids(stops)
    if "idefics2" in family:
        assert config.text_config.model_type == "mistral" and tok.padding_side == "left"
        assert saved.image_seq_len == config.perceiver_config.resampler_n_latents
    texts = ["ASSISTANT: four, a größe 好", "Assistant: Total: 47"]
    if family == "idefics2_dpo":
        texts += [*preferences.KIND, *preferences.FACT["describe"]]
    for text in texts:
        assert tok.decode(tok(text)["input_ids"], skip_special_tokens=True).strip() == text


@pytest.mark.parametrize("family", MINICPM)
def test_minicpm_is_saved_without_torchvision_as_it_is_with_it(built, family, tmp_path, monkeypatch):
    folder = built.here / family / "model"
    monkeypatch.setattr(VIDEO_PROCESSOR_MAPPING, "_extra_content", {})  # what a recipe in this process registered
    with pytest.raises(ImportError, match="Torchvision"):  # when this no longer holds, processor_from can go
        AutoProcessor.from_pretrained(folder)
    minicpm.processor_from(folder).save_pretrained(tmp_path)
    for file in ("chat_template.jinja", "processor_config.json", "tokenizer.json"):
        assert (tmp_path / file).read_text() == (folder / file).read_text()
    written = json.loads((folder / "processor_config.json").read_text())  # what AutoProcessor would go by
    assert written["processor_class"] == f"{FAMILIES[family][0]}Processor"
    assert written["video_processor"]["video_processor_type"] == "MiniCPMV4_6VideoProcessor"


def test_the_two_parts_are_clip_and_vicuna_in_small(built):
    vision, language = (built.here / "llava_two_stage" / part for part in ("vision", "language"))
    eyes, words = AutoModel.from_pretrained(vision), AutoModelForCausalLM.from_pretrained(language)
    assert (type(eyes).__name__, type(words).__name__) == ("CLIPVisionModel", "LlamaForCausalLM")
    assert [millions(eyes), millions(words)] == pytest.approx([0.5, 0.4], abs=0.07)
    tok = AutoTokenizer.from_pretrained(language)
    assert (tok.pad_token, tok.bos_token, tok.eos_token) == ("<unk>", "<s>", "</s>") and tok.padding_side == "right"
    assert (tok.pad_token_id, tok.bos_token_id, tok.eos_token_id) == (0, 1, 2) and "<image>" not in tok.get_vocab()
    assert words.config.vocab_size == len(tok) == max(tok.get_vocab().values()) + 1
    assert words.generation_config.eos_token_id == tok.eos_token_id
    ids = tok(two_stage.chat([("Which digit is this?", "seven"), ("Even or odd?", "odd")])).input_ids
    assert ids.count(tok.eos_token_id) == 2 and tok.bos_token_id not in ids[1:]
    caption = tok.convert_ids_to_tokens(tok(f"{two_stage.caption(7)}\n").input_ids)
    assert caption == ["<s>", "▁a", "▁handwritten", "▁seven", ",", "▁an", "▁odd", "▁digit", "<0x0A>"]


# ---------------------------------------------------------------- what goes in, and what is trained


def test_pixels_of_the_base_are_those_of_the_processor():
    shown = drawn(2)
    pages = torch.cat([shown, shown.flip(1)], 2)  # 112 x 56, as pages are: not resized
    for images in (llava.processor().image_processor, two_stage.image_processor()):
        made = images([digits.to_pil(picture) for picture in shown], return_tensors="pt")["pixel_values"]
        assert torch.allclose(made, llava.pixels(shown), atol=1e-6)
    for proc, some in ((idefics2.processor(), pages), (preferences.processor(), shown)):
        images = [[digits.to_pil(picture)] for picture in some]
        made = proc.image_processor(images, do_image_splitting=False, return_tensors="pt")["pixel_values"]
        assert torch.allclose(made, idefics2.pixels(some), atol=1e-6)


ENDS = {  # what stands before an answer and after it
    "llava": (" ASSISTANT: ", "</s>"),
    "idefics2": ("<end_of_utterance>\nAssistant: ", "<end_of_utterance>"),
    "minicpmv4_6": ("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>"),
}


@pytest.mark.parametrize("family", ENDS)
def test_what_is_trained_of_a_lesson_is_its_answer(family):
    proc, (header, end) = processor_of(family), ENDS[family]
    if family == "llava":
        told = [llava.counting(7), llava.captions(7, 2)[1]]
        rows = [llava.render(proc, images, *lesson) for images, lesson in zip((0, 2), told)]
        rows = [(torch.tensor(ids), torch.tensor([-100] * n + ids[n:])) for ids, n in rows]
    else:
        if family == "idefics2":
            some = idefics2.lessons({"fields": [{"name": "Total", "value": "47"}]})
            told = [(asked, said) for _, asked, said in some]
            batch = idefics2.batch(proc, drawn(3), some)
        else:
            told = [("Which digit is this?", "zero"), ("What follows four?", "five")]
            batch = minicpm.batch(proc, [([drawn()[0]], *told[0]), ([], *told[1])])
        assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == proc.tokenizer.pad_token_id)
        rows = zip(batch["input_ids"], batch["labels"])
    for (ids, labels), (asked, said) in zip(rows, told, strict=True):
        assert proc.tokenizer.decode(ids).endswith(f"{asked}{header}{said}{end}")
        assert proc.tokenizer.decode(labels[labels >= 0]).strip(" ") == f"{said}{end}"
        assert torch.equal(labels[labels >= 0], ids[labels >= 0])


def test_tokens_and_template_of_minicpm_are_the_public_ones():
    proc = minicpm.processor()
    tok = proc.tokenizer
    for token in minicpm.TOKENS:
        assert tok.tokenize(f"a{token}b") == ["a", token, "b"]
    assert (tok.bos_token, tok.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tok.pad_token, tok.unk_token) == ("<|endoftext|>", "<unk>")
    assert tok.tokenize("</think>\n\nfour") == ["</think>", "ĊĊ", "four"] and len(tok("\n")["input_ids"]) == 1
    assert tok("four")["input_ids"] == [tok.convert_tokens_to_ids("four")]  # no BOS
    assert tok.decode(tok("<think>four<|im_end|>")["input_ids"], skip_special_tokens=True) == "<think>four"
    content = [{"type": "image"}, {"type": "text", "text": "Which digit is this? "}]
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": " four "}]},
        {"role": "user", "content": "<|image_pad|> vs <|image_pad|>: even?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nno"},
    ]
    asked = "<|im_start|>system\nBe brief.<|im_end|>\n"
    asked += "<|im_start|>user\n<|image_pad|>\nWhich digit is this?<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n"
    asked += "<|im_start|>user\n<|image_pad|> vs <|image_pad|>: even?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    render = proc.apply_chat_template
    assert render(said) == f"{asked}hm\n</think>\n\nno<|im_end|>\n"  # thoughts stand before the last answer only
    assert render(said[:4], add_generation_prompt=True) == f"{asked}\n</think>\n\n"
    assert render(said[:4], add_generation_prompt=True, enable_thinking=True) == asked
    said[4] = said[4] | {"content": "no"}
    assert render(said).startswith(render(said[:4], add_generation_prompt=True))
    assert render(said[:3] + said[1:3]).count("<think>") == 1  # the same question once more


@pytest.mark.parametrize("family", MINICPM)
def test_large_pictures_are_sliced_for_minicpm(family):
    proc = minicpm.processor(family)
    strip = digits.to_pil(minicpm.strip(drawn(2)))
    square = digits.to_pil(minicpm.page(drawn(1)[0], quarter=2))
    part = "<slice><|image_pad|></slice>"
    for image, most, slices in ((strip, 9, part * 2), (square, 9, f"{part * 2}\n{part * 2}"), (strip, 1, "")):
        inputs = proc(text=["<|image_pad|>\nfour"], images=[image], max_slice_nums=most)
        text = re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", proc.tokenizer.decode(inputs["input_ids"][0]))
        assert text == f"<image_id>0</image_id><image><|image_pad|></image>{slices}\nfour"
    inputs = proc(text=["<|image_pad|>"], images=[strip])
    halves = proc.image_processor([digits.to_pil(half) for half in drawn(2)], return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"][..., 16 * 14 :], halves)  # each slice is a digit, not resized


# ---------------------------------------------------------------- the stand-in for MiniCPM-V 2.6: what is broken
# More of it, each beside its repair, is in test_finetune_minicpm_lora.py.


@pytest.fixture(scope="module")
def folder26(built):
    return str(built.here / "minicpm26/model")


@pytest.fixture(scope="module")
def processor26(folder26):
    return AutoProcessor.from_pretrained(folder26, trust_remote_code=True)


def load26(folder):
    """The model, repaired so far that it loads and has its positions."""
    with minicpm26.importable():
        code = get_class_from_dynamic_module("modeling_minicpmv.MiniCPMV", folder)

    class MiniCPMV(code):
        def __init__(self, config):
            super().__init__(config)
            self.post_init()

    model = MiniCPMV.from_pretrained(folder, dtype=torch.float32)
    model.resampler._set_2d_pos_cache(model.resampler.max_size)
    return model


def batch26(processor, text="Which digit is this?"):
    """A row with a small picture and one with a large, as the model takes them."""
    turns = [{"role": "user", "content": f"(<image>./</image>)\n{text}"}]
    prompt = processor.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    made = processor([prompt] * 2, [[Image.new("RGB", size, "red")] for size in ((50, 50), (200, 90))])
    made.pop("image_sizes")  # the model does not take them
    return {**made, "position_ids": (made["attention_mask"].long().cumsum(1) - 1).clamp(min=0)}


def test_26_does_not_load_as_it_is(folder26, monkeypatch):
    with pytest.raises(NameError, match="'List' is not defined"):  # torch.nn.functional has no such name any more
        runpy.run_path(f"{folder26}/resampler.py")
    with monkeypatch.context() as patch, pytest.raises(ImportError, match="torchvision"):
        patch.setitem(sys.modules, "torchvision", None)  # not there, even where it is installed
        AutoModel.from_pretrained(folder26, trust_remote_code=True)
    with minicpm26.importable(), pytest.raises(AttributeError, match="all_tied_weights_keys"):  # no post_init()
        AutoModel.from_pretrained(folder26, trust_remote_code=True)
    assert not hasattr(torch.nn.functional, "List")  # what the import needed is taken away again


def test_26_shows_the_trainer_no_labels_and_peft_no_causal_model(folder26):
    model = load26(folder26)
    assert list(inspect.signature(type(model).forward).parameters) == ["self", "data", "kwargs"]
    with pytest.raises(AttributeError, match="prepare_inputs_for_generation"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


def test_processor_of_26_hides_token_0_which_is_an_exclamation_mark(processor26):
    made = batch26(processor26, text="Seven!")
    ids, mask = made["input_ids"], made["attention_mask"]
    assert processor26.tokenizer.convert_tokens_to_ids("!") == 0 and torch.equal(mask, ids != 0)
    assert not mask[1].all() and mask[1, 0]  # the longest row has no padding
    with pytest.raises(TypeError):  # without pictures it knows no rows
        processor26(["no picture"])
    assert processor26(["no picture"], [[]])["pixel_values"] == [[]]


# ---------------------------------------------------------------- and what works


def test_26_as_loaded_is_what_was_built(folder26, processor26, built):
    config = json.loads((built.here / "minicpm26/model/config.json").read_text())
    code = {"AutoConfig": "configuration_minicpm.MiniCPMVConfig", "AutoModel": "modeling_minicpmv.MiniCPMV"}
    assert (config["auto_map"], config["model_type"], config["architectures"]) == (code, "minicpmv", ["MiniCPMV"])
    made, model = batch26(processor26), load26(folder26).eval()
    names = [type(part).__name__ for part in (model, processor26, processor26.image_processor, processor26.tokenizer)]
    assert names == ["MiniCPMV", "MiniCPMVProcessor", "MiniCPMVImageProcessor", "MiniCPMVTokenizerFast"]

    def logits(net):
        with torch.no_grad():
            return net(data=made, attention_mask=made["attention_mask"]).logits

    random = [minicpm26.model(minicpm26.tokenizer(), seed) for seed in (3, 4)]
    assert [torch.equal(logits(net), logits(model)) for net in random] == [True, False]
    printed = json.loads(built.printed.splitlines()[-1])  # by a process that read the processor as saved elsewhere
    assert printed == processor26(["a"], [[]])["input_ids"].tolist()


def test_a_picture_becomes_slices_and_tokens_for_26(processor26):
    made = batch26(processor26)
    assert [len(row) for row in made["pixel_values"]] == [1, 7]
    assert made["tgt_sizes"][1].tolist() == [[3, 6]] + [[3, 5]] * 6
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    user = f"<|im_start|>user\n<image_id>0</image_id><image>{'<unk>' * 8}</image>\nWhich digit is this?<|im_end|>\n"
    text = processor26.tokenizer.decode(made["input_ids"][0][made["attention_mask"][0]])
    assert text == f"{system}{user}<|im_start|>assistant\n"


# ---------------------------------------------------------------- they learn


def test_the_tower_learns_at_the_layer_that_llava_takes():
    net = two_stage.vision(0)
    before = {name: weight.clone() for name, weight in net.named_parameters()}
    assert two_stage.train_vision(net, 0, steps=150) > 0.5  # of scans that it has not seen, of ten digits
    with torch.no_grad():
        taken = two_stage.features(net, drawn())
        every = net(llava.pixels(drawn()), output_hidden_states=True).hidden_states
    assert taken.shape == (4, 16, 128) and len(every) == 4 and torch.equal(taken, every[2][:, 1:])
    moved = {name for name, weight in net.named_parameters() if not torch.equal(weight, before[name])}
    above = {name for name in before if name.startswith(("encoder.layers.2.", "post_layernorm."))}
    assert moved == before.keys() - above


def test_the_language_model_learns():
    tok = two_stage.tokenizer()
    net = two_stage.language(tok)
    said = tok([two_stage.talk(np.random.default_rng(n)) for n in range(8)], padding=True, return_tensors="pt")
    labels = said.input_ids.masked_fill(said.attention_mask == 0, -100)

    def loss():
        with torch.no_grad():
            return net(**said, labels=labels).loss.item()

    before = loss()
    assert before == pytest.approx(np.log(len(tok)), rel=0.05) and two_stage.text_accuracy(net, tok) == 0
    two_stage.train_language(net, tok, steps=15)
    assert loss() < before - 0.3
