"""Perceiver resampler: a fixed number of queries looks at the patches of a slice, once.

Two defects of the original are here on purpose: `List` is taken from torch.nn.functional, where it was by chance, and
the table of positions is a buffer that is not saved.
"""

import torch
from torch import nn
from torch.nn.functional import *  # noqa: F403


def get_2d_sincos_pos_embed(width: int, shape: List[int]) -> torch.Tensor:  # noqa: F405
    """(rows, columns, width): sines and cosines of the column, then of the row."""
    scales = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float32) / (width / 4))
    down, across = (torch.arange(size, dtype=torch.float32)[:, None] * scales for size in shape)
    down, across = (torch.cat([angle.sin(), angle.cos()], -1) for angle in (down, across))
    rows, columns = shape
    return torch.cat([across[None].expand(rows, -1, -1), down[:, None].expand(-1, columns, -1)], -1)


class MultiheadAttention(nn.Module):
    """nn.MultiheadAttention with an output projection that may be quantized: it is called, not only read."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight, self.in_proj_bias = (
            nn.Parameter(torch.empty(3 * width, width)),
            nn.Parameter(torch.zeros(3 * width)),
        )
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query, key, value, hidden):
        """query (B, Q, D), key and value (B, L, D), hidden (B, L): True where there is no patch."""
        projected = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        parts = [linear(x, weight, bias) for x, weight, bias in projected]  # noqa: F405
        parts = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]
        seen = scaled_dot_product_attention(*parts, attn_mask=~hidden[:, None, None])  # noqa: F405
        return self.out_proj(seen.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    def __init__(self, num_queries, embed_dim, num_heads, kv_dim=None, adaptive=False, max_size=(70, 70)):
        super().__init__()
        self.num_queries, self.embed_dim, self.max_size = num_queries, embed_dim, max_size
        self.query = nn.Parameter(torch.zeros(num_queries, embed_dim))
        self.kv_proj = nn.Identity() if kv_dim in (None, embed_dim) else nn.Linear(kv_dim, embed_dim, bias=False)
        self.attn = MultiheadAttention(embed_dim, num_heads)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(embed_dim, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(embed_dim**-0.5 * torch.randn(embed_dim, embed_dim))
        self._set_2d_pos_cache(self.max_size)

    def _set_2d_pos_cache(self, max_size, device="cpu"):
        with torch.device("cpu"):  # computed, even where the model is being built without memory
            table = get_2d_sincos_pos_embed(self.embed_dim, max_size)
        self.register_buffer("pos_embed", table.to(device), persistent=False)

    def forward(self, x, tgt_sizes=None):
        largest = tgt_sizes.amax(0).tolist()
        if largest[0] > self.max_size[0] or largest[1] > self.max_size[1]:
            self.max_size = [max(pair) for pair in zip(largest, self.max_size)]
            self._set_2d_pos_cache(self.max_size, x.device)
        places = [self.pos_embed[:height, :width].flatten(0, 1).to(x.dtype) for height, width in tgt_sizes.tolist()]
        places = nn.utils.rnn.pad_sequence(places, batch_first=True)
        count = torch.arange(places.shape[1], device=x.device)
        hidden = count >= tgt_sizes.prod(1).to(x.device)[:, None]
        x = self.ln_kv(self.kv_proj(x))
        x = self.attn(self.ln_q(self.query).expand(len(x), -1, -1), x + places, x, hidden)
        return self.ln_post(x) @ self.proj
