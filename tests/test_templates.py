"""A chat template's or processor's fault is said of the model, not of a row; what config.json says is filled in."""

import contextlib
import copy
import io
import json
import re
import shutil

import pytest
from PIL import Image
from recipes import FOLDERS, Loaded, Recipe, no_weights, same

from tiny import idefics2, llava, minicpm

MODELS = {  # recipe, the fixture of its folder, the model in it, its chat template
    "sft_llava": ("sft_llava", "tiny_llava", "model", llava.CHAT_TEMPLATE),
    "sft_llava, NeXT": ("sft_llava", "tiny_next", "model", None),
    "idefics2_docvqa": ("idefics2_docvqa", "tiny_forms", "model", idefics2.CHAT_TEMPLATE),
    "dpo_idefics2": ("dpo_idefics2", "tiny_pairs", "model", idefics2.CHAT_TEMPLATE),
    "dpo_idefics2, LLaVA": ("dpo_idefics2", "tiny_llava", "model", llava.CHAT_TEMPLATE),
    "dpo_idefics2, PaliGemma": ("dpo_idefics2", "tiny_paligemma", "model", None),
    "finetune_minicpm_lora": ("finetune_minicpm_lora", "tiny_minicpm", "model", minicpm.CHAT_TEMPLATE),
    "llava_two_stage": ("llava_two_stage", "tiny_parts", "align", None),
}


class Model:
    """A copy of a tiny model, without weights, with other values in its files; and a recipe that is to train it."""

    def __init__(self, name, request, tmp_path):
        self.name = name
        recipe, folder, model, self.template = MODELS[name]
        source = request.getfixturevalue(folder)
        self.source, self.folder = source / model, tmp_path / "changed"
        shutil.copytree(self.source, self.folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
        self.recipe = Recipe(recipe, request.getfixturevalue(FOLDERS[recipe]), tmp_path)
        Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")

    def change(self, file, values):
        """Put these values into a .json file; a dict changes only its own values in the dict that is there."""
        content = json.loads((self.folder / file).read_text())
        for key, value in values.items():
            content[key] = {**content[key], **value} if isinstance(value, dict) else value
        (self.folder / file).write_text(json.dumps(content))

    def set_template(self, template):
        assert template != self.template
        (self.folder / "chat_template.jinja").write_text(template)

    def flags(self, rows=None, model=None):
        path = self.recipe.tmp_path / "rows.json"
        path.write_text(json.dumps(rows or [self.recipe.row("Which digit?", "two")] * 2))
        return self.recipe.flags_for(path, model_name_or_path=model or self.folder)

    def refusal(self, rows=None):
        return self.recipe.refusal(self.flags(rows))

    def printed(self, model=None):
        """What main prints before it loads weights."""
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), pytest.raises(Loaded):
            patch.setattr(self.recipe.module, "load_model", no_weights)
            self.recipe.module.main(self.flags(model=model))
        return out.getvalue()

    def collator(self, model=None):
        return self.recipe.collator(model_name_or_path=model or self.folder)


@pytest.fixture
def model(request, tmp_path):
    return Model(request.param, request, tmp_path)


def of(*names):
    return pytest.mark.parametrize("model", names, indirect=True)


def each(table):
    """{name of a model: {fault: more}} -> a mark: the model and `more` of each fault."""
    cases = [
        pytest.param(name, more, id=f"{name}: {kind}") for name, some in table.items() for kind, more in some.items()
    ]
    return pytest.mark.parametrize("model, fault", cases, indirect=["model"])


def example(printed):
    """The row that main prints."""
    return printed[printed.index("as the model sees it") :]


# --------------------------------------------------------------------------- values of the processor that do not fit
LLAVAS = ["sft_llava", "sft_llava, NeXT", "dpo_idefics2, LLaVA", "llava_two_stage"]
LACKS = {  # values in processor_config.json: what is said of each
    "patch_size null": {"patch_size": None},
    "patch_size wrong": {"patch_size": 7},
    "num_additional_image_tokens 0": {"num_additional_image_tokens": 0},
    "vision_feature_select_strategy null": {"vision_feature_select_strategy": None},
    "vision_feature_select_strategy wrong": {"vision_feature_select_strategy": "full"},
    "all three": {"patch_size": None, "num_additional_image_tokens": 0, "vision_feature_select_strategy": None},
}


@pytest.mark.parametrize("lacks", LACKS.values(), ids=LACKS)
@of(*LLAVAS)
def test_what_a_processor_lacks_is_taken_from_config_json_and_said(model, lacks):
    """The batches are those of the right processor, and it is saved as it should be."""
    right = json.loads((model.folder / "processor_config.json").read_text())
    model.change("processor_config.json", lacks)
    printed, collator = model.printed(), model.collator()
    for name, value in lacks.items():
        said = f"{model.folder}: the processor's {name} {value} is {right[name]}, by config.json"
        assert said in printed
    assert example(printed) == example(model.printed(model.source))
    row = model.recipe.row("Which digit?", "two")
    assert same(collator([row]), model.collator(model.source)([copy.deepcopy(row)]))
    collator.processor.save_pretrained(model.recipe.tmp_path / "saved")
    saved = json.loads((model.recipe.tmp_path / "saved" / "processor_config.json").read_text())
    assert {name: saved[name] for name in lacks} == {name: right[name] for name in lacks}


@of(*MODELS)
def test_nothing_is_said_of_a_processor_that_fits(model):
    assert "by config.json" not in model.printed()


WRITES = r"writes {} (image )?tokens for an image, .* the model makes {}\b"
UNFIT = {  # file, values, what the message says
    "sft_llava": {
        "a larger picture": (
            "processor_config.json",
            {"image_processor": {"crop_size": {"height": 84, "width": 84}, "size": {"shortest_edge": 84}}},
            "",
        ),
    },
    "idefics2_docvqa": {
        "image_seq_len": ("processor_config.json", {"image_seq_len": 9}, WRITES.format(9, 8)),
        "resampler": ("config.json", {"perceiver_config": {"resampler_n_latents": 16}}, WRITES.format(8, 16)),
    },
    "dpo_idefics2": {"image_seq_len": ("processor_config.json", {"image_seq_len": 9}, WRITES.format(9, 8))},
    "dpo_idefics2, PaliGemma": {
        "image_seq_length": (
            "processor_config.json",
            {"image_processor": {"image_seq_length": 9}},
            WRITES.format(9, 16),
        ),
    },
    "llava_two_stage": {
        "a larger picture": (
            "processor_config.json",
            {"image_processor": {"crop_size": {"height": 84, "width": 84}, "size": {"shortest_edge": 84}}},
            "",
        ),
    },
}
UNFIT["dpo_idefics2, LLaVA"] = UNFIT["sft_llava"]


def of_the_model(model, message):
    """Whether a message is about the model, and not about rows."""
    in_rows = re.search(r"\brows? \d|rows\.json|--on_bad_rows|max_length|Traceback", message)
    return str(model.folder) in message and in_rows is None and "\n" not in message


@each(UNFIT)
def test_a_processor_that_does_not_fit_the_model_is_refused(model, fault):
    file, values, expected = fault
    model.change(file, values)
    message = model.refusal()
    assert of_the_model(model, message) and re.search(expected, message), message


# ------------------------------------------------------------------------------------------------------ chat templates
def edited(template, *pairs):
    """A template in which texts are replaced, all of which it has."""
    for old, new in pairs:
        assert old in template, old
        template = template.replace(old, new)
    return template


LLAVA, IDEFICS2, MINICPM = llava.CHAT_TEMPLATE, idefics2.CHAT_TEMPLATE, minicpm.CHAT_TEMPLATE
LEFT_OUT, CHANGED = "whatever the rows: text left out: ", "whatever the rows: prompt changed: "
EACH = "{% for message in messages %}"
NO_ANSWERS = (EACH, EACH.replace(" %}", " if message['role'] != 'assistant' %}"))
NO_QUESTIONS = (EACH, EACH.replace(" %}", " if message['role'] != 'user' %}"))
CAPITALS = ("{{line['text']}}", "{{line['text'].upper()}}")
OF_QUESTIONS = "content['text'] + ' '}}{% endfor"
DIFFER = CHANGED + r".*the prompt has '\\n', the row ' \w"  # in the header of an answer
END, ANSWER_WITHOUT_END = "<end_of_utterance>", "{% if message['role'] == 'user' %}<end_of_utterance>{% endif %}"
FAULTS = {  # what is wrong with a chat template: the template, what the message says
    "sft_llava": {
        "another header": (edited(LLAVA, ("'ASSISTANT:'", "'ASSISTANT now:'")), CHANGED + ".*the prompt has ' now:'"),
        "no answers": (edited(LLAVA, NO_ANSWERS), "ends no answer"),
        "no questions": (edited(LLAVA, NO_QUESTIONS), "left out|0 <image> tokens"),
        "cut off": (edited(LLAVA, ("content['text'] + ' '", "content['text'][:1] + ' '")), "ends no answer"),
        "capital letters": (edited(LLAVA, (OF_QUESTIONS, f"content['text'].upper(){OF_QUESTIONS[15:]}")), LEFT_OUT),
    },
    "idefics2_docvqa": {
        "another header": (edited(IDEFICS2, ("'Assistant:'", "'Assistant:\\n'")), DIFFER),
        "no answers": (edited(IDEFICS2, NO_ANSWERS), LEFT_OUT),
        "no end": (edited(IDEFICS2, (END, ANSWER_WITHOUT_END)), "cannot make a row|whatever the rows"),
        "first text only": (edited(IDEFICS2, (CAPITALS[0], "{{ line['text'] if loop.index < 3 }}")), LEFT_OUT),
        "capital letters": (edited(IDEFICS2, CAPITALS), LEFT_OUT),
    },
    "dpo_idefics2": {
        "another header": (edited(IDEFICS2, ("'Assistant:'", "'Assistant now:'")), CHANGED),
        "no answers": (edited(IDEFICS2, NO_ANSWERS), LEFT_OUT),
        "capital letters": (edited(IDEFICS2, CAPITALS), LEFT_OUT),
    },
    "dpo_idefics2, LLaVA": {"another header": (edited(LLAVA, ("'ASSISTANT:'", "'ASSISTANT now:'")), CHANGED)},
    "finetune_minicpm_lora": {
        "another header": (edited(MINICPM, ("</think>\\n\\n' if loop", "</think>\\n' if loop")), CHANGED),
        "no answers": (edited(MINICPM, ("else '' }}{{ text }}", "else '' }}")), "left out"),
        "no end": (
            edited(MINICPM, ("<|im_end|>\\n' }}", "<|im_end|>\\n' if message.role == 'user' }}")),
            "cannot make a row|whatever the rows",
        ),
        "capital letters": (edited(MINICPM, ("content) | trim", "content) | trim | upper")), "left out"),
    },
}
for name in FAULTS:
    FAULTS[name]["raises"] = (MODELS[name][-1] + "{{ raise_exception('no roles') }}", "no roles")


@each(FAULTS)
def test_a_template_that_does_not_fit_is_refused_by_name(model, fault):
    template, expected = fault
    model.set_template(template)
    message = model.refusal()
    assert of_the_model(model, message) and re.search(expected, message), message


ALL = "for message in messages"
SECOND_TURN = {  # templates that leave out the second question of a longer row
    "sft_llava": edited(LLAVA, (ALL, f"{ALL}[:2] + messages[3:]")),
    "dpo_idefics2": edited(IDEFICS2, (ALL, f"{ALL}[:2] + messages[3:]")),
    "finetune_minicpm_lora": edited(
        MINICPM, (f"{ALL} -%}}{{%- set text", f"{ALL}[:2] + messages[3:] -%}}{{%- set text")
    ),
}


def talk(recipe, *texts):
    """A row of these turns about the red picture."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    turns[0]["content"] = f"<image>\n{texts[0]}"
    if recipe.name == "dpo_idefics2":
        return {"image": "red.png", "question": turns[:-1], "chosen": texts[-1], "rejected": "no"}
    return {"image": "red.png", "messages": turns}


@of(*SECOND_TURN)
def test_a_template_that_leaves_out_a_turn_takes_rows_of_one_and_refuses_longer_ones(model):
    model.set_template(SECOND_TURN[model.name])
    short, long = talk(model.recipe, "What?", "a"), talk(model.recipe, "First thing?", "b", "Second thing?", "c")
    assert same(model.collator()([short]), model.collator(model.source)([copy.deepcopy(short)]))
    message = model.refusal([short, long])
    assert re.search(r"1 of 2 rows(?s:.*)row 1: text left out: .*'Second thing\?', of the user", message), message


OF_FIRST = (OF_QUESTIONS, OF_QUESTIONS.replace("}}", " if loop.first}}"))
FIRST_PART = {  # templates that read the first text of a turn only, as LLaVA-NeXT's does of an answer
    "sft_llava": edited(LLAVA, OF_FIRST),
    "dpo_idefics2, LLaVA": edited(LLAVA, OF_FIRST),
    "finetune_minicpm_lora": edited(MINICPM, ("else part.text }}", "else part.text if loop.index < 3 }}")),
}


@of(*FIRST_PART)
def test_a_template_that_reads_the_first_text_only_reads_all_parts_of_a_text(model):
    parts = [{"type": "text", "text": text} for text in ("Which ", "digit ", "is this?")]
    answer = [{"type": "text", "text": text} for text in ("It is ", "two.")]
    turns = [{"role": "user", "content": [{"type": "image"}, *parts]}, {"role": "assistant", "content": answer}]
    row = {"image": "red.png", "messages": turns}
    if model.recipe.name == "dpo_idefics2":
        row = {"image": "red.png", "question": turns[:1], "chosen": turns[1:], "rejected": "no"}
    whole = talk(model.recipe, "Which digit is this?", "It is two.")
    right = model.collator(model.source)([whole])
    model.set_template(FIRST_PART[model.name])
    assert same(model.collator()([row]), right)


@of("finetune_minicpm_lora")
def test_a_text_after_a_second_image_that_the_template_leaves_out_is_refused(model):
    model.set_template(FIRST_PART[model.name])
    row = {"messages": [{"role": "user", "content": "Is <image> it?"}, {"role": "assistant", "content": "No."}]}
    message = model.refusal([{**row, "image": "red.png"}])
    assert re.search(r"row 0: text left out: .* ' it\?', of the user", message), message
