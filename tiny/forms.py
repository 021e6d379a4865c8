"""Small forms: printed field names, each with a value beside it, handwritten (real scans) or printed, and a question.

Values of numbers stand in combs, one box for each digit, as on forms that are made to be read by machines. A row is
written in the schema of nielsr/docvqa_1200_examples (parquet) and as one's own data (JSON and a folder of images).
"""

import functools
import json
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from . import digits

CELL = 14  # pixels: a line's height, a comb's box and the model's patch
WIDTH, HEIGHT = 8 * CELL, 4 * CELL
LINES = (1, 3)  # where fields stand, counted from 0; the title is on line 0
VALUE = 4  # the column, counted from 0 in cells, where values start
BOXES = 3  # of a comb: digits at most
GREY = 200  # of the combs

LANGUAGES = ["de", "en", "es", "fr", "it"]
NUMBERS = {  # printed name of a field for numbers -> what questions call it, in each of LANGUAGES
    "Total": ["der Gesamtbetrag", "the total", "el total", "le total", "il totale"],
    "Weight": ["das Gewicht", "the weight", "el peso", "le poids", "il peso"],
    "Room": [
        "die Zimmernummer",
        "the room number",
        "el número de habitación",
        "le numéro de chambre",
        "il numero di camera",
    ],
    "Page": ["die Seitenzahl", "the page number", "el número de página", "le numéro de page", "il numero di pagina"],
    "Seat": ["die Platznummer", "the seat number", "el número de asiento", "le numéro de siège", "il numero di posto"],
    "Score": ["die Punktzahl", "the score", "la puntuación", "le score", "il punteggio"],
}
IN_WORDS = {
    "City": ["die Stadt", "the city", "la ciudad", "la ville", "la città"],
    "Month": ["der Monat", "the month", "el mes", "le mois", "il mese"],
}
FIELDS = NUMBERS | IN_WORDS
WORDS = {  # at most five letters: against a longer one "City: ..." would count as half right
    "City": ["Rome", "Oslo", "Lima", "Cairo", "Paris", "Delhi", "Tokyo", "Kyiv"],
    "Month": ["March", "April", "May", "June", "July"],
}
TITLES = ["ORDER", "TICKET", "RECORD", "NOTE"]
QUESTIONS = [  # phrasings, each by language; {} is what a field is called
    ["Wie lautet {}?", "What is {}?", "¿Cuál es {}?", "{which} est {} ?", "Qual è {}?"],
    [
        "Wie lautet {} auf diesem Formular?",
        "What is {} on this form?",
        "¿Cuál es {} en este formulario?",
        "{which} est {} sur ce formulaire ?",
        "Qual è {} in questo modulo?",
    ],
    [
        "Laut Formular: wie lautet {}?",
        "According to the form, what is {}?",
        "Según el formulario, ¿cuál es {}?",
        "D'après le formulaire, {which} est {} ?",
        "Secondo il modulo, qual è {}?",
    ],
]
KINDS = {  # kind of a row -> what is asked, for a table
    "one-field": "one field, handwritten",
    "new-number": "one field, handwritten, a number never seen",
    "printed": "one field, printed",
    "two-fields": "two fields, handwritten: one is asked for",
}


def ask(name: str, phrasing: int) -> dict[str, str]:
    """A question about a field, {language: text}."""
    texts = {}
    for language, called, template in zip(LANGUAGES, FIELDS[name], QUESTIONS[phrasing], strict=True):
        which = "quelle" if called.startswith("la ") else "quel"  # French
        text = template.format(called, which=which)
        texts[language] = text[0].upper() + text[1:]
    return texts


def called(name: str, language: str = "en") -> str:
    """What questions call a field, with its article."""
    return FIELDS[name][LANGUAGES.index(language)]


def new_numbers(seed: int) -> set[str]:
    """A fifth of the numbers from 10 to 999, of each length: kept out of the base's training and of the
    fine-tuning."""
    rng = np.random.default_rng([seed, 999])
    return set(map(str, rng.choice(np.arange(10, 100), 18, False))) | set(
        map(str, rng.choice(np.arange(100, 1000), 180, False))
    )


# ---------------------------------------------------------------- one form, filled in and drawn


class Writer:
    """Fills in forms of a seed with scans of one of the sets in `digits.SETS`.

    Args:
        scans: numbers of the scans to write with, an int64 vector.
    """

    def __init__(self, seed: int, scans: torch.Tensor, rng: np.random.Generator):
        self.ink, truth = digits.load()
        self.rng, new = rng, new_numbers(seed)
        self.scans = [scans[truth[scans] == digit].numpy() for digit in range(10)]
        numbers = [[str(n) for n in range(10, 100)], [str(n) for n in range(100, 1000)]]
        self.old = [[n for n in some if n not in new] for some in numbers]
        self.new = [[n for n in some if n in new] for some in numbers]

    def one(self, things):
        return things[self.rng.integers(len(things))]

    def form(self, count: int = 1, new: bool = False, printed: float = 0.0) -> dict:
        """A form of `count` fields: {"title", "fields": [{"name", "value", "line", "scans"}, ...]}; `scans` is None
        where the value is printed, which it is with probability `printed`; half of the printed ones are words."""
        lines = LINES if count == 2 else (self.one(LINES),)
        names = self.rng.permutation(list(NUMBERS)).tolist()
        fields = []
        for line, name in zip(lines, names):
            by_hand = self.rng.random() >= printed
            if not by_hand and self.rng.random() < 0.5:
                free = [name for name in IN_WORDS if name not in [field["name"] for field in fields]]
                name = self.one(free)
                value = self.one(WORDS[name])
            else:
                value = self.one(self.one(self.new if new else self.old))
            scans = [int(self.one(self.scans[int(digit)])) for digit in value] if by_hand else None
            fields.append({"name": name, "value": value, "line": line, "scans": scans})
        return {"title": self.one(TITLES), "fields": fields}

    def draw(self, forms: list[dict], bend: bool) -> torch.Tensor:
        """-> (n, 56, 112) uint8, 255 being white. `bend`: scans are bent, printed words are moved by up to a pixel."""
        flat = [scan for form in forms for field in form["fields"] for scan in field["scans"] or []]
        drawn = iter(())
        if flat:
            large = digits.draw(self.ink[flat], self.rng if bend else None).float()
            drawn = iter(torch.nn.functional.avg_pool2d(large, digits.SIZE // CELL).round().to(torch.uint8).numpy())
        pages = np.full((len(forms), HEIGHT, WIDTH), 255, np.uint8)
        for page, form in zip(pages, forms):
            moves = iter(self.rng.integers(-1, 2, (1 + 2 * len(form["fields"]), 2)) if bend else [(0, 0)] * 5)
            put(page, printed(form["title"]), 0, 2, *next(moves))
            for field in form["fields"]:
                top = field["line"] * CELL
                put(page, printed(field["name"] + ":"), top, 2, *next(moves))
                if field["value"].isalpha():
                    put(page, printed(field["value"]), top, VALUE * CELL + 2, *next(moves))
                    continue
                put(page, comb(), top, VALUE * CELL)
                for column, digit in enumerate(field["value"]):
                    glyph = printed(digit, CELL) if field["scans"] is None else next(drawn)
                    put(page, glyph, top, (VALUE + column) * CELL)
        return torch.from_numpy(pages)


def put(page: np.ndarray, glyph: np.ndarray, top: int, left: int, down: int = 0, right: int = 0) -> None:
    """Draw a glyph, (h, w) uint8, on a page, (56, 112) uint8, in place: the darker of the two is kept."""
    top, left = max(0, top + down), max(0, left + right)
    place = page[top : top + glyph.shape[0], left : left + glyph.shape[1]]
    np.minimum(place, glyph[: place.shape[0], : place.shape[1]], out=place)


@functools.cache
def printed(text: str, width: int | None = None) -> np.ndarray:
    """Printed text, one line high and as wide as it needs, or in the middle of `width` pixels: (14, w) uint8."""
    font = ImageFont.load_default(11)
    left, _, right, _ = font.getbbox(text)
    image = Image.new("L", (width or right, CELL), 255)
    ImageDraw.Draw(image).text(((width - left - right) / 2 if width else 0, 0), text, fill=0, font=font)
    return np.asarray(image)


@functools.cache
def comb() -> np.ndarray:
    """Empty boxes: (14, 42) uint8."""
    boxes = np.full((CELL, BOXES * CELL), 255, np.uint8)
    boxes[-1], boxes[-4:, ::CELL], boxes[-4:, -1] = GREY, GREY, GREY
    return boxes


def words(form: dict) -> tuple[list[str], list[list[float]]]:
    """What stands on a form, in reading order, and where: [x0, y0, x1, y1] as fractions of the page."""
    found = [(form["title"], 0, 2, printed(form["title"]).shape[1])]
    for field in form["fields"]:
        name, value, line = field["name"] + ":", field["value"], field["line"]
        found.append((name, line, 2, printed(name).shape[1]))
        if value.isalpha():
            found.append((value, line, VALUE * CELL + 2, printed(value).shape[1]))
        else:
            found.append((value, line, VALUE * CELL, len(value) * CELL))
    boxes = [
        [left / WIDTH, line * CELL / HEIGHT, (left + width) / WIDTH, (line + 1) * CELL / HEIGHT]
        for _, line, left, width in found
    ]
    return [word for word, *_ in found], boxes


# ---------------------------------------------------------------- rows and schemas


def make_rows(seed: int = 0, train: bool = True, n: int = 6400) -> list[dict]:
    """Questions about forms, as rows {"id", "form", "page": (56, 112) uint8, "asked": a field's name, "phrasing"}.

    Train: `n` rows written with the 600 scans for fine-tuning, each time bent anew: 50 % one handwritten field, 20 %
    one printed field, 30 % two handwritten fields. Test: the 297 held-out scans as they are: 300 rows of one field,
    100 of one field with a number that no training ever showed, 60 printed and 100 of two fields; of these, at most
    `n` rows, evenly from all kinds. The kind, one of `KINDS`, is the end of a row's id.
    """
    rng = np.random.default_rng([seed, 12 if train else 13])
    writer = Writer(seed, digits.split(seed)["tune" if train else "held_out"], rng)
    if train:
        kinds = rng.choice(["one-field", "printed", "two-fields"], n, p=[0.5, 0.2, 0.3]).tolist()
    else:
        kinds = ["one-field"] * 300 + ["new-number"] * 100 + ["printed"] * 60 + ["two-fields"] * 100
        kinds = [kinds[i] for i in np.linspace(0, len(kinds) - 1, min(n, len(kinds))).round().astype(int)]
    forms = [
        writer.form(2 if kind == "two-fields" else 1, new=kind == "new-number", printed=float(kind == "printed"))
        for kind in kinds
    ]
    rows = []
    for i, (kind, form, page) in enumerate(zip(kinds, forms, writer.draw(forms, bend=train), strict=True)):
        asked = writer.one(form["fields"])["name"]
        row = {"id": f"{'train' if train else 'test'}-{i:05d}-{kind}", "form": form, "page": page}
        rows.append(row | {"asked": asked, "phrasing": int(rng.integers(len(QUESTIONS)))})
    return rows


def kind(row_id: str) -> str:
    """The kind of a row (a key of `KINDS`), read off its id."""
    return row_id.split("-", 2)[2]


def answers(row: dict) -> list[str]:
    """The accepted answers, the first as it stands on the form. As in DocVQA, a word is accepted in small letters
    too."""
    value = next(field["value"] for field in row["form"]["fields"] if field["name"] == row["asked"])
    return [value, value.lower()] if value.isalpha() else [value]


def to_docvqa(row: dict) -> dict:
    """A row in the schema of nielsr/docvqa_1200_examples. `answer` is, as there, where the answer is found in
    `words`."""
    found, boxes = words(row["form"])
    right = answers(row)
    start = found.index(row["asked"] + ":") + 1
    return {
        "id": row["id"],
        "image": {"bytes": digits.png(row["page"]), "path": None},
        "query": ask(row["asked"], row["phrasing"]),
        "answers": right,
        "words": found,
        "bounding_boxes": boxes,
        "answer": {"match_score": 1.0, "matched_text": found[start], "start": start, "text": right[0]},
    }


FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "image": datasets.Image(),
        "query": {language: datasets.Value("string") for language in LANGUAGES},
        "answers": datasets.List(datasets.Value("string")),
        "words": datasets.List(datasets.Value("string")),
        "bounding_boxes": datasets.List(datasets.List(datasets.Value("float32"))),
        "answer": {
            "match_score": datasets.Value("float64"),
            "matched_text": datasets.Value("string"),
            "start": datasets.Value("int64"),
            "text": datasets.Value("string"),
        },
    }
)


def write_data(out: Path, name: str, rows: list[dict]) -> None:
    """Write rows as `out/data/NAME.parquet` and once more as `out/json/NAME.json` with `out/json/images/*.png`: there
    a row is {"id", "image" (a file name), "question" (in English), "answers"}."""
    images = Path(out) / "json" / "images"
    images.mkdir(parents=True, exist_ok=True)
    said = [to_docvqa(row) for row in rows]
    table = {column: [row[column] for row in said] for column in FEATURES}
    (Path(out) / "data").mkdir(exist_ok=True)
    datasets.Dataset.from_dict(table, features=FEATURES).to_parquet(Path(out) / "data" / f"{name}.parquet")
    own = []
    for row in said:
        file = f"{row['id']}.png"
        (images / file).write_bytes(row["image"]["bytes"])
        own.append({"id": row["id"], "image": file, "question": row["query"]["en"], "answers": row["answers"]})
    (images.parent / f"{name}.json").write_text(json.dumps(own, indent=1))
