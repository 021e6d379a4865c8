"""What the tests share: tiny models and data made on the spot, settings from flags, pictures, rows on disk."""

import contextlib
import functools
import gc
import io
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = tempfile.mkdtemp(prefix="datasets-")  # nothing is left in the user's own cache, nothing is taken from it
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=CACHE, HF_MODULES_CACHE=f"{CACHE}/modules", TOKENIZERS_PARALLELISM="false"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads are slower at this size
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process whose autograd has met a GPU could not be forked
sys.path.insert(0, str(ROOT))

import json  # noqa: E402

import pytest  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from recipes import (  # noqa: E402, F401
    FOLDERS,
    NAMES,
    Loaded,
    Recipe,
    asks,
    chat,
    load_data,
    minicpm_run,
    prefers,
    said,
    short_run,
    talks,
    two_stage_run,
)
from transformers import (  # noqa: E402
    GemmaTokenizer,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    TrainerCallback,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil  # noqa: E402

import idefics2_docvqa  # noqa: E402
import llava_two_stage  # noqa: E402
import sft_llava  # noqa: E402
from tiny import forms, idefics2, llava, minicpm, minicpm26, preferences, two_stage  # noqa: E402
from tools import inspect_recipe  # noqa: E402

torch.set_num_threads(1)
COLOURS = ["red", "lime", "blue", "yellow", "black"]


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory):
    """A folder as `python -m tiny llava` writes it: model/ (random weights), 96 rows to train on and 24 to test on in
    data/*.parquet and json/*.json."""
    out = tmp_path_factory.mktemp("tiny_llava")
    processor = llava.processor()
    llava.model(processor.tokenizer).save_pretrained(out / "model")
    processor.save_pretrained(out / "model")
    for name, n in (("train", 96), ("test", 24)):
        llava.write_data(out, name, llava.make_rows(0, train=name == "train", n=n))
    return out


@pytest.fixture(scope="session")
def tiny_next(tmp_path_factory):
    """A folder with model/, a LLaVA-NeXT with random weights."""
    out = tmp_path_factory.mktemp("tiny_next")
    llava.build_next(out)
    return out


@pytest.fixture(scope="session")
def tiny_forms(tmp_path_factory):
    """A folder as `python -m tiny idefics2` writes it: model/ (random weights), 96 rows to train on and 24 to test on
    in data/*.parquet and json/*.json."""
    out = tmp_path_factory.mktemp("tiny_forms")
    processor = idefics2.processor()
    idefics2.model(processor.tokenizer).save_pretrained(out / "model")
    processor.save_pretrained(out / "model")
    for name, n in (("train", 96), ("test", 24)):
        forms.write_data(out, name, forms.make_rows(0, train=name == "train", n=n))
    return out


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory):
    """A folder as `python -m tiny idefics2_dpo` writes it, without its amber/: model/ (random weights), 96 rows to
    train on and 24 to test on in data/*.parquet and json/*.json."""
    out = tmp_path_factory.mktemp("tiny_pairs")
    processor = preferences.processor()
    preferences.model(processor.tokenizer).save_pretrained(out / "model")
    processor.save_pretrained(out / "model")
    for name, n in (("train", 96), ("test", 24)):
        preferences.write_data(out, name, preferences.make_rows(0, train=name == "train", n=n))
    return out


def paligemma(out, text="gemma"):
    """Write out/model, a PaliGemma with random weights: its processor knows no chat template. With `text` gemma2 it is
    a PaliGemma 2, with a sliding window in every other layer."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    bpe.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=470, special_tokens=first, show_progress=False)
    sentences = [row[part] for row in preferences.make_rows(n=300) for part in ("question", "chosen", "rejected")]
    bpe.train_from_iterator(sentences, trainer)
    bpe = json.loads(bpe.to_str())["model"]
    images = SiglipImageProcessorPil(size={"height": 56, "width": 56}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(
        images, GemmaTokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]])
    )
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {
        "model_type": "siglip_vision_model",
        "image_size": 56,
        "patch_size": 14,
        "projection_dim": 128,
        "vision_use_head": False,
    }
    words = {"model_type": text, "vocab_size": len(processor.tokenizer), "num_key_value_heads": 1, "head_dim": 32}
    words |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "max_position_embeddings": 1024}
    config = PaliGemmaConfig(
        vision_config=size | vision,
        text_config=size | words | ({"sliding_window": 256, "query_pre_attn_scalar": 32} if text == "gemma2" else {}),
        projection_dim=128,
        hidden_size=128,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        vocab_size=len(processor.tokenizer),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        PaliGemmaForConditionalGeneration(config).save_pretrained(out / "model")
    processor.save_pretrained(out / "model")


@pytest.fixture(scope="session")
def tiny_paligemma(tmp_path_factory):
    """A folder with model/, a PaliGemma with random weights."""
    out = tmp_path_factory.mktemp("tiny_paligemma")
    paligemma(out)
    return out


@pytest.fixture(scope="session")
def tiny_paligemma2(tmp_path_factory):
    """A folder with model/, a PaliGemma 2 with random weights."""
    out = tmp_path_factory.mktemp("tiny_paligemma2")
    paligemma(out, "gemma2")
    return out


def minicpm_folder(out, family):
    """Write model/ (random weights) and 96 rows to train on and 24 to test on in json/*.json."""
    if family == "minicpm26":
        minicpm26.build(out)
    else:
        processor = minicpm.processor(family)
        minicpm.model(processor.tokenizer, family=family).save_pretrained(out / "model")
        processor.save_pretrained(out / "model")
    for name, n in (("train", 96), ("test", 24)):
        minicpm.write_data(out, name, minicpm.make_rows(0, train=name == "train", n=n))
    return out


@pytest.fixture(scope="session")
def tiny_minicpm(tmp_path_factory):
    """A folder as `python -m tiny minicpmv4_6` writes it: model/ (random weights), 96 rows to train on and 24 to test
    on in json/*.json."""
    return minicpm_folder(tmp_path_factory.mktemp("tiny_minicpm"), "minicpmv4_6")


@pytest.fixture(scope="session")
def tiny_minicpm47(tmp_path_factory):
    """The same of MiniCPM-V 4.7."""
    return minicpm_folder(tmp_path_factory.mktemp("tiny_minicpm47"), "minicpmv4_7")


@pytest.fixture(scope="session")
def tiny_minicpm26(tmp_path_factory):
    """The same of the stand-in for MiniCPM-V 2.6, which needs --trust_remote_code."""
    return minicpm_folder(tmp_path_factory.mktemp("tiny_minicpm26"), "minicpm26")


@pytest.fixture(scope="session", params=["tiny_minicpm", "tiny_minicpm47"])
def native_minicpm(request):
    """MiniCPM-V 4.6, then 4.7."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", params=["tiny_minicpm", "tiny_minicpm47", "tiny_minicpm26"])
def every_minicpm(request):
    """Each of these in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory):
    """A folder as `python -m tiny llava_two_stage` writes it: vision/ and language/ (random weights), in json/*.json
    96 captions and 96 conversations to train on, and 24 of each to test on. And align/, what the first stage made of
    the two in three steps."""
    out = tmp_path_factory.mktemp("tiny_parts")
    tokenizer = two_stage.tokenizer()
    two_stage.save(out, two_stage.vision(), tokenizer, two_stage.language(tokenizer))
    for name, n in (("train", 96), ("test", 24)):
        two_stage.write_data(out, name, two_stage.make_rows(0, train=name == "train", n=n))
        captions = "captions" if name == "train" else "captions-test"
        two_stage.write_data(out, captions, two_stage.make_captions(0, train=name == "train", n=n))
    llava_two_stage.main(two_stage_run(out, out / "align", max_steps=3, eval_fraction=0, save_strategy="no"))
    return out


@pytest.fixture(scope="session")
def learnt(tiny_forms, tmp_path_factory):
    """A folder with model/, a tiny Idefics2 whose random weights are as large as their width asks for, so that it
    learns fast; run/, what the recipe made of it: it knows the answers to 16 forms by heart; train.json, these,
    held_out.json, the same and 3 that it never saw, and images/."""
    out = tmp_path_factory.mktemp("learnt")
    processor = idefics2.processor()
    model = idefics2.model(processor.tokenizer)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.data *= 4  # from a deviation of 0.02 to 0.08, about 1 / sqrt(128)
    model.save_pretrained(out / "model")
    processor.save_pretrained(out / "model")
    shutil.copytree(tiny_forms / "json" / "images", out / "images")
    rows = json.loads((tiny_forms / "json" / "train.json").read_text())[:19]
    for name, some in (("train", rows[:16]), ("held_out", rows)):
        (out / f"{name}.json").write_text(json.dumps(some))
    settings = {
        "model_name_or_path": out / "model",
        "dataset_name": out / "train.json",
        "image_folder": out / "images",
    }
    settings |= {
        "eval_dataset_name": out / "held_out.json",
        "output_dir": out / "run",
        "load_in_4bit": False,
        "report_to": "none",
    }
    settings |= {
        "max_steps": 70,
        "eval_steps": 10,
        "save_steps": 10,
        "logging_steps": 10,
        "warmup_steps": 5,
        "lora_r": 32,
    }
    settings |= {
        "lora_alpha": 32,
        "lora_dropout": 0,
        "learning_rate": 5e-3,
        "dataloader_num_workers": 0,
        "use_cpu": True,
    }
    settings |= {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1}
    settings |= {"activation_checkpointing": False, "max_new_tokens": 8, "sample_rows": 19}
    idefics2_docvqa.main([part for name, value in settings.items() for part in (f"--{name}", str(value))])
    return out


@pytest.fixture
def flags(tiny_llava, tmp_path):
    """A function: settings as keywords -> the list of flags for a run of the tiny LLaVA on the CPU."""
    return functools.partial(short_run, tiny_llava, tmp_path / "out")


@pytest.fixture
def parse(flags):
    """A function: settings as keywords -> (settings, training), for a run of the tiny LLaVA on the CPU."""
    return lambda **settings: sft_llava.parse(flags(**settings))


@pytest.fixture
def collate(parse, tmp_path):
    """A function: settings as keywords -> a Collator; relative image paths start in tmp_path."""

    def make(**settings):
        settings, training = parse(**{"image_folder": tmp_path, **settings})
        return sft_llava.Collator(sft_llava.load_processor(settings), settings, training)

    return make


@pytest.fixture(params=NAMES)
def case(request, tmp_path):
    """Each recipe in turn, with its tiny model (recipes.Recipe)."""
    return Recipe(request.param, request.getfixturevalue(FOLDERS[request.param]), tmp_path)


@pytest.fixture
def images(tmp_path):
    """A function: n -> the names of n pictures, each of another colour, in tmp_path."""

    def make(n, size=(56, 56)):
        for colour in COLOURS[:n]:
            Image.new("RGB", size, colour).save(tmp_path / f"{colour}.png")
        return [f"{colour}.png" for colour in COLOURS[:n]]

    return make


@pytest.fixture
def odd_images(images, tmp_path):
    """Good pictures, red.png and lime.png, and those that are not, in tmp_path."""
    images(2)
    jpeg = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(jpeg, "JPEG")
    (tmp_path / "truncated.jpg").write_bytes(jpeg.getvalue()[:-500])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime", "blue")]
    for name in ("pages.tiff", "film.gif", "film.webp", "telephone.mpo"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    (tmp_path / "telephone.mpo").rename(tmp_path / "telephone.jpg")
    for name, value in (("nan", math.nan), ("inf", math.inf), ("negative", -1)):
        Image.new("F", (64, 64), value).save(tmp_path / f"{name}.tiff")
    os.mkfifo(tmp_path / "pipe")
    for name, size in (
        ("wide", (1000, 49)),
        ("high", (49, 1000)),
        ("dot", (1, 1)),
        ("line", (20, 1)),
        ("column", (1, 20)),
        ("large", (64, 64)),
    ):
        Image.new("RGB", size, "white").save(tmp_path / f"{name}.png")


@pytest.fixture
def write(tmp_path):
    """A function: rows, file name -> the path of a .json, .jsonl or .parquet file of them in tmp_path."""

    def make(rows, name="rows.json"):
        path = tmp_path / name
        if path.suffix == ".parquet":
            sft_llava.datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
        return path

    return make


@pytest.fixture(scope="module")
def quick_collections():
    """gc.collect() looks at what is made in this file only: with all that is imported it took longer than a run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def uncounted(monkeypatch):
    """Activations are not counted, which is what takes the time."""

    def sizes(trainer, rows, batch):
        return dict.fromkeys((True, False), (batch * 10**9, 10**9))

    monkeypatch.setattr(inspect_recipe, "measure", sizes)
    others = {inspect_recipe.OPTIMIZER: {"bytes": 0}}, None
    monkeypatch.setattr(inspect_recipe, "measure_others", lambda *args: others)


class Weights(TrainerCallback):
    """Copies what is trained, before the first step and after each."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.seen.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})

    on_step_end = on_train_begin


def log(out, key="loss"):
    """{step: value} of one metric of a finished run."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[key] for entry in history if key in entry}


def refusal(main, argv):
    """The one message that a recipe's main ends with."""
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stdout(io.StringIO()):
        main(argv)
    assert str(stopped.value.code).startswith("error: ") and "\n" not in stopped.value.code
    return stopped.value.code


def fresh(code, *args):
    """Run code in a new process, which ends well, and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
