"""The paper's equations once more, in mpmath and float64 NumPy, independent of the library.

`chain` derives a schedule with 50 digits. The functions after it take its float64 arrays, images
[batch, ...] and times [batch], and know nothing of float32. Equation numbers are the paper's.
"""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from mpmath import mpf

mpmath.mp.dps = 50

PREDICTIONS = ("eps", "mu", "x0", "v")
VARIANCES = ("fixed_large", "fixed_small", "learned", "learned_range")
SCHEDULES = ("linear", "quadratic", "constant", "warmup", "jsd", "cosine")


def betas(name, num_steps):
    """β_1..β_T as mpf, with the library's default arguments."""
    start, end, largest = mpf("1e-4"), mpf("0.02"), mpf("0.999")

    def ramp(first, last, count):
        return [first + (last - first) * mpf(i) / max(count - 1, 1) for i in range(count)]

    def squared_cosine(t):
        offset = mpf("0.008")
        return mpmath.cos((mpf(t) / num_steps + offset) / (1 + offset) * mpmath.pi / 2) ** 2

    times = range(1, num_steps + 1)
    match name:
        case "linear":
            return ramp(start, end, num_steps)
        case "quadratic":
            return [b**2 for b in ramp(mpmath.sqrt(start), mpmath.sqrt(end), num_steps)]
        case "constant":
            return [end] * num_steps
        case "warmup":
            return ramp(start, end, num_steps // 10) + [end] * (num_steps - num_steps // 10)
        case "jsd":
            return [min(mpf(1) / (num_steps - t + 1), largest) for t in times]
        case "cosine":
            return [min(1 - squared_cosine(t) / squared_cosine(t - 1), largest) for t in times]


@functools.cache
def chain(name, num_steps, kept=None):
    """The constants of a named schedule, or of its chain over the times in the tuple `kept`."""
    return derive(betas(name, num_steps), kept)


def derive(betas, kept=None):
    """Every constant as float64 [T+1], rounded from 50 digits. Entry 0 holds ᾱ_0 = 1 and β_0 = 0.

    Where Eq. 7 says nothing (t = 0) the posterior's entries are 0. log β̃_1 is log β̃_2.
    """
    alpha_bar = [mpf(1)]
    for b in betas:
        alpha_bar.append(alpha_bar[-1] * (1 - mpf(b)))
    if kept is not None:
        trained = derive_mean(alpha_bar)
        alpha_bar = [alpha_bar[t] for t in (0, *kept)]
    steps = range(1, len(alpha_bar))
    alpha = [mpf(1)] + [alpha_bar[t] / alpha_bar[t - 1] for t in steps]
    beta = [1 - a for a in alpha]
    mean_x0, mean_xt = derive_mean(alpha_bar)
    variance = [mpf(0)] + [beta[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) for t in steps]
    floor = [variance[2] if len(variance) > 2 else beta[1], *variance[2:]]
    scale, shift = [mpf(1)] * len(alpha_bar), [mpf(0)] * len(alpha_bar)
    if kept is not None:
        for i, t in enumerate(kept, start=1):
            scale[i] = mean_x0[i] / trained[0][t]
            shift[i] = mean_xt[i] - scale[i] * trained[1][t]
    fields = {
        "beta": beta,
        "alpha": alpha,
        "alpha_bar": alpha_bar,
        "one_minus_alpha_bar": [1 - a for a in alpha_bar],
        "sqrt_alpha_bar": [mpmath.sqrt(a) for a in alpha_bar],
        "sqrt_one_minus_alpha_bar": [mpmath.sqrt(1 - a) for a in alpha_bar],
        "log_one_minus_alpha_bar": [mpf(0)] + [mpmath.log(1 - a) for a in alpha_bar[1:]],
        "posterior_mean_x0": mean_x0,
        "posterior_mean_xt": mean_xt,
        "posterior_mean_xt_minus_1": [m - 1 for m in mean_xt],
        "posterior_variance": variance,
        "log_beta": [mpf(0)] + [mpmath.log(b) for b in beta[1:]],
        "log_posterior_variance": [mpf(0)] + [mpmath.log(v) for v in floor],
        "mu_scale": scale,
        "mu_shift": shift,
    }
    return SimpleNamespace(**{k: np.array([float(x) for x in v]) for k, v in fields.items()})


def derive_mean(alpha_bar):
    """Eq. 7's coefficients of x_0 and x_t, as lists of mpf [T+1]."""
    x0, xt = [mpf(0)], [mpf(0)]
    for before, now in itertools.pairwise(alpha_bar):
        alpha = now / before
        x0.append(mpmath.sqrt(before) * (1 - alpha) / (1 - now))
        xt.append(mpmath.sqrt(alpha) * (1 - before) / (1 - now))
    return x0, xt


def at(constants, t, x):
    """constants[t], shaped to broadcast against x."""
    return constants[np.asarray(t)].reshape((-1,) + (1,) * (np.ndim(x) - 1))


def diffuse(c, x0, eps, t):
    """Eq. 9."""
    return at(np.sqrt(c.alpha_bar), t, x0) * x0 + at(np.sqrt(c.one_minus_alpha_bar), t, x0) * eps


def posterior_mean(c, x0, x_t, t):
    """Eq. 7."""
    return at(c.posterior_mean_x0, t, x0) * x0 + at(c.posterior_mean_xt, t, x0) * x_t


def target(c, prediction, x0, eps, x_t, t):
    """What an exact network returns; μ̃ is that of the trained chain where c is respaced."""
    mu = (posterior_mean(c, x0, x_t, t) - at(c.mu_shift, t, x0) * x_t) / at(c.mu_scale, t, x0)
    v = at(np.sqrt(c.alpha_bar), t, x0) * eps - at(np.sqrt(c.one_minus_alpha_bar), t, x0) * x0
    return {"eps": eps, "mu": mu, "x0": x0 + 0 * eps, "v": v}[prediction]


def model(c, prediction, output, x_t, t, clip=False):
    """The mean of p_θ(x_{t-1}|x_t), and x̂_0."""
    root, rest = at(np.sqrt(c.alpha_bar), t, x_t), at(np.sqrt(c.one_minus_alpha_bar), t, x_t)
    if prediction == "mu":
        mean = at(c.mu_scale, t, x_t) * output + at(c.mu_shift, t, x_t) * x_t
        x0_hat = (mean - at(c.posterior_mean_xt, t, x_t) * x_t) / at(c.posterior_mean_x0, t, x_t)
        return mean, np.clip(x0_hat, -1, 1) if clip else x0_hat
    x0_hat = {"eps": (x_t - rest * output) / root, "x0": output, "v": root * x_t - rest * output}
    x0_hat = x0_hat[prediction]
    if clip:
        x0_hat = np.clip(x0_hat, -1, 1)
    elif prediction == "eps":  # Eq. 11 as it stands.
        step = at(c.beta, t, x_t) / rest
        return (x_t - step * output) / at(np.sqrt(c.alpha), t, x_t), x0_hat
    return posterior_mean(c, x0_hat, x_t, t), x0_hat


def log_variance(c, variance, raw, t, x):
    """log σ²_θ, with β̃_2 for β̃_1 and, where the variance is fixed, for β_1 (authors' code)."""
    large, small = at(c.log_beta, t, x), at(c.log_posterior_variance, t, x)
    first = at(np.arange(len(c.beta)) == 1, t, x)
    return {
        "fixed_large": np.where(first, small, large),
        "fixed_small": small,
        "learned": raw,
        "learned_range": None if raw is None else small + (large - small) * (raw + 1) / 2,
    }[variance]


def gaussian_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N(mean1, ·) ‖ N(mean2, ·)) in nats."""
    d = log_variance1 - log_variance2
    return 0.5 * (np.expm1(d) - d + (mean1 - mean2) ** 2 * np.exp(-log_variance2))


def decoder(x0, mean, log_scale):
    """log of Eq. 13's integral for one number, with 50 digits; the outer bins are open."""
    x0, mean, scale = mpf(float(x0)), mpf(float(mean)), mpmath.exp(mpf(float(log_scale)))
    low, high = (x0 - mean - mpf(1) / 255) / scale, (x0 - mean + mpf(1) / 255) / scale
    if x0 < -1 + mpf(1) / 255:
        low = -mpmath.inf
    if x0 > 1 - mpf(1) / 255:
        high = mpmath.inf
    if low + high > 0:  # Mirrored to the left tail, where Φ keeps its digits.
        low, high = -high, -low
    return mpmath.log(mpmath.ncdf(high) - (0 if mpmath.isinf(low) else mpmath.ncdf(low)))


decoder_nats = np.vectorize(lambda *args: float(decoder(*args)), otypes=[float])


def bits(nats):
    """Bits/dim [batch]."""
    return nats.reshape(len(nats), -1).mean(axis=1) / np.log(2)


def vlb_term(c, process, output, x0, x_t, t, clip=False):
    """Eq. 5's term at t: L_{t-1} or, at t = 1, L_0. Bits/dim [batch], inputs taken as exact."""
    output, x0, x_t, t = (np.asarray(a, dtype=np.float64) for a in (output, x0, x_t, t))
    t, raw = t.astype(int), None
    if process.variance in ("learned", "learned_range"):
        output, raw = np.split(output, 2, axis=-1)
    mean, _ = model(c, process.prediction, output, x_t, t, clip)
    log_sigma2 = log_variance(c, process.variance, raw, t, x_t) + 0 * x_t
    log_beta_tilde = at(c.log_posterior_variance, t, x_t)
    nats = gaussian_kl(posterior_mean(c, x0, x_t, t), log_beta_tilde, mean, log_sigma2)
    first = t == 1
    nats[first] = -decoder_nats(x0[first], mean[first], log_sigma2[first] / 2)
    return bits(nats)


def prior_term(c, x0):
    """L_T, bits/dim [batch]."""
    log_variance = np.log1p(-c.alpha_bar[-1])
    return bits(gaussian_kl(np.sqrt(c.alpha_bar[-1]) * np.asarray(x0, float), log_variance, 0, 0))


def denoise_gaussian(c, mean, variance, t, x_t):
    """E[x_0|x_t] and Var[x_0|x_t] for data N(mean, variance) in each dimension."""
    a, rest = at(c.alpha_bar, t, x_t), at(c.one_minus_alpha_bar, t, x_t)
    gain = np.sqrt(a) * variance / (a * variance + rest)
    return mean + gain * (x_t - np.sqrt(a) * mean), variance * rest / (a * variance + rest)


def reverse_step(c, mean, variance, sigma2, method, eta):
    """float64 [T+1] A, B, C: x_{t−1} = A x_t + B noise + C, exact for data N(mean, variance).

    Algorithm 2, or Song, Meng and Ermon 2021 (arXiv:2010.02502), Eq. 12, for DDIM.
    """
    t = np.arange(1, len(c.beta))
    before, now = c.alpha_bar[t - 1], c.alpha_bar[t]
    gain = np.sqrt(now) * variance / (now * variance + 1 - now)  # x̂_0 = gain · x_t + constant.
    constant = mean * (1 - gain * np.sqrt(now))
    if method == "ancestral":
        slope = c.posterior_mean_x0[t] * gain + c.posterior_mean_xt[t]
        offset = c.posterior_mean_x0[t] * constant
        scale = np.where(t == 1, 0, np.sqrt(sigma2[t]))
    else:
        scale = eta * np.sqrt((1 - before) / (1 - now) * (1 - now / before))
        direction = np.sqrt(np.maximum(1 - before - scale**2, 0) / (1 - now))
        slope = np.sqrt(before) * gain + direction * (1 - np.sqrt(now) * gain)
        offset = (np.sqrt(before) - direction * np.sqrt(now)) * constant
    return [np.append(0.0, a) for a in (slope, scale, offset)]


def marginals(affine, mean, variance):
    """Mean and variance at every index, from those at the last: float64 [T+1] each."""
    slope, scale, offset = affine
    means, variances = np.zeros(len(slope)), np.zeros(len(slope))
    means[-1], variances[-1] = mean, variance
    for t in range(len(slope) - 1, 0, -1):
        means[t - 1] = slope[t] * means[t] + offset[t]
        variances[t - 1] = slope[t] ** 2 * variances[t] + scale[t] ** 2
    return means, variances


def points_denoiser(c, points):
    """E[x_0|x_t] for data uniform on a few points [n, ...], as a JAX denoiser for `x0`."""
    flat = jnp.asarray(points, jnp.float32).reshape(len(points), -1)
    root = jnp.asarray(np.sqrt(c.alpha_bar), jnp.float32)
    rest = jnp.asarray(c.one_minus_alpha_bar, jnp.float32)

    def denoiser(x_t, t):
        x = x_t.reshape(len(x_t), 1, -1)
        squares = jnp.sum((x - root[t][:, None, None] * flat) ** 2, axis=-1)
        weights = jax.nn.softmax(-squares / (2 * rest[t][:, None]), axis=-1)
        return (weights @ flat).reshape(x_t.shape)

    return denoiser


def recording(denoiser):
    """The denoiser, and the list to which each of its calls, in order, appends (t, x_t)."""
    calls = []

    def record(t, x_t):
        calls.append((np.array(t), np.array(x_t, dtype=np.float64)))

    def recorded(x_t, t):
        jax.debug.callback(record, t, x_t, ordered=True)
        return denoiser(x_t, t)

    return recorded, calls
