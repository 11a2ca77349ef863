"""The small models: published layouts, the same bytes every time, and outputs that depend on every input."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoFramepackTransformer3DModel
from PIL import Image, ImageOps
from safetensors import safe_open
from transformers import AutoTokenizer, CLIPTextModel, LlamaModel, SiglipVisionModel

import demo.models
from demo.material import Material, clip_path
from demo.models import ModelPaths, build_models

DATA = Path(__file__).parent / "data"
JAPANESE = "猫が窓の外を見ています 🐈"


def patterns(shapes: dict[str, tuple[int, ...]]) -> set[tuple[str, int]]:
    """Names with every number as N, and the number of axes: what is the same in a smaller model."""
    return {(re.sub(r"\d+", "N", name), len(shape)) for name, shape in shapes.items()}


def published(name: str) -> dict[str, list[int]]:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def stored(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every tensor in the safetensors files of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_building_twice_gives_the_same_bytes_in_every_file(demo_models: ModelPaths, tmp_path: Path) -> None:
    torch.manual_seed(1234)
    again = build_models(tmp_path / "again")
    assert hashes(again.dit.parent) == hashes(demo_models.dit.parent)


def test_building_leaves_the_random_state_of_the_caller(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    build_models(tmp_path / "models")
    assert torch.equal(torch.get_rng_state(), before)


def test_models_of_the_same_recipe_are_kept_and_of_another_are_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    monkeypatch.setattr(demo.models, "_build", built.append)
    build_models(tmp_path / "models")
    build_models(tmp_path / "models")
    assert len(built) == 1
    monkeypatch.setattr(demo.models, "recipe", lambda: "another")
    build_models(tmp_path / "models")
    assert len(built) == 2


def test_the_whole_tree_is_small(demo_models: ModelPaths) -> None:
    num_bytes = sum(path.stat().st_size for path in demo_models.dit.parent.rglob("*") if path.is_file())
    assert num_bytes < 36e6


def test_transformer_has_the_published_keys_in_three_bfloat16_shards(demo_models: ModelPaths) -> None:
    tensors = stored(demo_models.dit)
    assert patterns({name: shape for name, (shape, _) in tensors.items()}) == patterns(
        published("framepack_dit_shapes.json")
    )
    assert {dtype for _, dtype in tensors.values()} == {"BF16"}
    names = sorted(path.name for path in demo_models.dit.glob("*.safetensors"))
    assert names == [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_vae_has_the_published_keys(demo_models: ModelPaths) -> None:
    tensors = stored(demo_models.vae / "vae")
    assert patterns({name: shape for name, (shape, _) in tensors.items()}) == patterns(
        published("hunyuan_vae_shapes.json")
    )


@pytest.mark.parametrize(
    ("cls", "model", "subfolder"),
    [
        (LlamaModel, "text_encoder1", "text_encoder"),
        (CLIPTextModel, "text_encoder2", "text_encoder_2"),
        (SiglipVisionModel, "image_encoder", "image_encoder"),
        (HunyuanVideoFramepackTransformer3DModel, "dit", "."),
        (AutoencoderKLHunyuanVideo, "vae", "vae"),
    ],
)
def test_models_load_completely_with_their_libraries(
    demo_models: ModelPaths, cls: type, model: str, subfolder: str
) -> None:
    _, report = cls.from_pretrained(getattr(demo_models, model) / subfolder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_llama_tokenizer_starts_with_bos_and_knows_the_headers(demo_models: ModelPaths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_models.text_encoder1 / "tokenizer")
    ids = tokenizer("<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>").input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[:2] == ["<|begin_of_text|>", "<|start_header_id|>"] and tokens[-1] == "<|eot_id|>"
    assert tokenizer.pad_token_id is not None


def test_clip_tokenizer_frames_and_fills_to_77_and_its_end_has_the_highest_id(demo_models: ModelPaths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_models.text_encoder2 / "tokenizer_2")
    ids = tokenizer("A cat", padding="max_length", truncation=True).input_ids
    assert len(ids) == 77 == len(tokenizer("cat " * 200, truncation=True).input_ids)
    assert ids[0] == tokenizer.bos_token_id and max(ids) == tokenizer.eos_token_id == len(tokenizer) - 1


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2"])
def test_any_text_survives_tokenizing(demo_models: ModelPaths, folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_models.vae / folder)
    assert tokenizer.decode(tokenizer(JAPANESE, add_special_tokens=False).input_ids) == JAPANESE


@torch.no_grad()
def test_pictures_survive_the_vae_neither_flat_nor_saturated(demo_models: ModelPaths, material: Material) -> None:
    vae = AutoencoderKLHunyuanVideo.from_pretrained(demo_models.vae / "vae", torch_dtype=torch.float32)
    picture = np.array(ImageOps.fit(Image.open(material.chelsea), (128, 128)))
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    decoded = vae.decode(latents / vae.config.scaling_factor).sample
    assert 0.2 < latents.std() < 2
    assert (decoded.abs() > 1).float().mean() < 0.1
    grey = [image.mean(dim=1).flatten() for image in (pixels, decoded)]
    assert torch.corrcoef(torch.stack(grey))[0, 1] > 0.7


def transformer_inputs() -> dict[str, torch.Tensor]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))

    return {
        "hidden_states": random(1, 16, 1, 8, 8),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": random(1, 12, demo.models.TEXT_WIDTH),
        "encoder_attention_mask": torch.ones(1, 12, dtype=torch.bool),
        "pooled_projections": random(1, demo.models.POOLED_WIDTH),
        "image_embeds": random(1, 9, demo.models.IMAGE_WIDTH),
        "indices_latents": torch.tensor([1]),
        "guidance": torch.tensor([9984.0]),
        "latents_clean": random(1, 16, 2, 8, 8),
        "indices_latents_clean": torch.tensor([0, 10]),
        "latents_history_2x": random(1, 16, 2, 8, 8),
        "indices_latents_history_2x": torch.tensor([11, 12]),
        "latents_history_4x": random(1, 16, 4, 8, 8),
        "indices_latents_history_4x": torch.arange(13, 17),
    }


@torch.no_grad()
def test_every_input_of_the_transformer_matters(demo_models: ModelPaths) -> None:
    model = HunyuanVideoFramepackTransformer3DModel.from_pretrained(demo_models.dit, torch_dtype=torch.float32)
    inputs = transformer_inputs()
    expected = model(**inputs, return_dict=False)[0]
    assert 0.1 < expected.std() < 20
    for name in sorted(inputs.keys() - {"encoder_attention_mask"}):
        changed = inputs[name] + 3 if name.startswith("indices") else inputs[name] * 0.5
        difference = model(**{**inputs, name: changed}, return_dict=False)[0] - expected
        assert difference.std() > 1e-5 * expected.std(), name


@torch.no_grad()
def test_the_target_takes_from_a_control_what_lies_in_the_same_place(demo_models: ModelPaths) -> None:
    model = HunyuanVideoFramepackTransformer3DModel.from_pretrained(demo_models.dit, torch_dtype=torch.float32)
    inputs = transformer_inputs()
    before = model(**inputs, return_dict=False)[0]
    inputs["latents_clean"][..., :4, :4] = 0
    change = (model(**inputs, return_dict=False)[0] - before).abs()[0, :, 0]
    assert change[:, :4, :4].mean() > 5 * change[:, 4:, 4:].mean()


@pytest.mark.parametrize("name", ["bikes", "bigbuckbunny"])
def test_clips_are_found_in_their_package(name: str) -> None:
    assert clip_path(name).stat().st_size > 100_000


def test_masks_divide_the_picture_between_the_two_controls(material: Material) -> None:
    inside, around = (
        np.asarray(ImageOps.fit(Image.open(path), (64, 64))) / 255.0
        for path in (material.astronaut_mask, material.coffee_mask)
    )
    assert inside.max() == around.max() == 1 and inside.min() == around.min() == 0
    assert np.abs(inside + around - 1).mean() < 0.01
    assert np.array_equal(Image.open(material.coffee_with_alpha).getchannel("A"), Image.open(material.coffee_mask))
