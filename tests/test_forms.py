"""Forms of a row: each accepted one gives the batch of the simplest, and nothing is dropped or misread without a word.

What is not accepted is in test_bad_rows.py; here are columns, keys and splits that would change what a row means."""

import base64
import contextlib
import copy
import io
import json
import re
import unicodedata
from dataclasses import dataclass

import datasets
import pandas
import pyarrow
import pytest
from conftest import COLOURS
from PIL import Image
from recipes import FOLDERS, NAMES, OTHER_ANSWER, Recipe, flat, same, trained

ALIGN = "llava_two_stage, align"
TALKING = ["sft_llava", "finetune_minicpm_lora", "llava_two_stage"]  # a row is a conversation
SETUPS = {name: (name, FOLDERS[name], {}) for name in NAMES}
SETUPS |= {
    "sft_llava, NeXT": ("sft_llava", "tiny_next", {}),
    "finetune_minicpm_lora, 2.6": ("finetune_minicpm_lora", "tiny_minicpm26", {}),
    ALIGN: ("llava_two_stage", "tiny_parts", {"stage": "align"}),
}


@dataclass
class Setup:
    """A recipe with a model, and a collator; red.png and lime.png are in recipe.tmp_path, where files of rows go."""

    name: str
    recipe: Recipe
    settings: dict
    collator: object

    @property
    def talks(self):
        return self.recipe.talks_in_turns

    def row(self, question="Which digit?", answer="two", **more):
        if self.name == ALIGN:
            return {"image": "red.png", "caption": answer, **more}
        return {**self.recipe.row(question, answer), **more}

    def parse(self, rows, **settings):
        """Rows, or the path of a data set -> (settings, training) to read it."""
        path = rows
        if isinstance(rows, list):
            path = self.recipe.tmp_path / "rows.json"
            path.write_text(json.dumps(rows))
        own = {"dataset_name": path, "image_folder": None, "eval_fraction": 0}
        return self.recipe.parse(**{**self.settings, **own, **settings})

    def read(self, rows, **settings):
        """Rows as they are in a file, or its path -> a Dataset of them, as the recipe reads it."""
        settings, _ = self.parse(rows, **settings)
        return self.recipe.module.read_rows(settings.dataset_name, settings.dataset_train_split, settings)

    def load(self, rows, **settings):
        """The same -> (rows to train on, rows to evaluate on, what is printed)."""
        settings, training = self.parse(rows, **settings)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            train, held_out = self.recipe.module.load_data(settings, training, self.collator)
        return train, held_out, printed.getvalue()

    def refusal(self, rows, **settings):
        """The message with which these rows are refused, when they are read or when they are checked."""
        with pytest.raises(SystemExit) as stopped:
            self.load(rows, **settings)
        return str(stopped.value.code)

    def bad_row(self, row):
        """Why the collator refuses a row."""
        with pytest.raises(self.recipe.module.BadRow) as refused:
            self.collator([row])
        return str(refused.value)

    def is_row(self, row, simplest=None):
        """Whether a row gives the batch of the simplest form of the row."""
        return same(self.collator([row]), self.collator([self.row() if simplest is None else simplest]))

    def marked(self, row):
        """A row as main prints it."""
        module, batch = self.recipe.module, flat(self.collator([row]))
        mark = module.mark_trained_pair if "completion_mask" in batch else module.mark_trained_tokens
        return mark(batch, self.collator.processor)


@pytest.fixture(scope="module")
def made():
    """{name: Setup} of those that tests have asked for: tests of one are not all in a row."""
    return {}


@pytest.fixture(params=SETUPS)
def setup(request, made, tmp_path_factory):
    if request.param not in made:
        name, folder, settings = SETUPS[request.param]
        recipe = Recipe(name, request.getfixturevalue(folder), tmp_path_factory.mktemp("forms"))
        for colour in COLOURS:
            Image.new("RGB", (56, 56), colour).save(recipe.tmp_path / f"{colour}.png")
        made[request.param] = Setup(request.param, recipe, settings, recipe.collator(**settings))
    return made[request.param]


def some_setups(*names):
    return pytest.mark.parametrize("setup", names, indirect=True)


def each(tables):
    """{table: (setups that it is for, {form: row})} -> a mark: each form for each of its setups."""
    cases = [
        pytest.param(name, row, id=f"{name}: {form}")
        for names, forms in tables.values()
        for name in names
        for form, row in forms.items()
    ]
    return pytest.mark.parametrize("setup, row", cases, indirect=["setup"])


def png(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (56, 56), colour).save(file, "PNG")
    return file.getvalue()


# -------------------------------------------------------------------------------------------------- accepted forms
BASE64 = base64.b64encode(png()).decode()
DATA_URL = f"data:image/png;base64,{BASE64}"
IMAGE, WHICH = {"type": "image"}, "Which digit?"
MARKED = f"<image>\n{WHICH}"


def part(text):
    return {"type": "text", "text": text}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def said(who, text):
    return {"from": who, "value": text}


def talk(question, answer="two", **more):
    """A row of messages."""
    return {"messages": [turn("user", question), turn("assistant", answer)], **more}


def shown(**image):
    """A row in which the image is in its part, and in no column."""
    return talk([{"type": "image", **image}, part(WHICH)])


CELLS = {  # of the column `image`, for all recipes
    "list of one": ["red.png"],
    "list with a null": [None, "red.png"],
    "path in a dict": {"path": "red.png", "bytes": None},
    "data URL": DATA_URL,
    "base64": BASE64,
    "base64 with line breaks": base64.encodebytes(png()).decode(),
    "list of a data URL": [DATA_URL],
}
CONVERSATIONS = {
    "LLaVA-Factory": talk(MARKED, images=["red.png"]),
    "marker without a line break": talk(f"<image>{WHICH}", images=["red.png"]),
    "image, not images": talk(MARKED, image="red.png"),
    "a list of one in image": talk(MARKED, image=["red.png"]),
    "file_name": talk(MARKED, file_name="red.png"),
    "parts and a column": talk([IMAGE, part(WHICH)], images=["red.png"]),
    "an index": talk([{**IMAGE, "index": 0}, part(WHICH)], images=["red.png"]),
    "image in the part": shown(image="red.png"),
    "path in the part": shown(path="red.png"),
    "url in the part": shown(url="red.png"),
    "base64 in the part": shown(base64=BASE64),
    "data URL in the part": shown(image=DATA_URL),
    "a dict in the part": shown(image={"path": "red.png", "bytes": None}),
    "image_url": shown(type="image_url", image_url={"url": "red.png"}),
    "image_url, a data URL": shown(type="image_url", image_url={"url": DATA_URL, "detail": "auto"}),
    "image_url, a text": shown(type="image_url", image_url=DATA_URL),
    "input_image, input_text": talk(
        [{"type": "input_image", "image_url": DATA_URL}, {"type": "input_text", "text": WHICH}],
        [{"type": "output_text", "text": "two"}],
    ),
    "a part without its type": talk([{"image": "red.png"}, {"text": WHICH}]),
    "role and content": {"conversations": talk(MARKED)["messages"], "image": "red.png"},
    "from and value": {"conversations": [said("human", MARKED), said("gpt", "two")], "image": "red.png"},
    "from and value in messages": {"messages": [said("user", MARKED), said("assistant", "two")], "image": "red.png"},
    "a text in a list": talk([MARKED], ["two"], image="red.png"),
    "roles in capitals": {"messages": [turn("User", MARKED), turn("ASSISTANT", "two")], "image": "red.png"},
    "a dict of lists": {"messages": {"role": ["user", "assistant"], "content": [MARKED, "two"]}, "image": "red.png"},
    "a system turn without a text": {
        "messages": [turn("system", ""), turn("user", MARKED), turn("assistant", "two")],
        "image": "red.png",
    },
    "text parts": talk([IMAGE, part("Which "), part("digit?")], [part("t"), part("wo")], image="red.png"),
    "a blank part": talk([IMAGE, part(""), part(WHICH)], [part("two"), part("")], image="red.png"),
    "null columns": talk(MARKED, image="red.png", images=None, conversations=[], system=None, tools=[], video=""),
    "null keys": {
        "messages": [
            turn("user", MARKED, value=None, tool_calls=None, weight=None, image=None),
            turn("assistant", "two", tool_calls=[], images=[]),
        ],
        "image": "red.png",
    },
}
CONVERSATIONS |= {f"image: {form}": talk(MARKED, image=cell) for form, cell in CELLS.items()}
IMAGE_LAST = {  # of templates that show a turn's images before its text
    "marker at the end": talk(f"{WHICH}\n<image>", image="red.png"),
    "part at the end": talk([part(WHICH), IMAGE], images=["red.png"]),
}
OF_MINICPM = {
    "no marker": talk(WHICH, image="red.png"),
    "placeholder": {"conversations": talk(f"<image_00>\n{WHICH}")["messages"], "image": {"<image_00>": "red.png"}},
    "the placeholder <image>": talk(MARKED, image={"<image>": "red.png", "<image_01>": None}),
    "a data URL by placeholder": talk(f"<image_7>\n{WHICH}", image={"<image_7>": DATA_URL}),
}


def asks(question=WHICH, image="red.png", **more):
    return {"image": image, "question": question, "answers": ["two"], **more}


OF_DOCVQA = {
    "query": {"image": "red.png", "query": WHICH, "answers": ["two"]},
    "answer": {"image": "red.png", "question": WHICH, "answer": "two"},
    "answers a text": asks(answers="two"),
    "blank accepted answers": asks(answers=["", "two", None, " "]),
    "languages": asks({"en": WHICH, "fr": "Quel chiffre ?"}),
    "a language that is null": asks({"en": WHICH, "fr": None}),
    "a message": asks(turn("user", WHICH)),
    "a list of a message": asks([turn("user", MARKED)]),
    "from and value": asks([said("human", MARKED)]),
    "parts": asks([turn("user", [IMAGE, part("Which "), part("digit?")])]),
    "file_name": {"file_name": "red.png", "question": WHICH, "answers": ["two"]},
    "null columns": asks(system=None, video=[], images=None, history=""),
}


def prefers(question=WHICH, chosen="two", rejected=OTHER_ANSWER, image="red.png", **more):
    return {"image": image, "question": question, "chosen": chosen, "rejected": rejected, **more}


def whole(prompt, form=turn, who="assistant"):
    """Two answers as conversations that begin with the prompt."""
    return {"chosen": [prompt, form(who, "two")], "rejected": [prompt, form(who, OTHER_ANSWER)]}


ANSWERS = {"chosen": "two", "rejected": OTHER_ANSWER}
MESSAGES = {key: turn("assistant", text) for key, text in ANSWERS.items()}
LISTS = {key: [message] for key, message in MESSAGES.items()}
VALUES = {key: said("gpt", text) for key, text in ANSWERS.items()}
SHOWN = turn("user", [{**IMAGE, "image": "red.png"}, part(WHICH)])
OF_DPO = {
    "prompt": {"image": "red.png", "prompt": WHICH, **ANSWERS},
    "images": {"images": ["red.png"], "question": WHICH, **ANSWERS},
    "file_name": {"file_name": "red.png", "question": WHICH, **ANSWERS},
    "TRL's messages": {"images": ["red.png"], "prompt": [turn("user", [IMAGE, part(WHICH)])], **LISTS},
    "TRL's messages without an image": {"images": ["red.png"], "prompt": [turn("user", WHICH)], **LISTS},
    "a message as a dict": {"images": ["red.png"], "prompt": turn("user", WHICH), **MESSAGES},
    "text parts": prefers([turn("user", [part("Which "), part("digit?")])], [turn("assistant", [part("two")])]),
    "answers in two parts": prefers(chosen=[turn("assistant", [part("t"), part("wo")])]),
    "from and value": prefers([said("human", MARKED)], **VALUES),
    "LLaVA-Factory's ranking": {"images": ["red.png"], "conversations": [said("human", MARKED)], **VALUES},
    "messages": {"images": ["red.png"], "messages": [turn("user", MARKED)], **MESSAGES},
    "TRL's implicit prompt": {"images": ["red.png"], **whole(turn("user", [IMAGE, part(WHICH)]))},
    "implicit prompt with a marker": {"image": "red.png", **whole(turn("user", MARKED))},
    "implicit prompt of from and value": {"image": "red.png", **whole(said("human", WHICH), said, "gpt")},
    "implicit prompt, prompt null": {"image": "red.png", "prompt": None, **whole(turn("user", WHICH))},
    "explicit prompt and whole conversations": prefers(**whole(turn("user", WHICH))),
    "image in the prompt": {"prompt": [SHOWN], **LISTS},
    "image in the implicit prompt": whole(SHOWN),
    "null columns": prefers(system=None, history=[], images=[], video=""),
}
for ask, table in ((asks, OF_DOCVQA), (prefers, OF_DPO)):  # of one image and one question
    for place, text in {"start": MARKED, "end": f"{WHICH}\n<image>", "end, after a space": f"{WHICH} <image>"}.items():
        table[f"marker at the {place}"] = ask(text)
    table |= {f"image: {form}": ask(image=cell) for form, cell in CELLS.items()}
TABLES = {
    "conversations": ([*TALKING, ALIGN], CONVERSATIONS),
    "images first": (["sft_llava", "sft_llava, NeXT", "llava_two_stage", ALIGN], IMAGE_LAST),
    "MiniCPM": (["finetune_minicpm_lora", "finetune_minicpm_lora, 2.6"], OF_MINICPM),
    "pages": (["idefics2_docvqa"], OF_DOCVQA),
    "pairs": (["dpo_idefics2"], OF_DPO),
}


@each(TABLES)
def test_an_accepted_form_gives_the_batch_of_the_simplest(setup, row):
    """As JSON, and as Parquet where Arrow can hold it: there, keys that other turns have are null."""
    assert setup.is_row(setup.read([row])[0])
    with contextlib.suppress(pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
        table = datasets.Dataset.from_list([row])
        table.to_parquet(setup.recipe.tmp_path / "rows.parquet")
        assert setup.is_row(setup.read(setup.recipe.tmp_path / "rows.parquet")[0])


IN_MEMORY = {"PIL": Image.new("RGB", (56, 56), "red"), "bytes": png(), "embedded": {"bytes": png(), "path": None}}


@pytest.mark.parametrize("image", IN_MEMORY.values(), ids=IN_MEMORY)
def test_an_image_may_be_in_memory(setup, image):
    assert setup.is_row(setup.row(image=image)) and setup.is_row(setup.row(image=[image]))
    if setup.talks:
        for content in ([{**IMAGE, "image": image}, part(WHICH)], [{"image": image}, part(WHICH)]):
            assert setup.is_row(copy.deepcopy(talk(content)))


def test_an_address_of_a_file_is_its_path(setup):
    assert setup.is_row(setup.row(image=f"file://{setup.recipe.tmp_path}/red.png"))
    assert not setup.is_row(setup.row(image=f"file://{setup.recipe.tmp_path}/lime.png"))


def test_a_folder_of_images_with_their_metadata(setup):
    folder = setup.recipe.tmp_path / "imagefolder"
    folder.mkdir(exist_ok=True)
    (folder / "red.png").write_bytes(png())
    row = {key: value for key, value in setup.row().items() if key != "image"}
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "red.png", **row}))
    assert setup.is_row(setup.read(folder)[0])


# ----------------------------------------------------------------------------------- integers, floats, Unicode, blanks
NFD, NFC = (unicodedata.normalize(form, "Café Ünï, Việt, 한국어") for form in ("NFD", "NFC"))


def test_texts_are_read_in_the_form_nfc(setup):
    assert NFD != NFC and setup.is_row(setup.row(NFD, NFD), setup.row(NFC, NFC))
    answer = setup.collator.messages_of(setup.row(WHICH, NFD))[-1]
    assert setup.recipe.module.text_of(answer) == NFC and answer.get("references", [NFC]) == [NFC]
    if setup.talks:
        parts, whole = [part("Cafe"), part("\u0301")], [part("Caf\u00e9")]
        row, composed = (talk([IMAGE, *text], text, image="red.png") for text in (parts, whole))
        assert setup.is_row(row, composed)
    if setup.name == "dpo_idefics2":
        assert setup.is_row(prefers(rejected=NFD), prefers(rejected=NFC))
    if setup.talks and setup.name != ALIGN:
        system, other = (copy.deepcopy(talk(MARKED, image="red.png")) for _ in range(2))
        for row, text in ((system, NFD), (other, NFC)):
            row["messages"].insert(0, turn("system", text))
        assert setup.is_row(system, other)


def test_an_integer_is_its_digits_and_a_float_is_refused_with_the_cast(setup):
    for number in (47, 0, -3, 2**62):
        assert setup.is_row(setup.read([setup.row(answer=number)])[0], setup.row(answer=str(number)))
    for number in (47.0, 1e9):
        message = setup.refusal([setup.row(), setup.row(answer=number)])
        assert re.search(rf"row 1: answer is not a text: {number!r}: .*dtype=str", message), message
    assert "row 0: answer is not a text: True" in setup.refusal([setup.row(answer=True)])


def test_a_number_of_many_digits_is_its_digits_or_refused(setup):
    """64 bits do not hold it."""
    try:
        train = setup.load([setup.row(answer=10**20)])[0]
    except SystemExit as stopped:
        assert re.search(r"row 0\b.*\b(not a text|quotes)|cannot read", str(stopped)), stopped
    else:
        assert setup.is_row(train[0], setup.row(answer="100000000000000000000"))


@some_setups("idefics2_docvqa")
def test_blank_accepted_answers_are_left_out_and_counted(setup):
    rows = [asks(answers=["two", " "]), asks(answers=[None, "two", ""]), asks(), asks(answers=[2, ""])]
    train, _, printed = setup.load(rows)
    assert len(train) == 4 and "3 rows with a blank accepted answer, which is left out" in printed
    assert [setup.collator.answers_of(row) for row in train] == [["two"]] * 3 + [["2"]]
    assert "row 0: empty answer" in setup.refusal([asks(answers=["", " "]), asks()])


@some_setups("idefics2_docvqa", "dpo_idefics2", ALIGN)
def test_nan_in_most_cells_is_a_missing_value(setup):
    """As pandas writes it into a table; in a few cells it is a text."""
    column = {"idefics2_docvqa": "answers", "dpo_idefics2": "chosen"}.get(setup.name, "caption")
    rows = [setup.row(**{column: text}) for text in ("nan", "two", "nan", "nan")]
    few = setup.load([rows[0], *[rows[1]] * 3])[0]
    assert len(few) == 4 and "nan" in setup.marked(few[0])
    message = setup.refusal(rows)
    assert "3 of 4 rows" in message and re.search("row 0: (no answer|one answer|missing column)", message), message
    many = setup.load(rows, text_columns=[column])[0]
    assert len(many) == 4 and "nan" in setup.marked(many[0])


# --------------------------------------------------------------------------------------------------- interleaved text
TWO = ["red.png", "lime.png"]
WORDS = {  # a question with images in it: its words where the chat template shows images first
    "Image-1: <image>\nImage-2: <image>\nDiff?": "Image-1: \nImage-2: \nDiff?",
    "Look at <image> and <image>, and say": "Look at  and , and say",
    "Is<image>or<image>larger?": "Is or larger?",
    "  A\n\n<image>\n\nB\n<image> C ": "  A\n\n\nB\n C ",
    "<image>\n<image>\n\tA  b": "\tA  b",
}


@some_setups("sft_llava", "sft_llava, NeXT", "llava_two_stage")
@pytest.mark.parametrize("text", WORDS)
def test_words_around_images_stay_words_where_the_images_come_first(setup, text):
    row = talk(text, images=TWO)
    question = setup.collator.messages_of(row)[0]["content"]
    assert [part["type"] for part in question] == ["image", "image", "text"]
    assert question[-1]["text"] == WORDS[text] and WORDS[text].strip() in setup.marked(row)
    pixels = setup.collator([row])["pixel_values"].flatten(0, -4)
    assert (pixels[0] != pixels[-1]).any() and not setup.is_row(row, talk(text, images=TWO[::-1]))
    moved = "1 rows with images after a text"
    assert (moved in setup.load([row, talk("<image>\nA", image="red.png")])[2]) == (not text.startswith("<image>"))


@some_setups("finetune_minicpm_lora", "finetune_minicpm_lora, 2.6")
@pytest.mark.parametrize("text", WORDS)
def test_words_around_images_stay_around_them_where_the_template_leaves_them(setup, text):
    """MiniCPM's templates put a line break between parts, and leave out white space around a turn."""
    row = talk(text, images=TWO)
    around = [words for words in re.split("\n?<image>\n?", text) if words.strip()]
    said_around = re.split(
        r"<image_id>.*?</image>", setup.marked(row).partition("user\n")[2].partition("<|im_end|>")[0]
    )
    assert [words.strip() for words in said_around if words.strip()] == [words.strip() for words in around]
    assert "images after a text" not in setup.load([row])[2]


@some_setups("idefics2_docvqa", "dpo_idefics2")
def test_words_around_the_one_image_stay_words(setup):
    for text, words in {
        "Look at <image> and say": "Look at  and say",
        "A<image>B": "A B",
        "A\n<image>B": "A\nB",
    }.items():
        row = setup.row(text)
        assert words in setup.marked(row) and setup.is_row(row, setup.row(words))
        assert "1 rows with images after a text" in setup.load([row, setup.row()])[2]


def test_all_white_space_within_a_text_is_kept(setup):
    if setup.name == ALIGN:
        pytest.skip("the question is left out, and a caption is one line")
    text = "a  b\n\n\tc \n d\u00a0e\r\nf"
    assert text in setup.marked(setup.row(text, "two")) and f"{text}" in setup.marked(setup.row(WHICH, text))


@some_setups("sft_llava", "sft_llava, NeXT", "finetune_minicpm_lora", "llava_two_stage")
def test_parts_of_a_system_turn_are_one_text(setup):
    """LLaVA-NeXT's template reads the first part only."""
    rows = [copy.deepcopy(talk(MARKED, image="red.png")) for _ in range(2)]
    for row, content in zip(rows, ([part("Be brief. "), part("Be kind.")], "Be brief. Be kind."), strict=True):
        row["messages"].insert(0, turn("system", content))
    assert setup.is_row(*rows) and "Be brief. Be kind." in setup.marked(rows[0])


# -------------------------------------------------------------------------------- columns and keys that are not read
CHANGE_MEANING = {
    "video": "film.mp4",
    "audio": ["sound.wav"],
    "history": [["q", "a"]],
    "system": "Be brief.",
    "system_prompt": "Be brief.",
    "tools": [{"name": "zoom"}],
    "img": "lime.png",
    "image_2": "lime.png",
}


def test_columns_that_change_what_a_row_means_are_refused_unless_they_are_ignored(setup):
    for column, value in CHANGE_MEANING.items():
        rows = [setup.row(**{column: None}), setup.row(**{column: value})]
        message = setup.refusal(rows)
        assert re.search(rf": row 1 has '{column}', which is not read.*--ignore_columns {column}$", message), message
        rows = setup.read(rows, ignore_columns=[column])
        assert all(setup.is_row(row) for row in rows)
        assert setup.is_row(setup.read([setup.row(**{column: None})])[0])


def test_an_image_that_is_named_twice_is_read_once(setup):
    """`image_path` beside a read image may name the same one; alone it is not read."""
    for column in ("image_path", "img_name", "image_url"):
        assert setup.is_row(setup.read([setup.row(**{column: "red.png"})])[0])
    if setup.talks:
        row = setup.row()
        row["image_path"] = row.pop("image")
        assert re.search("row 0 has 'image_path'.*--ignore_columns image_path", setup.refusal([row]))


def test_images_beside_image_are_refused(setup):
    message = setup.refusal([setup.row(images=["lime.png"])])
    assert re.search("row 0.*(images? and images? both have a value|'images', which is not read)", message)
    assert "--ignore_columns image" in message
    assert setup.is_row(setup.read([setup.row(images=["lime.png"])], ignore_columns=["images"])[0])


def test_columns_that_are_not_read_are_named_once_and_harmless_ones_not(setup):
    harmless = {"id": 3, "source": "x", "metadata": {"a": 1}, "score": 0.5, "idx": 7, "model": "y", "question_id": 9}
    _, _, printed = setup.load([setup.row(**harmless, reviewer="Ann", remarks="none")] * 3)
    [line] = [line for line in printed.splitlines() if "columns that are not read" in line]
    assert line.endswith("not read: reviewer, remarks")
    assert "not read" not in setup.load([setup.row(**harmless)] * 3)[2]


KEYS = {  # a key of a turn or of one of its parts that would change what it means
    "video": "film.mp4",
    "audio": "sound.wav",
    "images": ["lime.png"],
    "tool_calls": [{"name": "zoom"}],
}
LOSS_KEYS = {"weight": 0, "loss": False, "train": "no", "loss_mask": 0.5}  # say whether an answer is trained


def with_key(setup, key, value, in_part):
    """A row whose question has this key, in its turn or in a part of it."""
    more = {key: value}
    question = turn("user", [{**part(WHICH), **more}]) if in_part else turn("user", WHICH, **more)
    if setup.talks:
        content = [IMAGE, *question["content"]] if in_part else MARKED
        return {"messages": [{**question, "content": content}, turn("assistant", "two")], "image": "red.png"}
    return setup.row([question])


@pytest.mark.parametrize("in_part", [False, True], ids=["turn", "part"])
def test_keys_that_change_what_a_turn_means_are_refused_unless_they_are_ignored(setup, in_part):
    ignoring = setup.recipe.collator(**setup.settings, ignore_columns=list(KEYS))
    simplest = setup.collator([setup.row()])
    for key, value in KEYS.items():
        message = setup.bad_row(with_key(setup, key, value, in_part))
        assert re.search(rf"^key that is not read: turn 0 has '{key}'.*--ignore_columns {key}$", message), message
        assert setup.is_row(with_key(setup, key, None, in_part))
        assert same(ignoring([with_key(setup, key, value, in_part)]), simplest)
    assert setup.is_row(with_key(setup, "name", "Ann", in_part)) and setup.is_row(with_key(setup, "loss", 0, in_part))


@some_setups(*TALKING, ALIGN, "dpo_idefics2")
def test_keys_that_change_what_is_trained_are_refused_unless_they_are_ignored(setup):
    def row(**more):
        answer = turn("assistant", "two", **more)
        return (
            {"messages": [turn("user", MARKED), answer], "image": "red.png"} if setup.talks else prefers(chosen=answer)
        )

    ignoring = setup.recipe.collator(**setup.settings, ignore_columns=list(LOSS_KEYS))
    for key, value in LOSS_KEYS.items():
        message = setup.bad_row(row(**{key: value}))
        assert re.search(rf"^key that is not read: turn \d has '{key}'.*--ignore_columns {key}$", message), message
        assert same(ignoring([row(**{key: value})]), setup.collator([setup.row()]))
        assert all(setup.is_row(row(**{key: usual})) for usual in (None, 1, True))


def test_an_image_in_a_part_beside_the_column_is_refused(setup):
    question = turn("user", [{**IMAGE, "image": "lime.png"}, part(WHICH)])
    row = setup.row([question])
    if setup.talks:
        row = {"messages": [question, turn("assistant", "two")], "image": "red.png"}
    assert re.search(r"^(images do not match|not one)", setup.bad_row(row))


# ------------------------------------------------------------------------------------------- structure written as text
TURNS = talk(MARKED)["messages"]
STRUCTURES = {  # recipe, column: (what a table of pandas or a CSV file has, what it means)
    ("idefics2_docvqa", "answers"): ("['two', '2']", ["two", "2"]),
    ("idefics2_docvqa", "question"): ('{"en": "Which digit?", "fr": null}', {"en": WHICH, "fr": None}),
    ("dpo_idefics2", "chosen"): ('[{"role": "assistant", "content": "two"}]', LISTS["chosen"]),
    ("dpo_idefics2", "rejected"): (str(LISTS["rejected"]), LISTS["rejected"]),
    ("dpo_idefics2", "question"): ("{'content': 'Which digit?', 'role': 'user'}", turn("user", WHICH)),
    **{(name, "messages"): (json.dumps(TURNS), TURNS) for name in TALKING},
}
STRUCTURES = {
    f"{name}: {column} {text:.30}": (name, column, text, value) for (name, column), (text, value) in STRUCTURES.items()
}
in_text = pytest.mark.parametrize(
    "setup, column, text, value", STRUCTURES.values(), ids=STRUCTURES, indirect=["setup"]
)


def of_column(setup, column, cell):
    """The row with this cell."""
    row = setup.row()
    if column == "messages":
        del row["conversations"]
    return {**row, column: cell}


def decoded(setup, rows, message):
    """What the line of Python in a message makes of a table of these rows: the table, and the path of its file."""
    table, path = pandas.DataFrame(copy.deepcopy(rows)), setup.recipe.tmp_path / "decoded.json"
    line = re.search(r"table\[.*?\.map\(.*?\)", message)[0]
    exec(f"import json, ast, pandas\n{line}", {"table": table})
    table.to_json(path, orient="records")
    return table, path


@in_text
def test_structure_written_as_text_is_refused_with_the_line_that_decodes_it(setup, column, text, value):
    """The line does decode it; --ignore_columns is no remedy."""
    rows = [of_column(setup, column, text)] * 20
    for settings in ({}, {"ignore_columns": ["colour"]}):
        message = setup.refusal(rows, **settings)
        assert f"the texts of '{column}' hold lists or dicts" in message
        assert (f"--text_columns {column}" in message) == ("role" not in text)  # a message is never meant as text
    table, path = decoded(setup, rows, message)
    assert all(cell == value for cell in table[column])
    assert setup.is_row(setup.read(path)[0], of_column(setup, column, value))


@some_setups(*TALKING)
def test_parts_written_as_text_are_refused_with_what_decodes_them(setup):
    turns = [turn("user", json.dumps([{**IMAGE, "text": None}, part(WHICH)])), turn("assistant", str([part("two")]))]
    rows = [{"messages": turns, "image": "red.png"}] * 20
    message = setup.refusal(rows)
    assert re.search(r"the texts of 'messages' hold lists or dicts.* within the lists, with json.loads", message)


@in_text
def test_structure_written_as_text_is_text_if_that_is_said_or_few_cells_have_it(setup, column, text, value):
    if column == "messages":
        pytest.skip("a conversation is never a text")
    few = [of_column(setup, column, text)] * 9 + [setup.row()]
    assert text in setup.marked(setup.load(few)[0][0])
    many = [of_column(setup, column, text)] * 20
    assert text in setup.marked(setup.load(many, text_columns=[column])[0][0])


def test_an_answer_in_json_is_an_answer(setup):
    """In a conversation any may be; what is no list of texts may be one anywhere."""
    answers = ["[1, 2]", "[see page 3]", "{a}", "(two)", '{"total": 6}', "[]"]
    if setup.talks and setup.name != ALIGN:
        answers.append('["two", "2"]')
    for answer in answers:
        assert answer in setup.marked(setup.read([setup.row(answer=answer)] * 20)[0])


# --------------------------------------------------------------------------------------------------- splits, held out
def splits(setup, **rows):
    """The path of a saved data set with these splits: {name: [answers]}, None for a question without an answer."""
    tables = {}
    for split, answers in rows.items():
        some = []
        for n, answer in enumerate(answers):
            row = setup.row(f"Question {n}?", answer, image=str(setup.recipe.tmp_path / f"{COLOURS[n % 5]}.png"))
            if answer is None and setup.name == "dpo_idefics2":
                row["rejected"] = None
            elif answer is None and "conversations" in row:
                row["conversations"] = row["conversations"][:1]
            some.append(row)
        tables[split] = datasets.Dataset.from_list(some)
    path = setup.recipe.tmp_path / "splits"
    datasets.DatasetDict(tables).save_to_disk(path)
    return path


TRAIN = ["zero", "one", "two", "three", "four"]


def answers_of(setup, rows):
    return sorted(setup.recipe.module.text_of(setup.collator.messages_of(row)[-1]) for row in rows)


@pytest.mark.parametrize(
    "others, used",
    [
        (["test", "validation"], "test"),
        (["validation", "val", "other"], "validation"),
        (["val", "eval"], "val"),
        (["eval"], "eval"),
    ],
)
def test_the_split_that_is_evaluated(setup, others, used):
    path = splits(setup, train=TRAIN, **{name: [name] * 3 for name in others})
    train, held_out, _ = setup.load(path, eval_fraction=0.2)
    assert answers_of(setup, train) == sorted(TRAIN) and answers_of(setup, held_out) == [used] * 3
    if used != "test":
        train, held_out, _ = setup.load(path, eval_fraction=0.2, dataset_train_split=used)
        assert not {used} & set(answers_of(setup, held_out)) or len(train) + len(held_out) == 3


def test_the_split_of_another_data_set_that_is_evaluated(setup):
    own = [setup.row(f"q{n}", "two") for n in range(5)]
    for others, used in ({"train": 3, "test": 2}, "test"), ({"train": 3, "val": 2}, "val"), ({"train": 3}, "train"):
        path = splits(setup, **{name: [name] * count for name, count in others.items()})
        train, held_out, _ = setup.load(own, eval_dataset_name=path)
        assert len(train) == 5 and answers_of(setup, held_out) == [used] * others[used]


def test_a_test_split_without_answers_is_said_and_rows_are_held_out(setup):
    if setup.name == ALIGN:
        pytest.skip("a picture without its caption is no row")
    path = splits(setup, train=TRAIN, test=[None] * 3)
    train, held_out, printed = setup.load(path, eval_fraction=0.2)
    assert (len(train), len(held_out)) == (4, 1)
    assert "the test split has no answers: --eval_fraction 0.2 of the training images are held out" in printed
    assert "3 of 3 rows" in setup.refusal(path, dataset_test_split="test")
    path = splits(setup, train=TRAIN, test=["two", None, "two"])
    assert re.search("1 of 3 rows of the evaluation data(?s:.*)row 1: no answer", setup.refusal(path))


def test_no_more_rows_are_held_out_than_are_scored(setup):
    """Also where rows share an image, which keeps them on one side."""
    rows = [setup.row(f"q{n}", "two") for n in range(6)]
    rows += [setup.row(f"r{n}", "two", image=f"{colour}.png") for n, colour in enumerate(COLOURS[1:])]
    for most in (1, 2, 3, 100):
        train, held_out, printed = setup.load(rows, eval_fraction=0.6, max_eval_rows=most)
        assert 1 <= len(held_out) <= most and len(train) + len(held_out) == 10
        assert ("less than --eval_fraction 0.6 is held out" in printed) == (most < 3) or most == 3


# -------------------------------------------------------------------------------------- web addresses, base64, MiniCPM
ADDRESSES = ["https://example.org/cat.png", "http://example.org/cat.png", "s3://bucket/cat.png", "gs://bucket/cat.png"]


def places_of(setup, image):
    """Rows with this image in a column, and in a part where there are parts."""
    rows = [setup.row(image=image), setup.row(image=[image])]
    if setup.talks:
        rows += [shown(image=image), shown(url=image), shown(type="image_url", image_url={"url": image})]
    return rows


def test_a_web_address_is_refused(setup):
    for address in ADDRESSES:
        for row in places_of(setup, address):
            message = setup.bad_row(row)
            assert re.search(rf"^web address: {re.escape(address)}: .*save it to a file", message), message


def test_base64_is_never_printed_whole(setup):
    noise = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(noise, "PNG")
    cut_off, zeros = (base64.b64encode(data).decode() for data in (noise.getvalue()[:-5000], bytes(30_000)))
    for text in (f"data:image/png;base64,{cut_off}", cut_off, zeros, f"data:image/png;base64,A{cut_off}"):
        for row in places_of(setup, text):
            message = setup.bad_row(row)
            assert re.search("^(unreadable image|malformed image)", message) and len(message) < 600, message


@some_setups("finetune_minicpm_lora", "finetune_minicpm_lora, 2.6")
def test_an_answer_may_write_of_markers(setup):
    for text in ("the tag <image is cut", "use <image_00> there", "image>"):
        [[learnt]] = trained(setup.collator([setup.row(answer=text)]), setup.collator.processor.tokenizer)
        assert learnt == f"{text}<|im_end|>"


@some_setups("finetune_minicpm_lora")
def test_a_thought_is_trained_with_enable_thinking(setup):
    rows = [
        setup.row(answer=f"<think>{thought}</think>{answer}")
        for thought, answer in (("\nIt has a loop.\n", "\n\ntwo"), ("It has a loop.", "two"))
    ]
    collator = setup.recipe.collator(enable_thinking=True)
    for row in rows:
        [[learnt]] = trained(collator([row]), collator.processor.tokenizer)
        assert learnt == "It has a loop.\n</think>\n\ntwo<|im_end|>"
        assert "--enable_thinking" in setup.refusal([row])
    earlier = talk(MARKED, "<think>x</think>one", image="red.png")
    earlier["messages"] += talk("And?")["messages"]
    assert "thought in an earlier answer" in setup.refusal([earlier])


# ------------------------------------------------------------------------------------------- what real data also have
MEDIA = {  # a column beside the image, and its value
    "reference_image": "lime.png",
    "reference_images": ["lime.png"],
    "image_list": ["lime.png"],
    "other_image": {"bytes": None, "path": "lime.png"},
    "chat_history": [["a", "b"]],
    "system_instruction": "Be brief.",
}
HARMLESS = {"image_source": "coco/1.jpg", "coco_url": "http://a/1.jpg", "image_hash": "a1.png", "file_name": "1.png"}


@pytest.mark.parametrize("column", MEDIA)
def test_a_second_image_or_context_under_any_name_is_refused(setup, column):
    message = setup.refusal([setup.row(), setup.row(**{column: MEDIA[column]})])
    assert re.search(f"row 1 has '{column}', which is not read.*--ignore_columns {column}", message)


def test_what_is_said_about_the_image_is_harmless(setup):
    train, _, printed = setup.load([setup.row(**HARMLESS)] * 3)
    assert len(train) == 3 and setup.is_row(train[0])


ARRAYS = [
    "['a' None]",
    "['a', nan]",
    "['a0' 'a1' ... 'a9']",
    "[{'role': 'user'} {'role': 'assistant', 'content': 'a'}]",
]
TEXTS = ["{'vi': 'a'}", '{"zh-CN": "a", "en-US": "b"}', "[\"it's\", ' ']", "array(['a', 'b'], dtype=object)"]


@some_setups("idefics2_docvqa")
@pytest.mark.parametrize("text", ARRAYS + TEXTS)
def test_arrays_written_as_text_have_a_remedy_of_their_own(setup, text):
    message = setup.refusal([setup.row() | {"answers": text}] * 20)
    is_array = text in ARRAYS or text.startswith("array")
    assert (".map(list)" in message) == is_array and "the texts of 'answers' hold lists or dicts" in message


@some_setups("sft_llava", "finetune_minicpm_lora", "llava_two_stage")
@pytest.mark.parametrize("key, bad, good", [("mask", 1, 0), ("no_loss", True, False), ("loss_mask", 0, 1)])
def test_a_turn_that_says_it_is_not_trained_is_bad(setup, key, bad, good):
    def row(value):
        turns = setup.row()["conversations"]
        return setup.row(conversations=[turns[0], {**turns[1], key: value}])

    assert f"key that is not read: turn 1 has '{key}'" in setup.bad_row(row(bad))
    assert setup.is_row(row(good))


@some_setups("llava_two_stage", ALIGN)
def test_a_caption_is_read_in_align_only(setup):
    row = setup.row()
    if setup.name == ALIGN:
        assert "two formats" in setup.bad_row(row | {"conversations": [said("human", "q"), said("gpt", "a")]})
        _, held_out, printed = setup.load(
            *[splits(setup, train=["one", "two", "three"], test=[None, None])], eval_fraction=0.4
        )
        assert len(held_out) == 1 and "no answers" in printed
    else:
        assert setup.is_row(row | {"caption": "a picture"})


@some_setups("sft_llava", "finetune_minicpm_lora", "llava_two_stage")
def test_turns_as_a_dict_of_lists(setup):
    turns = setup.row()["conversations"]
    row = setup.row(conversations={key: [turn[key] for turn in turns] for key in turns[0]})
    assert setup.is_row(row)
    row["conversations"] = {key: values[: n + 1] for n, (key, values) in enumerate(row["conversations"].items())}
    assert "no conversation" in setup.bad_row(row)
