"""A diffusion process that masks one coordinate a step, and is an autoregressive model (§4.3).

q(x_t|x_{t−1}) blanks coordinate order[t−1], for t = 1..T with T the dimensionality of the data, so
q(x_t|x_0) is x_0 with the first t of them blanked, and p(x_T) is the blank image. p_θ(x_{t−1}|x_t)
copies what is not blank and gives coordinate order[t−1] a distribution over the levels.

Data are level indices, int32 [batch, D] in 0..K−1; a blanked coordinate has the value K. The
network is any function `conditional(x_t, t) -> logits [batch, K]` of the coordinate that step t
blanked. Terms are in nats and of the logits' dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Conditional = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Masking:
    """The forward process.

    Attributes:
      order: the coordinate that each step blanks, integers [T]: a permutation of 0..T−1.
      num_levels: K.

    Raises:
      ValueError: the order is no permutation.
    """

    order: np.ndarray
    num_levels: int

    def __post_init__(self) -> None:
        if not np.array_equal(np.sort(self.order), np.arange(len(self.order))):
            raise ValueError("the order must hold each of 0..T−1 once")

    @property
    def num_steps(self) -> int:
        """T, the dimensionality of the data."""
        return len(self.order)

    @property
    def blank(self) -> int:
        """The value of a blanked coordinate."""
        return self.num_levels

    @property
    def step_of(self) -> np.ndarray:
        """The step that blanks each coordinate, [D] in 1..T."""
        return np.argsort(self.order) + 1


def q_sample(masking: Masking, x0: jax.Array, t: jax.Array) -> jax.Array:
    """x_t ~ q(x_t|x_0), which is certain: the first t coordinates of the order are blank.

    Args:
      x0: int32 [batch, D].
      t: integer [batch], in 0..T.
    """
    return jnp.where(jnp.asarray(masking.step_of) <= t[:, None], masking.blank, x0)


def point_mass(masking: Masking, x: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Log-probabilities [batch, D, K+1] of the distribution that is certain of x [batch, D]."""
    here = x[..., None] == jnp.arange(masking.num_levels + 1)
    return jnp.where(here, 0.0, -jnp.inf).astype(dtype)


def p_log_probabilities(
    masking: Masking, logits: jax.Array, x_t: jax.Array, t: jax.Array
) -> jax.Array:
    """log p_θ(x_{t−1}|x_t), each coordinate's over the K levels and blank: [batch, D, K+1].

    Args:
      logits: `conditional(x_t, t)`.
      t: integer [batch], in 1..T.
    """
    log_p = jax.nn.log_softmax(logits)
    log_p = jnp.pad(log_p, ((0, 0), (0, 1)), constant_values=-jnp.inf)  # It is blank no more.
    predicted = jnp.asarray(masking.step_of) == t[:, None]
    return jnp.where(predicted[..., None], log_p[:, None], point_mass(masking, x_t, logits.dtype))


def categorical_kl(log_q: jax.Array, log_p: jax.Array) -> jax.Array:
    """KL(q ‖ p) over the last axis, from log-probabilities; 0 log 0 = 0, and infinite as it may."""
    possible = log_q > -jnp.inf
    difference = jnp.where(possible, log_q, 0.0) - jnp.where(possible, log_p, 0.0)
    return jnp.where(possible, jnp.exp(log_q) * difference, 0.0).sum(axis=-1)


def kl_of_coordinates(
    masking: Masking, conditional: Conditional, x0: jax.Array, t: jax.Array
) -> jax.Array:
    """KL(q(x_{t−1}|x_t,x_0) ‖ p_θ(x_{t−1}|x_t)) of every coordinate, [batch, D]. Eq. 5.

    Their sum is L_{t−1} (at t = 1 L_0: q(x_0|x_1,x_0) is certain as well).
    """
    x_t = q_sample(masking, x0, t)
    logits = conditional(x_t, t)
    log_q = point_mass(masking, q_sample(masking, x0, t - 1), logits.dtype)
    return categorical_kl(log_q, p_log_probabilities(masking, logits, x_t, t))


def bound_terms(masking: Masking, conditional: Conditional, x0: jax.Array) -> jax.Array:
    """The variational bound, term by term: column k of [batch, T+1] is L_k. Eq. 5.

    L = L_T + Σ_t L_{t−1}, where L_T = KL(q(x_T|x_0) ‖ p(x_T)), in one compiled loop.
    """

    def term(_, step):
        t = jnp.full(x0.shape[:1], step)
        return None, kl_of_coordinates(masking, conditional, x0, t).sum(axis=-1)

    _, terms = jax.lax.scan(term, None, jnp.arange(1, masking.num_steps + 1))
    last = q_sample(masking, x0, jnp.full(x0.shape[:1], masking.num_steps))
    q_last = point_mass(masking, last, terms.dtype)
    p_last = point_mass(masking, jnp.full_like(x0, masking.blank), terms.dtype)
    prior = categorical_kl(q_last, p_last).sum(axis=-1)
    return jnp.concatenate([terms.T, prior[:, None]], axis=1)


def chain_rule(masking: Masking, conditional: Conditional, x: jax.Array) -> jax.Array:
    """log p(x^i | x^{>i}), column i−1 of [batch, T]: an autoregressive model's log-likelihood.

    Their sum is log p(x). Nothing of the diffusion is used: the image is read coordinate by
    coordinate, the last one of the order first, and each is scored given those before it.
    """

    def read(context, i):
        coordinate = jnp.asarray(masking.order)[i - 1]
        logits = conditional(context, jnp.full(x.shape[:1], i))
        value = x[:, coordinate]
        score = logits[jnp.arange(len(x)), value]
        log_normalizer = jax.scipy.special.logsumexp(logits, axis=-1)
        return context.at[:, coordinate].set(value), score - log_normalizer

    nothing = jnp.full_like(x, masking.blank)
    _, scores = jax.lax.scan(read, nothing, jnp.arange(masking.num_steps, 0, -1))
    return scores[::-1].T


def ancestral_step(
    masking: Masking, logits: jax.Array, x_t: jax.Array, t: jax.Array, keys: jax.Array
) -> jax.Array:
    """x_{t−1} ~ p_θ(x_{t−1}|x_t): coordinate order[t−1] is drawn, all others are copied.

    Args:
      logits: `conditional(x_t, t)`.
      t: integer [batch], in 1..T.
      keys: [batch], one an image; each step takes those folded with its t.
    """
    draw = lambda key, t, row: jax.random.categorical(jax.random.fold_in(key, t), row)  # noqa: E731
    value = jax.vmap(draw)(keys, t, logits).astype(x_t.dtype)
    return jnp.where(jnp.asarray(masking.step_of) == t[:, None], value[:, None], x_t)


def sample(masking: Masking, conditional: Conditional, keys: jax.Array) -> jax.Array:
    """Images int32 [batch, D] from the blank one, in one compiled loop of T steps. Algorithm 2.

    Since all steps copy, the x_t that led to an image is `q_sample` of it.

    Args:
      keys: [batch], one an image.
    """

    def step(x_t, step):
        t = jnp.full(x_t.shape[:1], step)
        return ancestral_step(masking, conditional(x_t, t), x_t, t, keys), None

    blank = jnp.full((len(keys), masking.num_steps), masking.blank, jnp.int32)
    x0, _ = jax.lax.scan(step, blank, jnp.arange(masking.num_steps, 0, -1))
    return x0
