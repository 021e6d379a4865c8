"""tools/generate.py: the answers are the model's own, of every recipe, in batches or one by one, with and without the
adapter; a file that was cut off is resumed; what cannot be asked gets a message."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
import yaml
from conftest import ROOT
from peft import PeftModel
from recipes import FOLDERS, Recipe, chat, load_data, said
from transformers import AutoModelForImageTextToText, AutoProcessor

import sft_llava
from evals import amber
from tiny import forms
from tools import generate, runs

SHORT = {"max_steps": 2, "learning_rate": 3e-3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
SHORT |= {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": False}
SHORT |= {"eval_fraction": 0.1, "max_eval_rows": 6, "sample_rows": 2}
FLOAT = {"load_in_4bit": False}
RUNS = {  # recipe, settings; the learning rates are such that not all answers are empty by then
    "sft_llava": ("sft_llava", {**FLOAT, "sample_tokens": 6, "learning_rate": 1e-3}),
    "idefics2_docvqa": ("idefics2_docvqa", {**FLOAT, "max_new_tokens": 6, "instruction": "Answer in one word."}),
    "dpo_idefics2": ("dpo_idefics2", {**FLOAT, "max_new_tokens": 6}),
    "finetune_minicpm_lora": ("finetune_minicpm_lora", {"sample_tokens": 6}),
    "llava_two_stage": ("llava_two_stage", {"sample_tokens": 6, "learning_rate": 1e-4}),  # a whole model
    "joined": ("llava_two_stage", {**FLOAT, "sample_tokens": 6, "lora_r": 4, "pretrain_mm_mlp_adapter": "align"}),
}


class Run(Recipe):
    """What a short run of a recipe left."""

    @property
    def out(self):
        return self.tmp_path / "out"

    @property
    def test_data(self):
        """Flags that name every third of the test rows: of each kind some."""
        rows = json.loads((self.folder / "json/test.json").read_text())[::3]
        path = self.tmp_path / "test.json"
        path.write_text(json.dumps(rows))
        return ["--dataset_name", path, "--image_folder", self.folder / "json/images"]

    def answer_by_hand(self, base_only, conversations):
        """What Transformers and PEFT alone make of the run answers, one conversation at a time."""
        base = yaml.safe_load((self.out / "settings.yaml").read_text())["model_name_or_path"] or self.out / "base"
        is_adapter = (self.out / "adapter_config.json").exists()
        name = base if base_only or is_adapter else self.out
        model = AutoModelForImageTextToText.from_pretrained(name)
        if is_adapter and not base_only:
            model = PeftModel.from_pretrained(model, self.out)
        decode, answers = self.reader.processor.tokenizer.decode, []
        for messages in conversations:
            batch = self.reader.tokenize([messages], prompt=True)
            options = {"max_new_tokens": 6, "max_length": None, "do_sample": False}
            ids = model.generate(**batch, **options, eos_token_id=self.reader.stop_ids)
            answers.append(decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        return answers

    @functools.cached_property
    def reader(self):
        """A Collator as the run had it."""
        settings, training = self.module.parse(["--config", str(self.out / "settings.yaml")])
        settings.model_name_or_path = str(self.out)
        return self.module.Collator(self.module.load_processor(settings), settings, training)


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """A function: a name in RUNS -> its Run."""

    def make(name):
        recipe, settings = RUNS[name]
        folder = request.getfixturevalue(FOLDERS[recipe])
        if name == "joined":
            settings = {**settings, "model_name_or_path": None, "pretrain_mm_mlp_adapter": folder / "align"}
        run = Run(recipe, folder, tmp_path_factory.mktemp(name))
        run.run(**{**SHORT, **settings})
        return run

    return functools.cache(make)


@pytest.fixture(params=RUNS)
def run(request, trained):
    return trained(request.param)


@pytest.fixture
def llava(trained):
    return trained("sft_llava")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(*argv):
    generate.main([str(part) for part in argv])


@pytest.fixture
def ask(tmp_path):
    """A function: arguments -> the lines that generate.py writes for them."""

    def make(*argv, name="out.jsonl"):
        start(*argv, "--max_new_tokens", 6, "--output", tmp_path / name, "--overwrite")
        return lines(tmp_path / name)

    return make


@pytest.fixture
def calls(monkeypatch):
    """What the model was given to answer, and what it answered: (arguments, its new tokens) of each call."""
    seen = []

    def spy(self, *args, stock=transformers.GenerationMixin.generate, **kwargs):
        out = stock(self, *args, **kwargs)
        seen.append((kwargs, out[:, kwargs["input_ids"].shape[1] :]))
        return out

    monkeypatch.setattr(transformers.GenerationMixin, "generate", spy)
    return seen


@pytest.fixture
def without_weights(monkeypatch):
    """Loading weights is an error."""
    monkeypatch.setattr(runs, "load_model", None)
    monkeypatch.setattr(generate, "load_model", None)


def predictions(answers):
    return [line["prediction"] for line in answers]


# ------------------------------------------------------------------------------------------------------- every recipe


def turns_of(case, row):
    """A row of the test data -> (question, reference) of each turn."""
    if case.name == "idefics2_docvqa":
        return [(row["question"], row["answers"])]
    if case.name == "dpo_idefics2":
        return [(row["question"], row["chosen"])]
    texts = [re.sub(r"<image(_\d+)?>", " ", turn.get("value", turn.get("content"))) for turn in row["conversations"]]
    texts = [" ".join(text.split()) for text in texts]
    return list(zip(texts[::2], texts[1::2]))


def test_answers_are_those_of_the_model(run, ask):
    """Of each turn, after the right answers to those before it; in any batches; with --base_only of the untouched
    base."""
    after, before = ask(run.out, *run.test_data), ask(run.out, *run.test_data, "--base_only")
    rows = json.loads(run.test_data[1].read_text())
    expected = [
        (n, row["id"], turn, question, reference)
        for n, row in enumerate(rows)
        for turn, (question, reference) in enumerate(turns_of(run, row))
    ]
    for answers in (after, before):
        found = [(x["row"], x["id"], x["turn"], " ".join(x["question"].split()), x["reference"]) for x in answers]
        assert found == expected
    assert predictions(after) != predictions(before) and any(predictions(after))
    conversations = []
    for line in after:
        messages = run.reader.messages_of(rows[line["row"]] | {"folder": str(run.folder / "json/images")})
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        conversations.append(messages[: answers[line["turn"]]])
        pictures = [part for message in conversations[-1] for part in message["content"] if part["type"] == "image"]
        assert line["images"] == len(pictures)
    assert predictions(after) == run.answer_by_hand(False, conversations)
    assert predictions(before) == run.answer_by_hand(True, conversations)
    assert ask(run.out, *run.test_data, "--batch_size", 1) == after


def test_without_a_data_set_the_rows_that_the_run_held_out(run, ask):
    """What the run's samples.md shows of them is what generate.py answers; so does a checkpoint, which has no settings
    of its own: recipe, instruction and data are those of the run around it."""
    answers = ask(run.out)
    settings, training = run.module.parse(["--config", str(run.out / "settings.yaml")])
    held_out = load_data(run.module, settings, training)[1]
    assert list(dict.fromkeys(line["row"] for line in answers)) == list(held_out["row"])
    last = {line["row"]: line["prediction"] for line in answers}  # a row's last turn is the one that is shown
    shown = (run.out / "samples.md").read_text().split("## Step 2")[1]
    table = [line.split("|") for line in shown.splitlines() if line.startswith("| !") or line.startswith("|  |")]
    for row, cells in zip(held_out["row"][:2], table, strict=True):
        prediction = " ".join(last[row].replace("|", "&#124;").split())
        assert prediction in [cell.strip() for cell in cells[2:-1]]
    assert not (run.out / "checkpoint-2/settings.yaml").exists()
    assert ask(run.out / "checkpoint-2") == answers


@pytest.mark.parametrize("choice", [True, False])
def test_minicpm_thinks_before_its_answer_if_asked_to(trained, ask, calls, choice):
    """It is told so with each prompt, whatever the saved template says."""
    run = trained("finetune_minicpm_lora")
    ask(run.out, "--question", "Which digit?", "--enable_thinking", str(choice).lower())
    prompt = run.reader.processor.tokenizer.decode(calls[-1][0]["input_ids"][0])
    assert prompt.endswith("<think>\n" if choice else "<think>\n\n</think>\n\n")


def test_one_question_is_asked_as_the_rows_are(run, ask, calls, capsys):
    """After a system message, too; it ends at the recipe's stop tokens. Without --output its answer is printed."""
    answers = ask(run.out, *run.test_data, "--batch_size", 1)
    number = next(n for n, line in enumerate(answers) if line["turn"] == 0 and line["images"] == 1)
    row = json.loads(run.test_data[1].read_text())[answers[number]["row"]]
    question = ["--question", answers[number]["question"], "--image", run.folder / "json/images" / row["image"]]
    prompt = calls[number][0]["input_ids"]
    calls.clear()
    (line,) = ask(run.out, *question)
    assert torch.equal(calls[0][0]["input_ids"], prompt) and calls[0][0]["eos_token_id"] == run.reader.stop_ids
    assert line == {**answers[number], "row": None, "id": None, "reference": None}
    capsys.readouterr()
    start(run.out, *question, "--max_new_tokens", 6)
    assert capsys.readouterr().out.removesuffix("\n").endswith(line["prediction"])
    calls.clear()
    if run.name in ("sft_llava", "finetune_minicpm_lora"):
        ask(run.out, *question, *question[2:], "--system", "Answer briefly.")
        text = run.reader.processor.tokenizer.decode(calls[0][0]["input_ids"][0])
        assert text.index("Answer briefly.") < text.index(line["question"])
        image_token = run.reader.processor.image_token_id
        assert (calls[0][0]["input_ids"] == image_token).sum() == 2 * (prompt == image_token).sum()


def test_a_run_that_was_moved_and_one_without_its_settings(run, ask, tmp_path):
    """They answer as before, and nothing is written where the run was."""
    answers = ask(run.out, *run.test_data)
    text = (run.out / "settings.yaml").read_text()
    moved, bare = tmp_path / "moved", tmp_path / "bare"
    shutil.copytree(run.out, moved, ignore=shutil.ignore_patterns("checkpoint-*"))
    notes = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    settings = yaml.safe_load(text) | {"output_dir": str(tmp_path / "was")}
    (moved / "settings.yaml").write_text(notes + yaml.safe_dump(settings))
    assert ask(moved, *run.test_data) == answers and not (tmp_path / "was").exists()
    shutil.copytree(moved, bare, ignore=shutil.ignore_patterns("settings.yaml"))
    own = ["--recipe", ROOT / f"{run.name}.py", "--use_cpu"]
    if run.name == "llava_two_stage":
        own += ["--stage", "instruct", "--lora_r", settings["lora_r"]]
    if run.name == "idefics2_docvqa":
        own += ["--instruction", settings["instruction"]]
    if "load_in_4bit" in settings:
        own += ["--load_in_4bit", "false"]
    assert ask(bare, *run.test_data, *own) == answers


# ----------------------------------------------------------------------------------------------------------- questions


def test_a_text_after_every_question(llava, ask, calls, write, images):
    """Of all turns, with the space between; after the words where a picture comes last, and of a picture alone. Last
    turns without an answer are asked, too."""
    images(1)
    words, picture = {"type": "text", "text": "Is it odd?"}, {"type": "image", "index": 0}
    rows = [chat(("user", "Why?"))]
    rows += [chat(("user", parts), images=["red.png"]) for parts in ([words, picture], [picture])]
    own = ["--append", "Yes or no?", "--batch_size", 1]
    decode = llava.reader.processor.tokenizer.decode
    answers = ask(llava.out, "--dataset_name", write(rows), *own)
    assert [line["question"] for line in answers] == ["Why? Yes or no?", "Is it odd? Yes or no?", "Yes or no?"]
    prompts = [decode(asked["input_ids"][0]).split("USER:")[1].replace("<image>", "") for asked, _ in calls]
    assert [" ".join(text.split()) for text in prompts] == [f"{line['question']} ASSISTANT:" for line in answers]
    calls.clear()
    rows = write([said("Is three odd?", "yes", "Is it six?")], "turns.json")
    answers = ask(llava.out, "--dataset_name", rows, *own)
    found = [(line["question"], line["reference"]) for line in answers]
    assert found == [("Is three odd? Yes or no?", "yes"), ("Is it six? Yes or no?", None)]
    prompt = decode(calls[1][0]["input_ids"][0])
    assert prompt.count("Yes or no?") == 2 and "yes Yes" not in prompt
    assert predictions(ask(llava.out, "--question", "Is three odd?", *own)) == predictions(answers[:1])


def test_the_questions_of_amber(trained, tmp_path, ask, write):
    """Rows of {"id", "image", "query"}, asked for yes or no, on to evals/amber.py: ids stay whole numbers."""
    run = trained("dpo_idefics2")
    rows = json.loads((run.folder / "json/test.json").read_text())[:3]
    asked = [{"id": 1005 + n, "image": row["image"], "query": row["question"]} for n, row in enumerate(rows)]
    queries = write(asked, "query_discriminative.json")
    data = ["--dataset_name", queries, "--image_folder", run.folder / "json/images", "--question_column", "query"]
    answers = ask(run.out, *data, "--append", "Please answer yes or no.", name="after.jsonl")
    found = [(line["id"], line["row"], line["question"], line["reference"]) for line in answers]
    questions = [f"{row['question']} Please answer yes or no." for row in rows]
    assert found == [(1005 + n, n, question, None) for n, question in enumerate(questions)]
    truth = [{"id": row["id"], "type": "relation", "truth": "no"} for row in asked]
    annotations = write(truth, "annotations.json")
    amber.main([str(tmp_path / "after.jsonl"), "--annotations", str(annotations), "--questions", str(queries)])


def test_how_pages_are_shown_is_kept_where_they_lie_is_not(tiny_forms, tmp_path, ask, calls, write):
    """For another data set: image splitting, size, language and instruction are the run's, columns and folder are
    not."""
    rows = json.loads((tiny_forms / "json/train.json").read_text())[:4]
    (tmp_path / "pages").mkdir()
    for row in rows:
        shutil.copy(tiny_forms / "json/images" / row["image"], tmp_path / "pages")
    own = [{"picture": row["image"], "asks": {"fr": row["question"]}, "says": row["answers"]} for row in rows]
    settings = {"dataset_name": write(own), "image_folder": tmp_path / "pages", "image_column": "picture"}
    settings |= {"question_column": "asks", "answers_column": "says", "language": "fr", "instruction": "Say it."}
    settings |= {"image_splitting": True, "longest_edge": 84, "max_steps": 1, "eval_fraction": 0.25}
    Recipe("idefics2_docvqa", tiny_forms, tmp_path).run(**settings, max_new_tokens=2, sample_rows=0)
    out = tmp_path / "out"
    assert len(ask(out)) == 1  # its own row, by its own columns
    data = ["--dataset_name", tiny_forms / "data", "--dataset_train_split", "test"]
    rows = forms.make_rows(0, train=False, n=24)
    calls.clear()
    answers = ask(out, *data)
    assert [line["question"] for line in answers] == [forms.ask(row["asked"], row["phrasing"])["fr"] for row in rows]
    assert [line["reference"] for line in answers] == [forms.answers(row) for row in rows]
    pixels = calls[0][0]["pixel_values"]
    assert pixels.shape[1] == 5 and max(pixels.shape[3:]) == 84
    assert "User: Say it.<fake" in AutoProcessor.from_pretrained(out).decode(calls[0][0]["input_ids"][0])


def test_sampling_differs_from_greedy(llava, ask):
    assert predictions(ask(llava.out, "--temperature", 5)) != predictions(ask(llava.out))


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.fixture
def whole(llava, tmp_path, ask):
    """(flags, the bytes of the file that they write, in lines): more answers than rows, four at a time."""
    data = ["--dataset_name", llava.folder / "json/test.json", "--image_folder", llava.folder / "json/images"]
    flags = [llava.out, *data, "--batch_size", 4]
    ask(*flags, name="whole.jsonl")
    return flags, (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)


def resume(flags, out):
    start("--max_new_tokens", 6, *flags, "--output", out, "--resume")


def begin(flags, out, text):
    """A file that was begun with these flags, and has come so far."""
    args, rest = generate.parse([*map(str, flags), "--max_new_tokens", "6", "--output", str(out), "--resume"])
    generate.record(out).write_text(json.dumps(generate.conditions(args, rest)))
    out.write_bytes(text)


@pytest.mark.parametrize(("kept", "cut"), [(None, 0), (0, 0), (1, 30), (4, 0), (10, 1), (-2, 5), (-1, 0)])
def test_a_file_half_written_is_resumed(whole, tmp_path, calls, kept, cut):
    """After whole lines, and a part of one; the batches are the same, so are the answers. None: there is no file yet,
    -1: all is there."""
    flags, text = whole
    out = tmp_path / "half.jsonl"
    if kept is not None:
        kept = kept if kept >= 0 else len(text) + 1 + kept
        begin(flags, out, b"".join(text[:kept]) + (text[kept][:cut] if cut else b""))
    calls.clear()
    resume(flags, out)
    assert out.read_bytes() == b"".join(text) and generate.record(out).exists()
    left = 0 if kept == len(text) else len(text) - (kept or 0) // 4 * 4
    assert len(calls) == -(-left // 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--base_only"], "base_only False -> True"),
        (["--max_new_tokens", "7"], "max_new_tokens 6 -> 7"),
        (["--batch_size", "3"], "batch_size 4 -> 3"),
        (["--append", "Be brief."], "line 1 is no answer to the question that would be asked there"),
        (["--load_in_4bit", "false"], r"flags \[.*'--load_in_4bit', 'false'\]"),
        ("other run", "run /.*/run -> /.*/other"),
        ("other weights", r"written [\d.]+ -> [\d.]+"),
        ("unknown", "nobody knows how it was begun .half.jsonl.flags beside it is missing"),
    ],
)
def test_a_file_is_not_resumed_by_another_model_or_otherwise(whole, tmp_path, without_weights, change, message):
    ((_, *flags), text), out = whole, tmp_path / "half.jsonl"
    run = copy(whole[0][0], tmp_path / "run")
    begin([run, *flags], out, b"".join(text[:6]))
    if change == "other run":
        run = run.rename(tmp_path / "other")
    elif change == "other weights":
        os.utime(run / "adapter_model.safetensors", (1, 1))
    elif change == "unknown":
        generate.record(out).unlink()
    else:
        flags += change
    with pytest.raises(SystemExit, match=f"^error: --resume .*half.jsonl: .*{message}"):
        resume([run, *flags], out)
    assert out.read_bytes() == b"".join(text[:6])


def test_a_file_of_other_questions_is_not_resumed(whole, tmp_path, without_weights):
    """Nor one that holds something else."""
    flags, text = whole
    other = json.dumps(json.loads(text[1]) | {"question": "What is it?"}).encode() + b"\n"
    beginnings = {2: [text[0], other], len(text) + 1: [*text, text[0]], 1: [b"no json\n", *text]}
    for line, beginning in beginnings.items():
        begin(flags, tmp_path / "other.jsonl", b"".join(beginning))
        with pytest.raises(SystemExit, match=f"^error: --resume .*other.jsonl: line {line} is no answer"):
            resume(flags, tmp_path / "other.jsonl")
        assert (tmp_path / "other.jsonl").read_bytes() == b"".join(beginning)


def test_what_was_killed_or_found_a_full_disk_is_resumed(whole, tmp_path, monkeypatch):
    """By the same command again, as a script does."""
    flags, text = whole
    out, answer, dumps = tmp_path / "out.jsonl", generate.answer, json.dumps

    def killed(*args):
        if len(lines(out)) == 8:
            raise KeyboardInterrupt
        return answer(*args)

    def full(*args, **kwargs):
        if "ensure_ascii" in kwargs and len(lines(out)) == 13:
            raise OSError(28, "No space left on device")
        return dumps(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate, "answer", killed)
        resume(flags, out)
    assert len(lines(out)) == 8
    message = "out.jsonl cannot be written, after 13 answers: No space left on device; .*--resume"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=message):
        patch.setattr(generate.json, "dumps", full)
        resume(flags, out)
    resume(flags, out)
    assert out.read_bytes() == b"".join(text)
    with pytest.raises(SystemExit, match="out.jsonl: it was begun otherwise"):
        resume([*flags, "--base_only"], out)  # finished, these are still not that model's answers


# ----------------------------------------------------------------------------------------------- bad rows and mistakes


def test_bad_rows_stop_it_before_weights_load(llava, tmp_path, write, without_weights):
    bad, long, out = said("a", ""), "odd " * 1200, tmp_path / "none.jsonl"
    for rows, more, message in (
        ([said("a", "b"), bad], [], "row 1: empty answer"),
        ([bad], ["--on_bad_rows", "skip"], "No row would be left"),
        ([said(long, "odd", "And?", "even")], [], r"row 0: too long: \d+ tokens .*reads 1024 with its answer"),
    ):
        with pytest.raises(SystemExit, match=f"^error: (?s:.*){message}"):
            start(llava.out, "--dataset_name", write(rows), "--output", out, *more)
        assert not out.exists()
    with pytest.raises(SystemExit, match=r"^error: the question is too long: \d+ tokens"):
        start(llava.out, "--question", "odd?", "--append", long)


def test_bad_rows_are_skipped_and_listed(llava, ask, write, capsys):
    rows = write([said("a", "b"), said("odd " * 1200, "b"), said("c", "d"), *[said("a", "")] * 20])
    answers = ask(llava.out, "--dataset_name", rows, "--on_bad_rows", "skip")
    assert [(line["row"], line["reference"]) for line in answers] == [(0, "b"), (2, "d")]
    printed = capsys.readouterr().err
    assert "left out: 21 of 23 rows" in printed and "row 1: too long: " in printed
    assert printed.count("empty answer") == 19 and "... and 1 more" in printed


def test_a_recipe_is_loaded_once(llava, tmp_path):
    """What is sent to other processes must be the functions of the module that has the name."""
    first = runs.load_recipe(ROOT / "sft_llava.py", llava.out)
    assert runs.load_recipe(None, llava.out) is first is sys.modules["recipe_sft_llava"]
    shutil.copy(ROOT / "sft_llava.py", tmp_path)
    other = runs.load_recipe(tmp_path / "sft_llava.py", llava.out)
    assert other is not first and other.__file__ == str(tmp_path / "sft_llava.py")
    (tmp_path / "ends.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(SystemExit, match="^error: .*ends.py cannot be imported as a recipe: "):
        runs.load_recipe(tmp_path / "ends.py", llava.out)


def copy(out, to):
    return shutil.copytree(out, to, ignore=shutil.ignore_patterns("checkpoint-*"))


def test_the_recipe_can_be_named(trained, llava, tmp_path, ask, images, capsys):
    """One that the run names and that is none of this repository; one that the user names comes first; settings.yaml
    that names none is of sft_llava.py, which is said."""
    images(1)
    forms_run, question = trained("idefics2_docvqa"), ["--question", "Which?", "--image", tmp_path / "red.png"]
    out = copy(forms_run.out, tmp_path / "renamed")
    text = (out / "settings.yaml").read_text()
    (out / "settings.yaml").write_text(text.replace("# idefics2_docvqa.py", "# mine.py", 1))
    with pytest.raises(SystemExit, match="^error: .*says that 'mine.py' trained it, which is none of .*--recipe PATH"):
        ask(out, *question)
    shutil.copy(ROOT / "idefics2_docvqa.py", tmp_path / "mine.py")
    assert ask(out, "--recipe", tmp_path / "mine.py", *question) == ask(forms_run.out, *question)
    with pytest.raises(SystemExit, match="^error: .*is of sft_llava.py, and .*idefics2_docvqa.py does not take its"):
        ask(llava.out, "--recipe", ROOT / "idefics2_docvqa.py", *question)
    old = copy(llava.out, tmp_path / "old")
    (old / "settings.yaml").write_text((old / "settings.yaml").read_text().removeprefix("# sft_llava.py\n"))
    assert ask(old, *question) == ask(llava.out, *question)
    assert "taken for sft_llava.py's, or else give --recipe" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_may_have_held_out_other_rows(llava, tmp_path, ask):
    old = copy(llava.out, tmp_path / "old")
    text = (old / "settings.yaml").read_text()
    (old / "settings.yaml").write_text(re.sub(f"{sft_llava.ROWS_NOTE}.*\n", "", text))
    with pytest.raises(SystemExit, match="^error: .* is of an earlier version of sft_llava.py, .*name the rows"):
        ask(old)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere", "--question", "x", "--use_cpu"], "nowhere: there is no such folder, and as a model of the hub: "),
        (["RUN", "--image", "x.png"], "--image needs a --question"),
        (["RUN", "--output", "TAKEN"], "--overwrite it, or --resume it"),
        (["RUN", "--resume"], "an --output"),
        (["RUN", "--datset_name", "x"], "--datset_name"),
        (["RUN", "--dataset-name", "AMBER", "--question", "x"], "--question and a data set: one of them"),
        (["RUN", "--question", " "], "--question is blank"),
        (["RUN", "--question", "<image> x"], "<image> in --question"),
        (["RUN", "--append", "now </s>"], "</s> in --append"),
        (["RUN", "--question", "x", "--batch_size", "0"], "--batch_size"),
        (["RUN", "--question", "x", "--output", "nowhere/x.jsonl"], "no such folder"),
        (["RUN", "--question", "x", "--output", "FOLDER", "--overwrite"], "is a folder: needed is the .jsonl"),
        (["RUN", "--question", "x", "--model_name_or_path", "nowhere"], "--model_name_or_path nowhere: "),
        (["RUN", "--question", "x", "--model-name-or-path", "RUN"], "is an adapter itself; needed is the model"),
        (["RUN", "--question", "x", "--model_name_or_path", "FORMS"], "that is a idefics2, and the run has a Llava"),
        (["PAGES", "--dataset-name", "AMBER", "--question-column", "asks"], "asks"),
    ],
)
def test_mistakes_get_one_message(trained, llava, tiny_forms, tmp_path, images, write, argv, message):
    images(1)
    names = {"RUN": llava.out, "PAGES": trained("idefics2_docvqa").out}
    names["FORMS"] = tiny_forms / "model"
    names |= {"FOLDER": tmp_path / "FOLDER", "TAKEN": tmp_path / "TAKEN"}
    names["AMBER"] = write([{"id": 1005, "image": "AMBER_1.jpg", "query": "Is the sky sunny?"}], "amber.json")
    names["FOLDER"].mkdir()
    names["TAKEN"].touch()
    with pytest.raises(SystemExit) as stopped:
        start(*(names.get(word, word) for word in argv))
    assert stopped.value.code.startswith("error: ") and message in stopped.value.code


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("adapter_model.safetensors", None, "holds an adapter without its weights"),
        ("adapter_model.safetensors", 200, "adapter_model.safetensors is damaged, or cannot be read"),
        ("adapter_config.json", 40, r"its adapter_config.json is damaged \(JSONDecodeError"),
        ("processor_config.json", None, r"holds no processor \(processor_config.json\)"),
        ("settings.yaml", b"\xff\xfe# sft", "settings.yaml cannot be read: "),
        ("adapter_config.json", None, r"holds no adapter .* and no model \(config.json\); needed is"),
        ("adapter_config.json", "checkpoint-2", "but checkpoints: the same training command finishes it"),
        ("adapter_config.json", ("q_proj|", ""), r"does not fit .*: \d+ weights are of the adapter only"),
    ],
)
def test_what_is_no_whole_run_is_said(llava, tmp_path, file, change, message):
    """The last one: PEFT would warn of weights that it has no place for, and answer with the rest."""
    path = copy(llava.out, tmp_path / "run") / file
    match change:
        case None:
            path.unlink()
        case int():
            path.write_bytes(path.read_bytes()[:change])
        case bytes():
            path.write_bytes(change)
        case str():
            path.rename(path.with_name(change))
        case tuple():
            path.write_text(path.read_text().replace(*change))
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        start(tmp_path / "run", "--question", "Is three odd?")


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "BrokenPipeError"])
def test_a_program_ends_without_a_traceback(error):
    code = f"from tools.program import start\ndef main(): raise {error}\nstart(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr == ("interrupted\n" if error == "KeyboardInterrupt" else "")


def test_as_a_program(llava, ask):
    question = ["--question", "Is three even or odd?", "--max_new_tokens", "6"]
    command = [sys.executable, ROOT / "tools/generate.py", llava.out, *question]
    done = subprocess.run(command, capture_output=True, text=True, cwd=llava.tmp_path)
    assert done.returncode == 0 and done.stdout.strip() == ask(llava.out, *question)[0]["prediction"], done.stderr
