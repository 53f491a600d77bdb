"""einsum equals np.einsum for random calls, but for the differences that docs/concepts/notation.md lists."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from einsum_transformer.engine import EquationError, Leaf, einsum

NOTATION = Path(__file__).parents[2] / "docs" / "concepts" / "notation.md"
TYPES = ["f2", "f4", "f8", "i1", "u1", "i4", "i8", "u8", "?", "c8", "c16", "O", ">f4", "g"]


@st.composite
def arrays(draw, shape):
    """Small integers of any type in any memory layout, or as nested lists."""
    dtype = draw(st.sampled_from(TYPES))
    seed = draw(st.integers(0, 1000))
    a = np.random.default_rng(seed).integers(0 if dtype[0] == "u" else -3, 4, shape)
    a = np.asarray(a).astype(dtype)
    layout = draw(st.sampled_from(["C", "F", "reversed", "permuted", "spread", "list"]))
    if layout == "list":
        return a if a.dtype == object else a.tolist()
    if layout == "C" or a.ndim == 0:
        return a
    if layout == "F":
        return np.asfortranarray(a)
    if layout == "reversed":
        return a[..., ::-1]
    if layout == "spread":
        return np.repeat(a, 2, axis=-1)[..., ::2]
    axes = draw(st.permutations(range(a.ndim)))
    return np.ascontiguousarray(a.transpose(axes)).transpose(np.argsort(axes))


@st.composite
def calls(draw):
    """(equation, operands, keywords) of np.einsum's grammar, a few of them wrong."""
    letters = draw(st.lists(st.sampled_from("ijkAbZ"), min_size=1, max_size=4, unique=True))
    sizes = {letter: draw(st.sampled_from([0, 1, 2, 3, 3])) for letter in letters}
    full = draw(st.lists(st.sampled_from([0, 1, 2, 3]), max_size=2)) if draw(st.booleans()) else None
    terms, operands = [], []
    for _ in range(draw(st.integers(1, 4))):
        term = draw(st.lists(st.sampled_from(letters), max_size=3))
        shape = [draw(st.sampled_from([sizes[letter]] * 9 + [1])) for letter in term]
        if full is not None and draw(st.integers(0, 3)):
            position = draw(st.integers(0, len(term)))
            start = draw(st.integers(0, len(full)))
            shape[position:position] = [draw(st.sampled_from([n, n, 1])) for n in full[start:]]
            term.insert(position, "...")
        terms.append("".join(term))
        operands.append(draw(arrays(shape)))
    equation = ",".join(terms)
    if draw(st.integers(0, 3)):
        used = sorted(set("".join(terms)) - {"."})
        output = draw(st.lists(st.sampled_from(used), unique=True)) if used else []
        if full is not None and draw(st.integers(0, 9)):
            output.insert(draw(st.integers(0, len(output))), "...")
        equation += draw(st.sampled_from(["->", " -> "])) + "".join(output)
    keywords = draw(st.sampled_from([{}, {}, {"order": "C"}, {"order": "F"}, {"order": "A"}]))
    return equation, operands, keywords


def numpy_answer(equation, operands, keywords):
    """(np.einsum's result as an array, None), or (None, its error)."""
    try:
        result = np.einsum(equation, *operands, **keywords)
    except (ValueError, TypeError) as error:
        return None, error
    # A Python object for a result of type object; other scalars know their type.
    return np.asarray(result, None if isinstance(result, (np.ndarray, np.generic)) else object), None


def broadcasts_a_letter(equation, operands):
    """Whether a named letter is 1 in one place and another size elsewhere."""
    sizes = {}
    for term, operand in zip(equation.partition("->")[0].strip().split(","), operands):
        head, _, tail = term.partition("...")
        shape = np.shape(operand)
        for letter, size in zip(head + tail, (*shape[: len(head)], *shape[len(shape) - len(tail) :])):
            sizes.setdefault(letter, set()).add(size)
    return any(len(found) > 1 for found in sizes.values())


@settings(deadline=None, max_examples=250, derandomize=True)
@given(calls())
def test_equals_numpy_in_value_shape_and_type(call):
    equation, operands, keywords = call
    expected, error = numpy_answer(*call)
    if error is not None:
        with pytest.raises(type(error)) as caught:
            einsum(equation, *operands, **keywords)
        assert str(caught.value).isascii()
        return
    if broadcasts_a_letter(equation, operands):
        with pytest.raises(EquationError, match="a letter of size 1 does not broadcast") as caught:
            einsum(equation, *operands, **keywords)
        assert equation in str(caught.value)
        assert str(caught.value).isascii()
        return
    got = einsum(equation, *operands, **keywords)
    assert isinstance(got, np.ndarray)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype or (expected.ndim == 0 and got.dtype in (object, ">f4"))
    assert np.array_equal(got, expected)
    if keywords and keywords["order"] != "A":
        assert got.flags[f"{keywords['order']}_CONTIGUOUS"]


def letters_of_size_one():
    a, b = np.ones((10, 2)), np.ones((1, 2))
    assert np.array_equal(np.einsum("ij,ij->j", a, b), [10, 10])
    with pytest.raises(EquationError, match="a letter of size 1 does not broadcast"):
        einsum("ij,ij->j", a, b)
    assert np.array_equal(einsum("...j,...j->...j", a, b), a)


def results_are_arrays():
    for dtype in (np.float32, object):
        a = np.arange(3).astype(dtype)
        assert not isinstance(np.einsum("i,i->", a, a), np.ndarray)
        for got in (einsum("i,i->", a, a), einsum("i->", a), einsum("->", a[0:1].reshape(()))):
            assert isinstance(got, np.ndarray)
            assert got.shape == ()
            assert got.dtype == dtype


def memory_layout():
    a = np.arange(6.0).reshape(2, 3)
    for order in ("C", "F"):
        for got in (einsum("ij->ji", a, order=order), einsum("ij,j->ji", a, a[0], order=order)):
            assert got.flags[f"{order}_CONTIGUOUS"]
    assert not np.einsum("ij->ji", a, order="C").flags.c_contiguous
    assert einsum("ij->ji", a, dtype=np.complex128).dtype == np.complex128
    assert np.einsum("ij->ji", a, dtype=np.complex128).dtype == a.dtype
    diagonal = einsum("ii->i", np.eye(3, 3))
    diagonal[:] = 5  # writable, as NumPy's
    frozen = np.eye(3)
    frozen.flags.writeable = False
    assert not einsum("ii->i", frozen).flags.writeable
    assert np.shares_memory(einsum("ii->i", frozen), frozen)


def rounding():
    large = [np.full(2, value) for value in (1e200, 1e-200, 1e200)]
    steps = ["einsum_path", (0, 2), (0, 1)]
    assert np.isfinite(np.einsum("i,i,i->i", *large)).all()
    with pytest.warns(RuntimeWarning, match="overflow"):
        assert np.isinf(einsum("i,i,i->i", *large, optimize=steps)).all()
    half = [np.full(2, value, np.float16) for value in (300, 300, 0.01)]
    assert np.array_equal(einsum("i,i,i->i", *half), np.einsum("i,i,i->i", *half))


def optimize():
    a = [np.arange(4.0).reshape(2, 2)] * 3
    for value in (True, False, "greedy", "optimal", ("greedy", 100), ["einsum_path", (0, 2), (0, 1)]):
        assert np.array_equal(einsum("ij,jk,kl", *a, optimize=value), np.einsum("ij,jk,kl", *a))
    assert np.einsum("i,i", [1], [2], optimize="fast") == 2
    with pytest.raises(EquationError, match="optimize='fast': choose"):
        einsum("i,i", [1], [2], optimize="fast")
    assert np.einsum("...i->", np.ones((2, 3)), optimize=True) == 6
    with pytest.raises(EquationError, match=r"'\.\.\.' has axes"):
        einsum("...i->", np.ones((2, 3)), optimize=True)
    flags, three = np.ones((2, 2), bool), np.array(3, np.int8)
    assert np.einsum("cd,->", flags, three, optimize=True) == 3
    assert np.einsum("cd,->", flags, three) == einsum("cd,->", flags, three, optimize=True) == 12


def out_and_casting():
    a = np.ones(7)
    np.einsum("i,i->", a, a, out=np.array(0), optimize="optimal")
    with pytest.raises(TypeError, match="casting='safe'"):
        einsum("i,i->", a, a, out=np.array(0), optimize="optimal")
    out = np.array(0)
    assert einsum("i,i->", a, a, out=out, casting="unsafe") is out
    assert out == 7


def errors():
    with pytest.raises(RuntimeError):
        np.einsum("i,i,i", [1], [2], [3], optimize=["einsum_path", (0, 1)])
    with pytest.raises(EquationError, match="the path leaves 2 arrays"):
        einsum("i,i,i", [1], [2], [3], optimize=["einsum_path", (0, 1)])
    for wrong in (lambda f: f("i->", ["a"]), lambda f: f(0, 0), lambda f: f("i", [1], dtype="no")):
        for function in (np.einsum, einsum):
            with pytest.raises(TypeError):
                wrong(function)
        with pytest.raises(EquationError):
            wrong(einsum)
    with pytest.raises(EquationError, match="A,A->: letter 'A' is 2 in operand 0"):
        einsum([1, 2], [0], [1, 2, 3], [0], [])


def more_types():
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        a = np.arange(4).astype(getattr(ml_dtypes, name))
        with pytest.raises(TypeError):
            np.einsum("i,i->", a, a)
        assert float(einsum("i,i->", a, a)) == 14
        assert einsum("i,i,i->", a, a, a).dtype == a.dtype
    with pytest.raises(TypeError, match="cannot be multiplied and added"):
        einsum("i->", np.arange(4).astype(ml_dtypes.int4))


class Doubled(Leaf):
    def __init__(self, a):
        self.a, self.shape, self.dtype = a, a.shape, a.dtype

    def array(self):
        return 2 * self.a


def other_arrays():
    class Foreign:
        def __array__(self, dtype=None, copy=None):
            return np.ones(3)

        def __array_function__(self, *_):
            return "theirs"

    assert np.einsum("i->", Foreign()) == "theirs"
    assert einsum("i->", Foreign()) == 3
    leaf = Doubled(np.arange(6.0).reshape(2, 3))
    assert np.array_equal(einsum("ij->j", leaf), [6, 10, 14])
    with pytest.raises(EquationError, match="are not supported with a leaf"):
        einsum("ij->j", leaf, dtype="f4")


CHECKS = {
    "Letters of size 1": letters_of_size_one,
    "Results are arrays": results_are_arrays,
    "Memory layout": memory_layout,
    "Rounding": rounding,
    "optimize": optimize,
    "out and casting": out_and_casting,
    "Errors": errors,
    "More types": more_types,
    "Other arrays": other_arrays,
}


@pytest.mark.parametrize("heading", CHECKS)
def test_what_is_listed_is_as_it_says(heading):
    CHECKS[heading]()


def test_each_difference_of_the_list_is_checked():
    section = NOTATION.read_text(encoding="utf-8").partition("## Where einsum and np.einsum differ")[2]
    assert re.findall(r"^- \*\*(.+?)\.\*\*", section, re.MULTILINE) == list(CHECKS)


@pytest.mark.parametrize("order", ["C", "F"])
def test_order_holds_for_a_leaf(order):
    leaf = Doubled(np.arange(12.0).reshape(4, 3))
    x = np.arange(6.0).reshape(2, 3)
    for operands in ((x, leaf), (leaf, x)):
        got = einsum("ij,kj->ik", *operands, order=order)
        assert got.flags[f"{order}_CONTIGUOUS"]
        arrays = [a if isinstance(a, np.ndarray) else a.array() for a in operands]
        assert np.array_equal(got, np.einsum("ij,kj->ik", *arrays))


def outcome(function, equation, operands, out, **keywords):
    try:
        result = function(equation, *operands, out=out, **keywords)
    except TypeError:
        return "refused"
    assert out is None or result is out
    return np.shape(result), getattr(result, "dtype", object), np.array(result).tolist()


@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
@pytest.mark.parametrize("equation", ["ij,jk->ik", "ij,jk->", "ij,jk,kl->il", "ij,ij->i", "ij->j"])
@pytest.mark.parametrize("casting", ["no", "equiv", "safe", "same_kind", "unsafe"])
def test_dtype_casting_and_out_are_numpys(equation, casting):
    rng = np.random.default_rng(0)
    shape = np.einsum(equation, *[np.ones((3, 3))] * (equation.count(",") + 1)).shape
    for types in (("f4", "f4", "f4"), ("i1", "i4", "i8"), ("f4", "f8", "i4"), ("O", "f4", "i1")):
        operands = [rng.integers(0, 4, (3, 3)).astype(kind) for kind in types[: equation.count(",") + 1]]
        for dtype in (None, "f2", "f4", "f8", "i4", "c8", "?", "O"):
            for out_type in (None, "f4", "f8", "i8", "c16"):
                theirs, ours = (
                    outcome(
                        function,
                        equation,
                        operands,
                        None if out_type is None else np.ones(shape, out_type),
                        dtype=dtype,
                        casting=casting,
                    )
                    for function in (np.einsum, einsum)
                )
                assert theirs == ours, (types, dtype, out_type)


@pytest.mark.parametrize(
    "arguments",
    [
        ([0, 1], [1, 2]),
        ([1, 0], [1, 2], [2, 0]),
        ([40, 3], (40, 3), [3]),
        ([..., 1], [1, ...], [...]),
        (np.array([0, 1]), np.array([0, 1])),
        ([0, 0], [], [0]),
    ],
)
def test_sublists_are_equations(arguments):
    a = np.arange(9.0).reshape(3, 3)
    b = a if len(arguments[1]) else np.array(2.0)
    call = (a, arguments[0], b, arguments[1], *arguments[2:])
    assert np.array_equal(einsum(*call), np.einsum(*call))
    assert np.array_equal(einsum(*call, order="C"), np.einsum(*call))
