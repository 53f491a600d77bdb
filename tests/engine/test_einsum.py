"""einsum gives what np.einsum gives, and refuses what np.einsum would silently broadcast."""

import itertools

import numpy as np
import pytest

from einsum_transformer.engine import Equation, EquationError, ShapeArray, einsum, weight_grad
from einsum_transformer.engine.contract import lowering

SIZES = {
    "b": 2,
    "t": 5,
    "s": 7,
    "d": 12,
    "f": 9,
    "k": 2,
    "g": 3,
    "h": 4,
    "v": 11,
    "i": 3,
    "j": 4,
    "l": 1,
    "m": 1,
}
MODEL = [
    "btd,fd->btf",
    "btf,df->btd",
    "btd,kghd->btkgh",
    "btd,khd->btkh",
    "btkgh,bskh->bkgts",
    "bkgts,bskh->btkgh",
    "btkgh,dkgh->btd",
    "btd,vd->btv",
    "btf,btd->fd",
    "btf,fd->btd",
    "btkgh,btd->kghd",
    "btd,btkgh->dkgh",
    "bkgts,btkgh->bskh",
]
GENERAL = [
    "ij->ji",
    "ij->",
    "ij->i",
    "ij->j",
    "ii->",
    "ii->i",
    "iij->j",
    "ijj->ij",
    "i->i",
    "->",
    "ij,jk->ik",
    "ij,jk",
    "ij,kj->ik",
    "ji,jk->ki",
    "i,i->",
    "i,i->i",
    "i,j->ij",
    "i,j->ji",
    "ij,ij->",
    "ij,ij->i",
    "ij,ij->ij",
    "ij,ij->ji",
    "bij,bjk->bik",
    "bij,bjk->ikb",
    "bij,jk->bik",
    "bij,bj->bi",
    "ij,j->i",
    "i,ij->j",
    "ij,k->i",
    "ij,k->ijk",
    "ii,ij->j",
    "iij,jk->ik",
    "ij,kk->ijk",
    "ij,kl->",
    "ij,kl->ijkl",
    ",i->i",
    ",->",
    "i,->i",
    "ijl,jlk->ik",
    "ilj,jk->ilk",
    "il,lk->ik",
    "btl,ml->btm",
    "i,jk,k->ij",
    "ij,jk,kh->ih",
    "ij,ij,ij->",
    "i,i,i->i",
    "btd,fd,fh->bth",
    "ij,jk,kh,hd->id",
]
ELLIPSIS = [
    ("...d,fd->...f", (2, 5, 12), (9, 12)),
    ("...ij,...jk->...ik", (2, 3, 4), (2, 4, 5)),
    ("...ij,...jk->...ik", (6, 1, 3, 4), (2, 4, 5)),
    ("i...->...", (3, 4, 5), None),
    ("...->...", (3, 4), None),
    ("...i->i...", (3, 4), None),
    ("...,...->...", (3, 1), (4,)),
    ("i...,j...->ij...", (2, 5), (3, 5)),
]


def shapes_of(equation, sizes=SIZES):
    terms = equation.split("->")[0].split(",")
    return [tuple(sizes[letter] for letter in term) for term in terms]


def layouts(a, rng):
    """The same numbers in C order, in Fortran order, with padded rows, and with a stride that BLAS cannot
    take."""
    yield a
    if a.ndim:
        yield np.asfortranarray(a)
        padded = np.zeros((*a.shape[:-1], a.shape[-1] + 3), a.dtype)
        padded[..., : a.shape[-1]] = a
        yield padded[..., : a.shape[-1]]
        wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
        wide[..., ::2] = a
        yield wide[..., ::2]
        yield a[..., ::-1]
        permutation = rng.permutation(a.ndim)
        yield np.ascontiguousarray(a.transpose(permutation)).transpose(np.argsort(permutation))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.uint8])
@pytest.mark.parametrize("equation", MODEL + GENERAL)
def test_equals_numpy(equation, dtype):
    rng = np.random.default_rng(0)
    operands = [rng.integers(-8, 9, shape).astype(dtype) for shape in shapes_of(equation)]
    expected = np.einsum(equation, *operands)
    got = einsum(equation, *operands)
    assert isinstance(got, np.ndarray)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert np.array_equal(got, expected)  # small integers: exact in every type


@pytest.mark.parametrize("equation", MODEL + [e for e in GENERAL if e.count(",") == 1 and e[0] != ","])
def test_any_memory_layout(equation):
    rng = np.random.default_rng(1)
    first, second = (rng.integers(-8, 9, shape).astype(np.float32) for shape in shapes_of(equation))
    for a, b in itertools.product(layouts(first, rng), layouts(second, rng)):
        expected = np.einsum(equation, a, b)
        assert np.array_equal(einsum(equation, a, b), expected)
        assert np.array_equal(einsum(equation, a, b, order="C"), expected)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("equation", MODEL)
def test_degenerate_sizes(equation, size):
    rng = np.random.default_rng(2)
    for letter in sorted(set(equation) - set(",->")):
        operands = [rng.standard_normal(shape) for shape in shapes_of(equation, {**SIZES, letter: size})]
        np.testing.assert_allclose(
            einsum(equation, *operands), np.einsum(equation, *operands), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(("equation", "first", "second"), ELLIPSIS)
def test_ellipsis(equation, first, second):
    rng = np.random.default_rng(3)
    operands = [
        rng.integers(-8, 9, shape).astype(np.float64) for shape in (first, second) if shape is not None
    ]
    assert np.array_equal(einsum(equation, *operands), np.einsum(equation, *operands))


@pytest.mark.parametrize("dtype", ["float16", "bool", "complex64"])
def test_other_types(dtype):
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 2, (3, 4)).astype(dtype), rng.integers(0, 2, (4, 5)).astype(dtype)
    got, expected = einsum("ij,jk->ik", a, b), np.einsum("ij,jk->ik", a, b)
    assert got.dtype == expected.dtype
    assert np.array_equal(got, expected)
    assert np.array_equal(einsum("ij->j", a), np.einsum("ij->j", a))


def test_mixed_types_promote():
    a, b = np.arange(6, dtype=np.int32).reshape(2, 3), np.arange(6, dtype=np.float32).reshape(3, 2)
    got, expected = einsum("ij,jk->ik", a, b), np.einsum("ij,jk->ik", a, b)
    assert got.dtype == expected.dtype
    assert np.array_equal(got, expected)


def test_bfloat16_is_computed_in_float32():
    import ml_dtypes

    a = np.linspace(-1, 1, 512).reshape(2, 256).astype(ml_dtypes.bfloat16)
    exact = a.astype(np.float32)
    got = einsum("ij,kj->ik", a, a)
    assert got.dtype == ml_dtypes.bfloat16
    assert np.array_equal(got, np.einsum("ij,kj->ik", exact, exact).astype(ml_dtypes.bfloat16))


def test_size_one_does_not_broadcast():
    with pytest.raises(EquationError, match=r"btd,fd->btf.*'d' is 1 in operand 0.*12 in operand 1"):
        einsum("btd,fd->btf", np.ones((2, 3, 1)), np.ones((9, 12)))


@pytest.mark.parametrize(
    ("equation", "shapes", "words"),
    [
        ("ij,jk->ik", [(2, 3), (4, 5)], "letter 'j' is 3 in operand 0 'ij' but 4 in operand 1 'jk'"),
        ("ij,jk->ik", [(2, 3)], "2 operands expected, 1 given"),
        ("ij,jk->ik", [(2, 3), (3,)], "operand 1 'jk' has 2 letters but shape"),
        ("ij,jk->iz", [(2, 3), (3, 4)], "output letter 'z' is in no operand"),
        ("ij,jk->ii", [(2, 3), (3, 4)], "letter 'i' stands twice in the output"),
        ("i1->i", [(2, 3)], "letters and one '...' only"),
        ("ii->i", [(2, 3)], "letter 'i' is 2 in operand 0 'ii' but 3"),
        ("i...->i", [(2, 3)], "must also stand in the output"),
        ("ij,jk,kl->il", [(2, 3), (3, 4), (5, 6)], "letter 'k' is 4"),
    ],
)
def test_errors_name_everything(equation, shapes, words):
    with pytest.raises(EquationError) as caught:
        einsum(equation, *(np.ones(shape) for shape in shapes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gradient_equations_are_the_terms_permuted():
    for text in MODEL:
        equation = Equation.parse(text)
        for operand in (0, 1):
            gradient = equation.gradient(operand)
            assert sorted((*gradient.inputs, gradient.output)) == sorted((*equation.inputs, equation.output))


@pytest.mark.parametrize("equation", MODEL)
def test_gradients_equal_differences(equation):
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal(shape) for shape in shapes_of(equation))
    dc = rng.standard_normal(np.einsum(equation, a, b).shape)
    parsed = Equation.parse(equation)
    da, db = einsum(str(parsed.gradient(0)), dc, b), weight_grad(str(parsed.gradient(1)), dc, a, b)
    va, vb = rng.standard_normal(a.shape), rng.standard_normal(b.shape)
    # The contraction is bilinear, so the derivative along (va, vb) is exact without a step size.
    along = np.sum(dc * np.einsum(equation, va, b)) + np.sum(dc * np.einsum(equation, a, vb))
    assert np.sum(da * va) + np.sum(db * vb) == pytest.approx(along, rel=1e-12)


def test_model_equations_run_in_place():
    """No projection, score or mix of a decoder copies an operand when its inputs are laid out plainly."""
    sizes = {**SIZES, "t": 33, "s": 40, "d": 24, "f": 48}
    for equation in MODEL[:8]:
        operands = [np.ones(shape, np.float32) for shape in shapes_of(equation, sizes)]
        assert "copies" not in lowering(equation, *operands), equation


def test_flops_and_bytes():
    equation = Equation.parse("btd,fd->btf")
    sizes = equation.sizes([(2, 5, 12), (9, 12)])
    assert equation.flops(sizes) == 2 * 2 * 5 * 12 * 9
    assert equation.elements(sizes) == 2 * 5 * 12 + 9 * 12 + 2 * 5 * 9
    assert equation.letters == "btdf"


@pytest.mark.parametrize("equation", MODEL + GENERAL)
def test_dry_run_gives_the_shape(equation):
    operands = [ShapeArray(shape) for shape in shapes_of(equation)]
    expected = np.einsum(equation, *(np.ones(shape) for shape in shapes_of(equation)))
    assert einsum(equation, *operands).shape == expected.shape
