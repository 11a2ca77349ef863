"""SigLIP against transformers' own model, in every form of the files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from common.weights import Checkpoint, TensorInfo, check_names_and_shapes, empty_module
from frame_pack import image_encoder as ours
from options.errors import UserError


def siglip_model(*, head: bool = True, **changes) -> SiglipVisionModel:
    sizes = {"hidden_size": 72, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 64}
    published = {"image_size": 384, "patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**{**published, **sizes, **changes}, vision_use_head=head)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def siglip() -> SiglipVisionModel:
    return siglip_model()


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    from skimage.data import chelsea

    return chelsea()


def load(path: Path, **options) -> SiglipVisionModel:
    return ours.load_siglip(ours.open_siglip(path, **options), dtype=torch.float32, device="cpu")


def saved(folder: Path, tensors: dict[str, torch.Tensor], name: str = "siglip.safetensors") -> Path:
    save_file(tensors, folder / name)
    return folder / name


def wanted_features(model: SiglipVisionModel, image: np.ndarray) -> torch.Tensor:
    """The facts, by Pillow and hand: squeezed to 384 bicubic, mean and deviation 0.5."""
    small = Image.fromarray(image).resize((384, 384), Image.Resampling.BICUBIC)
    pixels = (torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    return model(pixel_values=pixels[None].to(model.dtype)).last_hidden_state[0]


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def with_prefix(folder: Path, model: SiglipVisionModel) -> Path:
    tensors = {f"vision_model.{name}": tensor for name, tensor in model.state_dict().items()}
    return saved(folder, tensors | {"vision_model.embeddings.position_ids": torch.arange(729)[None]})


def without_prefix(folder: Path, model: SiglipVisionModel) -> Path:
    return saved(folder, model.state_dict(), "\u91cd\u307f.safetensors")


def as_snapshot(folder: Path, model: SiglipVisionModel) -> Path:
    model.save_pretrained(folder / "image_encoder")
    return folder


@pytest.mark.parametrize("memmap", [True, False])
@pytest.mark.parametrize("form", [with_prefix, without_prefix, as_snapshot])
def test_forms(siglip, image: np.ndarray, tmp_path: Path, form: Callable, memmap: bool) -> None:
    model = load(form(tmp_path, siglip), memmap=memmap)
    assert model.state_dict().keys() == siglip.state_dict().keys()
    assert torch.equal(model.embeddings.position_ids, torch.arange(729)[None])
    features = ours.encode_image(model, image)
    assert features.shape == (729, 72) and not features.requires_grad
    assert_close(features, wanted_features(siglip, image))


@pytest.mark.parametrize("form", [with_prefix, as_snapshot])
def test_without_the_head(image: np.ndarray, tmp_path: Path, form: Callable) -> None:
    whole = siglip_model(head=False)
    assert_close(ours.encode_image(load(form(tmp_path, whole)), image), wanted_features(whole, image))


@pytest.mark.parametrize("size", [(384, 384), (3, 3), (3, 500), (640, 416)])
def test_any_size(siglip, tmp_path: Path, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert_close(ours.encode_image(load(with_prefix(tmp_path, siglip)), image), wanted_features(siglip, image))


def test_images_of_several_sizes_in_one_batch(siglip, tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    images = [noise.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((64, 48), (400, 200), (384, 384))]
    model = load(with_prefix(tmp_path, siglip))
    together = ours.encode_images(model, images)
    assert together.shape == (3, 729, 72) and not together.requires_grad
    for features, image in zip(together, images, strict=True):
        assert_close(features, wanted_features(siglip, image))


def test_black(siglip, tmp_path: Path) -> None:
    image = np.zeros((64, 48, 3), dtype=np.uint8)
    assert_close(ours.encode_image(load(with_prefix(tmp_path, siglip)), image), wanted_features(siglip, image))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types(siglip, image: np.ndarray, tmp_path: Path, dtype: torch.dtype) -> None:
    model = ours.load_siglip(ours.open_siglip(with_prefix(tmp_path, siglip)), dtype=dtype, device="cpu")
    assert ours.encode_image(model, image).dtype == dtype


def test_what_shapes_do_not_tell_comes_from_the_config(image: np.ndarray, tmp_path: Path) -> None:
    whole = siglip_model(num_attention_heads=8, hidden_act="relu", layer_norm_eps=0.1)
    assert_close(ours.encode_image(load(as_snapshot(tmp_path, whole)), image), wanted_features(whole, image))


def test_the_published_size(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
    with torch.device("meta"):
        state = SiglipVisionModel(SiglipVisionConfig(image_size=384, patch_size=14, **sizes)).state_dict()
    infos = {k: TensorInfo(file=tmp_path, key=k, dtype="F16", shape=tuple(t.shape)) for k, t in state.items()}
    checkpoint = Checkpoint(flag="--image_encoder", path=tmp_path, files=(), tensors=infos, config={})
    model = empty_module(lambda: ours._build(checkpoint))
    check_names_and_shapes(model, checkpoint)
    assert model.config.num_attention_heads == 16


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("post_layernorm.bias", None, r"no post_layernorm\.bias \(1 missing of"),
        ("head.probe", None, r"no head\.probe"),
        ("head.extra", torch.zeros(1), r"1 unexpected tensors, head\.extra first"),
        ("embeddings.position_embedding.weight", torch.zeros(256, 72), r"embeddings\.position_embedding\.weight of"),
    ],
)
def test_broken_files(siglip, tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = {key: value for key, value in (siglip.state_dict() | {name: tensor}).items() if value is not None}
    with pytest.raises(UserError, match=rf"--image_encoder .*siglip\.safetensors: got {message}"):
        load(saved(tmp_path, tensors))


def test_another_models_file(tmp_path: Path) -> None:
    names = ("text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.self_attn.q_proj.weight")
    with pytest.raises(UserError, match="a CLIP-L text encoder; expected a SigLIP image encoder; .*--text_encoder2"):
        ours.open_siglip(saved(tmp_path, {name: torch.zeros(1) for name in names}))
