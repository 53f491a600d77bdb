"""NumPy's own tests of np.einsum, run with this package's einsum in its place.

The classes below inherit NumPy's tests, so that each of them is collected here. Where einsum refuses a call
that np.einsum takes, or refuses it with another type of error, np.einsum's answer stands in, so that the rest
of that test counts too; what was replaced has to be exactly what `EXCEPTIONS` lists for that test, by the
headings of the list in docs/concepts/notation.md. No test is left out, and none may fail.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from einsum_transformer.engine import EquationError, einsum

SIZE_ONE = "Letters of size 1"
ERRORS = "Errors"
CASTING = "out and casting"

# What np.einsum's answer stands in for, by a part of einsum's message.
REFUSALS = {
    "a letter of size 1 does not broadcast": SIZE_ONE,
    "cannot be cast from float64 to out's int64 with casting='safe'": CASTING,
}

EXCEPTIONS = {
    # A call without arguments; the second list of the path does not fit.
    "test_einsum_errors[_einsum-True]": {ERRORS},
    "test_einsum_errors[_einsum-False]": {ERRORS},
    "test_path_type_input_invalid": {ERRORS},
    # Floats are written to an array of integers, with optimize="optimal".
    "test_einsum_0d_out": {CASTING},
    # Each ends with "ij,ij->j" of shapes (10, 2) and (1, 2), and "i,i" of shapes (2,) and (1,).
    "test_einsum_sums_int8": {SIZE_ONE},
    "test_einsum_sums_uint8": {SIZE_ONE},
    "test_einsum_sums_int16": {SIZE_ONE},
    "test_einsum_sums_uint16": {SIZE_ONE},
    "test_einsum_sums_int32": {SIZE_ONE},
    "test_einsum_sums_uint32": {SIZE_ONE},
    "test_einsum_sums_int64": {SIZE_ONE},
    "test_einsum_sums_uint64": {SIZE_ONE},
    "test_einsum_sums_float16": {SIZE_ONE},
    "test_einsum_sums_float32": {SIZE_ONE},
    "test_einsum_sums_float64": {SIZE_ONE},
    "test_einsum_sums_longdouble": {SIZE_ONE},
    "test_einsum_sums_cfloat64": {SIZE_ONE},
    "test_einsum_sums_cfloat128": {SIZE_ONE},
    "test_einsum_sums_clongdouble": {SIZE_ONE},
    "test_einsum_sums_object": {SIZE_ONE},
    "test_broadcasting_dot_cases": {SIZE_ONE},
    "test_singleton_broadcasting": {SIZE_ONE},
}

_met: set[str] = set()
_np_einsum = np.einsum


def _einsum(*arguments, **keywords):
    """einsum; where it differs as listed, np.einsum's answer or error, and the heading is noted."""
    try:
        return einsum(*arguments, **keywords)
    except (EquationError, TypeError) as error:
        ours = error
    try:
        answer = _np_einsum(*arguments, **keywords)
    except Exception as theirs:
        if isinstance(ours, type(theirs)):
            raise ours from None
        _met.add(ERRORS)
        raise
    headings = [heading for words, heading in REFUSALS.items() if words in str(ours)]
    if not headings:
        raise ours
    _met.add(headings[0])
    return answer


class _NumPy:
    """NumPy with another einsum."""

    einsum = staticmethod(_einsum)

    def __getattr__(self, name):
        return getattr(np, name)


def _numpy_tests() -> ModuleType:
    path = Path(np.__file__).parent / "_core" / "tests" / "test_einsum.py"
    spec = importlib.util.spec_from_file_location("numpy_einsum_tests", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # Some of its parameters are np.einsum itself, read when the module is made.
        patch.setattr(np, "einsum", _einsum)
        spec.loader.exec_module(module)
    module.np = _NumPy()
    return module


_suite = _numpy_tests()


class TestEinsum(_suite.TestEinsum):
    pass


class TestEinsumPath(_suite.TestEinsumPath):
    pass


test_overlap = _suite.test_overlap
test_einsum_chunking_precision = _suite.test_einsum_chunking_precision


@pytest.fixture(autouse=True)
def _only_what_is_listed(request):
    _met.clear()
    yield
    assert _met == EXCEPTIONS.get(request.node.name, set())


def test_every_listed_test_is_one_of_numpys():
    for name in EXCEPTIONS:
        function = name.partition("[")[0]
        assert any(hasattr(home, function) for home in (TestEinsum, TestEinsumPath, _suite)), name


def test_nothing_of_numpys_file_is_left_out():
    ours = {"TestEinsum", "TestEinsumPath", "test_overlap", "test_einsum_chunking_precision"}
    assert ours == {name for name in vars(_suite) if name.lower().startswith("test")}
