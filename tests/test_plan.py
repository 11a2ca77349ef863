"""Plans: the search for options that make a run fit, reports on the published model, and `--plan` of both scripts."""

import itertools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import fpack_generate_video
import fpack_train_network
from frame_pack.config import FramePackConfig
from frame_pack.costs import FramePackCosts, Tokens, context_of
from frame_pack.plan import GenerationPlan, MemoryOptions, PromptLength, empty_transformers
from hunyuan_model.memory import VaeWork, decode_bytes, llama_weights
from modules.block_swap import SwapOptions
from modules.denoising_plan import Denoising
from modules.plan import Change, Stage, find_fit, shown_bytes, shown_flops
from modules.swapping import SwapWish
from modules.training_plan import TrainedBatch, TrainedNumbers, TrainingPlan, TrainOptions
from modules.transformer_plan import EmptyTransformers, Work
from options.fpack_request import FramePackRequestFlags
from options.memory_size import MemorySize
from options.swap_count import SwapCount
from tests.guide_tables import rows
from tests.published import published_models, published_shapes, published_transformer, published_vae
from tests.training_driver import write_workshop

NEVER = SwapWish(blocks=SwapCount(), offload_invariant="never")
TOKENS = Tokens(target=1600, clean=1600, clean_2x=0, clean_4x=0, image=729, text=100)
C0 = FramePackCosts(config=FramePackConfig(), tokens=TOKENS)


# ---- sizes ----


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("12", 12e9), ("12GB", 12e9), ("11.5 gb", 11.5e9), ("12GiB", 12 * 2**30), ("800MB", 8e8), ("any", None)],
)
def test_sizes_are_read_as_they_are_written(text: str, num_bytes: float | None) -> None:
    size = MemorySize.parse(text)
    assert size.num_bytes == num_bytes and MemorySize.parse(str(size)) == size


@pytest.mark.parametrize("text", ["", "0", "-3", "12TB", "GB", "1e9", "12 34", "0.0GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        MemorySize.parse(text)


# ---- the search ----


@dataclass(frozen=True)
class Knobs:
    a: int = 0
    b: int = 0
    c: int = 0


def knob(name: str, most: int) -> list[Change[Knobs]]:
    return [
        Change(flag=f"{name}{value}", apply=lambda o, value=value: replace(o, **{name: value}))
        for value in range(1, most + 1)
    ]


LADDER = [knob("a", 1), knob("b", 4), knob("c", 1)]


def two_stages(o: Knobs) -> list[Stage]:
    one, other = 100 - 5 * o.a - 10 * o.b - 30 * o.c, 90 - 5 * o.a - 12 * o.b
    return [Stage(name="one", parts=(("x", one),)), Stage(name="other", parts=(("x", other),))]


def sizes_with(changes: tuple[Change[Knobs], ...]) -> int:
    options = Knobs()
    for change in changes:
        options = change.apply(options)
    return max(stage.num_bytes for stage in two_stages(options))


@pytest.mark.parametrize("limit", range(20, 106, 3))
def test_the_fit_is_there_when_there_is_one_and_nothing_in_it_is_idle(limit: int) -> None:
    choices = itertools.product(*([None, *rung] for rung in LADDER))
    best = min(sizes_with(tuple(change for change in chosen if change)) for chosen in choices)
    fit = find_fit(Knobs(), LADDER, two_stages, limit)
    assert bool(fit.too_large) == (best > limit)
    if best > limit:
        return
    assert sizes_with(fit.changes) <= limit
    for change in fit.changes:
        rung = next(rung for rung in LADDER if change in rung)
        without = tuple(other for other in fit.changes if other is not change)
        milder = (*without, rung[rung.index(change) - 1]) if rung.index(change) else without
        assert sizes_with(without) > limit and sizes_with(milder) > limit


@pytest.mark.parametrize(
    ("limit", "flags"), [(100, []), (95, ["a1"]), (86, ["a1", "b1"]), (85, ["a1", "b1"]), (90, ["b1"]), (70, ["b3"])]
)
def test_the_cheapest_come_first(limit: int, flags: list[str]) -> None:
    assert [change.flag for change in find_fit(Knobs(), LADDER, two_stages, limit).changes] == flags


# ---- the published model ----

ONCE = re.compile(
    r"((single_)?transformer_blocks\.\d+\.norm.*linear|norm_out\.linear|image_projection\..*"
    r"|(context_embedder\.)?time_text_embed\..*|context_embedder\.(proj_in|.*(attn|ff|linear).*))\.weight"
)
"""What a prompt needs once."""


@pytest.fixture(scope="module")
def transformers() -> EmptyTransformers:
    return empty_transformers(published_transformer(), None, torch.bfloat16)


def test_weights_are_as_large_as_published(transformers: EmptyTransformers) -> None:
    def stays(fp8: str, invariant: str = "none", counts: tuple[int, int] = (0, 0)) -> float:
        return transformers.placed(fp8, SwapOptions(counts=counts, invariant=invariant)).stays / 1e9

    assert stays("off") == pytest.approx(25.75, abs=0.01)
    assert stays("scaled") == pytest.approx(16.97, abs=0.01)
    once = {name: math.prod(shape) for name, shape in published_shapes("framepack_dit").items() if ONCE.fullmatch(name)}
    modulations = sum(count for name, count in once.items() if "transformer_blocks." in name)
    assert 16.97 - 2 * modulations / 1e9 == pytest.approx(10.17, abs=0.01)
    assert stays("scaled", "all") == pytest.approx(16.97 - 2 * sum(once.values()) / 1e9, abs=0.01)
    slots = transformers.placed("off", SwapOptions(counts=(10, 21))).block_slots / 1e9
    assert slots == pytest.approx(2 * 2 * 2 * (4 * 3072**2 + 2 * 3072 * 12288) / 1e9, rel=0.01)  # of double blocks
    assert stays("off", counts=(10, 21)) == pytest.approx(25.75 - 2 * 9.06 * 41 / 80, abs=0.02)
    assert transformers.unpacked("off") == 0 and transformers.unpacked("scaled") == 2 * 3072 * 15360


def plan_of(transformers: EmptyTransformers, *, swap: SwapWish = NEVER, options=None, **flags) -> GenerationPlan:
    given = {"prompt": "猫", "video_size": (640, 640), "one_frame_inference": "no_2x,no_4x,no_post"} | flags
    request = FramePackRequestFlags(**given).resolve(image_size=lambda path: (640, 640))
    work = {"num_steps": request.num_steps, "num_passes": 2 if request.uses_cfg else 1}
    return GenerationPlan(
        files=published_models(),
        request=request,
        prompt=PromptLength(num_rows=100, num_prefix=95),
        section=Denoising(transformers=transformers, costs=C0, swap=swap, **work),
        options=options or MemoryOptions(),
        encoder_dtype=torch.float16,
    )


def verdict(plan: GenerationPlan, size: str) -> str:
    return plan.text(MemorySize.parse(size)).partition(f"\nin {size}\n")[2]


def most_bytes(plan: GenerationPlan, options: MemoryOptions) -> int:
    return max(stage.num_bytes for stage in plan.stages(options))


def test_a_card_is_told_what_it_needs(transformers: EmptyTransformers) -> None:
    plan = plan_of(transformers)
    assert verdict(plan, "80GB").startswith("  fits: at most 26.")
    assert verdict(plan, "24GB").startswith("  fits with --offload_invariant always: at most 18.89 GB, in preparing")
    assert verdict(plan, "18GB").startswith("  fits with --fp8_scaled: at most 17.")
    twelve = verdict(plan, "12GB")
    assert twelve.startswith("  fits with --offload_invariant always --fp8_scaled --fp8_llm: at most 1")
    assert verdict(plan, "1GB").startswith("  does not fit: LLaMA, which takes 8.")
    eight = verdict(plan, "8GB").splitlines()
    assert "whatever options are given" in eight[0] and re.match(
        r"  the rest fits with .*--blocks_to_swap \d+$", eight[1]
    )


def test_no_more_blocks_are_swapped_than_it_takes(transformers: EmptyTransformers) -> None:
    plan = plan_of(transformers, options=MemoryOptions(fp8_llm=True, fp8="scaled", offload=True))
    said = re.match(r"  fits with --blocks_to_swap (\d+): at most (.*) GB", verdict(plan, "9GB"))
    number = int(said[1])
    sizes = [most_bytes(plan, replace(plan.options, num_blocks=n)) for n in (number - 1, number)]
    assert 0 < number < 38 and sizes[0] > 9e9 >= sizes[1] and f"{sizes[1] / 1e9:.2f}" == said[2]


def test_what_the_flags_say_is_part_of_the_plan(transformers: EmptyTransformers) -> None:
    plan = plan_of(transformers, swap=SwapWish(blocks=SwapCount(value=None), offload_invariant="auto"))
    assert verdict(plan, "24GB").splitlines()[1:] == ["  --offload_invariant auto takes effect by itself"]
    assert verdict(plan, "24GB").startswith("  fits: at most 18.89 GB")
    bare = plan_of(transformers, options=MemoryOptions(fp8="scaled", fp8_llm=True))
    assert "--fp8" not in verdict(bare, "12GB") and "--offload_invariant always" in verdict(bare, "12GB")


def test_the_report_fits_on_a_screen_and_says_what_it_is(transformers: EmptyTransformers) -> None:
    text = plan_of(transformers, guidance_scale=2.0, infer_steps=25).text(MemorySize.parse("12"))
    lines = text.splitlines()
    assert "computed" in lines[0] and "not measured" in lines[0]
    assert len(lines) <= 24 and max(map(len, lines)) <= 120
    assert "  4029: target 1600, clean 1600, 2x 0, 4x 0, image 729, text 100" in lines
    # Twice 54.8 + 12.0 in a step with classifier-free guidance; 25 steps and what is done once.
    assert re.search(r"a step +133\.4 TFLOP = linear 109\.5 TFLOP \+ attention 23\.9 TFLOP", text)
    assert re.search(r"in all +33\d\d\.\d TFLOP", text)
    for stage in ("LLaMA", "CLIP", "SigLIP", "VAE encoding", "preparing", "denoising", "VAE decoding"):
        assert any(line.startswith(f"  {stage} ") for line in lines)


def test_longer_videos_take_more_operations_and_sections_decode_in_windows(transformers: EmptyTransformers) -> None:
    two, four = (plan_of(transformers, one_frame_inference=None, video_sections=n) for n in (2, 4))
    assert four.num_operations == 2 * two.num_operations
    assert two.stages(two.options)[-1] == four.stages(four.options)[-1]  # decoded two sections at a time
    whole = replace(four, bulk_decode=True)
    assert whole.stages(whole.options)[-1].num_bytes > 1.5 * four.stages(four.options)[-1].num_bytes
    smaller = verdict(four, "24GB")
    assert "--vae_tiling" in smaller


# ---- training ----


def training_plan(transformers: EmptyTransformers, **options) -> TrainingPlan:
    return TrainingPlan(
        transformers=transformers,
        batch=TrainedBatch(costs=C0, size=1, latents=(16, 1, 80, 80)),
        # About what rank 32 has in a block, at a layer that sees all tokens.
        numbers=TrainedNumbers(
            by_layer={f"single_transformer_blocks.{i}.proj_mlp": 137_600_000 // 60 for i in range(60)}, state_bytes=8
        ),
        swap=SwapWish(for_training=True),
        options=TrainOptions(**options),
        num_steps=100,
        batches_per_step=2,
    )


def parts_of(plan: TrainingPlan) -> dict[str, int]:
    (stage,) = plan.stages(plan.options)
    return dict(stage.parts)


def test_training_is_said_to_take_what_is_published(transformers: EmptyTransformers) -> None:
    with_checkpoints, without = training_plan(transformers, num_checkpointed=60), training_plan(transformers)
    found = parts_of(with_checkpoints)
    assert found["weights"] == pytest.approx(25.75e9, rel=1e-3) and found["network"] == pytest.approx(0.55e9, rel=0.01)
    assert found["kept"] == pytest.approx(1.5e9, rel=0.02) and found["optimizer"] == 2 * found["network"]
    for plan, wanted in ((with_checkpoints, 223e12), (without, 155e12)):
        counts = {name: flops.total for name, flops in plan._compute()}
        assert counts["a batch"] == pytest.approx(wanted, rel=0.01)
        assert counts["in all"] == 100 * counts["a step"] == 200 * counts["a batch"]


def test_training_fits_by_what_costs_least(transformers: EmptyTransformers) -> None:
    def told(size: str, **options: object) -> str:
        plan = training_plan(transformers, **options)
        return plan.text(MemorySize.parse(size)).partition(f"\nin {size}\n")[2].splitlines()[0]

    assert told("80GB").startswith("  fits: ")
    some = re.match(r"  fits with --checkpoint_blocks (\d+): ", told("40GB"))
    assert 0 < int(some[1]) < 60
    assert re.match(r"  fits with --checkpoint_blocks 5\d --fp8_scaled: at most 21\.", told("22GB"))
    assert re.match(r"  fits with .*--blocks_to_swap \d+: ", told("12GB"))
    assert told("3GB").startswith("  does not fit: training, which takes")


def test_swapped_blocks_count_as_checkpointed(transformers: EmptyTransformers) -> None:
    plan = training_plan(transformers, num_blocks=4)
    kept = plan.options.kept(transformers.limits)
    assert len(kept.checkpointed) == 2 + 5
    assert parts_of(plan)["kept"] < parts_of(training_plan(transformers))["kept"]
    assert parts_of(plan)["weights"] < 25.75e9 - 1e9


# ---- the scripts ----


@pytest.fixture
def models(demo_models) -> list[str]:
    names = ("dit", "vae", "text_encoder1", "text_encoder2", "image_encoder")
    return [part for name in names for part in (f"--{name}", str(getattr(demo_models, name)))]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading any tensor is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr("common.weights.Checkpoint.read", refuse)


QUICK = ["--prompt", "窓辺の猫", "--seed", "1", "--infer_steps", "2", "--video_size", "64", "64"]


def test_a_generation_is_planned_without_weights(models, no_weights, tmp_path: Path, capsys) -> None:
    out = tmp_path / "出力"
    one_frame = ["--one_frame_inference", "default", "--save_path", str(out), "--plan"]
    assert fpack_generate_video.main([*models, *QUICK, *one_frame]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^  \d+: target 16, clean 32, 2x 4, 4x 4, image 729, text \d+$", said, re.MULTILINE)
    assert "transformer in bfloat16, encoders and VAE in float16" in said
    assert not list(out.rglob("*.*"))
    assert fpack_generate_video.main([*models, *QUICK, *one_frame, "1GB", "--device", "cpu"]) == 0
    assert "in 1GB\n  fits: at most" in (said := capsys.readouterr().out)
    assert "transformer in float32" in said


def test_of_a_file_the_most_expensive_line_is_planned(models, no_weights, tmp_path: Path, capsys) -> None:
    lines = tmp_path / "一覧.txt"
    lines.write_text("猫 --w 32 --h 32\n窓辺の猫 --w 96 --h 64\n犬 --s 1\n", encoding="utf-8")
    arguments = ["--from_file", str(lines), "--save_path", str(tmp_path / "out"), "--one_frame_inference", "default"]
    assert fpack_generate_video.main([*models, *QUICK[2:], *arguments, "--plan"]) == 0
    said = capsys.readouterr().out
    assert "line 2, which computes the most of 3 prompts" in said and "one frame of 96x64" in said


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--interactive", "--plan"], "--plan: got --plan beside --interactive"),
        (["--plan", "0GB"], "--plan: got 0GB; expected a size of memory"),
        (["--save_merged_model", "m.safetensors", "--plan"], "--plan: got --plan beside --save_merged_model"),
    ],
)
def test_plans_that_cannot_be_are_refused(models, more: list[str], expected: str, tmp_path: Path, capsys) -> None:
    assert fpack_generate_video.main([*models, *QUICK, "--save_path", str(tmp_path), *more]) == 2
    assert expected in capsys.readouterr().err


def test_a_training_is_planned_without_weights(no_weights, tmp_path: Path, capsys) -> None:
    workshop, out = write_workshop(tmp_path), tmp_path / "出力"
    argv = workshop.command(out, device=None, gradient_checkpointing=True, plan="1GB")
    assert fpack_train_network.main(argv) == 0
    said = capsys.readouterr().out
    assert "the largest batch: 2 items of 32x48, 1 latent frame; 6 steps; transformer in bfloat16" in said
    assert "target 6, clean 12, 2x 0, 4x 0, image 7, text " in said
    assert "in 1GB\n  fits: at most" in said and "million numbers are trained" in said
    assert not list(out.rglob("*.safetensors"))


# ---- the guide ----


def test_figures_of_steps_in_the_guide_are_computed() -> None:
    work = Work(itemsize=2, num_steps=25)
    found = rows("what", "size")
    for what, size, *wanted in found:
        options = re.search(r"`(.*)`", what)
        side = int(size.split("x")[0])
        flags = FramePackRequestFlags(
            prompt="猫", video_size=(side, side), one_frame_inference=options[1] if options else None
        )
        request = flags.resolve(image_size=lambda path: (640, 640))
        tokens = Tokens.of(context_of(request), num_text=100)
        costs = FramePackCosts(config=FramePackConfig(), tokens=tokens)
        flops, memory = costs.step_flops(), costs.prepared_bytes(work) + costs.step_bytes(work)
        shown = [str(tokens.total), shown_flops(flops.linear), shown_flops(flops.attention), shown_bytes(memory)]
        assert wanted == shown
    assert len(found) == 6


def test_figures_of_decoding_in_the_guide_are_computed() -> None:
    vae = published_vae()
    found = rows("what", "whole")
    for what, *wanted in found:
        side, latents = int(re.search(r"x(\d+)", what)[1]), 19 if "19" in what else 1
        sizes = ((None, None), (None, 32), (256, None))
        works = [VaeWork.of(vae, itemsize=2, tile_size=tile, chunk_size=chunk) for tile, chunk in sizes]
        assert wanted == [shown_bytes(decode_bytes(work, latents, side, side)) for work in works]
    assert len(found) == 3


def test_what_options_save_in_the_guide_is_computed(transformers: EmptyTransformers) -> None:
    def stays(fp8: str, invariant: str) -> int:
        return transformers.placed(fp8, SwapOptions(counts=(0, 0), invariant=invariant)).stays

    llama = published_models().llama
    whole, eight = (llama_weights(llama, itemsize=2, fp8=fp8) for fp8 in (False, True))
    kept = [training_plan(transformers, num_checkpointed=n) for n in (0, 60)]
    costs = replace(C0, tokens=replace(TOKENS, text=256))
    kept = [parts_of(replace(plan, batch=replace(plan.batch, costs=costs)))["kept"] for plan in kept]
    saved = {
        "`--offload_invariant always`": stays("off", "none") - stays("off", "all"),
        "`--fp8_scaled`": stays("off", "none") - stays("scaled", "none"),
        "`--fp8_llm`": whole - eight,
        "`--gradient_checkpointing`": kept[0] - kept[1],
        "`--gradient_checkpointing_cpu_offload`": kept[1],
    }
    told = {option: saves for option, saves, _ in rows("option", "saves")}
    for option, size in saved.items():
        assert float(told[option].split(" GB")[0]) == pytest.approx(size / 1e9, abs=0.06), option
    assert costs.tokens.total == 4185
