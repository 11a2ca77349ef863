"""Peaks of memory are logged for each stage on a GPU, here a stand-in for one, and for none elsewhere."""

import logging

import pytest
import torch

from common.device import peak_logged
from common.residency import Resident

GPU = torch.device("cuda", 0)


class Allocator:
    """What torch.cuda counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 0
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: self.peak + 10**9)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self._reset())

    def take(self, size: float) -> None:
        self.now += int(size)
        self.peak = max(self.peak, self.now)

    def _reset(self) -> None:
        self.peak = self.now


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    return Allocator(monkeypatch)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.set_level(logging.INFO)
    return caplog.messages


def spike(gpu: Allocator, size: float) -> None:
    gpu.take(size)
    gpu.take(-size)


def test_a_stage_tells_its_own_peak_and_not_an_earlier_one(gpu: Allocator, caplog) -> None:
    caplog.set_level(logging.INFO)
    spike(gpu, 9e9)
    gpu.take(1e9)
    with peak_logged("復号", GPU) as peak:
        spike(gpu, 2e9)
    assert (peak.allocated, peak.reserved) == (3e9, 4e9)
    assert caplog.messages == ["復号: at most 3.00 GB in use on cuda:0, 4.00 GB reserved"]


def test_stages_within_stages_take_nothing_from_each_other(gpu: Allocator) -> None:
    with peak_logged("all", GPU) as outer:
        spike(gpu, 5e9)
        with peak_logged("one", GPU) as inner:
            spike(gpu, 3e9)
        with peak_logged("other", GPU) as other:
            spike(gpu, 7e9)
        spike(gpu, 1e9)
    assert [peak.allocated for peak in (outer, inner, other)] == [7e9, 3e9, 7e9]


def test_a_stage_that_fails_says_nothing_and_disturbs_no_other(gpu: Allocator, caplog) -> None:
    caplog.set_level(logging.INFO)
    with peak_logged("all", GPU) as outer:
        with pytest.raises(RuntimeError), peak_logged("broken", GPU):
            spike(gpu, 4e9)
            raise RuntimeError
    assert outer.allocated == 4e9 and [text.split(":")[0] for text in caplog.messages] == ["all"]


def test_nothing_is_counted_on_a_cpu(caplog) -> None:
    caplog.set_level(logging.INFO)
    with peak_logged("all", torch.device("cpu")) as peak:
        torch.ones(1000)
    assert peak.allocated == 0 and caplog.messages == []


def test_a_model_tells_what_it_took_while_it_was_there(gpu: Allocator, caplog, monkeypatch) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("common.residency.release_memory", lambda device: None)

    def load() -> torch.nn.Module:
        gpu.take(2e9)
        return torch.nn.Linear(1, 1)

    model = Resident("変換器", load, GPU, keep=False)
    with model.use(), model.use():
        spike(gpu, 1e9)
    assert [text for text in caplog.messages if "at most" in text] == [
        "変換器: at most 3.00 GB in use on cuda:0, 4.00 GB reserved"
    ]
