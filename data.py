"""Data sets for the β-VAE, and the drawing of arrays. This module knows no model.

    data = load('dsprites')             # or 'faces', a folder or .zip of images, the dSprites .npz
    data.factors                        # {name: number of values}; {} for your own images
    data.images([0, 1, 2])              # uint8 (3, C, 64, 64), by flat index in C order
    own = Dataset('own', (1, 64, 64), {'a': 20, 'b': 20}, draw)     # draw: indices → images

Nothing is downloaded: dSprites (Matthey et al. 2017) and the faces are drawn by formula.
"""
import contextlib
import functools
import hashlib
import json
import math
import operator
import os
import shutil
import sys
import textwrap
import time
import unicodedata
import zipfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

HELD_OUT_EVERY = 19     # prime, so that both parts of large data hold every value of every factor


class UserError(ValueError):
    """An error that the user can mend. Its message is one line: what, where, what to do."""

    def __init__(self, message):
        super().__init__(one_line(message))


def one_line(text):
    """Text with single blanks in place of line ends and of whatever else cannot be printed."""
    return ' '.join(''.join(c if c.isprintable() else ' ' for c in str(text)).split())


class Dataset:
    """N images with K known factors of variation (K = 0 for photographs).

    shape       (C, 64, 64) with C = 1 or 3
    factors     {name: number of values}; images are in C order over them: the last changes fastest
    draw        a function of indices, int64 (n,), to images, uint8 (n, C, 64, 64). When training on
                a GPU, the indices are on it; the images may be on any device
    size        N, where no factors are known
    """
    source = crop = None                    # where `load` found it, and how it was cropped

    def __init__(self, name, shape, factors, draw, size=None):
        self.name = name
        self.shape = tuple(shape)
        self.factors = {factor: operator.index(n) for factor, n in factors.items()}
        self.factor_names = tuple(self.factors)
        self.factor_sizes = tuple(self.factors.values())
        self.draw = draw
        self.size = math.prod(self.factor_sizes) if factors else operator.index(size)
        self.train_size = self.size - math.ceil(self.size / HELD_OUT_EVERY)
        if self.shape not in ((1, 64, 64), (3, 64, 64)):
            raise ValueError(f'shape must be (1, 64, 64) or (3, 64, 64), not {self.shape}')
        for k, n in enumerate(self.factor_sizes):
            after = math.prod(self.factor_sizes[k + 1:])
            if n % HELD_OUT_EVERY == 0 and after < HELD_OUT_EVERY and n * after < self.size:
                raise ValueError(f'of a factor with {n} values few would be held out here: let it '
                                 f'come first, or have no multiple of {HELD_OUT_EVERY}')

    def __len__(self):
        return self.size

    def images(self, index):
        """Images by flat index, integers (n,): uint8 (n, C, 64, 64), values 0 to 255.

        A tensor gives a tensor on its device, all else an array. Raises TypeError for anything but
        integers (n,); IndexError outside 0 … N − 1, except on a GPU, which this would stall.
        """
        given = index if torch.is_tensor(index) else np.asarray(index)
        if given.ndim != 1 or len(given) and 'int' not in str(given.dtype):
            raise TypeError(f'indices are integers (n,), not {given.dtype} {tuple(given.shape)}')
        if not torch.is_tensor(given):
            return self.images(torch.from_numpy(given.astype(np.int64))).numpy()
        index = given.long()
        if index.device.type == 'cpu' and not ((0 <= index) & (index < self.size)).all():
            raise IndexError(f'there are images 0 to {self.size - 1}, not {index.min()} to '
                             f'{index.max()}')
        parts = [self.draw(part) for part in index.split(256)]              # 256 fit the caches
        first = parts[0]
        shape = min(len(index), 256), *self.shape
        if not torch.is_tensor(first) or (first.dtype, first.shape) != (torch.uint8, shape):
            raise TypeError(f'draw must return a uint8 tensor of shape {shape}')
        return (torch.cat(parts) if len(parts) > 1 else first).to(index.device)

    def train_index(self, i):
        """The i-th index of the training part, i in 0 … train_size − 1 (array or tensor)."""
        return i + i // (HELD_OUT_EVERY - 1) + 1

    def held_out(self, n):
        """At most n indices of the held-out part, int64: a random draw, the same in every run."""
        size = self.size - self.train_size
        return np.random.default_rng(0).choice(size, min(n, size), replace=False) * HELD_OUT_EVERY

    def identity(self):
        """What tells this data from other data, as JSON: sizes, and a hash of the factors in order
        and of 16 images; of faces and dSprites their mean colours: processors round differently."""
        images = self.images([k * (self.size - 1) // 15 for k in range(16)])
        seen = images.mean((2, 3)).round() if self.factors in (FACES, DSPRITES) else images
        content = repr(list(self.factors.items())).encode() + seen.astype(int).tobytes()
        return dict(size=self.size, shape=list(self.shape), factors=self.factors,
                    sha256=hashlib.sha256(content).hexdigest())


def load(source, crop=None):
    """A data set by name or path: 'faces', 'dsprites', a folder or .zip of images, dSprites' .npz.

    crop: side in pixels of the centred square cut from your own images before they are resized
    (CelebA: 128); None for the largest. Raises UserError for whatever cannot be loaded.
    """
    drawn = {'faces': faces, 'dsprites': dsprites}.get(source)
    official = str(source).endswith('.npz')
    if crop and (drawn or official):
        raise UserError(f'--crop is for your own images; {source} is 64 × 64 already')
    if drawn:
        dataset = drawn()
    elif official:
        dataset = dsprites(source)
    elif source:
        dataset = photographs(Path(source).resolve(), crop)
    else:                               # Path('') would be the current folder
        raise UserError('--data is empty: give faces, dsprites, a folder, .zip or dSprites .npz')
    dataset.source = source if drawn else os.path.abspath(source)
    dataset.crop = crop
    return dataset


# dSprites: three shapes × 6 scales × 40 orientations × 32 × 32 positions, black and white ---------

DSPRITES = {'shape': 3, 'scale': 6, 'orientation': 40, 'x position': 32, 'y position': 32}


def outlines():
    """Square, ellipse and heart at scale 1: polygons (V, 2), in pixels around the centre, y down.
    Fitted to genuine frames: each constant has a range of about 0.003 with no pixel wrong."""
    t = 2 * np.pi * np.arange(180)[:, None] / 180
    square = 9.598 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    ellipse = np.hstack([12.7668 * np.cos(t), 7.2142 * np.sin(t)])
    heart = np.hstack([9.598315 * np.sin(t) ** 3, -1.437597 - 0.6621432 * (
        13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))])
    return square, ellipse, heart


def draw_dsprites():
    """All 737,280 images at one bit a pixel: bytes (737280, 512), the lowest bit leftmost.

    A pixel is on where its centre lies inside the polygon (even-odd rule). A row of 64 pixels is
    one 64-bit word, in which every edge that crosses the row flips all pixels to its right.
    """
    position = 16 + 32 * np.linspace(0, 1, 32)
    rows = np.floor(position)[:, None] + np.arange(-14, 15)         # (32, 29): those in reach
    row_at = rows.astype(int).ravel()                               # (32 · 29,)
    y_at = np.repeat(np.arange(32), 29)
    dy = (rows + 0.5 - position[:, None]).ravel()                   # from the sprite's centre
    table = np.zeros((3, 6, 40, 32, 32, 64), '<u8')
    for shape, outline in enumerate(outlines()):
        for scale, size in enumerate(np.linspace(0.5, 1, 6)):
            for orientation, angle in enumerate(np.linspace(0, 2 * np.pi, 40)):
                c, s = np.cos(angle), np.sin(angle)
                x, y = (size * outline @ np.array([[c, s], [-s, c]])).T             # (V,) clockwise
                x_next, y_next = np.roll(x, -1), np.roll(y, -1)
                row, edge = np.nonzero((y > dy[:, None]) != (y_next > dy[:, None]))
                slope = (x_next - x)[edge] / (y_next - y)[edge]
                crossing = x[edge] + (dy[row] - y[edge]) * slope
                pixel = np.ceil(position[:, None] + crossing - 0.5).astype(np.uint64)
                row, first = np.unique(row, return_index=True)
                word = np.bitwise_xor.reduceat(~np.uint64(0) << pixel, first, axis=1)
                table[shape, scale, orientation][:, y_at[row], row_at[row]] = word
    return table.reshape(-1, 64).view(np.uint8)


def dsprites(path=None):
    """dSprites drawn by formula, or (path) read from the official file: (1, 64, 64), 0 and 255."""
    table = torch.from_numpy(draw_dsprites() if path is None else read_dsprites(path))
    on_device = functools.cache(table.to)

    def draw(index):
        bits = on_device(index.device)                              # (737280, 512)
        bit = torch.arange(8, dtype=torch.uint8, device=index.device)
        return ((bits[index][:, :, None] >> bit & 1) * 255).view(-1, 1, 64, 64)
    return Dataset('dsprites', (1, 64, 64), DSPRITES, draw)


def read_dsprites(path):
    """The official dsprites_ndarray_….npz → the table of draw_dsprites. Takes 3 GB for a moment."""
    try:
        images = np.load(path)['imgs'].reshape(math.prod(DSPRITES.values()), 4096)
        return np.packbits(images, axis=1, bitorder='little')
    except Exception as error:          # zlib, zipfile and NumPy each have their own
        raise UserError(f'{path} is not dSprites, or cannot be read ({error})') from None


# faces: a stand-in for CelebA, drawn from the factors that one sees in its traversals -------------

FACES = {'background colour': 12, 'background shading': 8, 'skin tone': 8, 'hair colour': 10,
         'hair length': 8, 'forehead': 6, 'jaw': 6, 'smile': 8, 'azimuth': 15, 'lighting angle': 8}

# The ends of the ranges of background, skin and hair, RGB: how far apart they are sets how much of
# the pixels' variance a factor has.
ENDS = (((0.10, 0.18, 0.32), (0.88, 0.82, 0.68)), ((0.36, 0.22, 0.15), (0.95, 0.78, 0.67)),
        ((0.05, 0.04, 0.05), (0.90, 0.70, 0.40)))
CLOTHES_WHITE_DARK_LIPS = ((0.30, 0.33, 0.38), (0.96, 0.95, 0.93), (0.13, 0.09, 0.09),
                           (0.66, 0.25, 0.25))


def cover(f):
    """How much of each pixel lies where f < 0, in [0, 1]: its edge is about f / |∇f| away."""
    slope = np.hypot(*np.gradient(f, axis=(-2, -1)))
    return np.clip(0.5 - f / np.maximum(slope, 1e-6), 0, 1).astype(np.float32)


def face_masks():
    """What covers each pixel, tabulated for the factors of shape: {name: float32 (rows, 4096)}, by
    pairs (azimuth, second factor); `clothes`, `ramp` and `roundness` have one row. Until the last
    line all broadcasts to (azimuths, values of the second, 64, 64)."""
    x, y = np.meshgrid((np.arange(64) - 31.5) / 1.2, (np.arange(64) - 33.5) / 1.2)      # y down
    turn = np.radians(np.linspace(-36, 36, FACES['azimuth'])).reshape(-1, 1, 1, 1)
    at = 3 * np.sin(turn)                                   # the head moves a little as it turns
    ranges = {'jaw': (0, 1), 'hair length': (-6, 27), 'forehead': (-4.5, -16.5),
              'smile': (-0.5, 1.1)}
    jaw, length, hairline, smile = (np.linspace(*ends, FACES[name]).reshape(-1, 1, 1)
                                    for name, ends in ranges.items())

    def seen(longitude):
        """Where a point of the face's cylinder is seen, and how much narrower."""
        angle = np.radians(longitude) + turn
        return at + 13 * np.sin(angle), np.maximum(np.cos(angle), 0.15)

    def blob(centre, cy, rx, ry):
        return cover(((x - centre) / rx) ** 2 + ((y - cy) / ry) ** 2 - 1)

    # The head: above an ellipse, below an outline that is more angular the stronger the jaw.
    below = np.maximum(y, 0) / (19 + 2 * jaw)
    head = cover(np.abs((x - at) / (13.5 + jaw * 0.8)) ** (2 + jaw) + below ** (1.5 + 3.5 * jaw)
                 + (np.minimum(y, 0) / 19) ** 2 - 1)
    neck = cover(np.maximum(np.abs(x - at / 3) - 6 - jaw, 8 - y))
    clothes = cover((x / 25) ** 2 + ((y - 38) / 14) ** 2 - 1)
    round_x = np.clip((x - at) / 15, -1, 1)                 # the surface normal, roughly
    body = 1 - (1 - head) * (1 - neck) * (1 - clothes)
    skin = head * (1.02 - 0.3 * round_x ** 2) + (1 - head) * neck * (1 - clothes) * 0.72
    nose = seen(0)[0] + 3 * np.sin(turn)                    # it stands out of the cylinder
    skin = (skin * (1 - 0.22 * blob(nose, 6.5, 3, 1.6))
            + 0.10 * head * blob(nose - np.sin(turn), 2, 1.3, 5))

    # Hair: a cap and two curtains behind the head, and a fringe over the forehead.
    half = 16.5 + 0.05 * (length + 6)
    cap = ((x + at) / half) ** 2 + ((y + 4) / 19.5) ** 2 - 1
    curtain = np.maximum(np.abs(x + at) - half + np.maximum(y - length + 5, 0) ** 2 / 9,
                         np.maximum(-4 - y, y - length))
    behind = np.maximum(cover(np.maximum(cap, y - np.maximum(length, -6))), cover(curtain))
    parting = at + 13 * np.sin(turn) * 0.6
    fringe = cover(np.maximum(((x - at * 0.7) / 15.5) ** 2 + ((y + 1.5) / 20.5) ** 2 - 1,
                              (y - hairline - 0.045 * (x - parting) ** 2) / 20))

    # Features, pasted in this order: eyes, brows, nostrils, mouth.
    white = dark = np.zeros((1, 1, 1, 1), np.float32)
    for side in (-1, 1):
        centre, narrow = seen(27 * side)
        eye = blob(centre, -0.5, 3.3 * narrow, 1.9)
        white = np.maximum(white, eye)
        iris = blob(centre + 1.2 * np.sin(turn), -0.4, 1.6 * narrow + 0.2, 1.7) * eye
        arch = -5.2 + 0.10 * ((x - centre) / narrow) ** 2
        brow = cover(np.maximum(np.abs(y - arch) - 0.8, np.abs(x - centre) - 3.8 * narrow))
        nostril = blob(nose + 1.6 * side * np.cos(turn), 7.2, 0.9, 0.7)
        dark = np.maximum(np.maximum(dark, iris), np.maximum(0.75 * brow, 0.5 * nostril))
    centre, narrow = seen(0)
    across = (x - centre) / ((4.6 + 1.5 * smile) * narrow)
    middle = 12.4 + 1.9 * smile * (0.5 - across ** 2)       # corners up, or down
    opening = np.maximum(1.7 * smile, 0) * (1 - across ** 2)
    mouth = cover(np.maximum(np.abs(y - middle) - opening - 0.2 - 1.3 * (1 - across ** 2),
                             (np.abs(across) - 1) * 5))
    teeth = cover(np.abs(y - middle) - opening + 0.3) * (np.abs(across) < 1) * mouth
    masks = dict(clothes=clothes, ramp=-y / 27, roundness=np.clip(x / 17, -1, 1), body=body,
                 skin=skin, side=head * round_x, behind=behind, fringe=fringe,
                 white=np.maximum(white * (1 - dark), teeth), dark=dark * (1 - mouth),
                 lips=mouth * (1 - teeth))
    return {k: np.ascontiguousarray(m.reshape(-1, 4096), np.float32) for k, m in masks.items()}


def faces():
    """Faces of ten factors, (3, 64, 64): a modest stand-in for CelebA. Shape depends on few factors
    and colour on the others: an image is Σ coverage × colour over layers."""
    arrays = dict(**face_masks(), ends=np.float32(ENDS), fixed=np.float32(CLOTHES_WHITE_DARK_LIPS))
    tables = functools.cache(lambda device: {name: torch.from_numpy(array).to(device)
                                             for name, array in arrays.items()})

    def draw(index):
        n = len(index)
        m = tables(index.device)
        fixed = m['fixed']
        v = {}                          # the factors' values, (n,) each
        for name, size in reversed(FACES.items()):      # torch.unravel_index would stall a GPU
            v[name] = index % size
            index = index // size
        level = {k: v[k].float()[:, None] / (size - 1) for k, size in FACES.items()}    # (n, 1)

        def row(name, factor):
            return m[name][v['azimuth'] * FACES[factor] + v[factor]]                    # (n, 4096)
        background, skin, hair = (                                  # (n, 3) each
            first + level[name] * (last - first) for (first, last), name
            in zip(m['ends'], ('background colour', 'skin tone', 'hair colour')))
        angle = torch.sin((level['lighting angle'] - 0.5) * 2.4)    # light from left … right
        shading = 0.56 * (level['background shading'] - 0.5)
        white, dark, lips = (row(name, 'smile') for name in ('white', 'dark', 'lips'))
        under = 1 - row('fringe', 'forehead')                       # not hidden by the fringe
        bare = under * (1 - white - dark - lips)
        open_ = under * (1 - row('body', 'jaw'))                    # neither fringe nor body
        behind = open_ * row('behind', 'hair length')
        wall = open_ - behind
        locks = 1 - under + behind
        layers = (                                                  # coverage as a product, colour
            (wall, 1, background), (wall, m['ramp'], shading.expand(n, 3)), (locks, 1, hair),
            (locks, m['roundness'], 0.40 * angle * hair), (bare, row('skin', 'jaw'), skin),
            (bare, row('side', 'jaw'), 0.56 * angle * skin), (under, m['clothes'], fixed[0]),
            (under, white, fixed[1]), (under, dark, fixed[2]), (under, lips, fixed[3]))
        coverage = torch.empty(n, len(layers), 4096, device=index.device)
        for k, (a, b, _) in enumerate(layers):
            torch.mul(a, b, out=coverage[:, k])
        colours = torch.stack([colour.expand(n, 3) for *_, colour in layers], 2)    # (n, 3, layers)
        x = torch.bmm(colours, coverage)                            # (n, 3, 4096)
        return x.clamp_(0, 1).mul_(255).add_(0.5).to(torch.uint8).view(n, 3, 64, 64)
    return Dataset('faces', (3, 64, 64), FACES, draw)


# Your own images ----------------------------------------------------------------------------------

# What is read, and nothing else: some of Pillow's readers run programs (EPS: Ghostscript), others
# open whatever a file contains (IPTC).
FORMATS = 'BMP', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP'


def photographs(path, crop):
    """A folder (any depth) or .zip of images, (3, 64, 64), without factors. They are decoded once,
    into the folder betavae/ of $XDG_CACHE_HOME (if not set: ~/.cache)."""
    if path.is_dir():
        files = {str(file.relative_to(path)): (file.stat().st_size, file.stat().st_mtime)
                 for file in path.rglob('*') if file.is_file()}
        open_file = path.joinpath
    else:
        try:
            archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f'{path} is neither a folder nor a readable .zip ({error}): give '
                            'faces, dsprites, a folder, .zip or dSprites .npz') from None
        files = {member.filename: (member.file_size, member.CRC) for member in archive.infolist()}
        open_file = archive.open
    names = sorted(filter(is_image, files))
    if not names:
        raise UserError(f'{path} holds no readable images ({", ".join(FORMATS)})')
    key = hashlib.sha256(repr((crop, [(file, files[file]) for file in names])).encode()).hexdigest()
    name = path.name if path.is_dir() else path.stem
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache',
                 'betavae', f'{name}-{key[:16]}.bytes')
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        write(cache, lambda file: decode_all(names, open_file, crop, file))
    images = torch.from_numpy(np.memmap(cache, np.uint8, 'c')).view(-1, 3, 64, 64)
    on_device = functools.cache(images.to)
    return Dataset(name, (3, 64, 64), {}, lambda index: on_device(index.device)[index], len(images))


def is_image(name):
    """Whether a path within a source has an image's extension, and is not hidden (macOS' twins)."""
    hidden = any(part.startswith(('.', '__MACOSX')) for part in Path(name).parts)
    return not hidden and Image.registered_extensions().get(Path(name).suffix.lower()) in FORMATS


def decode(file):
    """An image file, or its path → an upright RGB image, on white where it was transparent."""
    with Image.open(file, formats=FORMATS) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode == 'F' or image.mode.startswith('I') and np.asarray(image).max() > 65535:
            raise ValueError('neither 8 nor 16 bits per channel: which value is white?')
        if image.mode.startswith('I'):                                  # Pillow would clip 16 bits
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        return image.convert('RGB')


def decode_all(names, open_file, crop, file):
    """Write the images' centred squares, (n, 3, 64, 64) bytes. One in 100 may be unreadable."""
    bad = []

    def attempt(name):
        try:
            image = decode(open_file(name))
        except Exception as error:                                      # each decoder has its own
            bad.append(f'{name}: {error}')
            return b''
        side = crop or min(image.size)
        if side > min(image.size):
            raise UserError(f'{name} is {image.width} × {image.height}, smaller than --crop {crop}')
        x, y = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((64, 64), Image.Resampling.LANCZOS, (x, y, x + side, y + side))
        return np.asarray(image).transpose(2, 0, 1).tobytes()                       # (3, 64, 64)

    progress = Progress(len(names))
    with ThreadPool() as pool:
        for done, image in enumerate(pool.imap(attempt, names), 1):
            file.write(image)
            if len(bad) > len(names) / 100:
                raise UserError(f'more than 1 % of the images cannot be read: {bad[0]}')
            progress.show(done, lambda: f'{done:,} of {len(names):,} images decoded')
    for reason in bad[:3]:
        say(f'skipped {reason}', file=sys.stderr)


# Files and progress -------------------------------------------------------------------------------

def write(path, content):
    """Replace a file, all at once, by bytes or by what the function `content` writes to it. Raises
    OSError naming `path`."""
    path = Path(path)
    sweep(path.parent)
    partial = path.with_name(f'{path.name}.{os.urandom(4).hex()}.partial')      # nobody else's
    try:
        with open(partial, 'wb') as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def sweep(folder, age=3600):
    """Remove partial files that a kill left: after an hour nobody writes them any more. `age` is 0
    where a lock says so at once."""
    for partial in folder.glob('*.' + 8 * '[0-9a-f]' + '.partial'):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > age:
                partial.unlink()


def write_table(path, rows):
    """Rows of strings, the first of them the header → a Markdown table, which is printed too."""
    rows = [rows[0], ['---'] * len(rows[0]), *rows[1:]]
    cells = [[one_line(cell).replace('|', '\\|') for cell in row] for row in rows]
    text = ''.join(f"| {' | '.join(row)} |\n" for row in cells)
    write(path, text.encode())
    say(text, end='')


def say(text, end='\n', file=None):
    """Print at once, to standard output unless `file` is given. What cannot be printed is no reason
    to lose a run: letters that the terminal lacks become ?, a closed pipe swallows the rest."""
    file = file or sys.stdout or open(os.devnull, 'w')
    encoding = file.encoding or 'utf-8'
    try:
        print(text.encode(encoding, 'replace').decode(encoding), end=end, file=file, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())        # or the flush at exit fails


def on_terminal():
    return sys.stdout is not None and sys.stdout.isatty()


class Progress:
    """A line that says what, how long still and how fast, by the speed of the last minute: redrawn
    in place on a terminal, else printed every ten seconds. A unit of `total` is `size` images."""

    def __init__(self, total, done=0, size=1):
        self.total = total
        self.size = size
        self.marks = [(time.monotonic(), done)]

    def show(self, done, describe):
        """The line is what `describe` returns; it is called when one is due."""
        now = time.monotonic()
        due = self.marks[-1][0] + (0.5 if on_terminal() else 10)
        if now <= due and done < self.total and len(self.marks) > 1:
            return
        self.marks = [mark for mark in self.marks if now - mark[0] < 60] or self.marks[-1:]
        start, first = self.marks[0]
        self.marks.append((now, done))
        speed = (done - first + 1e-9) / (now - start + 1e-9)
        left = (self.total - done) / speed
        left = (f'{left / 3600:.1f} h' if left > 5400 else
                f'{left / 60:.0f} min' if left > 90 else f'{left:.0f} s')
        line = f'{describe()}  {left} left  {speed * self.size:,.0f} images/s'
        if on_terminal():
            line = line[:shutil.get_terminal_size().columns - 1]
            say(f'\r{line}\x1b[K', end='\n' if done == self.total else '')
        else:
            say(line)


@contextlib.contextmanager
def locked(folder):
    """Hold a folder against other processes until this one ends, however it ends, by a flock on the
    folder itself. Where there is no fcntl (Windows), nothing is held."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            import fcntl
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f'{folder} is being trained by another process') from None
        yield


def write_json(path, content):
    write(path, json.dumps(content, indent=1).encode())


# Pictures -----------------------------------------------------------------------------------------

PAGE = 900              # pixels: the width that sheets and charts aim at
FINER = 4               # the data of a chart are drawn so many times larger, for smooth lines
INK, GREY, PALE = '#222222', '#777777', '#e8e8e8'
COLOURS = ('#2a6fb0', '#e0802c', '#3a9a58', '#c8413c', '#8660b0', '#8a6248', '#d873ac', '#26a3b4',
           '#a5a32a', '#5c5c5c', '#1f3a6b', '#f0b46e', '#8fd0a0', '#7a1f2b')
LATIN = str.maketrans({'α': 'alpha', 'β': 'beta', 'γ': 'gamma', 'λ': 'lambda', 'μ': 'mu',
                       'σ': 'sigma', '→': 'to', '≤': '<=', '≥': '>=', '−': '-', '–': '-', '×': 'x'})
font = functools.cache(ImageFont.load_default)


def latin(text, most=1000):
    """Text for Pillow's own font, which has little beyond ASCII, in lines of `most` letters."""
    text = unicodedata.normalize('NFKD', text.translate(LATIN))     # é → e and an accent
    return textwrap.fill(text.encode('ascii', 'ignore').decode(), most)


def width_of(text, size):
    return math.ceil(max(font(size).getlength(line) for line in text.split('\n')))


def sheet(images, labels=(), title='', notes=(), scale=None):
    """Images, uint8 (rows, columns, C, H, W) → a picture of them, with a label left of each row, a
    title above and notes below. They are enlarged `scale` times; if None, up to twice, as fits."""
    images = torch.as_tensor(images).cpu().expand(-1, -1, 3, -1, -1).permute(0, 1, 3, 4, 2).numpy()
    rows, columns, height, width, _ = images.shape                              # (…, H, W, 3)
    labels = [latin(label, 38) for label in labels]
    left = max((width_of(label, 13) + 18 for label in labels), default=0)
    scale = scale or min(2, max(0.4, ((PAGE - left) / columns - 2) / width))
    across, down = int(width * scale) + 2, int(height * scale) + 2          # with a gap of 2
    right = left + columns * across
    above = latin(title, max(right, 400) // 8)
    below = '\n'.join(latin(note, max(right, 400) // 7) for note in notes)
    top = 28 + 20 * above.count('\n') if title else 0
    bottom = top + rows * down
    picture = Image.new('RGB', (
        max(right, width_of(above, 15) + 8, width_of(below, 13) + 8),
        bottom + (27 + 17 * below.count('\n') if notes else 0)), 'white')
    pen = ImageDraw.Draw(picture)
    pen.text((4, 4), above, INK, font(15))
    pen.text((4, bottom + 4), below, GREY, font(13))
    for row, label in enumerate(labels):
        pen.text((left - 10, top + (row + 0.5) * down), label, INK, font(13), 'rm', align='right')
    for row, column in np.ndindex(rows, columns):
        tile = Image.fromarray(images[row, column])
        tile = tile.resize((across - 2, down - 2), Image.Resampling.BICUBIC)
        picture.paste(tile, (left + column * across + 1, top + row * down + 1))
    return picture


def axis(values, start, end, log=False):
    """An axis between two pixels with room for `values`: a function from values to pixels, NaN for
    what has no place there, and its ticks [(pixel, label)], round numbers."""
    def scaled(v):
        v = np.where(np.isfinite(v), v, np.nan)
        return np.log10(np.where(v > 0, v, np.nan)) if log else v

    def pixel(v):
        return start + (scaled(v) - low) / (high - low) * (end - start)
    shown = [v for v in scaled(values) if np.isfinite(v)] or [0.0, 1.0]
    low, high = min(shown), max(shown)
    if log:                                                     # at least a decade
        low, high = min(low, (low + high - 1) / 2), max(high, (low + high + 1) / 2)
    elif math.isclose(low, high):                               # one value: with 0
        low, high = min(low, 0.0), max(high, 0.0)
    room = 0.04 * (high - low) or 1.0
    low, high = low - room, high + room
    most = max(2, abs(end - start) // (34 if end < start else 48))
    least = (high - low) / most                                 # from one tick to the next
    if log:
        parts = (1, 2, 5) if least < 0.5 else (1,)
        ticks = [part * 10.0 ** k for k in range(-60, 61, math.ceil(least)) for part in parts]
    else:
        steps = [part * 10.0 ** k for k in range(-30, 39) for part in (1, 2, 5)]
        step = next(step for step in steps if step >= least)
        ticks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return pixel, [(pixel(t), f'{t:,.7g}') for t in ticks if low <= scaled(t) <= high]


def chart(panels, size=(460, 320)):
    """Charts, up to three side by side, of `size` or narrower to fit a page → a picture.

    A panel is a dictionary: title; x, the name of that axis; series, {name: (xs, ys)}, with error
    bars {name: (xs, ys, low, high)}. Optional: limits, (low, high) of y; log_x; log_y; lines,
    {y: name}, drawn across; points=True for markers alone. What is not finite, or not positive on a
    logarithmic axis, is a gap. The series '' is not in the legend.
    """
    across = len(panels) if len(panels) < 4 else 2
    width = min(size[0], PAGE // across)
    height = size[1]
    full = across * width
    high = math.ceil(len(panels) / across) * height
    names = list(dict.fromkeys(name for panel in panels for name in panel['series'] if name))
    wide = 44 + max((width_of(latin(name), 12) for name in names), default=0)
    columns = max(1, (full - 16) // wide)
    picture = Image.new('RGB', (full, high + 22 * math.ceil(len(names) / columns)), 'white')
    pen = ImageDraw.Draw(picture)
    colours = dict(zip(['', *names], [INK, *COLOURS * len(names)]))
    for k, name in enumerate(names):
        x, y = 16 + k % columns * wide, high + 10 + k // columns * 20
        pen.rectangle([x, y - 2, x + 18, y + 1], colours[name])
        pen.text((x + 25, y), latin(name), INK, font(12), 'lm')
    for k, panel in enumerate(panels):
        picture.paste(draw_panel(panel, width, height, colours),
                      (k % across * width, k // across * height))
    return picture


def draw_panel(panel, width, height, colours):
    """A panel of a chart. Data are drawn larger and reduced; text, drawn as it is, stays sharp."""
    series = panel['series']
    lines = panel.get('lines', {})
    top, bottom, right = 50, height - 42, width - 16
    xs = np.concatenate([[], *(x for x, *_ in series.values())])
    ys = np.concatenate([[], *(y for _, *rest in series.values() for y in rest), [*lines]])
    y_at, y_ticks = axis(panel.get('limits', ys), bottom, top, panel.get('log_y'))
    left = 22 + max((width_of(label, 12) for _, label in y_ticks), default=0)
    x_at, x_ticks = axis(xs, left, right, panel.get('log_x'))
    picture = Image.new('RGB', (width, height), 'white')
    pen = ImageDraw.Draw(picture)
    pen.text((14, 8), latin(panel['title'], width // 8), INK, font(14))
    pen.text(((left + right) / 2, bottom + 24), latin(panel['x']), GREY, font(12), 'ma')
    for y, label in y_ticks:
        pen.line([left, y, right, y], PALE)
        pen.text((left - 7, y), label, INK, font(12), 'rm')
    for x, label in x_ticks:
        pen.line([x, top, x, bottom], PALE)
        pen.text((x, bottom + 6), label, INK, font(12), 'ma')
    pen.line([left, top, left, bottom, right, bottom], '#b0b0b0')

    layer = Image.new('RGBA', (FINER * width, FINER * height))
    ink = ImageDraw.Draw(layer)
    for name, (xs, ys, *bar) in series.items():
        low, high = bar or (ys, ys)
        x, y, low, high = FINER * np.array([x_at(xs), *map(y_at, (ys, low, high))])
        radius = 12 if panel.get('points') or len(x) <= 30 else FINER
        seen = np.isfinite(x + y + low + high)
        for k in np.flatnonzero(seen):
            ink.line([x[k], low[k], x[k], high[k]], colours[name], 6)
            if k and seen[k - 1] and not panel.get('points'):
                ink.line([x[k - 1], y[k - 1], x[k], y[k]], colours[name], 2 * FINER)
            ink.ellipse([x[k] - radius, y[k] - radius, x[k] + radius, y[k] + radius], colours[name])
    plot = layer.reduce(FINER).crop((left, top, right, bottom))
    picture.paste(plot, (left, top), plot)
    for y, name in lines.items():
        if top <= y_at(y) <= bottom:                            # not NaN
            pen.line([left, y_at(y), right, y_at(y)], GREY)
            pen.text((right, y_at(y) - 1), latin(name, width // 7), GREY, font(11), 'rd',
                     align='right')
    return picture


def save_picture(path, picture):
    """Write a picture, .png or .jpg by its ending."""
    form = 'PNG' if str(path).endswith('.png') else 'JPEG'          # which alone has a quality
    write(path, lambda file: picture.save(file, form, quality=90, subsampling=0))


def save_gif(path, pictures, milliseconds):
    """Write an animation. One palette, from a quarter of all pixels, and no dithering: it does not
    flicker, and is half as large."""
    sample = np.concatenate([np.asarray(p)[::2, ::2] for p in pictures])
    palette = Image.fromarray(sample).quantize(256, kmeans=1)
    frames = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
    write(path, lambda file: frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:],
                                            duration=milliseconds, loop=0))
