"""A number of steps as users write it: `100`, or as a share of the run, `0.1` or `10%`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class StepCount:
    """So many optimizer steps, or a share of the run's."""

    value: int | float = 0
    """An integer counts steps; a float is a share from 0 to 1."""

    expected: ClassVar[str] = "a whole number of steps (100), or a share of the run (0.1 or 10%)"
    """The rule, for messages."""

    @classmethod
    def parse(cls, text: str) -> StepCount:
        """Reads one. Whole numbers from 1 on are steps, also when written as `1.0`; the whole run is `100%`.

        Raises:
            ValueError: it is neither.
        """
        number = text.strip()
        if number.endswith("%"):
            share = float(number.removesuffix("%")) / 100
        elif float(number).is_integer():
            steps = int(float(number))
            if steps < 0:
                raise ValueError(text)
            return cls(value=steps)
        else:
            share = float(number)
        if not 0 <= share <= 1:
            raise ValueError(text)
        return cls(value=share or 0)

    def of(self, num_steps: int) -> int:
        """How many steps that is in a run of `num_steps`; what is over a whole number does not count."""
        if isinstance(self.value, int):
            return self.value
        return int(self.value * num_steps + 1e-6)  # 0.29 * 100 is a little less than 29

    def __bool__(self) -> bool:
        return self.value > 0

    def __str__(self) -> str:
        return "100%" if isinstance(self.value, float) and self.value == 1 else str(self.value)
