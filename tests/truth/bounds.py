"""Bounds in 60 digits, from the definition alone: the truth for tests and for benchmarks/accuracy.py."""

import functools

import mpmath as mp

mp.mp.dps = 60
NAMES = ["kl", "tv", "chi2", "reverse_kl", "neyman", "hellinger", "js", "alpha:0.3", "alpha:-1.5", "alpha:3"]


def cressie_read(a):
    return lambda u: (u**a - 1 - a * (u - 1)) / (a * (a - 1))


F = {
    "kl": lambda u: u - 1 - mp.log(u),
    "tv": lambda u: abs(u - 1) / 2,
    "chi2": lambda u: (u - 1) ** 2,
    "reverse_kl": lambda u: u * mp.log(u) - u + 1,
    "neyman": lambda u: (u - 1) ** 2 / u,
    "hellinger": lambda u: (mp.sqrt(u) - 1) ** 2,
    "js": lambda u: u * mp.log(u) - (1 + u) * mp.log((1 + u) / 2),
    **{name: cressie_read(mp.mpf(name[6:])) for name in NAMES if name.startswith("alpha:")},
}
AT_ZERO = {"tv": 0.5, "chi2": 1, "reverse_kl": 1, "hellinger": 1, "js": mp.log(2), "alpha:0.3": 1 / mp.mpf("0.3")}
AT_ZERO["alpha:3"] = mp.mpf(1) / 3  # f(0); infinite for all the others


@functools.cache
def exact_bounds(name, log_p, delta):
    """(log_low, log_high) in 60 digits; -inf and -log_p where the region reaches the simplex's end."""
    p, delta = mp.exp(mp.mpf(log_p)), mp.mpf(delta)
    high = _tail(name, 1 - p, p, delta)
    return -_tail(name, p, 1 - p, delta), mp.log1p((1 - p) / p * -mp.expm1(-high))


def _tail(name, a, b, delta):
    """Root w of a f(e^-w) + b f(1 + a/b (1 - e^-w)) = delta, by bisection in log w."""
    if name in AT_ZERO and a * AT_ZERO[name] + b * F[name](1 / b) <= delta:
        return mp.inf
    low, high = mp.log(min(a, b)) - 40, mp.log(4 * delta / a + 1000)
    for _ in range(int(mp.log(high - low, 2)) + 56):  # leaves 1e-17 of the root
        middle = (low + high) / 2
        w = mp.exp(middle)
        inside = a * F[name](mp.exp(-w)) + b * F[name](1 - a / b * mp.expm1(-w)) <= delta
        low, high = (middle, high) if inside else (low, middle)
    return mp.exp(low)
