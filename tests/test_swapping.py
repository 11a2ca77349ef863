"""`--blocks_to_swap`, `--offload_invariant` and inputs in RAM, from the command line to results."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open

import fpack_generate_video
from common.flags import parse
from frame_pack import loading
from frame_pack import pipeline as pipeline_module
from frame_pack.compute import Compute
from frame_pack.config import FramePackConfig
from frame_pack.pipeline import FramePackPipeline
from frame_pack.swapping import swap_limits
from modules.block_swap import SwapOptions
from modules.checkpointing import Checkpointing
from modules.swapping import SwapLimits, SwapWish, check_swap, choose_swap
from networks import transformer_stage
from options.errors import UserError
from options.flags_fpack_generate import FramePackGenerateFlags
from options.flags_fpack_train import FramePackTrainFlags
from options.fpack_request import FramePackRequestFlags
from options.swap_count import SwapCount
from tests.training_driver import NAME, Workshop, metadata, repeatable, train, trained, ups, write_workshop

GB = 10**9
AUTO = SwapCount(value=None)
PUBLISHED = swap_limits(FramePackConfig())
SMALL = swap_limits(FramePackConfig(num_double_blocks=2, num_single_blocks=2))


# ---- how many ----


def test_requested_blocks_are_counted_as_the_facts_say() -> None:
    """n requested: n // 2 double blocks, (n - double) * 2 + 1 single ones."""
    assert [PUBLISHED.counts(n) for n in (0, 1, 2, 20, 36, 37, 38)] == [
        *((0, 0), (0, 3), (1, 3), (10, 21), (18, 37), (18, 39), (19, 39))
    ]
    for number in range(1, 39):
        double, single = PUBLISHED.counts(number)
        assert double == number // 2 <= 19 and single == (number - double) * 2 + 1 <= 39
    assert [SMALL.counts(n) for n in (1, 2, 3)] == [(0, 2), (1, 2), (1, 2)]


def test_the_limits_are_the_facts_and_less_for_smaller_models() -> None:
    assert (PUBLISHED.most_in_generation, PUBLISHED.most_in_training) == (38, 36)
    assert (SMALL.most_in_generation, SMALL.most_in_training) == (3, 3)
    for limits, for_training, most in [(PUBLISHED, False, 38), (PUBLISHED, True, 36), (SMALL, True, 3)]:
        check_swap(SwapWish(blocks=SwapCount(value=most), for_training=for_training), limits)
        check_swap(SwapWish(blocks=AUTO, for_training=for_training), limits)
        with pytest.raises(
            UserError, match=rf"^--blocks_to_swap: got {most + 1}; expected at most {most} in "
        ) as error:
            check_swap(SwapWish(blocks=SwapCount(value=most + 1), for_training=for_training), limits)
        assert "\n" not in str(error.value)


def needs(total: float, by_block: float, by_offload: float):
    """A model and its work of so many GB, and what swapping and offloading save of them."""
    return lambda num_blocks, offload: int((total - by_block * num_blocks - by_offload * offload) * GB)


def chosen(free: float, wish: SwapWish) -> tuple[int, str]:
    """(double blocks in RAM, which of the layers of `prepare`)."""
    options = choose_swap(wish, PUBLISHED, free=free * GB, needed=needs(28, 0.5, 7))
    return options.counts[0], options.invariant


@pytest.mark.parametrize(
    ("free", "expected"),
    [(80, (0, "none")), (30.2, (0, "none")), (29.9, (0, "all")), (22.8, (0, "all")), (22.5, (0, "all"))],
)
def test_what_a_prompt_needs_once_leaves_first(free: float, expected: tuple[int, str]) -> None:
    """5 % of what is free and half a GiB are not counted on."""
    assert chosen(free, SwapWish(blocks=AUTO, offload_invariant="auto")) == expected
    assert chosen(free, SwapWish(blocks=SwapCount(), offload_invariant="auto")) == expected


def test_then_as_few_blocks_as_it_takes() -> None:
    """21 GB without blocks in RAM, half a GB less for each."""
    automatic = SwapWish(blocks=AUTO, offload_invariant="auto")
    assert [chosen(free, automatic) for free in (22, 16, 12)] == [(1, "all"), (6, "all"), (10, "all")]
    options = choose_swap(automatic, PUBLISHED, free=12 * GB, needed=needs(28, 0.5, 7))
    assert options.counts == PUBLISHED.counts(21)
    never = SwapWish(blocks=AUTO, offload_invariant="never")
    assert chosen(22.5, never) == (7, "none")
    assert chosen(22.5, SwapWish(blocks=AUTO, for_training=True)) == (7, "of swapped blocks")


def test_a_number_is_taken_as_it_is_and_offloads_with_it() -> None:
    for free in (80, 4):
        assert chosen(free, SwapWish(blocks=SwapCount(value=20), offload_invariant="auto")) == (10, "all")
        assert chosen(free, SwapWish(blocks=SwapCount(value=20), offload_invariant="never")) == (10, "none")
        assert chosen(free, SwapWish(blocks=SwapCount(), offload_invariant="always")) == (0, "all")
        assert chosen(free, SwapWish(blocks=SwapCount(), offload_invariant="never")) == (0, "none")


def test_where_nobody_knows_the_memory_nothing_is_swapped(caplog) -> None:
    caplog.set_level(logging.INFO)
    wish = SwapWish(blocks=AUTO, offload_invariant="auto", pinned=True, ring_size=3)
    options = choose_swap(wish, PUBLISHED, free=float("inf"), needed=lambda *_: pytest.fail("it was counted"))
    assert options == SwapOptions(counts=(0, 0), pinned=True, ring_size=3) and not options
    assert caplog.messages == ["--blocks_to_swap auto: 0, which are 0 double and 0 single blocks"]


def test_what_does_not_fit_even_so_is_said(caplog) -> None:
    wish = SwapWish(blocks=AUTO, offload_invariant="auto")
    options = choose_swap(wish, PUBLISHED, free=2 * GB, needed=needs(28, 0.5, 7))
    assert options.counts == PUBLISHED.counts(38) and options.invariant == "all"
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "the transformer and its work take about 2.0 GB, and 2.0 GB are free: it may not fit"
    ]


def test_a_model_with_one_list_of_blocks_counts_them_as_they_are(caplog) -> None:
    caplog.set_level(logging.INFO)
    limits = SwapLimits(lists={"all": 40}, counts=lambda n: (n,), most_in_generation=39, most_in_training=30)
    options = choose_swap(SwapWish(blocks=AUTO), limits, free=22 * GB, needed=needs(28, 0.5, 0))
    assert options.counts == (16,) and caplog.messages == ["--blocks_to_swap auto: 16"]
    assert limits.numbers(10) == [2, 6, 10, 14, 18, 22, 26, 30, 34, 38]
    check_swap(SwapWish(blocks=SwapCount(value=39)), limits)
    with pytest.raises(UserError, match="at most 30 in training"):
        check_swap(SwapWish(blocks=SwapCount(value=39), for_training=True), limits)


# ---- the flags ----


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("20", 20), ("auto", None), (" AUTO ", None)])
def test_a_number_of_blocks_or_auto_is_read(text: str, value: int | None) -> None:
    parsed = SwapCount.parse(text)
    assert parsed == SwapCount(value=value) == SwapCount.parse(str(parsed))
    assert bool(parsed) == (text != "0")


@pytest.mark.parametrize("flags_class", [FramePackGenerateFlags, FramePackTrainFlags])
@pytest.mark.parametrize("text", ["-1", "some", "1.5"])
def test_anything_else_is_explained_in_one_line(flags_class: type, text: str) -> None:
    with pytest.raises(UserError) as error:
        parse(flags_class, description="", argv=["--save_path", "出力", f"--blocks_to_swap={text}"][2:])
    assert str(error.value).startswith(f"--blocks_to_swap: got {text}; expected a number of blocks from 0, or auto")


def test_nothing_is_swapped_unless_it_is_asked_for() -> None:
    generate = parse(FramePackGenerateFlags, description="", argv=[])
    assert not generate.compute.blocks_to_swap and generate.compute.offload_invariant == "auto"
    training = parse(FramePackTrainFlags, description="", argv=["--blocks_to_swap", "0"]).memory
    assert not training.blocks_to_swap and training.block_swap_ring_size == 2


# ---- generation ----


@pytest.fixture
def models(demo_models) -> list[str]:
    names = ("dit", "vae", "text_encoder1", "text_encoder2", "image_encoder")
    return [part for name in names for part in (f"--{name}", str(getattr(demo_models, name)))]


def latents(models: list[str], material, folder: Path, *more: str) -> list[torch.Tensor]:
    """Of two prompts with guidance, so that there are two things to prepare for each."""
    prompts = folder.parent / "文.txt"
    prompts.write_text("窓辺の猫\na dog --d 2\n", encoding="utf-8")
    argv = [*models, "--from_file", prompts, "--seed", 1, "--infer_steps", 2, "--video_size", 64, 64, *more]
    argv += ["--control_image_path", material.chelsea, "--one_frame_inference", "target_index=1,control_index=0"]
    argv += ["--guidance_scale", 2.0, "--output_type", "latent", "--save_path", folder]
    assert fpack_generate_video.main([str(part) for part in argv]) == 0
    return [_latent(path) for path in sorted(folder.glob("*.safetensors"), key=lambda p: p.name.split("_")[-2])]


def _latent(path: Path) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("latent")


@pytest.fixture
def swaps(monkeypatch: pytest.MonkeyPatch) -> list[SwapOptions]:
    """How transformers are loaded from now on."""
    seen: list[SwapOptions] = []
    load = loading.load_transformer

    def spy(*arguments, swap, **rest):
        seen.append(swap)
        return load(*arguments, swap=swap, **rest)

    monkeypatch.setattr(pipeline_module, "load_transformer", spy)
    return seen


def test_generated_latents_are_the_same_to_the_last_bit(models, material, tmp_path, swaps) -> None:
    expected = latents(models, material, tmp_path / "a")
    assert len(expected) == 2 and not swaps.pop()
    for number, more in enumerate((["--blocks_to_swap", "2"], ["--offload_invariant", "always"])):
        found = latents(models, material, tmp_path / str(number), *more)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [(options.counts, options.invariant) for options in swaps] == [((1, 2), "all"), ((0, 0), "all")]


def test_a_swapped_transformer_that_a_trainer_lends_makes_the_same_samples(models, material) -> None:
    flags = parse(FramePackGenerateFlags, description="", argv=[*models, "--save_path", "nowhere"])
    checkpoints, compute = loading.open_models(flags.models), Compute.from_flags(flags.compute)
    asked = FramePackRequestFlags(
        prompt="窓辺の猫", video_size=(64, 64), infer_steps=2, seed=5, one_frame_inference="default"
    )
    request = FramePackRequestFlags.resolve(
        replace(asked, image_path=str(material.chelsea)), image_size=lambda path: pytest.fail("it was asked for")
    )
    found = []
    for swap in (None, SwapOptions(counts=(1, 2), invariant="of swapped blocks")):
        place = {"dtype": torch.float32, "device": torch.device("cpu")}
        transformer = loading.load_transformer(checkpoints.transformer, swap=swap, **place)
        pipeline = FramePackPipeline(checkpoints, compute, transformer=transformer)
        with pipeline.encoder() as encode:
            (conditioning,) = encode([request])
        for _ in range(2):
            with pipeline.denoiser() as denoise:
                found.append(denoise(request, conditioning, lambda progress: None))
        assert (transformer.swapping.device_bytes > 0) == (swap is not None), "it stays where it was"
    assert all(torch.equal(latents, found[0]) for latents in found)


def test_auto_counts_what_the_largest_request_takes(models, material, tmp_path, swaps, monkeypatch) -> None:
    """A device that is short of memory by a little, then by a lot."""
    expected = latents(models, material, tmp_path / "a")
    sizes: list[int] = []
    choose = transformer_stage.choose_swap

    def spy(*arguments, needed, **rest):
        sizes.append(needed(0, False))
        return choose(*arguments, needed=needed, **rest)

    monkeypatch.setattr(transformer_stage, "choose_swap", spy)
    monkeypatch.setattr("modules.swapping.RESERVE", 0)
    for number, share in enumerate((1.2, 0.9, 0.3)):
        monkeypatch.setattr(transformer_stage, "free_memory", lambda device, share=share: share * (sizes or [10**6])[0])
        more = ["--blocks_to_swap", "auto"]
        found = latents(models, material, tmp_path / str(number), *more)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sizes[0] == sizes[1] > 10**6
    assert swaps[-2].invariant == "all" and swaps[-1].counts == (1, 2)


def test_too_many_blocks_are_refused_before_anything_is_loaded(models, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(pipeline_module, "load_transformer", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr(pipeline_module, "load_llama", lambda *_, **__: pytest.fail("it was loaded"))
    argv = [*models, "--prompt", "猫", "--blocks_to_swap", "4", "--save_path", str(tmp_path)]
    assert fpack_generate_video.main(argv) == 2
    assert "--blocks_to_swap: got 4; expected at most 3 in generation" in capsys.readouterr().err


# ---- training ----


@pytest.fixture(scope="module", autouse=True)
def same_bytes_for_equal_runs() -> Iterator[None]:
    with repeatable():
        yield


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return write_workshop(tmp_path_factory.mktemp("学習"))


def test_training_ends_with_the_same_network(workshop, tmp_path, caplog) -> None:
    """With everything at once, validated on the way, and again as two runs that are one."""
    caplog.set_level(logging.INFO)
    seen: list[Checkpointing] = []
    of = Checkpointing.of

    def spy(self, block, number, berth):
        seen.append(self)
        return of(self, block, number, berth)

    expected = trained(workshop.command(tmp_path / "plain"))
    options = {"blocks_to_swap": 3, "use_pinned_memory_for_block_swap": True, "block_swap_h2d_only": True}
    options |= {"validation_dataset_config": workshop.data, "validate_every_n_steps": 2}
    options |= {"gradient_checkpointing_cpu_offload": True, "block_swap_ring_size": 1}
    with patch("modules.activation_offload.MIN_BYTES", 1), patch.object(Checkpointing, "of", spy):
        found = trained(command := workshop.command(tmp_path / "出力", **options))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(tensor.any() for tensor in ups(found).values())
    assert seen and all(checkpointing.offload is not None for checkpointing in seen)
    assert "the 3 swapped blocks are checkpointed, as with --gradient_checkpointing" in caplog.messages
    told = metadata(Path(command[command.index("--output_dir") + 1]) / f"{NAME}.safetensors")
    assert told["ss_gradient_checkpointing_cpu_offload"] == "True"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks_to_swap": 4}, "--blocks_to_swap: got 4; expected at most 3 in training"),
        ({"block_swap_ring_size": 0}, "--block_swap_ring_size: got 0; expected 1 or more"),
    ],
)
def test_what_cannot_be_swapped_is_refused_in_one_line(changes, message, workshop, tmp_path, capsys) -> None:
    assert train(workshop.command(tmp_path / "出力", **changes)) == 2
    assert message in (complaint := capsys.readouterr().err) and complaint.count("\n") == 1
    assert not (tmp_path / "出力").exists()


def test_auto_looks_at_the_batches_the_network_and_the_optimizer(workshop, tmp_path, monkeypatch) -> None:
    seen: list[SwapOptions] = []
    sizes: list[int] = []

    def spy(wish, limits, *, free, needed):
        assert free == 5 * GB
        sizes.append(needed(0, False))
        seen.append(choose_swap(wish, limits, free=0.8 * sizes[-1] + 2 * 2**29, needed=needed))
        return seen[-1]

    monkeypatch.setattr("training.plan.choose_swap", spy)
    monkeypatch.setattr("training.plan.free_memory", lambda device: 5 * GB)
    for name, changes in {"a": {}, "b": {"network_dim": 64}, "c": {"optimizer_type": "torch.optim.SGD"}}.items():
        command = workshop.command(tmp_path / name, blocks_to_swap="auto", max_train_steps=1, **changes)
        assert train(command) == 0
    assert sizes[2] < sizes[0] < sizes[1]
    assert {options.invariant for options in seen} == {"of swapped blocks"}
