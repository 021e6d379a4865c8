"""What the workbench does is the same in every recipe: each test runs over all five copies."""

import contextlib
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import pytest
import torch
import transformers
from conftest import ROOT
from peft import LoraConfig
from recipes import NAMES, Recipe
from transformers import LlavaForConditionalGeneration
from transformers.loss.loss_utils import ForCausalLMLoss

CHAIN = [
    ["a"],
    ["a", "b"],
    ["c", "b"],
    ["c"],
]  # the first and the last row share no image, and are connected all the same


@pytest.fixture(params=NAMES)
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


@pytest.mark.parametrize("name", ["idefics2_docvqa", "dpo_idefics2"])
def test_renamed_rows_have_the_same_key_in_every_process(name):
    """The order of their columns is part of the key by which checked rows are cached."""
    rows = datasets.Dataset.from_dict({column: ["a"] for column in ("folder", "q", "row", "img", "id", "other")})
    renamed = importlib.import_module(name).rename_columns(rows, {"image": "img", "question": "q", "answers": "none"})
    assert renamed.column_names == ["image", "question", "id", "row", "folder"]


def test_a_group_larger_than_what_is_wanted_is_trained_on(divide):
    images = [["a", "b"] for _ in range(10)] + [[] for _ in range(8)]
    for seed in range(5):
        train, held_out = divide(images, seed, eval_fraction=0.1)
        assert len(held_out) == 1 and held_out[0] >= 10 and len(train) == 17


def test_rows_that_are_all_connected_cannot_be_divided(divide):
    with pytest.raises(SystemExit, match="^error: 4 rows cannot be divided .*--eval_fraction 0"):
        divide(CHAIN)


@pytest.mark.parametrize("num_images, num_trained", [(100, 93), (10, 90)])  # an image's ten rows stay together
def test_no_more_rows_are_held_out_than_are_scored_and_always_the_same(divide, num_images, num_trained):
    images = [[f"{n % num_images}"] for n in range(100)]
    train, held_out = divide(images, max_eval_rows=7)
    assert len(train) == num_trained and len(held_out) == 7
    assert not {n % num_images for n in train} & {n % num_images for n in held_out}
    assert divide(images, max_eval_rows=7) == (train, held_out) != divide(images, seed=1, max_eval_rows=7)


def test_a_run_of_an_earlier_version_is_refused(recipe, begun, tmp_path):
    without_notes(tmp_path / "settings.yaml", recipe.ROWS_NOTE)
    with pytest.raises(
        SystemExit,
        match="holds a run of an earlier version, which held out or ordered rows differently.* --output_dir",
    ):
        recipe.require_same_settings(begun(), tmp_path)


# --------------------------------------------------------------------------------------------------------- resuming


@pytest.fixture
def begun(recipe, tmp_path):
    """Function: what differs -> the TrainingArguments of a run in tmp_path that began with 4 x 2 rows in a step."""

    def make(**changes):
        values = {
            "train_batch_size": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "world_size": 1,
            "auto_batch": set(),
            "load_best_model_at_end": False,
        }
        values |= changes
        given = {name: values.get(name, default) for name, default in GIVEN.items()}
        names = {"typed": {"seed", *changes}, "second_names": {"--data_path": "dataset_name"}}
        return SimpleNamespace(output_dir=str(tmp_path), as_given=given, **names, **values)

    recipe.write_settings(make())
    return make


def without_notes(settings, *notes):
    """Take these comments out of a settings.yaml: earlier versions did not write them."""
    lines = settings.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(notes)]
    assert len(kept) == len(lines) - len(notes)
    settings.write_text("".join(kept))


@pytest.mark.parametrize(
    "begun_with, differences, lengths, refused",
    [
        ([3, 4, 5], [], [3, 4, 5], None),
        ([3, 4, 5], ["whatever"], [3, 4, 5], None),  # it was begun by this version
        ([3, 4, 5], [], [3, 4, 6], "holds a run on other rows .*--max_eval_rows.*another --output_dir"),
        ([3, 4, 5], [], [3, 4], "holds a run on other rows"),
        (None, [], [3, 4, 5], None),  # by an earlier version, which read these rows alike
        (
            None,
            ["a split", "a text"],
            [3, 4, 5],
            r"earlier version, which read these rows differently \(a split; a text",
        ),
    ],
)
def test_a_run_is_resumed_on_the_same_rows_only(recipe, begun, tmp_path, begun_with, differences, lengths, refused):
    def rows(lengths):
        return datasets.Dataset.from_dict({"row": list(range(len(lengths))), "length": lengths})

    if begun_with:
        first = begun()
        recipe.require_same_rows(first, None, rows(begun_with), None)
        recipe.write_settings(first)
    resumed = begun(differences=differences)
    resumed.output_dir = str(tmp_path / "another")  # what counts is the run that the checkpoint is of
    expected = contextlib.nullcontext() if refused is None else pytest.raises(SystemExit, match=refused)
    with expected:
        recipe.require_same_rows(resumed, tmp_path / "checkpoint-1", rows(lengths), rows([9]))


GIVEN = {
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-4,
    "max_eval_rows": 8,
    "per_device_eval_batch_size": 4,
    "rows_per_step": None,
    "max_steps": 100,
    "max_new_tokens": 64,
    "stop_on_nonfinite": 3,
    "check_rows": "auto",
    "sample_rows": 2,
    "model_name_or_path": "llava",
    "dataset_name": "rows.json",
    "seed": 0,
} | {f"setting_{n}": n for n in range(12)}


BEST = {"load_best_model_at_end": True}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sample_rows": 0},
        {"stop_on_nonfinite": 1},
        {"max_new_tokens": 8},
        {**BEST, "per_device_eval_batch_size": 1},  # a score is the same in batches of any size
        {"world_size": 2, "gradient_accumulation_steps": 2},
    ],
)
def test_a_run_is_resumed_where_what_is_trained_stays_the_same(recipe, begun, changes, tmp_path, capsys):
    training = begun(**changes)
    recipe.require_same_settings(training, tmp_path)
    assert recipe.rows_per_step(training) == 8 and capsys.readouterr().out == ""


@pytest.mark.parametrize("changes", [{"world_size": 2}, {"world_size": 2, "rows_per_step": 8}, {"world_size": 4}])
@pytest.mark.parametrize("old_processes", ["1", "(not written down)"])  # earlier versions did not write it down
def test_another_number_of_processes_is_made_up_for(recipe, begun, changes, old_processes, tmp_path, capsys):
    if old_processes != "1":
        without_notes(tmp_path / "settings.yaml", recipe.PROCESSES_NOTE)
    training = begun(**changes)
    recipe.require_same_settings(training, tmp_path)
    processes = changes["world_size"]
    accumulation = 4 // processes
    assert training.gradient_accumulation_steps == accumulation and recipe.rows_per_step(training) == 8
    assert capsys.readouterr().out == (
        f"processes {old_processes} -> {processes}: gradient_accumulation_steps 4 -> {accumulation}, so that a step "
        "keeps its 8 rows\n"
    )
    recipe.write_settings(training)
    text = (tmp_path / "settings.yaml").read_text()
    assert f"{recipe.ROWS_NOTE}8\n{recipe.PROCESSES_NOTE}{processes}\n" in text
    assert f"\ngradient_accumulation_steps: {accumulation}\n" in text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 2e-4}, r"learning_rate 0.0001 -> 0.0002"),
        # On these, two rows at once do not make eight; or others are asked for.
        ({"world_size": 3}, "rows in a step 8 -> 24, 2 at once on each of 3 processes \\(before: 1\\)"),
        ({"world_size": 8}, "rows in a step 8 -> 64, 2 at once on each of 8 processes \\(before: 1\\)"),
        (
            {"world_size": 2, "rows_per_step": 16},
            "rows in a step 8 -> 16, 2 at once on each of 2 processes \\(before: 1\\)",
        ),
        (
            {"gradient_accumulation_steps": 2},
            "rows in a step 8 -> 4, 2 at once on each of 1 processes \\(before: 1\\)",
        ),
        ({"max_steps": 200}, "max_steps 100 -> 200"),
        ({"max_eval_rows": 2}, "max_eval_rows 8 -> 2"),  # scores before and after are of other rows
        ({**BEST, "max_eval_rows": 2}, "max_eval_rows 8 -> 2"),
        ({**BEST, "max_new_tokens": 8}, "max_new_tokens 64 -> 8"),  # the best would be one that may say more
    ],
)
def test_a_run_is_not_resumed_with_other_settings(recipe, begun, changes, message, tmp_path):
    expected = f"(?s)^error: {tmp_path} holds a run with other settings:\n  {message}\n{REMEDIES}"
    with pytest.raises(SystemExit, match=expected):
        recipe.require_same_settings(begun(**changes), tmp_path)


def test_what_may_differ_as_well_is_said(recipe, begun, tmp_path, capsys):
    """Of a checkpoint that is given by path the run may become longer."""
    recipe.require_same_settings(begun(), tmp_path, ("max_steps",))
    assert capsys.readouterr().out == ""
    recipe.require_same_settings(begun(max_steps=200), tmp_path, ("max_steps",))
    assert capsys.readouterr().out.startswith("max_steps 100 -> 200: ")
    with pytest.raises(SystemExit, match="other settings:\n  learning_rate 0.0001 -> 0.0002\n[^ ]"):
        recipe.require_same_settings(begun(max_steps=200, learning_rate=2e-4), tmp_path, ("max_steps",))


def test_a_recipe_that_has_changed_is_named(recipe, begun, tmp_path, capsys):
    def said_on_resume():
        recipe.require_same_settings(begun(), tmp_path)
        return capsys.readouterr().out

    settings = tmp_path / "settings.yaml"
    text, digest = settings.read_text(), hashlib.sha256(Path(recipe.__file__).read_bytes()).hexdigest()
    assert f"\n{recipe.RECIPE_NOTE}{digest}\n" in text
    assert said_on_resume() == ""
    settings.write_text(text.replace(digest, hashlib.sha256(b"another file").hexdigest()))
    assert said_on_resume() == f"note: {recipe.__name__}.py has changed since this run was begun\n"
    without_notes(settings, recipe.RECIPE_NOTE)  # an earlier version did not say what it was
    assert said_on_resume() == ""


@pytest.mark.parametrize("is_earlier", [True, False])
@pytest.mark.parametrize("changes", [BEST, {}])
def test_an_eval_loss_that_was_another_mean_is_said(recipe, begun, is_earlier, changes, tmp_path, capsys):
    """Where the best checkpoint is chosen: earlier versions, which did not write the number of processes, took the
    mean over batches."""
    if is_earlier:
        without_notes(tmp_path / "settings.yaml", recipe.PROCESSES_NOTE, recipe.RECIPE_NOTE)
    recipe.require_same_settings(begun(**changes), tmp_path)
    expected = ""
    if is_earlier and changes == BEST:
        expected = "note: this run was begun by an earlier version, whose eval_loss was a mean over batches"
        expected += ", not over tokens\n"
    assert capsys.readouterr().out == expected


REMEDIES = "Choose another --output_dir, or resume what is there: python .*.py --config .*settings.yaml$"


def test_what_was_typed_is_shown_first_and_at_most_ten_lines(recipe, begun, tmp_path):
    changes = {f"setting_{n}": n + 1 for n in range(12)}
    training = begun(**changes, seed=1, learning_rate=2e-4)
    training.typed = {"learning_rate", "seed"}
    with pytest.raises(SystemExit) as end:
        recipe.require_same_settings(training, tmp_path)
    first, *lines, remedy = end.value.code.splitlines()
    assert lines[:3] == ["  learning_rate 0.0001 -> 0.0002", "  seed 0 -> 1", "  setting_0 0 -> 1"]
    assert len(lines) == 11 and lines[-1] == "  and 4 more" and re.search(REMEDIES, remedy)


@pytest.mark.parametrize("name, value", [("model_name_or_path", "llava"), ("dataset_name", "rows.json")])
def test_another_model_or_other_data_are_another_run(recipe, begun, name, value, tmp_path):
    message = f"holds another run: its {name} is {value}. {REMEDIES}"
    with pytest.raises(SystemExit, match=message) as end:
        recipe.require_same_settings(begun(**{name: "another"}, learning_rate=1), tmp_path)
    assert "\n" not in end.value.code and "learning_rate" not in end.value.code


def test_a_run_that_named_its_data_by_the_other_name_is_resumed(recipe, begun, tmp_path):
    text = (tmp_path / "settings.yaml").read_text()
    (tmp_path / "settings.yaml").write_text(text.replace("dataset_name:", "data_path:"))
    recipe.require_same_settings(begun(), tmp_path)
    with pytest.raises(SystemExit, match="holds another run: its dataset_name is rows.json"):
        recipe.require_same_settings(begun(dataset_name="others.json"), tmp_path)


# -------------------------------------------------------------------------------------------------------- LoRA targets

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
        ("a.jsonl", '{"a": 1}\n\udcff', "line 2: 'utf-8' codec can't decode byte 0xff"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}', "line 2: a key appears twice in .*'a', 1.*'a', 2"),
        ("a.json", '[{"a": 1, "a": 2}]', "a key appears twice"),
        ("a.json", '{"a": 1}', "must be a list of rows"),
        ("a.json", "[]", "it is empty"),
        ("a.json", '[{"a": "\\ud83d"}]', r"row 0 has invalid Unicode"),
    ],
)
def test_json_files_that_cannot_be_read(recipe, name, text, message, tmp_path):
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        recipe.read_json(tmp_path / name)


TEXTS = ["", "é", "\u2028", "\U0001f600", '"', "\\", "\\u0041", "{", "]", ",", "\n", "x" * 70]
FORMS = {
    "one line": lambda rows: json.dumps(rows),
    "indented": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False),
    "lines": lambda rows: "\ufeff  [\n" + "\n,\r\n".join(map(json.dumps, rows)) + "]\n\n",
}


def cells_of(recipe, path):
    """{column: cells} of a file, put together from its pieces; and how many these are."""
    pieces, columns = recipe.pieces_of_json(path)
    cells = {column: [] for column in columns}
    for piece in pieces:
        some = recipe.rows_of_piece({name: [value] for name, value in piece.items()}, path, columns)
        for column in columns:
            cells[column] += map(json.loads, some[column])
    return cells, len(pieces)


@pytest.mark.parametrize("piece", [1, 7, 64, 2**22])
def test_rows_of_json_are_those_that_json_reads_wherever_pieces_are_cut(recipe, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "JSON_PIECE", piece)
    rows = [{"id": n, "text": TEXTS[n % len(TEXTS)], "more": [n / 7, {"a": TEXTS[: n % 5]}]} for n in range(25)]
    texts = {f"{form}.json": write(rows) for form, write in FORMS.items()}
    texts["lines.jsonl"] = "\ufeff" + "\r\n\n".join(map(json.dumps, rows))
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        cells, num_pieces = cells_of(recipe, tmp_path / name)
        assert [dict(zip(cells, row)) for row in zip(*cells.values())] == rows, name
        assert num_pieces > 3 or piece > 1000


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"a": 1},\n\n {"a" 2}]', "Expecting ':' delimiter: line 3 column 7 "),
        ('[{"a": 1}\n{"a": 2}]', "Expecting ',' delimiter: line 2 column 1 "),
        ('[{"a": 1},\n]', "Expecting value: line 2 column 1 "),
        ('[{"a": 1}]\n x', "Extra data: line 2 column 2 "),
        ('[{"a": "1},\n{}]', "(Invalid control character|Unterminated string).*line 1 column "),
        ('\n[{"a": 1}, {"b": 1,\n"b": 2}]', r"line 2: a key appears twice in .*'b'"),
        ('["a"]', "it must be a list of rows"),
        ("{\n}", "it must be a list of rows"),
        ("  ", "it is empty"),
        ('[{"a": 1}', "Expecting ',' delimiter: line 1 column 10 "),
        ('[{"a": 1},\n {"a": "\udcff"}]', "line 2: 'utf-8' codec can't decode byte 0xff .*one list of rows"),
    ],
)
@pytest.mark.parametrize("piece", [5, 2**22])
def test_mistakes_in_json_are_named_with_their_line(recipe, piece, text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "JSON_PIECE", piece)
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"^{message}"):
        recipe.read_json(tmp_path / "a.json")


def test_a_large_json_is_read_in_little_memory(recipe, tmp_path):
    """40 MB, of which a few are in memory at a time."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": n, "text": "word " * 400} for n in range(20_000)]))
    tracemalloc.start()
    pieces, _ = recipe.pieces_of_json(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 40e6 and len(pieces) >= 9 and peak < 30e6


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


FLA, CONV1D = "fla.ops.gated_delta_rule", "causal_conv1d"
LINEAR, CONVOLUTIONS = "linear attention", "short convolutions"


@pytest.mark.parametrize(
    "model_type, importable, device, lines",
    [
        ("qwen3_5_text", [FLA, CONV1D], "cuda", {LINEAR: "kernels of fla-core", CONVOLUTIONS: "kernels of causal-"}),
        (
            "qwen3_5_text",
            [FLA],
            "cuda",
            {LINEAR: "kernels of fla-core", CONVOLUTIONS: "PyTorch.*install.*causal-conv1d=="},
        ),
        ("qwen3_5_text", [], "cuda", {LINEAR: "PyTorch.*pip install.*fla-core==", CONVOLUTIONS: "PyTorch.*install"}),
        ("qwen3_5_text", [], "cpu", {LINEAR: "PyTorch$", CONVOLUTIONS: "PyTorch$"}),  # nothing would be faster
        ("lfm2", [FLA], "cuda", {CONVOLUTIONS: "PyTorch.*pip install.*causal-conv1d=="}),
        ("llama", [FLA, CONV1D], "cpu", {}),
    ],
)
@pytest.mark.parametrize("name", ["sft_llava", "finetune_minicpm_lora"])
def test_says_what_computes_linear_attention(name, model_type, importable, device, lines, monkeypatch, capsys):
    for module in (FLA, CONV1D):
        monkeypatch.setitem(sys.modules, module, ModuleType(module) if module in importable else None)
    config = transformers.AutoConfig.for_model(model_type)
    importlib.import_module(name).print_kernels(config, torch.device(device))
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert printed.keys() == lines.keys()
    assert all(re.match(pattern, printed[what]) for what, pattern in lines.items())


def test_kernels_that_a_cpu_cannot_run_are_refused_before_training(tiny_minicpm, monkeypatch):
    """Transformers would call them there, too."""
    monkeypatch.setitem(sys.modules, FLA, ModuleType(FLA))
    case = Recipe("finetune_minicpm_lora", tiny_minicpm, tiny_minicpm)
    assert re.search("linear attention.*need a GPU.*pip uninstall fla-core", case.refusal(case.flags()))


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_losses_are_those_of_the_stock_loss_in_parts_of_any_size(monkeypatch, at_once):
    """Values and gradients, of the hidden states and of the head; only positions before a label are scored."""
    import llava_two_stage as recipe

    monkeypatch.setattr(recipe, "LOGITS", 5 * at_once)
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 2, -100, -100]])
    batch = {"input_ids": labels, "attention_mask": labels, **recipe.where_trained(labels)}
    assert batch["trained_at"].tolist() == [1, 2, 4] and batch["targets"].tolist() == [3, 4, 2]
    head, hidden = torch.nn.Linear(8, 5), torch.randn(2, 4, 8, requires_grad=True)
    want = ForCausalLMLoss(head(hidden), labels, vocab_size=5, num_items_in_batch=7)
    want_gradients = torch.autograd.grad(want, [hidden, head.weight])
    scored = []
    head.register_forward_hook(lambda module, inputs, output: scored.append(output.shape))
    with recipe.losses_as_logits(head, batch) as inputs:
        losses = head(hidden)
    assert inputs == {"input_ids": labels, "use_cache": False} and scored == [(3,)]
    got = recipe.mean_of_losses(SimpleNamespace(logits=losses), labels, num_items_in_batch=7)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, [hidden, head.weight]), want_gradients)
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


# ------------------------------------------------------------------------------------------------------------- loaders


def test_the_loader_works_ahead_in_processes_of_its_own(recipe, tmp_path, monkeypatch):
    """Four of them, each two batches ahead (torch's default), into pinned memory; but that has no effect on a CPU."""

    def collate(rows):
        return {"number": torch.tensor([row["number"] for row in rows])}

    def loader():
        return transformers.Trainer(torch.nn.Linear(1, 1), training, collate, rows).get_train_dataloader()

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    argv = ["--use_cpu", "--output_dir", str(tmp_path), "--report_to", "none", "--eval_strategy", "no"]
    _, training = recipe.parse(argv)
    rows = datasets.Dataset.from_dict({"number": range(40)})
    assert training.as_given["dataloader_pin_memory"] is True  # asked for, but turned off by --use_cpu
    assert not training.dataloader_pin_memory and not loader().pin_memory
    training.dataloader_pin_memory = True
    assert (loader().num_workers, loader().prefetch_factor, loader().pin_memory) == (4, 2, True)
    with pytest.warns(UserWarning, match="pin_memory.*no accelerator is found"):
        seen = [batch["number"] for batch in loader()]
    assert sorted(torch.cat(seen).tolist()) == list(range(40)) and not any(some.is_pinned() for some in seen)
    assert {len(some) for some in seen} == {training.train_batch_size}


FORKED = """
import sys, datasets, torch

def work():  # for several threads
    return int(torch.cat([torch.ones(300_000), torch.ones(300_000)]).sum() > 0)

def collator(rows):
    return {"attention_mask": torch.ones(1, 1 + work())}

collator.read = lambda row: []
work()
for name in sys.argv[2:]:
    recipe = __import__(name)
    stage = ["--stage", "instruct"] if name == "llava_two_stage" else []
    settings, training = recipe.parse(["--use_cpu", "--output_dir", sys.argv[1], *stage])
    data = datasets.Dataset.from_dict({"row": list(range(1001)), "image": [None] * 1001, "folder": [name] * 1001})
    rows = recipe.check_and_measure_rows(data, "rows", collator, settings, training)
    print(name, len(rows), "rows,", torch.get_num_threads(), "threads")
"""


def test_many_rows_are_checked_where_pytorch_has_several_threads(tmp_path):
    """As it has by default: forked processes must not wait for threads that only their parent has."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", FORKED, str(tmp_path / "out"), *NAMES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    expected = [f"{name} 1001 rows, 2 threads" for name in NAMES]
    assert [line for line in done.stdout.splitlines() if "threads" in line] == expected, done.stderr[-3000:]
