"""The data sets of the width experiment: generated ones, and real ones in the formats of their files."""

import sys

import pytest

pytest.importorskip("aeon")
pytest.importorskip("h5py")
pytest.importorskip("librosa")
pytest.importorskip("mlxtend")
pytest.importorskip("sklearn")
pytest.importorskip("tonic")

import numpy as np
import torch

from benchmarks.learning import data, spoken
from benchmarks.learning.data import BANDS, INSTRUMENTS, RATE, SOURCES


def check(found, shape, classes):
    """Finite samples of one shape, and every class, in both parts."""
    assert found.train.shape[1:] == found.test.shape[1:] == shape
    assert found.train.dtype in (torch.float32, torch.uint8)
    for samples, labels in ((found.train, found.train_labels), (found.test, found.test_labels)):
        assert len(samples) == len(labels)
        assert torch.isfinite(samples.float()).all()
        assert labels.dtype == torch.int64
        assert labels.unique().tolist() == list(range(classes))
    assert found.classes == classes


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("digits", (1, 1, 8, 8), 10),
        ("mnist", (1, 1, 14, 14), 10),
        ("digit_saccades", (6, 2, 16, 16), 10),
        ("vowels", (29, 12), 9),
    ],
)
def test_sets_without_download(name, shape, classes):
    found = SOURCES[name].read(None)
    check(found, shape, classes)
    if name != "mnist":  # takes seconds
        assert torch.equal(found.train, SOURCES[name].read(None).train), "the same each time"


@pytest.mark.slow
def test_tones(monkeypatch):
    monkeypatch.setattr(data, "TONES", 10)
    found = data.tones()
    check(found, (data.TONE_FRAMES, BANDS), len(INSTRUMENTS))
    torch.testing.assert_close(found.train.mean((0, 1)), torch.zeros(BANDS), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.train.std((0, 1)), torch.ones(BANDS), atol=1e-4, rtol=0)


def images(*values):
    torch.manual_seed(0)
    image = torch.zeros(len(values), 1, 16, 16)
    for each, value in zip(image, values, strict=True):
        each[0, 5:10, 6:11] = value
    return image


def test_saccade_events():
    dark, faint, bright = data.saccade_events(images(0.0, 0.2, 1.0))
    assert dark.sum() == 0 < faint.long().sum() < bright.long().sum()
    first = bright[0].long()  # the first saccade goes right and, half as far, down: ON before an edge, OFF behind it
    assert first[0, 7:9, 11:13].sum() > 0 == first[1, 7:9, 11:13].sum()
    assert first[1, 7:9, 6].sum() > 0 == first[0, 7:9, 6].sum()
    # The eye returns to its start: a pixel's ON and OFF events cancel, up to one by rounding.
    events = data.saccade_events(torch.rand(3, 1, 16, 16)).long().sum(1)
    assert events.sum() > 1000
    assert (events[:, 0] - events[:, 1]).abs().max() <= 1


def test_spectrogram_shows_the_pitch():
    import librosa

    centres = librosa.mel_frequencies(n_mels=BANDS + 2, fmax=RATE / 2)[1:-1]
    time = np.arange(RATE // 4) / RATE
    for pitch in (440, 5000):
        loudest = data.spectrogram(np.sin(2 * np.pi * pitch * time).astype(np.float32)).mean(0).argmax()
        assert abs(centres[loudest] / pitch - 1) < 0.1


@pytest.fixture
def wav_folder(tmp_path):
    """Two labels of ten files, of different lengths and rates."""
    import soundfile

    for label, pitch in (("high", 3000), ("low", 300), ("_background_noise_", 50)):
        (tmp_path / label).mkdir()
        for number in range(10):
            rate = (RATE, 8000)[number % 2]
            sound = np.sin(2 * np.pi * pitch * np.arange((4000, 30000)[number % 2]) / rate)
            soundfile.write(tmp_path / label / f"{number}.wav", sound, rate)
    return tmp_path


def test_recordings(wav_folder, tmp_path_factory):
    found = data.recordings(wav_folder)
    check(found, (data.RECORDED_FRAMES, BANDS), 2)
    assert len(found.test) == 4
    (wav_folder / "testing_list.txt").write_text("high/0.wav\nlow/3.wav\nlow/4.wav\n")
    listed = data.recordings(wav_folder)
    assert (listed.test_labels.tolist(), len(listed.train)) == ([0, 1, 1], 17)
    empty = tmp_path_factory.mktemp("empty")
    (empty / "flute").mkdir()
    with pytest.raises(FileNotFoundError, match=r"subfolder of \.wav files for each label, found \['flute'\]"):
        data.recordings(empty)


def test_nmnist(tmp_path, monkeypatch):
    """Files in the format of N-MNIST: x, y, then polarity and 23 bits of microseconds."""
    import tonic

    monkeypatch.setattr(tonic.datasets.NMNIST, "_check_exists", lambda self: True)
    for part in ("Train", "Test"):
        for label in range(3):
            folder = tmp_path / "NMNIST" / part / str(label)
            folder.mkdir(parents=True)
            events = np.array([[x, 5, 128 * (x % 2), 0, 7 * x] for x in range(34)], dtype=np.uint8)
            (folder / "00001.bin").write_bytes(events.tobytes())
    found = SOURCES["nmnist"].read(tmp_path)
    check(found, (10, 2, 34, 34), 3)
    assert found.train.flatten(1).long().sum(1).tolist() == [33] * 3  # the last one ends the last frame
    assert found.train[0, :, 1, 5, 1::2].sum() == 16  # ON events at odd x


def write_heidelberg(folder, times, units):
    """Two samples a part in the published format: seconds in float16, fibres in uint16, rows of different lengths."""
    import h5py

    (folder / "SHD").mkdir()
    for part in ("train", "test"):
        with h5py.File(folder / "SHD" / f"shd_{part}.h5", "w") as file:
            for name, dtype, rows in (("times", np.float16, times), ("units", np.uint16, units)):
                column = file.create_dataset(f"spikes/{name}", (2,), h5py.vlen_dtype(dtype))
                for row, values in enumerate(rows):
                    column[row] = np.array(values, dtype)
            file["labels"] = np.array([0, 1], np.uint16)
            file["extra/keys"], file["extra/speaker"] = [b"null", b"eins"], [1, 2]


def test_spiking_heidelberg_digits(tmp_path):
    write_heidelberg(
        tmp_path, [[0, 0.013, 0.0151, 1.0, 1.0], [0.7, 1.39, 1.401, 5]], [[3, 4, 5, 699, 699], [0, 1, 2, 2]]
    )
    found = SOURCES["shd"].read(tmp_path)
    check(found, (100, 700), 2)
    places = [[*map(int, place), int(found.train[tuple(place)])] for place in found.train.nonzero()]
    # 14 ms a step; what comes after 1.4 s is left out.
    assert places == [[0, 0, 3, 1], [0, 0, 4, 1], [0, 1, 5, 1], [0, 71, 699, 2], [1, 50, 0, 1], [1, 99, 1, 1]]


def test_training_on_spoken_digits(tmp_path, monkeypatch, capsys):
    """Each kind of neurons learns two samples of different fibres."""
    random = np.random.default_rng(0)
    write_heidelberg(
        tmp_path, random.uniform(0, 1.4, (2, 2000)), random.integers([[0], [350]], [[350], [700]], (2, 2000))
    )
    monkeypatch.setattr(sys, "argv", ["spoken", "--data-root", str(tmp_path), "--epochs", "1", "--hidden", "16"])
    spoken.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", epoch")[0] for line in lines] == list(spoken.NEURONS)
    data = SOURCES["shd"].read(tmp_path)
    monkeypatch.setattr(spoken, "RATE", 0.02)
    assert [spoken.train(name, data, 8, 16)[-1] for name in spoken.NEURONS] == [100.0] * 3


def test_missing_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder NMNIST in the data root, which is None"):
        SOURCES["nmnist"].read(None)
    with pytest.raises(FileNotFoundError, match="expected a folder instruments in the data root"):
        SOURCES["instruments"].read(tmp_path)
    assert list(data.available(tmp_path)) == list(data.available(None))
    assert {SOURCES[name].kind for name in data.available(None)} == set(data.KINDS)
