"""What the tests of other families of models share: which families of tiny/families.py, and conversations for them."""

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from recipes import Recipe
from transformers import AutoProcessor, GenerationConfig

from tiny import families

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
needs_torchvision = pytest.mark.skipif(
    not HAS_TORCHVISION, reason="no torchvision: make test runs this with .venv/vision"
)
REFUSED = families.NO_CHAT_TEMPLATE | families.ENCODER_DECODER
READ = [name for name in families.FAMILIES if name not in REFUSED]
# Transformers 5.24.0 cannot run Llama 4, and it has no LM head where the others have theirs.
TRAINED = [name for name in READ if name != "llama4"]
PICTURES = {"red": (112, 56), "lime": (70, 112), "blue": (56, 56)}  # width and height


def marked(names, faults=None):
    """Families for parametrize: skipped where one needs torchvision and there is none, and where one of `faults`,
    {family: what is wrong}, is known, expected to fail."""
    found = []
    for name in names:
        marks = [needs_torchvision, pytest.mark.torchvision] if name in families.NEED_TORCHVISION else []
        if name in (faults or {}):
            marks.append(pytest.mark.xfail(strict=True, reason=faults[name]))
        found.append(pytest.param(name, marks=marks))
    return found


@dataclass(frozen=True)
class Family:
    """A tiny model of a family in folder/model, and pictures of PICTURES in folder."""

    name: str
    folder: Path

    def __post_init__(self):
        families.build(self.name, self.folder)
        for colour, size in PICTURES.items():
            Image.new("RGB", size, colour).save(self.folder / f"{colour}.png")

    @property
    def recipe(self):
        return Recipe("sft_llava", self.folder, self.folder)

    @functools.cached_property
    def collator(self):
        return self.recipe.collator()

    @functools.cached_property
    def saved(self):
        """The processor as a program that knows nothing of the recipe reads it from the folder of a run."""
        return saved_processor(self.collator.processor, self.folder / "saved")

    @property
    def tokenizer(self):
        return self.collator.processor.tokenizer

    @property
    def stop_ids(self):
        """Of generation_config.json."""
        ids = GenerationConfig.from_pretrained(self.folder / "model").eos_token_id
        return set(ids) if isinstance(ids, list) else {ids}

    def messages(self, turns):
        """Turns -> messages as one would write them for inference."""
        messages = []
        for role, *parts in turns:
            content = [{"type": "text", "text": part} for part in parts]
            for n, part in enumerate(parts):
                if part.endswith(".png"):
                    content[n] = {"type": "image", "image": Image.open(self.folder / part)}
            messages.append({"role": role, "content": content})
        return messages


@pytest.fixture(scope="module", name="built")
def built_families(tmp_path_factory):
    """A function: name -> its Family, built once."""

    @functools.cache
    def build(name):
        return Family(name, tmp_path_factory.mktemp(name))

    return build


def some_families(names, faults=None):
    """A decorator: a test of these families, of which `faults` are expected to fail. It has a fixture `family`."""
    return pytest.mark.parametrize("family", marked(names, faults), indirect=True)


def saved_processor(processor, folder):
    processor.save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


def row_of(turns):
    """Turns, (role, texts and names of pictures in their order), -> a row as the recipe reads it."""
    messages, images = [], []
    for role, *parts in turns:
        texts = ["<image>" if part.endswith(".png") else part for part in parts]
        images += [part for part in parts if part.endswith(".png")]
        messages.append({"role": role, "content": "".join(texts)})
    return {"messages": messages, "images": images}


def asks(*parts):
    """A turn of the user."""
    return ("user", *parts)


def says(text):
    """A turn of the assistant."""
    return ("assistant", text)


CONVERSATIONS = {
    "one turn": [asks("red.png", "Which digit is this?"), says("seven")],
    "several turns": [
        asks("red.png", "Which digit is this?"),
        says("seven"),
        asks("Is it even or odd?"),
        says("odd"),
        asks("Which digit comes next?"),
        says("eight"),
    ],
    "two pictures": [asks("lime.png", "blue.png", "Which digits are these?"), says("six and two")],
    "two turns with a picture": [
        asks("blue.png", "Which digit is this?"),
        says("six"),
        asks("And this?", "lime.png"),
        says("two"),
    ],
    "text only": [asks("Which digit comes after one?"), says("two")],
    "system": [("system", "Be short."), asks("red.png", "Which digit is this?"), says("seven")],
    "emoji": [asks("blue.png", "क्या है 😀?"), says("😀 नमस्ते, Über 漢字")],
    "white space": [asks("blue.png", "Which digit is this?"), says("  seven \n")],
}
