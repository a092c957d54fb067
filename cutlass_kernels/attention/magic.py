"""Division by a number that is known before a launch, as a product and a shift."""

from functools import cache


@cache
def magic_of(divisor: int) -> tuple[int, int]:
    """(factor, shift): ``value * factor >> shift`` is ``value // divisor`` for 0 <= value < 2 ** 31.

    The factor has 32 bits, and is given as a signed number of the same bits.

    Granlund and Montgomery, "Division by Invariant Integers using Multiplication" (1994), theorem 4.2.
    """
    shift = 31 + (divisor - 1).bit_length()
    factor = -(-(1 << shift) // divisor)
    return (factor ^ 1 << 31) - (1 << 31), shift
