"""What a run of each recipe leaves behind: output_dir, the best checkpoint, samples.md, a result that stands alone."""

import functools
import json
import math
import re
import shutil

import pytest
import torch
import yaml
from conftest import fresh, log
from PIL import Image
from recipes import NAMES
from runs import SAMPLE_TOKENS, SHORT, VARIANTS, Runs, copy_of, logits, run, same, says
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

USUAL = {  # one variant of each recipe, two of the one with two stages
    "sft_llava": "sft: 4-bit",
    "idefics2_docvqa": "docvqa: 4-bit",
    "dpo_idefics2": "dpo: 4-bit",
    "finetune_minicpm_lora": "4.6: lora",
    "llava_two_stage": "instruct: lora",
}
usual = pytest.mark.parametrize("variant", [*USUAL.values(), "align"])
COLUMNS = dict.fromkeys(NAMES, ["picture", "question", "right", "answered"])
COLUMNS["idefics2_docvqa"] = ["page", "question", "answered", "accepted", "ANLS"]
COLUMNS["dpo_idefics2"] = ["image", "prompt", "before", "after", "chosen", "rejected"]
ANSWERED = {"idefics2_docvqa": 2, "dpo_idefics2": 3}  # the column of the answer, elsewhere the fourth


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    return Runs(request, tmp_path_factory)


def tables(done):
    """samples.md -> {step: its rows}."""
    text = (done.out / "samples.md").read_text(encoding="utf-8")
    parts = re.split(r"^## Step (\d+)(?:: ANLS [\d.]+)?$", text, flags=re.M)[1:]
    found = {}
    for step, table in zip(parts[::2], parts[1::2]):
        lines = [line for line in table.splitlines() if line.startswith("| ")]
        head, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
        assert head == COLUMNS[done.recipe]
        found[int(step)] = rows
    return found


def answers(done, step):
    return [row[ANSWERED.get(done.recipe, 3)] for row in tables(done)[step]]


def cell(text):
    return " ".join(text.replace("|", "&#124;").split())


def weights_of(folder):
    """The weights in a folder, of a two-stage result by the model's own names, not by the published ones."""
    (file,) = folder.glob("*model*.safetensors")
    own = {"vision_tower.vision_model": "model.vision_tower", "language_model.model": "model.language_model"}
    own |= {"language_model.lm_head": "lm_head", "multi_modal_projector": "model.multi_modal_projector"}
    prefix = f"^({'|'.join(own)})"
    return {re.sub(prefix, lambda found: own[found[0]], name): p for name, p in load_file(file).items()}


# ---------------------------------------------------------------------------------------------------------- output_dir
@usual
def test_output_dir_holds_everything(runs, variant, tmp_path):
    done = runs.run(variant, tmp_path / "out", report_to="tensorboard", hub_token="secret")
    weights = "adapter_model.safetensors" if VARIANTS[variant].adapted else "model.safetensors"
    files = ["settings.yaml", "samples.md", "trainer_state.json", "processor_config.json", "tokenizer.json", weights]
    assert all((done.out / name).stat().st_size > 0 for name in [*files, "chat_template.jinja"])
    assert {path.name for path in done.out.glob("*.safetensors")} == {weights}
    assert {path.name for path in done.out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert list(done.out.glob("runs/*/events.out.tfevents.*"))

    first, *lines = (done.out / "settings.yaml").read_text().splitlines()
    written = yaml.safe_load("\n".join(lines))
    given = SHORT | VARIANTS[variant].flags | {"report_to": "tensorboard", SAMPLE_TOKENS[done.recipe]: 4}
    given |= {"learning_rate": None} if variant == "align" else {}
    assert first == f"# {done.recipe}.py" and "secret" not in "".join(lines) and "hub_token" not in written
    assert {name: written.get(name) for name in given} == given

    for name in ("loss", "grad_norm", "learning_rate"):
        assert [*log(done.out, name)] == [1, 2, 3, 4] and all(map(math.isfinite, log(done.out, name).values()))
    assert [*log(done.out, "eval_loss")] == [2, 4] == [*tables(done)] and log(done.out)[4] < log(done.out)[1]
    assert f"saved {done.out}: " in done.text


REWARDS = [f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")]


@pytest.mark.parametrize(
    "variant, metrics, evaluated",
    [
        ("sft: 4-bit", ["mean_token_accuracy"], ["mean_token_accuracy"]),
        ("docvqa: 4-bit", [], ["anls", "exact_match"]),
        ("dpo: 4-bit", [*REWARDS, "logps/chosen", "logps/rejected"], [*REWARDS, "samples/ended", "samples/tokens"]),
    ],
)
def test_the_recipes_own_metrics_are_logged(runs, variant, metrics, evaluated):
    done = runs.trained(variant)
    logged = [log(done.out, name) for name in metrics] + [log(done.out, f"eval_{name}") for name in evaluated]
    assert [[*values] for values in logged] == [[1, 2, 3, 4]] * len(metrics) + [[2, 4]] * len(evaluated)
    assert all(math.isfinite(value) for values in logged for value in values.values())
    if "dpo" in variant:  # with the adapter's B = 0 policy and reference are one
        assert log(done.out, "rewards/margins")[1] == 0 != log(done.out, "rewards/margins")[4]
        assert log(done.out)[1] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    "variant, more, changed",
    [
        ("sft: 4-bit", {}, {}),
        ("docvqa: 4-bit", {"longest_edge": 84}, {"longest_edge": 84, "do_image_splitting": False}),
        ("dpo: 4-bit", {"longest_edge": 56}, {"longest_edge": 56, "do_image_splitting": False}),
    ],
)
def test_the_processor_is_saved_as_it_was_used(runs, variant, more, changed, tmp_path):
    done = runs.run(variant, tmp_path / "out", max_steps=1, eval_strategy="no", **more)
    own, base = (AutoProcessor.from_pretrained(folder) for folder in (done.out, runs.folder(variant) / "model"))
    assert type(own) is type(base) and own.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    mine, theirs = (processor.image_processor.to_dict() for processor in (own, base))
    for images in (mine, theirs):
        images.update(dict(images.pop("size")))
    assert mine == theirs | changed
    turns = [{"role": role, "content": [{"type": "text", "text": "x"}]} for role in ("user", "assistant")]
    end = "</s>" if "sft" in variant else "<end_of_utterance>"  # LLaVA's own template ends an answer with nothing
    assert own.apply_chat_template(turns).rstrip().endswith(end)


@pytest.mark.parametrize("variant, slices", [("4.6: lora", 2), ("4.7: lora", 9), ("2.6: lora", 9)])
def test_the_saved_processor_of_minicpm_makes_the_same_batches(runs, variant, slices, tmp_path):
    """With this run's slices."""
    done = runs.run(variant, tmp_path / "out", max_slice_nums=slices, max_steps=1, eval_strategy="no")
    recipe = runs.module(variant)
    settings, training = recipe.parse([*done.argv, "--model_name_or_path", str(done.out)])
    again = recipe.Collator(recipe.load_processor(settings), settings, training)
    rows = [done.trainer.train_dataset[n] for n in range(9)]
    one, two = done.trainer.data_collator(rows), again(rows)
    assert torch.equal(one["labels"], two["labels"])
    assert torch.equal(one.get("data", one)["input_ids"], two.get("data", two)["input_ids"])
    if "2.6" not in variant:
        saved = json.loads((done.out / "processor_config.json").read_text())["image_processor"]
        assert (saved["max_slice_nums"], saved["downsample_mode"]) == (slices, "16x")


@pytest.mark.parametrize(
    "variant", [*USUAL.values(), "docvqa: 4-bit, DoRA", "4.7: lora", "2.6: lora", "align", "instruct: full, joined"]
)
def test_settings_yaml_repeats_the_run(runs, variant, tmp_path):
    """To the last bit: also a projector that is new, and the answers drawn."""
    first = runs.trained(variant)
    argv = ["--config", str(first.out / "settings.yaml"), "--output_dir", str(tmp_path / "again")]
    again = run(runs.module(variant), argv)
    for name in ("loss", "grad_norm", "eval_loss", "eval_anls", "rewards/margins", "eval_rewards/margins"):
        assert log(again.out, name) == log(first.out, name)
    assert log(again.out, "eval_loss") and same(again.last, first.last)
    assert (again.out / "samples.md").read_text() == (first.out / "samples.md").read_text()


# --------------------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("variant", USUAL.values())
def test_evaluation_and_samples_can_be_bounded(runs, variant, tmp_path):
    done = runs.run(variant, tmp_path / "few", sample_rows=1, max_eval_rows=3)
    assert len(done.trainer.eval_dataset) == 3 and {len(rows) for rows in tables(done).values()} == {1}
    assert "12 rows to train on, 3 to evaluate" in done.text
    done = runs.run(variant, tmp_path / "none", sample_rows=0, max_steps=2)
    assert log(done.out, "eval_loss") and not log(done.out, "eval_samples/ended")
    assert not list(done.out.glob("samples*")) and not list(done.out.glob("**/*tfevents*"))


@pytest.mark.parametrize("without", [{"eval_strategy": "no"}, {"eval_fraction": 0, "eval data": None}])
@usual
def test_a_run_without_evaluation_saves_its_last_weights(runs, variant, without, tmp_path):
    flag = "eval_dataset_name"
    without = {flag if name == "eval data" else name: value for name, value in without.items()}
    done = runs.run(variant, tmp_path / "out", load_best_model_at_end=True, **without)
    assert [*log(done.out)] == [1, 2, 3, 4] and not log(done.out, "eval_loss") and not log(done.out, "eval_anls")
    assert not list(done.out.glob("samples*")) and "12 rows to train on, 0 to evaluate" in done.text
    assert same(weights_of(done.out), weights_of(done.out / "checkpoint-4"))


@usual
def test_a_run_shorter_than_eval_steps_is_evaluated(runs, variant, tmp_path):
    done = runs.run(variant, tmp_path / "out", max_steps=1, eval_steps=100, save_steps=100)
    assert [*log(done.out)] == [1] == [*log(done.out, "eval_loss")] == [*tables(done)]


FAKED = {
    "eval_loss": [3.0, 1.0, 2.0, 4.0],
    "eval_anls": [0.2, 0.3, 0.9, 0.9],
    "eval_exact_match": [0.6, 0.2, 0.5, 0.5],
}


@pytest.mark.parametrize(
    "variant, metric, best",
    [
        ("sft: 4-bit, DoRA", None, 2),
        ("sft: full", None, 2),
        ("docvqa: 4-bit", None, 3),  # by ANLS unless another is named; of equal ones the first
        ("docvqa: 4-bit", "exact_match", 1),
        ("docvqa: 4-bit", "eval_loss", 2),
        ("docvqa: 4-bit", "loss", 2),
        ("dpo: 4-bit", None, 2),
        ("4.6: lora", None, 2),
        ("4.6: words", None, 2),
        ("4.7: full", None, 2),
        ("2.6: lora", None, 2),
        ("2.6: projector", None, 2),
        ("align", None, 2),
        ("instruct: full", None, 2),
        ("instruct: lora", None, 2),
    ],
)
def test_the_best_checkpoint_is_saved(runs, variant, metric, best, tmp_path, monkeypatch):
    trainer = runs.module(variant).SafeTrainer  # it computes eval_loss

    def faked(self, *args, stock=trainer.evaluation_loop, **kwargs):
        output = stock(self, *args, **kwargs)
        found = {name: values[self.state.global_step - 1] for name, values in FAKED.items() if name in output.metrics}
        output.metrics.update(found)
        return output

    monkeypatch.setattr(trainer, "evaluation_loop", faked)
    steps = {"eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    done = runs.run(variant, tmp_path / "out", **steps, metric_for_best_model=metric)
    assert [*log(done.out, "eval_loss").values()] == FAKED["eval_loss"]
    assert re.search(rf"best .*: [\d.]+, at step {best}; that is saved", done.text)
    kept, last = (weights_of(done.out / f"checkpoint-{step}") for step in (best, 4))
    assert same(weights_of(done.out), kept) and not same(kept, last)
    now = {name: p for name, p in done.trainer.model.named_parameters() if p.requires_grad}
    assert same(now, done.weights[best]) and not same(now, done.last)
    assert {path.name for path in done.out.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-4"}


def test_without_being_asked_dpo_saves_its_last_weights(runs, tmp_path):
    """Its rewards go on rising while eval_loss does."""
    done = runs.run("dpo: 4-bit", tmp_path / "out", eval_steps=1, save_steps=1, load_best_model_at_end=None)
    assert same(weights_of(done.out), weights_of(done.out / "checkpoint-4")) and "that is saved" not in done.text
    assert {path.name for path in done.out.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


@pytest.mark.parametrize("variant", USUAL.values())
def test_a_pipe_or_a_line_end_keeps_the_table_whole(runs, variant, tmp_path, monkeypatch):
    done = runs.run(variant, tmp_path / "out", train=False)
    monkeypatch.setattr(done.trainer.data_collator.processor.tokenizer, "decode", lambda *args, **kwargs: "a | b\nc")
    done.trainer.evaluate()
    assert answers(done, 0) == ["a &#124; b c"] * 2


# ---------------------------------------------------------------------------------------------------- learnt by heart
LEARNING = {
    "max_steps": 60,
    "eval_steps": 30,
    "save_steps": 30,
    "logging_steps": 10,
    "warmup_steps": 5,
    "per_device_train_batch_size": 12,
    "per_device_eval_batch_size": 4,
    "sample_rows": 12,
    "activation_checkpointing": False,
    "learning_rate": 5e-3,
}
ADAPTER = {"lora_r": 32, "lora_alpha": 32, "lora_dropout": 0}
LEARNT = {  # what differs from these settings
    "sft: float": ADAPTER,
    "docvqa: float": ADAPTER,
    "dpo: float": {"lora_r": 32, "loss_type": ["sigmoid", "sft"]},
    "4.6: lora": ADAPTER | {"learning_rate": 1e-2, "weight_decay": 0},
    "2.6: lora": ADAPTER | {"learning_rate": 1e-2, "weight_decay": 0},
    "instruct: full": {"learning_rate": 2e-3, "projector_learning_rate": 2e-3},
}


def roused(folder, out):
    """A copy of a model, whose random weights are as large as their width asks for, so that it learns fast."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("checkpoint-*"))
    model = AutoModelForImageTextToText.from_pretrained(out)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.data *= 4  # from a deviation of 0.02 to 0.08, about 1 / sqrt(128)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def learnt(runs, tmp_path_factory):
    """A function: variant -> a run that has learnt its 12 rows by heart, on which it is evaluated, too."""

    @functools.cache
    def learn(variant):
        out, recipe = tmp_path_factory.mktemp("learnt"), VARIANTS[variant].recipe
        more = LEARNING | LEARNT[variant] | {SAMPLE_TOKENS[recipe]: 32}
        if recipe != "finetune_minicpm_lora":
            folder = runs.folder(variant) / ("align" if recipe == "llava_two_stage" else "model")
            more["model_name_or_path"] = roused(folder, out / "model")
        more["eval_dataset_name"] = runs.rows(recipe) / "train.json"
        return runs.run(variant, out / "run", **more)

    return learn


def asked_and_right(recipe, row):
    """The last question of a row, as text, and its right answers."""
    if recipe == "idefics2_docvqa":
        return row["question"], row["answers"]
    if recipe == "dpo_idefics2":
        return row["question"].replace("<image>", ""), [row["chosen"]]
    question, answer = (turn.get("value") or turn["content"] for turn in row["conversations"][-2:])
    return re.sub(r"<image(_\d+)?>", "\n", question), [answer]


@pytest.mark.slow
@pytest.mark.parametrize("variant", LEARNT)
def test_it_learns(runs, learnt, variant):
    """From nothing, rows of every kind: asked, it says what it was taught."""
    done = learnt(variant)
    given = json.loads((runs.rows(done.recipe) / "train.json").read_text())
    right = [asked_and_right(done.recipe, given[row["row"]])[1] for row in done.trainer.eval_dataset]
    losses = log(done.out, "eval_loss")
    assert [*losses] == [30, 60] and losses[30] > losses[60]
    assert log(done.out)[60] < 0.25 * log(done.out)[10]
    told = answers(done, 60)
    assert len(told) == 12 and all(text in accepted for text, accepted in zip(told, right)) and len({*told}) > 3
    if "dpo" in variant:
        assert log(done.out, "eval_rewards/accuracies")[60] == log(done.out, "eval_samples/ended")[60] == 1
        tokenizer = done.trainer.processing_class.tokenizer
        lengths = [len(tokenizer(" " + text, add_special_tokens=False)["input_ids"]) for text in told]
        assert log(done.out, "eval_samples/tokens")[60] == pytest.approx(sum(lengths) / 12)
        assert log(done.out, "eval_rewards/margins")[60] > 1 and [row[2] for row in tables(done)[60]] != told


@pytest.mark.slow
@pytest.mark.parametrize("variant", LEARNT)
def test_samples_show_pictures_question_and_answers(runs, learnt, variant):
    """The same rows each time, in their order, each with its own pictures; answered is what the model generates."""
    done, module = learnt(variant), runs.module(variant)
    folder, collator = runs.rows(done.recipe), done.trainer.data_collator
    given, place = json.loads((folder / "train.json").read_text()), ANSWERED.get(done.recipe, 3)
    shown = {step: [row[:place] + row[place + 1 : place + 2] for row in rows] for step, rows in tables(done).items()}
    assert [*shown] == [30, 60] and shown[30] == shown[60]
    grey = {path.name: Image.open(path).convert("L") for path in (folder / "images").iterdir()}
    named = {name for row in given for name in names_of(row)}
    base = runs.load(variant, done.argv) if "dpo" in variant else None
    for row, line in zip(done.trainer.eval_dataset, tables(done)[60], strict=True):
        here = given[row["row"]]
        links = re.findall(r"!\[\]\((samples/[\d-]+\.png)\)", line[0])
        assert links == [f"samples/{row['row']}-{n}.png" for n in range(len(names_of(here)))]
        for link, name in zip(links, names_of(here)):
            small = Image.open(done.out / link).convert("L")
            assert max(small.size) == 336
            assert min(named, key=lambda other: apart(small, grey[other])) == name
        question, right = asked_and_right(done.recipe, here)
        assert line[1] == cell(question) and cell(" / ".join(right)) in line
        messages = collator.messages_of(row)
        prompt = messages[: module.last_answer(messages)]
        assert line[place] == cell(says(done.trainer.model, collator, prompt, 32))
        if base is not None:
            assert line[2] == cell(says(base, collator, prompt, 32)) and line[5] == cell(here["rejected"])


def names_of(row):
    """The names of a row's images."""
    image = row.get("image") or []
    return [image] if isinstance(image, str) else [*(image.values() if isinstance(image, dict) else image)]


def apart(one, other):
    """How far two grey pictures are apart."""
    pixels = [torch.tensor([*p.resize((84, 84), Image.Resampling.BOX).tobytes()]).float() for p in (one, other)]
    return (pixels[0] - pixels[1]).norm().item()


# ----------------------------------------------------------------------------------------------- a result stands alone
RELOAD = """
import importlib, json, sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)

def logits(model, batch):
    batch = {name: dict(value) if isinstance(value, dict) else value for name, value in batch.items()}
    with torch.no_grad():
        return model.eval()(**batch).logits

def load(path):
    if is_26:
        import finetune_minicpm_lora
        return finetune_minicpm_lora.load_26(path, None, dtype=torch.float32)
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)

results = {}
for name, (out, messages, batch, recipe, argv, tokens) in torch.load(sys.argv[1], weights_only=False).items():
    result, is_26 = results.setdefault(name, {}), name.startswith("2.6")
    if messages:
        processor = AutoProcessor.from_pretrained(out)
        batch = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                              return_tensors="pt", processor_kwargs={"padding": True})
        result["batch"] = dict(batch)
    has_adapter = Path(out, "adapter_config.json").exists()
    if has_adapter:
        base = json.loads(Path(out, "adapter_config.json").read_text())["base_model_name_or_path"]
        model = PeftModel.from_pretrained(load(base), out)
    else:
        model = load(out)
    result["float"] = logits(model, batch)
    asked = model
    if "4-bit" in name:
        module = importlib.import_module(recipe)
        asked = PeftModel.from_pretrained(module.load_model(*module.parse(argv)), out)
    result["reloaded"] = logits(asked, batch)
    if messages:
        ids = asked.generate(**batch, max_new_tokens=tokens, do_sample=False)[:, batch["input_ids"].shape[1]:]
        result["said"] = [" ".join(text.split()) for text in processor.batch_decode(ids, skip_special_tokens=True)]
    if has_adapter:
        merged, folder = model.merge_and_unload(), out + "-merged"
        result["merged"] = logits(merged, batch)
        merged.save_pretrained(folder)
        if is_26:
            AutoProcessor.from_pretrained(out, trust_remote_code=True).save_pretrained(folder)
        result["merged again"] = logits(load(folder), batch)
torch.save(results, sys.argv[2])
"""
RELOADED = [
    *("sft: 4-bit", "sft: 4-bit, DoRA", "sft: float, projector", "sft: float, DoRA", "sft: full"),
    *("docvqa: 4-bit", "docvqa: float, DoRA", "dpo: 4-bit", "dpo: float, DoRA"),
    *("4.6: vision", "4.6: words", "4.6: 4-bit", "4.6: full", "4.7: lora", "4.7: full"),
    *("2.6: vision", "2.6: words", "2.6: biases", "2.6: 4-bit", "2.6: projector"),
    *("align", "align: vision", "instruct: full, vision", "instruct: lora, vision", "instruct: lora, joined"),
    "instruct: 4-bit, vision",
    *(f"{variant}, learnt" for variant in LEARNT),
]


def answer_length(name):
    return 32 if "learnt" in name else 4


@pytest.fixture(scope="module")
def reloaded(runs, learnt, tmp_path_factory):
    """{name: (run, its prompts, what one new process gets out of the saved folder)}."""
    folder, done, work = tmp_path_factory.mktemp("reloaded"), {}, {}
    for name in RELOADED:
        variant = name.removesuffix(", learnt")
        done[name] = made = runs.trained(variant) if variant == name else learnt(variant)
        rows, messages, batch = list(made.trainer.eval_dataset), None, None
        if made.recipe == "finetune_minicpm_lora":  # its processors need the recipe's help, or code of their own
            batch = made.inputs(rows)
        else:
            collator, module = made.trainer.data_collator, runs.module(variant)
            messages = [collator.messages_of(row) for row in rows]
            messages = [turns[: module.last_answer(turns)] for turns in messages]
        work[name] = str(made.out), messages, batch and copy_of(batch), made.recipe, made.argv, answer_length(name)
    torch.save(work, folder / "work.pt")
    fresh(RELOAD, folder / "work.pt", folder / "results.pt")
    results = torch.load(folder / "results.pt", weights_only=False)
    return {name: (done[name], work[name][1:3], results[name]) for name in RELOADED}


@pytest.mark.slow
@pytest.mark.parametrize("name", RELOADED)
def test_the_result_stands_alone(runs, reloaded, name):
    """A new process, without the recipe but for 4-bit weights and 2.6, gets from it what the run's own model says."""
    done, (messages, batch), result = reloaded[name]
    model, collator = done.trainer.model, done.trainer.data_collator
    if messages:
        batch = dict(collator.tokenize(messages, prompt=True))
        assert same(batch, result["batch"])
        told = [cell(says(model, collator, turns, answer_length(name))) for turns in messages]
        assert [cell(text) for text in result["said"]] == told
        assert "learnt" not in name or told == answers(done, 60)
    words = batch["attention_mask"].bool()
    here = logits(model, copy_of(batch))
    torch.testing.assert_close(result["reloaded"][words], here, atol=1e-6, rtol=1e-6)
    untouched = runs.load(name.removesuffix(", learnt"), done.argv)
    assert (logits(untouched, copy_of(batch)) - here).abs().max() > 0.01
    assert ("merged" in result) == bool(VARIANTS[name.removesuffix(", learnt")].adapted)
    for merged in {"merged", "merged again"} & {*result}:
        torch.testing.assert_close(result[merged][words], result["float"][words], atol=1e-4, rtol=1e-4)
