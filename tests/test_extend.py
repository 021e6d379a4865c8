"""The changes that docs/extend.md shows: each is applied to a copy of the recipe, and trains a small model."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, log
from recipes import FOLDERS, Recipe
from safetensors.torch import load_file

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
    assert len(CHANGES) == len(tested) == 6


class Changed(Recipe):
    """A recipe with a change of the page."""

    module = None  # set by `changed`, in place of Recipe's property


@pytest.fixture
def changed(request, tmp_path, monkeypatch):
    """Function: title of a change -> the changed recipe."""

    def make(title, folder=None):
        name = re.search(r"^--- a/(\w+)\.py$", CHANGES[title], re.M)[1]
        copy = tmp_path / f"{name}.py"
        copy.write_text((ROOT / copy.name).read_text(encoding="utf-8"), encoding="utf-8")
        subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=CHANGES[title], text=True, check=True)
        spec = importlib.util.spec_from_file_location(f"changed_{name}", copy)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        recipe = Changed(name, request.getfixturevalue(folder or FOLDERS[name]), tmp_path)
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


def test_other_lora_targets(changed):
    recipe = changed("Other LoRA targets")
    recipe.run(**SHORT)
    adapter = saved_adapter(recipe.tmp_path / "out")
    parts = {re.search(r"model\.(vision_tower|language_model)", name)[1] for name in adapter}
    assert parts == {"vision_tower", "language_model"}
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in adapter} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "out_proj",
    }
    trained = [
        name for name, weight in adapter.items() if "vision_tower" in name and "lora_B" in name and weight.any()
    ]
    assert trained  # lora_B begins at zero


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


def test_another_model(changed, write, images):
    recipe, (red, *_) = changed("Another model", folder="tiny_forms"), images(1)
    rows = [{"image": red, "conversations": turns("<image>\nWhat is the total?", answer)} for answer in ("47", "12")]
    out = recipe.run(
        dataset_name=write(rows), image_folder=recipe.tmp_path, eval_strategy="no", **SHORT | {"load_in_4bit": True}
    )
    assert "What is the total?<end_of_utterance>\nAssistant:« 47<end_of_utterance>»" in out
    assert re.search(r"vision_model +0 of", out) and re.search(r"text_model +[1-9].* [1-9][\d,]* in 4-bit", out)
    names = saved_adapter(recipe.tmp_path / "out")
    assert names and all("model.text_model." in name for name in names)


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
