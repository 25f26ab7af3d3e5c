"""How disentangled is a code? Functions of arrays and of `encode`: no model, no data set.

Letters: J latents, K factors v₁ … v_K, L pairs, n points, N images. Information is in nats. Codes
are arrays or tensors of any real type; `rng` is a numpy.random.Generator, or a seed for one.
"""
import math

import numpy as np
import torch


def as_codes(x, name, rows=None):
    """x, an array or a tensor, as float64 (n, J); n must be `rows`, if given."""
    x = np.asarray(x.detach().cpu().double() if torch.is_tensor(x) else x, np.float64)
    if x.ndim != 2 or rows not in (None, len(x)):
        raise ValueError(f'{name}: expected shape ({rows or "n"}, columns), not {x.shape}')
    if not np.isfinite(x).all():
        raise ValueError(f'{name}: expected finite values')
    return x


def as_factors(v, rows):
    """Factor values (n, K), any integers, renumbered from 0 in each column."""
    v = as_codes(v, 'factor values', rows)
    if (v % 1).any() or (v == v[0]).all():
        raise ValueError('factor values: expected integers, and a factor that varies')
    return np.stack([np.unique(f, return_inverse=True)[1] for f in v.T], 1)


def disentanglement_score(encode, factor_sizes, *, pairs=64, factors=None, train=10000, test=5000,
                          rng=0):
    """Accuracy in [0, 1] of a linear classifier that tells which factor two images share.

    For each point a factor k is drawn from `factors` (K of them), then L = `pairs` pairs (v₁, v₂)
    that share factor k, at a new value for each pair, and differ freely in the others. The
    classifier is fitted to `train` points (mean over pairs of |μ(x₁) − μ(x₂)|, k) and scored on
    `test` others (Higgins et al. 2017, section 3). Pairs and points are random; nothing is binned.

    encode        int64 indices (n,), flat in C order over the factors → codes (n, J)
    factor_sizes  how many values each factor takes
    factors       positions of those that may be chosen (default: all with more than one value);
                  the rest vary freely, so dSprites with K = 4 means that shape is never chosen

    Fine print. The score rises with L, which averages out noise, and falls with K: give both. A
    code that lacks one factor can score 100 %, because only that factor leaves no latent with small
    differences (Kim and Mnih 2018). Score samples z ~ q(z|x) as well as means, with one fixed draw
    for each image: a collapsed code, whose means are tiny, can score high where samples do not.
    """
    sizes = np.asarray(factor_sizes)
    factors = np.flatnonzero(sizes > 1) if factors is None else np.asarray(factors)
    if not 2 <= len(factors) == len(set(factors) & set(range(len(sizes)))):
        raise ValueError(f'factors: expected two or more positions in {sizes}, not {factors}')
    x, k = features(encode, sizes, pairs, factors, train + test, np.random.default_rng(rng))
    if len(set(k[:train])) < len(factors):
        raise ValueError(f'train: {train} points are too few to meet all {len(factors)} factors')
    weights = softmax_regression(x[:train], k[:train], len(factors))        # (J + 1, K)
    predicted = np.hstack([x[train:], np.ones((test, 1))]) @ weights        # (test, K)
    return float((predicted.argmax(1) == k[train:]).mean())


def features(encode, sizes, pairs, factors, points, rng):
    """Means of |μ(x₁) − μ(x₂)| over L pairs (n, J), and which of `factors` the pairs share (n,)."""
    x = []
    k = rng.integers(len(factors), size=points)
    chunks = min(points, math.ceil(points * pairs / 512))                   # bounds the memory
    for shared in np.array_split(k, chunks):
        v = rng.integers(sizes, size=(2, len(shared), pairs, len(sizes)))   # v₁, v₂
        same = np.arange(len(sizes)) == factors[shared][:, None, None]      # (n, 1, all factors)
        v[1] = np.where(same, v[0], v[1])
        index = np.ravel_multi_index(tuple(np.moveaxis(v, -1, 0)), tuple(sizes))    # (2, n, L)
        mu = as_codes(encode(index.ravel()), 'codes', index.size).reshape(*index.shape, -1)
        x.append(np.abs(mu[0] - mu[1]).mean(1))                             # μ: (2, n, L, J)
    return np.concatenate(x), k


def softmax_regression(x, k, classes, ridge=1e-4):
    """Multinomial logistic regression: points (n, J), classes (n,) → weights (J + 1, classes).

    Minimises the mean cross-entropy + ridge / 2 · ‖W‖² on standardised features. The bias, the last
    row of W, is penalised, too. For ten latents the ridge only keeps separable problems finite: the
    score moved by 0.2 points at most from 1e-8 to 1e-4. For 4,096 raw pixels it matters: 42.4 % at
    1e-4, 47.5 % at 1e-2 (K = 4, L = 20). The optimum is unique, whatever the optimiser.
    """
    mean = x.mean(0)
    scale = np.maximum(x.std(0), 1e-12 * np.abs(x).max(0) + 1e-300)         # constants have no std
    a = torch.from_numpy(np.hstack([(x - mean) / scale, np.ones((len(x), 1))]))     # (n, J + 1)
    k = torch.from_numpy(k)
    w = torch.zeros(classes, a.shape[1], dtype=torch.float64, requires_grad=True)   # faster than wᵀ
    lbfgs = torch.optim.LBFGS([w], max_iter=2000, history_size=20, tolerance_grad=1e-5,
                              tolerance_change=1e-10, line_search_fn='strong_wolfe')

    def loss():
        lbfgs.zero_grad()
        value = torch.nn.functional.cross_entropy(a @ w.T, k) + ridge / 2 * (w ** 2).sum()
        value.backward()
        return value
    lbfgs.step(loss)
    w = w.detach().numpy().T / np.append(scale, 1)[:, None]                 # undoes the scaling
    return np.vstack([w[:-1], w[-1] - mean @ w[:-1]])


def mutual_information_gap(mu, v, bins=None):
    """MIG (Chen et al. 2018, eq. 6), in [0, 1], and the matrix I(z_j; v_k) in nats, (J, K).

    The gap between the two latents that know most about a factor, divided by its entropy H(v_k),
    averaged over the factors that vary. Latents are binned; nothing is random.

    mu      codes (n, J): posterior means in most work; Chen et al.'s numbers are of samples
    v       values of the factors (n, K), integers
    bins    bins per latent (default: as many as the largest factor has values)
    """
    mu = as_codes(mu, 'mu')
    v = as_factors(v, len(mu))
    information = np.stack([latent_information(mu, f, bins or v.max() + 1) for f in v.T], 1)
    entropies = np.array([mutual_information(f, f) for f in v.T])           # I(v; v) = H(v)
    second, first = np.sort(np.vstack([information, 0 * entropies]), axis=0)[-2:]   # 0 if J = 1
    varies = entropies > 0
    return float(((first - second)[varies] / entropies[varies]).mean()), information


def factor_shares(mu, v):
    """What share of each factor's entropy each latent knows, I(z_j; v_k) / H(v_k): (J, K), in
    [0, 1]. mu and v as in mutual_information_gap. Latents are binned; nothing is random.

    A factor of V values gets 2 V bins, at least 20: with fewer, two values can fall into one bin,
    and a latent that tells all of them apart would not reach 1. Chance adds about (bins − 1)
    (V − 1) / 2n nats to I. At n = 10,000 that is 0.4 % of the entropy ln V for V = 10, and 4 % for
    V = 40, where it takes n = 42,000 to fall below 1 %.
    """
    mu = as_codes(mu, 'mu')
    shares = []
    for f in as_factors(v, len(mu)).T:
        information = latent_information(mu, f, max(20, 2 * (f.max() + 1)))
        entropy = mutual_information(f, f)
        shares.append(information / (entropy or 1))                         # 0 if f never varies
    return np.stack(shares, 1)


def latent_information(mu, f, bins):
    """I(z_j; v) of each latent and one factor's values f (n,), in nats: (J,). Each latent is cut
    into bins of equal width, from its smallest to its largest value."""
    width = np.ptp(mu, axis=0)
    code = (mu - mu.min(0)) / np.where(width > 0, width, 1) * bins          # in [0, bins]
    code = np.minimum(code.astype(int), bins - 1)
    return np.array([mutual_information(c, f) for c in code.T])


def mutual_information(a, b):
    """I(a; b) of two arrays (n,) of integers ≥ 0, in nats: Σ p(a, b) ln (p(a, b) / (p(a) p(b)))."""
    sizes = a.max() + 1, b.max() + 1
    joint = np.bincount(a * sizes[1] + b, minlength=sizes[0] * sizes[1]).reshape(sizes) / len(a)
    outer = joint.sum(1, keepdims=True) * joint.sum(0)
    return float((joint[joint > 0] * np.log(joint[joint > 0] / outer[joint > 0])).sum())


def log_densities(z, mu, logvar):
    """log q(z_j | m) in nats, A codes at M posteriors: (A, J), (M, J), (M, J) → (A, M, J)."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z[:, None] - mu) ** 2 / logvar.exp())


def elbo_decomposition(mu, logvar, samples=None, rng=2018):
    """The KL term's parts, in nats per image (Chen et al. 2018, eq. 2): a dictionary.

        E_n[KL(q(z|n) ‖ p(z))]  =  I_q(z; n)  +  KL(q(z) ‖ Π_j q(z_j))  +  Σ_j KL(q(z_j) ‖ p(z_j))

    with q(z) = 1/N Σ_n q(z|n). The mutual_information, total_correlation and dimension_wise_kl (J,)
    sum exactly to `kl`, an estimate of the analytic KL term. z is random; nothing is binned.

    mu, logvar  (N, J), those of q(z|n) for all N images; |log σ²| at most 50
    samples     z is sampled for this many images, once each (default: all N); q(z) is of all N

    The mutual information is at most ln N, its `ceiling`. Within about 0.3 nats of it, the split
    between it and the total correlation is unresolved: whatever the first lacks shows up in the
    second. A larger N helps; more samples do not. `standard_error` is that of `kl` if samples ≪ N;
    with all N it is too large (up to 2.2 times in nine models).
    """
    mu = torch.from_numpy(as_codes(mu, 'mu'))
    logvar = torch.from_numpy(as_codes(logvar, 'logvar'))
    if mu.shape != logvar.shape or logvar.abs().max() > 50:
        raise ValueError('logvar: expected the shape of mu, and values from −50 to 50')
    N, J = mu.shape
    rng = np.random.default_rng(rng)
    chosen = np.arange(N) if samples in (None, N) else rng.permutation(N)[:samples]
    noise = torch.from_numpy(rng.standard_normal((len(chosen), J)))
    z = mu[chosen] + torch.exp(0.5 * logvar[chosen]) * noise                # (samples, J)
    log_qzj = torch.full_like(z, -math.inf)
    log_qz = log_qzj[:, 0]
    rows = max(1, 10 ** 6 // z.numel())                                     # bounds the memory
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
                kl=float(kl.mean()), standard_error=float(kl.std() / math.sqrt(len(z))))
