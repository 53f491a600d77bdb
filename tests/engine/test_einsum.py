"""einsum gives what np.einsum gives, and refuses what np.einsum would silently broadcast."""

import itertools

import numpy as np
import pytest

from einsum_transformer.engine import Equation, EquationError, Recorder, ShapeArray, einsum, weight_grad
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
    ("...,...", (2, 0), (2, 1)),
    ("...i,ij->...j", (4,), (4, 3)),
    ("i...j,j...k->k...i", (2, 3, 1, 4), (4, 5, 2)),
    ("ii...->i...", (3, 3, 1, 2), None),
    ("i->...i", (3,), None),
    ("i...->i", (3,), None),
    ("ij...,j...->i...", (1, 2), (2, 2, 1)),
]
BROADCAST = [
    ("...i,...i,...i->...i", (1, 3), (4, 3), (4, 3)),
    ("...i,...i,...i->...i", (4, 3), (1, 3), (4, 3)),
    ("...i,...i,...i->...i", (4, 3), (4, 3), (1, 3)),
    ("...i,...i,...i->...", (1, 3), (4, 3), (5, 1, 3)),
    ("...i,...ij,j...->...", (2, 1, 3), (6, 3, 4), (4, 2, 6)),
    ("...,...,...", (2, 1), (), (0,)),
    ("...i,ij,...j->...", (1, 3), (3, 4), (2, 1, 4)),
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


@pytest.mark.parametrize(("equation", *"abc"), BROADCAST)
def test_ellipsis_broadcasts_over_three_operands(equation, a, b, c):
    rng = np.random.default_rng(3)
    operands = [rng.integers(-8, 9, shape).astype(np.float64) for shape in (a, b, c)]
    expected = np.einsum(equation, *operands)
    got = einsum(equation, *operands)
    assert got.shape == expected.shape
    assert np.array_equal(got, expected)
    dry = einsum(equation, *(ShapeArray(shape, np.float64) for shape in (a, b, c)))
    assert dry.shape == expected.shape
    assert dry.dtype == expected.dtype


@pytest.mark.parametrize(
    "equation", ["i,i->", "i,j->", "ij,j->", "ij,ij->", "i,i,i->", "ii,i->", "ii->", "ij,j->i", "i,ij->j"]
)
@pytest.mark.parametrize("dtype", [np.float64, object])
def test_one_element_leaves_no_axis_behind(equation, dtype):
    terms = equation.split("->")[0].split(",")
    operands = [np.full((1,) * len(term), 3, dtype) for term in terms]
    got = einsum(equation, *operands)
    assert got.shape == np.shape(np.einsum(equation, *operands))
    assert np.array_equal(got, np.einsum(equation, *operands))


def test_three_operands_are_computed_in_their_common_type():
    small, wide = np.full(2, 100, np.int8), np.ones(2, np.int64)
    assert np.array_equal(einsum("i,i,i->i", small, small, wide), [10_000, 10_000])
    assert np.array_equal(einsum("i,i,i->", wide, small, small), 20_000)
    half = [np.full(2, value, np.float16) for value in (300, 300, 0.01)]
    got = einsum("i,i,i->i", *half)
    assert got.dtype == np.float16
    assert np.array_equal(got, np.einsum("i,i,i->i", *half))  # 300 * 300 is no float16


def test_a_sum_of_nothing_is_zero_even_beside_infinity():
    infinite, nothing = np.array([np.inf]), np.empty(0)
    for equation in ("i,j->", "i,j->i", "i,j,i->i"):
        operands = (infinite, nothing, infinite)[: equation.count(",") + 1]
        assert np.array_equal(einsum(equation, *operands), np.einsum(equation, *operands))


def test_forty_axes_need_no_letters():
    a = np.arange(4.0).reshape((2, 2) + (1,) * 38)
    assert np.array_equal(einsum("...,...->...", a, a), a * a)
    assert np.array_equal(einsum("x...,x...->...", a, a), (a * a).sum(0))
    many = "abcdefghijklmnopqrstuvwxyzABCD"
    assert np.array_equal(
        einsum(f"{many},{many}->{many[1:]}", a[..., *[0] * 10], a[..., *[0] * 10]).ravel(), [4, 10]
    )


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
        ("ij,jk->iz", [(2, 3), (3, 4)], "output letter 'z' is not in any operand"),
        ("ij,jk->ii", [(2, 3), (3, 4)], "letter 'i' occurs twice in the output"),
        ("i1->i", [(2, 3)], "only letters and one '...'"),
        ("ii->i", [(2, 3)], "letter 'i' is 2 in operand 0 'ii' but 3"),
        ("i...->i", [(2, 3)], "'...' has axes (3,), so it must also be in the output"),
        (
            "i... , i",
            [(2, 3), (4,)],
            "einsum i... , i: letter 'i' is 2 in operand 0 'i...' but 4 in operand 1",
        ),
        ("...,...", [(2, 3), (4, 3)], "'...' has axes (4, 3) in operand 1 '...' but (2, 3) in"),
        ("...i,i,i...", [(2, 3), (3,), (3, 5)], "'...' has axes (5,) in operand 2 'i...'"),
        ("i...j->", [(2,)], "operand 0 'i...j' has 2 letters but shape (2,)"),
        ("i- >i", [(2,)], "only letters and one '...'"),
        (". ..->", [(2,)], "only letters and one '...'"),
        ("ij,jk,kl->il", [(2, 3), (3, 4), (5, 6)], "letter 'k' is 4"),
    ],
)
def test_errors_name_everything(equation, shapes, words):
    with pytest.raises(EquationError) as caught:
        einsum(equation, *(np.ones(shape) for shape in shapes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isascii()
    with pytest.raises(EquationError) as dry:
        einsum(equation, *(ShapeArray(shape) for shape in shapes))
    assert str(dry.value) == str(caught.value)


def test_gradient_equations_are_the_terms_permuted():
    for text in MODEL:
        equation = Equation.parse(text)
        for operand in (0, 1):
            gradient = equation.gradient(operand)
            assert sorted((*gradient.inputs, gradient.output)) == sorted((*equation.inputs, equation.output))


@pytest.mark.parametrize(
    ("equation", "words"),
    [
        ("ii,i->i", "letter 'i' occurs twice in operand 0"),
        ("ij , i -> i", "einsum ij , i -> i: letter 'j' occurs in operand 0 only"),
        ("i,i,i", "needs two operands, not 3"),
    ],
)
def test_what_has_no_gradient_equation_is_refused(equation, words):
    with pytest.raises(EquationError, match=words):
        Equation.parse(equation).gradient(0)


@pytest.mark.parametrize("equation", MODEL)
def test_gradients_equal_differences(equation):
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal(shape) for shape in shapes_of(equation))
    dc = rng.standard_normal(np.einsum(equation, a, b).shape)
    parsed = Equation.parse(equation)
    da, db = einsum(str(parsed.gradient(0)), dc, b), weight_grad(b, str(parsed.gradient(1)), dc, a)
    va, vb = rng.standard_normal(a.shape), rng.standard_normal(b.shape)
    # The contraction is bilinear, so the derivative along (va, vb) is exact without a step size.
    along = np.sum(dc * np.einsum(equation, va, b)) + np.sum(dc * np.einsum(equation, a, vb))
    assert np.sum(da * va) + np.sum(db * vb) == pytest.approx(along, rel=1e-12)


@pytest.mark.parametrize(
    ("equation", "first", "second"),
    [
        ("...ij,...jk->...ik", (1, 2, 3), (5, 4, 3, 2)),
        ("...ij,...jk->...ik", (5, 4, 3, 2), (4, 2, 3)),
        ("...ij,jk->...ik", (5, 4, 3, 2), (2, 3)),
        ("i...,i...->...", (3, 1), (3, 4)),
        ("...i,...i->...i", (3,), (2, 1, 3)),
        ("i...j,j...->...i", (2, 1, 3, 4), (4, 5, 1)),
    ],
)
def test_the_gradient_of_what_an_ellipsis_broadcasts_is_summed(equation, first, second):
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal(first), rng.standard_normal(second)
    dc = rng.standard_normal(np.einsum(equation, a, b).shape)
    parsed = Equation.parse(equation)
    da = weight_grad(a, str(parsed.gradient(0)), dc, b)
    db = weight_grad(b, str(parsed.gradient(1)), dc, a)
    assert da.shape == a.shape
    assert db.shape == b.shape
    va, vb = rng.standard_normal(a.shape), rng.standard_normal(b.shape)
    along = np.sum(dc * np.einsum(equation, va, b)) + np.sum(dc * np.einsum(equation, a, vb))
    assert np.sum(da * va) + np.sum(db * vb) == pytest.approx(along, rel=1e-12)


def test_a_weight_that_the_ellipsis_does_not_reach_is_refused():
    with pytest.raises(
        EquationError, match=r"the weight of shape \(7, 3\) has axes \[7\] that no operand has"
    ):
        weight_grad(np.ones((7, 3)), "...f,f->...", np.ones((3, 4)), np.ones(4))


def test_a_recorder_is_shown_no_letters_of_the_ellipsis():
    with Recorder(events=True) as recorder:
        einsum("i...j,j...->...i", np.ones((2, 1, 3, 4)).T.copy().T, np.ones((4, 5, 3)))
        einsum("...i,...i->...", ShapeArray((2, 3)), ShapeArray((2, 3)))
    for event in recorder.events:
        assert "..." in event.equation
        assert event.how.isascii()
        assert not set(event.how) & set("ABCDEF")


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
