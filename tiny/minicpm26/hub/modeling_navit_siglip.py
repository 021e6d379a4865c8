"""SigLIP for slices of any shape, padded to the longest of a batch: positions by where in its slice a patch lies."""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipPreTrainedModel


class SiglipVisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_dim, self.patch_size, self.side = (
            config.hidden_size,
            config.patch_size,
            config.image_size // config.patch_size,
        )
        self.patch_embedding = nn.Conv2d(3, self.embed_dim, self.patch_size, self.patch_size)
        self.position_embedding = nn.Embedding(self.side**2, self.embed_dim)

    def forward(self, pixel_values, patch_attention_mask, tgt_sizes=None):
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        places = torch.zeros(patches.shape[:2], dtype=torch.long, device=patches.device)
        for n, real in enumerate(patch_attention_mask):
            height, width = tgt_sizes[n].tolist() if tgt_sizes is not None else real.shape
            down, across = (torch.arange(size, device=places.device) * self.side // size for size in (height, width))
            places[n, : height * width] = (down[:, None] * self.side + across).flatten()
        return patches + self.position_embedding(places)


class SiglipVisionTransformer(SiglipPreTrainedModel):
    config_class = SiglipVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.patch_embedding

    def forward(self, pixel_values, patch_attention_mask=None, tgt_sizes=None):
        """pixel_values (B, 3, 14, 14 * patches), patch_attention_mask (B, 1, patches), tgt_sizes (B, 2) -> (B,
        patches, width)."""
        if patch_attention_mask is None:
            height, width = (size // self.embeddings.patch_size for size in pixel_values.shape[2:])
            patch_attention_mask = torch.ones(
                len(pixel_values), height, width, dtype=torch.bool, device=pixel_values.device
            )
        hidden, real = self.embeddings(pixel_values, patch_attention_mask, tgt_sizes), patch_attention_mask.flatten(1)
        bias = None
        if not real.all():
            bias = torch.zeros(real.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(
                ~real, torch.finfo(hidden.dtype).min
            )
            bias = bias[:, None, None, :].expand(-1, 1, real.shape[1], -1)
        hidden = self.encoder(inputs_embeds=hidden, attention_mask=bias).last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=self.post_layernorm(hidden))
