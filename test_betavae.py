"""Each test compares with something independent: torch.distributions, a closed form, a brute-force
loop, genuine frames. In the order of the modules. DSPRITES_NPZ=… adds the official dSprites."""
import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

import betavae
import data
import metrics

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))


def toy(channels=1, sizes=(12, 12)):
    """A block at one of 12 × 12 places: an image shows its index."""
    def draw(index):
        a, b = index // 12, index % 12
        at = torch.arange(64)

        def inside(place):
            return (at >= 5 * place[:, None]) & (at < 5 * place[:, None] + 9)
        images = inside(a)[:, None, :, None] & inside(b)[:, None, None, :]
        return (images * 200 + 20).to(torch.uint8).repeat(1, channels, 1, 1)
    return data.Dataset('toy', (channels, 64, 64), {'a': 12, 'b': 12}, draw)


def index_of(x):
    """The index of toy images: floats (B, C, 64, 64)."""
    block = x[:, 0] > 0.5
    return 12 * (block.any(2).int().argmax(1) // 5) + block.any(1).int().argmax(1) // 5


def train(steps=12, dataset=None, **options):
    options = dict(
    latents=3,
    batch=16,
    precision='fp32',
    device='cpu',
    run='a',
     steps=steps) | options
    return betavae.train(dataset or toy(), betavae.options(**options))


def main(*words):
    """The command line; returns its exit status."""
    try:
        betavae.main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code
    return 0


def state(run='a'):
    return torch.load(Path(run, 'checkpoint.pt'), weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The objective ----------------------------------------------------------

def test_kl_is_that_of_torch_distributions():
    mu, logvar = torch.randn(2, 50, 7, dtype=torch.float64)
    expected = kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), Normal(0.0, 1.0))
    torch.testing.assert_close(betavae.kl_per_latent(mu, logvar), expected)


def test_beta_1_is_the_negative_elbo():
    """Per image, in nats; the Gaussian of variance ½ has the constant D/2 · ln π besides."""
    x, logits = torch.rand(5, 3, 64, 64).round(), torch.randn(5, 3, 64, 64)
    bernoulli = -Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3)).mean()
    torch.testing.assert_close(betavae.reconstruction(logits, x, 'bernoulli'), bernoulli)
    x = torch.rand(5, 3, 64, 64)
    gaussian = -Normal(logits.sigmoid(), math.sqrt(0.5)).log_prob(x).sum((1, 2, 3)).mean()
    constant = 3 * 64 * 64 / 2 * math.log(math.pi)
    torch.testing.assert_close(betavae.reconstruction(logits, x, 'gaussian') + constant, gaussian)
    with pytest.raises(ValueError, match='bernoulli or gaussian'):
        betavae.reconstruction(logits, x, 'gauss')


def test_schedules():
    """yukunchen113/Beta-VAE has max(1, 100 − t/400) and max(1, 10000 − t/10), which reach 1 at
    steps 39,600 and 99,990; ours are linear over all of 40,000 and 100,000. Its rise is ours."""
    for t in (0, 1, 399, 20000, 39600, 39999, 40000, 50000, 99990, 100000, 125000):
        assert betavae.beta_at(t, 10, 0, 40000) == pytest.approx(min(10, t / 4000))
        assert betavae.beta_at(t, 1, 100, 40000) == pytest.approx(max(1, 100 - t * 99 / 40000))
        assert betavae.beta_at(t, 1, 10000, 100000) == pytest.approx(
            max(1, 10000 - t * 9999 / 100000))
        assert abs(betavae.beta_at(t, 1, 100, 40000) - max(1, 100 - t / 400)) <= 1
        assert betavae.beta_at(t, 7) == 7


def brute_force_total_correlation(z, mu, logvar, n, weight):
    """Chen et al. 2018, appendix C.2, an image, a latent, a term at a time."""
    q = Normal(mu, torch.exp(0.5 * logvar))
    total = 0
    for i in range(len(z)):
        log_q = q.log_prob(z[i])                                                    # (M, J)
        w = torch.tensor([weight[0] if m == i else weight[1] for m in range(len(z))], dtype=z.dtype)
        joint = torch.log((w * log_q.sum(1).exp()).sum())
        total = total + joint - \
            sum(torch.log((w * log_q[:, j].exp()).sum()) for j in range(z.shape[1]))
    return total / len(z)


def test_total_correlation_by_brute_force_unbiased_and_exact_for_the_whole_set():
    generator = torch.Generator().manual_seed(0)
    mu, logvar, noise = torch.randn(3, 6, 2, generator=generator, dtype=torch.float64)
    z = betavae.sample(mu, logvar, noise)
    n, m = 6, 3
    weight = 1 / n, (n - 1) / (n * (m - 1))
    torch.testing.assert_close(betavae.total_correlation(z[:m], mu[:m], logvar[:m], n),
                               brute_force_total_correlation(z[:m], mu[:m], logvar[:m], n, weight))
    torch.testing.assert_close(betavae.total_correlation(z, mu, logvar, n),
                               brute_force_total_correlation(z, mu, logvar, n, (1 / n, 1 / n)))
    # The estimate of q(z) itself, averaged over all batches that hold image 0, is q(z) there.
    q = Normal(mu, torch.exp(0.5 * logvar)).log_prob(z[0]).sum(1).exp()             # (N,)
    batches = [weight[0] * q[0] + weight[1] * q[list(others)].sum()
               for others in itertools.combinations(range(1, n), m - 1)]
    torch.testing.assert_close(torch.stack(batches).mean(), q.mean())


def test_linear_decoder_reaches_probabilistic_pca():
    """With a linear decoder the objective is PPCA of noise variance β/2: latent i survives where
    λ_i > β/2, with ½ ln(2 λ_i / β) nats (Lucas et al. 2019). At the optimum that they give in
    closed form the objective's gradient vanishes, and with one latent more or less it is higher."""
    lambdas = torch.tensor(
        [4e-6, 1e-6, 3e-7], dtype=torch.float64)          # the sigmoid is straight there
    beta, n, d = 1e-6, 2000, 6
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0][:, :3]
    scores = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    # covariance exactly 1
    scores = torch.linalg.qr(scores - scores.mean(0))[0] * math.sqrt(n)
    x = (0.5 + scores * lambdas.sqrt() @ basis.T).view(n, 1, 1, d)
    noise = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    noise = torch.linalg.qr(torch.cat([scores, noise], 1))[
                            0][:, 3:] * math.sqrt(n) # uncorrelated too

    def loss_at(used):
        kept = (torch.arange(3) < used).double()
        gain = kept * (lambdas - beta / 2).clamp(min=0).sqrt()                      # of the decoder
        a = (gain / lambdas.sqrt()).requires_grad_()                                # μ = a · scores
        logvar = torch.log(1 - kept * (1 - beta / (2 * lambdas))).requires_grad_()
        # 1/4: slope of sigmoid
        w = (4 * gain[:, None] * basis.T).requires_grad_()

        def network(x, noise):
            mu = scores * a
            z = betavae.sample(mu, logvar, noise)
            return (z @ w).view(n, 1, 1, d), z, mu, logvar.expand(n, 3)
        loss, _, kl = betavae.objective(network, x, noise, beta)
        loss.backward()
        return loss.item(), kl, max(p.grad.abs().max() for p in (a, logvar, w))
    best, kl, gradient = loss_at(2)
    torch.testing.assert_close(
    kl,
    0.5 *
    torch.log(
        2 *
        lambdas /
        beta).clamp(
            min=0),
            atol=1e-9,
             rtol=0)
    assert gradient < 1e-2 * beta
    assert best < min(loss_at(1)[0], loss_at(0)[0])


# Training: an independent run -------------------------------------------

class Plain:
    """The paper's algorithm as a reader would write it: plain layers, torch.distributions, Adam."""

    def __init__(self, C, J, options):
        def relu():
            return nn.LeakyReLU(options.get('leak', 0.2))
        self.J, self.options = J, options
        self.encoder = nn.Sequential(
            nn.Conv2d(C, 32, 4, 2, 1), relu(), nn.Conv2d(32, 32, 4, 2, 1), relu(),
            nn.Conv2d(32, 64, 4, 2, 1), relu(), nn.Conv2d(64, 64, 4, 2, 1), relu(), nn.Flatten(),
            nn.Linear(1024, 256), relu(), nn.Linear(256, 2 * J))
        self.decoder = nn.Sequential(
    nn.Linear(
        J, 256), relu(), nn.Linear(
            256, 1024), relu(), nn.Unflatten(
                1, (64, 4, 4)), nn.ConvTranspose2d(
                    64, 64, 4, 2, 1), relu(), nn.ConvTranspose2d(
                        64, 32, 4, 2, 1), relu(), nn.ConvTranspose2d(
                            32, 32, 4, 2, 1), relu(), nn.ConvTranspose2d(
                                32, C, 4, 2, 1))
        self.weights = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.adam = torch.optim.Adam(self.weights, fused=False, foreach=False)

    def load(self, weights, moments=None):
        with torch.no_grad():
            for mine, given in zip(self.weights, weights, strict=True):
                mine.copy_(given)
        for mine, given in zip(self.weights, moments or []):
            self.adam.state[mine] = {k: v.clone().contiguous() for k, v in given.items()}
        return self

    def terms(self, x, noise, likelihood='gaussian'):
        mu, logvar = self.encoder(x).split(self.J, 1)
        q = Normal(mu, (logvar / 2).exp())
        logits = self.decoder(mu + q.stddev * noise)
        p = Normal(logits.sigmoid(), 0.5 ** 0.5)
        recon = -p.log_prob(x).sum() / len(x) - x[0].numel() / 2 * math.log(math.pi)
        if likelihood == 'bernoulli':
            recon = -Bernoulli(logits=logits, validate_args=False).log_prob(x).sum() / len(x)
        return recon, kl_divergence(q, Normal(0.0, 1.0)).mean(0), q, mu + q.stddev * noise

    def step(self, x, noise, t, n):
        """Update t (from 0) with batch x: loss, reconstruction, KL_j; the gradients stay."""
        o = self.options
        now = min(1, t / o['anneal']) if 'anneal' in o else 1
        start, end = o.get('beta_from', 0), o.get('capacity', o.get('beta', 1))
        now = start + now * (end - start)
        recon, kl, q, z = self.terms(x, noise, o.get(
            'likelihood', 'gaussian' if x.shape[1] == 3 else 'bernoulli'))
        loss = recon + now * kl.sum()
        if 'capacity' in o:
            loss = recon + o['gamma'] * abs(kl.sum() - now)
        if 'tc' in o:
            m = len(x)
            weight = 1 / n, (n - 1) / n / (m - 1)
            loss = recon + kl.sum() + (now - 1) * brute_force_total_correlation(
                z.double(), q.mean.double(), 2 * q.stddev.double().log(), n, weight).float()
        self.adam.param_groups[0]['lr'] = 5e-4 * min(1, (t + 1) / o.get('warmup', 1))
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return torch.stack([loss, recon, *kl]).detach()


class Witness(betavae.Run):
    """A run without pictures that notes what each step was given and what came of it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.steps = []
        self.picture_steps = {}
        self.note()

    def note(self, losses=None):
        weights = list(self.model.parameters())
        self.steps.append(dict(
            losses=losses, weights=[p.detach().clone() for p in weights],
            moments=[{k: v.clone() for k, v in self.optimiser.state[p].items()} for p in weights],
            gradients=[p.grad.clone() for p in weights if p.grad is not None]))

    def record(self, beta, loss, recon, kl):
        self.note(torch.stack([loss, recon, *kl]).detach())
        super().record(beta, loss, recon, kl)

    def finish(self):
        Witness.last = self


@pytest.fixture
def witness(monkeypatch):
    """Trains and returns what each step saw: (x, noise) of the batch, then the notes."""
    given = []
    batch = betavae.batch

    def spied(*args):
        given.append(batch(*args))
        return given[-1]
    monkeypatch.setattr(betavae, 'Run', Witness)
    monkeypatch.setattr(betavae, 'batch', spied)

    def run(**options):
        given.clear()
        train(**options)
        return given.copy(), Witness.last
    return run


CASES = [
    dict(beta=4), dict(beta=4, dataset=toy(3)), dict(beta=20, anneal=8, dataset=toy(3)),
    dict(beta=1, beta_from=30, anneal=8, leak=0, dataset=toy(3), likelihood='bernoulli'),
    dict(beta=2, warmup=6), dict(capacity=6, gamma=30, anneal=8, warmup=5),
    dict(beta=6, tc=True, anneal=8, leak=0)]


@pytest.mark.parametrize('case', CASES, ids=lambda case: '-'.join(case))
def test_training_is_the_papers_algorithm(case, witness):
    given, run = witness(steps=13, **case)
    n = sum(k % 19 != 0 for k in range(144))                            # training images
    plain = Plain(run.dataset.shape[0], 3, case).load(run.steps[0]['weights'])
    for t in range(5):                                              # the first steps, on its own
        losses = plain.step(*given[t], t, n)
        torch.testing.assert_close(run.steps[t + 1]['losses'], losses, rtol=2e-6, atol=1e-6)
    for mine, theirs in zip(plain.weights, run.steps[5]['weights']):
        assert (mine - theirs).abs().max() < 5e-4 / 10
    for t in (4, 8, 12):                # a step from in the ramp, its end, past the warm-up
        plain = Plain(
    run.dataset.shape[0],
    3,
    case).load(
        run.steps[t]['weights'],
         run.steps[t]['moments'])
        losses = plain.step(*given[t], t, n)
        torch.testing.assert_close(run.steps[t + 1]['losses'], losses, rtol=2e-6, atol=1e-6)
        for mine, gradient, weights in zip(
                plain.weights, run.steps[t + 1]['gradients'], run.steps[t + 1]['weights']):
            scale = gradient.abs().max()
            assert (mine.grad - gradient).abs().max() < 2e-5 * scale
            assert (mine - weights).abs().max() < 5e-4 / 100


def test_batches_are_training_images_all_of_them_and_normal_noise():
    dataset = toy()
    batches = [betavae.batch(dataset, 3, step, 64, 5, 'cpu') for step in range(40)]
    x, noise = (torch.cat(part) for part in zip(*batches))
    assert x.dtype == torch.float32 and x.max() <= 1
    counts = torch.bincount(index_of(x), minlength=144)
    training = torch.arange(144) % 19 != 0
    # 2560 draws of 136: none is missed
    assert torch.equal(counts > 0, training)
    assert abs(
    counts[training].float().var() /
    counts[training].float().mean() -
     1) < 0.4  # uniform
    standard = noise.flatten().sort().values
    expected = Normal(0.0, 1.0).icdf((torch.arange(len(standard)) + 0.5) / len(standard))
    assert (standard - expected)[50:-50].abs().max() < 0.1
    assert np.abs(np.corrcoef(noise.T) - np.eye(5)).max() < 0.08
    again = betavae.batch(dataset, 3, 7, 64, 5, 'cpu')
    assert all(torch.equal(a, b) for a, b in zip(again, batches[7]))
    others = [
    batches[8], betavae.batch(
        dataset, 4, 7, 64, 5, 'cpu'), betavae.batch(
            dataset, 7, 3, 64, 5, 'cpu')]
    for other in others:                                                # another step, another seed
        assert not torch.equal(
    index_of(
        other[0]), index_of(
            again[0])) and not torch.equal(
                other[1], again[1])


def test_the_first_weights_are_those_of_the_seed_and_of_plain_layers(witness):
    first = {seed: witness(steps=1, seed=seed)[1].steps[0]['weights'] for seed in (0, 1)}
    again = witness(steps=1, seed=1, run='b')[1].steps[0]['weights']
    assert all(torch.equal(a, b) for a, b in zip(first[1], again))
    assert not any(torch.equal(a, b) for a, b in zip(first[0], first[1]))
    torch.manual_seed(1)
    before = torch.rand(1)
    plain = Plain(1, 3, {})
    for mine, theirs in zip(plain.weights, again):                      # of one distribution
        assert mine.shape == theirs.shape
        assert len(mine) < 32 or abs(mine.std() / theirs.std() - 1) < 0.25
    torch.manual_seed(1)
    train(1)
    # the global state is left alone
    assert torch.equal(torch.rand(1), before)


def test_shapes_and_wrong_input():
    model = betavae.BetaVAE(3, 6)
    x = torch.rand(2, 3, 64, 64)
    logits, z, mu, logvar = model(x, torch.randn(2, 6))
    assert logits.shape == x.shape and z.shape == mu.shape == logvar.shape == (2, 6)
    for bad in (x[:, :1], x[:, :, :32, :32], (x * 255).byte(), x.double(), x[0]):
        with pytest.raises(ValueError, match='expected float32'):
            model.encode(bad)
    with torch.no_grad():                                               # bf16 rounds, and no more
        half = betavae.BetaVAE(3, 6, bf16=True)
        half.load_state_dict(model.state_dict())
        for a, b in zip(half(x, torch.zeros(2, 6)), model(x, torch.zeros(2, 6))):
            assert a.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.02


# A run's figures and pictures, recomputed from its checkpoint -----------

@pytest.fixture
def short(monkeypatch):
    """Rows every 5 steps, pictures every 8."""
    monkeypatch.setattr(betavae, 'ROW', 5)
    monkeypatch.setattr(betavae, 'PICTURES', 8)


def plain_of(run='a', C=1, J=3, **options):
    return Plain(C, J, options).load(state(run)['model'].values())


def held_out_images(dataset, n):
    """By the rule: every 19th, in the order in which a run sees them."""
    index = dataset.held_out(n)
    assert set(index) <= {
    k for k in range(
        len(dataset)) if k %
        19 == 0} and len(
            set(index)) == len(index)
    return torch.from_numpy(dataset.images(index)) / 255


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def read_log(run='a'):
    return np.atleast_1d(np.genfromtxt(Path(run, 'log.csv'), delimiter=',', names=True))


def read(*path):
    return json.loads(Path(*path).read_text())


@pytest.mark.parametrize('options', [dict(beta=5, anneal=20),
                         dict(tc=True, beta=3), dict(capacity=4, gamma=9)])
def test_each_column_of_the_log(options, short, monkeypatch):
    notes, record = [], betavae.Run.record

    def noting(run, beta, loss, recon, kl):
        notes.append([beta, loss.item(), recon.item(), kl.sum().item(), *kl.tolist()])
        record(run, beta, loss, recon, kl)
    monkeypatch.setattr(betavae.Run, 'record', noting)
    monkeypatch.setattr(betavae.Run, 'draw', lambda *_, **__: dict(collapsed=False))
    train(12, **options)
    log = read_log()
    assert log['step'].tolist() == [5, 10, 12]
    for row, (start, end) in zip(log, ((0, 5), (5, 10), (10, 12))):
        expected = np.mean([note[1:] for note in notes[start:end]], 0)
        np.testing.assert_allclose([row[name] for name in (
            'loss', 'recon', 'kl', 'kl_0', 'kl_1', 'kl_2')], expected, rtol=1e-5)
        assert row['beta'] == pytest.approx(notes[end - 1][0])
    assert (np.diff(log['seconds'], prepend=0) > 0).all()
    assert log['seconds'][-1] == pytest.approx(state()['seconds'])

    dataset = toy()
    # all 8 of them: of 144 images
    x = held_out_images(dataset, 1000)
    with torch.no_grad():
        recon, kl, q, z = plain_of().terms(x, noise(len(x), 3), 'bernoulli')
    beta = notes[-1][0]
    n = 144 - 8
    tc = brute_force_total_correlation(
        z, q.mean, 2 * q.stddev.log(), n, (1 / n, (n - 1) / n / (len(x) - 1)))
    loss = (recon + kl.sum() + (beta - 1) * tc if 'tc' in options else
            recon + 9 * abs(kl.sum() - beta) if 'capacity' in options else recon + beta * kl.sum())
    np.testing.assert_allclose([log[f'held_out_{name}'][-1] for name in ('loss', 'recon', 'kl')],
                               [float(loss), float(recon), float(kl.sum())], rtol=1e-5)


def test_held_out_rows_use_125_images_and_summaries_1000(short, monkeypatch):
    sizes = []
    evaluate, summarise = betavae.evaluate, betavae.summarise
    monkeypatch.setattr(
    betavae,
    'evaluate',
    lambda m,
    x,
    *
    a: sizes.append(
        len(x)) or evaluate(
            m,
            x,
            *
            a))
    monkeypatch.setattr(betavae, 'summarise', lambda *a: sizes.append(len(a[4])) or summarise(*a))
    big = data.Dataset('big', (1, 64, 64), {}, toy().draw, size=20000)
    big.draw = lambda index: toy().draw(index % 144)
    train(2, dataset=big)
    assert sizes == [125, 1000]


def test_each_field_of_the_summary(short, monkeypatch):
    # so that some are, and some not
    monkeypatch.setattr(betavae, 'ACTIVE', 0.5)
    train(30, beta=2)
    summary, log = read('a/summary.json'), read_log()
    dataset = toy()
    x = held_out_images(dataset, 1000)
    plain = plain_of()
    with torch.no_grad():
        recon, kl, q, _ = plain.terms(x, noise(len(x), 3), 'bernoulli')
        kl_j = kl
        means = q.mean.mean(0)
        every = torch.from_numpy(dataset.images(np.arange(144))) / 255
        mu = plain.encoder(every)[:, :3].numpy()
    top, by_mean = int(kl_j.argmax()), int(means.abs().argmax())
    assert summary['reconstruction'] == pytest.approx(recon.item(), rel=1e-5)
    assert summary['kl'] == pytest.approx(kl.sum().item(), rel=1e-4)
    np.testing.assert_allclose(summary['kl_per_latent'], kl_j, rtol=1e-3, atol=1e-5)
    assert summary['active_latents'] == int((kl_j > 0.5).sum()) and 0 < summary['active_latents']
    assert summary['steps'] == 30 and summary['collapsed'] is False
    assert summary['largest_mean'] == pytest.approx(means[by_mean].item(), rel=1e-4)
    assert summary['largest_mean_standard_error'] == pytest.approx(
        q.mean[:, by_mean].std(correction=0).item() / len(x) ** 0.5, rel=1e-3)
    assert summary['train_reconstruction'] == pytest.approx(log['recon'][-1], rel=1e-6)
    assert summary['train_kl'] == pytest.approx(
        log['kl'][-1], rel=1e-6) and summary['last_beta'] == 2
    pace = 16 * 5 / np.diff(log['seconds'], prepend=0)
    assert summary['images_per_second'] == pytest.approx(np.median(pace), rel=1e-4)
    assert summary['linear_latents'] is None and summary['dataset'] == dataset.identity()

    factors = np.stack(np.unravel_index(np.arange(144), (12, 12)), 1)
    assert summary['mig'] == pytest.approx(metrics.mutual_information_gap(mu, factors)[0], abs=1e-3)
    factor, share = metrics.encoded_factors(mu, factors)
    for j, name in enumerate(summary['latent_names']):
        named = share[j] >= 0.05 and kl_j[j] > 0.5
        assert name == f'z{j}' + (f": {'ab'[factor[j]]} {share[j]:.0%}" if named else '')
    assert summary['top_latent'] == summary['latent_names'][top]
    assert summary['top_latent_by_mean'] == summary['latent_names'][by_mean]
    _, information = metrics.mutual_information_gap(mu, factors, 20)
    for k, name in enumerate('ab'):
        assert summary[f'share of {name}'] == pytest.approx(
            information[:, k].max() / math.log(12), abs=1e-3)
    assert len(summary['dimension_wise_kl']) == 3 and summary['mig_samples'] != summary['mig']
    settings = read('a/settings.json')
    assert settings['beta'] == 2 and settings['batch'] == 16 and 'run' not in settings


def test_a_collapsed_run_says_so_and_a_young_one_does_not(capsys, monkeypatch):
    train(2)
    assert read(
        'a/summary.json')['collapsed'] is False and 'collapsed' not in capsys.readouterr().out
    kept = state()
    kept['model']['posterior.weight'].zero_()
    kept['model']['posterior.bias'].zero_()
    kept['step'] = 1000
    kept['log'][-1, 0] = 1000
    torch.save(kept, 'a/checkpoint.pt')
    # trains nothing: it is there
    train(1000)
    summary = read('a/summary.json')
    assert summary['collapsed'] and summary['kl'] == 0 and summary['active_latents'] == 0
    assert summary['latent_names'] == ['z0', 'z1', 'z2'] and 'collapsed' in capsys.readouterr().out


def test_pictures_show_what_they_say(monkeypatch):
    """The codes behind traversal, top latent and reconstructions, against plain decodes."""
    train(40, beta=0.5)
    sheets = []
    sheet = data.sheet
    monkeypatch.setattr(data, 'sheet', lambda *a, **k: sheets.append(a) or sheet(*a, **k))
    train(40, beta=0.5)                                                 # draws them again
    plain, dataset = plain_of(), toy()
    x = held_out_images(dataset, 1000)
    with torch.no_grad():
        mu, logvar = plain.encoder(x).split(3, 1)
        sigma = (logvar / 2).exp()
        kl = kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0)).mean(0)
        z = mu + sigma * noise(len(x), 3)
        order = kl.argsort(descending=True).tolist()
        top = torch.zeros(3, 10, 3)
        top[:, :, order[0]] = torch.linspace(z[:, order[0]].min(), z[:, order[0]].max(), 10)
        top = top + torch.arange(3)[:, None, None] * sigma.mean(0)
        rows = torch.stack([mu[3].expand(8, 3).clone() for _ in order])
        for row, j in enumerate(order):
            rows[row, :, j] = torch.linspace(-3, 3, 8)

        def pixels(codes):
            return plain.decoder(codes.reshape(-1, 3)).sigmoid().reshape(* \
                                 codes.shape[:-1], 1, 64, 64) * 255
        (seen, *_), (grid, labels, *_), (tops, *_) = sheets[:3]
        assert (seen[0] - x[:8] * 255).abs().max() == 0
        assert (seen[1] - pixels(mu[:8])).abs().max() <= 1
        assert (seen[2:] - pixels(noise(2, 8, 3))).abs().max() <= 1
        assert (grid - pixels(rows)).abs().max() <= 1 and (tops - pixels(top)).abs().max() <= 1
    assert [label[:2] for label in labels] == [f'z{j}' for j in order]
    assert labels[0].endswith(f'{kl[order[0]]:.2f} nats')
    assert {
    path.name for path in Path('a').iterdir()} == {
        'checkpoint.pt',
        'curves.png',
        'log.csv',
        'reconstructions.jpg',
        'settings.json',
        'summary.json',
        'top_latent.jpg',
        'training.gif',
        'traversal.gif',
         'traversal.jpg'}
    # of steps 1, 3, 10, 30 and 40
    assert Image.open('a/training.gif').n_frames == 5
    assert Image.open('a/traversal.gif').n_frames == 16


def test_spectrum_and_what_a_linear_decoder_would_use(capsys):
    """Images along two directions of known variance."""
    directions = torch.linalg.qr(
    torch.randn(
        64 * 64,
        2,
         generator=torch.Generator().manual_seed(0)))[0]
    scores = torch.randn(5000, 2, generator=torch.Generator().manual_seed(1)) * \
                         torch.tensor([6.0, 2.0])

    def draw(index):
        x = 0.5 + scores[index % 5000] @ directions.T
        return (x * 255).round().clamp(0, 255).to(torch.uint8).view(-1, 1, 64, 64)
    dataset = data.Dataset('plane', (1, 64, 64), {}, draw, size=100000)
    found = betavae.spectrum(dataset)
    np.testing.assert_allclose(found[:2], [36, 4], rtol=0.1)
    assert found[2] < 0.1
    for beta, count in ((1, 2), (7, 2), (9, 1), (70, 1), (80, 0)):
        s = betavae.options(beta=beta, likelihood='gaussian', latents=5)
        assert betavae.linear_latents(dataset, s) == count
    assert betavae.linear_latents(
    dataset,
    betavae.options(
        likelihood='bernoulli',
         latents=5)) is None
    train(1, dataset=dataset, beta=9, likelihood='gaussian')
    out = capsys.readouterr().out
    assert 'about 1 of 3 latents at β = 9' in out and 'none from β = 7' in out


# A run's folder ---------------------------------------------------------

def test_a_cut_run_equals_an_uncut_one_bit_for_bit(capsys, short):
    options = dict(beta=4, beta_from=1, anneal=15, warmup=8)
    train(21, **options)
    train(12, **options, run='cut')
    train(21, **options, run='cut')
    assert 'resuming from step 12' in capsys.readouterr().out
    a, b = state('a'), state('cut')
    assert same(a['model'], b['model']) and all(same(a['adam'][i], b['adam'][i]) for i in a['adam'])
    assert torch.equal(a['log'][:, :-1], b['log'][:, :-1]
                       ) and read_log('cut')['step'].tolist() == [5, 10, 15, 20, 21]
    assert Path('a/training.gif').read_bytes() == Path('cut/training.gif').read_bytes()


def test_views_are_never_read_and_made_again(short):
    train(7)
    views = {path: path.read_bytes() for path in Path(
        'a').iterdir() if path.name != 'checkpoint.pt'}
    for path in views:
        path.write_bytes(b'nonsense')
    before = state()['model']
    train(7)
    assert same(state()['model'], before)
    for path, content in views.items():
        assert path.read_bytes() == content, path
    shutil.move('a', 'elsewhere')                                       # a folder may be moved
    train(8, run='elsewhere')
    assert read_log('elsewhere')['step'].tolist() == [5, 8]


def test_pictures_and_checkpoints_do_not_disturb_training(monkeypatch):
    train(12)
    monkeypatch.setattr(betavae, 'SAVE_SECONDS', 0)
    monkeypatch.setattr(betavae, 'ROW', 3)
    train(12, run='b')
    assert same(state('a')['model'], state('b')['model'])


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_a_stopped_run_saves_resumes_and_can_end_where_it_is(name, monkeypatch, short, capsys):
    train(9, run='whole')
    batch = betavae.batch

    def interrupt(dataset, seed, step, *rest):
        if step == 6:
            signal.raise_signal(getattr(signal, name))
        return batch(dataset, seed, step, *rest)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(
            KeyboardInterrupt, match='stopped at step 7,.*--steps 7'):
        patch.setattr(betavae, 'batch', interrupt)
        train(9)
    assert signal.getsignal(signal.SIGTERM) is before and state()['step'] == 7
    assert main('compare', 'a') == 2 and '--steps' not in Path('a').name
    shutil.copytree('a', 'ended')
    train(7, run='ended')                                               # draws where it stands
    assert read('ended/summary.json')['steps'] == 7 and main('compare', 'ended') == 0
    train(9)
    assert same(state()['model'], state('whole')['model'])


def test_an_ignored_hangup_is_left_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with betavae.Run(*Witness_arguments('b')) as run:
            signal.raise_signal(signal.SIGHUP)
            assert not run.stopping
            run.finish = lambda: None
    finally:
        signal.signal(signal.SIGHUP, before)


def Witness_arguments(folder):
    """What `train` makes a Run of."""
    s = betavae.settle(
    betavae.options(
        latents=3,
        batch=16,
        precision='fp32',
        device='cpu',
        run=folder),
         toy())
    model = betavae.initial_model(s, 1)
    return s, toy(), model, torch.optim.Adam(
    model.parameters(), fused=True), dict(
        likelihood='bernoulli')


def test_killed_at_any_moment_it_ends_as_an_unbroken_run():
    """kill -9 at random moments, checkpoints every moment, also in the middle of writing one."""
    program = (
    f'import sys; sys.path.insert(0, {str(HERE)!r}); import test_betavae as t; '
        't.betavae.SAVE_SECONDS = 0; '
    't.betavae.ROW = 5; t.torch.set_num_threads(1); t.train(26, run="killed")')
    rng, kills = np.random.default_rng(0), 0
    for _ in range(20):
        process = subprocess.Popen([sys.executable, '-c', program],
                                   stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith(
                'step') and kills < 2:                   # it trains: kill it in a moment
                time.sleep(rng.uniform(0, 0.2))
                process.kill()
                kills += 1
        if process.wait() == 0:
            break
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(26)
    torch.set_num_threads(threads)
    assert kills == 2 and same(state()['model'], state('killed')['model'])
    assert not list(Path('killed').glob('*.partial'))


def altered(change):
    """The content of a checkpoint after a change to its dictionary."""
    kept = state()
    change(kept)
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    return buffer.getvalue()


class Evil:
    def __reduce__(self):
        return Path.touch, (Path('executed'),)


OTHER_BYTES = [lambda good: b'', lambda good: good[:-100], lambda good: bytes(range(256)) * 20]
OTHER_ENTRIES = [
    dict(step=3.0), dict(step=-1), dict(step=10 ** 30), dict(step='3'), dict(seconds=math.nan),
    dict(seconds=None), dict(beta='4'), dict(beta=math.nan), dict(log=[]), dict(log=torch.zeros(2, 3)),
    dict(log=torch.zeros(1).expand(10 ** 10, 12)), dict(frames={'x': torch.zeros(1)}),
    dict(frames={1: torch.zeros(8, 1, 64, 64)}),
    dict(frames={1: torch.zeros(1, dtype=torch.uint8).expand(10 ** 9, 1, 64, 64)}),
    dict(recent=torch.zeros(1)), dict(settings={}), dict(settings={'beta': 1.0}), dict(settings={'beta': -1}),
    dict(settings={'help': True}), dict(settings=Evil()), dict(dataset={}),
    dict(dataset={'shape': [5, 64, 64]}), dict(model={}), dict(adam={}), dict(extra=1)]
OTHER_TENSORS = [
    ('model', 'posterior.bias', lambda t: t[:1]), ('model', 'posterior.bias', lambda t: t.half()),
    ('model', 'posterior.bias', lambda t: t * math.nan),
    ('model', 'posterior.bias', lambda t: t.tolist()),
    ('adam', 'exp_avg', lambda t: t.flatten()[:1]), ('adam', 'exp_avg', lambda t: t / 0),
    ('adam', 'exp_avg_sq', lambda t: -1 - t), ('adam', 'step', lambda t: t * math.nan)]


def spoil(kept, part, name, change):
    of = kept['adam'][0] if part == 'adam' else kept[part]
    of[name] = change(of[name])


FOREIGN = [*OTHER_BYTES,
           *[lambda good, e=e: altered(lambda kept: kept.update(e)) for e in OTHER_ENTRIES],
           *[lambda good, t=t: altered(lambda kept: spoil(kept, *t)) for t in OTHER_TENSORS],
           lambda good: altered(lambda kept: kept.clear())]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A short run's folder, to copy."""
    folder = tmp_path_factory.mktemp('trained') / 'a'
    train(3, run=folder)
    return folder


@pytest.mark.parametrize('change', range(len(FOREIGN)))
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_a_broken_or_foreign_checkpoint_is_refused_and_kept(change, trained):
    shutil.copytree(trained, 'a')
    content = FOREIGN[change](Path('a/checkpoint.pt').read_bytes())
    Path('a/checkpoint.pt').write_bytes(content)
    for call in (lambda: train(5), lambda: betavae.load('a')):
        with pytest.raises(data.UserError, match='a/checkpoint.pt is not a valid .*delete a$'):
            call()
    assert Path('a/checkpoint.pt').read_bytes() == content and not Path('executed').exists()


def test_overlapping_or_transposed_moments_are_laid_out_anew(trained):
    """Adam's fused kernel takes the layout of the weights for granted."""
    shutil.copytree(trained, 'a')
    shutil.copytree(trained, 'b')
    content = altered(
    lambda s: [
        m.update(
            exp_avg=m['exp_avg'].contiguous(),
             exp_avg_sq=m['exp_avg_sq'].contiguous()) for m in s['adam'].values()])
    Path('a/checkpoint.pt').write_bytes(content)
    train(6, run='a')
    train(6, run='b')
    assert same(state('a')['model'], state('b')['model'])


def test_other_options_and_other_data_are_refused_and_named(trained):
    shutil.copytree(trained, 'a')
    with pytest.raises(data.UserError, match=r'--beta was 1\.0, now 2\.0'):
        train(5, beta=2)
    with pytest.raises(data.UserError, match='at step 3, past --steps 2'):
        train(2)
    other = toy()
    other.draw = lambda index: 255 - toy().draw(index)
    with pytest.raises(data.UserError, match='its data has changed'):
        train(5, dataset=other)


def test_a_second_process_is_refused(trained, capsys):
    shutil.copytree(trained, 'a')
    with data.locked(Path('a')):
        with pytest.raises(data.UserError, match='a is being trained by another process'):
            train(5)
    train(4)                                                            # free again
    assert state()['step'] == 4


def test_what_goes_wrong_with_files_is_said_in_one_line(trained, monkeypatch, capsys):
    monkeypatch.setattr(data, 'load', lambda *_: toy())
    shutil.copytree(trained, 'a')
    before = Path('a/checkpoint.pt').read_bytes()

    def no_room(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr(data.os, 'fsync', no_room)
        with pytest.raises(OSError, match='No space left'):
            train(6)
    assert Path('a/checkpoint.pt').read_bytes() == before and not list(Path('a').glob('*.partial'))
    denied = PermissionError(errno.EACCES, 'Permission denied', 'x')
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    for error, expected in ((denied, 'Permission denied: x'), (MemoryError(), 'not enough memory'),
                            (full, 'not enough memory')):
        with monkeypatch.context() as patch:
            patch.setattr(betavae, 'train', lambda *_, error=error: (_ for _ in ()).throw(error))
            assert main() == 1
        said = capsys.readouterr().err
        assert expected in said and said.count('\n') == 1 and 'delete' not in said
    Path('file').write_text('')
    assert main('--run', 'file', '--batch', 16) == 1


def test_what_is_not_finite_stops_the_run_is_named_and_not_saved(trained, monkeypatch):
    shutil.copytree(trained, 'a')
    before = Path('a/checkpoint.pt').read_bytes()

    def spoilt(mu, logvar, kl=betavae.kl_per_latent):
        return kl(mu, logvar) * torch.tensor([1, 1, math.nan])
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError) as stop:
        patch.setattr(betavae, 'kl_per_latent', spoilt)
        train(6)
    assert str(stop.value).startswith(
        'the loss, the KL of z2 is not finite at step 4; a/checkpoint.pt')
    assert Path('a/checkpoint.pt').read_bytes() == before
    step = torch.optim.Adam.step

    def spoil(self, *rest):
        step(self, *rest)
        self.state[self.param_groups[0]['params'][0]][what].fill_(math.inf)
    for what in ('exp_avg', 'exp_avg_sq'):
        with monkeypatch.context() as patch, pytest.raises(
                FloatingPointError, match='moment of Adam .*nothing was'):
            patch.setattr(torch.optim.Adam, 'step', spoil)
            train(1, run='b')
        assert not Path('b/checkpoint.pt').exists()


# Finished runs ----------------------------------------------------------

@pytest.fixture
def known(monkeypatch):
    """`--data toy` is the toy data, for training and comparing."""
    def load(source, crop=None):
        dataset = toy()
        dataset.source = 'toy'
        return dataset
    monkeypatch.setattr(data, 'load', load)
    monkeypatch.setattr(betavae, 'load_data', load)


def cells(path):
    """A Markdown table as rows of strings, without the dashes."""
    rows = [[cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]]
                        for line in Path(path).read_text().splitlines()]
    return [rows[0], *rows[2:]]


def test_compare_tables_scores_and_charts(known, capsys, monkeypatch):
    small = [
    '--latents',
    3,
    '--batch',
    16,
    '--precision',
    'fp32',
    '--steps',
    4,
    '--likelihood',
     'gaussian']
    for run, options in dict(a=['--seed', 0], b=['--seed', 1], c=['--beta', 50]).items():
        assert main('--run', f'runs/{run}', *small, *options) == 0
    runs = [f'runs/{run}' for run in 'abc']
    asked = []
    score = metrics.disentanglement_score
    monkeypatch.setattr(metrics, 'disentanglement_score', lambda encode, sizes,
                        **k: asked.append(k) or score(encode, sizes, **k))
    command = [
    'compare',
    *runs,
    '--pairs',
    '2,1',
    '--factors',
    2,
    '--train',
    60,
    '--chart',
    'beta:kl',
    '--chart',
     'kl:mig']
    assert main(*command) == 0
    summaries = [read(run, 'summary.json') for run in runs]
    scores = [read(run, 'scores.json') for run in runs]
    head, first, second = cells('runs/comparison.md')
    assert first[0] == 'β 1, latents 3, batch 16, 4 steps' and first[1] == '2' and second[1] == '1'
    for k, name in enumerate(head[2:6], 2):
        a, b, c = (summary[name.replace(' ', '_')] for summary in summaries)
        mean, low, high = (float(word) for word in re.findall(r'[\d.]+', first[k]))
        assert mean == pytest.approx((a + b) / 2, rel=1e-3) and (low,
                                     high) == pytest.approx((min(a, b), max(a, b)), rel=1e-3)
        assert float(second[k]) == pytest.approx(c, rel=1e-3)
    x = (toy().images(toy().train_index(np.arange(136))) / 255).reshape(136, -1)
    variances = np.linalg.eigvalsh(
        (x - x.mean(0)) @ (x - x.mean(0)).T / 136)     # of all training images
    above = [min(3, int((variances > beta / 2).sum())) for beta in (1, 1, 50)]
    assert len({*above}) > 1
    assert [summary['linear_latents'] for summary in summaries] == above
    assert first[8] == '; '.join(summary['top_latent'] for summary in summaries[:2])
    head, first, _ = cells('runs/factors.md')
    assert head[2:] == ['share of a', 'share of b'] and first[2].endswith('%)')
    head, first, _ = cells('runs/metric.md')
    names = [
    'accuracy_K2_L1_N60',
    'accuracy_K2_L1_N60_samples',
    'accuracy_K2_L2_N60',
     'accuracy_K2_L2_N60_samples']
    assert head[2:] == [name.replace('_', ' ') for name in names] == [
                                     n.replace('_', ' ') for n in scores[0]['scores']]
    assert float(first[2].split('%')[0]) == pytest.approx(
        50 * sum(s['scores'][names[0]] for s in scores[:2]), abs=0.06)
    # The metric itself: means of an encoder, by hand, with the seed of the run.
    plain = plain_of('runs/b')
    with torch.no_grad():
        mu, logvar = (part.numpy() for part in plain.encoder(
            torch.from_numpy(toy().images(np.arange(144))) / 255).split(3, 1))
    z = mu + np.exp(logvar / 2) * np.random.default_rng(1).standard_normal(mu.shape, np.float32)
    for codes, name in ((mu, names[2]), (z, names[3])):
        expected = score(
    lambda i,
    codes=codes: codes[i],
    (12,
    12),
    pairs=2,
    train=60,
    test=30,
     rng=np.random.default_rng(1))
        assert scores[1]['scores'][name] == pytest.approx(expected, abs=0.04)
    assert all(list(k['factors']) == [0, 1] and k['test'] == 30 for k in asked) and len(asked) == 12
    for name in ('comparison.jpg', 'spectrum.png', 'metric.png', 'beta-kl.png', 'kl-mig.png'):
        Image.open(f'runs/{name}').load()
    assert main(*command) == 0 and len(asked) == 12                     # nothing is computed twice
    capsys.readouterr()
    # published: tables, no pictures
    Path('runs/a/checkpoint.pt').unlink()
    assert main('compare', *runs) == 0 and 'no pictures' in capsys.readouterr().out
    assert main('compare', *runs, '--pairs', 5) == 2
    kept = read('runs/b/scores.json')
    Path('runs/b/scores.json').write_text(json.dumps(kept | dict(weights='others')))
    assert main('compare', 'runs/b', '--pairs', '1', '--train', 60) == 0 and len(asked) == 14


def test_the_last_factors_are_chosen(known, monkeypatch):
    chosen = []
    monkeypatch.setattr(metrics, 'disentanglement_score', lambda *a,
                        factors, **k: chosen.append(list(factors)) or 0.5)
    run = dict(
    folder=Path('a'),
    label='x',
    steps=1,
    weights='',
    seed=0,
    data='toy',
    crop=None,
     precision='fp32')
    three = data.Dataset('toy', (1, 64, 64), {'a': 3, 'b': 4, 'c': 12}, toy().draw)
    monkeypatch.setattr(betavae, 'dataset_of', lambda run: three)
    monkeypatch.setattr(betavae, 'encoders', lambda *_: {'': None, '_samples': None})
    Path('a').mkdir()
    betavae.score(run, [1], [2, 3], 100)
    assert chosen == [[1, 2], [0, 1, 2]]
    with pytest.raises(data.UserError, match='takes 2 to 3'):
        betavae.score(run, [1], [4], 100)


def test_runs_that_cannot_be_compared(known, capsys, monkeypatch):
    small = ['--latents', 3, '--batch', 16, '--precision', 'fp32', '--steps', 2, '--device', 'cpu']
    for run in 'ab':
        assert main('--run', run, *small) == 0
    capsys.readouterr()

    def refused(*words):
        assert main('compare', *words) == 2
        error = capsys.readouterr().err
        assert error.startswith('betavae: ') and error.count('\n') == 1
        return error
    assert 'differ in the seed' in refused('a', 'b')
    assert main('--run', 'g', *small, '--likelihood', 'gaussian', '--seed', 1) == 0
    capsys.readouterr()
    assert 'in no other option' in refused('a', 'g')
    assert 'no run has both' in refused('a', '--chart', 'beta:nothing')
    summary = read('b/summary.json')
    for change in (dict(label=3), dict(steps='2'), dict(dataset=[]), dict(kl='x'), dict(weights=None),
                   dict(steps=1), dict(beta=None), dict(crop=[]), dict(data=3), dict(top_latent={})):
        Path('b/summary.json').write_text(json.dumps(summary | change))
        refused('b')
    for content in ('{"beta": ', '[1]', 'null', '3'):
        Path('b/summary.json').write_text(content)
        refused('b')
    Path('b/summary.json').unlink()
    assert 'not a finished run' in refused('b') and 'not a finished run' in refused('nowhere')
    changed = toy()
    changed.draw = lambda index: 255 - toy().draw(index)
    monkeypatch.setattr(betavae, 'load_data', lambda *_: changed)
    assert 'other images' in refused('a', '--pairs', '1')
    monkeypatch.setattr(betavae, 'load_data', lambda *_: (_ for _ in ()
                        ).throw(data.UserError('gone')))
    assert 'new --data' in refused('a', '--pairs', '1')


def test_labels_tell_runs_apart_and_not_by_their_seed():
    def label(**options):
        s = betavae.settle(
    betavae.options(
        device='cpu',
        precision='fp32',
        **options),
         data.load('faces'))
        return betavae.describe(s), s.run
    assert label() == ('β 1', 'runs/faces-beta-1')
    assert label(seed=3) == ('β 1', 'runs/faces-beta-1-seed-3')
    assert label(
    beta=100,
    anneal=40000) == (
        'β 0 → 100 over 40,000',
         'runs/faces-beta-0-100-over-40000')
    assert label(tc=True, beta=6)[0] == 'TC β 6' and label(capacity=25)[0] == 'C 25, gamma 1000'
    assert label(
    latents=6,
    leak=0,
    batch=8,
    lr=1e-3,
     warmup=5)[0] == 'β 1, latents 6, leak 0, batch 8, lr 0.001, warmup 5'


def test_the_baselines_are_codes_of_the_images(monkeypatch, capsys):
    values = np.random.default_rng(0).integers(256, size=(144, 1, 64, 64), dtype=np.uint8)
    dataset = data.Dataset(
    'toy', (1, 64, 64), {
        'a': 12, 'b': 12}, lambda index: torch.from_numpy(values)[index])
    dataset.source = 'dsprites'
    every, drawn = np.arange(144), []

    def projection(x, rng=None):                    # those of PCA and ICA are tested below
        drawn.append(x)
        return x.mean(0), np.eye(4096)[:, :10]
    monkeypatch.setattr(metrics, 'pca', projection)
    monkeypatch.setattr(metrics, 'fast_ica', projection)
    codes = {
    label: betavae.baseline(
        label,
        dataset,
         np.random.default_rng(0))(every) for label in betavae.BASELINES}
    np.testing.assert_allclose(codes['ground truth'][143], [11 / 12, 11 / 12])
    np.testing.assert_allclose(codes['raw pixels'], values.reshape(144, -1) / 255, rtol=1e-6)
    for label, x in zip(('PCA', 'ICA'), drawn, strict=True):
        assert x.shape == (10000, 4096)
        np.testing.assert_allclose(
    codes[label],
    (codes['raw pixels'] -
    x.mean(0))[
        :,
        :10],
         atol=1e-6)
    assert codes['untrained'].shape == (144, 10) and codes['untrained'].std(0).min() > 0
    monkeypatch.setattr(betavae, 'load_data', lambda *_: dataset)
    assert main('compare', '--baselines', 1, '--pairs', 1, '--train', 40, '--out', 'out') == 0
    assert [row[0] for row in cells('out/metric.md')[1:]] == list(betavae.BASELINES)


# The command line and the script ----------------------------------------

BAD_OPTIONS = """
    --beta -1 | --beta nan | --beta inf | --beta four | --beta | --beta-from 3 | --anneal 1.5
    --latents 0 | --latents 513 | --batch 0 | --steps 0 | --steps 10000000000 | --lr 0 | --seed -1
    --warmup -1 | --seed 4294967296 | --crop 0 | --crop 128 | --data nowhere | --leak 1.5
    --data dsprites --crop 64 | --likelihood poisson | --device tpu | --device cuda | --bet 3
    --precision fp8 | --tc --batch 1 | --tc --capacity 5 | --capacity nan | --capacity 5 --beta 2
    --capacity 5 --beta-from 1 --anneal 9 | --gamma 5 | surplus | score | compare
    compare nowhere | compare --pairs 0 | compare nowhere --pairs x | compare nowhere --train 1
    compare nowhere --chart beta | compare --baselines 1 --factors 6 --pairs 1
    compare --baselines -1 | --beta=-- | --data=--"""


@pytest.mark.parametrize('words', [o.strip() for line in BAD_OPTIONS.split('\n')
                         for o in line.split('|') if o.strip()])
def test_bad_options_end_in_one_line(words, capsys):
    if 'cuda' in words and torch.cuda.is_available():
        pytest.skip('there is one here')
    assert main(*words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith('betavae: ') and error.count(
        '\n') == 1 and not Path('runs', 'faces-beta-1').exists()


@pytest.mark.parametrize(
    'options', [
        dict(
            colour='red'), dict(
                beta='x'), dict(
                    help=True), dict(
                        run=None, steps=0)], ids=str)
def test_bad_options_from_python(options):
    with pytest.raises(data.UserError):
        betavae.options(**options)


def test_help_starts_with_the_main_command(capsys):
    assert main('--help') == 0
    out = capsys.readouterr().out
    assert 'python betavae.py --beta 100 --anneal 40000' in out and 'compare --help' in out
    assert main('compare', '--help') == 0


def test_targets_that_are_not_reached_are_announced(capsys):
    train(1, beta=4, anneal=9, warmup=7)
    error = capsys.readouterr().err
    assert error.count('will not reach its target') == 2
    assert '9 steps, not 1' in error and '7 steps, not 1' in error


@pytest.mark.parametrize('shell', ['> /dev/full', '| head -1', '>&- 2>&-'])
def test_output_that_cannot_be_written_costs_no_run(shell):
    script = (f'cd {HERE}; PYTHONIOENCODING=ascii {sys.executable} -c "import test_betavae as t; '
              f't.train(3, run={str(Path("a").absolute())!r})" {shell}')
    done = subprocess.run(['bash', '-o', 'pipefail', '-c', script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == '' and state()['step'] == 3


def test_run_all_prints_the_eight_runs_and_refuses_once():
    def script(*words):
        return subprocess.run([HERE / 'run_all.sh', *words], capture_output=True, text=True,
                              env=os.environ | dict(PYTHON=sys.executable))
    lines = script('--seed', '7', '--print').stdout.splitlines()
    runs = [betavae.options(*shlex.split(line)[2:]) for line in lines]
    assert [(Path(s.run).name, s.beta_from, s.beta, s.anneal, s.steps, s.seed) for s in runs] == [
        ('VAE', None, 1, 0, 50000, 7), ('10-Beta-VAE', None, 10, 0, 50000, 7),
        ('100-Beta-VAE', None, 100, 0, 50000, 7),
        ('1000-Beta-VAE', None, 1000, 0, 50000, 7), ('10000-Beta-VAE', None, 10000, 0, 50000, 7),
        ('KLD_Anneal_40000_steps-10-Beta-VAE', None, 10, 40000, 50000, 7),
        ('KLD_Decrease_40000_steps-100to1-Beta-VAE', 100, 1, 40000, 50000, 7),
        ('KLD_Decrease_100000_steps-10000to1-Beta-VAE', 10000, 1, 100000, 125000, 7)]
    for group in ('short', 'beta250', 'latents6', 'dsprites', 'capacity'):
        for line in script('--print', group).stdout.splitlines():
            betavae.options(*shlex.split(line)[2:])
    assert script('--help').stdout.startswith('Trains the runs')
    typo = script('dsprite')
    assert typo.returncode == 2 and typo.stderr.count('\n') == 1 and typo.stdout == ''
    wrong = script('--betta', '3')
    assert wrong.returncode == 2 and wrong.stderr.count('\n') == 1


def test_run_all_passes_signals_on_at_once():
    process = subprocess.Popen([HERE / 'run_all.sh',
    '--data',
    'dsprites',
    '--batch',
    '4',
    '--latents',
    '2'],
    stdout=subprocess.PIPE,
    text=True,
     env=os.environ | dict(PYTHON=sys.executable))
    for line in process.stdout:
        if line.startswith('step'):
            process.terminate()
    assert process.wait() == 130 and state('runs/VAE')['step'] < 50000


# The pages --------------------------------------------------------------

PAGES = ('README.md', 'results/README.md')


def blocks(page, language):
    return re.findall(rf'^```{language}\n(.*?)^```', (HERE / page).read_text(), re.M | re.S)


def test_the_snippets_of_the_pages_run():
    for page in PAGES:
        names = {}
        for block in blocks(page, 'python'):
            for long, brief in (('steps=1000', 'steps=2'), ('range(200)', 'range(2)'),
                                ('range(45)', 'range(1)'), ('pairs=20', 'pairs=1'),
                                ('train=1000, test=500', 'train=50, test=20')):
                block = block.replace(long, brief)
            exec(block, names)
    assert Path('linear.jpg').exists() and Path(
        'faces.png').exists() and Path('runs/own/traversal.jpg').exists()


def test_the_commands_of_the_pages_parse_and_three_of_them_run(monkeypatch):
    monkeypatch.setattr(betavae.Run, 'draw', lambda *_, **__: dict(collapsed=False))
    lines = [
    line for page in PAGES for line in [
        *
        ''.join(
            blocks(
                page,
                'sh')).splitlines(),
                *
                re.findall(
                    '`([^`]+)`',
                    (HERE /
                    page).read_text().replace(
                        '\n',
                         ' '))]]
    commands = [shlex.split(line)[2:] for line in lines if line.startswith(
        'python betavae.py') and '…' not in line]
    training = [words for words in commands if not {'compare', 'photos.zip', 'S'} & {*words}]
    for words in commands:
        if words[:1] == ['compare']:
            betavae.compare_parser().parse_args(words[1:])
        elif 'S' not in words:
            betavae.options(*words)
    for line in lines:
        if line.startswith('./run_all.sh'):
            assert subprocess.run([HERE / 'run_all.sh', '--print', * \
                                  shlex.split(line)[1:]], capture_output=True).returncode == 0
    for k in range(3):
        assert main(*training[k], '--steps', 5, '--run', k, '--batch', 8) == 0


def test_what_an_attack_found(trained, capsys):
    """A run in a thread; a flipped bit; another run's checkpoint; β = 0; help on an ASCII terminal."""
    failed = []

    def in_a_thread():
        try:
            train(2, run='thread')
        except BaseException as error:                                  # noqa: B902
            failed.append(error)
    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert not failed and state('thread')['step'] == 2

    shutil.copytree(trained, 'a')
    content = bytearray(Path('a/checkpoint.pt').read_bytes())
    content[len(content) // 2] ^= 1
    Path('a/checkpoint.pt').write_bytes(content)
    with pytest.raises(data.UserError, match='damaged'):
        betavae.load('a')
    shutil.copy('thread/checkpoint.pt', 'a/checkpoint.pt')
    assert main('compare', 'a') == 2 and 'without a summary' in capsys.readouterr().err

    shutil.rmtree('a')
    shutil.copytree(trained, 'a')
    kept = state()
    kept['model']['posterior.bias'].fill_(-60)
    torch.save(kept, 'a/checkpoint.pt')
    train(3)                                                            # draws, and says its figures
    assert read('a/summary.json')['steps'] == 3
    done = subprocess.run([sys.executable, HERE / 'betavae.py', '--help'], capture_output=True,
                          env=os.environ | dict(PYTHONIOENCODING='ascii'))
    assert done.returncode == 0 and b'the weight of the KL term' in done.stdout


# The data sets ------------------------------------------------------------------------------------

def numbered(index):
    """64 × 64 pixels of the value index mod 256."""
    return (index % 256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 64, 64)


def test_images_by_index_and_errors_that_say_what_was_expected():
    own = data.Dataset('own/β', (1, 64, 64), {'a': 20, 'b': np.int64(20)}, numbered)
    assert len(own) == 400 and own.factors == {'a': 20, 'b': 20} and own.factor_sizes == (20, 20)
    index = np.random.default_rng(0).integers(400, size=300)                    # more than a part
    for given in (index, list(index), index[::-1][::-1], index.astype(np.uint16)):
        x = own.images(given)
        assert x.dtype == np.uint8 and (x == (index % 256)[:, None, None, None]).all()
    x = own.images(torch.from_numpy(index).int())
    assert torch.is_tensor(x) and torch.equal(x[:, 0, 5, 5].long(), torch.from_numpy(index % 256))
    assert own.images([]).shape == (0, 1, 64, 64)
    for bad in (3, [1.0], [True], ['a'], None, [[0]], torch.tensor(3), torch.ones(2)):
        with pytest.raises(TypeError, match='are integers .n,.'):
            own.images(bad)
    for bad in ([400], [0, -1], torch.tensor([400]), np.array([2 ** 64 - 1], np.uint64)):
        with pytest.raises(IndexError, match='0 to 399'):
            own.images(bad)


def test_a_data_set_that_contradicts_itself_or_its_draw_is_refused():
    square, two = (1, 64, 64), {'a': 2}
    for shape, factors, size, word in (
            ((1, 32, 32), two, None, 'shape'), ((4, 64, 64), two, None, 'shape'),
            (square, {}, None, 'integer'), (square, {'a': 2.5}, None, 'integer'),
            (square, two, 3, 'make 3'), (square, {'a': 0}, None, 'make'), (square, {}, 0, 'make')):
        with pytest.raises((ValueError, TypeError), match=word):
            data.Dataset('own', shape, factors, numbered, size)
    for wrong in (lambda x: x.float(), lambda x: x[:1], lambda x: x.numpy(), lambda x: x[:, 0]):
        own = data.Dataset('own', square, {'a': 9}, lambda index: wrong(numbered(index)))
        with pytest.raises(TypeError, match=r'uint8 tensor of shape \(3, 1, 64, 64\)'):
            own.images([0, 1, 2])


def test_identity_changes_with_all_that_matters():
    def identity(name='own', factors=None, draw=numbered):
        return data.Dataset(name, (1, 64, 64), factors or {'a': 20, 'b': 3}, draw).identity()
    assert identity() == identity() == json.loads(json.dumps(identity()))
    assert identity('moved') == identity()
    changed = [identity(factors={'b': 3, 'a': 20}), identity(factors={'a': 60}),
               identity(draw=lambda i: 255 - numbered(i)),
               identity(draw=lambda i: numbered(i) + (i == 59).byte().view(-1, 1, 1, 1))]
    assert all(other != identity() for other in changed)
    assert changed[0]['sha256'] != identity()['sha256']         # dictionaries have no order


def test_held_out_and_training_parts_are_apart():
    for n in (2, 18, 19, 20, 39, 1000):
        d = data.Dataset('toy', (1, 64, 64), {}, None, size=n)
        trained, held = set(d.train_index(np.arange(d.train_size))), set(d.held_out(10 ** 6))
        assert not trained & held and trained | held == set(range(n)) and held
        assert len(held) == math.ceil(n / 19)
    assert len(set(d.held_out(20))) == 20 and np.array_equal(d.held_out(20), d.held_out(20))


def test_dsprites_are_where_and_what_the_factors_say():
    """The area and the middle of square and ellipse against the known geometry, in C order."""
    d = data.load('dsprites')
    for v in [(0, 5, 0, 0, 0), (0, 0, 0, 31, 0), (1, 3, 0, 10, 20), (1, 5, 7, 31, 31)]:
        image = d.images([np.ravel_multi_index(v, d.factor_sizes)])[0, 0]
        assert set(np.unique(image)) == {0, 255}
        middle = np.argwhere(image).mean(0) + 0.5                               # y, x
        np.testing.assert_allclose(middle, 16 + 32 / 31 * np.array([v[4], v[3]]), atol=0.2)
        area = [19.2 ** 2, math.pi * 12.8 * 7.2][v[0]] * (0.5 + 0.1 * v[1]) ** 2
        assert (image > 0).sum() == pytest.approx(area, rel=0.1)
    assert list(d.factors) == ['shape', 'scale', 'orientation', 'x position', 'y position']
    assert np.array_equal(d.images([0]), d.images([39 * 1024]))         # orientation 39 is 0


# Where 160 genuine frames (the animation in DeepMind's repository) stand among the drawn images,
# and the frames' checksum.
FRAMES = """
491520 573440 655360 696320 614400 532480 491520 573440 655360 696320 734208 732160 730112 728064
726016 723968 721920 719872 717824 715776 713728 711680 709632 707584 705536 703488 701440 699392
697344 696320 696322 696324 696326 696328 696330 696332 696334 696336 696338 696340 696342 696344
696346 696348 696350 696351 696415 696479 696543 696607 696671 696735 696799 696863 696927 696991
697055 697119 697183 697247 697311 697343 697341 697339 697337 697335 697333 697331 697329 697327
697325 697323 697321 697319 697317 697315 697313 697312 697248 697184 697120 697056 696992 696928
696864 696800 696736 696672 696608 696544 696480 696416 696352 696320 614400 532480 245760 327680
409600 450560 368640 286720 245760 327680 409600 450560 488448 486400 484352 482304 480256 478208
476160 474112 472064 470016 467968 465920 463872 461824 459776 457728 455680 453632 451584 450560
368640 286720 0 81920 163840 204800 122880 40960 0 81920 163840 204800 242688 240640 238592 236544
234496 232448 230400 228352 226304 224256 222208 220160 218112 216064 214016 211968 209920 207872
205824 204800 122880 40960
"""
FRAMES_SHA256 = '75dc01cf48e3748a94cbfc8648dd7dc88714001901eeaa334b091b570a8579c9'


def test_drawn_dsprites_equal_160_genuine_frames_bit_for_bit():
    images = data.load('dsprites').images([int(i) for i in FRAMES.split()])
    assert hashlib.sha256(np.packbits(images > 0).tobytes()).hexdigest() == FRAMES_SHA256


@pytest.mark.skipif('DSPRITES_NPZ' not in os.environ,
                    reason='the variable DSPRITES_NPZ does not name the official file')
def test_drawn_dsprites_equal_all_737280_of_the_official_file_bit_for_bit():
    assert np.array_equal(data.read_dsprites(os.environ['DSPRITES_NPZ']), data.draw_dsprites())


def test_the_official_file_loads_through_the_same_interface(monkeypatch):
    monkeypatch.setattr(data, 'DSPRITES', dict(data.DSPRITES, shape=1, scale=1, orientation=5))
    drawn = data.Dataset.images(data.load('dsprites'), np.arange(5120))         # more than a block
    np.savez_compressed('official.npz', imgs=drawn[:, 0] // 255, metadata=np.array([None]))
    official = data.load('official.npz')
    assert np.array_equal(official.images(np.arange(5120)), drawn)
    assert official.factor_sizes == (1, 1, 5, 32, 32)
    assert official.identity() == dict(official.identity(), size=5120)
    Path('cut.npz').write_bytes(Path('official.npz').read_bytes()[:3000])
    np.savez('other.npz', imgs=np.zeros((5, 64, 64), np.uint8))
    np.savez('foreign.npz', x=np.zeros(3))
    np.savez('fortran.npz', imgs=np.asfortranarray(drawn[:, 0] // 255))
    for name in ('cut.npz', 'other.npz', 'foreign.npz', 'fortran.npz'):
        with pytest.raises(data.UserError, match=f'{name} is not dSprites'):
            data.load(name)
    with pytest.raises(data.UserError, match='--crop is for your own'):
        data.load('official.npz', crop=64)


def test_each_step_of_each_factor_changes_the_face_and_nothing_else_does():
    d, rng = data.load('faces'), np.random.default_rng(0)
    for k, size in enumerate(d.factor_sizes):
        v = rng.integers(d.factor_sizes, size=(20, 1, len(d.factor_sizes))).repeat(size, axis=1)
        v[:, :, k] = np.arange(size)
        x = d.images(np.ravel_multi_index(tuple(v.reshape(-1, v.shape[2]).T), d.factor_sizes))
        change = np.abs(np.diff(x.reshape(20, size, -1).astype(int), axis=1))
        assert change.max(2).min() >= 6, d.factor_names[k]              # of 255: it can be seen
    index = rng.integers(len(d), size=500)              # an image depends on its index alone
    np.testing.assert_array_equal(d.images(index)[::7], d.images(index[::7]))


def test_the_faces_are_those_of_the_results():
    """Weighted sums over fixed faces, within what another processor may round differently."""
    d, rng = data.load('faces'), np.random.default_rng(0)
    x = d.images(rng.integers(len(d), size=400)).astype(int)
    sums = [int((x * rng.integers(-9, 10, size=x.shape)).sum()) for _ in range(2)]
    assert sums == pytest.approx([1177398, 544529], abs=1000)
    v = np.array(d.factor_sizes) // 2                   # and by the definition of the first factor
    dark, light = (d.images([np.ravel_multi_index((n, *v[1:]), d.factor_sizes)]) for n in (0, 11))
    np.testing.assert_allclose((light - dark)[0, :, 0, 0] / 255, [0.78, 0.64, 0.36], atol=0.005)


def test_faces_have_the_variances_that_the_betas_of_the_readme_ask_for():
    """λ_i > β/2 decides what is worth a latent: none at β = 1000, a few at 100, about ten at 10."""
    d = data.load('faces')
    x = d.images(np.random.default_rng(0).integers(len(d), size=1500)).reshape(1500, -1)
    x = x / np.float32(255) - (x / np.float32(255)).mean(0)
    eigenvalues = np.linalg.eigvalsh(x @ x.T / len(x))
    assert eigenvalues[-1] == pytest.approx(230, abs=10)
    assert 2 <= (eigenvalues > 50).sum() <= 4 and 7 <= (eigenvalues > 5).sum() <= 12


# Your own images ----------------------------------------------------------------------------------

def save(name, mode='RGB', colour=(200, 100, 50), size=(64, 64), **options):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(name, **options)


def zipped(name, *files):
    with zipfile.ZipFile(name, 'w') as archive:
        for file in files:
            archive.write(file)
    return bytearray(Path(name).read_bytes())


def test_a_folder_and_a_zip_of_images(monkeypatch, tmp_path):
    folder = Path('pictures, x**y [β\n]/deep')                                  # odd, and allowed
    for k in range(30):
        save(folder / f'{k:02}.PNG', colour=(k * 8, 0, 255 - k * 8), size=(100, 80))
    save(folder / '.hidden.png')
    save(folder / '../.git/a.png')
    (folder / 'notes.txt').write_text('no')
    os.mkfifo(folder / 'pipe.png')
    d = data.load(folder.parent)
    assert (len(d), d.name, d.factors) == (30, folder.parent.name, {})
    assert d.images([7])[0, :, 5, 5].tolist() == [56, 0, 199]
    monkeypatch.setattr(data, 'decode', None)           # from elsewhere it is not decoded again
    monkeypatch.chdir('/')
    assert np.array_equal(data.load(tmp_path / folder.parent).images([7]), d.images([7]))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile('p.zip', 'w') as archive, pytest.warns(UserWarning, match='Duplicate'):
        for file in sorted(folder.glob('[0-9]*')):
            archive.write(file, file.name)
        archive.write(folder / '.hidden.png')
        archive.write(folder / '07.PNG', '__MACOSX/07.PNG')
        archive.write(folder / '29.PNG', '07.PNG')                      # the last one counts
    z = data.load('p.zip', crop=64)
    index = np.arange(30)
    assert np.array_equal(z.images(index), d.images(np.where(index == 7, 29, index)))


def test_every_kind_of_picture_comes_out_right():
    """The colour that a person sees, to within JPEG's and CMYK's rounding."""
    save('p/a.png')
    save('p/b.jpg', quality=95)
    save('p/c.png', 'L', 100)
    save('p/d.png', 'RGBA', (200, 100, 50, 0))                                  # transparent: white
    save('p/e.jpg', 'CMYK', (0, 128, 255, 0))
    Image.fromarray(np.full((64, 64), 257 * 77, np.uint16)).save('p/f.png')     # 16 bits
    Image.fromarray(np.full((64, 64), 257 * 77, np.uint16)).save('p/g.tif')
    Image.new('RGB', (64, 64), (10, 20, 200)).quantize(4).save('p/h.gif')
    save('p/i.webp', lossless=True)
    save('p/j.bmp')
    save('p/k.ppm')
    turned = Image.new('RGB', (64, 128), 'black')
    turned.paste('white', (0, 0, 64, 64))                                       # white above …
    exif = turned.getexif()
    exif[0x0112] = 6                                    # … shown turned right by 90°: white right
    turned.save('p/z.png', exif=exif)
    x = data.load('p').images(np.arange(12))
    usual = (200, 100, 50)
    expected = [usual, usual, (100,) * 3, (255,) * 3, (255, 127, 0), (77,) * 3, (77,) * 3,
                (10, 20, 200), usual, usual, usual]
    for image, colour in zip(x, expected):
        assert np.abs(image[:, 30, 30].astype(int) - colour).max() <= 3, colour
    assert x[11, 0, 32, 60] == 255 and x[11, 0, 32, 3] == 0
    wide = Image.new('RGB', (200, 100), 'black')        # the centred square: 100, or --crop
    wide.paste('white', (75, 25, 125, 75))
    wide.save('wide.png')
    assert data.decode(Path('wide.png').read_bytes(), 40).min() == 255
    assert data.decode(Path('wide.png').read_bytes(), None).mean() == pytest.approx(255 / 4, abs=2)


def test_a_cache_is_complete_or_made_again(monkeypatch):
    for k in range(20):
        save(f'p/{k:02}.png', colour=(k, k, k))
    d = data.load('p')
    first = d.images(np.arange(20))
    assert (first == np.arange(20)[:, None, None, None]).all()
    cache, = Path('home/betavae').iterdir()
    whole = cache.read_bytes()
    for broken in (whole[:-12288], whole[:50], b''):                            # 12288: one image
        cache.write_bytes(broken)
        with pytest.raises(data.UserError, match='changed while in use .*start again'):
            d.images([19])
        assert np.array_equal(data.load('p').images(np.arange(20)), first)
        assert cache.read_bytes() == whole
    abandoned, fresh = (Path(f'home/betavae/x.npy.{n * 8}.partial') for n in 'ab')
    abandoned.write_bytes(b'')
    fresh.write_bytes(b'')
    os.utime(abandoned, (0, time.time() - 7200))                                # left by a kill

    def killed(*_):
        raise KeyboardInterrupt
    save('p/20.png')                                    # a changed source, and Ctrl-C half-way
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, 'decode', killed)
        data.load('p')
    assert set(Path('home/betavae').iterdir()) == {cache, fresh}
    assert len(data.load('p')) == 21 and len(data.load('p', crop=32)) == 21
    assert len(list(Path('home/betavae').iterdir())) == 4
    os.utime('p/20.png', (0, 0))                        # the same size, another time
    assert len(data.load('p')) == 21 and len(list(Path('home/betavae').iterdir())) == 5
    abandoned.write_bytes(b'')
    os.utime(abandoned, (0, time.time() - 7200))
    assert len(data.load('p')) == 21 and not abandoned.exists()                 # decoding or not


def bad_sources():
    """Every input that cannot be loaded, and a word of what is said of it."""
    for name in ('empty', 'texts', 'bomb', 'postscript', 'iptc', 'float', 'whole', 'twelve'):
        Path(name).mkdir()
    Path('texts/a.txt').write_text('no picture')
    Path('note.txt').write_text('no picture')
    os.mkfifo('pipe.zip')
    os.mkfifo('pipe.npz')
    for k in range(10):
        save(f'broken/{k}.jpg')
    jpeg = Path('broken/0.jpg').read_bytes()
    Path('broken/5.jpg').write_bytes(jpeg[:400])
    save('small\nimages/a.png', size=(50, 50))
    bomb = bytearray(jpeg)
    start = bomb.index(b'\xff\xc0') + 5
    bomb[start:start + 4] = b'\xff\xff\xff\xff'                 # 65,535 × 65,535 pixels
    Path('bomb/a.jpg').write_bytes(bomb)
    program = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit'
    Path('postscript/a.jpg').write_bytes(program)
    Path('iptc/a.jpg').write_bytes(b''.join(                    # a record, its content
        bytes([0x1c, *key, 0, len(content)]) + content for key, content in (
            ((3, 20), b'\0\x09'), ((3, 30), b'\0\x09'), ((3, 60), b'\1\0'), ((3, 120), b'\5'),
            ((8, 10), program))))
    Image.fromarray(np.full((64, 64), 0.5, np.float32)).save('float/a.tif')
    Image.fromarray(np.full((64, 64), 1 << 30, np.int32)).save('whole/a.tif')
    Image.fromarray(np.full((64, 64), 999, np.uint16)).save('twelve/a.tif')
    content = Path('twelve/a.tif').read_bytes()
    bits = b'\2\1\3\0\1\0\0\0'                                              # 1 short: bits a pixel
    Path('twelve/a.tif').write_bytes(content.replace(bits + b'\x10', bits + b'\x0c'))
    content = zipped('damaged.zip', 'broken/0.jpg')
    content[100] ^= 255                                                         # a wrong checksum
    Path('damaged.zip').write_bytes(content)
    content = zipped('locked.zip', 'broken/0.jpg')
    content[6] |= 1
    content[content.index(b'PK\x01\x02') + 8] |= 1              # a flag: encrypted
    Path('locked.zip').write_bytes(content)
    Path('cut.zip').write_bytes(content[:200])
    content = zipped('newer.zip', 'broken/0.jpg')
    content[content.index(b'PK\x01\x02') + 6] = 99                              # needs version 9.9
    Path('newer.zip').write_bytes(content)
    content = zipped('name.zip', 'broken/0.jpg')
    start = content.index(b'PK\x01\x02')
    content[start + 9] |= 8                                                     # UTF-8, says a flag
    content[start + 46] = 255
    Path('name.zip').write_bytes(content)
    return {'nowhere': 'does not exist', '': 'does not exist', 'nowhere.zip': 'does not exist',
            'nowhere.npz': 'does not exist', 'a\0b': 'does not exist', 'x' * 300: 'does not exist',
            'empty': 'no images', 'texts': 'no images', 'note.txt': 'not a complete .zip',
            '/dev/zero': 'not a complete .zip', 'pipe.zip': 'not a complete .zip',
            'pipe.npz': 'not a complete .zip', 'cut.zip': 'not a complete .zip',
            'broken': '5.jpg (Truncated File Read)', 'bomb': 'a.jpg (Image size', 
            'small\nimages': 'a.png is 50 × 50, smaller than --crop 64',
            'postscript': 'a.jpg (cannot identify image file)', 'iptc': 'a.jpg (cannot identify',
            'float': 'a.tif (not of 8 or 16', 'whole': 'a.tif (not of 8 or 16', 'twelve': 'a.tif (',
            'damaged.zip': '0.jpg (Bad CRC', 'locked.zip': 'encrypted: unpack it',
            'newer.zip': 'is not a .zip that can be', 'name.zip': 'is not a .zip that can be'}


def test_bad_sources_are_named_in_one_line_and_leave_nothing(capsys):
    for source, word in bad_sources().items():
        with pytest.raises(data.UserError) as error:
            data.load(source, crop=64 if 'small' in source else None)
        assert word in str(error.value) and '\n' not in str(error.value), error
        assert not list(Path('home').glob('*/*')) and 'BytesIO' not in str(error.value)
    assert Image.open('iptc/a.jpg').format == 'IPTC'                            # Pillow would


def test_a_folder_that_cannot_be_read_is_not_left_out_in_silence(monkeypatch):
    save('p/a.png')
    save('p/secret/b.png')

    def scandir(path, real=os.scandir):
        if str(path).endswith('secret'):
            raise PermissionError(13, 'Permission denied', str(path))
        return real(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(data.UserError, match='secret cannot be read .Permission denied'):
        data.load('p')


def test_one_bad_image_in_a_hundred_is_skipped_and_three_are_named(capsys):
    for k in range(500):
        Path('p').mkdir(exist_ok=True)
        grey = b'P5 4 4 255\n' + bytes([k % 256] * 16)
        Path(f'p/{k:03}.pgm').write_bytes(grey if k % 100 else b'no')
    d = data.load('p')
    error = capsys.readouterr().err
    assert len(d) == 495 and '000.pgm' in error and error.count('cannot identify image file)') == 3
    assert error.count('\n') == 4 and '495 of 500 images decoded' in error
    assert d.images([0, 494])[:, 0, 9, 9].tolist() == [1, 499 % 256]
    for k in (77, 78):
        Path(f'p/{k:03}.pgm').write_bytes(b'no')
    with pytest.raises(data.UserError, match='over 1 %'):
        data.load('p')


def test_no_room_or_no_place_for_the_cache(monkeypatch):
    save('p/a.png')
    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, 'disk_usage', lambda path: type('', (), dict(free=0)))
        with pytest.raises(data.UserError, match='no room: .*XDG_CACHE_HOME'):
            data.load('p')
    assert not any(Path('home/betavae').iterdir())
    Path('file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', 'file')
    with pytest.raises(data.UserError, match='no place for a cache .*file'):
        data.load('p')


# Files and progress -------------------------------------------------------------------------------

def test_write_replaces_a_file_whatever_happens(monkeypatch):
    path = Path('a [b] **.txt')
    data.write(path, b'old')
    data.write(path, lambda file: file.write(b'new'))
    assert path.read_bytes() == b'new'
    for what, error in (('fsync', KeyboardInterrupt), ('fsync', OSError(28, 'No space left')),
                        ('replace', OSError(13, 'Permission denied'))):
        def fail(*_):
            raise error
        with monkeypatch.context() as patch, pytest.raises((OSError, KeyboardInterrupt)) as caught:
            patch.setattr(data.os, what, fail)
            data.write(path, b'lost')
        assert getattr(caught.value, 'filename', str(path)) == str(path)
        assert path.read_bytes() == b'new' and list(Path().iterdir()) == [path]
    with pytest.raises(FileNotFoundError) as caught:
        data.write('nowhere/a', b'')
    assert caught.value.filename == 'nowhere/a'
    calls = []
    monkeypatch.setattr(data.os, 'fsync', lambda file: calls.append(Path().glob('*.partial')))
    monkeypatch.setattr(data.os, 'urandom', lambda n: b'\0' * n)        # as if it were guessed
    Path('other').write_text('precious')
    Path('a [b] **.txt.00000000.partial').symlink_to('other')
    with pytest.raises(FileExistsError):
        data.write(path, b'evil')
    assert Path('other').read_text() == 'precious' and path.read_bytes() == b'new' and not calls


# Without torch, whose import takes seconds: neither writing nor printing needs it.
ALONE = """import sys, time, types
sys.modules["torch"] = types.ModuleType("torch")
sys.path.insert(0, sys.argv[1])
import data
"""


def test_two_writers_never_mix():
    """Two processes hammer one file with unlike content: it is always the one or the other."""
    program = ALONE + 'for _ in range(60): data.write("f", sys.argv[2].encode() * 10 ** 5)'
    writers = [subprocess.Popen([sys.executable, '-c', program, HERE, letter]) for letter in 'ab']
    found = set()
    while any(writer.poll() is None for writer in writers):
        if Path('f').exists():
            content = Path('f').read_bytes()
            assert content in (b'a' * 10 ** 5, b'b' * 10 ** 5)
            found.add(content[0])
    assert [writer.wait() for writer in writers] == [0, 0] and list(Path().iterdir()) == [Path('f')]


@pytest.mark.parametrize('shell, printed', [
    ('"$@"', b'? 0\n? 1\n'), ('"$@" >&-', b''), ('"$@" > /dev/full', b''),
    ('"$@" | head -c 1', b'?'), ('"$@" 2>&-', b'? 0\n? 1\n'), ('"$@" 2> /dev/full', b'? 0\n? 1\n')])
def test_what_cannot_be_printed_stops_nothing(shell, printed):
    """An ASCII terminal, a closed output, a full one, a cut pipe: status 0, no complaint."""
    program = ALONE + """
for k in range(2):
    data.say(f"β {k}")
    data.say(" ", file=sys.stderr, end="")
    time.sleep(0.05)
data.write("end", b"")
"""
    command = ['bash', '-o', 'pipefail', '-c', shell, '-', sys.executable, '-c', program, HERE]
    ascii_only = dict(os.environ, PYTHONIOENCODING='ascii')
    result = subprocess.run(command, env=ascii_only, capture_output=True)
    assert (result.returncode, Path('end').exists(), result.stderr.strip()) == (0, True, b'')
    assert result.stdout.replace(b' ', b'') == printed.replace(b' ', b'')


def test_a_table_is_markdown_and_is_printed(capsys):
    data.write_table('t.md', [['run', 'β'], ['a|b\nc', '4'], ['d', '']])
    assert Path('t.md').read_text() == '| run | β |\n| --- | --- |\n| a\\|b c | 4 |\n| d |  |\n'
    assert capsys.readouterr().out == Path('t.md').read_text()
    assert str(data.UserError('a\nb \x1b[1m\udc80c')) == 'a b [1m c'


# Pictures -----------------------------------------------------------------------------------------

def pixels_of(picture, colour, near=0):
    """Where a picture has a colour, or nearly: rows (x, y)."""
    away = np.abs(np.asarray(picture).astype(int) - ImageColor.getrgb(colour)).max(2)
    return np.argwhere(away <= near)[:, ::-1]


def test_a_sheet_shows_every_image_in_its_place():
    images = np.random.default_rng(0).integers(256, size=(2, 3, 3, 64, 64), dtype=np.uint8)
    plain = data.sheet(torch.from_numpy(images), scale=1)
    assert plain.size == (3 * 66, 2 * 66)
    for row, column in np.ndindex(2, 3):
        tile = np.asarray(plain)[66 * row + 1:66 * row + 65, 66 * column + 1:66 * column + 65]
        assert np.array_equal(tile.transpose(2, 0, 1), images[row, column])
    grey = np.asarray(data.sheet(images[:, :, :1], scale=1))
    assert (grey[1:65, 1:65] == images[0, 0, 0, :, :, None]).all()
    labels = ['β', 'two\nlines ' * 9]
    full = data.sheet(images, labels, 'title ' * 40, ['a note', '\udc80'], scale=1)
    body = np.asarray(full)[:, -3 * 66:]                        # labels stand left of the images …
    top = next(y for y in range(full.height) if np.array_equal(body[y:y + 132], np.asarray(plain)))
    assert 40 < top < full.height - 132 - 30                    # … title above, notes below
    assert (np.asarray(full)[top:top + 66, :-3 * 66] < 100).any()
    assert data.sheet(images).width == 3 * 130                  # twice as large, if that fits
    assert data.sheet(np.tile(images, (1, 8, 1, 1, 1))).width <= 900


@pytest.mark.parametrize('low, high, log, labels', [
    (0, 10, False, '0 2 4 6 8 10'), (0.09, 0.36, False, '0.1 0.15 0.2 0.25 0.3 0.35'),
    (-1, 1, False, '-1 -0.5 0 0.5 1'), (0, 5e4, False, '0 10,000 20,000 30,000 40,000 50,000'),
    (0, 2.2e12, False, '0 5e+11 1e+12 1.5e+12 2e+12'), (-2, 3, True, '0.01 0.1 1 10 100 1,000'),
    (0, 2.31, True, '1 2 5 10 20 50 100 200'),
    (-300, 12, True, '1e-300 1e-248 1e-196 1e-144 1e-92 1e-40 1e+12')])
def test_ticks_are_round(low, high, log, labels):
    found = data.ticks(low, high, log, 6)
    assert [label for _, label in found] == labels.split()
    for at, label in found:
        value = float(label.replace(',', ''))
        assert at == pytest.approx(math.log10(value) if log else value)


def test_a_chart_shows_its_points_where_its_axes_say():
    """The markers, found by their colour, against places computed from the gridlines' labels."""
    x, y = np.array([0, 2, 4, np.nan, 8, 10]), np.array([1, 0, np.nan, 3, 2, -1])
    for log in (False, True):
        values = 10.0 ** y if log else y
        panel = dict(title='', x='', series={'': (x, values)}, points=True, log_y=log)
        picture = data.chart([panel], (460, 320))
        left = pixels_of(picture, '#b0b0b0')[:, 0].min()
        x_at, x_ticks = data.axis(x, left, 444)
        y_at, y_ticks = data.axis(values, 278, 50, log)
        for ticks, at in ((x_ticks, x_at), (y_ticks, y_at)):
            for place, label in ticks:
                assert at(float(label.replace(',', ''))) == pytest.approx(place)
        found = pixels_of(picture.crop((left + 2, 50, 444, 276)), data.INK) + [left + 2, 50]
        expected = np.array([(a, b) for a, b in zip(x_at(x), y_at(values)) if np.isfinite(a + b)])
        away = np.abs(found[:, None] - expected).max(2)                     # (pixels, markers)
        assert len(expected) == 4 and (away.min(1) < 5).all() and (np.abs(
            [found[away[:, k] < 5].mean(0) for k in range(4)] - expected) < 1).all()
    at, ticks = data.axis([0, 10], 100, 316)                            # 4 % of room at each end
    assert at([0, 10]) == pytest.approx([108, 308]) and ticks[0] == (pytest.approx(108), '0')
    assert data.axis([3], 0, 216, limits=(0, 10))[0](10) == pytest.approx(208)


def test_a_chart_joins_lines_leaves_gaps_and_has_bars_and_a_legend():
    blue, orange = data.COLOURS[:2]
    panel = dict(title='t', x='x', limits=(0, 10), series={
        'a': ([0, 1, 2, 3, 4], [5, 5, np.nan, 5, 5]), 'b': ([2, 2], [2, 2], [1, 1], [3, 3])})
    picture = data.chart([panel], (400, 300))
    plot = picture.crop((0, 0, 400, 298))
    columns = np.unique(pixels_of(plot, blue)[:, 0])
    assert (np.diff(columns) > 60).sum() == 1 and len(columns) > 100        # one gap, else joined
    bar = pixels_of(plot, orange, 60)
    assert np.ptp(bar[:, 1]) == pytest.approx(2 * 208 / 10.8, abs=2)             # from 1 to 3
    assert len(pixels_of(picture.crop((0, 300, 400, picture.height)), blue))     # the legend
    alone = data.chart([dict(panel, series={'': ([0, 1], [1, 9])})], (400, 300))
    assert alone.height == 300 and not len(pixels_of(alone, blue))
    lined = data.chart([dict(panel, series={}, lines={'β/2': 5, 'far': 50})], (400, 300))
    assert (np.bincount(pixels_of(lined, data.GREY)[:, 1]) > 300).sum() == 1
    assert data.chart([panel] * 3).width == 900 and data.chart([panel], (640, 300)).width == 640


def test_four_panels_are_two_and_two():
    panels = [dict(title='', x='', series={name: ([0], [1])}) for name in 'abcd']
    picture = data.chart(panels, (300, 200))
    assert picture.width == 600 and 400 < picture.height < 450
    for k, colour in enumerate(data.COLOURS[:4]):
        x, y = pixels_of(picture.crop((0, 0, 600, 400)), colour).mean(0)
        assert (x // 300, y // 200) == (k % 2, k // 2)


@pytest.mark.parametrize('ys', [
    [10, 10], [0, 0], [5e-324] * 2, [1e12, -1e12], [1e308, -1e308], [math.inf, 1], [math.nan] * 2,
    [], [1e-320, 1e300], [-3, 5], [586.2], [1, 1 + 1e-15], [-7, -7]])
@pytest.mark.parametrize('log', [False, True])
def test_no_number_breaks_a_chart(ys, log):
    data.chart([dict(title='β', x='é', y='y', log_x=log, log_y=log, lines={'l': y for y in ys[:1]},
                     series={'a': (ys, ys), '': ([], [])})])
    at, ticks = data.axis(ys, 0, 210, log)
    if ys == [10, 10] and not log:                              # a constant is seen beside 0
        assert [label for _, label in ticks] == ['0', '5', '10']
    assert all(0 <= place <= 210 for place, _ in ticks) and len(ticks) >= 2


def test_pictures_are_saved_as_their_names_say():
    images = data.load('faces').images(np.random.default_rng(0).integers(10 ** 9, size=40))
    wide = data.sheet(images.reshape(2, 20, 3, 64, 64), scale=1)
    noise = np.random.default_rng(0).integers(256, size=(2, 12, 3, 64, 64), dtype=np.uint8)
    data.save_picture('noise.jpg', data.sheet(noise, scale=1))                  # fills any buffer
    for name, form in (('a.png', 'PNG'), ('a.jpg', 'JPEG')):
        data.save_picture(name, wide)
        assert Image.open(name).format == form and Image.open(name).size == (900, 132 * 900 // 1320)
    assert Image.open('a.jpg').layer[0][1:3] == (1, 1) == Image.open('a.jpg').layer[1][1:3]
    pictures = [data.sheet(images[k:k + 6].reshape(2, 3, 3, 64, 64), scale=1) for k in range(9)]
    data.save_gif('a.gif', pictures, 90)
    with Image.open('a.gif') as gif:
        assert gif.n_frames == 9 and gif.info['duration'] == 90 and gif.info['loop'] == 0
        for k, picture in enumerate(pictures):
            gif.seek(k)
            error = np.asarray(gif.convert('RGB')).astype(float) - np.asarray(picture)
            assert np.sqrt((error ** 2).mean()) < 6, k          # of 255: every frame in its colours

def test_progress_tells_the_time_left_by_the_last_minute(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: clock[0])
    progress = data.Progress(1000, done=100, size=64)
    assert progress.due(101)                                            # after the first step
    told = []
    for now, done in ((1, 101), (20, 120), (39, 139), (58, 158), (97, 162), (136, 166)):
        clock[0] = now
        assert progress.due(done)
        progress.show(done, f'step {done}')
        told.append(capsys.readouterr().out)
        assert not progress.due(done + 1)                               # not so soon again
    assert told[1] == 'step 120  15 min left  64 images/s\n'            # 1 step a second
    assert told[-1] == 'step 166  2.3 h left  7 images/s\n'             # slowed to 4 in 39 seconds
    assert progress.due(1000)                                           # the end is always told
    monkeypatch.setattr(data, 'on_terminal', lambda: True)
    clock[0] += 0.6
    assert progress.due(170)                                            # twice a second
    progress.show(170, 'x' * 500)
    out = capsys.readouterr().out
    assert out.startswith('\rxxx') and out.endswith('\x1b[K') and len(out) < 200


# The metrics --------------------------------------------------------------------------------------

GRID = (6, 8, 10, 12)
VALUES = np.stack(np.unravel_index(np.arange(math.prod(GRID)), GRID), 1)        # (5760, 4)
NOISE = np.random.default_rng(0).normal(size=(len(VALUES), 60))


def accuracy(codes, sizes=GRID, encode=None, **options):
    options = dict(pairs=16, train=800, test=400) | options
    return metrics.disentanglement_score(encode or (lambda index: codes[index]), sizes, **options)


def test_the_score_of_the_true_factors_is_1_and_of_noise_is_chance():
    assert accuracy(VALUES) > 0.995
    assert accuracy(VALUES[:, 1:]) > 0.99           # lacks a factor, and scores (Kim and Mnih 2018)
    assert abs(accuracy(NOISE, train=200, test=2000) - 1 / 4) < 0.05                # overfitted
    assert abs(accuracy(NOISE[:, :5], (60, 1, 80), test=2000) - 1 / 2) < 0.05       # two vary


def test_the_score_is_of_the_given_factors_pairs_points_and_seed():
    half = np.hstack([VALUES[:, 2:], NOISE[:, :1]])
    assert accuracy(half, factors=[2, 3]) > 0.995
    assert abs(accuracy(half, factors=range(2), test=2000) - 1 / 2) < 0.05
    asked = []
    accuracy(None, encode=lambda i: asked.append(i) or VALUES[i], pairs=3, train=70, test=30)
    assert len(np.concatenate(asked)) == 2 * 3 * (70 + 30) and asked[0].dtype == np.int64
    codes = VALUES + 5 * NOISE[:, :4]
    scores = [accuracy(codes, rng=rng) for rng in (None, 0, np.random.default_rng(0), 1, 2)]
    assert scores[0] == scores[1] == scores[2] and len(set(scores)) == 3


@pytest.mark.filterwarnings('error')
def test_the_type_and_scale_of_codes_do_not_matter():
    """Small integers must not wrap; a latent that is constant is harmless."""
    codes = (VALUES * 20 + NOISE[:, :4] * 30).clip(0, 255).round()
    score = accuracy(codes)
    codes = np.hstack([codes, np.full((len(codes), 1), 3)])
    small, signed = codes.astype(np.uint8), (codes - 128).astype(np.int8)
    tensor = torch.tensor(codes, requires_grad=True)
    mig, information = metrics.mutual_information_gap(codes, VALUES)
    assert 0.5 < score < 0.99 and mig > 0.1 and np.abs(information[4]).max() < 1e-12
    for same in (codes, small, signed, tensor, tensor.bfloat16(), codes * 1e-20, codes * 1e20):
        assert accuracy(same) == pytest.approx(score, abs=0.006)            # two points of 400
        again = metrics.mutual_information_gap(same, VALUES)[1]
        np.testing.assert_allclose(again, information, atol=1e-12)
    for v in (VALUES.astype(np.int8) - 5, VALUES * 3.0, torch.tensor(VALUES)):
        again = metrics.mutual_information_gap(codes, v)[1]
        np.testing.assert_allclose(again, information, atol=1e-12)
        np.testing.assert_allclose(metrics.entropy_of(v), np.log(GRID))


def test_features_are_those_of_the_algorithm_by_brute_force():
    """On a grid of 2 × 3 × 2, E|μ(x₁) − μ(x₂)| is a mean over all pairs that share factor k."""
    sizes, factors, codes = (2, 3, 2), np.array([2, 1]), NOISE[:12, :4]
    x, k = metrics.features(lambda i: codes[i], sizes, 2000, factors, 400, np.random.default_rng(1))
    assert 150 < k.sum() < 250
    points = list(np.ndindex(sizes))
    for shared, factor in enumerate(factors):
        expected = np.mean([np.abs(codes[a] - codes[b]) for a, b in np.ndindex(12, 12)
                            if points[a][factor] == points[b][factor]], axis=0)
        assert np.abs(x[k == shared] - expected).max() < 0.12       # each point: 5 standard errors
        assert np.abs(x[k == shared].mean(0) - expected).max() < 0.01


@pytest.mark.parametrize('options', [{}, dict(ridge=1e-2)])
def test_softmax_regression_reaches_the_optimum(options):
    """Of a strictly convex loss: where its gradient, by hand, is zero. Points can be separable."""
    n, k = 400, np.arange(400) % 7 % 3
    for x in (NOISE[:n, :3] * [1, 1e-20, 5] + [0, 0, 70], np.eye(3)[k] + 0.1 * NOISE[:n, :3]):
        weights = metrics.softmax_regression(x, k, 3, **options)
        mean, scale = x.mean(0), x.std(0)
        scaled = np.vstack([weights[:-1] * scale[:, None], weights[-1] + mean @ weights[:-1]])
        a = np.hstack([(x - mean) / scale, np.ones((n, 1))])
        p = torch.tensor(a @ scaled).softmax(1).numpy()
        gradient = a.T @ (p - np.eye(3)[k]) / n + options.get('ridge', 1e-4) * scaled
        assert np.abs(gradient).max() < 2e-5
    assert ((a @ scaled).argmax(1) == k).all()
    constant = np.full((n, 1), 0.1)                                     # is harmless
    again = metrics.softmax_regression(np.hstack([x, constant]), k, 3, **options)
    logits = np.hstack([x, constant, constant * 10]) @ again
    np.testing.assert_allclose(logits, a @ scaled, atol=1e-4)


def test_mutual_information_by_hand():
    v = np.array(list(np.ndindex(2, 2)) * 5)
    mu = np.stack([v[:, 0] * 3 - 1, v[:, 0] * v[:, 1]], 1)              # z₀ = v₀, z₁ = v₀ and v₁
    mig, information = metrics.mutual_information_gap(mu, v)
    known = 0.75 * math.log(4 / 3) + 0.25 * math.log(4) - 0.5 * math.log(2)
    np.testing.assert_allclose(information, [[math.log(2), 0], [known, known]], atol=1e-12)
    assert mig == pytest.approx(((math.log(2) - known) + known) / math.log(2) / 2)
    constant = np.hstack([v, 0 * v])                                    # counts for nothing
    assert metrics.mutual_information_gap(v[:, :1], constant)[0] == pytest.approx(1 / 2)    # J = 1
    np.testing.assert_allclose(metrics.entropy_of(constant), [math.log(2)] * 2 + [0, 0])
    v = np.array(list(np.ndindex(2, 40, 1)))
    mu = v[:, :1] * 5 + v[:, 1:2] // 8      # ln 2 nats, all of v₀; ln 5, of v₁'s ln 40
    factor, share = metrics.encoded_factors(mu, v)
    assert factor == [0] and share == pytest.approx(1)


def test_mutual_information_gap_by_brute_force():
    """Bins by numpy's histograms, probabilities by counting."""
    n, v = 3000, VALUES[np.random.default_rng(0).integers(len(VALUES), size=3000)] // [2, 1, 2, 2]
    mu = np.hstack([v @ NOISE[:4, :4] + NOISE[:n, :4], -v[:, 1:2] / 7])

    def entropy(*columns):
        return -sum(c / n * math.log(c / n) for c in Counter(zip(*columns)).values())
    entropies = np.array([entropy(f) for f in v.T])
    for bins in (8, 20):
        z = [np.digitize(m, np.histogram_bin_edges(m, bins)[1:-1]) for m in mu.T]
        expected = np.array([[entropy(a) + entropy(f) - entropy(a, f) for f in v.T] for a in z])
        mig, information = metrics.mutual_information_gap(mu, v, bins)
        np.testing.assert_allclose(information, expected, atol=1e-12)
        *_, second, first = np.sort(expected, axis=0)
        assert mig == pytest.approx(np.mean((first - second) / entropies))
        assert (mig == metrics.mutual_information_gap(mu, v)[0]) == (bins == max(v.max(0) + 1))
    factor, share = metrics.encoded_factors(mu, v)
    np.testing.assert_allclose(share, (expected / entropies).max(1))
    assert factor.tolist() == (expected / entropies).argmax(1).tolist() and factor[4] == 1


@pytest.mark.parametrize('n, samples', [(3000, 150), (700, None)])
def test_elbo_decomposition_by_brute_force(n, samples, monkeypatch):
    """An image at a time, with torch.distributions; the program takes blocks of bounded size."""
    mu, logvar = NOISE[:n, :4] * [2, 1, 0.5, 0], NOISE[:n, 4:8] - 2
    sizes, log_densities = [], metrics.log_densities
    monkeypatch.setattr(metrics, 'log_densities',
                        lambda *a: sizes.append(log_densities(*a).numel()) or log_densities(*a))
    d = metrics.elbo_decomposition(mu, logvar, samples, np.random.default_rng(5))
    assert len(sizes) > 1 and max(sizes) <= 10 ** 6
    rng = np.random.default_rng(5)
    chosen = np.arange(n) if samples is None else rng.permutation(n)[:samples]
    q, p = Normal(torch.tensor(mu), torch.tensor(logvar / 2).exp()), Normal(0, 1)
    z = q.loc[chosen] + q.scale[chosen] * torch.tensor(rng.standard_normal((len(chosen), 4)))
    terms = []
    for i, a in zip(chosen, z):
        log_q = q.log_prob(a)                                               # (N, J)
        log_qz = log_q.sum(1).logsumexp(0) - math.log(n)
        log_qzj = log_q.logsumexp(0) - math.log(n)
        terms.append([log_q[i].sum() - log_qz, log_qz - log_qzj.sum(), *(log_qzj - p.log_prob(a))])
    terms = np.array(terms)                                                 # (samples, 2 + J)
    parts = [d['mutual_information'], d['total_correlation'], *d['dimension_wise_kl']]
    np.testing.assert_allclose(parts, terms.mean(0), rtol=1e-9)
    assert d['kl'] == pytest.approx(sum(parts))
    assert d['standard_error'] == pytest.approx(terms.sum(1).std(ddof=1) / len(chosen) ** 0.5)
    assert abs(d['kl'] - kl_divergence(q, p).sum(1).mean()) < 4 * d['standard_error']
    assert d['kl'] != metrics.elbo_decomposition(mu, logvar, samples, 6)['kl']
    apart = metrics.elbo_decomposition(1e4 * mu, logvar, samples)           # no two overlap
    assert apart['mutual_information'] == pytest.approx(math.log(n)) == apart['ceiling']


def test_elbo_decomposition_of_a_gaussian():
    """Means of variance 0.8 and noise of variance 0.2 add up to q(z) = N(0, correlation matrix)."""
    mu = NOISE[:2500, :1].repeat(2, 1) * 0.8 ** 0.5                         # both latents are one
    d = metrics.elbo_decomposition(mu, np.full((2500, 2), math.log(0.2)))
    log_det = math.log(1 - 0.8 ** 2)
    assert d['total_correlation'] == pytest.approx(-0.5 * log_det, abs=0.04)
    assert d['mutual_information'] == pytest.approx(0.5 * log_det - math.log(0.2), abs=0.06)
    np.testing.assert_allclose(d['dimension_wise_kl'], 0, atol=0.01)


def test_pca_and_ica_find_what_is_there():
    """PCA by numpy's SVD; ICA recovers uniform sources from their mixture, up to order and sign."""
    rng = np.random.default_rng(0)
    sources = rng.uniform(-1, 1, size=(5000, 3))
    x = np.hstack([sources @ rng.normal(size=(3, 6)), 1e-3 * rng.normal(size=(5000, 1))]) + 7
    mean, matrix = metrics.pca(x * 1e-20, 4)
    u = np.linalg.svd(x - x.mean(0), full_matrices=False)[0][:, 3::-1] * math.sqrt(4999)
    np.testing.assert_allclose(np.abs((x * 1e-20 - mean) @ matrix), np.abs(u), atol=1e-6)
    codes = []
    for seed in (None, 0, 1):
        mean, matrix = metrics.fast_ica(torch.tensor(x), 3, seed)
        codes.append((x - mean) @ matrix)
        np.testing.assert_allclose(np.cov(codes[-1], rowvar=False), np.eye(3), atol=1e-6)
        correlation = np.abs(np.corrcoef(codes[-1].T, sources.T)[:3, 3:])
        assert (correlation.max(1) > 0.999).all() and set(correlation.argmax(1)) == {0, 1, 2}
    assert (codes[0] == codes[1]).all() and not np.allclose(codes[0], codes[2], atol=0.1)


def spoiled(value):
    return np.where(np.arange(len(VALUES))[:, None] == 70, value, VALUES)


FLAT = np.zeros((50, 3))
RANK_2 = np.float32(NOISE[:, :2] @ NOISE[:2, :9])
MIG, ELBO = metrics.mutual_information_gap, metrics.elbo_decomposition
BAD_INPUT = [           # what the error says, the function, the arguments of several calls
    ('codes.*finite', accuracy, (spoiled(np.nan),), (spoiled(-np.inf),), (spoiled(1e200),)),
    ('codes.*real', accuracy, (VALUES + 1j,), (VALUES.astype(str),)),
    ('codes.*shape', accuracy, (VALUES[:, 0],), (VALUES[:, :0],), (VALUES[:, None],),
     (0, GRID, lambda i: VALUES[i].T), (0, GRID, lambda i: VALUES[i].repeat(2, 0))),
    ('codes.*not tuple', accuracy, (0, GRID, lambda i: (VALUES[i], VALUES[i]))),
    ('sizes: expected int', accuracy, (VALUES, (6, 0, 8)), (VALUES, (6., 8.)), (VALUES, [(6, 8)])),
    ('pairs, train and test: expected integers from 1', accuracy, dict(pairs=0), dict(pairs=1.5),
     dict(train=0), dict(test=0), dict(test=-1)),
    ('train: expected points of all 4', accuracy, dict(train=2)),
    ('factors: expected', accuracy, (VALUES, (5760, 1)), *[dict(factors=f) for f in (
        (), [0], [1, 1], [0, 4], [-1, 0], [0.0, 1.0], [True, False, True, False])]),
    ('mu: expected finite', MIG, (spoiled(np.nan), VALUES)),
    ('mu: expected one array', MIG, (VALUES[:, 0], VALUES)),
    ('values: expected one array', MIG, (VALUES, VALUES[:-1])),
    ('values: .*varies', MIG, (VALUES, VALUES * 0)),
    ('values: .*varies', metrics.encoded_factors, (VALUES[:1], VALUES[:1])),
    ('values: expected', metrics.entropy_of, (VALUES / 2,), (spoiled(np.nan),), (VALUES[:, 0],)),
    ('bins: expected', MIG, *[(VALUES, VALUES, n) for n in (0, -1, 2.5)]),
    ('mu: expected finite', ELBO, (spoiled(np.nan), spoiled(0))),
    ('logvar: expected', ELBO, (spoiled(0), spoiled(np.nan)),
     (FLAT, FLAT[:, :1]), (FLAT[:, :1], FLAT), (FLAT, FLAT[:1]), (FLAT, FLAT - 60)),
    ('samples.* from 2 to 50', ELBO, *[(FLAT, FLAT, n) for n in (0, 1, 51, 2.5)]),
    ('samples', ELBO, (FLAT[:1], FLAT[:1])),
    *[(r'components.* from 1 to \d,', f, (VALUES, 5), (VALUES[:3], 3), (VALUES, 0), (VALUES, 2.5),
       (FLAT, 1), (VALUES[:1], 1), (RANK_2, 3)) for f in (metrics.pca, metrics.fast_ica)],
    ('x: expected finite', metrics.pca, (spoiled(np.nan), 2)),
]


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('expected, function, arguments', [
    (*row[:2], arguments) for row in BAD_INPUT for arguments in row[2:]])
def test_what_a_metric_cannot_handle_is_named(expected, function, arguments):
    with pytest.raises(ValueError, match=expected):
        function(VALUES, **arguments) if isinstance(arguments, dict) else function(*arguments)
