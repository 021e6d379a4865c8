"""How many rows a step has, how many of them are run at once, and how auto finds what fits a GPU."""

import contextlib
import io
import itertools

import pytest
import torch
import yaml
from recipes import NAMES

GB = 1e9
NO_DROPOUT = {
    "sft_llava": {"lora_dropout": 0},
    "idefics2_docvqa": {"lora_dropout": 0},
    "dpo_idefics2": {"loss_type": ["sigmoid", "sft"]},
    "finetune_minicpm_lora": {"lora_dropout": 0},
    "llava_two_stage": {"lora_dropout": 0, "lora_r": 8},
}
# What a batch on a CPU is: rows at once, accumulated; rows evaluated at once.
ON_A_CPU = {
    "sft_llava": (1, 4, 8),
    "idefics2_docvqa": (2, 8, 4),
    "dpo_idefics2": (2, 32, 4),
    "finetune_minicpm_lora": (1, 8, 1),
    "llava_two_stage": (4, 32, 4),
}
AUTO = {
    "per_device_train_batch_size": "auto",
    "per_device_eval_batch_size": "auto",
    "gradient_accumulation_steps": None,
    "max_steps": 1,
    "save_steps": 1,
    "eval_steps": 1,
}


class Card:
    """Stands in for a GPU of `whole` bytes, of which the model holds 10 GB, and `row` bytes each row that is run."""

    def __init__(self, whole, row, module, patch):
        self.whole, self.row, self.taken, self.tried = whole, row, 0, []
        patch.setattr(module, "gpu_memory", self.memory)
        patch.setattr(module, "clear_device_cache", self.empty)
        for name in ("train_once", "evaluate_once"):
            patch.setattr(module, name, self.watched(getattr(module, name)))

    def memory(self, device):
        return self.whole - 10 * GB - self.taken, self.whole

    def empty(self, garbage_collection):
        self.taken = 0

    def watched(self, run):
        def runs(trainer, rows):
            self.tried.append((run.__name__, len(rows)))
            self.taken = self.row * len(rows)
            if self.taken > self.whole - 10 * GB:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            run(trainer, rows)

        return runs


def chosen(case, card, monkeypatch, **settings):
    """-> (rows at once, accumulated, evaluated at once; what was printed; the trainer, before its first step)."""
    made = case.trainer(**{**AUTO, "rows_per_step": 8, **settings})
    case.module.make_safe(made)  # as train_and_save does
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        case.module.fill_card(made)
    args = made.args
    sizes = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.per_device_eval_batch_size)
    return sizes, printed.getvalue(), made


# -------------------------------------------------------------------------------------------------- what fits a GPU
@pytest.mark.parametrize(
    "whole, row, expected",
    [
        (100 * GB, 0.01 * GB, (8, 1, 64)),  # as many as a step has, and 64
        (20 * GB, 2 * GB, (4, 2, 4)),  # 9 of 10 GB: four rows, and not eight
        (20 * GB, 4 * GB, (2, 4, 2)),
        (20 * GB, 8 * GB, (1, 8, 1)),
        (20 * GB, 9.5 * GB, (1, 8, 1)),  # above 90 %, but it runs
    ],
)
def test_auto_is_the_largest_divisor_of_a_step_below_nine_tenths_of_what_is_free(
    case, whole, row, expected, monkeypatch
):
    card = Card(whole, row, case.module, monkeypatch)
    sizes, printed, made = chosen(case, card, monkeypatch)
    assert sizes == expected
    assert case.module.rows_per_step(made.args) == 8
    assert made.args.as_given["per_device_train_batch_size"] == f"auto:{expected[0]}"
    assert made._train_batch_size == expected[0]
    assert f"per_device_train_batch_size {expected[0]} (auto)" in printed
    peak = 10 + row * expected[0] / GB
    assert f"{peak:.1f} GB of the GPU are taken" in printed
    assert ("train_once", expected[0]) in card.tried and ("evaluate_once", expected[2]) in card.tried
    assert all(weight.grad is None for weight in made.model.parameters())


def test_not_even_one_row_fits(case, monkeypatch):
    card = Card(20 * GB, 11 * GB, case.module, monkeypatch)
    with pytest.raises(SystemExit, match="error: not even one row at once fits this GPU: 4 bits, .* help"):
        chosen(case, card, monkeypatch)


def test_a_wrong_estimate_is_corrected(case, monkeypatch):
    """The longest rows take more together than two of them promised."""
    card = Card(20 * GB, 0.5 * GB, case.module, monkeypatch)
    run = case.module.train_once

    def runs(trainer, rows):
        run(trainer, rows)
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(case.module, "train_once", runs)
    sizes, _, _ = chosen(case, card, monkeypatch)
    assert sizes[:2] == (2, 4)
    assert tried_sizes(card) == [1, 2, 8, 4, 2]


def tried_sizes(card):
    """The training batches in their order. (Where rows with more images are not the longest, both are tried.)"""
    return [size for size, _ in itertools.groupby(size for name, size in card.tried if name == "train_once")]


@pytest.mark.parametrize("case", ["sft_llava", "finetune_minicpm_lora"], indirect=True)
def test_rows_with_the_most_images_are_tried_too(case, monkeypatch):
    """Even where a row of text is longer than all of them."""
    Card(20 * GB, 0.5 * GB, case.module, monkeypatch)
    made, run, seen = case.trainer(**AUTO), case.module.train_once, []
    case.module.make_safe(made)

    def runs(trainer, rows):
        seen.append(max(len(row["image_keys"]) for row in rows))
        run(trainer, rows)

    monkeypatch.setattr(case.module, "train_once", runs)
    rows = made.train_dataset
    images = [len(keys) for keys in rows["image_keys"]]
    lengths = [9999 if count == 0 else length for count, length in zip(images, rows["length"])]
    assert 0 in images
    made.train_dataset = rows.remove_columns("length").add_column("length", lengths)
    with contextlib.redirect_stdout(io.StringIO()):
        case.module.fill_card(made)
    assert 0 in seen and max(images) in seen


def test_another_error_than_of_memory_is_not_swallowed(case, monkeypatch):
    card = Card(20 * GB, GB, case.module, monkeypatch)
    monkeypatch.setattr(case.module, "train_once", lambda trainer, rows: [][1])
    with pytest.raises(IndexError):
        chosen(case, card, monkeypatch)


def test_the_optimizers_states_need_room(case, monkeypatch):
    """And gradients: two moments and a gradient of each trained weight, in float32."""
    card = Card(20 * GB, 2 * GB, case.module, monkeypatch)
    weights = sum(weight.numel() for weight in case.trainer(**AUTO).model.parameters() if weight.requires_grad)
    card.whole = 10 * GB + (4 * 2 * GB + 6 * weights) / 0.9  # half of them is too small for four rows
    sizes, _, _ = chosen(case, card, monkeypatch)
    assert sizes[0] == 2


# ------------------------------------------------------------------------------------------------ runs and settings
def weights_of(case, out):
    """The trained weights of a run."""
    files = sorted((case.tmp_path / out).glob("*.safetensors"))
    assert files
    return [file.read_bytes() for file in files]


def test_a_run_with_auto_is_the_run_with_the_number_that_it_finds(case, monkeypatch):
    Card(20 * GB, 2 * GB, case.module, monkeypatch)
    auto = {**AUTO, "rows_per_step": 4, "output_dir": case.tmp_path / "auto"}
    printed = case.run(**auto)
    assert "steps of 4 rows" in printed
    saved = yaml.safe_load((case.tmp_path / "auto" / "settings.yaml").read_text())
    assert saved["per_device_train_batch_size"] == "auto:4" and saved["per_device_eval_batch_size"] == "auto:4"
    by_hand = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 1}
    case.run(**{**auto, **by_hand, "rows_per_step": None, "output_dir": case.tmp_path / "number"})
    assert weights_of(case, "auto") == weights_of(case, "number")
    saved = yaml.safe_load((case.tmp_path / "number" / "settings.yaml").read_text())
    assert saved["per_device_train_batch_size"] == 4 and saved["gradient_accumulation_steps"] == 1


def test_a_run_on_a_cpu_has_the_recipes_numbers(case):
    settings = {**AUTO, "rows_per_step": None}
    made = case.trainer(**settings)
    case.module.fill_card(made)
    at_once, accumulated, evaluated = ON_A_CPU[case.name]
    args = made.args
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (at_once, accumulated)
    assert args.per_device_eval_batch_size == evaluated
    assert args.as_given["per_device_train_batch_size"] == at_once
    assert args.as_given["gradient_accumulation_steps"] == accumulated


def adopted(case, stored, is_earlier=False, **given):
    """A run in output_dir with these stored settings and 8 rows in a step, on one process (earlier versions did not
    write that down), and the flags of a new command -> its Training."""
    settings, training = case.parse(**{**AUTO, **given})
    out = case.tmp_path / "out"
    out.mkdir(exist_ok=True)
    old = {**training.as_given, **stored}
    notes = "# Rows in a step: 8\n" if is_earlier else "# Rows in a step: 8\n# Processes: 1\n"
    (out / "settings.yaml").write_text(notes + yaml.safe_dump(old))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        case.module.require_same_settings(training, out)
    assert "gradient_accumulation_steps" not in printed.getvalue()  # nothing had to be made up for
    assert case.module.rows_per_step(training) == 8
    return training


@pytest.mark.parametrize("is_earlier", [True, False])
def test_the_same_command_goes_on_with_what_was_chosen(case, is_earlier):
    stored = {"per_device_train_batch_size": "auto:2", "per_device_eval_batch_size": "auto:16"}
    training = adopted(case, stored, is_earlier)
    assert training.per_device_train_batch_size == 2 and training.gradient_accumulation_steps == 4
    assert training.per_device_eval_batch_size == 16
    assert training.auto_batch == set(case.module.BATCH_SIZES)
    assert training.as_given["per_device_train_batch_size"] == "auto:2"


@pytest.mark.parametrize("given", [{"rows_per_step": 8}, {"gradient_accumulation_steps": 4}])
def test_it_goes_on_also_where_a_step_is_given(case, given):
    """By its rows, which are the same; by an accumulation, which makes up for another number of GPUs."""
    stored = {"per_device_train_batch_size": "auto:2", "per_device_eval_batch_size": "auto:16"}
    training = adopted(case, {**stored, "rows_per_step": given.get("rows_per_step")}, **given)
    assert training.per_device_train_batch_size == 2 and training.gradient_accumulation_steps == 4


def test_a_run_of_an_earlier_version_goes_on_with_its_numbers(case):
    """It had numbers as defaults, and no rows_per_step."""
    stored = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 3}
    training = adopted(case, stored, is_earlier=True)
    assert training.per_device_train_batch_size == 2 and training.gradient_accumulation_steps == 4
    assert training.per_device_eval_batch_size == 3 and training.auto_batch == set()
    assert training.as_given["gradient_accumulation_steps"] == 4


def test_a_number_is_the_number_that_an_earlier_version_wrote(case):
    stored = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 3}
    training = adopted(case, stored, is_earlier=True, **stored)
    assert training.per_device_train_batch_size == 2 and training.gradient_accumulation_steps == 4


def test_on_a_smaller_card_accumulation_takes_its_place(case, monkeypatch):
    Card(20 * GB, 4 * GB, case.module, monkeypatch)
    sizes, printed, _ = chosen(case, None, monkeypatch, per_device_train_batch_size="auto:8")
    assert sizes[:2] == (2, 4)
    assert "per_device_train_batch_size 2 (when this run began 8, which does not fit here)" in printed


def test_what_was_chosen_is_kept_where_it_runs_at_all(case, monkeypatch):
    """On the same card: at 95 % of what is free it would not be chosen anew."""
    card = Card(20 * GB, 4.75 * GB, case.module, monkeypatch)
    sizes, _, _ = chosen(case, card, monkeypatch, per_device_train_batch_size="auto:2")
    assert sizes[:2] == (2, 4)
    assert tried_sizes(card) == [2]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"per_device_train_batch_size": "many"}, "--per_device_train_batch_size many: it must be a number, or auto"),
        (
            {"per_device_eval_batch_size": "auto:x"},
            "--per_device_eval_batch_size auto:x: it must be a number, or auto",
        ),
        (
            {"per_device_train_batch_size": 3, "rows_per_step": 8},
            "--rows_per_step 8: 3 at once in each of 1 processes and --gradient_accumulation_steps do not make",
        ),
        (
            {"per_device_train_batch_size": 2, "rows_per_step": 8, "gradient_accumulation_steps": 2},
            "--rows_per_step 8: 2 at once in each of 1 processes and --gradient_accumulation_steps do not make",
        ),
    ],
)
def test_what_does_not_go_together(case, given, message):
    with pytest.raises(SystemExit) as stopped:
        case.parse(**{**AUTO, **given})
    assert message in str(stopped.value.code)


def test_rows_per_step_is_for_all_processes(case, monkeypatch):
    training = case.parse(**AUTO)[1]

    def accumulated(batch, rows):
        vars(training).update(per_device_train_batch_size=batch, rows_per_step=rows, gradient_accumulation_steps=None)
        case.module.pick_batch(training, batch=2, accumulation=4, eval_batch=1)
        return training.per_device_train_batch_size, training.gradient_accumulation_steps

    monkeypatch.setenv("WORLD_SIZE", "4")
    assert accumulated("2", 16) == (2, 2)
    assert accumulated("auto", None) == (2, 4)
    assert accumulated("auto", 16) == (2, 2) and accumulated("auto", 12) == (1, 3)
    with pytest.raises(ValueError, match="--rows_per_step 6: 1 at once in each of 4 processes"):
        accumulated("auto", 6)


# --------------------------------------------------------------------------------- the same step, however it is cut
def step_of(case, batch):
    """One step of five unequal rows, `batch` at once -> (its loss, {name: gradient})."""
    more = {**NO_DROPOUT[case.name], "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1}
    trainer = case.trainer(**more, seed=3)
    case.module.make_safe(trainer)
    with torch.no_grad():  # else half of the adapter's gradients are 0
        torch.manual_seed(0)
        for name, weight in trainer.model.named_parameters():
            if weight.requires_grad and "lora_B" in name:
                weight.normal_(std=0.02)
    rows = [trainer.train_dataset[n] for n in range(5)]
    batches = [trainer.data_collator(rows[n : n + batch]) for n in range(0, 5, batch)]
    trainer.current_gradient_accumulation_steps = len(batches)
    batches, count = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    loss = sum(trainer.training_step(trainer.model, one, count) for one in batches)
    return loss, {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def test_a_step_is_the_same_however_it_is_cut(case):
    loss, gradients = step_of(case, batch=1)
    assert len(gradients) > 4
    for batch in (2, 5):
        other_loss, others = step_of(case, batch)
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            assert (others[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_all_recipes_are_tried():
    assert set(NO_DROPOUT) == set(ON_A_CPU) == set(NAMES)
