"""The disentanglement metric of Higgins et al. 2017, of any code: functions of arrays and of `encode`, no model, no data."""
import numpy as np
import torch


def disentanglement_score(encode, factor_sizes, *, pairs=64, factors=None, train=10000, test=5000, rng=None):
    """Accuracy in [0, 1] of a linear classifier that tells which factor two images share (Higgins et al. 2017, section 3).

    For each point a factor k is drawn among `factors` (K of them), then L = `pairs` pairs (v₁, v₂) that share factor k and
    differ freely in the others, k's value drawn anew for each pair. The point is (mean over pairs of |μ(x₁) − μ(x₂)|, k).

    encode        int64 indices (n,), flat in C order over the factors → codes (n, J)
    factor_sizes  how many values each factor takes
    factors       which may be chosen, by position (default: those with more than one value); the rest vary freely
    rng           a numpy.random.Generator (default: seed 0)
    """
    rng = np.random.default_rng(0) if rng is None else rng
    sizes = np.asarray(factor_sizes)
    factors = np.flatnonzero(sizes > 1) if factors is None else np.asarray(factors)
    x, k = features(encode, sizes, pairs, factors, train + test, rng)
    weights = softmax_regression(x[:train], k[:train], len(factors))
    predicted = np.hstack([x[train:], np.ones((test, 1))]) @ weights
    return float((predicted.argmax(1) == k[train:]).mean())


def features(encode, sizes, pairs, factors, points, rng):
    """Points of the metric: mean |μ(x₁) − μ(x₂)| over L pairs, (points, J), and which factor they share, (points,)."""
    x, k = [], rng.integers(len(factors), size=points)
    for shared in np.array_split(k, max(1, points * pairs // 2 ** 17)):
        v = rng.integers(sizes, size=(2, len(shared), pairs, len(sizes)))         # v₁ and v₂
        fixed = np.arange(len(sizes)) == factors[shared][:, None, None]           # (points, 1, K): the shared factor
        v[1] = np.where(fixed, v[0], v[1])
        index = np.ravel_multi_index(tuple(np.moveaxis(v, -1, 0)), tuple(sizes))  # (2, points, L)
        mu = encode(index.ravel()).reshape(*index.shape, -1)                      # (2, points, L, J)
        x.append(np.abs(mu[0] - mu[1]).mean(1))
    return np.concatenate(x), k


def softmax_regression(x, k, classes, ridge=1e-4):
    """Multinomial logistic regression to convergence: points (n, J), classes (n,) → weights (J + 1, classes), bias last.

    Minimises the mean cross-entropy + ridge / 2 · ‖W‖² on features scaled to unit variance: strictly convex, so the
    optimum does not depend on the optimiser (L-BFGS in float64).
    """
    scale = np.maximum(x.std(0), 1e-12)
    a = torch.from_numpy(np.hstack([(x - x.mean(0)) / scale, np.ones((len(x), 1))]))
    k = torch.from_numpy(k)
    w = torch.zeros(a.shape[1], classes, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS([w], max_iter=1000, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn='strong_wolfe')

    def loss():
        lbfgs.zero_grad()
        value = torch.nn.functional.cross_entropy(a @ w, k) + ridge / 2 * (w ** 2).sum()
        value.backward()
        return value
    lbfgs.step(loss)
    w = w.detach().numpy()
    unscaled = w[:-1] / scale[:, None]
    return np.vstack([unscaled, w[-1] - x.mean(0) @ unscaled])
