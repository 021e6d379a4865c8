"""What only dpo_idefics2.py has: two answers to one prompt, PaliGemma's prompt without a template, the size of
Idefics2's images, and the same run with models of other families."""

import json
import math
import shutil
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from conftest import log, prefers
from families import marked
from PIL import Image
from recipes import Recipe, same
from runs import run
from transformers import AutoConfig, AutoProcessor

import dpo_idefics2
from tiny import families, idefics2, preferences
from tools import generate

END = "<end_of_utterance>"
ROWS = [  # of different lengths; images of different sizes
    prefers("Which digit is this?", "It is a seven.", "It is a two, written by hand."),
    prefers("Is the digit even or odd?", "It is an odd number.", "even", image="lime.png"),
    prefers("What can you see in the image?", "Überweisung 漢字 😀\nनमस्ते", "x", image="blue.png"),
    prefers("What?", "a", "an even digit, written in black ink on white paper by hand"),
]


@pytest.fixture
def dpo(tiny_pairs, images, tmp_path):
    """The recipe, with red.png, lime.png and blue.png, each of another shape."""
    images(3)
    images(2, (70, 112))
    images(1, (112, 56))
    return Recipe("dpo_idefics2", tiny_pairs, tmp_path)


def learnt(batch, tokenizer):
    """What is learnt of each sequence, as text: one piece, at its end."""
    assert set(batch["completion_mask"].unique().tolist()) == {0, 1}
    texts = []
    for ids, answer, real in zip(batch["input_ids"], batch["completion_mask"].bool(), batch["attention_mask"].bool()):
        start = int(answer.int().argmax())
        assert torch.equal(answer[start:], real[start:])
        head = tokenizer.decode(ids[:start])
        texts.append(tokenizer.decode(ids[real]).removeprefix(head))
    return texts


def prompt_of(batch, n=0):
    """The tokens of a sequence before the first that is learnt."""
    return batch["input_ids"][n][: batch["completion_mask"][n].argmax()].tolist()


# -------------------------------------------------------------------------------------------------- prompt and answers
@pytest.mark.parametrize("folder", ["tiny_pairs", "tiny_llava", "tiny_next", "tiny_paligemma"])
def test_a_batch_has_the_chosen_answers_then_the_rejected_ones(folder, dpo, request):
    """To the same prompts and images, in the same order."""
    collator = dpo.collator(model_name_or_path=request.getfixturevalue(folder) / "model")
    batch, count = collator(ROWS), len(ROWS)
    answers = [row[which] for which in ("chosen", "rejected") for row in ROWS]
    texts = learnt(batch, collator.processor.tokenizer)
    assert all(answer in text for answer, text in zip(answers, texts, strict=True))
    images = [key for key in batch if batch[key].shape != batch["input_ids"].shape]
    assert "pixel_values" in images and "labels" not in batch
    assert all(torch.equal(*batch[key].chunk(2)) for key in images)
    assert all(prompt_of(batch, n) == prompt_of(batch, n + count) for n in range(count))
    assert len({tuple(prompt_of(batch, n)) for n in range(count)}) == count


def test_paligemma_has_no_template(dpo, tiny_paligemma, tmp_path):
    """Its prompt is its processor's own: image tokens, BOS, question, newline. The model sees it as a whole."""
    collator = dpo.collator(model_name_or_path=tiny_paligemma / "model")
    batch, tokenizer = collator(ROWS), collator.processor.tokenizer
    assert torch.equal(batch["token_type_ids"] == 1, batch["completion_mask"] == 1)
    assert tokenizer.decode(prompt_of(batch, 1)) == f"{'<image>' * 16}<bos>{ROWS[1]['question']}\n"
    assert learnt(batch, tokenizer) == [f"{row[which]}<eos>" for which in ("chosen", "rejected") for row in ROWS]
    assert collator.stop_ids == [tokenizer.eos_token_id]

    collator.processor.save_pretrained(tmp_path / "saved")
    saved = AutoProcessor.from_pretrained(tmp_path / "saved")
    for n, row in enumerate(ROWS):
        picture = Image.open(tmp_path / row["image"])
        asked = saved(text="<image>" + row["question"], images=picture, return_tensors="pt")
        del asked["labels"]
        alone, prompt = collator([row]), collator.tokenize([collator.messages_of(row)[:1]], prompt=True)
        assert same(prompt, asked) and [prompt_of(alone)] == asked["input_ids"].tolist()
        for half in (0, 1):  # a pair is the same alone as in company
            real = batch["attention_mask"][n + half * len(ROWS)].bool()
            for key in ("input_ids", "completion_mask", "token_type_ids"):
                in_company = batch[key][n + half * len(ROWS)][real]
                assert torch.equal(alone[key][half][alone["attention_mask"][half].bool()], in_company)
            assert torch.equal(alone["pixel_values"][half], asked["pixel_values"][0])


def test_what_a_template_puts_behind_the_first_end_is_not_learnt(dpo, tmp_path):
    processor = preferences.processor()
    processor.chat_template = idefics2.CHAT_TEMPLATE.replace(END, f"{END}</s>")
    processor.save_pretrained(tmp_path / "model")
    shutil.copy(dpo.folder / "model" / "config.json", tmp_path / "model")
    collator = dpo.collator(model_name_or_path=tmp_path / "model")
    answers = [row[which] for which in ("chosen", "rejected") for row in ROWS]
    assert learnt(collator(ROWS), collator.processor.tokenizer) == [f" {answer}{END}" for answer in answers]


def test_an_answer_may_be_in_the_question_and_in_the_other_answer(dpo):
    collator = dpo.collator()
    for chosen, rejected in (("odd", "odd, odd"), ("Assistant: odd", "User"), ("Is it odd?", "utterance")):
        texts = learnt(collator([prefers("Is it odd?", chosen, rejected)]), collator.processor.tokenizer)
        assert texts == [f" {chosen}{END}", f" {rejected}{END}"]


def test_an_eos_that_is_not_special_ends_answers(dpo, tiny_llava):
    """Of a tokenizer whose files do not mark it so."""
    collator = dpo.collator(model_name_or_path=tiny_llava / "model")
    marked = {str(token): token.special for token in collator.processor.tokenizer.added_tokens_decoder.values()}
    unmarked = [SimpleNamespace(content=text, special=special) for text, special in {**marked, "</s>": False}.items()]
    tokenizer = SimpleNamespace(added_tokens_decoder=dict(enumerate(unmarked)), eos_token="</s>", eos_token_id=2)
    tokenizer.convert_tokens_to_ids = list
    tokenizer.convert_ids_to_tokens = lambda ids: ["</s>" for _ in ids]
    names = {"model_name_or_path": "nowhere", "model_revision": None, "image_folder": None, "ignore_columns": None}
    settings = SimpleNamespace(**names, max_length=None)
    processor = SimpleNamespace(tokenizer=tokenizer, image_token="<image>", chat_template=None)
    made = dpo_idefics2.Collator(processor, settings, settings)
    assert made.stops == {"</s>"} and made.control_tokens == collator.control_tokens


def test_pairs_without_an_image_are_trained_on_and_counted(dpo, tiny_paligemma, write):
    rows = [
        prefers("Is the digit odd?", "yes", "no"),
        *(prefers("What is odd?", "one", "two", image=cell) for cell in NO_IMAGE),
    ]
    settings = {"dataset_name": write(rows), "eval_fraction": 0, "image_folder": dpo.tmp_path, "max_steps": 1}
    printed = dpo.run(**settings, logging_steps=1, per_device_train_batch_size=6, gradient_accumulation_steps=1)
    assert f"rows.json: {len(NO_IMAGE)} rows with no image\n" in printed
    assert log(dpo.tmp_path / "out")[1] == pytest.approx(math.log(2), abs=1e-6)
    other = {"model_name_or_path": tiny_paligemma / "model", "output_dir": dpo.tmp_path / "other"}
    message = dpo.refusal(dpo.flags(**settings, **other))
    assert "row 1: not one image: 0 images; PaliGemma takes one: see --image_column" in message


def test_a_pair_is_measured_by_its_longer_sequence_and_by_all_of_it(dpo, write):
    """Which auto batches need: shared prompts run both answers in one sequence."""
    rows, _ = dpo.load_data(dataset_name=write(ROWS), eval_strategy="no", image_folder=dpo.tmp_path)
    collator = dpo.collator()
    for row in rows:
        batch = collator([row])
        packed = dpo_idefics2.pack_pairs(**{name: batch[name] for name in PACKED}, pad_token_id=0)
        assert row["num_tokens"] == packed["ids"].shape[1] - 1  # the prompt's last token is there twice
        assert row["length"] == batch["input_ids"].shape[1] < row["num_tokens"]


PACKED = ("input_ids", "attention_mask", "completion_mask")


def test_a_row_without_answers_is_a_question(dpo):
    collator, row = dpo.collator(), {"image": "red.png", "question": " What? "}
    for unanswered in (row, {**row, "chosen": None, "rejected": None}):
        [asked] = collator.messages_of(unanswered)
        assert (asked["role"], dpo_idefics2.text_of(asked)) == ("user", "What?")
        assert asked["content"][0]["image"].size == (112, 56)
        with pytest.raises(dpo_idefics2.BadRow, match=r"^no answer: .*--chosen_column and --rejected_column"):
            collator([unanswered])
    answered = {**row, "chosen": "a ", "rejected": " b"}
    question, answer = collator.messages_of(answered)
    assert (answer["role"], dpo_idefics2.text_of(answer), collator.read_pair(answered)[2]) == ("assistant", "a", "b")
    assert same(collator.tokenize([[question]], prompt=True), collator.tokenize([[asked]], prompt=True))


# -------------------------------------------------------------------------------------------------------------- images
@pytest.mark.parametrize("given, edge", [(None, 490), (378, 378), (700, 700), (980, 980)])
def test_longest_edge_of_the_public_model(given, edge, dpo, tmp_path):
    idefics2.processor(preferences.tokenizer(), height=378, width=980).save_pretrained(tmp_path / "model")
    shutil.copy(dpo.folder / "model" / "config.json", tmp_path / "model")
    for name, size in (("large", (1000, 1000)), ("small", (400, 380)), ("wide", (1000, 600))):
        Image.new("RGB", size, "blue").save(tmp_path / f"{name}.png")
    settings = {} if given is None else {"longest_edge": given}
    collator = dpo.collator(model_name_or_path=tmp_path / "model", **settings)
    sizes = {"large.png": (edge, edge), "small.png": (380 if edge > 400 else 378, min(edge, 400))}
    for image, size in sizes.items():
        assert collator([prefers("What?", "a", "b", image=image)])["pixel_values"].shape == (2, 1, 3, *size)
    collator.processor.save_pretrained(tmp_path / "saved")  # what is found beside the adapter
    saved = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert dict(saved.image_processor.size) == {"shortest_edge": 378, "longest_edge": edge}
    assert saved.image_processor.do_image_splitting is False
    again = saved(text="<image>", images=Image.open(tmp_path / "wide.png"), return_tensors="pt")["pixel_values"]
    assert torch.equal(again, collator([prefers("What?", "a", "b", image="wide.png")])["pixel_values"][:1])


def test_a_smaller_model_keeps_its_own_size_and_no_image_is_split(dpo):
    """490, the default, is more than a tiny Idefics2 takes."""
    public, own = preferences.processor().image_processor, dpo.collator().processor.image_processor
    assert dict(own.size) == dict(public.size)
    assert public.do_image_splitting and own.do_image_splitting is False


# ---------------------------------------------------------------------------------------------------------------- runs
def test_answers_are_counted_up_to_their_end(dpo, monkeypatch):
    """An answer is as long as what stands before its end, <end_of_utterance> or EOS, and ended if there is one."""
    bounds = {"max_eval_rows": 5, "per_device_eval_batch_size": 3, "sample_rows": 2, "max_new_tokens": 4}
    trainer = dpo.trainer(load_in_4bit=False, **bounds)
    collator, tokenizer = trainer.data_collator, trainer.data_collator.processor.tokenizer
    assert tokenizer.convert_ids_to_tokens(collator.stop_ids) == ["</s>", END]
    (eos, end), pad = collator.stop_ids, tokenizer.pad_token_id
    a, b = tokenizer("Yes No", add_special_tokens=False)["input_ids"][:2]
    batches = iter([[[a, b, end, pad], [a, b, a, b], [end, pad, pad, pad]], [[a, eos], [b, a]]])

    def say(input_ids, **kwargs):
        return torch.cat([input_ids, torch.tensor(next(batches))], dim=1)

    monkeypatch.setattr(trainer.model, "generate", say)
    found = dpo_idefics2.answer_rows(trainer, trainer.eval_dataset, 4)
    assert [(tokens, ended) for _, tokens, ended in found] == [(2, True), (4, False), (0, True), (1, True), (2, False)]
    assert found[2].text == ""
    monkeypatch.setattr(dpo_idefics2, "answer_rows", lambda trainer, rows, most: found[: len(rows)])
    metrics = trainer.evaluate()
    assert (metrics["eval_samples/tokens"], metrics["eval_samples/ended"]) == (3, 0.5)  # of the first two


LANGUAGE_MODELS = {"language_model", "text_model"}
NO_IMAGE = [None, "", [], [None], {"bytes": None, "path": None}]
IN_FIXTURES = ["tiny_llava", "tiny_next", "tiny_paligemma", "tiny_paligemma2"]
BUILT = "qwen2_5_vl qwen3_vl qwen3_5 smolvlm idefics3 internvl llava_onevision gemma3".split()


@pytest.mark.parametrize("family", [*IN_FIXTURES, *marked(BUILT)])
def test_another_family(family, dpo, request, tmp_path):
    """Nothing is changed but --model_name_or_path: from the first step to the answers that the result gives."""
    if family in IN_FIXTURES:
        folder = request.getfixturevalue(family)
    else:
        folder = tmp_path / "family"
        families.build(family, folder)
        if family == "gemma3":  # its window is as small as the rest of it
            config = AutoConfig.from_pretrained(folder / "model")
            config.text_config.sliding_window = 256
            config.save_pretrained(folder / "model")
    settings = {"max_steps": 2, "eval_steps": 2, "save_strategy": "no", "logging_steps": 1, "warmup_steps": 0}
    settings |= {"gradient_accumulation_steps": 1, "learning_rate": 0.01, "max_eval_rows": 3, "sample_rows": 2}
    settings |= {"max_new_tokens": 4, "max_length": 256}  # PaliGemma 2 has such a window
    done = run(dpo_idefics2, dpo.flags(model_name_or_path=folder / "model", **settings))
    path = "stock DPOTrainer, since no way is known to share prompts of a qwen3_5"
    assert f"path: {path if family == 'qwen3_5' else 'shared prompts'}" in done.text
    same_as_before = [name for name, weight in done.weights[0].items() if torch.equal(weight, done.weights[2][name])]
    # With 2 layers Qwen3-VL's second merger would be seen by a third: in the published ones there are more.
    assert [name for name in same_as_before if "deepstack_merger_list.1" not in name] == []
    losses = log(done.out)
    assert losses[1] == pytest.approx(math.log(2), abs=1e-6) and losses[2] != losses[1]
    assert list(log(done.out, "eval_loss")) == [2]
    packed = [n for n, m in done.trainer.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert {name.split(".")[3] for name in packed} <= {*LANGUAGE_MODELS, "multi_modal_projector", "connector"}
    assert {name.split(".")[3] for name in packed} & LANGUAGE_MODELS

    generate.main([str(done.out), "--output", str(tmp_path / "answers.jsonl"), "--max_new_tokens", "4"])
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    shown = (done.out / "samples.md").read_text().split("## Step 2\n")[1].splitlines()
    cells = [line.split("|") for line in shown if line.startswith("| ![]")]
    texts = [" ".join(answer["prediction"].replace("|", "&#124;").split()) for answer in answers]
    assert len(texts) == 3 and texts[:2] == [row[4].strip() for row in cells]
    if "paligemma" in family:
        with pytest.raises(SystemExit, match="this model cannot be asked without an --image"):
            generate.main([str(done.out), "--question", "What?"])


REFUSED = {
    "mllama": "whatever the rows: cross-attention: the text does not hold its images",
    "florence2": "an encoder-decoder",
    "blip2": "without a chat template",
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_cannot_be_trained_is_refused(family, dpo, tmp_path):
    families.build(family, tmp_path / "family")
    message = dpo.refusal(dpo.flags(model_name_or_path=tmp_path / "family" / "model"))
    assert REFUSED[family] in message


@pytest.mark.parametrize(
    "given, problem",
    [
        ({"attn_implementation": "flex_attention"}, "flex_attention needs a GPU: it has no backward pass on a CPU"),
        ({"attn_implementation": "quick"}, 'attn_implementation="quick"` is not supported'),
        (
            {"image_splitting": True, "model_name_or_path": "llava"},
            "has none",
        ),
        ({"max_pixels": 1000}, "does not resize images by pixels"),
        ({"min_pixels": 9, "max_pixels": 8}, "--min_pixels and --max_pixels: from 1 up"),
        ({"beta": 0}, "--beta must be above 0"),
        ({"max_length": 0}, "--max_length must be above 0; without a limit it is null"),
    ],
)
def test_what_a_model_does_not_take_is_refused(given, problem, dpo, tiny_llava):
    if given.get("model_name_or_path") == "llava":
        given = given | {"model_name_or_path": tiny_llava / "model"}
    assert problem in dpo.refusal(dpo.flags(**given))


def test_image_splitting_shows_parts_of_an_image(dpo):
    row = prefers("What?", "a", "b", image="blue.png")
    assert dpo.collator()([row])["pixel_values"].shape[1] == 1
    assert dpo.collator(image_splitting=True)([row])["pixel_values"].shape[1] == 5
