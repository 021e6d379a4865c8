"""What published models need, before any is downloaded: folders of their sizes without weights, and what
tools/inspect_recipe.py says of them for sft_llava.py's own settings and rows with one picture of 1000x800.

    python benchmarks/real_sizes.py build/sizes                                  # all of them; a minute each
    python benchmarks/real_sizes.py build/sizes qwen3-vl-8b gemma-3-4b           # some
    python benchmarks/real_sizes.py build/sizes qwen3-vl-8b --lora_vision true   # any flag of the recipe
    python tools/inspect_recipe.py sft_llava.py --model_name_or_path build/sizes/qwen3-vl-8b \\
        --dataset_name build/sizes/qwen3-vl-8b/rows/sft_llava.json --eval_strategy no     # all that it says of one

A folder has config.json and the processor. Sizes of layers, vocabularies and pictures are the published ones; the
tokenizer is a small one, so that nothing is downloaded. All but Gemma need torchvision (requirements-vision.txt).
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import made_up  # noqa: E402

from tiny import families  # noqa: E402
from tools import inspect_recipe  # noqa: E402
from tools.program import fail, flag_parser, parse_beside_recipe, print_table, start, text_table  # noqa: E402
from tools.runs import load_recipe  # noqa: E402

RECIPE = Path(__file__).resolve().parents[1] / "sft_llava.py"
# --max_length: InternVL and LLaVA-OneVision make more tokens of one picture than the recipe's own 2048.
FLAGS = ["--eval_strategy", "no", "--max_length", "8192"]


class Model(NamedTuple):
    """A published model: its family in tiny/families.py, as many parameters as its files have (None: not known), and
    what its configuration and its processor say of sizes."""

    family: str
    parameters: int | None
    text: dict
    vision: dict
    config: dict = {}
    images: dict = {}  # of the image processor
    processor: dict = {}


def decoder(hidden_size, intermediate_size, layers, heads, key_value_heads, vocab_size, **more):
    """A language model's configuration."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "vocab_size": vocab_size}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_value_heads}
    return sizes | more


def siglip(image_size, layers=27):
    """SigLIP-SO400M's configuration, as several models cut it."""
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "patch_size": 14}
    return sizes | {"num_hidden_layers": layers, "image_size": image_size, "vision_use_head": False}


def qwen_tower(hidden_size, intermediate_size, depth, patch_size, out_hidden_size, **more):
    """The configuration of Qwen's vision tower."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "depth": depth, "num_heads": 16}
    return sizes | {"patch_size": patch_size, "out_hidden_size": out_hidden_size} | more


def rope_of(theta, *sections, **more):
    """The angles of a language model whose positions have time, height and width."""
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)} | more


def pixels(least, most):
    """The limits of a picture that keeps its shape, in pixels."""
    return {"size": {"shortest_edge": least, "longest_edge": most}}


SQUARE = {side: {"size": {"height": side, "width": side}} for side in (384, 448, 896)}
GEMMA_LAYERS = {"head_dim": 256, "sliding_window": 1024}
GEMMA = {"images": SQUARE[896], "processor": {"image_seq_length": 256}, "config": {"mm_tokens_per_image": 256}}
TILES = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
MODELS = {
    "qwen3-vl-8b": Model(  # Qwen/Qwen3-VL-8B-Instruct
        "qwen3_vl",
        8_767_123_696,
        decoder(
            4096,
            12288,
            36,
            32,
            8,
            151936,
            head_dim=128,
            rope_parameters=rope_of(5e6, 24, 20, 20, mrope_interleaved=True),
        ),
        qwen_tower(1152, 4304, 27, 16, 4096, num_position_embeddings=2304, deepstack_visual_indexes=[8, 16, 24]),
        images=pixels(65_536, 16_777_216),
    ),
    "qwen2.5-vl-7b": Model(  # Qwen/Qwen2.5-VL-7B-Instruct
        "qwen2_5_vl",
        8_292_166_656,
        decoder(3584, 18944, 28, 28, 4, 152064, rope_parameters=rope_of(1e6, 16, 24, 24)),
        qwen_tower(1280, 3420, 32, 14, 3584, window_size=112, fullatt_block_indexes=[7, 15, 23, 31]),
        images=pixels(3136, 12_845_056),
    ),
    "qwen3.5-9b": Model(  # Qwen/Qwen3.5-9B; its files have a layer more, for several tokens at once
        "qwen3_5",
        None,
        decoder(
            4096,
            12288,
            32,
            16,
            4,
            248320,
            head_dim=256,
            linear_num_value_heads=32,
            rope_parameters=rope_of(1e7, 11, 11, 10, mrope_interleaved=True, partial_rotary_factor=0.25),
        ),
        qwen_tower(1152, 4304, 27, 16, 4096, num_position_embeddings=2304),
        images=pixels(65_536, 16_777_216),
    ),
    "gemma-3-4b": Model(  # google/gemma-3-4b-it
        "gemma3", 4_300_079_472, decoder(2560, 10240, 34, 8, 4, 262208, **GEMMA_LAYERS), siglip(896), **GEMMA
    ),
    "gemma-3-12b": Model(  # google/gemma-3-12b-it
        "gemma3", 12_187_325_040, decoder(3840, 15360, 48, 16, 8, 262208, **GEMMA_LAYERS), siglip(896), **GEMMA
    ),
    "smolvlm2-2.2b": Model(  # HuggingFaceTB/SmolVLM2-2.2B-Instruct
        "smolvlm",
        2_246_784_880,
        decoder(2048, 8192, 24, 32, 32, 49280, head_dim=64),
        siglip(384),
        config={"scale_factor": 3},
        images={"size": {"longest_edge": 4 * 384}, "max_image_size": {"longest_edge": 384}},
        processor={"image_seq_len": 81},
    ),
    "internvl3-8b": Model(  # OpenGVLab/InternVL3-8B-hf
        "internvl",
        7_944_373_760,
        decoder(3584, 18944, 28, 28, 4, 151674),
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": [448, 448],
            "patch_size": [14, 14],
            "attention_bias": True,
        },
        config={"image_seq_length": 256, "tie_word_embeddings": False},
        images=SQUARE[448] | {"max_patches": 12},
        processor={"image_seq_length": 256},
    ),
    "llava-onevision-7b": Model(  # llava-hf/llava-onevision-qwen2-7b-ov-hf
        "llava_onevision",
        8_030_348_832,
        decoder(3584, 18944, 28, 28, 4, 152064),
        siglip(384, layers=26),
        config={"image_grid_pinpoints": TILES, "vision_aspect_ratio": "anyres_max_9"},
        images=SQUARE[384] | {"image_grid_pinpoints": TILES},
        processor={"num_image_tokens": 729, "vision_aspect_ratio": "anyres_max_9"},
    ),
}


# ---------------------------------------------------------------- folders


def parts_of(name):
    """A model's name -> (its configuration, its processor). Raises ImportError where that needs torchvision."""
    model = MODELS[name]
    config, processor, _ = families.FAMILIES[model.family]()
    values = config.to_dict() | model.config
    for part, sizes in (("text_config", model.text), ("vision_config", model.vision)):
        kept = ("model_type", "bos_token_id", "eos_token_id", "pad_token_id")
        values[part] = {key: values[part][key] for key in kept if key in values[part]} | sizes
    for settings, owner in ((model.images, processor.image_processor), (model.processor, processor)):
        for key, value in settings.items():
            setattr(owner, key, value)
    return type(config).from_dict(values), processor


def write(name, folder):
    """Write a model's configuration and processor, and rows about a picture. Returns the path of the rows."""
    try:
        config, processor = parts_of(name)
    except ImportError as error:
        fail(f"{name} needs torchvision, see requirements-vision.txt: {error}")
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return made_up.make_rows("sft_llava", 4, processor.tokenizer, folder / "rows")


def parameters(config):
    """How many a model of this configuration has."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config).num_parameters()


# ---------------------------------------------------------------- report


def figures(name, folder, recipe_flags):
    """What tools/inspect_recipe.py says of a model -> the cells of its line."""
    rows = write(name, folder)
    flags = ["--model_name_or_path", str(folder), "--dataset_name", str(rows), *FLAGS, *recipe_flags]
    args, flags = inspect_recipe.parse([str(RECIPE), *flags])
    recipe = load_recipe(RECIPE, None, inspect_recipe.CONTRACT)
    report = inspect_recipe.inspect(recipe, args, flags)
    memory, kind = report["memory"], "with_checkpointing"
    if memory["activations"] is None:
        fail(f"{name}: {memory['not_counted']}")
    count = parameters(parts_of(name)[0])
    pieces = [piece for example in report["examples"] for piece in example["sequences"][0]]
    tokens = sum(piece["tokens"] for piece in pieces if piece["kind"] == "image") // len(report["examples"])
    cells = [f"{count:,}", "?" if MODELS[name].parameters is None else f"{count - MODELS[name].parameters:+,}"]
    cells += [f"{memory['fixed']['ddp']['weights'] / 1e9:.1f}", f"{memory['sum'][kind] / 1e9:.1f}"]
    return [*cells, str(tokens), str(memory["longest"]), *(str(memory["fits"][card][kind]) for card in (24, 80))]


def main(argv=None):
    """Write the folders, and print a line for each."""
    parser = flag_parser(__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="where the folders go, one for each model")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"any of {', '.join(MODELS)} (default: all)")
    args, recipe_flags = parse_beside_recipe(parser, argv)
    unknown = [name for name in args.models if name not in MODELS]
    if unknown:
        fail(f"no model {', '.join(unknown)}; there are {', '.join(MODELS)}")
    inspect_recipe.be_quiet()
    columns = ["parameters", "more than published", "weights, GB", "one row, GB", "image tokens", "tokens of the row"]
    table = text_table("model", *columns, "batch in 24 GB", "in 80 GB")
    for name in args.models or MODELS:
        table.add_row(name, *figures(name, args.out / name, recipe_flags))
    print_table(table)


if __name__ == "__main__":
    start(main)
