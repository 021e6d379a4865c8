"""Merge a run's adapter into its base model: one folder that from_pretrained, and a server, load without PEFT.

    python tools/merge_adapter.py llava-lora llava-merged
    python tools/merge_adapter.py minicpm-lora minicpm-merged --model_name_or_path /models/MiniCPM-V-4.6    # the base is elsewhere by now
    python tools/merge_adapter.py idefics2-docvqa docvqa-merged --use_cpu --bf16 true                       # no GPU: slow, and enough
    python tools/generate.py llava-merged --image cat.jpg --question "What is this?"

RUN is what a recipe saved: adapter, processor, settings.yaml. Every other flag is the recipe's own; its precision is the one that is merged and saved
in: bf16, or fp16 on a GPU without it, or float32 with --use_cpu alone. A base that was trained on in 4 bits is loaded in 16: merged into
4-bit weights an adapter is partly rounded away. On an example from the run's data the logits of the merged model are compared with those of the adapter, and once more after the saved
folder was loaded alone; where they do not agree nothing is left behind, and the exit status is 1.
"""

import argparse
import gc
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
from transformers import GenerationConfig, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.generate import fail, home, load, load_recipe, put_on, rows_of, start, underscored, user_turn  # noqa: E402

# How far apart logits may be on average, in their own standard deviations. 16 bits: the adapter's product is no longer rounded by itself, layer by layer.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
# The names that published LLaVAs and PaliGemmas have, and vLLM reads. Those that Transformers saves today lack vision_model.
PUBLISHED = {
    "model.vision_tower": "vision_tower.vision_model",
    "model.language_model": "language_model.model",
    "lm_head": "language_model.lm_head",
    "model.multi_modal_projector": "multi_modal_projector",
    "model.image_newline": "image_newline",
}


def parse(argv=None):
    """-> (own arguments, the recipe's flags). Raises SystemExit where RUN is no run with an adapter, or OUTPUT cannot be written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder that a recipe wrote, with an adapter in it")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write; it must not exist")
    parser.add_argument(
        "--recipe", type=Path, help="file that trained RUN (default: what RUN's settings.yaml says, else sft_llava.py)"
    )
    parser.error = fail
    args, rest = parser.parse_known_args(argv)
    rest = underscored(rest)
    if not args.run.is_dir():
        fail(f"{args.run}: no such folder")
    if not (args.run / "adapter_config.json").exists() and (args.run / "config.json").exists():
        fail(f"{args.run} holds a whole model: there is nothing to merge")
    if os.path.lexists(args.output):
        fail(f"{args.output} exists: choose another OUTPUT")
    if not args.output.absolute().parent.is_dir() or not os.access(args.output.absolute().parent, os.W_OK):
        fail(f"{args.output}: its folder does not exist, or cannot be written")
    return args, rest


def load_run(recipe, run, rest):
    """-> (its processor, the recipe's settings, of the base model in 16 bits, and training). Raises SystemExit where it is not clear what the base is."""
    _, processor, settings, training = load(recipe, run, ["--report_to", "none", "--push_to_hub", "false", *rest])
    packed = "load_in_4bit" if hasattr(settings, "load_in_4bit") else "q_lora"
    if getattr(settings, packed):
        print(
            f"--{packed} is switched off: the base is not quantized. Of a run on 4-bit weights the answers will differ a little from the run's own"
        )
        setattr(settings, packed, False)
    return processor, settings, training


def example(recipe, collator, settings):
    """-> (messages with PIL images, whether they end with a question, what they are). A row of the run's data, of those to evaluate on where they have a name of
    their own; nothing is downloaded for it. Where there is none to read, a picture and a question that are made up."""
    if hasattr(settings, "data_path"):
        places = [(settings.eval_data_path, None), (settings.data_path, None)]
    else:
        split = settings.dataset_test_split
        places = [
            (
                settings.eval_dataset_name or (settings.dataset_name if split else None),
                split or settings.dataset_train_split,
            ),
            (settings.dataset_name, settings.dataset_train_split),
        ]
    for name, split in places:
        try:
            with (
                patch.object(datasets.config, "HF_HUB_OFFLINE", True),
                patch.object(constants, "HF_HUB_OFFLINE", True),
                open(os.devnull, "w") as quiet,
                patch.object(sys, "stderr", quiet),
            ):
                rows = rows_of(recipe, name, split, settings) if name else []
        except (SystemExit, OSError, ValueError):
            continue
        for n in range(min(20, len(rows))):
            try:
                messages = collator.messages_of(rows[n])
            except recipe.BadRow:
                continue
            if any(part["type"] == "image" for message in messages for part in message["content"]):
                return messages, messages[-1]["role"] == "user", f"row {rows[n]['row']} of {name}"
    picture = Image.effect_mandelbrot((336, 336), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    return (
        [user_turn(collator, "What is in the picture?", [picture])],
        True,
        "a made-up picture and question (the run's data are not here)",
    )


def inputs(collator, messages, prompt):
    """Messages -> what the model's forward takes."""
    batch = collator.tokenize([messages], prompt=prompt)
    if "image_bound" not in batch:
        return dict(batch)
    return {
        "data": {name: value for name, value in batch.items() if name != "attention_mask"},
        "attention_mask": batch["attention_mask"],
    }  # MiniCPM-V 2.6


def logits(model, batch, dtype):
    """The last 256 positions' logits, (positions, vocabulary), float32 on the CPU. Adapters are in float32 beside 16-bit weights, so in autocast, as in tools/generate.py."""
    device = next(model.parameters()).device
    move = lambda x: (
        x.to(device)
        if hasattr(x, "to")
        else {k: move(v) for k, v in x.items()}
        if isinstance(x, dict)
        else [move(v) for v in x]
        if isinstance(x, list)
        else x
    )
    with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        return model.eval()(**{name: move(value) for name, value in batch.items()}).logits[0, -256:].float().cpu()


def compare(ours, theirs, dtype):
    """-> (whether two (positions, vocabulary) logits agree within the tolerance of the dtype, a text that says by how much they differ)."""
    apart = (ours - theirs).abs()
    agree = bool(apart.mean() <= TOLERANCE[dtype] * theirs.std())  # false for NaN
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    return (
        agree,
        f"{apart.max():.2g} at most, {apart.mean():.2g} on average (logits vary by {theirs.std():.2g}); the same token is likeliest at {same:.1%} of {len(ours)} positions",
    )


def save(model, processor, args, settings, folder):
    """The merged model, its processor and what tools/generate.py reads, into a folder."""
    if getattr(model.config, "model_type", None) in ("llava", "llava_next", "paligemma"):
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        state = {
            re.sub(f"^({'|'.join(map(re.escape, PUBLISHED))})", lambda found: PUBLISHED[found[0]], name): value
            for name, value in model.state_dict().items()
            if name not in tied
        }
        model.save_pretrained(folder, state_dict=state, save_original_format=False)
    else:
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if not (folder / "generation_config.json").exists():  # MiniCPM-V 2.6 has the file, and no such attribute
        try:
            GenerationConfig.from_pretrained(
                settings.model_name_or_path, revision=settings.model_revision
            ).save_pretrained(folder)
        except OSError:
            pass
    if getattr(
        settings, "trust_remote_code", False
    ):  # all of its code, and by names that mean the files of this folder
        base = settings.model_name_or_path
        base = Path(
            base
            if Path(base).is_dir()
            else snapshot_download(base, revision=settings.model_revision, allow_patterns="*.py")
        )
        for file in base.glob("*.py"):
            if not (folder / file.name).exists():
                shutil.copy(file, folder)
        for file in folder.glob("*.json"):
            if (
                "--" in (text := file.read_text(encoding="utf-8"))
                and "auto_map" in text
                and file.name != "tokenizer.json"
            ):
                file.write_text(re.sub(r'"[\w.-]+/[\w.-]+?--(\w+\.\w+)"', r'"\1"', text), encoding="utf-8")
    if (said := home(args.run) / "settings.yaml").exists():  # which recipe, and how it asks
        shutil.copy(said, folder)


def main(argv=None):
    """Parse, load, compare, merge, save, load again, rename."""
    args, rest = parse(argv)
    recipe = load_recipe(args.recipe, args.run)
    processor, settings, training = load_run(recipe, args.run, rest)
    collator = recipe.Collator(processor, settings, training)
    messages, prompt, what = example(recipe, collator, settings)
    batch, base = inputs(collator, messages, prompt), settings.model_name_or_path
    try:
        if PreTrainedConfig.get_config_dict(base, revision=settings.model_revision)[0].get("quantization_config"):
            fail(
                f"{base} holds quantized weights: into those an adapter cannot be merged without loss; give the original by --model_name_or_path"
            )
        model = recipe.load_model(settings, training)
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        fail(f"cannot load {base}, the base model (another place: --model_name_or_path): {' '.join(str(e).split())}")
    dtype, dtypes = model.dtype, {name: p.dtype for name, p in model.named_parameters()}
    needed = sum(
        p.numel() * p.element_size() for p in {id(p): p for p in [*model.parameters(), *model.buffers()]}.values()
    )
    needed += sum(
        path.stat().st_size
        for path in args.run.iterdir()
        if path.is_file() and not path.name.startswith("adapter_model")
    )
    if needed > (free := shutil.disk_usage(args.output.absolute().parent).free):
        fail(f"no space left for {args.output}: it takes {needed / 1e9:.3f} GB, there are {free / 1e9:.3f} GB")
    print(f"{base} in {str(dtype).removeprefix('torch.')}, {needed / 1e9:.3f} GB; compared on {what}")

    model = put_on(model, args.run, base)
    adapted = logits(model, batch, dtype)
    if model.active_peft_config.bias == "none":  # trained biases cannot be switched off
        with model.disable_adapter():
            print(f"the adapter changes logits by {compare(adapted, logits(model, batch, dtype), dtype)[1]}")
    try:
        model = model.merge_and_unload(safe_merge=True)
    except ValueError as e:
        fail(f"cannot merge {args.run}: {e}")
    for name, p in model.named_parameters():  # what was trained in full is float32 so far
        p.data = p.data.to(dtypes.get(name, dtype))
    merged = logits(model, batch, dtype)
    agree, said = compare(merged, adapted, dtype)
    if not agree:
        fail(f"merged and adapter do not agree: logits differ by {said}. Nothing was saved")
    print(f"merged, they differ from the adapter's by {said}")

    part = args.output.with_name(f"{args.output.name}.part-{os.getpid()}")  # beside it, so that renaming moves nothing
    try:
        part.mkdir()
        if hasattr(model, "generation_config"):  # the token that ends an answer, where it is not the tokenizer's EOS
            own = model.generation_config.eos_token_id
            model.generation_config.eos_token_id = list(
                dict.fromkeys([*(own if isinstance(own, list) else [own] * (own is not None)), *collator.stop_ids])
            )
        save(model, processor, args, settings, part)
        del model
        gc.collect()
        torch.cuda.empty_cache()
        settings.model_name_or_path, settings.model_revision = str(part), None
        again = inputs(recipe.Collator(recipe.load_processor(settings), settings, training), messages, prompt)
        agree, said = compare(logits(recipe.load_model(settings, training), again, dtype), merged, dtype)
        if not agree:
            fail(
                f"the saved folder, loaded again, is not what was merged: logits differ by {said}. Nothing was left behind"
            )
        os.rename(part, args.output)
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        fail(f"cannot write {args.output}: {' '.join(str(e).split())}")
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"saved {args.output}, which loads alone, with a difference from what was merged of {said}")


if __name__ == "__main__":
    start(main)
