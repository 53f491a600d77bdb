"""et.einsum without a model: a product, a batched product, their gradients and their cost.

python examples/10_einsum_alone.py
"""

import numpy as np

import einsum_transformer as et

rng = np.random.default_rng(0)
x, w = rng.standard_normal((2, 3, 4)), rng.standard_normal((5, 4))

# A linear layer: d is in both operands and not in the output, so it is summed over.
y = et.einsum("btd,fd->btf", x, w)
assert np.allclose(y, x @ w.T)

# A batched product: b is in both operands and in the output.
q, k = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 6, 4))
assert np.allclose(et.einsum("btd,bsd->bts", q, k), q @ k.transpose(0, 2, 1))

# The equation of a gradient: exchange the output and the operand.
dy = rng.standard_normal(y.shape)
dx = et.einsum("btf,fd->btd", dy, w)
dw = et.einsum("btf,btd->fd", dy, x)

# The loss sum(dy * y) is linear in each operand, so its change is the gradient times the step.
step = rng.standard_normal(w.shape)
change = et.einsum("btf,btf->", dy, et.einsum("btd,fd->btf", x, w + step)) - et.einsum("btf,btf->", dy, y)
assert np.isclose(et.einsum("fd,fd->", dw, step), change)

# A recorder reports the cost of each call, and the matrix product (gemm) that it runs as.
with et.Recorder(events=True) as recorder:
    et.einsum("btd,fd->btf", x, w)
    et.einsum("btd,bsd->bts", q, k)
for event in recorder.events:
    print(f"{event.equation}  {event.flops} FLOPs, {event.bytes_read} bytes read, runs as {event.how}")
assert recorder.events[0].flops == 2 * 2 * 3 * 5 * 4
