"""Ask a fine-tuned model, or the untouched one beneath it: one question, or a whole data set into a .jsonl.

    python tools/generate.py llava-lora --image cat.jpg --question "What is this?"
    python tools/generate.py llava-lora --dataset_name test.json --image_folder images --output after.jsonl
    python tools/generate.py llava-lora --dataset_name test.json --output before.jsonl --base_only
    python tools/generate.py llava-lora --output held_out.jsonl     # the rows that the run itself held out
    python tools/generate.py llava-lora --dataset_name test.json --output after.jsonl --resume   # it was killed: ask the rest
    python tools/generate.py merged-model --image cat.jpg --question "What is this?"
    python tools/generate.py model-of-mine --recipe idefics2_docvqa.py --image page.png --question "What is the total?"
    python tools/generate.py RUN --dataset_name query_discriminative.json --image_folder image --question_column query \\
        --append "Please answer yes or no." --output amber.jsonl     # on to evals/amber.py

RUN is what a recipe saved (an adapter with its settings.yaml, or a whole model), what tools/merge_adapter.py made of it, or any model that a
recipe can load.
A row of several turns gives one prediction for each: asked with the right answers to the turns before it. Every other flag
is the recipe's own (--use_cpu, --load_in_4bit false, --on_bad_rows skip, ...). A line of the output has: row, id, turn, images
(how many), question, reference (a list where several answers are accepted, null where the row has none), prediction.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

# Image tokens that a model makes of one picture at most, of those that the recipes train: LLaVA-NeXT's five views.
MOST_OF_A_PICTURE = 5 * 576 + 100
# What a recipe must have to be asked.
CONTRACT = "parse check load_processor load_data load_model load_image text_of BadRow Settings Collator.messages_of Collator.tokenize"


def rows_of(recipe, name, split, settings):
    """The rows of a data set, as the recipe reads them: by a function of its own, where its rows have a form of their own."""
    return (recipe.read_rows if hasattr(recipe, "read_rows") else recipe.read_dataset)(name, split, settings)


def own_rows(recipe, run, settings, training, collator):
    """The rows that a run was evaluated on. Raises SystemExit for a run of an earlier version, which may have held out others."""
    config = home(run) / "settings.yaml"
    if config.exists() and recipe.ROWS_NOTE not in config.read_text(encoding="utf-8"):
        fail(
            f"{run} is of an earlier version of {Path(recipe.__file__).name}, which may have held out other rows: name the rows, by --dataset_name or --data_path"
        )
    return recipe.load_data(settings, training, collator)[1]


def user_turn(collator, question, pictures):
    """A question about PIL images as the turn of a user: in the recipe's form, where it has one of its own."""
    if hasattr(collator, "user_turn"):
        return collator.user_turn(question, pictures)
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def fail(message):
    """End the program with one message and exit status 1."""
    sys.exit(f"error: {message}")


def underscored(flags):
    """The recipe's flags as their fields are named: its parser takes --dataset-name for --dataset_name, too."""
    parts = [flag.partition("=") if flag.startswith("--") else ("", "", flag) for flag in flags]
    return [name.replace("-", "_").replace("__", "--", 1) + equals + value for name, equals, value in parts]


def home(run):
    """The folder whose settings.yaml says how a run was trained: its own, or, of a checkpoint, the one that it stands in."""
    folder = Path(run).absolute()
    return (
        folder.parent if folder.name.startswith("checkpoint-") and not (folder / "settings.yaml").exists() else folder
    )


def recipe_of(run):
    """The file's name in the first line of a run's settings.yaml; None where that says none."""
    config = home(run) / "settings.yaml"
    said = (
        config.read_text(encoding="utf-8", errors="replace").split("\n")[0].removeprefix("#").strip()
        if config.is_file()
        else ""
    )
    return said if said.endswith(".py") else None


def load_recipe(path, run, contract=CONTRACT):
    """The recipe as a module: this file, or else the one that is named in the first line of the run's settings.yaml. Raises SystemExit where it
    is none."""
    if path is None:
        if (said := recipe_of(run)) is None:
            print(
                f"note: no settings.yaml says which recipe {run} is of: taken for sft_llava.py's, or else give --recipe",
                file=sys.stderr,
            )
        path = Path(__file__).parents[1] / (said or "sft_llava.py")
    if not path.is_file():
        fail(
            f"{path}: {'it is a folder' if path.is_dir() else 'no such file'}; needed is a recipe{f', which {run} was trained by: --recipe' if run else ''}"
        )
    name = f"recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        fail(f"{path} is no Python file; needed is a recipe")
    module = sys.modules.get(name)
    if module is None or not os.path.samefile(
        module.__file__, path
    ):  # once: several processes could not be given the functions of a module that was replaced
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as e:  # somebody else's file
            del sys.modules[name]
            fail(f"{path} cannot be imported as a recipe: {type(e).__name__}: {e}")
    there = lambda part: (
        functools.reduce(lambda holder, name: getattr(holder, name, None), part.split("."), module) is not None
    )
    if missing := [part for part in contract.split() if not there(part)]:
        fail(f"{path} is no recipe: it has no {', '.join(missing)}")
    return module


def parse(argv=None):
    """-> (own arguments, the recipe's flags)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", help="folder that a recipe wrote, or a model")
    parser.add_argument("--question", help="one question, instead of a data set")
    parser.add_argument("--image", action="append", default=[], help="a picture to ask it about; may be repeated")
    parser.add_argument("--system", help="system message before the question")
    parser.add_argument("--append", metavar="TEXT", help="put TEXT after every question, with a space between")
    parser.add_argument("--output", type=Path, help="the .jsonl to write; without it, answers are only printed")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT where it exists")
    parser.add_argument(
        "--resume", action="store_true", help="go on where OUTPUT ends, with the flags that it was begun with"
    )
    parser.add_argument("--base_only", action="store_true", help="leave the adapter out: the untouched model")
    parser.add_argument("--batch_size", type=int, default=8, help="questions at once (default 8)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer (default 256)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, is greedy; above it answers are sampled"
    )
    parser.add_argument(
        "--recipe", type=Path, help="file that trained RUN (default: what RUN's settings.yaml says, else sft_llava.py)"
    )
    parser.error = fail
    args, rest = parser.parse_known_args(argv)
    rest = underscored(rest)
    if args.resume and (args.overwrite or not args.output):
        fail("--resume goes on with an --output, --overwrite begins it anew: one of them, and an --output")
    if args.output and args.output.is_dir():
        fail(f"--output {args.output} is a folder: needed is the .jsonl to write")
    if args.output and args.output.exists() and not args.overwrite and not args.resume:
        fail(f"{args.output} exists: choose another --output, --overwrite it, or --resume it")
    if args.question is not None and not args.question.strip():
        fail("--question is blank")
    if args.append is not None and not args.append.strip():
        fail("--append is blank")
    if args.image and args.question is None:
        fail("--image needs a --question about it")
    if args.question is not None and any(flag.startswith(("--dataset_name", "--data_path")) for flag in rest):
        fail("--question and a data set: one of them")
    if args.output and not args.output.absolute().parent.is_dir():
        fail(f"--output {args.output}: there is no such folder")
    if args.output:
        try:  # now, and not when the weights are loaded
            tempfile.TemporaryFile(dir=args.output.absolute().parent).close()
        except OSError as e:
            fail(f"--output {args.output} cannot be written: {e}")
    if min(args.batch_size, args.max_new_tokens) < 1 or not 0 <= args.temperature < math.inf:
        fail("--batch_size and --max_new_tokens must be at least 1, --temperature 0 or more")
    return args, rest


def load(recipe, run, rest, base_only=False):
    """RUN, the recipe's flags -> (whether RUN is an adapter, the processor that was saved with it, the recipe's settings and training).
    settings.model_name_or_path is what to load: what is beneath an adapter; of a whole model itself, or with base_only what it was trained from (None:
    its parts, joined once more). Raises SystemExit where RUN is not all there, or its adapter is one for another base model than settings.yaml says."""
    folder, config, given, said = Path(run), home(run) / "settings.yaml", {flag.split("=")[0] for flag in rest}, None
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else None  # None: a name on the hub
    adapter = there is not None and "adapter_config.json" in there
    if there is not None and not adapter and "config.json" not in there:
        unfinished = ", but checkpoints: the same training command finishes it" * any(
            name.startswith("checkpoint-") for name in there
        )
        fail(
            f"{run} holds no adapter (adapter_config.json) and no model (config.json){unfinished or '; needed is what a recipe saved'}"
        )
    if adapter and not there & {"adapter_model.safetensors", "adapter_model.bin"}:
        fail(f"{run} holds an adapter without its weights (adapter_model.safetensors)")
    if there is not None and not there & {"processor_config.json", "preprocessor_config.json"}:
        fail(
            f"{run} holds no processor (processor_config.json); recipes save it beside the weights: AutoProcessor.from_pretrained(BASE).save_pretrained('{run}')"
        )
    flags = ["--config", str(config)] if config.exists() else []
    if adapter:
        try:
            said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (ValueError, KeyError, TypeError) as e:
            fail(f"{run}: its adapter_config.json is damaged ({type(e).__name__}: {e})")
        flags = flags or ["--model_name_or_path", str(said)]
    else:  # in 16 bits unless 4 are asked for
        flags += ["--load_in_4bit" if hasattr(recipe.Settings, "load_in_4bit") else "--q_lora", "false"]
    try:
        settings, training = recipe.parse([*flags, *rest])
    except SystemExit as e:
        if (mine := recipe_of(run)) and mine != Path(recipe.__file__).name:
            fail(
                f"{run} is of {mine}, and {recipe.__file__} does not take its settings: {str(e.code).removeprefix('error: ')}"
            )
        raise
    recipe.check(settings, training)
    base = settings.model_name_or_path
    if not adapter and not (base_only and (config.exists() or "--model_name_or_path" in given)):
        base = str(run)
        if hasattr(settings, "pretrain_mm_mlp_adapter"):  # it has a projector of its own by now
            settings.pretrain_mm_mlp_adapter = None
    elif (
        not adapter and base is None
    ):  # joined from parts once more, in memory: with adapters the recipe would write what it joins to disk
        settings.lora_r = 0
    elif base is None:  # an adapter on joined parts: the run holds them, wherever it is by now
        base, settings.pretrain_mm_mlp_adapter = str(home(run) / "base"), None
    elif said and os.path.normpath(said) != os.path.normpath(base):
        if "--model_name_or_path" not in given:
            fail(
                f"the adapter in {run} is one for {said}, settings.yaml says {base}: which it is, say by --model_name_or_path"
            )
        print(f"note: the adapter in {run} was trained on {said}, it is put on {base}, as asked", file=sys.stderr)
    if base and Path(base, "adapter_config.json").exists():
        fail(f"--model_name_or_path {base} is an adapter itself; needed is the model beneath")
    settings.model_name_or_path = str(run)
    try:
        processor = recipe.load_processor(settings)
    except SystemExit as e:
        fail(
            f"{run}: there is no such folder, and as a model of the hub: " * (there is None)
            + str(e.code).removeprefix("error: ")
        )
    settings.model_name_or_path = base
    kind = None
    with contextlib.suppress(OSError, ValueError):  # load_model has a message for that
        kind = adapter and PreTrainedConfig.get_config_dict(base, revision=settings.model_revision)[0].get(
            "model_type"
        )
    if kind and PROCESSOR_MAPPING_NAMES.get(kind, type(processor).__name__) != type(processor).__name__:
        fail(
            f"the adapter in {run}, trained on {said}, does not fit {base}: that is a {kind}, and the run has a {type(processor).__name__}"
        )
    return adapter, processor, settings, training


def put_on(model, run, base, name="default"):
    """A base model, of that name, or one that has adapters already -> with the adapter of a run on it, too. Raises SystemExit where that is damaged, or one for
    another model."""
    try:
        with safe_open(Path(run, "adapter_model.safetensors"), "pt") as file:
            found = {key for key in file.keys() if ".base_layer." not in key}
    except (OSError, SafetensorError) as e:
        fail(f"{run}: its adapter_model.safetensors is damaged, or cannot be read: {e}")
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(run, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, run, adapter_name=name)
        wanted = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
        if other := sorted(found ^ wanted):  # PEFT would only warn, and leave these untrained
            raise ValueError(f"{len(other)} weights are of the adapter only, or of the model only, such as {other[0]}")
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        SafetensorError,
    ) as e:  # of the shapes torch raises RuntimeError
        fail(f"the adapter in {run} does not fit {base}: {' '.join(str(e).split())[:500]}")
    return model


def add(text, message):
    """A message -> it, or, of the user, a copy with the text after its words. None adds nothing."""
    if text is None or message["role"] != "user":
        return message
    content = list(message["content"])
    where = max((n for n, part in enumerate(content) if part["type"] == "text"), default=None)
    if where is None:  # nothing but a picture
        return {**message, "content": [*content, {"type": "text", "text": text}]}
    content[where] = {**content[where], "text": f"{content[where]['text']} {text}"}
    return {**message, "content": content}


def questions(recipe, collator, row, more=None):
    """A row, and a text to add to every question -> [(messages up to a question, turn, question, reference)], one for each turn
    of the assistant, and one more, without a reference, where the last turn is the user's. Raises the recipe's BadRow."""
    messages = [add(more, message) for message in collator.messages_of(row)]
    said = [recipe.text_of(m) for m in messages]
    turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    found = [
        (messages[:n], turn, said[n - 1] if n else "", messages[n].get("references", said[n]))
        for turn, n in enumerate(turns)
    ]
    return found + [(messages, len(turns), said[-1], None)] * (messages[-1:] != [] and messages[-1]["role"] == "user")


def reads(settings):
    """How many tokens a model reads with its answer, by its configuration; infinity where that does not say."""
    config = {}
    with contextlib.suppress(
        OSError, ValueError
    ):  # load_model has a message for that; parts that are yet to be joined have none
        config = PreTrainedConfig.get_config_dict(settings.model_name_or_path or "", revision=settings.model_revision)[
            0
        ]
    return (config.get("text_config") or config).get("max_position_embeddings") or math.inf


def too_long(collator, messages, most):
    """What is wrong with a conversation that leaves no room for an answer; None where it does. Pictures are prepared only where it could be."""
    pictures = sum(part["type"] == "image" for m in messages for part in m["content"])
    letters = 200 + sum(
        len(part.get("text", "").encode()) for m in messages for part in m["content"]
    )  # at least as many as tokens, the template's too
    if (
        letters + MOST_OF_A_PICTURE * pictures < most
        or (count := collator.tokenize([messages], prompt=True)["input_ids"].shape[1]) < most
    ):
        return None
    return f"too long: {count} tokens with its pictures, and the model reads {most} with its answer; shorten it"


def readable(recipe, collator, rows, skip, most, more):
    """Rows -> those that can be asked about; read once before any weights load. `most`: tokens that the model reads, `more`: what is added to each
    question. Raises SystemExit where a row cannot be read, unless such rows are to be skipped: then they are listed."""
    good, bad = [], []
    for n, row in enumerate(tqdm(rows, desc="Checking")):
        try:
            asked = questions(recipe, collator, row, more)
            problem = too_long(collator, asked[-1][0], most) if asked else None  # the last one holds all before it
        except recipe.BadRow as e:
            problem = e
        if problem:
            bad.append(f"  row {row['row']}: {problem}")
        else:
            good.append(n)
    report = "\n".join(
        [
            f"{len(bad)} of {len(rows)} rows cannot be read",
            *bad[:20],
            *([f"  ... and {len(bad) - 20} more"] * (len(bad) > 20)),
        ]
    )
    if bad and not (skip and good):
        fail(report + ("\nMend them, or answer the others: --on_bad_rows skip" if good else "\nNo row would be left."))
    if bad:
        print("left out:", report, file=sys.stderr)
    return rows.select(good)


def answer(model, collator, conversations, args):
    """Conversations -> their answers as text. Greedy unless a temperature is given; ends at EOS or max_new_tokens."""
    batch = collator.tokenize(conversations, prompt=True).to(model.device)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    sampling["eos_token_id"] = collator.stop_ids
    with (
        torch.inference_mode(),
        torch.autocast(model.device.type, dtype=model.dtype, enabled=model.device.type == "cuda"),
    ):
        out = model.generate(**batch, max_new_tokens=args.max_new_tokens, max_length=None, **sampling)
    return [
        text.strip()
        for text in collator.processor.tokenizer.batch_decode(
            out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
    ]


def lines(asked):
    """Questions -> (line of the output, without its prediction, messages, how many rows are over with it)."""
    for row, messages, turn, question, reference, over in asked:
        images = sum(part["type"] == "image" for m in messages for part in m["content"])
        yield (
            {
                "row": row.get("row"),
                "id": row.get("id"),
                "turn": turn,
                "images": images,
                "question": question,
                "reference": reference,
            },
            messages,
            over,
        )


def record(output):
    """Where it stands how a file of answers was begun."""
    return output.with_name(f"{output.name}.flags")


def how(args, rest):
    """What answers depend on beside the questions: of one file it must stay the same."""
    own = {
        name: getattr(args, name) for name in ("base_only", "append", "batch_size", "max_new_tokens", "temperature")
    }
    weights = max((file.stat().st_mtime for file in Path(args.run).glob("*.safetensors")), default=None)
    return {
        "run": os.path.realpath(args.run),
        "written": weights,
        **own,
        "recipe": args.recipe and str(args.recipe),
        "flags": rest,
    }


def check_how(args, rest):
    """Raises SystemExit where a file is to be gone on with by another model, or in another way."""
    path, now = record(args.output), how(args, rest)
    try:
        begun = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        fail(
            f"--resume {args.output}: nobody knows how it was begun ({path.name} beside it is missing or damaged): --overwrite it, or choose another --output"
        )
    if changes := [f"{name} {begun.get(name)} -> {value}" for name, value in now.items() if begun.get(name) != value]:
        fail(
            f"--resume {args.output}: it was begun otherwise ({', '.join(changes)}): give the flags that it was begun with, or choose another --output"
        )


def unanswered(path, asked, size):
    """A file of answers, the questions and the size of a batch -> (its bytes that stay, lines in them, rows over with them, the questions that are left or None).
    What is left begins with a whole batch, so that the answers are those of a run that nothing interrupted. Raises SystemExit where the file is no
    beginning of answers to these questions."""
    *whole, _ = (
        path.read_bytes().split(b"\n") if path.exists() else [b""]
    )  # behind the last line end: nothing, or half a line
    stay, count, rows, again, end = 0, 0, 0, [], 0
    for n, text in enumerate(whole, start=1):
        item = next(asked, None)
        try:
            found = json.loads(text)
            found.pop("prediction")
        except (ValueError, AttributeError, KeyError, TypeError):  # no JSON, or another one
            found = None
        if item is None or found != json.loads(json.dumps(item[0])):
            fail(
                f"--resume {path}: line {n} is no answer to the question that would be asked there: give the flags that the file was begun with, or choose another --output"
            )
        again, end = [*again, item], end + len(text) + 1
        if len(again) == size:
            stay, count, rows, again = end, n, item[2], []
    if (item := next(asked, None)) is None:
        return end, len(whole), again[-1][2] if again else rows, None
    return stay, count, rows, itertools.chain(again, [item], asked)


def main(argv=None):
    """Parse, load, ask, write."""
    args, rest = parse(argv)
    recipe = load_recipe(args.recipe, args.run)
    adapter, processor, settings, training = load(recipe, args.run, rest, args.base_only)
    processor.tokenizer.padding_side = "left"
    collator = recipe.Collator(processor, settings, training)
    for flag, text in (("--question", args.question), ("--system", args.system), ("--append", args.append)):
        if typed := [token for token in collator.control_tokens if token in (text or "")]:
            fail(
                f"{typed[0]} in {flag} would become a real control token; take it out (pictures are given by --image)"
            )
    if args.question is not None:
        try:
            turn = user_turn(collator, args.question, [recipe.load_image(path) for path in args.image])
        except recipe.BadRow as e:
            fail(e)
        system = [{"role": "system", "content": [{"type": "text", "text": args.system}]}] if args.system else []
        turn = add(args.append, turn)
        if problem := too_long(collator, [*system, turn], reads(settings)):
            fail(f"the question is {problem}")
        asked, rows = [({}, [*system, turn], 0, recipe.text_of(turn), None, 1)], [{}]
    else:
        given = {flag.split("=")[0].removeprefix("--") for flag in rest}
        own = not given & {"dataset_name", "data_path"}
        if not own:  # none of what the run says of its own data goes for another data set
            for field in dataclasses.fields(settings):
                about_data = (
                    field.name.startswith(("dataset_", "eval_data", "data_path"))
                    or field.name.endswith("_column")
                    or field.name == "image_folder"
                )
                if about_data and field.name not in given:
                    setattr(settings, field.name, field.default)
        source = (
            (settings.data_path, None)
            if hasattr(settings, "data_path")
            else (settings.dataset_name, settings.dataset_train_split)
        )
        rows = own_rows(recipe, args.run, settings, training, collator) if own else rows_of(recipe, *source, settings)
        if rows is None:
            fail(
                f"the run in {args.run} held no rows out: give --{'data_path' if hasattr(settings, 'data_path') else 'dataset_name'}"
            )
        rows = (
            rows
            if own
            else readable(recipe, collator, rows, settings.on_bad_rows == "skip", reads(settings), args.append)
        )
        found = ((n, row, questions(recipe, collator, row, args.append)) for n, row in enumerate(rows))
        asked = ((row, *one, n + (k == len(every))) for n, row, every in found for k, one in enumerate(every, start=1))
    asked, stay, count, over, begun = lines(asked), 0, 0, 0, False
    if args.resume:
        stay, count, over, asked = unanswered(args.output, asked, args.batch_size)
        if begun := args.output.exists() and args.output.stat().st_size > 0:
            check_how(args, rest)
        if asked is None:
            os.truncate(args.output, stay)
            print(f"{count} answers in {args.output}; nothing is left to ask")
            return

    try:
        model = recipe.load_model(settings, training)
    except (OSError, ValueError, SafetensorError) as e:
        fail(f"cannot load {settings.model_name_or_path} (another place: --model_name_or_path): {e}")
    if adapter and not args.base_only:
        model = put_on(model, args.run, settings.model_name_or_path)
    model.eval()
    bar = tqdm(total=len(rows), initial=over, desc="Answering rows", disable=args.question is not None)
    try:
        if args.output and not begun:
            record(args.output).write_text(json.dumps(how(args, rest), indent=1), encoding="utf-8")
        if args.resume:
            with open(args.output, "ab") as file:
                file.truncate(stay)
        with (
            open(args.output, "a" if args.resume else "w", encoding="utf-8")
            if args.output
            else contextlib.nullcontext(sys.stdout) as out
        ):
            while some := list(itertools.islice(asked, args.batch_size)):
                for (line, *_), said in zip(
                    some, answer(model, collator, [messages for _, messages, _ in some], args)
                ):
                    text = json.dumps({**line, "prediction": said}, ensure_ascii=False)
                    print(said if args.question is not None and not args.output else text, file=out, flush=True)
                    count += 1
                bar.update(some[-1][2] - bar.n)
    except recipe.BadRow as e:
        fail(f"the data changed since they were looked at: {e}")
    except OSError as e:
        if not args.output:
            raise
        fail(
            f"--output {args.output} cannot be written, after {count} answers: {e.strerror or e}; mend that, and go on with --resume"
        )
    bar.close()
    if args.output:
        print(f"{count} answers in {args.output}")


def start(main):
    """main(), as a program: Ctrl+C and a reader that has gone (| head) end it without a traceback."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries to one another
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed to nowhere
        sys.exit(1)


if __name__ == "__main__":
    start(main)
