"""What tests of a training step share: a small transformer with random weights, items as cached, a LoRA, an oracle.

diffusers and PEFT are imported by what needs them only: processes of their own come here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor

from dataset.config import load_dataset_config
from dataset.epochs import ItemKey, Position
from dataset.sources import list_items
from dataset.training_dataset import TrainBatch
from frame_pack.architecture import FramePackArchitecture
from frame_pack.cached_context import clip_contexts, to_cache
from frame_pack.caching import FramePackCacheRules
from frame_pack.config import FramePackConfig
from frame_pack.context import one_frame_context
from frame_pack.model import FramePackTransformer
from networks import lora_framepack
from networks.network import Network
from options.flags_timesteps import TimestepFlags
from options.one_frame import OneFrameOptions
from tests.train_caches import cache_image, cache_text, image_set
from training.objective import BatchLoss, Objective

if TYPE_CHECKING:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

CONFIG = FramePackConfig(
    width=256,
    mlp_width=1024,
    num_double_blocks=2,
    num_single_blocks=2,
    num_refiner_blocks=1,
    text_width=48,
    pooled_width=24,
    image_width=36,
)
NUM_BLOCKS = 4
HEIGHT, WIDTH, WINDOW, NUM_ROWS = 6, 4, 3, 9
SEED, EPOCH = 5, 2
GUIDANCE, GUIDANCE_INPUT = 10.0, 9984.0
"""What a user writes, and what the published pipeline makes of it: 10000, rounded to bfloat16."""
NORMS = {"include_patterns": "['.*norm.*']"}
"""Network arguments that put a LoRA on the layers that make modulations of timesteps."""
TEXTS = ("llama_vec", "llama_attention_mask", "clip_l_pooler")
Contents = dict[str, Tensor]
Gradients = dict[str, Tensor]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- ours ----


def build_transformer() -> FramePackTransformer:
    """Frozen; nothing in it is 0 or 1, as norms are when they are new."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = FramePackTransformer(CONFIG).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def build_network(transformer: FramePackTransformer, *, dropout: float | None = None, **args: str) -> Network:
    """A LoRA as if it had been trained for a while, not applied."""
    network = lora_framepack.create_network(transformer, dim=3, alpha=2.0, neuron_dropout=dropout, args=args)
    for seed, parameter in enumerate(network.parameters()):
        parameter.data = 0.15 * random(*parameter.shape, seed=seed)
    return network.train()


def build_objective(transformer: FramePackTransformer, *, masked: bool = False, **timesteps: object) -> Objective:
    """Noise levels are uniform unless `timesteps`, as the flags are named, say otherwise."""
    flags = replace(TimestepFlags(timestep_sampling="uniform"), **timesteps)
    architecture = FramePackArchitecture(checkpoint=None, distilled_guidance=GUIDANCE, flags=None)
    return Objective(architecture=architecture, transformer=transformer, timesteps=flags, seed=SEED, masked=masked)


def gradients_of(network: Network) -> Gradients:
    """By name; they are gone from the network afterwards."""
    found = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    return found


def loss_and_gradients(objective: Objective, network: Network, batch: TrainBatch) -> tuple[BatchLoss, Gradients]:
    result = objective(batch, epoch=EPOCH)
    result.weighted.backward()
    return result, gradients_of(network)


# ---- items as they are cached ----


def one_frame_item(
    number: int, options: str = "target_index=9,control_index=0;1", *, num_controls: int = 2, length: int = NUM_ROWS
) -> Contents:
    """Another one for each number; `length` rows of text are valid."""
    parsed = OneFrameOptions.parse(options).resolve(num_controls)
    target, *controls = (_latents(1, seed=100 * number + i) for i in range(1 + num_controls))
    context = one_frame_context(controls, [None] * num_controls, parsed, window=WINDOW, like=target)
    return to_cache(target, context, _features(number), with_history=False) | _texts(number, length)


def section_item(number: int, *, f1: bool = False, section: int = 0, length: int = NUM_ROWS) -> Contents:
    """A section of a clip of three."""
    clip = _latents(1 + 3 * WINDOW, seed=100 * number)
    context = clip_contexts(clip, window=WINDOW, f1=f1)[section]
    target = clip[:, :, 1 + section * WINDOW : 1 + (section + 1) * WINDOW]
    return to_cache(target, context, _features(number), with_history=True) | _texts(number, length)


def _latents(frames: int, *, seed: int) -> Tensor:
    return random(1, 16, frames, HEIGHT, WIDTH, seed=seed)


def _features(number: int) -> Tensor:
    return random(7, CONFIG.image_width, seed=100 * number + 50)


def _texts(number: int, length: int) -> Contents:
    return {
        "llama_vec": random(NUM_ROWS, CONFIG.text_width, seed=100 * number + 51).half(),
        "llama_attention_mask": torch.arange(NUM_ROWS) < length,
        "clip_l_pooler": random(CONFIG.pooled_width, seed=100 * number + 52).half(),
    }


def batch_of(items: Mapping[str, Contents]) -> TrainBatch:
    """Name → contents."""
    rows = list(items.values())
    contents = {content: torch.stack([row[content] for row in rows]) for content in rows[0]}
    keys = tuple(ItemKey(dataset=0, name=name, repeat=0) for name in items)
    return TrainBatch(contents=contents, items=keys, after=Position())


def singles(items: Mapping[str, Contents]) -> list[TrainBatch]:
    """Each item as a batch of its own, with what it would be given in a larger one."""
    return [batch_of({name: contents}) for name, contents in items.items()]


# ---- files ----


def write_transformer(path: Path) -> Path:
    """The small transformer as a checkpoint in float32."""
    save_file(build_transformer().state_dict(), path)
    return path


def write_data_set(folder: Path, items: Mapping[str, Contents], *, batch_size: int) -> Path:
    """A data set of one-frame items, name → contents, of a control image at 0 and no history, with its caches."""
    dataset = image_set(folder, tuple(items), resolution=(8 * WIDTH, 8 * HEIGHT))
    lines = [f'{key} = "{getattr(dataset, key).as_posix()}"' for key in ("image_directory", "control_directory")]
    lines += [f'cache_directory = "{dataset.cache_directory.as_posix()}"', 'caption_extension = ".txt"']
    lines += [f"resolution = {list(dataset.resolution)}", f"batch_size = {batch_size}"]
    lines += ["fp_1f_target_index = 9", "fp_1f_clean_indices = [0]", f"fp_latent_window_size = {WINDOW}"]
    config = folder / "データ.toml"
    config.write_text("\n".join(["[[datasets]]", *lines]), encoding="utf-8")
    rules = FramePackCacheRules(mode="one_frame", no_2x=True, no_4x=True)
    (dataset,) = load_dataset_config(config).datasets
    for item in list_items(dataset).items:
        contents = items[item.stem]
        texts = {name: tensor for name, tensor in contents.items() if name in TEXTS}
        latents = {name: tensor for name, tensor in contents.items() if name not in TEXTS}
        cache_image(dataset, item, rules, changes={"clean_latent_2x_indices": None} | latents)
        cache_text(dataset, item, **texts)
    return config


# ---- the oracle ----


def build_oracle(transformer: FramePackTransformer, network: Network) -> HunyuanVideoFramepackTransformer3DModel:
    """diffusers' transformer with the same weights, and PEFT's LoRA with the same factors on the same layers."""
    import peft
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    model = HunyuanVideoFramepackTransformer3DModel(
        num_attention_heads=2,
        num_layers=CONFIG.num_double_blocks,
        num_single_layers=CONFIG.num_single_blocks,
        num_refiner_layers=CONFIG.num_refiner_blocks,
        text_embed_dim=CONFIG.text_width,
        pooled_projection_dim=CONFIG.pooled_width,
        image_proj_dim=CONFIG.image_width,
        has_image_proj=True,
        has_clean_x_embedder=True,
    )
    model.load_state_dict(transformer.state_dict())
    model.add_adapter(peft.LoraConfig(r=3, lora_alpha=2, target_modules=list(network.adapters)))
    for path, adapter in network.adapters.items():
        layer = model.get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(adapter.lora_down.weight)
        layer.lora_B["default"].weight.data.copy_(adapter.lora_up.weight)
    return model


def oracle_gradients(oracle: HunyuanVideoFramepackTransformer3DModel, network: Network) -> Gradients:
    """Named as those of `network`; they are gone from the oracle afterwards."""
    found = {}
    for name, path in network.paths.items():
        layer = oracle.get_submodule(path)
        found[f"{name}.lora_down.weight"] = layer.lora_A["default"].weight.grad
        found[f"{name}.lora_up.weight"] = layer.lora_B["default"].weight.grad
    oracle.zero_grad(set_to_none=True)
    return found


def oracle_loss(
    oracle: HunyuanVideoFramepackTransformer3DModel,
    item: Contents,
    noise: Tensor,
    sigma: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """The loss of one item as the facts have it: x = (1 - t)·latents + t·noise, target = noise - latents, MSE.

    `mask` (1, F, h, w): the mean is over what it lets through.
    """
    latents = item["latents"].float()
    velocity = _oracle_velocity(oracle, (1 - sigma) * latents + sigma * noise, 1000 * sigma, item)
    errors = (velocity - (noise - latents)) ** 2
    if mask is None:
        return errors.mean()
    return (errors * mask).sum() / (mask.sum() * len(errors))


def _oracle_velocity(
    oracle: HunyuanVideoFramepackTransformer3DModel, noisy: Tensor, timestep: Tensor, item: Contents
) -> Tensor:
    """diffusers always wants both histories: absent ones are given as dummies, and taken out where tokens are packed.

    A history with indices but without latents is zeros.
    """
    item = {name: t.float() if t.is_floating_point() else t for name, t in item.items()}
    histories, absent = {}, set()
    for scale in ("2x", "4x"):
        indices = item.get(f"clean_latent_{scale}_indices")
        if indices is None:
            absent.add(f"latents_history_{scale}")
            indices = torch.zeros(1, dtype=torch.int64)
        latents = item.get(f"latents_clean_{scale}", torch.zeros(16, len(indices), *noisy.shape[2:]))
        histories[f"latents_history_{scale}"] = latents[None]
        histories[f"indices_latents_history_{scale}"] = indices
    pack = oracle._pack_history_states

    def pack_without(hidden, clean, history_2x, history_4x, *rest):
        given = {"latents_history_2x": history_2x, "latents_history_4x": history_4x}
        return pack(hidden, clean, *(None if name in absent else tokens for name, tokens in given.items()), *rest)

    with patch.object(oracle, "_pack_history_states", pack_without):
        return oracle(
            hidden_states=noisy[None],
            timestep=timestep[None],
            encoder_hidden_states=item["llama_vec"][None],
            encoder_attention_mask=item["llama_attention_mask"][None],
            pooled_projections=item["clip_l_pooler"][None],
            image_embeds=item["image_embeddings"][None],
            guidance=torch.tensor([GUIDANCE_INPUT]),
            indices_latents=item["latent_indices"],
            latents_clean=item["latents_clean"][None],
            indices_latents_clean=item["clean_latent_indices"],
            return_dict=False,
            **histories,
        )[0][0]


def difference(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest difference in any tensor, relative to that tensor's largest number."""
    assert got.keys() == wanted.keys() and got
    return max(float((got[n] - wanted[n]).abs().max() / wanted[n].abs().max()) for n in wanted)
