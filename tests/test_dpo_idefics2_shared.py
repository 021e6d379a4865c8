"""dpo_idefics2.SharedPromptDPOTrainer against TRL's own DPOTrainer: the same numbers, from one sequence for each pair and
one pass of its picture through the vision tower."""

import functools
import inspect
import random
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import short_run
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText
from trl import DPOTrainer

import dpo_idefics2
from dpo_idefics2 import SharedPromptDPOTrainer

WORDS = "is there a digit in this image seven an even one written by hand black ink on white paper three".split()
# words of question, chosen and rejected answer; behind the third, beside the second, there is room for a whole prompt
LENGTHS = [(3, 4, 2), (8, 24, 30), (1, 1, 1), (12, 1, 6), (2, 7, 7), (5, 3, 1), (9, 2, 3), (4, 5, 8)]
FLAGS = {
    "load_in_4bit": False,
    "max_length": 2000,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "eval_strategy": "no",
    "save_strategy": "no",
    "sample_rows": 0,
    "activation_checkpointing": False,
}
TOWER = {
    "idefics2": "vision_model",
    "llava": "vision_tower",
    "paligemma": "vision_tower",
    "paligemma2": "vision_tower",
}
families = pytest.mark.parametrize("family", ["idefics2", "llava", "paligemma"])


# ------------------------------------------------------------------------------------------------- what the tests use
def make_rows():
    """Pairs of very different lengths, each about a picture of its own."""
    dice = random.Random(0)
    text = lambda n: " ".join(dice.choices(WORDS, k=n))
    return [
        {
            "row": n,
            "image": Image.frombytes("RGB", (56, 56), dice.randbytes(56 * 56 * 3)),
            "question": text(asked) + "?",
            "chosen": text(right) + " yes",
            "rejected": text(wrong) + " no",
        }
        for n, (asked, right, wrong) in enumerate(LENGTHS)
    ]


ROWS = make_rows()


@pytest.fixture(scope="module")
def bases(tiny_pairs, tiny_llava, tiny_next, tiny_paligemma, tiny_paligemma2, tmp_path_factory):
    """{family: a folder with model/}, whose random weights are as large as their width asks for: so what is said depends on
    what is seen."""
    given = {"idefics2": tiny_pairs, "llava": tiny_llava, "paligemma": tiny_paligemma, "paligemma2": tiny_paligemma2}
    made = {}
    for family, folder in {**given, "llava_next": tiny_next}.items():
        out = made[family] = tmp_path_factory.mktemp(family)
        shutil.copytree(folder / "model", out / "model")
        model = AutoModelForImageTextToText.from_pretrained(folder / "model")
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data *= 4
        model.save_pretrained(out / "model")
    return made


def stir(model, seed=1):
    """Give every B that is trained random values, always the same ones: with B = 0, as it starts, policy and reference are one."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name and p.requires_grad:
            torch.nn.init.normal_(p, std=0.05)
    return model


@pytest.fixture(scope="module")
def make(bases, tmp_path_factory):
    """A function: class, family, what else the trainer is given, settings as keywords -> a trainer on ROWS whose policy is not
    its reference. `attention`: another than
    the model's default; `double`: in float64."""

    def made(cls, family, given=None, attention=None, double=False, **flags):
        argv = short_run(bases[family], tmp_path_factory.mktemp("run"), **{**FLAGS, **flags})
        settings, training = dpo_idefics2.parse(argv)
        processor = dpo_idefics2.load_processor(settings)
        torch.manual_seed(0)
        own = {
            "peft_config": dpo_idefics2.lora_config(settings),
            "processing_class": processor,
            "train_dataset": Dataset.from_list(ROWS),
        }
        own |= {
            "data_collator": dpo_idefics2.Collator(processor, settings, training),
            "eval_dataset": Dataset.from_list(ROWS[3:]),
        }
        if cls is SharedPromptDPOTrainer:
            own["settings"] = settings
        if callable(given):
            given = given(dpo_idefics2.load_model(settings, training), own["peft_config"])
        own |= {"model": dpo_idefics2.load_model(settings, training)} | (given or {})
        if attention:
            own["model"].set_attn_implementation(attention)
        trainer = cls(args=training, **own)
        stir(trainer.model)
        if double:
            trainer.model.double()
        return trainer

    return made


@pytest.fixture(scope="module")
def both(make):
    """A function: as `make` -> TRL's trainer and the one that shares prompts. Each is made once: they are not to be trained."""

    @functools.cache
    def made(family, **settings):
        stock, shared = (make(cls, family, **settings) for cls in (DPOTrainer, SharedPromptDPOTrainer))
        assert shared.why_not_shared is None
        return stock, shared

    return made


def whole(model):
    """The model itself, without PEFT around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def to_left(batch):
    """A batch padded on the right -> padded on the left."""
    order = batch["attention_mask"].argsort(dim=1, stable=True)
    return {name: values.gather(1, order) if values.shape == order.shape else values for name, values in batch.items()}


def step(trainer, batch):
    """The loss of a batch, what the fused head gave for policy and reference, gradients, what would be logged."""
    base, seen = whole(trainer.model), []
    forward = base.forward

    def spy(*args, **kwargs):
        seen.append(forward(*args, **kwargs))
        return seen[-1]

    if whole(trainer.model).dtype == torch.float64:
        batch = {name: values.double() if values.is_floating_point() else values for name, values in batch.items()}
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
    return SimpleNamespace(loss=loss.item(), seen=seen, gradients=gradients, metrics=metrics)


def same(want, got):
    """Hold one step to another -> how far they are apart at most: in the loss, in the log-probabilities of an answer (of policy
    and reference), in a matrix's gradient by its size, in what is logged by its size."""
    assert len(want.seen) == len(got.seen) == 2
    answers = [[out.log_probs.sum(1) for out in found.seen] for found in (want, got)]
    assert all((policy - reference).abs().max() > 0.01 for policy, reference in answers)
    assert all(out.log_probs.shape == other.log_probs.shape for out, other in zip(want.seen, got.seen))
    said = max(((a.log_probs != 0) != (b.log_probs != 0)).sum().item() for a, b in zip(want.seen, got.seen))
    logps = max((a - b).abs().max().item() for a, b in zip(*answers))
    assert want.gradients.keys() == got.gradients.keys() and len(got.gradients) > 10
    largest = max(g.norm() for g in want.gradients.values())
    gradients = max(
        ((got.gradients[n] - g).norm() / max(g.norm(), 1e-4 * largest)).item() for n, g in want.gradients.items()
    )
    assert want.metrics.keys() == got.metrics.keys() and "logits/chosen" in got.metrics
    logged = max(abs(value - got.metrics[name]) / max(1, abs(value)) for name, value in want.metrics.items())
    loss = abs(want.loss - got.loss) / max(1, abs(want.loss))
    assert (said, loss < 1e-5, logps < 1e-4, gradients < 1e-5, logged < 1e-5) == (0, True, True, True, True), (
        loss,
        logps,
        gradients,
        logged,
    )
    return {"loss": loss, "log-probabilities": logps, "gradients": gradients, "logged": logged}


# --------------------------------------------------------------------------------------------------- the same numbers
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("adapters", ["all", "language"])
@families
def test_a_step_is_the_stock_trainers(both, family, adapters, checkpointing, capsys):
    """Batches of one to four pairs, padded on either side, with rows much shorter than others."""
    stock, shared = both(family, adapters=adapters, activation_checkpointing=checkpointing)
    most = {}
    for start, end in ((0, 1), (1, 3), (1, 4), (4, 8)):
        right = shared.data_collator(ROWS[start:end])
        for batch in (right, to_left(right)):
            found = same(step(stock, batch), step(shared, batch))
            most = {name: max(value, most.get(name, 0)) for name, value in found.items()}
    with capsys.disabled():
        print(
            f"\n  {family}, {adapters}, checkpointing {checkpointing}: apart",
            {name: f"{value:.1e}" for name, value in most.items()},
        )
    inside = {
        part for name in step(shared, right).gradients for part in re.findall(r"vision|connector|projector", name)
    }
    assert bool(inside) == (adapters == "all")


@pytest.mark.parametrize("family", ["idefics2", "llava"])
def test_in_float64_nothing_is_left_of_the_difference(both, family):
    """But for the head, which TRL computes in float32: so it was rounding. (PaliGemma rounds to float32 in its norms.)"""
    stock, shared = both(family, adapters="all", double=True)
    for batch in (right := shared.data_collator(ROWS[:4]), to_left(right)):
        found = same(step(stock, batch), step(shared, batch))
        assert found["log-probabilities"] < 1e-5 and found["gradients"] < 1e-6  # one step of float32 at 64 is 8e-6


def test_paligemma_2_too(both):
    """Its language model has a sliding window in every other layer, and logits that are capped."""
    stock, shared = both("paligemma2", adapters="all")
    batch = shared.data_collator(ROWS[:4])
    same(step(stock, batch), step(shared, batch))


@families
def test_eager_attention_too(both, family):
    """Where the mask is added: True and False would be 1 and 0."""
    stock, shared = both(family, adapters="language", attention="eager")
    batch, text = shared.data_collator(ROWS[:4]), whole(shared.model).model.get_decoder()
    assert text.config._attn_implementation == "eager"
    right = step(stock, batch)
    same(right, step(shared, batch))

    def as_bool(module, args, kwargs):
        return args, kwargs | {"attention_mask": kwargs["attention_mask"] == 0}

    hook = text.register_forward_pre_hook(as_bool, with_kwargs=True)
    wrong = step(shared, batch)
    hook.remove()
    assert abs(wrong.loss - right.loss) > 1e-3


@pytest.mark.parametrize("adapters", ["all", "language"])
@families
def test_four_steps_of_training_are_the_stock_trainers(make, family, adapters):
    """With an evaluation after two: what is logged, and what has been learnt."""
    flags = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "adapters": adapters,
        "activation_checkpointing": adapters == "all",
    }
    logs, weights = [], []
    for cls in (DPOTrainer, SharedPromptDPOTrainer):
        trainer = make(cls, family, **flags)
        trainer.train()
        took = r"runtime|per_second|total_flos|train_loss"
        logs.append(
            [{k: v for k, v in entry.items() if not re.search(took, k)} for entry in trainer.state.log_history]
        )
        weights.append({name: p for name, p in trainer.model.named_parameters() if p.requires_grad})
    stock, shared = logs
    assert len(stock) == len(shared) == 4 + 2 + 1
    losses = [entry["loss"] for entry in stock if "loss" in entry]
    assert min(abs(a - b) for a, b in zip(losses, losses[1:])) > 1e-3
    assert all(
        {"eval_loss", "eval_rewards/margins", "eval_logps/chosen"} <= set(entry)
        for entry in stock
        if "eval_loss" in entry
    )
    for want, got in zip(stock, shared):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-4)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-3, rtol=1e-3)


SMOOTH = {"label_smoothing": 0.1}
VARIANTS = {name: {"loss_type": name} for name in dpo_idefics2.LOSSES}
VARIANTS |= {name: {"loss_type": name} | SMOOTH for name in ("exo_pair", "robust", "aot", "aot_unpaired")}
VARIANTS |= {f"smooth {name}": {"loss_type": name} | SMOOTH for name in ("robust", "aot")}
VARIANTS |= {
    "sigmoid + sft": {"loss_type": ["sigmoid", "sft"]},
    "several, weighted": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
    "beta": {"beta": 0.7},
    "ld_alpha": {"ld_alpha": 0.3},
    "forward KL": {"f_divergence_type": "forward_kl"},
    "Jensen-Shannon": {"f_divergence_type": "js_divergence", "loss_type": ["sigmoid_norm"]},
    "alpha-divergence": {
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.5,
        "loss_type": "hinge",
    },
    "weighted by likelihood": {"use_weighting": True},
    "ipo, weighted by likelihood, ld_alpha": {"loss_type": "ipo", "use_weighting": True, "ld_alpha": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_loss_is_the_stock_trainers(both, variant):
    """In float64, since some (discopop) have gradients twenty times as sensitive to rounding."""
    flags = {name: Held(value) if isinstance(value, list) else value for name, value in VARIANTS[variant].items()}
    stock, shared = both("idefics2", adapters="language", double=True, **flags)
    batch = shared.data_collator(ROWS[:4])
    want, got = step(stock, batch), step(shared, batch)
    assert (shared.loss_types, shared.label_smoothing) == (stock.loss_types, stock.label_smoothing)
    same(want, got)
    if "likelihood" in variant:
        assert all(out.log_sum_sq_probs is not None for out in (want.seen[0], got.seen[0]))


class Held(list):
    """A list that can be a key of a cache."""

    __hash__ = lambda self: hash(tuple(self))


def test_every_loss_of_trl_is_known():
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(dpo_idefics2.LOSSES)


@pytest.mark.parametrize("family", ["idefics2", "llava"])
def test_with_trls_own_collator(make, family):
    """Used like DPOTrainer: conversations and pictures, and a batch that TRL makes of them."""
    turn = lambda role, text: [{"role": role, "content": text}]
    rows = [
        {"images": [row["image"]], "prompt": turn("user", row["question"])}
        | {name: turn("assistant", row[name]) for name in ("chosen", "rejected")}
        for row in ROWS
    ]
    results = []
    for cls in (DPOTrainer, SharedPromptDPOTrainer):
        trainer = make(
            cls, family, {"data_collator": None, "train_dataset": Dataset.from_list(rows), "eval_dataset": None}
        )
        assert type(trainer.data_collator).__name__ == "DataCollatorForVisionPreference"
        results.append(step(trainer, trainer.data_collator([dict(row) for row in rows[:3]])))
    same(*results)


@pytest.mark.parametrize("adapters", ["all", "language"])
def test_an_adapter_that_exists_is_trained_on(make, adapters):
    """TRL then keeps a copy of it for reference."""

    def trained(base, config):
        return {"model": stir(get_peft_model(base, config), seed=2), "peft_config": None}

    stock, shared = (make(cls, "idefics2", trained, adapters=adapters) for cls in (DPOTrainer, SharedPromptDPOTrainer))
    assert shared.why_not_shared is None and "ref" in shared.model.peft_config
    batch = shared.data_collator(ROWS[:3])
    want = step(stock, batch)
    same(want, step(shared, batch))
    with stock.model.disable_adapter():
        plain = whole(stock.model)(**{k: v for k, v in batch.items() if k != "completion_mask"}, fused_lm_head=True,
                                   labels=batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)).log_probs  # fmt: skip
    assert (plain - want.seen[1].log_probs).abs().max() > 1e-3


@families
def test_in_evaluation_with_outputs(both, family):
    """The deprecated return_outputs: logits of the stock layout, and the same loss."""
    stock, shared = both(family, adapters="language")
    batch = shared.data_collator(ROWS[:3])
    real = batch["attention_mask"].bool()
    with pytest.warns(FutureWarning):
        (loss, logits, _), (own_loss, own_logits, _) = (
            trainer.prediction_step(trainer.model.eval(), dict(batch), prediction_loss_only=False)
            for trainer in (stock, shared)
        )
    assert own_loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert own_logits.shape == logits.shape == (*batch["input_ids"].shape, whole(stock.model).lm_head.out_features)
    torch.testing.assert_close(own_logits[real], logits[real], atol=1e-5, rtol=1e-5)


def test_bf16(make):
    """As on a GPU: 4-bit beneath, adapters in float32, computed in bf16. It rounds otherwise, and no worse."""
    flags = {"bf16": True, "load_in_4bit": True, "activation_checkpointing": True}
    stock, shared = (make(cls, "idefics2", **flags) for cls in (DPOTrainer, SharedPromptDPOTrainer))
    batch = shared.data_collator(ROWS[:4])
    want, got = step(stock, batch), step(shared, batch)
    assert got.loss == pytest.approx(want.loss, abs=0.02) and want.gradients.keys() == got.gradients.keys()
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in got.gradients.values())
    shared.train()
    assert all(entry["loss"] > 0 for entry in shared.state.log_history if "loss" in entry)


# ------------------------------------------------------------------------------------------------------- for less work
class Watch:
    """What goes through the vision tower and into the language model while it is open."""

    def __init__(self, trainer, family):
        base = whole(trainer.model).model
        self.tower, self.text = getattr(base, TOWER[family]), base.get_decoder()
        self.pictures, self.graphs, self.sequences, self.hooks = [], [], [], []

    def __enter__(self):
        inside = next(module for name, module in self.tower.named_modules() if name.endswith("embeddings"))
        picture = lambda module, args, kwargs: self.pictures.append(len((*args, *kwargs.values())[0]))
        graph = lambda module, args, out: self.graphs.append(out[0].requires_grad)
        sequence = lambda module, args, kwargs: self.sequences.append(tuple(kwargs["inputs_embeds"].shape[:2]))
        self.hooks = [
            inside.register_forward_pre_hook(picture, with_kwargs=True),
            self.tower.register_forward_hook(graph),
        ]
        self.hooks += [self.text.register_forward_pre_hook(sequence, with_kwargs=True)]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("adapters", ["all", "language"])
@families
def test_pictures_and_prompts_are_there_once(both, family, adapters, checkpointing):
    stock, shared = both(family, adapters=adapters, activation_checkpointing=checkpointing)
    batch = shared.data_collator(ROWS[:3])
    answers = batch["completion_mask"].sum(1)
    prompts = batch["attention_mask"].sum(1) - answers
    pairs = [p + c + r + 1 for p, c, r in zip(prompts.tolist(), answers[:3].tolist(), answers[3:].tolist())]
    seen = []
    for trainer in (stock, shared):
        with Watch(trainer, family) as watch, FlopCounterMode(display=False) as flops:
            step(trainer, batch)
        seen.append((watch, flops.get_total_flops()))
    (theirs, all_flops), (mine, flops) = seen
    assert theirs.pictures == [6, 6] and theirs.sequences == [(6, batch["input_ids"].shape[1])] * 2
    assert mine.pictures == ([3, 3] if adapters == "all" else [3]) and mine.sequences == [(3, max(pairs))] * 2
    if adapters == "language":
        assert mine.graphs == [False, False] and theirs.graphs == [checkpointing, False]
    assert mine.graphs[0] == (adapters == "all") and flops < 0.85 * all_flops
    for n, length in enumerate(pairs):  # alone, without others' padding
        with Watch(shared, family) as watch:
            step(shared, shared.data_collator(ROWS[n : n + 1]))
        assert watch.sequences == [(1, length)] * 2


@pytest.mark.parametrize(
    "family, where, seen",
    [("idefics2", "vision_model", [3, 3]), ("llava", "vision_tower", [3, 3]), ("idefics2", "connector", [3])],
)
def test_an_adapter_in_one_part_alone(make, family, where, seen):
    """Behind a tower that is trained, the connector has a graph although it is frozen; before a trained connector, the tower has none."""
    config = lambda base, own: {
        "peft_config": LoraConfig(
            r=4, target_modules=rf"model\.{where}\..*(proj|fc1|fc2)", exclude_modules=r".*layers\.2\..*"
        )
    }
    stock, shared = (make(cls, family, config) for cls in (DPOTrainer, SharedPromptDPOTrainer))
    batch = shared.data_collator(ROWS[:3])
    with Watch(shared, family) as watch:
        same(step(stock, batch), step(shared, batch))
    assert watch.pictures == seen and watch.graphs[0] == (where != "connector")


def test_what_a_frozen_tower_gave_is_forgotten_after_the_step(both):
    """Another batch, an evaluation: each sees its own pictures."""
    stock, shared = both("idefics2", adapters="language")
    first, other = (
        shared.data_collator(rows) for rows in (ROWS[:2], [{**row, "image": ROWS[-1]["image"]} for row in ROWS[:2]])
    )
    assert torch.equal(first["input_ids"], other["input_ids"]) and not torch.equal(
        first["pixel_values"], other["pixel_values"]
    )
    losses = []
    for batch in (first, other):
        with Watch(shared, "idefics2") as watch:
            losses.append(step(shared, batch).loss)
        assert watch.pictures == [2] and shared.frozen_outputs is None
        same(step(stock, batch), step(shared, batch))
    assert abs(losses[0] - losses[1]) > 1e-4


def test_it_is_forgotten_after_an_error_too(both, monkeypatch):
    _, shared = both("idefics2", adapters="language")
    with monkeypatch.context() as patch:
        patch.setattr(whole(shared.model).model.text_model, "forward", None)
        with pytest.raises(TypeError):
            step(shared, shared.data_collator(ROWS[:1]))
    assert shared.frozen_outputs is None


@pytest.mark.parametrize("family", ["idefics2", "llava", "paligemma", "paligemma2"])
def test_answers_do_not_see_each_other(both, family):
    """With other words in the one, the log-probabilities of the other stay the same to the last bit, and those of the one change."""
    _, shared = both(family, adapters="all")
    batch, losses = shared.data_collator(ROWS[:4]), []
    before = step(shared, batch)
    for half in (slice(0, 4), slice(4, 8)):
        ids, said = batch["input_ids"].clone(), batch["completion_mask"].bool()
        words = torch.randint(10, 200, ids[half].shape, generator=torch.Generator().manual_seed(0))
        ids[half] = ids[half].where(~said[half], words)
        after = step(shared, {**batch, "input_ids": ids})
        rest = slice(4, 8) if half.start == 0 else slice(0, 4)
        for was, now in zip(before.seen, after.seen):
            assert torch.equal(was.log_probs[rest], now.log_probs[rest])
            assert ((was.log_probs[half] - now.log_probs[half]).abs().sum(1) > 1e-3).all()
        losses.append(after.loss)
    assert before.loss not in losses


@families
def test_nothing_of_a_neighbour_fills_a_short_row_up(both, family):
    """Behind a short pair there are columns left beside a long one; the picture's tokens that the rejected row has there
    would be more than there are pictures."""
    _, shared = both(family, adapters="language")
    batch, seen = shared.data_collator(ROWS[1:3]), []
    token = shared.processing_class.image_token_id
    hook = whole(shared.model).model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (kwargs["input_ids"], kwargs["attention_mask"], kwargs["position_ids"])
        ),
        with_kwargs=True,
    )
    step(shared, batch)
    hook.remove()
    ids, mask, position = seen[0]
    answers = batch["completion_mask"].sum(1)
    length = int((batch["attention_mask"].sum(1) - answers)[1] + answers[1] + answers[3]) + 1
    images = (batch["input_ids"][1] == token).sum()
    own_padding = int((batch["attention_mask"][1] == 0).sum())
    assert ids.shape[1] - length > own_padding + 2 + images  # so there were such tokens
    assert ((ids == token).sum(1) == images).all() and (
        ids[1, length:] == shared.processing_class.tokenizer.pad_token_id
    ).all()
    assert not mask[1, 0, :length, length:].any() and mask[1, 0, length:, length:].sum() == ids.shape[1] - length
    assert position[1, :length].max() == batch["attention_mask"].sum(1)[[1, 3]].max() - 1


# ------------------------------------------------------------------------------------------------- where it is not done
def test_llava_next_takes_the_stock_path(make):
    stock, shared = (make(cls, "llava_next", adapters="language") for cls in (DPOTrainer, SharedPromptDPOTrainer))
    assert "llava_next" in shared.why_not_shared and "forward_pairs" not in repr(whole(shared.model).forward)
    batch = shared.data_collator(ROWS[:3])
    want, got = step(stock, batch), step(shared, batch)
    assert want.loss == got.loss and want.metrics == got.metrics


def test_a_reference_model_takes_the_stock_path(make):
    """Of training in full, or given."""
    full = lambda base, config: {"model": base.requires_grad_(True), "peft_config": None}
    stock, shared = (make(cls, "idefics2", full) for cls in (DPOTrainer, SharedPromptDPOTrainer))
    assert "reference model" in shared.why_not_shared
    for trainer in (stock, shared):
        torch.manual_seed(3)
        for p in trainer.model.parameters():
            p.data += 0.01 * torch.randn_like(p)
    batch = shared.data_collator(ROWS[:3])
    want, got = step(stock, batch), step(shared, batch)
    assert want.loss == got.loss and want.metrics == got.metrics and abs(want.metrics["rewards/margins"]) > 1e-3

    beside = lambda base, config: {"ref_model": base}
    stock, shared = (
        make(cls, "idefics2", beside, adapters="language") for cls in (DPOTrainer, SharedPromptDPOTrainer)
    )
    assert "reference model" in shared.why_not_shared and step(stock, batch).loss == step(shared, batch).loss


def test_what_else_takes_the_stock_path(make, both, monkeypatch):
    shared = make(SharedPromptDPOTrainer, "llava", shared_prompt=False, adapters="language")
    assert shared.why_not_shared == "--shared_prompt false"
    batch = shared.data_collator(ROWS[:2])
    with Watch(shared, "llava") as watch:
        assert step(shared, batch).loss == step(both("llava", adapters="language")[0], batch).loss
    assert watch.pictures == [4, 4]

    model = both("idefics2", adapters="language")[1].model
    assert dpo_idefics2.obstacle_to_sharing(model) is None and "reference model" in dpo_idefics2.obstacle_to_sharing(
        model, model
    )
    for attention in ("flash_attention_2", "flex_attention"):
        with monkeypatch.context() as patch:
            patch.setattr(model.config.get_text_config(), "_attn_implementation", attention)
            assert dpo_idefics2.obstacle_to_sharing(model) == f"{attention} takes no 4-D attention mask"


# -------------------------------------------------------------------------------------------------------- afterwards
@families
def test_outside_training_the_model_is_as_ever(make, bases, family, tmp_path):
    """After training it says what its adapter says on the base, loaded anew; with labels it gives the model's own loss."""
    shared = make(SharedPromptDPOTrainer, family, adapters="all", learning_rate=0.05)
    shared.train()
    shared.save_model(tmp_path)
    anew = AutoModelForImageTextToText.from_pretrained(bases[family] / "model")
    plain, anew = anew.generation_config, PeftModel.from_pretrained(anew, tmp_path).eval()
    collator, model = shared.data_collator, shared.model.eval()
    batch = collator.tokenize([collator.messages_of(row)[:1] for row in ROWS[:3]], prompt=True)
    say = lambda model: model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=plain.pad_token_id)
    assert torch.equal(say(model), say(anew))
    with model.disable_adapter(), anew.disable_adapter():
        base = say(model)
        assert torch.equal(base, say(anew))
    assert not torch.equal(say(model), base)
    with torch.no_grad():
        labels = batch["input_ids"]
        labels = labels.masked_fill(labels == shared.processing_class.image_token_id, -100)
        own, other = (m(**batch, labels=labels) for m in (model, anew))
    assert torch.equal(own.logits, other.logits) and torch.equal(own.loss, other.loss)
