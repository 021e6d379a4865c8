"""tools/ with runs of sft_llava.py on other families of models: answers, merged models, the page's examples, and what
tools/inspect_recipe.py counts. And benchmarks/real_sizes.py."""

import contextlib
import functools
import io
import json
import re
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from families import (
    CONVERSATIONS,
    TRAINED,
    built_families,  # noqa: F401
    marked,
    row_of,
    says,
    some_families,
)
from peft import PeftModel
from PIL import Image
from runs import run, stir
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    TrainerCallback,
)

import sft_llava
from tools import compare, generate, inspect_recipe, merge_adapter

sys.path.insert(0, str(ROOT / "benchmarks"))
import measure  # noqa: E402
import real_sizes  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_collections")
SHORT = {
    "max_steps": 1,
    "eval_steps": 1,
    "sample_rows": 0,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "lora_dropout": 0,
    "load_in_4bit": False,
    "disable_tqdm": True,
}
TOWER_TOO = (("lora_vision", True), ("train_projector", True))
THINK = (("enable_thinking", True),)
THINKING = ["qwen3_5", "qwen3_8", "glm46v", "gemma4", "muse_glimmer"]  # each writes thoughts in a form of its own
MERGED = ["qwen3_vl", "qwen2_5_vl", "qwen3_5", "smolvlm", "gemma3", "internvl", "llava_onevision", "pixtral", "glm4v"]
TOKENS = {"max_new_tokens": 4, "min_new_tokens": 2}


class Stir(TrainerCallback):
    """Adapters do something from the first step on."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        stir(model)


def turns_of(family):
    """Conversations with no picture, one and two, of one answer and several. Llama 3.2 takes none without a picture
    beside those with one."""
    names = ["one turn", "several turns", "two pictures", "text only"]
    return [CONVERSATIONS[name] for name in names if family.name != "mllama" or name != "text only"]


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def trained(built, tmp_path_factory):
    """A function: a family's name, settings -> (its Family, the folder of a short run, the file of its rows)."""

    @functools.cache
    def make(name, more):
        family, folder = built(name), tmp_path_factory.mktemp("run")
        rows = [row_of(turns) for turns in turns_of(family)]
        if dict(more).get("enable_thinking"):
            question, _ = CONVERSATIONS["one turn"]
            rows = [row_of([question, says(f"<think>It has {bars} bars.</think>seven")]) for bars in (1, 2)]
        file = write(folder / "rows.json", rows)
        own = {"dataset_name": file, "eval_dataset_name": file, "image_folder": family.folder}
        settings = {**SHORT, **own, "output_dir": folder / "out", **dict(more)}
        run(sft_llava, family.recipe.flags(**settings), callbacks=[Stir()])
        return family, folder / "out", file

    return make


@pytest.fixture
def family(request, built):
    return built(request.param)


def new_tokens(processor):
    """Options of generate(): no token of the prompt. Some models would repeat its last one, or say nothing."""
    return TOKENS | {"no_repeat_ngram_size": 1, "suppress_tokens": [processor.tokenizer.pad_token_id]}


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """A function: arguments -> the lines that generate.py writes for them; its `prompts` are what the model read."""
    stock, answer = generate.generation_options, generate.answer

    def options(collator, args):
        return stock(collator, args) | new_tokens(collator.processor)

    def remember(model, collator, asked, args):
        ids = collator.tokenize(asked, prompt=True)["input_ids"]
        make.prompts += collator.processor.tokenizer.batch_decode(ids)
        return answer(model, collator, asked, args)

    def make(*argv, overwrite=True):
        own = ["--output", tmp_path / "out.jsonl", *(["--overwrite"] if overwrite else ["--resume"])]
        with contextlib.redirect_stdout(io.StringIO()):
            generate.main([str(word) for word in (*argv, *own)])
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    make.prompts = []
    monkeypatch.setattr(generate, "generation_options", options)
    monkeypatch.setattr(generate, "answer", remember)
    return make


def say(model, processor, messages, stops):
    """What a program that knows nothing of the recipe gets for an answer."""
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    prompt = processor.apply_chat_template(messages, **options)
    with torch.no_grad():
        ids = model.eval().generate(**prompt, **new_tokens(processor), do_sample=False, eos_token_id=stops)
    return processor.tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# ------------------------------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize("name", marked([name for name in TRAINED if name != "glm4v_moe"]))
def test_answers_are_those_of_the_model(name, trained, ask):
    """Of the rows that the run held out, each answer of each row once, in batches as one by one; with --base_only of
    the base."""
    family, out, _ = trained(name, ())
    processor = AutoProcessor.from_pretrained(out)
    expected, asked = {}, {}
    for number, turns in enumerate(turns_of(family)):
        for n in range(1, len(turns), 2):
            pictures = sum(part.endswith(".png") for turn in turns[:n] for part in turn[1:])
            expected[number, n // 2] = (pictures, turns[n - 1][-1], turns[n][1])
            asked[number, n // 2] = family.messages(turns[:n])
    found = []
    for flags in (["--base_only"], ["--batch_size", 3]):
        model = AutoModelForImageTextToText.from_pretrained(family.folder / "model")
        if "--base_only" not in flags:
            model = PeftModel.from_pretrained(model, out)
        lines = ask(out, *flags)
        assert {(x["row"], x["turn"]): (x["images"], x["question"], x["reference"]) for x in lines} == expected
        assert len(lines) == len(expected)
        found.append({(x["row"], x["turn"]): x["prediction"] for x in lines})
        right = {key: say(model, processor, messages, list(family.stop_ids)) for key, messages in asked.items()}
        assert found[-1] == right
    assert found[0] != found[1] and any(found[1].values())


@some_families(["qwen3_5", "llava_onevision", "smolvlm"])
def test_another_data_set_is_asked_as_a_whole(family, trained, ask):
    """Also where the recipe makes a row of each answer: with the same prompts and answers."""
    _, out, file = trained(family.name, ())
    held_out = sorted(map(json.dumps, ask(out)))
    prompts = set(ask.prompts)
    ask.prompts.clear()
    lines = ask(out, "--dataset_name", file, "--image_folder", family.folder)
    assert sorted(map(json.dumps, lines)) == held_out
    assert {text.replace(family.tokenizer.pad_token, "") for text in ask.prompts} == {
        text.replace(family.tokenizer.pad_token, "") for text in prompts
    }


def test_an_adapter_of_another_kind_is_refused(trained, built):
    """Pixtral is a LLaVA by its config.json, with a processor of its own."""
    family, out, _ = trained("gemma3", ())
    other = built("idefics3").folder / "model"
    with pytest.raises(SystemExit, match="does not fit .*: that is a idefics3, and the run has a Gemma3Processor"):
        generate.main([str(out), "--question", "x", "--model_name_or_path", str(other)])


# ------------------------------------------------------------------------------------------------------------ thoughts
@some_families(THINKING)
def test_a_thought_is_told_apart_from_the_answer(family):
    """As the chat template writes both; one that is not ended is all thought, an answer without one is none."""
    collator = family.recipe.collator(enable_thinking=True)
    processor, said = collator.processor, {"reasoning_content": "It has one bar.\n\nThree?"}
    question = family.messages(CONVERSATIONS["text only"])[:1]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "seven it is"}], **said}
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    text = processor.apply_chat_template([*question, answer]).removeprefix(prompt)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    padding = [collator.stop_ids[0]] + 2 * [processor.tokenizer.pad_token_id]
    whole = {"thought": said["reasoning_content"], "prediction": "seven it is"}
    assert generate.split_thought(collator, ids + padding) == whole
    ids = processor.tokenizer(text.partition("Three")[0], add_special_tokens=False)["input_ids"]
    assert generate.split_thought(collator, ids + padding) == {"thought": "It has one bar.", "prediction": ""}
    ids = processor.tokenizer("seven", add_special_tokens=False)["input_ids"]
    begins_in_prompt = prompt.endswith("<think>\n")
    alone = {"thought": "seven", "prediction": ""} if begins_in_prompt else {"thought": "", "prediction": "seven"}
    assert generate.split_thought(collator, ids + padding) == alone


@some_families(["qwen3_5", "gemma4"])
def test_a_run_is_asked_to_think_as_it_was_trained(family, trained, ask):
    """Unless it is told otherwise; and is resumed."""
    _, out, _ = trained(family.name, THINK)
    processor = AutoProcessor.from_pretrained(out)
    question = family.messages(CONVERSATIONS["one turn"])[:1]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    prompts = {}
    for choice in (True, False, None):
        more = {} if choice is None else {"enable_thinking": choice}
        ids = processor.apply_chat_template(question, **options, **more)["input_ids"][0]
        prompts[choice] = processor.tokenizer.decode(ids)
    assert prompts[True] == prompts[None] != prompts[False]
    asked = ["--question", "Which digit is this?", "--image", family.folder / "red.png"]
    for flags, choice in (([], True), (asked, True), ([*asked, "--enable_thinking", "false"], False)):
        ask.prompts.clear()
        lines = ask(out, *flags)
        assert set(ask.prompts) == {prompts[choice]}
        assert all(("thought" in line) == choice for line in lines)
        assert flags or [line["reference"] for line in lines] == ["seven"] * 2
    first = ask(out, "--batch_size", 1)
    assert ask(out, "--batch_size", 1, overwrite=False) == first


# --------------------------------------------------------------------------------------------------- too long, or not
@some_families(["qwen3_vl", "gemma3", "internvl", "smolvlm", "llava_onevision"])
def test_a_question_is_too_long_from_where_the_model_ends(family, trained, ask, tmp_path):
    """With all tokens of its picture, to the last one."""
    _, out, _ = trained(family.name, ())
    question = ["--question", "Which digit is this?", "--image", family.folder / "lime.png"]
    ask(out, *question)
    count = len(family.tokenizer(ask.prompts[-1], add_special_tokens=False)["input_ids"])
    model = AutoModelForImageTextToText.from_pretrained(family.folder / "model")
    for most in (count + 1, count):
        model.config.get_text_config().max_position_embeddings = most
        model.save_pretrained(tmp_path / str(most))
    assert ask(out, *question, "--model_name_or_path", tmp_path / str(count + 1))
    with pytest.raises(SystemExit, match=f"question is too long: {count} tokens .* the model reads {count} with its"):
        ask(out, *question, "--model_name_or_path", tmp_path / str(count))


@some_families(["qwen3_vl"])
def test_a_picture_of_any_size_is_counted(family, trained, ask, tmp_path):
    """2400 x 2400 pixels are 75 x 75 tokens; the model reads 4096."""
    _, out, _ = trained("qwen3_vl", ())
    Image.new("RGB", (2400, 2400)).save(tmp_path / "large.png")
    question = ["--question", "Which digit is this?", "--image", tmp_path / "large.png"]
    assert ask(out, *question)  # of a run whose own limit is lower
    with pytest.raises(SystemExit, match="the question is too long: 56.. tokens .*, and the model reads 4096"):
        ask(out, *question, "--max_pixels", 16_000_000)


def test_the_end_that_a_configuration_leaves_out_is_the_models_own(built, tmp_path):
    """Gemma 3's published config.json does not say it."""
    config = json.loads((built("gemma3").folder / "model" / "config.json").read_text())
    del config["text_config"]["max_position_embeddings"]
    write(tmp_path / "config.json", config)
    settings = SimpleNamespace(model_name_or_path=str(tmp_path), model_revision=None)
    assert generate.longest_input(settings) == AutoConfig.from_pretrained(tmp_path).text_config.max_position_embeddings


# ------------------------------------------------------------------------------------------------------------ the page
@some_families(["qwen3_5", "gemma3"])
def test_the_page_asks_both_models_and_shows_each_held_out_row_once(family, trained, ask, monkeypatch):
    _, out, _ = trained(family.name, ())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    args, flags = compare.parse([str(out), "--port", str(port), "--max_new_tokens", "4"])
    (page,) = compare.load_runs(args, flags)
    with_one_picture = [turns for turns in turns_of(family) if len(turns[0]) == 3]
    assert [shown[1:] for shown in page.examples] == [(turns[0][2], turns[1][1]) for turns in with_one_picture]
    answers, stock = compare.Answers([page], args), compare.generation_options

    def options(collator, args):
        return stock(collator, args) | new_tokens(collator.processor)

    monkeypatch.setattr(compare, "generation_options", options)
    question, picture = "Which digit is this?", str(family.folder / "lime.png")
    found = []
    for side, more in ((compare.TUNED, []), (compare.BASE, ["--base_only"])):
        batch = answers.prepare(page, picture, question)
        found.append(list(answers.stream(page, side, batch, threading.Event()))[-1])
        (line,) = ask(out, "--question", question, "--image", picture, *more)
        assert line["prediction"] == found[-1]
    assert found[0] != found[1]


# ------------------------------------------------------------------------------------------------------------- merging
FRESH = """
import json, sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
for line in sys.stdin:
    folder, picture = json.loads(line)
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": "Which digit is this?"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    with torch.no_grad():
        torch.save(model(**batch).logits, f"{folder}/logits.pt")
        ids = model.generate(**batch, max_new_tokens=6, do_sample=False)[0].tolist()
    print(json.dumps(ids), flush=True)
"""


@pytest.fixture(scope="module")
def stranger():
    """A function: a folder, a picture -> the tokens of a question and its answer, by a process that knows nothing of
    the recipe. It leaves the logits in the folder."""
    command = [sys.executable, "-c", FRESH]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:

        def answer(folder, picture):
            print(json.dumps([str(folder), str(picture)]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield answer
        process.stdin.close()


@pytest.fixture(scope="module")
def merged(trained):
    """A function: a family's name, settings -> the folder that a run is merged into."""

    @functools.cache
    def make(name, more):
        out = trained(name, more)[1]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            merge_adapter.main([str(out), str(out.parent / "merged"), "--use_cpu"])
        assert "which loads alone" in printed.getvalue()
        return out.parent / "merged"

    return make


@pytest.mark.parametrize("more", [(), TOWER_TOO], ids=["decoder", "tower, projector"])
@some_families(MERGED)
def test_the_merged_folder_is_the_adapter_on_its_base(family, more, trained, merged, stranger):
    """Logits, answer and where it ends, in a process that knows nothing of the recipe."""
    folder, out = merged(family.name, more), trained(family.name, more)[1]
    picture = family.folder / "lime.png"
    ids = stranger(folder, picture)
    messages = family.messages([("user", "lime.png", "Which digit is this?")])
    base = AutoModelForImageTextToText.from_pretrained(family.folder / "model")
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = AutoProcessor.from_pretrained(out).apply_chat_template(messages, **options)
    with torch.no_grad():
        untouched = base(**batch).logits
        model = PeftModel.from_pretrained(base, out).eval()
        right = model(**batch).logits
        generated = model.generate(**batch, max_new_tokens=6, do_sample=False)[0].tolist()
    torch.testing.assert_close(torch.load(folder / "logits.pt"), right, atol=1e-4, rtol=0)
    assert not torch.allclose(right, untouched, atol=1e-3) and ids == generated
    stops = GenerationConfig.from_pretrained(folder).eos_token_id
    assert isinstance(stops, list) and set(stops) == family.stop_ids | {family.tokenizer.eos_token_id}


@some_families(MERGED)
def test_what_is_written_for_transformers_4_changes_no_configuration(family, merged):
    ours = AutoConfig.from_pretrained(merged(family.name, ())).to_dict()
    base = AutoConfig.from_pretrained(family.folder / "model").to_dict()
    for part in ("text_config", "vision_config"):
        for left_out in ("dtype", "_name_or_path"):
            ours[part].pop(left_out, None)
            base[part].pop(left_out, None)
        assert ours[part] == base[part]


@some_families(["gemma3", "llava_onevision", "pixtral", "qwen2_5_vl", "internvl"])
def test_weights_have_the_published_names(family, merged):
    """SigLIP's are in vision_model, those of other towers are not."""
    with safe_open(merged(family.name, ()) / "model.safetensors", "pt") as file:
        names = set(file.keys())
    tower = {name for name in names if name.startswith(("vision_tower.", "visual."))}
    assert tower and all(
        name.startswith(("language_model.", "model.", "lm_head"))
        for name in names
        if "layers" in name and name not in tower
    )
    is_siglip = family.name in ("gemma3", "llava_onevision")
    assert all(name.startswith("vision_tower.vision_model.") == is_siglip for name in tower)


ROPE = [
    (
        {"model_type": "gemma3_text"},
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    (
        {"model_type": "qwen3_vl_text"},
        {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        {
            "rope_theta": 5e6,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
    ),
    (
        {"model_type": "glm4v_text"},
        {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5},
        {
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]},
        },
    ),
    ({"model_type": "qwen2"}, {"rope_type": "default", "rope_theta": 1e6}, {"rope_theta": 1e6}),
]


@pytest.mark.parametrize(("config", "rope", "older"), ROPE, ids=[config["model_type"] for config, _, _ in ROPE])
def test_angles_are_named_for_transformers_4_too(config, rope, older):
    """As 4.57 names them in these models; today's reads the same from both."""
    written = {"text_config": {**config, "rope_parameters": rope}}
    merge_adapter.add_rope_of_transformers_4(written)
    assert written["text_config"] == {**config, "rope_parameters": rope, **older}
    today = AutoConfig.for_model(**written["text_config"]).rope_parameters
    assert today == AutoConfig.for_model(**config, rope_parameters=rope).rope_parameters


def test_settings_of_sampling_that_is_off_keep_nobody_from_merging(trained, built, tmp_path):
    """As in Vicuna's generation_config.json, which Transformers refuses to write."""
    base = tmp_path / "base"
    base.mkdir()
    for file in (built("gemma3").folder / "model").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    stops = json.loads((base / "generation_config.json").read_text())["eos_token_id"]
    write(base / "generation_config.json", {"temperature": 0.9, "top_p": 0.6, "eos_token_id": stops})
    argv = [trained("gemma3", ())[1], tmp_path / "merged", "--use_cpu", "--model_name_or_path", base]
    with contextlib.redirect_stdout(io.StringIO()):
        merge_adapter.main([str(word) for word in argv])
    kept = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert kept.temperature is None and kept.eos_token_id == stops


# -------------------------------------------------------------------------------------------------- what is inspected
@pytest.fixture
def inspect(trained, capsys):
    """A function: a family's name, settings -> the report as --json prints it, and the flags."""

    def make(name, **settings):
        family, out, file = trained(name, ())
        own = {"dataset_name": file, "image_folder": family.folder, "output_dir": out.parent / "inspected"}
        flags = family.recipe.flags(**{**SHORT, "load_in_4bit": True, "eval_fraction": 0, **own, **settings})
        capsys.readouterr()
        inspect_recipe.main([sft_llava.__file__, "--json", *flags])
        return json.loads(capsys.readouterr().out), flags

    return make


@pytest.mark.parametrize("name", marked([name for name in TRAINED if name != "glm4v_moe"]))
def test_parameters_are_counted_by_part(name, inspect, uncounted, built):
    """What is in which part, by the recipe's own find_parts; all of it, and once."""
    report, flags = inspect(name, **dict(TOWER_TOO if name != "ovis2" else TOWER_TOO[:1]))
    parts, model = report["parts"], AutoModelForImageTextToText.from_pretrained(built(name).folder / "model")
    places = sft_llava.find_parts(sft_llava.parse(flags)[0], sft_llava.PROJECTORS)
    weights = dict(model.named_parameters())

    def size(*paths):
        return sum(p.numel() for key, p in weights.items() if any(key.startswith(f"{path}.") for path in paths))

    trained_copy = size(*places.projectors)
    everything = sum(part["total"] - part["adapters"] for part in parts.values())
    assert everything == model.num_parameters() + trained_copy
    assert parts.get("projector", {"trainable": 0})["trainable"] == trained_copy
    for part, path in (("language model", places.decoder), ("LM head", places.head)):
        found = parts.get(part, dict.fromkeys(("total", "adapters", "four_bit"), 0))
        assert found["total"] - found["adapters"] == size(path)
    tower = parts["vision tower"]
    inside = [path for path in places.projectors if path.startswith(f"{places.vision}.")]
    assert tower["total"] - tower["adapters"] == size(places.vision) - size(*inside) and tower["adapters"] > 0
    assert parts["language model"]["four_bit"] > 0 == tower["four_bit"]


@some_families(["gemma3", "internvl", "pixtral", "qwen3_vl", "smolvlm"])
def test_tokens_of_pictures_are_folded(family, inspect, uncounted):
    """With those at the ends of their rows."""
    report, _ = inspect(family.name)
    of_images = set(family.collator.processor.image_token_ids)
    for example in report["examples"]:
        batch = family.collator([row_of(turns_of(family)[example["row"]])])
        pieces = [piece for piece in example["sequences"][0] if piece["kind"] == "image"]
        assert sum(piece["tokens"] for piece in pieces) == sum(t in of_images for t in batch["input_ids"][0].tolist())
        assert all(re.search(r" x \d+$", piece["text"]) for piece in pieces)


ACTIVATIONS = {  # settings beside the defaults
    "qwen3_vl": TOWER_TOO,
    "qwen3_vl_moe": (("load_in_4bit", False),),
    "qwen3_5": (("bf16", True),),
    "smolvlm": TOWER_TOO,
    "gemma3": (),
    "internvl": (("lora_vision", True), ("bf16", True)),
    "llava_onevision": (("lora_vision", True),),
}


@some_families(ACTIVATIONS)
def test_activations_are_those_of_a_step(family, inspect, tmp_path):
    """Bytes at most allocated in the second of two accumulated steps, by torch's profiler; see test_inspect.py."""
    settings = {"per_device_train_batch_size": 2, **dict(ACTIVATIONS[family.name])}
    report, flags = inspect(family.name, **settings)
    memory = report["memory"]
    assert memory["activations"], memory["not_counted"]
    for kind, size in memory["activations"].items():
        more = ["--activation_checkpointing", str(kind == "with_checkpointing"), "--output_dir", str(tmp_path / kind)]
        trainer = measure.trainer_of(sys.modules["recipe_sft_llava"], flags + more)
        assert size["bytes"] == pytest.approx(measure.activations(trainer), rel=0.02)


# --------------------------------------------------------------------------------------------------------- real sizes
def sized(names):
    """Models of benchmarks/real_sizes.py for parametrize, skipped where one needs torchvision and there is none."""
    families = marked([real_sizes.MODELS[name].family for name in names])
    return [pytest.param(name, marks=family.marks) for name, family in zip(names, families)]


@pytest.mark.parametrize("name", sized(real_sizes.MODELS))
def test_real_sizes_have_the_published_parameters(name):
    published = real_sizes.MODELS[name].parameters or 9_409_813_744  # Qwen3.5-9B's are not known but for "9B"
    assert real_sizes.parameters(real_sizes.parts_of(name)[0]) == published


IMAGE_TOKENS = {"gemma-3-4b": 256, "qwen3-vl-8b": 31 * 25}


@pytest.mark.parametrize("name", sized(IMAGE_TOKENS))
def test_real_sizes_are_inspected(name, tmp_path, capsys, uncounted):
    """The tokens of a picture of 1000 x 800; a GPU of 24 GB has room for 22.8 less what is in the line."""
    real_sizes.main([str(tmp_path), name])
    cells = capsys.readouterr().out.splitlines()[-1].split()
    assert cells[:3] == [name, f"{real_sizes.MODELS[name].parameters:,}", "+0"] and cells[5] == str(IMAGE_TOKENS[name])
    weights, row = float(cells[3]), float(cells[4])
    assert 0.5 * real_sizes.MODELS[name].parameters / 1e9 < weights < row - 1
    assert int(cells[7]) == pytest.approx(22.8 - 1 - row + 1, abs=1)


def test_real_sizes_refuse_what_they_do_not_know(tmp_path):
    with pytest.raises(SystemExit, match="^error: no model gpt-4; there are qwen3-vl-8b, "):
        real_sizes.main([str(tmp_path), "gpt-4"])
