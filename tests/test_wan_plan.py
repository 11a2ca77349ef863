"""Wan's plans: the published models on cards of all sizes, the passes of a real run, `--plan` of both scripts."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import wan_generate_video
from common.weights import Checkpoint
from dataset.cached_items import Layout
from demo.wan_models import WanModelPaths, build_wan_models
from modules.block_swap import SwapOptions
from modules.plan import shown_bytes, shown_flops
from modules.swapping import SwapWish
from modules.training_plan import TrainedNumbers, TrainingPlan, TrainOptions
from modules.transformer_plan import EmptyTransformers, Work
from options.guidance import GuidanceOptions, SkipLayers
from options.lora import PromptLora
from options.memory_size import MemorySize
from options.swap_count import SwapCount
from options.wan_request import WanRequest, WanRequestFlags
from options.wan_tasks import find_task
from tests.counted_flops import counted_flops
from tests.guide_tables import GUIDE, rows
from tests.published import described, published_wan, published_wan_models
from tests.wan_training_builders import WanShop, clip_item, one_frame_item, train, write_data, write_dit
from tests.wan_transformers import build_transformer, conditioning
from wan.cached_context import from_batch, to_cache
from wan.compute import Compute, encoder_types
from wan.conditioning import WanConditioning
from wan.config import WanConfig
from wan.context import WanContext, image_context
from wan.costs import Tokens, WanCosts
from wan.loading import FLOAT32
from wan.memory import VaeWork, decode_bytes, encode_bytes, t5_weights
from wan.model import WanTransformer
from wan.plan import GenerationPlan, empty_transformers, plan_generation
from wan.sampling import generate_latents
from wan.training_plan import largest_batch, tokens_of

GPU = torch.device("cuda")
"""That is only asked for its types."""
TASKS = {name: find_task(name) for name in ("t2v-14B", "t2v-1.3B", "i2v-14B", "flf2v-14B", "t2v-1.3B-FC")}
ONE_FRAME = {"one_frame_inference": "target_index=1,control_index=0", "control_image_path": ("絵.png",)}
AUTOMATIC = SwapWish(offload_invariant="auto")


class WordTokenizer:
    """A token for each word, and the end token."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [1] * (len(text.split()) + 1)}


def empty(name: str) -> EmptyTransformers:
    return empty_transformers(described("--dit", published_wan(name), "BF16"), None, torch.bfloat16)


@pytest.fixture(scope="module")
def transformers() -> dict[str, EmptyTransformers]:
    return {name: empty(name) for name in ("i2v_14B", "t2v_1.3B")}


def compute_on(device: torch.device, **changes: object) -> Compute:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return replace(Compute(device=device, transformer_dtype=dtype, swap=AUTOMATIC, **encoder_types(device)), **changes)


def request_of(task: str = "i2v-14B", **flags: object) -> WanRequest:
    given = {"prompt": "猫", "video_size": (480, 832), "exact_size": True, "task": find_task(task)} | flags
    return WanRequestFlags(**given).resolve(image_size=lambda path: (832, 480))


def plan_of(transformers, request: WanRequest, name: str = "i2v_14B", **changes: object) -> GenerationPlan:
    models = published_wan_models(name)
    models = models if request.task.takes_image else replace(models, clip=None)
    compute = compute_on(GPU, **changes)
    return plan_generation(models, compute, request, transformers[name], tokenizer=WordTokenizer())


def verdict(plan: GenerationPlan | TrainingPlan, size: str) -> str:
    return plan.text(MemorySize.parse(size)).partition(f"\nin {size}\n")[2]


# ---- weights ----

ONCE = re.compile(
    r"(time_embedding|time_projection|text_embedding|img_emb\.proj)\.[0-3]\.weight"
    r"|blocks\.\d+\.cross_attn\.[kv](_img)?\.weight"
)
"""What a prompt needs once; two norms of the picture have vectors for weights."""


def test_weights_are_as_large_as_published(transformers) -> None:
    def stays(fp8: str, invariant: str = "none", num_blocks: int = 0) -> float:
        return transformers["i2v_14B"].placed(fp8, SwapOptions(counts=(num_blocks,), invariant=invariant)).stays / 1e9

    shapes = published_wan("i2v_14B")
    kept = sum(math.prod(shape) for name, shape in shapes.items() if FLOAT32.fullmatch(name))
    assert kept == 40 * (6 + 2) * 5120 + 2 * 5120
    every = sum(math.prod(shape) for shape in shapes.values())
    assert stays("off") == pytest.approx((2 * every + 2 * kept) / 1e9, rel=1e-9) == pytest.approx(32.79, abs=0.01)
    once = {name: shape for name, shape in shapes.items() if ONCE.fullmatch(name) and len(shape) == 2}
    assert stays("off") - stays("off", "all") == pytest.approx(2 * sum(map(math.prod, once.values())) / 1e9, rel=1e-9)
    context = [math.prod(shape) for name, shape in once.items() if "cross_attn" in name]
    assert sum(context) / 1e9 == pytest.approx(4.19, abs=0.01)
    block = 6 * 5120**2 + 2 * 5120 * 13824
    assert stays("off") - stays("off", num_blocks=10) == pytest.approx(10 * 2 * block / 1e9, rel=1e-9)
    assert stays("off") - stays("off", "with their blocks", 1) == pytest.approx(2 * (block + 4 * 5120**2) / 1e9)
    assert transformers["i2v_14B"].placed("off", SwapOptions(counts=(10,))).block_slots == 2 * 2 * block
    # One byte for a number and two for the scale of 64.
    assert stays("scaled") == pytest.approx(32.79 - 40 * (block + 4 * 5120**2) * (1 - 2 / 64) / 1e9, abs=0.01)
    assert transformers["i2v_14B"].unpacked("scaled") == 2 * 5120 * 13824


# ---- what is computed ----

CFG = GuidanceOptions()
HALF = GuidanceOptions(cfg_skip_mode="late", cfg_apply_ratio=0.5)
WITHOUT = GuidanceOptions(skip_layers=SkipLayers(blocks=(1, 1), mode="original", end=0.5))
THREE_FRAMES = {"image_path": "始.png", "video_length": 9}
TWO_CONTROLS = {"one_frame_inference": "target_index=1,control_index=0;7", "control_image_path": ("a.png", "b.png")}
INSTEAD = GuidanceOptions(skip_layers=SkipLayers(blocks=(0, 2), mode="uncond", start=0.25, end=1.0))


def of_small_model(request: WanRequest, model: WanTransformer) -> GenerationPlan:
    transformer = described("--dit", {name: tuple(t.shape) for name, t in model.state_dict().items()}, "F32")
    models = replace(published_wan_models("i2v_14B"), transformer=transformer)
    transformers = empty_transformers(transformer, None, torch.float32)
    compute = compute_on(torch.device("cpu"))
    return plan_generation(models, compute, request, transformers, tokenizer=WordTokenizer())


@pytest.mark.parametrize("flags", [THREE_FRAMES, TWO_CONTROLS], ids=["clip", "one frame"])
@pytest.mark.parametrize(
    ("guidance", "cfg_scale", "num_passes"),
    [(CFG, 5.0, 8), (CFG, 1.0, 4), (HALF, 5.0, 6), (HALF, 1.0, 4), (WITHOUT, 5.0, 10), (WITHOUT, 1.0, 6)]
    + [(INSTEAD, 5.0, 8), (INSTEAD, 1.0, 4)],
)
def test_all_operations_are_those_of_a_run(
    guidance: GuidanceOptions, cfg_scale: float, num_passes: int, flags: dict
) -> None:
    """The passes that are run, whole or without some blocks, and what is prepared for them."""
    model, small = build_transformer("i2v"), {"infer_steps": 4, "sample_solver": "vanilla", "video_size": (32, 48)}
    request = replace(request_of(**flags, **small, guidance_scale=cfg_scale, cpu_noise=True), guidance=guidance)
    plan, given = of_small_model(request, model), conditioning(model.config)
    cond = WanConditioning(
        text=given.text[0],
        negative=given.text[0] if plan.denoising.num_passes == 2 else None,
        features=given.image[0],
        context=WanContext(latents=given.latents, indices=given.indices),
        pictures=(),
    )
    found = counted_flops(lambda: generate_latents(model, request, cond, lambda progress: None))
    assert plan.num_operations == found.total and dict(plan._compute())["in all"] == found
    assert f"4 steps, {num_passes} passes" in plan.text(MemorySize.parse("any"))


def test_longer_clips_and_more_controls_compute_more(transformers) -> None:
    sizes = [ONE_FRAME, TWO_CONTROLS, *({"image_path": "始.png", "video_length": n} for n in (17, 81))]
    sizes.append({"image_path": "始.png", "end_image_path": "終.png"})  # which becomes one more latent frame
    found = [plan_of(transformers, request_of(**flags)).num_operations for flags in sizes]
    assert found == sorted(found) and len(set(found)) == 5


# ---- what is on the device ----


def names(plan: GenerationPlan) -> list[str]:
    return [stage.name for stage in plan.stages(plan.options)]


def sizes(plan: GenerationPlan) -> dict[str, int]:
    return {stage.name: stage.num_bytes for stage in plan.stages(plan.options)}


def test_stages_are_those_of_the_task(transformers) -> None:
    middle = ["preparing", "denoising", "VAE decoding"]
    i2v = plan_of(transformers, request_of(image_path="始.png"))
    assert names(i2v) == ["UMT5", "CLIP", "VAE encoding", *middle]
    assert names(plan_of(transformers, request_of("t2v-1.3B"), "t2v_1.3B")) == ["UMT5", *middle]
    control = plan_of(transformers, request_of("t2v-14B-FC", control_path="動.mp4"))
    assert names(control) == ["UMT5", "VAE encoding", *middle]


def test_the_vae_works_on_what_is_shown_and_on_what_is_kept(transformers) -> None:
    one, nine, whole, appended = (
        sizes(plan_of(transformers, request_of(**flags)))
        for flags in (
            {**ONE_FRAME},
            {"image_path": "始.png", "video_length": 9},
            {"image_path": "始.png"},
            {"image_path": "始.png", "end_image_path": "終.png"},
        )
    )
    control = {"task": "i2v-14B-FC", "image_path": "始.png", "control_path": "動.mp4"}
    shown = [{**control}, {**control, "end_image_path": "終.png"}]
    clip, longer = (sizes(plan_of(transformers, request_of(**flags)))["VAE encoding"] for flags in shown)
    assert whole["VAE encoding"] == clip < longer
    assert one["VAE encoding"] < nine["VAE encoding"] < whole["VAE encoding"] == appended["VAE encoding"]
    assert one["VAE decoding"] < nine["VAE decoding"] < whole["VAE decoding"] < appended["VAE decoding"]


def test_what_prompts_need_is_counted(transformers, tmp_path: Path) -> None:
    request = request_of(**ONE_FRAME)
    once = sizes(plan_of(transformers, replace(request, cfg_scale=1.0)))
    twice = sizes(plan_of(transformers, request))
    context, work = 40 * 2 * (512 + 257) * 5120 * 2, 0.353e9
    both = twice["denoising"] - once["denoising"]
    assert both == pytest.approx(context + work, rel=0.03), "and modulations; a picture's passes are one"
    video = request_of(image_path="始.png", video_length=5)
    alone, in_turn = (sizes(plan_of(transformers, replace(video, cfg_scale=scale))) for scale in (1.0, 5.0))
    assert in_turn["denoising"] - alone["denoising"] == pytest.approx(context, rel=0.03)
    longer = sizes(plan_of(transformers, replace(request, prompt="長 い " * 150)))
    assert longer["UMT5"] > twice["UMT5"] and longer["denoising"] == twice["denoising"]
    weights = tmp_path / "絵.safetensors"
    weights.write_bytes(bytes(1000))
    with_lora = sizes(plan_of(transformers, replace(request, loras=(PromptLora(path=str(weights), multiplier=1.0),))))
    assert with_lora["denoising"] == twice["denoising"] + 1000


def test_a_card_is_told_what_it_needs(transformers) -> None:
    plan = plan_of(transformers, request_of(**ONE_FRAME))
    assert verdict(plan, "80GB").startswith("  fits: at most 34.79 GB, in denoising")
    assert verdict(plan, "32GB").splitlines() == [
        "  fits: at most 25.92 GB, in denoising",
        "  --offload_invariant auto takes effect by itself",
    ]
    assert verdict(plan, "24GB").startswith("  fits with --fp8_scaled: at most 19.")
    assert verdict(plan, "16GB").startswith("  fits with --fp8_scaled: at most 14.")
    twelve = re.match(r"  fits with --fp8_scaled --blocks_to_swap (\d+): at most 11\.", verdict(plan, "12GB"))
    assert 0 < int(twelve[1]) < 15
    assert re.match(r"  fits with --fp8_scaled --fp8_t5 --blocks_to_swap \d+: at most 7\.", verdict(plan, "8GB"))
    five = verdict(plan, "5GB").splitlines()
    assert five[0].startswith("  does not fit: UMT5, which takes 7.")
    assert re.match(r"  the rest fits with --fp8_scaled --blocks_to_swap 3\d$", five[1])


def test_a_long_video_is_told_where_its_memory_goes(transformers) -> None:
    request = request_of("t2v-1.3B")
    plan = plan_of(transformers, request, "t2v_1.3B", fp8_t5=True)
    flags = [[change.flag for change in rung] for rung in plan.ladder()]
    assert flags[:3] == [["--offload_invariant auto"], ["--fp8_scaled"], []] and flags[4] == ["--vae_cache_cpu"]
    assert flags[3] == [f"--blocks_to_swap {number}" for number in range(1, 30)]
    (change,) = plan.ladder()[4]
    *_, whole = plan.stages(plan.options)
    *_, less = plan.stages(change.apply(plan.options))
    assert less.name == "VAE decoding" and less.num_bytes < 0.7 * whole.num_bytes
    asked = plan_of(transformers, request, "t2v_1.3B", vae_cache_cpu=True, fp8="scaled")
    assert [[change.flag for change in rung] for rung in asked.ladder()[1:3]] == [[], ["--fp8_t5"]]
    assert asked.ladder()[4] == [] and asked.stages(asked.options)[-1] == less


def test_what_the_flags_say_is_part_of_the_plan(transformers) -> None:
    wish = SwapWish(blocks=SwapCount(value=20), offload_invariant="auto")
    plan = plan_of(transformers, request_of(**ONE_FRAME), swap=wish, fp8="scaled")
    assert (plan.options.num_blocks, plan.options.offload, plan.options.fp8) == (20, True, "scaled")
    assert plan.needed(20, True) == max(sizes(plan)["preparing"], sizes(plan)["denoising"])
    assert plan.needed(39, True) < plan.needed(20, True) < plan.needed(0, False)


def test_the_report_fits_on_a_screen_and_says_what_it_is(transformers) -> None:
    text = plan_of(transformers, request_of(**ONE_FRAME)).text(MemorySize.parse("12GB"))
    lines = text.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 120
    assert lines[1].startswith("  one frame of 832x480, 40 steps, 80 passes; transformer in bfloat16, UMT5 in bfloat16")
    assert "  3120: target 1560, controls 1560" in lines
    assert re.search(r"a pass +84\.5 TFLOP = linear 74\.6 TFLOP \+ attention 9\.9 TFLOP", text)
    assert re.search(r"once +6\.6 TFLOP = linear 6\.6 TFLOP$", text, re.MULTILINE)
    assert re.search(r"UMT5 +11\.3\d GB = weights 11\.36 GB \+ work", text)
    assert re.search(r"denoising +34\.79 GB = weights 32\.79 GB \+ prepared 1\.29 GB \+ work 0\.70 GB", text)
    assert re.search(r"CLIP +1\.26 GB = weights 1\.26 GB$", text, re.MULTILINE)
    assert re.search(r"VAE decoding +0\.79 GB = weights 0\.25 GB \+ work 0\.54 GB", text)
    assert "  each token also sees 512 rows of text and 257 of CLIP features" in lines


@pytest.mark.parametrize(
    ("task", "flags", "said"),
    [
        ("i2v-14B", {"image_path": "始.png"}, "81 frames of 832x480"),
        ("i2v-14B", {"image_path": "始.png", "end_image_path": "終.png"}, "85 frames of 832x480"),
        ("t2i-14B", {}, "one picture of 832x480"),
    ],
)
def test_the_title_says_what_is_made(task: str, flags: dict, said: str, transformers) -> None:
    assert (
        plan_of(transformers, request_of(task, **flags))
        .text(MemorySize.parse("any"))
        .splitlines()[1]
        .strip()
        .startswith(said)
    )


# ---- training ----


def layout_of(tensors: dict[str, torch.Tensor]) -> Layout:
    stacked = ((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items())
    return Layout(stacked=tuple(sorted(stacked)), varlen=("t5",))


def clip_layout(frames: int, height: int = 60, width: int = 104) -> Layout:
    latents = torch.zeros(1, 16, frames, height, width)
    return layout_of(to_cache(latents, image_context(latents)))


PAIR = layout_of(
    {
        "latents": torch.zeros(16, 2, 60, 104),
        "latents_image": torch.zeros(20, 2, 60, 104),
        "clip": torch.zeros(257, 1280),
        "f_indices": torch.zeros(2),
    }
)
I2V = WanConfig.from_checkpoint(described("--dit", published_wan("i2v_14B"), "BF16"))


def test_the_largest_batch_has_the_most_tokens() -> None:
    layouts = ((PAIR, 4), (clip_layout(3), 3), (clip_layout(5), 2), (clip_layout(1, 120, 104), 6))
    batch = largest_batch(I2V, layouts)
    assert (batch.size, batch.latents, batch.num_tokens) == (6, (16, 1, 120, 104), 6 * 2 * 1560)
    assert batch.costs.in_training and str(batch) == "6 items of 832x960, 1 latent frame"
    assert str(largest_batch(I2V, layouts[:3])) == "2 items of 832x480, 5 latent frames"
    assert str(largest_batch(I2V, layouts[:2])) == "3 items of 832x480, 3 latent frames"
    assert str(largest_batch(I2V, layouts[:1])) == "4 items of 832x480, 2 latent frames"


def test_cached_items_have_the_tokens_that_the_model_makes_of_them() -> None:
    model = build_transformer("i2v")
    for contents, controls in ((clip_item(0), 0), (one_frame_item(0, (0, 1, 5)), 2)):
        tokens = tokens_of(layout_of({name: tensor for name, tensor in contents.items() if name != "t5"}))
        context = from_batch({name: tensor[None] for name, tensor in contents.items()}, shows_images=True)
        given = replace(conditioning(model.config), latents=context.latents, indices=context.indices)
        seen = []
        model.blocks[0].register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0].shape[1]))
        model(contents["latents"][None], torch.ones(1), given)
        assert seen == [tokens.total] and tokens.controls == controls * tokens.total // context.num_frames


def training_plan(transformers, **options: object) -> TrainingPlan:
    """Of rank 32, about which layer does not matter."""
    return TrainingPlan(
        transformers=transformers["i2v_14B"],
        batch=largest_batch(I2V, ((PAIR, 1),)),
        numbers=TrainedNumbers(by_layer={"blocks.0.self_attn.q": 179_600_000}, state_bytes=8),
        swap=SwapWish(for_training=True),
        options=TrainOptions(**options),
    )


def parts_of(plan: TrainingPlan) -> dict[str, int]:
    (stage,) = plan.stages(plan.options)
    return dict(stage.parts)


def test_training_is_said_to_take_what_is_published(transformers) -> None:
    for num_checkpointed, flops in ((40, 282e12), (0, 193e12)):
        plan = training_plan(transformers, num_checkpointed=num_checkpointed)
        assert dict(plan._compute())["a step"].total == pytest.approx(flops, rel=0.01)
    found = parts_of(training_plan(transformers, num_checkpointed=40))
    assert found["weights"] == pytest.approx(32.79e9, rel=1e-3) and found["network"] == 4 * 179_600_000
    assert found["kept"] == pytest.approx(1.3e9, abs=0.06e9)


def test_training_fits_by_what_costs_least(transformers) -> None:
    plan = training_plan(transformers)
    assert verdict(plan, "80GB").startswith("  fits")
    assert re.match(r"  fits with --checkpoint_blocks \d+: ", verdict(plan, "48GB"))
    assert re.match(r"  fits with .*--fp8_scaled: at most 23\.", verdict(plan, "24GB"))
    assert re.match(r"  fits with .*--fp8_scaled --blocks_to_swap \d+: at most 15\.", verdict(plan, "16GB"))
    swapped = training_plan(transformers, num_blocks=39)
    assert len(swapped.options.kept(swapped.transformers.limits).checkpointed) == 39
    # Where blocks compute their own keys and values, the weights for these lie in RAM with them.
    own = 2 * (10 * 5120**2 + 2 * 5120 * 13824)
    assert parts_of(swapped)["weights"] == parts_of(plan)["weights"] - 39 * own
    assert parts_of(swapped)["swap"] == 2 * own


# ---- the scripts ----


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> WanModelPaths:
    return build_wan_models(tmp_path_factory.mktemp("模型"))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading any tensor is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(Checkpoint, "read", refuse)


def test_a_generation_is_planned_without_weights(models, material, no_weights, tmp_path: Path, capsys) -> None:
    argv = [part for name, path in vars(models).items() for part in (f"--{name}", str(path))]
    argv += ["--task", "i2v-14B", "--prompt", "窓辺の猫", "--seed", "1", "--infer_steps", "2", "--exact_size"]
    argv += ["--video_size", "64", "96", "--save_path", str(tmp_path / "出力"), "--cfg_skip_mode", "late"]
    argv += ["--cfg_apply_ratio", "0.5", "--control_image_path", str(material.chelsea)]
    argv += ["--one_frame_inference", ONE_FRAME["one_frame_inference"], "--plan"]
    assert wan_generate_video.main(argv) == 0
    said = capsys.readouterr().out
    assert "one frame of 96x64, 2 steps, 3 passes; transformer in bfloat16, UMT5 in bfloat16, CLIP in float16" in said
    assert "  48: target 24, controls 24\n" in said and not list(tmp_path.rglob("*.*"))
    assert wan_generate_video.main([*argv, "1GB", "--device", "cpu"]) == 0
    assert "in 1GB\n  fits: at most" in (said := capsys.readouterr().out) and "transformer in float32" in said


def test_a_training_is_planned_without_weights(no_weights, tmp_path: Path, capsys) -> None:
    data = write_data(tmp_path / "データ", {name: one_frame_item(i) for i, name in enumerate(("a", "猫"))})
    shop = WanShop(folder=tmp_path, dit=write_dit(tmp_path, "i2v"), data=data, task="i2v-14B")
    options = {"device": None, "gradient_checkpointing": True, "one_frame": True, "plan": "1GB"}
    assert train(shop.command(tmp_path / "出力", **options)) == 0
    said = capsys.readouterr().out
    assert "the largest batch: 2 items of 48x32, 2 latent frames; 6 steps; transformer in bfloat16" in said
    assert "  12: target 6, controls 6\n" in said and "in 1GB\n  fits: at most" in said
    assert not (tmp_path / "出力").exists()


# ---- the guide ----


def test_figures_of_passes_in_the_guide_are_computed() -> None:
    """With guidance: two passes, which for a picture are one of a batch of two."""
    clip, picture = (Work(itemsize=2, num_steps=40, **two) for two in ({"num_prepared": 2}, {"batch": 2}))
    found = rows("Wan2.1, pass", "size")
    for what, size, *wanted in found:
        model = "_".join(what.partition(",")[0].split())
        width, height = map(int, size.split("x"))
        config = WanConfig.from_checkpoint(described("--dit", published_wan(model), "BF16"))
        num_controls = next((n for n, word in enumerate(("one", "two"), 1) if f"{word} control" in what), 0)
        num_frames, work = (21, clip) if "81 frames" in what else (1 + num_controls, picture)
        tokens = Tokens(target=num_frames * width * height // 256)
        costs = WanCosts(config=config, tokens=tokens)
        flops, memory = costs.step_flops(), costs.prepared_bytes(work) + costs.step_bytes(work)
        assert wanted == [
            *(str(tokens.total), shown_flops(flops.linear), shown_flops(flops.attention), shown_bytes(memory))
        ]
    assert len(found) == 7


def test_what_options_save_in_the_guide_is_computed(transformers) -> None:
    def stays(fp8: str, invariant: str = "none", num_blocks: int = 0) -> int:
        return transformers["i2v_14B"].placed(fp8, SwapOptions(counts=(num_blocks,), invariant=invariant)).stays

    t5 = published_wan_models("i2v_14B").t5
    kept = [
        parts_of(training_plan(transformers, num_checkpointed=n, in_ram=in_ram))["kept"]
        for n, in_ram in ((0, False), (40, False), (40, True))
    ]
    saved = {
        "`--offload_invariant always`": stays("off") - stays("off", "all"),
        "`--fp8_scaled`": stays("off") - stays("scaled"),
        "`--fp8_t5`": t5_weights(t5, itemsize=2, fp8=False) - t5_weights(t5, itemsize=2, fp8=True),
        "`--blocks_to_swap N`": stays("off") - stays("off", num_blocks=1),
        "`--gradient_checkpointing`": kept[0] - kept[1],
        "`--gradient_checkpointing_cpu_offload`": kept[1] - kept[2],
    }
    told = {option: saves for option, saves, _ in rows("option, Wan2.1", "saves")}
    for option, size in saved.items():
        assert float(told[option].split(" GB")[0]) == pytest.approx(size / 1e9, abs=0.05), option


def test_figures_of_weights_in_the_guide_are_computed(transformers) -> None:
    found = re.findall(r"of (\w+ [\d.]+B) (?:has )?([\d.]+) GB", GUIDE)
    for name, told in found:
        size = empty(name.replace(" ", "_")).placed("off", SwapOptions(counts=(0,))).stays
        assert float(told) == pytest.approx(size / 1e9, abs=0.05), name
    assert len(found) == 3


def test_figures_of_the_vae_in_the_guide_are_computed() -> None:
    vae, found = published_wan_models("i2v_14B").vae, rows("Wan's VAE", "decoding")
    works = [VaeWork.of(vae, itemsize=2, cache_on_cpu=cache) for cache in (False, True)]
    for what, *wanted in found:
        width, height = map(int, what.split()[-1].split("x"))
        latents, frames = (21, 81) if "81" in what else (1, 1)
        decoding = [decode_bytes(work, latents, height, width) for work in works]
        encoding = [encode_bytes(work, frames, height, width) for work in works]
        assert wanted == list(map(shown_bytes, decoding + encoding))
    assert len(found) == 4
