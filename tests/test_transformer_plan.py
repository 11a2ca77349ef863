"""What flags become in plans, and what plans may suggest, with a model of one list of blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from common.flags import parse
from modules.block_swap import SwapOptions
from modules.denoising_plan import Denoising, TransformerOptions
from modules.plan import Flops, linear_flops
from modules.swapping import SwapLimits, SwapWish
from modules.training_plan import TrainedBatch, TrainedNumbers, TrainingPlan, TrainOptions
from modules.transformer_plan import EmptyTransformers, Kept, Work, fp8_rung, swap_rung
from options.errors import UserError
from options.flags_fpack_train import FramePackTrainFlags
from options.fp8 import Fp8Mode
from options.swap_count import SwapCount

WIDTH, NUM_BLOCKS = 8, 4
MATRIX = WIDTH * WIDTH
LIMITS = SwapLimits(lists={"all": NUM_BLOCKS}, counts=lambda n: (n,), most_in_generation=3, most_in_training=2)
ONCE = SwapWish(offload_invariant="auto")


class Model(nn.Module):
    """Four blocks of a matrix, and one that only `prepare` calls."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_BLOCKS))
        self.once = nn.Linear(WIDTH, WIDTH, bias=False)
        self.block_lists, self.prepare_layers = (self.blocks,), (self.once,)


@dataclass(frozen=True)
class Counted:
    """Costs that tell what they were asked."""

    num_blocks: int = NUM_BLOCKS
    ready: int = 1000

    def by_group(self) -> dict[str, int]:
        return {"target": 5, "control": 2}

    def step_flops(self, *, batch: int = 1) -> Flops:
        return Flops(linear=100 * batch, attention=10 * batch)

    def prepare_flops(self, *, num_steps: int = 1, batch: int = 1) -> Flops:
        return Flops(linear=num_steps * batch)

    def prepared_bytes(self, work: Work) -> int:
        return self.ready * work.num_prepared * work.num_steps * work.batch

    def prepare_bytes(self, work: Work) -> int:
        return 2 * self.prepared_bytes(work)

    def step_bytes(self, work: Work) -> int:
        return 10 * work.itemsize * work.batch

    def kept_bytes(self, work: Work, kept: Kept) -> int:
        return 7 * (self.num_blocks - len(kept.checkpointed)) * work.batch

    def backward_bytes(self, work: Work, kept: Kept) -> int:
        return 50 if kept.in_ram else 40

    def num_rows(self, path: str) -> int:
        return 3 if path == "three" else 1


def build(fp8: Fp8Mode) -> nn.Module:
    if fp8 == "plain":
        raise UserError("--fp8", "this", "another", "do that")
    with torch.device("meta"):
        return Model()


EMPTY = EmptyTransformers(build, limits=LIMITS, dtype=torch.bfloat16)


def denoising(**changes: object) -> Denoising:
    return replace(Denoising(transformers=EMPTY, costs=Counted(), swap=ONCE, num_steps=6), **changes)


def training(**changes: object) -> TrainingPlan:
    plan = TrainingPlan(
        transformers=EMPTY,
        batch=TrainedBatch(costs=Counted(), size=2, latents=(16, 3, 4, 6)),
        numbers=TrainedNumbers(by_layer={"three": 20, "one": 30}, state_bytes=8),
        swap=SwapWish(for_training=True),
        options=TrainOptions(),
    )
    return replace(plan, **changes)


# ---- weights ----


def test_weights_stay_or_have_slots() -> None:
    stays, block, once = 5 * 2 * MATRIX, 2 * MATRIX, 2 * MATRIX
    placed = EMPTY.placed("off", SwapOptions(counts=(3,), invariant="all"))
    assert (placed.stays, placed.block_slots, placed.prepare_slots) == (stays - 3 * block - once, 2 * block, once)
    assert EMPTY.placed("off", SwapOptions(counts=(0,))).stays == stays
    assert EMPTY.accepts("scaled") and not EMPTY.accepts("plain")


# ---- generation ----


def test_a_second_pass_takes_as_much_again() -> None:
    one, two = denoising(), denoising(num_passes=2)
    assert two.step_flops == one.step_flops * 2 and two.once_flops == one.once_flops * 2 == Flops(linear=12)
    preparing, stepping = two.stages(TransformerOptions())
    assert dict(preparing.parts)["work"] == 24_000
    assert dict(stepping.parts) == {"weights": 10 * MATRIX, "swap": 0, "LoRAs": 0, "prepared": 12_000, "work": 20}


def test_what_is_needed_depends_on_what_lies_in_ram() -> None:
    def needed(num_blocks: int, offload: bool) -> int:
        return denoising(lora_bytes=5).needed(TransformerOptions(num_blocks=1), num_blocks, offload)

    whole = 10 * MATRIX + 5 + 12_000
    # Two slots for blocks, and for the time of preparing the slot of what only that needs.
    sizes = [whole, whole, whole - 2 * MATRIX, whole - 2 * MATRIX]
    assert [needed(0, False), needed(0, True), needed(3, False), needed(3, True)] == sizes
    short = denoising(costs=Counted(ready=0))  # a step is the worst moment unless what it does not need waits in RAM
    assert [short.needed(TransformerOptions(), 0, o) for o in (False, True)] == [10 * MATRIX + 20, 10 * MATRIX]
    stages = denoising().stages(TransformerOptions(offload=True))
    assert stages[1].num_bytes == 8 * MATRIX + 6000 + 20


def test_only_what_is_not_done_yet_is_suggested() -> None:
    def flags(plan: Denoising, options: TransformerOptions) -> list[list[str]]:
        rungs = (plan.offload_rung(options), plan.fp8_rung(options), plan.swap_rung(options))
        return [[change.flag for change in rung] for rung in rungs]

    swaps = [f"--blocks_to_swap {number}" for number in (1, 2, 3)]
    assert flags(denoising(), TransformerOptions()) == [["--offload_invariant auto"], ["--fp8_scaled"], swaps]
    done = TransformerOptions(fp8="scaled", num_blocks=2, offload=True)
    assert flags(denoising(), done) == [[], [], swaps[2:]]
    never = denoising(swap=SwapWish(blocks=SwapCount(value=None)))
    assert flags(never, TransformerOptions())[::2] == [["--offload_invariant always"], ["--blocks_to_swap auto"] * 3]
    assert all(change.is_automatic for change in never.swap_rung(TransformerOptions()))
    assert not any(change.is_automatic for change in never.offload_rung(TransformerOptions()))
    assert len(swap_rung(SwapWish(for_training=True), LIMITS, 0)) == 2 and fp8_rung(EMPTY, "plain") == []


def test_changes_do_what_their_flags_say() -> None:
    plan, options = denoising(), TransformerOptions()
    for rung in (plan.offload_rung(options), plan.fp8_rung(options), plan.swap_rung(options)):
        options = rung[-1].apply(options)
    assert options == TransformerOptions(fp8="scaled", num_blocks=3, offload=True)


@pytest.mark.parametrize(
    ("blocks", "invariant", "first"),
    [(0, "auto", (0, False)), (0, "always", (0, True)), (2, "auto", (2, True)), (2, "never", (2, False))]
    + [(None, "auto", (0, False)), (None, "always", (0, True)), (None, "never", (0, False))],
)
def test_the_first_choice_is_the_least_that_was_asked_for(blocks, invariant: str, first: tuple[int, bool]) -> None:
    wish = SwapWish(blocks=SwapCount(value=blocks), offload_invariant=invariant)
    assert next(wish.choices(LIMITS)) == first


# ---- training ----


def flags_of(*argv: str):
    return parse(FramePackTrainFlags, description="", argv=list(argv)).memory


def test_flags_of_memory_are_taken_over() -> None:
    assert TrainOptions.of(flags_of(), num_blocks=NUM_BLOCKS) == TrainOptions()
    assert SwapWish.of_training(flags_of()) == SwapWish(for_training=True)
    given = flags_of(
        *("--checkpoint_blocks", "3", "--gradient_checkpointing_cpu_offload", "--fp8_scaled"),
        *("--blocks_to_swap", "2", "--use_pinned_memory_for_block_swap", "--block_swap_ring_size", "5"),
    )
    wanted = TrainOptions(fp8="scaled", num_blocks=2, num_checkpointed=3, in_ram=True)
    assert TrainOptions.of(given, num_blocks=NUM_BLOCKS) == wanted
    swap = SwapWish(blocks=SwapCount(value=2), for_training=True, pinned=True, ring_size=5)
    assert SwapWish.of_training(given) == swap
    automatic = flags_of("--blocks_to_swap", "auto", "--gradient_checkpointing")
    assert TrainOptions.of(automatic, num_blocks=NUM_BLOCKS) == TrainOptions(num_checkpointed=NUM_BLOCKS)


def test_a_model_says_what_training_does_with_the_layers_of_prepare() -> None:
    wish = SwapWish(for_training=True)
    assert wish.options(LIMITS, 1, offload=False) == SwapOptions(counts=(1,), invariant="of swapped blocks")
    other = replace(LIMITS, invariant_in_training="none")
    assert wish.options(other, 1, offload=False) == SwapOptions(counts=(1,))
    assert SwapWish().options(LIMITS, 1, offload=False).invariant == "none"
    assert SwapWish().options(LIMITS, 1, offload=True).invariant == "all"


def test_swapped_blocks_keep_their_inputs_only() -> None:
    assert TrainOptions(num_blocks=2).kept(LIMITS) == Kept(checkpointed=frozenset({1, 3}))
    both = TrainOptions(num_blocks=1, num_checkpointed=2, in_ram=True).kept(LIMITS)
    assert both == Kept(checkpointed=frozenset({0, 1, 2}), in_ram=True)


def test_more_blocks_in_ram_are_needed_less() -> None:
    sizes = [training().needed(number, False) for number in range(3)]
    # Half of the network's numbers in half precision are kept with every fourth of the blocks.
    kept = 7 * 2 + 2 * 50 // 4
    assert sizes[0] - sizes[2] == 2 * kept  # two slots take as much as two blocks
    parts = dict(training().stages(TrainOptions(num_blocks=1))[0].parts)
    assert (parts["network"], parts["gradients"], parts["optimizer"], parts["swap"]) == (200, 200, 400, 2 * MATRIX)
    assert parts["work"] == 2 * 1000 + 40 and parts["kept"] == 3 * kept


def test_a_batch_computes_its_blocks_and_adapters() -> None:
    """Frozen weights twice, attention 3.5 times; adapters three times; all of it once more where it is recomputed."""
    adapters = linear_flops(2 * 3, 20) + linear_flops(2 * 1, 30)
    for num_checkpointed, again in ((0, 0), (2, 0.5), (4, 1)):
        plan = training(options=TrainOptions(num_checkpointed=num_checkpointed), num_steps=9, batches_per_step=5)
        linear = 200 * (2 + again) + 2 + adapters.linear * (3 + again)
        attention = 20 * (3.5 + again)
        counts = dict(plan._compute())
        assert counts["a batch"] == Flops(linear=round(linear), attention=round(attention))
        assert counts["a step"] == counts["a batch"] * 5 and counts["in all"] == counts["a step"] * 9


def test_a_batch_says_what_it_is() -> None:
    batch = training().batch
    assert str(batch) == "2 items of 48x32, 3 latent frames" and batch.num_tokens == 14
    assert str(replace(batch, size=1, latents=(16, 1, 4, 6))) == "1 item of 48x32, 1 latent frame"
    network = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 1, bias=False)})
    assert TrainedNumbers.of(dict(network), 8).by_layer == {"a": 9, "b": 2}
