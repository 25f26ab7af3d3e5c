"""Data sets for the β-VAE, and pictures of arrays. This module knows no model.

    data = load('dsprites')             # or 'faces', or a folder or .zip of images
    data.images([0, 1, 2])              # uint8 (3, C, 64, 64), by flat index in C order
    own = Dataset('own', (1, 64, 64), {'a': 20, 'b': 20}, draw)     # draw: indices → images
"""
import functools
import hashlib
import io
import math
import os
import sys
import textwrap
import time
import zipfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

HELD_OUT_EVERY = 19     # prime: if no factor has 19 values, both parts of large data hold them all


class UserError(ValueError):
    """An error that the user can fix: its message says what, where, and what to do."""


class Dataset:
    """N images of shape (1 or 3, 64, 64) with K known factors of variation (photographs: K = 0).
    `factors` is {name: number of values}; images are in C order: the last factor changes fastest.
    `draw` takes indices, int64 (n,), on a GPU when training there, and returns images, uint8
    (n, C, 64, 64), on any device. `size` is N, needed only where K = 0."""
    source = crop = None                # set by `load`; the path is absolute

    def __init__(self, name, shape, factors, draw, size=None):
        self.name, self.shape, self.draw = name, tuple(shape), draw
        self.factors = {factor: int(n) for factor, n in factors.items()}
        self.factor_names, self.factor_sizes = tuple(self.factors), tuple(self.factors.values())
        self.size = math.prod(self.factor_sizes) if factors else size
        self.train_size = self.size - math.ceil(self.size / HELD_OUT_EVERY)
        if self.shape not in ((1, 64, 64), (3, 64, 64)) or self.train_size < 1:
            raise UserError(f'shape must be (1 or 3, 64, 64), not {self.shape}, and N above 1')

    def __len__(self):
        return self.size

    def images(self, index):
        """Images by flat index, integers (n,): uint8 (n, C, 64, 64), a tensor on the same device if
        `index` is a tensor, else an array. Raises TypeError and, on the CPU alone, IndexError."""
        if not torch.is_tensor(index):
            return self.images(torch.from_numpy(np.array(index))).numpy()
        if index.ndim != 1 or len(index) and 'int' not in str(index.dtype):
            raise TypeError(f'indices are integers (n,), not {index.dtype} {tuple(index.shape)}')
        index = index.long()
        if index.device.type == 'cpu' and not ((0 <= index) & (index < self.size)).all():
            raise IndexError(f'indices are from 0 to {self.size - 1}')
        parts = [self.draw(part) for part in index.split(256)]      # 256 at a time fit in caches
        images = torch.cat(parts) if len(parts) > 1 else parts[0]
        if str(images.dtype) != 'torch.uint8' or images.shape != (len(index), *self.shape):
            raise TypeError(f'draw must return uint8 tensors of shape (n, {self.shape[0]}, 64, 64)')
        return images.to(index.device)

    def train_index(self, i):
        """The i-th index of the training part, i in 0 … train_size − 1 (array or tensor)."""
        return i + i // (HELD_OUT_EVERY - 1) + 1

    def held_out(self, n):
        """At most n indices of the held-out part, int64: a random draw, the same in every run."""
        size = self.size - self.train_size
        return np.random.default_rng(0).choice(size, min(n, size), replace=False) * HELD_OUT_EVERY


@functools.lru_cache(maxsize=2)
def spectrum(dataset, n=1500):
    """λ_i, descending: the eigenvalues of the pixels' covariance over n training images in [0, 1].
    With pixel noise of variance β/2, which squared error + β · KL implies, a linear decoder uses
    #{λ_i > β/2} latents (Tipping and Bishop 1999; Lucas et al. 2019)."""
    i = np.random.default_rng(0).integers(dataset.train_size, size=n)
    x = torch.from_numpy(dataset.images(dataset.train_index(i))).flatten(1) / 255
    x -= x.mean(0)
    return torch.linalg.eigvalsh(x @ x.T / n).flip(0)           # those of xᵀx / n, which is larger


def load(source, crop=None):
    """The data set 'faces' or 'dsprites', or a folder or .zip of images: of each the centred square
    of `crop` pixels (CelebA: 128; None: the largest). UserError for what cannot be loaded."""
    drawn = {'faces': faces, 'dsprites': dsprites}.get(source)
    if not source or drawn and crop:                # Path('') would be the current folder
        raise UserError('--data is faces, dsprites or your own images; only your own have a --crop')
    path = os.path.realpath(source)
    dataset = drawn() if drawn else photographs(Path(path), crop)
    dataset.source, dataset.crop = source if drawn else path, crop
    return dataset


# dSprites (Matthey et al. 2017): three shapes × 6 scales × 40 orientations × 32 × 32 positions ----

def dsprites():
    """dSprites, (1, 64, 64), 0 and 255, drawn by formula. A pixel is on if its centre lies inside a
    polygon (even-odd rule): a row of 64 pixels is one 64-bit word, the lowest bit leftmost, and
    every edge that crosses the row flips all pixels to its right."""
    t = np.radians(np.arange(0, 360, 2))
    outlines = (        # x + iy, y down; a range of 0.003 of each constant gives the same pixels
        9.598 * np.array([-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j]),
        12.7668 * np.cos(t) + 7.2142j * np.sin(t),
        9.598315 * np.sin(t) ** 3 - 1.437597j - 0.6621432j * (
            13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)))
    position = 16 + 32 * np.linspace(0, 1, 32)
    y_at = np.repeat(np.arange(32), 29)                             # (32 · 29,)
    row_at = (np.floor(position)[:, None] + np.arange(-14, 15)).astype(int).ravel()     # in reach
    dy = row_at + 0.5 - position[y_at]                              # from the sprite's centre
    table = np.zeros((3, 6, 40, 32, 32, 64), '<u8')
    for shape, scale, orientation in np.ndindex(3, 6, 40):
        z = (0.5 + 0.1 * scale) * np.exp(2j * np.pi * orientation / 39) * outlines[shape]   # (V,)
        after = np.roll(z, -1)
        row, edge = np.nonzero((z.imag > dy[:, None]) != (after.imag > dy[:, None]))
        step = (after - z)[edge]
        crossing = z.real[edge] + (dy[row] - z.imag[edge]) * step.real / step.imag
        pixel = np.ceil(position[:, None] + crossing - 0.5).astype(np.uint64)
        row, first = np.unique(row, return_index=True)
        word = np.bitwise_xor.reduceat(~np.uint64(0) << pixel, first, axis=1)
        table[shape, scale, orientation][:, y_at[row], row_at[row]] = word
    on_device = functools.cache(torch.from_numpy(table.reshape(-1, 64).view(np.uint8)).to)

    def draw(index):
        bit = torch.arange(8, dtype=torch.uint8, device=index.device)
        return ((on_device(index.device)[index][:, :, None] >> bit & 1) * 255).view(-1, 1, 64, 64)
    factors = {'shape': 3, 'scale': 6, 'orientation': 40, 'x position': 32, 'y position': 32}
    return Dataset('dsprites', (1, 64, 64), factors, draw)


# faces: a stand-in for CelebA, drawn from the factors that one sees in its traversals -------------

FACES = {'background colour': 12, 'background shading': 8, 'skin tone': 8, 'hair colour': 10,
         'hair length': 8, 'forehead': 6, 'jaw': 6, 'smile': 8, 'azimuth': 15, 'lighting angle': 8}
# RGB. How far apart the ends of a range are sets how much of the pixels' variance a factor has.
RANGES = {'background colour': ((0.10, 0.18, 0.32), (0.88, 0.82, 0.68)),
          'skin tone': ((0.36, 0.22, 0.15), (0.95, 0.78, 0.67)),
          'hair colour': ((0.05, 0.04, 0.05), (0.90, 0.70, 0.40))}
FIXED = (0.30, 0.33, 0.38), (0.96, 0.95, 0.93), (0.13, 0.09, 0.09), (0.66, 0.25, 0.25)


def face_masks():
    """What covers each pixel, by azimuth and one more factor: {name: float32 (15, values, 4096)};
    `clothes`, `ramp` and `roundness`, (4096,), are always the same."""
    def values(factor, low, high):
        return np.linspace(low, high, FACES[factor]).reshape(-1, 1, 1)

    def cover(*functions):
        """How much of each pixel lies where all are negative: the edge is about f / |∇f| away."""
        f = functools.reduce(np.maximum, functions)
        slope = np.hypot(*np.gradient(f, axis=(-2, -1)))
        return np.clip(0.5 - f / np.maximum(slope, 1e-6), 0, 1).astype(np.float32)

    def disc(x, y, rx, ry):
        return (x / rx) ** 2 + (y / ry) ** 2 - 1
    x, y = np.meshgrid((np.arange(64) - 31.5) / 1.2, (np.arange(64) - 33.5) / 1.2)      # y down
    turn = np.radians(values('azimuth', -36, 36))[:, None]
    sin, cos = np.sin(turn), np.cos(turn)
    middle = 3 * sin                                    # the head moves a little as it turns, …
    front = middle + 13 * sin                           # … the face more, being on a cylinder, …
    nose = front + 3 * sin                              # … and most the nose, which stands out

    # The head: above, an ellipse; below, an outline that is more angular the stronger the jaw.
    jaw = values('jaw', 0, 1)
    sides = np.abs((x - middle) / (13.5 + jaw * 0.8)) ** (2 + jaw)
    chin = (np.maximum(y, 0) / (19 + 2 * jaw)) ** (1.5 + 3.5 * jaw)
    head = cover(sides + chin + (np.minimum(y, 0) / 19) ** 2 - 1)
    neck = cover(np.abs(x - middle / 3) - 6 - jaw, 8 - y)
    clothes = cover(disc(x, y - 38, 25, 14))
    round_x = np.clip((x - middle) / 15, -1, 1)         # the surface normal, roughly
    skin = head * (1.02 - 0.3 * round_x ** 2) + (1 - head) * neck * (1 - clothes) * 0.72
    skin = skin * (1 - 0.22 * cover(disc(x - nose, y - 6.5, 3, 1.6)))           # below the nose
    skin = skin + 0.10 * head * cover(disc(x - (nose - sin), y - 2, 1.3, 5))    # along it
    body = 1 - (1 - head) * (1 - neck) * (1 - clothes)

    # Hair: a cap and two curtains behind the head, and a fringe over the forehead.
    length, hairline = values('hair length', -6, 27), values('forehead', -4.5, -16.5)
    half = 16.5 + 0.05 * (length + 6)                   # half its width
    cap = cover(disc(x + middle, y + 4, half, 19.5), y - length)
    ends = np.maximum(y - length + 5, 0) ** 2 / 9       # where the curtains taper
    curtains = cover(np.abs(x + middle) - half + ends, -4 - y, y - length)
    below = y - hairline - 0.045 * (x - (middle + 13 * sin * 0.6)) ** 2         # a parting
    fringe = cover(disc(x - middle * 0.7, y + 1.5, 15.5, 20.5), below / 20)

    # Eyes, brows and nostrils, and over them the mouth: lips around an opening with teeth.
    side = np.array([-1, 1]).reshape(2, 1, 1, 1, 1)
    angle = np.radians(27 * side) + turn
    centre, narrow = middle + 13 * np.sin(angle), np.cos(angle)
    eyes = cover(disc(x - centre, y + 0.5, 3.3 * narrow, 1.9))
    irises = cover(disc(x - (centre + 1.2 * sin), y + 0.4, 1.6 * narrow + 0.2, 1.7)) * eyes
    arch = -5.2 + 0.10 * ((x - centre) / narrow) ** 2
    brows = cover(np.abs(y - arch) - 0.8, np.abs(x - centre) - 3.8 * narrow)
    nostrils = cover(disc(x - (nose + 1.6 * side * cos), y - 7.2, 0.9, 0.7))
    dark = np.max([irises, 0.75 * brows, 0.5 * nostrils], axis=(0, 1))
    smile = values('smile', -0.5, 1.1)
    across = (x - front) / ((4.6 + 1.5 * smile) * cos)  # -1 … 1 from corner to corner
    away = np.abs(y - (12.4 + 1.9 * smile * (0.5 - across ** 2)))   # corners up, or down
    away = away - np.maximum(1.7 * smile, 0) * (1 - across ** 2)    # from the opening
    mouth = cover(away - 0.2 - 1.3 * (1 - across ** 2), (np.abs(across) - 1) * 5)
    teeth = cover(away + 0.3) * (np.abs(across) < 1) * mouth
    white = np.maximum(eyes.max(0) * (1 - dark), teeth)
    masks = dict(clothes=clothes, ramp=-y / 27, roundness=np.clip(x / 17, -1, 1), body=body,
                 skin=skin, side=head * round_x, behind=np.maximum(cap, curtains), fringe=fringe,
                 white=white, dark=dark * (1 - mouth), lips=mouth * (1 - teeth))
    return {k: torch.from_numpy(np.float32(mask)).flatten(-2) for k, mask in masks.items()}


def faces():
    """Faces of ten factors, (3, 64, 64): a modest stand-in for CelebA. Shape depends on few factors
    and colour on the others: an image is Σ coverage × colour over layers."""
    tables = face_masks() | {'fixed': torch.tensor(FIXED)}
    level = {name: torch.arange(n)[:, None] / (n - 1) for name, n in FACES.items()}     # 0 … 1
    tables['background shading'] = 0.56 * (level['background shading'] - 0.5)
    tables['lighting angle'] = torch.sin((level['lighting angle'] - 0.5) * 2.4)         # sideways
    tables |= {name: first + level[name] * (last - first)
               for name, (first, last) in zip(RANGES, torch.tensor([*RANGES.values()]))}
    on_device = functools.cache(lambda device: {k: t.to(device) for k, t in tables.items()})

    def draw(index):
        n, t, v = len(index), on_device(index.device), {}
        for name, size in reversed(FACES.items()):      # torch.unravel_index would stall a GPU
            v[name], index = index % size, index // size
        background, shading, skin, hair, angle = (t[k][v[k]] for k in ('background colour',
            'background shading', 'skin tone', 'hair colour', 'lighting angle'))  # (n, 3) or (n, 1)
        white, dark, lips = (t[k][v['azimuth'], v['smile']] for k in ('white', 'dark', 'lips'))
        body, shade, side = (t[k][v['azimuth'], v['jaw']] for k in ('body', 'skin', 'side'))
        under = 1 - t['fringe'][v['azimuth'], v['forehead']]        # not hidden by the fringe
        bare = under * (1 - white - dark - lips)
        open_ = under * (1 - body)                                  # neither fringe nor body
        behind = open_ * t['behind'][v['azimuth'], v['hair length']]
        wall = open_ - behind
        locks = 1 - under + behind
        layers = (                                                  # coverage as a product, colour
            (wall, 1, background), (wall, t['ramp'], shading),
            (locks, 1, hair), (locks, t['roundness'], 0.40 * angle * hair),
            (bare, shade, skin), (bare, side, 0.56 * angle * skin),
            *zip([under] * 4, (t['clothes'], white, dark, lips), t['fixed']))
        coverage = torch.empty(n, len(layers), 4096, device=index.device)
        for k, (a, b, _) in enumerate(layers):
            torch.mul(a, b, out=coverage[:, k])
        colours = torch.stack([colour.expand(n, 3) for *_, colour in layers], 2)    # (n, 3, layers)
        x = torch.bmm(colours, coverage)                            # (n, 3, 4096)
        return x.clamp_(0, 1).mul_(255).add_(0.5).to(torch.uint8).view(n, 3, 64, 64)
    return Dataset('faces', (3, 64, 64), FACES, draw)


# Your own images ----------------------------------------------------------------------------------

# Other readers of Pillow run programs (EPS), or open whatever is inside (IPTC).
FORMATS = 'BMP', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP'


def photographs(path, crop):
    """A folder (any depth) or .zip of images, (3, 64, 64), decoded once, to ~/.cache/betavae/."""
    try:
        archive = None if path.is_dir() else zipfile.ZipFile(path)
        if archive:
            files = {file.filename: (file.file_size, file.CRC) for file in archive.infolist()}
        else:
            paths = [path, *path.rglob('*')]
            for folder in filter(Path.is_dir, paths):
                os.listdir(folder)                  # rglob is silent about what it may not read
            files = {str(file.relative_to(path)): (file.stat().st_size, file.stat().st_mtime)
                     for file in paths if file.is_file()}
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(f'{path} cannot be read: {error}') from None
    names = sorted(name for name in files if '/.' not in f'/{name}' and          # not hidden
                   Image.registered_extensions().get(Path(name).suffix.lower()) in FORMATS)
    if not names:
        raise UserError(f'{path} holds no images ({", ".join(FORMATS)})')
    key = hashlib.sha256(repr((crop, [(name, files[name]) for name in names])).encode())
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'betavae',
                 f'{path.stem}-{key.hexdigest()[:16]}.bytes')       # of these images, and no others
    if not cache.exists() or cache.stat().st_size != len(names) * 3 * 64 * 64:
        print(f'{path}: decoding {len(names):,} images', flush=True)
        with ThreadPool() as pool:
            images = pool.imap(functools.partial(decode, path, archive, crop), names)
            write(cache, lambda file: file.writelines(images))
    on_device = functools.cache(torch.from_numpy(np.memmap(cache, mode='c')).view(-1, 3, 64, 64).to)
    return Dataset(path.stem, (3, 64, 64), {}, lambda i: on_device(i.device)[i], len(names))


def decode(path, archive, crop, name):
    """An image's centred square, bytes of (3, 64, 64): upright, and white where transparent."""
    try:
        file = io.BytesIO(archive.read(name)) if archive else path / name
        image = Image.open(file, formats=FORMATS)
        if image.mode[0] in 'IF' or min(image.size) < (crop or 1):
            raise ValueError(f'{image.mode} {image.size}: not 8 bits a channel, or below --crop')
        image = ImageOps.exif_transpose(image).convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
        side = crop or min(image.size)
    except Exception as error:                                      # each format has its own
        raise UserError(f'{name} cannot be used: {error}') from None
    x, y = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((64, 64), Image.Resampling.LANCZOS, (x, y, x + side, y + side))
    return np.asarray(image).transpose(2, 0, 1).tobytes()


# Files, progress, pictures ------------------------------------------------------------------------

def write(path, content):
    """Replace a file atomically by bytes, by a dictionary of tensors for `read`, or by what the
    function `content` writes to it."""
    if isinstance(content, dict):
        torch.save(content, buffer := io.BytesIO())         # to a file it raises no OSError
        content = buffer.getvalue()
    partial = Path(f'{path}.{os.getpid()}.partial')         # no other process writes to it
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, 'wb') as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path):
    """The dictionary in a file; nothing in it is executed. UserError if it is missing or broken."""
    try:
        if damaged := zipfile.ZipFile(path).testzip():      # by checksums, which torch ignores
            raise ValueError(f'{damaged} is damaged')
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:                              # one of a dozen kinds
        raise UserError(f'{path} cannot be read, and is left as it is: {error}') from None


class Progress:
    """A line with the time left and the speed: redrawn in place on a terminal, else printed every
    ten seconds. Each step is `size` images."""

    def __init__(self, total, done=0, size=1):
        self.total, self.size, self.next = total, size, -math.inf
        self.start, self.first = time.monotonic(), done

    def show(self, done, describe):
        """Print what `describe` returns, time left and speed: at first, at last, every so often."""
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if now < self.next and done < self.total:
            return
        self.next = now + (0.5 if terminal else 10)
        speed = (done - self.first + 1e-9) / (now - self.start + 1e-9)
        seconds = (self.total - done) / speed
        left = f'{seconds / 60:.0f} min' if seconds > 90 else f'{seconds:.0f} s'
        line = f'{describe()}  {left} left  {speed * self.size:,.0f} images/s'
        if terminal:
            line = f'\r{line[:os.get_terminal_size().columns - 1]}\x1b[K'
        print(line, end='' if terminal and done < self.total else '\n', flush=True)


COLOURS = 'blue darkorange green crimson purple sienna teal olive navy gray magenta black'.split()
ASCII = str.maketrans({'β': 'beta', 'γ': 'gamma', 'λ': 'lambda', '→': ' to ', '−': '-', '×': 'x'})


def plain(text):
    """Text for Pillow's own font: only ASCII, and with blanks so narrow that it takes two."""
    return '  '.join(text.translate(ASCII).encode('ascii', 'replace').decode().split())


def sheet(images, labels=(), title='', notes=(), scale=None):
    """Images, uint8 (rows, columns, C, H, W) → a picture of them, with a label left of each row, a
    title above and notes below. They are enlarged `scale` times; if None, up to twice, as fits."""
    images = torch.as_tensor(images).cpu().expand(-1, -1, 3, -1, -1).permute(0, 1, 3, 4, 2).numpy()
    rows, columns, height, width, _ = images.shape                              # (…, H, W, 3)
    font = ImageFont.load_default(13)
    labels = [plain(label)[:60] for label in labels]
    left = max((int(font.getlength(label)) + 18 for label in labels), default=0)
    scale = scale or min(2, ((900 - left) / columns - 2) / width)               # 900 pixels wide
    across, down = int(width * scale) + 2, int(height * scale) + 2              # with a gap of 2
    right = max(left + columns * across, 400 if title or notes else 0)
    above = textwrap.wrap(plain(title), right // 7)
    below = [line for note in notes for line in textwrap.wrap(plain(note), right // 7)]
    top, bottom = 20 * len(above), 20 * len(above) + rows * down
    picture = Image.new('RGB', (right, bottom + 20 * len(below)), 'white')
    pen = ImageDraw.Draw(picture)
    pen.text((4, 2), '\n'.join(above), 'black', font)
    pen.text((4, bottom + 2), '\n'.join(below), 'dimgray', font)
    for row, label in enumerate(labels):
        pen.text((left - 10, top + (row + 0.5) * down), label, 'black', font, 'rm')
    for row, column in np.ndindex(rows, columns):
        tile = Image.fromarray(images[row, column]).resize((across - 2, down - 2))
        picture.paste(tile, (left + column * across + 1, top + row * down + 1))
    return picture


def save_chart(path, x_name, xs, panels, size=(450, 320)):
    """Write a PNG of charts, two in a row: {title: {name: ys}}, lines over the same xs, (n,)."""
    def axis(values, most, start, end):                     # round numbers, and values → pixels
        low, high = min(values), max(values)
        low = low if low < high else min(low, 0)
        step = 10.0 ** math.floor(math.log10((high - low or 1) / most))
        step *= next(k for k in (1, 2, 5, 10) if k * step * most >= high - low)
        ticks = step * np.arange(math.floor(low / step), math.ceil(high / step) + 1)
        return ticks, lambda v: np.interp(v, ticks, np.linspace(start, end, len(ticks)))
    width, height = 2 * size[0], 2 * size[1]                # halved at the end: smooth lines
    full = min(2, len(panels)) * width, (len(panels) + 1) // 2 * height
    picture = Image.new('RGB', full, 'white')
    pen = ImageDraw.Draw(picture)
    pen.font = ImageFont.load_default(26)
    for k, (title, lines) in enumerate(panels.items()):
        names = [plain(name)[:30] for name in lines]
        left, top = k % 2 * width + 130, k // 2 * height + 80
        right, bottom = left + width - 170 - max(map(pen.textlength, names)), top + height - 180
        x_ticks, x_at = axis(xs, 1 + (right - left) // 140, left, right)
        y_ticks, y_at = axis(np.concatenate([*lines.values()]), 6, bottom, top)
        pen.text((left - 100, top - 60), plain(title), 'black')
        pen.text(((left + right) / 2, bottom + 50), plain(x_name), 'dimgray', anchor='ma')
        for tick in x_ticks:
            pen.line([x_at(tick), top, x_at(tick), bottom], 'gainsboro', 2)
            pen.text((x_at(tick), bottom + 12), f'{tick:,.7g}', 'black', anchor='ma')
        for tick in y_ticks:
            pen.line([left, y_at(tick), right, y_at(tick)], 'gainsboro', 2)
            pen.text((left - 14, y_at(tick)), f'{tick:,.7g}', 'black', anchor='rm')
        for row, (name, ys) in enumerate(zip(names, lines.values())):
            pen.line([*zip(x_at(xs), y_at(ys))], COLOURS[row % len(COLOURS)], 4)
            pen.text((right + 20, top + 34 * row), name, COLOURS[row % len(COLOURS)])
    picture.reduce(2).save(path)


def save_gif(path, pictures, milliseconds):
    """Write an animation: with one palette and without dithering it does not flicker."""
    sample = np.concatenate([np.asarray(p)[::2, ::2] for p in pictures])
    palette = Image.fromarray(sample).quantize(256, kmeans=1)
    frames = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
