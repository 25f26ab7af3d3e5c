"""How disentangled is a code? Functions of arrays and of `encode`: no model, no data set.

    disentanglement_score       accuracy of the linear classifier of Higgins et al. 2017
    mutual_information_gap      MIG of Chen et al. 2018, with the matrix I(z_j; v_k)
    factor_shares               how much of each factor each latent knows, from that matrix
    elbo_decomposition          the KL term's three parts, one of them the total correlation
    pca, fast_ica               codes that need no network

Letters: J latents, K factors v₁ … v_K, L pairs, n points, N images. Information is in nats.
Codes may be arrays or tensors of any real type. What a function cannot handle raises a ValueError
that says what was expected.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F


# --------------------------------------------------------------------------------------------------
# What is accepted
# --------------------------------------------------------------------------------------------------

def as_codes(x, name, rows=None):
    """x, an array or a tensor (n, J), as float64. Raises ValueError if it is anything else, if n is
    not `rows`, or if a value or its square is not finite."""
    shape = tuple(getattr(x, 'shape', ()))
    if len(shape) != 2 or 0 in shape or rows not in (None, shape[0]):
        raise ValueError(f'{name}: expected one array of shape ({rows or "n"}, J), '
                         f'not {type(x).__name__} {shape or ""}'.rstrip())
    x = np.asarray(x.detach().cpu().double() if torch.is_tensor(x) else x)
    if x.dtype.kind not in 'biuf' or not float(np.abs(x).max()) < 1e100:
        raise ValueError(f'{name}: expected finite real numbers')
    return x.astype(np.float64, copy=False)


def as_factors(v, rows=None):
    """Values of the factors (n, K), any integers, renumbered from 0 in each column."""
    v = as_codes(v, 'factor values', rows)
    if (v % 1).any():
        raise ValueError('factor values: expected integers')
    return np.stack([np.unique(f, return_inverse=True)[1] for f in v.T], 1)


def check_counts(name, *counts, low=1, high=math.inf):
    """Raises ValueError unless all counts are integers from `low` to `high`."""
    if not all(isinstance(n, (int, np.integer)) and low <= n <= high for n in counts):
        raise ValueError(f'{name}: expected integers from {low} to {high}, '
                         f'not {", ".join(map(str, counts))}')


# --------------------------------------------------------------------------------------------------
# The linear-classifier metric
# --------------------------------------------------------------------------------------------------

def disentanglement_score(encode, factor_sizes, *, pairs=64, factors=None, train=10000, test=5000,
                          rng=None):
    """Accuracy in [0, 1] of a linear classifier that tells which factor two images share (Higgins
    et al. 2017, section 3).

    For each point a factor k is drawn from `factors` (K of them), then L = `pairs` pairs (v₁, v₂)
    that share factor k and differ freely in the others, with a new value of k for each pair. The
    point is (mean over pairs of |μ(x₁) − μ(x₂)|, k); the classifier is fitted to `train` points,
    and the score is its accuracy on `test` fresh ones.

    encode        int64 indices (n,), flat in C order over the factors → codes (n, J)
    factor_sizes  how many values each factor takes
    factors       positions of those that may be chosen (default: all with more than one value);
                  the rest vary freely, so dSprites with K = 4 means that shape is never chosen
    rng           a numpy.random.Generator, or a seed for one (default: 0)

    Fine print. The score rises with L, since the mean over pairs averages out noise, and falls with
    K: give both with it. A code that lacks one factor can still score 100 %, because only that
    factor leaves no latent with small differences (Kim and Mnih 2018). So can a rotated code, where
    two factors share two latents unequally. Given posterior means, the metric is blind to their
    scale: a collapsed code, whose means are tiny, can still score high where samples z ~ q(z|x)
    score at chance. So score samples too, with one fixed draw for each image.
    """
    sizes = np.atleast_1d(factor_sizes)
    check_counts('factor_sizes', *sizes)
    check_counts('pairs, train and test', pairs, train, test)
    factors = np.flatnonzero(sizes > 1) if factors is None else np.atleast_1d(factors)
    check_counts('factors', *factors, low=0, high=len(sizes) - 1)
    if not 2 <= len(factors) == len(set(factors)):
        raise ValueError(f'factors: expected two or more different ones, not {factors.tolist()}')
    rng = np.random.default_rng(0 if rng is None else rng)
    x, k = features(encode, sizes, pairs, factors, train + test, rng)       # (n, J), (n,)
    if len(set(k[:train])) < len(factors):
        raise ValueError(f'train: expected points of all {len(factors)} factors, more than {train}')
    weights = softmax_regression(x[:train], k[:train], len(factors))        # (J + 1, K)
    predicted = np.hstack([x[train:], np.ones((test, 1))]) @ weights        # (test, K)
    return float((predicted.argmax(1) == k[train:]).mean())


def features(encode, sizes, pairs, factors, points, rng):
    """The metric's points: the mean over L pairs of |μ(x₁) − μ(x₂)|, (n, J), and which of `factors`
    they share, (n,)."""
    x = []
    k = rng.integers(len(factors), size=points)
    chunks = min(points, math.ceil(points * pairs / 512))                   # bounds the memory
    for shared in np.array_split(k, chunks):
        v = rng.integers(sizes, size=(2, len(shared), pairs, len(sizes)))   # v₁, v₂
        same = np.arange(len(sizes)) == factors[shared][:, None, None]      # (n, 1, all factors)
        v[1] = np.where(same, v[0], v[1])
        index = np.ravel_multi_index(tuple(np.moveaxis(v, -1, 0)), tuple(sizes))    # (2, n, L)
        mu = as_codes(encode(index.ravel()), 'codes from encode', index.size)
        mu = mu.reshape(*index.shape, -1)                                   # (2, n, L, J)
        x.append(np.abs(mu[0] - mu[1]).mean(1))
    return np.concatenate(x), k


def softmax_regression(x, k, classes, ridge=1e-4):
    """Multinomial logistic regression to convergence: points (n, J), classes (n,) → weights
    (J + 1, classes), bias last.

    Minimises the mean cross-entropy + ridge / 2 · ‖W‖², with features scaled to unit variance. This
    is strictly convex, so the optimum does not depend on the optimiser (L-BFGS in float64). With
    ten latents the ridge only keeps separable problems finite: the score moved by at most 0.2
    points between ridges of 1e-8 and 1e-4, and by up to 0.5 between 1e-8 and 1e-3. With 4,096 raw
    pixels, which overfit 10,000 points, it matters (K = 4, L = 20: 42.4 % at 1e-4, 47.5 % at 1e-2).
    """
    mean = x.mean(0)
    scale = np.maximum(x.std(0), 1e-12 * np.abs(x).max(0) + 1e-300)         # not 0
    a = torch.from_numpy(np.hstack([(x - mean) / scale, np.ones((len(x), 1))]))     # (n, J + 1)
    k = torch.from_numpy(k)
    w = torch.zeros(classes, a.shape[1], dtype=torch.float64, requires_grad=True)   # faster than wᵀ
    lbfgs = torch.optim.LBFGS([w], max_iter=2000, history_size=20, tolerance_grad=1e-5,
                              tolerance_change=1e-10, line_search_fn='strong_wolfe')

    def loss():
        lbfgs.zero_grad()
        value = F.cross_entropy(F.linear(a, w), k) + ridge / 2 * (w ** 2).sum()
        value.backward()
        return value
    lbfgs.step(loss)
    w = w.detach().numpy().T
    unscaled = w[:-1] / scale[:, None]
    return np.vstack([unscaled, w[-1] - mean @ unscaled])


# --------------------------------------------------------------------------------------------------
# Mutual information between latents and factors
# --------------------------------------------------------------------------------------------------

def mutual_information_gap(mu, v, bins=None):
    """MIG (Chen et al. 2018, eq. 6) and the matrix I(z_j; v_k) in nats: a float in [0, 1] and an
    array (J, K).

    For each factor, the gap between the two latents that know most about it, divided by its entropy
    H(v_k); averaged over the factors that vary.

    mu      codes (n, J). Chen et al. use samples z ~ q(z|x); most later work, like this, takes
            posterior means, so the numbers are not comparable with theirs
    v       values of the factors (n, K), integers
    bins    each latent is cut into so many bins of equal width, from its smallest to its largest
            value (default: as many as the largest factor has values)
    """
    mu = as_codes(mu, 'mu')
    v = as_factors(v, len(mu))
    if not v.any():
        raise ValueError('factor values: expected at least one factor that varies')
    bins = int(v.max()) + 1 if bins is None else bins
    check_counts('bins', bins)
    low, width = mu.min(0), np.ptp(mu, axis=0)
    code = (mu - low) / np.where(width > 0, width, 1) * bins                # in [0, bins]
    code = np.minimum(code.astype(int), bins - 1)
    information = np.array([[mutual_information(c, f) for f in v.T] for c in code.T])
    nothing = np.zeros(v.shape[1])                                          # after a lone latent
    first, second = -np.sort(-np.vstack([information, nothing]), axis=0)[:2]
    entropies = entropy_of(v)
    varies = entropies > 0
    return float(((first - second)[varies] / entropies[varies]).mean()), information


def mutual_information(a, b):
    """I(a; b) of two arrays (n,) of integers ≥ 0, in nats: Σ p(a, b) ln (p(a, b) / (p(a) p(b)))."""
    sizes = a.max() + 1, b.max() + 1
    joint = np.bincount(a * sizes[1] + b, minlength=sizes[0] * sizes[1]).reshape(sizes) / len(a)
    outer = joint.sum(1, keepdims=True) * joint.sum(0)
    return float((joint[joint > 0] * np.log(joint[joint > 0] / outer[joint > 0])).sum())


def entropy_of(v):
    """H(v_k) of integers (n, K), in nats: (K,)."""
    return np.array([mutual_information(f, f) for f in as_factors(v).T])


def factor_shares(mu, v, bins=20):
    """What share of each factor's entropy each latent knows, I(z_j; v_k) / H(v_k): (J, K), in
    [0, 1]. mu and v as in mutual_information_gap.

    Noise adds about (bins − 1) (values − 1) / 2n nats to I, hence no more than 20 bins.
    """
    _, information = mutual_information_gap(mu, v, bins)
    entropies = entropy_of(v)
    return information / np.where(entropies > 0, entropies, 1)


# --------------------------------------------------------------------------------------------------
# What the KL term is made of (Chen et al. 2018, eq. 2)
#
#     E_n[KL(q(z|n) ‖ p(z))]  =  I_q(z; n)  +  KL(q(z) ‖ Π_j q(z_j))  +  Σ_j KL(q(z_j) ‖ p(z_j))
#
# with q(z) = 1/N Σ_n q(z|n): the mutual information of image and code, the total correlation, and
# the dimension-wise KL.
# --------------------------------------------------------------------------------------------------

def log_densities(z, mu, logvar):
    """log q(z_j | image m) of each z at each of M posteriors, in nats: z (A, J); μ, log σ² (M, J)
    → (A, M, J)."""
    z = z[:, None]
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 / logvar.exp())


def elbo_decomposition(mu, logvar, samples=None, rng=None):
    """The three terms in nats per image, by Monte Carlo: a dictionary.

    mu, logvar  (N, J), those of q(z|n) for all N images; |log σ²| at most 50
    samples     how many images, drawn without replacement, z is sampled for, once each (default:
                all N). q(z) is always that of all N
    rng         a numpy.random.Generator, or a seed for one (default: 2018)

    mutual_information, total_correlation and dimension_wise_kl (J,) sum exactly to `kl`, an
    estimate of the analytic KL term, usually within a few of its `standard_error`.

    The mutual information is at most ln N, returned as `ceiling`. Within about 0.3 nats of it, the
    split between mutual information and total correlation is unresolved: whatever the first lacks
    shows up in the second. A larger N helps; more samples do not.
    """
    mu = as_codes(mu, 'mu')
    logvar = as_codes(logvar, 'logvar')
    if mu.shape != logvar.shape or np.abs(logvar).max() > 50:
        raise ValueError(f'logvar: expected the shape of mu, {mu.shape}, and values from −50 to 50')
    N, J = mu.shape
    samples = N if samples is None else samples
    check_counts('samples of the rows of mu', samples, low=2, high=N)
    rng = np.random.default_rng(2018 if rng is None else rng)
    chosen = np.arange(N) if samples == N else rng.permutation(N)[:samples]
    noise = torch.from_numpy(rng.standard_normal((samples, J)))
    mu, logvar = torch.from_numpy(mu), torch.from_numpy(logvar)
    z = mu[chosen] + torch.exp(0.5 * logvar[chosen]) * noise                # (samples, J)
    log_qz = torch.full((samples,), -math.inf, dtype=torch.float64)
    log_qzj = torch.full((samples, J), -math.inf, dtype=torch.float64)
    rows = max(1, 10 ** 6 // (samples * J))                                 # bounds the memory
    for part in zip(mu.split(rows), logvar.split(rows)):
        log_q = log_densities(z, *part)                                     # (samples, rows, J)
        log_qz = log_qz.logaddexp(log_q.sum(2).logsumexp(1))
        log_qzj = log_qzj.logaddexp(log_q.logsumexp(1))
    log_qz, log_qzj = log_qz - math.log(N), log_qzj - math.log(N)
    log_qzn = -0.5 * (math.log(2 * math.pi) + logvar[chosen] + noise ** 2)
    log_p = -0.5 * (math.log(2 * math.pi) + z ** 2)
    kl = (log_qzn - log_p).sum(1)                                           # (samples,)
    return dict(mutual_information=float((log_qzn.sum(1) - log_qz).mean()), ceiling=math.log(N),
                total_correlation=float((log_qz - log_qzj.sum(1)).mean()),
                dimension_wise_kl=(log_qzj - log_p).mean(0).numpy(),
                kl=float(kl.mean()), standard_error=float(kl.std() / math.sqrt(samples)))


# --------------------------------------------------------------------------------------------------
# Codes that need no network
# --------------------------------------------------------------------------------------------------

def pca(x, components=10):
    """Principal components of rows x (n, D) → the mean (D,) and a matrix (D, components) such that
    the codes (x − mean) @ matrix are uncorrelated on x and of unit variance, in order of rising
    explained variance. Raises ValueError if the rank of the covariance is below `components`."""
    x = as_codes(x, 'x')
    mean = x.mean(0)
    centred = x - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / max(1, len(x) - 1))
    rank = int((values > 1e-12 * values[-1]).sum())
    check_counts('components, by the rank of x', components, high=rank)
    return mean, vectors[:, -components:] / np.sqrt(values[-components:])


def fast_ica(x, components=10, rng=None):
    """FastICA (Hyvärinen 1999; symmetric, tanh, here at most 200 iterations) of whitened principal
    components: as pca, a mean and a matrix, but in no particular order."""
    mean, whiten = pca(x, components)
    s = (as_codes(x, 'x') - mean) @ whiten                                  # (n, components)
    rng = np.random.default_rng(0 if rng is None else rng)
    w = np.linalg.qr(rng.standard_normal((components, components)))[0]      # a column a source
    for _ in range(200):
        g = np.tanh(s @ w)
        u, _, vt = np.linalg.svd(s.T @ g / len(s) - w * (1 - g ** 2).mean(0))
        previous, w = w, u @ vt
        if np.abs(np.abs((w * previous).sum(0)) - 1).max() < 1e-6:
            break
    return mean, whiten @ w
