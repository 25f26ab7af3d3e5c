"""Each test compares with something independent: torch.distributions, a closed form, a brute-force loop, genuine frames."""
import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from torch.distributions import Bernoulli, Normal, kl_divergence

import betavae
import data
import metrics

HERE = Path(__file__).parent


SMALL = ['--latents', 3, '--batch', 8]


@pytest.fixture
def quick_pictures(monkeypatch):
    """No pictures: for tests of the loop alone."""
    monkeypatch.setattr(betavae, 'draw', lambda *_: dict(collapsed=False))


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(*options, steps=30):
    betavae.main(['--steps', str(steps), *map(str, options)])


def weights(run):
    return torch.load(Path(run) / 'checkpoint.pt', weights_only=True)['model']


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The objective ------------------------------------------------------------------------------------------------------

def test_kl_is_that_of_torch_distributions():
    mu, logvar = torch.randn(2, 50, 7, dtype=torch.float64)
    expected = kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), Normal(0.0, 1.0))
    torch.testing.assert_close(betavae.kl_per_latent(mu, logvar), expected)


def test_beta_1_is_the_negative_elbo():
    """Per image, in nats; the Gaussian of variance ½ has the constant D/2 · ln π besides."""
    torch.manual_seed(0)
    x, logits = torch.rand(5, 3, 64, 64).round(), torch.randn(5, 3, 64, 64)
    bernoulli = -Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3)).mean()
    torch.testing.assert_close(betavae.reconstruction(logits, x, 'bernoulli'), bernoulli)
    x = torch.rand(5, 3, 64, 64)
    gaussian = -Normal(logits.sigmoid(), math.sqrt(0.5)).log_prob(x).sum((1, 2, 3)).mean()
    constant = 3 * 64 * 64 / 2 * math.log(math.pi)
    torch.testing.assert_close(betavae.reconstruction(logits, x, 'gaussian') + constant, gaussian)


def test_the_network_is_one_graph():
    """What a GPU compiles into a CUDA graph must have no break in it, and the same values and gradients."""
    torch.manual_seed(0)
    model, x, noise = betavae.BetaVAE(3, 5), torch.rand(4, 3, 64, 64), torch.randn(4, 5)
    found = []
    for network in (model, torch.compile(model, backend='aot_eager', fullgraph=True)):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16):
            out = network(x, noise)
        sum(o.square().sum() for o in out).backward()
        found.append([*out, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * a.detach().abs().max().item())


@pytest.mark.parametrize('likelihood', ['bernoulli', 'gaussian'])
def test_a_doubled_batch_has_the_same_loss(likelihood):
    x, logits = torch.rand(4, 1, 64, 64), torch.randn(4, 1, 64, 64)
    twice = betavae.reconstruction(torch.cat([logits, logits]), torch.cat([x, x]), likelihood)
    torch.testing.assert_close(twice, betavae.reconstruction(logits, x, likelihood))


def test_schedules():
    """The three moving schedules as the documents write them."""
    for t in (0, 1, 399, 20000, 39999, 40000, 50000, 100000, 125000):
        assert betavae.beta_at(t, 10, 0, 40000) == pytest.approx(10 * min(1, t / 40000))
        assert betavae.beta_at(t, 1, 100, 40000) == pytest.approx(max(1, 100 - t * 99 / 40000))
        assert betavae.beta_at(t, 1, 10000, 100000) == pytest.approx(max(1, 10000 - t * 9999 / 100000))
        assert betavae.beta_at(t, 7) == 7


def test_a_dead_encoder_learns_again_only_if_its_relus_leak():
    for leak, alive in ((0, False), (0.2, True)):
        model, x = betavae.BetaVAE(1, 2, leak), torch.rand(4, 1, 64, 64)
        assert model(x)[1].std(0).min() > 0
        torch.nn.init.constant_(model.encoder[6].bias, -100)                    # all of a layer below zero
        mu = model(x)[1]
        mu.square().sum().backward()
        assert all((g.grad.abs().max() > 0) == alive for g in model.encoder[0].parameters())
        assert bool((mu == mu[0]).all()) != alive


def test_a_run_whose_relus_are_dead_says_so(capsys):
    train('--run', 'a', *SMALL, '--leak', 0, '--beta', '1000', steps=3)
    state = torch.load('a/checkpoint.pt', weights_only=True)
    state['model']['encoder.6.bias'].fill_(-100)
    state['model']['posterior.bias'].zero_()
    torch.save(state, 'a/checkpoint.pt')
    capsys.readouterr()
    train('--run', 'a', *SMALL, '--leak', 0, '--beta', '1000', steps=4)
    assert '--leak 0.' in capsys.readouterr().out


def test_the_slope_of_the_relus_is_kept():
    train('--run', 'a', *SMALL, '--leak', '0.1', steps=2)
    assert betavae.load('a').leak == 0.1 and betavae.load('a').encoder[1].negative_slope == 0.1


def test_shapes_and_layers():
    model = betavae.BetaVAE(3, 6)
    x = torch.rand(2, 3, 64, 64)
    logits, mu, logvar = model(x)
    assert logits.shape == x.shape and mu.shape == logvar.shape == (2, 6)
    assert model.decode(mu).shape == x.shape
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [32, 32, 64, 64]
    assert type(model.posterior) is torch.nn.Linear                             # no activation on μ and log σ²
    up = betavae.Up(5, 7)                       # the bias added apart is the bias
    h = torch.randn(2, 5, 8, 8)
    torch.testing.assert_close(up(h), torch.nn.functional.conv_transpose2d(h, up.weight, up.bias, 2, 1))


def test_linear_decoder_reaches_probabilistic_pca():
    """With a linear decoder the objective is PPCA of noise variance β/2: latent i survives if λ_i > β/2, with
    ½ ln(2 λ_i / β) nats (Lucas et al. 2019). Pixels near ½ make the sigmoid linear, of slope ¼."""
    generator = torch.Generator().manual_seed(0)
    lambdas, beta = torch.tensor([4e-3, 1e-3, 3e-4, 1e-4], dtype=torch.float64), 1e-3
    n, d = 2000, 8
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0][:, :4]
    scores = torch.linalg.qr(torch.randn(n, 5, generator=generator, dtype=torch.float64))[0]
    scores = scores[:, :4] - scores[:, :4].mean(0)
    scores = torch.linalg.qr(scores)[0] * math.sqrt(n)                                      # covariance exactly 1
    x = (0.5 + scores * lambdas.sqrt() @ basis.T).view(n, 1, 1, d)
    w = (0.01 * torch.randn(4, d, generator=generator, dtype=torch.float64)).requires_grad_()
    v = (torch.randn(d, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    logvar = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([w, v, logvar], lr=0.02)
    for step in range(4000):
        for group in optimiser.param_groups:
            group['lr'] = 0.02 * (1 - step / 4000)
        mu = (x.view(n, d) - 0.5) @ v * 10
        z = mu + torch.randn(n, 4, generator=generator, dtype=torch.float64) * torch.exp(0.5 * logvar)
        kl = betavae.kl_per_latent(mu, logvar.expand(n, 4)).mean(0)
        loss = betavae.reconstruction((z @ w).view(n, 1, 1, d), x, 'gaussian') + beta * kl.sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    expected = 0.5 * torch.log(2 * lambdas / beta).clamp(min=0)                             # 1.04, 0.35, 0, 0
    assert (kl.detach().sum() - expected.sum()).abs() < 0.05
    assert (torch.linalg.svdvals(w.detach()) / 4 > 1e-3).sum() == 2                         # two directions are used


# Training -----------------------------------------------------------------------------------------------------------

def test_training_lowers_the_loss_and_leaves_every_file():
    train('--data', 'dsprites', '--run', 'a', '--batch', 32, steps=200)
    log = betavae.read_log('a')
    assert log['step'].tolist() == [100, 200]
    assert log['loss'][1] < 0.8 * log['loss'][0] and log['held_out_loss'][1] < 0.8 * log['held_out_loss'][0]
    np.testing.assert_allclose(log['loss'], log['recon'] + log['kl'], rtol=1e-5)
    np.testing.assert_allclose(log['kl'], sum(log[f'kl_{j}'] for j in range(10)), rtol=1e-5)
    for name in ('reconstructions', 'traversal', 'top_latent', 'curves'):
        Image.open(f'a/{name}.png').load()
    assert Image.open('a/training.gif').n_frames == 2 and Image.open('a/traversal.gif').n_frames == 16
    summary, settings = (json.loads(Path('a', name).read_text()) for name in ('summary.json', 'settings.json'))
    assert summary['steps'] == 200 and len(summary['kl_per_latent']) == 10
    assert settings['latents'] == 10 and settings['likelihood'] == 'bernoulli' and settings['precision'] in ('fp32', 'bf16')
    assert not list(Path('a').glob('*.partial'))

    model = betavae.load('a')                                                               # three lines of a notebook
    mu, logvar = model.encode(torch.from_numpy(data.load('dsprites').images([5]) / np.float32(255)))
    assert model.decode(mu).shape == (1, 1, 64, 64)


def test_a_cut_run_equals_an_uncut_one_bit_for_bit(capsys, monkeypatch):
    monkeypatch.setattr(betavae, 'latent_names', lambda model, *_: 'abcd')                # they take a second each time
    options = ['--beta', 4, '--beta-from', 1, '--anneal', 90, '--warmup', 50, '--batch', 16, '--latents', 4]
    train(*options, '--run', 'uncut', steps=120)
    train(*options, '--run', 'cut', steps=65)
    train(*options, '--run', 'cut', steps=120)
    assert 'going on from step 65' in capsys.readouterr().out
    assert same(weights('uncut'), weights('cut'))
    a, b = betavae.read_log('uncut'), betavae.read_log('cut')
    assert all(np.array_equal(a[k], b[k]) for k in a.dtype.names if k != 'images_per_second')
    assert Path('uncut/training.gif').read_bytes() == Path('cut/training.gif').read_bytes()
    train(*options, '--run', 'cut', steps=120)
    assert 'is finished' in capsys.readouterr().out


def test_another_setting_is_refused_and_named(capsys, quick_pictures):
    train('--run', 'a', *SMALL)
    with pytest.raises(SystemExit) as stop:
        train('--run', 'a', *SMALL, '--beta', 2)
    assert stop.value.code == 2 and '--beta 1.0 there, 2.0 here' in capsys.readouterr().err


def test_an_interrupted_run_saves_and_goes_on(capsys, monkeypatch, quick_pictures):
    train('--run', 'whole', *SMALL)
    batch = betavae.batch

    def interrupt(dataset, seed, step, *rest):
        if step == 12:
            signal.raise_signal(signal.SIGTERM)
        return batch(dataset, seed, step, *rest)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(betavae, 'batch', interrupt)
        train('--run', 'cut', *SMALL)
    assert 'stopped at step 13' in capsys.readouterr().out
    train('--run', 'cut', *SMALL)
    assert same(weights('whole'), weights('cut'))


def test_comparison_and_score(capsys):
    for name in 'ab':
        train('--run', f'runs/{name}', '--seed', ord(name), *SMALL)
    train('--run', 'runs/c', '--beta', '200', *SMALL)
    betavae.main(['compare', 'runs/a', 'runs/b', 'runs/c'])
    Image.open('runs/comparison.png').load()
    table = Path('runs/comparison.md').read_text().splitlines()
    assert len(table) == 5 and '| a | 1 | 30 |' in table[2]
    assert ' of 3 | 3 | ' in table[2] and ' of 3 | 1 | ' in table[4]             # of the faces' variances one is above 100
    score = ['score', 'runs/a', 'runs/b', '--pairs', '2,1,2', '--train', '200', '--factors', '4']
    betavae.main(score)
    found = [json.loads(Path(f'runs/{name}/summary.json').read_text())['scores'] for name in 'ab']
    for cells in found:
        assert list(cells) == ['K = 4, L = 1, 200 points', 'K = 4, L = 2, 200 points', 'MIG']
        assert all(0 <= value <= 1 for value in cells.values())
    lines = Path('runs/metric.md').read_text().splitlines()
    assert len(lines) == 3 and lines[2].startswith('| VAE (β 1, 30 steps, latents 3, batch 8) | 2 | ')
    mean, deviation = map(float, lines[2].split('|')[3].split('±'))               # by hand, over the two seeds
    a, b = (100 * cells['K = 4, L = 1, 200 points'] for cells in found)
    assert mean == pytest.approx((a + b) / 2, abs=0.06) and deviation == pytest.approx(abs(a - b) / 2 ** 0.5, abs=0.06)
    Image.open('runs/metric.png').load()
    written = Path('runs/a/summary.json').stat().st_mtime_ns
    betavae.main(score)
    assert Path('runs/a/summary.json').stat().st_mtime_ns == written               # nothing is computed twice
    summary = json.loads(Path('runs/a/summary.json').read_text())
    Path('runs/a/summary.json').write_text(json.dumps(summary | {'steps': 20}))
    with pytest.raises(SystemExit):                                              # the weights are of another step
        betavae.main(score)
    assert 'train it to the end' in capsys.readouterr().err


def test_runs_of_different_objectives_have_different_labels():
    usual = vars(betavae.training_parser().parse_args([])) | dict(latents=32, beta_from=0.0, likelihood='gaussian')
    faces = data.Dataset('faces', (3, 64, 64), {'a': 2}, None)

    def label(**options):
        return betavae.label_of(usual | options, dict(steps=50000), faces)
    assert label() == 'VAE (β 1, 50,000 steps)' and label(beta=4.0) == 'β-VAE (β 4, 50,000 steps)'
    assert label(tc=True, beta=6.0) == 'β-TCVAE (β 6, 50,000 steps)'
    assert label(capacity=25.0, gamma=1000.0) == 'β-VAE (C 25, 50,000 steps)'
    assert label(anneal=40000, beta_from=100.0) == 'β-VAE (β 1, 50,000 steps, beta_from 100.0, anneal 40000)'
    assert label(seed=3) == label() != label(latents=10) != label(lr=1e-4)
    assert label(likelihood='bernoulli') == 'VAE (β 1, 50,000 steps, likelihood bernoulli)'


@pytest.mark.parametrize('end', [0, 7])
def test_every_line_of_a_chart_is_named_beside_it(end):
    """All eight end at the bottom, or at the top: each name is seen in its colour, within the picture and none upon another."""
    series = {f'name {n}': ([1, 2], [n, end]) for n in range(8)}
    right = np.asarray(betavae.chart([dict(title='', x='', series=series)]))[:, 402:]
    rows = [np.flatnonzero((right == ImageColor.getrgb(c)).all(2).any(1)) for c in betavae.COLOURS[:8]]
    assert all(len(r) for r in rows)
    for a, b in itertools.combinations(rows, 2):
        assert a.max() < b.min() or b.max() < a.min()


def test_the_baselines_are_codes_of_the_images():
    sizes, values = {'a': 4, 'b': 8, 'c': 8}, np.random.default_rng(0).integers(256, size=(256, 1, 8, 8), dtype=np.uint8)
    toy = data.Dataset('toy', (1, 8, 8), sizes, lambda index: torch.from_numpy(values)[index])
    makers = {(label, seed): make for label, seed, make in betavae.baselines(toy, 2)}
    assert list(makers) == [(label, seed) for label in ('ground truth', 'raw pixels', 'PCA', 'ICA', 'untrained') for seed in (0, 1)]
    every = np.arange(256)
    np.testing.assert_allclose(makers['ground truth', 0]()(every)[255], [3 / 4, 7 / 8, 7 / 8])
    np.testing.assert_allclose(makers['raw pixels', 0]()(every), values.reshape(256, 64) / 255, rtol=1e-6)
    for label in ('PCA', 'ICA'):
        np.testing.assert_allclose(np.cov(makers[label, 0]()(every).T), np.eye(10), atol=0.2)    # white, but for sampling


def test_run_all_prints_the_eight_runs():
    lines = subprocess.run([HERE / 'run_all.sh', '--print', '--seed', '7'], capture_output=True, text=True).stdout.splitlines()
    runs = [betavae.training_parser().parse_args(shlex.split(line)[2:]) for line in lines]
    assert [(Path(a.run).name, a.beta_from, a.beta, a.anneal, a.steps, a.seed) for a in runs] == [
        ('VAE', None, 1, 0, 50000, 7), ('10-Beta-VAE', None, 10, 0, 50000, 7), ('100-Beta-VAE', None, 100, 0, 50000, 7),
        ('1000-Beta-VAE', None, 1000, 0, 50000, 7), ('10000-Beta-VAE', None, 10000, 0, 50000, 7),
        ('KLD_Anneal_40000_steps-10-Beta-VAE', None, 10, 40000, 50000, 7),
        ('KLD_Decrease_40000_steps-100to1-Beta-VAE', 100, 1, 40000, 50000, 7),
        ('KLD_Decrease_100000_steps-10000to1-Beta-VAE', 10000, 1, 100000, 125000, 7)]


BAD_OPTIONS = """
    --beta -1 | --beta nan | --beta inf | --beta -inf | --beta 1e13 | --beta four | --beta | --beta 1,5
    --beta-from 3 | --beta-from -1 --anneal 5 | --beta-from nan --anneal 5 | --anneal -1 | --anneal 1.5 | --anneal 1e4 | --anneal inf
    --latents 0 | --latents -3 | --latents 513 | --latents 2.5 | --latents nan | --latents ten
    --batch 0 | --batch -64 | --batch 65537 | --batch 1e2 | --batch nan | --steps 0 | --steps -1 | --steps 10000000000 | --steps inf
    --lr 0 | --lr -0.1 | --lr nan | --lr inf | --lr 1e7 | --warmup -1 | --warmup 0.5 | --warmup nan
    --seed -1 | --seed 4294967296 | --seed 1.5 | --seed abc | --crop 0 | --crop -5 | --crop 128 | --crop 64.5
    --data nowhere | --data dsprites --crop 64 | --data nowhere.zip | --data nowhere.npz
    --likelihood poisson | --likelihood | --device tpu | --device cuda | --device cuda:9 | --precision fp8 | --precision fp16
    --tc --batch 1 | --tc --capacity 5 | --capacity -1 | --capacity nan | --capacity 5 --beta 2 | --capacity 5 --beta-from 1 --anneal 9
    --gamma 5 | --gamma -1 --capacity 5 | --gamma nan --capacity 5 | --colour red | --bet 3 | surplus | compare | score | score --baselines -1
    compare nowhere | score nowhere | score nowhere --pairs 0 | score nowhere --pairs x | score nowhere --train 1
    score --baselines 1 --factors 1 | score --baselines 1 --factors 6 | score --baselines 1 --pairs 0
"""


@pytest.mark.parametrize('options', [o.strip() for line in BAD_OPTIONS.split('\n') for o in line.split('|') if o.strip()])
def test_bad_options_end_in_one_line(options, capsys):
    if 'cuda' in options and torch.cuda.is_available():
        pytest.skip('there is one here')
    with pytest.raises(SystemExit) as stop:
        betavae.main(options.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith('betavae: ') and error.count('\n') == 1
    assert not list(Path().iterdir())


# Sturdiness ---------------------------------------------------------------------------------------------------------

def test_killed_at_any_moment_it_ends_as_an_unbroken_run():
    """kill -9 at random moments, checkpoints every moment, also in the middle of writing one."""
    program = (f'import sys; sys.path.insert(0, {str(HERE)!r}); import betavae; betavae.SAVE_SECONDS = 0.05; '
               'betavae.main(sys.argv[1:])')
    command = [sys.executable, '-c', program, *map(str, SMALL), '--steps', '105']
    train(*SMALL, '--run', 'unbroken', steps=105)
    rng, starts = np.random.default_rng(0), []
    for kill in range(40):
        process = subprocess.Popen([*command, '--run', 'killed'], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith('going on'):
                starts.append(int(line.split()[-1]))
            if line.startswith('step') and kill < 2:                            # it trains: kill it in a moment
                time.sleep(rng.uniform(0, 0.5))
                process.kill()
        if process.wait() == 0:
            break
    assert len(starts) >= 2 and starts == sorted(starts) and starts[-1] > 0
    assert same(weights('unbroken'), weights('killed'))
    a, b = betavae.read_log('unbroken'), betavae.read_log('killed')
    assert all(np.array_equal(a[k], b[k]) for k in a.dtype.names if k != 'images_per_second')
    assert Path('unbroken/training.gif').read_bytes() == Path('killed/training.gif').read_bytes()


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_a_broken_or_foreign_checkpoint_is_refused_and_kept(capsys, quick_pictures):
    class Evil:
        def __reduce__(self):
            return Path.touch, (Path('executed'),)
    train('--run', 'a', *SMALL, steps=3)
    good = Path('a/checkpoint.pt').read_bytes()
    other = torch.load('a/checkpoint.pt', weights_only=True)
    other['model'] = betavae.BetaVAE(3, 5).state_dict()
    torch.save(other, 'other.pt')
    torch.save({'step': 3}, 'foreign.pt')
    contents = [b'', good[:1000], good[:-100], np.random.default_rng(0).bytes(5000), pickle.dumps(Evil()), pickle.dumps({'model': Evil()}),
                Path('other.pt').read_bytes(), Path('foreign.pt').read_bytes()]
    for content in contents:
        Path('a/checkpoint.pt').write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            train('--run', 'a', *SMALL, steps=5)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and 'a/checkpoint.pt' in error and 'delete a' in error and error.count('\n') == 1
        assert Path('a/checkpoint.pt').read_bytes() == content and not Path('executed').exists()
    Path('a/settings.json').write_text('{"beta": ')
    with pytest.raises(SystemExit):
        train('--run', 'a', *SMALL, steps=5)
    assert 'settings.json cannot be read' in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_checkpoint(capsys, monkeypatch, quick_pictures):
    train('--run', 'a', *SMALL, steps=3)
    before = Path('a/checkpoint.pt').read_bytes()

    real = torch.save

    def full(state, buffer):                                                    # from the checkpoint on there is no room
        real(state, buffer)
        monkeypatch.setattr(betavae.os, 'fsync', no_room)

    def no_room(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(betavae.torch, 'save', full)
    with pytest.raises(SystemExit) as stop:
        train('--run', 'a', *SMALL, steps=6)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and 'No space left on device: a/checkpoint.pt' in error and error.count('\n') == 1
    assert Path('a/checkpoint.pt').read_bytes() == before and not list(Path('a').glob('*.partial'))


def test_a_run_folder_removed_under_it_or_in_the_way(capsys, monkeypatch, quick_pictures):
    monkeypatch.setattr(betavae, 'check_finite', lambda losses, done, run, *_: shutil.rmtree(run, ignore_errors=True))
    with pytest.raises(SystemExit) as stop:
        train('--run', 'a', *SMALL, steps=3)
    assert stop.value.code == 1 and 'No such file or directory: a/' in capsys.readouterr().err
    Path('file').write_text('')
    with pytest.raises(SystemExit) as stop:
        train('--run', 'file')
    assert stop.value.code == 2 and 'file is a file' in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(capsys, monkeypatch, quick_pictures):
    train('--run', 'a', *SMALL, steps=3)
    before = Path('a/checkpoint.pt').read_bytes()

    def spoilt(mu, logvar, kl=betavae.kl_per_latent):
        return kl(mu, logvar) * torch.tensor([1, 1, math.nan])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(betavae, 'kl_per_latent', spoilt)
        train('--run', 'a', *SMALL, steps=6)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and 'the KL of z2 is NaN or infinite at step 4' in error and 'checkpoint.pt is the last good one' in error
    assert Path('a/checkpoint.pt').read_bytes() == before
    with pytest.raises(SystemExit) as stop:
        train('--run', 'b', '--lr', 10, *SMALL, steps=60)                       # for real
    error = capsys.readouterr().err
    assert stop.value.code == 1 and 'at step' in error and 'nothing was saved yet' in error


def test_weights_that_are_not_finite_are_not_saved(capsys, monkeypatch, quick_pictures):
    """The losses of a step are those before its update: only a look at the weights sees what the last update did."""
    step = torch.optim.Adam.step

    def spoil(self, *rest):
        step(self, *rest)
        self.param_groups[0]['params'][0].data[0] = math.inf
    monkeypatch.setattr(torch.optim.Adam, 'step', spoil)
    with pytest.raises(SystemExit) as stop:
        train('--run', 'a', *SMALL, steps=1)
    assert stop.value.code == 1 and 'a weight is no longer finite at step 1' in capsys.readouterr().err
    assert not Path('a/checkpoint.pt').exists()


def test_the_log_goes_on_from_the_checkpoint(quick_pictures):
    """Rows past it go, be they of a run that was killed or nonsense, and so does a last row between two others."""
    train('--run', 'a', *SMALL, steps=150)
    assert betavae.read_log('a')['step'].tolist() == [100, 150]
    with open('a/log.csv', 'a') as file:
        file.write('160,1\n17')
    train('--run', 'a', *SMALL, steps=200)
    assert betavae.read_log('a')['step'].tolist() == [100, 200]


def test_checkpoints_and_pictures_do_not_disturb_training(monkeypatch):
    train('--run', 'few', *SMALL, steps=12)
    monkeypatch.setattr(betavae, 'SAVE_SECONDS', 0)
    monkeypatch.setattr(betavae, 'ROW', 5)
    monkeypatch.setattr(betavae, 'pictured', lambda steps: {5, steps})
    torch.manual_seed(123)                                                      # nor does the global random state
    train('--run', 'many', *SMALL, steps=12)
    assert same(weights('few'), weights('many'))
    monkeypatch.setattr(betavae, 'draw', lambda *_: dict(collapsed=False))
    train('--run', 'other', *SMALL, '--seed', 1, steps=12)
    assert not same(weights('few'), weights('other'))


def test_collapse_is_said_in_words_and_a_schedule_that_will_not_arrive(capsys):
    train('--run', 'a', '--beta', 10000, *SMALL, steps=20)
    out = capsys.readouterr()
    assert 'The posterior has collapsed' in out.out and 'Try a smaller --beta' in out.out       # alive: no --leak
    train('--run', 'b', '--beta', 10, '--anneal', 50, *SMALL, steps=3)
    assert 'β will not arrive' in capsys.readouterr().err


def test_another_place_and_an_ascii_terminal(tmp_path):
    """Blanks and Unicode in the path, output piped, no UTF-8 anywhere."""
    run = tmp_path / 'ein Lauf, β = 1'
    result = subprocess.run([sys.executable, HERE / 'betavae.py', '--steps', '2', '--run', run, *map(str, SMALL)], capture_output=True,
                            env=dict(os.environ, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', PYTHONIOENCODING='ascii'))
    assert result.returncode == 0 and b'step 2/2' in result.stdout, result.stderr
    assert (run / 'summary.json').exists()


# The data -----------------------------------------------------------------------------------------------------------

def test_factor_order_is_c_order():
    for name in ('dsprites', 'faces'):
        d = data.load(name)
        index = np.random.default_rng(0).integers(len(d), size=100)
        expected = np.unravel_index(index, d.factor_sizes)
        assert np.array_equal(torch.stack(data.unravel(torch.from_numpy(index), d.factor_sizes)), expected)
        assert d.images(index).shape == (100, *d.shape) and d.images(index).dtype == np.uint8
        assert len(d) == math.prod(d.factor_sizes) and len(d.factor_names) == len(d.factor_sizes)
        with pytest.raises(IndexError):
            d.images([len(d)])


def test_dsprites_are_where_and_what_the_factors_say():
    """The square's area and every sprite's middle against the known geometry."""
    d = data.load('dsprites')
    for v in [(0, 5, 0, 0, 0), (0, 0, 0, 31, 0), (1, 3, 0, 10, 20), (1, 5, 7, 31, 31)]:
        image = d.images([np.ravel_multi_index(v, d.factor_sizes)])[0, 0]
        assert set(np.unique(image)) == {0, 255}
        ys, xs = np.nonzero(image)
        assert abs(xs.mean() + 0.5 - (16 + 32 * v[3] / 31)) < 0.2 and abs(ys.mean() + 0.5 - (16 + 32 * v[4] / 31)) < 0.2
        area = [19.2 ** 2, math.pi * 12.8 * 7.2][v[0]] * (0.5 + 0.1 * v[1]) ** 2
        assert abs(len(xs) - area) < 0.1 * area
    assert np.array_equal(d.images([0]), d.images([39 * 1024]))                 # orientation 39 is 0 again


# Where 160 genuine frames (of the animation in DeepMind's repository) stand among the drawn images, and the frames' checksum.
FRAMES = """
491520 573440 655360 696320 614400 532480 491520 573440 655360 696320 734208 732160 730112 728064 726016 723968
721920 719872 717824 715776 713728 711680 709632 707584 705536 703488 701440 699392 697344 696320 696322 696324
696326 696328 696330 696332 696334 696336 696338 696340 696342 696344 696346 696348 696350 696351 696415 696479
696543 696607 696671 696735 696799 696863 696927 696991 697055 697119 697183 697247 697311 697343 697341 697339
697337 697335 697333 697331 697329 697327 697325 697323 697321 697319 697317 697315 697313 697312 697248 697184
697120 697056 696992 696928 696864 696800 696736 696672 696608 696544 696480 696416 696352 696320 614400 532480
245760 327680 409600 450560 368640 286720 245760 327680 409600 450560 488448 486400 484352 482304 480256 478208
476160 474112 472064 470016 467968 465920 463872 461824 459776 457728 455680 453632 451584 450560 368640 286720
0 81920 163840 204800 122880 40960 0 81920 163840 204800 242688 240640 238592 236544 234496 232448 230400 228352
226304 224256 222208 220160 218112 216064 214016 211968 209920 207872 205824 204800 122880 40960
"""
FRAMES_SHA256 = '75dc01cf48e3748a94cbfc8648dd7dc88714001901eeaa334b091b570a8579c9'


def test_drawn_dsprites_equal_160_genuine_frames_bit_for_bit():
    images = data.load('dsprites').images([int(i) for i in FRAMES.split()])
    assert hashlib.sha256(np.packbits(images > 0).tobytes()).hexdigest() == FRAMES_SHA256


def test_the_official_file_loads_through_the_same_interface(monkeypatch):
    monkeypatch.setattr(data, 'DSPRITES', dict(data.DSPRITES, shape=1, scale=1, orientation=2))        # 2,048 images
    drawn = data.Dataset.images(data.load('dsprites'), np.arange(2048))
    np.savez_compressed('official.npz', imgs=drawn[:, 0] // 255, metadata=np.array({'a': 1}, dtype=object))
    official = data.load('official.npz')
    assert np.array_equal(official.images(np.arange(2048)), drawn) and official.factor_sizes == (1, 1, 2, 32, 32)
    Path('cut.npz').write_bytes(Path('official.npz').read_bytes()[:3000])
    np.savez('other.npz', imgs=np.zeros((5, 64, 64), np.uint8))
    np.savez('foreign.npz', x=np.zeros(3))
    for name in ('cut.npz', 'other.npz', 'foreign.npz'):
        with pytest.raises(ValueError, match=f'{name} is not the official dSprites file'):
            data.load(name)


def test_each_step_of_each_factor_changes_the_face_and_nothing_else_does():
    d, rng = data.load('faces'), np.random.default_rng(0)
    for k, size in enumerate(d.factor_sizes):
        v = rng.integers(d.factor_sizes, size=(20, 1, len(d.factor_sizes))).repeat(size, axis=1)
        v[:, :, k] = np.arange(size)
        x = d.images(np.ravel_multi_index(tuple(v.reshape(-1, v.shape[2]).T), d.factor_sizes)).reshape(20, size, -1)
        change = np.abs(np.diff(x.astype(int), axis=1))                         # (20, size − 1, pixels)
        assert change.max(2).min() >= 6, d.factor_names[k]                      # of 255: seen at 64 × 64
    index = rng.integers(len(d), size=500)                                      # an image depends on its index alone,
    np.testing.assert_array_equal(d.images(index)[::7], d.images(index[::7]))   # not on its neighbours, nor on the call


def test_faces_have_the_variances_that_the_documents_betas_ask_for():
    """λ_i > β/2 decides which direction is worth a latent: none at β = 1000, a few at 100, about ten at 10."""
    d = data.load('faces')
    x = d.images(np.random.default_rng(0).integers(len(d), size=1500)).reshape(1500, -1) / np.float32(255)
    x -= x.mean(0)
    eigenvalues = np.linalg.eigvalsh(x @ x.T / len(x))
    assert eigenvalues[-1] == pytest.approx(230, abs=10)                        # between 150 and 400; the README names it
    assert 2 <= (eigenvalues > 50).sum() <= 4 and 7 <= (eigenvalues > 5).sum() <= 12


def test_variances_are_those_of_the_covariance():
    """Two halves of the picture, each black or white: variance ¼ in each of 2,048 pixels, ones and the others apart."""
    def draw(index):
        x = torch.zeros(len(index), 1, 64, 64, dtype=torch.uint8)
        x[:, 0, :32] = 255 * (index % 2).view(-1, 1, 1)
        x[:, 0, 32:] = 255 * (index // 2 % 2).view(-1, 1, 1)
        return x
    found = betavae.variances(data.Dataset('toy', (1, 64, 64), {}, draw, size=10 ** 6)).numpy()
    np.testing.assert_allclose(found[-2:], [512, 512], rtol=0.1)
    assert len(found) == 1500 and found[:-2].max() < 1e-2


def test_held_out_and_training_parts_are_apart():
    for n in (2, 18, 19, 20, 39, 1000):
        d = data.Dataset('toy', (1, 64, 64), {}, None, size=n)
        trained, held = set(d.train_index(np.arange(d.train_size))), set(d.held_out(10 ** 6))
        assert not trained & held and trained | held == set(range(n)) and held


def test_a_folder_and_a_zip_of_images(tmp_path):
    folder = tmp_path / 'pictures' / 'deep'
    folder.mkdir(parents=True)
    for k in range(30):
        Image.new('RGB', (100, 80), (k * 8, 0, 255 - k * 8)).save(folder / f'{k:02}.png')
    (folder / '.hidden.png').write_bytes(b'no')
    (folder / 'notes.txt').write_text('no')
    d = data.load(tmp_path / 'pictures')
    assert len(d) == 30 and d.images([7])[0, :, 5, 5].tolist() == [56, 0, 199]
    with zipfile.ZipFile('p.zip', 'w') as archive:
        for file in sorted(folder.glob('*.png')):
            archive.write(file, file.name)
    z = data.load('p.zip', crop=64)
    assert np.array_equal(z.images(np.arange(30)), d.images(np.arange(30)))


def save(name, mode='RGB', colour=(200, 100, 50), size=(64, 64), **options):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(name, **options)


def test_every_kind_of_picture_comes_out_right():
    """The colour that a person sees, to within JPEG's and CMYK's rounding."""
    save('p/a.png')
    save('p/b.jpg', quality=95)
    save('p/c.png', 'L', 100)
    save('p/d.png', 'RGBA', (200, 100, 50, 0))                                  # transparent: the white behind it
    save('p/e.jpg', 'CMYK', (0, 128, 255, 0))
    Image.fromarray(np.full((64, 64), 257 * 77, np.uint16)).save('p/f.png')     # 16 bits
    Image.new('RGB', (64, 64), (10, 20, 200)).quantize(4).save('p/g.gif')
    turned = Image.new('RGB', (64, 128), 'black')
    turned.paste('white', (0, 0, 64, 64))                                       # white above …
    exif = turned.getexif()
    exif[0x0112] = 6                                                            # … shown turned right by 90°: white right
    turned.save('p/h.png', exif=exif)
    x = data.load('p').images(np.arange(8))
    expected = [(200, 100, 50), (200, 100, 50), (100,) * 3, (255,) * 3, (255, 127, 0), (77,) * 3, (10, 20, 200)]
    for image, colour in zip(x, expected):
        assert np.abs(image[:, 30, 30].astype(int) - colour).max() <= 3, colour
    assert x[7, 0, 32, 60] == 255 and x[7, 0, 32, 3] == 0


def test_a_cache_is_whole_or_made_again(monkeypatch):
    for k in range(20):
        save(f'p/{k:02}.png', colour=(k, k, k))
    first = data.load('p').images(np.arange(20))
    cache, = Path('cache').glob('*.npy')
    whole = cache.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(data, 'decode', None)                                     # a whole one is not decoded again
        assert np.array_equal(data.load('p').images(np.arange(20)), first)
    cache.write_bytes(whole[:-12288])                                           # a whole image short
    assert np.array_equal(data.load('p').images(np.arange(20)), first) and cache.read_bytes() == whole

    def killed(*_):
        raise KeyboardInterrupt
    save('p/20.png')                                                            # a changed source, and a kill half-way
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, 'decode', killed)
        data.load('p')
    assert list(Path('cache').iterdir()) == [cache]
    assert len(data.load('p')) == 21 and len(data.load('p', crop=32)) == 21 and len(list(Path('cache').iterdir())) == 3


def bad_sources():
    """Every input that cannot be loaded, and a word of what is said of it."""
    Path('empty').mkdir()
    Path('texts').mkdir()
    Path('texts/a.txt').write_text('no picture')
    Path('note.txt').write_text('no picture')
    for k in range(10):
        save(f'broken/{k}.jpg')
    Path('broken/5.jpg').write_bytes(Path('broken/5.jpg').read_bytes()[:400])
    save('small/a.png', size=(50, 50))
    bomb = bytearray(Path('broken/0.jpg').read_bytes())
    start = bomb.index(b'\xff\xc0') + 5
    bomb[start:start + 4] = b'\xff\xff\xff\xff'                                 # 65,535 × 65,535 pixels
    Path('bomb').mkdir()
    Path('bomb/a.jpg').write_bytes(bomb)
    Path('program').mkdir()
    Path('program/a.jpg').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit')
    with zipfile.ZipFile('bad.zip', 'w') as archive:
        archive.write('broken/0.jpg')
    content = bytearray(Path('bad.zip').read_bytes())
    content[100] ^= 255                                                         # a member whose checksum is wrong
    Path('bad.zip').write_bytes(content)
    with zipfile.ZipFile('locked.zip', 'w') as archive:
        archive.write('broken/0.jpg')
    content = bytearray(Path('locked.zip').read_bytes())
    content[6] |= 1
    content[content.index(b'PK\x01\x02') + 8] |= 1                              # the flag of encryption, twice
    Path('locked.zip').write_bytes(content)
    Path('cut.zip').write_bytes(content[:200])
    return {'nowhere': 'no data', 'empty': 'no image', 'texts': 'no image', 'note.txt': 'neither a folder', 'broken': '5.jpg',
            'small --crop 64': 'smaller than', 'bomb': 'a.jpg', 'program': 'a.jpg', 'bad.zip': '0.jpg',
            'locked.zip': 'encrypted', 'cut.zip': 'whole .zip'}


def test_bad_sources_are_named_in_one_line(capsys):
    for source, word in bad_sources().items():
        with pytest.raises(SystemExit) as stop:
            betavae.main(['--data', *source.split()])
        *skipped, error = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and source.split()[0] in error and word in error, error
        assert all(line.startswith(('skipped', 'decoding')) for line in skipped)
    assert not Path('runs').exists() and not any(Path('cache').iterdir())


def test_one_bad_image_in_a_hundred_is_skipped_and_named(capsys):
    for k in range(150):
        save(f'p/{k:03}.png')
    Path('p/070.png').write_bytes(b'not a picture')
    assert len(data.load('p')) == 149 and 'skipped p: 070.png' in capsys.readouterr().err


def test_no_room_for_the_cache(monkeypatch, capsys):
    save('p/a.png')
    save('p/b.png')
    monkeypatch.setattr(data.shutil, 'disk_usage', lambda path: data.shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(SystemExit):
        betavae.main(['--data', 'p'])
    assert 'no room' in capsys.readouterr().err and not any(Path('cache').iterdir())


# The metric ---------------------------------------------------------------------------------------------------------

def test_the_score_of_the_true_factors_is_1_and_of_noise_is_chance():
    sizes = (6, 8, 10, 12)
    rng = np.random.default_rng(0)

    def identity(index):
        return np.stack(np.unravel_index(index, sizes), 1) / np.array(sizes)
    score = metrics.disentanglement_score(identity, sizes, train=2000, test=1000, rng=np.random.default_rng(1))
    assert score > 0.999
    noise = metrics.disentanglement_score(lambda index: rng.normal(size=(len(index), 5)), sizes, train=2000, test=2000)
    assert abs(noise - 0.25) < 0.04
    assert score == metrics.disentanglement_score(identity, sizes, train=2000, test=1000, rng=np.random.default_rng(1))


def test_a_code_that_lacks_one_factor_still_scores_1():
    """The flaw that Kim and Mnih (2018) name: what is left out is told by its absence."""
    sizes = (6, 8, 10, 12)

    def three_of_four(index):
        return np.stack(np.unravel_index(index, sizes), 1)[:, 1:] / np.array(sizes[1:])
    assert metrics.disentanglement_score(three_of_four, sizes, train=2000, test=1000) > 0.99


def test_features_are_those_of_the_algorithm_by_brute_force():
    """On a grid of 2 × 3 × 2 the expected |μ(x₁) − μ(x₂)| is a mean over all pairs that share factor k."""
    sizes, factors = (2, 3, 2), np.array([0, 1])
    code = np.random.default_rng(0).normal(size=(12, 4))
    x, k = metrics.features(lambda i: code[i], np.array(sizes), 2000, factors, 400, np.random.default_rng(1))
    assert set(k) == {0, 1}
    points = list(np.ndindex(*sizes))
    for factor in factors:
        pairs = [(a, b) for a in range(12) for b in range(12) if points[a][factor] == points[b][factor]]
        expected = np.mean([np.abs(code[a] - code[b]) for a, b in pairs], axis=0)
        np.testing.assert_allclose(x[k == factor].mean(0), expected, atol=0.01)
    one, _ = metrics.features(lambda i: np.stack(np.unravel_index(i, sizes), 1), np.array(sizes), 7, np.array([1]), 50,
                              np.random.default_rng(2))
    assert (one[:, 1] == 0).all() and (one[:, 0] > 0).any()                     # the shared one, and only it, never differs
    with pytest.raises(ValueError):
        metrics.disentanglement_score(lambda i: code[i], sizes, factors=[0, 3])


@pytest.mark.parametrize('ridge', [1e-8, 1e-6, 1e-4])
def test_softmax_regression_reaches_the_known_optimum(ridge):
    """With one binary feature the model is saturated: it must predict the classes' frequencies, at cross-entropy H(k|x)."""
    rng = np.random.default_rng(0)
    x = rng.integers(2, size=3000)
    p = np.array([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    k = (rng.random((3000, 1)) > p[x].cumsum(1)).sum(1)
    w = metrics.softmax_regression(x[:, None].astype(float), k, 3, ridge)
    logits = np.hstack([x[:, None], np.ones((3000, 1))]) @ w
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    h = -sum(np.mean((x == a) & (k == c)) * np.log(np.mean(k[x == a] == c)) for a in range(2) for c in range(3))
    assert -log_p[np.arange(3000), k].mean() == pytest.approx(h, abs=2e-3 if ridge > 1e-5 else 1e-6)
    separable = np.eye(3)[rng.integers(3, size=300)] + 0.1 * rng.normal(size=(300, 3))
    w = metrics.softmax_regression(separable, separable.argmax(1), 3, ridge)
    assert ((np.hstack([separable, np.ones((300, 1))]) @ w).argmax(1) == separable.argmax(1)).all()


def test_mutual_information_gap():
    v = np.array([(a, b) for a in range(2) for b in range(2)] * 5)
    mig, information = metrics.mutual_information_gap(v[:, ::-1] * 3.0 - 1, v)   # by hand: z₀ is v₁, z₁ is v₀
    np.testing.assert_allclose(information, [[0, math.log(2)], [math.log(2), 0]], atol=1e-12)
    assert mig == pytest.approx(1)
    half = np.where(v[:, :1] == 0, 0, v)                                         # I(z₁; v₁) = ½ ln 2, I(z₁; v₀) = by hand:
    mig, information = metrics.mutual_information_gap(np.hstack([v[:, :1], half[:, 1:]]), v)
    h = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)                              # H(z₁), z₁ = v₀ and v₁
    known = h - 0.5 * math.log(2)
    np.testing.assert_allclose(information, [[math.log(2), 0], [known, known]], atol=1e-12)
    assert mig == pytest.approx(((math.log(2) - known) + known) / math.log(2) / 2)

    rng = np.random.default_rng(0)
    v = rng.integers((3, 6, 40), size=(20000, 3))
    assert metrics.mutual_information_gap(v + 0.0, v)[0] > 0.99
    assert metrics.mutual_information_gap(rng.normal(size=(20000, 5)), v)[0] < 0.01
    factor, share = metrics.encoded_factors(v[:, [2, 0]] * -1.0, v, bins=40)
    assert factor.tolist() == [2, 0] and (share > 0.99).all()


def test_elbo_decomposition_sums_and_ceiling():
    rng = np.random.default_rng(0)
    mu, logvar = rng.normal(size=(500, 4)) * [2, 1, 0.5, 0], np.log(rng.uniform(0.01, 1, size=(500, 4)))
    d = metrics.elbo_decomposition(mu, logvar)
    assert d['mutual_information'] + d['total_correlation'] + d['dimension_wise_kl'].sum() == pytest.approx(d['kl'], abs=1e-9)
    analytic = betavae.kl_per_latent(torch.from_numpy(mu), torch.from_numpy(logvar)).sum(1).mean()
    assert abs(d['kl'] - analytic) < 4 * d['standard_error']
    assert 0 < d['mutual_information'] <= math.log(500)
    apart = metrics.elbo_decomposition(1000 * mu, logvar)                       # codes that never overlap: the ceiling
    assert apart['mutual_information'] == pytest.approx(math.log(500), abs=1e-6)


@pytest.mark.parametrize('correlation', [0.0, 0.8])
def test_total_correlation_of_a_gaussian(correlation):
    """− ½ ln det of the correlation matrix: the means and the posterior's noise add up to a Gaussian q(z)."""
    rng, noise = np.random.default_rng(0), 0.2
    mu = rng.multivariate_normal([0, 0], [[1 - noise, correlation], [correlation, 1 - noise]], size=2500)
    d = metrics.elbo_decomposition(mu, np.full((2500, 2), math.log(noise)))
    assert d['total_correlation'] == pytest.approx(-0.5 * math.log(1 - correlation ** 2), abs=0.04)


def test_minibatch_estimate_of_q_is_unbiased_and_exact_for_the_whole_set():
    torch.manual_seed(0)
    mu, logvar = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    z = mu + torch.exp(0.5 * logvar) * torch.randn(6, 2, dtype=torch.float64)
    q = torch.stack([torch.stack([Normal(m, s).log_prob(a).sum().exp() for m, s in zip(mu, (0.5 * logvar).exp())]) for a in z])
    for m in (2, 3, 6):                         # all batches of M images that hold image 0
        batches = [(0, *rest) for rest in itertools.combinations(range(1, 6), m - 1)]
        weights = betavae.log_weights(m, 6).exp()[0]
        estimates = [sum(w * q[0, i] for w, i in zip(weights, b)) for b in batches]
        assert torch.stack(estimates).mean().item() == pytest.approx(q[0].mean().item(), rel=1e-6)
    marginals = torch.stack([torch.stack([Normal(mu[:, j], (0.5 * logvar[:, j]).exp()).log_prob(a[j]).exp().mean() for j in range(2)])
                             for a in z])
    expected = (q.mean(1).log() - marginals.log().sum(1)).mean()
    torch.testing.assert_close(betavae.total_correlation(z, mu, logvar, 6), expected, rtol=1e-6, atol=1e-6)


def test_objectives():
    """β-TCVAE with β = 1 is the VAE; capacity is reached from both sides."""
    noise, mu, logvar = torch.randn(3, 8, 5)
    z = mu + torch.exp(0.5 * logvar) * noise
    args = betavae.training_parser().parse_args(['--tc'])
    kl = betavae.kl_per_latent(mu, logvar).mean(0)
    torch.testing.assert_close(betavae.penalty(args, 1.0, mu, logvar, noise, 100), (kl.sum(), kl))
    more = betavae.penalty(args, 3.0, mu, logvar, noise, 100)[0]
    torch.testing.assert_close(more, kl.sum() + 2 * betavae.total_correlation(z, mu, logvar, 100))
    args = betavae.training_parser().parse_args(['--capacity', '9', '--gamma', '10'])
    for c in (0.0, 1000.0):
        torch.testing.assert_close(betavae.penalty(args, c, mu, logvar, noise, 100)[0], 10 * abs(kl.sum() - c))


def test_pca_and_ica_find_what_is_there():
    """PCA whitens; ICA recovers independent uniform sources from their mixture, up to order and sign."""
    rng = np.random.default_rng(0)
    sources = rng.uniform(-1, 1, size=(5000, 3))
    x = np.hstack([sources @ rng.normal(size=(3, 6)), 1e-3 * rng.normal(size=(5000, 1))])
    mean, matrix = metrics.pca(x, 3)
    np.testing.assert_allclose(np.cov((x - mean) @ matrix, rowvar=False), np.eye(3), atol=1e-6)
    mean, matrix = metrics.fast_ica(x, 3)
    correlation = np.abs(np.corrcoef(((x - mean) @ matrix).T, sources.T)[:3, 3:])
    assert (correlation.max(1) > 0.99).all() and set(correlation.argmax(1)) == {0, 1, 2}
