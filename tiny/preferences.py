"""A tiny Idefics2 that reads handwritten digits and yet answers questions about them at random, and pairs of answers,
one right and one hallucinated, to teach it by preference to say what it sees.

`build` makes all of it: a model directory as `save_pretrained` writes it, pairs in the schema of
openbmb/RLAIF-V-Dataset (parquet) and as one's own data (JSON and a folder of images), and questions to be answered by
yes or no in the files of AMBER, a benchmark of hallucinations. No sentence of an answer is new to the base: what DPO
has to change is which one it says.
"""

import itertools
import json
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import Idefics2ForConditionalGeneration, Idefics2Processor, LlamaTokenizer

from . import digits, idefics2
from .digits import SIZE, WORDS

PARITIES = ["even", "odd"]
SIZES = ["smaller than five", "larger than four"]
BRIEFLY = " Please answer yes or no."  # what ends every question of the kinds in YES_NO
QUESTIONS = {  # kind -> its phrasings; {a}: "a seven", {parity}: "odd"
    "digit": ["Which digit is in this image?", "What number does the image show?", "Can you read the digit?"],
    "describe": ["Describe this image.", "Please describe the image in detail.", "What can you see in the image?"],
    "parity": ["Is the digit in this image even or odd?", "Tell me whether the digit is even or odd."],
    "existence": ["Is there {a} in this image?"],
    "state": ["Is the digit in this image {parity}?"],
    "relation": [f"Is the digit in this image {size}?" for size in SIZES],
}
FAVOURITE = 3  # the digit that the base says it sees when it does not look
YES_NO = ["existence", "state", "relation"]
ANSWERS = {  # kind -> ways to say one and the same fact; a pair takes one for each answer, so length tells nothing
    "digit": ["It is {a}.", "The digit in the image is {a}, written by hand."],
    "describe": [
        "The image shows a handwritten {word}, an {parity} digit.",
        "There is {a} in the image, written by hand in black ink on white paper. It is an {parity} digit.",
    ],
    "parity": ["It is {parity}.", "The digit in the image is an {parity} number."],
} | dict.fromkeys(YES_NO, ["{yes_no}"])
AMBER_TYPES = {  # (kind, truth) -> AMBER's own name of it; it names a relation in two ways
    ("existence", "no"): "discriminative-hallucination",
    ("state", "yes"): "discriminative-attribute-state",
    ("state", "no"): "discriminative-attribute-state",
    ("relation", "yes"): "discriminative-relation",
    ("relation", "no"): "relation",
}

# ---------------------------------------------------------------- what is said


def fill(template: str, digit: int = 0, parity: int = 0, yes: bool = False) -> str:
    """A template with its facts."""
    a = f"{'an' if WORDS[digit] == 'eight' else 'a'} {WORDS[digit]}"
    return template.format(a=a, word=WORDS[digit], parity=PARITIES[parity], yes_no="Yes" if yes else "No")


def ask(kind: str, rng: np.random.Generator, digit: int = 0, parity: int = 0) -> str:
    """A question, in one of its phrasings; existence asks for a digit, state for a parity."""
    template = QUESTIONS[kind][rng.integers(len(QUESTIONS[kind]))]
    return fill(template, digit, parity) + BRIEFLY * (kind in YES_NO)


def others(digit: int) -> list[int]:
    return [other for other in range(10) if other != digit]


def facts(kind: str) -> list[dict]:
    """Every fact that an answer of this kind can state, right or wrong, as arguments of `fill`."""
    if kind in YES_NO:
        return [{"yes": True}, {"yes": False}]
    if kind == "parity":
        return [{"parity": parity} for parity in range(2)]
    if kind == "digit":
        return [{"digit": digit} for digit in range(10)]
    return [{"digit": digit, "parity": parity} for digit in range(10) for parity in range(2)]


def right(kind: str, question: str, digit: int) -> dict:
    """The fact that answers a question about a picture of `digit`."""
    if kind == "existence":
        return {"yes": question == fill(QUESTIONS[kind][0], digit) + BRIEFLY}
    if kind == "state":
        return {"yes": question == fill(QUESTIONS[kind][0], parity=digit % 2) + BRIEFLY}
    if kind == "relation":
        return {"yes": (digit > 4) == ("larger" in question)}
    return {name: value for name, value in (("digit", digit), ("parity", digit % 2)) if name in facts(kind)[0]}


def wrong(kind: str, fact: dict, rng: np.random.Generator) -> dict:
    """A fact that is not the case. A description hallucinates another digit, with its parity, or, one time in four,
    only another parity."""
    if kind == "describe":
        if rng.random() < 0.25:
            return fact | {"parity": 1 - fact["parity"]}
        digit = int(rng.choice(others(fact["digit"])))
        return {"digit": digit, "parity": digit % 2}
    false = [other for other in facts(kind) if other != fact]
    return false[rng.integers(len(false))]


def state(kind: str, fact: dict, rng: np.random.Generator) -> str:
    """A sentence that states a fact."""
    return fill(ANSWERS[kind][rng.integers(len(ANSWERS[kind]))], **fact)


KIND = {  # every question -> its kind
    fill(text, digit, parity) + BRIEFLY * (kind in YES_NO): kind
    for kind, texts in QUESTIONS.items()
    for text in texts
    for digit in range(10)
    for parity in range(2)
}
FACT = {kind: {fill(text, **fact): fact for text in ANSWERS[kind] for fact in facts(kind)} for kind in QUESTIONS}
"""{kind: {every sentence that may answer it, right or wrong: the fact that it states}}"""


def judge(question: str, reference: str, prediction: str) -> tuple[bool, bool]:
    """-> (whether a prediction is right, whether it is readable). Readable: it is, letter for letter, one of the
    sentences that may answer the question. Right: it is one that states the same fact as the reference (a right
    answer)."""
    known = FACT[KIND[question]]
    return known.get(prediction) == known[reference], prediction in known


# ---------------------------------------------------------------- rows and schemas


def make_rows(seed: int = 0, train: bool = True, n: int = 3200) -> list[dict]:
    """Pairs, as rows {"id", "scan", "picture": (56, 56) uint8, "question", "chosen", "rejected"}.

    Train: `n` rows on the 600 scans for fine-tuning, each time bent anew. Test: each of the 297 held-out scans, as it
    is, in three questions: the digit, a description, and either its parity or one to be answered by yes or no; of
    these 891, at most `n`, evenly from all kinds. Of the questions to be answered by yes or no, half have the answer
    yes. Four of ten of the rows to train on ask whether some digit is there, which is learnt last.
    """
    rng = np.random.default_rng([seed, 31 if train else 32])
    ink, truth = digits.load()
    mine = digits.split(seed)["tune" if train else "held_out"].numpy()
    if train:
        kinds = rng.choice(list(QUESTIONS), n, p=[0.15, 0.15, 0.1, 0.4, 0.1, 0.1]).tolist()
        pairs = [(kind, int(rng.choice(mine))) for kind in kinds]
    else:
        third = zip(itertools.cycle(["parity", "existence", "parity", "state", "relation"]), mine)
        pairs = [(kind, int(scan)) for kind in ("digit", "describe") for scan in mine]
        pairs += [(kind, int(scan)) for kind, scan in sorted(third)]
        pairs = [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(n, len(pairs))).round().astype(int)]
    scans = [scan for _, scan in pairs]
    rows = []
    for i, ((kind, scan), picture) in enumerate(
        zip(pairs, digits.draw(ink[scans], rng if train else None), strict=True)
    ):
        digit = int(truth[scan])
        about = digit if rng.random() < 0.5 else int(rng.choice(others(digit)))
        question = ask(kind, rng, digit=about, parity=int(rng.integers(2)))
        fact = right(kind, question, digit)
        row = {"id": f"{'train' if train else 'test'}-{i:05d}", "scan": scan, "picture": picture, "question": question}
        rows.append(row | {"chosen": state(kind, fact, rng), "rejected": state(kind, wrong(kind, fact, rng), rng)})
    return rows


def to_rlaif(row: dict) -> dict:
    """A row in the schema of openbmb/RLAIF-V-Dataset; `origin_split` is, as there, a JSON string that says where the
    answers are from and which of two types the question is of."""
    describe = KIND[row["question"]] == "describe"
    origin = {
        "model": "tiny",
        "feedback": "labels",
        "type": "detailed_description" if describe else "question_answering",
    }
    return {
        "ds_name": "tiny-preferences",
        "image": {"bytes": digits.png(row["picture"]), "path": None},
        "question": row["question"],
        "chosen": row["chosen"],
        "rejected": row["rejected"],
        "origin_dataset": "scikit-learn digits",
        "origin_split": json.dumps(origin),
        "idx": row["id"],
        "image_path": f"digits/{row['scan']}.png",
    }


COLUMNS = ["ds_name", "image", "question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path"]
FEATURES = datasets.Features(
    {name: datasets.Image() if name == "image" else datasets.Value("string") for name in COLUMNS}
)


def write_data(out: Path, name: str, rows: list[dict]) -> None:
    """Write rows as `out/data/NAME.parquet` and once more as `out/json/NAME.json` with `out/json/images/*.png`: there
    a row is {"id", "image" (a file name), "question", "chosen", "rejected"}."""
    images = Path(out) / "json" / "images"
    images.mkdir(parents=True, exist_ok=True)
    said = [to_rlaif(row) for row in rows]
    table = {column: [row[column] for row in said] for column in FEATURES}
    (Path(out) / "data").mkdir(exist_ok=True)
    datasets.Dataset.from_dict(table, features=FEATURES).to_parquet(Path(out) / "data" / f"{name}.parquet")
    own = []
    for row, other in zip(rows, said, strict=True):
        file = f"{row['id']}.png"
        (images / file).write_bytes(other["image"]["bytes"])
        own.append({"id": row["id"], "image": file} | {part: row[part] for part in ("question", "chosen", "rejected")})
    (images.parent / f"{name}.json").write_text(json.dumps(own, indent=1))


def make_amber(seed: int = 0, pictures: int = 120) -> list[dict]:
    """Questions to be answered by yes or no, as rows {"id", "scan", "picture", "kind", "query", "truth"}: of each
    picture, of held-out scans, two after a digit that is not there, one for either parity and one relation. As in
    AMBER, no question after what is there is asked, and most have the answer no: seven of ten (AMBER: 66.3 %). Ids
    count from 1."""
    rng = np.random.default_rng([seed, 33])
    ink, truth = digits.load()
    scans = rng.choice(digits.split(seed)["held_out"].numpy(), pictures, replace=False)
    rows = []
    for scan, picture in zip(scans.tolist(), digits.draw(ink[scans])):
        digit = int(truth[scan])
        absent = rng.choice(others(digit), 2, replace=False).tolist()
        asked = [("existence", ask("existence", rng, digit=other)) for other in absent]
        asked += [("state", ask("state", rng, parity=parity)) for parity in range(2)] + [
            ("relation", ask("relation", rng))
        ]
        for kind, question in asked:
            row = {"id": len(rows) + 1, "scan": scan, "picture": picture, "kind": kind}
            row["query"] = question.removesuffix(BRIEFLY)  # who asks it adds these words
            rows.append(row | {"truth": "yes" if right(kind, question, digit)["yes"] else "no"})
    return rows


def write_amber(out: Path, rows: list[dict]) -> None:
    """Write rows of `make_amber` as AMBER's files: `out/amber/query_discriminative.json`, `out/amber/annotations.json`
    and `out/amber/image/*.png`."""
    folder = Path(out) / "amber"
    (folder / "image").mkdir(parents=True, exist_ok=True)
    queries, truths = [], []
    for row in rows:
        file = f"digit-{row['scan']}.png"
        (folder / "image" / file).write_bytes(digits.png(row["picture"]))
        queries.append({"id": row["id"], "image": file, "query": row["query"]})
        truths.append({"id": row["id"], "type": AMBER_TYPES[row["kind"], row["truth"]], "truth": row["truth"]})
    (folder / "query_discriminative.json").write_text(json.dumps(queries, indent=1))
    (folder / "annotations.json").write_text(json.dumps(truths, indent=1))


# ---------------------------------------------------------------- tokenizer, processor, model


def tokenizer() -> LlamaTokenizer:
    """A tokenizer for all that is said of digits."""
    said = ["User:", "Assistant:"] * 10 + list(KIND)
    said += [sentence for sentences in FACT.values() for sentence in sentences]
    said += [text for digit in range(10) for other in range(10) for lesson in lessons(digit, other) for text in lesson]
    return idefics2.trained_tokenizer(said, size=509)


def processor(tok: LlamaTokenizer | None = None) -> Idefics2Processor:
    """`idefics2.processor` for pictures of 56 x 56 px."""
    return idefics2.processor(tok or tokenizer(), height=SIZE, width=SIZE)


def model(tok: LlamaTokenizer, seed: int = 0, hidden: int = 128) -> Idefics2ForConditionalGeneration:
    """`idefics2.model` for pictures of 56 x 56 px. `tok` is a processor's: with the image's tokens."""
    return idefics2.model(tok, seed, hidden, width=SIZE)


# ---------------------------------------------------------------- the base: it sees, and answers at random


def lessons(digit: int, other: int) -> list[tuple[str, str, str]]:
    """What the base learns to say of a picture, truly: (text before the image, text after it, what to say). First
    captions, then checks of what may be there: its digit, parity and size compared with those of `other`.

    The checks begin with Yes or No because DPO on a few thousand pairs only brings out what a model can do: of a base
    that told "the same" from "another", it learnt no answer by yes or no.
    """
    seen, asked = ([fill("{a}", n), PARITIES[n % 2], SIZES[n > 4]] for n in (digit, other))
    checks = [("", f"Check for {b}.", f"{'Yes' if a == b else 'No'}: {a}") for a, b in zip(seen, asked, strict=True)]
    caption = fill("a handwritten {word}, an {parity} digit, ", digit, digit % 2) + seen[2]
    return [("", "Caption.", caption), ("", "Short caption.", f"{seen[0]}, {seen[1]}"), *checks]


def random_answer(rng: np.random.Generator) -> tuple[str, str, str]:
    """A question and an answer that knows nothing of the picture but has habits, as large models have: three of four
    are yes, where it is yes or no, and four of ten have a favourite digit. (Without habits, the picture tips the
    balance.)"""
    kind = list(QUESTIONS)[rng.integers(len(QUESTIONS))]
    question = ask(kind, rng, digit=int(rng.integers(10)), parity=int(rng.integers(2)))
    imagined = FAVOURITE if rng.random() < 0.4 else int(rng.integers(10))
    fact = {"yes": bool(rng.random() < 0.75)} if kind in YES_NO else right(kind, question, imagined)
    return "", question, state(kind, fact, rng)


def lesson(digit: int, rng: np.random.Generator) -> tuple[str, str, str]:
    """One of four at random is a question answered at random, the others are of `lessons`."""
    if rng.random() < 0.25:
        return random_answer(rng)
    other = digit if rng.random() < 0.4 else int(rng.integers(10))
    return lessons(digit, other)[rng.choice(5, p=[0.3, 0.2, 0.3, 0.1, 0.1])]


def train_base(net, proc, seed: int = 0, steps: int = 1500, rows: int = 32, lr: float = 5e-4) -> tuple[float, float]:
    """Train a random model in place.

    Returns: the shares of right captions, and of right comparisons, of 100 of the base's scans, which are kept out of
    its training.
    """
    ink, truth = digits.load()
    mine = digits.split(seed)["base"].numpy()
    rng = np.random.default_rng([seed, 34])

    def loss() -> torch.Tensor:
        scans = rng.choice(mine[:-100], rows)
        said = [lesson(int(digit), rng) for digit in truth[scans]]
        return net(**idefics2.batch(proc, digits.draw(ink[scans], rng), said)).loss

    net.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        idefics2.fit(list(net.parameters()), "base model", loss, steps, lr)
    net.eval()
    scans, rng = mine[-100:], np.random.default_rng([seed, 35])
    scores = []
    for which in (0, 2):
        said = [lessons(int(digit), int(rng.choice([digit, rng.integers(10)])))[which] for digit in truth[scans]]
        scores.append(idefics2.accuracy(net, proc, digits.draw(ink[scans]), said))
    return tuple(scores)


# ---------------------------------------------------------------- all of it


def build(out: Path, seed: int = 0, base_steps: int = 1500, train_rows: int = 3200) -> None:
    """Write `out/model`, `out/data`, `out/json` and `out/amber`. Prints how well the base sees."""
    started = time.time()
    proc = processor()
    net = model(proc.tokenizer, seed)
    captions, comparisons = train_base(net, proc, seed, base_steps)
    net.save_pretrained(Path(out) / "model")
    proc.save_pretrained(Path(out) / "model")
    write_data(out, "train", make_rows(seed, train=True, n=train_rows))
    write_data(out, "test", make_rows(seed, train=False))
    write_amber(out, make_amber(seed))
    size = sum(p.numel() for p in net.parameters()) / 1e6
    took = f"{time.time() - started:.0f} s"
    print(f"{size:.2f} M parameters; {took}")
    print(f"100 pictures it never saw: right captions {captions:.2f}, comparisons {comparisons:.2f}")
