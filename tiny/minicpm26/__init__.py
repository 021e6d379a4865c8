"""A stand-in for MiniCPM-V 2.6, whose code is not in transformers but comes with its weights, and was written for
transformers 4.

`build` writes a model directory with random weights and, beside them, the code in `hub`: other code than the
original's, with the same classes, interface and names of weights, and with what is broken in the original under
today's transformers. It loads with trust_remote_code, but only after repairs: they are what it is there to test.
"""

import contextlib
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from .. import llava
from .hub.configuration_minicpm import MiniCPMVConfig
from .hub.image_processing_minicpmv import MiniCPMVImageProcessor
from .hub.processing_minicpmv import MiniCPMVProcessor
from .hub.tokenization_minicpmv_fast import MiniCPMVTokenizerFast

QUERIES, SIZE, PATCH = 8, 56, 14  # image tokens of a slice; its side in pixels
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
SPECIAL += [
    f"<{end}{name}>" for name in ("image", "ref", "box", "quad", "point", "slice", "image_id") for end in ("", "/")
]
# Qwen2's, with a system prompt of its own where there is none.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@contextlib.contextmanager
def importable():
    """Within it the code of the model can be imported: it wants torchvision and a name that torch does not have."""
    stub = {} if "torchvision" in sys.modules else {"torchvision": ModuleType("torchvision")}
    sys.modules.update(stub)
    try:
        with patch.object(torch.nn.functional, "List", list, create=True):
            yield
    finally:
        for name in stub:
            del sys.modules[name]


def tokenizer(texts: list[str] | None = None) -> MiniCPMVTokenizerFast:
    """Qwen2's tokenizer (byte-level BPE, in which "!" is token 0), trained here on `texts`: without any, on all that
    is said of digits in `llava`."""
    if texts is None:
        said = [llava.counting(a) for a in range(10)] + [
            x for a in range(10) for x in llava.captions(a) + llava.captions(a, 9 - a)
        ]
        asked = [q.format(word) for some in llava.QUESTIONS.values() for q in some for word in llava.WORDS]
        texts = [text for pair in said for text in pair] + asked
    texts = [f"{role}\n{text}" for text in texts for role in ("user", "assistant")] + [
        "system\nYou are a helpful assistant.",
        "\n\n",
    ] * 10
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = MiniCPMVTokenizerFast().backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False))
    bpe = json.loads(bpe.to_str())["model"]
    end, start, stop, unknown = SPECIAL[:4]
    tok = MiniCPMVTokenizerFast(
        vocab=bpe["vocab"] | {token: len(bpe["vocab"]) + n for n, token in enumerate(SPECIAL)},
        merges=[tuple(pair) for pair in bpe["merges"]],
        extra_special_tokens=SPECIAL[4:],
        **{"bos_token": start, "eos_token": stop, "pad_token": end, "unk_token": unknown},
    )
    tok.chat_template = CHAT_TEMPLATE
    return tok


def processor(tok: MiniCPMVTokenizerFast | None = None) -> MiniCPMVProcessor:
    """Pictures of more than 56 x 56 pixels are cut into up to 9 slices, 8 tokens each."""
    images = MiniCPMVImageProcessor(
        scale_resolution=SIZE,
        patch_size=PATCH,
        image_feature_size=QUERIES,
        use_image_id=True,
        slice_mode=True,
        version=2.6,
    )
    return MiniCPMVProcessor(images, tok or tokenizer())


def model(tok: MiniCPMVTokenizerFast, seed: int = 0, hidden: int = 128):
    """A random model in float32: 2 vision layers, 8 queries, 2 Qwen2 layers with grouped queries. The language model's
    width is a multiple of 128, the resampler's head."""
    with importable():
        code = importlib.import_module(".hub.modeling_minicpmv", __name__)
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MiniCPMVConfig(
        vocab_size=len(tok),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        initializer_range=0.1,  # about 1 / sqrt(128): far below, it does not learn to tell pictures apart
        query_num=QUERIES,
        image_size=SIZE,
        drop_vision_last_layer=False,
        slice_config={"max_slice_nums": 9, "patch_size": PATCH, "scale_resolution": SIZE},
        vision_config={**vision, "image_size": 2 * SIZE, "patch_size": PATCH},
        version=2.6,
        bos_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = code.MiniCPMV(config)
        with torch.no_grad():  # they start as zeros, which makes every query the same image token for ever
            net.resampler.query.normal_(std=0.5)
            net.vpm.embeddings.position_embedding.weight.normal_(std=0.5)
    return net.eval()


def build(out: Path, seed: int = 0) -> None:
    """Write out/model: weights, processor and code."""
    proc = processor()
    net = model(proc.tokenizer, seed)
    auto_classes = {
        MiniCPMVConfig: "AutoConfig",
        type(net): "AutoModel",
        MiniCPMVProcessor: "AutoProcessor",
        MiniCPMVImageProcessor: "AutoImageProcessor",
        MiniCPMVTokenizerFast: "AutoTokenizer",
    }
    for kind, auto in auto_classes.items():
        kind.register_for_auto_class(auto)  # saves its code too
    net.save_pretrained(out / "model")
    proc.save_pretrained(out / "model")
