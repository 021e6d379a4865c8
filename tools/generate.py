"""Ask a fine-tuned model, or the untouched one beneath it: one question, or a whole data set into a .jsonl.

    python tools/generate.py llava-lora --image cat.jpg --question "What is this?"
    python tools/generate.py llava-lora --dataset_name test.json --image_folder images --output after.jsonl
    python tools/generate.py llava-lora --dataset_name test.json --output before.jsonl --base_only
    python tools/generate.py llava-lora --output held_out.jsonl     # the rows that the run itself held out
    python tools/generate.py merged-model --image cat.jpg --question "What is this?"

RUN is what a recipe saved (an adapter with its settings.yaml, or a whole model), or any model that the recipe can load.
A row of several turns gives one prediction for each: asked with the right answers to the turns before it. Every other flag
is the recipe's own (--use_cpu, --load_in_4bit false, --on_bad_rows skip, ...). A line of the output has: row, id, turn,
images (how many), question, reference, prediction.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from tqdm import tqdm


def fail(message):
    """End the program with one message and exit status 1."""
    sys.exit(f"error: {message}")


def load_recipe(path):
    """A recipe file as a module."""
    if not path.is_file():
        fail(f"--recipe {path}: no such file")
    name = f"recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(argv=None):
    """-> (own arguments, the recipe's flags)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="folder that a recipe wrote, or a model")
    parser.add_argument("--question", help="one question, instead of a data set")
    parser.add_argument("--image", action="append", default=[], help="a picture to ask it about; may be repeated")
    parser.add_argument("--system", help="system message before the question")
    parser.add_argument("--output", type=Path, help="the .jsonl to write; without it, answers are only printed")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT where it exists")
    parser.add_argument("--base_only", action="store_true", help="leave the adapter out: the untouched model")
    parser.add_argument("--batch_size", type=int, default=8, help="questions at once (default 8)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy; above it answers are sampled")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parents[1] / "sft_llava.py", help="file that trained RUN")
    parser.error = fail
    args, rest = parser.parse_known_args(argv)
    if args.output and args.output.exists() and not args.overwrite:
        fail(f"{args.output} exists: choose another --output, or --overwrite it")
    if args.image and not args.question:
        fail("--image needs a --question about it")
    return args, rest


def load(recipe, args, rest):
    """-> (model in eval mode, Collator that pads on the left, settings, training)."""
    run, config = Path(args.run), Path(args.run, "settings.yaml")
    flags = ["--config", str(config)] if config.exists() else []
    adapter = (run / "adapter_config.json").exists()
    if adapter and not config.exists():
        base = json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]
        flags += ["--model_name_or_path", base]
    elif not adapter:  # a whole model, in 16 bits unless 4 are asked for
        flags += ["--model_name_or_path", args.run, "--load_in_4bit", "false"]
    settings, training = recipe.parse([*flags, *rest])
    recipe.check(settings, training)
    base, settings.model_name_or_path = settings.model_name_or_path, args.run
    processor = recipe.load_processor(settings)  # the one that was saved beside the adapter
    processor.tokenizer.padding_side = "left"
    settings.model_name_or_path = base
    return adapter, processor, settings, training


def questions(collator, row):
    """A row -> [(messages up to a question, turn, question, reference)], one for each turn of the assistant."""
    messages = collator.read(row)
    said = [" ".join(part["text"] for part in m["content"] if part["type"] == "text") for m in messages]
    turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    return [(messages[:n], turn, said[n - 1] if n else "", said[n]) for turn, n in enumerate(turns)]


def answer(model, collator, conversations, args):
    """Conversations -> their answers as text. Greedy unless a temperature is given; ends at EOS or max_new_tokens."""
    batch = collator.tokenize(conversations, prompt=True).to(model.device)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    with torch.inference_mode(), torch.autocast(model.device.type, dtype=model.dtype, enabled=model.device.type == "cuda"):
        out = model.generate(**batch, max_new_tokens=args.max_new_tokens, max_length=None, **sampling)
    return [text.strip() for text in collator.processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)]


def main(argv=None):
    """Parse, load, ask, write."""
    args, rest = parse(argv)
    recipe = load_recipe(args.recipe)
    adapter, processor, settings, training = load(recipe, args, rest)
    collator = recipe.Collator(processor, settings, training)
    if args.question:
        try:
            pictures = [{"type": "image", "image": recipe.load_image(path)} for path in args.image]
        except recipe.BadRow as e:
            fail(e)
        system = [{"role": "system", "content": [{"type": "text", "text": args.system}]}] if args.system else []
        asked = [({}, [*system, {"role": "user", "content": [*pictures, {"type": "text", "text": args.question}]}], 0, args.question, None)]
    else:
        given = {flag.split("=")[0].removeprefix("--") for flag in rest}
        own = "dataset_name" not in given
        if not own:  # none of what the run says of its own data goes for another data set
            settings.eval_fraction, training.max_length = 0, None
            for field in dataclasses.fields(settings):
                if field.name.startswith(("dataset_", "eval_dataset", "image_")) and field.name not in given:
                    setattr(settings, field.name, field.default)
        train, held_out = recipe.load_data(settings, training)
        rows = held_out if own else train
        if rows is None:
            fail(f"the run in {args.run} held no rows out: give --dataset_name")
        asked = ((row, *question) for row in tqdm(rows, desc="Answering") for question in questions(collator, row))

    model = recipe.load_model(settings, training)
    if adapter and not args.base_only:
        model = PeftModel.from_pretrained(model, args.run)
    model.eval()
    out, count, asked = open(args.output, "w", encoding="utf-8") if args.output else sys.stdout, 0, iter(asked)
    while some := list(itertools.islice(asked, args.batch_size)):
        for (row, messages, turn, question, reference), said in zip(some, answer(model, collator, [x[1] for x in some], args)):
            images = sum(part["type"] == "image" for m in messages for part in m["content"])
            line = {"row": row.get("row"), "id": row.get("id"), "turn": turn, "images": images, "question": question,
                    "reference": reference, "prediction": said}
            print(said if args.question and not args.output else json.dumps(line, ensure_ascii=False), file=out, flush=True)
            count += 1
    if args.output:
        out.close()
        print(f"{count} answers in {args.output}")


if __name__ == "__main__":
    main()
