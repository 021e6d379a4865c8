"""What the workbench does is the same in every recipe: each test runs over all five copies."""

import importlib
import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from peft import LoraConfig
from transformers import LlavaForConditionalGeneration

RECIPES = ["sft_llava", "idefics2_docvqa", "dpo_idefics2", "finetune_minicpm_lora", "llava_two_stage"]
CHAIN = [
    ["a"],
    ["a", "b"],
    ["c", "b"],
    ["c"],
]  # the first and the last row share no image, and are connected all the same


@pytest.fixture(params=RECIPES)
def recipe(request):
    return importlib.import_module(request.param)


@pytest.fixture
def divide(recipe):
    """Function: images of each row, and settings -> the numbers of the rows that are trained and evaluated on."""

    def make(images, seed=0, eval_fraction=0.3, max_eval_rows=100):
        rows = datasets.Dataset.from_dict({"row": list(range(len(images))), "image_keys": images})
        settings = SimpleNamespace(eval_fraction=eval_fraction, max_eval_rows=max_eval_rows)
        train, held_out = recipe.hold_out(rows, settings, SimpleNamespace(seed=seed))
        return train["row"], held_out["row"]

    return make


# ------------------------------------------------------------------------------------------------------- holding out


@pytest.mark.parametrize("seed", range(6))
def test_rows_connected_by_images_stay_on_one_side(divide, seed):
    train, held_out = divide([*CHAIN, ["lone"], ["lone"], *[[] for _ in range(6)]], seed)
    assert sorted([*train, *held_out]) == list(range(12)) and train and held_out
    for together in ({0, 1, 2, 3}, {4, 5}):
        assert together <= set(train) or together <= set(held_out)
    sizes = {0: 3, 4: 1} | dict.fromkeys(range(6, 12), 1)  # images of the group that begins with this row
    assert (
        sum(size for row, size in sizes.items() if row in held_out) == 3
    )  # of ten, a row without images counts as one


def test_a_group_larger_than_what_is_wanted_is_trained_on(divide):
    images = [["a", "b"] for _ in range(10)] + [[] for _ in range(8)]
    for seed in range(5):
        train, held_out = divide(images, seed, eval_fraction=0.1)
        assert len(held_out) == 1 and held_out[0] >= 10 and len(train) == 17


def test_rows_that_are_all_connected_cannot_be_divided(divide):
    with pytest.raises(SystemExit, match="^error: 4 rows cannot be divided .*--eval_fraction 0"):
        divide(CHAIN)


def test_at_most_so_many_rows_are_kept_for_evaluation_and_always_the_same(divide):
    images = [[f"{n % 10}"] for n in range(100)]
    train, held_out = divide(images, max_eval_rows=7)
    assert len(train) == 70 and len(held_out) == 7 and not {n % 10 for n in train} & {n % 10 for n in held_out}
    assert divide(images, max_eval_rows=7) == (train, held_out) != divide(images, seed=1, max_eval_rows=7)


def test_a_run_of_an_earlier_version_is_refused(recipe, begun, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        "".join(
            line for line in settings.read_text().splitlines(keepends=True) if not line.startswith(recipe.ROWS_NOTE)
        )
    )
    with pytest.raises(
        SystemExit,
        match="holds a run of an earlier version, which held out or ordered rows differently.* --output_dir",
    ):
        recipe.require_same_settings(begun())


# --------------------------------------------------------------------------------------------------------- resuming


@pytest.fixture
def begun(recipe, tmp_path):
    """Function: what differs -> the TrainingArguments of a run in tmp_path that was begun with 4 x 2 rows in a step."""

    def make(**changes):
        values = {
            "train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "world_size": 1,
            "load_best_model_at_end": False,
        }
        values |= changes
        given = {name: values.get(name, default) for name, default in GIVEN.items()}
        return SimpleNamespace(output_dir=str(tmp_path), as_given=given, **values)

    recipe.write_settings(make())
    return make


GIVEN = {
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-4,
    "max_eval_rows": 8,
    "per_device_eval_batch_size": 4,
    "sample_rows": 2,
}


@pytest.mark.parametrize(
    "changes", [{}, {"sample_rows": 0}, {"max_eval_rows": 2}, {"world_size": 2, "gradient_accumulation_steps": 2}]
)
def test_a_run_is_resumed_where_what_is_trained_stays_the_same(recipe, begun, changes):
    recipe.require_same_settings(begun(**changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 2e-4}, r"learning_rate 0.0001 -> 0.0002"),
        (
            {"world_size": 2},
            "rows in a step 8 -> 16: --gradient_accumulation_steps makes up for another number of GPUs",
        ),
        ({"gradient_accumulation_steps": 2}, "rows in a step 8 -> 4"),
        (
            {"load_best_model_at_end": True, "max_eval_rows": 2},
            "max_eval_rows 8 -> 2",
        ),  # the best would be compared on other rows
        ({"load_best_model_at_end": True, "per_device_eval_batch_size": 1}, "per_device_eval_batch_size 4 -> 1"),
    ],
)
def test_a_run_is_not_resumed_as_another_run(recipe, begun, changes, message):
    with pytest.raises(SystemExit, match=f"^error: .* holds a run with other settings .*{message}.*--output_dir"):
        recipe.require_same_settings(begun(**changes))


# ---------------------------------------------------------------------------------------------------------- LoRA targets

PART = "model.language_model"
DEFAULT = r"model\.language_model\..*_proj"


@pytest.fixture(scope="module")
def model(tiny_llava):
    return LlavaForConditionalGeneration.from_pretrained(tiny_llava / "model")


def adapted(recipe, model, names, untrainable=None, default=DEFAULT):
    """The last parts of the paths of what a LoRA of these --lora_target_modules adapts."""
    adapter = LoraConfig(target_modules=recipe.lora_targets(names, PART, default))
    settings = SimpleNamespace(lora_target_modules=names)
    recipe.check_lora_targets(
        settings, adapter, model, {"vision_tower": "which is frozen"} if untrainable is None else untrainable
    )
    found = {name for name, module in model.named_modules() if recipe.re.fullmatch(adapter.target_modules, name)}
    assert all(PART in name for name in found) or names and "vision" in names[0]
    return {name.rsplit(".", 1)[1] for name in found}


@pytest.mark.parametrize(
    "names, expected",
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["self_attn.o_proj"], {"o_proj"}),
        (["q_proj"], {"q_proj"}),
        ([r"model\.language_model\.layers\.0\..*\.(up|down)_proj"], {"up_proj", "down_proj"}),
        (None, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_lora_targets_are_names_in_the_language_model_or_one_regex(recipe, model, names, expected):
    assert adapted(recipe, model, names) == expected


@pytest.mark.parametrize(
    "names, message",
    [
        (["q_proj", "qproj"], "--lora_target_modules qproj: no such linear layer"),
        (["embed_tokens"], "embed_tokens: no such linear layer"),
        ([r".*\.nothing"], "nothing: no such linear layer"),
        (["(q_proj"], r"'\(q_proj' is not a valid regular expression"),
        (
            [r".*\.q_proj"],
            r"--lora_target_modules: \['model.vision_tower.*q_proj'\] is in vision_tower, which is frozen",
        ),
    ],
)
def test_lora_targets_that_cannot_be_adapted_are_refused(recipe, model, names, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        adapted(recipe, model, names)


def test_lora_targets_in_the_code_are_checked_like_those_of_the_flag(recipe, model):
    with pytest.raises(SystemExit, match="vision_tower"):
        adapted(recipe, model, None, default=r".*\.q_proj")
    recipe.check_lora_targets(
        SimpleNamespace(lora_target_modules=None), None, model, {}
    )  # no adapter, nothing to check


# --------------------------------------------------------------------------------------------------------- JSON files


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2\n', "line 3: .*one row a line"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}', "line 2: a key appears twice in .*'a', 1.*'a', 2"),
        ("a.json", '[{"a": 1, "a": 2}]', "a key appears twice"),
        ("a.json", '{"a": 1}', "must be a list of rows"),
        ("a.json", "[]", "it is empty"),
        ("a.json", '[{"a": "\\ud83d"}]', r"row 0 has invalid Unicode"),
    ],
)
def test_json_files_that_cannot_be_read(recipe, name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        recipe.read_json(tmp_path / name)


def test_a_column_of_json_may_hold_values_of_several_types(recipe, tmp_path):
    rows = [{"a": "7", "b": None}, {"a": 7}, {"a": ["x", {"y": 1}]}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert [row["a"] for row in recipe.read_json(tmp_path / "a.jsonl")] == ["7", 7, ["x", {"y": 1}]]


# ------------------------------------------------------------------------------------------------------------ training


def test_a_model_without_weights_has_the_modules_of_the_real_one(model, tiny_llava):
    import sft_llava

    empty = sft_llava.empty_model(SimpleNamespace(model_name_or_path=str(tiny_llava / "model"), model_revision=None))
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert [name for name, _ in empty.named_modules()] == [name for name, _ in model.named_modules()]


def test_logits_are_made_only_where_a_label_follows():
    import llava_two_stage as recipe

    labels = torch.tensor([[-100, -100, 3, 4], [-100, 2, -100, -100]])
    targets = recipe.next_tokens(labels)
    assert targets.tolist() == [[-100, 3, 4, -100], [2, -100, -100, -100]]
    head, hidden = torch.nn.Linear(8, 5), torch.randn(2, 4, 8)
    with recipe.logits_only_at(targets != -100, head):
        torch.testing.assert_close(
            head(hidden), torch.nn.functional.linear(hidden[targets != -100], head.weight, head.bias)
        )
    assert head(hidden).shape == (2, 4, 5)


def test_a_frozen_part_runs_without_a_graph_until_training_ends(model):
    import sft_llava as recipe

    model.requires_grad_(True)
    with pytest.raises(SystemExit, match="vision_tower runs without a graph, so .* would get no gradient"):
        recipe.FrozenWithoutGraph(model, "vision_tower")
    model.model.vision_tower.requires_grad_(False)
    callback, pixels = recipe.FrozenWithoutGraph(model, "vision_tower"), torch.zeros(1, 3, 56, 56, requires_grad=True)
    assert not model.model.vision_tower(pixels).last_hidden_state.requires_grad
    callback.on_train_end(None, None, None)
    assert model.model.vision_tower(pixels).last_hidden_state.requires_grad
