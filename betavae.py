"""β-VAE (Higgins et al. 2017): a VAE whose KL term is multiplied by β. To be read beside the paper.

    python betavae.py --beta 100 --anneal 40000     pictures in runs/ after seconds, the last after
                                                    half an hour to two hours; the same command
                                                    resumes after Ctrl-C
    python betavae.py compare runs/A runs/B         finished runs in tables and on one sheet

Sections 1 to 3 are the model, the objective and the training. What surrounds them comes after:
4 a run's folder, 5 its summary and pictures, 6 the comparison of runs, 7 the command line.

Letters, as in the paper: x an image, z its code, q(z|x) = N(mu, exp(logvar)) the encoder, p(x|z)
the decoder; B images in a batch (M in Chen et al. 2018), N in the data set; C channels, J latents,
K factors, L pairs.
"""
import argparse
import contextlib
import ctypes
import functools
import hashlib
import io
import itertools
import json
import math
import re
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import metrics
from data import UserError, say


# --------------------------------------------------------------------------------------------------
# 1 The model
# --------------------------------------------------------------------------------------------------

class BetaVAE(nn.Module):
    """The convolutional network of Higgins et al. 2017 (appendix A.1) for images of 64 × 64 pixels.

    leak    slope of the ReLUs below zero: 0 in the paper, 0.2 in yukunchen113/Beta-VAE and here. A
            plain ReLU that pressure has made negative on every image has no gradient: it is dead.
    bf16    convolutions in bfloat16; weights, posterior and losses are float32 either way
    """

    def __init__(self, channels, latents, leak=0.2, bf16=False):
        super().__init__()
        self.shape = channels, 64, 64
        self.latents = latents
        self.bf16 = bf16
        down = functools.partial(nn.Conv2d, kernel_size=4, stride=2, padding=1)
        up = functools.partial(Up, kernel_size=4, stride=2, padding=1)
        activation = functools.partial(nn.LeakyReLU, leak)
        self.encoder = nn.Sequential(                               # (B, C, 64, 64)
            down(channels, 32), activation(),                       # (B, 32, 32, 32)
            down(32, 32), activation(),                             # (B, 32, 16, 16)
            down(32, 64), activation(),                             # (B, 64, 8, 8)
            down(64, 64), activation(), nn.Flatten(),               # (B, 1024)
            nn.Linear(1024, 256), activation())                     # (B, 256)
        self.posterior = nn.Linear(256, 2 * latents)                # linear: μ, log σ² of any sign
        self.decoder = nn.Sequential(                               # (B, J)
            nn.Linear(latents, 256), activation(), nn.Linear(256, 1024), activation(),  # (B, 1024)
            nn.Unflatten(1, (64, 4, 4)), up(64, 64), activation(),  # (B, 64, 8, 8)
            up(64, 32), activation(),                               # (B, 32, 16, 16)
            up(32, 32), activation(),                               # (B, 32, 32, 32)
            up(32, channels))                                       # (B, C, 64, 64)

    def encode(self, x):
        """Images, float32 (B, C, 64, 64) in [0, 1] → μ and log σ² of q(z|x), float32 (B, J)."""
        if x.dtype != torch.float32 or x.shape[1:] != self.shape:
            raise ValueError(f'expected float32 (B, C, 64, 64), not {x.dtype} {tuple(x.shape)}')
        x = x.contiguous(memory_format=torch.channels_last)         # fastest for convolutions
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            h = self.encoder(x)                                             # (B, 256)
        return self.posterior(h.float()).chunk(2, dim=1)

    def decode(self, z):
        """Codes (B, J) → logits, float32 (B, C, 64, 64): the means of p(x|z) are their sigmoid."""
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.decoder(z)
        return logits.to(torch.float32, memory_format=torch.contiguous_format)

    def forward(self, x, noise):
        """Images (B, C, 64, 64), standard normal noise (B, J) → logits, and z, μ, log σ² (B, J)."""
        mu, logvar = self.encode(x)
        z = sample(mu, logvar, noise)
        return self.decode(z), z, mu, logvar


class Up(nn.ConvTranspose2d):
    """Transposed convolution, its bias added separately: fused, its gradient is 3 times slower."""

    def forward(self, h):
        h = F.conv_transpose2d(h, self.weight, None, self.stride, self.padding)
        return h + self.bias.to(h.dtype)[:, None, None]


def sample(mu, logvar, noise):
    """z = μ + σ · noise, a draw from q(z|x): all (B, J). Kingma and Welling 2014, section 2.4."""
    return mu + torch.exp(0.5 * logvar) * noise


# --------------------------------------------------------------------------------------------------
# 2 The objective: Higgins et al. 2017, eq. 4, with its sign turned so that it is minimised
#
#     L(θ, φ; x, β)  =  − E_{q(z|x)}[log p(x|z)]  +  β · Σ_j KL(q(z_j|x) ‖ N(0, 1))
#
# in nats per image: summed over pixels, channels and latents, averaged over the batch only. A mean
# over pixels instead would silently rescale β.
# --------------------------------------------------------------------------------------------------

def objective(network, x, noise, beta, likelihood='gaussian', tc=None, gamma=None):
    """What is minimised, its reconstruction term, and KL_j averaged over the batch: (), (), (J,).

    network    x (B, C, 64, 64), noise (B, J) → logits, z, μ, log σ²
    default    reconstruction + β · KL                      Higgins et al. 2017, eq. 4
    tc=N       reconstruction + KL + (β − 1) · TC           Chen et al. 2018, eq. 4, of N images
    gamma=γ    reconstruction + γ · |KL − C|                Burgess et al. 2018, eq. 8; `beta` is C
    """
    logits, z, mu, logvar = network(x, noise)
    recon = reconstruction(logits, x, likelihood)
    kl = kl_per_latent(mu, logvar).mean(0)                                          # (J,)
    if tc is not None:
        loss = recon + (kl.sum() + (beta - 1) * total_correlation(z, mu, logvar, tc))
    elif gamma is not None:
        loss = recon + gamma * (kl.sum() - beta).abs()
    else:
        loss = recon + beta * kl.sum()
    return loss, recon, kl


def reconstruction(logits, x, likelihood):
    """− log p(x|z) in nats per image: summed over C × 64 × 64 values, averaged over the batch.

    bernoulli   − x log p − (1 − x) log (1 − p), cross-entropy, with p = sigmoid(logits)
    gaussian    (x − p)²: of variance ½, without the constant ½ ln π of each value
    """
    if likelihood == 'bernoulli':
        return F.binary_cross_entropy_with_logits(logits, x, reduction='sum') / len(x)
    if likelihood != 'gaussian':
        raise ValueError(f'the likelihood is bernoulli or gaussian, not {likelihood}')
    return F.mse_loss(logits.sigmoid(), x, reduction='sum') / len(x)


def kl_per_latent(mu, logvar):
    """KL(N(μ, σ²) ‖ N(0, 1)) = ½ (μ² + σ² − 1 − log σ²) in nats: (B, J) → (B, J).

    Kingma and Welling 2014, appendix B.
    """
    return 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar)


def total_correlation(z, mu, logvar, n):
    """KL(q(z) ‖ Π_j q(z_j)) in nats, from M of the N = `n` training images: z, μ, log σ² (M, J).

    As Chen et al. 2018, appendix C.2, with equal weights: at a z sampled for image n*, q(z) is

        q(z|n*) / N  +  (N − 1) / (N (M − 1)) · Σ over the other m of the batch of q(z|m),

    exact for M = N, unbiased for distinct images; `batch` adds (q(z|n*) − q(z)) / N on average.
    Its logarithm is biased all the same: with few images the result may be negative.
    """
    m = len(z)
    others = math.log((n - 1) / (n * max(1, m - 1)))
    log_w = torch.full((m, m), others, device=z.device).fill_diagonal_(-math.log(n))
    log_q = metrics.log_densities(z, mu, logvar)                                    # (M, M, J)
    log_qz = (log_q.sum(2) + log_w).logsumexp(1)                                    # (M,)
    log_qzj = (log_q + log_w[:, :, None]).logsumexp(1)                              # (M, J)
    return (log_qz - log_qzj.sum(1)).mean()


def beta_at(step, beta, beta_from=0.0, anneal=0):
    """β (or C) after `step` updates: linear from `beta_from` to `beta` over `anneal`, then held."""
    return beta if step >= anneal else beta_from + (beta - beta_from) * step / anneal


# --------------------------------------------------------------------------------------------------
# 3 Training
# --------------------------------------------------------------------------------------------------

def train(dataset, settings):
    """Minimise `objective` with Adam; returns the model. `settings` are made by `options`; what
    surrounds the algorithm is in Run. Raises UserError, FloatingPointError where training diverges,
    and KeyboardInterrupt when stopped."""
    s = settle(settings, dataset)
    model = initial_model(s, dataset.shape[0])
    optimiser = torch.optim.Adam(model.parameters(), lr=s.lr, fused=True)
    terms = dict(likelihood=s.likelihood, tc=dataset.train_size if s.tc else None, gamma=s.gamma)
    end = s.beta if s.capacity is None else s.capacity
    with Run(s, dataset, model, optimiser, terms).under_way() as run:  # new, or where it stopped
        for step in range(run.step, s.steps):
            beta = beta_at(step, end, s.beta_from or 0.0, s.anneal)
            optimiser.param_groups[0]['lr'] = s.lr * min(1, (step + 1) / max(1, s.warmup))
            x, noise = batch(dataset, s.seed, step, s.batch, s.latents, s.device)

            loss, recon, kl = objective(model, x, noise, beta, **terms)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

            run.record(beta, loss, recon, kl)
    return model


def batch(dataset, seed, step, size, latents, device):
    """A step's training images, float (B, C, 64, 64) in [0, 1], and noise (B, J): functions of seed
    and step alone, so that a resumed run equals one that was never cut."""
    entropy = np.random.SeedSequence((seed, step)).generate_state(1)
    generator = torch.Generator(device).manual_seed(int(entropy[0]))
    i = torch.randint(dataset.train_size, (size,), generator=generator, device=device)
    noise = torch.randn(size, latents, generator=generator, device=device)
    return dataset.images(dataset.train_index(i)) / 255, noise


@torch.no_grad()
def evaluate(model, images, beta, terms):
    """Loss, reconstruction and KL_j of held-out images, uint8 (n, C, 64, 64), with fixed noise:
    (2 + J,). For each row of the log and for the summary."""
    noise = fixed_noise(len(images), model.latents).to(images.device)
    loss, recon, kl = objective(model, images / 255, noise, beta, **terms)
    return torch.stack([loss, recon, *kl])


# 4 A run's folder: checkpoint.pt is the run; all else, but for scores.json, is remade from it -----

ROW = 100               # steps from one row of the log to the next
PICTURES = 5000         # steps from one set of pictures to the next, denser at the start
SAVE_SECONDS = 30       # from one checkpoint to the next
ACTIVE = 0.05           # a latent is active where its mean KL is above this many nats
COLLAPSED = 0.1         # the posterior has collapsed where the total KL is below this many nats


class Run:
    """Decides, after each step of `train`, what is due: a row, pictures, a checkpoint, a stop.

    Holds the state that a checkpoint keeps; plain functions do the work. SIGINT, SIGTERM and SIGHUP
    take effect after the step, with everything saved.
    """

    def __init__(self, settings, dataset, model, optimiser, terms):
        self.settings = settings
        self.dataset = dataset
        self.model = model
        self.optimiser = optimiser
        self.terms = terms
        self.folder = Path(settings.run)
        self.held_out = torch.as_tensor(                                # (≤ 1000, C, 64, 64)
            dataset.images(dataset.held_out(1000)), device=settings.device)
        self.picture_steps = {1, 3, 10, 30, 100, 300, 1000,
                              *range(PICTURES, settings.steps, PICTURES)} - {settings.steps}
        self.step = 0
        self.beta = 0.0                                 # of the last step
        self.seconds = 0.0                              # of training, without pictures and files
        self.recent = torch.zeros(ROW, 2 + settings.latents, device=settings.device)
        self.log = []                                   # rows of floats: `add_row`
        self.frames = {}                                # step → what was reconstructed then
        self.stopping = False

    @contextlib.contextmanager
    def under_way(self):
        """Hold the folder, resume what it holds, stop at a signal; after the last step `finish`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        same_bits = torch.backends.cudnn.flags(enabled=True, deterministic=True)
        with data.locked(self.folder), on_signals(self.stop), same_bits:
            data.sweep(self.folder, age=0)
            if (self.folder / 'checkpoint.pt').exists():
                self.resume(read_checkpoint(self.folder))
            announce(self.settings, self.dataset, self.model, self.step)
            self.progress = data.Progress(self.settings.steps, self.step, self.settings.batch)
            self.saved = time.monotonic()
            self.tick = time.perf_counter()
            yield self
            self.finish()

    def resume(self, state):
        """Take over a checkpoint. UserError if its options or data are not those of this run."""
        refuse_other(state, self.settings, self.dataset)
        self.model.load_state_dict(state['model'])
        self.optimiser.load_state_dict(self.optimiser.state_dict() | dict(state=state['adam']))
        self.step = state['step']
        self.beta = state['beta']
        self.seconds = state['seconds']
        self.recent.copy_(state['recent'])
        self.log = [row for row in state['log'].tolist() if row[0] % ROW == 0]
        self.frames = {n: x for n, x in state['frames'].items() if n in self.picture_steps}

    def stop(self, *_):
        self.stopping = True

    def record(self, beta, loss, recon, kl):
        """End a step of `train`; what is due after the last one is in `finish`. Raises
        KeyboardInterrupt when asked to stop, with all saved."""
        self.recent[self.step % ROW] = torch.cat([torch.stack([loss, recon]), kl]).detach()
        self.beta = beta
        self.step += 1
        row_due = self.step % ROW == 0
        if row_due:
            self.means()                                # waits for a GPU, so that its time counts
        self.seconds += time.perf_counter() - self.tick
        if row_due:
            self.add_row()
        self.progress.show(self.step, lambda: progress_line(
            self.settings, self.step, self.beta, *self.means()[1:]))
        if self.step in self.picture_steps:
            self.add_frame()
            self.save()
            if self.step >= 100:
                self.draw(images=2000)
        elif self.stopping or time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()
        if self.stopping and self.step < self.settings.steps:
            raise KeyboardInterrupt(
                f'{self.folder} stopped at step {self.step:,}, saved; the same command resumes, '
                f'and --steps {self.step} ends it there with its pictures')
        self.tick = time.perf_counter()

    def means(self):
        """Loss, reconstruction and KL_j since the last row: 2 + J floats."""
        return self.recent[:(self.step - 1) % ROW + 1].mean(0).tolist()

    def add_row(self):
        loss, recon, *kl = self.means()
        held_loss, held_recon, *held_kl = evaluate(
            self.model, self.held_out[:125], self.beta, self.terms).tolist()
        self.log.append([self.step, self.beta, loss, recon, sum(kl), *kl,
                         held_loss, held_recon, sum(held_kl), self.seconds])

    def add_frame(self):
        self.frames[self.step] = means_of(self.model, codes_of(self.model, self.held_out[:8])[0])

    def save(self):
        refuse_diverged(self.model, self.optimiser, self.step, self.folder)
        settings = {name: x for name, x in vars(self.settings).items() if name != 'run'}  # may move
        log = torch.tensor(self.log, dtype=torch.float64)
        write_checkpoint(self.folder, dict(
            step=self.step, beta=self.beta, seconds=self.seconds, recent=self.recent, log=log,
            frames=self.frames, settings=settings, dataset=self.dataset.identity(),
            model=dict(self.model.state_dict()), adam=self.optimiser.state_dict()['state']))
        self.saved = time.monotonic()

    def draw(self, images):
        summary = summarise(
            self.model, self.dataset, self.settings, self.step, self.held_out, images)
        data.write_json(self.folder / 'summary.json', summary)
        draw(self.folder, self.model, self.settings, summary, self.log, self.frames, self.held_out)
        return summary

    def finish(self):
        """The last row, checkpoint and views; also of a finished run that is started again."""
        if not self.log or self.log[-1][0] != self.step:
            self.add_row()
        self.add_frame()
        self.save()
        summary = self.draw(images=10000)
        say(f'{self.folder}/ holds the pictures, the log and the model')
        if summary['collapsed']:
            say(f"The posterior has collapsed: the codes carry {summary['kl']:.2g} nats, and every "
                'image becomes the mean image. Try a smaller --beta, or let it rise (--anneal)')


def on_signals(stop):
    """A context in which SIGINT, SIGTERM and SIGHUP call `stop`, except those that are ignored."""
    before = contextlib.ExitStack()
    with contextlib.suppress(ValueError):                   # only the main thread has signals
        for number in {signal.SIGINT, signal.SIGTERM,
                       getattr(signal, 'SIGHUP', signal.SIGTERM)}:              # not on Windows
            if signal.getsignal(number) != signal.SIG_IGN:                      # as under nohup
                before.callback(signal.signal, number, signal.signal(number, stop))
    return before


def refuse_other(state, settings, dataset):
    """Raises UserError where a checkpoint is of other options or data."""
    differ = [f'--{name.replace("_", "-")} was {was}, now {getattr(settings, name)}'
              for name, was in state['settings'].items()
              if name not in ('data', 'steps') and was != getattr(settings, name)]
    if state['dataset'] != dataset.identity():              # its place may change, not its images
        differ.append('its data has changed')
    if state['step'] > settings.steps:
        differ.append(f"it is at step {state['step']:,}, past --steps {settings.steps:,}")
    if differ:
        raise UserError(f'{settings.run} cannot be resumed like this: {"; ".join(differ)}. '
                        'Give the old options, choose another --run, or delete it')


def refuse_diverged(model, optimiser, step, folder):
    """Raises FloatingPointError where a weight or a moment of Adam is no longer finite."""
    moments = (moments.values() for moments in optimiser.state.values())
    if not all(t.isfinite().all() for t in itertools.chain(model.parameters(), *moments)):
        raise FloatingPointError(
            f'training diverged before step {step:,}: a weight or a moment of Adam is not finite. '
            f'{folder} keeps what was saved before. Try a smaller --lr or --beta, or --warmup 1000')


def write_checkpoint(folder, state):
    """checkpoint.pt, which is all that resuming reads, after two views of it: once more --steps are
    asked for, settings.json says so first, and `read_run` takes the run as unfinished. In log.csv
    loss, recon and KL_j are means over the steps since the last row."""
    data.write_json(folder / 'settings.json', state['settings'] | dict(
        python=sys.version.split()[0], torch=torch.__version__))
    kl = ','.join(f'kl_{j}' for j in range(state['settings']['latents']))
    data.write(folder / 'log.csv', lambda file: np.savetxt(
        file, state['log'], '%.9g', ',', comments='', header=f'step,beta,loss,recon,kl,{kl},'
        'held_out_loss,held_out_recon,held_out_kl,seconds'))
    content = io.BytesIO()                      # on a full disk torch itself raises no OSError
    torch.save(state, content)
    data.write(folder / 'checkpoint.pt', content.getvalue())


def initial_model(settings, channels):
    """The untrained model of a seed. The global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = BetaVAE(channels, settings.latents, settings.leak, settings.precision == 'bf16')
    return model.to(settings.device, memory_format=torch.channels_last)


def load(run, precision='fp32'):
    """The trained model of a run's folder, a BetaVAE on the CPU."""
    state = read_checkpoint(run)
    settings = options(**state['settings'] | dict(device='cpu', precision=precision))
    model = initial_model(settings, state['dataset']['shape'][0])
    model.load_state_dict(state['model'])
    return model.eval().requires_grad_(False)


def read_checkpoint(folder):
    """What `write_checkpoint` wrote. Nothing in it is executed. UserError for a file that is
    damaged, of another program, or whose settings are those of another version."""
    path = Path(folder, 'checkpoint.pt')
    if not path.is_file():
        raise UserError(f'there is no {path}: is {folder} the folder of a run?')
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():                # by checksums, which torch ignores
                raise ValueError(f'{damaged} is damaged')
        state = torch.load(path, map_location='cpu', weights_only=True)
        if state['settings'].keys() != vars(options()).keys() - {'run'}:
            raise ValueError('written by another version')
        return state
    except (OSError, MemoryError):                          # it may well be valid
        raise
    except Exception as error:                              # one of a dozen kinds
        raise UserError(f'{path} is not a valid checkpoint ({error}). It is left as it is; to '
                        f'start over, delete {folder}') from None


def announce(s, dataset, model, step):
    """The first lines: what is trained, and what its settings lead one to expect."""
    parameters = sum(p.numel() for p in model.parameters())
    say(f'{dataset.name}, {len(dataset):,} images {" × ".join(map(str, dataset.shape))} | '
        f'{describe(s)}, {s.likelihood} | {parameters:,} parameters, {s.device} {s.precision} | '
        f'{s.run}')
    if step:
        say(f'resuming from step {step:,}')
    for name, steps in (('β or C', s.anneal), ('the learning rate', s.warmup)):
        if steps > s.steps:
            say(f'warning: {name} will not reach its target: that takes {steps:,} steps, and there '
                f'are {s.steps:,}', file=sys.stderr)
    count = linear_latents(dataset, s)
    if count is not None and count < s.latents:
        say(f'a linear decoder would use about {count} of {s.latents} latents at β = {s.beta:g}, '
            f'and none from β = {2 * float(spectrum(dataset)[0]):.3g} on')


def progress_line(settings, step, beta, recon, *kl):
    letter = 'β' if settings.capacity is None else 'C'
    return (f'step {step:,}/{settings.steps:,}  {letter} {beta:.4g}  recon {recon:.1f}  '
            f'KL {sum(kl):.2f}  active {sum(x > ACTIVE for x in kl)}/{len(kl)}')


# 5 What a run shows: its summary and its pictures -------------------------------------------------

@torch.no_grad()
def codes_of(model, images):
    """μ and log σ² of images, uint8 (n, C, 64, 64): float32 (n, J) each, on the CPU."""
    device = next(model.parameters()).device
    codes = [model.encode(part.to(device) / 255)
             for part in torch.as_tensor(images).split(64)]                 # 64 fit the caches
    return tuple(torch.cat(part).cpu() for part in zip(*codes))


@torch.no_grad()
def means_of(model, z):
    """Codes (…, J) → the means of p(x|z) as uint8 (…, C, 64, 64), on the CPU."""
    flat = z.reshape(-1, z.shape[-1]).to(next(model.parameters()).device)
    x = torch.cat([model.decode(part).sigmoid() for part in flat.split(64)])
    return (x * 255).round().to(torch.uint8).cpu().view(*z.shape[:-1], *x.shape[1:])


def fixed_noise(*shape):
    """Standard normal noise that is the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def traverse(z, latents, values):
    """A code (J,) with each of some latents set to each of some values: (latents, values, J)."""
    grid = z.repeat(len(latents), len(values), 1)
    grid[torch.arange(len(latents)), :, latents] = values           # in row i the i-th of them
    return grid


def top_latent(mu, logvar):
    """The picture of yukunchen113/Beta-VAE as codes (3, 10, J): zeros, the latent of largest
    mean KL varied over the range of its samples; rows 2 and 3 add one and two mean posterior
    standard deviations to all latents."""
    sigma = torch.exp(0.5 * logvar)
    j = int(kl_per_latent(mu, logvar).mean(0).argmax())
    z = sample(mu, logvar, fixed_noise(*mu.shape))[:, j]
    row = traverse(torch.zeros(mu.shape[1]), [j], torch.linspace(z.min(), z.max(), 10))
    return torch.cat([row + n * sigma.mean(0) for n in range(3)])


@functools.lru_cache(maxsize=2)
def spectrum(dataset, n=1500):
    """λ_i, descending: the eigenvalues of the pixels' covariance over n training images in [0, 1].

    Squared error + β · KL is the loss of a VAE whose pixels have noise variance β/2; a linear
    decoder then uses #{λ_i > β/2} latents (Tipping and Bishop 1999; Lucas et al. 2019).
    """
    i = np.random.default_rng(0).integers(dataset.train_size, size=n)
    x = torch.from_numpy(dataset.images(dataset.train_index(i))).flatten(1) / 255
    x -= x.mean(0)
    return torch.linalg.eigvalsh(x @ x.T / n).flip(0)           # those of xᵀx / n, which is larger


def linear_latents(dataset, settings):
    """#{λ_i > β/2} at the final β, at most J; None for another objective or likelihood."""
    if settings.likelihood != 'gaussian' or settings.tc or settings.capacity is not None:
        return None
    return min(settings.latents, int((spectrum(dataset) > settings.beta / 2).sum()))


def known_factors(model, dataset, kl, n):
    """What the latents know of the factors, over n images of a fixed draw: their names, the MIG,
    the dimension-wise KL, and of each factor's entropy the largest share that a latent has."""
    if max(dataset.factor_sizes, default=1) == 1:
        return dict(latent_names=[f'z{j}' for j in range(len(kl))])
    index = (np.random.default_rng(0).integers(len(dataset), size=n) if len(dataset) > n
             else np.arange(len(dataset)))                                          # (n,)
    mu, logvar = codes_of(model, dataset.images(index))                             # (n, J)
    v = np.stack(np.unravel_index(index, dataset.factor_sizes), 1)                  # (n, K)
    z = sample(mu, logvar, fixed_noise(*mu.shape))
    mig, mig_samples = (metrics.mutual_information_gap(codes, v)[0] for codes in (mu, z))
    share = metrics.factor_shares(mu, v)                                            # (J, K)
    names = [f'z{j}: {dataset.factor_names[k]} {share[j, k]:.0%}'
             if share[j, k] >= 0.05 and kl[j] > ACTIVE else f'z{j}'
             for j, k in enumerate(share.argmax(1))]
    logvar = logvar.clamp(-50, 50)              # with β = 0 nothing keeps the uncertainty from 0
    parts = metrics.elbo_decomposition(mu, logvar, samples=min(500, len(mu)))
    return dict(latent_names=names, mig=mig, mig_samples=mig_samples,
                dimension_wise_kl=parts['dimension_wise_kl'].tolist(),
                **{f'share of {k}': x for k, x in zip(dataset.factor_names, share.max(0).tolist())})


def summarise(model, dataset, settings, steps, held_out, n):
    """summary.json: a run's figures, in nats per image over at most 1,000 held-out images; what its
    latents know of the factors is measured over n images."""
    terms = dict(likelihood=settings.likelihood)
    _, recon, *kl = evaluate(model, held_out, settings.beta, terms).tolist()
    mu, _ = codes_of(model, held_out)                                               # (≤ 1000, J)
    weights = b''.join(t.cpu().numpy().tobytes() for t in model.state_dict().values())
    by_mean = int(mu.mean(0).abs().argmax())
    known = known_factors(model, dataset, kl, n)
    return dict(
        label=describe(settings), steps=steps, reconstruction=recon, kl=sum(kl), kl_per_latent=kl,
        active_latents=sum(x > ACTIVE for x in kl),
        linear_latents=linear_latents(dataset, settings),
        collapsed=sum(kl) < COLLAPSED and steps >= 1000,            # before that, it is untrained
        top_latent=known['latent_names'][kl.index(max(kl))],
        top_latent_by_mean=known['latent_names'][by_mean], largest_mean=float(mu.mean(0)[by_mean]),
        largest_mean_standard_error=float(mu[:, by_mean].std(correction=0) / math.sqrt(len(mu))),
        dataset=dataset.identity(), weights=hashlib.sha256(weights).hexdigest(), **known)


def draw(folder, model, settings, summary, log, frames, held_out):
    """Every picture of a run, from its held-out images, uint8 (≤ 1000, C, 64, 64)."""
    mu, logvar = codes_of(model, held_out)
    kl = summary['kl_per_latent']
    names = summary['latent_names']
    title = f"{describe(settings)}, {summary['steps']:,} steps"
    order = sorted(range(len(kl)), key=lambda j: -kl[j])
    shown = [j for j in order if kl[j] > ACTIVE][:12] or order[:1]
    labels = [f'{names[j]}, {kl[j]:.2f} nats' for j in shown]
    notes = [f"{len(shown)} of {summary['active_latents']} active latents, {len(kl)} in all"]
    notes += ["%: how much of that factor's entropy the latent's mean knows"] * ('mig' in summary)

    eight = held_out[:8].cpu()                                              # (≤ 8, C, 64, 64)
    prior = means_of(model, fixed_noise(2, len(eight), len(kl)))
    data.save_picture(folder / 'reconstructions.jpg', data.sheet(
        torch.stack([eight, frames[summary['steps']], *prior]),
        ['held out', 'reconstructed', 'from the prior', ''], title))
    data.save_picture(folder / 'traversal.jpg', data.sheet(
        means_of(model, traverse(mu[:4][-1], shown, torch.linspace(-3, 3, 8))), labels,
        f'{title}: each latent from -3 to 3, the others as in one image', notes))
    data.save_picture(folder / 'top_latent.jpg', data.sheet(
        means_of(model, top_latent(mu, logvar)),
        ['others at 0', 'all + 1 st. dev.', 'all + 2 st. dev.'], f'{title}: {labels[0]}'))

    values = -torch.cos(torch.linspace(0, math.pi, 9))                      # -1 → 1
    moving = means_of(model, torch.stack(                                   # (shown, 8, 9, …)
        [traverse(z, shown, values) for z in mu[:8]], 1))
    sheets = [data.sheet(moving[:, :, t], [names[j] for j in shown], notes=notes, scale=1)
              for t in range(9)]
    data.save_gif(folder / 'traversal.gif', sheets + sheets[-2:0:-1], 90)   # … and back
    data.save_gif(folder / 'training.gif', [
        data.sheet(torch.stack([eight, frames[n]]), ['held out', 'reconstructed'], f'step {n:,}')
        for n in sorted(frames)], 500)
    data.save_picture(folder / 'curves.png', curves(settings, log, {j: names[j] for j in shown}))


def curves(settings, log, names):
    """Reconstruction, KL, KL of the latents that are named, and β or C, against the step."""
    steps, beta, _, recon, kl, *kls, _, held_recon, held_kl, _ = np.array(log).T

    def panel(title, train, held):
        late = len(steps) // 20                             # the first fall dwarfs the rest
        return dict(title=title, x='step',
                    limits=(min(*train, *held), max(*train[late:], *held[late:])),
                    series={'train': (steps, train), 'held out': (steps, held)})
    return data.chart([
        panel(f'reconstruction ({settings.likelihood}), nats per image', recon, held_recon),
        panel('KL, nats per image', kl, held_kl),
        dict(title='KL of each latent, nats per image', x='step',
             series={name: (steps, kls[j]) for j, name in names.items()}),
        dict(title='β' if settings.capacity is None else 'C, nats per image', x='step',
             series={'': (steps, beta)})])


# 6 Finished runs: in tables, in charts, on one sheet, scored --------------------------------------

def compare(argv):
    """Runs side by side. Those that differ in the seed alone are one row."""
    args = compare_parser().parse_args(argv)
    out = args.out or args.runs[0].parent
    runs = [read_run(folder) for folder in args.runs]
    if any(run['dataset'] != runs[0]['dataset'] for run in runs):
        raise UserError('these runs are of more than one data set; compare those of one')
    if args.pairs:
        dataset = dataset_of(runs[0])
        for run in runs:
            score(run, dataset, args.pairs, args.factors, args.train)
    unlike = [name for name in ('likelihood', 'device', 'precision')
              if any(run[name] != runs[0][name] for run in runs)]
    rows = {}
    for run in runs:
        words = [run['label'], f"{run['steps']:,} steps", *(str(run[name]) for name in unlike)]
        rows.setdefault(', '.join(words), []).append(run)

    out.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for run in runs for name in run)
    scores = [name for name in names if name.startswith('accuracy')]
    tables = dict(
        comparison=['reconstruction', 'kl', 'active_latents', 'linear_latents', 'mig',
                    'mig_samples', 'top_latent', 'top_latent_by_mean'],
        factors=[name for name in names if name.startswith('share')], metric=scores)
    for title, shown in tables.items():
        if shown:
            data.write_table(out / f'{title}.md', table(rows, shown))
    if scores:
        data.save_picture(out / 'metric.png', metric_chart(rows, scores))
    for axes in args.chart:
        data.save_picture(out / f"{re.sub('[:,]', '-', axes)}.png", chart_of(runs, axes))
    try:
        draw_comparison(out, rows, dataset_of(runs[0]))
    except UserError as error:                          # data or checkpoints that are not here
        say(f'no pictures of these runs: {error}')


def read_run(folder):
    """Settings, summary and scores of a finished run in one dictionary. Without its checkpoint.pt,
    as in results/, it can be tabulated, but not scored or drawn."""
    settings, summary, scores = (read_json(folder / f'{name}.json')
                                 for name in ('settings', 'summary', 'scores'))
    if 'label' not in summary or summary['steps'] != settings.get('steps'):
        raise UserError(f'{folder} is not the folder of a finished run. To end one where it '
                        'stopped, repeat its command with --steps and the step it had reached')
    if scores.get('weights') == summary['weights']:
        summary |= scores['scores']
    return settings | summary | dict(folder=folder)


def read_json(path):
    """A JSON file's content, {} where there is none. UserError if it is damaged."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f'{path} is damaged ({error}): delete it, and repeat the command that made '
                        'it') from None


def table(rows, names):
    """Some results of rows of runs in words: one seed's, or the mean and the range over seeds."""
    def cell(row, name):
        values = [run.get(name) for run in row]
        if not all(isinstance(value, (int, float)) for value in values):
            return '; '.join(str(value) for value in values if value is not None)
        form = ('{:.1%}' if name.startswith(('accuracy', 'share')) else
                '{:.3f}' if 'mig' in name else '{:.5g}')
        low, mean, high = (form.format(of(values)) for of in (min, np.mean, max))
        return mean if len(values) == 1 else f'{mean} ({low} to {high})'
    return [['run', 'seeds', *(name.replace('_', ' ') for name in names)]] + [
        [label, ', '.join(str(run['seed']) for run in row), *(cell(row, name) for name in names)]
        for label, row in rows.items()]


def curve(pairs):
    """(x, y) pairs → each x with the mean, the smallest and the largest of its y: (4, n)."""
    ys = {x: [y for other, y in pairs if other == x] for x, _ in sorted(pairs)}
    return np.array([(x, np.mean(y), min(y), max(y)) for x, y in ys.items()]).T


def metric_chart(rows, scores):
    """Accuracy against L: a panel for each K, by posterior means and by samples."""
    panels = {}
    for (label, row), name in itertools.product(rows.items(), scores):
        K, L, codes = re.fullmatch(r'accuracy_K(\d+)_L(\d+)(.*)', name).groups()
        series = panels.setdefault(f'accuracy in %, K = {K}{codes.replace("_", " ")}', {})
        series.setdefault(label, []).extend((int(L), 100 * run[name]) for run in row if name in run)
    return data.chart([
        dict(title=title, x='L, pairs averaged for one point', log_x=True, limits=(0, 100),
             series={label: curve(pairs) for label, pairs in series.items() if pairs})
        for title, series in panels.items()])


def chart_of(runs, axes):
    """Of axes 'x:y', or 'x:y1,y2': results against an option, a series for each value of whatever
    else varies; or against another result, a point for each run."""
    x, _, ys = axes.partition(':')
    given = vars(options())
    varying = [name for name in given if name not in (x, 'run', 'seed', 'device', 'precision')
               and len({run.get(name) for run in runs}) > 1]
    series = {}
    for y, run in itertools.product(ys.split(','), runs):
        if all(isinstance(run.get(axis), (int, float)) for axis in (x, y)):
            words = ([f'{name} {run.get(name)}'.removesuffix(' True') for name in varying
                      if run.get(name) is not False] if x in given else
                     [run['label']]) + [y.replace('_', ' ')] * (',' in ys)
            series.setdefault(', '.join(words), []).append((run[x], run[y]))
    if not series:
        raise UserError(f'--chart {axes}: no run has both, as numbers')
    xs = [x for pairs in series.values() for x, _ in pairs]
    return data.chart([dict(title=ys.replace(',', ' and ').replace('_', ' '), x=x,
                            points=x not in given, log_x=0 < 50 * min(xs) < max(xs),
                            series={words: curve(pairs) for words, pairs in series.items()})])


def draw_comparison(out, rows, dataset):
    """comparison.jpg, the top latent of each row's first run; and spectrum.png, λ beside β/2."""
    pictures = {}
    lines = {}
    for label, row in rows.items():
        first = row[0]
        model = load(first['folder'], first['precision'])
        top = top_latent(*codes_of(model, dataset.images(dataset.held_out(1000))))
        pictures[f"{label}: {first['top_latent']}"] = means_of(model, top[0])
        if first['linear_latents'] is not None:
            active = ', '.join(str(run['active_latents']) for run in row)
            lines.setdefault(first['beta'] / 2, {}).setdefault(
                f"{first['linear_latents']} predicted, active:", []).append(f'{label}: {active}')
    data.save_picture(out / 'comparison.jpg', data.sheet(
        torch.stack(list(pictures.values())), list(pictures),
        'the latent of largest KL from its smallest to its largest value, all others 0'))
    if lines:
        data.save_picture(out / 'spectrum.png', data.chart([dict(
            title='Variance λ of the pixels in each principal direction (dots), and β/2 (lines)',
            x='direction', log_y=True, points=True,
            lines={y: '    '.join('    '.join([count, *found]) for count, found in line.items())
                   for y, line in lines.items()},
            series={'': (np.arange(1, 33), spectrum(dataset)[:32].numpy())})], size=(900, 400)))


def dataset_of(run):
    """The data of a run. UserError where it is not to be had, or holds other images now."""
    try:
        dataset = data.load(run['data'], run['crop'])
    except UserError as error:
        raise UserError(f"{run['folder']}: {error}. If it was moved, repeat the run's command with "
                        'its new --data; data made in Python cannot be loaded by name') from None
    if dataset.identity() != run['dataset']:
        raise UserError(f"{run['folder']} was trained on other images than {run['data']} holds now")
    return dataset


def score(run, dataset, pairs, factors, train):
    """Add the metric at each K and L, by posterior means and by samples, to a run and its
    scores.json. What is there already is not computed again."""
    sizes = dataset.factor_sizes
    factors = factors or [len(sizes)]
    if not all(2 <= K <= len(sizes) for K in factors):
        raise UserError(f"{run['folder']}: --factors takes 2 to {len(sizes)}, counted from the "
                        f'last factor ({", ".join(dataset.factor_names) or "none is known"})')
    size = f'_N{train}' * (train != 10000)
    wanted = {name: (K, L, k) for K, L, (k, kind)
              in itertools.product(factors, pairs, enumerate(['', '_samples']))
              if (name := f'accuracy_K{K}_L{L}{size}{kind}') not in run}
    test = train // 2
    total = sum(2 * L * (train + test) for _, L, _ in wanted.values())
    codes = wanted and encoder(run, dataset, total)
    for name, (K, L, k) in wanted.items():
        try:
            run[name] = metrics.disentanglement_score(
                lambda index: codes(index)[:, k], sizes, pairs=L, factors=range(len(sizes))[-K:],
                train=train, test=test, rng=run['seed'])
        except ValueError as error:
            raise UserError(f"{run['folder']}: {error}") from None
        data.write_json(run['folder'] / 'scores.json', dict(
            steps=run['steps'], weights=run['weights'],
            scores={name: x for name, x in run.items() if name.startswith('accuracy')}))


def encoder(run, dataset, total):
    """A function from indices (n,), `total` of them over all calls, to codes (n, 2, J): posterior
    means, and samples. Of at most a million images each has one fixed sample."""
    model = load(run['folder'], run['precision'])
    rng = np.random.default_rng(run['seed'])
    small = len(dataset) <= 10 ** 6                 # of two billion faces few come twice
    total = len(dataset) if small else total
    progress = data.Progress(total)
    done = 0

    def encode(index):
        nonlocal done
        mu, logvar = codes_of(model, dataset.images(index))
        noise = torch.from_numpy(rng.standard_normal(mu.shape, np.float32))
        done += len(index)
        progress.show(done, lambda: f"{run['folder'].name}: {done:,} of {total:,} images encoded")
        return torch.stack([mu, sample(mu, logvar, noise)], 1).numpy()
    if not small:
        return encode
    parts = np.array_split(np.arange(total), 1 + total // 4096)
    return np.concatenate([encode(part) for part in parts]).__getitem__


# 7 The command line -------------------------------------------------------------------------------

COMPARE_HELP = """Put finished runs in one table and on one sheet. Those that differ in the seed
alone are one row.

    python betavae.py compare runs/A runs/B                     takes seconds
    python betavae.py compare runs/A runs/B --pairs 1,20        measures disentanglement: minutes

The measure of Higgins et al. 2017: how often a linear classifier can tell, from the codes of L
pairs of images, which of K factors the images of each pair share. It rises with L and falls with
K, so give both with every score. Scores are kept in scores.json, in the folder of each run."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and help on any terminal."""

    def error(self, message):
        raise UserError(f'{message} (see --help)')

    def print_help(self, file=None):
        say(self.format_help(), end='', file=file)


def between(kind, low, high):
    """A parser of numbers within bounds; NaN is in none."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} is not between {low:.10g} and {high:.10g}')
        return value
    return number


def integers(text):
    return sorted({between(int, 1, 10 ** 6)(word) for word in text.split(',')})


def compare_parser():
    parser = Parser('betavae.py compare', '%(prog)s RUN … [OPTION …]', COMPARE_HELP,
                    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('runs', nargs='+', type=Path, metavar='RUN', help='folders of finished runs')
    add('--pairs', type=integers, metavar='L,…', help='measure disentanglement, with these L')
    add('--factors', type=integers, metavar='K,…',
        help='of the metric: the last K factors (default: all; dSprites with 4 is without shape)')
    add('--train', type=between(int, 10, 10 ** 6), default=10000, metavar='N',
        help='of the metric: training points (default: 10000)')
    add('--chart', action='append', default=[], metavar='X:Y',
        help='draw a chart of options or results, such as beta:kl or beta:mig,mig_samples')
    add('--out', type=Path, help='folder for tables and pictures (default: that of the first run)')
    return parser


def options(*argv, **given):
    """The settings of a run, from words of a command line or keywords: options(beta=4, seed=1).
    Raises UserError for what is unknown, out of range or contradictory."""
    parser = Parser('betavae.py', '%(prog)s [OPTION …]', __doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = between(int, 0, 10 ** 9)
    positive = between(int, 1, 10 ** 9)
    real = between(float, 0, 1e12)               # past 1e12 Adam's second moment overflows float32
    add = parser.add_argument_group('data (x)').add_argument
    add('--data', default='faces', help='faces (default), dsprites, a folder or .zip of images')
    add('--crop', type=positive, help='side of the centred square cut from images; CelebA: 128')
    add = parser.add_argument_group('model').add_argument
    add('--latents', type=between(int, 1, 512), help='J (default: 10 for dsprites, else 32)')
    add('--leak', type=between(float, 0, 1), default=0.2,
        help='slope of the ReLUs below zero (default: 0.2; the paper: 0)')
    add = parser.add_argument_group('objective').add_argument
    add('--beta', type=real, default=1.0, help='β, the weight of the KL term (default: 1)')
    add('--beta-from', type=real, help='β at step 0, with --anneal (default: 0)')
    add('--anneal', type=whole, default=0, help='steps over which β moves there (default: 0)')
    add('--tc', action='store_true', help='β-TCVAE: β on the total correlation alone')
    add('--capacity', type=real, help='C: γ |KL − C| in place of β KL; C rises over --anneal steps')
    add('--gamma', type=real, help='γ, with --capacity (default: 1000)')
    add('--likelihood', choices=['bernoulli', 'gaussian'],
        help='p(x|z) (default: bernoulli for one channel, gaussian of variance ½ for colour)')
    add = parser.add_argument_group('optimiser (Adam)').add_argument
    add('--steps', type=positive, default=50000, help='(default: 50000)')
    add('--batch', type=between(int, 1, 65536), default=64, help='B (default: 64)')
    add('--lr', type=between(float, 1e-12, 1e6), default=5e-4, help='learning rate (default: 5e-4)')
    add('--warmup', type=whole, default=0, help='steps over which it rises to --lr (default: 0)')
    add = parser.add_argument_group('run').add_argument
    add('--run', help='its folder (default: runs/ and a name made from the options)')
    add('--seed', type=between(int, 0, 2 ** 32 - 1), default=0, help='(default: 0)')
    add('--device', choices=['auto', 'cpu', 'cuda'], default='auto', help='(default: auto)')
    add('--precision', choices=['auto', 'fp32', 'bf16'], default='auto',
        help='of the convolutions (default: auto, bf16 on processors that have units for it)')

    words = [f'--{name.replace("_", "-")}' + f'={value}' * (name != 'tc')
             for name, value in given.items() if value is not None and value is not False]
    s = parser.parse_args([*argv, *words])
    if s.beta_from is not None and not s.anneal:
        raise UserError('--beta-from needs --anneal: the steps over which β moves')
    if s.tc and s.batch == 1:
        raise UserError('--tc needs a --batch of two or more')
    if s.gamma is not None and s.capacity is None:
        raise UserError('--gamma needs --capacity')
    if s.capacity is not None and (s.tc or s.beta != 1 or s.beta_from is not None):
        raise UserError('--capacity takes the place of --beta, --beta-from and --tc')
    return s


def settle(settings, dataset):
    """The settings with what was left open filled in from the data and this machine."""
    s = argparse.Namespace(**vars(settings))
    s.data = dataset.source or dataset.name
    s.crop = dataset.crop
    s.latents = s.latents or usual_latents(s.data)
    s.likelihood = s.likelihood or ('bernoulli' if dataset.shape[0] == 1 else 'gaussian')
    if s.capacity is not None and s.gamma is None:
        s.gamma = 1000.0
    if s.batch > dataset.train_size:
        raise UserError(f'--batch {s.batch} is more than the {dataset.train_size} training images '
                        f'of {s.data}')
    if s.device == 'auto':
        s.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if s.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('there is no cuda device here')
    if s.precision == 'auto':
        s.precision = 'bf16' if s.device == 'cpu' and has_bf16() else 'fp32'
    name = f'{Path(s.data).stem} {describe(s)}'.replace('β', 'beta').replace(',', '')
    name = re.sub(r'[^\w.]+', '-', name + f' seed {s.seed}' * (s.seed > 0))
    s.run = s.run or str(Path('runs', name))
    return s


def usual_latents(source):
    return 10 if Path(source).name.startswith('dsprites') else 32


def describe(s):
    """A run in words, from its settings: its objective, what is unusual of model and optimiser."""
    kind, end = ('TC β' if s.tc else 'β', s.beta) if s.capacity is None else ('C', s.capacity)
    rise = f'{s.beta_from or 0:g} → {end:g} over {s.anneal:,}' if s.anneal else f'{end:g}'
    usual = vars(options(latents=usual_latents(s.data)))
    unusual = [f'{name} {getattr(s, name):g}'
               for name in ('latents', 'leak', 'gamma', 'batch', 'lr', 'warmup')
               if getattr(s, name) not in (None, usual[name])]
    return ', '.join([f'{kind} {rise}', *unusual])


def has_bf16():
    """Whether the processor has units for bfloat16: without them it is slower than float32. On a
    GPU, where starting the kernels takes the time, the casts make it slower, too."""
    has = getattr(torch.cpu, 'get_capabilities', dict)()
    return bool(has.get('avx512_bf16') or has.get('amx_bf16'))


def keep_freed_memory():
    """Let glibc keep freed memory. It would hand back each 4 MB activation, and the page faults of
    mapping the next one cost up to a third of a step. Elsewhere nothing happens."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)               # M_MMAP_THRESHOLD: up to 32 MB come from the heap,
        mallopt(-1, 2 ** 31 - 1)            # M_TRIM_THRESHOLD: which does not shrink,
        mallopt(-8, 1)                      # M_ARENA_MAX: and is the only one; others do shrink


def main(argv):
    keep_freed_memory()
    try:
        if argv[:1] == ['compare']:
            compare(argv[1:])
        else:
            settings = options(*argv)
            train(data.load(settings.data, settings.crop), settings)
    except (UserError, FloatingPointError, KeyboardInterrupt, OSError, MemoryError,
            torch.OutOfMemoryError) as error:
        if data.on_terminal():
            say('')                             # below the line of progress
        say(f'betavae: {data.one_line(error) or type(error).__name__}', file=sys.stderr)
        codes = {UserError: 2, FloatingPointError: 3, KeyboardInterrupt: 130}
        raise SystemExit(codes.get(type(error), 1)) from None


# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.25", "torch>=2.6", "pillow>=10.1"]
# ///
if __name__ == '__main__':
    main(sys.argv[1:])
