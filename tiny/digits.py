"""The pictures: scikit-learn's 1797 scanned handwritten digits (8x8 pixels, 16 grey levels), drawn as 56x56 pictures.

The scans are dealt into three disjoint sets, so that a score on held-out ones is no memory test, and the two sets that
are trained on are bent a little differently each time (without that, unseen scans are misread).
"""

import io

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SETS = {"base": 900, "tune": 600, "held_out": 297}
SIZE = 56  # pixels; with patches of 14 every scanned pixel is 7x7 and every patch holds 2x2 of them


def load() -> tuple[torch.Tensor, torch.Tensor]:
    """All scans: ink (1797, 8, 8) float32 in 0..1, 1 being black, and labels (1797,) int64 in 0..9."""
    data = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32), torch.tensor(data.target, dtype=torch.int64)


def split(seed: int) -> dict[str, torch.Tensor]:
    """Deal the scans' numbers into the disjoint sets of `SETS` (each an int64 vector)."""
    order = torch.from_numpy(np.random.default_rng([seed, 1797]).permutation(sum(SETS.values())))
    return dict(zip(SETS, order.split(list(SETS.values())), strict=True))


def draw(ink: torch.Tensor, rng: np.random.Generator | None = None) -> torch.Tensor:
    """Draw scans, all at once, as pictures: black ink on white.

    Args:
        ink: (n, 8, 8) in 0..1.
        rng: bend each scan, by up to: rotation 15 degrees, scale 12 %, shear 0.15, shift 10 % of the picture,
            contrast 0.75 to 1. None draws them as they are.

    Returns: (n, 56, 56) uint8, 255 being white.
    """
    n = len(ink)
    draws = rng.uniform(-1, 1, (n, 6)) if rng else np.zeros((n, 6))
    turn, scale, shear = np.radians(15) * draws[:, 0], 1 + 0.12 * draws[:, 1], 0.15 * draws[:, 2]
    cos, sin = np.cos(turn) * scale, np.sin(turn) * scale
    shift = 0.2 * draws[:, 3:5]  # affine_grid's coordinates go from -1 to 1
    theta = np.stack([cos, cos * shear - sin, shift[:, 0], sin, sin * shear + cos, shift[:, 1]], 1).reshape(n, 2, 3)
    grid = torch.nn.functional.affine_grid(torch.tensor(theta, dtype=torch.float32), [n, 1, SIZE, SIZE], False)
    drawn = torch.nn.functional.grid_sample(ink[:, None], grid, align_corners=False)[:, 0]
    if rng:
        drawn = drawn * torch.tensor(0.875 + 0.125 * draws[:, 5], dtype=torch.float32)[:, None, None]
    return ((1 - drawn) * 255).round().to(torch.uint8)


def to_pil(picture: torch.Tensor) -> Image.Image:
    """One picture, (h, w) uint8, as an RGB image."""
    return Image.fromarray(picture.numpy()).convert("RGB")


def png(picture: torch.Tensor) -> bytes:
    """One picture, (h, w) uint8, as a PNG file."""
    file = io.BytesIO()
    to_pil(picture).save(file, "PNG")
    return file.getvalue()
