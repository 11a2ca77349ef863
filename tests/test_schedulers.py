"""The course of the learning rate, against the schedulers of transformers and torch and against formulas."""

import io
import logging
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torch_schedulers
from transformers import get_scheduler
from transformers.optimization import Adafactor, AdafactorSchedule
from transformers.trainer_utils import SchedulerType

from options.errors import UserError
from options.flags_optimizer import SCHEDULERS, OptimizerFlags, check_optimizer
from options.step_count import StepCount
from training.optimizers import create_optimizer
from training.resuming import set_learning_rates
from training.schedulers import create_scheduler

RATES = (1e-3, 4e-3)
STEPS = 40


def flags(lr_scheduler: str = "constant", *args: str, warmup: str = "0", decay: str = "0", **others) -> OptimizerFlags:
    others = {"optimizer_type": "SGD", "learning_rate": RATES[0], **others}
    counts = {"lr_warmup_steps": StepCount.parse(warmup), "lr_decay_steps": StepCount.parse(decay)}
    return OptimizerFlags(lr_scheduler=lr_scheduler, lr_scheduler_args=args, **counts, **others)


def groups() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    named = zip(("unet", "unet plus"), RATES, strict=True)
    return [{"params": [nn.Parameter(torch.randn(8, 4, generator=generator))], "lr": r, "name": n} for n, r in named]


def plain_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(groups(), lr=RATES[0])


def begin(chosen: OptimizerFlags, num_steps: int = STEPS) -> tuple:
    check_optimizer(chosen)
    optimizer = create_optimizer(chosen, groups())
    return optimizer, create_scheduler(chosen, optimizer, num_steps=num_steps)


def take_step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()


def curve(optimizer: torch.optim.Optimizer, scheduler, num_steps: int = STEPS) -> list[list[float]]:
    """The rates that every step is taken with, and those after the last."""
    rates = []
    for _ in range(num_steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        take_step(optimizer)
        scheduler.step()
    return [*rates, [group["lr"] for group in optimizer.param_groups]]


def check_curve(chosen: OptimizerFlags, oracle: Callable) -> None:
    """The same rates for both groups as the oracle's, and they change."""
    ours = curve(*begin(chosen))
    optimizer = plain_optimizer()
    theirs = curve(optimizer, oracle(optimizer))
    assert ours == theirs
    assert len({tuple(rates) for rates in ours}) > 1


def error_of(action: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return caught.value


# ---- transformers' ----


@pytest.mark.parametrize(
    ("chosen", "warmup", "specific"),
    [
        (flags("constant_with_warmup", warmup="10"), 10, {}),
        (flags("linear", warmup="25%"), 10, {}),
        (flags("linear"), 0, {}),
        (flags("cosine", warmup="0.25"), 10, {}),
        (flags("cosine", "num_cycles=1.5", warmup="4"), 4, {"num_cycles": 1.5}),
        (flags("cosine_with_restarts", warmup="10%", lr_scheduler_num_cycles=3), 4, {"num_cycles": 3}),
        (flags("cosine_with_restarts", "num_cycles=4"), 0, {"num_cycles": 4}),
        (flags("polynomial", warmup="4", lr_scheduler_power=2.0), 4, {"power": 2.0}),
        (flags("polynomial", "lr_end=1e-4"), 0, {"lr_end": 1e-4}),
        (flags("inverse_sqrt", warmup="4"), 4, {"timescale": None}),
        (flags("inverse_sqrt", warmup="4", lr_scheduler_timescale=9), 4, {"timescale": 9}),
        (
            flags("cosine_with_min_lr", warmup="4", lr_scheduler_min_lr_ratio=0.1),
            4,
            {"num_cycles": 0.5, "min_lr_rate": 0.1},
        ),
        (
            flags("cosine_with_min_lr", "min_lr=1e-4", lr_scheduler_num_cycles=3),
            0,
            {"num_cycles": 1.5, "min_lr": 1e-4},
        ),
        (
            flags("cosine_warmup_with_min_lr", "warmup_lr_rate=0.2", warmup="4", lr_scheduler_min_lr_ratio=0.1),
            4,
            {"num_cycles": 0.5, "min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
        ),
        (
            flags("warmup_stable_decay", warmup="10%", decay="50%"),
            4,
            {"num_decay_steps": 20, "num_stable_steps": 16, "min_lr_ratio": 0.0, "num_cycles": 0.5},
        ),
        (
            flags("warmup_stable_decay", "decay_type=linear", decay="8", lr_scheduler_min_lr_ratio=0.2),
            0,
            {"num_decay_steps": 8, "num_stable_steps": 32, "min_lr_ratio": 0.2, "decay_type": "linear"},
        ),
    ],
    ids=lambda value: value.lr_scheduler if isinstance(value, OptimizerFlags) else "",
)
def test_transformers_schedules_are_transformers_own(chosen: OptimizerFlags, warmup: int, specific: dict) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Both num_training_steps and num_stable_steps")
        check_curve(chosen, lambda opt: get_scheduler(chosen.lr_scheduler, opt, warmup, STEPS, specific or None))


def test_every_schedule_of_transformers_is_known() -> None:
    assert {kind.value for kind in SchedulerType} | {"rex", "piecewise_constant", "adafactor"} == set(SCHEDULERS)


def test_constant_stays_for_both_groups() -> None:
    assert curve(*begin(flags())) == [list(RATES)] * (STEPS + 1)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_need_the_loss_get_it(name: str) -> None:
    losses = [1.0] * 6 + [0.5] * 3 + [2.0] * 6
    args = {"factor": 0.5, "patience": 1} | ({} if name == "reduce_lr_on_plateau" else {"min_lr": 1e-5, "max_lr": 1.0})
    optimizer, scheduler = begin(flags(name, *(f"{key}={value}" for key, value in args.items())))
    other = plain_optimizer()
    oracle = get_scheduler(name, other, scheduler_specific_kwargs=args)
    seen = []
    for loss in losses:
        scheduler.step(loss)
        oracle.step(loss)
        seen.append(scheduler.get_last_lr())
        assert seen[-1] == [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in other.param_groups]
    assert len({tuple(rates) for rates in seen}) > 2
    with pytest.raises(ValueError, match="needs the loss"):
        scheduler.step()


def test_a_loss_that_is_no_number_is_passed_over() -> None:
    def rates(losses: list[float]) -> list[float]:
        _, scheduler = begin(flags("greedy", "smooth=True", "patience=1", "min_lr=1e-6"))
        for loss in losses:
            scheduler.step(loss)
        return scheduler.get_last_lr()

    assert rates([1.0, float("nan"), 0.9, 0.8, float("inf"), 0.7]) == rates([1.0, 0.9, 0.8, 0.7]) != list(RATES)


def test_a_loss_changes_nothing_where_none_is_needed() -> None:
    optimizer, scheduler = begin(flags("linear"))
    other, follower = begin(flags("linear"))
    for step in range(5):
        take_step(optimizer), take_step(other)
        scheduler.step(0.1 * step), follower.step()
    assert scheduler.get_last_lr() == follower.get_last_lr() == [rate * (35 / 40) for rate in RATES]


# ---- others' ----


def test_piecewise_constant_follows_its_rules() -> None:
    factors = [1.0] * 10 + [0.5] * 10 + [0.1] * 21
    expected = [[rate * factor for rate in RATES] for factor in factors]
    assert curve(*begin(flags("piecewise_constant", "step_rules=1:10,0.5:20,0.1"))) == expected


@pytest.mark.parametrize(
    ("name", "args", "oracle"),
    [
        ("StepLR", ["step_size=5", "gamma=0.5"], lambda o: torch_schedulers.StepLR(o, 5, 0.5)),
        ("multisteplr", ["milestones=[3,9]"], lambda o: torch_schedulers.MultiStepLR(o, [3, 9])),
        (
            "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts",
            ["T_0=7", "eta_min=1e-5"],
            lambda o: torch_schedulers.CosineAnnealingWarmRestarts(o, 7, eta_min=1e-5),
        ),
        (
            "OneCycleLR",
            ["max_lr=0.1", "total_steps=41", "cycle_momentum=False"],
            lambda o: torch_schedulers.OneCycleLR(o, 0.1, 41, cycle_momentum=False),
        ),
    ],
)
def test_classes_by_name_take_precedence(name: str, args: list[str], oracle: Callable) -> None:
    check_curve(flags("cosine", *args, lr_scheduler_type=name), oracle)


def test_rates_of_adafactors_relative_steps_are_those_it_takes() -> None:
    optimizer, scheduler = begin(flags(optimizer_type="Adafactor", optimizer_args=("warmup_init=True",)))
    other = Adafactor(groups(), lr=None, warmup_init=True)
    oracle = AdafactorSchedule(other, initial_lr=RATES[0])
    assert scheduler.get_last_lr() == [RATES[0]] * 2 == oracle.get_last_lr()
    for _ in range(5):
        for each, follower in ((optimizer, scheduler), (other, oracle)):
            take_step(each)
            follower.step()
        assert scheduler.get_last_lr() == [float(rate) for rate in oracle.get_last_lr()]
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    for ours, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert torch.equal(ours["params"][0], theirs["params"][0])


def test_schedule_free_optimizers_keep_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    class SgdScheduleFree(torch.optim.SGD):
        pass

    monkeypatch.setattr(torch.optim, "SgdScheduleFree", SgdScheduleFree, raising=False)
    chosen = flags("cosine", optimizer_type="sgdschedulefree", lr_scheduler_type="StepLR", warmup="10")
    assert curve(*begin(chosen)) == [list(RATES)] * (STEPS + 1)


# ---- REX ----


def rex_by_the_facts(step: int, total: int, warmup: int, ratio: float, alpha: float, beta: float) -> float:
    """spec: k = step - W, n = total - W, z = (n - k mod n)/n, m + (1 - m)·z/(alpha + beta·z)."""
    if warmup == 1 and step == 1:
        return ratio
    if warmup > 1 and 1 <= step <= warmup - 1:
        return ratio + (1 - ratio) * (step - 1) / (warmup - 1)
    k, n = step - warmup, total - warmup
    if n <= 0 or k >= n or k == -1:
        return ratio
    z = (n - k % n) / n
    return ratio + (1 - ratio) * z / (alpha + beta * z)


@pytest.mark.parametrize("warmup", [0, 1, 2, 10, 39, 40, 60])
@pytest.mark.parametrize("shape", [{}, {"ratio": 0.2, "alpha": 0.3, "beta": 0.7}])
def test_rex_is_the_formula(warmup: int, shape: dict) -> None:
    args = (f"rex_alpha={shape['alpha']}", f"rex_beta={shape['beta']}") if shape else ()
    chosen = flags("rex", *args, warmup=str(warmup), lr_scheduler_min_lr_ratio=shape.get("ratio"))
    constants = {"ratio": 0.01, "alpha": 0.1, "beta": 0.9, **shape}
    rates = curve(*begin(chosen))
    assert len(rates) == STEPS + 1
    for step, (first, second) in enumerate(rates):
        factor = rex_by_the_facts(step, STEPS, warmup, **constants)
        if step == 0 and warmup > 1:
            factor = constants["ratio"]  # the formula wraps around to the end of the curve here
        assert first == pytest.approx(RATES[0] * factor, rel=1e-12), step
        assert second == pytest.approx(RATES[1] * factor, rel=1e-12), step


def test_rex_falls_slowly_first() -> None:
    rates = [first for first, _ in curve(*begin(flags("rex")))]
    assert rates[0] == RATES[0] and rates[-1] == RATES[0] * 0.01
    assert rates == sorted(rates, reverse=True)
    assert rates[20] / RATES[0] == pytest.approx(0.01 + 0.99 * 0.5 / 0.55)


# ---- warmup and decay ----


@pytest.mark.parametrize(("warmup", "steps"), [("7", 7), ("7.0", 7), ("0.175", 7), ("17.5%", 7), ("0.19", 7), ("1", 1)])
def test_warmup_is_steps_or_a_share_of_optimizer_steps(warmup: str, steps: int) -> None:
    rates = [first for first, _ in curve(*begin(flags("constant_with_warmup", warmup=warmup)))]
    assert rates == [RATES[0] * (min(step, steps) / steps) for step in range(STEPS + 1)]


def test_a_warmup_longer_than_the_run_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        begin(flags("cosine", warmup="40"))
    assert "the learning rate rises for 40 steps, the run has 40" in caplog.text


# ---- errors ----


@pytest.mark.parametrize(
    ("chosen", "complaint"),
    [
        (flags("cosin"), "--lr_scheduler: got cosin; expected one of adafactor, constant"),
        (flags("cosin"), "did you mean cosine?"),
        (flags("Cosine_With_Restart"), "did you mean cosine_with_restarts?"),
        (flags("余弦"), "for a class use --lr_scheduler_type"),
        (flags("constant", warmup="100"), "--lr_warmup_steps: got 100; expected 0 with --lr_scheduler constant"),
        (flags("constant", warmup="5%"), "use --lr_scheduler constant_with_warmup"),
        (flags("constant", "gamma=1"), "--lr_scheduler_args: got gamma; expected none"),
        (flags("cosine", "gamma=1"), "--lr_scheduler_args: got gamma; expected arguments of"),
        (flags("cosine_with_restarts", "num_cycle=2"), "did you mean num_cycles?"),
        (flags("constant_with_warmup", "timescale=2", warmup="2"), "it has none"),
        (flags("rex", "rex_alfa=2"), "did you mean rex_alpha?"),
        (flags("rex", "rex_alpha=0", "rex_beta=0"), "must not be negative, nor both 0"),
        (flags("linear", "num_warmup_steps=5"), "got num_warmup_steps"),
        (flags("cosine_with_min_lr"), "--lr_scheduler_min_lr_ratio: got nothing"),
        (flags("polynomial", "lr_end=1"), "which fails (ValueError: lr_end"),
        (flags("polynomial", warmup="40"), "--lr_warmup_steps: got 40; expected fewer than the run's 40 steps"),
        (flags("warmup_stable_decay", warmup="30", decay="20"), "got 30 steps of warmup and 20 of decay"),
        (flags("piecewise_constant"), "got no step_rules"),
        (flags("piecewise_constant", "step_rules='every now and then'"), "which fails (ValueError"),
        (flags("adafactor:1e-4"), "expected an Adafactor optimizer with relative_step=True"),
        (flags("adafactor:fast", optimizer_type="Adafactor"), "a number behind the colon"),
        (flags(optimizer_type="Adafactor", warmup="10"), "--lr_warmup_steps: got 10; expected 0 with an Adafactor"),
        (flags(lr_scheduler_type="StepLr2"), "did you mean StepLR?"),
        (flags(lr_scheduler_type="StepLR"), "--lr_scheduler_args: got no step_size; expected arguments of StepLR"),
        (flags("constant", "step_sizes=2", lr_scheduler_type="StepLR"), "did you mean step_size?"),
        (flags(lr_scheduler_type="no_such_package.Lr"), "install the package that holds it"),
        (flags(lr_scheduler_type="collections.OrderedDict"), "expected a scheduler of collections"),
        (flags("constant", "a", lr_scheduler_type="StepLR"), "expected key=value"),
    ],
)
def test_what_cannot_work_is_one_line(chosen: OptimizerFlags, complaint: str) -> None:
    assert complaint in str(error_of(lambda: begin(chosen)))


# ---- resuming ----

RESUMED = [
    flags(),
    flags("linear", warmup="4"),
    flags("cosine_with_restarts", lr_scheduler_num_cycles=3),
    flags("inverse_sqrt", warmup="4"),
    flags("rex", warmup="4"),
    flags("piecewise_constant", "step_rules=1:15,0.5:25,0.1"),
    flags("warmup_stable_decay", warmup="4", decay="20"),
    flags("reduce_lr_on_plateau", "patience=2"),
    flags("greedy", "patience=2", "min_lr=1e-6", "smooth=True"),
    flags("constant", "T_max=40", lr_scheduler_type="CosineAnnealingLR"),
    flags("constant", "milestones=[15,25]", lr_scheduler_type="MultiStepLR"),
    flags("constant", "max_lr=0.1", "total_steps=41", "cycle_momentum=False", lr_scheduler_type="OneCycleLR"),
    flags(optimizer_type="Adafactor"),
]


def saved(state: dict) -> dict:
    """What comes back from a file that is read safely."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def go(optimizer: torch.optim.Optimizer, scheduler, steps: range) -> list[list[float]]:
    seen = []
    for step in steps:
        take_step(optimizer)
        scheduler.step(abs(step - 12.0))
        seen.append([*(float(group["lr"]) for group in optimizer.param_groups), *scheduler.get_last_lr()])
    return seen


@pytest.mark.parametrize("chosen", RESUMED, ids=lambda f: f.lr_scheduler_type or f"{f.optimizer_type}-{f.lr_scheduler}")
def test_a_resumed_schedule_goes_on_as_if_nothing_had_been(chosen: OptimizerFlags) -> None:
    optimizer, scheduler = begin(chosen)
    go(optimizer, scheduler, range(20))
    states = saved(optimizer.state_dict()), saved(scheduler.state_dict())
    parameters = [group["params"][0].detach().clone() for group in optimizer.param_groups]
    undisturbed = go(optimizer, scheduler, range(20, STEPS))

    resumed, follower = begin(chosen)
    with torch.no_grad():
        for group, values in zip(resumed.param_groups, parameters, strict=True):
            group["params"][0].copy_(values)
    resumed.load_state_dict(states[0])
    follower.load_state_dict(states[1])
    assert go(resumed, follower, range(20, STEPS)) == undisturbed
    for ours, theirs in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        assert torch.equal(ours["params"][0], theirs["params"][0])


@pytest.mark.parametrize(
    "before", [flags("cosine"), flags(), flags("constant", "step_size=3", lr_scheduler_type="StepLR")]
)
@pytest.mark.parametrize("after", [flags("linear"), flags()])
@pytest.mark.parametrize("num_steps", [0, 1, 20])
@pytest.mark.filterwarnings("error:Detected call")
def test_another_schedule_takes_over_where_the_first_one_was(
    before: OptimizerFlags, after: OptimizerFlags, num_steps: int
) -> None:
    optimizer, scheduler = begin(before)
    go(optimizer, scheduler, range(num_steps))
    states = saved(optimizer.state_dict()), saved(scheduler.state_dict())
    resumed, follower = begin(after)
    resumed.load_state_dict(states[0])
    follower.load_state_dict(states[1])
    rates = [
        [g["lr"] for g in resumed.param_groups],
        *(row[:2] for row in go(resumed, follower, range(num_steps, STEPS))),
    ]
    assert rates == curve(*begin(after))[num_steps:]


@pytest.mark.parametrize("before", [flags("cosine"), flags()])
@pytest.mark.parametrize("after", ["linear", "constant"])
def test_another_schedule_and_another_rate_go_together(before: OptimizerFlags, after: str) -> None:
    optimizer, scheduler = begin(before)
    go(optimizer, scheduler, range(10))
    changed = flags(after, learning_rate=2 * RATES[0])
    faster = [{**group, "lr": 2 * group["lr"]} for group in groups()]
    resumed = create_optimizer(changed, faster)
    follower = create_scheduler(changed, resumed, num_steps=STEPS)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    follower.load_state_dict(saved(scheduler.state_dict()))
    set_learning_rates(resumed, follower, [2 * rate for rate in RATES])
    expected = [2 * rate * (0.75 if after == "linear" else 1) for rate in RATES]
    assert [group["lr"] for group in resumed.param_groups] == follower.get_last_lr() == expected
    go(resumed, follower, range(10, 20))
    assert follower.get_last_lr() == [2 * rate * (0.5 if after == "linear" else 1) for rate in RATES]


def test_the_position_is_not_lost_where_there_is_no_schedule() -> None:
    optimizer, scheduler = begin(flags("cosine"))
    go(optimizer, scheduler, range(10))
    for chosen, steps in ((flags(), range(10, 20)), (flags(), range(20, 30)), (flags("linear"), range(30, 30))):
        states = optimizer.state_dict(), scheduler.state_dict()
        optimizer, scheduler = begin(chosen)
        optimizer.load_state_dict(states[0])
        scheduler.load_state_dict(states[1])
        go(optimizer, scheduler, steps)
    assert scheduler.get_last_lr() == [rate * 0.25 for rate in RATES]


def test_a_schedule_without_positions_cannot_take_over() -> None:
    _, scheduler = begin(flags("cosine"))
    _, other = begin(flags("constant", "step_size=3", lr_scheduler_type="StepLR"))
    error = error_of(lambda: other.load_state_dict(scheduler.state_dict()))
    assert "expected cosine, as in the state that is resumed" in str(error)


def test_a_longer_run_goes_on_along_its_own_curve() -> None:
    optimizer, scheduler = begin(flags("linear"), num_steps=40)
    go(optimizer, scheduler, range(20))
    resumed, follower = begin(flags("linear"), num_steps=80)
    resumed.load_state_dict(optimizer.state_dict())
    follower.load_state_dict(scheduler.state_dict())
    go(resumed, follower, range(20, 40))
    assert follower.get_last_lr() == [rate * 0.5 for rate in RATES]


def test_base_rates_can_be_changed_from_outside() -> None:
    optimizer, scheduler = begin(flags("linear"))
    go(optimizer, scheduler, range(10))
    scheduler.base_lrs = [1.0, 2.0]
    go(optimizer, scheduler, range(10, 20))
    assert scheduler.get_last_lr() == [0.5, 1.0]
    assert not hasattr(begin(flags())[1], "base_lrs")
