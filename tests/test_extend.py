"""The changes that docs/extend.md shows: each is applied to a copy of the recipe, and trains a small model."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, log
from recipes import FOLDERS, Recipe, said
from safetensors.torch import load_file

from tiny import families

PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
CHANGES = dict(re.findall(r"^## (.*?)\n.*?^```diff\n(.*?)^```$", PAGE, re.M | re.S))  # title -> diff
SHORT = {
    "max_steps": 2,
    "eval_steps": 1,
    "save_steps": 1,
    "logging_steps": 1,
    "load_in_4bit": False,
    "max_eval_rows": 4,
}
SHORT |= {"sample_rows": 0, "activation_checkpointing": False, "gradient_accumulation_steps": 1}


def test_every_change_has_a_test():
    tested = [
        name for name in globals() if name.startswith("test_") and "changed" in globals()[name].__code__.co_varnames
    ]
    assert len(CHANGES) == len(tested) == 7


class Changed(Recipe):
    """A recipe with a change of the page."""

    module = None  # set by `changed`, in place of Recipe's property


@pytest.fixture
def changed(request, tmp_path, monkeypatch):
    """Function: title of a change -> the changed recipe, with the model in `folder` or its usual one."""

    def make(title, folder=None):
        name = re.search(r"^--- a/(\w+)\.py$", CHANGES[title], re.M)[1]
        copy = tmp_path / f"{name}.py"
        copy.write_text((ROOT / copy.name).read_text(encoding="utf-8"), encoding="utf-8")
        subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=CHANGES[title], text=True, check=True)
        spec = importlib.util.spec_from_file_location(f"changed_{name}", copy)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        recipe = Changed(name, folder or request.getfixturevalue(FOLDERS[name]), tmp_path)
        monkeypatch.setattr(Changed, "module", module)
        return recipe

    return make


def labels_of(batch, tokenizer):
    """The trained tokens of a batch's first row, as text."""
    labels = batch["labels"][0]
    return tokenizer.decode(labels[labels != -100]).strip()


def test_another_column_format(changed, write, images):
    recipe, (red, blue) = changed("Another column format"), images(2)
    rows = [{"file": red, "instruction": "Which digit?", "output": "seven"}]
    rows.append({"file": blue, "instruction": "Odd?", "output": "yes"})
    train, _ = recipe.load_data(dataset_name=write(rows), image_folder=recipe.tmp_path, eval_fraction=0)
    collator = recipe.collator()
    batch = collator([train[0]])
    assert labels_of(batch, collator.processor.tokenizer) == "seven</s>" and batch["pixel_values"].shape[0] == 1
    assert "Which digit?" in collator.processor.tokenizer.decode(batch["input_ids"][0])
    missing = recipe.refusal(recipe.flags_for(write([rows[0] | {"file": "nowhere.png"}])))
    assert "nowhere.png" in missing


def test_a_prompt_template_of_ones_own(changed, tiny_llava, tmp_path, write, images):
    model, row = tmp_path / "base" / "model", said("<image>\nOdd?", "no", "Sure?", "yes", image=images(1)[0])
    shutil.copytree(tiny_llava / "model", model)
    (model / "chat_template.jinja").unlink()  # as a base model
    own = {"dataset_name": write([row, row]), "image_folder": tmp_path, "eval_strategy": "no", **SHORT}
    plain = Recipe("sft_llava", model.parent, tmp_path)
    assert "without a chat template" in plain.refusal(plain.flags(**own))
    recipe = changed("A prompt template of your own", folder=model.parent)
    printed = recipe.run(**own)
    assert "Question: <image> x 16\nOdd?\nAnswer:« no</s>»\nQuestion: Sure?\nAnswer:« yes</s>»" in printed
    processor = recipe.module.AutoProcessor.from_pretrained(tmp_path / "out")  # what inference loads
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Odd?"}]}]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    assert prompt == "Question: <image>\nOdd?\nAnswer:"


def test_other_lora_targets(changed):
    recipe = changed("Other LoRA targets")
    attention = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj"]
    recipe.run(**SHORT, lora_vision=True, lora_target_modules=attention)
    ranks, trained, targets = set(), set(), set()
    for name, weight in saved_adapter(recipe.tmp_path / "out").items():
        part = re.search(r"model\.(vision_tower|language_model)", name)[1]
        targets.add(name.split(".lora_")[0].rsplit(".", 1)[1])
        if "lora_A" in name:
            ranks.add((part, len(weight)))
        elif weight.any():  # lora_B begins at zero
            trained.add(part)
    assert ranks == {("vision_tower", 4), ("language_model", 16)}
    assert trained == {"vision_tower", "language_model"} and targets == set(attention)


def test_a_projector_with_another_name(changed, tmp_path, write, images):
    families.build("ovis2", tmp_path)
    row = said("<image>\nOdd?", "no", image=images(1)[0])
    own = {"dataset_name": write([row, row]), "image_folder": tmp_path, "eval_strategy": "no", **SHORT}
    own |= {"train_projector": True, "learning_rate": 1e-2}
    plain = Recipe("sft_llava", tmp_path, tmp_path)
    assert re.search("no projector .* add it to PROJECTORS", plain.refusal(plain.flags(**own)))
    printed = changed("A projector with another name", folder=tmp_path).run(**own)
    assert re.search(r"visual_embeddings_table +([\d,]+) of +\1 parameters trained", printed)
    key = "model.visual_embeddings_table.weight"
    before = load_file(tmp_path / "model" / "model.safetensors")[key]
    assert not torch.equal(saved_adapter(tmp_path / "out")[f"base_model.model.{key}"], before)


def saved_adapter(folder):
    """{name: weight} of the adapter in a folder."""
    return load_file(folder / "adapter_model.safetensors")


def test_an_own_metric(changed):
    recipe = changed("An own metric")
    best = {"metric_for_best_model": "exact_match", "greater_is_better": True}
    recipe.run(**SHORT, **best)
    assert set(log(recipe.tmp_path / "out", "eval_exact_match").values()) == {0.0}  # two steps teach nothing
    state = json.loads((recipe.tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_metric"] == 0.0 and state["best_global_step"] == 1
    assert "this recipe computes loss and exact_match" in recipe.refusal(recipe.flags(metric_for_best_model="rouge"))


@pytest.mark.parametrize("enough, steps", [(100.0, 1), (0.05, 3)])
def test_an_own_callback(changed, enough, steps, monkeypatch):
    recipe = changed("An own callback")
    initialize = recipe.module.StopWhenLearned.__init__
    monkeypatch.setattr(recipe.module.StopWhenLearned, "__init__", lambda self, **_: initialize(self, enough))
    recipe.run(**SHORT | {"max_steps": 3})
    assert max(log(recipe.tmp_path / "out")) == steps


def test_a_weight_for_each_token(changed):
    recipe = changed("A weight for each token in the loss")
    recipe.run(**SHORT | {"max_steps": 1, "lora_dropout": 0, "per_device_train_batch_size": 3})
    settings, training = recipe.parse(**SHORT, eval_strategy="no")
    collator = recipe.collator()
    train, _ = recipe.load_data(**SHORT)
    batch = collator([train[0], train[1]])
    is_end = batch["labels"] == collator.end_id
    assert is_end.sum() == 2 and batch["loss_weights"].unique().tolist() == [1, 5]
    assert (batch["loss_weights"] == 5).equal(is_end)

    trainer = recipe.module.Trainer(settings, model=recipe.module.load_model(settings, training), args=training)
    count = torch.tensor(int((batch["labels"] != -100).sum()))
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
    weights = batch.pop("loss_weights")[:, 1:]
    logits = trainer.model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(loss, (losses * weights).sum() / count)
