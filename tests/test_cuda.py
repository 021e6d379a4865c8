"""Each recipe at its CUDA settings, on fake tensors on a fake GPU: tests/fake_cuda.py, which also runs by hand."""

from pathlib import Path

import cuda_reports as cuda
import pytest
from cuda_reports import OPPOSITE, PAIRWISE, Bound, report_of, reports
from recipes import NAMES

pytestmark = cuda.needs_compiler

# Counts of today: lower a bound where less happens. In fp16 sft_llava.py waits once more: the scaler does so for
# each optimizer but PyTorch's fused one.
BOUNDS = {
    "sft_llava": Bound(waits=16, waits_of_ours=1, copies=0, masked=0, evaluation_waits=6),
    "dpo_idefics2": Bound(waits=59, waits_of_ours=1, copies=0, masked=12, evaluation_waits=28),
    "idefics2_docvqa": Bound(waits=15, waits_of_ours=1, copies=0, masked=0, evaluation_waits=7),
    # Copies: the positions of the patches of a size, a few kB.
    "finetune_minicpm_lora": Bound(waits=5, waits_of_ours=1, copies=2, masked=0, evaluation_waits=2),
    "llava_two_stage": Bound(waits=5, waits_of_ours=1, copies=0, masked=0, evaluation_waits=2),
}
# What --optim stands for, and whether its states move to the host's memory when the GPU is full.
OPTIMIZERS = dict.fromkeys(NAMES, ("torch.AdamW", False)) | {"sft_llava": ("bitsandbytes.AdamW", True)}
RUNS = [(recipe, settings) for recipe in NAMES for settings in PAIRWISE]


@pytest.fixture(params=RUNS, ids="-".join)
def report(request):
    """Each recipe with each pair of settings."""
    recipe, settings = request.param
    return report_of(settings, (recipe, "--only", *PAIRWISE))


def test_it_trains_and_evaluates_on_the_gpu(report):
    cuda.check_run(report)


def test_what_is_trained_is_float32_and_has_gradients(report):
    cuda.check_trained(report)


def test_what_is_frozen_is_in_16_or_4_bits(report):
    cuda.check_frozen(report)


def test_the_optimizer_is_the_one_that_the_recipe_names(report):
    assert (report["optimizer"], report["is_paged"]) == OPTIMIZERS[report["recipe"]]


def test_products_are_in_16_bits(report):
    known = [cuda.TRIANGULAR_SYSTEM] if report["recipe"] == "finetune_minicpm_lora" else []
    cuda.check_dtypes_of_products(report, known)


def test_logits_are_made_for_trained_tokens_only(report):
    cuda.check_width(report)


def test_the_host_hardly_waits(report):
    cuda.check_bound(report, BOUNDS[report["recipe"]])


@pytest.mark.parametrize("recipe", NAMES)
def test_the_batch_that_fills_a_card_is_found_on_the_gpu(recipe):
    auto = ["per_device_train_batch_size=auto", "per_device_eval_batch_size=auto"]
    report = report_of("bf16-4-on", (*NAMES, "--only", "bf16-4-on", "--set", *auto), recipe=recipe)
    assert not report["error"], report["error"]
    assert cuda.events(report, "fill", cuda.MASKED, "attention"), "no batch was tried"


def test_the_projector_is_trained_on_the_gpu():
    [report] = reports("llava_two_stage", "--only", "bf16-16-off", "--set", "stage=align", "lora_r=0")
    cuda.check_run(report)
    cuda.check_trained(report)
    cuda.check_bound(report, BOUNDS["llava_two_stage"])
    assert {name.split(".")[1] for name, *_ in report["trained"]} == {"multi_modal_projector"}


@pytest.mark.parametrize("model", ["llava-1.5-7b", "paligemma"])
@pytest.mark.parametrize("settings", OPPOSITE)
def test_pairs_of_other_models_are_trained_on_the_gpu(model, settings):
    command = ("dpo_idefics2", "--model", "llava-1.5-7b", "paligemma", "--only", *OPPOSITE)
    report = report_of(settings, command, model=model)
    cuda.check_run(report)
    cuda.check_trained(report)
    cuda.check_frozen(report)
    cuda.check_dtypes_of_products(report)
    cuda.check_width(report)
    cuda.check_bound(report, BOUNDS["dpo_idefics2"])


# ---------------------------------------------------------------- what would go wrong on a GPU, put in on purpose

LOSS = """


def faulty_loss(self, model, inputs, *args, stock=Trainer.compute_loss, **kwargs):
    ids = inputs["input_ids"]
    {fault}
    return stock(self, model, inputs, *args, **kwargs)


Trainer.compute_loss = faulty_loss
"""
WEIGHTS = "\n\ndef train_in_float32(trainer):\n    trainer.model.bfloat16()\n"
DTYPE = "\n\ndef weight_dtype(training):\n    return torch.float32\n"


def check_bound_of_sft(report):
    cuda.check_bound(report, BOUNDS["sft_llava"])


# What is added to sft_llava.py, the check that must find it, its message.
FAULTS = {
    "a tensor left on the CPU": (LOSS.format(fault="ids + torch.ones(1)"), cuda.check_run, "cuda:0.*cpu"),
    "item": (
        LOSS.format(fault="ids.max().item()"),
        check_bound_of_sft,
        r"waits for the GPU.*\nby lines of the recipe: 3\n  2 x item at sft_llava\.py:\d+",
    ),
    "a mask as index": (LOSS.format(fault="ids[ids > 3]"), check_bound_of_sft, "2 x index by a mask at sft_llava.py"),
    "a blocking copy": (
        LOSS.format(fault="torch.tensor([1.0], device=ids.device)"),
        check_bound_of_sft,
        "2 x cpu -> cuda at sft_llava.py",
    ),
    "a mask for attention": (
        LOSS.format(
            fault="q = ids.new_ones(1, 1, 4, 8).bfloat16(); mask = q[..., :4] > 0\n"
            "    torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)"
        ),
        check_bound_of_sft,
        "2 x q .*, mask .* at sft_llava.py",
    ),
    "a product in float32": (
        LOSS.format(fault="ids.float() @ ids.float().T"),
        cuda.check_dtypes_of_products,
        "x mm .* at sft_llava.py",
    ),
    "logits of all tokens": (
        LOSS.format(fault="self.model.get_output_embeddings()(self.model.get_input_embeddings()(ids))"),
        cuda.check_width,
        "x mm .*, where",
    ),
    "frozen weights in float32": (DTYPE, cuda.check_frozen, "frozen: .* is float32"),
    "adapters in bf16": (WEIGHTS, cuda.check_trained, "lora_A.* is bfloat16"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A function: the name of a fault -> the report of a copy of sft_llava.py that has it. All run in one process."""
    copies = {}
    for name, (code, _, _) in FAULTS.items():
        copies[name] = tmp_path_factory.mktemp("faulty") / "sft_llava.py"
        stock = (Path(__file__).parents[1] / "sft_llava.py").read_text()
        copies[name].write_text(stock + code)

    def report_with(name):
        command = (*copies.values(), "--only", "bf16-16-off", "--set", "eval_strategy=no")
        return report_of("bf16-16-off", command, recipe=str(copies[name]))

    return report_with


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(faulty, name):
    _, check, message = FAULTS[name]
    with pytest.raises(AssertionError, match=message):
        check(faulty(name))
