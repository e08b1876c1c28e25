"""The checker of annotations that jaxtyping's import hook puts on every function (see conftest.py)."""

import contextlib

import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

_RAISES = pytest.raises
_BEARTYPE = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a float may be an int


def checked(function):
    """`function` with its annotations checked, but for constructors of pytrees: JAX builds those of any leaves."""
    if function.__name__ == "__init__" and any("Array" in str(kind) for kind in function.__annotations__.values()):
        return function
    return _BEARTYPE(function)


@contextlib.contextmanager
def unchecked():
    """No checks within the block."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@contextlib.contextmanager
def raises_unchecked(*expected, **options):
    """`pytest.raises` without checks: functions are given what they must refuse themselves, in their own words."""
    with _RAISES(*expected, **options) as info, unchecked():
        yield info
