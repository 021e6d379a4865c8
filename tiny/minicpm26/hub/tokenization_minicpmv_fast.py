"""Qwen2's tokenizer with names for the tokens around images."""

from transformers.models.qwen2 import Qwen2TokenizerFast


class MiniCPMVTokenizerFast(Qwen2TokenizerFast):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for name, word in (
            ("im", "image"),
            ("ref", "ref"),
            ("box", "box"),
            ("quad", "quad"),
            ("slice", "slice"),
            ("im_id", "image_id"),
        ):
            setattr(self, f"{name}_start", f"<{word}>")
            setattr(self, f"{name}_end", f"</{word}>")

    eos_id = property(lambda self: self.eos_token_id)
    bos_id = property(lambda self: self.bos_token_id)
    unk_id = property(lambda self: self.unk_token_id)
    im_start_id = property(lambda self: self.convert_tokens_to_ids(self.im_start))
    im_end_id = property(lambda self: self.convert_tokens_to_ids(self.im_end))
    slice_start_id = property(lambda self: self.convert_tokens_to_ids(self.slice_start))
    slice_end_id = property(lambda self: self.convert_tokens_to_ids(self.slice_end))
    im_id_start_id = property(lambda self: self.convert_tokens_to_ids(self.im_id_start))
    im_id_end_id = property(lambda self: self.convert_tokens_to_ids(self.im_id_end))
