"""The data sets of the width experiment: made ones hold their promises, real ones are read as they lie on disk."""

import pickle

import pytest

pytest.importorskip("aeon")
pytest.importorskip("librosa")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("tonic")
pytest.importorskip("torchvision")

import numpy as np
import torch

from benchmarks.learning import data
from benchmarks.learning.data import BANDS, CONTRAST, HOP, INSTRUMENTS, RATE, SOURCES


def check(found, shape, classes):
    """Both parts have samples of one shape and every class, and all is finite."""
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
    [("digits", (1, 1, 8, 8), 10), ("digit_saccades", (6, 2, 16, 16), 10), ("vowels", (29, 12), 9)],
)
def test_sets_that_need_no_download(name, shape, classes):
    found = SOURCES[name].read(None)
    check(found, shape, classes)
    again = SOURCES[name].read(None)
    assert torch.equal(found.train, again.train)
    assert torch.equal(found.test_labels, again.test_labels)


def test_tones(monkeypatch):
    monkeypatch.setattr(data, "TONES", 10)
    found = data.tones()
    check(found, (data.TONE_FRAMES, BANDS), len(INSTRUMENTS))
    torch.testing.assert_close(found.train.mean((0, 1)), torch.zeros(BANDS), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.train.std((0, 1)), torch.ones(BANDS), atol=1e-4, rtol=0)
    assert torch.equal(found.test, data.tones().test)


def images(*values):
    torch.manual_seed(0)
    image = torch.zeros(len(values), 1, 16, 16)
    for each, value in zip(image, values, strict=True):
        each[0, 5:10, 6:11] = value
    return image


def test_nothing_moves_in_a_dark_image():
    assert data.saccade_events(images(0.0)).sum() == 0


def test_a_brighter_figure_sets_off_more_events():
    faint, bright = data.saccade_events(images(0.2, 1.0)).flatten(1).long().sum(1)
    assert 0 < faint < bright


def test_an_edge_that_moves_right_is_on_before_it_and_off_behind_it():
    first = data.saccade_events(images(1.0))[0, 0].long()  # the first saccade goes right and, half as far, down
    assert first[0, 7:9, 11:13].sum() > 0
    assert first[1, 7:9, 11:13].sum() == 0
    assert first[1, 7:9, 6].sum() > 0
    assert first[0, 7:9, 6].sum() == 0


def test_events_add_up_to_the_change(monkeypatch):
    """The eye comes back to where it began, so as much has become brighter as darker, up to one event's contrast."""
    events = data.saccade_events(torch.rand(3, 1, 16, 16)).long().sum(1)
    assert events.sum() > 1000
    assert (events[:, 0] - events[:, 1]).abs().max() <= 1
    monkeypatch.setattr(data, "CONTRAST", CONTRAST / 3)
    finer = data.saccade_events(torch.rand(3, 1, 16, 16)).long().sum(1)
    assert 2.5 < finer.sum() / events.sum() < 4


def sine(pitch, seconds=1.5):
    return np.sin(2 * np.pi * pitch * np.arange(round(seconds * RATE)) / RATE).astype(np.float32)


def test_spectrogram_has_the_pitch():
    import librosa

    centres = librosa.mel_frequencies(n_mels=BANDS + 2, fmax=RATE / 2)[1:-1]
    for pitch in (440, 1500, 5000):
        loudest = data.spectrogram(sine(pitch)).mean(0).argmax()
        assert abs(centres[loudest] / pitch - 1) < 0.1


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_tone(name):
    rng = np.random.default_rng(0)
    sounds = [data.tone(INSTRUMENTS[name], rng) for _ in range(5)]
    assert {sound.shape for sound in sounds} == {((data.TONE_FRAMES + 1) * HOP,)}
    assert all(np.isfinite(sound).all() and sound.dtype == np.float32 for sound in sounds)
    levels = [np.sqrt(np.mean(sound**2)) for sound in sounds]
    assert min(levels) > 0.005
    assert len(set(levels)) == 5


@pytest.fixture
def wav_folder(tmp_path):
    """Two labels of ten files each, of different lengths and rates."""
    import soundfile

    for label, pitch in (("high", 3000), ("low", 300), ("_background_noise_", 50)):
        (tmp_path / label).mkdir()
        for number in range(10):
            rate = (RATE, 8000)[number % 2]
            sound = np.sin(2 * np.pi * pitch * np.arange((4000, 30000)[number % 2]) / rate)
            soundfile.write(tmp_path / label / f"{number}.wav", sound, rate)
    return tmp_path


def test_recordings(wav_folder):
    found = data.recordings(wav_folder)
    check(found, (data.RECORDED_FRAMES, BANDS), 2)
    assert len(found.test) == 4


def test_recordings_with_a_list_of_those_to_test_on(wav_folder):
    (wav_folder / "testing_list.txt").write_text("high/0.wav\nlow/3.wav\nlow/4.wav\n")
    found = data.recordings(wav_folder)
    assert found.test_labels.tolist() == [0, 1, 1]
    assert len(found.train) == 17


def test_a_folder_without_recordings(tmp_path):
    (tmp_path / "flute").mkdir()
    with pytest.raises(FileNotFoundError, match=r"subfolder of \.wav files for each label, found \['flute'\]"):
        data.recordings(tmp_path)


def test_cifar(tmp_path, monkeypatch):
    """Files as CIFAR-10 has them, of two images each; their sums differ from the real ones."""
    from torchvision import datasets

    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, name in enumerate((*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")):
        count = 10 if name == "test_batch" else 2
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = list(range(10)) if name == "test_batch" else [2 * number, 2 * number + 1]
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    assert list(data.available(tmp_path))[4:] == ["cifar10"]
    found = SOURCES["cifar10"].read(tmp_path)
    check(found, (1, 3, 32, 32), 10)
    torch.testing.assert_close(found.train.mean((0, 1, 3, 4)), torch.zeros(3), atol=1e-4, rtol=0)
    assert found.augment(found.train[0]).shape == (1, 3, 32, 32)


def test_nmnist(tmp_path, monkeypatch):
    """Files as N-MNIST has them: x, y, then polarity and 23 bits of microseconds."""
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


def test_dvs_gesture(tmp_path, monkeypatch):
    import tonic

    monkeypatch.setattr(tonic.datasets.DVSGesture, "_check_exists", lambda self: True)
    for part in ("ibmGestureTrain", "ibmGestureTest"):
        folder = tmp_path / "DVSGesture" / part / "user01_fluorescent"
        folder.mkdir(parents=True)
        for label in range(2):
            events = np.array([[x, 127, x % 2, x] for x in range(128)])
            np.save(folder / f"{label}.npy", events)
    found = SOURCES["dvs_gesture"].read(tmp_path)
    check(found, (16, 2, 32, 32), 2)
    assert found.train.flatten(1).long().sum(1).tolist() == [127] * 2  # the last one ends the last frame
    assert found.train[0, :, :, :31].sum() == 0


def test_cifar10_dvs_comes_in_one_piece(tmp_path, monkeypatch):
    import tonic

    class Recordings(list):
        """A data set of ten samples for each of two labels."""

        sensor_size = (128, 128, 2)

        def __init__(self, save_to, transform):
            events = np.zeros(4, dtype=tonic.datasets.DVSGesture.dtype)
            super().__init__((transform(events), number % 2) for number in range(20))

    monkeypatch.setattr(tonic.datasets, "CIFAR10DVS", Recordings)
    (tmp_path / "CIFAR10DVS").mkdir()
    found = SOURCES["cifar10_dvs"].read(tmp_path)
    check(found, (10, 2, 32, 32), 2)
    assert len(found.test) == 4


def test_spiking_heidelberg_digits(tmp_path, monkeypatch):
    import h5py
    import tonic

    monkeypatch.setattr(tonic.datasets.SHD, "_check_exists", lambda self: True)
    (tmp_path / "SHD").mkdir()
    for part in ("train", "test"):
        with h5py.File(tmp_path / "SHD" / f"shd_{part}.h5", "w") as file:
            for name, dtype, rows in (
                ("times", np.float32, [np.linspace(0, 1, 50), np.linspace(0, 0.7, 20)]),
                ("units", np.int64, [np.arange(50), np.full(20, 699)]),
            ):
                column = file.create_dataset(f"spikes/{name}", (2,), h5py.vlen_dtype(dtype))
                for row, values in enumerate(rows):
                    column[row] = values.astype(dtype)
            file["labels"] = [0, 1]
            file["extra/keys"] = [b"null", b"eins"]
            file["extra/speaker"] = [1, 2]
    found = SOURCES["shd"].read(tmp_path)
    check(found, (100, 700), 2)
    assert found.train[1, :, :699].sum() == 0
    assert found.train[1, :, 699].sum() == 19  # the last one ends the last frame


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder NMNIST in the data root, which is None"):
        SOURCES["nmnist"].read(None)
    with pytest.raises(FileNotFoundError, match="expected a folder instruments in the data root"):
        SOURCES["instruments"].read(tmp_path)
    assert list(data.available(tmp_path)) == list(data.available(None))
    assert {SOURCES[name].kind for name in data.available(None)} == set(data.KINDS)
