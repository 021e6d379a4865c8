"""What sft_llava.py trains of a row of any family of models, read as text, and after which prompt."""

import itertools
import re

import pytest
import torch
from families import (
    CONVERSATIONS,
    HAS_TORCHVISION,
    PICTURES,
    READ,
    TRAINED,
    Family,
    asks,
    built_families,  # noqa: F401
    marked,
    row_of,
    saved_processor,
    says,
    some_families,
)
from PIL import Image
from recipes import Loaded, Recipe, sequences, trained
from runs import logits

import sft_llava

ENDS = {  # what ends an answer, where that is not <|im_end|>
    **dict.fromkeys(["idefics2", "idefics3", "smolvlm"], "<end_of_utterance>"),
    **dict.fromkeys(["mllama", "llava_next_llama3"], "<|eot_id|>"),
    **dict.fromkeys(["llama4", "muse_glimmer"], "<|eot|>"),
    **dict.fromkeys(["pixtral", "mistral3", "video_llava"], "</s>"),
    **dict.fromkeys(["glm4v", "glm4v_moe", "glm46v"], "<|endoftext|>"),  # the template ends none but by the next turn
    **dict.fromkeys(["aya_vision", "cohere2_vision"], "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "deepseek_vl": "<｜end▁of▁sentence｜>",
}
NEXT_TURN = dict.fromkeys(["glm4v", "glm4v_moe", "glm46v"], "<|user|>")  # what ends an answer in the middle
BEGINS = {  # what the model has to write before an answer
    **dict.fromkeys(["idefics2", "idefics3", "smolvlm", "deepseek_vl", "video_llava"], " "),
    **dict.fromkeys(["glm4v_moe", "glm46v"], "\n"),
    "muse_glimmer": " to=user<|message|>",
}
TRIM = {"gemma3", "gemma4", "qwen3_5", "qwen3_5_think", "qwen3_5_moe", "qwen3_8", "glm4v_moe", "glm46v"}
THINK = ["qwen3_5", "qwen3_5_think"]  # their templates drop the thoughts of earlier answers
WHITE_SPACE = ["llava_onevision", "llava_next_llama3"]  # their prompt differs from a row's by white space
ONE_ANSWER = {*THINK, "qwen3_5_moe", *WHITE_SPACE}  # only the last answer of a row is trained
NO_SYSTEM = {"pixtral": "text left out.*'Be short.'", "mllama": "Prompting with images.*system"}
# Tokens that stand for pictures, or around and between them.
OF_PICTURES = re.compile(
    r"<\|?/?[^<>]*(image|img|vision|row_|global|patch|tile|fim_)[^<>]*>|\[IMG[A-Z_]*\]|TILE\w*", re.IGNORECASE
)
PROMPT_FAULTS = {  # known, in the prompts of the conversation "two turns with a picture"
    "llava_onevision_converted": "a picture has fewer tokens if the row has another one later",
}
THOUGHT = "<think>\nIt has one bar.\n</think>\n\n"


@pytest.fixture(scope="module", params=marked(READ))
def family(request, built):
    return built(request.param)


def asked(processor, messages):
    """What a model is given at inference."""
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, add_generation_prompt=True, **options)


def expected(name, turns):
    """The texts that are to be trained of a conversation."""
    answers = [text for role, *parts in turns for text in parts if role == "assistant"]
    if name in TRIM:
        answers = [answer.strip() for answer in answers]
    end = ENDS.get(name, "<|im_end|>")
    runs = [f"{BEGINS.get(name, '')}{answer}{NEXT_TURN.get(name, end)}" for answer in answers]
    runs[-1] = f"{BEGINS.get(name, '')}{answers[-1]}{end}"
    return runs[-1:] if name in ONE_ANSWER else runs


@pytest.fixture(params=CONVERSATIONS)
def conversation(request, family):
    """The turns of a conversation that the family's template can write."""
    if request.param == "system" and family.name in NO_SYSTEM:
        pytest.skip("its template has no place for a system message beside a picture")
    return CONVERSATIONS[request.param]


def good_rows(family):
    """Rows of all conversations that can stand in one batch."""
    left_out = {"system"} if family.name in NO_SYSTEM else set()
    if family.name == "mllama":
        left_out.add("text only")
    return [row_of(turns) for name, turns in CONVERSATIONS.items() if name not in left_out]


# -------------------------------------------------------------------------------------------------- what is trained
def test_trained_are_the_answers_and_their_ends(family, conversation):
    batch = family.collator([row_of(conversation)])
    assert trained(batch, family.tokenizer) == [expected(family.name, conversation)]
    [(_, labels)] = sequences(batch)
    last = {label for label, following in itertools.pairwise([*labels, -100]) if label != -100 == following}
    assert last and last <= family.stop_ids  # generation ends where training does


def test_all_text_may_be_trained_but_no_token_of_a_picture(family, request):
    """Neither those that stand for it, nor those of its rows, columns and tiles, nor those around it."""
    if family.name in NEXT_TURN:
        request.applymarker(pytest.mark.xfail(strict=True, reason="<|system|> is taken for a token of pictures"))
    collator = family.recipe.collator(train_on="all")
    for ids, labels in sequences(collator(good_rows(family))):
        for token, label in zip(collator.processor.tokenizer.convert_ids_to_tokens(ids), labels, strict=True):
            assert (label == -100) == bool(OF_PICTURES.fullmatch(token)), token


@some_families(NO_SYSTEM)
def test_a_system_message_that_the_template_does_not_take_is_a_bad_row(family):
    with pytest.raises(sft_llava.BadRow, match=NO_SYSTEM[family.name]):
        family.collator([row_of(CONVERSATIONS["system"])])


# ------------------------------------------------------------------------------------------------------- the prompt
def test_the_prompt_in_training_is_the_prompt_at_inference(family, conversation, request):
    """With its pictures, as the processor that is saved makes them."""
    if conversation is CONVERSATIONS["two turns with a picture"] and family.name in PROMPT_FAULTS:
        request.applymarker(pytest.mark.xfail(strict=True, reason=PROMPT_FAULTS[family.name]))
    batch, messages = family.collator([row_of(conversation)]), family.messages(conversation)
    [(ids, labels)] = sequences(batch)
    starts = [n for n, (before, label) in enumerate(itertools.pairwise([-100, *labels])) if before == -100 != label]
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    for start, n in zip(starts, answers[-1:] if family.name in ONE_ANSWER else answers, strict=True):
        prompt = asked(family.saved, messages[:n])
        assert ids[:start] == prompt["input_ids"][0].tolist()
    assert set(prompt) == set(batch) - {"labels", "trained_at", "targets"}
    for name in set(prompt) - {"input_ids", "attention_mask"}:
        if prompt[name].shape[:2] == prompt["input_ids"].shape:  # token_type_ids and the like
            assert torch.equal(batch[name][:, :start], prompt[name])
        else:
            assert torch.equal(batch[name], prompt[name])


# ------------------------------------------------------------------------------------------------------- in a batch
def test_a_row_is_the_same_alone_as_in_company(family):
    """Beside longer rows, rows with more pictures or with none."""
    rows = good_rows(family)
    assert sequences(family.collator(rows)) == [sequences(family.collator([row]))[0] for row in rows]


@some_families([name for name in TRAINED if name != "mllama"])
def test_the_model_sees_a_row_in_company_as_alone(family):
    """Not so Llama 3.2's: what stands before a picture looks at the places of all pictures, of other rows, too."""
    model, rows = sft_llava.load_model(*family.recipe.parse(load_in_4bit=False)), good_rows(family)

    def scores(some):
        batch = family.collator(some)
        found = logits(model, {name: value for name, value in batch.items() if name != "labels"})
        return found.split(batch["attention_mask"].sum(1).tolist())

    alone = [scores([row])[0] for row in rows]
    assert len({len(one) for one in alone}) > 3
    for mine, own in zip(scores(rows), alone, strict=True):
        torch.testing.assert_close(mine, own, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not HAS_TORCHVISION, reason="Llama 3.2's processor can mix them without torchvision")
def test_rows_with_and_without_pictures_that_cannot_be_mixed_are_refused(tmp_path, write):
    """Llama 3.2's processor wants pictures in all rows of a batch, or in none."""
    family = Family("mllama", tmp_path)
    rows = write([row_of(CONVERSATIONS[name]) for name in ("one turn", "text only")])
    message = family.recipe.refusal(family.recipe.flags_for(rows, per_device_train_batch_size=2))
    assert re.search("cannot mix rows with and without images; leave out those of one kind", message)
    with pytest.raises(Loaded):  # nothing to complain about
        family.recipe.refusal(family.recipe.flags_for(rows, per_device_train_batch_size=1))


# --------------------------------------------------------------------------------------- one row for each answer
def rows_of_one_answer(recipe, rows, **settings):
    """What load_data makes of these rows, none held out."""
    return list(recipe.load_data(dataset_name=rows, eval_fraction=0, eval_strategy="no", **settings)[0])


@some_families(sorted(ONE_ANSWER))
def test_a_conversation_becomes_a_row_for_each_answer(family, write, capsys):
    turns = CONVERSATIONS["several turns"]
    file = write([row_of(turns), row_of(CONVERSATIONS["text only"])])
    rows = rows_of_one_answer(family.recipe, file, image_folder=family.folder)
    assert "2 rows are 4, of one answer each" in capsys.readouterr().out
    batch, messages = family.collator(rows), family.messages(turns)
    answers = ["seven", "odd", "eight", "two"]
    assert trained(batch, family.tokenizer) == [expected(family.name, [says(answer)]) for answer in answers]
    for n, (ids, labels) in zip((1, 3, 5), sequences(batch)):
        start = next(n for n, label in enumerate(labels) if label != -100)
        assert ids[:start] == asked(family.saved, messages[:n])["input_ids"][0].tolist()


@some_families(sorted(set(READ) - ONE_ANSWER - {"mllama"}))
def test_other_conversations_stay_whole(family, write):
    file = write([row_of(CONVERSATIONS["several turns"]), row_of(CONVERSATIONS["text only"])])
    assert len(rows_of_one_answer(family.recipe, file, image_folder=family.folder)) == 2


# --------------------------------------------------------------------------------------------------------- thoughts
@pytest.mark.parametrize("thought", [THOUGHT, "<think>It has one bar.</think>", "It has one bar.</think>"])
@some_families(THINK)
def test_thoughts_are_trained_where_that_is_asked(family, write, tmp_path, thought):
    """After what inference sees: with this answer's <think>, and without the thoughts of earlier answers. What a model
    said after a <think> of its prompt has none of its own."""
    turns = [asks("red.png", "Which digit is this?"), says(f"{thought}seven"), asks("Even?"), says(f"{thought}odd")]
    rows = rows_of_one_answer(family.recipe, write([row_of(turns)]), image_folder=family.folder, enable_thinking=True)
    collator = family.recipe.collator(enable_thinking=True)
    assert trained(collator(rows), collator.processor.tokenizer) == [
        ["It has one bar.\n</think>\n\nseven<|im_end|>"],
        ["It has one bar.\n</think>\n\nodd<|im_end|>"],
    ]
    saved, messages = saved_processor(collator.processor, tmp_path), family.messages(turns)
    for n, (ids, labels) in zip((1, 3), sequences(collator(rows)), strict=True):
        start = next(n for n, label in enumerate(labels) if label != -100)
        assert ids[:start] == asked(saved, messages[:n])["input_ids"][0].tolist()
        assert family.tokenizer.decode(ids[:start]).endswith("assistant\n<think>\n")
        assert family.tokenizer.decode(ids).count("It has one bar.") == 1


@some_families(THINK)
def test_an_empty_thought_belongs_to_the_prompt_where_none_is_asked(family):
    [(ids, labels)] = sequences(family.collator([row_of(CONVERSATIONS["one turn"])]))
    text = family.tokenizer.decode([token for token, label in zip(ids, labels) if label == -100])
    assert text.rstrip().endswith("assistant\n<think>\n\n</think>")
    with pytest.raises(sft_llava.BadRow, match="control token: </?think> in the answer"):
        family.collator([row_of([asks("red.png", "Which?"), says(f"{THOUGHT}seven")])])


THOUGHTS = {  # a family, and what is trained of a thought and an answer
    **dict.fromkeys(["qwen3_8", "qwen3_5_moe"], "It has one bar.\n</think>\n\nseven<|im_end|>"),
    **dict.fromkeys(["glm4v_moe", "glm46v"], "\n<think>It has one bar.</think>\nseven<|endoftext|>"),
    "gemma4": "<|channel>thought\nIt has one bar.\n<channel|>seven<turn|>",
    "lfm2_vl": "<think>It has one bar.</think>seven<|im_end|>",
    "muse_glimmer": " to=self<|message|>It has one bar.<|eom|><|start|>assistant to=user<|message|>seven<|eot|>",
}


@some_families(THOUGHTS)
def test_thoughts_have_the_form_of_their_template(family):
    collator = family.recipe.collator(enable_thinking=True)
    batch = collator([row_of([asks("red.png", "Which digit is this?"), says(f"{THOUGHT}seven")])])
    assert trained(batch, collator.processor.tokenizer) == [[THOUGHTS[family.name]]]


@some_families(["qwen2_5_vl", "glm4v", "internvl", "gemma3", "idefics2"])
def test_thoughts_are_words_where_the_template_knows_none(family):
    turns = [asks("red.png", "Which digit is this?"), says(f"{THOUGHT}seven")]
    assert trained(family.collator([row_of(turns)]), family.tokenizer) == [expected(family.name, turns)]


BAD_THOUGHTS = {
    "<think>seven": "control token",
    "<think>a</think>seven<think>b</think>c": "control token",
    "Well <think>a</think>seven": "control token",
    "<think>a</think>": "empty answer",
}


@some_families(["qwen3_5", "qwen3_8", "gemma4", "glm46v"])
def test_halves_of_thoughts_and_thoughts_without_answers_are_bad_rows(family):
    collator = family.recipe.collator(enable_thinking=True)
    for answer, reason in BAD_THOUGHTS.items():
        with pytest.raises(sft_llava.BadRow, match=reason):
            collator([row_of([asks("Which?"), says(answer)])])
    with pytest.raises(sft_llava.BadRow, match="control token: </think> in the question"):
        collator([row_of([asks("Which </think>?"), says(f"{THOUGHT}seven")])])


# ------------------------------------------------------------------------------------------------- texts of all kinds
def test_a_typed_stop_or_picture_is_refused(family):
    """Not so </answer>, which is no special token."""
    stops = family.tokenizer.convert_ids_to_tokens(sorted(family.stop_ids))
    for token in [stop for stop in stops if stop != "</answer>"]:
        for turns in ([asks("Which?"), says(f"a {token} b")], [asks(f"Which {token}?"), says("a")]):
            with pytest.raises(sft_llava.BadRow, match=f"control token: {re.escape(token)} in the "):
                family.collator([row_of(turns)])
    picture = family.collator.processor.image_token
    with pytest.raises(sft_llava.BadRow, match="control token|images do not match|unknown placeholder"):
        family.collator([row_of([asks(f"Which {picture}?"), says("a")])])


@some_families(["glm4v"])
def test_a_stop_that_is_no_special_token_ends_an_answer_or_the_row_is_refused(family):
    """GLM-4.1V's own answers end like that."""
    batch = family.collator([row_of([asks("Which?"), says("<answer>six</answer>")])])
    assert trained(batch, family.tokenizer) == [["<answer>six</answer>"]]
    with pytest.raises(sft_llava.BadRow, match="answer not ended.*no stop token be typed"):
        family.collator([row_of([asks("Which?"), says("<answer>six</answer> or seven")])])


@pytest.mark.parametrize("turns", [[says("odd")], [("system", "Be short."), asks("Even?"), says("odd")]])
@some_families(["glm4v", "glm46v"])
def test_an_answer_that_no_question_follows_has_no_end(family, turns):
    """In templates in which the next question ends an answer."""
    with pytest.raises(sft_llava.BadRow, match="answer not ended.*the next turn must be a question"):
        family.collator([row_of([asks("Which?"), says("seven"), *turns])])


@some_families(["aya_vision", "qwen3_vl", "glm46v", "gemma3"])
def test_an_answer_may_be_a_part_of_its_end(family):
    for answer in ["D", "END", "R", "im", "end", "user", "turn", "<", "|>"]:
        turns = [asks("Which?"), says(answer), asks("Which?"), says(answer)]
        assert trained(family.collator([row_of(turns)]), family.tokenizer) == [expected(family.name, turns)]


ANSWERS = [
    "a",
    "x\n\ny",
    "!",
    "user",
    "assistant",
    "USER: ASSISTANT:",
    "« a »",
    "a  b",
    "1. one\n2. two",
    "-100",
    ": a",
]
ANSWERS += ["{{ messages }} {# x #}", "Which?", "é", "שלום \u202eabc", "\ufeffa", "\x1b[1m", "a\u2028b", "\u200ba"]
KINDS = ["qwen3_vl", "qwen3_8", "idefics2", "smolvlm", "idefics3", "gemma3", "internvl", "llava_onevision", "glm46v"]


@some_families(KINDS)
def test_an_answer_may_be_any_text(family):
    for answer in ANSWERS:
        turns = [asks("red.png", "Which?"), says(answer), asks("Which?"), says(answer)]
        assert trained(family.collator([row_of(turns)]), family.tokenizer) == [expected(family.name, turns)]


def test_an_answer_that_begins_with_a_line_break_is_trained_whole_or_refused(family, request):
    """In some templates it would change the prompt's last token."""
    if family.name == "llava_next_llama3":
        request.applymarker(pytest.mark.xfail(strict=True, reason="one line break is taken for the prompt's"))
    for answer in ("\nseven", "\n\nseven"):
        turns = [asks("Which?"), says(answer)]
        try:
            batch = family.collator([row_of(turns)])
        except sft_llava.BadRow as error:
            assert re.search(r"prompt changed.*in a row begin differently", str(error))
        else:
            assert trained(batch, family.tokenizer) == [expected(family.name, turns)]


# --------------------------------------------------------------------------------------------------------- odd rows
ODD = {  # a row, and what is said about it; nothing: it is trained
    "only a system message and a question": ([("system", "Be."), asks("Which?")], "no answer"),
    "only a question": ([asks("Which?")], "no answer"),
    "only an answer": ([says("six")], "order of turns"),
    "an empty answer": ([asks("Which?"), says("")], "empty answer"),
    "a blank answer": ([asks("Which?"), says(" \n\t")], "empty answer"),
    "an empty question": ([asks(""), says("six")], "empty question"),
    "only a picture": ([asks("red.png"), says("six")], ""),
    "a tool": ([asks("Which?"), ("tool", "six"), says("six")], "unknown role"),
    "a question that is not answered": ([asks("Which?"), says("six"), asks("Even?")], ""),
    "a very long answer": ([asks("red.png", "Which?"), says("seven " * 2100)], "too long"),
    "twelve pictures": ([asks(*["red.png"] * 12, "Which?"), says("six")], ""),
    "a picture in an answer": ([asks("Which?"), says("red.png")], "images do not match"),
    "two questions": ([asks("Which?"), asks("red.png", "Which?"), says("six")], ""),
    "two answers": ([asks("Which?"), says("six"), says("odd")], ""),
    "a late system message": ([asks("Which?"), says("six"), ("system", "Be."), asks("Even?"), says("no")], ""),
}
STRICT = dict.fromkeys(["two questions", "two answers", "a late system message"], "order of turns")
ODD_HERE = {  # where a template is stricter
    "gemma3": STRICT,
    "qwen3_vl": {"a late system message": "text left out"},
    "qwen3_8": {"a late system message": "order of turns"},
    "glm46v": dict.fromkeys(["two answers", "a late system message"], "answer not ended"),
}


@some_families(KINDS)
def test_odd_rows_are_named_and_left_out_and_the_others_are_trained(family, write, capsys):
    file = write([row_of(turns) for turns, _ in ODD.values()])
    rows = rows_of_one_answer(family.recipe, file, image_folder=family.folder, on_bad_rows="skip")
    found = dict(re.findall(r"^  row (\d+): (.*?): ", capsys.readouterr().out, re.MULTILINE))
    right = {name: said for name, (_, said) in ODD.items()} | ODD_HERE.get(family.name, {})
    assert found == {str(n): said for n, said in enumerate(right.values()) if said}
    assert {row["row"] for row in rows} == {n for n, said in enumerate(right.values()) if not said}
    for row in rows:
        turns = list(ODD.values())[row["row"]][0]
        if "answer" in row:
            turns = turns[: row["answer"] + 1]
        runs = expected(family.name, turns)
        if family.name in NEXT_TURN and turns[-1][0] == "user":
            runs[-1] = runs[-1].replace(ENDS[family.name], NEXT_TURN[family.name])
        assert trained(family.collator([row]), family.tokenizer) == [runs]


# ----------------------------------------------------------------------------------------------------- odd pictures
SIZES = [(1, 1), (20, 1), (1, 20), (13, 13), (1000, 6), (6, 1000), (300, 14), (1200, 800)]
ODD_PICTURES = {
    "lighton_ocr": "it writes no token for a picture that is one patch high or wide, and the model crashes",
    "mistral3": "the model crashes with a picture of one token",
}


@some_families(TRAINED, ODD_PICTURES)
def test_the_model_takes_pictures_of_any_shape_or_the_row_is_refused(family):
    model = sft_llava.load_model(*family.recipe.parse(load_in_4bit=False)).eval()
    for width, height in SIZES:
        Image.new("RGB", (width, height), "red").save(family.folder / f"{width}x{height}.png")
    names = [f"{width}x{height}.png" for width, height in SIZES]
    for some in [[name] for name in names] + [names[:6]]:
        try:
            batch = family.collator([row_of([asks(*some, "Which?"), says("six")])])
        except sft_llava.BadRow as error:
            assert error.reason and error.detail
            continue
        assert logits(model, {name: value for name, value in batch.items() if name != "labels"}).isfinite().all()


# -------------------------------------------------------------------- LLaVA-1.5 and NeXT: worked out by hand, as ever
NUM_TOKENS = {  # of red.png, 112 x 56, and lime.png, 70 x 112: 4 x 4 patches make 16
    "tiny_llava": (16, 16),
    # red fills two tiles: 4 rows of 8 and a newline each, 36, and 16 for the whole. lime is 5 patches wide and 8 high
    # in 2 x 2 tiles, of which one column is cut on each side: 8 rows of 6 and a newline each, 56, and 16.
    "tiny_next": (52, 72),
}
BY_HAND = {  # what stands there, and what of it is trained; {0} and {1} are the tokens of the two pictures
    "tiny_llava": [
        ("USER: {0}\n{1}\nWhich digits are these? ASSISTANT:", " six and two</s>"),
        (" USER: Even or odd? ASSISTANT:", " even</s>"),
        (" ", ""),
    ],
    "tiny_next": [
        ("[INST] {0}\n{1}\nWhich digits are these? [/INST]", " six and two</s>"),
        (" [INST] Even or odd? [/INST]", " even</s>"),
        (" ", ""),
    ],
}


@pytest.mark.parametrize("folder", BY_HAND)
def test_llava_is_trained_as_ever(folder, request, tmp_path):
    for colour, size in PICTURES.items():
        Image.new("RGB", size, colour).save(tmp_path / f"{colour}.png")
    collator = Recipe("sft_llava", request.getfixturevalue(folder), tmp_path).collator()
    turns = [asks("red.png", "lime.png", "Which digits are these?"), says("six and two")]
    turns += [asks("Even or odd?"), says("even")]
    text, is_trained = "", []  # a bool for each character
    for before, answer in BY_HAND[folder]:
        before = before.format(*["<image>" * count for count in NUM_TOKENS[folder]])
        text += before + answer
        is_trained += [False] * len(before) + [True] * len(answer)
    tokens = collator.processor.tokenizer(text, return_offsets_mapping=True)
    labels = [
        token if end > 0 and is_trained[end - 1] else -100
        for token, (_, end) in zip(tokens["input_ids"], tokens["offset_mapping"])
    ]
    assert sequences(collator([row_of(turns)])) == [(tokens["input_ids"], labels)]
