"""How many GPUs do LLaVA's sizes need? What tools/inspect_recipe.py --fit says of configurations from 7 to 72 billion
parameters, without weights, on rows with one picture of 1000x800: a Markdown table.

    python benchmarks/fewest_gpus.py build/sizes                      # all of them; one to four minutes each
    python benchmarks/fewest_gpus.py build/sizes 72B-4bit             # some
    python benchmarks/fewest_gpus.py build/sizes 13B-full --max_length 4096    # any flag of the recipe

A cell has the fewest GPUs with which a strategy trains one row at a time, and GB on each of them. The language models
are Vicuna 7B and 13B, Yi 34B (as in LLaVA-NeXT) and Qwen2 72B, each behind LLaVA-1.5's own tower and projector.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import made_up  # noqa: E402

from tools import inspect_recipe  # noqa: E402
from tools.program import fail, flag_parser, parse_beside_recipe, start  # noqa: E402
from tools.runs import load_recipe  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LLAVA = "llava-1.5-7b"


def decoder(hidden_size, intermediate_size, layers, heads, key_value_heads, **more):
    """What differs from Vicuna 7B's configuration."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads, "num_key_value_heads": key_value_heads} | more


DECODERS = {
    "7B": {},
    "13B": decoder(5120, 13824, 40, 40, 40),
    "34B": decoder(7168, 20480, 60, 56, 8, vocab_size=64064),
    "72B": decoder(8192, 29568, 80, 64, 8, vocab_size=152064, model_type="qwen2"),
}


class Case(NamedTuple):
    """A run: a language model of DECODERS, GB of the GPUs, a recipe and its flags."""

    decoder: str
    card: int
    recipe: str = "sft_llava"  # a 4-bit model with LoRA
    flags: tuple = ()


IN_FULL = ("llava_two_stage", ("--stage", "instruct"))
CASES = {
    "7B-4bit": Case("7B", 24),
    "34B-4bit": Case("34B", 24),
    "72B-4bit": Case("72B", 80),
    "7B-full": Case("7B", 80, *IN_FULL),
    "13B-full": Case("13B", 80, *IN_FULL),
}


def write(case, folder):
    """Write a model's configuration and processor, and rows. Returns the path of the rows."""
    processor = made_up.make_processor(LLAVA, small=False)
    sizes = made_up.sizes_of(LLAVA, small=False)
    sizes["text_config"] |= DECODERS[case.decoder]
    processor.save_pretrained(folder)
    made_up.configuration(LLAVA, sizes, processor.tokenizer).save_pretrained(folder)
    save_file({}, folder / "model.safetensors")  # llava_two_stage.py asks for weights; none are read
    return made_up.make_rows(case.recipe, 32, processor.tokenizer, folder / "rows")


def figures(case, folder, recipe_flags):
    """-> what tools/inspect_recipe.py says about --fit."""
    rows, path = write(case, folder), ROOT / f"{case.recipe}.py"
    flags = ["--model_name_or_path", str(folder), "--dataset_name", str(rows), *case.flags, *recipe_flags]
    args, flags = inspect_recipe.parse([str(path), "--fit", str(case.card), "--examples", "0", *flags])
    report = inspect_recipe.inspect(load_recipe(path, None, inspect_recipe.CONTRACT), args, flags)
    memory = report["memory"]
    if memory["fit"] is None:
        fail(memory["not_counted"])
    return memory["fit"]


def cell(fit, strategy):
    """A strategy's cell of the table; the one with the fewest GPUs is bold."""
    found = fit["strategies"].get(strategy)
    if found is None:
        return "refused"
    if found["gpus"] is None:
        return "no"
    text = f"{found['gpus']} x {found['bytes'] / 1e9:.1f}"
    return f"**{text}**" if strategy == fit["best"] else text


def main(argv=None):
    """Write the folders, and print a line for each."""
    parser = flag_parser(__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="where the folders go, one for each run")
    parser.add_argument("cases", nargs="*", metavar="RUN", help=f"any of {', '.join(CASES)} (default: all)")
    args, recipe_flags = parse_beside_recipe(parser, argv)
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        fail(f"no run {', '.join(unknown)}; there are {', '.join(CASES)}")
    inspect_recipe.be_quiet()
    columns = ["run", "GPUs of", *inspect_recipe.STRATEGIES.values()]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in args.cases or CASES:
        case = CASES[name]
        fit = figures(case, args.out / name, recipe_flags)
        cells = [name, f"{case.card} GB", *(cell(fit, strategy) for strategy in inspect_recipe.STRATEGIES)]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    start(main)
