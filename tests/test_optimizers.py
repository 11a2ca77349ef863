"""Optimizers: the class that a name means, what it is given, and that a resumed one goes on bit for bit."""

import io
import logging
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn

from common.flags import parse
from networks import lora_framepack
from options.errors import UserError
from options.flags_optimizer import OptimizerFlags, check_optimizer
from options.key_values import read_literals, split_pairs
from options.step_count import StepCount
from training.optimizers import create_optimizer, describe, eval_mode, evaluation_weights, find_optimizer, train_mode
from training.rehearsal import rehearse
from training.schedulers import create_scheduler

RATE, RATIO = 1e-2, 4.0


class AdamWScheduleFree(torch.optim.Optimizer):
    """Gradients at y, results at x, steps at z. Source: Defazio et al., "The Road Less Scheduled", 2024."""

    def __init__(self, params, lr: float = 1e-3, beta: float = 0.9, warmup_steps: int = 0) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "warmup_steps": warmup_steps, "k": 0, "train_mode": False})

    def train(self) -> None:
        self._move(True, lambda beta: 1 - beta)

    def eval(self) -> None:
        self._move(False, lambda beta: 1 - 1 / beta)

    @torch.no_grad()
    def _move(self, train: bool, weight: Callable[[float], float]) -> None:
        for group in self.param_groups:
            for p in group["params"] if group["train_mode"] != train else []:
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight(group["beta"]))
            group["train_mode"] = train

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            assert group["train_mode"], "stepped outside of train mode"
            c = 1 / (group["k"] + 1)
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, c)
                p.sub_(p.grad, alpha=group["lr"] * (1 - group["beta"] * (1 - c)))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1


class CountsInNumpy(torch.optim.SGD):
    """Keeps what cannot be read back safely."""

    def state_dict(self) -> dict:
        import numpy

        return {**super().state_dict(), "count": numpy.float64(1)}


@pytest.fixture(autouse=True)
def other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is not installed everywhere."""
    package = types.ModuleType("some_package")
    package.AdamWScheduleFree, package.CountsInNumpy = AdamWScheduleFree, CountsInNumpy
    package.NotOne = dict
    monkeypatch.setitem(sys.modules, "some_package", package)


def flags(optimizer_type: str = "AdamW", *args: str, **others) -> OptimizerFlags:
    others.setdefault("learning_rate", RATE)
    return OptimizerFlags(optimizer_type=optimizer_type, optimizer_args=args, **others)


def weights() -> list[nn.Parameter]:
    """One large enough for 8 bits, one of another shape."""
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 128), (8, 4))]


def groups(parameters: list[nn.Parameter], ratio: float = RATIO) -> list[dict]:
    first, second = parameters
    return [
        {"params": [first], "lr": RATE, "name": "unet"},
        {"params": [second], "lr": RATE * ratio, "name": "unet plus"},
    ]


def take_steps(
    optimizer, parameters: list[nn.Parameter], steps: range, after: Callable[[], None] = lambda: None
) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        after()


def saved(state: dict) -> dict:
    """What comes back from a file that is read safely."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def error_of(action: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return caught.value


# ---- which class ----


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("AdamW", "torch.optim.adamw.AdamW"),
        ("adamw", "torch.optim.adamw.AdamW"),
        ("ADAM", "torch.optim.adam.Adam"),
        ("sgd", "torch.optim.sgd.SGD"),
        ("RMSprop", "torch.optim.rmsprop.RMSprop"),
        ("torch.optim.NAdam", "torch.optim.nadam.NAdam"),
        ("adafactor", "transformers.optimization.Adafactor"),
        ("transformers.Adafactor", "transformers.optimization.Adafactor"),
        ("torch.optim.Adafactor", "torch.optim.Adafactor"),
        ("adamw8bit", "bitsandbytes.optim.adamw.AdamW8bit"),
        ("Lion8bit", "bitsandbytes.optim.lion.Lion8bit"),
        ("PagedAdamW8bit", "bitsandbytes.optim.adamw.PagedAdamW8bit"),
        ("bitsandbytes.optim.AdEMAMix8bit", "bitsandbytes.optim.ademamix.AdEMAMix8bit"),
        ("bitsandbytes.optim.Lion", "bitsandbytes.optim.lion.Lion"),
    ],
)
def test_names_mean_the_classes_of_the_facts(name: str, path: str) -> None:
    found = find_optimizer(name)
    assert f"{found.__module__}.{found.__name__}" == path


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("AdmW", "did you mean AdamW?"),
        ("adamw8bits", "did you mean AdamW?"),
        ("AdmW8bit", "did you mean AdamW8bit?"),
        ("torch.optim.adamax", "did you mean torch.optim.Adamax?"),
        ("Prodigy", "write prodigyopt.Prodigy, and install its package"),
        ("AdamWScheduleFree", "write schedulefree.AdamWScheduleFree, and install its package"),
        ("最適化", "torch.optim has ASGD, Adadelta"),
        ("no_such_package.Adam", "install the package that holds it"),
        ("some_package.NotOne", "some_package has AdamWScheduleFree, CountsInNumpy"),
        ("Optimizer", "torch.optim has ASGD, Adadelta"),
        ("lr_scheduler", "torch.optim has ASGD, Adadelta"),
    ],
)
def test_unknown_optimizers_are_answered_with_the_nearest(name: str, remedy: str) -> None:
    error = error_of(lambda: find_optimizer(name))
    assert str(error).startswith(f"--optimizer_type: got {name}; expected ")
    assert remedy in str(error)


# ---- what it is given ----


def test_groups_keep_their_own_learning_rates_and_names() -> None:
    given = groups(weights())
    optimizer = create_optimizer(flags("AdamW", "weight_decay=0.05", "betas=0.8,0.9"), given)
    assert [(group["lr"], group["name"]) for group in optimizer.param_groups] == [(1e-2, "unet"), (4e-2, "unet plus")]
    assert all((g["weight_decay"], g["betas"]) == (0.05, (0.8, 0.9)) for g in optimizer.param_groups)
    assert optimizer.defaults["lr"] == RATE
    assert set(given[0]) == {"params", "lr", "name"}


def test_loraplus_groups_of_a_network_train_at_their_own_rates() -> None:
    class HunyuanVideoTransformerBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ff = nn.Linear(8, 8)

    network = lora_framepack.create_network(
        nn.ModuleDict({"transformer_blocks": nn.ModuleList([HunyuanVideoTransformerBlock()])}),
        args={"loraplus_lr_ratio": "16"},
    )
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = create_optimizer(flags("SGD"), network.parameter_groups(RATE))
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in network.named_parameters():
        expected = before[name] - (RATE * 16 if "lora_up" in name else RATE)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


@pytest.mark.parametrize("rate", [0.0, None])
def test_nothing_to_train_is_an_error(rate: float | None) -> None:
    error = error_of(lambda: create_optimizer(flags(learning_rate=rate), []))
    assert "--learning_rate" in str(error) and "nothing would be trained" in str(error)


@pytest.mark.parametrize(
    ("name", "args", "complaint"),
    [
        ("AdamW", ["weight_decy=0.1"], "got weight_decy; expected arguments of AdamW: betas, eps, weight_decay"),
        ("AdamW", ["weight_decy=0.1"], "did you mean weight_decay?"),
        ("adamw8bit", ["paged=True"], "did you mean is_paged?"),
        ("adafactor", ["relative_steps=False"], "did you mean relative_step?"),
        ("AdamW", ["betas=(2,3)"], "AdamW(betas=(2, 3)), which fails (ValueError: Invalid beta parameter"),
        ("AdamW", ["eps=tiny"], "AdamW(eps=tiny), which fails (TypeError"),
    ],
)
def test_wrong_arguments_are_named(name: str, args: list[str], complaint: str) -> None:
    assert complaint in str(error_of(lambda: create_optimizer(flags(name, *args), groups(weights()))))


def test_classes_that_take_anything_are_given_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    class Open(torch.optim.SGD):
        def __init__(self, params, **others) -> None:
            super().__init__(params, lr=others.pop("lr"))
            self.others = others

    monkeypatch.setattr(sys.modules["some_package"], "Open", Open, raising=False)
    optimizer = create_optimizer(flags("some_package.Open", "whatever=3"), groups(weights()))
    assert (optimizer.others, optimizer.defaults["lr"]) == ({"whatever": 3}, RATE)


def test_metadata_names_class_and_arguments() -> None:
    chosen = flags("adamw", "weight_decay=0.01", "betas=(0.9, 0.99)")
    optimizer = create_optimizer(chosen, groups(weights()))
    expected = "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.99))"
    assert describe(optimizer, chosen.optimizer_arguments) == expected
    assert describe(optimizer, {}) == "torch.optim.adamw.AdamW"


# ---- Adafactor ----


def test_adafactor_takes_relative_steps_unless_told_otherwise() -> None:
    optimizer = create_optimizer(flags("adafactor"), groups(weights()))
    assert all(group["relative_step"] for group in optimizer.param_groups) and optimizer.defaults["lr"] is None
    optimizer = create_optimizer(flags("Adafactor", "warmup_init=True", "relative_step=False"), groups(weights()))
    assert all(group["relative_step"] and group["warmup_init"] for group in optimizer.param_groups)
    optimizer = create_optimizer(flags("Adafactor", "relative_step=False", "scale_parameter=False"), groups(weights()))
    assert not any(group["relative_step"] for group in optimizer.param_groups)
    assert (optimizer.defaults["lr"], [g["lr"] for g in optimizer.param_groups]) == (RATE, [RATE, RATE * RATIO])


def test_adafactor_of_relative_steps_brings_its_schedule() -> None:
    assert flags("adafactor").resolved_lr_scheduler == "adafactor:0.01"
    assert flags("adafactor", lr_scheduler="cosine").resolved_lr_scheduler == "adafactor:0.01"
    assert flags("adafactor", "relative_step=False", lr_scheduler="cosine").resolved_lr_scheduler == "cosine"


# ---- resuming ----

STATEFUL = [
    flags("AdamW", "weight_decay=0.1"),
    flags("SGD", "momentum=0.9"),
    flags("Adagrad"),
    flags("RAdam"),
    flags("Adafactor"),
    flags("Adafactor", "warmup_init=True"),
    flags("Adafactor", "relative_step=False", "beta1=0.9", lr_scheduler="linear"),
    flags("AdamW8bit"),
    flags("Lion8bit", lr_scheduler="rex", lr_warmup_steps=StepCount(value=2)),
    flags("AdEMAMix8bit"),
    flags("RMSprop8bit"),
    flags("PagedAdamW8bit"),
    flags("some_package.AdamWScheduleFree", "beta=0.8"),
]


@pytest.mark.parametrize("chosen", STATEFUL, ids=lambda f: "-".join([f.optimizer_type, *f.optimizer_args]))
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_resumed_optimizer_goes_on_bit_for_bit(chosen: OptimizerFlags) -> None:
    def begin() -> tuple:
        parameters = weights()
        optimizer = create_optimizer(chosen, groups(parameters))
        scheduler = create_scheduler(chosen, optimizer, num_steps=8)
        train_mode(optimizer)
        return parameters, optimizer, scheduler

    parameters, optimizer, scheduler = begin()
    start = [parameter.detach().clone() for parameter in parameters]
    take_steps(optimizer, parameters, range(4), scheduler.step)
    kept = saved({"weights": [parameter.data for parameter in parameters]})["weights"]
    states = saved(optimizer.state_dict()), saved(scheduler.state_dict())
    rates = []
    take_steps(optimizer, parameters, range(4, 8), lambda: (scheduler.step(), rates.append(scheduler.get_last_lr())))

    again, resumed, follower = begin()
    with torch.no_grad():
        for parameter, values in zip(again, kept, strict=True):
            parameter.copy_(values)
    resumed.load_state_dict(states[0])
    follower.load_state_dict(states[1])
    again_rates = []
    take_steps(resumed, again, range(4, 8), lambda: (follower.step(), again_rates.append(follower.get_last_lr())))

    assert all(torch.equal(one, other) for one, other in zip(parameters, again, strict=True))
    assert again_rates == rates
    assert not any(torch.equal(p, before) for p, before in zip(parameters, start, strict=True))


def test_8bit_optimizers_really_keep_8_bits() -> None:
    parameters = weights()
    optimizer = create_optimizer(flags("adamw8bit"), groups(parameters))
    take_steps(optimizer, parameters, range(1))
    assert optimizer.state[parameters[0]]["state1"].dtype == torch.uint8


# ---- schedule-free ----


def schedule_free(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = create_optimizer(flags("some_package.AdamWScheduleFree"), groups(parameters))
    train_mode(optimizer)
    return optimizer


def test_weights_to_save_are_those_of_eval_mode() -> None:
    parameters, others = weights(), weights()
    optimizer, other = schedule_free(parameters), schedule_free(others)
    take_steps(optimizer, parameters, range(3))
    take_steps(other, others, range(3))
    eval_mode(other)
    with evaluation_weights(optimizer):
        assert all(torch.equal(one, two) for one, two in zip(parameters, others, strict=True))
    train_mode(other)
    for one, two in zip(parameters, others, strict=True):
        torch.testing.assert_close(one, two)


def test_saving_and_sampling_leave_training_as_it_is() -> None:
    parameters, disturbed = weights(), weights()
    optimizer, other = schedule_free(parameters), schedule_free(disturbed)
    take_steps(optimizer, parameters, range(5))
    for step in range(5):
        take_steps(other, disturbed, range(step, step + 1))
        with pytest.raises(OSError), evaluation_weights(other):
            raise OSError("no space left")
    assert all(torch.equal(one, two) for one, two in zip(parameters, disturbed, strict=True))
    assert all(group["train_mode"] for group in other.param_groups)


def test_optimizers_without_modes_are_left_alone() -> None:
    parameters = weights()
    optimizer = create_optimizer(flags("SGD"), groups(parameters))
    train_mode(optimizer), eval_mode(optimizer)
    with evaluation_weights(optimizer):
        take_steps(optimizer, parameters, range(1))
    assert not torch.equal(parameters[0], weights()[0])


# ---- the rehearsal ----


@pytest.mark.parametrize("chosen", STATEFUL, ids=lambda f: "-".join([f.optimizer_type, *f.optimizer_args]))
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_what_works_passes_the_rehearsal_in_silence(chosen: OptimizerFlags, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.random.get_rng_state()
    with caplog.at_level(logging.WARNING, logger="training"):
        rehearse(chosen, num_steps=10, loraplus_lr_ratio=4.0)
    assert not caplog.messages
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("LBFGS", "a step of LBFGS on cpu, which fails (TypeError: LBFGS.step() missing"),
        ("SparseAdam", "SparseAdam does not support dense gradients"),
        ("SGD8bit", "SGD without momentum is not supported"),
        ("AdaW", "did you mean AdamW?"),
    ],
)
def test_what_cannot_train_fails_the_rehearsal(name: str, complaint: str) -> None:
    assert complaint in str(error_of(lambda: rehearse(flags(name), num_steps=10)))


def test_8bit_without_a_backend_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    def broken(*_, **__) -> None:
        raise NotImplementedError("Could not run 'bitsandbytes::optimizer_update_8bit_blockwise'\nwith this backend")

    monkeypatch.setattr(bitsandbytes.functional, "optimizer_update_8bit_blockwise", broken)
    error = error_of(lambda: rehearse(flags("adamw8bit"), num_steps=10))
    assert str(error).startswith("--optimizer_type: got a step of adamw8bit on cpu, which fails (NotImplementedError")


def test_different_rates_are_rehearsed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class OneRate(torch.optim.SGD):
        def step(self) -> None:
            if len({group["lr"] for group in self.param_groups}) > 1:
                raise RuntimeError("one rate only")

    monkeypatch.setattr(sys.modules["some_package"], "OneRate", OneRate, raising=False)
    rehearse(flags("some_package.OneRate"), num_steps=10)
    assert "one rate only" in str(
        error_of(lambda: rehearse(flags("some_package.OneRate"), num_steps=10, loraplus_lr_ratio=4))
    )


def test_a_state_that_cannot_be_read_back_safely_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    rehearse(flags("some_package.CountsInNumpy"), num_steps=10)
    assert "CountsInNumpy: a run with it cannot be resumed" in caplog.text


# ---- the command line ----


def test_flags_have_the_defaults_of_the_facts_but_for_the_optimizer() -> None:
    chosen = parse(OptimizerFlags, description="", argv=[])
    assert chosen == OptimizerFlags()
    assert (chosen.optimizer_type, chosen.learning_rate, chosen.max_grad_norm) == ("AdamW", 2e-6, 1.0)
    assert (chosen.lr_scheduler, chosen.lr_warmup_steps.value, chosen.lr_decay_steps.value) == ("constant", 0, 0)
    assert (chosen.lr_scheduler_num_cycles, chosen.lr_scheduler_power, chosen.lr_scheduler_type) == (1, 1.0, "")
    check_optimizer(chosen)


def test_a_recipe_is_understood() -> None:
    argv = "--optimizer_type adamw8bit --learning_rate 2e-4 --optimizer_args weight_decay=0.1 betas=0.9,0.95 "
    argv += "--lr_scheduler cosine_with_min_lr --lr_scheduler_min_lr_ratio 0.1 --lr_warmup_steps 5% --max_grad_norm 0"
    chosen = parse(OptimizerFlags, description="", argv=argv.split())
    assert chosen.optimizer_arguments == {"weight_decay": 0.1, "betas": (0.9, 0.95)}
    assert (chosen.learning_rate, chosen.lr_warmup_steps.of(1000)) == (2e-4, 50)
    check_optimizer(chosen)


@pytest.mark.parametrize(
    ("text", "value", "of_1000"),
    [
        *[("100", 100, 100), ("100.0", 100, 100), ("1", 1, 1), ("1.0", 1, 1), ("0", 0, 0), ("0.0", 0, 0)],
        *[("0.1", 0.1, 100), ("10%", 0.1, 100), ("100%", 1.0, 1000), ("0%", 0, 0), ("0.29", 0.29, 290)],
        *[("2.5 %", 0.025, 25), ("5000", 5000, 5000), ("0.0019", 0.0019, 1)],
    ],
)
def test_steps_are_counts_or_shares(text: str, value: float, of_1000: int) -> None:
    steps = StepCount.parse(text)
    assert (steps.value, type(steps.value)) == (value, type(value))
    assert steps.of(1000) == of_1000
    assert bool(steps) == (value > 0)
    again = StepCount.parse(str(steps))
    assert (again.value, type(again.value)) == (value, type(value))


def test_shares_are_not_short_of_a_step_by_rounding() -> None:
    assert [StepCount.parse(f"{share}%").of(100) for share in range(101)] == list(range(101))


@pytest.mark.parametrize("text", ["ten", "-1", "-0.5", "1.5", "101%", "-1%", "nan", "inf", "%", ""])
def test_other_step_counts_are_errors(text: str) -> None:
    error = error_of(lambda: parse(OptimizerFlags, description="", argv=[f"--lr_warmup_steps={text}"]))
    assert str(error).startswith(f"--lr_warmup_steps: got {text}".rstrip())
    assert "a share of the run (0.1 or 10%)" in str(error)


def test_the_first_equals_sign_parts_key_and_value() -> None:
    assert split_pairs(["パターン=a=b", " x = 1 "], "--network_args") == {"パターン": "a=b", "x": "1"}


def test_values_are_python_literals_or_words() -> None:
    items = ["a=1e-2", "b=0.9,0.99", "c=True", "d='True'", "e=linear", "f=None", "g=[1,2]", "i=1:10,0.1"]
    expected = {
        "a": 0.01,
        "b": (0.9, 0.99),
        "c": True,
        "d": "True",
        "e": "linear",
        "f": None,
        "g": [1, 2],
        "i": "1:10,0.1",
    }
    assert read_literals(items, "--optimizer_args") == expected


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        ("weight_decay", "got weight_decay; expected key=value"),
        ("=0.1", "got =0.1; expected key=value"),
        ("", "got an empty text"),
        ("decouple=true", "write decouple=True"),
        ("eps=NONE", "write eps=None"),
        ("eps=", "got eps=; expected a Python value"),
        ("eps=1e-4x", "expected a Python value"),
        ("a=__import__('os').getcwd()", "expected a Python value"),
        ("betas=(0.9", "expected a Python value"),
    ],
)
def test_other_items_are_errors(item: str, complaint: str) -> None:
    assert complaint in str(error_of(lambda: check_optimizer(flags("AdamW", item))))


def test_a_key_that_comes_twice_is_an_error() -> None:
    assert "eps twice" in str(error_of(lambda: check_optimizer(flags("AdamW", "eps=1e-8", "eps=1e-6"))))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"learning_rate": 0.0}, "--learning_rate: got 0.0; expected a number above 0"),
        ({"learning_rate": float("nan")}, "--learning_rate: got nan"),
        ({"max_grad_norm": -1.0}, "--max_grad_norm: got -1.0"),
        ({"lr_scheduler_num_cycles": 0}, "--lr_scheduler_num_cycles: got 0"),
        ({"lr_scheduler_timescale": 0}, "--lr_scheduler_timescale: got 0"),
        ({"lr_scheduler_min_lr_ratio": 1.5}, "--lr_scheduler_min_lr_ratio: got 1.5"),
        ({"lr_scheduler_power": -1.0}, "--lr_scheduler_power: got -1.0"),
        ({"optimizer_type": " "}, "--optimizer_type: got an empty text"),
        ({"optimizer_args": ("lr=1e-4",)}, "use --learning_rate"),
    ],
)
def test_what_cannot_work_is_told_without_torch(changes: dict, complaint: str) -> None:
    assert complaint in str(error_of(lambda: check_optimizer(OptimizerFlags(**changes))))


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"lr_scheduler": "cosine", "lr_scheduler_power": 2.0}, "--lr_scheduler_power has no effect with a cosine"),
        ({"lr_scheduler": "warmup_stable_decay"}, "does not decay"),
        ({"lr_scheduler": "cosine", "lr_scheduler_type": "StepLR"}, "--lr_scheduler has no effect beside"),
        ({"optimizer_type": "p.AdamWScheduleFree", "lr_scheduler": "cosine"}, "needs no schedule"),
        ({"optimizer_type": "p.AdamWScheduleFree", "lr_warmup_steps": StepCount(value=9)}, "a warmup of its own"),
        ({"optimizer_type": "adafactor", "lr_scheduler": "cosine"}, "cosine has no effect on an Adafactor"),
        ({"optimizer_type": "adafactor", "optimizer_args": ("relative_step=False",)}, "--max_grad_norm 0"),
        ({"optimizer_type": "adafactor", "max_grad_norm": 0.0}, "relative_step=False makes it heed"),
    ],
)
def test_flags_without_effect_are_told(changes: dict, hint: str) -> None:
    chosen = OptimizerFlags(**changes)
    check_optimizer(chosen)
    assert any(hint in line for line in chosen.hints())


def test_a_plain_recipe_has_no_hints() -> None:
    assert OptimizerFlags().hints() == []
    warmup = StepCount(value=0.1)
    assert OptimizerFlags(lr_scheduler="polynomial", lr_scheduler_power=2.0, lr_warmup_steps=warmup).hints() == []
