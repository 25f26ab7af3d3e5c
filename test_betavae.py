"""Each test compares with something independent: torch.distributions, a closed form, a brute-force
loop, genuine frames. In the order of the modules; at the end the pages."""
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
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
DRAW, SCORES = betavae.draw, betavae.scores
betavae.draw, betavae.scores = lambda *_: None, lambda *_: {}   # slow: tests of them restore them
betavae.ROW, betavae.SAVE_SECONDS, betavae.PICTURES = 5, 0, 10  # so that short runs have them, too
torch.set_num_threads(1)            # fast enough, and all processes make the same bits
noise = betavae.fixed_noise         # of all figures and pictures
assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
    torch.manual_seed(2017)                 # no test depends on chance, or on the one before it


@functools.cache
def toy(channels=1, dark=20):
    """A block in one of 12 rows and 6 columns, in one of 2 greys: an image shows its index."""
    x = np.full((12, 6, 2, channels, 64, 64), dark, np.uint8)
    for row, column, light in np.ndindex(12, 6, 2):
        x[row, column, light, :, 5 * row:, 10 * column:][:, :9, :9] = 120 + 100 * light
    x = torch.from_numpy(x).view(144, channels, 64, 64)
    return data.Dataset('toy', x.shape[1:], dict(row=12, column=6, light=2), x.__getitem__)


def held_out(dataset):
    return torch.from_numpy(dataset.images(dataset.held_out(1000))) / 255


def train(steps=12, dataset=None, model=None, **options):
    options = dict(latents=3, batch=8, likelihood='gaussian', run='a', precision='fp32',
                   device='cpu', steps=steps) | options
    return betavae.train(dataset or toy(), betavae.options(**options), model)


def main(*words):                       # returns the exit status
    try:
        return betavae.main([str(word) for word in words]) or 0
    except SystemExit as stop:
        return stop.code


def state(run='a'):
    """Weights, moments, step and log of a run; but the log's last column is the time."""
    kept = torch.load(Path(run, 'checkpoint.pt'), weights_only=True)
    return {key: kept[key] for key in ('model', 'adam', 'step')} | dict(log=kept['log'][:, :-1])


def read(*path):
    return json.loads(Path(*path).read_text())


@pytest.fixture
def trained(tmp_path_factory):
    """Finished runs a, b and c, here, as links: a file is changed by replacing it."""
    folder = tmp_path_factory.getbasetemp() / 'finished'
    if not folder.exists():
        train(30, run=folder / 'a')
        train(30, run=folder / 'b', beta=np.float32(2), anneal=60)
        train(30, run=folder / 'c', beta=2, anneal=60, likelihood=None)     # so Bernoulli's
    shutil.copytree(folder, '.', copy_function=os.link, dirs_exist_ok=True)


# The objective ------------------------------------------------------------------------------------

def total_correlation(z, q, n):
    """Chen et al. 2018, appendix C.2, of probabilities."""
    w = torch.full((len(z),) * 2, (n - 1) / n / (len(z) - 1), dtype=z.dtype).fill_diagonal_(1 / n)
    p = q.log_prob(z[:, None]).exp()                                                # (M, M, J)
    joint, each = (w * p.prod(2)).sum(1), (w[:, :, None] * p).sum(1)
    return (joint.log() - each.log().sum(1)).mean()


def test_total_correlation_by_brute_force_and_of_all_images_exact():
    mu, logvar, noise = torch.randn(3, 6, 2, dtype=torch.float64)
    z, q = betavae.reparameterize(mu, logvar, noise), Normal(mu, (logvar / 2).exp())
    for n in (6, 50):
        found = betavae.total_correlation(z, mu, logvar, n)
        torch.testing.assert_close(found, total_correlation(z, q, n), rtol=1e-6, atol=1e-6)
    p = q.log_prob(z[:, None]).exp()                                                # (z, image, J)
    exact = (p.prod(2).mean(1).log() - p.mean(1).log().sum(1)).mean()
    torch.testing.assert_close(betavae.total_correlation(z, mu, logvar, 6), exact)


def test_schedules_are_those_of_the_eight_runs_within_1():
    """min(10, t/4000); max(1, 100 − t/400) and max(1, 10000 − t/10) reach 1 at steps 39,600 and
    99,990, where ours are straight lines that end with step 40,000 and 100,000."""
    for t in range(0, 120001, 1000):
        assert betavae.beta_at(t, 10, 0, 40000) == pytest.approx(min(10, t / 4000))
        for start, pace, anneal in ((100, 400, 40000), (10000, 10, 100000)):
            late = betavae.beta_at(t, 1, start, anneal) - max(1, start - t / pace)
            assert 0 <= late <= 1 and (late == 0 or 0 < t < anneal)


def test_a_linear_decoder_makes_it_probabilistic_pca():
    """Of noise variance β/2: latent i is used where λ_i > β/2, with ½ ln(2 λ_i / β) nats, and at
    the optimum, in closed form, the gradient vanishes (Lucas et al. 2019)."""
    lambdas = torch.tensor([4e-6, 1e-6, 3e-7], dtype=torch.float64)     # the sigmoid is straight
    beta, n = 1e-6, 2000
    draws = torch.randn(n, 6, dtype=torch.float64)
    draws = torch.linalg.qr(draws - draws.mean(0))[0] * n ** 0.5        # of covariance exactly 1
    scores, noise = draws.split(3, 1)
    x = (0.5 + scores * lambdas.sqrt()).view(n, 1, 1, 3)
    gain = (lambdas - beta / 2).clamp(min=0).sqrt()                                 # of the decoder
    nats = 0.5 * torch.log(2 * lambdas / beta).clamp(min=0)
    a = (gain / lambdas.sqrt()).requires_grad_()                                    # μ = a · scores
    logvar = (-2 * nats).requires_grad_()
    w = torch.diag(4 * gain).requires_grad_()                           # 1/4: slope of the sigmoid
    z = betavae.reparameterize(scores * a, logvar, noise)
    outputs = (z @ w).view(n, 1, 1, 3), z, scores * a, logvar.expand(n, 3)
    loss, _, kl = betavae.objective(lambda *_: outputs, x, noise, beta)
    torch.testing.assert_close(kl, nats, atol=1e-9, rtol=0)
    assert max(g.abs().max() for g in torch.autograd.grad(loss, (a, logvar, w))) < 0.02 * beta


# Training, beside an independent run --------------------------------------------------------------

class Plain(nn.Module):
    """The paper's algorithm as a reader would write it: plain layers, torch.distributions, Adam."""

    def __init__(self, C=1, J=3, dropout=0, **options):
        super().__init__()
        self.J, self.options = J, options
        relu = functools.partial(nn.LeakyReLU, options.get('leak', 0.2))
        self.encoder = nn.Sequential(
            nn.Conv2d(C, 32, 4, 2, 1), relu(), nn.Conv2d(32, 32, 4, 2, 1), relu(),
            nn.Conv2d(32, 64, 4, 2, 1), relu(), nn.Conv2d(64, 64, 4, 2, 1), relu(), nn.Flatten(),
            nn.Linear(1024, 256), relu(), nn.Linear(256, 2 * J), nn.Dropout(dropout))
        self.decode = nn.Sequential(
            nn.Linear(J, 256), relu(), nn.Linear(256, 1024), relu(), nn.Unflatten(1, (64, 4, 4)),
            nn.ConvTranspose2d(64, 64, 4, 2, 1), relu(), nn.ConvTranspose2d(64, 32, 4, 2, 1),
            relu(), nn.ConvTranspose2d(32, 32, 4, 2, 1), relu(), nn.ConvTranspose2d(32, C, 4, 2, 1))
        self.adam = torch.optim.Adam(self.parameters(), fused=False, foreach=False)

    def load(self, weights, moments=()):
        for mine, given in zip(self.parameters(), weights, strict=True):
            mine.data.copy_(given)
        for mine, given in zip(self.parameters(), moments):
            self.adam.state[mine] = {k: v.clone().contiguous() for k, v in given.items()}
        return self

    def encode(self, x):
        return self.encoder(x).split(self.J, 1)

    def forward(self, x, noise):
        mu, logvar = self.encode(x)
        z = mu + (logvar / 2).exp() * noise
        return self.decode(z), z, mu, logvar

    def terms(self, x, noise):                  # reconstruction, KL_j, q(z|x) and z
        logits, z, mu, logvar = self(x, noise)
        q, constant = Normal(mu, (logvar / 2).exp()), x[0].numel() / 2 * math.log(math.pi)
        recon = -Normal(logits.sigmoid(), 0.5 ** 0.5).log_prob(x).sum() / len(x) - constant
        if self.options.get('likelihood') == 'bernoulli':
            recon = -Bernoulli(logits=logits, validate_args=False).log_prob(x).sum() / len(x)
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
        if self.options.get('tc'):
            tc = total_correlation(z.double(), Normal(q.loc.double(), q.scale.double()), n)
            loss = recon + kl.sum() + (self.beta(t) - 1) * tc.float()
        return torch.stack([loss, recon, *kl])


@pytest.mark.parametrize('case', [dict(beta=4, tc=0), dict(beta=4, likelihood='bernoulli'),
    dict(beta=20, anneal=8, dataset=toy(3)), dict(beta=6, tc=True, anneal=8, leak=0),
    dict(beta=1, beta_from=30, anneal=8, leak=0, dataset=toy(3), likelihood='bernoulli'),
    dict(beta=2, warmup=6, lr=1e-4, seed=1), dict(capacity=6, gamma=30, anneal=8, warmup=5)],
    ids='-'.join)
def test_training_is_the_papers_algorithm_and_the_log_says_so(case, monkeypatch, capsys):
    steps, step = [], torch.optim.Adam.step

    def noting_step(adam, *rest):               # weights, moments and gradients before each step
        weights = adam.param_groups[0]['params']
        steps.append(([p.detach().clone() for p in weights],
                      [{k: v.clone() for k, v in adam.state[p].items()} for p in weights],
                      [p.grad.clone() for p in weights]))
        step(adam, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, 'step', noting_step)
        patch.setattr(betavae, 'total_correlation', tc := Mock(wraps=betavae.total_correlation))
        model, dataset = train(13, **case), case.get('dataset', toy())
    n = sum(k % 19 != 0 for k in range(144))                            # training images
    plain, losses = Plain(dataset.shape[0], **case), []
    after = [weights for weights, *_ in steps[1:]] + [list(model.parameters())]
    for t, (before, moments, gradients) in enumerate(steps):
        x, eps = betavae.batch(dataset, case.get('seed', 0), t, 8, 3, 'cpu')
        losses.append(plain.load(before, moments).losses(x, eps, t, n))
        warm = min(1, (t + 1) / case.get('warmup', 1))
        plain.adam.param_groups[0]['lr'] = case.get('lr', 5e-4) * warm
        plain.adam.zero_grad()
        losses[t][0].backward()
        plain.adam.step()
        for mine, gradient, theirs in zip(plain.parameters(), gradients, after[t]):
            assert (mine.grad - gradient).abs().max() < 1e-4 * gradient.abs().max()
            assert (mine - theirs).abs().mean() < 5e-4 / 100
    log = np.genfromtxt('a/log.csv', delimiter=',', names=True)
    for row, start, end in zip(log, (0, 5, 10), (5, 10, 13), strict=True):
        loss, recon, *kl = torch.stack(losses[start:end]).mean(0).tolist()
        plain.load(after[end - 1])
        held = plain.losses(held_out(dataset), noise(8, 3), end - 1, n).tolist()
        expected = [end, plain.beta(end - 1), loss, recon, sum(kl), *kl, *held[:2], sum(held[2:])]
        np.testing.assert_allclose(row.tolist()[:-1], expected, rtol=1e-5, atol=1e-6)
    assert (f"step 13/13  {'C' if 'capacity' in case else 'β'} {plain.beta(12):.4g}  recon "
            f'{recon:.1f}  KL {sum(kl):.2f}  active {sum(k > 0.05 for k in kl)}/3  '
            in capsys.readouterr().out)
    assert {call.args[3] for call in tc.call_args_list} == ({n} if case.get('tc') else set())
    assert len(steps) == 13 and torch.backends.cudnn.deterministic and not model.training


def test_batches_are_training_images_all_of_them_and_normal_noise():
    batches = [betavae.batch(toy(), 3, step, 64, 5, 'cpu') for step in range(40)]
    x, noise = (torch.cat(part) for part in zip(*batches))
    images = torch.from_numpy(toy().images(np.arange(144))) / 255
    away, index = torch.cdist(x.flatten(1), images.flatten(1)).min(1)
    counts, training = torch.bincount(index, minlength=144), torch.arange(144) % 19 != 0
    assert away.max() < 0.1 and torch.equal(counts > 0, training)       # 2560 draws of 136
    expected = Normal(0.0, 1.0).icdf((torch.arange(noise.numel()) + 0.5) / noise.numel())
    assert (noise.flatten().sort().values - expected)[50:-50].abs().max() < 0.1
    assert np.abs(np.corrcoef(noise.T) - np.eye(5)).max() < 0.08
    again, *others = (betavae.batch(toy(), seed, step, 64, 5, 'cpu')
                      for seed, step in ((3, 7), (3, 8), (4, 7), (7, 3)))
    assert torch.equal(again[0], batches[7][0]) and torch.equal(again[1], batches[7][1])
    assert not any(map(torch.equal, again * 3, itertools.chain(*others)))


def test_a_network_of_your_own_is_trained_resumed_drawn_scored_and_loaded(monkeypatch):
    network = functools.partial(Plain, J=5, dropout=0.5)    # would show figures of the wrong mode
    monkeypatch.setattr(metrics, 'disentanglement_score', lambda *_, **__: 0.5)
    monkeypatch.setattr(betavae, 'draw', DRAW)
    monkeypatch.setattr(betavae, 'scores', SCORES)
    train(15, model=network(), latents=None)
    model = train(20, model=network(), latents=None)                    # resumes
    loaded, summary = betavae.load('a', network()), read('a/summary.json')
    assert_same(model.state_dict(), loaded.state_dict())
    recon = loaded.terms(held_out(toy()), noise(8, 5))[0].item()
    log = np.genfromtxt('a/log.csv', delimiter=',', names=True)['held_out_recon']
    assert [log[-1], summary['reconstruction']] == pytest.approx([recon] * 2, rel=1e-5)
    assert len(summary['kl_per_latent']) == 5 and 'score_L5_samples' in summary
    assert Path('a/traversal.gif').exists() and main('compare', 'a') == 0       # the table only


# A run's figures and pictures ---------------------------------------------------------------------

@pytest.mark.parametrize('run, likelihood', [('b', 'gaussian'), ('c', 'bernoulli')])
@torch.no_grad()
def test_each_field_of_the_summary(run, likelihood, trained):
    summary, model, x = read(run, 'summary.json'), betavae.load(run), held_out(toy())
    plain = Plain(likelihood=likelihood).load(model.parameters())
    recon, kl, q, z = plain.terms(x, noise(8, 3))
    pixels = torch.from_numpy(toy().images(np.arange(144)))
    mu, logvar = betavae.encode_images(model, pixels)                   # to the bit, for the bins
    torch.testing.assert_close(torch.cat([mu, logvar], 1), plain.encoder(pixels / 255))
    with pytest.raises(TypeError, match='uint8, 0 to 255'):             # it would divide once more
        betavae.encode_images(model, pixels / 255)
    top, sampled = int(kl.argmax()), mu + (logvar / 2).exp() * noise(144, 3)
    factors = np.stack(np.unravel_index(np.arange(144), (12, 6, 2)), 1)
    shares = metrics.factor_shares(mu, factors)
    expected = dict(steps=30, reconstruction=recon, kl=kl.sum(), kl_per_latent=kl, top_latent=top,
        active_latents=(kl > 0.05).sum(), top_range=[z[:, top].min(), z[:, top].max()],
        mig=metrics.mutual_information_gap(mu, factors)[0],
        mig_samples=metrics.mutual_information_gap(sampled, factors)[0])
    for name, value in expected.items():
        np.testing.assert_allclose(summary[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    assert summary['shares'] == pytest.approx(dict(zip(toy().factors, shares.max(0))))
    assert summary['latent_names'] == [
        f'z{j}: {[*toy().factors][row.argmax()]} {row.max():.0%}' if kl[j] > 0.05 else f'z{j}'
        for j, row in enumerate(shares)]
    x = pixels[torch.arange(144) % 19 != 0].flatten(1) / 255
    lambdas = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2 / len(x)
    assert data.spectrum(toy())[:144].sum().item() == pytest.approx(lambdas.sum(), rel=0.05)
    assert summary['predicted_latents'] == (min(3, sum(lambdas > 1 / 2)) if run == 'b' else None)
    assert summary['label'] == 'β 0 → 1 over 30, latents 3, batch 8'   # of 60 steps, to β = 2


def test_the_score_is_of_means_and_of_one_sample_for_each_image(monkeypatch, trained):
    asked, model = [], betavae.load('b')
    monkeypatch.setattr(metrics, 'disentanglement_score', lambda *args, **options: asked.append(
        (*args, options)) or len(asked))
    s = betavae.complete(betavae.options(latents=3, seed=4), toy(), None)
    assert SCORES(s, toy(), model) == dict(
        score_L1=1, score_L1_samples=2, score_L5=3, score_L5_samples=4)
    mu, logvar = betavae.encode_images(model, toy().images(np.arange(144)))
    z = mu + (logvar / 2).exp() * noise(9973, 3)[:144]
    for (encode, *rest), codes, L in zip(asked, (mu, z, mu, z), (1, 1, 5, 5)):
        torch.testing.assert_close(encode(np.array([7, 3, 7])), codes[[7, 3, 7]])
        assert rest == [(12, 6, 2), dict(pairs=L, train=2000, test=1000, rng=4)]
    one = data.Dataset('one', (1, 64, 64), {'a': 9, 'b': 1}, toy().draw)
    assert SCORES(s, one, model) == {}                                  # nothing to tell apart


@torch.no_grad()
def test_pictures_show_what_they_say(trained, monkeypatch):
    """The codes behind each picture, against plain decodes; names, and axes of the curves."""
    made = []
    monkeypatch.setattr(betavae, 'draw', DRAW)
    monkeypatch.setattr(data, 'sheet', lambda *a, **_: made.append(Mock(args=a)) or made[-1])
    monkeypatch.setattr(data, 'save_chart', chart := Mock())
    monkeypatch.setattr(data, 'save_gif', gif := Mock())
    train(30, beta=2, anneal=60, run='b')                               # draws them again
    plain, x = Plain().load(state('b')['model'].values()), held_out(toy())
    _, kl, q, z = plain.terms(x, noise(8, 3))
    order = [j for j in kl.argsort(descending=True).tolist() if kl[j] > 0.05]
    rows, moving = q.mean[3].repeat(len(order), 8, 1), q.mean[:8].repeat(len(order), 1, 1)
    for row, j in enumerate(order):
        rows[row, :, j] = torch.linspace(-3, 3, 8)
        moving[row, :, j] = -math.cos(math.pi / 8)                      # the second frame of nine
    top, z = torch.zeros(3, 10, 3), z[:, order[0]]
    top[:, :, order[0]] = torch.linspace(z.min(), z.max(), 10)
    top += torch.arange(3)[:, None, None] * q.stddev.mean(0)
    codes = [torch.cat([q.mean[:8], *noise(2, 8, 3)]).view(3, 8, 3), rows, top, moving]
    named = {picture.save.call_args.args[0].stem: picture.args for picture in made[:3]}
    (seen, *_), (grid, labels, *_), (tops, *_), (second, names) = (
        *map(named.get, ('reconstructions', 'traversal', 'top_latent')), made[4].args)
    assert torch.equal(seen[0], (x[:8] * 255).byte())
    for found, z in zip((seen[1:], grid, tops, second), codes, strict=True):
        pixels = plain.decode(z.flatten(0, 1)).sigmoid().view(found.shape)
        assert (found - 255 * pixels).abs().max() < 0.6
    assert names == [read('b/summary.json')['latent_names'][j] for j in order]
    assert labels == [f'{name}, {kl[j]:.2f} nats' for name, j in zip(names, order)]
    (_, pictures, _), (_, _, steps, panels) = gif.call_args.args, chart.call_args.args
    assert len(made) == 12 and pictures == made[3:] + made[-2:3:-1]     # there and back
    log = np.genfromtxt('b/log.csv', delimiter=',', names=True)
    expected = [{'train': 'recon', 'held out': 'held_out_recon'},
                {'train': 'kl', 'held out': 'held_out_kl'},
                {name: f'kl_{j}' for name, j in zip(names, order)}, {'': 'beta'}]
    for lines, columns in zip(panels.values(), expected, strict=True):
        for name in lines.keys() | columns.keys():
            np.testing.assert_allclose(lines[name], log[columns[name]], rtol=1e-8)
    assert steps.tolist() == log['step'].tolist()


# A run's folder -----------------------------------------------------------------------------------

def test_a_run_that_was_interrupted_equals_an_unbroken_one_bit_for_bit(monkeypatch, capsys):
    options, drawn = dict(steps=21, beta=4, beta_from=1, anneal=15, warmup=8), []
    monkeypatch.setattr(betavae, 'draw', lambda *given: drawn.append(given[-1]['steps']))
    train(**options, run='whole')
    train(**options | dict(steps=5))                        # a shorter run, that is taken further
    batch, cuts = betavae.batch, [7, 13, 14]

    def interrupting(dataset, seed, step, *rest):
        if step in cuts:
            cuts.remove(step)
            raise KeyboardInterrupt
        return batch(dataset, seed, step, *rest)
    monkeypatch.setattr(betavae, 'batch', interrupting)
    while cuts:
        with pytest.raises(KeyboardInterrupt):
            train(**options)
    assert state()['step'] == 10 and not Path('a/summary.json').exists()
    train(**options)
    assert drawn == [10, 20, 21, 5, 10, 20, 21]
    assert_same(state(), state('whole'))
    monkeypatch.setattr(betavae, 'summarise', lambda *_: dict(steps=9, kl=1, active_latents=0))
    betavae.report(betavae.options(run='a'), None, nn.ReLU(), dict(step=1000), None)
    assert re.findall('use 0|collapsed', capsys.readouterr().out) == ['use 0'] * 5 + ['collapsed']


def test_killed_at_any_moment_a_run_ends_as_an_unbroken_one():
    program = (f'import sys; sys.path.insert(0, {str(HERE)!r}); import test_betavae as t; '
               't.train(80, run="killed", likelihood="bernoulli")')
    for wait in *np.random.default_rng(0).uniform(0.03, 0.25, 2), None:
        child = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE)
        next(line for line in child.stdout if line.startswith(b'step'))
        if wait:
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(wait)
            child.kill()
        child.communicate()
    train(80, run='whole', likelihood='bernoulli')
    assert_same(state('killed'), state('whole'))


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_a_broken_or_foreign_checkpoint_is_refused_and_kept(trained):
    good = Path('a/checkpoint.pt').read_bytes()
    torch.save(dict(step=Path()), 'code.pt')                            # which is not loaded
    for content in (b'', good[:-100], bytes(range(256)) * 20, Path('code.pt').read_bytes(),
                    good.replace(good[9999:10009], b'0123456789')):
        data.write('a/checkpoint.pt', content)
        for call in (lambda: train(32), lambda: betavae.load('a/checkpoint.pt')):
            with pytest.raises(data.UserError, match='a/checkpoint.pt cannot be read, and is left'):
                call()
        assert Path('a/checkpoint.pt').read_bytes() == content and Path('a/summary.json').exists()


@pytest.mark.parametrize('options', [
    dict(beta=2), dict(seed=5), dict(tc=True), dict(anneal=9), dict(warmup=9), dict(leak=0),
    dict(lr=1e-4), dict(batch=4), dict(beta_from=1, anneal=3), dict(precision='bf16'),
    dict(latents=4), dict(likelihood='bernoulli'), dict(steps=29), dict(dataset=toy(dark=0))])
def test_other_options_or_images_are_refused_whatever_the_old_value_was(options, trained):
    with pytest.raises(data.UserError, match='^a is at step 30 and cannot be resumed: .*--run'):
        train(**dict(steps=32) | options)
    assert Path('a/model.pt').exists()


def test_an_edited_network_is_refused_and_weights_of_any_precision_are_read(trained, monkeypatch):
    kept = torch.load('a/model.pt', weights_only=True)
    kept['model'] = {name: t.half() for name, t in kept['model'].items()}
    torch.save(kept, 'half.pt')
    for mine, theirs in zip(betavae.load('half.pt').parameters(), betavae.load('a').parameters()):
        assert mine.dtype == torch.float32 and (mine - theirs).abs().max() < 1e-3
    assert train(1, run='half', leak=0, precision='bf16').bf16 and not train(1, run='plain').bf16
    assert betavae.load('half').encoder[1].negative_slope == 0

    class Edited(betavae.BetaVAE):
        def __init__(self, *args):
            super().__init__(*args)
            self.encoder = self._modules.pop('encoder')                 # the order alone
    monkeypatch.setattr(betavae, 'BetaVAE', Edited)
    for call in (lambda: train(32), lambda: betavae.load('a')):
        with pytest.raises(data.UserError, match='another network'):
            call()


@pytest.mark.parametrize('what, step', [('weights', 3), ('exp_avg_sq', 3), ('loss', 10)])
def test_what_is_not_finite_or_too_large_stops_the_run_and_is_not_saved(what, step, monkeypatch):
    def spoil(self, *rest, step=torch.optim.Adam.step):
        step(self, *rest)
        weights = self.param_groups[0]['params'][0]
        (self.state[weights] | dict(weights=weights.data, loss=noise(1)))[what][:1] = math.inf
    monkeypatch.setattr(torch.optim.Adam, 'step', spoil)
    monkeypatch.setattr(betavae, 'SAVE_SECONDS', 99)
    with pytest.raises(FloatingPointError, match=f'before step {step}; a keeps what was saved'):
        train(step, beta_from=1e12 * (what == 'loss'), anneal=5)        # or within its first row
    assert not list(Path('a').iterdir())


def test_a_run_within_its_own_images_is_refused_and_a_crop_is_kept(capsys):
    Path('photos').mkdir()
    for k in range(20):
        Image.new('RGB', (64, 64), (200, 100, 50)).save(f'photos/{k}.png')
    words = '--data', 'photos', '--crop', 32, '--steps', 1, '--batch', 2, '--run'
    for run in 'photos/runs/a', 'photos':
        assert main(*words, run) == 2 and 'lies among the images' in capsys.readouterr().err
    assert main(*words, 'photographs') == 0 and not Path('photos/runs').exists()
    assert read('photographs/summary.json')['settings']['crop'] == 32


# Finished runs and the command line ---------------------------------------------------------------

def test_compare_makes_a_table_and_a_sheet(trained, capsys, monkeypatch):
    monkeypatch.setattr(data, 'sheet', sheet := Mock(side_effect=data.sheet))
    Path('a/model.pt').unlink()                                         # published: the table only
    summary = read('c/summary.json') | dict(score_L1=0.123, score_L5_samples=0.456)
    data.write('c/summary.json', json.dumps(summary).encode())
    for _ in range(2):                                  # the second time its own files are there
        assert main('compare', *sorted(Path().iterdir()), '--out', '.') == 0
    head, _, *rows = [[cell.strip() for cell in line.split('|')[1:-1]]
                      for line in Path('comparison.md').read_text().splitlines()]
    assert [row[0] for row in rows] == ['a', 'b', 'c']
    for row in rows:
        found, summary = dict(zip(head, row, strict=True)), read(row[0], 'summary.json')
        for name in 'reconstruction', 'kl', 'active_latents', 'mig', 'mig_samples':
            assert float(found[name]) == pytest.approx(summary[name], abs=0.051)
        assert found['top latent'] == summary['latent_names'][summary['top_latent']]
    assert (found['score_L1'], found['score_L5'], found['score_L5_samples']) == ('12%', '', '46%')
    images, labels, _ = sheet.call_args.args
    assert list(labels) == [f'{row[-1]}, {row[0]}' for row in rows[1:]]
    codes = torch.zeros(10, 3)
    codes[:, summary['top_latent']] = torch.linspace(*summary['top_range'], 10)
    assert (images[1] - betavae.load('c').decode(codes).sigmoid() * 255).abs().max() < 0.6
    assert main('compare', 'nowhere') == 2 and 'no summary.json' in capsys.readouterr().err


@pytest.mark.parametrize('options, label, late', [
    (dict(seed=3), 'β 1', 'β 1'), (dict(tc=True, beta=6), 'TC β 6', 'TC β 6'),
    (dict(beta=100, anneal=40000), 'β 0 → 100 over 40,000', 'β 0 → 25 over 10,000'),
    (dict(beta_from=100, anneal=40000), 'β 100 → 1 over 40,000', 'β 100 → 75.25 over 10,000'),
    (dict(capacity=25, lr=1e-3), *['C 25, gamma 1000, lr 0.001'] * 2),
    (dict(latents=6, leak=0, warmup=5), *['β 1, latents 6, leak 0, warmup 5'] * 2)])
def test_labels_and_folders(options, label, late):
    s = betavae.complete(betavae.options(**options), toy(3), None)
    assert betavae.describe(s) == label and betavae.describe(s, 10000) == late
    words = label.translate({ord('β'): 'beta', ord(','): None, ord('→'): None}).split()
    assert s.run == '-'.join(['runs/toy', *words] + ['seed-3'] * (s.seed == 3))


@pytest.mark.parametrize('words', [
    '--beta -1', '--beta nan', '--beta-from 3', '--latents 0', '--steps 10000000000000',
    '--crop 128', '--data nowhere', '--data=', '--hel', '--tc --batch 1', '--tc --capacity 5',
    '--capacity 5 --beta 2', '--gamma 5', '--bata 4', 'surplus', 'compare'])
def test_bad_options_are_named(words, capsys):
    assert main(*words.split()) == 2 and not Path('runs').exists()
    assert re.match('betavae(?!.*no images)', capsys.readouterr().err.strip().splitlines()[-1])


def test_what_goes_wrong_is_said_in_one_line(monkeypatch, capsys):
    for code, error, expected in (
            (1, PermissionError(13, 'No', 'x'), "No: 'x'"), (1, MemoryError(), 'MemoryError'),
            (1, RuntimeError("can't allocate\nmore"), "can't allocate"),        # torch, on a CPU
            (3, FloatingPointError('it diverged'), 'it diverged'),
            ('\nbetavae: stopped; the same command resumes', KeyboardInterrupt(), '')):
        monkeypatch.setattr(betavae, 'train', Mock(side_effect=error))
        assert main() == code
        assert expected in (said := capsys.readouterr().err) and '\n' not in said.strip()


def script(*words, path=HERE / 'run_all.sh', **variables):
    """Run run_all.sh with a python3 that only notes what it is asked; returns that, and notes."""
    Path('bin').mkdir(exist_ok=True)
    Path('bin/python3').write_text(f'#!/bin/sh\ncase "$1" in -c) exec {sys.executable} "$@"; esac\n'
                                   'echo "$@" >>asked\nexit ${CODE-0}\n')
    Path('bin/python3').chmod(0o755)
    Path('asked').write_text('')
    variables = os.environ | dict(PATH=f"{Path('bin').resolve()}:{os.environ['PATH']}") | variables
    done = subprocess.run([path, *words], env=variables, capture_output=True, text=True)
    return done, [shlex.split(line) for line in Path('asked').read_text().splitlines()]


def test_run_all_makes_the_eight_runs_and_passes_options_on():
    Path('link.sh').symlink_to(HERE / 'run_all.sh')
    done, asked = script('--seed', '7', '--lr', '1', path='./link.sh', CDPATH='/')
    settings = [betavae.options(*words[1:]) for words in asked[:-1]]
    assert {words[0] for words in asked} == {str(HERE / 'betavae.py')} and done.returncode == 0
    assert [(s.run, s.beta_from, s.beta, s.anneal, s.steps, s.seed, s.lr) for s in settings] == [
        ('runs/VAE', 0, 1, 0, 50000, 7, 1),
        *[(f'runs/{beta}-Beta-VAE', 0, beta, 0, 50000, 7, 1) for beta in (10, 100, 1000, 10000)],
        ('runs/KLD_Anneal_40000_steps-10-Beta-VAE', 0, 10, 40000, 50000, 7, 1),
        ('runs/KLD_Decrease_40000_steps-100to1-Beta-VAE', 100, 1, 40000, 50000, 7, 1),
        ('runs/KLD_Decrease_100000_steps-10000to1-Beta-VAE', 10000, 1, 100000, 125000, 7, 1)]
    assert asked[-1][1:] == ['compare', *(s.run for s in settings), '--out', 'runs']
    for group, count, name, value in ('latents6', 4, 'latents', 6), ('dsprites', 7, 'steps', 15000):
        found = [betavae.options(*words[1:]) for words in script(group, RUNS='here')[1][:-1]]
        assert [getattr(s, name) for s in found] == [value] * count and found[0].run[:5] == 'here/'
        assert len({(s.beta, s.tc) for s in found}) == count
    for code, outcome in ('3', (8, 3, True)), ('2', (1, 1, False)):     # diverged, or another error
        done, asked = script(CODE=code)
        assert (len(asked), done.returncode, 'diverged: VAE 10-' in done.stderr) == outcome


# Data and its drawing -----------------------------------------------------------------------------

def test_images_are_those_of_the_indices_and_some_are_held_out():
    def numbered(index):
        return (index % 256).byte().view(-1, 1, 1, 1).expand(-1, 1, 64, 64)
    own = data.Dataset('own', (1, 64, 64), {'a': 20, 'b': np.int64(20)}, numbered)
    index = np.random.default_rng(0).integers(400, size=300)                    # more than a part
    for given in index, list(index), torch.from_numpy(index).int():
        x = own.images(given)
        assert torch.is_tensor(x) == torch.is_tensor(given) and len(own) == 400
        assert (np.asarray(x) == (index % 256)[:, None, None, None]).all()
    for bad in 3, [1.0], [True], [[0]], [400], [0, -1]:
        with pytest.raises((TypeError, IndexError)):
            own.images(bad)
    for wrong in torch.Tensor.float, torch.Tensor.numpy, lambda x: x[:1], lambda x: x[:, 0]:
        own.draw = lambda index: wrong(numbered(index))
        with pytest.raises(TypeError, match='draw must return uint8'):
            own.images([0, 1, 2])
    for n in 2, 18, 19, 20, 39, 1000:
        d = data.Dataset('toy', (1, 64, 64), {}, None, size=n)
        assert set(d.held_out(10 ** 6)) == set(range(0, n, 19))
        assert set(d.train_index(np.arange(d.train_size))) == set(range(n)) - set(range(0, n, 19))
    assert max(d.held_out(20)) > 20 * 19 and np.array_equal(d.held_out(20), d.held_out(20))


def test_what_is_drawn_is_what_it_was():
    """By the hash of 160 frames in DeepMind's repository, and by weighted sums over fixed faces."""
    there, back = np.r_[2:31:2, 31], np.r_[29:0:-2, 0]
    around = np.r_[there, 31 + 32 * there, 31 * 32 + back, 32 * back]           # 32 x + y
    index = np.concatenate([245760 * shape + np.r_[
        40960 * np.r_[0, 2, 4, 5, 3, 1, 0, 2, 4], 40960 * 5 + np.r_[
            0, 1024 * np.r_[37:0:-2, 0], around if shape == 2 else []],
        40960 * np.r_[3, 1]] for shape in (2, 1, 0)]).astype(int)
    images = data.load('dsprites').images(index)
    assert hashlib.sha256(np.packbits(images == 255).tobytes()).hexdigest() == (
        '75dc01cf48e3748a94cbfc8648dd7dc88714001901eeaa334b091b570a8579c9')
    faces, rng = data.load('faces'), np.random.default_rng(0)
    x = faces.images(rng.integers(len(faces), size=400)).astype(int)
    sums = [int((x * rng.integers(-9, 10, size=x.shape)).sum()) for _ in range(2)]
    assert sums == pytest.approx([1177398, 544529], abs=1000)       # processors round differently


def test_your_own_images_come_out_right_and_are_decoded_once(monkeypatch):
    folder = Path('pictures, x**y [β\n]')                                       # odd, and allowed
    for other in '.hidden.png', '__MACOSX/._a.png', 'deep/a.md':
        Path(folder, other).parent.mkdir(parents=True, exist_ok=True)
        Path(folder, other).write_text('no image')
    Image.new('CMYK', (64, 80), (0, 128, 255, 0)).save(folder / 'deep/y.JPG', quality=95)
    Image.new('RGBA', (64, 80), (200, 100, 50, 0)).save(folder / 'deep/z.png')  # nothing: white
    turned = Image.new('L', (100, 200), 'black')        # turned right by 90°, as EXIF demands, …
    turned.paste(255, (25, 50, 75, 100))                # … this is right of the middle
    turned.getexif()[0x0112] = 6
    turned.save(folder / 'deep/turned.png', exif=turned.getexif())
    with zipfile.ZipFile('p.zip', 'w') as archive:
        for file in filter(Path.is_file, folder.rglob('*')):
            archive.write(file)
    for source, crop in itertools.product(('p.zip', folder), (None, 40)):
        x = data.load(source, crop).images(range(3))    # the centred square: 100 pixels, or --crop
        assert abs(x[0].mean() - 255 / (2 if crop else 4)) < 2
        assert x[0, 0, 32, [3, 60]].tolist() == [0, 255]
        np.testing.assert_allclose(x[1:, :, 30, 30], [(255, 127, 0), (255, 255, 255)], atol=3)
    for file in (caches := list(Path('home/betavae').iterdir())):
        file.write_bytes(bytes(12288))                                          # cut short
    assert len(caches) == 4 and np.array_equal(data.load(folder, 40).images(range(3)), x)
    Image.new('L', (64, 64)).save(folder / 'deep/z.png')                        # another image
    assert not np.array_equal(data.load(folder, 40).images(range(3)), x)
    monkeypatch.setattr(data, 'decode', None)
    assert len(data.load(folder, 40)) == 3


@pytest.mark.parametrize('path, content, words', [
    ('eps/a.jpg', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'a.jpg.*identify'),
    ('small/a.ppm', b'P6 1 2 255\nrgbrgb', r'a.ppm.*\(1, 2\).*below --crop'),
    ('deep/a.pgm', b'P5 1 1 65535\nxy', 'a.pgm.*not 8 bits'), ('no/a', b'', 'no images'),
    ('a.zip', b'PK', 'a.zip cannot be read'), ('faces', b'', '--crop')])
def test_bad_sources_are_named_in_one_line_and_leave_nothing(path, content, words):
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes(content)
    with pytest.raises(data.UserError, match=words) as error:
        data.load(path.partition('/')[0], crop=None if path == 'deep/a.pgm' else 2)
    assert '\n' not in str(error.value) and not list(Path('home').glob('*/*'))


def has(picture, colour, near=60):                      # columns, rows
    return np.nonzero((np.abs(np.asarray(picture) - np.int_(colour)).max(2) < near).T)


def test_a_sheet_shows_every_image_and_label_in_its_place_and_a_gif_each_sheet():
    faces = data.load('faces').images(np.random.default_rng(0).integers(10 ** 9, size=12))
    pictures = [data.sheet(faces[[[0, k], [k + 1, k + 2]]], scale=1) for k in range(1, 10)]
    tiles = np.asarray(pictures[4]).reshape(2, 66, 2, 66, 3)[:, 1:65, :, 1:65]  # (2, 64, 2, 64, 3)
    images, labels = torch.from_numpy(faces[[[0, 5], [6, 7]]]), ['β', 'a longer label ' * 4]
    assert np.array_equal(tiles.transpose(0, 2, 4, 1, 3), images)
    full = data.sheet(images, labels, 'title ' * 30, ['a note', 'é'], scale=1)
    x, y = full.width - 132, full.height - 40 - 132
    assert np.array_equal(full.crop((x, y, x + 132, y + 132)), pictures[4])
    short, long = (has(full.crop((0, top, x, top + 66)), 0)[0] for top in (y, y + 66))
    assert 0 < np.ptp(short) < np.ptp(long) / 2 and short.max() > x - 20        # right-aligned
    for box in (0, 0, full.width, y), (0, y + 132, *full.size):                 # title, notes
        assert np.ptp(has(full.crop(box), 0, 150)[1]) > 20                      # of two lines each
    data.save_gif('a.gif', pictures, 90)
    with Image.open('a.gif') as gif:
        frames = [np.asarray(gif.seek(k) or gif.convert('RGB')).astype(float) for k in range(9)]
    assert all(np.sqrt(((f - p) ** 2).mean()) < 4 for f, p in zip(frames, pictures, strict=True))
    assert np.ptp([frame[:66, :66] for frame in frames], axis=0).max() == 0     # no flicker


def test_a_chart_shows_its_lines_where_its_axes_say_and_names_them():
    lines = {'i': [0, 4, 10], 'wwwww': [9, 9, 9]}
    data.save_chart('four.png', 'b', [0, 40, 100], dict.fromkeys('abcd', lines))
    picture = Image.open('four.png').convert('RGB').crop((450, 320, 900, 640))      # the last
    i, w = map(ImageColor.getrgb, data.COLOURS[:2])
    grid = np.abs(np.int_(picture) - 220).max(2) < 12
    xs, ys = (np.flatnonzero(grid.mean(across) > 0.3) for across in (0, 1))
    for x, y, colour in (xs[2], ys[3], i), (xs[5], ys[0], i), (xs[1], (ys[0] + ys[1]) // 2, w):
        assert len(has(picture.crop((x - 2, y - 2, x + 3, y + 3)), colour)[0])
    legend = picture.crop((xs[5] + 8, 0, *picture.size))
    assert np.ptp(has(legend, i)[0]) < 6 and np.ptp(has(legend, w)[0]) > 20
    boxes = [(0, y - 8, xs[0] - 3, y + 9) for y in ys[[5, 0]]] + [
        (x - 12, ys[5] + 6, x + 12, ys[5] + 20) for x in xs[[0, 5]]]
    wide = [np.ptp(has(picture.crop(box), 0, 150)[0]) for box in boxes]         # 0, 10, 0, 100
    assert wide[0] + 4 < wide[1] and wide[2] + 8 < wide[3]


# The metrics --------------------------------------------------------------------------------------

GRID = (6, 8, 10, 12)
VALUES = np.stack(np.unravel_index(np.arange(math.prod(GRID)), GRID), 1)        # (5760, 4)
NOISE = np.random.default_rng(0).normal(size=(len(VALUES), 60))


def accuracy(codes, sizes=GRID, encode=None, **options):
    options = dict(pairs=16, train=800, test=400) | options
    return metrics.disentanglement_score(encode or (lambda index: codes[index]), sizes, **options)


def test_the_score_of_the_true_factors_is_1_and_of_noise_is_chance():
    assert accuracy(VALUES.astype(np.uint8)) > 0.995                    # differences do not wrap
    assert abs(accuracy(NOISE, train=200, test=2000) - 1 / 4) < 0.05                # overfitted
    assert abs(accuracy(NOISE[:, :5], (60, 1, 80), test=2000) - 1 / 2) < 0.05       # two vary
    half, asked = torch.tensor(np.hstack([VALUES[:, 2:], NOISE[:, :1]]), requires_grad=True), []
    assert accuracy(half, factors=[2, 3]) > 0.995
    assert abs(accuracy(half, factors=range(2), test=2000) - 1 / 2) < 0.05
    accuracy(None, encode=lambda i: asked.append(i) or VALUES[i], pairs=3, train=70, test=30)
    assert len(np.concatenate(asked)) == 2 * 3 * (70 + 30)
    half = VALUES + 5 * NOISE[:, :4]
    assert accuracy(half) == accuracy(half, rng=np.random.default_rng(0)) != accuracy(half, rng=1)


def test_features_are_those_of_the_algorithm_by_brute_force():
    """On a grid of 2 × 3 × 2, E|μ(x₁) − μ(x₂)| is a mean over all pairs that share factor k."""
    sizes, factors, codes = (2, 3, 2), np.array([2, 1]), NOISE[:12, :4]
    x, k = metrics.features(lambda i: codes[i], sizes, 2000, factors, 400, np.random.default_rng(1))
    points = list(np.ndindex(sizes))
    for shared, factor in enumerate(factors):
        expected = np.mean([np.abs(codes[a] - codes[b]) for a, b in np.ndindex(12, 12)
                            if points[a][factor] == points[b][factor]], axis=0)
        assert np.abs(x[k == shared] - expected).max() < 0.12       # each point: 5 standard errors
        assert np.abs(x[k == shared].mean(0) - expected).max() < 0.01


def test_mutual_information_gap_and_shares_by_brute_force():
    """Bins by numpy's histograms, probabilities by counting."""
    def entropy(*columns):
        p = np.unique(np.stack(columns), axis=1, return_counts=True)[1] / len(columns[0])
        return -(p * np.log(p)).sum()

    def information(m, f, bins):
        code = np.digitize(m, np.histogram_bin_edges(m, bins)[1:-1])
        return entropy(code) + entropy(f) - entropy(code, f)
    n, v = 3000, VALUES[np.random.default_rng(0).integers(len(VALUES), size=3000)] // [2, 1, 2, 2]
    v[:, 3] = v[:, 3] * 4 + NOISE[:n, 50].argsort().argsort() % 4           # 24 values
    mu, entropies = v @ NOISE[:4, :4] + NOISE[:n, :4], [entropy(f) for f in v.T]
    for bins in 24, 8:
        expected = np.array([[information(m, f, bins) for f in v.T] for m in mu.T])
        mig, found = metrics.mutual_information_gap(mu, v, bins)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        *_, second, first = np.sort(expected, axis=0)
        assert mig == pytest.approx(np.mean((first - second) / entropies))
        assert (mig == metrics.mutual_information_gap(mu, v)[0]) == (bins == 24)    # the default
    expected = [[information(m, f, bins) for f, bins in zip(v.T, (20, 20, 20, 48))] for m in mu.T]
    np.testing.assert_allclose(metrics.factor_shares(mu, v), expected / np.array(entropies))
    np.testing.assert_allclose(metrics.factor_shares(v, v).diagonal(), 1)
    v = np.array(list(np.ndindex(2, 40, 1)))            # one latent; a constant counts for nothing
    mu = v[:, :1] * 5 + v[:, 1:2] // 8                  # ln 2 nats, all of v₀; ln 5, of v₁'s ln 40
    assert metrics.mutual_information_gap(mu, v)[0] == pytest.approx((1 + math.log(5, 40)) / 2)


@pytest.mark.parametrize('n, samples', [(3000, 150), (700, None)])
def test_elbo_decomposition_by_brute_force(n, samples):
    """An image at a time, with torch.distributions; the program takes blocks."""
    mu, logvar = NOISE[:n, :4] * [2, 1, 0.5, 0], NOISE[:n, 4:8] - 2
    d, rng = metrics.elbo_decomposition(mu, logvar, samples, rng=5), np.random.default_rng(5)
    chosen = np.arange(n) if samples is None else rng.permutation(n)[:samples]
    q, p, terms = Normal(torch.tensor(mu), torch.tensor(logvar / 2).exp()), Normal(0, 1), []
    for i, noise in zip(chosen, torch.tensor(rng.standard_normal((len(chosen), 4)))):
        z = q.loc[i] + q.scale[i] * noise
        log_q = q.log_prob(z)                                               # (N, J)
        log_qz = log_q.sum(1).logsumexp(0) - math.log(n)
        log_qzj = log_q.logsumexp(0) - math.log(n)
        terms.append([log_q[i].sum() - log_qz, log_qz - log_qzj.sum(), *(log_qzj - p.log_prob(z))])
    terms = np.array(terms)                                                 # (samples, 2 + J)
    parts = [d['mutual_information'], d['total_correlation'], *d['dimension_wise_kl']]
    np.testing.assert_allclose([*parts, d['kl']], [*terms.mean(0), sum(parts)], rtol=1e-9)
    assert d['standard_error'] == pytest.approx(terms.sum(1).std(ddof=1) / len(chosen) ** 0.5)
    assert abs(d['kl'] - kl_divergence(q, p).sum(1).mean()) < 4 * d['standard_error']
    apart = metrics.elbo_decomposition(1e4 * mu, logvar, samples)           # no two overlap
    assert apart['mutual_information'] == pytest.approx(math.log(n)) == apart['ceiling']


@pytest.mark.parametrize('expected, function, arguments', [
    ('codes: expected finite', accuracy, [VALUES + np.nan]),
    ('codes: expected shape', accuracy, [0, GRID, lambda i: VALUES[i].T]),
    ('factors: expected two', accuracy, [VALUES, (5760, 1)]),
    ('values: expected integers', metrics.factor_shares, [VALUES, VALUES / 2]),
    ('values: .*varies', metrics.factor_shares, [VALUES, VALUES * 0 + 3]),
    ('logvar: expected', metrics.elbo_decomposition, [VALUES, VALUES * 0 - 60])])
def test_what_a_metric_cannot_handle_is_named(expected, function, arguments):
    with pytest.raises(ValueError, match=expected):
        function(*arguments)


# The pages ----------------------------------------------------------------------------------------

RESULTS = HERE / 'results'
PAGES = [HERE / 'README.md', RESULTS / 'README.md']
SHORTER = {r'\bsteps=\d{3,}': 'steps=40', r'range\(\d{3,}\)': 'range(60)',
           r'size=\d{4,}': 'size=50', r'samples=\d+': 'samples=50'}             # in snippets


def blocks(page, language):
    return re.findall(rf'^```{language}\n(.*?)^```', page.read_text(), re.M | re.S)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.parent.name)
def test_the_snippets_of_a_page_run_and_their_pictures_show_something(page, monkeypatch):
    sheet, score, names = data.sheet, metrics.disentanglement_score, {}

    def seen(images, *rest, **options):
        assert np.std(np.asarray(images)) > 10          # a sheet's labels would hide black tiles
        return sheet(images, *rest, **options)
    monkeypatch.setattr(data, 'sheet', seen)
    monkeypatch.setattr(data, 'load', functools.cache(data.load))
    monkeypatch.setattr(metrics, 'disentanglement_score', lambda *args, **options: score(
        *args, **options | dict(pairs=1, train=100, test=20)))
    Path('results').symlink_to(RESULTS)
    for block in blocks(page, 'python'):
        for long, short in SHORTER.items():
            block = re.sub(long, short, block)
        needs = 'sklearn' in block and not find_spec('sklearn')
        if not needs and '# needs' not in block.partition('\n')[0]:
            exec(block, names)
    for path in Path().glob('*.[jpg][pni][gf]'):
        assert np.std(Image.open(path).convert('L')) > 10


def test_the_commands_of_the_pages_parse():
    lines = []
    for page in PAGES:
        lines += '\n'.join(blocks(page, 'sh')).replace('\\\n', ' ').splitlines()
        prose = re.sub('^```.*?^```', '', page.read_text(), flags=re.M | re.S)
        lines += [code.replace('\n', ' ') for code in re.findall('`([^`]+)`', prose)]
    found = [re.search(r'(python3? betavae\.py|\./run_all\.sh)( .*|$)', line) for line in lines]
    commands = [(match[1], shlex.split(match[2], comments=True)) for match in found if match]
    for program, words in commands:
        if program == './run_all.sh':
            done, asked = script(*words)
            assert done.returncode == 0 and betavae.options(*asked[0][1:])
        elif words[:1] == ['compare']:
            with pytest.raises(data.UserError, match='no summary'):     # understood, and not found
                betavae.compare(words[1:])
        elif not {'…', '--help'} & {*words}:
            betavae.options(*words)
    assert len(commands) >= 5


def test_the_numbers_of_the_tables_are_those_of_runs_csv():
    """Above each stands `<!-- runs.csv: DATA STEPS …: COLUMN, … -->`, `-` for words; its rows or
    its columns are labels of runs. Each number must be that of runs.csv, to its printed digits."""
    page = PAGES[1].read_text()
    runs = sorted(csv.DictReader((RESULTS / 'runs.csv').open()), key=lambda run: run['seed'])
    tables = re.findall(r'<!-- runs\.csv: (\w+) ([^:]+): ([^>]+) -->\n((?:\|.*\n)+)', page)
    assert len(tables) == page.count('<!-- runs.csv') >= 1
    for source, steps, columns, table in tables:
        columns = re.split(r',\s+', columns)
        head, _, *rows = [re.split(r'\s*\|\s*', line)[1:-1] for line in table.splitlines()]
        if {*head[1:]} <= {run['label'] for run in runs}:       # rows beyond those named are shares
            columns += [f'share of {row[0]}' for row in rows[len(columns):]]
            rows = [*zip(*[head, *rows])][1:]
        for label, column, cell in [(label, column, cell) for label, *row in rows
                for column, cell in zip(columns, row, strict=True) if cell and column != '-']:
            found = [float(run[column]) * (100 if re.match('sc|share', column) else 1)
                     for run in runs if (run['data'], run['label']) == (source, label)
                     and run['steps'] in ['', *steps.split()] and run[column]][:3]
            found = [np.mean(found), np.std(found, ddof=1)] if '±' in cell else found
            printed = re.findall(r'\d+(?:\.\d+)?', re.sub(r'(?<=\d),(?=\d{3})', '', cell))
            for text, value in itertools.zip_longest(printed, found, fillvalue='nan'):
                half = 0.5 * 10 ** -len(text.partition('.')[2]) + 1e-9
                assert abs(float(text) - float(value)) <= half, (label, column, cell, found)


def test_the_page_of_sliders_decodes_as_pytorch_does_and_redraws(tmp_path):
    page = (RESULTS / 'explore.html').read_text()
    for path in (RESULTS / 'models').glob('*.js') if shutil.which('node') else ():
        model = betavae.load(path.with_suffix('.pt'))
        z = 2 * torch.randn(3, model.decoder[0].in_features)
        program = page.partition('<script>')[2].partition('// 2 The page')[0] + path.read_text()
        program += f'''const model = models["{path.stem}"]; model.weights = unpack(model.weights);
            console.log(JSON.stringify({z.tolist()}.map(z => [...decode(model, z)])));'''
        ran = subprocess.run(['node'], input=program, text=True, capture_output=True, check=True)
        x = torch.tensor(json.loads(ran.stdout))                                    # (3, C · 4096)
        assert (x - model.decode(z).sigmoid().flatten(1)).abs().max() < 1e-5        # 1/255 is seen
    if not (browser := shutil.which('chromium') or shutil.which('google-chrome')):
        pytest.skip('Chromium, which opens the page, is missing')
    Path('models').symlink_to(RESULTS / 'models')
    Path('explore.html').write_text(page + '''<script>onload = () => {
        const slider = document.querySelector('input'), before = find('face').toDataURL();
        slider.value = 3;
        slider.dispatchEvent(new Event('input'));
        const moved = find('face').toDataURL() !== before;
        find('reset').click();
        document.title = [moved, find('face').toDataURL() === before];
    }</script>''')
    command = [browser, '--headless', '--no-sandbox', '--disable-gpu', '--user-data-dir=user',
               '--enable-logging=stderr', '--dump-dom', tmp_path / 'explore.html']
    ran = subprocess.run(command, text=True, capture_output=True, timeout=60)
    assert '<title>true,true</title>' in ran.stdout and 'CONSOLE' not in ran.stderr
