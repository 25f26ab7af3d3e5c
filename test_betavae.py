"""Each test compares with something independent: torch.distributions, a closed form, a brute-force loop, genuine frames."""
import json
import math
import signal
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Bernoulli, Normal, kl_divergence

import betavae
import data
import metrics

HERE = Path(__file__).parent


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


def test_shapes_and_layers():
    model = betavae.BetaVAE(3, 6)
    x = torch.rand(2, 3, 64, 64)
    logits, mu, logvar = model(x)
    assert logits.shape == x.shape and mu.shape == logvar.shape == (2, 6)
    assert model.decode(mu).shape == x.shape
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [32, 32, 64, 64]
    assert (mu < 0).any() and (logvar < 0).any() and (mu > 0).any()
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
    scores = torch.linalg.qr(torch.randn(n, 5, generator=generator, dtype=torch.float64) - 0)[0]
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
    train('--data', 'dsprites', '--run', 'a', steps=200)
    log = betavae.read_log('a')
    assert log['step'].tolist() == [100, 200]
    assert log['loss'][1] < 0.7 * log['loss'][0] and log['held_out_loss'][1] < 0.7 * log['held_out_loss'][0]
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


def test_a_cut_run_equals_an_uncut_one_bit_for_bit(capsys):
    options = ['--beta', 4, '--beta-from', 1, '--anneal', 150, '--warmup', 50, '--batch', 16, '--latents', 4]
    train(*options, '--run', 'uncut', steps=230)
    train(*options, '--run', 'cut', steps=130)
    train(*options, '--run', 'cut', steps=230)
    assert 'going on from step 130' in capsys.readouterr().out
    assert same(weights('uncut'), weights('cut'))
    a, b = betavae.read_log('uncut'), betavae.read_log('cut')
    assert all(np.array_equal(a[k], b[k]) for k in a if k != 'images_per_second')
    assert Path('uncut/training.gif').read_bytes() == Path('cut/training.gif').read_bytes()
    train(*options, '--run', 'cut', steps=230)
    assert 'is finished' in capsys.readouterr().out


def test_another_setting_is_refused_and_named(capsys):
    train('--run', 'a')
    with pytest.raises(SystemExit) as stop:
        train('--run', 'a', '--beta', 2)
    assert stop.value.code == 2 and '--beta 1.0 there, 2.0 here' in capsys.readouterr().err


def test_an_interrupted_run_saves_and_goes_on(capsys, monkeypatch):
    train('--run', 'whole')
    batch = betavae.batch

    def interrupt(dataset, seed, step, *rest):
        if step == 12:
            signal.raise_signal(signal.SIGTERM)
        return batch(dataset, seed, step, *rest)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(betavae, 'batch', interrupt)
        train('--run', 'cut')
    assert 'stopped at step 13' in capsys.readouterr().out
    train('--run', 'cut')
    assert same(weights('whole'), weights('cut'))


def test_comparison_and_score():
    for name in 'ab':
        train('--data', 'dsprites', '--run', f'runs/{name}', '--seed', ord(name))
    betavae.main(['compare', 'runs/a', 'runs/b'])
    Image.open('runs/comparison.png').load()
    table = Path('runs/comparison.md').read_text().splitlines()
    assert len(table) == 4 and '| a | 1 | 30 |' in table[2]
    betavae.main(['score', 'runs/a', '--pairs', '2', '--train', '200', '--factors', '1,2,3,4'])
    entry, = json.loads(Path('runs/a/summary.json').read_text())['scores']
    assert (entry['L'], entry['K'], entry['train']) == (2, 4, 200) and 0 <= entry['score'] <= 1


def test_run_all_prints_the_eight_runs():
    lines = subprocess.run([HERE / 'run_all.sh', '--print', '--seed', '7'], capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 8 and all(line.endswith('--seed 7') for line in lines)
    for line in lines:
        betavae.training_parser().parse_args(line.split()[2:])
    assert '--beta-from 10000 --beta 1 --anneal 100000 --steps 125000' in lines[7]


@pytest.mark.parametrize('options', [
    '--beta -1', '--beta nan', '--beta inf', '--latents 0', '--batch 0', '--steps 0', '--lr 0', '--data nowhere',
    '--beta-from 3', '--crop 128', '--likelihood poisson', '--device tpu', '--precision fp8', '--colour red', '--seed -1'])
def test_bad_options_end_in_one_line(options, capsys):
    with pytest.raises(SystemExit) as stop:
        betavae.main(options.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith('betavae: ') and error.count('\n') == 1
    assert not list(Path().iterdir())


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
