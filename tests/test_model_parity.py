"""Our transformer against diffusers' `HunyuanVideoFramepackTransformer3DModel`: same weights, same inputs, float32."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from common.weights import Checkpoint, TensorInfo
from frame_pack.config import FramePackConfig
from frame_pack.context import CleanFrames, PackedContext, f1_context, one_frame_context, section_context
from frame_pack.model import Conditioning, FramePackTransformer
from frame_pack.rope import RopeScaling
from options.errors import UserError
from options.one_frame import OneFrameOptions

HEIGHT, WIDTH, WINDOW, NUM_TEXT = 6, 10, 3, 7
SIZES = {"text_embed_dim": 48, "pooled_projection_dim": 24, "image_proj_dim": 36}
TOLERANCE = 1e-5


def checkpoint_of(shapes: Mapping[str, Sequence[int]]) -> Checkpoint:
    """A checkpoint that is known by its header only."""
    file = Path("dit.safetensors")
    tensors = {n: TensorInfo(file=file, key=n, dtype="F32", shape=tuple(shape)) for n, shape in shapes.items()}
    return Checkpoint(flag="--dit", path=file, files=(file,), tensors=tensors, config={})


@pytest.fixture(scope="module")
def oracle() -> HunyuanVideoFramepackTransformer3DModel:
    torch.manual_seed(0)
    return HunyuanVideoFramepackTransformer3DModel(
        num_attention_heads=2,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        has_image_proj=True,
        has_clean_x_embedder=True,
        **SIZES,
    ).eval()


@pytest.fixture(scope="module")
def transformer(oracle) -> FramePackTransformer:
    shapes = {name: tuple(tensor.shape) for name, tensor in oracle.state_dict().items()}
    model = FramePackTransformer(FramePackConfig.from_checkpoint(checkpoint_of(shapes))).eval()
    model.load_state_dict(oracle.state_dict())
    return model


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latent(frames: int, seed: int) -> torch.Tensor:
    return random(1, 16, frames, HEIGHT, WIDTH, seed=seed)


def section(seed: int = 1, padding: int = 1) -> PackedContext:
    return section_context(latent(1, seed), latent(19, seed + 1), padding=padding, window=WINDOW)


def one_frame(options: str, num_controls: int = 1, seed: int = 1) -> PackedContext:
    controls = [latent(1, seed + i) for i in range(num_controls)]
    parsed = OneFrameOptions.parse(options).resolve(num_controls)
    return one_frame_context(controls, [None] * num_controls, parsed, window=WINDOW, like=controls[0])


def conditioning(context: PackedContext, lengths: tuple[int, ...] = (NUM_TEXT,), seed: int = 5) -> Conditioning:
    batch = len(lengths)
    return Conditioning(
        context=context,
        text=random(batch, NUM_TEXT + 2, SIZES["text_embed_dim"], seed=seed),
        text_mask=torch.arange(NUM_TEXT + 2) < torch.tensor(lengths)[:, None],
        pooled=random(batch, SIZES["pooled_projection_dim"], seed=seed + 1),
        image=random(batch, 11, SIZES["image_proj_dim"], seed=seed + 2),
        guidance=torch.linspace(9984.0, 6016.0, batch),
    )


def item(inputs: Conditioning, index: int) -> Conditioning:
    """One sample of a batch."""

    def group(frames: CleanFrames | None) -> CleanFrames | None:
        return frames and CleanFrames(latents=frames.latents[index, None], indices=frames.indices[index, None])

    context = inputs.context
    groups = {name: group(getattr(context, name)) for name in ("clean", "clean_2x", "clean_4x")}
    names = ("text", "text_mask", "pooled", "image", "guidance")
    tensors = {name: getattr(inputs, name)[index, None] for name in names}
    return Conditioning(context=replace(context, indices=context.indices[index, None], **groups), **tensors)


def stack(first: PackedContext, second: PackedContext) -> PackedContext:
    """Two contexts as a batch."""

    def group(name: str) -> CleanFrames | None:
        pair = [getattr(context, name) for context in (first, second)]
        if pair[0] is None:
            return None
        return CleanFrames(latents=torch.cat([g.latents for g in pair]), indices=torch.cat([g.indices for g in pair]))

    groups = {name: group(name) for name in ("clean", "clean_2x", "clean_4x")}
    return PackedContext(indices=torch.cat([first.indices, second.indices]), **groups)


def diffusers_forward(oracle, latents, timesteps, inputs: Conditioning, monkeypatch) -> torch.Tensor:
    """The oracle's forward. It always wants both histories and takes one index list per batch: absent groups are given
    as dummies and taken out again where tokens are packed."""
    context = inputs.context
    absent = {f"latents_history_{s}" for s in ("2x", "4x") if getattr(context, f"clean_{s}") is None}
    history = {}
    for scale in ("2x", "4x"):
        group = getattr(context, f"clean_{scale}") or CleanFrames(
            latents=torch.zeros_like(latents[:, :, :1]), indices=torch.zeros(len(latents), 1, dtype=torch.int64)
        )
        history[f"latents_history_{scale}"] = group.latents
        history[f"indices_latents_history_{scale}"] = group.indices[0]
    pack = type(oracle)._pack_history_states

    def pack_without(hidden, clean, history_2x, history_4x, *rest):
        given = {"latents_history_2x": history_2x, "latents_history_4x": history_4x}
        kept = [None if name in absent else tokens for name, tokens in given.items()]
        return pack(oracle, hidden, clean, *kept, *rest)

    monkeypatch.setattr(oracle, "_pack_history_states", pack_without)
    return oracle(
        hidden_states=latents,
        timestep=timesteps,
        encoder_hidden_states=inputs.text,
        encoder_attention_mask=inputs.text_mask,
        pooled_projections=inputs.pooled,
        image_embeds=inputs.image,
        guidance=inputs.guidance,
        indices_latents=context.indices[0],
        latents_clean=context.clean.latents,
        indices_latents_clean=context.clean.indices[0],
        return_dict=False,
        **history,
    )[0]


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= TOLERANCE, f"relative error {error:.2e}"


CONTEXTS = {
    "inverted section": lambda: section(),
    "section without padding": lambda: section(padding=0),
    "f1": lambda: f1_context(latent(1, 1), latent(20, 2), window=WINDOW),
    "1f-mc": lambda: one_frame("target_index=9,control_index=0;1", 2),
    "kisekaeichi": lambda: one_frame("target_index=1,control_index=0;10,no_post,no_2x,no_4x", 2),
    "unsorted and far": lambda: one_frame("target_index=40,control_index=13;0;13,no_4x", 3),
}
for post in ("", "no_post"):
    for far_2x in ("", "no_2x"):
        for far_4x in ("", "no_4x"):
            options = ",".join(filter(None, ("default", post, far_2x, far_4x)))
            CONTEXTS[f"one frame {options}"] = lambda options=options: one_frame(options)


@torch.no_grad()
@pytest.mark.parametrize("name", CONTEXTS)
def test_equals_diffusers_for_every_context(name, oracle, transformer, monkeypatch):
    inputs = conditioning(CONTEXTS[name]())
    latents, timesteps = latent(inputs.context.num_target_frames, 9), torch.tensor([613.5])
    ours = transformer(latents, timesteps, inputs)
    assert_equal(ours, diffusers_forward(oracle, latents, timesteps, inputs, monkeypatch))


@torch.no_grad()
def test_batch_with_unequal_text_lengths_equals_diffusers(oracle, transformer, monkeypatch):
    inputs = conditioning(stack(section(1), section(20)), lengths=(NUM_TEXT, 3))
    latents, timesteps = random(2, 16, WINDOW, HEIGHT, WIDTH, seed=9), torch.tensor([900.0, 120.0])
    ours = transformer(latents, timesteps, inputs)
    assert_equal(ours, diffusers_forward(oracle, latents, timesteps, inputs, monkeypatch))


@torch.no_grad()
def test_batch_with_unequal_indices_equals_diffusers_item_by_item(oracle, transformer, monkeypatch):
    contexts = [one_frame(f"target_index={t},control_index=0;{c}", 2, seed=t) for t, c in ((1, 10), (13, 4))]
    inputs = conditioning(stack(*contexts), lengths=(2, NUM_TEXT))
    latents, timesteps = random(2, 16, 1, HEIGHT, WIDTH, seed=9), torch.tensor([900.0, 120.0])
    ours = transformer(latents, timesteps, inputs)
    for i in range(2):
        single = slice(i, i + 1)
        theirs = diffusers_forward(oracle, latents[single], timesteps[single], item(inputs, i), monkeypatch)
        assert_equal(ours[single], theirs)


@torch.no_grad()
@pytest.mark.parametrize("timestep", [799.0, 800.0, 950.0])
def test_rope_scaling_squeezes_rows_and_columns_from_the_threshold_on(timestep, oracle, transformer, monkeypatch):
    inputs = conditioning(one_frame("default"))
    latents, timesteps = latent(1, 9), torch.tensor([timestep])
    scaling = RopeScaling(factor=0.5, timestep_threshold=800)
    ours = transformer.step(latents, transformer.prepare(inputs, timesteps[None], rope_scaling=scaling), 0)

    def scaled_rope(frame_indices, height, width, device):
        factor = 0.5 if timestep >= 800 else 1.0
        axes = (frame_indices.float(), torch.arange(height // 2) * factor, torch.arange(width // 2) * factor)
        grids = zip((16, 56, 56), torch.meshgrid(*axes, indexing="ij"), strict=True)
        tables = [get_1d_rotary_pos_embed(size, g.reshape(-1), 256.0, use_real=True) for size, g in grids]
        return tuple(torch.cat([table[part] for table in tables], dim=1) for part in (0, 1))

    monkeypatch.setattr(oracle.rope, "forward", scaled_rope)
    assert_equal(ours, diffusers_forward(oracle, latents, timesteps, inputs, monkeypatch))
    unscaled = transformer(latents, timesteps, inputs)
    assert torch.equal(ours, unscaled) == (timestep < 800)


@torch.no_grad()
def test_preparing_all_steps_at_once_equals_one_forward_per_step(transformer):
    inputs = conditioning(section())
    timesteps = torch.tensor([[1000.0], [892.2], [341.0]])
    prepared = transformer.prepare(inputs, timesteps)
    for i, timestep in enumerate(timesteps):
        latents = latent(WINDOW, 30 + i)
        assert_equal(transformer.step(latents, prepared, i), transformer(latents, timestep, inputs))


@torch.no_grad()
def test_what_the_latents_do_not_change_is_computed_once_for_all_steps(transformer):
    calls: dict[str, int] = {}
    once = ["context_embedder", "image_projection", "clean_x_embedder.proj", "clean_x_embedder.proj_4x", "norm_out"]
    once += ["time_text_embed", "transformer_blocks.1.norm1.linear", "single_transformer_blocks.0.norm.linear"]
    every_step = ["x_embedder.proj", "transformer_blocks.1.attn.to_q", "single_transformer_blocks.0.proj_out"]

    def count(name: str):
        return lambda *_: calls.update({name: calls.get(name, 0) + 1})

    hooks = [transformer.get_submodule(name).register_forward_hook(count(name)) for name in once + every_step]
    prepared = transformer.prepare(conditioning(section()), torch.tensor([[1000.0], [600.0], [300.0]]))
    for step in range(3):
        transformer.step(latent(WINDOW, 9), prepared, step)
    for hook in hooks:
        hook.remove()
    assert calls == dict.fromkeys(once, 1) | dict.fromkeys(every_step, 3)


def test_prepare_keeps_gradients(transformer):
    """A LoRA may sit on a norm's linear layer."""
    linear = transformer.single_transformer_blocks[0].norm.linear
    linear.weight.grad = None
    velocity = transformer(latent(WINDOW, 9), torch.tensor([500.0]), conditioning(section()))
    velocity.square().mean().backward()
    assert linear.weight.grad.abs().max() > 0
    transformer.zero_grad(set_to_none=True)


@torch.no_grad()
def test_padding_rows_of_the_text_do_not_matter(transformer):
    inputs = conditioning(section(), lengths=(4,))
    latents, timesteps = latent(WINDOW, 9), torch.tensor([500.0])
    other = replace(inputs, text=torch.where(inputs.text_mask[..., None], inputs.text, torch.tensor(1e4)))
    assert torch.equal(transformer(latents, timesteps, inputs), transformer(latents, timesteps, other))


def test_another_models_config_beside_the_file_does_not_set_the_rotary_base(oracle):
    shapes = {name: tuple(tensor.shape) for name, tensor in oracle.state_dict().items()}
    checkpoint = checkpoint_of(shapes)
    llama = replace(checkpoint, config={"model_type": "llama", "rope_theta": 500000})
    assert FramePackConfig.from_checkpoint(llama).rope_theta == 256
    own = {"_class_name": "HunyuanVideoTransformer3DModelPacked", "rope_theta": 128, "rope_axes_dim": [32, 48, 48]}
    config = FramePackConfig.from_checkpoint(replace(checkpoint, config=own))
    assert (config.rope_theta, config.rope_axes) == (128, (32, 48, 48))
    with pytest.raises(UserError, match="rotary axes"):
        FramePackConfig.from_checkpoint(replace(checkpoint, config=own | {"rope_axes_dim": [16, 56]}))


def test_names_and_shapes_of_the_full_size_model_are_the_published_ones():
    """1274 tensors, on the meta device; the sizes are read from the table itself."""
    published = json.loads((Path(__file__).parent / "data" / "framepack_dit_shapes.json").read_text(encoding="utf-8"))
    config = FramePackConfig.from_checkpoint(checkpoint_of(published))
    assert config == FramePackConfig()
    with torch.device("meta"):
        model = FramePackTransformer(config)
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == published
    assert len(published) == 1274
