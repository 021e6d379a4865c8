"""Ask a fine-tuned model, or the untouched one beneath it: one question, or a whole data set into a .jsonl.

    python tools/generate.py llava-lora --image cat.jpg --question "What is this?"
    python tools/generate.py llava-lora --dataset_name test.json --image_folder images --output after.jsonl
    python tools/generate.py llava-lora --dataset_name test.json --output before.jsonl --base_only
    python tools/generate.py llava-lora --output held_out.jsonl     # the rows that the run itself held out
    python tools/generate.py llava-lora --dataset_name test.json --output after.jsonl --resume   # asks the rest
    python tools/generate.py merged-model --image cat.jpg --question "What is this?"
    python tools/generate.py my-model --recipe idefics2_docvqa.py --image page.png --question "What is the total?"
    python tools/generate.py RUN --dataset_name query_discriminative.json --image_folder image \\
        --question_column query --append "Please answer yes or no." --output amber.jsonl     # on to evals/amber.py

RUN is what a recipe saved (an adapter with its settings.yaml, or a whole model), what tools/merge_adapter.py made of
it, or any model that a recipe can load. No file of RUN chooses what is executed: its settings.yaml names one of the
five recipes here, any other is named by --recipe, and a model's own code (MiniCPM-V 2.6) needs --trust_remote_code.
A row of several turns gives one prediction for each: asked with the right answers to the turns before it. Every other
flag is the recipe's own (--use_cpu, --load_in_4bit false, --on_bad_rows skip, ...). A line of the output has: row, id,
turn, images (how many), question, reference (a list where several answers are accepted, null where the row has none),
prediction; of a run with --enable_thinking also thought, what the model said before its answer (all of it, where
--max_new_tokens were too few for an answer).
"""

import bisect
import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.program import fail, flag_parser, parse_beside_recipe, start  # noqa: E402
from tools.runs import (  # noqa: E402
    answering,
    generation_options,
    given_settings,
    load,
    load_collator,
    load_model,
    load_recipe,
    own_rows,
    put_on,
    rows_of,
    user_turn,
)
from workbench.workbench import question_turn  # noqa: E402

# Image tokens of one picture at most, by kind of processor: LLaVA-NeXT's five views. Others may make any number.
MOST_IMAGE_TOKENS = dict.fromkeys(
    "LlavaProcessor LlavaNextProcessor Idefics2Processor PaliGemmaProcessor MiniCPMVProcessor".split(), 5 * 576 + 100
)
# Flags that answers depend on.
ANSWER_FLAGS = ("base_only", "append", "batch_size", "max_new_tokens", "temperature")


@dataclasses.dataclass
class Question:
    """One line of the output, and what the model is asked for it."""

    messages: list  # up to the question
    line: dict  # without its prediction
    rows_done: int  # how many rows are answered with it


def parse(argv=None):
    """-> (own arguments, the recipe's flags). Raises SystemExit."""
    parser = flag_parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="folder that a recipe wrote, or a model")
    parser.add_argument("--question", help="one question, instead of a data set")
    parser.add_argument("--image", action="append", default=[], help="a picture to ask it about; may be repeated")
    parser.add_argument("--system", help="system message before the question")
    parser.add_argument("--append", metavar="TEXT", help="put TEXT after every question, with a space between")
    parser.add_argument("--output", type=Path, help="the .jsonl to write; without it, answers are only printed")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT where it exists")
    parser.add_argument("--resume", action="store_true", help="go on where OUTPUT ends, with the same flags")
    parser.add_argument("--base_only", action="store_true", help="leave the adapter out: the untouched model")
    parser.add_argument("--batch_size", type=int, default=8, help="questions at once (default 8)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy; above it, sampled")
    parser.add_argument(
        "--recipe",
        type=Path,
        help="file that trained RUN; it is executed (default: the recipe that RUN's settings.yaml names, else "
        "sft_llava.py)",
    )
    args, recipe_flags = parse_beside_recipe(parser, argv)
    check_question(args, recipe_flags)
    if args.resume and (args.overwrite or not args.output):
        fail("--resume goes on with an --output, --overwrite begins it anew: one of them, and an --output")
    if args.output:
        check_output(args)
    if min(args.batch_size, args.max_new_tokens) < 1 or not 0 <= args.temperature < math.inf:
        fail("--batch_size and --max_new_tokens must be at least 1, --temperature 0 or more")
    return args, recipe_flags


def check_question(args, recipe_flags):
    """Raises SystemExit for flags about questions that do not go together."""
    if args.question is not None and not args.question.strip():
        fail("--question is blank")
    if args.append is not None and not args.append.strip():
        fail("--append is blank")
    if args.image and args.question is None:
        fail("--image needs a --question about it")
    if args.question is not None and any(flag.startswith(("--dataset_name", "--data_path")) for flag in recipe_flags):
        fail("--question and a data set: one of them")


def check_output(args):
    """Raises SystemExit where --output cannot be written: now, and not when the weights are loaded."""
    if args.output.is_dir():
        fail(f"--output {args.output} is a folder: needed is the .jsonl to write")
    if args.output.exists() and not args.overwrite and not args.resume:
        fail(f"{args.output} exists: choose another --output, --overwrite it, or --resume it")
    folder = args.output.absolute().parent
    if not folder.is_dir():
        fail(f"--output {args.output}: there is no such folder")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        fail(f"--output {args.output} cannot be written: {e}")


# ----------------------------------------------------------------------------------------------------------- questions


def add_text(text, message):
    """A message -> it, or, of the user, a copy with the text after its words. None adds nothing."""
    if text is None or message["role"] != "user":
        return message
    content = list(message["content"])
    places = [n for n, part in enumerate(content) if part["type"] == "text"]
    if places:
        last = content[places[-1]]
        content[places[-1]] = {**last, "text": f"{last['text']} {text}"}
    else:  # nothing but a picture
        content.append({"type": "text", "text": text})
    return {**message, "content": content}


def questions_of(recipe, collator, row, append=None):
    """A row, and a text to add to every question -> [(messages up to a question, turn, question, reference)]: one for
    each turn of the assistant, and one more, without a reference, where the last turn is the user's. Of a row that
    the recipe made for its last answer only, that is the one. Raises the recipe's BadRow."""
    messages = [add_text(append, message) for message in collator.messages_of(row)]
    texts = [recipe.text_of(message) for message in messages]
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    has_one_answer = getattr(collator, "one_answer", False) and row.get("answer") is not None
    questions = []
    for turn, n in enumerate(turns):
        if n < len(messages) - 1 and has_one_answer:
            continue  # another row is for it
        question = texts[n - 1] if n else ""
        questions.append((messages[:n], turn, question, messages[n].get("references", texts[n])))
    if messages and messages[-1]["role"] == "user":
        questions.append((messages, len(turns), texts[-1], None))
    return questions


def count_images(messages):
    """How many images a conversation has."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def longest_input(settings):
    """How many tokens a model reads with its answer, by its configuration; infinity where that does not say."""
    name = settings.model_name_or_path or ""  # parts that are yet to be joined have none
    revision, most = settings.model_revision, None
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False).get_text_config()
        most = getattr(config, "max_position_embeddings", None)
    except (OSError, ValueError):  # load_model has a message for that, but MiniCPM-V 2.6 has code of its own
        with contextlib.suppress(OSError, ValueError):
            most = PreTrainedConfig.get_config_dict(name, revision=revision)[0].get("max_position_embeddings")
    return most or math.inf


def too_long(collator, messages, most):
    """What is wrong with a conversation that leaves no room for an answer; None where it does. Pictures are prepared
    only where it could be too long."""
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    tokens = 200 + sum(len(text.encode()) for text in texts)  # at most, the template's too
    if count_images(messages):
        tokens += MOST_IMAGE_TOKENS.get(type(collator.processor).__name__, math.inf) * count_images(messages)
    if tokens < most or most == math.inf:
        return None
    count = collator.tokenize([messages], prompt=True)["input_ids"].shape[1]
    if count < most:
        return None
    return f"too long: {count} tokens with its pictures, and the model reads {most} with its answer; shorten it"


def readable(recipe, collator, rows, settings, append):
    """Rows -> those that can be asked about; read once before any weights load. Raises SystemExit where a row cannot
    be read, unless such rows are to be skipped: then they are listed."""
    good, problems = [], []
    most = longest_input(settings)
    for n, row in enumerate(tqdm(rows, desc="Checking")):
        try:
            questions = questions_of(recipe, collator, row, append)
            problem = None
            if questions:
                problem = too_long(collator, questions[-1][0], most)  # the last one holds all before it
        except recipe.BadRow as e:
            problem = e
        if problem:
            problems.append(f"  row {row['row']}: {problem}")
        else:
            good.append(n)
    if problems:
        report = [f"{len(problems)} of {len(rows)} rows cannot be read", *problems[:20]]
        if len(problems) > 20:
            report.append(f"  ... and {len(problems) - 20} more")
        if not good:
            fail("\n".join([*report, "No row would be left."]))
        if settings.on_bad_rows != "skip":
            fail("\n".join([*report, "Fix these rows, or answer the others: --on_bad_rows skip"]))
        print("left out:", "\n".join(report), file=sys.stderr)
    return rows.select(good)


def forget_own_data(settings, given):
    """Nothing of what the run says of its own data goes for another data set."""
    for field in dataclasses.fields(settings):
        name = field.name
        is_about_data = name.startswith(("dataset_", "eval_dataset_")) or name.endswith("_column")
        if (is_about_data or name == "image_folder") and name not in given:
            setattr(settings, name, field.default)


def rows_to_ask(args, recipe_flags, recipe, settings, training, collator):
    """The rows of the data set that is given, or else those that the run held out. Raises SystemExit."""
    given = given_settings(recipe_flags, training)
    if "dataset_name" not in given:
        rows = own_rows(recipe, args.run, settings, training, collator)
        if rows is None:
            fail(f"the run in {args.run} held no rows out: give --dataset_name")
        return rows
    forget_own_data(settings, given)
    rows = rows_of(recipe, settings.dataset_name, settings.dataset_train_split, settings)
    return readable(recipe, collator, rows, settings, args.append)


def questions_about(rows, recipe, collator, append):
    """Yields the Questions of rows."""
    for n, row in enumerate(rows):
        questions = questions_of(recipe, collator, row, append)
        for k, (messages, turn, question, reference) in enumerate(questions, start=1):
            line = {"row": row.get("row"), "id": row.get("id"), "turn": turn, "images": count_images(messages)}
            line |= {"question": question, "reference": reference}
            yield Question(messages, line, rows_done=n + 1 if k == len(questions) else n)


def question_typed(args, recipe, collator, settings):
    """The Question of --question, --image and --system. Raises SystemExit."""
    try:
        turn = user_turn(collator, args.question, [recipe.load_image(path) for path in args.image])
    except recipe.BadRow as e:
        fail(e)
    messages = [add_text(args.append, turn)]
    if args.system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": args.system}]})
    if not args.image:
        try:
            collator.tokenize([messages], prompt=True)
        except ValueError:  # PaliGemma's processor takes no texts without an image
            fail("this model cannot be asked without an --image")
    problem = too_long(collator, messages, longest_input(settings))
    if problem:
        fail(f"the question is {problem}")
    line = {"row": None, "id": None, "turn": 0, "images": len(args.image)}
    line |= {"question": recipe.text_of(messages[-1]), "reference": None}
    return Question(messages, line, rows_done=1)


# -------------------------------------------------------------------------------------------------------------- resume


def record(output):
    """Where it stands how a file of answers was begun."""
    return output.with_name(f"{output.name}.flags")


def conditions(args, recipe_flags):
    """What answers depend on beside the questions: of one file it must stay the same."""
    written = max((file.stat().st_mtime for file in Path(args.run).glob("*.safetensors")), default=None)
    return {
        "run": os.path.realpath(args.run),
        "written": written,
        **{name: getattr(args, name) for name in ANSWER_FLAGS},
        "recipe": args.recipe and str(args.recipe),
        "flags": recipe_flags,
    }


def check_conditions(args, recipe_flags):
    """Raises SystemExit where a file is to be resumed by another model, or in another way."""
    path = record(args.output)
    try:
        begun = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        fail(
            f"--resume {args.output}: nobody knows how it was begun ({path.name} beside it is missing or damaged): "
            "--overwrite it, or choose another --output"
        )
    now = conditions(args, recipe_flags)
    changes = [f"{name} {begun.get(name)} -> {value}" for name, value in now.items() if begun.get(name) != value]
    if changes:
        fail(
            f"--resume {args.output}: it was begun otherwise ({', '.join(changes)}): give the flags that it was begun "
            "with, or choose another --output"
        )


def without_prediction(text):
    """A line of a file of answers -> all but its prediction; None where it is no such line."""
    try:
        line = json.loads(text)
        line.pop("prediction")
        line.pop("thought", None)
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    return line


def unanswered(path, questions, batch_size):
    """A file of answers and the Questions -> (its bytes that stay, lines in them, rows that are done with them, an
    iterator of the Questions that are left, or None).

    What is left begins with a whole batch, so that the answers are those of a run that nothing interrupted. Raises
    SystemExit where the file is no beginning of answers to these questions.
    """
    lines = []
    if path.exists():
        lines = path.read_bytes().split(b"\n")[:-1]  # behind the last line end: nothing, or half a line
    batch, size = [], 0  # a batch that is not whole yet; all bytes that were read
    stay = kept = rows_done = 0
    for number, text in enumerate(lines, start=1):
        question = next(questions, None)
        if question is None or without_prediction(text) != json.loads(json.dumps(question.line)):
            fail(
                f"--resume {path}: line {number} is no answer to the question that would be asked there: give the "
                "flags that the file was begun with, or choose another --output"
            )
        batch.append(question)
        size += len(text) + 1
        if len(batch) == batch_size:
            stay, kept, rows_done, batch = size, number, question.rows_done, []
    following = next(questions, None)
    if following is None:
        return size, len(lines), None, None
    return stay, kept, rows_done, itertools.chain(batch, [following], questions)


# ------------------------------------------------------------------------------------------------------------- answers


def answer(model, collator, conversations, args):
    """Conversations -> {"prediction"} of each, of a model that thinks also {"thought"}: texts that end at a stop token
    or after max_new_tokens."""
    batch = collator.tokenize(conversations, prompt=True).to(model.device)
    with answering(model):
        ids = model.generate(**batch, **generation_options(collator, args))
    answers = ids[:, batch["input_ids"].shape[1] :].tolist()
    if getattr(collator, "enable_thinking", False):
        return [split_thought(collator, ids) for ids in answers]
    texts = collator.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [{"prediction": text.strip()} for text in texts]


def split_thought(collator, ids):
    """The tokens of a thought and an answer -> {"prediction", "thought"}, one of them empty where there is none. What
    the chat template writes before and after a thought tells them apart."""
    render, decode = collator.processor.apply_chat_template, collator.processor.tokenizer.decode
    question = question_turn("question", images=[])
    said = {"role": "assistant", "content": [{"type": "text", "text": "(said)"}], "reasoning_content": "(thought)"}
    prompt = render([question], add_generation_prompt=True)
    begin, _, rest = render([question, said]).removeprefix(prompt).partition("(thought)")
    begin, end = begin.strip(), rest.partition("(said)")[0].strip()  # begin is empty where the prompt has it

    ids = list(itertools.takewhile(lambda token: token not in collator.stop_ids, ids))
    if not decode(ids).strip().startswith(begin):
        return {"prediction": decode(ids, skip_special_tokens=True).strip(), "thought": ""}
    length = 1 + bisect.bisect_left(range(len(ids)), True, key=lambda n: end in decode(ids[: n + 1]))
    thought = decode(ids[:length]).strip().removeprefix(begin).removesuffix(end).strip()
    return {"prediction": decode(ids[length:], skip_special_tokens=True).strip(), "thought": thought}


def ask_all(model, recipe, collator, questions, args, file, bar, count):
    """Write the answers to all questions into a file, batch by batch, `count` of which are there. Returns how many
    are there then. Raises SystemExit where data or disk fail."""
    try:
        while batch := list(itertools.islice(questions, args.batch_size)):
            answers = answer(model, collator, [question.messages for question in batch], args)
            for question, said in zip(batch, answers):
                text = json.dumps(question.line | said, ensure_ascii=False)
                if args.question is not None and not args.output:
                    text = "\n\n".join(filter(None, (said.get("thought"), said["prediction"])))
                print(text, file=file, flush=True)
                count += 1
            bar.update(batch[-1].rows_done - bar.n)
    except recipe.BadRow as e:
        fail(f"the data changed since they were looked at: {e}")
    except OSError as e:
        if not args.output:
            raise
        fail(
            f"--output {args.output} cannot be written, after {count} answers: {e.strerror or e}; "
            "fix that, and go on with --resume"
        )
    return count


def check_typed_text(args, collator):
    """Raises SystemExit for a text that the tokenizer would not read as text."""
    for flag, text in (("--question", args.question), ("--system", args.system), ("--append", args.append)):
        for token in collator.control_tokens:
            if token in (text or ""):
                fail(
                    f"{token} in {flag} would become a real control token; take it out (pictures are given by --image)"
                )


def main(argv=None):
    """Parse, load, ask, write."""
    args, recipe_flags = parse(argv)
    recipe = load_recipe(args.recipe, args.run)
    is_adapter, processor, settings, training = load(recipe, args.run, recipe_flags, args.base_only)
    processor.tokenizer.padding_side = "left"
    collator = load_collator(recipe, processor, settings, training)
    check_typed_text(args, collator)
    if args.question is not None:
        questions, num_rows = iter([question_typed(args, recipe, collator, settings)]), 1
    else:
        rows = rows_to_ask(args, recipe_flags, recipe, settings, training, collator)
        questions, num_rows = questions_about(rows, recipe, collator, args.append), len(rows)

    stay = count = rows_done = 0
    is_begun = args.resume and args.output.exists() and args.output.stat().st_size > 0
    if args.resume:
        stay, count, rows_done, questions = unanswered(args.output, questions, args.batch_size)
    if is_begun:
        check_conditions(args, recipe_flags)
    if questions is None:
        os.truncate(args.output, stay)
        print(f"{count} answers in {args.output}; nothing is left to ask")
        return

    model = load_model(recipe, settings, training)
    if is_adapter and not args.base_only:
        model = put_on(model, args.run, settings.model_name_or_path).eval()
    bar = tqdm(total=num_rows, initial=rows_done, desc="Answering rows", disable=args.question is not None)
    if not args.output:
        ask_all(model, recipe, collator, questions, args, sys.stdout, bar, count)
        bar.close()
        return
    try:
        if not is_begun:
            text = json.dumps(conditions(args, recipe_flags), indent=1)
            record(args.output).write_text(text, encoding="utf-8")
        file = open(args.output, "a" if args.resume else "w", encoding="utf-8")  # noqa: SIM115, closed below
        file.truncate(stay)
    except OSError as e:
        fail(f"--output {args.output} cannot be written: {e.strerror or e}")
    with file:
        count = ask_all(model, recipe, collator, questions, args, file, bar, count)
    bar.close()
    print(f"{count} answers in {args.output}")


if __name__ == "__main__":
    start(main)
