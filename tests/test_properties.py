"""Any conversation of the accepted forms: what is trained is its answers, and all before one is inference's prompt.

Hypothesis draws the texts: white space at their ends and inside, emoji, right-to-left and combining characters, other
characters of Unicode, control tokens, blanks. A refusal needs a reason that the row does give."""

import re
import unicodedata
from dataclasses import dataclass

import hypothesis
import pytest
import torch
from conftest import CACHE
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from PIL import Image
from recipes import OTHER_ANSWER, Recipe, flat, sequences, trained

set_hypothesis_home_dir(CACHE)  # else it would write tables of Unicode into the user's folder
UTTERANCE = "<end_of_utterance>"
SETUPS = {  # recipe, the fixture of its folder, settings, what an answer begins with, what ends it
    "sft_llava": ("sft_llava", "tiny_llava", {}, " ", "</s>"),
    "sft_llava, NeXT": ("sft_llava", "tiny_next", {}, " ", "</s>"),
    "idefics2_docvqa": ("idefics2_docvqa", "tiny_forms", {}, " ", UTTERANCE),
    "dpo_idefics2": ("dpo_idefics2", "tiny_pairs", {}, " ", UTTERANCE),
    "dpo_idefics2, LLaVA": ("dpo_idefics2", "tiny_llava", {}, " ", "</s>"),
    "dpo_idefics2, PaliGemma": ("dpo_idefics2", "tiny_paligemma", {}, "", "<eos>"),
    "finetune_minicpm_lora, 4.6": ("finetune_minicpm_lora", "tiny_minicpm", {}, "", "<|im_end|>"),
    "finetune_minicpm_lora, 2.6": ("finetune_minicpm_lora", "tiny_minicpm26", {}, "", "<|im_end|>"),
    "llava_two_stage, align": ("llava_two_stage", "tiny_parts", {"stage": "align"}, " ", "\n"),
    "llava_two_stage, instruct": ("llava_two_stage", "tiny_parts", {}, " ", "</s>"),
}
IMAGES = {colour: Image.new("RGB", (56, 56), colour) for colour in ("red", "lime", "blue")}
IMAGE = "an image"  # stands for one in a drawn question


@dataclass
class Setup:
    """A recipe with a model, a collator for it, and what it makes of an answer."""

    name: str
    recipe: Recipe
    before: str
    end: str
    collator: object

    @property
    def is_align(self):
        return self.name.endswith("align")

    @property
    def strips(self):
        """Whether white space at the ends of a text is left out."""
        return self.is_align or self.recipe.name not in ("sft_llava", "llava_two_stage")

    @property
    def max_turns(self):
        """How many questions a row may have."""
        if self.recipe.talks_in_turns and not self.is_align:
            return 3
        return 2 if self.name in ("dpo_idefics2", "dpo_idefics2, LLaVA") else 1


@pytest.fixture(scope="module", params=SETUPS)
def setup(request, tmp_path_factory):
    name, folder, settings, before, end = SETUPS[request.param]
    recipe = Recipe(name, request.getfixturevalue(folder), tmp_path_factory.mktemp("properties"))
    return Setup(request.param, recipe, before, end, recipe.collator(**settings))


# ------------------------------------------------------------------------------------------------ what is drawn
PIECES = """yes No. 47 $47.00 café cafe\u0301 e\u0301 \u0301 Việt Vie\u0323\u0302t 한국 \u1112\u1161\u11ab 漢字
नमस्ते שלום مرحبا 😀 👩\u200d🚀 👍🏽 🇩🇪 \u200f \u202b \u200b \ufeff USER: ASSISTANT: [INST] ### <image, image> {{x}} {%
\\n - : , … ﬁ Å \u212b""".split()
SPACES = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000"]
CONTROL = ["</s>", "<unk>", UTTERANCE, "<|im_end|>"]
ANY = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")  # which Llama's tokenizer reads as a space
PIECE = st.one_of(st.sampled_from(PIECES), st.sampled_from(SPACES), ANY)
PART = st.lists(PIECE, min_size=1, max_size=5).map("".join)
TEXT = st.lists(PART, min_size=1, max_size=3)  # the parts of one text
SPOILT = st.sampled_from([None] * 8 + [[token] for token in CONTROL] + [[""], [" ", "\n"]])


@st.composite
def conversations(draw, setup):
    """(system or None, [(question, answer)]). A text is a list of its parts; a question is a list of IMAGE and texts.
    In some of them one text is blank, or holds what may be a control token."""
    in_turns = setup.recipe.talks_in_turns and not setup.is_align
    has_system = in_turns and draw(st.sampled_from([False, False, True]))
    texts, turns, num_images = [draw(TEXT)], [], 0
    for n in range(draw(st.integers(1, setup.max_turns))):
        question = [IMAGE] if n == 0 else []
        if in_turns:
            question = [IMAGE] * draw(st.integers(0, min(2, 3 - num_images)))
            num_images += len(question)
        places = draw(st.sets(st.integers(0, len(question)), min_size=1, max_size=2 if in_turns else 1))
        for place in sorted(places, reverse=True):
            texts.append(draw(TEXT))
            question.insert(place, texts[-1])
        texts.append(draw(TEXT))
        turns.append((question, texts[-1]))
    spoilt = draw(SPOILT)
    if spoilt is not None:
        draw(st.sampled_from(texts))[:] = spoilt
    has_system = has_system and texts[0] != [""]  # which counts as none
    return (texts[0] if has_system else None), turns


def joined(parts):
    """The text of these parts as the recipes read it."""
    return unicodedata.normalize("NFC", "".join(parts))


@st.composite
def rows(draw, setup):
    """(conversation, a row of it in one of the accepted forms)."""
    system, turns = draw(conversations(setup))
    role_key, content_key = draw(st.sampled_from([("role", "content"), ("from", "value")]))
    colours = iter([*IMAGES] * 2)
    column, in_column = [], draw(st.booleans()) or not setup.recipe.talks_in_turns

    def content(text):
        """A text, or its parts, whichever is drawn."""
        form = draw(st.sampled_from(["text", "text in a list", "parts"]))
        if form == "parts":
            return [{"type": "text", "text": part} for part in text]
        return "".join(text) if form == "text" else ["".join(text)]

    def question_content(question):
        """With markers and the images in the column, or with parts."""
        image_parts, texts = [], []
        with_markers = in_column and draw(st.booleans())
        for item in question:
            if item == IMAGE:
                image = IMAGES[next(colours)]
                if in_column:
                    column.append(image)
                image_parts.append({"type": "image"} if in_column else {"type": "image", "image": image})
                texts.append(draw(st.sampled_from(["<image>", "<image>\n"])))
            else:
                image_parts += [{"type": "text", "text": part} for part in item]
                texts.append("".join(item))
        return "".join(texts) if with_markers else image_parts

    def turn(role, text):
        return {role_key: role, content_key: text}

    messages = [] if system is None else [turn("system", content(system))]
    for question, answer in turns:
        user, assistant = draw(st.sampled_from([("user", "assistant"), ("human", "gpt")]))
        messages += [turn(user, question_content(question)), turn(assistant, content(answer))]
    if setup.recipe.talks_in_turns:
        row = {draw(st.sampled_from(["messages", "conversations"])): messages}
        return (system, turns), row | ({draw(st.sampled_from(["images", "image"])): column} if column else {})
    *prompt, answer = messages
    row = {"image": column[0], "question": prompt}
    if setup.recipe.name == "idefics2_docvqa":
        return (system, turns), row | {"answers": ["".join(turns[-1][1])]}
    return (system, turns), row | {"chosen": [answer], "rejected": OTHER_ANSWER}


# ---------------------------------------------------------------------------------------------------------- refusals
def texts_of(conversation):
    """The texts of a conversation as the recipes read them: ([of the user and the system], [answers])."""
    system, turns = conversation
    asked = [] if system is None else [joined(system)]
    asked += [joined(text) for question, _ in turns for text in question if text != IMAGE]
    return asked, [joined(answer) for _, answer in turns]


def reasons(setup, conversation):
    """The reasons to refuse this conversation. It must be refused, for one of these, if there are any; only that an
    answer changes the prompt's tokens depends on the tokenizer."""
    (system, turns), (asked, answers) = conversation, texts_of(conversation)
    found = set()
    if any(token in text for text in asked + answers for token in setup.collator.control_tokens):
        found.add("control token")
    if not all(answer.strip() for answer in answers):
        found.add("empty answer")
    if setup.recipe.name == "idefics2_docvqa" and answers == [""]:
        found.add("no answer")
    if system is not None and not joined(system).strip():
        found.add("empty system message")
    for question, _ in turns:
        words = "".join(joined(text) for text in question if text != IMAGE)
        if not words.strip() and (IMAGE not in question or not setup.recipe.talks_in_turns):
            found.add("empty question")
    if setup.is_align and re.search(r"\n|^((USER|ASSISTANT|Human|Assistant)\s?:|###)", answers[0].strip()):
        found.add("more than a caption")
    if not setup.strips and any(answer[:1].isspace() for answer in answers):
        found.add("prompt changed")  # the tokenizer may join this white space with the prompt's last character
    return found


# ------------------------------------------------------------------------------------------------------- the property
def check_row(setup, conversation, row):
    """What is trained decodes to the answers; what is before an answer is the prompt of inference."""
    collator, module = setup.collator, setup.recipe.module
    tokenizer, (_, answers) = collator.processor.tokenizer, texts_of(conversation)
    if setup.strips:
        answers = [text.strip() for text in answers]
    allowed = reasons(setup, conversation)
    try:
        batch = collator([row])
    except module.BadRow as error:
        assert error.reason in allowed, (error, allowed)
        return
    assert allowed <= {"prompt changed"}, f"it should be refused: {allowed}"

    learnt = [answers[-1:], [OTHER_ANSWER]] if setup.recipe.name == "dpo_idefics2" else [answers]
    assert trained(batch, tokenizer) == [[f"{setup.before}{text}{setup.end}" for text in some] for some in learnt]

    messages = collator.messages_of(row)
    numbers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if setup.recipe.name in (
        "dpo_idefics2",
        "finetune_minicpm_lora",
    ):  # MiniCPM writes an empty thought before the last
        numbers = numbers[-1:]
    for n in numbers:
        prompt = flat(collator.tokenize([messages[:n]], prompt=True))
        asked = prompt["input_ids"][0][prompt["attention_mask"][0].bool()].tolist()
        for ids, labels in sequences(batch):
            assert ids[: len(asked)] == asked and labels[len(asked) - 1] == -100 != labels[len(asked)]
    pixels, of_prompt = flat(batch).get("pixel_values"), prompt.get("pixel_values")
    if isinstance(pixels, torch.Tensor):
        assert torch.equal(pixels[: len(of_prompt)], of_prompt)
    if not setup.is_align:  # which leaves out the question
        text = tokenizer.decode(asked)
        assert all(words.strip() in text for words in texts_of(conversation)[0])


@given(data=st.data())
@hypothesis.settings(
    derandomize=True, max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
def test_any_conversation_trains_its_answers_after_the_prompt_of_inference(setup, data):
    conversation, row = data.draw(rows(setup))
    check_row(setup, conversation, row)
