"""tiny/families.py: the models of other families are built, saved and read back by the Auto classes; they look at the
picture and read the question; their tokenizers know the tokens that end an answer. Two of them learn to caption, for
the demos. Most processors need torchvision: tiny/torchvision_on_cpu.py."""

import importlib.util
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from tiny import __main__ as command
from tiny import digits, families, llava, torchvision_on_cpu

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
missing = pytest.mark.skipif(not HAS_TORCHVISION, reason="no torchvision: make test runs this with .venv/vision")
ALL = [pytest.param(name, marks=missing if name in families.NEED_TORCHVISION else ()) for name in families.FAMILIES]
INK, _ = digits.load()


@pytest.fixture(scope="module", params=ALL)
def built(request, tmp_path_factory):
    """(name, folder of the model, processor, model)"""
    out = tmp_path_factory.mktemp(request.param)
    families.build(request.param, out)
    folder = out / "model"
    return (
        request.param,
        folder,
        AutoProcessor.from_pretrained(folder),
        AutoModelForImageTextToText.from_pretrained(folder),
    )


def logits(processor, model, colour, question="Which digit is this?"):
    """Of the last position, after a picture of 60 x 100 px and a question."""
    text = question
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(text=[text], images=[[Image.new("RGB", (60, 100), colour)]], return_tensors="pt")
    if model.config.is_encoder_decoder:
        batch["labels"] = batch["input_ids"]
    for name, values in batch.items():
        if values.dtype == torch.bfloat16:  # Llama 4's processor makes such pixels for any model
            batch[name] = values.float()
    with torch.no_grad():
        return model(**batch).logits[0, -1]


def test_a_family_is_read_back_by_the_auto_classes_and_sees_and_reads(built):
    name, _, processor, model = built
    config, own, _ = families.FAMILIES[name]()
    assert type(processor) is type(own) and type(model.config) is type(config)
    assert (processor.chat_template is None) == (name in families.NO_CHAT_TEMPLATE)
    assert processor.chat_template == own.chat_template
    assert bool(model.config.is_encoder_decoder) == (name in families.ENCODER_DECODER)
    if name == "llama4" and transformers.__version__ == "5.24.0":
        pytest.xfail("Transformers 5.24.0 fails in Llama 4's forward: no attribute 'image_outputs'")
    red = logits(processor, model, "red")
    assert torch.isfinite(red).all() and len(red) <= len(processor.tokenizer)
    assert not torch.equal(red, logits(processor, model, "blue"))
    assert not torch.equal(red, logits(processor, model, "red", "Is it even or odd?"))


def test_a_tokenizer_knows_its_words_and_what_ends_an_answer(built):
    name, folder, processor, _ = built
    tok, stops = processor.tokenizer, families.FAMILIES[name]()[2]
    ids = GenerationConfig.from_pretrained(folder).eos_token_id
    assert tok.convert_ids_to_tokens([ids] if isinstance(ids, int) else ids) == stops
    for stop in [*stops, tok.pad_token]:
        assert tok.tokenize(f"seven{stop}")[-1] == stop
    if name != "idefics2":  # its words are those of forms
        assert len(tok.tokenize("Which digit is this?")) == 5 and len(tok.tokenize("seven")) == 1
    text = "seven, größe 好 🙂"
    assert tok.decode(tok(text, add_special_tokens=False)["input_ids"]) == text


def test_the_seed_makes_the_weights_and_all_of_them_can_be_packed_in_4_bit(built, tmp_path):
    name, folder, _, model = built
    weights = (folder / "model.safetensors").read_bytes()
    for seed in (0, 1):
        families.build(name, tmp_path / str(seed), seed)
        assert ((tmp_path / str(seed) / "model/model.safetensors").read_bytes() == weights) == (seed == 0)
    linear = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert linear and not [weight.shape for weight in linear if weight.numel() % 64]


# ---------------------------------------------------------------- those that learn to caption


@missing
@pytest.mark.parametrize("family", command.LEARNERS)
def test_a_learner_has_llavas_rows_and_its_trained_model(family, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(families, "build_learner", partial(families.build_learner, train_rows=24))
    out = tmp_path / "out"
    call = [family, "--out", str(out), "--seed", "3", "--base_steps"]
    command.main([*call, "1"])
    command.main([*call, "1"])
    assert "built already" in capsys.readouterr().out
    llava.write_data(tmp_path / "own", "train", llava.make_rows(3, train=True, n=24))
    for file in ("data/train.parquet", "json/train.json"):
        assert (out / file).read_bytes() == (tmp_path / "own" / file).read_bytes()
    weights = (out / "model/model.safetensors").read_bytes()
    monkeypatch.setattr(llava, "write_data", Mock())  # a second of its own
    again = tmp_path / "again"
    for steps in ("0", "1"):
        command.main([family, "--out", str(again), "--seed", "3", "--base_steps", steps])
        assert ((again / "model/model.safetensors").read_bytes() == weights) == (steps == "1")
    assert type(AutoModelForImageTextToText.from_pretrained(again / "model")).__name__.lower().startswith(family[:5])


@missing
@pytest.mark.parametrize(
    "family, before, image, stop",
    [
        ("qwen3_vl", "<|im_start|>assistant\n", "<|vision_start|>{}<|vision_end|>", "<|im_end|>"),
        (
            "smolvlm",
            "Assistant: ",
            "<fake_token_around_image><global-img>{}<fake_token_around_image>",
            "<end_of_utterance>",
        ),
    ],
    ids=command.LEARNERS,
)
def test_what_is_trained_of_a_lesson_is_its_answer_and_what_ends_it(family, before, image, stop):
    proc = families.LEARNERS[family]().processor
    lessons = [(2, *llava.captions(7, 2)[1]), (1, *llava.captions(7)[0]), (0, *llava.counting(8))]
    inputs = families.batch(proc, lessons, digits.draw(INK[:3]))
    prompts = families.batch(proc, lessons, digits.draw(INK[:3]), answered=False)
    image = image.format(proc.image_token * 4)
    asked = [image * 2 + lessons[0][1], lessons[1][1] + image, lessons[2][1]]  # every other row: behind the text
    for row, (_, _, said) in enumerate(lessons):
        ids, labels = inputs["input_ids"][row], inputs["labels"][row]
        text = proc.tokenizer.decode(ids[inputs["attention_mask"][row] == 1])
        assert asked[row] in text and text.endswith(f"{before}{said}{stop}")
        trained = proc.tokenizer.decode(labels[labels != -100])
        assert trained.strip(" ") == f"{said}{stop}" and torch.equal(labels[labels != -100], ids[labels != -100])
        prompt = proc.tokenizer.decode(prompts["input_ids"][row][prompts["attention_mask"][row] == 1])
        assert prompt + trained == text


def test_a_learner_is_refused_without_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", Mock(return_value=None))
    with pytest.raises(SystemExit, match="needs torchvision(.|\n)*torchvision_on_cpu(.|\n)*requirements-vision.txt"):
        command.main(["smolvlm", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("loaded", [True, False])
def test_operators_are_declared_once_and_only_where_they_did_not_load(tmp_path, loaded):
    extension = tmp_path / "torchvision/extension.py"
    extension.parent.mkdir()
    extension.write_text("def _has_ops():\n    return loaded\n")
    for _ in range(2):
        torchvision_on_cpu.declare_operators(tmp_path)
    library = Mock()
    fake = SimpleNamespace(library=SimpleNamespace(Library=Mock(return_value=library)))
    exec(extension.read_text(), {"loaded": loaded, "torch": fake})
    declared = [call.args[0].partition("(")[0] for call in library.define.call_args_list]
    assert declared == ([] if loaded else ["nms", "qnms"])
