# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.25", "torch>=2.6", "pillow>=10.1"]
# ///
"""β-VAE (Higgins et al. 2017): a VAE whose KL term is multiplied by β, in one file to read beside the paper. The model,
the objective and the training loop come first; below `evaluate` there are files, pictures and the command line.

    python betavae.py --beta 100 --anneal 40000         train; pictures, a log and checkpoints land in runs/
    python betavae.py compare runs/A runs/B             one sheet and one table of several runs
    python betavae.py score runs/A runs/B               the disentanglement metric of finished runs, as the paper's table

    from betavae import load
    model = load('runs/A')
    mu, logvar = model.encode(x)                        # x: floats in [0, 1], (B, C, 64, 64)
    means = model.decode(mu).sigmoid()                  # (B, C, 64, 64)

Letters: x an image, z its code, q(z|x) = N(mu, exp(logvar)) the encoder, p(x|z) the decoder;
B images in a batch, M of N images, C channels, J latents, K factors, L pairs. All losses are in nats per image.
"""
import argparse
import contextlib
import ctypes
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import data as datasets
import metrics

ACTIVE = 0.05           # a latent is active where its mean KL is above this many nats
COLLAPSED = 0.1         # the posterior has collapsed where the total KL is below this many nats
ROW = 100               # steps from one row of log.csv to the next
PICTURES = 5000         # steps from one set of pictures to the next, after those at 100, 300 and 1000
SAVE_SECONDS = 30       # from one checkpoint to the next


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------

class Up(nn.ConvTranspose2d):
    """A transposed convolution that doubles the side. Its bias is added apart: fused, its gradient is 3 times slower."""

    def __init__(self, channels_in, channels_out):
        super().__init__(channels_in, channels_out, kernel_size=4, stride=2, padding=1)

    def forward(self, h):
        h = F.conv_transpose2d(h, self.weight, None, self.stride, self.padding)
        return h + self.bias.to(h.dtype)[:, None, None]


class BetaVAE(nn.Module):
    """The convolutional network of Higgins et al. 2017 (appendix A.1) for images of 64 × 64 pixels.

    `leak` is the slope of its ReLUs below zero: 0 in the paper, 0.2 in the code of the eight runs (yukunchen113/Beta-VAE),
    and here. Once long pressure on the codes has made all units of a layer negative, plain ReLUs never pass a gradient again.
    """

    def __init__(self, channels, latents, leak=0.2):
        super().__init__()

        def down(channels_in, channels_out):
            return nn.Conv2d(channels_in, channels_out, kernel_size=4, stride=2, padding=1)

        def relu():
            return nn.LeakyReLU(leak)
        self.latents, self.leak = latents, leak
        self.encoder = nn.Sequential(                                             # (B, C, 64, 64)
            down(channels, 32), relu(), down(32, 32), relu(),                     # (B, 32, 16, 16)
            down(32, 64), relu(), down(64, 64), relu(), nn.Flatten(),             # (B, 1024)
            nn.Linear(1024, 256), relu())                                         # (B, 256)
        self.posterior = nn.Linear(256, 2 * latents)                              # linear: μ and log σ² take any sign
        self.decoder = nn.Sequential(                                             # (B, J)
            nn.Linear(latents, 256), relu(), nn.Linear(256, 1024), relu(), nn.Unflatten(1, (64, 4, 4)),
            Up(64, 64), relu(), Up(64, 32), relu(),                               # (B, 32, 16, 16)
            Up(32, 32), relu(), Up(32, channels))                                 # (B, C, 64, 64)

    def encode(self, x):
        """Images (B, C, 64, 64) in [0, 1] → μ and log σ² of q(z|x), each (B, J), in float32."""
        h = self.encoder(x.contiguous(memory_format=torch.channels_last))         # the layout that convolutions like best
        with torch.autocast(h.device.type, enabled=False):
            return self.posterior(h.float()).chunk(2, dim=1)

    def decode(self, z):
        """Codes (B, J) → logits (B, C, 64, 64) in float32: the means of p(x|z) are their sigmoid."""
        return self.decoder(z).to(torch.float32, memory_format=torch.contiguous_format)

    def forward(self, x, noise=None):
        """Images → logits (B, C, 64, 64), μ, log σ² (B, J). The noise behind z is standard normal, (B, J)."""
        mu, logvar = self.encode(x)
        z = sample(mu, logvar, torch.randn_like(mu) if noise is None else noise)
        return self.decode(z), mu, logvar


def sample(mu, logvar, noise):
    """z = μ + σ · noise, a draw from q(z|x) with noise from N(0, 1): all (B, J). Kingma and Welling 2014, section 2.4."""
    return mu + torch.exp(0.5 * logvar) * noise


# ---------------------------------------------------------------------------------------------------------------------
# The objective: Higgins et al. 2017, eq. 4, with its sign turned so that it is minimised
#
#     L(θ, φ; x, β)  =  − E_{q(z|x)}[log p(x|z)]  +  β · Σ_j KL(q(z_j|x) ‖ N(0, 1))
#
# in nats per image: summed over pixels, channels and latents, averaged over the batch. A mean over pixels instead would
# rescale β in silence.
# ---------------------------------------------------------------------------------------------------------------------

def kl_per_latent(mu, logvar):
    """KL(N(μ, σ²) ‖ N(0, 1)) = ½ (μ² + σ² − 1 − log σ²), in nats: (B, J) → (B, J). Kingma and Welling 2014, appendix B."""
    return 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar)


def reconstruction(logits, x, likelihood):
    """− log p(x|z), in nats per image: summed over C × 64 × 64 values, averaged over the batch.

    bernoulli   cross-entropy of the pixels, − x log p − (1 − x) log (1 − p) with p = sigmoid(logits)
    gaussian    squared error, (x − sigmoid(logits))²: a Gaussian of variance ½ without its constant D/2 · ln π, for D values
    """
    if likelihood == 'bernoulli':
        return F.binary_cross_entropy_with_logits(logits, x, reduction='sum') / len(x)
    return F.mse_loss(logits.sigmoid(), x, reduction='sum') / len(x)


def beta_at(step, beta, beta_from=0.0, anneal=0):
    """β (or C) after `step` updates: linear from `beta_from` to `beta` over the first `anneal` steps, then held."""
    return beta if step >= anneal else beta_from + (beta - beta_from) * step / anneal


def log_weights(m, n):
    """ln of the weights (M, M) in the estimate of q(z) from a batch of M of N images, n* being that which z is drawn for:

        q̂(z)  =  q(z|n*) / N  +  (N − 1) / (N (M − 1)) · Σ over the others of q(z|m)

    unbiased for M > 1 different images, and exact for M = N.
    """
    others = math.log((n - 1) / (n * (m - 1))) if m > 1 else -math.inf
    return torch.full((m, m), others).fill_diagonal_(-math.log(n))


def total_correlation(z, mu, logvar, n):
    """KL(q(z) ‖ Π_j q(z_j)) in nats, from a batch of M of the N = `n` images (Chen et al. 2018): z, μ, log σ² (M, J)."""
    log_q, log_w = metrics.log_densities(z, mu, logvar), log_weights(len(z), n).to(z.device)    # (M, M, J), (M, M)
    log_qz = (log_q.sum(2) + log_w).logsumexp(1)                                            # (M,)
    log_qzj = (log_q + log_w[:, :, None]).logsumexp(1)                                      # (M, J)
    return (log_qz - log_qzj.sum(1)).mean()


def penalty(args, beta, mu, logvar, noise, n):
    """What is added to the reconstruction, in nats, and KL_j, (J,), averaged over the batch.

    default       β · KL                        Higgins et al. 2017
    --tc          KL + (β − 1) · TC             β-TCVAE, Chen et al. 2018: β on the total correlation alone
    --capacity    γ · |KL − C|                  Burgess et al. 2018: here `beta` is C, which rises with the step
    """
    kl = kl_per_latent(mu, logvar).mean(0)
    if args.tc:
        return kl.sum() + (beta - 1) * total_correlation(sample(mu, logvar, noise), mu, logvar, n), kl
    if args.capacity is not None:
        return args.gamma * (kl.sum() - beta).abs(), kl
    return beta * kl.sum(), kl


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

def batch(data, seed, step, size, latents, device):
    """The images, float (B, C, 64, 64) in [0, 1], and the noise (B, J) of a step: functions of seed and step alone,
    which makes a resumed run equal to one that was never cut."""
    generator = torch.Generator(device).manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))
    i = torch.randint(data.train_size, (size,), generator=generator, device=device)
    noise = torch.randn(size, latents, generator=generator, device=device)
    return as_input(data.images(data.train_index(i))), noise


def as_input(images):
    """uint8 (B, C, 64, 64) → float in [0, 1]."""
    return images.float().div_(255)


def train(args):
    data, run, device = args.dataset, Path(args.run), torch.device(args.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = BetaVAE(data.shape[0], args.latents, args.leak)
    model = model.to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(model.parameters(), lr=args.lr, fused=device.type != 'mps')
    # On a GPU the launches of its many small kernels would bound the network: compiled, they are replayed as CUDA graphs.
    compiles = device.type == 'cuda' and importlib.util.find_spec('triton') and shutil.which('cc')
    network = torch.compile(model, mode='reduce-overhead') if compiles else model
    precision = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.precision == 'bf16')
    held_out = torch.from_numpy(data.images(data.held_out(1000))).to(device)                # (≤ 1000, C, 64, 64)

    # What a checkpoint holds besides model and optimiser. The random state is the seed together with the step.
    state = dict(step=0, seconds=0.0, recent=torch.zeros(ROW, 2 + args.latents), frames={}, log=[])
    if (run / 'checkpoint.pt').exists():
        state, trained = read_checkpoint(run)
        try:
            model.load_state_dict(trained.state_dict())
            optimiser.load_state_dict(state['optimiser'])
        except (RuntimeError, ValueError, KeyError):
            raise datasets.Unusable(f'{run}/checkpoint.pt is of another model. To begin anew, delete {run}') from None
        if state['step'] >= args.steps:
            return print(f"{run} is finished: {state['step']:,} steps. More --steps trains on; to begin anew, delete it.")
        print(f"going on from step {state['step']:,}")
    recent = state['recent'].to(device)                               # loss, recon, KL_j of the steps since the last row
    picture_steps = pictured(args.steps)
    frames = {step: x for step, x in state['frames'].items() if step in picture_steps}
    run.mkdir(parents=True, exist_ok=True)
    write(run / 'settings.json', json.dumps(settings(args), indent=1).encode())
    log = [row for row in state['log'] if int(row.split(',')[0]) % ROW == 0]      # a last row may lie between two others
    write_log(run, log, args.latents)

    first, seconds, interrupted = state['step'], state['seconds'], []   # seconds of training, those of earlier starts included
    row_step, row_start = first, seconds                                # where the log's present row began
    shown, saved = 0, time.monotonic()                                  # when a line was printed, when a checkpoint written
    with contextlib.ExitStack() as restored:
        for s in (signal.SIGINT, signal.SIGTERM):                       # Ctrl-C and a polite kill wait for the end of the step
            restored.callback(signal.signal, s, signal.signal(s, lambda *_: interrupted.append(True)))
        for step in range(first, args.steps):
            tick = time.perf_counter()
            beta = beta_at(step, args.beta if args.capacity is None else args.capacity, args.beta_from, args.anneal)
            optimiser.param_groups[0]['lr'] = args.lr * min(1, (step + 1) / max(1, args.warmup))
            x, noise = batch(data, args.seed, step, args.batch, args.latents, device)

            optimiser.zero_grad()
            with precision():
                logits, mu, logvar = network(x, noise)
            recon = reconstruction(logits, x, args.likelihood)
            weighted, kl = penalty(args, beta, mu, logvar, noise, data.train_size)          # kl: (J,)
            loss = recon + weighted
            loss.backward()
            optimiser.step()

            recent[step % ROW] = torch.cat([torch.stack([loss, recon]), kl]).detach()
            done, now, means = step + 1, time.monotonic(), recent[:step % ROW + 1].mean(0)
            stop, picture_due = bool(interrupted), done in picture_steps
            save_due = picture_due or now - saved > SAVE_SECONDS or stop
            if device.type == 'cpu' or save_due or done % ROW == 0:             # a look at each step stalls a GPU
                check_finite(recent, done, run)
            seconds += time.perf_counter() - tick                               # of training, without pictures and files
            if save_due and not all(p.isfinite().all() for p in model.parameters()):
                fail_at(done, 'a weight is no longer finite', run)
            if done % ROW == 0 or done == args.steps:
                with precision():
                    held = evaluate(model, held_out[::8], args, beta)
                check_finite(held[None], done, run, ' on held-out images')
                log.append(log_row(done, beta, means, held, (done - row_step) * args.batch / (seconds - row_start)))
                write_log(run, log, args.latents)
                row_start, row_step = seconds, done
            if done in (first + 1, args.steps) or now - shown > (0.5 if sys.stdout.isatty() else 10):
                shown = now
                say(done, args, beta, means.tolist(), (done - first) / (seconds - state['seconds']))
            if picture_due:
                frames[done] = means_of(model, codes_of(model, held_out[:8], args.precision)[0])
                summary = draw(run, args, model, held_out, frames, seconds)
            if save_due:
                write(run / 'checkpoint.pt', lambda file: torch.save(dict(
                    step=done, seed=args.seed, leak=args.leak, seconds=seconds, recent=recent, frames=frames, log=log,
                    model=model.state_dict(), optimiser=optimiser.state_dict()), file))
                saved = now
            if stop and done < args.steps:
                print(f'\nstopped at step {done:,} and saved: the same command goes on from there')
                raise SystemExit(130)
    print(f'\n{run}/ holds the pictures, the log and the model')
    if summary['collapsed']:
        mu = codes_of(model, held_out, args.precision)[0]                               # (≤ 1000, J)
        print(f"The posterior has collapsed: the codes carry {summary['kl']:.2g} nats, so that every image is reconstructed "
              'as the mean. ' + ('No image moves μ any more, its ReLUs are dead: begin anew without --leak 0.'
                                 if (mu == mu[0]).all() else 'Try a smaller --beta, or let it climb (--anneal).'))


@torch.no_grad()
def evaluate(model, images, args, beta):
    """Loss, reconstruction and KL_j of images (uint8), with noise that is the same each time: a tensor (2 + J,)."""
    x = as_input(images)
    noise = torch.randn(len(x), model.latents, generator=torch.Generator().manual_seed(0)).to(x.device)
    logits, mu, logvar = model(x, noise)
    recon = reconstruction(logits, x, args.likelihood)
    weighted, kl = penalty(args, beta, mu, logvar, noise, args.dataset.train_size)
    return torch.cat([torch.stack([recon + weighted, recon]), kl])


def pictured(steps):
    """The steps at which pictures are made."""
    return {100, 300, 1000, *range(PICTURES, steps, PICTURES), steps}


def check_finite(losses, done, run, where=''):
    """Stop, naming the step, the term and the latent, if one of the losses (rows, 2 + J) is NaN or infinite."""
    bad = ~losses.isfinite()
    if bad.any():
        row = int(bad.any(1).nonzero()[0])
        kls = [f'z{j}' for j in bad[row, 2:].nonzero()[:, 0].tolist()]
        terms = ['the reconstruction'] * bool(bad[row, 1]) + [f'the KL of {", ".join(kls)}'] * bool(kls)
        step = (done - 1) // ROW * ROW + row + 1 if len(losses) > 1 else done
        fail_at(step, f'{" and ".join(terms) or "the loss"}{where} is NaN or infinite', run)


def fail_at(step, what, run):
    kept = f'{run}/checkpoint.pt is the last good one' if (run / 'checkpoint.pt').exists() else 'nothing was saved yet'
    fail(f'{what} at step {step:,}; {kept}. Try a smaller --lr or --beta, or --warmup 1000', code=1)


def say(done, args, beta, means, steps_per_second):
    """One line of progress: it renews itself in a terminal."""
    active = sum(kl > ACTIVE for kl in means[2:])
    left = (args.steps - done) / steps_per_second
    left = f'{left / 3600:.1f} h' if left > 5400 else f'{left / 60:.0f} min' if left > 90 else f'{left:.0f} s'
    name = 'β' if args.capacity is None else 'C'
    line = (f'step {done:,}/{args.steps:,}  {name} {beta:.4g}  recon {means[1]:.1f}  KL {sum(means[2:]):.2f}  '
            f'active {active}/{args.latents}  {left} left  {steps_per_second * args.batch:,.0f} images/s')
    if sys.stdout.isatty():
        print(f'\r{line[:shutil.get_terminal_size().columns - 1]}\x1b[K', end='', flush=True)
    else:
        print(line, flush=True)


def keep_freed_memory():
    """Let glibc keep freed memory. It would hand back each 4 MB activation, and the page faults on mapping the next one
    cost up to a third of a step. Elsewhere (macOS, Windows) there is no mallopt, and nothing happens."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)                   # M_MMAP_THRESHOLD: blocks up to 32 MB come from the heap
        mallopt(-1, 2 ** 31 - 1)                # M_TRIM_THRESHOLD: and the heap does not shrink
        mallopt(-8, 1)                          # M_ARENA_MAX: and there is one, since the others do shrink


# ---------------------------------------------------------------------------------------------------------------------
# Files: settings, log, checkpoint
# ---------------------------------------------------------------------------------------------------------------------

def write(path, content):
    """Replace a file by bytes, or by what a function writes to a buffer, atomically: there is always a whole one."""
    if callable(content):
        buffer = io.BytesIO()                       # a full disk is then an OSError below, whatever writes
        content(buffer)
        content = buffer.getvalue()
    partial = path.with_name(path.name + '.partial')
    try:
        with open(partial, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def settings(args):
    """What settings.json holds: every option as it was settled, and the versions."""
    versions = dict(python=platform.python_version(), torch=torch.__version__, data=args.dataset.version)
    return {name: getattr(args, name) for name in OPTIONS} | {'versions': versions}


def read_json(path, cure='delete it'):
    """The dictionary in a file; {} where there is none."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        fail(f'{path} cannot be read ({error}); {cure}')


def read_checkpoint(run):
    """The checkpoint of a run and a model with its weights. Raises Unusable for a file that is no whole checkpoint."""
    path = Path(run) / 'checkpoint.pt'
    if not path.exists():
        raise datasets.Unusable(f'there is no {path}: is {run} the folder of a run?')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)         # executes nothing that it finds there
        model = BetaVAE(len(state['model']['decoder.11.bias']), state['model']['decoder.0.weight'].shape[1], state['leak'])
        model.load_state_dict(state['model'])
        if state['recent'].shape != (ROW, 2 + model.latents) or not {'step', 'seconds', 'frames', 'log', 'optimiser'} <= set(state):
            raise ValueError
        return state, model
    except Exception as error:                                                  # one of a dozen kinds, by what is broken
        raise datasets.Unusable(f'{path} is no whole checkpoint of this program ({type(error).__name__}); it is left as it '
                                f'is. To begin anew, delete {run}') from None


def load(run):
    """The trained model of a run folder: a BetaVAE in float32 on the CPU, ready to encode and decode."""
    return read_checkpoint(run)[1].eval().requires_grad_(False)


def log_row(done, beta, means, held, speed):
    (loss, recon, *kl), (held_loss, held_recon, *held_kl) = means.tolist(), held.tolist()
    values = [beta, loss, recon, sum(kl), *kl, held_loss, held_recon, sum(held_kl), round(speed)]
    return ','.join([str(done), *(f'{value:.7g}' for value in values)])


def write_log(run, rows, latents):
    names = ['step', 'beta', 'loss', 'recon', 'kl', *(f'kl_{j}' for j in range(latents)),
             'held_out_loss', 'held_out_recon', 'held_out_kl', 'images_per_second']
    write(run / 'log.csv', '\n'.join([','.join(names), *rows, '']).encode())


def read_log(run):
    """log.csv as an array with named columns."""
    return np.atleast_1d(np.genfromtxt(Path(run) / 'log.csv', delimiter=',', names=True))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def means_of(model, z):
    """Codes (…, J) → the means of p(x|z) as uint8 (…, C, 64, 64), on the CPU."""
    flat = z.reshape(-1, model.latents).to(next(model.parameters()).device)
    x = torch.cat([model.decode(part).sigmoid() for part in flat.split(64)])
    return (x * 255).round().to(torch.uint8).cpu().view(*z.shape[:-1], *x.shape[1:])


@torch.no_grad()
def codes_of(model, images, precision):
    """μ and log σ² of images (uint8, (n, C, 64, 64)): each (n, J), float32, on the CPU. `precision` is the run's, 'fp32' or
    'bf16'; 64 at a time fit the caches."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bf16'):
        mu, logvar = zip(*(model.encode(as_input(part.to(device))) for part in images.split(64)))
    return torch.cat(mu).cpu(), torch.cat(logvar).cpu()


def traverse(z, latents, values):
    """A code (J,) with each of some latents set to each of some values, a tensor: (latents, values, J)."""
    grid = z.repeat(len(latents), len(values), 1)
    for row, j in enumerate(latents):
        grid[row, :, j] = values
    return grid


font = functools.lru_cache(ImageFont.load_default)


def latin(text):
    return text.replace('β', 'beta')                                              # Pillow's own font has no Greek


def sheet(images, labels=(), title='', notes=(), scale=None):
    """Images (rows, columns, C, 64, 64) → a picture of them: a label left of each row, a title above, lines of notes below."""
    images = np.pad(np.asarray(images), ((0, 0),) * 3 + ((1, 1),) * 2, constant_values=255)
    images = np.repeat(images, 3, axis=2) if images.shape[2] == 1 else images               # (rows, columns, 3, 66, 66)
    rows, columns, _, side, _ = images.shape
    title, labels, notes = latin(title), [latin(label) for label in labels], [latin(note) for note in notes]
    scale = scale or (2 if rows <= 12 else 1)
    body = Image.fromarray(images.transpose(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3))
    body = body.resize((body.width * scale, body.height * scale), Image.Resampling.BICUBIC)
    size = 8 + 4 * scale
    left = max((int(font(size).getlength(label)) + 16 for label in labels), default=0)
    wide = max([left + body.width] + [int(font(size).getlength(text)) + 12 for text in [title, *notes]])
    top, line = (size * 2 if title else 0), size + 6
    picture = Image.new('RGB', (wide, top + body.height + line * len(notes) + (6 if notes else 0)), 'white')
    picture.paste(body, (left, top))
    pen = ImageDraw.Draw(picture)
    pen.text((6, size // 3), title, 'black', font(size))
    for row, label in enumerate(labels):
        pen.text((left - 8, top + (row + 0.5) * side * scale), label, 'black', font(size), anchor='rm')
    for k, note in enumerate(notes):
        pen.text((6, top + body.height + 4 + k * line), note, (90, 90, 90), font(size))
    return picture


def ticks(low, high, log=False):
    """Round numbers between two ends: 1, 2 or 5 times a power of ten apart, or (log) the powers themselves."""
    if log:
        parts = (1, 2, 5) if high / low < 300 else (1,)
        return [p * 10.0 ** k for k in range(-9, 13) for p in parts if low * 0.999 <= p * 10.0 ** k <= high * 1.001]
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next((m for m in (1, 2, 5) if (high - low) / (step * m) <= 6), 10)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


COLOURS = ['#1f6fb4', '#e07b28', '#3c9a3c', '#c23b3b', '#8458b3', '#7a5548', '#d667a8', '#22a6b3', '#a8a81f', '#666666']


def chart(panels, size=(460, 320)):
    """Line charts side by side. A panel is a dictionary: title, x (the axis' name), series {name: (xs, ys)}, or with a
    third array, the standard deviations, drawn as bars; optionally limits (of y), log_x, and lines {name: y} drawn across."""
    (w, h), left, top, bottom = size, 64, 34, 46
    picture = Image.new('RGB', (w * len(panels), h), 'white')
    pen = ImageDraw.Draw(picture)
    for k, panel in enumerate(panels):
        series = {name: [np.asarray(v, float) for v in values] for name, values in panel['series'].items()}
        lines, log = panel.get('lines', {}), panel.get('log_x', False)
        xs = np.concatenate([v[0] for v in series.values()])
        ys = np.concatenate([v[1] for v in series.values()] + [list(lines.values())])
        ys = ys[np.isfinite(ys)] if np.isfinite(ys).any() else np.zeros(1)
        x0, x1 = xs.min(), max(xs.max(), xs.min() * 1.001)
        y0, y1 = panel.get('limits', (ys.min(), ys.max()))
        spare = (y1 - y0) or abs(y0) or 20.0
        y0, y1 = y0 - 0.05 * spare, y1 + 0.05 * spare
        x_left, wide = k * w + left, max(int(font(12).getlength(latin(name))) for name in [*series, *lines])
        x_right = max(x_left + w / 3, (k + 1) * w - 24 - wide)
        along = np.log if log else np.asarray

        def px(x):
            return x_left + (along(x) - along(x0)) / (along(x1) - along(x0)) * (x_right - x_left)

        def py(y):
            return h - bottom - (np.clip(y, y0, y1) - y0) / (y1 - y0) * (h - top - bottom)
        for x in ticks(x0, x1, log) if x1 > 1.01 * x0 else [x0]:
            pen.line([px(x), top, px(x), h - bottom], '#e6e6e6')
            pen.text((px(x), h - bottom + 5), f'{x:,g}', 'black', font(12), anchor='ma')
        for y in ticks(y0, y1):
            pen.line([x_left, py(y), x_right, py(y)], '#e6e6e6')
            pen.text((x_left - 6, py(y)), f'{y:.6g}', 'black', font(12), anchor='rm')
        pen.rectangle([x_left, top, x_right, h - bottom], outline='#888888')
        pen.text((x_left, 9), panel['title'], 'black', font(15))
        pen.text(((x_left + x_right) / 2, h - 20), panel['x'], 'black', font(12), anchor='ma')
        for y in lines.values():
            pen.line([x_left, py(y), x_right, py(y)], '#b0b0b0')
        ends = [[py(y), name, '#888888'] for name, y in lines.items()]          # each line is named at its right end
        for (name, (x, y, *deviation)), colour in zip(series.items(), itertools.cycle(COLOURS)):
            points = [(px(a), py(b)) for a, b in zip(x, y) if np.isfinite(b)]
            pen.line(points, colour, 2, joint='curve')
            if len(points) < 30:
                for a, b in points:
                    pen.ellipse([a - 3, b - 3, a + 3, b + 3], colour)
            for spread in deviation:
                for a, b, d in zip(x, y, spread):
                    pen.line([px(a), py(b - d), px(a), py(b + d)], colour, 2)
            ends += [[points[-1][1], name, colour]] if points else []
        ends.sort()
        for above, below in itertools.pairwise(ends):
            below[0] = max(below[0], above[0] + 14)                             # names do not overlap …
        ends.append([h - bottom + 14, '', 'white'])
        for below, above in itertools.pairwise(ends[::-1]):
            above[0] = min(above[0], below[0] - 14)                             # … nor run over the axis
        for y, name, colour in ends:
            pen.text((x_right + 8, y), latin(name), colour, font(12), anchor='lm')
    return picture


def save_picture(path, picture):
    write(path, lambda file: picture.save(file, 'PNG', compress_level=4))


def save_gif(path, pictures, milliseconds):
    """A GIF with one palette, that of the last frame: quick to make, and nothing flickers."""
    palette = pictures[-1].quantize(128)
    frames = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    write(path, lambda file: frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:], duration=milliseconds,
                                            loop=0))


def top_latent(mu, logvar):
    """The documents' picture, as codes (3, 10, J): the zero vector with the latent of largest mean KL varied from its
    least to its greatest sampled value; the second and third row add one and two mean posterior standard deviations."""
    sigma, j = torch.exp(0.5 * logvar), int(kl_per_latent(mu, logvar).mean(0).argmax())
    z = sample(mu, logvar, torch.randn(mu.shape, generator=torch.Generator().manual_seed(0)))
    row = traverse(torch.zeros(mu.shape[1]), [j], torch.linspace(z[:, j].min(), z[:, j].max(), 10))
    return torch.cat([row + n * sigma.mean(0) for n in range(3)])


def latent_names(model, data, precision, kl, n=5000):
    """What each latent is called, measured over n images: the factor of largest normalised mutual information, and that
    share, where it is at least 5 % and the latent is active; else its number alone."""
    if not data.factor_sizes:
        return [f'z{j}' for j in range(model.latents)]
    index = np.random.default_rng(0).integers(len(data), size=n)
    mu = codes_of(model, data.images(torch.from_numpy(index)), precision)[0].numpy()
    factor, share = metrics.encoded_factors(mu, np.stack(np.unravel_index(index, data.factor_sizes), 1))
    return [f'z{j}' + (f': {data.factor_names[k]} {s:.0%}' if s >= 0.05 and kl[j] > ACTIVE else '')
            for j, (k, s) in enumerate(zip(factor, share))]


@torch.no_grad()
def draw(run, args, model, held_out, frames, seconds):
    """Make every picture of a run, and summary.json; returns the summary."""
    done, likelihood = max(frames), args.likelihood
    mu, logvar = codes_of(model, held_out, args.precision)                                                 # (≤ 1000, J)
    kl = kl_per_latent(mu, logvar).mean(0)                                                  # (J,)
    order = kl.argsort(descending=True).tolist()
    active = [j for j in order if kl[j] > ACTIVE]
    idle = ', '.join(f'z{j}' for j in sorted(set(order) - set(active))) or 'none'
    name = f'{Path(run).name}, {done:,} steps'

    eight = held_out[:8].cpu()                                                              # (≤ 8, C, 64, 64)
    prior = torch.randn(2, 8, args.latents, generator=torch.Generator().manual_seed(0))[:, :len(eight)]
    save_picture(run / 'reconstructions.png', sheet(torch.stack([eight, frames[done], *means_of(model, prior)]),
                                                    ['held out', 'reconstructed', 'from the prior', ''], name))

    rows = active or order[:1]
    base = mu[min(3, len(mu) - 1)]
    names = latent_names(model, args.dataset, args.precision, kl)
    save_picture(run / 'traversal.png', sheet(
        means_of(model, traverse(base, rows, torch.linspace(-3, 3, 8))),
        [f'{names[j]}, {kl[j]:.2f} nats' for j in rows],
        f'{name}: each active latent from -3 to 3, the others as in one image', [f'inactive: {idle}']))

    there = -torch.cos(torch.linspace(0, math.pi, 9))                                       # -1 → 1
    moving = means_of(model, torch.stack([traverse(z, order, there) for z in mu[:8]], 1))     # (J, 8, 9, …)
    moving = [sheet(moving[:, :, t], [f'z{j}' for j in order], scale=1) for t in range(9)]
    save_gif(run / 'traversal.gif', moving + moving[-2:0:-1], 90)                           # … and back

    picture = means_of(model, top_latent(mu, logvar))
    save_picture(run / 'top_latent.png', sheet(
        picture, ['zero vector', '+ 1 st. dev.', '+ 2 st. dev.'], f'{name}: {names[order[0]]}, {kl[order[0]]:.2f} nats'))

    save_gif(run / 'training.gif', [sheet(torch.stack([eight, frames[step]]), title=f'step {step:,}')
                                    for step in sorted(frames)], 500)

    log = read_log(run)
    steps = log['step']

    def panel(term, title):
        train, held = log[term], log[f'held_out_{term}']
        early = len(steps) // 20                                      # the first fall would flatten all that follows
        return dict(title=title, x='step', series={'train': (steps, train), 'held out': (steps, held)},
                    limits=(min(train.min(), held.min()), max(train[early:].max(), held[early:].max())))
    save_picture(run / 'curves.png', chart([
        panel('recon', f'reconstruction ({likelihood}), nats per image'), panel('kl', 'KL, nats per image'),
        dict(title='beta' if args.capacity is None else 'capacity C', x='step', series={'': (steps, log['beta'])})]))

    noise = torch.randn(mu.shape, generator=torch.Generator().manual_seed(0))
    z = sample(mu, logvar, noise).to(held_out.device)
    recon = [reconstruction(model.decode(part), as_input(x), likelihood) * len(x)
             for part, x in zip(z.split(64), held_out.split(64))]
    summary = dict(
        steps=done, beta=log['beta'][-1], reconstruction=float(sum(recon) / len(z)), kl=float(kl.sum()),
        kl_per_latent=kl.tolist(), active_latents=len(active), collapsed=bool(kl.sum() < COLLAPSED),
        latent_names=names, top_latent=order[0], top_latent_by_largest_absolute_mean=int(mu.mean(0).abs().argmax()),
        train_reconstruction=log['recon'][-1], train_kl=log['kl'][-1], seconds=round(seconds, 1),
        images_per_second=round(float(np.median(log['images_per_second']))), device=args.device, precision=args.precision)
    write(run / 'summary.json', json.dumps(summary, indent=1).encode())
    return summary


# ---------------------------------------------------------------------------------------------------------------------
# Finished runs: side by side, and scored
# ---------------------------------------------------------------------------------------------------------------------

load_data = functools.lru_cache(maxsize=2)(datasets.load)


def finished(run):
    """What the folder of a finished run holds: settings, summary, data set, model."""
    try:
        s, summary = (json.loads((run / name).read_text()) for name in ('settings.json', 'summary.json'))
        state, model = read_checkpoint(run)
        if missing := set(OPTIONS) - set(s):
            raise ValueError(f'its settings lack {", ".join(sorted(missing))}')
        if state['step'] != summary['steps']:
            raise ValueError(f"it is at step {state['step']:,}, its summary at {summary['steps']:,}: train it to the end")
        return s, summary, load_data(s['data'], s['crop']), model.eval().requires_grad_(False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f'{run} is not a finished run ({error})')


@functools.lru_cache(maxsize=2)
def variances(data, n=1500):
    """λ_i: the eigenvalues of the pixels' covariance over n training images in [0, 1], a tensor (n,).

    With the Gaussian likelihood of variance ½ a linear decoder uses #{λ_i > β/2} latents (Tipping and Bishop 1999; Lucas et
    al. 2019): squared error + β KL is the loss of a VAE whose pixels have noise variance β/2.
    """
    i = np.random.default_rng(0).integers(data.train_size, size=n)
    x = as_input(torch.from_numpy(data.images(data.train_index(i)))).flatten(1)
    x -= x.mean(0)
    return torch.linalg.eigvalsh(x @ x.T / len(x))                # as those of xᵀx / n, which is larger


def compare(argv):
    """Runs on one sheet (the first row of each top_latent) and in one table."""
    parser = Parser(prog='betavae.py compare', description='Draw finished runs on one sheet and write one table of them.')
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN')
    parser.add_argument('--out', type=Path, help='for comparison.png and .md (default: where the first run is)')
    args = parser.parse_args(argv)
    out, pictures = args.out or args.runs[0].parent, []
    table = [['run', 'β', 'steps', 'reconstruction', 'KL', 'active latents', 'λ > β/2', 'collapsed', 'top latent'], ['---'] * 9]
    for run in args.runs:
        s, summary, data, model = finished(run)
        codes = codes_of(model, torch.from_numpy(data.images(data.held_out(1000))), s['precision'])
        pictures.append(means_of(model, top_latent(*codes)[0]))
        letter, end = ('', s['beta']) if s['capacity'] is None else ('C ', s['capacity'])
        moving = letter + (f"{s['beta_from']:g} → {end:g} over {s['anneal']:,}" if s['anneal'] else f'{end:g}')
        top = summary['top_latent']
        linear = s['likelihood'] == 'gaussian' and not s['tc'] and s['capacity'] is None
        predicted = min(s['latents'], int((variances(data) > summary['beta'] / 2).sum())) if linear else ''
        kl = max(0, summary['kl'])                                              # collapsed, it may round to −1e-9
        table.append([run.name, moving, f"{summary['steps']:,}", f"{summary['reconstruction']:.2f}", f'{kl:.2f}',
                      f"{summary['active_latents']} of {s['latents']}", str(predicted), 'yes' if summary['collapsed'] else 'no',
                      f"{summary['latent_names'][top]}, {summary['kl_per_latent'][top]:.2f} nats"])
    if len({p.shape for p in pictures}) > 1:
        fail('these runs differ in their number of channels: compare runs on one kind of data')
    out.mkdir(parents=True, exist_ok=True)
    save_picture(out / 'comparison.png', sheet(torch.stack(pictures), [run.name for run in args.runs],
                                               'the top latent, from its least to its greatest value'))
    write_table(out / 'comparison.md', table)
    print(f'\n{out / "comparison.png"} and {out / "comparison.md"} are written')


def write_table(path, rows):
    """Rows of words, the second of them dashes → a Markdown table, which is printed too."""
    text = ''.join(f"| {' | '.join(row)} |\n" for row in rows)
    write(path, text.encode())
    print(text, end='')


def encoder_of(model, data, precision):
    """The function that the metric takes: indices → μ (n, J). Up to a million images are encoded once and then looked up."""
    def encode(index):
        parts = torch.from_numpy(index).split(4096)
        return torch.cat([codes_of(model, data.images(part), precision)[0] for part in parts]).numpy()
    return looked_up(encode, len(data)) if len(data) <= 10 ** 6 else encode


def looked_up(encode, size):
    codes = np.concatenate([encode(part) for part in np.array_split(np.arange(size), 1 + size // 4096)])
    return lambda index: codes[index]


# Accuracy in %, Higgins et al. 2017, figure 6, left (fully connected network; their L and K are not certain).
PUBLISHED = {'raw pixels': 45.75, 'PCA': 84.9, 'ICA': 42.03, 'untrained VAE': 44.14, 'VAE': 61.58, 'β-VAE': 99.23}


def score(argv):
    """The paper's table: the metric against L and K, and the MIG, of runs and of codes that need no training."""
    parser = Parser(prog='betavae.py score', description='Score runs by the linear-classifier metric of Higgins et al. 2017.')
    parser.add_argument('runs', nargs='*', type=Path, metavar='RUN',
                        help='runs that differ in seed (or device, or precision) only are one row')
    parser.add_argument('--pairs', type=integers, default=[64], metavar='L,…', help='averaged for one point (default 64)')
    parser.add_argument('--factors', type=integers, metavar='K,…',
                        help='the last K factors may be chosen: dSprites with 4 is without shape (default: all)')
    parser.add_argument('--train', type=number(int, 10, 10 ** 6), default=10000, help='training points (default %(default)s)')
    parser.add_argument('--baselines', type=number(int, 0, 100), default=0, metavar='SEEDS',
                        help='also ground truth, raw pixels, PCA, ICA and an untrained network, over so many seeds (dsprites)')
    parser.add_argument('--out', type=Path, help='for metric.md, metric.png and baselines.json (default: where the first run is)')
    args = parser.parse_args(argv)
    if not args.runs and not args.baselines:
        fail('give runs, or --baselines 3')
    runs = [finished(run) for run in args.runs]
    data = runs[0][2] if runs else load_data('dsprites')
    out, sizes = args.out or (args.runs[0].parent if runs else Path('runs')), data.factor_sizes
    if any((d.name, d.factor_names) != (data.name, data.factor_names) for _, _, d, _ in runs):
        fail('runs of one data set make one table')
    if args.baselines and data.name != 'dsprites':
        fail('--baselines are of dsprites')
    if not sizes:
        fail(f'{args.runs[0]} was trained on images whose factors are unknown: the metric needs them (faces, dsprites)')
    args.factors = args.factors or [len(sizes)]
    if not all(2 <= K <= len(sizes) for K in args.factors):
        fail(f'--factors takes 2 to {len(sizes)}: how many, from the last, of ' + ', '.join(data.factor_names))
    out.mkdir(parents=True, exist_ok=True)

    # A row: label, seed, a function that makes the encoder, and its scores, which are part of what a file holds.
    kept = out / 'baselines.json'
    found = read_json(kept)
    rows = [(label, seed, make, found.setdefault(f'{label}, seed {seed}', {}), kept, found)
            for label, seed, make in baselines(data, args.baselines)]
    rows += [(label_of(s, summary, data), s['seed'], functools.partial(encoder_of, model, data, s['precision']),
              summary.setdefault('scores', {}), run / 'summary.json', summary)
             for run, (s, summary, _, model) in zip(args.runs, runs)]
    if len({row[:2] for row in rows}) < len(rows):
        fail('two of these runs have one seed, and no option but --device and --precision tells them apart')

    columns = {f'K = {K}, L = {L}': (K, L) for K, L in itertools.product(args.factors, args.pairs)}
    cells = {f'{column}, {args.train} points': KL for column, KL in columns.items()} | {'MIG': None}
    for label, seed, make, scores, path, whole in rows:
        encode = None
        for cell, KL in cells.items():
            if cell in scores or (label, cell) == ('raw pixels', 'MIG'):          # nothing is computed twice
                continue
            encode, rng = encode or make(), np.random.default_rng(seed)
            if KL is None:
                index = np.arange(len(data)) if len(data) <= 10 ** 6 else rng.integers(len(data), size=10000)
                scores[cell] = metrics.mutual_information_gap(encode(index), np.stack(np.unravel_index(index, sizes), 1))[0]
            else:
                scores[cell] = metrics.disentanglement_score(encode, sizes, pairs=KL[1], factors=range(len(sizes))[-KL[0]:],
                                                             train=args.train, test=args.train // 2, rng=rng)
            write(path, json.dumps(whole, indent=1).encode())
            print(f'{label}, seed {seed}: {cell}: {scores[cell]:.4f}', flush=True)

    published = {f'{name}, 2017': y for name, y in PUBLISHED.items()} if data.name == 'dsprites' else {}
    panels = [dict(title=f'accuracy in %, K = {K}', x='L, pairs averaged for one point', log_x=True, limits=(0, 100), series={},
                   lines=published) for K in args.factors]
    table = [['code', 'seeds', *columns, 'MIG'], ['---'] * (len(cells) + 2)]
    for label in dict.fromkeys(row[0] for row in rows):
        x = np.array([[row[3].get(cell, np.nan) for cell in cells] for row in rows if row[0] == label])    # (seeds, cells)
        mean, deviation = x.mean(0), x.std(0, ddof=min(1, len(x) - 1))
        words = [f'{m:.3f} ± {d:.3f}' if cell == 'MIG' else f'{100 * m:.1f} ± {100 * d:.1f}'
                 for cell, m, d in zip(cells, mean, deviation)]
        words = [word.replace('nan ± nan', '') for word in words]
        table.append([label, str(len(x)), *(words if len(x) > 1 else [word.split(' ±')[0] for word in words])])
        for k, panel in enumerate(panels):
            own = slice(k * len(args.pairs), (k + 1) * len(args.pairs))                   # the columns of this K
            panel['series'][label] = args.pairs, 100 * mean[own], 100 * deviation[own]
    write_table(out / 'metric.md', table)
    if len(args.pairs) > 1:
        save_picture(out / 'metric.png', chart(panels, size=(680, 480)))


def baselines(data, seeds):
    """The table's rows that need no training: (label, seed, a function that makes the encoder)."""
    def pixels(index):
        return data.images(index).reshape(len(index), -1).astype(np.float32) / 255

    def truth(index):
        return np.stack(np.unravel_index(index, data.factor_sizes), 1) / data.factor_sizes

    def linear(fit, rng):
        mean, matrix = fit(pixels(rng.integers(len(data), size=10000)))
        return looked_up(lambda index: (pixels(index) - mean) @ matrix, len(data))

    def untrained(rng):
        torch.manual_seed(rng.integers(2 ** 32))
        return encoder_of(BetaVAE(1, 10), data, 'fp32')
    makers = {'ground truth': lambda rng: truth, 'raw pixels': lambda rng: pixels, 'PCA': lambda rng: linear(metrics.pca, rng),
              'ICA': lambda rng: linear(functools.partial(metrics.fast_ica, rng=rng), rng), 'untrained': untrained}
    return [(label, seed, lambda make=make, seed=seed: make(np.random.default_rng(seed)))
            for label, make in makers.items() for seed in range(seeds)]


def label_of(s, summary, data):
    """A run's row of the table: its objective, its steps, and every option that is not the usual one."""
    capacity = s['capacity'] is not None
    kind = 'β-TCVAE' if s['tc'] else 'VAE' if s['beta'] == 1 and not (capacity or s['anneal']) else 'β-VAE'
    words = [f"C {s['capacity']:g}" if capacity else f"β {s['beta']:g}", f"{summary['steps']:,} steps"]
    usual = vars(training_parser().parse_args([])) | left_open(data, s['capacity'])
    told = ('data', 'run', 'beta', 'tc', 'capacity', 'steps', 'seed', 'device', 'precision')
    words += [f'{k} {s[k]}' for k in OPTIONS if k not in told and s[k] != usual[k]]
    return f"{kind} ({', '.join(words)})"


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

def fail(message, code=2):
    if sys.stdout.isatty():
        print()                                     # below the line of progress
    print(f'betavae: {message}', file=sys.stderr)
    raise SystemExit(code)


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line and no abbreviations."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        fail(f'{message} (see --help)')


def number(kind, low, high):
    """A parser of numbers within bounds; NaN is in none."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} is not between {low:g} and {high:g}')
        return value
    parse.__name__ = kind.__name__
    return parse


def integers(text):
    return sorted({number(int, 1, 10 ** 6)(word) for word in text.split(',')})


COMMANDS = dict(compare=compare, score=score)
OPTIONS = ['data', 'crop', 'latents', 'leak', 'beta', 'beta_from', 'anneal', 'tc', 'capacity', 'gamma', 'likelihood', 'steps',
           'batch', 'lr', 'warmup', 'seed', 'device', 'precision']


def training_parser():
    parser = Parser(prog='betavae.py', description='Train a β-VAE. Other commands: compare, score (each has --help).')
    whole, real = number(int, 0, 10 ** 9), number(float, 0, 1e12)      # past 1e12 Adam's second moment overflows float32
    some = number(int, 1, 10 ** 9)
    g = parser.add_argument_group('data (x)')
    g.add_argument('--data', default='faces', help='faces, dsprites, or a folder or .zip of images (default %(default)s)')
    g.add_argument('--crop', type=some, help='side of the centred square to cut out; CelebA: 128 (default: the largest)')
    g = parser.add_argument_group('model')
    g.add_argument('--latents', type=number(int, 1, 512), help='J (default 10 for dsprites, 32 else)')
    g.add_argument('--leak', type=number(float, 0, 1), default=0.2,
                   help='slope of the ReLUs below zero (default %(default)g; the paper: 0)')
    g = parser.add_argument_group('objective')
    g.add_argument('--beta', type=real, default=1.0, help='β, the weight of the KL term (default %(default)g)')
    g.add_argument('--beta-from', type=real, help='β at step 0 with --anneal (default 0)')
    g.add_argument('--anneal', type=whole, default=0, help='steps over which β moves (default %(default)s: constant)')
    g.add_argument('--tc', action='store_true', help='β-TCVAE: β on the total correlation alone')
    g.add_argument('--capacity', type=real, help='C: γ |KL − C| in place of β KL; C climbs over --anneal steps')
    g.add_argument('--gamma', type=real, help='γ, with --capacity (default 1000)')
    g.add_argument('--likelihood', choices=['bernoulli', 'gaussian'],
                   help='p(x|z) (default bernoulli for black and white, gaussian of variance ½ for colour)')
    g = parser.add_argument_group('optimiser (Adam)')
    g.add_argument('--steps', type=some, default=50000, help='(default %(default)s)')
    g.add_argument('--batch', type=number(int, 1, 65536), default=64, help='B (default %(default)s)')
    g.add_argument('--lr', type=number(float, 1e-12, 1e6), default=5e-4, help='learning rate (default %(default)s)')
    g.add_argument('--warmup', type=whole, default=0, help='steps over which it climbs (default %(default)s)')
    g = parser.add_argument_group('run')
    g.add_argument('--run', help='folder of the run (default: runs/ + a name made from the options)')
    g.add_argument('--seed', type=number(int, 0, 2 ** 32 - 1), default=0, help='(default %(default)s)')
    g.add_argument('--device', choices=['auto', 'cpu', 'cuda', 'mps'], default='auto', help='auto (default): cuda, mps, or cpu')
    g.add_argument('--precision', choices=['auto', 'fp32', 'bf16'], default='auto',
                   help='auto (default): bf16 where the processor or GPU has units for it')
    return parser


def left_open(data, capacity):
    """What stands for the options whose default hangs on the data or on other options."""
    return dict(latents=10 if data.name == 'dsprites' else 32, beta_from=0.0, gamma=None if capacity is None else 1000.0,
                likelihood='bernoulli' if data.shape[0] == 1 else 'gaussian')


def settle(args, parser):
    """Fill in what was left open, from the data or from the run that is gone on with, and refuse contradictions."""
    if args.beta_from is not None and not args.anneal:
        fail('--beta-from needs --anneal: the steps over which β moves')
    if args.tc and args.batch == 1:
        fail('--tc needs a --batch of two or more')
    if args.capacity is None and args.gamma is not None:
        fail('--gamma needs --capacity')
    if args.capacity is not None and (args.tc or args.beta != 1 or args.beta_from is not None):
        fail('--capacity takes the place of --beta, --beta-from and --tc')
    if not args.run:
        unnamed = ('data', 'beta', 'steps', 'device', 'precision')
        words = [k if v is True else f'{k}{v:g}' if isinstance(v, float) else f'{k}{v}' for k in OPTIONS
                 if (v := getattr(args, k)) != parser.get_default(k) and k not in unnamed]
        args.run = str(Path('runs', '-'.join([Path(args.data).stem, f'beta{args.beta:g}', *words]).replace('_', '')))
    if Path(args.run).exists() and not Path(args.run).is_dir():
        fail(f'--run {args.run} is a file; give a folder')
    found = read_json(Path(args.run, 'settings.json'), f'to begin anew, delete {args.run}')
    if not found and Path(args.run, 'checkpoint.pt').exists():
        fail(f'{args.run} holds a checkpoint but no settings.json; to begin anew, delete it')
    if args.data not in ('faces', 'dsprites'):
        args.data = str(Path(args.data).absolute())
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if args.device == 'auto':
        args.device = found.get('device') or next(name for name in there if there[name])
    if not there.get(args.device):
        fail(f'there is no {args.device} device here')
    if args.precision == 'auto':
        args.precision = found.get('precision') or ('bf16' if has_bf16(args.device) else 'fp32')
    args.dataset = load_data(args.data, args.crop)
    if args.dataset.train_size < 1:
        fail(f'{args.data} holds one image; at least two are needed: one is held out')
    if args.anneal > args.steps:
        print(f'warning: {"β" if args.capacity is None else "C"} will not arrive: --anneal {args.anneal:,} is more than '
              f'--steps {args.steps:,}', file=sys.stderr)
    if args.batch > args.dataset.train_size:
        fail(f'--batch {args.batch} is more than the {args.dataset.train_size} training images of {args.data}')
    for name, value in left_open(args.dataset, args.capacity).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    differ = [f"--{k.replace('_', '-')} {found[k]} there, {getattr(args, k)} here" for k in OPTIONS
              if k in found and k != 'steps' and found[k] != getattr(args, k)]
    if found and found.get('versions', {}).get('data') != args.dataset.version:
        differ.append('another version of the data')
    if differ:
        fail(f'{args.run} was begun with other settings: {"; ".join(differ)}. Choose another --run, or delete it')


def has_bf16(device):
    """Whether there are arithmetic units for bfloat16: without them it is slower than float32."""
    if device == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = getattr(torch.cpu, 'get_capabilities', dict)()
    return device == 'cpu' and bool(has.get('avx512_bf16') or has.get('amx_bf16'))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')                                # β in a C locale
    try:
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        parser = training_parser()
        args = parser.parse_args(argv)
        settle(args, parser)
        C, H, W = args.dataset.shape
        parameters = sum(p.numel() for p in BetaVAE(C, args.latents).parameters())
        asked = ' '.join(f'{k} {v}' for k in OPTIONS[2:-2] if (v := getattr(args, k)) is not None and v is not False)
        print(f'{args.device} {args.precision} | {args.dataset.name}, {len(args.dataset):,} images {C} × {H} × {W} | '
              f'{parameters:,} parameters | {asked} | {args.run}')
        train(args)
    except KeyboardInterrupt:
        fail('interrupted', code=130)
    except OSError as error:
        fail(f'{error.strerror or error}' + (f': {error.filename}' if error.filename else ''), code=1)
    except datasets.Unusable as error:
        fail(str(error))


if __name__ == '__main__':
    main()
