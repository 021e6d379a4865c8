"""Configuration of the stand-in for MiniCPM-V 2.6: Qwen2's fields at the top, the tower's in `vision_config`."""

from transformers import PretrainedConfig, Qwen2Config
from transformers.models.siglip import SiglipVisionConfig


class MiniCPMVSliceConfig(PretrainedConfig):
    model_type = "minicpmv"

    def __init__(self, patch_size=14, max_slice_nums=9, scale_resolution=448, **kwargs):
        super().__init__(**kwargs)
        self.patch_size, self.max_slice_nums, self.scale_resolution = patch_size, max_slice_nums, scale_resolution


class MiniCPMVConfig(Qwen2Config):
    model_type = "minicpmv"

    def __init__(
        self,
        query_num=64,
        image_size=448,
        drop_vision_last_layer=True,
        batch_vision_input=True,
        slice_config=None,
        vision_config=None,
        use_image_id=True,
        vision_batch_size=16,
        **kwargs,
    ):
        self.query_num, self.image_size, self.use_image_id = query_num, image_size, use_image_id
        self.drop_vision_last_layer, self.batch_vision_input = drop_vision_last_layer, batch_vision_input
        self.vision_batch_size, self.slice_mode = vision_batch_size, True
        self.slice_config = MiniCPMVSliceConfig(**(slice_config or {"max_slice_nums": 1}))
        self.vision_config = (
            SiglipVisionConfig(**vision_config)
            if isinstance(vision_config, dict)
            else vision_config or SiglipVisionConfig()
        )
        self.patch_size = self.vision_config.patch_size
        super().__init__(**kwargs)
