"""What the processes of one run tell each other; threads stand in for them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue

import pytest

from common.processes import Processes
from options.errors import UserError

WORLD = 3
PROBLEM = UserError("--output_dir", "読むだけ", "a folder to write in", "give another one")


@dataclass(frozen=True, kw_only=True)
class Thread(Processes):
    """Hands values over by a queue for each receiver."""

    queues: tuple[Queue, ...]

    def gather(self, value: object) -> list:
        for queue in self.queues:
            queue.put((self.rank, value))
        received = dict(self.queues[self.rank].get(timeout=10) for _ in range(self.world))
        return [received[rank] for rank in range(self.world)]


def everyones(act: Callable[[Processes], object]) -> list[object]:
    """What `act` returns or raises in each process."""

    def outcome(process: Processes) -> object:
        try:
            return act(process)
        except UserError as error:
            return str(error)

    queues = tuple(Queue() for _ in range(WORLD))
    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(outcome, [Thread(rank=rank, world=WORLD, queues=queues) for rank in range(WORLD)]))


def test_the_main_process_acts_alone_and_all_get_what_it_found() -> None:
    acted = []

    def act(process: Processes) -> str:
        return process.in_main(lambda: acted.append(process.rank) or f"状態 {process.rank}")

    assert everyones(act) == ["状態 0"] * WORLD
    assert acted == [0]


def test_all_are_told_of_what_the_main_process_complains_about() -> None:
    def fail() -> None:
        raise PROBLEM

    assert everyones(lambda process: process.in_main(fail)) == [str(PROBLEM)] * WORLD
    with pytest.raises(UserError) as alone:
        Processes().in_main(fail)
    assert alone.value is PROBLEM
