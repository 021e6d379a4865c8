"""benchmarks/ but for full_size.py: step.py's checks can fail, what is counted is right, estimate.py and loader.py
report what they claim."""

import contextlib
import functools
import importlib
import io
import json
import signal
import sys
import tempfile
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from conftest import ROOT
from recipes import NAMES, sequences

import dpo_idefics2
import idefics2_docvqa
import sft_llava
from tools import inspect_recipe

sys.path.insert(0, str(ROOT / "benchmarks"))
import estimate  # noqa: E402
import host  # noqa: E402
import loader  # noqa: E402
import made_up  # noqa: E402
import measure  # noqa: E402
import scaled  # noqa: E402
import step  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("quick_collections"),
    pytest.mark.filterwarnings("ignore:.*(pin_memory|This DataLoader will create).*"),
]
STEPS = {  # flags, and how many matrices are trained: A and B of each layer with LoRA
    "sft_llava": ([], 2 * 2 * 7),  # seven projections in two layers
    "idefics2_docvqa": ([], 2 * (2 * 4 + 3 * 4 + 1)),  # language model, perceiver, lm_head
    "idefics2_docvqa shared": (["--questions", "2"], 2 * (2 * 4 + 3 * 4 + 1)),
    "dpo_idefics2": (["--arch", "idefics2", "--adapters", "language"], 2 * 2 * 7),  # the tower is frozen
    "dpo_idefics2 llava": (["--arch", "llava", "--adapters", "all"], 2 * (2 * 7 + 2 + 2 * 6)),  # two layers of a tower
    "finetune_minicpm_lora": ([], 2 * (3 + 4 + 2 * 3) + 4 + 2 + 2 * 2),  # and a projector, trained in full
    "llava_two_stage": ([], 2 * 2 * 7 + 4),  # the same
}
BOTH = ("sft_llava", "dpo_idefics2", "finetune_minicpm_lora")  # with activation checkpointing and without


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """As all other tests run. And loader.py would leave its own cache for data sets behind, in a folder that is
    gone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loader.datasets.config, "HF_DATASETS_CACHE", loader.datasets.config.HF_DATASETS_CACHE)


# ---------------------------------------------------------------- step.py


def step_flags(name, *more):
    """step.py's flags for one step of a tiny model."""
    return ["--recipe", name.split()[0], *STEPS[name][0], "--tiny", "--steps", "1", *more]


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """A function: an entry of STEPS -> (exit status, what was printed, the settings in the file of figures)."""

    @functools.cache
    def run(name):
        path, printed = tmp_path_factory.mktemp("step") / "step.json", io.StringIO()
        flags = step_flags(name, "--batch_size", "2", "--checkpointing", "both" if name in BOTH else "on")
        with contextlib.redirect_stdout(printed):
            status = step.main([*flags, "--json", str(path)])
        return status, printed.getvalue(), json.loads(path.read_text())["settings"]

    return run


@pytest.mark.parametrize("name", STEPS)
def test_both_sides_are_equal_and_the_recipe_costs_less(stepped, name):
    status, printed, settings = stepped(name)
    assert status == 0 and printed.count(": equal") == len(settings)
    assert [setting["checkpointing"] for setting in settings] == ([True, False] if name in BOTH else [True])
    for setting in settings:  # times of one tiny step say nothing
        check, flops, peak = setting["check"], setting["flops"], setting["peak_bytes"]
        assert setting["equal"] and check["gradient_max"] < 1e-5 and check["adapters"] == STEPS[name][1]
        assert peak["stock"] >= peak["recipe"] > 0
        if name == "sft_llava" and not setting["checkpointing"]:
            assert flops["stock"] == flops["recipe"] > 0
        else:
            assert flops["stock"] > flops["recipe"] > 0
    if name in BOTH:
        assert settings[0]["flops"]["stock"] > settings[1]["flops"]["stock"]  # recomputation is counted


@pytest.mark.parametrize("name", STEPS)
def test_weights_without_storage_cost_as_many_flops(stepped, tmp_path, name):
    args = step.parse(step_flags(name, "--batch_size", "2"))
    for setting in stepped(name)[2]:
        with measure.label_positions_only():
            counted = step.counted_sides(args, setting["checkpointing"], tmp_path, "tiny", spread=1)
        shares = counted.pop("shares", None)
        counted.pop("mask", None)
        apart = counted.pop("apart", None)
        if apart:
            assert apart["all"] == setting["pages"]["flops"]["stock"] > counted["recipe"]["all"]
        assert counted == setting["flops_by_part"] and shares == setting.get("shares")
        assert counted["stock"]["all"] == setting["flops"]["stock"] > counted["image"] > 0
        if name.startswith("idefics2_docvqa"):
            assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0


@pytest.mark.parametrize("name", ["dpo_idefics2", "dpo_idefics2 llava"])
def test_dpos_speed_up_is_taken_apart(stepped, name):
    _, printed, settings = stepped(name)
    assert printed.count("speed-up: image once") == len(settings)
    for setting in settings:
        parts = setting["flops_by_part"]
        stock, recipe = (parts[side]["all"] - parts[side]["language"] for side in ("stock", "recipe"))
        assert stock > 1.9 * recipe
        if name == "dpo_idefics2":  # once, forward, for policy and reference
            assert recipe == parts["image"]


def test_trl_at_its_defaults_stands_beside(stepped):
    """It trains every position: an image's placeholders, prompt and answer. The recipe: the answer and its EOS."""
    _, printed, (checkpointed, other) = stepped("sft_llava")
    assert printed.count("losses differ by design") == 1 and "defaults" not in other
    flops, trained = (checkpointed["defaults"][what] for what in ("flops", "trained_positions"))
    assert flops["stock"] > checkpointed["flops"]["stock"]  # more positions are scored
    assert flops["recipe"] == checkpointed["flops"]["recipe"]
    assert trained["stock"]["image"] == 2 * scaled.shape("llava-1.5-7b", "tiny")["tokens"]  # of two rows
    assert trained["stock"]["prompt"] > 0
    assert trained["recipe"] == {"image": 0, "prompt": 0, "answer": trained["stock"]["answer"] + 2}


def test_stock_side_scores_label_positions_only(tmp_path):
    """As on a GPU, though here is none: it saves the logits elsewhere, and the loss stays the same."""
    both, batches, _ = step.measured_sides(step.parse(step_flags("sft_llava")), False, tmp_path, "tiny")
    (batch,) = batches["stock"]
    flops, losses = [], []
    for within in (contextlib.nullcontext(), measure.label_positions_only()):
        with within:
            flops.append(measure.flops(both["stock"], batch))
            transformers.set_seed(0)  # of dropout
            losses.append(measure.step(both["stock"], batch).item())
    text = scaled.shape("llava-1.5-7b", "tiny")["text_config"]
    logits = 2 * text["hidden_size"] * text["vocab_size"]  # of one position; at most twice that for their gradients
    assert logits <= (flops[0] - flops[1]) / int((batch["labels"] == -100).sum()) <= 3 * logits
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def loss_alone(loss):
    return loss + 1e-4 * loss.detach()


def gradient_alone(loss):
    return loss + 1e-4 * (loss - loss.detach())


def log_probabilities_alone(output):
    """By as much for both answers: loss and gradients stay."""
    output.log_probs = output.log_probs - 0.01
    return output


@pytest.mark.parametrize(
    "trainer, method, wrong",
    [
        (sft_llava.Trainer, "compute_loss", loss_alone),
        (idefics2_docvqa.Trainer, "compute_loss", gradient_alone),
        (dpo_idefics2.SharedPromptDPOTrainer, "forward_pairs", log_probabilities_alone),
    ],
)
def test_exit_status_1_where_they_differ(monkeypatch, capsys, trainer, method, wrong):
    right = getattr(trainer, method)
    monkeypatch.setattr(trainer, method, lambda *args, **more: wrong(right(*args, **more)))
    assert step.main(step_flags(trainer.__module__, "--checkpointing", "off")) == 1
    printed = capsys.readouterr().out
    assert "NOT EQUAL" in printed and "error: the recipe's loss, log-probabilities or gradients are not" in printed
    assert "FLOPs" not in printed and "x  " not in printed and "speed-up" not in printed


@pytest.mark.parametrize("what", ["log_probabilities", "gradient_max", "gradient_norm"])
def test_nan_is_not_equal(what):
    same = {"loss": {"stock": 2.0, "recipe": 2.0}, "log_probabilities": 0.0, "gradient_max": 0.0, "gradient_norm": 0.0}
    assert step.equal(same)
    assert not step.equal(same | {what: float("nan")}) and not step.equal(same | {what: 2e-5})
    assert not step.equal(same | {"loss": {"stock": 2.0, "recipe": 2.00003}})
    assert not step.equal(same | {"loss": {"stock": 2.0, "recipe": float("nan")}})


def deep(layers, monkeypatch):
    """Make every deep model as deep."""
    for sizes in scaled.LAYERS.values():
        monkeypatch.setitem(sizes, "deep", (sizes["deep"][0], layers, 4 * layers))


def test_operations_of_a_step_grow_with_depth_and_not_with_the_batch(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(host, "count_waits", lambda *args: "there is no g++")
    found = []
    for layers in (1, 2):
        deep(layers, monkeypatch)
        path = tmp_path / f"{layers}.json"
        assert step.main(["--host", "--recipe", "sft_llava", "--steps", "1", "--json", str(path)]) == 0
        found.append(json.loads(path.read_text())["operations"]["sft_llava"])
    printed = capsys.readouterr().out
    assert printed.count("| `sft_llava` | 1 |") == 2 and "waits are not counted: there is no g++" in printed
    for one in found:
        assert (
            0 < one["1"]["kernels"] < one["1"]["operations"] <= one["4"]["operations"] and one["1"]["milliseconds"] > 0
        )
        assert one["4"]["operations"] == pytest.approx(one["1"]["operations"], rel=0.02)
    few, many = (one["1"]["operations"] for one in found)
    assert 1.5 * few < many < 2 * few  # twice the layers, and what comes before and after them


def test_operations_are_counted_one_by_one():
    x = torch.ones(2, 3, requires_grad=True)
    with host.Operations() as counted:
        x.t().mul(2).t().sum()
    assert (counted.all, counted.kernels) == (4, 2)  # transposing computes nothing


WAITING = {"part": "step", "kind": "wait", "what": "", "place": "", "caller": "", "is_ours": False, "count": 6}


def test_waits_are_those_of_the_step(monkeypatch, tmp_path):
    events = [WAITING, WAITING | {"count": 2, "is_ours": True}, WAITING | {"part": "answers", "count": 99}]
    events.append(WAITING | {"kind": "blocking copy", "count": 5})
    reports = [{"recipe": "sft_llava", "error": "", "events": events}]
    reports.append({"recipe": "dpo_idefics2", "error": "Traceback\nTypeError: no", "events": []})
    monkeypatch.setattr(host, "count_waits", lambda *args: reports)
    printed = []
    found = host.report_waits(["sft_llava", "dpo_idefics2"], tmp_path, printed.append)
    assert found["sft_llava"] == {"waits": 8, "by_the_recipe": 2, "blocking_copies": 5}
    assert printed[1:] == ["| `sft_llava` | 8 | 2 | 5 |", "| `dpo_idefics2` | failed |  | TypeError: no |"]


def tiny_in_place_of(size, monkeypatch):
    """Make every model of a size as small as a tiny one."""
    for sizes in scaled.LAYERS.values():
        monkeypatch.setitem(sizes, size, sizes["tiny"])


def test_exit_status_1_where_a_threshold_is_missed(monkeypatch, capsys):
    tiny_in_place_of("scaled", monkeypatch)
    monkeypatch.setitem(step.THRESHOLDS, "dpo_idefics2 llava language", {"time": 0.01, "FLOPs": 100})
    flags = ["--recipe", "dpo_idefics2", "--arch", "llava", "--adapters", "language", "--steps", "1"]
    assert step.main(flags) == 1
    printed = capsys.readouterr().out
    assert "time at least 0.01x at equal settings: holds" in printed
    assert "FLOPs at least 100x at equal settings: MISSED" in printed and "error: FLOPs below" in printed
    assert step.main([*flags, "--report_only"]) == 0
    assert step.main([*flags, "--checkpointing", "off"]) == 0  # thresholds are for steps with it


@pytest.mark.parametrize(
    "name, picture", [("sft_llava", "30x20"), ("idefics2_docvqa", "page"), ("dpo_idefics2", "30x20")]
)
def test_real_size_is_counted_and_not_timed(monkeypatch, tmp_path, capsys, name, picture):
    tiny_in_place_of("real", monkeypatch)
    for model in scaled.PICTURES:
        monkeypatch.setitem(scaled.PICTURES, model, [(30, 20)])
    flags = ["--recipe", name, *STEPS[name][0], "--real_size", "--batch_size", "1"]
    assert step.main([*flags, "--json", str(tmp_path / "step.json")]) == 0
    printed = capsys.readouterr().out
    assert "time " not in printed.split("\n", 1)[1] and "same?" not in printed and f"image {picture}" in printed
    (setting,) = json.loads((tmp_path / "step.json").read_text())["settings"]
    counts = setting["counted"].pop(picture)
    assert counts["stock"]["all"] > counts["recipe"]["all"] > counts["image"] > 0 and not setting["counted"]


MISTAKES = """
step --seed -1 | --seed: from 0
step --json nowhere/x.json | --json nowhere/x.json cannot be written: No such file
step --steps 0 | at least 1
step --device cuda | no GPU found
step --arch llava | --arch, --adapters and --attn_implementation are for --recipe dpo_idefics2
step --questions 2 | --questions is for --recipe idefics2_docvqa
step --recipe idefics2_docvqa --questions 0 | at least 1
step --recipe dpo_idefics2 --attn_implementation flex_attention | on a CPU it has no backward pass
estimate no_recipe | no recipe no_recipe; there are sft_llava
estimate --rows 15 | at least 16
estimate --batch_size 2 | are for --measure
estimate --measure --cards | one of them
step --host --checkpointing both | --host takes --recipe, --steps and --json, not --checkpointing
step --host --steps 0 | at least 1
estimate --json nowhere/x.json | cannot be written
loader llava | no recipe llava; there are sft_llava, llava_two_stage
loader --workers 2 -1 | --workers: 0 or more
loader --rows 0 | --rows, --batch_size, --rounds: at least 1
loader --json nowhere/x.json | cannot be written: No such file
full_size sft_lava | no recipe sft_lava; there are sft_llava, dpo_idefics2
full_size --batch_sizes 1 0 | at least 1
full_size --workers -1 | at least 0
full_size --minutes nan | --minutes: above 0
full_size --json nowhere/x.json | cannot be written: No such file
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_mistakes_get_one_message(mistake):
    """Before anything is measured."""
    command, message = mistake.split(" | ")
    program, *flags = command.split()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(program).main(flags)
    assert stop.value.code.startswith("error: ") and message in stop.value.code and "\n" not in stop.value.code


# ---------------------------------------------------------------- scaled models, rows, what is shared


@pytest.mark.parametrize("name", scaled.LAYERS)
def test_real_sizes_are_the_published_ones_and_a_scaled_model_keeps_the_proportions(name):
    real, small = (scaled.shape(name, size) for size in ("real", "scaled"))
    for part in (part for part in made_up.MODELS[name] if part.endswith("_config")):
        assert made_up.MODELS[name][part].items() <= real[part].items()
    layers = []
    for part in ("vision_config", "text_config"):
        ratio = {what: real[part][what] / small[part][what] for what in scaled.WIDTHS[:4]}
        assert ratio["hidden_size"] == 4 == pytest.approx(ratio["intermediate_size"], rel=0.01)
        assert ratio["num_attention_heads"] == 4  # a head is as wide as it was
        layers.append(ratio["num_hidden_layers"])
    assert (real["side"] / small["side"]) ** 2 == pytest.approx(real["tokens"] / small["tokens"]) == 4
    if name == "minicpm-v-4.6":  # whose tower merges patches on the way
        assert real["text_config"]["layer_types"] == (["linear_attention"] * 3 + ["full_attention"]) * 6
    else:
        assert layers[0] == pytest.approx(layers[1], rel=0.03)


@pytest.mark.parametrize("size, by", [("real", 1), ("scaled", 4)])
@pytest.mark.parametrize("name", ["sft_llava", "dpo_idefics2", "dpo_idefics2 llava", "finetune_minicpm_lora"])
def test_texts_have_the_stated_lengths(tmp_path, name, size, by):
    sliced = name == "finetune_minicpm_lora"
    args = step.parse(step_flags(name, "--batch_size", "5"))
    setup = step.prepare(args, True, tmp_path, size, (896, 896) if sliced else (56, 56))
    least, most = (80, 100) if name.startswith("dpo") else (16, 24)
    views, marks = (5, 2 * 5 + 3 + 2) if sliced else (1, 0)  # <image>, <slice>, their ends, line ends
    for ids, labels in sequences(setup.collator(setup.rows)):
        answer, images = len(labels) - labels.count(-100), ids.count(setup.collator.processor.image_token_id)
        assert images == views * setup.sizes["tokens"]
        assert 36 // by - 1 <= len(ids) - answer - images - marks <= 44 // by + 6  # what the template alone takes
        assert least // by <= answer - 1 <= most // by + 2


def test_pages_and_their_texts(tmp_path):
    setup = step.prepare(step.parse(step_flags("idefics2_docvqa", "--batch_size", "50")), True, tmp_path, "tiny")
    for row in setup.rows:
        assert 12 <= scaled.count_tokens(setup.collator.processor.tokenizer, row["question"]) <= 20
        assert 2 <= len(row["answers"][0]) <= 14 and row["image"].height == 140 > row["image"].width >= 97


def test_a_benchmark_that_is_ended_leaves_nothing(tmp_path):
    """SIGTERM does what Ctrl+C does."""

    def main():
        with tempfile.TemporaryDirectory(dir=tmp_path):
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="interrupted"):
        measure.start(main)
    signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", list(made_up.MODELS))
def test_weights_of_several_files_are_complete(model, tmp_path):
    made_up.write_weights(model, True, tmp_path, shard=100_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded, info = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.num_parameters() == int((tmp_path / "done").read_text())


# ---------------------------------------------------------------- estimate.py


@pytest.fixture
def in_this_process(monkeypatch):
    """tools/inspect_recipe.py, which estimate.py starts as a program, runs here: a process costs ten seconds."""

    def run(command, **options):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            inspect_recipe.main(command[2:])
        return SimpleNamespace(returncode=0, stdout=printed.getvalue())

    monkeypatch.setattr(estimate.subprocess, "run", run)


def test_a_table_of_both_stages_and_precisions(capsys, tmp_path, in_this_process):
    estimate.main(["llava_two_stage", "--small", "--rows", "16", "--json", str(tmp_path / "found.json")])
    small, _, head, rule, *lines = capsys.readouterr().out.splitlines()
    assert small == estimate.SMALL and len({line.count("|") for line in (head, rule, *lines)}) == 1
    reports = json.loads((tmp_path / "found.json").read_text())["reports"]
    runs = ["llava_two_stage align, 16 bits", "llava_two_stage instruct, 16 bits", "llava_two_stage instruct, 4 bits"]
    assert list(reports) == runs and len(lines) == 3
    for run, report in reports.items():
        trained = {name: part["trainable"] > 0 for name, part in report["parts"].items()}
        assert trained == {"vision tower": False, "projector": True, "language model": "instruct" in run}
        packed = sum(part["four_bit"] for part in report["parts"].values())
        assert (packed > 0) == (", 4 bits" in run)


@pytest.mark.parametrize("bits", ["4", "16"])
def test_a_step_is_measured_beside_the_estimate(bits, tmp_path, in_this_process):
    flags = ["--measure", "--small", "--rows", "16", "--scratch", str(tmp_path / "disk")]
    estimate.main(["sft_llava.py", *flags, "--bits", bits, "--json", str(tmp_path / "found.json")])
    (found,) = json.loads((tmp_path / "found.json").read_text())["reports"].values()
    assert found["foretold"] == pytest.approx(found["measured"], rel=0.15) and found["batch"] == 1


def test_no_room_for_the_weights(tmp_path, monkeypatch):
    memory = SimpleNamespace(available=int(40e9))
    monkeypatch.setattr(estimate.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(estimate.psutil, "swap_memory", lambda: SimpleNamespace(free=0))
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(9.5e9)))
    docvqa = ["idefics2_docvqa", "--measure", "--scratch", str(tmp_path)]
    with pytest.raises(SystemExit, match=f"16.8 GB are needed in {tmp_path} for the weights, 9.5 GB are free"):
        estimate.main(docvqa)
    memory.available = int(8e9)
    with pytest.raises(SystemExit, match="idefics2-8b in 16 bits alone take 16.8 GB of memory, 8 GB are free"):
        estimate.main(docvqa)


def test_what_does_not_fit_is_said():
    kinds = {kind: {"bytes": 5e9, "for_each_row": 1e9} for kind in estimate.KINDS}
    fits = {str(card): dict.fromkeys(estimate.KINDS, max(0, card - 20)) for card in estimate.CARDS}
    fixed = {"weights": 14e9, "trained": 1e9, "gradients": 1e9, "optimizer": 2e9, "exchange": 0}
    memory = {"strategy": "ddp", "fixed": {"ddp": fixed}, "longest": 700, "activations": kinds, "fits": fits}
    memory["peak"] = {"phase": "generation", "bytes": 24e9}
    cells = estimate.line("sft_llava", "16", {"memory": memory})
    assert cells[:9] == ["`sft_llava`", "16 bit", "1", "700", "14.0", "4.0", "5.0", "5.0", "24.0, generation"]
    assert cells[9:] == ["no / no", "4 / 4", "20 / 20", "60 / 60"]


def test_batch_and_speed_by_card():
    """40 % of a card's peak: of an H100's 989 TFLOP/s 395.6 are left, for rows of 10 TFLOP each."""
    batches = {"16": 0, "24": 1, "40": 2, "80": 4, "141": 4}
    auto = {card: {"train": batch, "accumulation": 4 // max(1, batch)} for card, batch in batches.items()}
    memory = {"longest": 700, "flops_of_a_row": 1e13, "auto": auto}
    cells = dict(zip(estimate.GPUS, estimate.cards_line("sft_llava", "4", {"memory": memory})[4:], strict=True))
    assert cells["T4, 16 GB"] == "no" and cells["RTX 4090, 24 GB"] == "1 x 4, 6.6/s"
    assert cells["A100, 40 GB"] == "2 x 2, 12/s" and cells["A100, 80 GB"] == "4 x 1, 12/s"
    assert cells["H100, 80 GB"] == cells["H200, 141 GB"] == "4 x 1, 40/s"


def test_cards_are_reckoned_with(capsys, tmp_path, in_this_process):
    """A small model fits everywhere: auto is the whole step, of 4 rows in sft_llava.py."""
    estimate.main(["sft_llava", "--bits", "4", "--small", "--cards", "--rows", "16"])
    *_, head, rule, line = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == line.count("|") and line.count("4 x 1, ") == len(estimate.GPUS)


def test_a_refusal_of_the_recipe_is_passed_on(tmp_path):
    """By the tool as a program of its own."""
    with pytest.raises(SystemExit, match="^error: sft_llava, 16 bits: error: --learning_rate must be above 0"):
        estimate.reckon("sft_llava", "16", 16, True, tmp_path, more={"learning_rate": 0})


# ---------------------------------------------------------------- loader.py


def test_rates_and_padding_of_all_recipes_are_reported(tmp_path):
    flags = ["--tiny", "--rows", "5", "--workers", "0", "1", "--batch_size", "2"]
    assert loader.main([*flags, "--json", str(tmp_path / "loader.json")]) == 0
    found = json.loads((tmp_path / "loader.json").read_text())["recipes"]
    steps = {"sft_llava": 4, "llava_two_stage": 128, "dpo_idefics2": 64, "idefics2_docvqa": 16}
    assert {name: one["step"] for name, one in found.items()} == {**steps, "finetune_minicpm_lora": 8}
    for name, one in found.items():
        sides = {"recipe"} if name == "finetune_minicpm_lora" else {"recipe", "trl"}
        assert set(one["rows_per_second"]) == set(one["cpu_ms_a_row"]) == sides
        assert all(set(rates) == {"0", "1"} and min(rates.values()) > 0 for rates in one["rows_per_second"].values())
        assert min(one["cpu_ms_a_row"].values()) > 0 and set(one["padding"]) == {"2", "4", "8"}
        for orders in one["padding"].values():
            assert set(orders) == {"random", "steps by length", "group_by_length"}
            assert all(0 <= order["share"] < 0.5 for order in orders.values())


# Of three 1000 x 800 pictures: shape of pixel_values, image tokens of a row.
PIXELS = {
    "sft_llava": ((3, 3, 336, 336), 576),
    "llava_two_stage": ((3, 3, 336, 336), 576),
    "dpo_idefics2": ((6, 1, 3, 392, 490), 64),
    "idefics2_docvqa": ((3, 1, 3, 784, 980), 64),
    "finetune_minicpm_lora": (None, 5 * 63),  # the whole and 2 x 2 slices, each of 504 x 392 pixels
}


@pytest.mark.parametrize("name", NAMES)
def test_both_sides_get_the_same_rows_of_the_real_size(tmp_path, name):
    """The same pictures, to the last pixel, and the same words but for BOS, EOS and what the recipe says besides."""
    images = ["0.jpg", "1.jpg", "2.jpg"]
    for n, image in enumerate(images):
        made_up.photograph(n).save(tmp_path / image, quality=90)
    one = loader.Loaders(name, SimpleNamespace(rows=3, batch_size=3, tiny=False), tmp_path, images)
    (mine,), (shape, tokens) = one.loader("recipe", 0), PIXELS[name]
    assert shape in (None, mine["pixel_values"].shape)
    least, most = loader.CASES[name].answer
    for ids, labels in sequences(mine):
        assert ids.count(one.processor.image_token_id) == tokens
        assert least - 3 <= len(labels) - labels.count(-100) <= most + 3
    if "trl" in one.sides:
        (other,) = one.loader("trl", 0)
        assert torch.equal(mine["pixel_values"], other["pixel_values"])
        for ids in zip(mine["input_ids"], other["input_ids"], strict=True):
            texts = [one.processor.tokenizer.decode(some, skip_special_tokens=True) for some in ids]
            words = [[word for word in text.split() if word.strip("?.") in loader.WORDS] for text in texts]
            assert words[0] == words[1] and len(words[0]) > (5 if name == "idefics2_docvqa" else 15)


def test_padding_by_hand():
    assert loader.padded([0, 1, 2, 3], [10, 4, 7, 7], 2) == (6, 34)
    assert loader.padded([2, 3, 0, 1], [10, 4, 7, 7], 4) == (12, 40)
    assert loader.padded([1, 0, 2], [3, 5, 1], 2) == (2, 11)  # the last batch is smaller


@pytest.mark.parametrize("recipe, has_own_order", [("sft_llava", False), ("llava_two_stage", True)])
def test_steps_by_length_pad_less_and_sorting_everything_least(recipe, has_own_order):
    recipe, lengths = importlib.import_module(recipe), list(range(100, 200))
    found = loader.padding(recipe, lengths, 16)
    for orders in found.values():
        share = {order: one["share"] for order, one in orders.items()}
        assert share["group_by_length"] <= share["steps by length"] <= share["random"]
        assert (share["steps by length"] < share["random"]) == has_own_order
        real = [one["tokens"] * (1 - one["share"]) for one in orders.values()]
        assert real == pytest.approx([real[0]] * 3)  # the rows are the same


NO_ROOM = "^error: no scratch space: .*(No space left|shm).* a folder with 26 MB free"


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(28, "No space left on device"), NO_ROOM),
        (RuntimeError("insufficient shared memory (shm)"), NO_ROOM),
        (RuntimeError("shapes"), "^shapes$"),  # is not taken for a lack of space
    ],
)
def test_no_scratch_space_is_one_message(monkeypatch, error, message):
    monkeypatch.setattr(loader, "photograph", mock.Mock(side_effect=error))
    with pytest.raises((SystemExit, RuntimeError), match=message):
        loader.main(["sft_llava"])
