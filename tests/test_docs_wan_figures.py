"""The figures of `docs/wan.md`: weights, layers of LoRAs, and what makes which card do, of the published models."""

from __future__ import annotations

import re

import pytest
import torch

from modules.swapping import SwapWish
from modules.transformer_plan import EmptyTransformers
from modules.weight_sizes import whole_weights
from options.memory_size import MemorySize
from options.wan_request import WanRequestFlags
from options.wan_tasks import find_task
from tests import guides
from tests.published import described, published_wan, published_wan_models
from wan.compute import Compute, encoder_types
from wan.memory import t5_weights
from wan.plan import empty_transformers, plan_generation

TEXT = guides.text_of("docs/wan.md")
GPU = torch.device("cuda")
"""That is only asked for its types."""
TRANSFORMERS = {
    "i2v_14B": "i2v-14B",
    "flf2v_14B": "flf2v-14B",
    "fun_control_14B": "…-14B-FC",
    "t2v_14B": "t2v-14B",
    "t2v_1.3B": "t2v-1.3B",
    "fun_control_1.3B": "t2v-1.3B-FC",
}
"""The published ones, and what the guide calls them."""


@pytest.fixture(scope="module")
def i2v() -> EmptyTransformers:
    return transformers_of("i2v_14B")


def transformers_of(name: str) -> EmptyTransformers:
    return empty_transformers(described("--dit", published_wan(name), "BF16"), None, torch.bfloat16)


def weights(transformers: EmptyTransformers, num_blocks: int, *, offload: bool, for_training: bool) -> list[str]:
    """On the device and in RAM, in bfloat16 and in fp8, as the tables say it."""
    swap = SwapWish(for_training=for_training).options(transformers.limits, num_blocks, offload=offload)
    nothing = SwapWish().options(transformers.limits, 0, offload=False)
    found = []
    for fp8 in ("off", "scaled"):
        placed, whole = transformers.placed(fp8, swap), transformers.placed(fp8, nothing).stays
        on_device, in_ram = placed.stays + placed.block_slots + placed.prepare_slots, whole - placed.stays
        found += [f"{on_device / 1e9:.1f} GB", f"{in_ram / 1e9:.1f} GB" if in_ram else ""]
    return found


def test_weights_in_generation_are_computed(i2v) -> None:
    for option, *figures in guides.rows(TEXT, "option", "on the GPU"):
        count = re.search(r"\d+", option)
        offload = option != "(none)"
        assert figures == weights(i2v, int(count[0]) if count else 0, offload=offload, for_training=False)
    for name, words in (("t2v_14B", "takes {} GB, with `--fp8_scaled` {}"), ("t2v_1.3B", "`t2v-1.3B` {} and {}.")):
        whole, _, scaled, _ = weights(transformers_of(name), 0, offload=False, for_training=False)
        assert words.format(whole[:-3], scaled[:-3]) in TEXT


def test_weights_in_training_are_computed(i2v) -> None:
    table = guides.rows(TEXT, "N of `--blocks_to_swap`", "on the GPU")
    assert int(table[-1][0]) == i2v.limits.most_in_training == i2v.limits.most_in_generation
    for count, *figures in table:
        assert figures == weights(i2v, int(count), offload=False, for_training=True)


def test_sizes_of_encoders_are_computed() -> None:
    models = published_wan_models("i2v_14B")
    plain, eight = (t5_weights(models.t5, itemsize=2, fp8=fp8) / 1e9 for fp8 in (False, True))
    assert f"UMT5 takes {eight:.1f} GB instead of {plain:.1f}" in TEXT
    sizes = [whole_weights(checkpoint, itemsize=2) / 1e9 for checkpoint in (models.clip, models.vae)]
    assert "CLIP ({:.1f} GB) and, while the transformer computes, the VAE ({:.1f} GB)".format(*sizes) in TEXT


def test_what_swapping_copies_is_computed(i2v) -> None:
    whole, swapped = (
        i2v.placed("off", SwapWish().options(i2v.limits, count, offload=False)).stays for count in (0, 20)
    )
    assert f"20 blocks in bfloat16 are {(whole - swapped) / 1e9:.1f} GB for every pass" in TEXT


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_layers_and_numbers_of_a_lora_are_counted(name: str) -> None:
    (row,) = (row for row in guides.rows(TEXT, "transformer", "layers") if f"`{TRANSFORMERS[name]}`" in row[0])
    rank = int(re.search(r"numbers at rank (\d+)", TEXT)[1])
    matrices = [
        shape
        for path, shape in published_wan(name).items()
        if re.fullmatch(r"blocks\..*\.weight", path) and len(shape) == 2
    ]
    assert row[1:] == [str(len(matrices)), f"{rank * sum(map(sum, matrices)) / 1e6:.1f} million"]


def word_tokens(text: str, **_: object) -> dict[str, list[int]]:
    """Stands in for the tokenizer: a token for each word, and the end token."""
    return {"input_ids": [1] * (len(text.split()) + 1)}


def flags_for(what: str) -> WanRequestFlags:
    """What a row of the table is about."""
    task = find_task(guides.in_backticks(what)[0])
    width, height = map(int, re.search(r"(\d+)x(\d+)", what).groups())
    given = {"image_path": "絵.png"} if task.takes_image else {}
    if "one frame with one control image" in what:
        given |= {"one_frame_inference": "target_index=1,control_index=0", "control_image_path": ("絵.png",)}
    else:
        given |= {"video_length": int(re.search(r"(\d+) frames", what)[1])}
    return WanRequestFlags(task=task, prompt="猫", video_size=(height, width), exact_size=True, **given)


@pytest.mark.parametrize("number", range(3))
def test_what_makes_it_fit_is_what_the_plan_says(number: int) -> None:
    what, *found = guides.rows(TEXT, "", "24GB")[number]
    request = flags_for(what).resolve(image_size=lambda path, **_: (832, 480))
    name = request.task.name.replace("-", "_")
    swap = SwapWish(offload_invariant="auto")
    compute = Compute(device=GPU, transformer_dtype=torch.bfloat16, swap=swap, **encoder_types(GPU))
    models, transformers = published_wan_models(name), transformers_of(name)
    plan = plan_generation(models, compute, request, transformers, tokenizer=word_tokens)
    for size, options in zip(("24GB", "16GB", "12GB", "8GB"), found, strict=True):
        verdict = plan.text(MemorySize.parse(size)).partition(f"\nin {size}\n")[2].strip()
        assert verdict.startswith("fits: " if options == "none" else f"fits with {options.strip('`')}: ")
