"""Training, in every recipe: what is in 4-bit, what is adapted, what is trained, at which rate, with which loss."""

import importlib
import math
import re
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
import transformers
from conftest import log, refusal
from peft import get_peft_model
from recipes import Recipe, minicpm_run, two_stage_run
from runs import (
    LANGUAGE,
    QUERIES,
    VARIANTS,
    Runs,
    adapted,
    adapted_base,
    copy_of,
    linear_layers,
    logits,
    matching,
    plain,
    same,
    stir,
)
from safetensors.torch import load_file

from tiny import minicpm26

PARTS = {  # the lines of the table of what is trained
    "sft_llava": ["vision_tower", "multi_modal_projector", "language_model", "lm_head"],
    "idefics2_docvqa": ["vision_model", "modality_projection", "perceiver_resampler", "text_model", "lm_head"],
    "dpo_idefics2": ["vision_model", "connector", "text_model", "lm_head"],
    "finetune_minicpm_lora": ["model.vision_tower", "model.merger", "model.language_model"],
    "llava_two_stage": ["model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"],
}
PARTS_26 = ["vpm", "resampler", "llm"]
IN_4BIT = {  # the linear layers that are in 4-bit, where they are asked for
    "sft_llava": r"model\.language_model\..*",
    "idefics2_docvqa": r"model\.(text_model|connector)\..*",
    "dpo_idefics2": r"model\.(text_model|connector)\..*",
    "finetune_minicpm_lora": r"(model\.language_model|llm\.model)\..*",
    "llava_two_stage": r"model\.language_model\..*",
}
# What PEFT saves besides: the other name of a tied matrix, biases of frozen parts, unused layers of a part.
SAVED_BESIDES = r".*(lm_head\.weight|\.bias|vision_tower\.(encoder\.layers\.2|post_layernorm)\..*)"
variants = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    return Runs(request, tmp_path_factory)


def whole(runs, variant):
    """The base model of a variant, not in 4-bit."""
    flag = "q_lora" if VARIANTS[variant].recipe == "finetune_minicpm_lora" else "load_in_4bit"
    return runs.load(variant, [*runs.trained(variant).argv, f"--{flag}", "false"])


# ----------------------------------------------------------------------------------------- what is trained, what not
@variants
def test_only_what_was_named_is_trained(runs, variant):
    """Its every weight, in float32; beneath and beside it not a bit changes."""
    done, wanted = runs.trained(variant), VARIANTS[variant]
    base = runs.load(variant, done.argv)
    before = base.state_dict()  # of 4-bit weights also their scales
    in_full = {plain(name) for name in done.first if ".lora_" not in name}
    assert adapted(done.first) == matching(wanted.adapted, linear_layers(base))
    assert in_full == matching(wanted.whole, dict(base.named_parameters())) and done.first
    assert any("magnitude" in name for name in done.first) == ("use_dora" in wanted.flags)
    assert {parameter.dtype for parameter in done.last.values()} == {torch.float32}
    assert [name for name in done.first if torch.equal(done.first[name], done.last[name])] == []

    state = done.trainer.model.state_dict().items()
    now = {plain(name): value for name, value in state if not re.search(r"\.lora_|\.modules_to_save\.", name)}
    tied = {name for name in before if name.endswith("lm_head.weight") and base.config.tie_word_embeddings}
    assert now.keys() | tied == before.keys()
    moved = {name for name in now if not torch.equal(now[name].float(), before[name].float())}
    copied = {plain(name) for name in done.first if ".modules_to_save." in name}  # what they were is beneath
    assert moved - tied == in_full - copied


@variants
def test_says_what_is_trained(runs, variant):
    """Parts have their real sizes: what PEFT keeps beside a copy is not counted twice, and a 4-bit byte holds two."""
    done, recipe = runs.trained(variant), VARIANTS[variant].recipe
    base, parts = whole(runs, variant), PARTS_26 if variant.startswith("2.6") else PARTS[recipe]

    def count(weights):
        of_part = dict.fromkeys(parts, 0)
        for name, parameter in weights:
            of_part[next((part for part in parts if part in plain(name)), parts[-1])] += parameter.numel()
        return of_part

    trained, all_weights = count(done.first.items()), count(base.named_parameters())
    adapters = count((name, p) for name, p in done.first.items() if ".lora_" in name)
    packed = matching(IN_4BIT[recipe], linear_layers(base)) if "4-bit" in variant else set()
    in_4bit = count((name, base.get_submodule(name).weight) for name in packed)
    lines = re.findall(r"^(\S+) +([\d,]+) of +([\d,]+) parameters trained, +([\d,]+) in 4-bit$", done.text, re.M)
    said = {part: [int(number.replace(",", "")) for number in numbers] for part, *numbers in lines}
    assert said == {
        part: [trained[part], all_weights[part] + adapters[part], in_4bit[part]] for part in parts if all_weights[part]
    }
    assert "\n12 rows to train on, 4 to evaluate; 4 steps of 4 rows, 1.33 epochs; from the start\n" in done.text


@variants
def test_what_was_trained_is_all_that_is_saved(runs, variant):
    """As it is, in the result and in checkpoints: beside adapters nothing of the base, such as the frozen lm_head."""
    done = runs.trained(variant)
    if not VARIANTS[variant].adapted:
        want = {name: p.detach() for name, p in done.trainer.model.named_parameters()}
        assert same(load_file(done.out / "checkpoint-4" / "model.safetensors"), want)
        if done.recipe != "llava_two_stage":  # its result has the published names: test_llava_two_stage.py
            assert same(load_file(done.out / "model.safetensors"), want)
        return
    want = {
        re.sub(r"(\.modules_to_save)?\.default(?=\.)|(?<=magnitude_vector)\.default\.weight$", "", n): p
        for n, p in done.last.items()
    }
    want = {name.replace("magnitude_vector.weight", "magnitude_vector"): p for name, p in want.items()}
    for folder in (done.out, done.out / "checkpoint-4"):
        file = folder / "adapter_model.safetensors"
        saved = load_file(file)
        more = {name: saved.pop(name) for name in saved.keys() - want.keys()}
        assert same(saved, want) and not list(folder.glob("model*.safetensors"))
        assert more.keys() == matching(SAVED_BESIDES, more)
        size = sum(4 * parameter.numel() for parameter in (want | more).values())
        assert size < file.stat().st_size < size + 30_000


def test_shows_a_pair_as_the_model_sees_it(runs):
    done = runs.trained("dpo: float")
    row = done.trainer.train_dataset[0]
    shown = re.search(
        r"as the model sees it, trained tokens in «»:\n\n(.*)\n  chosen:   (.*)\n  rejected: (.*?)\n\n",
        done.text,
        re.S,
    )
    prompt, chosen, rejected = shown.groups()
    assert prompt.replace("<image> x 8", "") == (
        f"<s> User:<fake_token_around_image><fake_token_around_image> {row['question']}<end_of_utterance>\nAssistant:"
    )
    assert [chosen, rejected] == [f"« {row[name]}<end_of_utterance>»" for name in ("chosen", "rejected")]


# ------------------------------------------------------------------------------------------ which layers are adapted
LAYER_1, CONNECTOR = r"model\.language_model\.layers\.1\..*_proj", r"model\.connector\..*\.k_proj|lm_head"


@pytest.mark.parametrize(
    "variant, names, pattern",
    [
        ("sft: float", ["q_proj", "down_proj"], r"model\.language_model\..*\.(q|down)_proj"),
        ("sft: float", [LAYER_1], LAYER_1),
        ("docvqa: float", ["q_proj", "mlp.down_proj"], r"model\.text_model\..*\.(q_proj|mlp\.down_proj)"),
        ("docvqa: float", [CONNECTOR], CONNECTOR),
        ("dpo: float, language", ["q_proj", "down_proj"], r"model\.text_model\..*\.(q|down)_proj"),
        ("instruct: lora", ["q_proj", "down_proj"], r"model\.language_model\..*\.(q|down)_proj"),
        ("instruct: lora", [LAYER_1], LAYER_1),
    ],
)
def test_lora_target_modules_are_names_within_the_language_model_or_one_regex(runs, variant, names, pattern):
    model = adapted_base(runs.module(variant), runs.argv(variant, lora_target_modules=names))
    linear = {plain(name) for name in linear_layers(model) if "lora_" not in name}
    found = adapted(dict(model.named_parameters()))
    assert found == matching(pattern, linear) and found < linear


NO_LAYER, NO_REGEX = "--lora_target_modules {}: no such linear layer", "is not a valid regular expression"


@pytest.mark.parametrize(
    "variant, names, message",
    [
        ("sft: float", [r".*\.q_proj"], "vision_tower.*q_proj'. is in model.vision_tower, which runs without a graph"),
        ("sft: float", [".*lm_head"], "in lm_head, whose weight SFTTrainer's loss uses directly"),
        ("sft: float", ["q_proj", "qproj"], NO_LAYER.format("qproj")),
        ("docvqa: float", ["q_proj", "qq_proj"], NO_LAYER.format("qq_proj")),
        ("docvqa: float", ["model[.]nothing"], NO_LAYER.format(r"model\[.\]nothing")),
        ("docvqa: float", ["*"], NO_REGEX),
        ("docvqa: float", [".*q_proj"], "vision_model.*q_proj'. is in vision_model, which runs without a graph"),
        ("dpo: float", ["q_proj", "qproj"], NO_LAYER.format("qproj")),
        ("dpo: float", [r".*\.(x|y)_proj"], NO_LAYER.format(".*_proj")),
        ("dpo: float", ["(q_proj"], NO_REGEX),
        ("dpo: float", [r".*lm_head"], "lm_head, which DPOTrainer merges with the loss and cannot adapt"),
        ("4.6: lora", ["nothing"], NO_LAYER.format("nothing")),
        ("4.6: lora", [r".*merger.*linear_1"], "in model.merger, which is trained in full, without an adapter"),
        ("4.6: one layer", None, r"layers\\\.\(99\)"),
        ("instruct: lora", ["q_proj", "query"], NO_LAYER.format("query")),
        ("instruct: lora", [r"model\.(vision|language).*q_proj"], "in vision_tower, .*--vision_learning_rate"),
        ("instruct: lora", [".*linear_1"], "in multi_modal_projector, .*--projector_learning_rate"),
        ("instruct: lora", ["(q_proj"], NO_REGEX),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused_before_any_weights_are_loaded(
    runs, tmp_path, variant, names, message
):
    more = {"lora_layers_to_transform": 99} if "99" in message else {}
    argv = runs.argv(variant, tmp_path / "out", lora_target_modules=names, **more)
    refused = Recipe(VARIANTS[variant].recipe, None, tmp_path).refusal(argv)
    assert re.search(message, refused) and "--lora_target_modules" in refused


def test_an_adapter_in_a_part_without_a_graph_is_refused_in_an_edited_recipe(runs, tmp_path, monkeypatch):
    """It would never get a gradient, and would be counted as trained."""
    module = runs.module("sft: float")
    everywhere = module.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    monkeypatch.setattr(module, "lora_config", lambda settings: everywhere)
    message = refusal(module.main, runs.argv("sft: float", tmp_path / "out"))
    assert re.search("vision_tower.*q_proj.* is in model.vision_tower, which runs without a graph", message)


@pytest.mark.parametrize(
    "more, words",
    [
        ({"lora_r": 4}, "has r 8, not 4"),
        ({"lora_alpha": 8}, "has lora_alpha 64, not 8"),
        ({"lora_target_modules": QUERIES}, "has target_modules"),
        ({"projector_learning_rate": 0}, r"has modules_to_save \['model.merger'\], not \[\]"),
        ({"lora_bias": "all"}, "has bias none, not all"),
    ],
)
def test_an_adapter_of_another_shape_is_not_gone_on_from(runs, tmp_path, more, words):
    first = runs.trained("4.6: lora")
    argv = runs.argv("4.6: lora", tmp_path / "out", lora_weight_path=first.out, **more)
    message = refusal(runs.module("4.6: lora").main, argv)
    assert (
        re.search(f"{words}.*: give the flags that it was trained with", message) and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize("where", ["nowhere", "empty", "2.6: lora"])
def test_what_is_no_adapter_of_this_model_is_not_gone_on_from(runs, tmp_path, where):
    (tmp_path / "empty").mkdir()
    path = runs.trained(where).out if where in VARIANTS else tmp_path / where
    message = refusal(runs.module("4.6: lora").main, runs.argv("4.6: lora", tmp_path / "out", lora_weight_path=path))
    assert f"--lora_weight_path {path}" in message


# -------------------------------------------------------------------------------------------------- at their real size
def llava_7b():
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
    }
    vision |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768}
    text = {"model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008}
    text |= {"num_hidden_layers": 32, "num_attention_heads": 32}
    return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)


def idefics2_8b():
    text = {"model_type": "mistral", "vocab_size": 32003, "hidden_size": 4096, "intermediate_size": 14336}
    text |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "pad_token_id": 0}
    vision = {"hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "num_hidden_layers": 27}
    vision |= {"num_attention_heads": 16, "patch_size": 14}
    perceiver = {"resampler_n_latents": 64, "resampler_depth": 3, "resampler_n_heads": 16, "resampler_head_dim": 96}
    perceiver |= {"num_key_value_heads": 4, "hidden_size": 4096}
    parts = {"text_config": text, "vision_config": vision, "perceiver_config": perceiver}
    return transformers.Idefics2Config(**parts, image_token_id=32001, tie_word_embeddings=False)


PUBLISHED = {llava_7b: 7_063_427_072, idefics2_8b: 8_402_768_112}
LLAMA = 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))  # q, k, v, o; gate, up, down of 32 layers, at rank 16
MISTRAL = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
DORA = 32 * (4096 + 2 * 1024 + 4096) + 3 * (1536 + 2 * 384 + 4096) + 32003  # a magnitude for each output
POST = r".*(text_model|modality_projection|perceiver_resampler).*(k_proj|q_proj|v_proj|o_proj).*|lm_head$"  # its own
QUERY_DOWN = r"model\.language_model\..*\.(q|down)_proj"
EVERYWHERE = r"model\.(language_model\..*_proj|multi_modal_projector\..*|vision_tower\.(?!.*layers\.23\.).*)"


@pytest.mark.parametrize(
    "recipe, config, flags, pattern, layers, trained",
    [
        ("sft_llava", llava_7b, [], LANGUAGE, 7 * 32, LLAMA),
        ("sft_llava", llava_7b, ["--use_dora"], LANGUAGE, 7 * 32, 41_336_832),
        ("sft_llava", llava_7b, ["--train_projector"], LANGUAGE, 7 * 32, LLAMA + 20_979_712),
        ("idefics2_docvqa", idefics2_8b, [], POST, 32 * 4 + 3 * 4 + 1, 7_589_912),
        ("idefics2_docvqa", idefics2_8b, ["--use_dora"], POST, 32 * 4 + 3 * 4 + 1, 7_589_912 + DORA),
        ("dpo_idefics2", idefics2_8b, [], r"model\..*", 410, 55_348_736),
        ("dpo_idefics2", idefics2_8b, ["--lora_r", "8"], r"model\..*", 410, 55_348_736 // 2),
        ("dpo_idefics2", idefics2_8b, ["--adapters", "language"], r"model\.text_model\..*", 7 * 32, MISTRAL),
        (
            "dpo_idefics2",
            llava_7b,
            [],
            EVERYWHERE,
            7 * 32 + 6 * 23 + 2,
            46_972_928,
        ),  # the tower's last layer is not used
        ("dpo_idefics2", llava_7b, ["--adapters", "language"], LANGUAGE, 7 * 32, LLAMA),
        ("dpo_idefics2", llava_7b, ["--lora_target_modules", "q_proj", "down_proj"], QUERY_DOWN, 2 * 32, 11_927_552),
    ],
)
def test_the_real_models_have_their_published_size_and_this_adapter(
    recipe, config, flags, pattern, layers, trained, tmp_path
):
    config().save_pretrained(tmp_path)
    module = importlib.import_module(recipe)
    settings = module.parse(["--use_cpu", "--model_name_or_path", str(tmp_path), *flags])[0]
    with torch.device("meta"):
        base = transformers.AutoModelForImageTextToText.from_config(config()).requires_grad_(False)
        assert base.num_parameters() == PUBLISHED[config]
        linear = linear_layers(base)
        model = get_peft_model(base, module.lora_config(settings))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert adapted(names) == matching(pattern, linear) and len(adapted(names)) == layers
    # of a projector that is trained there are two, one of them frozen
    assert model.get_nb_trainable_parameters() == (trained, PUBLISHED[config] + trained)


def test_two_stage_joins_a_llava_of_the_published_size(tiny_parts, tmp_path, monkeypatch):
    """LLaVA-1.5-7B, of which the first stage trains 21 million weights."""
    module, config = importlib.import_module("llava_two_stage"), llava_7b()
    config.text_config.vocab_size = 32000
    for name in ("vision", "text"):
        getattr(config, f"{name}_config").save_pretrained(tmp_path / name)

    def without_weights(cls, name, **options):
        config = transformers.AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            return cls(config) if cls is transformers.CLIPVisionModel else cls.from_config(config)

    words = SimpleNamespace(
        image_token_id=32000, tokenizer=SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    )
    monkeypatch.setattr(module, "load_complete", without_weights)
    monkeypatch.setattr(module, "load_processor", lambda settings: words)
    parts = {"vision_tower": tmp_path / "vision", "language_model": tmp_path / "text"}
    model = module.load_model(*module.parse(two_stage_run(tiny_parts, "out", "align", **parts)))
    assert model.config.text_config.vocab_size == 32064 and model.config.image_seq_length == 576
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert model.num_parameters() == 7_063_427_072 and model.num_parameters(only_trainable=True) == projector
    settings = module.parse(two_stage_run(tiny_parts, "out", "instruct", lora_r=128))[0]
    model = get_peft_model(model.requires_grad_(False), module.lora_config(settings))
    assert model.get_nb_trainable_parameters()[0] == LLAMA * 128 // 16 + projector == 340_795_392


@pytest.mark.parametrize(
    "modules, trained",
    [
        (None, 27_525_120),  # 28 layers, rank 64: 2 x 3584 for q, twice 3584 + 512 for k and v
        (["embed_tokens", "resampler", "vpm"], 1_057_507_568),  # as its authors' code says
    ],
)
def test_minicpm_2_6_has_the_published_size(tiny_minicpm26, modules, trained):
    """The stand-in's weights are those of the original at its size: 8.1 billion."""
    recipe = importlib.import_module("finetune_minicpm_lora")
    with minicpm26.importable():
        code = importlib.import_module("tiny.minicpm26.hub.modeling_minicpmv")
    size = {"vocab_size": 151666, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    size |= {"num_attention_heads": 28, "num_key_value_heads": 4, "query_num": 64, "image_size": 448, "version": 2.6}
    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    tower |= {"image_size": 980, "patch_size": 14}
    config = minicpm26.MiniCPMVConfig(**size, drop_vision_last_layer=False, vision_config=tower)
    flags = {"lora_target_modules": r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)", "lora_r": 64}
    flags |= {"projector_learning_rate": 0, "lora_modules_to_save": modules}
    settings, _ = recipe.parse(minicpm_run(tiny_minicpm26, "out", **flags))
    with torch.device("meta"):
        model = code.MiniCPMV(config)
        model.post_init()
        assert model.num_parameters() == 8_099_175_152
        model = get_peft_model(model.requires_grad_(False), recipe.lora_config(settings))
    assert model.get_nb_trainable_parameters() == (trained, 8_099_175_152 + trained)


# ----------------------------------------------------------------------------------------------------- 16 bits, 4 bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "variant",
    [
        "sft: 4-bit",
        "next",
        "docvqa: 4-bit",
        "dpo: 4-bit",
        "4.6: 4-bit",
        "4.7: 4-bit, vision",
        "2.6: 4-bit",
        "instruct: 4-bit",
    ],
)
def test_4bit_is_the_language_model_and_of_idefics2_the_connector_and_nothing_else(runs, request, variant, dtype):
    """NF4 with quantized scales; the rest has the dtype that the device picks."""
    more = {}
    if variant == "next":
        variant, more = "sft: 4-bit", {"model_name_or_path": request.getfixturevalue("tiny_next") / "model"}
    module = runs.module(variant)
    settings, training = module.parse(runs.argv(variant, **more))
    training.bf16, training.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    model = module.load_model(settings, training)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert packed.keys() == matching(IN_4BIT[VARIANTS[variant].recipe], linear_layers(model)) and len(packed) > 7
    for layer in packed.values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, dtype)
    others = {name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in packed}
    assert {parameter.dtype for parameter in others.values()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_is_beneath_is_in_16_bits_where_asked(runs):
    """Beneath and beside what is trained in float32."""
    some = [variant for variant in VARIANTS if "bf16" in VARIANTS[variant].flags]
    assert {VARIANTS[variant].recipe for variant in some} == {*IN_4BIT}
    for variant in some:
        frozen = [p for p in runs.trained(variant).trainer.model.parameters() if not p.requires_grad]
        assert not frozen or {p.dtype for p in frozen if type(p).__name__ != "Params4bit"} == {torch.bfloat16}


@pytest.mark.parametrize("variant", ["docvqa: 4-bit", "docvqa: float"])
def test_fp16_as_on_a_t4(runs, variant):
    """No bf16: 16-bit weights beneath adapters in float32, which is what a loss scaler can work with."""
    module, argv = runs.module(variant), runs.argv(variant, lora_dropout=0)
    settings, training = module.parse(argv)
    training.fp16 = True
    model = module.add_adapter(module.load_model(settings, training), module.lora_config(settings)).train()
    stir(model)
    collator = module.Collator(module.load_processor(settings), settings, training)
    batch = collator(module.read_rows(settings.dataset_name, "train", settings).select(range(2)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer, scaler = torch.optim.SGD(trained, 0.1), torch.amp.GradScaler("cpu", init_scale=256.0)
    with torch.autocast("cpu", torch.float16):
        scaler.scale(model(**batch).loss).backward()
    scaler.unscale_(optimizer)  # refuses gradients in 16 bits
    assert all(torch.isfinite(parameter.grad).all() and parameter.grad.any() for parameter in trained)
    scaler.step(optimizer)
    assert not any(torch.equal(old, parameter) for old, parameter in zip(before, trained))


# --------------------------------------------------------------------- loss and gradients are those of the plain model
def step(trainer, batch, **more):
    """The trainer's own loss of a batch, and the gradients of what is trained."""
    model = trainer.model.train()
    model.zero_grad(set_to_none=True)
    loss = trainer.compute_loss(model, trainer._prepare_inputs(copy_of(batch)), **more)
    loss.backward()
    return loss.item(), {plain(name): p.grad for name, p in model.named_parameters() if p.requires_grad}


def plain_step(model, batch, **more):
    """The same by the model's own forward pass."""
    model.train().zero_grad(set_to_none=True)
    batch = {name: value for name, value in copy_of(batch).items() if name not in ("trained_at", "targets")}
    if "target_sizes" in batch:  # of MiniCPM-V's slices; the recipe keeps them as NumPy's
        batch["target_sizes"] = torch.as_tensor(batch["target_sizes"])
    loss = model(**batch, **more).loss
    loss.backward()
    return loss.item(), {plain(name): p.grad for name, p in model.named_parameters() if p.requires_grad}


def alike(mine, wanted, rel=1e-4):
    """Of what a plain model did not use it has no gradient; with several processes a recipe needs one, of zeros."""
    assert mine[0] == pytest.approx(wanted[0], rel=1e-5, abs=1e-7) and mine[1].keys() == wanted[1].keys()
    largest = max(grad.norm() for grad in wanted[1].values() if grad is not None)  # of a bias of keys all is rounding
    for name, grad in wanted[1].items():
        found = mine[1][name]
        if grad is None:
            assert found is None or not found.any(), name
        else:
            assert (found - grad).norm() <= rel * grad.norm() + 1e-6 * largest, name


def watch(model, part, seen):
    """Note each time the first layer of a part runs whether its input has a graph. (Hooks of the layer itself are not
    called when it is computed again.)"""
    names = [name for name, _ in model.named_modules() if re.search(rf"\.({part})\b.*layers\.0\.mlp$", f".{name}")]
    (name,) = [name for name in names if "original_module" not in name]
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))


@pytest.mark.parametrize(
    "variant",
    [
        *("sft: float", "sft: float, projector", "docvqa: float", "align", "align: vision"),
        *("4.6: lora", "4.6: vision", "4.6: full", "4.6: projector", "4.6: 4-bit", "4.7: lora"),
        *("2.6: lora", "2.6: vision", "2.6: full", "2.6: 4-bit"),
        *("instruct: full", "instruct: full, vision", "instruct: lora, vision", "instruct: 4-bit"),
    ],
)
def test_loss_and_gradients_are_those_of_the_plain_model(runs, variant):
    """Of rows with images and without, with and without checkpointing; a frozen tower runs once, without a graph."""
    trains_tower = bool(re.search("vision_tower|vpm", VARIANTS[variant].whole))
    dropout = {"lora_dropout": 0} if VARIANTS[variant].adapted else {}
    stock = adapted_base(runs.module(variant), runs.argv(variant, bf16=None, **dropout))
    for checkpointing in (True, False):
        trainer = runs.untrained(variant, activation_checkpointing=checkpointing, bf16=None).trainer
        seen, spoken = [], []
        watch(trainer.model, "vision_tower|vision_model|vpm", seen)
        watch(trainer.model, "language_model|text_model|llm", spoken)
        rows = [trainer.train_dataset[n] for n in range(8)]  # of a few more 2.6 runs its tower twice
        mine = step(trainer, trainer.data_collator(rows))
        assert seen == [trains_tower] * (1 + (checkpointing and trains_tower)) and len(spoken) == 1 + checkpointing
        assert all(grad is not None and grad.abs().max() > 0 for grad in mine[1].values())

        weights = {name: value for name, value in trainer.model.state_dict().items() if not packed(name, variant)}
        assert not stock.load_state_dict(weights, strict=False).unexpected_keys
        for (_, p), (_, q) in zip(stock.named_parameters(), trainer.model.named_parameters()):
            p.requires_grad_(q.requires_grad)
        blind = [row for row in rows if not row["image_keys"]]
        trains_words = VARIANTS[variant].adapted or "full" in variant  # else there is nothing to learn without images
        for some in [rows, blind] if blind and trains_words else [rows]:
            batch = trainer.data_collator(some)
            for total in ({}, {"num_items_in_batch": 7}) if "2.6" not in variant else ({},):
                alike(step(trainer, batch, **total), plain_step(stock, batch, **total))


def packed(name, variant):
    """Whether a weight is one in 4-bit, or its scales."""
    return "4-bit" in variant and ".base_layer." in name


@pytest.mark.parametrize(
    "variant",
    ["sft: full", "docvqa: float", "dpo: float", "dpo: stock path", "4.6: lora", "4.7: lora", "2.6: lora"]
    + ["align", "instruct: lora"],
)
def test_only_an_answer_is_given_a_cache(runs, variant, monkeypatch):
    """Of keys and values: half a megabyte a token in a model of 7B, for nothing in training and evaluation."""
    caches, make = [], transformers.Cache.__init__

    def count(cache, *args, **kwargs):
        caches.append(cache)
        make(cache, *args, **kwargs)

    trainer = runs.untrained(variant, activation_checkpointing=False, bf16=None).trainer
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(2)])
    monkeypatch.setattr(transformers.Cache, "__init__", count)
    trainer.compute_loss(trainer.model.train(), trainer._prepare_inputs(copy_of(batch))).backward()
    trainer.prediction_step(trainer.model.eval(), copy_of(batch), prediction_loss_only=True)
    assert caches == []
    runs.module(variant).answer_rows(trainer, [trainer.eval_dataset[0]], max_new_tokens=3)
    assert len(caches) == 1


ADAPTED = [v for v, wanted in VARIANTS.items() if wanted.adapted and "4-bit" not in v and "bf16" not in wanted.flags]


@pytest.mark.parametrize("variant", ADAPTED)
def test_the_trained_model_can_be_merged_in_the_same_process(runs, variant):
    """Modules have their own forward back; merged, the model says what the adapter says, with images and without."""
    done = runs.take(variant)
    model = done.trainer.model
    replaced = [
        name for name, module in model.named_modules() if {"forward", "get_placeholder_mask"} & {*vars(module)}
    ]
    assert {*replaced} <= {"", "base_model.model"}  # TRL and Accelerate leave one
    assert not re.search("forward_pairs|run_once", repr(vars(model.get_base_model()).get("forward")))
    rows = list(done.trainer.train_dataset)
    blind = [row for row in rows if not row["image_keys"]]
    batches = [done.inputs(some) for some in (rows, blind) if some]
    adapter = [logits(model, copy_of(batch)) for batch in batches]
    with model.disable_adapter():
        assert all((logits(model, copy_of(batch)) - want).abs().max() > 0.01 for batch, want in zip(batches, adapter))
    merged = model.merge_and_unload()
    for batch, want in zip(batches, adapter):
        torch.testing.assert_close(logits(merged, copy_of(batch)), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["sft: float", "docvqa: float", "4.6: lora", "2.6: lora", "instruct: lora"])
def test_even_before_the_end_a_merge_is_right(runs, variant):
    """Where training was interrupted, other forwards are still in place, and checkpointing leaves one half-way."""
    done = runs.untrained(variant)
    model, rows = done.trainer.model, list(done.trainer.train_dataset)[:4]
    assert any("forward" in vars(module) for name, module in model.named_modules() if name)
    step(done.trainer, done.trainer.data_collator(rows))
    batch = done.inputs(rows)
    adapter = logits(model, copy_of(batch))
    torch.testing.assert_close(logits(model.merge_and_unload(), copy_of(batch)), adapter, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "variant",
    ["sft: 4-bit", "docvqa: 4-bit", "dpo: 4-bit", "4.6: 4-bit", "4.7: 4-bit, vision", "2.6: 4-bit", "instruct: 4-bit"],
)
def test_an_evaluation_leaves_the_gradients_alone(runs, variant):
    """On a CPU with AVX512-BF16 a forward in eval mode would put 4-bit weights into a kernel without autograd."""
    trainer = runs.untrained(variant, bf16=None).trainer
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(6)])
    before = step(trainer, batch)[1]
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert same(before, step(trainer, batch)[1]) and all(grad.abs().max() > 0 for grad in before.values())

    done = runs.trained(variant)  # and so it is in a run with an evaluation after its second step
    assert min(log(done.out, "grad_norm").values()) > 0 and 2 in log(done.out, "eval_loss")
    assert [name for name in done.first if torch.equal(done.weights[2][name], done.weights[3][name])] == []


@pytest.mark.parametrize(
    "variant",
    [
        *("sft: float", "sft: full", "docvqa: float", "dpo: float", "4.6: lora", "4.7: lora", "2.6: lora"),
        *("align", "instruct: full", "instruct: lora"),
    ],
)
def test_accumulated_batches_are_one_batch(runs, variant, tmp_path):
    """Each trained token, of DPO each pair, counts the same, however rows are divided: also where one has no image."""
    found, dropout = [], {"lora_dropout": 0} if VARIANTS[variant].adapted and "dpo" not in variant else {}
    for size in (6, 2, 1):
        rows = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 6 // size}
        done = runs.run(variant, tmp_path / str(size), **rows, **dropout, max_steps=2, eval_strategy="no")
        found.append([*log(done.out).values(), *log(done.out, "grad_norm").values()])
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)
    assert len(found[0]) == 4


# ------------------------------------------------------------------------------------------------ rates, order of rows
class Rates(transformers.TrainerCallback):
    """By how much the rates of the optimizer's groups are scaled, after each step."""

    def __init__(self):
        self.scales = []

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        self.scales.append({round(group["lr"] / group["initial_lr"], 6) for group in optimizer.param_groups})


@pytest.mark.parametrize(
    "variant",
    [
        *("4.6: vision", "4.6: all of it", "4.7: 4-bit, vision", "2.6: vision"),
        *("align: vision", "instruct: full", "instruct: full, vision", "instruct: lora, vision"),
    ],
)
def test_each_part_has_its_learning_rate(runs, variant, tmp_path):
    """In the optimizer's groups, all scaled alike, and in the size of the first step: with AdamW the rate itself."""
    more = {"vision_learning_rate": 1e-4, "projector_learning_rate": 1e-2} if "all of it" in variant else {}
    more |= {"weight_decay": 0.2, "max_steps": 3, "eval_strategy": "no", "lr_scheduler_type": "linear", "bf16": None}
    main = 1e-2 if "align" in variant else 1e-3  # the one that is logged
    more |= {"learning_rate": None if "align" in variant else main}
    seen = Rates()
    done = runs.run(variant, tmp_path / "out", callbacks=[seen], **more)
    parameters = {id(parameter): name for name, parameter in done.trainer.model.named_parameters()}
    groups = done.trainer.optimizer.param_groups
    found = {
        parameters[id(p)]: (group["initial_lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert found.keys() == done.first.keys() and sum(len(group["params"]) for group in groups) == len(found)
    for name, (rate, decay) in found.items():
        is_tower, is_projector = (
            re.search(rf"\.({part})\.", f".{plain(name)}")
            for part in ("vision_tower|vpm", "multi_modal_projector|merger|resampler")
        )
        assert rate == (1e-4 if is_tower else 1e-2 if is_projector else 1e-3), name
        assert decay == (0 if name.endswith("bias") or "norm" in name else 0.2) or re.search(
            r"ln_|A_log|class_emb", name
        )
        moved = (done.weights[1][name] - done.first[name]).abs().max().item()
        is_still = ".lora_A" in name or name.endswith("k_proj.bias")  # B begins with 0; a bias of keys changes nothing
        most = rate * (1 + decay * done.first[name].abs().max().item())
        assert is_still or 0.97 * rate < moved < 1.01 * most, name
    assert seen.scales == [{0.666667}, {0.333333}, {0}]
    assert log(done.out, "learning_rate") == pytest.approx({1: main, 2: main * 2 / 3, 3: main / 3})


@pytest.mark.parametrize(
    "variant", ["sft: float", "docvqa: float", "dpo: float", "4.6: lora", "4.7: lora", "2.6: lora"]
)
def test_rows_can_be_grouped_by_length(runs, variant):
    """By the column that the check of all rows writes: every row once, the longest first, with less padding."""
    padding, rows = {}, runs.folder(variant) / "json"
    for strategy in ("group_by_length", "random"):
        more = {"train_sampling_strategy": strategy, "per_device_train_batch_size": 2, "eval_strategy": "no"}
        data = {"dataset_name": rows / "train.json"}
        trainer = runs.untrained(variant, **more, **data, image_folder=rows / "images").trainer
        lengths, order = trainer.train_dataset["length"], list(trainer._get_train_sampler())
        batches = list(trainer.get_train_dataloader())
        padding[strategy] = sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)
        assert sorted(order) == [*range(96)] and len(batches) == 48
        assert strategy == "random" or lengths[order[0]] == max(lengths) > min(lengths)
    assert 0 < padding["group_by_length"] < padding["random"]
