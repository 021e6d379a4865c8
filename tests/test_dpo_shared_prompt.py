"""dpo_idefics2.py against TRL's own DPOTrainer: the same losses, metrics and gradients, from one sequence for each
pair and one pass of its picture through the vision tower."""

import contextlib
import copy
import functools
import inspect
import itertools
import random
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import log, short_run
from datasets import Dataset
from families import marked
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from recipes import Loaded, Recipe, no_weights
from torch.nn.attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.integrations import flex_attention as transformers_flex
from trl import DPOTrainer

import dpo_idefics2
from dpo_idefics2 import SharedPromptDPOTrainer
from tiny import families as tiny_families

WORDS = "is there a digit in this image seven an even one written by hand black ink on white paper three".split()
# words of question, chosen and rejected answer; behind the third, beside the second, there is room for a whole prompt
LENGTHS = [(3, 4, 2), (8, 24, 30), (1, 1, 1), (12, 1, 6), (2, 7, 7), (5, 3, 1), (9, 2, 3), (4, 5, 8)]
FLAGS = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2}
FLAGS |= {"load_in_4bit": False, "activation_checkpointing": False, "max_length": 2000, "sample_rows": 0}
FLAGS |= {"eval_strategy": "no", "per_device_eval_batch_size": 3, "save_strategy": "no", "logging_steps": 1}
FIXTURES = {"idefics2": "tiny_pairs", "llava": "tiny_llava", "paligemma": "tiny_paligemma"}
MORE_FIXTURES = {"paligemma2": "tiny_paligemma2", "llava_next": "tiny_next"}
families = pytest.mark.parametrize("family", FIXTURES)
TINY_NAMES = {"video_llama_3": "video_llama3"}  # in tiny/families.py, where it is not the model type
EVERY_FAMILY = [TINY_NAMES.get(model_type, model_type) for model_type in dpo_idefics2.SHARED]
# What most people train; of the others one case each is compared.
POPULAR = """idefics2 llava paligemma qwen2_5_vl qwen3_vl smolvlm idefics3 internvl llava_onevision gemma3""".split()
CASES = list(itertools.product(POPULAR, ["all", "language"], [True, False]))
CASES += [(family, "all", True) for family in EVERY_FAMILY if family not in POPULAR]


# ------------------------------------------------------------------------------------------------- what the tests use
def marked_cases(cases):
    """Tuples, first a family, for parametrize: skipped where that needs torchvision and there is none."""
    marks_of = {}
    for family in marked(EVERY_FAMILY):
        marks_of[family.values[0]] = family.marks
    return [pytest.param(*case, marks=marks_of[case[0]]) for case in cases]


def make_rows(seed=0):
    """Pairs of very different lengths, each about a picture of its own."""
    dice = random.Random(seed)

    def text(count, end):
        return " ".join(dice.choices(WORDS, k=count)) + end

    rows = []
    for n, (asked, chosen, rejected) in enumerate(LENGTHS):
        image = Image.frombytes("RGB", (56, 56), dice.randbytes(56 * 56 * 3))
        texts = {"question": text(asked, "?"), "chosen": text(chosen, " yes"), "rejected": text(rejected, " no")}
        rows.append({"row": n, "image": image, **texts})
    return rows


ROWS = make_rows()


def turn(role, text):
    return {"role": role, "content": text}


def mixed_rows():
    """Pairs with several pictures, with none, after several turns, after a system turn."""
    red, lime, blue = (row["image"] for row in ROWS[:3])
    several_turns = [turn("user", "<image>\nIs it a seven?"), turn("assistant", "no"), turn("user", "And by hand?")]
    system_turn = [turn("system", "Be short."), turn("user", "<image>\nWhich digit is this?")]
    prompts = [
        ([red, lime], "<image>\n<image>\nWhich digits are these?"),
        ([], "Which digit comes after one?"),
        ([blue], several_turns),
        ([lime], system_turn),
        ([blue, red], [*several_turns[:2], turn("user", "<image>\nIs this one even?")]),
    ]
    rows = []
    for n, (images, question) in enumerate(prompts):
        _, chosen, rejected = (ROWS[n][name] for name in ("question", "chosen", "rejected"))
        rows.append({"row": n, "image": images, "question": question, "chosen": chosen, "rejected": rejected})
    return rows


MIXED_ROWS = mixed_rows()


@pytest.fixture(scope="module")
def base(request, tmp_path_factory):
    """A function: family -> a folder with model/. Its random weights are as large as their width asks for: so what is
    said depends on what is seen."""

    @functools.cache
    def made(family):
        folder = tmp_path_factory.mktemp(family)
        fixture = (FIXTURES | MORE_FIXTURES).get(family)
        if fixture:
            shutil.copytree(request.getfixturevalue(fixture) / "model", folder / "model")
        else:
            tiny_families.build(family, folder)
        model = AutoModelForImageTextToText.from_pretrained(folder / "model")
        if family == "gemma3":
            model.config.text_config.sliding_window = 512  # longer than any row here, as the published one is
        if fixture:
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.data *= 4
        else:
            torch.manual_seed(0)
            for weight in model.parameters():
                weight.data += 0.05 * torch.randn_like(weight)
        model.save_pretrained(folder / "model")
        return folder

    return made


def stir(model, seed=1):
    """Give every B that is trained random values, always the same: with B = 0 policy and reference would be one."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name and weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.05)
    return model


@pytest.fixture(scope="module")
def make(base, tmp_path_factory):
    """A function: class, family, settings as keywords -> a trainer on ROWS whose policy is not its reference.
    `change`: a function that changes what the trainer is given. `double`: in float64."""

    def made(trainer_class, family, change=None, double=False, **settings):
        argv = short_run(base(family), tmp_path_factory.mktemp("run"), **{**FLAGS, **settings})
        settings, training = dpo_idefics2.parse(argv)
        processor = dpo_idefics2.load_processor(settings)
        torch.manual_seed(0)
        given = {
            "args": training,
            "model": dpo_idefics2.load_model(settings, training),
            "peft_config": dpo_idefics2.lora_config(settings),
            "processing_class": processor,
            "data_collator": dpo_idefics2.Collator(processor, settings, training),
            "train_dataset": Dataset.from_list(ROWS),
            "eval_dataset": Dataset.from_list(ROWS[3:]),
        }
        if change:
            change(given)
        if trainer_class is SharedPromptDPOTrainer:
            given["settings"] = settings
        trainer = trainer_class(**given)
        stir(trainer.model)
        if double:
            trainer.model.double()
        return trainer

    return made


@pytest.fixture(scope="module")
def both(make):
    """A function: as `make`, without the class -> TRL's trainer and the recipe's. Each is made once, and not trained.
    `obstacle`: what keeps the recipe's from sharing prompts, if anything does."""

    @functools.cache
    def made(family, obstacle=None, **settings):
        stock, shared = (make(kind, family, **settings) for kind in (DPOTrainer, SharedPromptDPOTrainer))
        if obstacle is None:
            assert shared.why_not_shared is None
        else:
            assert obstacle in shared.why_not_shared
        return stock, shared

    return made


def whole(model):
    """The model itself, without PEFT around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def to_left(batch):
    """A batch padded on the right -> padded on the left, as a collator without `pairs` would make it."""
    order = batch["attention_mask"].argsort(dim=1, stable=True)
    batch = {name: values for name, values in batch.items() if name != "pairs"}
    return {name: values.gather(1, order) if values.shape == order.shape else values for name, values in batch.items()}


def step(trainer, batch):
    """One step -> its loss, the outputs for policy and reference, gradients, what would be logged."""
    base, outputs = whole(trainer.model), []
    forward = base.forward

    def spy(*args, **kwargs):
        outputs.append(forward(*args, **kwargs))
        return outputs[-1]

    batch = dict(batch)
    if not isinstance(trainer, SharedPromptDPOTrainer) or trainer.why_not_shared:
        batch.pop("pairs", None)
    if base.dtype == torch.float64:
        batch["pixel_values"] = batch["pixel_values"].double()
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._total_train_tokens = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "forward", spy)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch)))
        loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return SimpleNamespace(loss=loss.item(), outputs=outputs, gradients=gradients, metrics=metrics)


def assert_same(want, got, log_probs=1e-4, gradients=1e-5):
    """Hold the recipe's step to TRL's. `log_probs`: how far an answer's log-probability may be off, of policy and
    reference; `gradients`: how far that of a matrix, by its size. Loss and metrics agree to 1e-5 of their size."""
    assert len(want.outputs) == len(got.outputs) == 2
    answers = []
    for theirs, mine in zip(want.outputs, got.outputs):
        assert torch.equal(theirs.log_probs != 0, mine.log_probs != 0)  # at the same places
        torch.testing.assert_close(mine.log_probs, theirs.log_probs, atol=log_probs, rtol=0)
        answers.append(theirs.log_probs.sum(1))
        torch.testing.assert_close(mine.log_probs.sum(1), answers[-1], atol=log_probs, rtol=0)
    assert (answers[0] - answers[1]).abs().max() > 0.01  # the policy is not its reference
    assert want.gradients.keys() == got.gradients.keys() and len(got.gradients) > 10
    largest = max(gradient.norm() for gradient in want.gradients.values())
    for name, gradient in want.gradients.items():
        size = max(gradient.norm(), 1e-4 * largest)
        assert (got.gradients[name] - gradient).norm() / size < gradients, name
    assert "logits/chosen" in got.metrics and got.metrics == pytest.approx(want.metrics, rel=1e-5, abs=1e-5)
    assert got.loss == pytest.approx(want.loss, rel=1e-5, abs=1e-5)


# --------------------------------------------------------------------------------------------------- the same numbers
@pytest.mark.parametrize("family, adapters, checkpointing", marked_cases(CASES))
def test_a_step_is_the_stock_trainers(both, family, adapters, checkpointing):
    """Batches of one to four pairs, padded on either side, with rows much shorter than others."""
    stock, shared = both(family, adapters=adapters, activation_checkpointing=checkpointing)
    for start, end in ((0, 1), (1, 3), (1, 4), (4, 8)):
        right = shared.data_collator(ROWS[start:end])
        for batch in (right, to_left(right)):
            mine = step(shared, batch)
            assert_same(step(stock, batch), mine)
    inside = any(re.search(r"vision|visual|connector|projector", name) for name in mine.gradients)
    assert inside == (adapters == "all")


SEVERAL_PICTURES = [(family, adapters) for family, adapters, checkpointing in CASES if checkpointing]


@pytest.mark.parametrize("family, adapters", marked_cases(case for case in SEVERAL_PICTURES if case[0] != "paligemma"))
def test_several_pictures_none_several_turns_and_a_system_turn(both, family, adapters):
    """Of PaliGemma a row has one picture and one turn."""
    stock, shared = both(family, adapters=adapters)
    for rows in (MIXED_ROWS[:2], MIXED_ROWS[1:2], MIXED_ROWS[2:4], MIXED_ROWS):
        right = shared.data_collator(rows)
        for batch in (right, to_left(right)):
            assert_same(step(stock, batch), step(shared, batch))


@pytest.mark.parametrize("family", ["idefics2", "llava"])
def test_in_float64_nothing_is_left_of_the_difference(both, family):
    """But for the head, which TRL computes in float32: so it was rounding. (PaliGemma's norms round to float32.)"""
    stock, shared = both(family, adapters="all", double=True)
    right = shared.data_collator(ROWS[:4])
    for batch in (right, to_left(right)):  # one step of float32 at 64 is 8e-6
        assert_same(step(stock, batch), step(shared, batch), log_probs=1e-5, gradients=1e-6)


def test_with_a_sliding_window_and_capped_logits(both):
    """As PaliGemma 2 has them; no row is longer than the window."""
    stock, shared = both("paligemma2", adapters="all")
    batch = shared.data_collator(ROWS[:4])
    assert_same(step(stock, batch), step(shared, batch))


def eager(given):
    given["model"].set_attn_implementation("eager")


@families
def test_eager_attention_adds_the_mask(both, family):
    """There True and False would be 1 and 0."""
    stock, shared = both(family, adapters="language", change=eager)
    batch, text = shared.data_collator(ROWS[:4]), whole(shared.model).model.get_decoder()
    assert text.config._attn_implementation == "eager"
    right = step(stock, batch)
    assert_same(right, step(shared, batch))

    def as_bool(module, args, kwargs):
        return args, kwargs | {"attention_mask": kwargs["attention_mask"] == 0}

    hook = text.register_forward_pre_hook(as_bool, with_kwargs=True)
    wrong = step(shared, batch)
    hook.remove()
    assert abs(wrong.loss - right.loss) > 1e-3


def has_flex(family):
    """Whether Transformers has flex_attention for the language model of a family."""
    settings = SimpleNamespace(model_name_or_path=family, model_revision=None)
    return dpo_idefics2.empty_model(settings).get_decoder()._supports_flex_attn


@pytest.mark.parametrize("family", marked(POPULAR))
def test_flex_attention_by_its_definition(make, base, family, monkeypatch):
    """Uncompiled, as PyTorch defines it, with a backward pass; what is compiled for a GPU is not tried here."""
    if not has_flex(base(family) / "model"):
        with pytest.raises(ValueError, match="flex_attention"):
            make(SharedPromptDPOTrainer, family, attn_implementation="flex_attention")
        return

    def uncompiled(query, key, value, training=False, **options):
        return flex_attention.flex_attention(query, key, value, **options)

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)  # says: no backward on a CPU
    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", uncompiled)
    stock = make(DPOTrainer, family)
    shared = make(SharedPromptDPOTrainer, family, attn_implementation="flex_attention")
    assert shared.why_not_shared is None
    assert whole(shared.model).get_decoder().config._attn_implementation == "flex_attention"
    for rows in (ROWS[:4], ROWS[:4] if family == "paligemma" else MIXED_ROWS):
        batch = shared.data_collator(rows)
        assert_same(step(stock, batch), step(shared, batch))


@pytest.mark.parametrize("adapters", ["all", "language"])
@families
def test_four_steps_of_training_are_the_stock_trainers(make, family, adapters):
    """With an evaluation after two: what is logged, and what has been learnt."""
    settings = {"eval_strategy": "steps", "eval_steps": 2, "activation_checkpointing": adapters == "all"}
    not_compared = re.compile("runtime|per_second|total_flos|train_loss")
    logs, weights = [], []
    for trainer_class in (DPOTrainer, SharedPromptDPOTrainer):
        trainer = make(trainer_class, family, adapters=adapters, **settings)
        trainer.train()
        history = trainer.state.log_history
        logs.append([{k: v for k, v in entry.items() if not not_compared.search(k)} for entry in history])
        weights.append({name: p for name, p in trainer.model.named_parameters() if p.requires_grad})
    stock, shared = logs
    losses = [entry["loss"] for entry in stock if "loss" in entry]
    evaluations = [entry for entry in stock if "eval_loss" in entry]
    assert (len(losses), len(evaluations), len(stock), len(shared)) == (4, 2, 7, 7)
    assert min(abs(a - b) for a, b in zip(losses, losses[1:])) > 1e-3  # it learns
    assert all({"eval_rewards/margins", "eval_logps/chosen"} <= set(entry) for entry in evaluations)
    for want, got in zip(stock, shared):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-4)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-3, rtol=1e-3)


SMOOTH = {"label_smoothing": 0.1}
VARIANTS = {name: {"loss_type": name} for name in dpo_idefics2.LOSSES if name != "exo_pair"}
VARIANTS |= {f"{name}, smooth": {"loss_type": name} | SMOOTH for name in ("exo_pair", "robust", "aot", "aot_unpaired")}
VARIANTS |= {
    "sigmoid + sft": {"loss_type": ("sigmoid", "sft")},
    "several, weighted": {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.5)},
    "beta, ld_alpha": {"beta": 0.7, "ld_alpha": 0.3},
    "forward KL": {"f_divergence_type": "forward_kl"},
    "Jensen-Shannon": {"f_divergence_type": "js_divergence", "loss_type": "sigmoid_norm"},
    "alpha-divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "weighted by likelihood": {"use_weighting": True},
    "ipo, weighted by likelihood, ld_alpha": {"loss_type": "ipo", "use_weighting": True, "ld_alpha": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_loss_is_the_stock_trainers(both, variant):
    """In float64, since some (discopop) have gradients twenty times as sensitive to rounding."""
    stock, shared = both("idefics2", adapters="language", double=True, **VARIANTS[variant])
    assert (shared.loss_types, shared.label_smoothing) == (stock.loss_types, stock.label_smoothing)
    batch = shared.data_collator(ROWS[:4])
    want, got = step(stock, batch), step(shared, batch)
    assert_same(want, got)
    if "likelihood" in variant:
        assert all(output.log_sum_sq_probs is not None for output in (want.outputs[0], got.outputs[0]))


def test_every_loss_of_trl_is_known():
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(dpo_idefics2.LOSSES)


def as_conversation(row):
    """A row as TRL's own preference data have it."""
    texts = {"prompt": ("user", row["question"])}
    texts |= {name: ("assistant", row[name]) for name in ("chosen", "rejected")}
    turns = {name: [{"role": role, "content": text}] for name, (role, text) in texts.items()}
    return {"images": [row["image"]], **turns}


CONVERSATIONS = [as_conversation(row) for row in ROWS]


def by_trls_collator(given):
    given |= {"data_collator": None, "train_dataset": Dataset.from_list(CONVERSATIONS), "eval_dataset": None}


@pytest.mark.parametrize("family", ["idefics2", "llava"])
def test_with_trls_own_collator(both, family):
    """Used like DPOTrainer: conversations and pictures, and a batch that TRL makes of them."""
    stock, shared = both(family, change=by_trls_collator)
    steps = []
    for trainer in (stock, shared):
        assert type(trainer.data_collator).__name__ == "DataCollatorForVisionPreference"
        steps.append(step(trainer, trainer.data_collator([dict(row) for row in CONVERSATIONS[:3]])))
    assert_same(*steps)


def trained_before(given):
    given["model"] = stir(get_peft_model(given["model"], given.pop("peft_config")), seed=2)


@pytest.mark.parametrize("adapters", ["all", "language"])
def test_an_adapter_that_exists_is_trained_on(both, adapters):
    """TRL then keeps a copy of it for reference."""
    stock, shared = both("idefics2", change=trained_before, adapters=adapters)
    assert "ref" in shared.model.peft_config
    batch = shared.data_collator(ROWS[:3])
    want = step(stock, batch)
    assert_same(want, step(shared, batch))
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    with stock.model.disable_adapter():
        untouched = whole(stock.model)(**batch, labels=labels, fused_lm_head=True).log_probs
    assert (untouched - want.outputs[1].log_probs).abs().max() > 1e-3  # which the reference is not


@families
def test_an_evaluation_with_outputs_has_the_stock_layout(both, family):
    """The deprecated return_outputs: the same loss and logits."""
    trainers = both(family, adapters="language")
    batch = trainers[1].data_collator(ROWS[:3])
    real, found = batch["attention_mask"].bool(), []
    with pytest.warns(FutureWarning):
        for trainer in trainers:
            found.append(trainer.prediction_step(trainer.model.eval(), dict(batch), prediction_loss_only=False)[:2])
    (loss, logits), (own_loss, own_logits) = found
    assert own_loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert own_logits.shape == logits.shape and logits.shape[:2] == batch["input_ids"].shape
    torch.testing.assert_close(own_logits[real], logits[real], atol=1e-5, rtol=1e-5)


def with_weights_of_bf16(given):
    given["model"] = given["model"].bfloat16().float()


@pytest.mark.parametrize("family", marked(POPULAR))
def test_bf16_is_no_further_from_float32_than_the_stock_trainers(make, family):
    """Log-probabilities of answers, policy and reference, over 20 batches."""
    stock, shared = (make(kind, family, bf16=True) for kind in (DPOTrainer, SharedPromptDPOTrainer))
    exact = make(DPOTrainer, family, change=with_weights_of_bf16)
    assert whole(shared.model).dtype == torch.bfloat16 and whole(exact.model).dtype == torch.float32
    errors = {stock: [], shared: []}
    for seed in range(5):
        rows = make_rows(seed + 1)
        for start in range(0, 8, 2):
            batch = shared.data_collator(rows[start : start + 2])
            wanted = step(exact, batch).outputs
            for trainer, found in errors.items():
                for want, got in zip(wanted, step(trainer, batch).outputs):
                    found.append((got.log_probs.float() - want.log_probs)[want.log_probs != 0].abs().mean().item())
    of_stock, of_shared = (sum(found) / len(found) for found in errors.values())
    assert len(errors[shared]) == 40 and 0 < of_shared <= 1.1 * of_stock


def test_4_bit_in_bf16_is_trained(make):
    """As on a GPU: 4-bit beneath, adapters in float32, computed in bf16."""
    settings = {"bf16": True, "load_in_4bit": True, "activation_checkpointing": True}
    stock, shared = (make(kind, "idefics2", **settings) for kind in (DPOTrainer, SharedPromptDPOTrainer))
    batch = shared.data_collator(ROWS[:4])
    want, got = step(stock, batch), step(shared, batch)
    assert got.loss == pytest.approx(want.loss, abs=0.02) and want.gradients.keys() == got.gradients.keys()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in got.gradients.values())
    shared.train()
    assert [entry["loss"] > 0 for entry in shared.state.log_history if "loss" in entry] == [True] * 4


# ------------------------------------------------------------------------------------------------------- for less work
@contextlib.contextmanager
def watch(trainer):
    """What goes through the vision tower and into the language model meanwhile."""
    base, seen = whole(trainer.model).model, SimpleNamespace(pictures=[], graphs=[], sequences=[])
    tower = base.vision_model if base.config.model_type == "idefics2" else base.vision_tower
    embeddings = next(module for name, module in tower.named_modules() if name.endswith("embeddings"))

    def count_pictures(module, args, kwargs):
        seen.pictures.append(len((*args, *kwargs.values())[0]))

    def note_graph(module, args, output):
        seen.graphs.append(output[0].requires_grad)

    def note_sequences(module, args, kwargs):
        seen.sequences.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    hooks = [tower.register_forward_hook(note_graph)]
    for module, note in ((embeddings, count_pictures), (base.get_decoder(), note_sequences)):
        hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def pair_lengths(batch):
    """The tokens of each pair of a batch: the prompt, both answers, and the prompt's last token once more."""
    answers = batch["completion_mask"].sum(1)
    chosen, rejected = answers.chunk(2)
    prompts = (batch["attention_mask"].sum(1) - answers)[: len(chosen)]
    return (prompts + chosen + rejected + 1).tolist()


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("adapters", ["all", "language"])
@families
def test_pictures_and_prompts_are_there_once(both, family, adapters, checkpointing):
    stock, shared = both(family, adapters=adapters, activation_checkpointing=checkpointing)
    batch = shared.data_collator(ROWS[:3])
    with watch(stock) as theirs, FlopCounterMode(display=False) as all_flops:
        step(stock, batch)
    with watch(shared) as mine, FlopCounterMode(display=False) as flops:
        step(shared, batch)
    lengths = pair_lengths(batch)
    assert theirs.pictures == [6, 6] and theirs.sequences == [(6, batch["input_ids"].shape[1])] * 2
    assert mine.sequences == [(3, max(lengths))] * 2 and flops.get_total_flops() < 0.85 * all_flops.get_total_flops()
    if adapters == "all":  # the reference sees other features
        assert mine.pictures == [3, 3] and mine.graphs[0]
    else:
        assert mine.pictures == [3] and mine.graphs == [False, False] and theirs.graphs == [checkpointing, False]
    for n, length in enumerate(lengths):  # alone, without others' padding
        with watch(shared) as seen:
            step(shared, shared.data_collator(ROWS[n : n + 1]))
        assert seen.sequences == [(1, length)] * 2


def adapter_in(part):
    """A `change`: an adapter in this part alone."""

    def change(given):
        targets = rf"model\.{part}\..*(proj|fc1|fc2)"
        exclude = r".*layers\.2\..*"  # LLaVA's last, which is not used
        given["peft_config"] = LoraConfig(r=4, target_modules=targets, exclude_modules=exclude)

    return change


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
@pytest.mark.parametrize(
    "family, part, pictures",
    [("idefics2", "vision_model", [3, 3]), ("llava", "vision_tower", [3, 3]), ("idefics2", "connector", [3])],
)
def test_an_adapter_in_one_part_alone(both, family, part, pictures):
    """Behind a trained tower the frozen connector has a graph; before a trained connector the tower has none."""
    stock, shared = both(family, change=adapter_in(part))
    batch = shared.data_collator(ROWS[:3])
    with watch(shared) as seen:
        assert_same(step(stock, batch), step(shared, batch))
    assert seen.pictures == pictures and seen.graphs[0] == (part != "connector")


def test_what_a_frozen_tower_gave_is_forgotten_after_the_step(both):
    """Another batch, an evaluation: each sees its own pictures."""
    stock, shared = both("idefics2", adapters="language")
    first = shared.data_collator(ROWS[:2])
    other = shared.data_collator([{**row, "image": ROWS[-1]["image"]} for row in ROWS[:2]])
    assert torch.equal(first["input_ids"], other["input_ids"])
    losses = []
    for batch in (first, other):
        with watch(shared) as seen:
            losses.append(step(shared, batch).loss)
        assert seen.pictures == [2] and shared.frozen_outputs is None
        assert_same(step(stock, batch), step(shared, batch))
    assert abs(losses[0] - losses[1]) > 1e-4


def test_it_is_forgotten_after_an_error_too(both, monkeypatch):
    _, shared = both("idefics2", adapters="language")
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(whole(shared.model).model.text_model, "forward", None)
        step(shared, shared.data_collator(ROWS[:1]))
    assert shared.frozen_outputs is None


@pytest.mark.parametrize("family", ["idefics2", "llava", "paligemma", "paligemma2"])
def test_answers_do_not_see_each_other(both, family):
    """With other words in the one, the log-probabilities of the other stay the same to the last bit."""
    _, shared = both(family, adapters="all")
    batch = shared.data_collator(ROWS[:4])
    del batch["pairs"]  # they hold the words that are changed here
    chosen, rejected = slice(0, 4), slice(4, 8)
    before, losses = step(shared, batch), []
    for changed, kept in ((chosen, rejected), (rejected, chosen)):
        ids, is_answer = batch["input_ids"].clone(), batch["completion_mask"].bool()
        words = torch.randint(10, 200, ids[changed].shape, generator=torch.Generator().manual_seed(0))
        ids[changed] = ids[changed].where(~is_answer[changed], words)
        after = step(shared, {**batch, "input_ids": ids})
        for was, now in zip(before.outputs, after.outputs):
            assert torch.equal(was.log_probs[kept], now.log_probs[kept])
            assert ((was.log_probs[changed] - now.log_probs[changed]).abs().sum(1) > 1e-3).all()
        losses.append(after.loss)
    assert before.loss not in losses


@families
def test_nothing_of_a_neighbour_fills_a_short_row_up(both, family):
    """Behind a short pair there are columns left beside a long one; the picture's tokens that the rejected row has
    there would be more than there are pictures."""
    _, shared = both(family, adapters="language")
    batch, seen = shared.data_collator(ROWS[1:3]), []

    def note(module, args, kwargs):
        seen.append((kwargs["input_ids"], kwargs["attention_mask"][:, 0], kwargs["position_ids"]))

    hook = whole(shared.model).model.register_forward_pre_hook(note, with_kwargs=True)
    step(shared, batch)
    hook.remove()
    ids, mask, position = seen[0]
    width, length = ids.shape[1], pair_lengths(batch)[1]
    is_image = ids == shared.processing_class.image_token_id
    images = (batch["input_ids"][1] == shared.processing_class.image_token_id).sum()
    own_padding = (batch["attention_mask"][1] == 0).sum()
    assert width - length > own_padding + 2 + images  # so there were such tokens
    assert (is_image.sum(1) == images).all()
    assert (ids[1, length:] == shared.processing_class.tokenizer.pad_token_id).all()
    assert not mask[1, :length, length:].any()  # what fills up is not seen, and sees itself alone
    assert torch.equal(mask[1, length:, length:], torch.eye(width - length, dtype=torch.bool))
    assert position[1, :length].max() == batch["attention_mask"].sum(1)[[1, 3]].max() - 1


# ------------------------------------------------------------------------------------------- where it is not done
def assert_equal(want, got):
    """Two steps on one and the same path."""
    assert want.loss == got.loss and want.metrics == got.metrics and abs(want.metrics["rewards/margins"]) > 1e-3


@pytest.mark.parametrize("family", marked(["llava", "qwen3_5"]))
def test_a_family_that_is_not_known_takes_the_stock_path(both, family, monkeypatch):
    """Qwen3.5's linear attention reads tokens one after the other: no mask can part two answers."""
    monkeypatch.delitem(dpo_idefics2.SHARED, family, raising=False)
    stock, shared = both(family, obstacle=f"no way is known to share prompts of a {family}", adapters="language")
    assert "forward_pairs" not in repr(whole(shared.model).forward)
    batch = shared.data_collator(ROWS[:3])
    assert_equal(step(stock, batch), step(shared, batch))


def in_full(given):
    given["model"].requires_grad_(True)
    del given["peft_config"]


def beside_another(given):
    given["ref_model"] = copy.deepcopy(given["model"])


@pytest.mark.parametrize("change", [in_full, beside_another])
def test_a_reference_model_takes_the_stock_path(both, change):
    """Of training in full, or given."""
    stock, shared = both("idefics2", obstacle="reference model", change=change)
    batch = shared.data_collator(ROWS[:3])
    for trainer in (stock, shared):
        torch.manual_seed(3)
        for weight in trainer.model.parameters():
            weight.data += 0.01 * torch.randn_like(weight)
    assert_equal(step(stock, batch), step(shared, batch))


def test_the_flag_takes_the_stock_path(both):
    stock, shared = both("llava", obstacle="--shared_prompt false", shared_prompt=False, adapters="language")
    batch = shared.data_collator(ROWS[:2])
    with watch(shared) as seen:
        assert_equal(step(stock, batch), step(shared, batch))
    assert seen.pictures == [4, 4]


def test_attention_without_such_a_mask_takes_the_stock_path(both, monkeypatch, attention="flash_attention_2"):
    model = both("idefics2", adapters="language")[1].model
    assert dpo_idefics2.obstacle_to_sharing(model) is None
    assert "reference model" in dpo_idefics2.obstacle_to_sharing(model, model)
    monkeypatch.setattr(model.config.get_text_config(), "_attn_implementation", attention)
    assert dpo_idefics2.obstacle_to_sharing(model) == f"{attention} takes no 4-D attention mask"


def test_a_row_may_not_be_longer_than_a_sliding_window(tiny_pairs, tmp_path, monkeypatch):
    """Refused before any weights load; on the stock path, which knows the window, it is not."""
    shutil.copytree(tiny_pairs / "model", tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    config.text_config.sliding_window = 64
    config.save_pretrained(tmp_path / "model")
    case = Recipe("dpo_idefics2", tiny_pairs, tmp_path)
    message = case.refusal(case.flags(model_name_or_path=tmp_path / "model"))
    assert "--max_length 1024: this model has a sliding window of 64 tokens" in message
    assert "--max_length 64, or --shared_prompt false" in message
    monkeypatch.setattr(dpo_idefics2, "load_model", no_weights)
    for settings in ({"shared_prompt": False}, {"max_length": 64}):
        with pytest.raises(Loaded):
            case.run(model_name_or_path=tmp_path / "model", **settings)


def test_a_run_can_change_its_path(base, tiny_pairs, tmp_path):
    """--shared_prompt false is another way to the same run, which may even be taken in the middle of one."""
    case = Recipe("dpo_idefics2", base("idefics2"), tmp_path)
    settings = FLAGS | {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    settings |= {"save_steps": 1, "warmup_steps": 0, "max_eval_rows": 3, "dataset_name": tiny_pairs / "data"}
    printed = case.run(**settings, output_dir=tmp_path / "shared")
    assert "path: shared prompts" in printed
    half = shutil.copytree(tmp_path / "shared" / "checkpoint-1", tmp_path / "half" / "checkpoint-1").parent
    shutil.copy(tmp_path / "shared" / "settings.yaml", half)
    for out in (tmp_path / "stock", half):
        printed = case.run(**settings, output_dir=out, shared_prompt=False)
        assert "path: stock DPOTrainer, since --shared_prompt false\n" in printed
    assert f"resuming from {half / 'checkpoint-1'}\n" in printed
    names = ["loss", "grad_norm", "entropy", "mean_token_accuracy", "logits/chosen", "logps/rejected", "eval_loss"]
    names += [f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")]
    for name in names:
        want = log(tmp_path / "shared", name)
        assert list(want) == [1, 2] and log(tmp_path / "stock", name) == pytest.approx(want, rel=1e-3, abs=1e-3)
        assert log(half, name) == pytest.approx(want, rel=1e-3, abs=1e-3)
    assert log(tmp_path / "shared", "rewards/margins")[2] != 0


# -------------------------------------------------------------------------------------------------------- afterwards
@families
def test_outside_training_the_model_is_as_ever(make, base, family, tmp_path):
    """It says what its adapter says on the base, loaded anew; with labels it gives the model's own loss."""
    shared = make(SharedPromptDPOTrainer, family, adapters="all", learning_rate=0.05)
    shared.train()
    shared.save_model(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(base(family) / "model")
    pad = again.generation_config.pad_token_id
    anew, model = PeftModel.from_pretrained(again, tmp_path).eval(), shared.model.eval()
    collator = shared.data_collator
    batch = collator.tokenize([collator.messages_of(row)[:1] for row in ROWS[:3]], prompt=True)

    def say(model):
        return model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=pad)

    said = say(model)
    assert torch.equal(said, say(anew))
    with model.disable_adapter(), anew.disable_adapter():
        untouched = say(model)
        assert torch.equal(untouched, say(anew))
    assert not torch.equal(said, untouched)
    labels = batch["input_ids"]
    labels = labels.masked_fill(labels == shared.processing_class.image_token_id, -100)
    with torch.no_grad():
        own, other = (some(**batch, labels=labels) for some in (model, anew))
    assert torch.equal(own.logits, other.logits) and torch.equal(own.loss, other.loss)
