"""Draw docs/images/shared-prompt.png: the sequence, positions and mask that dpo_idefics2.py gives the language model
for one pair.

python docs/draw_shared_prompt.py      # from the project's root, after make demo or with requirements-dev.txt
installed
"""

import sys
import tempfile
from pathlib import Path

import matplotlib
import torch
from datasets import Dataset

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dpo_idefics2 as recipe  # noqa: E402
from tiny import preferences  # noqa: E402

PAIR = {"row": 0, "question": "Which digit?", "chosen": "It is a five.", "rejected": "It is a two.", "folder": ""}


def seen():
    """What the language model is given for PAIR: (tokens, positions (L), mask (L, L), parts (L))."""
    folder = Path(tempfile.mkdtemp())
    processor = preferences.processor()
    preferences.model(processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    argv = [
        "--use_cpu",
        "--model_name_or_path",
        str(folder),
        "--load_in_4bit",
        "false",
        "--eval_strategy",
        "no",
        "--report_to",
        "none",
    ]
    settings, training = recipe.parse([*argv, "--output_dir", str(folder / "out")])
    processor = recipe.load_processor(settings)
    row = PAIR | {"image": preferences.digits.to_pil(preferences.make_rows(0, True, 1)[0]["picture"])}
    collator = recipe.Collator(processor, settings, training)
    trainer = recipe.SharedPromptDPOTrainer(
        settings,
        recipe.load_model(settings, training),
        args=training,
        data_collator=collator,
        train_dataset=Dataset.from_list([{"image": 0}]),
        processing_class=processor,
        peft_config=recipe.lora_config(settings),
    )
    given = {}
    trainer.model.get_base_model().model.text_model.register_forward_pre_hook(
        lambda _, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    language = trainer.model.get_base_model().model
    language.register_forward_pre_hook(lambda _, args, kwargs: given.update(ids=kwargs["input_ids"]), with_kwargs=True)
    with torch.no_grad():
        trainer.compute_loss(trainer.model, collator([row]))
    tokens = [processor.tokenizer.decode([token]) for token in given["ids"][0]]
    return tokens, given["position_ids"][0], given["attention_mask"][0, 0]


def main():
    """Draw it."""
    tokens, positions, mask = seen()
    tokens = [
        {"<image>": "img", "<fake_token_around_image>": "fake", "<end_of_utterance>": "end", "\n": "\\n"}.get(t, t)
        for t in tokens
    ]
    restart = [i for i in range(1, len(positions)) if positions[i] <= positions[i - 1]][0]
    last = positions[
        restart
    ].item()  # where the prompt's last token stands, which the rejected answer begins with again
    figure, axis = plt.subplots(figsize=(7.6, 7.2), layout="constrained")
    colour = torch.zeros(len(tokens), len(tokens))
    for name, start, stop in ((1, 0, last + 1), (2, last + 1, restart), (3, restart, len(tokens))):
        colour[start:stop] = mask[start:stop].float() * name
    axis.imshow(
        colour, cmap=matplotlib.colors.ListedColormap(["white", "#9db4c8", "#6aa56a", "#c97b6a"]), vmin=0, vmax=3
    )
    axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
    axis.set_yticks(
        range(len(tokens)), [f"{t}  {p}" for t, p in zip(tokens, positions.tolist(), strict=True)], fontsize=8
    )
    axis.set(xlabel="sees", ylabel="token, and its position")
    for edge in (last + 0.5, restart - 0.5):
        axis.axhline(edge, color="black", lw=0.8)
        axis.axvline(edge, color="black", lw=0.8)
    axis.set_xticks([i - 0.5 for i in range(len(tokens))], minor=True)
    axis.set_yticks([i - 0.5 for i in range(len(tokens))], minor=True)
    axis.grid(which="minor", color="#e4e4e4", lw=0.5)
    axis.tick_params(which="minor", length=0)
    for text, start, stop in (
        ("prompt, image", 0, last + 1),
        ("chosen", last + 1, restart),
        ("rejected", restart, len(tokens)),
    ):
        axis.text((start + stop - 1) / 2, -0.9, text, ha="center", fontsize=10, weight="bold")
    figure.savefig(ROOT / "docs/images/shared-prompt.png", dpi=110)


if __name__ == "__main__":
    main()
