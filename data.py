"""Data sets for the β-VAE: images of 64 × 64 pixels, with their generative factors where these are known.

    data = load('dsprites')                     # or 'faces', a folder of images, a .zip of them, the official dSprites .npz
    data.factor_names, data.factor_sizes        # v₁ … v_K and how many values each takes; both () where unknown
    data.images([0, 1, 2])                      # (3, C, 64, 64) uint8, by flat index in C order over the factors

Nothing is downloaded: dSprites (Matthey et al. 2017) and the faces are drawn by formula. This module knows no model.
"""
import hashlib
import io
import os
import shutil
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

ALL_ON = np.uint64(2 ** 64 - 1)
HOLD = 19       # every 19th image is held out: prime to every factor's size, so both parts hold every value of every factor


class Unusable(ValueError):
    """A file or folder that cannot be used. Its message is one line: what, where, what to do."""


class Dataset:
    """N images with K known factors (K = 0 for photographs).

    `draw` maps a tensor of flat indices (n,) to images, uint8 (n, C, 64, 64), on the same device.
    """

    def __init__(self, name, shape, factors, draw, size=None, version='1'):
        self.name, self.shape, self.draw, self.version = name, shape, draw, version
        self.factor_names, self.factor_sizes = tuple(factors), tuple(factors.values())
        self.size = size or int(np.prod(self.factor_sizes, dtype=np.int64))

    def __len__(self):
        return self.size

    def images(self, index):
        """Flat indices (n,) → uint8 (n, C, 64, 64), 0 to 255: a tensor gives a tensor on its device, all else an array.

        Raises IndexError for an array with an index outside 0 … N − 1.
        """
        if torch.is_tensor(index):
            return torch.cat([self.draw(part) for part in index.split(256)]) if len(index) > 256 else self.draw(index)
        index = np.asarray(index, dtype=np.int64)
        if index.size and not (0 <= index.min() and index.max() < len(self)):
            raise IndexError(f'{self.name} has images 0 to {len(self) - 1}, not {index.min()} to {index.max()}')
        return self.images(torch.from_numpy(index)).numpy()

    def train_index(self, i):
        """The i-th index of the training part, i in 0 … train_size − 1 (array or tensor)."""
        return i + i // (HOLD - 1) + 1

    @property
    def train_size(self):
        return len(self) - (len(self) + HOLD - 1) // HOLD

    def held_out(self, n):
        """At most n indices of the held-out part, drawn at random, the same in every run: int64 (≤ n,)."""
        size = len(self) - self.train_size
        return np.random.default_rng(0).choice(size, min(n, size), replace=False) * HOLD


def load(source, crop=None):
    """The data set called `source`: 'faces', 'dsprites', the path of a folder or .zip of images, or of the dSprites .npz.

    crop: side of the centred square cut from people's own images before they are resized (CelebA: 128); the largest
    if None. Raises Unusable for whatever cannot be loaded.
    """
    path, drawn = Path(source), source in ('faces', 'dsprites')
    if crop is not None and (drawn or path.suffix == '.npz'):
        raise Unusable(f'--crop is for your own images; {source} is 64 × 64 already')
    if drawn:
        return faces() if source == 'faces' else dsprites()
    if not path.exists():
        raise Unusable(f'no data at {source}: give faces, dsprites, or the path of a folder, .zip or dSprites .npz')
    if path.suffix == '.npz':
        return dsprites(path)
    if not path.is_dir() and not zipfile.is_zipfile(path):
        raise Unusable(f'{source} is neither a folder nor a whole .zip of images')
    return photographs(path, crop)


def on_device(*arrays):
    """A function device → the arrays as tensors there, copied once."""
    copies = {torch.device('cpu'): [torch.from_numpy(a) for a in arrays]}

    def tensors(device):
        if device not in copies:
            copies[device] = [t.to(device) for t in copies[torch.device('cpu')]]
        return copies[device]
    return tensors


def unravel(index, sizes):
    """Flat indices (n,) → one tensor (n,) of values per factor: the inverse of C order."""
    values = []
    for size in reversed(sizes):
        values.append(index % size)
        index = index // size
    return values[::-1]


# ---------------------------------------------------------------------------------------------------------------------
# dSprites: three shapes × 6 scales × 40 orientations × 32 × 32 positions, black and white
# ---------------------------------------------------------------------------------------------------------------------

DSPRITES = {'shape': 3, 'scale': 6, 'orientation': 40, 'x position': 32, 'y position': 32}


def outlines():
    """The polygons of square, ellipse and heart at scale 1, in pixels around the sprite's centre: three of (V, 2), y down.

    The constants are measured on genuine frames: the ranges that leave no wrong pixel are about 0.003 pixel wide.
    """
    t = 2 * np.pi * np.arange(180)[:, None] / 180
    square = 9.598 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    ellipse = np.hstack([12.7668 * np.cos(t), 7.2142 * np.sin(t)])
    heart = np.hstack([9.598315 * np.sin(t) ** 3, -1.437597 - 0.6621432 * (
        13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))])
    return square, ellipse, heart


def draw_dsprites():
    """All 737,280 images, a bit a pixel: (737280, 512) bytes, the lowest bit of each its leftmost pixel.

    A pixel is on where its centre lies inside the polygon (even-odd rule). A row of 64 pixels is one 64-bit word, in which
    every edge that crosses the row flips all pixels to its right.
    """
    position = 16 + 32 * np.linspace(0, 1, 32)
    rows = np.floor(position)[:, None] + np.arange(-14, 15)                       # (32, 29): the rows a sprite can reach
    y_at, row_at = np.repeat(np.arange(32), 29), rows.astype(int).ravel()
    dy = (rows + 0.5 - position[:, None]).ravel()                                 # (32 · 29,) from the sprite's centre
    table = np.zeros((3, 6, 40, 32, 32, 64), '<u8')
    for shape, outline in enumerate(outlines()):
        for scale, size in enumerate(np.linspace(0.5, 1, 6)):
            for orientation, angle in enumerate(np.linspace(0, 2 * np.pi, 40)):
                c, s = np.cos(angle), np.sin(angle)
                x, y = (size * outline @ np.array([[c, s], [-s, c]])).T           # (V,) clockwise on the screen
                x_next, y_next = np.roll(x, -1), np.roll(y, -1)
                row, edge = np.nonzero((y > dy[:, None]) != (y_next > dy[:, None]))
                slope = (x_next - x)[edge] / (y_next - y)[edge]
                crossing = x[edge] + (dy[row] - y[edge]) * slope                  # from the sprite's centre
                pixel = np.ceil(position[:, None] + crossing - 0.5).astype(np.uint64)     # (32, crossings)
                row, first = np.unique(row, return_index=True)
                word = np.bitwise_xor.reduceat(ALL_ON << pixel, first, axis=1)    # (32, rows)
                table[shape, scale, orientation][:, y_at[row], row_at[row]] = word
    return table.reshape(-1, 64).view(np.uint8)


def dsprites(path=None):
    """dSprites drawn by formula, or (path) the official file, through the same interface: (1, 64, 64), values 0 and 255."""
    table = draw_dsprites() if path is None else read_dsprites(path)
    table = on_device(table)                                                      # (737280, 512)

    def draw(index):
        bits, = table(index.device)
        bits = bits[index][:, :, None] >> torch.arange(8, dtype=torch.uint8, device=index.device) & 1     # (n, 512, 8)
        return (bits * 255).view(-1, 1, 64, 64)
    return Dataset('dsprites', (1, 64, 64), DSPRITES, draw, version='drawn 1' if path is None else 'official')


def read_dsprites(path):
    """The official dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz → the table of draw_dsprites, streamed: never 3 GB."""
    n = int(np.prod(list(DSPRITES.values())))
    table = np.empty((n, 512), np.uint8)
    try:
        with zipfile.ZipFile(path) as archive, archive.open('imgs.npy') as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if (shape, dtype) != ((n, 64, 64), np.uint8):
                raise ValueError(f'its images are {dtype} {shape}')
            for start in range(0, n, 4096):
                images = np.frombuffer(file.read(4096 * 4096), np.uint8).reshape(-1, 4096)
                table[start:start + 4096] = np.packbits(images, axis=1, bitorder='little')
    except Exception as error:          # zlib, zipfile and NumPy each have their own
        raise Unusable(f'{path} is not the official dSprites file, or is damaged ({error})') from None
    return table


# ---------------------------------------------------------------------------------------------------------------------
# faces: a stand-in for CelebA, drawn from the factors one sees in its traversals
# ---------------------------------------------------------------------------------------------------------------------

FACES = {'background colour': 12, 'background shading': 8, 'skin tone': 8, 'hair colour': 10, 'hair length': 8,
         'forehead': 6, 'jaw': 6, 'smile': 8, 'azimuth': 15, 'lighting angle': 8}

# Colours run in a straight line between these ends (RGB); the spans set how much of the pixels' variance a factor has.
BACKGROUND = (0.10, 0.18, 0.32), (0.88, 0.82, 0.68)
SKIN = (0.36, 0.22, 0.15), (0.95, 0.78, 0.67)
HAIR = (0.05, 0.04, 0.05), (0.90, 0.70, 0.40)
CLOTHES, WHITE, DARK, LIPS = (0.30, 0.33, 0.38), (0.96, 0.95, 0.93), (0.13, 0.09, 0.09), (0.66, 0.25, 0.25)


def cover(f):
    """How much of each pixel lies where f < 0, in [0, 1]: the distance to the outline is f / |∇f|, to first order."""
    slope = np.hypot(*np.gradient(f, axis=(-2, -1)))
    return np.clip(0.5 - f / np.maximum(slope, 1e-6), 0, 1).astype(np.float32)


def face_masks():
    """What covers each pixel, tabulated for the factors that give shape: a dictionary of float32 (rows, 4096).

    A row is a pair (azimuth, second factor): until the last line everything broadcasts to (azimuths, values of the second,
    64, 64). `clothes`, `ramp` and `roundness` have one row.
    """
    x, y = np.meshgrid((np.arange(64) - 31.5) / 1.2, (np.arange(64) - 33.5) / 1.2)    # from the middle, y down

    def values(name, low, high):
        return np.linspace(low, high, FACES[name]).reshape(-1, 1, 1)
    turn = np.radians(np.linspace(-36, 36, FACES['azimuth'])).reshape(-1, 1, 1, 1)
    at = 3 * np.sin(turn)                                                         # the head moves a little as it turns

    def seen(longitude):
        """Where a point of the face's cylinder is seen, and how much its width is foreshortened."""
        angle = np.radians(longitude) + turn
        return at + 13 * np.sin(angle), np.maximum(np.cos(angle), 0.15)

    def blob(centre, cy, rx, ry):
        return cover(((x - centre) / rx) ** 2 + ((y - cy) / ry) ** 2 - 1)

    # The head: an ellipse above, below it an outline that is more angular the stronger the jaw.
    jaw = values('jaw', 0, 1)
    below = np.maximum(y, 0) / (19 + 2 * jaw)
    width = 13.5 + jaw * 0.8
    head = cover(np.abs((x - at) / width) ** (2 + jaw) + below ** (1.5 + 3.5 * jaw) + (np.minimum(y, 0) / 19) ** 2 - 1)
    neck = cover(np.maximum(np.abs(x - at / 3) - 6 - jaw, 8 - y))
    clothes = cover((x / 25) ** 2 + ((y - 38) / 14) ** 2 - 1)
    round_x = np.clip((x - at) / 15, -1, 1)                                       # the surface normal, roughly
    body = 1 - (1 - head) * (1 - neck) * (1 - clothes)
    skin = head * (1.02 - 0.3 * round_x ** 2) + (1 - head) * neck * (1 - clothes) * 0.72
    nose, _ = seen(0)
    nose = nose + 3 * np.sin(turn)                                                # it stands out of the cylinder
    skin = skin * (1 - 0.22 * blob(nose, 6.5, 3, 1.6)) + 0.10 * head * blob(nose - np.sin(turn), 2, 1.3, 5)

    # Hair: a cap and two curtains behind the head, and a fringe over the forehead.
    length = values('hair length', -6, 27)
    back, half = -at, 16.5 + 0.05 * (length + 6)
    cap = ((x - back) / half) ** 2 + ((y + 4) / 19.5) ** 2 - 1
    curtain = np.maximum(np.abs(x - back) - half + np.maximum(y - length + 5, 0) ** 2 / 9, np.maximum(-4 - y, y - length))
    behind = np.maximum(cover(np.maximum(cap, y - np.maximum(length, -6))), cover(curtain))
    hairline = values('forehead', -4.5, -16.5)
    parting = at + 13 * np.sin(turn) * 0.6
    fringe = np.maximum(((x - at * 0.7) / 15.5) ** 2 + ((y + 1.5) / 20.5) ** 2 - 1,
                        (y - hairline - 0.045 * (x - parting) ** 2) / 20)

    # Features, pasted in this order: eyes, brows, nostrils, mouth.
    smile = values('smile', -0.5, 1.1)
    white = np.zeros((1, 1, 1, 1), np.float32)
    dark = white
    for side in (-1, 1):
        centre, narrow = seen(27 * side)
        eye = blob(centre, -0.5, 3.3 * narrow, 1.9)
        white = np.maximum(white, eye)
        iris = blob(centre + 1.2 * np.sin(turn), -0.4, 1.6 * narrow + 0.2, 1.7) * eye
        arch = -5.2 + 0.10 * ((x - centre) / narrow) ** 2
        brow = cover(np.maximum(np.abs(y - arch) - 0.8, np.abs(x - centre) - 3.8 * narrow))
        dark = np.maximum(dark, np.maximum(iris, 0.75 * brow))
        dark = np.maximum(dark, 0.5 * blob(nose + 1.6 * side * np.cos(turn), 7.2, 0.9, 0.7))
    centre, narrow = seen(0)
    across = (x - centre) / ((4.6 + 1.5 * smile) * narrow)
    middle = 12.4 + 1.9 * smile * (0.5 - across ** 2)                             # corners up, or down
    opening = np.maximum(1.7 * smile, 0) * (1 - across ** 2)
    mouth = cover(np.maximum(np.abs(y - middle) - opening - 0.2 - 1.3 * (1 - across ** 2), (np.abs(across) - 1) * 5))
    teeth = cover(np.abs(y - middle) - opening + 0.3) * (np.abs(across) < 1) * mouth
    lips = mouth * (1 - teeth)
    white = np.maximum(white * (1 - dark), teeth)
    masks = dict(clothes=clothes, ramp=-y / 27, roundness=np.clip(x / 17, -1, 1),
                 body=body, skin=skin, side=head * round_x, behind=behind, fringe=cover(fringe), white=white,
                 dark=dark * (1 - mouth), lips=lips)
    return {name: np.ascontiguousarray(mask.reshape(-1, 4096), np.float32) for name, mask in masks.items()}


def faces():
    """Faces of ten factors, (3, 64, 64): a modest stand-in for CelebA, with ground truth.

    Shape hangs on few factors and colour on the others, so an image is Σ over layers of coverage × colour.
    """
    masks = face_masks()
    tables = on_device(*masks.values(), np.array([BACKGROUND, SKIN, HAIR], np.float32),
                       np.array([CLOTHES, WHITE, DARK, LIPS], np.float32))

    def draw(index):
        device, n = index.device, len(index)
        *planes, ends, fixed = tables(device)                                     # ends (3, 2, 3), fixed (4, 3): RGB
        m = dict(zip(masks, planes))
        v = dict(zip(FACES, unravel(index, FACES.values())))
        level = {name: v[name].float()[:, None] / (size - 1) for name, size in FACES.items()}         # (n, 1) in [0, 1]

        def row(name, factor):
            return m[name][v['azimuth'] * FACES[factor] + v[factor]]              # (n, 4096)

        def between(k, name):
            return ends[k, 0] + level[name] * (ends[k, 1] - ends[k, 0])           # (n, 3)
        angle = torch.sin((level['lighting angle'] - 0.5) * 2.4)                  # light from the left … from the right
        shading = 0.56 * (level['background shading'] - 0.5)
        background, skin, hair = (between(*c) for c in enumerate(('background colour', 'skin tone', 'hair colour')))
        white, dark, lips = row('white', 'smile'), row('dark', 'smile'), row('lips', 'smile')
        under = 1 - row('fringe', 'forehead')                                     # not hidden by the fringe
        bare = under * (1 - white - dark - lips)
        open_ = under * (1 - row('body', 'jaw'))                                  # neither fringe nor body
        behind = open_ * row('behind', 'hair length')
        wall, locks = open_ - behind, 1 - under + behind
        layers = ((wall, 1, background), (wall, m['ramp'], shading.expand(n, 3)),
                  (locks, 1, hair), (locks, m['roundness'], 0.40 * angle * hair),
                  (bare, row('skin', 'jaw'), skin), (bare, row('side', 'jaw'), 0.56 * angle * skin),
                  (under, m['clothes'], fixed[0]), (under, white, fixed[1]), (under, dark, fixed[2]), (under, lips, fixed[3]))
        coverage = torch.empty(n, len(layers), 4096, device=device)               # (n, layers, 4096)
        for k, (mask, share, _) in enumerate(layers):
            torch.mul(mask, share, out=coverage[:, k])
        colours = torch.stack([colour.expand(n, 3) for *_, colour in layers], 1)  # (n, layers, 3)
        x = torch.bmm(colours.transpose(1, 2), coverage).clamp_(0, 1).mul_(255).add_(0.5)             # (n, 3, 4096)
        return x.to(torch.uint8).view(n, 3, 64, 64)
    return Dataset('faces', (3, 64, 64), FACES, draw)


# ---------------------------------------------------------------------------------------------------------------------
# people's own images
# ---------------------------------------------------------------------------------------------------------------------

def photographs(path, crop):
    """A folder (any depth) or .zip of images, each decoded once into `cache/`: (3, 64, 64), no known factors."""
    names, read, key = open_folder(path) if path.is_dir() else open_zip(path)
    if not names:
        raise Unusable(f'{path} holds no image that Pillow knows by its ending (.jpg, .png …)')
    key = hashlib.sha256(repr((key, crop, 'cache 1')).encode()).hexdigest()[:16]
    cache = Path('cache', f'{path.stem}-{key}.npy').absolute()
    try:
        np.load(cache, mmap_mode='r')                     # refuses a file shorter than its header says
    except (OSError, ValueError, EOFError):
        decode_all(path, names, read, crop, cache)

    on_gpu = {}

    def draw(index):
        if index.device.type == 'cpu':    # mapped anew each time: the pages touched would add up to the whole file in memory
            images = torch.from_numpy(np.load(cache, mmap_mode='r')[index.numpy()])         # (n, 64, 64, 3)
        else:
            if index.device not in on_gpu:                                                  # CelebA: 2.5 GB
                on_gpu[index.device] = torch.from_numpy(np.load(cache)).to(index.device)
            images = on_gpu[index.device][index]
        return images.permute(0, 3, 1, 2)
    return Dataset(path.stem, (3, 64, 64), {}, draw, size=len(np.load(cache, mmap_mode='r')), version=key)


def formats():
    """What Pillow reads, but for EPS, which is a program that reading would run, and what it only recognises."""
    Image.init()
    return [name for name in Image.OPEN if name not in ('EPS', 'MPEG', 'HDF5', 'GRIB', 'BUFR', 'WMF')]


def is_image(name):
    """Whether Pillow reads files of this ending, and no part of the path is hidden (macOS fills .zip files with such twins)."""
    parts = Path(name).parts
    return (Image.registered_extensions().get(Path(name).suffix.lower()) in formats()
            and not any(part.startswith('.') or part == '__MACOSX' for part in parts))


def open_folder(path):
    """The images below a folder: sorted names, a function name → bytes, and what changes when the source does."""
    names = sorted(str(file.relative_to(path)) for file in path.rglob('*') if file.is_file())
    names = [name for name in names if is_image(name)]
    stats = [(path / name).stat() for name in names]
    return names, lambda name: (path / name).read_bytes(), [(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, stats)]


def open_zip(path):
    """The images in a .zip: as open_folder."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise Unusable(f'{path} is not a whole .zip ({error})') from None
    members = sorted((m for m in archive.infolist() if is_image(m.filename)), key=lambda m: m.filename)
    if any(m.flag_bits & 1 for m in members):
        raise Unusable(f'{path} is encrypted: unpack it and give the folder')
    return [m.filename for m in members], archive.read, [(m.filename, m.file_size, m.CRC) for m in members]


def decode(data, crop):
    """The bytes of an image file → uint8 (64, 64, 3): upright, on white where transparent, the centred square, resized."""
    with Image.open(io.BytesIO(data), formats=formats()) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I'):                    # 16 bits a pixel; Pillow would clip, not scale
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        image = image.convert('RGB')
    side = crop or min(image.size)
    if side > min(image.size):
        raise ValueError(f'{image.width} × {image.height} is smaller than --crop {crop}')
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = (left, top, left + side, top + side)
    return np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS, box=square))


def decode_all(path, names, read, crop, cache):
    """Decode the images on all cores into `cache`, which appears only when it is whole. One in 100 may be unreadable."""
    def attempt(name):
        try:
            return decode(read(name), crop)
        except Exception as error:      # whatever Pillow's many decoders, zlib or the file system raise for this one
            return f'{name} ({" ".join(str(error).split()) or type(error).__name__})'

    cache.parent.mkdir(parents=True, exist_ok=True)
    need, free = len(names) * 64 * 64 * 3, shutil.disk_usage(cache.parent).free
    if need > free:
        raise Unusable(f'no room for the decoded images: {cache.parent} needs {need >> 20} MB and has {free >> 20}')
    for partial in cache.parent.glob(f'{cache.stem}.partial-*'):        # left by a kill: nobody writes it any more
        if time.time() - partial.stat().st_mtime > 600:
            partial.unlink(missing_ok=True)
    partial = cache.with_suffix(f'.partial-{os.getpid()}')
    bad, good, start, shown = [], 0, time.monotonic(), 0
    try:
        with open(partial, 'wb') as file, ThreadPoolExecutor() as pool, warnings.catch_warnings():
            warnings.simplefilter('error', Image.DecompressionBombWarning)

            def header():               # NumPy pads it, so that the count of images can be put right at the end
                layout = dict(shape=(good, 64, 64, 3), fortran_order=False, descr='|u1')
                file.seek(0)
                np.lib.format.write_array_header_1_0(file, layout)
            header()
            for first in range(0, len(names), 512):
                for image in pool.map(attempt, names[first:first + 512]):
                    if isinstance(image, str):
                        bad.append(image)
                        print(f'skipped {path}: {image}', file=sys.stderr)
                    else:
                        file.write(image)
                        good += 1
                done, now = min(first + 512, len(names)), time.monotonic()
                if now - shown > 1 or done == len(names):
                    left, shown = (now - start) * (len(names) / done - 1), now
                    print(f'decoding {path}: {done:,} of {len(names):,} images, {left:.0f} s left', file=sys.stderr)
            header()
            file.flush()
            os.fsync(file.fileno())
        if len(bad) > len(names) / 100:
            raise Unusable(f'{path}: {len(bad)} of {len(names)} images are unreadable, more than 1 %; the first: {bad[0]}')
        os.replace(partial, cache)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(cache)) from None
    finally:
        partial.unlink(missing_ok=True)
