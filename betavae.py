"""β-VAE (Higgins et al. 2017): a VAE whose KL term is multiplied by β. To be read beside the paper.

    python betavae.py --beta 10 --steps 2000            drawn faces, a few minutes
    python betavae.py --data dsprites --beta 16         2D shapes, half an hour or more
    python betavae.py --data photos.zip --beta 10       your own photographs: a .zip or a folder
    python betavae.py compare runs/A runs/B             finished runs in a table and on a sheet

The first pictures are in runs/ after seconds. Ctrl-C is safe: the same command resumes.

How to read this file: in its order. 1 model, 2 objective, 3 training, whose loop is the algorithm;
the rest only looks at the result. Letters are the paper's: x an image, z its code, q(z|x) = N(mu,
exp(logvar)) the encoder, p(x|z) the decoder; B images in a batch (M in Chen et al. 2018), N to
train on; C channels, J latents.
"""
import argparse
import ctypes
import functools
import itertools
import json
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import metrics


# 1 The model --------------------------------------------------------------------------------------

class BetaVAE(nn.Module):
    """The convolutional network of Higgins et al. 2017 (appendix A.1) for images of 64 × 64 pixels.

    leak    slope of the ReLUs below zero: 0 in the paper, 0.2 in yukunchen113/Beta-VAE and here. A
            plain ReLU whose input is negative on every image has no gradient: it is dead.
    bf16    encoder and decoder in bfloat16; weights, posterior and losses are float32 either way
    """

    def __init__(self, channels, latents, leak=0.2, bf16=False):
        super().__init__()
        self.shape = channels, 64, 64
        self.bf16 = bf16
        conv = functools.partial(nn.Conv2d, kernel_size=4, stride=2, padding=1)
        deconv = functools.partial(ConvTranspose2d, kernel_size=4, stride=2, padding=1)
        relu = functools.partial(nn.LeakyReLU, leak)
        self.encoder = nn.Sequential(                               # (B, C, 64, 64)
            conv(channels, 32), relu(),                             # (B, 32, 32, 32)
            conv(32, 32), relu(),                                   # (B, 32, 16, 16)
            conv(32, 64), relu(),                                   # (B, 64, 8, 8)
            conv(64, 64), relu(), nn.Flatten(),                     # (B, 1024)
            nn.Linear(1024, 256), relu())                           # (B, 256)
        self.posterior = nn.Linear(256, 2 * latents)                # linear: μ, log σ² of any sign
        self.decoder = nn.Sequential(                               # (B, J)
            nn.Linear(latents, 256), relu(),                        # (B, 256)
            nn.Linear(256, 1024), relu(),                           # (B, 1024)
            nn.Unflatten(1, (64, 4, 4)), deconv(64, 64), relu(),    # (B, 64, 8, 8)
            deconv(64, 32), relu(),                                 # (B, 32, 16, 16)
            deconv(32, 32), relu(),                                 # (B, 32, 32, 32)
            deconv(32, channels))                                   # (B, C, 64, 64)

    def encode(self, x):
        """Images, float32 (B, C, 64, 64) in [0, 1] → μ and log σ² of q(z|x), float32 (B, J)."""
        if x.dtype != torch.float32 or x.shape[1:] != self.shape:
            raise ValueError(f'expected float32 (B, C, 64, 64), not {x.dtype} {tuple(x.shape)}')
        x = x.contiguous(memory_format=torch.channels_last)         # fastest for convolutions
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            h = self.encoder(x)                                     # (B, 256)
        return self.posterior(h.float()).chunk(2, dim=1)

    def decode(self, z):
        """Codes (B, J) → logits, float32 (B, C, 64, 64): the means of p(x|z) are their sigmoid."""
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.decoder(z)
        return logits.to(torch.float32, memory_format=torch.contiguous_format)

    def forward(self, x, noise):
        """Images (B, C, 64, 64), standard normal noise (B, J) → logits, and z, μ, log σ² (B, J)."""
        mu, logvar = self.encode(x)
        z = reparameterize(mu, logvar, noise)
        return self.decode(z), z, mu, logvar


class ConvTranspose2d(nn.ConvTranspose2d):
    """Its bias is added separately: fused, the gradient of the bias is three times slower."""

    def forward(self, h):
        h = F.conv_transpose2d(h, self.weight, None, self.stride, self.padding)
        return h + self.bias.to(h.dtype)[:, None, None]


def reparameterize(mu, logvar, noise):
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

def objective(model, x, noise, beta, likelihood='gaussian', tc=None, gamma=None):
    """What is minimised, its reconstruction term, and KL_j averaged over the batch: (), (), (J,).

    model    x (B, C, 64, 64), noise (B, J) → logits, z, μ, log σ²
    tc       N, the number of training images: asks for β-TCVAE
    gamma    γ: asks for a capacity C, which is then passed in the place of β
    """
    logits, z, mu, logvar = model(x, noise)
    recon = reconstruction(logits, x, likelihood)
    kl = kl_per_latent(mu, logvar).mean(0)                                          # (J,)
    if tc is not None:                                          # Chen et al. 2018, eq. 4
        loss = recon + (kl.sum() + (beta - 1) * total_correlation(z, mu, logvar, tc))
    elif gamma is not None:                                     # Burgess et al. 2018, eq. 8
        capacity = beta
        loss = recon + gamma * (kl.sum() - capacity).abs()
    else:                                                       # Higgins et al. 2017, eq. 4
        loss = recon + beta * kl.sum()
    return loss, recon, kl


def reconstruction(logits, x, likelihood):
    """− log p(x|z) in nats per image: summed over C × 64 × 64 values, averaged over the batch.

    bernoulli   − x log p − (1 − x) log (1 − p), cross-entropy, with p = sigmoid(logits). For greys
                between 0 and 1 it is no log-likelihood
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

    exact for M = N, unbiased for distinct images; repeats bias it by (q(z|n*) − q(z)) / N.
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


# 3 Training ---------------------------------------------------------------------------------------

ROW = 100               # steps from one row of the log to the next
PICTURES = 5000         # steps from one set of pictures to the next; the first ones come earlier
SAVE_SECONDS = 30       # from one checkpoint to the next
ACTIVE = 0.05           # a latent is active where its mean KL is above this many nats


def train(dataset, settings, model=None):
    """Minimise `objective` with Adam, or resume it; returns the model, and fills the run's folder.

    dataset     a data.Dataset
    settings    made by `options`
    model       a network of your own: an nn.Module with encode(x) → μ, log σ², decode(z) → logits
                and forward(x, noise) → logits, z, μ, log σ²; you seed it (default: a new BetaVAE)
    Raises UserError for what you can fix, FloatingPointError where training diverges."""
    s = complete(settings, dataset, model)
    with torch.random.fork_rng(devices=[]):                 # the CPU's random state is left alone
        torch.manual_seed(s.seed)
        model = model or BetaVAE(s.channels, s.latents, s.leak, s.precision == 'bf16')
    model.train().to(s.device, memory_format=torch.channels_last)
    adam = torch.optim.Adam(model.parameters(), lr=s.lr, fused=True)
    run = resume(s, model, adam)                            # its step, its seconds, its log
    held_out = torch.as_tensor(dataset.images(dataset.held_out(1000)), device=s.device)
    terms = dict(likelihood=s.likelihood, tc=dataset.train_size if s.tc else None, gamma=s.gamma)
    torch.backends.cudnn.deterministic = True               # so that a seed repeats its bits
    announce(s, dataset, run['step'])
    progress = data.Progress(s.steps, run['step'], s.batch)
    start, saved, recent = time.monotonic() - run['seconds'], time.monotonic(), []

    for step in range(run['step'], s.steps):
        beta = beta_at(step, s.end, s.beta_from, s.anneal)
        adam.param_groups[0]['lr'] = s.lr * min(1, (step + 1) / max(1, s.warmup))
        x, noise = batch(dataset, s.seed, step, s.batch, s.latents, s.device)

        loss, recon, kl = objective(model, x, noise, beta, **terms)
        adam.zero_grad()
        loss.backward()
        adam.step()

        # The rest of the loop only looks on: every hundred steps a row, a checkpoint or pictures.
        done = step + 1
        recent.append(torch.cat([torch.stack([loss, recon]), kl]).detach())
        progress.show(done, lambda: progress_line(s, done, beta, recent))
        if done % ROW == 0 or done == s.steps:
            model.eval()
            run |= dict(step=done, seconds=time.monotonic() - start)
            add_row(run, beta, recent, evaluate(model, held_out[:125], s.latents, beta, terms))
            recent = []
            due = done in (100, 300, 1000, s.steps) or done % PICTURES == 0
            if due or time.monotonic() - saved > SAVE_SECONDS:
                save(s, model, adam, run)
                saved = time.monotonic()
            if due and done < s.steps:
                draw(s, model, run, held_out, summarise(s, dataset, model, done, held_out))
            model.train()

    report(s, dataset, model.eval(), run, held_out)
    return model


def batch(dataset, seed, step, size, latents, device):
    """A step's training images, float (B, C, 64, 64) in [0, 1], and noise (B, J): functions of seed
    and step alone, so that a resumed run equals an unbroken one."""
    entropy = np.random.SeedSequence((seed, step)).generate_state(1)
    generator = torch.Generator(device).manual_seed(int(entropy[0]))
    i = torch.randint(dataset.train_size, (size,), generator=generator, device=device)
    noise = torch.randn(size, latents, generator=generator, device=device)
    return dataset.images(dataset.train_index(i)) / 255, noise


@torch.no_grad()
def evaluate(model, images, latents, beta, terms):
    """Loss, reconstruction and KL_j of held-out images, uint8 (n, C, 64, 64): 2 + J floats."""
    noise = fixed_noise(len(images), latents).to(images.device)
    loss, recon, kl = objective(model, images / 255, noise, beta, **terms)
    return [loss.item(), recon.item(), *kl.tolist()]


def add_row(run, beta, recent, held_out):
    """Add to the log; loss, reconstruction and KL_j are means over the steps since the last row."""
    loss, recon, *kl = torch.stack(recent).mean(0).tolist()
    held_loss, held_recon, *held_kl = held_out
    run['log'].append([run['step'], beta, loss, recon, sum(kl), *kl,
                       held_loss, held_recon, sum(held_kl), run['seconds']])


def progress_line(s, step, beta, recent):
    _, recon, *kl = torch.stack(recent).mean(0).tolist()
    return (f"step {step:,}/{s.steps:,}  {'β' if s.capacity is None else 'C'} {beta:.4g}  "
            f'recon {recon:.1f}  KL {sum(kl):.2f}  active {sum(x > ACTIVE for x in kl)}/{len(kl)}')


def announce(s, dataset, step):
    """The first lines: what is trained, and what its last β leads one to expect."""
    print(f'{s.data}, {s.size:,} images {" × ".join(map(str, dataset.shape))} | '
          f'{describe(s, s.steps)}, {s.likelihood} | {s.device} {s.precision} | {s.run}, from step '
          f'{step:,} to {s.steps:,}')
    if (count := predicted_latents(s, dataset)) is not None:
        print(f'a linear decoder would use {count} of {s.latents} latents, and none where β is '
              f'above {2 * float(data.spectrum(dataset)[0]):.3g}', flush=True)


def predicted_latents(s, dataset):
    """#{λ_i > β/2}, at most J: how many latents a linear decoder would use at the run's last β,
    which makes β/2 the pixels' noise variance (`data.spectrum`). None for another objective."""
    if s.likelihood != 'gaussian' or s.tc or s.capacity is not None:
        return None
    beta = beta_at(s.steps, s.beta, s.beta_from, s.anneal)
    return min(s.latents, int((data.spectrum(dataset) > beta / 2).sum()))


def save(s, model, adam, run):
    """Replace log.csv and checkpoint.pt, unless a value is not finite or the loss above 1e9."""
    log = torch.tensor(run['log'], dtype=torch.float64)
    kept = [*model.parameters(), *(t for m in adam.state.values() for t in m.values()), log]
    if log[:, 2].max() > 1e9 or not all(t.isfinite().all() for t in kept):  # Adam's v stays huge
        raise FloatingPointError(f"training diverged before step {run['step']:,}; {s.run} keeps "
                                 'what was saved. Try a smaller --lr or --beta, or --warmup 1000')
    kl = ','.join(f'kl_{j}' for j in range(s.latents))
    header = f'step,beta,loss,recon,kl,{kl},held_out_loss,held_out_recon,held_out_kl,seconds'
    rows = [','.join(f'{x:.9g}' for x in row) for row in run['log']]
    data.write(Path(s.run, 'log.csv'), '\n'.join([header, *rows, '']).encode())
    data.write(Path(s.run, 'checkpoint.pt'), run | dict(
        log=log, settings=vars(s), model=model.state_dict(), adam=adam.state_dict()['state']))


def resume(s, model, adam):
    """The step, seconds and log of the folder's checkpoint, whose weights and moments are loaded,
    or of a new run. Raises UserError if its options or its network differ."""
    path, run = Path(s.run, 'checkpoint.pt'), dict(step=0, seconds=0.0, log=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        run = data.read(path)
        changed = [f'{k} was {was}, now {vars(s).get(k)}' for k, was in run['settings'].items()
                   if was != vars(s).get(k) and k not in ('run', 'steps', 'end')]
        if changed or run['step'] > s.steps:
            raise data.UserError(f"{s.run} is at step {run['step']:,} and cannot be resumed: "
                                 f'{"; ".join(changed) or "past --steps"}. Choose another --run')
        take_over(run['model'], model, path)
        adam.load_state_dict(adam.state_dict() | dict(state=run['adam']))
        run['log'] = run['log'].tolist()
    for stale in ('summary.json', 'model.pt'):              # the last step writes them again
        Path(s.run, stale).unlink(missing_ok=True)
    return run


def load(path, model=None):
    """The trained model of a run's folder or .pt file, on the CPU; `model` is one's own network."""
    path = Path(path, 'model.pt') if Path(path).is_dir() else Path(path)
    state = data.read(path)
    s = argparse.Namespace(**state['settings'])
    model = model or BetaVAE(s.channels, s.latents, s.leak)
    take_over(state['model'], model, path)
    return model.eval().requires_grad_(False)


def take_over(weights, model, path):
    """Put weights, of any precision, into a model of the same names, shapes and order."""
    theirs, ours = ([(name, t.shape) for name, t in state.items()]
                    for state in (weights, model.state_dict()))
    if theirs != ours:                                      # Adam's moments are matched by order
        raise data.UserError(f'{path} is of another network: names, shapes or order differ')
    model.load_state_dict(weights)


# 4 What a run leaves: figures and pictures --------------------------------------------------------

FIGURES = {'reconstruction': '.1f', 'kl': '.2f', 'active_latents': 'd', 'mig': '.2f',
           'mig_samples': '.2f', 'score_L1': '.0%', 'score_L1_samples': '.0%', 'score_L5': '.0%',
           'score_L5_samples': '.0%'}                       # of a summary, as they are printed


@torch.no_grad()
def encode_images(model, images):
    """μ and log σ² of images, uint8 (n, C, 64, 64): float32 (n, J) each, on the CPU."""
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8:                         # [0, 1] would be divided once more
        raise TypeError(f'expected images of type uint8, 0 to 255, not {images.dtype}')
    device = next(model.parameters()).device
    codes = [model.encode(part.to(device) / 255) for part in images.split(64)]      # 64 fit caches
    return tuple(torch.cat(part).cpu() for part in zip(*codes))


@torch.no_grad()
def decode_images(model, z):
    """Codes (…, J) → the means of p(x|z) as uint8 (…, C, 64, 64), on the CPU."""
    flat = z.reshape(-1, z.shape[-1]).to(next(model.parameters()).device)
    x = torch.cat([model.decode(part).sigmoid() for part in flat.split(64)])
    return (x * 255).round().to(torch.uint8).cpu().view(*z.shape[:-1], *x.shape[1:])


def fixed_noise(*shape):
    """Standard normal noise that is the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def report(s, dataset, model, run, held_out):
    """What comes with the last step: pictures, summary.json and model.pt."""
    summary = summarise(s, dataset, model, run['step'], held_out)
    draw(s, model, run, held_out, summary)
    summary |= scores(s, dataset, model)
    data.write(Path(s.run, 'summary.json'), json.dumps(summary, indent=1).encode())
    data.write(Path(s.run, 'model.pt'), dict(settings=vars(s), model=model.state_dict()))
    print(f'{s.run}/ holds the pictures and the model;', ', '.join(
        f'{name} {summary[name]:{form}}' for name, form in FIGURES.items() if name in summary))
    if not summary['active_latents'] and run['step'] >= 1000:       # before, it is untrained
        print('The posterior has collapsed, and every image becomes the mean image: try a smaller '
              '--beta, or let it rise (--anneal)')


def summarise(s, dataset, model, step, held_out):
    """A run's figures, in nats per image over at most 1,000 held-out images; what its latents know
    of the factors, over 10,000 images of a fixed draw."""
    _, recon, *kl = evaluate(model, held_out, s.latents, 1.0, dict(likelihood=s.likelihood))
    mu, logvar = encode_images(model, held_out)
    top = kl.index(max(kl))
    z = reparameterize(mu, logvar, fixed_noise(*mu.shape))[:, top]
    summary = dict(
        label=describe(s, step), steps=step, reconstruction=recon, kl=sum(kl), kl_per_latent=kl,
        active_latents=sum(x > ACTIVE for x in kl), predicted_latents=predicted_latents(s, dataset),
        latent_names=[f'z{j}' for j in range(len(kl))], top_latent=top,
        top_range=[z.min().item(), z.max().item()], settings=vars(s))
    if max(dataset.factor_sizes, default=1) == 1:
        return summary
    index = np.random.default_rng(0).integers(len(dataset), size=10000)             # (n,)
    index = index if len(dataset) > 10000 else np.arange(len(dataset))
    v = np.stack(np.unravel_index(index, dataset.factor_sizes), 1)                  # (n, K)
    mu, logvar = encode_images(model, dataset.images(index))                        # (n, J)
    z = reparameterize(mu, logvar, fixed_noise(*mu.shape))
    share = metrics.factor_shares(mu, v)                                            # (J, K)
    for j, k in enumerate(share.argmax(1)):
        if share[j, k] >= 0.05 and kl[j] > ACTIVE:
            summary['latent_names'][j] += f': {dataset.factor_names[k]} {share[j, k]:.0%}'
    return summary | dict(mig=metrics.mutual_information_gap(mu, v)[0],
                          mig_samples=metrics.mutual_information_gap(z, v)[0],
                          shares=dict(zip(dataset.factor_names, share.max(0).tolist())))


def scores(s, dataset, model):
    """The linear-classifier metric at L = 1 and 5, if two factors vary, of means and of samples."""
    found, noise = {}, fixed_noise(9973, s.latents)         # image i has row i mod 9,973

    def encode(index, sampled):
        mu, logvar = encode_images(model, dataset.images(index))
        return reparameterize(mu, logvar, noise[index % len(noise)]) if sampled else mu
    for L, kind in itertools.product((1, 5), ('', '_samples')):
        if sum(size > 1 for size in dataset.factor_sizes) >= 2:
            print(f'measuring the score at L = {L}, of {kind[1:] or "means"}', flush=True)
            found[f'score_L{L}{kind}'] = metrics.disentanglement_score(
                functools.partial(encode, sampled=kind != ''), dataset.factor_sizes, pairs=L,
                train=2000, test=1000, rng=s.seed)
    return found


def draw(s, model, run, held_out, summary):
    """Every picture of a run, from its held-out images, uint8 (≤ 1000, C, 64, 64)."""
    kl, names = summary['kl_per_latent'], summary['latent_names']
    title = f"{summary['label']}, {summary['steps']:,} steps"
    order = sorted(range(len(kl)), key=lambda j: -kl[j])
    shown = [j for j in order if kl[j] > ACTIVE][:12] or order[:1]
    labels = [f'{names[j]}, {kl[j]:.2f} nats' for j in shown]
    notes = [f"{len(shown)} shown, {summary['active_latents']} of {len(kl)} latents are active"]
    if 'mig' in summary:
        notes.append("%: how much of that factor's entropy the latent's mean knows")
    mu, logvar = encode_images(model, held_out)                                     # (≤ 1000, J)
    eight, now = held_out[:8].cpu(), decode_images(model, mu[:8])                   # (≤ 8, …)
    prior = decode_images(model, fixed_noise(2, len(eight), len(kl)))
    pictures = dict(
        reconstructions=data.sheet(torch.stack([eight, now, *prior]), [
            'held out', 'reconstructed', 'from the prior', ''], title),
        traversal=data.sheet(
            decode_images(model, traverse(mu[:4][-1], shown, torch.linspace(-3, 3, 8))), labels,
            f'{title}: each latent from -3 to 3, the others as in one image', notes),
        top_latent=data.sheet(
            decode_images(model, top_latent(summary, torch.exp(0.5 * logvar).mean(0))),
            ['others at 0', '+ 1 st. dev.', '+ 2 st. dev.'], f'{title}: {labels[0]}'))
    for name, picture in pictures.items():
        picture.save(Path(s.run, f'{name}.jpg'), quality=90)
    log = np.array(run['log'])[len(run['log']) // 20:]      # the first fall would dwarf the rest
    steps, beta, _, recon, kl, *kls, _, held_recon, held_kl, _ = log.T
    data.save_chart(Path(s.run, 'curves.png'), 'step', steps, {
        f'reconstruction ({s.likelihood}), nats': {'train': recon, 'held out': held_recon},
        'KL, nats per image': {'train': kl, 'held out': held_kl},
        'KL of each latent, nats per image': {names[j]: kls[j] for j in shown},
        'β' if s.capacity is None else 'C, nats per image': {'': beta}})
    moving = [data.sheet(                                                           # -1 → 1
        decode_images(model, torch.stack([traverse(z, shown, [x])[:, 0] for z in mu[:8]], 1)),
        [names[j] for j in shown], notes=notes, scale=1)
        for x in -torch.cos(torch.linspace(0, math.pi, 9))]
    data.save_gif(Path(s.run, 'traversal.gif'), moving + moving[-2:0:-1], 90)       # … and back


def traverse(z, latents, values):
    """A code (J,) with each of some latents set to each of some values: (latents, values, J)."""
    grid = z.repeat(len(latents), len(values), 1)
    grid[torch.arange(len(latents)), :, latents] = torch.as_tensor(values)
    return grid


def top_latent(summary, sigma):
    """The picture of yukunchen113/Beta-VAE (there by |mean|, ±3) as codes (3, 10, J): zeros but for
    the latent of largest KL, over the range of its samples; rows 2 and 3 add σ (J,) and 2 σ."""
    row = traverse(torch.zeros(len(sigma)), [summary['top_latent']],
                   torch.linspace(*summary['top_range'], 10))                       # (1, 10, J)
    return torch.cat([row + n * sigma for n in range(3)])


# 5 The comparison of runs -------------------------------------------------------------------------

def compare(argv):
    """Finished runs side by side: comparison.md, a table, and comparison.jpg, their top latents."""
    parser = argparse.ArgumentParser('betavae.py compare', description=compare.__doc__)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN')
    parser.add_argument('--out', type=Path, default='.', help='folder for both (default: here)')
    args = parser.parse_args(argv)
    if not (runs := [run for run in args.runs if (run / 'summary.json').is_file()]):
        raise data.UserError('none of these is a finished run: there is no summary.json')
    rows = [['run', 'steps', *FIGURES, 'top latent'], ['---'] * (len(FIGURES) + 3)]
    pictures = {}
    for run in runs:
        summary = json.loads((run / 'summary.json').read_text())
        top = summary['latent_names'][summary['top_latent']]
        figures = [f'{summary[k]:{form}}' if k in summary else '' for k, form in FIGURES.items()]
        rows.append([str(run), f"{summary['steps']:,}", *figures, top])
        if (run / 'model.pt').is_file() and not summary['settings'].get('own'):
            codes = top_latent(summary, torch.zeros(len(summary['kl_per_latent'])))[0]   # (10, J)
            pictures[f'{top}, {run}'] = decode_images(load(run), codes).expand(-1, 3, -1, -1)
    table = ''.join(f"| {' | '.join(row)} |\n" for row in rows)
    data.write(args.out / 'comparison.md', table.encode())
    print(table, args.out / 'comparison.md', sep='')
    if pictures:
        sheet = data.sheet(torch.stack([*pictures.values()]), pictures, 'top latents, others at 0')
        sheet.save(args.out / 'comparison.jpg', quality=90)
        print(args.out / 'comparison.jpg')


# 6 The command line -------------------------------------------------------------------------------

def options(*argv, **given):
    """A run's settings, from command-line words or keywords. UserError if one is wrong."""
    parser = argparse.ArgumentParser(
        'betavae.py', '%(prog)s [OPTION …]', __doc__.partition('\n\nHow to')[0],
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    x, model, loss, adam, run = (parser.add_argument_group(title).add_argument for title in (
        'data (x)', 'model', 'objective', 'optimiser (Adam)', 'run'))
    x('--data', default='faces', help='faces (default), dsprites, or a folder or .zip of images')
    x('--crop', type=int, help='side of the centred square cut from your images; CelebA: 128')
    model('--latents', type=int, help='J (default: 32, for one channel 10)')
    model('--leak', type=float, default=0.2, help='ReLU slope below 0 (default: 0.2; the paper: 0)')
    loss('--beta', type=float, default=1.0, help='β, the weight of the KL term (default: 1)')
    loss('--beta-from', type=float, default=0.0, help='β at step 0, with --anneal (default: 0)')
    loss('--anneal', type=int, default=0, help='steps until β is --beta (default: 0)')
    loss('--tc', action='store_true', help='β-TCVAE: β on the total correlation alone')
    loss('--capacity', type=float, help='C: γ |KL − C| for β KL; C rises over --anneal steps')
    loss('--gamma', type=float, help='γ, with --capacity (default: 1000)')
    loss('--likelihood', choices=['bernoulli', 'gaussian'], help='(default: gaussian for colour)')
    adam('--steps', type=int, default=50000, help='(default: 50000)')
    adam('--batch', type=int, default=64, help='B (default: 64)')
    adam('--lr', type=float, default=5e-4, help='learning rate (default: 5e-4)')
    adam('--warmup', type=int, default=0, help='steps until the rate is --lr (default: 0)')
    run('--run', help='output folder (default: runs/ and a name made of options)')
    run('--seed', type=int, default=0, help='(default: 0)')
    run('--device', default='auto', help='of torch; tested: cpu and cuda (default: auto)')
    run('--precision', choices=['auto', 'fp32', 'bf16'], default='auto', help='of the network')
    s = parser.parse_args(argv)
    unknown = given.keys() - vars(s).keys()
    vars(s).update({k: v.item() if hasattr(v, 'item') else v for k, v in given.items()})
    for name, value in vars(s).items():
        least = 1 if name in ('crop', 'latents', 'steps', 'batch') else 0
        if isinstance(value, (int, float)) and not least <= value <= 1e12:              # nor is NaN
            raise data.UserError(f'--{name.replace("_", "-")} {value}: must be {least} to 1e12')
    for wrong, words in (
            (unknown, f'there is no option {", ".join(unknown)}'),
            (s.beta_from and not s.anneal, '--beta-from needs --anneal, the steps it takes'),
            (s.tc and s.batch == 1, '--tc needs a --batch of two or more'),
            (s.capacity is None and s.gamma is not None, '--gamma needs --capacity'),
            (s.capacity is not None and (s.tc or s.beta != 1 or s.beta_from),
             '--capacity takes the place of --beta, --beta-from and --tc')):
        if wrong:
            raise data.UserError(words)
    return s


def complete(settings, dataset, model):
    """The settings with all defaults filled in, and what identifies the data when resuming."""
    s = argparse.Namespace(**vars(settings), own=model is not None, factors=dataset.factors,
                           size=len(dataset), pixels=int(dataset.images([0]).sum()))
    s.data, s.crop, s.channels = dataset.name, dataset.crop, dataset.shape[0]
    s.end = s.beta if s.capacity is None else s.capacity            # what the schedule moves to
    s.gamma = 1000.0 if s.gamma is None and s.capacity is not None else s.gamma
    s.likelihood = s.likelihood or ('bernoulli' if s.channels == 1 else 'gaussian')
    s.latents = s.latents or (10 if s.channels == 1 else 32)
    if model is not None:
        s.latents = model.cpu().eval().encode(torch.zeros(1, *dataset.shape))[0].shape[1]
    if s.device == 'auto':
        s.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if s.precision == 'auto':               # bf16 is slower on GPUs, and on CPUs that lack it
        has = getattr(torch.cpu, 'get_capabilities', dict)()
        s.precision = 'bf16' if s.device == 'cpu' and has.get('avx512_bf16') else 'fp32'
    words = f'{s.data} {describe(s)}' + (f' seed {s.seed}' if s.seed else '')
    words = re.findall(r'[\w.]+', words.replace('β', 'beta').replace(',', ''))
    s.run = str(s.run or 'runs/' + '-'.join(words))
    if dataset.source and Path(s.run).resolve().is_relative_to(dataset.source):
        raise data.UserError(f'{s.run} lies among the images of {s.data}: choose a --run elsewhere')
    return s


def describe(s, steps=math.inf):
    """A run in words: how far its schedule has come after so many steps, and what is unusual."""
    kind = 'C' if s.capacity is not None else 'TC β' if s.tc else 'β'
    start, over = f'{s.beta_from:g} → ', f' over {min(steps, s.anneal):,}'
    end = f'{beta_at(steps, s.end, s.beta_from, s.anneal):g}'
    words = [f'{kind} {start}{end}{over}' if s.anneal else f'{kind} {end}']
    latents = 10 if s.channels == 1 else 32
    usual = dict(latents=latents, leak=0.2, gamma=None, batch=64, lr=5e-4, warmup=0)
    words += [f'{name} {getattr(s, name):g}' for name in usual if getattr(s, name) != usual[name]]
    return ', '.join(words)


def main(argv):
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='replace')            # a terminal without β is no reason to stop
    if sys.platform == 'linux':                         # Let glibc keep freed memory: mapping each
        mallopt = ctypes.CDLL(None).mallopt             # activation again is a seventh of a step.
        mallopt(-3, 32 << 20)                           # M_MMAP_THRESHOLD: 32 MB go on the heap,
        mallopt(-1, 2 ** 31 - 1)                        # M_TRIM_THRESHOLD: which never shrinks;
        mallopt(-8, 1)                                  # M_ARENA_MAX: there is only one
    try:
        if argv[:1] == ['compare']:
            return compare(argv[1:])
        s = options(*argv)
        train(data.load(s.data, s.crop), s)
    except KeyboardInterrupt:
        raise SystemExit('\nbetavae: stopped; the same command resumes') from None
    except (data.UserError, FloatingPointError, OSError, MemoryError,
            RuntimeError, AssertionError) as error:     # torch's, for want of memory or a device
        words = str(error).partition('\n')[0] or type(error).__name__
        print(f'\nbetavae: {words}', file=sys.stderr)
        raise SystemExit({data.UserError: 2, FloatingPointError: 3}.get(type(error), 1)) from None


if __name__ == '__main__':
    main(sys.argv[1:])
