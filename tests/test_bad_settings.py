"""Flags, models, templates and processors that cannot work: one message with the remedy, and no traceback."""

import builtins
import contextlib
import functools
import io
import json
import re
import shutil

import pytest
import torch
from recipes import FOLDERS, NAMES, Loaded, Recipe, asks, prefers, said, talks
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, SiglipConfig

from tiny import idefics2, llava, minicpm, preferences

MINICPM = "finetune_minicpm_lora"
MINICPM_26 = f"{MINICPM} tiny_minicpm26"
EVERY_MINICPM = [MINICPM, f"{MINICPM} tiny_minicpm47", MINICPM_26]


def of(*names):
    return pytest.mark.parametrize("case", names, indirect=True)


@pytest.fixture(params=NAMES)
def case(request, tmp_path):
    """Each recipe in turn; or one with another model, if "recipe fixture" is asked for."""
    name, _, folder = request.param.partition(" ")
    return Recipe(name, request.getfixturevalue(folder or FOLDERS[name]), tmp_path)


@pytest.fixture
def flags(case, write, images):
    """A function: settings as keywords -> the flags for a run on three good rows."""
    images(1)
    rows = write([case.row("Which digit is this?", "It is a seven.")] * 3)
    return functools.partial(case.flags_for, rows)


def assert_refused(case, table, **more):
    for settings, expected in table:
        message = case.refusal(case.flags(**{**more, **settings}))
        assert re.search(expected, message) and "\n" not in message, (settings, message)


def end_of(case, argv):
    """The one message that a run ends with, after its weights were asked for."""
    with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(io.StringIO()):
        case.module.main(argv)
    assert end.value.code.startswith("error: ") and not (case.tmp_path / "out").exists()
    return end.value.code


# ---------------------------------------------------------------------------------------------------- flags, machine
BEST = {"load_best_model_at_end": True}
CANNOT_WORK = [
    ({"max_eval_rows": 0}, "--max_eval_rows must be at least 1"),
    ({"enable_jit_checkpoint": True}, "--enable_jit_checkpoint, a checkpoint on SIGTERM: leave it out"),
    ({**BEST, "eval_steps": 5, "save_steps": 10}, "--save_steps equal to --eval_steps.*--load_best_model_at_end f"),
    ({"output_dir": "/proc/nowhere"}, "--output_dir /proc/nowhere cannot be written"),
    ({"report_to": "nonsense"}, "--report_to .*nonsense"),
    ({"push_to_hub": True}, "--push_to_hub"),
    ({"learning_rate": -1}, "--learning_rate must be from 0 to below 10"),
    ({"learning_rate": "inf"}, "--learning_rate must be from 0 to below 10"),
    ({"logging_steps": "inf"}, "infinity"),
    ({"deepspeed": "zero3.json"}, "--deepspeed: not used by this recipe; .*--config_file"),
]
FOR_SFT = [
    ({"learning_rate": 0}, "--learning_rate must be above 0"),
    ({"lora_r": 0}, "--lora_r 0 .*4 bits.*--load_in_4bit false"),
    ({"lora_r": 0, "load_in_4bit": False, "use_dora": True}, "--use_dora .*--lora_r 0"),
    ({"lora_r": 0, "load_in_4bit": False, "lora_target_modules": "q_proj"}, "--lora_target_modules .*--lora_r 0"),
]
FOR_DOCVQA = [
    ({"learning_rate": 0}, "--learning_rate must be above 0"),
    ({"lora_r": 0}, "--lora_r must be at least 1"),
    *(({"instruction": text}, "--instruction: .*instruction") for text in ("<image>", "a<end_of_utterance>", "   ")),
]
LOSS = "--loss_type {}: .*sigmoid, hinge, .*kto, orpo, cpo, simpo and others have trainers of their own"
ONLY_KL = "nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero apo_down".split()
NO_KL = {"f_divergence_type": "js_divergence"}
SMOOTHED = "--loss_type robust and aot take --label_smoothing from 0 to below 0.5"
FOR_DPO = [
    ({"learning_rate": 0}, "--learning_rate must be above 0"),
    ({"lora_r": 0}, "--lora_r must be at least 1: the reference is"),
    *(({"loss_type": loss}, LOSS.format(loss)) for loss in ("kto", "Sigmoid")),
    ({"loss_type": ["sigmoid", "kto", "nll"]}, LOSS.format("kto nll")),
    ({"loss_type": "exo_pair"}, "exo_pair needs --label_smoothing above 0 and below 1"),
    ({"loss_type": ["sft", "exo_pair"], "label_smoothing": 1}, "exo_pair needs --label_smoothing above 0"),
    ({"loss_type": "robust", "label_smoothing": 0.5}, SMOOTHED),
    ({"loss_type": "aot_unpaired", "label_smoothing": -0.1}, SMOOTHED),
    ({"label_smoothing": 0.1}, "--label_smoothing is for the losses exo_pair, robust and aot"),
    *(({"loss_type": loss, **NO_KL}, f"js_divergence: {loss} can only have reverse_kl") for loss in ONLY_KL),
    ({"f_divergence_type": "kl"}, "--f_divergence_type.*kl"),
]
FULL, TOWER = {"use_lora": False, "tune_llm": True}, {"tune_vision": True}
OF_LORA = "target_modules weight_path modules_to_save layers_to_transform".split()
NO_RATES = [(f"{part}_learning_rate", rate) for part in ("projector", "vision") for rate in (-1, 10, "nan", "inf")]
RATES = "learning rates(: | must be )from 0"
FOR_MINICPM = [
    ({"tune_llm": True}, "--use_lora adapts the language model, --tune_llm trains all of it: .*add --use_lora false"),
    ({**FULL, "q_lora": True}, "--q_lora: 4-bit weights cannot be trained themselves.*--use_lora true"),
    *(({**FULL, f"lora_{name}": 1}, f"--lora_{name}: for --use_lora true") for name in OF_LORA),
    ({"vision_learning_rate": 1e-5}, "--vision_learning_rate is for --tune_vision"),
    ({**TOWER, "vision_learning_rate": 0}, "--vision_learning_rate 0 means a frozen tower: omit --tune_vision"),
    ({"learning_rate": 0}, "--learning_rate 0 means a frozen language model: then --use_lora false and no --tune_llm"),
    *(({**TOWER, name: rate}, RATES) for name, rate in NO_RATES),
    ({"use_lora": False, "projector_learning_rate": 0}, "nothing would be trained: every part is frozen"),
    ({"lora_target_modules": "llm.("}, r"--lora_target_modules 'llm\.\(' is not a valid regular expression: "),
]
ALIGN, LORA, FROZEN = {"stage": "align"}, {"lora_r": 4}, "the language model is frozen in --stage align"
FOR_TWO_STAGE = [
    *(({name: rate}, RATES) for name, rate in NO_RATES),
    ({"stage": "both"}, "--stage"),
    ({**ALIGN, "learning_rate": 2e-5}, f"--learning_rate 2e-05: {FROZEN}; .*--projector_learning_rate"),
    ({**ALIGN, **LORA}, f"--lora_r 4: {FROZEN}; adapters are for --stage instruct"),
    ({**ALIGN, "load_in_4bit": True}, "--load_in_4bit: for adapters, --stage instruct --lora_r 128"),
    ({**ALIGN, "projector_learning_rate": 0}, "nothing would be trained: every part is frozen"),
    ({"load_in_4bit": True}, "--load_in_4bit: for adapters, --stage instruct --lora_r 128"),
    ({"lora_alpha": 16, "lora_dropout": 0}, "--lora_alpha, --lora_dropout: for adapters"),
    ({"lora_target_modules": "q_proj"}, "--lora_target_modules: for adapters"),
    ({"learning_rate": 0, **LORA}, "--learning_rate 0 means a frozen language model: then --lora_r 0"),
    ({"learning_rate": 0, "projector_learning_rate": 0}, "nothing would be trained: every part is frozen"),
]
ONLY_HERE = dict(zip(NAMES, (FOR_SFT, FOR_DOCVQA, FOR_DPO, FOR_MINICPM, FOR_TWO_STAGE), strict=True))


def test_flags_that_cannot_work_end_the_run_at_once(case):
    assert_refused(case, CANNOT_WORK + ONLY_HERE[case.name])
    if case.name == "llava_two_stage":
        assert_refused(case, CANNOT_WORK, stage="align")


def test_a_file_in_place_of_the_output_is_left_alone(case, tmp_path):
    (tmp_path / "file").write_text("mine")
    for below in ("", "inside/deep"):
        message = case.refusal(case.flags(output_dir=tmp_path / "file" / below))
        assert "--output_dir" in message and "cannot be written" in message
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_message_says_what_is_needed(case):
    assert re.search(r"no GPU found \(.*GB.*--use_cpu", case.refusal(case.flags(use_cpu=False)))


def test_only_the_first_process_speaks(case, monkeypatch):
    for rank, code in (("0", "error: too much"), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            case.module.fail("too much")
        assert end.value.code == code


@of("dpo_idefics2")
def test_a_config_file_must_name_a_loss(case, tmp_path):
    (tmp_path / "run.yaml").write_text("loss_type: []")
    assert "--loss_type : known are sigmoid, hinge" in case.refusal(case.flags(config=tmp_path / "run.yaml"))


@of(MINICPM)
def test_lora_target_modules_of_a_config_file_may_be_a_text(case, tmp_path):
    """As earlier runs wrote it."""
    for text, names in ((".*q_proj", [".*q_proj"]), ("[q_proj, k_proj]", ["q_proj", "k_proj"]), ("null", None)):
        (tmp_path / "run.yaml").write_text(f"lora_target_modules: {text}")
        assert case.parse(config=tmp_path / "run.yaml")[0].lora_target_modules == names


# --------------------------------------------------------------------------------------------- stages of two_stage
@of("llava_two_stage")
@pytest.mark.parametrize("stage, rows, at_once", [("align", 256, 8), ("instruct", 128, 4)])
def test_a_step_has_as_many_rows_on_any_number_of_processes(case, stage, rows, at_once, monkeypatch):
    training = case.parse(stage=stage)[1]

    def steps(batch, accumulated=None):
        asked = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        filled = case.module.fill_defaults({**training.as_given, **asked, "rows_per_step": None})
        vars(training).update({name: filled[name] for name in (*asked, "rows_per_step")})
        case.module.pick_batch(training, (training.rows_per_step or 128) // 32, 32, 4)
        return training.per_device_train_batch_size, training.gradient_accumulation_steps

    for processes in (1, 2, 8):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        assert steps(batch="auto") == (at_once, rows // at_once // processes)
        assert steps(batch=16) == (16, rows // 16 // processes)
    with pytest.raises(ValueError, match=f"--rows_per_step {rows}: 12 at once in each of 8 processes"):
        steps(batch=12)
    assert steps(batch=12, accumulated=5) == (12, 5)
    assert steps(batch="auto", accumulated=5) == (at_once, 5)


BEGINNINGS = {  # stage: the model, the result, the data
    "align": (None, "llava-align", "blip_laion_cc_sbu_558k.json"),
    "instruct": ("llava-align", "llava-instruct", "llava_v1_5_mix665k.json"),
}


@of("llava_two_stage")
def test_what_is_not_given_depends_on_the_stage(case):
    """The rest of it is compared with the page's table, in test_llava_two_stage.py."""
    for stage, files in BEGINNINGS.items():
        settings, training = case.module.parse(["--use_cpu", "--stage", stage])
        assert (settings.model_name_or_path, training.output_dir, settings.dataset_name) == files
        assert settings.vision_learning_rate == 0
    settings, training = case.parse(lora_r=4, learning_rate=1e-5)
    assert (settings.lora_alpha, training.as_given["lora_alpha"], training.learning_rate) == (8, None, 1e-5)


@of("llava_two_stage")
def test_a_whole_model_and_parts_are_two_beginnings(case, tmp_path):
    whole = case.folder / "align"
    parts = {"vision_tower": case.folder / "vision", "language_model": case.folder / "language"}
    parts["pretrain_mm_mlp_adapter"] = tmp_path / "mm_projector.bin"
    free = dict.fromkeys(parts)
    for stage in ("align", "instruct"):
        for flag, path in parts.items():
            message = case.refusal(case.flags(stage=stage, **{**free, "model_name_or_path": whole, flag: path}))
            assert message.startswith(f"error: --{flag}: for joining two models, and {whole} is a LLaVA already")
            assert "to join give --pretrain_mm_mlp_adapter and no --model_name_or_path" in message


@of("llava_two_stage")
def test_the_result_does_not_overwrite_what_it_begins_with(case, tmp_path):
    """A folder above it would be cleared as well: old checkpoints are deleted."""
    folder, whole = case.folder, case.folder / "align"
    (tmp_path / "link").symlink_to(whole)
    cases = [(ALIGN, flag, folder / flag.split("_")[0]) for flag in ("vision_tower", "language_model")]
    for out in (whole, f"{whole}/", tmp_path / "link", folder):
        cases += [({**stage, "model_name_or_path": whole}, "model_name_or_path", out) for stage in (ALIGN, {})]
        cases.append(({"pretrain_mm_mlp_adapter": whole}, "pretrain_mm_mlp_adapter", out))
    for settings, flag, out in cases:
        message = case.refusal(case.flags(output_dir=out, **settings))
        assert re.match(rf"error: --output_dir .* would overwrite --{flag}: choose another$", message), message


# ------------------------------------------------------------------------------------------------ models, processors
def changed(source, target, change):
    """A copy of a folder, with values of its config.json or something else changed."""
    shutil.copytree(source, target)
    if callable(change):
        change(target)
    else:
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | change))
    return target


def without(*patterns):
    return lambda folder: [path.unlink() for pattern in patterns for path in folder.glob(pattern)]


def with_text(name, text):
    return lambda folder: (folder / name).write_text(text)


def model_of(case):
    """The folder of the model that the recipe begins with."""
    return case.folder / ("align" if case.name == "llava_two_stage" else "model")


CONFIGS = ["", "{", "[]", "5", "\x00", "{}", '{"model_type": "of_tomorrow"}']
DAMAGES = [*(with_text("config.json", text) for text in CONFIGS), without("config.json")]
DAMAGES += [without("*processor*", "*token*"), with_text("tokenizer_config.json", "{")]


@of(*NAMES, MINICPM_26)
def test_a_model_with_a_file_that_is_damaged_or_missing_is_one_message(case, flags, tmp_path):
    for number, damage in enumerate(DAMAGES):
        model = changed(model_of(case), tmp_path / str(number), damage)
        message = case.refusal(flags(model_name_or_path=model))
        assert str(model) in message and "\n" not in message, (number, message)


def test_what_is_no_model_is_named(case, flags, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "nobody/nothing"}')
    hub_id, nowhere = "is no folder|no such folder here", "is no folder|there is no such file or folder"
    names = {tmp_path / "nowhere": nowhere, tmp_path / "adapter": "", "nowhere": hub_id, "nobody/nothing": hub_id}
    for name, expected in names.items():
        message = case.refusal(flags(model_name_or_path=name))
        assert str(name) in message and re.search(expected, message) and "\n" not in message, message


def saved(make, template=None, lacks=None):
    """What writes a tiny processor with this template, or with none, and without this file."""

    def write(folder):
        processor = make()
        processor.chat_template = template
        processor.save_pretrained(folder)
        if lacks is not None:
            (folder / lacks).unlink()

    return write


MAKERS = {"sft_llava": llava.processor, "idefics2_docvqa": idefics2.processor, "dpo_idefics2": preferences.processor}
NEEDED = {  # what the message says of a processor of another kind
    "sft_llava": "this needs a model for images and text, with a chat template",
    "idefics2_docvqa": "this needs an Idefics2Processor whose chat template.*<end_of_utterance>",
    "dpo_idefics2": "(this needs the processor of a model of images and text|without a chat template)",
}
CANNOT = "its processor or chat template cannot make a row"
OF_TEXTS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
RAISES, OF_IDEFICS2 = "{{ raise_exception('no roles') }}", idefics2.CHAT_TEMPLATE
PROCESSORS = {  # how one is written that only this recipe refuses, what the message says beside the folder
    "sft_llava": [],
    "idefics2_docvqa": [
        (saved(llava.processor, OF_IDEFICS2), f"LlavaProcessor.; {NEEDED['idefics2_docvqa']}"),
        (saved(idefics2.processor, llava.CHAT_TEMPLATE), f"Idefics2Processor.; {NEEDED['idefics2_docvqa']}"),
    ],
    "dpo_idefics2": [
        (saved(preferences.processor, OF_TEXTS), "whatever the rows: answer not ended: "),
        (saved(preferences.processor, RAISES), "its chat template does not fit this recipe: TemplateError: no roles"),
        (saved(preferences.processor, OF_IDEFICS2, "tokenizer_config.json"), "eos_token.*tokenizer_config.json"),
        (saved(preferences.processor, OF_IDEFICS2, "tokenizer.json"), "whatever the rows: equal answers: "),
    ],
}


@of(*MAKERS)
def test_a_processor_of_another_model_is_refused(case, flags, tmp_path):
    whole = MAKERS[case.name]()
    parts = [(saved(MAKERS[case.name]), type(whole).__name__)]
    parts.append((whole.image_processor.save_pretrained, "ImageProcessor"))
    parts.append((whole.tokenizer.save_pretrained, "Tokenizer"))
    cases = [(create, f"{kind}.*{NEEDED[case.name]}") for create, kind in parts]
    for number, (create, expected) in enumerate(cases + PROCESSORS[case.name]):
        create(folder := tmp_path / str(number))
        message = case.refusal(flags(model_name_or_path=folder))
        assert re.search(expected, message) and str(folder) in message, (number, message)


@of("idefics2_docvqa", "dpo_idefics2")
def test_longest_edge_has_the_bounds_of_the_processor(case, tmp_path):
    idefics2.processor(preferences.tokenizer(), height=378, width=980).save_pretrained(tmp_path / "model")
    for edge in (-378, 0, 1, 377, 981, 5000):
        message = case.refusal(case.flags(longest_edge=edge, model_name_or_path=tmp_path / "model"))
        assert re.search(f"--longest_edge {edge}: .* 378 to 980 pixels", message), message
    for edge in (378, 980):
        case.module.load_processor(case.parse(longest_edge=edge, model_name_or_path=tmp_path / "model")[0])


@of("dpo_idefics2 tiny_llava", "dpo_idefics2 tiny_next", "dpo_idefics2 tiny_paligemma")
def test_longest_edge_is_not_for_other_families(case, flags):
    message = case.refusal(flags(longest_edge=336))
    assert "--longest_edge is for Idefics2; other models have a size of their own" in message
    case.module.load_processor(case.parse()[0])


@of("dpo_idefics2", "dpo_idefics2 tiny_paligemma2")
def test_without_a_limit_rows_are_longer_than_a_sliding_window(case, flags, tmp_path):
    """Of other limits: test_dpo_shared_prompt.py."""
    text_config = json.loads((model_of(case) / "config.json").read_text())["text_config"]
    model = changed(model_of(case), tmp_path / "model", {"text_config": text_config | {"sliding_window": 100}})
    unlimited = flags(model_name_or_path=model, max_length="none")
    assert re.search("--max_length None: .* sliding window of 100 tokens", case.refusal(unlimited))
    with pytest.raises(Loaded):
        case.refusal([*unlimited, "--shared_prompt", "false"])


# --------------------------------------------------------------------------------------------------------- templates
WORDS = "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
NO_SPACE = "{% for m in messages %}" + WORDS + "{{ END if m.role == 'assistant' }}{% endfor %}"
ROWS_THAT_MELT = {  # where no space is between prompt and answer: a good row, one whose answer changes the prompt
    "sft_llava": (said("Which digit", "?"), said("Which di", "git")),
    "idefics2_docvqa": (asks("What is the", "?"), asks("What is t", "?", "he total")),
    "dpo_idefics2": (prefers("Which digit", "?", "!"), prefers("Which di", "?", "git is this?")),
}


@of(*ROWS_THAT_MELT)
def test_a_prompt_that_the_answer_changes_is_refused(case, write, images, tmp_path):
    """Two of the reader's tokens may be one token to the tokenizer."""
    images(1)
    end = "</s>" if case.name == "sft_llava" else "<end_of_utterance>"
    saved(MAKERS[case.name], NO_SPACE.replace("END", repr(end)))(tmp_path / "model")
    shutil.copy(model_of(case) / "config.json", tmp_path / "model")
    more = {"instruction": ""} if case.name == "idefics2_docvqa" else {}
    argv = case.flags_for(write(ROWS_THAT_MELT[case.name]), model_name_or_path=tmp_path / "model", **more)
    expected = r"1 of 2 rows(?s:.*)\n  row 1: prompt changed: .*first characters.*change .*tokens"
    assert re.search(expected, case.refusal(argv))


UNFIT = {  # templates that do not go on from a question to an answer, what the message says
    "{% for m in messages if m.role == 'user' %}" + WORDS + "{% endfor %}": "text left out: .*'seven'",
    "{% for m in messages %}" + WORDS + "{% endfor %}{% if add_generation_prompt %} ANSWER:{% endif %}": (
        "prompt changed: .* the prompt has ' ANSWER:', the row 'seven'"
    ),
}


@of("dpo_idefics2")
def test_a_template_that_does_not_go_on_to_the_answer_is_refused(case, flags, tmp_path):
    for number, (template, expected) in enumerate(UNFIT.items()):
        saved(preferences.processor, template)(tmp_path / str(number))
        message = case.refusal(flags(model_name_or_path=tmp_path / str(number)))
        assert re.search(f"/{number}: .*does not fit this recipe, whatever the rows: {expected}", message), message


# A template that, as Mistral's does, raises where the turns do not take turns; and ends answers itself.
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}" + WORDS + "</s>{% endfor %}"
)


@of("sft_llava")
def test_an_order_of_turns_that_the_template_refuses_is_a_bad_row(case, write, tmp_path):
    saved(llava.processor, ALTERNATING)(tmp_path / "model")
    shutil.copy(model_of(case) / "config.json", tmp_path / "model")
    good = said("Which digit comes after two?", "three")
    two_answers = {"conversations": [{"from": role, "value": "three"} for role in ("human", "gpt", "gpt")]}
    message = case.refusal(case.flags_for(write([good, two_answers]), model_name_or_path=tmp_path / "model"))
    assert re.search(r"\n  row 1: order of turns: .*Conversation roles must alternate", message), message


@of(MINICPM)
def test_a_header_of_answers_that_is_not_that_of_inference_is_refused(case, write, tmp_path):
    old, new = "</think>\\n\\n'", "</think>\\n\\n '"
    assert old in minicpm.CHAT_TEMPLATE
    processor = minicpm.processor()
    processor.chat_template = processor.tokenizer.chat_template = minicpm.CHAT_TEMPLATE.replace(old, new)
    model = changed(model_of(case), tmp_path / "model", processor.save_pretrained)
    message = case.refusal(case.flags_for(write([talks("q", "seven", image=None)]), model_name_or_path=model))
    assert re.search("whatever the rows: prompt changed: the answer begins .*, and must begin", message)


# ----------------------------------------------------------------------------------------------- MiniCPM-V's versions
REFUSED = "this recipe was tested with MiniCPM-V 4.6, 4.7 and 2.6, and refuses other versions"
VERSIONS = [  # config.json, what the message says
    ({"model_type": "minicpmv"}, "is minicpmv"),  # 2.5
    ({"model_type": "minicpmv", "version": "4.0"}, "is minicpmv 4.0"),
    ({"model_type": "minicpmo", "version": "2.6"}, "is minicpmo 2.6"),
    ({"hidden_size": 5}, "has no config.json that names a model_type"),
]


@pytest.fixture
def no_questions(monkeypatch):
    """Transformers would ask on the terminal whether to run a model's code."""
    monkeypatch.setattr(builtins, "input", lambda *args: pytest.fail("a question on the terminal"))


@of(MINICPM)
def test_other_versions_are_refused_by_name_before_their_code_runs(case, tmp_path, no_questions):
    (model := tmp_path / "model").mkdir()
    (model / "trap.py").write_text(f"import pathlib\npathlib.Path(r'{tmp_path / 'ran'}').touch()\n")
    for config, expected in VERSIONS:
        code = {"auto_map": {"AutoConfig": "trap.Config", "AutoModel": "trap.Model"}}
        (model / "config.json").write_text(json.dumps(config | code))
        for trust in (False, True):
            message = case.refusal(case.flags(model_name_or_path=model, trust_remote_code=trust))
            assert message == f"error: {model} {expected}: {REFUSED}" and not (tmp_path / "ran").exists()


@of(MINICPM_26)
def test_the_code_of_26_runs_only_where_that_is_asked_for(case, tmp_path, no_questions):
    expected = "brings code of its own that runs on this machine.*--model_revision.*--trust_remote_code"
    assert_refused(case, [({"trust_remote_code": trust}, expected) for trust in (None, False)])
    no_4x = "error: --downsample_mode 4x: 2.6 does not know it; 4.6 and 4.7 do"
    assert_refused(case, [({"downsample_mode": "4x", "trust_remote_code": trust}, no_4x) for trust in (True, False)])
    code = model_of(case) / "configuration_minicpm.py"
    wants_more = with_text(code.name, f"import nowhere_at_all\n{code.read_text()}")
    model = changed(model_of(case), tmp_path / "model", wants_more)
    expected = "--model_name_or_path .*nowhere_at_all. Run `pip install nowhere_at_all`"
    assert_refused(case, [({"model_name_or_path": model}, expected)])


@of(MINICPM, MINICPM_26)
def test_a_minicpm_with_the_processor_of_another_model_is_refused(case, flags, tmp_path):
    model = changed(model_of(case), tmp_path / "model", idefics2.processor().save_pretrained)
    expected = f"{model} has a Idefics2Processor; this needs the processor of MiniCPM-V"
    assert expected in case.refusal(flags(model_name_or_path=model))


# ----------------------------------------------------------------------------------------------------------- weights
@of(*NAMES, *EVERY_MINICPM[1:])
def test_damaged_weights_are_one_message(case, flags, tmp_path):
    whole = (model_of(case) / "model.safetensors").read_bytes()
    in_4bit = "q_lora" if "minicpm" in case.name else "load_in_4bit"
    for number, damaged in enumerate((whole[:-99], b"", None)):
        model = changed(model_of(case), tmp_path / str(number), without("model.safetensors"))
        if damaged is not None:
            (model / "model.safetensors").write_bytes(damaged)
        more = {} if case.name == "llava_two_stage" else {in_4bit: number == 2}
        message = end_of(case, flags(model_name_or_path=model, **more))
        assert message.startswith(f"error: cannot load the weights of {model}") and "\n" not in message


def lacking(text):
    """What leaves out the weights of a model with this in their names."""

    def change(folder):
        weights = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in weights.items() if text not in name}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return change


WEIGHTS = [  # of which model, how to spoil it, what the message says
    ("align", lacking("multi_modal_projector"), r"lacks 4 weights of a Llava\w+: model\.multi_modal_projector\.lin"),
    ("vision", lacking("layers.1."), "lacks 16 weights of a CLIPVisionModel: "),
    ("language", lacking("layers.1.mlp"), r"lacks 3 weights of a LlamaForCausalLM: model\.layers\.1\.mlp"),
]
FLAGS = {"align": "model_name_or_path", "vision": "vision_tower", "language": "language_model"}


@of("llava_two_stage")
def test_weights_that_are_missing_are_not_made_up(case, tmp_path):
    """from_pretrained would only warn."""
    for number, (kind, spoil, expected) in enumerate(WEIGHTS):
        model = changed(case.folder / kind, tmp_path / str(number), spoil)
        stage = "instruct" if kind == "align" else "align"
        message = end_of(case, case.flags(stage=stage, **{FLAGS[kind]: model}))
        assert re.search(f"^error: cannot load the weights of .*{model}.*{expected}", message), message


# -------------------------------------------------------------------------------------------- parts of llava_two_stage
def with_image_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>", "<x>"])
    tokenizer.save_pretrained(folder)


def no_eos(folder):
    own = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**own, "eos_token": None}))


PARTS = [  # of which model, how to spoil it, what the message says
    ("language", GPT2Config().save_pretrained, "its language model is gpt2; this recipe takes llama, mistral"),
    ("language", with_image_token, "has a token <image>; take a plain"),
    ("language", no_eos, "its tokenizer has no EOS to end an answer"),
    ("language", without("tokenizer*"), "no processor: "),
    ("vision", SiglipConfig().save_pretrained, "its vision encoder is siglip; this recipe takes clip_vision_model"),
    ("align", {"vision_feature_layer": [-2, -1]}, "takes features from several layers, not one"),
    ("align", {"model_type": "llava_next"}, "is llava_next, not a LLaVA"),
]


@of("llava_two_stage")
def test_models_that_cannot_be_taken_or_joined_are_named(case, tmp_path):
    for number, (part, spoil, expected) in enumerate(PARTS):
        model = changed(case.folder / part, tmp_path / str(number), spoil)
        stage = "instruct" if part == "align" else "align"
        message = case.refusal(case.flags(stage=stage, **{FLAGS[part]: model}))
        assert str(model) in message and re.search(expected, message) and "\n" not in message, message
    assert_refused(case, [({"model_name_or_path": case.folder / "language"}, "is llama, not a LLaVA")])


@of("llava_two_stage")
def test_a_beginning_that_is_not_there_is_named_with_its_flag(case, tmp_path, monkeypatch):
    """As where stage 1 has not been run."""
    monkeypatch.chdir(tmp_path)
    nowhere = "--{} {} is no folder with a model .as --stage align makes one., nor a hub id: "
    for flag in FLAGS.values():
        assert_refused(case, [({**ALIGN, flag: "no/where"}, nowhere.format(flag, "no/where"))])
    assert_refused(case, [({"model_name_or_path": None}, nowhere.format("model_name_or_path", "llava-align"))])


FIT = r"does not fit: it has .*{}.*\(--vision_tower, --language_model\) it must have "
NONE = "there is no projector in it; stage 1's output_dir or an mm_projector.bin is needed"
PICKLE = "it is empty, damaged, or a pickle that holds more than weights"
FIRST, LAST, THIRD = "mm_projector.linear_1.weight", "mm_projector.linear_2.bias", "mm_projector.4.weight"
PROJECTORS = [  # what is made of the right one, what the message says
    (lambda own: {**own, FIRST: torch.zeros(128, 64)}, FIT.format(r"linear_1.weight': \(128, 64\)")),
    (lambda own: {name: value for name, value in own.items() if name != LAST}, FIT.format("")),
    (lambda own: {**own, THIRD: torch.eye(128)}, FIT.format(r"4.weight': \(128")),
    (lambda own: {"state_dict": own}, NONE),
    (lambda own: own[FIRST], NONE),
    (lambda own: torch.nn.Linear(2, 2), PICKLE),
]


@of("llava_two_stage")
def test_a_projector_that_does_not_fit_is_named(case, tmp_path):
    path = tmp_path / "mm_projector.bin"

    def refused(path, expected):
        message = case.refusal(case.flags(pretrain_mm_mlp_adapter=path))
        assert message.startswith(f"error: --pretrain_mm_mlp_adapter {path}") and "\n" not in message
        assert re.search(expected, message), message

    weights = load_file(case.folder / "align" / "model.safetensors")
    own = {f"mm_{name.partition('multi_modal_')[2]}": weights[name] for name in weights if "projector" in name}
    for make, expected in PROJECTORS:
        torch.save(make(own), path)
        refused(path, expected)
    torch.save(own, path)
    whole = path.read_bytes()
    for content, expected in ((whole[:-500], "corrupted"), (b"", PICKLE)):
        path.write_bytes(content)
        refused(path, expected)
    damaged = changed(case.folder / "align", tmp_path / "model", with_text("model.safetensors", "\0" * 64))
    refused(damaged, "header")
    refused(case.folder / "language", NONE)
    refused(tmp_path / "nowhere.bin", "No such file")


# --------------------------------------------------------------------------------------------- adapters of a MiniCPM-V
@of(MINICPM)
def test_a_damaged_adapter_is_one_message(case, flags, tmp_path):
    """Of others: test_training.py."""
    settings, training = case.parse(lora_r=4, lora_alpha=4)
    model = case.module.load_model(settings, training)
    case.module.add_adapter(model, settings, case.module.lora_config(settings)).save_pretrained(tmp_path / "whole")
    weights = "adapter_model.safetensors"
    for number, spoil in enumerate((without(weights), with_text(weights, "\0" * 64))):
        damaged = changed(tmp_path / "whole", tmp_path / str(number), spoil)
        message = end_of(case, flags(lora_weight_path=damaged, lora_r=4, lora_alpha=4))
        assert message.startswith(f"error: --lora_weight_path {damaged}"), message
    message = end_of(case, flags(lora_weight_path=tmp_path / "whole", lora_r=4, lora_alpha=4, lora_dropout=0))
    assert "has lora_dropout 0.05, not 0.0: give the flags that it was trained with" in message


@of(*EVERY_MINICPM)
def test_modules_that_are_missing_frozen_or_trained_in_full_take_no_adapter(case, flags):
    """PEFT would pass over them, or save what never changes."""
    is_26 = case.folder.name.startswith("tiny_minicpm26")
    vision, merger = ("vpm", "resampler") if is_26 else ("model.vision_tower", "model.merger")
    no_layer, both = "--lora_target_modules .*: no such linear layer", ["q_proj", "up_proj"]
    no_module = "--lora_modules_to_save {}: no such module outside of the frozen parts {}"
    both_frozen = re.escape(str([vision, merger]))
    cases = [
        ({"lora_target_modules": [".*q_proj", ".*k_proj"]}, no_layer),  # names: there is more than one
        ({"lora_modules_to_save": "mlp", "lora_target_modules": both}, ".*mlp.up_proj.* is in mlp, which is trained"),
        ({"lora_modules_to_save": "embed_token"}, no_module.format("embed_token", "")),
        ({"lora_modules_to_save": "patch_embedding"}, no_module.format("patch_embedding", re.escape(str([vision])))),
        ({"lora_modules_to_save": merger, "projector_learning_rate": 0}, no_module.format(merger, both_frozen)),
    ]
    for settings, expected in cases:
        assert re.match(f"error: .*{expected}", end_of(case, flags(**settings))), settings
