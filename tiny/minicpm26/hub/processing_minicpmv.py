"""Texts with (<image>./</image>) for each picture, and pictures -> what the model takes.

Defects of the original are here on purpose: rows are padded with token 0, which is "!" and so masked in texts as well,
and without a list of pictures for each text it fails.
"""

import re

import torch
from transformers.processing_utils import ProcessorMixin

from .image_processing_minicpmv import MiniCPMVBatchFeature


class MiniCPMVProcessor(ProcessorMixin):
    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None):
        super().__init__(image_processor, tokenizer)
        self.version = image_processor.version

    def __call__(
        self,
        text,
        images=None,
        max_length=None,
        do_pad=True,
        max_slice_nums=None,
        use_image_id=None,
        return_tensors="pt",
    ):
        seen = self.image_processor(
            images, do_pad=do_pad, max_slice_nums=max_slice_nums, return_tensors=return_tensors
        )
        ids, bounds = [], []
        for row, sizes in zip([text] if isinstance(text, str) else text, seen["image_sizes"]):
            pieces = row.split("(<image>./</image>)")
            assert len(re.findall("<image>./</image>", row)) == len(sizes) == len(pieces) - 1
            for n, size in enumerate(sizes):
                pieces[n] += self.image_processor.get_slice_image_placeholder(size, n, max_slice_nums, use_image_id)
            tokens = torch.tensor(self.tokenizer.encode("".join(pieces))[:max_length], dtype=torch.int32)
            tok = self.tokenizer
            starts = torch.where((tokens == tok.im_start_id) | (tokens == tok.slice_start_id))[0] + 1
            ends = torch.where((tokens == tok.im_end_id) | (tokens == tok.slice_end_id))[0]
            ids.append(tokens)
            bounds.append(torch.hstack([starts[:, None], ends[:, None]]))
        longest = max(map(len, ids))
        bounds = [bound + longest - len(tokens) for bound, tokens in zip(bounds, ids)]
        ids = torch.stack([torch.nn.functional.pad(tokens, (longest - len(tokens), 0)) for tokens in ids])
        return MiniCPMVBatchFeature({"input_ids": ids, "attention_mask": ids.ne(0), "image_bound": bounds, **seen})

    def decode(self, tokens, **kwargs):
        return self.batch_decode([tokens], **kwargs)[0]

    def batch_decode(self, rows, **kwargs):
        kept = [row[row != 0] for row in rows]
        return [
            self.tokenizer.decode(row[:-1] if row[-1] == self.tokenizer.eos_id else row, **kwargs).strip()
            for row in kept
        ]
