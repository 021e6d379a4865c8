"""Tiny models of other families of vision-language models, with random weights, to test code with.

`build(name, out)` writes `out/model` as `save_pretrained` does, in about a second. The classes, the special tokens,
the chat template and the tokens that end an answer are those of the published models; sizes, words and weights are
not. Templates that TRL ships are the published ones; those written here are from memory of the published ones.

Pictures are best of 56 px or a little more. All widths are multiples of 64, bitsandbytes' 4-bit block.
"""

import functools
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GemmaTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Tokenizer,
)

from . import digits, llava
from . import idefics2 as digit_forms
from .digits import WORDS


class Family(NamedTuple):
    config: PreTrainedConfig
    processor: ProcessorMixin
    stops: list[str]
    """generation_config.json's eos_token_id, as tokens"""


# ---------------------------------------------------------------- chat templates


def published(name: str) -> str:
    """A chat template that TRL ships, as its model's authors published it."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


# OpenGVLab/InternVL3-1B-hf and its sizes
INTERNVL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# llava-hf/llava-onevision-qwen2-7b-ov-hf. Mind that an answer follows "assistant \n" in a row, and "assistant\n" when
# the model is asked.
ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# what transformers' conversion script for LLaVA-OneVision writes
ONEVISION_CONVERTED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# mistral-community/pixtral-12b. Mind that a system message stands before the last question.
PIXTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate user/assistant/user/...") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + system_message + "\n\n" }}
        {%- else %}
            {{- "[INST]" }}
        {%- endif %}
        {%- if message["content"] is not string %}
            {%- for chunk in message["content"] %}
                {%- if chunk["type"] == "text" %}
                    {{- chunk["text"] }}
                {%- elif chunk["type"] == "image" %}
                    {{- "[IMG]" }}
                {%- else %}
                    {{- raise_exception("Unrecognized content type!") }}
                {%- endif %}
            {%- endfor %}
        {%- else %}
            {{- message["content"] }}
        {%- endif %}
        {{- "[/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {%- if message["content"] is not string %}
            {{- message["content"][0]["text"] + eos_token }}
        {%- else %}
            {{- message["content"] + eos_token }}
        {%- endif %}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with an optional system message first") }}
    {%- endif %}
{%- endfor %}"""
# mistralai/Mistral-Small-3.1-24B-Instruct-2503 and 3.2, the default system message abridged. Mind the date in it.
MISTRAL = """\
{%- set today = strftime_now("%Y-%m-%d") %}
{%- set default_system_message = "You are Mistral Small 3. The current date is " + today + "." %}
{{- bos_token }}
{%- if messages[0]["role"] == "system" %}
    {%- if messages[0]["content"] is string %}
        {%- set system_message = messages[0]["content"] %}
    {%- else %}
        {%- set system_message = messages[0]["content"][0]["text"] %}
    {%- endif %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = default_system_message %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- "[SYSTEM_PROMPT]" + system_message + "[/SYSTEM_PROMPT]" }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if message["content"] is string %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" }}
            {%- for block in message["content"] %}
                {%- if block["type"] == "text" %}
                    {{- block["text"] }}
                {%- elif block["type"] in ["image", "image_url"] %}
                    {{- "[IMG]" }}
                {%- else %}
                    {{- raise_exception("Only text and image blocks are supported in message content!") }}
                {%- endif %}
            {%- endfor %}
            {{- "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {%- if message["content"] is string %}
            {{- message["content"] + eos_token }}
        {%- else %}
            {{- message["content"][0]["text"] + eos_token }}
        {%- endif %}
    {%- else %}
        {{- raise_exception("Only user, system and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}"""
# zai-org/GLM-4.1V-9B-Thinking. Mind that only the next turn's <|user|> ends an answer.
GLM4V = """\
[gMASK]<sop>
{%- for msg in messages %}
    {%- if msg.role == 'system' %}
<|system|>
{{ msg.content if msg.content is string else msg.content[0].text }}
    {%- elif msg.role == 'user' %}
<|user|>{{ '\\n' }}
        {%- if msg.content is string %}
{{ msg.content }}
        {%- else %}
            {%- for item in msg.content %}
                {%- if item.type == 'video' or 'video' in item %}
<|begin_of_video|><|video|><|end_of_video|>
                {%- elif item.type == 'image' or 'image' in item %}
<|begin_of_image|><|image|><|end_of_image|>
                {%- elif item.type == 'text' %}
{{ item.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
    {%- elif msg.role == 'assistant' %}
<|assistant|>
{{ msg.content if msg.content is string else msg.content[0].text }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
<|assistant|>
{% endif %}"""
# zai-org/GLM-4.6V, without tools and video. Mind what enable_thinking=False adds to every question, and that an empty
# thought stands in a row whether or not the model thinks.
GLM46V = """\
[gMASK]<sop>
{%- macro visible(content) -%}
    {%- if content is string -%}{{- content }}
    {%- else -%}
        {%- for item in content -%}
            {%- if item.type == 'image' or 'image' in item -%}<|begin_of_image|><|image|><|end_of_image|>
            {%- elif item.type == 'text' -%}{{- item.text }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last_user_index=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{% set ns.last_user_index = loop.index0 -%}{%- endif %}{%- endfor %}
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|user|>
{{ visible(m.content) }}
{{- '/nothink' if enable_thinking is defined and not enable_thinking and not visible(m.content).endswith("/nothink") }}
{%- elif m.role == 'assistant' -%}<|assistant|>
{%- set reasoning_content = '' %}
{%- set content = visible(m.content) %}
{%- if m.reasoning_content is string %}
    {%- set reasoning_content = m.reasoning_content %}
{%- elif '</think>' in content %}
    {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.last_user_index and reasoning_content -%}
{{ '\\n<think>' + reasoning_content.strip() + '</think>' }}
{%- else -%}
{{ '\\n<think></think>' }}
{%- endif -%}
{%- if content.strip() -%}
{{ '\\n' + content.strip() }}
{%- endif -%}
{%- elif m.role == 'system' -%}<|system|>
{{ visible(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>{{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- endif -%}"""
# CohereLabs/aya-vision-8b and command-a-vision, the preamble abridged; IMAGE stands for the family's own token.
# Mind <|END_RESPONSE|>, which stands before the token that ends a turn.
COHERE = """\
{{ bos_token }}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># System Preamble
{%- if messages[0].role == 'system' %}
{{ messages[0].content if messages[0].content is string else messages[0].content[0].text }}
{%- endif -%}
<|END_OF_TURN_TOKEN|>
{%- for message in messages -%}
{%- if message.role != 'system' -%}
<|START_OF_TURN_TOKEN|>{{ '<|USER_TOKEN|>' if message.role == 'user' else '<|CHATBOT_TOKEN|><|START_RESPONSE|>' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for item in message.content -%}
{%- if item.type == 'image' -%}IMAGE{%- elif item.type == 'text' -%}{{ item.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|END_RESPONSE|>' if message.role == 'assistant' }}<|END_OF_TURN_TOKEN|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{%- endif -%}"""
# meta-llama/Llama-3.2-11B-Vision-Instruct, without tools. Mind that a system message and pictures exclude each other.
MLLAMA = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}
        {%- set system_message = messages[0]['content'] | trim %}
    {%- else %}
        {%- set system_message = messages[0]['content'][0]['text'] | trim %}
    {%- endif %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- set image_ns = namespace(has_images=false) %}
{%- for message in messages %}
    {%- for content in message['content'] %}
        {%- if content['type'] == 'image' %}
            {%- set image_ns.has_images = true %}
        {%- endif %}
    {%- endfor %}
{%- endfor %}
{%- if image_ns.has_images and not system_message == "" %}
    {{- raise_exception("Prompting with images is incompatible with system messages.") }}
{%- endif %}
{%- if not image_ns.has_images %}
    {{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
    {{- "Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n" }}
    {{- system_message }}
    {{- "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for content in message['content'] %}
            {%- if content['type'] == 'image' %}
                {{- '<|image|>' }}
            {%- elif content['type'] == 'text' %}
                {{- content['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
# llava-hf/llama3-llava-next-8b-hf. Mind that an answer follows one newline in a row, two when the model is asked.
LLAVA_NEXT_LLAMA3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' + message['content'][0]['text'] + '<|eot_id|>' }}"
    "{% elif message['role'] == 'user' %}{{ '<|start_header_id|>user<|end_header_id|>\\n\\n' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ '<|eot_id|>' }}{% elif message['role'] == 'assistant' %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n' + message['content'][0]['text'] + '<|eot_id|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# thisisiron/Ovis2-1B-hf and its sizes
OVIS2 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# deepseek-community/deepseek-vl-1.3b-chat
DEEPSEEK_VL = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' }}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<image_placeholder>' }}{% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{{ '\\n\\n' }}{% else %}{{ 'Assistant: ' }}{% for content in message['content'] %}"
    "{{ content['text'] }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# rhymes-ai/Aria. Mind that <|im_end|>, which ends an answer, is not the tokenizer's EOS.
ARIA = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% elif message['content'] is iterable %}"
    "{% for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] }}"
    "{% elif item['type'] == 'image' %}<fim_prefix><|img|><fim_suffix>{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# LanguageBind/Video-LLaVA-7B-hf
VIDEO_LLAVA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# lkhl/VideoLLaMA3-2B-Image-HF
VIDEO_LLAMA3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<image>\\n' }}{% elif content['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# lightonai/LightOnOCR-1B-1025
LIGHTON = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<|image_pad|>' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# ---------------------------------------------------------------- tokenizers


@functools.cache
def pieces(byte_level: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE, trained on what `llava`'s rows say.

    Args:
        byte_level: GPT-2's kind, as Qwen's and Llama 3's; else SentencePiece's with byte fallback, as Gemma's.
    """
    lessons = [llava.counting(digit) for digit in range(10)]
    lessons += [lesson for digit in range(10) for lesson in llava.captions(digit) + llava.captions(digit, 9 - digit)]
    texts = [text for lesson in lessons for text in lesson]
    texts += [question.format(word) for asked in llava.QUESTIONS.values() for question in asked for word in WORDS]
    texts += ["assistant", "user", "system", "model", "\n\n", "User:", "Assistant:", "System:"] * 10
    if byte_level:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
        first, alphabet, size = [], sorted(pre_tokenizers.ByteLevel.alphabet()), 480
    else:
        bpe = Tokenizer(models.BPE(byte_fallback=True))
        spaces = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.Punctuation()])
        first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"] + [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet, size = ["\n"], 490
        texts += [f" {text}" for text in texts]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    trained = json.loads(bpe.to_str())["model"]
    return trained["vocab"], [tuple(pair) for pair in trained["merges"]]


def with_tokens(tok, special: list[str], plain: list[str]):
    """`tok` with these tokens added, each one token wherever it stands; decoding may skip only the special ones."""
    tok.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tok.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return tok


def qwen_tokenizer(plain: tuple[str, ...] = (), special: tuple[str, ...] = (), **named: str) -> Qwen2Tokenizer:
    """Qwen's: byte-level BPE without BOS; <|im_end|> ends a turn. `named` tokens are attributes of the tokenizer."""
    vocab, merges = pieces(byte_level=True)
    tok = Qwen2Tokenizer(
        vocab=vocab | {"<|endoftext|>": len(vocab)},
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=named,
        model_max_length=4096,
    )
    return with_tokens(tok, ["<|im_start|>", *special], list(plain))


def byte_tokenizer(special: list[str], plain: tuple[str, ...] = (), adds_bos: bool = False, **settings):
    """Byte-level BPE of no named class, as Llama 3's, SmolLM2's or GLM's. `adds_bos`: encoding puts BOS first.
    `settings`: of PreTrainedTokenizerFast."""
    vocab, merges = pieces(byte_level=True)
    bpe = Tokenizer(models.BPE(vocab, merges))
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=4096, **settings)
    tok = with_tokens(tok, special, list(plain))
    if adds_bos:
        bos = tok.bos_token
        add = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tok.bos_token_id)]
        )
        tok.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), add])
    return tok


def gemma_tokenizer(special: tuple[str, ...] = (), **named: str) -> GemmaTokenizer:
    """Gemma's: BPE with byte fallback, spaces as "▁", and a BOS that encoding puts first."""
    vocab, merges = pieces(byte_level=False)
    tok = GemmaTokenizer(
        vocab=vocab, merges=merges, extra_special_tokens=named, add_bos_token=True, model_max_length=4096
    )
    return with_tokens(tok, list(special), [])


# ---------------------------------------------------------------- parts


def vision(width: int = 64, **more) -> dict:
    """A vision tower's configuration: 2 layers, 16 patches in a picture of 56 px."""
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    } | more


def siglip(**more) -> dict:
    return vision(model_type="siglip_vision_model", vision_use_head=False, **more)


def text(tok, width: int = 64, **more) -> dict:
    """A language model's configuration: 2 layers that know the tokens of `tok`."""
    return {
        "vocab_size": len(tok),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
    } | more


def pil_images(name: str, module: str, **settings):
    """An image processor that works on PIL images, without torchvision."""
    where = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(where, f"{name}ImageProcessorPil")(**settings)


def area(side: int, least: int, most: int) -> dict[str, int]:
    """Qwen's and GLM's limits of a picture's area: from `least` to `most` squares of `side` px, a token each."""
    return {"shortest_edge": least * side**2, "longest_edge": most * side**2}


SQUARE = {"height": 56, "width": 56}

# ---------------------------------------------------------------- Qwen

QWEN_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
QWEN_TOKENS |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
QWEN_STOPS = ["<|im_end|>", "<|endoftext|>"]


def qwen_ids(tok) -> dict[str, int]:
    return {f"{name}_id": tok.convert_tokens_to_ids(token) for name, token in QWEN_TOKENS.items()}


def qwen_vision(width: int = 64, **more) -> dict:
    """2 layers; 4 patches become one token of the language model."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "out_hidden_size": width}
    return {"depth": 2, "num_heads": 4} | sizes | more


def qwen2_family(name: str, vision_config: dict) -> Family:
    """Qwen2-VL and Qwen2.5-VL: patches of 14 px."""
    tok = qwen_tokenizer(**QWEN_TOKENS)
    proc = getattr(transformers, f"{name}Processor")(
        pil_images("Qwen2VL", "qwen2_vl", size=area(28, 4, 64)),
        tok,
        transformers.Qwen2VLVideoProcessor(),
        chat_template=published("qwen2_5_vl"),  # Qwen2-VL's is the same
    )
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    config = getattr(transformers, f"{name}Config")(
        text_config=text(tok, rope_parameters=rope), vision_config=vision_config, **qwen_ids(tok)
    )
    return Family(config, proc, QWEN_STOPS)


def qwen2_vl() -> Family:
    return qwen2_family("Qwen2VL", {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2})


def qwen2_5_vl() -> Family:
    return qwen2_family("Qwen2_5_VL", qwen_vision(fullatt_block_indexes=[1], window_size=56))


def qwen3_family(name: str, template: str, width: int = 64, vision_config: dict | None = None, **words) -> Family:
    """Qwen3-VL and Qwen3.5: patches of 16 px. `words`: more of the language model's configuration."""
    tok = qwen_tokenizer(plain=("<think>", "</think>"), **QWEN_TOKENS)
    proc = transformers.Qwen3VLProcessor(
        pil_images("Qwen2VL", "qwen2_vl", patch_size=16, size=area(32, 4, 64)),
        tok,
        transformers.Qwen3VLVideoProcessor(),
        chat_template=published(template),
    )
    sections = {"mrope_section": [width // 16, width // 32, width // 32], "mrope_interleaved": True}
    rope = {"rope_type": "default", "rope_theta": 5e6} | sections | words.pop("rope", {})
    config = getattr(transformers, f"{name}Config")(
        text_config=text(tok, width, **{"head_dim": width // 4} | words, rope_parameters=rope),
        vision_config=qwen_vision(width, num_position_embeddings=64, **vision_config or {}),
        **qwen_ids(tok),
    )
    return Family(config, proc, QWEN_STOPS)


DEEPSTACK = {"depth": 3, "deepstack_visual_indexes": [0, 1]}
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
LINEAR = {  # every other layer is one of linear attention
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope": {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
}


def qwen3_vl(width: int = 64) -> Family:
    return qwen3_family("Qwen3VL", "qwen3_vl", width, DEEPSTACK)


def qwen3_vl_moe() -> Family:
    return qwen3_family("Qwen3VLMoe", "qwen3_vl", vision_config=DEEPSTACK, **EXPERTS)


def qwen3_5_moe() -> Family:
    experts = EXPERTS | {"shared_expert_intermediate_size": 64}
    return qwen3_family("Qwen3_5Moe", "qwen3_5_think", **LINEAR, **experts)


def qwen3_5() -> Family:
    """As Qwen3.5-2B and smaller: it does not think unless it is told to."""
    return qwen3_family("Qwen3_5", "qwen3_5_nothink", **LINEAR)


def qwen3_5_think() -> Family:
    """As Qwen3.5-4B and larger: it thinks unless it is told not to."""
    return qwen3_family("Qwen3_5", "qwen3_5_think", **LINEAR)


def qwen3_8() -> Family:
    """It thinks unless it is told not to, keeps its earlier thoughts, and is told how much to think."""
    return qwen3_family("Qwen3_5", "qwen3_8", **LINEAR)


# ---------------------------------------------------------------- Idefics3, SmolVLM


def idefics3_family(name: str, template: str, first: str, pad: str, tiles: int, width: int, video=()) -> Family:
    """Idefics3 and SmolVLM2: a picture is seen as a whole and in tiles of 56 px, 4 tokens each.

    Args:
        first: BOS, which the template writes.
        tiles: how many tiles the longer side of any picture is made of; 1: only the whole is seen.
    """
    named = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    named |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    is_smol = name == "SmolVLM"
    tok = byte_tokenizer(
        ["<|endoftext|>", *named.values(), *places],
        bos_token=first,
        eos_token="<end_of_utterance>" if is_smol else "<|end_of_text|>",
        pad_token=pad,
        adds_bos=not is_smol,
        extra_special_tokens=named,
    )
    proc = getattr(transformers, f"{name}Processor")(
        pil_images(name, name.lower(), size={"longest_edge": 56 * tiles}, max_image_size={"longest_edge": 56}),
        tok,
        *video,
        image_seq_len=4,
        chat_template=published(template),
    )
    config = getattr(transformers, f"{name}Config")(
        text_config=text(tok, width, model_type="llama"),
        vision_config=vision(width),
        image_token_id=proc.image_token_id,
        scale_factor=2,
        pad_token_id=tok.pad_token_id,
    )
    return Family(config, proc, ["<end_of_utterance>"] if is_smol else ["<|end_of_text|>", "<end_of_utterance>"])


def idefics3() -> Family:
    return idefics3_family("Idefics3", "idefics3", "<|begin_of_text|>", "<|end_of_text|>", tiles=2, width=64)


def smolvlm(width: int = 64, tiles: int = 2) -> Family:
    """SmolVLM2."""
    clip = {"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 56}}
    video = [transformers.SmolVLMVideoProcessor(video_sampling=clip)]
    return idefics3_family("SmolVLM", "smolvlm", "<|im_start|>", "<|im_end|>", tiles, width, video)


# ---------------------------------------------------------------- Google

GEMMA_TOKENS = ("<start_of_turn>", "<end_of_turn>")


def gemma3() -> Family:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tok = gemma_tokenizer(GEMMA_TOKENS, **named)
    proc = transformers.Gemma3Processor(
        pil_images("Gemma3", "gemma3", size=SQUARE), tok, image_seq_length=4, chat_template=published("gemma3")
    )
    layers = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.Gemma3Config(
        text_config=text(tok, head_dim=16, **layers),
        vision_config=vision(vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id,
        image_token_index=tok.image_token_id,
    )
    return Family(config, proc, ["<eos>", "<end_of_turn>"])


def gemma4() -> Family:
    """As Gemma 4 E2B: layers have embeddings of their own. It hears, too."""
    named = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    named |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    tok = gemma_tokenizer(
        ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|tool_response>", "<|video|>"), **named
    )
    proc = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        pil_images("Gemma4", "gemma4", patch_size=8, pooling_kernel_size=2, max_soft_tokens=70),
        tok,
        transformers.Gemma4VideoProcessor(),
        chat_template=published("gemma4_v5"),
        image_seq_length=16,
    )
    layers = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    layers |= {"hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": len(tok)}
    sight = {"patch_size": 8, "pooling_kernel_size": 2, "head_dim": 16, "num_key_value_heads": 4}
    config = transformers.Gemma4Config(
        text_config=text(tok, head_dim=16, global_head_dim=16, **layers),
        vision_config=vision(**sight, position_embedding_size=256),
        image_token_id=tok.image_token_id,
        boi_token_id=tok.boi_token_id,
        eoi_token_id=tok.eoi_token_id,
        video_token_id=tok.convert_tokens_to_ids("<|video|>"),
        audio_token_id=tok.audio_token_id,
    )
    return Family(config, proc, ["<eos>", "<turn|>", "<|tool_response>"])


def t5gemma2() -> Family:
    """An encoder and a decoder."""
    _, proc, stops = gemma3()
    tok = proc.tokenizer
    layers = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
    marks = {"boi_token_index": tok.boi_token_id, "eoi_token_index": tok.eoi_token_id}
    words = text(tok, **layers)
    config = transformers.T5Gemma2Config(
        encoder={
            "text_config": words,
            "vision_config": vision(vision_use_head=False),
            "mm_tokens_per_image": 4,
            "image_token_index": tok.image_token_id,
            **marks,
        },
        decoder=words,
        image_token_index=tok.image_token_id,
        eoi_token_index=tok.eoi_token_id,
    )
    return Family(config, proc, stops)


def paligemma() -> Family:
    """It has no chat template."""
    tok = gemma_tokenizer()
    seen = pil_images("Siglip", "siglip", size=SQUARE)
    seen.image_seq_length = 16
    proc = transformers.PaliGemmaProcessor(seen, tok)
    config = transformers.PaliGemmaConfig(
        text_config=text(tok, model_type="gemma2", head_dim=16),
        vision_config=siglip(projection_dim=64),
        projection_dim=64,
        hidden_size=64,
        image_token_index=proc.image_token_id,
        vocab_size=len(tok),
    )
    return Family(config, proc, ["<eos>"])


# ---------------------------------------------------------------- InternVL, LLaVA-OneVision


def internvl() -> Family:
    """InternVL 3. Pictures that are not square are cut into tiles."""
    named = {"start_image_token": "<img>", "end_image_token": "</img>"}
    named |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    tok = qwen_tokenizer(**named)
    proc = transformers.InternVLProcessor(
        pil_images("GotOcr2", "got_ocr2", size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4),
        tok,
        transformers.InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=INTERNVL,
    )
    config = transformers.InternVLConfig(
        text_config=text(tok, model_type="qwen2"),
        vision_config=vision(image_size=[56, 56], patch_size=[14, 14]),
        image_token_id=tok.context_image_token_id,
        image_seq_length=4,
    )
    return Family(config, proc, ["<|im_end|>"])


def llava_onevision(template: str = ONEVISION) -> Family:
    tok = qwen_tokenizer(image_token="<image>", video_token="<video>")
    pinpoints = [[56, 56], [56, 112], [112, 56], [112, 112]]
    proc = transformers.LlavaOnevisionProcessor(
        pil_images("LlavaOnevision", "llava_onevision", size=SQUARE, image_grid_pinpoints=pinpoints),
        tok,
        transformers.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    config = transformers.LlavaOnevisionConfig(
        text_config=text(tok, model_type="qwen2"),
        vision_config=siglip(),
        image_token_index=tok.image_token_id,
        video_token_index=tok.video_token_id,
        image_grid_pinpoints=pinpoints,
    )
    return Family(config, proc, QWEN_STOPS)


def llava_onevision_converted() -> Family:
    return llava_onevision(ONEVISION_CONVERTED)


# ---------------------------------------------------------------- Mistral

MISTRAL_TOKENS = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]


def mistral_family(template: str, config_class, merge: int, **more) -> Family:
    """Pixtral and Mistral Small 3.1: a break token ends each row of image tokens, pictures may have any shape."""
    tok = byte_tokenizer(
        MISTRAL_TOKENS, adds_bos=True, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    patch = {"height": 14, "width": 14}
    proc = transformers.PixtralProcessor(
        pil_images("Pixtral", "pixtral", patch_size=patch, size={"longest_edge": 112}),
        tok,
        patch_size=14,
        spatial_merge_size=merge,
        chat_template=template,
    )
    config = config_class(
        text_config=text(tok, model_type="mistral", head_dim=16, sliding_window=None),
        vision_config=vision(model_type="pixtral", image_size=112, head_dim=16),
        image_token_index=proc.image_token_id,
        vision_feature_layer=-1,
        **more,
    )
    return Family(config, proc, ["</s>"])


def pixtral() -> Family:
    return mistral_family(
        PIXTRAL, transformers.LlavaConfig, merge=1, vision_feature_select_strategy="full", image_seq_length=1
    )


def mistral3() -> Family:
    """Mistral Small 3.1."""
    return mistral_family(MISTRAL, transformers.Mistral3Config, merge=2, spatial_merge_size=2)


# ---------------------------------------------------------------- GLM-V

GLM_TOKENS = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
GLM_TOKENS += [f"<|{edge}_of_{kind}|>" for kind in ("image", "video") for edge in ("begin", "end")]
GLM_TOKENS += ["<|image|>", "<|video|>"]


def glm_family(name: str, template: str, stops: list[str], config_class, video, **words) -> Family:
    tok = byte_tokenizer(
        ["<|endoftext|>", *GLM_TOKENS],
        plain=("<think>", "</think>", "<answer>", "</answer>", "/nothink"),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    proc = getattr(transformers, f"{name}Processor")(
        pil_images(name, name.lower(), size=area(28, 4, 64)), tok, video(), chat_template=template
    )
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    one_id = {f"{kind}_token_id": tok.convert_tokens_to_ids(f"<|{kind}|>") for kind in ("image", "video")}
    one_id |= {
        f"{kind}_{end}_token_id": tok.convert_tokens_to_ids(f"<|{edge}_of_{kind}|>")
        for kind in ("image", "video")
        for end, edge in (("start", "begin"), ("end", "end"))
    }
    config = config_class(
        text_config=text(tok, rope_parameters=rope, **words),
        vision_config=qwen_vision(image_size=56, patch_size=14),
        **one_id,
    )
    return Family(config, proc, ["<|endoftext|>", "<|user|>", "<|observation|>", *stops])


def glm4v() -> Family:
    """GLM-4.1V."""
    video = transformers.Glm4vVideoProcessor
    return glm_family("Glm4v", GLM4V, ["</answer>"], transformers.Glm4vConfig, video)


def glm4v_moe() -> Family:
    """GLM-4.5V and GLM-4.6V."""
    experts = {"moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    video = transformers.Glm4vVideoProcessor
    return glm_family("Glm4v", GLM46V, [], transformers.Glm4vMoeConfig, video, **experts)


def glm46v() -> Family:
    """GLM-4.6V Flash."""
    return glm_family("Glm46V", GLM46V, [], transformers.Glm46VConfig, transformers.Glm46VVideoProcessor)


# ---------------------------------------------------------------- Cohere

COHERE_TOKENS = ["<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"]
COHERE_TOKENS += ["<|START_RESPONSE|>", "<|END_RESPONSE|>"]


def cohere_tokenizer(special: list[str], **settings):
    return byte_tokenizer(
        COHERE_TOKENS + special,
        adds_bos=True,
        bos_token="<BOS_TOKEN>",
        eos_token="<|END_OF_TURN_TOKEN|>",
        pad_token="<PAD>",
        unk_token="<UNK>",
        padding_side="left",
        **settings,
    )


COHERE_LAYERS = {"model_type": "cohere2", "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}


def aya_vision() -> Family:
    """Pictures that are not square are cut into tiles, with TILE_n tokens between them."""
    edges = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "<image>", "TILE_GLOBAL"]
    tok = cohere_tokenizer(edges + ["TILE"] + [f"TILE_{n}" for n in range(1, 10)])
    proc = transformers.AyaVisionProcessor(
        pil_images("GotOcr2", "got_ocr2", size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4),
        tok,
        patch_size=14,
        img_size=56,
        downsample_factor=2,
        chat_template=COHERE.replace("IMAGE", "<image>"),
    )
    config = transformers.AyaVisionConfig(
        text_config=text(tok, **COHERE_LAYERS),
        vision_config=siglip(),
        downsample_factor=2,
        image_token_index=proc.image_token_id,
    )
    return Family(config, proc, ["<|END_OF_TURN_TOKEN|>"])


def cohere2_vision() -> Family:
    """Command A Vision."""
    named = {"image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>"}
    tok = cohere_tokenizer([], extra_special_tokens=named | {"img_line_break_token": "<|IMG_LINE_BREAK|>"})
    seen = transformers.Cohere2VisionImageProcessor(size=SQUARE, patch_size=2, max_patches=4)  # tokens a side
    proc = transformers.Cohere2VisionProcessor(seen, tok, chat_template=COHERE.replace("IMAGE", "<|IMG_PATCH|>"))
    config = transformers.Cohere2VisionConfig(
        text_config=text(tok, **COHERE_LAYERS),
        vision_config=siglip(),
        alignment_intermediate_size=128,
        image_token_id=tok.image_token_id,
    )
    return Family(config, proc, ["<|END_OF_TURN_TOKEN|>"])


# ---------------------------------------------------------------- Llama 3 and 4

LLAMA3_TOKENS = ["<|end_of_text|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"]
LLAMA3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "adds_bos": True}


def mllama() -> Family:
    """Llama 3.2 Vision: pictures come in by cross attention, one token stands for each."""
    tok = byte_tokenizer(
        LLAMA3_TOKENS + ["<|image|>"], **LLAMA3, pad_token="<|finetune_right_pad_id|>", padding_side="left"
    )
    proc = transformers.MllamaProcessor(
        pil_images("Mllama", "mllama", size=SQUARE, max_image_tiles=4), tok, chat_template=MLLAMA
    )
    shapes = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    words = text(tok, cross_attention_layers=[1]) | {"vocab_size": tok.convert_tokens_to_ids("<|image|>")}
    config = transformers.MllamaConfig(
        text_config=words,
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "vision_output_dim": 128,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": shapes,
        },
        image_token_index=tok.convert_tokens_to_ids("<|image|>"),
    )
    return Family(config, proc, ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])


def llama4() -> Family:
    edges = ["<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>", "<|tile_x_separator|>"]
    edges += ["<|tile_y_separator|>", "<|header_start|>", "<|header_end|>", "<|end_of_text|>", "<|eom|>"]
    tok = byte_tokenizer(
        edges,
        adds_bos=True,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot|>",
        pad_token="<|finetune_right_pad|>",
        extra_special_tokens={"image_token": "<|image|>"},
    )
    seen = transformers.Llama4ImageProcessor(size=SQUARE, max_patches=4)
    proc = transformers.Llama4Processor(seen, tok, patch_size=14, pixel_shuffle_ratio=0.5)
    layers = {"num_local_experts": 2, "interleave_moe_layer_step": 2, "layer_types": None, "no_rope_layers": [1, 0]}
    config = transformers.Llama4Config(
        text_config=text(tok, head_dim=16, intermediate_size_mlp=128, attention_chunk_size=256, **layers),
        vision_config=vision(
            vision_output_dim=64, projector_input_dim=64, projector_output_dim=64, intermediate_size=256
        ),
        boi_token_index=tok.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=tok.convert_tokens_to_ids("<|image_end|>"),
        image_token_index=tok.convert_tokens_to_ids("<|patch|>"),
    )
    return Family(config, proc, ["<|end_of_text|>", "<|eom|>", "<|eot|>"])


def llava_next_llama3() -> Family:
    tok = byte_tokenizer(LLAMA3_TOKENS, **LLAMA3, pad_token="<pad>", extra_special_tokens={"image_token": "<image>"})
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    size = {"size": {"shortest_edge": 56}, "crop_size": SQUARE}
    proc = transformers.LlavaNextProcessor(
        pil_images("LlavaNext", "llava_next", **size, image_grid_pinpoints=pinpoints),
        tok,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_NEXT_LLAMA3,
    )
    config = transformers.LlavaNextConfig(
        text_config=text(tok, model_type="llama"),
        vision_config=vision(model_type="clip_vision_model", num_hidden_layers=3, projection_dim=64),
        image_grid_pinpoints=pinpoints,
        image_token_index=tok.image_token_id,
    )
    return Family(config, proc, ["<|end_of_text|>", "<|eot_id|>"])


# ---------------------------------------------------------------- LFM2-VL, Ovis2, DeepSeek-VL


def lfm2_vl() -> Family:
    """LFM2.5-VL: layers of convolution and of attention."""
    places = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)]
    named = {"image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}
    tok = byte_tokenizer(
        ["<|im_start|>", "<|endoftext|>", *places],
        adds_bos=True,
        bos_token="<|startoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens=named | {"image_thumbnail_token": "<|img_thumbnail|>"},
    )
    tiles = {"tile_size": 56, "min_tiles": 2, "max_tiles": 4, "min_image_tokens": 4, "max_image_tokens": 16}
    seen = transformers.Lfm2VlImageProcessor(**tiles, encoder_patch_size=14, downsample_factor=2, max_num_patches=64)
    proc = transformers.Lfm2VlProcessor(seen, tok, chat_template=published("lfm2_2_5_vl"))
    words = text(tok, model_type="lfm2", block_ff_dim=128, layer_types=["conv", "full_attention"])
    sight = vision(model_type="siglip2_vision_model", num_patches=16, vision_use_head=False)
    del sight["image_size"]
    config = transformers.Lfm2VlConfig(
        text_config=words, vision_config=sight, projector_hidden_size=128, image_token_id=tok.image_token_id
    )
    return Family(config, proc, ["<|im_end|>"])


def ovis2() -> Family:
    """A picture is words of a visual vocabulary. Pictures that are not square are cut into tiles."""
    tok = qwen_tokenizer(
        special=("<image>", "<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    )
    proc = transformers.Ovis2Processor(
        pil_images("Ovis2", "ovis2", size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4),
        tok,
        image_seq_length=4,
        chat_template=OVIS2,
    )
    config = transformers.Ovis2Config(
        text_config=text(tok, model_type="qwen2"),
        vision_config=vision(vocab_size=64, hidden_stride=2, num_visual_indicator_tokens=5),
        image_token_id=tok.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tok.convert_tokens_to_ids(
            ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
        ),
        vocab_size=len(tok),
        hidden_size=64,
    )
    return Family(config, proc, QWEN_STOPS)


def deepseek_vl() -> Family:
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    tok = byte_tokenizer(
        [],
        adds_bos=True,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        extra_special_tokens={"image_token": "<image_placeholder>"},
    )
    proc = transformers.DeepseekVLProcessor(
        pil_images("DeepseekVL", "deepseek_vl", size=SQUARE, min_size=14),
        tok,
        chat_template=DEEPSEEK_VL,
        num_image_tokens=16,
    )
    config = transformers.DeepseekVLConfig(
        text_config=text(tok, model_type="llama"),
        vision_config=siglip(),
        image_token_id=tok.image_token_id,
    )
    return Family(config, proc, [eos])


# ---------------------------------------------------------------- others


def idefics2() -> Family:
    """Its processor does not say where it put image tokens."""
    proc = digit_forms.processor(height=56, width=112)
    config = digit_forms.model(proc.tokenizer, hidden=64).config
    return Family(config, proc, ["<end_of_utterance>", "</s>"])


def aria() -> Family:
    """A mixture of experts, whose weights are no linear layers."""
    tok = byte_tokenizer(
        ["<|im_start|>", "<|im_end|>", "<fim_prefix>", "<fim_suffix>"],
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<|img|>"},
    )
    seen = pil_images("Aria", "aria", max_image_size=490, min_image_size=336)
    proc = transformers.AriaProcessor(seen, tok, size_conversion={490: 4, 980: 8}, chat_template=ARIA)
    config = transformers.AriaConfig(
        text_config=text(tok, model_type="aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        vision_config=vision(model_type="idefics3_vision", image_size=490, patch_size=70),
        projector_patch_to_query_dict={49: 4, 196: 8},
        image_token_index=tok.image_token_id,
    )
    return Family(config, proc, ["<|im_end|>", "</s>"])


def muse_glimmer() -> Family:
    """It thinks to itself in a turn of its own before it answers."""
    edges = ["<|start|>", "<|message|>", "<|eom|>", "<|eot|>", "<|patch|>", "<|image_start|>", "<|image_end|>"]
    edges += ["<|video|>", "<|vid_frame_separator|>", "<|vid_start|>", "<|vid_end|>"]
    tok = byte_tokenizer(
        edges, adds_bos=True, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", pad_token="<|pad|>"
    )
    proc = transformers.MuseGlimmerProcessor(
        transformers.MuseGlimmerImageProcessor(),
        transformers.MuseGlimmerVideoProcessor(),
        tok,
        chat_template=published("muse_glimmer"),
    )
    layers = {"head_dim": 16, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.MuseGlimmerConfig(
        text_config=text(tok, **layers),
        vision_config=vision(pos_emb_height=8, pos_emb_width=8, max_position_embeddings=64),
        image_token_id=proc.image_token_id,
        video_token_id=proc.video_token_id,
        out_hidden_size=256,
        projector_hidden_size=64,
    )
    return Family(config, proc, ["<|end_of_text|>", "<|eot|>"])


def video_llava() -> Family:
    named = {"image_token": "<image>", "video_token": "<video>"}
    tok = byte_tokenizer(
        [], adds_bos=True, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=named
    )
    size = {"size": {"shortest_edge": 56}, "crop_size": SQUARE}
    proc = transformers.VideoLlavaProcessor(
        transformers.VideoLlavaImageProcessor(**size),
        transformers.VideoLlavaVideoProcessor(**size),
        tok,
        patch_size=14,
        chat_template=VIDEO_LLAVA,
    )
    config = transformers.VideoLlavaConfig(
        text_config=text(tok, model_type="llama"),
        vision_config=vision(model_type="clip_vision_model", num_hidden_layers=3, projection_dim=64),
        image_token_index=tok.image_token_id,
        video_token_index=tok.video_token_id,
        image_seq_length=16,
        video_seq_length=136,
    )
    return Family(config, proc, ["</s>"])


def blip2() -> Family:
    """It has no chat template."""
    tok = byte_tokenizer([], bos_token="</s>", eos_token="</s>", pad_token="<pad>")
    proc = transformers.Blip2Processor(pil_images("Blip", "blip", size=SQUARE), tok, num_query_tokens=4)
    width = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Blip2Config(
        text_config=text(tok, model_type="opt", ffn_dim=128, word_embed_proj_dim=64),
        vision_config=vision(initializer_range=0.02),
        qformer_config=width | {"encoder_hidden_size": 64, "vocab_size": 64},
        num_query_tokens=4,
        image_token_index=proc.tokenizer.convert_tokens_to_ids("<image>"),
    )
    return Family(config, proc, ["</s>"])


def florence2() -> Family:
    """An encoder and a decoder, without a chat template."""
    tok = byte_tokenizer(
        [], bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    seen = pil_images("CLIP", "clip", size=SQUARE, crop_size=SQUARE)
    seen.image_seq_length = 5
    proc = transformers.Florence2Processor(seen, tok)
    sight = {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [14, 2], "patch_padding": [3, 1]}
    sight |= {"patch_prenorm": [False, True], "embed_dim": [64, 64], "num_heads": [4, 4], "num_groups": [4, 4]}
    config = transformers.Florence2Config(
        text_config={
            "model_type": "bart",
            "vocab_size": len(tok),
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 1024,
            "bos_token_id": tok.bos_token_id,
            "eos_token_id": tok.eos_token_id,
            "pad_token_id": tok.pad_token_id,
            "decoder_start_token_id": tok.eos_token_id,
        },
        vision_config=sight | {"projection_dim": 64, "window_size": 2, "drop_path_rate": 0.0},
        image_token_id=tok.image_token_id,
    )
    return Family(config, proc, ["</s>"])


def video_llama3() -> Family:
    tok = qwen_tokenizer(image_token="<image>", video_token="<video>")
    proc = transformers.VideoLlama3Processor(
        pil_images("VideoLlama3", "video_llama_3", size=area(14, 4, 64), merge_size=1),
        tok,
        transformers.VideoLlama3VideoProcessor(),
        chat_template=VIDEO_LLAMA3,
    )
    config = transformers.VideoLlama3Config(
        text_config=text(tok, model_type="qwen2"),
        vision_config=vision(),
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
    )
    return Family(config, proc, QWEN_STOPS)


def lighton_ocr() -> Family:
    """Pixtral's tower and Qwen3."""
    named = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>"}
    tok = qwen_tokenizer(**named, image_end_token="<|vision_end|>")
    patch = {"height": 14, "width": 14}
    proc = transformers.LightOnOcrProcessor(
        pil_images("Pixtral", "pixtral", patch_size=patch, size={"longest_edge": 112}),
        tok,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=LIGHTON,
    )
    config = transformers.LightOnOcrConfig(
        text_config=text(tok, model_type="qwen3", head_dim=16),
        vision_config=vision(model_type="pixtral", image_size=112, head_dim=16),
        image_token_id=tok.image_token_id,
        spatial_merge_size=2,
    )
    return Family(config, proc, QWEN_STOPS)


# ---------------------------------------------------------------- all of them

FAMILIES: dict[str, Callable[[], Family]] = {
    function.__name__: function
    for function in (
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        qwen3_vl_moe,
        qwen3_5,
        qwen3_5_think,
        qwen3_8,
        qwen3_5_moe,
        idefics2,
        idefics3,
        smolvlm,
        gemma3,
        gemma4,
        paligemma,
        t5gemma2,
        internvl,
        llava_onevision,
        llava_onevision_converted,
        llava_next_llama3,
        pixtral,
        mistral3,
        lighton_ocr,
        glm4v,
        glm4v_moe,
        glm46v,
        aya_vision,
        cohere2_vision,
        mllama,
        llama4,
        lfm2_vl,
        ovis2,
        deepseek_vl,
        aria,
        muse_glimmer,
        video_llava,
        video_llama3,
        blip2,
        florence2,
    )
}
# Others do without: tests of those run everywhere.
NEED_TORCHVISION = {
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_think",
    "qwen3_5_moe",
    "qwen3_8",
}
NEED_TORCHVISION |= {"smolvlm", "gemma4", "internvl", "llava_onevision", "llava_onevision_converted", "pixtral"}
NEED_TORCHVISION |= {"mistral3", "glm4v", "glm4v_moe", "glm46v", "cohere2_vision", "llama4", "lfm2_vl", "video_llava"}
NEED_TORCHVISION |= {"video_llama3", "muse_glimmer"}
# Models that this kind of recipe has to refuse: no chat template, or an encoder and a decoder.
NO_CHAT_TEMPLATE = {"paligemma", "blip2", "florence2"}
ENCODER_DECODER = {"t5gemma2", "florence2"}


def build(name: str, out: Path, seed: int = 0) -> None:
    """Write `out/model`, a model of this family with random weights and its processor. Raises ImportError where the
    family's processor needs torchvision and it is missing."""
    config, proc, stops = FAMILIES[name]()
    net = model(config, proc, stops, seed)
    net.save_pretrained(Path(out) / "model")
    proc.save_pretrained(Path(out) / "model")


def model(config: PreTrainedConfig, proc: ProcessorMixin, stops: list[str], seed: int = 0):
    """A random model in float32. Weights that start as zeros are drawn too, as no published model has such: Gemma 3's
    projector and Llama 3.2's gates would let no picture through."""
    tok = proc.tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = AutoModelForImageTextToText.from_config(config)
        for name, weight in net.named_parameters():
            if not name.endswith("bias") and not weight.any():
                torch.nn.init.normal_(weight, std=0.1)
    net.generation_config = GenerationConfig(
        eos_token_id=tok.convert_tokens_to_ids(stops), bos_token_id=tok.bos_token_id, pad_token_id=tok.pad_token_id
    )
    return net


# ---------------------------------------------------------------- those that learn to caption

LEARNERS: dict[str, Callable[[], Family]] = {
    "qwen3_vl": functools.partial(qwen3_vl, width=128),
    "smolvlm": functools.partial(smolvlm, width=128, tiles=1),
}


def ask(proc, n_images: int, prompt: str, said: str, pictures_first: bool = True) -> tuple[str, str]:
    """A rendered prompt, and what the model is to say next: the answer, with the token that ends it."""
    images = [{"type": "image"}] * n_images
    question = [{"type": "text", "text": prompt}]
    content = images + question if pictures_first else question + images
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": said}]},
    ]
    asked = proc.apply_chat_template(turns[:1], add_generation_prompt=True)
    answer, stop, _ = proc.apply_chat_template(turns).removeprefix(asked).partition(proc.tokenizer.eos_token)
    return asked, answer + stop


def batch(proc, lessons: list[tuple[int, str, str]], pictures: torch.Tensor, answered: bool = True) -> dict:
    """What a model of any family takes; see `llava.batch`. In every other row the pictures stand after the prompt's
    text, as they do in the rows to fine-tune with."""
    texts = [ask(proc, *lesson, pictures_first=row % 2 == 0) for row, lesson in enumerate(lessons)]
    drawn = iter([digits.to_pil(picture) for picture in pictures])
    shown = [[next(drawn) for _ in range(n_images)] for n_images, *_ in lessons]
    inputs = proc(
        text=[asked + (answer if answered else "") for asked, answer in texts],
        images=shown,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
    if answered:
        answers = proc.tokenizer([answer for _, answer in texts], add_special_tokens=False)["input_ids"]
        lengths = torch.tensor([len(ids) for ids in answers])
        longest = inputs["input_ids"].shape[1]
        before_answer = torch.arange(longest) < longest - lengths[:, None]
        inputs["labels"] = inputs["input_ids"].masked_fill(before_answer, -100)
    return dict(inputs)


def build_learner(
    out: Path, seed: int = 0, base_steps: int = 1500, train_rows: int = 6400, family: str = "qwen3_vl"
) -> None:
    """Write `out/model`, trained to caption digits, and the rows of `llava` as `out/data` and `out/json`. Prints the
    base's caption accuracy."""
    started = time.time()
    config, proc, stops = LEARNERS[family]()
    net = model(config, proc, stops, seed)
    proc.save_pretrained(Path(out) / "model")
    proc = AutoProcessor.from_pretrained(Path(out) / "model")  # what a recipe will use, torchvision's resizing too
    right = llava.train_base(net, proc, seed, base_steps, make_batch=batch)
    net.save_pretrained(Path(out) / "model")
    llava.write_data(out, "train", llava.make_rows(seed, train=True, n=train_rows))
    llava.write_data(out, "test", llava.make_rows(seed, train=False))
    size = sum(p.numel() for p in net.parameters()) / 1e6
    took = f"{time.time() - started:.0f} s"
    print(f"{size:.2f} M parameters; right captions on 100 pictures it never saw: {right:.2f}; {took}")
