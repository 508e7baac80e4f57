"""What scenarios assert, with the values in the message. Below everything else here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

# Far above rounding (in half precision that of the inputs), far below what any mistake of these scenarios makes. The
# valid call at their end is held to the tolerance rule.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def check_close(what: str, actual: Any, expected: Any, dtype: str = "float32") -> None:
    """Values that a fault must not change; infinities must be equal, and NaN is never right."""
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=False, err_msg=what)


def check_equal(what: str, actual: Any, expected: Any) -> None:
    np.testing.assert_array_equal(np.asarray(actual).astype(np.float64), expected, err_msg=what)


def check_nan(what: str, actual: Any) -> None:
    others = np.argwhere(~np.isnan(actual))
    assert not others.size, f"{what}: {len(others)} of {np.size(actual)} values are not NaN, first at {others[0]}"


def check_finite(what: str, actual: Any) -> None:
    others = np.argwhere(~np.isfinite(actual))
    assert not others.size, f"{what}: {len(others)} of {np.size(actual)} values are not finite, first at {others[0]}"


def check_raises(
    what: str, attempt: Callable[[], Any], errors: type[Exception] | tuple[type[Exception], ...], words: str
) -> None:
    """The attempt raises one of these errors, whose message matches the regular expression."""
    try:
        attempt()
    except Exception as error:
        raised = error
    else:
        raise AssertionError(f"{what}: accepted, expected an error with {words!r}")
    text = f"{what}: {type(raised).__name__}: {raised}"
    assert isinstance(raised, errors), f"{text}, expected {errors}"
    assert re.search(words, str(raised), re.DOTALL), f"{text}, expected {words!r} in the message"
