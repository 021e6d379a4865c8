"""Pictures -> slices: the whole picture made small and, where it is large, a grid of parts that follows its shape."""

import math

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature


def nested(function, value):
    """A function on every leaf of nested lists."""
    return [nested(function, item) for item in value] if isinstance(value, list) else function(value)


class MiniCPMVBatchFeature(BatchFeature):
    """A batch whose values may be lists of lists of tensors of different shapes."""

    def __init__(self, data=None, tensor_type=None):
        super().__init__(data)
        if tensor_type is not None:
            self.data = {key: nested(torch.as_tensor, value) for key, value in self.data.items()}

    def to(self, device):
        self.data = {key: nested(lambda x: x.to(device), value) for key, value in self.data.items()}
        return self


class MiniCPMVImageProcessor(BaseImageProcessor):
    model_input_names = ["pixel_values"]

    def __init__(self, max_slice_nums=9, scale_resolution=448, patch_size=14, **kwargs):
        super().__init__(**kwargs)
        self.max_slice_nums, self.scale_resolution, self.patch_size = max_slice_nums, scale_resolution, patch_size
        self.use_image_id, self.slice_mode = kwargs.get("use_image_id", False), kwargs.get("slice_mode", True)
        self.image_feature_size, self.version = kwargs.get("image_feature_size", 64), kwargs.get("version", 2.0)
        self.mean, self.std = (np.array(kwargs.get(name, [0.5] * 3)) for name in ("norm_mean", "norm_std"))

    def fit(self, width, height, enlarge=False):
        """The size nearest in shape with about scale_resolution squared pixels, in whole patches."""
        if enlarge or width * height > self.scale_resolution**2:
            shape = width / height
            height = int(self.scale_resolution / math.sqrt(shape))
            width = int(height * shape)
        return tuple(max(round(side / self.patch_size) * self.patch_size, self.patch_size) for side in (width, height))

    def get_sliced_grid(self, image_size, max_slice_nums):
        """Columns and rows of the grid that a picture is cut into, or None."""
        shape, pixels = image_size[0] / image_size[1], image_size[0] * image_size[1]
        wanted = min(math.ceil(pixels / self.scale_resolution**2), max_slice_nums)
        if wanted <= 1:
            return None
        counts = [count for count in (wanted - 1, wanted, wanted + 1) if 1 < count <= max_slice_nums]
        grids = [
            [columns, count // columns] for count in counts for columns in range(1, count + 1) if count % columns == 0
        ]
        return min(grids, key=lambda grid: abs(math.log(shape) - math.log(grid[0] / grid[1])))

    def get_sliced_images(self, image, max_slice_nums=None):
        """[the whole picture, its parts by rows]."""
        grid = self.get_sliced_grid(image.size, max_slice_nums or self.max_slice_nums)
        if grid is None:
            return [image.resize(self.fit(*image.size, enlarge=True), Image.Resampling.BICUBIC)]
        columns, rows = grid
        part = [max(round(side / n) * n, n) / n for side, n in zip(image.size, grid)]
        width, height = self.fit(*part, enlarge=True)
        large = image.resize((width * columns, height * rows), Image.Resampling.BICUBIC)
        corners = [(x * width, y * height) for y in range(rows) for x in range(columns)]
        whole = image.resize(self.fit(*image.size), Image.Resampling.BICUBIC)
        return [whole] + [large.crop((x, y, x + width, y + height)) for x, y in corners]

    def get_slice_image_placeholder(self, image_size, image_idx=0, max_slice_nums=None, use_image_id=None):
        """The text that stands for a picture: one <unk> for each of its tokens."""
        empty = "<unk>" * self.image_feature_size
        text = (
            f"<image_id>{image_idx}</image_id>"
            if (self.use_image_id if use_image_id is None else use_image_id)
            else ""
        )
        text += f"<image>{empty}</image>"
        if grid := self.get_sliced_grid(image_size, max_slice_nums or self.max_slice_nums):
            text += "\n".join([f"<slice>{empty}</slice>" * grid[0]] * grid[1])
        return text

    def reshape_by_patch(self, image):
        """(3, H, W) -> (3, 14, 14 * patches): the patches side by side."""
        size, (_, height, width) = self.patch_size, image.shape
        patches = image.reshape(3, height // size, size, width // size, size)
        return np.ascontiguousarray(patches.transpose(0, 2, 1, 3, 4).reshape(3, size, -1))

    def preprocess(self, images, do_pad=True, max_slice_nums=None, return_tensors=None):
        """Lists of pictures, one for each row -> pixel_values, tgt_sizes (in patches) and image_sizes (in pixels) of
        each row."""
        if isinstance(images, Image.Image):
            images = [[images]]
        elif isinstance(images[0], Image.Image):
            images = [images]
        out = {"pixel_values": [], "image_sizes": [], "tgt_sizes": []}
        for row in images:
            slices = [part for image in row for part in self.get_sliced_images(image.convert("RGB"), max_slice_nums)]
            arrays = [(np.asarray(part, dtype=np.float32) / 255 - self.mean) / self.std for part in slices]
            arrays = [array.astype(np.float32).transpose(2, 0, 1) for array in arrays]
            out["pixel_values"].append([self.reshape_by_patch(array) for array in arrays])
            out["image_sizes"].append([image.size for image in row])
            sizes = [[side // self.patch_size for side in array.shape[1:]] for array in arrays]
            out["tgt_sizes"].append(np.array(sizes) if sizes else [])
        return MiniCPMVBatchFeature(out, tensor_type=return_tensors)


AutoImageProcessor.register("MiniCPMVImageProcessor", MiniCPMVImageProcessor)
