"""REX: a learning rate that falls slowly first and quickly at the end.

Source: Chen, Wolfe, Kyrillidis, "REX: Revisiting Budgeted Training with an Improved Schedule", 2021.
"""


def rex_factor(
    step: int, *, num_steps: int, num_warmup_steps: int, min_ratio: float, rex_alpha: float, rex_beta: float
) -> float:
    """What the learning rate is multiplied by after `step` optimizer steps.

    With k = step - warmup, n = steps after the warmup, z = (n - k)/n and the lowest factor m:
    m + (1 - m)·z / (alpha + beta·z). The warmup rises from m in a straight line.
    """
    after, num_after = step - num_warmup_steps, num_steps - num_warmup_steps
    if after < 0 and num_warmup_steps > 1:
        rise = max(step - 1, 0) / (num_warmup_steps - 1)
    elif after < 0 or after >= num_after or step == num_warmup_steps == 1:
        rise = 0.0
    else:
        rest = (num_after - after) / num_after
        rise = rest / (rex_alpha + rex_beta * rest)
    return min_ratio + (1 - min_ratio) * rise
