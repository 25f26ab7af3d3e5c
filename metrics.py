"""How disentangled is a code? Functions of arrays and of `encode`: no model, no data set.

    disentanglement_score       accuracy of the linear classifier of Higgins et al. 2017
    mutual_information_gap      MIG of Chen et al. 2018, with the matrix I(z_j; v_k)
    encoded_factors             which factor each latent encodes, from that matrix
    elbo_decomposition          the KL term as mutual information + total correlation + dimension-wise KL
    pca, fast_ica               codes that need no network

Letters: J latents, K factors v₁ … v_K, L pairs, n points, N images; information is in nats.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------------------------------
# The linear-classifier metric
# ---------------------------------------------------------------------------------------------------------------------

def disentanglement_score(encode, factor_sizes, *, pairs=64, factors=None, train=10000, test=5000, rng=None):
    """Accuracy in [0, 1] of a linear classifier that tells which factor two images share (Higgins et al. 2017, section 3).

    For each point a factor k is drawn among `factors` (K of them), then L = `pairs` pairs (v₁, v₂) that share factor k and
    differ freely in the others, k's value drawn anew for each pair. The point is (mean over pairs of |μ(x₁) − μ(x₂)|, k);
    the classifier is fitted to `train` points, the score is its accuracy on `test` fresh ones.

    encode        int64 indices (n,), flat in C order over the factors → codes (n, J)
    factor_sizes  how many values each factor takes
    factors       which may be chosen, by position (default: those with more than one value); the rest vary freely, so
                  dSprites with K = 4 means that shape is never chosen
    rng           a numpy.random.Generator (default: seed 0)

    Fine print. The score rises with L, since the mean over pairs loses its noise, and falls with K: give both with it.
    A code that lacks one factor can still score 100 %: the one row of small differences missing is a sign too (Kim and
    Mnih 2018). A code may be rotated and score well where two factors share two latents unequally.
    Raises ValueError where `factors` names fewer than two factors, one twice, or one that is not there.
    """
    rng = np.random.default_rng(0) if rng is None else rng
    sizes = np.asarray(factor_sizes)
    factors = np.flatnonzero(sizes > 1) if factors is None else np.asarray(factors)
    if len(factors) < 2 or len(set(factors)) < len(factors) or not set(factors) <= set(range(len(sizes))):
        raise ValueError(f'factors {list(factors)} are not two or more different ones of 0 … {len(sizes) - 1}')
    x, k = features(encode, sizes, pairs, factors, train + test, rng)             # (n, J), (n,)
    weights = softmax_regression(x[:train], k[:train], len(factors))              # (J + 1, K)
    predicted = np.hstack([x[train:], np.ones((test, 1))]) @ weights
    return float((predicted.argmax(1) == k[train:]).mean())


def features(encode, sizes, pairs, factors, points, rng):
    """The metric's points: mean over L pairs of |μ(x₁) − μ(x₂)|, (n, J), and which of `factors` they share, (n,)."""
    x, k = [], rng.integers(len(factors), size=points)
    for shared in np.array_split(k, min(points, math.ceil(points * pairs / 512))):          # even pixels stay in the cache
        v = rng.integers(sizes, size=(2, len(shared), pairs, len(sizes)))         # v₁ and v₂
        same = np.arange(len(sizes)) == factors[shared][:, None, None]            # (n, 1, K): true at the shared factor
        v[1] = np.where(same, v[0], v[1])
        index = np.ravel_multi_index(tuple(np.moveaxis(v, -1, 0)), tuple(sizes))  # (2, n, L)
        mu = np.asarray(encode(index.ravel())).reshape(*index.shape, -1)          # (2, n, L, J)
        x.append(np.abs(mu[0] - mu[1]).mean(1, dtype=np.float64))
    return np.concatenate(x), k


def softmax_regression(x, k, classes, ridge=1e-4):
    """Multinomial logistic regression to convergence: points (n, J), classes (n,) → weights (J + 1, classes), bias last.

    Minimises the mean cross-entropy + ridge / 2 · ‖W‖² with features scaled to unit variance. That is strictly convex, so
    its optimum does not depend on the optimiser (L-BFGS in float64). On ten latents the score moves by 0.2 points between
    ridges of 1e-8 and 1e-3, so it only keeps separable problems finite; on 4,096 raw pixels, which overfit 10,000 points, it
    does matter (K = 4, L = 20: 42.4 % at 1e-4, 47.5 % at 1e-2).
    """
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-12)
    a = torch.from_numpy(np.hstack([(x - mean) / scale, np.ones((len(x), 1))]))   # (n, J + 1)
    k = torch.from_numpy(np.asarray(k))
    w = torch.zeros(classes, a.shape[1], dtype=torch.float64, requires_grad=True)  # 4 times faster than its transpose
    lbfgs = torch.optim.LBFGS([w], max_iter=2000, history_size=20, tolerance_grad=1e-5, tolerance_change=1e-10,
                              line_search_fn='strong_wolfe')

    def loss():
        lbfgs.zero_grad()
        value = F.cross_entropy(F.linear(a, w), k) + ridge / 2 * (w ** 2).sum()
        value.backward()
        return value
    lbfgs.step(loss)
    w = w.detach().numpy().T
    unscaled = w[:-1] / scale[:, None]
    return np.vstack([unscaled, w[-1] - mean @ unscaled])


# ---------------------------------------------------------------------------------------------------------------------
# Mutual information between latents and factors
# ---------------------------------------------------------------------------------------------------------------------

def mutual_information_gap(mu, v, bins=None):
    """MIG (Chen et al. 2018, eq. 6) and the matrix I(z_j; v_k) in nats: a float in [0, 1] and an array (J, K).

    Their z are samples from q(z|x); here, as in most later work, posterior means: the numbers are not comparable with theirs.
    mu (n, J) are these means, cut into `bins` bins of equal width between the least and the greatest (default: as many
    as the largest factor has values); v (n, K) are integers. The gap between the two latents that know most of a factor,
    divided by the factor's entropy H(v_k), averaged over the factors that vary.
    """
    mu, v = np.asarray(mu), np.asarray(v)
    bins = bins or int(v.max()) + 1
    low, high = mu.min(0), mu.max(0)
    code = np.minimum(((mu - low) / np.maximum(high - low, 1e-12) * bins).astype(int), bins - 1)
    values = v.max(0) + 1
    information = np.array([[mutual_information(c, f, bins, size) for f, size in zip(v.T, values)] for c in code.T])
    entropies = entropy_of(v)
    first, second = -np.sort(-information, axis=0)[:2] if len(information) > 1 else (information[0], 0 * information[0])
    varies = entropies > 0
    return float(((first - second)[varies] / entropies[varies]).mean()), information


def mutual_information(a, b, a_size, b_size):
    """I(a; b) of two integer arrays (n,), in nats: Σ p(a, b) ln (p(a, b) / (p(a) p(b)))."""
    joint = np.bincount(a * b_size + b, minlength=a_size * b_size).reshape(a_size, b_size) / len(a)
    outer = joint.sum(1, keepdims=True) * joint.sum(0)
    return float((joint[joint > 0] * np.log(joint[joint > 0] / outer[joint > 0])).sum())


def entropy_of(v):
    """H(v_k) of integers (n, K), in nats: (K,)."""
    return np.array([mutual_information(f, f, f.max() + 1, f.max() + 1) for f in np.asarray(v).T])


def encoded_factors(mu, v, bins=20):
    """For each latent the factor of largest I(z_j; v_k) / H(v_k), and that share in [0, 1]: two arrays (J,).

    20 bins, since noise adds about (bins − 1)(values − 1) / 2n nats to I.
    """
    _, information = mutual_information_gap(mu, v, bins)
    share = information / np.maximum(entropy_of(v), 1e-12)
    return share.argmax(1), share.max(1)


# ---------------------------------------------------------------------------------------------------------------------
# What the KL term is made of
#
#     E_n[KL(q(z|n) ‖ p(z))]  =  I_q(z; n)  +  KL(q(z) ‖ Π_j q(z_j))  +  Σ_j KL(q(z_j) ‖ p(z_j))     (Chen et al. 2018, eq. 2)
#
# with q(z) = 1/N Σ_n q(z|n): mutual information of index and code, total correlation, dimension-wise KL.
# ---------------------------------------------------------------------------------------------------------------------

def log_densities(z, mu, logvar):
    """log q(z_j of image n | image m), in nats, for all n and m: three tensors (M, J) → (M, M, J)."""
    z = z[:, None]
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 / logvar.exp())


def elbo_decomposition(mu, logvar, rng=None):
    """The three terms over N images, in nats, by one sample z of each image's posterior: a dictionary.

    mu, logvar (N, J) are those of q(z|n); rng a numpy.random.Generator (default: seed 2018). The terms sum to `kl`, the
    Monte-Carlo estimate of the KL term, exactly, and to the analytic one within a few times `standard_error`; the first is at
    most ln N.
    """
    mu, logvar = (torch.as_tensor(np.asarray(a), dtype=torch.float64) for a in (mu, logvar))
    noise = (np.random.default_rng(2018) if rng is None else rng).standard_normal(mu.shape)
    z, log_n = mu + torch.exp(0.5 * logvar) * torch.from_numpy(noise), math.log(len(mu))
    log_qz, log_qzj = [], []
    for part in z.split(max(1, 10 ** 7 // mu.numel())):
        log_q = log_densities(part, mu, logvar)                                   # (part, N, J)
        log_qz.append(log_q.sum(2).logsumexp(1) - log_n)                          # log q(z)
        log_qzj.append(log_q.logsumexp(1) - log_n)                                # log q(z_j)
    log_qz, log_qzj = torch.cat(log_qz), torch.cat(log_qzj)                       # (N,), (N, J)
    log_qzn = -0.5 * (math.log(2 * math.pi) + logvar + torch.from_numpy(noise) ** 2)
    log_p = -0.5 * (math.log(2 * math.pi) + z ** 2)
    kl = (log_qzn - log_p).sum(1)
    return dict(mutual_information=float((log_qzn.sum(1) - log_qz).mean()),
                total_correlation=float((log_qz - log_qzj.sum(1)).mean()),
                dimension_wise_kl=(log_qzj - log_p).mean(0).numpy(),
                kl=float(kl.mean()), standard_error=float(kl.std() / math.sqrt(len(kl))))


# ---------------------------------------------------------------------------------------------------------------------
# Codes that need no network
# ---------------------------------------------------------------------------------------------------------------------

def pca(x, components=10):
    """Principal components of rows x (n, D) → the mean (D,) and a matrix (D, components) that whitens: codes are
    (x − mean) @ matrix, of unit variance and uncorrelated on x."""
    mean = x.mean(0)
    values, vectors = np.linalg.eigh(np.cov(x, rowvar=False))
    return mean, vectors[:, -components:] / np.sqrt(values[-components:])


def fast_ica(x, components=10, rng=None):
    """FastICA (Hyvärinen 1999: symmetric, tanh) of whitened principal components: as pca, a mean and a matrix."""
    rng = np.random.default_rng(0) if rng is None else rng
    mean, whiten = pca(x, components)
    s = (x - mean) @ whiten                                                       # (n, components)
    w = np.linalg.qr(rng.standard_normal((components, components)))[0]            # a column a source
    for _ in range(200):
        g = np.tanh(s @ w)
        u, _, vt = np.linalg.svd(s.T @ g / len(s) - w * (1 - g ** 2).mean(0))
        previous, w = w, u @ vt
        if np.abs(np.abs((w * previous).sum(0)) - 1).max() < 1e-6:
            break
    return mean, whiten @ w
