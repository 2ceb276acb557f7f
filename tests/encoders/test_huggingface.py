"""CLIP and EVA-CLIP from local folders with tiny random weights, through the same code as the published ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_ds.encoders.registry import ENCODERS, load_encoder
from blip3o_ds.errors import EncoderError

transformers = pytest.importorskip("transformers")

WIDTH, GRID, PATCH = 32, 3, 4
TINY = {"embed_dim": WIDTH, "grid_size": GRID, "image_size": GRID * PATCH}

# The layout of the published repository: a configuration and a model with a `vision_model`, named by an auto_map.
CONFIGURATION = """
from transformers import PretrainedConfig

class EvaCLIPConfig(PretrainedConfig):
    model_type = "clip"
"""
MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_evaclip import EvaCLIPConfig

class Tower(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(3, config.width, config.patch, config.patch)
        self.cls = nn.Parameter(torch.ones(1, 1, config.width))
        self.positions = nn.Embedding(10, config.width)
        self.register_buffer("position_ids", torch.arange(10).expand(1, -1), persistent=False)

    def forward(self, pixel_values=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], dim=1) + self.positions(self.position_ids)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden[:, 0])

class EvaCLIPModel(PreTrainedModel):
    config_class = EvaCLIPConfig

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = Tower(config)
        self.text_model = nn.Linear(2, 2)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Conv2d):
            module.bias.data.zero_()
"""


@pytest.fixture
def clip_folder(tmp_path: Path, monkeypatch) -> Path:
    size = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        vision_config={**size, "image_size": GRID * PATCH, "patch_size": PATCH},
        text_config={**size, "vocab_size": 20, "max_position_embeddings": 8},
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")  # both towers, as published
    monkeypatch.setitem(ENCODERS, "clip-vit-l14", replace(ENCODERS["clip-vit-l14"], **TINY))
    return tmp_path / "clip"


@pytest.fixture(scope="module")
def _modules_cache(tmp_path_factory):
    """The code of remote models is copied to a cache before it is imported; here not to the user's own."""
    cache = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.syspath_prepend(cache)
        yield


@pytest.fixture
def eva_folder(tmp_path: Path, monkeypatch, _modules_cache) -> Path:
    from safetensors.torch import save_file

    folder = tmp_path / tmp_path.name  # its own name: transformers keeps imported code by the folder's
    folder.mkdir()
    (folder / "configuration_evaclip.py").write_text(CONFIGURATION)
    (folder / "modeling_evaclip.py").write_text(MODELING)
    auto_map = {"AutoConfig": "configuration_evaclip.EvaCLIPConfig", "AutoModel": "modeling_evaclip.EvaCLIPModel"}
    config = {"model_type": "clip", "auto_map": auto_map, "width": WIDTH, "patch": PATCH}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_eva_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setitem(ENCODERS, "eva-clip-8b", replace(ENCODERS["eva-clip-8b"], **TINY))
    return folder


def _eva_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "vision_model.patches.weight": torch.randn(WIDTH, 3, PATCH, PATCH, generator=generator),
        "vision_model.patches.bias": torch.randn(WIDTH, generator=generator),
        "vision_model.cls": torch.randn(1, 1, WIDTH, generator=generator),
        "vision_model.positions.weight": torch.randn(10, WIDTH, generator=generator),
        "text_model.weight": torch.zeros(2, 2),
        "text_model.bias": torch.zeros(2),
    }


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def test_clip_tokens_are_the_last_hidden_state(clip_folder, picture):
    encoder = load_encoder("clip-vit-l14", weights=str(clip_folder), device="cpu")
    images = torch.stack([encoder.preprocess(picture), encoder.preprocess(picture.rotate(90))])

    tokens = encoder(images, "cls_patch")

    plain = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        hidden = plain.vision_model(images, output_hidden_states=True).hidden_states[-1]
    assert tokens.shape == (2, 1 + GRID**2, WIDTH)
    torch.testing.assert_close(tokens, hidden)


def test_clip_input_is_what_its_own_processor_makes(clip_folder, picture):
    encoder = load_encoder("clip-vit-l14", weights=str(clip_folder), device="cpu")
    size = GRID * PATCH
    # Resize the short side, crop the centre, normalise with the published constants: written out once more.
    resized = picture.resize((size * 30 // 20, size), Image.Resampling.BICUBIC)
    left = (resized.width - size) // 2
    pixels = np.asarray(resized)[:, left : left + size] / 255.0
    expected = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]

    np.testing.assert_allclose(encoder.preprocess(picture).permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_eva_tokens_come_from_the_vision_tower_of_the_code_beside_the_weights(eva_folder, picture):
    encoder = load_encoder("eva-clip-8b", weights=str(eva_folder), device="cpu", trust_remote_code=True)
    image = encoder.preprocess(picture)[None]

    tokens = encoder(image, "cls_patch")

    weights = _eva_weights()
    patches = torch.nn.functional.unfold(image, PATCH, stride=PATCH)  # [1, 3*PATCH*PATCH, N]
    linear = weights["vision_model.patches.weight"].flatten(1)
    patch_tokens = (linear @ patches[0]).T + weights["vision_model.patches.bias"]
    expected = torch.cat([weights["vision_model.cls"][0], patch_tokens]) + weights["vision_model.positions.weight"]
    torch.testing.assert_close(tokens[0], expected, atol=1e-4, rtol=1e-4)
    assert encoder(image).shape == (1, GRID**2, WIDTH)


def test_code_beside_the_weights_does_not_run_without_consent(eva_folder, tmp_path):
    canary = tmp_path / "it_ran"
    with open(eva_folder / "modeling_evaclip.py", "a") as file:
        file.write(f"\nopen({str(canary)!r}, 'w').close()\n")

    with pytest.raises(EncoderError, match=r"brings its own Python code.*trust_remote_code"):
        load_encoder("eva-clip-8b", weights=str(eva_folder), device="cpu")
    assert not canary.exists()

    load_encoder("eva-clip-8b", weights=str(eva_folder), device="cpu", trust_remote_code=True)
    assert canary.exists()


def test_width_of_another_model_is_an_error(eva_folder, monkeypatch, picture):
    monkeypatch.setitem(ENCODERS, "eva-clip-8b", replace(ENCODERS["eva-clip-8b"], embed_dim=WIDTH + 1))
    encoder = load_encoder("eva-clip-8b", weights=str(eva_folder), device="cpu", trust_remote_code=True)

    with pytest.raises(EncoderError, match=rf"shape \(1, 10, {WIDTH}\), expected \(1, 10, {WIDTH + 1}\)"):
        encoder(encoder.preprocess(picture)[None])


@pytest.mark.parametrize("name", ["vision_model.cls", "vision_model.positions.weight"])
def test_weights_that_are_not_all_there_are_an_error(eva_folder, name):
    from safetensors.torch import save_file

    weights = _eva_weights()
    del weights[name]
    save_file(weights, eva_folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(EncoderError, match=f"lacks 1 of the vision tower's weights, among them {name[13:]}"):
        load_encoder("eva-clip-8b", weights=str(eva_folder), device="cpu", trust_remote_code=True)


def test_model_without_a_vision_tower_is_an_error(eva_folder):
    code = eva_folder / "modeling_evaclip.py"
    code.write_text(code.read_text().replace("self.vision_model", "self.tower"))

    with pytest.raises(EncoderError, match="has no `vision_model`"):
        load_encoder("eva-clip-8b", weights=str(eva_folder), device="cpu", trust_remote_code=True)


def test_missing_weights_are_an_error_that_says_what_to_name(tmp_path):
    with pytest.raises(EncoderError, match=r"clip-vit-l14: cannot load .*absent.*Name a folder"):
        load_encoder("clip-vit-l14", weights=str(tmp_path / "absent"), device="cpu")
