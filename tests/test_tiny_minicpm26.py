"""tiny/minicpm26: the stand-in for MiniCPM-V 2.6 loads by its own code, and every defect of the original is really there."""

import filecmp
import inspect
import json
import runpy
import sys

import pytest
import torch
from conftest import fresh
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModel, AutoProcessor, AutoTokenizer, BitsAndBytesConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tiny import digits, minicpm26

IMAGE = "(<image>./</image>)"
LORA = r"llm\..*layers\.\d+\.self_attn\.(q|k|v|o)_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model directory."""
    out = tmp_path_factory.mktemp("tiny_minicpm26")
    minicpm26.build(out)
    return str(out / "model")


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def load(folder, table=True, **more):
    """The model, repaired so far that it loads; with `table`, its positions too."""
    with minicpm26.importable():
        code = get_class_from_dynamic_module("modeling_minicpmv.MiniCPMV", folder)

    class MiniCPMV(code):
        def __init__(self, config):
            super().__init__(config)
            self.post_init()

    model = MiniCPMV.from_pretrained(folder, dtype=torch.float32, **more)
    if table:
        model.resampler._set_2d_pos_cache(model.resampler.max_size)
    return model


def batch(processor, sizes=((50, 50), (200, 90)), text="Which digit is this?"):
    """Rows with a picture each, as the processor makes them, without what the model does not take, and `position_ids`."""
    turns = [[{"role": "user", "content": f"{IMAGE}\n{text}"}]] * len(sizes)
    prompts = [
        processor.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns
    ]
    made = processor(prompts, [[Image.new("RGB", size, "red")] for size in sizes])
    made.pop("image_sizes")
    return {**made, "position_ids": (made["attention_mask"].long().cumsum(1) - 1).clamp(min=0)}


def logits(model, made):
    with torch.no_grad():
        return model(data=made, attention_mask=made["attention_mask"]).logits


# ------------------------------------------------------------------------------------------- what is broken, as it is there
def test_its_code_wants_torchvision(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # not there, even where it is installed
    with pytest.raises(ImportError, match="torchvision"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)


def test_its_code_wants_a_name_that_torch_has_no_more(folder):
    with pytest.raises(NameError, match="'List' is not defined"):
        runpy.run_path(f"{folder}/resampler.py")


def test_it_ends_without_post_init(folder):
    with minicpm26.importable(), pytest.raises(AttributeError, match="all_tied_weights_keys"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)


def test_its_positions_are_left_as_the_memory_was(folder):
    torch.use_deterministic_algorithms(True)  # what is not written to is NaN, and not whatever lies there
    try:
        model = load(folder, table=False)
    finally:
        torch.use_deterministic_algorithms(False)
    table = model.resampler.pos_embed
    assert table.shape == (70, 70, 128) and table.isnan().all() and "resampler.pos_embed" not in model.state_dict()
    model.resampler._set_2d_pos_cache(model.resampler.max_size)
    assert model.resampler.pos_embed.isfinite().all()


def test_images_are_written_into_a_leaf(folder, processor):
    made = batch(processor)
    for hooked in (False, True):
        model = load(folder).train().requires_grad_(False)
        if not hooked:
            model.enable_input_require_grads = lambda: None
        model = get_peft_model(model, LoraConfig(target_modules=LORA))
        model.activation_checkpointing_enable()
        if hooked:  # by checkpointing itself
            with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
                model(data=made, attention_mask=made["attention_mask"])
        else:
            model(data=made, attention_mask=made["attention_mask"], labels=made["input_ids"].long()).loss.backward()
            trained = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
            assert len(trained) == 16 and all(grad.any() for name, grad in trained.items() if "lora_B" in name)


def test_trainer_finds_no_labels_and_peft_no_causal_model(folder):
    model = load(folder)
    assert list(inspect.signature(type(model).forward).parameters) == ["self", "data", "kwargs"]
    with pytest.raises(AttributeError, match="prepare_inputs_for_generation"):
        get_peft_model(model, LoraConfig(target_modules=LORA, task_type="CAUSAL_LM"))


def test_its_processor_hides_token_0_which_is_an_exclamation_mark(processor):
    made = batch(processor, text="Seven!")
    ids, mask = made["input_ids"], made["attention_mask"]
    assert processor.tokenizer.convert_tokens_to_ids("!") == 0 and torch.equal(mask, ids != 0)
    assert not mask[1].all() and mask[1, 0]  # the longest row has no padding
    with pytest.raises(Exception):  # noqa: B017 - without pictures it knows no rows
        processor(["no picture"])
    assert processor(["no picture"], [[]])["pixel_values"] == [[]]


# ----------------------------------------------------------------------------------------------------- what is there, works
def test_a_build_is_reproducible(folder, tmp_path):
    minicpm26.build(tmp_path)
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    same, other, missing = filecmp.cmpfiles(folder, tmp_path / "model", names, shallow=False)
    assert sorted(same) == names and len([name for name in names if name.endswith(".py")]) == 7
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_minicpm.MiniCPMVConfig",
        "AutoModel": "modeling_minicpmv.MiniCPMV",
    }
    assert config["model_type"] == "minicpmv" and config["architectures"] == ["MiniCPMV"]
    minicpm26.build(tmp_path, seed=1)
    assert not filecmp.cmp(f"{folder}/model.safetensors", tmp_path / "model/model.safetensors", shallow=False)
    assert not hasattr(torch.nn.functional, "List")  # what the import needed is taken away again


def test_what_is_loaded_is_what_was_built(folder, processor):
    made, tokenizer = batch(processor), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    built, model = minicpm26.model(minicpm26.tokenizer()), load(folder).eval()
    assert torch.equal(logits(built, made), logits(model, made))
    assert [type(x).__name__ for x in (model, processor, processor.image_processor, tokenizer)] == [
        "MiniCPMV", "MiniCPMVProcessor", "MiniCPMVImageProcessor", "MiniCPMVTokenizerFast"]  # fmt: skip
    assert {name.split(".")[0] for name in model.state_dict()} == {"llm", "vpm", "resampler"}
    assert sum(weight.numel() for weight in model.parameters()) < 1e6


def test_a_picture_becomes_slices_and_tokens(processor):
    made = batch(processor)
    assert [len(row) for row in made["pixel_values"]] == [1, 7] and made["tgt_sizes"][1].tolist() == [[3, 6]] + [
        [3, 5]
    ] * 6
    assert [tuple(image.shape) for image in made["pixel_values"][0]] == [(3, 14, 14 * 16)]
    for ids, bounds in zip(made["input_ids"], made["image_bound"]):
        assert all((ids[start:end] == processor.tokenizer.unk_id).all() and end - start == 8 for start, end in bounds)
    text = processor.tokenizer.decode(made["input_ids"][0][made["attention_mask"][0]])
    user = f"<image_id>0</image_id><image>{'<unk>' * 8}</image>\nWhich digit is this?"
    assert text == (
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    )
    bare = processor([IMAGE], [[Image.new("RGB", (200, 90))]], max_slice_nums=1, use_image_id=False)
    assert processor.tokenizer.decode(bare["input_ids"][0]) == f"<image>{'<unk>' * 8}</image>"


def test_pictures_are_seen_each_in_its_own_row(folder, processor):
    model = load(folder).eval()
    made = batch(processor, [(50, 50), (200, 90), (60, 300)])
    one = batch(processor, [(200, 90)])
    assert torch.allclose(logits(model, made)[1], logits(model, one)[0], atol=1e-5)  # the longest: nothing is padded
    other = {**one, "pixel_values": [[image + 1 for image in one["pixel_values"][0]]]}
    assert not torch.allclose(logits(model, other), logits(model, one), atol=1e-2)
    turned = {**one, "tgt_sizes": [one["tgt_sizes"][0].flip(1)]}  # the same patches, elsewhere
    assert not torch.allclose(logits(model, turned), logits(model, one), atol=1e-4)


def test_it_answers(folder, processor):
    model, made = load(folder).eval(), batch(processor)
    made.pop("position_ids")
    said = model.generate(**made, tokenizer=processor.tokenizer, max_new_tokens=5, do_sample=False)
    assert said.shape == (2, 5)  # without the prompt
    seen = []
    answer, model.generate = model.generate, lambda **inputs: seen.append(inputs) or answer(**inputs)
    turns = [{"role": "user", "content": [Image.new("RGB", (50, 50), "red"), "Which digit is this?"]}]
    text = model.chat(None, turns, processor.tokenizer, processor, sampling=False, max_new_tokens=3)
    alone = batch(processor, [(50, 50)])
    assert isinstance(text, str) and torch.equal(seen[0]["input_ids"], alone["input_ids"])


def test_4_bit_and_what_is_trained_in_full(folder, processor):
    skip = ["vpm", "resampler", "lm_head"]
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip)
    model = load(folder, quantization_config=nf4, device_map={"": "cpu"})
    packed = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert len(packed) == 14 and all(name.startswith("llm.model.layers.") for name in packed)
    lora = LoraConfig(target_modules=LORA, modules_to_save=["embed_tokens", "resampler", "vpm"])
    model = get_peft_model(model, lora).train()
    made = batch(processor)
    model(data=made, attention_mask=made["attention_mask"], labels=made["input_ids"].long()).loss.backward()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad.any()}
    assert {part for part in ("embed_tokens", "resampler", "vpm", "lora_B") if any(part in name for name in trained)} == {
        "embed_tokens", "resampler", "vpm", "lora_B"}  # fmt: skip


def test_a_processor_saved_elsewhere_brings_its_code(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    code = """import sys
from transformers import AutoProcessor
print(AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)(["a"], [[]])["input_ids"].tolist())"""
    assert json.loads(fresh(code, tmp_path)) == processor(["a"], [[]])["input_ids"].tolist()


def test_it_learns_pictures_by_heart(folder, processor):
    """Through the language model's adapters alone: the rest is frozen."""
    model = get_peft_model(load(folder), LoraConfig(r=32, lora_alpha=32, target_modules=LORA)).train()
    ink, truth = digits.load()
    tokenizer, words = processor.tokenizer, [digits.WORDS[label] for label in truth[:8].tolist()]
    scans = [[Image.fromarray(picture.numpy())] for picture in digits.draw(ink[:8])]
    made = processor([f"{IMAGE}\n{word}<|im_end|>" for word in words], scans)
    made.pop("image_sizes")
    ids, labels = made["input_ids"].long(), torch.full(made["input_ids"].shape, -100)
    for row, word in enumerate(words):
        length = len(tokenizer.encode(f"{word}<|im_end|>"))
        labels[row, -length:] = ids[row, -length:]
    made = {**made, "position_ids": (made["attention_mask"].long().cumsum(1) - 1).clamp(min=0)}
    descend = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=5e-3)
    for _ in range(60):
        loss = model(data=made, attention_mask=made["attention_mask"], labels=labels).loss
        loss.backward()
        descend.step()
        descend.zero_grad()
    assert loss < 0.1
