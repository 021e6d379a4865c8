"""A run that ended too early goes on to the same end; one that ended, or another one, is not touched."""

import functools
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import recipes
import runs
import torch
from conftest import log
from safetensors.torch import load_file
from transformers import TrainerCallback

# Ten rows, two times two a step: three steps an epoch. Checkpoints 2 and 4 are in mid-epoch, 6 is at the end of one,
# and the last step is in mid-epoch again.
RUN = {"max_steps": 7, "eval_steps": 2, "save_steps": 2, "save_total_limit": 9, "logging_steps": 1, "sample_rows": 2}
RUN |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "load_best_model_at_end": True}
RUN |= {"learning_rate": 1e-3}  # the shipped ones hardly move a model in a few steps
OWN = {
    "sft_llava": {"sample_tokens": 4, "neftune_noise_alpha": 5},
    "idefics2_docvqa": {"max_new_tokens": 4, "metric_for_best_model": "loss"},
    "dpo_idefics2": {"max_new_tokens": 4},
    "finetune_minicpm_lora": {"sample_tokens": 4},
    "llava_two_stage": {"sample_tokens": 4, "projector_learning_rate": 1e-2, "warmup_steps": 0},
}
LAST = {"load_best_model_at_end": False}
FLOAT, DORA, FULL = {"load_in_4bit": False}, {"use_dora": True}, {"use_lora": False, "tune_llm": True}
ALIGN, LORA = {"stage": "align", "learning_rate": None}, {"lora_r": 8, "lora_alpha": 16}
TOWER = {"vision_learning_rate": 1e-4}
WAYS = {  # recipe, then what is trained -> the checkpoint that is named, settings
    "sft_llava": (6, {}),
    "sft_llava, projector": (4, {"train_projector": True}),
    "sft_llava, DoRA": (2, DORA | LAST),
    "sft_llava, full, projector": (4, FLOAT | {"lora_r": 0, "train_projector": True}),
    "idefics2_docvqa": (6, {}),
    "idefics2_docvqa, DoRA": (4, DORA | LAST),
    "idefics2_docvqa, float": (2, FLOAT),
    "idefics2_docvqa, shared pages": (4, LAST),
    "dpo_idefics2": (6, {}),
    "dpo_idefics2, float, DoRA": (4, FLOAT | DORA | LAST),
    "finetune_minicpm_lora": (6, {}),
    "finetune_minicpm_lora, vision": (4, TOWER | {"tune_vision": True}),
    "finetune_minicpm_lora, words": (2, {"lora_modules_to_save": "embed_tokens"}),
    "finetune_minicpm_lora, 4.7, full": (4, FULL | LAST),
    "finetune_minicpm_lora, 2.6": (6, LAST),
    "finetune_minicpm_lora, 2.6, full": (4, FULL),
    "finetune_minicpm_lora, 2.6, 4-bit": (2, {"q_lora": True}),
    "finetune_minicpm_lora, 2.6, projector": (4, {"use_lora": False}),
    "llava_two_stage, align": (6, ALIGN),
    "llava_two_stage, align, vision": (2, ALIGN | TOWER | LAST),
    "llava_two_stage, full": (4, LAST),
    "llava_two_stage, full, vision": (6, TOWER),
    "llava_two_stage, joined": (6, LORA | {"pretrain_mm_mlp_adapter": "align"}),
    "llava_two_stage, LoRA, vision": (4, LORA | TOWER),
    "llava_two_stage, 4-bit": (2, LORA | {"load_in_4bit": True}),
}
KILLED = [
    *recipes.NAMES[:4],
    "idefics2_docvqa, shared pages",
    "finetune_minicpm_lora, 2.6",
    "llava_two_stage, align",
    "llava_two_stage, joined",
]
EACH = [*recipes.NAMES[:4], "llava_two_stage, joined"]  # of each recipe one
each_recipe = pytest.mark.parametrize("way", EACH)


# ------------------------------------------------------------------------------------------------- what the tests use
def module_of(way):
    return importlib.import_module(way.split(",")[0])


def pictures_of(row):
    image = row.get("image")
    return len([image] if isinstance(image, str) else image or ())


def mixed(rows, count):
    """So many rows, in turn of those with no picture, one, two."""
    kinds = {}
    for row in rows:
        kinds.setdefault(pictures_of(row), []).append(row)
    places = [(place, kind, row) for kind, some in kinds.items() for place, row in enumerate(some)]
    return [row for _, _, row in sorted(places, key=lambda place: place[:2])][:count]


def answers(n):
    """The accepted answers of row `n`: of several lengths, and no two rows have one in common."""
    return [f"{n}", f"it is {n}", f"Room {n} on the form of Oslo"]


@pytest.fixture(scope="module")
def flags_of(request, tmp_path_factory):
    """A function: way, folder for the results, settings -> the flags of a run on ten rows; it evaluates four."""

    @functools.cache
    def prepared(way):
        name = way.split(",")[0]
        families = {"2.6": "tiny_minicpm26", "4.7": "tiny_minicpm47"}
        fixture = next((fixture for family, fixture in families.items() if family in way), recipes.FOLDERS[name])
        case = recipes.Recipe(name, request.getfixturevalue(fixture), tmp_path_factory.mktemp(name))
        file = "captions" if "align" in way else "train"
        rows = mixed(json.loads((case.folder / "json" / f"{file}.json").read_text()), 14)
        if name == "idefics2_docvqa":
            rows = [{**row, "answers": answers(n)} for n, row in enumerate(rows)]
        if "shared pages" in way:
            rows = [{**row, "image": rows[n % 4]["image"]} for n, row in enumerate(rows)]
        settings = {**RUN, **OWN[name], "image_folder": case.folder / "json" / "images", **WAYS[way][1]}
        for flag, some in (("dataset_name", rows[:10]), ("eval_dataset_name", rows[10:])):
            settings[flag] = case.tmp_path / f"{flag}.json"
            settings[flag].write_text(json.dumps(some))
        if settings.get("pretrain_mm_mlp_adapter") == "align":
            settings["pretrain_mm_mlp_adapter"] = case.folder / "align"
        return case, settings

    def make(way, out, **changes):
        case, settings = prepared(way)
        return case.flags(**{**settings, "output_dir": out, **changes})

    return make


class BestAtStepTwo(TrainerCallback):
    """Makes the second step the best, so that the best weights are not the last ones."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if state.global_step == 2:
            metrics["eval_loss"] = 0.0


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def run(flags_of):
    """A function: way, folder for the results, settings -> its run (runs.py)."""

    def make(way, out, **changes):
        return runs.run(module_of(way), flags_of(way, out, **changes), callbacks=(BestAtStepTwo(),))

    return make


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A function: way -> its run, which nothing interrupted. Its folder stays as it is."""
    return functools.cache(lambda way: run(way, tmp_path_factory.mktemp("whole") / "out"))


@pytest.fixture(scope="module")
def dead(flags_of, tmp_path_factory):
    """A function: way -> the folder of the same run with two loader processes, killed as it ended its fifth step."""

    @functools.cache
    def make(way):
        out = tmp_path_factory.mktemp("killed") / "out"
        argv = flags_of(way, out, dataloader_num_workers=2)
        callbacks = {"callbacks": (BestAtStepTwo(), Kill())}
        context = multiprocessing.get_context("fork")  # a new Python would need seconds to import
        process = context.Process(target=runs.run, args=(module_of(way), argv), kwargs=callbacks)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
        assert not (out / "trainer_state.json").exists()
        return out

    return make


def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "out"))


def weights_in(folder):
    return next(path for path in folder.glob("*model.safetensors"))


def same_tensors(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def values(folder):
    """The saved weights without their names, which in a result may be other ones than in a checkpoint."""
    return sorted(tensor.numpy().tobytes() for tensor in load_file(weights_in(folder)).values())


def logged(out, after):
    """What was logged after a step, but for times."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    other = re.compile("runtime|per_second|flos")
    return [
        {name: value for name, value in entry.items() if not other.search(name)}
        for entry in history
        if entry["step"] > after and "train_runtime" not in entry
    ]


def assert_same_end(whole, resumed, after):
    """From step `after` on all is the same to the last bit: what was logged, trained and saved."""
    assert logged(resumed.out, after) == logged(whole.out, after)
    assert len(resumed.weights) == 1 + 7 - after  # the first are the checkpoint's
    for expected, found in zip(whole.weights[after:], resumed.weights):
        assert same_tensors(expected, found)
    assert same_tensors(load_file(weights_in(whole.out)), load_file(weights_in(resumed.out)))


def samples_of(out):
    """samples.md -> the rows of each of its tables."""
    tables = re.split("^## Step ", (out / "samples.md").read_text(), flags=re.M)[1:]
    return [[line for line in table.splitlines() if line.startswith("| ")][1:] for table in tables]


def contents(out):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.fixture
def nothing_is_read(monkeypatch):
    """A function: module -> it fails where it would read rows, or load a processor or a model."""

    def make(module):
        for name in ("load_processor", "load_data", "load_model"):
            monkeypatch.setattr(module, name, None)

    return make


# ------------------------------------------------------------------------------------------------------- the same end
@pytest.mark.parametrize("way", KILLED)
def test_a_killed_run_started_again_comes_to_the_same_end(way, whole, dead, run, tmp_path):
    """With the same command, whatever the number of loader processes; a checkpoint that was cut off is passed over."""
    out = copied(dead(way), tmp_path)
    half = Path(shutil.copytree(out / "checkpoint-4", out / "checkpoint-5"))
    (half / "optimizer.pt").write_bytes((half / "optimizer.pt").read_bytes()[:1000])
    resumed = run(way, out, dataloader_num_workers=2)
    assert f"{half}: optimizer.pt is damaged (it has 1000 bytes of " in resumed.text
    assert f"resuming from {out / 'checkpoint-4'}\n" in resumed.text
    assert_same_end(whole(way), resumed, after=4)
    assert ("(--share_pages true)" in resumed.text) == ("shared pages" in way)
    samples = (out / "samples.md").read_text()
    assert samples == (whole(way).out / "samples.md").read_text()
    assert re.findall(r"^## Step (\d+)", samples, re.M) == ["2", "4", "6", "7"]


@pytest.mark.parametrize("way", WAYS)
def test_whatever_is_trained_goes_on_from_the_checkpoint_that_is_named(way, whole, run, tmp_path):
    step = WAYS[way][0]
    checkpoint = whole(way).out / f"checkpoint-{step}"
    resumed = run(way, tmp_path / "other", resume_from_checkpoint=checkpoint)
    assert f"resuming from {checkpoint}\n" in resumed.text
    assert_same_end(whole(way), resumed, after=step)


@each_recipe
def test_a_log_entry_of_several_steps_is_finished(way, run, tmp_path):
    """It is a mean over three steps, of which one was taken before the checkpoint. Also an evaluation's tokens."""
    first = run(way, tmp_path / "whole", logging_steps=3)
    checkpoint = first.out / "checkpoint-4"
    again = run(way, tmp_path / "again", logging_steps=3, resume_from_checkpoint=checkpoint)
    assert list(log(first.out)) == [3, 6] and logged(again.out, after=4) == logged(first.out, after=4)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_killed_before_its_result_was_saved_takes_no_other_step(way, whole, run, tmp_path):
    first = whole(way)
    out = copied(first.out, tmp_path)
    weights_in(out).unlink()
    (out / "trainer_state.json").unlink()
    again = run(way, out)
    assert len(again.weights) == 1 and log(out) == log(first.out) and list(log(out)) == list(range(1, 8))
    assert same_tensors(load_file(weights_in(out)), load_file(weights_in(first.out)))
    chosen = 2 if WAYS[way][1].get("load_best_model_at_end", True) else 7
    assert values(out) == values(first.out / f"checkpoint-{chosen}")


@each_recipe
def test_a_best_checkpoint_that_is_gone_is_named(way, whole, flags_of, tmp_path):
    out = copied(whole(way).out, tmp_path)
    (out / "trainer_state.json").unlink()
    state = out / "checkpoint-7" / "trainer_state.json"
    gone = {"best_model_checkpoint": "elsewhere/checkpoint-1"}
    state.write_text(json.dumps(json.loads(state.read_text()) | gone))
    (state.parent / "checksums.json").unlink()
    shutil.rmtree(out / "checkpoint-2")  # nor is it beside this one
    with pytest.raises(SystemExit, match="^error: elsewhere/checkpoint-1, the best checkpoint, is missing or damaged"):
        module_of(way).main(flags_of(way, out))


@each_recipe
def test_the_best_checkpoint_of_a_run_that_was_moved_is_found(way, whole, run, tmp_path):
    """By its name, beside the one that is resumed from."""
    out = copied(whole(way).out, tmp_path)
    for gone in ("trainer_state.json", "checkpoint-6", "checkpoint-7"):
        path = out / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    state = out / "checkpoint-4" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"best_model_checkpoint": "elsewhere/checkpoint-2"}))
    (out / "checkpoint-4" / "checksums.json").unlink()
    again = run(way, out)
    assert "at step 2; that is saved" in again.text and values(out) == values(out / "checkpoint-2")


@each_recipe
def test_a_finished_run_can_be_made_longer(way, whole, run, flags_of, tmp_path, monkeypatch):
    """Its end is taken back as soon as it goes on; interrupted by the keyboard, it says how to go on. How many samples
    are shown may change."""
    out = copied(whole(way).out, tmp_path)
    module = module_of(way)
    with monkeypatch.context() as patch, pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
        patch.setattr(module.Trainer, "training_step", interrupt)
        module.main(flags_of(way, out, max_steps=8, resume_from_checkpoint=out / "checkpoint-7"))
    assert re.search(f"^error: interrupted; .*--config {out}/settings.yaml$", stopped.value.code)
    again = run(way, out, max_steps=8, sample_rows=1)
    assert f"resuming from {out / 'checkpoint-7'}\n" in again.text and list(log(out)) == list(range(1, 9))
    assert [len(samples_of(folder)[-1]) for folder in (whole(way).out, out)] == [2, 1]


# -------------------------------------------------------------------------------------------- what is not gone on from
@pytest.mark.parametrize("way", KILLED)
@pytest.mark.parametrize("has_checksums", [True, False], ids=["checksums", "of an earlier version"])
def test_a_damaged_checkpoint_is_not_whole(way, has_checksums, whole, tmp_path):
    """Missing, empty or cut off: any of its files, which is named. A byte that differs is found by its checksum."""
    good, damage_of = whole(way).out / "checkpoint-4", module_of(way).damage_of
    assert damage_of(good) is None
    others = {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    names = {weights_in(good).name, *others}
    if has_checksums:
        names = {path.name for path in good.iterdir()} - {"checksums.json"}
        assert others < names
    copy = Path(shutil.copytree(good, tmp_path / "checkpoint-4"))
    if not has_checksums:
        (copy / "checksums.json").unlink()
        assert damage_of(copy) is None
    for file in names:
        content = (good / file).read_bytes()
        middle = len(content) // 2
        damaged = [None, b"", content[:middle]]
        if has_checksums:
            damaged.append(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        for new in damaged:
            (copy / file).unlink()
            if new is not None:
                (copy / file).write_bytes(new)
            named = file
            if new is None and not has_checksums:  # any name that fits would do
                named = {weights_in(good).name: "*.safetensors", "rng_state.pth": "rng_state*"}.get(file, file)
            assert named in damage_of(copy), (file, new)
            (copy / file).write_bytes(content)
        assert damage_of(copy) is None


OTHERS = {  # settings of another run, and how each is named
    "sft_llava": ({"lora_r": 8, "learning_rate": 0.1}, ["lora_r 16 -> 8", "learning_rate 0.001 -> 0.1"]),
    "idefics2_docvqa": (
        {"language": "de", "image_splitting": True},
        ["language en -> de", "image_splitting False -> True"],
    ),
    "dpo_idefics2": (
        {"loss_type": ["sigmoid", "sft"], "adapters": "language"},
        ["loss_type ['sigmoid'] -> ['sigmoid', 'sft']", "adapters all -> language"],
    ),
    "finetune_minicpm_lora": (
        {"lora_modules_to_save": "embed_tokens", "max_slice_nums": 2},
        ["lora_modules_to_save [] -> ['embed_tokens']", "max_slice_nums 9 -> 2"],
    ),
    "llava_two_stage, align": (
        {"projector_learning_rate": 0.1, "stage": "instruct", "pretrain_mm_mlp_adapter": "projector.bin"},
        ["projector_learning_rate 0.01 -> 0.1", "stage align -> instruct"],
    ),
    "llava_two_stage, joined": (
        {"image_aspect_ratio": "square", "load_in_4bit": True},
        ["image_aspect_ratio None -> square", "load_in_4bit False -> True"],
    ),
}


@pytest.mark.parametrize("way", OTHERS)
def test_an_unfinished_run_is_not_overwritten(way, dead, flags_of, nothing_is_read):
    out, module = dead(way), module_of(way)
    nothing_is_read(module)
    before = contents(out)
    settings, named = OTHERS[way]
    for changes, texts in [
        ({"resume_from_checkpoint": "false"}, ["holds a run already", "--output_dir"]),
        ({"resume_from_checkpoint": "nowhere"}, ["nowhere: not a complete checkpoint"]),
        (settings, [*named, "--output_dir"]),
    ]:
        with pytest.raises(SystemExit) as stopped:
            module.main(flags_of(way, out, **changes))
        message = stopped.value.code
        assert message.startswith("error: ") and [text for text in texts if text not in message] == []
    assert contents(out) == before


@pytest.mark.parametrize("way", OTHERS)
def test_settings_are_compared_with_those_of_the_checkpoint_that_is_named(way, dead, flags_of, run, tmp_path):
    """As with auto. Only the length of the run may be another one, which is said."""
    out, module = copied(dead(way), tmp_path), module_of(way)
    named = {"resume_from_checkpoint": out / "checkpoint-4"}
    settings, texts = OTHERS[way]
    for folder in (out, tmp_path / "elsewhere"):
        with pytest.raises(SystemExit) as stopped:
            module.main(flags_of(way, folder, **named, **settings))
        message = stopped.value.code
        assert message.startswith(f"error: {out} holds a run with other settings:")
        assert [text for text in [*texts, "--output_dir"] if text not in message] == []
    with pytest.raises(SystemExit, match=r"max_eval_rows \d+ -> 3"):
        module.main(flags_of(way, out, **named, max_eval_rows=3))
    older = {"resume_from_checkpoint": out / "checkpoint-2"}
    with pytest.raises(SystemExit, match="holds other checkpoints than .*checkpoint-2: checkpoint-4; delete them"):
        module.main(flags_of(way, out, **older))
    longer = run(way, out, **named, max_steps=8)
    assert "max_steps 7 -> 8: from here on the learning rates" in longer.text
    assert list(log(longer.out)) == list(range(1, 9))


@each_recipe
@pytest.mark.parametrize("text", [None, "", "- 1", "a: b: c"])
def test_a_run_that_does_not_say_which_it_is_is_not_gone_on_from(way, text, dead, flags_of, nothing_is_read, tmp_path):
    out = copied(dead(way), tmp_path)
    nothing_is_read(module_of(way))
    (out / "settings.yaml").unlink()
    if text is not None:
        (out / "settings.yaml").write_text(text)
    with pytest.raises(SystemExit, match="^error: .*without the settings.yaml .*--output_dir"):
        module_of(way).main(flags_of(way, out))


@pytest.mark.parametrize("way", [*EACH, "llava_two_stage, align"])
def test_a_finished_run_says_so(way, whole, flags_of, nothing_is_read, tmp_path, capsys):
    """Without reading anything; so does one that differs only in what may change."""
    out, main = whole(way).out, module_of(way).main
    nothing_is_read(module_of(way))
    before = contents(out)
    for changes in ({}, {"sample_rows": 1, "logging_steps": 2}):
        with pytest.raises(SystemExit) as stopped:
            main(flags_of(way, out, **changes))
        assert stopped.value.code in (0, None) and "finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="seed 42 -> 4"):
        main(flags_of(way, out, seed=4))
    (tmp_path / "run.yaml").write_text("resume_from_checkpoint: false\n")
    with pytest.raises(SystemExit, match="holds a run"):
        main(flags_of(way, out, config=tmp_path / "run.yaml"))
    assert contents(out) == before
