"""Tiny random models that read images, with the bundled model's tokenizer.

Of those that vLLM serves, most import torchvision, which has no build for a torch on CPUs where the tests run; these do
not.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from loadtest.text.tokenizer import build_tokenizer, save_tokenizer

LAYERS = 6
PATCH, MERGE = 14, 2
# Of an image's tokens; the vocabulary has these to spare.
IMAGE_TOKEN, IMAGE_BEGIN, IMAGE_END = (f"<|reserved_{number}|>" for number in range(3))
IMAGE_TOKEN_ID: int = build_tokenizer().encode(IMAGE_TOKEN, add_special_tokens=False).ids[0]
CHAT_TEMPLATE = (
    "{{- '<|begin|>' }}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    f"{{%- if part['type'] == 'image' %}}{{{{- '{IMAGE_BEGIN}{IMAGE_TOKEN}{IMAGE_END}' }}}}"
    "{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"
)
_SPECIALS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_VISION = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "patch_size": PATCH}


def image_tokens(width: int, height: int) -> int:
    """Tokens of an image of so many pixels, which are multiples of a merged patch."""
    return width * height // (PATCH * MERGE) ** 2


def picture(seed: int, width: int, height: int) -> str:
    """A data URL of a PNG with a random colour in each patch; equal arguments, equal picture."""
    colours = np.random.default_rng(seed).integers(0, 256, (height // PATCH, width // PATCH, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours.repeat(PATCH, 0).repeat(PATCH, 1)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_mrope_model(folder: Path) -> Path:
    """Write a model whose positions are of three axes and whose images are read by a bidirectional encoder.

    Args:
        folder: is made.
    """
    from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

    token = build_tokenizer().token_to_id
    text = {
        "vocab_size": build_tokenizer().get_vocab_size(), "hidden_size": 128, "intermediate_size": 128,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 8192, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6],
        },
        **_SPECIALS,
    }  # fmt: skip
    config = PaddleOCRVLConfig(
        text_config=text,
        vision_config={**_VISION, "num_hidden_layers": 2, "image_size": 112, "spatial_merge_size": MERGE},
        image_token_id=IMAGE_TOKEN_ID,
        vision_start_token_id=token(IMAGE_BEGIN),
        vision_end_token_id=token(IMAGE_END),
        # No text may hold it.
        video_token_id=token("<|reserved_3|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(7)
    model = PaddleOCRVLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    processor = {
        "image_processor_type": "PaddleOCRVLImageProcessor", "patch_size": PATCH, "merge_size": MERGE,
        "temporal_patch_size": 1, "size": {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 512 * 512},
    }  # fmt: skip
    return _write(model, folder, processor, "PaddleOCRVLProcessor")


def write_prefix_model(folder: Path) -> Path:
    """Write a model in which the tokens of an image attend to each other in both directions.

    Args:
        folder: is made.
    """
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    text = {
        "model_type": "gemma", "vocab_size": build_tokenizer().get_vocab_size(), "hidden_size": 128,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 32, "max_position_embeddings": 4096, **_SPECIALS,
    }  # fmt: skip
    config = PaliGemmaConfig(
        text_config=text,
        vision_config={**_VISION, "model_type": "siglip_vision_model", "num_hidden_layers": 1, "image_size": 56},
        image_token_index=IMAGE_TOKEN_ID,
        projection_dim=128,
    )
    model = PaliGemmaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    processor = {
        "image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 56}, "image_seq_length": 16,
    }  # fmt: skip
    return _write(model, folder, processor, "PaliGemmaProcessor")


def _write(model: Any, folder: Path, image_processor: dict[str, Any], processor: str) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide, so that the text depends on the image and on what is attended to.
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    save_tokenizer(build_tokenizer(), folder, 8192)
    file = folder / "tokenizer_config.json"
    tokenizer = json.loads(file.read_text())
    file.write_text(json.dumps({**tokenizer, "image_token": IMAGE_TOKEN, "chat_template": CHAT_TEMPLATE}))
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": processor}))
    return folder
