"""sft_llava.py at its CUDA settings with one family of each kind, on a fake GPU: see tests/test_cuda.py."""

import cuda_reports as cuda
import pytest
from cuda_reports import OPPOSITE, Bound, report_of
from families import HAS_TORCHVISION, marked

from tiny.families import NEED_TORCHVISION

pytestmark = cuda.needs_compiler

# Counts of today. Nearly all waits are in Transformers' own code for each family: Qwen's finds positions on the host,
# image by image. In Gemma 3 the tokens of an image see each other, by a mask.
BOUNDS = {
    "qwen3_vl": Bound(waits=92, waits_of_ours=1, copies=4, masked=0, evaluation_waits=44),
    "qwen3_5": Bound(waits=66, waits_of_ours=1, copies=4, masked=0, evaluation_waits=31),
    "gemma3": Bound(waits=14, waits_of_ours=1, copies=0, masked=8, evaluation_waits=5),
    "smolvlm": Bound(waits=24, waits_of_ours=1, copies=0, masked=0, evaluation_waits=10),
    "internvl": Bound(waits=16, waits_of_ours=1, copies=0, masked=0, evaluation_waits=6),
}
CAN_RUN = [family for family in BOUNDS if HAS_TORCHVISION or family not in NEED_TORCHVISION]


@pytest.mark.parametrize("family", marked(BOUNDS))
@pytest.mark.parametrize("settings", OPPOSITE)
def test_a_family_is_trained_on_the_gpu(family, settings):
    report = report_of(settings, ("sft_llava", "--model", *CAN_RUN, "--only", *OPPOSITE), model=family)
    cuda.check_run(report)
    cuda.check_trained(report)
    cuda.check_frozen(report)
    cuda.check_dtypes_of_products(report, [cuda.TRIANGULAR_SYSTEM] if family == "qwen3_5" else [])
    cuda.check_width(report)
    cuda.check_bound(report, BOUNDS[family])


# Of pairs, with shared prompts. The stock trainer waits 18 times more with Qwen3-VL.
BOUNDS_OF_PAIRS = {
    "qwen3_vl": Bound(waits=297, waits_of_ours=1, copies=8, masked=12, evaluation_waits=132),
    "smolvlm": Bound(waits=55, waits_of_ours=1, copies=0, masked=12, evaluation_waits=26),
    "internvl": Bound(waits=39, waits_of_ours=1, copies=0, masked=12, evaluation_waits=18),
}
CAN_RUN_PAIRS = [family for family in BOUNDS_OF_PAIRS if HAS_TORCHVISION or family not in NEED_TORCHVISION]


@pytest.mark.parametrize("family", marked(BOUNDS_OF_PAIRS))
@pytest.mark.parametrize("settings", OPPOSITE)
def test_pairs_of_a_family_are_trained_on_the_gpu(family, settings):
    report = report_of(settings, ("dpo_idefics2", "--model", *CAN_RUN_PAIRS, "--only", *OPPOSITE), model=family)
    cuda.check_run(report)
    cuda.check_trained(report)
    cuda.check_frozen(report)
    cuda.check_dtypes_of_products(report)
    cuda.check_width(report)
    cuda.check_bound(report, BOUNDS_OF_PAIRS[family])
