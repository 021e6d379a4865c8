"""benchmarks/full_size.py: sizes are the published ones, small copies run through every branch, GPUs are stood in
for."""

import gc
import importlib
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest
from conftest import ROOT
from peft import PeftModel
from PIL import Image
from recipes import load_data, sequences

sys.path.insert(0, str(ROOT / "benchmarks"))
import full_size  # noqa: E402
import made_up  # noqa: E402
import measure  # noqa: E402

torch, transformers = full_size.torch, full_size.transformers
GB = 10**9
pytestmark = pytest.mark.usefixtures("quick_collections")
SHORT = ["--steps", "2", "--warm_up", "1", "--rounds", "1", "--workers", "0", "--batch_sizes", "2"]
ONE = ["--bits", "16", "--checkpointing", "on"]  # one configuration of a recipe


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """As all other tests run, and in this process: another one costs ten seconds."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(full_size, "apart", lambda job: full_size.work(json.loads(json.dumps(job))))


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    """A folder for --scratch, whose weights are kept from test to test."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture
def run(scratch, tmp_path, capsys):
    """A function: flags -> (exit status, what the JSON file holds, what was printed), all in this process."""

    def make(*flags):
        path = tmp_path / "found.json"
        status = full_size.main([*flags, "--scratch", str(scratch), "--keep", "--json", str(path)])
        return status, json.loads(path.read_text()), capsys.readouterr().out

    return make


@pytest.fixture
def scripted(monkeypatch):
    """A function: what one_run gives for a (side, configuration), beside plain figures -> the list of those that were
    run, in order. Nothing else is run."""

    def make(answer):
        ran = []

        def one_run(side, cell, job, path, loaded):
            ran.append((side, cell))
            loaded["outside"] = 0
            steps = {"seconds": [2.0] * job["steps"], "waits": [0.5] * job["steps"], "tokens": [10] * job["steps"]}
            plain = {"status": "ok", "memory": None, "flops": None, "uncounted": None, "tokens_counted": 10}
            plain |= {"batch": cell["batch"], "rows": cell["batch"], "kernel_seconds": None}
            return {**plain, **steps, **answer(side, cell)}

        monkeypatch.setattr(full_size, "rows_needed", lambda *args: 1)
        monkeypatch.setattr(full_size, "make_rows", lambda *args: None)
        monkeypatch.setattr(full_size, "one_run", one_run)
        return ran

    return make


# ---------------------------------------------------------------- sizes, and all recipes in small


TOKENS = {"llava-1.5-7b": 32_002, "idefics2-8b": 32_003, "minicpm-v-4.6": 248_094}  # LLaVA pads its matrix to 32,064


@pytest.mark.parametrize("name", TOKENS)
def test_sizes_are_the_published_ones(name):
    processor = made_up.make_processor(name, False)
    config = made_up.configuration(name, made_up.sizes_of(name, False), processor.tokenizer)
    model = made_up.empty_model(config, "meta", torch.bfloat16)
    assert model.num_parameters() == made_up.MODELS[name]["parameters"]
    assert len(processor.tokenizer) == TOKENS[name] <= config.text_config.vocab_size
    image = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>" if name == "minicpm-v-4.6" else "<image>")
    assert getattr(config, "image_token_id", None) == image != processor.tokenizer.unk_token_id


# MiniCPM-V: the whole and 2 x 2 slices, each of 504 x 392 pixels.
IMAGES = {"sft_llava": 576, "dpo_idefics2": 64, "idefics2_docvqa": 64, "llava_two_stage instruct": 576}
IMAGES["finetune_minicpm_lora"] = 5 * 63


@pytest.mark.parametrize("name", IMAGES)
def test_rows_at_their_real_size(name, tmp_path):
    """The real processor and recipe: so many image tokens, answers of the lengths that are stated, photographs."""
    entry = full_size.RUNS[name]
    recipe, folder = importlib.import_module(entry.recipe), tmp_path / "model"
    processor = made_up.make_processor(entry.model, False)
    processor.save_pretrained(folder)
    sizes = made_up.sizes_of(entry.model, False)
    made_up.configuration(entry.model, sizes, processor.tokenizer).save_pretrained(folder)
    path = made_up.make_rows(entry.recipe, 5, processor.tokenizer, tmp_path / "rows")
    flags = {"model_name_or_path": folder, "dataset_name": path, "use_cpu": True, "eval_strategy": "no"}
    settings, training = recipe.parse(measure.as_flags({**flags, "report_to": "none", **entry.flags}))
    rows, _ = load_data(recipe, settings, training)
    collator, answers = recipe.Collator(recipe.load_processor(settings), settings, training), []
    for ids, labels in sequences(collator([rows[n] for n in range(5)])):
        assert ids.count(collator.processor.image_token_id) == IMAGES[name]
        answers.append(len(labels) - labels.count(-100))
    least, most = (3, 15) if name == "idefics2_docvqa" else (60, 150)
    assert least <= min(answers) and len(set(answers)) > 2
    assert max(answers) <= most + 4  # what ends an answer, a word cut in two
    photographs = list((tmp_path / "rows").glob("*.jpg"))
    assert len(photographs) == 8 and photographs[0].stat().st_size > 50_000
    assert Image.open(photographs[0]).size == (1000, 800)


# As they are shipped; one of them in the other precision, too; the two stages of one.
BITS = {"sft_llava": ["4"], "dpo_idefics2": ["4"], "idefics2_docvqa": ["4", "16"], "llava_two_stage": ["16", "16"]}
BITS["finetune_minicpm_lora"] = ["16"]


@pytest.mark.parametrize("recipe", BITS)
def test_every_recipe_beside_its_stock_side(recipe, run):
    bits = BITS[recipe]
    precision = "both" if len(set(bits)) == 2 else bits[0]
    status, found, printed = run(recipe, *SHORT, "--checkpointing", "on", "--bits", precision)
    assert status == 0 and "failed" not in printed and "not counted" not in printed
    assert [one["bits"] for one in found["results"]] == bits
    for one in found["results"]:
        assert one["run"].startswith(recipe) and one["batch"] == 2 and one["checkpointing"] is True
        for figures in (one["recipe"], one["stock"]):
            assert figures["status"] == "ok" and figures["memory"] is None
            assert len(figures["seconds"]) == len(figures["waits"]) == len(figures["tokens"]) == 2
            assert all(0 < wait < took for wait, took in zip(figures["waits"], figures["seconds"]))
            assert 0 < figures["waiting"] < 1 and figures["flops"]["hardware"] > figures["flops"]["model"] > 0
        if recipe != "sft_llava":  # TRL's own collator has no BOS; its DPO collator has all
            assert one["recipe"]["tokens"] == one["stock"]["tokens"]
    left = [one for one in gc.get_objects() if isinstance(one, transformers.Trainer | PeftModel)]
    assert not left  # or the next one would have less memory


def test_a_process_of_its_own(scratch, tmp_path, monkeypatch):
    """The real thing once: child process, loader processes, results in a file."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["sft_llava", *SHORT, "--workers", "1", "0", "--bits", "16", "--checkpointing", "off", "--stock", "none"]
    assert full_size.main([*flags, "--scratch", str(scratch), "--keep", "--json", str(tmp_path / "x.json")]) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    (one,) = found["results"]  # 16 bits are not its own, so the loader is not compared
    assert one["workers"] == 1 and one["status"] == "ok" and found["device"]["name"] == "CPU"
    assert [path.name for path in scratch.iterdir()] == ["weights-small"]  # rows and logs are gone


# ---------------------------------------------------------------- order, rounds, what is left out


@pytest.mark.parametrize("run", full_size.RUNS)
def test_flags_are_the_recipes_own(run, tmp_path):
    recipe, rows = importlib.import_module(full_size.RUNS[run].recipe), tmp_path / "rows.json"
    job = {"weights": "w", "cuda": False, "seed": 3, "steps": 5, "warm_up": 2}
    for bits in full_size.RUNS[run].precisions:
        cell = {"run": run, "bits": bits, "checkpointing": False, "batch": 4, "workers": 3}
        settings, training = recipe.parse(full_size.flags_of(cell, job, rows, tmp_path / "out"))
        assert (getattr(settings, "q_lora", False) or getattr(settings, "load_in_4bit", False)) == (bits == "4")
        assert training.max_steps == 7 and training.seed == 3 and training.dataloader_num_workers == 3
        assert training.train_batch_size == 4 and training.gradient_accumulation_steps == 1
        assert not training.activation_checkpointing and not training.do_eval
        assert str(rows) == settings.dataset_name  # data_path is another name of the flag
        assert "--use_cpu" not in full_size.flags_of(cell, {**job, "cuda": True}, rows, tmp_path / "out")


def cells(*flags):
    return full_size.plan(full_size.parse(list(flags)))


def test_the_recipes_as_shipped_come_first():
    groups = cells()
    assert [group[0]["run"] for group in groups[:6]] == list(full_size.RUNS)
    for group in groups[:6]:
        entry = full_size.RUNS[group[0]["run"]]
        own_bits = next(iter(entry.precisions))
        assert [cell["workers"] for cell in group] == [4, 4, 0]
        assert [cell["sides"] for cell in group] == [["recipe", "stock"], ["recipe"], ["recipe"]]
        assert [cell["batch"] for cell in group] == [entry.batch, "auto", entry.batch]
        assert all(cell["checkpointing"] for cell in group)
        assert {cell["bits"] for cell in group} == {own_bits}
        # The table says what the recipes say.
        settings, training = importlib.import_module(entry.recipe).parse(measure.as_flags(entry.flags))
        assert training.per_device_train_batch_size == entry.batch and training.activation_checkpointing
        assert own_bits == "16" or settings.load_in_4bit
    keys = ("run", "bits", "checkpointing", "batch", "workers")
    planned = [tuple(cell[key] for key in keys) for group in groups for cell in group]
    # Runs and precisions, checkpointing, batches; the loader's processes.
    assert len(planned) == len(set(planned)) == 11 * 2 * 5 + 6
    assert all(len({(cell["run"], cell["bits"]) for cell in group}) == 1 for group in groups)  # one model is loaded


def test_flags_choose():
    own = {(cell["run"], cell["bits"]) for group in cells("--bits", "own") for cell in group}
    assert own == {(name, next(iter(entry.precisions))) for name, entry in full_size.RUNS.items()}
    batches = [cell["batch"] for group in cells("sft_llava", "--batch_sizes", "2", "16") for cell in group]
    assert batches == [2, 2, 16, 2, 16] + [2, 16] * 2
    flags = ["--batch_sizes", "auto", "own", "2", "--workers", "4", "--bits", "4", "--checkpointing", "on"]
    (first, *others) = cells("dpo_idefics2", "sft_llava", *flags)
    assert [cell["run"] for cell in first] == ["dpo_idefics2"] * 2  # in the order of the names
    assert [cell["batch"] for cell in first] == [2, "auto"]
    assert [cell["batch"] for group in others for cell in group] == [1, "auto", 2]
    both = [cell for group in cells("--stock", "all", "--workers", "2") for cell in group]
    assert all((cell["sides"] == ["recipe", "stock"]) == (cell["batch"] != "auto") for cell in both)
    assert all(cell["workers"] == 2 for cell in both)
    default = [cell for group in cells("dpo_idefics2", "--workers", "4") for cell in group]
    assert all((cell["batch"] == 2) == (len(cell["sides"]) == 2) for cell in default)


def test_sides_alternate_and_medians_are_of_all_rounds(run, scripted):
    numbers = itertools.count(6.0)
    ran = scripted(lambda side, cell: {"seconds": [1.0, 4.0] if side == "recipe" else [next(numbers), 9.0]})
    _, found, printed = run("sft_llava", *SHORT, *ONE, "--rounds", "3")
    assert [side for side, _ in ran] == ["recipe", "stock", "stock", "recipe", "recipe", "stock"]
    recipe, stock = (found["results"][0][side] for side in ("recipe", "stock"))
    assert stock["seconds"] == [6, 9, 7, 9, 8, 9] and stock["median"] == 8.5 and recipe["median"] == 2.5
    assert recipe["waiting"] == pytest.approx(0.5 * 6 / 15) and "3.40x" in printed


def test_out_of_memory_is_recorded_and_larger_batches_are_left_out(run, scripted):
    def answer(side, cell):
        most = 4 if cell["checkpointing"] else 1
        return {"status": "out of memory"} if cell["batch"] > most or side == "stock" else {}

    ran = scripted(answer)
    flags = ["--bits", "16", "--workers", "0", "--rounds", "2", "--steps", "2"]
    status, found, printed = run("sft_llava", *flags, "--batch_sizes", "1", "2", "4", "8", "16")
    statuses = [one["status"] for one in found["results"]]
    assert statuses[:5] == ["ok", "ok", "ok", "out of memory", "not run: a batch of 8 did not fit"]  # checkpointing
    assert statuses[5:] == ["ok", "out of memory", *["not run: a batch of 2 did not fit"] * 3]
    assert len([side for side, cell in ran if side == "stock"]) == 2  # once each, not again in the next round
    assert status == 0 and "checkpointing off, 0 workers, batch 4, 8, 16: not run: a batch of 2 did not" in printed


def test_a_failure_is_recorded_with_its_reason(run, scripted):
    scripted(lambda side, cell: {"status": "failed: ValueError: no"} if cell["bits"] == "4" else {})
    status, found, printed = run("sft_llava", *SHORT, "--checkpointing", "on")
    assert status == 0 and [one["status"] for one in found["results"]] == ["failed: ValueError: no", "ok"]
    assert "sft_llava, 4 bits, checkpointing on, 0 workers, batch 2, stock: failed: ValueError: no" in printed
    assert run("sft_llava", *SHORT, "--bits", "4", "--checkpointing", "on")[0] == 1  # nothing was measured


def test_minutes_list_what_was_not_run(run, scripted, monkeypatch):
    clock = itertools.count(time.time(), 10)
    fake = SimpleNamespace(time=lambda: next(clock), perf_counter=time.perf_counter, sleep=time.sleep)
    monkeypatch.setattr(full_size, "time", fake)
    scripted(lambda side, cell: {})
    _, found, _ = run("sft_llava", "dpo_idefics2", *SHORT, "--minutes", "1.5")
    statuses = [one["status"] for one in found["results"]]
    assert statuses[0] == "ok" and set(statuses) == {"ok", "not run: time is up"} and len(statuses) == 8


def test_what_was_measured_before_an_interruption_is_shown(run, scripted):
    scripted(mock.Mock(side_effect=[{}, KeyboardInterrupt]))
    flags = ["--bits", "4", "--checkpointing", "on", "--stock", "none"]
    status, found, printed = run("sft_llava", "dpo_idefics2", "idefics2_docvqa", *SHORT, *flags)
    assert status == 1 and "not run: interrupted" in printed
    assert [one["status"] for one in found["results"]] == ["ok", *["not run: interrupted"] * 2]


# ---------------------------------------------------------------- one run


@pytest.fixture
def one(scratch, tmp_path):
    """A function: side, what differs from a plain configuration -> what one_run finds."""

    def make(side="recipe", loaded=None, **cell):
        cell = {"run": "sft_llava", "bits": "16", "checkpointing": True, "batch": 1, "workers": 0} | cell
        weights, entry = scratch / "weights-small", full_size.RUNS[cell["run"]]
        job = {"weights": str(weights), "scratch": str(tmp_path), "log": str(tmp_path / "log.txt")}
        job |= {"cuda": False, "seed": 0, "steps": 1, "warm_up": 1}
        made_up.make_weights(entry.model, True, weights / entry.model, False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(weights / entry.model)
        rows = made_up.make_rows(entry.recipe, 6, tokenizer, tmp_path / "rows")
        return full_size.one_run(side, cell, job, rows, {} if loaded is None else loaded)

    return make


@pytest.mark.parametrize("run, trained", [("sft_llava", "adapters only"), ("llava_two_stage align", "projector")])
def test_one_model_serves_all_runs(one, monkeypatch, run, trained):
    recipe, loaded = importlib.import_module(full_size.RUNS[run].recipe), {}
    load_model, loads = recipe.load_model, mock.Mock(wraps=recipe.load_model)
    monkeypatch.setattr(recipe, "load_model", loads)
    for side in ("recipe", "stock"):
        assert one(side, run=run, loaded=loaded)["status"] == "ok"
    assert loads.call_count == 1
    own, fresh = (dict(model.named_parameters()) for model in (loaded["model"], load_model(*loads.call_args.args)))
    with full_size.lent(recipe, loaded, False):
        lent = dict(recipe.load_model(None, None).named_parameters())
    assert own.keys() == fresh.keys() == lent.keys()  # no adapter is left in it
    for name, p in own.items():
        assert p.equal(fresh[name]) and p.equal(lent[name])
        assert p.requires_grad == (lent[name] is not p) == (trained in name)  # every run trains a copy of its own


def test_flops_of_the_model_are_those_of_any_precision_and_checkpointing(one):
    """What is computed again is left out, 4-bit products are not: four times the same model, the same rows."""
    of_the_model = set()
    for bits in ("4", "16"):
        on, off = (one(run="llava_two_stage instruct", bits=bits, checkpointing=on)["flops"] for on in (True, False))
        assert on["hardware"] > 1.2 * on["model"] and off["hardware"] == off["model"]
        of_the_model |= {on["model"], off["model"]}
    assert len(of_the_model) == 1


@pytest.mark.parametrize(
    "error, status",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "out of memory"),
        (SystemExit("error: cannot load the weights: [Errno 12] Cannot allocate memory"), "out of memory"),
        (SystemExit("error: 2 GPUs, one process"), "failed: error: 2 GPUs, one process"),
        (ValueError("wrong\nin two lines"), "failed: ValueError: wrong"),
        (None, "failed: it ended without training"),
    ],
)
def test_how_a_run_can_end(error, status):
    train = mock.Mock(side_effect=error)
    assert full_size.run_and_see(train, {"checkpointing": True}, full_size.Watch(1, False)) == status


def test_checkpointing_that_is_not_what_was_asked_for(one, monkeypatch):
    """A Transformers that does not know the flag by its name would measure something else."""
    monkeypatch.setattr(transformers.PreTrainedModel, "activation_checkpointing_enable", lambda *args, **kwargs: None)
    assert one()["status"].startswith("failed: activation checkpointing is off")


def test_flops_that_cannot_be_counted(monkeypatch, run, one):
    monkeypatch.setattr(full_size, "counter", mock.Mock(side_effect=NotImplementedError("a kernel")))
    _, found, printed = run("sft_llava", *SHORT, *ONE, "--stock", "none")
    mine = found["results"][0]["recipe"]
    assert mine["status"] == "ok" and mine["flops"] is None and "flops_per_second" not in mine
    assert "recipe: FLOPs were not counted: NotImplementedError: a kernel" in printed
    monkeypatch.setattr(full_size, "counter", mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    assert one()["status"] == "out of memory"  # is no matter of counting


def test_waits_are_those_of_the_loader_and_the_warm_up_is_left_out():
    def slow():
        for n in range(2):
            time.sleep(0.05 * (n + 1))
            yield n

    watch = full_size.Watch(2, False)
    assert list(watch.batches(slow())) == [0, 1] and [next(watch.batches(slow()))] == [0]
    assert len(watch.waits) == 2 and 0.15 <= watch.waits[0] < 5 and 0.05 <= watch.waits[1] < watch.waits[0]
    watch.ends, watch.waits = [10.0, 15.0, 16.0, 18.0], [9, 4, 0.5, 0.25]
    watch.tokens, watch.tokens_counted = [torch.tensor(n) for n in (1, 2, 3, 4)], torch.tensor(2)
    figures = watch.figures()
    assert (figures["seconds"], figures["waits"], figures["tokens"]) == ([1, 2], [0.5, 0.25], [3, 4])
    assert figures["tokens_counted"] == 2 and figures["kernel_seconds"] is None


# ---------------------------------------------------------------- steps of several batches


def test_a_recipe_that_chooses_its_batch(one, monkeypatch):
    """What it tries beforehand is not the run: not in its steps, not in its waits. A step is all of its batches."""
    recipe = importlib.import_module("sft_llava")
    train, tried = recipe.train_and_save, []

    def slow(loader):
        time.sleep(1)
        yield from loader

    def choose(trainer, checkpoint=None):
        for _ in range(2):
            batches = slow(trainer.get_train_dataloader())
            (batch,), count = trainer.get_batch_samples(batches, 1, trainer.args.device)
            trainer.training_step(trainer.model, dict(batch), count)
            tried.append(int(batch["attention_mask"].sum()))
        trainer.model.zero_grad()
        trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps = 2, 3
        trainer._train_batch_size = 2
        return train(trainer, checkpoint)

    monkeypatch.setattr(recipe, "train_and_save", choose)
    found = one(batch="auto")
    assert found["status"] == "ok" and found["waits"][0] < 1
    assert len(tried) == 2 and found["tokens_counted"] not in tried
    assert found["batch"] == 2 and found["rows"] == 6
    assert len(found["seconds"]) == len(found["waits"]) == len(found["tokens"]) == 1
    assert found["tokens"][0] > 2 * found["tokens_counted"]  # three batches; FLOPs are those of the first
    assert full_size.rates({**found, "seconds": [2.0]})["rows_per_second"] == 3


def test_rows_that_a_configuration_needs(tmp_path):
    job = {"weights": "w", "cuda": False, "seed": 0, "steps": 5, "warm_up": 2}
    cell = {"run": "sft_llava", "bits": "16", "checkpointing": True, "workers": 0}
    own, auto = ({**cell, "batch": batch} for batch in (3, "auto"))
    assert full_size.rows_needed(own, job, tmp_path) == (2 + 5 + 2) * 3
    flags = full_size.flags_of(auto, job, tmp_path, tmp_path)
    assert not [flag for flag in flags if "batch_size" in flag or "accumulation" in flag]
    training = importlib.import_module("sft_llava").parse(flags)[1]
    step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert training.max_steps == 3 and full_size.rows_needed(auto, job, tmp_path) == (3 + 2) * step


def event(start, end, on_gpu=True, named=False):
    """An event of the profiler, in nanoseconds."""
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    spans = {"start_ns": lambda: start, "duration_ns": lambda: end - start}
    return SimpleNamespace(device_type=lambda: kind, is_user_annotation=lambda: named, **spans)


def test_time_in_which_a_gpu_is_busy():
    """Kernels side by side count once; the host's events and spans that somebody named not at all."""
    second = 10**9
    kernels = [event(5 * second, 6 * second), event(0, 2 * second), event(second, 3 * second), event(second, second)]
    others = [event(0, 9 * second, on_gpu=False), event(0, 9 * second, named=True)]
    assert full_size.busy_seconds(kernels + others) == 4
    assert full_size.busy_seconds(others) is None and full_size.busy_seconds([]) is None


@pytest.mark.parametrize("kernels, idle", [(0.5, 0.5), (1.5, 0), (None, None)])
def test_idle_is_what_kernels_leave_of_a_step(run, scripted, kernels, idle):
    """20 tokens took so many seconds of kernels; a step of 40 takes 2 s."""

    def answer(side, cell):
        kernel_seconds = kernels if cell["profiled"] else None
        return {"kernel_seconds": kernel_seconds, "tokens_counted": 20, "tokens": [40, 40]}

    ran = scripted(answer)
    _, found, printed = run("sft_llava", *SHORT, *ONE, "--rounds", "2")
    assert [cell["profiled"] for _, cell in ran] == [False, False, True, True]  # both sides, in the last round
    recipe = found["results"][0]["recipe"]
    assert recipe["idle"] == (None if idle is None else pytest.approx(idle))
    row = next(line for line in printed.splitlines() if line.startswith("│"))
    assert len(row.strip("│").split("│")) == len(full_size.COLUMNS)


# ---------------------------------------------------------------- GPUs that are not there


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 80 GB as far as memory functions go; -> what was asked of it, in order, and its figures."""
    fake = SimpleNamespace(asked=[], free=60 * GB, whole=80 * GB, allocated=10 * GB, reserved=12 * GB, now=8 * GB)
    fake.name = "NVIDIA H100 80GB HBM3"
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: fake.asked.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: fake.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: fake.reserved)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: fake.now)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (fake.free, fake.whole))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: fake.name)
    return fake


def test_memory_of_a_gpu(gpu, monkeypatch):
    made_up.tidy(True)
    assert gpu.asked == ["synchronize", "empty_cache", "reset_peak_memory_stats"]
    assert full_size.peaks(True) == {"allocated": 10 * GB, "reserved": 12 * GB} and full_size.peaks(False) is None
    assert full_size.outside(True) == 12 * GB and full_size.outside(False) is None
    full_size.Watch(1, True).on_step_end()
    assert gpu.asked[-1] == "synchronize"
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    assert full_size.machine(True)["gpu"] == "unknown" and full_size.machine(False)["gpu"] is None


def test_loading_can_take_more_than_training(one, monkeypatch):
    """Of either kind the peak is that of loading or of training, whichever is larger."""
    loading, training = {"allocated": 9, "reserved": 11}, {"allocated": 5, "reserved": 20}
    monkeypatch.setattr(full_size, "peaks", mock.Mock(side_effect=[loading, training, training]))
    monkeypatch.setattr(full_size, "outside", mock.Mock(side_effect=[12, 20]))
    loaded = {}
    for _ in range(2):
        found = one(loaded=loaded)
        assert found["status"] == "ok" and found["memory"] == {"allocated": 9, "reserved": 20}
        assert loaded["outside"] == 12  # what paged optimizers leave behind is not counted for the next run


PEAKS = {"H100 80GB HBM3": 989, "H100 PCIe": 756, "H200": 989, "A100-SXM4-80GB": 312, "L4": 121, "L40S": 362}
PEAKS |= {"GeForce RTX 4090": 165, "Tesla T4": 65, "Tesla V100-SXM2-16GB": 125}
OTHERS = ["GeForce RTX 4090 Laptop GPU", "GeForce RTX 4090 D", "GH200 480GB", "H100 80GB MIG 1g.10gb", "Something new"]


@pytest.mark.parametrize("name", [*PEAKS, *OTHERS])
def test_peaks_of_known_gpus_are_in_a_table_and_others_are_measured(name):
    peak, source = full_size.peak_flops(f"NVIDIA {name}", "cpu", 128)
    if name in PEAKS:
        assert peak == PEAKS[name] * 1e12 and source == "data sheet"
    else:
        assert peak > 1e8 and source == "measured: a matmul of 128 in float32"


@pytest.mark.parametrize("bits, needed, free", [("16", "14.1", "14.0"), ("4", "4.2", "4.0")])
def test_too_little_gpu_memory_is_said_before_weights_are_made(gpu, tmp_path, bits, needed, free):
    gpu.free = float(free) * GB
    cell = {"run": "sft_llava", "bits": bits, "checkpointing": True, "batch": 1, "workers": 0, "sides": ["recipe"]}
    job = {"cells": [cell, cell | {"batch": 2}], "cuda": True, "small": False, "scratch": str(tmp_path)}
    device, *found = full_size.work({**job, "weights": str(tmp_path / "weights")})
    status = f"does not fit: the weights alone take {needed} GB in {bits} bits, {free} GB of this GPU are free"
    assert device["kind"] == "device" and [one["status"] for one in found] == [status] * 2
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize(
    "free, full, devices", [(60 * GB, False, ["cuda"]), (16 * GB, False, ["cpu"]), (60 * GB, True, ["cuda", "cpu"])]
)
def test_weights_are_made_on_a_gpu_that_is_large_enough(gpu, tmp_path, monkeypatch, free, full, devices):
    """And on the CPU where somebody else has filled it in the meantime."""
    gpu.free, asked, empty_model = free, [], made_up.empty_model

    def on_the_cpu(config, device, dtype):
        assert dtype == torch.bfloat16
        asked.append(device)
        if full and device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty_model(config, "cpu", dtype)

    monkeypatch.setattr(made_up, "empty_model", on_the_cpu)
    made_up.make_weights("idefics2-8b", True, tmp_path, True)
    assert asked == devices and "empty_cache" in gpu.asked


def test_weights_are_made_once_and_again_where_that_was_cut_off(tmp_path, monkeypatch):
    made = mock.Mock(wraps=made_up.empty_model)
    monkeypatch.setattr(made_up, "empty_model", made)
    for _ in range(2):
        made_up.make_weights("idefics2-8b", True, tmp_path, False)
    assert made.call_count == 1
    (tmp_path / "done").unlink()  # written last
    made_up.make_weights("idefics2-8b", True, tmp_path, False)
    assert made.call_count == 2 and (tmp_path / "done").exists()


def peak_of(batch, gigabytes, reserved=None, on=True, status="ok"):
    """A result of a GPU on which 1 GB is taken outside of PyTorch."""
    memory = {"allocated": gigabytes * GB, "reserved": (reserved or gigabytes) * GB}
    found = {"outside": 1 * GB, "recipe": {"status": status, "memory": memory}}
    return {"run": "sft_llava", "bits": "4", "checkpointing": on, "batch": batch, **found}


def test_what_fits():
    results = [peak_of(1, 10), peak_of(2, 14, 16), peak_of(4, 22), peak_of(8, 38, 38), peak_of(16, 50)]
    results += [peak_of(32, 79, status="out of memory"), peak_of(1, 30, on=False)]
    results += [{"run": "sft_llava", "status": "not run: time is up"}]
    on, off = (("sft_llava", "4", checkpointing) for checkpointing in (True, False))
    measured = {16: "1 (2)", 24: "4", 40: "8", 80: "16"}
    assert full_size.fits(results, 80 * GB) == {on: measured, off: {16: "none", 24: "none", 40: "1+", 80: "1+"}}
    # That 32 did not fit in 60 GB says nothing of 80.
    assert full_size.fits(results, 60 * GB)[on] == measured | {80: "16+"}
    assert full_size.fits([peak_of(1, 14, 18)], 80 * GB)[on] == {16: "none (1+)", 24: "1+", 40: "1+", 80: "1+"}
    assert full_size.fits([peak_of(1, 14.9), peak_of(2, 15.1)], 80 * GB)[on][16] == "1"  # CUDA's own GB is not for us


def test_memory_in_the_tables(run, scripted, monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(full_size, "make_weights", lambda *args: None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args: None)
    flops = {"model": int(2 * 989e12 * 0.4), "hardware": int(2 * 989e12 * 0.5)}
    memory = {"recipe": {"allocated": 9.1 * GB, "reserved": 11.2 * GB}}
    memory["stock"] = {"allocated": 13.3 * GB, "reserved": 14.4 * GB}
    scripted(lambda side, cell: {"memory": memory[side], "flops": flops})
    _, found, printed = run("sft_llava", *SHORT, "--bits", "4", "--checkpointing", "on", "--small")
    row = next(line for line in printed.splitlines() if line.startswith("│"))
    cells = "sft_llava 4 on 2 0 2.000 1.00 5 27.8 40.0% 9.1 11.2 25% - 2.000 13.3 1.00x".split()
    assert [cell.strip() for cell in row.strip("│").split("│")] == cells
    fits = {"run": "sft_llava", "bits": "4", "checkpointing": True}
    assert found["fits"] == [{**fits, "largest_batch": {"16": "2+", "24": "2+", "40": "2+", "80": "2+"}}]


# ---------------------------------------------------------------- processes that go wrong, and the disk


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A function: a shell script in the place of the child process, until when -> what `apart` gives. The script has
    its folder in $2."""
    monkeypatch.undo()

    def make(script, until=None):
        path = tmp_path / "child.sh"
        path.write_text(f'#!/bin/bash\nshift\nset -- "$@"\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        job = {"scratch": str(tmp_path), "log": str(tmp_path / "log.txt"), "until": until, "cells": []}
        return list(full_size.apart(job))

    return make


def test_what_a_killed_process_found_survives_and_what_it_left_goes(child, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    script = """echo '{"n": 1}' >> $2/results.jsonl; sleep 0.5; echo '{"n": 2}' >> $2/results.jsonl
        printf '{"n":' >> $2/results.jsonl; mkdir "$TMPDIR/pymp-1"; touch "$TMPDIR/pymp-1/listener"
        echo "$CUDA_VISIBLE_DEVICES $HF_DATASETS_CACHE $TMPDIR"; kill -9 $$"""
    assert child(script) == [{"n": 1}, {"n": 2}, {"kind": "end", "status": -9}]
    gpu, cache, left = (tmp_path / "log.txt").read_text().split()
    assert gpu == "3" and cache == f"{tmp_path}/datasets"  # recipes refuse several GPUs in one process
    assert Path(left).name.startswith("full-size-") and not Path(left).exists()
    assert Path(left).parent == Path(tempfile.gettempdir()) != tmp_path  # a socket's path is bounded, --scratch is not


def test_a_process_that_hangs_is_ended_with_its_own(child, tmp_path):
    start = time.time()
    assert child("sleep 61 & echo $! > $2/../pid; wait", until=time.time() - 59) == []
    assert time.time() - start < 30
    time.sleep(0.5)
    running = {process.pid for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"]}  # no zombies
    assert int((tmp_path / "pid").read_text()) not in running


def test_an_early_end_is_reported(run, monkeypatch):
    def apart(job):
        with open(job["log"], "a") as log:
            log.write("Traceback\nImportError: no such thing\n\n")
        yield full_size.describe(False)
        yield {"kind": "end", "status": 1}

    monkeypatch.setattr(full_size, "apart", apart)
    status, found, printed = run("sft_llava", *SHORT, *ONE)
    cause = "its process ended early, exit status 1: ImportError: no such thing"
    assert status == 1 and found["results"][0]["status"] == f"failed: {cause}" and cause in printed


def test_room_is_looked_for_first(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(full_size.shutil, "disk_usage", lambda path: SimpleNamespace(free=20 * GB))
    monkeypatch.setattr(full_size, "apart", None)  # would fail
    message = f"^error: 36.5 GB are needed in {tmp_path} for the weights, 20 GB are free: --scratch FOLDER"
    with pytest.raises(SystemExit, match=message):
        full_size.main(["--scratch", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=f"^error: --scratch {tmp_path}/file/under: "):
        full_size.main(["--scratch", str(tmp_path / "file" / "under")])
    (tmp_path / "llava-1.5-7b").mkdir()
    (tmp_path / "llava-1.5-7b" / "done").touch()
    assert full_size.needed(full_size.parse(["sft_llava"]), tmp_path) == 3e9  # its weights are there


@pytest.mark.parametrize("flags, left", [([], set()), (["--keep"], {"idefics2-8b"})])
def test_weights_are_removed_unless_kept(tmp_path, monkeypatch, scripted, capsys, flags, left):
    """In a folder of its own, and in one that was given; what was there before stays."""
    scripted(lambda side, cell: {})
    old = tmp_path / "given" / "weights-small" / "llava-1.5-7b"
    old.mkdir(parents=True)
    (old / "done").touch()
    run = ["idefics2_docvqa", *SHORT, "--bits", "4", "--checkpointing", "on", "--stock", "none", *flags]
    assert full_size.main([*run, "--scratch", str(tmp_path / "given")]) == 0
    assert {path.name for path in (tmp_path / "given" / "weights-small").iterdir()} == left | {"llava-1.5-7b"}
    assert [path.name for path in (tmp_path / "given").iterdir()] == ["weights-small"]
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(full_size.tempfile, "tempdir", str(tmp_path / "own"))
    assert full_size.main(run) == 0
    assert {path.name for path in (tmp_path / "own").glob("full-size-*/weights-small/*")} == left
    assert bool(left) == any((tmp_path / "own").iterdir()) == ("the weights are kept in" in capsys.readouterr().out)
