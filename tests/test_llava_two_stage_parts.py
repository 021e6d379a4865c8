"""What llava_two_stage.py alone does with models: it joins two parts, begins the second stage where the first ended,
trains with the rows of a step alike, and saves a whole model by the published names."""

import json
import re
import shutil

import pytest
import torch
from conftest import said
from peft import PeftModel
from recipes import Recipe
from runs import same
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
)

import llava_two_stage
from llava_two_stage import PROJECTOR

LORA = {"lora_r": 8, "lora_dropout": 0}


@pytest.fixture(scope="module")
def rows(tiny_parts, tmp_path_factory):
    """A folder with 16 conversations to train on, 9 of them about an image, and 4 others, 2 of them about one."""
    out = tmp_path_factory.mktemp("rows")
    made = json.loads((tiny_parts / "json" / "train.json").read_text())
    about_one = [row for row in made if isinstance(row.get("image"), str)]
    words = "zero one two three four five six seven eight nine".split()
    blind = [said(f"Which digit comes after {word}?", after) for word, after in zip(words, words[1:], strict=False)]
    assert any(len(row["conversations"]) > 2 for row in about_one[:9])
    (out / "train.json").write_text(json.dumps([*about_one[:4], *blind[:7], *about_one[4:9]]))
    (out / "held.json").write_text(json.dumps([*about_one[9:11], *blind[7:9]]))
    return out


@pytest.fixture
def two_stage(tiny_parts, tmp_path):
    return Recipe("llava_two_stage", tiny_parts, tmp_path)


@pytest.fixture
def settings_of(two_stage, rows):
    """A function: settings -> those of a short run, with these rows; of the stage align with the usual captions."""

    def make(**settings):
        own = {"max_steps": 1, "logging_steps": 1, "sample_rows": 0, "eval_steps": 4, "save_strategy": "no"}
        own |= {"projector_learning_rate": 0.01, "warmup_steps": 0, "disable_tqdm": True}
        if settings.get("stage") == "align":
            own |= {"max_eval_rows": 4}
        else:
            own |= {"dataset_name": rows / "train.json", "eval_dataset_name": rows / "held.json"}
            own |= {"learning_rate": 1e-3}
        return {**own, **settings}

    return make


@pytest.fixture
def trainer_of(two_stage, settings_of):
    """A function: settings -> a Trainer before its first step, or with `train` after the last."""
    return lambda train=False, **settings: two_stage.trainer(train=train, **settings_of(**settings))


@pytest.fixture
def load(two_stage, settings_of):
    """A function: settings -> the base model, as the recipe loads it; a new projector is the same each time."""

    def make(**settings):
        torch.manual_seed(42)
        return llava_two_stage.load_model(*two_stage.parse(**settings_of(**settings)))

    return make


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits


def projector(weights):
    """{name without anything before linear_: weight} of the projector that is trained, or used."""
    own = {name: value for name, value in weights.items() if "multi_modal_projector." in name}
    return {re.search(r"linear_.*", name)[0]: p.detach() for name, p in own.items() if "original_module" not in name}


# ------------------------------------------------------------------------------------------------------------ joining
LANGUAGES = {  # the usual Llama, one that writes with the matrix it reads with, and a Mistral: what differs
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 8},
}


@pytest.fixture(params=LANGUAGES)
def language(request, tiny_parts, tmp_path):
    """A language model's folder."""
    out = shutil.copytree(tiny_parts / "language", tmp_path / "language")
    config = AutoConfig.from_pretrained(out).to_dict() | LANGUAGES[request.param]
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(out)
    return out


def is_tied(model):
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def check_weights(model, vision, own):
    """Every weight is a part's own; new words, in and out, are the mean of the old ones."""
    assert same(dict(model.model.vision_tower.state_dict()), dict(vision.state_dict()))
    now = {name.replace("model.language_model.", "model."): value for name, value in model.state_dict().items()}
    old, words = own.config.vocab_size, ("model.embed_tokens.weight", "lm_head.weight")
    for name, value in own.state_dict().items():
        assert torch.equal(now[name][:old] if name in words else now[name], value), name
        if name in words:
            assert len(now[name]) % 64 == 0 and 1 <= len(now[name]) - old <= 64
            assert all(torch.equal(row, value.mean(0)) for row in now[name][old:])
    assert is_tied(model) == is_tied(own) == own.config.tie_word_embeddings
    assert not any(p.requires_grad for name, p in model.named_parameters() if PROJECTOR not in name)


def check_config(model, own, processor):
    config, text = model.config, model.config.text_config
    assert processor.image_token_id == own.config.vocab_size == len(processor.tokenizer) - 1
    assert (config.image_token_index, config.image_seq_length) == (own.config.vocab_size, 16)
    assert (text.vocab_size, text.model_type) == (len(model.get_input_embeddings().weight), own.config.model_type)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert config.projector_hidden_act == "gelu"
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_the_parts_are_joined_as_they_are(tiny_parts, load, two_stage, language):
    """And a language model says what it said before."""
    processor = llava_two_stage.load_processor(two_stage.parse(stage="align", language_model=language)[0])
    model = load(stage="align", language_model=language)
    vision = CLIPVisionModel.from_pretrained(tiny_parts / "vision")
    own = AutoModelForCausalLM.from_pretrained(language)
    check_weights(model, vision, own)
    check_config(model, own, processor)
    texts = ["Which digit is this? seven", "a handwritten nine, an odd digit"]
    ids = processor.tokenizer(texts, return_tensors="pt", padding=True)
    assert torch.equal(logits(model, ids)[..., : own.config.vocab_size], logits(own, ids))
    pictures = torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pictures, return_dict=True).pooler_output
        features = vision(pictures, output_hidden_states=True).hidden_states[-2][:, 1:]
        wanted = model.model.multi_modal_projector(features)
    assert torch.equal(torch.stack(list(found)), wanted) and wanted.shape == (2, 16, 128)


def test_both_stages_results_are_read_as_they_were_written(trainer_of, load, language, tmp_path):
    """By the recipe, and by Transformers alone."""
    first = trainer_of(True, stage="align", language_model=language, output_dir=tmp_path / "one", eval_strategy="no")
    second = trainer_of(True, model_name_or_path=tmp_path / "one", output_dir=tmp_path / "two", eval_strategy="no")
    batch = first.data_collator([first.train_dataset[n] for n in range(3)])
    read_again = load(model_name_or_path=tmp_path / "one", output_dir=tmp_path / "other")
    torch.testing.assert_close(logits(read_again, batch), logits(first.model, batch), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(logits(second.model, batch), logits(first.model, batch), atol=1e-3)
    was_tied = AutoConfig.from_pretrained(language).tie_word_embeddings
    for trainer, name in ((first, "one"), (second, "two")):
        saved = LlavaForConditionalGeneration.from_pretrained(tmp_path / name)
        torch.testing.assert_close(logits(saved, batch), logits(trainer.model, batch), atol=1e-6, rtol=1e-6)
        assert is_tied(saved) == is_tied(trainer.model) == was_tied
        assert saved.config.image_token_index == first.data_collator.processor.image_token_id


def test_the_tower_of_a_whole_clip(tiny_parts, trainer_of, tmp_path):
    """As openai/clip-* are: with a text tower, which is left out, also of what is saved."""
    vision = CLIPVisionModel.from_pretrained(tiny_parts / "vision")
    text = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision.config.to_dict(), projection_dim=16))
    clip.save_pretrained(tmp_path / "clip")
    shutil.copy(next((tiny_parts / "vision").glob("*processor_config.json")), tmp_path / "clip")
    trainer = trainer_of(True, stage="align", vision_tower=tmp_path / "clip", eval_strategy="no")
    saved = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    for model in (trainer.model, saved):
        assert same(dict(model.model.vision_tower.state_dict()), dict(clip.vision_model.state_dict()))


# --------------------------------------------------------------------------------- where the second stage begins
@pytest.mark.parametrize("own", [{}, LORA, LORA | {"load_in_4bit": True}], ids=["full", "lora", "4-bit"])
def test_the_second_stage_begins_where_the_first_ended(trainer_of, tiny_parts, tmp_path, own):
    """From the first stage's result, or by joining the parts again with its projector: all weights are the same."""
    align = tiny_parts / "align"
    begun = trainer_of(**own).model.state_dict()
    assert same(projector(begun), projector(load_file(align / "model.safetensors")))
    joined = trainer_of(pretrain_mm_mlp_adapter=align, output_dir=tmp_path / "joined", **own).model.state_dict()
    assert same(begun, joined)


@pytest.fixture(scope="module")
def adapted(tiny_parts, rows, tmp_path_factory):
    """The folder of a run that has trained an adapter, and the projector with it, on joined parts."""
    case, out = Recipe("llava_two_stage", tiny_parts, tmp_path_factory.mktemp("adapted")), "out"
    parts = {"pretrain_mm_mlp_adapter": tiny_parts / "align", "dataset_name": rows / "train.json", "max_steps": 1}
    rates = {"projector_learning_rate": 0.01, "warmup_steps": 0, "lora_r": 8}
    case.run(eval_strategy="no", save_strategy="no", **parts, **rates)
    return case.tmp_path / out


def original(weights):
    """A projector as the original LLaVA saves it."""
    names = {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"}
    return {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": value for name, value in weights.items()}


@pytest.mark.parametrize("settings", [{}, LORA], ids=["full", "lora"])
def test_it_begins_with_a_projector_of_the_original(adapted, tiny_parts, load, tmp_path, settings):
    """mm_projector.bin, whatever its precision; and one of an adapter's folder."""
    mine = projector(load_file(tiny_parts / "align" / "model.safetensors"))
    halves = {name: value.half() for name, value in original(mine).items()}
    torch.save(halves, tmp_path / "mm_projector.bin")
    found = load(pretrain_mm_mlp_adapter=tmp_path / "mm_projector.bin", output_dir=tmp_path / "one", **settings)
    assert same(projector(found.state_dict()), {name: value.half().float() for name, value in mine.items()})
    found = load(pretrain_mm_mlp_adapter=adapted, output_dir=tmp_path / "two", **settings)
    trained = projector(load_file(adapted / "adapter_model.safetensors"))
    assert same(projector(found.state_dict()), trained) and not same(trained, mine)


def test_an_adapter_on_joined_parts_has_a_base(adapted, tiny_parts):
    """Written beside it once, with its processor: that of the projector it began with."""
    base = adapted / "base"
    assert json.loads((adapted / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    whole, stage1 = (LlavaForConditionalGeneration.from_pretrained(path) for path in (base, tiny_parts / "align"))
    assert same(dict(whole.state_dict()), dict(stage1.state_dict()))
    assert type(AutoProcessor.from_pretrained(base)).__name__ == "LlavaProcessor"


def test_a_base_is_kept_for_its_checkpoints_only(trainer_of, load, tiny_parts, tmp_path, monkeypatch):
    """A run that ended before its first checkpoint is begun anew, and with other parts it may be."""
    mine = projector(load_file(tiny_parts / "align" / "model.safetensors"))
    other = {name: value + 1 for name, value in mine.items()}
    torch.save(original(other), tmp_path / "mm_projector.bin")
    frozen = LORA | {"projector_learning_rate": 0, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}
    trainer_of(pretrain_mm_mlp_adapter=tmp_path / "mm_projector.bin", **frozen)
    trainer = trainer_of(True, pretrain_mm_mlp_adapter=tiny_parts / "align", **frozen)
    base = tmp_path / "out" / "base"
    kept = LlavaForConditionalGeneration.from_pretrained(base)
    assert same(projector(kept.state_dict()), mine)
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(4)])
    again = PeftModel.from_pretrained(kept, tmp_path / "out")
    torch.testing.assert_close(logits(again, batch), logits(trainer.model, batch), atol=1e-5, rtol=1e-5)

    before = {path: path.stat().st_mtime_ns for path in base.iterdir()}
    monkeypatch.setattr(llava_two_stage, "join_models", None)  # now there is a checkpoint that was trained on it
    assert load(pretrain_mm_mlp_adapter=tiny_parts / "align", **frozen)
    assert before == {path: path.stat().st_mtime_ns for path in base.iterdir()}


# --------------------------------------------------------------------------------------------------------- training
def test_rows_of_a_step_are_of_one_kind(trainer_of, monkeypatch):
    """All with images or all without, but the last of an epoch; another order each epoch; every row in each."""
    seen, stock = [], llava_two_stage.Collator.__call__

    def spy(self, rows):
        seen.append([(row["row"], len(row["image_keys"]) > 0) for row in rows])
        return stock(self, rows)

    few = {"max_steps": 8, "eval_strategy": "no", "learning_rate": 0, "activation_checkpointing": False}
    trainer = trainer_of(**few)
    monkeypatch.setattr(llava_two_stage.Collator, "__call__", spy)
    trainer.train()
    epochs = seen[:4], seen[4:8]
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert sorted(number for step in epoch for number, _ in step) == list(range(16))
    mixed = [len({shown for _, shown in step}) > 1 for step in seen]
    assert mixed == [False, False, False, True] * 2


@pytest.mark.parametrize("size", [1, 4])
def test_eval_loss_is_the_models_with_and_without_images(trainer_of, size):
    """Of rows alone, so that some batches have none, and together."""
    trainer = trainer_of(per_device_eval_batch_size=size)
    held, model = list(trainer.eval_dataset), trainer.model.eval()
    assert [len(row["image_keys"]) for row in sorted(held, key=lambda row: row["row"])] == [1, 1, 0, 0]
    with torch.no_grad():
        losses = [model(**trainer.data_collator(held[n : n + size])).loss.item() for n in range(0, 4, size)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("stage, num_words, num_steps", [("align", 1, 2), ("instruct", 2, 4)])
def test_a_caption_ends_with_its_line_an_answer_with_eos(trainer_of, tmp_path, stage, num_words, num_steps):
    """A model made to say: a word, newline, the word, EOS, the word."""
    trainer = trainer_of(stage=stage, sample_rows=1, sample_tokens=6)
    tokenizer, spoken = trainer.data_collator.processor.tokenizer, []
    word, line = (tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in (" seven", "a\n"))
    script = [word, line, word, tokenizer.eos_token_id, word, word]

    def puppet(module, args, out):
        if out.dim() == 3:  # it generates
            out[:, -1] = torch.nn.functional.one_hot(torch.tensor(script[len(spoken)]), out.shape[-1])
            spoken.append(1)
        return out

    trainer.model.lm_head.register_forward_hook(puppet)
    trainer.evaluate()
    assert len(spoken) == num_steps
    row = (tmp_path / "out" / "samples.md").read_text().strip().splitlines()[-1]
    assert row.strip("| ").split("|")[-1].split() == ["seven"] * num_words


# ----------------------------------------------------------------------------------------------------- what is saved
def test_a_whole_model_is_saved_by_the_published_names(trainer_of, tiny_parts, tmp_path):
    """Which vLLM and every version of Transformers know: in the first stage and in the second."""
    trainer_of(True, eval_strategy="no")
    vision, language = (load_file(tiny_parts / part / "model.safetensors") for part in ("vision", "language"))
    names = {f"vision_tower.vision_model.{name}" for name in vision} | {f"language_model.{name}" for name in language}
    names |= {f"multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.bias" in names
    assert {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} <= names
    for out in (tiny_parts / "align", tmp_path / "out"):
        assert set(load_file(out / "model.safetensors")) == names
        config = json.loads((out / "config.json").read_text())
        assert config["architectures"] == ["LlavaForConditionalGeneration"]
        assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
