"""Each test compares with something independent: torch.distributions, a closed form, a brute-force
loop, genuine frames. In the order of the modules. DSPRITES_NPZ=… adds the official dSprites."""
import functools
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
import time
import zipfile
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

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
DRAW, LOAD = betavae.draw, data.load
betavae.ROW, betavae.PICTURES = 5, 8        # runs of a few steps have rows and pictures, too


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
    monkeypatch.setattr(betavae, 'draw', lambda *_: None)
    torch.manual_seed(2017)                 # no test depends on chance, or on the one before it


@pytest.fixture
def drawn(monkeypatch):
    """Runs draw their pictures; without this they leave all else."""
    monkeypatch.setattr(betavae, 'draw', DRAW)


def toy(channels=1, flipped=False):
    """A block in one of 12 rows and 6 columns, in one of 2 greys: an image shows its index."""
    x = np.full((12, 6, 2, channels, 64, 64), 20, np.uint8)
    for row, column, light in np.ndindex(12, 6, 2):
        x[row, column, light, :, 5 * row:, 10 * column:][:, :9, :9] = 120 + 100 * light
    x = torch.from_numpy(255 - x if flipped else x).view(144, channels, 64, 64)
    sizes = {'row': 12, 'column': 6, 'dark|light': 2}
    return data.Dataset('toy', (channels, 64, 64), sizes, x.__getitem__)


def train(steps=12, dataset=None, **options):
    options = dict(latents=3, batch=16, likelihood='gaussian', run='a', precision='fp32',
                   device='cpu', steps=steps) | options
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


def read(*path):
    return json.loads(Path(*path).read_text())


def read_log(run='a'):
    return np.atleast_1d(np.genfromtxt(Path(run, 'log.csv'), delimiter=',', names=True))


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
    """Finished runs: b differs from a in its seed, c in its β, where not all latents are active."""
    folder = tmp_path_factory.mktemp('finished')
    for run, options in dict(a={}, b=dict(seed=1), c=dict(beta=3)).items():
        train(30, run=folder / run, **options)
    return folder


@pytest.fixture
def trained(finished, monkeypatch):
    """A copy of those runs here, and their data for `compare`."""
    shutil.copytree(finished, '.', dirs_exist_ok=True)
    monkeypatch.setattr(data, 'load', lambda source, crop: toy())


# The objective ------------------------------------------------------------------------------------

def total_correlation(z, q, n):
    """Chen et al. 2018, appendix C.2, of probabilities."""
    w = torch.full((len(z),) * 2, (n - 1) / n / (len(z) - 1), dtype=z.dtype).fill_diagonal_(1 / n)
    p = q.log_prob(z[:, None]).exp()                                                # (M, M, J)
    joint, each = (w * p.prod(2)).sum(1), (w[:, :, None] * p).sum(1)
    return (joint.log() - each.log().sum(1)).mean()


def test_total_correlation_by_brute_force_and_of_all_images_exact():
    mu, logvar, noise = torch.randn(3, 6, 2, dtype=torch.float64)
    z, q = betavae.sample(mu, logvar, noise), Normal(mu, (logvar / 2).exp())
    found = betavae.total_correlation(z, mu, logvar, 6)
    torch.testing.assert_close(found, total_correlation(z, q, 6))
    exact = q.log_prob(z[:, None]).exp()                                            # (z, image, J)
    expected = exact.prod(2).mean(1).log() - exact.mean(1).log().sum(1)
    torch.testing.assert_close(found, expected.mean())


def test_schedules_are_those_of_the_eight_runs_within_1():
    """min(10, t/4000); max(1, 100 − t/400) and max(1, 10000 − t/10) reach 1 at steps 39,600 and
    99,990, where ours are straight lines that end with step 40,000 and 100,000."""
    for t in range(0, 120001, 1000):
        assert betavae.beta_at(t, 10, 0, 40000) == pytest.approx(min(10, t / 4000))
        for start, pace, anneal in ((100, 400, 40000), (10000, 10, 100000)):
            late = betavae.beta_at(t, 1, start, anneal) - max(1, start - t / pace)
            assert 0 <= late <= 1 and (late == 0 or 0 < t < anneal)


def test_a_linear_decoder_makes_it_probabilistic_pca():
    """With a linear decoder the objective is PPCA of noise variance β/2: latent i survives where
    λ_i > β/2, with ½ ln(2 λ_i / β) nats (Lucas et al. 2019). At the optimum that they give in
    closed form the gradient vanishes, and with fewer latents the loss is higher."""
    lambdas = torch.tensor([4e-6, 1e-6, 3e-7], dtype=torch.float64)     # the sigmoid is straight
    beta, n = 1e-6, 2000
    draws = torch.randn(n, 6, dtype=torch.float64)
    draws = torch.linalg.qr(draws - draws.mean(0))[0] * n ** 0.5        # of covariance exactly 1
    scores, noise = draws.split(3, 1)
    x = (0.5 + scores * lambdas.sqrt()).view(n, 1, 1, 3)

    def loss_at(used):
        kept = (torch.arange(3) < used).double()
        gain = kept * (lambdas - beta / 2).clamp(min=0).sqrt()                      # of the decoder
        a = (gain / lambdas.sqrt()).requires_grad_()                                # μ = a · scores
        logvar = torch.log(1 - kept * (1 - beta / (2 * lambdas))).requires_grad_()
        w = torch.diag(4 * gain).requires_grad_()                       # 1/4: slope of the sigmoid
        z = betavae.sample(scores * a, logvar, noise)
        outputs = (z @ w).view(n, 1, 1, 3), z, scores * a, logvar.expand(n, 3)
        loss, _, kl = betavae.objective(lambda *_: outputs, x, noise, beta)
        loss.backward()
        return loss.item(), kl, max(p.grad.abs().max() for p in (a, logvar, w))
    best, kl, gradient = loss_at(2)
    expected = 0.5 * torch.log(2 * lambdas / beta).clamp(min=0)
    torch.testing.assert_close(kl, expected, atol=1e-9, rtol=0)
    assert gradient < 0.02 * beta and best < min(loss_at(1)[0], loss_at(0)[0])


# Training: an independent run ---------------------------------------------------------------------

class Plain:
    """The paper's algorithm as a reader would write it: plain layers, torch.distributions, Adam."""

    def __init__(self, C=1, J=3, **options):
        relu = functools.partial(nn.LeakyReLU, options.get('leak', 0.2))
        self.J, self.options = J, options
        self.encoder = nn.Sequential(
            nn.Conv2d(C, 32, 4, 2, 1), relu(), nn.Conv2d(32, 32, 4, 2, 1), relu(),
            nn.Conv2d(32, 64, 4, 2, 1), relu(), nn.Conv2d(64, 64, 4, 2, 1), relu(), nn.Flatten(),
            nn.Linear(1024, 256), relu(), nn.Linear(256, 2 * J))
        self.decoder = nn.Sequential(
            nn.Linear(J, 256), relu(), nn.Linear(256, 1024), relu(), nn.Unflatten(1, (64, 4, 4)),
            nn.ConvTranspose2d(64, 64, 4, 2, 1), relu(), nn.ConvTranspose2d(64, 32, 4, 2, 1),
            relu(), nn.ConvTranspose2d(32, 32, 4, 2, 1), relu(), nn.ConvTranspose2d(32, C, 4, 2, 1))
        self.weights = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.adam = torch.optim.Adam(self.weights, fused=False, foreach=False)

    def load(self, weights, moments=()):
        for mine, given in zip(self.weights, weights, strict=True):
            mine.data.copy_(given)
        for mine, given in zip(self.weights, moments):
            self.adam.state[mine] = {k: v.clone().contiguous() for k, v in given.items()}
        return self

    def terms(self, x, noise):
        """Reconstruction, KL_j, q(z|x) and z."""
        mu, logvar = self.encoder(x).split(self.J, 1)
        q = Normal(mu, (logvar / 2).exp())
        z = q.mean + q.stddev * noise
        logits = self.decoder(z)
        p, constant = Normal(logits.sigmoid(), 0.5 ** 0.5), x[0].numel() / 2 * math.log(math.pi)
        if self.options.get('likelihood') == 'bernoulli':
            p, constant = Bernoulli(logits=logits, validate_args=False), 0
        recon = -p.log_prob(x).sum() / len(x) - constant
        return recon, kl_divergence(q, Normal(0.0, 1.0)).mean(0), q, z

    def beta(self, t):
        o = self.options
        start, end = o.get('beta_from', 0), o.get('capacity', o.get('beta', 1))
        return start + min(1, t / o['anneal']) * (end - start) if 'anneal' in o else end

    def losses(self, x, noise, t, n):
        """Loss, reconstruction and KL_j in step t, from 0, of a run on n images."""
        recon, kl, q, z = self.terms(x, noise)
        loss = recon + self.beta(t) * kl.sum()
        if 'capacity' in self.options:
            loss = recon + self.options['gamma'] * abs(kl.sum() - self.beta(t))
        if 'tc' in self.options:
            tc = total_correlation(z.double(), Normal(q.loc.double(), q.scale.double()), n)
            loss = recon + kl.sum() + (self.beta(t) - 1) * tc.float()
        return torch.stack([loss, recon, *kl])

    def step(self, x, noise, t, n):
        losses = self.losses(x, noise, t, n)
        warm = min(1, (t + 1) / self.options.get('warmup', 1))
        self.adam.param_groups[0]['lr'] = self.options.get('lr', 5e-4) * warm
        self.adam.zero_grad()
        losses[0].backward()
        self.adam.step()
        return losses.detach()


class Witness(betavae.Run):
    """A run that notes how it starts, and what comes of each step."""

    def __init__(self, *args):
        super().__init__(*args)
        Witness.notes = []
        self.note()

    def note(self, losses=None):
        weights = list(self.model.parameters())
        self.notes.append(dict(
            losses=losses, weights=[p.detach().clone() for p in weights],
            cudnn=(torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic),
            moments=[{k: v.clone() for k, v in self.optimiser.state[p].items()} for p in weights],
            gradients=[p.grad.clone() for p in weights if p.grad is not None]))

    def record(self, beta, loss, recon, kl):
        self.note(torch.stack([loss, recon, *kl]).detach())
        super().record(beta, loss, recon, kl)


noise = betavae.fixed_noise         # of all figures and pictures


def held_out(dataset):
    """In the order in which a run sees them."""
    return torch.from_numpy(dataset.images(dataset.held_out(1000))) / 255


@pytest.mark.parametrize('case', [
    dict(beta=4), dict(beta=4, likelihood='bernoulli'), dict(beta=20, anneal=8, dataset=toy(3)),
    dict(beta=1, beta_from=30, anneal=8, leak=0, dataset=toy(3), likelihood='bernoulli'),
    dict(beta=2, warmup=6, lr=1e-4, seed=1), dict(capacity=6, gamma=30, anneal=8, warmup=5),
    dict(beta=6, tc=True, anneal=8, leak=0)], ids='-'.join)
def test_training_is_the_papers_algorithm_and_the_log_says_so(case, monkeypatch, capsys):
    monkeypatch.setattr(betavae, 'Run', Witness)
    monkeypatch.setattr(time, 'perf_counter', itertools.count().__next__)   # two looks a step
    model = train(13, **case)
    notes, log, dataset = Witness.notes, read_log(), case.get('dataset', toy())
    n = sum(k % 19 != 0 for k in range(144))                            # training images
    batches = [betavae.batch(dataset, case.get('seed', 0), t, 16, 3, 'cpu') for t in range(13)]
    plain = Plain(dataset.shape[0], **case).load(notes[0]['weights'])
    for t in range(5):                                              # the first steps, on its own
        losses = plain.step(*batches[t], t, n)
        torch.testing.assert_close(notes[t + 1]['losses'], losses, rtol=2e-6, atol=1e-6)
    for mine, theirs in zip(plain.weights, notes[5]['weights']):
        assert (mine - theirs).abs().max() < 5e-4 / 10
    for t in (4, 8, 12):                # a step from in the ramp, its end, past the warm-up
        plain = Plain(dataset.shape[0], **case).load(notes[t]['weights'], notes[t]['moments'])
        losses = plain.step(*batches[t], t, n)
        torch.testing.assert_close(notes[t + 1]['losses'], losses, rtol=2e-6, atol=1e-6)
        after = notes[t + 1]
        for mine, gradient, weights in zip(plain.weights, after['gradients'], after['weights']):
            assert (mine.grad - gradient).abs().max() < 2e-5 * gradient.abs().max()
            assert (mine - weights).abs().max() < 5e-4 / 100

    assert log['step'].tolist() == [5, 10, 13]
    for row, start, end in zip(log, (0, 5, 10), (5, 10, 13)):
        loss, recon, *kl = np.mean([note['losses'] for note in notes[start + 1:end + 1]], 0)
        plain.load(notes[end]['weights'])
        with torch.no_grad():
            held = plain.losses(held_out(dataset), noise(8, 3), end - 1, n).tolist()
        expected = [end, plain.beta(end - 1), loss, recon, sum(kl), *kl, *held[:2], sum(held[2:])]
        np.testing.assert_allclose(row.tolist()[:-1], expected, rtol=1e-5, atol=1e-6)
    assert log['seconds'].tolist() == [5, 10, 13] and state()['seconds'] == 13
    assert log.dtype.names == (
        'step', 'beta', 'loss', 'recon', 'kl', 'kl_0', 'kl_1', 'kl_2', 'held_out_loss',
        'held_out_recon', 'held_out_kl', 'seconds')
    assert (f"step 13/13  {'C' if 'capacity' in case else 'β'} {plain.beta(12):.4g}  recon "
            f'{recon:.1f}  KL {sum(kl):.2f}  active {sum(k > 0.05 for k in kl)}/3  '
            in capsys.readouterr().out)
    assert same(model.state_dict(), state()['model'])
    # On a GPU the bits repeat only with deterministic algorithms; what comes after needs no such.
    assert notes[1]['cudnn'] == (True, True) and not torch.backends.cudnn.deterministic


def test_batches_are_training_images_all_of_them_and_normal_noise():
    batches = [betavae.batch(toy(), 3, step, 64, 5, 'cpu') for step in range(40)]
    x, noise = (torch.cat(part) for part in zip(*batches))
    images = torch.from_numpy(toy().images(np.arange(144))) / 255
    away, index = torch.cdist(x.flatten(1), images.flatten(1)).min(1)
    counts, training = torch.bincount(index, minlength=144), torch.arange(144) % 19 != 0
    assert away.max() < 0.1 and torch.equal(counts > 0, training)       # 2560 draws of 136
    assert abs(counts[training].float().var() / counts[training].float().mean() - 1) < 0.4
    found = noise.flatten().sort().values
    expected = Normal(0.0, 1.0).icdf((torch.arange(len(found)) + 0.5) / len(found))
    assert (found - expected)[50:-50].abs().max() < 0.1
    assert np.abs(np.corrcoef(noise.T) - np.eye(5)).max() < 0.08
    again, *others = (betavae.batch(toy(), seed, step, 64, 5, 'cpu')
                      for seed, step in ((3, 7), (3, 8), (4, 7), (7, 3)))
    assert all(map(torch.equal, again, batches[7]))
    assert not any(map(torch.equal, again * 3, itertools.chain(*others)))


def test_the_first_weights_are_those_of_the_seed_and_of_plain_layers():
    before = torch.get_rng_state()
    options = [betavae.options(seed=seed, latents=3, device='cpu') for seed in (0, 0, 1)]
    first, again, other = ([*betavae.initial_model(s, 1).parameters()] for s in options)
    assert torch.equal(torch.get_rng_state(), before)           # the global state is left alone
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))
    for mine, theirs in zip(Plain().weights, first, strict=True):       # of one distribution
        assert mine.shape == theirs.shape
        assert len(mine) < 32 or abs(mine.std() / theirs.std() - 1) < 0.25


def test_half_precision_defaults_and_wrong_input():
    model, half = betavae.BetaVAE(3, 6), betavae.BetaVAE(3, 6, bf16=True)
    half.load_state_dict(model.state_dict())
    x, zeros = torch.rand(2, 3, 64, 64), torch.zeros(2, 6)
    for a, b in zip(half(x, zeros), model(x, zeros)):               # bf16 rounds, and no more
        assert a.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.02
    assert all((a != a.bfloat16()).any() for a in half.encode(x))   # the posterior is float32
    assert betavae.initial_model(betavae.options(latents=3, device='cpu', precision='bf16'), 1).bf16
    assert model.encoder[1].negative_slope == 0.2
    for bad in (x[:, :1], x[:, :, :32, :32], (x * 255).byte(), x.double(), x[0]):
        with pytest.raises(ValueError, match='expected float32'):
            model.encode(bad)
    with pytest.raises(ValueError, match='bernoulli or gaussian'):
        betavae.reconstruction(x, x, 'gauss')


# A run's figures and pictures, recomputed from its checkpoint -------------------------------------

@pytest.mark.parametrize('run', ['a', 'c'])
def test_each_field_of_the_summary(run, finished):
    summary, dataset = read(finished, run, 'summary.json'), toy()
    plain, x = Plain().load(state(finished / run)['model'].values()), held_out(dataset)
    pixels = torch.from_numpy(dataset.images(np.arange(144))) / 255
    with torch.no_grad():
        recon, kl, q, _ = plain.terms(x, noise(len(x), 3))
        plainly = plain.encoder(pixels).split(3, 1)
    mu, logvar = betavae.codes_of(betavae.load(finished / run), dataset.images(np.arange(144)))
    torch.testing.assert_close((mu, logvar), plainly, rtol=1e-4, atol=1e-4)     # bins need the bits
    means, z = q.mean.mean(0), mu + (logvar / 2).exp() * noise(144, 3)
    top, by_mean = int(kl.argmax()), int(means.abs().argmax())
    factors = np.stack(np.unravel_index(np.arange(144), dataset.factor_sizes), 1)
    shares = metrics.factor_shares(mu, factors)
    expected = dict(
        steps=30, reconstruction=recon, kl=kl.sum(),
        kl_per_latent=kl, active_latents=(kl > 0.05).sum(), largest_mean=means[by_mean],
        linear_latents=dict(a=3, c=0)[run], mig=metrics.mutual_information_gap(mu, factors)[0],
        mig_samples=metrics.mutual_information_gap(z, factors)[0],
        dimension_wise_kl=metrics.elbo_decomposition(mu, logvar)['dimension_wise_kl'],
        largest_mean_standard_error=q.mean[:, by_mean].std(correction=0) / len(x) ** 0.5,
        **{f'share of {name}': x for name, x in zip(dataset.factors, shares.max(0))})
    for name, value in expected.items():
        np.testing.assert_allclose(summary[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    factor, share = shares.argmax(1), shares.max(1)
    names = [f'z{j}: {dataset.factor_names[factor[j]]} {share[j]:.0%}' if kl[j] > 0.05 else f'z{j}'
             for j in range(3)]
    assert summary['latent_names'] == names and min(share) >= 0.05
    assert (summary['top_latent'], summary['top_latent_by_mean']) == (names[top], names[by_mean])


def test_pictures_are_never_read_made_again_and_show_what_they_say(trained, drawn, monkeypatch):
    """The codes behind traversal, top latent and reconstructions, against plain decodes."""
    views = {path: path.read_bytes() for path in Path('c').iterdir() if path.suffix != '.pt'}
    for path in views:
        path.write_bytes(b'nonsense')
    sheets, sheet, panels, chart = [], data.sheet, [], data.chart
    monkeypatch.setattr(data, 'sheet', lambda *a, **k: sheets.append((*a, k)) or sheet(*a, **k))
    monkeypatch.setattr(data, 'chart', lambda given: panels.extend(given) or chart(given))
    train(30, beta=3, run='c')                                          # draws them again
    plain, x = Plain().load(state('c')['model'].values()), held_out(toy())
    with torch.no_grad():
        _, kl, q, z = plain.terms(x, noise(len(x), 3))
        order = kl.argsort(descending=True).tolist()
        top = torch.zeros(3, 10, 3)
        top[:, :, order[0]] = torch.linspace(z[:, order[0]].min(), z[:, order[0]].max(), 10)
        top = top + torch.arange(3)[:, None, None] * q.stddev.mean(0)
        rows = q.mean[3].repeat(2, 8, 1)                                # of the two active latents
        moving = q.mean[:8].repeat(2, 1, 1)
        for row, j in enumerate(order[:2]):
            rows[row, :, j] = torch.linspace(-3, 3, 8)
            moving[row, :, j] = -math.cos(math.pi / 8)                  # the second frame of nine
        shown = [torch.cat([q.mean[:8], *noise(2, 8, 3)]).view(3, 8, 3), rows, top, moving]
        expected = [plain.decoder(codes.view(-1, 3)).sigmoid().view(*codes.shape[:2], 1, 64, 64)
                    for codes in shown]
    (seen, kinds, *_), (grid, labels, _, notes, _), (tops, *_), _, (second, *_, more) = sheets[:5]
    assert torch.equal(seen[0], (x[:8] * 255).byte())
    assert kinds == ['held out', 'reconstructed', 'from the prior', '']
    for found, pixels in zip((seen[1:], grid, tops, second), expected, strict=True):
        assert (found - 255 * pixels).abs().max() < 0.6
    names = read('c/summary.json')['latent_names']
    assert labels == [f'{names[j]}, {kl[j]:.2f} nats' for j in order[:2]]
    assert notes == more['notes'] and '2 of 2 active latents, 3 in all' in notes
    log = read_log('c')
    expected = [{'train': 'recon', 'held out': 'held_out_recon'},
                {'train': 'kl', 'held out': 'held_out_kl'},
                {names[j]: f'kl_{j}' for j in order[:2]}, {'': 'beta'}]
    for panel, columns in zip(panels, expected, strict=True):
        assert panel['series'].keys() == columns.keys()
        for name, (x, y) in panel['series'].items():
            np.testing.assert_allclose([x, y], [log['step'], log[columns[name]]], rtol=1e-8)
    assert {path.name for path in views} == {
        'curves.png', 'log.csv', 'reconstructions.jpg', 'settings.json', 'summary.json',
        'top_latent.jpg', 'training.gif', 'traversal.gif', 'traversal.jpg'}
    assert views == {path: path.read_bytes() for path in views}
    frames = sorted(state('c')['frames'].items())
    for (images, *_), (_, frame) in zip(sheets[12:], frames, strict=True):
        assert torch.equal(images[1], frame)
    assert Image.open('c/training.gif').n_frames == 7           # of steps 1, 3, 8, 10, 16, 24, 30
    gif = Image.open('c/traversal.gif')
    there, back = (gif.seek(k) or gif.convert('RGB') for k in (1, 15))
    assert gif.n_frames == 16 and there == back


def test_factors_are_measured_on_a_draw_and_named_from_5_percent_on(monkeypatch):
    drawn = []
    dataset = data.Dataset('coins', (1, 64, 64), {f'coin {k}': 2 for k in range(11)},
                           lambda index: drawn.extend(index.tolist()) or numbered(index % 2))

    def codes_of(_, images):                            # z0 and z2 are the last coin, z1 is noise
        mu = noise(len(images), 3)
        mu[:, ::2] = torch.from_numpy(images[:, 0, 0, :1]).float()
        return mu, 0 * mu - 9
    monkeypatch.setattr(betavae, 'codes_of', codes_of)
    known = betavae.known_factors(None, dataset, [1, 1, 0], 1000)
    assert known['latent_names'] == ['z0: coin 10 100%', 'z1', 'z2']
    assert drawn == np.random.default_rng(0).integers(2048, size=1000).tolist()


def test_a_collapsed_run_says_so_and_a_young_or_a_certain_one_does_not(trained, capsys):
    for step, logvar, collapsed in ((1000, 0, True), (30, 0, False), (1000, -60, False),
                                    (1000, 0.3, True), (1000, 0.4, False)):     # 0.07, 0.14 nats
        kept = state()
        kept['model']['posterior.weight'].zero_()
        kept['model']['posterior.bias'].copy_(torch.tensor([0] * 3 + [logvar] * 3))
        kept['log'][-1, 0] = kept['step'] = step
        torch.save(kept, 'a/checkpoint.pt')
        train(step)                                                     # it is there already
        summary = read('a/summary.json')
        assert summary['collapsed'] == collapsed == ('collapsed' in capsys.readouterr().out)
        assert summary['active_latents'] == (0 if logvar >= 0 else 3)          # 0.046 nats each


def test_large_data_the_spectrum_and_what_a_linear_decoder_would_use(capsys):
    """Images along two directions of known variance."""
    random = torch.randn(64 * 64 + 5000, 2, generator=torch.Generator().manual_seed(0))
    directions = torch.linalg.qr(random[:4096])[0]
    scores = random[4096:] * torch.tensor([6.0, 2.0])

    def draw(index):
        x = 0.5 + scores[index % 5000] @ directions.T
        return (x * 255).round().clamp(0, 255).to(torch.uint8).view(-1, 1, 64, 64)
    dataset = data.Dataset('plane', (1, 64, 64), {}, draw, size=100000)
    found = betavae.spectrum(dataset)
    np.testing.assert_allclose(found[:2], [36, 4], rtol=0.1)
    assert found[2] < 0.1
    for expected, options in ((2, dict(beta=1)), (2, dict(beta=7)), (1, dict(beta=9)),
                              (1, dict(beta=70)), (0, dict(beta=80)), (1, dict(latents=1)),
                              (None, dict(likelihood='bernoulli')), (None, dict(tc=True)),
                              (None, dict(capacity=9))):
        options = dict(likelihood='gaussian', latents=5) | options
        assert betavae.linear_latents(dataset, betavae.options(**options)) == expected
    train(1, dataset=dataset, beta=9)
    out = capsys.readouterr().out
    assert 'about 1 of 3 latents at β = 9' in out and 'none from β = 7' in out
    assert 'plane, 100,000 images 1 × 64 × 64 | β 9, latents 3, batch 16, gaussian | ' in out
    plain = Plain().load(state()['model'].values())
    in_summary, in_row = read('a/summary.json')['reconstruction'], read_log()['held_out_recon'][-1]
    for n, found in (1000, in_summary), (125, in_row):
        with torch.no_grad():
            recon, *_ = plain.terms(held_out(dataset)[:n], noise(n, 3))
        assert found == pytest.approx(recon.item(), rel=1e-5)


# A run's folder -----------------------------------------------------------------------------------

@pytest.fixture
def cuts(monkeypatch):
    """{step: signal}, to be filled: each is raised once, in its step. None is ignored, as SIGINT
    would be in a shell's background."""
    cuts, batch = {}, betavae.batch
    before = {number: signal.signal(number, signal.SIG_DFL)
              for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def interrupting(dataset, seed, step, *rest):
        if step in cuts:
            signal.raise_signal(cuts.pop(step))
        return batch(dataset, seed, step, *rest)
    monkeypatch.setattr(betavae, 'batch', interrupting)
    yield cuts
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_run_cut_by_any_signal_equals_an_uncut_one_bit_for_bit(cuts, capsys):
    options = dict(steps=21, beta=4, beta_from=1, anneal=15, warmup=8, likelihood=None)
    train(**options, run='whole')
    before = signal.getsignal(signal.SIGTERM)
    cuts |= {3: signal.SIGINT, 6: signal.SIGTERM, 12: signal.SIGHUP, 20: signal.SIGINT}
    for step in (4, 7, 13):
        with pytest.raises(KeyboardInterrupt, match=f'stopped at step {step},.*--steps {step} '):
            train(**options)
        assert signal.getsignal(signal.SIGTERM) is before and state()['step'] == step
    assert main('compare', 'a') == 2
    shutil.copytree('a', 'ended')
    train(**options | dict(steps=13), run='ended')                      # ends where it stands
    assert read('ended/summary.json')['steps'] == 13
    assert state('ended')['seconds'] == state()['seconds']
    assert read_log('ended')['beta'][-1] == pytest.approx(3.4)
    capsys.readouterr()
    train(**options, run='ended')                                       # and is taken further
    assert 'resuming from step 13' in capsys.readouterr().out and not cuts
    a, b = state('whole'), state('ended')
    assert same(a['model'], b['model']) and all(same(a['adam'][i], b['adam'][i]) for i in a['adam'])
    assert torch.equal(a['log'][:, :-1], b['log'][:, :-1]) and same(a['frames'], b['frames'])
    assert list(a['frames']) == [1, 3, 8, 10, 16, 21]


def test_an_ignored_hangup_stops_no_run_and_no_thread_needs_signals(cuts, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    cuts[1] = signal.SIGHUP
    train(3)
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN and not cuts
    with data.ThreadPool(1) as pool:
        pool.apply(train, (2,), dict(run='thread'))
    assert state('thread')['step'] == 2


def test_killed_while_it_writes_a_run_ends_as_an_unbroken_one():
    program = f'''
import os, sys
sys.path.insert(0, {str(HERE)!r})
import test_betavae as t

def fsync(file, left=[*range(3 * 7)]):              # each step: settings, log, checkpoint
    left.pop() if left else os.kill(os.getpid(), 9)
t.data.os.fsync, t.betavae.SAVE_SECONDS = fsync, 0
t.train(run='killed')
'''
    child = subprocess.run([sys.executable, '-c', program], capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    partial, = Path('killed').glob('*.partial')         # the checkpoint is written last
    assert partial.name.startswith('settings') and state('killed')['step'] == 7
    train(run='killed')
    train()
    assert same(state()['model'], state('killed')['model'])
    assert not list(Path('killed').glob('*.partial'))


@pytest.mark.parametrize('change', [
    lambda good: b'', lambda good: good[:-100], lambda good: bytes(range(256)) * 20,
    lambda good: good.replace(good[9999:10009], b'0123456789'),
    None, dict(settings={}), dict(settings={'beta': 1.0}), dict(beta=Path())])  # no code is loaded
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_a_broken_or_foreign_checkpoint_is_refused_and_kept(change, trained):
    path = Path('a/checkpoint.pt')
    if callable(change):
        path.write_bytes(change(path.read_bytes()))
    else:
        torch.save(state() | change if change else {}, path)
    content = path.read_bytes()
    for call in (lambda: train(32), lambda: betavae.load('a')):
        with pytest.raises(data.UserError, match='a/checkpoint.pt is not a valid .*delete a$'):
            call()
    assert path.read_bytes() == content


def test_other_options_other_data_and_a_second_process_are_refused(trained):
    for word, options in ((r'--beta was 1\.0, now 2\.0', dict(beta=2)), ('past --steps 2', dict()),
                          ('its data has changed', dict(dataset=toy(flipped=True)))):
        with pytest.raises(data.UserError, match=word):
            train(32 if options else 2, **options)
    with data.locked(Path('a')), pytest.raises(data.UserError, match='a is being trained by an'):
        train(32)
    moved = toy()
    moved.source = 'elsewhere'
    train(31, moved)                                                    # free again
    assert state()['step'] == 31


def test_one_held_out_image_is_enough(drawn):
    few = data.Dataset('few', (1, 64, 64), {'a': 19}, numbered)
    for steps in (1, 2):
        train(steps, few, run='few', tc=True)
    assert len(state('few')['frames'][2]) == 1


def test_pictures_are_drawn_on_the_way_from_step_100_on(trained, monkeypatch):
    steps = []
    monkeypatch.setattr(betavae, 'draw', lambda *given: steps.append(given[3]['steps']))
    torch.save(state() | dict(step=95), 'a/checkpoint.pt')
    train(102)
    assert steps == [100, 102]                          # and not at 96, a picture step as well


def test_what_goes_wrong_with_files_is_said_in_one_line(trained, monkeypatch, capsys):
    before = Path('a/checkpoint.pt').read_bytes()
    resource = pytest.importorskip('resource')                          # not on Windows
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100000, limit[1]))   # as a full disk
        with pytest.raises(OSError, match='File too large.*checkpoint.pt'):
            train(32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert Path('a/checkpoint.pt').read_bytes() == before and not list(Path('a').glob('*.partial'))
    with monkeypatch.context() as patch, pytest.raises(MemoryError):    # no reason to delete a run
        patch.setattr(torch, 'load', Mock(side_effect=MemoryError))
        train(32)
    for code, error, expected in (
            (1, PermissionError(13, 'No', 'x'), "No: 'x'"), (1, MemoryError(), 'MemoryError'),
            (1, torch.OutOfMemoryError('out of\nmemory'), 'out of memory'),
            (3, FloatingPointError('it diverged'), 'it diverged'),
            (130, KeyboardInterrupt('stopped'), 'stopped')):
        monkeypatch.setattr(betavae, 'train', Mock(side_effect=error))
        assert main() == code
        said = capsys.readouterr().err
        assert expected in said and said.count('\n') == 1


@pytest.mark.parametrize('what', ['weights', 'exp_avg', 'exp_avg_sq'])
def test_what_is_not_finite_stops_the_run_and_is_not_saved(what, trained, monkeypatch):
    before, step = Path('a/checkpoint.pt').read_bytes(), torch.optim.Adam.step

    def spoil(self, *rest):
        step(self, *rest)
        weights = self.param_groups[0]['params'][0]
        (self.state[weights] | dict(weights=weights.data))[what].view(-1)[0] = math.inf
    monkeypatch.setattr(torch.optim.Adam, 'step', spoil)
    with pytest.raises(FloatingPointError, match='before step 31: .* of Adam is not .* a keeps'):
        train(31)
    assert Path('a/checkpoint.pt').read_bytes() == before


# Finished runs ------------------------------------------------------------------------------------

def cells(path):
    """A Markdown table as rows of strings, without the dashes."""
    rows = [re.split(r'(?<!\\)\|', line)[1:-1] for line in Path(path).read_text().splitlines()]
    return [[cell.strip().replace(r'\|', '|') for cell in row] for row in rows if row[0] != ' --- ']


def test_compare_tables_scores_and_charts(trained, capsys, monkeypatch):
    asked, charts, sheets = [], [], []
    score, chart, sheet = metrics.disentanglement_score, data.chart, data.sheet
    monkeypatch.setattr(data, 'sheet', lambda *a: sheets.append(a) or sheet(*a))
    monkeypatch.setattr(data, 'chart', lambda *a, **k: charts.append(a[0]) or chart(*a, **k))
    monkeypatch.setattr(metrics, 'disentanglement_score', lambda encode, sizes, **options:
                        asked.append(options) or score(encode, sizes, **options))
    command = ['compare', 'a', 'b', 'c', '--pairs', '2,1', '--factors', '2,3', '--train', 60,
               '--chart', 'beta:kl,mig', '--chart', 'kl:mig', '--out', 'out']
    assert main(*command) == 0
    assert Path('out/metric.md').read_text() in capsys.readouterr().out
    runs = [read(run, 'summary.json') | read(run, 'scores.json')['scores'] for run in 'abc']
    names = [f'accuracy_K{K}_L{L}_N60{kind}' for K in (2, 3) for L in (1, 2)
             for kind in ('', '_samples')]
    assert names == list(read('a/scores.json')['scores'])
    shown = dict(comparison=['reconstruction', 'kl', 'active_latents', 'linear_latents', 'mig',
                             'mig_samples', 'top_latent', 'top_latent_by_mean'],
                 factors=['share of row', 'share of column', 'share of dark|light'], metric=names)
    label = 'β 1, latents 3, batch 16, 30 steps'
    for title, columns in shown.items():
        head, both, last = cells(f'out/{title}.md')
        assert head == ['run', 'seeds', *(name.replace('_', ' ') for name in columns)]
        assert both[:2] == [label, '0, 1'] and last[1] == '0'
        percent, near = (1, 6e-4) if title == 'comparison' else (100, 0.051)
        for name, cell, lone in zip(columns, both[2:], last[2:], strict=True):
            a, b, c = (run[name] for run in runs)
            if 'top' in name:
                assert (cell, lone) == (f'{a}; {b}', c)
                continue
            expected = percent * np.array([(a + b) / 2, min(a, b), max(a, b), c])
            found = [float(word) for word in re.findall(r'[-\d.]+', f'{cell} {lone}')]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=near)
            assert ('%' in cell) == (percent == 100)
    assert len(asked) == 3 * 8 and len({run['weights'] for run in runs}) == 3
    # The metric itself: of an encoder by hand, with the seed of the run.
    pixels = torch.from_numpy(toy().images(np.arange(144))) / 255
    with torch.no_grad():
        mu, logvar = Plain().load(state('b')['model'].values()).encoder(pixels).split(3, 1)
    noise = np.random.default_rng(1).standard_normal((144, 3), np.float32)
    z = mu + (logvar / 2).exp() * torch.from_numpy(noise)
    for name, (K, L, codes) in zip(names, itertools.product((2, 3), (1, 2), (mu, z))):
        expected = score(lambda i: codes[i], (12, 6, 2), pairs=L, factors=[0, 1, 2][-K:],
                         train=60, test=30, rng=1)
        assert runs[1][name] == pytest.approx(expected, abs=0.01)       # to the point, of 30

    *panels, option, result, spectrum = itertools.chain(*charts)
    for panel, (K, kind) in zip(panels, itertools.product((2, 3), ('', '_samples')), strict=True):
        assert panel['title'].endswith(f'K = {K} N60' + kind.replace('_', ' '))
        a, b, c = np.array([[100 * run[f'accuracy_K{K}_L{L}_N60{kind}'] for L in (1, 2)]
                            for run in runs])
        both, last = panel['series'].values()
        expected = [[1, 2], (a + b) / 2, np.minimum(a, b), np.maximum(a, b)]
        np.testing.assert_allclose([*both, *last], [*expected, [1, 2], c, c, c])
    assert list(option['series']) == ['kl', 'mig']
    for name, series in option['series'].items():
        a, b, c = (run[name] for run in runs)
        expected = [[1, 3], [(a + b) / 2, c], [min(a, b), c], [max(a, b), c]]
        np.testing.assert_allclose(series, expected)
    a, b, c = (run['kl'] for run in runs)
    seeds, (x, y, *_) = result['series'].values()
    assert (x, y) == (c, runs[2]['mig']) and set(seeds[0]) == {a, b} and result['points']
    a, b, _ = (run['active_latents'] for run in runs)
    assert list(spectrum['lines']) == [0.5, 1.5] and spectrum['lines'][0.5] == (
        f"{runs[0]['linear_latents']} predicted, active:    {label}: {a}, {b}")
    run = betavae.read_run(Path('a'))                   # one β, but not one number of latents
    betavae.draw_comparison(Path('out'), {
        name: [run | dict(linear_latents=n)] for name, n in (('p', 1), ('q', 2), ('r', 1))}, toy())
    assert charts[-1][0]['lines'] == {0.5: f'1 predicted, active:    p: {a}    r: {a}    '
                                           f'2 predicted, active:    q: {a}'}
    (images, labels, _), *_ = sheets
    model = betavae.load('c')
    mu, logvar = betavae.codes_of(model, toy().images(toy().held_out(1000)))
    assert torch.equal(images[1], betavae.means_of(model, betavae.top_latent(mu, logvar)[0]))
    assert labels[1] == f"β 3, latents 3, batch 16, 30 steps: {runs[2]['top_latent']}"
    for name in ('comparison.jpg', 'spectrum.png', 'metric.png', 'beta-kl-mig.png', 'kl-mig.png'):
        Image.open(f'out/{name}').load()
    assert main(*command) == 0 and len(asked) == 24                     # nothing is computed twice
    kept = read('b/scores.json')
    Path('b/scores.json').write_text(json.dumps(kept | dict(weights='others')))
    assert main('compare', 'b', '--pairs', '1', '--train', 60) == 0 and len(asked) == 26
    assert [*asked[-1]['factors']] == [0, 1, 2]                         # all of them
    Path('a/checkpoint.pt').unlink()                                    # published: only tables
    capsys.readouterr()
    assert main('compare', 'a', 'b', 'c') == 0 and 'no pictures' in capsys.readouterr().out
    assert main('compare', 'a', 'b', 'c', '--pairs', 5) == 2


def test_a_chart_against_an_option_names_what_else_varies(monkeypatch):
    monkeypatch.setattr(data, 'chart', lambda panels: panels[0]['series'])
    runs = [vars(betavae.options(beta=beta, tc=tc, leak=leak)) | dict(kl=beta)
            for beta, tc, leak in ((1, False, 0.2), (4, False, 0.2), (6, True, 0))]
    assert list(betavae.chart_of(runs, 'beta:kl')) == ['leak 0.2', 'leak 0.0, tc']


def test_of_more_than_a_million_images_only_those_asked_for_are_encoded(trained, capsys):
    drawn = []
    dataset = data.Dataset('big', (1, 64, 64), {'a': 10 ** 6 + 1},
                           lambda index: drawn.extend(index.tolist()) or toy().draw(index % 144))
    encode = betavae.encoder(dict(folder=Path('a'), seed=0, precision='fp32'), dataset, total=4)
    assert not drawn
    mu, _ = betavae.codes_of(betavae.load('a'), toy().images([3, 4]))
    np.testing.assert_allclose(encode([3, 4 + 144])[:, 0], mu, atol=1e-6)
    assert 'a: 2 of 4 images encoded  ' in capsys.readouterr().out
    assert np.abs(encode([3, 4])[:, 1] - mu.numpy()).min() > 0 and len(drawn) == 4


def test_runs_that_cannot_be_compared(trained, capsys, monkeypatch):
    def refused(word, *words):
        assert main('compare', *words) == 2
        error = capsys.readouterr().err
        assert error.startswith('betavae: ') and error.count('\n') == 1 and word in error, error
    refused('takes 2 to 3', 'a', '--pairs', 1, '--factors', 4)
    refused('no run has both', 'a', '--chart', 'beta:nothing')
    Path('d').mkdir()
    shutil.copy('a/settings.json', 'd')
    Path('d/summary.json').write_text(json.dumps(read('a/summary.json') | dict(dataset={})))
    refused('more than one data set', 'a', 'd')
    Path('b/settings.json').write_text(json.dumps(read('b/settings.json') | dict(precision='bf16')))
    assert main('compare', 'a', 'b') == 0                               # not one row
    label = 'β 1, latents 3, batch 16, 30 steps, '
    assert [row[0] for row in cells('comparison.md')[1:]] == [label + 'fp32', label + 'bf16']
    capsys.readouterr()
    Path('b/summary.json').write_text('{}')
    refused('not the folder of a finished run', 'b')
    Path('b/summary.json').write_text('{')
    refused('b/summary.json is damaged', 'b')
    shutil.copytree('c', 'b', dirs_exist_ok=True)
    Path('b/settings.json').write_text(json.dumps(read('b/settings.json') | dict(steps=99)))
    refused('--steps and the step it had reached', 'b')
    monkeypatch.setattr(data, 'load', lambda *_: toy(flipped=True))
    refused('other images', 'a', '--pairs', '1')
    monkeypatch.setattr(data, 'load', LOAD)
    refused('new --data', 'a', '--pairs', '1')


def test_labels_tell_runs_apart_and_what_is_left_open_is_settled(monkeypatch):
    small = dict(latents=6, leak=0, batch=8, lr=1e-3, warmup=5)
    for options, label in (
            ({}, 'β 1'), (dict(seed=3), 'β 1'), (dict(tc=True, beta=6), 'TC β 6'),
            (dict(beta=100, anneal=40000), 'β 0 → 100 over 40,000'),
            (dict(capacity=25), 'C 25, gamma 1000'),
            (small, 'β 1, latents 6, leak 0, batch 8, lr 0.001, warmup 5')):
        s = betavae.settle(betavae.options(device='cpu', **options), toy(3))
        assert betavae.describe(s) == label and s.likelihood == 'gaussian'
        words = label.translate({ord('β'): 'beta', ord(','): None, ord('→'): None}).split()
        assert s.run == '-'.join(['runs/toy', *words] + ['seed-3'] * (s.seed == 3))
    for gpu, has, device, precision in ((False, True, 'cpu', 'bf16'), (False, False, 'cpu', 'fp32'),
                                        (True, True, 'cuda', 'fp32')):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
        monkeypatch.setattr(betavae, 'has_bf16', lambda: has)
        s = betavae.settle(betavae.options(), toy())
        assert (s.likelihood, s.latents, s.batch) == ('bernoulli', 32, 64)
        assert (s.device, s.precision) == (device, precision)
    assert betavae.usual_latents('dsprites') == 10
    with pytest.raises(data.UserError, match='than the 136 training'):
        betavae.settle(betavae.options(batch=137), toy())
    named = toy()
    named.source = '/photos/α_1 β.zip'
    assert betavae.settle(betavae.options(), named).run == 'runs/α_1-beta-beta-1'


# The command line and the script ------------------------------------------------------------------

BAD_OPTIONS = """
    --beta -1 | --beta nan | --beta inf | --beta four | --beta | --beta-from 3 | --anneal 1.5
    --latents 0 | --latents 513 | --batch 0 | --steps 0 | --steps 10000000000 | --lr 0 | --seed -1
    --warmup -1 | --seed 4294967296 | --crop 0 | --crop 128 | --data nowhere | --leak 1.5
    --data dsprites --crop 64 | --likelihood poisson | --device tpu | --device cuda | --bet 3
    --precision fp8 | --tc --batch 1 | --tc --capacity 5 | --capacity nan | --capacity 5 --beta 2
    --capacity 5 --beta-from 1 --anneal 9 | --gamma 5 | surplus | score | compare
    compare nowhere | compare nowhere --pairs 0 | compare nowhere --pairs 1000001
    compare nowhere --pairs x | compare nowhere --train 1 | compare nowhere --chart beta"""


@pytest.mark.parametrize('words', re.split(r'\s*[|\n]\s*', BAD_OPTIONS.strip()))
def test_bad_options_end_in_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert main(*words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith('betavae: ') and error.count('\n') == 1
    assert not Path('runs', 'faces-beta-1').exists()


def test_help_on_an_ascii_terminal_and_what_a_run_announces(monkeypatch, capsys):
    out = io.TextIOWrapper(io.BytesIO(), 'ascii')
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'stdout', out)
        assert main('--help') == 0 and main('compare', '--help') == 0
    help = out.buffer.getvalue().decode()
    assert 'python betavae.py --beta 100 --anneal 40000' in help and 'of the KL term' in help
    monkeypatch.setattr(data, 'load', lambda *_: toy())
    words = '--device cpu --beta 4 --anneal 9 --warmup 7 --steps 5 --batch 4'.split()
    assert main(*words) == 0
    error = capsys.readouterr().err
    for what in ('9 steps, and there are 5', '7 steps, and there are 5'):
        assert what in error


def script(*words, python=sys.executable):
    return subprocess.run([HERE / 'run_all.sh', *words], capture_output=True, text=True,
                          env=os.environ | dict(PYTHON=python))


def test_run_all_prints_the_eight_runs_and_refuses_once():
    lines = script('--seed', '7', '--print').stdout.splitlines()
    assert all(line == line.rstrip() for line in lines)     # or xargs -L takes them for one
    runs = [betavae.options(*shlex.split(line)[2:]) for line in lines]
    assert [(Path(s.run).name, s.beta_from, s.beta, s.anneal, s.steps, s.seed) for s in runs] == [
        ('VAE', None, 1, 0, 50000, 7), ('10-Beta-VAE', None, 10, 0, 50000, 7),
        ('100-Beta-VAE', None, 100, 0, 50000, 7),
        ('1000-Beta-VAE', None, 1000, 0, 50000, 7), ('10000-Beta-VAE', None, 10000, 0, 50000, 7),
        ('KLD_Anneal_40000_steps-10-Beta-VAE', None, 10, 40000, 50000, 7),
        ('KLD_Decrease_40000_steps-100to1-Beta-VAE', 100, 1, 40000, 50000, 7),
        ('KLD_Decrease_100000_steps-10000to1-Beta-VAE', 10000, 1, 100000, 125000, 7)]
    runs_of = {}
    for group in re.findall('^    (\\w+)  ', script('--help').stdout, re.M):
        lines = script('--print', group).stdout.splitlines()
        runs_of[group] = len({betavae.options(*shlex.split(line)[2:]).run for line in lines})
    assert runs_of == dict(eight=8, short=33, latents6=4, dsprites=21, capacity=1)
    for wrong in (['dsprite'], ['--betta', '3']):
        found = script(*wrong)
        assert found.returncode == 2 and found.stderr.count('\n') == 1


def test_run_all_goes_on_after_a_divergence_and_after_nothing_else():
    for code, runs in (3, 8), (1, 1):
        Path('python').write_text(f'#!/bin/sh\nexit {code}\n')
        Path('python').chmod(0o755)
        done = script(python='./python')
        assert (done.stdout.count('== '), done.returncode) == (runs, 1)


def test_run_all_passes_signals_on_at_once():
    process = subprocess.Popen([HERE / 'run_all.sh', '--batch', '4'], stdout=subprocess.PIPE,
                               text=True, env=os.environ | dict(PYTHON=sys.executable))
    for line in process.stdout:
        if line.startswith('step'):
            process.terminate()
    assert process.wait() == 130 and state('runs/VAE')['step'] < 50000


# The pages ----------------------------------------------------------------------------------------

PAGES = [(HERE / page).read_text() for page in ('README.md', 'results/README.md')]


def blocks(page, language):
    return re.findall(rf'^```{language}\n(.*?)^```', page, re.M | re.S)


def test_the_snippets_of_the_pages_run(monkeypatch):
    monkeypatch.setattr(betavae, 'Run', betavae.Run)                    # restored afterwards
    monkeypatch.setattr(data, 'load', functools.cache(data.load))       # most of them load faces
    shorter = {'steps=1000': 'steps=2', 'range(200)': 'range(2)', 'range(45)': 'range(1)',
               'pairs=20': 'pairs=1', 'train=1000, test=500': 'train=50, test=20',
               'factors=[1, 2, 3, 4]': 'factors=[1, 2, 3, 4], train=50, test=20', '(500,': '(2,',
               'size=2000': 'size=50', 'size=10000': 'size=50', 'samples=500': 'samples=50',
               'np.arange(len(dsprites)), 200': 'np.arange(60), 2',
               'reshape(len(index), -1)': 'reshape(len(index), -1)[:, ::9]'}
    Path('results').symlink_to(HERE / 'results')
    Path('btcvae_dsprites').mkdir()                                     # weights from elsewhere
    shapes = dict(conv1=(32, 1, 4, 4), conv2=(32, 32, 4, 4), conv3=(32, 32, 4, 4),
                  conv_64=(32, 32, 4, 4), lin1=(256, 512), lin2=(256, 256), mu_logvar_gen=(20, 256))
    weights = {f'encoder.{name}.weight': torch.randn(shape) / 9 for name, shape in shapes.items()}
    weights |= {name.replace('weight', 'bias'): w.flatten(1)[:, 0] for name, w in weights.items()}
    torch.save(weights, 'btcvae_dsprites/model.pt')
    train(1, toy(3), latents=32, run='runs/faces-beta-10')
    train(1, run='runs/dsprites-beta-4-seed-0')
    for page in PAGES:
        names = {}
        for block in blocks(page, 'python'):
            exec(re.sub('|'.join(map(re.escape, shorter)), lambda m: shorter[m[0]], block), names)
    assert Path('own.jpg').exists() and Path('faces.png').exists()      # one of each page


def test_the_commands_of_the_pages_parse_and_three_run(monkeypatch):
    monkeypatch.setattr(betavae, 'summarise', lambda *_: dict(collapsed=False))
    lines = [line for page in PAGES for line in ''.join(blocks(page, 'sh')).splitlines()
             + re.findall('`([^`]+)`', page.replace('\n', ' '))]
    commands = [shlex.split(line)[2:] for line in lines if line.startswith('python betavae.py ')]
    training = [words for words in commands if not {'compare', 'photos.zip', 'S', '…'} & {*words}]
    for words in training:
        betavae.options(*words)
    for words in commands:
        if words[0] == 'compare':
            betavae.compare_parser().parse_args(words[1:])
    for line in lines:
        if line.startswith('./run_all.sh'):
            assert script('--print', *shlex.split(line)[1:]).returncode == 0
    assert '--anneal' in training[1]
    for words in training[:3]:
        assert main(*words, '--steps', 5, '--batch', 4) == 0


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
    own.draw = lambda index: torch.zeros(len(index), 1, 64, 64, dtype=torch.uint8)  # where we are
    assert own.images(torch.zeros(300, dtype=torch.int64, device='meta')).device.type == 'meta'
    own.draw = numbered
    for bad in (3, [1.0], [True], ['a'], None, [[0]], torch.tensor(3), torch.ones(2)):
        with pytest.raises(TypeError, match='are integers .n,.'):
            own.images(bad)
    for bad in ([400], [0, -1], torch.tensor([400]), np.array([2 ** 64 - 1], np.uint64)):
        with pytest.raises(IndexError, match='0 to 399'):
            own.images(bad)


def test_a_data_set_that_contradicts_itself_or_its_draw_is_refused():
    for shape in ((1, 32, 32), (4, 64, 64)):
        with pytest.raises(ValueError, match='shape must be'):
            data.Dataset('own', shape, {'a': 2}, numbered)
    for wrong in (lambda x: x.float(), lambda x: x[:1], lambda x: x.numpy(), lambda x: x[:, 0]):
        own = data.Dataset('own', (1, 64, 64), {'a': 9}, lambda index: wrong(numbered(index)))
        with pytest.raises(TypeError, match=r'uint8 tensor of shape \(3, 1, 64, 64\)'):
            own.images([0, 1, 2])
    for sizes in itertools.product((1, 3, 4, 10, 19, 20, 38), repeat=3):
        index = np.arange(0, n := math.prod(sizes), 19)             # what is held out
        held = [len(set(v)) for v in np.unravel_index(index, sizes)]
        try:
            data.Dataset('own', (1, 64, 64), dict(zip('abc', sizes)), numbered)
        except ValueError as error:
            assert 'held out' in str(error) and held != list(sizes)
        else:
            assert held == list(sizes) or n < 19 * 19 * max(sizes)      # too few to hold them all


def test_identity_changes_with_all_that_matters():
    def identity(name='own', draw=numbered, factors={'a': 20, 'b': np.int64(3)}):
        return data.Dataset(name, (1, 64, 64), factors, draw).identity()
    assert identity() == identity('moved') == json.loads(json.dumps(identity()))

    def nudged(index):                                  # as another processor may round
        x = numbered(index).clone()
        x[:, :, 0, 0] ^= 1
        return x
    drawn = functools.partial(identity, factors=data.FACES)
    assert drawn() == drawn(draw=nudged) != drawn(draw=lambda index: 255 - numbered(index))
    others = [identity(factors={'b': 3, 'a': 20}), identity(factors={'a': 60}),
              identity(draw=nudged), identity(draw=lambda index: 255 - numbered(index)),
              identity(draw=lambda i: numbered(i) + (i == 59).byte().view(-1, 1, 1, 1))]
    assert len({identity['sha256'] for identity in [identity(), *others]}) == 6


def test_held_out_and_training_parts_are_apart():
    for n in (2, 18, 19, 20, 39, 1000):
        d = data.Dataset('toy', (1, 64, 64), {}, None, size=n)
        trained, held = set(d.train_index(np.arange(d.train_size))), set(d.held_out(10 ** 6))
        assert held == set(range(0, n, 19)) and trained == set(range(n)) - held
    assert len(set(d.held_out(20))) == 20 and np.array_equal(d.held_out(20), d.held_out(20))
    assert max(d.held_out(20)) > 20 * 19                                # a draw


def test_drawn_dsprites_equal_160_genuine_frames_bit_for_bit():
    """Those of the animation in DeepMind's repository: for each shape scales and orientations, for
    the heart positions, too. The hash is of the frames."""
    there, back = np.r_[2:31:2, 31], np.r_[29:0:-2, 0]
    around = np.r_[there, 31 + 32 * there, 31 * 32 + back, 32 * back]           # 32 x + y
    index = np.concatenate([245760 * shape + np.r_[
        40960 * np.r_[0, 2, 4, 5, 3, 1, 0, 2, 4], 40960 * 5 + np.r_[
            0, 1024 * np.r_[37:0:-2, 0], around if shape == 2 else []],
        40960 * np.r_[3, 1]] for shape in (2, 1, 0)]).astype(int)
    d = data.load('dsprites')
    images = d.images(index)
    assert hashlib.sha256(np.packbits(images > 0).tobytes()).hexdigest() == (
        '75dc01cf48e3748a94cbfc8648dd7dc88714001901eeaa334b091b570a8579c9')
    assert len(index) == 160 and set(np.unique(images)) == {0, 255}
    assert d.factors == {
        'shape': 3, 'scale': 6, 'orientation': 40, 'x position': 32, 'y position': 32}


@pytest.mark.skipif('DSPRITES_NPZ' not in os.environ,
                    reason='the variable DSPRITES_NPZ does not name the official file')
def test_drawn_dsprites_equal_all_737280_of_the_official_file_bit_for_bit():
    assert np.array_equal(data.read_dsprites(os.environ['DSPRITES_NPZ']), data.draw_dsprites())


def test_the_official_file_loads_through_the_same_interface(monkeypatch):
    monkeypatch.setattr(data, 'DSPRITES', dict(data.DSPRITES, shape=1, scale=1, orientation=5))
    drawn = data.load('dsprites').images(np.arange(5120))
    np.savez_compressed('official.npz', imgs=drawn[:, 0] // 255, metadata=np.array([None]))
    official = data.load('official.npz')
    assert np.array_equal(official.images(np.arange(5120)), drawn)
    assert official.factor_sizes == (1, 1, 5, 32, 32)
    Path('cut.npz').write_bytes(Path('official.npz').read_bytes()[:3000])
    np.savez('other.npz', imgs=np.zeros((5, 64, 64), np.uint8))
    for name in ('cut.npz', 'other.npz', 'nowhere.npz'):
        with pytest.raises(data.UserError, match=f'{name} is not dSprites'):
            data.load(name)
    with pytest.raises(data.UserError, match='--crop is for your own'):
        data.load('official.npz', crop=64)


def test_the_faces_are_those_of_the_results():
    """Weighted sums over fixed faces, within what another processor may round differently; and what
    is worth a latent, λ > β/2: nothing at β = 1000, a few at 100, about ten at 10."""
    d, rng = data.load('faces'), np.random.default_rng(0)
    x = d.images(rng.integers(len(d), size=400)).astype(int)
    sums = [int((x * rng.integers(-9, 10, size=x.shape)).sum()) for _ in range(2)]
    assert sums == pytest.approx([1177398, 544529], abs=1000)
    lambdas = betavae.spectrum(d)
    assert lambdas[0] == pytest.approx(230, abs=10)
    assert 2 <= (lambdas > 50).sum() <= 4 and 7 <= (lambdas > 5).sum() <= 12


# Your own images ----------------------------------------------------------------------------------

def save(name, mode='RGB', colour=(200, 100, 50), size=(64, 64), **options):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(name, **options)


def test_a_folder_and_a_zip_of_images(monkeypatch, tmp_path):
    folder = Path('pictures, x**y [β\n]/deep')                                  # odd, and allowed
    for k in range(30):
        save(folder / f'{k:02}.PNG', colour=(k * 8, 0, 255 - k * 8), size=(100, 80))
    for hidden in ('.hidden.png', '../.git/a.png', '../__MACOSX/a.png', 'a.png/notes.txt'):
        Path(folder, hidden).parent.mkdir(exist_ok=True)
        Path(folder, hidden).write_text('no image')
    d = data.load(folder.parent)
    assert (len(d), d.name, d.factors) == (30, folder.parent.name, {})
    assert d.images([7])[0, :, 5, 5].tolist() == [56, 0, 199]
    with zipfile.ZipFile('p.zip', 'w') as archive:
        for file in filter(Path.is_file, folder.parent.rglob('*')):
            archive.write(file)
    z = data.load('p.zip', crop=64)
    assert (z.name, z.crop, z.source) == ('p', 64, str(tmp_path / 'p.zip'))
    assert np.array_equal(z.images(np.arange(30)), d.images(np.arange(30)))
    monkeypatch.setattr(data, 'decode', None)               # from elsewhere it is not decoded again
    monkeypatch.chdir('/')
    assert np.array_equal(data.load(tmp_path / folder.parent).images([7]), d.images([7]))


def test_a_zip_that_changes_in_place_is_decoded_again():
    for grey in 10, 20:
        with zipfile.ZipFile('p.zip', 'w') as archive:
            archive.writestr('a.pgm', b'P5 4 4 255\n' + bytes([grey] * 16))
        assert (data.load('p.zip').images([0]) == grey).all()


def test_every_kind_of_picture_comes_out_right():
    """The colour that a person sees, to within JPEG's and CMYK's rounding."""
    usual = 200, 100, 50
    kinds = {'a.png': ('L', 100, 100), 'b.png': ('RGBA', (*usual, 0), 255),     # transparent: white
             'c.jpg': ('CMYK', (0, 128, 255, 0), (255, 127, 0)),
             'd.png': ('I;16', 257 * 77, 77), 'e.tif': ('I;16', 257 * 77, 77)}
    kinds |= {f'x.{kind}': ('RGB', usual, usual) for kind in 'bmp gif jpg png ppm webp'.split()}
    for name, (mode, colour, _) in kinds.items():
        save(f'p/{name}', mode, colour, quality=95, lossless=True)
    found = data.load('p').images(np.arange(11))[:, :, 30, 30]
    for (name, (*_, seen)), pixel in zip(kinds.items(), found):
        np.testing.assert_allclose(pixel, seen, atol=3, err_msg=name)
    turned = Image.new('RGB', (100, 200), 'black')      # turned right by 90°, as EXIF demands, …
    turned.paste('white', (25, 50, 75, 100))            # … this is right of the middle
    exif = turned.getexif()
    exif[0x0112] = 6
    Path('q').mkdir()
    turned.save('q/turned.png', exif=exif)
    for crop, white in (None, 1 / 4), (40, 1 / 2):      # the centred square: 100, or --crop
        x = data.load('q', crop).images([0])[0]
        assert (x[0, 32, [3, 60]] == [0, 255]).all()
        assert x.mean() == pytest.approx(255 * white, abs=2)


def test_a_cache_is_of_these_images_or_made_again():
    for k in range(20):
        save(f'p/{k:02}.png', colour=(k, k, k))
    first = data.load('p')
    save('p/20.png', colour=(20, 20, 20))
    for time_of_20, crop, caches in ((9, None, 2), (9, 32, 3), (0, None, 4), (9, None, 4)):
        os.utime('p/20.png', (0, time_of_20))
        x = data.load('p', crop).images(np.arange(21))
        assert len(list(Path('home/betavae').glob('p-*'))) == caches
    assert (x == np.arange(21)[:, None, None, None]).all()
    assert np.array_equal(first.images(np.arange(20)), x[:20])


def test_bad_sources_are_named_in_one_line_and_leave_nothing():
    def encoded(pixels, form):
        Image.fromarray(pixels).save(buffer := io.BytesIO(), form)
        return buffer.getvalue()
    jpeg = encoded(np.zeros((64, 64, 3), np.uint8), 'JPEG')
    with zipfile.ZipFile(good := io.BytesIO(), 'w') as archive:
        archive.writestr('a.jpg', jpeg)
    good = good.getvalue()
    encrypted = [good.index(b'PK\1\2') + 8, good.index(b'PK\3\4') + 6]          # two flags
    files = {
        'cut/a.jpg': (jpeg[:400], 'a.jpg: '),
        'program/a.jpg': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'cannot identify'),
        'float/a.tif': (encoded(np.full((64, 64), 0.5, np.float32), 'TIFF'), 'a.tif: neither 8'),
        'deep/a.tif': (encoded(np.full((64, 64), 10 ** 5, np.int32), 'TIFF'), 'a.tif: neither 8'),
        'small\nones/a.png': (encoded(np.zeros((50, 90), np.uint8), 'PNG'),
                              'a.png is 90 × 50, smaller than --crop 64'),
        'no image/a.txt': (b'', 'no readable images'), 'a.txt': (b'', 'nor a readable .zip'),
        'cut.zip': (good[:200], 'nor a readable .zip'),
        'locked.zip': (bytes(c | (i in encrypted) for i, c in enumerate(good)), 'is encrypted')}
    for path, (content, _) in files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)
    words = {path.partition('/')[0]: word for path, (_, word) in files.items()}
    for source, word in (words | {'nowhere': 'No such file', '': 'is empty'}).items():
        with pytest.raises(data.UserError) as error:
            data.load(source, crop=64 if 'small' in source else None)
        assert word in str(error.value) and '\n' not in str(error.value), error
        assert not list(Path('home').glob('*/*'))


def test_one_bad_image_in_a_hundred_is_skipped_and_three_are_named(capsys):
    Path('p').mkdir()
    for k in range(500):
        grey = b'P5 4 4 255\n' + bytes([k % 256] * 16)
        Path(f'p/{k:03}.pgm').write_bytes(grey if k % 100 else b'no')
    d = data.load('p')
    out, error = capsys.readouterr()
    assert len(d) == 495 and 'skipped 000.pgm: cannot identify' in error and error.count('\n') == 3
    assert '500 of 500 images decoded' in out
    assert d.images([0, 494])[:, 0, 9, 9].tolist() == [1, 499 % 256]
    Path('p/077.pgm').write_bytes(b'no')
    with pytest.raises(data.UserError, match='more than 1 %'):
        data.load('p')


# Files and progress -------------------------------------------------------------------------------

def test_write_replaces_a_file_whatever_happens(monkeypatch):
    path, sizes = Path('a [b] **.txt'), []
    data.write(path, b'old')
    with monkeypatch.context() as patch:                # all is on the disk before it is in place
        patch.setattr(data.os, 'fsync', lambda file: sizes.append(os.fstat(file).st_size))
        data.write(path, lambda file: data.write(path, b'another') or file.write(b'new'))
    assert sizes == [7, 3]
    for what, error, words in (('fsync', KeyboardInterrupt, None), ('fsync', OSError('odd'), 'odd'),
                               ('fsync', OSError(28, 'No space left'), 'No space left'),
                               ('replace', OSError(13, 'Permission denied'), 'denied')):
        with monkeypatch.context() as patch, pytest.raises(
                (OSError, KeyboardInterrupt), match=words) as caught:
            patch.setattr(data.os, what, Mock(side_effect=error))
            data.write(path, b'lost')
        assert getattr(caught.value, 'filename', str(path)) == str(path)
        assert path.read_bytes() == b'new' and list(Path().iterdir()) == [path]
    for letter, age in ('a', 0), ('b', 7200):           # of a live process, and of one long dead
        Path(f'x.{letter * 8}.partial').touch()
        os.utime(f'x.{letter * 8}.partial', (0, time.time() - age))
    Path('x.cccccccc.partial').symlink_to('nowhere')    # as if another process removed it just now
    data.write(path, b'')
    assert {file.name[:3] for file in Path().iterdir()} == {'a [', 'x.a', 'x.c'}


@pytest.mark.parametrize('shell, printed', [
    ('"$@"', b'? 0\n? 1\n'), ('"$@" >&-', b''), ('"$@" | head -c 1', b'?'),
    ('"$@" 2>&-', b'? 0\n? 1\n'), ('"$@" 2> >(true)', b'? 0\n? 1\n')])
def test_what_cannot_be_printed_stops_nothing(shell, printed):
    """An ASCII terminal, a closed output, a cut pipe: status 0, no complaint. Without
    torch, whose import takes seconds: printing does not need it."""
    program = '''
import sys, time, types
sys.modules["torch"] = types.ModuleType("torch")
sys.path.insert(0, sys.argv[1])
import data
for k in range(2):
    data.say(f"β {k}")
    data.say(" ", file=sys.stderr, end="")
    assert not data.on_terminal()
    time.sleep(0.3)
with open("said", "w") as file:
    data.say("at once", file=file)
    assert open("said").read().split() == ["at", "once"]
data.write("end", b"")
'''
    command = ['bash', '-o', 'pipefail', '-c', shell, '-', sys.executable, '-c', program, HERE]
    ascii_only = dict(os.environ, PYTHONIOENCODING='ascii', PYTHONUNBUFFERED='')
    result = subprocess.run(command, env=ascii_only, capture_output=True)
    assert (result.returncode, Path('end').exists(), result.stderr.strip()) == (0, True, b'')
    assert result.stdout.replace(b' ', b'') == printed.replace(b' ', b'')


def test_progress_tells_the_time_left_by_the_last_minute(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: clock[0])
    progress = data.Progress(1000, done=100, size=64)
    for now, done in ((1, 101), (20, 120), (39, 139), (58, 158), (97, 162), (236, 166)):
        clock[0] = now
        progress.show(done, lambda: f'step {done}')
        clock[0] += 9
        progress.show(done + 1, lambda: 'so soon')
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 6                                               # the first one at once
    assert told[1] == 'step 120  15 min left  64 images/s'              # 1 step a second
    assert told[-2:] == ['step 162  35 min left  25 images/s',          # slowed to 23 in 58 seconds
                         'step 166  8.1 h left  2 images/s']            # and to 4 in 139
    monkeypatch.setattr(data, 'on_terminal', lambda: True)
    clock[0] = 236.6                                                    # twice a second
    progress.show(170, lambda: 'x' * 500)
    out = capsys.readouterr().out
    assert out.startswith('\rxxx') and out.endswith('\x1b[K') and len(out) < 200
    progress.show(1000, lambda: 'the end')                              # whenever it comes
    assert capsys.readouterr().out.endswith('\n')


# Pictures -----------------------------------------------------------------------------------------

def pixels_of(picture, colour, near=0):
    """Where a picture has a colour, or nearly: rows (x, y)."""
    away = np.abs(np.asarray(picture).astype(int) - ImageColor.getrgb(colour)).max(2)
    return np.argwhere(away <= near)[:, ::-1]


def test_a_sheet_shows_every_image_in_its_place():
    images = np.random.default_rng(0).integers(256, size=(2, 3, 3, 64, 64), dtype=np.uint8)
    plain = np.asarray(data.sheet(torch.from_numpy(images), scale=1))
    tiles = plain.reshape(2, 66, 3, 66, 3)[:, 1:65, :, 1:65]                # (2, 64, 3, 64, 3)
    assert np.array_equal(tiles.transpose(0, 2, 4, 1, 3), images)
    grey = np.asarray(data.sheet(images[:, :, :1], scale=1))
    assert (grey[1:65, 1:65] == images[0, 0, 0, :, :, None]).all()
    full = data.sheet(images, ['β', 'two\nlines ' * 9], 'title ' * 40, ['a note', 'é'], scale=1)
    body = np.asarray(full)[:, -3 * 66:]                        # labels stand left of the images …
    top = next(y for y in range(full.height) if np.array_equal(body[y:y + 132], plain))
    assert 40 < top < full.height - 132 - 30                    # … title above, notes below
    assert (np.asarray(full)[top:top + 66, :-3 * 66] < 100).any()
    assert data.sheet(images).width == 3 * 130                  # twice as large, if that fits
    assert data.latin('é → β') == 'e to beta'
    assert data.sheet(np.tile(images, (1, 8, 1, 1, 1))).width <= 900


@pytest.mark.parametrize('log, decades, labels', [
    (False, 1, '-1 0 1 2 3'), (True, 1, '0.1 1 10 100 1,000'), (True, 0.5, '0.5 1 2 5 10 20')])
def test_a_chart_shows_its_points_where_its_axes_say(log, decades, labels):
    """The markers, found by their colour, against places computed from the gridlines' labels."""
    x, y = np.array([0, 2, 4, np.nan, 8, 10]), np.array([1, 0, np.nan, 3, 2, -1])
    values = 10.0 ** (decades * y) if log else y
    panel = dict(title='', x='', series={'': (x, values)}, points=True, log_y=log)
    picture = data.chart([panel], (460, 320))
    left = pixels_of(picture, '#b0b0b0')[:, 0].min()
    x_at, x_ticks = data.axis(x, left, 444)
    y_at, y_ticks = data.axis(values, 278, 50, log)
    for ticks, at in ((x_ticks, x_at), (y_ticks, y_at)):
        for place, label in ticks:
            assert at(float(label.replace(',', ''))) == pytest.approx(place)
    assert [label for _, label in y_ticks] == labels.split()
    found = pixels_of(picture.crop((left + 2, 50, 444, 276)), data.INK) + [left + 2, 50]
    expected = np.stack([x_at(x), y_at(values)], 1)[[0, 1, 4, 5]]
    away = np.abs(found[:, None] - expected).max(2)                         # (pixels, markers)
    middles = [found[away[:, k] < 5].mean(0) for k in range(4)]
    assert (away.min(1) < 5).all() and np.abs(middles - expected).max() < 1


def test_a_chart_has_lines_gaps_bars_rules_and_a_legend_and_four_are_two_and_two():
    blue, orange = data.COLOURS[:2]
    panel = dict(title='t', x='x', limits=(0, 10), series={
        'a' * 40: ([0, 1, 2, 3, 4], [5, 5, np.nan, 5, 5]), 'b': ([2, 2], [2, 2], [1, 1], [3, 3])})
    picture = data.chart([panel], (400, 300))
    plot = picture.crop((0, 0, 400, 300))
    columns = np.unique(pixels_of(plot, blue)[:, 0])
    assert (np.diff(columns) > 60).sum() == 1 and len(columns) > 100        # one gap, else joined
    bar = pixels_of(plot, orange, 60)
    assert np.ptp(bar[:, 1]) == pytest.approx(2 * 208 / 10.8, abs=2)             # from 1 to 3
    for y, colour in (300, blue), (322, orange):                            # the legend's rows
        assert len(pixels_of(picture.crop((0, y, 400, y + 22)), colour))
    alone = data.chart([dict(panel, series={'': (range(99), [5] * 98 + [50])})], (400, 300))
    inked = pixels_of(alone.crop((50, 30, 380, 260)), data.INK)[:, 1]
    assert alone.height == 300 and inked.min() == 20                # no legend; cut at the limit
    lines = {1: 'low', 5: 'β/2', 11: 'far'}
    lined = data.chart([dict(panel, series={}, lines=lines)], (400, 300))
    y_at, _ = data.axis((0, 10), 258, 50)
    rules = np.flatnonzero(np.bincount(pixels_of(lined, data.GREY)[:, 1]) > 300)
    np.testing.assert_allclose(rules, y_at([5, 1]), atol=1)                 # none for `far`
    assert len(pixels_of(lined.crop((60, rules[0] - 28, 384, rules[0] - 1)), data.GREY, 90))
    panels = [dict(panel, title=title) for title in 'abcd']
    four = data.chart(panels, (400, 300))
    for k, one in enumerate(panels):
        x, y = k % 2 * 400, k // 2 * 300
        alone = data.chart([one], (400, 300)).crop((0, 0, 400, 300))
        assert four.crop((x, y, x + 400, y + 300)) == alone
    assert data.chart([panel] * 3).width == 900 and data.chart([panel], (640, 300)).width == 640


@pytest.mark.parametrize('ys', [
    [10, 10], [0, 0], [math.inf, 1], [math.nan] * 2, [], [-3, 5], [-7, -7], [1e-9, 1e9]])
@pytest.mark.parametrize('log', [False, True])
@pytest.mark.filterwarnings('error')
def test_no_usual_number_breaks_a_chart(ys, log):
    data.chart([dict(title='β', x='é', y='y', log_x=log, log_y=log, lines={y: 'l' for y in ys[:1]},
                     series={'a': (ys, ys), '': ([], [])})])
    at, ticks = data.axis(ys, 0, 210, log)
    if ys == [10, 10]:                                  # a constant, beside 0 or within a decade
        assert [label for _, label in ticks] == (['5', '10', '20'] if log else ['0', '5', '10'])
    assert all(0 <= place <= 210 for place, _ in ticks) and 2 <= len(ticks) <= 6


def test_pictures_are_saved_as_their_names_say():
    images = data.load('faces').images(np.random.default_rng(0).integers(10 ** 9, size=15))
    pictures = [data.sheet(images[k:k + 6].reshape(2, 3, 3, 64, 64), scale=1) for k in range(9)]
    for name, form in (('a.png', 'PNG'), ('a.jpg', 'JPEG')):
        data.save_picture(name, pictures[0])
        away = np.asarray(Image.open(name)).astype(float) - np.asarray(pictures[0])
        assert Image.open(name).format == form and np.sqrt((away ** 2).mean()) < 4
    assert Image.open('a.jpg').layer[0][1:3] == (1, 1) == Image.open('a.jpg').layer[1][1:3]
    data.save_gif('a.gif', pictures, 90)
    with Image.open('a.gif') as gif:
        assert gif.n_frames == 9 and gif.info['duration'] == 90 and gif.info['loop'] == 0
        for k, picture in enumerate(pictures):
            gif.seek(k)
            error = np.asarray(gif.convert('RGB')).astype(float) - np.asarray(picture)
            assert np.sqrt((error ** 2).mean()) < 3.2, k        # of 255: every frame in its colours


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
    share = metrics.factor_shares(mu, v)
    np.testing.assert_allclose(share, expected / entropies, atol=1e-12)
    assert share[4].argmax() == 1
    v = np.array(list(np.ndindex(2, 40, 1)))            # one latent; a constant counts for nothing
    mu = v[:, :1] * 5 + v[:, 1:2] // 8                  # ln 2 nats, all of v₀; ln 5, of v₁'s ln 40
    assert metrics.mutual_information_gap(mu, v)[0] == pytest.approx((1 + math.log(5, 40)) / 2)
    np.testing.assert_allclose(metrics.factor_shares(mu, v), [[1, math.log(5, 40), 0]], atol=1e-9)


@pytest.mark.parametrize('n, samples', [(3000, 150), (700, None)])
def test_elbo_decomposition_by_brute_force(n, samples):
    """An image at a time, with torch.distributions; the program takes blocks."""
    mu, logvar = NOISE[:n, :4] * [2, 1, 0.5, 0], NOISE[:n, 4:8] - 2
    d = metrics.elbo_decomposition(mu, logvar, samples, np.random.default_rng(5))
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
    apart = metrics.elbo_decomposition(1e4 * mu, logvar, samples)           # no two overlap
    assert apart['mutual_information'] == pytest.approx(math.log(n)) == apart['ceiling']


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
    ('values: expected one array', MIG, (VALUES, VALUES[:-1])),
    ('values: .*varies', MIG, (VALUES, VALUES * 0)),
    ('values: expected', metrics.entropy_of, (VALUES / 2,), (spoiled(np.nan),), (VALUES[:, 0],)),
    ('bins: expected', MIG, *[(VALUES, VALUES, n) for n in (0, -1, 2.5)]),
    ('mu: expected finite', ELBO, (spoiled(np.nan), spoiled(0))),
    ('logvar: expected', ELBO, (spoiled(0), spoiled(np.nan)),
     (FLAT, FLAT[:, :1]), (FLAT[:, :1], FLAT), (FLAT, FLAT[:1]), (FLAT, FLAT - 60)),
    ('samples.* from 2 to', ELBO, (FLAT[:1],) * 2, *[(FLAT, FLAT, n) for n in (0, 1, 51, 2.5)]),
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
