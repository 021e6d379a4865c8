"""Short runs of sft_llava.py with models of other families: what is in 4-bit, what is trained, with which loss, and
that the result is loaded and resumed; and the models that it refuses."""

import json
import re
import shutil

import pytest
import torch
import yaml
from conftest import fresh as fresh_process
from families import (
    CONVERSATIONS,
    HAS_TORCHVISION,
    READ,
    REFUSED,
    TRAINED,
    asks,
    built_families,  # noqa: F401
    marked,
    row_of,
    says,
    some_families,
)
from peft import PeftModel
from PIL import Image
from recipes import Recipe
from runs import adapted, linear_layers, logits, matching, plain, run, same, stir
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import SFTTrainer

import sft_llava
from tiny import families

pytestmark = pytest.mark.usefixtures("quick_collections")
# What is no part of the language model, by full paths.
TOWER = r"model\.(visual|vision_tower|vision_model|vision_encoder|image_tower)\..*"
PROJECTOR = r"model\.(multi_modal_projector|connector|embed_vision|aligner|projector|vision_adapter|vision_projection)"
PROJECTOR += r"(\..*)?|model\.visual\.(merger|deepstack_merger_list)\..*"
PATCHES = r".*\.patch_embed\w*\..*"  # a linear layer in some models, a convolution in most
ELSEWHERE = r"lm_head|model\.(video_tower|audio_tower|embed_audio)\..*"
SHORT = {
    "max_steps": 2,
    "eval_steps": 2,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "logging_steps": 1,
    "warmup_steps": 0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "lora_dropout": 0,
    "sample_rows": 2,
    "sample_tokens": 4,
    "disable_tqdm": True,
}
# What is known to be wrong.
REWRITTEN = {"glm4v_moe": "PEFT makes of our regex bare names, and of the experts' weights targets"}
TINY = "the tiny model adds its second DeepStack features after its last layer"
WITHOUT_GRADIENT = {"qwen3_vl": TINY, "qwen3_vl_moe": TINY}


@pytest.fixture(scope="module", params=marked(TRAINED))
def family(request, built):
    return built(request.param)


class Gradients(TrainerCallback):
    """The gradients of the first step, of adapters that do something: with B = 0 there is none of A."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        stir(model)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
            self.seen = {name: None if weight.grad is None else weight.grad.clone() for name, weight in trained}

    def on_train_end(self, args, state, control, **kwargs):
        self.missing = [name for name, gradient in self.seen.items() if gradient is None or not gradient.any()]


def rows_for(family):
    """Rows of different lengths, with no picture, one and two; with Llama 3.2 all have one."""
    last = "two turns with a picture" if family.name == "mllama" else "text only"
    names = ["one turn", "several turns", "two pictures", last]
    return [row_of(CONVERSATIONS[name]) for name in names]


def short_run(family, out, rows=None, **settings):
    """A short run -> (Run, Gradients)."""
    file, gradients = out.parent / "rows.json", Gradients()
    file.write_text(json.dumps(rows or rows_for(family)))
    own = {"dataset_name": file, "eval_dataset_name": file, "image_folder": family.folder, "output_dir": out}
    argv = family.recipe.flags(**{**SHORT, **own, **settings})
    return run(sft_llava, argv, callbacks=[gradients]), gradients


@pytest.fixture(scope="module")
def in_4_bits(family, tmp_path_factory):
    return short_run(family, tmp_path_factory.mktemp("run") / "out")


@pytest.fixture(scope="module")
def with_vision(family, tmp_path_factory):
    """Everything that can be trained beside the language model, each with its own learning rate."""
    rates = {"vision_learning_rate": 1e-4, "projector_learning_rate": 1e-2, "train_projector": True}
    if family.name == "ovis2":  # its projector is a matrix of the language model's embeddings
        rates = {"vision_learning_rate": 1e-4}
    settings = {"load_in_4bit": False, "lora_vision": True, "eval_strategy": "no"}
    return short_run(family, tmp_path_factory.mktemp("run") / "out", **settings, **rates)


@pytest.fixture(scope="module")
def fresh(family):
    """The model in float32, after a backward pass: its gradients say which weights matter to the answers."""
    model = AutoModelForImageTextToText.from_pretrained(family.folder / "model")
    batch = family.collator([row_of(CONVERSATIONS["two pictures"]), row_of(CONVERSATIONS["one turn"])])
    model(**batch).loss.backward()
    return model


def has_gradient(weight):
    return weight.grad is not None and bool(weight.grad.any())


def decoder_layers(model):
    """Paths of the linear layers of the language model."""
    return linear_layers(model) - matching(f"{TOWER}|{PROJECTOR}|{ELSEWHERE}", linear_layers(model))


def batch_of(done):
    return done.trainer.data_collator([done.trainer.train_dataset[n] for n in range(len(done.trainer.train_dataset))])


# ---------------------------------------------------------------------------------------------------- 4-bit and LoRA
@some_families(TRAINED, REWRITTEN)
def test_exactly_the_linear_layers_of_the_language_model_are_in_4_bit_and_have_adapters(family, fresh, in_4_bits):
    model = in_4_bits[0].trainer.model
    packed = {plain(name) for name, weight in model.named_parameters() if type(weight).__name__ == "Params4bit"}
    assert packed == {f"{layer}.weight" for layer in decoder_layers(fresh)}
    assert adapted(dict(model.named_parameters())) == decoder_layers(fresh)
    assert all(".lora_" in name for name, weight in model.named_parameters() if weight.requires_grad)


def test_every_adapter_gets_a_gradient(in_4_bits):
    assert in_4_bits[1].seen and not in_4_bits[1].missing


def test_experts_are_said_to_stay_as_they_are(family, fresh, in_4_bits):
    """They are no linear layers."""
    experts = sum(weight.numel() for name, weight in fresh.named_parameters() if ".experts." in name)
    said = re.findall("([0-9,]+) weights of experts, no linear layers, stay in 16 bits", in_4_bits[0].text)
    assert said == ([f"{experts:,}"] if experts else [])


@some_families(TRAINED, REWRITTEN)
def test_vision_has_adapters_where_its_features_are_made_of_and_the_projector_none(family, fresh, with_vision):
    """All linear layers of the tower that the answer depends on, but the one that reads patches; no other layers."""
    model = with_vision[0].trainer.model
    used = {name.removesuffix(".weight") for name, weight in fresh.named_parameters() if has_gradient(weight)}
    tower = (matching(TOWER, used) - matching(f"{PROJECTOR}|{PATCHES}", used)) & linear_layers(fresh)
    assert tower and adapted(dict(model.named_parameters())) == decoder_layers(fresh) | tower
    whole = {plain(name) for name, weight in model.named_parameters() if weight.requires_grad and ".lora_" not in name}
    assert whole == matching(PROJECTOR, dict(fresh.named_parameters()))
    assert bool(whole) == (family.name != "ovis2")


@some_families(TRAINED, WITHOUT_GRADIENT)
def test_all_that_is_trained_with_vision_gets_a_gradient(with_vision):
    assert not with_vision[1].missing


def test_each_part_has_its_own_learning_rate(with_vision):
    trainer = with_vision[0].trainer
    rates = {id(weight): group["initial_lr"] for group in trainer.optimizer.param_groups for weight in group["params"]}
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            is_projector, is_vision = (re.fullmatch(part, plain(name)) for part in (PROJECTOR, TOWER))
            assert rates[id(weight)] == (1e-2 if is_projector else 1e-4 if is_vision else 1e-3)


# ----------------------------------------------------------------------------------------------------------- the loss
def test_the_loss_is_the_models_own_cross_entropy(family, in_4_bits):
    """TRL multiplies Cohere's scores by their logit_scale, as the models were trained; the forward of Transformers'
    two models with pictures forgets to, unlike that of the same language models without."""
    trainer, batch = in_4_bits[0].trainer, batch_of(in_4_bits[0])
    scale = (
        trainer.model.config.get_text_config().logit_scale if family.name in ("aya_vision", "cohere2_vision") else 1
    )
    with torch.no_grad():
        model = trainer.model.eval()
        inputs = {name: batch[name] for name in batch if name not in ("labels", "trained_at", "targets")}
        scores = scale * model(**inputs).logits
        loss = trainer.compute_loss(model, dict(batch))
    right = torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss, right, atol=1e-5, rtol=1e-5)


def test_a_batch_padded_on_the_right_needs_no_mask(family, in_4_bits):
    """Its loss is that of its rows, one by one with their masks; the model is given none."""
    trainer, batch = in_4_bits[0].trainer, batch_of(in_4_bits[0])
    padding = batch["attention_mask"] == 0
    assert padding[:, -1].any() and not padding[:, 0].any()
    model, losses, counts, masks = trainer.model.eval(), [], [], []
    with torch.no_grad():
        for row in trainer.train_dataset:
            one = dict(trainer.data_collator([row]))
            counts.append(len(one.pop("targets")))
            del one["trained_at"]
            losses.append(SFTTrainer.compute_loss(trainer, model, one) * counts[-1])
    decoder = model.get_base_model().get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda module, args, inputs: masks.append(inputs.get("attention_mask")), with_kwargs=True
    )
    with torch.no_grad():
        together = trainer.compute_loss(model, batch)
    hook.remove()
    assert len(masks) == 1 and (masks[0] is None or isinstance(masks[0], dict))  # Gemma's: of pictures
    torch.testing.assert_close(together, sum(losses) / sum(counts), atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------- the result
def generated(model, processor, family):
    """The tokens that follow a question with a picture."""
    messages = family.messages(CONVERSATIONS["one turn"])[:1]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    prompt = processor.apply_chat_template(messages, **options)
    with torch.no_grad():
        ids = model.eval().generate(**prompt, do_sample=False, min_new_tokens=4, max_new_tokens=4)
    return ids[0, prompt["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["in_4_bits", "with_vision"])
def test_the_result_is_loaded_into_a_fresh_base(kind, family, request):
    """It scores and answers as the model that was trained, and not as the base."""
    done, _ = request.getfixturevalue(kind)
    inputs = done.inputs(done.trainer.train_dataset)
    right = logits(done.trainer.model, inputs)
    processor = AutoProcessor.from_pretrained(done.out)
    base = sft_llava.load_model(*sft_llava.parse(done.argv))
    assert not torch.allclose(logits(base, inputs), right, atol=1e-3)
    again = PeftModel.from_pretrained(base, done.out)
    torch.testing.assert_close(logits(again, inputs), right, atol=1e-5, rtol=1e-5)
    assert generated(again, processor, family) == generated(done.trainer.model, processor, family)


def test_held_out_rows_are_answered(in_4_bits):
    """Their questions and right answers stand beside the model's answers."""
    lines = (in_4_bits[0].out / "samples.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.split("|")[2:4]] for line in lines if line.startswith("| ")]
    right = [["question", "right"]]
    for row in in_4_bits[0].trainer.eval_dataset.take(2):
        turns = row["messages"][: row["answer"] + 1] if "answer" in row else row["messages"]
        right.append([turns[-2]["content"].replace("<image>", ""), turns[-1]["content"]])
    assert table == right


# ----------------------------------------------------------------------------------------------------- only projectors
@some_families(["qwen2_5_vl", "qwen3_5", "glm4v", "smolvlm", "gemma3", "aya_vision"])
def test_a_projector_is_trained_wherever_it_is(family, tmp_path):
    """Qwen's and GLM's are inside the vision tower, which then runs with a graph."""
    settings = {"max_steps": 1, "eval_strategy": "no", "train_projector": True, "projector_learning_rate": 1e-2}
    _, gradients = short_run(family, tmp_path / "out", **settings)
    weights = dict(AutoModelForImageTextToText.from_pretrained(family.folder / "model").named_parameters())
    trained = {plain(name) for name in gradients.seen if ".lora_" not in name}
    assert trained and trained == matching(PROJECTOR, weights) and not gradients.missing
    assert not matching(TOWER, adapted(gradients.seen))


# ----------------------------------------------------------------------------------------------------------- resuming
@some_families(["qwen3_vl", "smolvlm", "gemma3", "idefics3"])
def test_a_resumed_run_ends_with_the_same_weights(family, tmp_path):
    """To the bit, with dropout, also in the vision tower and the projector."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "lora_dropout": 0.1}
    settings |= {"lora_vision": True, "train_projector": True, "per_device_train_batch_size": 2}
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows_for(family)))
    settings |= {"dataset_name": file, "eval_fraction": 0, "image_folder": family.folder}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    done = run(sft_llava, family.recipe.flags(**{**SHORT, **settings, "output_dir": straight}))
    resumed.mkdir()
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(straight / "settings.yaml", resumed)
    again = run(sft_llava, family.recipe.flags(**{**SHORT, **settings, "output_dir": resumed}))
    assert "resuming from" in again.text and len(again.weights) == 3 < len(done.weights)
    assert same(*[load_file(out / "adapter_model.safetensors") for out in (straight, resumed)])
    assert not same(done.weights[2], done.last)


# ----------------------------------------------------------------------------------------------------------- thoughts
@pytest.mark.parametrize("choice, thought", [(True, "<think>\n"), (None, "<think>\n\n</think>\n\n")])
@some_families(["qwen3_5", "qwen3_5_think"])
def test_the_choice_to_think_is_kept(family, choice, thought, tmp_path):
    """In settings.yaml, and by the saved processor, which writes the prompt of training without being told."""
    turns = CONVERSATIONS["one turn"]
    rows = [row_of([turns[0], says("<think>\nOne bar.\n</think>\n\nseven" if choice else "seven")])] * 2
    settings = {"max_steps": 1, "eval_strategy": "no", "load_in_4bit": False, "enable_thinking": choice}
    done, _ = short_run(family, tmp_path / "out", rows, **settings)
    assert yaml.safe_load((done.out / "settings.yaml").read_text())["enable_thinking"] is bool(choice)
    processor, question = AutoProcessor.from_pretrained(done.out), family.messages(turns)[:1]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    assert prompt.endswith(f"<|im_start|>assistant\n{thought}")


# ----------------------------------------------------------------------------------------------------------- refusals
def refusal(recipe, **settings):
    """The one message of a run that is refused before weights load."""
    file = recipe.tmp_path / "rows.json"
    file.write_text(json.dumps([row_of(CONVERSATIONS["one turn"])] * 2))
    return recipe.refusal(recipe.flags_for(file, **settings))


WHY_REFUSED = {
    "paligemma": "PaliGemmaProcessor without a chat template.*dpo_idefics2.py trains it",
    "blip2": "Blip2Processor without a chat template.*instruct or chat version",
    "florence2": "florence2.*encoder-decoder",
    "t5gemma2": "t5gemma2.*encoder-decoder",
    "llama4": "llama4, in which no LM head can be found",
}


@some_families(sorted(REFUSED) + ["llama4"])
def test_a_model_that_cannot_be_trained_is_refused(family):
    assert re.search(WHY_REFUSED[family.name], refusal(family.recipe))


REFUSED_FLAGS = {
    "gemma3": [({"enable_thinking": True}, "its chat template knows no thoughts: --enable_thinking")],
    "ovis2": [({"train_projector": True}, "--train_projector: no projector is found.*add it to PROJECTORS")],
    "qwen3_vl": [
        ({"min_pixels": 2000, "max_pixels": 1000}, "--min_pixels and --max_pixels"),
        ({"vision_learning_rate": 1e-4}, "--vision_learning_rate is for --lora_vision"),
        ({"projector_learning_rate": 1e-4}, "--projector_learning_rate is for --train_projector"),
        ({"lora_target_modules": "qkv"}, "--lora_target_modules qkv: no such linear layer"),
        ({"lora_target_modules": "model.visual.*qkv"}, r"model\.visual.*without a graph.*--lora_vision true"),
    ],
}


@some_families(REFUSED_FLAGS)
def test_flags_that_a_model_has_no_use_for_are_refused(family):
    for settings, message in REFUSED_FLAGS[family.name]:
        assert re.search(message, refusal(family.recipe, **settings)), settings


def test_a_language_model_is_refused(tiny_parts, tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(tiny_parts / "language", folder / "model")
    assert re.search("is a llama, which .* images and text", refusal(Recipe("sft_llava", folder, tmp_path)))


def test_a_model_with_code_of_its_own_is_refused(tmp_path):
    """And is not asked about on the terminal."""
    (tmp_path / "model").mkdir()
    config = {"model_type": "newer_vl", "auto_map": {"AutoConfig": "code.NewerConfig", "AutoModel": "code.NewerModel"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "code.py").write_text("raise Exception('it was run')")
    message = refusal(Recipe("sft_llava", tmp_path, tmp_path))
    assert "brings code of its own, which this recipe does not run" in message


def test_a_model_type_that_transformers_does_not_know_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "newer_vl"}))
    assert re.search("newer_vl", refusal(Recipe("sft_llava", tmp_path, tmp_path)))


@pytest.fixture(scope="module")
def without_torchvision(built):
    """{family: the message of load_processor where torchvision is missing}, from a process of its own."""
    folders = {name: str(built(name).folder / "model") for name in families.NEED_TORCHVISION}
    code = """
import json, sys
sys.modules["torchvision"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.startswith("torchvision") else find(name, *more)
import sft_llava
for name, folder in json.loads(sys.argv[1]).items():
    settings = sft_llava.parse(["--use_cpu", "--model_name_or_path", folder, "--report_to", "none"])[0]
    try:
        sft_llava.load_processor(settings)
    except SystemExit as error:
        print("said:", json.dumps([name, error.code]))
"""
    lines = [line for line in fresh_process(code, json.dumps(folders)).splitlines() if line.startswith("said: ")]
    return dict(json.loads(line.removeprefix("said: ")) for line in lines)


@some_families(sorted(families.NEED_TORCHVISION))
def test_what_to_install_is_said_where_torchvision_is_missing(family, without_torchvision):
    assert re.search(
        "needs packages that are not installed.*pip install torchvision==", without_torchvision[family.name]
    )


# ------------------------------------------------------------------------------------------------------------- pixels
BY_PIXELS = [name for name in READ if name.startswith(("qwen", "glm", "video_llama3"))]
PIXELS = {name: "GLM's processors do so" for name in READ if name.startswith("glm")}


@some_families(READ, PIXELS)
def test_pixels_are_limited_or_that_is_refused(family, tmp_path):
    sizes = {"large": (300, 200), "small": (40, 40)}
    for name, size in sizes.items():
        Image.new("RGB", size, "red").save(family.folder / f"{name}.png")
    enlarged = {"min_pixels": 30000, "max_pixels": 60000}
    for settings, name in (({"max_pixels": 8000}, "large"), (enlarged, "small")):
        if family.name not in BY_PIXELS:
            with pytest.raises(SystemExit, match="--min_pixels, --max_pixels: .* does not resize images by pixels"):
                family.recipe.collator(**settings)
            continue
        collator = family.recipe.collator(**settings)
        grid = collator([row_of([asks(f"{name}.png", "Which?"), says("six")])])["image_grid_thw"]
        pixels = int(grid.prod()) * collator.processor.image_processor.patch_size**2
        assert 4000 < pixels <= 8000 if name == "large" else 30000 <= pixels < 60000


@some_families(["qwen3_vl"])
def test_pixels_beyond_those_of_the_model_are_refused(family):
    """Below its smallest size, or above its largest, a limit would be no limit."""
    for settings in ({"max_pixels": 100}, {"min_pixels": 10**9}):
        with pytest.raises(
            SystemExit, match="the model's images would have at least .* and at most .*: give both flags"
        ):
            family.recipe.collator(**settings)


# ------------------------------------------------------------------------------------------------------ tried or not
def test_that_nobody_has_tried_a_model_is_said(fresh, in_4_bits):
    said = re.findall("nobody has tried a (.*) with this recipe so far; a made-up row passed", in_4_bits[0].text)
    kind = fresh.config.model_type
    assert said == ([] if kind in sft_llava.TRIED else [kind])


def test_what_is_said_to_be_tried_is_tried_here():
    """And what is tried here and not said to be, is what falls short in some way."""
    names = [name for name in TRAINED if name not in families.NEED_TORCHVISION or HAS_TORCHVISION]
    types = {families.FAMILIES[name]()[0].model_type for name in names}
    assert types - set(sft_llava.TRIED) <= {"mllama", "qwen3_5_moe", "glm4v_moe", "muse_glimmer"}
    if HAS_TORCHVISION:
        assert set(sft_llava.TRIED) <= types | {"llava", "llava_next"}
