"""What each recipe trains of a row, after which prompt, whatever rows it is batched with. Labels are read as text."""

import itertools
import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from conftest import asks, prefers, said, talks
from PIL import Image
from recipes import OTHER_ANSWER, Recipe, flat, sequences, trained
from transformers import AutoProcessor

from tiny import llava, minicpm

UTTERANCE = "<end_of_utterance>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{{ '<image>\n' if c.type == 'image' else c.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SETUPS = {  # recipe, the fixture of its folder, settings, what an answer begins with, what ends it
    "sft_llava": ("sft_llava", "tiny_llava", {}, " ", "</s>"),
    "sft_llava, NeXT": ("sft_llava", "tiny_next", {}, " ", "</s>"),
    "sft_llava, ChatML": ("sft_llava", "chatml", {}, "", "<|im_end|>"),
    "sft_llava, BOS in the template": ("sft_llava", "bos_in_template", {}, " ", "</s>"),
    "idefics2_docvqa": ("idefics2_docvqa", "tiny_forms", {}, " ", UTTERANCE),
    "idefics2_docvqa, split": ("idefics2_docvqa", "tiny_forms", {"image_splitting": True}, " ", UTTERANCE),
    "dpo_idefics2": ("dpo_idefics2", "tiny_pairs", {}, " ", UTTERANCE),
    "dpo_idefics2, LLaVA": ("dpo_idefics2", "tiny_llava", {}, " ", "</s>"),
    "dpo_idefics2, NeXT": ("dpo_idefics2", "tiny_next", {}, " ", "</s>"),
    "dpo_idefics2, ChatML": ("dpo_idefics2", "chatml", {}, "", "<|im_end|>"),
    "dpo_idefics2, BOS in the template": ("dpo_idefics2", "bos_in_template", {}, " ", "</s>"),
    "finetune_minicpm_lora, 4.6": ("finetune_minicpm_lora", "tiny_minicpm", {}, "", "<|im_end|>"),
    "finetune_minicpm_lora, 4.7": ("finetune_minicpm_lora", "tiny_minicpm47", {}, "", "<|im_end|>"),
    "finetune_minicpm_lora, 2.6": ("finetune_minicpm_lora", "tiny_minicpm26", {}, "", "<|im_end|>"),
    "llava_two_stage, align": ("llava_two_stage", "tiny_parts", {"stage": "align"}, " ", "\n"),
    "llava_two_stage, instruct": ("llava_two_stage", "tiny_parts", {}, " ", "</s>"),
}
# A conversation: in turn (question, *images) and answer. Of different lengths, with images of different shapes.
QUESTIONS = [
    [("Which digit is this?", "red.png"), "seven"],
    [("According to what you can see in this picture, is the digit even or odd?", "lime.png"), "an odd digit"],
    [("What?", "blue.png"), "Überweisung 漢字 😀 नमस्ते"],
    [("Is it odd?", "red.png"), "yes"],
]
TALKS = [
    [("Is seven even or odd?",), "odd"],
    [("Which digits are these?", "blue.png", "red.png"), "six and two", ("Even or odd?",), "even"],
    [("Hi!",), "Which digit comes after two?", ("And this one?", "lime.png"), "three", ("Thanks.",), "a digit"],
]
TEXTS = ["a", "x\n\ny", "!", "USER", "ASSISTANT:", "« a »", "a  b", "1. one\n2. two", "-100", "Überweisung\nनमस्ते"]


@pytest.fixture(scope="module")
def chatml(tiny_llava, tmp_path_factory):
    """A folder with a LLaVA-1.5, without weights, whose template ends each turn with the tokenizer's own EOS."""
    out, processor = tmp_path_factory.mktemp("chatml"), llava.processor()
    processor.chat_template = CHATML
    processor.tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    processor.tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    processor.save_pretrained(out / "model")
    shutil.copy(tiny_llava / "model" / "config.json", out / "model")
    return out


@pytest.fixture(scope="module")
def bos_in_template(tiny_llava, tmp_path_factory):
    """A folder with a LLaVA-1.5, without weights, whose template begins with BOS, and ends no answer."""
    out, processor = tmp_path_factory.mktemp("bos_in_template"), llava.processor()
    processor.chat_template = "{{ bos_token }}" + llava.CHAT_TEMPLATE
    processor.save_pretrained(out / "model")
    shutil.copy(tiny_llava / "model" / "config.json", out / "model")
    return out


@dataclass
class Setup:
    """A recipe with a model, a collator for it, and what it makes of an answer."""

    name: str
    recipe: Recipe
    settings: dict
    before: str
    end: str
    collator: object

    @property
    def is_align(self):
        return self.settings.get("stage") == "align"

    @property
    def conversations(self):
        return QUESTIONS + (TALKS if self.recipe.talks_in_turns and not self.is_align else [])

    @property
    def rows(self):
        return [self.row(turns) for turns in self.conversations]

    def row(self, turns):
        """A conversation -> a row as the recipe reads it."""
        texts, names = [], [name for question in turns[::2] for name in question[1:]]
        if self.recipe.name == "idefics2_docvqa":
            return asks(turns[0][0], turns[1], image=names[0])
        if self.recipe.name == "dpo_idefics2":
            return prefers(turns[0][0], turns[1], OTHER_ANSWER, image=names[0])
        numbered = {f"<image_{n:02}>": name for n, name in enumerate(names)}
        markers = iter(numbered if self.recipe.name == "finetune_minicpm_lora" else ["<image>"] * len(names))
        for n, turn in enumerate(turns):
            texts.append(turn if n % 2 else "".join(f"{next(markers)}\n" for _ in turn[1:]) + turn[0])
        if self.recipe.name == "finetune_minicpm_lora":
            return talks(*texts, image=numbered or None)
        return said(*texts, image=names or None)

    def messages(self, turns):
        """A conversation -> messages as one would write them for inference."""
        messages = []
        for n, turn in enumerate(turns):
            question, *names = [turn] if n % 2 else turn
            content = [{"type": "image", "image": Image.open(self.recipe.tmp_path / name)} for name in names]
            if self.recipe.name == "idefics2_docvqa" and n == 0:
                content.insert(0, {"type": "text", "text": "Answer briefly."})
            content.append({"type": "text", "text": question})
            messages.append({"role": ("user", "assistant")[n % 2], "content": content})
        return messages

    def expected(self, conversations):
        """The texts that are to be trained of each sequence in a batch of these."""
        answers = [turns[1::2] for turns in conversations]
        if self.recipe.name == "dpo_idefics2":
            answers += [[OTHER_ANSWER]] * len(conversations)  # the second half of the batch
        return [[f"{self.before}{answer}{self.end}" for answer in some] for some in answers]


@pytest.fixture(scope="module", params=SETUPS)
def setup(request, tmp_path_factory):
    name, folder, settings, before, end = SETUPS[request.param]
    recipe = Recipe(name, request.getfixturevalue(folder), tmp_path_factory.mktemp("setup"))
    for colour, size in (("red", (112, 56)), ("lime", (70, 112)), ("blue", (56, 56))):
        Image.new("RGB", size, colour).save(recipe.tmp_path / f"{colour}.png")
    return Setup(request.param, recipe, settings, before, end, recipe.collator(**settings))


def some_setups(*names):
    return pytest.mark.parametrize("setup", names, indirect=True)


def prompts(batch):
    """The tokens of each conversation of a batch for generation, without padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]


# -------------------------------------------------------------------------------------------------- what is trained
def test_trained_are_the_answers_and_their_ends(setup):
    batch = setup.collator(setup.rows)
    assert trained(batch, setup.collator.processor.tokenizer) == setup.expected(setup.conversations)
    last = [next(token for token in reversed(labels) if token != -100) for _, labels in sequences(batch)]
    assert set(last) <= set(setup.collator.stop_ids)  # generation ends where training does


@pytest.mark.parametrize("answer", TEXTS)
def test_an_answer_may_be_any_text(answer, setup):
    if setup.is_align and ("\n" in answer or answer == "ASSISTANT:"):
        pytest.skip("more than a caption")
    turns = [("Which digit is this?", "red.png"), answer, ("And now?",), answer]
    turns = turns[: 4 if setup.recipe.talks_in_turns and not setup.is_align else 2]
    batch = setup.collator([setup.row(turns)])
    assert trained(batch, setup.collator.processor.tokenizer) == setup.expected([turns])


@some_setups("idefics2_docvqa", "dpo_idefics2", "finetune_minicpm_lora, 4.6", "finetune_minicpm_lora, 2.6")
def test_white_space_around_texts_is_not_learnt(setup):
    """Of MiniCPM-V it stays around questions."""
    tidy, loose = (
        setup.collator([setup.row([(question, "red.png"), answer])])
        for question, answer in (("What?", "47"), ("  What? \r\n", "\n 47\r\n "))
    )
    assert trained(loose, setup.collator.processor.tokenizer) == trained(tidy, setup.collator.processor.tokenizer)
    assert setup.recipe.name == "finetune_minicpm_lora" or sequences(loose) == sequences(tidy)


@some_setups(*[name for name in SETUPS if name.startswith("sft_llava")])
def test_all_text_may_be_trained_but_no_image(setup):
    collator = setup.recipe.collator(train_on="all")
    processor, template_begins = collator.processor, setup.name == "sft_llava, BOS in the template"
    for turns, (ids, labels) in zip(setup.conversations, sequences(collator(setup.rows)), strict=True):
        words = [token for token in ids if token != processor.image_token_id]
        assert [label for label in labels if label != -100] == words
        text = processor.apply_chat_template(setup.messages(turns)).replace("<image>", "")
        begin = "<s>" if setup.name == "sft_llava, ChatML" else "<s> "
        assert processor.tokenizer.decode(words) == ("" if template_begins else begin) + text


# ------------------------------------------------------------------------------------------------------- in a batch
def files_that_say(setup, tmp_path, **changes):
    """A copy of a setup's model, without weights, whose tokenizer has other settings."""
    leave_out = shutil.ignore_patterns("*.safetensors", "data", "json")
    folder = shutil.copytree(setup.recipe.folder, tmp_path / "copy", ignore=leave_out)
    for file in folder.rglob("tokenizer_config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return Recipe(setup.recipe.name, folder, setup.recipe.tmp_path)


@pytest.mark.parametrize("side, pad", [("left", None), ("right", "the end")])
def test_rows_are_padded_whatever_the_tokenizers_files_say(side, pad, setup, tmp_path):
    """On the right, where a causal model needs no mask, and a prompt on the left, as generation needs it."""
    changes = {"padding_side": side}
    if pad or setup.recipe.name != "finetune_minicpm_lora":  # whose models all have one of their own
        changes["pad_token"] = pad and ("</s>" if setup.is_align else setup.end)
    collator = files_that_say(setup, tmp_path, **changes).collator(**setup.settings)
    tokenizer, batch = collator.processor.tokenizer, collator(setup.rows)
    assert trained(batch, tokenizer) == setup.expected(setup.conversations)
    rows = flat(batch)
    mask = rows["attention_mask"]
    assert (mask.diff(dim=1) <= 0).all()
    assert mask.all(dim=1).any() and not mask.all()  # as much as the longest row needs, and some
    assert (rows["input_ids"][mask == 0] == tokenizer.pad_token_id).all()

    questions = [collator.messages_of(row)[:1] for row in setup.rows]
    asked = collator.tokenize(questions, prompt=True)["attention_mask"]
    assert (asked.diff(dim=1) >= 0).all() and (setup.is_align or not asked.all())  # of align all are as long


def test_a_row_is_the_same_alone_as_in_company(setup):
    batch, alone = setup.collator(setup.rows), [setup.collator([row]) for row in setup.rows]
    pairs = [sequences(one) for one in alone]
    assert sequences(batch) == [pair[half] for half in range(len(pairs[0])) for pair in pairs]


@some_setups(*[name for name in SETUPS if not name.endswith(("ChatML", "in the template"))])
def test_the_model_sees_a_row_in_company_as_alone(setup):
    """Beside longer rows, rows with a larger image or with none."""
    name = {"finetune_minicpm_lora": "q_lora"}.get(setup.recipe.name, "load_in_4bit")
    model = setup.recipe.module.load_model(*setup.recipe.parse(**setup.settings, **{name: False})).eval()

    def scores(rows):
        batch = setup.collator(rows)
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "completion_mask")}
        with torch.no_grad():
            found = model(**inputs).logits
        return [row[mask.bool()] for row, mask in zip(found, batch["attention_mask"], strict=True)]

    together, alone = scores(setup.rows), [scores([row]) for row in setup.rows]
    alone = [one[half] for half in range(len(alone[0])) for one in alone]
    assert max(len(one) for one in alone) > min(len(one) for one in alone)
    for mine, own in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, own, atol=1e-4, rtol=1e-4)


@some_setups("idefics2_docvqa", "llava_two_stage, align", "llava_two_stage, instruct")
def test_scores_are_made_where_there_are_labels_and_nowhere_else(setup):
    trainer, seen = setup.recipe.trainer(**setup.settings, eval_strategy="no"), []
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(4)])
    trainer.compute_loss(trainer.model, dict(batch))
    number = int((batch["labels"] != -100).sum())
    assert seen == [(number,)] and number < batch["labels"].numel() / 2  # their losses, in place of logits


@some_setups("sft_llava", "llava_two_stage, instruct")
def test_images_come_in_the_order_of_the_text(setup):
    """And a batch without any has no pixels."""
    two = [("Which?", "blue.png", "red.png"), "six"]
    apart = [("Which?", "lime.png"), "six", ("Even?",), "no", ("And this?", "red.png"), "two"]
    one, text = [("Which?", "blue.png"), "six"], [("Even or odd?",), "odd"]
    for conversations, colours in (([two, text, apart, text, one], "brgrb"), ([text, one, apart, two], "bgrbr")):
        batch = setup.collator([setup.row(turns) for turns in conversations])
        assert "".join("rgb"[image[:, 28, 28].argmax()] for image in batch["pixel_values"]) == colours
        shown = [sum(len(question) - 1 for question in turns[::2]) for turns in conversations]
        assert (batch["input_ids"] == setup.collator.processor.image_token_id).sum(1).tolist() == [
            16 * n for n in shown
        ]
    always = {"input_ids", "attention_mask", "labels", "trained_at", "targets"}
    assert set(setup.collator([setup.row(text)] * 2)) == always


# ------------------------------------------------------------------------------------------------------- the prompt
def saved_processor(setup, folder):
    """What a program that knows nothing of the recipe reads from the folder of a run."""
    setup.collator.processor.save_pretrained(folder)
    if setup.recipe.name != "finetune_minicpm_lora":
        return AutoProcessor.from_pretrained(folder)
    shutil.copy(setup.recipe.folder / "model" / "config.json", folder)
    return minicpm.processor_from(folder)


@some_setups(*[name for name in SETUPS if not name.endswith("2.6")])  # which has no template of its own for images
def test_the_prompt_in_training_is_the_prompt_at_inference(setup, tmp_path):
    saved = saved_processor(setup, tmp_path / "saved")
    is_dpo, is_minicpm = (setup.recipe.name == name for name in ("dpo_idefics2", "finetune_minicpm_lora"))
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for turns in setup.conversations:
        messages, batch = setup.messages(turns), setup.collator([setup.row(turns)])
        ids, labels = sequences(batch)[0]
        answers = range(1, len(turns), 2)
        if is_minicpm:  # its template puts an empty thought before the last answer only
            answers = answers[-1:]
        for n in answers:
            prompt = saved.apply_chat_template(messages[:n], add_generation_prompt=True, **options)
            [asked] = prompts(prompt)
            assert ids[: len(asked)] == asked
            assert labels[len(asked) - 1] == -100 != labels[len(asked)]  # the answer begins there
        if not is_minicpm:  # which knows no BOS
            assert [place for place, token in enumerate(ids) if token == saved.tokenizer.bos_token_id] == [0]

        own = setup.collator.tokenize([setup.collator.messages_of(setup.row(turns))[: len(turns) - 1]], prompt=True)
        images = prompt.keys() - {"input_ids", "attention_mask", "mm_token_type_ids"}
        assert prompts(own) == [asked] and images <= own.keys() & batch.keys()
        assert images or len(turns[0]) == 1
        for key in images:  # of DPO there are two sequences
            assert torch.equal(own[key], prompt[key])
            assert torch.equal(batch[key], torch.cat([prompt[key]] * (1 + is_dpo)))
        if is_dpo:
            assert sequences(batch)[1][0][: len(asked)] == asked


UNENDED = ("dpo_idefics2, LLaVA", "dpo_idefics2, BOS in the template")  # templates that end no answer


@some_setups(*[name for name in SETUPS if not name.endswith("2.6") and name not in UNENDED])
def test_a_row_is_what_the_chat_template_makes_of_it(setup, tmp_path):
    """Up to the last end: what a template puts behind it, white space, is not trained."""
    saved = saved_processor(setup, tmp_path / "saved")
    for turns in setup.conversations:
        [whole] = saved.apply_chat_template(setup.messages(turns), tokenize=True, return_dict=True)["input_ids"]
        ids, labels = sequences(setup.collator([setup.row(turns)]))[0]
        assert ids == list(whole)[: len(ids)] and not saved.tokenizer.decode(whole[len(ids) :]).strip()
        behind = list(itertools.takewhile(lambda label: label == -100, reversed(labels)))
        assert not saved.tokenizer.decode(ids[len(ids) - len(behind) :]).strip()
