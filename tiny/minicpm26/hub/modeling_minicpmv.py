"""The model of the stand-in for MiniCPM-V 2.6: `vpm` sees slices, `resampler` makes tokens of them, `llm` speaks.

Defects of the original are here on purpose: torchvision is imported and not used, __init__ ends without post_init(),
and image tokens are written into the embeddings in place.
"""

import copy
import math

import torch
import torchvision  # noqa: F401
from PIL import Image
from transformers import AutoProcessor, Qwen2ForCausalLM, Qwen2PreTrainedModel

from .configuration_minicpm import MiniCPMVConfig
from .modeling_navit_siglip import SiglipVisionTransformer
from .resampler import Resampler


class MiniCPMVPreTrainedModel(Qwen2PreTrainedModel):
    config_class = MiniCPMVConfig


class MiniCPMV(MiniCPMVPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.llm = Qwen2ForCausalLM(config)
        config.vision_config._attn_implementation = "eager"
        self.vpm = SiglipVisionTransformer(config.vision_config)
        if config.drop_vision_last_layer:
            self.vpm.encoder.layers = self.vpm.encoder.layers[:-1]
        self.vision_dim, self.embed_dim = self.vpm.embeddings.embed_dim, config.hidden_size
        self.resampler = Resampler(
            config.query_num, self.embed_dim, self.embed_dim // 128, self.vision_dim, adaptive=True
        )
        self.processor, self.terminators = None, ["<|im_end|>", "<|endoftext|>"]

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.llm.embed_tokens = value

    def get_output_embeddings(self):
        return self.llm.lm_head

    def set_output_embeddings(self, value):
        self.llm.lm_head = value

    def see(self, slices, tgt_sizes):
        """Slices (3, 14, 14 * patches), in one list, and their shapes in patches (n, 2) -> image tokens (n, queries,
        width)."""
        words = self.llm.model.embed_tokens.weight
        flat = [image.to(words.device).flatten(end_dim=1).T for image in slices]  # (patches * 14, 3 * 14)
        pixels = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True)
        pixels = pixels.transpose(1, 2).unflatten(1, (3, -1)).type(words.dtype)
        count = torch.arange(pixels.shape[-1] // self.config.patch_size, device=words.device)
        real = (count < tgt_sizes.prod(1).to(words.device)[:, None])[:, None]
        parts = [x.split(self.config.vision_batch_size) for x in (pixels, real, tgt_sizes)]
        return self.resampler(torch.cat([self.vpm(*part).last_hidden_state for part in zip(*parts)]), tgt_sizes)

    def get_vllm_embedding(self, data):
        """-> (embeddings of the text with those of the images in it, image tokens of each row)."""
        words = self.llm.model.embed_tokens(data["input_ids"])
        if "vision_hidden_states" in data:
            seen = data["vision_hidden_states"]
        elif any(len(slices) for slices in data["pixel_values"]):
            sizes = torch.vstack([size for size in data["tgt_sizes"] if isinstance(size, torch.Tensor)]).type(
                torch.int32
            )
            every = self.see([image for slices in data["pixel_values"] for image in slices], sizes)
            seen = [
                part if len(part) else [] for part in every.split([len(slices) for slices in data["pixel_values"]])
            ]
        elif self.training:  # so that every weight has a gradient
            size = 224 // self.config.patch_size
            blank = self.vpm(torch.zeros(1, 3, 224, 224, dtype=words.dtype, device=words.device)).last_hidden_state
            seen = [self.resampler(blank, torch.tensor([[size, math.ceil(size)]], dtype=torch.int32))] * len(words)
        else:
            seen = [[]] * len(words)
        for n, (tokens, bounds) in enumerate(zip(seen, data["image_bound"])):
            row = words[n]
            if len(tokens) and len(bounds):
                places = torch.cat([torch.arange(start, end, device=row.device) for start, end in bounds])
                tokens = tokens.flatten(end_dim=1).type(row.dtype)
                row.scatter_(0, places[:, None].expand(-1, row.shape[1]), tokens)
            elif len(tokens) and self.training:
                row += tokens[0].mean() * 0
        return words, seen

    def forward(self, data, **kwargs):
        words, _ = self.get_vllm_embedding(data)
        return self.llm(input_ids=None, position_ids=data["position_ids"].long(), inputs_embeds=words, **kwargs)

    def generate(
        self,
        input_ids=None,
        pixel_values=None,
        tgt_sizes=None,
        image_bound=None,
        attention_mask=None,
        tokenizer=None,
        vision_hidden_states=None,
        return_vision_hidden_states=False,
        stream=False,
        decode_text=False,
        **kwargs,
    ):
        """-> new tokens (B, n), without the prompt and padded with 0; with `decode_text`, texts."""
        assert input_ids is not None and len(input_ids) == len(pixel_values) and not stream
        data = {
            "input_ids": input_ids,
            "image_bound": image_bound,
            "pixel_values": pixel_values,
            "tgt_sizes": tgt_sizes,
        }
        data |= {} if vision_hidden_states is None else {"vision_hidden_states": vision_hidden_states}
        stops = [tokenizer.convert_tokens_to_ids(token) for token in self.terminators]
        with torch.inference_mode():
            words, seen = self.get_vllm_embedding(data)
            said = self.llm.generate(
                inputs_embeds=words, pad_token_id=0, eos_token_id=stops, attention_mask=attention_mask, **kwargs
            )
        if decode_text:
            kept = [[token for token in row.tolist() if token != 0] for row in said]
            said = [tokenizer.decode(row[:-1] if row[-1] in stops else row).strip() for row in kept]
        return (said, seen) if return_vision_hidden_states else said

    def chat(
        self,
        image,
        msgs,
        tokenizer,
        processor=None,
        max_new_tokens=2048,
        sampling=True,
        max_inp_length=8192,
        system_prompt="",
        max_slice_nums=None,
        use_image_id=None,
        **kwargs,
    ):
        """One conversation of {"role", "content": text or list of texts and PIL images} -> the next answer."""
        processor = processor or AutoProcessor.from_pretrained(self.config._name_or_path, trust_remote_code=True)
        mine, its = self.config, processor.image_processor
        mine = (mine.query_num, mine.patch_size, mine.use_image_id, mine.slice_config.max_slice_nums, mine.slice_mode)
        assert mine == (its.image_feature_size, its.patch_size, its.use_image_id, its.max_slice_nums, its.slice_mode)
        turns, images = copy.deepcopy(msgs), []
        if image is not None and isinstance(turns[0]["content"], str):
            turns[0]["content"] = [image, turns[0]["content"]]
        for turn in turns:
            parts = [turn["content"]] if isinstance(turn["content"], str) else turn["content"]
            images += [part for part in parts if isinstance(part, Image.Image)]
            turn["content"] = "\n".join(
                "(<image>./</image>)" if isinstance(part, Image.Image) else part for part in parts
            )
        if system_prompt:
            turns.insert(0, {"role": "system", "content": system_prompt})
        prompt = processor.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = processor(
            [prompt], [images], max_slice_nums=max_slice_nums, use_image_id=use_image_id, max_length=max_inp_length
        )
        inputs = inputs.to(self.device)
        inputs.pop("image_sizes")
        how = {"do_sample": True, "top_p": 0.8, "top_k": 100, "temperature": 0.7, "repetition_penalty": 1.05}
        how = {**(how if sampling else {"num_beams": 3, "repetition_penalty": 1.2}), **kwargs}
        return self.generate(**inputs, tokenizer=tokenizer, max_new_tokens=max_new_tokens, decode_text=True, **how)[0]
