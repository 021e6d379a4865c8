"""benchmarks/full_size.py: sizes are the published ones, small copies run through every branch, GPUs are stood in for."""

import contextlib
import gc
import importlib
import itertools
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, load_data
from peft import PeftModel

sys.path.insert(0, str(ROOT / "benchmarks"))
import full_size  # noqa: E402
import made_up  # noqa: E402
import measure  # noqa: E402

torch, transformers = full_size.torch, full_size.transformers
GB = 10**9
SHORT = ["--steps", "2", "--warm_up", "1", "--rounds", "1", "--workers", "0", "--batch_sizes", "2"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(full_size.torch.cuda, "is_available", lambda: False)  # as all other tests run
    monkeypatch.setattr(
        full_size, "apart", lambda job: full_size.work(json.loads(json.dumps(job)))
    )  # a process costs 10 seconds


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """gc.collect() looks at what is made here only: before and in each run it took longer than the run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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
    """A function: what one_run gives for a (side, configuration) -> the list of those that were run, in order; nothing else is run."""

    def make(answer):
        ran = []

        def one_run(side, cell, job, path, loaded):
            ran.append((side, cell))
            loaded["outside"] = 0
            ok = {"status": "ok", "memory": None, "flops": None, "uncounted": None, "seconds": [2.0] * job["steps"]}
            return (
                ok
                | {"waits": [0.5] * job["steps"], "tokens": [10] * job["steps"], "tokens_counted": 10}
                | answer(side, cell)
            )

        monkeypatch.setattr(full_size, "one_run", one_run)
        return ran

    return make


def refusal(*flags):
    with pytest.raises(SystemExit) as stop:
        full_size.main([*flags])
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    return stop.value.code


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", list(made_up.MODELS))
def test_sizes_are_the_published_ones(name):
    processor = made_up.make_processor(name, False)
    config = made_up.configuration(name, False, processor.tokenizer)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    assert model.num_parameters() == made_up.MODELS[name]["parameters"]
    published = {"llava-1.5-7b": 7_063_427_072, "idefics2-8b": 8_402_768_112, "minicpm-v-4.6": 1_300_428_016}
    assert model.num_parameters() == published[name]
    words = {
        "llava-1.5-7b": 32_002,
        "idefics2-8b": 32_003,
        "minicpm-v-4.6": 248_094,
    }  # tokens; LLaVA pads its matrix to 32,064
    assert len(processor.tokenizer) == words[name] <= config.text_config.vocab_size
    image = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>" if name == "minicpm-v-4.6" else "<image>")
    assert getattr(config, "image_token_id", None) == image != processor.tokenizer.unk_token_id


@pytest.mark.parametrize(
    "recipe, name, flags, images",
    [
        ("sft_llava", "llava-1.5-7b", {}, 576),
        ("dpo_idefics2", "idefics2-8b", {}, 64),
        ("idefics2_docvqa", "idefics2-8b", {}, 64),
        ("llava_two_stage", "llava-1.5-7b", {"stage": "instruct", "lora_r": 128}, 576),
        ("finetune_minicpm_lora", "minicpm-v-4.6", {}, 5 * 63),  # the whole and 2 x 2 slices, each of 504 x 392 pixels
    ],
)
def test_rows_at_their_real_size(recipe, name, flags, images, tmp_path):
    """The real processor and recipe: so many image tokens, answers of the lengths that are stated, a photograph's size."""
    processor = made_up.make_processor(name, False)
    processor.save_pretrained(tmp_path / "model")
    made_up.configuration(name, False, processor.tokenizer).save_pretrained(tmp_path / "model")
    module, data = (
        importlib.import_module(recipe),
        next(data for name, _, data, *_ in full_size.RUNS.values() if name == recipe),
    )
    flags = {
        "model_name_or_path": tmp_path / "model",
        "use_cpu": True,
        "eval_strategy": "no",
        "report_to": "none",
        **flags,
    }
    processor = module.load_processor(module.parse([part for k, v in flags.items() for part in (f"--{k}", str(v))])[0])
    path = made_up.make_rows(recipe, 5, processor.tokenizer, tmp_path / "rows")
    settings, training = module.parse([part for k, v in (flags | {data: path}).items() for part in (f"--{k}", str(v))])
    rows, _ = load_data(module, settings, training)
    collator, lengths = module.Collator(processor, settings, training), []
    assert len(rows) == 5 and len(list((tmp_path / "rows").glob("*.jpg"))) == 8
    for row in rows:
        batch = collator([row])
        ids = batch["input_ids"]
        token = processor.image_token_id
        assert (ids == token).sum(1).tolist() == [images] * len(ids)
        lengths += (
            batch["completion_mask"].sum(1).tolist()
            if recipe == "dpo_idefics2"
            else [(batch["labels"] != -100).sum().item()]
        )
    least, most = (3, 15) if recipe == "idefics2_docvqa" else (60, 150)
    assert (
        least <= min(lengths) and max(lengths) <= most + 4 and len(set(lengths)) > 2
    )  # what ends an answer, a word cut in two


def test_an_images_size(tmp_path):
    made_up.make_rows("sft_llava", 1, made_up.make_processor("llava-1.5-7b", True).tokenizer, tmp_path)
    assert made_up.Image.open(tmp_path / "7.jpg").size == (1000, 800) and (tmp_path / "7.jpg").stat().st_size > 50_000


# ---------------------------------------------------------------- all recipes, in small


@pytest.mark.parametrize(
    "recipe, bits",
    [
        ("sft_llava", ["4"]),
        ("dpo_idefics2", ["4"]),
        ("idefics2_docvqa", ["4", "16"]),
        ("llava_two_stage", ["16", "16"]),
        ("finetune_minicpm_lora", ["16"]),
    ],
)
def test_every_recipe_beside_its_stock_side(recipe, bits, run):
    """As it is shipped; one of them in the other precision, too."""
    status, found, printed = run(
        recipe, *SHORT, "--checkpointing", "on", "--bits", "both" if len(set(bits)) == 2 else bits[0]
    )
    assert status == 0 and "failed" not in printed and "not counted" not in printed
    assert [one["bits"] for one in found["results"]] == bits
    for one in found["results"]:
        assert one["run"].startswith(recipe) and one["batch"] == 2 and one["checkpointing"] is True
        for side in ("recipe", "stock"):
            figures = one[side]
            assert figures["status"] == "ok" and figures["memory"] is None
            assert len(figures["seconds"]) == len(figures["waits"]) == len(figures["tokens"]) == 2
            assert 0 < figures["waiting"] < 1 and all(
                0 < wait < took for wait, took in zip(figures["waits"], figures["seconds"])
            )
            assert figures["flops"]["hardware"] > figures["flops"]["model"] > 0
            assert figures["rows_per_second"] == pytest.approx(2 / figures["median"])
            assert figures["tokens_per_second"] == pytest.approx(sum(figures["tokens"]) / 2 / figures["median"])
        if recipe != "sft_llava":  # TRL's own collator has no BOS; its DPO collator has all
            assert one["recipe"]["tokens"] == one["stock"]["tokens"]
    line = next(line for line in printed.splitlines() if line.startswith("│"))
    assert f"{found['results'][0]['stock']['median'] / found['results'][0]['recipe']['median']:.2f}x" in line
    assert not [
        one for one in gc.get_objects() if isinstance(one, transformers.Trainer | PeftModel)
    ]  # or the next one would have less memory


def test_a_process_of_its_own(scratch, tmp_path, monkeypatch, capfd):
    """The real thing once: child process, loader processes, results in a file."""
    monkeypatch.undo()
    monkeypatch.setattr(full_size.torch.cuda, "is_available", lambda: False)
    flags = ["sft_llava", *SHORT, "--workers", "1", "0", "--bits", "16", "--checkpointing", "off", "--stock", "none"]
    assert full_size.main([*flags, "--scratch", str(scratch), "--keep", "--json", str(tmp_path / "x.json")]) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert [one["workers"] for one in found["results"]] == [
        1
    ]  # 16 bits are not its own, so the loader is not compared
    assert (
        found["results"][0]["status"] == "ok" and found["device"]["name"] == "CPU" and found["machine"]["gpu"] is None
    )
    assert set(found["machine"]["versions"]) == {"torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate"}
    assert [path.name for path in scratch.iterdir()] == ["weights-small"]  # rows and logs are gone
    printed = capfd.readouterr().out
    assert (
        "no GPU found: a small copy" in printed and f"the weights are kept in {scratch / 'weights-small'}" in printed
    )


# ---------------------------------------------------------------- order, rounds, what is left out


@pytest.mark.parametrize(
    "run, bits", [(run, bits) for run, (*_, precisions) in full_size.RUNS.items() for bits in precisions]
)
def test_flags_are_the_recipes_own(run, bits, tmp_path):
    recipe = importlib.import_module(full_size.RUNS[run][0])
    job = {"weights": "w", "cuda": False, "seed": 3, "steps": 5, "warm_up": 2}
    cell = {"run": run, "bits": bits, "checkpointing": False, "batch": 4, "workers": 3}
    settings, training = recipe.parse(full_size.flags_of(cell, job, tmp_path / "rows.json", tmp_path / "out"))
    recipe.check(settings, training)
    assert (getattr(settings, "q_lora", False) or getattr(settings, "load_in_4bit", False)) == (bits == "4")
    assert (
        training.max_steps == 7
        and training.seed == 3
        and training.train_batch_size == 4
        and training.gradient_accumulation_steps == 1
    )
    assert training.dataloader_num_workers == 3 and not training.activation_checkpointing and not training.do_eval
    assert str(tmp_path / "rows.json") in (
        getattr(settings, "data_path", None),
        getattr(settings, "dataset_name", None),
    )
    assert "--use_cpu" not in full_size.flags_of(cell, {**job, "cuda": True}, tmp_path / "rows.json", tmp_path / "out")


def cells(*flags):
    return full_size.plan(full_size.parse(list(flags)))


def test_the_recipes_as_shipped_come_first():
    groups = cells()
    first = groups[:6]
    assert [group[0]["run"] for group in first] == list(full_size.RUNS)
    for group in first:
        recipe, _, _, batch, _, bits = full_size.RUNS[group[0]["run"]]
        assert [cell["workers"] for cell in group] == [4, 0] and [cell["sides"] for cell in group] == [
            ["recipe", "stock"],
            ["recipe"],
        ]
        for cell in group:
            assert (cell["batch"], cell["bits"], cell["checkpointing"]) == (batch, next(iter(bits)), True)
            settings, training = importlib.import_module(recipe).parse(
                [part for k, v in full_size.RUNS[cell["run"]][4].items() for part in (f"--{k}", str(v))]
            )
            assert (
                training.per_device_train_batch_size == batch and training.activation_checkpointing
            )  # the table says what they say
            if next(iter(bits)) == "4":
                assert settings.load_in_4bit
    every = [
        tuple(cell[key] for key in ("run", "bits", "checkpointing", "batch", "workers"))
        for group in groups
        for cell in group
    ]
    assert (
        len(every) == len(set(every)) == 11 * 2 * 4 + 6
    )  # runs and precisions, checkpointing, batches, the loader's processes
    assert all(len({(cell["run"], cell["bits"]) for cell in group}) == 1 for group in groups)  # one model is loaded


def test_flags_choose():
    assert [cell["batch"] for group in cells("sft_llava", "--batch_sizes", "2", "16") for cell in group] == [
        2,
        2,
        16,
        2,
        16,
    ] + [2, 16] * 2
    assert {cell["bits"] for group in cells("sft_llava", "--bits", "16") for cell in group} == {"16"}
    assert {cell["checkpointing"] for group in cells("--checkpointing", "off") for cell in group} == {False}
    both = [cell for group in cells("--stock", "all", "--workers", "2") for cell in group]
    assert all(cell["sides"] == ["recipe", "stock"] and cell["workers"] == 2 for cell in both)
    default = [cell for group in cells("dpo_idefics2", "--workers", "4") for cell in group]
    assert all((cell["batch"] == 2) == (len(cell["sides"]) == 2) for cell in default)
    assert {group[0]["run"] for group in cells("llava_two_stage")} == {
        "llava_two_stage align",
        "llava_two_stage instruct",
    }


def test_sides_alternate_and_medians_are_of_all_rounds(run, scripted):
    ran = scripted(lambda side, cell: {"seconds": [1.0, 4.0] if side == "recipe" else [next(numbers), 9.0]})
    numbers = itertools.count(6.0)
    _, found, printed = run("sft_llava", *SHORT, "--rounds", "3", "--bits", "16", "--checkpointing", "on")
    assert [side for side, _ in ran] == ["recipe", "stock", "stock", "recipe", "recipe", "stock"]
    one = found["results"][0]
    assert (
        one["stock"]["seconds"] == [6, 9, 7, 9, 8, 9]
        and one["stock"]["median"] == 8.5
        and one["recipe"]["median"] == 2.5
    )
    assert one["recipe"]["waiting"] == pytest.approx(0.5 * 6 / 15) and "3.40x" in printed


def test_out_of_memory_is_recorded_and_larger_batches_are_left_out(run, scripted):
    def answer(side, cell):
        return (
            {"status": "out of memory"}
            if cell["batch"] > (4 if cell["checkpointing"] else 1) or side == "stock"
            else {}
        )

    ran = scripted(answer)
    status, found, printed = run(
        "sft_llava",
        "--bits",
        "16",
        "--batch_sizes",
        "1",
        "2",
        "4",
        "8",
        "16",
        "--workers",
        "0",
        "--rounds",
        "2",
        "--steps",
        "2",
    )
    assert status == 0
    statuses = {(one["checkpointing"], one["batch"]): one["status"] for one in found["results"]}
    assert statuses == {
        (True, 1): "ok", (True, 2): "ok", (True, 4): "ok", (True, 8): "out of memory", (True, 16): "not run: a batch of 8 did not fit",
        (False, 1): "ok", (False, 2): "out of memory", (False, 4): "not run: a batch of 2 did not fit",
        (False, 8): "not run: a batch of 2 did not fit", (False, 16): "not run: a batch of 2 did not fit",
    }  # fmt: skip
    assert len([side for side, cell in ran if side == "stock"]) == 2  # once each, not again in the next round
    assert (
        "out of memory" in next(line for line in printed.splitlines() if line.startswith("│"))
        and "checkpointing on, 0 workers, batch 16: not run: a batch of 8 did" in printed
    )
    assert (
        "sft_llava, 16 bits, checkpointing off, 0 workers, batch 4, 8, 16: not run: a batch of 2 did not fit\n"
        in printed
    )


def test_a_failure_is_recorded_with_its_reason(run, scripted):
    scripted(lambda side, cell: {"status": "failed: ValueError: no"} if cell["bits"] == "4" else {})
    status, found, printed = run("sft_llava", *SHORT, "--checkpointing", "on")
    assert status == 0 and [one["status"] for one in found["results"]] == ["failed: ValueError: no", "ok"]
    assert "sft_llava, 4 bits, checkpointing on, 0 workers, batch 2, stock: failed: ValueError: no" in printed


def test_exit_status_1_where_nothing_was_measured(run, scripted):
    scripted(lambda side, cell: {"status": "out of memory"})
    assert run("sft_llava", *SHORT)[0] == 1


def test_minutes_list_what_was_not_run(run, scripted, monkeypatch):
    clock = itertools.count(time.time(), 10)
    monkeypatch.setattr(
        full_size, "time", SimpleNamespace(time=lambda: next(clock), perf_counter=time.perf_counter, sleep=time.sleep)
    )
    scripted(lambda side, cell: {})
    _, found, printed = run("sft_llava", "dpo_idefics2", *SHORT, "--minutes", "1.5")
    statuses = [one["status"] for one in found["results"]]
    assert statuses[0] == "ok" and set(statuses) == {"ok", "not run: time is up"} and len(statuses) == 8
    assert printed.count(": not run: time is up") >= statuses.count("not run: time is up")


def test_interrupted(run, scripted):
    def answer(side, cell):
        if cell["run"] == "dpo_idefics2":
            raise KeyboardInterrupt
        return {}

    scripted(answer)
    status, found, printed = run(
        "sft_llava", "dpo_idefics2", *SHORT, "--bits", "4", "--checkpointing", "on", "--stock", "none"
    )
    assert (
        status == 1
        and [one["status"] for one in found["results"]] == ["ok", "not run: interrupted"]
        and "not run: interrupted" in printed
    )


# ---------------------------------------------------------------- one run


@pytest.fixture
def one(scratch, tmp_path):
    """A function: side, what differs from a plain configuration -> what one_run finds."""

    def make(side="recipe", loaded=None, cuda=False, **cell):
        cell = {"run": "sft_llava", "bits": "16", "checkpointing": True, "batch": 1, "workers": 0} | cell
        job = {
            "weights": str(scratch / "weights-small"),
            "scratch": str(tmp_path),
            "log": str(tmp_path / "log.txt"),
            "cuda": cuda,
            "seed": 0,
            "steps": 1,
            "warm_up": 1,
        }
        model = full_size.RUNS[cell["run"]][1]
        made_up.make_weights(model, True, scratch / "weights-small" / model, False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(scratch / "weights-small" / model)
        path = made_up.make_rows(cell["run"].split()[0], 6, tokenizer, tmp_path / "rows")
        return full_size.one_run(side, cell, job, path, {} if loaded is None else loaded)

    return make


def test_one_model_serves_all_runs(one, monkeypatch):
    import sft_llava

    loads, load = [], sft_llava.load_model
    monkeypatch.setattr(sft_llava, "load_model", lambda *args: loads.append(args) or load(*args))
    loaded = {}
    assert one(loaded=loaded)["status"] == "ok"
    before = {name: p.clone() for name, p in loaded["model"].named_parameters()}
    assert one("stock", loaded=loaded)["status"] == "ok"
    assert len(loads) == 1 and sft_llava.load_model(*loads[0]) is not loaded["model"]
    assert {
        name: p for name, p in loaded["model"].named_parameters()
    }.keys() == before.keys()  # no adapter is left in it
    assert all(p.equal(before[name]) and not p.requires_grad for name, p in loaded["model"].named_parameters())


def test_what_is_trained_is_copied(scratch, one):
    import llava_two_stage

    loaded = {}
    assert one(run="llava_two_stage align", loaded=loaded)["status"] == "ok"
    own = dict(loaded["model"].named_parameters())
    with full_size.lent(llava_two_stage, loaded, False):
        copied = dict(llava_two_stage.load_model(None, None).named_parameters())
    assert copied.keys() == own.keys() and any(p.requires_grad for p in own.values())
    for name, p in own.items():
        assert (copied[name] is p) != p.requires_grad and copied[name].requires_grad == p.requires_grad == (
            "projector" in name
        )
        assert copied[name].equal(p)  # the run before has trained its own


def test_flops_of_the_model_are_those_of_any_precision_and_checkpointing(one):
    """What is computed again is left out, 4-bit products are not: four times the same model, the same rows."""
    runs = [(bits, checkpointing) for bits in ("4", "16") for checkpointing in (True, False)]
    found = [
        one(run="llava_two_stage instruct", bits=bits, checkpointing=checkpointing)["flops"]
        for bits, checkpointing in runs
    ]
    assert len({flops["model"] for flops in found}) == 1
    assert [flops["hardware"] > 1.2 * flops["model"] for flops in found] == [
        checkpointing for _, checkpointing in runs
    ]
    assert [flops["hardware"] == flops["model"] for flops in found] == [not checkpointing for _, checkpointing in runs]


@pytest.mark.parametrize(
    "error, status",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "out of memory"),
        (SystemExit("error: cannot load the weights: [Errno 12] Cannot allocate memory"), "out of memory"),
        (SystemExit("error: 2 GPUs, one process"), "failed: error: 2 GPUs, one process"),
        (ValueError("wrong\nin two lines"), "failed: ValueError: wrong"),
        (MemoryError(), "out of memory"),
        (None, "failed: it ended without training"),
    ],
)
def test_how_a_run_can_end(one, monkeypatch, error, status):
    import sft_llava

    def main(flags):
        if error:
            raise error

    monkeypatch.setattr(sft_llava, "main", main)
    found = one()
    assert found["status"] == status and "seconds" not in found


def test_a_stock_side_that_fails_leaves_the_recipes(one, monkeypatch):
    import trl

    def refuse(*args, **kwargs):
        raise ValueError("Attempting to unscale FP16 gradients.")

    monkeypatch.setattr(trl, "SFTTrainer", refuse)
    assert (
        one("stock")["status"] == "failed: ValueError: Attempting to unscale FP16 gradients."
        and one()["status"] == "ok"
    )


def test_checkpointing_that_is_not_what_was_asked_for(one, monkeypatch):
    """A Transformers that does not know the flag by its name would measure something else."""
    monkeypatch.setattr(transformers.PreTrainedModel, "activation_checkpointing_enable", lambda *args, **kwargs: None)
    assert one()["status"].startswith("failed: activation checkpointing is off")


def test_flops_that_cannot_be_counted(monkeypatch, run):
    class Refuses(torch.utils.flop_counter.FlopCounterMode):
        def __enter__(self):
            raise NotImplementedError("a kernel")

    monkeypatch.setattr(full_size, "counter", lambda: Refuses(display=False))
    _, found, printed = run("sft_llava", *SHORT, "--bits", "16", "--checkpointing", "on", "--stock", "none")
    mine = found["results"][0]["recipe"]
    assert mine["status"] == "ok" and mine["flops"] is None and mine["uncounted"] == "NotImplementedError: a kernel"
    assert (
        "recipe: FLOPs were not counted: NotImplementedError: a kernel" in printed and "flops_per_second" not in mine
    )


def test_memory_that_runs_out_under_the_counter_is_no_matter_of_counting(one, monkeypatch):
    class RunsOut(torch.utils.flop_counter.FlopCounterMode):
        def __enter__(self):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(full_size, "counter", lambda: RunsOut(display=False))
    assert one()["status"] == "out of memory"


def test_4_bit_products_are_counted():
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    layer.support_avx512bf16_for_cpu = False
    x = torch.randn(2, 5, 128, requires_grad=True)
    with measure.counter() as counted:
        layer(x).sum().backward()
    assert counted.get_total_flops() == 2 * 2 * (2 * 5) * 128 * 64  # forward, and the gradient of x


def test_waits_are_those_of_the_loader():
    watch = full_size.Watch(1, False)

    def slow():
        for n in range(2):
            time.sleep(0.05 * (n + 1))
            yield n

    assert list(watch.batches(slow())) == [0, 1]
    assert len(watch.waits) == 2 and 0.05 <= watch.waits[0] < 5 and 0.1 <= watch.waits[1] < 5


def test_the_warm_up_is_left_out():
    watch = full_size.Watch(2, False)
    watch.ends, watch.waits, watch.tokens = (
        [10.0, 15.0, 16.0, 18.0],
        [9, 4, 0.5, 0.25],
        [torch.tensor(n) for n in (1, 2, 3, 4)],
    )
    assert watch.figures() == {"seconds": [1, 2], "waits": [0.5, 0.25], "tokens": [3, 4], "tokens_counted": 2}


# ---------------------------------------------------------------- GPUs that are not there


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 80 GB as far as memory functions go; -> what was asked of it, in order, and its figures."""
    fake = SimpleNamespace(
        asked=[],
        free=60 * GB,
        whole=80 * GB,
        allocated=10 * GB,
        reserved=12 * GB,
        now=8 * GB,
        name="NVIDIA H100 80GB HBM3",
    )
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: fake.asked.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: fake.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: fake.reserved)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: fake.now)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (fake.free, fake.whole))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: fake.name)
    return fake


def test_memory_of_a_gpu(gpu):
    made_up.tidy(True)
    assert gpu.asked == ["synchronize", "empty_cache", "reset_peak_memory_stats"]
    assert full_size.peaks(True) == {"allocated": 10 * GB, "reserved": 12 * GB} and full_size.peaks(False) is None
    assert full_size.outside(True) == 12 * GB and full_size.outside(False) is None
    full_size.Watch(1, True).on_step_end()
    assert gpu.asked[-1] == "synchronize"
    described = full_size.describe(True)
    assert (
        described["name"] == gpu.name
        and described["peak_flops"] == 989e12
        and described["free"] == gpu.free
        and described["memory"] == gpu.whole
    )


def test_loading_can_take_more_than_training(gpu, one, monkeypatch):
    """A run as on a GPU, but for the recipe: of either kind the peak is that of loading or of training, whichever is larger."""
    import sft_llava

    def loading(*args, load=sft_llava.load_model):
        gpu.allocated, gpu.reserved = 9 * GB, 11 * GB
        return load(*args)

    def training():
        gpu.allocated, gpu.reserved = 5 * GB, 20 * GB

    monkeypatch.setattr(sft_llava, "load_model", loading)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", training)
    monkeypatch.setattr(
        full_size, "flags_of", lambda *args, flags_of=full_size.flags_of: [*flags_of(*args), "--use_cpu", "True"]
    )
    loaded = {}
    found = one(loaded=loaded, cuda=True)
    assert found["status"] == "ok" and loaded["loading"] == {"allocated": 9 * GB, "reserved": 11 * GB}
    assert found["memory"] == {"allocated": 9 * GB, "reserved": 20 * GB} and loaded["outside"] == 12 * GB
    gpu.now = 0  # what paged optimizers leave behind in the process is not counted for the next run
    assert one(loaded=loaded, cuda=True)["memory"] == found["memory"] and loaded["outside"] == 12 * GB


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("Tesla T4", 65e12),
        ("Tesla V100-SXM2-16GB", 125e12),
    ],
)
def test_peaks_of_known_gpus(name, peak):
    assert full_size.peak_flops(name, "cpu", 8) == (peak, "data sheet")


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 3090 Ti",
        "Something new",
        "CPU",
    ],
)
def test_peaks_of_others_are_measured(name):
    peak, source = full_size.peak_flops(name, "cpu", 128)
    assert peak > 1e8 and source == "measured: a matmul of 128 in float32"


@pytest.mark.parametrize("bf16, half", [(True, torch.bfloat16), (False, torch.float16)])
def test_matrices_of_a_gpu_have_16_bits(monkeypatch, bf16, half):
    """The dtype; a CPU multiplies in the GPU's place."""
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch, "ones", lambda *size, device, dtype: ones(*size, dtype=dtype))
    assert (
        full_size.peak_flops("Something new", "cuda", 64)[1]
        == f"measured: a matmul of 64 in {str(half).split('.')[1]}"
    )


def gpu_job(tmp_path, bits, **more):
    cell = {"run": "sft_llava", "bits": bits, "checkpointing": True, "batch": 1, "workers": 0, "sides": ["recipe"]}
    return {
        "cells": [cell, cell | {"batch": 2}],
        "cuda": True,
        "small": False,
        "weights": str(tmp_path / "weights"),
        "scratch": str(tmp_path),
    } | more


@pytest.mark.parametrize(
    "bits, free, status",
    [
        ("16", 14 * GB, "does not fit: the weights alone take 14.1 GB in 16 bits, 14.0 GB of this GPU are free"),
        ("4", 4 * GB, "does not fit: the weights alone take 4.2 GB in 4 bits, 4.0 GB of this GPU are free"),
    ],
)
def test_too_little_gpu_memory_is_said_before_weights_are_made(gpu, tmp_path, bits, free, status):
    gpu.free = free
    device, *found = full_size.work(gpu_job(tmp_path, bits))
    assert (
        device["kind"] == "device"
        and [one["status"] for one in found] == [status] * 2
        and not (tmp_path / "weights").exists()
    )


@pytest.mark.parametrize(
    "free, full, devices", [(60 * GB, False, ["cuda"]), (16 * GB, False, ["cpu"]), (60 * GB, True, ["cuda", "cpu"])]
)
def test_weights_are_made_on_a_gpu_that_is_large_enough(gpu, tmp_path, monkeypatch, free, full, devices):
    """And on the CPU where somebody else has filled it in the meantime."""
    gpu.free, asked, build = free, [], transformers.AutoModelForImageTextToText.from_config

    def from_config(*args, **kwargs):
        if full and asked[-1] == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(*args, **kwargs)

    def device(name):
        asked.append(name)
        return contextlib.nullcontext()

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_config", from_config)
    monkeypatch.setattr(made_up.torch, "device", device)
    made_up.make_weights("idefics2-8b", True, tmp_path, True)
    assert (
        asked[: len(devices)] == devices and "cuda" not in asked[1:] and "empty_cache" in gpu.asked
    )  # others ask for "cpu" behind it
    from safetensors import safe_open

    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}


def test_weights_that_are_there_are_used(tmp_path, monkeypatch):
    made_up.make_weights("idefics2-8b", True, tmp_path, False)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    made_up.make_weights("idefics2-8b", True, tmp_path, False)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    (tmp_path / "done").unlink()  # cut off
    made_up.make_weights("idefics2-8b", True, tmp_path, False)
    assert (
        tmp_path / "done"
    ).read_text() == f"{transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).num_parameters()}\n"


def peak_of(batch, gigabytes, reserved=None, on=True, status="ok", outside=1 * GB):
    memory = {"allocated": gigabytes * GB, "reserved": (reserved or gigabytes) * GB}
    return {
        "run": "sft_llava",
        "bits": "4",
        "checkpointing": on,
        "batch": batch,
        "outside": outside,
        "recipe": {"status": status, "memory": memory},
    }


def test_what_fits():
    results = [
        peak_of(1, 10),
        peak_of(2, 14, 16),
        peak_of(4, 22),
        peak_of(8, 38, 38),
        peak_of(16, 50),
        peak_of(32, 79, status="out of memory"),
    ]
    results += [peak_of(1, 30, on=False), {"run": "sft_llava", "status": "not run: time is up"}]
    on, off = (("sft_llava", "4", checkpointing) for checkpointing in (True, False))
    measured = {16: "1 (2)", 24: "4", 40: "8", 80: "16"}
    assert full_size.fits(results, 80 * GB) == {on: measured, off: {16: "none", 24: "none", 40: "1+", 80: "1+"}}
    assert full_size.fits(results, 60 * GB)[on] == measured | {
        80: "16+"
    }  # that 32 did not fit in 60 GB says nothing of 80
    assert full_size.fits([peak_of(1, 14, 18)], 80 * GB)[on] == {16: "none (1+)", 24: "1+", 40: "1+", 80: "1+"}
    assert full_size.fits([peak_of(1, 14.9), peak_of(2, 15.1)], 80 * GB)[on][16] == "1"  # CUDA's own GB is not for us
    assert full_size.fits([{**peak_of(1, 10), "recipe": {"status": "ok", "memory": None}}], None) == {}  # a CPU


def test_memory_in_the_tables(run, scripted, monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(full_size, "make_weights", lambda *args: None)
    monkeypatch.setattr(full_size, "make_rows", lambda *args: None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args: None)
    monkeypatch.setattr(full_size, "needed", lambda *args: 0)
    flops = {"model": int(2 * 989e12 * 0.4), "hardware": int(2 * 989e12 * 0.5)}
    memory = {
        "recipe": {"allocated": 9.1 * GB, "reserved": 11.2 * GB},
        "stock": {"allocated": 13.3 * GB, "reserved": 14.4 * GB},
    }
    scripted(lambda side, cell: {"memory": memory[side], "flops": flops, "tokens_counted": 10})
    status, found, printed = run("sft_llava", *SHORT, "--bits", "4", "--checkpointing", "on", "--rounds", "2")
    row = next(line for line in printed.splitlines() if line.startswith("│"))
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "sft_llava", "4", "on", "2", "0", "2.000", "1.00", "5", "27.8", "40.0%", "9.1", "11.2", "25%", "2.000", "13.3", "1.00x",
    ]  # fmt: skip
    assert (
        "Real size, random weights" in printed
        and "Largest batch measured that fits" in printed
        and "989 TFLOP/s (data sheet)" in printed
    )
    assert status == 0 and found["fits"] == [
        {
            "run": "sft_llava",
            "bits": "4",
            "checkpointing": True,
            "largest_batch": {"16": "2+", "24": "2+", "40": "2+", "80": "2+"},
        }
    ]


def test_the_driver_is_asked_for(monkeypatch):
    says = lambda *args, **kwargs: SimpleNamespace(stdout="NVIDIA L4, 580.1, 23034 MiB\nNVIDIA L4, 580.1, 23034 MiB\n")
    monkeypatch.setattr(full_size.subprocess, "run", says)
    assert full_size.machine(True)["gpu"] == "NVIDIA L4, 580.1, 23034 MiB" and full_size.machine(False)["gpu"] is None

    def missing(*args, **kwargs):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(full_size.subprocess, "run", missing)
    assert full_size.machine(True)["gpu"] == "unknown"


# ---------------------------------------------------------------- a process that goes wrong


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A function: a shell script in the place of the child process, until when -> what `apart` gives. The script has its folder in $2."""
    monkeypatch.undo()

    def make(script, until=None):
        path = tmp_path / "child.sh"
        path.write_text(f'#!/bin/bash\nshift\nset -- "$@"\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        return list(
            full_size.apart({"scratch": str(tmp_path), "log": str(tmp_path / "log.txt"), "until": until, "cells": []})
        )

    return make


def test_what_a_process_has_found_survives_its_end(child, tmp_path):
    assert child("""echo '{"n": 1}' >> $2/results.jsonl; sleep 0.5; echo '{"n": 2}' >> $2/results.jsonl; printf '{"n":' >> $2/results.jsonl
        echo "$CUDA_VISIBLE_DEVICES $HF_DATASETS_CACHE"; kill -9 $$""") == [
        {"n": 1},
        {"n": 2},
        {"kind": "end", "status": -9},
    ]
    assert (tmp_path / "log.txt").read_text() == f"0 {tmp_path}/datasets\n"


def test_what_a_killed_process_leaves_behind_goes(child, tmp_path):
    child('mkdir "$TMPDIR/pymp-1"; touch "$TMPDIR/pymp-1/listener"; echo "$TMPDIR"; kill -9 $$')
    left = Path((tmp_path / "log.txt").read_text().strip())
    assert left.name.startswith("full-size-") and not left.exists()
    assert left.parent == Path(tempfile.gettempdir()) != tmp_path  # a socket's path is bounded, --scratch is not


def test_one_gpu_of_several(child, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    child("echo $CUDA_VISIBLE_DEVICES")
    assert (tmp_path / "log.txt").read_text() == "3\n"


def test_a_process_that_hangs_is_ended_with_its_own(child, tmp_path):
    start = time.time()
    assert child("sleep 61 & echo $! > $2/../pid; wait", until=time.time() - 59) == []
    assert time.time() - start < 30
    pid = (tmp_path / "pid").read_text().strip()
    for _ in range(50):
        try:
            state = open(f"/proc/{pid}/stat").read().split()[2]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("a process of the process is still there")


def test_an_early_end_is_reported(run, monkeypatch):
    def apart(job):
        with open(job["log"], "a") as log:
            log.write("Traceback\nImportError: no such thing\n\n")
        yield full_size.describe(False)
        yield {"kind": "end", "status": 1}

    monkeypatch.setattr(full_size, "apart", apart)
    status, found, printed = run("sft_llava", *SHORT, "--bits", "16", "--checkpointing", "on")
    assert (
        status == 1
        and found["results"][0]["status"]
        == "failed: its process ended early, exit status 1: ImportError: no such thing"
    )
    assert "process ended early, exit status 1: ImportError: no such thing" in printed
    assert full_size.last_words("/nowhere") == "nothing was said"


# ---------------------------------------------------------------- the disk


def test_room_is_looked_for_first(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(full_size.shutil, "disk_usage", lambda path: SimpleNamespace(free=20 * GB))
    monkeypatch.setattr(full_size, "apart", None)  # would fail
    message = refusal("--scratch", str(tmp_path))
    assert message.startswith(
        f"error: 36.5 GB are needed in {tmp_path} for the weights, 20 GB are free: --scratch FOLDER"
    )
    assert list(tmp_path.iterdir()) == []
    args = lambda *flags: full_size.parse([*flags, "--scratch", str(tmp_path)])
    assert full_size.needed(args("sft_llava"), tmp_path / "weights") == pytest.approx(14.13e9 + 3e9, rel=1e-3)
    assert full_size.needed(args("sft_llava", "llava_two_stage"), tmp_path / "weights") == pytest.approx(
        14.13e9 + 3e9, rel=1e-3
    )  # one for both
    assert full_size.needed(args("--small"), tmp_path / "weights") < 1e8
    (tmp_path / "weights" / "llava-1.5-7b").mkdir(parents=True)
    assert full_size.needed(args("sft_llava"), tmp_path / "weights") > 10 * GB
    (tmp_path / "weights" / "llava-1.5-7b" / "done").touch()
    assert full_size.needed(args("sft_llava"), tmp_path / "weights") == 3e9


def test_a_scratch_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    assert refusal("--scratch", str(tmp_path / "file" / "under")).startswith(
        f"error: --scratch {tmp_path}/file/under: "
    )


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


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["sft_lava"],
            "no recipe sft_lava; there are sft_llava, dpo_idefics2, idefics2_docvqa, llava_two_stage, finetune_minicpm_lora",
        ),
        (["--steps", "0"], "at least 1"),
        (["--warm_up", "0"], "at least 1"),
        (["--rounds", "0"], "at least 1"),
        (["--batch_sizes", "1", "0"], "at least 1"),
        (["--workers", "-1"], "at least 0"),
        (["--seed", "-1"], "at least 0"),
        (["--minutes", "0"], "--minutes: above 0"),
        (["--minutes", "nan"], "--minutes: above 0"),
        (["--bits", "8"], "invalid choice"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json cannot be written: No such file"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_flags_that_cannot_work(flags, message):
    assert message in refusal(*flags)


def test_help_says_what_is_left_out(capsys):
    with pytest.raises(SystemExit) as stop:
        full_size.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "2.6 is code from the hub and left out" in said and "--worker " not in said
    for flag in re.findall(r"--\w+", full_size.__doc__):
        assert said.count(flag) > 1, flag  # named above, and there


def test_seed_makes_other_rows(tmp_path):
    tokenizer, texts = made_up.make_processor("llava-1.5-7b", True).tokenizer, []
    for seed in (0, 0, 1):
        texts.append(made_up.make_rows("sft_llava", 3, tokenizer, tmp_path, seed).read_text())
    assert texts[0] == texts[1] != texts[2]
