"""How the transformer's weights are kept: as they are, or in 8 bits."""

from typing import Literal

Fp8Mode = Literal["off", "plain", "scaled"]
"""`plain` casts each weight; `scaled` gives 64 weights of a row a common scale, which keeps much more of them."""


def fp8_mode(*, fp8: bool, scaled: bool) -> Fp8Mode:
    """What the two flags mean together; scales imply fp8."""
    return "scaled" if scaled else "plain" if fp8 else "off"
