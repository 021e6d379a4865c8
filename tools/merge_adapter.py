"""Merge a run's adapter into its base model: one folder that from_pretrained, and a server, load without PEFT.

    python tools/merge_adapter.py llava-lora llava-merged
    python tools/merge_adapter.py minicpm-lora minicpm-merged --model_name_or_path /models/MiniCPM-V-4.6  # base moved
    python tools/merge_adapter.py idefics2-docvqa docvqa-merged --use_cpu --bf16 true    # no GPU: slow, and enough
    python tools/merge_adapter.py minicpm26-lora minicpm26-merged --trust_remote_code    # MiniCPM-V 2.6: its own code
    python tools/generate.py llava-merged --image cat.jpg --question "What is this?"

RUN is what a recipe saved: adapter, processor, settings.yaml. Every other flag is the recipe's own; its precision is
the one that is merged and saved in: bf16, or fp16 on a GPU without it, or float32 with --use_cpu alone. A base that
was trained on in 4 bits is loaded in 16: merged into 4-bit weights an adapter is partly rounded away. On an example
from the run's data the logits of the merged model are compared with those of the adapter, and once more after the
saved folder was loaded alone; where they do not agree nothing is left behind, and the exit status is 1.
"""

import contextlib
import gc
import json
import os
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import datasets
import torch
from huggingface_hub import constants, snapshot_download
from PIL import Image
from safetensors import SafetensorError
from torch.utils._pytree import tree_map_only
from transformers import GenerationConfig, PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.program import fail, flag_parser, parse_beside_recipe, start  # noqa: E402
from tools.runs import (  # noqa: E402
    UNREADABLE,
    cannot_load,
    four_bit_flag,
    home,
    load,
    load_collator,
    load_recipe,
    put_on,
    rows_of,
    user_turn,
)

# How far apart logits may be on average, in their own standard deviations. In 16 bits the adapter's product is no
# longer rounded by itself, layer by layer.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


def parse(argv=None):
    """-> (own arguments, the recipe's flags). Raises SystemExit where RUN is no run with an adapter, or OUTPUT cannot
    be written."""
    parser = flag_parser(__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder that a recipe wrote, with an adapter in it")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write; it must not exist")
    parser.add_argument(
        "--recipe",
        type=Path,
        help="file that trained RUN; it is executed (default: the recipe that RUN's settings.yaml names, else "
        "sft_llava.py)",
    )
    args, recipe_flags = parse_beside_recipe(parser, argv)
    if not args.run.is_dir():
        fail(f"{args.run}: no such folder")
    if not (args.run / "adapter_config.json").exists() and (args.run / "config.json").exists():
        fail(f"{args.run} holds a whole model: there is nothing to merge")
    if os.path.lexists(args.output):
        fail(f"{args.output} exists: choose another OUTPUT")
    folder = args.output.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        fail(f"{args.output}: its folder does not exist, or cannot be written")
    return args, recipe_flags


def load_run(recipe, run, recipe_flags):
    """-> (its processor, the recipe's settings, of the base model in 16 bits, and training). Raises SystemExit where
    it is not clear what the base is."""
    flags = ["--report_to", "none", "--push_to_hub", "false", *recipe_flags]
    _, processor, settings, training = load(recipe, run, flags)
    flag = four_bit_flag(recipe)
    if getattr(settings, flag):
        print(
            f"--{flag} is switched off: the base is not quantized. Of a run on 4-bit weights the answers will differ "
            "a little from the run's own"
        )
        setattr(settings, flag, False)
    return processor, settings, training


# ------------------------------------------------------------------------------------------------- what is compared on


def data_of(settings):
    """(name, split) of the run's data: first of those to evaluate on."""
    train = (settings.dataset_name, settings.dataset_train_split)
    if settings.eval_dataset_name:
        return [(settings.eval_dataset_name, settings.dataset_test_split or settings.dataset_train_split), train]
    return [(settings.dataset_name, settings.dataset_test_split), train]  # for None: test, if there is one


@contextlib.contextmanager
def offline_and_quiet():
    """Nothing is downloaded, and no progress shown."""
    with (
        patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        patch.object(constants, "HF_HUB_OFFLINE", True),
        open(os.devnull, "w") as quiet,
        contextlib.redirect_stderr(quiet),
    ):
        yield


def example(recipe, collator, settings):
    """-> (messages with PIL images, whether they end with a question, what they are): a row of the run's data; where
    there is none to read without a download, a picture and a question that are made up."""
    for name, split in data_of(settings):
        rows = None
        with contextlib.suppress(SystemExit, OSError, ValueError), offline_and_quiet():
            rows = rows_of(recipe, name, split, settings)
        if rows is None:
            continue
        for row in rows.select(range(min(20, len(rows)))):
            try:
                messages = collator.messages_of(row)
            except recipe.BadRow:
                continue
            if any(part["type"] == "image" for message in messages for part in message["content"]):
                return messages, messages[-1]["role"] == "user", f"row {row['row']} of {name}"
    picture = Image.effect_mandelbrot((336, 336), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    turn = user_turn(collator, "What is in the picture?", [picture])
    return [turn], True, "a made-up picture and question (the run's data are not here)"


def inputs(collator, messages, prompt):
    """Messages -> what the model's forward takes."""
    batch = dict(collator.tokenize([messages], prompt=prompt))
    if "image_bound" in batch:  # MiniCPM-V 2.6
        return {"attention_mask": batch.pop("attention_mask"), "data": batch}
    return batch


def logits(model, batch, dtype):
    """The last 256 positions' logits, (positions, vocabulary), float32 on the CPU. Adapters are in float32 beside
    16-bit weights, so in autocast, as in tools/generate.py."""
    device = next(model.parameters()).device
    batch = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), batch)
    with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        return model.eval()(**batch).logits[0, -256:].float().cpu()


def compare(ours, theirs, dtype):
    """-> (whether two (positions, vocabulary) logits agree within the tolerance of the dtype, a text that says by how
    much they differ)."""
    difference = (ours - theirs).abs()
    agree = bool(difference.mean() <= TOLERANCE[dtype] * theirs.std())  # false for NaN
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    text = (
        f"{difference.max():.2g} at most, {difference.mean():.2g} on average (logits vary by {theirs.std():.2g}); "
        f"the same token is likeliest at {same:.1%} of {len(ours)} positions"
    )
    return agree, text


# ---------------------------------------------------------------------------------------------------------------- save


def copy_code(base, revision, folder):
    """All code of a base model that brings its own, by names that mean the files of this folder."""
    if not Path(base).is_dir():
        base = snapshot_download(base, revision=revision, allow_patterns="*.py")
    for file in Path(base).glob("*.py"):
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    for file in folder.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        if "auto_map" in text and file.name != "tokenizer.json":
            file.write_text(re.sub(r'"[\w.-]+/[\w.-]+?--(\w+\.\w+)"', r'"\1"', text), encoding="utf-8")


def name_tokens_for_transformers_4(folder, tokenizer):
    """Write tokenizer_config.json so that Transformers 4.57 and 5 read the same tokenizer from it.

    As 5 writes it, 4.57 has no class TokenizersBackend and fails at a list as extra_special_tokens.
    """
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    named = config.pop("model_specific_special_tokens", None)
    others = config.pop("extra_special_tokens", None)
    if named:
        config["extra_special_tokens"] = named
    if others:
        config["additional_special_tokens"] = others
    if config.get("add_prefix_space", "unset") is None:
        del config["add_prefix_space"]  # llama.cpp's converter takes null for false
    has_own_code = "auto_map" in config
    if tokenizer.is_fast and not has_own_code:
        # This class takes tokenizer.json as it is, in both versions. LlamaTokenizer would put a BOS before every text
        # in 4.57, and in 5 build the steps around the vocabulary anew.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        # What the tokenizer's own class implies. 4.57's default would return token_type_ids, too, which these models
        # do not take.
        for name in ("clean_up_tokenization_spaces", "model_input_names", "padding_side", "truncation_side"):
            config[name] = getattr(tokenizer, name)
    file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def add_rope_of_transformers_4(config):
    """Into a configuration as a dict, and into its parts: rope_parameters by the names that Transformers 4.57 knows.

    Without rope_theta it takes its default, 10000 for most, whatever rope_parameters say.
    """
    rope = config.get("rope_parameters") or {}
    if config.get("model_type") == "gemma3_text":  # it has one for each kind of layer
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        own_keys = ("rope_theta", "partial_rotary_factor")  # in 4.57 these stand beside rope_scaling
        config |= {name: rope[name] for name in own_keys if name in rope}
        scaling = {name: value for name, value in rope.items() if name not in own_keys}
        if scaling.keys() - {"rope_type"} or scaling.get("rope_type", "default") != "default":
            config["rope_scaling"] = scaling
    for part in config.values():
        if isinstance(part, dict):
            add_rope_of_transformers_4(part)


def make_readable_by_transformers_4(folder, tokenizer):
    """Change what Transformers 5 wrote into a folder, so that 4.57 (vLLM, llama.cpp) reads the same model from it."""
    name_tokens_for_transformers_4(folder, tokenizer)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    add_rope_of_transformers_4(config)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save(model, processor, args, settings, folder):
    """The merged model, its processor and what tools/generate.py reads, into a folder."""
    # The names that published models have, and vLLM reads, whatever those of the base are: Transformers' own of today
    # lack the vision_model of CLIP and SigLIP.
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    make_readable_by_transformers_4(folder, processor.tokenizer)
    base, revision = settings.model_name_or_path, settings.model_revision
    if not (folder / "generation_config.json").exists():  # MiniCPM-V 2.6 has the file, and no such attribute
        with contextlib.suppress(OSError):
            GenerationConfig.from_pretrained(base, revision=revision).save_pretrained(folder)
    if getattr(settings, "trust_remote_code", False):
        copy_code(base, revision, folder)
    config = home(args.run) / "settings.yaml"
    if config.exists():  # which recipe, and how it asks
        shutil.copy(config, folder)


def end_answers_where_the_run_does(model, collator):
    """Into the model's generation config: the tokens that end an answer, where one is not the tokenizer's EOS."""
    if not hasattr(model, "generation_config"):
        return
    config = model.generation_config
    own = config.eos_token_id
    if own is None:
        own = []
    elif not isinstance(own, list):
        own = [own]
    config.eos_token_id = list(dict.fromkeys([*own, *collator.stop_ids]))
    if not config.do_sample:  # Vicuna's has a temperature all the same, with which Transformers would save nothing
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(config, name, None)


# --------------------------------------------------------------------------------------------------------------- merge


def load_base(recipe, settings, training):
    """The base model. Raises SystemExit."""
    base = settings.model_name_or_path
    try:
        if PreTrainedConfig.get_config_dict(base, revision=settings.model_revision)[0].get("quantization_config"):
            fail(
                f"{base} holds quantized weights: into those an adapter cannot be merged without loss; give the "
                "original by --model_name_or_path"
            )
        return recipe.load_model(settings, training)
    except UNREADABLE as e:
        fail(cannot_load(settings, e))


def check_space(model, args):
    """How many bytes the merged folder takes. Raises SystemExit where the disk has not so many."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values()
    needed = sum(tensor.nbytes for tensor in tensors)
    files = [path for path in args.run.iterdir() if path.is_file() and not path.name.startswith("adapter_model")]
    needed += sum(path.stat().st_size for path in files)
    free = shutil.disk_usage(args.output.absolute().parent).free
    if needed > free:
        fail(f"no space left for {args.output}: it takes {needed / 1e9:.3f} GB, there are {free / 1e9:.3f} GB")
    return needed


def merge(model, batch, dtype, args, base):
    """A base model -> (the same with the run's adapter merged into it, its logits on the batch). Raises SystemExit
    where these are not the adapter's."""
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    model = put_on(model, args.run, base)
    adapted = logits(model, batch, dtype)
    if model.active_peft_config.bias == "none":  # trained biases cannot be switched off
        with model.disable_adapter():
            untouched = logits(model, batch, dtype)
        print(f"the adapter changes logits by {compare(adapted, untouched, dtype)[1]}")
    try:
        model = model.merge_and_unload(safe_merge=True)
    except ValueError as e:
        fail(f"cannot merge {args.run}: {e}")
    for name, p in model.named_parameters():  # what was trained in full is float32 so far
        p.data = p.data.to(dtypes.get(name, dtype))
    merged = logits(model, batch, dtype)
    agree, difference = compare(merged, adapted, dtype)
    if not agree:
        fail(f"merged and adapter do not agree: logits differ by {difference}. Nothing was saved")
    print(f"merged, they differ from the adapter's by {difference}")
    return model, merged


def main(argv=None):
    """Parse, load, compare, merge, save, load again, rename."""
    args, recipe_flags = parse(argv)
    recipe = load_recipe(args.recipe, args.run)
    processor, settings, training = load_run(recipe, args.run, recipe_flags)
    collator = load_collator(recipe, processor, settings, training)
    messages, prompt, source = example(recipe, collator, settings)
    base, batch = settings.model_name_or_path, inputs(collator, messages, prompt)
    model = load_base(recipe, settings, training)
    dtype, needed = model.dtype, check_space(model, args)
    print(f"{base} in {str(dtype).removeprefix('torch.')}, {needed / 1e9:.3f} GB; compared on {source}")
    model, merged = merge(model, batch, dtype, args, base)

    part = args.output.with_name(f"{args.output.name}.part-{os.getpid()}")  # beside it, so that renaming moves nothing
    try:
        part.mkdir()
        end_answers_where_the_run_does(model, collator)
        save(model, processor, args, settings, part)
        del model
        gc.collect()
        torch.cuda.empty_cache()
        settings.model_name_or_path, settings.model_revision = str(part), None
        batch = inputs(recipe.Collator(recipe.load_processor(settings), settings, training), messages, prompt)
        again = logits(recipe.load_model(settings, training), batch, dtype)
        agree, difference = compare(again, merged, dtype)
        if not agree:
            fail(
                f"the saved folder, loaded again, is not what was merged: logits differ by {difference}. "
                "Nothing was left behind"
            )
        os.rename(part, args.output)
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        fail(f"cannot write {args.output}: {' '.join(str(e).split())}")
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"saved {args.output}, which loads alone, with a difference from what was merged of {difference}")


if __name__ == "__main__":
    start(main)
