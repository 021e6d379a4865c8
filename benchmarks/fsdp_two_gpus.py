"""Try configs/fsdp2.yaml on two GPUs: do two processes that share out a model train like one?
It has not run yet: FSDP2 was only tried on CPUs (tests/test_sharded.py).

    python benchmarks/fsdp_two_gpus.py              # every recipe, tiny models with random weights: minutes
    python benchmarks/fsdp_two_gpus.py sft_llava    # one

Each recipe runs on one GPU with two rows at once, then on both with one row each: in bf16, all but llava_two_stage.py
in 4 bits, four steps with evaluations, answers and checkpoints. The second run is then resumed from a checkpoint. The
losses must agree to 2 %, and after the checkpoint be the same. Exit status 1 if not."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN = "--model_name_or_path model --dataset_name json/train.json"
# A recipe: its tiny model, the flags of that model and its data, in its folder.
RECIPES = {
    "sft_llava": ("llava", f"{OWN} --lora_dropout 0"),
    "idefics2_docvqa": ("idefics2", f"{OWN} --lora_dropout 0"),
    "dpo_idefics2": ("idefics2_dpo", OWN),
    "finetune_minicpm_lora": (
        "minicpmv4_6",
        "--model_name_or_path model --dataset_name json/train.json --q_lora true",
    ),
    "llava_two_stage": (
        "llava_two_stage",
        "--stage align --vision_tower vision --language_model language --dataset_name json/captions.json",
    ),
}
RUN = """--image_folder json/images --max_steps 4 --rows_per_step 4 --logging_steps 1 --eval_strategy steps
--eval_steps 2 --save_steps 2 --max_eval_rows 4 --bf16 true --optim adamw_torch --load_best_model_at_end false
--report_to none""".split()


def losses(output_dir):
    """{step: loss} of a finished run."""
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


def run(launcher, name, folder, output_dir, gpus, *flags):
    """Run a recipe in the folder with its tiny model. -> its losses."""
    recipe_flags = RECIPES[name][1].split()
    command = [sys.executable, *launcher, ROOT / f"{name}.py", *recipe_flags, *RUN, "--output_dir", output_dir, *flags]
    subprocess.run([*map(str, command)], cwd=folder, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus}, check=True)
    return losses(folder / output_dir)


def try_recipe(name, folder):
    """-> what is wrong with a recipe on two GPUs, a list of texts."""
    kind = RECIPES[name][0]
    build = [sys.executable, "-m", "tiny", kind, "--base_steps", "0", "--out", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True)
    config = ROOT / "configs" / "fsdp2.yaml"
    both = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", 2]
    one = run([], name, folder, "one", "0", "--per_device_train_batch_size", "2")
    two = run(both, name, folder, "two", "0,1", "--per_device_train_batch_size", "1")
    problems = []
    for step, loss in one.items():
        if abs(two[step] / loss - 1) > 0.02:
            problems.append(f"step {step}: loss {two[step]}, alone {loss}")
    resume = ["--per_device_train_batch_size", "1", "--resume_from_checkpoint", "two/checkpoint-2"]
    again = run(both, name, folder, "again", "0,1", *resume)
    for step in (3, 4):
        if again[step] != two[step]:
            problems.append(f"step {step}: loss {again[step]}, before it was resumed {two[step]}")
    print(f"{name}: losses alone {one}, shared out {two}, resumed {again}")
    return problems


def main(names):
    wrong = {}
    for name in names or RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            wrong[name] = try_recipe(name, Path(folder))
    for name, problems in wrong.items():
        print(f"{name}: {'; '.join(problems) or 'two GPUs train like one'}")
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
