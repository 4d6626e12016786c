"""3 × 3 convolutions with half of the multiplications: what CPUs run.

Lavin and Gray 2016 (arXiv:1509.09308, section 4) after Winograd 1980: four neighbouring outputs y
of a filter g with three taps over six inputs d take six products in place of twelve,

    y = Aᵀ [(G g) ⊙ (Bᵀ d)].

Here y and d are rows of maps: each of the six products is a convolution along the columns, summed
over the channels as ever. Relative to the largest of six rows it rounds about twice as coarsely as
the plain sum does, 8e-7 beside 4e-7; tiles of both axes would cost more.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Padding = tuple[tuple[int, int], tuple[int, int]]

ROWS = 4  # outputs of a tile
# With infinity the sixth. The usual 1 and 2, in the place of 3/4 and 3/2, cost twice the error.
POINTS = (0, 3 / 4, -3 / 4, 3 / 2, -3 / 2)


def matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Aᵀ [4, 6], G [6, 3] and Bᵀ [6, 6], float64: the transpose of Toom and Cook's product.

    They multiply polynomials of 4 and 3 coefficients: values at the points (A, G), their products,
    and the interpolation of these (B). Its denominators stand in G: B is exact in float32.
    """
    at, g, bt = np.zeros((ROWS, 6)), np.zeros((6, 3)), np.zeros((6, 6))
    for i, point in enumerate(POINTS):
        others = [other for other in POINTS if other != point]
        at[:, i] = point ** np.arange(ROWS)
        g[i] = point ** np.arange(3) / math.prod(point - other for other in others)
        bt[i, :5] = np.poly(others)[::-1]
    at[-1, -1] = g[-1, -1] = 1
    bt[-1] = np.poly(POINTS)[::-1]
    return at, g, bt


def fits(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> bool:
    """Whether `conv3x3` is this convolution, and faster: small maps and few channels are not."""
    same = kernel.shape[:2] == (3, 3) and stride == 1 and padding == ((1, 1), (1, 1))
    large = min(x.shape[1:3]) >= 16 and min(kernel.shape[2:]) >= 32
    return same and large and x.dtype == jnp.float32


def conv3x3(x: jax.Array, kernel: jax.Array, padded: bool = False) -> jax.Array:
    """x [batch, h, w, in] with kernel [3, 3, in, out], zeros around x: [batch, h, w, out].

    Args:
      padded: whether by a padded copy of x, which takes longer, and a map less at a time.
    """
    at, g, bt = matrices()
    # Else all layers' G g are made before the first layer, and kept.
    x, kernel = lax.optimization_barrier((x, kernel))
    filters = [taps[None] for taps in _combine(g, list(kernel))]
    rows = _padded_rows(x) if padded else _rows_of_tiles(x)
    products = _convolve(_combine(bt, rows), filters)
    y = jnp.stack(_combine(at, products), axis=2)
    batch, tiles, _, width, channels = y.shape
    return y.reshape(batch, tiles * ROWS, width, channels)[:, : x.shape[1]]


def kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Of the kernel of `conv3x3` at dy [batch, h, w, out], the gradient of its result.

    The transpose of the same steps: dg = Gᵀ [(A dy) ⊙ (Bᵀ d)].
    """
    at, g, bt = matrices()
    # The batch is contracted, in the place of the channels. One transpose, not one for each row.
    x = lax.optimization_barrier(x.transpose(3, 1, 2, 0))
    filters = _combine(at.T, _output_rows(dy.transpose(1, 2, 0, 3)))
    products = _convolve(_combine(bt, _padded_rows(x)), filters)
    return jnp.stack(_combine(g.T, [p[:, 0].transpose(1, 0, 2) for p in products]))


def _convolve(inputs, filters):
    """Each [batch, tiles, w, in] with its [tiles or 1, 3 or w, in, out], zeros left and right."""
    return [
        lax.conv_general_dilated(
            d, g, (1, 1), ((0, 0), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        for d, g in zip(inputs, filters, strict=True)
    ]


def _rows_of_tiles(x):
    """The six rows of every tile of x [batch, h, w, channels]: each [batch, tiles, w, channels].

    Four are the tile's own, the first is the last of the tile above, and the last is the first of
    the tile below, so that there is no padded copy of x.
    """
    batch, height, width, channels = x.shape
    if below := -height % ROWS:
        x = jnp.pad(x, ((0, 0), (0, below), (0, 0), (0, 0)))
    tiles = x.reshape(batch, -1, ROWS, width, channels)
    own = [tiles[:, :, i] for i in range(ROWS)]
    above = jnp.pad(own[-1][:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    below = jnp.pad(own[0][:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    return [above, *own, below]


def _padded_rows(x):
    """As `_rows_of_tiles`, by a padded copy of x: of a transposed one that takes less time."""
    below = -x.shape[1] % ROWS + 1
    x = jnp.pad(x, ((0, 0), (1, below), (0, 0), (0, 0)))
    return [x[:, i : x.shape[1] - 5 + i : ROWS] for i in range(6)]


def _output_rows(y):
    """The four rows of every tile of y [h, w, batch, channels]: [tiles, w, batch, channels]."""
    y = jnp.pad(y, ((0, -y.shape[0] % ROWS), (0, 0), (0, 0), (0, 0)))
    return [y[i::ROWS] for i in range(ROWS)]


def _combine(matrix, terms):
    """The rows of matrix · terms, without the products with 0 and 1."""
    return [
        functools.reduce(
            operator.add,
            [t if f == 1 else float(f) * t for f, t in zip(row, terms, strict=True) if f],
        )
        for row in matrix
    ]
